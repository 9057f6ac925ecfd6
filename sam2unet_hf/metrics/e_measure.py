"""Enhanced-alignment measure of predicted masks, as an `evaluate` module."""

from .distances import squared_distance
from .functional import score
from .segmentation_metric import CONSTANT_PREDICTION, SegmentationMetric
from .streaming_metric import MetricFacts


class EMeasure(SegmentationMetric):
    """Enhanced-alignment measure of predicted masks."""

    score_function = staticmethod(score)
    metrics = ("e_measure",)
    options = ("normalize", "ddof")
    facts = MetricFacts(
        title="E-measure",
        description="""
            Enhanced-alignment measure (E-measure): how well prediction and mask agree pixel by pixel once their means
            are taken off, which sees global statistics and local matches at a time. Averaged over images.
        """,
        range="""
            0 to n / (n - 1) for an image of n pixels, or 0 to 1 with `ddof=0`; higher is better. Papers' E is
            `mean_e_measure`.
        """,
        special_cases={
            "Mask empty": "the share of pixels that are not predicted times n / (n - `ddof`).",
            "Mask full": "the share of pixels that are predicted times n / (n - `ddof`).",
            "Mask and prediction both empty": "n / (n - `ddof`), the best there is.",
            "Constant prediction": CONSTANT_PREDICTION,
            "One pixel": "0 or 4.5e15, since n - 1 = 0; that is what `py_sod_metrics` returns. `ddof=0` gives 0 or 1.",
            "One row": "as any other image.",
        },
        example_score=0.8515,
        further_use="As in the equation of the paper, which divides by the number of pixels:",
        further_example="""
            >>> scores = metric.compute(predictions=[reference], references=[reference], ddof=0)
            >>> round(scores["e_measure"], 4)
            1.0
        """,
        citation="""
            @inproceedings{fan2018enhanced,
                author = {Fan, Deng-Ping and Gong, Cheng and Cao, Yang and Ren, Bo and Cheng, Ming-Ming
                    and Borji, Ali},
                title = {Enhanced-alignment Measure for Binary Foreground Map Evaluation},
                booktitle = {International Joint Conference on Artificial Intelligence (IJCAI)},
                pages = {698--704},
                year = {2018},
                doi = {10.24963/ijcai.2018/97}
            }
        """,
    )
