"""What the card of a data set shows of its Parquet files: statistics of each split, and a picture of slices."""

import bisect
import io
import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sam2unet_hf.overlays import (
    choose_scale,
    choose_slices,
    column_to_show,
    draw_outlines,
    side_by_side,
    stacked,
)


# The columns that are read of all rows; images are read of few.
COLUMNS = ["case_id", "grade", "wt_pixels", "tc_pixels", "et_pixels", "head_boxes", "spacing_mm"]
TUMOUR = {"wt_pixels": "whole tumour", "tc_pixels": "tumour core", "et_pixels": "enhancing tumour"}
PATIENTS_SHOWN = 3
LEAST_PANEL_PIXELS = 160


def read_columns(paths: Sequence[Path], columns: Sequence[str] = COLUMNS) -> pa.Table:
    """Read columns of all rows of a split."""
    return pa.concat_tables(pq.read_table(path, columns=list(columns)) for path in paths)


def read_rows(paths: Sequence[Path], numbers: Iterable[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Read columns of a few rows of a split, and of its row groups no others than theirs.

    Returns:
        Number of the row -> its columns.
    """
    files = [pq.ParquetFile(path) for path in paths]
    groups = [(file, group) for file in files for group in range(file.num_row_groups)]
    starts = [0, *itertools.accumulate(file.metadata.row_group(group).num_rows for file, group in groups)]
    found = {}
    for place, wanted in itertools.groupby(
        sorted(numbers), key=lambda number: bisect.bisect_right(starts, number) - 1
    ):
        file, group = groups[place]
        table = file.read_row_group(group, columns=list(columns))
        found.update({number: table.slice(number - starts[place], 1).to_pylist()[0] for number in wanted})
    return found


def decode(image: Mapping[str, Any]) -> np.ndarray:
    """Return the pixels of an image column, of shape `(height, width)`."""
    with Image.open(io.BytesIO(image["bytes"])) as opened:
        return np.asarray(opened)


def spread(values: Iterable[float], digits: int = 0) -> str:
    """Return the median of some values, and the least and the largest in brackets if they differ."""
    values = list(values)
    if not values:
        return "none"
    median, least, largest = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return median if least == largest else f"{median} ({least} to {largest})"


def describe_split(paths: Sequence[Path], modalities: Sequence[str], has_whole_tumours: bool) -> dict[str, str]:
    """Return the statistics of a split for a column of the card's table.

    Args:
        paths: Its Parquet files.
        modalities: Columns of images.
        has_whole_tumours: Whether the slices of a session hold all of its tumour, so that its volume is known.

    Returns:
        Name of a row of the table -> its text.
    """
    rows = read_columns(paths).to_pylist()
    sessions: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        sessions.setdefault(row["case_id"], []).append(number)
    first = [rows[numbers[0]] for numbers in sessions.values()]
    facts = {}
    grades = Counter(row["grade"] or "unknown" for row in first)
    if set(grades) != {"unknown"}:
        facts["sessions by grade"] = ", ".join(f"{grade} {count}" for grade, count in sorted(grades.items()))
    shown = [row["wt_pixels"] > 0 for row in rows]
    facts["share of slices with tumour"] = f"{sum(shown) / len(shown):.0%}"
    for column, title in TUMOUR.items():
        facts[f"{title} (pixels in a slice that shows it)"] = spread(row[column] for row in rows if row[column])
        if has_whole_tumours:
            millilitres = (
                sum(rows[number][column] for number in numbers) * np.prod(rows[numbers[0]]["spacing_mm"]) / 1000
                for numbers in sessions.values()
            )
            facts[f"{title} (ml)"] = spread(millilitres, digits=1)
    boxes = [box for row in first for box in row["head_boxes"].values()]
    facts["width of the head (pixels)"] = spread(x_max - x_min for x_min, _, x_max, _ in boxes)
    facts["height of the head (pixels)"] = spread(y_max - y_min for _, y_min, _, y_max in boxes)
    for axis, title in enumerate(("left to right", "front to back", "feet to head")):
        facts[f"voxels from {title} (mm)"] = spread((row["spacing_mm"][axis] for row in first), digits=2)
    largest = [max(numbers, key=lambda number: rows[number]["wt_pixels"]) for numbers in sessions.values()]
    greys: dict[str, list[float]] = {name: [] for name in modalities}
    for row in read_rows(paths, largest, modalities).values():
        for name in modalities:
            pixels = decode(row[name])
            greys[name] += [float(pixels[pixels > 0].mean())] if pixels.any() else []
    return facts | {f"`{name}`, mean grey value of the head": spread(means) for name, means in greys.items()}


def statistics_table(splits: Mapping[str, Mapping[str, str]]) -> str:
    """Return the table of the card, a column for each split."""
    names = list(dict.fromkeys(name for facts in splits.values() for name in facts))
    lines = [f"| | {' | '.join(splits)} |", f"| --- |{' --- |' * len(splits)}"]
    lines += [f"| {name} | {' | '.join(facts.get(name, '') for facts in splits.values())} |" for name in names]
    return "\n".join(lines)


def draw_card_picture(
    paths: Sequence[Path], modalities: Sequence[str], regions_of: Mapping[str, Mapping[str, Sequence[int]]]
) -> Image.Image:
    """Draw slices of a few patients: each modality, and the outlines of the tumour on the one that pictures show.

    Args:
        paths: Parquet files of a split.
        modalities: Columns of images.
        regions_of: Case -> region -> label ids.

    Returns:
        A picture with a row for each patient. Nothing in it names them.
    """
    table = read_columns(paths, ["case_id", "wt_pixels"])
    numbers = choose_slices(table["case_id"].to_pylist(), table["wt_pixels"].to_pylist(), PATIENTS_SHOWN)
    found = read_rows(paths, numbers, ["case_id", "mask", *modalities])
    pictures = []
    for number in numbers:
        row = found[number]
        slices = {name: decode(row[name]) for name in modalities}
        mask, regions = decode(row["mask"]), regions_of[row["case_id"]]
        scale = choose_scale(mask.shape[0], mask.shape[1], LEAST_PANEL_PIXELS)
        panels = [draw_outlines(pixels, mask, {}, scale) for pixels in slices.values()]
        panels.append(draw_outlines(slices[column_to_show(modalities)], mask, regions, scale))
        pictures.append(side_by_side(panels))
    return Image.fromarray(stacked(pictures))
