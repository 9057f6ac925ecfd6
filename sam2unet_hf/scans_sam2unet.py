"""One NIfTI scan: reading it, its axes, intensities, slices and labels, and writing on its grid.

Arrays have the axes (left, posterior, superior): indices grow toward the patient's left, back and head. That is how
BraTS itself stores its scans, so its files are read without a copy.
"""

import functools
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from nibabel import orientations

from .nifti_sam2unet import ScanError, open_nifti, read_header, read_voxels, value_dtype, write_nifti


# The modalities, and the endings of their files in BraTS 2017-2021 and from 2023 on. A further modality needs a line
# here and nothing else: finding files, checks, errors and help follow this table.
MODALITIES: dict[str, tuple[str, str]] = {
    "t1": ("_t1", "-t1n"),
    "t1ce": ("_t1ce", "-t1c"),
    "t2": ("_t2", "-t2w"),
    "flair": ("_flair", "-t2f"),
}

DECATHLON_ORDER = ("flair", "t1", "t1ce", "t2")  # of the modalities along the fourth axis of a file

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}  # the axis that the index of a slice refers to

GRID_TOLERANCE_MM = 0.1

_LPS = orientations.axcodes2ornt("LPS")


def check_modalities(modalities: Sequence[str]) -> None:
    """Check that these are one or more modalities, each of them once.

    Raises:
        ValueError: If there is none, an unknown one, or the same one twice.
    """
    if not modalities or not set(modalities) <= set(MODALITIES) or len(set(modalities)) < len(modalities):
        raise ValueError(
            f"`modalities` must name one or more of {', '.join(MODALITIES)}, each once, got {list(modalities)}."
        )


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan in memory.

    Args:
        name: The file it came from, and the case if known, for messages.
        voxels: Array of shape `(left, posterior, superior)`, usually a read-only view of the bytes of the file.
        affine: The file's own affine, from its voxel indices to RAS+ world coordinates in mm.
        lps_affine: The affine that belongs to `voxels`, to RAS+ world coordinates in mm.
        header: The header of the file, without its extensions.
    """

    name: str
    voxels: np.ndarray
    affine: np.ndarray
    lps_affine: np.ndarray
    header: nib.Nifti1Header

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Voxel size along the left, posterior and superior axes."""
        return tuple(float(size) for size in nib.affines.voxel_sizes(self.lps_affine))

    def to_file_grid(self, array: np.ndarray) -> np.ndarray:
        """Return an array of shape `(left, posterior, superior)` in the axis order and directions of the file."""
        transform = orientations.ornt_transform(_LPS, orientations.io_orientation(self.affine))
        return orientations.apply_orientation(array, transform)

    def from_file_grid(self, array: np.ndarray) -> np.ndarray:
        """Return an array in the axis order and directions of the file with the axes (left, posterior, superior)."""
        return orientations.apply_orientation(array, _to_lps(self.affine, self.name))


def read_volume(path: str | os.PathLike, case_id: str | None = None) -> Volume:
    """Read a NIfTI file, plain or gzipped, and turn its axes to (left, posterior, superior).

    Args:
        path: A NIfTI-1 or -2 file with one 3-D volume of integers or floats, in either byte order. Those of the
            Decathlon hold four: `find_cases` and `BratsCase.read_images` read them.
        case_id: Named in messages if given.

    Returns:
        The volume, in the type of the file; in floating point if the file scales its values.

    Raises:
        ScanError: If the file cannot be read, is damaged or cut off, is larger than `MAX_VOLUME_BYTES` or than
            its header says, or holds something else.
    """
    return read_volumes(path, case_id)[0]


def read_volumes(
    path: str | os.PathLike, case_id: str | None, modalities: Sequence[str] | None = None
) -> list[Volume]:
    """Read a file of one volume, or these modalities of a file of the Decathlon, which is decompressed once."""
    name = f"case {case_id}: `{path}`" if case_id else f"`{path}`"
    with open_nifti(path, name) as file:
        header = read_header(file, name)
        shape, dtype, affine = header.get_data_shape(), header.get_data_dtype(), header.get_best_affine()
        _check_shape(shape, name, modalities)
        data = read_voxels(file, header, name)
    transform = _to_lps(affine, name)
    lps_affine = affine @ orientations.inv_ornt_aff(transform, shape[:3])
    parts = {name: 0}
    if modalities is not None:
        parts = {f"{name} ({modality})": DECATHLON_ORDER.index(modality) for modality in modalities}
    stack = np.frombuffer(data, dtype).reshape((*shape[:3], -1), order="F")
    volumes = []
    for part, index in parts.items():
        # Copy one of several volumes, because a view would keep the others in memory.
        voxels = stack[..., index].astype(dtype.newbyteorder("="), copy=modalities is not None)
        voxels = orientations.apply_orientation(_to_values(voxels, header, part), transform)  # a view
        volumes.append(Volume(part, voxels, affine, lps_affine, header))
    return volumes


def _check_shape(shape: tuple[int, ...], name: str, modalities: Sequence[str] | None) -> None:
    """Check that a file holds one volume, or those of the Decathlon if modalities of it are asked for."""
    if modalities is None and (len(shape) != 3 or min(shape) < 1):
        raise ScanError(
            f"{name} has the shape {shape}, expected one 3-D volume. Split it into one file each. One of the Medical "
            "Segmentation Decathlon is read as it is by way of `find_cases`."
        )
    if modalities is not None and (len(shape) != 4 or shape[3] != len(DECATHLON_ORDER) or min(shape) < 1):
        raise ScanError(
            f"{name} has the shape {shape}, expected four 3-D volumes, {', '.join(DECATHLON_ORDER)}. Download it "
            "again, or cut it down to these."
        )


def _to_values(voxels: np.ndarray, header: nib.Nifti1Header, name: str) -> np.ndarray:
    """Scale voxels as their header says, and check that they are numbers that double precision holds."""
    slope, intercept = header.get_slope_inter()
    if (slope, intercept) != (1, 0):
        voxels = voxels.astype(value_dtype(header))
        with np.errstate(over="ignore", invalid="ignore"):  # infinite and NaN values are refused below
            voxels *= slope
            voxels += intercept
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise ScanError(
            f"{name} holds {np.count_nonzero(~np.isfinite(voxels))} voxels that are NaN or infinite. Repair it or "
            "download it again."
        )
    if voxels.dtype.itemsize == 8 and voxels.dtype.kind in "iu" and max(int(voxels.max()), -int(voxels.min())) > 2**53:
        raise ScanError(f"{name} holds integers beyond 2**53, which no scan does. Download it again.")
    return voxels


def _to_lps(affine: np.ndarray, name: str) -> np.ndarray:
    """Return how to turn the axes of a file to (left, posterior, superior)."""
    with np.errstate(over="ignore", invalid="ignore"):
        sizes_mm = nib.affines.voxel_sizes(affine)  # out of these bounds the affine is damaged
        usable = np.isfinite(affine).all() and ((1e-6 < sizes_mm) & (sizes_mm < 1e6)).all()
        orientation = orientations.io_orientation(affine) if usable else np.full((3, 2), np.nan)
    if np.isnan(orientation).any():
        raise ScanError(f"{name} has no usable affine: {affine.tolist()}. Repair its header.")
    return orientations.ornt_transform(orientation, _LPS)


@dataclass(frozen=True)
class IntensityWindow:
    """How the intensities of one scan become 8-bit grey: `low` and all below 0, `high` and all above 255."""

    low: float
    high: float
    background: float  # outside the head, where voxels become 0 even if the window includes it

    def apply(self, voxels: np.ndarray) -> np.ndarray:
        """Return `voxels`, of any shape, as `uint8`. A scan of one foreground value becomes 255 there."""
        if self.high > self.low:
            low, high = self.low, self.high
            exponent = math.frexp(max(abs(low), abs(high)))[1]
            with np.errstate(over="ignore"):  # of values far outside the window, which are clipped
                if abs(exponent) < 60:
                    grey = voxels.astype(np.result_type(voxels, np.float32))
                else:  # the differences or their inverse could overflow the type
                    grey = np.ldexp(voxels.astype(np.float64), -exponent)
                    low, high = math.ldexp(low, -exponent), math.ldexp(high, -exponent)
                grey -= low
                grey *= 255 / (high - low)
            np.clip(grey, 0, 255, out=grey)
            grey = np.rint(grey, out=grey).astype(np.uint8)
        else:
            grey = np.full(voxels.shape, 255, np.uint8)
        grey[voxels == self.background] = 0
        return grey


def intensity_window(volume: Volume) -> IntensityWindow:
    """Choose the window of a scan: the 0.5 and 99.5 percentiles of its foreground.

    The background is the value on which the eight corners agree (0 in BraTS, a negative constant in scans that were
    z-scored as a whole), else 0. Percentiles are those of `np.percentile`.

    Args:
        volume: A skull-stripped scan.

    Raises:
        ScanError: If every voxel is background.
    """
    corners = volume.voxels[np.ix_([0, -1], [0, -1], [0, -1])]
    background = corners.flat[0] if (corners == corners.flat[0]).all() else volume.voxels.dtype.type(0)
    foreground = _in_memory_order(volume.voxels)
    foreground = foreground[foreground != background]
    if not foreground.size:
        raise ScanError(
            f"{volume.name} is empty: all voxels are {background}, there is nothing to scale. Download it again."
        )
    low, high = _percentiles(foreground, (0.5, 99.5))
    return IntensityWindow(low, high, float(background))


def to_grey(volume: Volume) -> np.ndarray:
    """Scale a whole scan to 8-bit grey, by the window that [`intensity_window`] chooses.

    Args:
        volume: A skull-stripped scan.

    Returns:
        `uint8` array of shape `(left, posterior, superior)`: exactly 0 outside the head, whatever value the background
        of the scan has, and 0 to 255 in the head.

    Raises:
        ScanError: If every voxel is background.
    """
    window = intensity_window(volume)
    grey = np.empty_like(volume.voxels, np.uint8)  # in the memory order of the voxels
    # Scale one layer of memory at a time, which stays in the processor's cache.
    for layer, voxels in zip(_in_memory_order(grey), _in_memory_order(volume.voxels), strict=True):
        layer[...] = window.apply(voxels)
    return grey


def head_box(greys: Sequence[np.ndarray], plane: str) -> list[int]:
    """Find the box that holds the head in every slice of a plane.

    Args:
        greys: Scans of one patient as [`to_grey`] gives them, all of one shape.
        plane: `"axial"`, `"coronal"` or `"sagittal"`.

    Returns:
        `[x_min, y_min, x_max, y_max]` in pixels of a slice as [`take_slice`] cuts it, half-open: the smallest box that
        holds what is not 0 in any of the scans.

    Raises:
        ValueError: If all scans are 0 everywhere, which no result of [`to_grey`] is.
    """
    cut_axis = PLANES[plane]
    shadow = functools.reduce(np.bitwise_or, [np.bitwise_or.reduce(grey, axis=cut_axis) for grey in greys])
    # Turn the shadow as a slice is turned, by cutting the one slice of a volume that is as thick as that.
    pixels = take_slice(np.expand_dims(shadow, cut_axis), plane, 0)
    box = []
    for axis in (0, 1):  # x, which lies along the rows, then y
        places = np.flatnonzero(pixels.any(axis=axis))
        if not places.size:
            raise ValueError("`greys` are 0 everywhere, there is no head to find a box of.")
        box.append((int(places[0]), int(places[-1]) + 1))
    (x_min, x_max), (y_min, y_max) = box
    return [x_min, y_min, x_max, y_max]


def foreground_slices(greys: Sequence[np.ndarray], plane: str) -> list[int]:
    """Find the slices of a plane that show the head.

    Args:
        greys: Scans of one patient as [`to_grey`] gives them, all of one shape.
        plane: `"axial"`, `"coronal"` or `"sagittal"`.

    Returns:
        The indices of those in which any of the scans is not 0, from the lowest on.
    """
    others = tuple(axis for axis in range(3) if axis != PLANES[plane])
    foreground = np.any([grey.any(axis=others) for grey in greys], axis=0)
    return np.flatnonzero(foreground).tolist()


def _in_memory_order(voxels: np.ndarray) -> np.ndarray:
    """Return a view that is fast to scan: a boolean index over a Fortran-ordered array takes several times longer."""
    return voxels.transpose(np.argsort(np.abs(voxels.strides))[::-1])


def _percentiles(values: np.ndarray, percents: tuple[float, ...]) -> list[float]:
    """Compute what `np.percentile` does of a 1-D array, which is reordered, but without overflows.

    Those of 16-bit integers, the type of BraTS, come from a histogram, which is faster.
    """
    if values.dtype.kind == "f":
        with np.errstate(over="ignore", invalid="ignore"):
            found = np.percentile(values, percents, overwrite_input=True)
            if not np.isfinite(found).all():  # the difference of two neighbours overflows the type
                found = 4 * np.percentile(values / 4, percents)
        return [float(value) for value in found]
    positions = [percent / 100 * (values.size - 1) for percent in percents]
    # The sorted values on either side of each position, then linear interpolation between them.
    ranks = [rank for position in positions for rank in (math.floor(position), math.ceil(position))]
    if values.dtype.itemsize > 2:
        values.partition(sorted(set(ranks)))
        neighbours = values[ranks].tolist()
    else:
        lowest = int(values.min())
        cumulative = np.cumsum(np.bincount(np.subtract(values, lowest, dtype=np.intp)))
        neighbours = (np.searchsorted(cumulative, ranks, side="right") + lowest).tolist()
    pairs = zip(neighbours[::2], neighbours[1::2], positions, strict=True)
    return [float(below + (above - below) * (position % 1)) for below, above, position in pairs]


def take_slice(voxels: np.ndarray, plane: str, index: int) -> np.ndarray:
    """Cut one slice, as radiologists look at it and one voxel per pixel.

    Args:
        voxels: Array of shape `(left, posterior, superior)`.
        plane: `"axial"`: front at the top, patient's left at the right, counted from the feet up. `"coronal"`: head
            at the top, patient's left at the right, counted from the front. `"sagittal"`: head at the top, front at
            the left, counted from the patient's right.
        index: Position along the axis that the plane cuts.

    Returns:
        View of shape `(height, width)`.
    """
    if plane == "axial":
        return voxels[:, :, index].T
    if plane == "coronal":
        return voxels[:, index, ::-1].T
    if plane == "sagittal":
        return voxels[index, :, ::-1].T
    raise ValueError(f"`plane` must be one of {', '.join(PLANES)}, got {plane!r}.")


def pixel_size_mm(spacing_mm: Sequence[float], plane: str) -> tuple[float, float]:
    """Return height and width of a pixel of [`take_slice`] in mm, from what `Volume.spacing_mm` gives."""
    width, height = (size for axis, size in enumerate(spacing_mm) if axis != PLANES[plane])
    return height, width


def to_tumour_labels(volume: Volume, since_2023: bool, decathlon: bool) -> np.ndarray:
    """Map a mask's labels, of BraTS 2017-2021 unless told, to `uint8`: 0 background, 1 NCR/NET, 2 ED, 3 ET."""
    known = (0, 1, 2, 3) if since_2023 or decathlon else (0, 1, 2, 4)
    tumour = _in_memory_order(volume.voxels)
    unknown = np.setdiff1d(tumour[tumour != 0], known)
    if unknown.size:
        source = "of this name"
        advice = (
            "names with `_seg` have the labels of 2017-2021 (ET is 4), names with `-seg` those of 2023 (ET is 3; the "
            "resection cavity of 2024, 4, is not supported). Relabel or rename it."
        )
        if decathlon:
            source, advice = "of the Decathlon", "1 is ED, 2 NCR/NET and 3 ET. Relabel it or download it again."
        raise ScanError(
            f"{volume.name} holds {unknown.size} unknown labels ({', '.join(f'{label:g}' for label in unknown[:5])}). "
            f"A mask {source} may hold {', '.join(map(str, known))}: {advice}"
        )
    ids = np.minimum(volume.voxels.astype(np.uint8), 3)  # ET is the highest label of every set
    return np.array([0, 2, 1, 3], np.uint8)[ids] if decathlon else ids


def check_same_grid(first: Volume, second: Volume) -> None:
    """Check that two volumes cover the same voxels in space, to within `GRID_TOLERANCE_MM` at each corner."""
    if first.voxels.shape != second.voxels.shape:
        raise ScanError(
            f"{first.name} has the shape {first.voxels.shape}, {second.name} {second.voxels.shape} (left, "
            "posterior, superior). Resample one onto the other."
        )
    corners = list(itertools.product(*((0, size - 1) for size in first.voxels.shape)))
    shifts_mm = nib.affines.apply_affine(first.lps_affine - second.lps_affine, corners)
    distance_mm = np.linalg.norm(shifts_mm, axis=1).max()
    if distance_mm > GRID_TOLERANCE_MM:
        raise ScanError(
            f"{first.name} and {second.name} have different affines: a corner lies {distance_mm:.3g} mm apart, "
            f"allowed are {GRID_TOLERANCE_MM} mm. Resample one onto the other."
        )


__all__ = [
    "ScanError",
    "Volume",
    "foreground_slices",
    "head_box",
    "intensity_window",
    "read_volume",
    "take_slice",
    "to_grey",
    "write_nifti",
]
