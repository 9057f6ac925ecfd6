"""Training and building that is killed, stopped or runs out of disk, and is started again."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import forks
import pytest
from common import small_model
from filelock import FileLock
from interrupted_worker import read_counters

from dataset_scripts.phantom import write_phantom_cohort
from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.training.resume import why_incomplete


WORKER = Path(__file__).with_name("interrupted_worker.py")
# By epoch with a trained encoder, whose batch norm is estimated anew; by step, ending within an epoch; and with an
# average of the weights, of which the last is kept instead of the best.
RECIPES = {
    "epochs": ["--freeze_encoder", "false", "--batch_norm_images", "4", "--num_train_epochs", "3"],
    "steps": ["--save_strategy", "steps", "--eval_strategy", "steps", "--save_steps", "2", "--eval_steps", "2"]
    + ["--max_steps", "7", "--gradient_accumulation_steps", "2", "--augmentation", "flips", "gamma"],
    "averages": (
        "--ema_decay 0.8 --batch_norm_images 4 --augmentation strong --num_train_epochs 2 --save_strategy steps "
        "--save_steps 2 --load_best_model_at_end false"
    ).split(),
}
# Slices in which nine patients have tumour and none has, of which an epoch shows nine and three.
RECIPES["steps"] += ["--slices", "12", "3", "--foreground_share", "0.75", "--neighbours", "1"]


class Runner:
    """Starts runs with the same data and model."""

    def __init__(self, folder: Path):
        self.folder = folder
        brats_dir = write_phantom_cohort(folder / "brats", num_patients=13, shape=(40, 40, 26))
        model = small_model()
        model.save_pretrained(folder / "start")
        processor = Sam2UNetImageProcessor(regions=model.config.regions, size={"height": 64, "width": 64})
        processor.save_pretrained(folder / "start")
        self.arguments = ["--brats_dir", str(brats_dir), "--recipe", "paper", "--slices", "12", "--model_name_or_path"]
        self.arguments += [str(folder / "start"), "--use_cpu", "--disable_tqdm", "true", "--logging_steps", "3"]
        self.arguments += ["--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "4"]
        self.expected = {}
        self.whole = {}
        # So that no run waits for imports.
        forks.run(["-c", ""], cwd=folder, env=os.environ, imported=forks.EVERYTHING)
        for recipe in RECIPES:
            self.whole[recipe] = self.run(recipe, f"whole-{recipe}")
            assert self.whole[recipe]["code"] == 0, self.log(f"whole-{recipe}")
            self.expected[recipe] = self.outcome(f"whole-{recipe}")

    def run(self, recipe: str, name: str, *options: str, **end) -> dict:
        argv = [*self.arguments, *RECIPES[recipe], *options, "--output_dir", str(self.folder / name)]
        return self.start("train", argv, str(self.folder / f"{name}.log"), str(self.folder / name), **end)

    def build(self, name: str, **end) -> dict:
        argv = ["--brats_dir", self.arguments[1], "--slices", "tumor", "--output_dir", f"{self.folder / name}/slices"]
        return self.start("build", argv, str(self.folder / f"{name}.log"), str(self.folder / name), **end)

    def start(self, program: str, argv: list[str], log: str, watch: str, **end) -> dict:
        """Return the exit code of a process, how long it took, and what `read_counters` tells of it."""
        counters = str(self.folder / "counters")
        order = {"program": program, "argv": argv, "log": log, "watch": watch, "counters": counters, **end}
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        start = time.monotonic()
        done = forks.run([WORKER, json.dumps(order)], cwd=self.folder, env=environment, imported=forks.EVERYTHING)
        return {"code": done.returncode, "seconds": time.monotonic() - start, **read_counters(counters)}

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def outcome(self, name: str) -> tuple[str, str]:
        """Weights and results of a finished run."""
        weights = (self.folder / name / "model.safetensors").read_bytes()
        return hashlib.sha256(weights).hexdigest(), (self.folder / name / "all_results.json").read_text()

    def finish(self, recipe: str, name: str) -> dict:
        """Start a run again with the same command until it ends by itself, or is found to have ended."""
        answer = self.run(recipe, name)
        finished = answer["code"] == 0 or "holds a finished run" in self.log(name)
        assert finished, f"{name}: {answer}\n{self.log(name)[-3000:]}"
        assert self.outcome(name) == self.expected[recipe], name
        return answer


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return Runner(tmp_path_factory.mktemp("interrupted"))


def kill_point(seed: int, whole: dict, share: float) -> dict:
    """Choose where to kill in this share of a run: at any time, before a change of a file, or while a file of a
    checkpoint is written; or where something begins.
    """
    choose = random.Random(seed)
    if seed % 4 == 0:
        return {"seconds": choose.uniform(0.1, share) * whole["seconds"]}
    if seed % 4 == 1:
        return {"change": choose.randint(1, int(share * whole["changes"]))}
    if seed % 4 == 2:
        return {"file": choose.randint(1, int(share * whole["files"])), "fraction": choose.random()}
    phase = ("stepping", "evaluating", "writing a checkpoint")[seed // 4 % 3]
    return {"phase": phase, "count": choose.randint(1, 3), "signal": "SIGKILL"}


def kill_and_finish(runner: Runner, groups: list[list[int]]) -> Counter:
    """Kill a run for each seed of a group, going on where the one before was killed, and finish it."""
    phases = Counter()
    for seeds in groups:
        recipe = list(RECIPES)[seeds[0] // 4 % 3]
        name = f"killed-{seeds[0]}"
        for seed in seeds:
            share = 1.0 if seed == seeds[0] else 0.4  # of which less may be left
            point = kill_point(seed, runner.whole[recipe], share)
            answer = runner.run(recipe, name, **point)
            phases[answer["phase"] if answer["code"] == -9 else "ended before"] += 1
            sys.stdout.write(f"seed {seed}, {recipe}: {point} -> {answer['code']} while {answer['phase']}\n")
            assert answer["code"] in (-9, 0, 1), runner.log(name)
        runner.finish(recipe, name)
        shutil.rmtree(runner.folder / name)
    sys.stdout.write(f"{dict(phases)}\n")
    return phases


def test_killed_runs_end_as_uninterrupted_ones(runner):
    """Each recipe in each of the four ways of `kill_point`."""
    phases = kill_and_finish(runner, [[seed + 1, seed] for seed in range(0, 12, 2)])
    assert min(phases[name] for name in ("stepping", "evaluating", "writing a checkpoint")) >= 1
    # At some times the run may have ended, on a machine that is faster than before.
    assert phases.total() - phases["ended before"] >= 9


@pytest.mark.slow
def test_runs_killed_anywhere_end_as_uninterrupted_ones(runner):
    phases = kill_and_finish(runner, [[seed, seed + 1000][: 1 + (seed % 5 == 4)] for seed in range(12, 60)])
    assert min(phases[name] for name in ("stepping", "evaluating", "writing a checkpoint")) >= 4
    assert phases.total() - phases["ended before"] >= 36


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_uninterrupted_runs_give_is_compared_whole(runner, recipe):
    results = json.loads(runner.expected[recipe][1])
    assert {"train_loss", "eval_loss", "eval_dice", "test_dice_WT"} <= set(results)


@pytest.mark.parametrize(
    ("recipe", "ends"),
    [
        ("epochs", [("writing a checkpoint", 1, 6), ("stepping", 4, 10)]),  # of 5 steps an epoch
        ("epochs", [("evaluating", 1, 5), ("stepping", 2, 7)]),
        ("steps", [("stepping", 5, 3)]),  # within the third step
        ("averages", [("stepping", 3, 3), ("evaluating", 1, 6)]),  # no checkpoint is due between evaluation and step 6
    ],
)
def test_sigterm_saves_and_ends_the_run_which_goes_on(runner, recipe, ends):
    """And may be ended again."""
    name = f"terminated-{recipe}-{ends[0][2]}"
    for phase, count, step in ends:
        answer = runner.run(recipe, name, phase=phase, count=count, signal="SIGTERM")
        log = runner.log(name)
        assert answer["code"] == 128 + 15, log
        assert f"Stopped by SIGTERM after step {step} of " in log
        assert why_incomplete(runner.folder / name / f"checkpoint-{step}") is None
        assert not (runner.folder / name / "model.safetensors").exists()
    runner.finish(recipe, name)
    for *_, step in ends:
        going_on = f"Going on with the unfinished run in {runner.folder / name} from checkpoint-{step}."
        assert runner.log(name).count(going_on) == 1


@pytest.mark.parametrize(
    ("options", "phase", "count", "step"),
    [
        (["--save_total_limit", "1"], "stepping", 5, 3),  # at the end the best checkpoint is kept alone
        (["--save_strategy", "best"], "evaluating", 2, 5),  # which alone decides on a checkpoint of the fourth step
        (["--eval_steps", "1"], "stepping", 5, 4),  # a checkpoint of the third would count among the best
    ],
)
def test_sigterm_leaves_a_checkpoint_that_changes_nothing(runner, options, phase, count, step):
    names = [f"{kind}-{'-'.join(options)}" for kind in ("whole", "terminated")]
    options = [*options, "--greater_is_better", "false"]
    assert runner.run("steps", names[0], *options)["code"] == 0, runner.log(names[0])
    answer = runner.run("steps", names[1], *options, phase=phase, count=count, signal="SIGTERM")
    assert answer["code"] == 128 + 15, runner.log(names[1])
    checkpoint = runner.folder / names[1] / f"checkpoint-{step}"
    assert f"after step {step} of 7. The same command goes on from {checkpoint}." in runner.log(names[1])
    assert why_incomplete(checkpoint) is None
    assert runner.run("steps", names[1], *options)["code"] == 0, runner.log(names[1])
    assert runner.outcome(names[1]) == runner.outcome(names[0])


def test_sigterm_to_all_processes_of_a_job_leaves_the_workers_at_work(runner):
    name = "terminated-group"
    for phase, step in (("stepping", 2), ("evaluating", 10)):
        end = {"phase": phase, "count": 2, "signal": "SIGTERM", "to": "group"}
        answer = runner.run("epochs", name, "--dataloader_num_workers", "2", **end)
        log = runner.log(name)
        assert answer["code"] == 128 + 15, log
        assert f"Stopped by SIGTERM after step {step} of " in log
    assert runner.run("epochs", name, "--dataloader_num_workers", "2")["code"] == 0, runner.log(name)
    assert runner.outcome(name) == runner.expected["epochs"]


@pytest.fixture
def small_disk(runner):
    """A file system with room for two checkpoints, and the function that makes room for more."""
    folder = runner.folder / "disk"
    folder.mkdir()
    checkpoint = next((runner.folder / "whole-epochs").glob("checkpoint-*"))
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(2.6 * size)}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small file system")
    yield lambda: subprocess.run(["mount", "-o", f"remount,size={20 * size}", str(folder)], check=True)
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_costs_no_older_checkpoint(runner, small_disk):
    name = "disk/run"
    answer = runner.run("epochs", name)
    log = runner.log(name)
    assert answer["code"] == 1, log
    assert "checkpoint-15` could not be written (" in log
    assert "GB free on its disk. `" in log
    assert "checkpoint-10` is complete: resume from it once there is room" in log
    assert "Traceback" not in log
    left = sorted(path.name for path in (runner.folder / name).glob("checkpoint-*"))
    assert left == ["checkpoint-10", "checkpoint-5"]
    small_disk()
    runner.finish("epochs", name)


def test_a_killed_build_leaves_nothing_that_looks_finished(runner):
    def files(name: str) -> dict[str, bytes]:
        folder = runner.folder / name / "slices"
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    whole = runner.build("build-whole")
    assert whole["code"] == 0, runner.log("build-whole")
    expected = files("build-whole")
    assert sum(name.endswith(".parquet") for name in expected) == 3
    choose = random.Random(0)
    for change in sorted(choose.sample(range(1, whole["changes"] + 1), 8)):
        name = f"build-{change}"
        assert runner.build(name, change=change)["code"] == -9
        assert files(name) in ({}, expected)
        if not files(name):
            assert runner.build(name)["code"] == 0, runner.log(name)
        assert files(name) == expected
        # What is left over of a folder that had no lock yet, or whose data set was moved already, is empty.
        left = [path for path in (runner.folder / name).rglob("*.parquet") if path.parent.parent.name != "slices"]
        assert not left


def test_a_build_that_is_running_is_left_alone(runner):
    staging = runner.folder / "two" / ".slices-other"
    staging.mkdir(parents=True)
    with FileLock(staging / "building.lock"):
        assert runner.build("two")["code"] == 0
        assert staging.exists()
    shutil.rmtree(runner.folder / "two" / "slices")
    assert runner.build("two")["code"] == 0
    assert not staging.exists()
    assert f"Removing what a build that was killed left: {staging}" in runner.log("two")
