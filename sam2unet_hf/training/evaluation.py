"""What an evaluation does beyond predicting: the loss of each image, the order of streamed rows, and the precision."""

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, TrainingArguments

from ..crop_sam2unet import crop
from ..modeling_sam2unet import Sam2UNetForSemanticSegmentation
from .streaming import ParquetRows, RowGroupSampler


def computes_own_loss(model: Any) -> bool:
    """Whether a model computes its loss from outputs as SAM2-UNet does, so that each image can have its own."""
    return isinstance(model, PreTrainedModel) and hasattr(model, "compute_loss")


def losses_of_images(
    model: Sam2UNetForSemanticSegmentation,
    outputs: Any,
    labels: torch.Tensor | list[torch.Tensor],
    crop_boxes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the loss of each image alone, of shape `(batch_size,)`; as in training, of the window that was cut out.

    Args:
        model: Computes the loss.
        outputs: Its output, with auxiliary logits if it has such.
        labels: Label maps of whole images, `(batch_size, height, width)` or a list of `(height, width)`.
        crop_boxes: Where each window lies in its image, of shape `(batch_size, 4)`; whole images by default.
    """
    masks = labels if crop_boxes is None else map(crop, labels, crop_boxes.tolist())
    images = zip(masks, outputs.logits, *(outputs.auxiliary_logits or ()), strict=True)
    return torch.stack([model.compute_loss([part[None] for part in image], mask[None]) for mask, *image in images])


def evaluation_order(rows: ParquetRows, args: TrainingArguments) -> np.ndarray:
    """Return the numbers of streamed rows in the order in which an evaluation of all processes sees them."""
    return RowGroupSampler(rows, args.eval_batch_size, args.world_size, args.dataloader_num_workers).order()


def reorder(values: Any, places: np.ndarray) -> Any:
    """Put what an evaluation found of each row, an array, a tuple of them or nothing, into these places."""
    if isinstance(values, tuple):
        return tuple(reorder(value, places) for value in values)
    return values[places] if isinstance(values, np.ndarray) else values


class MixedPrecision:
    """What accelerate adds to a model for mixed precision, once: taken away for scores, and put back for training."""

    def __init__(self) -> None:
        self._taken: tuple[torch.nn.Module, dict[str, Any]] | None = None

    def leave(self, model: torch.nn.Module, accelerator: Accelerator) -> None:
        """Let a model compute as `from_pretrained` loads it."""
        module = accelerator.unwrap_model(model, keep_torch_compile=False)
        before = dict(vars(module))
        accelerator.unwrap_model(module, keep_fp32_wrapper=False)
        now = vars(module)
        if taken := {name: value for name, value in before.items() if now.get(name) is not value}:
            self._taken = module, taken

    def put_back(self) -> None:
        """Undo `leave`."""
        if self._taken is not None:
            module, taken = self._taken
            vars(module).update(taken)
            self._taken = None
