"""What `run_segmentation.py` says: a line for each evaluation, and a few at its end, with the values of its files."""

import json
import logging
import re

import pytest
from common import small_config  # noqa: E402

from dataset_scripts.phantom import write_phantom_cohort  # noqa: E402
from sam2unet_hf import Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor  # noqa: E402
from sam2unet_hf.finetuning import processes, run_segmentation


REGIONS = {"WT": [1, 2, 3], "TC": [1, 3]}


@pytest.mark.parametrize(
    ("load", "threads", "policy", "is_said"),
    [
        (0.3, 4, None, False),
        (1.0, 4, None, True),
        (1.0, 3, None, False),
        (4.0, 1, None, False),
        (4.0, 4, "PASSIVE", False),
    ],
)
def test_a_busy_machine_is_named(monkeypatch, load, threads, policy, is_said):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0, 0))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    text = processes.describe_busy_machine(threads)
    assert (text is not None) is is_said
    assert not is_said or "keep 1.0 of 4 cores busy, and PyTorch has 4 threads" in text


@pytest.mark.parametrize(
    ("device", "cores", "local_processes", "expected"),
    [("cpu", 16, "1", 0), ("cuda", 16, "1", 8), ("cuda:1", 6, "1", 5), ("cuda", 16, "4", 3), ("cuda", 1, "1", 0)],
)
def test_loaders_of_the_processes_share_the_cores(monkeypatch, device, cores, local_processes, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local_processes)
    assert processes.choose_num_workers(device) == expected


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    Sam2UNetForSemanticSegmentation(small_config(regions=REGIONS)).save_pretrained(folder)
    Sam2UNetImageProcessor(regions=REGIONS, size={"height": 64, "width": 64}, modalities=["flair"]).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("has_bars", [True, False])
def test_an_evaluation_is_one_line_and_the_end_a_few(start, tmp_path, capsys, caplog, has_bars):
    caplog.set_level(logging.INFO)
    brats_dir = write_phantom_cohort(tmp_path / "brats", num_patients=12, shape=(40, 40, 26))
    argv = ["--brats_dir", str(brats_dir), "--model_name_or_path", str(start), "--output_dir", str(tmp_path / "run")]
    argv += ["--num_train_epochs", "2", "--per_device_train_batch_size", "32", "--logging_steps", "1", "--use_cpu"]
    argv += ["--augmentation", "none", "--batch_norm_images", "4", "--disable_tqdm", str(not has_bars)]
    results = run_segmentation.main(argv)
    said = capsys.readouterr()
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())

    evaluations = [logs for logs in state["log_history"] if "eval_loss" in logs]
    lines = [line for line in said.out.splitlines() if line.startswith("Epoch ")]
    assert len(lines) == 2
    for epoch, line in enumerate(lines, 1):
        logs = evaluations[epoch - 1]
        values = [logs[f"eval_{name}"] for name in ("loss", "dice", "dice_WT", "dice_TC")]
        values += [logs[f"eval_patient_dice{suffix}"] for suffix in ("", "_WT", "_TC")]
        expected = (
            "Epoch {}: validation loss {:.3f}, Dice {:.3f} (WT {:.3f}, TC {:.3f}), patients' Dice {:.3f} (WT {:.3f}, "
        )
        assert line == (expected + "TC {:.3f})").format(epoch, *values)
    losses = [logs["loss"] for logs in state["log_history"] if "loss" in logs]
    printed = re.findall(r"^Step (\d+) of (\d+): loss (.*)$", said.out, re.MULTILINE)
    steps = state["max_steps"]
    assert printed == ([] if has_bars else [(str(i), str(steps), f"{x:.4g}") for i, x in enumerate(losses, 1)])
    assert (f"{steps}/{steps}" in said.err) is has_bars
    assert (f"loss {losses[-1]:.4g}]" in said.err) is has_bars

    table = json.loads((tmp_path / "run" / "test_patients.json").read_text())
    end = [record.message for record in caplog.records if record.name == "run_segmentation"][-5:]
    assert re.fullmatch(rf"Trained from {start}: {steps} steps, epoch 0 to 2, in \d+ min \d+ s\.", end[0])
    best = max(evaluations, key=lambda logs: logs["eval_patient_dice"])
    value = best["eval_patient_dice"]
    assert end[1] == f"Best epoch: {best['epoch']:.4g}, by patient_dice {value:.4f} of the validation split."
    dice, iou = (
        "{:.3f} (WT {:.3f}, TC {:.3f})".format(*(results[f"test_{name}{suffix}"] for suffix in ("", "_WT", "_TC")))
        for name in ("dice", "iou")
    )
    assert re.fullmatch(rf"Test, \d+ images: Dice {re.escape(dice)}, IoU {re.escape(iou)}, MAE 0\.\d{{4}}\.", end[2])
    of_patients: dict[str, list[float]] = {}
    for row in table["patients"]:
        of_patients.setdefault(row["patient"], []).append(row["volume_dice"])
    means = {patient: sum(values) / len(values) for patient, values in of_patients.items()}
    assert len(means) > 1
    worst = min(means, key=lambda patient: means[patient])
    values = [sum(means.values()) / len(means)]
    values += [table["summary"][region]["volume_dice"]["mean"] for region in REGIONS]
    expected = "Test, {} patients: Dice {:.3f} (WT {:.3f}, TC {:.3f}), worst {:.3f} ({})."
    assert end[3] == expected.format(len(means), *values, means[worst], worst)
    assert end[4] == (
        f"The results are in {tmp_path / 'run'}: README.md, predictions.png, training_curve.png, all_results.json."
    )
    assert any(re.search(r"Images: \d+ train \(\d patients\), ", record.message) for record in caplog.records)
