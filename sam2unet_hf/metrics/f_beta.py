"""F-measure of predicted masks, as an `evaluate` module."""

from .distances import squared_distance
from .functional import score
from .segmentation_metric import OVERLAP_CASES, SegmentationMetric
from .streaming_metric import MetricFacts


class FBeta(SegmentationMetric):
    """F-measure of predicted masks."""

    score_function = staticmethod(score)
    metrics = ("f_beta",)
    options = ("normalize", "zero_division", "beta_squared")
    facts = MetricFacts(
        title="F-measure",
        description="""
            F-measure (1 + beta^2) P R / (beta^2 P + R) of the pixels' precision P and recall R, averaged over images.
            With the usual beta^2 = 0.3 precision counts more than recall.
        """,
        range="0 to 1, higher is better.",
        special_cases=OVERLAP_CASES,
        example_score=0.5652,
        further_use="With beta^2 = 1 it is the F1 score, and so the Dice coefficient:",
        further_example="""
            >>> scores = metric.compute(predictions=[prediction], references=[reference], beta_squared=1)
            >>> round(scores["f_beta"], 4), round(scores["adaptive_f_beta"], 4)
            (0.6667, 1.0)
        """,
        citation="""
            @inproceedings{achanta2009frequency,
                author = {Achanta, Radhakrishna and Hemami, Sheila and Estrada, Francisco and Susstrunk, Sabine},
                title = {Frequency-tuned Salient Region Detection},
                booktitle = {IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
                pages = {1597--1604},
                year = {2009},
                doi = {10.1109/CVPR.2009.5206596}
            }
        """,
    )
