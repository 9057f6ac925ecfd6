"""Dice coefficient of tumour regions in volumes, per patient, as an `evaluate` module."""

from collections.abc import Mapping, Sequence
from typing import Any

import evaluate

from .volume_functional import score_volume
from .volume_metric import RESULT_DESCRIPTION, VOLUME_FEATURES, VOLUMES_DESCRIPTION, VolumeMetric


_DESCRIPTION = """
Dice coefficient 2 |A and B| / (|A| + |B|) of predicted region A and reference region B in label volumes: twice
their overlap by their sizes, per region and patient, averaged over patients as BraTS does.
"""
_CITATION = """
@article{dice1945measures,
    author = {Dice, Lee R.},
    title = {Measures of the Amount of Ecologic Association Between Species},
    journal = {Ecology},
    volume = {26},
    number = {3},
    pages = {297--302},
    year = {1945},
    doi = {10.2307/1932409}
}
"""
_INPUTS_DESCRIPTION = f"""{VOLUMES_DESCRIPTION}\
{RESULT_DESCRIPTION.format(key="volume_dice")}
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("volume_dice.py")  # path of this file, or id of its Space
    >>> prediction, reference = [[[2, 1, 0, 0], [2, 2, 0, 0]]], [[[2, 0, 0, 0], [2, 0, 0, 0]]]
    >>> scores = metric.compute(predictions=[prediction], references=[reference])
    >>> round(scores["volume_dice_WT"], 4)
    0.6667
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class VolumeDice(VolumeMetric):
    """Dice coefficient of tumour regions in volumes, per patient."""

    measures = ("volume_dice",)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=VOLUME_FEATURES,
            reference_urls=["https://doi.org/10.2307/1932409"],
        )

    def _score(
        self, prediction: Any, reference: Any, *, regions: Mapping[str, Sequence[int]] | None = None
    ) -> dict[str, dict[str, float]]:
        return score_volume(prediction, reference, self.measures, regions=regions)


__all__ = ["VolumeDice"]
