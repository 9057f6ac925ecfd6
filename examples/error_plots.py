"""Figures that `error_analysis.py` writes, at the size they have in print."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import patheffects
from matplotlib.figure import Figure
from plots import COLOURS, plt

from sam2unet_hf.scans_sam2unet import PLANES, pixel_size_mm, take_slice


DPI = 200
WIDTH = 7.0  # inches: a text block of two columns
STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 8, "figure.facecolor": "white"}
# What only the truth has is missed, what only the prediction has is false, so these share a colour.
TRUTH, PREDICTION, BOTH = COLOURS[2], COLOURS[0], COLOURS[1]
TRUTH_LINE = {"colors": TRUTH, "linestyles": "solid", "linewidths": 1.2}
PREDICTION_LINE = {"colors": PREDICTION, "linestyles": [(0, (2.5, 1.2))], "linewidths": 1.2}
# Light lines show on white matter and on bright tumours alike.
SHADOW = [patheffects.withStroke(linewidth=2.0, foreground="#00000080")]
OUTLINES = [("expert", TRUTH, "-"), ("model", PREDICTION, "--")]


@dataclass
class Example:
    """One image of the overlays: title, grey values, and the masks of truth and prediction, all of one size."""

    title: str
    grey: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray


@dataclass
class CaseView:
    """One patient for the figures of a case, all volumes of shape `(left, posterior, superior)`.

    Attributes:
        name: The case.
        grey: 8-bit volume of each contrast that there is.
        shown: The contrast behind masks and outlines.
        spacing_mm: Voxel size along the three axes.
        truth: Mask of each region, or nothing if the case has no expert's mask.
        prediction: Mask of each region.
        probabilities: Of each region, in [0, 1].
    """

    name: str
    grey: dict[str, np.ndarray]
    shown: str
    spacing_mm: tuple[float, ...]
    truth: dict[str, np.ndarray]
    prediction: dict[str, np.ndarray]
    probabilities: dict[str, np.ndarray]

    def marked(self, region: str) -> np.ndarray:
        """Return the voxels of a region that truth or prediction name."""
        return self.truth[region] | self.prediction[region] if self.truth else self.prediction[region]

    def largest_slice(self, region: str, plane: str = "axial") -> int:
        """Return the slice with most of a region in the truth, else in the prediction, else that in the middle."""
        others = tuple(axis for axis in range(3) if axis != PLANES[plane])
        for masks in (self.truth, self.prediction):
            pixels = np.count_nonzero(masks[region], axis=others) if masks else np.zeros(1)
            if pixels.any():
                return int(pixels.argmax())
        return self.grey[self.shown].shape[PLANES[plane]] // 2

    def slices_of_tumour(self, region: str, count: int) -> list[int]:
        """Return up to `count` axial slices through a region of the truth, else of the prediction."""
        masks = self.truth if self.truth and self.truth[region].any() else self.prediction
        found = np.flatnonzero(masks[region].any(axis=(0, 1)))
        # The middles of parts of equal length: at its very ends there is little of it to see.
        middles = (np.arange(count) + 0.5) / count * len(found)
        return np.unique(found[middles.astype(int)]).tolist()

    def slices_of_all(self, region: str, count: int) -> list[int]:
        """Return up to `count` axial slices, evenly spread over a region in truth and prediction."""
        found = np.flatnonzero(self.marked(region).any(axis=(0, 1)))
        return found[evenly_spread(len(found), count)].tolist()

    def pixel_mm(self, plane: str) -> tuple[float, float]:
        """Return height and width of a pixel."""
        return pixel_size_mm(self.spacing_mm, plane)

    def crop(self, plane: str) -> tuple[slice, slice]:
        """Return the rows and columns of a plane that the head takes, with a margin."""
        head = (self.grey[self.shown] != 0).any(axis=PLANES[plane], keepdims=True)
        return box(take_slice(head, plane, 0))


def evenly_spread(length: int, count: int) -> np.ndarray:
    """Return up to `count` indices of a list, evenly spread from its first to its last."""
    if count == 1 and length:
        return np.array([length // 2])
    return np.unique(np.linspace(0, length - 1, count).round().astype(int)) if length else np.zeros(0, int)


def box(mask: np.ndarray, margin: int = 4) -> tuple[slice, slice]:
    """Return the rows and columns that a mask takes, with a margin; all of them if it is empty."""
    if not mask.any():
        return slice(None), slice(None)
    ends = [np.flatnonzero(mask.any(axis=axis))[[0, -1]] for axis in (1, 0)]
    rows, columns = (slice(max(first - margin, 0), last + margin + 1) for first, last in ends)
    return rows, columns


def plain(text: str) -> str:
    """Return text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def shorten(text: str, length: int = 26) -> str:
    """Cut a long name in its middle."""
    return text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[-(length // 2) :]}"


def save_figure(figure: Figure, folder: Path, name: str, formats: Sequence[str]) -> None:
    """Write a figure in each format, and forget it."""
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


def draw_outlines(axis: plt.Axes, truth: np.ndarray | None, prediction: np.ndarray | None) -> None:
    """Draw the outlines of masks; one that is empty or fills the image has none."""
    for mask, line in ((truth, TRUTH_LINE), (prediction, PREDICTION_LINE)):
        if mask is not None and mask.any() and not mask.all():
            axis.contour(mask, levels=[0.5], **line).set_path_effects(SHADOW)


def draw_errors(axis: plt.Axes, truth: np.ndarray, prediction: np.ndarray) -> None:
    """Lay true positives, false positives and false negatives over an image."""
    for mask, colour in ((truth & prediction, BOTH), (prediction & ~truth, PREDICTION), (truth & ~prediction, TRUTH)):
        draw_mask(axis, mask, colour, 0.75)


def draw_scale(axis: plt.Axes, pixel_mm: tuple[float, float], width: int) -> None:
    """Draw a scale bar of about a third of the width into the lower left corner."""
    length = max((mm for mm in (1, 2, 5, 10, 20, 50, 100) if mm <= width * pixel_mm[1] / 2.5), default=1)
    end = 0.04 + length / pixel_mm[1] / width
    axis.plot([0.04, end], [0.05, 0.05], color="white", linewidth=2, transform=axis.transAxes, solid_capstyle="butt")
    where = {"transform": axis.transAxes, "color": "white", "fontsize": 7}
    axis.text((0.04 + end) / 2, 0.07, f"{length} mm", ha="center", va="bottom", **where)


def outline_handles(has_truth: bool = True) -> list[plt.Line2D]:
    """Return the legend of outlines."""
    shown = OUTLINES if has_truth else OUTLINES[1:]
    return [plt.Line2D([], [], color=colour, linestyle=style, label=label) for label, colour, style in shown]


def error_handles() -> list[plt.Rectangle]:
    """Return the legend of error maps."""
    kinds = (("true positive", BOTH), ("false positive", PREDICTION), ("false negative", TRUTH))
    return [plt.Rectangle((0, 0), 1, 1, color=colour, label=label) for label, colour in kinds]


def add_legend(figure: Figure, handles: list) -> None:
    """Put a legend below a figure of images; on grey, or yellow and light blue do not show on paper."""
    legend = figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), facecolor="#555555", labelcolor="white"
    )
    legend.get_frame().set_linewidth(0)


@plt.rc_context(STYLE)
def plot_overlays(examples: list[Example], columns: int = 4) -> Figure:
    """Draw each image with the outlines of truth and prediction, and its errors below."""
    columns = min(columns, len(examples))
    blocks = math.ceil(len(examples) / columns)
    crops = [box((example.grey != 0) | example.truth | example.prediction) for example in examples]
    shapes = [example.grey[crop].shape for example, crop in zip(examples, crops, strict=True)]
    panel = WIDTH / 4 * min(max(height / width for height, width in shapes), 2)
    size = (WIDTH * max(columns, 2) / 4, blocks * (2 * panel + 0.35) + 0.4)
    figure, grid = plt.subplots(2 * blocks, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for number, (example, crop) in enumerate(zip(examples, crops, strict=True)):
        row, column = 2 * (number // columns), number % columns
        grey, truth, prediction = (array[crop] for array in (example.grey, example.truth, example.prediction))
        for axis in grid[row : row + 2, column]:
            draw_grey(axis, grey)
        draw_outlines(grid[row, column], truth, prediction)
        draw_errors(grid[row + 1, column], truth, prediction)
        grid[row, column].set_title(plain(example.title))
    add_legend(figure, outline_handles() + error_handles())
    return figure


def region_panels(regions: Sequence[str], height: float = 2.6) -> tuple[Figure, dict[str, plt.Axes]]:
    """Return a panel for each region, side by side, with Dice on the shared vertical axis."""
    width = min(WIDTH, 3.4 * len(regions))
    figure, axes = plt.subplots(
        1, len(regions), figsize=(width, height), layout="constrained", squeeze=False, sharey=True
    )
    panels = dict(zip(regions, axes[0], strict=True))
    for region, axis in panels.items():
        axis.set(title=plain(region) if len(regions) > 1 else None, ylim=(-0.03, 1.03))
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
    axis.set_xticks(range(len(groups)), [plain(f"{name}\nn = {len(values)}") for name, values in groups.items()])
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
    """Draw surface distances by region, a panel per measure."""
    figure, axes = plt.subplots(1, len(distances), figsize=(5.2, 2.6), layout="constrained", squeeze=False)
    for axis, (measure, groups) in zip(axes[0], distances.items(), strict=True):
        draw_strips(axis, groups)
        axis.set(ylabel=f"{measure} ({unit})")
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
        label = plain(f"{region}, ECE {error:.4f}")
        axis.plot(probability[filled], share[filled], marker=marker, markersize=4, color=colour, label=label)
        counts.stairs(pixels, np.linspace(0, 1, len(pixels) + 1), color=colour)
    axis.set(ylabel="share of tumour", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    counts.set(xlabel="predicted probability", ylabel="pixels", yscale="log", ylim=(0.5, None))
    for panel in (axis, counts):
        panel.grid(alpha=0.3)
    return figure


def case_images(view: CaseView, plane: str, index: int) -> tuple[dict[str, np.ndarray], tuple[slice, slice]]:
    """Return a slice of each contrast, cut to the head, and the cut."""
    crop = view.crop(plane)
    return {name: take_slice(grey, plane, index)[crop] for name, grey in view.grey.items()}, crop


def image_grid(
    view: CaseView, rows: int, columns: int, width: float = WIDTH, beside: float = 0.0, below: float = 0.35
) -> tuple[Figure, np.ndarray]:
    """Return axes for axial slices, in a figure as high as they are; `beside` and `below` are inches for the rest."""
    height, length = take_slice(view.grey[view.shown], "axial", 0)[view.crop("axial")].shape
    pixel_mm = view.pixel_mm("axial")
    gap = 2 * plt.rcParams["figure.constrained_layout.w_pad"]
    panel = ((width - beside) / columns - gap) * (height * pixel_mm[0]) / (length * pixel_mm[1])
    size = (width, rows * (panel + gap) + 0.2 + below)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


@plt.rc_context(STYLE)
def plot_contrasts(view: CaseView) -> Figure:
    """Draw the contrasts of a case side by side, with the expert's outlines."""
    index = view.largest_slice(next(iter(view.prediction)))
    images, crop = case_images(view, "axial", index)
    figure, axes = image_grid(view, 1, len(images))
    names = {"t1": "T1", "t1ce": "T1 with contrast agent", "t2": "T2", "flair": "FLAIR"}
    colours = dict(zip(view.truth, (TRUTH, PREDICTION, BOTH, *COLOURS[3:]), strict=False))
    for axis, (name, image) in zip(axes[0], images.items(), strict=True):
        draw_grey(axis, image, view.pixel_mm("axial"))
        for region, colour in colours.items():
            mask = take_slice(view.truth[region], "axial", index)[crop]
            if mask.any():
                axis.contour(mask, levels=[0.5], colors=colour, linewidths=1.2).set_path_effects(SHADOW)
        axis.set_title(names[name])
    draw_scale(axes[0, 0], view.pixel_mm("axial"), image.shape[1])
    if colours:
        lines = colours.items()
        add_legend(
            figure, [plt.Line2D([], [], color=colour, label=plain(f"{name}, expert")) for name, colour in lines]
        )
    return figure


@plt.rc_context(STYLE)
def plot_case_errors(view: CaseView, region: str, count: int = 5) -> Figure:
    """Draw image, truth, prediction and errors, a column per axial slice through the region."""
    indices = view.slices_of_tumour(region, count)
    figure, axes = image_grid(view, 4, len(indices), WIDTH * max(len(indices), 2) / count, beside=0.2)
    for column, index in zip(axes.T, indices, strict=True):
        images, crop = case_images(view, "axial", index)
        truth, prediction = (take_slice(side[region], "axial", index)[crop] for side in (view.truth, view.prediction))
        for axis in column:
            draw_grey(axis, images[view.shown], view.pixel_mm("axial"))
        draw_mask(column[1], truth, TRUTH)
        draw_mask(column[2], prediction, PREDICTION)
        draw_errors(column[3], truth, prediction)
        column[0].set_title(f"slice {index}")
    for axis, label in zip(axes[:, 0], (view.shown.upper(), "expert", "model", "errors"), strict=True):
        axis.set_ylabel(label)
    draw_scale(axes[0, 0], view.pixel_mm("axial"), images[view.shown].shape[1])
    add_legend(figure, error_handles())
    return figure


@plt.rc_context(STYLE)
def plot_probabilities(view: CaseView) -> Figure:
    """Draw image, truth and probabilities of the largest axial slice, a row per region."""
    columns = 3 if view.truth else 2
    figure, axes = image_grid(view, len(view.prediction), columns, WIDTH * 0.8 * columns / 3, beside=0.9, below=0)
    for row, region in zip(axes, view.prediction, strict=True):
        index = view.largest_slice(region)
        images, crop = case_images(view, "axial", index)
        for axis in row[:-1]:
            draw_grey(axis, images[view.shown], view.pixel_mm("axial"))
        if view.truth:
            draw_mask(row[1], take_slice(view.truth[region], "axial", index)[crop], TRUTH)
        probability = take_slice(view.probabilities[region], "axial", index)[crop]
        height, width = view.pixel_mm("axial")
        drawn = row[-1].imshow(probability, cmap="cividis", vmin=0, vmax=1, aspect=height / width)
        row[-1].set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{plain(region)}, slice {index}")
    titles = (view.shown.upper(), "expert", "model") if view.truth else (view.shown.upper(), "model")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    draw_scale(axes[0, 0], view.pixel_mm("axial"), images[view.shown].shape[1])
    figure.colorbar(drawn, ax=axes[:, -1], label="probability of tumour", shrink=0.9)
    return figure


@plt.rc_context(STYLE)
def plot_montage(view: CaseView, region: str, columns: int = 5, count: int = 20) -> Figure:
    """Draw axial slices from the lowest to the highest with the region, with the outlines of truth and prediction."""
    indices = view.slices_of_all(region, count)
    columns = min(columns, len(indices))
    rows = math.ceil(len(indices) / columns)
    figure, axes = image_grid(view, rows, columns, WIDTH * max(columns, 2) / 5, below=0.2)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, index in zip(axes.flat, indices, strict=False):
        images, crop = case_images(view, "axial", index)
        draw_grey(axis, images[view.shown], view.pixel_mm("axial"))
        sides = [
            take_slice(side[region], "axial", index)[crop] if side else None for side in (view.truth, view.prediction)
        ]
        draw_outlines(axis, *sides)
        axis.text(0.03, 0.97, str(index), color="white", fontsize=7, ha="left", va="top", transform=axis.transAxes)
    draw_scale(axes[0, 0], view.pixel_mm("axial"), images[view.shown].shape[1])
    add_legend(figure, outline_handles(bool(view.truth)))
    return figure


@plt.rc_context(STYLE)
def plot_planes(view: CaseView, region: str) -> Figure:
    """Draw the slice with most of the region in each plane, all at one scale."""
    shapes = {}
    for plane in ("axial", "coronal", "sagittal"):
        height, width = take_slice(view.grey[view.shown], plane, 0)[view.crop(plane)].shape
        shapes[plane] = (height * view.pixel_mm(plane)[0], width * view.pixel_mm(plane)[1])
    total = sum(width for _, width in shapes.values())
    size = (WIDTH, WIDTH / total * max(height for height, _ in shapes.values()) + 0.6)
    figure, axes = plt.subplots(
        1, 3, figsize=size, layout="constrained", width_ratios=[width for _, width in shapes.values()]
    )
    for axis, plane in zip(axes, shapes, strict=True):
        index = view.largest_slice(region, plane)
        images, crop = case_images(view, plane, index)
        pixel_mm = view.pixel_mm(plane)
        draw_grey(axis, images[view.shown], pixel_mm)
        sides = [
            take_slice(side[region], plane, index)[crop] if side else None for side in (view.truth, view.prediction)
        ]
        draw_outlines(axis, *sides)
        axis.set_title(f"{plane}, slice {index}")
        axis.set_anchor("S")
    draw_scale(
        axes[0], view.pixel_mm("axial"), take_slice(view.grey[view.shown], "axial", 0)[view.crop("axial")].shape[1]
    )
    add_legend(figure, outline_handles(bool(view.truth)))
    return figure
