"""Segment pictures on the command line, a folder of them or some, without masks.

python -m sam2unet_hf.pictures runs/my_data pictures -o segmentations
"""

import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from .command_line import ModelParser, make_output_dir
from .devices import default_device, device_name
from .image_processing_sam2unet import Sam2UNetImageProcessor
from .modeling_sam2unet import Sam2UNetForSemanticSegmentation


logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
SCAN_SUFFIXES = (".nii", ".nii.gz")
# Names of folders of masks, in any case.
MASK_FOLDERS = ("masks", "mask", "labels", "label", "annotations", "annotation", "segmentations", "segmentation", "gt")
FOR_SCANS = "Segment scans by `python -m sam2unet_hf.volume`."


class PictureFacts(NamedTuple):
    """What the file of a picture says of itself."""

    format: str | None
    orientation: int  # of EXIF; 1 is upright
    pages: int


def first_file(path: str | os.PathLike, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> Path | None:
    """Return the first file that ends in one of the suffixes, in lower or upper case, or `None`.

    Args:
        path: A folder, which is looked for with its subfolders, or a file, which is taken itself.
        suffixes: In lower case; by default those of pictures.
    """
    files = [Path(path)] if Path(path).is_file() else sorted(Path(path).rglob("*"))
    return next((file for file in files if file.name.lower().endswith(suffixes) and file.is_file()), None)


def find_pictures(folder: Path) -> dict[str, Path]:
    """Find the pictures in a folder and its subfolders.

    Args:
        folder: The folder; hidden files in it do not count, and others that are no pictures are warned of.

    Returns:
        The files by their path in the folder without suffix, in order.

    Raises:
        ValueError: If two have the same name, or one is no file.
    """
    pictures: dict[str, Path] = {}
    others = []
    for path in [path for path in sorted(folder.rglob("*")) if not path.name.startswith(".")]:
        name = path.relative_to(folder).with_suffix("").as_posix()
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            others += [path] if path.is_file() else []
        elif not path.is_file():  # opening a pipe would wait forever
            raise ValueError(f"{path} is not a file, or a link to none. Remove it.")
        elif name in pictures:
            raise ValueError(f"{pictures[name]} and {path} have the same name. Remove one.")
        else:
            pictures[name] = path
    if others:
        logger.warning("%d files in %s are no images, such as %s: not read.", len(others), folder, others[0])
    return pictures


def inspect_picture(content: bytes) -> PictureFacts:
    """Read what the file of a picture says of itself; raise what Pillow raises, also for a decompression bomb."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content)) as opened:
            # The other images of an MPO are previews.
            pages = getattr(opened, "n_frames", 1) if opened.format != "MPO" else 1
            return PictureFacts(opened.format, opened.getexif().get(ExifTags.Base.Orientation, 1), pages)


def why_read_wrong(facts: PictureFacts) -> str | None:
    """Say why a picture would be read wrong or in part, and what to do, if it would."""
    if facts.format == "TIFF" and facts.orientation in (5, 6, 7, 8):
        # Pillow 12 reads their rows with a wrong length from a path.
        return f"is a TIFF with the EXIF orientation {facts.orientation}. Save it upright, as PNG."
    if facts.pages > 1:
        return f"has {facts.pages} pages, of which one would be read. Save them as files."
    return None


def read_picture(path: Path) -> Image.Image:
    """Read a picture and turn it upright, as EXIF says.

    Args:
        path: The file.

    Raises:
        ValueError: If it cannot be read, or would be read wrong or in part.
    """
    try:
        content = path.read_bytes()
        if fault := why_read_wrong(inspect_picture(content)):
            raise ValueError(f"{path} {fault}")
        return ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as err:
        raise ValueError(f"{path} has more than {Image.MAX_IMAGE_PIXELS} pixels, Pillow's limit. Cut it up.") from err
    except UnidentifiedImageError as err:
        start = content[:8].decode("latin-1")
        raise ValueError(
            f"{path} is no image ({f'it starts with {ascii(start)}' if start else 'it is empty'}). Remove it, or save "
            "it anew."
        ) from err
    except Exception as err:  # Pillow raises nearly anything for broken files
        if isinstance(err, ValueError) and str(path) in str(err):
            raise
        raise ValueError(f"{path} cannot be read ({str(err) or type(err).__name__}). Save it anew.") from err


@torch.inference_mode()
def segment_pictures(
    model: Sam2UNetForSemanticSegmentation,
    processor: Sam2UNetImageProcessor,
    paths: Sequence[Path],
    batch_size: int = 8,
) -> Iterator[tuple[Path, np.ndarray | ValueError]]:
    """Segment the files of pictures.

    Args:
        model: The model, on the device where it shall run.
        processor: Its image processor, with the regions of the model.
        paths: The files, of any sizes.
        batch_size: Pictures at once.

    Yields:
        The path, and label ids of shape `(height, width)`, int64, of the picture as EXIF turns it; or what is wrong
        with one that cannot be segmented.
    """
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        faults: dict[Path, ValueError] = {}
        inputs, sizes = [], []
        for path in batch:
            try:
                picture = read_picture(path)
                inputs.append(processor(picture, return_tensors="pt"))
                sizes.append((picture.height, picture.width))
            except ValueError as err:
                faults[path] = err if str(path) in str(err) else ValueError(f"{path}: {err}")
        label_maps: list[torch.Tensor] = []
        if inputs:
            joined = {name: torch.cat([one[name] for one in inputs]).to(model.device) for name in inputs[0]}
            joined["pixel_values"] = joined["pixel_values"].to(model.dtype)
            label_maps = processor.post_process_semantic_segmentation(model.eval()(**joined), target_sizes=sizes)
        found = iter(label_maps)
        for path in batch:
            yield path, faults[path] if path in faults else next(found).cpu().numpy()


def write_label_map(label_map: np.ndarray, path: Path) -> None:
    """Write label ids as a grey PNG of 8 bits, or of 16 if an id is above 255; make its folder.

    Args:
        label_map: Ids from 0 to 65535, of shape `(height, width)`.
        path: The file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.uint8 if label_map.max() < 256 else np.uint16
    Image.fromarray(label_map.astype(dtype)).save(path)


def _pass_over_masks(pictures: dict[str, Path], folder: Path) -> dict[str, Path]:
    """Leave out the pictures in folders of masks, if there are others."""
    kept = {
        name: path
        for name, path in pictures.items()
        if not {part.lower() for part in PurePosixPath(name).parent.parts} & set(MASK_FOLDERS)
    }
    if not kept or len(kept) == len(pictures):
        return pictures
    first = next(path for name, path in pictures.items() if name not in kept)
    logger.warning(
        "%d pictures in %s are masks by their folders, such as %s: not segmented. Name the folder of masks itself to "
        "segment them.",
        *(len(pictures) - len(kept), folder, first),
    )
    return kept


def _name_pictures(paths: Sequence[Path], output_dir: Path) -> dict[str, Path]:
    """Return the pictures of folders and files by what their results will be called."""
    pictures: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} does not exist. Pass a folder of pictures, or pictures.")
        if path.is_dir() and output_dir.resolve().is_relative_to(path.resolve()):
            raise ValueError(
                f"--output_dir {output_dir} lies in {path}, so that the results would be taken for pictures the next "
                "time. Name a folder outside of it."
            )
        if not first_file(path) and (scan := first_file(path, SCAN_SUFFIXES)):
            inside = f", and {path} holds no pictures" if path.is_dir() else ""
            raise ValueError(f"{scan} is a scan{inside}. {FOR_SCANS}")
        found = _pass_over_masks(find_pictures(path), path) if path.is_dir() else {path.stem: path}
        if not found:
            raise ValueError(f"{path} holds no pictures ({', '.join(IMAGE_SUFFIXES)}).")
        if twice := sorted(found.keys() & pictures.keys()):
            raise ValueError(
                f"{pictures[twice[0]]} and {found[twice[0]]} would be written to the same file. Segment them into two "
                "folders."
            )
        pictures |= found
    results = {(output_dir / f"{name}.png").resolve() for name in pictures}
    if replaced := sorted(file for file in pictures.values() if file.resolve() in results):
        raise ValueError(f"--output_dir {output_dir}: {replaced[0]} would be replaced by a result. Name another.")
    return pictures


def _load(name: str, device: str | None) -> tuple[Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor]:
    """Load a model that segments pictures, and its processor."""
    model = Sam2UNetForSemanticSegmentation.from_pretrained(name, dtype=torch.float32)
    processor = Sam2UNetImageProcessor.from_pretrained(name)
    processor.regions = model.config.regions
    if processor.num_channels != 3 or processor.neighbours:
        made_of = ", ".join(processor.modalities or ["unknown modalities"])
        raise ValueError(
            f"The model takes images of {processor.num_channels} channels ({made_of}, {processor.neighbours} "
            f"neighbouring slices on each side), and no pictures. {FOR_SCANS}"
        )
    return model.to(device or default_device()), processor


def count_pixels(label_map: np.ndarray, regions: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the size of each region in pixels."""
    return {name: int(np.isin(label_map, label_ids).sum()) for name, label_ids in regions.items()}


def main(argv: list[str] | None = None, prog: str = "python -m sam2unet_hf.pictures") -> None:
    """Segment pictures; write label ids as PNG, and print the size of each region, as a line of JSON per picture."""
    parser = ModelParser(
        "picture",
        prog=prog,
        description="Segment pictures, and write label ids as PNG, which most viewers show as nearly black.",
    )
    parser.add_argument("model", help="Hub id or folder of a SAM2-UNet")
    parser.add_argument("picture", nargs="+", type=Path, help="folder of pictures, with its subfolders, or a picture")
    parser.add_argument("-o", "--output_dir", type=Path, required=True, help="folder for NAME.png")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures at once")
    parser.add_argument("--device", type=device_name, help="such as cpu or cuda:1; default: a GPU if there is one")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch_size must be at least 1, got {args.batch_size}")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        pictures = _name_pictures(args.picture, args.output_dir)
    except (OSError, ValueError) as err:
        raise SystemExit(str(err)) from err
    make_output_dir(args.output_dir)
    try:
        model, processor = _load(args.model, args.device)
    except (OSError, ValueError) as err:
        raise SystemExit(str(err) if args.model in str(err) else f"{args.model}: {err}") from err
    names = ", ".join(f"{label_id} {name}" for label_id, name in sorted((model.config.id2label or {}).items()))
    logger.info("%d pictures. Label ids: %s.", len(pictures), names)
    failed = 0
    results = segment_pictures(model, processor, list(pictures.values()), args.batch_size)
    for name, (path, found) in zip(pictures, tqdm(results, total=len(pictures), unit="picture"), strict=True):
        if isinstance(found, ValueError):  # go on with the others
            logger.error("Left out: %s", found)
            failed += 1
            continue
        target = args.output_dir / f"{name}.png"
        try:
            write_label_map(found, target)
        except OSError as err:  # a full disk
            raise SystemExit(f"{target} could not be written: {err}") from err
        line = {"picture": str(path), "segmentation": str(target), "pixels": count_pixels(found, model.config.regions)}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
    if failed:
        raise SystemExit(f"{failed} of {len(pictures)} pictures could not be segmented, see above.")


__all__ = ["find_pictures", "read_picture", "segment_pictures", "write_label_map"]


if __name__ == "__main__":
    main()
