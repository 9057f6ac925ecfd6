"""Checks of data before training: every image and mask, the paths of images, and leaks between splits."""

import hashlib
import io
import logging
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec
import pyarrow.compute as pc
from datasets.utils import tqdm
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image

from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.finetuning.case_names import case_ids, case_names, patients_of_rows
from sam2unet_hf.finetuning.image_depth import brighter
from sam2unet_hf.finetuning.mask_values import (
    IGNORED,
    LabelIds,
    MaskValues,
    black_and_white_mapping,
    check_grey,
    check_mixture,
    check_transparency,
    read_black_and_white,
)
from sam2unet_hf.finetuning.processes import exit_on
from sam2unet_hf.pictures import inspect_picture, why_read_wrong
from sam2unet_hf.training import ParquetRows, SegmentationTransform


logger = logging.getLogger("data_checks")

DataSplits = Mapping[str, datasets.Dataset | ParquetRows]


def check_leaks(data: DataSplits, columns: Sequence[str], group_by: str | None, allow_leaks: bool) -> None:
    """Refuse data in which two splits share an image, or a patient, see [`patients_of_rows`]."""
    leak, remedy = find_shared_patient(data, group_by), "Keep it in one split"
    is_streamed = isinstance(next(iter(data.values())), ParquetRows)  # comparing their images would read all of them
    if leak is None and not is_streamed:
        shared = (find_shared_image(data, column) for column in columns)
        leak, remedy = next((leak for leak in shared if leak), None), "Remove one of the two"
    if leak is None:
        return
    leak = f"{leak} A model must not be scored on what it was trained on or chosen by."
    if not allow_leaks:
        raise SystemExit(f"{leak} {remedy}, or go on all the same with --allow_leaks.")
    logger.warning("%s --allow_leaks goes on all the same.", leak)


def find_shared_patient(data: DataSplits, group_by: str | None = None) -> str | None:
    """Describe the first patient that two splits share, if there is one."""
    first: dict[str, tuple[str, str]] = {}
    for split, rows in data.items():
        patients = patients_of_rows(split, rows, group_by)
        cases = case_ids(split, rows) or patients
        for case, patient in sorted(set(zip(cases, patients, strict=bool(patients)))):
            other, other_case = first.setdefault(patient, (split, case))
            if other != split:
                return f"Patient {patient} is in the splits {other} (case {other_case}) and {split} (case {case})."
    return None


def find_shared_image(data: Mapping[str, datasets.Dataset], image_column: str) -> str | None:
    """Describe the first image whose file two splits share, if there is one."""
    first: dict[bytes, tuple[str, str]] = {}
    for split, rows in data.items():
        files = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        files = tqdm(files, desc=f"Comparing {split} images", unit="image")
        for name, row in zip(case_names(rows), files, strict=True):
            content = file_bytes(row[image_column], f"{split} image {name}")
            digest = hashlib.blake2b(content, digest_size=16).digest()
            other, other_name = first.setdefault(digest, (split, name))
            if other != split and not is_of_one_colour(content):  # the outer slices of all scans are black
                return f"{split} image {name} is the same file as {other} image {other_name}."
    return None


def file_bytes(file: dict[str, Any] | None, name: str) -> bytes:
    """Return the bytes of an image, as `datasets.Image(decode=False)` holds or names it; `name` is for errors."""
    file = file or {"bytes": None, "path": None}
    try:
        if file["bytes"] is not None:
            return file["bytes"]
        if file["path"] is not None and "::" in file["path"]:
            with fsspec.open(file["path"]) as opened:
                return opened.read()
        if file["path"] is not None:
            return Path(file["path"]).read_bytes()
    except (OSError, zipfile.BadZipFile) as err:
        raise SystemExit(f"{name}: it cannot be read ({err}). Check its path and permissions.") from err
    raise SystemExit(f"{name}: the row holds no image. Fill it, or remove the row.")


def is_of_one_colour(content: bytes) -> bool:
    """Whether all pixels of an image file are equal; also true of a file that is no image."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            extrema = image.getextrema()
    except Exception:  # Pillow raises nearly anything for broken files, which `read_picture` reports
        return True
    return all(low == high for low, high in (extrema if isinstance(extrema[0], tuple) else [extrema]))


def check_paths(data: datasets.DatasetDict, name: str) -> None:
    """Refuse rows that name a file outside of the data set's folder and the caches: `datasets` would open any path."""
    caches = [datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE]
    folders = [Path(os.path.abspath(folder)) for folder in (*caches, *([name] if Path(name).is_dir() else []))]
    for split, rows in data.items():
        for column in image_columns(rows):
            for chunk in rows.data.column(column).chunks:
                paths = chunk.field("path").filter(chunk.field("bytes").is_null())
                for path in pc.unique(paths.drop_null()).to_pylist():
                    # The path of an image in an archive is `zip://<image>::<archive>`.
                    file = re.fullmatch(r"(?:(?:zip|tar)://.*?::)?(.*)", path, re.DOTALL)[1]
                    place = Path(os.path.abspath(file))
                    if "::" in file or "://" in file or not any(map(place.is_relative_to, folders)):
                        raise ValueError(
                            f"column {column!r} of split {split!r} names the file {path}, which is no part of the "
                            "data set. Put the files into its folder, or the images into its rows."
                        )


def image_columns(rows: datasets.Dataset) -> list[str]:
    """Return the names of the columns that hold images or masks."""
    return [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]


def check_first_rows(
    data: Mapping[str, ParquetRows],
    columns: Sequence[str],
    mask_column: str,
    regions: dict[str, list[int]] | None,
    binarize: bool,
    masks: MaskValues,
) -> LabelIds:
    """Check the first 100 rows of each streamed split, and return the ids of the regions, which must be given."""
    if regions is None and not binarize:
        raise SystemExit(
            "--streaming does not read all masks beforehand to find the ids in them. Name what to segment, such as by "
            "--regions foreground=1."
        )
    for split, rows in data.items():
        check_images_and_masks(split, rows.head(100), columns, mask_column, masks, binarize)
    if binarize:
        found = read_black_and_white(masks)
        return LabelIds([1], black_and_white_mapping(range(1, 256)) if found.mapping else {}, found.note)
    ids = {label_id for label_ids in regions.values() for label_id in label_ids}
    if IGNORED not in ids:
        check_mixture(masks, sorted(masks.values() - {0, IGNORED}))
    for split in data:
        values = masks.values(split)
        if IGNORED in values and not values & ids:
            raise SystemExit(
                f"The first masks of {split} hold {sorted(values)}, of which 255 is ignored, and none is of a region: "
                f"{regions}. With --streaming masks must hold label ids, such as 1 for the foreground."
            )
    return LabelIds(sorted(ids), {})


def check_images_and_masks(
    split: str,
    rows: datasets.Dataset,
    columns: Sequence[str],
    mask_column: str,
    masks: MaskValues | None = None,
    binarize: bool = False,
) -> set[int]:
    """Read every image and mask once before training, which takes hours.

    Args:
        split: Name of the split, for messages.
        rows: Its rows.
        columns: Columns of the images.
        mask_column: Column of the masks.
        masks: Keeps the values of the masks, and how bright the images are.
        binarize: Masks are black and white, perhaps with blurred edges.

    Returns:
        The label ids in the masks of the split.
    """
    transform = SegmentationTransform(Sam2UNetImageProcessor(white_level=65535))
    files = rows.select_columns(list(dict.fromkeys([*columns, mask_column])))
    for column in files.column_names:
        files = files.cast_column(column, datasets.Image(decode=False))
    masks = MaskValues() if masks is None else masks
    found: set[int] = set()
    for index, case in enumerate(tqdm(case_names(rows), desc=f"Checking {split} images and masks", unit="image")):
        row, name = files[index], f"{split} image {case}"
        images = [read_picture(row[column], name, "it") for column in columns]
        mask = read_picture(row[mask_column], name, "its mask")
        if mask.format in ("JPEG", "MPO") and not binarize:
            raise SystemExit(
                f"{name}: its mask is a JPEG, which blurs label ids. Save masks as PNG, or pass --binarize if they "
                "are black and white."
            )
        with exit_on(ValueError, prefix=f"{name}: "):
            for image in images:
                transform.processor.process_image(image.image, do_convert_rgb=True, do_rescale=True)
                masks.brightest = brighter(image.image, name, masks.brightest)
            label_map = transform.to_label_ids(mask.image)
        for image in images:
            check_alignment(image, mask, name)
        check_transparency(mask.image, label_map, name)
        path = row[mask_column]["path"]
        file = path if path and os.path.exists(path) else f"the mask of {name}"
        found |= masks.add(split, label_map, file)
        if binarize:
            check_grey(label_map, file)
        if beyond := sorted(label_id for label_id in found if not 0 <= label_id < 2**16):
            raise SystemExit(f"{name}: its mask holds the label {beyond[0]}. Label ids are 0 (background) to 65535.")
        if len(found) > 64 and not binarize:
            raise SystemExit(
                f"The masks up to {name} hold more than 64 different values, such as {sorted(found)[:8]}. Are they "
                "photographs, or saved as JPEG, which blurs ids? Save label ids as PNG, or pass --binarize if the "
                "masks are black and white with blurred edges."
            )
    return found


class Picture(NamedTuple):
    """An image as `datasets` decodes it, turned upright, with format and EXIF orientation of its file."""

    image: Image.Image
    format: str | None
    orientation: int


def read_picture(file: dict[str, Any] | None, name: str, what: str) -> Picture:
    """Decode an image, `what` of the row `name`; refuse one that would be read in part only, or fill the memory."""
    content = file_bytes(file, name)
    try:
        facts = inspect_picture(content)
        picture = Picture(datasets.Image().decode_example(file), facts.format, facts.orientation)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as err:
        raise SystemExit(
            f"{name}: {what} has more than {Image.MAX_IMAGE_PIXELS} pixels, Pillow's limit. Cut image and mask into "
            "tiles, or make them smaller."
        ) from err
    except Exception as err:  # Pillow raises nearly anything for broken files
        where = f"; {file['path']}" if file is not None and file["path"] else ""
        reason = f"{str(err) or type(err).__name__}{where}"
        raise SystemExit(f"{name}: {what} cannot be read ({reason}). Save it anew, or remove the pair.") from err
    if fault := why_read_wrong(facts):
        raise SystemExit(f"{name}: {what} {fault}")
    return picture


def check_alignment(image: Picture, mask: Picture, name: str) -> None:
    """Refuse an image and a mask of different sizes, or that EXIF may have turned differently."""
    turned = image.orientation != mask.orientation
    width, height = mask.image.size
    if image.image.size != (width, height):
        hint = " One of them is turned by its EXIF orientation, the other is not." if turned else ""
        raise SystemExit(
            f"{name} is {image.image.height}x{image.image.width} pixels, its mask {height}x{width}.{hint} Resize "
            "one to the other, masks by nearest neighbour."
        )
    # Equal sizes prove that both are upright if EXIF gives one a quarter turn, unless they are square. Half turns and
    # mirroring do not show in the size.
    if turned and (height == width or not {image.orientation, mask.orientation} & {5, 6, 7, 8}):
        raise SystemExit(
            f"{name} has the EXIF orientation {image.orientation}, its mask {mask.orientation}: whether they lie "
            "on each other cannot be told. Save both upright (`PIL.ImageOps.exif_transpose`)."
        )
