"""Figures that `error_analysis.py` writes, at the size they have in print."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from case_names import to_file_name
from case_view import PLANE_ORDER, CaseView, bounding_box, largest_slice, region_colours
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
REFERENCE_LINE = {"colors": REFERENCE, "linestyles": "solid", "linewidths": 1.2}
PREDICTION_LINE = {"colors": PREDICTION, "linestyles": [(0, (2.5, 1.2))], "linewidths": 1.2}
# A shadow makes light lines show on white matter and on bright tumours alike.
SHADOW = [patheffects.withStroke(linewidth=2.0, foreground="#00000080")]
# Legends: colour and style of lines, colour of areas.
OUTLINES = {"expert": (REFERENCE, "-"), "model": (PREDICTION, "--")}
ERRORS = {"true positive": BOTH, "false positive": PREDICTION, "false negative": REFERENCE}
MODALITY_TITLES = {"t1ce": "T1 with contrast agent"}  # of the others it is the name


@dataclass
class Example:
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
    """Return up to `count` axial slices through a mask, the middles of parts of equal length.

    The slices at the very ends are left out, since they show little of the mask.
    """
    found = np.flatnonzero(mask.any(axis=(0, 1)))
    middles = (np.arange(count) + 0.5) / count * len(found)
    return np.unique(found[middles.astype(int)]).tolist()


def escape_mathtext(text: str) -> str:
    """Escape what matplotlib would take for a formula."""
    return text.replace("$", r"\$")


def shorten(text: str, length: int = 26) -> str:
    """Cut a long name in its middle."""
    return text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[-(length // 2) :]}"


def save_figure(figure: Figure, folder: Path, name: str, formats: Sequence[str]) -> None:
    """Write a figure in each format, and close it."""
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


def draw_outlines(axis: plt.Axes, reference: np.ndarray | None, prediction: np.ndarray) -> None:
    """Draw the outlines of masks; one that is empty or fills the image has none."""
    for mask, line in ((reference, REFERENCE_LINE), (prediction, PREDICTION_LINE)):
        if mask is not None and mask.any() and not mask.all():
            axis.contour(mask, levels=[0.5], **line).set_path_effects(SHADOW)


def draw_errors(axis: plt.Axes, reference: np.ndarray, prediction: np.ndarray) -> None:
    """Lay true positives, false positives and false negatives over an image."""
    draw_mask(axis, reference & prediction, BOTH, 0.75)
    draw_mask(axis, prediction & ~reference, PREDICTION, 0.75)
    draw_mask(axis, reference & ~prediction, REFERENCE, 0.75)


def add_legend(figure: Figure, lines: Mapping[str, tuple[str, str]], areas: Mapping[str, str]) -> None:
    """Put a legend below a figure of images, on grey since yellow and light blue do not show on white paper."""
    handles: list[plt.Artist] = [
        plt.Line2D([], [], color=colour, linestyle=style, label=escape_mathtext(label))
        for label, (colour, style) in lines.items()
    ]
    handles += [plt.Rectangle((0, 0), 1, 1, color=colour, label=label) for label, colour in areas.items()]
    legend = figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), facecolor="#555555", labelcolor="white"
    )
    legend.get_frame().set_linewidth(0)


@plt.rc_context(STYLE)
def plot_overlays(examples: list[Example], columns: int = 4) -> Figure:
    """Draw each image with the outlines of reference and prediction, and its errors below."""
    columns = min(columns, len(examples))
    blocks = math.ceil(len(examples) / columns)
    shown = [bounding_box((example.grey != 0) | example.reference | example.prediction, 4) for example in examples]
    shapes = [example.grey[box].shape for example, box in zip(examples, shown, strict=True)]
    panel = WIDTH / 4 * min(max(height / width for height, width in shapes), 2)
    size = (WIDTH * max(columns, 2) / 4, blocks * (2 * panel + 0.35) + 0.4)
    figure, grid = plt.subplots(2 * blocks, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for number, (example, box) in enumerate(zip(examples, shown, strict=True)):
        row, column = 2 * (number // columns), number % columns
        grey, reference, prediction = (array[box] for array in (example.grey, example.reference, example.prediction))
        for axis in grid[row : row + 2, column]:
            draw_grey(axis, grey)
        draw_outlines(grid[row, column], reference, prediction)
        draw_errors(grid[row + 1, column], reference, prediction)
        grid[row, column].set_title(escape_mathtext(example.title))
    add_legend(figure, OUTLINES, ERRORS)
    return figure


def region_panels(regions: Sequence[str], height: float = 2.6) -> tuple[Figure, dict[str, plt.Axes]]:
    """Return a panel for each region, side by side, with Dice on the shared vertical axis."""
    width = min(WIDTH, 3.4 * len(regions))
    figure, axes = plt.subplots(
        1, len(regions), figsize=(width, height), layout="constrained", squeeze=False, sharey=True
    )
    panels = dict(zip(regions, axes[0], strict=True))
    for region, axis in panels.items():
        axis.set(title=escape_mathtext(region) if len(regions) > 1 else None, ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("Dice")
    return figure, panels


@plt.rc_context(STYLE)
def plot_scatter(points: dict[str, tuple[np.ndarray, np.ndarray]], label: str, log: bool = False) -> Figure:
    """Draw Dice against a value, a panel per region, with the median of each eighth of the images.

    Args:
        points: Values and Dice of each region.
        label: Name and unit of the values.
        log: Draw them on a logarithmic axis.
    """
    figure, panels = region_panels(list(points))
    for axis, (values, dice) in zip(panels.values(), points.values(), strict=True):
        axis.plot(values, dice, "o", markersize=3, color=COLOURS[1], alpha=0.6, markeredgewidth=0, label="image")
        parts = [part for part in np.array_split(np.argsort(values, kind="stable"), 8) if part.size]
        if len(values) >= 24:
            middles = [(np.median(values[part]), np.median(dice[part])) for part in parts]
            axis.plot(*zip(*middles, strict=True), "o-", markersize=4, color=COLOURS[0], label="median of each eighth")
        axis.set_xlabel(label)
        if log and len(values):
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
            # Within a decade there may be no other label.
            span = values.max() / values.min()
            axis.xaxis.set_minor_formatter("{x:g}" if span < 8 else plt.NullFormatter())
    axis = max(panels.values(), key=lambda panel: len(panel.lines))
    if len(axis.lines) > 1:
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def draw_strips(axis: plt.Axes, groups: dict[str, np.ndarray]) -> None:
    """Draw a box and the single values of each group."""
    shuffle = np.random.default_rng(0)
    for position, values in enumerate(groups.values()):
        axis.boxplot(
            values, positions=[position], widths=0.5, showfliers=False, medianprops={"color": "black"}, zorder=3
        )
        jitter = shuffle.uniform(-0.18, 0.18, len(values))
        axis.plot(position + jitter, values, "o", markersize=3, color=COLOURS[1], alpha=0.6, markeredgewidth=0)
    axis.set_xticks(
        range(len(groups)), [escape_mathtext(f"{name}\nn = {len(values)}") for name, values in groups.items()]
    )
    axis.set_xlim(-0.6, len(groups) - 0.4)


@plt.rc_context(STYLE)
def plot_groups(groups: dict[str, dict[str, np.ndarray]], label: str) -> Figure:
    """Draw Dice by group, a panel per region."""
    figure, panels = region_panels(list(groups))
    for axis, values in zip(panels.values(), groups.values(), strict=True):
        draw_strips(axis, values)
        axis.set_xlabel(label)
    return figure


@plt.rc_context(STYLE)
def plot_boundaries(distances: dict[str, dict[str, np.ndarray]], unit: str) -> Figure:
    """Draw surface distances by region, a panel per metric."""
    figure, axes = plt.subplots(1, len(distances), figsize=(5.2, 2.6), layout="constrained", squeeze=False)
    for axis, (metric, groups) in zip(axes[0], distances.items(), strict=True):
        draw_strips(axis, groups)
        axis.set(ylabel=f"{metric} ({unit})")
        axis.set_ylim(0, None)
        axis.grid(alpha=0.3, axis="y")
    return figure


@plt.rc_context(STYLE)
def plot_calibration(curves: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, float]]) -> Figure:
    """Draw reliability diagram and numbers of pixels.

    Args:
        curves: For each region pixels, mean probability and share of tumour of each bin, and the expected
            calibration error.
    """
    figure, (axis, counts) = plt.subplots(
        2, 1, figsize=(3.4, 5.0), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    axis.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle=":", label="perfect")
    for number, (region, (pixels, probability, share, error)) in enumerate(curves.items()):
        # Yellow does not show on white.
        colour = ("#0072B2", COLOURS[0], COLOURS[3], COLOURS[4], COLOURS[1])[number % 5]
        marker = "osD^v"[number % 5]
        filled = pixels > 0
        label = escape_mathtext(f"{region}, ECE {error:.4f}")
        axis.plot(probability[filled], share[filled], marker=marker, markersize=4, color=colour, label=label)
        counts.stairs(pixels, np.linspace(0, 1, len(pixels) + 1), color=colour)
    axis.set(ylabel="share of tumour", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    counts.set(xlabel="predicted probability", ylabel="pixels", yscale="log", ylim=(0.5, None))
    for panel in (axis, counts):
        panel.grid(alpha=0.3)
    return figure


def draw_case(view: CaseView, folder: Path, formats: Sequence[str]) -> None:
    """Write the figures of a case; leave out those of a region that neither reference nor prediction holds."""
    folder.mkdir(parents=True, exist_ok=True)
    start = to_file_name(view.name)
    save_figure(plot_modalities(view), folder, f"{start}_contrasts", formats)
    save_figure(plot_probabilities(view), folder, f"{start}_probabilities", formats)
    for region in view.regions:
        if not marked(view, region).any():
            logger.warning("Case %s has no %s in reference or prediction: no figures of it.", view.name, region)
            continue
        end = to_file_name(region)
        if view.reference is not None:
            save_figure(plot_case_errors(view, region), folder, f"{start}_errors_{end}", formats)
        save_figure(plot_montage(view, region), folder, f"{start}_montage_{end}", formats)
        save_figure(plot_planes(view, region), folder, f"{start}_planes_{end}", formats)


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


def draw_case_outlines(
    axis: plt.Axes, view: CaseView, masks: Sequence[np.ndarray | None], plane: str, index: int
) -> None:
    """Draw a slice of a case with the outlines of reference and prediction."""
    draw_case_slice(axis, view, plane, index)
    draw_outlines(axis, *(None if mask is None else view.crop(mask, plane, index) for mask in masks))


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


@plt.rc_context(STYLE)
def plot_modalities(view: CaseView) -> Figure:
    """Draw the modalities of a case side by side, with the outlines of the reference."""
    index = largest_slice("axial", *view.masks(next(iter(view.regions))))
    figure, axes = case_grid(view, 1, len(view.grey))
    colours = {} if view.reference is None else region_colours(view.regions)
    for axis, modality in zip(axes[0], view.grey, strict=True):
        draw_case_slice(axis, view, "axial", index, modality)
        for region, colour in colours.items():
            mask = np.isin(view.crop(view.reference, "axial", index), view.regions[region])
            if mask.any():
                axis.contour(mask, levels=[0.5], colors=colour, linewidths=1.2).set_path_effects(SHADOW)
        axis.set_title(MODALITY_TITLES.get(modality, modality.upper()))
    draw_scale(axes[0, 0], view)
    if colours:
        add_legend(figure, {f"{region}, expert": (colour, "-") for region, colour in colours.items()}, {})
    return figure


@plt.rc_context(STYLE)
def plot_case_errors(view: CaseView, region: str, count: int = 5) -> Figure:
    """Draw image, reference, prediction and errors, a column per axial slice through the region."""
    reference, prediction = view.masks(region)
    indices = middle_slices(reference if reference.any() else prediction, count)
    figure, axes = case_grid(view, 4, len(indices), WIDTH * max(len(indices), 2) / count, beside=0.2)
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
    add_legend(figure, {}, ERRORS)
    return figure


@plt.rc_context(STYLE)
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


@plt.rc_context(STYLE)
def plot_montage(view: CaseView, region: str, columns: int = 5, count: int = 20) -> Figure:
    """Draw axial slices from the lowest to the highest with the region, and the outlines of both masks."""
    masks = view.masks(region)
    found = np.flatnonzero(marked(view, region).any(axis=(0, 1)))
    indices = found[evenly_spread(len(found), count)].tolist()
    columns = min(columns, len(indices))
    rows = math.ceil(len(indices) / columns)
    figure, axes = case_grid(view, rows, columns, WIDTH * max(columns, 2) / 5, below=0.2)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, index in zip(axes.flat, indices, strict=False):
        draw_case_outlines(axis, view, masks, "axial", index)
        axis.text(0.03, 0.97, str(index), color="white", fontsize=7, ha="left", va="top", transform=axis.transAxes)
    draw_scale(axes[0, 0], view)
    add_legend(figure, case_outlines(view), {})
    return figure


@plt.rc_context(STYLE)
def plot_planes(view: CaseView, region: str) -> Figure:
    """Draw the slice with most of the region in each plane, all at one scale."""
    masks = view.masks(region)
    heights_mm, widths_mm = zip(*(size_mm(view, plane) for plane in PLANE_ORDER), strict=True)
    size = (WIDTH, WIDTH / sum(widths_mm) * max(heights_mm) + 0.6)
    figure, axes = plt.subplots(1, 3, figsize=size, layout="constrained", width_ratios=widths_mm)
    for axis, plane in zip(axes, PLANE_ORDER, strict=True):
        index = largest_slice(plane, *masks)
        draw_case_outlines(axis, view, masks, plane, index)
        axis.set_title(f"{plane}, slice {index}")
        axis.set_anchor("S")
    draw_scale(axes[0], view)
    add_legend(figure, case_outlines(view), {})
    return figure
