"""Pictures that the examples write."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image

from sam2unet_hf import overlays


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 - after the choice of backend


# One colour per region, which the colour-blind can tell apart too (Okabe and Ito).
COLOURS = tuple("#{:02X}{:02X}{:02X}".format(*colour) for colour in overlays.COLOURS)


class ShownCase(NamedTuple):
    """An image with its label maps, the reference and a prediction, of shape `(height, width)`.

    The image is as `overlays.image_to_show` returns it.
    """

    title: str
    image: np.ndarray
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
        (scores, "eval_patient_dice", "Dice of patients"),
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


def plot_folds(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the Dice of each patient by fold and region, with the mean of each fold.

    Args:
        rows: Of a `PatientTable`, with `fold`.
        path: The picture.
    """
    folds = sorted({row["fold"] for row in rows})
    regions = list(dict.fromkeys(row["region"] for row in rows))
    figure, axes = plt.subplots(figsize=(max(6, 1 + 0.5 * len(folds) * (1 + len(regions))), 4), layout="constrained")
    width = 0.8 / len(regions)
    for place, region in enumerate(regions):
        colour, means = COLOURS[place % len(COLOURS)], []
        for fold in folds:
            values = [row["volume_dice"] for row in rows if (row["fold"], row["region"]) == (fold, region)]
            means.append(float(np.mean(values)))
            left = fold - 0.4 + place * width
            across = left + width * (np.arange(len(values)) + 1) / (len(values) + 1)
            axes.scatter(across, sorted(values), color=colour, edgecolors="black", linewidths=0.4, s=24, zorder=3)
            axes.hlines(means[-1], left + 0.1 * width, left + 0.9 * width, color="black", linewidth=1.5, zorder=2)
        spread = f" ± {np.std(means, ddof=1):.3f}" if len(means) > 1 else ""
        axes.scatter(
            [], [], color=colour, edgecolors="black", linewidths=0.4, label=f"{region}: {np.mean(means):.3f}{spread}"
        )
    axes.set(xlabel="fold", ylabel="Dice of a patient", title="Patients out of fold", ylim=(-0.02, 1.02), xticks=folds)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(
        loc="outside lower center", ncols=3, frameon=False, title="mean ± SD over the means of folds (lines)"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def grey_values(image: Image.Image | torch.Tensor) -> np.ndarray:
    """Return an image as grey values of shape `(height, width)`: of several modalities, or colours, the mean."""
    if isinstance(image, torch.Tensor):
        return image[0].numpy() if len(image) == 1 else image.numpy().mean(axis=0)
    # 16-bit and float images lose their range in `convert`.
    if image.mode == "L" or image.mode.startswith(("I", "F")):
        return np.asarray(image)
    return np.asarray(image.convert("RGB")).mean(axis=-1)


def name_of_image(columns: Sequence[str]) -> str:
    """Return the title of a panel that shows an image of these columns: the modality, if it is one of several."""
    return "image" if len(columns) == 1 else f"image ({overlays.column_to_show(columns)})"


def draw_image(axis: plt.Axes, image: np.ndarray) -> None:
    """Draw an image as `overlays.image_to_show` returns it, a grey one over its range, without ticks."""
    axis.imshow(image if image.ndim == 3 else image.astype(float), cmap="gray")
    axis.set(xticks=[], yticks=[])


def plot_predictions(
    cases: Sequence[ShownCase], regions: dict[str, list[int]], path: Path, image_title: str = "image"
) -> None:
    """Draw image, reference, prediction and their outlines, one row per case."""
    figure, axes = plt.subplots(len(cases), 4, figsize=(12, 3.3 * len(cases)), layout="constrained", squeeze=False)
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(regions))]
    # The prediction of a single region takes the second colour, to differ from the reference.
    predicted_colours = [COLOURS[1]] if len(regions) == 1 else colours
    sides = {"reference": (colours, "solid"), "prediction": (predicted_colours, "dashed")}
    # Draw large regions first, so that those inside them stay visible.
    large_first = sorted(enumerate(regions.values()), key=lambda item: -len(item[1]))
    for row, case in zip(axes, cases, strict=True):
        for axis in row:
            draw_image(axis, case.image)
        row[0].set_ylabel(case.title)
        for index, label_ids in large_first:
            for axis, (kind, (side_colours, style)) in zip(row[1:3], sides.items(), strict=True):
                mask = np.isin(getattr(case, kind), label_ids)
                rgb = np.broadcast_to(matplotlib.colors.to_rgb(side_colours[index]), (*mask.shape, 3))
                axis.imshow(np.dstack([rgb, mask * 0.5]), interpolation="nearest")
                if mask.any() and not mask.all():
                    row[3].contour(mask, [0.5], colors=[side_colours[index]], linestyles=style, linewidths=1.4)
    for axis, title in zip(axes[0], (image_title, "reference", "prediction", "outlines"), strict=True):
        axis.set_title(title)
    handles = [
        plt.Line2D([], [], color=colour, linestyle=style, label=f"{name}, {kind}")
        for kind, (side_colours, style) in sides.items()
        for name, colour in zip(regions, side_colours, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
