"""Clean-up removes what its rules say, and is chosen by patients whose segmentations are known."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from common import BRATS_REGIONS, small_model
from scipy import ndimage

from dataset_scripts.phantom import write_phantom_cohort
from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.cases_sam2unet import find_cases
from sam2unet_hf.clean_up import RULES, best_rule, choose_clean_up, find_components, load_components, save_components
from sam2unet_hf.clean_up_sam2unet import CLEAN_UP_FILE, CleanUp, RegionRule
from sam2unet_hf.finetuning.provenance import start_run
from sam2unet_hf.model_card import clean_up_section
from sam2unet_hf.volume import Sam2UNetVolumePipeline, main
from sam2unet_hf.volume_sam2unet import make_label_map


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import error_analysis  # noqa: E402 - the scripts are no package
from case_view import segment_case  # noqa: E402


WT = {"WT": [1, 2, 3]}
ONE_MM = (1.0, 1.0, 1.0)


def cube(probabilities, start, size, value=0.9):
    """Set a cube of voxels to a probability."""
    probabilities[tuple(slice(at, at + size) for at in start)] = value


def label_map(masks, probabilities, regions):
    return make_label_map(probabilities, Sam2UNetImageProcessor(regions=regions), 0, masks)


@pytest.mark.parametrize("regions", [BRATS_REGIONS, {"a": [1], "b": [2], "c": [3]}], ids=["nested", "disjoint"])
def test_without_rules_a_region_is_what_is_above_one_half(regions):
    probabilities = np.random.default_rng(0).random((3, 5, 6, 7), dtype=np.float32)
    masks = CleanUp({}).apply(probabilities, regions, ONE_MM)
    expected = Sam2UNetImageProcessor(regions=regions).regions_to_label_map(torch.from_numpy(probabilities)).numpy()
    found = label_map(masks, probabilities, regions)
    assert np.array_equal(found, expected)
    if regions == BRATS_REGIONS:  # a mask is what the label map has of its region
        assert all(
            np.array_equal(mask, np.isin(found, ids)) for mask, ids in zip(masks, regions.values(), strict=True)
        )


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


def test_a_given_threshold_takes_the_place_of_all_others():
    probabilities = np.zeros((3, 20, 20, 20), np.float32)
    for channel, value in enumerate((0.9, 0.7, 0.3)):
        cube(probabilities[channel], (2, 2, 2), 4, value)
    rules = CleanUp({"WT": RegionRule(threshold=0.95), "ET": RegionRule(threshold=0.2, min_region_ml=0.05)})
    sizes = {
        threshold: [int(mask.sum()) for mask in rules.apply(probabilities, BRATS_REGIONS, ONE_MM, threshold)]
        for threshold in (None, 0.8, 0.25)
    }
    assert sizes == {None: [0, 0, 0], 0.8: [64, 0, 0], 0.25: [64, 64, 64]}
    with pytest.raises(ValueError, match="`threshold` must be a probability in \\[0, 1\\], got 2"):
        rules.apply(probabilities, BRATS_REGIONS, ONE_MM, 2)


def test_a_region_holds_those_inside_it():
    probabilities = np.zeros((3, 20, 20, 20), np.float32)
    cube(probabilities[1], (2, 2, 2), 6, 0.7)  # core whose whole tumour was not found
    cube(probabilities[2], (2, 2, 2), 3, 0.9)
    rules = {"ET": RegionRule(min_region_ml=0.1)}
    found = label_map(CleanUp(rules).apply(probabilities, BRATS_REGIONS, ONE_MM), probabilities, BRATS_REGIONS)
    assert np.count_nonzero(found == 1) == np.count_nonzero(found) == 6**3
    rules = {"TC": RegionRule(min_region_ml=1), "ET": RegionRule(threshold=0.2)}
    found = label_map(CleanUp(rules).apply(probabilities, BRATS_REGIONS, ONE_MM), probabilities, BRATS_REGIONS)
    assert np.count_nonzero(found == 2) == np.count_nonzero(found) == 6**3
    # Core lies within what is kept of the whole tumour, though it is found at a lower probability.
    cube(probabilities[0], (2, 2, 2), 5, 0.8)
    rules = {"WT": RegionRule(threshold=0.75), "TC": RegionRule(threshold=0.4)}
    found = label_map(CleanUp(rules).apply(probabilities, BRATS_REGIONS, ONE_MM), probabilities, BRATS_REGIONS)
    assert np.count_nonzero(found) == 5**3


def test_enhancing_tumour_that_is_too_small_stays_core():
    probabilities = np.zeros((3, 20, 20, 20), np.float32)
    for channel, size in enumerate((12, 8, 3)):
        cube(probabilities[channel], (2, 2, 2), size)
    kept = CleanUp({"ET": RegionRule(min_region_ml=0.027)}).apply(probabilities, BRATS_REGIONS, ONE_MM)
    assert np.array_equal(np.unique(label_map(kept, probabilities, BRATS_REGIONS)), [0, 1, 2, 3])
    gone = CleanUp({"ET": RegionRule(min_region_ml=0.028)}).apply(probabilities, BRATS_REGIONS, ONE_MM)
    found = label_map(gone, probabilities, BRATS_REGIONS)
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
    found = find_components(probabilities[None], reference.astype(np.uint8), WT, spacing_mm)["WT"]
    for rule in RULES[::11]:  # every value of each part of a rule
        (mask,) = CleanUp({"WT": rule}).apply(probabilities[None], WT, spacing_mm)
        total = mask.sum() + reference.sum()
        expected = 2 * (mask & reference).sum() / total if total else 1.0
        parts, number = ndimage.label(mask, np.ones((3, 3, 3)))
        right = np.unique(parts[reference & mask])
        assert found.judge(rule) == (pytest.approx(expected, abs=1e-12), number - right.size), rule


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
    return find_components(probabilities[None], reference.astype(np.uint8), WT, ONE_MM)


def test_choice_removes_false_spots_and_gains_on_patients_of_other_folds():
    patients = {f"p{seed}": make_patient(seed, spots=4) for seed in range(6)}
    chosen = choose_clean_up(patients, [["p0", "p3"], ["p1", "p4"], ["p2", "p5"]])
    assert chosen.rules == {"WT": RegionRule(min_component_ml=0.05)}  # the mildest that removes 0.027 ml
    gain = chosen.record["patients_of_other_folds"]["WT"]
    assert gain["dice_before"] == pytest.approx(
        np.mean([found["WT"].judge(RegionRule()).dice for found in patients.values()])
    )
    assert gain["dice_before"] < 0.97
    assert gain["dice_after"] == 1
    assert (gain["false_components_before"], gain["false_components_after"]) == (4, 0)


def test_the_plainest_of_the_rules_that_the_best_does_not_clearly_surpass():
    # Three rules, the plainest first. The last is best: clearly better than the first, by chance than the second.
    scores = np.array([[0.50, 0.72, 0.70], [0.52, 0.66, 0.73], [0.48, 0.69, 0.68], [0.51, 0.71, 0.72]])
    assert scores.mean(axis=0).argmax() == 2
    assert best_rule(list(scores)) == 1
    assert best_rule(list(scores + [0, 0, 0.1])) == 2
    assert best_rule(list(scores[:, [0, 0, 0]])) == 0
    assert best_rule([scores[0]]) == 1  # a single patient has no error


def test_gain_is_that_of_rules_chosen_without_the_fold():
    # Spots are false in the first fold and true in the second, so that what helps one harms the other.
    patients = {"p0": make_patient(0, spots=4)}
    probabilities = np.zeros((40, 40, 40), np.float32)
    cube(probabilities, (2, 2, 2), 3)
    patients["p1"] = find_components(probabilities[None], (probabilities > 0.5).astype(np.uint8), WT, ONE_MM)
    chosen = choose_clean_up(patients, [["p0"], ["p1"]])
    gain = chosen.record["patients_of_other_folds"]["WT"]
    before = [found["WT"].judge(RegionRule()).dice for found in patients.values()]
    assert gain["dice_before"] == pytest.approx(np.mean(before))
    assert gain["dice_after"] == pytest.approx((before[0] + 0) / 2)  # p0 by plain rules, p1 by p0's
    assert chosen.rules == {"WT": RegionRule()}


def test_rules_without_gain_are_the_plain_ones():
    patients = {f"p{seed}": make_patient(seed, spots=0) for seed in range(4)}
    assert choose_clean_up(patients, [["p0", "p1"], ["p2", "p3"]]).rules == {"WT": RegionRule()}


def test_folds_that_are_no_folds_are_refused():
    patients = {f"p{seed}": make_patient(seed, spots=0) for seed in range(3)}
    for folds in ([["p0", "p1", "p2"]], [["p0"], ["p1"]], [["p0", "p1"], ["p1", "p2"]], [["p0", "p1", "p2"], []]):
        with pytest.raises(ValueError, match="`folds` must be two or more"):
            choose_clean_up(patients, folds)


def test_file_is_read_back(tmp_path):
    rules = {"WT": RegionRule(0.45, 0.2, 0.0), "ET": RegionRule(min_region_ml=0.1)}
    path = CleanUp(rules, {"chosen_on": "9 patients"}).save(tmp_path)
    assert path == tmp_path / CLEAN_UP_FILE
    again = CleanUp.load(path)
    assert (again.rules, again.record) == (rules, {"chosen_on": "9 patients"})
    older = {"WT": {"dice_before": 0.8, "dice_after": 0.9}}  # from before false components were counted
    path.write_text(json.dumps({"regions": {"WT": {"threshold": 0.4}}, "patients_of_other_folds": older}))
    (row,) = clean_up_section(path, BRATS_REGIONS)["rows"]
    assert row == ["WT", "0.4", "0", "0", "0.800", "", "0.900", ""]
    assert CleanUp.load(path, BRATS_REGIONS).rules == {"WT": RegionRule(threshold=0.4)}
    with pytest.raises(ValueError, match=r"clean_up.json` has rules for \['WT'\], the model segments \['a'\]"):
        CleanUp.load(path, {"a": [1]})


def test_components_are_read_back(tmp_path):
    components = make_patient(0, spots=2)
    save_components(tmp_path / "p0.json", components)
    assert [path.name for path in tmp_path.iterdir()] == ["p0.json"]
    again = load_components(tmp_path / "p0.json")
    assert again.keys() == components.keys()
    assert all(again["WT"].judge(rule) == components["WT"].judge(rule) for rule in RULES)


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
        ('{"regions": {}, "patients_of_other_folds": {"WT": {"dice_before": 0.4}}}', "dice_after"),
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


# In the pipeline


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    cohort = write_phantom_cohort(tmp_path_factory.mktemp("clean_up") / "brats", num_patients=1, shape=(40, 40, 26))
    return find_cases(cohort)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with rules beside it that change what it finds."""
    folder = tmp_path_factory.mktemp("model")
    small_model(regions=BRATS_REGIONS).save_pretrained(folder)
    processor = Sam2UNetImageProcessor(regions=BRATS_REGIONS, size={"height": 64, "width": 64}, modalities=["flair"])
    processor.save_pretrained(folder)
    CleanUp(MANY_RULES).save(folder)
    return folder


MANY_RULES = {
    "WT": RegionRule(threshold=0.45, min_component_ml=2),
    "TC": RegionRule(min_component_ml=1),
    "ET": RegionRule(threshold=0.6, min_region_ml=1),
}


@pytest.fixture(scope="module")
def found(folder, case):
    """The segmentation without clean-up, with its probabilities."""
    segment = Sam2UNetVolumePipeline.from_pretrained(folder, device="cpu")
    return segment(case, clean_up=False, return_probabilities=True, progress=False)


def expected_label_map(found, rules, threshold=None):
    """The label map that rules make of the probabilities of a segmentation."""
    masks = CleanUp(rules).apply(found.probabilities, found.regions, found.scan.spacing_mm, threshold)
    return label_map(masks, found.probabilities, found.regions)


def test_the_pipeline_applies_the_rules_beside_the_model(folder, case, found):
    segment = Sam2UNetVolumePipeline.from_pretrained(folder, device="cpu")
    assert segment.clean_up.rules == MANY_RULES
    cleaned = segment(case, return_probabilities=True, progress=False)
    assert np.array_equal(cleaned.probabilities, found.probabilities)
    assert np.array_equal(cleaned.label_map, expected_label_map(found, MANY_RULES))
    assert cleaned.label_map.any()
    assert not np.array_equal(cleaned.label_map, found.label_map)
    assert np.array_equal(found.label_map, expected_label_map(found, {}))
    given = segment(case, threshold=0.55, progress=False)
    assert np.array_equal(given.label_map, expected_label_map(found, MANY_RULES, 0.55))
    assert not np.array_equal(given.label_map, cleaned.label_map)
    plain = segment(case, threshold=0.55, clean_up=False, progress=False)
    assert np.array_equal(plain.label_map, expected_label_map(found, {}, 0.55))
    segment.clean_up = None
    assert np.array_equal(segment(case, progress=False).label_map, found.label_map)


def test_an_ensemble_has_the_rules_beside_its_list_of_members(folder, case, found, tmp_path):
    shutil.copytree(folder, tmp_path / "fold_0")
    (tmp_path / "ensemble.json").write_text('{"members": ["fold_0"]}')
    segment = Sam2UNetVolumePipeline.from_pretrained(tmp_path, device="cpu")
    assert segment.clean_up is None  # that of the member is for this model alone
    rules = {"WT": RegionRule(threshold=0.6)}
    CleanUp(rules).save(tmp_path)
    cleaned = Sam2UNetVolumePipeline.from_pretrained(tmp_path, device="cpu")(case, progress=False)
    assert np.array_equal(cleaned.label_map, expected_label_map(found, rules))


def test_rules_for_regions_that_the_model_has_not_are_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    path = CleanUp({"cavity": RegionRule()}).save(copy)
    with pytest.raises(
        ValueError, match=rf"{path}` has rules for \['cavity'\], the model segments \['WT', 'TC', 'ET'\]"
    ):
        Sam2UNetVolumePipeline.from_pretrained(copy, device="cpu")
    parts = Sam2UNetVolumePipeline.from_pretrained(folder, device="cpu").ensemble
    with pytest.raises(ValueError, match="The clean-up has rules for"):
        Sam2UNetVolumePipeline(parts.models, parts.processors, clean_up=CleanUp.load(path))


def test_the_command_cleans_up_unless_told_otherwise(folder, case, found, tmp_path, caplog):
    def segment(*options):
        plain = ["--device", "cpu", "--dtype", "float32", "--et_label", "3"]
        main([str(folder), str(case.folder), "-o", str(tmp_path), *plain, *options])
        return np.asarray(nib.load(tmp_path / f"{case.case_id}_seg.nii.gz").dataobj)

    with caplog.at_level("INFO"):
        assert np.array_equal(segment(), expected_label_map(found, MANY_RULES))
    assert "Cleaning up WT by RegionRule(threshold=0.45, min_component_ml=2, min_region_ml=0.0), TC by" in caplog.text
    assert "--no_clean_up leaves this out" in caplog.text
    assert np.array_equal(segment("--threshold", "0.55"), expected_label_map(found, MANY_RULES, 0.55))
    caplog.clear()
    assert np.array_equal(segment("--no_clean_up"), found.label_map)
    assert "Cleaning up" not in caplog.text


def test_figures_and_page_show_what_is_cleaned_up(folder, case, found, tmp_path, monkeypatch):
    views = []
    monkeypatch.setattr(error_analysis, "draw_case", lambda view, *args: views.append(view))
    arguments = ["--model", str(folder), "--device", "cpu", "--output_dir", str(tmp_path)]
    error_analysis.main([*arguments, "--case", str(case.folder)])
    views.append(segment_case(Sam2UNetVolumePipeline.from_pretrained(folder, device="cpu"), case))  # as the page does
    for view in views:
        assert np.array_equal(view.segmentation.label_map, expected_label_map(found, MANY_RULES))


def test_training_into_its_folder_removes_the_rules_for_the_weights_before(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    args = SimpleNamespace(output_dir=str(copy), overwrite_output_dir=False, resume_from_checkpoint=None)
    start_run({"arguments": {}, "data": {}, "versions": {}, "git": {}}, args)
    assert not (copy / CLEAN_UP_FILE).exists()
    assert (copy / "config.json").exists()
