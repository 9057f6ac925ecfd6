"""Patients: sums of an evaluation over their slices, and their volumes."""

import json
import re

import numpy as np
import pytest
import torch
from common import BRATS_REGIONS, small_model
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from test_training import make_trainer
from transformers import EvalPrediction

from sam2unet_hf.metrics import score_lesions, score_volume
from sam2unet_hf.patient_checks import (
    describe_known_patients,
    describe_other_modalities,
    read_splits,
    why_implausible,
)
from sam2unet_hf.patient_table import COLUMN_TITLES, PATIENT_METRICS, PatientTable, score_patient
from sam2unet_hf.training import SegmentationMetrics
from sam2unet_hf.training.evaluation import losses_of_images
from sam2unet_hf.training.patients import PatientRows, add_up, find_patients, score_sums
from sam2unet_hf.training.volumes import count_head, score_patients, why_no_volumes


CASES = ["b", "a", "b", "a", "b"]  # in this order, which is neither sorted nor patient by patient
SPACING_MM = {"a": [1.0, 2.0, 5.0], "b": [1.0, 1.0, 1.0]}


def make_slices(spacing=True, **columns):
    """Slices of two patients with nested squares, one slice without tumour."""
    generator = np.random.default_rng(0)
    images, masks = [], []
    for index in range(len(CASES)):
        mask = np.zeros((64, 72), dtype=np.uint8)
        if index != 2:
            mask[20:50, 15:45], mask[25:45, 20:40], mask[30 : 40 - index, 25:35] = 2, 1, 3
        images.append(PILImage.fromarray((60 * mask + generator.integers(0, 60, mask.shape)).astype(np.uint8)))
        masks.append(PILImage.fromarray(mask))
    features = {"image": Image(), "mask": Image(), "case_id": Value("string"), "slice_index": Value("int32")}
    values = {"image": images, "mask": masks, "case_id": CASES, "slice_index": [3, 1, 4, 0, 2]}
    if spacing:
        features["spacing_mm"], values["spacing_mm"] = List(Value("float64")), [SPACING_MM[case] for case in CASES]
    for name, column in columns.items():
        values[name] = column
    return Dataset.from_dict(values, features=Features(features))


def test_scores_of_patients_by_hand():
    patients = PatientRows(["b", "a", "b"], [0.001, 0.01, 0.001])
    counts = [
        np.array([[3, 4, 5], [0, 0, 0]]),
        np.array([[0, 0, 7], [2, 2, 2]]),
        np.array([[1, 4, 1], [0, 2, 0]]),
    ]
    sums = add_up(counts, patients)
    assert {case: own.tolist() for case, own in sums.items()} == {
        "b": [[4, 8, 6], [0, 2, 0]],
        "a": [[0, 0, 7], [2, 2, 2]],
    }
    scores = score_sums(sums, patients, ["WT", "ET"])
    expected = {
        "patient_dice_WT": (8 / 14 + 0) / 2,
        "patient_iou_WT": (4 / 10 + 0) / 2,
        "patient_false_ml_WT": 0.004 / 2,
        "patient_missed_ml_WT": (0.002 + 0.07) / 2,
        "patient_dice_ET": (0 + 1) / 2,  # one of two is empty, and all right
        "patient_iou_ET": (0 + 1) / 2,
        "patient_false_ml_ET": 0.002 / 2,
        "patient_missed_ml_ET": 0.0,
    }
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-15)
    assert scores["patient_dice"] == pytest.approx((4 / 14 + 1 / 2) / 2)
    assert list(scores) == SegmentationMetrics(["WT", "ET"]).patient_names("ml")
    empty = PatientRows(["a"], None)
    scores = score_sums(add_up([np.zeros((1, 3), int)], empty), empty, ["WT"])
    assert (scores["patient_dice"], scores["patient_iou"], scores["patient_false_voxels"]) == (1, 1, 0)


def label_map_of(trainer, row):
    """What the volume command would write of a slice."""
    processor = trainer.eval_dataset.format["format_kwargs"]["transform"].processor
    with torch.inference_mode():
        outputs = trainer.model(row["pixel_values"][None])
    return processor.post_process_semantic_segmentation(outputs, target_sizes=[row["labels"].shape])[0].numpy()


@pytest.mark.parametrize(("batch_size", "by_batch"), [(1, True), (2, True), (2, False)])
def test_an_evaluation_scores_patients_as_volumes_of_their_slices(batch_size, by_batch, tmp_path):
    model = small_model(regions=BRATS_REGIONS)
    options = {"per_device_eval_batch_size": batch_size, "batch_eval_metrics": by_batch}
    trainer = make_trainer(model, make_slices(), tmp_path, metric_for_best_model="patient_dice_WT", **options)
    metrics = trainer.evaluate()
    assert set(metrics) >= {f"eval_{name}" for name in trainer.compute_metrics.patient_names("ml")}
    rows = list(trainer.eval_dataset)
    dice, false_ml = [], []
    for case in ("b", "a"):
        own = [row for row, name in zip(rows, CASES, strict=True) if name == case]
        predicted = np.stack([label_map_of(trainer, row) for row in own])
        reference = np.stack([row["labels"].numpy() for row in own])
        scores = score_volume(predicted, reference, regions=BRATS_REGIONS)
        dice.append([scores[region]["volume_dice"] for region in BRATS_REGIONS])
        false = np.count_nonzero((predicted != 0) & (reference == 0))
        false_ml.append(false * np.prod(SPACING_MM[case]) / 1000)
    assert 0.05 < np.mean(dice) < 0.95
    assert metrics["eval_patient_dice"] == pytest.approx(np.mean(dice), abs=1e-9)
    for region, values in zip(BRATS_REGIONS, zip(*dice, strict=True), strict=True):
        assert metrics[f"eval_patient_dice_{region}"] == pytest.approx(np.mean(values), abs=1e-9)
    assert metrics["eval_patient_false_ml_WT"] == pytest.approx(np.mean(false_ml), abs=1e-9)
    assert list(trainer.compute_metrics.patient_counts) == ["b", "a"]


class OnGpu(torch.Tensor):
    """A tensor that NumPy cannot read before it is copied, as those on a GPU."""

    def __array__(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy.")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_scores_losses_and_counts_may_lie_on_a_gpu():
    model = small_model(regions=BRATS_REGIONS)
    metrics = SegmentationMetrics(list(BRATS_REGIONS))
    scores, counts = metrics.score_and_count(torch.randn(2, 3, 64, 64), torch.randint(0, 4, (2, 64, 64)), model)
    found = []
    for kind in (torch.Tensor, OnGpu):
        metrics.reset()
        metrics.patient_rows = PatientRows(["b", "a"], None)
        batch = [torch.as_tensor(values).as_subclass(kind) for values in (scores, [0.5, 0.75], counts)]
        found.append(metrics(EvalPrediction(predictions=batch[0], label_ids=tuple(batch[1:]))))
    assert found[0] == found[1]
    assert found[0]["loss"] == 0.625
    assert 0 < found[0]["patient_dice"] < 1


def test_rows_tell_what_is_known_of_patients(tmp_path):
    rows = make_slices()
    transformed = make_trainer(small_model(), rows, tmp_path).eval_dataset
    assert find_patients(transformed) == PatientRows(
        CASES, [SPACING_MM[case][1] * SPACING_MM[case][2] / 1000 for case in CASES]
    )
    assert find_patients(rows, order=[1, 0]).case_ids == ["a", "b"]
    assert find_patients(make_slices(spacing=False)) == PatientRows(CASES, None)
    assert find_patients(rows.remove_columns("case_id")) is None
    assert find_patients(make_slices(case_id=[*CASES[:-1], None])) is None


def test_without_patients_there_are_no_scores_of_patients(tmp_path):
    trainer = make_trainer(small_model(), make_slices().remove_columns("case_id"), tmp_path)
    assert not [name for name in trainer.evaluate() if "patient" in name]
    assert trainer.compute_metrics.patient_counts == {}
    with pytest.raises(ValueError, match="`metric_for_best_model` must be a score such as .*, got patient_dice"):
        make_trainer(small_model(), trainer.train_dataset, tmp_path, metric_for_best_model="patient_dice")


def test_the_best_checkpoint_may_be_that_of_patients(tmp_path):
    rows = make_slices(spacing=False)
    make_trainer(small_model(), rows, tmp_path, metric_for_best_model="eval_patient_iou")
    options = {"metric_for_best_model": "patient_false_voxels"}
    make_trainer(small_model(), rows, tmp_path, **options, greater_is_better=False)
    with pytest.raises(ValueError, match="`greater_is_better` must be False .* patient_false_voxels, got True"):
        make_trainer(small_model(), rows, tmp_path, **options)
    with pytest.raises(ValueError, match="such as patient_false_voxels.*, got patient_false_ml"):
        make_trainer(small_model(), rows, tmp_path, metric_for_best_model="patient_false_ml")


def test_the_loss_of_a_crop_is_that_of_its_window():
    model = small_model(regions=BRATS_REGIONS)
    pixel_values = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        outputs = model(pixel_values, output_auxiliary_logits=True)
    window = torch.zeros(64, 96, dtype=torch.long)
    window[30:50, 40:60] = 3
    expected = model.compute_loss([outputs.logits, *outputs.auxiliary_logits], window[None])
    # The window reaches 10 pixels beyond the left of the slice, and leaves 20 out above.
    whole = torch.zeros(90, 100, dtype=torch.long)
    whole[20:84, :86] = window[:, 10:]
    boxes = torch.tensor([[-10, 20, 86, 84]])
    assert losses_of_images(model, outputs, whole[None], boxes).tolist() == [expected.item()]
    assert losses_of_images(model, outputs, whole[None]).tolist() != [expected.item()]


# The table


def table_of(*patients):
    table = PatientTable()
    for name, dice, distance in patients:
        scores = {"volume_dice": dice, "hausdorff95_mm": distance, "reference_ml": 2.5, "predicted_ml": 0, "more": 9}
        table.add(name, {"WT": scores, "ET": {**scores, "volume_dice": dice / 2}})
    return table


def test_the_table_of_patients_by_hand(tmp_path):
    table = table_of(("c", 0.5, 4), ("a", 0.9, 2), ("b", 0.6, 12))
    wt, et = table.summary().values()
    assert wt["volume_dice"] == pytest.approx({"mean": 2 / 3, "std": (0.13 / 3) ** 0.5, "median": 0.6, "worst": 0.5})
    assert et["hausdorff95_mm"] == pytest.approx({"mean": 6, "std": 28**0.5, "median": 4, "worst": 12})
    assert wt.keys() == {"volume_dice", "hausdorff95_mm"}
    assert table.dice == pytest.approx({"a": 0.675, "b": 0.45, "c": 0.375})
    assert list(table.dice) == ["a", "b", "c"]
    assert table.write(tmp_path, "test_patients") == [tmp_path / "test_patients.csv", tmp_path / "test_patients.json"]
    lines = (tmp_path / "test_patients.csv").read_text().splitlines()
    assert lines[:2] == [
        "patient,region,volume_dice,hausdorff95_mm,reference_ml,predicted_ml",
        "c,WT,0.5,4.0,2.5,0.0",
    ]
    found = json.loads((tmp_path / "test_patients.json").read_text())
    assert (found["patients"], found["summary"]) == (table.rows, table.summary())
    assert table_of(("a", 0.9, 2)).summary()["WT"]["volume_dice"]["std"] is None
    assert PatientTable().write(tmp_path / "none") == []


def test_the_table_in_words():
    table = PatientTable()
    for patient, dice, distance in (("a", 0.9, 5.0), ("b", 0.8, 2.0), ("c", 0.5, 373.13)):
        table.add(patient, {"WT": {"volume_dice": dice, "hausdorff95_mm": distance}, "ET": {"volume_dice": 1.0}})
    assert table.sentences() == [
        "WT: Dice 0.733 on average (median 0.800, worst 0.500); "
        "95 % Hausdorff distance 126.7 mm on average (median 5.0, worst 373.1).",
        "ET: Dice 1.000 on average (median 1.000, worst 1.000).",
    ]
    table.rows = table.rows[:1]
    assert table.sentences() == ["WT: Dice 0.900; 95 % Hausdorff distance 5.0 mm."]


def test_volumes_of_a_patient_are_measured_in_millilitres():
    reference, prediction = np.zeros((4, 5, 6), np.uint8), np.zeros((4, 5, 6), np.uint8)
    reference[1, :2], prediction[1, 0] = 3, 2
    scores = score_patient(prediction, reference, BRATS_REGIONS, (10, 2, 5))
    assert (scores["WT"]["reference_ml"], scores["WT"]["predicted_ml"]) == pytest.approx((1.2, 0.6))
    assert (scores["ET"]["reference_ml"], scores["ET"]["predicted_ml"]) == pytest.approx((1.2, 0))
    assert scores["WT"]["volume_dice"] == 12 / 18
    assert scores["WT"]["hausdorff95_mm"] == 2
    assert scores["ET"]["volume_dice"] == 0


def test_the_table_has_the_lesions_of_a_patient(tmp_path):
    prediction, reference = np.zeros((2, 9, 9, 9), np.uint8)
    reference[1:5, 1:4, 1:4] = reference[8, 8, 8] = 3
    prediction[1:5, 1:4, 1:3] = prediction[8, 0, 0] = 3
    scores = score_patient(prediction, reference, BRATS_REGIONS, (1, 1, 1))
    assert scores["ET"] | score_lesions(prediction, reference)["ET"] == scores["ET"]
    assert scores["ET"] | score_volume(prediction, reference)["ET"] == scores["ET"]
    table = PatientTable()
    table.add("a", scores)
    table.add("b", score_patient(reference, reference, BRATS_REGIONS, (1, 1, 1)))
    (row, *_), summary = table.rows, table.summary()["WT"]
    assert row.keys() == {"patient", "region", *COLUMN_TITLES} - {"reference_pixels", "predicted_pixels"}
    assert (row["lesion_f1"], row["lesion_dice"]) == pytest.approx((0.5, 0.8 / 3))
    assert 0 < row["nsd_0.5mm"] < row["nsd_1mm"] < 1
    assert summary.keys() == row.keys() & set(PATIENT_METRICS)
    assert summary["lesion_dice"]["worst"] == row["lesion_dice"]
    assert summary["lesion_hausdorff95_pooled_mm"]["worst"] == row["lesion_hausdorff95_pooled_mm"] > 200
    table.write(tmp_path)
    assert json.loads((tmp_path / "patients.json").read_text())["patients"] == table.rows


# What is suspicious


def test_results_that_are_hardly_believable():
    label_map = np.zeros((10, 10), np.uint8)
    assert "nothing was found" in why_implausible(label_map, 100)
    label_map[:3] = 2
    assert why_implausible(label_map, 100) is None
    label_map[3, :4] = 1
    assert "34% of the head was taken for tumour, more than a third" in why_implausible(label_map, 100)
    assert "of the head was taken for tumour" in why_implausible(label_map, 0)


def test_patients_of_the_training_are_known_by_any_of_their_scans(tmp_path):
    splits = {"train": ["BraTS-GLI-00001", "b"], "validation": ["c"], "test": ["d"], "earlier": ["e"]}
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    for folder in (tmp_path, tmp_path / "checkpoint-3", str(tmp_path)):
        assert read_splits(folder) == splits
    assert read_splits("someone/a_model_on_the_hub") == read_splits(None) == {}
    known = describe_known_patients(splits, ["BraTS-GLI-00001-001", "d", "e", "f"])
    assert "The model was trained on 2 of the 4 patients that are scored: BraTS-GLI-00001-001, e." in known
    assert "was chosen by 1 of the 2 patients that are scored: c." in describe_known_patients(splits, ["c", "d"])
    assert describe_known_patients(splits, ["d", "f"]) is None
    assert describe_known_patients({}, ["b"]) is None
    for broken in ("[", "[1]", '{"train": 3}'):
        (tmp_path / "splits.json").write_text(broken)
        with pytest.raises(ValueError, match="splits.json` cannot be read .* Put back what the run wrote"):
            read_splits(tmp_path)


def test_other_contrasts_are_named():
    assert describe_other_modalities(["t1", "t2"], ["t1", "t2"]) is None
    assert describe_other_modalities(None, ["t1"]) is None
    assert "trained on t1, t2, and is to segment t2, t1" in describe_other_modalities(["t1", "t2"], ["t2", "t1"])


# Whole heads


def make_heads(names=("b", "a"), image="image", shift=0, tumour=(3, 6)):
    """Whole heads of ten slices, in mixed order: a bright square in each slice, a brighter one where tumour is."""
    generator = np.random.default_rng(1)
    rows = []
    for place, name in enumerate(names):
        for index in range(10):
            mask, grey = np.zeros((64, 72), np.uint8), np.zeros((64, 72), np.uint8)
            grey[8:56, 10:60] = generator.integers(40, 90, (48, 50))
            if tumour[0] <= index < tumour[1]:
                mask[20 : 40 + place, 20:45], mask[25:35, 25:40] = 2, 3
            boxes = {image: [10, 8, 60, 56]}
            row = {image: PILImage.fromarray(grey + 50 * mask), "mask": PILImage.fromarray(mask), "case_id": name}
            row |= {"slice_index": index + shift, "head_boxes": boxes, "wt_pixels": np.count_nonzero(mask)}
            rows.append({**row, "spacing_mm": [1.0, 1.5, 4.0 + place]})
    features = {image: Image(), "mask": Image(), "case_id": Value("string"), "slice_index": Value("int32")}
    features |= {"head_boxes": {image: List(Value("int32"))}, "wt_pixels": Value("int32")}
    features |= {"spacing_mm": List(Value("float64"))}
    data = Dataset.from_list(rows, features=Features(features))
    return data.select(np.random.default_rng(2).permutation(len(data)))


@pytest.mark.parametrize("plane", ["axial", "coronal"])
def test_volumes_put_together_from_rows_score_as_volumes(plane, tmp_path):
    model = small_model(regions=BRATS_REGIONS)
    data = make_heads(shift=7)
    rows = make_trainer(model, data, tmp_path).eval_dataset
    processor = rows.format["format_kwargs"]["transform"].processor
    processor.plane = plane
    found = list(score_patients(model, processor, rows, batch_size=4))
    assert sorted(one.case_id for one in found) == ["a", "b"]
    for case_id, scores, doubt in found:
        own = sorted(
            (slice_index, row)
            for row, slice_index in enumerate(data["slice_index"])
            if data["case_id"][row] == case_id
        )
        examples = [rows[row] for _, row in own]
        with torch.inference_mode():
            outputs = [model(example["pixel_values"][None]) for example in examples]
        predicted = [processor.post_process_semantic_segmentation(out, target_sizes=[(64, 72)])[0] for out in outputs]
        thickness = 4 if case_id == "b" else 5
        spacing_mm = {"axial": (thickness, 1.5, 1), "coronal": (1.5, thickness, 1)}[plane]
        reference = np.stack([example["labels"].numpy() for example in examples])
        assert [index for index, labels in enumerate(reference) if labels.any()] == [3, 4, 5]
        expected = score_patient(np.stack(predicted), reference, BRATS_REGIONS, spacing_mm)
        assert scores == {region: pytest.approx(values, abs=1e-9) for region, values in expected.items()}
        assert 0 < scores["WT"]["volume_dice"] < 1
        assert "of the head was taken for tumour" in doubt
    assert [one.case_id for one in score_patients(model, processor, rows, case_ids=["a"])] == ["a"]


def test_the_head_is_counted_in_the_images_of_the_model(tmp_path):
    rows = make_trainer(small_model(), make_heads(), tmp_path).eval_dataset
    processor = rows.format["format_kwargs"]["transform"].processor
    batch = {"pixel_values": torch.stack([rows[index]["pixel_values"] for index in range(3)])}
    assert count_head(batch, [(64, 72)] * 3, processor) == pytest.approx(3 * 48 * 50, rel=0.05)
    window = {**batch, "pixel_mask": torch.ones(3, 64, 64).bool(), "crop_boxes": torch.tensor([[0, 0, 64, 32]] * 3)}
    assert count_head(window, [(64, 72)] * 3, processor) == 3 * 64 * 32


def test_slices_that_are_no_whole_heads_give_no_volumes():
    heads = make_heads()
    assert why_no_volumes(heads) is None
    assert why_no_volumes(make_slices()) == "the rows have no `head_boxes`"
    for keep, reason in (
        (lambda row: row["wt_pixels"] > 0, "the rows have no slice of . without tumour"),
        (lambda row: row["slice_index"] != 4, "slices of . are missing or there twice"),
        (lambda row: row["slice_index"] in (2, 3), "the rows have 2 slices of . alone"),
    ):
        assert re.fullmatch(reason, why_no_volumes(heads.filter(keep)))
