"""The table of patients: scores of each by region, what they are on average, and its files."""

import csv
import io
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .metrics.volume_functional import score_volume, to_regions


# Columns of the table, of which a table has those that its scores have, and how a reader calls them.
COLUMN_TITLES = {
    "volume_dice": "Dice",
    "hausdorff95_mm": "95 % Hausdorff distance (mm)",
    "reference_ml": "reference (ml)",
    "predicted_ml": "predicted (ml)",
    "reference_pixels": "reference (pixels)",
    "predicted_pixels": "predicted (pixels)",
}
# Which value is the worst of those columns that are averaged.
WORST = {"volume_dice": min, "hausdorff95_mm": max}


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
        Region name -> what [`~metrics.score_volume`] returns, and `reference_ml` and `predicted_ml`.

    Raises:
        ValueError: If a value or the shapes are wrong.
    """
    scores = score_volume(prediction, reference, regions=regions, spacing=spacing_mm)
    voxel_ml = math.prod(spacing_mm) / 1000
    for region, label_ids in to_regions(regions).items():
        for name, volume in (("reference_ml", reference), ("predicted_ml", prediction)):
            scores[region][name] = int(np.count_nonzero(np.isin(volume, label_ids))) * voxel_ml
    return scores


class PatientTable:
    """Scores of patients by region.

    Attributes:
        rows: A row per patient and region: `patient`, `region`, and those of `COLUMN_TITLES` that are known.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, patient: str, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Add the scores of a patient, region name -> column -> value; what is no column of the table is left out."""
        for region, values in scores.items():
            known = {name: float(values[name]) for name in COLUMN_TITLES if name in values}
            self.rows.append({"patient": patient, "region": region, **known})

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

    def write(self, folder: str | os.PathLike, name: str = "patients") -> list[Path]:
        """Write `<name>.csv`, a line per patient and region, and `<name>.json`, which has the summary too.

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
        files = {f"{name}.csv": text.getvalue(), f"{name}.json": json.dumps(content, indent=2) + "\n"}
        for file, content_of_file in files.items():
            partial = Path(folder, f".{file}.partial")
            partial.write_text(content_of_file, encoding="utf-8")
            os.replace(partial, Path(folder, file))
        return [Path(folder, file) for file in files]


__all__ = ["COLUMN_TITLES", "PatientTable", "score_patient"]
