"""Distances to the nearest pixel of a mask, for the weighted F-measure.

SciPy's distance transform takes longer than all other metrics of an image together. Small masks, and those that fill
much of the image, go faster ways with the same result.
"""

import itertools

import numpy as np
from scipy import ndimage


REACH = 3  # of the Gaussian in the weighted F-measure, in rows and columns
# Whatever it reaches from the mask has its nearest pixel at most so many rows and columns away.
FRAME = REACH + 1
# The longest shorter side of the box around a small mask, and the least share of its image that a dense one fills:
# half of it is enough for a mask that is not small.
_SMALL = 128
_DENSE = 0.25
# The longest side of images in which all squared distances are exact in single precision.
_LARGEST = 1300
# Squares of distances up to here fit 16 bits, of which processors compare many at once.
_FAR = 255
# After how many steps of `_by_steps` settled pixels are left behind.
_STOPS = (0, 8, 24, 48, 80, 128, 192, _FAR)
# A square is the sum of the first of 1, 3, 5, 7, ..., so each step to the side costs one of these.
_ODD = [np.array(odd, dtype=np.uint16) for odd in range(1, 2 * _FAR, 2)]
# Pixels are left behind by words of 8, since to move each alone costs much of what it saves: as 16 bytes of squared
# distances, which NumPy takes for a complex number, and as 8 bytes of booleans.
_WORD, _WORD_TYPE = 8, np.complex128
# Up to which share of needed pixels the walk is faster from a mask of any size, since it ends at the last of them.
_FEW = 0.125
# What `nearest_pixels` adds to the rank of a pixel by its columns to the right. Of pixels that are equally
# near, none is 2 and another 4 columns away, so that these may add the same.
_TIES = {-4: 2, -3: 0, -2: 2, -1: 4, 0: 5, 1: 7, 2: 9, 3: 11, 4: 9}
_PER_SQUARE = 13  # more than the largest of `_TIES`, and 1 for a pixel below


def bounding_box(mask: np.ndarray) -> tuple[slice, slice]:
    """Return the part of an image that holds a mask.

    Args:
        mask: Boolean, of shape `(height, width)`.

    Returns:
        Its rows and its columns, none of them if it is empty.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return slice(0, 0), slice(0, 0)
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def squared_distance(mask: np.ndarray, needed: np.ndarray | None = None) -> np.ndarray:
    """Return the squared distance of each pixel to the nearest one of the mask.

    Args:
        mask: Boolean, of shape `(height, width)`, with at least one pixel.
        needed: Boolean of the same shape, where the distance is needed; everywhere by default.

    Returns:
        Integers of the same shape. Distances of 255 pixels and more may be given as 255. Where none is needed, they
        may be too large.
    """
    few = needed is not None and np.count_nonzero(needed) <= _FEW * needed.size
    share = np.count_nonzero(mask) / mask.size
    if few or share >= _DENSE:
        return _by_steps(mask, needed if few else None)
    box = bounding_box(mask)
    if min(axis.stop - axis.start for axis in box) <= _SMALL and max(mask.shape) <= _LARGEST:
        return _of_small_mask(mask, box)
    if share >= _DENSE / 2:
        # Faster than SciPy's around scattered pixels, and about as fast around one compact mask.
        return _by_steps(mask, None)
    nearest = ndimage.distance_transform_edt(~mask, return_distances=False, return_indices=True)
    rows, columns = nearest
    rows -= np.arange(mask.shape[0], dtype=np.int32)[:, None]
    columns -= np.arange(mask.shape[1], dtype=np.int32)
    nearest *= nearest
    rows += columns
    return rows


def _of_small_mask(mask: np.ndarray, box: tuple[slice, slice]) -> np.ndarray:
    """Find, for each row of the image, which pixels have their nearest one in which column of the box.

    In a row, the squared distance of pixel x to column i is (x - i) ** 2 + h_i ** 2, where h_i is the distance to the
    nearest pixel above or below in that column. The parabolas of i and k meet once, where x is
    (k ** 2 + h_k ** 2 - i ** 2 - h_i ** 2) / (2 * (k - i)). So a column is the nearest one of all pixels from where it
    last meets one on its left to where it first meets one on its right.
    """
    (top, bottom), (left, right) = ((axis.start, axis.stop) for axis in box)
    if bottom - top < right - left:
        return _of_small_mask(mask.T, box[::-1]).T
    height, width = mask.shape
    sites = right - left
    # i ** 2 + h_i ** 2, a row for each column of the box, counted from its left. Above and below the box h_i grows on.
    inside = np.ascontiguousarray(mask[box].T)
    row = np.arange(top, bottom, dtype=np.int32)
    nowhere = 2 * height + width  # as a row, farther away from all others than any pixel
    above = np.maximum.accumulate(np.where(inside, row, -nowhere), axis=1)
    below = np.minimum.accumulate(np.where(inside, row, nowhere)[:, ::-1], axis=1)[:, ::-1]
    squares = np.empty((sites, height), dtype=np.float32)
    squares[:, :top] = below[:, :1] - np.arange(top, dtype=np.int32)
    squares[:, top:bottom] = np.minimum(row - above, below - row)
    squares[:, bottom:] = np.arange(bottom, height, dtype=np.int32) - above[:, -1:]
    squares *= squares
    squares += np.square(np.arange(sites, dtype=np.float32))[:, None]

    # How many pixels of each row have their nearest one in each column.
    counts = np.empty((height, sites), dtype=np.int32)
    open_rows, heights = np.arange(height), squares
    start, stop = np.full_like(squares, -np.inf), np.full_like(squares, np.inf)
    # Columns nearby settle most rows. Without those farther away counts can only be too large: a row is settled when
    # they add up to its pixels.
    for steps in (range(1, min(12, sites)), range(12, min(40, sites)), range(40, sites)):
        meeting = np.empty_like(heights)
        for step in steps:
            meet = meeting[step:]
            np.subtract(heights[step:], heights[:-step], out=meet)
            meet *= np.float32(0.5 / step)
            np.minimum(stop[:-step], meet, out=stop[:-step])
            np.maximum(start[step:], meet, out=start[step:])
        # The first pixel behind where they meet. Rounding must not move what meets on a pixel to before it; all other
        # parabolas meet at least 1 / (2 * sites) away from a pixel.
        first, last = (
            np.floor(np.clip(meet + np.float32(1 + 0.25 / sites), -left, width - left)) for meet in (start, stop)
        )
        count = np.maximum(last - first, 0)
        counts[open_rows] = count.T
        still_open = np.flatnonzero(count.sum(axis=0) != width)
        if not still_open.size:
            break
        open_rows = open_rows[still_open]
        heights, start, stop = (values.take(still_open, axis=1) for values in (heights, start, stop))

    at = np.flatnonzero(counts)
    repeats = counts.ravel().take(at)
    x = np.arange(-left, width - left, dtype=np.int32)
    # x ** 2 - 2 * x * i + (i ** 2 + h_i ** 2)
    result = np.repeat((at % sites).astype(np.int32), repeats).reshape(height, width)
    result *= -2 * x
    result += np.repeat(squares.T.ravel().take(at).astype(np.int32), repeats).reshape(height, width)
    result += x * x
    return result


def _by_steps(mask: np.ndarray, needed: np.ndarray | None) -> np.ndarray:
    """Walk away from the mask, first within columns, then to the sides, until no needed pixel comes nearer."""
    height, width = mask.shape
    # Rows lie end to end, and a column that stays far keeps them apart. The rest fills up the last word.
    size = 1 + height * (width + 1)
    flat = np.full(-(-size // _WORD) * _WORD, _FAR, dtype=np.uint16)
    rows = flat[1:size].reshape(height, width + 1)
    np.multiply(~mask, np.uint16(_FAR), out=rows[:, :-1])
    walls = np.append(np.arange(0, size, width + 1), np.arange(size, flat.size))
    # Any distance is the sum of some of 1, 2, 4, 8, ...
    farther = np.empty_like(rows)
    step = 1
    while step < min(height, _FAR):
        np.add(rows, np.uint16(step), out=farther)
        np.minimum(rows[step:], farther[:-step], out=rows[step:])
        np.minimum(rows[:-step], farther[step:], out=rows[:-step])
        step *= 2
    flat *= flat
    in_column = None if needed is None else rows.copy()
    left_behind: list[tuple[np.ndarray, ...]] = []
    for start, stop in itertools.pairwise(_STOPS):
        left, middle, right = flat[:-2], flat[1:-1], flat[2:]
        moved = np.empty_like(middle)
        for odd in _ODD[start:stop]:
            np.minimum(left, right, out=moved)
            np.add(moved, odd, out=moved)
            np.minimum(middle, moved, out=middle)
            flat[walls] = _FAR**2
        unsettled = flat > (stop + 1) ** 2
        unsettled[walls] = False
        if not unsettled.any():
            break
        if needed is not None and in_column is not None and stop == _STOPS[1]:
            row, column = np.nonzero(unsettled[1:size].reshape(rows.shape)[:, :-1] & needed)
            if row.size <= height:
                # Look for the nearest column of each of the few that are left.
                squares = np.square(np.arange(width, dtype=np.int32) - column.astype(np.int32)[:, None])
                squares += in_column[row, :-1]
                rows[row, column] = np.minimum(squares.min(axis=1, initial=_FAR**2), _FAR**2)
                break
        # Go on with the words of what more steps may still bring nearer, and a word on either side. So the first and
        # last pixel of adjacent words are settled: they become walls, which keep apart what was not side by side.
        kept = np.flatnonzero(_with_neighbours(unsettled.view(np.uint64) != 0))
        is_wall = np.zeros(flat.size, dtype=bool)
        is_wall[walls] = True
        is_wall = is_wall.view(np.uint64).take(kept).view(bool)
        gaps = np.diff(kept, prepend=-1, append=-1) != 1
        is_wall[::_WORD] |= gaps[:-1]
        is_wall[_WORD - 1 :: _WORD] |= gaps[1:]
        outer, flat = flat, flat.view(_WORD_TYPE).take(kept).view(np.uint16)
        walls = np.flatnonzero(is_wall)
        left_behind.append((outer, kept, walls, flat.take(walls)))
    for outer, kept, walls, values in reversed(left_behind):
        flat[walls] = values
        outer.view(_WORD_TYPE)[kept] = flat.view(_WORD_TYPE)
        flat = outer
    return rows[:, :-1]


def _with_neighbours(pixels: np.ndarray) -> np.ndarray:
    grown = pixels.copy()
    grown[1:] |= pixels[:-1]
    grown[:-1] |= pixels[1:]
    return grown


def _ranks() -> tuple[np.ndarray, np.ndarray]:
    """Return how many rows below and columns to the right a pixel of each rank in `nearest_pixels` lies."""
    below, right = np.zeros(256, dtype=np.intp), np.zeros(256, dtype=np.intp)
    for down, (column, tie) in itertools.product(range(-FRAME, FRAME + 1), _TIES.items()):
        square = down**2 + column**2
        if square <= 2 * REACH**2:
            rank = _PER_SQUARE * square + tie + (down > 0)
            below[rank], right[rank] = down, column
    return below, right


_BELOW, _RIGHT = _ranks()


def nearest_pixels(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where all pixels are that the Gaussian reaches from the mask, and where the nearest one of the mask is.

    Of several pixels that are equally near, the leftmost is taken, and of those in its column the upper one, as
    SciPy's transform does in `py_sod_metrics`.

    Args:
        mask: Boolean, of shape `(height, width)`.

    Returns:
        Two arrays of one length, places in the flattened mask with a frame of `FRAME` pixels around it.
    """
    height, width = (size + 2 * FRAME for size in mask.shape)
    # A pixel of the mask has the rank 13 * squared distance + tie of its column + (1 if it is below), at most 255 if
    # it is near enough. What is left of 255 is kept, 0 for all others.
    framed = np.zeros((height, width), dtype=np.uint8)
    np.multiply(mask, np.uint8(255), out=framed[FRAME:-FRAME, FRAME:-FRAME])
    in_column = framed[FRAME:-FRAME].copy()
    moved = np.empty_like(in_column)
    for step in range(1, FRAME + 1):
        left = 255 - _PER_SQUARE * step**2
        for rows, value in ((framed[FRAME - step : -FRAME - step], left), (framed[FRAME + step :], left - 1)):
            np.bitwise_and(rows[: mask.shape[0]], np.uint8(value), out=moved)
            np.maximum(in_column, moved, out=in_column)
    # Rows lie end to end, and the frame keeps them apart.
    flat, moved = in_column.ravel(), moved.ravel()
    best = np.zeros_like(flat)
    inner = best[FRAME:-FRAME]
    for step, tie in _TIES.items():
        cost = _PER_SQUARE * step**2 + tie
        # Do not go below 0. NumPy compares with an array much faster than with a number.
        moved.fill(cost)
        np.maximum(flat, moved, out=moved)
        np.subtract(moved, np.uint8(cost), out=moved)
        np.maximum(inner, moved[FRAME + step : flat.size - FRAME + step], out=inner)
    rows = best.reshape(in_column.shape)
    rows[:, :FRAME] = rows[:, -FRAME:] = 0
    # The mask itself has the lowest rank. That of 0 turns into a large number.
    at = np.flatnonzero(best - np.uint8(1) < 254 - _TIES[0])
    rank = np.uint8(255) - best.take(at)
    at += FRAME * width
    return at, at + (_BELOW * width + _RIGHT).take(rank)


__all__ = ["FRAME", "REACH", "bounding_box", "nearest_pixels", "squared_distance"]
