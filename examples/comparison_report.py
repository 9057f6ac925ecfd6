"""The tables and figures of a comparison."""

import argparse
import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from comparison_data import ComparisonData

from sam2unet_hf.finetuning.case_names import case_ids
from sam2unet_hf.finetuning.plots import COLOURS, draw_image, plt
from sam2unet_hf.model_card import counted


class System(NamedTuple):
    """Name of a system, and its scores on BraTS 2020 as published: doi 10.3390/app15063267, Table 3."""

    name: str
    mean_dice: float
    mean_iou: float
    mae: float


SYSTEMS = {
    "sam2unet": System("SAM2-UNet", 0.771, 0.569, 0.046),
    "unet": System("U-Net", 0.563, 0.392, 0.178),
    "unetplusplus": System("U-Net++", 0.610, 0.439, 0.167),
    "maskrcnn": System("Mask R-CNN", 0.746, 0.571, 0.094),
    "deeplabv3": System("DeepLabV3", 0.709, 0.549, 0.062),
    "resunet": System("ResUNet", 0.591, 0.419, 0.183),
}
# Scores in the report, by protocol.
SHOWN = {"plain": ("dice", "iou", "mae"), "paper": ("mean_dice", "mean_iou", "mae")}
TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
# The results of each system, one per seed, as `result.json` holds them, and what each costs.
Results = Mapping[str, Sequence[Mapping[str, Any]]]
Costs = Mapping[str, Mapping[str, float]]


def write_report(args: argparse.Namespace, data: ComparisonData, costs: Costs, command: str) -> None:
    """Write and print tables and figures of all results; `command` is named in the report."""
    folder = args.output_dir
    results = {
        system: [json.loads((folder / system / f"seed-{seed}" / "result.json").read_text()) for seed in args.seeds]
        for system in args.systems
    }
    text = report_text(args, data, results, costs, command)
    (folder / "comparison.md").write_text(text)
    write_scores(results, args.seeds, folder / "comparison.csv")
    plot_comparison(results, folder / "comparison.png")
    plot_learning_curves(results, folder / "learning_curves.png")
    maps = {system: np.load(folder / system / f"seed-{args.seeds[0]}" / "examples.npz") for system in results}
    predictions = {
        SYSTEMS[system].name: [found[str(example.row)] for example in data.examples] for system, found in maps.items()
    }
    plot_systems(data, predictions, folder / "systems.png")
    print(text)


def report_text(args: argparse.Namespace, data: ComparisonData, results: Results, costs: Costs, command: str) -> str:
    """Return the report as Markdown."""
    device = f"CPU, {torch.get_num_threads()} threads"
    if torch.cuda.is_available() and not args.use_cpu:
        device = torch.cuda.get_device_name()
    images = ", ".join(
        f"{len(rows)} {split}" + (f" of {counted(len(set(cases)), 'case')}" if cases else "")
        for split, rows in data.splits.items()
        for cases in [case_ids(split, rows)]
    )
    template = Path(__file__).with_name("comparison_template.md").read_text()
    return template.format(
        args=args,
        torch=torch,
        num_systems=len(results),
        command=command,
        date=date.today().isoformat(),
        device=device,
        seeds=", ".join(map(str, args.seeds)),
        images=images,
        scores="\n".join(score_row(SYSTEMS[system], runs) for system, runs in results.items()),
        costs="\n".join(cost_row(SYSTEMS[system], costs[system]) for system in results),
    )


def score_row(system: System, runs: Sequence[Mapping[str, Any]]) -> str:
    """Format the scores of a system, and those that were published, as a row of a table."""
    keys = [(protocol, key) for protocol, shown in SHOWN.items() for key in shown]
    scores = [format_mean_std([found["scores"][protocol][key] for found in runs]) for protocol, key in keys]
    published = [f"{value:.3f}" for value in (system.mean_dice, system.mean_iou, system.mae)]
    return f"| {' | '.join([system.name, *scores, *published])} |"


def cost_row(system: System, costs: Mapping[str, float]) -> str:
    """Format what a system costs as a row of a table."""
    millions = [f"{costs[name] / 1e6:.2f} M" for name in ("parameters", "trained_parameters")]
    seconds = [f"{costs[name]:.3f}" for name in ("seconds_per_image", "seconds_per_step")]
    gigaflops, memory = f"{costs['flops'] / 1e9:.1f}", f"{costs['peak_memory_gb']:.2f} GB"
    return f"| {' | '.join([system.name, *millions, gigaflops, *seconds, str(costs['steps']), memory])} |"


def format_mean_std(values: Sequence[float]) -> str:
    """Format a mean and, of several seeds, the standard deviation."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def write_scores(results: Results, seeds: Sequence[int], path: Path) -> None:
    """Write every score of every run as CSV."""
    first = next(iter(results.values()))[0]["scores"]
    keys = [(protocol, key) for protocol in SHOWN for key in first[protocol] if key not in TIMINGS]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["system", "seed", "steps", "best_step", *(f"{protocol}_{key}" for protocol, key in keys)])
        for system, runs in results.items():
            for seed, found in zip(seeds, runs, strict=True):
                scores = [found["scores"][protocol][key] for protocol, key in keys]
                writer.writerow([system, seed, found["steps"], found["best_step"], *scores])


def plot_comparison(results: Results, path: Path) -> None:
    """Draw mean Dice by system, a dot per seed, beside what was published."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    positions = np.arange(len(results))
    scores = [[found["scores"]["paper"]["mean_dice"] for found in runs] for runs in results.values()]
    published = [SYSTEMS[system].mean_dice for system in results]
    axes.bar(positions - 0.2, [np.mean(values) for values in scores], 0.4, color=COLOURS[1], label="here")
    axes.bar(positions + 0.2, published, 0.4, color="#BBBBBB", label="published, BraTS 2020")
    for position, values in zip(positions, scores, strict=True):
        axes.plot([position - 0.2] * len(values), values, "k.", label="one seed" if position == 0 else None)
    axes.set(xticks=positions, ylabel="mDice", ylim=(0, 1), title="Test images, 256 thresholds, predictions stretched")
    axes.set_xticklabels(SYSTEMS[system].name for system in results)
    axes.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_learning_curves(results: Results, path: Path) -> None:
    """Draw training loss and validation Dice over steps, a colour per system, a line per seed."""
    figure, (losses, scores) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for axes, key in ((losses, "loss"), (scores, "eval_dice")):
        axes.grid(alpha=0.3)
        for (system, runs), colour in zip(results.items(), (*COLOURS, "#000000"), strict=False):
            for number, found in enumerate(runs):
                steps, values = zip(*((e["step"], e[key]) for e in found["curve"] if key in e), strict=True)
                axes.plot(steps, values, color=colour, label=None if number else SYSTEMS[system].name, alpha=0.9)
    losses.set(xlabel="step", ylabel="loss, each system's own", title="Training loss", yscale="log")
    scores.set(xlabel="step", ylabel="Dice at probability > 0.5", title="Validation", ylim=(0, 1))
    figure.legend(*losses.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_systems(data: ComparisonData, predictions: Mapping[str, Sequence[np.ndarray]], path: Path) -> None:
    """Draw images with the outlines of reference and prediction, one row per image, one column per system."""
    examples, regions = data.examples, data.regions
    size = (len(examples), 1 + len(predictions))
    figsize = (2.2 * size[1], 2.45 * size[0] + 0.6)
    figure, axes = plt.subplots(*size, figsize=figsize, layout="constrained", squeeze=False)
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(regions))]
    # Draw the prediction of a single region in the second colour, which no other region needs.
    predicted_colours = [COLOURS[1]] if len(regions) == 1 else colours
    kinds = {"reference": (colours, "solid"), "prediction": (predicted_colours, "dashed")}
    for number, (row, example) in enumerate(zip(axes, examples, strict=True)):
        for axis, found in zip(row, [None, *predictions.values()], strict=True):
            draw_image(axis, example.image)
            label_maps = [example.reference] if found is None else [example.reference, found[number]]
            for label_map, (kind_colours, style) in zip(label_maps, kinds.values(), strict=False):
                for label_ids, colour in zip(regions.values(), kind_colours, strict=True):
                    mask = np.isin(label_map, label_ids)
                    if mask.any() and not mask.all():
                        axis.contour(mask, levels=[0.5], colors=[colour], linestyles=style, linewidths=1.2)
        row[0].set_ylabel(example.name, fontsize=7)
    for axis, title in zip(axes[0], [f"{data.image_title}, reference", *predictions], strict=True):
        axis.set_title(title)
    handles = [
        plt.Line2D([], [], color=colour, linestyle=style, label=f"{name}, {kind}")
        for kind, (kind_colours, style) in kinds.items()
        for name, colour in zip(regions, kind_colours, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 * len(regions), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
