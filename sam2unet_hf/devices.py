"""The option `--device` of the command lines."""

import argparse

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
