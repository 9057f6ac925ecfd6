"""Training and evaluation in several processes, as `torchrun` and `accelerate launch` start them.

Where the launcher is not what is tested, the processes are forks with the variables that `torchrun` sets.
"""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import BRATS_REGIONS, small_model
from distributed_worker import evaluate_each_alone
from forks import run_two_processes
from PIL import Image
from test_averaging import average_of
from test_training import make_rows, make_trainer
from transformers import AutoModelForSemanticSegmentation, TrainingArguments

from dataset_scripts.phantom import write_phantom_cohort
from sam2unet_hf import Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor
from sam2unet_hf.finetuning import processes, run_segmentation
from sam2unet_hf.training import Sam2UNetTrainer
from sam2unet_hf.training.resume import why_incomplete


TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"


SCRIPT = EXAMPLES / "run_segmentation.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# `accelerate launch --cpu` would start one process only, whatever `--num_processes`.
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]
# One image at a time in evaluation: convolutions differ in the last bit with the size of the batch.
SIZES = ["--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "1", "--num_train_epochs", "2"]
PREDICT = ["--do_predict", "--save_total_limit", "3"]
ONLY_HERE = ("runtime", "per_second", "model_preparation_time", "epoch", "total_flos")


def environment(folder):
    """Of a user without settings of their own, whose processes do not fight for cores."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "hf" / "datasets"),
    }


def launch(folder, *command, returncode=0, timeout=300):
    """Run a command of Python, such as a launcher, and return all that it said."""
    process = subprocess.run(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        env=environment(folder),
        cwd=folder,
        check=False,
    )
    assert process.returncode == returncode, process.stdout
    return process.stdout


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def weights_of(folder):
    return AutoModelForSemanticSegmentation.from_pretrained(folder).state_dict()


def scores_of(folder):
    results = json.loads((folder / "all_results.json").read_text())
    return {
        key: value for key, value in results.items() if not key.startswith("train") and not key.endswith(ONLY_HERE)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def arguments(folder):
    """Arguments of the script: nine images to train on, one to validate, three to test, so that no batch is full."""
    cohort = write_phantom_cohort(folder / "brats", num_patients=13, shape=(40, 40, 26))
    model = small_model()
    model.save_pretrained(folder / "start")
    processor = Sam2UNetImageProcessor(regions=model.config.regions, size={"height": 64, "width": 64})
    processor.save_pretrained(folder / "start")
    return [
        "--brats_dir",
        str(cohort),
        "--recipe",
        "paper",
        "--slices",
        "12",
        "--use_cpu",
        "--disable_tqdm",
        "true",
        *SIZES,
    ]


@pytest.fixture(scope="module")
def start(folder, arguments):
    return ["--model_name_or_path", str(folder / "start")]


@pytest.fixture(scope="module")
def torchrun(folder, arguments, start):
    """The folder of a run of two processes, and what they said."""
    command = [SCRIPT, *arguments, *start, *PREDICT, "--output_dir", folder / "run"]
    return folder / "run", launch(folder, *TORCHRUN, *command)


@pytest.fixture(scope="module")
def found(folder):
    """What each of two processes of the worker found."""
    run_two_processes(folder, TESTS / "distributed_worker.py", folder / "found.pt")
    return torch.load(folder / "found.pt", weights_only=False)


def test_two_processes_say_and_write_everything_once(torchrun):
    output_dir, said = torchrun
    for words in (
        "Regions: {'WT'",
        "Comparing test images: 100%",
        "9 train, 1 validation, 3 test",
        "Epoch 1: validation loss",
        "Trained from ",
        "The results are in",
    ):
        assert said.count(words) == 1, said
    assert "Warning" not in said
    assert len(list((output_dir / "predictions").glob("*.png"))) == 3
    assert (output_dir / "predictions.png").exists()
    for step in (3, 6):  # nine images, two processes, two images each
        checkpoint = output_dir / f"checkpoint-{step}"
        assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert "2 x CPU" in (output_dir / "README.md").read_text()


def test_two_processes_score_as_one_does_to_the_last_bit(torchrun, arguments, tmp_path):
    output_dir, _ = torchrun
    run_segmentation.main(
        [*arguments, "--model_name_or_path", str(output_dir), "--do_train", "false", "--output_dir", str(tmp_path)]
    )
    scores = scores_of(output_dir)
    assert {"eval_loss", "eval_dice_WT", "test_loss", "test_mean_dice", "test_s_measure"} < scores.keys()
    assert scores == scores_of(tmp_path)


@pytest.mark.slow
def test_accelerate_launch_resumes_and_ends_as_torchrun(torchrun, folder, arguments, start):
    output_dir, _ = torchrun
    checkpoint = ["--resume_from_checkpoint", output_dir / "checkpoint-3"]
    said = launch(folder, *ACCELERATE, SCRIPT, *arguments, *start, *checkpoint, "--output_dir", folder / "accelerated")
    assert said.count("The results are in") == 1
    assert scores_of(folder / "accelerated") == scores_of(output_dir)
    weights = weights_of(output_dir / "checkpoint-6")
    resumed = weights_of(folder / "accelerated" / "checkpoint-6")
    for name, weight in weights.items():
        assert torch.equal(weight, resumed[name]), name


@pytest.mark.parametrize(
    ("end", "step"),
    [
        ({"phase": "stepping", "count": 2, "to": "me", "rank": 1}, 2),
        # It passes the signal on to the workers of the DataLoaders too.
        pytest.param({"phase": "evaluating", "count": 1, "to": "launcher"}, 3, marks=pytest.mark.slow),
    ],
)
def test_sigterm_to_one_process_or_to_the_launcher_stops_both_at_the_same_step(
    torchrun, folder, arguments, start, end, step
):
    output_dir, _ = torchrun
    run = folder / f"terminated-by-{end['to']}"
    argv = [*arguments, *start, *PREDICT, "--dataloader_num_workers", "1", "--output_dir", str(run)]
    order = {"program": "train", "argv": argv, "watch": str(run), "signal": "SIGTERM", **end}
    command = [TESTS / "interrupted_worker.py", json.dumps(order)]
    if end["to"] == "launcher":
        said = launch(folder, *TORCHRUN, *command, returncode=1)
    else:
        said = run_two_processes(folder, *command, returncode=128 + 15)
    assert said.count(f"Stopped by SIGTERM after step {step} of 6.") == 1, said
    assert why_incomplete(run / f"checkpoint-{step}") is None
    run_two_processes(folder, SCRIPT, *argv)
    assert scores_of(run) == scores_of(output_dir)
    assert (run / "model.safetensors").read_bytes() == (output_dir / "model.safetensors").read_bytes()


def test_one_process_resumes_what_two_began(torchrun, arguments, start, tmp_path):
    output_dir, _ = torchrun
    checkpoint = output_dir / "checkpoint-6"
    run_segmentation.main(
        [*arguments, *start, "--resume_from_checkpoint", str(checkpoint), "--max_steps", "7"]
        + ["--load_best_model_at_end", "false", "--output_dir", str(tmp_path / "run")]
    )
    before, after = (json.loads((path / "trainer_state.json").read_text()) for path in (checkpoint, tmp_path / "run"))
    assert after["global_step"] == 7
    assert after["log_history"][: len(before["log_history"])] == before["log_history"]
    before, after = weights_of(checkpoint), weights_of(tmp_path / "run")
    name = "decode_head.up_blocks.0.conv1.conv.weight"
    # A step of AdamW is about as long as the learning rate, 1e-4 at most.
    assert 0 < (after[name] - before[name]).abs().max() < 2e-4
    assert (after[name] - weights_of(start[1])[name]).abs().max() > 3e-4


def test_scores_are_the_same_to_the_last_bit_for_one_batch_or_many_and_one_process_or_two(found, tmp_path):
    one_batch, expected = evaluate_each_alone(tmp_path, batch_size=5)
    image_by_image, scores = evaluate_each_alone(tmp_path, batch_size=1)
    assert len(expected) == 1 + 19 * 4 + 4 * 4
    assert 0.01 < expected["mean_dice"] < 0.99
    assert 0.01 < expected["patient_dice"] < 0.99
    assert scores == expected
    for process in found:
        assert process["metrics"] == expected
        assert process["image_dice"] == one_batch.compute_metrics.image_dice.tolist()


@pytest.mark.parametrize("variant", ["plain", "activation checkpointing"])
def test_gradients_are_the_mean_over_processes_and_accumulated_batches(found, variant):
    model = small_model(regions=BRATS_REGIONS).train()
    batches = [batch for process in found for batch in process[variant]["inputs"]]
    assert [pixel_values.shape for pixel_values, _ in batches] == [(2, 3, 64, 64)] * 4
    assert len({pixel_values.sum().item() for pixel_values, _ in batches}) == 4
    for pixel_values, labels in batches:
        # Each batch of each process is normalised by its own statistics.
        (model(pixel_values, labels=labels).loss / len(batches)).backward()
    expected = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    for process in found:
        gradients = process[variant]["gradients"]
        assert gradients.keys() == expected.keys()
        assert not process[variant]["find_unused_parameters"]
        for name, gradient in expected.items():
            scale = gradient.abs().max().item()
            assert scale > 0
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=2e-5 * scale, msg=name)


def test_the_trainer_does_not_scale_the_loss(tmp_path):
    """As it does by the number of processes and of labels for models that take `num_items_in_batch`."""
    trainer = make_trainer(small_model(), make_rows([(64, 64)]), tmp_path)
    assert not trainer.model_accepts_loss_kwargs


def test_all_processes_evaluate_with_the_batch_norm_that_is_saved(found):
    first, second = (process["plain"]["statistics"] for process in found)
    assert not torch.equal(first["step"], second["step"])
    assert torch.equal(first["evaluation"], first["step"])
    assert torch.equal(second["evaluation"], first["step"])


def test_batch_norm_is_estimated_on_the_images_of_all_processes(found):
    batches = [batch for process in found for batch in process["batch norm"][0]]
    assert [len(batch) for batch in batches] == [2] * 4
    features = torch.cat(batches)
    for _, mean, variance in (process["batch norm"] for process in found):
        torch.testing.assert_close(mean, features.mean(dim=(0, 2, 3)))
        # Within batches the unbiased one, of 512 values.
        torch.testing.assert_close(variance, features.var(dim=(0, 2, 3)), rtol=3e-3, atol=0)
    within = torch.stack([batch.var(dim=(0, 2, 3)) for batch in batches]).mean(dim=0)
    assert (within / features.var(dim=(0, 2, 3)) < 0.98).any()


def test_all_processes_keep_the_same_average_which_a_resumed_run_goes_on_with(found):
    steps, (model, resumed) = found[0]["average"]
    assert len(steps) == 3 + 1
    expected = average_of(steps[:3], 0.2)
    for name, weight in expected.items():
        torch.testing.assert_close(model[name], weight, rtol=1e-5, atol=1e-6, msg=name)
    assert any(not torch.equal(steps[2][name], model[name]) for name in expected)
    for other in (resumed, *found[1]["average"][1]):
        assert other.keys() == model.keys()
        for name, value in model.items():
            assert torch.equal(other[name], value), name


def test_a_checkpoint_is_whole_once_it_has_the_state_of_the_trainer(found):
    first, second = (process["rng state was there"] for process in found)
    assert (first, second) == ([True], [])


def test_converting_to_sync_batch_norm_changes_no_checkpoint(tmp_path):
    trainer = make_trainer(small_model(), make_rows([(64, 64)] * 4), tmp_path, batch_norm_images=4)
    plain = small_model()
    trainer.sync_batch_norm = True
    trainer.model = model = trainer.to_sync_batch_norm(small_model())
    assert all(type(module) is not torch.nn.BatchNorm2d for module in model.modules())
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path / "saved")
    loaded = Sam2UNetForSemanticSegmentation.from_pretrained(tmp_path / "saved")
    assert any(type(module) is torch.nn.BatchNorm2d for module in loaded.modules())

    pixel_values = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = plain(pixel_values).logits
        assert torch.equal(loaded(pixel_values).logits, expected)
        model.fuse_for_inference()
        assert all(module.fused_weight is not None for module in model.modules() if hasattr(module, "fused_weight"))
        torch.testing.assert_close(model(pixel_values).logits, expected, rtol=1e-4, atol=1e-4)
    # Here, in one process, it is batch norm.
    for trainer.model in (model, plain):
        torch.manual_seed(0)  # of the flips
        trainer.estimate_batch_norm()
    estimated = model.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, estimated[name]), name
    name = "decode_head.up_blocks.0.conv1.norm.running_mean"
    assert not torch.equal(loaded.state_dict()[name], estimated[name])


@pytest.mark.parametrize(
    ("options", "arguments", "match"),
    [
        ({"sync_batch_norm": True}, {}, "`sync_batch_norm` must be False on the CPU"),
        ({"sync_batch_norm": True}, {"fsdp": True}, "`sync_batch_norm` must be False with FSDP"),
    ],
)
def test_what_needs_gpus_is_refused_without_them(options, arguments, match, tmp_path):
    args = TrainingArguments(tmp_path, remove_unused_columns=False, use_cpu=True, report_to="none", **arguments)
    with pytest.raises(ValueError, match=match):
        Sam2UNetTrainer(small_model(), args, **options)


def test_fsdp_is_refused_where_accelerate_would_leave_it_out(found):
    for process in found:
        assert "`fsdp` needs several processes with a GPU each, got 2 on cpu" in process["fsdp"]


def test_fsdp_is_for_training(capsys):
    with pytest.raises(SystemExit):
        run_segmentation.main(["--fsdp", "--do_train", "false"])
    assert "--fsdp shards the training; it cannot go with --do_train false" in capsys.readouterr().err


@pytest.mark.slow
def test_sharded_training_ends_as_the_other_and_saves_whole_checkpoints(torchrun, folder, arguments, start):
    output_dir, _ = torchrun
    sharded = folder / "sharded"
    options = ["--fsdp", "--do_predict", "--save_total_limit", "3", "--output_dir", sharded]
    launch(folder, *TORCHRUN, TESTS / "fsdp_worker.py", *arguments, *start, *options)
    before = weights_of(folder / "start")
    for checkpoint in ("checkpoint-3", "checkpoint-6"):
        expected, weights = weights_of(output_dir / checkpoint), weights_of(sharded / checkpoint)
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4, msg=name)
        assert any(not torch.equal(weight, before[name]) for name, weight in weights.items())
    assert (sharded / "modeling_sam2unet.py").exists()
    assert not list(sharded.glob("*fsdp*.py"))
    config = json.loads((sharded / "config.json").read_text())
    assert config["architectures"] == ["Sam2UNetForSemanticSegmentation"]
    assert config["auto_map"]["AutoModel"] == "modeling_sam2unet.Sam2UNetForSemanticSegmentation"
    assert len(list((sharded / "predictions").glob("*.png"))) == 3


@pytest.mark.slow
def test_sharded_training_from_scratch_estimates_batch_norm(folder, arguments, start):
    options = ["--fsdp", "--freeze_encoder", "false", "--batch_norm_images", "4", "--output_dir", folder / "whole"]
    launch(folder, *TORCHRUN, TESTS / "fsdp_worker.py", *arguments, *start, *options)
    before, after = weights_of(folder / "start"), weights_of(folder / "whole")
    for name in ("encoder.blocks.3.mlp.proj_in.weight", "decode_head.up_blocks.0.conv1.norm.running_var"):
        assert torch.isfinite(after[name]).all()
        assert not torch.equal(after[name], before[name])


@pytest.mark.parametrize(("rank", "waits"), [("0", []), ("1", [processes.MAIN_PROCESS_TIMEOUT_S])])
def test_other_processes_hold_their_errors_back(rank, waits, monkeypatch, tmp_path):
    """Until the launcher ends them or, if the error is theirs alone, they tell it."""
    waited = []
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(processes.time, "sleep", waited.append)
    monkeypatch.setattr(processes.signal, "signal", lambda *args: None)
    with pytest.raises(SystemExit, match="no such file"), processes.report_error_once():
        raise SystemExit("no such file") from OSError("details")
    assert waited == waits
    (error,) = json.loads((tmp_path / "error.json").read_text()).values()
    assert error["extraInfo"]["py_callstack"].endswith("SystemExit: no such file\n")
    assert "details" not in error["extraInfo"]["py_callstack"]
    with pytest.raises(ZeroDivisionError), processes.report_error_once():
        1 / 0  # noqa: B018
    assert "in test_other" in (tmp_path / "error.json").read_text()


@pytest.mark.slow
def test_an_error_of_all_processes_is_told_once(folder, arguments, tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for index in range(12):
        mask = np.zeros((64, 80), dtype=np.uint8)
        mask[10:30, 15:50] = 1
        for kind, pixels in (("images", (99 + index) * mask), ("masks", mask)):
            Image.fromarray(pixels).save(tmp_path / kind / f"photo_{index}.png")
    path = tmp_path / "images" / "photo_5.png"
    path.write_bytes(path.read_bytes()[:60])
    options = ["--dataset_name", tmp_path, "--use_cpu", "--output_dir", tmp_path / "run"]
    said = launch(folder, *TORCHRUN, SCRIPT, *options, returncode=1)
    # Once by the process, and once in the launcher's summary.
    assert said.count("photo_5: it cannot be read") == 2
    assert said.count("traceback : SystemExit: train image photo_5") == 1
    assert "OSError" not in said


@pytest.mark.slow
def test_two_machines_under_slurm(torchrun, folder, arguments, start):
    """The script of the guide, on two machines that are both this one, with one process each."""
    output_dir, _ = torchrun
    guide = (EXAMPLES / "several_gpus.md").read_text()
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", guide, flags=re.DOTALL)
    command, options = script.split("examples/run_segmentation.py")
    assert options.strip().endswith("--output_dir runs/slices")
    command = command.replace("--nproc_per_node 8", "--nproc_per_node 1").replace(":29500", f":{free_port()}")
    commands = folder / "commands"
    commands.mkdir()
    # Their options, --nodes and so on, end where torchrun begins.
    fake = {
        "scontrol": 'test "$*" = "show hostnames node[1-2]" && printf "127.0.0.1\\n127.0.0.2\\n"',
        "srun": 'while test "$1" != torchrun; do shift; done; "$@" & "$@" && wait $!',
    }
    for name, body in fake.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    arguments = [str(SCRIPT), *arguments, *start, "--output_dir", str(folder / "machines")]
    process = subprocess.run(
        ["bash", "-euc", command + shlex.join(arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env=environment(folder)
        | {"PATH": f"{commands}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        | {"SLURM_NNODES": "2", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "8"},
        cwd=folder,
        check=False,
    )
    assert process.returncode == 0, process.stdout
    assert process.stdout.count("Trained from ") == 1
    assert scores_of(folder / "machines") == scores_of(output_dir)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(folder):
    peaks_mb = []
    for images in (20, 2000):
        launch(folder, TESTS / "distributed_worker.py", folder / "memory.pt", "--images", images, timeout=1200)
        peaks_mb.append(torch.load(folder / "memory.pt"))
    assert peaks_mb[1] - peaks_mb[0] < 200


@pytest.mark.gpu
@pytest.mark.parametrize("option", ["--fsdp", "--sync_batch_norm"])
def test_two_gpus(option, folder, arguments, start):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    options = [argument for argument in arguments if argument != "--use_cpu"]
    output_dir = folder / option.strip("-")
    launch(folder, *TORCHRUN, SCRIPT, *options, *start, option, "--output_dir", output_dir)
    before, after = weights_of(folder / "start"), weights_of(output_dir)
    assert before.keys() == after.keys()
    assert all(torch.isfinite(weight).all() for weight in after.values())
    assert any(not torch.equal(weight, before[name]) for name, weight in after.items())
