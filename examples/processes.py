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


# If the main process meets the same error within this time, the launcher ends the other processes before they report
# it too.
MAIN_PROCESS_TIMEOUT_S = 10


def is_main_process() -> bool:
    """Whether this is the only process, or the first one of its machine, before the arguments are parsed."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextlib.contextmanager
def report_error_once() -> Iterator[None]:
    """Let the main process alone report an error that all processes meet.

    The other processes wait before they raise theirs, because the launcher ends them when the main process fails. If
    it does not fail, the error was theirs alone, and they report it. The launcher repeats it below its own traceback.
    """
    try:
        yield
    except (Exception, SystemExit) as err:
        is_exit = isinstance(err, SystemExit)
        if is_exit and not isinstance(err.code, str):
            raise  # no error to report: the run has ended well, or by SIGTERM
        if not is_main_process():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(MAIN_PROCESS_TIMEOUT_S)
        if not is_exit:
            get_error_handler().record_exception(err)
        else:
            err.__cause__ = None  # the message of a `SystemExit` is complete without a traceback
            get_error_handler().record_exception(err.with_traceback(None))
        raise


def set_up_logging() -> None:
    """Log to standard error, in one format for the script and transformers."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO, stream=sys.stderr)
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()


def mute_process() -> None:
    """Silence this process except for errors."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def from_main_process(args: TrainingArguments, function: Callable[[], Any]) -> Any:
    """Call a function in the main process alone, and return its result in all processes."""
    found = [function() if args.process_index == 0 else None]
    return broadcast_object_list(found)[0]
