"""Lesions: their diameters against brute force, their volumes, removing some, and two time points."""

import csv
import itertools
import math

import nibabel as nib
import numpy as np
import pytest
from scan_files import make_segmentation, make_tumours
from scipy import ndimage
from scipy.spatial.distance import cdist

from sam2unet_hf.diameters import measure_diameters
from sam2unet_hf.lesions import measure_lesions, number_lesions, region_around, remove_lesions, save_lesions
from sam2unet_hf.scans_sam2unet import ScanError
from sam2unet_hf.time_points import match_lesions, sums_of_products


contourpy = pytest.importorskip("contourpy")
NUM_SHAPES = 300


def draw_shape(seed):
    """Draw a shape of up to 24 x 24 pixels or so, and the matrix that takes its places to mm."""
    rng = np.random.default_rng(seed)
    kind = seed % 6
    size = rng.integers(3, 21, 2)
    x, y = np.indices(size)
    if kind == 0:  # a blob, lumps and bays, in one piece or several
        noise = ndimage.gaussian_filter(rng.normal(size=size), rng.uniform(0.7, 4))
        pixels = noise > np.quantile(noise, rng.uniform(0.1, 0.9))
    elif kind == 1:  # an ellipse at any angle, with a hole as a rim that enhances has
        angle, (long, short) = rng.uniform(0, math.pi), np.sort(rng.uniform(1, 16, 2))
        u, v = x - size[0] / 2, y - size[1] / 2
        u, v = u * math.cos(angle) + v * math.sin(angle), v * math.cos(angle) - u * math.sin(angle)
        radius = np.hypot(u / long, v / short)
        pixels = (radius < 1) & (radius > rng.uniform(0, 0.9))
    elif kind == 2:  # a line
        pixels = np.abs((x - size[0] / 2) * rng.normal() + (y - size[1] / 2) * rng.normal()) < 0.5
    elif kind == 3:  # a wandering thread
        steps = rng.integers(-1, 2, (rng.integers(1, 60), 2)).cumsum(axis=0)
        pixels = np.zeros(np.ptp(steps, axis=0) + 1, bool)
        pixels[tuple((steps - steps.min(axis=0)).T)] = True
    elif kind == 4:  # a crescent
        pixels = (np.hypot(x - 12, y - 12) < 11) & (np.hypot(x - 12 - rng.uniform(0, 9), y - 12) > 9)
    else:  # one or two pixels, or a box
        pixels = np.zeros(size, bool)
        pixels[: rng.integers(1, 3) if seed % 4 else size[0], : rng.integers(1, 3)] = True
    pixels[0, 0] |= not pixels.any()
    to_mm = np.diag(rng.uniform(0.4, 2.5, 2) if seed % 3 else [1.0, 1.0])
    if seed % 5 == 4:
        to_mm[0, 1] = rng.uniform(-0.7, 0.7)  # axes that are not at right angles
    return pixels, to_mm


def brute_force(pixels, to_mm):
    """Try all pairs of points of the outline that another library draws, four on each piece of it."""
    lines = contourpy.contour_generator(z=np.pad(pixels, 1).astype(float)).lines(0.5)
    pieces = np.concatenate([np.stack([line[:-1], line[1:]], axis=1) for line in lines])[..., ::-1]  # (x, y) -> (y, x)
    pieces = pieces @ to_mm.T
    shares = np.linspace(0, 1, 4)[:, None, None]
    points = (pieces[:, 0] + shares * (pieces[:, 1] - pieces[:, 0])).reshape(-1, 2)
    lengths = cdist(points, points)
    longest, perpendicular = lengths.max(), 0.0
    tolerance_mm = np.linalg.norm(pieces[:, 1] - pieces[:, 0], axis=1).max() / 6  # half a step
    for first, second in np.argwhere(np.triu(lengths) > longest * (1 - 1e-6)):
        along = points @ (points[first] - points[second]) / longest
        is_across = np.abs(along[:, None] - along) <= tolerance_mm
        perpendicular = max(perpendicular, lengths[is_across].max())
    return longest, perpendicular


def test_diameters_are_those_that_trying_all_pairs_finds():
    errors = []
    for seed in range(NUM_SHAPES):
        pixels, to_mm = draw_shape(seed)
        found = measure_diameters(pixels[:, :, None], to_mm)
        expected = brute_force(pixels, to_mm)
        assert found.diameter_mm == pytest.approx(expected[0], rel=1e-6), seed
        errors.append(abs(found.perpendicular_mm - expected[1]))
        # The ends are where the lengths are measured, at right angles.
        lines = [np.subtract(*ends) @ to_mm.T for ends in (found.diameter, found.perpendicular)]
        np.testing.assert_allclose(np.linalg.norm(lines, axis=1), found[:2], atol=1e-6)
        assert abs(lines[0] @ lines[1]) < 1e-6 * found.diameter_mm**2
    assert max(errors) < 1.0
    assert np.mean(errors) < 0.1


def test_diameters_run_from_edge_to_edge():
    def measure(pixels, to_mm):
        return pytest.approx(measure_diameters(pixels[:, :, None], np.diag(to_mm))[:2])

    assert measure(np.ones((1, 1), bool), (1, 1)) == (1, 1)
    assert measure(np.ones((1, 1), bool), (0.5, 2)) == (2, 0.5)
    assert measure(np.ones((10, 1), bool), (1, 1)) == (10, 1)
    assert measure(np.ones((1, 10), bool), (3, 0.9)) == (9, 3)
    for radius in (4.0, 9.5, 20.3):  # a disc
        x, y = np.indices((50, 50))
        disc = np.hypot(x - 24.6, y - 25.2) <= radius
        np.testing.assert_allclose(measure_diameters(disc[:, :, None], np.eye(2))[:2], 2 * radius, atol=1)


def test_the_slice_with_the_longest_diameter_counts():
    """Of equal ones that with the longest perpendicular diameter."""
    voxels = np.zeros((12, 12, 5), bool)
    voxels[2:5, 2:4, 0] = voxels[1:11, 5, 1] = voxels[1:11, 5, 3] = voxels[5, 5:8, 3] = voxels[4:8, 4:8, 4] = True
    found = measure_diameters(voxels, np.eye(2))
    assert (found.slice_index, *found[:2]) == pytest.approx((3, 10, 3))
    voxels[:, :, 3] = False
    assert measure_diameters(voxels, np.eye(2)).slice_index == 1


@pytest.fixture
def labels():
    return make_tumours()


def test_lesions_of_nested_regions_in_any_orientation(labels, tmp_path):
    spacing = (0.8, 1.1, 3.0)
    found = measure_lesions(make_segmentation(labels, tmp_path, spacing=spacing))
    assert [(lesion.key, lesion.inside) for lesion in found] == [
        *((("WT", 1), None), (("WT", 2), None), (("TC", 1), 1), (("TC", 2), 2)),
        *((("ET", 1), 1), (("ET", 2), 1), (("ET", 3), 2)),
    ]
    voxel_ml = math.prod(spacing) / 1000
    assert [round(lesion.volume_ml / voxel_ml) for lesion in found] == [20 * 12 * 7, 7, 14 * 7 * 5, 1, 6 * 4 * 3, 8, 1]
    assert found[4].slice_index == 4
    assert (found[-1].diameter_mm, found[-1].perpendicular_mm, found[-1].slice_index) == pytest.approx((1.1, 0.8, 6))
    assert found[-1].diameter == ((31.0, 21.5), (31.0, 22.5)) or found[-1].diameter == ((31.0, 22.5), (31.0, 21.5))
    assert [lesion.is_measurable for lesion in found] == [True, False, False, False, False, False, False]
    tilted = nib.eulerangles.euler2mat(0.2, -0.1, 0.3)
    for axes, rotation in itertools.product(("RAS", "SLP", "PIR"), (None, tilted)):
        other = measure_lesions(make_segmentation(labels, tmp_path, axes, spacing, rotation=rotation))
        assert [lesion.key for lesion in other] == [lesion.key for lesion in found]
        for mine, theirs in zip(found, other, strict=True):
            assert theirs.slice_index == mine.slice_index
            assert (theirs.volume_ml, theirs.diameter_mm, theirs.perpendicular_mm) == pytest.approx(
                (mine.volume_ml, mine.diameter_mm, mine.perpendicular_mm), rel=1e-5
            )
    assert measure_lesions(make_segmentation(np.zeros_like(labels), tmp_path)) == []
    save_lesions(found, tmp_path / "lesions.csv")
    rows = list(csv.DictReader((tmp_path / "lesions.csv").open()))
    assert rows[2] == {
        **{"region": "TC", "lesion": "1", "inside": "1", "axial_slice": str(found[2].slice_index)},
        "volume_ml": f"{found[2].volume_ml:.3f}",
        "diameter_mm": f"{found[2].diameter_mm:.3f}",
        "perpendicular_mm": f"{found[2].perpendicular_mm:.3f}",
        "product_mm2": f"{found[2].product_mm2:.3f}",
    }
    assert rows[0]["inside"] == ""


def test_what_is_left_of_removed_lesions(labels, tmp_path):
    found = make_segmentation(labels, tmp_path, "RAS")

    def remove(*keys):
        left = remove_lesions(found, keys)
        np.testing.assert_array_equal(found.scan.from_file_grid(found.label_map), labels)
        assert left.label_map.dtype == labels.dtype
        return found.scan.from_file_grid(left.label_map)

    numbers = number_lesions(found, "ET")
    np.testing.assert_array_equal(remove(("ET", 2)), np.where(numbers == 2, 1, labels))  # stays core
    core = number_lesions(found, "TC")
    np.testing.assert_array_equal(remove(("TC", 1)), np.where(core == 1, 2, labels))  # stays tumour
    np.testing.assert_array_equal(remove(("TC", 1), ("ET", 2)), np.where(core == 1, 2, labels))
    tumour = number_lesions(found, "WT")
    np.testing.assert_array_equal(remove(("ET", 1), ("WT", 1)), np.where(tumour == 1, 0, labels))
    assert not remove(("WT", 1), ("WT", 2)).any()
    np.testing.assert_array_equal(remove(), labels)
    with pytest.raises(ValueError, match=r"`keys` names TC \[3\], TC has 2 lesions. Take keys of `measure_lesions`"):
        remove(("TC", 3))
    with pytest.raises(ValueError, match=r"the regions \['X'\], the segmentation has \['WT', 'TC', 'ET'\]"):
        remove(("X", 1))
    with pytest.raises(ValueError, match=r"`region` must be one of \['WT', 'TC', 'ET'\], got 'X'"):
        number_lesions(found, "X")
    with pytest.raises(ValueError, match=r"`region` must be one of \['WT'\], got 'X'"):
        region_around({"WT": [1]}, "X")
    with pytest.raises(ValueError, match=r"`voxels` of shape \(2, 3, 4\) must hold a lesion"):
        measure_diameters(np.zeros((2, 3, 4), bool), np.eye(2))
    apart = make_segmentation(np.where(labels == 3, 7, 0).astype(np.uint8), tmp_path, regions={"A": [7], "B": [2]})
    assert not remove_lesions(apart, [("A", number) for number in (1, 2, 3)]).label_map.any()


def test_lesions_of_two_time_points_are_matched_by_overlap(tmp_path):
    earlier, later = np.zeros((2, 60, 40, 6), np.uint8)
    earlier[2:16, 2:16, 1:4] = 1  # shrinks below 10 mm
    later[4:10, 4:10, 1:4] = 1
    earlier[20:24, 2:6, 1] = earlier[20:24, 8:12, 1] = 1  # merge
    later[20:25, 3:12, 1] = 1
    earlier[30:40, 2:6, 1] = 1  # splits
    later[30:33, 2:6, 1] = later[36:40, 2:6, 1] = 1
    earlier[50:52, 20:22, 2] = 1  # gone
    later[20:32, 20:32, 2:5] = 1  # new
    found = [
        make_segmentation(labels, tmp_path, axes, regions={"WT": [1], "TC": [2]})
        for labels, axes in ((earlier, "LPS"), (later, "RAS"))
    ]
    lesions = [measure_lesions(one) for one in found]
    changes = match_lesions(*found, *lesions)
    numbers = [[[lesion.number for lesion in side] for side in (change.earlier, change.later)] for change in changes]
    assert [change.kind for change in changes] == ["matched", "new", "merged", "split", "gone"]
    assert numbers == [[[1], [2]], [[], [1]], [[3, 4], [3]], [[2], [4, 5]], [[5], []]]
    assert changes[0].volumes_ml == pytest.approx((14 * 14 * 3 / 1000, 6 * 6 * 3 / 1000))
    # The lesion that shrank still counts, the small ones do not.
    sizes = [sum(lesion.product_mm2 for lesion in side) for side in (changes[0].earlier, changes[0].later)]
    assert not changes[0].later[0].is_measurable
    assert sums_of_products(changes) == pytest.approx((sizes[0], sizes[1] + changes[1].later[0].product_mm2))


def test_time_points_in_other_spaces_are_refused(labels, tmp_path):
    (tmp_path / "other").mkdir()
    found = make_segmentation(labels, tmp_path)
    cropped = make_segmentation(labels[:-1], tmp_path / "other")
    with pytest.raises(ScanError, match=r"two time points are not in the same space.* shape .* Register the scans"):
        match_lesions(found, cropped, measure_lesions(found), measure_lesions(cropped))
    scaled = make_segmentation(labels, tmp_path / "other", spacing=(1.0, 1.0, 1.2))
    with pytest.raises(ScanError, match=r"not in the same space.* a corner lies 2.2 mm apart"):
        match_lesions(found, scaled, measure_lesions(found), measure_lesions(scaled))
    renamed = make_segmentation(labels, tmp_path / "other", regions={"WT": [1, 2, 3]})
    with pytest.raises(ValueError, match="Segment both with one model"):
        match_lesions(found, renamed, measure_lesions(found), measure_lesions(renamed))
