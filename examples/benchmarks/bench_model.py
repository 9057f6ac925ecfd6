#!/usr/bin/env python
"""Time forward passes and training steps against a plain, padded SAM2-UNet, in turn in one process.

python examples/benchmarks/bench_model.py
python examples/benchmarks/bench_model.py --presets tiny --batch_sizes 8 --dtypes bfloat16 --compile
python examples/benchmarks/bench_model.py --reference path/to/SAM2UNet.py

The padded variant is transformers' own `Sam2HieraDetModel` with the same adapters and the same decoder, and equal
weights, trained with the loss as the paper writes it. Peak memory is measured in processes of their own.
"""

import argparse
import copy
import importlib.util
import itertools
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import DTYPES, make_parser, mask_iou, report, run_facts, time_in_turn
from torch import nn
from transformers import Sam2HieraDetModel

from sam2unet_hf import Sam2UNetConfig, Sam2UNetForSemanticSegmentation
from sam2unet_hf.configuration_sam2unet import PRESETS


class PaddedEncoder(nn.Module):
    """transformers' SAM 2 encoder, which pads every window, with an adapter before each block."""

    def __init__(self, model: Sam2UNetForSemanticSegmentation):
        super().__init__()
        self.encoder = Sam2HieraDetModel(model.config.backbone_config)
        ours = {name: value for name, value in model.encoder.state_dict().items() if ".adapter." not in name}
        self.encoder.load_state_dict(ours)
        self.encoder.requires_grad_(not model.config.freeze_encoder)
        self.adapters = nn.ModuleList([copy.deepcopy(block.adapter) for block in model.encoder.blocks])
        self.patch_embed = self.encoder.patch_embed

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden_states = self.encoder.patch_embed(pixel_values)
        hidden_states = hidden_states + self.encoder._get_pos_embed(hidden_states.shape[1:3])
        feature_maps = []
        for index, (block, adapter) in enumerate(zip(self.encoder.blocks, self.adapters, strict=True)):
            hidden_states = block(adapter(hidden_states))
            if index in self.encoder.stage_ends:
                feature_maps.append(hidden_states.permute(0, 3, 1, 2))
        return tuple(feature_maps)


def plain_loss(outputs: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Sum of boundary-weighted IoU loss and mean BCE over the outputs, term by term as arXiv 2408.08870 has it."""
    total = torch.zeros((), device=labels.device)
    for logits in outputs:
        weights = 1 + 5 * (F.avg_pool2d(labels, kernel_size=31, stride=1, padding=15) - labels).abs()
        probabilities = logits.float().sigmoid()
        intersection = (weights * probabilities * labels).sum(dim=(2, 3))
        union = (weights * (probabilities + labels)).sum(dim=(2, 3)) - intersection
        iou_loss = 1 - (intersection + 1) / (union + 1)
        total = total + (F.binary_cross_entropy_with_logits(logits.float(), labels) + iou_loss).mean()
    return total


def padded_variant(model: Sam2UNetForSemanticSegmentation) -> Sam2UNetForSemanticSegmentation:
    """Return a copy of the model on the padded encoder."""
    padded = copy.deepcopy(model)
    padded.encoder = PaddedEncoder(model)
    return padded


class Reference(nn.Module):
    """The `SAM2UNet` of the reference implementation, from its file, with the plain loss; for the large encoder."""

    def __init__(self, path: Path):
        super().__init__()
        sys.path.insert(0, str(path.resolve().parent))
        spec = importlib.util.spec_from_file_location("reference_sam2unet", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.model = module.SAM2UNet()
        self.config = None

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        outputs = self.model(pixel_values)
        return outputs[0] if labels is None else plain_loss(outputs, labels)


def build(preset: str, reference: Path | None, names: list[str], image_size: int) -> dict[str, nn.Module]:
    """Build the competitors with the same random weights."""
    torch.manual_seed(0)
    model = Sam2UNetForSemanticSegmentation(Sam2UNetConfig.from_preset(preset, regions={"WT": [1]})).eval()
    # Make position embeddings large, because fresh ones are near 0 and would hide differences.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos_embed" in name:
                parameter.normal_(std=0.1)
        # Estimate batch norm as after training, so that the logits depend on the image.
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        model.train()
        for _ in range(2):
            model(torch.randn(2, 3, image_size, image_size))
    found: dict[str, nn.Module] = {}
    if "padded" in names:
        found["padded"] = padded_variant(model)
    if "reference" in names and reference is not None:
        found["reference"] = Reference(reference)
    return {"ours": model, **found} if "ours" in names else found


def forward_pass(model: nn.Module, pixel_values: torch.Tensor) -> Callable[[], Any]:
    """Return a function that runs the model without gradients."""
    model.eval()

    def run() -> torch.Tensor:
        with torch.inference_mode():
            output = model(pixel_values)
        return getattr(output, "logits", output)

    return run


def training_step(model: nn.Module, pixel_values: torch.Tensor, autocast: torch.dtype | None) -> Callable[[], Any]:
    """Return a function that trains one step: forward, loss, backward, AdamW."""
    model.train()
    labels = (torch.rand(len(pixel_values), 1, *pixel_values.shape[-2:], device=pixel_values.device) > 0.9).float()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def run() -> None:
        with torch.autocast(pixel_values.device.type, autocast, enabled=autocast is not None):
            if isinstance(getattr(model, "encoder", None), PaddedEncoder):
                output = model(pixel_values, output_auxiliary_logits=True)
                loss = plain_loss((output.logits, *output.auxiliary_logits), labels)
            else:
                loss = model(pixel_values, labels=labels)
                loss = getattr(loss, "loss", loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def compare(args: argparse.Namespace, preset: str, mode: str, dtype: str, batch_size: int) -> dict[str, Any]:
    """Time one case for all competitors."""
    # Run the others in float32 too, as the reference implementation does.
    models = build(preset, args.reference, ["ours", "padded", "reference"], args.image_size)
    pixel_values = torch.randn(batch_size, 3, args.image_size, args.image_size, device=args.device)
    competitors: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        if name == "reference" and preset != "large":
            continue
        variants = ["float32"] if name != "ours" or dtype == "float32" else []
        variants += [dtype] if dtype != "float32" else []
        for variant in variants:
            copied = copy.deepcopy(model).to(args.device)
            if mode == "training" and name == "ours" and args.gradient_checkpointing:
                copied.gradient_checkpointing_enable()
            if mode == "forward":
                if name == "ours":
                    copied.eval().fuse_for_inference()
                copied = copied.to(DTYPES[variant])
                if args.channels_last and args.device == "cuda":
                    copied = copied.to(memory_format=torch.channels_last)
            if args.compile and name == "ours":
                copied = torch.compile(copied)
            if mode == "forward":
                function = forward_pass(copied, pixel_values.to(DTYPES[variant]))
            else:
                function = training_step(copied, pixel_values, None if variant == "float32" else DTYPES[variant])
            competitors[f"{name} {variant}"] = function
        del model
    agreement = {}
    if mode == "forward":
        own = competitors[f"ours {dtype}"]().float()
        base = competitors["padded float32"]().float()
        agreement = {
            "largest_difference": (own - base).abs().max().item(),
            "largest_logit": base.abs().max().item(),
            "mask_iou": mask_iou([own], [base]),
        }
    seconds = time_in_turn(competitors, args.rounds, args.device)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ours = medians[f"ours {dtype}"]
    return {
        "preset": preset,
        "mode": mode,
        "dtype": dtype,
        "batch_size": batch_size,
        "seconds": medians,
        "ratios": {name: value / ours for name, value in medians.items() if not name.startswith("ours")},
        **agreement,
    }


def peak_memory(args: argparse.Namespace, name: str) -> float:
    """Run one forward pass or two training steps of one competitor, and return the peak in GB; for a subprocess."""
    (preset,), (mode,), (dtype,), (batch_size,) = args.presets, args.modes, args.dtypes, args.batch_sizes
    torch.manual_seed(0)
    model: nn.Module
    if name == "reference":
        model = Reference(args.reference)
    else:
        config = Sam2UNetConfig.from_preset(preset, regions={"WT": [1]})
        model = Sam2UNetForSemanticSegmentation(config)
        if name == "padded":
            encoder = PaddedEncoder(model)
            model.encoder = None
            model.encoder = encoder
    model.to(args.device)
    if args.gradient_checkpointing and name == "ours":
        model.gradient_checkpointing_enable()
    pixel_values = torch.randn(batch_size, 3, args.image_size, args.image_size, device=args.device)
    if mode == "forward":
        model.to(DTYPES[dtype])
        run = forward_pass(model, pixel_values.to(DTYPES[dtype]))
    else:
        run = training_step(model, pixel_values, None if dtype == "float32" else DTYPES[dtype])
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run(), run()
        return torch.cuda.max_memory_allocated() / 1e9
    # Reset the peak, because building the model takes more than one copy of the weights.
    Path("/proc/self/clear_refs").write_text("5")
    run(), run()
    peaks = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(peaks[0].split()[1]) * 1024 / 1e9 if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def compare_memory(args: argparse.Namespace, preset: str, mode: str, dtype: str, batch_size: int) -> dict[str, Any]:
    """Measure the peak memory of each competitor in a process of its own."""
    names = ["ours", "padded"] + (["reference"] if args.reference and preset == "large" else [])
    gigabytes = {}
    for name in names:
        command = [
            sys.executable, __file__, "--presets", preset, "--modes", mode, "--dtypes", dtype, "--batch_sizes",
            str(batch_size), "--image_size", str(args.image_size), "--device", args.device, "--peak_memory_of", name,
            *(["--reference", str(args.reference)] if args.reference else []),
            *(["--gradient_checkpointing"] if args.gradient_checkpointing else []),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)  # nosec B603 # this script
        if result.returncode:
            raise SystemExit(f"{name} failed: {result.stderr[-2000:]}")
        gigabytes[name] = float(result.stdout.split()[-1])
    return {"peak_gb": gigabytes, "peak_ratio": gigabytes["ours"] / gigabytes["padded"]}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--presets", nargs="+", default=["large"], choices=list(PRESETS))
    parser.add_argument("--modes", nargs="+", default=["forward", "training"], choices=["forward", "training"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--image_size", type=int, default=352)
    parser.add_argument("--compile", action="store_true", help="compile ours with torch.compile")
    parser.add_argument("--channels_last", action="store_true", help="on a GPU, weights of convolutions channels last")
    parser.add_argument(
        "--gradient_checkpointing", action="store_true", help="checkpoint activations of ours in training"
    )
    parser.add_argument("--memory", action="store_true", help="measure the peak memory too")
    parser.add_argument("--reference", type=Path, help="SAM2UNet.py of the reference implementation")
    parser.add_argument("--peak_memory_of", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    if args.peak_memory_of:
        print(peak_memory(args, args.peak_memory_of))
        return {}
    results: dict[str, Any] = {**run_facts(__file__, argv, args.device), "cases": []}
    rows = []
    for preset, mode, dtype, batch_size in itertools.product(args.presets, args.modes, args.dtypes, args.batch_sizes):
        case = compare(args, preset, mode, dtype, batch_size)
        row = {key: case[key] for key in ("preset", "mode", "dtype", "batch_size")}
        row["ours"] = f"{case['seconds'][f'ours {dtype}']:.3f} s"
        row["faster than"] = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in case["ratios"].items())
        if args.memory:
            case |= compare_memory(args, preset, mode, dtype, batch_size)
            row["peak memory"] = ", ".join(f"{name} {peak:.2f} GB" for name, peak in case["peak_gb"].items())
        results["cases"].append(case)
        rows.append(row)
        print(row, file=sys.stderr)
    report(results, rows, args.output)
    return results


if __name__ == "__main__":
    main()
