"""Patients as volumes, put together from the slices in the rows of a data set."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..image_processing_sam2unet import Sam2UNetImageProcessor
from ..modeling_sam2unet import Sam2UNetForSemanticSegmentation
from ..patient_checks import why_implausible
from ..patient_table import score_patient
from ..scans_sam2unet import PLANES, pixel_size_mm
from .data import collate
from .patients import read_column


class PatientScores(NamedTuple):
    """What was found of a patient."""

    case_id: str
    scores: dict[str, dict[str, float]]  # see `score_patient`
    doubt: str | None  # why the segmentation is hardly believable, if it is


def rows_of_patients(rows: Any) -> dict[str, list[int]]:
    """Return the numbers of the rows of each `case_id`, in the order of `slice_index` if there is such a column."""
    slices = read_column(rows, "slice_index")
    found: dict[str, list[int]] = {}
    for row, case_id in enumerate(read_column(rows, "case_id") or ()):
        found.setdefault(str(case_id), []).append(row)
    return {case_id: own if slices is None else sorted(own, key=slices.__getitem__) for case_id, own in found.items()}


def why_no_volumes(rows: Any, plane: str = "axial") -> str | None:
    """Say why the rows of a data set do not hold whole heads, if they do not.

    They do if the slices of each patient follow each other, are as many as fill half the width of the head, and some
    show no tumour.

    Args:
        rows: A data set in the form of the builder's.
        plane: Plane of the slices.
    """
    names = ("case_id", "slice_index", "spacing_mm", "head_boxes", "wt_pixels")
    columns = {name: read_column(rows, name) for name in names}
    for name, values in columns.items():
        if values is None or None in values:
            return f"the rows have no `{name}`"
    known = {name: values or [] for name, values in columns.items()}
    for case_id, own in rows_of_patients(rows).items():
        slices = [known["slice_index"][row] for row in own]
        if slices != list(range(slices[0], slices[0] + len(slices))):
            return f"slices of {case_id} are missing or there twice"
        if all(known["wt_pixels"][row] for row in own):
            return f"the rows have no slice of {case_id} without tumour"
        spacing_mm = known["spacing_mm"][own[0]]
        boxes = [box for box in known["head_boxes"][own[0]].values() if box is not None]
        sides = [max(box[2 + axis] for box in boxes) - min(box[axis] for box in boxes) for axis in (0, 1)]
        smallest_mm = min(
            side * size for side, size in zip(sides, pixel_size_mm(spacing_mm, plane)[::-1], strict=True)
        )
        if len(slices) * spacing_mm[PLANES[plane]] < smallest_mm / 2:
            return f"the rows have {len(slices)} slices of {case_id} alone"
    return None


@torch.inference_mode()
def score_patients(
    model: Sam2UNetForSemanticSegmentation,
    processor: Sam2UNetImageProcessor,
    rows: Any,
    case_ids: Iterable[str] | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
) -> Iterator[PatientScores]:
    """Segment whole heads slice by slice, and score each patient as a volume; one is in memory at a time.

    Args:
        model: The model, in eval mode.
        processor: Its image processor, whose `plane` is that of the slices; axial by default.
        rows: A data set of whole heads, see [`why_no_volumes`], with a [`~training.SegmentationTransform`] that leaves
            masks at their own size (`resize_masks=False`).
        case_ids: Which patients to score; all of them by default.
        batch_size: Slices at once.
        num_workers: Processes that prepare them.

    Yields:
        Case id, scores, and why the segmentation is hardly believable, if it is.

    Raises:
        ValueError: If the slices of a patient differ in size.
    """
    plane = processor.plane or "axial"
    rows_of = rows_of_patients(rows)
    spacing_mm = read_column(rows, "spacing_mm") or []
    chosen = list(rows_of if case_ids is None else case_ids)
    batches = [
        rows_of[case][start : start + batch_size]
        for case in chosen
        for start in range(0, len(rows_of[case]), batch_size)
    ]
    loader = iter(DataLoader(rows, batch_sampler=batches, collate_fn=collate, num_workers=num_workers))
    regions = model.config.regions
    for case_id in chosen:
        predictions: list[np.ndarray] = []
        references: list[np.ndarray] = []
        head_voxels = 0.0
        while len(references) < len(rows_of[case_id]):
            batch = next(loader)
            labels = list(batch.pop("labels"))
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            sizes = [tuple(label_map.shape) for label_map in labels]
            found = processor.post_process_semantic_segmentation(model(**inputs), target_sizes=sizes)
            predictions += [label_map.cpu().numpy() for label_map in found]
            references += [label_map.cpu().numpy() for label_map in labels]
            head_voxels += count_head(batch, sizes, processor)
        if len({label_map.shape for label_map in references}) > 1:
            raise ValueError(f"The slices of {case_id} must have one size. Build the data set anew.")
        prediction, reference = np.stack(predictions), np.stack(references)
        ignored = reference == model.config.ignore_index
        prediction[ignored] = reference[ignored] = 0
        size = spacing_mm[rows_of[case_id][0]]
        # The axes are slices, height and width.
        scores = score_patient(prediction, reference, regions, (size[PLANES[plane]], *pixel_size_mm(size, plane)))
        yield PatientScores(case_id, scores, why_implausible(prediction, head_voxels))


def count_head(batch: dict[str, torch.Tensor], sizes: Sequence[tuple[int, ...]], processor: Any) -> float:
    """Return how many pixels of slices of these sizes show the head, from the images that the model sees of them."""
    if "pixel_mask" in batch:
        in_head = batch["pixel_mask"].float()
    else:
        black = torch.zeros(batch["pixel_values"].shape[1])
        if processor.do_normalize:
            black = -torch.tensor(processor.image_mean) / torch.tensor(processor.image_std)
        in_head = (batch["pixel_values"] > black[:, None, None] + 1e-3).any(dim=1).float()
    areas = torch.tensor([height * width for height, width in sizes])
    if "crop_boxes" in batch:
        x_min, y_min, x_max, y_max = batch["crop_boxes"].T
        areas = (x_max - x_min) * (y_max - y_min)
    return float((in_head.mean(dim=(1, 2)) * areas).sum())


__all__ = ["PatientScores", "score_patients", "why_no_volumes"]
