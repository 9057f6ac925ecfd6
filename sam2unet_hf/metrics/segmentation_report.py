"""All seven measures of predicted masks at once, as an `evaluate` module."""

from typing import Any, Literal

import evaluate
import numpy as np

from .functional import MEASURES, score
from .segmentation_metric import FEATURES, IMAGES_DESCRIPTION, ZERO_DIVISION_DESCRIPTION, SegmentationMetric


_DESCRIPTION = """
Dice, IoU, F-measure, E-measure, S-measure, weighted F-measure and mean absolute error of predicted masks, as papers on
SAM2-UNet report them, in one pass over each image.
"""
_CITATION = """
@article{xiong2024sam2unet,
    author = {Xiong, Xinyu and Wu, Zihuang and Tan, Shuangyi and Li, Wenxue and Tang, Feilong and Chen, Ying and
        Li, Siying and Ma, Jie and Li, Guanbin},
    title = {SAM2-UNet: Segment Anything 2 Makes Strong Encoder for Natural and Medical Image Segmentation},
    journal = {arXiv:2408.08870},
    year = {2024},
    doi = {10.48550/arXiv.2408.08870}
}
"""
_INPUTS_DESCRIPTION = f"""{IMAGES_DESCRIPTION}{ZERO_DIVISION_DESCRIPTION}\
    alpha: Weight of objects against regions in the S-measure, in [0, 1]; 0.5 by default.
    beta_squared: Weight of recall against precision in the F-measure, above 0; 0.3 by default.
    weighted_beta_squared: The same in the weighted F-measure; 1 by default.
    ddof: The sum over n pixels in the E-measure is divided by n - ddof: 1 by default, as in the authors' code; 0 is
        the equation of the paper.

Returns:
    Dictionary with `dice`, `iou`, `f_beta` and `e_measure` at probability > 0.5; each with the prefixes `mean_` and
    `max_`, mean and largest value of the average curve over the thresholds 0/255 to 255/255, and `adaptive_`, at
    twice the mean probability of each image; `s_measure`, `weighted_f_beta` and `mae`. With regions the means over
    them, and each key once more per region: `dice_<region>` and so on.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("segmentation_report.py")  # path of this file, or id of its Space
    >>> prediction, reference = [[0.9, 0.6], [0.2, 0.1]], [[1, 0], [0, 0]]
    >>> scores = metric.compute(predictions=[prediction], references=[reference])
    >>> round(scores["mean_dice"], 4)
    0.6539
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class SegmentationReport(SegmentationMetric):
    """All seven measures of predicted masks at once."""

    measures = MEASURES

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=FEATURES,
            reference_urls=["https://doi.org/10.48550/arXiv.2408.08870"],
        )

    def _score(
        self,
        prediction: Any,
        reference: Any,
        *,
        normalize: Literal["minmax"] | None = None,
        zero_division: float = 0.0,
        alpha: float = 0.5,
        beta_squared: float = 0.3,
        weighted_beta_squared: float = 1.0,
        ddof: int = 1,
    ) -> np.ndarray:
        return score(
            prediction,
            reference,
            self.measures,
            normalize=normalize,
            zero_division=zero_division,
            alpha=alpha,
            beta_squared=beta_squared,
            weighted_beta_squared=weighted_beta_squared,
            ddof=ddof,
        )


__all__ = ["SegmentationReport"]
