#!/usr/bin/env python
"""Show where a model errs: a report over a test split, or the figures of one patient.

python examples/error_analysis.py --model runs/phantom
python examples/error_analysis.py --model runs/slices --spacing_mm 1
python examples/error_analysis.py --model runs/slices --dataset_name others
python examples/error_analysis.py --model runs/slices --case BraTS20_Training_001 --output_dir figures

Data options that are left out are those of the run that trained the model, if `run.json` is in its folder.
"""

import argparse
import base64
import csv
import html
import logging
import math
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from data_sources import DataArguments, case_names, find_columns, find_regions, load_data
from error_plots import (
    CaseView,
    Example,
    evenly_spread,
    plot_boundaries,
    plot_calibration,
    plot_case_errors,
    plot_contrasts,
    plot_groups,
    plot_montage,
    plot_overlays,
    plot_planes,
    plot_probabilities,
    plot_scatter,
    save_figure,
    shorten,
)
from matplotlib.figure import Figure
from PIL import Image
from provenance import RECORD, read_record
from run_segmentation import PHANTOM_RECIPE
from scipy import ndimage
from tqdm import tqdm
from transformers import HfArgumentParser

from sam2unet_hf import Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor
from sam2unet_hf.cases_sam2unet import BratsCase, find_cases
from sam2unet_hf.regions_sam2unet import parse_regions
from sam2unet_hf.scans_sam2unet import MODALITIES, intensity_window
from sam2unet_hf.training import SegmentationTransform
from sam2unet_hf.volume import Sam2UNetVolumePipeline


logger = logging.getLogger("error_analysis")

RING_PIXELS = 5  # width of the surroundings that a tumour is compared with
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)
LESIONS_SHOWN = 15  # in the report; `lesions.csv` has all of them
LESION_COLUMNS = ("kind", "pixels", "centre_row", "centre_column")
BIN_COLUMNS = ("pixels", "mean_probability", "share_of_tumour")
# Taken from the run where they are not given. Those of scans mean nothing to a run on a data set.
SCAN_OPTIONS = ("slices", "plane", "min_tumor_pixels", "modalities", "skip_bad_cases")
DATA_OPTIONS = ("dataset_name", "dataset_config_name", "brats_dir", "image_column", "mask_column", "split_seed")
SPLIT_OPTIONS = ("split_seed", "slices", "plane", "min_tumor_pixels", "modalities")  # other values, another test split


@dataclass
class AnalysisArguments:
    """Which model to look at, on which images, and what to write."""

    model: str = field(
        default="runs/phantom",
        metadata={
            "help": "SAM2-UNet: Hub id or folder. Data options that are left out are those in the run.json of its "
            "folder; without one it is the phantom."
        },
    )
    split: str = field(default="test", metadata={"help": "Split to look at: train, validation or test."})
    case: str | None = field(
        default=None, metadata={"help": "Folder of one patient's scans: draw the figures of this case instead."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder to write to. Default: errors in that of the model."}
    )
    max_images: int | None = field(
        default=None, metadata={"help": "Look at this many images, evenly spread over the split."}
    )
    worst: int = field(default=6, metadata={"help": "Worst images shown per region, of different cases if possible."})
    spacing_mm: list[float] | None = field(
        default=None,
        metadata={"help": "Height and width of a pixel, or both in one number, for mm instead of pixels."},
    )
    format: list[str] = field(
        default_factory=lambda: ["png"], metadata={"help": "Of the figures.", "choices": ("png", "pdf", "svg")}
    )
    batch_size: int = field(default=8, metadata={"help": "Images at once."})
    device: str | None = field(
        default=None, metadata={"help": "Such as cpu or cuda:1. Default: a GPU if there is one."}
    )


class Calibration:
    """Pixels, probabilities and truth in bins of equal width, added image by image.

    Args:
        bins: Number of bins over [0, 1].
    """

    def __init__(self, bins: int = 15):
        self.sums = np.zeros((3, bins))

    def add(self, probabilities: np.ndarray, truth: np.ndarray) -> None:
        """Add the pixels of an image: probabilities in [0, 1] and booleans of the same shape."""
        bins = self.sums.shape[1]
        index = np.minimum((probabilities.ravel() * bins).astype(int), bins - 1)
        for total, weights in zip(self.sums, (None, probabilities.ravel(), truth.ravel()), strict=True):
            total += np.bincount(index, weights, minlength=bins)

    def curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return pixels, mean probability and share of tumour of each bin, not-a-number where there are no pixels."""
        pixels, probabilities, positives = self.sums
        filled = np.where(pixels > 0, pixels, np.nan)
        return pixels, probabilities / filled, positives / filled

    def error(self) -> float:
        """Return the expected calibration error, in [0, 1], best at 0; not-a-number without pixels.

        It is the mean over all pixels of the distance between mean probability and share of tumour in their bin.
        """
        pixels, probabilities, positives = self.sums
        return float(np.abs(probabilities - positives).sum() / pixels.sum()) if pixels.any() else math.nan


def overlap(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Return Dice of two masks, in [0, 1]: 1 if both are empty, 0 if one is."""
    total = np.count_nonzero(truth) + np.count_nonzero(prediction)
    return 2 * np.count_nonzero(truth & prediction) / total if total else 1.0


def contrast(grey: np.ndarray, truth: np.ndarray, counted: np.ndarray, width: int = RING_PIXELS) -> float:
    """Return how far a tumour stands out: mean less mean of a ring around it, over standard deviation of the ring.

    Args:
        grey: Image of shape `(height, width)`.
        truth: Mask of the tumour.
        counted: Pixels that may be in the ring, such as those of the head.
        width: The ring is what lies up to this many pixels from the tumour.

    Returns:
        Positive for a tumour brighter than its surroundings; not-a-number if there is no tumour, or no ring that
        varies.
    """
    if not truth.any():
        return math.nan
    ring = grey[(ndimage.distance_transform_edt(~truth) <= width) & ~truth & counted].astype(float)
    if not ring.size or ring.std() == 0:
        return math.nan
    return float((grey[truth].mean() - ring.mean()) / ring.std())


def boundary_distances(
    truth: np.ndarray, prediction: np.ndarray, spacing: Sequence[float] = (1, 1)
) -> tuple[float, float]:
    """Return average symmetric surface distance and 95 % Hausdorff distance, in the unit of the spacing, best at 0.

    The surface of a mask is its pixels with an edge in common with a pixel outside or with the border of the image.
    The first is the mean over the surface pixels of both masks of the distance to the nearest of the other; the second
    the larger of the 95th percentiles of the two directions.

    Args:
        truth: Mask of shape `(height, width)`.
        prediction: Mask of the same shape.
        spacing: Height and width of a pixel.

    Returns:
        Two numbers, both not-a-number if a mask is empty.
    """
    if not truth.any() or not prediction.any():
        return math.nan, math.nan
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (truth, prediction)]
    to_truth, to_prediction = (ndimage.distance_transform_edt(~surface, sampling=spacing) for surface in surfaces)
    ways = (to_prediction[surfaces[0]], to_truth[surfaces[1]])
    return float(np.concatenate(ways).mean()), float(max(np.percentile(way, 95) for way in ways))


def unmatched_lesions(mask: np.ndarray, other: np.ndarray) -> tuple[int, list[dict[str, float]]]:
    """Find the connected components of a mask, corners included, that share no pixel with another mask.

    Of the truth and the prediction these are missed lesions, of the prediction and the truth false ones.

    Returns:
        The number of all components, and of each untouched one `pixels`, `centre_row` and `centre_column`.
    """
    labels, count = ndimage.label(mask, structure=EIGHT_NEIGHBOURS)
    numbers = np.setdiff1d(np.arange(1, count + 1), labels[other])
    centres = ndimage.center_of_mass(mask, labels, numbers) if numbers.size else []
    sizes = np.bincount(labels.ravel())[numbers].tolist()
    return count, [
        {"pixels": size, "centre_row": float(row), "centre_column": float(column)}
        for size, (row, column) in zip(sizes, centres, strict=True)
    ]


def score_region(
    probability: np.ndarray,
    truth: np.ndarray,
    valid: np.ndarray,
    grey: np.ndarray,
    spacing_mm: Sequence[float] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the record of one region of an image, and its missed and false lesions.

    Args:
        probability: Of shape `(height, width)`, in [0, 1]; above 0.5 counts as predicted.
        truth: Mask of the region.
        valid: Pixels that count.
        grey: The image, 0 outside the head.
        spacing_mm: Height and width of a pixel, for distances in mm and areas in mm2, or `None` for pixels.
    """
    truth, prediction = truth & valid, (probability > 0.5) & valid
    head = valid & (grey != 0)
    own = Calibration()
    own.add(probability[head], truth[head])
    surface, hausdorff = boundary_distances(truth, prediction, spacing_mm or (1, 1))
    lesions, missed = unmatched_lesions(truth, prediction)
    predicted_lesions, false = unmatched_lesions(prediction, truth)
    unit = "mm" if spacing_mm else "px"
    area = spacing_mm[0] * spacing_mm[1] if spacing_mm else None
    found = {(True, True): "both", (True, False): "truth only", (False, True): "prediction only"}
    record = {
        "found_in": found.get((bool(truth.any()), bool(prediction.any())), "neither"),
        "truth_pixels": np.count_nonzero(truth),
        "predicted_pixels": np.count_nonzero(prediction),
        "true_positive_pixels": np.count_nonzero(truth & prediction),
        "false_positive_pixels": np.count_nonzero(prediction & ~truth),
        "false_negative_pixels": np.count_nonzero(truth & ~prediction),
        **({} if area is None else {"truth_mm2": np.count_nonzero(truth) * area}),
        "dice": overlap(truth, prediction),
        "contrast": contrast(grey, truth, head),
        "calibration_error": own.error(),
        f"surface_distance_{unit}": surface,
        f"hausdorff95_{unit}": hausdorff,
        "lesions": lesions,
        "missed_lesions": len(missed),
        "predicted_lesions": predicted_lesions,
        "false_lesions": len(false),
    }
    listed = []
    for kind, components in (("missed", missed), ("false", false)):
        for component in components:
            size = {} if area is None else {"mm2": component["pixels"] * area}
            listed.append({"kind": kind, **component, **size})
    return record, listed


def grey_values(image: Image.Image) -> np.ndarray:
    """Return an image as grey values of shape `(height, width)`: of three contrasts, or colours, the mean."""
    # 16-bit and float images lose their range in `convert`.
    if image.mode == "L" or image.mode.startswith(("I", "F")):
        return np.asarray(image)
    return np.asarray(image.convert("RGB")).mean(axis=-1)


class Analysis:
    """The model on the rows of a data set.

    Args:
        model: The model.
        processor: Its image processor.
        rows: The images and masks.
        transform: Knows the columns, and how to read masks.
        spacing_mm: As in [`score_region`].
        batch_size: Images at once.
        max_images: Look at this many, evenly spread over the rows.

    Attributes:
        records: A small record per image and region, in their order.
        lesions: Missed and false lesions.
        calibration: Of each region, over all images.
    """

    def __init__(
        self,
        model: Sam2UNetForSemanticSegmentation,
        processor: Sam2UNetImageProcessor,
        rows: datasets.Dataset,
        transform: SegmentationTransform,
        spacing_mm: Sequence[float] | None = None,
        batch_size: int = 8,
        max_images: int | None = None,
    ):
        self.model, self.processor, self.rows, self.transform = model.eval(), processor, rows, transform
        self.spacing_mm = spacing_mm
        self.regions = list(model.config.regions)
        self.names = case_names(rows)
        self.records: list[dict[str, Any]] = []
        self.lesions: list[dict[str, Any]] = []
        self.calibration = {region: Calibration() for region in self.regions}
        chosen = evenly_spread(len(rows), max_images or len(rows)).tolist()
        with tqdm(total=len(chosen), desc="Looking for errors", unit="image") as bar:
            for start in range(0, len(chosen), batch_size):
                indices = chosen[start : start + batch_size]
                batch = rows[indices]
                for offset, (index, image) in enumerate(zip(indices, self.read(batch), strict=True)):
                    self._add(index, {name: values[offset] for name, values in batch.items()}, *image)
                    bar.update()

    @torch.inference_mode()
    def read(self, batch: dict[str, list[Any]]) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield grey values, probabilities and masks of shape `(regions, height, width)`, and valid pixels."""
        images = batch[self.transform.image_column]
        inputs = self.processor(images, return_tensors="pt").to(self.model.device, self.model.dtype)
        sizes = [(image.height, image.width) for image in images]
        probabilities = self.processor.post_process_regions(self.model(**inputs), target_sizes=sizes)
        for image, values, mask in zip(images, probabilities, batch[self.transform.mask_column], strict=True):
            masks, valid = self.model.region_masks(self.transform.to_label_ids(mask)[None])
            yield grey_values(image), values.cpu().numpy(), masks[0].bool().numpy(), valid[0, 0].numpy()

    def _add(
        self,
        index: int,
        row: dict[str, Any],
        grey: np.ndarray,
        probabilities: np.ndarray,
        masks: np.ndarray,
        valid: np.ndarray,
    ) -> None:
        """Score one image."""
        known = {name: row[name] for name in ("case_id", "slice_index", "grade") if name in row}
        head = valid & (grey != 0)
        for region, probability, truth in zip(self.regions, probabilities, masks, strict=True):
            self.calibration[region].add(probability[head], truth[head])
            record, lesions = score_region(probability, truth, valid, grey, self.spacing_mm)
            about = {"index": index, "image": self.names[index], **known, "region": region}
            self.records.append({**about, **record})
            self.lesions += [{**about, **lesion} for lesion in lesions]

    def of_region(self, region: str) -> list[dict[str, Any]]:
        """Return the records of one region."""
        return [record for record in self.records if record["region"] == region]

    def column(self, region: str, name: str, needs: str | None = "truth_pixels") -> np.ndarray:
        """Return one value of the records of a region, of those where `needs` is not 0."""
        records = [record for record in self.of_region(region) if needs is None or record[needs]]
        return np.array([record[name] for record in records])

    def example(self, title: str, record: dict[str, Any]) -> Example:
        """Segment an image again, to draw it."""
        index = record["index"]
        ((grey, probabilities, masks, valid),) = self.read(self.rows[index : index + 1])
        number = self.regions.index(record["region"])
        heading = f"{title}: Dice {record['dice']:.2f}\n{shorten(record['image'])}"
        return Example(heading, grey, masks[number] & valid, (probabilities[number] > 0.5) & valid)


def choose_examples(records: list[dict[str, Any]], worst: int) -> list[tuple[str, dict[str, Any]]]:
    """Return titles and records of the worst images, the median and the best, of those with anything to find or found.

    Among images of equal Dice the one with more wrong pixels is worse. The worst are of different cases as long as
    there are others.
    """
    ranked = sorted(
        (record for record in records if record["found_in"] != "neither"),
        key=lambda record: (record["dice"], -record["false_positive_pixels"] - record["false_negative_pixels"]),
    )
    if not ranked:
        return []
    first_of_case: dict[str, int] = {}
    for position, record in enumerate(ranked):
        first_of_case.setdefault(record.get("case_id", record["image"]), position)
    order = list(first_of_case.values())
    order += [position for position in range(len(ranked)) if position not in set(order)]
    shown = [(f"worst {number}", ranked[position]) for number, position in enumerate(sorted(order[:worst]), start=1)]
    return [*shown, ("median", ranked[len(ranked) // 2]), ("best", ranked[-1])]


def summarise(analysis: Analysis) -> list[dict[str, Any]]:
    """Return a row per region: counts, Dice, calibration, boundary distances and lesions."""
    unit = "mm" if analysis.spacing_mm else "px"
    summary = []
    for region in analysis.regions:
        records = analysis.of_region(region)
        dice = analysis.column(region, "dice", None)
        with_tumour = analysis.column(region, "dice")
        counts = {
            f"images_{where.replace(' ', '_')}": sum(record["found_in"] == where for record in records)
            for where in ("both", "truth only", "prediction only", "neither")
        }
        row = {
            "region": region,
            "images": len(records),
            **counts,
            "mean_dice": dice.mean(),
            "mean_dice_with_tumour": with_tumour.mean() if with_tumour.size else math.nan,
            "median_dice_with_tumour": np.median(with_tumour) if with_tumour.size else math.nan,
            "calibration_error": analysis.calibration[region].error(),
        }
        for name in (f"surface_distance_{unit}", f"hausdorff95_{unit}"):
            values = analysis.column(region, name, None)
            values = values[~np.isnan(values)]
            row[f"mean_{name}"] = values.mean() if values.size else math.nan
            row[f"median_{name}"] = np.median(values) if values.size else math.nan
        for name in ("lesions", "missed_lesions", "predicted_lesions", "false_lesions"):
            row[name] = int(analysis.column(region, name, None).sum())
        summary.append(row)
    return summary


def draw_report(analysis: Analysis, worst: int) -> Iterator[tuple[str, str, Figure | None]]:
    """Yield file name, caption and figure, or in its place `None` and in the caption's why it was left out."""
    regions, unit = analysis.regions, "mm" if analysis.spacing_mm else "px"
    for region in regions:
        chosen = choose_examples(analysis.of_region(region), worst)
        name = f"overlays_{file_name(region)}"
        if chosen:
            examples = [analysis.example(title, record) for title, record in chosen]
            yield (
                name,
                f"{region}: worst images (of different cases if possible), median and best",
                plot_overlays(examples),
            )
        else:
            yield name, f"Overlays of {region} are left out: there is nothing to find and nothing was found.", None

    with_tumour = [region for region in regions if analysis.column(region, "dice").size]
    if not with_tumour:
        yield "dice", "Dice against size, contrast, position and grade is left out: no mask holds a region.", None
    size = ("truth_mm2", "tumour size (mm²)") if analysis.spacing_mm else ("truth_pixels", "tumour size (pixels)")
    variables = [
        ("dice_size", *size, "Dice against tumour size"),
        ("dice_contrast", "contrast", "contrast (standard deviations)", "Dice against contrast to the surroundings"),
        ("dice_slice", "slice_index", "slice index", "Dice against slice position"),
    ]
    for name, key, label, caption in variables if with_tumour else ():
        if key not in analysis.records[0]:
            yield name, f"{caption} is left out: the data set has no column `{key}`.", None
            continue
        points = {}
        for region in with_tumour:
            values = np.array([np.nan if value is None else value for value in analysis.column(region, key)], float)
            known = ~np.isnan(values)
            points[region] = (values[known], analysis.column(region, "dice")[known])
        if any(values.size for values, _ in points.values()):
            yield name, caption, plot_scatter(points, label, log=name == "dice_size")
        else:
            yield name, f"{caption} is left out: no image has a value of `{key}`.", None
    if with_tumour:
        yield draw_grades(analysis, with_tumour)

    curves = {region: (*total.curve(), total.error()) for region, total in analysis.calibration.items()}
    if any(pixels.any() for pixels, *_ in curves.values()):
        yield "calibration", "Calibration over the pixels of the head", plot_calibration(curves)
    else:
        yield "calibration", "Calibration is left out: all images are black.", None
    measures = {"average surface distance": "surface_distance", "95 % Hausdorff distance": "hausdorff95"}
    distances: dict[str, dict[str, np.ndarray]] = {}
    for label, key in measures.items():
        of_region = {region: analysis.column(region, f"{key}_{unit}", None) for region in regions}
        distances[label] = {region: values[~np.isnan(values)] for region, values in of_region.items()}
    if any(values.size for groups in distances.values() for values in groups.values()):
        yield (
            "boundaries",
            "Boundary error where both truth and prediction are there",
            plot_boundaries(distances, unit),
        )
    else:
        yield "boundaries", "Boundary error is left out: no image has both truth and prediction.", None


def draw_grades(analysis: Analysis, regions: Sequence[str]) -> tuple[str, str, Figure | None]:
    """Return the figure of Dice by grade, as `draw_report` does."""
    name, caption = "dice_grade", "Dice by grade"
    if "grade" not in analysis.records[0]:
        return name, f"{caption} is left out: the data set has no column `grade`.", None
    grades = sorted({str(record["grade"]) for record in analysis.records if record["grade"] is not None})
    if not grades:
        return name, f"{caption} is left out: the column `grade` of the data set is empty.", None
    groups = {}
    for region in regions:
        found, dice = analysis.column(region, "grade"), analysis.column(region, "dice")
        groups[region] = {grade: dice[[str(value) == grade for value in found]] for grade in grades}
    return name, caption, plot_groups(groups, "grade")


def file_name(text: str) -> str:
    """Return text as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", text)


def as_text(value: Any, digits: int = 6) -> str:
    """Return a value as it stands in tables: with so many digits, nothing for not-a-number."""
    if isinstance(value, (float, np.floating)):
        return "" if math.isnan(value) else f"{value:.{digits}g}"
    return "" if value is None else str(value)


def write_csv(path: Path, records: list[dict[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write records with the same keys; `columns` are those of an empty table."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(records[0] if records else columns)
        writer.writerows([as_text(value) for value in record.values()] for record in records)


def html_table(records: list[dict[str, Any]]) -> str:
    """Return records as a table."""
    if not records:
        return "<p>None.</p>"
    titles = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in records[0])
    rows = []
    for record in records:
        cells = "".join(f"<td>{html.escape(as_text(value, 4))}</td>" for value in record.values())
        rows.append(f"<tr>{cells}</tr>")
    return f"<table><tr>{titles}</tr>{''.join(rows)}</table>"


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font-family: sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; font-size: 0.85rem }}
th, td {{ border-bottom: 1px solid #ccc; padding: 0.25rem 0.6rem; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100%; display: block }} figure {{ margin: 2rem 0 }} figcaption {{ font-weight: bold }}
</style></head><body>
{body}
</body></html>
"""


def write_report(analysis: Analysis, folder: Path, title: str, worst: int, formats: Sequence[str]) -> None:
    """Write the CSV files, the figures, and `report.html` with all of them in it."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = summarise(analysis)
    write_csv(folder / "summary.csv", summary)
    write_csv(folder / "images.csv", analysis.records)
    about = list(analysis.records[0])[: list(analysis.records[0]).index("region") + 1]
    write_csv(folder / "lesions.csv", analysis.lesions, (*about, *LESION_COLUMNS))
    bins = []
    for region, calibration in analysis.calibration.items():
        for number, values in enumerate(zip(*calibration.curve(), strict=True)):
            bins.append({"region": region, "bin": number} | dict(zip(BIN_COLUMNS, map(float, values), strict=True)))
    write_csv(folder / "calibration.csv", bins)

    body = [f"<h1>{html.escape(title)}</h1>"]
    by_region = [{"": name} | {row["region"]: row[name] for row in summary} for name in list(summary[0])[1:]]
    body.append(html_table(by_region))
    for name, caption, figure in draw_report(analysis, worst):
        if figure is None:
            for suffix in formats:  # of an earlier run
                (folder / f"{name}.{suffix}").unlink(missing_ok=True)
            body.append(f"<p>{html.escape(caption)}</p>")
            continue
        save_figure(figure, folder, name, list(dict.fromkeys(["png", *formats])))
        picture = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        text = html.escape(caption)
        body.append(
            f'<figure><figcaption>{text}</figcaption><img alt="{text}" src="data:image/png;base64,{picture}"></figure>'
        )
    for kind, meaning in (("missed", "of the truth"), ("false", "of the prediction")):
        found = sorted((lesion for lesion in analysis.lesions if lesion["kind"] == kind), key=lambda x: -x["pixels"])
        body.append(f"<h2>{len(found)} {kind} lesions</h2><p>Connected parts {meaning} that share no pixel with the ")
        body.append(f"{'prediction' if kind == 'missed' else 'truth'}, the largest {LESIONS_SHOWN} at most.</p>")
        shown = ("image", "region", *LESION_COLUMNS[1:])
        body.append(html_table([{key: lesion[key] for key in shown} for lesion in found[:LESIONS_SHOWN]]))
    (folder / "report.html").write_text(PAGE.format(title=html.escape(title), body="\n".join(body)), encoding="utf-8")


def load_rows(
    args: AnalysisArguments, data_args: DataArguments, regions: dict[str, list[int]]
) -> tuple[datasets.Dataset, str, str, dict[int, int]]:
    """Return the rows to look at, the columns of images and masks, and the ids to replace in the masks."""
    data = load_data(data_args)
    if args.split not in data:
        raise SystemExit(f"--split {args.split}: the data set has {', '.join(data)}. Pass one of them.")
    image_column, mask_column = find_columns(data, data_args)
    try:
        _, mapping = find_regions(data, image_column, mask_column, regions)
    except SystemExit as err:
        raise SystemExit(f"{err} {args.model} segments {regions}: pass data with masks of these ids.") from err
    return data[args.split], image_column, mask_column, mapping


def load_case(path: str) -> BratsCase:
    """Return the one case of a folder."""
    cases = find_cases(path)
    if len(cases) > 1:
        raise ValueError(f"{path} holds {len(cases)} cases, such as {cases[0].folder}. Pass the folder of one.")
    return cases[0]


def segment_case(segment: Sam2UNetVolumePipeline, case: BratsCase, batch_size: int) -> CaseView:
    """Segment one patient, and read the contrasts and the expert's mask that there are."""
    # What cannot be read is better known before the work than after it. The first is what will be segmented.
    names = list(dict.fromkeys([*segment.modalities, *(name for name in MODALITIES if name in case.files)]))
    scans = dict(zip(names, case.read_images(names), strict=True))
    scan = scans[names[0]]
    labels = case.read_mask(same_grid_as=scan).voxels if "seg" in case.files else None
    if labels is None:
        logger.warning("Case %s has no expert's mask: its figures show the prediction alone.", case.case_id)
    found = segment(case, batch_size=batch_size, return_probabilities=True)
    regions = found.regions
    shown = [name for name in MODALITIES if name in scans]
    grey = {name: intensity_window(scans[name]).apply(scans[name].voxels) for name in shown}
    truth = {}
    if labels is not None:
        truth = {region: np.isin(labels, label_ids) for region, label_ids in regions.items()}
    return CaseView(
        name=case.case_id,
        grey=grey,
        shown="flair" if "flair" in segment.modalities else segment.modalities[0],
        spacing_mm=scan.spacing_mm,
        truth=truth,
        prediction={region: scan.from_file_grid(found.region(region)) for region in regions},
        probabilities={
            region: scan.from_file_grid(values) for region, values in zip(regions, found.probabilities, strict=True)
        },
    )


def draw_case(view: CaseView, folder: Path, formats: Sequence[str]) -> None:
    """Write the figures of a case; those of a region that is nowhere are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    start = file_name(view.name)
    save_figure(plot_contrasts(view), folder, f"{start}_contrasts", formats)
    save_figure(plot_probabilities(view), folder, f"{start}_probabilities", formats)
    for region in view.prediction:
        if not view.marked(region).any():
            logger.warning("Case %s has no %s in truth or prediction: no figures of it.", view.name, region)
            continue
        end = file_name(region)
        if view.truth:
            save_figure(plot_case_errors(view, region), folder, f"{start}_errors_{end}", formats)
        save_figure(plot_montage(view, region), folder, f"{start}_montage_{end}", formats)
        save_figure(plot_planes(view, region), folder, f"{start}_planes_{end}", formats)


def prepare_folder(folder: Path) -> None:
    """Make the folder of the results, and try to write to it, while that costs nobody an analysis."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as err:
        raise SystemExit(f"{folder} cannot be written to ({err}). Pass another folder by --output_dir.") from err


def read_run(model: str) -> tuple[Path, dict[str, Any] | None]:
    """Return the record of the run that a model is of, and its arguments; a checkpoint lies in the run's folder."""
    folder = Path(model)
    if folder.resolve().name.startswith("checkpoint-") and not (folder / RECORD).exists():
        folder = folder.resolve().parent
    path = folder / RECORD
    try:
        record = read_record(folder)
        return path, None if record is None else dict(record["arguments"])
    except (OSError, KeyError, TypeError, ValueError) as err:
        raise SystemExit(
            f"{path} cannot be read as the record of a run ({err!r}). Put back what the run wrote, or remove it and "
            "name the data by --dataset_name or --brats_dir."
        ) from err


def format_option(name: str, value: Any) -> str:
    """Return an option as it is given on the command line."""
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def fill_from_run(model: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return values for data options that are not given: those of the run, or the phantom's if there is nothing else.

    Args:
        model: Folder of the model, or its Hub id.
        given: Data options of the command line.
    """
    path, run = read_run(model)
    names_data = "dataset_name" in given or "brats_dir" in given
    if run is None:
        if names_data:
            return {}
        logger.warning("There is no %s to tell what the model was trained on: taking the phantom.", path)
        return {name: PHANTOM_RECIPE[name] for name in ("slices", "min_tumor_pixels")}
    names = [*DATA_OPTIONS, *(SCAN_OPTIONS if run.get("dataset_name") is None else ())]
    run = {name: run[name] for name in names if run.get(name) is not None}
    for name in SPLIT_OPTIONS:
        if name in given and name in run and format_option(name, given[name]) != format_option(name, run[name]):
            logger.warning(
                "%s is given, but %s has %s: this is not the split of that run, and may hold what the model was "
                "trained on.",
                format_option(name, given[name]),
                path,
                format_option(name, run[name]),
            )
    left = set(given)
    if names_data:
        left |= {"dataset_name", "brats_dir"}
        if given.get("dataset_name") != run.get("dataset_name"):
            left.add("dataset_config_name")
    taken = {name: value for name, value in run.items() if name not in left}
    logger.info("As in %s: %s.", path, " ".join(format_option(*item) for item in taken.items()) or "nothing")
    return taken


def parse_arguments(argv: list[str]) -> tuple[AnalysisArguments, DataArguments]:
    """Read the command line; data options that it leaves open are those of the run that trained the model."""
    parser = HfArgumentParser((AnalysisArguments, DataArguments), description=__doc__.split("\n")[0])
    parser.set_defaults(modalities=None)  # those of the model
    # Where a namespace has a value already, the parser sets no default: what is still open then was not given.
    is_open = object()
    names = [option.name for option in fields(DataArguments)]
    found, _ = parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(names, is_open)))
    given = {name: getattr(found, name) for name in names if getattr(found, name) is not is_open}
    if (found.case is not None) + ("dataset_name" in given) + ("brats_dir" in given) > 1:
        parser.error("pass one of --case, --dataset_name and --brats_dir")
    if found.case is None:
        parser.set_defaults(**fill_from_run(found.model, given))
    args, data_args = parser.parse_args_into_dataclasses(argv)
    for name in ("max_images", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if args.worst < 0:
        parser.error(f"--worst must not be negative, got {args.worst}")
    if args.spacing_mm is not None:
        if len(args.spacing_mm) > 2 or not all(0 < value < math.inf for value in args.spacing_mm):
            parser.error(f"--spacing_mm takes one or two positive numbers, got {args.spacing_mm}")
        args.spacing_mm = [args.spacing_mm[0], args.spacing_mm[-1]]
    if args.output_dir is None:
        folder = Path(args.model) if Path(args.model).is_dir() else Path("runs") / Path(args.model).name
        args.output_dir = str(folder / "errors")
    return args, data_args


def load_model(args: AnalysisArguments) -> tuple[Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor]:
    """Load the model and its image processor."""
    try:
        model = Sam2UNetForSemanticSegmentation.from_pretrained(args.model, dtype=torch.float32)
        processor = Sam2UNetImageProcessor.from_pretrained(args.model)
    except (OSError, ValueError) as err:
        raise SystemExit(
            f"--model {args.model}: {err} Train one with `python examples/run_segmentation.py`, or pass the folder or "
            "Hub id of another."
        ) from err
    processor.regions = model.config.regions
    return model.eval().to(args.device or ("cuda" if torch.cuda.is_available() else "cpu")), processor


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO, stream=sys.stderr)
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    args, data_args = parse_arguments(sys.argv[1:] if argv is None else argv)
    model, processor = load_model(args)
    regions = model.config.regions
    try:
        if data_args.regions is not None and (given := parse_regions(data_args.regions)) != regions:
            raise ValueError(f"{args.model} segments {regions}, not {given}. Leave out --regions.")
    except ValueError as err:
        raise SystemExit(f"--regions: {err}") from err
    folder = Path(args.output_dir)
    if args.case is not None:
        try:
            segment = Sam2UNetVolumePipeline(model, processor, data_args.modalities)
        except ValueError as err:
            raise SystemExit(f"--modalities: {err}") from err
        try:
            case = load_case(args.case)
            prepare_folder(folder)
            view = segment_case(segment, case, args.batch_size)
        except (OSError, ValueError) as err:  # no case, or one that cannot be read
            raise SystemExit(f"--case: {err}") from err
        draw_case(view, folder, args.format)
    else:
        data_args.modalities = data_args.modalities or processor.modalities or ["flair"]
        rows, image_column, mask_column, mapping = load_rows(args, data_args, regions)
        transform = SegmentationTransform(processor, image_column, mask_column, label_mapping=mapping)
        prepare_folder(folder)
        analysis = Analysis(model, processor, rows, transform, args.spacing_mm, args.batch_size, args.max_images)
        images = f"{len(analysis.records) // len(regions)} of {len(rows)} {args.split} images"
        title = (
            f"Errors of {args.model} on {images} of {data_args.dataset_name or data_args.brats_dir or 'the phantom'}"
        )
        write_report(analysis, folder, title, args.worst, args.format)
    logger.info("The results are in %s.", folder)


if __name__ == "__main__":
    main()
