"""All seven metrics of predicted masks at once, as an `evaluate` module."""

from .distances import squared_distance
from .functional import METRICS, score
from .segmentation_metric import CONSTANT_PREDICTION, SegmentationMetric
from .streaming_metric import MetricFacts


class SegmentationReport(SegmentationMetric):
    """All seven metrics of predicted masks at once."""

    score_function = staticmethod(score)
    metrics = METRICS
    options = ("normalize", "zero_division", "beta_squared", "ddof")
    facts = MetricFacts(
        title="Segmentation report",
        description="""
            Dice, IoU, F-measure, E-measure, S-measure, weighted F-measure and mean absolute error of predicted masks,
            as papers on SAM2-UNet report them, in one pass over each image.
        """,
        range="""
            `mae` 0 to 1, lower is better; E-measures 0 to n / (n - 1) for an image of n pixels, or 0 to 1 with
            `ddof=0`, and all others 0 to 1, higher is better. Papers' mDice, mIoU and E are `mean_dice`, `mean_iou`
            and `mean_e_measure`.
        """,
        special_cases={
            "Mask and prediction both empty": "Dice, IoU, F and weighted F are `zero_division`, 0 by default (BraTS "
            "counts 1); S is 1, E its maximum, MAE 0.",
            "Mask empty, prediction not": "Dice, IoU, F and weighted F are 0, however little is predicted; S is 1 "
            "minus the mean probability, E the share of pixels not predicted, MAE the mean probability.",
            "Mask full": "S is the mean probability and E the share of predicted pixels; the others as for any mask.",
            "Constant prediction": CONSTANT_PREDICTION,
            "One pixel": "E is 0 or 4.5e15, as in `py_sod_metrics`, or 0 or 1 with `ddof=0`.",
            "One row, or a mask whose centre lies in the last row or column": "the quadrants of S without pixels "
            "count nothing, where `py_sod_metrics` returns NaN.",
        },
        example_score=0.6667,
        further_use="Images added one by one; only sums are kept:",
        further_example="""
            >>> for pair in [(prediction, reference), (reference, reference)]:
            ...     metric.add(prediction=pair[0], reference=pair[1])
            >>> len(metric), round(metric.compute()["s_measure"], 4)
            (2, 0.9618)
        """,
        citation="""
            @article{xiong2024sam2unet,
                author = {Xiong, Xinyu and Wu, Zihuang and Tan, Shuangyi and Li, Wenxue and Tang, Feilong
                    and Chen, Ying and Li, Siying and Ma, Jie and Li, Guanbin},
                title = {SAM2-UNet: Segment Anything 2 Makes Strong Encoder for Natural and Medical Image
                    Segmentation},
                journal = {arXiv:2408.08870},
                year = {2024},
                doi = {10.48550/arXiv.2408.08870}
            }
        """,
    )
