"""Predicted label maps, their files, and the cases that `predictions.png` shows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from sam2unet_hf.finetuning.case_names import case_names
from sam2unet_hf.finetuning.plots import ShownCase
from sam2unet_hf.overlays import image_to_show
from sam2unet_hf.pictures import write_label_map
from sam2unet_hf.training import ImageRows, SegmentationTransform
from sam2unet_hf.training.rows import size_of


@torch.inference_mode()
def predict_label_maps(
    model: PreTrainedModel, transform: SegmentationTransform, batch: Mapping[str, list[Any]]
) -> list[np.ndarray]:
    """Segment a batch of rows as a user of the checkpoint does; return label ids `(height, width)` of each image."""
    inputs = transform.prepare_images(batch).to(model.device)
    sizes = [size_of(image) for image in batch["image"]]
    maps = transform.processor.post_process_semantic_segmentation(model.eval()(**inputs), target_sizes=sizes)
    return [label_map.cpu().numpy() for label_map in maps]


def write_predictions(
    folder: Path, rows: ImageRows, transform: SegmentationTransform, model: PreTrainedModel, batch_size: int
) -> None:
    """Write the predicted label map of every row as PNG, in the label ids of the masks, named after its case."""
    folder.mkdir(exist_ok=True)
    names = case_names(rows)
    # The largest value of several, which of grey levels is white. The background is 0 in any case.
    values_of = {label_id: value for value, label_id in sorted(transform.label_mapping.items()) if label_id}
    for start in tqdm(range(0, len(rows), batch_size), desc="Writing predictions", unit="batch"):
        maps = predict_label_maps(model, transform, rows[start : start + batch_size])
        for name, label_map in zip(names[start : start + batch_size], maps, strict=True):
            written = label_map
            for label_id, value in sorted(values_of.items()):
                written = np.where(label_map == label_id, value, written)
            write_label_map(written, folder / f"{name}.png")


def name_ranks(ranked: Sequence[int]) -> dict[str, int]:
    """Return the best, the median and the worst of some that are ordered from the best to the worst, each once."""
    named = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}
    return {rank: named[rank] for rank in (("best",), ("best", "worst"), tuple(named))[min(len(ranked), 3) - 1]}


def rows_to_show(rows: ImageRows, dice: np.ndarray, transform: SegmentationTransform) -> dict[int, str]:
    """Choose the best, the median and the worst image by Dice of those whose reference has a region.

    Returns:
        Number of the row -> its title in a picture.
    """
    region_ids = [label_id for label_ids in transform.processor.regions.values() for label_id in label_ids]
    references = (transform.to_label_ids(rows.mask(index)).numpy() for index in range(len(rows)))
    choice = [index for index, reference in enumerate(references) if np.isin(reference, region_ids).any()]
    ranked = sorted(choice or range(len(rows)), key=lambda index: -dice[index])
    names = case_names(rows)
    return {index: f"{rank}: Dice {dice[index]:.3f}\n{names[index]}" for rank, index in name_ranks(ranked).items()}


def show_cases(
    rows: ImageRows, titles: Mapping[int, str], transform: SegmentationTransform, model: PreTrainedModel
) -> list[ShownCase]:
    """Segment some rows, number -> title, for a picture."""
    cases = []
    for index, title in titles.items():
        batch = rows[[index]]
        (prediction,) = predict_label_maps(model, transform, batch)
        image = image_to_show(rows.own_slice(batch["image"][0]), rows.image_columns)
        cases.append(ShownCase(title, image, transform.to_label_ids(rows.mask(index)).numpy(), prediction))
    return cases
