"""A cohort of made-up brain tumour scans in the layout of BraTS 2020."""

import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sam2unet_hf.scans_sam2unet import write_nifti

from .brain import brain_parts, column, draw_anatomy, draw_tumour, norm, random_waves, to_template


VERSION = "1.0.0"  # for caches: raise it whenever the volumes change
NUM_PATIENTS = 30  # of the cohort that the examples train on
DEFAULT_SHAPE = (96, 96, 62)
FIELD_OF_VIEW_MM = 240.0  # left to right, as in BraTS; the voxel size follows from it
HEAD_SIZE_MM = (150.0, 190.0, 150.0)  # room for the largest phantom brain

# Mean intensity of each tissue relative to white matter, read off the cases of BraTS 2018; the tumour's come last.
TISSUES = ("csf", "grey", "white", "deep_grey", "vessel", "gliosis", "oedema", "core", "enhancing")
INTENSITIES = {
    "t1": (0.30, 0.76, 1.00, 0.86, 0.70, 0.90, 0.78, 0.62, 0.72),
    "t1ce": (0.34, 0.80, 1.00, 0.88, 2.00, 0.92, 0.80, 0.66, 1.75),
    "t2": (2.80, 1.50, 1.00, 1.15, 0.90, 1.60, 2.05, 2.40, 1.85),
    "flair": (0.28, 1.20, 1.00, 1.12, 0.60, 1.65, 1.95, 1.45, 1.80),
}

SUBARACHNOID_MM = 0.7  # fluid the skull stripping leaves around the brain
TUMOUR_FRACTION = (0.012, 0.11)  # whole tumour per brain volume


def is_phantom(case_id: str) -> bool:
    """Whether a case is named as those that `write_phantom_cohort` draws, and so shows nobody."""
    return re.fullmatch(r"Phantom_\d{3,}", case_id) is not None


def _voxel_size_mm(shape: Sequence[int]) -> float:
    """Check the shape of a volume, and return how wide its voxels are."""
    if len(shape) != 3:
        raise ValueError(f"`shape` must have three sizes, got {tuple(shape)}.")
    voxel_mm = FIELD_OF_VIEW_MM / shape[0]
    if any(size * voxel_mm < head for size, head in zip(shape, HEAD_SIZE_MM, strict=True)) or shape[0] < 24:
        raise ValueError(
            f"`shape` must be at least 24 voxels wide and hold a head of {HEAD_SIZE_MM} mm at {FIELD_OF_VIEW_MM:g} mm "
            f"/ shape[0] = {voxel_mm:.3g} mm a voxel, got {tuple(shape)}. Pass the proportions of 240 x 240 x 155."
        )
    return voxel_mm


def _head_points(shape: Sequence[int], spacing_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices and positions (3, n) in mm of the voxels in the middle of the volume that may hold brain."""
    axes = [(np.arange(size, dtype=np.float32) - (size - 1) / 2) * spacing_mm for size in shape]
    axes[2] += 6  # more room above than below: BraTS cuts through the brain stem
    grid = np.meshgrid(*axes, indexing="ij", sparse=True)
    inside = sum((axis * 2 / size) ** 2 for axis, size in zip(grid, HEAD_SIZE_MM, strict=True)) < 1.15
    indices = np.flatnonzero(inside)
    i, j, k = np.unravel_index(indices, tuple(shape))
    return indices, np.stack([axes[0][i], axes[1][j], axes[2][k]]).astype(np.float32)


def make_phantom_case(
    seed: int | Sequence[int] | np.random.Generator,
    shape: Sequence[int] = DEFAULT_SHAPE,
    tumour_growth: float = 1.0,
) -> dict[str, np.ndarray]:
    """Draw one patient.

    Args:
        seed: Anything `numpy.random.default_rng` takes; equal seeds give equal patients. The anatomy does not depend
            on `shape`, only its sampling and the noise do.
        shape: Voxels to the left, to the back and up. The voxels are cubes of `240 / shape[0]` mm.
        tumour_growth: Finite factor on the volume of the tumour, above 0, to draw the same patient at another time.

    Returns:
        `t1`, `t1ce`, `t2`, `flair` (0 outside the brain, positive inside) and `seg` (0 background, 1 necrotic and
        non-enhancing core, 2 oedema, 4 enhancing tumour), all int16 of shape `shape`.

    Raises:
        ValueError: If the brain does not fit into `shape`, or `tumour_growth` is not finite and above 0.
    """
    if not (math.isfinite(tumour_growth) and tumour_growth > 0):
        raise ValueError(
            f"`tumour_growth` must be a finite number above 0, got {tumour_growth}. Pass 1.0 for the tumour as it is."
        )
    voxel_mm = _voxel_size_mm(shape)
    rng = np.random.default_rng(seed)
    side = rng.choice([-1, 1])
    centre = column([side * rng.uniform(20, 42), rng.uniform(-45, 48), rng.uniform(-8, 42)])
    fraction = tumour_growth * float(np.exp(rng.uniform(*np.log(TUMOUR_FRACTION))))  # as many small as large ones
    push_mm = 45 * fraction ** (1 / 3)
    scales = rng.uniform(150, 450, size=len(INTENSITIES))
    intensities = np.array(list(INTENSITIES.values()))
    intensities[:, -3:] *= rng.uniform(0.85, 1.15, size=(len(INTENSITIES), 3))
    noise_level = np.float32(rng.uniform(0.02, 0.045))

    indices, points = _head_points(shape, voxel_mm)
    pressure = np.exp(-((norm(points - centre) / push_mm) ** 2) / 2)
    template = to_template(rng, points, centre, pressure)
    parts = np.stack(brain_parts(template))
    inside = parts.min(0) < SUBARACHNOID_MM
    indices, points, template = indices[inside], points[:, inside], template[:, inside]
    parts, pressure = parts[:, inside], pressure[inside]
    layers, depth, ventricles = draw_anatomy(rng, template, parts, pressure, voxel_mm)
    tumour, labels = draw_tumour(rng, points, template, centre, fraction, depth, ventricles, voxel_mm)
    stripped = (parts.min(0) > -3) & (depth < -0.8)  # skull stripping also takes the fluid where sulci open
    grain = 1 + 0.03 * random_waves(rng, points, 12.0)

    def to_volume(values: np.ndarray) -> np.ndarray:
        volume = np.zeros(tuple(shape), dtype=np.int16)
        volume.flat[indices] = values
        return volume

    case = {}
    for name, means_in_order, scale in zip(INTENSITIES, intensities, scales, strict=True):
        means = dict(zip(TISSUES, means_in_order, strict=True))
        signal = np.full_like(grain, means["csf"])
        for tissue, share in [*layers, *tumour]:
            signal += share * (np.float32(means[tissue]) - signal)
        signal *= grain * (1 + 0.10 * random_waves(rng, points, 250.0, 4))
        noise = noise_level * rng.standard_normal(size=(2, len(indices)), dtype=np.float32)
        signal = np.hypot(signal + noise[0], noise[1])  # a magnitude image has Rician noise
        case[name] = to_volume(np.where(stripped, 0, np.clip(np.rint(np.float32(scale) * signal), 1, None)))
    case["seg"] = to_volume(np.where(stripped, 0, labels))
    return case


def write_phantom_cohort(
    output_dir: str | Path,
    num_patients: int = NUM_PATIENTS,
    shape: Sequence[int] = DEFAULT_SHAPE,
    seed: int = 0,
    first: int = 1,
) -> Path:
    """Write patients `Phantom_001`, ... as BraTS 2020 does: `Phantom_001/Phantom_001_{t1,t1ce,t2,flair,seg}.nii.gz`.

    The volumes run to the left, to the back and up. Patient k depends on `seed`, k and `shape` alone, so a larger
    cohort starts with the smaller one, and the files are the same bytes every time.

    Args:
        output_dir: New or empty folder; it appears once every patient is written.
        num_patients: At least 1.
        shape: See `make_phantom_case`; (240, 240, 155) is the size of BraTS.
        seed: At least 0.
        first: Number of the first patient, at least 1.

    Returns:
        `output_dir` as a path.

    Raises:
        FileExistsError: If `output_dir` is a file or holds anything.
        ValueError: If an argument is out of range.
    """
    output_dir = Path(output_dir)
    if num_patients < 1:
        raise ValueError(f"`num_patients` must be >= 1, got {num_patients}.")
    if first < 1:
        raise ValueError(f"`first` must be >= 1, got {first}.")
    if seed < 0:
        raise ValueError(f"`seed` must be >= 0, got {seed}.")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(
            f"`output_dir` must be new or empty, got {output_dir}. Remove it or pass another folder."
        )
    voxel_mm = _voxel_size_mm(shape)
    affine = np.diag([-voxel_mm, -voxel_mm, voxel_mm, 1.0])
    affine[1, 3] = (shape[1] - 1) * voxel_mm  # BraTS' origin: 239 mm at its size
    path = output_dir.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as staging_dir:
        cohort = Path(staging_dir, "cohort")
        for number in tqdm(range(first, first + num_patients), desc="Drawing phantom patients", unit="patient"):
            name = f"Phantom_{number:03d}"
            for suffix, volume in make_phantom_case([seed, number], shape).items():
                write_nifti(cohort / name / f"{name}_{suffix}.nii.gz", volume, affine, compression_level=4)
        if output_dir.exists():
            output_dir.rmdir()
        cohort.rename(path)
    return output_dir
