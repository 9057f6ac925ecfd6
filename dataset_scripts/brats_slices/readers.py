"""Processes that read cases ahead of the one that writes."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Generic, TypeVar, cast

from sam2unet_hf.cases_sam2unet import BratsCase


Rows = TypeVar("Rows")

# Cases that are read ahead: more than there are likely to be processes, few enough to hold in memory.
READ_AHEAD = 32


class CaseReaders(Generic[Rows]):
    """Processes that read cases in the order in which they will be asked for, beyond the end of a split too.

    Args:
        num_proc: How many.
        read_case: Reads a case; a function that can be pickled.
    """

    def __init__(self, num_proc: int, read_case: Callable[[BratsCase], Rows]):
        self.pool = ProcessPoolExecutor(num_proc, initializer=_end_with_parent)
        self._read_case = read_case
        self._waiting: deque[BratsCase] = deque()
        self._begun: dict[str, Future[Rows]] = {}

    def expect(self, cases: Iterable[BratsCase]) -> None:
        """Add cases that will be asked for, in this order."""
        self._waiting.extend(cases)

    def read(self, case: BratsCase) -> Rows:
        """Return what reading a case gave, while others are being read."""
        while self._waiting and len(self._begun) < READ_AHEAD:
            following = self._waiting.popleft()
            self._begun[following.case_id] = self.pool.submit(self._read_case, following)
        return self._begun.pop(case.case_id).result()

    def close(self) -> None:
        """End the processes once they have read what they are reading."""
        self.pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Let this process end when its parent does, because a parent that is killed cannot end it."""
    parent = cast("multiprocessing.Process", multiprocessing.parent_process())

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
