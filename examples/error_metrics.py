"""Where a model errs on the images of a data set: overlap, boundaries, calibration, lesions."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from error_plots import evenly_spread
from scipy import ndimage
from tqdm import tqdm
from transformers import BatchFeature

from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.ensemble_sam2unet import Sam2UNetEnsemble
from sam2unet_hf.finetuning.case_names import case_names
from sam2unet_hf.finetuning.plots import grey_values
from sam2unet_hf.metrics.distances import bounding_box
from sam2unet_hf.metrics.volume_functional import count_voxels, dice
from sam2unet_hf.overlays import image_to_show
from sam2unet_hf.training import ImageRows, SegmentationTransform
from sam2unet_hf.training.rows import size_of


THRESHOLD = 0.5  # a probability above it counts as predicted
FOUND_IN = ("neither", "prediction only", "truth only", "both")


class Calibration:
    """Pixels, probabilities and reference in bins of equal width over [0, 1], added image by image."""

    def __init__(self, bins: int = 15):
        self.sums = np.zeros((3, bins))

    def add(self, probabilities: np.ndarray, reference: np.ndarray) -> None:
        """Add the pixels of an image: probabilities in [0, 1] and booleans of the same shape."""
        bins = self.sums.shape[1]
        index = np.minimum((probabilities.ravel() * bins).astype(int), bins - 1)
        for total, weights in zip(self.sums, (None, probabilities.ravel(), reference.ravel()), strict=True):
            total += np.bincount(index, weights, minlength=bins)

    def curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return pixels, mean probability and share of tumour of each bin, not-a-number where there are no pixels."""
        pixels, probabilities, positives = self.sums
        filled = np.where(pixels > 0, pixels, np.nan)
        return pixels, probabilities / filled, positives / filled

    def error(self) -> float:
        """Return the expected calibration error, in [0, 1]: the mean over the pixels of the gap of their bin."""
        pixels, probabilities, positives = self.sums
        return float(np.abs(probabilities - positives).sum() / pixels.sum()) if pixels.any() else math.nan


def box_around(mask: np.ndarray, margin: int) -> tuple[slice, slice]:
    """Return the part of an image that holds a mask with a margin; all of it if the mask is empty."""
    if not mask.any():
        return slice(None), slice(None)
    rows, columns = (slice(max(part.start - margin, 0), part.stop + margin) for part in bounding_box(mask))
    return rows, columns


def contrast_to_noise(grey: np.ndarray, reference: np.ndarray, counted: np.ndarray, width: int = 5) -> float:
    """Return how far a tumour stands out: mean less mean of a ring around it, over standard deviation of the ring.

    The ring is the `counted` pixels, such as those of the head, up to `width` pixels from the tumour. The result is
    not-a-number if there is no tumour, or no ring that varies.
    """
    if not reference.any():
        return math.nan
    ring = grey[(ndimage.distance_transform_edt(~reference) <= width) & ~reference & counted].astype(float)
    if not ring.size or ring.std() == 0:
        return math.nan
    return float((grey[reference].mean() - ring.mean()) / ring.std())


def boundary_distances(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float] = (1, 1)
) -> tuple[float, float]:
    """Return average symmetric surface distance and 95 % Hausdorff distance, not-a-number if a mask is empty.

    They are in the unit of the spacing, the height and width of a pixel. The surface of a mask is its pixels with an
    edge in common with a pixel outside or with the border of the image. The package's `hausdorff_distance_95` does not
    serve, since it takes volumes, and in a volume of one slice each voxel lies at the border.
    """
    if not reference.any() or not prediction.any():
        return math.nan, math.nan
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (reference, prediction)]
    to_reference, to_prediction = (ndimage.distance_transform_edt(~surface, sampling=spacing) for surface in surfaces)
    directions = (to_prediction[surfaces[0]], to_reference[surfaces[1]])
    return float(np.concatenate(directions).mean()), float(max(np.percentile(way, 95) for way in directions))


def unmatched_lesions(mask: np.ndarray, other: np.ndarray) -> tuple[int, list[dict[str, float]]]:
    """Return the number of connected components of a mask, corners included, and those that miss another mask.

    Of the reference and the prediction these are missed lesions, of the prediction and the reference false ones.
    """
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    numbers = np.setdiff1d(np.arange(1, count + 1), labels[other])
    centres = ndimage.center_of_mass(mask, labels, numbers) if numbers.size else []
    sizes = np.bincount(labels.ravel())[numbers].tolist()
    return count, [
        {"pixels": size, "centre_row": float(row), "centre_column": float(column)}
        for size, (row, column) in zip(sizes, centres, strict=True)
    ]


def score_region(
    probability: np.ndarray,
    reference: np.ndarray,
    valid: np.ndarray,
    grey: np.ndarray,
    spacing_mm: Sequence[float] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the record of one region of an image, and its missed and false lesions.

    `valid` are the pixels that are scored, and `grey` is 0 outside the head. `spacing_mm` is height and width of a
    pixel, for distances in mm and areas in mm2, or `None` for pixels.
    """
    reference, prediction = reference & valid, (probability > THRESHOLD) & valid
    head_mask = valid & (grey != 0)
    counts = count_voxels(prediction[None], reference[None])
    calibration = Calibration()
    calibration.add(probability[head_mask], reference[head_mask])
    surface_distance, hausdorff = boundary_distances(reference, prediction, spacing_mm or (1, 1))
    lesions, missed = unmatched_lesions(reference, prediction)
    predicted_lesions, false = unmatched_lesions(prediction, reference)
    unit, pixel_mm2 = ("mm", math.prod(spacing_mm)) if spacing_mm else ("px", None)
    record = {
        "found_in": FOUND_IN[2 * (counts.reference > 0) + (counts.predicted > 0)],
        "truth_pixels": counts.reference,
        "predicted_pixels": counts.predicted,
        "true_positive_pixels": counts.true_positive,
        "false_positive_pixels": counts.predicted - counts.true_positive,
        "false_negative_pixels": counts.reference - counts.true_positive,
        **({"truth_mm2": counts.reference * pixel_mm2} if spacing_mm else {}),
        "dice": dice(counts),
        "contrast": contrast_to_noise(grey, reference, head_mask),
        "calibration_error": calibration.error(),
        f"surface_distance_{unit}": surface_distance,
        f"hausdorff95_{unit}": hausdorff,
        "lesions": lesions,
        "missed_lesions": len(missed),
        "predicted_lesions": predicted_lesions,
        "false_lesions": len(false),
    }
    unmatched = [{"kind": "missed", **lesion} for lesion in missed] + [{"kind": "false", **lesion} for lesion in false]
    if spacing_mm:
        unmatched = [{**lesion, "mm2": lesion["pixels"] * pixel_mm2} for lesion in unmatched]
    return record, unmatched


@dataclass(eq=False)
class Analysis:
    """Scores of a model on a data set; [`run`] adds a record per image and region, and missed and false lesions.

    `transform` tells which column holds the images, and reads the masks; images go through the processors of the
    ensemble.
    """

    ensemble: Sam2UNetEnsemble
    rows: ImageRows
    transform: SegmentationTransform
    spacing_mm: Sequence[float] | None = None

    def __post_init__(self):
        self.records: list[dict[str, Any]] = []
        self.lesions: list[dict[str, Any]] = []
        self.unit = "mm" if self.spacing_mm else "px"
        self.regions = list(self.ensemble.regions)
        self.names = case_names(self.rows)
        self.calibration = {region: Calibration() for region in self.regions}

    def run(self, batch_size: int, max_images: int | None) -> None:
        """Score the images, or this many of them, evenly spread over the rows."""
        chosen = evenly_spread(len(self.rows), max_images or len(self.rows)).tolist()
        images = tqdm(self.read(chosen, batch_size), total=len(chosen), desc="Looking for errors", unit="image")
        for about, image, probabilities, references, valid in images:
            grey = grey_values(image)
            head_mask = valid & (grey != 0)
            for region, probability, reference in zip(self.regions, probabilities, references, strict=True):
                self.calibration[region].add(probability[head_mask], reference[head_mask])
                record, lesions = score_region(probability, reference, valid, grey, self.spacing_mm)
                self.records.append({**about, "region": region, **record})
                self.lesions += [{**about, "region": region, **lesion} for lesion in lesions]

    def read(self, indices: Sequence[int], batch_size: int = 1) -> Iterator[tuple[Any, ...]]:
        """Segment images, and yield what is known of each, its own slice, probabilities, masks and valid pixels."""
        for start in range(0, len(indices), batch_size):
            batch = self.rows[indices[start : start + batch_size]]
            images = batch["image"]
            found = self.ensemble.predict(functools.partial(self.prepare, batch), list(map(size_of, images)))
            known = [name for name in ("case_id", "slice_index", "grade") if name in batch]
            for number, (index, image) in enumerate(zip(indices[start:], images, strict=False)):
                about = {"index": index, "image": self.names[index]} | {name: batch[name][number] for name in known}
                label_ids = self.transform.to_label_ids(batch["mask"][number])
                masks, valid = self.ensemble.models[0].region_masks(label_ids[None])
                values = found[number].mean(dim=0).cpu().numpy()
                yield about, self.rows.own_slice(image), values, masks[0].bool().numpy(), valid[0, 0].numpy()

    def prepare(self, batch: Mapping[str, Any], processor: Sam2UNetImageProcessor) -> BatchFeature:
        """Prepare the images of a batch of rows for the member that has this processor."""
        return SegmentationTransform(processor, self.transform.image_column).prepare_images(batch)

    def of_region(self, region: str) -> list[dict[str, Any]]:
        """Return the records of one region."""
        return [record for record in self.records if record["region"] == region]

    def column(self, region: str, name: str, with_tumour: bool = False) -> np.ndarray:
        """Return one value of the records of a region, of all or of those whose reference holds it."""
        records = self.of_region(region)
        return np.array([record[name] for record in records if record["truth_pixels"] or not with_tumour])

    def known(self, region: str, name: str) -> np.ndarray:
        """Return one value of the records of a region, of those where it is a number."""
        values = self.column(region, name)
        return values[~np.isnan(values)]

    def example(self, title: str, record: dict[str, Any]) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
        """Segment an image again; return a title, and what to show, reference and prediction cropped to the head."""
        ((_, image, probabilities, references, valid),) = self.read([record["index"]])
        number = self.regions.index(record["region"])
        reference, prediction = references[number] & valid, (probabilities[number] > THRESHOLD) & valid
        box = box_around((grey_values(image) != 0) | reference | prediction, margin=4)
        name = record["image"] if len(record["image"]) <= 26 else f"{record['image'][:12]}…{record['image'][-13:]}"
        heading = f"{title}: Dice {record['dice']:.2f}\n{name}"
        return heading, image_to_show(image, self.rows.image_columns)[box], reference[box], prediction[box]
