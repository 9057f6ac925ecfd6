"""95 % Hausdorff distance of the lesions of tumour regions, in mm, per patient, as an `evaluate` module."""

from .lesion_functional import score_lesions
from .streaming_metric import MetricFacts
from .volume_functional import score_volume
from .volume_metric import LESION_DETAILS, PANOPTICA_CITATION, POOLED_DETAILS, VolumeMetric


class LesionHausdorff95(VolumeMetric):
    """95 % Hausdorff distance of the lesions of tumour regions, in mm, per patient."""

    score_function = staticmethod(score_lesions)
    metrics = ("lesion_hausdorff95_pooled_mm", "matched_lesion_hausdorff95_pooled_mm")
    options = ("regions", "spacing", "one_empty_mm", "min_lesion_mm3")
    facts = MetricFacts(
        title="Lesion-wise Hausdorff 95",
        description="""
            95 % Hausdorff distance of single lesions of predicted regions in label volumes, in mm, so that a small
            lesion counts as much as a large one, per region and patient, averaged over patients as BraTS does.
        """,
        range="0 or more, in mm, lower is better.",
        details=LESION_DETAILS + POOLED_DETAILS,
        special_cases={
            "No lesion in reference and prediction": "0.",
            "Lesions in one of them alone, or no lesion of one meets one of the other": "`one_empty_mm`, 373.13 by "
            "default. BraTS 2026 takes 373 for metastases, and infinity for others.",
        },
        example_score=3.0,
        further_use="A lesion that was found and one that was missed, with the distance of BraTS 2026 for the latter:",
        further_example="""
            >>> prediction, reference = [[[3, 0, 0, 0, 0, 0]]], [[[3, 3, 0, 0, 3, 3]]]
            >>> scores = metric.compute(predictions=[prediction], references=[reference], one_empty_mm=373)
            >>> [round(scores[f"{name}lesion_hausdorff95_pooled_mm_ET"], 2) for name in ("matched_", "")]
            [0.9, 186.95]
        """,
        citation=PANOPTICA_CITATION,
    )
