"""Images and masks for the examples: from BraTS scans, a phantom, folders, or the Hub."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from case_names import case_ids
from data_checks import check_first_rows, check_images_and_masks, check_leaks, check_paths, image_columns

from dataset_scripts.brats_slices import BratsSlices, split_patients
from dataset_scripts.phantom import VERSION, write_phantom_cohort
from sam2unet_hf.cases_sam2unet import patient_of
from sam2unet_hf.scans_sam2unet import MODALITIES, PLANES
from sam2unet_hf.training import ParquetRows, open_parquet


logger = logging.getLogger(__name__)

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
MASK_COLUMNS = ("mask", "label", "labels", "annotation", "segmentation", "segmentation_mask", "masks")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


@dataclass
class DataArguments:
    """Where images and masks come from: a data set, BraTS scans, or a phantom."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id; folder written by `python -m dataset_scripts.brats_slices`; or folder with `images` and "
            "`masks` in it, files paired by name, at its top or in train, validation and test."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    brats_dir: str | None = field(default=None, metadata={"help": "Folder of BraTS cases, in NIfTI."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the Parquet files of --dataset_name while training, and keep no copy on disk."},
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Rows that --streaming shuffles together, and each reader holds in memory."}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column of the images. Default: the first column of images."}
    )
    mask_column: str | None = field(
        default=None, metadata={"help": "Column of the masks. Default: mask, label or the like."}
    )
    regions: list[str] | None = field(
        default=None,
        metadata={
            "help": "Regions to segment, NAME=ID[,ID...] each, nested or disjoint. Default: WT=1,2,3 for BraTS, else "
            "one region per id in the masks; with --model_name_or_path those of the model."
        },
    )
    modalities: list[str] = field(
        default_factory=lambda: ["flair"],
        metadata={"help": "Modality of the scans, or three of them as RGB.", "choices": MODALITIES},
    )
    slices: list[str] = field(
        default_factory=lambda: ["95"], metadata={"help": "Slices of the scans: indices such as 90 95, all, or tumor."}
    )
    min_tumor_pixels: int = field(
        default=1, metadata={"help": "Least number of tumour pixels in a slice of --slices tumor."}
    )
    plane: str = field(default="axial", metadata={"help": "Plane of the slices.", "choices": sorted(PLANES)})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that read the scans."})
    skip_bad_cases: bool = field(
        default=False, metadata={"help": "Leave out scans that cannot be used, and list them."}
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of the split by patient, for data without splits."})
    allow_leaks: bool = field(
        default=False,
        metadata={"help": "Accept a patient or an image in two splits, which makes the scores too good."},
    )


def name_of_source(source: str) -> str:
    """Return the name of a folder, or a Hub id as it is."""
    return Path(source).resolve().name if Path(source).exists() else source


def load_data(args: DataArguments) -> datasets.DatasetDict | dict[str, ParquetRows]:
    """Load or build the data set, with the splits train, validation and, if there is enough, test.

    Raises:
        SystemExit: If there is no such data, a split is empty, or, without `allow_leaks`, two splits share an image
            or a patient, whom `case_id` names except for images in folders.
    """
    folders = {} if args.dataset_name is None else image_mask_folders(Path(args.dataset_name))
    if args.streaming and (args.dataset_name is None or folders):
        raise SystemExit(
            "--streaming reads a data set of Parquet files, a folder or a Hub id, given by --dataset_name. `python -m "
            "dataset_scripts.brats_slices` writes one of BraTS scans. Images in folders are read one by one without "
            "--streaming."
        )
    if args.streaming:
        data = stream_data(args)
    elif args.dataset_name is None:
        data = with_all_splits(slice_scans(args), args.split_seed)
    elif folders:
        pairs = {split: pair_images_and_masks(*folders_of_split) for split, folders_of_split in folders.items()}
        data = with_all_splits(datasets.DatasetDict(pairs), args.split_seed)
    else:
        data = with_all_splits(load_dataset(args), args.split_seed)
    image_column, _ = find_columns(data, args)
    # Images of two patients may have the same name, in two folders.
    check_leaks(data, image_column, has_patients=not folders, allow_leaks=args.allow_leaks)
    return data


def slice_scans(args: DataArguments) -> datasets.DatasetDict:
    """Build the slices of BraTS scans, or of a phantom."""
    brats_dir = args.brats_dir or phantom_dir()
    words = " ".join(args.slices).split()
    try:
        builder = BratsSlices(
            data_dir=str(brats_dir),
            modalities=args.modalities,
            slices=[int(word) for word in words] if all(map(str.isdecimal, words)) else " ".join(words),
            min_tumor_pixels=args.min_tumor_pixels,
            plane=args.plane,
            seed=args.split_seed,
            skip_bad_cases=args.skip_bad_cases,
        )
        builder.download_and_prepare(num_proc=args.num_proc)
    except (FileNotFoundError, ValueError) as err:
        raise SystemExit(str(err)) from err
    return builder.as_dataset()


def phantom_dir() -> Path:
    """Return the folder of the phantom cohort, which is written at the first run."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / f"sam2unet-phantom-{VERSION}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_phantom_cohort(folder)
    return folder


def load_dataset(args: DataArguments) -> datasets.DatasetDict:
    """Load a data set from a folder or the Hub."""
    try:
        data = datasets.load_dataset(args.dataset_name, args.dataset_config_name)  # nosec B615 # rows, no code
        check_paths(data, args.dataset_name)
    except (OSError, RuntimeError, ValueError) as err:  # no such folder or repository, no data in it, a script
        raise SystemExit(f"--dataset_name {args.dataset_name}: {err}") from err
    return data


def stream_data(args: DataArguments) -> dict[str, ParquetRows]:
    """Open the Parquet files of a data set, which must have the splits train and validation."""
    try:
        data = open_parquet(args.dataset_name, args.dataset_config_name, args.shuffle_buffer)
    except (OSError, ValueError) as err:
        raise SystemExit(f"--streaming --dataset_name {args.dataset_name}: {err}") from err
    named = named_splits(data)
    if missing := [split for split in ("train", "validation") if split not in named]:
        raise SystemExit(
            f"--streaming cuts off no splits, and {args.dataset_name} has none named {missing[0]}, only "
            f"{', '.join(data)}. Write it with one, or leave out --streaming."
        )
    for split, rows in named.items():
        if split != "train":
            rows.shuffle_buffer = 0  # only training rows are shuffled, so the others need no buffer
    train = named["train"]
    held = train.num_bytes / len(train) * min(args.shuffle_buffer, len(train))
    logger.info("Streaming %d training rows; each reader holds about %.0f MB of them.", len(train), held / 1e6)
    return named


def image_mask_folders(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Return the folders of images and masks by split, if there are any.

    They are `train/images` and `train/masks`, or `images/train` and `masks/train`, or `images` and `masks` for data
    without splits.
    """
    found: dict[str, tuple[Path, Path]] = {}
    for split, names in SPLITS.items():
        for name in names:
            for images, masks in (
                (folder / name / "images", folder / name / "masks"),
                (folder / "images" / name, folder / "masks" / name),
            ):
                if not images.is_dir():
                    continue
                if split in found:
                    raise SystemExit(f"{found[split][0]} and {images} are both of the split {split}. Remove one.")
                found[split] = (images, masks)
    if not found and (folder / "images").is_dir():
        return {"train": (folder / "images", folder / "masks")}
    return found


def pair_images_and_masks(image_dir: Path, mask_dir: Path) -> datasets.Dataset:
    """Pair the files of two folders by name, without regard to the suffix."""
    if not mask_dir.is_dir():
        raise SystemExit(f"{image_dir} has no masks beside it: expected a folder {mask_dir}.")
    images, masks = find_images(image_dir), find_images(mask_dir)
    if not images:
        raise SystemExit(f"{image_dir} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    unpaired = [str(images[name]) for name in sorted(images.keys() - masks.keys())]
    unpaired += [str(masks[name]) for name in sorted(masks.keys() - images.keys())]
    if unpaired:
        more = f" and {len(unpaired) - 5} more" if len(unpaired) > 5 else ""
        raise SystemExit(
            f"{len(unpaired)} files have no partner of the same name: {', '.join(unpaired[:5])}{more}. An image "
            f"{image_dir / 'x.png'} needs a mask {mask_dir / 'x.png'}; the suffixes may differ."
        )
    rows = {
        "image": [str(path) for path in images.values()],
        "mask": [str(masks[name]) for name in images],
        "case_id": list(images),
    }
    features = {"image": datasets.Image(), "mask": datasets.Image(), "case_id": datasets.Value("string")}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def find_images(folder: Path) -> dict[str, Path]:
    """Return the images in a folder and its subfolders by their relative path without suffix."""
    images: dict[str, Path] = {}
    others = []
    for path in sorted(folder.rglob("*")):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            others += [path] if path.is_file() else []
            continue
        if not path.is_file():  # opening a pipe would wait forever
            raise SystemExit(f"{path} is not a file, or a link to none. Remove it.")
        name = str(path.relative_to(folder).with_suffix(""))
        if name in images:
            raise SystemExit(f"{images[name]} and {path} have the same name. Remove one.")
        images[name] = path
    if others:
        logger.warning("%d files in %s are no images, such as %s: not read.", len(others), folder, others[0])
    return images


def named_splits(data: Mapping[str, Any]) -> dict[str, Any]:
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


def with_all_splits(data: datasets.DatasetDict, seed: int) -> datasets.DatasetDict:
    """Name the splits train, validation and test; split the training rows, by patient, if there is no validation."""
    named = named_splits(data)
    if "train" not in named:
        raise SystemExit(f"The data set has no split named train, only {', '.join(data)}.")
    if "validation" not in named:
        train = named["train"]
        groups = [patient_of(case) for case in case_ids("train", train)] or list(map(str, range(len(train))))
        split_of = {group: split for split, names in split_patients(groups, seed).items() for group in names}
        if "test" in named:  # the data has its own test split, so train on what would be another
            split_of = {group: "train" if split == "test" else split for group, split in split_of.items()}
        for split in ("train", "validation", "test"):
            rows = [index for index, group in enumerate(groups) if split_of[group] == split]
            if rows:
                named[split] = train.select(rows)
        if "validation" not in named:
            raise SystemExit(f"{len(train)} images of {len(split_of)} cases are too few to train and to validate.")
        counts = ", ".join(f"{len(named[split])} {split}" for split in SPLITS if split in named)
        logger.warning("The data set has no validation split; cut it into %s.", counts)
    empty = [split for split, rows in named.items() if not len(rows)]
    if empty:
        raise SystemExit(f"The split {empty[0]} of the data set is empty.")
    return datasets.DatasetDict(named)


def find_columns(data: Mapping[str, datasets.Dataset | ParquetRows], args: DataArguments) -> tuple[str, str]:
    """Return the names of the columns of images and masks."""
    found = image_columns(data["train"])
    mask_column = args.mask_column or next((name for name in MASK_COLUMNS if name in found), None)
    image_column = args.image_column or next((name for name in found if name != mask_column), None)
    for option, column in (("--image_column", image_column), ("--mask_column", mask_column)):
        if column not in found:
            raise SystemExit(
                f"{option}: {'no column found' if column is None else f'{column!r} is no column of images'}. The data "
                f"set's columns of images are {found or 'none'}, of {data['train'].column_names}."
            )
    return image_column, mask_column


def find_regions(
    data: Mapping[str, datasets.Dataset | ParquetRows],
    image_column: str,
    mask_column: str,
    regions: dict[str, list[int]] | None,
) -> tuple[dict[str, list[int]], dict[int, int]]:
    """Check images and masks, and find what to segment in them.

    Args:
        data: Splits of the data set.
        image_column: Column of the images.
        mask_column: Column of the masks.
        regions: Regions to segment; by default those of the data.

    Returns:
        The regions, and the ids to replace in the masks, such as `{255: 1}`.

    Raises:
        SystemExit: If an image or a mask cannot be used, or no mask holds an id of a region.
    """
    mapping: dict[int, int] = {}
    hint = ""
    if "wt_pixels" in data["train"].column_names:  # the BraTS builder has checked its masks
        ids, hint = [1, 2, 3], " (BraTS' label 4 is 3 here)"
        regions = regions or {"WT": ids}
    elif isinstance(data["train"], ParquetRows):
        check_first_rows(data, image_column, mask_column, regions)
        ids = sorted(label_id for label_ids in regions.values() for label_id in label_ids)
    else:
        found: set[int] = set()
        for split, rows in data.items():
            found |= check_images_and_masks(split, rows, image_column, mask_column)
        ids = sorted(found - {0, 255})
        if not ids and 255 in found:
            logger.warning("The masks hold 0 and 255 only: taking 255 as the foreground, label id 1.")
            ids, mapping, hint = [1], {255: 1}, " (255 is taken as 1)"
        elif not ids:
            raise SystemExit(f"The masks in column {mask_column!r} are all background (0).")
        elif 255 in found:
            logger.warning("Pixels of 255 in the masks are ignored in training and evaluation.")
        if regions is None:
            regions = {"foreground": ids} if ids == [1] else {f"class_{label_id}": [label_id] for label_id in ids}
    for name, label_ids in regions.items():
        if not set(label_ids) & set(ids):
            raise SystemExit(f"Region {name} has the label ids {label_ids}, the masks hold {ids}{hint}.")
        if missing := sorted(set(label_ids) - set(ids)):
            logger.warning("No mask holds the label ids %s of region %s, only %s%s.", missing, name, ids, hint)
    logger.info("Regions: %s.", regions)
    return regions, mapping
