"""Starts Python for the tests in forks of a process that has imported what takes seconds to import.

`run` does as `subprocess.run([sys.executable, ...])` does, with `-c CODE`, `-m MODULE` or a script, and the variables
of the environment, folder and paths of imports that a new process would have. There are two processes to fork:

- with `imported=LIBRARIES`, one that knows neither this package nor any library that reads `HF_*` when it is imported:
  in a fork these are found, or are missing, as in a new process, and take the caches and the Hub that it names;
- with `imported=EVERYTHING`, one that has imported the package too, and has a cache of its own.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from pathlib import Path


ROOT = Path(__file__).parent.parent
# None of them imports huggingface_hub.
LIBRARIES = """
aiohttp dill fsspec httpx isal.igzip jinja2 matplotlib.backends.backend_agg matplotlib.pyplot multiprocess nibabel
pandas PIL.Image pyarrow.dataset pyarrow.parquet regex requests safetensors.torch scipy.io scipy.ndimage scipy.optimize
scipy.stats threadpoolctl tokenizers torch torch.distributed.checkpoint torch.distributed.fsdp
torch.distributed.launcher.api torch.distributed.tensor torch.nn.attention.flex_attention torchvision.transforms.v2
tqdm.auto xxhash yaml
"""
EVERYTHING = (
    LIBRARIES
    + """
transformers.modeling_utils sam2unet_hf.finetuning.run_segmentation dataset_scripts.brats_slices.__main__
"""
)


def run(command, *, cwd, env, imported=LIBRARIES, processes=1, timeout=300, stdin=""):
    """Run the arguments of a `python`, in several processes as `torchrun` starts them if asked for; return as
    `subprocess.run`, with the text that all processes wrote and the first return code that is not 0.

    One that takes longer than the timeout is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder, name)) for name in ("stdin", "stdout", "stderr")]
        Path(files[0]).write_text(stdin)
        environments = [dict(env) for _ in range(processes)]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                group = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
            for rank, own in enumerate(environments):
                own |= {name: str(value) for name, value in {**group, "RANK": rank, "LOCAL_RANK": rank}.items()}
        order = {"command": list(map(str, command)), "cwd": str(cwd), "environments": environments, "files": files}
        parent = start(imported)
        parent.stdin.write(json.dumps(order | {"timeout": timeout}) + "\n")
        parent.stdin.flush()
        codes = json.loads(parent.stdout.readline())
        texts = [Path(path).read_text() for path in files[1:]]
    return subprocess.CompletedProcess(command, next((code for code in codes if code), 0), *texts)


def run_two_processes(folder, *command, returncode=0):
    """Run a script of the tests or examples in two processes, in a folder; return all that they said."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "TMPDIR": str(folder)}
    done = run(command, cwd=folder, env=environment, imported=EVERYTHING, processes=2)
    said = done.stdout + done.stderr
    assert done.returncode == returncode, said
    return said


@functools.cache
def start(imported):
    """Start a process to fork, once."""
    foreign = ("HF_", "PYTHONPATH", "TRANSFORMERS_", "DATASETS_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    home = tempfile.TemporaryDirectory()
    environment |= {"HF_HOME": home.name, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, imported]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def end():
        parent.stdin.close()
        parent.wait()
        home.cleanup()

    atexit.register(end)
    return parent


def serve(modules):
    """Import the modules; then read an order a line, fork as it says, and answer with the return codes."""
    paths = sys.path[1:]
    sys.path[0] = str(ROOT)
    for module in modules:
        importlib.import_module(module)
    # What is there by now is never collected, so that no fork copies it to look.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        children, codes = [], {}
        for environment in order["environments"]:
            children.append(os.fork())
            if not children[-1]:
                become(order, environment, paths)

        def kill(*args, running=children):
            for child in running:
                os.killpg(child, signal.SIGKILL)

        signal.signal(signal.SIGALRM, kill)
        signal.alarm(order["timeout"])
        while children:
            child, status = os.wait()
            children.remove(child)
            codes[child] = os.waitstatus_to_exitcode(status)
            if codes[child]:
                signal.alarm(30)  # for the others, which may wait for this one
        signal.alarm(0)
        sys.stdout.write(json.dumps(list(codes.values())) + "\n")
        sys.stdout.flush()


def become(order, environment, paths):
    """Be the process that was ordered, to its end."""
    code = 1
    try:
        os.setpgrp()
        for number, (path, flags) in enumerate(zip(order["files"], (os.O_RDONLY, *2 * [OUTPUT]), strict=True)):
            file = os.open(path, flags, 0o600)
            os.dup2(file, number)
            os.close(file)
        sys.stdin = open(0, closefd=False)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(order["cwd"])
        tempfile.tempdir = None  # which was that of the other environment
        random.seed()
        execute(
            order["command"], [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path] + paths
        )
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:
        traceback.print_exc()
    finally:
        for thread in threading.enumerate():
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


OUTPUT = os.O_WRONLY | os.O_CREAT | os.O_APPEND


def execute(command, paths):
    """Run code, a module or a script as Python's command line does."""
    kind, *arguments = command
    if kind == "-m":
        sys.path[:], sys.argv[:] = [os.getcwd(), *paths], arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path[:], sys.argv[:] = ["", *paths], ["-c", *arguments[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(arguments[0], "<string>", "exec"), vars(main))
    else:
        sys.path[:], sys.argv[:] = [str(Path(kind).parent), *paths], command
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1].split())
