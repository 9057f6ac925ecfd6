#!/usr/bin/env python
"""Time all seven metrics, as the public `evaluate` module computes them, against `py_sod_metrics`, in turn.

python examples/benchmarks/bench_metrics.py

Small tumours and masks that fill half of the image are scored with one thread and with the libraries' default number
of threads, alone and beside a process that keeps one core busy, each in a process of its own.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import platform
import subprocess
import sys
import timeit
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import evaluate
import numpy as np
import py_sod_metrics
from scipy import ndimage

from sam2unet_hf.metrics import Accumulator, distances, functional


# NumPy and other libraries read them when they are imported.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def make_pair(size: int, seed: int, background: float = -9, kind: str = "tumour") -> tuple[np.ndarray, np.ndarray]:
    """Draw a noisy prediction, as probabilities, and its boolean reference, both of shape `(size, size)`.

    The logit is about 7 in the mask and `background` far from it: at -9, as of a trained network, 8-bit maps are 0
    there, at -4 they are 0 nowhere. A "tumour" covers 2 to 8 % of the image, as in BraTS slices, and so do "spots" all
    over the image, on which the distance transform takes longest. "half" covers half of it.
    """
    generator = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(generator.standard_normal((size, size)), size / 16)
    if kind == "tumour":
        row, column = generator.uniform(0.3, 0.7, 2) * size
        rows, columns = np.ogrid[:size, :size]
        field = field / field.std() - np.hypot(rows - row, columns - column) / (0.05 * size)
    share = 0.5 if kind == "half" else generator.uniform(0.02, 0.08)
    reference = field > np.quantile(field, 1 - share)
    noise = ndimage.gaussian_filter(generator.standard_normal((size, size)), 4) * 12
    logits = ndimage.gaussian_filter(np.where(reference, 7.0, background), 3) + noise
    return 1 / (1 + np.exp(-logits)), reference


def to_8_bit(pairs: list) -> list:
    return [tuple((array * 255.0).round().astype(np.uint8) for array in pair) for pair in pairs]


def score_with_py_sod_metrics(pairs: list, normalize: bool) -> dict[str, float]:
    """Score a data set by `py_sod_metrics`, whose metrics share a histogram as far as it allows."""
    options = {"with_dynamic": True, "with_adaptive": True, "with_binary": True}
    handlers = {
        "dice": py_sod_metrics.DICEHandler(**options),
        "iou": py_sod_metrics.IOUHandler(**options),
        "f_beta": py_sod_metrics.FmeasureHandler(**options, beta=0.3),
    }
    thresholds = py_sod_metrics.FmeasureV2(handlers)
    e_measure, s_measure = py_sod_metrics.Emeasure(), py_sod_metrics.Smeasure()
    weighted, mae = py_sod_metrics.WeightedFmeasure(), py_sod_metrics.MAE()
    for prediction, reference in pairs:
        for metric in (thresholds, e_measure, s_measure, weighted, mae):
            metric.step(prediction, reference, normalize=normalize)
    scores = {f"mean_{name}": value["dynamic"].mean() for name, value in thresholds.get_results().items()}
    scores["mean_e_measure"] = e_measure.get_results()["em"]["curve"].mean()
    scores["s_measure"] = s_measure.get_results()["sm"]
    scores["weighted_f_beta"] = weighted.get_results()["wfm"]
    scores["mae"] = mae.get_results()["mae"]
    return scores


def score_with_evaluate(pairs: list, metric: evaluate.EvaluationModule) -> dict[str, float]:
    """Score a data set by the public module."""
    for prediction, reference in pairs:
        metric.add(prediction=prediction, reference=reference)
    return metric.compute()


def compare(pairs: list, normalize: bool, rounds: int) -> dict[str, float]:
    """Time both on all pairs in turn, and check that their results agree."""
    path = Path(functional.__file__).with_name("segmentation_report.py")
    metric = evaluate.load(str(path), normalize="minmax" if normalize else None)
    ours = functools.partial(score_with_evaluate, pairs, metric)
    theirs = functools.partial(score_with_py_sod_metrics, pairs, normalize)
    scores = ours()
    difference = max(abs(scores[name] - value) for name, value in theirs().items())
    if difference > 1e-9:
        raise SystemExit(f"The results differ by {difference:g}.")
    times = [[timeit.timeit(score, number=1) for score in (ours, theirs)] for _ in range(rounds)]
    fast, slow = np.median(times, axis=0) / len(pairs) * 1e3
    return {"ours_ms": round(fast, 3), "py_sod_metrics_ms": round(slow, 3), "ratio": round(slow / fast, 2)}


def profile(prediction: np.ndarray, reference: np.ndarray, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each part of ours, on probabilities."""
    pair = functional.make_pair(prediction, reference)
    counts = functional.count_at_thresholds(pair)
    scores = functional.score(prediction, reference)
    accumulator = Accumulator()
    accumulator.add(scores)
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
        "of which distance transform": lambda: distances.squared_distance(reference),
        "SciPy's distance transform": functools.partial(
            ndimage.distance_transform_edt, ~reference, return_distances=False, return_indices=True
        ),
        "MAE": lambda: functional.mean_absolute_error(pair),
        "adding to the sums": lambda: accumulator.add(scores),
        "averages, once per data set": lambda: accumulator.result(),
    }
    medians = {name: np.median(timeit.repeat(part, number=1, repeat=rounds)) for name, part in parts.items()}
    return {name: round(float(seconds) * 1e3, 3) for name, seconds in medians.items()}


def measure(sizes: list[int], num_pairs: int, rounds: int, with_parts: bool) -> dict:
    """Return times and ratios by kind of image, and those of our parts if asked for."""
    warnings.simplefilter("ignore")
    # Free much memory once, which the process keeps for either library, as one does that has seen a batch of images.
    np.ones(2**21).sum()
    results = {}
    for size in sizes:
        tumours, soft, spots, half = (
            [make_pair(size, seed, background, kind) for seed in range(num_pairs)]
            for background, kind in ((-9, "tumour"), (-4, "tumour"), (-4, "spots"), (-9, "half"))
        )
        for name, pairs, normalize in (
            ("tumours, 8-bit maps, reference protocol", to_8_bit(tumours), True),
            ("tumours, 8-bit maps that are nowhere 0", to_8_bit(soft), True),
            ("tumours, probabilities", tumours, False),
            ("scattered spots, probabilities", spots, False),
            ("half of the image, 8-bit maps, reference protocol", to_8_bit(half), True),
            ("half of the image, probabilities", half, False),
        ):
            results[f"{size}x{size}, {name}"] = compare(pairs, normalize, rounds)
        if with_parts:
            for name, pairs in (("tumour", tumours), ("half of the image", half)):
                results[f"{size}x{size}, {name}, ms of each part"] = profile(*pairs[0], rounds=10 * rounds)
    return results


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Keep one core busy."""
    # No argument comes from outside, and no shell reads them, here and below.
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])  # nosec B603
    try:
        yield
    finally:
        process.kill()
        process.wait()


def main() -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[352, 240], help="width and height of the images")
    parser.add_argument("--pairs", type=int, default=16, help="pairs per size")
    parser.add_argument("--rounds", type=int, default=10, help="how often the pairs of a size are scored")
    parser.add_argument("--threads", nargs="+", choices=("one", "default"), default=["one", "default"])
    parser.add_argument("--beside", nargs="+", choices=("nothing", "busy"), default=["nothing", "busy"])
    parser.add_argument("--parts", action="store_true", help="time each part of ours, too")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    parser.add_argument("--here", action="store_true", help="measure in this process, with its threads")
    args = parser.parse_args()
    if args.here:
        results = measure(args.sizes, args.pairs, args.rounds, args.parts)
    else:
        results = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "numpy": np.__version__}
        for threads, beside in itertools.product(args.threads, args.beside):
            environment = {name: value for name, value in os.environ.items() if name not in THREAD_VARIABLES}
            environment |= dict.fromkeys(THREAD_VARIABLES, "1") if threads == "one" else {}
            with busy_core() if beside == "busy" else contextlib.nullcontext():
                command = [sys.executable, __file__, *sys.argv[1:], "--here"]
                pipe = {"stdout": subprocess.PIPE, "text": True}
                output = subprocess.run(command, env=environment, check=True, **pipe).stdout  # nosec B603
            place = "beside a busy process" if beside == "busy" else "alone"
            results[f"{threads} thread{'s' * (threads == 'default')}, {place}"] = json.loads(output)
    text = json.dumps(results, indent=2)
    if args.output:
        args.output.write_text(text + "\n")
    print(text)
    return results


if __name__ == "__main__":
    main()
