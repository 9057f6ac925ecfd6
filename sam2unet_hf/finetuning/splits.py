"""Splits of a data set: their names, those that are cut off, and those that are joined."""

import logging
from collections.abc import Mapping
from typing import Any

import datasets

from dataset_scripts.brats_slices import split_patients
from sam2unet_hf.finetuning.case_names import BY_FOLDER, patients_of_rows
from sam2unet_hf.finetuning.data_checks import DataSplits, find_shared_patient
from sam2unet_hf.finetuning.image_folders import SPLITS
from sam2unet_hf.model_card import counted


logger = logging.getLogger("splits")


def named_splits(data: DataSplits) -> dict[str, Any]:
    """Name the splits train, validation and test; leave out those of other names."""
    named = {}
    for split, names in SPLITS.items():
        there = [name for name in names if name in data]
        if len(there) > 1:
            raise SystemExit(f"The splits {' and '.join(there)} of the data set are both {split}. Remove one.")
        if there:
            named[split] = data[there[0]]
    if unused := sorted(set(data) - {name for names in SPLITS.values() for name in names}):
        logger.warning("Not used, for their names say neither train, validation nor test: %s.", ", ".join(unused))
    return named


def warn_of_folders(data: DataSplits) -> None:
    """Warn that the folders below those of the images are taken for patients, or that splits share such a folder."""
    advice = "If they are something else, pass --group_by none, or the rule that tells the patient."
    below = {
        split: rows.select([index for index, name in enumerate(rows["case_id"]) if "/" in name])
        for split, rows in data.items()
    }
    if len(data) > 1 and (shared := find_shared_patient(below, BY_FOLDER)):
        logger.warning(
            "%s A patient must be in one split alone, and folders of images are patients. %s", shared, advice
        )
    elif len(data) == 1 and (names := sorted({*patients_of_rows("train", below["train"], BY_FOLDER)})):
        text = "The %d folders with images in them, such as %s, are taken for patients, and kept whole in a split. %s"
        logger.warning(text, len(names), ", ".join(names[:3]), advice)


def with_all_splits(
    data: DataSplits, seed: int, group_by: str | None = None, test_split: bool = True
) -> datasets.DatasetDict:
    """Name the splits train, validation and test; split the training rows, by patient, if there is no validation.

    Without `test_split` there is no test split, and its rows are trained on.
    """
    named = named_splits(data)
    check_has_train(named, data)
    if not test_split and "test" in named:
        named["train"] = datasets.concatenate_datasets([named["train"], named.pop("test")])
    if "validation" not in named:
        train = named["train"]
        groups = patients_of_rows("train", train, group_by) or list(map(str, range(len(train))))
        split_of = {group: split for split, names in split_patients(groups, seed).items() for group in names}
        # Train on what would be the test split where the data has one of its own, or needs none.
        if "test" in named or not test_split:
            split_of = {group: "train" if split == "test" else split for group, split in split_of.items()}
        for split in SPLITS:
            if rows := [index for index, group in enumerate(groups) if split_of[group] == split]:
                named[split] = train.select(rows)
        if "validation" not in named:
            is_of_scans = "wt_pixels" in train.column_names
            advice = "" if len(split_of) == len(train) else " If they are no patients, pass --group_by none."
            raise SystemExit(
                f"{counted(len(train), 'image')} of {counted(len(split_of), 'case')} are too few to train and to "
                f"validate.{' Name a folder of several cases.' if is_of_scans else advice}"
            )
        counts = ", ".join(f"{len(named[split])} {split}" for split in SPLITS if split in named)
        logger.warning("The data set has no validation split; cut it into %s.", counts)
    if empty := [split for split, rows in named.items() if not len(rows)]:
        raise SystemExit(f"The split {empty[0]} of the data set is empty.")
    return datasets.DatasetDict(named)


def check_has_train(named: DataSplits, data: DataSplits) -> None:
    """Refuse a data set whose splits, by their usual names, are none to train on."""
    if "train" not in named:
        raise SystemExit(f"The data set has no split named train, only {', '.join(data)}.")


def join(data: Mapping[str, datasets.Dataset], name_by_split: bool = False) -> datasets.Dataset:
    """Join the splits of a data set; `name_by_split` tells files of the same name in two of them apart."""
    if name_by_split and len(data) > 1:
        data = {
            split: rows.remove_columns("case_id").add_column(
                "case_id", [f"{split}/{name}" for name in rows["case_id"]]
            )
            for split, rows in data.items()
        }
    return datasets.concatenate_datasets(list(data.values()))
