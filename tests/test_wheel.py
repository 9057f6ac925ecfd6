"""The wheel is whole: what a stranger installs, outside the checkout, does all that `sam2unet` lists."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from common import small_model
from forks import run
from packaging.requirements import Requirement

from sam2unet_hf import Sam2UNetImageProcessor


ROOT = Path(__file__).parent.parent
PACKAGES = ("sam2unet_hf", "sam2unet_command", "dataset_scripts")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def pip(*arguments):
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | OFFLINE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def tracked_files(*folders):
    command = ["git", "-C", str(ROOT), "ls-files", "--", *folders]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("the checkout has no history")
    return done.stdout.split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of what is tracked, because building leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked_files(*PACKAGES, "pyproject.toml", "README.md", "LICENSE"):
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    pip("wheel", folder / "source", "--no-deps", "--no-build-isolation", "-q", "-w", folder)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    assert wheel.stat().st_size < 1e6
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    # Templates of cards, the citations and the marker of types among them.
    assert sorted(names) == sorted(tracked_files(*PACKAGES))


def test_the_metadata_say_what_pypi_shows(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        found = message_from_bytes(archive.read(path))
        entry_points = archive.read(path.replace("METADATA", "entry_points.txt")).decode()
    assert (found["Name"], found["Version"]) == (PROJECT["name"], PROJECT["version"])
    assert found["Summary"] == PROJECT["description"]
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Requires-Python"] == PROJECT["requires-python"]
    assert found.get_all("Project-URL") == [f"{name}, {url}" for name, url in PROJECT["urls"].items()]
    assert found.get_all("Classifier") == PROJECT["classifiers"]
    extras = PROJECT["optional-dependencies"]
    assert sorted(found.get_all("Provides-Extra")) == sorted(extras)
    requirements = [Requirement(text) for text in found.get_all("Requires-Dist")]
    assert {one.name for one in requirements if not one.marker} == {
        Requirement(t).name for t in PROJECT["dependencies"]
    }
    for extra, texts in extras.items():
        own = [one for one in requirements if one.marker and one.marker.evaluate({"extra": extra})]
        assert sorted(one.name for one in own) == sorted(Requirement(text).name for text in texts)
    assert found["Description-Content-Type"] == "text/markdown"
    description = found.get_payload(decode=True).decode("utf-8")
    assert description.strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert "sam2unet = sam2unet_command.__main__:main" in entry_points


@pytest.fixture(scope="module")
def sam2unet(wheel, tmp_path_factory):
    """Runs the installed command in an empty folder, with the libraries of this environment, without the checkout."""
    folder = tmp_path_factory.mktemp("elsewhere")
    site = folder / "site"
    pip("install", "--no-deps", "-q", "--target", site, wheel)
    small_model(regions={"WT": [1, 2, 3]}).save_pretrained(folder / "start")
    size = {"height": 64, "width": 64}
    Sam2UNetImageProcessor({"WT": [1, 2, 3]}, size=size, modalities=["flair"]).save_pretrained(folder / "start")
    foreign = ("HF_", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environment |= {"PYTHONPATH": str(site), "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}

    def call(*words):
        done = run([str(site / "bin" / "sam2unet"), *map(str, words)], cwd=folder, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, done.stderr

    call.folder = folder
    call.environment = environment
    return call


def test_a_stranger_trains_segments_scores_and_exports(sam2unet):
    folder = sam2unet.folder
    where = "import sam2unet_hf, dataset_scripts; print(sam2unet_hf.__file__, dataset_scripts.__file__)"
    done = run(["-c", where], cwd=folder, env=sam2unet.environment)
    assert [Path(word).is_relative_to(folder / "site") for word in done.stdout.split()] == [True, True]
    assert sam2unet("--version")[0] == f"sam2unet {PROJECT['version']}\n"

    sam2unet("phantom", "--output_dir", "phantom", "--num_patients", 5, "--shape", 48, 48, 31)
    _, said = sam2unet(
        *("train", "--brats_dir", "phantom", "--recipe", "paper", "--slices", 15, "--model_name_or_path", "start"),
        *("--image_size", 64, "--num_train_epochs", 1, "--use_cpu", "--disable_tqdm", "true"),
    )
    assert "The results are in runs/phantom: README.md" in said
    record = json.loads((folder / "runs/phantom/run.json").read_text())
    assert record["git"] == {}
    assert record["versions"]["sam2unet-hf"] == PROJECT["version"]

    case = "phantom/Phantom_001"
    line = json.loads(sam2unet("segment", "runs/phantom", case, "-o", "segmentations")[0])
    assert (folder / line["segmentation"]).exists()
    line = json.loads(sam2unet("score", "runs/phantom", case, "-o", "scored")[0])
    assert 0 <= line["WT"]["volume_dice"] <= 1
    assert (folder / "scored/patients.csv").exists()

    facts = json.loads(sam2unet("info", "runs/phantom", "--json")[0])
    assert (facts["recipe"], facts["regions"]) == ("paper", {"WT": [1, 2, 3]})
    assert 0 <= facts["scores"]["eval_dice"] <= 1
    card = folder / "runs/phantom/README.md"
    card.unlink()
    sam2unet("card", "runs/phantom")
    assert card.read_text().startswith("---\n")


def test_a_stranger_exports(sam2unet):
    pytest.importorskip("onnxscript")
    sam2unet("export", "start", "model.onnx")
    assert (sam2unet.folder / "model.onnx").stat().st_size > 1e5
