#!/usr/bin/env python
"""Train the same model on the same images in the same order in two dtypes, and compare the loss curves.

python examples/benchmarks/bench_loss_curves.py --dataset my_slices
python examples/benchmarks/bench_loss_curves.py --dataset my_slices --preset tiny --steps 50 --save trained

The data set is a folder written by `python -m dataset_scripts.brats_slices`. Weights are float32 in both;
bfloat16 and float16 are the dtype of autocast.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from timing import DTYPES, make_parser, report, run_facts
from torch.utils.data import DataLoader
from tqdm import tqdm

from sam2unet_hf import Sam2UNetConfig, Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor
from sam2unet_hf.configuration_sam2unet import PRESETS
from sam2unet_hf.training import SegmentationTransform, collate
from sam2unet_hf.training.augmentation import augmentation


def train(
    model: Sam2UNetForSemanticSegmentation, loader: DataLoader, args: argparse.Namespace, dtype: str
) -> list[float]:
    """Train and return the loss of each step."""
    torch.manual_seed(args.seed)  # sets the order of images and their flips
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=1e-4, fused=True)
    model.train()
    losses: list[float] = []
    progress = tqdm(total=args.steps, desc=dtype, unit="step")
    while len(losses) < args.steps:
        for batch in loader:
            with torch.autocast(args.device, DTYPES[dtype], enabled=dtype != "float32"):
                loss = model(batch["pixel_values"].to(args.device), labels=batch["labels"].to(args.device)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            progress.update()
            if len(losses) == args.steps:
                break
    progress.close()
    return losses


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = make_parser(__doc__)
    parser.add_argument("--dataset", required=True, help="folder or Hub id, with columns `image` and `mask`")
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
    rows = rows.with_transform(SegmentationTransform(processor, augment=augmentation("flips")))
    loader = DataLoader(
        rows, args.batch_size, shuffle=True, drop_last=True, collate_fn=collate, num_workers=args.num_workers
    )
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
    windows = range(0, args.steps - args.window + 1, args.window)
    first, second = (
        np.array([np.mean(losses[d][start : start + args.window]) for start in windows]) for d in args.dtypes
    )
    differences = np.abs(second - first) / first
    results = {
        **run_facts(__file__, argv, args.device),
        "losses": losses,
        "largest_difference": float(differences.max()),
    }
    table = [
        {
            "steps": f"{start + 1} to {start + args.window}",
            **{name: f"{value:.4f}" for name, value in zip(args.dtypes, pair, strict=True)},
            "difference": f"{100 * difference:.2f} %",
        }
        for start, *pair, difference in zip(windows, first, second, differences, strict=True)
    ]
    report(results, table, args.output)
    return results


if __name__ == "__main__":
    main()
