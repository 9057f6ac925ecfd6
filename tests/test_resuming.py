"""Which checkpoints of a run count as whole, and what SIGTERM is handled by."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from sam2unet_hf.finetuning.parsing import (
    parse_arguments,
    resume_arguments,
)
from sam2unet_hf.finetuning.provenance import RECORD, RESULTS_FILE, find_checkpoint, write_json
from sam2unet_hf.training.resume import StopOnSigterm, last_complete_checkpoint, why_incomplete


@pytest.fixture
def output_dir(tmp_path):
    """A run with the checkpoints of the steps 9 and 10."""
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"a": torch.arange(6.0), "b": torch.zeros(2, 3)}, folder / "model.safetensors", {"format": "pt"})
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            torch.save({"a": torch.zeros(3)}, folder / name)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    return tmp_path


def truncate(path, length):
    os.truncate(path, length if length >= 0 else path.stat().st_size + length)


@pytest.mark.parametrize(
    ("name", "length", "fault"),
    [
        ("model.safetensors", -1, "model.safetensors is cut off"),
        ("model.safetensors", 20, "model.safetensors is cut off"),
        ("model.safetensors", 0, "model.safetensors is cut off"),
        ("optimizer.pt", -1, "optimizer.pt is cut off"),
        ("scheduler.pt", 0, "scheduler.pt is cut off"),
        ("rng_state.pth", 100, "rng_state.pth is cut off"),
        ("training_args.bin", 100, "training_args.bin is cut off"),
        ("trainer_state.json", -1, "trainer_state.json is cut off"),
        ("trainer_state.json", 0, "trainer_state.json is cut off"),
        ("model.safetensors", None, "no model*.safetensors"),
        ("optimizer.pt", None, "no optimizer*"),
        ("scheduler.pt", None, "no scheduler.pt"),
        ("rng_state.pth", None, "no rng_state*.pth"),
        ("trainer_state.json", None, "no trainer_state.json"),
    ],
)
def test_a_checkpoint_that_misses_something_is_passed_over(output_dir, name, length, fault, caplog):
    path = output_dir / "checkpoint-10" / name
    path.unlink() if length is None else truncate(path, length)
    assert why_incomplete(path.parent) == fault
    assert last_complete_checkpoint(output_dir) == str(output_dir / "checkpoint-9")
    assert f"checkpoint-10 is incomplete ({fault}), passing it over." in caplog.text


def test_the_newest_whole_checkpoint_is_that_of_the_highest_step(output_dir):
    (output_dir / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(output_dir) == str(output_dir / "checkpoint-10")
    shutil.rmtree(output_dir / "checkpoint-10")
    shutil.rmtree(output_dir / "checkpoint-9")
    assert last_complete_checkpoint(output_dir) is None
    assert last_complete_checkpoint(output_dir / "nowhere") is None


def test_a_state_without_a_step_is_none(output_dir):
    (output_dir / "checkpoint-9" / "trainer_state.json").write_text("[]")
    assert why_incomplete(output_dir / "checkpoint-9") == "trainer_state.json holds no state"


def test_sigterm_is_left_to_whoever_had_it_though_training_began_twice():
    before = signal.getsignal(signal.SIGTERM)
    stop = StopOnSigterm(SimpleNamespace(num_processes=1))
    for _ in range(2):  # as after an error that is met by a smaller batch
        stop.on_train_begin(None, None, None)
    assert signal.getsignal(signal.SIGTERM) == stop._on_signal
    stop.on_train_end(None, None, None)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.fixture
def begun(output_dir, tmp_path_factory, monkeypatch):
    """The working directory has a run in `run`."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(output_dir, folder / "run")
    monkeypatch.chdir(folder)


def arguments_of(*words):
    model_args, data_args, args = parse_arguments(["--brats_dir", "scans", "--output_dir", "run", *words])
    return resume_arguments(model_args, data_args, args), args


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--split_seed", "5"],
            r"other values of split_seed, .* Start again with --split_seed 0, or",
        ),
        (
            ["--modalities", "t2"],
            r"other values of modalities, .* with --modalities flair, or start a",
        ),
        (
            ["--preset", "small"],
            r"other values of preset, .* Start again with --preset tiny, or start",
        ),
        (["--recipe", "paper"], r"other values of .*slices.* Start again with --recipe volume, or start a new run"),
        (["--regions", "WT=1"], r"other values of regions, .* Start again without --regions, or start a new run"),
    ],
)
@pytest.mark.parametrize("named", ["true", "run/checkpoint-10"])
def test_a_run_is_not_trained_further_on_other_data(begun, words, message, named):
    arguments, _ = arguments_of()
    write_json(Path("run", RECORD), {"arguments": arguments})
    write_json(Path("run", RESULTS_FILE), {})
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match=message):
        find_checkpoint(*arguments_of(*words, "--resume_from_checkpoint", named))
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


def test_a_run_is_trained_further_with_other_settings_which_is_said(begun, caplog):
    write_json(Path("run", RECORD), {"arguments": arguments_of()[0]})
    more = ["--num_train_epochs", "60", "--learning_rate", "0.01", "--resume_from_checkpoint", "true"]
    assert find_checkpoint(*arguments_of(*more)) == str(Path("run", "checkpoint-10"))
    assert "Training run further, which was begun with --learning_rate 0.0005 --num_train_epochs 30.0." in caplog.text


def test_an_unfinished_run_says_how_it_was_begun(begun):
    write_json(Path("run", RECORD), {"arguments": arguments_of("--modalities", "t1ce", "t2")[0]})
    expected = r"Start again with --modalities t1ce t2 and without --regions to go on"
    with pytest.raises(SystemExit, match=expected):
        find_checkpoint(*arguments_of("--regions", "WT=1"))
    with pytest.raises(SystemExit, match=r"Start again with --recipe volume to go on with it, or pass --overwrite"):
        find_checkpoint(*arguments_of("--recipe", "paper"))
