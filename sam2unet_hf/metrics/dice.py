"""Dice coefficient of predicted masks, as an `evaluate` module."""

from .distances import squared_distance
from .functional import score
from .segmentation_metric import OVERLAP_CASES, SegmentationMetric
from .streaming_metric import MetricFacts


class Dice(SegmentationMetric):
    """Dice coefficient of predicted masks."""

    score_function = staticmethod(score)
    metrics = ("dice",)
    options = ("normalize", "zero_division")
    facts = MetricFacts(
        title="Dice",
        description="""
            Dice coefficient 2 |A and B| / (|A| + |B|) of predicted mask A and reference mask B: twice their overlap by
            their sizes, averaged over images. It equals the F1 score of the pixels.
        """,
        range="0 to 1, higher is better. Papers' mDice is `mean_dice`.",
        special_cases=OVERLAP_CASES,
        example_score=0.6667,
        further_use="Overlapping regions, the convention of BraTS for empty ones, and images added one by one:",
        further_example="""
            >>> whole, core = [[1, 1], [1, 0]], [[0, 0], [0, 0]]
            >>> metric = evaluate.load("./dice.py", zero_division=1)
            >>> metric.add(prediction=[whole, core], reference=[[[1, 1], [0, 0]], core])
            >>> scores = metric.compute(regions=["WT", "TC"])
            >>> round(scores["dice_WT"], 4), scores["dice_TC"], round(scores["dice"], 4)
            (0.8, 1.0, 0.9)
        """,
        citation="""
            @article{dice1945measures,
                author = {Dice, Lee R.},
                title = {Measures of the Amount of Ecologic Association Between Species},
                journal = {Ecology},
                volume = {26},
                number = {3},
                pages = {297--302},
                year = {1945},
                doi = {10.2307/1932409}
            }
        """,
    )
