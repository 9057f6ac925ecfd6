"""A second cohort to score, such as the patients of another hospital: all of it, whatever splits it has."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import datasets

from sam2unet_hf.cases_sam2unet import find_cases
from sam2unet_hf.finetuning.arguments import DataArguments
from sam2unet_hf.finetuning.data_sources import (
    find_columns,
    find_regions,
    make_images,
    slice_scans,
)
from sam2unet_hf.finetuning.image_depth import Brightest
from sam2unet_hf.finetuning.image_folders import image_mask_folders, pair_images_and_masks, read_data_set
from sam2unet_hf.finetuning.processes import exit_on
from sam2unet_hf.finetuning.splits import join
from sam2unet_hf.training import ImageRows


COHORT = "test_dir"  # name of its scores and files, as that of a split


class Cohort(NamedTuple):
    """The rows of a cohort, their images, and what tells how to read them.

    Args:
        rows: All rows.
        images: Their images.
        label_mapping: Ids to replace in the masks.
        has_patients: Whether `case_id` names patients.
        brightest: Of the images of more than 8 bits, if there are any.
    """

    rows: datasets.Dataset
    images: ImageRows
    label_mapping: dict[int, int]
    has_patients: bool
    brightest: Brightest | None


def load_cohort(path: str, args: DataArguments, regions: dict[str, list[int]] | None) -> Cohort:
    """Load all rows of a cohort.

    Args:
        path: Folder of BraTS scans, of which all slices that show the head are taken; folder with `images` and
            `masks` in it; or data set, a folder or a Hub id.
        args: Choose modalities, neighbours, plane and columns, as for the data of the training.
        regions: What the model segments.
    """
    if Path(path).is_dir() and not any(Path(path).iterdir()):
        raise SystemExit(f"--test_dir {path} is empty.")
    folders = image_mask_folders(Path(path))
    args = replace(args, dataset_name=path, brats_dir=None, streaming=False)
    if folders:
        rows = join({split: pair_images_and_masks(*pair) for split, pair in folders.items()}, name_by_split=True)
    elif has_scans(path):
        args = replace(args, dataset_name=None, brats_dir=path, slices=["head"])
        rows = join(slice_scans(args))
    else:
        data = read_data_set("--test_dir", path)
        with exit_on(ValueError, prefix=f"--test_dir {path}: "):
            rows = join(data)
    if args.neighbours and "slice_index" not in rows.column_names:
        raise SystemExit(
            f"--test_dir {path} holds pictures, and the model takes slices of scans with {args.neighbours} on each "
            "side. Name a folder of scans."
        )
    try:
        columns, mask_column = find_columns({COHORT: rows}, args)
        _, label_mapping, brightest = find_regions(
            {COHORT: rows}, columns, mask_column, regions, binarize=args.binarize
        )
    except SystemExit as err:
        raise SystemExit(f"--test_dir {path}: {err}") from err
    images = make_images({COHORT: rows}, columns, mask_column, args.neighbours)[COHORT]
    has_patients = not folders and "case_id" in rows.column_names
    return Cohort(rows, images, label_mapping, has_patients, brightest)


def has_scans(path: str) -> bool:
    """Whether a folder holds BraTS cases."""
    try:
        return Path(path).is_dir() and bool(find_cases(path))
    except FileNotFoundError:
        return False
    except ValueError:  # a case that cannot be used, which is named when it is read
        return True
