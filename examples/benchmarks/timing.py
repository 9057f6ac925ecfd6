"""What the benchmarks share: timing in turn, the machine in words, tables."""

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers


def machine(device: str = "cpu") -> dict[str, Any]:
    """Say what the figures were measured on."""
    facts: dict[str, Any] = {
        "date": date.today().isoformat(),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "bf16": "AMX" if torch.cpu._is_amx_tile_supported() else "no AMX",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def synchronize(device: str) -> None:
    """Wait until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def time_in_turn(
    competitors: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu", warmup: int = 1
) -> dict[str, list[float]]:
    """Time functions one after the other, `rounds` times over, so that a busy machine is busy for all of them.

    Returns:
        Seconds of each call by name.
    """
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


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows with the same keys as a Markdown table."""
    if not rows:
        return ""
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"| {' | '.join('---' for _ in names)} |"]
    lines += [f"| {' | '.join(str(row[name]) for name in names)} |" for row in rows]
    return "\n".join(lines)


def report(results: dict[str, Any], rows: Sequence[Mapping[str, Any]], output: Path | None) -> None:
    """Print a table, and write it beside the JSON of all results if asked to."""
    facts = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    text = f"`{results['command']}`\n\n{facts}\n\n{markdown_table(rows)}\n"
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=2) + "\n")
        output.with_suffix(".md").write_text(text)
