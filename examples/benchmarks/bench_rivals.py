#!/usr/bin/env python
"""Time the model beside what else one would run on the same CPU: on images in memory, and from scan to label map.

OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python examples/benchmarks/bench_rivals.py --brats_dir BraTS2020_TrainingData
python examples/benchmarks/bench_rivals.py --rivals ours onnxruntime openvino --batch_sizes 1
python examples/benchmarks/bench_rivals.py --rivals ours onnxruntime openvino --batch_sizes 1 --profile

On images all compute with the same weights: this model as it is and by `torch.compile`, with transformers' encoder,
with SAM 2's own (`sam2` of facebookresearch) and all three outputs, as in the reference implementation, and its ONNX
file in onnxruntime and OpenVINO. A case of BraTS goes from NIfTI file to NIfTI file, one modality in and whole tumour
out: by this model with the window about the head and a slice on either side, and by nnU-Net with the networks and
patches that it plans for the cases of `--brats_dir`, and its own predictor. All have random weights there, on which
time does not depend. Each rival has a process of its own, whose peak of memory needs Linux, and they take turns. What
is not installed is left out, by name: `pip install -e ".[onnx,rivals]"` brings all but `sam2`. `--profile` tells
instead what they spend their time on, by the profiler of each library, in the fastest of so many rounds.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parent.parent))  # that of the examples
import bench_window
import nibabel
import nnunet_files
import torch
from bench_flops import matmul_rate
from bench_model import PaddedEncoder, ReferenceVariant, build, forward_pass
from timing import DTYPES, Competitor, flops_of, in_processes, make_parser, mask_iou, report
from torch import nn

from sam2unet_hf import Sam2UNetForSemanticSegmentation
from sam2unet_hf.cases_sam2unet import find_cases
from sam2unet_hf.configuration_sam2unet import PRESETS
from sam2unet_hf.export import export_onnx
from sam2unet_hf.volume import Sam2UNetVolumePipeline


FAMILIES = ("ours", "compiled", "transformers", "reference", "onnxruntime", "openvino", "nnunet")


@dataclass(frozen=True)
class Rival:
    """How a process makes a competitor, from the options and the batch size.

    Args:
        family: Name of the option `--rivals`.
        prepare: Makes the competitor.
        dtype: What it computes in.
        packages: What must be installed; the first is the one whose version is reported.
        mirrored: It averages over mirror images.
    """

    family: str
    prepare: Callable[[argparse.Namespace, int], Competitor]
    dtype: str = "float32"
    packages: tuple[str, ...] = ("torch",)
    mirrored: bool = False

    @property
    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


def make_images(args: argparse.Namespace, batch_size: int) -> torch.Tensor:
    """Return the images that all see."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch_size, 3, args.image_size, args.image_size, generator=generator)


def load(args: argparse.Namespace, family: str) -> nn.Module:
    """Load the weights that all share, in the model of a family."""
    model = Sam2UNetForSemanticSegmentation.from_pretrained(args.folder / "model").eval()
    if family == "reference":
        return ReferenceVariant(model).eval()
    if family == "transformers":
        model.encoder = PaddedEncoder(model)
        return model.eval()
    model.fuse_for_inference()
    return model


def in_torch(args: argparse.Namespace, batch_size: int, family: str, dtype: str) -> Competitor:
    """Prepare a model for images in memory."""
    model = load(args, family).to(DTYPES[dtype])
    images = make_images(args, batch_size)
    forward = forward_pass(torch.compile(model) if family == "compiled" else model, images.to(DTYPES[dtype]))

    def profile() -> dict[str, float]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            forward()
        return {event.key: event.self_cpu_time_total / 1e6 for event in found.key_averages()}

    return Competitor(lambda: forward().float().numpy(), lambda: flops_of(model, images.shape), profile)


def in_onnxruntime(args: argparse.Namespace, batch_size: int) -> Competitor:
    """Prepare the ONNX file in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    start = functools.partial(onnxruntime.InferenceSession, args.folder / "model.onnx", options)
    session = start(providers=["CPUExecutionProvider"])
    images = make_images(args, batch_size)
    inputs = {"pixel_values": images.numpy()}

    def profile() -> dict[str, float]:
        options.enable_profiling, options.profile_file_prefix = True, str(args.folder / "profile")
        profiled = start(providers=["CPUExecutionProvider"])
        for _ in range(2):
            profiled.run(["logits"], inputs)
        events = json.loads(Path(profiled.end_profiling()).read_text())
        kernels = [event for event in events if event["name"].endswith("_kernel_time")]
        seconds: Counter[str] = Counter()
        for kernel in kernels[len(kernels) // 2 :]:  # the first run takes longer than all that follow
            seconds[kernel["args"]["op_name"]] += kernel["dur"] / 1e6
        return seconds

    run = functools.partial(session.run, ["logits"], inputs)
    return Competitor(lambda: run()[0], lambda: flops_of(load(args, "ours"), images.shape), profile)


def in_openvino(args: argparse.Namespace, batch_size: int, dtype: str) -> Competitor:
    """Prepare the ONNX file in OpenVINO, for batches of this size alone, as is best for it."""
    import openvino

    images = make_images(args, batch_size)
    core = openvino.Core()
    graph = core.read_model(args.folder / "model.onnx")
    graph.reshape(list(images.shape))
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        # It would take bfloat16 by itself where the processor has it.
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,  # no other rival's threads are bound to cores
    }
    if dtype == "bfloat16":
        # Its fused attention is wrong in bfloat16 (2026.4: masks with an IoU of 0.5), and no faster.
        options["SNIPPETS_MODE"] = "DISABLE"
    compiled = core.compile_model(graph, "CPU", options)

    @functools.cache
    def counted() -> Any:
        # Without snippets, which join attention and sums in kernels of one name.
        kernels = options | {"PERF_COUNT": True, "SNIPPETS_MODE": "DISABLE"}
        request = core.compile_model(graph, "CPU", kernels).create_infer_request()
        request.infer([images.numpy()])  # takes longer than all that follow
        return request

    def profile() -> dict[str, float]:
        request = counted()
        request.infer([images.numpy()])
        seconds: Counter[str] = Counter()
        for kernel in request.profiling_info:
            seconds[kernel.node_type] += kernel.real_time.total_seconds()
        return seconds

    flops = functools.partial(flops_of, load(args, "ours"), images.shape)
    return Competitor(lambda: compiled([images.numpy()])[0], flops, profile)


def file_to_file(model: nn.Module, segment: Callable[[], Any], written: Path) -> Competitor:
    """Return the competitor that writes a label map, of which a model does the computing."""
    shapes: Counter[tuple[int, ...]] = Counter()

    def count(module: nn.Module, inputs: tuple, options: Mapping[str, Any], output: Any) -> None:
        shapes[(inputs[0] if inputs else options["pixel_values"]).shape] += 1

    model.register_forward_hook(count, with_kwargs=True)

    def run() -> Any:
        shapes.clear()
        segment()
        return nibabel.load(written).dataobj  # read when all is timed

    return Competitor(run, lambda: sum(n * flops_of(model, shape) for shape, n in dict(shapes).items()))


def volume(args: argparse.Namespace, batch_size: int, dtype: str, mirrored: bool) -> Competitor:
    """Prepare this model with the window about the head and a slice on either side."""
    model, processor, _ = bench_window.build(argparse.Namespace(**vars(args), device="cpu"), "window")
    segment = Sam2UNetVolumePipeline(model.to(DTYPES[dtype]), processor, [args.modality])
    written = args.folder / f"ours_{dtype}_{mirrored}.nii.gz"
    return file_to_file(
        model,
        lambda: segment(args.case, flips=mirrored, batch_size=batch_size, progress=False).save(written),
        written,
    )


def set_up_nnunet(folder: Path) -> None:
    """Tell nnU-Net, before it is imported, where its files lie, and how many processes and threads it may have."""
    os.environ.update(nnunet_files.environment(folder / "nnunet"))


def plan_nnunet(args: argparse.Namespace) -> None:
    """Let nnU-Net plan its networks for all cases that have a mask, for whole tumour."""
    cases = [case for case in find_cases(args.brats_dir) if {args.modality, "seg"} <= case.files.keys()]
    nnunet_files.write_raw(args.folder / "nnunet", cases, [args.modality], {"WT": [1, 2, 3]})
    nnunet_files.run_worker(args.folder / "nnunet", "cpu", "plan")


def nnunet(args: argparse.Namespace, batch_size: int, configuration: str, mirrored: bool) -> Competitor:
    """Prepare nnU-Net's predictor with a planned network; it sees a patch at a time, whatever the batch size."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(str(args.folder / "nnunet" / "preprocessed" / nnunet_files.DATASET / "nnUNetPlans.json"))
    planned = plans.get_configuration(configuration)
    torch.manual_seed(0)
    network = get_network_from_plans(
        planned.network_arch_class_name,
        planned.network_arch_init_kwargs,
        planned.network_arch_init_kwargs_req_import,
        input_channels=1,
        output_channels=2,
        deep_supervision=False,
    )
    dataset = json.loads((args.folder / "nnunet" / "raw" / nnunet_files.DATASET / "dataset.json").read_text())
    with contextlib.redirect_stdout(sys.stderr):
        predictor = nnUNetPredictor(use_mirroring=mirrored, device=torch.device("cpu"), allow_tqdm=False)
    axes = tuple(range(len(planned.patch_size)))
    weights = [network.state_dict()]
    predictor.manual_initialization(network, plans, planned, weights, dataset, "nnUNetTrainer", axes)
    (case,) = find_cases(args.case)
    written = args.folder / f"nnunet_{configuration}_{mirrored}"

    def segment() -> None:
        with contextlib.redirect_stdout(sys.stderr):
            predictor.predict_from_files_sequential([[str(case.path(args.modality))]], [str(written)])

    return file_to_file(network, segment, Path(f"{written}{dataset['file_ending']}"))


def of_torch(family: str, dtype: str, package: str = "torch") -> Rival:
    """Return a rival that computes in PyTorch."""
    return Rival(family, functools.partial(in_torch, family=family, dtype=dtype), dtype, (package,))


ONNX = ("onnx", "onnxruntime", "onnxscript")  # what writing the file takes
IMAGES = {
    "ours float32": of_torch("ours", "float32"),
    "ours bfloat16": of_torch("ours", "bfloat16"),
    "compiled float32": of_torch("compiled", "float32"),
    "compiled bfloat16": of_torch("compiled", "bfloat16"),
    "transformers float32": of_torch("transformers", "float32", "transformers"),
    "transformers bfloat16": of_torch("transformers", "bfloat16", "transformers"),
    "reference float32": of_torch("reference", "float32", "sam2"),
    "onnxruntime float32": Rival("onnxruntime", in_onnxruntime, packages=("onnxruntime", *ONNX)),
    **{
        f"openvino {dtype}": Rival(
            "openvino", functools.partial(in_openvino, dtype=dtype), dtype, packages=("openvino", *ONNX)
        )
        for dtype in ("float32", "bfloat16")
    },
}
CASE = {
    f"ours {dtype}{', mirrored' * mirrored}": Rival(
        "ours", functools.partial(volume, dtype=dtype, mirrored=mirrored), dtype, mirrored=mirrored
    )
    for mirrored in (False, True)
    for dtype in ("float32", "bfloat16")
} | {
    f"nnU-Net {configuration}{', mirrored' * mirrored}": Rival(
        "nnunet",
        functools.partial(nnunet, configuration=configuration, mirrored=mirrored),
        packages=("nnunetv2",),
        mirrored=mirrored,
    )
    for mirrored in (False, True)
    for configuration in ("2d", "3d_fullres")
}
TASKS = {"images": IMAGES, "case": CASE}
# What kernels do, by their names in PyTorch, ONNX and OpenVINO.
KINDS = {
    "matrix products, attention": r"mm$|scaled_?dot_?product|softmax|FullyConnected|MatMul|Gemm",
    "convolutions": r"conv(?!ert)",
    "activations, norms, sums": r"gelu|relu|norm|MVN|add$|add_|mul$|clamp|Eltwise|Power",
    "copies, pooling and others": "",
}
PROFILED = ("ours", "transformers", "reference", "onnxruntime", "openvino")  # compiled kernels have no such names
COLUMNS = ("against ours", "memory (libraries)", "GFLOP", "share", "IoU", "package")


def measure(args: argparse.Namespace, task: str, batch_size: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Return what each rival of a task took, or why it was left out."""
    chosen = {
        name: rival
        for name, rival in TASKS[task].items()
        if rival.family in args.rivals and not (rival.mirrored and args.no_mirrors)
    }
    there = {
        name: functools.partial(rival.prepare, args, batch_size) for name, rival in chosen.items() if not rival.missing
    }
    # The first run compiles; a case is long enough without.
    warmup = 1 if task == "images" else 0
    found = in_processes(there, rounds, warmup, functools.partial(set_up_nnunet, args.folder))
    return {
        name: found.get(name) or {"left_out": f"needs {', '.join(rival.missing)}"} for name, rival in chosen.items()
    }


def profile(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Return figures and rows of what the rivals on images spend their time on, one after the other."""
    cases, rows = [], []
    for batch_size in args.batch_sizes:
        for name, rival in IMAGES.items():
            if rival.family not in args.rivals or rival.family not in PROFILED:
                continue
            row = {"": f"{batch_size} image{'s' * (batch_size > 1)}", "rival": name}
            if rival.missing:
                rows.append(row | {"all": f"needs {', '.join(rival.missing)}"} | dict.fromkeys(KINDS, ""))
                continue
            competitor = rival.prepare(args, batch_size)
            competitor.run()
            # The fastest run is the one that other processes interrupted least.
            kernels = min((competitor.profile() for _ in range(args.rounds)), key=lambda run: sum(run.values()))
            kinds = dict.fromkeys(KINDS, 0.0)
            for kernel, seconds in kernels.items():
                kind = next(kind for kind, names in KINDS.items() if re.search(names, kernel, re.IGNORECASE))
                kinds[kind] += seconds
            cases.append({"rival": name, "batch_size": batch_size, "kinds": kinds, "kernels": dict(kernels)})
            row["all"] = f"{1e3 * sum(kinds.values()):.0f} ms"
            rows.append(row | {kind: f"{1e3 * seconds:.0f} ms" for kind, seconds in kinds.items()})
    return cases, rows


def version_of(package: str) -> str:
    """Return name and version of the distribution that holds an installed package."""
    name = importlib.metadata.packages_distributions()[package][0]
    return f"{name} {importlib.metadata.version(name)}"


def compare(
    task: str, batch_size: int, found: dict[str, dict[str, Any]], rates: Mapping[str, float]
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Return figures and rows of a task: medians, and how many times as long as this model in the same way."""
    rows, outputs = [], {name: own.pop("output") for name, own in found.items() if "output" in own}
    what = "case" if task == "case" else f"{batch_size} image{'s' * (batch_size > 1)}"
    for name, own in found.items():
        rival = TASKS[task][name]
        row = {"": what, "rival": name, "time": own.get("left_out", ""), **dict.fromkeys(COLUMNS, "")}
        rows.append(row)
        if "left_out" in own:
            continue
        own["median"] = statistics.median(own["seconds"])
        own["share"] = own["flops"] / rates[rival.dtype] / own["median"]
        own["package"] = row["package"] = version_of(rival.packages[0])
        row["time"] = f"{own['median']:.3f} s"
        row["memory (libraries)"] = f"{own['peak_gb']:.2f} GB ({own['libraries_gb']:.2f})"
        row["GFLOP"], row["share"] = f"{own['flops'] / 1e9:.0f}", f"{own['share']:.2f}"
        base = f"ours {rival.dtype}{', mirrored' * rival.mirrored}"
        if base in outputs:
            if outputs[name].shape != outputs[base].shape:
                raise SystemExit(f"{name} gives {outputs[name].shape}, ours {outputs[base].shape}.")
            own["ratio"] = own["median"] / found[base]["median"]
            row["against ours"] = f"{own['ratio']:.2f}"
        if task == "images" and "ours float32" in outputs:
            own["mask_iou"] = mask_iou([outputs[name]], [outputs["ours float32"]])
            row["IoU"] = f"{own['mask_iou']:.4f}"
    return {"task": task, "batch_size": batch_size, "rivals": found}, rows


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=10, device=False)
    parser.add_argument("--rivals", nargs="+", default=list(FAMILIES), choices=FAMILIES, help="default: all")
    parser.add_argument("--preset", default="tiny", choices=list(PRESETS))
    parser.add_argument("--image_size", type=int, default=352)
    parser.add_argument(
        "--batch_sizes", type=int, nargs="*", default=[1, 4], help="of images; none for the case alone"
    )
    parser.add_argument("--brats_dir", type=Path, help="cases for which nnU-Net plans; without it images alone")
    parser.add_argument("--case", type=Path, help="folder of the case to segment; default: the first of --brats_dir")
    parser.add_argument("--modality", default="flair")
    parser.add_argument("--case_rounds", type=int, default=2, help="how often each segments the case")
    parser.add_argument("--volume_batch_size", type=int, default=8, help="slices of the case at once, ours")
    parser.add_argument("--no_mirrors", action="store_true", help="leave out what averages over mirror images")
    parser.add_argument("--profile", action="store_true", help="tell what rivals spend their time on with images")
    args = parser.parse_args(argv)
    if args.case and not args.brats_dir:
        parser.error("--case needs --brats_dir, for which nnU-Net plans")
    if args.profile and (args.brats_dir or not args.batch_sizes or not set(args.rivals) & set(PROFILED)):
        parser.error(f"--profile takes images of --batch_sizes, no --brats_dir, and --rivals of {', '.join(PROFILED)}")
    if args.brats_dir and not args.case:
        args.case = find_cases(args.brats_dir)[0].folder
    return args


def set_up(args: argparse.Namespace) -> None:
    """Write what the processes share: the weights as checkpoint and ONNX file, and nnU-Net's plans."""
    if args.batch_sizes:
        model = build(args.preset, args.image_size)["ours"].eval()
        model.save_pretrained(args.folder / "model")
        if {"onnxruntime", "openvino"} & set(args.rivals) and not IMAGES["onnxruntime float32"].missing:
            export_onnx(model, args.folder / "model.onnx", image_size=(args.image_size, args.image_size))
    if args.brats_dir and "nnunet" in args.rivals and not CASE["nnU-Net 2d"].missing:
        plan_nnunet(args)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    cases, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        options = argparse.Namespace(**vars(args), folder=Path(folder))
        set_up(options)
        if args.profile:
            cases, rows = profile(options)
            return report(__file__, argv, args, {"cases": cases}, rows)
        tokens = (args.image_size // 4) ** 2
        rates = {name: matmul_rate(args.preset, tokens, DTYPES[name], "cpu", 5) for name in ("float32", "bfloat16")}
        tasks = [("images", batch_size, args.rounds) for batch_size in args.batch_sizes]
        if args.brats_dir:
            tasks.append(("case", args.volume_batch_size, args.case_rounds))
        for task, batch_size, rounds in tasks:
            case, own_rows = compare(task, batch_size, measure(options, task, batch_size, rounds), rates)
            cases.append(case)
            rows += own_rows
    return report(__file__, argv, args, {"matmul_flops_per_s": rates, "cases": cases}, rows)


if __name__ == "__main__":
    main()
