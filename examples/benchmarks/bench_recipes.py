#!/usr/bin/env python
"""Train from scratch by recipes that add one ingredient at a time, for the same minutes each, and judge by patients.

python examples/benchmarks/bench_recipes.py --brats_dir BraTS2020_TrainingData --minutes 20 --parallel 2
python examples/benchmarks/bench_recipes.py --brats_dir BraTS2020_TrainingData --minutes 20 --test --arms paper volume

Each arm is a run of `run_segmentation.py` in its own process, which trains as many steps as fit the minutes by the
time that some steps take. That is measured first, for all arms, with as many side by side as train later, so that the
machine must be quiet only then. Where many arms share a GPU, steps are timed too short, since the arms are timed at
different moments: give `--steps` instead. Steps and finished arms are kept in `--work`: the same command goes on after
a stop.
The arms `paper` and `volume` are the recipes of these names. Validation patients are taken from those who would be
trained on, so that there are more of them; with `--test` each arm trains on the training patients of the split and is
scored on its test patients, once.
"""

import argparse
import json
import os
import subprocess
import sys
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
from timing import make_parser, report

from dataset_scripts.brats_slices import BratsSlices


SCRIPT = Path(__file__).parent.parent / "run_segmentation.py"

# Ingredients in the order in which the arms add them, and the options of each.
INGREDIENTS: dict[str, list[str]] = {
    "crop": ["--head_crop_size", "auto"],
    "empty": ["--foreground_share", "0.67"],
    "neighbours": ["--neighbours", "1"],
    "average": ["--ema_decay", "0.99"],
    "augmentation": ["--augmentation", "strong"],
    "batch_iou": ["--iou_over_batch", "true"],
}
# Slices with tumour alone, enlarged to the size of the paper.
START = ["--foreground_share", "1", "--image_size", "352", "--learning_rate", "5e-4", "--warmup_steps", "50"]
ARMS = {"tumour": START}
for name, options in INGREDIENTS.items():
    ARMS[name] = [*list(ARMS.values())[-1], *options]
ALL = list(ARMS)
ARMS |= {"paper": ["--recipe", "paper"], "volume": ["--recipe", "volume"]}

# Of every arm: nothing here is part of a recipe, whose values it would replace.
COMMON = ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
COMMON += ["--per_device_eval_batch_size", "16", "--report_to", "none"]


def split_rows(args: argparse.Namespace) -> Path:
    """Write the rows of all slices that show the head, and those of slice 95 for the paper's recipe, as Parquet."""
    builder = BratsSlices(data_dir=str(args.brats_dir), modalities=args.modalities, slices="head")
    builder.download_and_prepare(num_proc=args.num_proc)
    data = builder.as_dataset()
    train, validation = data["train"], data["validation"]
    if args.test:
        held_out = data["test"]
    else:
        patients = list(dict.fromkeys(train["case_id"]))[: args.validation_patients - len(set(validation["case_id"]))]
        taken = [index for index, case in enumerate(train["case_id"]) if case in patients]
        held_out = datasets.concatenate_datasets([validation, train.select(taken)])
        train = train.select(sorted({*range(len(train))} - {*taken}))
    folder = args.work / ("test" if args.test else "validation")
    middle = [row for row, index in enumerate(train["slice_index"]) if index == args.paper_slice]
    few = held_out.select(range(4))  # of which a run that only measures the time of a step is not slowed down
    for name, rows in (("head", train), ("paper", train.select(middle))):
        for kind, judged in ((name, held_out), (f"{name}-few", few)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            rows.to_parquet(folder / kind / "train-00000-of-00001.parquet")
            judged.to_parquet(folder / kind / "validation-00000-of-00001.parquet")
    counts = {split: len(set(rows["case_id"])) for split, rows in (("train", train), ("judged", held_out))}
    print(f"Patients: {counts}", file=sys.stderr)
    return folder


def run(args: argparse.Namespace, name: str, data: Path, steps: int) -> Path:
    """Run an arm for some steps; return the folder of the run."""
    words = [sys.executable, SCRIPT, "--dataset_name", data, "--modalities", *args.modalities, "--preset", args.preset]
    words += ["--max_steps", steps, *COMMON, *ARMS[name], "--regions", *args.regions]
    if name != "paper":  # an enlarged slice costs as much as four windows
        words += ["--per_device_train_batch_size", args.batch_size // 4 if name == "tumour" else args.batch_size]
    words += ["--dataloader_num_workers", args.num_workers, *args.options]
    options_hash = zlib.crc32(" ".join(map(str, words[2:])).encode())
    output_dir = args.work / f"{data.parent.name}-{data.name}-{name}-{steps}-{options_hash:08x}"
    if (output_dir / "all_results.json").exists():
        return output_dir
    words += ["--output_dir", output_dir, "--overwrite_output_dir"]
    with open(args.work / f"{data.parent.name}-{name}.log", "a") as log:
        options = {"stdout": log, "stderr": log, "check": True, "env": args.environment}
        subprocess.run(list(map(str, words)), **options)  # nosec B603 # no shell reads them
    return output_dir


def read(output_dir: Path, name: str) -> dict[str, Any]:
    return json.loads((output_dir / name).read_text())


def kind_of(name: str) -> str:
    return "paper" if name == "paper" else "head"


def time_step(args: argparse.Namespace, name: str, folder: Path) -> float:
    """Return how many seconds a training step of an arm takes."""
    lengths = (args.calibration_steps, 3 * args.calibration_steps)
    few, more = (
        read(run(args, name, folder / f"{kind_of(name)}-few", steps), "train_results.json")["train_runtime"]
        for steps in lengths
    )
    step = (more - few) / (lengths[1] - lengths[0])
    print(f"{name}: {step:.3f} s a step", file=sys.stderr)
    return step


def train_arm(args: argparse.Namespace, name: str, folder: Path, steps: int) -> dict[str, Any]:
    """Train an arm, and score its patients."""
    output_dir = run(args, name, folder / kind_of(name), steps)
    step = read(output_dir, "train_results.json")["train_runtime"] / steps
    summary, scores = read(output_dir, "validation_patients.json")["summary"], read(output_dir, "all_results.json")
    print(f"{name}, {steps} steps: {scores}", file=sys.stderr)  # in case that time ends before other arms do
    return {"arm": name, "step_s": step, "steps": steps, "summary": summary, "scores": scores}


def results_of(begun: dict[str, Future], args: argparse.Namespace) -> dict[str, Any]:
    """Wait for what was begun for each arm; name those that failed, and go on without them."""
    results = {}
    for name, future in begun.items():
        try:
            results[name] = future.result()
        except (OSError, subprocess.CalledProcessError) as err:
            print(f"{name} failed, see its log in {args.work}: {err}", file=sys.stderr)
    return results


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = make_parser(__doc__, device=False)
    parser.add_argument("--brats_dir", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=ALL)
    parser.add_argument("--minutes", type=float, default=20, help="of training, without what comes before and after")
    parser.add_argument("--steps", type=int, help="of training, in the place of minutes")
    parser.add_argument("--parallel", type=int, default=2, help="arms at a time, with one thread each on a CPU")
    parser.add_argument("--validation_patients", type=int, default=4)
    parser.add_argument("--test", action="store_true", help="train on all but the test patients, and score these")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--batch_size", type=int, default=8, help="windows in a step, of `tumour` a quarter of that")
    parser.add_argument("--modalities", nargs="+", default=["flair"])
    parser.add_argument("--regions", nargs="+", default=["WT=1,2,3"])
    parser.add_argument("--paper_slice", type=int, default=95)
    parser.add_argument("--calibration_steps", type=int, default=15)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="more options of every run, last")
    args = parser.parse_args(argv)
    if unknown := set(args.arms) - set(ARMS):
        parser.error(f"--arms knows {', '.join(ARMS)}, got {', '.join(unknown)}")
    args.work.mkdir(parents=True, exist_ok=True)
    args.environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    folder = split_rows(args)
    steps = dict.fromkeys(args.arms, args.steps)
    with ThreadPoolExecutor(args.parallel) as pool:
        if args.steps is None:
            timed = results_of({name: pool.submit(time_step, args, name, folder) for name in args.arms}, args)
            print("All steps are timed.", file=sys.stderr)
            steps = {name: max(1, round(args.minutes * 60 / seconds)) for name, seconds in timed.items()}
        begun = {name: pool.submit(train_arm, args, name, folder, number) for name, number in steps.items()}
        cases = list(results_of(begun, args).values())
    if not cases:
        raise SystemExit("No arm came to its end.")
    rows = []
    for case in cases:
        for region, columns in case["summary"].items():
            dice, distance = columns["volume_dice"], columns["hausdorff95_mm"]
            row = {"arm": case["arm"], "region": region, "steps": case["steps"], "s/step": f"{case['step_s']:.3f}"}
            row |= {"patients' Dice": f"{dice['mean']:.3f}", "median": f"{dice['median']:.3f}"}
            row |= {"worst": f"{dice['worst']:.3f}", "HD95 (mm)": f"{distance['mean']:.1f}"}
            rows.append(row)
    return report(__file__, argv, args, {"cases": cases}, rows)


if __name__ == "__main__":
    main()
