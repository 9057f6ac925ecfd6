"""The output folder of a run: find a run to resume in it, and begin a run in it."""

import logging
import shutil
from pathlib import Path
from typing import Any

from arguments import SegmentationTrainingArguments
from hp_search import RESULTS, STUDY
from provenance import RECORD, changed_values, read_record, write_json

from sam2unet_hf.training.resume import last_complete_checkpoint, why_incomplete


logger = logging.getLogger(__name__)

RESULTS_FILE = "all_results.json"  # written last, so it tells that the run has finished
# What a run writes besides the final checkpoint.
RUN_FILES = (
    "checkpoint-*",
    "*_results.json",
    "trainer_state.json",
    RECORD,
    "predictions*",
    "training_*.png",
    "training_info.json",
    "README.md",
    STUDY,
    RESULTS,
)


def find_checkpoint(arguments: dict[str, Any], args: SegmentationTrainingArguments) -> str | None:
    """Return the checkpoint to resume from, if there is one; refuse to replace or mix runs unasked.

    Args:
        arguments: Arguments that must be those of the run that is resumed.
        args: Training arguments, with the output folder.

    Raises:
        SystemExit: If the folder holds a finished run, or one of other arguments, or the checkpoint that is named is
            incomplete.
    """
    output_dir = Path(args.output_dir)
    last_checkpoint = last_complete_checkpoint(output_dir)
    if args.resume_from_checkpoint:
        if args.resume_from_checkpoint.lower() not in ("true", "last"):
            if fault := why_incomplete(args.resume_from_checkpoint):
                raise SystemExit(
                    f"--resume_from_checkpoint: {args.resume_from_checkpoint} is incomplete ({fault}). Name another."
                )
            return args.resume_from_checkpoint
        if last_checkpoint is None:
            raise SystemExit(f"--resume_from_checkpoint: there is no checkpoint in {output_dir} to resume from.")
        return last_checkpoint
    if args.overwrite_output_dir:
        return None
    if (output_dir / RESULTS_FILE).exists():
        raise SystemExit(
            f"{output_dir} holds a finished run. Pass --overwrite_output_dir to replace it, another --output_dir to "
            "keep it, or --resume_from_checkpoint true to train it further."
        )
    if last_checkpoint is not None or (output_dir / STUDY).exists():
        before = read_record(output_dir)
        if changed := changed_values(before["arguments"] if before else arguments, arguments):
            raise SystemExit(
                f"{output_dir} holds an unfinished run with other values of {', '.join(changed)}. Start again with "
                f"{', '.join(f'{name}={value}' for name, value in changed.items())} to go on with it, or pass "
                "--overwrite_output_dir or another --output_dir."
            )
    if last_checkpoint is not None:
        logger.warning("Going on with the unfinished run in %s from %s.", output_dir, Path(last_checkpoint).name)
    return last_checkpoint


def start_run(record: dict[str, Any], args: SegmentationTrainingArguments) -> None:
    """Make the output folder, remove an older run if `overwrite_output_dir` says so, and write the record.

    Args:
        record: Record of the run, see [`~provenance.run_record`].
        args: Training arguments, with the output folder.
    """
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if args.overwrite_output_dir and not args.resume_from_checkpoint:
        for path in [path for pattern in RUN_FILES for path in output_dir.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (output_dir / RESULTS_FILE).unlink(missing_ok=True)  # a finished run that is trained further is unfinished
    before = read_record(output_dir)
    for part in ("data", "versions", "git") if before else ():
        if changed := changed_values(before[part], record[part]):
            logger.warning(
                "Other %s than when this run began, so it may end otherwise: %s.",
                part,
                ", ".join(f"{name} {record[part].get(name)} (was {value})" for name, value in changed.items()),
            )
    write_json(output_dir / RECORD, record)
