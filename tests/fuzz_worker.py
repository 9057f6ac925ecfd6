"""Bad input: makes mutated files from seeds, reads them as users do, and says how each ended.

python tests/fuzz_worker.py scan 0 17    # replays case 17 of the scans of seed 0

`test_fuzz.py` runs it in processes under limits of time and memory, and writes one index per line to it.
"""

import gzip
import importlib.util
import io
import json
import logging
import os
import re
import resource
import shutil
import struct
import sys
import tempfile
import traceback
import types
import warnings
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import ExifTags, Image, ImageOps


REPO = Path(__file__).parents[1]
GB = 2**30
NIFTI_KINDS = ("scan", "mask", "decathlon")
KINDS = (*NIFTI_KINDS, "picture", "label_picture", "builder")
LPS = np.array([[-1.5, 0, 0, 5.25], [0, -2, 0, 8], [0, 0, 3, -6], [0, 0, 0, 1]])
SAL = np.array([[0, 0, -1.5, 5.25], [0.1, 2, 0, -8], [3, 0, 0.2, -6], [0, 0, 0, 1]])
# Fields that say nothing of voxels or their place, whatever is in them.
HARMLESS = ("aux_file", "cal_max", "cal_min", "descrip", "glmax", "glmin", "intent_name", "slice_end", "slice_start")
FLOATS = (np.nan, np.inf, -np.inf, 0.0, -0.0, -1.0, 0.5, 2.0, 351.0, 1e-45, 1e-30, 1e9, 1e30, 3e38, -3e38)
BOMB = gzip.compress(bytes(10**7), 1, mtime=0)
INTEGERS = (0, 1, -1, 2, 3, 5, 8, 16, 127, 255, 256, 1024, 1536, 2304, 32767, -32768, 2**31 - 1, -(2**31), 2**62)


# Mutations. Each returns what it did and the new bytes.


def flip(rng, data, begin=0, end=None):
    data, end = bytearray(data), len(data) if end is None else min(end, len(data))
    places = [int(place) for place in rng.integers(begin, max(end, begin + 1), rng.integers(1, 9))]
    for place in places:
        if place < len(data):
            data[place] ^= 1 << int(rng.integers(8))
    return f"bits in bytes {places}", bytes(data)


def overwrite(rng, data, begin=0):
    begin = int(rng.integers(begin, len(data))) if len(data) > begin else 0
    new = [bytes(16), b"\xff" * 16, rng.bytes(int(rng.integers(1, 64)))][rng.integers(3)]
    return f"{len(new)} bytes written at {begin}", data[:begin] + new + data[begin + len(new) :]


def truncate(rng, data):
    size = int(rng.integers(0, len(data) + 1)) if rng.integers(2) else max(0, len(data) - int(rng.integers(1, 20)))
    return f"cut to {size} of {len(data)} bytes", data[:size]


def splice(rng, data):
    a, b, c = sorted(int(place) for place in rng.integers(0, len(data) + 1, 3))
    return [
        (f"bytes {a}-{b} removed", data[:a] + data[b:]),
        (f"bytes {a}-{b} twice", data[:b] + data[a:]),
        (f"bytes {a}-{b} and {b}-{c} swapped", data[:a] + data[b:c] + data[a:b] + data[c:]),
        (f"64 bytes put in at {a}", data[:a] + rng.bytes(64) + data[a:]),
        (f"{c} bytes put behind", data + rng.bytes(c)),
    ][rng.integers(5)]


def set_fields(rng, data):
    """Set one or two fields of a NIfTI header, or all elements of one, to extremes."""
    header_class = nib.Nifti1Header if len(data) >= 348 and data[344:347] == b"n+1" else nib.Nifti2Header
    if len(data) < header_class.sizeof_hdr:
        return "nothing", data
    header = header_class(data[: header_class.sizeof_hdr], check=False)
    said = []
    for _ in range(rng.integers(1, 3)):
        field = list(header.structarr.dtype.names)[rng.integers(len(header.structarr.dtype.names))]
        field = ("dim", "vox_offset", "datatype", "scl_slope", "scl_inter", "pixdim", field, field)[rng.integers(8)]
        kind = header.structarr.dtype[field].base
        if kind.kind == "S":
            value = rng.bytes(kind.itemsize)
        elif kind.kind == "f":
            value = np.array(FLOATS[rng.integers(len(FLOATS))]).astype(kind)
        else:
            limits = np.iinfo(kind)
            value = int(np.clip(INTEGERS[rng.integers(len(INTEGERS))], limits.min, limits.max))
        place = ...
        if header.structarr[field].ndim and rng.integers(4):
            place = int(rng.integers(header.structarr[field].size))
        header.structarr[field][place] = value
        said.append(f"{field}[{'all' if place is ... else place}] = {value!r}")
    return ", ".join(said), header.binaryblock + data[header_class.sizeof_hdr :]


def set_voxels(rng, data):
    """Put extremes of the type of the voxels among them."""
    header_class = nib.Nifti1Header if data[344:347] == b"n+1" else nib.Nifti2Header
    try:
        header = header_class(data[: header_class.sizeof_hdr], check=False)
        dtype, offset = header.get_data_dtype(), header.get_data_offset()
        voxels = np.frombuffer(bytearray(data[offset:]), dtype)
        np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)
    except Exception:  # an earlier mutation left no voxels to speak of
        return "nothing", data
    if not rng.integers(4) and voxels.size:
        return stretch(rng, data[:offset], voxels)
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    values = [limits.min, limits.max, 0, 1, 3, 4, 5, limits.max // 2]
    if dtype.kind == "f":
        values += [np.nan, np.inf, 0.5, -0.0, 2.0**31, limits.tiny, limits.smallest_subnormal, -1.0]
    chosen = [values[i] for i in rng.integers(0, len(values), rng.integers(1, 4))]
    where = rng.random(voxels.shape) < [0.001, 0.05, 0.5, 1.0][rng.integers(4)]
    voxels[where] = rng.choice(np.array(chosen, dtype), np.count_nonzero(where))
    return f"{np.count_nonzero(where)} voxels among {chosen}", data[:offset] + voxels.tobytes()


def stretch(rng, head, voxels):
    """Spread the values over what the type holds, or a part of it near its limits."""
    values = voxels.astype(np.longdouble)
    low, high = values.min(), values.max()
    kind = voxels.dtype.kind
    limits = np.finfo(voxels.dtype) if kind == "f" else np.iinfo(voxels.dtype)
    choices = [limits.min, limits.max, 0, limits.max // 2]
    if kind == "f":
        choices += [limits.tiny, limits.smallest_subnormal * 999, limits.max * 1e-30, -limits.tiny, 1e25]
    bottom, top = (np.longdouble(choices[place]) for place in rng.choice(len(choices), 2, replace=False))
    if high > low:
        with np.errstate(all="ignore"):
            values = bottom + (values - low) / (high - low) * (top - bottom)
    return f"voxels from {bottom} to {top}", head + values.astype(voxels.dtype).tobytes()


def add_zeros(rng, data):
    return "64 zeros put behind", data + bytes(64)


def gzip_again(rng, data):
    return "gzipped twice", gzip.compress(data, 1, mtime=0)


def add_bomb(rng, data):
    count = int(rng.integers(1, 400))
    return f"{count} times 10 MB of zeros put behind", data + BOMB * count


def nifti_base(rng, kind):
    """Return the bytes of a sound file, and what it is."""
    labels = kind == "mask"
    names = ["i2", "u1", "f4", "f8", "i4", "u2", "i1"]
    dtype = np.dtype("<>"[rng.integers(2)] + names[rng.integers(len(names))])
    shape = [(9, 8, 5), (1, 6, 7), (1, 1, 1), (9, 8, 5)][rng.integers(4)]
    if kind == "decathlon":
        shape = (*shape, 4)
    voxels = rng.integers(1, 120, shape)
    if shape[0] > 1:
        voxels[[0, -1]] = 0
    if labels:
        voxels = np.array([0, 1, 2, 4])[rng.integers(0, 4, shape)]
    if dtype.kind == "f" and not labels and rng.integers(2):
        voxels = rng.normal(0, 1, shape)
        if shape[0] > 1:
            voxels[[0, -1]] = -0.75
    image_class = [nib.Nifti1Image, nib.Nifti1Image, nib.Nifti2Image][rng.integers(3)]
    header = image_class.header_class(endianness=dtype.byteorder if dtype.itemsize > 1 else "<")
    image = image_class(voxels.astype(dtype), [LPS, SAL][rng.integers(2)], header, dtype=dtype)
    said = f"{dtype.str} {shape} {image_class.__name__}"
    if not labels and not rng.integers(4):
        slope, intercept = [(0.5, -3), (1e-3, 1e6), (-2, 1e-3), (1e20, 0)][rng.integers(4)]
        image.header.set_slope_inter(slope, intercept)
        said += f" scaled {slope} {intercept}"
    if not rng.integers(4):
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"made up" * int(rng.integers(1, 40))))
        said += " extended"
    return image.to_bytes(), said


def cohort_file(number, name):
    """Return the bytes of a scan or mask of the cohort that `read_cohort` builds a data set from, and its name."""
    voxels = np.zeros((9, 8, 5), np.int16)
    voxels[2:7, 2:6, 1:4] = np.random.default_rng(number).choice([1, 2, 4], (5, 4, 3))
    return nib.Nifti1Image(voxels * (1 if name == "seg" else 20), LPS).to_bytes(), name


def mutate_nifti(rng, kind):
    """Return the bytes of a file, the mutations, and whether it must be read."""
    data, said = cohort_file(1, ("flair", "seg")[rng.integers(2)]) if kind == "builder" else nifti_base(rng, kind)
    sound = not rng.integers(12)
    steps = []
    size = 544 if "Nifti2" in said else 352
    if not sound:
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            changes = [(flip, 0, size), (flip, size), *[(set_fields,)] * 3, *[(set_voxels,)] * 2]
            changes += [(overwrite,), (truncate,), (splice,)]
            change, *where = changes[rng.integers(len(changes))]
            if len(data) > size:
                step, data = change(rng, data, *where)
                steps.append(step)
        if not rng.integers(40):
            starts = (b"", b"\x1f", b"\x1f\x8b", b"\x1f\x8b\x08\x00", rng.bytes(400), bytes(400), b"n+1")
            data = starts[rng.integers(len(starts))]
            steps.append(f"{len(data)} bytes of anything")
    elif rng.integers(2):
        header = nib.Nifti1Header if size == 352 else nib.Nifti2Header
        field = HARMLESS[rng.integers(len(HARMLESS))]
        if field in header().structarr.dtype.names:
            at = header().structarr.dtype.fields[field]
            data = data[: at[1]] + rng.bytes(at[0].itemsize) + data[at[1] + at[0].itemsize :]
            steps.append(f"harmless {field}")
    if rng.integers(2):
        cut = int(rng.integers(0, len(data) + 1))
        parts = [data] if rng.integers(4) else [data[:cut], data[cut:], b""]
        data = b"".join(gzip.compress(part, int(rng.integers(0, 10)), mtime=0) for part in parts)
        steps.append(f"gzip in {len(parts)} members")
        if not sound:
            changes = [None, None, (flip,), (flip, 0, 12), (flip, len(data) - 9), (truncate,), (splice,)]
            changes += [(add_zeros,), (gzip_again,), (add_bomb,)]
            if (chosen := changes[rng.integers(len(changes))]) is not None:
                change, *where = chosen
                step, data = change(rng, data, *where)
                steps.append(step)
    return data, f"{said}: {'; '.join(filter(None, steps)) or 'as it is'}", sound


def png_with_size(data, width, height):
    head = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]


def picture_base(rng, labels):
    """Return a picture and a format that holds its mode."""
    height, width = [(1, 1), (24, 31), (31, 31), (1, 40), (24, 31), (20, 20000), (20000, 20)][
        rng.integers(7) if not rng.integers(4) else 1
    ]
    values = rng.integers(0, 4 if labels else 256, (height, width)).astype(np.uint8)
    picture = Image.fromarray(values)
    mode = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"][rng.integers(13)]
    kind = ["PNG", "TIFF"][rng.integers(2)]
    if mode == "P":
        picture = Image.fromarray(values, "P") if labels else picture.convert("P")
        if labels:
            picture.putpalette(bytes(range(256)) * 3)
    elif mode == "PA":
        picture, kind = picture.convert("P"), "PNG"
        picture.info["transparency"] = 0
    elif mode == "I;16":
        picture = Image.fromarray(values.astype(np.uint16) * (1 if labels else 257))
    elif mode in ("I", "F"):
        picture, kind = Image.fromarray(values.astype(np.int32 if mode == "I" else np.float32)), "TIFF"
    elif mode in ("CMYK", "YCbCr", "LAB"):
        bands = [Image.fromarray(band) for band in rng.integers(0, 256, (4, height, width)).astype(np.uint8)]
        picture, kind = Image.merge(mode, bands[: 4 if mode == "CMYK" else 3]), "TIFF"
    elif mode == "1":
        picture = Image.fromarray(values > (1 if labels else 127))
    elif mode != "L":
        picture = picture.convert(mode)
    if mode in ("L", "RGB") and not rng.integers(3):
        kind = ["JPEG", "BMP", "WEBP"][rng.integers(3 if max(height, width) < 2**14 else 2)]
    options = {"lossless": True} if kind == "WEBP" else {}
    said = f"{mode} {height}x{width} {kind}"
    if kind in ("JPEG", "TIFF", "PNG", "WEBP") and not rng.integers(6):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation = int(rng.integers(0, 10))
        options["exif"] = exif
        said += f" orientation {orientation}"
    if kind in ("PNG", "TIFF", "WEBP") and not rng.integers(12):
        options |= {"save_all": True, "append_images": [ImageOps.mirror(picture)]}
        said += " 2 pages"
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue(), said, kind, (height, width)


def mutate_picture(rng, labels):
    data, said, kind, size = picture_base(rng, labels)
    step = "as it is"
    if rng.integers(4):
        changes = [flip, overwrite, truncate, splice, lambda rng, data: flip(rng, data, 0, 64)]
        if kind == "PNG":
            side = [0, 1, 7, 10**4, 10**5, 2**31 - 1]
            width, height = (side[i] for i in rng.integers(0, len(side), 2))
            changes.append(lambda rng, data: (f"says {width}x{height}", png_with_size(data, width, height)))
        step, data = changes[rng.integers(len(changes))](rng, data)
    suffix = {"PNG": ".png", "TIFF": ".tif", "JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp"}[kind]
    if not rng.integers(8):
        suffix = ".png"
    return data, f"{said}: {step}", suffix, size


def describe(kind, seed, index):
    """Say what a case is, without reading it."""
    rng = np.random.default_rng([seed, KINDS.index(kind), index])
    return (mutate_picture(rng, kind == "label_picture") if "picture" in kind else mutate_nifti(rng, kind))[1]


# Reading. Each returns "correct" or a short reason of a documented refusal, and raises for anything else.


class Wrong(Exception):
    """What was read is not what is in the file."""


def check(condition, text):
    if not condition:
        raise Wrong(text)


def nibabel_volume(data):
    """Read with nibabel: values of axes (left, posterior, superior), the file's affine, and that of the values."""
    if data[:2] == b"\x1f\x8b":
        with gzip.open(io.BytesIO(data)) as file:
            data = file.read(10**8)
    image_class = nib.Nifti1Image if data[344:347] == b"n+1" else nib.Nifti2Image
    size = image_class.header_class.sizeof_hdr
    image = image_class.from_bytes(data[:size] + bytes(4) + data[size + 4 :])  # without extensions
    ras = nib.as_closest_canonical(image)
    values = np.asarray(ras.dataobj)[::-1, ::-1]
    last = np.array(values.shape[:3]) - 1
    flipped = np.array([[-1, 0, 0, last[0]], [0, -1, 0, last[1]], [0, 0, 1, 0], [0, 0, 0, 1]])
    return values.reshape(values.shape[:3] + tuple(n for n in values.shape[3:] if n > 1)), image, ras.affine @ flipped


def check_volume(nifti, volume, expected, image, lps_affine):
    check(volume.voxels.shape == expected.shape, f"shape {volume.voxels.shape}, nibabel {expected.shape}")
    difference = np.abs(volume.voxels.astype(np.longdouble) - expected.astype(np.longdouble)).max()
    slope, intercept = image.dataobj.slope, image.dataobj.inter
    allowed = np.longdouble(0)
    if (slope, intercept) != (1, 0):
        allowed = 1e-12 * max(np.abs(expected.astype(np.longdouble)).max(), abs(intercept))
        if image.get_data_dtype().kind in "iu":
            allowed = max(allowed, abs(slope) / 32)
    check(difference <= allowed, f"values differ by {difference}")
    check(np.allclose(volume.affine, image.affine, rtol=1e-12), "affines differ")
    scale = np.abs(lps_affine).max()
    check(np.allclose(volume.lps_affine, lps_affine, rtol=1e-9, atol=1e-9 * scale), "affines of the axes differ")
    in_file = np.asarray(image.dataobj).reshape(image.shape[:3] + (-1,))
    grid = volume.to_file_grid(volume.voxels)
    check(grid.shape == image.shape[:3], "the grid of the file has another shape")
    same = [np.abs(grid - in_file[..., part]).max() <= allowed for part in range(in_file.shape[3])]
    check(any(same), "values differ on the grid of the file")


def check_grey(nifti, volume):
    """Hold window and grey values to their definition, in the precision of 80 bits."""
    values = volume.voxels.astype(np.longdouble)
    head = nifti.find_head(volume.voxels)
    corners = values[np.ix_([0, -1], [0, -1], [0, -1])]
    is_constant = (corners == corners.flat[0]).all()
    check(not (is_constant and head[values == corners.flat[0]].any()), "the value of all corners is in the head")
    foreground = values[head]
    try:
        window = nifti.intensity_window(volume)
    except nifti.ScanError as err:
        check(not foreground.size and "is empty: all voxels are" in str(err), f"not empty, but {err}")
        raise
    low, high = np.percentile(foreground, [0.5, 99.5])
    ordered = np.sort(foreground)
    last = len(ordered) - 1
    steps = [ordered[min(int(place) + 1, last)] - ordered[int(place)] for place in (0.005 * last, 0.995 * last)]
    kind = np.finfo(volume.voxels.dtype if volume.voxels.dtype.kind == "f" else np.float32)
    # Between two values the position is as exact as its own rounding.
    near = 8 * kind.eps * (max(abs(low), abs(high)) + len(ordered) * max(steps)) + 8 * kind.smallest_subnormal
    check(abs(window.low - low) <= near and abs(window.high - high) <= near, f"window {window}, not {low} to {high}")
    grey = nifti.to_grey(volume)
    check(grey.dtype == np.uint8 and not grey[~head].any(), "grey is not 0 outside the head")
    if high - low > near:
        expected = np.clip((foreground - low) / (high - low) * 255, 0, 255)
        wrong = np.abs(grey[head] - expected).max()
        check(wrong <= 0.5 + 255 * near / (high - low) + 1e-3, f"grey values differ by {wrong}")


def short(message):
    """Return the words of an error that all errors of its kind share."""
    return re.split(r"[(:\[.;]|\d", message.strip(" .:(;"))[0].strip()[:50]


def read_nifti(nifti, kind, folder, data, sound):
    if kind == "decathlon":
        path = folder / "imagesTr" / "BRATS_001.nii.gz"
    else:
        path = folder / "Case_1" / f"Case_1_{'seg' if kind == 'mask' else 'flair'}.nii.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    (case,) = nifti.find_cases(folder) if kind != "mask" else [nifti.BratsCase("Case_1", folder, {"seg": path})]
    try:
        if kind == "mask":
            volumes = [case.read_mask()]
        else:
            volumes = case.read_images(["t1", "flair"] if kind == "decathlon" else ["flair"])
    except nifti.ScanError as err:
        check(f"case {case.case_id}: `{path}`" in str(err), f"the file is not named: {err}")
        check(not sound, f"a sound file is refused: {err}")
        return short(str(err).split("`", 2)[2])
    expected, image, lps_affine = nibabel_volume(data)
    if kind == "mask":
        # Labels within 0.01 of a whole number are rounded: a slope of 1.00000006 makes no other label of 1.
        check(np.abs(expected - np.rint(expected)).max() <= 0.01 + 1e-9, "fractions were read as labels")
        expected = np.rint(expected)
        check(np.isin(expected, [0, 1, 2, 4]).all(), "unknown labels were read")
        check(np.array_equal(volumes[0].voxels, np.where(expected == 4, 3, expected)), "labels differ")
        return "correct"
    parts = [expected[..., 1], expected[..., 0]] if kind == "decathlon" else [expected]
    for volume, part in zip(volumes, parts, strict=True):
        check_volume(nifti, volume, part, image, lps_affine)
    try:
        for volume in volumes:
            check_grey(nifti, volume)
    except nifti.ScanError as err:
        check(f"`{path}`" in str(err), f"the file is not named: {err}")
        return "is empty"
    return "correct"


def expected_picture(image):
    """Values in 0..1 of shape (3, height, width) that a picture stands for."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        values = values.astype(np.float64) / 65535
    elif image.mode == "I":
        values = values / (255 if values.max() <= 255 else 65535)
    elif image.mode == "F":
        values = values / (1 if values.max() <= 1 else 255)
    else:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1) / 255
    return np.broadcast_to(values, (3, *values.shape))


def expected_labels(image):
    values = np.asarray(image)
    if values.ndim == 3 and values.shape[2] > 2:
        check((values[..., :3] == values[..., :1]).all(), "colours were read as labels")
    return (values if values.ndim == 2 else values[..., 0]).astype(np.int64)


def read_pictures(modules, kind, folder, data, suffix, size, seed):
    sources, processor = modules
    labels = kind == "label_picture"
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    path = folder / ("masks" if labels else "images") / f"x{suffix}"
    path.write_bytes(data)
    try:
        with Image.open(path) as image:
            size = ImageOps.exif_transpose(image).size[::-1] if image.width * image.height < 10**6 else size
    except Exception:
        pass
    other = np.random.default_rng(seed).integers(0, 4, [max(1, min(n, 20000)) for n in size]).astype(np.uint8)
    Image.fromarray(other).save(folder / ("images" if labels else "masks") / "x.png")
    try:
        rows = sources.pair_images_and_masks(folder / "images", folder / "masks")
        found = sources.check_images_and_masks("train", rows, ["image"], "mask")
    except SystemExit as err:
        check("train image x" in str(err) or str(path) in str(err), f"the file is not named: {err}")
        return short(str(err).replace(str(path), "FILE").removeprefix("train image x"))
    with Image.open(io.BytesIO(data)) as image:
        image = ImageOps.exif_transpose(image)
        if labels:
            expected = expected_labels(image)
            check(found == set(np.unique(expected).tolist()), f"labels {found} found")
            inputs = processor(Image.fromarray(other), segmentation_maps=image, return_tensors="np")
            check(np.array_equal(inputs["labels"][0], expected), "labels differ")
        else:
            check(found == set(np.unique(other).tolist()), "labels of the mask")
            row = rows[0]["image"]
            expected = expected_picture(image)
            values = processor(row, return_tensors="np")["pixel_values"][0]
            check(values.shape == expected.shape, f"shape {values.shape}")
            difference = np.abs(values - expected).max()
            check(difference < 1e-5, f"values differ by {difference}")
    return "correct"


def build(builder_class, folder, cache, skip):
    builder = builder_class(data_dir=str(folder), slices="all", cache_dir=str(cache), skip_bad_cases=skip)
    builder.download_and_prepare()
    rows = {}
    for split in builder.as_dataset().values():
        for row in split.to_list():
            rows.setdefault(row["case_id"], []).append((row["flair"]["bytes"], row["mask"]["bytes"]))
    return rows, builder.skipped_cases


def read_cohort(modules, folder, data, name):
    """Put the file in the place of a scan or mask of a cohort of three, and build the data set both ways."""
    builder_class, error = modules
    for number in range(3):
        for ending in ("flair", "seg"):
            path = folder / "cohort" / f"Case_{number}" / f"Case_{number}_{ending}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cohort_file(number, ending)[0])
    sound, skipped = build(builder_class, folder / "cohort", folder / "cache", False)
    check(len(sound) == 3 and not skipped, "a sound cohort is not read")
    (folder / "cohort" / "Case_1" / f"Case_1_{name}.nii.gz").write_bytes(data)
    outcome = "correct"
    try:
        rows, _ = build(builder_class, folder / "cohort", folder / "cache", False)
    except error as err:
        check("case Case_1: " in str(err) and "skip_bad_cases" in str(err), f"the case is not named: {err}")
        outcome = "named"
    else:
        check(set(rows) == set(sound), f"cases {sorted(rows)}")
    rows, skipped = build(builder_class, folder / "cohort", folder / "cache", True)
    check(set(skipped) == ({"Case_1"} if outcome == "named" else set()), f"left out {skipped}")
    check(set(rows) == set(sound) - set(skipped), f"cases {sorted(rows)}")
    check(all(rows[case] == sound[case] for case in ("Case_0", "Case_2")), "rows of other cases have changed")
    return outcome


# The process


def load_modules(kinds):
    """Import once what the kinds need; scans need no PyTorch."""
    modules = {}
    if set(kinds) & set(NIFTI_KINDS):
        # The package itself imports PyTorch, so that it is stood in for.
        sys.modules["scans"] = types.ModuleType("scans")
        sys.modules["scans"].__path__ = [str(REPO / "sam2unet_hf")]
        found = [importlib.import_module(f"scans.{name}") for name in ("scans_sam2unet", "cases_sam2unet")]
        modules["nifti"] = types.SimpleNamespace(
            **vars(found[0]), **{k: v for k, v in vars(found[1]).items() if k not in vars(found[0])}
        )
    if set(kinds) - set(NIFTI_KINDS):
        sys.path.insert(0, str(REPO))
        import datasets

        from dataset_scripts.brats_slices import BratsSlices
        from sam2unet_hf import Sam2UNetImageProcessor
        from sam2unet_hf.finetuning import data_checks, data_sources
        from sam2unet_hf.scans_sam2unet import ScanError

        datasets.disable_progress_bars()
        data_checks.tqdm = lambda items, **_: items
        plain = Sam2UNetImageProcessor(do_resize=False, do_normalize=False)
        modules |= {"pictures": (data_sources, plain), "builder": (BratsSlices, ScanError)}
    return modules


def run_case(modules, kind, seed, index, folder):
    """Return how a case ended: `correct`, a documented refusal, or `WRONG` and what is."""
    rng = np.random.default_rng([seed, KINDS.index(kind), index])
    try:
        if kind == "builder":
            data, said, _ = mutate_nifti(rng, kind)
            return read_cohort(modules["builder"], folder, data, said.split(":")[0])
        if kind in NIFTI_KINDS:
            data, _, sound = mutate_nifti(rng, kind)
            return read_nifti(modules["nifti"], kind, folder, data, sound)
        data, _, suffix, size = mutate_picture(rng, kind == "label_picture")
        return read_pictures(modules["pictures"], kind, folder, data, suffix, size, seed)
    except BaseException:
        return f"WRONG {traceback.format_exc(limit=-4)}"


def limit_memory():
    """Allow the process 2 GB of address space more than it has, which is far more than it uses."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2 * GB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main():
    warnings.simplefilter("ignore")
    logging.disable()
    kind, seed, *index = sys.argv[1:]
    if index:
        sys.stdout.write(f"{describe(kind, int(seed), int(index[0]))}\n")
    kinds = kind.split(",")
    modules = load_modules(kinds)
    limit_memory()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print do not disturb the answers
    for line in index or sys.stdin:
        *kind_of, number = str(line).split()
        folder = Path(tempfile.mkdtemp(prefix="fuzz_"))
        try:
            outcome = run_case(modules, kind_of[0] if kind_of else kind, int(seed), int(number), folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        answers.write(json.dumps(outcome) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
