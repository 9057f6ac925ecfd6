"""Folders of images and masks as people have them: their names, and the patients that their folders tell."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from sam2unet_hf.finetuning.cohort import load_cohort
from sam2unet_hf.finetuning.data_sources import (
    DataArguments,
    find_columns,
    load_data,
)
from sam2unet_hf.finetuning.provenance import write_json
from sam2unet_hf.finetuning.splits import with_all_splits


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from error_analysis import fill_from_run  # noqa: E402


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


# Patients


def splits_of(data, patient_of):
    """Return the patients of each split."""
    return {split: {patient_of(name) for name in rows["case_id"]} for split, rows in data.items()}


def is_apart(patients):
    return sum(map(len, patients.values())) == len(set.union(*patients.values()))


PATIENTS = [f"patient{number}" for number in range(10)]
SLICES = [f"{patient}/{index}" for patient in PATIENTS for index in "abcdef"]


@pytest.mark.parametrize("side", ["", "left/"])
def test_the_folder_below_the_images_is_the_patient(tmp_path, caplog, side):
    names = [name.replace("/", f"/{side}") for name in SLICES]
    write_pairs(tmp_path / "images", tmp_path / "masks", names)
    with caplog.at_level(logging.WARNING):
        data = load_data(DataArguments(dataset_name=str(tmp_path)))
    patients = splits_of(data, lambda name: name.split("/")[0])
    assert {split: len(names) for split, names in patients.items()} == {"train": 7, "validation": 1, "test": 2}
    assert is_apart(patients)
    assert "The 10 folders with images in them, such as patient0" in caplog.text
    assert "If they are something else, pass --group_by none" in caplog.text


def test_images_without_folders_are_split_as_before(tmp_path, caplog):
    names = [f"x_{index}" for index in range(20)]
    write_pairs(tmp_path / "images", tmp_path / "masks", names)
    data = load_data(DataArguments(dataset_name=str(tmp_path)))
    assert "patients" not in caplog.text
    assert data["test"]["case_id"] == ["x_12", "x_14", "x_4", "x_6"]


def test_timepoints_in_folders_are_of_one_patient(tmp_path):
    names = [f"BraTS-GLI-0000{patient}-00{time}/1" for patient in range(10) for time in range(3)]
    write_pairs(tmp_path / "images", tmp_path / "masks", names)
    data = load_data(DataArguments(dataset_name=str(tmp_path)))
    assert is_apart(splits_of(data, lambda name: name[: len("BraTS-GLI-00000")]))


@pytest.mark.parametrize("rule", [r"^(p\d+)_", r"p\d", r"(?P<patient>p\d)_\d"])
def test_a_regular_expression_tells_the_patient(tmp_path, caplog, rule):
    names = [f"p{number}_{day}" for number in range(9) for day in range(6)]
    write_pairs(tmp_path / "images", tmp_path / "masks", names)
    data = load_data(DataArguments(dataset_name=str(tmp_path), group_by=rule))
    patients = splits_of(data, lambda name: name.split("_")[0])
    assert is_apart(patients)
    assert len(set.union(*patients.values())) == 9
    assert "are taken for patients" not in caplog.text


def test_folders_that_are_no_patients_can_be_split(tmp_path, caplog):
    names = [f"{kind}/{index}" for kind in ("benign", "malignant") for index in range(10)]
    write_pairs(tmp_path / "images", tmp_path / "masks", names)
    data = load_data(DataArguments(dataset_name=str(tmp_path), group_by="none"))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 15, "validation": 1, "test": 4}
    assert "are taken for patients" not in caplog.text
    write_pairs(tmp_path / "one" / "images", tmp_path / "one" / "masks", ["all/a", "all/b", "all/c"])
    with pytest.raises(SystemExit, match="3 images of 1 case are too few .* no patients, pass --group_by none"):
        load_data(DataArguments(dataset_name=str(tmp_path / "one")))


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        (
            r"p\d+$",
            r"--group_by p\\d\+\$ is no column of image, mask, case_id, and .* nothing in patient0/a of .* train",
        ),
        ("(", r"--group_by \( is no column of image, mask, case_id, and no regular expression"),
    ],
)
def test_rules_that_tell_no_patient_are_named(tmp_path, rule, match):
    write_pairs(tmp_path / "images", tmp_path / "masks", SLICES)
    with pytest.raises(SystemExit, match=match):
        load_data(DataArguments(dataset_name=str(tmp_path), group_by=rule))


def test_patients_in_two_splits_of_folders(tmp_path, caplog):
    for split, names in (("train", ["p0/a", "p1/a", "x"]), ("val", ["p2/b"]), ("test", ["p1/c", "x"])):
        write_pairs(tmp_path / split / "images", tmp_path / split / "masks", names)
    for path in tmp_path.glob("test/*/x.png"):  # two images of one name in two splits are no leak
        Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path)
    args = DataArguments(dataset_name=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert len(load_data(args)) == 3
    assert r"Patient p1 is in the splits train (case p1/a) and test (case p1/c)" in caplog.text
    assert "If they are something else, pass --group_by none" in caplog.text
    with pytest.raises(SystemExit, match="Patient p1 is in the splits train .* Keep it in one split"):
        load_data(DataArguments(dataset_name=str(tmp_path), group_by="^p[0-9]|^x"))
    caplog.clear()
    load_data(DataArguments(dataset_name=str(tmp_path), group_by="none"))
    assert not caplog.records


def rows_of(**columns):
    return Dataset.from_dict(
        {"image": [None] * 60, **columns},
        Features({"image": ImageFeature(), **{name: Value("string") for name in columns}}),
    )


@pytest.mark.parametrize(("column", "rule"), [("patient_id", None), ("subject", None), ("who", "who")])
def test_a_column_tells_the_patient(column, rule):
    patients = [name.split("/")[0] for name in SLICES]
    rows = rows_of(**{column: patients, "case_id": SLICES})
    data = with_all_splits({"train": rows}, 0, rule)
    assert is_apart({split: set(part[column]) for split, part in data.items()})
    rows = rows_of(**{column: [None, *patients[1:]]})
    with pytest.raises(SystemExit, match=f"Row 0 of the split train has no `{column}`"):
        with_all_splits({"train": rows}, 0, rule)


def test_the_path_of_an_image_tells_the_patient_where_there_is_no_case(tmp_path):
    write_pairs(tmp_path / "images", tmp_path / "masks", SLICES)
    files = [str(tmp_path / "images" / f"{name}.png") for name in SLICES]
    rows = Dataset.from_dict({"image": files}, Features({"image": ImageFeature()}))
    data = with_all_splits({"train": rows}, 0, r"(patient\d+)/")
    paths = {split: part.cast_column("image", ImageFeature(decode=False))["image"] for split, part in data.items()}
    assert is_apart({split: {Path(file["path"]).parent.name for file in part} for split, part in paths.items()})


def test_the_error_report_splits_as_the_run_did(tmp_path):
    write_json(tmp_path / "run.json", {"arguments": {"dataset_name": "data", "group_by": "none", "split_seed": 3}})
    assert fill_from_run(str(tmp_path), {})["group_by"] == "none"


def test_scans_need_no_rule():
    with pytest.raises(
        SystemExit, match="--group_by goes with --dataset_name: the names of scans tell their patients"
    ):
        load_data(DataArguments(brats_dir="somewhere", group_by="none"))
