"""F-measure of predicted masks, as an `evaluate` module."""

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
F-measure (1 + beta^2) P R / (beta^2 P + R) of the pixels' precision P and recall R, averaged over images. With the
usual beta^2 = 0.3 precision counts more than recall.
"""
_CITATION = """
@inproceedings{achanta2009frequency,
    author = {Achanta, Radhakrishna and Hemami, Sheila and Estrada, Francisco and Susstrunk, Sabine},
    title = {Frequency-tuned Salient Region Detection},
    booktitle = {IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
    pages = {1597--1604},
    year = {2009},
    doi = {10.1109/CVPR.2009.5206596}
}
"""
_INPUTS_DESCRIPTION = f"""{IMAGES_DESCRIPTION}{ZERO_DIVISION_DESCRIPTION}\
    beta_squared: Weight of recall against precision, above 0; 0.3 by default.
{CUTS_DESCRIPTION.format(key="f_beta")}
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("f_beta.py")  # path of this file, or id of its Space
    >>> prediction, reference = [[0.9, 0.6], [0.2, 0.1]], [[1, 0], [0, 0]]
    >>> scores = metric.compute(predictions=[prediction], references=[reference])
    >>> round(scores["f_beta"], 4)
    0.5652
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class FBeta(SegmentationMetric):
    """F-measure of predicted masks."""

    measures = ("f_beta",)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=FEATURES,
            reference_urls=["https://doi.org/10.1109/CVPR.2009.5206596"],
        )

    def _score(
        self,
        prediction: Any,
        reference: Any,
        *,
        normalize: Literal["minmax"] | None = None,
        zero_division: float = 0.0,
        beta_squared: float = 0.3,
    ) -> np.ndarray:
        return score(
            prediction,
            reference,
            self.measures,
            normalize=normalize,
            zero_division=zero_division,
            beta_squared=beta_squared,
        )


__all__ = ["FBeta"]
