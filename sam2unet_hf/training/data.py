"""Rows of a data set as inputs of the model: transform and collator."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from transformers import BatchFeature

from ..crop_sam2unet import crop, foreground_box, head_window
from ..image_processing_sam2unet import Sam2UNetImageProcessor
from ..images_sam2unet import to_label_map
from .rows import ImageRows
from .streaming import ParquetRows


class SegmentationTransform:
    """Turn rows of a data set into inputs of the model, for `dataset.with_transform(...)`.

    Args:
        processor: Image processor of the model.
        image_column: Column of the images.
        mask_column: Column of the masks, or `None` for images alone.
        augment: Function of `(image, mask)` that returns both changed alike, such as
            [`~augmentation.augmentation`] or a transform of `torchvision.transforms.v2`; the mask is a
            `tv_tensors.Mask`. Only for training.
        resize_masks: Resize masks with the images, as training does. `False` keeps them at their own size, at which
            the metrics are computed.
        label_mapping: Ids to replace in the masks, such as `{255: 1}` for masks of 0 and 255.
    """

    def __init__(
        self,
        processor: Sam2UNetImageProcessor,
        image_column: str = "image",
        mask_column: str | None = "mask",
        augment: Callable | None = None,
        resize_masks: bool = True,
        label_mapping: Mapping[int, int] | None = None,
    ):
        self.processor = processor
        self.image_column = image_column
        self.mask_column = mask_column
        self.augment = augment
        self.resize_masks = resize_masks
        self.label_mapping = dict(label_mapping or {})
        self._seeds: tuple[int, int] | None = None

    def set_epoch(self, epoch: int, seed: int = 0) -> None:
        """Let the random changes of an image depend on the epoch, the seed and the image alone, from now on.

        [`Sam2UNetTrainer`] calls it before each epoch. A run that goes on from a checkpoint then sees the images that
        it would have seen, however many of them were loaded ahead. Without it they depend on what PyTorch's generator
        drew before.
        """
        self._seeds = (seed, epoch)

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, list[torch.Tensor]]:
        """Return `pixel_values` and, with masks, `labels`, one tensor per row.

        With a window about the head there are also `crop_boxes` and `pixel_mask`, but not for training.
        """
        if self.mask_column is None:
            return {name: list(values) for name, values in self.prepare_images(rows).items()}
        masks = [self.to_label_ids(mask) for mask in rows[self.mask_column]]
        if self.augment is not None:
            rows, masks = self._augment_batch(rows, masks)
        inputs = self.prepare_images(rows, segmentation_maps=masks)
        if self.resize_masks:
            return {name: list(inputs[name]) for name in ("pixel_values", "labels")}
        return {**{name: list(values) for name, values in inputs.items()}, "labels": masks}

    def prepare_images(self, rows: Mapping[str, list[Any]], **kwargs: Any) -> BatchFeature:
        """Return what the image processor makes of a batch of images, and of `segmentation_maps` given beside it.

        With a window about the head it is laid about the `head_box` of each row, if the rows have one.
        """
        if self.processor.head_crop_size is not None and "head_box" in rows:
            kwargs["head_boxes"] = rows["head_box"]
        return self.processor.preprocess(rows[self.image_column], return_tensors="pt", **kwargs)

    def _augment_batch(
        self, rows: Mapping[str, list[Any]], masks: Sequence[torch.Tensor]
    ) -> tuple[dict[str, list[Any]], list[torch.Tensor]]:
        """Return images and masks changed at random, of the window about the head if there is one.

        It is cut out before, because the box of the head would not hold of what is turned and mirrored.
        """
        images = list(rows[self.image_column])
        changed = {self.image_column: images}
        if (size := self.processor.head_crop_size) is not None:
            boxes = rows.get("head_box") or [self._foreground_box(image) for image in images]
            windows = [head_window(box, size["height"], size["width"]) for box in boxes]
            images[:] = [cut(image, window) for image, window in zip(images, windows, strict=True)]
            masks = [crop(mask, window) for mask, window in zip(masks, windows, strict=True)]
            changed["head_box"] = [[0, 0, x_max - x_min, y_max - y_min] for x_min, y_min, x_max, y_max in windows]
        pairs = [self._augment(image, tv_tensors.Mask(mask)) for image, mask in zip(images, masks, strict=True)]
        images[:] = [image for image, _ in pairs]
        return changed, [mask.as_subclass(torch.Tensor) for _, mask in pairs]

    def _foreground_box(self, image: Any) -> list[int]:
        return foreground_box(self.processor.process_image(image, do_convert_rgb=True, do_rescale=True))

    def _augment(self, image: Image.Image, mask: tv_tensors.Mask) -> tuple[Any, torch.Tensor]:
        """Change an image and its mask at random."""
        augment = cast("Callable", self.augment)
        if self._seeds is None:
            return augment(image, mask)
        state = torch.get_rng_state()
        # Of the default generator alone: `torch.manual_seed` would start those of the GPUs anew, too.
        torch.default_generator.manual_seed(zlib.crc32(repr(self._seeds).encode() + np.asarray(image).tobytes()))
        try:
            return augment(image, mask)
        finally:
            torch.set_rng_state(state)

    def to_label_ids(self, mask: Image.Image) -> torch.Tensor:
        """Turn a mask into label ids of shape `(height, width)`."""
        label_map = to_label_map(mask)
        if not self.label_mapping:
            return label_map
        # Looked up in the original ids, so that {1: 2, 2: 1} swaps.
        ids, new_ids = map(torch.tensor, zip(*sorted(self.label_mapping.items()), strict=True))
        places = torch.searchsorted(ids, label_map).clamp(max=len(ids) - 1)
        return torch.where(ids[places] == label_map, new_ids[places], label_map)


def cut(image: Any, window: Sequence[int]) -> Any:
    """Cut a region `[x_min, y_min, x_max, y_max]` out of an image, with 0 where it reaches beyond it."""
    if isinstance(image, Image.Image):
        x_min, y_min, x_max, y_max = window
        return image.crop((x_min, y_min, x_max, y_max))
    return tv_tensors.wrap(crop(image.as_subclass(torch.Tensor), window), like=image)


def collate(examples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, Any]:
    """Batch examples; labels of different sizes stay a list, which the model takes too.

    Args:
        examples: What [`SegmentationTransform`] makes of rows: `pixel_values`, all of one size, and perhaps
            `crop_boxes`, `pixel_mask` and `labels`.
    """
    names = [name for name in ("pixel_values", "crop_boxes", "pixel_mask") if name in examples[0]]
    batch: dict[str, Any] = {name: torch.stack([example[name] for example in examples]) for name in names}
    if "labels" in examples[0]:
        labels = [example["labels"] for example in examples]
        same_size = len({label.shape for label in labels}) == 1
        batch["labels"] = torch.stack(labels) if same_size else labels
    return batch


def transform_of(dataset: Any) -> Any:
    """Return the function given to `dataset.with_transform`, if there is one."""
    if isinstance(dataset, (ParquetRows, ImageRows)):
        return dataset.transform
    return getattr(dataset, "format", {}).get("format_kwargs", {}).get("transform")


__all__ = ["SegmentationTransform", "collate"]
