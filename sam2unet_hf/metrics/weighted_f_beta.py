"""Weighted F-measure of predicted masks, as an `evaluate` module."""

from .distances import squared_distance
from .functional import score
from .segmentation_metric import SegmentationMetric
from .streaming_metric import MetricFacts


class WeightedFBeta(SegmentationMetric):
    """Weighted F-measure of predicted masks."""

    score_function = staticmethod(score)
    metrics = ("weighted_f_beta",)
    options = ("normalize", "zero_division")
    facts = MetricFacts(
        title="Weighted F-measure",
        description="""
            Weighted F-measure: an F-measure of probabilities, without thresholds, in which an error counts less beside
            other errors of the kind and more the farther it is from the mask. Averaged over images.
        """,
        range="0 to 1, higher is better.",
        special_cases={
            "Mask empty": "0; `zero_division`, 0 by default, if no probability is above 0.5.",
            "Prediction 0 everywhere, mask not empty": "0 if the mask keeps 3 pixels away from the border, else more, "
            "since the authors' code takes what lies outside the image for right.",
            "Mask full": "as any other; 1 if the prediction is 1 everywhere.",
            "Constant prediction, one pixel, one row": 'as any other; `normalize="minmax"` leaves constants alone.',
        },
        example_score=0.6578,
        further_use="The farther from the mask, the more a false pixel counts:",
        further_example="""
            >>> row = [[1, 1, 0, 0, 0, 0]]
            >>> near = metric.compute(predictions=[[[1, 1, 1, 0, 0, 0]]], references=[row])
            >>> far = metric.compute(predictions=[[[1, 1, 0, 0, 0, 1]]], references=[row])
            >>> round(near["weighted_f_beta"], 4), round(far["weighted_f_beta"], 4)
            (0.7798, 0.7372)
        """,
        citation="""
            @inproceedings{margolin2014evaluate,
                author = {Margolin, Ran and Zelnik-Manor, Lihi and Tal, Ayellet},
                title = {How to Evaluate Foreground Maps?},
                booktitle = {IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
                pages = {248--255},
                year = {2014},
                doi = {10.1109/CVPR.2014.39}
            }
        """,
    )
