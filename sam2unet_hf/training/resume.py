"""Runs that stop and go on: which checkpoints are complete, how SIGTERM ends a run, and what a run takes over."""

import contextlib
import errno
import functools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy

from .averaging import AVERAGE, RAW_WEIGHTS


if TYPE_CHECKING:
    from accelerate import Accelerator


logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"  # the Trainer writes it last
LOSSES = "losses"  # under this name in that state
# Weights, optimizer, schedule and random numbers, by one process or several, in one piece or by FSDP.
REQUIRED_FILES = (("model*.safetensors", "pytorch_model*"), ("optimizer*",), ("scheduler.pt",), ("rng_state*.pth",))
# What the operating system, PyTorch and safetensors say of a full disk.
DISK_FULL_MESSAGES = ("no space left", "quota exceeded", "os error 28", "file write failed", "unexpected pos")


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """Return the newest checkpoint of a run that was written to its end, and warn of those that were not.

    Args:
        output_dir: Output folder of the run, with `checkpoint-{step}` in it.

    Returns:
        Path of the checkpoint, or `None` if there is no complete one.
    """
    numbered = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdecimal()]
    for path in sorted(numbered, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        reason = why_incomplete(path)
        if reason is None:
            return str(path)
        logger.warning("%s is incomplete (%s), passing it over.", path, reason)
    return None


def why_incomplete(checkpoint: str | os.PathLike) -> str | None:
    """Say why a checkpoint of [`~transformers.Trainer`] cannot be resumed from, without loading it.

    A checkpoint is complete if all files are there and none is cut off. Sizes are checked, contents are not. One
    without optimizer, as `save_only_model=True` writes it, is incomplete.

    Args:
        checkpoint: Folder `checkpoint-{step}`.

    Returns:
        What is missing or cut off, or `None` if the checkpoint is complete.
    """
    folder = Path(checkpoint)
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or "global_step" not in state:
            return f"{STATE_FILE} holds no state"
    except FileNotFoundError:
        return f"no {STATE_FILE}"
    except ValueError:
        return f"{STATE_FILE} is cut off"
    averaged = ((RAW_WEIGHTS,),) if AVERAGE in state.get("stateful_callbacks", {}) else ()
    for patterns in (*REQUIRED_FILES, *averaged):
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            return f"no {patterns[0]}"
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):  # compares the size with what the header promises
                pass
        except (OSError, SafetensorError):
            return f"{path.name} is cut off"
    # `torch.save` writes ZIP files, whose directory is at their end.
    for path in sorted(path for ending in ("*.pt", "*.pth", "*.bin") for path in folder.rglob(ending)):
        if not zipfile.is_zipfile(path):
            return f"{path.name} is cut off"
    return None


def find_resumable(
    wanted: str | bool, output_dir: str | os.PathLike, encoder_sha256: str | None, is_averaging: bool
) -> str:
    """Return the checkpoint that a training is to go on from: the one named, or the newest complete one if `True`.

    Raises a `ValueError` if there is none, or it is incomplete, was trained on another encoder than this one, or holds
    an average that would not be gone on with.
    """
    checkpoint = last_complete_checkpoint(output_dir) if wanted is True else str(wanted)
    if checkpoint is None:
        raise ValueError(f"There is no complete checkpoint in `{output_dir}` to resume from.")
    if reason := why_incomplete(checkpoint):
        raise ValueError(
            f"`{checkpoint}` is not complete, so it cannot be resumed from: {reason}. Name another one, or pass True "
            "for the newest complete one in the output folder."
        )
    if Path(checkpoint, RAW_WEIGHTS).exists() and not is_averaging:
        raise ValueError(
            f"`{checkpoint}` holds an average of the weights, so `ema_decay` must not be 0 to go on with it. Pass the "
            "`ema_decay` of its run."
        )
    path = Path(checkpoint, "config.json")
    saved = json.loads(path.read_text(encoding="utf-8")).get("encoder_sha256") if path.is_file() else None
    if saved is not None and saved != encoder_sha256:
        raise ValueError(
            f"{checkpoint} was trained on an encoder with SHA-256 {saved}, the one of this model has "
            f"{encoder_sha256}. Start from the same encoder, with `trainable_only=True`."
        )
    return checkpoint


@contextlib.contextmanager
def complete_or_removed(folder: Path, accelerator: "Accelerator", is_writer: bool) -> Iterator[None]:
    """Let what is written into a checkpoint folder be there completely or not at all, and tell of a full disk.

    What an interrupted run has left there is removed first.
    """
    if is_writer and folder.exists():
        shutil.rmtree(folder)
    accelerator.wait_for_everyone()
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as err:
        if is_writer:
            shutil.rmtree(folder, ignore_errors=True)
        code = getattr(err, "errno", None)
        if code not in (errno.ENOSPC, errno.EDQUOT) and not any(
            text in str(err).lower() for text in DISK_FULL_MESSAGES
        ):
            raise
        complete = last_complete_checkpoint(folder.parent)
        advice = f"`{complete}` is complete: resume from it" if complete else "Start again"
        free_gb = shutil.disk_usage(folder.parent).free / 1e9
        raise OSError(
            f"`{folder}` could not be written ({err}), with {free_gb:.3g} GB free on its disk. {advice} once there is "
            "room, or write fewer or smaller checkpoints (`save_total_limit`, `trainable_only`)."
        ) from err


class RunningLoss:
    """The losses of a run, which checkpoints keep so that a run that goes on logs what it would have logged.

    [`~transformers.Trainer`] begins anew at a checkpoint: the first loss that it logs there lacks the steps before.
    With `replace_nan` a loss that is not finite counts as the mean of those since the last log entry.
    """

    def __init__(self, device: torch.device, replace_nan: bool):
        self.device, self.replace_nan = device, replace_nan
        self.start(0)

    def start(self, step: int, saved: dict[str, float] | None = None) -> None:
        """Begin at a step, with what `state` returned when its checkpoint was written."""
        saved = saved or {"sum_logged": 0.0, "sum_since": 0.0, "last_logged_step": step}
        self.sum_logged = saved["sum_logged"]
        self.sum_since = torch.tensor(saved["sum_since"], device=self.device)
        self.last_logged_step = int(saved["last_logged_step"])

    def add(self, loss: torch.Tensor, step: int) -> None:
        """Add the loss of a batch; `step` is the number of steps done before."""
        if self.replace_nan and not torch.isfinite(loss):
            loss = self.sum_since / (1 + step - self.last_logged_step)
        self.sum_since += loss

    def log(self, step: int, accelerator: "Accelerator") -> float:
        """Return the mean loss of the steps since the last log entry, over all processes."""
        total = accelerator.gather(self.sum_since).mean().item()
        loss = total / max(step - self.last_logged_step, 1)
        self.sum_logged += total
        self.last_logged_step = step
        self.sum_since.zero_()
        return loss

    def replace(self, logs: dict[str, float], step: int, accelerator: "Accelerator") -> None:
        """Replace the losses in a log entry of the Trainer by those that count the steps before a stop, too."""
        if "loss" in logs:
            logs["loss"] = self.log(step, accelerator)
        if "train_loss" in logs:
            logs["train_loss"] = (self.sum_logged + self.sum_since.item()) / max(step, 1)

    def state(self, accelerator: "Accelerator") -> dict[str, float]:
        """Return what a checkpoint keeps, the same in all processes."""
        return {
            "sum_logged": self.sum_logged,
            "sum_since": accelerator.reduce(self.sum_since, "mean").item(),
            "last_logged_step": self.last_logged_step,
        }


class StopOnSigterm(TrainerCallback):
    """Saves a checkpoint and ends the training when SIGTERM comes, as schedulers send it before they kill.

    The step that is under way is finished first, and so is an evaluation with the checkpoint that belongs to it. After
    an evaluation without one another step is taken: a checkpoint made there could become the best one, which a run
    that was never stopped would not have. A run that goes on from the checkpoint ends as one that was never stopped.

    Args:
        accelerator: Of the Trainer. Its processes stop after the same step, whichever of them get the signal.

    Attributes:
        stopped: The training was ended.
    """

    def __init__(self, accelerator: "Accelerator"):
        self.accelerator = accelerator
        self.stopped = False
        self._asked = False
        self._handler: Any = None

    def _on_signal(self, signum: int, frame: Any) -> None:
        self._asked = True

    def _stop_requested(self) -> bool:
        """Whether any process got the signal; all of them have to ask at once."""
        if self.accelerator.num_processes > 1:
            if self._asked:
                self.accelerator.set_trigger()
            self._asked = self.accelerator.check_trigger()
        return self._asked

    def _stop(self, args: TrainingArguments, control: TrainerControl) -> None:
        self.stopped = control.should_training_stop = True
        # At its end the Trainer would delete all checkpoints but the best one.
        if args.save_total_limit == 1:
            args.save_total_limit = 2

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Listen for the signal."""
        self.stopped = self._asked = False
        # Python lets no other thread handle signals. A training that failed, and is tried again, has left its handler.
        if threading.current_thread() is threading.main_thread() and self._handler is None:
            self._handler = signal.signal(signal.SIGTERM, self._on_signal)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and stop, unless the training ends here anyway; at the end of an epoch after its evaluation."""
        if state.global_step < state.max_steps and not self._is_only_evaluated(args, state, control):
            if self._stop_requested():
                self._stop(args, control)
                control.should_save = control.should_save or is_within_epoch(state)

    @staticmethod
    def _is_only_evaluated(args: TrainingArguments, state: TrainerState, control: TrainerControl) -> bool:
        """Whether this step is evaluated and no checkpoint is due whatever the scores."""
        at_end = not is_within_epoch(state)
        is_evaluated = control.should_evaluate or (at_end and args.eval_strategy == IntervalStrategy.EPOCH)
        is_saved = control.should_save or (at_end and args.save_strategy == SaveStrategy.EPOCH)
        return is_evaluated and not is_saved

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Do nothing that belongs to the end of an epoch after a stop within it."""
        if self.stopped and is_within_epoch(state):
            control.should_log = control.should_evaluate = control.should_save = False
        elif self.stopped:
            control.should_save = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop after the checkpoint that belongs to this evaluation."""
        if control.should_save and args.save_strategy != SaveStrategy.BEST and self._stop_requested():
            self._stop(args, control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the signal to whoever had it before."""
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None


def is_within_epoch(state: TrainerState) -> bool:
    """Whether there are steps of the epoch left to do."""
    return cast("float", state.epoch) % 1 > 0


def ignore_sigterm(worker_init_fn: Callable[[int], Any] | None, worker_id: int) -> None:
    """Let a worker of a `DataLoader` ignore SIGTERM unless it comes from the process that it works for.

    Schedulers send the signal to every process of a job. Without its workers the one that trains could not finish the
    step that is under way. Ignored from everybody, the signal could not end workers when training fails, and Python
    would wait for them without end. This holds for workers that are forked, Linux' default up to Python 3.13: threads
    that libraries have started in other workers still end these. Where the system does not tell who sent a signal, as
    on macOS, nothing is changed.

    Args:
        worker_init_fn: Called first, with `worker_id`, if there is one.
        worker_id: Number of the worker.
    """
    if worker_init_fn is not None:
        worker_init_fn(worker_id)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told_to, daemon=True).start()


def _end_when_told_to() -> None:
    trainer = cast("Any", multiprocessing.parent_process()).pid
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


def protect_workers(loader: DataLoader) -> DataLoader:
    """Return a loader as accelerate prepared it, whose workers go on when a scheduler sends SIGTERM."""
    inner = getattr(loader, "base_dataloader", loader)
    inner.worker_init_fn = functools.partial(ignore_sigterm, inner.worker_init_fn)
    return loader


class ResumeCallback(TrainerCallback):
    """Lets a run that goes on from a checkpoint end as if it had never stopped.

    Args:
        losses: Those of the Trainer, which this takes over from the checkpoint.
    """

    def __init__(self, losses: RunningLoss):
        self.losses = losses
        self._first_step: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take over losses, find the best checkpoint again, and warn if nothing is left to train."""
        self._first_step = state.global_step
        if state.global_step >= state.max_steps:
            logger.warning(
                "Nothing is left to train: the checkpoint is at step %d, and %d steps are asked for. Raise "
                "`num_train_epochs` or `max_steps` to train further.",
                state.global_step,
                state.max_steps,
            )
        saved = cast("Any", state.stateful_callbacks).get(LOSSES)
        self.losses.start(state.global_step, saved and saved["attributes"])
        best = Path(cast("str", args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
        # Lost where the run was started from another folder, or moved.
        if state.best_model_checkpoint is None and best.is_dir():
            state.best_model_checkpoint = str(best)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Repeat nothing at the end of an epoch whose steps were all done before."""
        if state.global_step == self._first_step:
            control.should_log = control.should_evaluate = control.should_save = False


__all__ = ["ResumeCallback", "StopOnSigterm", "last_complete_checkpoint", "why_incomplete"]
