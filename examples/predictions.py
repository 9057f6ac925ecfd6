"""Predicted label maps, their files, and the cases that `predictions.png` shows."""

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from case_names import case_names
from PIL import Image
from plots import ShownCase
from tqdm import tqdm
from transformers import PreTrainedModel

from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.training import SegmentationTransform


@torch.inference_mode()
def predict_label_maps(
    model: PreTrainedModel, processor: Sam2UNetImageProcessor, images: Sequence[Image.Image]
) -> list[np.ndarray]:
    """Segment images as a user of the checkpoint does; return label ids of shape `(height, width)` of each image."""
    inputs = processor(images, return_tensors="pt").to(model.device)
    sizes = [(image.height, image.width) for image in images]
    maps = processor.post_process_semantic_segmentation(model.eval()(**inputs), target_sizes=sizes)
    return [label_map.cpu().numpy() for label_map in maps]


def write_predictions(
    folder: Path, rows: datasets.Dataset, transform: SegmentationTransform, model: PreTrainedModel, batch_size: int
) -> None:
    """Write the predicted label map of every row as PNG, in the label ids of the masks, named after its case."""
    folder.mkdir(exist_ok=True)
    names = case_names(rows)
    for start in tqdm(range(0, len(rows), batch_size), desc="Writing predictions", unit="batch"):
        images = rows[start : start + batch_size][transform.image_column]
        maps = predict_label_maps(model, transform.processor, images)
        for name, label_map in zip(names[start : start + batch_size], maps, strict=True):
            for original_id, label_id in transform.label_mapping.items():
                label_map = np.where(label_map == label_id, original_id, label_map)
            dtype = np.uint8 if label_map.max() < 256 else np.uint16
            Image.fromarray(label_map.astype(dtype)).save(folder / f"{name}.png")


def choose_cases(
    rows: datasets.Dataset, dice: np.ndarray, transform: SegmentationTransform, model: PreTrainedModel
) -> list[ShownCase]:
    """Choose the best, the median and the worst image by Dice, one per row, of those whose reference has a region."""
    region_ids = [label_id for label_ids in model.config.regions.values() for label_id in label_ids]

    def reference(index: int) -> np.ndarray:
        return transform.to_label_ids(rows[index][transform.mask_column]).numpy()

    foreground = [index for index in range(len(rows)) if np.isin(reference(index), region_ids).any()]
    ranked = sorted(foreground or range(len(rows)), key=lambda index: -dice[index])
    names = case_names(rows)
    cases = []
    for rank, index in (("best", ranked[0]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[-1])):
        image = rows[index][transform.image_column]
        (prediction,) = predict_label_maps(model, transform.processor, [image])
        cases.append(ShownCase(f"{rank}: Dice {dice[index]:.3f}\n{names[index]}", image, reference(index), prediction))
    return cases
