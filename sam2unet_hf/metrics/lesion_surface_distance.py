"""Normalised surface distance of the lesions of tumour regions, per patient, as an `evaluate` module."""

from .lesion_functional import score_lesions
from .streaming_metric import MetricFacts
from .volume_functional import score_volume
from .volume_metric import LESION_DETAILS, NSD_CITATION, NSD_DETAILS, VolumeMetric


class LesionSurfaceDistance(VolumeMetric):
    """Normalised surface distance of the lesions of tumour regions, per patient."""

    score_function = staticmethod(score_lesions)
    metrics = (
        "lesion_nsd_1mm",
        "lesion_nsd_0.5mm",
        "matched_lesion_nsd_1mm",
        "matched_lesion_nsd_0.5mm",
    )
    options = ("regions", "spacing", "min_lesion_mm3")
    facts = MetricFacts(
        title="Lesion-wise normalised surface distance",
        description="""
            Normalised surface distance of single lesions of predicted regions in label volumes, at tolerances of 0.5
            and 1 mm: the share of the surface that was hit, so that a small lesion counts as much as a large one, per
            region and patient, averaged over patients as BraTS does.
        """,
        range="0 to 1, higher is better.",
        details=LESION_DETAILS + NSD_DETAILS,
        special_cases={
            "No lesion in reference and prediction": "1.",
            "Lesions in one of them alone, or no lesion of one meets one of the other": "0.",
        },
        example_score=0.75,
        further_use="A lesion that was found and one that was missed:",
        further_example="""
            >>> prediction, reference = [[[3, 0, 0, 0, 0, 0]]], [[[3, 3, 0, 0, 3, 3]]]
            >>> scores = metric.compute(predictions=[prediction], references=[reference])
            >>> scores["lesion_nsd_1mm_ET"], scores["matched_lesion_nsd_1mm_ET"], scores["matched_lesion_nsd_0.5mm_ET"]
            (0.5, 1.0, 0.75)
        """,
        citation=NSD_CITATION,
    )
