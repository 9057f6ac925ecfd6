"""Pooled 95 % Hausdorff distance of tumour regions in volumes, in mm, per patient, as an `evaluate` module."""

from .lesion_functional import score_lesions
from .streaming_metric import MetricFacts
from .volume_functional import score_volume
from .volume_metric import PANOPTICA_CITATION, POOLED_DETAILS, VolumeMetric


class Hausdorff95Pooled(VolumeMetric):
    """Pooled 95 % Hausdorff distance of tumour regions in volumes, in mm, per patient."""

    score_function = staticmethod(score_lesions)
    metrics = ("hausdorff95_pooled_mm",)
    options = ("regions", "spacing", "one_empty_mm")
    facts = MetricFacts(
        title="Hausdorff 95, pooled",
        description="""
            95 % Hausdorff distance of predicted regions in label volumes as BraTS 2026 takes it, in mm: the distance
            within which 95 % of the surface voxels of both masks together have one of the other mask, per region and
            patient, averaged over patients.
        """,
        range="0 or more, in mm, lower is better.",
        details=POOLED_DETAILS,
        special_cases={
            "Reference and prediction both empty": "0.",
            "One of them empty": "`one_empty_mm`, 373.13 by default. BraTS 2026 takes 373.",
            "No voxel in common": "`one_empty_mm`, however near they are, as in BraTS 2026.",
            "Region at the border of the volume": "its voxels there are surface.",
        },
        example_score=3.0,
        further_use="A second part far away, less than 5 % of both surfaces; `hausdorff95_mm` would be 13.5 mm:",
        further_example="""
            >>> prediction, reference = [[[3] * 30 + [0] * 31]], [[[3] * 30 + [0] * 29 + [3] * 2]]
            >>> scores = metric.compute(predictions=[prediction], references=[reference])
            >>> scores["hausdorff95_pooled_mm_ET"]
            0.0
        """,
        citation=PANOPTICA_CITATION,
    )
