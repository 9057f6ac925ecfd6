"""Dice coefficient of predicted masks, as an `evaluate` module."""

from typing import Any, Literal

import evaluate
import numpy as np

from .functional import score
from .segmentation_metric import (
    CUTS_DESCRIPTION,
    FEATURES,
    IMAGES_DESCRIPTION,
    ZERO_DIVISION_DESCRIPTION,
    SegmentationMetric,
)


_DESCRIPTION = """
Dice coefficient 2 |A and B| / (|A| + |B|) of predicted mask A and reference mask B: twice their overlap by their
sizes, averaged over images. It equals the F1 score of the pixels.
"""
_CITATION = """
@article{dice1945measures,
    author = {Dice, Lee R.},
    title = {Measures of the Amount of Ecologic Association Between Species},
    journal = {Ecology},
    volume = {26},
    number = {3},
    pages = {297--302},
    year = {1945},
    doi = {10.2307/1932409}
}
"""
_INPUTS_DESCRIPTION = f"""{IMAGES_DESCRIPTION}{ZERO_DIVISION_DESCRIPTION}\
{CUTS_DESCRIPTION.format(key="dice")}
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("dice.py")  # path of this file, or id of its Space
    >>> prediction, reference = [[0.9, 0.6], [0.2, 0.1]], [[1, 0], [0, 0]]
    >>> scores = metric.compute(predictions=[prediction], references=[reference])
    >>> round(scores["dice"], 4)
    0.6667
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class Dice(SegmentationMetric):
    """Dice coefficient of predicted masks."""

    measures = ("dice",)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=FEATURES,
            reference_urls=["https://doi.org/10.2307/1932409"],
        )

    def _score(
        self,
        prediction: Any,
        reference: Any,
        *,
        normalize: Literal["minmax"] | None = None,
        zero_division: float = 0.0,
    ) -> np.ndarray:
        return score(prediction, reference, self.measures, normalize=normalize, zero_division=zero_division)


__all__ = ["Dice"]
