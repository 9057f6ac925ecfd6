import numpy as np
import pytest
import torch
from common import BRATS_REGIONS, small_model
from datasets import Dataset, Features, Image
from PIL import Image as PILImage
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers import TrainingArguments

from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.metrics import Accumulator
from sam2unet_hf.training import Sam2UNetTrainer, SegmentationMetrics, SegmentationTransform, collate
from sam2unet_hf.training.augmentation import augmentation


SIZES = [(70, 64), (64, 80), (90, 66), (64, 64), (100, 72)]


def make_rows(sizes):
    """Images of the given sizes with nested squares."""
    generator = np.random.default_rng(0)
    images, masks = [], []
    for height, width in sizes:
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[20:50, 15:45], mask[25:45, 20:40], mask[30:40, 25:35] = 2, 1, 3
        images.append(PILImage.fromarray((60 * mask + generator.integers(0, 60, mask.shape)).astype(np.uint8)))
        masks.append(PILImage.fromarray(mask))
    features = Features({"image": Image(), "mask": Image()})
    return Dataset.from_dict({"image": images, "mask": masks}, features=features)


@pytest.fixture(scope="module")
def rows():
    return make_rows(SIZES)


def make_trainer(model, rows, tmp_path, batch_norm_images=0, ema_decay=0.0, trainable_only=False, **kwargs):
    processor = Sam2UNetImageProcessor(regions=model.config.regions, size={"height": 64, "width": 64})
    arguments = TrainingArguments(
        tmp_path, remove_unused_columns=False, use_cpu=True, report_to="none", disable_tqdm=True, **kwargs
    )
    return Sam2UNetTrainer(
        model,
        arguments,
        batch_norm_images=batch_norm_images,
        ema_decay=ema_decay,
        trainable_only=trainable_only,
        train_dataset=rows.with_transform(SegmentationTransform(processor, augment=augmentation("flips"))),
        eval_dataset=rows.with_transform(SegmentationTransform(processor, resize_masks=False)),
    )


def logits_of(mask: torch.Tensor) -> torch.Tensor:
    """Scores whose sigmoid is 0.75 in the mask and 0.25 outside."""
    return (mask.float() * 2 - 1) * torch.tensor(3.0).log()


def scores_of(logits, labels, model):
    metrics = SegmentationMetrics(list(model.config.regions))
    accumulator = Accumulator()
    for scores in metrics.score(logits, labels, model):
        accumulator.add(scores)
    return accumulator.result(metrics.regions)


def test_scores_by_hand():
    model = small_model(regions=BRATS_REGIONS)
    truth = torch.zeros(4, 4, dtype=torch.long)
    truth[0, :] = 2  # WT is 4 pixels, TC and ET are empty
    wt, tc = torch.zeros(4, 4), torch.zeros(4, 4)
    wt[:2, :2] = 1  # 4 pixels, 2 of them right: Dice 4/8, IoU 2/6
    tc[3, 3] = 1  # 1 pixel where there is none: 0 and 0
    logits = logits_of(torch.stack([wt, tc, torch.zeros(4, 4)]))[None]
    scores = scores_of(logits, truth[None], model)
    # Errors: 0.25 where right and 0.75 where wrong; WT is wrong at 4 of 16 pixels, TC at 1, ET nowhere.
    expected = {
        "dice_WT": 0.5,
        "dice_TC": 0.0,
        "dice_ET": 1.0,  # both empty
        "dice": 0.5,
        "iou_WT": 1 / 3,
        "mae_WT": 24 / 64,
        "mae_TC": 18 / 64,
        "mae_ET": 16 / 64,
        "s_measure_ET": 0.75,
    }
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_scores_leave_out_ignored_pixels():
    model = small_model()
    truth = torch.zeros(4, 4, dtype=torch.long)
    truth[:2] = 1
    truth[:, 2:] = model.config.ignore_index
    predicted = torch.ones(4, 4)
    predicted[2:, :2] = 0
    scores = scores_of(logits_of(predicted)[None, None], truth[None], model)
    cropped = scores_of(logits_of(predicted[:, :2])[None, None], truth[None, :, :2], model)
    assert (scores["dice"], scores["iou"]) == (1.0, 1.0)
    assert scores["mae"] == pytest.approx(0.25, abs=1e-6)
    neighbours = ("s_measure", "weighted_f_beta")
    assert {k: v for k, v in scores.items() if not k.startswith(neighbours)} == {
        k: v for k, v in cropped.items() if not k.startswith(neighbours)
    }


def test_an_image_of_ignored_pixels_counts_for_nothing():
    model = small_model()
    truth = torch.zeros(2, 4, 4, dtype=torch.long)
    truth[0, :2] = 1
    truth[1] = model.config.ignore_index
    logits = logits_of(torch.ones(2, 1, 4, 4))
    assert scores_of(logits, truth, model) == scores_of(logits[:1], truth[:1], model)


def test_scores_are_computed_at_the_size_of_the_mask():
    model = small_model()
    truth = torch.zeros(8, 12, dtype=torch.long)
    truth[:, :6] = 1
    logits = logits_of(torch.tensor([[1, 0], [1, 0]]))[None, None]
    upsampled = torch.nn.functional.interpolate(logits, size=(8, 12), mode="bilinear", align_corners=False)
    expected = scores_of(upsampled, truth[None], model)
    assert scores_of(logits, [truth], model) == expected
    assert expected["dice"] == 1


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
    output = SegmentationTransform(processor, augment=augmentation("flips"))(rows)
    for pixel_values, labels in zip(output["pixel_values"], output["labels"], strict=True):
        assert torch.equal(pixel_values[0] > 0, labels == 1)
    assert len({tuple(labels.nonzero()[0].tolist()) for labels in output["labels"]}) == 4


def picture_with_head(channels, left=70, top=9):
    """A head of 50 x 40 pixels in a slice of 96 x 128, dark inside; its mask, and the box of the whole head."""
    generator = np.random.default_rng(left)
    image, mask = np.zeros((channels, 96, 128), np.uint8), np.zeros((96, 128), np.uint8)
    image[:, top : top + 50, left : left + 40] = generator.integers(1, 255, (channels, 50, 40))
    mask[top + 5 : top + 20, left + 8 : left + 15] = 3
    picture = PILImage.fromarray(image[0]) if channels == 1 else tv_tensors.Image(torch.from_numpy(image))
    return picture, PILImage.fromarray(mask), [left - 6, top - 9, left + 44, top + 55]


@pytest.mark.parametrize("channels", [1, 6])
@pytest.mark.parametrize("window", [(64, 64), (96, 128), (128, 64)])  # two of them larger than the slice
def test_the_window_lies_about_the_box_of_the_head(channels, window):
    processor = Sam2UNetImageProcessor(
        num_channels=max(channels, 3),
        neighbours=int(channels == 6),
        head_crop_size=dict(zip(("height", "width"), window, strict=True)),
    )
    image, mask, box = picture_with_head(channels)
    rows = {"image": [image], "mask": [mask], "head_box": [box]}
    expected = processor.preprocess([image], [mask], head_boxes=[box], return_tensors="pt")
    in_training = SegmentationTransform(processor)(rows)
    assert sorted(in_training) == ["labels", "pixel_values"]
    assert torch.equal(in_training["pixel_values"][0], expected["pixel_values"][0])
    assert torch.equal(in_training["labels"][0], expected["labels"][0])
    scored = SegmentationTransform(processor, resize_masks=False)(rows)
    assert scored["labels"][0].shape == (96, 128)
    for name in ("pixel_values", "crop_boxes", "pixel_mask"):
        assert torch.equal(scored[name][0], expected[name][0])
        batch = collate([{key: values[0] for key, values in scored.items()}] * 2)
        assert torch.equal(batch[name][1], expected[name][0])
    alone = SegmentationTransform(processor, mask_column=None)(rows)
    assert torch.equal(alone["crop_boxes"][0], expected["crop_boxes"][0])


@pytest.mark.parametrize("has_box", [True, False])
@pytest.mark.parametrize("channels", [1, 6])
@pytest.mark.parametrize("left", [70, 8])  # 8: the window reaches beyond the slice
def test_the_window_is_cut_out_before_an_image_is_turned(channels, left, has_box):
    processor = Sam2UNetImageProcessor(
        num_channels=max(channels, 3), head_crop_size={"height": 96, "width": 64}, neighbours=int(channels == 6)
    )
    image, mask, box = picture_with_head(channels, left)
    rows = {"image": [image] * 16, "mask": [mask] * 16} | ({"head_box": [box] * 16} if has_box else {})
    plain = SegmentationTransform(processor)(rows)
    ways = [(), (-1,), (-2,), (-1, -2)]
    expected = [[value[0].flip(way) for value in (plain["pixel_values"], plain["labels"])] for way in ways]
    torch.manual_seed(0)
    flipped = SegmentationTransform(processor, augment=augmentation("flips"))(rows)
    seen = set()
    for pixel_values, labels in zip(flipped["pixel_values"], flipped["labels"], strict=True):
        equal = [torch.equal(pixel_values, one) and torch.equal(labels, other) for one, other in expected]
        seen.add(equal.index(True))
    assert seen == {0, 1, 2, 3}


def test_a_head_larger_than_the_window_is_turned_before_it_is_scaled_down():
    processor = Sam2UNetImageProcessor(head_crop_size={"height": 64, "width": 64})
    image, mask, _ = picture_with_head(1)
    rows = {"image": [image], "mask": [mask], "head_box": [[50, 0, 128, 96]]}
    plain = SegmentationTransform(processor)(rows)
    flipped = SegmentationTransform(processor, augment=v2.RandomHorizontalFlip(p=1))(rows)
    torch.testing.assert_close(flipped["pixel_values"][0], plain["pixel_values"][0].flip(-1), atol=1e-2, rtol=0)
    assert (flipped["labels"][0] == plain["labels"][0].flip(-1)).float().mean() > 0.98
    assert flipped["labels"][0].sum() > 0


def test_changes_of_an_image_depend_on_seed_epoch_and_image_alone():
    generator = np.random.default_rng(0)
    pictures = [PILImage.fromarray(generator.integers(0, 255, (64, 64), dtype=np.uint8)) for _ in range(12)]
    rows = {"image": pictures, "mask": [PILImage.new("L", (64, 64))] * 12}
    transform = SegmentationTransform(
        Sam2UNetImageProcessor(size={"height": 64, "width": 64}), augment=augmentation("flips", "noise")
    )

    def images(epoch, seed=0, order=1):
        transform.set_epoch(epoch, seed)
        found = transform({name: column[::order] for name, column in rows.items()})["pixel_values"]
        return torch.stack(found[::order])

    first = images(0)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(images(0, order=-1), first)
    assert torch.equal(torch.get_rng_state(), state)
    for other in (images(1), images(0, seed=1)):
        assert sum(not torch.equal(*pair) for pair in zip(first, other, strict=True)) > 6


def test_a_run_resumed_within_an_epoch_sees_the_same_images(rows, tmp_path):
    """Even though the loader was one batch ahead when the checkpoint was written."""
    options = {"max_steps": 5, "per_device_train_batch_size": 1, "eval_strategy": "no", "save_strategy": "steps"}
    options |= {"save_steps": 2, "load_best_model_at_end": False, "learning_rate": 1e-2}
    runs = []
    for folder, checkpoint in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-2"))):
        torch.manual_seed(3)
        trainer = make_trainer(small_model(regions=BRATS_REGIONS), rows, tmp_path / folder, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append(trainer.model.state_dict())
    for name, weight in runs[0].items():
        assert torch.equal(weight, runs[1][name]), name


def test_transform_maps_labels_at_once():
    transform = SegmentationTransform(Sam2UNetImageProcessor(), label_mapping={255: 1, 1: 2})
    mask = np.array([[0, 255], [1, 3]], dtype=np.uint8)
    assert transform.to_label_ids(PILImage.fromarray(mask)).tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(("batch_size", "by_batch"), [(1, True), (2, True), (5, True), (2, False)])
def test_evaluation_of_mixed_sizes_equals_scoring_image_by_image(rows, tmp_path, batch_size, by_batch):
    model = small_model(regions=BRATS_REGIONS)
    trainer = make_trainer(model, rows, tmp_path, per_device_eval_batch_size=batch_size, batch_eval_metrics=by_batch)
    metrics = trainer.evaluate()
    accumulator = Accumulator()
    for row in trainer.eval_dataset:
        with torch.inference_mode():
            logits = model(row["pixel_values"][None]).logits
        accumulator.add(trainer.compute_metrics.score(logits, row["labels"][None], model)[0])
    expected = accumulator.result(list(BRATS_REGIONS))
    assert len(expected) == 19 * 4
    assert trainer.compute_metrics.names() == list(expected)
    assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert np.isfinite(metrics["eval_loss"])
    assert trainer.compute_metrics.image_dice.shape == (len(SIZES), 3)
    assert trainer.compute_metrics.image_dice.mean() == pytest.approx(metrics["eval_dice"])


def test_an_evaluation_that_broke_off_leaves_nothing_behind(rows, tmp_path):
    trainer = make_trainer(small_model(), rows, tmp_path, per_device_eval_batch_size=1, batch_eval_metrics=True)
    expected = trainer.evaluate()
    step, calls = trainer.prediction_step, []

    def broken_step(*args, **kwargs):
        calls.append(0)
        if len(calls) == 3:
            raise RuntimeError("killed")
        return step(*args, **kwargs)

    trainer.prediction_step = broken_step
    with pytest.raises(RuntimeError, match="killed"):
        trainer.evaluate()
    again = trainer.evaluate()
    assert {name: again[name] for name in expected if "dice" in name} == {
        name: value for name, value in expected.items() if "dice" in name
    }
    assert len(trainer.compute_metrics.image_dice) == len(SIZES)


def test_other_compute_metrics_get_logits_and_labels(rows, tmp_path):
    same_size = rows.select([3])
    trainer = make_trainer(small_model(), same_size, tmp_path)
    trainer.compute_metrics = lambda prediction: {
        "shape": prediction.predictions.shape[-1],
        "labels": int(prediction.label_ids.max()),
    }
    metrics = trainer.evaluate()
    assert (metrics["eval_shape"], metrics["eval_labels"]) == (64, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric_for_best_model": "dise"}, "such as dice.*got dise"),
        ({"metric_for_best_model": "eval_dice_ED"}, "such as dice_.*got dice_ED"),
        ({"metric_for_best_model": "mae_WT"}, "`greater_is_better` must be False .* mae_WT, got True"),
    ],
)
def test_a_best_metric_that_cannot_be_raises_at_once(rows, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(small_model(regions=BRATS_REGIONS), rows, tmp_path, **arguments)
    make_trainer(small_model(regions=BRATS_REGIONS), rows, tmp_path, metric_for_best_model="max_e_measure_WT")


def test_best_metric_of_several_evaluation_sets_names_the_set(rows, tmp_path):
    def trainer(best, **kwargs):
        arguments = TrainingArguments(
            tmp_path, remove_unused_columns=False, use_cpu=True, metric_for_best_model=best, **kwargs
        )
        return Sam2UNetTrainer(small_model(), arguments, train_dataset=rows, eval_dataset={"a": rows, "b": rows})

    trainer("eval_a_dice")
    trainer("b_mae", greater_is_better=False)
    with pytest.raises(ValueError, match="such as .*got c_dice"):
        trainer("c_dice")
    with pytest.raises(ValueError, match="`greater_is_better` must be False .* b_mae"):
        trainer("eval_b_mae")


def test_two_steps_move_the_trainable_weights_alone(rows, tmp_path):
    model = small_model(regions=BRATS_REGIONS)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = make_trainer(model, rows, tmp_path, max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3)
    assert np.isfinite(trainer.train().training_loss)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_mixed_precision_is_for_training_whatever_was_scored_before(rows, tmp_path):
    model, seen = small_model(regions=BRATS_REGIONS), set()
    options = {"bf16": True, "max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no"}
    trainer = make_trainer(model, rows, tmp_path, eval_strategy="steps", eval_steps=1, **options)
    conv = model.decode_head.receptive_field_blocks[0].shortcut.conv
    conv.register_forward_hook(lambda module, inputs, output: seen.add((model.training, output.dtype)))
    in_training = {(True, torch.bfloat16), (False, torch.bfloat16)}
    for run, expected in [(trainer.evaluate, {(False, torch.float32)}), (trainer.train, in_training)] * 2:
        seen.clear()
        run()
        assert seen == expected


def test_a_loss_that_is_no_number_ends_the_training_at_once(rows, tmp_path):
    trainer = make_trainer(small_model(), rows, tmp_path, max_steps=9, learning_rate=1e30, warmup_steps=0)
    with pytest.raises(
        FloatingPointError, match=r"The loss is nan at step [2-8]. Lower `learning_rate` \(1e\+30\), or"
    ):
        trainer.train()
    assert not trainer.state.log_history


@pytest.mark.parametrize("name", ["remove_unused_columns", "prediction_loss_only", "dataloader_persistent_workers"])
def test_arguments_that_would_drop_images_or_scores_raise(rows, tmp_path, name):
    arguments = TrainingArguments(tmp_path, use_cpu=True, **{"remove_unused_columns": False, name: True})
    with pytest.raises(ValueError, match=f"`{name}` must be False"):
        Sam2UNetTrainer(small_model(), arguments, train_dataset=rows)


def test_last_batches_are_dropped_in_training_alone(rows, tmp_path):
    options = {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3, "dataloader_drop_last": True}
    trainer = make_trainer(small_model(), rows, tmp_path, **options)
    assert len(rows) % 3
    assert len(trainer.get_train_dataloader()) == len(rows) // 3
    trainer.evaluate()
    assert len(trainer.compute_metrics.image_dice) == len(rows)


def test_what_leaves_nothing_to_train_on_is_refused(rows, tmp_path):
    options = {"dataloader_drop_last": True, "per_device_train_batch_size": len(rows)}
    make_trainer(small_model(), rows, tmp_path, **options)
    with pytest.raises(ValueError, match="`dataloader_drop_last` leaves nothing .* 5 training images, .* takes 6"):
        make_trainer(small_model(), rows, tmp_path, **{**options, "per_device_train_batch_size": 6})


def test_label_smoothing_is_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="`label_smoothing_factor` must be 0 for SAM2-UNet, .* got 0.1"):
        make_trainer(small_model(), rows, tmp_path, label_smoothing_factor=0.1)


def test_resuming_what_is_finished_warns(rows, tmp_path, caplog):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(small_model(), rows, tmp_path, **options).train()
    assert "Nothing is left to train" not in caplog.text
    make_trainer(small_model(), rows, tmp_path, **options).train(resume_from_checkpoint=True)
    assert "Nothing is left to train: the checkpoint is at step 2, and 2 steps are asked for" in caplog.text


def test_an_incomplete_checkpoint_is_not_resumed_from(rows, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(small_model(), rows, tmp_path, **options).train()
    (tmp_path / "checkpoint-1" / "optimizer.pt").unlink()
    trainer = make_trainer(small_model(), rows, tmp_path, **options)
    with pytest.raises(ValueError, match=r"checkpoint-1` is not complete, .*: no optimizer\*"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


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
        model, rows, tmp_path, max_steps=20, per_device_train_batch_size=5, learning_rate=2e-2, logging_steps=1
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
