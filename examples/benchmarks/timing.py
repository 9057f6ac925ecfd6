"""What the benchmarks share: options, timing in turn, counting of operations, agreement of masks, and the report."""

import argparse
import gc
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sam2unet_hf.training import ImageRows, ParquetRows


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_parser(description: str | None, rounds: int | None = None, device: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the options that benchmarks share; without a default for `--rounds` it has none."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="how often each competitor is timed")
    if device:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--device", default=default, choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, help="write the results to this JSON file, and a table beside it")
    return parser


def single_images(rows: datasets.Dataset | ParquetRows, mask_column: str | None = "mask") -> ImageRows:
    """Return the rows of a data set with the image of its first column of images that is not `mask`."""
    columns = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    return ImageRows(rows, next(name for name in columns if name != "mask"), mask_column)


def synchronize(device: str) -> None:
    """Wait for the queued work of the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def time_in_turn(
    competitors: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu", warmup: int = 1
) -> dict[str, list[float]]:
    """Return the seconds of each call, timed in turn, so that all functions run under the same load of the machine."""
    for function in competitors.values():
        for _ in range(warmup):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(rounds):
        for name, function in competitors.items():
            gc.collect()
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def reset_peak_memory(device: str) -> None:
    """Forget the peak memory of this process so far; on a CPU this needs Linux."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gb(device: str) -> float:
    """Return the peak memory in GB of this process since it was reset."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    (kibibytes,) = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(kibibytes) * 1024 / 1e9


def count_flops(model: torch.nn.Module, pixel_values: torch.Tensor) -> int:
    """Count multiplications and additions of matrix products, convolutions and attention of a forward pass."""
    # Run attention as matrix products, which the counter knows on every device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(pixel_values)
    return counter.get_total_flops()


def mask_iou(masks: Sequence[Any], others: Sequence[Any]) -> float:
    """Return the IoU of the foreground (> 0) over all arrays or tensors together; 1 if there is none."""
    pairs = [(mask > 0, other > 0) for mask, other in zip(masks, others, strict=True)]
    intersection = sum(int((mask & other).sum()) for mask, other in pairs)
    union = sum(int((mask | other).sum()) for mask, other in pairs)
    return intersection / union if union else 1.0


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows with the same keys as a Markdown table."""
    lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def report(script: str, argv: list[str] | None, args: argparse.Namespace, found: dict, rows: list) -> dict[str, Any]:
    """Print a table, write it and all results as JSON if asked to, and return what was found, where and how."""
    words = sys.argv[1:] if argv is None else argv
    cpuinfo = Path("/proc/cpuinfo")  # of Linux, the only system with AMX
    machine = {
        "date": date.today().isoformat(),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "bf16": "AMX" if cpuinfo.exists() and "amx_tile" in cpuinfo.read_text() else "no AMX",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if vars(args).get("device") == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    command = " ".join(["python", f"examples/benchmarks/{Path(script).name}", *words])
    results = {"command": command, "machine": machine, **found}
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    text = f"`{command}`\n\n{facts}\n\n{markdown_table(rows)}\n"
    print(text)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")
        args.output.with_suffix(".md").write_text(text)
    return results
