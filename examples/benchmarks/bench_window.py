#!/usr/bin/env python
"""Time what the window about the head saves: a training step, and a patient's scan from file to file.

OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python examples/benchmarks/bench_window.py --case BraTS20_Training_001
python examples/benchmarks/bench_window.py --case BraTS20_Training_001 --preset large --tasks volume --rounds 3
python examples/benchmarks/bench_window.py --case BraTS20_Training_001 --window_dtype auto

Two models from scratch see one scan: `resized` whole slices at `--image_size`, as by the recipe of the paper, and
`window` the window about the head with a slice on either side, as by the recipe for volumes. A training step is
forward, loss, backward and AdamW of a batch in memory. From file to file is reading the NIfTI file, segmenting the
slices that show the head, and writing the label map. Peaks of memory are those of processes of their own.
"""

import argparse
import functools
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from bench_model import training_step
from timing import DTYPES, make_parser, peak_memory_gb, report, reset_peak_memory, time_in_turn

from sam2unet_hf import Sam2UNetConfig, Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor
from sam2unet_hf.cases_sam2unet import find_cases
from sam2unet_hf.configuration_sam2unet import PRESETS
from sam2unet_hf.devices import fast_dtype
from sam2unet_hf.scans_sam2unet import head_box, to_grey
from sam2unet_hf.training import choose_head_crop_size
from sam2unet_hf.volume import Sam2UNetVolumePipeline


INPUTS = ("resized", "window")
TASKS = ("training step", "volume")


def build(
    args: argparse.Namespace, name: str
) -> tuple[Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor, tuple[int, int]]:
    """Return model and processor of an input, and height and width of what the model sees."""
    options: dict[str, Any] = {"regions": {"WT": [1, 2, 3]}}
    if name == "window":
        (case,) = find_cases(args.case)
        box = head_box([to_grey(scan) for scan in case.read_images([args.modality])], "axial")
        options |= {"neighbours": 1, "head_crop_size": choose_head_crop_size([box])}
    else:
        options["size"] = {"height": args.image_size, "width": args.image_size}
    processor = Sam2UNetImageProcessor(**options)
    size = processor.head_crop_size or dict(processor.size)
    torch.manual_seed(0)
    model = Sam2UNetForSemanticSegmentation(Sam2UNetConfig.from_preset(args.preset, freeze_encoder=False))
    return model.to(args.device), processor, (size["height"], size["width"])


def dtype_of(args: argparse.Namespace, name: str) -> torch.dtype:
    """Return the dtype of an input's model."""
    dtype = args.window_dtype if name == "window" and args.window_dtype else args.dtype
    return fast_dtype(args.device) if dtype == "auto" else DTYPES[dtype]


def step(args: argparse.Namespace, name: str) -> Callable[[], None]:
    """Return a function that trains one step, under autocast if it is not in float32."""
    model, _, size = build(args, name)
    autocast = None if dtype_of(args, name) == torch.float32 else dtype_of(args, name)
    return training_step(model, torch.randn(args.batch_size, 3, *size, device=args.device), autocast)


def volume(args: argparse.Namespace, name: str, folder: str) -> Callable[[], None]:
    """Return a function that segments the scan from file to file."""
    model, processor, _ = build(args, name)
    segment = Sam2UNetVolumePipeline(model.to(dtype_of(args, name)), processor, [args.modality])

    def run() -> None:
        found = segment(args.case, batch_size=args.volume_batch_size, progress=False)
        found.save(Path(folder, f"{name}.nii.gz"))

    return run


def peak_of(args: argparse.Namespace, task: str, name: str) -> float:
    """Return the peak in GB of this process, which runs a task twice."""
    with tempfile.TemporaryDirectory() as folder:
        run = step(args, name) if task == "training step" else volume(args, name, folder)
        reset_peak_memory(args.device)
        run(), run()
        return peak_memory_gb(args.device)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--case", type=Path, required=True, help="folder of a BraTS case")
    parser.add_argument("--modality", default="flair")
    parser.add_argument("--preset", default="tiny", choices=list(PRESETS))
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS, help="default: both")
    parser.add_argument("--batch_size", type=int, default=8, help="of a training step")
    parser.add_argument("--volume_batch_size", type=int, default=8, help="slices of a volume at once")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of volumes; training is autocast")
    parser.add_argument(
        "--window_dtype",
        choices=["auto", *DTYPES],
        help="of the window, where it is another; auto as `python -m sam2unet_hf.volume` chooses it",
    )
    parser.add_argument("--image_size", type=int, default=352, help="that slices are resized to")
    parser.add_argument(
        "--memory", action="store_true", help="measure the peak memory too; on a CPU under Linux alone"
    )
    args = parser.parse_args(argv)
    cases, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        prepare_by_task = {"training step": step, "volume": functools.partial(volume, folder=folder)}
        for task in args.tasks:
            prepare = prepare_by_task[task]
            times = time_in_turn({name: prepare(args, name) for name in INPUTS}, args.rounds, args.device)
            seconds = {name: statistics.median(values) for name, values in times.items()}
            case: dict[str, Any] = {"task": task, "seconds": seconds, "ratio": seconds["window"] / seconds["resized"]}
            row = {"task": task, **{name: f"{value:.2f} s" for name, value in seconds.items()}}
            row["window / resized"] = f"{case['ratio']:.3f}"
            if args.memory:
                context = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1) as pool:
                    case["peak_gb"] = {name: pool.submit(peak_of, args, task, name).result() for name in INPUTS}
                row["peak memory"] = ", ".join(f"{name} {peak:.2f} GB" for name, peak in case["peak_gb"].items())
            cases.append(case)
            rows.append(row)
    return report(__file__, argv, args, {"cases": cases}, rows)


if __name__ == "__main__":
    main()
