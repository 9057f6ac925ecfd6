"""The comparison of systems: each behind the same interface, trained and scored alike by patients, and resumable."""

import csv
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import small_backbone_config, small_config
from torch import nn


pytest.importorskip("segmentation_models_pytorch")
pytest.importorskip("monai")

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
import compare_models  # noqa: E402 - the scripts are no package
import nnunet_files  # noqa: E402
import systems  # noqa: E402
from baselines import build_baseline, instances, load_baseline  # noqa: E402

from dataset_scripts.phantom import write_phantom_cohort  # noqa: E402
from sam2unet_hf import Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor  # noqa: E402
from sam2unet_hf.cases_sam2unet import find_cases  # noqa: E402
from sam2unet_hf.metrics.volume_functional import count_voxels, dice  # noqa: E402
from sam2unet_hf.scans_sam2unet import read_volume  # noqa: E402
from sam2unet_hf.training import SegmentationMetrics  # noqa: E402


REGIONS = {"WT": [1, 2, 3], "ET": [3]}
BASELINES = [key for key in systems.SYSTEMS if key != "sam2unet" and key not in systems.CONFIGURATIONS]


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
    model = build_baseline(system, REGIONS, num_channels=4)
    pixel_values = torch.randn(2, 4, 72, 100)
    assert model.train()(pixel_values, labels=torch.ones(2, 72, 100, dtype=torch.long)).loss.requires_grad
    with torch.no_grad():
        in_training = model(pixel_values)
        output = model.eval()(pixel_values, labels=[torch.ones(40, 50).long(), torch.ones(72, 100).long()])
    for logits in (in_training.logits, output.logits):
        assert logits.shape == (2, 2, 72, 100)
        assert logits.isfinite().all()
    assert output.loss.isfinite()


# A step of Mask R-CNN takes ten times as long.
@pytest.mark.parametrize(
    "system",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "maskrcnn")) for name in ["sam2unet", *BASELINES]],
)
def test_loss_falls_where_the_image_shows_the_region(system):
    torch.manual_seed(0)
    if system == "sam2unet":
        model = Sam2UNetForSemanticSegmentation(small_config(regions={"WT": [1]}))
    else:
        model = build_baseline(system, {"WT": [1]}, num_channels=1 if system == "maskrcnn" else 3)
    num_channels = model.config.backbone_config.num_channels
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=5e-4 if system == "maskrcnn" else 2e-3, fused=True)
    losses = []
    for step in range(9):
        labels = torch.zeros(2, 64, 64, dtype=torch.long)
        labels[0, 10 + step : 40, 20:50] = labels[1, 5:30, 4 * step : 50] = 1
        images = (2.0 * labels[:, None] + 0.3 * torch.randn(2, 1, 64, 64)).expand(-1, num_channels, -1, -1)
        loss = model(pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])


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


def test_a_baseline_is_loaded_as_it_was_saved_and_finds_nothing_outside_the_window(tmp_path):
    regions = {"ET": [3], "WT": [1, 2, 3]}  # not in the order of the alphabet, in which JSON files have keys
    model = build_baseline("unet", dict(reversed(regions.items())), num_channels=4, iou_over_batch=True).eval()
    model.save_pretrained(tmp_path)
    loaded = load_baseline(tmp_path)
    assert list(loaded.config.regions) == ["WT", "ET"]
    assert loaded.config.iou_over_batch
    images, inside = torch.randn(1, 4, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    inside[:, :30] = True
    boxes = torch.tensor([[0, 0, 64, 64]])
    with torch.no_grad():
        found = loaded(images, pixel_mask=inside, crop_boxes=boxes)
        expected = model(images).logits
    assert torch.equal(found.logits[:, :, :30], expected[:, :, :30])
    assert (found.logits[:, :, 30:] < -100).all()
    assert found.crop_boxes is boxes


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


# A whole comparison


@pytest.fixture(scope="module")
def brats_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison") / "brats"
    write_phantom_cohort(folder, 4, (32, 32, 21))
    return folder


def small_network(system, num_regions, num_channels, weights):
    return nn.Sequential(
        nn.Conv2d(num_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, num_regions, 1)
    )


@pytest.fixture(scope="module")
def quick():
    """Make systems and images small, and measure in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sam2unet_hf.configuration_sam2unet.preset_backbone_config",
            lambda preset, num_channels: small_backbone_config(num_channels=num_channels),
        )
        patch.setattr("baselines.build_network", small_network)
        # Drawing takes as long as training.
        patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **kwargs: Path(path).touch())
        patch.setattr(systems, "WARMUP_STEPS", 1)
        patch.setattr(systems, "TIMED_STEPS", 1)
        patch.setattr(systems.SliceSystem, "measure", systems.measure_steps)
        paper = [*compare_models.DEFAULTS["paper"], "--image_size", "64", "--min_tumor_pixels", "1"]
        patch.setitem(compare_models.DEFAULTS, "paper", paper)
        yield patch


def arguments(brats_dir, *options):
    words = ["--brats_dir", str(brats_dir), "--output_dir", str(brats_dir.parent / "out"), "--folds", "2"]
    words += ["--steps", "2", "--use_cpu", "--disable_tqdm", "true", "--batch_norm_images", "4", "--bf16", "false"]
    return [*words, "--per_device_train_batch_size", "4", "--regions", "WT=1,2,3", "ET=3", *options]


@pytest.fixture(scope="module")
def compared(brats_dir, quick):
    """Two systems with the input of the volume recipe and one with the paper's, fold by fold; their folder."""
    out, volume = brats_dir.parent / "out", ["--recipe", "volume", "--systems", "sam2unet", "unet"]
    compare_models.main(arguments(brats_dir, *volume, "--fold", "1"))
    assert not (out / "comparison.md").exists()  # there is no table of some of the patients
    compare_models.main(arguments(brats_dir, *volume))
    compare_models.main(arguments(brats_dir, "--recipe", "paper", "--systems", "unet"))
    return out


PROCESSED = ("volume/sam2unet", "volume/unet", "paper/unet")


def test_all_systems_are_judged_by_the_patients_that_they_were_not_trained_on(compared, brats_dir):
    folds = json.loads((compared / "comparison.json").read_text())["folds"]
    cases = {case.case_id: case for case in find_cases(brats_dir)}
    assert sorted(sum(folds.values(), [])) == sorted(cases)
    for system in PROCESSED:
        for fold, names in folds.items():
            folder = compared / system / fold
            known = json.loads((folder / "splits.json").read_text())
            assert not {*known["train"]} & {*names}
            rows = list(csv.DictReader((folder / "patients.csv").open()))
            assert [(row["patient"], row["region"]) for row in rows] == [(n, r) for n in names for r in REGIONS]
            for row in rows:
                found = read_volume(folder / "segmentations" / f"{row['patient']}.nii.gz").voxels
                reference = cases[row["patient"]].read_mask().voxels
                masks = (np.isin(volume, REGIONS[row["region"]]) for volume in (found, reference))
                assert float(row["volume_dice"]) == pytest.approx(dice(count_voxels(*masks)))


def test_systems_of_slices_see_the_input_of_the_recipe(compared):
    made = {system: Sam2UNetImageProcessor.from_pretrained(compared / system / "fold_0") for system in PROCESSED}
    assert made["volume/sam2unet"].head_crop_size == made["volume/unet"].head_crop_size is not None
    assert made["volume/unet"].neighbours == 1
    assert made["paper/unet"].head_crop_size is None
    assert made["paper/unet"].size == {"height": 64, "width": 64}
    runs = [json.loads((compared / system / "fold_0" / "run.json").read_text())["arguments"] for system in PROCESSED]
    assert [(run["ema_decay"], run["iou_over_batch"], run["foreground_share"]) for run in runs] == [
        *2 * [(0.99, True, 0.67)],
        (0.0, None, None),
    ]
    config = load_baseline(compared / "volume" / "unet" / "fold_0").config
    assert config.iou_over_batch
    assert config.num_channels == 3


def test_a_comparison_that_has_finished_is_not_run_again_and_others_are_refused(compared, brats_dir, monkeypatch):
    """The same folder takes the same comparison, of the same data, alone."""

    def never(*args, **kwargs):
        raise AssertionError("run again")

    monkeypatch.setattr(systems, "run_training", never)
    monkeypatch.setattr(systems, "Sam2UNetVolumePipeline", never)
    monkeypatch.setattr(systems.SliceSystem, "measure", never)
    both = ["--recipe", "volume", "paper", "--systems", "sam2unet", "unet"]
    with pytest.raises(AssertionError, match="run again"):  # SAM2-UNet with the paper's input is missing
        compare_models.main(arguments(brats_dir, *both))
    volume = arguments(brats_dir, "--recipe", "volume", "--systems", "sam2unet", "unet")
    compare_models.main(volume)
    report = (compared / "comparison.md").read_text()
    assert "4 patients in 2 folds of 2, 2" in report
    with (compared / "comparison.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["region"] == "WT"]
    first, scores = ([row for row in rows if row["system"] == name] for name in ("sam2unet", "unet"))
    means = [np.mean([float(row["volume_dice"]) for row in scores if row["fold"] == fold]) for fold in "01"]
    assert [row["patient"] for row in first] == [row["patient"] for row in scores]
    gains = [float(row["volume_dice"]) - float(base["volume_dice"]) for row, base in zip(scores, first, strict=True)]
    gain = f"{np.mean(gains):+.3f} ({np.std(gains, ddof=1) / len(gains) ** 0.5:.3f})"
    assert f"| U-Net | volume | {np.mean(means):.3f} | {np.std(means, ddof=1):.3f} | {gain} |" in report
    with pytest.raises(SystemExit, match="with other options: mirrors=own"):
        compare_models.main([*volume, "--mirrors", "all"])
    with pytest.raises(SystemExit, match="with other folds: .*--output_dir"):
        compare_models.main([*volume, "--split_seed", "1"])
    with pytest.raises(SystemExit, match="run with other values of learning_rate"):
        compare_models.main([*volume, "--learning_rate", "1e-4", "unet=1e-3"])
    note = json.loads((compared / "comparison.json").read_text())
    note["data"]["volume"][0] = "another scan"
    (compared / "comparison.json").write_text(json.dumps(note))
    with pytest.raises(SystemExit, match="with other data: volume="):
        compare_models.main(volume)


def test_a_fold_that_was_stopped_goes_on_without_training_a_step_again(compared, brats_dir, tmp_path, monkeypatch):
    """Training, segmenting and scoring each go on where they were."""
    shutil.copytree(compared / "volume" / "unet", tmp_path / "volume" / "unet")
    folder = tmp_path / "volume" / "unet" / "fold_1"
    before = (folder / "patients.csv").read_bytes()
    (folder / "patients.json").unlink()
    stopped, seconds = next(iter(json.loads((folder / "seconds.json").read_text()).items()))
    (folder / "seconds.json").write_text(json.dumps({stopped: seconds}))
    monkeypatch.setattr(systems, "run_training", None)
    note = json.loads((compared / "comparison.json").read_text())
    cases = {case.case_id: case for case in find_cases(brats_dir)}
    folds = [[cases[name] for name in fold] for fold in note["folds"].values()]
    task = systems.Task(tmp_path, folds, ["flair"], REGIONS, "cpu", "own", None)
    system = systems.SliceSystem("unet", "volume", task, [])
    system.run(1, 2)
    assert (folder / "patients.csv").read_bytes() == before
    assert json.loads((folder / "seconds.json").read_text())[stopped] == seconds


def test_minutes_become_steps():
    task = systems.Task(Path("nowhere"), [], ["flair"], REGIONS, "cpu", "own", None)
    assert systems.steps_in(0.05, 0.5) == 6
    assert systems.steps_in(0.001, 0.5) == 1
    assert systems.SliceSystem("unet", "volume", task, []).folder == Path("nowhere/volume/unet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of the arguments --minutes --steps is required"),
        (["--steps", "0"], "--steps must be above 0, got 0"),
        (["--minutes", "5", "--learning_rate", "1e-4", "net=1e-3"], "--learning_rate takes one number"),
        (["--minutes", "5", "--learning_rate", "1e-4", "1e-3"], "--learning_rate takes one number"),
        (["--minutes", "5", "--folds", "1"], "--folds must be at least 2, got 1"),
        (["--minutes", "5", "--fold", "3"], "--fold must be from 0 to 2, got 3"),
        (["--minutes", "5", "--max_steps", "5"], "--max_steps is an option of run_segmentation.py"),
        (["--minutes", "5", "--dataset_name", "slices"], "--dataset_name is an option of run_segmentation.py"),
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit):
        compare_models.parse_args(options)
    assert message in capsys.readouterr().err


def test_learning_rate_of_one_system():
    args, words = compare_models.parse_args(["--steps", "5", "--learning_rate", "1e-4", "unet=1e-3", "--bf16"])
    assert [compare_models.learning_rate(args, system) for system in ("unet", "resunet")] == [1e-3, 1e-4]
    assert words == ["--bf16"]
    args, _ = compare_models.parse_args(["--steps", "5"])
    assert compare_models.learning_rate(args, "unet") is None


# nnU-Net


def test_nnunet_has_labels_without_gaps_and_regions_from_the_outermost_inward():
    assert nnunet_files.describe_labels({"WT": [1, 2, 3]}) == {"labels": {"background": 0, "WT": 1}}
    nested = nnunet_files.describe_labels({"ET": [3], "WT": [1, 2, 3, 4], "TC": [1, 3]})
    assert nested["labels"] == {"background": 0, "WT": [1, 2, 3], "TC": [2, 3], "ET": 3}
    assert nested["regions_class_order"] == [1, 2, 3]
    assert nnunet_files.describe_labels({"A": [2], "B": [5]}) == {"labels": {"background": 0, "A": 1, "B": 2}}


def test_label_maps_go_to_nnunet_and_back(brats_dir, tmp_path):
    regions = {"WT": [1, 2, 3], "ET": [3]}
    (case, *others) = find_cases(brats_dir)
    nnunet_files.write_raw(tmp_path, [case], ["t2", "flair"], regions)
    raw = tmp_path / "raw" / nnunet_files.DATASET
    scan = read_volume(raw / "imagesTr" / f"{case.case_id}_0001.nii.gz")
    assert np.array_equal(scan.voxels, case.read_images(["flair"])[0].voxels)
    found = nnunet_files.read_segmentation(raw / "labelsTr" / f"{case.case_id}.nii.gz", regions)
    reference = case.read_mask().to_file_grid(case.read_mask().voxels)
    for label_ids in regions.values():
        assert np.array_equal(np.isin(found, label_ids), np.isin(reference, label_ids))
    assert set(np.unique(found)) == {0, 1, 3}


def test_nnunet_is_named_where_it_is_not_installed(brats_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(nnunet_files, "is_installed", lambda: False)
    options = ["--systems", "nnunet_2d", "--recipe", "volume", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="nnunet_2d needs nnunetv2. Install it with"):
        compare_models.main(arguments(brats_dir, *options))


@pytest.mark.skipif(not nnunet_files.is_installed(), reason="needs nnunetv2")
def test_nnunet_is_trained_and_judged_like_the_others(brats_dir, tmp_path):
    options = ["--systems", "nnunet_2d", "--recipe", "volume", "--nnunet_memory_gb", "0.2", "--mirrors", "none"]
    options += ["--output_dir", str(tmp_path), "--steps", "2"]
    compare_models.main(arguments(brats_dir, *options, "--fold", "0"))
    folder = tmp_path / "own" / "nnunet_2d"
    splits = json.loads(
        (tmp_path / "nnunet" / "preprocessed" / nnunet_files.DATASET / "splits_final.json").read_text()
    )
    names = json.loads((tmp_path / "comparison.json").read_text())["folds"]
    assert [split["val"] for split in splits] == list(names.values())
    rows = json.loads((folder / "fold_0" / "patients.json").read_text())["patients"]
    assert [(row["patient"], row["region"]) for row in rows] == [(n, r) for n in names["fold_0"] for r in REGIONS]
    checkpoint = torch.load(
        next((tmp_path / "nnunet" / "results").rglob("checkpoint_final.pth")), weights_only=False, map_location="cpu"
    )
    assert checkpoint["current_epoch"] == 2
    assert json.loads((folder / "costs.json").read_text())["steps"] == 2
