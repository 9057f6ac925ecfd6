"""The metrics of `sam2unet_hf.metrics` for the Trainer, at the masks' own resolution."""

import difflib
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from transformers import EvalPrediction, TrainingArguments

from ..metrics.functional import METRICS, num_columns, score
from ..metrics.segmentation_metric import Accumulator
from ..modeling_sam2unet import Sam2UNetForSemanticSegmentation


class SegmentationMetrics:
    """All metrics of `sam2unet_hf.metrics`, for the `compute_metrics` of [`Sam2UNetTrainer`].

    Scores come batch by batch (`batch_eval_metrics=True`) or all at once. Their sums are exact, so the averages depend
    neither on the batch size nor on the number of processes.

    Args:
        regions: Names of the regions in the order of the channels.
        zero_division: Dice, IoU, F and weighted F where mask and prediction are both empty. 1 as in BraTS; 0 as in
            `py_sod_metrics` and in the modules of `sam2unet_hf.metrics`.
        normalize: `"minmax"` stretches each prediction to [0, 1] first, as papers on SAM2-UNet do.

    The result also holds `loss`, the mean over images of the loss of each alone.

    Attributes:
        image_dice: Dice at probability > 0.5 of the last evaluation, of shape `(images, regions)`, in the order of the
            data set.
    """

    def __init__(self, regions: Sequence[str], zero_division: float = 1.0, normalize: Literal["minmax"] | None = None):
        self.regions = list(regions)
        self.zero_division = zero_division
        self.normalize = normalize
        self.reset()

    def reset(self) -> None:
        """Forget the images of an evaluation, which may not have come to its end."""
        self.image_dice = np.zeros((0, len(self.regions)))
        self._accumulator = Accumulator()
        self._image_dice: list[np.ndarray] = []
        self._losses: list[float] = []

    def names(self) -> list[str]:
        """Return the keys of the result: each metric over all regions, and per region with its name behind it."""
        accumulator = Accumulator()
        accumulator.add(np.zeros((len(self.regions), sum(map(num_columns, METRICS)))))
        return list(accumulator.result(self.regions))

    def score(
        self, logits: torch.Tensor, labels: torch.Tensor | list[torch.Tensor], model: Sam2UNetForSemanticSegmentation
    ) -> np.ndarray:
        """Score a batch at the resolution of its masks.

        Args:
            logits: Raw scores of shape `(batch_size, regions, height, width)`; resized to each mask.
            labels: Label maps of shape `(batch_size, height, width)`, or a list of `(height, width)` maps. Pixels of
                `ignore_index` do not count.
            model: Knows the regions and `ignore_index`.

        Returns:
            Array of shape `(batch_size, regions, columns)`, see [`~metrics.functional.score`].
        """
        scores = []
        for image_logits, label_map in zip(logits, labels, strict=True):
            masks, valid = model.region_masks(label_map[None])
            at_mask = F.interpolate(image_logits[None].float(), size=label_map.shape, mode="bilinear")
            probability, mask, counted = (x[0].cpu().numpy() for x in (at_mask.sigmoid(), masks.bool(), valid[:, 0]))
            options: dict[str, Any] = {"zero_division": self.zero_division, "normalize": self.normalize}
            scores.append(score(probability, mask, valid_mask=counted, **options))
        return np.stack(scores)

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Add scores; return the averages, and start anew, if these were the last ones.

        Args:
            prediction: With the scores of the images as `predictions` and their losses as `label_ids`.
            compute_result: Whether these were the last ones.
        """
        for scores in np.asarray(prediction.predictions):
            self._accumulator.add(scores)
            self._image_dice.append(scores[:, 0])  # of the first metric, Dice, at probability > 0.5
        self._losses.extend(np.asarray(prediction.label_ids).tolist())
        if not compute_result:
            return {}
        image_dice = np.stack(self._image_dice)
        # The exact sum, which does not depend on the order either.
        result = {"loss": math.fsum(self._losses) / len(self._losses), **self._accumulator.result(self.regions)}
        self.reset()
        self.image_dice = image_dice
        return result


def check_best_metric(args: TrainingArguments, names: list[str], eval_dataset: Any) -> None:
    """Raise a `ValueError` if `metric_for_best_model` does not exist, which transformers finds out after an epoch."""
    best = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if isinstance(eval_dataset, dict):
        names = [f"{dataset}_{name}" for dataset in eval_dataset for name in names]
        best = best if args.metric_for_best_model else names[0]
    if best not in names:
        close = difflib.get_close_matches(best, names, n=3, cutoff=0.4)
        raise ValueError(
            f"`metric_for_best_model` must be a score such as {', '.join(close or names[:5])}, got {best}."
        )
    prefixes = [f"{dataset}_" for dataset in eval_dataset] if isinstance(eval_dataset, dict) else [""]
    if args.greater_is_better and any(best.startswith(f"{prefix}mae") for prefix in prefixes):
        raise ValueError(f"`greater_is_better` must be False for `metric_for_best_model` {best}, got True.")


__all__ = ["SegmentationMetrics"]
