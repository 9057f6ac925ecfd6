"""Devices by name, as the option `--device` of the command lines takes them."""

import argparse
from collections.abc import Mapping
from typing import Any

import torch


def device_name(name: str) -> str:
    """Check the name of a device, for `argparse`, so that a wrong one costs no work.

    Args:
        name: Such as `"cpu"` or `"cuda:1"`.

    Raises:
        argparse.ArgumentTypeError: If PyTorch knows no such device, or there is none.
    """
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    try:
        device = torch.device(name)
    except RuntimeError as err:
        raise argparse.ArgumentTypeError(f"{name!r} is no device, pass {' or '.join(there)}") from err
    try:
        torch.empty(1, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as err:  # as PyTorch was built with it or not
        reason = str(err).split("\n")[0].rstrip(".")
        raise argparse.ArgumentTypeError(f"{name!r} is not there, pass {' or '.join(there)} ({reason})") from err
    return name


def default_device() -> str:
    """Return the name of a GPU if there is one, else of the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def has_bfloat16(device: str) -> bool:
    """Return whether a device has instructions that multiply matrices in bfloat16.

    NVIDIA's GPUs have them since Ampere, AMD's processors since Zen 4 (AVX512_BF16), Intel's server processors since
    Cooper Lake (AVX512_BF16) or Sapphire Rapids (AMX, too). Others are slower in bfloat16 than in float32.

    Args:
        device: Such as `"cpu"` or `"cuda:1"`.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Older PyTorch does not tell what the processor can do.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    has_any = any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
    return torch.device(device).type == "cpu" and has_any


def fast_dtype(device: str) -> torch.dtype:
    """Return bfloat16 for a device that has it, else float32."""
    return torch.bfloat16 if has_bfloat16(device) else torch.float32
