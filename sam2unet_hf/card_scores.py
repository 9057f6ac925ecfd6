"""Scores of a model for the front matter of its card, from which the Hub makes a table beside the card."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult

from .patient_table import COLUMN_TITLES, PatientTable


METRIC_TITLES = {
    "dice": "Dice",
    "iou": "IoU",
    "f_beta": "F-measure",
    "weighted_f_beta": "weighted F-measure",
    "e_measure": "E-measure",
    "s_measure": "S-measure",
    "mae": "mean absolute error",
}
# Tables of patients by what they are of: a split, or `None` for all patients out of fold.
SPLIT_TABLES = {"test_patients.json": "test", "validation_patients.json": "validation", "patients.json": None}


def parse_score(key: str, regions: Sequence[str]) -> tuple[str, str, str | None] | None:
    """Split the key of a score into kind, metric and region; `None` if it is no score.

    `"mean_dice_WT"` gives `("mean", "dice", "WT")`, and `"dice"` gives `("", "dice", None)`. A single region is not
    told apart from the average over all.
    """
    for region in [None, *regions]:
        # "mean_dice" is the mean Dice even where a region is called "dice".
        match = re.fullmatch(r"(?:(mean|max|adaptive)_)?(\w+)", key.removesuffix(f"_{region}"))
        if match is not None and match[2] in METRIC_TITLES and (region is None or key.endswith(f"_{region}")):
            return None if region is not None and len(regions) == 1 else (match[1] or "", match[2], region)
    return None


def eval_results(info: Mapping[str, Any], regions: Sequence[str], tables: Mapping[str, Path]) -> list[EvalResult]:
    """Return the scores of the test split, or of the validation split if there is no other, for the front matter.

    They are those of images, and means over patients, whose names say so. Of an ensemble they are those of patients
    out of fold. The Hub's newer `.eval_results` folder is for data sets that it has registered as benchmarks alone.

    Args:
        info: What is known of the run, see [`Sam2UNetTrainer.create_model_card`]; without the name of a data set there
            are no results, since the Hub needs one.
        regions: Names of the regions.
        tables: Name of the file of a table of patients, see `SPLIT_TABLES`, -> its path, of those that there are.
    """
    dataset = info.get("dataset", {})
    if not dataset.get("name"):
        return []
    scores_of = info.get("results", {})
    of_split = {split: tables[name] for name, split in SPLIT_TABLES.items() if name in tables}
    split = next(iter([*reversed(scores_of), *of_split]), None)
    rows = list(image_rows(scores_of.get(split, {}), regions))
    rows += patient_rows(of_split[split], out_of_fold=split is None) if split in of_split else []
    return [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=dataset.get("id") or re.sub(r"[^a-z0-9.-]+", "-", dataset["name"].lower()),
            dataset_name=dataset["name"],
            dataset_config=info.get("data", {}).get("configuration"),
            dataset_split=split,
            dataset_revision=dataset.get("revision"),
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for kind, name, value in rows
        if math.isfinite(value)
    ]


def image_rows(scores: Mapping[str, float], regions: Sequence[str]) -> Iterator[tuple[str, str, float]]:
    """Yield type, name and value of the scores that are means over images."""
    for key, value in scores.items():
        if (found := parse_score(key, regions)) is not None:
            kind, metric, region = found
            name = f"{kind} {METRIC_TITLES[metric]}".strip()
            yield f"{kind}_{metric}" if kind else metric, name if region is None else f"{name}, {region}", value


def patient_rows(path: Path, out_of_fold: bool) -> Iterator[tuple[str, str, float]]:
    """Yield type, name and value of the scores that are means over the patients of a table."""
    table = PatientTable()
    table.rows = json.loads(path.read_text(encoding="utf-8"))["patients"]
    count = len(table.dice)
    over = f"mean over {count} patient{'' if count == 1 else 's'}{' out of fold' if out_of_fold else ''}"
    for region, columns in table.summary().items():
        for column, values in columns.items():
            yield column, f"{COLUMN_TITLES[column]}, {region}, {over}", cast("float", values["mean"])


__all__ = ["METRIC_TITLES", "eval_results"]
