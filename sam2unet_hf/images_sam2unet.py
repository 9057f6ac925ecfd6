"""Images and masks of any kind as tensors."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import ChannelDimension


def count_channels(modalities: Sequence[str] | None, neighbours: int = 0) -> int:
    """Return how many channels images of these modalities have, each with as many slices below and above.

    One modality alone is a grey image, which is repeated to the three channels that SAM 2 was trained with.
    """
    count = len(modalities or [""]) * (2 * neighbours + 1)
    return 3 if count == 1 else count


def to_list(images: Any) -> list[Any]:
    """Return as a list one image, a list of them, or a 4-D array, which is a batch of them."""
    is_batch = isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4
    return list(images) if is_batch or isinstance(images, (list, tuple)) else [images]


def to_channels_first(
    image: np.ndarray | torch.Tensor, input_data_format: str | ChannelDimension | None = None, num_channels: int = 3
) -> torch.Tensor:
    """Turn an array `(height, width)`, or with channels first or last, into `(channels, height, width)`.

    It may have one channel or `num_channels`, and four where these are three, the fourth being alpha.
    """
    if isinstance(image, np.ndarray) and image.dtype.kind in "biuf":
        # Copy, because torch can hold neither big-endian values nor negative strides, and warns of read-only ones.
        image = torch.from_numpy(np.array(image, dtype=image.dtype.newbyteorder("="), order="C"))
    if not isinstance(image, torch.Tensor) or image.is_complex():
        got = f"{image.dtype} values" if isinstance(image, (np.ndarray, torch.Tensor)) else type(image).__name__
        raise ValueError(f"Images must be PIL images, NumPy arrays or torch tensors of real numbers, got {got}.")
    if image.ndim == 2 and image.numel():
        return image[None]
    counts = (1, 3, 4) if num_channels == 3 else (1, num_channels)
    axes = {None: (0, -1), ChannelDimension.FIRST: (0,), ChannelDimension.LAST: (-1,)}
    layout = None if input_data_format is None else ChannelDimension(input_data_format)
    for axis in axes[layout]:
        if image.ndim == 3 and image.numel() and image.shape[axis] in counts:
            return image.movedim(axis, 0)
    raise ValueError(
        "An image must have shape (height, width), (channels, height, width) or (height, width, channels) with "
        f"{', '.join(map(str, counts[:-1]))} or {counts[-1]} channels and at least one pixel, got "
        f"{tuple(image.shape)}."
    )


def to_byte_range(image: torch.Tensor, white_level: int | None = None) -> torch.Tensor:
    """Bring an image of any type to values in 0..255; uint8 stays as it is, everything else becomes float32.

    Other integers are taken as 0..`white_level`; without it as 0..65535 if they are unsigned 16-bit or one is over
    255, else as 0..255. Floats are taken as 0..1 if none is over 1, else as 0..255.
    """
    if image.dtype == torch.uint8:
        return image
    if image.dtype == torch.bool:
        return image.float() * 255
    values = image.float()
    low, high = values.min().item(), values.max().item()
    limit = 255 if image.is_floating_point() else white_level or 65535
    # Ask for what must hold, because a comparison with NaN is false.
    if not (low >= 0 and high <= limit):
        kind = f"integer images in 0..{limit}"
        if image.is_floating_point():
            kind = "float images must be finite and in 0..1 or 0..255"
        raise ValueError(
            f"`images` must be non-negative; {kind}, got {image.dtype} with values from {low:g} to {high:g}. Scale "
            "scans first (`sam2unet_hf.scans_sam2unet` does it for BraTS), or pass `do_rescale=False` if they are "
            "normalised."
        )
    if image.is_floating_point():
        if 1 < high < 2:
            warnings.warn(
                f"A float image has values up to {high:g}, which are taken as parts of 255, so that it will be nearly "
                "black. Clip it to 1, or scale it to 0..255.",
                stacklevel=2,
            )
        return values * 255 if high <= 1 else values
    if white_level is None and image.dtype != torch.uint16 and high <= 255:
        return values
    if white_level is None and 0 < high < 4096:
        warnings.warn(
            f"A 16-bit image uses only values up to {high:g} of 65535 and will be nearly black. Say which value is "
            "white, such as by `processor.white_level = 4095` for 12 bits, as in the training of the model.",
            stacklevel=2,
        )
    return values / (limit / 255)


def warn_of_lost_bits(picture: Image.Image) -> None:
    """Warn of a grey picture of mode RGB that is mostly white where it is not black.

    So is one of 16 bits whose values were cut at 255, as the image segmentation pipeline of transformers does.
    """
    if picture.mode != "RGB":
        return
    red, green, blue = (np.asarray(channel) for channel in picture.split())
    bright, white = int((red > 0).sum()), int((red == 255).sum())
    if 2 * white > bright and np.array_equal(red, green) and np.array_equal(red, blue):
        warnings.warn(
            f"Of a grey picture {white / bright:.0%} of what is not black is white, as if 16 bits had been cut to 8, "
            "which the image segmentation pipeline of transformers does. Pass `pipeline_class=Sam2UNetImagePipeline` "
            "to `pipeline`, or give the picture itself to the image processor.",
            stacklevel=2,
        )


def to_label_map(segmentation_map: Any) -> torch.Tensor:
    """Turn a picture or array of label ids, with one channel or three equal ones, into int64 `(height, width)`."""
    layout = None
    if isinstance(segmentation_map, Image.Image):
        mode = segmentation_map.mode
        if mode in ("CMYK", "HSV", "LAB", "YCbCr"):
            raise ValueError(
                f"A segmentation map must have one channel of label ids, got a picture of mode {mode}. Save it as L."
            )
        segmentation_map, layout = np.array(segmentation_map), ChannelDimension.LAST
        if mode in ("LA", "La", "PA"):
            segmentation_map = segmentation_map[..., 0]
    label_map = to_channels_first(segmentation_map, layout)
    # Compare the colours only, because alpha may differ.
    if not bool((label_map[1:3] == label_map[:1]).all()):
        raise ValueError(
            "A segmentation map must have one channel of label ids, got colours. Map colours to ids first."
        )
    # Ask for what must hold, because a comparison with NaN is false.
    is_float = label_map.is_floating_point()
    if is_float and not bool(((label_map == label_map.round()) & (label_map.abs() < 2**31)).all()):
        raise ValueError(
            "A segmentation map must hold whole label ids, got fractions, values beyond 2**31 or non-finite ones. Was "
            "it resized or normalised?"
        )
    return label_map[0].long()


def to_label_maps(segmentation_maps: Any, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Turn one mask, a list or an array of them into one int64 tensor `(height, width)` per image."""
    maps = to_list(segmentation_maps)
    if len(maps) == 1 and len(images) > 1 and isinstance(maps[0], (np.ndarray, torch.Tensor)) and maps[0].ndim == 3:
        maps = list(maps[0])
    label_maps = [to_label_map(item) for item in maps]
    if len(label_maps) != len(images):
        raise ValueError(
            f"`segmentation_maps` must hold one map per image, got {len(label_maps)} for {len(images)} images."
        )
    for index, (image, label_map) in enumerate(zip(images, label_maps, strict=True)):
        if image.shape[-2:] != label_map.shape:
            raise ValueError(
                f"`segmentation_maps[{index}]` has size {tuple(label_map.shape)} where its image has "
                f"{tuple(image.shape[-2:])}. Resize one to the other, masks by nearest neighbour."
            )
    return label_maps
