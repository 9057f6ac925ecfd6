"""Dice coefficient of the lesions of tumour regions, per patient, and how many were found, as an `evaluate` module."""

from .lesion_functional import score_lesions
from .streaming_metric import MetricFacts
from .volume_functional import score_volume
from .volume_metric import LESION_DETAILS, PANOPTICA_CITATION, VolumeMetric


class LesionDice(VolumeMetric):
    """Dice coefficient of the lesions of tumour regions, per patient, and how many were found."""

    score_function = staticmethod(score_lesions)
    metrics = ("lesion_dice", "matched_lesion_dice", "lesion_f1")
    options = ("regions", "spacing", "min_lesion_mm3")
    facts = MetricFacts(
        title="Lesion-wise Dice",
        description="""
            Dice coefficient of single lesions of predicted regions in label volumes, so that a small lesion counts as
            much as a large one, and the share of lesions that were found, per region and patient, averaged over
            patients as BraTS does.
        """,
        range="0 to 1, higher is better.",
        details=LESION_DETAILS,
        special_cases={
            "No lesion in reference and prediction": "1.",
            "Lesions in one of them alone, or no lesion of one meets one of the other": "0.",
            "All lesions of the reference below `min_lesion_mm3`": "`lesion_dice` is 0 if there are spurious lesions, "
            "else 1.",
        },
        example_score=0.6667,
        further_use="A lesion that was found and one that was missed, and how much they count for each mean:",
        further_example="""
            >>> prediction, reference = [[[3, 0, 0, 0, 0, 0]]], [[[3, 3, 0, 0, 3, 3]]]
            >>> scores = metric.compute(predictions=[prediction], references=[reference])
            >>> [round(scores[f"{name}_ET"], 4) for name in ("lesion_dice", "matched_lesion_dice", "lesion_f1")]
            [0.3333, 0.6667, 0.6667]
        """,
        citation=PANOPTICA_CITATION,
    )
