"""Mean absolute error of predicted masks, as an `evaluate` module."""

from typing import Any, Literal

import evaluate
import numpy as np

from .functional import score
from .segmentation_metric import FEATURES, IMAGES_DESCRIPTION, SegmentationMetric


_DESCRIPTION = """
Mean absolute error: mean difference of probability and mask over the pixels of an image, averaged over images.
"""
_CITATION = """
@inproceedings{perazzi2012saliency,
    author = {Perazzi, Federico and Krahenbuhl, Philipp and Pritch, Yael and Hornung, Alexander},
    title = {Saliency Filters: Contrast Based Filtering for Salient Region Detection},
    booktitle = {IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
    pages = {733--740},
    year = {2012},
    doi = {10.1109/CVPR.2012.6247743}
}
"""
_INPUTS_DESCRIPTION = f"""{IMAGES_DESCRIPTION}\

Returns:
    Dictionary with `mae`, in [0, 1] and best at 0. With regions the mean over them, and `mae_<region>`.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("mae.py")  # path of this file, or id of its Space
    >>> prediction, reference = [[0.9, 0.6], [0.2, 0.1]], [[1, 0], [0, 0]]
    >>> scores = metric.compute(predictions=[prediction], references=[reference])
    >>> round(scores["mae"], 4)
    0.25
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class Mae(SegmentationMetric):
    """Mean absolute error of predicted masks."""

    measures = ("mae",)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=FEATURES,
            reference_urls=["https://doi.org/10.1109/CVPR.2012.6247743"],
        )

    def _score(self, prediction: Any, reference: Any, *, normalize: Literal["minmax"] | None = None) -> np.ndarray:
        return score(prediction, reference, self.measures, normalize=normalize)


__all__ = ["Mae"]
