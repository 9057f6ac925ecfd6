"""The `evaluate` modules, their cards, and the command line."""

import doctest
import json
import os
import re
import shutil
import sys
from pathlib import Path

import evaluate
import forks
import numpy as np
import pytest
import torch
import yaml
from PIL import Image as PILImage

from sam2unet_hf import metrics
from sam2unet_hf.metrics.__main__ import main
from sam2unet_hf.metrics.functional import score
from sam2unet_hf.metrics.segmentation_metric import Accumulator
from sam2unet_hf.metrics.space import METRIC_CLASSES, render_metric_card


FOLDER = Path(metrics.__file__).parent
MODULES = {
    "dice": metrics.Dice,
    "e_measure": metrics.EMeasure,
    "f_beta": metrics.FBeta,
    "iou": metrics.Iou,
    "mae": metrics.Mae,
    "s_measure": metrics.SMeasure,
    "segmentation_report": metrics.SegmentationReport,
    "weighted_f_beta": metrics.WeightedFBeta,
}
CURVE_KEYS = {name: {name, f"mean_{name}", f"max_{name}", f"adaptive_{name}"} for name in ("dice", "iou", "f_beta")}
KEYS = CURVE_KEYS | {
    "e_measure": {"e_measure", "mean_e_measure", "max_e_measure", "adaptive_e_measure"},
    "mae": {"mae"},
    "s_measure": {"s_measure"},
    "weighted_f_beta": {"weighted_f_beta"},
}
# Tested in test_metrics_volume.py.
VOLUME_MODULES = {
    "hausdorff_95",
    "hausdorff_95_pooled",
    "lesion_dice",
    "lesion_hausdorff_95",
    "lesion_report",
    "lesion_surface_distance",
    "normalized_surface_distance",
    "sensitivity",
    "specificity",
    "volume_dice",
    "volume_report",
}
KEYS["segmentation_report"] = set().union(*KEYS.values())


@pytest.fixture(scope="module")
def images():
    """Probabilities and masks of three sizes, one mask empty."""
    generator = np.random.default_rng(0)
    sizes = [(20, 30), (17, 9), (40, 40)]
    masks = [generator.random(size) < share for size, share in zip(sizes, (0.3, 0.0, 0.6), strict=True)]
    predictions = [np.clip(mask * 0.5 + generator.random(mask.shape) * 0.6, 0, 1) for mask in masks]
    return predictions, masks


def test_every_module_is_here():
    found = {path.stem for path in FOLDER.glob("*.py")} - {
        "__init__",
        "__main__",
        "functional",
        "lesion_functional",
        "segmentation_metric",
        "space",
        "streaming_metric",
        "volume_functional",
        "volume_metric",
    }
    assert found == {*MODULES, *VOLUME_MODULES} == METRIC_CLASSES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_loaded_by_path_it_is_the_class(name, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predictions, references = images
    loaded = evaluate.load(str(FOLDER / f"{name}.py"))
    assert loaded.name == name
    result = loaded.compute(predictions=predictions, references=references)
    assert result == MODULES[name]().compute(predictions=predictions, references=references)
    assert set(result) == KEYS[name]
    assert all(isinstance(value, float) and 0 <= value <= 1.01 for value in result.values())


def test_all_modules_load_outside_the_checkout_without_network(tmp_path, images):
    # A folder per module, as a Space has it.
    for name in MODULES:
        (tmp_path / name).mkdir()
        for file in (f"{name}.py", "distances.py", "functional.py", "segmentation_metric.py", "streaming_metric.py"):
            shutil.copy(FOLDER / file, tmp_path / name)
    code = f"""
import socket, sys
def refuse(*args, **kwargs):
    raise OSError("there is no network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.modules["sam2unet_hf"] = None
import evaluate
for name in {list(MODULES)}:
    result = evaluate.load(name).compute(predictions=[[[0.2, 0.9]]], references=[[[0, 1]]])
    print(name, sorted(result))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
    environment |= {"HF_HOME": str(tmp_path / "home")}
    run = forks.run(["-c", code], cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [f"{name} {sorted(KEYS[name])}" for name in MODULES]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_card_and_module_run(name, monkeypatch):
    monkeypatch.chdir(FOLDER)
    card = doctest.DocTestParser().get_doctest(render_metric_card(name), {}, name, None, 0)
    result = doctest.DocTestRunner().run(card)
    assert result.failed == 0
    blocks = re.findall(r"^```python\n", card.docstring, flags=re.MULTILINE)
    assert len(blocks) == 2
    assert sum(bool(example.want) for example in card.examples) >= 2
    finder = doctest.DocTestFinder(exclude_empty=True)
    (module_test,) = finder.find(MODULES[name], module=sys.modules[MODULES[name].__module__], globs={})[:1]
    assert len(module_test.examples) == 5
    assert doctest.DocTestRunner().run(module_test).failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_cards_have_what_a_space_needs(name):
    text = render_metric_card(name)
    _, front, body = text.split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["sdk"] == "gradio"
    assert data["app_file"] == "app.py"
    assert {"evaluate", "metric"} <= set(data["tags"])
    assert " ".join(MODULES[name]().description.split()) == data["description"]
    assert re.search(r"doi = \{10\.\d{4,}/\S+\}", body)
    for heading in ("How to use", "Inputs", "Output", "Special images", "Citation"):
        assert f"\n## {heading}\n" in body
    # Every option is described.
    for option in MODULES[name]()._options:
        assert f"- `{option}`: " in body, option
        assert f"    {option}: " in MODULES[name]().inputs_description, option


def test_all_ways_to_add_images_give_the_same(images):
    predictions, references = images
    metric = metrics.SegmentationReport()
    expected = metric.compute(predictions=predictions, references=references)
    for prediction, reference in zip(predictions, references, strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert len(metric) == 3
    assert metric.compute() == expected
    metric.add_batch(predictions=predictions[1:], references=references[1:])
    assert metric.compute(predictions=predictions[:1], references=references[:1]) == expected
    assert len(metric) == 0


def test_combine_joins_the_modules(images, monkeypatch):
    predictions, references = images
    monkeypatch.chdir(FOLDER)
    combined = evaluate.combine(["./dice.py", "./iou.py", metrics.Mae()])
    together = combined.compute(predictions=predictions, references=references)
    assert set(together) == KEYS["dice"] | KEYS["iou"] | KEYS["mae"]
    for prediction, reference in zip(predictions, references, strict=True):
        combined.add(prediction, reference)
    assert combined.compute() == together
    combined.add_batch(predictions, references)
    assert combined.compute() == together


KINDS = {
    "float32": lambda x: np.asarray(x, dtype=np.float32),
    "float16": lambda x: np.asarray(x, dtype=np.float16),
    "torch": torch.from_numpy,
    "bfloat16": lambda x: torch.from_numpy(x).bfloat16(),
    "with gradient": lambda x: torch.from_numpy(x).requires_grad_(),
    "list": lambda x: x.tolist(),
    "strided": lambda x: np.asfortranarray(x)[::1],
}


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_may_come_as(kind):
    # Eighths, exact in every type.
    prediction = np.arange(24).reshape(4, 6) % 9 / 8
    reference = prediction > 0.4
    expected = metrics.SegmentationReport().compute(predictions=[prediction], references=[reference])
    metric = metrics.SegmentationReport()
    assert metric.compute(predictions=[KINDS[kind](prediction)], references=[reference]) == expected


def test_8_bit_maps_and_masks_of_any_kind_are_the_same():
    mask = np.arange(24).reshape(4, 6) % 3 == 0
    metric = metrics.SegmentationReport()
    expected = metric.compute(predictions=[mask], references=[mask])
    kinds = [mask.astype(np.uint8), mask.astype(np.int64), mask.astype(np.uint8) * 255, mask.astype(np.float32)]
    kinds += [PILImage.fromarray(mask), PILImage.fromarray(mask.astype(np.uint8) * 255), torch.from_numpy(mask)]
    kinds += [mask.tolist(), mask.astype(int).tolist()]
    kinds[3] = kinds[3].astype(np.float64)
    for kind in kinds:
        assert metric.compute(predictions=[kind], references=[mask]) == expected
        assert metric.compute(predictions=[mask], references=[kind]) == expected
        assert metric.compute(predictions=[kind], references=[mask], normalize="minmax") == expected


def test_regions_have_their_own_keys_and_their_mean(images):
    predictions, references = images
    stacked = np.stack([predictions[2], 1 - predictions[2]]), np.stack([references[2], references[2]])
    metric = metrics.SegmentationReport(regions=["WT", "TC"])
    result = metric.compute(predictions=stacked[0][None], references=stacked[1][None])
    assert len(result) == 3 * 19
    for index, region in enumerate(("WT", "TC")):
        single = metrics.SegmentationReport().compute(predictions=[stacked[0][index]], references=[references[2]])
        assert {name: result[f"{name}_{region}"] for name in single} == single
    for name in KEYS["segmentation_report"]:
        assert result[name] == pytest.approx((result[f"{name}_WT"] + result[f"{name}_TC"]) / 2, abs=1e-15)
    numbered = metrics.Dice().compute(predictions=stacked[0][None], references=stacked[1][None])
    assert numbered["dice_0"] == result["dice_WT"]


def test_options_go_to_load_or_compute(images, monkeypatch):
    predictions, references = images
    monkeypatch.chdir(FOLDER)
    at_compute = evaluate.load("./dice.py").compute(
        predictions=predictions, references=references, normalize="minmax", zero_division=1
    )
    metric = evaluate.load("./dice.py", normalize="minmax", zero_division=1)
    metric.add_batch(predictions=predictions, references=references)
    with pytest.raises(ValueError, match="3 images were added with another value of zero_division"):
        metric.compute(zero_division=0)
    assert metric.compute(zero_division=1) == at_compute
    assert metrics.Dice().compute(predictions=predictions, references=references) != at_compute


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"normalise": "minmax"}, TypeError, "Dice has no option normalise; it has normalize, zero_division, regions"),
        ({"beta_squared": 1}, TypeError, "Dice has no option beta_squared"),
        ({"num_process": 2}, ValueError, "`num_process` must be 1 for Dice, got 2. Gather"),
    ],
)
def test_wrong_options_raise(options, error, message):
    with pytest.raises(error, match=message):
        metrics.Dice(**options)
    if "num_process" not in options:
        with pytest.raises(error, match=message):
            metrics.Dice().compute(predictions=[[[1]]], references=[[[1]]], **options)


def test_a_wrong_image_costs_nothing_and_is_named(images):
    predictions, references = images
    metric = metrics.Dice()
    expected = metrics.Dice().compute(predictions=predictions, references=references)
    metric.add(prediction=predictions[0], reference=references[0])
    with pytest.raises(ValueError, match=r"Image 1: `prediction` must hold .* values from -3.0 to 1.0 of type"):
        metric.add_batch(predictions=[predictions[1], [[-3.0, 1.0]]], references=[references[1], [[0, 1]]])
    with pytest.raises(ValueError, match=r"Image 0: .* same shape, got \(17, 9\) and \(40, 40\)"):
        metric.compute(predictions=predictions[1:2], references=references[2:])
    with pytest.raises(ValueError, match="equally many, got 2 and 1"):
        metric.compute(predictions=predictions[1:], references=references[2:])
    with pytest.raises(TypeError, match="`predictions` and `references` together"):
        metric.compute(predictions=predictions)
    with pytest.raises(TypeError, match="`prediction` and `reference` together"):
        metric.add(prediction=predictions[0])
    assert len(metric) == 1
    assert metric.compute(predictions=predictions[1:], references=references[1:]) == expected


def test_compute_without_images_raises():
    with pytest.raises(ValueError, match="There is nothing to average"):
        metrics.Dice().compute()


def test_generators_are_images_too(images):
    predictions, references = images
    expected = metrics.Dice().compute(predictions=predictions, references=references)
    assert metrics.Dice().compute(predictions=iter(predictions), references=(r for r in references)) == expected


def write(folder, name, array):
    folder.mkdir(exist_ok=True)
    PILImage.fromarray(array).save(folder / name)


@pytest.fixture
def folders(tmp_path):
    generator = np.random.default_rng(1)
    for index, size in enumerate([(20, 30), (33, 21), (8, 9)]):
        mask = generator.random(size) < 0.3
        prediction = (np.clip(mask * 0.5 + generator.random(size) * 0.4, 0, 1) * 255).astype(np.uint8)
        write(tmp_path / "pred", f"{index}.png", prediction)
        write(tmp_path / "ref", f"{index}.bmp", mask.astype(np.uint8) * 255)
    return tmp_path


def run(folders, *arguments):
    return main(["--pred_dir", str(folders / "pred"), "--ref_dir", str(folders / "ref"), *arguments])


@pytest.mark.parametrize(("arguments", "normalize"), [([], "minmax"), (["--normalize", "none"], None)])
def test_command_line_scores_two_folders(folders, capsys, arguments, normalize):
    result = run(folders, "--output", str(folders / "scores.json"), *arguments)
    accumulator = Accumulator()
    for index in range(3):
        pair = [np.asarray(PILImage.open(folders / name)) for name in (f"pred/{index}.png", f"ref/{index}.bmp")]
        accumulator.add(score(*pair, normalize=normalize))
    expected = accumulator.result()
    assert {name: result[name] for name in expected} == expected
    assert (result["images"], result["normalize"]) == (3, normalize)
    assert json.loads((folders / "scores.json").read_text()) == result
    output = capsys.readouterr().out
    assert f"mDice:        {expected['mean_dice']:.3f}\nmIoU:         {expected['mean_iou']:.3f}\n" in output
    assert f"F_{{beta}}:     {expected['adaptive_f_beta']:.3f}\n" in output
    assert json.loads(output[output.index("{\n") :]) == result


def test_command_line_takes_a_map_that_is_nearly_empty_for_what_it_is(folders):
    # Alone it could be a mask of 0 and 1.
    write(folders / "pred", "2.png", np.ones((8, 9), dtype=np.uint8))
    reference = PILImage.open(folders / "ref/2.bmp")
    alone = metrics.Mae().compute(predictions=[np.full((8, 9), 1 / 255)], references=[reference])
    others = run(folders, "--normalize", "none")["mae"] * 3 - alone["mae"]
    (folders / "pred" / "2.png").unlink()
    (folders / "ref" / "2.bmp").unlink()
    assert run(folders, "--normalize", "none")["mae"] == pytest.approx(others / 2)


def test_command_line_in_processes_gives_the_same(folders, capsys):
    assert run(folders, "--num_proc", "2") == run(folders)


def test_command_line_takes_masks_of_0_and_1_and_soft_edges_and_hidden_files(folders):
    expected = run(folders)
    for path in (folders / "ref").iterdir():
        mask = np.asarray(PILImage.open(path)) > 128
        # Grey pixels, as after resizing, do not count, as in the reference protocol.
        PILImage.fromarray(np.where(mask, 255, 60).astype(np.uint8)).save(path)
    write(folders / "ref", "._0.bmp.png", np.zeros((2, 2), dtype=np.uint8))
    assert run(folders) == expected
    (folders / "ref" / "._0.bmp.png").unlink()
    for path in (folders / "ref").iterdir():
        PILImage.fromarray((np.asarray(PILImage.open(path)) > 128).astype(np.uint8)).save(path)
    assert run(folders, "--output", str(folders / "new" / "scores.json")) == expected
    assert (folders / "new" / "scores.json").exists()


@pytest.mark.parametrize("largest", [1, 255])
def test_command_line_takes_empty_masks_among_masks_of_either_kind(folders, largest):
    write(folders / "ref", "1.bmp", np.zeros((33, 21), dtype=np.uint8))
    expected = run(folders)
    for path in (folders / "ref").iterdir():
        PILImage.fromarray(np.asarray(PILImage.open(path)) // 255 * np.uint8(largest)).save(path)
    assert run(folders) == expected


def test_command_line_names_files_without_partner(folders, capsys):
    (folders / "pred" / "1.png").rename(folders / "pred" / "other.png")
    with pytest.raises(SystemExit):
        run(folders)
    message = capsys.readouterr().err
    assert re.search(r"without prediction in \S+pred: 1; without mask in \S+ref: other\.", message)
    assert run(folders, "--skip_missing")["images"] == 2


def break_nothing_predicted(folders):
    for path in (folders / "pred").iterdir():
        PILImage.fromarray(np.asarray(PILImage.open(path)) // 200).save(path)


def break_text(folders):
    (folders / "pred" / "1.png").write_text("no image")


def break_size(folders):
    write(folders / "pred", "2.png", np.zeros((4, 4), dtype=np.uint8))


def break_label_map(folders):
    write(folders / "ref", "0.bmp", np.full((20, 30), 3, dtype=np.uint8))


def break_depth(folders):
    write(folders / "pred", "2.png", np.zeros((8, 9), dtype=np.uint16))


def break_alpha(folders):
    write(folders / "pred", "2.png", np.zeros((8, 9, 4), dtype=np.uint8))


def break_faint(folders):
    for path in (folders / "ref").iterdir():
        PILImage.fromarray(np.asarray(PILImage.open(path)) // 255 * 100).save(path)


def break_mixed(folders):
    mask = np.asarray(PILImage.open(folders / "ref" / "1.bmp"))
    write(folders / "ref", "1.bmp", mask // 255)


def break_names(folders):
    for path in (folders / "ref").iterdir():
        path.rename(path.with_stem(f"mask_{path.stem}"))
    for path in (folders / "ref").iterdir():
        path.rename(path.with_stem(path.stem.removeprefix("mask_") + "0"))


def break_twice(folders):
    write(folders / "ref", "0.png", np.zeros((20, 30), dtype=np.uint8))


def break_folder(folders):
    shutil.rmtree(folders / "ref")


def break_empty(folders):
    for path in (folders / "pred").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (break_nothing_predicted, "holds nothing above 1 of 255. Save masks as 0 and 255"),
        (break_text, r"pred/1.png cannot be read as an image"),
        (break_size, r"pred/2.png and \S+ref/2.bmp: .* same shape, got \(4, 4\) and \(8, 9\)"),
        (break_label_map, r"ref/0.bmp holds label ids up to 3, and \S+ref/1.bmp nothing but 0 and 255\..*--regions"),
        (break_depth, r"pred/2.png must have 8 bits per channel and no alpha channel, got mode I;16"),
        (break_alpha, r"pred/2.png must have 8 bits per channel and no alpha channel, got mode RGBA"),
        (break_faint, r"ref holds nothing above 100\. Masks are of 0 and 255"),
        (break_mixed, r"ref/1.bmp holds nothing but 0 and 1, and \S+ref/0.bmp values up to 255\..*multiply"),
        (break_names, r"No file in \S+pred has the name of one in \S+ref, such as 00\."),
        (break_twice, r"`ref_dir` holds 0.bmp and 0.png; remove one"),
        (break_folder, r"`ref_dir` must be a folder, got \S+ref"),
        (break_empty, r"`pred_dir` must hold images \(.png.*\), but \S+pred holds none"),
    ],
)
def test_command_line_refuses(folders, capsys, fault, message):
    fault(folders)
    with pytest.raises(SystemExit):
        run(folders, "--normalize", "none")
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))
