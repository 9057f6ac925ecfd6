"""The file format: header and voxels of a NIfTI file, checked, and writing one whole or not at all."""

import contextlib
import gzip
import math
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError


fast_gzip: Any = gzip
fast_zlib: Any = zlib
try:  # decompresses several times faster
    from isal import igzip, isal_zlib

    fast_gzip, fast_zlib = igzip, isal_zlib
except ImportError:
    pass

# The largest file that is read, its voxels counted with at least 4 bytes each: 512 x 512 x 512 of them, or four
# volumes of 256 x 256 x 256 in double precision. Reading, scaling and windowing one takes less than 2 GB.
MAX_VOLUME_BYTES = 2**29

# Texts of a header, where names of patients sit: what is written does not keep them.
TEXT_FIELDS = ("data_type", "db_name", "descrip", "aux_file", "intent_name")

MAX_TRAILING_BYTES = 4096  # some writers pad behind the voxels; more means that the header is wrong


class ScanError(ValueError):
    """A case or scan that cannot be used as it is; the message names it and says what to do."""


@contextlib.contextmanager
def open_nifti(path: str | os.PathLike, name: str) -> Iterator[BinaryIO]:
    """Open a file, and decompress it if its first bytes are those of gzip; errors in the `with` block name it."""
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a pipe could block forever
            raise ScanError(f"{name} cannot be read (it is no regular file). Check the path.")
        with open(path, "rb") as file:
            if file.peek(2)[:2] != b"\x1f\x8b":
                yield file
            else:
                with fast_gzip.open(file) as stream:
                    yield stream
    except EOFError as err:
        raise ScanError(f"{name} is cut off: its gzip stream ends early. Copy or download it again.") from err
    except (gzip.BadGzipFile, fast_zlib.error) as err:
        raise ScanError(f"{name} is damaged ({err}). Copy or download it again.") from err
    except OSError as err:
        raise ScanError(f"{name} cannot be read ({err.strerror}). Check the path and its permissions.") from err


def read_header(file: BinaryIO, name: str) -> nib.Nifti1Header:
    """Read and check a header; it gets slope and intercept if it has none, and loses trailing axes of length 1."""
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
        shape, _ = header.get_data_shape(), header.get_data_dtype()  # each raises what is wrong with it
        if header.get_slope_inter() == (None, None):
            header.set_slope_inter(1, 0)
        header.get_best_affine()
        sizes_mm = header_class(data, check=False)["pixdim"][1:4]  # unchecked, because nibabel replaces 0 by 1
        if header["sform_code"] == 0 and not (sizes_mm > 0).all():
            raise HeaderDataError(f"voxels of {' x '.join(map(str, sizes_mm))} mm")
        if header.get_data_offset() < len(data):
            raise HeaderDataError(f"its voxels would begin at byte {header.get_data_offset()}, within it")
    except (HeaderDataError, WrapStructError, ValueError, OverflowError) as err:
        raise ScanError(f"{name} has a broken NIfTI header ({err}). Download it again.") from err
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
        header.set_data_shape(shape)
    return header


def value_dtype(header: nib.Nifti1Header) -> np.dtype:
    """Return the type of scaled voxels: single precision where it tells small integers apart, as 1/128 of a step."""
    dtype, (slope, intercept) = header.get_data_dtype(), header.get_slope_inter()
    if (slope, intercept) == (1, 0):
        return dtype
    single = dtype.kind in "iu" and dtype.itemsize <= 2 and 1e-30 < abs(slope) < 1e30
    return np.dtype(np.float32 if single and abs(intercept) <= 2**16 * abs(slope) else np.float64)


def read_voxels(file: BinaryIO, header: nib.Nifti1Header, name: str) -> bytes:
    """Read the voxels as they are, and the rest of the file, because the checksum of a gzipped one is at its end."""
    shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
    if dtype.kind not in "iuf":
        raise ScanError(f"{name} holds voxels of type {dtype}, expected integers or floats.")
    n_bytes = math.prod(shape) * dtype.itemsize
    if offset + math.prod(shape) * max(value_dtype(header).itemsize, dtype.itemsize, 4) > MAX_VOLUME_BYTES:
        raise ScanError(
            f"{name} is too large: its header promises {n_bytes} bytes of voxels of the shape {shape} from byte "
            f"{offset} on, and {MAX_VOLUME_BYTES} are allowed, at 4 or more per voxel. Download it again if that is "
            "not its size, else resample it."
        )
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


def write_nifti(
    path: str | os.PathLike,
    array: np.ndarray,
    affine: np.ndarray,
    header: nib.Nifti1Header | None = None,
    compression_level: int = 1,
) -> None:
    """Write an array in its own type, whole or not at all, and as the same bytes every time.

    Args:
        path: Ends in `.nii` or `.nii.gz`.
        array: Three-dimensional, of integers or floats.
        affine: From its indices to RAS+ world coordinates in mm.
        header: That of a scan, of which the file keeps geometry, units and times, but neither texts nor extensions,
            which may name the patient. Default: a new one.
        compression_level: Of `.nii.gz`, from 1 (fast) to 9 (small).

    Raises:
        ValueError: If the path ends in neither `.nii` nor `.nii.gz`.
    """
    path = Path(path)
    ending = ".nii.gz" if path.suffix == ".gz" else ".nii"
    if not path.name.endswith(ending):
        raise ValueError(f"`{path}` must end in .nii or .nii.gz.")
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    if header is None:
        header = nib.Nifti1Header()
        header.set_xyzt_units("mm")
    image = image_class(array, affine, header, dtype=array.dtype)  # makes a copy of the header
    image.header.set_slope_inter(1, 0)
    image.header["cal_min"] = image.header["cal_max"] = 0
    image.header.extensions.clear()
    for field in TEXT_FIELDS:
        if field in image.header:  # NIfTI-2 has fewer
            image.header[field] = b""
    data = image.to_bytes()
    if ending == ".nii.gz":
        data = gzip.compress(data, compression_level, mtime=0)
    partial = path.with_name(f".{path.name.removesuffix(ending)}.partial{ending}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


__all__ = ["ScanError", "write_nifti"]
