import numpy as np
import pytest
import torch
from common import BRATS_REGIONS, small_model
from datasets import Dataset, Features, Image
from PIL import Image as PILImage
from transformers import TrainingArguments

from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.training import Sam2UNetTrainer, SegmentationTransform, collate, flips, image_metrics


SIZES = [(70, 64), (64, 80), (90, 66), (64, 64), (100, 72)]


@pytest.fixture(scope="module")
def rows():
    """Five images of different sizes with nested squares."""
    generator = np.random.default_rng(0)
    images, masks = [], []
    for height, width in SIZES:
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[20:50, 15:45], mask[25:45, 20:40], mask[30:40, 25:35] = 2, 1, 3
        images.append(PILImage.fromarray((60 * mask + generator.integers(0, 60, mask.shape)).astype(np.uint8)))
        masks.append(PILImage.fromarray(mask))
    features = Features({"image": Image(), "mask": Image()})
    return Dataset.from_dict({"image": images, "mask": masks}, features=features)


def make_trainer(model, rows, tmp_path, batch_norm_images=0, **kwargs):
    processor = Sam2UNetImageProcessor(regions=model.config.regions, size={"height": 64, "width": 64})
    arguments = TrainingArguments(
        tmp_path, remove_unused_columns=False, use_cpu=True, report_to="none", disable_tqdm=True, **kwargs
    )
    return Sam2UNetTrainer(
        model,
        arguments,
        batch_norm_images=batch_norm_images,
        train_dataset=rows.with_transform(SegmentationTransform(processor, augment=flips())),
        eval_dataset=rows.with_transform(SegmentationTransform(processor, resize_masks=False)),
    )


def logits_of(mask: torch.Tensor) -> torch.Tensor:
    """Scores whose sigmoid is 0.75 in the mask and 0.25 outside."""
    return (mask.float() * 2 - 1) * torch.tensor(3.0).log()


def test_image_metrics_by_hand():
    model = small_model(regions=BRATS_REGIONS)
    truth = torch.zeros(4, 4, dtype=torch.long)
    truth[0, :] = 2  # WT is 4 pixels, TC and ET are empty
    wt, tc = torch.zeros(4, 4), torch.zeros(4, 4)
    wt[:2, :2] = 1  # 4 pixels, 2 of them right: Dice 4/8, IoU 2/6
    tc[3, 3] = 1  # 1 pixel where there is none: 0 and 0
    logits = logits_of(torch.stack([wt, tc, torch.zeros(4, 4)]))[None]
    scores = image_metrics(logits, truth[None], model)
    # Errors: 0.25 where right and 0.75 where wrong; WT is wrong at 4 of 16 pixels, TC at 1, ET nowhere.
    expected = [[0.5, 1 / 3, (12 + 12) / 64], [0.0, 0.0, (15 + 3) / 64], [1.0, 1.0, 16 / 64]]
    torch.testing.assert_close(scores, torch.tensor([expected], dtype=torch.float32), atol=1e-6, rtol=0)


def test_image_metrics_leave_out_ignored_pixels():
    model = small_model()
    truth = torch.zeros(4, 4, dtype=torch.long)
    truth[:2] = 1
    truth[:, 2:] = model.config.ignore_index
    predicted = torch.ones(4, 4)
    predicted[2:, :2] = 0
    (scores,) = image_metrics(logits_of(predicted)[None, None], truth[None], model)
    torch.testing.assert_close(scores, torch.tensor([[1.0, 1.0, 0.25]], dtype=torch.float32), atol=1e-6, rtol=0)


def test_image_metrics_are_computed_at_the_size_of_the_mask():
    model = small_model()
    truth = torch.zeros(8, 12, dtype=torch.long)
    truth[:, :6] = 1
    logits = logits_of(torch.tensor([[1, 0], [1, 0]]))[None, None]
    upsampled = torch.nn.functional.interpolate(logits, size=(8, 12), mode="bilinear", align_corners=False)
    expected = image_metrics(upsampled, truth[None], model)
    torch.testing.assert_close(image_metrics(logits, [truth], model), expected)
    assert expected[0, 0, 0] == 1


def test_collate_keeps_labels_of_different_sizes_apart():
    images = torch.zeros(3, 8, 8)
    same = collate([{"pixel_values": images, "labels": torch.zeros(4, 5)}] * 2)
    assert same["labels"].shape == (2, 4, 5)
    mixed = collate([{"pixel_values": images, "labels": torch.zeros(size)} for size in [(4, 5), (6, 7)]])
    assert mixed["pixel_values"].shape == (2, 3, 8, 8)
    assert [tuple(label.shape) for label in mixed["labels"]] == [(4, 5), (6, 7)]


def test_transform_flips_image_and_mask_together():
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[5:20, 40:60] = 1
    rows = {"image": [PILImage.fromarray(mask * 255)] * 16, "mask": [PILImage.fromarray(mask)] * 16}
    processor = Sam2UNetImageProcessor(size={"height": 64, "width": 64})
    torch.manual_seed(0)
    output = SegmentationTransform(processor, augment=flips())(rows)
    for pixel_values, labels in zip(output["pixel_values"], output["labels"], strict=True):
        assert torch.equal(pixel_values[0] > 0, labels == 1)
    assert len({tuple(labels.nonzero()[0].tolist()) for labels in output["labels"]}) == 4


def test_transform_maps_labels_at_once():
    transform = SegmentationTransform(Sam2UNetImageProcessor(), label_mapping={255: 1, 1: 2})
    mask = np.array([[0, 255], [1, 3]], dtype=np.uint8)
    assert transform.read_mask(PILImage.fromarray(mask)).tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_evaluation_of_mixed_sizes_equals_scoring_image_by_image(rows, tmp_path, batch_size):
    model = small_model(regions=BRATS_REGIONS)
    trainer = make_trainer(model, rows, tmp_path, per_device_eval_batch_size=batch_size)
    metrics = trainer.evaluate()
    scores = []
    for row in trainer.eval_dataset:
        with torch.inference_mode():
            logits = model(row["pixel_values"][None]).logits
        scores.append(image_metrics(logits, row["labels"][None], model)[0])
    expected = torch.stack(scores).mean(dim=0)
    assert metrics["eval_dice"] == pytest.approx(expected[:, 0].mean().item(), abs=1e-6)
    assert metrics["eval_iou_TC"] == pytest.approx(expected[1, 1].item(), abs=1e-6)
    assert metrics["eval_mae"] == pytest.approx(expected[:, 2].mean().item(), abs=1e-6)
    assert {f"eval_{name}_{region}" for name in ("dice", "iou", "mae") for region in BRATS_REGIONS} <= metrics.keys()
    assert np.isfinite(metrics["eval_loss"])


def test_two_steps_move_the_trainable_weights_alone(rows, tmp_path):
    model = small_model(regions=BRATS_REGIONS)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = make_trainer(model, rows, tmp_path, max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3)
    assert np.isfinite(trainer.train().training_loss)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("name", ["remove_unused_columns", "prediction_loss_only", "batch_eval_metrics"])
def test_arguments_that_would_drop_images_or_scores_raise(rows, tmp_path, name):
    arguments = TrainingArguments(tmp_path, use_cpu=True, **{"remove_unused_columns": False, name: True})
    with pytest.raises(ValueError, match=f"`{name}` must be False"):
        Sam2UNetTrainer(small_model(), arguments, train_dataset=rows)


def test_batch_norm_is_estimated_on_training_images_before_each_evaluation(rows, tmp_path):
    model = small_model(freeze_encoder=False)
    trainer = make_trainer(
        model,
        rows,
        tmp_path,
        batch_norm_images=5,
        num_train_epochs=2,
        eval_strategy="epoch",
        save_strategy="no",
        per_device_train_batch_size=1,
        per_device_eval_batch_size=5,
        learning_rate=1e-2,
    )
    trainer.train()
    norm = model.decode_head.receptive_field_blocks[3].shortcut.norm
    # One batch of all five images: its own statistics, but for the flips and the unbiased variance.
    features = []
    hook = model.decode_head.receptive_field_blocks[3].shortcut.conv.register_forward_hook(
        lambda module, inputs, output: features.append(output)
    )
    trainer.estimate_batch_norm()
    hook.remove()
    torch.testing.assert_close(norm.running_mean, features[0].mean(dim=(0, 2, 3)))
    torch.testing.assert_close(norm.running_var, features[0].var(dim=(0, 2, 3)))
    assert norm.momentum == 0.1

    calls = []
    trainer.estimate_batch_norm = lambda: calls.append(trainer.state.epoch)
    trainer.train()
    assert calls == [1, 2, 2]
    trainer.evaluate()
    assert calls == [1, 2, 2]


def test_training_learns(rows, tmp_path):
    model = small_model(regions=BRATS_REGIONS, freeze_encoder=False)
    trainer = make_trainer(
        model, rows, tmp_path, max_steps=40, per_device_train_batch_size=5, learning_rate=3e-3, logging_steps=1
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
