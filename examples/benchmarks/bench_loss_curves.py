#!/usr/bin/env python
"""Train the same model on the same images in the same order in two dtypes, and compare the loss curves.

python examples/benchmarks/bench_loss_curves.py --dataset my_slices
python examples/benchmarks/bench_loss_curves.py --dataset my_slices --preset tiny --steps 50 --save trained

The data set is a folder written by `python -m dataset_scripts.brats_slices`. Weights are float32 in both;
bfloat16 and float16 are the dtype of autocast.
"""

import argparse
import copy
import itertools
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from timing import DTYPES, make_parser, report, single_images
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from sam2unet_hf import Sam2UNetConfig, Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor
from sam2unet_hf.configuration_sam2unet import PRESETS
from sam2unet_hf.training import SegmentationTransform, collate
from sam2unet_hf.training.augmentation import augmentation


def train(model: nn.Module, loader: DataLoader, args: argparse.Namespace, dtype: str) -> list[float]:
    """Train and return the loss of each step."""
    torch.manual_seed(args.seed)  # sets the order of images and their flips
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=1e-4, fused=True)
    model.train()
    losses = []
    batches = itertools.chain.from_iterable(itertools.repeat(loader))  # shuffled anew in each epoch
    for batch in tqdm(itertools.islice(batches, args.steps), total=args.steps, desc=dtype, unit="step"):
        with torch.autocast(args.device, DTYPES[dtype], enabled=dtype != "float32"):
            loss = model(batch["pixel_values"].to(args.device), labels=batch["labels"].to(args.device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = make_parser(__doc__)
    parser.add_argument("--dataset", required=True, help="folder or Hub id, with a column of images, and `mask`")
    parser.add_argument("--preset", default="large", choices=list(PRESETS))
    parser.add_argument("--sam2_checkpoint", help="pretrained encoder, frozen; default: a random one, frozen too")
    parser.add_argument("--image_size", type=int, default=352)
    parser.add_argument("--dtypes", nargs=2, default=["float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--window", type=int, default=20, help="number of steps whose mean losses are compared")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="folder for the model of the first dtype and its processor")
    args = parser.parse_args(argv)
    if args.steps < args.window:
        parser.error(f"--steps must be at least --window ({args.window}), got {args.steps}")
    regions = {"WT": [1, 2, 3]}
    processor = Sam2UNetImageProcessor(regions=regions, size={"height": args.image_size, "width": args.image_size})
    rows = datasets.load_dataset(args.dataset, split="train")  # nosec B615 # rows, no code
    rows = single_images(rows).with_transform(SegmentationTransform(processor, augment=augmentation("flips")))
    options = {"shuffle": True, "drop_last": True, "collate_fn": collate, "num_workers": args.num_workers}
    loader = DataLoader(rows, args.batch_size, **options)
    torch.manual_seed(args.seed)
    if args.sam2_checkpoint is None:
        model = Sam2UNetForSemanticSegmentation(Sam2UNetConfig.from_preset(args.preset, regions=regions))
    else:
        model = Sam2UNetForSemanticSegmentation.from_sam2(args.sam2_checkpoint, regions=regions)
    losses = {}
    for dtype in args.dtypes:
        trained = copy.deepcopy(model).to(args.device)
        losses[dtype] = train(trained, loader, args, dtype)
        if args.save is not None and dtype == args.dtypes[0]:
            trained.save_pretrained(args.save)
            processor.save_pretrained(args.save)
    table, differences = [], []
    for start in range(0, args.steps - args.window + 1, args.window):
        row = {"steps": f"{start + 1} to {start + args.window}"}
        first, second = (float(np.mean(losses[dtype][start : start + args.window])) for dtype in args.dtypes)
        row |= {args.dtypes[0]: f"{first:.4f}", args.dtypes[1]: f"{second:.4f}"}
        differences.append(abs(second - first) / first)
        table.append({**row, "difference": f"{100 * differences[-1]:.2f} %"})
    return report(__file__, argv, args, {"losses": losses, "largest_difference": max(differences)}, table)


if __name__ == "__main__":
    main()
