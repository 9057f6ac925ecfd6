"""Tiny configurations and the reference's numbers, shared by the tests."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2Model,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam2VisionConfig,
)

from sam2unet_hf import Sam2UNetConfig, Sam2UNetForSemanticSegmentation


FIXTURES = Path(__file__).parent / "fixtures"
PACKAGE = Path(__file__).parent.parent / "sam2unet_hf"
# What ends in `_sam2unet.py` travels with the weights.
CODE = sorted(path.name for path in PACKAGE.glob("*_sam2unet.py"))
SCAN_PARTS = ("cases", "clean_up", "ensemble", "head", "labels", "members", "nifti", "scans", "volume", "volume_task")
SCAN_CODE = [f"{part}_sam2unet.py" for part in SCAN_PARTS]
# What a model comes with that was loaded without this package.
MODEL_CODE = [name for name in CODE if name not in SCAN_CODE]
BRATS_REGIONS = {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}


def reference_config(num_channels: int = 3, **kwargs) -> Sam2UNetConfig:
    """The model of the golden numbers."""
    backbone_config = small_backbone_config(
        blocks_per_stage=[1, 2, 3, 2], global_attention_blocks=[4], num_channels=num_channels
    )
    return Sam2UNetConfig(**{"backbone_config": backbone_config, **kwargs})


def small_backbone_config(**kwargs) -> Sam2HieraDetConfig:
    """An encoder of 16 channels with every kind of block there is."""
    values = {
        "hidden_size": 16,
        "num_attention_heads": 1,
        "embed_dim_per_stage": [16, 32, 64, 128],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "blocks_per_stage": [1, 1, 3, 1],
        "window_size_per_stage": [8, 4, 14, 7],
        "global_attention_blocks": [3],
        "window_positional_embedding_background_size": [7, 7],
    }
    return Sam2HieraDetConfig(**{**values, **kwargs})


def small_config(**kwargs) -> Sam2UNetConfig:
    return Sam2UNetConfig(**{"backbone_config": small_backbone_config(), "decoder_channels": 16, **kwargs})


def small_model(seed: int = 9, **kwargs) -> Sam2UNetForSemanticSegmentation:
    """A small model whose weights are all random and of a useful size, biases and position embeddings too.

    With this seed every region covers a part of an image, neither little nor nearly all.
    """
    torch.manual_seed(seed)
    model = Sam2UNetForSemanticSegmentation(small_config(**kwargs))
    randomize(model)
    return model.eval()


@torch.no_grad()
def randomize(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif name.endswith("weight"):
            parameter.uniform_(0.8, 1.2)
        else:
            parameter.normal_(std=0.1)


def sam2_model(kind, backbone_config=None):
    """A random SAM 2; the checkpoints on the Hub are of the video class."""
    backbone_config = backbone_config or small_backbone_config()
    vision_config = Sam2VisionConfig(
        backbone_config=backbone_config, backbone_channel_list=backbone_config.embed_dim_per_stage[::-1]
    )
    torch.manual_seed(0)
    model = {
        "sam2": lambda: Sam2Model(Sam2Config(vision_config=vision_config)),
        "sam2_video": lambda: Sam2VideoModel(Sam2VideoConfig(vision_config=vision_config)),
    }[kind]()
    randomize(model.vision_encoder.backbone)
    return model.eval()


def noise(count: int, index: int) -> torch.Tensor:
    k = torch.arange(1, count + 1, dtype=torch.float64)
    u = torch.frac(torch.sin(k * 12.9898 + 78.233 * index) * 43758.5453).abs()
    return (u - 0.5) * math.sqrt(12)


def reference_facts() -> dict:
    return json.loads((FIXTURES / "reference_small.json").read_text())


def reference_outputs() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "reference_small.safetensors")


def reference_state_dict(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Weights by formula, see fixtures/README.md."""
    state_dict = {}
    for index, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        count = math.prod(shape)
        w = noise(count, index).reshape(shape)
        if name.endswith("num_batches_tracked"):
            value = torch.zeros(shape, dtype=torch.int64)
        elif name.endswith("running_var"):
            value = 1 + 0.5 * w.abs()
        elif name.endswith(("running_mean", "bias")):
            value = 0.1 * w
        elif len(shape) == 1:
            value = 1 + 0.1 * w
        elif "pos_embed" in name:
            value = 0.1 * w
        else:
            value = w * math.sqrt(2 / (count // shape[0]))
        state_dict[name] = value if value.dtype == torch.int64 else value.float()
    return state_dict


def reference_image(batch_size: int, height: int, width: int) -> torch.Tensor:
    count = batch_size * 3 * height * width
    j = torch.arange(count, dtype=torch.float64)
    return (torch.sin(j * 0.0137) + 0.5 * noise(count, 1000)).reshape(batch_size, 3, height, width).float()


def reference_mask(batch_size: int, height: int, width: int) -> torch.Tensor:
    b = torch.arange(batch_size).view(-1, 1, 1)
    y = torch.arange(height).view(1, -1, 1)
    x = torch.arange(width).view(1, 1, -1)
    ellipse = ((y - 0.4 * height - 3 * b) / (0.22 * height)) ** 2 + ((x - 0.55 * width) / (0.15 * width)) ** 2
    return (ellipse < 1).long()
