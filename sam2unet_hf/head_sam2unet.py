"""The head in a scan, whatever surrounds it: zeros, another constant, noise, or specks."""

import numpy as np
from scipy import ndimage


BLOCK = 4  # voxels a side of the blocks in which a volume is looked over fast
MIN_BLOCK_SHARE = 0.25  # of a block, which the head fills near its surface too, and specks do not
MIN_PART_SHARE = 0.01  # of the largest part; smaller ones apart from it are specks
MIN_RUN_SHARE = 0.85  # how often the neighbour of a background voxel is one too; less is noise
MAX_QUIET_SHARE = 0.25  # of the head, whose values could be noise; more means that both have the same mean
MIN_HEAD_SHARE = 0.005  # of a volume; less is not a head

_CUBE = np.ones((3, 3, 3), bool)


def find_head(voxels: np.ndarray) -> np.ndarray:
    """Find the voxels of the head in a scan.

    Where the background is one value, the head is all that differs from it, but for specks apart from it. Where it is
    noise, the head is the largest part, holes included, in which the scan deviates from the background by much more
    than the noise does.

    Args:
        voxels: Array of three axes, finite. A scan that is not skull-stripped has the skull and the skin as its head.

    Returns:
        Booleans of the shape and in the memory order of `voxels`. All are false if all voxels are equal.
    """
    axes = memory_order(voxels)
    voxels = voxels.transpose(axes)
    background = _constant_background(voxels)
    if background is None:
        head = _head_in_noise(voxels)
        head = voxels != 0 if head is None else head
    else:
        head = _without_specks(voxels != background)
    return head.transpose(np.argsort(axes))


def memory_order(array: np.ndarray) -> np.ndarray:
    """Return the axes from the one with the largest stride on: scanning an array in another order takes far longer."""
    return np.argsort(np.abs(array.strides), kind="stable")[::-1]


def bounding_box(mask: np.ndarray) -> tuple[slice, slice, slice]:
    """Return the smallest box that holds the true voxels of a volume, fastest if it is in memory order."""
    shadow = np.bitwise_or.reduce(mask, axis=0)
    places = [np.flatnonzero(line) for line in (mask.any(axis=(1, 2)), shadow.any(axis=1), shadow.any(axis=0))]
    first, second, third = (slice(found[0], found[-1] + 1) if found.size else slice(0, 0) for found in places)
    return first, second, third


def _faces(volume: np.ndarray) -> list[np.ndarray]:
    """Return the six outer slices of a volume, of which some are the same in one that is one voxel thick."""
    return [np.take(volume, end, axis) for axis in range(3) for end in (0, -1)]


def _on_faces(volume: np.ndarray) -> np.ndarray:
    """Return the values on the faces of a volume."""
    return np.concatenate([face.ravel() for face in _faces(volume)])


def _constant_background(voxels: np.ndarray) -> np.generic | None:
    """Return the one value of the background, or `None` if there is none.

    It is the value on which the eight corners agree, 0 in BraTS, or else 0 or the most frequent value on the faces of
    the volume, if it lies there in areas; single values that are equal by chance are noise.
    """
    corners = voxels[np.ix_([0, -1], [0, -1], [0, -1])]
    if (corners == corners.flat[0]).all():
        return corners.flat[0]
    faces = _faces(voxels)
    values, counts = np.unique(_on_faces(voxels), return_counts=True)
    for background in (voxels.dtype.type(0), values[counts.argmax()]):
        there = [face == background for face in faces]
        pairs = [(face[:-1], face[1:]) for face in there] + [(face[:, :-1], face[:, 1:]) for face in there]
        both = sum(np.count_nonzero(one & other) for one, other in pairs)
        either = sum(np.count_nonzero(one) + np.count_nonzero(other) for one, other in pairs) / 2
        if both > MIN_RUN_SHARE * either:
            return background
    return None


def _without_specks(head: np.ndarray) -> np.ndarray:
    """Leave out small parts that lie apart from the others, if there are any."""
    counts = _count_in_blocks(head)
    counts = counts[bounding_box(counts > 0)]
    dense, n_parts = ndimage.label(counts >= MIN_BLOCK_SHARE * BLOCK**3, _CUBE)
    if not n_parts:
        return head
    near = ndimage.maximum_filter(_large_parts(dense, n_parts), 3)  # with the blocks around
    if not counts[~near].any():
        return head
    return _large_parts(*ndimage.label(head))


def _count_in_blocks(head: np.ndarray) -> np.ndarray:
    """Count the true voxels in blocks of `BLOCK` voxels a side; those at the far ends may be thinner."""
    counts = head.view(np.uint8)
    for axis in range(3):
        along = np.moveaxis(counts, axis, 0)
        sums = np.zeros((-(-len(along) // BLOCK), *along.shape[1:]), np.uint8)
        for offset in range(BLOCK):
            layers = along[offset::BLOCK]
            sums[: len(layers)] += layers
        counts = np.moveaxis(sums, 0, axis)
    return counts


def _large_parts(parts: np.ndarray, n_parts: int) -> np.ndarray:
    """Return where the parts of a labelled volume lie that are not much smaller than the largest."""
    sizes = _sizes_of(parts, n_parts)
    return _look_up(sizes >= max(MIN_PART_SHARE * sizes.max(), 1), parts)


def _sizes_of(parts: np.ndarray, n_parts: int) -> np.ndarray:
    """Count the voxels of each part by its number; those of 0, which is no part, count as none."""
    sizes = np.zeros(n_parts + 1, np.int64)
    for some in np.array_split(parts, -(-parts.size // 2**22)):  # `bincount` makes a copy of 8 bytes a voxel
        sizes += np.bincount(some.ravel(), minlength=n_parts + 1)
    sizes[0] = 0
    return sizes


def _look_up(table: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Return `table[parts]`, a layer at a time, for its indices would take 8 bytes a voxel."""
    found = np.empty(parts.shape, table.dtype)
    for layer, numbers in zip(found, parts, strict=True):
        layer[...] = table[numbers]
    return found


def _head_in_noise(voxels: np.ndarray) -> np.ndarray | None:
    """Find the head by how far its values are from those of the background, or `None` if there is none to find."""
    with np.errstate(over="ignore", invalid="ignore"):  # of values that no scan has
        level = np.median(_on_faces(voxels)).astype(np.float32)
        rough, noise_energy = _part_of_high_energy(voxels, level, 3, 4.0)
        quiet = np.abs(np.subtract(voxels, level, dtype=np.float32)) <= 4 * np.sqrt(noise_energy)
        inner = _shrink(rough, 2)
        if not inner.any():
            return None
        if np.count_nonzero(quiet & inner) <= MAX_QUIET_SHARE * np.count_nonzero(inner):
            head = inner | (rough & ~quiet)  # the quiet voxels near the surface are noise
        else:  # the values of the head lie about that of the background, and only larger windows tell them apart
            head = _shrink(_part_of_high_energy(voxels, level, 5, 2.0)[0], 2)
    return head if head.mean() > MIN_HEAD_SHARE else None


def _part_of_high_energy(
    voxels: np.ndarray, level: np.floating, window: int, factor: float
) -> tuple[np.ndarray, np.floating]:
    """Find the largest part, holes filled, of more than `factor` times the energy of the noise; return that, too.

    Energy is the mean squared deviation from `level` in a window, so that the part is larger than the head by half a
    window.
    """
    energy = np.subtract(voxels, level, dtype=np.float32)
    np.square(energy, out=energy)
    ndimage.uniform_filter(energy, window, output=energy, mode="nearest")
    noise_energy = np.median(_on_faces(energy))
    energetic = energy > factor * noise_energy
    del energy  # large volumes fill the memory
    parts, n_parts = ndimage.label(energetic)
    outside = parts != max(_sizes_of(parts, n_parts).argmax(), 1)
    del parts
    others, n_others = ndimage.label(outside)
    is_inside = np.ones(n_others + 1, bool)  # 0 is the part itself, the others are its holes or reach the faces
    on_faces = _on_faces(others)
    is_inside[on_faces[on_faces > 0]] = False
    return _look_up(is_inside, others), noise_energy


def _shrink(part: np.ndarray, margin: int) -> np.ndarray:
    """Take a margin of voxels away from a part, but for the faces of the volume, where it goes on."""
    return ndimage.minimum_filter(part.view(np.uint8), 2 * margin + 1, mode="nearest").view(bool)
