"""Sensitivity of tumour regions in volumes, per patient, as an `evaluate` module."""

from collections.abc import Mapping, Sequence
from typing import Any

import evaluate

from .volume_functional import score_volume
from .volume_metric import RESULT_DESCRIPTION, VOLUME_FEATURES, VOLUMES_DESCRIPTION, VolumeMetric


_DESCRIPTION = """
Sensitivity (recall) of predicted regions in label volumes: the share of the reference that was found, per region
and patient, averaged over patients.
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
_INPUTS_DESCRIPTION = f"""{VOLUMES_DESCRIPTION}\
{RESULT_DESCRIPTION.format(key="sensitivity")}
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("sensitivity.py")  # path of this file, or id of its Space
    >>> prediction, reference = [[[2, 1, 0, 0], [2, 2, 0, 0]]], [[[2, 0, 0, 0], [2, 0, 0, 0]]]
    >>> scores = metric.compute(predictions=[prediction], references=[reference])
    >>> round(scores["sensitivity_WT"], 4)
    1.0
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class Sensitivity(VolumeMetric):
    """Sensitivity of tumour regions in volumes, per patient."""

    measures = ("sensitivity",)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=VOLUME_FEATURES,
            reference_urls=["https://doi.org/10.1109/TMI.2014.2377694"],
        )

    def _score(
        self, prediction: Any, reference: Any, *, regions: Mapping[str, Sequence[int]] | None = None
    ) -> dict[str, dict[str, float]]:
        return score_volume(prediction, reference, self.measures, regions=regions)


__all__ = ["Sensitivity"]
