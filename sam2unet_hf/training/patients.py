"""Patients among the rows of a data set: sums of an evaluation over the slices of each, and whole heads."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch

from ..metrics.volume_functional import VoxelCounts, dice


# Scores of patients of which smaller is better, less their unit.
PATIENT_ERRORS = ("patient_false", "patient_missed")


class PatientRows(NamedTuple):
    """The patient that each row shows, and the size of its voxels if all rows know it."""

    case_ids: list[str]
    voxel_ml: list[float] | None

    @property
    def unit(self) -> str:
        """Unit of volumes: `ml`, or `voxels` where their size is not known."""
        return "voxels" if self.voxel_ml is None else "ml"


def read_column(rows: Any, name: str) -> list[Any] | None:
    """Return a column of a data set as it is stored, without decoding any other; `None` if there is none."""
    if name not in (getattr(rows, "column_names", None) or ()):
        return None
    # A transform would be called with this column alone.
    return list((rows.with_format(None) if isinstance(rows, datasets.Dataset) else rows)[name])


def find_patients(rows: Any, order: Iterable[int] | None = None) -> PatientRows | None:
    """Read which patient each row shows, from the columns `case_id` and `spacing_mm`.

    Args:
        rows: A data set, perhaps with a transform.
        order: Numbers of the rows in the order that is wanted; as they lie by default.

    Returns:
        The patients, or `None` if there is no column `case_id` or a row has none.
    """
    case_ids = read_column(rows, "case_id")
    if case_ids is None or None in case_ids:
        return None
    spacing_mm = read_column(rows, "spacing_mm")
    voxel_ml = None
    if spacing_mm is not None and None not in spacing_mm:
        voxel_ml = [math.prod(sizes) / 1000 for sizes in spacing_mm]
    if order is not None:
        order = list(order)
        case_ids = [case_ids[row] for row in order]
        voxel_ml = None if voxel_ml is None else [voxel_ml[row] for row in order]
    return PatientRows(list(map(str, case_ids)), voxel_ml)


def count_pixels(predicted: torch.Tensor, reference: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Count the pixels of each region of an image for the sums of its patient.

    Args:
        predicted: Predicted masks of shape `(regions, height, width)`, boolean: those of the label map that the image
            processor makes, so that each region holds those inside it, as in a label volume.
        reference: Reference masks of the same shape, boolean.
        valid: Pixels that count, of shape `(height, width)`, boolean.

    Returns:
        True positive, predicted and reference pixels, int64 of shape `(regions, 3)`.
    """
    predicted, reference = predicted & valid, reference & valid
    return torch.stack([predicted & reference, predicted, reference]).sum(dim=(-2, -1)).T


def add_up(counts: Iterable[np.ndarray], patients: PatientRows) -> dict[str, np.ndarray]:
    """Add up what [`count_pixels`] counted of each row, by patient in the order of their first rows."""
    sums: dict[str, np.ndarray] = {}
    for case_id, own in zip(patients.case_ids, counts, strict=True):
        sums[case_id] = sums.get(case_id, 0) + own
    return sums


def patient_score_names(regions: Sequence[str], unit: str) -> list[str]:
    """Return the keys of [`score_sums`], each over all regions and per region."""
    names = ["patient_dice", "patient_iou", *(f"{name}_{unit}" for name in PATIENT_ERRORS)]
    return [*names, *(f"{name}_{region}" for region in regions for name in names)]


def score_sums(sums: Mapping[str, np.ndarray], patients: PatientRows, regions: Sequence[str]) -> dict[str, float]:
    """Score the regions of patients by their sums, and average over patients, then over regions.

    Args:
        sums: Voxels by patient, see [`add_up`].
        patients: The rows that the sums are of.
        regions: Names of the regions.

    Returns:
        `patient_dice` and `patient_iou` in [0, 1], best at 1, which are 1 where reference and prediction are both
        empty as in BraTS, and 0 where one is. `patient_false_ml` is the volume of what was predicted outside the
        reference, `patient_missed_ml` of what was not found, in millilitres, best at 0; `patient_false_voxels` and
        `patient_missed_voxels` where the size of voxels is not known. Each is there per region too, as
        `patient_dice_<region>`. Exact, so that neither the order of rows nor the number of processes matters.
    """
    sizes = dict(zip(patients.case_ids, patients.voxel_ml or [1.0] * len(patients.case_ids), strict=True))
    means: list[list[float]] = []
    for region in range(len(regions)):
        values = []
        for case_id, own in sums.items():
            true_positive, predicted, reference = own[region].tolist()
            union = predicted + reference - true_positive
            overlap = (
                dice(VoxelCounts(true_positive, predicted, reference, 0)),
                (true_positive / union if union else 1.0),
            )
            errors = predicted - true_positive, reference - true_positive
            values.append([*overlap, *(voxels * sizes[case_id] for voxels in errors)])
        means.append([math.fsum(column) / len(column) for column in zip(*values, strict=True)])
    over_regions = [math.fsum(column) / len(column) for column in zip(*means, strict=True)]
    names = patient_score_names(regions, patients.unit)
    return dict(zip(names, [*over_regions, *sum(means, [])], strict=True))


__all__ = ["PatientRows", "find_patients"]
