"""A CUDA device gives what the CPU gives, and trains, resumes and compiles; run with `pytest -m gpu`."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import BRATS_REGIONS, small_model
from safetensors.torch import load_file

from dataset_scripts.phantom import write_phantom_cohort
from sam2unet_hf import Sam2UNetConfig, Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor
from sam2unet_hf.volume import Sam2UNetVolumePipeline


pytestmark = pytest.mark.gpu

SCRIPT = Path(__file__).parent.parent / "examples" / "run_segmentation.py"
RUN = [
    "--image_size",
    "64",
    "--slices",
    "tumor",
    "--bf16",
    "--per_device_train_batch_size",
    "4",
    "--logging_steps",
    "1",
]


@pytest.fixture(autouse=True)
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = tf32


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_phantom_cohort(tmp_path_factory.mktemp("phantom") / "cohort", num_patients=8, shape=(96, 96, 64))


def run_script(*arguments):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stderr + found.stdout


@pytest.mark.parametrize("size", [(352, 352), (160, 192), (100, 132)], ids=str)
def test_logits_are_those_of_the_cpu(size):
    model = small_model(regions=BRATS_REGIONS)
    image = torch.randn(2, 3, *size)
    with torch.inference_mode():
        expected = model(image).logits
        actual = model.cuda()(image.cuda()).logits.cpu()
        half = model.to(torch.bfloat16)(image.cuda().to(torch.bfloat16)).logits.cpu().float()
    assert expected.std() > 0.05
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert (half - expected).abs().mean() < 0.1 * expected.std()


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_a_training_step_is_that_of_the_cpu(is_compiled):
    image, labels = torch.randn(2, 3, 96, 96), torch.randint(0, 4, (2, 96, 96))
    losses, gradients = [], []
    for device in ("cpu", "cuda"):
        model = small_model(regions=BRATS_REGIONS).train().to(device)
        step = torch.compile(model) if is_compiled and device == "cuda" else model
        loss = step(image.to(device), labels=labels.to(device)).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(gradients[1][name], expected, atol=2e-3 * scale + 1e-6, rtol=0, msg=name)


def test_trained_in_bfloat16_it_runs_on_the_cpu(cohort, tmp_path):
    run_script(
        *RUN, "--brats_dir", cohort, "--max_steps", 60, "--learning_rate", 2e-3, "--output_dir", tmp_path / "run"
    )
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    model = Sam2UNetForSemanticSegmentation.from_pretrained(tmp_path / "run")
    processor = Sam2UNetImageProcessor.from_pretrained(tmp_path / "run")
    assert model.device.type == "cpu"
    inputs = processor(np.full((64, 64), 90, np.uint8), return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()


def test_a_stopped_run_goes_on(tmp_path):
    arguments = [
        *RUN,
        "--max_steps",
        8,
        "--save_strategy",
        "steps",
        "--save_steps",
        4,
        "--eval_strategy",
        "steps",
        "--eval_steps",
        4,
    ]
    run_script(*arguments, "--output_dir", tmp_path / "whole")
    run_script(*arguments, "--output_dir", tmp_path / "cut")
    for path in (tmp_path / "cut").glob("checkpoint-8"):
        path.rename(tmp_path / "removed")
    for name in ("model.safetensors", "all_results.json"):
        (tmp_path / "cut" / name).unlink()
    assert "checkpoint-4" in run_script(*arguments, "--output_dir", tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    for name, weight in whole.items():  # kernels of a GPU add in an order that may change from run to run
        torch.testing.assert_close(cut[name], weight, atol=2e-2, rtol=2e-2, msg=name)


def test_a_volume_is_segmented_as_on_the_cpu(cohort):
    case = cohort / "Phantom_001"
    config = Sam2UNetConfig.from_preset("tiny", regions=BRATS_REGIONS)
    torch.manual_seed(0)
    model = Sam2UNetForSemanticSegmentation(config)
    processor = Sam2UNetImageProcessor(regions=BRATS_REGIONS, size={"height": 64, "width": 64}, modalities=["flair"])
    expected = Sam2UNetVolumePipeline(model, processor)(case, return_probabilities=True, progress=False)
    found = Sam2UNetVolumePipeline(model.cuda(), processor)(case, return_probabilities=True, progress=False)
    assert expected.probabilities.std() > 0
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-4)
    assert (found.label_map != expected.label_map).mean() < 1e-3
