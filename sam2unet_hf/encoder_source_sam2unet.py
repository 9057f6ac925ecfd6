"""Checkpoints without the encoder: where it comes from, how it is verified, fetched and hashed."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from .configuration_sam2unet import Sam2UNetConfig
from .weights_sam2unet import is_local_source, is_pretrained_weight, load_sam2_encoder, read_safetensors, weight_files


def encoder_sha256(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 over name, dtype, shape and little-endian bytes of each tensor, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def verify_encoder_source(
    config: Sam2UNetConfig, encoder: Mapping[str, torch.Tensor], may_be_local: bool = True
) -> dict[str, str | None]:
    """Check weight by weight that the encoder of a model can be fetched again from `config.encoder_source`.

    Returns the fields of the config that say where: `encoder_source`, `encoder_revision` and `encoder_sha256`.
    """
    source = config.encoder_source
    if source is None:
        raise ValueError(
            "`trainable_only=True` needs to know where the encoder comes from. Build the model with `from_sam2`, "
            'set `model.config.encoder_source` to a Hub id such as "facebook/sam2-hiera-large" if it is that '
            "encoder, or save the whole model."
        )
    if not may_be_local and is_local_source(source):
        raise ValueError(
            f"The encoder comes from {source}, which nobody else can reach. Set `model.config.encoder_source` to a "
            'Hub id with the same weights, such as "facebook/sam2-hiera-large", or push without '
            "`trainable_only=True`."
        )
    found = load_sam2_encoder(source, config.backbone_config, revision=config.encoder_revision)
    for name, value in encoder.items():
        if not is_pretrained_weight(f"encoder.{name}"):
            continue
        original = found.state_dict.get(name)
        if original is None or not torch.equal(original.to(value.dtype), value.cpu()):
            raise ValueError(
                f"The encoder is not the one in {source}: {name!r} differs. It was trained, or comes from elsewhere; "
                "save the whole model, without `trainable_only=True`."
            )
    sha256 = encoder_sha256(found.state_dict)
    return {"encoder_source": found.source, "encoder_revision": found.revision, "encoder_sha256": sha256}


def fetch_encoder(config: Mapping[str, Any], checkpoint: str, **download_kwargs: Any) -> dict[str, torch.Tensor]:
    """Fetch the encoder that the config of a checkpoint without one names."""
    source, revision = config.get("encoder_source"), config.get("encoder_revision")
    where = f"{source} at revision {revision}" if revision else str(source)
    remedy = (
        "Pass `encoder_source=` with the Hub id (and `encoder_revision=`), the folder or the original .pt file of the "
        "SAM 2 encoder that it was trained on."
    )
    backbone_config = Sam2UNetConfig(backbone_config=config["backbone_config"]).backbone_config
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


def complete_state_dict(
    checkpoint: str, config: Mapping[str, Any], location: Mapping[str, Any], **download_kwargs: Any
) -> dict[str, torch.Tensor] | None:
    """Return all weights of a checkpoint that lacks its encoder, or `None` if it holds its own.

    `location` says where in the repository it is: `variant`, `revision` and `subfolder`, where given.
    """
    if config.get("transformers_weights") is not None:
        raise ValueError(
            f"The config of {checkpoint} names {config['transformers_weights']} as `transformers_weights`. Weights "
            "are read from model.safetensors only; remove the field."
        )
    # Called for its errors, since a pickle may hide among the shards; whoever loads the weights downloads them.
    weight_files(checkpoint, **location, **{**download_kwargs, "force_download": False})
    if config.get("encoder_sha256") is None:
        return None
    state_dict = read_safetensors(checkpoint, **location, **download_kwargs)
    if any(map(is_pretrained_weight, state_dict)):
        return None
    encoder = fetch_encoder(config, checkpoint, **download_kwargs)
    return {**state_dict, **{f"encoder.{name}": value for name, value in encoder.items()}}
