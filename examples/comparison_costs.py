"""What a system costs: parameters, operations, seconds and memory."""

import resource
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from sam2unet_hf import Sam2UNetForSemanticSegmentation


def median_seconds(function: Callable[[], Any], device: str, calls: int = 5, warmup: int = 2) -> float:
    """Return the median seconds of a call."""
    seconds = []
    for _ in range(warmup + calls):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warmup:])


def count_flops(model: PreTrainedModel, image: torch.Tensor) -> int:
    """Count the floating-point operations of a forward pass."""
    has_attention = isinstance(model, Sam2UNetForSemanticSegmentation)
    if has_attention:
        model.set_attn_implementation("eager")  # as matrix products, which are counted on every device
    with FlopCounterMode(display=False) as counter:
        model(image)
    if has_attention:
        model.set_attn_implementation("sdpa")
    return counter.get_total_flops()


def time_step(model: PreTrainedModel, batches: Iterator[dict[str, Any]], bf16: bool) -> float:
    """Return the median seconds of a training step, loading included."""
    device = model.device.type
    model.train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])

    def step() -> None:
        batch = next(batches)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = model(batch["pixel_values"].to(device), labels=batch["labels"].to(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return median_seconds(step, device)


def measure_model(
    model: PreTrainedModel, batches: Iterator[dict[str, Any]], image_size: int, bf16: bool
) -> dict[str, float]:
    """Measure what a model costs on its device, in a process that has run no other.

    Args:
        model: The model.
        batches: Batches for training it.
        image_size: Height and width in pixels of the image that it segments.
        bf16: Run under bfloat16 autocast.

    Returns:
        `parameters`, `trained_parameters`, `flops` and `seconds_per_image` of one image, `seconds_per_step`, and
        `peak_memory_gb` of the GPU or, without one, of the process.
    """
    device = model.device.type
    model.eval()
    image = torch.randn(1, 3, image_size, image_size, device=device)

    def segment() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            model(image)

    costs = {
        "parameters": model.num_parameters(),
        "trained_parameters": model.num_parameters(only_trainable=True),
    }
    # Do not use inference mode, because the model is trained next, which fails with inference tensors that it keeps.
    with torch.no_grad():
        costs["flops"] = count_flops(model, image)
        costs["seconds_per_image"] = median_seconds(segment, device)
    costs["seconds_per_step"] = time_step(model, batches, bf16)
    if device == "cuda":
        costs["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    else:
        costs["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return costs
