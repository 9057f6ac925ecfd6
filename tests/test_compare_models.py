"""The comparison of systems: each behind the same interface, trained and scored alike by patients, and resumable."""

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import small_backbone_config, small_config


pytest.importorskip("segmentation_models_pytorch")
pytest.importorskip("monai")

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
import compare_models  # noqa: E402 - the scripts are no package
import nnunet  # noqa: E402
import systems  # noqa: E402
from baselines import build_baseline, instances, load_baseline  # noqa: E402

from dataset_scripts.phantom import write_phantom_cohort  # noqa: E402
from sam2unet_hf import Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor  # noqa: E402
from sam2unet_hf.cases_sam2unet import find_cases  # noqa: E402
from sam2unet_hf.metrics.volume_functional import count_voxels, dice  # noqa: E402
from sam2unet_hf.scans_sam2unet import read_volume  # noqa: E402
from sam2unet_hf.training import SegmentationMetrics  # noqa: E402
from sam2unet_hf.volume import Sam2UNetVolumePipeline  # noqa: E402


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


@pytest.mark.parametrize("system", ["sam2unet", *BASELINES])
def test_loss_falls_where_the_image_shows_the_region(system):
    torch.manual_seed(0)
    if system == "sam2unet":
        model = Sam2UNetForSemanticSegmentation(small_config(regions={"WT": [1]}))
    else:
        model = build_baseline(system, {"WT": [1]}, num_channels=1 if system == "maskrcnn" else 3)
    num_channels = model.config.backbone_config.num_channels
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=5e-4 if system == "maskrcnn" else 2e-3, fused=True)
    losses = []
    for step in range(12):
        labels = torch.zeros(2, 64, 64, dtype=torch.long)
        labels[0, 10 + step : 40, 20:50] = labels[1, 5:30, 3 * step : 50] = 1
        images = (2.0 * labels[:, None] + 0.3 * torch.randn(2, 1, 64, 64)).expand(-1, num_channels, -1, -1)
        loss = model(pixel_values=images, labels=labels).loss
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
    write_phantom_cohort(folder, 4, (40, 40, 26))
    return folder


@pytest.fixture(scope="module")
def quick():
    """Make systems and images small, and measure in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sam2unet_hf.configuration_sam2unet.preset_backbone_config",
            lambda preset, num_channels: small_backbone_config(num_channels=num_channels),
        )
        patch.setattr(systems, "WARMUP_STEPS", 1)
        patch.setattr(systems, "TIMED_STEPS", 1)
        patch.setattr(systems.SliceSystem, "measure", systems.measure_steps)
        patch.setitem(compare_models.DEFAULTS, "paper", [*compare_models.DEFAULTS["paper"], "--image_size", "64"])
        yield patch


def arguments(brats_dir, *options):
    words = ["--brats_dir", str(brats_dir), "--output_dir", str(brats_dir.parent / "out"), "--folds", "2"]
    words += ["--steps", "2", "--use_cpu", "--disable_tqdm", "true", "--batch_norm_images", "4", "--bf16", "false"]
    return [*words, "--per_device_train_batch_size", "4", "--regions", "WT=1,2,3", "ET=3", *options]


@pytest.fixture(scope="module")
def compared(brats_dir, quick):
    """Two systems with the input of the volume recipe and one with the paper's, fold by fold; their folder."""
    out, volume = brats_dir.parent / "out", ["--recipe", "volume", "--systems", "sam2unet", "maskrcnn"]
    compare_models.main(arguments(brats_dir, *volume, "--fold", "1"))
    assert not (out / "comparison.md").exists()  # there is no table of some of the patients
    compare_models.main(arguments(brats_dir, *volume))
    compare_models.main(arguments(brats_dir, "--recipe", "paper", "--systems", "unet"))
    return out


ALL = ["--recipe", "volume", "paper", "--systems", "sam2unet", "maskrcnn"]


def test_all_systems_are_judged_by_the_patients_that_they_were_not_trained_on(compared, brats_dir):
    folds = json.loads((compared / "comparison.json").read_text())["folds"]
    cases = {case.case_id: case for case in find_cases(brats_dir)}
    assert sorted(sum(folds.values(), [])) == sorted(cases)
    for recipe, system in (("volume", "sam2unet"), ("volume", "maskrcnn"), ("paper", "unet")):
        for fold, names in folds.items():
            folder = compared / recipe / system / fold
            known = json.loads((folder / "patients_of_splits.json").read_text())
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
    assert made["volume/sam2unet"].head_crop_size == made["volume/maskrcnn"].head_crop_size is not None
    assert made["volume/maskrcnn"].neighbours == 1
    assert made["paper/unet"].head_crop_size is None
    assert made["paper/unet"].size == {"height": 64, "width": 64}
    runs = [json.loads((compared / system / "fold_0" / "run.json").read_text())["arguments"] for system in PROCESSED]
    assert [(run["ema_decay"], run["iou_over_batch"], run["foreground_share"]) for run in runs] == [
        *2 * [(0.99, True, 0.67)],
        (0.0, None, None),
    ]
    config = load_baseline(compared / "volume" / "maskrcnn" / "fold_0").config
    assert config.iou_over_batch
    assert config.num_channels == 3


PROCESSED = ("volume/sam2unet", "volume/maskrcnn", "paper/unet")
