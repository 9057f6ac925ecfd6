#!/usr/bin/env python
"""Train SAM2-UNet, the five systems of its paper and nnU-Net on the same patients, and judge all by whole patients.

python examples/compare_models.py --steps 60 --folds 2 --systems sam2unet unet
python examples/compare_models.py --brats_dir BraTS2020_TrainingData --folds 3 --minutes 20
python examples/compare_models.py --brats_dir BraTS2020_TrainingData --folds 3 --minutes 20 --fold 1 --recipe volume

Every fold is left out once: a system is trained on all other patients for the same time, turned into steps by timing
some, and segments those of the fold as volumes. All but nnU-Net are trained once with the input of each recipe.
Further options are those of run_segmentation.py, such as --modalities, --regions, --bf16 and --use_cpu, and count for
all systems. A comparison that was stopped goes on by the same command.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from comparison_report import write_report
from datasets import concatenate_datasets
from filelock import FileLock
from systems import CONFIGURATIONS, OPTIONS_OF_FOLDS, SYSTEMS, NNUNetSystem, SliceSystem, System, Task

from sam2unet_hf.cases_sam2unet import find_cases
from sam2unet_hf.finetuning.data_sources import (
    DEFAULT_MODALITIES,
    find_columns,
    find_regions,
    load_folds,
    scans_folder,
)
from sam2unet_hf.finetuning.parsing import parse_arguments, requested_regions
from sam2unet_hf.finetuning.processes import set_up_logging
from sam2unet_hf.finetuning.provenance import changed_values, fingerprint, write_json
from sam2unet_hf.finetuning.recipes import RECIPES


logger = logging.getLogger("compare_models")

RECORD = "comparison.json"
# What a recipe needs here besides: the paper's slice 95 alone of each patient is too little to segment patients by,
# and DeepLabV3 trains on no single image.
DEFAULTS = {
    "volume": [],
    "paper": ["--slices", "tumor", "--min_tumor_pixels", "20", "--per_device_train_batch_size", "4"],
}
# Options of `run_segmentation.py` that a comparison sets itself.
OWN_OPTIONS = ("max_steps", "num_train_epochs", "save_steps", *OPTIONS_OF_FOLDS, "do_train", "test_dir", "streaming")
OWN_OPTIONS += ("dataset_name", "model_name_or_path", "resume_from_checkpoint", "overwrite_output_dir", "push_to_hub")


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Read our options, and return them with those of `run_segmentation.py`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--folds", type=int, default=3, help="into how many the patients are dealt; default: 3")
    parser.add_argument("--fold", type=int, help="train and score this one alone, counted from 0, as on a cluster")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument(
        "--recipe", nargs="+", default=list(RECIPES), choices=list(RECIPES), help="default: each, one after the other"
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="training time of each system and fold")
    length.add_argument("--steps", type=int, help="training steps of each system and fold")
    parser.add_argument(
        "--learning_rate", nargs="+", default=[], help="a number, SYSTEM=NUMBER for one system; default: the recipe's"
    )
    parser.add_argument("--weights", choices=["imagenet"], help="pretrained encoders for the five baselines")
    parser.add_argument(
        "--mirrors",
        choices=["own", "all", "none"],
        default="own",
        help="who averages over mirror images: nnU-Net, as it does by itself, all systems, or none; default: own",
    )
    parser.add_argument(
        "--nnunet_memory_gb",
        type=float,
        help="GPU memory that nnU-Net plans its batches and patches for; default: its own, about 8, far too many "
        "voxels a step for a CPU",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/comparison"))
    args, words = parser.parse_known_args(argv)
    if args.folds < 2:
        parser.error(f"--folds must be at least 2, got {args.folds}")
    if args.fold is not None and not 0 <= args.fold < args.folds:
        parser.error(f"--fold must be from 0 to {args.folds - 1}, got {args.fold}")
    for name in ("minutes", "steps", "nnunet_memory_gb"):
        if (value := getattr(args, name)) is not None and not value > 0:
            parser.error(f"--{name} must be above 0, got {value:g}")
    if taken := [name for name in OWN_OPTIONS if any(word.split("=")[0] == f"--{name}" for word in words)]:
        parser.error(f"--{taken[0]} is an option of run_segmentation.py that a comparison sets itself: leave it out")
    try:
        learning_rate(args, "unet")
    except (KeyError, ValueError) as err:
        parser.error(f"--learning_rate takes one number and SYSTEM=NUMBER, got {' '.join(args.learning_rate)}: {err}")
    return args, words


def learning_rate(args: argparse.Namespace, system: str) -> float | None:
    """Return the learning rate of a system, or `None` for that of the recipe."""
    own = dict(text.split("=") for text in args.learning_rate if "=" in text)
    if unknown := own.keys() - SYSTEMS.keys():
        raise KeyError(*unknown)
    common = [text for text in args.learning_rate if "=" not in text]
    if len(common) > 1:
        raise ValueError("there are several numbers")
    rates = {name: float(rate) for name, rate in own.items()} | {"": float(common[0]) if common else None}
    return rates.get(system, rates[""])


def words_of_recipe(args: argparse.Namespace, words: Sequence[str], recipe: str) -> list[str]:
    """Return the options of `run_segmentation.py` for the runs of a recipe; those that are given come last and win."""
    return ["--recipe", recipe, "--folds", str(args.folds), *DEFAULTS[recipe], *words]


def read_task(args: argparse.Namespace, words: dict[str, list[str]]) -> tuple[Task, dict[str, Any]]:
    """Return what the systems share, and what tells whether it is the same again: the folds, and the data by recipe.

    The folds of all recipes must be of the same patients.
    """
    names: dict[str, list[list[str]]] = {}
    prints: dict[str, list[str]] = {}
    for recipe, own_words in words.items():
        model_args, data_args, training_args = parse_arguments(own_words)
        folds = load_folds(data_args)
        names[recipe] = [fold.cases for fold in folds]
        prints[recipe] = [fingerprint(fold.rows) for fold in folds]
    first, *others = names
    for other in others:
        if names[other] != names[first]:
            raise SystemExit(
                f"The folds of --recipe {first} and {other} are of different patients, because a patient has no slice "
                "for one of them. Compare one recipe at a time, or pass other --slices."
            )
    rows = {"train": concatenate_datasets([fold.rows for fold in folds])}
    requested = requested_regions(model_args, data_args)
    regions = find_regions(rows, *find_columns(rows, data_args), requested, data_args.labels).regions
    cases = {case.case_id: case for case in find_cases(scans_folder(data_args), data_args.labels)}
    task = Task(
        args.output_dir,
        [[cases[name] for name in fold] for fold in names[first]],
        data_args.modalities or DEFAULT_MODALITIES,
        regions,
        training_args.device.type,
        args.mirrors,
        args.nnunet_memory_gb,
    )
    return task, {"folds": {f"fold_{fold}": own for fold, own in enumerate(names[first])}, "data": prints}


def note_comparison(folder: Path, record: dict[str, Any]) -> None:
    """Write what the comparison is of, or exit if the folder holds another one."""
    path = folder / RECORD
    before = json.loads(path.read_text()) if path.exists() else {}
    common = {part: {**before.get(part, {}), **own} for part, own in record.items()}
    for part, own in record.items():
        known = {name: value for name, value in before.get(part, {}).items() if name in own}
        if known and (changed := changed_values(known, {name: own[name] for name in known})):
            values = ", ".join(f"{name}={value}" for name, value in changed.items())
            raise SystemExit(
                f"{folder} holds a comparison with other {part}: {values}. Choose another --output_dir, or go on with "
                "those."
            )
    write_json(path, common, sort_keys=False)


def make_systems(args: argparse.Namespace, words: dict[str, list[str]], task: Task) -> list[System]:
    """Return all that is compared: the systems of slices with each recipe, and nnU-Net."""
    systems: list[System] = []
    for recipe, own_words in words.items():
        for key in args.systems:
            if key not in CONFIGURATIONS:
                rate = learning_rate(args, key)
                options = own_words if rate is None else [*own_words, "--learning_rate", str(rate)]
                systems.append(SliceSystem(key, recipe, task, options, args.weights))
    return systems + [NNUNetSystem(key, task) for key in args.systems if key in CONFIGURATIONS]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args, words = parse_args(argv)
    set_up_logging()
    transformers.utils.logging.set_verbosity_error()
    by_recipe = {recipe: words_of_recipe(args, words, recipe) for recipe in args.recipe}
    task, record = read_task(args, by_recipe)
    systems = make_systems(args, by_recipe, task)
    names = ("minutes", "steps", "weights", "mirrors", "nnunet_memory_gb")
    record["options"] = {name: getattr(args, name) for name in names} | {"regions": task.regions}
    record["options"]["device"] = task.device  # for which steps were timed
    # Several processes may each run a part of the same comparison.
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(args.output_dir / ".lock"):
        note_comparison(args.output_dir, record)
        for system in systems:
            system.check()
        # Measure all systems before training any, because it shows a missing library within minutes.
        costs = [system.costs(args.steps, args.minutes) for system in systems]
    for fold in range(args.folds) if args.fold is None else [args.fold]:
        for system, own in zip(systems, costs, strict=True):
            system.run(fold, own["steps"])
    write_report(args, systems, f"python examples/compare_models.py {' '.join(argv)}".strip())


if __name__ == "__main__":
    main()
