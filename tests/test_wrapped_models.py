"""Models whose layers others have replaced or moved: offloaded by accelerate, quantised, adapted."""

import copy
import warnings

import accelerate
import numpy as np
import pytest
import torch
from common import reference_image, reference_mask, small_model
from scan_files import save
from torch import nn

from sam2unet_hf import Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor
from sam2unet_hf.volume import Sam2UNetVolumePipeline


# Every stage pads some windows of an image of this size.
SIZE = (96, 80)


class WithLowRank(nn.Module):
    """A linear layer with a low-rank update, as PEFT puts it in place of the layer."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def trained_model():
    """A model that has learned to find an ellipse in noise."""
    torch.manual_seed(0)
    model = small_model(freeze_encoder=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(40):
        labels = reference_mask(4, 64, 64).roll((3 * step % 20, 5 * step % 20), dims=(1, 2))
        images = 0.5 * torch.randn(4, 3, 64, 64) + labels[:, None]
        model(images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits_of(model, images):
    with torch.inference_mode():
        return model(images).logits


def quantize(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize(
    "options", [{"device_map": "auto", "max_memory": {"cpu": "200KB"}}, {"device_map": {"": "disk"}}]
)
def test_model_that_is_offloaded_to_disk_gives_the_same_logits(model, tmp_path, options):
    model.save_pretrained(tmp_path / "model")
    load = Sam2UNetForSemanticSegmentation.from_pretrained
    offloaded = load(tmp_path / "model", offload_folder=tmp_path / "offloaded", **options)
    assert "disk" in offloaded.hf_device_map.values()
    images = reference_image(2, *SIZE)
    assert torch.equal(logits_of(offloaded, images), logits_of(model, images))


def test_model_that_is_offloaded_to_memory_gives_the_same_logits_and_loss(model):
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    images, labels = reference_image(2, *SIZE), reference_mask(2, *SIZE)
    with torch.inference_mode():
        expected, found = (each(images, labels=labels) for each in (model, offloaded))
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


def test_offloaded_model_cannot_be_fused(model):
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="needs all weights, of which some are offloaded. Load the model without"):
        offloaded.fuse_for_inference()


def test_volume_pipeline_takes_an_offloaded_model(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    Sam2UNetImageProcessor(modalities=["flair"], size={"height": 64, "width": 64}).save_pretrained(tmp_path / "model")
    voxels = np.random.default_rng(0).integers(1, 1000, (40, 36, 3)).astype(np.int16)
    save(tmp_path / "flair.nii.gz", voxels)
    load = Sam2UNetVolumePipeline.from_pretrained
    offloaded = load(tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offloaded")
    expected, found = (segment(tmp_path / "flair.nii.gz") for segment in (load(tmp_path / "model"), offloaded))
    assert expected.label_map.any()
    np.testing.assert_array_equal(found.label_map, expected.label_map)
    with pytest.raises(ValueError, match="Pass `device` or `device_map`, got both: cpu and auto."):
        load(tmp_path / "model", device="cpu", device_map="auto")


def test_int8_model_finds_what_the_trained_model_finds(trained_model):
    quantized = quantize(trained_model)
    assert not any(type(layer) is nn.Linear for layer in quantized.modules())
    labels = reference_mask(4, *SIZE)
    images = 0.5 * torch.randn(4, 3, *SIZE, generator=torch.Generator().manual_seed(1)) + labels[:, None]
    expected, found = (logits_of(each, images)[:, 0] > 0 for each in (trained_model, quantized))
    overlap = (expected & labels.bool()).sum() / (expected | labels.bool()).sum()
    assert overlap > 0.8, "the model has learned nothing"
    assert (expected & found).sum() / (expected | found).sum() > 0.99


def test_layer_with_an_adapter_gives_what_the_merged_layer_gives(model):
    adapted, merged = copy.deepcopy(model), copy.deepcopy(model)
    torch.manual_seed(0)
    for block, merged_block in zip(adapted.encoder.blocks, merged.encoder.blocks, strict=True):
        block.attn.qkv = WithLowRank(block.attn.qkv)
        with torch.no_grad():
            merged_block.attn.qkv.weight += block.attn.qkv.up.weight @ block.attn.qkv.down.weight
    images = reference_image(2, *SIZE)
    expected = logits_of(merged, images)
    assert (expected - logits_of(model, images)).abs().max() > 0.01
    torch.testing.assert_close(logits_of(adapted, images), expected, atol=1e-4, rtol=1e-4)
