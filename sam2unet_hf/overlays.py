"""Pictures of images with the outlines of regions on them, drawn with NumPy alone, and which images to show."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image

from .cases_sam2unet import patient_of


# A colour per region that the colour-blind can tell apart too (Okabe and Ito): vermilion, sky blue, yellow, bluish
# green, reddish purple.
COLOURS = ((213, 94, 0), (86, 180, 233), (240, 228, 66), (0, 158, 115), (204, 121, 167))
GAP = 4  # pixels between two panels


def column_to_show(columns: Sequence[str]) -> str:
    """Return the column of an image that pictures show, of several modalities FLAIR, else the first."""
    return "flair" if "flair" in columns else columns[0]


def image_to_show(image: Image.Image | torch.Tensor, columns: Sequence[str]) -> np.ndarray:
    """Return what pictures show of an image that was made of these columns.

    Args:
        image: A picture, or a tensor with a channel per column, of shape `(columns, height, width)`.
        columns: The names of the columns.

    Returns:
        Grey values `(height, width)` of a grey picture and of the column to show, else colours `(height, width, 3)`,
        uint8.
    """
    if isinstance(image, torch.Tensor):
        return image[list(columns).index(column_to_show(columns))].numpy()
    if image.mode == "L" or image.mode.startswith(("I", "F")):
        return np.asarray(image)
    colours = np.asarray(image.convert("RGB"))
    return colours[..., 0] if (colours == colours[..., :1]).all() else colours


def to_rgb(image: np.ndarray) -> np.ndarray:
    """Return an image as colours of shape `(height, width, 3)`, uint8; grey values other than uint8 by their range.

    Args:
        image: As `image_to_show` returns it.
    """
    if image.dtype != np.uint8:
        low, high = float(image.min()), float(image.max())
        image = ((image.astype(np.float64) - low) * (255 / ((high - low) or 1))).round().astype(np.uint8)
    return image.copy() if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)


def outline(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of a mask `(height, width)` that touch what is outside of it, or the edge of the image."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside


def draw_outlines(
    image: np.ndarray, label_map: np.ndarray, regions: Mapping[str, Sequence[int]], scale: int = 1
) -> np.ndarray:
    """Draw the outline of each region on an image, a pixel wide, large regions first.

    Args:
        image: As `image_to_show` returns it.
        label_map: Label ids of shape `(height, width)`.
        regions: Region name -> the label ids it joins; the n-th has the n-th of `COLOURS`.
        scale: Whole number of times that the picture is enlarged, so that a line hides less of a small image.

    Returns:
        Colours of shape `(scale * height, scale * width, 3)`, uint8.
    """
    picture = to_rgb(image).repeat(scale, axis=0).repeat(scale, axis=1)
    large_first = sorted(enumerate(regions.values()), key=lambda item: -len(item[1]))
    for index, label_ids in large_first:
        mask = np.isin(label_map, list(label_ids)).repeat(scale, axis=0).repeat(scale, axis=1)
        picture[outline(mask)] = COLOURS[index % len(COLOURS)]
    return picture


def choose_slices(case_ids: Sequence[str], tumour_pixels: Sequence[int], count: int) -> list[int]:
    """Choose slices to look at, the same ones each time: of some patients the slice that shows most of the tumour.

    Args:
        case_ids: The case of each slice.
        tumour_pixels: The size of the tumour in each.
        count: How many slices at most.

    Returns:
        Numbers of slices, a patient each, from the one with the largest such slice to the one with the smallest.
    """
    largest: dict[str, int] = {}
    for number, case in enumerate(case_ids):
        patient = patient_of(case)
        if tumour_pixels[number] > tumour_pixels[largest.setdefault(patient, number)]:
            largest[patient] = number
    return evenly_spread(sorted(largest.values(), key=lambda number: (-tumour_pixels[number], number)), count)


def evenly_spread(numbers: Sequence[int], count: int) -> list[int]:
    """Return at most this many of some numbers, the first and the last of them and others evenly between."""
    places = np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int)
    return [numbers[place] for place in places.tolist()]


def choose_scale(height: int, width: int, least_pixels: int = 256) -> int:
    """Return the least whole number of times that an image is enlarged to have this many pixels on its longer side."""
    return -(-least_pixels // max(height, width))


def side_by_side(panels: Sequence[np.ndarray]) -> np.ndarray:
    """Put pictures beside each other, on white.

    Args:
        panels: Of shape `(height, width, 3)` and any height, uint8.
    """
    height = max(len(panel) for panel in panels)
    width = sum(panel.shape[1] for panel in panels) + GAP * (len(panels) - 1)
    picture = np.full((height, width, 3), 255, np.uint8)
    left = 0
    for panel in panels:
        picture[: len(panel), left : left + panel.shape[1]] = panel
        left += panel.shape[1] + GAP
    return picture


def stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Put pictures below each other, on white.

    Args:
        rows: Of shape `(height, width, 3)` and any width, uint8.
    """
    return np.ascontiguousarray(side_by_side([row.transpose(1, 0, 2) for row in rows]).transpose(1, 0, 2))


__all__ = ["COLOURS", "choose_slices", "draw_outlines", "image_to_show", "side_by_side", "stacked"]
