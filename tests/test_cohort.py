"""A run that ends with patients, and a second cohort: from two folders of scans to tables and pictures."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from common import small_model
from forks import run_two_processes
from PIL import Image
from test_patients import make_heads

from dataset_scripts.phantom import write_phantom_cohort
from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.finetuning import patients, run_segmentation
from sam2unet_hf.finetuning.arguments import DataArguments
from sam2unet_hf.finetuning.cohort import load_cohort
from sam2unet_hf.finetuning.parsing import parse_arguments
from sam2unet_hf.finetuning.patients import patients_to_show
from sam2unet_hf.patient_table import PatientTable
from sam2unet_hf.volume import main as segment_volumes


QUICK = ["--use_cpu", "--disable_tqdm", "true", "--per_device_train_batch_size", "4"]
QUICK += ["--per_device_eval_batch_size", "8", "--max_steps", "2", "--load_best_model_at_end", "false"]
REGIONS = {"WT": [1, 2, 3], "ET": [3]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model to start from, and the scans of two hospitals, the second with patients Other_001 and _002."""
    folder = tmp_path_factory.mktemp("cohorts")
    small_model(regions=REGIONS).save_pretrained(folder / "start")
    processor = Sam2UNetImageProcessor(regions=REGIONS, size={"height": 64, "width": 64}, modalities=["t2"])
    processor.save_pretrained(folder / "start")
    write_phantom_cohort(folder / "here", num_patients=7, shape=(40, 40, 26))
    there = write_phantom_cohort(folder / "there", num_patients=2, shape=(40, 40, 26), seed=5)
    for path in sorted(there.rglob("Phantom_*"), reverse=True):
        path.rename(path.with_name(path.name.replace("Phantom", "Other")))
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """The folder of a run on one cohort that scores the other, and its results."""
    arguments = ["--brats_dir", str(folder / "here"), "--slices", "head", "--test_dir", str(folder / "there")]
    arguments += ["--model_name_or_path", str(folder / "start"), "--modalities", "t2", "--neighbours", "1"]
    arguments += ["--head_crop_size", "64", "64", *QUICK]
    results = run_segmentation.main([*arguments, "--output_dir", str(folder / "run")])
    return folder / "run", results


def read_table(path):
    return json.loads(path.read_text())


def test_a_run_ends_with_the_patients_of_both_cohorts(run):
    output_dir, results = run
    for split, patient in (("test", "Phantom"), ("test_dir", "Other")):
        table = read_table(output_dir / f"{split}_patients.json")
        names = [row["patient"] for row in table["patients"]]
        assert len(names) == 4 if split == "test_dir" else len(names) >= 2
        assert all(name.startswith(patient) for name in names)
        for region in REGIONS:
            values = [row["volume_dice"] for row in table["patients"] if row["region"] == region]
            assert results[f"{split}_patient_dice_{region}"] == pytest.approx(np.mean(values), abs=1e-9)
        assert 0 < results[f"{split}_patient_dice"] < 1
        assert {row["hausdorff95_mm"] > 0 for row in table["patients"]} == {True}
        assert (output_dir / f"{split}_patients.csv").read_text().count("\n") == 1 + len(names)
    for name in ("predictions.png", "test_dir_predictions.png"):
        with Image.open(output_dir / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10
    card = (output_dir / "README.md").read_text()
    assert "### Patients of the test split" in card
    assert "### Patients of the second cohort" in card
    assert "Other_001" not in card
    splits = read_table(output_dir / "splits.json")
    assert sorted(sum(splits.values(), [])) == [f"Phantom_{number:03d}" for number in range(1, 8)]
    assert splits.keys() == {"train", "validation", "test"}


def test_the_picture_names_patients_and_shows_their_largest_tumours(run, folder):
    table = PatientTable()
    table.rows = read_table(run[0] / "test_dir_patients.json")["patients"]
    rows = load_cohort(str(folder / "there"), DataArguments(modalities=["t2"], neighbours=1), REGIONS).images
    cases, slices, tumour = (rows[name] for name in ("case_id", "slice_index", "wt_pixels"))
    titles = patients_to_show(rows, table)
    means = sorted(table.dice.items(), key=lambda item: -item[1])
    shown = zip(("best", "worst"), means, titles.items(), strict=True)
    for rank, (patient, dice), (index, title) in shown:
        assert title == f"{rank} patient: Dice {dice:.3f}\n{patient}, slice {slices[index]} is shown"
        assert cases[index] == patient
        assert tumour[index] == max(count for count, case in zip(tumour, cases, strict=True) if case == patient) > 0


def test_patients_score_as_by_the_volume_command(run, folder, capsys):
    output_dir, results = run
    segment_volumes(
        [
            str(output_dir),
            str(folder / "there"),
            "-o",
            str(folder / "volumes"),
            "--score",
            "--device",
            "cpu",
            "--dtype",
            "float32",
        ]
    )
    capsys.readouterr()
    by_command = read_table(folder / "volumes" / "patients.json")
    by_run = read_table(output_dir / "test_dir_patients.json")
    assert len(by_command["patients"]) == 4
    key = lambda row: (row["patient"], row["region"])  # noqa: E731
    for command, of_run in zip(*(sorted(table["patients"], key=key) for table in (by_command, by_run)), strict=True):
        assert of_run == {**command, **{name: pytest.approx(command[name], abs=1e-9) for name in list(command)[2:]}}
    mean = np.mean([row["volume_dice"] for row in by_command["patients"]])
    assert results["test_dir_patient_dice"] == pytest.approx(mean, abs=1e-9)


def scoring(model, cohort):
    """Arguments of a run that scores a model on a cohort alone."""
    return ["--do_train", "false", "--model_name_or_path", str(model), "--test_dir", str(cohort), *QUICK]


def test_a_second_cohort_is_scored_without_training(run, folder, tmp_path, caplog):
    output_dir, trained = run
    results = run_segmentation.main([*scoring(output_dir, folder / "there"), "--output_dir", str(tmp_path / "a")])
    del results["epoch"]
    assert results == {name: value for name, value in trained.items() if name.startswith("test_dir_")}
    assert len(results) == 1 + 3 * (19 + 4)
    assert "The model was trained on" not in caplog.text
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files >= {"test_dir_patients.csv", "test_dir_patients.json", "test_dir_predictions.png", "all_results.json"}
    assert not files & {"splits.json", "predictions.png", "README.md"}
    assert read_table(tmp_path / "a" / "test_dir_patients.json") == read_table(output_dir / "test_dir_patients.json")
    run_segmentation.main([*scoring(output_dir, folder / "here"), "--output_dir", str(tmp_path / "b")])
    assert "test_dir: The model was trained on 5 of the 7 patients that are scored" in caplog.text


def test_two_processes_score_patients_as_one_does(run, folder, tmp_path):
    arguments = scoring(run[0], folder / "there")
    arguments += ["--per_device_eval_batch_size", "1"]  # convolutions differ in the last bit with the size of a batch
    script = Path(__file__).parents[1] / "examples" / "run_segmentation.py"
    said = run_two_processes(tmp_path, script, *arguments, "--output_dir", tmp_path / "two")
    assert said.count("The results are in") == 1
    run_segmentation.main([*arguments, "--output_dir", str(tmp_path / "one")])
    for name in ("test_dir_patients.json", "all_results.json"):
        assert read_table(tmp_path / "two" / name) == read_table(tmp_path / "one" / name)


def test_a_model_is_not_scored_on_other_contrasts_unless_asked(run, folder, tmp_path, caplog):
    arguments = scoring(run[0], folder / "there") + ["--modalities", "t1", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="trained on t2, and is to segment t1. .*--allow_other_modalities"):
        run_segmentation.main(arguments)
    run_segmentation.main([*arguments, "--allow_other_modalities"])
    assert "The model is one of modalities ['t2'], and sees ['t1'] now" in caplog.text


def test_pictures_are_scored_in_pixels(folder, tmp_path):
    generator = np.random.default_rng(0)
    small_model(regions={"foreground": [1]}).save_pretrained(tmp_path / "start")
    for split in ("train", "test"):
        for index in range(2):
            mask = np.zeros((70, 80), np.uint8)
            mask[10 : 30 + index, 15:50] = 1
            image = (mask * 99 + generator.integers(0, 99, mask.shape)).astype(np.uint8)
            for name, pixels in (("images", image), ("masks", mask)):
                path = tmp_path / "pictures" / split / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    arguments = ["--do_train", "false", "--model_name_or_path", str(tmp_path / "start"), *QUICK]
    arguments += [
        "--test_dir",
        str(tmp_path / "pictures"),
        "--image_size",
        "64",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    results = run_segmentation.main(arguments)
    rows = read_table(tmp_path / "run" / "test_dir_patients.json")["patients"]
    assert sorted(row["patient"] for row in rows) == ["test/0", "test/1", "train/0", "train/1"]
    assert {row["reference_pixels"] for row in rows} == {20 * 35.0, 21 * 35.0}
    assert math.fsum(row["volume_dice"] for row in rows) / 4 == pytest.approx(results["test_dir_patient_dice"])
    assert (tmp_path / "run" / "test_dir_predictions.png").exists()


def test_a_data_set_is_taken_whole_whatever_splits_it_has(tmp_path):
    heads = make_heads(("a", "b", "c"), image="flair")
    heads.to_parquet(tmp_path / "one" / "test.parquet")
    for split, case in (("train", "a"), ("test", "b"), ("validation", "c")):
        heads.filter(lambda row, case=case: row["case_id"] == case).to_parquet(tmp_path / "all" / f"{split}.parquet")
    for name in ("one", "all"):
        cohort = load_cohort(str(tmp_path / name), DataArguments(split_seed=3), REGIONS)
        assert sorted(set(cohort.rows["case_id"])) == ["a", "b", "c"]
        assert len(cohort.images) == 30
        assert cohort.has_patients
    with pytest.raises(SystemExit, match="--test_dir .*nowhere: "):
        load_cohort(str(tmp_path / "nowhere"), DataArguments(), REGIONS)


def test_patients_of_the_model_to_start_from_stay_known(tmp_path, caplog):
    patients.write_splits(tmp_path, {"train": ["x"], "validation": ["y"], "earlier": ["w"]})
    data = {"train": make_heads(("a", "b")), "test": make_heads(("BraTS-GLI-00001-000", "BraTS-GLI-00001-001", "x"))}
    args = SimpleNamespace(do_train=True)
    known = patients.KnownPatients(data, DataArguments(), args, str(tmp_path))
    assert known.of_run == {"train": ["a", "b"], "test": ["BraTS-GLI-00001", "x"], "earlier": ["w", "x"]}
    known.warn({**data, "test_dir": make_heads(("a", "y"))}, has_patients=True)
    assert "test: The model was trained on 1 of the 3 patients that are scored: x." in caplog.text
    assert "test_dir: The model was trained on 1 of the 2 patients that are scored: a." in caplog.text
    assert patients.KnownPatients(data, DataArguments(), args, None).of_run.keys() == {"train", "test"}
    args.do_train = False
    assert patients.KnownPatients({}, DataArguments(), args, str(tmp_path)).of_run["validation"] == ["y"]
    patients.write_splits(tmp_path / "none", {})
    assert not (tmp_path / "none").exists()


def test_a_cohort_alone_needs_a_model(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--use_cpu", "--do_train", "false", "--test_dir", "hospital"]
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    assert "name it by --model_name_or_path" in capsys.readouterr().err
    model_args, _, args = parse_arguments([*arguments, "--model_name_or_path", "model"])
    assert (args.output_dir, model_args.image_size) == ("runs/hospital-evaluation", None)
