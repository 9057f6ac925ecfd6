"""`python -m sam2unet_hf.metrics` on label maps, such as those that `--do_predict` writes."""

import json
import re

import numpy as np
import pytest
from common import small_model
from PIL import Image

from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.finetuning import run_segmentation
from sam2unet_hf.metrics.__main__ import main
from sam2unet_hf.metrics.functional import score


def write(folder, name, pixels, dtype=np.uint8):
    folder.mkdir(parents=True, exist_ok=True)
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels).astype(dtype))
    picture.save(folder / f"{name}.png")


@pytest.fixture
def folders(tmp_path):
    """Two pairs of 10 x 10 pixels: Dice 0.8 and 1 of id 1, 0.5 and 1 (of nothing) of id 2, 0 and 1 of id 3."""
    first, second = np.zeros((2, 10, 10), int), np.zeros((2, 10, 10), int)
    first[0, :2], first[1, :3] = 1, 1
    first[0, 4:7, :2], first[1, 4:7, 1:3] = 2, 2
    first[1, 9] = 3
    second[:, 3:5] = 1
    for name, (reference, prediction) in (("a", first), ("b", second)):
        write(tmp_path / "ref", name, reference)
        write(tmp_path / "pred", name, prediction)
    return tmp_path


def run(folders, *arguments):
    return main(["--pred_dir", str(folders / "pred"), "--ref_dir", str(folders / "ref"), *arguments])


def test_label_maps_are_scored_by_id(folders, capsys):
    result = run(folders, "--output", str(folders / "scores.json"))
    assert result["regions"] == {"class_1": [1], "class_2": [2], "class_3": [3]}
    by_hand = {"class_1": (0.8 + 1) / 2, "class_2": (0.5 + 1) / 2, "class_3": (0 + 1) / 2}
    assert {name: result[f"dice_{name}"] for name in by_hand} == pytest.approx(by_hand)
    assert result["dice"] == pytest.approx(sum(by_hand.values()) / 3)
    assert (result["zero_division"], result["normalize"], result["images"]) == (1.0, None, 2)
    assert json.loads((folders / "scores.json").read_text()) == result
    table = capsys.readouterr().out
    assert "              all     class_1 class_2 class_3\nDice:         0.717   0.900   0.750   0.500\n" in table
    assert run(folders, "--num_proc", "2") == result
    assert run(folders, "--zero_division", "0")["dice_class_2"] == pytest.approx(0.25)


def test_regions_join_ids(folders):
    result = run(folders, "--regions", "all=1,2,3", "core=2,3")
    assert result["regions"] == {"all": [1, 2, 3], "core": [2, 3]}
    reference, prediction = (np.asarray(Image.open(folders / side / "a.png")) > 0 for side in ("ref", "pred"))
    assert result["dice_all"] == pytest.approx((score(prediction, reference)[0] + 1) / 2)
    assert run(folders, "--regions", "core=2,3")["dice_core"] == result["dice_core"]


def test_255_is_ignored_unless_a_region_names_it(folders):
    reference = np.array(Image.open(folders / "ref" / "a.png"))
    reference[2] = 255  # what was predicted too much of id 1
    write(folders / "ref", "a", reference)
    assert run(folders)["dice_class_1"] == pytest.approx(1)
    named = run(folders, "--regions", "one=1", "edge=255")
    assert named["dice_one"] == pytest.approx(0.9)
    assert named["dice_edge"] == pytest.approx(0.5)


def test_1_and_255_in_a_mask_are_a_label_and_what_is_ignored(folders):
    for name in "ab":
        reference = np.zeros((10, 10), int)
        reference[2:6], reference[6] = 1, 255
        write(folders / "ref", name, reference)
        write(folders / "pred", name, np.where(reference == 255, 1, reference))
    result = run(folders)
    assert result["regions"] == {"foreground": [1]}
    assert result["dice"] == 1


def test_ids_beyond_31_and_of_16_bits_need_names(folders, capsys):
    for side in ("ref", "pred"):
        for name in "ab":
            ids = np.asarray(Image.open(folders / side / f"{name}.png")).astype(int)
            write(folders / side, name, ids * 300, np.uint16)
    with pytest.raises(SystemExit):
        run(folders)
    assert "Label ids of 16 bits are read with --regions" in capsys.readouterr().err.replace("\n", " ")
    assert run(folders, "--regions", "a=300", "b=600,900")["dice_a"] == pytest.approx(0.9)


def test_palettes_of_colours_hold_ids(folders):
    expected = run(folders)
    for path in folders.glob("*/*.png"):
        with Image.open(path) as opened:
            picture = Image.fromarray(np.array(opened), "P")
        picture.putpalette([0, 0, 0, 200, 0, 0, 0, 250, 0, 250, 250, 0])
        picture.save(path)
    assert run(folders) == expected


def test_what_a_run_predicts_can_be_scored(tmp_path):
    generator = np.random.default_rng(0)
    for number, split in enumerate(("train", "validation", "test")):
        mask = generator.integers(0, 4, (64, 70))
        write(tmp_path / "data" / split / "masks", f"p/{number}".replace("/", "_"), mask)
        write(tmp_path / "data" / split / "images", f"p_{number}", mask * 60)
    regions = {"outer": [1, 2], "inner": [2], "other": [3]}
    small_model(regions=regions).save_pretrained(tmp_path / "model")
    Sam2UNetImageProcessor(regions=regions, size={"height": 64, "width": 64}).save_pretrained(tmp_path / "model")
    results = run_segmentation.main(
        ["--do_train", "false", "--do_predict", "--model_name_or_path", str(tmp_path / "model"), "--use_cpu"]
        + ["--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run")]
    )
    options = ["--pred_dir", str(tmp_path / "run" / "predictions"), "--ref_dir", str(tmp_path / "data/test/masks")]
    scored = main([*options, "--regions", "outer=1,2", "inner=2", "other=3"])
    for region in regions:  # each pixel has one id, so that regions that overlap in probabilities differ a little
        assert scored[f"dice_{region}"] == pytest.approx(results[f"test_patient_dice_{region}"])
    assert scored["regions"] == regions


def spoil_with_map(folders):
    write(folders / "pred", "b", np.arange(100).reshape(10, 10) * 2)


def spoil_with_white(folders):
    write(folders / "pred", "b", np.eye(10) * 255)


def spoil_with_jpeg(folders):
    Image.open(folders / "pred" / "b.png").save(folders / "pred" / "b.jpg")
    (folders / "pred" / "b.png").unlink()


def spoil_with_colours(folders):
    write(folders / "pred", "b", np.dstack([np.eye(10)] * 2 + [np.zeros((10, 10))]))


def spoil_size(folders):
    write(folders / "pred", "b", np.ones((9, 10)))


def spoil_with_text(folders):
    (folders / "pred" / "b.png").write_text("no image")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_with_map, r"pred/b.png holds 32, which is no label id of the masks or of a region\. .*label ids, too"),
        (spoil_with_white, r"pred/b.png holds 255, which is no label id"),
        (spoil_with_jpeg, r"pred/b.jpg is a JPEG, which blurs label ids\. Save it as PNG"),
        (spoil_with_colours, r"pred/b.png: A segmentation map must have one channel of label ids, got colours"),
        (spoil_size, r"pred/b.png and \S+ref/b.png: .* same shape"),
        (spoil_with_text, r"pred/b.png cannot be read as an image"),
    ],
)
def test_predictions_that_are_no_label_maps_are_named(folders, capsys, spoil, message):
    spoil(folders)
    with pytest.raises(SystemExit):
        run(folders)
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_ids_that_were_never_predicted_are_said(folders, caplog):
    for name in "ab":
        prediction = np.asarray(Image.open(folders / "pred" / f"{name}.png"))
        write(folders / "pred", name, prediction > 0)
    run(folders)
    assert "No prediction holds the label ids [2] of region class_2. If the model joins several ids" in caplog.text
    assert "region class_1" not in caplog.text
