"""Choose a clean-up by patients whose tumours are known, and say what it gains on others."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .clean_up_sam2unet import GAIN_VALUES, GAINS, CleanUp, RegionRule, component_sizes, with_inner_regions
from .head_sam2unet import bounding_box


# Values that are tried, in the order of plainness that `best_rule` relies on: thresholds first.
THRESHOLDS = (0.5, 0.45, 0.55, 0.4, 0.6, 0.35, 0.65, 0.3, 0.7, 0.25, 0.75, 0.2, 0.8, 0.1, 0.9)
MIN_COMPONENT_ML = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
MIN_REGION_ML = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
RULES = [RegionRule(*values) for values in product(THRESHOLDS, MIN_COMPONENT_ML, MIN_REGION_ML)]


class Judgement(NamedTuple):
    """How good the segmentation of a region of one patient is.

    Args:
        dice: Its Dice; 1 if neither it nor the reference has a voxel.
        false_components: How many of its connected components have no voxel of the reference.
    """

    dice: float
    false_components: int

    @property
    def score(self) -> float:
        """The mean of Dice and Dice divided by one more than the number of false components, in [0, 1].

        The latter is lesion-wise Dice of a tumour that is one lesion, as BraTS 2023 and 2024 compute it: a false
        component counts as one more lesion with a Dice of 0.
        """
        return (self.dice + self.dice / (1 + self.false_components)) / 2


class RegionComponents(NamedTuple):
    """The connected components of a region of one patient, above each threshold.

    Args:
        sizes: Threshold -> voxels of each component.
        common: Threshold -> those of each component that belong to the region in the reference.
        reference_size: Voxels of the region in the reference.
        voxel_ml: Size of a voxel in millilitres.
    """

    sizes: dict[float, np.ndarray]
    common: dict[float, np.ndarray]
    reference_size: int
    voxel_ml: float

    def judge(self, rule: RegionRule) -> Judgement:
        """Return how good what a rule keeps is."""
        sizes, common = self.sizes[rule.threshold], self.common[rule.threshold]
        is_kept = sizes * self.voxel_ml >= rule.min_component_ml
        if sizes[is_kept].sum() * self.voxel_ml < rule.min_region_ml:
            is_kept[:] = False
        size, overlap = int(sizes[is_kept].sum()), int(common[is_kept].sum())
        total = size + self.reference_size
        return Judgement(2 * overlap / total if total else 1.0, int(np.count_nonzero(common[is_kept] == 0)))


def find_components(
    probabilities: np.ndarray,
    reference: np.ndarray,
    regions: Mapping[str, Sequence[int]],
    spacing_mm: Sequence[float],
) -> dict[str, RegionComponents]:
    """Return what the choice needs to know of the regions of one patient.

    Args:
        probabilities: Of shape `(regions, *volume)`, in [0, 1].
        reference: Label ids, of the shape of the volume.
        regions: Region name -> the label ids it joins, in the order of the probabilities.
        spacing_mm: Size of a voxel along the three axes.
    """
    box = bounding_box(probabilities.max(axis=0) > min(THRESHOLDS))
    found = {}
    for inside, (name, label_ids) in zip(
        with_inner_regions(probabilities[:, *box], regions), regions.items(), strict=True
    ):
        expected = np.isin(reference, label_ids)
        sizes, common = {}, {}
        for threshold in THRESHOLDS:
            _, sizes[threshold], common[threshold] = component_sizes(inside > threshold, expected[box])
        found[name] = RegionComponents(
            sizes, common, int(np.count_nonzero(expected)), math.prod(map(float, spacing_mm)) / 1000
        )
    return found


def save_components(path: str | os.PathLike, components: Mapping[str, RegionComponents]) -> None:
    """Write the components of a patient as JSON, in one step.

    Args:
        path: The file.
        components: What [`find_components`] returns.
    """
    content = {
        region: {
            **own._asdict(),
            "sizes": {threshold: sizes.tolist() for threshold, sizes in own.sizes.items()},
            "common": {threshold: common.tolist() for threshold, common in own.common.items()},
        }
        for region, own in components.items()
    }
    partial = Path(path).with_name(f".{Path(path).name}.partial")
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(partial, path)


def load_components(path: str | os.PathLike) -> dict[str, RegionComponents]:
    """Read the components of a patient.

    Args:
        path: A file that [`save_components`] wrote.
    """
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    for own in content.values():
        for name in ("sizes", "common"):
            own[name] = {float(threshold): np.array(values, np.int64) for threshold, values in own[name].items()}
    return {region: RegionComponents(**own) for region, own in content.items()}


def choose_clean_up(patients: Mapping[str, Mapping[str, RegionComponents]], folds: Sequence[Sequence[str]]) -> CleanUp:
    """Choose the rules of all regions by patients that no model was trained on.

    A rule is as good as its mean [`Judgement.score`] over patients: Dice alone is that of the large components, and
    hardly tells how many small ones are false. [`best_rule`] takes the plainest of those that are about as good as the
    best. The record of what comes out says what choosing so gains: each fold's patients are judged by the rule that is
    taken on those of the other folds. A region whose score this does not raise gets the plain rule, a threshold of 0.5
    that removes nothing, whatever is best on all patients together.

    Each region is judged by itself. Where the rule of a region removes something, that is removed of the regions
    inside it too, for which the scores do not account.

    Args:
        patients: Patient -> region name -> what [`find_components`] returns.
        folds: The patients of each fold.

    Raises:
        ValueError: If there are fewer than two folds, one is empty, or a patient is in none or several.
    """
    listed = sorted(name for fold in folds for name in fold)
    if len(folds) < 2 or not all(folds) or listed != sorted(patients):
        raise ValueError(f"`folds` must be two or more that hold each of {len(patients)} patients once, got {folds}.")
    rules: dict[str, RegionRule] = {}
    gains: dict[str, Any] = {}
    for region in next(iter(patients.values())):
        judged = {name: [found[region].judge(rule) for rule in RULES] for name, found in patients.items()}
        scores = {name: np.array([judgement.score for judgement in own]) for name, own in judged.items()}
        plain = RULES.index(RegionRule())
        before, after = [], []
        for fold in folds:
            best = best_rule([own for name, own in scores.items() if name not in fold])
            before += [judged[name][plain] for name in fold]
            after += [judged[name][best] for name in fold]
        means = [*np.mean(before, axis=0).tolist(), *np.mean(after, axis=0).tolist()]
        gains[region] = dict(zip(GAIN_VALUES, means, strict=True))
        helps = sum(judgement.score for judgement in after) > sum(judgement.score for judgement in before)
        rules[region] = RULES[best_rule(list(scores.values()))] if helps else RULES[plain]
    record = {
        "chosen_on": f"{len(patients)} patients in {len(folds)} folds, segmented by models not trained on them",
        GAINS: gains,
    }
    return CleanUp(rules, record)


def best_rule(scores: Sequence[np.ndarray]) -> int:
    """Return the place of the best rule, or of the plainest of those that it does not clearly surpass.

    A rule surpasses another clearly if its mean score is higher by more than two standard errors of the difference
    over patients. Without that, thresholds are chosen by chance.

    Args:
        scores: For each patient those of all rules, the plainer ones first.
    """
    table = np.stack(scores)
    lost = table[:, [np.argmax(table.mean(axis=0))]] - table
    error = lost.std(axis=0, ddof=1) / math.sqrt(len(table)) if len(table) > 1 else 0.0
    return int(np.argmax(lost.mean(axis=0) <= 2 * error + 1e-12))


__all__ = ["Judgement", "RegionComponents", "choose_clean_up", "find_components", "load_components", "save_components"]
