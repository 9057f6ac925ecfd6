"""The report of an error analysis: tables, figures, and a page that holds them all."""

import base64
import csv
import html
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from error_metrics import FOUND_IN, Analysis
from error_plots import plot_boundaries, plot_calibration, plot_groups, plot_overlays, plot_scatter, save_figure
from matplotlib.figure import Figure

from sam2unet_hf.finetuning.case_names import to_file_name
from sam2unet_hf.model_card import counted
from sam2unet_hf.overlays import column_to_show


LESIONS_SHOWN = 15  # in the report; `lesions.csv` has all of them
# Name of the file and caption of a figure, the reason if it is left out, and what draws it.
Entry = tuple[str, str, str, Callable[[], Figure] | None]
LESION_COLUMNS = ("kind", "pixels", "centre_row", "centre_column")
PAGE = Template(Path(__file__).with_name("error_report.html").read_text(encoding="utf-8"))


def write_report(analysis: Analysis, folder: Path, title: str, worst: int, formats: Sequence[str]) -> None:
    """Write the CSV files, the figures, and `report.html` with all of them in it."""
    summary = summarise(analysis)
    write_csv(folder / "summary.csv", summary)
    write_csv(folder / "images.csv", analysis.records)
    about = list(analysis.records[0])[: list(analysis.records[0]).index("region") + 1]
    write_csv(folder / "lesions.csv", analysis.lesions, (*about, *LESION_COLUMNS))
    bins = [
        {"region": region, "bin": number, "pixels": pixels, "mean_probability": probability, "share_of_tumour": share}
        for region, calibration in analysis.calibration.items()
        for number, (pixels, probability, share) in enumerate(zip(*calibration.curve(), strict=True))
    ]
    write_csv(folder / "calibration.csv", bins)

    body = [f"<h1>{html.escape(title)}</h1>"]
    by_region = [{"": name} | {row["region"]: row[name] for row in summary} for name in list(summary[0])[1:]]
    body.append(html_table(by_region))
    if never_empty := [row["region"] for row in summary if not row["images_neither"] + row["images_prediction_only"]]:
        names = html.escape(", ".join(never_empty))
        body.append(
            f"<p>Every image has {names} in the truth. What the model draws in images without is not in this report, "
            "and false lesions were counted beside others alone.</p>"
        )
    for name, caption, left_out, plot in list_figures(analysis, worst):
        if left_out:
            for suffix in formats:  # of an earlier run
                (folder / f"{name}.{suffix}").unlink(missing_ok=True)
            body.append(f"<p>{html.escape(left_out)}</p>")
            continue
        text = html.escape(caption)
        save_figure(plot, folder, name, list(dict.fromkeys(["png", *formats])))
        picture = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        body.append(
            f'<figure><figcaption>{text}</figcaption><img alt="{text}" src="data:image/png;base64,{picture}"></figure>'
        )
    for kind, of, other in (("missed", "truth", "prediction"), ("false", "prediction", "truth")):
        found = sorted((lesion for lesion in analysis.lesions if lesion["kind"] == kind), key=lambda x: -x["pixels"])
        shown = [{key: lesion[key] for key in ("image", "region", *LESION_COLUMNS[1:])} for lesion in found]
        body.append(
            f"<h2>{counted(len(found), f'{kind} lesion')}</h2><p>Connected parts of the {of} that share no pixel with "
            f"the {other}, the largest {LESIONS_SHOWN} at most.</p>\n{html_table(shown[:LESIONS_SHOWN])}"
        )
    page = PAGE.substitute(title=html.escape(title), body="\n".join(body))
    (folder / "report.html").write_text(page, encoding="utf-8")


def averages(name: str, values: np.ndarray) -> dict[str, float]:
    """Return mean and median under their names, not-a-number if there are no values."""
    values = values if values.size else np.array([math.nan])
    return {f"mean_{name}": values.mean(), f"median_{name}": np.median(values)}


def summarise(analysis: Analysis) -> list[dict[str, Any]]:
    """Return a row per region: counts, Dice, calibration, boundary distances and lesions."""
    summary = []
    for region in analysis.regions:
        found_in = analysis.column(region, "found_in").tolist()
        row = {
            "region": region,
            "images": len(found_in),
            **{f"images_{where.replace(' ', '_')}": found_in.count(where) for where in reversed(FOUND_IN)},
            "mean_dice": analysis.column(region, "dice").mean(),
            **averages("dice_with_tumour", analysis.column(region, "dice", with_tumour=True)),
            "calibration_error": analysis.calibration[region].error(),
        }
        for name in (f"surface_distance_{analysis.unit}", f"hausdorff95_{analysis.unit}"):
            row |= averages(name, analysis.known(region, name))
        for name in ("lesions", "missed_lesions", "predicted_lesions", "false_lesions"):
            row[name] = int(analysis.column(region, name).sum())
        summary.append(row)
    return summary


def choose_examples(records: list[dict[str, Any]], worst: int) -> list[tuple[str, dict[str, Any]]]:
    """Return titles and records of the worst images, of different cases if possible, the median and the best."""
    # Among images of equal Dice the one with more wrong pixels is worse.
    ranked = sorted(
        (record for record in records if record["found_in"] != "neither"),
        key=lambda record: (record["dice"], -record["false_positive_pixels"] - record["false_negative_pixels"]),
    )
    if not ranked:
        return []
    _, first_of_case = np.unique([record.get("case_id", record["image"]) for record in ranked], return_index=True)
    # The first of each case, then all the others.
    order = dict.fromkeys([*sorted(first_of_case), *range(len(ranked))])
    chosen = sorted(list(order)[:worst])
    shown = [(f"worst {number}", ranked[position]) for number, position in enumerate(chosen, start=1)]
    return [*shown, ("median", ranked[len(ranked) // 2]), ("best", ranked[-1])]


def list_figures(analysis: Analysis, worst: int) -> Iterator[Entry]:
    """Yield the figures of the report."""
    regions, columns = analysis.regions, analysis.rows.image_columns
    shown = f"; shown is {column_to_show(columns)}" if len(columns) > 1 else ""
    for region in regions:
        examples = [analysis.example(*chosen) for chosen in choose_examples(analysis.of_region(region), worst)]
        caption = f"{region}: worst images (of different cases if possible), median and best{shown}"
        reason = f"Overlays of {region} are left out: there is nothing to find and nothing was found."
        draw = partial(plot_overlays, examples)
        yield f"overlays_{to_file_name(region)}", caption, "" if examples else reason, draw

    with_tumour = [region for region in regions if analysis.column(region, "truth_pixels").any()]
    if with_tumour:
        yield from list_dice_figures(analysis, with_tumour)
    else:
        yield "dice", "", "Dice against size, contrast, position and grade is left out: no mask holds a region.", None

    curves = {region: (*total.curve(), total.error()) for region, total in analysis.calibration.items()}
    seen = any(pixels.any() for pixels, *_ in curves.values())
    reason = "" if seen else "Calibration is left out: all images are black."
    yield "calibration", "Calibration over the pixels of the head", reason, partial(plot_calibration, curves)

    distances = {}
    for label, key in (("average surface distance", "surface_distance"), ("95 % Hausdorff distance", "hausdorff95")):
        distances[label] = {region: analysis.known(region, f"{key}_{analysis.unit}") for region in regions}
    known = any(values.size for groups in distances.values() for values in groups.values())
    reason = "" if known else "Boundary error is left out: no image has both truth and prediction."
    caption = "Boundary error where both truth and prediction are there"
    yield "boundaries", caption, reason, partial(plot_boundaries, distances, analysis.unit)


def list_dice_figures(analysis: Analysis, regions: Sequence[str]) -> Iterator[Entry]:
    """Yield the figures of Dice against other values, of images whose reference holds the region."""
    size = ("truth_mm2", "tumour size (mm²)") if analysis.spacing_mm else ("truth_pixels", "tumour size (pixels)")
    columns = analysis.rows.image_columns
    contrast = "contrast (standard deviations)"
    if len(columns) > 1:
        contrast = f"contrast of the mean of {', '.join(columns)} (standard deviations)"
    variables = [
        ("dice_size", *size, "Dice against tumour size"),
        ("dice_contrast", "contrast", contrast, "Dice against contrast to the surroundings"),
        ("dice_slice", "slice_index", "slice index", "Dice against slice position"),
    ]
    dice = {region: analysis.column(region, "dice", with_tumour=True) for region in regions}
    for name, key, label, caption in variables:
        points, reason = {}, f"{caption} is left out: the data set has no column `{key}`."
        if key in analysis.records[0]:
            for region in regions:
                values = analysis.column(region, key, with_tumour=True).astype(float)  # turns `None` into not-a-number
                known = ~np.isnan(values)
                points[region] = (values[known], dice[region][known])
            found = any(values.size for values, _ in points.values())
            reason = "" if found else f"{caption} is left out: no image has a value of `{key}`."
        yield name, caption, reason, partial(plot_scatter, points, label, log=name == "dice_size")

    grades = sorted({str(record["grade"]) for record in analysis.records if record.get("grade") is not None})
    groups, reason = {}, "Dice by grade is left out: the data set has no column `grade`."
    if "grade" in analysis.records[0]:
        for region in regions:
            found = analysis.column(region, "grade", with_tumour=True).astype(str)
            groups[region] = {grade: dice[region][found == grade] for grade in grades}
        reason = "" if grades else "Dice by grade is left out: the column `grade` of the data set is empty."
    yield "dice_grade", "Dice by grade", reason, partial(plot_groups, groups, "grade")


def as_text(value: Any, digits: int = 6) -> str:
    """Return a value as text for tables: numbers with this many digits, and an empty text for not-a-number."""
    if isinstance(value, (float, np.floating)):
        return "" if math.isnan(value) else f"{value:.{digits}g}"
    return "" if value is None else str(value)


def write_csv(path: Path, records: list[dict[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write records with the same keys; `columns` are the header of an empty table."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(records[0] if records else columns)
        writer.writerows([as_text(value) for value in record.values()] for record in records)


def html_table(records: list[dict[str, Any]]) -> str:
    """Return records as a table."""
    if not records:
        return "<p>None.</p>"
    titles = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in records[0])
    cells = ("".join(f"<td>{html.escape(as_text(value, 4))}</td>" for value in record.values()) for record in records)
    return f"<table><tr>{'</tr><tr>'.join([titles, *cells])}</tr></table>"
