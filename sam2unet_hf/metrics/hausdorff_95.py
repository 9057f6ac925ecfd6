"""95 % Hausdorff distance of tumour regions in volumes, in mm, per patient, as an `evaluate` module."""

from .streaming_metric import MetricFacts
from .volume_functional import score_volume
from .volume_metric import DISTANCE_DETAILS, VolumeMetric


class Hausdorff95(VolumeMetric):
    """95 % Hausdorff distance of tumour regions in volumes, in mm, per patient."""

    score_function = staticmethod(score_volume)
    metrics = ("hausdorff95_mm",)
    options = ("regions", "spacing", "one_empty_mm")
    facts = MetricFacts(
        title="Hausdorff 95",
        description="""
            95 % Hausdorff distance of predicted regions in label volumes, in mm: the distance within which 95 % of the
            surface voxels of either mask have one of the other, per region and patient, averaged over patients as
            BraTS does.
        """,
        range="0 or more, in mm, lower is better.",
        details=DISTANCE_DETAILS,
        special_cases={
            "Reference and prediction both empty": "0.",
            "One of them empty": "`one_empty_mm`, 373.13 by default. BraTS 2023 takes 374, BraTS 2026 373.",
            "Region at the border of the volume": "its voxels there are surface.",
            "One voxel": "it is its own surface.",
            "Flat volumes of one slice": "each voxel is surface, since erosion leaves none.",
        },
        example_score=3.0,
        further_use="Patients of different spacing, and an enhancing tumour that is predicted where there is none:",
        further_example="""
            >>> metric.add(prediction=[[[3, 0, 0]]], reference=[[[0, 3, 0]]], spacing=(1, 1, 3))
            >>> metric.add(prediction=[[[3, 0, 0]]], reference=[[[1, 0, 0]]], spacing=(0.5, 0.5, 0.5))
            >>> scores = metric.compute()
            >>> [round(distance, 2) for distance in scores["hausdorff95_mm_per_patient"]["ET"]]
            [3.0, 373.13]
        """,
        citation="""
            @article{huttenlocher1993comparing,
                author = {Huttenlocher, Daniel P. and Klanderman, Gregory A. and Rucklidge, William J.},
                title = {Comparing Images Using the {H}ausdorff Distance},
                journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence},
                volume = {15},
                number = {9},
                pages = {850--863},
                year = {1993},
                doi = {10.1109/34.232073}
            }
        """,
    )
