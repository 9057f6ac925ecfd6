"""Files of weights: safetensors, original SAM 2 `.pt` files, and how the weights in them are named."""

import copy
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig, Sam2HieraDetConfig
from transformers.utils import cached_file, extract_commit_hash

from .configuration_sam2unet import (
    PRESETS,
    Sam2UNetConfig,
    check_source,
    describe_unreachable,
    did_you_mean,
    preset_backbone_config,
)


# Original SAM 2 -> transformers' `Sam2HieraDetModel`, within the encoder.
SAM2_NAMES = [
    (r"\bpatch_embed\.proj\.", "patch_embed.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.mlp\.layers\.0\.", ".mlp.proj_in."),
    (r"\.mlp\.layers\.1\.", ".mlp.proj_out."),
]


def rename(name: str, table: list[tuple[str, str]]) -> str:
    """Apply every rule of a table in turn; `#n` in the result becomes n - 1."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"#(\d)", lambda match: str(int(match[1]) - 1), name)


# Under which names training scripts keep the weights beside other things; SAM 2 does under the first.
STATE_DICTS = ("model", "state_dict", "model_state_dict", "net", "network")
# What distributed training, `torch.compile`, FSDP and checkpointing put into names.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrap_names(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop what wrappers put into names, and what stands before all of them where the model was an attribute."""
    names = [[part for part in name.split(".") if part not in WRAPPERS] for name in state_dict]
    while names and names[0][0] in STATE_DICTS and all(len(name) > 1 and name[0] == names[0][0] for name in names):
        names = [name[1:] for name in names]
    return {".".join(name): value for name, value in zip(names, state_dict.values(), strict=True)}


def is_state_dict(content: Any) -> bool:
    """Whether something maps names to tensors, and nothing else."""
    return isinstance(content, Mapping) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    )


def find_state_dict(content: Any, path: Path) -> Mapping[str, torch.Tensor]:
    """Return the weights in the content of a file: all of it, or what stands under a usual name, or alone does."""
    while isinstance(content, Mapping) and not is_state_dict(content):
        usual = [name for name in STATE_DICTS if isinstance(content.get(name), Mapping)]
        found = usual or [name for name, part in content.items() if is_state_dict(part) and part]
        if not found:
            break
        if not usual and len(found) > 1:
            raise ValueError(
                f"{path} holds {len(found)} state dicts: {', '.join(map(repr, found))}. Save one of them alone."
            )
        content = content[found[0]]
    if not is_state_dict(content):
        raise ValueError(
            f"{path} holds no state dict, which maps names to tensors, but another {type(content).__name__}."
        )
    return content


def describe_pickle_error(err: Exception) -> str:
    """Say in one line what PyTorch found in a file, less its advice to load the file all the same."""
    text = str(err)
    found = re.search(r"WeightsUnpickler error:\s*(.+?)(?:\. Please |\.?\s*\n|\Z)", text)
    return found[1] if found else f"{type(err).__name__}: {text.splitlines()[0] if text else 'no reason given'}"


def load_pickled_state_dict(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Load a `.pt` or `.pth` file without running any code in it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint file at {path}{did_you_mean(path, is_file=True)}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # torch lets whatever a damaged file leads to through, `AssertionError` included
        raise ValueError(
            f"{path} cannot be loaded as a checkpoint of tensors: it is damaged, or holds other Python objects, which "
            f"are never loaded. Save its `state_dict()` alone. ({describe_pickle_error(err)})"
        ) from err
    return unwrap_names(find_state_dict(content, path))


# The weights that depend on the number of channels of the images.
PATCH_EMBEDDING = "patch_embed.projection.weight"


def inflate_patch_embedding(state_dict: dict[str, torch.Tensor], num_channels: int, prefix: str = "") -> None:
    """Turn a patch embedding for images of three channels into one for another number, within the state dict.

    Each channel gets the sum of the three divided by the number, so that an image that is the same in all channels
    gives the tokens that it gives in three.
    """
    weight = state_dict.get(prefix + PATCH_EMBEDDING)
    if weight is None or weight.ndim != 4 or weight.shape[1] != 3 or num_channels == 3:
        return
    if num_channels < 1:
        raise ValueError(f"`num_channels` must be at least 1, got {num_channels}.")
    # Add one by one, because the order in which `Tensor.sum` adds, and so its rounding, is not the same everywhere.
    red, green, blue = weight.float().unbind(1)
    inflated = (red + green + blue) / num_channels
    state_dict[prefix + PATCH_EMBEDDING] = inflated.unsqueeze(1).repeat(1, num_channels, 1, 1)


def infer_backbone_config(encoder_state_dict: Mapping[str, torch.Tensor], source: str) -> Sam2HieraDetConfig:
    """Recognise which of the four SAM 2 sizes the weights of an encoder, in our names, belong to."""
    embedding = encoder_state_dict.get(PATCH_EMBEDDING)
    if embedding is None:
        raise ValueError(f"{source} holds no Hiera encoder: `{PATCH_EMBEDDING}` is missing.")
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


def is_local_source(source: str | os.PathLike | None) -> bool:
    """Whether `source` is a path of this machine and no id on the Hub."""
    return source is not None and (
        os.path.isabs(source) or Path(source).exists() or os.fspath(source).endswith((".pt", ".pth"))
    )


def is_pretrained_weight(name: str) -> bool:
    """Whether a weight of the model comes from SAM 2: those of the encoder but for the adapters."""
    return name.startswith("encoder.") and ".adapter." not in name


class Sam2EncoderWeights(NamedTuple):
    """An encoder as it was read, with weights in our names, whose shapes are not checked."""

    backbone_config: PreTrainedConfig
    state_dict: dict[str, torch.Tensor]
    source: str  # Hub id, or absolute path
    revision: str | None  # commit on the Hub


def load_sam2_encoder(
    source: str | os.PathLike,
    backbone_config: dict | PreTrainedConfig | None = None,
    num_channels: int | None = None,
    **download_kwargs: Any,
) -> Sam2EncoderWeights:
    """Read the encoder of SAM 2 or SAM 2.1 from an original `.pt` file, a folder, or the Hub.

    Its configuration is by default that of the checkpoint, or for a `.pt` file the preset that the shapes show. The
    patch embedding is made for `num_channels`, by default those of the configuration.
    """
    name, revision, found = os.fspath(source), None, None
    if Path(name).exists():
        name = os.path.abspath(name)
    if Path(name).is_file() or name.endswith((".pt", ".pth")):
        prefix = "image_encoder.trunk."
        state_dict = {
            rename(key.removeprefix(prefix), SAM2_NAMES): value
            for key, value in load_pickled_state_dict(name).items()
            if key.startswith(prefix)
        }
    else:
        if not Path(name).is_dir():
            check_source(name, "Name a folder or .pt file of SAM 2, or a Hub id such as facebook/sam2-hiera-large.")
            try:
                revision = extract_commit_hash(cached_file(name, "config.json", **download_kwargs), None)
            except OSError as err:
                raise OSError(describe_unreachable(name, err)) from err
            # Weights of the same commit, though the branch may move.
            download_kwargs["revision"] = revision
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **download_kwargs)  # nosec B615 # pinned
        found = getattr(getattr(config, "vision_config", None), "backbone_config", None)
        if not isinstance(found, Sam2HieraDetConfig):
            raise ValueError(
                f"{name} holds a model of type {config.model_type!r}, not a SAM 2 with a Hiera encoder. Use for "
                "example facebook/sam2-hiera-large."
            )
        prefix = "vision_encoder.backbone."
        state_dict = read_safetensors(name, prefix, **download_kwargs)
    if not state_dict:
        raise ValueError(f"{name} holds no SAM 2 encoder: no key starts with {prefix!r}.")
    backbone_config = backbone_config or found or infer_backbone_config(state_dict, name)
    # A copy, checked and no longer a dict.
    backbone: Any = Sam2UNetConfig(backbone_config=copy.deepcopy(backbone_config)).backbone_config
    if num_channels is not None:
        backbone.num_channels = num_channels
    inflate_patch_embedding(state_dict, backbone.num_channels)
    return Sam2EncoderWeights(backbone, state_dict, name, revision)


def weight_files(source: str | os.PathLike, variant: str | None = None, **download_kwargs: Any) -> list[str]:
    """Return the names of the files with the weights of a folder or Hub repository, safetensors files beside it."""
    middle = "" if variant is None else f".{variant}"
    whole = f"model{middle}.safetensors"
    download_kwargs["_raise_exceptions_for_missing_entries"] = False
    # The order in which transformers looks for them.
    has_whole = cached_file(source, whole, **download_kwargs) is not None
    index = None if has_whole else cached_file(source, f"model.safetensors.index{middle}.json", **download_kwargs)
    if index is None:
        return [whole]
    names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    for name in names:
        if not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name}, which is no safetensors file. Nothing else is loaded.")
        if re.search(r"[/\\]", name):
            raise ValueError(f"{index} names {name}, which does not lie beside it. Put all shards into one folder.")
    return names


def read_safetensors(
    source: str | os.PathLike, prefix: str = "", variant: str | None = None, **download_kwargs: Any
) -> dict[str, torch.Tensor]:
    """Read the tensors under `prefix`, which is dropped, and no others from a folder or Hub repository."""
    state_dict = {}
    for name in weight_files(source, variant, **download_kwargs):
        path = cached_file(source, name, **download_kwargs)
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - a file, not a dict
                    if key.startswith(prefix):
                        state_dict[key.removeprefix(prefix)] = file.get_tensor(key)
        except SafetensorError as err:
            raise ValueError(f"{path} is damaged ({err}). Download or copy it again.") from err
    return state_dict
