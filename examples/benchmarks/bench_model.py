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
import importlib
import itertools
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import (
    DTYPES,
    make_parser,
    mask_iou,
    peak_memory_gb,
    report,
    reset_peak_memory,
    synchronize,
    time_in_turn,
)
from torch import nn
from transformers import Sam2HieraDetModel

from sam2unet_hf import Sam2UNetConfig, Sam2UNetForSemanticSegmentation
from sam2unet_hf.configuration_sam2unet import PRESETS
from sam2unet_hf.weights_sam2unet import SAM2_NAMES, rename


class PaddedEncoder(Sam2HieraDetModel):
    """transformers' SAM 2 encoder, which pads every window, with an adapter before each block."""

    def __init__(self, model: Sam2UNetForSemanticSegmentation):
        super().__init__(model.config.backbone_config)
        ours = {name: value for name, value in model.encoder.state_dict().items() if ".adapter." not in name}
        self.load_state_dict(ours)
        self.requires_grad_(not model.config.freeze_encoder)
        for block, adapted in zip(self.blocks, model.encoder.blocks, strict=True):
            block.adapter = copy.deepcopy(adapted.adapter)
            block.register_forward_pre_hook(lambda block, inputs: block.adapter(*inputs))

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        maps = super().forward(pixel_values).intermediate_hidden_states
        return tuple(feature_map.permute(0, 3, 1, 2) for feature_map in maps)


class ReferenceVariant(nn.Module):
    """SAM 2's own `Hiera` with an adapter before each block, and all three outputs, as in the reference."""

    def __init__(self, model: Sam2UNetForSemanticSegmentation):
        super().__init__()
        from sam2.modeling.backbones.hieradet import Hiera

        config = model.config.backbone_config
        self.encoder = Hiera(
            embed_dim=config.hidden_size,
            num_heads=config.num_attention_heads_per_stage[0],
            stages=config.blocks_per_stage,
            window_pos_embed_bkg_spatial_size=config.window_positional_embedding_background_size,
            window_spec=config.window_size_per_stage,
            global_att_blocks=config.global_attention_blocks,
        )
        ours = model.encoder.state_dict()
        self.encoder.load_state_dict({name: ours[rename(name, SAM2_NAMES)] for name in self.encoder.state_dict()})
        for block, adapted in zip(self.encoder.blocks, model.encoder.blocks, strict=True):
            block.adapter = adapted.adapter
            block.register_forward_pre_hook(lambda block, inputs: block.adapter(*inputs))
        self.decode_head = model.decode_head

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        outputs = self.decode_head(*self.encoder(pixel_values), output_auxiliary_logits=True)
        return [F.interpolate(scores, size=pixel_values.shape[-2:], mode="bilinear") for scores in outputs][0]


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


class Reference(nn.Module):
    """The `SAM2UNet` of the reference implementation, from its file, with the plain loss; for the large encoder."""

    def __init__(self, path: Path):
        super().__init__()
        sys.path.insert(0, str(path.resolve().parent))
        self.model = importlib.import_module(path.stem).SAM2UNet()

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        outputs = self.model(pixel_values)
        return outputs[0] if labels is None else plain_loss(outputs, labels)


def build(preset: str, image_size: int, reference: Path | None = None) -> dict[str, nn.Module]:
    """Build the competitors, ours and the padded one with the same random weights."""
    torch.manual_seed(0)
    model = Sam2UNetForSemanticSegmentation(Sam2UNetConfig.from_preset(preset, regions={"WT": [1]})).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos_embed" in name:
                parameter.normal_(std=0.1)  # fresh ones are near 0 and would hide differences
        # Estimate batch norm as after training, so that the logits depend on the image.
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        momentum = norms[0].momentum
        for norm in norms:
            norm.momentum = None
        for _ in range(2):
            model(torch.randn(2, 3, image_size, image_size))
        for norm in norms:  # an average without momentum breaks the graph of `torch.compile`
            norm.momentum = momentum
    padded = copy.deepcopy(model)
    padded.encoder = PaddedEncoder(model)
    models = {"ours": model, "padded": padded}
    if reference is not None and preset == "large":
        models["reference"] = Reference(reference)
    return models


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


def prepare(
    args: argparse.Namespace, name: str, model: nn.Module, mode: str, dtype: str, pixel_values: torch.Tensor
) -> Callable[[], Any]:
    """Return a function that runs a competitor once in a mode and a dtype."""
    model = model.to(args.device)
    if mode == "forward":
        model = model.to(DTYPES[dtype])
        if args.channels_last and args.device == "cuda":
            model = model.to(memory_format=torch.channels_last)
    elif name == "ours" and args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if args.compile and name == "ours":
        model = torch.compile(model)
    if mode == "forward":
        return forward_pass(model, pixel_values.to(DTYPES[dtype]))
    return training_step(model, pixel_values, None if dtype == "float32" else DTYPES[dtype])


def compare(args: argparse.Namespace, preset: str, mode: str, dtype: str, batch_size: int) -> dict[str, Any]:
    """Time one case for all competitors."""
    models = build(preset, args.image_size, args.reference)
    pixel_values = torch.randn(batch_size, 3, args.image_size, args.image_size, device=args.device)
    competitors: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        # Run the others in float32 too, as the reference implementation does.
        for variant in [dtype] if name == "ours" else dict.fromkeys(["float32", dtype]):
            copied = copy.deepcopy(model)
            if mode == "forward" and name == "ours":
                copied.eval().fuse_for_inference()
            competitors[f"{name} {variant}"] = prepare(args, name, copied, mode, variant, pixel_values)
    case = {"preset": preset, "mode": mode, "dtype": dtype, "batch_size": batch_size}
    seconds = time_in_turn(competitors, args.rounds, args.device)
    case["seconds"] = {name: statistics.median(values) for name, values in seconds.items()}
    ours, *others = case["seconds"].items()
    case["ratios"] = {name: value / ours[1] for name, value in others}
    case["images_per_second"] = {name: batch_size / value for name, value in case["seconds"].items()}
    if args.profile:
        case["profile"] = profile(competitors[ours[0]], args.device)
    if mode == "forward":
        own, base = competitors[ours[0]]().float(), competitors["padded float32"]().float()
        case["largest_difference"] = (own - base).abs().max().item()
        case["largest_logit"] = base.abs().max().item()
        case["mask_iou"] = mask_iou([own], [base])
    return case


def profile(run: Callable[[], Any], device: str, top: int = 12) -> list[dict[str, Any]]:
    """Return the operations on which a function spends most of the device's time, in ms, and print them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with torch.profiler.profile(activities=activities) as found:
        run()
        synchronize(device)
    column = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = [event for event in found.key_averages() if getattr(event, column) > 0]
    if device == "cuda":  # kernels alone, whose time is also that of the operation that started them
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: -getattr(event, column))
    total = sum(getattr(event, column) for event in events)
    rows = []
    for event in events[:top]:
        milliseconds = getattr(event, column) / 1000
        rows.append(
            {"name": event.key[:90], "calls": event.count, "ms": milliseconds, "share": milliseconds * 1000 / total}
        )
        print(
            f"{milliseconds:9.2f} ms {100 * rows[-1]['share']:5.1f} % {event.count:5d} x {event.key[:90]}",
            file=sys.stderr,
        )
    print(f"{total / 1000:9.2f} ms in all", file=sys.stderr)
    return rows


def peak_memory(args: argparse.Namespace, name: str, preset: str, mode: str, dtype: str, batch_size: int) -> float:
    """Run two forward passes or training steps of one competitor, and return the peak in GB of this process."""
    torch.manual_seed(0)
    model: nn.Module
    if name == "reference":
        model = Reference(args.reference)
    else:
        model = Sam2UNetForSemanticSegmentation(Sam2UNetConfig.from_preset(preset, regions={"WT": [1]}))
        if name == "padded":
            model.encoder = PaddedEncoder(model)
    pixel_values = torch.randn(batch_size, 3, args.image_size, args.image_size, device=args.device)
    run = prepare(args, name, model, mode, dtype, pixel_values)
    # Reset the peak, because building the model takes more than one copy of the weights.
    reset_peak_memory(args.device)
    run(), run()
    return peak_memory_gb(args.device)


def compare_memory(args: argparse.Namespace, preset: str, mode: str, dtype: str, batch_size: int) -> dict[str, Any]:
    """Measure the peak memory of each competitor in a process of its own."""
    names = ["ours", "padded"] + (["reference"] if args.reference and preset == "large" else [])
    args = argparse.Namespace(**{**vars(args), "compile": False, "channels_last": False})
    gigabytes = {}
    for name in names:
        with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                gigabytes[name] = pool.submit(peak_memory, args, name, preset, mode, dtype, batch_size).result()
            except Exception as err:
                raise SystemExit(f"{name} failed: {err}") from err
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
    parser.add_argument("--profile", action="store_true", help="print what ours spends the device's time on, too")
    parser.add_argument("--reference", type=Path, help="SAM2UNet.py of the reference implementation")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    cases, rows = [], []
    for preset, mode, dtype, batch_size in itertools.product(args.presets, args.modes, args.dtypes, args.batch_sizes):
        case = compare(args, preset, mode, dtype, batch_size)
        row = {key: case[key] for key in ("preset", "mode", "dtype", "batch_size")}
        row["ours"] = f"{case['seconds'][f'ours {dtype}']:.3f} s"
        row["images/s"] = f"{case['images_per_second'][f'ours {dtype}']:.1f}"
        row["faster than"] = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in case["ratios"].items())
        if args.memory:
            case |= compare_memory(args, preset, mode, dtype, batch_size)
            row["peak memory"] = ", ".join(f"{name} {peak:.2f} GB" for name, peak in case["peak_gb"].items())
        cases.append(case)
        rows.append(row)
        print(row, file=sys.stderr)
    return report(__file__, argv, args, {"cases": cases}, rows)


if __name__ == "__main__":
    main()
