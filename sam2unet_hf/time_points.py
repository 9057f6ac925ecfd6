"""Two scans of a patient in one space: which lesions are the same, and what changed in volume and diameters."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from .lesions import Lesion, number_lesions
from .scans_sam2unet import ScanError, Volume, check_same_grid
from .volume_sam2unet import VolumeSegmentation


@dataclass(frozen=True)
class LesionChange:
    """Lesions of a region at two time points that overlap, directly or by way of others, and so are one.

    Args:
        region: Name of the region.
        earlier: Those at the first time point, the largest first; none if it is new.
        later: Those at the second time point; none if it is gone.
    """

    region: str
    earlier: list[Lesion]
    later: list[Lesion]

    @property
    def kind(self) -> str:
        """`"new"`, `"gone"`, `"matched"` one to one, `"merged"`, `"split"`, or `"regrouped"`, several to several."""
        if not self.earlier or not self.later:
            return "gone" if self.earlier else "new"
        if len(self.earlier) == 1:
            return "matched" if len(self.later) == 1 else "split"
        return "merged" if len(self.later) == 1 else "regrouped"

    @property
    def volumes_ml(self) -> tuple[float, float]:
        """Volume at both time points."""
        return sum(lesion.volume_ml for lesion in self.earlier), sum(lesion.volume_ml for lesion in self.later)


def check_same_space(earlier: Volume, later: Volume) -> None:
    """Check that the scans of two time points cover the same voxels in space.

    Args:
        earlier: A scan of the first time point.
        later: A scan of the second one.

    Raises:
        ScanError: If they do not; the message says how they differ, and what to do.
    """
    try:
        check_same_grid(earlier, later)
    except ScanError as err:
        raise ScanError(
            f"The two time points are not in the same space. {err} Register the scans of one time point to those of "
            "the other first."
        ) from err


def match_lesions(
    earlier: VolumeSegmentation,
    later: VolumeSegmentation,
    earlier_lesions: Sequence[Lesion],
    later_lesions: Sequence[Lesion],
) -> list[LesionChange]:
    """Match the lesions of two time points that have a voxel in common.

    Args:
        earlier: What the pipeline found at the first time point.
        later: What it found at the second one, with the same regions.
        earlier_lesions: What [`~lesions.measure_lesions`] returns of the first.
        later_lesions: What it returns of the second.

    Returns:
        Changes in the order of the regions; of each those that are the largest at either time point first.

    Raises:
        ScanError: If the scans are not in the same space.
        ValueError: If the regions differ.
    """
    check_same_space(earlier.scan, later.scan)
    if earlier.regions != later.regions:
        raise ValueError(
            f"`earlier` has the regions {earlier.regions}, `later` {later.regions}. Segment both with one model."
        )
    changes = []
    for region in earlier.regions:
        before, after = (
            [lesion for lesion in lesions if lesion.region == region] for lesions in (earlier_lesions, later_lesions)
        )
        numbers = [number_lesions(segmentation, region) for segmentation in (earlier, later)]
        common = (numbers[0] > 0) & (numbers[1] > 0)
        places = numbers[0][common] - 1, len(before) + numbers[1][common] - 1
        links = sparse.coo_array((np.ones(len(places[0])), places), shape=(len(before) + len(after),) * 2)
        count, groups = connected_components(links, directed=False)
        own: list[LesionChange] = [LesionChange(region, [], []) for _ in range(count)]
        for place, lesion in enumerate([*before, *after]):
            change = own[groups[place]]
            (change.earlier if place < len(before) else change.later).append(lesion)
        changes += sorted(own, key=lambda change: -max(change.volumes_ml))
    return changes


def sums_of_products(changes: Iterable[LesionChange]) -> tuple[float, float]:
    """Sum the products of both diameters of lesions at two time points, in mm2, as RANO does.

    Args:
        changes: Of one region. A lesion counts at both time points if it is measurable at one of them, with both
            diameters of 10 mm or more: one that has shrunk below that still counts.
    """
    sums = [0.0, 0.0]
    for change in changes:
        if any(lesion.is_measurable for lesion in (*change.earlier, *change.later)):
            sums[0] += sum(lesion.product_mm2 for lesion in change.earlier)
            sums[1] += sum(lesion.product_mm2 for lesion in change.later)
    return sums[0], sums[1]


__all__ = ["LesionChange", "check_same_space", "match_lesions", "sums_of_products"]
