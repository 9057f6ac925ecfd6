"""Metrics of BraTS 2026 of tumour regions in volumes: of lesions and of surfaces, as an `evaluate` module."""

from .lesion_functional import LESION_METRICS, score_lesions
from .streaming_metric import MetricFacts
from .volume_functional import score_volume
from .volume_metric import LESION_DETAILS, NSD_DETAILS, PANOPTICA_CITATION, POOLED_DETAILS, VolumeMetric


class LesionReport(VolumeMetric):
    """Metrics of BraTS 2026 of tumour regions in volumes: of lesions and of surfaces."""

    score_function = staticmethod(score_lesions)
    metrics = LESION_METRICS
    options = ("regions", "spacing", "one_empty_mm", "min_lesion_mm3")
    facts = MetricFacts(
        title="Lesion report",
        description="""
            Dice, 95 % Hausdorff distance and normalised surface distance of single lesions, how many were found, and
            pooled Hausdorff distance and normalised surface distance of whole regions in label volumes, per region and
            patient, averaged over patients as BraTS does.
        """,
        range="keys with `hausdorff95` 0 or more, in mm, lower is better; all others 0 to 1, higher is better.",
        details=LESION_DETAILS + POOLED_DETAILS + NSD_DETAILS,
        special_cases={
            "Reference and prediction both empty": "distances are 0, all others 1.",
            "One of them empty": "distances are `one_empty_mm`, all others 0.",
            "No voxel in common": "as if one were empty, as in BraTS 2026.",
        },
        example_score=3.0,
        further_use="Patients added one by one, so that one volume at a time is in memory, each with its spacing:",
        further_example="""
            >>> metric.add(prediction=[[[3, 0, 0, 0, 3]]], reference=[[[3, 3, 0, 0, 0]]], spacing=(1, 1, 1))
            >>> metric.add(prediction=[[[3, 0, 0, 3, 3]]], reference=[[[3, 0, 0, 0, 3]]], spacing=(1, 1, 2))
            >>> scores = metric.compute()
            >>> scores["lesion_nsd_1mm_per_patient"]["ET"], scores["lesion_f1_per_patient"]["ET"]
            ([0.5, 0.875], [0.6666666666666666, 1.0])
        """,
        citation=PANOPTICA_CITATION,
    )
