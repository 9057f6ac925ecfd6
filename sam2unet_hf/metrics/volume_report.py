"""Dice, sensitivity, specificity and 95 % Hausdorff distance of tumour regions in volumes, as an `evaluate` module."""

from collections.abc import Mapping, Sequence
from typing import Any

import evaluate

from .volume_functional import ONE_EMPTY_MM, VOLUME_MEASURES, score_volume
from .volume_metric import DISTANCE_DESCRIPTION, VOLUME_FEATURES, VOLUMES_DESCRIPTION, VolumeMetric


_DESCRIPTION = """
Dice, sensitivity, specificity and 95 % Hausdorff distance of predicted regions in label volumes, per region and
patient, averaged over patients as BraTS does.
"""
_CITATION = """
@article{menze2015brats,
    author = {Menze, Bjoern H. and Jakab, Andras and Bauer, Stefan and others},
    title = {The Multimodal Brain Tumor Image Segmentation Benchmark ({BRATS})},
    journal = {IEEE Transactions on Medical Imaging},
    volume = {34},
    number = {10},
    pages = {1993--2024},
    year = {2015},
    doi = {10.1109/TMI.2014.2377694}
}
"""
_INPUTS_DESCRIPTION = f"""{VOLUMES_DESCRIPTION}{DISTANCE_DESCRIPTION}\

Returns:
    Dictionary with `volume_dice`, `sensitivity`, `specificity` and `hausdorff95_mm`, the means over regions; each once
    more per region, as in `volume_dice_WT`, the mean over patients; and with `_per_patient`, as in
    `volume_dice_per_patient`, which maps each region to the values of the patients, in the order they were added.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("volume_report.py")  # path of this file, or id of its Space
    >>> prediction, reference = [[[2, 1, 0, 0], [2, 2, 0, 0]]], [[[2, 0, 0, 0], [2, 0, 0, 0]]]
    >>> scores = metric.compute(predictions=[prediction], references=[reference], spacing=(1, 1, 3))
    >>> round(scores["volume_dice_WT"], 4)
    0.6667
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class VolumeReport(VolumeMetric):
    """Dice, sensitivity, specificity and 95 % Hausdorff distance of tumour regions in volumes."""

    measures = VOLUME_MEASURES

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=VOLUME_FEATURES,
            reference_urls=["https://doi.org/10.1109/TMI.2014.2377694"],
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


__all__ = ["VolumeReport"]
