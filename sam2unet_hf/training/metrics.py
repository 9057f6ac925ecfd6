"""The metrics of `sam2unet_hf.metrics` for the Trainer, at the masks' own resolution."""

import difflib
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from transformers import EvalPrediction, TrainingArguments

from ..image_processing_sam2unet import Sam2UNetImageProcessor
from ..metrics.functional import METRICS, num_columns, score
from ..metrics.segmentation_metric import Accumulator
from ..modeling_sam2unet import Sam2UNetForSemanticSegmentation
from .patients import PATIENT_ERRORS, PatientRows, add_up, count_pixels, find_patients, patient_score_names, score_sums


class SegmentationMetrics:
    """All metrics of `sam2unet_hf.metrics`, for the `compute_metrics` of [`Sam2UNetTrainer`].

    Scores come batch by batch (`batch_eval_metrics=True`) or all at once. Their sums are exact, so the averages depend
    neither on the batch size nor on the number of processes.

    Args:
        regions: Names of the regions in the order of the channels.
        zero_division: Dice, IoU, F and weighted F where mask and prediction are both empty. 1 as in BraTS; 0 as in
            `py_sod_metrics` and in the modules of `sam2unet_hf.metrics`.
        normalize: `"minmax"` stretches each prediction to [0, 1] first, as papers on SAM2-UNet do.

    The result also holds `loss`, the mean over images of the loss of each alone. Of rows with a `case_id` it holds
    scores of patients too, see [`~patients.score_sums`].

    Attributes:
        patient_rows: Which patient each image of the evaluation is of, in the order in which they come;
            [`Sam2UNetTrainer`] sets it before each evaluation.
        image_dice: Dice at probability > 0.5 of the last evaluation, of shape `(images, regions)`, in the order of the
            data set.
        patient_counts: True positive, predicted and reference voxels of the last evaluation, of shape `(regions, 3)`,
            by `case_id`; empty without one.
    """

    def __init__(self, regions: Sequence[str], zero_division: float = 1.0, normalize: Literal["minmax"] | None = None):
        self.regions = list(regions)
        self.zero_division = zero_division
        self.normalize = normalize
        self.reset()

    def reset(self) -> None:
        """Forget the images of an evaluation, which may not have come to its end."""
        self.image_dice = np.zeros((0, len(self.regions)))
        self.patient_counts: dict[str, np.ndarray] = {}
        self.patient_rows: PatientRows | None = None
        self._accumulator = Accumulator()
        self._image_dice: list[list[float]] = []
        self._counts: list[list[list[int]]] = []
        self._losses: list[float] = []

    def names(self) -> list[str]:
        """Return the keys of the result: each metric over all regions, and per region with its name behind it."""
        accumulator = Accumulator()
        accumulator.add(np.zeros((len(self.regions), sum(map(num_columns, METRICS)))))
        return list(accumulator.result(self.regions))

    def patient_names(self, unit: str = "ml") -> list[str]:
        """Return the keys that the result has besides, where rows have a `case_id`; `unit` is `ml` or `voxels`."""
        return patient_score_names(self.regions, unit)

    def score(
        self, logits: torch.Tensor, labels: torch.Tensor | list[torch.Tensor], model: Sam2UNetForSemanticSegmentation
    ) -> np.ndarray:
        """Score a batch as `score_and_count` does, and return the scores alone."""
        return self.score_and_count(logits, labels, model)[0]

    def score_and_count(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor | list[torch.Tensor],
        model: Sam2UNetForSemanticSegmentation,
        crop_boxes: torch.Tensor | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Score a batch at the resolution of its masks, and count the pixels of each region for its patient.

        Args:
            logits: Raw scores of shape `(batch_size, regions, height, width)`; resized to each mask.
            labels: Label maps of shape `(batch_size, height, width)`, or a list of `(height, width)` maps. Pixels of
                `ignore_index` do not count.
            model: Knows the regions and `ignore_index`.
            crop_boxes: Where in its slice each image was cut out, of shape `(batch_size, 4)`, if it was: scores are
                those of the whole slice.

        Returns:
            Scores of shape `(batch_size, regions, columns)`, see [`~metrics.functional.score`], and counts of shape
            `(batch_size, regions, 3)`, see [`~patients.count_pixels`].
        """
        processor = Sam2UNetImageProcessor(regions=model.config.regions)
        scores, counts = [], []
        for index, label_map in enumerate(labels):
            boxes = None if crop_boxes is None else crop_boxes[index : index + 1]
            outputs = SimpleNamespace(logits=logits[index : index + 1], crop_boxes=boxes)
            (probabilities,) = processor.post_process_regions(outputs, target_sizes=[tuple(label_map.shape)])
            masks, valid = model.region_masks(label_map[None])
            found = probabilities, masks[0].bool(), valid[0, 0]
            label_ids = processor.regions_to_label_map(probabilities)
            predicted = model.region_masks(label_ids[None])[0][0].bool()
            counts.append(count_pixels(predicted, *found[1:]).cpu().numpy())
            probability, mask, counted = (maps.cpu().numpy() for maps in found)
            options: dict[str, Any] = {"zero_division": self.zero_division, "normalize": self.normalize}
            scores.append(score(probability, mask, valid_mask=counted, **options))
        return np.stack(scores), np.stack(counts)

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Add scores; return the averages, and start anew, if these were the last ones.

        Args:
            prediction: With the scores of the images as `predictions`, and their losses as `label_ids`, or the pair of
                losses and counts of pixels.
            compute_result: Whether these were the last ones.
        """
        losses: Any = prediction.label_ids
        losses, counts = losses if isinstance(losses, tuple) else (losses, ())
        # What is kept are Python's numbers: small arrays between the large ones of images would let the heap grow.
        for scores in torch.as_tensor(prediction.predictions).cpu().numpy():  # perhaps on a GPU
            self._accumulator.add(scores)
            self._image_dice.append(scores[:, 0].tolist())  # of the first metric, Dice, at probability > 0.5
        self._losses.extend(torch.as_tensor(losses).tolist())
        self._counts.extend(torch.as_tensor(counts).tolist())
        if not compute_result:
            return {}
        image_dice = np.array(self._image_dice)
        # The exact sum, which does not depend on the order either.
        result = {"loss": math.fsum(self._losses) / len(self._losses), **self._accumulator.result(self.regions)}
        patient_counts = {}
        if self.patient_rows is not None:
            patient_counts = add_up(map(np.array, self._counts), self.patient_rows)
            result |= score_sums(patient_counts, self.patient_rows, self.regions)
        self.reset()
        self.image_dice, self.patient_counts = image_dice, patient_counts
        return result


def lower_is_better(name: str) -> bool:
    """Whether smaller values of a score are better."""
    return name.startswith(("mae", *PATIENT_ERRORS))


def check_best_metric(args: TrainingArguments, metrics: SegmentationMetrics, eval_dataset: Any) -> None:
    """Raise a `ValueError` if `metric_for_best_model` does not exist, which transformers finds out after an epoch."""

    def names_of(rows: Any) -> list[str]:
        patients = find_patients(rows)
        return ["loss", *metrics.names(), *(metrics.patient_names(patients.unit) if patients else ())]

    best = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if isinstance(eval_dataset, dict):
        names = [f"{dataset}_{name}" for dataset, rows in eval_dataset.items() for name in names_of(rows)]
        best = best if args.metric_for_best_model else names[0]
    else:
        names = names_of(eval_dataset)
    if best not in names:
        close = difflib.get_close_matches(best, names, n=3, cutoff=0.4)
        raise ValueError(
            f"`metric_for_best_model` must be a score such as {', '.join(close or names[:5])}, got {best}."
        )
    prefixes = [f"{dataset}_" for dataset in eval_dataset] if isinstance(eval_dataset, dict) else [""]
    own = (best.removeprefix(prefix) for prefix in prefixes if best.startswith(prefix))
    if args.greater_is_better and any(map(lower_is_better, own)):
        raise ValueError(f"`greater_is_better` must be False for `metric_for_best_model` {best}, got True.")


__all__ = ["SegmentationMetrics"]
