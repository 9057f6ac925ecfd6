"""Lesions of a segmented patient: their volumes and diameters, and removing some of them.

A lesion is a connected component of a region, whose voxels touch at least at a corner, as in the metrics of lesions
and in the clean-up. Since regions are nested, each lesion of an inner region lies in one of the region around it.
"""

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from scipy import ndimage

from .clean_up_sam2unet import component_sizes
from .diameters import Diameters, measure_diameters
from .head_sam2unet import bounding_box
from .regions_sam2unet import region_levels
from .volume_sam2unet import VolumeSegmentation


Box: TypeAlias = tuple[slice, slice, slice]
Line: TypeAlias = tuple[tuple[float, float], tuple[float, float]]

MEASURABLE_MM = 10.0  # of both diameters of a lesion that RANO calls measurable
COLUMNS = (
    "region",
    "lesion",
    "inside",
    "volume_ml",
    "diameter_mm",
    "perpendicular_mm",
    "product_mm2",
    "axial_slice",
)


@dataclass(frozen=True)
class Lesion:
    """A connected component of a region.

    Args:
        region: Name of the region.
        number: From 1 on, for the largest of the region.
        volume_ml: Volume in millilitres.
        diameter_mm: Longest diameter in an axial slice, from edge to edge.
        perpendicular_mm: Longest diameter at right angles to it in the same slice.
        slice_index: The axial slice of both, counted from 0 at the feet.
        diameter: Its ends as indices `(left, posterior)` of voxels, whole numbers at the centres.
        perpendicular: The ends of the perpendicular diameter, likewise.
        inside: Number of the lesion of the next region around that this one is a part of; `None` without such a
            region.
    """

    region: str
    number: int
    volume_ml: float
    diameter_mm: float
    perpendicular_mm: float
    slice_index: int
    diameter: Line
    perpendicular: Line
    inside: int | None = None

    @property
    def key(self) -> tuple[str, int]:
        """Region and number, which tell the lesions of a patient apart."""
        return self.region, self.number

    @property
    def product_mm2(self) -> float:
        """Product of both diameters."""
        return self.diameter_mm * self.perpendicular_mm

    @property
    def is_measurable(self) -> bool:
        """Whether both diameters are at least 10 mm long, as RANO asks of the lesions that it measures."""
        return min(self.diameter_mm, self.perpendicular_mm) >= MEASURABLE_MM


def measure_lesions(segmentation: VolumeSegmentation) -> list[Lesion]:
    """Measure the lesions of all regions of a patient, as [`~diameters.measure_diameters`] does.

    Args:
        segmentation: What the pipeline found, in any orientation and spacing. Its axial slices are those along the
            axis of the scan that is nearest to the one from feet to head.

    Returns:
        Lesions in the order of the regions, and of each the largest first.
    """
    affine = segmentation.scan.lps_affine[:3, :3]
    voxel_ml = float(abs(np.linalg.det(affine))) / 1000
    # Takes places in a slice to mm, whatever the angle between its axes.
    to_mm = np.linalg.cholesky(affine[:, :2].T @ affine[:, :2]).T
    box, labels = _tumour(segmentation)
    if not labels.size:
        return []
    corner = np.array([side.start for side in box])
    numbered = {region: _number(labels, label_ids) for region, label_ids in segmentation.regions.items()}
    known: dict[tuple[tuple[int, ...], bytes], Diameters] = {}  # of small lesions many have the same shape
    found = []
    for region, numbers in numbered.items():
        around = region_around(segmentation.regions, region)
        for number, part in enumerate(ndimage.find_objects(numbers), 1):
            voxels = numbers[part] == number
            shape = voxels.shape, np.packbits(voxels).tobytes()
            measured = known[shape] = known[shape] if shape in known else measure_diameters(voxels, to_mm)
            start = corner + [side.start for side in part]
            inside = None if around is None else int(numbered[around][part][voxels][0])
            found.append(
                Lesion(
                    region,
                    number,
                    volume_ml=int(np.count_nonzero(voxels)) * voxel_ml,
                    diameter_mm=measured.diameter_mm,
                    perpendicular_mm=measured.perpendicular_mm,
                    slice_index=int(measured.slice_index + start[2]),
                    diameter=_to_line(measured.diameter + start[:2]),
                    perpendicular=_to_line(measured.perpendicular + start[:2]),
                    inside=inside,
                )
            )
    return found


def _to_line(ends: np.ndarray) -> Line:
    (x, y), (other_x, other_y) = ends.tolist()
    return (x, y), (other_x, other_y)


def _tumour(segmentation: VolumeSegmentation) -> tuple[Box, np.ndarray]:
    """Return the smallest box that holds all label ids but 0, and a copy of what is in it."""
    labels = segmentation.scan.from_file_grid(segmentation.label_map)
    box = bounding_box(labels != 0)
    return box, labels[box].copy()


def _number(labels: np.ndarray, label_ids: Sequence[int]) -> np.ndarray:
    """Number the lesions of a region from 1 for the largest on."""
    components, sizes, _ = component_sizes(np.isin(labels, label_ids))
    ranks = np.zeros(len(sizes) + 1, components.dtype)
    ranks[1 + np.argsort(-sizes, kind="stable")] = np.arange(1, len(sizes) + 1)
    return ranks[components]


def _check_region(region: str, regions: Mapping[str, Sequence[int]]) -> None:
    if region not in regions:
        raise ValueError(f"`region` must be one of {list(regions)}, got {region!r}.")


def number_lesions(segmentation: VolumeSegmentation, region: str) -> np.ndarray:
    """Number the lesions of a region as [`measure_lesions`] does.

    Args:
        segmentation: What the pipeline found.
        region: Name of the region.

    Returns:
        Number of the lesion of each voxel, 0 outside of them, `int32` with the axes (left, posterior, superior).

    Raises:
        ValueError: If there is no such region.
    """
    _check_region(region, segmentation.regions)
    box, labels = _tumour(segmentation)
    numbers = np.zeros(segmentation.scan.voxels.shape, np.int32)
    numbers[box] = _number(labels, segmentation.regions[region])
    return numbers


def region_around(regions: Mapping[str, Sequence[int]], region: str) -> str | None:
    """Return the smallest region that holds another one, or `None`.

    Args:
        regions: Region name -> the label ids it joins.
        region: The one that is held.

    Raises:
        ValueError: If there is no such region.
    """
    _check_region(region, regions)
    around = [name for name, label_ids in regions.items() if set(regions[region]) < set(label_ids)]
    return min(around, key=lambda name: len(regions[name]), default=None)


def remove_lesions(segmentation: VolumeSegmentation, keys: Iterable[tuple[str, int]]) -> VolumeSegmentation:
    """Remove lesions of a segmentation.

    Voxels of a lesion that is removed get the label of the next region around, and are background if there is none.
    So enhancing tumour that is removed stays tumour core, and a lesion of whole tumour goes with all that it holds.

    Args:
        segmentation: What the pipeline found.
        keys: Region and number of each lesion to remove, as in `Lesion.key`.

    Returns:
        The segmentation with another label map; its probabilities stay as they are.

    Raises:
        ValueError: If there is no such lesion.
    """
    unwanted: dict[str, set[int]] = {}
    for region, number in keys:
        unwanted.setdefault(region, set()).add(number)
    if unknown := sorted(set(unwanted) - set(segmentation.regions)):
        raise ValueError(
            f"`keys` names the regions {unknown}, the segmentation has {list(segmentation.regions)}. Take keys of "
            "`measure_lesions`."
        )
    own_ids = {name: label_id for level in region_levels(segmentation.regions) for name, label_id in level.items()}
    box, found = _tumour(segmentation)
    kept = found.copy()
    # The innermost regions first, because what becomes of the lesion around decides in the end.
    for region in sorted(unwanted, key=lambda name: len(segmentation.regions[name])):
        numbers = _number(found, segmentation.regions[region])
        count = int(numbers.max(initial=0))
        if not unwanted[region] <= set(range(1, count + 1)):
            raise ValueError(
                f"`keys` names {region} {sorted(unwanted[region])}, {region} has {count} lesions. Take keys of "
                "`measure_lesions`."
            )
        around = region_around(segmentation.regions, region)
        kept[np.isin(numbers, list(unwanted[region]))] = 0 if around is None else own_ids[around]
    labels = np.zeros_like(segmentation.scan.from_file_grid(segmentation.label_map))
    labels[box] = kept
    return replace(segmentation, label_map=np.ascontiguousarray(segmentation.scan.to_file_grid(labels)))


def save_lesions(lesions: Iterable[Lesion], path: str | os.PathLike) -> None:
    """Write lesions as a table of comma-separated values, whole or not at all.

    Its columns are `region`, `lesion` (the number), `inside` (empty without a region around), `volume_ml`,
    `diameter_mm`, `perpendicular_mm`, `product_mm2` and `axial_slice`, counted from 0 at the feet.

    Args:
        lesions: What [`measure_lesions`] returns.
        path: The file.
    """
    partial = Path(path).with_name(f".{Path(path).name}.partial")
    with open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for lesion in lesions:
            sizes = lesion.volume_ml, lesion.diameter_mm, lesion.perpendicular_mm, lesion.product_mm2
            writer.writerow([*lesion.key, lesion.inside, *(f"{size:.3f}" for size in sizes), lesion.slice_index])
    os.replace(partial, path)


__all__ = [
    "Lesion",
    "measure_lesions",
    "number_lesions",
    "region_around",
    "remove_lesions",
    "save_lesions",
]
