"""Pictures that the examples write."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 - after the choice of backend


# One colour per region, told apart also by the colour-blind (Okabe and Ito).
COLOURS = ("#D55E00", "#56B4E9", "#F0E442", "#009E73", "#CC79A7")


def plot_training_curve(log_history: list[dict[str, Any]], path: Path) -> None:
    """Draw losses and validation scores over epochs."""
    figure, (losses, scores) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(entry["epoch"], entry[key]) for entry in log_history if key in entry]
        if points:
            losses.plot(*zip(*points, strict=True), label=label, marker="o" if key == "eval_loss" else None)
    for key, label in (("eval_dice", "Dice"), ("eval_iou", "IoU")):
        points = [(entry["epoch"], entry[key]) for entry in log_history if key in entry]
        if points:
            scores.plot(*zip(*points, strict=True), label=label, marker="o")
    losses.set(xlabel="epoch", ylabel="loss (three outputs)", title="Loss", ylim=(0, None))
    scores.set(xlabel="epoch", ylabel="score", title="Validation scores", ylim=(0, 1))
    for axes, corner in ((losses, "upper right"), (scores, "lower right")):
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(loc=corner)  # where curves that get better leave room
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_predictions(
    cases: list[tuple[str, Image.Image, np.ndarray, np.ndarray]], regions: dict[str, list[int]], path: Path
) -> None:
    """Draw image, truth, prediction and their outlines, one row per case."""
    figure, axes = plt.subplots(
        len(cases), 4, figsize=(12, 3.3 * len(cases)), layout="constrained", squeeze=False, facecolor="white"
    )
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(regions))]
    # A single region has the second colour to spare for its prediction.
    predicted_colours = [COLOURS[1]] if len(regions) == 1 else colours
    for row, (title, image, truth, prediction) in zip(axes, cases, strict=True):
        # 16-bit and float images lose their range in `convert`.
        pixels = np.asarray(image if image.mode.startswith(("I", "F")) else image.convert("L"), dtype=float)
        for axis in row:
            axis.imshow(pixels, cmap="gray")
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(title)
        # Large regions first, so that those inside them stay visible.
        drawn = zip(regions.values(), colours, predicted_colours, strict=True)
        for label_ids, colour, predicted_colour in sorted(drawn, key=lambda item: -len(item[0])):
            sides = ((row[1], truth, colour, "solid"), (row[2], prediction, predicted_colour, "dashed"))
            for axis, label_map, side_colour, style in sides:
                mask = np.isin(label_map, label_ids)
                rgb = np.broadcast_to(matplotlib.colors.to_rgb(side_colour), (*mask.shape, 3))
                axis.imshow(np.dstack([rgb, mask * 0.5]), interpolation="nearest")
                if mask.any() and not mask.all():
                    row[3].contour(mask, levels=[0.5], colors=[side_colour], linestyles=style, linewidths=1.4)
    for axis, title in zip(axes[0], ("image", "truth", "prediction", "outlines"), strict=True):
        axis.set_title(title)
    handles = []
    for kind, side_colours, style in (("truth", colours, "solid"), ("prediction", predicted_colours, "dashed")):
        handles += [
            plt.Line2D([], [], color=colour, linestyle=style, label=f"{name}, {kind}")
            for name, colour in zip(regions, side_colours, strict=True)
        ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
