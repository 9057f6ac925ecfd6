"""Clean-up of what a model found in a patient: thresholds, small components and small regions, by rules in a file."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from .regions_sam2unet import region_levels


CLEAN_UP_FILE = "clean_up.json"
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
    def load(cls, path: str | os.PathLike) -> "CleanUp":
        """Read the rules of a file.

        Raises:
            ValueError: If the file is damaged, or a rule is unknown or out of range; the message names the file.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            regions = content.pop("regions")
            return cls({name: RegionRule(**rule) for name, rule in regions.items()}, content)
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            names = ", ".join(field.name for field in fields(RegionRule))
            raise ValueError(
                f"`{path}` must hold, under `regions`, for each region some of {names}: {err}. Choose the rules anew, "
                "or remove the file."
            ) from err

    def save(self, folder: str | os.PathLike) -> Path:
        """Write the rules into a folder, as `clean_up.json`."""
        path = Path(folder, CLEAN_UP_FILE)
        content = {"regions": {name: asdict(rule) for name, rule in self.rules.items()}, **self.record}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    def apply(
        self, probabilities: np.ndarray, regions: Mapping[str, Sequence[int]], spacing_mm: Sequence[float]
    ) -> np.ndarray:
        """Return which voxels belong to each region.

        What is removed of a region is removed of the regions inside it, too.

        Args:
            probabilities: Of shape `(regions, *volume)`, in [0, 1].
            regions: Region name -> the label ids it joins, in the order of the probabilities.
            spacing_mm: Size of a voxel along the three axes.

        Returns:
            Booleans of the shape of the probabilities.

        Raises:
            ValueError: If the rules name a region that there is not, or there is not one channel for each region.
        """
        if unknown := sorted({*self.rules} - {*regions}):
            raise ValueError(f"The clean-up has rules for {unknown}, the model segments {list(regions)}.")
        if len(probabilities) != len(regions):
            raise ValueError(f"`probabilities` must have {len(regions)} channels, got shape {probabilities.shape}.")
        voxel_ml = math.prod(spacing_mm) / 1000
        masks, removed = np.empty(probabilities.shape, bool), {}
        for name in (name for level in region_levels(regions) for name in level):
            place = list(regions).index(name)
            rule = self.rules.get(name, RegionRule())
            found = probabilities[place] > rule.threshold
            for outer, gone in removed.items():
                if set(regions[name]) < set(regions[outer]):
                    found &= ~gone
            masks[place] = kept = keep(found, rule, voxel_ml)
            removed[name] = found & ~kept
        return masks


def keep(mask: np.ndarray, rule: RegionRule, voxel_ml: float) -> np.ndarray:
    """Return what a rule keeps of a mask of booleans."""
    kept = mask.copy()
    (box, *_) = ndimage.find_objects(mask.view(np.uint8)) or [None]
    if box is None:
        return kept
    if rule.min_component_ml:
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
    sizes = np.bincount(components.ravel(), minlength=count + 1)[1:]
    common = None if reference is None else np.bincount(components[reference], minlength=count + 1)[1:]
    return components, sizes, common


__all__ = ["CLEAN_UP_FILE", "CleanUp", "RegionRule"]
