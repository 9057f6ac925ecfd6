"""Metrics of the regions of one patient's label volume: overlap in voxels, distance in millimetres.

[`score_volume`] computes any of them for all regions, reading the volumes once. Where a region is empty the values are
those of BraTS: right if the prediction is empty too, as wrong as can be if it is not.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree


VOLUME_METRICS = ("volume_dice", "sensitivity", "specificity", "hausdorff95_mm")
# Whole tumour, tumour core and enhancing tumour, of 1 necrosis, 2 oedema, 3 enhancing tumour.
BRATS_REGIONS: Mapping[str, Sequence[int]] = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
# The diagonal of BraTS' volumes of 240x240x155 voxels of 1 mm, 373.13 mm.
ONE_EMPTY_MM = math.hypot(240, 240, 155)


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
    masks = _pair(prediction, reference)
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
    masks, spacing_mm, one_empty_mm = _pair(prediction, reference), to_spacing(spacing), to_length(one_empty_mm)
    points = [_surface_points(mask, spacing_mm) for mask in masks]
    if not all(map(len, points)):
        return one_empty_mm if any(map(len, points)) else 0.0
    # A tree of the surface voxels is several times faster than a distance transform of the box around both masks. It
    # is built and queried faster if neither balanced nor compact, since the points of a grid are full of ties.
    trees = [cKDTree(own, balanced_tree=False, compact_nodes=False) for own in points]
    distances = [tree.query(own)[0] for tree, own in zip(reversed(trees), points, strict=True)]
    return max(float(np.percentile(own, 95)) for own in distances)


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
            BraTS' volumes, 373.13 mm, as in results on BraTS until 2021; its code takes 374 from 2023 on.

    Returns:
        Region name -> metric -> value.

    Raises:
        ValueError: If a value or the shapes are wrong.
    """
    if unknown := sorted(set(metrics) - set(VOLUME_METRICS)):
        raise ValueError(f"`metrics` must be among {', '.join(VOLUME_METRICS)}, got {', '.join(unknown)}.")
    label_ids = to_regions(regions)
    lengths = to_spacing(spacing), to_length(one_empty_mm)
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
    # Compute in the box around the tumour, which holds all regions; voxels outside it enter as a number.
    total, box = predicted.size, _bounding_box((predicted != 0) | (expected != 0))
    predicted, expected = (volume[box].astype(np.int64) for volume in (predicted, expected))

    scores = {}
    for name, ids in label_ids.items():
        pair = np.isin(predicted, ids), np.isin(expected, ids)
        counts = count_voxels(*pair)._replace(total=total)
        values = {"volume_dice": dice(counts), "sensitivity": sensitivity(counts), "specificity": specificity(counts)}
        if "hausdorff95_mm" in metrics:
            values["hausdorff95_mm"] = hausdorff_distance_95(*pair, *lengths)
        scores[name] = {metric: values[metric] for metric in metrics}
    return scores


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
            f"`one_empty_mm` must be a length >= 0 in mm, got {value!r}. Pass 374 for BraTS from 2023 on."
        )
    return float(value)


def _pair(prediction: Any, reference: Any) -> tuple[np.ndarray, np.ndarray]:
    masks = to_mask(prediction, "prediction"), to_mask(reference, "reference")
    _check_shapes(*masks)
    return masks


def _check_shapes(prediction: np.ndarray, reference: np.ndarray) -> None:
    if prediction.shape != reference.shape:
        raise ValueError(
            f"`prediction` and `reference` must have the same shape, got {prediction.shape} and {reference.shape}. "
            "Resample the prediction to the reference, not the other way round."
        )


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else 1.0


def _surface_points(mask: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """Return the centres of the surface voxels in mm, of shape `(voxels, 3)`."""
    box = _bounding_box(mask)
    inner = mask[box]
    # Erosion takes what lies outside the box for empty: it is, or it is outside the volume.
    surface = inner & ~ndimage.binary_erosion(inner)
    return (np.argwhere(surface) + [side.start for side in box]) * spacing_mm


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Return the smallest box that holds the mask; of an empty mask, its first voxel."""
    places = [np.flatnonzero(np.any(mask, axis=across)) for across in ((1, 2), (0, 2), (0, 1))]
    return tuple(slice(int(at[0]), int(at[-1]) + 1) if at.size else slice(0, 1) for at in places)


__all__ = ["BRATS_REGIONS", "VOLUME_METRICS", "score_volume"]
