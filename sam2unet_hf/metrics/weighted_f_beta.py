"""Weighted F-measure of predicted masks, as an `evaluate` module."""

from typing import Any, Literal

import evaluate
import numpy as np

from .functional import score
from .segmentation_metric import FEATURES, IMAGES_DESCRIPTION, ZERO_DIVISION_DESCRIPTION, SegmentationMetric


_DESCRIPTION = """
Weighted F-measure: an F-measure of probabilities, without thresholds, in which an error counts less beside other
errors of the kind and more the farther it is from the mask. Averaged over images.
"""
_CITATION = """
@inproceedings{margolin2014evaluate,
    author = {Margolin, Ran and Zelnik-Manor, Lihi and Tal, Ayellet},
    title = {How to Evaluate Foreground Maps?},
    booktitle = {IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
    pages = {248--255},
    year = {2014},
    doi = {10.1109/CVPR.2014.39}
}
"""
_INPUTS_DESCRIPTION = f"""{IMAGES_DESCRIPTION}{ZERO_DIVISION_DESCRIPTION}\
    beta_squared: Weight of recall against precision, above 0; 1 by default.

Returns:
    Dictionary with `weighted_f_beta`, in [0, 1] and best at 1. With regions the mean over them, and
    `weighted_f_beta_<region>`.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("weighted_f_beta.py")  # path of this file, or id of its Space
    >>> prediction, reference = [[0.9, 0.6], [0.2, 0.1]], [[1, 0], [0, 0]]
    >>> scores = metric.compute(predictions=[prediction], references=[reference])
    >>> round(scores["weighted_f_beta"], 4)
    0.6578
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class WeightedFBeta(SegmentationMetric):
    """Weighted F-measure of predicted masks."""

    measures = ("weighted_f_beta",)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=FEATURES,
            reference_urls=["https://doi.org/10.1109/CVPR.2014.39"],
        )

    def _score(
        self,
        prediction: Any,
        reference: Any,
        *,
        normalize: Literal["minmax"] | None = None,
        zero_division: float = 0.0,
        beta_squared: float = 1.0,
    ) -> np.ndarray:
        return score(
            prediction,
            reference,
            self.measures,
            normalize=normalize,
            zero_division=zero_division,
            weighted_beta_squared=beta_squared,
        )


__all__ = ["WeightedFBeta"]
