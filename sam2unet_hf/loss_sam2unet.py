"""The loss of SAM2-UNet: boundary-weighted IoU plus BCE, deeply supervised."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F


# Side of the neighbourhood in pixels, odd, and the weight added where it is all of the other kind (arXiv 2408.08870).
BOUNDARY_KERNEL_SIZE = 31
BOUNDARY_STRENGTH = 5.0


def boundary_weights(labels: torch.Tensor) -> torch.Tensor:
    """Weigh pixels of masks by how much their neighbourhood differs: `1 + 5 * |avgpool31(g) - g|`, 0 outside.

    Source: F3Net's pixel position aware loss (arXiv 1911.11445), as used in arXiv 2408.08870.
    """
    # A box filter is separable: two passes of 31 pixels instead of one of 961.
    size, padding = BOUNDARY_KERNEL_SIZE, BOUNDARY_KERNEL_SIZE // 2
    neighbourhood = F.avg_pool2d(labels, (size, 1), stride=1, padding=(padding, 0))
    neighbourhood = F.avg_pool2d(neighbourhood, (1, size), stride=1, padding=(0, padding))
    return 1 + BOUNDARY_STRENGTH * (neighbourhood - labels).abs()


def structure_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    valid: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    weight_bce: bool = False,
    iou_over_batch: bool = False,
) -> torch.Tensor:
    """Boundary-weighted IoU loss plus binary cross-entropy of one output.

    Per image and region, with probability `p`, mask `g` and weight `w`, the IoU term is
    `1 - (sum(w*p*g) + 1) / (sum(w*(p + g)) - sum(w*p*g) + 1)`; it is averaged over images and regions.

    Args:
        logits: Raw scores of shape `(batch_size, num_regions, height, width)`; no sigmoid applied.
        labels: Masks in [0, 1], floating point, same shape as `logits`.
        valid: 1 where a pixel counts and 0 where it is ignored, broadcastable to `logits`. `None` counts all.
        weights: Result of `boundary_weights(labels)`, to share it between outputs; computed when `None`.
        weight_bce: Weigh the BCE term by the boundary too and normalise it by the sum of weights per image and
            region, as arXiv 2408.08870 writes it. `False` is the plain mean over pixels, which is what the equation of
            doi 10.3390/app15063267 says and what the reference code computes: its `reduce='none'` is read as true.
        iou_over_batch: Take the sums of the IoU term over all images of the batch, per region. An image without a
            region, whose own term is near 1 whatever little is predicted, then teaches by what it adds to the union.
            The batch is the one that the model sees at once: each process and each accumulated step has its own.

    Returns:
        Scalar tensor, float32 for half-precision logits, else in their dtype. Exactly 0 when nothing is valid.

    Raises:
        ValueError: If the shapes differ or `labels` is not floating point.

    Source: https://github.com/WZH0120/SAM2-UNet/blob/01598e5/train.py (`structure_loss`).
    """
    if logits.shape != labels.shape:
        raise ValueError(f"`labels` must have the shape of `logits` {tuple(logits.shape)}, got {tuple(labels.shape)}.")
    if not labels.is_floating_point():
        raise ValueError(
            f"`labels` must be floating point masks in [0, 1], got {labels.dtype}. Call `labels.float()`."
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.to(logits.dtype)
    if valid is not None:
        valid = valid.to(logits.dtype).expand_as(logits)
        labels = labels * valid
    if weights is None:
        weights = boundary_weights(labels)
    if valid is not None:
        weights = weights * valid

    bce = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    if weight_bce:
        bce_loss = ((weights * bce).sum(dim=(2, 3)) / weights.sum(dim=(2, 3)).clamp(min=1)).mean()
    elif valid is not None:
        bce_loss = (valid * bce).sum() / valid.sum().clamp(min=1)
    else:
        bce_loss = bce.mean()

    dims = (0, 2, 3) if iou_over_batch else (2, 3)
    weighted = weights * logits.sigmoid()
    intersection = (weighted * labels).sum(dim=dims)
    total = (weighted + weights * labels).sum(dim=dims)
    iou_loss = 1 - (intersection + 1) / (total - intersection + 1)
    return bce_loss + iou_loss.mean()


def deep_supervision_loss(
    outputs: Sequence[torch.Tensor],
    labels: torch.Tensor,
    *,
    output_weights: Sequence[float],
    valid: torch.Tensor | None = None,
    weight_bce: bool = False,
    iou_over_batch: bool = False,
) -> torch.Tensor:
    """Weighted sum of [`structure_loss`] over the outputs of the model; the boundary weight is computed once.

    Args:
        outputs: Logits of each output, all of the shape of `labels`.
        labels: Masks in [0, 1] of shape `(batch_size, num_regions, height, width)`, floating point.
        output_weights: One weight per output.
        valid: As in `structure_loss`. An ignored pixel counts like one outside the image.
        weight_bce: As in `structure_loss`.
        iou_over_batch: As in `structure_loss`.

    Returns:
        Scalar tensor.

    Raises:
        ValueError: If the shapes differ or there is not one weight per output.
    """
    if len(outputs) != len(output_weights):
        raise ValueError(
            f"`output_weights` must hold one weight per output, got {len(output_weights)} for {len(outputs)}."
        )
    weights = boundary_weights(labels if valid is None else labels * valid)
    options: dict[str, Any] = {"weight_bce": weight_bce, "iou_over_batch": iou_over_batch}
    losses = [
        weight * structure_loss(logits, labels, valid=valid, weights=weights, **options)
        for logits, weight in zip(outputs, output_weights, strict=True)
    ]
    return torch.stack(losses).sum()


__all__ = ["deep_supervision_loss", "structure_loss"]
