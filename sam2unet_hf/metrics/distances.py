"""Distances to the nearest pixel of a mask, for the weighted F-measure.

SciPy's distance transform takes longer than all other metrics of an image together. Small masks, and those that fill
much of the image, go faster ways with the same result.
"""

import numpy as np
from scipy import ndimage


REACH = 3  # of the Gaussian in the weighted F-measure, in rows and columns
# Whatever it reaches from the mask has its nearest pixel at most so many rows and columns away.
FRAME = REACH + 1
# The longest shorter side of the box around a small mask, and the least share of its image that a dense one fills.
_SMALL = 128
_DENSE = 0.25
# The longest side of images in which all squared distances are exact in single precision.
_LARGEST = 1300
# Squares of distances up to here fit 16 bits, of which processors compare most at once.
_FAR = 255
# More than any rank in `nearest_pixels`.
_NOT_NEAR = 2**15


def bounding_box(mask: np.ndarray) -> tuple[slice, slice]:
    """Return the rows and columns that hold a mask of shape `(height, width)`; none if it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return slice(0, 0), slice(0, 0)
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def squared_distance(mask: np.ndarray) -> np.ndarray:
    """Return the squared distance of each pixel to the nearest one of the mask.

    Args:
        mask: Boolean, of shape `(height, width)`, with at least one pixel.

    Returns:
        Integers of the same shape. Distances of 255 pixels and more may be given as 255.
    """
    box = bounding_box(mask)
    if min(axis.stop - axis.start for axis in box) <= _SMALL and max(mask.shape) <= _LARGEST:
        return _of_small_mask(mask, box)
    if np.count_nonzero(mask) >= _DENSE * mask.size:
        return _of_dense_mask(mask)
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
    # Columns nearby settle most rows. Without those farther away counts can only be too large, so a row is settled when
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


def _of_dense_mask(mask: np.ndarray) -> np.ndarray:
    """Walk away from the mask, first within columns, then to the sides, until no pixel comes nearer."""
    height, width = mask.shape
    # Rows lie end to end, and a column that stays far keeps them apart.
    flat = np.full(1 + height * (width + 1), _FAR, dtype=np.uint16)
    rows = flat[1:].reshape(height, width + 1)
    np.multiply(~mask, np.uint16(_FAR), out=rows[:, :-1])
    walls = np.arange(0, flat.size, width + 1)
    # Any distance is the sum of some of 1, 2, 4, 8, ...
    step = 1
    while step < min(height, _FAR):
        farther = rows + np.uint16(step)
        from_above = np.minimum(rows[step:], farther[:-step])
        np.minimum(rows[:-step], farther[step:], out=rows[:-step])
        np.minimum(rows[step:], from_above, out=rows[step:])
        step *= 2
    flat *= flat
    # A square is the sum of the first of 1, 3, 5, 7, ..., so each step to the side costs one of them.
    moved = np.empty(flat.size - 2, dtype=np.uint16)
    left_behind: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, _FAR, 24):
        steps = range(start, min(start + 24, _FAR))
        moved = moved[: flat.size - 2]
        for step in steps:
            np.minimum(flat[:-2], flat[2:], out=moved)
            moved += np.uint16(2 * step + 1)
            np.minimum(flat[1:-1], moved, out=flat[1:-1])
            flat[walls] = _FAR**2
        # Go on with what more steps may still bring nearer, the pixels beside it, and walls where others are left out.
        unsettled = flat > (steps.stop + 1) ** 2
        unsettled[walls] = False
        if not unsettled.any():
            break
        beside = _with_neighbours(unsettled)
        beside[walls] = False
        kept = _with_neighbours(beside)
        left_behind.append((flat, kept))
        walls = np.flatnonzero(~beside[kept])
        flat = flat[kept]
        left_behind.append((flat[walls], walls))
        flat[walls] = _FAR**2
    while left_behind:
        values, walls = left_behind.pop()
        flat[walls] = values
        outer, kept = left_behind.pop()
        outer[kept] = flat
        flat = outer
    return rows[:, :-1]


def _with_neighbours(pixels: np.ndarray) -> np.ndarray:
    grown = pixels.copy()
    grown[1:] |= pixels[:-1]
    grown[:-1] |= pixels[1:]
    return grown


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
    # A pixel of the mask has the rank 32 * squared distance + 2 * (columns to the right + 4) + (1 if it is below).
    framed = np.full((height, width), _NOT_NEAR, dtype=np.uint16)
    np.multiply(~mask, np.uint16(_NOT_NEAR), out=framed[FRAME:-FRAME, FRAME:-FRAME])
    in_column = framed[FRAME:-FRAME].copy()
    moved = np.empty_like(in_column)
    for step in range(1, FRAME + 1):
        np.add(framed[FRAME + step : height - FRAME + step], np.uint16(1), out=moved)
        np.minimum(moved, framed[FRAME - step : -FRAME - step], out=moved)
        moved += np.uint16(32 * step**2)
        np.minimum(in_column, moved, out=in_column)
    # Rows lie end to end, and the frame keeps them apart.
    flat = in_column.ravel()
    rank = flat + np.uint16(2 * FRAME)
    inner, moved = rank[FRAME:-FRAME], moved.ravel()[: -2 * FRAME]
    for step in (*range(-FRAME, 0), *range(1, FRAME + 1)):
        to_the_right = flat[FRAME + step : flat.size - FRAME + step]
        np.add(to_the_right, np.uint16(32 * step**2 + 2 * (step + FRAME)), out=moved)
        np.minimum(inner, moved, out=inner)
    rank.reshape(in_column.shape)[:, :FRAME] = rank.reshape(in_column.shape)[:, -FRAME:] = _NOT_NEAR
    # The mask itself has ranks below 32, from which the difference turns into a large number.
    at = np.flatnonzero(rank - np.uint16(32) < 32 * 2 * REACH**2)
    ranks = rank.take(at).astype(np.int32)
    right, below = (ranks >> 1 & 15) - FRAME, ranks & 1
    down = np.sqrt((ranks >> 5) - right * right).astype(np.int32) * (2 * below - 1)
    at += FRAME * width
    return at, at + down * width + right


__all__ = ["FRAME", "REACH", "bounding_box", "nearest_pixels", "squared_distance"]
