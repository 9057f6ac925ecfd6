"""Cross-validation: which patients a fold has, what all folds give together, and runs that are killed on the way."""

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path

import forks
import nibabel
import numpy as np
import pytest
from common import small_model
from datasets import DatasetDict, concatenate_datasets
from forks import run_two_processes
from PIL import Image
from safetensors.torch import load_file

from dataset_scripts.brats_slices import fold_patients, split_patients
from dataset_scripts.phantom import write_phantom_cohort
from sam2unet_hf import Sam2UNetImageProcessor, clean_up
from sam2unet_hf.cases_sam2unet import find_cases
from sam2unet_hf.clean_up import RULES, find_components, load_components
from sam2unet_hf.clean_up_sam2unet import CleanUp, RegionRule
from sam2unet_hf.finetuning import folds, run_segmentation
from sam2unet_hf.finetuning.arguments import DataArguments
from sam2unet_hf.finetuning.data_sources import load_data, load_folds
from sam2unet_hf.finetuning.parsing import parse_arguments
from sam2unet_hf.metrics.volume_functional import count_voxels
from sam2unet_hf.metrics.volume_functional import dice as volume_dice
from sam2unet_hf.patient_table import PatientTable
from sam2unet_hf.volume import Sam2UNetVolumePipeline
from sam2unet_hf.volume import main as segment_volumes


ROOT = Path(__file__).parent.parent


REGIONS = {"WT": [1, 2, 3], "ET": [3]}
PATIENTS = [f"Phantom_{number:03d}" for number in range(1, 6)]
# Two steps a fold, with a checkpoint after each; the averaged weights of the last are scored.
QUICK = ["--use_cpu", "--disable_tqdm", "true", "--per_device_train_batch_size", "4", "--per_device_eval_batch_size"]
QUICK += ["8", "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1", "--eval_strategy", "no"]


class Killed(BaseException):
    """Stands for a signal, which nothing catches."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model to start from, and the scans of five patients."""
    folder = tmp_path_factory.mktemp("folds")
    small_model(regions=REGIONS).save_pretrained(folder / "start")
    processor = Sam2UNetImageProcessor(
        regions=REGIONS, head_crop_size={"height": 64, "width": 64}, modalities=["flair"]
    )
    processor.save_pretrained(folder / "start")
    write_phantom_cohort(folder / "brats", num_patients=5, shape=(40, 40, 26))
    return folder


@pytest.fixture(scope="module")
def arguments(folder):
    recipe = ["--model_name_or_path", str(folder / "start"), "--ema_decay", "0.5", "--batch_norm_images", "4", *QUICK]
    return ["--brats_dir", str(folder / "brats"), "--foreground_share", "0.6", *recipe]


@pytest.fixture(scope="module")
def whole(folder, arguments):
    """A cross-validation that was never stopped, and what it returned."""
    results = run_segmentation.main([*arguments, "--folds", "3", "--output_dir", str(folder / "whole")])
    return folder / "whole", results


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Write empty pictures but for those of `whole`, which is made before: drawing takes as long as training."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **kwargs: Path(path).touch())


def read(path):
    return json.loads(path.read_text())


def outcome(folder):
    """What all folds give together, as it is stored."""
    names = ["folds.json", "patients.csv", "patients.json", "all_results.json", "ensemble.json", "clean_up.json"]
    names += [f"segmentations/{patient}.nii.gz" for patient in PATIENTS]
    return {name: (folder / name).read_bytes() for name in names}


def unfinished(whole, folder, trained):
    """Copy the folds that were trained."""
    for fold in trained:
        shutil.copytree(whole / f"fold_{fold}", folder / f"fold_{fold}")
        for patient in read(whole / "folds.json")[f"fold_{fold}"]:
            for name in (f"segmentations/{patient}.nii.gz", f"components/{patient}.json"):
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copy(whole / name, folder / name)
    return folder


# Which patients


def test_patients_are_dealt_into_folds_of_equal_numbers_by_the_hash_of_the_split():
    patients = [f"BraTS20_Training_{number:03d}" for number in range(1, 23)]
    dealt = fold_patients(reversed(patients), 5, seed=3)
    assert sorted(sum(dealt, [])) == patients
    assert sorted(map(len, dealt)) == [4, 4, 4, 5, 5]
    assert dealt == fold_patients(patients * 2, 5, seed=3) != fold_patients(patients, 5, seed=4)
    first = split_patients(patients, seed=3)["test"]  # the first in the order of the hash
    assert [sum(patient in own for patient in first) for own in dealt] == [1, 1, 1, 1, 0]
    assert fold_patients("abcd", 2) == [["c", "d"], ["a", "b"]]  # the same on every machine
    for number in (1, 5):
        with pytest.raises(ValueError, match=f"`num_folds` must be from 2 to the number of patients, 4, got {number}"):
            fold_patients("abcd", number)


def test_every_patient_of_a_folder_of_scans_is_out_of_fold_once(folder):
    options = {"brats_dir": str(folder / "brats"), "slices": ["head"], "folds": 3}
    all_rows = load_data(DataArguments(brats_dir=str(folder / "brats"), slices=["head"]))
    num_rows = sum(map(len, all_rows.values()))
    seen = []
    for fold in range(3):
        data = load_data(DataArguments(**options, fold=fold))
        assert data.keys() == {"train", "validation"}
        assert sum(map(len, data.values())) == num_rows
        train, own = (set(data[split]["case_id"]) for split in ("train", "validation"))
        assert train | own == set(PATIENTS)
        assert not train & own
        seen += sorted(own)
    assert sorted(seen) == PATIENTS


@pytest.fixture
def pictures(tmp_path):
    """Return a function that writes a split of pictures of 0 and 1."""

    def write(split, *names):
        for index, name in enumerate(names):
            mask = np.zeros((64, 72), np.uint8)
            mask[10 : 30 + index, 15:50] = 1
            noise = np.random.default_rng([index, len(split)]).integers(0, 99, mask.shape)
            for kind, pixels in (("images", (100 * mask + noise).astype(np.uint8)), ("masks", mask)):
                path = tmp_path / "pictures" / split / kind / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
        return str(tmp_path / "pictures")

    return write


def test_images_and_groups_of_images_are_dealt_and_a_test_split_stays_aside(pictures, caplog):
    pictures("train", "a", "b", "c")
    pictures("val", "a", "x/1", "x/2")
    path = pictures("test", "a", "y/1")
    with caplog.at_level("INFO"):
        dealt = load_folds(DataArguments(dataset_name=path, folds=2))
    assert "The 2 images of the data set's own test split take no part in the folds." in caplog.text
    assert sorted(sum((fold.patients for fold in dealt), [])) == ["a", "b", "c", "x"]
    # Pictures of one name in two splits have two names, and are kept together.
    cases = [fold.cases for fold in dealt]
    assert sorted(sum(cases, [])) == [
        "train/a",
        "train/b",
        "train/c",
        "validation/a",
        "validation/x/1",
        "validation/x/2",
    ]
    for together in ({"train/a", "validation/a"}, {"validation/x/1", "validation/x/2"}):
        assert any(together <= set(own) for own in cases)
    dealt = load_folds(DataArguments(dataset_name=path, folds=6, group_by="none"))
    assert [len(fold.patients) for fold in dealt] == [1] * 6
    by_rule = load_folds(DataArguments(dataset_name=path, folds=2, group_by="[a-c]|x"))
    assert sorted(sum((fold.patients for fold in by_rule), [])) == ["a", "b", "c", "x"]


def test_a_picture_in_two_folds_is_refused_before_anything_is_trained(pictures, tmp_path):
    path = Path(pictures("train", "a", "b", "c", "d"))
    shutil.copy(path / "train" / "images" / "a.png", path / "train" / "images" / "d.png")
    shutil.copy(path / "train" / "masks" / "a.png", path / "train" / "masks" / "d.png")
    run = ["--dataset_name", str(path), "--folds", "4", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match=r"fold \d image . is the same file as fold \d image .\. A model must not"):
        run_segmentation.main(run)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--folds", "1"], "--folds must be from 2 to the number of patients, got 1"),
        (["--fold", "1"], "--fold is one of several folds. Pass --folds too"),
        (["--folds", "3", "--fold", "3"], "--fold must be from 0 to 2 with --folds 3, got 3"),
        (
            ["--folds", "3", "--streaming", "--dataset_name", "x"],
            "--streaming reads whole files as they are.",
        ),
        (
            ["--folds", "3", "--do_train", "false"],
            "--folds trains a model for each fold; it cannot go with",
        ),
        (["--folds", "3", "--push_to_hub"], "would push the models of all --folds to one repository. Leave it out"),
        (
            ["--folds", "3", "--resume_from_checkpoint", "runs/checkpoint-3"],
            "must be true with --folds, since each fold has checkpoints of its own, got runs/checkpoint-3",
        ),
    ],
)
def test_what_folds_cannot_go_with_is_refused(options, match, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(options)
    assert match in capsys.readouterr().err


def test_a_fold_without_a_patient_is_refused(folder, arguments, pictures, tmp_path):
    run = [*arguments, "--folds", "6", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="--folds must be from 2 to the number of patients, 5, got 6"):
        run_segmentation.main(run)
    data = DataArguments(dataset_name=pictures("train", "a", "b"), folds=3, group_by="none")
    with pytest.raises(SystemExit, match="--folds must be from 2 to the number of images, 2, got 3"):
        load_folds(data)
    assert not (tmp_path / "run").exists()


# What all folds give together


def test_the_table_is_that_of_single_runs_with_the_same_splits(whole, folder, arguments, tmp_path):
    output_dir, results = whole
    table = read(output_dir / "patients.json")
    assert [row["patient"] for row in table["patients"]] == sorted(2 * PATIENTS)
    rows, scores = [], []
    for fold, (name, patients) in enumerate(read(output_dir / "folds.json").items()):
        own = read(output_dir / name / "validation_patients.json")["patients"]
        assert sorted({row["patient"] for row in own}) == patients
        assert read(output_dir / name / "splits.json") == {
            "out_of_fold": patients,
            "train": sorted(set(PATIENTS) - set(patients)),
        }
        rows += [{"patient": row["patient"], "region": row["region"], "fold": fold, **row} for row in own]
        scores.append(read(output_dir / name / "all_results.json"))
    assert table["patients"] == sorted(rows, key=lambda row: row["patient"])
    lines = (output_dir / "patients.csv").read_text().splitlines()
    assert lines[0].startswith("patient,region,fold,volume_dice,hausdorff95_mm,")
    assert len(lines) == 11
    dice = np.array([row["volume_dice"] for row in table["patients"] if row["region"] == "WT"])
    assert table["summary"]["WT"]["volume_dice"]["mean"] == pytest.approx(dice.mean(), abs=1e-12)
    means = [score["eval_patient_dice_WT"] for score in scores]
    expected = {"mean": np.mean(means), "std": np.std(means, ddof=1)}
    assert table["fold_summary"]["WT"]["volume_dice"] == pytest.approx(expected, abs=1e-9)
    assert results == read(output_dir / "all_results.json")
    assert results["eval_dice"] == pytest.approx(np.mean([score["eval_dice"] for score in scores]), abs=1e-12)
    assert results["eval_dice_std"] == pytest.approx(np.std([score["eval_dice"] for score in scores], ddof=1))
    assert read(output_dir / "ensemble.json") == {"members": ["fold_0", "fold_1", "fold_2"]}
    with Image.open(output_dir / "folds.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def test_a_fold_is_a_single_run_on_its_split(whole, folder, arguments, tmp_path):
    """Which is given as a data set here; without its own test split the last weights are those of both."""
    output_dir, _ = whole
    dealt = read(output_dir / "folds.json")
    data = load_data(DataArguments(brats_dir=str(folder / "brats"), slices=["head"]))
    rows = concatenate_datasets(list(data.values()))

    def of(*names):
        parts = [
            rows.select([row for row, case in enumerate(rows["case_id"]) if case in dealt[name]]) for name in names
        ]
        return concatenate_datasets(parts)

    splits = DatasetDict({"train": of("fold_0", "fold_2"), "validation": of("fold_1")})
    for split, own in splits.items():
        own.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    single = ["--dataset_name", str(tmp_path / "data"), "--recipe", "volume", *arguments[2:]]
    single += ["--load_best_model_at_end", "false", "--output_dir", str(tmp_path / "single")]
    run_segmentation.main(single)
    expected = load_file(tmp_path / "single" / "model.safetensors")
    found = load_file(output_dir / "fold_1" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    for name in ("validation_patients.csv", "all_results.json"):
        assert (tmp_path / "single" / name).read_bytes() == (output_dir / "fold_1" / name).read_bytes(), name


def test_segmentations_are_those_of_the_volume_command(whole, folder, tmp_path, capsys, caplog):
    output_dir, _ = whole
    patients = read(output_dir / "folds.json")["fold_0"]
    cases = [str(folder / "brats" / patient) for patient in patients]
    segment_volumes(
        [str(output_dir / "fold_0"), *cases, "-o", str(tmp_path), "--score", "--device", "cpu", "--dtype", "float32"]
    )
    capsys.readouterr()
    assert "Their scores are too good" not in caplog.text
    for patient in patients:
        expected = nibabel.load(tmp_path / f"{patient}_seg.nii.gz")
        found = nibabel.load(output_dir / "segmentations" / f"{patient}.nii.gz")
        assert np.array_equal(np.asarray(found.dataobj), np.asarray(expected.dataobj))
        assert found.header == expected.header
        assert np.asarray(found.dataobj).any()
    table = {(row["patient"], row["region"]): row for row in read(output_dir / "patients.json")["patients"]}
    for row in read(tmp_path / "patients.json")["patients"]:
        found = table[row["patient"], row["region"]]
        assert found.pop("fold") == 0
        assert found == {name: pytest.approx(value, abs=1e-9) for name, value in row.items()}


def test_the_gain_of_the_clean_up_is_that_of_rules_chosen_without_the_fold(
    whole, arguments, folder, tmp_path, monkeypatch
):
    # Of so few patients the plain rule is as good as any. Take the one with the highest mean.
    monkeypatch.setattr(clean_up, "best_rule", lambda scores: int(np.mean(scores, axis=0).argmax()))
    output_dir = tmp_path / "cv"
    shutil.copytree(whole[0], output_dir)
    for name in ("clean_up.json", "all_results.json"):
        (output_dir / name).unlink()
    options = ["--folds", "3", "--output_dir", str(output_dir), "--resume_from_checkpoint", "true"]
    results = run_segmentation.main([*arguments, *options])
    dealt = read(output_dir / "folds.json")
    cases = {case.case_id: case for case in find_cases(folder / "brats")}
    probabilities, references, components = {}, {}, {}
    for fold, patients in dealt.items():
        segment = Sam2UNetVolumePipeline.from_pretrained(output_dir / fold, device="cpu")
        for patient in patients:
            found = segment(cases[patient], return_probabilities=True, progress=False)
            probabilities[patient] = np.stack([found.scan.from_file_grid(region) for region in found.probabilities])
            references[patient] = cases[patient].read_mask().voxels
            facts = (probabilities[patient], references[patient], REGIONS, found.scan.spacing_mm)
            components[patient] = find_components(*facts)
            stored = load_components(output_dir / "components" / f"{patient}.json")
            for rule in RULES[::11]:
                assert all(stored[region].judge(rule) == components[patient][region].judge(rule) for region in REGIONS)
    scores = {"dice_before": [], "dice_after": []}
    for patients in dealt.values():
        others = [own["WT"] for patient, own in components.items() if patient not in patients]
        chosen = RULES[np.mean([[own.judge(rule).score for rule in RULES] for own in others], axis=0).argmax()]
        for patient in patients:
            for name, rules in (("dice_before", {}), ("dice_after", {"WT": chosen})):
                predicted, _ = CleanUp(rules).apply(probabilities[patient], REGIONS, found.scan.spacing_mm)
                scores[name].append(volume_dice(count_voxels(predicted, references[patient] > 0)))
    stored = read(output_dir / "clean_up.json")
    assert stored["chosen_on"] == "5 patients in 3 folds, segmented by models not trained on them"
    for name, values in scores.items():
        assert stored["patients_of_other_folds"]["WT"][name] == pytest.approx(np.mean(values), abs=1e-12)
        assert results[f"clean_up_{name}_WT"] == stored["patients_of_other_folds"]["WT"][name]
    assert scores["dice_after"] != scores["dice_before"]
    # Table and segmentations stay those of the models alone, and the ensemble has the rules.
    table = read(output_dir / "patients.json")["summary"]["WT"]["volume_dice"]
    assert table["mean"] == pytest.approx(results["clean_up_dice_before_WT"], abs=1e-9)
    ensemble = Sam2UNetVolumePipeline.from_pretrained(output_dir, device="cpu")
    assert {name: dataclasses.asdict(rule) for name, rule in ensemble.clean_up.rules.items()} == stored["regions"]


def test_the_console_says_what_the_clean_up_gains(caplog):
    names = ("dice_before", "false_components_before", "dice_after", "false_components_after")
    gains = {"WT": dict(zip(names, (0.8, 4, 0.79, 1), strict=True))}
    gains["ET"] = dict(zip(names, (0.7, 1, 0.6, 0), strict=True))
    rules = {"WT": RegionRule(min_component_ml=0.5), "ET": RegionRule()}
    with caplog.at_level("INFO"):
        results = folds.report_gains(CleanUp(rules, {"patients_of_other_folds": gains}))
    assert "WT: clean-up by RegionRule(threshold=0.5, min_component_ml=0.5, min_region_ml=0.0). On" in caplog.text
    assert (
        "ET: no clean-up. On patients of other folds, by rules chosen without them, Dice went from 0.7000 to 0.6000 "
        "and false components of a patient from 1.0 to 0.0." in caplog.text
    )
    assert results == {f"clean_up_{name}_{region}": gains[region][name] for region in gains for name in names}


def test_a_cross_validation_from_before_there_was_a_clean_up_gets_one(whole, arguments, tmp_path, monkeypatch):
    shutil.copytree(whole[0], tmp_path / "cv")
    (tmp_path / "cv" / "clean_up.json").unlink()
    shutil.rmtree(tmp_path / "cv" / "components")
    kill(monkeypatch, run_segmentation.Sam2UNetTrainer, "train", 1)
    options = ["--folds", "3", "--output_dir", str(tmp_path / "cv"), "--resume_from_checkpoint", "true"]
    run_segmentation.main([*arguments, *options])
    assert outcome(tmp_path / "cv") == outcome(whole[0])


def test_pictures_are_scored_and_written_by_fold(pictures, folder, tmp_path, caplog):
    small_model(regions={"mask": [1]}).save_pretrained(tmp_path / "start")
    processor = Sam2UNetImageProcessor(regions={"mask": [1]}, size={"height": 64, "width": 64})
    processor.save_pretrained(tmp_path / "start")
    path = pictures("train", "a", "b", "c")
    run = ["--dataset_name", path, "--model_name_or_path", str(tmp_path / "start"), "--folds", "2", *QUICK]
    run += ["--output_dir", str(tmp_path / "run"), "--do_predict", "--load_best_model_at_end", "true"]
    run_segmentation.main([*run, "--eval_strategy", "steps", "--eval_steps", "1"])
    assert "chooses the epoch of a fold by the patients that it is scored on, so the out-of-fold scores" in caplog.text
    dealt = read(tmp_path / "run" / "folds.json")
    for fold, names in dealt.items():
        assert sorted(path.stem for path in (tmp_path / "run" / fold / "predictions").iterdir()) == names
    table = read(tmp_path / "run" / "patients.json")["patients"]
    assert [(row["patient"], row["reference_pixels"] > 0) for row in table] == [("a", True), ("b", True), ("c", True)]
    assert not (tmp_path / "run" / "segmentations").exists()


def test_the_summary_over_folds_by_hand():
    table = PatientTable()
    for patient, dice, fold in (("a", 0.5, 0), ("b", 0.7, 0), ("c", 0.8, 1)):
        table.add(patient, {"WT": {"volume_dice": dice, "hausdorff95_mm": 3}}, fold)
    summary = table.fold_summary()["WT"]
    assert summary["volume_dice"] == pytest.approx({"mean": 0.7, "std": 0.02**0.5})
    assert summary["hausdorff95_mm"] == {"mean": 3, "std": 0}
    table.rows = table.rows[:2]
    assert table.fold_summary()["WT"]["volume_dice"] == {"mean": pytest.approx(0.6), "std": None}


# Runs that stop and go on


def kill(monkeypatch, owner, name, call):
    """Let a call of a function, counted from 1, be the end."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def test_a_run_killed_in_and_between_folds_ends_as_one_never_stopped(whole, arguments, tmp_path, monkeypatch, caplog):
    run = [*arguments, "--folds", "3", "--output_dir", str(tmp_path)]
    trained = tmp_path / "fold_0" / "all_results.json"
    points = [
        (folds.Sam2UNetVolumePipeline, "__call__", 2),  # of the two patients of the first fold
        (folds.CrossValidation, "start", 1),  # between folds
        (run_segmentation.Sam2UNetTrainer, "training_step", 2),  # in the second fold, after its first checkpoint
        (folds, "report_gains", 1),  # after table and clean-up were written, but not all else
    ]
    for number, point in enumerate(points):
        resume = ["--resume_from_checkpoint", "true"] if number % 2 else []
        with monkeypatch.context() as context:
            kill(context, *point)
            with pytest.raises(Killed):
                run_segmentation.main([*run, *resume])
        time = trained.stat().st_mtime_ns
        assert (tmp_path / "fold_1" / "checkpoint-1").exists() == (number > 1)
        assert not (tmp_path / "all_results.json").exists()
        assert (tmp_path / "patients.csv").exists() == (tmp_path / "clean_up.json").exists() == (number == 3)
        # The first was stopped with one of two patients, whose components are not found again.
        assert len(list((tmp_path / "components").iterdir())) == (1, 2, 2, 5)[number]
    assert f"Going on with the unfinished run in {tmp_path / 'fold_1'} from checkpoint-1." in caplog.text
    run_segmentation.main([*run, "--resume_from_checkpoint", "true"])
    assert outcome(tmp_path) == outcome(whole[0])
    assert trained.stat().st_mtime_ns == time


def test_the_last_of_single_folds_writes_the_table(whole, arguments, tmp_path):
    output_dir, results = whole
    unfinished(output_dir, tmp_path, [0])
    run = [*arguments, "--folds", "3", "--output_dir", str(tmp_path), "--fold"]
    assert run_segmentation.main([*run, "0"]) == {}  # as by a cluster that starts a job again
    assert not (tmp_path / "patients.csv").exists()
    unfinished(output_dir, tmp_path, [1])
    assert run_segmentation.main([*run, "2"]) == results
    assert outcome(tmp_path) == outcome(output_dir)


def test_two_cross_validations_are_not_mixed(whole, folder, arguments, tmp_path):
    output_dir = unfinished(whole[0], tmp_path / "cv", [0, 1])
    shutil.copy(whole[0] / "folds.json", output_dir)
    run = [*arguments, "--output_dir", str(output_dir)]
    match = (
        "cv/fold_0 holds a finished run with other values of learning_rate. Start again with --learning_rate 0.0005"
    )
    with pytest.raises(SystemExit, match=match):
        run_segmentation.main([*run, "--folds", "3", "--learning_rate", "0.1", "--resume_from_checkpoint", "true"])
    for other in (["--folds", "2"], ["--folds", "3", "--split_seed", "1"], ["--folds", "2", "--fold", "1"]):
        with pytest.raises(SystemExit, match="cv holds a cross-validation with other folds, see .*folds.json"):
            run_segmentation.main([*run, *other])
    with pytest.raises(SystemExit, match="cv holds a cross-validation. Pass its --folds, or another --output_dir"):
        run_segmentation.main([*run, "--load_best_model_at_end", "false", "--overwrite_output_dir"])
    with pytest.raises(SystemExit, match="fold_0 holds a run without --folds. Pass another --output_dir"):
        run_segmentation.main([*run, "--folds", "3", "--output_dir", str(output_dir / "fold_0")])
    with pytest.raises(SystemExit, match="whole holds a finished cross-validation. Pass --overwrite_output_dir to"):
        run_segmentation.main([*arguments, "--folds", "3", "--output_dir", str(whole[0])])


def test_an_older_cross_validation_is_replaced_when_asked_and_no_mistake_costs_it(
    whole, arguments, tmp_path, monkeypatch
):
    output_dir = tmp_path / "cv"
    shutil.copytree(whole[0], output_dir)
    run = [*arguments, "--folds", "3", "--output_dir", str(output_dir), "--overwrite_output_dir"]
    with pytest.raises(SystemExit, match="dicee"):
        run_segmentation.main([*run, "--metric_for_best_model", "dicee"])
    assert outcome(output_dir) == outcome(whole[0])
    (output_dir / "segmentations" / "Phantom_009.nii.gz").touch()  # of a patient who is no longer there
    kill(monkeypatch, run_segmentation.Sam2UNetTrainer, "train", 1)
    with pytest.raises(Killed):
        run_segmentation.main([*run, "--learning_rate", "0.01"])
    left = {str(path.relative_to(output_dir)) for path in output_dir.rglob("*.json")}
    assert "fold_0/run.json" in left
    gone = ("all_results.json", "fold_1/run.json", "patients.json", "clean_up.json")
    assert not {name for name in left if name.endswith(gone)}
    assert not [*(output_dir / "segmentations").iterdir(), *(output_dir / "components").iterdir()]


def test_a_single_fold_is_replaced(whole, arguments, tmp_path):
    shutil.copytree(whole[0], tmp_path / "cv")
    (tmp_path / "cv" / "segmentations" / "Phantom_002.nii.gz").write_bytes(b"old")
    (tmp_path / "cv" / "components" / "Phantom_002.json").write_bytes(b"old")
    (fold,) = [name for name, patients in read(whole[0] / "folds.json").items() if "Phantom_002" in patients]
    run = [*arguments, "--folds", "3", "--output_dir", str(tmp_path / "cv"), "--overwrite_output_dir"]
    run_segmentation.main([*run, "--fold", fold.removeprefix("fold_")])
    assert outcome(tmp_path / "cv") == outcome(whole[0])


@pytest.mark.slow
def test_folds_killed_anywhere_end_as_uninterrupted_ones(whole, arguments, tmp_path):
    """By SIGKILL before a change of any file, twice each."""
    counters, log = tmp_path / "counters", tmp_path / "log"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def run(name, **end):
        argv = [*arguments, "--folds", "3", "--output_dir", str(tmp_path / name)]
        order = {"program": "train", "argv": argv, "log": str(log), "watch": str(tmp_path / name)}
        order |= {"counters": str(counters), **end}
        worker = ROOT / "tests" / "interrupted_worker.py"
        done = forks.run([worker, json.dumps(order)], cwd=tmp_path, env=environment, imported=forks.EVERYTHING)
        return done.returncode

    from interrupted_worker import read_counters

    assert run("never") == 0, log.read_text()
    assert outcome(tmp_path / "never") == outcome(whole[0])
    changes = read_counters(counters)["changes"]
    choose = random.Random(0)
    for number in range(4):
        name = f"killed-{number}"
        codes = [run(name, change=choose.randint(1, share * changes // 3)) for share in (2, 1)]
        assert set(codes) <= {-9, 0, 1}, log.read_text()
        if not (tmp_path / name / "all_results.json").exists():
            assert run(name) == 0, log.read_text()
        assert outcome(tmp_path / name) == outcome(whole[0])


@pytest.mark.slow
def test_folds_in_two_processes(folder, arguments, tmp_path):
    script = ROOT / "examples" / "run_segmentation.py"
    said = run_two_processes(tmp_path, script, *arguments, "--folds", "2", "--output_dir", tmp_path / "run")
    assert said.count("The results of all folds are in") == 1
    assert [row["patient"] for row in read(tmp_path / "run" / "patients.json")["patients"]] == sorted(2 * PATIENTS)
    assert len(list((tmp_path / "run" / "segmentations").iterdir())) == 5
    for fold, patients in read(tmp_path / "run" / "folds.json").items():
        cases = [str(folder / "brats" / patient) for patient in patients]
        segment_volumes(
            [
                str(tmp_path / "run" / fold),
                *cases,
                "-o",
                str(tmp_path / "by_hand"),
                "--device",
                "cpu",
                "--dtype",
                "float32",
            ]
        )
        for patient in patients:
            by_hand = nibabel.load(tmp_path / "by_hand" / f"{patient}_seg.nii.gz")
            found = nibabel.load(tmp_path / "run" / "segmentations" / f"{patient}.nii.gz")
            assert np.array_equal(np.asarray(found.dataobj), np.asarray(by_hand.dataobj))
