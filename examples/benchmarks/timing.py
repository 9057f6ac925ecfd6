"""What the benchmarks share: options, timing in turn, counting of operations, agreement of masks, and the report."""

import argparse
import contextlib
import copy
import gc
import json
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import numpy as np
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


def step_clock(device: str) -> Callable[[], float]:
    """Return the clock for steps of a training: on a CPU with one thread that of the processor time.

    It is the time of the wall where the process has a core of its own, and other processes do not change it.
    """
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


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


def flops_of(model: torch.nn.Module, shape: Sequence[int]) -> int:
    """Count the operations of a forward pass over inputs of a shape, without computing it."""
    return count_flops(copy.deepcopy(model).to("meta", torch.float32), torch.empty(shape, device="meta"))


@dataclass
class Competitor:
    """What a process of its own runs.

    Args:
        run: Returns an array, or what becomes one by reading it, to be compared with those of others.
        flops: Returns the operations of the last run.
        profile: Returns the seconds that one more run spends in each kind of kernel, by the names of its library, or
            nothing where that is not known.
    """

    run: Callable[[], Any]
    flops: Callable[[], int]
    profile: Callable[[], dict[str, float]] = dict


_own: dict[str, Any] = {}  # what a process keeps between calls


def _prepare(prepare: Callable[[], Competitor], warmup: int) -> None:
    reset_peak_memory("cpu")
    _own["libraries_gb"] = peak_memory_gb("cpu")
    _own["competitor"] = prepare()
    for _ in range(warmup):
        _own["competitor"].run()
    reset_peak_memory("cpu")


def _run() -> float:
    _own.pop("output", None)  # which would count beside the next
    turn = {"run": lambda: _own.update(output=_own["competitor"].run())}
    (seconds,) = time_in_turn(turn, rounds=1, warmup=0)["run"]
    return seconds


def _finish() -> dict[str, Any]:
    found = {"peak_gb": peak_memory_gb("cpu"), "libraries_gb": _own["libraries_gb"]}
    return found | {"output": np.asarray(_own["output"]), "flops": _own["competitor"].flops()}


def in_processes(
    competitors: Mapping[str, Callable[[], Competitor]],
    rounds: int,
    warmup: int = 1,
    initializer: Callable[[], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Let competitors take turns on the CPU, each in a process of its own, and return what each took.

    Args:
        competitors: What prepares each in its process; it must be picklable.
        rounds: How often each is timed.
        warmup: How often each runs before.
        initializer: Called first in each process.

    Returns:
        By name `seconds` of each round, `peak_gb` of the process, of which `libraries_gb` were there before the
        competitor was prepared, `flops` and `output` of the last run. Or `left_out` alone: why it cannot be prepared.
    """
    found: dict[str, dict[str, Any]] = {}
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools = {}
        for name, prepare in competitors.items():
            pool = stack.enter_context(ProcessPoolExecutor(1, mp_context=context, initializer=initializer))
            try:
                pool.submit(_prepare, prepare, warmup).result()
            except Exception as err:  # such as that there is no compiler; the others go on
                found[name] = {"left_out": str(err).strip().split("\n")[0]}
                pool.shutdown()
                continue
            found[name] = {"seconds": []}
            pools[name] = pool
        for _ in range(rounds):
            for name, pool in pools.items():
                found[name]["seconds"].append(pool.submit(_run).result())
                print(f"{name}: {found[name]['seconds'][-1]:.3f} s", file=sys.stderr)
        for name, pool in pools.items():
            found[name] |= pool.submit(_finish).result()
    return found


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
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older PyTorch does not tell
    instructions = [name.upper() for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name, False)]
    machine = {
        "date": date.today().isoformat(),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "bf16": " and ".join(instructions) or ("none" if capabilities else "unknown"),
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
