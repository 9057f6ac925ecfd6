"""Intersection over union of predicted masks, as an `evaluate` module."""

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
Intersection over union |A and B| / |A or B| of predicted mask A and reference mask B (Jaccard index), averaged over
images.
"""
_CITATION = """
@article{jaccard1912distribution,
    author = {Jaccard, Paul},
    title = {The Distribution of the Flora in the Alpine Zone},
    journal = {New Phytologist},
    volume = {11},
    number = {2},
    pages = {37--50},
    year = {1912},
    doi = {10.1111/j.1469-8137.1912.tb05611.x}
}
"""
_INPUTS_DESCRIPTION = f"""{IMAGES_DESCRIPTION}{ZERO_DIVISION_DESCRIPTION}\
{CUTS_DESCRIPTION.format(key="iou")}
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("iou.py")  # path of this file, or id of its Space
    >>> prediction, reference = [[0.9, 0.6], [0.2, 0.1]], [[1, 0], [0, 0]]
    >>> scores = metric.compute(predictions=[prediction], references=[reference])
    >>> round(scores["iou"], 4)
    0.5
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class Iou(SegmentationMetric):
    """Intersection over union of predicted masks."""

    measures = ("iou",)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=FEATURES,
            reference_urls=["https://doi.org/10.1111/j.1469-8137.1912.tb05611.x"],
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


__all__ = ["Iou"]
