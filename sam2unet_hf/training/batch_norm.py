"""Batch norm statistics over many training images, in place of running averages."""

import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments

from .loaders import make_sampler
from .sampling import ForegroundShare


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def batch_norm_loader(
    rows: Any, args: TrainingArguments, collate: Callable[[Any], Any], foreground: ForegroundShare | None = None
) -> DataLoader:
    """Return training images for `estimate_batch_norm`: the same at each call, other ones in each process.

    With `foreground` they are chosen as for an epoch of training, so that the statistics are those of its images.
    """
    batch_size = max(args.per_device_train_batch_size, args.per_device_eval_batch_size)
    seed = args.seed + args.process_index
    sampler = make_sampler(rows, batch_size, shuffle=True, foreground=foreground, seed=seed)
    return DataLoader(
        rows,
        batch_size,
        shuffle=sampler is None and not isinstance(rows, IterableDataset),
        sampler=sampler,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=collate,
    )


@torch.no_grad()
def estimate_batch_norm(model: nn.Module, loader: DataLoader, num_images: int, accelerator: Accelerator) -> None:
    """Replace the running statistics of batch norm by those over training images.

    The mean is that of all images of all processes, and the variance is that about it: the mean variance within
    batches plus the variance of the batches' means.

    Each process takes `num_images`, rounded up to whole batches. The model ends in training mode.

    Source: "precise batch norm", Wu and Johnson, arXiv 2105.07576, section 3.
    """
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 1.0  # leaves the statistics of the last batch
    model.train()
    sizes = [norm.num_features for norm in norms]
    # Of images, means and mean squares.
    sums = torch.zeros(3, sum(sizes), dtype=torch.float64)
    for batch in itertools.islice(loader, math.ceil(num_images / cast("int", loader.batch_size))):
        pixel_values = send_to_device(batch["pixel_values"], accelerator.device)
        with accelerator.autocast():
            model(pixel_values)
        mean = torch.cat([cast("torch.Tensor", norm.running_mean) for norm in norms]).cpu().double()
        variance = torch.cat([cast("torch.Tensor", norm.running_var) for norm in norms]).cpu().double()
        sums += len(pixel_values) * torch.stack([torch.ones_like(mean), mean, variance + mean**2])
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums.to(accelerator.device))
    count, mean, square = sums
    means, variances = (mean / count).split(sizes), (square / count - (mean / count) ** 2).split(sizes)
    for norm, momentum, *statistics in zip(norms, momenta, means, variances, strict=True):
        norm.momentum = momentum
        cast("torch.Tensor", norm.running_mean).copy_(statistics[0])
        cast("torch.Tensor", norm.running_var).copy_(statistics[1])
