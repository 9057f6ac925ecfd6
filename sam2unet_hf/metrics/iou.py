"""Intersection over union of predicted masks, as an `evaluate` module."""

from .distances import squared_distance
from .functional import score
from .segmentation_metric import OVERLAP_CASES, SegmentationMetric
from .streaming_metric import MetricFacts


class Iou(SegmentationMetric):
    """Intersection over union of predicted masks."""

    score_function = staticmethod(score)
    metrics = ("iou",)
    options = ("normalize", "zero_division")
    facts = MetricFacts(
        title="IoU",
        description="""
            Intersection over union |A and B| / |A or B| of predicted mask A and reference mask B (Jaccard index),
            averaged over images.
        """,
        range="0 to 1, higher is better. Papers' mIoU is `mean_iou`.",
        special_cases=OVERLAP_CASES,
        example_score=0.5,
        further_use="8-bit maps, stretched to their full range as in the protocol of the reference implementation:",
        further_example="""
            >>> import numpy as np
            >>> map_8_bit = np.array([[200, 150], [50, 100]], dtype=np.uint8)
            >>> scores = metric.compute(predictions=[map_8_bit], references=[[[255, 255], [0, 0]]], normalize="minmax")
            >>> round(scores["iou"], 4), round(scores["max_iou"], 4)
            (1.0, 1.0)
        """,
        citation="""
            @article{jaccard1912distribution,
                author = {Jaccard, Paul},
                title = {The Distribution of the Flora in the Alpine Zone},
                journal = {New Phytologist},
                volume = {11},
                number = {2},
                pages = {37--50},
                year = {1912},
                doi = {10.1111/j.1469-8137.1912.tb05611.x}
            }
        """,
    )
