"""Turning checkpoints of the reference SAM2-UNet into models of this package."""

import logging
import os
from collections.abc import Mapping

import torch

from .configuration_sam2unet import Sam2UNetConfig
from .modeling_sam2unet import Sam2UNetForSemanticSegmentation
from .sam2_encoder import (
    SAM2_NAMES,
    check_state_dict,
    infer_backbone_config,
    load_pickled_state_dict,
    rename,
    unwrap_names,
)


logger = logging.getLogger(__name__)

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


def convert_reference_checkpoint(
    path_or_state_dict: str | os.PathLike | Mapping[str, torch.Tensor], config: Sam2UNetConfig | None = None
) -> Sam2UNetForSemanticSegmentation:
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


__all__ = ["convert_reference_checkpoint"]
