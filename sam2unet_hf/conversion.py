"""Reading SAM 2 encoders and reference SAM2-UNet checkpoints into this package's names."""

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig, Sam2HieraDetConfig
from transformers.utils import cached_file

from .configuration_sam2unet import PRESETS, Sam2UNetConfig, preset_backbone_config


logger = logging.getLogger(__name__)

# Original SAM 2 -> transformers' `Sam2HieraDetModel`, within the encoder.
SAM2_NAMES = [
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.mlp\.layers\.0\.", ".mlp.proj_in."),
    (r"\.mlp\.layers\.1\.", ".mlp.proj_out."),
]

# Reference SAM2-UNet -> this package; a list index is the reference's number less one.
REFERENCE_NAMES = [
    (r"^encoder\.blocks\.(\d+)\.prompt_learn\.0\.", r"encoder.blocks.\1.adapter.down_proj."),
    (r"^encoder\.blocks\.(\d+)\.prompt_learn\.2\.", r"encoder.blocks.\1.adapter.up_proj."),
    (r"^encoder\.blocks\.(\d+)\.block\.", r"encoder.blocks.\1."),
    (r"^rfb(\d)\.branch(\d)\.", r"decode_head.receptive_field_blocks.#\1.branches.\2."),
    (r"^rfb(\d)\.conv_cat\.", r"decode_head.receptive_field_blocks.#\1.fusion."),
    (r"^rfb(\d)\.conv_res\.", r"decode_head.receptive_field_blocks.#\1.shortcut."),
    (r"^up(\d)\.conv\.double_conv\.0\.", r"decode_head.up_blocks.#\1.conv1.conv."),
    (r"^up(\d)\.conv\.double_conv\.1\.", r"decode_head.up_blocks.#\1.conv1.norm."),
    (r"^up(\d)\.conv\.double_conv\.3\.", r"decode_head.up_blocks.#\1.conv2.conv."),
    (r"^up(\d)\.conv\.double_conv\.4\.", r"decode_head.up_blocks.#\1.conv2.norm."),
    (r"^side(\d)\.", r"decode_head.auxiliary_classifiers.#\1."),
    (r"^head\.", "decode_head.classifier."),
    (r"\.bn\.", ".norm."),
]

# The reference builds a fourth decoder step and never calls it.
UNUSED_REFERENCE_PREFIX = "up4."


def rename(name: str, table: list[tuple[str, str]]) -> str:
    """Apply every rule of a table in turn; `#n` in the result becomes n - 1."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"#(\d)", lambda match: str(int(match[1]) - 1), name)


def unwrap_names(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop the prefix that distributed training puts before every name."""
    return {name.removeprefix("module."): value for name, value in state_dict.items()}


def load_pickled_state_dict(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Load a `.pt` or `.pth` file without running any code in it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, holds more than tensors, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint file at {path}.")
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # torch lets whatever a damaged file leads to through, `AssertionError` included
        raise ValueError(
            f"{path} cannot be loaded as a checkpoint of tensors: it is damaged, or holds other Python objects, which "
            f"are never loaded. Save its `state_dict()` alone. ({err})"
        ) from err
    # SAM 2 keeps its weights under "model"; training scripts often under "state_dict".
    for key in ("model", "state_dict"):
        if isinstance(state_dict, Mapping) and isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
    if not isinstance(state_dict, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state_dict.items()
    ):
        raise ValueError(
            f"{path} holds no state dict, which maps names to tensors, but another {type(state_dict).__name__}."
        )
    return unwrap_names(state_dict)


def infer_backbone_config(encoder_state_dict: Mapping[str, torch.Tensor], source: str) -> Sam2HieraDetConfig:
    """Recognise which of the four SAM 2 sizes the weights of an encoder, in our names, belong to.

    Raises:
        ValueError: If it is none of them.
    """
    embedding = encoder_state_dict.get("patch_embed.projection.weight")
    if embedding is None:
        raise ValueError(f"{source} holds no Hiera encoder: `patch_embed.projection.weight` is missing.")
    hidden_size = embedding.shape[0]
    blocks = {int(match[1]) for name in encoder_state_dict if (match := re.match(r"blocks\.(\d+)\.", name))}
    for preset, values in PRESETS.items():
        if values["hidden_size"] == hidden_size and sum(values["blocks_per_stage"]) == len(blocks):
            return preset_backbone_config(preset)
    raise ValueError(
        f"{source} holds a Hiera encoder of width {hidden_size} with {len(blocks)} blocks, which is none of SAM 2's "
        f"sizes ({', '.join(PRESETS)}). Pass its configuration."
    )


def check_state_dict(
    state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], source: str, size: str
) -> None:
    """Raise a `ValueError` that names what is missing, unknown or of another shape."""
    problems = []
    if missing := [name for name in expected if name not in state_dict]:
        problems.append(f"{len(missing)} missing, such as {missing[0]!r}")
    if unknown := [name for name in state_dict if name not in expected]:
        problems.append(f"{len(unknown)} unknown, such as {unknown[0]!r}")
    for name in expected:
        if name in state_dict and state_dict[name].shape != expected[name].shape:
            got, want = tuple(state_dict[name].shape), tuple(expected[name].shape)
            problems.append(f"{name!r} has shape {got} where the configuration needs {want}")
            break
    if problems:
        raise ValueError(f"The weights in {source} do not fit {size}: {'; '.join(problems)}.")


def load_sam2_encoder(
    source: str | os.PathLike, backbone_config: dict | PreTrainedConfig | None = None
) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
    """Read the encoder of SAM 2 or SAM 2.1.

    Args:
        source: Original `.pt` file, folder written by `save_pretrained`, or Hub id.
        backbone_config: The encoder's configuration. By default that of the checkpoint, or for a `.pt` file the one of
            SAM 2's sizes that the shapes show.

    Returns:
        The encoder's configuration, and its weights in the names of [`Sam2UNetForSemanticSegmentation`]`.encoder`.

    Raises:
        FileNotFoundError: If `source` is the path of a file that does not exist.
        OSError: If it is no folder with a checkpoint and no repository that can be reached.
        ValueError: If it holds no SAM 2 encoder, or one with missing keys or of another size.
    """
    name = os.fspath(source)
    if Path(name).is_file() or name.endswith((".pt", ".pth")):
        prefix = "image_encoder.trunk."
        state_dict = {
            rename(key.removeprefix(prefix), SAM2_NAMES): value
            for key, value in load_pickled_state_dict(name).items()
            if key.startswith(prefix)
        }
        if not state_dict:
            raise ValueError(f"{name} holds no SAM 2 encoder: no key starts with {prefix!r}.")
        config = backbone_config or infer_backbone_config(state_dict, name)
    else:
        sam2_config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        found = getattr(getattr(sam2_config, "vision_config", None), "backbone_config", None)
        if not isinstance(found, Sam2HieraDetConfig):
            raise ValueError(
                f"{name} holds a model of type {sam2_config.model_type!r}, not a SAM 2 with a Hiera encoder. Use for "
                "example facebook/sam2-hiera-large."
            )
        config = backbone_config or found
        state_dict = read_safetensors(name, prefix="vision_encoder.backbone.")

    unet_config = Sam2UNetConfig(backbone_config=config)
    from .modeling_sam2unet import Sam2UNetEncoder

    with torch.device("meta"):
        expected = Sam2UNetEncoder(unet_config).state_dict()
    expected = {key: value for key, value in expected.items() if ".adapter." not in key}
    backbone: Any = unet_config.backbone_config
    size = f"an encoder of width {backbone.hidden_size} with blocks {backbone.blocks_per_stage}"
    check_state_dict(state_dict, expected, name, size)
    return backbone, state_dict


def read_safetensors(source: str, prefix: str) -> dict[str, torch.Tensor]:
    """Read the tensors under `prefix`, and no others, from a checkpoint folder or Hub repository.

    Raises:
        OSError: If there is no `model.safetensors`, whole or in shards.
        ValueError: If a file is damaged or has nothing under `prefix`.
    """
    index = cached_file(source, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    names = ["model.safetensors"]
    if index is not None:
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    state_dict = {}
    for name in names:
        path = cached_file(source, name)
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - a file, not a dict
                    if key.startswith(prefix):
                        state_dict[key.removeprefix(prefix)] = file.get_tensor(key)
        except SafetensorError as err:
            raise ValueError(f"{path} is damaged ({err}). Download or copy it again.") from err
    if not state_dict:
        raise ValueError(f"{source} holds no SAM 2 encoder: no key starts with {prefix!r}.")
    return state_dict


def convert_reference_checkpoint(
    path_or_state_dict: str | os.PathLike | Mapping[str, torch.Tensor], config: Sam2UNetConfig | None = None
):
    """Turn a checkpoint of the reference SAM2-UNet into a model of this package.

    Args:
        path_or_state_dict: `.pth` file as the reference's training script writes it, or its state dict.
        config: Configuration of the model. By default the encoder is the one of SAM 2's sizes that the shapes show,
            and the output is one region `"foreground"` of label id 1, since the checkpoint does not say what it
            segments.

    Returns:
        [`Sam2UNetForSemanticSegmentation`] in eval mode. Keys of the reference that it never uses (`up4`) are dropped
        and logged.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, is no reference SAM2-UNet, or does not fit `config`.

    Source: https://github.com/WZH0120/SAM2-UNet/blob/01598e5/SAM2UNet.py.
    """
    from .modeling_sam2unet import Sam2UNetForSemanticSegmentation

    if isinstance(path_or_state_dict, Mapping):
        source, reference = "the state dict", unwrap_names(path_or_state_dict)
    else:
        source, reference = os.fspath(path_or_state_dict), load_pickled_state_dict(path_or_state_dict)
    dropped = [name for name in reference if name.startswith(UNUSED_REFERENCE_PREFIX)]
    state_dict = {}
    for name, value in reference.items():
        if name in dropped:
            continue
        new_name = rename(name, REFERENCE_NAMES)
        if new_name.startswith("encoder."):
            new_name = "encoder." + rename(new_name.removeprefix("encoder."), SAM2_NAMES)
        state_dict[new_name] = value
    if not any(name.startswith("encoder.") for name in state_dict):
        raise ValueError(f"{source} is not a reference SAM2-UNet: no key starts with 'encoder.'.")

    if config is None:
        encoder = {name.removeprefix("encoder."): value for name, value in state_dict.items()}
        backbone_config = infer_backbone_config(encoder, source)
        config = Sam2UNetConfig(backbone_config=backbone_config, regions={"foreground": [1]})
    model = Sam2UNetForSemanticSegmentation(config)
    check_state_dict(state_dict, model.state_dict(), source, "SAM2-UNet with this configuration")
    model.load_state_dict(state_dict)
    if dropped:
        logger.warning("Dropped %d keys that the reference never uses: %s", len(dropped), ", ".join(dropped))
    return model.eval()


__all__ = ["convert_reference_checkpoint", "load_sam2_encoder"]
