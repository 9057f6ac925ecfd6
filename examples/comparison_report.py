"""The tables and figures of a comparison: patients by system, and what each system costs."""

import argparse
import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from systems import COSTS, SECONDS, SYSTEMS, TABLE, System

from sam2unet_hf.finetuning.plots import COLOURS, plt
from sam2unet_hf.finetuning.provenance import RESULTS_FILE
from sam2unet_hf.patient_table import PatientTable


MIRRORS = {
    "own": "nnU-Net averages over mirror images, as it does by itself; the others see each slice once.",
    "all": "All systems average over mirror images.",
    "none": "No system averages over mirror images.",
}


def write_report(args: argparse.Namespace, systems: Sequence[System], command: str) -> None:
    """Write and print the report on those systems that have finished all folds; `command` is named in it."""
    whole = [system for system in systems if all(map(system.is_finished, range(args.folds)))]
    for system in systems:
        if system not in whole:
            left = [fold for fold in range(args.folds) if not system.is_finished(fold)]
            print(f"{system.name} ({system.recipe}) is in no table before these folds have finished: {left}.")
    if not whole:
        return
    tables = {title(system): read_table(system, args.folds) for system in whole}
    costs = {title(system): json.loads((system.folder / COSTS).read_text()) for system in whole}
    text = report_text(args, whole, tables, costs, command)
    (args.output_dir / "comparison.md").write_text(text)
    write_scores(whole, tables, args.output_dir / "comparison.csv")
    plot_patients(tables, args.output_dir / "comparison.png")
    print(text)


def title(system: System) -> str:
    """Return how tables and figures call a system."""
    return f"{system.name}, {system.recipe}"


def read_table(system: System, num_folds: int) -> PatientTable:
    """Put the tables of all folds of a system together."""
    table = PatientTable()
    for fold in range(num_folds):
        table.rows += json.loads((system.fold_folder(fold) / f"{TABLE}.json").read_text())["patients"]
    return table


def report_text(
    args: argparse.Namespace,
    systems: Sequence[System],
    tables: Mapping[str, PatientTable],
    costs: Mapping[str, Mapping[str, Any]],
    command: str,
) -> str:
    """Return the report as Markdown."""
    threads = torch.get_num_threads()
    device = f"CPU, {threads} thread{'s' * (threads > 1)}"
    if systems[0].task.device != "cpu":
        device = torch.cuda.get_device_name()
    patients = [len(fold) for fold in systems[0].task.folds]
    length = f"{args.steps} steps" if args.minutes is None else f"{args.minutes:g} minutes"
    return (
        Path(__file__)
        .with_name("comparison_template.md")
        .read_text()
        .format(
            command=command,
            date=date.today().isoformat(),
            device=device,
            torch=torch.__version__,
            length=length,
            patients=sum(patients),
            folds=f"{len(patients)} folds of {', '.join(map(str, patients))}",
            modalities=", ".join(systems[0].task.modalities),
            mirrors=MIRRORS[args.mirrors],
            scores="\n\n".join(score_table(region, tables) for region in systems[0].task.regions),
            costs="\n".join(cost_row(system, costs[title(system)], args.folds) for system in systems),
            images=image_section(systems, args.folds),
        )
    )


def score_table(region: str, tables: Mapping[str, PatientTable]) -> str:
    """Return the table of a region, a row for each system, and what each gains over the first."""
    lines = [
        f"| {region} | input | Dice | SD over folds | Dice gained over the first (SE) | median | worst "
        "| 95 % Hausdorff distance (mm), median | mean | lesion-wise Dice |",
        "| --- " * 10 + "|",
    ]
    first = next(iter(tables.values()))
    for name, table in tables.items():
        system, recipe = name.rsplit(", ", 1)
        found, over_folds = table.summary()[region], table.fold_summary()[region]["volume_dice"]
        dice, distance = found["volume_dice"], found["hausdorff95_mm"]
        values = [
            f"{over_folds['mean']:.3f}",
            "" if over_folds["std"] is None else f"{over_folds['std']:.3f}",
            "" if table is first else gain(region, table, first),
            f"{dice['median']:.3f}",
            f"{dice['worst']:.3f}",
            f"{distance['median']:.1f}",
            f"{distance['mean']:.1f}",
            f"{found['lesion_dice']['mean']:.3f}",
        ]
        lines.append(f"| {' | '.join([system, recipe, *values])} |")
    return "\n".join(lines)


def gain(region: str, table: PatientTable, first: PatientTable) -> str:
    """Format the mean difference in Dice of the same patients, and its standard error."""
    dice, base = (
        {row["patient"]: row["volume_dice"] for row in own.rows if row["region"] == region} for own in (table, first)
    )
    differences = [dice[patient] - base[patient] for patient in base]
    mean = f"{statistics.mean(differences):+.3f}"
    if len(differences) == 1:
        return mean
    return f"{mean} ({statistics.stdev(differences) / len(differences) ** 0.5:.3f})"


def cost_row(system: System, costs: Mapping[str, Any], num_folds: int) -> str:
    """Format what a system costs as a row of a table."""
    seconds = [json.loads((system.fold_folder(fold) / SECONDS).read_text()).values() for fold in range(num_folds)]
    per_patient = statistics.mean(value for own in seconds for value in own)
    values = [
        *(f"{costs[name] / 1e6:.2f} M" for name in ("parameters", "trained_parameters")),
        "x".join(map(str, costs["input"])),
        f"{costs['flops'] / 1e9:.1f}",
        str(costs["batch_size"]),
        f"{costs['seconds_per_step']:.3f}",
        str(costs["steps"]),
        f"{costs['steps'] * costs['seconds_per_step'] / 60:.1f}",
        f"{per_patient:.1f}",
        f"{costs['peak_memory_gb']:.2f} GB",
    ]
    return f"| {' | '.join([system.name, system.recipe, *values])} |"


def image_section(systems: Sequence[System], num_folds: int) -> str:
    """Return the section on scores of slices with the input of the paper, beside those that were published."""
    rows = []
    for system in systems:
        if system.recipe != "paper":
            continue
        results = [json.loads((system.fold_folder(fold) / RESULTS_FILE).read_text()) for fold in range(num_folds)]
        means = {name: statistics.mean(own[f"eval_{name}"] for own in results) for name in ("mean_dice", "mean_iou")}
        facts = SYSTEMS[system.key]
        values = [*means.values(), statistics.mean(own["eval_mae"] for own in results)]
        published = [facts.mean_dice, facts.mean_iou, facts.mae]
        rows.append(f"| {' | '.join([system.name, *(f'{value:.3f}' for value in [*values, *published])])} |")
    if not rows:
        return ""
    return (
        "\n## Slices, as in the paper\n\n"
        "Means over the slices of a fold and over 256 thresholds, then over folds; not stretched to the full range as "
        "there.\nPublished: Pidishetti, Amjad, Sheng, Appl. Sci. 2025, 15, 3267, Table 3, BraTS 2020. Over one set of "
        "images mIoU cannot\nbe below D / (2 - D) for mean Dice D. The rows of SAM2-UNet (0.771 needs 0.627) and Mask "
        "R-CNN (0.746 needs 0.595)\nbreak this; they are quoted as published.\n\n"
        "| system | mDice | mIoU | MAE | published mDice | mIoU | MAE |\n| --- | --- | --- | --- | --- | --- | --- |\n"
        + "\n".join(rows)
        + "\n"
    )


def write_scores(systems: Sequence[System], tables: Mapping[str, PatientTable], path: Path) -> None:
    """Write every score of every patient as CSV."""
    rows = [
        {"system": system.key, "input": system.recipe, **row}
        for system in systems
        for row in tables[title(system)].rows
    ]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plot_patients(tables: Mapping[str, PatientTable], path: Path) -> None:
    """Draw the Dice of patients by system, a dot per patient, a colour per region, and a line at the mean of each."""
    regions = list(dict.fromkeys(row["region"] for table in tables.values() for row in table.rows))
    figure, axes = plt.subplots(figsize=(3 + 0.75 * len(tables), 5), layout="constrained")
    width = 0.8 / len(regions)
    for number, region in enumerate(regions):
        colour = COLOURS[number % len(COLOURS)]
        for place, table in enumerate(tables.values()):
            values = sorted(row["volume_dice"] for row in table.rows if row["region"] == region)
            left = place - 0.4 + number * width
            across = left + width * (np.arange(len(values)) + 1) / (len(values) + 1)
            axes.scatter(
                across,
                values,
                s=18,
                color=colour,
                edgecolors="black",
                linewidths=0.4,
                zorder=3,
                label=region if place == 0 else None,
            )
            axes.hlines(np.mean(values), left + 0.05 * width, left + 0.95 * width, color="black", linewidth=1.5)
    axes.set(ylabel="Dice of a patient", ylim=(-0.02, 1.02), title="Patients out of fold", xticks=range(len(tables)))
    axes.set_xticklabels(list(tables), rotation=30, ha="right")
    axes.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside lower center", ncols=len(regions), frameon=False, title="lines: means over patients")
    figure.savefig(path, dpi=150)
    plt.close(figure)
