"""The folder of a run: whether a run in it is resumed, and its record with arguments, versions, commit and data."""

import dataclasses
import datetime
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import datasets

from sam2unet_hf.clean_up_sam2unet import CLEAN_UP_FILE
from sam2unet_hf.finetuning.arguments import RESUME_WORDS, DataArguments, ModelArguments, SegmentationTrainingArguments
from sam2unet_hf.finetuning.data_checks import DataSplits, file_bytes, image_columns
from sam2unet_hf.patient_checks import SPLITS_FILE
from sam2unet_hf.training import ParquetRows, Sam2UNetTrainer
from sam2unet_hf.training.resume import last_complete_checkpoint, why_incomplete


logger = logging.getLogger("provenance")

# Arguments that say what is trained and on what, less those that say how it is read.
MODEL_AND_DATA = {field.name for kind in (ModelArguments, DataArguments) for field in dataclasses.fields(kind)}
MODEL_AND_DATA -= {"recipe", "num_proc", "shuffle_buffer", "allow_leaks", "iou_over_batch", "foreground_share"}

RECORD = "run.json"
RESULTS_FILE = "all_results.json"  # written last, so it tells that the run has finished
FOLDS_FILE = "folds.json"  # in the folder of a cross-validation, which holds a run for each fold
# What a run writes besides the final checkpoint.
RUN_FILES = (
    *("checkpoint-*", "*_results.json", "trainer_state.json", RECORD, "predictions*", "training_*.png"),
    *("training_info.json", "README.md"),
    *(SPLITS_FILE, "*_patients.csv", "*_patients.json", "test_dir_predictions.png"),
)


def find_checkpoint(arguments: dict[str, Any], args: SegmentationTrainingArguments) -> str | None:
    """Return the checkpoint to resume from, if there is one; refuse to replace a run unasked, or to mix two.

    A run is resumed with the `arguments` that it began with alone.
    """
    output_dir = Path(args.output_dir)
    if (output_dir / FOLDS_FILE).exists():
        raise SystemExit(f"{output_dir} holds a cross-validation. Pass its --folds, or another --output_dir.")
    last_checkpoint = last_complete_checkpoint(output_dir)
    if named := args.resume_from_checkpoint:
        if named.lower() not in RESUME_WORDS:
            if not Path(named).exists():
                there = ", ".join(sorted(path.name for path in output_dir.glob("checkpoint-*"))) or "none"
                raise SystemExit(
                    f"--resume_from_checkpoint: {named} does not exist. In {output_dir} there is {there}."
                )
            if fault := why_incomplete(named):
                raise SystemExit(f"--resume_from_checkpoint: {named} is incomplete ({fault}). Name another.")
            check_same_model_and_data(Path(named).resolve().parent, arguments)
            return named
        if last_checkpoint is None:
            raise SystemExit(f"--resume_from_checkpoint: there is no checkpoint in {output_dir} to resume from.")
        check_same_model_and_data(output_dir, arguments)
        return last_checkpoint
    if args.overwrite_output_dir:
        return None
    if (output_dir / RESULTS_FILE).exists():
        raise SystemExit(
            f"{output_dir} holds a finished run. Pass --overwrite_output_dir to replace it, another --output_dir to "
            "keep it, or --resume_from_checkpoint true to train it further."
        )
    if last_checkpoint is not None:
        check_same_arguments(output_dir, arguments)
        logger.warning("Going on with the unfinished run in %s from %s.", output_dir, Path(last_checkpoint).name)
    return last_checkpoint


def name_for_trackers(checkpoint: str | None, args: SegmentationTrainingArguments) -> str:
    """Return the name of a run in trackers: the one given, else that of the run that goes on, else a new one."""
    record = None if checkpoint is None else read_record(Path(checkpoint).resolve().parent)
    before = None if record is None else record["training_arguments"].get("run_name")
    # The folder of a fold does not say of what it is a fold.
    folder = "-".join(part for part in Path(args.output_dir).resolve().parts[-2:] if part != "runs")
    return args.run_name or before or f"{folder}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def check_same_arguments(folder: Path, arguments: dict[str, Any]) -> None:
    """Exit if the run in a folder was begun with other arguments than these."""
    record = read_record(folder)
    if record is None:
        return
    article, state = ("a", "finished") if (folder / RESULTS_FILE).exists() else ("an", "unfinished")
    if unknown := sorted(record["arguments"].keys() ^ arguments.keys()):
        raise SystemExit(
            f"Another version of this package or of transformers began the {state} run in {folder}: only one of the "
            f"two has the arguments {', '.join(unknown)}. Pass --overwrite_output_dir or another --output_dir."
        )
    if changed := changed_values(record["arguments"], arguments):
        raise SystemExit(
            f"{folder} holds {article} {state} run with other values of {', '.join(changed)}. Start again "
            f"{as_options(changed)} to go on with it, or pass --overwrite_output_dir or another --output_dir."
        )


def check_same_model_and_data(folder: Path, arguments: dict[str, Any]) -> None:
    """Exit if the run in a folder, which is to be trained further, has another model, or other images or patients.

    What it was trained on could be what it is scored on, and weights could not be loaded. All else may change, which
    is said.
    """
    record = read_record(folder)
    if record is None:
        return
    changed = changed_values(record["arguments"], {**record["arguments"], **arguments})
    fixed = {name: value for name, value in changed.items() if name in MODEL_AND_DATA}
    if fixed:
        shown = changed if changed.get("recipe") else fixed
        raise SystemExit(
            f"--resume_from_checkpoint: {folder} was trained with other values of {', '.join(fixed)}, so that it may "
            f"have seen patients that are scored now, or its weights may not fit. Start again {as_options(shown)}, or "
            f"start a new run from it by --model_name_or_path {folder} and another --output_dir."
        )
    if changed:
        logger.warning("Training %s further, which was begun %s.", folder, as_options(changed))


def as_options(values: dict[str, Any]) -> str:
    """Return options as they are given on a command line; of those that a recipe sets the recipe alone."""
    values = {"recipe": values["recipe"]} if values.get("recipe") else values
    left_out = [f"--{name}" for name, value in values.items() if value is None]
    given = [f"--{name} {as_word(value)}" for name, value in values.items() if value is not None]
    parts = [f"{word} {' '.join(options)}" for word, options in (("with", given), ("without", left_out)) if options]
    return " and ".join(parts)


def as_word(value: Any) -> str:
    """Return the value of an option as it is given on a command line."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_steps_left(trainer: Sam2UNetTrainer, checkpoint: str, arguments: dict[str, Any]) -> None:
    """Exit if there is no step left to train after a checkpoint, so that no settings are written that were not used.

    The run in the output folder, of the same `arguments`, that lacks its results alone may go on.
    """
    args = cast("SegmentationTrainingArguments", trainer.args)
    step = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    *_, max_steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    if step < max_steps:
        return
    output_dir = Path(args.output_dir)
    record = read_record(output_dir)
    is_finished = (output_dir / RESULTS_FILE).exists()
    if is_finished or record is None or changed_values(record["arguments"], arguments):
        asked = f"--max_steps {max_steps}" if args.max_steps > 0 else f"--num_train_epochs {args.num_train_epochs:g}"
        raise SystemExit(
            f"--resume_from_checkpoint: nothing is left to train after {checkpoint}, which is at step {step}: {asked} "
            f"asks for {max_steps}. Raise {asked.split()[0]} to train further. To train with other settings, pass "
            "--overwrite_output_dir or another --output_dir, and no --resume_from_checkpoint."
        )


def start_run(record: dict[str, Any], args: SegmentationTrainingArguments) -> None:
    """Make the output folder, remove an older run if `overwrite_output_dir` says so, and write the record."""
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if args.overwrite_output_dir and not args.resume_from_checkpoint:
        remove_run(output_dir)
    (output_dir / RESULTS_FILE).unlink(missing_ok=True)  # a finished run that is trained further is unfinished
    (output_dir / CLEAN_UP_FILE).unlink(missing_ok=True)  # its rules are for the weights that training replaces
    before = read_record(output_dir)
    for part in ("data", "versions", "git") if before else ():
        if changed := changed_values(before[part], record[part]):
            values = ", ".join(f"{name} {record[part].get(name)} (was {value})" for name, value in changed.items())
            logger.warning("Other %s than when this run began, so it may end otherwise: %s.", part, values)
    write_json(output_dir / RECORD, record)


def remove_run(folder: Path) -> None:
    """Remove what a run has written into a folder, but for its final checkpoint and what is not of the run."""
    for path in [path for pattern in RUN_FILES for path in folder.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def run_record(arguments: dict[str, Any], args: SegmentationTrainingArguments, data: DataSplits) -> dict[str, Any]:
    """Return what is needed to repeat a run: `arguments` must stay the same when it is resumed."""
    packages = {dist.metadata["Name"]: dist.version for dist in metadata.distributions() if dist.metadata["Name"]}
    return {
        "command": ["<token>" if args.hub_token and args.hub_token in word else word for word in sys.argv],
        "arguments": arguments,
        "training_arguments": {
            name: value for name, value in args.to_dict().items() if not name.endswith("_token") and value is not None
        },
        "processes": args.world_size,
        "data": {split: fingerprint(rows) for split, rows in data.items()},
        "versions": {"python": platform.python_version(), **packages},
        "git": commit(),
        "platform": platform.platform(),
    }


def commit() -> dict[str, str | bool]:
    """Return the commit of the checkout that holds this file, and whether tracked files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    options: dict[str, Any] = {"text": True, "stderr": subprocess.DEVNULL, "timeout": 30}
    try:  # no argument comes from outside, and no shell reads them
        # An installed package may lie in the checkout of something else.
        subprocess.check_output([*git, "ls-files", "--error-unmatch", __file__], **options)  # nosec B603
        head = subprocess.check_output([*git, "rev-parse", "HEAD"], **options)  # nosec B603
        changes = subprocess.check_output([*git, "status", "--porcelain", "-uno"], **options)  # nosec B603
        return {"commit": head.strip(), "changed": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        return {}  # there is no git, or no checkout


def fingerprint(rows: datasets.Dataset | ParquetRows) -> str:
    """Return the SHA-256 of the rows, images by the bytes of their files, which is the same on every machine."""
    if isinstance(rows, ParquetRows):  # by the footers of the files, because reading all rows would take too long
        return rows.fingerprint()
    digest = hashlib.sha256(repr(sorted(rows.column_names)).encode())
    images = image_columns(rows)
    for name in images:
        rows = rows.cast_column(name, datasets.Image(decode=False))
    for row in rows:
        for name in sorted(row):
            value = row[name]
            if name in images and value is not None:
                value = hashlib.sha256(file_bytes(value, name)).hexdigest()
            digest.update(repr(value).encode())
    return digest.hexdigest()


def changed_values(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return by name the values of `before` that differ now; `None` for names that are new."""
    now = json.loads(json.dumps(now))  # `before` was read from JSON, which has lists for tuples
    return {name: before.get(name) for name in sorted({*before, *now}) if before.get(name) != now.get(name)}


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of the run in a folder, if there is one."""
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_json(path: Path, content: Any, sort_keys: bool = True) -> None:
    """Write a JSON file in one step, so that an error leaves the old one; make its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=sort_keys) + "\n", encoding="utf-8")
    os.replace(partial, path)
