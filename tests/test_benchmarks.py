"""The benchmarks of the model run, at small size, and compare equals with equals."""

import json
import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "benchmarks"))
import data as data_benchmark  # noqa: E402 - the scripts are no package
import flops  # noqa: E402
import model as model_benchmark  # noqa: E402
from timing import markdown_table, time_in_turn  # noqa: E402

from dataset_scripts.phantom import write_phantom_cohort  # noqa: E402
from sam2unet_hf import deep_supervision_loss  # noqa: E402


SMALL = ["--image_size", "64", "--device", "cpu", "--rounds", "1"]


def test_the_padded_variant_gives_the_same_logits_and_gradients():
    models = model_benchmark.build("tiny", None, ["ours", "padded"], 96)
    image = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        logits = [model.eval()(image).logits for model in models.values()]
    assert logits[0].std() > 0.01
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-4)
    trained = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models.values()]
    assert trained[0] == trained[1]


def test_the_plain_loss_is_that_of_the_package():
    outputs = [torch.randn(2, 2, 48, 40) for _ in range(3)]
    labels = (torch.rand(2, 2, 48, 40) > 0.7).float()
    expected = deep_supervision_loss(outputs, labels, output_weights=[1.0, 1.0, 1.0])
    torch.testing.assert_close(model_benchmark.plain_loss(outputs, labels), expected, atol=1e-5, rtol=1e-5)


def test_model_benchmark_writes_ratios_and_agreement(tmp_path):
    arguments = ["--presets", "tiny", "--batch_sizes", "1", "--output", str(tmp_path / "out.json"), *SMALL]
    results = model_benchmark.main(arguments)
    assert json.loads((tmp_path / "out.json").read_text()) == results
    assert [(case["mode"], case["dtype"]) for case in results["cases"]] == [
        (mode, dtype) for mode in ("forward", "training") for dtype in ("float32", "bfloat16")
    ]
    forward = results["cases"][0]
    assert forward["ratios"]["padded float32"] == pytest.approx(
        forward["seconds"]["padded float32"] / forward["seconds"]["ours float32"]
    )
    assert forward["largest_difference"] < 1e-4
    assert "| tiny | forward | bfloat16 | 1 |" in (tmp_path / "out.md").read_text()


def test_peak_memory_is_that_of_a_process_of_its_own(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    args = model_benchmark.parse_args(["--presets", "tiny", *SMALL])
    peaks = model_benchmark.compare_memory(args, "tiny", "forward", "float32", 1)["peak_gb"]
    assert peaks.keys() == {"ours", "padded"}
    assert all(0.2 < peak < 3 for peak in peaks.values())


def test_a_reference_module_is_run_from_its_file(tmp_path):
    (tmp_path / "SAM2UNet.py").write_text(
        "import torch\n"
        "class SAM2UNet(torch.nn.Module):\n"
        "    def __init__(self, checkpoint_path=None):\n"
        "        super().__init__()\n"
        "        self.scale = torch.nn.Parameter(torch.ones(1))\n"
        "    def forward(self, x):\n"
        "        return self.scale * x[:, :1], x[:, :1], x[:, :1]\n"
    )
    reference = model_benchmark.Reference(tmp_path / "SAM2UNet.py")
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(model_benchmark.forward_pass(reference, image)(), image[:, :1])
    model_benchmark.training_step(reference, image, None)()
    assert reference.model.scale.item() != 1


def test_flops_are_fewer_than_those_of_the_padded_variant():
    (case,) = flops.main(["--presets", "tiny", "--dtypes", "float32", *SMALL])["cases"]
    # An image of 64 pixels is 4 tokens wide in the third stage, its windows 14.
    assert case["flops"]["ours"] < 0.5 * case["flops"]["padded"]
    assert 0 < case["share"] < 1.5


def test_competitors_take_turns():
    calls = []
    seconds = time_in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=1)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert [len(values) for values in seconds.values()] == [2, 2]
    assert markdown_table([{"x": 1, "y": "z"}]) == "| x | y |\n| --- | --- |\n| 1 | z |"


def test_data_benchmark_makes_the_same_slices_both_ways(tmp_path):
    write_phantom_cohort(tmp_path / "brats", 4, (48, 48, 31))
    arguments = ["--brats_dir", str(tmp_path / "brats"), "--rounds", "1", "--output", str(tmp_path / "out.json")]
    results = data_benchmark.main(arguments)
    assert json.loads((tmp_path / "out.json").read_text()) == results
    assert results["cases"] == 4
    assert results["slices"] > 4
    seconds = results["seconds"]
    assert results["builder_against_plain_loop"] == pytest.approx(seconds["plain loop"] / seconds["builder"])
