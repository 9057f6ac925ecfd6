"""Where the examples get images and masks from: BraTS scans, a phantom, folders, or the Hub."""

import logging
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow.compute as pc
from huggingface_hub.constants import HF_HUB_CACHE
from tqdm import tqdm

from dataset_scripts.brats_slices import BratsSlices, split_patients
from dataset_scripts.phantom import VERSION, write_phantom_cohort
from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.nifti import MODALITIES, PLANES
from sam2unet_hf.training import SegmentationTransform


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
    """Where the slices come from: a data set, BraTS scans, or a phantom."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id; folder written by `python -m dataset_scripts.brats_slices`; or folder with `images` and "
            "`masks` in it, files paired by name, at its top or in train, validation and test."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    brats_dir: str | None = field(default=None, metadata={"help": "Folder of BraTS cases, in NIfTI."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the images. Default: found by type."})
    mask_column: str | None = field(default=None, metadata={"help": "Column of the masks. Default: found by name."})
    regions: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to segment, NAME=ID[,ID...] each, nested or disjoint. Default: WT=1,2,3 for BraTS, else one "
            "region per id in the masks; with --model_name_or_path those of the model."
        },
    )
    modalities: list[str] = field(
        default_factory=lambda: ["flair"],
        metadata={"help": "For scans: one, or three as RGB.", "choices": MODALITIES},
    )
    slices: list[str] = field(
        default_factory=lambda: ["95"], metadata={"help": "For scans: indices such as 90 95, or all, or tumor."}
    )
    min_tumor_pixels: int = field(default=1, metadata={"help": "For --slices tumor: tumour a slice must show."})
    plane: str = field(default="axial", metadata={"help": "For scans: how to cut.", "choices": sorted(PLANES)})
    num_proc: int | None = field(default=None, metadata={"help": "For scans: processes that read them."})
    skip_bad_cases: bool = field(default=False, metadata={"help": "For scans: leave out and list unusable cases."})
    split_seed: int = field(default=0, metadata={"help": "Seed of the split by patient, where the data has none."})


def load_data(args: DataArguments) -> datasets.DatasetDict:
    """Load or build the data set, with the splits train, validation and, if there is enough, test."""
    if args.dataset_name is None:
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
        data = builder.as_dataset()
    elif (folder := Path(args.dataset_name)).is_dir() and (pairs := image_mask_folders(folder)):
        data = datasets.DatasetDict({split: pair_images_and_masks(*pair) for split, pair in pairs.items()})
    else:
        try:
            data = datasets.load_dataset(args.dataset_name, args.dataset_config_name)  # nosec B615 # rows, no code
            check_paths(data, args.dataset_name)
        except (OSError, RuntimeError, ValueError) as err:  # no such folder or repository, no data in it, a script
            raise SystemExit(f"--dataset_name {args.dataset_name}: {err}") from err
    return with_all_splits(data, args.split_seed)


def check_paths(data: datasets.DatasetDict, name: str) -> None:
    """Raise a `ValueError` if a row takes its image from elsewhere than the data set: `datasets` opens any path."""
    caches = [datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE]
    folders = [Path(os.path.abspath(folder)) for folder in (*caches, *([name] if Path(name).is_dir() else []))]
    for split, rows in data.items():
        for column, feature in rows.features.items():
            if not isinstance(feature, datasets.Image):
                continue
            for chunk in rows.data.column(column).chunks:
                for path in pc.unique(chunk.field("path").filter(chunk.field("bytes").is_null())).to_pylist():
                    if path is None:  # an image that is missing
                        continue
                    # In an archive of a data set it is `zip://<image>::<archive>`.
                    file = re.fullmatch(r"(?:(?:zip|tar)://.*?::)?(.*)", path, re.DOTALL)[1]
                    place = Path(os.path.abspath(file))
                    if "::" in file or "://" in file or not any(map(place.is_relative_to, folders)):
                        raise ValueError(
                            f"column {column!r} of split {split!r} names the file {path}, which is no part of the "
                            "data set. Put the files into its folder, or the images into its rows."
                        )


def phantom_dir() -> Path:
    """Return the cached phantom cohort, drawn at the first run."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / f"sam2unet-phantom-{VERSION}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_phantom_cohort(folder)
    return folder


def image_mask_folders(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Find folders `images` and `masks`: `images`, `train/images` or `images/train`; none if there are none."""
    found = {}
    for split, names in SPLITS.items():
        for name in names:
            for images in (folder / name / "images", folder / "images" / name):
                if images.is_dir():
                    masks = folder / name / "masks" if images.name == "images" else folder / "masks" / name
                    found[split] = (images, masks)
    if not found and (folder / "images").is_dir():
        return {"train": (folder / "images", folder / "masks")}
    return found


def pair_images_and_masks(image_dir: Path, mask_dir: Path) -> datasets.Dataset:
    """Pair the files of two folders by name, whatever their suffix."""
    if not mask_dir.is_dir():
        raise SystemExit(f"{image_dir} has no masks beside it: expected a folder {mask_dir}.")
    files: list[dict[str, Path]] = []
    for folder in (image_dir, mask_dir):
        by_stem: dict[str, Path] = {}
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
                continue
            stem = str(path.relative_to(folder).with_suffix(""))
            if stem in by_stem:
                raise SystemExit(f"{by_stem[stem]} and {path} have the same name. Remove one.")
            by_stem[stem] = path
        files.append(by_stem)
    images, masks = files
    if not images:
        raise SystemExit(f"{image_dir} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    unpaired = [str(images[stem]) for stem in sorted(images.keys() - masks.keys())]
    unpaired += [str(masks[stem]) for stem in sorted(masks.keys() - images.keys())]
    if unpaired:
        more = f" and {len(unpaired) - 5} more" if len(unpaired) > 5 else ""
        raise SystemExit(
            f"{len(unpaired)} files have no partner of the same name: {', '.join(unpaired[:5])}{more}. An image "
            f"{image_dir / 'x.png'} needs a mask {mask_dir / 'x.png'}; the suffixes may differ."
        )
    rows = {
        "image": [str(images[stem]) for stem in images],
        "mask": [str(masks[stem]) for stem in images],
        "case_id": list(images),
    }
    features = {"image": datasets.Image(), "mask": datasets.Image(), "case_id": datasets.Value("string")}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def with_all_splits(data: datasets.DatasetDict, seed: int) -> datasets.DatasetDict:
    """Name the splits as we do; cut off validation, and test if nothing else is there, by patient where known."""
    if not isinstance(data, datasets.DatasetDict):
        raise SystemExit(f"Expected a data set with splits, got {type(data).__name__}.")
    named = {split: data[name] for split, names in SPLITS.items() for name in names if name in data}
    if "train" not in named:
        raise SystemExit(f"The data set has no split named train, only {', '.join(data)}.")
    if "validation" not in named:
        train = named["train"]
        groups = train["case_id"] if "case_id" in train.column_names else list(map(str, range(len(train))))
        split_of = {group: split for split, names in split_patients(groups, seed).items() for group in names}
        if "test" in named:  # the data has its own: what would be test is for training
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


def find_columns(data: datasets.DatasetDict, args: DataArguments) -> tuple[str, str]:
    """Return the columns of images and masks."""
    features = data["train"].features
    image_columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    mask_column = args.mask_column or next((name for name in MASK_COLUMNS if name in image_columns), None)
    image_column = args.image_column or next((name for name in image_columns if name != mask_column), None)
    for option, column in (("--image_column", image_column), ("--mask_column", mask_column)):
        if column not in image_columns:
            raise SystemExit(
                f"{option}: {'no column found' if column is None else f'{column!r} is no column of images'}. The data "
                f"set's columns of images are {image_columns or 'none'}, of {list(features)}."
            )
    return image_column, mask_column


def case_names(rows: datasets.Dataset) -> list[str]:
    """Name each row after its case and slice, or its number, such that the name can be that of a file."""
    cases = rows["case_id"] if "case_id" in rows.column_names else [f"{index:05d}" for index in range(len(rows))]
    if "slice_index" in rows.column_names:
        cases = [f"{case}_{index:03d}" for case, index in zip(cases, rows["slice_index"], strict=True)]
    names = [re.sub(r"[^\w.-]+", "_", case).lstrip(".") for case in cases]
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name}_row{index:05d}" for index, name in enumerate(names)]


def find_regions(
    data: datasets.DatasetDict, image_column: str, mask_column: str, regions: dict[str, list[int]] | None
) -> tuple[dict[str, list[int]], dict[int, int]]:
    """Return the regions to segment, `regions` if given, and the ids to replace in the masks."""
    mapping: dict[int, int] = {}
    if "wt_pixels" in data["train"].column_names:  # written by the BraTS builder, which checked it all
        ids = [1, 2, 3]
        regions = regions or {"WT": ids}
        hint = " (BraTS' label 4 is 3 here)"
    else:
        found: set[int] = set()
        for split, rows in data.items():
            found |= check_images_and_masks(split, rows, image_column, mask_column)
        ids = sorted(found - {0, 255})
        hint = ""
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


def check_images_and_masks(split: str, rows: datasets.Dataset, image_column: str, mask_column: str) -> set[int]:
    """Read every image and mask once, before hours of training, and return the ids in the masks."""
    read_mask = SegmentationTransform(Sam2UNetImageProcessor()).read_mask
    found: set[int] = set()
    for index, name in enumerate(tqdm(case_names(rows), desc=f"Checking {split} images and masks", unit="image")):
        try:
            row = rows[index]
            label_map = read_mask(row[mask_column])
        except (OSError, SyntaxError, ValueError) as err:  # what Pillow and we raise for broken files
            raise SystemExit(f"{split} image {name}: {err}") from err
        if row[mask_column].format == "JPEG":
            raise SystemExit(f"{split} image {name}: its mask is a JPEG, which blurs label ids. Save masks as PNG.")
        height, width = label_map.shape
        if row[image_column].size != (width, height):
            raise SystemExit(
                f"{split} image {name} is {row[image_column].height}x{row[image_column].width} pixels, its mask "
                f"{height}x{width}. Resize one to the other, masks by nearest neighbour."
            )
        found.update(label_map.unique().tolist())
        if len(found) > 64:
            raise SystemExit(
                f"The masks up to {split} image {name} hold more than 64 different values, such as "
                f"{sorted(found)[:8]}. Are they photographs, or saved as JPEG, which blurs ids? Save label ids as PNG."
            )
    return found
