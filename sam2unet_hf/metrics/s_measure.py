"""Structure measure of predicted masks, as an `evaluate` module."""

from .distances import squared_distance
from .functional import score
from .segmentation_metric import SegmentationMetric
from .streaming_metric import MetricFacts


class SMeasure(SegmentationMetric):
    """Structure measure of predicted masks."""

    score_function = staticmethod(score)
    metrics = ("s_measure",)
    options = ("normalize",)
    facts = MetricFacts(
        title="S-measure",
        description="""
            Structure measure (S-measure): similarity of the brightness inside and outside the mask (objects), and of
            the four quadrants around the mask's centre (regions). It needs no threshold. Averaged over images.
        """,
        range="0 to 1, higher is better.",
        special_cases={
            "Mask empty": "1 minus the mean probability.",
            "Mask full": "the mean probability.",
            "Mask and prediction both empty": "1.",
            "Constant prediction": 'as any other; `normalize="minmax"` leaves constants alone.',
            "One pixel": "the mask is empty or full.",
            "One row, or a mask whose centre lies in the last row or column": "the quadrants without pixels count "
            "nothing. `py_sod_metrics` returns NaN there.",
        },
        example_score=0.9235,
        further_use="Of an image without tumour, where it is 1 minus the mean probability:",
        further_example="""
            >>> empty = [[0, 0], [0, 0]]
            >>> scores = metric.compute(predictions=[[[0.5, 0.0], [0.0, 0.0]]], references=[empty])
            >>> round(scores["s_measure"], 4)
            0.875
        """,
        citation="""
            @inproceedings{fan2017structure,
                author = {Fan, Deng-Ping and Cheng, Ming-Ming and Liu, Yun and Li, Tao and Borji, Ali},
                title = {Structure-measure: A New Way to Evaluate Foreground Maps},
                booktitle = {IEEE International Conference on Computer Vision (ICCV)},
                pages = {4558--4567},
                year = {2017},
                doi = {10.1109/ICCV.2017.487}
            }
        """,
    )
