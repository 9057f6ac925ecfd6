"""Clean-up of what a model found in a patient: thresholds, small components and small regions, by rules in a file."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from .head_sam2unet import bounding_box
from .regions_sam2unet import region_levels


CLEAN_UP_FILE = "clean_up.json"  # beside a checkpoint, or beside the list of members of an ensemble
# What the rules gain, in the record of a file: region name -> these values, means over patients.
GAINS = "patients_of_other_folds"
GAIN_VALUES = ("dice_before", "false_components_before", "dice_after", "false_components_after")
_NEIGHBOURS = np.ones((3, 3, 3))  # voxels that touch at least at a corner


@dataclass(frozen=True)
class RegionRule:
    """What is kept of a region.

    Args:
        threshold: A voxel belongs to the region if its probability is above this, in [0, 1].
        min_component_ml: Connected components that are smaller are removed.
        min_region_ml: If less than this is left, all of it is removed. Enhancing tumour that is removed stays tumour
            core, as by the rule that nnU-Net used for BraTS.

    Raises:
        ValueError: If a value is out of range.
    """

    threshold: float = 0.5
    min_component_ml: float = 0.0
    min_region_ml: float = 0.0

    def __post_init__(self):
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be a number from 0 up, got {value!r}.")
        if self.threshold > 1:
            raise ValueError(f"`threshold` must be a probability in [0, 1], got {self.threshold}.")


class CleanUp:
    """Rules for the regions of a model, which [`~clean_up.choose_clean_up`] chooses and a file beside it keeps.

    Args:
        rules: Region name -> rule. Regions without one have a threshold of 0.5, and nothing of them is removed.
        record: How the rules were chosen, for the reader of the file.
    """

    def __init__(self, rules: Mapping[str, RegionRule], record: Mapping[str, Any] | None = None):
        self.rules = dict(rules)
        self.record = dict(record or {})

    @classmethod
    def load(cls, path: str | os.PathLike, regions: Mapping[str, Sequence[int]] | None = None) -> "CleanUp":
        """Read the rules of a file.

        Args:
            path: The file.
            regions: Those of the model that the rules are for, to check that it has all that they name.

        Raises:
            ValueError: If the file is damaged, a rule is unknown or out of range, or it is for a region that the model
                has not; the message names the file.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            rules = {name: RegionRule(**rule) for name, rule in content.pop("regions").items()}
            for gain in content.get(GAINS, {}).values():
                # A file of an older version has no false components.
                [float(gain[name]) for name in GAIN_VALUES if name in gain or name.startswith("dice")]
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            names = ", ".join(field.name for field in fields(RegionRule))
            raise ValueError(
                f"`{path}` must hold, under `regions`, for each region some of {names}: {err}. Choose the rules anew, "
                "or remove the file."
            ) from err
        clean_up = cls(rules, content)
        if regions is not None:
            clean_up.check_regions(regions, f"`{path}`")
        return clean_up

    def save(self, folder: str | os.PathLike) -> Path:
        """Write the rules into a folder in one step, as `clean_up.json`."""
        path = Path(folder, CLEAN_UP_FILE)
        content = {"regions": {name: asdict(rule) for name, rule in self.rules.items()}, **self.record}
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
        return path

    def check_regions(self, regions: Mapping[str, Sequence[int]], source: str = "The clean-up") -> None:
        """Check that a model has the regions that there are rules for.

        Args:
            regions: Region name -> the label ids it joins.
            source: What the error calls the rules.

        Raises:
            ValueError: If one is missing.
        """
        if unknown := sorted({*self.rules} - {*regions}):
            raise ValueError(
                f"{source} has rules for {unknown}, the model segments {list(regions)}. Choose the rules on "
                "segmentations of this model, or leave them out."
            )

    def apply(
        self,
        probabilities: np.ndarray,
        regions: Mapping[str, Sequence[int]],
        spacing_mm: Sequence[float],
        threshold: float | None = None,
    ) -> np.ndarray:
        """Return which voxels belong to each region.

        A region holds the regions inside it: its probability is at least theirs, and what is removed of it is removed
        of them, too.

        Args:
            probabilities: Of shape `(regions, *volume)`, in [0, 1].
            regions: Region name -> the label ids it joins, in the order of the probabilities.
            spacing_mm: Size of a voxel along the three axes.
            threshold: Takes the place of the thresholds of all rules, in [0, 1].

        Returns:
            Booleans of the shape of the probabilities.

        Raises:
            ValueError: If the rules name a region that there is not, there is not one channel for each region, or
                `threshold` is out of range.
        """
        self.check_regions(regions)
        if len(probabilities) != len(regions):
            raise ValueError(f"`probabilities` must have {len(regions)} channels, got shape {probabilities.shape}.")
        rules = {name: self.rules.get(name, RegionRule()) for name in regions}
        if threshold is not None:
            rules = {name: replace(rule, threshold=threshold) for name, rule in rules.items()}
        masks = np.zeros(probabilities.shape, bool)
        box = bounding_box(probabilities.max(axis=0) > min(rule.threshold for rule in rules.values()))
        inside = with_inner_regions(probabilities[:, *box], regions)
        kept: dict[str, np.ndarray] = {}
        for name in (name for level in region_levels(regions) for name in level):
            place = list(regions).index(name)
            found = inside[place] > rules[name].threshold
            for outer, mask in kept.items():
                if set(regions[name]) < set(regions[outer]):
                    found &= mask
            kept[name] = masks[place][box] = keep(found, rules[name], math.prod(spacing_mm) / 1000)
        return masks


def with_inner_regions(probabilities: np.ndarray, regions: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Return at each voxel the largest probability among a region and those inside it, for each region."""
    return np.stack(
        [
            probabilities[[set(inner) <= set(outer) for inner in regions.values()]].max(axis=0)
            for outer in regions.values()
        ]
    )


def keep(mask: np.ndarray, rule: RegionRule, voxel_ml: float) -> np.ndarray:
    """Return what a rule keeps of a mask of booleans."""
    kept = mask.copy()
    if rule.min_component_ml:
        box = bounding_box(mask)  # labelling takes the most time
        components, sizes, _ = component_sizes(mask[box])
        kept[box] &= np.concatenate([[False], sizes * voxel_ml >= rule.min_component_ml])[components]
    if np.count_nonzero(kept) * voxel_ml < rule.min_region_ml:
        kept[:] = False
    return kept


def component_sizes(mask: np.ndarray, reference: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, Any]:
    """Number the connected components of a mask from 1 up.

    Returns:
        The numbers, of the mask's shape; the voxels of each component; and those that it has in common with a
        reference, if there is one.
    """
    components, count = ndimage.label(mask, structure=_NEIGHBOURS)
    sizes = np.bincount(components[mask], minlength=count + 1)[1:]
    common = None if reference is None else np.bincount(components[mask & reference], minlength=count + 1)[1:]
    return components, sizes, common


__all__ = ["CLEAN_UP_FILE", "GAINS", "GAIN_VALUES", "CleanUp", "RegionRule"]
