"""What the `evaluate` modules for volumes share: patients are scored as they come, and only their scores are kept."""

import abc
import inspect
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import evaluate
import numpy as np
from datasets import Features, Value
from datasets import List as ListFeature

from .volume_functional import to_regions


VOLUMES_DESCRIPTION = """
Args:
    predictions: Volumes of label ids, one per patient, of shape `(x, y, z)` with the axes in any order: integers >= 0
        (which may be stored as floats), 0 for the background. NumPy arrays, tensors or nested lists, in a list or a
        generator; patients may differ in size. Booleans and 0 and 1 will do for a region that is label 1.
    references: Volumes of the same shapes.
    regions: Region name -> the label ids it joins; ids in no region are background. Default: BraTS' regions
        `{"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}`, with which any other id than 0 to 3 is an error.
"""
DISTANCE_DESCRIPTION = """\
    spacing: Size of a voxel in mm along the three axes of the volumes: three numbers for all patients, or three per
        patient. 1 mm by default, as in BraTS.
    one_empty_mm: Distance where just one of prediction and reference is empty. The default is the diagonal of BraTS'
        volumes, 373.13 mm, as in results on BraTS until 2021; pass 374 for BraTS from 2023 on.
"""
RESULT_DESCRIPTION = """
Returns:
    Dictionary with `{key}`, the mean over regions; `{key}_<region>` such as `{key}_WT`, the mean over patients; and
    `{key}_per_patient`, which maps each region to the values of the patients, in the order they were added.
"""
_VOLUME = ListFeature(ListFeature(ListFeature(Value("int64"))))
# They tell `evaluate` the names; nothing goes through Arrow.
VOLUME_FEATURES = Features(predictions=_VOLUME, references=_VOLUME)
_MISSING = object()
Scores = dict[str, dict[str, float]]  # region -> measure -> value


class VolumeMetric(evaluate.Metric, abc.ABC):
    """Base class of the modules: an [`evaluate.Metric`] that scores patients in `add` and `add_batch` already.

    Options go to `evaluate.load(path, regions=...)`, or to `compute` if no patient was added before; `spacing` goes to
    `add` and `add_batch` too. No volume is kept, on disk or in memory, but a few numbers per patient.

    Args:
        *args: Arguments of [`evaluate.Metric`].
        **kwargs: Further arguments of [`evaluate.Metric`], and options of the module.

    Raises:
        TypeError: If there is no such option.
        ValueError: If an option has a value it cannot have, or `num_process` is not 1.
    """

    measures: ClassVar[tuple[str, ...]]

    def __init__(self, *args: Any, **kwargs: Any):
        parameters = inspect.signature(self._score).parameters.values()
        self._options = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        arguments = inspect.signature(evaluate.Metric).parameters
        self._options = self._merge_options({name: kwargs.pop(name) for name in {*kwargs} - {*arguments}})
        if kwargs.get("num_process", 1) != 1:
            raise ValueError(
                f"`num_process` must be 1 for {type(self).__name__}, got {kwargs['num_process']}. Gather the scores "
                "of `sam2unet_hf.metrics.volume_functional.score_volume` instead."
            )
        super().__init__(*args, **kwargs)
        self._scores: list[Scores] = []

    @abc.abstractmethod
    def _score(self, prediction: Any, reference: Any) -> Scores:
        """Score one patient; the keyword arguments of subclasses are the options of the module."""

    def _merge_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        if unknown := sorted(options.keys() - self._options.keys()):
            raise TypeError(
                f"{type(self).__name__} has no option {', '.join(unknown)}; it has {', '.join(self._options)}."
            )
        to_regions(options.get("regions"))
        return {**self._options, **options}

    def __len__(self) -> int:
        """Return the number of patients added since the last `compute`."""
        return len(self._scores)

    def _score_all(self, predictions: Any, references: Any, options: dict[str, Any]) -> list[Scores]:
        options = dict(options)
        columns = {"prediction": predictions, "reference": references}
        if isinstance(options.get("spacing"), Iterable):
            options["spacing"] = list(options["spacing"])
            if any(map(np.ndim, options["spacing"])):
                columns["spacing"] = options.pop("spacing")
        scores = []
        for index, values in enumerate(itertools.zip_longest(*columns.values(), fillvalue=_MISSING)):
            patient = dict(zip(columns, values, strict=True))
            if missing := [name for name, value in patient.items() if value is _MISSING]:
                raise ValueError(
                    f"Each patient needs one {', one '.join(columns)}, but patient {index} has no {missing[0]}."
                )
            try:
                scores.append(self._score(**patient, **options))
            except ValueError as err:
                raise ValueError(f"Patient {index}: {err}") from err
        return scores

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Score several patients; if one of them is wrong, none of them counts."""
        if kwargs.keys() - {"spacing"} or predictions is None or references is None:
            raise TypeError(
                f"`add_batch` takes `predictions` and `references`, got {', '.join(kwargs) or None}. Options but "
                "`spacing` go to `evaluate.load`."
            )
        self._scores += self._score_all(predictions, references, self._merge_options(kwargs))

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Score one patient."""
        # `evaluate.combine` passes it under the plural names.
        prediction, reference = kwargs.pop("predictions", prediction), kwargs.pop("references", reference)
        if prediction is None or reference is None:
            raise TypeError("`add` takes `prediction` and `reference` together.")
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Return the scores of these patients and those added before, and start anew."""
        if (predictions is None) != (references is None):
            raise TypeError("`compute` takes `predictions` and `references` together.")
        options = self._merge_options(kwargs)
        # A spacing is that of the patients it comes with.
        ours = set(kwargs) - ({"spacing"} if predictions is not None else set())
        changed = sorted(name for name in ours if repr(options[name]) != repr(self._options[name]))
        if changed and len(self):
            raise ValueError(
                f"{len(self)} patients were added with another value of {', '.join(changed)}. Pass options to "
                "`evaluate.load` instead."
            )
        scores = self._scores + (self._score_all(predictions, references, options) if predictions is not None else [])
        if not scores:
            raise ValueError("There is nothing to average: add patients first.")
        result: dict[str, Any] = {}
        for measure in self.measures:
            values = {region: [patient[region][measure] for patient in scores] for region in scores[0]}
            # Rounded once, so that the order of patients does not matter.
            means = {region: math.fsum(own) / len(own) for region, own in values.items()}
            result[measure] = math.fsum(means.values()) / len(means)
            result |= {f"{measure}_{region}": mean for region, mean in means.items()}
            result[f"{measure}_per_patient"] = values
        # Not before the result is there, so that a mistake costs no patient.
        self._scores = []
        return result


__all__ = [
    "DISTANCE_DESCRIPTION",
    "RESULT_DESCRIPTION",
    "VOLUMES_DESCRIPTION",
    "VOLUME_FEATURES",
    "VolumeMetric",
]
