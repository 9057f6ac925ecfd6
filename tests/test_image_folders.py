"""Folders of images and masks as people have them: their names, and the patients that their folders tell."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from cohort import load_cohort  # noqa: E402 - the scripts are no package
from data_sources import DataArguments, find_columns, load_data  # noqa: E402


def write_pairs(images, masks, names):
    """Write an image and a mask of each name, which may hold folders."""
    for name in names:
        pixels = np.random.default_rng(list(f"{images.name}{name}".encode())).integers(0, 256, (8, 9)).astype(np.uint8)
        for folder, content in ((images, pixels), (masks, pixels // 128)):
            path = folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(path)


# Names of folders


@pytest.mark.parametrize(
    ("images", "masks"),
    [("imgs", "masks"), ("Images", "Masks"), ("IMG", "Labels"), ("image", "gt"), ("images", "mask")],
)
@pytest.mark.parametrize("layout", ["{kind}", "{split}/{kind}", "{kind}/{split}"])
def test_usual_names_of_folders_in_any_case(tmp_path, images, masks, layout):
    for split in ("Train", "VAL", "test") if "split" in layout else ("all",):
        folders = [tmp_path / layout.format(split=split, kind=kind) for kind in (images, masks)]
        write_pairs(*folders, [f"{split}_{index}" for index in range(5)])
    args = DataArguments(dataset_name=str(tmp_path))
    data = load_data(args)
    counts = {split: len(rows) for split, rows in data.items()}
    assert counts == dict(
        zip(("train", "validation", "test"), (5, 5, 5) if "split" in layout else (3, 1, 1), strict=True)
    )
    assert find_columns(data, args) == (["image"], "mask")
    assert len(load_cohort(str(tmp_path), DataArguments(), None).rows) == sum(counts.values())


def test_the_name_that_goes_first_is_taken(tmp_path):
    write_pairs(tmp_path / "images", tmp_path / "masks", "abcde")
    write_pairs(tmp_path / "imgs", tmp_path / "labels", "v")
    assert sum(map(len, load_data(DataArguments(dataset_name=str(tmp_path))).values())) == 5
    (tmp_path / "Masks").mkdir()
    with pytest.raises(SystemExit, match=r"Masks and .*masks differ in upper and lower case alone. Remove one"):
        load_data(DataArguments(dataset_name=str(tmp_path)))


@pytest.mark.parametrize("load", ["data", "cohort"])
def test_other_names_get_the_layout_that_is_read(tmp_path, load):
    write_pairs(tmp_path / "photos", tmp_path / "truth", "abc")
    args = DataArguments(dataset_name=str(tmp_path))
    match = r"no column found.* are read from .*images and .*masks, .*There are photos/, truth/: rename the folders"
    with pytest.raises(SystemExit, match=match):
        load_data(args) if load == "data" else load_cohort(str(tmp_path), DataArguments(), None)


def test_images_without_masks_name_the_folder_that_is_missing(tmp_path):
    write_pairs(tmp_path / "Images", tmp_path / "elsewhere", "abc")
    with pytest.raises(SystemExit, match=r"Images has no masks beside it: expected a folder .*masks"):
        load_data(DataArguments(dataset_name=str(tmp_path)))
