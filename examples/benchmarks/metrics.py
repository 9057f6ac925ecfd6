#!/usr/bin/env python
"""Time all seven measures against `py_sod_metrics`, pair by pair in turn, on one thread.

python examples/benchmarks/metrics.py
"""

import os


# Before NumPy is imported.
for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{library}_NUM_THREADS"] = "1"

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import evaluate
import numpy as np
import py_sod_metrics
from scipy import ndimage

from sam2unet_hf.metrics import functional


SIZES = (352, 240)


def make_pair(size: int, seed: int, scattered: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Draw a mask and a noisy prediction of it, as sigmoid and without any zero.

    The mask is one lesion of 2 to 8 % of the image, as tumours in BraTS slices are; `scattered` makes it spots all
    over the image, on which the distance transform takes longest.
    """
    generator = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(generator.standard_normal((size, size)), size / 16)
    if not scattered:
        row, column = generator.uniform(0.3, 0.7, 2) * size
        rows, columns = np.ogrid[:size, :size]
        field = field / field.std() - np.hypot(rows - row, columns - column) / (0.05 * size)
    mask = field > np.quantile(field, 1 - generator.uniform(0.02, 0.08))
    noise = ndimage.gaussian_filter(generator.standard_normal((size, size)), 4) * 8
    return 1 / (1 + np.exp(-(ndimage.gaussian_filter(mask * 12.0 - 6, 3) + noise))), mask


def field_report(prediction: np.ndarray, reference: np.ndarray, normalize: bool) -> dict[str, float]:
    """The same measures by `py_sod_metrics`, one histogram shared as far as it allows."""
    cuts = {"with_dynamic": True, "with_adaptive": True, "with_binary": True}
    shared = py_sod_metrics.FmeasureV2(
        {
            "dice": py_sod_metrics.DICEHandler(**cuts),
            "iou": py_sod_metrics.IOUHandler(**cuts),
            "f_beta": py_sod_metrics.FmeasureHandler(**cuts, beta=0.3),
        }
    )
    e_measure, s_measure = py_sod_metrics.Emeasure(), py_sod_metrics.Smeasure()
    weighted, mae = py_sod_metrics.WeightedFmeasure(), py_sod_metrics.MAE()
    for metric in (shared, e_measure, s_measure, weighted, mae):
        metric.step(prediction, reference, normalize=normalize)
    values = {f"mean_{name}": value["dynamic"].mean() for name, value in shared.get_results().items()}
    values |= {"mean_e_measure": e_measure.get_results()["em"]["curve"].mean()}
    values |= {"s_measure": s_measure.get_results()["sm"], "weighted_f_beta": weighted.get_results()["wfm"]}
    return values | {"mae": mae.get_results()["mae"]}


def report(prediction: np.ndarray, reference: np.ndarray, normalize: bool) -> dict[str, float]:
    """Ours, from arrays to named numbers."""
    accumulator = functional.Accumulator()
    accumulator.add(functional.score(prediction, reference, normalize="minmax" if normalize else None))
    return accumulator.result()


def seconds(function: Callable, *arguments) -> tuple[float, dict[str, float]]:
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def compare(pairs: list, ours: Callable, theirs: Callable, rounds: int) -> dict[str, float]:
    """Time both on each pair in turn, and hold their results against each other."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for pair in pairs:
            for index, function in enumerate((ours, theirs)):
                duration, result = seconds(function, *pair)
                times[index].append(duration)
                if index == 0:
                    mine = result
            difference = max(abs(mine[name] - value) for name, value in result.items())
            if difference > 1e-9:
                raise SystemExit(f"The results differ by {difference:g}: {mine} and {result}.")
    fast, slow = (float(np.median(values)) * 1e3 for values in times)
    return {"ours_ms": round(fast, 3), "py_sod_metrics_ms": round(slow, 3), "ratio": round(slow / fast, 2)}


def profile(prediction: np.ndarray, mask: np.ndarray, rounds: int) -> dict[str, float]:
    """Median milliseconds of each part of ours, on probabilities."""
    pair = functional.Pair.of(prediction, mask)
    counts = functional.count_at_cuts(pair)
    scores = functional.score(prediction, mask)
    accumulator = functional.Accumulator()
    accumulator.add(scores)
    background = ~mask
    parts: dict[str, Callable] = {
        "all": lambda: functional.score(prediction, mask),
        "conversion and checks": lambda: functional.Pair.of(prediction, mask),
        "counts at 258 cuts": lambda: functional.count_at_cuts(pair),
        "Dice, IoU and F of the counts": lambda: [
            measure(counts) for measure in (functional.dice, functional.iou, functional.f_beta)
        ],
        "E-measure of the counts": lambda: functional.e_measure(counts),
        "S-measure": lambda: functional.s_measure(pair),
        "weighted F-measure": lambda: functional.weighted_f_beta(pair),
        "of which distance transform (SciPy)": lambda: ndimage.distance_transform_edt(
            background, return_distances=False, return_indices=True
        ),
        "MAE": lambda: functional.mean_absolute_error(pair),
        "adding to the sums": lambda: accumulator.add(scores),
        "means and names, once per data set": lambda: accumulator.result(),
    }
    return {
        name: round(float(np.median([seconds(part)[0] for _ in range(rounds)])) * 1e3, 3)
        for name, part in parts.items()
    }


def main() -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16, help="pairs per size")
    parser.add_argument("--rounds", type=int, default=10, help="how often each pair is timed")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    path = Path(functional.__file__).with_name("segmentation_report.py")
    results: dict = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, one used", "numpy": np.__version__}
    for size in SIZES:
        pairs = [make_pair(size, seed) for seed in range(args.pairs)]
        maps = [((p * 255).round().astype(np.uint8), m.astype(np.uint8) * 255, True) for p, m in pairs]
        results[f"probabilities, {size}x{size}"] = compare(
            [(*pair, False) for pair in pairs], report, field_report, args.rounds
        )
        results[f"8-bit maps, stretched, {size}x{size}"] = compare(maps, report, field_report, args.rounds)
        metric = evaluate.load(str(path), normalize="minmax")
        results[f"8-bit maps through evaluate, {size}x{size}"] = compare(
            maps,
            lambda p, m, _, metric=metric: metric.compute(predictions=[p], references=[m]),
            field_report,
            args.rounds,
        )
        spots = [(*make_pair(size, seed, scattered=True), False) for seed in range(args.pairs)]
        results[f"probabilities, scattered masks, {size}x{size}"] = compare(spots, report, field_report, args.rounds)
        results[f"profile in ms, {size}x{size}"] = profile(*pairs[0], rounds=10 * args.rounds)
    text = json.dumps(results, indent=2)
    if args.output:
        args.output.write_text(text + "\n")
    print(text)
    return results


if __name__ == "__main__":
    main()
