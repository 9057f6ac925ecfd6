"""The benchmarks of the model run, at small size, and compare equals with equals."""

import argparse
import dataclasses
import functools
import importlib.util
import json
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES / "benchmarks"), str(EXAMPLES)]
import bench_data  # noqa: E402 - the scripts are no package
import bench_flops  # noqa: E402
import bench_lesions  # noqa: E402
import bench_loss_curves  # noqa: E402
import bench_model  # noqa: E402
import bench_recipes  # noqa: E402
import bench_rivals  # noqa: E402
import bench_throughput  # noqa: E402
import bench_window  # noqa: E402
from timing import Competitor, in_processes, markdown_table, mask_iou, time_in_turn  # noqa: E402

from dataset_scripts.brats_slices import BratsSlices  # noqa: E402
from dataset_scripts.brats_slices.__main__ import write_dataset  # noqa: E402
from dataset_scripts.phantom import write_phantom_cohort  # noqa: E402
from sam2unet_hf import deep_supervision_loss  # noqa: E402
from sam2unet_hf.cases_sam2unet import find_cases  # noqa: E402
from sam2unet_hf.finetuning.parsing import parse_arguments  # noqa: E402
from sam2unet_hf.finetuning.recipes import RECIPES  # noqa: E402


SMALL = ["--image_size", "64", "--device", "cpu", "--rounds", "1"]


def test_the_padded_variant_gives_the_same_logits_and_gradients():
    models = bench_model.build("tiny", 96)
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
    torch.testing.assert_close(bench_model.plain_loss(outputs, labels), expected, atol=1e-5, rtol=1e-5)


def test_model_benchmark_writes_ratios_and_agreement(tmp_path):
    arguments = ["--presets", "tiny", "--batch_sizes", "1", "--output", str(tmp_path / "out.json"), *SMALL]
    results = bench_model.main(arguments)
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


# A process that is forked has what this one has imported, and begins at once.
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_peak_memory_is_that_of_a_process_of_its_own(method, monkeypatch):
    asked = []
    context = multiprocessing.get_context(method)
    monkeypatch.setattr(multiprocessing, "get_context", lambda name: asked.append(name) or context)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    args = bench_model.parse_args(["--presets", "tiny", *SMALL])
    peaks = bench_model.compare_memory(args, "tiny", "forward", "float32", 1)["peak_gb"]
    assert asked == ["spawn", "spawn"]
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
    reference = bench_model.Reference(tmp_path / "SAM2UNet.py")
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(bench_model.forward_pass(reference, image)(), image[:, :1])
    bench_model.training_step(reference, image, None)()
    assert reference.model.scale.item() != 1


def test_flops_are_fewer_than_those_of_the_padded_variant():
    (case,) = bench_flops.main(["--presets", "tiny", "--dtypes", "float32", *SMALL])["cases"]
    # An image of 64 pixels is 4 tokens wide in the third stage, its windows 14.
    assert case["flops"]["ours"] < 0.5 * case["flops"]["padded"]
    assert 0 < case["share"] < 1.5


def test_competitors_take_turns():
    calls = []
    seconds = time_in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=1)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert [len(values) for values in seconds.values()] == [2, 2]
    assert markdown_table([{"x": 1, "y": "z"}]) == "| x | y |\n| --- | --- |\n| 1 | z |"


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    """A data set of Parquet files."""
    folder = tmp_path_factory.mktemp("slices")
    write_phantom_cohort(folder / "brats", 5, (48, 48, 31))
    write_dataset(BratsSlices(data_dir=str(folder / "brats"), slices="tumor"), folder / "parquet")
    return str(folder / "parquet")


def test_loss_curves_and_throughput(slices, tmp_path):
    """One trains a model and saves it, the other segments with it."""
    options = ["--dataset", slices, "--device", "cpu", "--batch_size", "2", "--image_size", "64"]
    training = ["--preset", "tiny", "--steps", "6", "--window", "2", "--learning_rate", "3e-3"]
    curves = bench_loss_curves.main([*options, *training, "--save", str(tmp_path / "model")])
    losses = curves["losses"]
    # The same images in the same order; autocast rounds.
    assert losses["float32"] != losses["bfloat16"]
    assert losses["float32"] == pytest.approx(losses["bfloat16"], rel=0.05)
    means = {name: [(values[i] + values[i + 1]) / 2 for i in (0, 2, 4)] for name, values in losses.items()}
    differences = [abs(b - a) / a for a, b in zip(means["float32"], means["bfloat16"], strict=True)]
    assert curves["largest_difference"] == pytest.approx(max(differences))
    assert losses["float32"][-1] < losses["float32"][0]

    found = bench_throughput.main(
        [*options, "--model", str(tmp_path / "model"), "--rounds", "1", "--output", str(tmp_path / "out.json")]
    )
    assert json.loads((tmp_path / "out.json").read_text()) == found
    exact, half = found["cases"]
    assert exact["mask_iou"] == 1
    assert 0 < half["mask_iou"] <= 1
    assert all(0 < case["idle"] < 1 for case in found["cases"])
    assert exact["images_per_second"] == pytest.approx(found["images"] / sum(exact["seconds"].values()))


def test_reading_is_timed_cached_and_streamed(slices, tmp_path):
    options = ["--dataset", slices, "--split", "train", "--reading", "--image_size", "64", "--rounds", "1"]
    found = bench_throughput.main([*options, "--num_workers", "0", "--output", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert [case["reader"] for case in found["cases"]] == ["datasets", "streamed"]
    files = sum(path.stat().st_size for path in Path(slices, "data").glob("train-*"))
    assert 0.5 * files < found["bytes_per_image"] * found["images"] < 1.5 * files
    for case in found["cases"]:
        rate = case["images_per_second"] * found["bytes_per_image"] / 1e6
        assert case["megabytes_per_second"] == pytest.approx(rate)


def test_mask_iou_is_over_all_images():
    masks = [np.array([[1, 1, 0]]), np.array([[0, 0]])]
    others = [np.array([[0, 3, 0]]), np.array([[0, 1]])]
    assert mask_iou(masks, others) == pytest.approx(1 / 3)


def test_data_benchmark_makes_the_same_slices_both_ways(tmp_path):
    write_phantom_cohort(tmp_path / "brats", 4, (48, 48, 31))
    arguments = ["--brats_dir", str(tmp_path / "brats"), "--rounds", "1", "--output", str(tmp_path / "out.json")]
    results = bench_data.main(arguments)
    assert json.loads((tmp_path / "out.json").read_text()) == results
    assert results["cases"] == 4
    assert results["slices"] > 4
    seconds = results["seconds"]
    assert results["builder_against_plain_loop"] == pytest.approx(seconds["plain loop"] / seconds["builder"])


def test_data_benchmark_reads_copies_as_other_cases(tmp_path):
    write_phantom_cohort(tmp_path / "brats", 2, (48, 48, 31))
    results = bench_data.main(["--brats_dir", str(tmp_path / "brats"), "--copies", "3", "--rounds", "1"])
    once = bench_data.plain_loop(find_cases(tmp_path / "brats"))
    assert results["cases"] == 6
    assert results["slices"] == 3 * once


def test_window_benchmark_compares_the_same_scan_in_both_inputs(tmp_path):
    brats_dir = write_phantom_cohort(tmp_path / "brats", 1, (40, 40, 26))
    (folder,) = (path for path in brats_dir.iterdir() if path.is_dir())
    arguments = ["--case", str(folder), "--rounds", "1", "--image_size", "96", "--batch_size", "2"]
    arguments += ["--window_dtype", "bfloat16"]
    results = bench_window.main([*arguments, "--output", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text()) == results
    assert [case["task"] for case in results["cases"]] == ["training step", "volume"]
    for case in results["cases"]:
        assert case["ratio"] == pytest.approx(case["seconds"]["window"] / case["seconds"]["resized"])
    assert [case["task"] for case in bench_window.main([*arguments, "--tasks", "volume"])["cases"]] == ["volume"]
    options = argparse.Namespace(case=folder, modality="flair", image_size=96, preset="tiny", device="cpu")
    options.dtype, options.window_dtype = "float32", "bfloat16"
    dtypes = {name: bench_window.dtype_of(options, name) for name in bench_window.INPUTS}
    assert dtypes == {"resized": torch.float32, "window": torch.bfloat16}
    assert {name: bench_window.build(options, name)[2] for name in bench_window.INPUTS} == {
        "resized": (96, 96),
        "window": (64, 64),
    }


def fork_instead_of_spawn(monkeypatch):
    """Let processes have what this one has imported, so that they begin at once."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda name: context)


def grow(megabytes):
    """Return a competitor that takes so much memory."""
    return Competitor(lambda: np.ones(megabytes * 10**6 // 8), lambda: megabytes)


def test_competitors_have_processes_of_their_own(monkeypatch):
    fork_instead_of_spawn(monkeypatch)
    competitors = {"small": functools.partial(grow, 50), "large": functools.partial(grow, 450)}
    competitors["failed"] = functools.partial(int, "no number")
    found = in_processes(competitors, rounds=2)
    assert found["failed"] == {"left_out": "invalid literal for int() with base 10: 'no number'"}
    assert len(found["small"]["seconds"]) == 2
    assert [found[name]["flops"] for name in ("small", "large")] == [50, 450]
    # Sending an output to the other process may copy it.
    assert 0.3 < found["large"]["peak_gb"] - found["small"]["peak_gb"] < 1.3
    assert found["large"]["output"].nbytes == 450 * 10**6


@pytest.fixture(scope="module")
def rivals_of_images(tmp_path_factory):
    """The options of a small comparison of images, and the output and operations of this model in float32."""
    args = bench_rivals.parse_args(["--image_size", "64", "--batch_sizes", "2"])
    args.folder = tmp_path_factory.mktemp("rivals")
    bench_rivals.set_up(args)
    competitor = bench_rivals.IMAGES["ours float32"].prepare(args, 2)
    return args, competitor.run(), competitor.flops()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in bench_rivals.IMAGES if name != "ours float32"])
def test_rivals_compute_the_same_masks_of_the_same_images(name, rivals_of_images):
    rival = bench_rivals.IMAGES[name]
    if rival.missing:
        pytest.skip(f"needs {', '.join(rival.missing)}")
    args, ours, flops = rivals_of_images
    competitor = rival.prepare(args, 2)
    output = competitor.run()
    assert output.shape == ours.shape == (2, 1, 64, 64)
    assert 0.05 < (ours > 0).mean() < 0.95
    assert mask_iou([output], [ours]) > (0.999 if rival.dtype == "float32" else 0.95)
    if rival.dtype == "float32":
        np.testing.assert_allclose(output, ours, atol=1e-4 * np.abs(ours).max())
    # The other encoders compute on padding, the rest is the same model.
    padded = rival.family in ("transformers", "reference")
    assert competitor.flops() > 1.5 * flops if padded else competitor.flops() == flops


@pytest.fixture
def brats_dir(tmp_path):
    return write_phantom_cohort(tmp_path / "brats", 3, (40, 40, 26))


@pytest.mark.slow
def test_rival_benchmark_leaves_out_by_name_what_is_not_installed(brats_dir, tmp_path, monkeypatch):
    fork_instead_of_spawn(monkeypatch)
    find_spec = importlib.util.find_spec
    absent = {"openvino", "nnunetv2"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name))
    options = ["--image_size", "64", "--batch_sizes", "1", "--rounds", "2", "--case_rounds", "1", "--no_mirrors"]
    families = ["--rivals", "ours", "nnunet", "--brats_dir", str(brats_dir), "--output", str(tmp_path / "out.json")]
    results = bench_rivals.main([*options, *families])
    assert json.loads((tmp_path / "out.json").read_text()) == results
    images, case = (found["rivals"] for found in results["cases"])
    assert images.keys() == {"ours float32", "ours bfloat16"}
    for own in (*images.values(), case["ours float32"], case["ours bfloat16"]):
        assert own["ratio"] == 1
        assert 0 < own["share"] < 1.5
        assert own["libraries_gb"] < own["peak_gb"] < 3
    assert len(images["ours float32"]["seconds"]) == 2
    assert images["ours bfloat16"]["mask_iou"] > 0.95
    # 26 slices at most, and the same number in either dtype
    assert case["ours float32"]["flops"] == case["ours bfloat16"]["flops"] > 5 * images["ours float32"]["flops"]
    assert case["nnU-Net 2d"] == {"left_out": "needs nnunetv2"}
    assert "| case | nnU-Net 3d_fullres | needs nnunetv2 |" in (tmp_path / "out.md").read_text()
    with pytest.raises(SystemExit):
        bench_rivals.parse_args(["--case", str(brats_dir)])


def test_profile_tells_what_each_library_computes(tmp_path):
    options = ["--profile", "--rivals", "ours", "onnxruntime", "--batch_sizes", "1", "--image_size", "96"]
    options += ["--rounds", "2"]
    results = bench_rivals.main([*options, "--output", str(tmp_path / "out.json")])
    assert [case["rival"] for case in results["cases"]] == ["ours float32", "ours bfloat16", "onnxruntime float32"]
    for case in results["cases"]:
        products, convolutions, *others = case["kinds"].values()
        assert sum(case["kinds"].values()) == pytest.approx(sum(case["kernels"].values()))
        assert min(products, convolutions) > 0.05 * sum(case["kinds"].values())
        assert all(others)
    with pytest.raises(SystemExit):
        bench_rivals.parse_args(["--profile", "--rivals", "compiled"])
    assert "| 1 image | onnxruntime float32 | " in (tmp_path / "out.md").read_text()


def test_nnunet_segments_the_same_scan_with_its_own_plan(brats_dir, tmp_path, monkeypatch):
    pytest.importorskip("nnunetv2")
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_def_n_proc"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that it is as before when the test ends
    args = bench_rivals.parse_args(["--brats_dir", str(brats_dir)])
    args.folder = tmp_path
    bench_rivals.set_up_nnunet(tmp_path)
    bench_rivals.plan_nnunet(args)
    ours = bench_rivals.CASE["ours float32"].prepare(args, 8)
    shape = np.asarray(ours.run()).shape
    operations = {}
    for name in ("nnU-Net 2d", "nnU-Net 2d, mirrored", "nnU-Net 3d_fullres"):
        competitor = bench_rivals.CASE[name].prepare(args, 8)
        label_map = np.asarray(competitor.run())
        assert label_map.shape == shape
        assert set(np.unique(label_map)) <= {0, 1}
        operations[name] = competitor.flops()
    assert operations["nnU-Net 2d, mirrored"] == 4 * operations["nnU-Net 2d"] > 0
    assert operations["nnU-Net 3d_fullres"] > 0


def parse_arm(name):
    parsed = parse_arguments(["--dataset_name", "slices", *bench_recipes.COMMON, *bench_recipes.ARMS[name]])
    return {field.name: getattr(part, field.name) for part in parsed for field in dataclasses.fields(part)}


def test_each_arm_adds_its_ingredient_to_the_one_before():
    arms = list(map(parse_arm, bench_recipes.ALL))
    added = [
        {"head_crop_size"},
        {"foreground_share"},
        {"neighbours"},
        {"ema_decay"},
        {"augmentation"},
        {"iou_over_batch"},
    ]
    for before, after, names in zip(arms[:-1], arms[1:], added, strict=True):
        assert {name for name in before if before[name] != after[name]} == names


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_arm_of_a_recipe_trains_with_its_values(recipe):
    arm = parse_arm(recipe)
    for name, value in RECIPES[recipe].items():
        if name != "per_device_eval_batch_size":
            assert getattr(arm[name], "value", arm[name]) == value, name


def test_lesion_benchmark_scores_volumes_with_lesions_that_match_and_lesions_that_do_not(tmp_path, capsys):
    output = tmp_path / "out.json"
    results = bench_lesions.main(
        ["--cases", "2", "--rounds", "1", "--shape", "90", "80", "70", "--output", str(output)]
    )
    assert json.loads(output.read_text()) == results == json.loads(capsys.readouterr().out)
    for kind in ("clock", "processor"):
        assert results[kind].keys() == {"mean", "largest"}
        assert 0 < results[kind]["mean"] <= results[kind]["largest"] < 60
    assert all(found["pairs"] >= 1 and found["spurious"] >= 1 for found in results["whole_tumour"])
    with pytest.raises(SystemExit):
        bench_lesions.main(["--cases", "1", "--official", "brats-evaluate"])
    assert "--cases must be at least 2 for --official" in capsys.readouterr().err
