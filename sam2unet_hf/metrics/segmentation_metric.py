"""What the `evaluate` modules beside it share: images are scored as they come, and only sums are kept."""

import abc
import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import evaluate
import numpy as np
from datasets import Features, Value
from datasets import List as ListFeature

from .functional import Accumulator


IMAGES_DESCRIPTION = """
Args:
    predictions: List of predictions, one per image: probabilities in [0, 1] (float16, float32, float64), 8-bit maps
        (0 to 255) or binary masks, of shape `(height, width)`, or `(regions, height, width)` where regions overlap.
        NumPy arrays, tensors, PIL images or nested lists. Images may differ in size. Integers not above 1 in an image
        are taken for a mask, but with `normalize="minmax"` for an 8-bit map; floats and booleans leave no doubt.
    references: List of binary masks of the same shapes: boolean, 0 and 1, or 0 and 255.
    regions: Names of the regions for the keys of the result; their numbers by default.
    normalize: `"minmax"` stretches each prediction to [0, 1] first, as the protocol of the reference implementation
        does. The default `None` takes probabilities as they are: that scores the mask a user of the model gets, and
        does not blow up what little there is in an image without tumour.
"""
ZERO_DIVISION_DESCRIPTION = """\
    zero_division: Value where mask and prediction (at each threshold) are both empty: 0 as in `py_sod_metrics` (the
        default), 1 as in BraTS, or NaN to leave out images where both are empty at probability > 0.5.
"""
CUTS_DESCRIPTION = """
Returns:
    Dictionary with `{key}` at probability > 0.5; `mean_{key}` and `max_{key}`, mean and largest value of the average
    curve over the thresholds 0/255 to 255/255; `adaptive_{key}` at twice the mean probability of each image, at
    most 1. With regions the means over them, and each key once more per region: `{key}_<region>` and so on.
"""


def _nested_lists(value: Value, depth: int) -> Any:
    return _nested_lists(ListFeature(value), depth - 1) if depth else value


# Images, and stacks of regions. They tell `evaluate` the names; nothing goes through Arrow.
FEATURES = [
    Features(
        predictions=_nested_lists(Value("float64"), depth),
        references=_nested_lists(Value("uint8"), depth),
    )
    for depth in (2, 3)
]


class SegmentationMetric(evaluate.Metric, abc.ABC):
    """Base class of the modules: an [`evaluate.Metric`] that scores images in `add` and `add_batch` already.

    Options go to `evaluate.load(path, normalize="minmax")`, or to `compute` if no image was added before. No image
    is kept, on disk or in memory.

    Args:
        *args: Arguments of [`evaluate.Metric`].
        **kwargs: Further arguments of [`evaluate.Metric`], and options of the module.

    Raises:
        TypeError: If there is no such option.
        ValueError: If `num_process` is not 1.
    """

    measures: ClassVar[tuple[str, ...]]

    def __init__(self, *args: Any, **kwargs: Any):
        parameters = inspect.signature(self._score).parameters.values()
        self._options = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        self._options["regions"] = None
        arguments = inspect.signature(evaluate.Metric).parameters
        self._options = self._merge_options({name: kwargs.pop(name) for name in {*kwargs} - {*arguments}})
        if kwargs.get("num_process", 1) != 1:
            raise ValueError(
                f"`num_process` must be 1 for {type(self).__name__}, got {kwargs['num_process']}. Gather the "
                "predictions first, or merge the `Accumulator`s of `sam2unet_hf.metrics.functional`."
            )
        super().__init__(*args, **kwargs)
        self._accumulator = Accumulator(self.measures)

    @abc.abstractmethod
    def _score(self, prediction: Any, reference: Any) -> np.ndarray:
        """Score one image; the keyword arguments of subclasses are the options of the module."""

    def _merge_options(self, options: dict[str, Any]) -> dict[str, Any]:
        if unknown := sorted(options.keys() - self._options.keys()):
            raise TypeError(
                f"{type(self).__name__} has no option {', '.join(unknown)}; it has {', '.join(self._options)}."
            )
        return {**self._options, **options}

    def __len__(self) -> int:
        """Return the number of images added since the last `compute`."""
        return self._accumulator.images

    def _accumulate(
        self, predictions: Sequence[Any], references: Sequence[Any], options: dict[str, Any]
    ) -> Accumulator:
        # Generators too.
        predictions, references = (
            images if hasattr(images, "__len__") else list(images) for images in (predictions, references)
        )
        if len(predictions) != len(references):
            raise ValueError(
                f"`predictions` and `references` must be equally many, got {len(predictions)} and {len(references)}."
            )
        accumulator = Accumulator(self.measures)
        options = {name: value for name, value in options.items() if name != "regions"}
        for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            try:
                accumulator.add(self._score(prediction, reference, **options))
            except ValueError as err:
                raise ValueError(f"Image {index}: {err}") from err
        return accumulator

    def add_batch(
        self, *, predictions: Sequence[Any] | None = None, references: Sequence[Any] | None = None, **kwargs: Any
    ) -> None:
        """Score several images; if one of them is wrong, none of them counts."""
        if kwargs or predictions is None or references is None:
            raise TypeError(
                f"`add_batch` takes `predictions` and `references`, got {', '.join(kwargs) or None}. Options go to "
                "`evaluate.load`."
            )
        self._accumulator.merge(self._accumulate(predictions, references, self._options))

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Score one image."""
        # `evaluate.combine` passes it under the plural names.
        prediction, reference = kwargs.pop("predictions", prediction), kwargs.pop("references", reference)
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def compute(
        self, *, predictions: Sequence[Any] | None = None, references: Sequence[Any] | None = None, **kwargs: Any
    ) -> dict[str, float]:
        """Return the averages over these images and those added before, and start anew."""
        options = self._merge_options(kwargs)
        changed = [name for name in kwargs if name != "regions" and repr(options[name]) != repr(self._options[name])]
        if changed and len(self):
            raise ValueError(
                f"{len(self)} images were added with another value of {', '.join(changed)}. Pass options to "
                "`evaluate.load` instead."
            )
        accumulator = Accumulator(self.measures)
        accumulator.merge(self._accumulator)
        if predictions is not None and references is not None:
            accumulator.merge(self._accumulate(predictions, references, options))
        elif predictions is not None or references is not None:
            raise TypeError("`compute` takes `predictions` and `references` together.")
        result = accumulator.result(options["regions"])
        # Not before the result is there, so that a mistake costs no image.
        self._accumulator = Accumulator(self.measures)
        return result


__all__ = ["CUTS_DESCRIPTION", "FEATURES", "IMAGES_DESCRIPTION", "ZERO_DIVISION_DESCRIPTION", "SegmentationMetric"]
