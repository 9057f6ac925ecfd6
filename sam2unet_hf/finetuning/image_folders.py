"""Folders of images and masks: which layouts are read, and which files make a pair."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from sam2unet_hf.finetuning.data_checks import check_paths
from sam2unet_hf.finetuning.processes import exit_on
from sam2unet_hf.pictures import IMAGE_SUFFIXES, MASK_FOLDERS, SCAN_SUFFIXES, find_pictures, first_file


SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
# Names of folders, in any case; the first one that is there is taken.
IMAGE_FOLDERS = ("images", "image", "imgs", "img")


def image_mask_folders(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Return the folders of images and masks by split; without splits they are those of `train`.

    A folder `images` without masks counts as well, so that it is named as wrong; one of another name does not.
    """
    found: dict[str, tuple[Path, Path]] = {}
    for split, names in SPLITS.items():
        for images, masks in folders_of_split(folder, names):
            if split in found:
                raise SystemExit(f"{found[split][0]} and {images} are both of the split {split}. Remove one.")
            found[split] = (images, masks)
    return found or dict(zip(["train"], pair_of_folders(folder), strict=False))


def folders_of_split(folder: Path, names: Sequence[str]) -> Iterator[tuple[Path, Path]]:
    """Find the folders of images and masks of a split: `train/images` and `train/masks`, or the other way round."""
    for name in names:
        if own := subfolder(folder, [name]):
            yield from pair_of_folders(own)
        for images, masks in pair_of_folders(folder):
            if own := subfolder(images, [name]):
                yield own, subfolder(masks, [name]) or masks / own.name


def pair_of_folders(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Find the folders of images and masks in a folder, if they are there."""
    images, masks = subfolder(folder, IMAGE_FOLDERS), subfolder(folder, MASK_FOLDERS)
    if images and (masks or images.name.lower() == "images"):
        yield images, masks or folder / "masks"


def subfolder(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the folder in another that has one of these names, in upper or lower case; the first ones go first."""
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
    for name in names:
        found = [path for path in inside if path.name.lower() == name]
        if len(found) > 1:
            raise SystemExit(f"{found[0]} and {found[1]} differ in upper and lower case alone. Remove one.")
        if found:
            return found[0]
    return None


def describe_layout(source: str | None) -> str:
    """Say how images and masks should lie in a folder, and what lies there; nothing of a source that is no folder."""
    if source is None or not Path(source).is_dir():
        return ""
    folder = Path(source)
    if scan := first_file(folder, SCAN_SUFFIXES):
        return f" {scan} is a scan: name a folder of scans by --brats_dir."
    inside = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    more = f" and {len(inside) - 8} more" if len(inside) > 8 else ""
    has_folders = any(name.endswith("/") for name in inside)
    return (
        f" Images and masks in files are read from {folder / 'images'} and {folder / 'masks'}, or from such a pair of "
        f"folders in {folder / 'train'}, validation and test; the files of a pair have the same name. There are "
        f"{', '.join(inside[:8])}{more}: {'rename the folders' if has_folders else 'move them into such folders'}. "
        "Without masks, images are segmented by a trained model: `python -m sam2unet_hf.pictures`."
    )


def read_data_set(option: str, source: str, config_name: str | None = None) -> Mapping[str, Any]:
    """Read the data set that `option` names, a folder or a Hub id; end the script if there is none."""
    where = "" if Path(source).is_dir() else "there is no such folder, and no such data set could be read: "
    with exit_on(OSError, RuntimeError, ValueError, prefix=f"{option} {source}: {where}"):  # such as a script
        data = datasets.load_dataset(source, config_name)  # nosec B615 # rows, no code
        check_paths(data, source)
    return data


def pair_images_and_masks(image_dir: Path, mask_dir: Path, split: str | None = None) -> datasets.Dataset:
    """Pair the files of two folders by name, without regard to the suffix; `split` is noted in the rows."""
    if not mask_dir.is_dir():
        raise SystemExit(f"{image_dir} has no masks beside it: expected a folder {mask_dir}.")
    with exit_on(ValueError):
        images, masks = find_pictures(image_dir), find_pictures(mask_dir)
    if not images:
        raise SystemExit(f"{image_dir} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    if unpaired := [str(images.get(name) or masks[name]) for name in sorted(images.keys() ^ masks.keys())]:
        more = f" and {len(unpaired) - 5} more" if len(unpaired) > 5 else ""
        raise SystemExit(
            f"{len(unpaired)} files have no partner of the same name: {', '.join(unpaired[:5])}{more}. An image "
            f"{image_dir / 'x.png'} needs a mask {mask_dir / 'x.png'}; x_mask.png is another name, while the ending "
            f"may be any of {', '.join(IMAGE_SUFFIXES)}."
        )
    paths = {"image": list(map(str, images.values())), "mask": [str(masks[name]) for name in images]}
    features = {"image": datasets.Image(), "mask": datasets.Image(), "case_id": datasets.Value("string")}
    columns = {**paths, "case_id": list(images)}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features), split=split)
