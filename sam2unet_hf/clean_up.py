"""Choose a clean-up by patients whose tumours are known, and say what it gains on others."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from .clean_up_sam2unet import CleanUp, RegionRule, component_sizes


# Values that are tried. The plain ones come first: of equally good rules the first is taken.
THRESHOLDS = (0.5, 0.45, 0.55, 0.4, 0.6, 0.35, 0.65, 0.3, 0.7, 0.25, 0.75, 0.2, 0.8, 0.1, 0.9)
MIN_COMPONENT_ML = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
MIN_REGION_ML = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
RULES = [RegionRule(*values) for values in product(THRESHOLDS, MIN_COMPONENT_ML, MIN_REGION_ML)]


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

    def dice(self, rule: RegionRule) -> float:
        """Return the Dice of what a rule keeps; 1 if neither that nor the reference has a voxel."""
        sizes, common = self.sizes[rule.threshold], self.common[rule.threshold]
        is_kept = sizes * self.voxel_ml >= rule.min_component_ml
        size, overlap = int(sizes[is_kept].sum()), int(common[is_kept].sum())
        if size * self.voxel_ml < rule.min_region_ml:
            size = overlap = 0
        total = size + self.reference_size
        return 2 * overlap / total if total else 1.0


def find_components(probabilities: np.ndarray, reference: np.ndarray, voxel_ml: float) -> RegionComponents:
    """Return what the choice needs to know of a region of one patient.

    Args:
        probabilities: Of the region, of the shape of the volume, in [0, 1].
        reference: Whether a voxel belongs to the region, booleans of the same shape.
        voxel_ml: Size of a voxel in millilitres.
    """
    sizes, common = {}, {}
    (box, *_) = ndimage.find_objects((probabilities > min(THRESHOLDS)).view(np.uint8)) or [(slice(0, 0),) * 3]
    inside, expected = probabilities[box], reference[box]
    for threshold in THRESHOLDS:
        _, sizes[threshold], common[threshold] = component_sizes(inside > threshold, expected)
    return RegionComponents(sizes, common, int(np.count_nonzero(reference)), voxel_ml)


def choose_rule(patients: Sequence[RegionComponents]) -> RegionRule:
    """Return the rule with the highest mean Dice over patients."""
    means = [np.mean([patient.dice(rule) for patient in patients]) for rule in RULES]
    return RULES[int(np.argmax(means))]


def choose_clean_up(patients: Mapping[str, Mapping[str, RegionComponents]], folds: Sequence[Sequence[str]]) -> CleanUp:
    """Choose the rules of all regions by patients that no model was trained on.

    The record of what comes out says what the rules gain: each fold's patients are scored by rules that were chosen on
    those of the other folds.

    Args:
        patients: Patient -> region name -> what [`find_components`] returns.
        folds: The patients of each fold.

    Raises:
        ValueError: If there are fewer than two folds, or a patient is in none or several.
    """
    listed = sorted(name for fold in folds for name in fold)
    if len(folds) < 2 or listed != sorted(patients):
        raise ValueError(f"`folds` must be two or more that hold each of {len(patients)} patients once, got {folds}.")
    regions = list(next(iter(patients.values())))
    rules: dict[str, RegionRule] = {}
    gains: dict[str, Any] = {}
    for region in regions:
        own = {name: found[region] for name, found in patients.items()}
        rules[region] = choose_rule(list(own.values()))
        before = [own[name].dice(RegionRule()) for fold in folds for name in fold]
        after = []
        for fold in folds:
            rule = choose_rule([found for name, found in own.items() if name not in fold])
            after += [own[name].dice(rule) for name in fold]
        gains[region] = {"dice_before": float(np.mean(before)), "dice_after": float(np.mean(after))}
    record = {
        "chosen_on": f"{len(patients)} patients in {len(folds)} folds, segmented by models not trained on them",
        "patients_of_other_folds": gains,
    }
    return CleanUp(rules, record)


__all__ = ["RegionComponents", "choose_clean_up", "find_components"]
