"""Bad input ends in an error that names the file, or in what an independent reader gets from it.

Mutated files are read in processes of their own, each under a limit of 2 GB and every case under one of time. Allowed
is an error of ours with the name of the file in it, or a result that is *correct*:

- scans and masks: voxels, orientation and affines equal those of nibabel (scaled values to 2e-6 of the largest); grey
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


@pytest.mark.slow
def test_thousands_of_mutated_files_end_as_documented():
    table = run_all(
        1,
        {"scan": 2000, "mask": 800, "decathlon": 600},
        {"picture": 600, "label_picture": 600, "builder": 60},
    )
    assert sum(outcomes.total() for outcomes in table.values()) >= 3000
    assert all(0.05 < outcomes["correct"] / outcomes.total() < 0.95 for outcomes in table.values())
