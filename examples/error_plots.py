"""Figures that `error_analysis.py` writes, at the size they have in print."""

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from case_names import to_file_name
from case_view import PLANE_ORDER, CaseView, largest_slice, region_colours
from matplotlib import patheffects
from matplotlib.figure import Figure
from plots import COLOURS, plt

from sam2unet_hf.scans_sam2unet import pixel_size_mm


logger = logging.getLogger("error_analysis")

DPI = 200
WIDTH = 7.0  # inches: a text block of two columns
STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 8, "figure.facecolor": "white"}
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


class Example(NamedTuple):
    """One image of the overlays: title, grey values, and the masks of reference and prediction, all of one size."""

    title: str
    grey: np.ndarray
    reference: np.ndarray
    prediction: np.ndarray


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


def shorten(text: str, length: int = 26) -> str:
    """Cut a long name in its middle."""
    return text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[-(length // 2) :]}"


def save_figure(plot: Callable[[], Figure], folder: Path, name: str, formats: Sequence[str]) -> None:
    """Draw a figure in the common style, write it in each format, and close it."""
    with plt.rc_context(STYLE):
        figure = plot()
    for suffix in formats:
        figure.savefig(folder / f"{name}.{suffix}", dpi=DPI)
    plt.close(figure)


def draw_grey(axis: plt.Axes, grey: np.ndarray, pixel_mm: tuple[float, float] = (1, 1)) -> None:
    """Draw an image without ticks, with the aspect of its pixels."""
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
        lines = axis.contour(mask, levels=[0.5], colors=colour, linestyles=[style], linewidths=1.2)
        lines.set_path_effects(SHADOW)


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


def plot_overlays(examples: list[Example]) -> Figure:
    """Draw each image with the outlines of reference and prediction, and its errors below."""
    columns = min(4, len(examples))
    blocks = math.ceil(len(examples) / columns)
    panel = WIDTH / 4 * min(max(np.divide(*example.grey.shape) for example in examples), 2)
    size = (WIDTH * max(columns, 2) / 4, blocks * (2 * panel + 0.35) + 0.4)
    figure, grid = plt.subplots(2 * blocks, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for number, (title, grey, reference, prediction) in enumerate(examples):
        row, column = 2 * (number // columns), number % columns
        above, below = grid[row : row + 2, column]
        draw_grey(above, grey)
        draw_outlines(above, reference, prediction)
        above.set_title(escape_mathtext(title))
        draw_grey(below, grey)
        draw_errors(below, reference, prediction)
    add_legend(figure, OUTLINES | ERRORS)
    return figure


def region_panels(regions: Sequence[str]) -> tuple[Figure, Sequence[plt.Axes]]:
    """Return a panel for each region, side by side, with Dice on the shared vertical axis."""
    size = (min(WIDTH, 3.4 * len(regions)), 2.6)
    figure, ((*panels,),) = plt.subplots(
        1, len(regions), figsize=size, layout="constrained", squeeze=False, sharey=True
    )
    for region, axis in zip(regions, panels, strict=True):
        axis.set(title=escape_mathtext(region) if len(regions) > 1 else None, ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("Dice")
    return figure, panels


def plot_scatter(points: dict[str, tuple[np.ndarray, np.ndarray]], label: str, log: bool) -> Figure:
    """Draw Dice against a value, a panel per region, with the median of each eighth of the images."""
    figure, panels = region_panels(list(points))
    for axis, (values, dice) in zip(panels, points.values(), strict=True):
        axis.plot(values, dice, label="image", **POINTS)
        if len(values) >= 24:
            parts = np.array_split(np.argsort(values, kind="stable"), 8)
            middles = [(np.median(values[part]), np.median(dice[part])) for part in parts]
            axis.plot(*zip(*middles, strict=True), "o-", markersize=4, color=COLOURS[0], label="median of each eighth")
        axis.set_xlabel(label)
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
        axis.boxplot(
            values, positions=[position], widths=0.5, showfliers=False, medianprops={"color": "black"}, zorder=3
        )
        axis.plot(position + shuffle.uniform(-0.18, 0.18, len(values)), values, **POINTS)
    axis.set_xticks(
        range(len(groups)), [escape_mathtext(f"{name}\nn = {len(values)}") for name, values in groups.items()]
    )
    axis.set_xlim(-0.6, len(groups) - 0.4)


def plot_groups(groups: dict[str, dict[str, np.ndarray]], label: str) -> Figure:
    """Draw Dice by group, a panel per region."""
    figure, panels = region_panels(list(groups))
    for axis, values in zip(panels, groups.values(), strict=True):
        draw_strips(axis, values)
        axis.set_xlabel(label)
    return figure


def plot_boundaries(distances: dict[str, dict[str, np.ndarray]], unit: str) -> Figure:
    """Draw surface distances by region, a panel per metric."""
    figure, axes = plt.subplots(1, len(distances), figsize=(5.2, 2.6), layout="constrained", squeeze=False)
    for axis, (metric, groups) in zip(axes[0], distances.items(), strict=True):
        draw_strips(axis, groups)
        axis.set(ylabel=f"{metric} ({unit})")
        axis.set_ylim(0, None)
        axis.grid(alpha=0.3, axis="y")
    return figure


def plot_calibration(curves: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, float]]) -> Figure:
    """Draw pixels, mean probability, share of tumour and calibration error of each region as a reliability diagram."""
    figure, (axis, counts) = plt.subplots(
        2, 1, figsize=(3.4, 5.0), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
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
    """Return a figure and axes for axial slices; `beside` and `below` are the inches that labels and legend take."""
    height_mm, width_mm = size_mm(view, "axial")
    gap = 2 * plt.rcParams["figure.constrained_layout.w_pad"]
    panel = ((width - beside) / columns - gap) * height_mm / width_mm
    size = (width, rows * (panel + gap) + 0.2 + below)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def size_mm(view: CaseView, plane: str) -> tuple[float, float]:
    """Return height and width of the slices of a plane."""
    height, width = view.crop(view.grey[view.modality], plane, 0).shape
    pixel_mm = pixel_size_mm(view.spacing_mm, plane)
    return height * pixel_mm[0], width * pixel_mm[1]


def draw_case_slice(axis: plt.Axes, view: CaseView, plane: str, index: int, modality: str | None = None) -> None:
    """Draw a slice of a case, in the modality of its figures unless another is given."""
    grey = view.crop(view.grey[modality or view.modality], plane, index)
    draw_grey(axis, grey, pixel_size_mm(view.spacing_mm, plane))


def draw_case_outlines(axis: plt.Axes, view: CaseView, region: str, plane: str, index: int) -> None:
    """Draw a slice of a case with the outlines of reference and prediction."""
    draw_case_slice(axis, view, plane, index)
    draw_outlines(axis, *(mask if mask is None else view.crop(mask, plane, index) for mask in view.masks(region)))


def draw_scale(axis: plt.Axes, view: CaseView) -> None:
    """Draw a scale bar of about a third of the width into the lower left corner of an axial slice."""
    _, width_mm = size_mm(view, "axial")
    length = max((mm for mm in (1, 2, 5, 10, 20, 50, 100) if mm <= width_mm / 2.5), default=1)
    end = 0.04 + length / width_mm
    axis.plot([0.04, end], [0.05, 0.05], color="white", linewidth=2, transform=axis.transAxes, solid_capstyle="butt")
    where = {"transform": axis.transAxes, "color": "white", "fontsize": 7}
    axis.text((0.04 + end) / 2, 0.07, f"{length} mm", ha="center", va="bottom", **where)


def case_outlines(view: CaseView) -> dict[str, tuple[str, str]]:
    """Return the legend of the outlines that a case has."""
    return OUTLINES if view.reference is not None else {"model": OUTLINES["model"]}


def plot_modalities(view: CaseView) -> Figure:
    """Draw the modalities of a case side by side, with the outlines of the reference."""
    index = largest_slice("axial", *view.masks(next(iter(view.regions))))
    figure, axes = case_grid(view, 1, len(view.grey))
    colours = {} if view.reference is None else region_colours(view.regions)
    for axis, modality in zip(axes[0], view.grey, strict=True):
        draw_case_slice(axis, view, "axial", index, modality)
        for region, colour in colours.items():
            draw_outline(axis, view.crop(view.masks(region)[0], "axial", index), colour)
        axis.set_title(MODALITY_TITLES.get(modality, modality.upper()))
    draw_scale(axes[0, 0], view)
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
        masks = [view.crop(mask, "axial", index) for mask in (reference, prediction)]
        draw_mask(column[1], masks[0], REFERENCE)
        draw_mask(column[2], masks[1], PREDICTION)
        draw_errors(column[3], *masks)
        column[0].set_title(f"slice {index}")
    for axis, label in zip(axes[:, 0], (view.modality.upper(), "expert", "model", "errors"), strict=True):
        axis.set_ylabel(label)
    draw_scale(axes[0, 0], view)
    add_legend(figure, ERRORS)
    return figure


def plot_probabilities(view: CaseView) -> Figure:
    """Draw image, reference and probabilities of the largest axial slice, a row per region."""
    titles = (view.modality.upper(), *(() if view.reference is None else ("expert",)), "model")
    width = WIDTH * 0.8 * len(titles) / 3
    figure, axes = case_grid(view, len(view.regions), len(titles), width, beside=0.9, below=0)
    height_mm, width_mm = pixel_size_mm(view.spacing_mm, "axial")
    for row, region in zip(axes, view.regions, strict=True):
        reference, prediction = view.masks(region)
        index = largest_slice("axial", reference, prediction)
        for axis in row[:-1]:
            draw_case_slice(axis, view, "axial", index)
        if reference is not None:
            draw_mask(row[1], view.crop(reference, "axial", index), REFERENCE)
        probability = view.crop(view.probability(region), "axial", index)
        drawn = row[-1].imshow(probability, cmap="cividis", vmin=0, vmax=1, aspect=height_mm / width_mm)
        row[-1].set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{escape_mathtext(region)}, slice {index}")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    draw_scale(axes[0, 0], view)
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
        draw_case_outlines(axis, view, region, "axial", index)
        axis.text(0.03, 0.97, str(index), color="white", fontsize=7, ha="left", va="top", transform=axis.transAxes)
    draw_scale(axes[0, 0], view)
    add_legend(figure, case_outlines(view))
    return figure


def plot_planes(view: CaseView, region: str) -> Figure:
    """Draw the slice with most of the region in each plane, all at one scale."""
    heights_mm, widths_mm = zip(*(size_mm(view, plane) for plane in PLANE_ORDER), strict=True)
    size = (WIDTH, WIDTH / sum(widths_mm) * max(heights_mm) + 0.6)
    figure, axes = plt.subplots(1, 3, figsize=size, layout="constrained", width_ratios=widths_mm)
    for axis, plane in zip(axes, PLANE_ORDER, strict=True):
        index = largest_slice(plane, *view.masks(region))
        draw_case_outlines(axis, view, region, plane, index)
        axis.set_title(f"{plane}, slice {index}")
        axis.set_anchor("S")
    draw_scale(axes[0], view)
    add_legend(figure, case_outlines(view))
    return figure
