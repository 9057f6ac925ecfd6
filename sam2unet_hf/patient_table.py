"""The table of patients: scores of each by region, what they are on average, and its files."""

import csv
import io
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from .metrics.lesion_functional import LESION_METRICS, score_lesions
from .metrics.volume_functional import VOLUME_METRICS, score_volume, to_region_masks


# What there is to know of how well the regions of a patient were found.
PATIENT_METRICS = (*VOLUME_METRICS, *LESION_METRICS)
# Columns of the table, of which a table has those that its scores have, and how a reader calls them.
COLUMN_TITLES = {
    "volume_dice": "Dice",
    "hausdorff95_mm": "95 % Hausdorff distance (mm)",
    "hausdorff95_pooled_mm": "95 % Hausdorff distance, pooled (mm)",
    "nsd_0.5mm": "NSD at 0.5 mm",
    "nsd_1mm": "NSD at 1 mm",
    "lesion_f1": "F1 of lesions",
    "lesion_dice": "lesion-wise Dice",
    "lesion_hausdorff95_pooled_mm": "lesion-wise 95 % Hausdorff distance, pooled (mm)",
    "lesion_nsd_0.5mm": "lesion-wise NSD at 0.5 mm",
    "lesion_nsd_1mm": "lesion-wise NSD at 1 mm",
    "reference_ml": "reference (ml)",
    "predicted_ml": "predicted (ml)",
    "reference_pixels": "reference (pixels)",
    "predicted_pixels": "predicted (pixels)",
}
# Which value is the worst of those columns that are averaged: the largest distance, the smallest of all others.
WORST = {name: max if name.endswith("_mm") else min for name in COLUMN_TITLES if name in PATIENT_METRICS}


def score_patient(
    prediction: np.ndarray, reference: np.ndarray, regions: Mapping[str, Sequence[int]], spacing_mm: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Score the regions of a patient by the metrics for volumes, and measure them.

    Args:
        prediction: Label ids of shape `(x, y, z)`, in any order of axes.
        reference: Label ids of the same shape.
        regions: Region name -> the label ids it joins.
        spacing_mm: Size of a voxel along the three axes.

    Returns:
        Region name -> what [`~metrics.score_volume`] and [`~metrics.score_lesions`] return, and `reference_ml` and
        `predicted_ml`.

    Raises:
        ValueError: If a value or the shapes are wrong.
    """
    scores = score_volume(prediction, reference, regions=regions, spacing=spacing_mm)
    lesions = score_lesions(prediction, reference, regions=regions, spacing=spacing_mm)
    voxel_ml = math.prod(spacing_mm) / 1000
    masks, _ = to_region_masks(prediction, reference, regions)
    for region, (predicted, expected) in masks.items():
        scores[region] |= lesions[region]
        for name, mask in (("reference_ml", expected), ("predicted_ml", predicted)):
            scores[region][name] = int(np.count_nonzero(mask)) * voxel_ml
    return scores


class PatientTable:
    """Scores of patients by region.

    Attributes:
        rows: A row per patient and region: `patient`, `region`, `fold` in a cross-validation, and those of
            `COLUMN_TITLES` that are known.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, patient: str, scores: Mapping[str, Mapping[str, float]], fold: int | None = None) -> None:
        """Add the scores of a patient, region name -> column -> value; what is no column of the table is left out.

        `fold` is that of a cross-validation whose model was not trained on the patient.
        """
        for region, values in scores.items():
            known = {name: float(values[name]) for name in COLUMN_TITLES if name in values}
            of_fold = {} if fold is None else {"fold": fold}
            self.rows.append({"patient": patient, "region": region, **of_fold, **known})

    @property
    def dice(self) -> dict[str, float]:
        """Mean Dice over regions by patient, from the best to the worst."""
        found: dict[str, list[float]] = {}
        for row in self.rows:
            found.setdefault(row["patient"], []).append(row["volume_dice"])
        means = {patient: math.fsum(values) / len(values) for patient, values in found.items()}
        return dict(sorted(means.items(), key=lambda item: (-item[1], item[0])))

    def summary(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """Return mean, standard deviation, median and worst value over patients, by region and column.

        The standard deviation is that of a sample, and `None` of a single patient.
        """
        found: dict[str, dict[str, dict[str, float | None]]] = {}
        for region in dict.fromkeys(row["region"] for row in self.rows):
            own = [row for row in self.rows if row["region"] == region]
            for name, worst in WORST.items():
                if name not in own[0]:
                    continue
                values = [row[name] for row in own]
                found.setdefault(region, {})[name] = {
                    "mean": math.fsum(values) / len(values),
                    "std": statistics.stdev(values) if len(values) > 1 else None,
                    "median": statistics.median(values),
                    "worst": worst(values),
                }
        return found

    def sentences(self) -> list[str]:
        """Return what a reader wants to know first of each region: Dice and the 95 % Hausdorff distance."""
        facts = {"volume_dice": ("Dice", ".3f", ""), "hausdorff95_mm": ("95 % Hausdorff distance", ".1f", " mm")}
        texts = []
        for region, columns in self.summary().items():
            parts = []
            for name in filter(columns.__contains__, facts):
                title, digits, unit = facts[name]
                mean, median, worst = (f"{columns[name][kind]:{digits}}" for kind in ("mean", "median", "worst"))
                spread = f" on average (median {median}, worst {worst})" if len(self.dice) > 1 else ""
                parts.append(f"{title} {mean}{unit}{spread}")
            texts.append(f"{region}: {'; '.join(parts)}.")
        return texts

    def fold_summary(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """Return mean and standard deviation over folds of their means over patients, by region and column.

        The standard deviation is that of a sample, and `None` of a single fold.
        """
        found: dict[str, dict[str, list[float]]] = {}
        for fold in sorted({row["fold"] for row in self.rows}):
            own = PatientTable()
            own.rows = [row for row in self.rows if row["fold"] == fold]
            for region, columns in own.summary().items():
                for name, values in columns.items():
                    found.setdefault(region, {}).setdefault(name, []).append(cast("float", values["mean"]))
        return {
            region: {
                name: {
                    "mean": math.fsum(means) / len(means),
                    "std": statistics.stdev(means) if len(means) > 1 else None,
                }
                for name, means in columns.items()
            }
            for region, columns in found.items()
        }

    def write(self, folder: str | os.PathLike, name: str = "patients") -> list[Path]:
        """Write `<name>.csv`, a line per patient and region, and `<name>.json`, which has the summary too.

        Of a cross-validation it also has `fold_summary`.

        Returns:
            Their paths; nothing is written, and none returned, of a table without patients.

        Raises:
            OSError: If a file cannot be written, such as on a full disk. One that was there is left as it was.
        """
        if not self.rows:
            return []
        text = io.StringIO()
        writer = csv.DictWriter(text, self.rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        content = {"patients": self.rows, "summary": self.summary()}
        if "fold" in self.rows[0]:
            content["fold_summary"] = self.fold_summary()
        files = {f"{name}.csv": text.getvalue(), f"{name}.json": json.dumps(content, indent=2) + "\n"}
        for file, content_of_file in files.items():
            partial = Path(folder, f".{file}.partial")
            partial.write_text(content_of_file, encoding="utf-8")
            os.replace(partial, Path(folder, file))
        return [Path(folder, file) for file in files]


__all__ = ["COLUMN_TITLES", "PATIENT_METRICS", "PatientTable", "score_patient"]
