"""The command `sam2unet`: its list of commands, their help, and the facts of a model, which need no PyTorch."""

import json
import os
import resource
import subprocess
import sys

import pytest
from common import BRATS_REGIONS, small_config
from huggingface_hub import constants

from sam2unet_command.__main__ import COMMANDS, main, requirements_like
from sam2unet_command.info import describe_model, find_preset
from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.configuration_sam2unet import PRESETS


HEAVY = {"torch", "transformers", "datasets", "numpy", "sam2unet_hf"}
# Imports nothing itself that it looks for.
WATCH = """
import json, sys
from sam2unet_command.__main__ import main
try:
    main(sys.argv[1:])
finally:
    sys.stderr.write(json.dumps(sorted(name for name in sys.modules if "." not in name)))
"""


def run(*arguments, cwd):
    """Run the command in a process of its own; return what it printed, what it imported, and its processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", WATCH, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=os.environ, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, set(json.loads(done.stderr)), seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder without weights, which the facts do not need."""
    folder = tmp_path_factory.mktemp("runs") / "phantom"
    small_config(regions=BRATS_REGIONS).save_pretrained(folder)
    processor = Sam2UNetImageProcessor(
        BRATS_REGIONS, modalities=["flair"], neighbours=1, plane="axial", head_crop_size={"height": 64, "width": 96}
    )
    processor.save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"arguments": {"recipe": "volume", "brats_dir": "scans"}}))
    scores = {"test_dice": 0.75, "test_dice_WT": 0.75, "test_patient_dice": 0.5, "test_mae": 0.01}
    (folder / "all_results.json").write_text(json.dumps(scores))
    (folder / "clean_up.json").write_text(json.dumps({"regions": {"WT": {"threshold": 0.4, "min_volume_ml": None}}}))
    return folder


def test_the_list_of_commands_needs_no_library(tmp_path):
    text, imported, seconds = run(cwd=tmp_path)
    assert not imported & (HEAVY | {"huggingface_hub"})
    assert seconds < 1
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("  ") and "sam2unet" not in line[:11]]
    assert listed == list(COMMANDS)
    assert text.count("\n") < 40
    assert run("--help", cwd=tmp_path)[0] == text


def test_facts_of_a_folder_need_no_library(folder):
    text, imported, seconds = run("info", folder.name, "--json", cwd=folder.parent)
    assert not imported & (HEAVY | {"huggingface_hub"})
    assert seconds < 1
    facts = json.loads(text)
    assert facts["model"] == "phantom"
    assert (facts["regions"], list(facts["regions"])) == (BRATS_REGIONS, list(BRATS_REGIONS))
    assert facts["input"] == {
        **{"channels": 3, "modalities": ["flair"], "neighbours": 1, "plane": "axial"},
        **{"head_crop_size": {"height": 64, "width": 96}, "head_crop_scale": 1},
    }
    assert (facts["recipe"], facts["data"], facts["preset"], facts["members"]) == ("volume", "scans", None, [])
    assert facts["scores"]["test_patient_dice"] == 0.5
    assert facts["clean_up"] == {"WT": {"threshold": 0.4, "min_volume_ml": None}}


def test_facts_are_told(folder, capsys):
    main(["info", str(folder)])
    text = capsys.readouterr().out
    for part in (
        "WT = 1, 2, 3",
        "flair; 1 slice below",
        "64 x 96",
        "volume",
        "test_patient_dice 0.500",
        "threshold 0.4",
    ):
        assert part in text
    assert "test_mae" not in text


def test_an_ensemble_has_the_facts_of_its_members(folder, tmp_path):
    for name in ("fold_0", "fold_1"):
        (tmp_path / name).symlink_to(folder)
    (tmp_path / "ensemble.json").write_text('{"members": ["fold_0", "fold_1"]}')
    facts = describe_model(str(tmp_path))
    assert facts["members"] == ["fold_0", "fold_1"]
    assert (facts["regions"], facts["recipe"]) == (BRATS_REGIONS, "volume")
    assert facts["scores"] == {}


def test_a_model_of_the_hub_is_found_in_the_cache(folder, tmp_path, monkeypatch):
    cached = tmp_path / "models--tester--brain"
    snapshot = cached / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("c0ffee")
    (snapshot / "config.json").write_bytes((folder / "config.json").read_bytes())
    (snapshot / "README.md").write_text(
        "---\nmodel-index:\n- name: brain\n  results:\n  - task: {type: image-segmentation}\n"
        "    dataset: {name: BraTS, type: brats, split: test}\n"
        "    metrics:\n    - {type: dice, value: 0.8, name: Dice}\n    - {type: dice, value: 0.7, name: 'Dice, TC'}\n"
        "---\n\n# A model\n"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    facts = describe_model("tester/brain")
    assert facts["regions"] == BRATS_REGIONS
    assert facts["scores"] == {"test_dice": 0.8, "test_dice_TC": 0.7}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_size_of_an_encoder_is_told(preset):
    assert find_preset({**PRESETS[preset], "num_channels": 3}) == preset


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({}, "holds no model: there is neither config.json nor ensemble.json"),
        ({"config.json": "{"}, r"config.json cannot be read: .*download it again"),
        ({"config.json": '{"model_type": "bert"}'}, "a model of type 'bert', not a SAM2-UNet"),
        ({"config.json": '{"model_type": "sam2unet"}'}, "config.json lacks `backbone_config`"),
        (
            {"config.json": small_config(regions=BRATS_REGIONS).to_json_string(), "README.md": "---\n{\n---\n"},
            r"README.md has a damaged header: .*Write it anew by `sam2unet card`",
        ),
    ],
)
def test_what_is_no_model_is_told(files, match, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit, match=match):
        main(["info", str(tmp_path)])


def test_a_training_that_has_not_ended_is_told(tmp_path):
    (tmp_path / "run" / "checkpoint-20").mkdir(parents=True)
    with pytest.raises(SystemExit, match="The training in .*run has not ended.*goes on from its last checkpoint"):
        main(["info", str(tmp_path / "run")])
    (tmp_path / "run" / "all_results.json").write_text("{}")  # of a finished one, whose model was removed
    with pytest.raises(SystemExit, match="run holds no model"):
        main(["info", str(tmp_path / "run")])
    (tmp_path / "cv").mkdir()
    (tmp_path / "cv" / "folds.json").write_text("{}")
    with pytest.raises(SystemExit, match="The cross-validation in .*cv has not ended"):
        main(["info", str(tmp_path / "cv")])
    (tmp_path / "cv" / "ensemble.json").write_text('{"members": ["fold_0"]}')
    with pytest.raises(SystemExit, match="cv holds no model"):
        main(["info", str(tmp_path / "cv")])


def test_a_mistyped_model_or_command_is_answered_by_what_was_meant(folder, capsys, monkeypatch):
    with pytest.raises(SystemExit, match=r"no folder .*phantm.*Did you mean .*phantom\?"):
        main(["info", str(folder.with_name("phantm"))])
    monkeypatch.chdir(folder.parent)
    for typed in ("phantom-", "../phantom", f"../{folder.parent.name}/phantm"):  # no names of the Hub either
        with pytest.raises(SystemExit, match="There is no folder"):
            main(["info", typed])
    for name, meant in (("trian", "train"), ("predict", "segment"), ("Score", "score")):
        with pytest.raises(SystemExit) as end:
            main([name])
        assert end.value.code == 2
        assert f"no command {name}. Did you mean `sam2unet {meant}`?" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_fits_a_screen_and_names_it(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.count("\n") <= 45
    assert name == "train" or text.startswith(f"usage: sam2unet {name} ")
    assert "python -m sam2unet_hf" not in text


def test_rare_options_are_listed_on_request_and_taken(capsys):
    for option, is_listed in (("--help", False), ("--help-all", True)):
        with pytest.raises(SystemExit):
            main(["segment", option])
        assert ("--threshold" in capsys.readouterr().out) == is_listed
    with pytest.raises(SystemExit):
        main(["score", "model", "case", "-o", "out", "--threshold", "2"])
    error = capsys.readouterr().err
    assert error.startswith("usage: sam2unet score ")
    assert "--threshold must be a probability" in error


def test_a_missing_package_is_named_with_those_that_come_with_it(monkeypatch):
    # The names that hold for a wheel and for a checkout, since there may be no index that has the extras.
    lines = ["torch>=2.10", "accelerate>=1.10; extra == 'examples'", 'matplotlib>=3.9; extra == "examples"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
    assert requirements_like("matplotlib") == ["accelerate>=1.10", "matplotlib>=3.9"]
    assert requirements_like("torch") == requirements_like("math") == requirements_like("") == []

    def fail(module):
        raise ModuleNotFoundError("No module named 'accelerate'", name="accelerate.utils")

    monkeypatch.setattr("importlib.import_module", fail)
    match = r'sam2unet train needs accelerate, not installed. Run: pip install "accelerate>=1.10" "matplotlib>=3.9"'
    with pytest.raises(SystemExit, match=match):
        main(["train"])


def test_every_command_leads_to_a_function(monkeypatch):
    """With its arguments and its name."""
    calls = []
    for name, command in COMMANDS.items():
        function = command.function.replace(":", ".")
        monkeypatch.setattr(function, lambda argv, prog: calls.append((argv, prog)))
        main([name, "a", "--b"])
        usage = "sam2unet" if command.prefix else f"sam2unet {name}"
        assert calls.pop() == ([*command.prefix, "a", "--b"], usage)
