"""The comparison of six systems: each behind the same interface, trained and scored alike, and resumable."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import transformers
from common import small_backbone_config
from PIL import Image


pytest.importorskip("segmentation_models_pytorch")
pytest.importorskip("monai")

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
import compare_models  # noqa: E402 - the scripts are no package
from baselines import build_baseline, instances  # noqa: E402

from dataset_scripts.brats_slices import BratsSlices  # noqa: E402
from dataset_scripts.brats_slices.__main__ import write_dataset  # noqa: E402
from dataset_scripts.phantom import write_phantom_cohort  # noqa: E402
from sam2unet_hf.training import SegmentationMetrics  # noqa: E402


REGIONS = {"WT": [1, 2, 3], "ET": [3]}
BASELINES = [system for system in compare_models.SYSTEMS if system != "sam2unet"]


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    """A data set of a phantom."""
    folder = tmp_path_factory.mktemp("slices")
    write_phantom_cohort(folder / "brats", 6, (64, 64, 42))
    builder = BratsSlices(data_dir=str(folder / "brats"), slices="tumor", min_tumor_pixels=20)
    write_dataset(builder, folder / "parquet")
    return str(folder / "parquet")


def arguments(slices, *options):
    small = ["--image_size", "64", "--batch_size", "2", "--use_cpu", "--learning_rate", "1e-3", "--warmup", "0"]
    return ["--data", slices, *small, *options]


def label_maps():
    """Two images; the second has a ring with a core, a spot that touches nothing, and one that touches by a corner."""
    labels = torch.zeros(2, 64, 96, dtype=torch.long)
    labels[1, 10:30, 20:50] = 2
    labels[1, 15:20, 30:40] = 3
    labels[1, 30, 50] = 1
    labels[1, 60, 90:96] = 1
    return labels


@pytest.mark.parametrize("system", BASELINES)
def test_baseline_gives_one_channel_per_region_at_the_size_of_the_input(system):
    model = build_baseline(system, REGIONS)
    pixel_values = torch.randn(2, 3, 72, 100)
    assert model.train()(pixel_values, labels=torch.ones(2, 72, 100, dtype=torch.long)).loss.requires_grad
    with torch.no_grad():
        in_training = model(pixel_values)
        output = model.eval()(pixel_values, labels=[torch.ones(40, 50).long(), torch.ones(72, 100).long()])
    for logits in (in_training.logits, output.logits):
        assert logits.shape == (2, 2, 72, 100)
        assert logits.isfinite().all()
    assert output.loss.isfinite()


def test_patients_in_two_splits_are_refused_unless_allowed(slices, tmp_path):
    rows = datasets.load_dataset(slices)["train"]
    for split in ("train", "validation", "test"):
        rows.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    with pytest.raises(SystemExit, match=r"Patient Phantom_\d+ is in the splits train .* --allow_leaks"):
        compare_models.ComparisonData(compare_models.parse_args(arguments(str(tmp_path))))
    data = compare_models.ComparisonData(compare_models.parse_args(arguments(str(tmp_path), "--allow_leaks")))
    assert len(data.splits["test"]) == len(rows)


def test_three_modalities_are_the_three_channels_of_all_systems(slices, capsys):
    modalities = ["t1ce", "t2", "flair"]
    data = compare_models.ComparisonData(compare_models.parse_args(arguments(slices, "--modalities", *modalities)))
    row, image = data.splits["test"][0], data.images["test"][0]["image"]
    assert np.array_equal(image, np.stack([row[name] for name in modalities]))
    assert next(data.training_batches(2))["pixel_values"].shape[1] == 3
    example = data.examples[0]
    shown = data.splits["test"][example.row]
    assert np.array_equal(example.image, np.asarray(shown["flair"]))
    assert data.image_title == "image (flair)"
    with pytest.raises(SystemExit):
        compare_models.parse_args(arguments(slices, "--modalities", "t1ce", "t2"))
    assert "--modalities takes one modality or three, got t1ce t2" in capsys.readouterr().err


@pytest.mark.parametrize("system", list(compare_models.SYSTEMS))
def test_loss_falls_on_the_phantom(system, slices):
    args = compare_models.parse_args(arguments(slices))
    data = compare_models.ComparisonData(args)
    transformers.set_seed(0)
    model = compare_models.build_model(args, system, data.regions).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4 if system == "maskrcnn" else 2e-3, fused=True)
    losses = []
    for _, batch in zip(range(12), data.training_batches(args.batch_size), strict=False):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


@pytest.mark.parametrize("system", BASELINES)
def test_a_perfect_network_scores_dice_1(system, monkeypatch):
    labels = label_maps()
    model = build_baseline(system, REGIONS).eval()
    masks, _ = model.region_masks(labels)
    if system == "maskrcnn":
        found = [instances(image) for image in masks]
        detections = [
            {
                "masks": one["masks"][:, None].float(),
                "labels": one["labels"],
                "scores": torch.full((len(one["labels"]),), 0.9),
            }
            for one in found
        ]
        monkeypatch.setattr(model.network, "forward", lambda images: detections)
    else:
        monkeypatch.setattr(model.network, "forward", lambda images: 20 * masks - 10)
    output = model(torch.zeros(2, 3, 64, 96), labels=labels)
    metrics = SegmentationMetrics(list(REGIONS))
    scores = metrics.score(output.logits, labels, model)
    result = metrics(SimpleNamespace(predictions=scores, label_ids=np.zeros(len(scores))))
    assert result["dice_WT"] == result["dice_ET"] == 1
    assert output.loss < 0.35


def test_instances_are_connected_components():
    model = build_baseline("unet", REGIONS)
    empty, filled = (instances(masks) for masks in model.region_masks(label_maps())[0])
    assert empty["boxes"].shape == (0, 4)
    assert empty["masks"].shape == (0, 64, 96)
    # The spot at the corner of the ring belongs to it, and a box ends behind its last pixel.
    assert filled["boxes"].tolist() == [[20, 10, 51, 31], [90, 60, 96, 61], [30, 15, 40, 20]]
    assert filled["labels"].tolist() == [1, 1, 2]
    assert filled["masks"].sum(dim=(1, 2)).tolist() == [20 * 30 + 1, 6, 50]


def test_mask_rcnn_weights_its_masks_by_their_scores(monkeypatch):
    model = build_baseline("maskrcnn", REGIONS).eval()
    masks = torch.zeros(3, 1, 64, 64)
    masks[0, 0, :40], masks[1, 0, 30:], masks[2, 0, :, :10] = 0.8, 1.0, 1.0
    scores, labels = torch.tensor([1.0, 0.5, 0.25]), torch.tensor([1, 1, 2])
    monkeypatch.setattr(
        model.network, "forward", lambda images: [{"masks": masks, "scores": scores, "labels": labels}]
    )
    first, second = model(torch.zeros(1, 3, 64, 64)).logits[0].sigmoid()
    assert first[[0, 35, 60], 20].tolist() == pytest.approx([0.8, 0.8, 0.5], abs=1e-5)
    assert second[0, [5, 20]].tolist() == pytest.approx([0.25, 0], abs=1e-5)


def test_minutes_become_steps_and_a_finished_system_is_not_run_again(slices, tmp_path, monkeypatch):
    """One comparison of two systems, from the data to the tables."""
    monkeypatch.setattr(compare_models, "time_step", lambda *args: 0.5)
    monkeypatch.setattr(
        "sam2unet_hf.configuration_sam2unet.preset_backbone_config",
        lambda preset, num_channels: small_backbone_config(num_channels=num_channels),
    )
    measured = []

    def measure_here(command, **kwargs):
        measured.append(command[-1])
        costs = compare_models.measure(compare_models.parse_args(command[2:]), command[-1])
        return SimpleNamespace(returncode=0, stdout=json.dumps(costs))

    monkeypatch.setattr(compare_models.subprocess, "run", measure_here)
    argv = arguments(slices, "--systems", "sam2unet", "unet", "--minutes", "0.05", "--evaluations", "2")
    argv += ["--output_dir", str(tmp_path / "out")]
    compare_models.main(argv)
    assert measured == ["sam2unet", "unet"]
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| U-Net | 24.44 M | 24.44 M |" in text
    assert text.count(" | 6 | ") == 2  # 0.05 minutes of 0.5 s
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    assert [row["system"] for row in rows] == ["sam2unet", "unet"]
    for row in rows:
        assert row["steps"] == "6"
        assert 0 < float(row["paper_mean_dice"]) < 1
        assert f"| {float(row['plain_dice']):.3f} | {float(row['plain_iou']):.3f} |" in text
    for picture in ("comparison.png", "learning_curves.png", "systems.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 10_000

    def never(*args, **kwargs):
        raise AssertionError("run again")

    monkeypatch.setattr(compare_models.Sam2UNetTrainer, "train", never)
    compare_models.main(argv)
    assert (tmp_path / "out" / "comparison.md").read_text() == text
    with pytest.raises(SystemExit, match="other values of image_size: image_size=64"):
        compare_models.main([*argv, "--image_size", "96"])


@pytest.fixture
def rebuilt(tmp_path, monkeypatch):
    """Arguments of a comparison that does no work, and a function that changes a test image."""
    folder = tmp_path / "slices"
    for number, split in enumerate(("train", "validation", "test")):
        for kind, value in (("images", 50 * number + 10), ("masks", 255)):
            (folder / split / kind).mkdir(parents=True)
            image = np.zeros((16, 16), dtype=np.uint8)
            image[4:8] = value
            Image.fromarray(image).save(folder / split / kind / "0.png")
            if split == "train":  # as many as a batch takes
                Image.fromarray(image[:, :12]).save(folder / split / kind / "1.png")
    monkeypatch.setattr(compare_models, "measure_costs", lambda *args: {"steps": 1})
    monkeypatch.setattr(compare_models, "run", lambda *args: None)
    monkeypatch.setattr(compare_models, "write_report", lambda *args: None)

    def rebuild():
        path = folder / "test" / "images" / "0.png"
        Image.open(path).rotate(90).save(path)

    return arguments(str(folder), "--output_dir", str(tmp_path / "out")), rebuild


def test_data_rebuilt_under_the_same_name_is_refused(rebuilt, tmp_path):
    argv, rebuild = rebuilt
    compare_models.main([*argv, "--systems", "unet"])
    path = tmp_path / "out" / "unet" / "arguments.json"
    noted = path.read_text()
    assert list(json.loads(noted)["fingerprints"]) == ["train", "validation", "test"]
    compare_models.main([*argv, "--systems", "unet"])
    rebuild()
    with pytest.raises(SystemExit, match="/unet holds a run on other data: .* the split test. .* --output_dir"):
        compare_models.main([*argv, "--systems", "resunet", "unet"])
    # Nothing is noted of a comparison that was refused.
    assert path.read_text() == noted
    assert not (tmp_path / "out" / "resunet").exists()


def test_a_comparison_that_noted_no_data_goes_on(rebuilt, tmp_path, caplog):
    argv, rebuild = rebuilt
    argv += ["--systems", "unet"]
    compare_models.main(argv)
    path = tmp_path / "out" / "unet" / "arguments.json"
    noted = json.loads(path.read_text())
    del noted["fingerprints"]
    path.write_text(json.dumps(noted))
    compare_models.main(argv)
    assert "does not tell which data" in caplog.text
    rebuild()
    with pytest.raises(SystemExit, match="other data"):
        compare_models.main(argv)


def test_arguments_are_checked_before_data_is_read_and_measuring_checks_none(rebuilt, monkeypatch):
    argv, _ = rebuilt
    argv += ["--systems", "unet"]
    compare_models.main(argv)

    def never(*args):
        raise AssertionError("slow work")

    monkeypatch.setattr(compare_models, "fingerprint", never)
    monkeypatch.setattr(compare_models, "measure", lambda *args: {})
    compare_models.main([*argv, "--measure", "unet"])
    monkeypatch.setattr(compare_models, "ComparisonData", never)
    with pytest.raises(SystemExit, match="other values of image_size"):
        compare_models.main([*argv, "--image_size", "96"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning_rate", "1e-4", "net=1e-3"], "--learning_rate takes one number"),
        (["--learning_rate", "unet=1e-3"], "--learning_rate takes one number"),
        (["--batch_size", "1"], "--batch_size must be at least 2, got 1"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--evaluations", "0"], "--evaluations must be at least 1, got 0"),
        (["--image_size", "32"], "--image_size must be at least 64, got 32"),
        (["--num_workers", "-1"], "--num_workers must be at least 0, got -1"),
        (["--augmentation", "none", "flips"], "--augmentation takes none and strong alone, got none flips"),
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit):
        compare_models.parse_args(options)
    assert message in capsys.readouterr().err


def test_a_batch_larger_than_the_training_images_is_refused(rebuilt):
    argv, _ = rebuilt
    with pytest.raises(SystemExit, match="--batch_size 4 is more than there are training images, 2. Lower it."):
        compare_models.main([*argv, "--batch_size", "4"])
    assert not Path(argv[argv.index("--output_dir") + 1]).exists()


def test_learning_rate_of_one_system():
    args = compare_models.parse_args(["--learning_rate", "1e-4", "unet=1e-3"])
    assert [compare_models.learning_rate(args, system) for system in ("unet", "resunet")] == [1e-3, 1e-4]


def test_a_comparison_stopped_while_scoring_trains_no_step_again(slices, tmp_path, monkeypatch):
    argv = arguments(slices, "--systems", "sam2unet", "--steps", "4", "--evaluations", "4")
    args = compare_models.parse_args([*argv, "--output_dir", str(tmp_path)])
    data = compare_models.ComparisonData(args)
    trainer_class, folder = compare_models.Sam2UNetTrainer, tmp_path / "sam2unet" / "seed-0"
    evaluate, training_step = trainer_class.evaluate, trainer_class.training_step
    trained, stops = [], [True, False]

    def evaluate_or_stop(self, *positional, metric_key_prefix="eval", **options):
        if metric_key_prefix == "test" and stops.pop(0):
            raise KeyboardInterrupt
        # The first checkpoint is the best one.
        found = evaluate(self, *positional, metric_key_prefix=metric_key_prefix, **options)
        return {**found, "eval_dice": 1 / self.state.global_step} if metric_key_prefix == "eval" else found

    def train_and_count(self, *positional):
        trained.append(self.state.global_step)
        return training_step(self, *positional)

    monkeypatch.setattr(trainer_class, "evaluate", evaluate_or_stop)
    monkeypatch.setattr(trainer_class, "training_step", train_and_count)
    with pytest.raises(KeyboardInterrupt):
        compare_models.run(args, data, "sam2unet", 0, 4)
    assert trained == [0, 1, 2, 3]
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-4"]
    stops.append(False)
    compare_models.run(args, data, "sam2unet", 0, 4)
    assert trained == [0, 1, 2, 3]
    result = json.loads((folder / "result.json").read_text())
    assert result["best_step"] == 1
    assert [entry["step"] for entry in result["curve"] if "eval_dice" in entry] == [1, 2, 3, 4]
    assert not list(folder.glob("checkpoint-*"))


@pytest.mark.slow
def test_a_comparison_killed_three_times_ends_like_one_that_was_not(slices, tmp_path):
    options = ["--systems", "sam2unet", "unet", "--steps", "8", "--evaluations", "4", "--seeds", "0", "1"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}

    def start(folder):
        command = [sys.executable, str(EXAMPLES / "compare_models.py"), *arguments(slices, *options)]
        log = (tmp_path / "log").open("a")
        return subprocess.Popen([*command, "--output_dir", str(folder)], env=environment, stdout=log, stderr=log)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    # While the first system trains, after its last step, and in another seed of the second system.
    points = ("sam2unet/seed-0/checkpoint-2", "sam2unet/seed-0/checkpoint-8", "unet/seed-1/checkpoint-4")
    for point in points:
        process = start(killed)
        deadline = time.monotonic() + 300
        while not (killed / point).exists():
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (killed / "comparison.md").exists()
    assert start(killed).wait() == 0
    assert (killed / "comparison.csv").read_text() == (whole / "comparison.csv").read_text()
