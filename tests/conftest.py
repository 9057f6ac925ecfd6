"""One thread for each process, and its children: more only wait for each other over models as small as the tests'."""

import gc
import os


os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collection, which the Trainer starts again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # hypothesis, if it is imported only now, looks for what refers to a generator of random numbers
