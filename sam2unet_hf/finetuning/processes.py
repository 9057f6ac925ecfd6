"""Logs, errors and decisions of a script that `torchrun` or `accelerate launch` runs in several processes."""

import contextlib
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import huggingface_hub
import transformers
from accelerate.utils import broadcast_object_list
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from transformers import TrainingArguments


# If the main process meets the same error within this time, the launcher ends the others before they report it.
MAIN_PROCESS_TIMEOUT_S = 10
# Of the last minute's mean load, what is more than the start of a script itself.
BUSY_CORES = 0.75


def is_main_process() -> bool:
    """Whether this is the only process, or the first one of its machine, before the arguments are parsed."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextlib.contextmanager
def report_error_once() -> Iterator[None]:
    """Let the main process alone report an error that all processes meet.

    The other processes wait before they raise theirs, because the launcher ends them when the main process fails. If
    it does not fail, the error was theirs alone, and they report it.
    """
    try:
        yield
    except (Exception, SystemExit) as err:
        if isinstance(err, SystemExit) and not isinstance(err.code, str):
            raise  # no error to report: the run has ended well, or by SIGTERM
        if not is_main_process():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(MAIN_PROCESS_TIMEOUT_S)
        if isinstance(err, SystemExit):  # its message is complete without a traceback
            err.__cause__, err.__traceback__ = None, None
        get_error_handler().record_exception(err)
        raise


@contextlib.contextmanager
def exit_on(*errors: type[Exception], prefix: str = "") -> Iterator[None]:
    """End the script with the message of an error that its user can mend."""
    try:
        yield
    except errors as err:
        raise SystemExit(f"{prefix}{err}") from err


def set_up_logging(is_muted: bool = False) -> None:
    """Log to standard error, in one format for the script and transformers; a muted process logs errors alone."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO, stream=sys.stderr)
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    if is_muted:
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def choose_num_workers(device: str) -> int:
    """Return how many processes read and augment images, so that a GPU need not wait for them.

    The processes of a launcher share the cores of their machine. On a CPU the model needs all cores itself.
    """
    if not device.startswith("cuda"):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


def describe_busy_machine(num_threads: int) -> str | None:
    """Return what would help if other processes need the cores that the threads of PyTorch run on, else `None`.

    Threads of OpenMP wait for each other at work, for the time that the system gives to others.
    """
    cores = os.cpu_count() or 1
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if num_threads == 1 or busy + num_threads < cores + BUSY_CORES or "OMP_WAIT_POLICY" in os.environ:
        return None
    return (
        f"Other processes keep {busy:.1f} of {cores} cores busy, and PyTorch has {num_threads} threads. If they stay, "
        "start again with OMP_WAIT_POLICY=PASSIVE, or with fewer threads, such as OMP_NUM_THREADS=1."
    )


def from_main_process(args: TrainingArguments, function: Callable[[], Any]) -> Any:
    """Call a function in the main process alone, and return its result in all processes."""
    return broadcast_object_list([function() if args.process_index == 0 else None])[0]
