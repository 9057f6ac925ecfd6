"""Dice, sensitivity, specificity and 95 % Hausdorff distance of tumour regions in volumes, as an `evaluate` module."""

from .streaming_metric import MetricFacts
from .volume_functional import VOLUME_METRICS, score_volume
from .volume_metric import BRATS_CITATION, DISTANCE_DETAILS, VolumeMetric


class VolumeReport(VolumeMetric):
    """Dice, sensitivity, specificity and 95 % Hausdorff distance of tumour regions in volumes."""

    score_function = staticmethod(score_volume)
    metrics = VOLUME_METRICS
    options = ("regions", "spacing", "one_empty_mm")
    facts = MetricFacts(
        title="Volume report",
        description="""
            Dice, sensitivity, specificity and 95 % Hausdorff distance of predicted regions in label volumes, per
            region and patient, averaged over patients as BraTS does.
        """,
        range="`hausdorff95_mm` 0 or more, in mm, lower is better; all others 0 to 1, higher is better.",
        details=DISTANCE_DETAILS,
        special_cases={
            "Reference and prediction both empty": "Dice, sensitivity and specificity are 1, the distance 0.",
            "Reference empty, prediction not": "Dice is 0, the distance `one_empty_mm`; sensitivity is 1, since there "
            "was nothing to miss, where the code of BraTS 2023 has 0; specificity is the share of voxels not "
            "predicted.",
            "Prediction empty, reference not": "Dice and sensitivity are 0, specificity is 1, the distance "
            "`one_empty_mm`.",
            "Reference fills the volume": "specificity is 1, since there was no background to get wrong.",
            "Region at the border of the volume": "its voxels there are surface.",
        },
        example_score=0.6667,
        further_use="Patients added one by one, so that one volume at a time is in memory, each with its spacing:",
        further_example="""
            >>> metric.add(prediction=[[[3, 0, 0]]], reference=[[[0, 3, 0]]], spacing=(1, 1, 3))
            >>> metric.add(prediction=[[[2, 2, 0]]], reference=[[[2, 0, 0]]], spacing=(1, 1, 1))
            >>> scores = metric.compute()
            >>> scores["hausdorff95_mm_per_patient"]["ET"], round(scores["specificity_WT"], 4)
            ([3.0, 0.0], 0.5)
        """,
        citation=BRATS_CITATION,
    )
