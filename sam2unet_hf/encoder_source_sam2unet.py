"""Where the encoder of a checkpoint that leaves it out comes from: checked, fetched, hashed."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from .weights_sam2unet import load_sam2_encoder


def encoder_sha256(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of an encoder, whatever kind of file it comes from.

    It is taken over name, dtype, shape and little-endian bytes of each tensor, in the order of the names.

    Args:
        state_dict: Weights in the names of [`Sam2UNetForSemanticSegmentation`]`.encoder`, in main memory.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fetch_encoder(
    config: Mapping[str, Any], checkpoint: str, backbone_config: PreTrainedConfig, **download_kwargs: Any
) -> dict[str, torch.Tensor]:
    """Fetch the encoder that a checkpoint without one names.

    Args:
        config: Holds `encoder_source`, `encoder_revision` and `encoder_sha256`.
        checkpoint: Name of the checkpoint, for messages.
        backbone_config: The encoder's configuration.
        **download_kwargs: `token`, `cache_dir` and the like, as in `from_pretrained`.

    Returns:
        Weights in the names of [`Sam2UNetForSemanticSegmentation`]`.encoder`.

    Raises:
        OSError: If there is no encoder at its source, or it cannot be reached.
        ValueError: If there is another one.
    """
    source, revision = config.get("encoder_source"), config.get("encoder_revision")
    where = f"{source} at revision {revision}" if revision else str(source)
    remedy = (
        "Pass `encoder_source=` with the Hub id (and `encoder_revision=`), the folder or the original .pt file of the "
        "SAM 2 encoder that it was trained on."
    )
    try:
        if source is None:
            raise OSError("`encoder_source` is missing in its config")
        state_dict = load_sam2_encoder(source, backbone_config, revision=revision, **download_kwargs).state_dict
    except (OSError, ValueError) as err:
        raise OSError(
            f"{checkpoint} holds only what was trained, and its encoder cannot be loaded from {where}: {err}\n{remedy}"
        ) from err
    found = encoder_sha256(state_dict)
    if found != config["encoder_sha256"]:
        raise ValueError(
            f"{checkpoint} was trained on an encoder with SHA-256 {config['encoder_sha256']}, but the one in {where} "
            f"has {found}. {remedy}"
        )
    return state_dict


__all__ = ["encoder_sha256", "fetch_encoder"]
