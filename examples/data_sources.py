"""Where the examples get images and masks from: BraTS scans, a phantom, folders, or the Hub."""

import hashlib
import io
import logging
import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec
import pyarrow.compute as pc
from datasets.utils import tqdm
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import ExifTags, Image

from dataset_scripts.brats_slices import BratsSlices, split_patients
from dataset_scripts.phantom import VERSION, write_phantom_cohort
from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.cases_sam2unet import patient_of
from sam2unet_hf.scans_sam2unet import MODALITIES, PLANES
from sam2unet_hf.training import SegmentationTransform
from sam2unet_hf.training.streaming import ParquetRows, open_parquet


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
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the Parquet files of --dataset_name while training, keep nothing of them on disk."},
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "With --streaming: rows that are shuffled together, and held by each reader."}
    )
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
    allow_leaks: bool = field(
        default=False,
        metadata={"help": "Go on where a patient or an image is in two splits, which makes the scores too good."},
    )


def load_data(args: DataArguments) -> datasets.DatasetDict | dict[str, ParquetRows]:
    """Load or build the data set, with the splits train, validation and, if there is enough, test.

    Raises:
        SystemExit: If there is no such data, a split is empty, or, without `allow_leaks`, two splits share a patient
            (by `case_id`, unless that is the name of a file of yours) or an image.
    """
    pairs: dict[str, tuple[Path, Path]] = {}
    if args.streaming:
        data = stream_data(args)
    elif args.dataset_name is None:
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
    if not args.streaming:
        data = with_all_splits(data, args.split_seed)
    image_column, _ = find_columns(data, args)
    leak = None if pairs else shared_patient(data)  # files of different patients may have the same name
    remedy = "Keep it in one split"
    if leak is None and not args.streaming:  # which reads no image beforehand
        leak, remedy = shared_image(data, image_column), "Remove one of the two"
    if leak:
        leak = f"{leak} A model is not to be scored on what it was trained on or chosen by."
        if not args.allow_leaks:
            raise SystemExit(f"{leak} {remedy}, or go on all the same with --allow_leaks.")
        logger.warning("%s --allow_leaks goes on all the same.", leak)
    return data


def stream_data(args: DataArguments) -> dict[str, ParquetRows]:
    """Open the splits of a data set of Parquet files, which must have train and validation."""
    if args.dataset_name is None or image_mask_folders(Path(args.dataset_name)):
        raise SystemExit(
            "--streaming reads a data set of Parquet files, a folder or a Hub id, given by --dataset_name. `python -m "
            "dataset_scripts.brats_slices` writes one of BraTS scans. Images in folders are read one by one without "
            "--streaming."
        )
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
            rows.shuffle_buffer = 0  # nothing is to be held for shuffling
    train = named["train"]
    held = train.num_bytes / len(train) * min(args.shuffle_buffer, len(train))
    logger.info("Streaming %d training rows; each reader holds about %.0f MB of them.", len(train), held / 1e6)
    return named


def shared_patient(data: datasets.DatasetDict | dict[str, ParquetRows]) -> str | None:
    """Say which patient two splits share, if any."""
    first: dict[str, tuple[str, str]] = {}
    for split, rows in data.items():
        for case in sorted(set(case_ids(split, rows))):
            other, other_case = first.setdefault(patient_of(case), (split, case))
            if other != split:
                return (
                    f"Patient {patient_of(case)} is in the splits {other} (case {other_case}) and {split} "
                    f"(case {case})."
                )
    return None


def shared_image(data: datasets.DatasetDict, image_column: str) -> str | None:
    """Say which image is byte by byte in two splits, if any; images of one colour do not count."""
    first: dict[bytes, tuple[str, str]] = {}
    for split, rows in data.items():
        names = iter(case_names(rows))
        files = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        with tqdm(total=len(rows), desc=f"Comparing {split} images", unit="image") as bar:
            for batch in files.iter(batch_size=100):
                for file, name in zip(batch[image_column], names, strict=False):
                    bar.update()
                    data_of_file = file_bytes(file, f"{split} image {name}")
                    digest = hashlib.blake2b(data_of_file, digest_size=16).digest()
                    other, other_name = first.setdefault(digest, (split, name))
                    if other != split and not is_of_one_colour(data_of_file):
                        return f"{split} image {name} is the same file as {other} image {other_name}."
    return None


def file_bytes(file: dict[str, Any] | None, name: str) -> bytes:
    """Return the bytes of an image as `datasets` holds it."""
    try:
        if file is not None and (file["bytes"] is not None or file["path"] is not None):
            if file["bytes"] is not None:
                return file["bytes"]
            if "::" not in file["path"]:
                return Path(file["path"]).read_bytes()
            with fsspec.open(file["path"]) as opened:  # in an archive
                return opened.read()
    except (OSError, zipfile.BadZipFile) as err:
        raise SystemExit(f"{name}: it cannot be read ({err}). Check its path and permissions.") from err
    raise SystemExit(f"{name}: the row holds no image. Fill it, or remove the row.")


def is_of_one_colour(data: bytes) -> bool:
    """Whether there is nothing in an image, as in the first slices of a scan, or nothing to be read."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            extrema = image.getextrema()
    except Exception:  # Pillow raises nearly anything for broken files, which are named where they are checked
        return True
    return all(low == high for low, high in (extrema if isinstance(extrema[0], tuple) else [extrema]))


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
                    if split in found:
                        raise SystemExit(f"{found[split][0]} and {images} are both of the split {split}. Remove one.")
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
        others = []
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
                others += [path] if path.is_file() and not path.name.startswith(".") else []
                continue
            if not path.is_file():  # a pipe would be waited for without end
                raise SystemExit(f"{path} is not a file, or a link to none. Remove it.")
            stem = str(path.relative_to(folder).with_suffix(""))
            if stem in by_stem:
                raise SystemExit(f"{by_stem[stem]} and {path} have the same name. Remove one.")
            by_stem[stem] = path
        if others:
            logger.warning("%d files in %s are no images, such as %s: not read.", len(others), folder, others[0])
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


def named_splits(data: Mapping[str, Any]) -> dict[str, Any]:
    """Name the splits as we do; leave out those of other names."""
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
    """Name the splits as we do; cut off validation, and test if nothing else is there, by patient where known."""
    if not isinstance(data, datasets.DatasetDict):
        raise SystemExit(f"Expected a data set with splits, got {type(data).__name__}.")
    named = named_splits(data)
    if "train" not in named:
        raise SystemExit(f"The data set has no split named train, only {', '.join(data)}.")
    if "validation" not in named:
        train = named["train"]
        groups = [patient_of(case) for case in case_ids("train", train)] or list(map(str, range(len(train))))
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


def case_ids(split: str, rows: datasets.Dataset) -> list[str]:
    """Return the case of each row, or nothing if the data set does not tell."""
    cases = list(rows["case_id"]) if "case_id" in rows.column_names else []
    if None in cases:
        raise SystemExit(
            f"Row {cases.index(None)} of the split {split} has no `case_id`, so its patient could be in another split "
            "too. Fill in the column, or remove it."
        )
    return list(map(str, cases))


def case_names(rows: datasets.Dataset) -> list[str]:
    """Name each row after its case and slice, or its number, such that the name can be that of a file."""
    cases = rows["case_id"] if "case_id" in rows.column_names else [f"{index:05d}" for index in range(len(rows))]
    if "slice_index" in rows.column_names:
        cases = [f"{case}_{index or 0:03d}" for case, index in zip(cases, rows["slice_index"], strict=True)]
    names = [re.sub(r"[^\w.-]+", "_", str(case)).lstrip(".")[:100] for case in cases]
    counts = Counter(names)
    unique = [name if counts[name] == 1 and name else f"{name}_row{i:05d}" for i, name in enumerate(names)]
    if len(set(unique)) < len(unique):  # one of them had such a name to begin with
        unique = [f"{name}_row{i:05d}" for i, name in enumerate(names)]
    return unique


def find_regions(
    data: datasets.DatasetDict, image_column: str, mask_column: str, regions: dict[str, list[int]] | None
) -> tuple[dict[str, list[int]], dict[int, int]]:
    """Return the regions to segment, `regions` if given, and the ids to replace in the masks."""
    mapping: dict[int, int] = {}
    if "wt_pixels" in data["train"].column_names:  # written by the BraTS builder, which checked it all
        ids = [1, 2, 3]
        regions = regions or {"WT": ids}
        hint = " (BraTS' label 4 is 3 here)"
    elif isinstance(data["train"], ParquetRows):
        check_first_rows(data, image_column, mask_column, regions)
        ids = sorted(label_id for label_ids in regions.values() for label_id in label_ids)
        hint = ""
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


def check_first_rows(
    data: dict[str, ParquetRows], image_column: str, mask_column: str, regions: dict[str, list[int]] | None
) -> None:
    """Check the first rows of each split, and that it is said what to segment, for not all masks are read."""
    if regions is None:
        raise SystemExit(
            "--streaming does not read all masks beforehand to find the ids in them. Say what to segment, such as by "
            "--regions foreground=1."
        )
    ids = {label_id for label_ids in regions.values() for label_id in label_ids}
    for split, rows in data.items():
        found = check_images_and_masks(split, rows.head(100), image_column, mask_column)
        if 255 in found and not found & ids:
            raise SystemExit(
                f"The first masks of {split} hold {sorted(found)}, of which 255 is ignored, and none is of a region: "
                f"{regions}. With --streaming masks must hold label ids, such as 1 for the foreground."
            )


class Picture(NamedTuple):
    """An image as `datasets` decodes it, upright, and what the file said of it."""

    image: Image.Image
    format: str | None
    orientation: int


def read_picture(file: dict[str, Any] | None, name: str, what: str) -> Picture:
    """Decode an image, and refuse what would be read in part or fill the memory."""
    data = file_bytes(file, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as opened:
                pages = getattr(opened, "n_frames", 1) if opened.format != "MPO" else 1  # whose others are previews
                form, orientation = opened.format, opened.getexif().get(ExifTags.Base.Orientation, 1)
            picture = Picture(datasets.Image().decode_example(file), form, orientation)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as err:
        raise SystemExit(
            f"{name}: {what} has more than {Image.MAX_IMAGE_PIXELS} pixels, Pillow's limit. Cut image and mask into "
            "tiles, or make them smaller."
        ) from err
    except Exception as err:  # Pillow raises nearly anything for broken files
        where = f"; {file['path']}" if file is not None and file["path"] else ""
        reason = f"{str(err) or type(err).__name__}{where}"
        raise SystemExit(f"{name}: {what} cannot be read ({reason}). Save it anew, or remove the pair.") from err
    if form == "TIFF" and orientation in (5, 6, 7, 8):  # Pillow 12 reads rows of the wrong length, if from a path
        raise SystemExit(f"{name}: {what} is a TIFF with the EXIF orientation {orientation}. Save it upright, as PNG.")
    if pages > 1:
        raise SystemExit(f"{name}: {what} has {pages} pages, of which one would be read. Save them as files.")
    return picture


def check_images_and_masks(split: str, rows: datasets.Dataset, image_column: str, mask_column: str) -> set[int]:
    """Read every image and mask once, before hours of training, and return the ids in the masks."""
    processor = Sam2UNetImageProcessor()
    read_mask = SegmentationTransform(processor).to_label_ids
    files = rows.select_columns(list({image_column: None, mask_column: None}))
    for column in files.column_names:
        files = files.cast_column(column, datasets.Image(decode=False))
    found: set[int] = set()
    for index, case in enumerate(tqdm(case_names(rows), desc=f"Checking {split} images and masks", unit="image")):
        row, name = files[index], f"{split} image {case}"
        image = read_picture(row[image_column], name, "it")
        mask = read_picture(row[mask_column], name, "its mask")
        if mask.format in ("JPEG", "MPO"):
            raise SystemExit(f"{name}: its mask is a JPEG, which blurs label ids. Save masks as PNG.")
        try:
            processor.process_image(image.image, do_convert_rgb=True, do_rescale=True)
            label_map = read_mask(mask.image)
        except ValueError as err:
            raise SystemExit(f"{name}: {err}") from err
        turned = image.orientation != mask.orientation
        height, width = label_map.shape
        if image.image.size != (width, height):
            hint = " One of them is turned by its EXIF orientation, the other is not." if turned else ""
            raise SystemExit(
                f"{name} is {image.image.height}x{image.image.width} pixels, its mask {height}x{width}.{hint} Resize "
                "one to the other, masks by nearest neighbour."
            )
        # A quarter turn shows in the size, and the mask is upright as the image is.
        if turned and (height == width or not {image.orientation, mask.orientation} & {5, 6, 7, 8}):
            raise SystemExit(
                f"{name} has the EXIF orientation {image.orientation}, its mask {mask.orientation}: whether they lie "
                "on each other cannot be told. Save both upright (`PIL.ImageOps.exif_transpose`)."
            )
        for part in label_map.split(1024):  # a sorted copy of the whole would take as much memory again
            found.update(part.unique().tolist())
        if beyond := sorted(label_id for label_id in found if not 0 <= label_id < 2**16):
            raise SystemExit(f"{name}: its mask holds the label {beyond[0]}. Label ids are 0 (background) to 65535.")
        if len(found) > 64:
            raise SystemExit(
                f"The masks up to {name} hold more than 64 different values, such as {sorted(found)[:8]}. Are they "
                "photographs, or saved as JPEG, which blurs ids? Save label ids as PNG."
            )
    return found
