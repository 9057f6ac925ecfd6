"""95 % Hausdorff distance of tumour regions in volumes, in mm, per patient, as an `evaluate` module."""

from collections.abc import Mapping, Sequence
from typing import Any

import evaluate

from .volume_functional import ONE_EMPTY_MM, score_volume
from .volume_metric import DISTANCE_DESCRIPTION, RESULT_DESCRIPTION, VOLUME_FEATURES, VOLUMES_DESCRIPTION, VolumeMetric


_DESCRIPTION = """
95 % Hausdorff distance of predicted regions in label volumes, in mm: the distance within which 95 % of the surface
voxels of either mask have one of the other, per region and patient, averaged over patients as BraTS does.
"""
_CITATION = """
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
"""
_INPUTS_DESCRIPTION = f"""{VOLUMES_DESCRIPTION}{DISTANCE_DESCRIPTION}\
{RESULT_DESCRIPTION.format(key="hausdorff95_mm")}
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("hausdorff_95.py")  # path of this file, or id of its Space
    >>> prediction, reference = [[[2, 1, 0, 0], [2, 2, 0, 0]]], [[[2, 0, 0, 0], [2, 0, 0, 0]]]
    >>> scores = metric.compute(predictions=[prediction], references=[reference], spacing=(1, 1, 3))
    >>> round(scores["hausdorff95_mm_WT"], 4)
    3.0
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class Hausdorff95(VolumeMetric):
    """95 % Hausdorff distance of tumour regions in volumes, in mm, per patient."""

    measures = ("hausdorff95_mm",)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=VOLUME_FEATURES,
            reference_urls=["https://doi.org/10.1109/34.232073"],
        )

    def _score(
        self,
        prediction: Any,
        reference: Any,
        *,
        regions: Mapping[str, Sequence[int]] | None = None,
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        one_empty_mm: float = ONE_EMPTY_MM,
    ) -> dict[str, dict[str, float]]:
        return score_volume(
            prediction, reference, self.measures, regions=regions, spacing=spacing, one_empty_mm=one_empty_mm
        )


__all__ = ["Hausdorff95"]
