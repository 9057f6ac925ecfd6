"""Patients: sums of an evaluation over their slices, and their volumes."""

import numpy as np
import pytest
import torch
from common import BRATS_REGIONS, small_model
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from test_training import make_trainer

from sam2unet_hf.metrics import score_volume
from sam2unet_hf.training import SegmentationMetrics
from sam2unet_hf.training.evaluation import losses_of_images
from sam2unet_hf.training.patients import PatientRows, add_up, find_patients, score_sums


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
