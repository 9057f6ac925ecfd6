"""Clean-up removes what its rules say, and is chosen by patients whose segmentations are known."""

import json

import numpy as np
import pytest
import torch
from common import BRATS_REGIONS

from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.clean_up import RULES, choose_clean_up, find_components
from sam2unet_hf.clean_up_sam2unet import CLEAN_UP_FILE, CleanUp, RegionRule


WT = {"WT": [1, 2, 3]}
ONE_MM = (1.0, 1.0, 1.0)


def cube(probabilities, start, size, value=0.9):
    """Set a cube of voxels to a probability."""
    probabilities[tuple(slice(at, at + size) for at in start)] = value


def label_map(masks, regions):
    processor = Sam2UNetImageProcessor(regions=regions)
    return processor.regions_to_label_map(torch.from_numpy(masks.astype(np.float32))).numpy()


@pytest.mark.parametrize("regions", [BRATS_REGIONS, {"a": [1], "b": [2], "c": [3]}], ids=["nested", "disjoint"])
def test_without_rules_a_region_is_what_is_above_one_half(regions):
    probabilities = np.random.default_rng(0).random((3, 5, 6, 7), dtype=np.float32)
    masks = CleanUp({}).apply(probabilities, regions, ONE_MM)
    assert np.array_equal(masks, probabilities > 0.5)


def test_components_smaller_than_the_rule_are_removed_by_their_size_in_ml():
    probabilities = np.zeros((1, 20, 20, 20), np.float32)
    cube(probabilities[0], (1, 1, 1), 4)  # 64 voxels
    cube(probabilities[0], (5, 5, 5), 2)  # touches it at a corner: 72 in all
    cube(probabilities[0], (12, 12, 12), 4)  # 64 alone
    cube(probabilities[0], (12, 2, 12), 3, 0.4)  # below the threshold
    for spacing_mm, min_ml, expected in [
        (ONE_MM, 0.0, 136),
        (ONE_MM, 0.064, 136),
        (ONE_MM, 0.065, 72),
        (ONE_MM, 0.073, 0),
        ((1.0, 1.0, 2.0), 0.13, 72),
    ]:
        rules = CleanUp({"WT": RegionRule(min_component_ml=min_ml)})
        assert rules.apply(probabilities, WT, spacing_mm).sum() == expected
    lower = CleanUp({"WT": RegionRule(threshold=0.3)}).apply(probabilities, WT, ONE_MM)
    assert lower.sum() == 136 + 27


def test_enhancing_tumour_that_is_too_small_stays_core():
    probabilities = np.zeros((3, 20, 20, 20), np.float32)
    for channel, size in enumerate((12, 8, 3)):
        cube(probabilities[channel], (2, 2, 2), size)
    kept = CleanUp({"ET": RegionRule(min_region_ml=0.027)}).apply(probabilities, BRATS_REGIONS, ONE_MM)
    assert np.array_equal(np.unique(label_map(kept, BRATS_REGIONS)), [0, 1, 2, 3])
    gone = CleanUp({"ET": RegionRule(min_region_ml=0.028)}).apply(probabilities, BRATS_REGIONS, ONE_MM)
    found = label_map(gone, BRATS_REGIONS)
    assert np.array_equal(np.unique(found), [0, 1, 2])
    assert np.count_nonzero(found == 1) == 8**3


def test_what_is_removed_of_a_region_is_removed_of_those_inside_it():
    probabilities = np.zeros((3, 20, 20, 20), np.float32)
    for channel, size in enumerate((9, 5, 3)):
        cube(probabilities[channel], (1, 1, 1), size)
        cube(probabilities[channel], (14, 14, 14), 2)  # a false spot of all three
    masks = CleanUp({"WT": RegionRule(min_component_ml=0.01)}).apply(probabilities, BRATS_REGIONS, ONE_MM)
    assert [int(mask.sum()) for mask in masks] == [9**3, 5**3, 3**3]


@pytest.mark.parametrize("seed", range(4))
def test_dice_of_components_is_that_of_the_masks_that_are_kept(seed):
    generator = np.random.default_rng(seed)
    coarse = generator.random((6, 6, 6), dtype=np.float32)
    probabilities = np.kron(coarse, np.ones((3, 3, 3), np.float32))  # blobs of 27 voxels and more
    reference = np.kron(generator.random((6, 6, 6)) > (0.7, 0.9, 0.99, 1.1)[seed], np.ones((3, 3, 3))).astype(bool)
    spacing_mm = (1.0, 2.0, 1.5)
    found = find_components(probabilities, reference, 3 / 1000)
    for rule in RULES[:: 7 if seed else 1]:
        (mask,) = CleanUp({"WT": rule}).apply(probabilities[None], WT, spacing_mm)
        total = mask.sum() + reference.sum()
        expected = 2 * (mask & reference).sum() / total if total else 1.0
        assert found.dice(rule) == pytest.approx(expected, abs=1e-12), rule


def make_patient(seed, spots):
    """Make a patient whose tumour is found well, beside false spots of 27 voxels."""
    generator = np.random.default_rng(seed)
    probabilities = np.zeros((40, 40, 40), np.float32)
    reference = np.zeros((40, 40, 40), bool)
    size = int(generator.integers(8, 14))
    reference[20 : 20 + size, 20 : 20 + size, 20 : 20 + size] = True
    probabilities[reference] = 0.9
    for number in range(spots):
        cube(probabilities, (2 + 5 * number, 2, 2), 3, 0.8)
    return {"WT": find_components(probabilities, reference, 1 / 1000)}


def test_choice_removes_false_spots_and_gains_on_patients_of_other_folds():
    patients = {f"p{seed}": make_patient(seed, spots=4) for seed in range(6)}
    chosen = choose_clean_up(patients, [["p0", "p3"], ["p1", "p4"], ["p2", "p5"]])
    assert chosen.rules == {"WT": RegionRule(min_component_ml=0.05)}  # the mildest that removes 0.027 ml
    gain = chosen.record["patients_of_other_folds"]["WT"]
    assert gain["dice_before"] == pytest.approx(
        np.mean([found["WT"].dice(RegionRule()) for found in patients.values()])
    )
    assert gain["dice_before"] < 0.97
    assert gain["dice_after"] == 1


def test_gain_is_that_of_rules_chosen_without_the_fold():
    # Spots are false in the first fold and true in the second, so that what helps one harms the other.
    patients = {"p0": make_patient(0, spots=4)}
    probabilities = np.zeros((40, 40, 40), np.float32)
    cube(probabilities, (2, 2, 2), 3)
    patients["p1"] = {"WT": find_components(probabilities, probabilities > 0.5, 1 / 1000)}
    gain = choose_clean_up(patients, [["p0"], ["p1"]]).record["patients_of_other_folds"]["WT"]
    before = [found["WT"].dice(RegionRule()) for found in patients.values()]
    assert gain["dice_before"] == pytest.approx(np.mean(before))
    assert gain["dice_after"] == pytest.approx((before[0] + 0) / 2)  # p0 by plain rules, p1 by p0's


def test_rules_without_gain_are_the_plain_ones():
    patients = {f"p{seed}": make_patient(seed, spots=0) for seed in range(4)}
    assert choose_clean_up(patients, [["p0", "p1"], ["p2", "p3"]]).rules == {"WT": RegionRule()}


def test_folds_that_are_no_folds_are_refused():
    patients = {f"p{seed}": make_patient(seed, spots=0) for seed in range(3)}
    for folds in ([["p0", "p1", "p2"]], [["p0"], ["p1"]], [["p0", "p1"], ["p1", "p2"]]):
        with pytest.raises(ValueError, match="`folds` must be two or more"):
            choose_clean_up(patients, folds)


def test_file_is_read_back(tmp_path):
    rules = {"WT": RegionRule(0.45, 0.2, 0.0), "ET": RegionRule(min_region_ml=0.1)}
    path = CleanUp(rules, {"chosen_on": "9 patients"}).save(tmp_path)
    assert path == tmp_path / CLEAN_UP_FILE
    again = CleanUp.load(path)
    assert (again.rules, again.record) == (rules, {"chosen_on": "9 patients"})
    path.write_text(json.dumps({"regions": {"WT": {"threshold": 0.4}}}))
    assert CleanUp.load(path).rules == {"WT": RegionRule(threshold=0.4)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting"),
        ("[]", "must hold"),
        ("{}", "regions"),
        ('{"regions": {"WT": {"treshold": 0.4}}}', "treshold"),
        ('{"regions": {"WT": {"threshold": 1.5}}}', "in \\[0, 1\\], got 1.5"),
        ('{"regions": {"WT": {"min_component_ml": -1}}}', "from 0 up, got -1"),
        ('{"regions": {"WT": {"min_region_ml": "small"}}}', "from 0 up, got 'small'"),
    ],
)
def test_damaged_files_are_named(tmp_path, text, message):
    path = tmp_path / CLEAN_UP_FILE
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        CleanUp.load(path)
    assert str(path) in str(caught.value)


def test_rules_for_other_regions_are_refused():
    with pytest.raises(ValueError, match=r"rules for \['TC'\], the model segments \['WT'\]"):
        CleanUp({"TC": RegionRule()}).apply(np.zeros((1, 3, 3, 3), np.float32), WT, ONE_MM)
    with pytest.raises(ValueError, match="1 channels, got shape"):
        CleanUp({}).apply(np.zeros((2, 3, 3, 3), np.float32), WT, ONE_MM)
