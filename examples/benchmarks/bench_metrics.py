#!/usr/bin/env python
"""Time all seven metrics against `py_sod_metrics`, in turn, on one thread.

python examples/benchmarks/bench_metrics.py
"""

import os


# Set them before NumPy is imported, which reads them once.
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

from sam2unet_hf.metrics import Accumulator, functional


SIZES = (352, 240)


def make_pair(size: int, seed: int, background: float = -9, scattered: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Draw a reference and a noisy prediction of it.

    Args:
        size: Height and width in pixels.
        seed: Seed of the random numbers.
        background: Logit of the prediction far from the lesion; in it the logit is about 7. At -9, as of a trained
            network, 8-bit maps are 0 far from the lesion, at -4 they are 0 nowhere.
        scattered: Draw spots all over the image, on which the distance transform takes longest, instead of one lesion.
            Either covers 2 to 8 % of the image, as tumours in BraTS slices do.

    Returns:
        Probabilities in (0, 1) and the boolean reference, both of shape `(size, size)`.
    """
    generator = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(generator.standard_normal((size, size)), size / 16)
    if not scattered:
        row, column = generator.uniform(0.3, 0.7, 2) * size
        rows, columns = np.ogrid[:size, :size]
        field = field / field.std() - np.hypot(rows - row, columns - column) / (0.05 * size)
    reference = field > np.quantile(field, 1 - generator.uniform(0.02, 0.08))
    noise = ndimage.gaussian_filter(generator.standard_normal((size, size)), 4) * 12
    logits = ndimage.gaussian_filter(np.where(reference, 7.0, background), 3) + noise
    return 1 / (1 + np.exp(-logits)), reference


def to_8_bit(pairs: list) -> list:
    return [
        ((prediction * 255).round().astype(np.uint8), reference.astype(np.uint8) * 255)
        for prediction, reference in pairs
    ]


class PySodMetrics:
    """The same metrics by `py_sod_metrics`, which share a histogram as far as it allows."""

    def __init__(self, normalize: bool):
        thresholds = {"with_dynamic": True, "with_adaptive": True, "with_binary": True}
        handlers = {
            "dice": py_sod_metrics.DICEHandler(**thresholds),
            "iou": py_sod_metrics.IOUHandler(**thresholds),
            "f_beta": py_sod_metrics.FmeasureHandler(**thresholds, beta=0.3),
        }
        self.normalize = normalize
        self.thresholds = py_sod_metrics.FmeasureV2(handlers)
        self.e_measure, self.s_measure = py_sod_metrics.Emeasure(), py_sod_metrics.Smeasure()
        self.weighted, self.mae = py_sod_metrics.WeightedFmeasure(), py_sod_metrics.MAE()

    def add(self, prediction: np.ndarray, reference: np.ndarray) -> None:
        for metric in (self.thresholds, self.e_measure, self.s_measure, self.weighted, self.mae):
            metric.step(prediction, reference, normalize=self.normalize)

    def result(self) -> dict[str, float]:
        values = {f"mean_{name}": value["dynamic"].mean() for name, value in self.thresholds.get_results().items()}
        values |= {"mean_e_measure": self.e_measure.get_results()["em"]["curve"].mean()}
        values |= {"s_measure": self.s_measure.get_results()["sm"], "mae": self.mae.get_results()["mae"]}
        return values | {"weighted_f_beta": self.weighted.get_results()["wfm"]}


class Ours:
    """`sam2unet_hf.metrics.functional`."""

    def __init__(self, normalize: bool):
        self.normalize = "minmax" if normalize else None
        self.accumulator = Accumulator()

    def add(self, prediction: np.ndarray, reference: np.ndarray) -> None:
        self.accumulator.add(functional.score(prediction, reference, normalize=self.normalize))

    def result(self) -> dict[str, float]:
        return self.accumulator.result()


class Evaluate:
    """The public module, loaded by path."""

    def __init__(self, normalize: bool):
        path = Path(functional.__file__).with_name("segmentation_report.py")
        self.metric = evaluate.load(str(path), normalize="minmax" if normalize else None)

    def add(self, prediction: np.ndarray, reference: np.ndarray) -> None:
        self.metric.add(prediction=prediction, reference=reference)

    def result(self) -> dict[str, float]:
        return self.metric.compute()


def seconds(function: Callable, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def score_all(metric: PySodMetrics | Ours | Evaluate, pairs: list) -> dict[str, float]:
    """Score a data set, as a user does."""
    for pair in pairs:
        metric.add(*pair)
    return metric.result()


def compare(pairs: list, normalize: bool, ours: type, rounds: int) -> dict[str, float]:
    """Time both on all pairs in turn, and check that their results agree."""
    mine, theirs = score_all(ours(normalize), pairs), score_all(PySodMetrics(normalize), pairs)
    difference = max(abs(mine[name] - value) for name, value in theirs.items())
    if difference > 1e-9:
        raise SystemExit(f"The results differ by {difference:g}.")
    times = [[seconds(score_all, kind(normalize), pairs) for kind in (ours, PySodMetrics)] for _ in range(rounds)]
    fast, slow = np.median(times, axis=0) / len(pairs) * 1e3
    return {"ours_ms": round(fast, 3), "py_sod_metrics_ms": round(slow, 3), "ratio": round(slow / fast, 2)}


def profile(prediction: np.ndarray, reference: np.ndarray, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each part of ours, on probabilities."""
    pair = functional.make_pair(prediction, reference)
    counts = functional.count_at_thresholds(pair)
    scores = functional.score(prediction, reference)
    accumulator = Accumulator()
    accumulator.add(scores)
    background = ~reference
    parts: dict[str, Callable] = {
        "all": lambda: functional.score(prediction, reference),
        "conversion and checks": lambda: functional.make_pair(prediction, reference),
        "counts at 258 thresholds": lambda: functional.count_at_thresholds(pair),
        "Dice, IoU and F of the counts": lambda: [
            metric(counts) for metric in (functional.dice, functional.iou, functional.f_beta)
        ],
        "E-measure of the counts": lambda: functional.e_measure(counts),
        "S-measure": lambda: functional.s_measure(pair),
        "weighted F-measure": lambda: functional.weighted_f_beta(pair),
        "of which distance transform (SciPy)": lambda: ndimage.distance_transform_edt(
            background, return_distances=False, return_indices=True
        ),
        "MAE": lambda: functional.mean_absolute_error(pair),
        "adding to the sums": lambda: accumulator.add(scores),
        "averages, once per data set": lambda: accumulator.result(),
    }
    return {
        name: round(float(np.median([seconds(part) for _ in range(rounds)])) * 1e3, 3) for name, part in parts.items()
    }


def main() -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16, help="pairs per size")
    parser.add_argument("--rounds", type=int, default=10, help="how often the pairs of a size are scored")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    # Free much memory once, which the process keeps for either library, as one does that has seen a batch of images.
    np.ones(2**21).sum()
    results: dict = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, one used", "numpy": np.__version__}
    for size in SIZES:
        pairs = [make_pair(size, seed) for seed in range(args.pairs)]
        soft = [make_pair(size, seed, background=-4) for seed in range(args.pairs)]
        spots = [make_pair(size, seed, background=-4, scattered=True) for seed in range(args.pairs)]
        for name, images, normalize, ours in (
            ("8-bit maps, reference protocol", to_8_bit(pairs), True, Ours),
            ("8-bit maps, reference protocol, through evaluate", to_8_bit(pairs), True, Evaluate),
            ("8-bit maps that are nowhere 0", to_8_bit(soft), True, Ours),
            ("8-bit maps that are nowhere 0, through evaluate", to_8_bit(soft), True, Evaluate),
            ("probabilities", pairs, False, Ours),
            ("probabilities, through evaluate", pairs, False, Evaluate),
            ("probabilities, scattered masks", spots, False, Ours),
        ):
            results[f"{size}x{size}, {name}"] = compare(images, normalize, ours, args.rounds)
        results[f"{size}x{size}, ms of each part"] = profile(*pairs[0], rounds=10 * args.rounds)
    text = json.dumps(results, indent=2)
    if args.output:
        args.output.write_text(text + "\n")
    print(text)
    return results


if __name__ == "__main__":
    main()
