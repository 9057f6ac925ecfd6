"""Metrics of the regions of one patient's label volume: overlap in voxels, distance in millimetres.

[`score_volume`] computes any of them for all regions, reading the volumes once. Where a region is empty the values are
those of BraTS: right if the prediction is empty too, as wrong as can be if it is not.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial import cKDTree


VOLUME_METRICS = ("volume_dice", "sensitivity", "specificity", "hausdorff95_mm")
# Whole tumour, tumour core and enhancing tumour, of 1 necrosis, 2 oedema, 3 enhancing tumour.
BRATS_REGIONS: Mapping[str, Sequence[int]] = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
# The diagonal of BraTS' volumes of 240x240x155 voxels of 1 mm, 373.13 mm.
ONE_EMPTY_MM = math.hypot(240, 240, 155)
# How many voxels around a surface voxel are searched first for the nearest of the other surface.
NEAR = 2


class VoxelCounts(NamedTuple):
    """Voxels of one region of one patient; [`count_voxels`] makes it."""

    true_positive: int  # predicted voxels inside the reference
    predicted: int
    reference: int
    total: int  # voxels of the volume


def to_label_map(volume: Any, name: str) -> np.ndarray:
    """Turn an array, tensor or nested list into an array of label ids of shape `(x, y, z)`, in any order of axes."""
    if hasattr(volume, "detach"):
        volume = volume.detach().cpu()
        # NumPy has no bfloat16.
        volume = volume.float().numpy() if "bfloat16" in str(volume.dtype) else volume.numpy()
    array = np.asarray(volume)
    if array.ndim != 3 or array.size == 0 or array.dtype.kind not in "biuf":
        raise ValueError(
            f"`{name}` must have three axes, got shape {array.shape} of type {array.dtype}. Several patients go in a "
            "list, probabilities must be turned into label ids first."
        )
    if array.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            broken = array - np.rint(array) != 0  # infinity and NaN too
        if broken.any():
            raise ValueError(
                f"`{name}` must hold label ids, got {array[broken][0]:g}. Turn probabilities into label ids with a "
                "threshold, and resample label maps to the nearest neighbour."
            )
    if (lowest := array.min()) < 0:
        raise ValueError(f"`{name}` must hold label ids >= 0, got {lowest:g}. Write 0 where the background is.")
    return array


def to_mask(volume: Any, name: str) -> np.ndarray:
    """Turn a volume of booleans, or of 0 and 1, into a boolean mask of the same shape."""
    array = to_label_map(volume, name)
    if (highest := array.max()) > 1:
        raise ValueError(f"`{name}` must be a mask of 0 and 1, got {highest:g}. Pick a region, as in `labels == 3`.")
    return array.astype(bool, copy=False)


def count_voxels(prediction: Any, reference: Any) -> VoxelCounts:
    """Count the voxels of two masks of shape `(x, y, z)`, boolean, or of 0 and 1."""
    masks = to_masks(prediction, reference)
    true_positive, predicted, expected = map(np.count_nonzero, (masks[0] & masks[1], *masks))
    return VoxelCounts(int(true_positive), int(predicted), int(expected), masks[0].size)


def dice(counts: VoxelCounts) -> float:
    """Return the Dice coefficient, in [0, 1], best at 1. It is 1 if both are empty, 0 if one is."""
    return _ratio(2 * counts.true_positive, counts.predicted + counts.reference)


def sensitivity(counts: VoxelCounts) -> float:
    """Return the share of the reference that was found, in [0, 1], best at 1.

    It is 1 if the reference is empty, whatever was predicted: there was nothing to miss, and Dice and specificity
    punish what is too much. The code of BraTS 2023 has 1 there if nothing was predicted, else 0.
    """
    return _ratio(counts.true_positive, counts.reference)


def specificity(counts: VoxelCounts) -> float:
    """Return the share of the volume outside the reference that was left empty, in [0, 1], best at 1.

    It is 1 if both are empty, if the prediction alone is, and if the reference fills the volume, since there was no
    background to get wrong.
    """
    background = counts.total - counts.reference
    return _ratio(background - (counts.predicted - counts.true_positive), background)


def hausdorff_distance_95(
    prediction: Any, reference: Any, spacing: Any = (1.0, 1.0, 1.0), one_empty_mm: float = ONE_EMPTY_MM
) -> float:
    """Return the 95 % Hausdorff distance of two masks in mm, >= 0, best at 0.

    It is 0 if both masks are empty and `one_empty_mm` if one is, else what `DISTANCE_DETAILS` of `volume_metric` says.

    Source: Huttenlocher et al., IEEE TPAMI 15(9), 1993, doi 10.1109/34.232073, section 2 (percentiles: section 3).
    """
    masks, spacing_mm, one_empty_mm = to_masks(prediction, reference), to_spacing(spacing), to_length(one_empty_mm)
    filled = [mask.any() for mask in masks]
    if not all(filled):
        return one_empty_mm if any(filled) else 0.0
    return max(float(np.percentile(own, 95)) for own in surface_distances(*masks, spacing_mm))


def score_volume(
    prediction: Any,
    reference: Any,
    metrics: Sequence[str] = VOLUME_METRICS,
    *,
    regions: Mapping[str, Sequence[int]] | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    one_empty_mm: float = ONE_EMPTY_MM,
) -> dict[str, dict[str, float]]:
    """Score the regions of one patient.

    Args:
        prediction: Label ids of shape `(x, y, z)`, integers >= 0 with 0 for the background. Booleans and 0 and 1 will
            do for a region that is label 1.
        reference: Label ids of the same shape.
        metrics: Which of `VOLUME_METRICS` to compute.
        regions: Region name -> the label ids it joins. Ids in no region are background. Default: BraTS' regions, with
            which any other id than 0 to 3 is an error.
        spacing: Size of a voxel in mm along the three axes of the volumes.
        one_empty_mm: Distance where just one of prediction and reference is empty. The default is the diagonal of
            BraTS' volumes, 373.13 mm, as in results on BraTS until 2021; its code takes 374 in 2023, and 373 in 2026.

    Returns:
        Region name -> metric -> value.

    Raises:
        ValueError: If a value or the shapes are wrong.
    """
    if unknown := sorted(set(metrics) - set(VOLUME_METRICS)):
        raise ValueError(f"`metrics` must be among {', '.join(VOLUME_METRICS)}, got {', '.join(unknown)}.")
    lengths = to_spacing(spacing), to_length(one_empty_mm)
    pairs, total = to_region_masks(prediction, reference, regions)
    scores = {}
    for name, pair in pairs.items():
        counts = count_voxels(*pair)._replace(total=total)
        values = {"volume_dice": dice(counts), "sensitivity": sensitivity(counts), "specificity": specificity(counts)}
        if "hausdorff95_mm" in metrics:
            values["hausdorff95_mm"] = hausdorff_distance_95(*pair, *lengths)
        scores[name] = {metric: values[metric] for metric in metrics}
    return scores


def to_region_masks(
    prediction: Any, reference: Any, regions: Mapping[str, Sequence[int]] | None
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], int]:
    """Return region name -> masks of prediction and reference in the box around the tumour, and all voxels' number.

    The box holds all regions, and what lies outside it is background.
    """
    label_ids = to_regions(regions)
    volumes = {"prediction": to_label_map(prediction, "prediction"), "reference": to_label_map(reference, "reference")}
    for name, volume in volumes.items():
        if volume.dtype == bool and any(ids != [1] for ids in label_ids.values()):
            raise ValueError(
                f"`{name}` holds booleans, which is one region, but `regions` has label ids {label_ids}. Pass label "
                'ids, or `regions={"WT": [1]}` for a single mask.'
            )
        if regions is None and (highest := volume.max()) > 3:
            raise ValueError(
                f"`{name}` must hold the label ids 0 to 3, got {highest:g}. Map the 4 of BraTS until 2021 to 3, or "
                "pass `regions` for other labels."
            )
    predicted, expected = volumes.values()
    _check_shapes(predicted, expected)
    box = bounding_box(predicted != 0, expected != 0)
    crops = [np.ascontiguousarray(volume[box]) for volume in (predicted, expected)]
    # To compare with each of a few ids is ten times faster than `np.isin`.
    masks = {
        name: tuple(functools.reduce(np.logical_or, [crop == label_id for label_id in ids]) for crop in crops)
        for name, ids in label_ids.items()
    }
    return masks, predicted.size


def to_regions(regions: Any) -> dict[str, list[int]]:
    """Check regions, `None` for those of BraTS, and return them with lists of label ids."""
    regions = BRATS_REGIONS if regions is None else regions
    if not isinstance(regions, Mapping) or not regions:
        raise ValueError(f'`regions` must map names to label ids, such as {{"WT": [1, 2, 3]}}, got {regions!r}.')
    for name, ids in regions.items():
        numbers = np.asarray(ids) if isinstance(ids, (Sequence, np.ndarray)) else np.zeros(0)
        if numbers.ndim != 1 or not numbers.size or numbers.dtype.kind not in "iu" or numbers.min() < 1:
            raise ValueError(f"`regions[{name!r}]` must list label ids >= 1 (0 is the background), got {ids!r}.")
    return {name: [int(number) for number in ids] for name, ids in regions.items()}


def to_spacing(spacing: Any) -> np.ndarray:
    """Check the size of a voxel in mm and return it as an array of shape `(3,)`."""
    numbers = np.asarray(spacing)
    if numbers.dtype.kind not in "iuf" or numbers.shape != (3,) or not (np.isfinite(numbers) & (numbers > 0)).all():
        raise ValueError(
            f"`spacing` must be three lengths above 0 in mm, one for each axis, got {spacing!r}. Take them from the "
            "header of the scan, as in `nibabel.load(path).header.get_zooms()`."
        )
    return numbers.astype(np.float64)


def to_length(value: Any) -> float:
    """Check the distance where one mask is empty."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 <= value < math.inf:
        raise ValueError(
            f"`one_empty_mm` must be a length >= 0 in mm, got {value!r}. Pass 374 for BraTS 2023, 373 for BraTS 2026."
        )
    return float(value)


def to_masks(prediction: Any, reference: Any) -> tuple[np.ndarray, np.ndarray]:
    """Turn two volumes of booleans, or of 0 and 1, into boolean masks of one shape."""
    masks = to_mask(prediction, "prediction"), to_mask(reference, "reference")
    _check_shapes(*masks)
    return masks


def surface_distances(
    prediction: np.ndarray, reference: np.ndarray, spacing_mm: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return how far each surface voxel of a mask is from the nearest surface voxel of the other, in mm.

    Args:
        prediction: Boolean mask that is not empty.
        reference: Another of the same shape.
        spacing_mm: Size of a voxel, an array of shape `(3,)`.

    Returns:
        The distances of the prediction's surface voxels, and those of the reference's.
    """
    box = bounding_box(prediction, reference)
    surfaces = [np.pad(_surface(mask[box]), NEAR) for mask in (prediction, reference)]
    places = [np.flatnonzero(surface) for surface in surfaces]
    return _nearest(places[0], surfaces[1], spacing_mm), _nearest(places[1], surfaces[0], spacing_mm)


def _nearest(places: np.ndarray, surface: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """Return the distances in mm of voxels at flat places of the volume to the nearest voxel of a surface."""
    # Most have one near by, which is found several times faster by looking around them than in a tree: at each step
    # from the shortest on, up to those that a voxel outside the window may undercut.
    steps = np.stack(np.meshgrid(*[np.arange(-NEAR, NEAR + 1)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    lengths_mm = np.sqrt(((steps * spacing_mm) ** 2).sum(axis=1))
    order = np.argsort(lengths_mm)
    order = order[lengths_mm[order] < (NEAR + 1) * spacing_mm.min()]
    flat_steps = steps @ (np.array(surface.strides) // surface.itemsize)
    flat, distances, left = surface.ravel(), np.empty(len(places)), np.arange(len(places))
    for index in order:
        found = flat[places + flat_steps[index]]
        distances[left[found]] = lengths_mm[index]
        left, places = left[~found], places[~found]
        if not left.size:
            break
    else:
        # A tree is built and queried faster if neither balanced nor compact, since points on a grid are full of ties.
        tree = cKDTree(np.argwhere(surface) * spacing_mm, balanced_tree=False, compact_nodes=False)
        distances[left] = tree.query(np.stack(np.unravel_index(places, surface.shape), axis=1) * spacing_mm)[0]
    return distances


def _surface(mask: np.ndarray) -> np.ndarray:
    """Return the mask's voxels that have a face in common with a voxel outside it, or with the border of the array."""
    inner = np.pad(mask, 1)
    core = inner[1:-1, 1:-1, 1:-1].copy()
    for axis in range(3):
        for shifted in (slice(None, -2), slice(2, None)):
            core &= inner[tuple(shifted if other == axis else slice(1, -1) for other in range(3))]
    return mask & ~core


def _check_shapes(prediction: np.ndarray, reference: np.ndarray) -> None:
    if prediction.shape != reference.shape:
        raise ValueError(
            f"`prediction` and `reference` must have the same shape, got {prediction.shape} and {reference.shape}. "
            "Resample the prediction to the reference, not the other way round."
        )


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else 1.0


def bounding_box(*masks: np.ndarray) -> tuple[slice, ...]:
    """Return the smallest box that holds the masks; of empty masks, their first voxel."""
    boxes = []
    for mask in masks:
        box = [slice(None)] * mask.ndim
        # Search last along the axis along which memory is contiguous, and each time only in what the others left.
        for axis in np.argsort(mask.strides)[::-1]:
            at = np.flatnonzero(mask[tuple(box)].any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
            box[axis] = slice(int(at[0]), int(at[-1]) + 1) if at.size else slice(0, 0)
        if box[0].stop:
            boxes.append(box)
    if not boxes:
        return (slice(0, 1),) * masks[0].ndim
    return tuple(slice(min(s.start for s in sides), max(s.stop for s in sides)) for sides in zip(*boxes, strict=True))


__all__ = ["BRATS_REGIONS", "VOLUME_METRICS", "score_volume"]
