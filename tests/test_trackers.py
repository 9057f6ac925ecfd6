"""What TensorBoard, trackio and W&B get of a run, read back from their own files; of W&B by a stand-in."""

import importlib.machinery
import io
import logging
import os
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from common import small_model
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from scipy import ndimage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainingArguments

from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.finetuning.provenance import name_for_trackers
from sam2unet_hf.overlays import COLOURS, GAP, draw_outlines, image_to_show, side_by_side, stacked, to_rgb
from sam2unet_hf.patient_table import PatientTable
from sam2unet_hf.training import ImageRows, PredictionPicturesCallback, Sam2UNetTrainer, SegmentationTransform
from sam2unet_hf.training.trackers import begin_trackers, choose_rows, find_trackers, finish_trackers, log_patients


SIZE = 64  # pixels; pictures of it are enlarged four times
REGIONS = {"WT": [1, 2, 3], "ET": [3]}
# Case and half the side of the tumour, a square, of each row.
ROWS = [("b", 3), ("a", 10), ("a", 12), ("c", 0), ("b", 9), ("c", 5), ("d", 2), ("d", 1)]


def make_rows(columns=("t1ce", "flair"), facts=ROWS):
    images = {name: [] for name in (*columns, "mask")}
    generator = np.random.default_rng(0)
    for _, half in facts:
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[30 - half : 30 + half, 30 - half : 30 + half] = 2
        mask[30 - half // 2 : 30 + half // 2, 30 - half // 2 : 30 + half // 2] = 3
        for name in columns:
            images[name].append(Image.fromarray((60 * mask + generator.integers(0, 70, mask.shape)).astype(np.uint8)))
        images["mask"].append(Image.fromarray(mask))
    known = {"case_id": [case for case, _ in facts], "wt_pixels": [4 * half * half for _, half in facts]}
    types_ = {name: ImageFeature() for name in images} | {"case_id": Value("string"), "wt_pixels": Value("int32")}
    return ImageRows(Dataset.from_dict({**images, **known}, features=Features(types_)), list(columns))


def make_trainer(folder, report_to, **kwargs):
    torch.manual_seed(0)
    model = small_model(regions=REGIONS)
    processor = Sam2UNetImageProcessor(REGIONS, size={"height": SIZE, "width": SIZE})
    rows = make_rows(["flair"], ROWS[3:7])  # the patients c, b and d
    args = TrainingArguments(
        str(folder), remove_unused_columns=False, use_cpu=True, disable_tqdm=True, report_to=report_to,
        **{"max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1,
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "project": "tests", **kwargs},
    )  # fmt: skip
    return Sam2UNetTrainer(
        model,
        args,
        train_dataset=rows.with_transform(SegmentationTransform(processor)),
        eval_dataset=rows.with_transform(SegmentationTransform(processor, resize_masks=False)),
    )


@pytest.fixture(scope="module")
def trackio(tmp_path_factory):
    """The client, which chooses its folder when it is imported."""
    assert "trackio" not in sys.modules
    os.environ["TRACKIO_DIR"] = str(tmp_path_factory.mktemp("trackio"))
    import trackio
    from trackio import sqlite_storage

    yield types.SimpleNamespace(client=trackio, storage=sqlite_storage.SQLiteStorage)
    del os.environ["TRACKIO_DIR"]


def read_tensorboard(folder):
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def decode(encoded):
    with Image.open(io.BytesIO(encoded)) as picture:
        return np.asarray(picture.convert("RGB"))


def expected_picture(trainer, number):
    """A picture drawn by other means: outlines by erosion, the prediction by the documented lines of the card."""
    row = trainer.eval_dataset.with_transform(None)[number]
    processor = trainer.eval_dataset.transform.processor
    with torch.inference_mode():
        outputs = trainer.model.eval()(**processor(row["image"], return_tensors="pt"))
    (predicted,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(SIZE, SIZE)])
    panels = []
    for label_map in (np.asarray(row["mask"]), predicted.numpy()):
        grey = np.kron(np.asarray(row["image"]), np.ones((4, 4), np.uint8))
        panel = np.dstack([grey] * 3)
        for label_ids, colour in zip(REGIONS.values(), COLOURS, strict=False):
            mask = np.kron(np.isin(label_map, label_ids), np.ones((4, 4), bool)).astype(bool)
            panel[mask & ~ndimage.binary_erosion(mask)] = colour
        panels.append(panel)
    return np.concatenate([panels[0], np.full((4 * SIZE, GAP, 3), 255, np.uint8), panels[1]], axis=1)


def test_outlines_are_drawn_where_a_region_ends():
    label_map = np.zeros((5, 6), np.uint8)
    label_map[1:4, 1:4] = 1
    label_map[4, 5] = 2  # at the corner of the image: all of it is outline
    image = np.full((5, 6), 100, np.uint8)
    found = draw_outlines(image, label_map, {"a": [1], "b": [2]})
    expected = np.full((5, 6, 3), 100, np.uint8)
    expected[1:4, 1:4], expected[2, 2], expected[4, 5] = COLOURS[0], 100, COLOURS[1]
    np.testing.assert_array_equal(found, expected)
    assert draw_outlines(image, label_map, {"a": [1]}, scale=3).shape == (15, 18, 3)
    # The smaller region lies on the larger one, whatever their order.
    nested = draw_outlines(image, label_map, {"small": [1], "large": [1, 2]})
    assert tuple(nested[1, 1]) == COLOURS[0]
    np.testing.assert_array_equal(image, 100)

    wide = side_by_side([found, found[:3, :2]])
    assert wide.shape == (5, 6 + GAP + 2, 3)
    assert (wide[3:, 6:] == 255).all()
    assert stacked([found, found[:3, :2]]).shape == (5 + GAP + 3, 6, 3)
    np.testing.assert_array_equal(to_rgb(np.array([[1000.0, 3000.0]]))[0, :, 1], [0, 255])
    np.testing.assert_array_equal(to_rgb(np.array([[7.0, 7.0]])), 0)


def test_chosen_rows_are_the_largest_slices_of_patients_from_large_to_small():
    rows = make_rows()
    assert choose_rows(rows, 4) == [2, 4, 5, 6]  # a 12, b 9, c 5, d 2
    assert choose_rows(rows, 9) == [2, 4, 5, 6]
    assert choose_rows(rows, 2) == [2, 6]
    assert choose_rows(rows, 1) == [2]
    photographs = ImageRows(rows.rows.remove_columns(["case_id", "wt_pixels"]), ["flair"])
    assert choose_rows(photographs, 3) == [0, 4, 7]


def test_a_run_in_tensorboard_and_trackio_goes_on_under_its_name(trackio, tmp_path, capsys, monkeypatch):
    def run(checkpoint=None):
        trainer = make_trainer(tmp_path / "run", ["tensorboard", "trackio"])
        begin_trackers(trainer, "tumour 1", checkpoint)
        trainer.add_callback(PredictionPicturesCallback(trainer, count=3, share=True))
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.evaluate()
        table = PatientTable()
        for patient, dice in (("p", 0.75), ("q", 0.25)):
            table.add(patient, {"WT": {"volume_dice": dice, "hausdorff95_mm": 8 * dice}})
        log_patients(trainer, table, "test")
        finish_trackers(trainer)
        return trainer

    trainer = run()
    folder = tmp_path / "run" / "runs" / "tumour 1"
    before = read_tensorboard(folder)
    again = run(str(tmp_path / "run" / "checkpoint-2"))
    for name, weights in trainer.model.state_dict().items():
        assert torch.equal(weights, again.model.state_dict()[name]), name
    events = read_tensorboard(folder)

    # Pictures change nothing of a training, and nothing is predicted where nobody looks at it.
    plain = make_trainer(tmp_path / "plain", "none", eval_strategy="no", save_strategy="no")
    callback = PredictionPicturesCallback(plain)
    monkeypatch.setattr(callback, "draw", lambda: pytest.fail("nobody looks at it"))
    plain.train()
    callback.on_evaluate(plain.args, plain.state, plain.control, metrics={"eval_loss": 1.0})
    for name, weights in plain.model.state_dict().items():
        assert torch.equal(weights, again.model.state_dict()[name]), name

    # Values are those of the log, steps after the checkpoint are there once.
    history = again.state.log_history
    for tag, key in (
        ("train/loss", "loss"),
        ("eval/dice_ET", "eval_dice_ET"),
        ("eval/patient_dice", "eval_patient_dice"),
    ):
        expected = [(entry["step"], pytest.approx(entry[key], rel=1e-6)) for entry in history if key in entry]
        assert len(expected) >= 3
        assert [(event.step, event.value) for event in events.Scalars(tag)] == expected, tag
    patients = {
        "mean_volume_dice": 0.5,
        "worst_volume_dice": 0.25,
        "mean_hausdorff95_mm": 4,
        "worst_hausdorff95_mm": 6,
    }
    for name, value in patients.items():
        assert events.Scalars(f"test/patients_{name}_WT")[-1].value == value

    # Pictures are those of the three patients, by the model of that time.
    tags = [f"eval/prediction_{number}" for number in (1, 2, 3)]
    assert events.Tags()["images"] == tags == before.Tags()["images"]
    pictures = {
        tag: [(image.step, decode(image.encoded_image_string)) for image in events.Images(tag)] for tag in tags
    }
    for tag, number in zip(tags, [1, 2, 3], strict=True):
        assert [step for step, _ in pictures[tag]] == [2, 4, 4]
        np.testing.assert_array_equal(pictures[tag][-1][1], expected_picture(again, number))
        np.testing.assert_array_equal(pictures[tag][1][1], pictures[tag][2][1])
    assert any((pictures[tag][0][1] != pictures[tag][1][1]).any() for tag in tags)

    # trackio has both parts in one run.
    (record,) = trackio.client.Api().runs("tests")
    assert record.name == "tumour 1"
    logs = trackio.storage.get_logs("tests", "tumour 1")
    assert [entry["train/global_step"] for entry in logs if "train/loss" in entry] == [1, 2, 3, 4, 3, 4]
    found = [entry["eval/dice"] for entry in logs if "eval/dice" in entry]
    parts = trainer.state.log_history, [entry for entry in history if entry["step"] == 4]
    assert found == [entry["eval_dice"] for part in parts for entry in part if "eval_dice" in entry]
    assert {f"test/patients_{name}_WT": value for name, value in patients.items()}.items() <= logs[-1].items()
    drawn = [entry for entry in logs if tags[0] in entry]
    assert [entry["train/global_step"] for entry in drawn] == [2, 4, 4, 4, 4]
    for tag in tags:
        path = Path(os.environ["TRACKIO_DIR"], "media", drawn[-1][tag]["file_path"])
        np.testing.assert_array_equal(decode(path.read_bytes()), pictures[tag][-1][1])
    assert "* Resumed existing run: tumour 1" in capsys.readouterr().out


class StandIn(types.ModuleType):
    """The functions of W&B that are called, with the signatures of its reference, which notes what it gets."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.run, self.logged, self.ended = None, [], []
        self.config = self

    def init(self, entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, resume=None):
        self.run = types.SimpleNamespace(id=id, name=name, project=project, resume=resume, summary={}, _label=dict)

    def update(self, values, allow_val_change=None):
        pass

    def __setitem__(self, name, value):
        pass

    def log(self, data, step=None, commit=None):
        assert self.run is not None
        self.logged.append(data)

    def finish(self, exit_code=None, quiet=None):
        self.ended.append(self.run.id)
        self.run = None

    class Image:
        def __init__(
            self, data_or_path, mode=None, caption=None, grouping=None, classes=None, boxes=None, masks=None,
            file_type=None, normalize=True,
        ):  # fmt: skip
            assert isinstance(data_or_path, Image.Image)
            self.pixels, self.caption = np.asarray(data_or_path), caption


@pytest.fixture
def wandb(monkeypatch):
    stand_in = StandIn()
    errors = types.ModuleType("wandb.sdk.lib.config_util")
    errors.ConfigError = type("ConfigError", (Exception,), {})
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for name in ("wandb.sdk", "wandb.sdk.lib"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, errors.__name__, errors)
    return stand_in


@pytest.mark.parametrize("share", [True, False])
def test_wandb_gets_pictures_only_if_they_may_leave_the_machine(wandb, tmp_path, share):
    trainer = make_trainer(tmp_path, "wandb", max_steps=1, eval_steps=1)
    begin_trackers(trainer, "a b/c")
    assert vars(wandb.run).items() >= {"project": "tests", "name": "a b/c", "id": "a-b-c", "resume": "allow"}.items()
    trainer.add_callback(PredictionPicturesCallback(trainer, count=1, share=share))
    trainer.train()
    finish_trackers(trainer)
    assert wandb.ended == ["a-b-c"]
    (scores,) = [data for data in wandb.logged if "eval/dice" in data]
    (expected,) = [entry for entry in trainer.state.log_history if "eval_dice" in entry]
    assert scores["eval/dice"] == expected["eval_dice"]
    pictures = [data for data in wandb.logged if "eval/prediction_1" in data]
    assert len(pictures) == share
    if share:
        assert pictures[0]["train/global_step"] == 1
        np.testing.assert_array_equal(pictures[0]["eval/prediction_1"].pixels, expected_picture(trainer, 1))


def test_a_push_does_not_publish_a_trackio_project_that_holds_pictures(trackio, tmp_path, monkeypatch):
    synced = []

    def sync(project, space_id, **options):
        """Note what a Space would get: all that lies in the project."""
        synced.append((space_id, trackio.storage.get_logs(project, "a"), trackio.storage.get_logs(project, "b")))
        return space_id

    monkeypatch.setattr(trackio.client, "sync", sync)

    def run(name, share=False, **options):
        trainer = make_trainer(
            tmp_path / name, "trackio", project="patients", eval_steps=1, save_strategy="no", max_steps=1, **options
        )
        begin_trackers(trainer, name)
        trainer.add_callback(PredictionPicturesCallback(trainer, count=1, share=share))
        trainer.train()
        trackio.client.context_vars.current_project.set("patients")  # as it is until the run ends
        callback = find_trackers(trainer).trackio
        callback.on_push_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
        finish_trackers(trainer)
        return trainer

    # A run that shares nothing, then one on the same project whose scores are to be published.
    assert run("a").args.trackio_static_space_id is False  # transformers would make a public Space of the project
    assert synced == []
    run("b", trackio_static_space_id="me/scores")
    ((space, *logs),) = synced
    assert space == "me/scores"
    assert not [key for log in logs for entry in log for key in entry if "prediction" in key]
    assert not list(Path(os.environ["TRACKIO_DIR"], "media").glob("patients/**/*.*"))
    for log in logs:
        assert [entry for entry in log if "eval/dice" in entry]

    # Pictures that may be shared do not make a Space of what other runs logged.
    assert run("c", share=True).args.trackio_static_space_id is False
    assert len(synced) == 1
    assert [entry for entry in trackio.storage.get_logs("patients", "c") if "eval/prediction_1" in entry]
    assert list(Path(os.environ["TRACKIO_DIR"], "media").glob("patients/**/*.*"))


def test_rows_that_cannot_be_drawn_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, "none")
    for rows in (trainer.eval_dataset.with_transform(None), [1, 2]):
        with pytest.raises(ValueError, match="`rows` must be `ImageRows` with masks and a `SegmentationTransform`"):
            PredictionPicturesCallback(trainer, rows)
    with pytest.raises(ValueError, match="`count` must be at least 1, got 0. Leave the callback out"):
        PredictionPicturesCallback(trainer, count=0)
    assert image_to_show(trainer.eval_dataset.with_transform(None)[0]["image"], ["flair"]).shape == (SIZE, SIZE)


def test_a_run_has_the_name_that_is_given_or_that_it_had_before_it_was_stopped(tmp_path):
    args = types.SimpleNamespace(run_name=None, output_dir=str(tmp_path / "brats-folds" / "fold_0"))
    assert re.fullmatch(r"brats-folds-fold_0-\d{8}-\d{6}", name_for_trackers(None, args))
    args.output_dir = str(tmp_path / "runs" / "brats")
    assert re.fullmatch(r"brats-\d{8}-\d{6}", name_for_trackers(None, args))
    checkpoint = tmp_path / "checkpoint-2"
    (tmp_path / "run.json").write_text('{"training_arguments": {"run_name": "before"}}')
    assert name_for_trackers(str(checkpoint), args) == "before"
    (tmp_path / "run.json").write_text('{"training_arguments": {}}')  # of a run that reported to nothing
    assert name_for_trackers(str(checkpoint), args).startswith("brats-")
    args.run_name = "mine"
    assert name_for_trackers(str(checkpoint), args) == "mine"


def test_split_weights_give_no_pictures(tmp_path, caplog):
    trainer = make_trainer(tmp_path, "tensorboard")
    trainer.is_fsdp_enabled = True
    with caplog.at_level(logging.WARNING):
        callback = PredictionPicturesCallback(trainer)
    assert "Trackers get no pictures, because each process holds a part of the weights." in caplog.text
    callback.draw = lambda: pytest.fail("the others would wait")
    callback.on_evaluate(trainer.args, trainer.state, trainer.control, metrics={"eval_loss": 1.0})
