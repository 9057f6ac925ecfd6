"""Normalised surface distance of tumour regions in volumes, at 0.5 and 1 mm, per patient, as an `evaluate` module."""

from .lesion_functional import score_lesions
from .streaming_metric import MetricFacts
from .volume_functional import score_volume
from .volume_metric import NSD_CITATION, NSD_DETAILS, VolumeMetric


class NormalizedSurfaceDistance(VolumeMetric):
    """Normalised surface distance of tumour regions in volumes, at 0.5 and 1 mm, per patient."""

    score_function = staticmethod(score_lesions)
    metrics = ("nsd_1mm", "nsd_0.5mm")
    options = ("regions", "spacing")
    facts = MetricFacts(
        title="Normalised surface distance",
        description="""
            Normalised surface distance (surface Dice) of predicted regions in label volumes, at tolerances of 0.5 and
            1 mm: the share of the surface that was hit, per region and patient, averaged over patients as BraTS does.
        """,
        range="0 to 1, higher is better.",
        details=NSD_DETAILS,
        special_cases={
            "Reference and prediction both empty": "1.",
            "One of them empty": "0.",
            "No voxel in common": "0, however near they are, as in BraTS 2026.",
            "Region at the border of the volume": "its voxels there are surface.",
            "Flat volumes of one slice": "each voxel is surface.",
        },
        example_score=0.75,
        further_use="Patients of different spacing:",
        further_example="""
            >>> metric.add(prediction=[[[3, 3, 0]]], reference=[[[0, 3, 3]]], spacing=(1, 1, 1))
            >>> metric.add(prediction=[[[3, 3, 0]]], reference=[[[0, 3, 3]]], spacing=(1, 1, 0.5))
            >>> scores = metric.compute()
            >>> scores["nsd_0.5mm_per_patient"]["ET"], scores["nsd_1mm_per_patient"]["ET"]
            ([0.5, 1.0], [1.0, 1.0])
        """,
        citation=NSD_CITATION,
    )
