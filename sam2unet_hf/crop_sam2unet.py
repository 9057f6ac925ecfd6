"""The window about the head: where it lies, cutting it out of a slice, and putting maps of it back.

Boxes are `[x_min, y_min, x_max, y_max]` in pixels, half-open: `x_max` and `y_max` are the first that lie outside.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F


# What logits become outside the head: a probability of exactly 0 in float32, a number in float16 and bfloat16 too.
OUTSIDE_LOGIT = -110.0


def foreground_box(image: torch.Tensor) -> list[int]:
    """Return the box of the pixels of an image `(channels, height, width)` that are not 0 in each channel.

    Without such pixels it is the empty box in the middle of the image.
    """
    foreground = image.any(dim=0).bool()  # of bytes many times faster than `image != 0`
    if not foreground.any():
        middle = [foreground.shape[1] // 2, foreground.shape[0] // 2]
        return middle * 2
    box = []
    for dim in (0, 1):
        marked = foreground.any(dim=dim).nonzero().flatten()
        box.append((int(marked[0]), int(marked[-1]) + 1))
    (x_min, x_max), (y_min, y_max) = box
    return [x_min, y_min, x_max, y_max]


def check_head_boxes(head_boxes: Iterable[Sequence[int]] | None, images: Sequence[torch.Tensor]) -> list[list[int]]:
    """Return the boxes of the head in images `(channels, height, width)`, by default those of their foreground.

    Raises:
        ValueError: If there is not one box per image, or a box does not lie in its image.
    """
    head_boxes = map(foreground_box, images) if head_boxes is None else head_boxes
    boxes = [[int(side) for side in box] for box in head_boxes]
    if len(boxes) != len(images):
        raise ValueError(f"`head_boxes` must hold one box per image, got {len(boxes)} for {len(images)} images.")
    for index, (box, image) in enumerate(zip(boxes, images, strict=True)):
        height, width = image.shape[-2:]
        if len(box) != 4 or not (0 <= box[0] <= box[2] <= width and 0 <= box[1] <= box[3] <= height):
            raise ValueError(
                f"`head_boxes[{index}]` must be [x_min, y_min, x_max, y_max] in pixels of its image of {height}x"
                f"{width} (height x width), got {box}."
            )
    return boxes


def head_mask(window: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return which pixels of a window lie in the head, as booleans of its `size`, from the region that it shows.

    Those are what lies between the first and the last pixel that is not 0 of its row, and of its column, so that dark
    spots within the head belong to it. Where the region `(channels, height, width)` is larger than the window, a pixel
    belongs to the head if all that it stands for does; so logits that are `OUTSIDE_LOGIT` outside the mask are
    negative outside the head after [`uncrop`].
    """
    foreground = window.any(dim=0).bool()
    inside = torch.ones_like(foreground)
    for dim in (0, 1):
        count = foreground.cumsum(dim, dtype=torch.int32)
        # One at or before the pixel, and one at or after it.
        inside &= (count > 0) & (count - foreground.int() < count.amax(dim, keepdim=True))
    if inside.shape != size:
        inside = F.adaptive_max_pool2d((~inside)[None].float(), size)[0] == 0
    return inside


def head_window(head_box: Sequence[int], height: int, width: int) -> list[int]:
    """Return the region of a slice that a window of this size shows: centred on the head, which it holds.

    It is of the size of the window where the head fits in, else the smallest of the window's aspect ratio, up to less
    than a pixel, that holds the head. It may reach beyond the slice.
    """
    x_min, y_min, x_max, y_max = head_box
    head_height, head_width = y_max - y_min, x_max - x_min
    if head_width > width or head_height > height:
        if head_width * height > head_height * width:
            height, width = -(-head_width * height // width), head_width
        else:
            height, width = head_height, -(-head_height * width // height)
    left, top = (x_min + x_max - width) // 2, (y_min + y_max - height) // 2
    return [left, top, left + width, top + height]


def crop(maps: torch.Tensor, crop_box: Sequence[int]) -> torch.Tensor:
    """Cut a region out of maps `(..., height, width)`, as a copy, with 0 where it reaches beyond them."""
    x_min, y_min, x_max, y_max = crop_box
    height, width = maps.shape[-2:]
    # Padding by a negative number of pixels takes them away.
    return F.pad(maps, (-x_min, x_max - width, -y_min, y_max - height))


def uncrop(
    maps: torch.Tensor, crop_box: Sequence[int] | torch.Tensor, size: tuple[int, int], fill: float
) -> torch.Tensor:
    """Put maps of a window back on the slice that it was cut out of.

    Args:
        maps: Maps of the window of shape `(channels, height, width)`, such as logits; floating point where the region
            was scaled down to the window, because they are scaled up again (bilinear).
        crop_box: The region of the window, as `crop_boxes` of the image processor gives it for each image.
        size: Height and width of the slice.
        fill: What is outside the region: `OUTSIDE_LOGIT` for logits, 0 for probabilities.

    Returns:
        Maps of shape `(channels, *size)`.
    """
    x_min, y_min, x_max, y_max = map(int, crop_box)
    region = (y_max - y_min, x_max - x_min)
    if maps.shape[-2:] != region:
        maps = F.interpolate(maps[None], size=region, mode="bilinear")[0]
    height, width = map(int, size)
    return F.pad(maps, (x_min, width - x_max, y_min, height - y_max), value=fill)


__all__ = ["OUTSIDE_LOGIT", "uncrop"]
