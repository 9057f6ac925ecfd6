"""Figures that `error_analysis.py` writes, at the size they have in print."""

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from case_view import PLANE_ORDER, CaseView, largest_slice, region_colours
from matplotlib import patheffects
from matplotlib.figure import Figure

from sam2unet_hf.finetuning.case_names import to_file_name
from sam2unet_hf.finetuning.plots import COLOURS, plt
from sam2unet_hf.scans_sam2unet import pixel_size_mm


logger = logging.getLogger("error_analysis")

DPI = 200
WIDTH = 7.0  # inches: a text block of two columns
STYLE = {
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize", "legend.fontsize"), 8),
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "boxplot.medianprops.color": "black",
}
# What only the reference has is missed, what only the prediction has is false, so these share a colour.
REFERENCE, PREDICTION, BOTH = COLOURS[2], COLOURS[0], COLOURS[1]
# A shadow makes light lines show on white matter and on bright tumours alike.
SHADOW = [patheffects.withStroke(linewidth=2.0, foreground="#00000080")]
# Colours in legends, with the style of lines; areas have none.
OUTLINES = {"expert": (REFERENCE, "-"), "model": (PREDICTION, "--")}
ERRORS = {"true positive": (BOTH, ""), "false positive": (PREDICTION, ""), "false negative": (REFERENCE, "")}
POINTS = {"marker": "o", "linestyle": "", "markersize": 3, "color": COLOURS[1], "alpha": 0.6, "markeredgewidth": 0}
LEGEND = {"loc": "outside lower center", "ncols": 2, "frameon": False}
MODALITY_TITLES = {"t1ce": "T1 with contrast agent"}  # of the others it is the name


def evenly_spread(length: int, count: int) -> np.ndarray:
    """Return up to `count` indices of a list, evenly spread from its first to its last."""
    if count == 1 and length:
        return np.array([length // 2])
    return np.unique(np.linspace(0, length - 1, count).round().astype(int)) if length else np.zeros(0, int)


def middle_slices(mask: np.ndarray, count: int) -> list[int]:
    """Return up to `count` axial slices through a mask, the middles of equal parts, since the ends show little."""
    found = np.flatnonzero(mask.any(axis=(0, 1)))
    middles = (np.arange(count) + 0.5) / count * len(found)
    return np.unique(found[middles.astype(int)]).tolist()


def escape_mathtext(text: str) -> str:
    """Escape what matplotlib would take for a formula."""
    return text.replace("$", r"\$")


def save_figure(plot: Callable[[], Figure], folder: Path, name: str, formats: Sequence[str]) -> None:
    """Draw a figure in the common style, write it in each format, and close it."""
    with plt.rc_context(STYLE):
        figure = plot()
    for suffix in formats:
        figure.savefig(folder / f"{name}.{suffix}", dpi=DPI)
    plt.close(figure)


def draw_grey(axis: plt.Axes, grey: np.ndarray, pixel_mm: tuple[float, float] = (1, 1)) -> None:
    """Draw an image, grey or in colours, without ticks, with the aspect of its pixels."""
    low, high = (0, 255) if grey.dtype == np.uint8 else (grey.min(), grey.max())
    axis.imshow(grey, cmap="gray", vmin=low, vmax=high, aspect=pixel_mm[0] / pixel_mm[1])
    axis.set(xticks=[], yticks=[])


def draw_mask(axis: plt.Axes, mask: np.ndarray, colour: str, opacity: float = 0.6) -> None:
    """Lay a mask over an image; the axis keeps the aspect of the image."""
    rgba = np.zeros((*mask.shape, 4))
    rgba[mask] = (*plt.matplotlib.colors.to_rgb(colour), opacity)
    axis.imshow(rgba, interpolation="nearest", aspect=axis.get_aspect())


def draw_outline(axis: plt.Axes, mask: np.ndarray | None, colour: str, style: str | tuple = "solid") -> None:
    """Draw the outline of a mask; one that is empty or fills the image has none."""
    if mask is not None and mask.any() and not mask.all():
        axis.contour(mask, levels=[0.5], colors=colour, linestyles=[style], linewidths=1.2).set_path_effects(SHADOW)


def draw_outlines(axis: plt.Axes, reference: np.ndarray | None, prediction: np.ndarray) -> None:
    """Draw the outlines of reference and prediction."""
    draw_outline(axis, reference, REFERENCE)
    draw_outline(axis, prediction, PREDICTION, (0, (2.5, 1.2)))


def draw_errors(axis: plt.Axes, reference: np.ndarray, prediction: np.ndarray) -> None:
    """Lay true positives, false positives and false negatives over an image."""
    draw_mask(axis, reference & prediction, BOTH, 0.75)
    draw_mask(axis, prediction & ~reference, PREDICTION, 0.75)
    draw_mask(axis, reference & ~prediction, REFERENCE, 0.75)


def add_legend(figure: Figure, entries: Mapping[str, tuple[str, str]]) -> None:
    """Put a legend below a figure of images, on grey since yellow and light blue do not show on white paper."""
    handles = [
        plt.Line2D([], [], color=colour, linestyle=style, label=escape_mathtext(label))
        if style
        else plt.Rectangle((0, 0), 1, 1, color=colour, label=label)
        for label, (colour, style) in entries.items()
    ]
    legend = figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), facecolor="#555555", labelcolor="white"
    )
    legend.get_frame().set_linewidth(0)


def plot_overlays(examples: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]) -> Figure:
    """Draw images with the outlines of reference and prediction, and errors below, given titles, images and masks."""
    columns = min(4, len(examples))
    blocks = math.ceil(len(examples) / columns)
    panel = WIDTH / 4 * min(max(np.divide(*grey.shape[:2]) for _, grey, *_ in examples), 2)
    size = (WIDTH * max(columns, 2) / 4, blocks * (2 * panel + 0.35) + 0.4)
    figure, grid = plt.subplots(2 * blocks, columns, figsize=size, squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    pairs = grid.reshape(blocks, 2, columns).swapaxes(1, 2).reshape(-1, 2)
    for (above, below), (title, grey, reference, prediction) in zip(pairs, examples, strict=False):
        draw_grey(above, grey)
        draw_outlines(above, reference, prediction)
        above.set_title(escape_mathtext(title))
        draw_grey(below, grey)
        draw_errors(below, reference, prediction)
    add_legend(figure, OUTLINES | ERRORS)
    return figure


def region_panels(regions: Sequence[str], label: str) -> tuple[Figure, Sequence[plt.Axes]]:
    """Return a panel for each region, side by side, with Dice on the shared vertical axis."""
    size = (min(WIDTH, 3.4 * len(regions)), 2.6)
    figure, axes = plt.subplots(1, len(regions), figsize=size, squeeze=False, sharey=True)
    for region, axis in zip(regions, axes[0], strict=True):
        axis.set(title=escape_mathtext(region) if len(regions) > 1 else None, xlabel=label, ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("Dice")
    return figure, axes[0]


def plot_scatter(points: dict[str, tuple[np.ndarray, np.ndarray]], label: str, log: bool) -> Figure:
    """Draw Dice against a value, a panel per region, with the median of each eighth of the images."""
    figure, panels = region_panels(list(points), label)
    for axis, (values, dice) in zip(panels, points.values(), strict=True):
        axis.plot(values, dice, label="image", **POINTS)
        if len(values) >= 24:
            parts = np.array_split(np.argsort(values, kind="stable"), 8)
            middles = [(np.median(values[part]), np.median(dice[part])) for part in parts]
            axis.plot(*zip(*middles, strict=True), "o-", markersize=4, color=COLOURS[0], label="median of each eighth")
        if log and len(values):
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
            # Within a decade there may be no other label.
            span = values.max() / values.min()
            axis.xaxis.set_minor_formatter("{x:g}" if span < 8 else plt.NullFormatter())
    axis = max(panels, key=lambda panel: len(panel.lines))
    if len(axis.lines) > 1:
        figure.legend(*axis.get_legend_handles_labels(), **LEGEND)
    return figure


def draw_strips(axis: plt.Axes, groups: dict[str, np.ndarray]) -> None:
    """Draw a box and the single values of each group."""
    shuffle = np.random.default_rng(0)
    for position, values in enumerate(groups.values()):
        axis.boxplot(values, positions=[position], widths=0.5, showfliers=False, zorder=3)
        axis.plot(position + shuffle.uniform(-0.18, 0.18, len(values)), values, **POINTS)
    labels = [escape_mathtext(f"{name}\nn = {len(values)}") for name, values in groups.items()]
    axis.set(xticks=range(len(groups)), xticklabels=labels, xlim=(-0.6, len(groups) - 0.4))


def plot_groups(groups: dict[str, dict[str, np.ndarray]], label: str) -> Figure:
    """Draw Dice by group, a panel per region."""
    figure, panels = region_panels(list(groups), label)
    for axis, values in zip(panels, groups.values(), strict=True):
        draw_strips(axis, values)
    return figure


def plot_boundaries(distances: dict[str, dict[str, np.ndarray]], unit: str) -> Figure:
    """Draw surface distances by region, a panel per metric."""
    figure, axes = plt.subplots(1, len(distances), figsize=(5.2, 2.6))
    for axis, (metric, groups) in zip(axes, distances.items(), strict=True):
        draw_strips(axis, groups)
        axis.set(ylabel=f"{metric} ({unit})", ylim=(0, None))
        axis.grid(alpha=0.3, axis="y")
    return figure


def plot_calibration(curves: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, float]]) -> Figure:
    """Draw pixels, mean probability, share of tumour and calibration error of each region as a reliability diagram."""
    figure, (axis, counts) = plt.subplots(2, 1, figsize=(3.4, 5.0), sharex=True, height_ratios=(3, 1))
    axis.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle=":", label="perfect")
    # Yellow does not show on white.
    styles = zip(("#0072B2", COLOURS[0], COLOURS[3], COLOURS[4], COLOURS[1]), "osD^v", strict=True)
    for (region, values), (colour, marker) in zip(curves.items(), itertools.cycle(styles), strict=False):
        pixels, probability, share, error = values
        filled = pixels > 0
        label = escape_mathtext(f"{region}, ECE {error:.4f}")
        axis.plot(probability[filled], share[filled], marker=marker, markersize=4, color=colour, label=label)
        counts.stairs(pixels, np.linspace(0, 1, len(pixels) + 1), color=colour)
    axis.set(ylabel="share of tumour", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    figure.legend(*axis.get_legend_handles_labels(), **LEGEND)
    counts.set(xlabel="predicted probability", ylabel="pixels", yscale="log", ylim=(0.5, None))
    for panel in (axis, counts):
        panel.grid(alpha=0.3)
    return figure


def draw_case(view: CaseView, folder: Path, formats: Sequence[str]) -> None:
    """Write the figures of a case; leave out those of a region that neither reference nor prediction holds."""
    folder.mkdir(parents=True, exist_ok=True)
    start = to_file_name(view.name)
    save_figure(partial(plot_modalities, view), folder, f"{start}_contrasts", formats)
    save_figure(partial(plot_probabilities, view), folder, f"{start}_probabilities", formats)
    plots = {"errors": plot_case_errors, "montage": plot_montage, "planes": plot_planes}
    if view.reference is None:
        del plots["errors"]
    for region in view.regions:
        if not marked(view, region).any():
            logger.warning("Case %s has no %s in reference or prediction: no figures of it.", view.name, region)
            continue
        for name, plot in plots.items():
            save_figure(partial(plot, view, region), folder, f"{start}_{name}_{to_file_name(region)}", formats)


def marked(view: CaseView, region: str) -> np.ndarray:
    """Return the voxels of a region in reference or prediction."""
    reference, prediction = view.masks(region)
    return prediction if reference is None else reference | prediction


def case_grid(
    view: CaseView, rows: int, columns: int, width: float = WIDTH, beside: float = 0.0, below: float = 0.35
) -> tuple[Figure, np.ndarray]:
    """Return a figure and axes for axial slices with a scale, and inches `beside` and `below` for labels."""
    height_mm, width_mm = size_mm(view, "axial")
    gap = 2 * plt.rcParams["figure.constrained_layout.w_pad"]
    panel = ((width - beside) / columns - gap) * height_mm / width_mm
    height = rows * (panel + gap) + 0.2 + below
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    draw_scale(axes[0, 0], view)
    return figure, axes


def size_mm(view: CaseView, plane: str) -> np.ndarray:
    """Return height and width of the slices of a plane."""
    shape = view.crop(view.grey[view.modality], plane, 0).shape
    return np.multiply(shape, pixel_size_mm(view.spacing_mm, plane))


def draw_case_slice(axis: plt.Axes, view: CaseView, plane: str, index: int, modality: str | None = None) -> None:
    """Draw a slice of a case, in the modality of its figures unless another is given."""
    grey = view.crop(view.grey[modality or view.modality], plane, index)
    draw_grey(axis, grey, pixel_size_mm(view.spacing_mm, plane))


def draw_scale(axis: plt.Axes, view: CaseView) -> None:
    """Draw a scale bar of about a third of the width into the lower left corner of an axial slice."""
    _, width_mm = size_mm(view, "axial")
    length = max((mm for mm in (1, 2, 5, 10, 20, 50, 100) if mm <= width_mm / 2.5), default=1)
    end = 0.04 + length / width_mm
    axis.plot([0.04, end], [0.05, 0.05], color="white", linewidth=2, transform=axis.transAxes, solid_capstyle="butt")
    where = {"transform": axis.transAxes, "color": "white", "fontsize": 7}
    axis.text((0.04 + end) / 2, 0.07, f"{length} mm", ha="center", va="bottom", **where)


def plot_modalities(view: CaseView) -> Figure:
    """Draw the modalities of a case side by side, with the outlines of the reference."""
    index = largest_slice("axial", *view.masks(next(iter(view.regions))))
    figure, axes = case_grid(view, 1, len(view.grey))
    colours = {} if view.reference is None else region_colours(view.regions)
    for axis, modality in zip(axes[0], view.grey, strict=True):
        draw_case_slice(axis, view, "axial", index, modality)
        for region, colour in colours.items():
            draw_outline(axis, view.masks(region, "axial", index)[0], colour)
        axis.set_title(MODALITY_TITLES.get(modality, modality.upper()))
    if colours:
        add_legend(figure, {f"{region}, expert": (colour, "-") for region, colour in colours.items()})
    return figure


def plot_case_errors(view: CaseView, region: str) -> Figure:
    """Draw image, reference, prediction and errors, a column per axial slice through the region."""
    reference, prediction = view.masks(region)
    indices = middle_slices(reference if reference.any() else prediction, 5)
    figure, axes = case_grid(view, 4, len(indices), WIDTH * max(len(indices), 2) / 5, beside=0.2)
    for column, index in zip(axes.T, indices, strict=True):
        for axis in column:
            draw_case_slice(axis, view, "axial", index)
        masks = view.masks(region, "axial", index)
        draw_mask(column[1], masks[0], REFERENCE)
        draw_mask(column[2], masks[1], PREDICTION)
        draw_errors(column[3], *masks)
        column[0].set_title(f"slice {index}")
    for axis, label in zip(axes[:, 0], (view.modality.upper(), "expert", "model", "errors"), strict=True):
        axis.set_ylabel(label)
    add_legend(figure, ERRORS)
    return figure


def plot_probabilities(view: CaseView) -> Figure:
    """Draw image, reference and probabilities of the largest axial slice, a row per region."""
    titles = (view.modality.upper(), *(() if view.reference is None else ("expert",)), "model")
    width = WIDTH * 0.8 * len(titles) / 3
    figure, axes = case_grid(view, len(view.regions), len(titles), width, beside=0.9, below=0)
    height_mm, width_mm = pixel_size_mm(view.spacing_mm, "axial")
    for row, region in zip(axes, view.regions, strict=True):
        index = largest_slice("axial", *view.masks(region))
        for axis in row[:-1]:
            draw_case_slice(axis, view, "axial", index)
        if view.reference is not None:
            draw_mask(row[1], view.masks(region, "axial", index)[0], REFERENCE)
        probability = view.crop(view.probability(region), "axial", index)
        drawn = row[-1].imshow(probability, cmap="cividis", vmin=0, vmax=1, aspect=height_mm / width_mm)
        row[-1].set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{escape_mathtext(region)}, slice {index}")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    figure.colorbar(drawn, ax=axes[:, -1], label="probability of tumour", shrink=0.9)
    return figure


def plot_montage(view: CaseView, region: str) -> Figure:
    """Draw axial slices from the lowest to the highest with the region, and the outlines of both masks."""
    found = np.flatnonzero(marked(view, region).any(axis=(0, 1)))
    indices = found[evenly_spread(len(found), 20)].tolist()
    columns = min(5, len(indices))
    rows = math.ceil(len(indices) / columns)
    figure, axes = case_grid(view, rows, columns, WIDTH * max(columns, 2) / 5, below=0.2)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, index in zip(axes.flat, indices, strict=False):
        draw_case_slice(axis, view, "axial", index)
        draw_outlines(axis, *view.masks(region, "axial", index))
        axis.text(0.03, 0.97, str(index), color="white", fontsize=7, ha="left", va="top", transform=axis.transAxes)
    add_legend(figure, OUTLINES if view.reference is not None else {"model": OUTLINES["model"]})
    return figure


def plot_planes(view: CaseView, region: str) -> Figure:
    """Draw the slice with most of the region in each plane, all at one scale."""
    heights_mm, widths_mm = zip(*(size_mm(view, plane) for plane in PLANE_ORDER), strict=True)
    size = (WIDTH, WIDTH / sum(widths_mm) * max(heights_mm) + 0.6)
    figure, axes = plt.subplots(1, 3, figsize=size, width_ratios=widths_mm)
    for axis, plane in zip(axes, PLANE_ORDER, strict=True):
        index = largest_slice(plane, *view.masks(region))
        draw_case_slice(axis, view, plane, index)
        draw_outlines(axis, *view.masks(region, plane, index))
        axis.set(title=f"{plane}, slice {index}", anchor="S")
    draw_scale(axes[0], view)
    add_legend(figure, OUTLINES if view.reference is not None else {"model": OUTLINES["model"]})
    return figure
