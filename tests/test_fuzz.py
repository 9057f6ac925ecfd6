"""Bad input ends in an error that names the file, or in what an independent reader gets from it.

Mutated files are read in processes of their own, each under a limit of 2 GB and every case under one of time. Allowed
is an error of ours with the name of the file in it, or a result that is *correct*:

- scans and masks: voxels, orientation and affines equal those of nibabel (scaled integers to 1/32 of a step); grey
  values equal their definition, computed in 80 bits, to half a step and what the scan's type can tell apart;
- pictures: values equal those that Pillow's own conversion gives to 1e-5, label ids exactly;
- a data set built from a cohort with one such file: the case is named, or left out and listed, or read; the rows of
  the others stay what they were.

Sound files, and those with other bytes in fields that do not matter, must be read. A crash, a hang, another exception
and a result that is not correct all fail with kind, seed and index: `python tests/fuzz_worker.py KIND SEED INDEX`.
"""

import json
import os
import selectors
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fuzz_worker
import pytest


WORKER = Path(__file__).parent / "fuzz_worker.py"
START_S, CASE_S = 180, 20


class Worker:
    """A process that reads cases; after a crash or a hang the next case gets a new one."""

    def __init__(self, kinds, seed):
        self.command = [sys.executable, str(WORKER), ",".join(kinds), str(seed)]
        self.process = None

    def run(self, kind, index):
        first = self.process is None
        if first:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )
        self.process.stdin.write(f"{kind} {index}\n")
        self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            answered = selector.select(START_S if first else CASE_S)
        line = self.process.stdout.readline() if answered else ""
        if line:
            return json.loads(line)
        problem = f"WRONG ended with {self.process.wait()}" if answered else f"WRONG took more than {CASE_S} s"
        self.close()
        return problem

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def run_cases(counts, seed):
    """Run so many cases of each kind; return how many ended how, and what went wrong."""
    worker = Worker(counts, seed)
    table, wrong = {}, []
    for kind, count in counts.items():
        outcomes = table[kind] = Counter()
        for index in range(count):
            outcome = worker.run(kind, index)
            outcomes[outcome.split("\n")[0][:60]] += 1
            if outcome.startswith("WRONG"):
                what = fuzz_worker.describe(kind, seed, index)
                wrong.append(f"python tests/fuzz_worker.py {kind} {seed} {index}\n{what}\n{outcome}")
    worker.close()
    return table, wrong


def run_all(seed, *groups):
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda counts: run_cases(counts, seed), groups))
    for table, _ in results:
        for kind, outcomes in table.items():
            lines = [f"{count:6d}  {outcome}\n" for outcome, count in outcomes.most_common()]
            sys.stdout.write(f"\n{kind}: {outcomes.total()} cases\n{''.join(lines)}")
    wrong = [text for _, texts in results for text in texts]
    assert not wrong, f"{len(wrong)} cases went wrong\n\n" + "\n\n".join(wrong[:10])
    return {kind: outcomes for table, _ in results for kind, outcomes in table.items()}


def test_a_few_hundred_mutated_files_end_as_documented():
    table = run_all(0, {"scan": 100, "mask": 40, "decathlon": 40}, {"picture": 40, "label_picture": 40})
    assert all(outcomes["correct"] > 0 for outcomes in table.values())


def test_a_crash_and_a_hang_are_those_of_their_case(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "CASE_S", 1)
    worker = Worker(["scan"], 0)
    script = """
import os, sys, time
for line in sys.stdin:
    if line == "scan 1\\n":
        os.abort()
    if line == "scan 3\\n":
        time.sleep(60)
    print('"correct"', flush=True)
"""
    worker.command = [sys.executable, "-c", script]
    outcomes = [worker.run("scan", index) for index in range(5)]
    worker.close()
    assert outcomes == ["correct", "WRONG ended with -6", "correct", "WRONG took more than 1 s", "correct"]


def test_the_memory_of_a_case_is_limited():
    script = "import fuzz_worker, numpy; fuzz_worker.limit_memory(); numpy.ones(2**27); numpy.ones(2**28 + 2**24)"
    done = subprocess.run([sys.executable, "-c", script], cwd=WORKER.parent, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Unable to allocate 2.12 GiB" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f4", "f8", "i2", "u1"])
def test_the_largest_scan_that_is_read_takes_less_than_2_gb(tmp_path, dtype):
    """Reading, windowing and scaling to grey."""
    script = f"""
import fuzz_worker, nibabel, numpy
nifti = fuzz_worker.load_modules(["scan"])["nifti"]
header = nibabel.Nifti1Header()
header.set_data_dtype("{dtype}")
header.set_data_shape((512, 512, 511 * 4 // max(4, numpy.dtype("{dtype}").itemsize)))
header["vox_offset"], header["sform_code"] = 352, 1
header["srow_x"], header["srow_y"], header["srow_z"] = numpy.eye(4)[:3]
with open("x.nii", "wb") as file:
    file.write(header.binaryblock + bytes(4))
    slab = numpy.arange(512 * 512).astype("{dtype}").reshape(512, 512)
    slab[0], slab[-1], slab[:, 0], slab[:, -1] = 0, 0, 0, 0
    for _ in range(header.get_data_shape()[2]):
        file.write(slab.tobytes())
fuzz_worker.limit_memory()
volume = nifti.read_volume("x.nii")
print(nifti.to_grey(volume).shape)
"""
    env = {**os.environ, "PYTHONPATH": str(WORKER.parent)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    (tmp_path / "x.nii").unlink()
    assert done.stdout.startswith("(512, 512, "), done.stderr


@pytest.mark.slow
def test_thousands_of_mutated_files_end_as_documented():
    table = run_all(
        1,
        {"scan": 2000, "mask": 800, "decathlon": 600},
        {"picture": 600, "label_picture": 600, "builder": 60},
    )
    assert sum(outcomes.total() for outcomes in table.values()) >= 3000
    assert all(0.05 < outcomes["correct"] / outcomes.total() < 0.95 for outcomes in table.values())
