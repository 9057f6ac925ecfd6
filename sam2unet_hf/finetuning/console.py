"""What a run says: bars, a line for each evaluation, and a few at its end. All numbers are in its files."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from sam2unet_hf.cases_sam2unet import patient_of
from sam2unet_hf.finetuning.cohort import COHORT
from sam2unet_hf.model_card import counted
from sam2unet_hf.patient_table import PatientTable
from sam2unet_hf.training import ImageRows
from sam2unet_hf.training.patients import read_column


# Splits by the prefix of their scores.
TITLES = {"eval": "Validation", "test": "Test", COHORT: "Second cohort"}
# What is worth opening after a run, in this order.
FILES = ("README.md", "predictions.png", f"{COHORT}_predictions.png", "training_curve.png", "all_results.json")


class BarCallback(ProgressCallback):
    """Progress bars as transformers draws them, with the loss in that of the training."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **objects: Any
    ):
        """Show the loss in the bar instead of a line for each."""
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4g}")


class LineCallback(TrainerCallback):
    """A line for each evaluation during training, and for each loss that is logged where there are no bars."""

    def __init__(self, regions: Sequence[str]):
        self.regions = regions
        self._is_training = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any):
        """Begin to write, in the main process."""
        self._is_training = state.is_world_process_zero

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any):
        """Leave the scores after training to the end of the run."""
        self._is_training = False

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **objects: Any
    ):
        """Write what was logged."""
        if self._is_training and "eval_loss" in logs:
            tqdm.write(f"Epoch {state.epoch or 0:.3g}: validation {describe_scores(logs, 'eval', self.regions)}")
        elif self._is_training and "loss" in logs and args.disable_tqdm:
            tqdm.write(f"Step {state.global_step} of {state.max_steps}: loss {logs['loss']:.4g}")


def set_up_console(trainer: Trainer, regions: Sequence[str]) -> None:
    """Give a Trainer these callbacks in the place of those that print all that is logged."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)  # that of notebooks is another
    if not trainer.args.disable_tqdm:
        trainer.add_callback(BarCallback())
    trainer.add_callback(LineCallback(regions))


def describe_images(splits: Mapping[str, ImageRows]) -> str:
    """Return the number of images of each split, and of their patients where these have several."""
    parts = []
    for split, rows in splits.items():
        patients = {patient_of(str(case)) for case in read_column(rows, "case_id") or ()}
        of_patients = f" ({counted(len(patients), 'patient')})" if 0 < len(patients) < len(rows) else ""
        parts.append(f"{len(rows)} {split}{of_patients}")
    return ", ".join(parts)


def with_regions(mean: float, values: Mapping[str, float]) -> str:
    """Return a mean over regions, and the value of each where there are several."""
    listed = ", ".join(f"{region} {value:.3f}" for region, value in values.items())
    return f"{mean:.3f} ({listed})" if len(values) > 1 else f"{mean:.3f}"


def score_with_regions(scores: Mapping[str, float], name: str, regions: Sequence[str]) -> str:
    """Return a score that is a mean over regions, and that of each region where there are several."""
    return with_regions(scores[name], {region: scores[f"{name}_{region}"] for region in regions})


def describe_scores(scores: Mapping[str, float], prefix: str, regions: Sequence[str]) -> str:
    """Return loss and Dice of an evaluation, and Dice of patients where they were scored."""
    parts = [f"loss {scores[f'{prefix}_loss']:.3f}"]
    for name, title in ((f"{prefix}_dice", "Dice"), (f"{prefix}_patient_dice", "patients' Dice")):
        if name in scores:
            parts.append(f"{title} {score_with_regions(scores, name, regions)}")
    return ", ".join(parts)


def describe_training(trainer: Trainer, runtime: float, start: str) -> Iterator[str]:
    """Say what was trained in how many seconds, beginning with what, and which epoch was best."""
    state = trainer.state
    minutes, seconds = divmod(round(runtime), 60)
    steps, epochs = counted(state.global_step, "step"), f"{state.epoch or 0:.4g}"
    yield f"Trained {start}: {steps}, epoch 0 to {epochs}, in {minutes} min {seconds} s."
    best = [logs for logs in state.log_history if logs.get("step") == state.best_global_step and "eval_loss" in logs]
    if state.best_model_checkpoint and best:
        name = (trainer.args.metric_for_best_model or "loss").removeprefix("eval_")
        yield f"Best epoch: {best[0]['epoch']:.4g}, by {name} {state.best_metric:.4f} of the validation split."


def describe_split_scores(
    scores: Mapping[str, float], prefix: str, num_images: int, table: PatientTable, regions: Sequence[str]
) -> Iterator[str]:
    """Say how the images of a split were scored, and its patients if there is a table of them."""
    title = TITLES[prefix]
    dice, iou = (score_with_regions(scores, f"{prefix}_{name}", regions) for name in ("dice", "iou"))
    yield f"{title}, {counted(num_images, 'image')}: Dice {dice}, IoU {iou}, MAE {scores[f'{prefix}_mae']:.4f}."
    if table.rows:
        ranked = list(table.dice.items())
        patient, worst = ranked[-1]
        means = {region: float(columns["volume_dice"]["mean"] or 0) for region, columns in table.summary().items()}
        dice = with_regions(math.fsum(value for _, value in ranked) / len(ranked), means)
        yield f"{title}, {counted(len(ranked), 'patient')}: Dice {dice}, worst {worst:.3f} ({patient})."


def describe_files(folder: Path) -> str:
    """Say where to look."""
    there = [name for name in FILES if (folder / name).exists()]
    return f"The results are in {folder}: {', '.join(there)}."
