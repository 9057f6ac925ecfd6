"""The brain of a phantom and its tumour, drawn with distance functions.

The template frame is in millimetres: x to the left, y to the back, z up, origin between the thalami. Positions in the
volume are warped into it, so every patient differs. Points are arrays (3, n); a distance is negative inside.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np


Rng: TypeAlias = np.random.Generator
Layers: TypeAlias = list[tuple[str, np.ndarray]]  # tissue and its share of each voxel, to be painted in order

# Paths of (x, y, z, radius) in the left hemisphere; the right one is its mirror image.
LATERAL_VENTRICLE = (
    [(18, -37, 12, 2.5), (8, -20, 16, 5), (8, 2, 21, 5), (16, 20, 18, 5.5), (25, 36, 5, 6), (27, 54, 2, 2)],
    [(24, 34, 2, 5), (33, 14, -15, 2)],
)
BRAINSTEM = [(0, 12, -12, 15), (0, 17, -32, 16), (0, 26, -75, 9)]
# Ellipsoids of (centre, radii).
CEREBRUM = ((0, 0, 14), (67, 85, 57))
TEMPORAL_LOBE = ((37, -4, -20), (26, 47, 21))
CEREBELLUM = ((0, 48, -38), (52, 35, 27))
BASAL_CISTERN = ((0, -8, -24), (21, 20, 13))
DEEP_NUCLEI = (((11, 8, 4), (8.5, 15, 9)), ((15, -24, 9), (5, 9, 9)), ((25, -3, 2), (6.5, 18, 10)))
MIDLINE_VENTRICLES = (((0, 2, -3), (2.2, 13, 9)), ((0, 33, -36), (6, 4.5, 10)))

GREY_THICKNESS_MM = 3.5
GYRAL_WAVELENGTH_MM = 21.0  # two gyri
FOLIA_WAVELENGTH_MM = 9.0

CORE_FRACTION = (0.15, 0.55)  # tumour core per whole tumour
NECROSIS_FRACTION = (0.25, 0.65)  # necrotic centre per tumour core
LOW_GRADE_RATE = 0.15  # core without enhancing part
NO_NECROSIS_RATE = 0.10
OUTSIDE = -1000.0  # depth in mm of voxels the tumour cannot reach


def random_waves(rng: Rng, points: np.ndarray, wavelength_mm: float, num_waves: int = 12) -> np.ndarray:
    """Smooth noise with mean 0 and variance 1 at `points` (3, n): plane waves in random directions."""
    directions = rng.normal(size=(num_waves, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    wavelengths_mm = wavelength_mm * rng.uniform(0.8, 1.25, size=(num_waves, 1))
    vectors = (2 * np.pi / wavelengths_mm * directions).astype(np.float32)
    phases = rng.uniform(0, 2 * np.pi, size=num_waves).astype(np.float32)
    waves = np.empty_like(points[0])
    for start in range(0, waves.size, 4096):  # blocks that fit the cache
        block = slice(start, start + 4096)
        waves[block] = np.cos(vectors @ points[:, block] + phases[:, None]).sum(0)
    return waves * np.float32(np.sqrt(2 / num_waves))


def column(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Make a vector (3, 1) that broadcasts over points."""
    return np.asarray(values, dtype=np.float32)[:, None]


def norm(vectors: np.ndarray) -> np.ndarray:
    """Length of each column of `vectors` (3, n)."""
    return np.sqrt(vectors[0] ** 2 + vectors[1] ** 2 + vectors[2] ** 2)


def _ellipsoid(points: np.ndarray, centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """Distance in mm to the surface along the ray from the centre, negative inside."""
    offset = points - column(centre)
    return norm(offset) * (1 - 1 / np.maximum(norm(offset / column(radii)), 1e-3))


def _tube(points: np.ndarray, path: Sequence[Sequence[float]], swelling: float = 1.0) -> np.ndarray:
    """Distance in mm to a polyline whose radius changes linearly from node to node, negative inside."""
    distance = np.full_like(points[0], np.inf)
    for start, end in zip(path[:-1], path[1:], strict=True):
        offset, axis = points - column(start[:3]), column(end[:3]) - column(start[:3])
        along = np.clip((offset * axis).sum(0) / (axis**2).sum(), 0, 1)
        radius = swelling * (start[3] + along * (end[3] - start[3]))
        distance = np.minimum(distance, norm(offset - along * axis) - radius)
    return distance


def cover(depth_mm: np.ndarray, width_mm: float) -> np.ndarray:
    """Share of a voxel that lies inside a surface, from the depth of its centre."""
    return np.clip(depth_mm / width_mm + 0.5, 0, 1)


def to_template(rng: Rng, points: np.ndarray, tumour_centre: np.ndarray, pressure: np.ndarray) -> np.ndarray:
    """Undo what makes this patient's anatomy differ from the template: mass effect, pose, size, shape."""
    x, y, z = points - 0.35 * pressure * (points - tumour_centre)
    tilt = rng.normal(0, 0.04)
    posed = np.stack([x + tilt * y, y - tilt * x, z]) / column(rng.uniform(0.94, 1.03, size=3))
    bends = np.stack([random_waves(rng, points, 110.0) for _ in range(3)])
    return posed + column([1.5, 2.5, 2.5]) * bends


def brain_parts(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Signed distances in mm, negative inside, of cerebrum, cerebellum, brain stem and basal cisterns."""
    x, y, z = points
    mirrored = np.stack([np.abs(x), y, z])
    # Wider behind than in front, with a notch where the hemispheres meet.
    width = 1 + 0.10 * np.clip(y / 85, -1, 0.5) - 0.05 * np.clip(y / 85 - 0.5, 0, 1)
    cerebrum = _ellipsoid(np.stack([x / width, y, np.where(z < 14, (z - 14) * 1.2 + 14, z)]), *CEREBRUM)
    cerebrum = cerebrum + 3.5 * np.exp(-((x / 4) ** 2))
    cerebrum = np.minimum(cerebrum, _ellipsoid(mirrored, *TEMPORAL_LOBE))
    cerebellum = _ellipsoid(points, *CEREBELLUM) + 4 * np.exp(-((x / 6) ** 2)) * (y > 60)
    return cerebrum, cerebellum, _tube(points, BRAINSTEM), _ellipsoid(points, *BASAL_CISTERN)


def _cortex_depth(rng: Rng, points: np.ndarray, surface: np.ndarray) -> np.ndarray:
    """Depth in mm below the folded surface of the cerebrum; negative in the fluid of sulci and fissures."""
    x, y, z = np.abs(points[0]), points[1], points[2]
    # Projecting onto a shell makes sulci run inward; the zero sheets of the waves are evenly spaced, as gyri are.
    centre, radii = (column(part) for part in CEREBRUM)
    radius = np.maximum(norm((points - centre) / radii), 0.3)
    shell = (points - centre) / radius**0.8 + 3.0 * np.stack([random_waves(rng, points, 40.0, 8) for _ in range(3)])
    to_sheet = np.abs(random_waves(rng, shell, GYRAL_WAVELENGTH_MM, 32)) * GYRAL_WAVELENGTH_MM / (2 * np.pi)
    reach_mm = 19 + 6 * random_waves(rng, shell, 50.0)
    opening_mm = 0.5 + 0.5 * random_waves(rng, shell, 40.0) - 0.05 * surface
    below = np.maximum(-surface - reach_mm, 0)
    sulci = np.hypot(to_sheet, below) - np.clip(opening_mm, 0.1, 1.6)
    # The fissure between the hemispheres ends at the corpus callosum.
    callosum = np.hypot(y / 46, (z - 6) / 24)
    fissure = np.hypot(x, np.maximum(1 - callosum, 0) * 40) - 0.9
    # Sylvian fissure: a slanting cleft that opens onto the insula.
    y_out, bend = np.maximum(np.abs(y + 4) - 20, 0), 2.5 * random_waves(rng, points, 35.0)
    sylvian = np.sqrt((z + 3 + 0.4 * y + bend) ** 2 + np.maximum(38 - x, 0) ** 2 + y_out**2) - 0.7
    insula_x = 40 - 0.012 * (y + 4) ** 2 + bend
    insula = np.sqrt((x - insula_x) ** 2 + np.maximum(np.abs(z - 2) - 9, 0) ** 2 + y_out**2) - 0.9
    return np.minimum.reduce([-surface, sulci, fissure, sylvian, insula])


def draw_anatomy(
    rng: Rng, points: np.ndarray, parts: np.ndarray, pressure: np.ndarray, voxel_mm: float
) -> tuple[Layers, np.ndarray, np.ndarray]:
    """Return layers to paint over fluid, the depth below the cortex and the distance to the ventricles in mm."""
    cerebrum, cerebellum, brainstem, _ = parts
    x, y, z = points
    mirrored = np.stack([np.abs(x), y, z])
    cortex = _cortex_depth(rng, points, cerebrum) + 2 * pressure  # swelling closes sulci and ventricles
    folded = points * column([0.6, 1, 1.5]) + 2.0 * random_waves(rng, points, 30.0)
    folia = np.abs(random_waves(rng, folded, FOLIA_WAVELENGTH_MM)) * FOLIA_WAVELENGTH_MM / (2 * np.pi)
    folia = np.minimum(-cerebellum, np.maximum(folia - 0.25, -cerebellum - 16))
    depth = np.where(cerebellum < cerebrum, folia * 0.8, cortex)
    swelling = rng.uniform(0.8, 1.4)
    ventricles = np.minimum.reduce([_tube(mirrored, path, swelling) for path in LATERAL_VENTRICLE]) + 6 * pressure
    layers = [
        ("grey", cover(depth, voxel_mm)),
        ("white", cover(depth - GREY_THICKNESS_MM + 0.5 * random_waves(rng, points, 20.0), voxel_mm + 0.5)),
        *(("deep_grey", 0.9 * cover(-_ellipsoid(mirrored, *nucleus), voxel_mm + 1)) for nucleus in DEEP_NUCLEI),
        ("white", 0.9 * cover(-1 - brainstem, voxel_mm + 1)),
    ]
    # Bright in FLAIR without being tumour: caps on the horns of the ventricles, spots in deep white matter.
    caps = np.exp(-np.maximum(ventricles, 0) / 3.0) * np.clip(np.abs(y - 5) / 45, 0, 1) * rng.uniform(0.2, 0.8)
    spots = np.clip(random_waves(rng, points, 20.0, 24) - 2.3, 0, 0.4) * 2 * rng.uniform(0, 0.8) * (depth > 5)
    layers += [("gliosis", np.maximum(caps, spots) * (depth > 1))]
    for ellipsoid in MIDLINE_VENTRICLES:
        ventricles = np.minimum(ventricles, _ellipsoid(points, *ellipsoid))
    layers += [("csf", cover(-ventricles, voxel_mm))]
    # Contrast agent fills the sagittal sinus and the veins in some sulci.
    sinus = (np.abs(x) < 2.5) & (cerebrum > -6) & (z > -10) & (depth < 0)
    veins = np.clip(random_waves(rng, points, 14.0, 24) - 1.0, 0, 1) * cover(-depth, voxel_mm)
    layers += [("vessel", np.maximum(0.9 * sinus, veins))]
    return layers, depth, ventricles


def _shift_to_count(depth: np.ndarray, count: int) -> np.ndarray:
    """Shift `depth` so that `count` elements are positive, or all that are not `OUTSIDE` if they are fewer."""
    return depth - max(np.partition(depth, -count - 1)[-count - 1], np.float32(OUTSIDE / 2))


def draw_tumour(
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
