"""Mean absolute error of predicted masks, as an `evaluate` module."""

from .distances import squared_distance
from .functional import score
from .segmentation_metric import SegmentationMetric
from .streaming_metric import MetricFacts


class Mae(SegmentationMetric):
    """Mean absolute error of predicted masks."""

    score_function = staticmethod(score)
    metrics = ("mae",)
    options = ("normalize",)
    facts = MetricFacts(
        title="MAE",
        description="""
            Mean absolute error: mean difference of probability and mask over the pixels of an image, averaged over
            images.
        """,
        range="0 to 1, lower is better.",
        special_cases={
            "Mask empty": "the mean probability.",
            "Mask full": "1 minus the mean probability.",
            "Mask and prediction both empty": "0.",
            "Constant prediction, one pixel, one row": "as any other image; "
            '`normalize="minmax"` leaves constants alone.',
        },
        example_score=0.25,
        further_use="Images of several sizes, in batches:",
        further_example="""
            >>> metric.add_batch(predictions=[[[0.5]], [[1.0, 0.0]]], references=[[[1]], [[1, 0]]])
            >>> metric.compute()["mae"]
            0.25
        """,
        citation="""
            @inproceedings{perazzi2012saliency,
                author = {Perazzi, Federico and Krahenbuhl, Philipp and Pritch, Yael and Hornung, Alexander},
                title = {Saliency Filters: Contrast Based Filtering for Salient Region Detection},
                booktitle = {IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
                pages = {733--740},
                year = {2012},
                doi = {10.1109/CVPR.2012.6247743}
            }
        """,
    )
