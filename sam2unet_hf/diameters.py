"""Diameters of a lesion as RANO has them: the longest in an axial slice, and the longest one at right angles to it.

See https://doi.org/10.1200/JCO.2009.26.3541. Both lines end in the lesion, and may cross what is none of it in
between, as the necrotic centre of a rim that enhances.

They run between edges of pixels, not centres: the outline of a lesion passes midway between the centres of a pixel of
it and of a neighbour that is none, as the contours of scikit-image and matplotlib do. So one pixel of 1 mm is 1 mm
wide and a row of ten is 10 mm long, as if measured by hand on the screen. From centre to centre they would be 0 and
9 mm, and the product of the diameters of every thin lesion 0.
"""

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist


EQUAL = 1e-6  # relative difference of lengths that are the same but for rounding
OFFSETS_AT_ONCE = 256  # of lines across a lesion, which bounds the memory


class Diameters(NamedTuple):
    """Both diameters of a lesion; [`measure_diameters`] makes it."""

    diameter_mm: float
    perpendicular_mm: float
    slice_index: int  # along the last axis
    diameter: np.ndarray  # the ends, of shape `(2, 2)`, as indices of pixels: whole numbers at the centres
    perpendicular: np.ndarray


def measure_diameters(voxels: np.ndarray, to_mm: np.ndarray) -> Diameters:
    """Measure a lesion in the slices along its last axis.

    Args:
        voxels: Booleans of shape `(left, posterior, superior)`, of which one or more are true.
        to_mm: Of shape `(2, 2)`: lengths in mm are those between its products with places in a slice.

    Returns:
        The longest diameter and the longest perpendicular one in its slice. Of slices, and of lines in a slice, in
        which the diameter is the same, those count that have the longest perpendicular one.

    Raises:
        ValueError: If no voxel is true.
    """
    if not voxels.any():
        raise ValueError(
            f"`voxels` of shape {voxels.shape} must hold a lesion, but none is true. Leave out empty masks."
        )
    longest, lines = 0.0, []
    for bound_mm, index in _slices_by_size(voxels, to_mm):
        if bound_mm < longest * (1 - EQUAL):
            break
        outline = draw_outline(voxels[:, :, index])
        corners = outline.reshape(-1, 2)
        corners = corners[ConvexHull(corners).vertices]
        lengths = pdist(corners @ to_mm.T)
        pairs = np.transpose(np.triu_indices(len(corners), 1))  # in the order of `pdist`
        longest = max(longest, float(lengths.max()))
        equal = np.flatnonzero(lengths >= longest * (1 - EQUAL))
        lines += [(float(lengths[place]), index, outline, corners[pairs[place]]) for place in equal]
    found = []
    for length, index, outline, ends in sorted(lines, key=lambda line: line[1]):
        if length >= longest * (1 - EQUAL):
            across_mm, across = _longest_across(outline, ends, to_mm)
            found.append(Diameters(length, across_mm, index, ends, across))
    return max(found, key=lambda diameters: round(diameters.perpendicular_mm, 6))


def _slices_by_size(voxels: np.ndarray, to_mm: np.ndarray) -> Iterator[tuple[float, int]]:
    """Yield what no diameter of a slice exceeds, in mm, and the slice, from the largest down."""
    shadows = [
        np.asarray(voxels.any(axis=axis)) for axis in (1, 0)
    ]  # of shapes `(left, slices)`, `(posterior, slices)`
    width, height = (
        np.where(shadow.any(axis=0), len(shadow) - shadow.argmax(axis=0) - shadow[::-1].argmax(axis=0), 0)
        for shadow in shadows
    )
    # The diagonals of the box around the lesion, which need not be at right angles.
    diagonals = [np.linalg.norm(to_mm @ (width, sign * height), axis=0) for sign in (1, -1)]
    bounds = np.maximum(*diagonals)
    for index in np.argsort(-bounds, kind="stable"):
        if bounds[index]:
            yield float(bounds[index]), int(index)


def draw_outline(pixels: np.ndarray) -> np.ndarray:
    """Return lines between midpoints of neighbouring pixels, of which one is true: the outline of a mask.

    Args:
        pixels: Booleans of shape `(width, height)`.

    Returns:
        Ends of shape `(lines, 2, 2)` as indices of pixels. Where two pixels touch at a corner alone, lines that meet
        there are among them.
    """
    padded = np.pad(pixels, 1)
    # Each four pixels are corners of a square, whose sides the outline crosses where the two on a side differ.
    corners = padded[:-1, :-1], padded[1:, :-1], padded[1:, 1:], padded[:-1, 1:]
    midpoints = (0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5)
    sides = [(corners[i] != corners[(i + 1) % 4], np.array(midpoints[i]) - 1) for i in range(4)]  # less the padding
    lines = []
    for (is_first, first), (is_second, second) in combinations(sides, 2):
        squares = np.argwhere(is_first & is_second)
        lines.append(np.stack([squares + first, squares + second], axis=1))
    return np.concatenate(lines)


def _longest_across(outline: np.ndarray, ends: np.ndarray, to_mm: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the length in mm and the ends of the longest line at right angles to another, between an outline.

    Between two corners of the outline the length of a line across changes as the largest of linear functions does, so
    the longest one goes through a corner.
    """
    direction = np.subtract(*(ends @ to_mm.T))
    direction /= np.linalg.norm(direction)
    frame = np.stack([direction, (-direction[1], direction[0])])  # from mm to along and across
    # Each line in both directions, of which one begins at the upper end if it lies across.
    lines = np.concatenate([outline, outline[:, ::-1]]) @ (frame @ to_mm).T
    (start, start_across), (stop, stop_across) = lines[:, 0].T, lines[:, 1].T
    tolerance = EQUAL * np.ptp(start)
    steps = np.where(np.abs(stop - start) > tolerance, stop - start, np.inf)
    low, high = np.minimum(start, stop) - tolerance, np.maximum(start, stop) + tolerance
    best: tuple[float, ...] = (-1.0,)
    offsets = np.unique(start)
    for first in range(0, len(offsets), OFFSETS_AT_ONCE):
        at = offsets[first : first + OFFSETS_AT_ONCE, None]
        across = start_across + np.clip((at - start) / steps, 0, 1) * (stop_across - start_across)
        is_met = (low <= at) & (at <= high)
        top = np.where(is_met, across, -np.inf).max(axis=1)
        bottom = np.where(is_met, across, np.inf).min(axis=1)
        place = int(np.argmax(top - bottom))
        best = max(
            best, (float(top[place] - bottom[place]), float(at[place, 0]), float(bottom[place]), float(top[place]))
        )
    length, offset, lower, upper = best
    return length, np.linalg.solve(frame @ to_mm, np.array([(offset, lower), (offset, upper)]).T).T


__all__ = ["Diameters", "draw_outline", "measure_diameters"]
