"""Time the scores of patients, lesions and all, on volumes of BraTS' size, and the official code of BraTS 2026 beside.

python examples/benchmarks/bench_lesions.py
python examples/benchmarks/bench_lesions.py --brats_dir BraTS2020_TrainingData --official official/bin/brats-evaluate
"""

import os


# Set them before NumPy is imported, which reads them once.
for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{library}_NUM_THREADS"] = "1"

import argparse
import functools
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from sam2unet_hf.cases_sam2unet import find_cases
from sam2unet_hf.metrics.lesion_functional import compare_lesions
from sam2unet_hf.metrics.volume_functional import BRATS_REGIONS
from sam2unet_hf.patient_table import score_patient


def make_reference(seed: int, shape: Sequence[int]) -> np.ndarray:
    """Draw label ids of a ragged tumour of some 100 ml, and of six small ones, in voxels of 1 mm."""
    generator = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(generator.standard_normal(shape, dtype=np.float32), 4)
    field /= field.std()
    grid = np.ogrid[tuple(slice(size) for size in shape)]
    labels = np.zeros(shape, dtype=np.uint8)
    for radius in (30, 10, 8, 6, 5, 4, 3):
        centre = [generator.uniform(0.3, 0.7) * size for size in shape]
        reach = np.sqrt(sum((axis - at) ** 2 for axis, at in zip(grid, centre, strict=True))) / radius - 0.15 * field
        for label, share in ((2, 1.0), (3, 0.7), (1, 0.45)):
            labels[reach < share] = label
    return labels


def make_prediction(reference: np.ndarray, seed: int) -> np.ndarray:
    """Move the borders of a reference by up to two voxels here and there, and add false spots."""
    generator = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(generator.standard_normal(reference.shape, dtype=np.float32), 2)
    field /= field.std()
    larger, smaller = ndimage.grey_dilation(reference, size=3), ndimage.grey_erosion(reference, size=3)
    prediction = np.where(field > 0.6, larger, np.where(field < -0.8, smaller, reference))
    around = ndimage.binary_dilation(reference > 0, iterations=12) & (reference == 0)
    prediction[around & (field > 3)] = 3
    return prediction.astype(np.uint8)


def spend(task: Callable[[], object]) -> np.ndarray:
    """Return the seconds that a task takes by the clock and of a processor, its child processes included.

    The two differ on a machine that does other things, too.
    """
    before = time.perf_counter(), os.times()
    task()
    after = time.perf_counter(), os.times()
    return np.array([after[0] - before[0], sum(after[1][:4]) - sum(before[1][:4])])


def time_official(command: str, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return what the official command takes for one case more, without its start, see `spend`."""
    with tempfile.TemporaryDirectory() as folder:
        for index, pair in enumerate(pairs):
            for name, labels in zip(("predictions", "references"), pair, strict=True):
                path = Path(folder, name, f"BraTS-GLI-{index:05d}-000.nii.gz")
                path.parent.mkdir(exist_ok=True)
                nib.save(nib.Nifti1Image(labels, np.eye(4)), path)
        paths = ["--pred_path", f"{folder}/predictions", "--ref_path", f"{folder}/references"]
        full = [command, "--config", "gli", *paths, "--summary_json", f"{folder}/summary.json", "--num_subjects"]

        def run(cases: int) -> np.ndarray:
            arguments = [*full, str(cases)]
            return spend(
                lambda: subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)  # nosec B603 # no shell
            )

        return (run(len(pairs)) - run(1)) / (len(pairs) - 1)


def main(argv: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5, help="how many")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is scored")
    parser.add_argument("--shape", type=int, nargs=3, default=[240, 240, 155], help="of made-up volumes")
    parser.add_argument("--brats_dir", type=Path, help="take the references of these scans, instead of made-up ones")
    parser.add_argument("--official", help="path of the command brats-evaluate, in an environment of its own")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    args = parser.parse_args(argv)
    if args.official and args.cases < 2:
        parser.error(
            f"--cases must be at least 2 for --official, which is timed by what one more takes, got {args.cases}"
        )
    if args.brats_dir:
        references = [case.read_mask().voxels for case in find_cases(args.brats_dir)[: args.cases]]
    else:
        references = [make_reference(seed, args.shape) for seed in range(args.cases)]
    pairs = [(make_prediction(reference, seed), reference) for seed, reference in enumerate(references)]
    seconds, lesions = [], []
    for pair in pairs:
        score = functools.partial(score_patient, *pair, BRATS_REGIONS, (1, 1, 1))
        seconds.append(np.median([spend(score) for _ in range(args.rounds)], axis=0))
        found = compare_lesions(*(labels > 0 for labels in pair))
        counts = {"pairs": len(found.pairs), "missed": len(found.missed_mm3), "spurious": found.spurious}
        lesions.append({**counts, "reference_ml": int(np.count_nonzero(pair[1])) / 1000})
    results: dict = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, one used", "numpy": np.__version__}
    results["whole_tumour"] = lesions
    official = time_official(args.official, pairs) if args.official else None
    for place, kind in enumerate(("clock", "processor")):
        own = [float(both[place]) for both in seconds]
        results[kind] = {"mean": np.mean(own), "largest": max(own)}
        if official is not None:
            results[kind] |= {"official": official[place], "ratio": official[place] / np.mean(own)}
        results[kind] = {name: round(float(value), 3) for name, value in results[kind].items()}
    text = json.dumps(results, indent=2)
    if args.output:
        args.output.write_text(text + "\n")
    print(text)
    return results


if __name__ == "__main__":
    main()
