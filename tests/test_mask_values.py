"""Masks as people have them: 255 among 0 and 1 or as a class, soft edges, alpha, and regions that training lacks."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import small_model
from datasets import DatasetDict
from PIL import Image, ImageFilter
from slice_rows import make_slices

from sam2unet_hf import Sam2UNetConfig, Sam2UNetImageProcessor
from sam2unet_hf.finetuning import run_segmentation
from sam2unet_hf.finetuning.cohort import load_cohort
from sam2unet_hf.finetuning.data_sources import DataArguments, find_columns, find_regions, load_data
from sam2unet_hf.finetuning.image_folders import pair_images_and_masks
from sam2unet_hf.finetuning.predictions import write_predictions
from sam2unet_hf.training import ImageRows, SegmentationTransform


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import error_analysis  # noqa: E402 - the scripts are no package


DISC = np.hypot(*np.mgrid[-20:20, -24:24]) < 12
RING = np.hypot(*np.mgrid[-20:20, -24:24]) < 16


def save(folder, masks, split="train"):
    """Write masks by name, arrays or pictures, with an image of noise each."""
    for number, (name, mask) in enumerate(masks.items()):
        picture = mask if isinstance(mask, Image.Image) else Image.fromarray(np.asarray(mask).astype(np.uint8))
        noise = np.random.default_rng([number, *split.encode()]).integers(0, 256, picture.size[::-1]).astype(np.uint8)
        for kind, content in (("images", Image.fromarray(noise)), ("masks", picture)):
            path = folder / split / kind / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            content.save(path)
    return folder


def read(folder, regions=None, **options):
    """Load folders as the script does, and return regions and replaced ids."""
    args = DataArguments(dataset_name=str(folder), **options)
    data = load_data(args)
    return find_regions(data, *find_columns(data, args), regions, binarize=args.binarize)[:2]


def three_splits(folder, train, validation=None, test=None):
    for split, masks in (("train", train), ("validation", validation), ("test", test)):
        save(folder, train if masks is None else masks, split)
    return folder


# 0, 1 and 255 (number 1)


@pytest.mark.parametrize("place", ["train", "validation", "test"])
@pytest.mark.parametrize("regions", [None, {"foreground": [1]}])
def test_masks_of_0_and_1_among_those_of_0_and_255_are_refused(tmp_path, place, regions):
    masks = {"train": {"a": DISC * 255, "b": RING * 255}, "validation": {"c": DISC * 255}, "test": {"d": DISC * 255}}
    masks[place] |= {"one": DISC * 1, "empty": DISC * 0}
    three_splits(tmp_path, **masks)
    match = (
        rf"{place}/masks/one.png holds nothing but 0 and 1, and \S+/a.png nothing but 0 and 255\. .*replace 1 by 255"
    )
    with pytest.raises(SystemExit, match=match):
        read(tmp_path, regions)
    if place == "test":
        with pytest.raises(SystemExit, match=f"--test_dir .*{match}"):
            load_cohort(str(tmp_path), DataArguments(), {"foreground": [1]})


def test_a_region_of_both_values_takes_masks_of_both_kinds(tmp_path):
    three_splits(tmp_path, {"a": DISC * 255, "b": DISC * 1})
    assert read(tmp_path, {"foreground": [1, 255]}) == ({"foreground": [1, 255]}, {})


@pytest.mark.parametrize(
    ("masks", "regions"),
    [
        ({"a": DISC * 1, "b": DISC * 0}, {"foreground": [1]}),
        ({"a": np.where(RING & ~DISC, 255, DISC), "b": (RING & ~DISC) * 255, "c": DISC * 1}, {"foreground": [1]}),
        ({"a": DISC * 1, "b": DISC * 2, "c": np.eye(40, 48) * 255}, {"class_1": [1], "class_2": [2]}),
        ({"a": np.indices((40, 48)).sum(0) % 32}, {f"class_{number}": [number] for number in range(1, 32)}),
    ],
    ids=["0 and 1", "void around the object", "a mask that is ignored", "31 classes"],
)
def test_label_ids_are_read_as_before(tmp_path, masks, regions):
    assert read(three_splits(tmp_path, masks)) == (regions, {})


def test_what_is_ignored_is_said_with_its_share(tmp_path, caplog):
    three_splits(tmp_path, {"a": np.where(RING & ~DISC, 255, DISC)})
    read(tmp_path)
    assert (
        "Pixels of 255 in the masks are ignored in training and evaluation, 45 % of those that are not 0"
        in caplog.text
    )
    assert "train/masks/a.png. A region can name 255" in caplog.text


def test_few_ids_beside_much_255_are_no_label_ids_unasked(tmp_path, caplog):
    three_splits(tmp_path, {"a": np.where(RING, 255, 0) + np.eye(40, 48) * ~RING * 3})
    match = r"255 is ignored in masks with label ids, and 9\d% .*a.png; the ids are 3, .*pass --binarize; .*class_3=3"
    with pytest.raises(SystemExit, match=match):
        read(tmp_path)
    assert read(tmp_path, {"class_3": [3]}) == ({"class_3": [3]}, {})
    assert "Pixels of 255 in the masks are ignored" in caplog.text


SOFT = {
    "resized": Image.fromarray((DISC * 255).astype(np.uint8)).resize((61, 53), Image.Resampling.BILINEAR),
    "blurred": Image.fromarray((DISC * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(2)),
    "enlarged": Image.fromarray((DISC * 255).astype(np.uint8)).resize((480, 400), Image.Resampling.BICUBIC),
    "reduced": Image.fromarray((np.kron(DISC, np.ones((3, 3))) * 255).astype(np.uint8)).reduce(2),
}


def soft_mask(kind, folder):
    if kind != "jpeg":
        return SOFT[kind]
    Image.fromarray((DISC * 255).astype(np.uint8)).save(folder / "x.jpg", quality=60)
    with Image.open(folder / "x.jpg") as picture:
        return picture.convert("L")


@pytest.mark.parametrize("kind", [*SOFT, "jpeg"])
def test_blurred_edges_are_refused_or_taken_when_asked(tmp_path, kind):
    mask = soft_mask(kind, tmp_path)
    folder = three_splits(tmp_path / "data", {"hard": DISC * 255, "soft": mask})
    for regions in (None, {"foreground": [1]}):
        with pytest.raises(SystemExit, match=r"--binarize|Region foreground has the label ids \[1\], the masks hold"):
            read(folder, regions)
    regions, mapping = read(folder, binarize=True)
    assert regions == {"foreground": [1]}
    transform = SegmentationTransform(Sam2UNetImageProcessor(), label_mapping=mapping)
    np.testing.assert_array_equal(transform.to_label_ids(mask), np.asarray(mask) > 128)
    assert load_cohort(str(folder), DataArguments(binarize=True), {"foreground": [1]}).label_mapping == mapping


def test_masks_in_jpeg_are_taken_when_asked(tmp_path):
    three_splits(tmp_path, {"a": DISC * 255})
    for path in tmp_path.glob("*/masks/a.png"):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    with pytest.raises(SystemExit, match="is a JPEG, which blurs label ids. Save masks as PNG, or pass --binarize"):
        read(tmp_path)
    regions, mapping = read(tmp_path, binarize=True)
    assert regions == {"foreground": [1]}
    assert mapping[255] == 1


@pytest.mark.parametrize(
    ("masks", "match"),
    [
        ({"a": DISC * 1, "b": DISC * 255}, r"--binarize: \S+/a.png holds nothing above 1, and \S+ values up to 255"),
        ({"a": DISC * 20, "b": DISC * 255}, r"--binarize: \S+/a.png holds nothing above 20"),
        (
            {"a": np.where(DISC, 128, RING * 255)},
            r"a.png has areas of grey, such as of 128, .*--regions grey=128 white",
        ),
        (
            {"a": Image.fromarray((DISC * 65535).astype(np.uint16))},
            r"a.png holds the value 65535. Save masks with 8 bit",
        ),
    ],
)
def test_what_is_more_than_blurred_edges_is_refused_with_binarize(tmp_path, masks, match):
    with pytest.raises(SystemExit, match=match):
        read(three_splits(tmp_path, masks), binarize=True)


def test_black_and_white_is_the_same_with_and_without_binarize(tmp_path):
    assert read(three_splits(tmp_path / "a", {"a": DISC * 1}), binarize=True) == ({"foreground": [1]}, {})
    assert read(three_splits(tmp_path / "b", {"a": DISC * 255}), binarize=True) == ({"foreground": [1]}, {255: 1})


def test_slices_of_scans_are_never_binarized():
    with pytest.raises(
        SystemExit, match="--binarize is for masks that are black and white; those of scans hold label"
    ):
        find_regions(DatasetDict(train=make_slices({"a": [1]})), ["flair"], "mask", None, binarize=True)


WHITE = Image.new("L", (48, 40), 255)
ALPHA = Image.fromarray((DISC * 255).astype(np.uint8))


@pytest.mark.parametrize(
    "mask",
    [
        Image.merge("LA", [WHITE, ALPHA]),
        Image.merge("RGBA", [WHITE] * 3 + [ALPHA]),
        Image.merge("LA", [Image.new("L", WHITE.size), ALPHA]),
        Image.merge("LA", [Image.fromarray((RING * 255).astype(np.uint8)), ALPHA]),
    ],
    ids=["white", "white in colours", "black", "larger than what is seen"],
)
def test_a_mask_in_the_alpha_channel_is_refused(tmp_path, mask):
    with pytest.raises(SystemExit, match="train image x: its mask is transparent in places, .* Save it without trans"):
        read(three_splits(tmp_path, {"x": mask}))


@pytest.mark.parametrize(
    "mask", [Image.merge("LA", [ALPHA, ALPHA]), Image.merge("LA", [ALPHA, WHITE]), Image.merge("RGBA", [ALPHA] * 4)]
)
def test_transparency_that_says_the_same_is_taken(tmp_path, mask):
    assert read(three_splits(tmp_path, {"x": mask})) == ({"foreground": [1]}, {255: 1})


# 255 as a class (number 2)

CELLS = np.where(DISC, 128, RING * 255)
CELL_REGIONS = {"nuclei": [128], "cytoplasm": [255]}


def test_255_is_a_class_if_a_region_names_it(tmp_path, caplog):
    folder = three_splits(tmp_path / "data", {"a": CELLS})
    assert read(folder, CELL_REGIONS) == (CELL_REGIONS, {})
    assert read(folder, {"cells": [128, 255]}) == ({"cells": [128, 255]}, {})
    assert "ignored" not in caplog.text
    with pytest.raises(
        SystemExit,
        match=r"The masks hold 128 \(in \S+a.png\): .*class_128=128 class_255=255, without which 255 is ignored",
    ):
        read(folder)
    assert load_cohort(str(folder), DataArguments(), CELL_REGIONS).label_mapping == {}
    white = three_splits(tmp_path / "white", {"a": DISC * 255})
    assert read(white, {"lesion": [255]}) == ({"lesion": [255]}, {})


def test_a_model_whose_region_names_255_counts_its_pixels(tmp_path):
    assert Sam2UNetConfig().ignore_index == 255
    model = small_model(regions=CELL_REGIONS)
    assert model.config.ignore_index == -100
    masks, valid = model.region_masks(torch.from_numpy(CELLS)[None].to(torch.uint8))
    assert masks.sum(dim=(0, 2, 3)).tolist() == [DISC.sum(), (RING & ~DISC).sum()]
    assert valid.all()
    assert model.region_masks(torch.full((1, 2, 2), 156, dtype=torch.uint8))[1].all()  # -100 as a byte
    model.save_pretrained(tmp_path)
    assert Sam2UNetConfig.from_pretrained(tmp_path).ignore_index == -100
    assert Sam2UNetConfig.from_pretrained(tmp_path, regions={"a": [1]}, ignore_index=255).ignore_index == 255


def test_masks_with_255_as_a_class_from_training_to_predictions(tmp_path):
    folder = tmp_path / "data"
    for number, split in enumerate(("train", "train", "validation", "test")):
        save(folder, {f"x{number}": np.kron(CELLS, np.ones((2, 2)))}, split)
    small_model(regions=CELL_REGIONS).save_pretrained(tmp_path / "start")
    arguments = [
        "--model_name_or_path",
        str(tmp_path / "start"),
        "--output_dir",
        str(tmp_path / "run"),
        "--do_predict",
    ]
    arguments += ["--dataset_name", str(folder), "--regions", "nuclei=128", "cytoplasm=255", "--num_train_epochs", "1"]
    results = run_segmentation.main([*arguments, "--image_size", "64", "--use_cpu", "--disable_tqdm", "true"])
    assert {"test_dice_nuclei", "test_dice_cytoplasm"} <= results.keys()
    with Image.open(tmp_path / "run" / "predictions" / "x3.png") as prediction:
        assert set(np.unique(prediction)) <= {0, 128, 255}
    error_analysis.main(["--model", str(tmp_path / "run"), "--device", "cpu"])
    assert (tmp_path / "run" / "errors" / "report.html").exists()


@pytest.mark.parametrize(
    ("mapping", "written"), [({255: 1}, 255), ({5: 0, 100: 0, 200: 1, 250: 1, 255: 1}, 255), ({}, 1)]
)
def test_predictions_are_written_as_the_masks_are(tmp_path, monkeypatch, mapping, written):
    save(tmp_path, {"x": DISC * 255})
    rows = ImageRows(pair_images_and_masks(tmp_path / "train" / "images", tmp_path / "train" / "masks"))
    predict = "sam2unet_hf.finetuning.predictions.predict_label_maps"
    monkeypatch.setattr(predict, lambda model, transform, batch: [DISC.astype(np.int64)])
    transform = SegmentationTransform(Sam2UNetImageProcessor(), resize_masks=False, label_mapping=mapping)
    write_predictions(tmp_path / "out", rows, transform, None, 1)
    with Image.open(tmp_path / "out" / "x.png") as prediction:
        np.testing.assert_array_equal(prediction, DISC * written)


# Regions that training lacks (number 14)


def test_a_region_that_only_other_splits_show_is_warned_of(tmp_path, caplog):
    folder = three_splits(tmp_path, {"a": DISC * 1}, {"a": DISC * 3}, {"a": DISC * 2 + RING * 1})
    read(folder)
    assert "Region class_2 (2)" not in caplog.text  # no mask holds 2 outside the ring
    assert "Region class_3 (3) is in the split validation and test and in no training image" in caplog.text
    assert "Region class_1" not in caplog.text
    caplog.clear()
    read(folder, {"all": [1, 2, 3], "core": [3]})
    assert "Region core (3) is in the split validation and test" in caplog.text
    assert "Region all" not in caplog.text
    caplog.clear()
    load_cohort(str(folder), DataArguments(), {"a": [1], "b": [3]})
    assert "no training image" not in caplog.text


def test_slices_of_scans_without_a_region_in_training_are_warned_of(caplog):
    rows = make_slices({"a": [3, 4]}).remove_columns("wt_pixels")

    def counted(whole, core, enhancing):
        counts = {"wt_pixels": [whole, 0], "tc_pixels": [core, 0], "et_pixels": [enhancing, 0]}
        part = rows
        for name, values in counts.items():
            part = part.add_column(name, values)
        return part

    data = DatasetDict(train=counted(9, 5, 0), validation=counted(9, 0, 0), test=counted(9, 5, 2))
    with caplog.at_level(logging.WARNING):
        find_regions(data, ["flair"], "mask", {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]})
    assert [record.message for record in caplog.records] == [
        "Region ET (3) is in the split test and in no training image, so that it cannot be learnt and its scores say "
        "nothing. Put images that show it into the split train."
    ]
