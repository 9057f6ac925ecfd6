"""A cohort of made-up brain tumour scans in the layout of BraTS 2020."""

import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sam2unet_hf.scans_sam2unet import write_nifti

from .brain import (
    GREY_THICKNESS_MM,
    Layers,
    Rng,
    brain_parts,
    column,
    cover,
    draw_anatomy,
    norm,
    random_waves,
    to_template,
)


VERSION = "1.0.0"  # for caches: raise it whenever the volumes change
DEFAULT_SHAPE = (96, 96, 62)
FIELD_OF_VIEW_MM = 240.0  # left to right, as in BraTS; the voxel size follows from it
HEAD_SIZE_MM = (150.0, 190.0, 150.0)  # room for the largest phantom brain

# Mean intensity of each tissue relative to white matter, read off the cases of BraTS 2018.
TISSUES = ("csf", "grey", "white", "deep_grey", "vessel", "gliosis", "oedema", "core", "enhancing")
INTENSITIES = {
    "t1": (0.30, 0.76, 1.00, 0.86, 0.70, 0.90, 0.78, 0.62, 0.72),
    "t1ce": (0.34, 0.80, 1.00, 0.88, 2.00, 0.92, 0.80, 0.66, 1.75),
    "t2": (2.80, 1.50, 1.00, 1.15, 0.90, 1.60, 2.05, 2.40, 1.85),
    "flair": (0.28, 1.20, 1.00, 1.12, 0.60, 1.65, 1.95, 1.45, 1.80),
}
MODALITIES = tuple(INTENSITIES)
TUMOUR_TISSUES = ("oedema", "core", "enhancing")

SUBARACHNOID_MM = 0.7  # fluid the skull stripping leaves around the brain
TUMOUR_FRACTION = (0.012, 0.11)  # whole tumour per brain volume
CORE_FRACTION = (0.15, 0.55)  # tumour core per whole tumour
NECROSIS_FRACTION = (0.25, 0.65)  # necrotic centre per tumour core
LOW_GRADE_RATE = 0.15  # core without enhancing part
NO_NECROSIS_RATE = 0.10
OUTSIDE = -1000.0  # depth in mm of voxels the tumour cannot reach


def _shift_to_count(depth: np.ndarray, count: int) -> np.ndarray:
    """Shift `depth` so that `count` elements are positive, or all that are not `OUTSIDE` if they are fewer."""
    return depth - max(np.partition(depth, -count - 1)[-count - 1], np.float32(OUTSIDE / 2))


def _head_points(shape: Sequence[int], spacing_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices and positions (3, n) in mm of the voxels in the middle of the volume that may hold brain."""
    axes = [(np.arange(size, dtype=np.float32) - (size - 1) / 2) * spacing_mm for size in shape]
    axes[2] += 6  # more room above than below: BraTS cuts through the brain stem
    grid = np.meshgrid(*axes, indexing="ij", sparse=True)
    inside = sum((axis * 2 / size) ** 2 for axis, size in zip(grid, HEAD_SIZE_MM, strict=True)) < 1.15
    indices = np.flatnonzero(inside)
    i, j, k = np.unravel_index(indices, tuple(shape))
    return indices, np.stack([axes[0][i], axes[1][j], axes[2][k]]).astype(np.float32)


def _draw_tumour(
    rng: Rng,
    points: np.ndarray,
    template: np.ndarray,
    centre: np.ndarray,
    fraction: float,
    depth: np.ndarray,
    ventricles: np.ndarray,
    voxel_mm: float,
) -> tuple[Layers, np.ndarray]:
    """Return the layers of a tumour at `centre` and its BraTS labels, both from the same nested depth fields."""
    volume = int(fraction * points.shape[1])
    radius_mm = (volume * voxel_mm**3 * 3 / (4 * np.pi)) ** (1 / 3)
    allowed = (ventricles > 0) & (depth > -1)
    # Oedema spreads along white matter, hardly into cortex, and only through the callosum to the other side.
    offset = (points - centre) * column(rng.uniform(0.8, 1.25, size=3))
    lumps = 0.22 * random_waves(rng, points, 2.2 * radius_mm) + 0.10 * random_waves(rng, points, 0.9 * radius_mm)
    across = np.maximum(-np.sign(centre[0]) * template[0], 0)
    spread = radius_mm * lumps - norm(offset) - across + 3 * np.clip(depth - GREY_THICKNESS_MM - 1, -4, 2)
    oedema = _shift_to_count(np.where(allowed, spread, OUTSIDE), volume)

    core_share = rng.uniform(*CORE_FRACTION)
    core_radius_mm = radius_mm * core_share ** (1 / 3)
    core_offset = points - centre - column(rng.normal(size=3)) * 0.1 * radius_mm
    core_lumps = 0.18 * random_waves(rng, points, 1.8 * core_radius_mm) + 0.09 * random_waves(rng, points, 9.0)
    core = core_radius_mm * (1.1 + core_lumps) - norm(core_offset)
    core = np.minimum(core, oedema - 0.1 * radius_mm)  # keeps off the cortex
    core = _shift_to_count(np.where(oedema > 0, core, OUTSIDE), max(int(core_share * volume), 8))
    # The rim's thickness varies along the rim.
    necrosis = core + 0.10 * core_radius_mm * random_waves(rng, points, 1.2 * core_radius_mm)
    necrosis = np.where(core > 0.8 * voxel_mm, necrosis, OUTSIDE)
    necrosis = _shift_to_count(necrosis, max(int(core_share * volume * rng.uniform(*NECROSIS_FRACTION)), 1))
    kind = rng.uniform()
    if kind < LOW_GRADE_RATE:
        necrosis = core
    elif kind < LOW_GRADE_RATE + NO_NECROSIS_RATE:
        necrosis = np.full_like(core, OUTSIDE)

    labels = np.select([necrosis > 0, core > 0, oedema > 0], [1, 4, 2], 0).astype(np.int16)
    texture = 1 - 0.08 * np.clip(random_waves(rng, points, 16.0, 20), 0, 2)
    layers = [
        ("oedema", cover(oedema, max(7.0, 2.2 * voxel_mm)) * (depth > -1) * texture * rng.uniform(0.55, 0.95)),
        ("enhancing", cover(core, voxel_mm) * texture * rng.uniform(0.75, 1.0)),
        ("core", cover(necrosis, voxel_mm) * texture),
    ]
    return layers, labels


def _affine(shape: Sequence[int]) -> np.ndarray:
    """Return the affine of a volume that runs to the left, to the back and up from BraTS' origin."""
    spacing_mm = FIELD_OF_VIEW_MM / shape[0]
    affine = np.diag([-spacing_mm, -spacing_mm, spacing_mm, 1.0])
    affine[1, 3] = (shape[1] - 1) * spacing_mm  # 239 mm at BraTS' size
    return affine


def make_phantom_case(
    seed: int | Sequence[int] | np.random.Generator, shape: Sequence[int] = DEFAULT_SHAPE
) -> dict[str, np.ndarray]:
    """Draw one patient.

    Args:
        seed: Anything `numpy.random.default_rng` takes; equal seeds give equal patients. The anatomy does not depend
            on `shape`, only its sampling and the noise do.
        shape: Voxels to the left, to the back and up. The voxels are cubes of `240 / shape[0]` mm.

    Returns:
        `t1`, `t1ce`, `t2`, `flair` (0 outside the brain, positive inside) and `seg` (0 background, 1 necrotic and
        non-enhancing core, 2 oedema, 4 enhancing tumour), all int16 of shape `shape`.

    Raises:
        ValueError: If the brain does not fit into `shape`.
    """
    if len(shape) != 3:
        raise ValueError(f"`shape` must have three sizes, got {tuple(shape)}.")
    voxel_mm = FIELD_OF_VIEW_MM / shape[0]
    if any(size * voxel_mm < head for size, head in zip(shape, HEAD_SIZE_MM, strict=True)) or shape[0] < 24:
        raise ValueError(
            f"`shape` must be at least 24 voxels wide and hold a head of {HEAD_SIZE_MM} mm at {FIELD_OF_VIEW_MM:g} mm "
            f"/ shape[0] = {voxel_mm:.3g} mm a voxel, got {tuple(shape)}. Pass the proportions of 240 x 240 x 155."
        )
    rng = np.random.default_rng(seed)
    side = rng.choice([-1, 1])
    centre = column([side * rng.uniform(20, 42), rng.uniform(-45, 48), rng.uniform(-8, 42)])
    fraction = float(np.exp(rng.uniform(*np.log(TUMOUR_FRACTION))))  # as many small as large ones
    push_mm = 45 * fraction ** (1 / 3)
    scale = rng.uniform(150, 450, size=len(MODALITIES))
    tumour_gain = rng.uniform(0.85, 1.15, size=(len(MODALITIES), len(TUMOUR_TISSUES)))
    noise_level = np.float32(rng.uniform(0.02, 0.045))

    indices, points = _head_points(shape, voxel_mm)
    pressure = np.exp(-((norm(points - centre) / push_mm) ** 2) / 2)
    template = to_template(rng, points, centre, pressure)
    parts = np.stack(brain_parts(template))
    inside = parts.min(0) < SUBARACHNOID_MM
    indices, points, template = indices[inside], points[:, inside], template[:, inside]
    parts, pressure = parts[:, inside], pressure[inside]
    layers, depth, ventricles = draw_anatomy(rng, template, parts, pressure, voxel_mm)
    tumour, labels = _draw_tumour(rng, points, template, centre, fraction, depth, ventricles, voxel_mm)
    stripped = (parts.min(0) > -3) & (depth < -0.8)  # skull stripping also takes the fluid where sulci open
    grain = 1 + 0.03 * random_waves(rng, points, 12.0)

    def to_volume(values: np.ndarray) -> np.ndarray:
        volume = np.zeros(tuple(shape), dtype=np.int16)
        volume.flat[indices] = values
        return volume

    case = {}
    for channel, name in enumerate(MODALITIES):
        means = dict(zip(TISSUES, INTENSITIES[name], strict=True))
        for tissue, gain in zip(TUMOUR_TISSUES, tumour_gain[channel], strict=True):
            means[tissue] *= gain
        signal = np.full_like(grain, means["csf"])
        for tissue, share in [*layers, *tumour]:
            signal += share * (np.float32(means[tissue]) - signal)
        signal *= grain * (1 + 0.10 * random_waves(rng, points, 250.0, 4))
        noise = noise_level * rng.standard_normal(size=(2, len(indices)), dtype=np.float32)
        signal = np.hypot(signal + noise[0], noise[1])  # a magnitude image has Rician noise
        case[name] = to_volume(np.where(stripped, 0, np.clip(np.rint(np.float32(scale[channel]) * signal), 1, None)))
    case["seg"] = to_volume(np.where(stripped, 0, labels))
    return case


def write_phantom_cohort(
    output_dir: str | Path, num_patients: int = 30, shape: Sequence[int] = DEFAULT_SHAPE, seed: int = 0
) -> Path:
    """Write patients `Phantom_001`, ... as BraTS 2020 does: `Phantom_001/Phantom_001_{t1,t1ce,t2,flair,seg}.nii.gz`.

    The volumes run to the left, to the back and up. Patient k depends on `seed`, k and `shape` alone, so a larger
    cohort starts with the smaller one, and the files are the same bytes every time.

    Args:
        output_dir: New or empty folder; it appears once every patient is written.
        num_patients: At least 1.
        shape: See `make_phantom_case`; (240, 240, 155) is the size of BraTS.
        seed: At least 0.

    Returns:
        `output_dir` as a path.

    Raises:
        FileExistsError: If `output_dir` is a file or holds anything.
        ValueError: If an argument is out of range.
    """
    output_dir = Path(output_dir)
    if num_patients < 1:
        raise ValueError(f"`num_patients` must be >= 1, got {num_patients}.")
    if seed < 0:
        raise ValueError(f"`seed` must be >= 0, got {seed}.")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(
            f"`output_dir` must be new or empty, got {output_dir}. Remove it or pass another folder."
        )
    staging_dir = output_dir.absolute().with_name(f".{output_dir.absolute().name}.{uuid.uuid4().hex}")
    try:
        for number in tqdm(range(1, num_patients + 1), desc="Drawing phantom patients", unit="patient"):
            name = f"Phantom_{number:03d}"
            case_dir = staging_dir / name
            case_dir.mkdir(parents=True)
            for suffix, volume in make_phantom_case([seed, number], shape).items():
                write_nifti(case_dir / f"{name}_{suffix}.nii.gz", volume, _affine(shape), compression_level=4)
        if output_dir.exists():
            output_dir.rmdir()
        staging_dir.rename(output_dir)
    finally:
        shutil.rmtree(staging_dir, ignore_errors=True)
    return output_dir
