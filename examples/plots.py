"""Pictures that the examples write."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from PIL import Image


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 - after the choice of backend


# One colour per region, which the colour-blind can tell apart too (Okabe and Ito).
COLOURS = ("#D55E00", "#56B4E9", "#F0E442", "#009E73", "#CC79A7")


class ShownCase(NamedTuple):
    """An image with its label maps, the reference and a prediction, of shape `(height, width)`."""

    title: str
    image: Image.Image
    reference: np.ndarray
    prediction: np.ndarray


def plot_training_curve(log_history: list[dict[str, Any]], path: Path) -> None:
    """Draw losses and validation scores over epochs."""
    figure, (losses, scores) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, key, label in (
        (losses, "loss", "training"),
        (losses, "eval_loss", "validation"),
        (scores, "eval_dice", "Dice"),
        (scores, "eval_iou", "IoU"),
    ):
        points = [(entry["epoch"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=None if key == "loss" else "o")
    losses.set(xlabel="epoch", ylabel="loss (three outputs)", title="Loss", ylim=(0, None))
    scores.set(xlabel="epoch", ylabel="score", title="Validation scores", ylim=(0, 1))
    for axes, corner in ((losses, "upper right"), (scores, "lower right")):
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(loc=corner)  # improving curves leave this corner free
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_predictions(cases: Sequence[ShownCase], regions: dict[str, list[int]], path: Path) -> None:
    """Draw image, reference, prediction and their outlines, one row per case."""
    figure, axes = plt.subplots(
        len(cases), 4, figsize=(12, 3.3 * len(cases)), layout="constrained", squeeze=False, facecolor="white"
    )
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(regions))]
    # The prediction of a single region takes the second colour, to differ from the reference.
    predicted_colours = [COLOURS[1]] if len(regions) == 1 else colours
    for row, case in zip(axes, cases, strict=True):
        # 16-bit and float images lose their range in `convert`.
        keeps_range = case.image.mode.startswith(("I", "F"))
        pixels = np.asarray(case.image if keeps_range else case.image.convert("L"), dtype=float)
        for axis in row:
            axis.imshow(pixels, cmap="gray")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(case.title)
        # Large regions first, so that those inside them stay visible.
        drawn = zip(regions.values(), colours, predicted_colours, strict=True)
        for label_ids, colour, predicted_colour in sorted(drawn, key=lambda item: -len(item[0])):
            sides = (
                (row[1], case.reference, colour, "solid"),
                (row[2], case.prediction, predicted_colour, "dashed"),
            )
            for axis, label_map, side_colour, style in sides:
                mask = np.isin(label_map, label_ids)
                rgb = np.broadcast_to(matplotlib.colors.to_rgb(side_colour), (*mask.shape, 3))
                axis.imshow(np.dstack([rgb, mask * 0.5]), interpolation="nearest")
                if mask.any() and not mask.all():
                    row[3].contour(mask, levels=[0.5], colors=[side_colour], linestyles=style, linewidths=1.4)
    for axis, title in zip(axes[0], ("image", "reference", "prediction", "outlines"), strict=True):
        axis.set_title(title)
    handles = [
        plt.Line2D([], [], color=colour, linestyle=style, label=f"{name}, {kind}")
        for kind, side_colours, style in (("reference", colours, "solid"), ("prediction", predicted_colours, "dashed"))
        for name, colour in zip(regions, side_colours, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_comparison(scores: dict[str, list[float]], published: dict[str, float], path: Path) -> None:
    """Draw mean Dice by system, a dot per seed, beside what was published."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    positions = np.arange(len(scores))
    axes.bar(positions - 0.2, [np.mean(values) for values in scores.values()], 0.4, color=COLOURS[1], label="here")
    axes.bar(positions + 0.2, list(published.values()), 0.4, color="#BBBBBB", label="published, BraTS 2020")
    for position, values in zip(positions, scores.values(), strict=True):
        axes.plot([position - 0.2] * len(values), values, "k.", label="one seed" if position == 0 else None)
    axes.set(xticks=positions, ylabel="mDice", ylim=(0, 1), title="Test images, 256 thresholds, predictions stretched")
    axes.set_xticklabels(scores)
    axes.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_learning_curves(curves: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    """Draw training loss and validation Dice over steps, a colour per system, a line per seed."""
    figure, (losses, scores) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    colours = (*COLOURS, "#000000")
    for (name, runs), colour in zip(curves.items(), colours, strict=False):
        for number, curve in enumerate(runs):
            for axes, key in ((losses, "loss"), (scores, "eval_dice")):
                points = [(entry["step"], entry[key]) for entry in curve if key in entry]
                label = name if number == 0 else None
                if points:
                    axes.plot(*zip(*points, strict=True), color=colour, label=label, alpha=0.9)
    losses.set(xlabel="step", ylabel="loss, each system's own", title="Training loss", yscale="log")
    scores.set(xlabel="step", ylabel="Dice at probability > 0.5", title="Validation", ylim=(0, 1))
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
    handles, labels = losses.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_systems(
    cases: list[tuple[str, Image.Image, np.ndarray]],
    predictions: dict[str, list[np.ndarray]],
    regions: dict[str, list[int]],
    path: Path,
) -> None:
    """Draw images with the outlines of truth and prediction, one row per case, one column per system."""
    columns = 1 + len(predictions)
    size = (2.2 * columns, 2.45 * len(cases) + 0.6)
    figure, axes = plt.subplots(len(cases), columns, figsize=size, layout="constrained", squeeze=False)
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(regions))]
    predicted_colours = [COLOURS[1]] if len(regions) == 1 else colours
    for number, (row, (title, image, truth)) in enumerate(zip(axes, cases, strict=True)):
        pixels = np.asarray(image if image.mode.startswith(("I", "F")) else image.convert("L"), dtype=float)
        found = [None, *(maps[number] for maps in predictions.values())]
        for axis, label_map in zip(row, found, strict=True):
            axis.imshow(pixels, cmap="gray")
            axis.set_xticks([])
            axis.set_yticks([])
            sides = [(truth, colours, "solid"), (label_map, predicted_colours, "dashed")]
            for side, side_colours, style in sides if label_map is not None else sides[:1]:
                for label_ids, colour in zip(regions.values(), side_colours, strict=True):
                    mask = np.isin(side, label_ids)
                    if mask.any() and not mask.all():
                        axis.contour(mask, levels=[0.5], colors=[colour], linestyles=style, linewidths=1.2)
        row[0].set_ylabel(title, fontsize=7)
    for axis, title in zip(axes[0], ["truth", *predictions], strict=True):
        axis.set_title(title)
    handles = [
        plt.Line2D([], [], color=colour, linestyle=style, label=f"{name}, {kind}")
        for kind, side_colours, style in (("truth", colours, "solid"), ("prediction", predicted_colours, "dashed"))
        for name, colour in zip(regions, side_colours, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 * len(regions), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
