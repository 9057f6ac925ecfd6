"""Enhanced-alignment measure of predicted masks, as an `evaluate` module."""

from typing import Any, Literal

import evaluate
import numpy as np

from .functional import score
from .segmentation_metric import CUTS_DESCRIPTION, FEATURES, IMAGES_DESCRIPTION, SegmentationMetric


_DESCRIPTION = """
Enhanced-alignment measure (E-measure): how well prediction and mask agree pixel by pixel once their means are taken
off, which sees global statistics and local matches at a time. Averaged over images.
"""
_CITATION = """
@inproceedings{fan2018enhanced,
    author = {Fan, Deng-Ping and Gong, Cheng and Cao, Yang and Ren, Bo and Cheng, Ming-Ming and Borji, Ali},
    title = {Enhanced-alignment Measure for Binary Foreground Map Evaluation},
    booktitle = {International Joint Conference on Artificial Intelligence (IJCAI)},
    pages = {698--704},
    year = {2018},
    doi = {10.24963/ijcai.2018/97}
}
"""
_INPUTS_DESCRIPTION = f"""{IMAGES_DESCRIPTION}\
    ddof: The sum over an image's n pixels is divided by n - ddof. 1, the default, is what the authors' code and
        `py_sod_metrics` do; a perfect score is then n / (n - 1), and an image of one pixel scores 0 or 4.5e15. 0 is
        the equation of the paper, which stays in [0, 1].
{CUTS_DESCRIPTION.format(key="e_measure")}
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("e_measure.py")  # path of this file, or id of its Space
    >>> prediction, reference = [[0.9, 0.6], [0.2, 0.1]], [[1, 0], [0, 0]]
    >>> scores = metric.compute(predictions=[prediction], references=[reference])
    >>> round(scores["e_measure"], 4)
    0.8515
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class EMeasure(SegmentationMetric):
    """Enhanced-alignment measure of predicted masks."""

    measures = ("e_measure",)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=FEATURES,
            reference_urls=["https://doi.org/10.24963/ijcai.2018/97"],
        )

    def _score(
        self, prediction: Any, reference: Any, *, normalize: Literal["minmax"] | None = None, ddof: int = 1
    ) -> np.ndarray:
        return score(prediction, reference, self.measures, normalize=normalize, ddof=ddof)


__all__ = ["EMeasure"]
