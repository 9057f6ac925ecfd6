"""The metrics of lesions against the official code of BraTS 2026, against panoptica, and by hand."""

import collections
import csv
import math

import numpy as np
import pytest
from common import FIXTURES
from lesion_volumes import NUM_VOLUMES, REGIONS, SMALLEST_MM3, checksum, make_volumes
from scipy import ndimage

from sam2unet_hf.metrics import LesionDice, LesionReport, score_lesions
from sam2unet_hf.metrics.lesion_functional import (
    LESION_METRICS,
    PAIR_METRICS,
    TOLERANCES_MM,
    average_lesions,
    compare_lesions,
    compare_surfaces,
)
from sam2unet_hf.metrics.volume_functional import ONE_EMPTY_MM, count_voxels, dice, surface_distances


LONE_MM = 373  # of a lesion without partner in the official code


@pytest.fixture(scope="module")
def official():
    """Seed and region -> the numbers of the official code; those that are not defined are left out."""
    with open(FIXTURES / "brats_2026.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == NUM_VOLUMES * len(REGIONS)
    return {
        (int(row["seed"]), row["region"]): {
            name: float(text) for name, text in row.items() if text and name != "region"
        }
        for row in rows
    }


def score_as_official(prediction, reference, spacing_mm):
    """Score two masks with lengths in another order than axes, under the names of the official code.

    Whole regions it takes in voxels. It reads lengths in the order x, y, z but axes in the order z, y, x, which makes
    no difference to the volumes of BraTS; and lengths in headers are of 32 bits.
    """
    turned_mm = np.float32(spacing_mm[::-1])
    lesions = compare_lesions(prediction, reference, turned_mm, [*TOLERANCES_MM, turned_mm.min()])
    whole = compare_surfaces(prediction, reference, one_empty_mm=LONE_MM)
    averages = average_lesions(lesions, LONE_MM, 0)
    of_large = average_lesions(lesions, LONE_MM, SMALLEST_MM3)
    found = {"tp": len(lesions.pairs), "fp": lesions.spurious, "fn": len(lesions.missed_mm3)}
    found |= {"f1": averages["lesion_f1"], "dsc": dice(count_voxels(prediction, reference))}
    found |= {"hd95": whole["hausdorff95_pooled_mm"], "nsd": whole["nsd_0.5mm"]}
    for ours, theirs in (("dice", "dsc"), ("hausdorff95_pooled_mm", "hd95"), ("nsd_1mm", "nsd")):
        # The official code takes the shortest side of a voxel for tolerance.
        if theirs == "nsd" and turned_mm.min() != 1:
            shares = [pair[f"nsd_{turned_mm.min():g}mm"] for pair in lesions.pairs]
            found["matched_nsd"] = sum(shares) / max(len(shares), 1)
            continue
        found[f"matched_{theirs}"] = averages[f"matched_lesion_{ours}"]
        found[f"every_{theirs}"], found[f"large_{theirs}"] = averages[f"lesion_{ours}"], of_large[f"lesion_{ours}"]
    return found, lesions


@pytest.fixture(scope="module")
def ours():
    """Seed and region -> our numbers under the names of the official code, and of panoptica."""
    found = {}
    for seed in range(NUM_VOLUMES):
        prediction, reference, spacing_mm = make_volumes(seed)
        for region, label_ids in REGIONS.items():
            masks = np.isin(prediction, label_ids), np.isin(reference, label_ids)
            scores, lesions = score_as_official(*masks, spacing_mm)
            if max(spacing_mm) != 1:
                lesions = compare_lesions(*masks, spacing_mm)
            averages = average_lesions(lesions, LONE_MM, 0)
            for tolerance in ("0.5", "1"):
                scores[f"panoptica_lesion_nsd_{tolerance}"] = averages[f"matched_lesion_nsd_{tolerance}mm"]
            scores["panoptica_lesion_dsc"] = averages["matched_lesion_dice"]
            scores["panoptica_lesion_hd95"] = averages["matched_lesion_hausdorff95_pooled_mm"]
            whole = compare_surfaces(*masks, spacing_mm)
            scores["panoptica_hd95"] = whole["hausdorff95_pooled_mm"]
            scores |= {f"panoptica_nsd_{tolerance}": whole[f"nsd_{tolerance}mm"] for tolerance in ("0.5", "1")}
            found[seed, region] = {"seed": seed, "checksum": checksum(prediction, reference), **scores}
    return found


def test_the_volumes_of_the_official_numbers_have_0_to_8_lesions_and_empty_ones(official):
    for region in REGIONS:
        rows = [row for (_, name), row in official.items() if name == region]
        assert set(range(9)) <= {row["tp"] + row["fn"] for row in rows}
        assert {(row["tp"] > 0, row["fp"] > 0, row["fn"] > 0) for row in rows} >= {
            (False, False, False),
            (False, False, True),
            (False, True, False),
            (True, True, True),
        }
    assert sum(row["tp"] for row in official.values()) > 1000


def test_equal_to_the_official_code_of_brats_2026_and_to_panoptica(official, ours):
    compared = collections.Counter()
    for key, expected in official.items():
        assert expected["checksum"] == ours[key]["checksum"], "other volumes than those that the official code scored"
        found = dict(ours[key])
        if expected.get("matched_hd95") == math.inf:  # as it is where lesions make no pair
            assert found["matched_hd95"] == LONE_MM
            del found["matched_hd95"]
        # Values that the official code does not define, such as those of two empty masks, are tested below.
        wanted = {name: expected[name] for name in found if name in expected}
        assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-6, rel=0), key
        compared.update(wanted.keys())
    assert compared.keys() == next(iter(ours.values())).keys()
    assert min(compared.values()) > 250


def test_scores_of_regions_are_those_of_their_masks():
    for seed in (3, 10, 24, 70, 131):
        prediction, reference, spacing_mm = make_volumes(seed)
        options = {"regions": REGIONS, "spacing": spacing_mm, "one_empty_mm": LONE_MM}
        scores = score_lesions(prediction, reference, **options)
        of_large = score_lesions(prediction, reference, min_lesion_mm3=SMALLEST_MM3, **options)
        for region, label_ids in REGIONS.items():
            masks = np.isin(prediction, label_ids), np.isin(reference, label_ids)
            lesions = compare_lesions(*masks, spacing_mm)
            whole = compare_surfaces(*masks, spacing_mm, LONE_MM)
            assert scores[region] == pytest.approx(whole | average_lesions(lesions, LONE_MM, 0), rel=1e-12)
            assert of_large[region] == pytest.approx(
                whole | average_lesions(lesions, LONE_MM, SMALLEST_MM3), rel=1e-12
            )


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.7, 1.3, 2.5), (3.0, 0.9375, 0.9375)])
def test_distances_of_surfaces_are_those_of_a_distance_transform(spacing):
    generator = np.random.default_rng(int(10 * spacing[0]))
    spacing_mm = np.array(spacing, dtype=float)
    for share in (0.02, 0.3, 0.9):
        masks = [generator.random((17, 13, 19)) < share for _ in range(2)]
        masks[0][:, :, 9:] = False  # so that some are far from the other
        surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in masks]
        maps = [ndimage.distance_transform_edt(~surface, sampling=spacing_mm) for surface in surfaces]
        found = surface_distances(*masks, spacing_mm)
        assert found[0].max() == 0 or found[1].max() > 3 * spacing_mm.max()
        np.testing.assert_allclose(np.sort(found[0]), np.sort(maps[1][surfaces[0]]), rtol=1e-12)
        np.testing.assert_allclose(np.sort(found[1]), np.sort(maps[0][surfaces[1]]), rtol=1e-12)


def row(*values):
    return np.array(values, dtype=np.uint8).reshape(1, 1, -1)


def score_row(prediction, reference, **options):
    return score_lesions(row(*prediction), row(*reference), regions={"lesion": [1]}, **options)["lesion"]


def test_lesions_without_partner_count_for_one_mean_and_not_for_the_other():
    # Of three lesions of the reference one is found by half, one is missed, and one is found; one more is spurious.
    scores = score_row([1, 0, 0, 0, 0, 1, 0, 1, 0], [1, 1, 0, 1, 0, 1, 0, 0, 0], one_empty_mm=100)
    assert scores["lesion_f1"] == 2 * 2 / (3 + 3)
    assert scores["matched_lesion_dice"] == pytest.approx((2 / 3 + 1) / 2)
    assert scores["lesion_dice"] == pytest.approx((2 / 3 + 1) / 4)
    # The pooled distances of the first pair are 0, 0 and 1.
    assert scores["matched_lesion_hausdorff95_pooled_mm"] == pytest.approx(0.9 / 2)
    assert scores["lesion_hausdorff95_pooled_mm"] == pytest.approx((0.9 + 200) / 4)
    assert scores["matched_lesion_nsd_0.5mm"] == pytest.approx((0.75 + 1) / 2)
    assert scores["lesion_nsd_0.5mm"] == pytest.approx((0.75 + 1) / 4)
    assert (scores["matched_lesion_nsd_1mm"], scores["lesion_nsd_1mm"]) == (1, 0.5)


def test_small_lesions_of_the_reference_may_be_left_out():
    volumes = [1, 1, 0, 1, 0, 0], [1, 1, 0, 0, 0, 1]
    assert score_row(*volumes, min_lesion_mm3=np.int64(2))["lesion_dice"] == 1 / 2  # but not the spurious one
    assert score_row(*volumes, min_lesion_mm3=2)["lesion_f1"] == score_row(*volumes)["lesion_f1"] == 1 / 2
    assert score_row(*volumes)["lesion_dice"] == 1 / 3
    assert score_row(*volumes, min_lesion_mm3=2, spacing=(1, 1, 0.5))["lesion_dice"] == 0
    assert score_row([1, 0], [1, 0], min_lesion_mm3=2)["lesion_dice"] == 1
    assert score_row([0, 0], [1, 0], min_lesion_mm3=2)["lesion_hausdorff95_pooled_mm"] == 0


def test_modules_take_the_smallest_lesion_as_an_option():
    pair = {"predictions": [row(1, 1, 0, 1, 0, 0)], "references": [row(1, 1, 0, 0, 0, 1)]}
    options = {"regions": {"lesion": [1]}, "min_lesion_mm3": 2}
    for module in (LesionDice, LesionReport):
        assert module(**options).compute(**pair)["lesion_dice"] == 1 / 2
        assert module().compute(**pair, **options)["lesion_dice"] == 1 / 2


def test_voxels_that_touch_at_a_corner_are_one_lesion():
    reference = np.zeros((4, 4, 4), dtype=bool)
    reference[0, 0, 0] = reference[1, 1, 1] = reference[3, 1, 1] = True
    lesions = compare_lesions(np.zeros_like(reference), reference, (1, 2, 3))
    assert sorted(lesions.missed_mm3) == [6, 12]
    assert (lesions.pairs, lesions.pairs_mm3, lesions.spurious) == ([], [], 0)


def test_lesions_are_paired_one_to_one_so_that_the_sum_of_dice_is_largest():
    # The first lesion of the prediction meets both of the reference, best the first, and the second meets the second.
    reference = np.zeros((3, 1, 12), dtype=bool)
    prediction = reference.copy()
    reference[0, 0, 0:4] = reference[2, 0, 0:9] = True
    prediction[:, 0, 0:3] = True
    prediction[2, 0, 4:9] = True
    lesions = compare_lesions(prediction, reference)
    assert [pair["dice"] for pair in lesions.pairs] == pytest.approx([2 * 3 / (4 + 9), 2 * 5 / (9 + 5)])
    assert (lesions.pairs_mm3, lesions.missed_mm3, lesions.spurious) == ([4, 9], [], 0)


def test_masks_without_a_common_voxel_count_as_if_one_were_empty():
    one, next_to_it, none = row(1, 0, 0), row(0, 1, 1), row(0, 0, 0)
    for pair in ((one, next_to_it), (one, none), (none, one)):
        assert compare_surfaces(*pair) == {"hausdorff95_pooled_mm": ONE_EMPTY_MM, "nsd_0.5mm": 0, "nsd_1mm": 0}
    assert compare_surfaces(none, none, one_empty_mm=5) == {"hausdorff95_pooled_mm": 0, "nsd_0.5mm": 1, "nsd_1mm": 1}
    best = score_lesions(none, none, regions={"lesion": [1]})["lesion"]
    assert best == {name: float("hausdorff" not in name) for name in LESION_METRICS}
    worst = score_lesions(one, next_to_it, regions={"lesion": [1]})["lesion"]
    assert worst == {name: ONE_EMPTY_MM if "hausdorff" in name else 0 for name in LESION_METRICS}


def test_distances_of_as_much_as_the_tolerance_are_within_it():
    # 0.1 mm ten times, and a voxel of 1 mm in a header of 32 bits.
    for step, voxels in ((0.1, 10), (1 + 1e-7, 1)):
        masks = np.zeros((2, 1, 1, 14), dtype=bool)
        masks[0, 0, 0, 0] = masks[:, 0, 0, voxels] = True
        assert compare_surfaces(*masks, (1, 1, step), tolerances_mm=[1, 0.9]) == {
            "hausdorff95_pooled_mm": pytest.approx(0.9 * voxels * step),
            "nsd_1mm": 1,
            "nsd_0.9mm": 0.75,
        }


def test_metrics_are_computed_alone_and_only_if_asked_for(monkeypatch):
    prediction, reference, spacing_mm = make_volumes(5)
    scores = score_lesions(prediction, reference, spacing=spacing_mm)
    assert list(scores["WT"]) == list(LESION_METRICS)
    for metric in LESION_METRICS:
        alone = score_lesions(prediction, reference, [metric], spacing=spacing_mm)
        assert alone == {region: {metric: scores[region][metric]} for region in scores}
    monkeypatch.setattr("sam2unet_hf.metrics.lesion_functional.compare_lesions", None)
    assert score_lesions(prediction, reference, ["nsd_1mm"], spacing=spacing_mm).keys() == scores.keys()


@pytest.mark.parametrize("axes", [(1, 2, 0), (2, 0, 1), (0, 2, 1)])
def test_axes_and_margins_change_nothing(axes):
    prediction, reference, spacing_mm = make_volumes(3)
    turned, other = (np.pad(volume.transpose(axes), ((3, 0), (0, 9), (5, 5))) for volume in (prediction, reference))
    found = score_lesions(turned, other, spacing=np.array(spacing_mm)[list(axes)])
    for region, scores in score_lesions(prediction, reference, spacing=spacing_mm).items():
        assert found[region] == pytest.approx(scores, rel=1e-9)


def test_thousands_of_specks_take_little_time_and_memory():
    # A table of all pairs of lesions would take 800 MB.
    specks = np.zeros((80, 60, 60), dtype=bool)
    specks[::3, ::3, ::3] = True
    prediction, reference = specks, np.roll(specks, 1, axis=0)
    reference[0, 0, 0] = True
    lesions = compare_lesions(prediction, reference)
    assert len(lesions.missed_mm3) + len(lesions.pairs) + lesions.spurious > 10000
    assert [pair["dice"] for pair in lesions.pairs] == pytest.approx([2 * 1 / (1 + 2)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["volume_dice"]}, r"`metrics` must be among hausdorff95_pooled_mm, .*, got volume_dice"),
        ({"min_lesion_mm3": -1}, r"`min_lesion_mm3` must be a volume >= 0 in mm3, got -1\. Pass 27 for"),
        ({"min_lesion_mm3": math.nan}, r"`min_lesion_mm3` must be a volume >= 0 in mm3, got nan"),
        ({"min_lesion_mm3": math.inf}, r"`min_lesion_mm3` must be a volume >= 0 in mm3, got inf"),
        ({"min_lesion_mm3": "27"}, r"`min_lesion_mm3` must be a volume >= 0 in mm3, got '27'"),
        ({"spacing": (1, 1)}, r"`spacing` must be three lengths above 0.*got \(1, 1\)"),
        ({"one_empty_mm": -1}, r"`one_empty_mm` must be a length >= 0 in mm, got -1"),
        ({"regions": {}}, r"`regions` must map names to label ids"),
    ],
)
def test_wrong_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        score_lesions(row(1, 0), row(1, 0), **options)


def test_names_of_metrics():
    assert len(LESION_METRICS) == len(set(LESION_METRICS)) == 3 + 1 + 2 * len(PAIR_METRICS)
    with pytest.raises(ValueError, match=r"same shape, got \(1, 1, 1\) and \(1, 1, 2\)"):
        score_lesions(row(1), row(1, 0))
    with pytest.raises(ValueError, match=r"`reference` must be a mask of 0 and 1, got 3"):
        compare_lesions(row(1), row(3))
