"""Images and masks: from BraTS scans, a phantom, folders, or the Hub."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from dataset_scripts.brats_slices import BratsSlices, fold_patients
from dataset_scripts.phantom import VERSION, write_phantom_cohort
from sam2unet_hf.cases_sam2unet import BratsCase
from sam2unet_hf.finetuning.arguments import DataArguments
from sam2unet_hf.finetuning.case_names import BY_FOLDER, NO_GROUPS, case_ids, patients_of_rows
from sam2unet_hf.finetuning.data_checks import (
    DataSplits,
    check_first_rows,
    check_images_and_masks,
    check_leaks,
    image_columns,
)
from sam2unet_hf.finetuning.image_depth import Brightest
from sam2unet_hf.finetuning.image_folders import (
    describe_layout,
    image_mask_folders,
    pair_images_and_masks,
    read_data_set,
)
from sam2unet_hf.finetuning.mask_values import (
    LabelIds,
    MaskValues,
    read_black_and_white,
    read_label_ids,
    warn_of_untrained,
)
from sam2unet_hf.finetuning.processes import exit_on
from sam2unet_hf.finetuning.splits import check_has_train, join, named_splits, warn_of_folders, with_all_splits
from sam2unet_hf.labels_sam2unet import NUMBERINGS, numberings_of, region_ids
from sam2unet_hf.model_card import counted
from sam2unet_hf.pictures import SCAN_SUFFIXES, first_file
from sam2unet_hf.scans_sam2unet import MODALITIES
from sam2unet_hf.training import ImageRows, ParquetRows, open_parquet


logger = logging.getLogger("data_sources")


class DataFacts(NamedTuple):
    """What reading images and masks tells: the regions to segment, and how to read both.

    Args:
        regions: Name -> label ids.
        label_mapping: Ids to replace in the masks, such as `{255: 1}`.
        brightest: Of the images of more than 8 bits, if there are any.
    """

    regions: dict[str, list[int]]
    label_mapping: dict[int, int]
    brightest: Brightest | None


DEFAULT_MODALITIES = ["flair"]
MASK_COLUMNS = ("mask", "label", "labels", "annotation", "segmentation", "segmentation_mask", "masks")


class Fold(NamedTuple):
    """A fold of a cross-validation.

    Args:
        patients: Their names, or those of images where nothing tells patients.
        rows: All their rows.
    """

    patients: list[str]
    rows: datasets.Dataset

    @property
    def cases(self) -> list[str]:
        """The cases of the rows, each once."""
        return sorted(set(self.rows["case_id"]))


def load_data(args: DataArguments) -> DataSplits:
    """Load or build the data set, with the splits train, validation and, if there is enough, test.

    With folds the rows of one are those of validation, and the rows of all others those of train. Of its columns of
    images the data set has those of the chosen images and masks alone.
    """
    if args.folds is not None:
        rows = [fold.rows for fold in load_folds(args)]
        validation = rows.pop(args.fold)
        return datasets.DatasetDict({"train": datasets.concatenate_datasets(rows), "validation": validation})
    data, group_by = read_data(args)
    if not args.test_split and args.dataset_name is not None and "test" in named_splits(data):
        raise SystemExit(
            "--test_split false: the data set comes with a test split, which is not trained on. Leave the option out, "
            "or join the splits before."
        )
    if not args.streaming:
        data = with_all_splits(data, args.split_seed, group_by, args.test_split)
    data = keep_used_columns(data, args, group_by)
    if "test" not in data and args.test_split:
        logger.warning(
            "There is no test split: scores are those of the validation split, which chooses the checkpoint. --folds "
            "scores all patients, and --test_dir another cohort."
        )
    if args.streaming:
        train = data["train"]
        held = train.num_bytes / len(train) * min(args.shuffle_buffer, len(train))
        logger.info("Streaming %d training rows; each reader holds about %.0f MB of them.", len(train), held / 1e6)
    return data


def load_folds(args: DataArguments) -> list[Fold]:
    """Load or build the data set, and deal its patients into folds, but for a test split that it came with."""
    data, group_by = read_data(args)
    has_folders = False
    if args.dataset_name is not None:  # its splits are not ours
        has_folders = bool(image_mask_folders(Path(args.dataset_name)))
        named = named_splits(data)
        check_has_train(named, data)
        if (test := named.pop("test", None)) is not None:
            logger.info("The %d images of the data set's own test split take no part in the folds.", len(test))
        data = named
    with exit_on(ValueError, prefix=f"--folds: the splits {' and '.join(data)} cannot be joined: "):
        rows = join(data, name_by_split=has_folders)
    names = [patient for split, own in data.items() for patient in patients_of_rows(split, own, group_by)]
    what = "patients" if names else "images"
    names = names or case_ids("train", rows) or [f"{index:05d}" for index in range(len(rows))]
    if args.folds > (count := len(set(names))):
        raise SystemExit(f"--folds must be from 2 to the number of {what}, {count}, got {args.folds}.")
    folds = fold_patients(names, args.folds, args.split_seed)
    fold_of = {name: fold for fold, own in enumerate(folds) for name in own}
    parts = {
        f"fold {fold}": rows.select([row for row, name in enumerate(names) if fold_of[name] == fold])
        for fold in range(args.folds)
    }
    # No patient is in two folds, but an image may be there twice.
    chosen = keep_used_columns(parts, args, NO_GROUPS)
    return [Fold(own, part) for own, part in zip(folds, chosen.values(), strict=True)]


def read_data(args: DataArguments) -> tuple[DataSplits, str | None]:
    """Load or build the data set with the splits that it comes with; return it and what tells its patients."""
    if args.group_by is not None and args.dataset_name is None:
        raise SystemExit("--group_by goes with --dataset_name: the names of scans tell their patients. Leave it out.")
    folders = {} if args.dataset_name is None else image_mask_folders(Path(args.dataset_name))
    if args.streaming and (args.dataset_name is None or folders):
        raise SystemExit(
            "--streaming reads a data set of Parquet files, a folder or a Hub id, given by --dataset_name. `python -m "
            "dataset_scripts.brats_slices` writes one of BraTS scans. Images in folders are read one by one without "
            "--streaming."
        )
    data: DataSplits
    if args.streaming:
        data = stream_data(args)
    elif folders:
        data = {split: pair_images_and_masks(*pair, split) for split, pair in folders.items()}
    elif args.dataset_name is None:
        data = slice_scans(args)
    else:
        data = read_data_set("--dataset_name", args.dataset_name, args.dataset_config_name)
    find_columns(data, args)  # name a wrong layout before anything else is said of the data
    group_by = args.group_by or (BY_FOLDER if folders else None)
    if group_by == BY_FOLDER and (args.folds is None or len(data) == 1):  # else folders may be in two splits
        warn_of_folders(data)
    return data, group_by


def keep_used_columns(data: DataSplits, args: DataArguments, group_by: str | None) -> DataSplits:
    """Return the splits with those columns of images alone that are used; refuse splits that share any."""
    columns, mask_column = find_columns(data, args)
    if args.dataset_name is not None and args.modalities and not {*columns} & {*MODALITIES}:
        logger.warning("--modalities is not used: the images are in the column %s.", columns[0])
    unused = {*image_columns(next(iter(data.values())))} - {*columns, mask_column}
    data = {
        split: rows.select_columns([name for name in rows.column_names if name not in unused])
        for split, rows in data.items()
    }
    # Images of two patients may have the same name, in two folders, and folders of two splits may be no patients.
    check_leaks(data, columns, NO_GROUPS if group_by == BY_FOLDER else group_by, args.allow_leaks)
    return data


def scans_folder(args: DataArguments) -> Path:
    """Return the folder of the scans, or that of the phantom cohort, which is written at the first run."""
    if args.brats_dir is not None:
        return Path(args.brats_dir)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / f"sam2unet-phantom-{VERSION}"
    return folder if folder.exists() else write_phantom_cohort(folder)


def slice_scans(args: DataArguments) -> datasets.DatasetDict:
    """Build the slices of BraTS scans, or of a phantom cohort."""
    brats_dir = scans_folder(args)
    words = " ".join(args.slices).split()
    with exit_on(FileNotFoundError, ValueError):
        try:
            builder = BratsSlices(
                data_dir=str(brats_dir),
                modalities=args.modalities or DEFAULT_MODALITIES,
                slices=[int(word) for word in words] if all(map(str.isdecimal, words)) else " ".join(words),
                min_tumor_pixels=args.min_tumor_pixels,
                plane=args.plane,
                labels=args.labels,
                seed=args.split_seed,
                skip_bad_cases=args.skip_bad_cases,
            )
            check_has_masks(brats_dir, builder.config.cases)
            builder.download_and_prepare(num_proc=args.num_proc)
        except FileNotFoundError as err:
            if not first_file(brats_dir, SCAN_SUFFIXES) and (picture := first_file(brats_dir)):
                raise SystemExit(
                    f"--brats_dir {brats_dir}: {picture} is a picture, and there is no scan. Name images and masks by "
                    "--dataset_name."
                ) from err
            raise
    return builder.as_dataset()


def check_has_masks(brats_dir: Path, cases: Sequence[BratsCase]) -> None:
    """Refuse a folder of scans of which none has a mask."""
    if cases and not any("seg" in case.files for case in cases):
        raise SystemExit(
            f"{brats_dir}: none of {counted(len(cases), 'case')} has a mask, such as {cases[0].case_id}_seg.nii.gz, "
            "to train on or to score by. `python -m sam2unet_hf.volume MODEL FOLDER -o OUT` segments scans without."
        )


def stream_data(args: DataArguments) -> dict[str, ParquetRows]:
    """Open the Parquet files of a data set, which must have the splits train and validation."""
    with exit_on(OSError, ValueError, prefix=f"--streaming --dataset_name {args.dataset_name}: "):
        data = open_parquet(args.dataset_name, args.dataset_config_name, args.shuffle_buffer)
    named = named_splits(data)
    if missing := [split for split in ("train", "validation") if split not in named]:
        raise SystemExit(
            f"--streaming cuts off no splits, and {args.dataset_name} has none named {missing[0]}, only "
            f"{', '.join(data)}. Write it with one, or leave out --streaming."
        )
    for split in named.keys() - {"train"}:
        named[split].shuffle_buffer = 0  # only training rows are shuffled, so the others need no buffer
    return named


def describe_split(data: Mapping[str, ImageRows], args: DataArguments) -> str:
    """Say for the model card how the images of a run came into their splits."""
    rows = {split: images.rows for split, images in data.items()}
    if args.folds is not None:
        return f"fold {args.fold} of {args.folds} (from 0), seed {args.split_seed}"
    by_patient = args.dataset_name is None
    if not by_patient:
        # Rows that were cut off keep the name of the split that they are of.
        if str(getattr(rows["validation"], "split", None)) != str(getattr(rows["train"], "split", "train")):
            return "as the data set has it"
        group_by = args.group_by or (BY_FOLDER if image_mask_folders(Path(args.dataset_name)) else None)
        patients = patients_of_rows("train", rows["train"], group_by)
        by_patient = len(set(patients)) < len(patients)
    kept = "" if args.test_split else ", none kept for testing"
    return f"by {'patient' if by_patient else 'image'}, seed {args.split_seed}{kept}"


def find_columns(data: DataSplits, args: DataArguments) -> tuple[list[str], str]:
    """Return the names of the columns that make an image, and of that of the masks."""
    rows = next(iter(data.values()))
    found = image_columns(rows)
    mask_column: Any = args.mask_column or next((name for name in MASK_COLUMNS if name in found), None)
    columns: list[Any] = [args.image_column]
    option = "--image_column"
    if args.image_column is None and {*found} & {*MODALITIES}:
        option, columns = "--modalities", args.modalities or DEFAULT_MODALITIES
    elif args.image_column is None:
        columns = [next((name for name in found if name != mask_column), None)]
    for option, column in (*((option, column) for column in columns), ("--mask_column", mask_column)):
        if column not in found:
            fault = "no column found" if column is None else f"{column!r} is no column of images"
            layout = describe_layout(args.dataset_name) if column is None else ""
            raise SystemExit(
                f"{option}: {fault}. The data set's columns of images are {found or 'none'}, of {rows.column_names}."
                f"{layout}"
            )
    return columns, mask_column


def make_images(
    data: DataSplits, columns: Sequence[str], mask_column: str, neighbours: int | None = None
) -> dict[str, ImageRows]:
    """Return the rows of each split with the images that the model sees."""
    with exit_on(ValueError):
        return {split: ImageRows(rows, columns, mask_column, neighbours or 0) for split, rows in data.items()}


def find_regions(
    data: DataSplits,
    columns: Sequence[str],
    mask_column: str,
    regions: dict[str, list[int]] | None,
    labels: str | None = None,
    binarize: bool = False,
) -> DataFacts:
    """Check images and masks; return the regions to segment, and how to read both.

    `labels` is the numbering that the masks of scans had, if it was told; with `binarize` masks are black and white.
    """
    rows, found, is_empty = next(iter(data.values())), MaskValues(), False
    if "wt_pixels" in rows.column_names:  # the BraTS builder has checked its masks
        if binarize:
            raise SystemExit("--binarize is for masks that are black and white; those of scans hold label ids.")
        cases = {str(case) for case in rows["case_id"]} if "case_id" in rows.column_names else {""}
        # What the names of cases do not tell, such as the year in that of a folder, the builder knew.
        numberings = [labels] if labels else {name for case in cases for name in numberings_of(case, new_ending=True)}
        ids = sorted({label_id for name in numberings for label_id in NUMBERINGS[name].ids.values()})
        masks = LabelIds(ids, {}, "" if 4 in ids else " (BraTS' label 4 is 3 here)")
        regions = regions or {"WT": region_ids(numberings)["WT"]}
        ids_of_split = {split: ids_of_slices(rows) for split, rows in data.items()}
        # A second cohort may be of healthy people, and label 4 may be none of the whole tumour.
        is_empty = "train" in data and 4 not in ids and not any(any(rows["wt_pixels"]) for rows in data.values())
    elif isinstance(rows, ParquetRows):
        masks = check_first_rows(data, columns, mask_column, regions, binarize, found)
        ids_of_split = {}
    else:
        for split, rows in data.items():
            check_images_and_masks(split, rows, columns, mask_column, found, binarize)
        if found.values() <= {0}:
            raise SystemExit(f"The masks in column {mask_column!r} are all background (0).")
        masks = read_black_and_white(found) if binarize else read_label_ids(found, regions)
        ids_of_split = {split: {masks.mapping.get(value, value) for value in found.values(split)} for split in data}
    ids = masks.ids
    if regions is None:
        regions = {"foreground": ids} if ids == [1] else {f"class_{label_id}": [label_id] for label_id in ids}
    for name, label_ids in regions.items():
        if not set(label_ids) & set(ids):
            raise SystemExit(
                f"Region {name} has the label ids {label_ids}, the masks hold {ids}{masks.note}. Name some of these "
                "by --regions, or leave the region out."
            )
        if missing := sorted(set(label_ids) - set(ids)):
            logger.warning("No mask holds the label ids %s of region %s, only %s%s.", missing, name, ids, masks.note)
    if is_empty:
        raise SystemExit("No mask has a pixel of tumour. Are these the right masks, and the right slices?")
    warn_of_untrained(ids_of_split, regions)
    logger.info("Regions: %s.", regions)
    return DataFacts(regions, masks.mapping, found.brightest)


def ids_of_slices(rows: datasets.Dataset) -> set[int]:
    """Return which of the label ids 1 to 3 slices of the builder show, by their counts of pixels."""
    counts = [
        list(rows[f"{region}_pixels"]) for region in ("wt", "tc", "et") if f"{region}_pixels" in rows.column_names
    ]
    if len(counts) < 3 or any(None in column for column in counts):
        return set()
    core_without_enhancing, oedema, enhancing = 1, 2, 3
    shown: set[int] = set()
    for whole, core, et in zip(*counts, strict=True):
        sizes = {core_without_enhancing: core - et, oedema: whole - core, enhancing: et}
        shown |= {label_id for label_id, size in sizes.items() if size}
    return shown
