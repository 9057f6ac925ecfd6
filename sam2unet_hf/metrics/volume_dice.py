"""Dice coefficient of tumour regions in volumes, per patient, as an `evaluate` module."""

from .streaming_metric import MetricFacts
from .volume_functional import score_volume
from .volume_metric import VolumeMetric


class VolumeDice(VolumeMetric):
    """Dice coefficient of tumour regions in volumes, per patient."""

    score_function = staticmethod(score_volume)
    metrics = ("volume_dice",)
    options = ("regions",)
    facts = MetricFacts(
        title="Volume Dice",
        description="""
            Dice coefficient 2 |A and B| / (|A| + |B|) of predicted region A and reference region B in label volumes:
            twice their overlap by their sizes, per region and patient, averaged over patients as BraTS does.
        """,
        range="0 to 1, higher is better.",
        special_cases={
            "Reference and prediction both empty": "1.",
            "One of them empty": "0, however few voxels the other has.",
            "Region fills the volume": "as any other.",
        },
        example_score=0.6667,
        further_use="Patients added one by one, so that one volume at a time is in memory, and the scores of each:",
        further_example="""
            >>> metric = evaluate.load("./volume_dice.py", regions={"WT": [1, 2, 3], "TC": [1, 3]})
            >>> metric.add(prediction=prediction, reference=reference)
            >>> metric.add(prediction=reference, reference=reference)
            >>> scores = metric.compute()
            >>> round(scores["volume_dice_WT"], 4), scores["volume_dice_TC"]
            (0.8333, 0.5)
            >>> scores["volume_dice_per_patient"]["TC"]
            [0.0, 1.0]
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
