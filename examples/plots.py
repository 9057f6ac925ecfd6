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
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend()
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
    for row, (title, image, truth, prediction) in zip(axes, cases, strict=True):
        # 16-bit and float images lose their range in `convert`.
        pixels = np.asarray(image if image.mode.startswith(("I", "F")) else image.convert("L"), dtype=float)
        for axis in row:
            axis.imshow(pixels, cmap="gray")
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(title)
        # Large regions first, so that those inside them stay visible.
        for (_, label_ids), colour in sorted(
            zip(regions.items(), colours, strict=True), key=lambda item: -len(item[0][1])
        ):
            rgb = matplotlib.colors.to_rgb(colour)
            for axis, label_map, style in ((row[1], truth, "solid"), (row[2], prediction, "dashed")):
                mask = np.isin(label_map, label_ids)
                axis.imshow(np.dstack([np.broadcast_to(rgb, (*mask.shape, 3)), mask * 0.5]), interpolation="nearest")
                if mask.any() and not mask.all():
                    row[3].contour(mask, levels=[0.5], colors=[colour], linestyles=style, linewidths=1.2)
    for axis, title in zip(
        axes[0], ("image", "truth", "prediction", "truth (solid), prediction (dashed)"), strict=True
    ):
        axis.set_title(title)
    handles = [plt.Line2D([], [], color=colour, label=name) for name, colour in zip(regions, colours, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
