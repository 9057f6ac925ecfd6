"""Structure measure of predicted masks, as an `evaluate` module."""

from typing import Any, Literal

import evaluate
import numpy as np

from .functional import score
from .segmentation_metric import FEATURES, IMAGES_DESCRIPTION, SegmentationMetric


_DESCRIPTION = """
Structure measure (S-measure): similarity of the brightness inside and outside the mask (objects), and of the four
quadrants around the mask's centre (regions). It needs no threshold. Averaged over images.
"""
_CITATION = """
@inproceedings{fan2017structure,
    author = {Fan, Deng-Ping and Cheng, Ming-Ming and Liu, Yun and Li, Tao and Borji, Ali},
    title = {Structure-measure: A New Way to Evaluate Foreground Maps},
    booktitle = {IEEE International Conference on Computer Vision (ICCV)},
    pages = {4558--4567},
    year = {2017},
    doi = {10.1109/ICCV.2017.487}
}
"""
_INPUTS_DESCRIPTION = f"""{IMAGES_DESCRIPTION}\
    alpha: Weight of objects against regions, in [0, 1]; 0.5 by default.

Returns:
    Dictionary with `s_measure`, in [0, 1] and best at 1. With regions the mean over them, and `s_measure_<region>`.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("s_measure.py")  # path of this file, or id of its Space
    >>> prediction, reference = [[0.9, 0.6], [0.2, 0.1]], [[1, 0], [0, 0]]
    >>> scores = metric.compute(predictions=[prediction], references=[reference])
    >>> round(scores["s_measure"], 4)
    0.9235
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class SMeasure(SegmentationMetric):
    """Structure measure of predicted masks."""

    measures = ("s_measure",)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=FEATURES,
            reference_urls=["https://doi.org/10.1109/ICCV.2017.487"],
        )

    def _score(
        self, prediction: Any, reference: Any, *, normalize: Literal["minmax"] | None = None, alpha: float = 0.5
    ) -> np.ndarray:
        return score(prediction, reference, self.measures, normalize=normalize, alpha=alpha)


__all__ = ["SMeasure"]
