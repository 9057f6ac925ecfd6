"""Every line of code in the README runs as it is written there, in its order, in the folder of a new user.

Run as a script, this file is that user: one process, in a clone of this repository and with the loopback Hub, takes
the blocks and the commands in the text from README.md, runs them, and notes what became of each.
"""

import hashlib
import importlib
import json
import re
import runpy
import shlex
import shutil
import sys
import tomllib
import traceback
from pathlib import Path

import forks
import pytest
from PIL import Image


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
sys.path.insert(0, str(ROOT / "examples"))
import record_phantom  # noqa: E402 - the scripts are no package


# What keeps the commands short; the text itself is never changed.
QUICK_TRAINING = "--max_steps 2 --use_cpu --disable_tqdm true --per_device_eval_batch_size 16"
APPENDED = {
    "examples/run_segmentation.py": QUICK_TRAINING,  # two steps for minutes, and no bars
    "sam2unet train": QUICK_TRAINING,
    "sam2unet phantom": "--num_patients 1 --shape 40 40 26",
    "dataset_scripts.phantom": "--num_patients 1 --shape 40 40 26",  # for 30 patients of four times the size
}
# Words in capitals that the reader replaces.
PLACEHOLDERS = {"MODEL": "runs/phantom", "FOLDER": "metric_dice"}
# What is not run here, and who runs it.
ELSEWHERE = {
    "python3": "`.ci/run` makes a virtual environment, too",
    "source": "`.ci/run` enters it",
    "pytest": "this is it",
}
# What a block must have made, as Python with its names.
CHECKS = {
    "from PIL import Image": "mask.shape == (image.height, image.width) and model.config.id2label[1]",
    "import torch": "out.logits.shape == pixel_values.shape[:1] + (1, 240, 240) and out.loss.isfinite()",
    "from sam2unet_hf.volume import": "found.label_map.shape == found.region('WT').shape and 'WT' in found.volumes_ml",
    "from sam2unet_hf.metrics import": "0 < scores['dice_TC'] < 1 and scores['mae'] > 0",
}


def find_code(text):
    """Return the code of a guide by its heading and first line, what kind it is and its text.

    Blocks come first, in their order, then the commands in sentences, which name what blocks have made.
    """
    blocks, commands, heading = {}, {}, ""
    code = r"^```(?P<kind>\w*)\n(?P<block>.*?)^```$|^#+ (?P<heading>[^\n]*)$|`(?P<inline>[^`]+)`"
    for match in re.finditer(code, text, re.MULTILINE | re.DOTALL):
        kind, block = match["kind"], match["block"]
        if match["heading"]:
            heading = match["heading"]
            continue
        if match["inline"] and re.match(r"(python3?|pip|sam2unet|pytest|[A-Z_]+=\S+) \S", match["inline"]):
            commands[f"{heading}: {match['inline']}"] = "bash", " ".join(match["inline"].split())
        elif kind:
            blocks[f"{heading}: {block.splitlines()[0]}"] = kind, block
    return blocks, commands


BLOCKS, COMMANDS = find_code(README)
CODE = {**BLOCKS, **COMMANDS}


def split_commands(text):
    """Return the words of each command of a shell."""
    commands = [[]]
    for line in text.replace("\\\n", " ").splitlines():
        for word in [*shlex.split(line, comments=True), "&&"]:
            commands = [*commands, []] if word == "&&" else [*commands[:-1], [*commands[-1], word]]
    return [command for command in commands if command]


def check_install(words):
    """Check that what `pip install` names is this package with extras that it has."""
    requirements = [word for word in words if not word.startswith("-")]
    assert requirements, words
    for requirement in requirements:
        path, extras = re.fullmatch(r"(\.|sam2unet-hf)\[([\w,]+)\]", requirement).groups()
        assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys(), requirement


def run_command(words):
    """Run a command in this process, as a shell runs it in one of its own."""
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, *words = [PLACEHOLDERS.get(word, word) for word in words]
    if program == "pip" and words[0] == "install":
        check_install(words[1:])
    elif program == "python" and words[0] == "-m":
        run_program(words[1], words[2:], lambda: runpy.run_module(words[1], run_name="__main__"))
    elif program == "python":
        run_program(words[0], words[1:], lambda: runpy.run_path(words[0], run_name="__main__"))
    elif program in PROJECT.get("scripts", {}):
        module, function = PROJECT["scripts"][program].split(":")
        run_program(f"{program} {words[0]}", words, getattr(importlib.import_module(module), function))
    elif program not in ELSEWHERE:
        raise ValueError(f"Nothing here runs {program}: {words}. Add it to this file.")


def run_program(name, words, program):
    sys.argv = [name, *words, *shlex.split(APPENDED.get(name, ""))]
    try:
        program()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{sys.argv} ended with {end.code}") from end


def run_block(kind, text):
    if kind == "bash":
        for words in split_commands(text):
            run_command(words)
        return
    names = {"__name__": "__main__", **GIVEN}
    exec(compile(text, "README.md", kind.replace("python", "exec")), names)
    checks = [check for start, check in CHECKS.items() if text.startswith(start)]
    assert all(eval(check, names) for check in checks), checks


GIVEN = {}  # names that the reader has


def prepare():
    """Be a user with data and a clone, in the working directory, whose models are small."""
    import datasets
    import numpy as np
    import torch
    from common import reference_config, reference_facts, reference_state_dict

    from dataset_scripts.phantom import VERSION, write_phantom_cohort
    from sam2unet_hf import configuration_sam2unet

    Path("examples").symlink_to(ROOT / "examples")
    # The tiny encoder of SAM 2 has 27 million parameters.
    backbone = reference_config().backbone_config.to_dict()
    tiny = configuration_sam2unet.PRESETS["tiny"]
    tiny.update({name: backbone[name] for name in tiny})
    # A cohort of seven small patients for the 30 of the phantom, and for the 369 of BraTS.
    cohort = Path(datasets.config.HF_DATASETS_CACHE) / f"sam2unet-phantom-{VERSION}"
    write_phantom_cohort(cohort, num_patients=7, shape=(40, 40, 26))
    shutil.copytree(cohort, "BraTS2020_TrainingData")
    rng = np.random.default_rng(0)
    for folder in ("my_data/images", "my_data/masks", "pictures", "predictions", "masks"):
        Path(folder).mkdir(parents=True)
    for name in "abcdefgh":
        mask = np.zeros((70, 80), np.uint8)
        mask[10:40, 20 : rng.integers(40, 70)] = 255
        picture = Image.fromarray((mask // 2 + rng.integers(0, 99, mask.shape)).astype(np.uint8))
        picture.save(f"my_data/images/{name}.jpg")
        for folder in ("my_data/masks", "predictions", "masks"):
            Image.fromarray(mask).save(f"{folder}/{name}.png")
    shutil.copy("my_data/images/a.jpg", "pictures")
    picture.save("slice.png")
    torch.save(reference_state_dict(reference_facts()["state_dict"]), "SAM2-UNet.pth")
    shape = (2, 32, 32)  # whole tumour and core
    GIVEN["pairs"] = [(rng.random(shape), (rng.random(shape) > 0.5).astype(np.uint8)) for _ in range(3)]


def main(path):
    prepare()
    outcomes = {}
    for name, (kind, text) in CODE.items():
        try:
            run_block(kind, text)
            outcomes[name] = None
        except Exception:
            outcomes[name] = traceback.format_exc()
        Path(path).write_text(json.dumps(outcomes))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    from common import sam2_model
    from loopback_hub import LoopbackHub

    folder = tmp_path_factory.mktemp("readme")
    home = folder / "home"
    home.mkdir()
    with LoopbackHub(user="your_name") as hub:
        for size in ("tiny", "large"):  # small ones in their place
            sam2_model("sam2_video").save_pretrained(folder / "sam2")
            files = {path.name: path.read_bytes() for path in (folder / "sam2").iterdir()}
            hub.create("models", f"facebook/sam2-hiera-{size}", files)
        environment = hub.environment(folder / "hf", "hf_write") | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
        environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
        report = folder / "outcomes.json"
        done = forks.run([__file__, report], cwd=home, env=environment, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        assert hub.unknown_requests == []
        yield json.loads(report.read_text()), home, hub


@pytest.mark.parametrize("name", CODE)
def test_code_of_the_readme_runs(outcomes, name):
    assert outcomes[0][name] is None, outcomes[0][name]


def test_code_of_the_readme_has_done_what_the_readme_says(outcomes):
    _, home, hub = outcomes
    assert sum(text.startswith("```") for text in README.splitlines()) == 2 * (len(BLOCKS) + 1)  # and a tree of files
    for run in ("phantom", "my_data", "BraTS2020_TrainingData"):
        assert {"README.md", "predictions.png", "training_curve.png"} <= {
            p.name for p in (home / "runs" / run).iterdir()
        }
    assert (home / "segmentations" / "Phantom_001_seg.nii.gz").exists()
    assert (home / "segmentations" / "a.png").exists()
    assert hub.repos["models", "your_name/brain-tumors"].private
    assert {"config.json", "model.safetensors", "volume_sam2unet.py"} <= set(
        hub.files("models", "your_name/brain-tumors")
    )


def test_code_that_nobody_runs_is_named():
    with pytest.raises(ValueError, match="Nothing here runs conda"):
        run_command(["conda", "install", "sam2unet-hf"])
    with pytest.raises(AssertionError, match="nothing"):
        run_command(["pip", "install", "-e", ".[nothing]"])
    with pytest.raises(RuntimeError, match="--nothing.* ended with 2"):
        run_command(["python", str(ROOT / "examples/run_segmentation.py"), "--nothing"])


def test_picture_and_figures_are_of_one_run_of_the_readmes_first_command():
    record = json.loads(record_phantom.RECORD.read_text(encoding="utf-8"))
    assert hashlib.sha256(record_phantom.PICTURE.read_bytes()).hexdigest() == record["picture_sha256"]
    with Image.open(record_phantom.PICTURE) as picture:
        assert picture.text["Description"] == f"{record['command']}, {record['date']}, commit {record['commit']}"
    assert f"](examples/results/{record_phantom.PICTURE.name})" in README
    first = next(words for _, text in BLOCKS.values() for words in split_commands(text) if words[0] != "pip")
    assert not any(word.startswith("-") for word in [*first, *shlex.split(record["command"])])  # no option in either
    for name in record_phantom.sentences(record):
        guide = (ROOT / "examples" / name).read_text(encoding="utf-8")
        assert record_phantom.state_figures(name, guide, record) == guide, name
    assert 2 <= record["training_s"] / 60 <= 5  # "about five minutes", with what comes before and after the training


def test_record_of_a_run_and_its_figures_in_guides(outcomes, tmp_path, monkeypatch):
    run = outcomes[1] / "runs" / "phantom"
    for name in ("training.md", "volumes.md"):
        shutil.copy(ROOT / "examples" / name, tmp_path)
    monkeypatch.setattr(record_phantom, "GUIDES", tmp_path)
    monkeypatch.setattr(record_phantom, "RECORD", tmp_path / "phantom.json")
    monkeypatch.setattr(record_phantom, "PICTURE", tmp_path / "phantom.png")
    record_phantom.main([str(run)])
    record = json.loads((tmp_path / "phantom.json").read_text())
    results = json.loads((run / "all_results.json").read_text())
    assert record["scores"]["test_iou"] == round(results["test_iou"], 4)
    assert record["command"] == f"python examples/run_segmentation.py {QUICK_TRAINING}"
    assert f"| {record['scores']['test_iou']:.3f} |" in (tmp_path / "training.md").read_text()
    (worst,) = (
        name for name, dice in record["test_patients"].items() if dice == min(record["test_patients"].values())
    )
    assert f"on that of `{worst}`, the worst" in (tmp_path / "volumes.md").read_text()
    with Image.open(tmp_path / "phantom.png") as picture, Image.open(run / "predictions.png") as original:
        assert picture.tobytes() == original.tobytes()
    with pytest.raises(SystemExit, match="no run on the phantom"):
        record_phantom.main([str(outcomes[1] / "runs" / "my_data")])
    with pytest.raises(SystemExit, match="holds no finished run"):
        record_phantom.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="must hold once, not 0 times"):
        record_phantom.state_figures("volumes.md", "no figures", record)


if __name__ == "__main__":
    main(sys.argv[1])
