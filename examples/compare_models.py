#!/usr/bin/env python
"""Train and score SAM2-UNet and the five systems of its paper alike, and write the paper's table.

python examples/compare_models.py --quick
python examples/compare_models.py --data my_slices --minutes 12
python examples/compare_models.py --data my_slices --seeds 0 1 2 --sam2_checkpoint facebook/sam2-hiera-large

All systems get the same splits, transforms, optimiser and number of steps, or as many steps as fit into the same time.
A comparison that was stopped goes on where it was when it is started again with the same command on the same data.
"""

import argparse
import csv
import json
import logging
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from baselines import build_baseline
from case_names import case_names
from data_sources import DataArguments, find_columns, find_regions, load_data
from plots import plot_comparison, plot_learning_curves, plot_systems
from provenance import changed_values, fingerprint
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, TrainingArguments, set_seed

from sam2unet_hf import Sam2UNetConfig, Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor
from sam2unet_hf.configuration_sam2unet import PRESETS
from sam2unet_hf.training import Sam2UNetTrainer, SegmentationMetrics, SegmentationTransform, collate
from sam2unet_hf.training.augmentation import AUGMENTATIONS, augmentation
from sam2unet_hf.training.resume import last_complete_checkpoint


logger = logging.getLogger("compare_models")

# Names, and mDice, mIoU and MAE on BraTS 2020 as published: doi 10.3390/app15063267, Table 3.
SYSTEMS = {
    "sam2unet": ("SAM2-UNet", 0.771, 0.569, 0.046),
    "unet": ("U-Net", 0.563, 0.392, 0.178),
    "unetplusplus": ("U-Net++", 0.610, 0.439, 0.167),
    "maskrcnn": ("Mask R-CNN", 0.746, 0.571, 0.094),
    "deeplabv3": ("DeepLabV3", 0.709, 0.549, 0.062),
    "resunet": ("ResUNet", 0.591, 0.419, 0.183),
}
NOTE = """\
Published: Pidishetti, Amjad, Sheng, Appl. Sci. 2025, 15, 3267, Table 3, BraTS 2020. Over one set of images mIoU cannot
be below D / (2 - D) for mean Dice D. The rows of SAM2-UNet (0.771 needs 0.627) and Mask R-CNN (0.746 needs 0.595)
break this; they are quoted as published."""
# What the tables show: by protocol, the key of `SegmentationMetrics` and its title.
SHOWN = {
    "plain": {"dice": "Dice", "iou": "IoU", "mae": "MAE"},
    "paper": {"mean_dice": "mDice", "mean_iou": "mIoU", "mae": "MAE"},
}
QUICK = {"steps": 60, "image_size": 96, "batch_size": 8, "learning_rate": ["5e-4"], "evaluations": 3, "warmup": 10}
# What may be other in a comparison that goes on.
RESUMABLE_ARGUMENTS = ("systems", "seeds", "output_dir", "measure", "allow_leaks")
SAM2UNET_ONLY = ("sam2_checkpoint", "preset", "freeze_encoder")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the builder, or Hub id; default: a phantom")
    parser.add_argument("--allow_leaks", action="store_true", help="go on where splits share a patient or an image")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="each system is trained once per seed")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="training steps of each system; default: 7500, the paper's 30 x 250")
    length.add_argument("--minutes", type=float, help="training time of each system, turned into steps by timing some")
    parser.add_argument("--image_size", type=int, default=352)
    parser.add_argument("--batch_size", type=int, default=4, help="at least 2, for DeepLabV3's batch norm")
    parser.add_argument(
        "--learning_rate", nargs="+", default=["1e-4"], help="a number, and SYSTEM=NUMBER where another is to be taken"
    )
    parser.add_argument(
        "--augmentation",
        nargs="+",
        default=["flips"],
        choices=["none", *AUGMENTATIONS],
        help="how training images are changed at random",
    )
    parser.add_argument("--warmup", type=int, default=50, help="steps of linear warm-up")
    parser.add_argument("--evaluations", type=int, default=10, help="how often validation chooses the best checkpoint")
    parser.add_argument("--weights", choices=["imagenet"], help="pretrained encoders for the other systems")
    parser.add_argument("--sam2_checkpoint", help="pretrained encoder of SAM2-UNet, frozen; else it is from scratch")
    parser.add_argument("--preset", default="tiny", choices=list(PRESETS), help="size of SAM2-UNet from scratch")
    parser.add_argument("--freeze_encoder", action="store_true", help="of SAM2-UNet from scratch, too")
    parser.add_argument("--bf16", action="store_true", help="train and score under bfloat16 autocast")
    parser.add_argument("--use_cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--quick", action="store_true", help="60 steps at 96x96, for a look at it all in minutes")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--measure", choices=list(SYSTEMS), help=argparse.SUPPRESS)
    if "--quick" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    if args.steps is None and args.minutes is None:
        args.steps = 7500
    if args.minutes is not None:
        args.steps = None
    if args.batch_size < 2:
        parser.error(f"--batch_size must be at least 2, got {args.batch_size}")
    try:
        learning_rate(args, "unet")
    except (KeyError, ValueError) as err:
        parser.error(f"--learning_rate takes one number and SYSTEM=NUMBER, got {' '.join(args.learning_rate)}: {err}")
    return args


def learning_rate(args: argparse.Namespace, system: str) -> float:
    """Return the learning rate of a system."""
    own = dict(text.split("=") for text in args.learning_rate if "=" in text)
    if unknown := set(own) - set(SYSTEMS):
        raise KeyError(*unknown)
    (common,) = [text for text in args.learning_rate if "=" not in text]
    return float(own.get(system, common))


def build_model(args: argparse.Namespace, system: str, regions: dict[str, list[int]]) -> PreTrainedModel:
    """Build a system."""
    if system != "sam2unet":
        return build_baseline(system, regions, args.weights)
    if args.sam2_checkpoint is not None:
        return Sam2UNetForSemanticSegmentation.from_sam2(args.sam2_checkpoint, regions=regions)
    config = Sam2UNetConfig.from_preset(args.preset, regions=regions, freeze_encoder=args.freeze_encoder)
    return Sam2UNetForSemanticSegmentation(config)


class ComparisonData:
    """The data of all systems: splits, regions, transforms."""

    def __init__(self, args: argparse.Namespace):
        # Of a phantom, the slices that show enough tumour.
        data_args = DataArguments(
            dataset_name=args.data, slices=["tumor"], min_tumor_pixels=20, allow_leaks=args.allow_leaks
        )
        self.splits = load_data(data_args)
        if "test" not in self.splits:
            raise SystemExit("The data set has no split named test, which the systems are scored on.")
        image_column, mask_column = find_columns(self.splits, data_args)
        self.regions, self.label_mapping = find_regions(self.splits, image_column, mask_column, None)
        self.image_column, self.mask_column = image_column, mask_column
        self.augment = augmentation(*(name for name in args.augmentation if name != "none"))
        size = {"height": args.image_size, "width": args.image_size}
        self.processor = Sam2UNetImageProcessor(regions=self.regions, size=size)

    def transform(self, **kwargs: Any) -> SegmentationTransform:
        """Return the transform of rows."""
        options = {"label_mapping": self.label_mapping, **kwargs}
        return SegmentationTransform(self.processor, self.image_column, self.mask_column, **options)

    def train(self) -> datasets.Dataset:
        """Return the training images with augmentation."""
        return self.splits["train"].with_transform(self.transform(augment=self.augment))

    def evaluation(self, split: str) -> datasets.Dataset:
        """Return images with masks at their own size."""
        return self.splits[split].with_transform(self.transform(resize_masks=False))

    def examples(self, count: int = 4) -> list[int]:
        """Choose test images for the picture: of different cases, each the one with the most to find."""
        rows = self.splits["test"]
        cases = rows["case_id"] if "case_id" in rows.column_names else list(map(str, range(len(rows))))
        read = self.transform().to_label_ids
        sizes = [int((read(mask) > 0).sum()) for mask in rows[self.mask_column]]
        best = {case: max(np.flatnonzero(np.array(cases) == case), key=lambda row: sizes[row]) for case in cases}
        chosen = list(best.values())
        # Evenly over the order of the data, so that the choice is not a matter of taste.
        return [int(chosen[index]) for index in np.unique(np.linspace(0, len(chosen) - 1, count).round().astype(int))]


def training_batches(args: argparse.Namespace, slices: ComparisonData) -> Iterator[dict[str, Any]]:
    """Yield batches without end, for timing."""
    loader = DataLoader(
        slices.train(), args.batch_size, shuffle=True, drop_last=True, collate_fn=collate, num_workers=args.num_workers
    )
    while True:
        yield from loader


def time_step(args: argparse.Namespace, slices: ComparisonData, system: str, device: str, steps: int = 5) -> float:
    """Return the median seconds of a training step, loading included."""
    model = build_model(args, system, slices.regions).to(device).train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    batches = training_batches(args, slices)
    seconds = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        batch = next(batches)
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
            loss = model(batch["pixel_values"].to(device), labels=batch["labels"].to(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def measure(args: argparse.Namespace, system: str) -> dict[str, float]:
    """Return what a system costs; run in a process of its own, since memory is that of the process."""
    slices = ComparisonData(args)
    device = "cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu"
    set_seed(0)
    model = build_model(args, system, slices.regions).to(device).eval()
    image = torch.randn(1, 3, args.image_size, args.image_size, device=device)
    costs = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "trained_parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
    }
    with torch.inference_mode():
        if system == "sam2unet":
            model.set_attn_implementation("eager")  # as matrix products, which are counted on every device
        with FlopCounterMode(display=False) as counter:
            model(image)
        costs["flops"] = counter.get_total_flops()
        if system == "sam2unet":
            model.set_attn_implementation("sdpa")
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
                model(image)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        costs["seconds_per_image"] = statistics.median(seconds[2:])
    del model
    costs["seconds_per_step"] = time_step(args, slices, system, device)
    if device == "cuda":
        costs["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    else:
        costs["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return costs


def write_json(path: Path, value: Any) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


def measure_costs(args: argparse.Namespace, system: str, argv: Sequence[str]) -> dict[str, float]:
    """Return what a system costs, measured once, and the number of its training steps."""
    path = args.output_dir / system / "costs.json"
    if not path.exists():
        logger.info("%s: measuring what it costs.", SYSTEMS[system][0])
        command = [sys.executable, __file__, *argv, "--measure", system]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # nosec B603 # this script
        if done.returncode:
            raise SystemExit(f"{SYSTEMS[system][0]} could not be run, see above.")
        costs = json.loads(done.stdout.splitlines()[-1])
        costs["steps"] = args.steps or max(1, round(60 * args.minutes / costs["seconds_per_step"]))
        write_json(path, costs)
    return json.loads(path.read_text())


def run(args: argparse.Namespace, slices: ComparisonData, system: str, seed: int, steps: int) -> None:
    """Train and score a system, or go on with it; the result is in `result.json` of its folder."""
    folder = args.output_dir / system / f"seed-{seed}"
    if (folder / "result.json").exists():
        logger.info("%s, seed %d: finished before.", SYSTEMS[system][0], seed)
        return
    set_seed(seed)
    model = build_model(args, system, slices.regions)
    every = max(1, steps // args.evaluations)
    training_args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=learning_rate(args, system),
        weight_decay=1e-4,
        warmup_steps=min(args.warmup, steps // 5),
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 1e-7},
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1,
        logging_steps=max(1, steps // 100),
        load_best_model_at_end=True,
        metric_for_best_model="dice",
        batch_eval_metrics=True,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_num_workers=args.num_workers,
        dataloader_pin_memory=torch.cuda.is_available() and not args.use_cpu,
        bf16=args.bf16,
        use_cpu=args.use_cpu,
        seed=seed,
        report_to="none",
    )
    from_scratch = (args.sam2_checkpoint if system == "sam2unet" else args.weights) is None
    trainer = Sam2UNetTrainer(
        model,
        training_args,
        compute_metrics=SegmentationMetrics(list(slices.regions)),
        batch_norm_images=128 if from_scratch else 0,
        train_dataset=slices.train(),
        eval_dataset=slices.evaluation("validation"),
        processing_class=slices.processor,
    )
    logger.info("%s, seed %d: %d steps.", SYSTEMS[system][0], seed, steps)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    history = list(trainer.state.log_history)
    scores = {}
    # Drop-last is for batch norm in training; here it would drop images.
    trainer.args.dataloader_drop_last = False
    for protocol, normalize in (("plain", None), ("paper", "minmax")):
        trainer.compute_metrics = SegmentationMetrics(
            list(slices.regions), zero_division=1.0 if protocol == "plain" else 0.0, normalize=normalize
        )
        found = trainer.evaluate(slices.evaluation("test"), metric_key_prefix="test")
        scores[protocol] = {key.removeprefix("test_"): value for key, value in found.items()}
    np.savez_compressed(folder / "examples.npz", **predict(trainer, slices))
    trainer.save_model()
    keys = ("step", "loss", "eval_dice", "eval_loss")
    curve = [{key: entry[key] for key in keys if key in entry} for entry in history]
    result = {"steps": steps, "best_step": trainer.state.best_global_step, "scores": scores, "curve": curve}
    write_json(folder / "result.json", result)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


@torch.inference_mode()
def predict(trainer: Sam2UNetTrainer, slices: ComparisonData) -> dict[str, np.ndarray]:
    """Return the label maps of the example images by row."""
    model = trainer.model.eval()
    rows = slices.splits["test"]
    maps = {}
    for index in slices.examples():
        image = rows[index][slices.image_column]
        inputs = slices.processor(image, return_tensors="pt").to(model.device)
        sizes = [(image.height, image.width)]
        (found,) = slices.processor.post_process_semantic_segmentation(model(**inputs), target_sizes=sizes)
        maps[str(index)] = found.cpu().numpy().astype(np.uint8)
    return maps


def read_results(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Return the results by system, one per seed."""
    paths = {system: [args.output_dir / system / f"seed-{seed}" for seed in args.seeds] for system in args.systems}
    return {
        system: [json.loads((folder / "result.json").read_text()) for folder in folders]
        for system, folders in paths.items()
    }


def format_mean_std(values: Sequence[float]) -> str:
    """Format a mean and, of several seeds, the standard deviation."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Format rows, the first the titles, as a table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])


def write_report(
    args: argparse.Namespace, slices: ComparisonData, costs: dict[str, dict[str, float]], command: str
) -> None:
    """Write tables and figures of all results."""
    results = read_results(args)
    titles = [f"{title} ({protocol})" for protocol, shown in SHOWN.items() for title in shown.values()]
    scores = [["system", *titles, "published mDice", "mIoU", "MAE"]]
    prices = [["system", "parameters", "trained", "GFLOP", "s/image", "s/step", "steps", "peak memory"]]
    for system, runs in results.items():
        name, *published = SYSTEMS[system]
        cells = [
            format_mean_std([found["scores"][protocol][key] for found in runs])
            for protocol, shown in SHOWN.items()
            for key in shown
        ]
        scores.append([name, *cells, *(f"{value:.3f}" for value in published)])
        cost = costs[system]
        prices.append(
            [
                name,
                f"{cost['parameters'] / 1e6:.2f} M",
                f"{cost['trained_parameters'] / 1e6:.2f} M",
                f"{cost['flops'] / 1e9:.1f}",
                f"{cost['seconds_per_image']:.3f}",
                f"{cost['seconds_per_step']:.3f}",
                str(cost["steps"]),
                f"{cost['peak_memory_gb']:.2f} GB",
            ]
        )
    device = "CPU" if args.use_cpu or not torch.cuda.is_available() else torch.cuda.get_device_name()
    if device == "CPU":
        device = f"CPU, {torch.get_num_threads()} threads"
    images = ", ".join(
        f"{len(rows)} {split}" + (f" of {len(set(rows['case_id']))} cases" if "case_id" in rows.column_names else "")
        for split, rows in slices.splits.items()
    )
    text = f"""# Comparison of {len(results)} systems

`{command}`

{date.today().isoformat()}, {device}, torch {torch.__version__}. Seeds: {", ".join(map(str, args.seeds))}.
Images: {images}.

Scores of the test images, each at its mask's own size, averaged over images; (plain): Dice and IoU of the mask at
probability > 0.5, (paper): means over 256 thresholds, each prediction stretched to its full range first.

{markdown(scores)}

{NOTE}

![scores](comparison.png)

Floating-point operations and seconds are of one image of {args.image_size}x{args.image_size}, a step is one of
{args.batch_size} images with loading, memory is the peak of a process that trains.

{markdown(prices)}

![learning curves](learning_curves.png)

The same test images through all systems:

![predictions](systems.png)
"""
    (args.output_dir / "comparison.md").write_text(text)
    with open(args.output_dir / "comparison.csv", "w", newline="") as file:
        writer = csv.writer(file)
        keys = [(protocol, key) for protocol in SHOWN for key in results[args.systems[0]][0]["scores"][protocol]]
        timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
        keys = [(protocol, key) for protocol, key in keys if key not in timings]
        writer.writerow(["system", "seed", "steps", "best_step", *(f"{protocol}_{key}" for protocol, key in keys)])
        for system, runs in results.items():
            for seed, found in zip(args.seeds, runs, strict=True):
                values = [found["scores"][protocol][key] for protocol, key in keys]
                writer.writerow([system, seed, found["steps"], found["best_step"], *values])
    names = {system: SYSTEMS[system][0] for system in results}
    means = {
        names[system]: [found["scores"]["paper"]["mean_dice"] for found in runs] for system, runs in results.items()
    }
    published = {names[system]: SYSTEMS[system][1] for system in results}
    plot_comparison(means, published, args.output_dir / "comparison.png")
    curves = {names[system]: [found["curve"] for found in runs] for system, runs in results.items()}
    plot_learning_curves(curves, args.output_dir / "learning_curves.png")
    rows = slices.splits["test"]
    read = slices.transform().to_label_ids
    chosen = slices.examples()
    titles = case_names(rows)
    truths = [
        (titles[row], rows[row][slices.image_column], read(rows[row][slices.mask_column]).numpy()) for row in chosen
    ]
    first = f"seed-{args.seeds[0]}"
    maps = {system: np.load(args.output_dir / system / first / "examples.npz") for system in results}
    predictions = {names[system]: [found[str(row)] for row in chosen] for system, found in maps.items()}
    plot_systems(truths, predictions, slices.regions, args.output_dir / "systems.png")
    print(text)


def check_arguments(args: argparse.Namespace) -> dict[Path, dict[str, Any]]:
    """Return what the file of each system is to note, or refuse to go on with one of other arguments."""
    notes = {}
    for system in args.systems:
        path = args.output_dir / system / "arguments.json"
        skipped = RESUMABLE_ARGUMENTS if system == "sam2unet" else (*RESUMABLE_ARGUMENTS, *SAM2UNET_ONLY)
        now = {key: value for key, value in vars(args).items() if key not in skipped}
        now["learning_rate"] = learning_rate(args, system)
        before = json.loads(path.read_text()) if path.exists() else now
        if changed := sorted(key for key in now if before.get(key) != now[key]):
            raise SystemExit(
                f"{path.parent} holds a run with other values of {', '.join(changed)}: "
                f"{', '.join(f'{key}={before.get(key)}' for key in changed)}. Choose another --output_dir."
            )
        notes[path] = now
    return notes


def check_data(slices: ComparisonData, notes: dict[Path, dict[str, Any]]) -> None:
    """Note arguments and data of each system, or refuse to go on with one of other data."""
    now = {split: fingerprint(rows) for split, rows in slices.splits.items()}
    for path in notes:
        before = json.loads(path.read_text()).get("fingerprints") if path.exists() else now
        if before is None:
            logger.warning("%s does not tell which data its run began on. Taking it for the same as now.", path)
        elif changed := changed_values(before, now):
            raise SystemExit(
                f"{path.parent} holds a run on other data: it differs in the split {', '.join(changed)}. Choose "
                "another --output_dir."
            )
    for path, arguments in notes.items():
        write_json(path, {**arguments, "fingerprints": now})


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO, stream=sys.stderr)
    if args.measure is not None:
        print(json.dumps(measure(args, args.measure)))
        return
    transformers.utils.logging.set_verbosity_error()
    notes = check_arguments(args)
    slices = ComparisonData(args)
    check_data(slices, notes)
    # First of all, so that a missing library is known before hours of training.
    costs = {system: measure_costs(args, system, argv) for system in args.systems}
    for seed in args.seeds:
        for system in args.systems:
            run(args, slices, system, seed, int(costs[system]["steps"]))
    write_report(args, slices, costs, f"python examples/compare_models.py {' '.join(argv)}".strip())


if __name__ == "__main__":
    main()
