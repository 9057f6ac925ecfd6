"""Metrics of the lesions and surfaces of one patient's regions, equal to those of BraTS 2026.

[`score_lesions`] computes any of them for all regions. Lesions are the connected components of a region, whose voxels
touch at least at a corner. Those of prediction and reference that have voxels in common are paired one to one, so that
the sum of their Dice coefficients is largest. So does the code of BraTS 2026, `brats-evaluation` 0.0.10 on `panoptica`
2.1.7. Its means are over pairs alone, which here is `matched_lesion_...`; but for metastases lesions without partner
count too, and those of the reference below 27 mm3 do not, which here is `lesion_...` with `min_lesion_mm3=27`:
https://github.com/Sage-Bionetworks-Challenges/brats-infra/blob/0973e92b3cb38cfc238785f1aaa2934f59b05c9b/evaluation/segmentation/score.py
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage, sparse
from scipy.optimize import linear_sum_assignment

from .volume_functional import (
    ONE_EMPTY_MM,
    bounding_box,
    surface_distances,
    to_length,
    to_masks,
    to_region_masks,
    to_spacing,
)


TOLERANCES_MM = (0.5, 1.0)
SURFACE_METRICS = ("hausdorff95_pooled_mm", *(f"nsd_{tolerance:g}mm" for tolerance in TOLERANCES_MM))
# What is measured of a pair of lesions.
PAIR_METRICS = ("dice", *SURFACE_METRICS)
LESION_METRICS = (
    *SURFACE_METRICS,
    "lesion_f1",
    *(f"lesion_{metric}" for metric in PAIR_METRICS),
    *(f"matched_lesion_{metric}" for metric in PAIR_METRICS),
)


class Lesions(NamedTuple):
    """Lesions of one region of one patient; [`compare_lesions`] makes it."""

    pairs: list[dict[str, float]]  # `dice` of each pair, and what `compare_surfaces` returns
    pairs_mm3: list[float]  # volumes of the reference's lesions in the pairs
    missed_mm3: list[float]  # volumes of the reference's lesions without partner
    spurious: int  # number of the prediction's lesions without partner


def compare_surfaces(
    prediction: Any,
    reference: Any,
    spacing: Any = (1.0, 1.0, 1.0),
    one_empty_mm: float = ONE_EMPTY_MM,
    tolerances_mm: Sequence[float] = TOLERANCES_MM,
) -> dict[str, float]:
    """Compare the surfaces of two masks, whose voxels count the same each.

    Args:
        prediction: Mask of shape `(x, y, z)`, boolean, or of 0 and 1.
        reference: Mask of the same shape.
        spacing: Size of a voxel in mm along the three axes.
        one_empty_mm: Distance where the masks have no voxel in common.
        tolerances_mm: Those of the normalised surface distance.

    Returns:
        `hausdorff95_pooled_mm`, the 95th percentile of the distances of both surfaces to each other, >= 0, best at 0;
        and for each tolerance `nsd_<tolerance>mm`, the share of a surface that lies within it of the other, as the
        mean of both, in [0, 1], best at 1. They are 0 and 1 if both masks are empty. If the masks have no voxel in
        common, however near they are, they are `one_empty_mm` and 0, because BraTS 2026 has it so.

    Raises:
        ValueError: If a value or the shapes are wrong.
    """
    masks, spacing_mm, one_empty_mm = to_masks(prediction, reference), to_spacing(spacing), to_length(one_empty_mm)
    if (masks[0] & masks[1]).any():
        distances = surface_distances(*masks, spacing_mm)
        # Distances of one voxel are as long as the tolerance is, but for rounding.
        shares = [np.mean([np.mean(own <= 1.000001 * length) for own in distances]) for length in tolerances_mm]
        distance = np.percentile(np.concatenate(distances), 95)
    else:
        empty = not masks[0].any() and not masks[1].any()
        shares, distance = [float(empty)] * len(tolerances_mm), 0.0 if empty else one_empty_mm
    named = {f"nsd_{length:g}mm": float(share) for length, share in zip(tolerances_mm, shares, strict=True)}
    return {"hausdorff95_pooled_mm": float(distance), **named}


def compare_lesions(
    prediction: Any, reference: Any, spacing: Any = (1.0, 1.0, 1.0), tolerances_mm: Sequence[float] = TOLERANCES_MM
) -> Lesions:
    """Pair the lesions of two masks, and compare each pair.

    Args:
        prediction: Mask of shape `(x, y, z)`, boolean, or of 0 and 1.
        reference: Mask of the same shape.
        spacing: Size of a voxel in mm along the three axes.
        tolerances_mm: Those of the normalised surface distance.

    Returns:
        The pairs, in the order of the reference's lesions, and what has no partner. Where several pairings have the
        same sum of Dice coefficients, `scipy.optimize.linear_sum_assignment` decides.

    Raises:
        ValueError: If a value or the shapes are wrong.
    """
    masks, spacing_mm = to_masks(prediction, reference), to_spacing(spacing)
    box = bounding_box(*masks)
    masks = masks[0][box], masks[1][box]
    predicted, expected = (ndimage.label(mask, structure=np.ones((3, 3, 3)))[0] for mask in masks)
    predicted_sizes, expected_sizes = np.bincount(predicted[masks[0]])[1:], np.bincount(expected[masks[1]])[1:]
    volumes_mm3 = expected_sizes * spacing_mm.prod()
    both = masks[0] & masks[1]
    if not both.any():
        return Lesions([], [], volumes_mm3.tolist(), len(predicted_sizes))

    # How many voxels lesions have in common; those that meet none are left out, which may be thousands.
    common = sparse.csr_array((np.ones(np.count_nonzero(both)), (expected[both] - 1, predicted[both] - 1)))
    rows, columns = np.unique(common.tocoo().row), np.unique(common.indices)
    overlaps = common[rows][:, columns].toarray()
    overlaps *= 2 / (expected_sizes[rows][:, None] + predicted_sizes[columns])
    # Of pairings with the same sum that with more pairs is better, by as much as in panoptica.
    found = np.stack(linear_sum_assignment(overlaps + 1e-6 * (overlaps > 0), maximize=True))
    found = found[:, overlaps[*found] > 0]

    pairs, places = [], (ndimage.find_objects(expected), ndimage.find_objects(predicted))
    for mine, other, overlap in zip(rows[found[0]], columns[found[1]], overlaps[*found], strict=True):
        sides = zip(places[0][mine], places[1][other], strict=True)
        around = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in sides)
        surfaces = compare_surfaces(
            predicted[around] == other + 1, expected[around] == mine + 1, spacing_mm, tolerances_mm=tolerances_mm
        )
        pairs.append({"dice": float(overlap), **surfaces})
    partners = rows[found[0]]
    missed_mm3 = np.delete(volumes_mm3, partners)
    return Lesions(pairs, volumes_mm3[partners].tolist(), missed_mm3.tolist(), len(predicted_sizes) - len(pairs))


def score_lesions(
    prediction: Any,
    reference: Any,
    metrics: Sequence[str] = LESION_METRICS,
    *,
    regions: Mapping[str, Sequence[int]] | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    one_empty_mm: float = ONE_EMPTY_MM,
    min_lesion_mm3: float = 0.0,
) -> dict[str, dict[str, float]]:
    """Score the lesions and surfaces of the regions of one patient.

    Args:
        prediction: Label ids of shape `(x, y, z)`, integers >= 0 with 0 for the background. Booleans and 0 and 1 will
            do for a region that is label 1.
        reference: Label ids of the same shape.
        metrics: Which of `LESION_METRICS` to compute. `lesion_...` are means over all lesions, of which a missed or
            spurious one counts as 0, or as `one_empty_mm`. `matched_lesion_...` are means over pairs of lesions alone,
            which say little without `lesion_f1`: twice the number of pairs by that of all lesions of both volumes. The
            others are of the whole region, see [`compare_surfaces`].
        regions: Region name -> the label ids it joins. Ids in no region are background. Default: BraTS' regions, with
            which any other id than 0 to 3 is an error.
        spacing: Size of a voxel in mm along the three axes of the volumes.
        one_empty_mm: Distance where there is no pair of lesions, and of a lesion without partner. The default is the
            diagonal of BraTS' volumes, 373.13 mm, as in `score_volume`; BraTS 2026 takes 373.
        min_lesion_mm3: Lesions of the reference below this volume are left out of the means `lesion_...`; they count
            for `lesion_f1` and `matched_lesion_...`.

    Returns:
        Region name -> metric -> value. Where no lesion counts, shares are 1 and distances 0; where lesions count but
        there is no pair, shares are 0 and distances `one_empty_mm`.

    Raises:
        ValueError: If a value or the shapes are wrong.
    """
    if unknown := sorted(set(metrics) - set(LESION_METRICS)):
        raise ValueError(f"`metrics` must be among {', '.join(LESION_METRICS)}, got {', '.join(unknown)}.")
    spacing_mm, one_empty_mm = to_spacing(spacing), to_length(one_empty_mm)
    is_number = isinstance(min_lesion_mm3, (int, float, np.number)) and not isinstance(min_lesion_mm3, bool)
    if not is_number or not 0 <= min_lesion_mm3 < math.inf:
        raise ValueError(
            f"`min_lesion_mm3` must be a volume >= 0 in mm3, got {min_lesion_mm3!r}. Pass 27 for metastases in BraTS "
            "2026, and 0 to count all lesions."
        )
    pairs, _ = to_region_masks(prediction, reference, regions)
    scores = {}
    for name, masks in pairs.items():
        values: dict[str, float] = {}
        if set(metrics) & set(SURFACE_METRICS):
            values |= compare_surfaces(*masks, spacing_mm, one_empty_mm)
        if set(metrics) - set(SURFACE_METRICS):
            values |= average_lesions(compare_lesions(*masks, spacing_mm), one_empty_mm, min_lesion_mm3)
        scores[name] = {metric: values[metric] for metric in metrics}
    return scores


def average_lesions(lesions: Lesions, one_empty_mm: float, min_lesion_mm3: float) -> dict[str, float]:
    """Return those of `LESION_METRICS` that are of lesions, of one region; see [`score_lesions`]."""
    num_lone = len(lesions.missed_mm3) + lesions.spurious
    num_lesions = 2 * len(lesions.pairs) + num_lone
    averages = {"lesion_f1": 2 * len(lesions.pairs) / num_lesions if num_lesions else 1.0}
    counted = [volume >= min_lesion_mm3 for volume in lesions.pairs_mm3]
    num_lone_counted = sum(volume >= min_lesion_mm3 for volume in lesions.missed_mm3) + lesions.spurious
    for metric in PAIR_METRICS:
        best, worst = (0.0, one_empty_mm) if metric.endswith("_mm") else (1.0, 0.0)
        values = [pair[metric] for pair in lesions.pairs]
        without = worst if num_lone else best
        averages[f"matched_lesion_{metric}"] = math.fsum(values) / len(values) if values else without
        values = [value for value, counts in zip(values, counted, strict=True) if counts] + [worst] * num_lone_counted
        averages[f"lesion_{metric}"] = math.fsum(values) / len(values) if values else best
    return averages


__all__ = ["LESION_METRICS", "Lesions", "compare_lesions", "compare_surfaces", "score_lesions"]
