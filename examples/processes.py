"""What a script must mind when `torchrun` or `accelerate launch` runs it in several processes."""

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


# Seconds in which the main process is expected to meet an error that all processes meet, and to end the others.
MAIN_PROCESS_TIMEOUT_S = 10


def is_main_process() -> bool:
    """Whether this is the only process, or the first one of its machine; known before there are any arguments."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextlib.contextmanager
def report_error_once() -> Iterator[None]:
    """Have an error that all processes meet told once, by the main one.

    The others hold theirs back: the launcher ends them when the main process fails. If it does not, the error was
    theirs alone, and they tell it. The launcher repeats it below its own traceback.
    """
    try:
        yield
    except (Exception, SystemExit) as err:
        is_exit = isinstance(err, SystemExit)
        if is_exit and not isinstance(err.code, str):
            raise  # there is nothing to tell: all is well, or SIGTERM ended the run
        if not is_main_process():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(MAIN_PROCESS_TIMEOUT_S)
        if not is_exit:
            get_error_handler().record_exception(err)
        else:
            err.__cause__ = None  # it says all there is to say
            get_error_handler().record_exception(err.with_traceback(None))
        raise


def set_up_logging() -> None:
    """Write what the script and transformers log to standard error, in one format."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO, stream=sys.stderr)
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()


def mute_process() -> None:
    """Let this process say nothing but errors."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def from_main_process(args: TrainingArguments, function: Callable[[], Any]) -> Any:
    """Call a function in the main process alone and return what it found there, in all processes."""
    found = [function() if args.process_index == 0 else None]
    return broadcast_object_list(found)[0]
