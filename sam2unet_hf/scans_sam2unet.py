"""One NIfTI scan: reading it, its axes, intensities, slices and labels, and writing on its grid.

Arrays have the axes (left, posterior, superior): indices grow toward the patient's left, back and head. That is how
BraTS itself stores its scans, so its files are read without a copy.
"""

import contextlib
import math
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import nibabel as nib
import numpy as np
from isal import igzip, igzip_lib, isal_zlib
from nibabel import orientations
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError


MODALITIES = ("t1", "t1ce", "t2", "flair")

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}  # the axis that a slice index counts along

GRID_TOLERANCE_MM = 0.1

# The largest file that is read, its voxels counted with at least 4 bytes each: 512 x 512 x 512 of them, or four
# volumes of 256 x 256 x 256 in double precision. Reading, scaling and windowing one takes less than 2 GB.
MAX_VOLUME_BYTES = 2**29

MAX_TRAILING_BYTES = 4096  # behind the voxels, where some writers pad; more means that the header lies

_VOXEL_SIZES_MM = (1e-6, 1e6)  # beyond them an affine is damaged

DECATHLON_ORDER = ("flair", "t1", "t1ce", "t2")  # along the fourth axis of its files

_TO_LPS = orientations.axcodes2ornt("LPS")


class ScanError(ValueError):
    """A case or scan that cannot be used as it is; the message names it and says what to do."""


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan in memory.

    Attributes:
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
        transform = orientations.ornt_transform(_TO_LPS, orientations.io_orientation(self.affine))
        return orientations.apply_orientation(array, transform)

    def from_file_grid(self, array: np.ndarray) -> np.ndarray:
        """Return an array in the axis order and directions of the file with the axes (left, posterior, superior)."""
        transform = orientations.ornt_transform(orientations.io_orientation(self.affine), _TO_LPS)
        return orientations.apply_orientation(array, transform)


@dataclass(frozen=True)
class IntensityWindow:
    """How the intensities of one scan become 8-bit grey.

    Attributes:
        low: This and everything below becomes 0.
        high: This and everything above becomes 255.
        background: The value of the voxels outside the head, which become 0 wherever the window lies.
    """

    low: float
    high: float
    background: float

    def apply(self, voxels: np.ndarray) -> np.ndarray:
        """Return `voxels`, of any shape, as `uint8`. A scan of one foreground value becomes 255 there."""
        if self.high > self.low:
            low, high = self.low, self.high
            exponent = math.frexp(max(abs(low), abs(high)))[1]
            with np.errstate(over="ignore"):  # far above or below the window, where it is cut
                if abs(exponent) < 60:
                    grey = voxels.astype(np.result_type(voxels, np.float32))
                else:  # the differences or their inverse could be beyond the type
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


def read_volume(path: str | os.PathLike, case_id: str | None = None) -> Volume:
    """Read a NIfTI file, plain or gzipped, and turn its axes to (left, posterior, superior).

    Args:
        path: A NIfTI-1 or -2 file with one 3-D volume of integers or floats, in either byte order. Those of the
            Decathlon hold four: `find_cases` and `BratsCase.read_image` read them.
        case_id: Named in messages if given.

    Returns:
        The volume, in the type of the file; in floating point if the file scales its values.

    Raises:
        ScanError: If the file cannot be read, is damaged or cut off, is larger than `MAX_VOLUME_BYTES` or than
            its header says, or holds something else.
    """
    return read_volumes(path, case_id)[0]


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
    """Return height and width of a pixel of [`take_slice`] in mm.

    Args:
        spacing_mm: Voxel size along the left, posterior and superior axes, as in `Volume.spacing_mm`.
        plane: `"axial"`, `"coronal"` or `"sagittal"`.
    """
    width, height = (size for axis, size in enumerate(spacing_mm) if axis != PLANES[plane])
    return height, width


class _Header(NamedTuple):
    """What a NIfTI header says of the voxels."""

    header: nib.Nifti1Header
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    slope: float
    intercept: float
    affine: np.ndarray


def read_volumes(
    path: str | os.PathLike, case_id: str | None, modalities: Sequence[str] | None = None
) -> list[Volume]:
    """Read a file of one volume, or these modalities of a file of the Decathlon."""
    name = f"case {case_id}: `{path}`" if case_id else f"`{path}`"
    with _open(path, name) as file:
        header, shape, dtype, offset, slope, intercept, affine = _read_header(file, name)
        if modalities is None and (len(shape) != 3 or min(shape) < 1):
            raise ScanError(
                f"{name} has the shape {shape}, expected one 3-D volume. Split it into one file each. One of the "
                "Medical Segmentation Decathlon is read as it is by way of `find_cases`."
            )
        if modalities is not None and (len(shape) != 4 or shape[3] != len(DECATHLON_ORDER) or min(shape) < 1):
            raise ScanError(
                f"{name} has the shape {shape}, expected four 3-D volumes, {', '.join(DECATHLON_ORDER)}. "
                "Download it again, or cut it down to these."
            )
        if dtype.kind not in "iuf":
            raise ScanError(f"{name} holds voxels of type {dtype}, expected integers or floats.")
        scaled = _scaled_type(dtype, slope, intercept)
        n_voxels = math.prod(shape)
        if offset + n_voxels * max(scaled.itemsize, dtype.itemsize, 4) > MAX_VOLUME_BYTES:
            raise ScanError(
                f"{name} is too large: its header promises {n_voxels * dtype.itemsize} bytes of voxels of the shape "
                f"{shape} from byte {offset} on, and {MAX_VOLUME_BYTES} are allowed, at 4 or more per voxel. Download "
                "it again if that is not its size, else resample it."
            )
        data = _read_voxels(file, n_voxels * dtype.itemsize, offset, name)
    transform = _orientation(affine, name)
    lps_affine = affine @ orientations.inv_ornt_aff(transform, shape[:3])
    n_voxels = math.prod(shape[:3])
    parts = {name: 0}
    if modalities is not None:
        parts = {f"{name} ({modality})": DECATHLON_ORDER.index(modality) for modality in modalities}
    volumes = []
    for part, index in parts.items():
        voxels = np.frombuffer(data, dtype, n_voxels, index * n_voxels * dtype.itemsize)
        # Of several volumes a copy, so that those nobody asked for do not stay in memory.
        voxels = voxels.astype(dtype.newbyteorder("="), copy=modalities is not None)
        if (slope, intercept) != (1, 0):
            voxels = voxels.astype(scaled)
            with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is refused below
                voxels *= slope
                voxels += intercept
        if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
            raise ScanError(
                f"{part} holds {np.count_nonzero(~np.isfinite(voxels))} voxels that are NaN or infinite. "
                "Repair it or download it again."
            )
        if voxels.dtype.itemsize == 8 and voxels.dtype.kind in "iu" and _exceeds(voxels, 2**53):
            raise ScanError(f"{part} holds integers beyond 2**53, which no scan does. Download it again.")
        voxels = orientations.apply_orientation(voxels.reshape(shape[:3], order="F"), transform)  # a view
        volumes.append(Volume(part, voxels, affine, lps_affine, header))
    return volumes


@contextlib.contextmanager
def _open(path: str | os.PathLike, name: str) -> Iterator[BinaryIO]:
    """Open a file, gunzipped if its first bytes say so, whatever its name says; name it in the errors of reading."""
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a pipe would be waited for without end
            raise ScanError(f"{name} cannot be read (it is no regular file). Check the path.")
        with open(path, "rb") as file:
            if file.peek(2)[:2] != b"\x1f\x8b":
                yield file
            else:
                with igzip.open(file) as stream:
                    yield stream
    except EOFError as err:
        raise ScanError(f"{name} is cut off: its gzip stream ends early. Copy or download it again.") from err
    except (igzip.BadGzipFile, igzip_lib.IsalError, isal_zlib.IsalError) as err:  # type: ignore[misc]
        raise ScanError(f"{name} is damaged ({err}). Copy or download it again.") from err
    except OSError as err:
        raise ScanError(f"{name} cannot be read ({err.strerror}). Check the path and its permissions.") from err


def _read_header(file: BinaryIO, name: str) -> _Header:
    """Read and check the header."""
    data = file.read(nib.Nifti1Header.sizeof_hdr)
    header_class = nib.Nifti1Header
    if not header_class.may_contain_header(data):
        header_class = nib.Nifti2Header
        data += file.read(header_class.sizeof_hdr - len(data))
        if not header_class.may_contain_header(data):
            raise ScanError(f"{name} is not a NIfTI file. Download it again, or convert it.")
    try:
        header = header_class(data)
        if header["magic"].item() != header.single_magic:
            raise HeaderDataError("it is that of a pair of files, .hdr and .img")
        shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
        slope, intercept = header.get_slope_inter()
        affine = header.get_best_affine()
        sizes_mm = header_class(data, check=False)["pixdim"][1:4]  # as they are, where nibabel puts 1 for 0
        if header["sform_code"] == 0 and not (sizes_mm > 0).all():
            raise HeaderDataError(f"voxels of {' x '.join(map(str, sizes_mm))} mm")
        if offset < len(data):
            raise HeaderDataError(f"its voxels would begin at byte {offset}, within it")
    except (HeaderDataError, WrapStructError, ValueError, OverflowError) as err:
        raise ScanError(f"{name} has a broken NIfTI header ({err}). Download it again.") from err
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return _Header(header, shape, dtype, offset, 1.0 if slope is None else slope, intercept or 0.0, affine)


def _read_voxels(file: BinaryIO, n_bytes: int, offset: int, name: str) -> bytes:
    """Read this many bytes from an offset on, and to the end, where the checksum of a gzipped file is."""
    for begin in range(file.tell(), offset, 2**20):
        file.read(min(2**20, offset - begin))
    data = file.read(n_bytes)
    if len(data) < n_bytes:
        raise ScanError(
            f"{name} is cut off: its header promises {n_bytes} bytes of voxels from byte {offset} on, the file has "
            f"{file.tell()} bytes in all. Copy or download it again."
        )
    if len(file.read(MAX_TRAILING_BYTES + 1)) > MAX_TRAILING_BYTES:
        raise ScanError(
            f"{name} goes on for more than {MAX_TRAILING_BYTES} bytes behind the {n_bytes} bytes of voxels that its "
            "header promises. Download it again, or repair its header."
        )
    return data


def _scaled_type(dtype: np.dtype, slope: float, intercept: float) -> np.dtype:
    """Choose the type of scaled voxels: single precision where it tells small integers apart, as 1/128 of a step."""
    if (slope, intercept) == (1, 0):
        return dtype
    single = dtype.kind in "iu" and dtype.itemsize <= 2 and 1e-30 < abs(slope) < 1e30
    return np.dtype(np.float32 if single and abs(intercept) <= 2**16 * abs(slope) else np.float64)


def _exceeds(integers: np.ndarray, limit: int) -> bool:
    return int(integers.max()) > limit or int(integers.min()) < -limit


def _orientation(affine: np.ndarray, name: str) -> np.ndarray:
    """Return how to turn the axes of a file to (left, posterior, superior)."""
    smallest, largest = _VOXEL_SIZES_MM
    with np.errstate(over="ignore", invalid="ignore"):
        sizes = nib.affines.voxel_sizes(affine)
        usable = np.isfinite(affine).all() and ((smallest < sizes) & (sizes < largest)).all()
        orientation = orientations.io_orientation(affine) if usable else np.full((3, 2), np.nan)
    if np.isnan(orientation).any():
        raise ScanError(f"{name} has no usable affine: {affine.tolist()}. Repair its header.")
    return orientations.ornt_transform(orientation, _TO_LPS)


def to_tumour_labels(volume: Volume, since_2023: bool, decathlon: bool) -> np.ndarray:
    """Map the labels of a mask to our ids."""
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
    """Check that two volumes cover the same voxels in space.

    Raises:
        ScanError: If their shapes differ, or a corner lies more than `GRID_TOLERANCE_MM` apart.
    """
    if first.voxels.shape != second.voxels.shape:
        raise ScanError(
            f"{first.name} has the shape {first.voxels.shape}, {second.name} {second.voxels.shape} (left, "
            "posterior, superior). Resample one onto the other."
        )
    last = np.array(first.voxels.shape) - 1
    corners = np.stack(np.meshgrid(*([0, end] for end in last), indexing="ij"), axis=-1).reshape(-1, 3)
    shift = nib.affines.apply_affine(first.lps_affine, corners) - nib.affines.apply_affine(second.lps_affine, corners)
    distance_mm = np.linalg.norm(shift, axis=1).max()
    if distance_mm > GRID_TOLERANCE_MM:
        raise ScanError(
            f"{first.name} and {second.name} have different affines: a corner lies {distance_mm:.3g} mm apart, "
            f"allowed are {GRID_TOLERANCE_MM} mm. Resample one onto the other."
        )


def _in_memory_order(voxels: np.ndarray) -> np.ndarray:
    """Return a view that is fast to scan: a boolean index over a Fortran-ordered array takes several times longer."""
    return voxels.transpose(np.argsort(np.abs(voxels.strides))[::-1])


def _percentiles(values: np.ndarray, percents: tuple[float, ...]) -> list[float]:
    """`np.percentile` on a 1-D array, which is reordered, without its overflows.

    Of 16-bit integers, as BraTS has them, from a histogram, which is faster.
    """
    if values.dtype.kind == "f":
        with np.errstate(over="ignore", invalid="ignore"):
            found = np.percentile(values, percents, overwrite_input=True)
            if not np.isfinite(found).all():  # neighbours lie further apart than the type reaches
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
