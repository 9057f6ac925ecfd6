#!/usr/bin/env python
"""Time the whole path from a data set on disk to label maps at the images' own size, and compare the masks by dtype.

python examples/benchmarks/bench_throughput.py --dataset my_slices --model runs/BRATS
python examples/benchmarks/bench_throughput.py --dataset my_slices --preset large --batch_size 32 --num_workers 8
python examples/benchmarks/bench_throughput.py --dataset my_slices --split train --reading

The data set is a folder written by `python -m dataset_scripts.brats_slices`, or another with a column of images. Idle
is the share of the time in which the model waits for images. With `--reading` the time is that of reading alone: from
Parquet to shuffled, flipped inputs of a training step, from the cache of `datasets` and streamed.
"""

import argparse
import copy
import functools
import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from timing import DTYPES, make_parser, mask_iou, report, single_images, synchronize, time_in_turn
from torch.utils.data import DataLoader

from sam2unet_hf import Sam2UNetConfig, Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor
from sam2unet_hf.configuration_sam2unet import PRESETS
from sam2unet_hf.training import SegmentationTransform, collate
from sam2unet_hf.training.augmentation import augmentation
from sam2unet_hf.training.streaming import RowGroupSampler, open_parquet


def to_batch(rows: Sequence[dict[str, Any]], processor: Sam2UNetImageProcessor) -> tuple[torch.Tensor, list]:
    """Collate rows to `pixel_values` and the sizes of the images."""
    images = [row["image"] for row in rows]
    return processor(images, return_tensors="pt")["pixel_values"], [(image.height, image.width) for image in images]


def segment(
    model: Sam2UNetForSemanticSegmentation, processor: Sam2UNetImageProcessor, loader: DataLoader, device: str
) -> tuple[dict[str, float], list[np.ndarray]]:
    """Return seconds by what they went to, and the label map of each image."""
    label_maps = []
    marks = [time.perf_counter()]
    with torch.inference_mode():
        for pixel_values, sizes in loader:
            marks.append(time.perf_counter())
            outputs = model(pixel_values.to(device, non_blocking=True))
            synchronize(device)
            marks.append(time.perf_counter())
            maps = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
            label_maps += [label_map.to("cpu", torch.uint8).numpy() for label_map in maps]
            marks.append(time.perf_counter())
    waiting, running, mapping = np.diff(marks).reshape(-1, 3).sum(axis=0).tolist()
    return {"waiting for images": waiting, "model": running, "label maps": mapping}, label_maps


def size_option(args: argparse.Namespace) -> dict[str, Any]:
    """Return the image size for the processor, unless its own is to be kept."""
    return {} if args.image_size is None else {"size": {"height": args.image_size, "width": args.image_size}}


def time_reading(args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Return how many images per second are read for training, from the cache of `datasets` and streamed."""
    processor = Sam2UNetImageProcessor(**size_option(args))
    transform = SegmentationTransform(processor, augment=augmentation("flips"))
    parquet = open_parquet(args.dataset)[args.split]
    streamed = single_images(parquet).with_transform(transform)
    sampler = RowGroupSampler(parquet, args.batch_size, num_workers=args.num_workers, shuffle=True)
    cached = datasets.load_dataset(args.dataset, split=args.split)  # nosec B615 # rows, no code
    cached = single_images(cached).with_transform(transform)
    options = {"batch_size": args.batch_size, "num_workers": args.num_workers, "collate_fn": collate}
    loaders = {
        "datasets": DataLoader(cached, shuffle=True, **options),
        "streamed": DataLoader(streamed, sampler=sampler, **options),
    }
    num_batches = -(-min(args.max_images or len(streamed), len(streamed)) // args.batch_size)
    count = min(num_batches * args.batch_size, len(streamed))

    def read(loader: DataLoader) -> None:
        for _ in itertools.islice(loader, num_batches):
            pass

    rounds = time_in_turn({name: functools.partial(read, loader) for name, loader in loaders.items()}, args.rounds)
    bytes_per_image = parquet.num_bytes / len(parquet)
    cases, table = [], []
    for name, seconds in rounds.items():
        rate = count / statistics.median(seconds)
        megabytes = rate * bytes_per_image / 1e6
        cases.append({"reader": name, "images_per_second": rate, "megabytes_per_second": megabytes})
        table.append({"reader": name, "images/s": f"{rate:.1f}", "MB/s": f"{megabytes:.2f}"})
    return {"images": count, "bytes_per_image": bytes_per_image, "cases": cases}, table


def time_segmentation(args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Return how many images per second are read and segmented in each dtype, and how well the masks agree."""
    rows = datasets.load_dataset(args.dataset, split=args.split)  # nosec B615 # rows, no code
    if args.max_images is not None:
        rows = rows.select(range(min(args.max_images, len(rows))))
    rows = single_images(rows, mask_column=None)
    if args.model is None:
        torch.manual_seed(0)
        model = Sam2UNetForSemanticSegmentation(Sam2UNetConfig.from_preset(args.preset, regions={"WT": [1, 2, 3]}))
        processor = Sam2UNetImageProcessor(regions=model.config.regions, **size_option(args))
    else:
        model = Sam2UNetForSemanticSegmentation.from_pretrained(args.model)
        processor = Sam2UNetImageProcessor.from_pretrained(args.model, **size_option(args))
    # Cast each copy from the float32 weights, so that none gets what another dtype has rounded.
    models = {dtype: copy.deepcopy(model).to(args.device, DTYPES[dtype]).eval() for dtype in args.dtypes}
    for variant in models.values():
        variant.fuse_for_inference()
    collate_fn = functools.partial(to_batch, processor=processor)
    options = {"num_workers": args.num_workers, "persistent_workers": args.num_workers > 0}
    loader = DataLoader(rows, args.batch_size, collate_fn=collate_fn, pin_memory=args.device == "cuda", **options)
    rounds: dict[str, list[dict[str, float]]] = {dtype: [] for dtype in args.dtypes}
    found: dict[str, list[np.ndarray]] = {}
    for _ in range(args.rounds + 1):
        for dtype in args.dtypes:
            seconds, found[dtype] = segment(models[dtype], processor, loader, args.device)
            rounds[dtype].append(seconds)
    cases, table = [], []
    for dtype, (first, *timed) in rounds.items():  # the first round starts the workers and warms up
        seconds = {name: statistics.median([one[name] for one in timed]) for name in first}
        rate, idle = len(rows) / sum(seconds.values()), seconds["waiting for images"] / sum(seconds.values())
        foreground = float(np.mean([(label_map > 0).mean() for label_map in found[dtype]]))
        agreement = mask_iou(found[dtype], found[args.dtypes[0]])
        case = {"dtype": dtype, "images_per_second": rate, "idle": idle, "seconds": seconds}
        cases.append({**case, "foreground": foreground, "mask_iou": agreement})
        row = {"dtype": dtype, "images/s": f"{rate:.2f}", "idle": f"{100 * idle:.1f} %"}
        row["foreground"] = f"{100 * foreground:.2f} %"
        table.append({**row, f"mask IoU with {args.dtypes[0]}": f"{agreement:.4f}"})
    return {"images": len(rows), "cases": cases}, table


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--dataset", required=True, help="folder or Hub id, with a column of images")
    parser.add_argument("--split", default="test")
    parser.add_argument("--reading", action="store_true", help="time reading for training, without a model")
    parser.add_argument("--model", help="checkpoint of SAM2-UNet; without one the weights are random")
    parser.add_argument("--preset", default="large", choices=list(PRESETS), help="without --model")
    parser.add_argument("--image_size", type=int, help="default: the checkpoint's, or else 352")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_workers", type=int, default=1, help="processes that read images")
    parser.add_argument("--max_images", type=int)
    args = parser.parse_args(argv)
    if args.reading:
        args.device = "cpu"
    found, table = (time_reading if args.reading else time_segmentation)(args)
    return report(__file__, argv, args, found, table)


if __name__ == "__main__":
    main()
