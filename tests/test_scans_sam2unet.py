import gzip
import os
import zlib
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scan_files import LPS, RAS, SAL, SHAPE, make_scan, save
from scipy import ndimage

from dataset_scripts.phantom import make_phantom_case
from sam2unet_hf import nifti_sam2unet, scans_sam2unet
from sam2unet_hf.cases_sam2unet import find_cases
from sam2unet_hf.head_sam2unet import find_head
from sam2unet_hf.scans_sam2unet import (
    MODALITIES,
    IntensityWindow,
    ScanError,
    check_modalities,
    head_box,
    intensity_window,
    read_volume,
    take_slice,
    to_grey,
)


BRATS_DIR = Path(os.environ.get("BRATS_DIR", Path(__file__).parents[2] / "shared" / "brats"))


@pytest.fixture(params=["isal", "zlib"])
def decompressor(request, monkeypatch):
    """Read as where isal is installed, and as where it is not."""
    if request.param == "zlib":
        monkeypatch.setattr(nifti_sam2unet, "fast_gzip", gzip)
        monkeypatch.setattr(nifti_sam2unet, "fast_zlib", zlib)


# Reading


@pytest.mark.parametrize(
    ("affine", "shape", "marker"),
    [(LPS, (8, 9, 5), (6, 1, 3)), (RAS, (8, 9, 5), (1, 7, 3)), (SAL, (5, 9, 8), (3, 7, 6))],
    ids=["LPS", "RAS", "SAL"],
)
def test_read_volume_marker_lands_where_it_lies_in_the_head(tmp_path, affine, shape, marker):
    # A voxel at the left, front and top of the head: x = -3.75, y = 6, z = 3 mm.
    assert (affine @ [*marker, 1]).tolist() == [-3.75, 6, 3, 1]
    voxels = np.zeros(shape, np.int16)
    voxels[marker] = 7
    volume = read_volume(save(tmp_path / "x.nii.gz", voxels, affine))
    assert np.argwhere(volume.voxels == 7).tolist() == [[6, 1, 3]]
    assert volume.spacing_mm == (1.5, 2, 3)
    np.testing.assert_allclose(volume.affine, affine)
    np.testing.assert_allclose(volume.lps_affine, LPS)
    np.testing.assert_array_equal(volume.to_file_grid(volume.voxels), voxels)

    axial, coronal, sagittal = (
        take_slice(volume.voxels, plane, index) for plane, index in (("axial", 3), ("coronal", 1), ("sagittal", 6))
    )
    assert (axial.shape, coronal.shape, sagittal.shape) == ((9, 8), (5, 8), (5, 9))
    assert np.argwhere(axial == 7).tolist() == [[1, 6]]  # near the top is the front, near the right is the left
    assert np.argwhere(coronal == 7).tolist() == [[1, 6]]
    assert np.argwhere(sagittal == 7).tolist() == [[1, 1]]  # near the left is the front


def test_take_slice_literal_volume_in_every_plane():
    voxels = np.arange(8).reshape(2, 2, 2)  # (left, posterior, superior)
    assert take_slice(voxels, "axial", 0).tolist() == [[0, 4], [2, 6]]
    assert take_slice(voxels, "coronal", 0).tolist() == [[1, 5], [0, 4]]
    assert take_slice(voxels, "sagittal", 0).tolist() == [[1, 3], [0, 2]]
    with pytest.raises(ValueError, match="`plane` must be one of sagittal, coronal, axial, got 'oblique'"):
        take_slice(voxels, "oblique", 0)


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("kind", ["u1", "i1", "i2", "u2", "i4", "i8", "f4", "f8"])
def test_read_volume_every_type_and_byte_order_equals_nibabel(tmp_path, kind, byte_order):
    voxels = (make_scan() % 100).astype(kind)
    image = nib.Nifti1Image(voxels, LPS, nib.Nifti1Header(endianness=byte_order), dtype=voxels.dtype)
    nib.save(image, tmp_path / "x.nii.gz")
    volume = read_volume(tmp_path / "x.nii.gz")
    assert volume.voxels.dtype == np.dtype(kind)
    np.testing.assert_array_equal(volume.voxels, voxels)


def test_read_volume_scaled_values_follow_the_header(tmp_path):
    image = nib.Nifti1Image(make_scan(), LPS)
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / "x.nii")
    volume = read_volume(tmp_path / "x.nii")
    assert volume.voxels.dtype == np.float32
    np.testing.assert_array_equal(volume.voxels, make_scan() * 0.5 - 3)


@pytest.mark.usefixtures("decompressor")
def test_read_volume_nifti2_trailing_axis_and_gzip_under_a_plain_name(tmp_path):
    path = save(tmp_path / "x.nii.gz", make_scan()[..., None], image_class=nib.Nifti2Image)
    np.testing.assert_array_equal(read_volume(path).voxels, make_scan())
    np.testing.assert_array_equal(read_volume(path.rename(tmp_path / "x.nii")).voxels, make_scan())


def test_read_volume_takes_no_copy(tmp_path):
    assert not read_volume(save(tmp_path / "x.nii", make_scan(), RAS)).voxels.flags.owndata


@pytest.mark.usefixtures("decompressor")
def test_read_volume_checks_the_sum_of_a_gzipped_file(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 900, (120, 120, 80)).astype(np.int16)
    data = bytearray(gzip.compress(nib.Nifti1Image(voxels, LPS).to_bytes(), 1))
    data[-8] ^= 1
    (tmp_path / "x.nii.gz").write_bytes(data)
    with pytest.raises(ScanError, match=r"x\.nii\.gz` is damaged \(CRC check failed.*Copy or download it again"):
        read_volume(tmp_path / "x.nii.gz")


@pytest.mark.usefixtures("decompressor")
def test_read_volume_many_gzip_members_and_padding(tmp_path):
    data = nib.Nifti1Image(make_scan(), LPS).to_bytes() + bytes(4096)
    members = b"".join(gzip.compress(data[at : at + 7]) for at in range(0, len(data), 7))
    (tmp_path / "x.nii.gz").write_bytes(members + gzip.compress(b"") * 1000)
    np.testing.assert_array_equal(read_volume(tmp_path / "x.nii.gz").voxels, make_scan())


@pytest.mark.parametrize(("slope", "intercept"), [(1e-3, 1e6), (1e-38, 0), (3e38, 3e37), (1e20, -1e25)])
def test_read_volume_unusual_scaling_keeps_small_differences(tmp_path, slope, intercept):
    image = nib.Nifti1Image(make_scan(), LPS)
    image.header.set_slope_inter(slope, intercept)
    nib.save(image, tmp_path / "x.nii")
    volume, expected = read_volume(tmp_path / "x.nii"), nib.load(tmp_path / "x.nii").get_fdata()
    np.testing.assert_allclose(volume.voxels, expected, rtol=1e-12)
    assert len(np.unique(to_grey(volume))) > 150


def test_read_volume_integers_beyond_double_precision_are_an_error(tmp_path):
    voxels = make_scan().astype(np.int64)
    voxels[2, 2, 2] = 2**53
    image = nib.Nifti1Image(voxels, LPS, dtype=np.int64)
    nib.save(image, tmp_path / "x.nii")
    assert read_volume(tmp_path / "x.nii").voxels.max() == 2**53
    voxels[2, 2, 2] = -(2**53) - 1
    nib.save(nib.Nifti1Image(voxels, LPS, dtype=np.int64), tmp_path / "x.nii")
    with pytest.raises(ScanError, match=r"x\.nii` holds integers beyond 2\*\*53, which no scan does"):
        read_volume(tmp_path / "x.nii")


def test_read_volume_extensions_are_passed_over(tmp_path):
    image = nib.Nifti1Image(make_scan(), LPS)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"patient" * 99))
    data = bytearray(image.to_bytes())
    for broken in (bytes(8), b"\xff" * 8):
        data[352:360] = broken
        (tmp_path / "x.nii").write_bytes(data)
        np.testing.assert_array_equal(read_volume(tmp_path / "x.nii").voxels, make_scan())


# Broken files. Each error names the case and the file.


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def write_truncated_gzip(path):
    truncate(path, path.stat().st_size // 2)


def write_corrupt_gzip(path):
    data = bytearray(gzip.compress(bytes(5000)))
    data[12] ^= 0xFF
    path.write_bytes(data)


def write_truncated_plain(path):
    path.write_bytes(nib.Nifti1Image(make_scan(), LPS).to_bytes()[:-1])


def write_text(path):
    path.write_text("not a scan")


def write_broken_header(path):
    data = bytearray(nib.Nifti1Image(make_scan(), LPS).to_bytes())
    data[70:72] = b"\x01\x7f"  # datatype
    path.write_bytes(data)


def write_time_series(path):
    save(path, np.zeros((*SHAPE, 2), np.int16))


def write_colours(path):
    save(path, np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]))


def write_nan(path):
    voxels = make_scan().astype(np.float32)
    voxels[1, 2, 3], voxels[2, 2, 2] = np.nan, np.inf
    save(path, voxels)


def write_flat_affine(path):
    image = nib.Nifti1Image(make_scan(), LPS)
    image.header["srow_x"], image.header["vox_offset"] = 0, 352
    path.write_bytes(image.header.binaryblock + bytes(4) + make_scan().tobytes())


def write_infinite_intercept(path):
    image = nib.Nifti1Image(make_scan(), LPS)
    image.header["scl_slope"], image.header["scl_inter"] = 1, np.inf
    path.write_bytes(image.header.binaryblock + bytes(4) + make_scan().tobytes())


def write_impossible_rotation(path):
    image = nib.Nifti1Image(make_scan(), LPS)
    image.header["sform_code"], image.header["qform_code"] = 0, 1
    image.header["quatern_b"], image.header["quatern_c"] = 2, 2
    path.write_bytes(image.header.binaryblock + bytes(4) + make_scan().tobytes())


def write_huge_claim(path):
    header = nib.Nifti1Header()
    header.set_data_shape((32767, 32767, 32767))
    header["vox_offset"] = 352
    path.write_bytes(header.binaryblock + bytes(100))


def header_bytes(**fields):
    image = nib.Nifti1Image(make_scan(), LPS)
    for field, value in {"vox_offset": 352, **fields}.items():
        image.header[field] = value
    return image.header.binaryblock + bytes(4)


def write_header(**fields):
    return lambda path: path.write_bytes(header_bytes(**fields) + make_scan().tobytes(order="F"))


def write_bomb(path):
    """A sound volume, and behind it 8 GB of zeros in 8 MB."""
    zeros = gzip.compress(bytes(2**27), 1, mtime=0)
    path.write_bytes(gzip.compress(nib.Nifti1Image(make_scan(), LPS).to_bytes()) + zeros * 64)


def write_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_bomb, "goes on for more than 4096 bytes behind the 720 bytes of voxels that its header promises. Down"),
        (write_pipe, r"cannot be read \(it is no regular file\). Check the path"),
        (lambda path: path.write_bytes(b""), "is not a NIfTI file"),
        (write_header(vox_offset=8), "has a broken NIfTI header .*offset 8.*Download it again"),
        (write_header(vox_offset=-352), "has a broken NIfTI header .*Download it again"),
        (write_header(vox_offset=np.nan), "has a broken NIfTI header .*NaN.*Download it again"),
        (write_header(vox_offset=1e15), "is too large: .* from byte 999999986991104 on, and 536870912 are allowed"),
        (write_header(magic=b"ni1"), "has a broken NIfTI header .*a pair of files, .hdr and .img"),
        (write_header(sizeof_hdr=7, vox_offset=4000), "is cut off: .* from byte 4000 on, the file has 1072 bytes"),
        (write_header(dim=[3, 8, 0, 5, 1, 1, 1, 1]), r"has the shape \(8, 0, 5\), expected one 3-D volume"),
        (write_header(dim=[3, 8, -9, 5, 1, 1, 1, 1]), r"has the shape \(8, -9, 5\), expected one 3-D volume"),
        (
            write_header(dim=[3, 512, 512, 513, 1, 1, 1, 1]),
            "is too large: .* 268959744 bytes of voxels .* at 4 or more",
        ),
        (write_header(dim=[3, -1, 1, 1, 1, 1, 1, 1]), "has a broken NIfTI header .*-1 in dim.*Download"),
        (
            write_header(sform_code=0, pixdim=[1, 0, 2, np.nan, 0, 0, 0, 0]),
            r"has a broken NIfTI header .voxels of 0\.0 x 2\.0 x nan mm",
        ),
        (write_header(srow_x=[np.nan, 0, 0, 0]), "has no usable affine: .*nan.* Repair its header"),
        (write_header(datatype=32, bitpix=64), "holds voxels of type complex64, expected integers or floats"),
        (write_header(datatype=1536, bitpix=128), "has a broken NIfTI header .data code 1536|holds voxels of type"),
        (write_truncated_gzip, "is cut off: its gzip stream ends early. Copy or download it again"),
        (write_corrupt_gzip, "is damaged .*Copy or download it again"),
        (
            write_truncated_plain,
            "is cut off: its header promises 720 bytes of voxels from byte 352 on, .*has 1071 bytes",
        ),
        (write_text, "is not a NIfTI file. Download it again, or convert it"),
        (write_broken_header, "has a broken NIfTI header .*Download it again"),
        (write_time_series, r"has the shape \(8, 9, 5, 2\), expected one 3-D volume. Split it"),
        (write_colours, "holds voxels of type .*, expected integers or floats"),
        (write_nan, "holds 2 voxels that are NaN or infinite. Repair it or download it again"),
        (write_flat_affine, "has no usable affine: .*Repair its header"),
        (write_infinite_intercept, "has a broken NIfTI header .*intercept.*Download it again"),
        (write_impossible_rotation, "has a broken NIfTI header .*Download it again"),
        (
            write_huge_claim,
            r"is too large: its header promises 140724603846652 bytes .* \(32767, 32767, 32767\) from byte 352 on, "
            "and 536870912 are allowed, at 4 or more per voxel. Download it again if that is not its size, else res",
        ),
        (lambda path: (path.unlink(), path.mkdir()), r"cannot be read \(Is a directory\). Check the path"),
    ],
)
@pytest.mark.usefixtures("decompressor")
def test_read_volume_bad_file_names_case_file_and_remedy(tmp_path, write, message):
    path = save(tmp_path / "BraTS20_Training_001_flair.nii.gz", make_scan())
    write(path)
    with pytest.raises(ScanError, match=rf"case BraTS20_Training_001: `.*001_flair\.nii\.gz` {message}"):
        read_volume(path, "BraTS20_Training_001")


# Intensities


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("size", [5, 1000])
def test_intensity_window_percentiles_equal_numpy(tmp_path, dtype, size):
    values = np.random.default_rng(size).normal(60, 20, size).clip(1, 127).astype(dtype)
    if np.dtype(dtype).itemsize == 2:
        values[:3] = (1, 2, 32767)
    if dtype == np.int16:
        values[3:5] = (-32768, -5)
    voxels = np.zeros((12, 12, 12), dtype)
    voxels[1:11, 1:11, 1:11].flat[:size] = values
    volume = read_volume(save(tmp_path / "x.nii", voxels, RAS))
    window = intensity_window(volume)
    expected = np.percentile(voxels[voxels != 0].astype(np.float64), [0.5, 99.5])
    np.testing.assert_allclose((window.low, window.high), expected, rtol=1e-6)


def test_z_scored_volume_has_its_constant_as_background(tmp_path):
    voxels = np.full(SHAPE, -0.75, np.float32)
    voxels[1:-1, 1:-1, 1:-1] = np.linspace(-0.5, 2, 6 * 7 * 3).reshape(6, 7, 3)
    volume = read_volume(save(tmp_path / "x.nii", voxels))
    assert intensity_window(volume).low > -0.5
    grey = to_grey(volume)
    assert (grey[0] == 0).all()
    assert grey.max() == 255


def test_z_scored_brain_keeps_zero_as_background(tmp_path):
    voxels = np.zeros(SHAPE, np.float32)
    voxels[1:-1, 1:-1, 1:-1] = np.linspace(-2, 2, 6 * 7 * 3).reshape(6, 7, 3)
    grey = to_grey(read_volume(save(tmp_path / "x.nii", voxels)))
    assert grey[0, 0, 0] == 0
    assert grey[-2, -2, -2] == 255
    assert 100 < grey[4, 3, 2] < 150


def test_corner_in_the_brain_takes_zero_as_background(tmp_path):
    voxels = make_scan() - 500
    voxels[0], voxels[0, 0, 0] = 0, 3
    volume = read_volume(save(tmp_path / "x.nii", voxels))
    expected = np.percentile(voxels[voxels != 0], [0.5, 99.5])
    np.testing.assert_allclose((intensity_window(volume).low, intensity_window(volume).high), expected)
    assert np.flatnonzero(to_grey(volume)[0]).tolist() == [0]


def test_intensity_window_apply_literal_values():
    window = IntensityWindow(low=10, high=20)
    values = np.array([[0, 5, 10, 12], [15, 20, 32767, -9]], np.int16)
    assert window.apply(values).tolist() == [[0, 0, 0, 51], [128, 255, 255, 0]]
    assert IntensityWindow(low=7, high=7).apply(np.array([7, 7])).tolist() == [255, 255]


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 5), (8, 1, 5), (8, 9, 1)])
def test_volumes_one_voxel_thick(tmp_path, shape):
    voxels = np.random.default_rng(0).integers(1, 900, shape).astype(np.int16)
    volume = read_volume(save(tmp_path / "x.nii.gz", voxels))
    np.testing.assert_array_equal(volume.voxels, voxels)
    if shape == (1, 1, 1):
        with pytest.raises(ScanError, match=r"x\.nii\.gz` is empty: all voxels are \d+, there is nothing to scale"):
            intensity_window(volume)
    else:
        assert to_grey(volume).max() == 255


def test_one_foreground_voxel_becomes_255(tmp_path):
    voxels = np.zeros(SHAPE, np.float32)
    voxels[3, 3, 3] = 1e-40
    volume = read_volume(save(tmp_path / "x.nii", voxels))
    grey = to_grey(volume)
    assert grey[3, 3, 3] == 255
    assert np.count_nonzero(grey) == 1


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        (np.float32, -3e38, 3e38),
        (np.float32, 0, 1e-42),
        (np.float32, -2e-40, 1e-39),
        (np.float64, -1.7e308, 1.7e308),
        (np.float64, 1e-320, 1e-318),
        (np.int32, -(2**31), 2**31 - 1),
        (np.int64, -(2**53), 2**53),
        (np.uint32, 1, 2**32 - 1),
        (np.uint16, 1, 65535),
        (np.int16, -32768, 32767),
    ],
)
@pytest.mark.filterwarnings("error")
def test_extremes_of_every_type_become_the_right_grey(tmp_path, dtype, low, high):
    voxels = np.zeros((12, 12, 12), dtype)
    steps = np.linspace(0, 1, 1000, dtype=np.longdouble)
    voxels[1:-1, 1:-1, 1:-1] = (low * (1 - steps) + high * steps).astype(dtype).reshape(10, 10, 10)
    nib.save(nib.Nifti1Image(voxels, LPS, dtype=dtype), tmp_path / "x.nii")
    volume = read_volume(tmp_path / "x.nii")
    grey = to_grey(volume)[1:-1, 1:-1, 1:-1].ravel()
    values = voxels[1:-1, 1:-1, 1:-1].ravel().astype(np.longdouble)
    bottom, top = np.percentile(values[values != 0], [0.5, 99.5])
    expected = np.where(values == 0, 0, np.clip((values - bottom) / (top - bottom) * 255, 0, 255))
    np.testing.assert_allclose(grey, expected.astype(float), atol=0.501)


@pytest.mark.parametrize("value", [0, 5])
def test_intensity_window_constant_volume_is_an_error(tmp_path, value):
    volume = read_volume(save(tmp_path / "x.nii", np.full(SHAPE, value, np.int16)))
    with pytest.raises(ScanError, match=rf"x\.nii` is empty: all voxels are {value}, there is nothing to scale"):
        intensity_window(volume)


@pytest.mark.parametrize(("plane", "expected"), [("axial", (2, 1)), ("coronal", (3, 1)), ("sagittal", (3, 2))])
def test_pixels_are_as_high_and_wide_as_their_voxels(plane, expected):
    assert scans_sam2unet.pixel_size_mm((1, 2, 3), plane) == expected


@pytest.mark.parametrize("affine", [LPS, RAS, SAL], ids=["LPS", "RAS", "SAL"])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_to_grey_is_the_window_of_the_scan_in_any_orientation(tmp_path, affine, dtype):
    volume = read_volume(save(tmp_path / "x.nii", make_scan().astype(dtype), affine))
    grey = to_grey(volume)
    assert grey.dtype == np.uint8
    expected = intensity_window(volume).apply(np.ascontiguousarray(volume.voxels))
    np.testing.assert_array_equal(grey, np.where(volume.voxels == 0, 0, expected))
    assert (grey.min(), grey.max()) == (0, 255)


# The head on other grounds than zeros


def backgrounds(voxels, head):
    """Yield kinds of background by name, and whether they hide where exactly the head ends."""
    rng = np.random.default_rng(0)
    deviation = voxels[head].std()
    z_scored = (voxels - voxels[head].mean()) / deviation
    noise = rng.normal(size=voxels.shape).astype(np.float32)
    rayleigh = np.hypot(noise, rng.normal(size=voxels.shape))
    few = np.zeros_like(voxels)
    few[tuple(rng.choice(np.argwhere(~ndimage.binary_dilation(head, iterations=2)), 12).T)] = voxels.max()
    corner = np.zeros_like(voxels)
    corner[0, 0, 0] = corner[-1, 0, -1] = voxels.max()
    yield "z-scored as a whole", (voxels - voxels.mean()) / voxels.std(), False
    yield "z-scored head on zeros", np.where(head, z_scored, 0), False
    yield "constant", np.where(head, voxels, -1000), False
    yield "constant integer", np.where(head, voxels, 7).astype(np.int16), False
    yield "few bright voxels", np.where(head, voxels, few), False
    yield "bright corners", np.where(head, voxels, corner), False
    yield "bright corners on a constant", np.where(head, voxels, corner - 3), False
    yield "many bright voxels", np.where(head, voxels, (rng.random(voxels.shape) < 0.003) * voxels.max()), True
    for level in (0.05, 0.2):
        yield f"noise of {level}", np.where(head, voxels, level * deviation * noise), True
        yield f"magnitude of noise of {level}", np.where(head, voxels, level * deviation * rayleigh), True
        yield f"integer noise of {level}", np.rint(np.where(head, voxels, level * deviation * rayleigh)), True
        yield f"half of noise of {level}", np.where(head, voxels, level * deviation * noise.clip(0)), True
        yield f"noise of {level} about a constant", np.where(head, z_scored, level * noise - 4), True
        yield f"noise of {level} about the mean of the head", np.where(head, z_scored, level * noise), True


@pytest.mark.parametrize("modality", ["t1", "flair"])
def test_grey_values_and_box_of_the_head_do_not_depend_on_the_background(tmp_path, modality):
    voxels = make_phantom_case(3, (64, 64, 42))[modality].astype(np.float32)
    volume = read_volume(save(tmp_path / "x.nii", voxels))
    head, clean = voxels != 0, to_grey(volume)
    for name, changed, is_noisy in backgrounds(voxels, head):
        found, grey = find_head(changed), to_grey(replace(volume, voxels=changed))
        assert not grey[~found].any(), name
        dice = 2 * np.count_nonzero(found & head) / (np.count_nonzero(found) + np.count_nonzero(head))
        assert dice > (0.92 if is_noisy else 0.9999), (name, dice)
        difference = np.abs(np.subtract(grey, clean, dtype=int))[found & head].max()
        assert difference <= (8 if is_noisy else 1), (name, difference)  # 1, where single precision rounds
        for plane in scans_sam2unet.PLANES:
            moved = np.subtract(head_box([grey], plane), head_box([clean], plane))
            assert np.abs(moved).max() <= (1 if is_noisy else 0), (name, plane, moved)


def test_large_parts_of_the_head_that_lie_apart_are_no_specks():
    voxels = make_phantom_case(3, (64, 64, 42))["flair"]
    voxels[:, :, 20:24] = 0
    parts, count = ndimage.label(voxels)
    assert count > 1
    assert np.array_equal(find_head(voxels), voxels != 0)


@pytest.mark.skipif(not BRATS_DIR.is_dir(), reason="no BraTS scans; set BRATS_DIR")
def test_real_heads_are_all_that_is_not_zero():
    cases = find_cases(BRATS_DIR)
    for volume in (scan for case in cases[::7] for scan in case.read_images([*set(MODALITIES) & set(case.files)])):
        np.testing.assert_array_equal(find_head(volume.voxels), volume.voxels != 0)


@pytest.mark.parametrize(
    ("plane", "expected"), [("axial", [1, 2, 6, 7]), ("coronal", [1, 0, 6, 3]), ("sagittal", [2, 0, 7, 3])]
)
def test_head_box_holds_the_heads_of_all_scans_as_slices_are_turned(plane, expected):
    first, second = np.zeros((2, *SHAPE), np.uint8)  # 8 left, 9 posterior, 5 superior
    first[1, 3, 2] = second[5, 6, 4] = 255
    second[2, 2, 3] = 1
    assert head_box([first, second], plane) == expected
    x_min, y_min, x_max, y_max = expected
    for index in range(SHAPE[scans_sam2unet.PLANES[plane]]):
        slices = [take_slice(grey, plane, index) for grey in (first, second)]
        for pixels in slices:
            assert np.count_nonzero(pixels) == np.count_nonzero(pixels[y_min:y_max, x_min:x_max])


def test_head_box_without_a_head_is_an_error():
    with pytest.raises(ValueError, match="`greys` are 0 everywhere"):
        head_box([np.zeros(SHAPE, np.uint8)], "axial")


@pytest.mark.parametrize("modalities", [[], ["t1gd"], ["flair", "flair"]])
def test_check_modalities_refuses_none_unknown_and_repeated_ones(modalities):
    for usable in (["flair"], ["t2", "t1ce"], ["t1", "t1ce", "t2", "flair"]):
        check_modalities(usable)
    with pytest.raises(ValueError, match=r"`modalities` must name one or more of t1, t1ce, t2, flair, each once, got"):
        check_modalities(modalities)
