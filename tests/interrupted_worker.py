"""Is a run of `run_segmentation.py` or the builder, and ends it where it is told.

The argument is a JSON object: `program`, `argv`, the folder to `watch`, and, if wanted, a `log` for what it says, a
file for the `counters` of `read_counters`, and how to end the run:

- `seconds`: SIGKILL after this time;
- `change`: SIGKILL before this change, counted from 1, of a file or folder in the watched folder;
- `file`: SIGKILL after this file of a checkpoint, counted from 1, was cut to `fraction` of its length;
- `phase`: `signal`, by its name, when this begins for the `count`-th time, to whom `to` says: "me" (this process, the
  default), "group" (with its children, from another process, as schedulers do) or "launcher" (its parent); of several
  processes the one of this `rank` sends it, 0 by default.
"""

import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import threading
import traceback
from pathlib import Path


os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))
import matplotlib.figure  # noqa: E402
import torch  # noqa: E402
import transformers.modeling_utils  # noqa: E402
from transformers.trainer_callback import TrainerState  # noqa: E402

import dataset_scripts.brats_slices.__main__ as build  # noqa: E402
from sam2unet_hf.finetuning import run_segmentation  # noqa: E402
from sam2unet_hf.training import Sam2UNetTrainer, averaging  # noqa: E402


CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
# Changes, files of checkpoints and the length of the name of the phase, which follows.
COUNTERS = struct.Struct("iii")
shared = mmap.mmap(-1, mmap.PAGESIZE)


def counters() -> tuple[int, ...]:
    return COUNTERS.unpack_from(shared)


def share_counters(path: str) -> None:
    """Keep them in a file, which outlives this process."""
    global shared
    with open(path, "w+b") as file:
        file.truncate(mmap.PAGESIZE)
        shared = mmap.mmap(file.fileno(), mmap.PAGESIZE)


def read_counters(path: str) -> dict:
    """What a run was doing when it ended, and how many changes and files of checkpoints it made."""
    content = Path(path).read_bytes()
    changes, files, length = COUNTERS.unpack_from(content)
    return {"phase": content[COUNTERS.size :][:length].decode(), "changes": changes, "files": files}


def count(index: int) -> int:
    values = list(counters())
    values[index] += 1
    COUNTERS.pack_into(shared, 0, *values)
    return values[index]


def phase() -> str:
    return shared[COUNTERS.size : COUNTERS.size + counters()[2]].decode()


def enter(name: str) -> None:
    shared[COUNTERS.size : COUNTERS.size + len(name)] = name.encode()
    COUNTERS.pack_into(shared, 0, *counters()[:2], len(name))


def during(owner: object, function: str, name: str, order: dict, after: str | None = None) -> None:
    """Note what is being done while a function runs."""
    original = getattr(owner, function)
    calls = []

    def wrapped(*args, **kwargs):
        before = phase()
        enter(name)
        calls.append(name)
        if order.get("phase") == name and len(calls) == order["count"]:
            send(order)
        try:
            return original(*args, **kwargs)
        finally:
            enter(after or before)

    setattr(owner, function, wrapped)


def send(order: dict) -> None:
    number = signal.Signals[order["signal"]]
    to = order.get("to", "me")
    if os.environ.get("RANK", "0") != str(order.get("rank", 0)):
        return
    if to == "group":
        subprocess.run(["bash", "-c", f"kill -{int(number)} -{os.getpgrp()}"], check=False)
    else:
        os.kill(os.getppid() if to == "launcher" else os.getpid(), number)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watch_files(folder: str, last: int | None) -> None:
    def hook(event: str, args: tuple) -> None:
        changed = event in CHANGES or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"))
        if changed and str(args[0]).startswith(folder) and count(0) == last:
            die()

    sys.addaudithook(hook)


def cut_files(last: int | None, fraction: float) -> None:
    def cut(owner: object, function: str, position: int) -> None:
        original = getattr(owner, function)

        def wrapped(*args, **kwargs):
            result = original(*args, **kwargs)
            if count(1) == last:
                path = args[position] if len(args) > position else kwargs["filename"]
                os.truncate(path, int(fraction * os.path.getsize(path)))
                die()
            return result

        setattr(owner, function, wrapped)

    cut(torch, "save", 1)
    cut(transformers.modeling_utils, "safe_save_file", 1)
    cut(averaging, "save_file", 1)
    cut(TrainerState, "save_to_json", 1)


def draw_nothing(figure: object, path: str, **kwargs) -> None:
    """Write an empty picture: drawing takes as long as training."""
    with open(path, "wb"):
        pass


def run(order: dict) -> None:
    """Be the run."""
    torch.set_num_threads(1)
    if "log" in order:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
    if "counters" in order:
        share_counters(order["counters"])
    if "seconds" in order:
        threading.Timer(order["seconds"], die).start()
    enter("preparing")
    for owner, function, name, after in (
        (Sam2UNetTrainer, "train", "training", "after training"),
        (Sam2UNetTrainer, "training_step", "stepping", None),
        (Sam2UNetTrainer, "evaluate", "evaluating", None),
        (Sam2UNetTrainer, "_save_checkpoint", "writing a checkpoint", None),
    ):
        during(owner, function, name, order, after)
    watch_files(order["watch"], order.get("change"))
    cut_files(order.get("file"), order.get("fraction", 0.5))
    matplotlib.figure.Figure.savefig = draw_nothing
    try:
        {"train": run_segmentation.main, "build": build.main}[order["program"]](order["argv"])
    except SystemExit as err:
        if isinstance(err.code, str):
            os.write(2, f"{err.code}\n".encode())
            os._exit(1)
        os._exit(err.code or 0)
    except BaseException:
        traceback.print_exc()
        os._exit(2)
    os._exit(0)


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
