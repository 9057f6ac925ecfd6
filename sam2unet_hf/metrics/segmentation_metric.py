"""Base class of the `evaluate` modules for images, and [`Accumulator`], which averages scores without keeping them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Features, Value
from datasets import List as ListFeature

from .functional import CURVES, METRICS, num_columns
from .streaming_metric import StreamingMetric


# Sums are kept as integers in units of 2^-52.
FIXED_POINT_BITS = 52
FIXED_POINT_SCALE = 2**FIXED_POINT_BITS
CONSTANT_PREDICTION = (
    "all pixels or none. At the adaptive threshold a prediction of 0 everywhere, and one of 1, covers the whole "
    'image, any other constant nothing; `py_sod_metrics` has it so. `normalize="minmax"` leaves constants alone.'
)
# Dice, IoU and F agree in what they do with special images.
OVERLAP_CASES = {
    "Mask and prediction both empty (at a threshold)": "`zero_division`, 0 by default. BraTS counts 1.",
    "Mask empty, prediction not, or the other way round": "0.",
    "Mask full": "as any other; 1 if the prediction is full too.",
    "Constant prediction": CONSTANT_PREDICTION,
    "One pixel, one row": "as any other image.",
}


class Accumulator:
    """Average of scores that is the same to the last bit in whatever order and grouping they come.

    Sums are integers in units of 2^-52, hence exact; NaN is left out. What is merged or pickled is a few kilobytes,
    however many images went in. Threads need an accumulator each.

    Args:
        metrics: The metrics of the scores, as passed to [`~functional.score`].
    """

    def __init__(self, metrics: Sequence[str] = METRICS):
        self.metrics = tuple(metrics)
        self.images = 0
        self._whole = self._rest = self._count = np.zeros(0, dtype=np.int64)

    def add(self, scores: np.ndarray) -> None:
        """Add the scores of one image, of shape `(columns,)` or `(regions, columns)`, as `score` returned them."""
        scores = np.asarray(scores, dtype=np.float64)
        known = ~np.isnan(scores)
        scores = np.where(known, scores, 0.0)
        whole = np.rint(scores)
        rest = np.rint((scores - whole) * FIXED_POINT_SCALE)
        self._add(1, whole.astype(np.int64), rest.astype(np.int64), known.astype(np.int64))

    def __len__(self) -> int:
        """Return the number of images."""
        return self.images

    def merge(self, other: "Accumulator") -> None:
        """Add all that another accumulator of the same metrics and regions holds, which is left as it is."""
        if other.metrics != self.metrics:
            raise ValueError(f"`other` must hold the metrics {self.metrics}, got {other.metrics}.")
        if other.images:
            self._add(other.images, other._whole, other._rest, other._count)

    def _add(self, images: int, whole: np.ndarray, rest: np.ndarray, count: np.ndarray) -> None:
        if self.images and whole.shape != self._whole.shape:
            raise ValueError(
                f"All images must have the same regions, got {_regions(whole)} after {_regions(self._whole)}."
            )
        # Do not add in place, so that nothing changes if this raises.
        rest = rest + self._rest if self.images else rest
        whole = whole + (self._whole if self.images else 0) + (rest >> FIXED_POINT_BITS)
        if np.abs(whole).max() >= 2**62:
            raise OverflowError("E-measures of images of one pixel are too large to average; pass `ddof=0`.")
        self._whole, self._rest = whole, rest & (FIXED_POINT_SCALE - 1)
        self._count = count + self._count if self.images else count
        self.images += images

    def mean(self) -> np.ndarray:
        """Return the average of the scores in their shape; NaN where no image had a value.

        Raises:
            ValueError: If no image was added.
        """
        if not self.images:
            raise ValueError("There is nothing to average: add images first.")
        with np.errstate(invalid="ignore"):
            return (self._whole + self._rest / FIXED_POINT_SCALE) / self._count

    def result(self, regions: Sequence[str] | None = None) -> dict[str, float]:
        """Return the averages under their names.

        Args:
            regions: Names of the regions; their numbers by default.

        Returns:
            For Dice, IoU, F and E `dice` (probability > 0.5), `mean_dice` and `max_dice` (of the average curve over
            256 thresholds), `adaptive_dice` (twice the mean probability); for the others one value each. With regions
            `dice_<region>` and so on, and `dice` is the mean over regions.

        Raises:
            ValueError: If no image was added, or the names are not as many as the regions.
        """
        means = self.mean()
        if means.ndim == 1:
            if regions is not None:
                raise ValueError(f"`regions` names {list(regions)}, but the images have no axis of regions.")
            return self._name(means)
        names = [str(index) for index in range(len(means))] if regions is None else list(regions)
        if isinstance(regions, str) or len(names) != len(means) or len(set(names)) != len(names):
            raise ValueError(f"`regions` must hold {len(means)} different names, one for each region, got {names}.")
        per_region = [self._name(region) for region in means]
        result = {key: float(_nanmean([values[key] for values in per_region])) for key in per_region[0]}
        for name, values in zip(names, per_region, strict=True):
            result.update({f"{key}_{name}": value for key, value in values.items()})
        return result

    def _name(self, means: np.ndarray) -> dict[str, float]:
        result = {}
        for metric in self.metrics:
            columns, means = np.split(means, [num_columns(metric)])
            result[metric] = float(columns[0])
            if metric in CURVES:
                curve = columns[2:]
                result[f"mean_{metric}"] = float(_nanmean(curve.tolist()))
                result[f"max_{metric}"] = float(np.fmax.reduce(curve))
                result[f"adaptive_{metric}"] = float(columns[1])
        return result


def _nanmean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _regions(scores: np.ndarray) -> str:
    return "no axis of regions" if scores.ndim == 1 else f"{len(scores)} regions"


def _nested_lists(value: Value, depth: int) -> Any:
    return _nested_lists(ListFeature(value), depth - 1) if depth else value


class SegmentationMetric(StreamingMetric):
    """Base class of the modules for images; see [`StreamingMetric`]."""

    sample = "image"
    sample_data = "image"
    result_options = ("regions",)
    scores_class = Accumulator
    example_samples = "[[0.9, 0.6], [0.2, 0.1]], [[1, 0], [0, 0]]"
    input_texts = {
        "predictions": "List of predictions, one per image: probabilities in [0, 1] (float16, float32, float64), "
        "8-bit maps (0 to 255) or binary masks, of shape `(height, width)`, or `(regions, height, width)` where "
        "regions overlap. NumPy arrays, tensors, PIL images or nested lists. Images may differ in size. Integers not "
        'above 1 in an image are taken for a mask, but with `normalize="minmax"` for an 8-bit map; floats and '
        "booleans leave no doubt.",
        "references": "List of binary masks of the same shapes: boolean, 0 and 1, or 0 and 255.",
        "regions": "Names of the regions for the keys of the result; their numbers by default.",
        "normalize": '`"minmax"` stretches each prediction to [0, 1] first, as the protocol of the reference '
        "implementation does. The default `None` takes probabilities as they are: that scores the mask a user of the "
        "model gets, and does not blow up what little there is in an image without tumour.",
        "zero_division": "Value where mask and prediction (at each threshold) are both empty: 0 as in "
        "`py_sod_metrics` (the default), 1 as in BraTS, or NaN to leave out images where both are empty at "
        "probability > 0.5.",
        "beta_squared": "Weight of recall against precision in the F-measure, above 0; 0.3 by default.",
        "ddof": "The sum over an image's n pixels in the E-measure is divided by n - ddof. 1, the default, is what "
        "the authors' code and `py_sod_metrics` do; a perfect score is then n / (n - 1), and an image of one pixel "
        "scores 0 or 4.5e15. 0 is the equation of the paper, which stays in [0, 1].",
    }
    output_notes = "With regions each key is the mean over them, and comes once more per region as `<key>_<region>`."
    # Images, and stacks of regions. `evaluate` reads the names from them; no image goes through Arrow.
    input_features = [
        Features(predictions=_nested_lists(Value("float64"), depth), references=_nested_lists(Value("uint8"), depth))
        for depth in (2, 3)
    ]

    @classmethod
    def outputs(cls) -> dict[str, str]:
        """Return the keys of the result, in Markdown, and what their values are."""
        curves = [metric for metric in cls.metrics if metric in CURVES]
        others = [metric for metric in cls.metrics if metric not in CURVES]
        outputs = {}
        if curves:
            more = " and so on" if len(curves) > 1 else ""
            outputs[", ".join(f"`{metric}`" for metric in curves)] = "of the mask where probability > 0.5"
            outputs[f"`mean_{curves[0]}`, `max_{curves[0]}`{more}"] = (
                "mean and largest value of the average curve over the thresholds 0/255 to 255/255"
            )
            outputs[f"`adaptive_{curves[0]}`{more}"] = (
                "of the mask where probability is at or above twice the mean probability of the image, at most 1"
            )
        if others:
            outputs[", ".join(f"`{metric}`" for metric in others)] = "of the probabilities, without threshold"
        return outputs

    def _samples(self, predictions: Any, references: Any, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        # A generator has no length.
        predictions, references = (
            images if hasattr(images, "__len__") else list(images) for images in (predictions, references)
        )
        if len(predictions) != len(references):
            raise ValueError(
                f"`predictions` and `references` must be equally many, got {len(predictions)} and {len(references)}."
            )
        for prediction, reference in zip(predictions, references, strict=True):
            yield {"prediction": prediction, "reference": reference}


__all__ = ["Accumulator"]
