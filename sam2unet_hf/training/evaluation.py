"""What an evaluation does with a batch beyond predicting: the loss of each image, and the order of streamed rows."""

from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments

from ..crop_sam2unet import crop
from ..modeling_sam2unet import Sam2UNetForSemanticSegmentation
from .streaming import ParquetRows, RowGroupSampler


def losses_of_images(
    model: Sam2UNetForSemanticSegmentation,
    outputs: Any,
    labels: torch.Tensor | list[torch.Tensor],
    crop_boxes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the loss of each image alone, of shape `(batch_size,)`; as in training, of the window that was cut out.

    Args:
        model: Computes the loss.
        outputs: Its output, with auxiliary logits.
        labels: Label maps of whole images, `(batch_size, height, width)` or a list of `(height, width)`.
        crop_boxes: Where each window lies in its image, of shape `(batch_size, 4)`; whole images by default.
    """
    masks = labels if crop_boxes is None else map(crop, labels, crop_boxes.tolist())
    images = zip(masks, outputs.logits, *outputs.auxiliary_logits, strict=True)
    return torch.stack([model.compute_loss([part[None] for part in image], mask[None]) for mask, *image in images])


def evaluation_order(rows: ParquetRows, args: TrainingArguments) -> np.ndarray:
    """Return the numbers of streamed rows in the order in which an evaluation of all processes sees them."""
    return RowGroupSampler(rows, args.eval_batch_size, args.world_size, args.dataloader_num_workers).order()


def reorder(values: Any, places: np.ndarray) -> Any:
    """Put what an evaluation found of each row, an array, a tuple of them or nothing, into these places."""
    if isinstance(values, tuple):
        return tuple(reorder(value, places) for value in values)
    return values[places] if isinstance(values, np.ndarray) else values
