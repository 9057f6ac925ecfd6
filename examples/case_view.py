"""One segmented patient: its volumes, its slices with the most tumour, and pictures of slices."""

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from sam2unet_hf.cases_sam2unet import BratsCase
from sam2unet_hf.finetuning.plots import COLOURS
from sam2unet_hf.head_sam2unet import bounding_box
from sam2unet_hf.lesions import Line
from sam2unet_hf.scans_sam2unet import MODALITIES, PLANES, pixel_size_mm, take_slice, to_grey
from sam2unet_hf.volume import Sam2UNetVolumePipeline, VolumeSegmentation


PLANE_ORDER = ("axial", "coronal", "sagittal")
# The letters at the left, right, top and bottom of `take_slice`.
ORIENTATION_LABELS = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}
REGION_COLOURS = (COLOURS[2], COLOURS[0], COLOURS[1], *COLOURS[3:])  # the outermost region has the lightest
PICTURE_PIXELS = 480  # longest side of the head
PICTURE_MARGIN = 3  # voxels around the head


@dataclass(eq=False)
class CaseView:
    """One segmented patient, with volumes of shape `(left, posterior, superior)`.

    Attributes:
        grey: 8-bit volume of each modality that there is.
        modality: The one to show behind masks: FLAIR if the model takes it, else the first that it takes.
        reference: Label ids of the expert's mask, or `None` if the case has none.
    """

    name: str
    segmentation: VolumeSegmentation
    grey: dict[str, np.ndarray]
    modality: str
    reference: np.ndarray | None = None

    @property
    def regions(self) -> dict[str, list[int]]:
        """The label ids of each region."""
        return self.segmentation.regions

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Voxel size along the three axes."""
        return self.segmentation.scan.spacing_mm

    @functools.cached_property
    def prediction(self) -> np.ndarray:
        """Label ids that the model found."""
        return self.segmentation.scan.from_file_grid(self.segmentation.label_map)

    def probability(self, region: str) -> np.ndarray:
        """Return the probabilities of a region, in [0, 1], if the case was segmented with them."""
        number = list(self.regions).index(region)
        return self.segmentation.scan.from_file_grid(self.segmentation.probabilities[number])

    def masks(self, region: str, *at: Any) -> tuple[np.ndarray | None, np.ndarray]:
        """Return a region in the reference, `None` without one, and in the prediction, or in `crop` of them `at`."""
        reference, prediction = (
            None if labels is None else np.isin(self.crop(labels, *at) if at else labels, self.regions[region])
            for labels in (self.reference, self.prediction)
        )
        return reference, prediction

    @functools.cached_property
    def tight_head_box(self) -> tuple[slice, ...]:
        """The smallest box around the head, to which slices are cropped; the whole volume if all of it is 0."""
        head = np.any([volume != 0 for volume in self.grey.values()], axis=0)
        return bounding_box(head) if head.any() else tuple(slice(0, size) for size in head.shape)

    def head_box(self, margin: int) -> tuple[slice, ...]:
        """Return the box around the head with a margin of voxels; its far ends may lie beyond the volume."""
        return tuple(slice(max(part.start - margin, 0), part.stop + margin) for part in self.tight_head_box)

    def crop(self, volume: np.ndarray, plane: str, index: int, margin: int = 4) -> np.ndarray:
        """Return one slice, cropped to the head with a margin of voxels."""
        box = list(self.head_box(margin))
        box[PLANES[plane]] = slice(None)
        return take_slice(volume[tuple(box)], plane, index)


def segment_case(segment: Sam2UNetVolumePipeline, case: BratsCase, **options: Any) -> CaseView:
    """Segment a case by the pipeline with its options, and read the modalities and the expert's mask that it has."""
    # Read all files before the segmentation, which takes minutes. They must fit the first scan that is segmented.
    names = list(dict.fromkeys([*segment.modalities, *(name for name in MODALITIES if name in case.files)]))
    scans = dict(zip(names, case.read_images(names), strict=True))
    reference = case.read_mask(same_grid_as=scans[names[0]]).voxels if "seg" in case.files else None
    segmentation = segment(case, **options)
    grey = {name: to_grey(scans[name]) for name in MODALITIES if name in scans}
    modality = "flair" if "flair" in segment.modalities else segment.modalities[0]
    return CaseView(case.case_id, segmentation, grey, modality, reference)


def share_head_box(views: Sequence[CaseView]) -> None:
    """Crop the slices of several patients or time points on one grid to the same box."""
    boxes = [view.tight_head_box for view in views]
    for view in views:
        view.tight_head_box = tuple(
            slice(min(part.start for part in parts), max(part.stop for part in parts))
            for parts in zip(*boxes, strict=True)
        )


def largest_slice(plane: str, *masks: np.ndarray | None) -> int:
    """Return the slice of a plane with most of the first mask that is not empty, or else the one in the middle."""
    volumes = [mask for mask in masks if mask is not None]
    marked = next((volume for volume in volumes if volume.any()), None)
    if marked is None:
        return volumes[0].shape[PLANES[plane]] // 2
    return int(np.count_nonzero(np.moveaxis(marked, PLANES[plane], 0), axis=(1, 2)).argmax())


def region_colours(regions: Iterable[str]) -> dict[str, str]:
    """Return a colour for each region; from the sixth on they come again."""
    return dict(zip(regions, itertools.cycle(REGION_COLOURS)))


def draw_slice(
    view: CaseView,
    labels: np.ndarray,
    plane: str,
    index: int,
    modality: str,
    regions: Sequence[str],
    opacity: float,
    lines: Sequence[Line] = (),
) -> np.ndarray:
    """Draw label ids over a slice of a scan, the innermost region on top, as an RGB picture at one scale in mm.

    The lines are those of an axial slice, such as the diameters of a lesion.
    """
    height_mm, width_mm = pixel_size_mm(view.spacing_mm, plane)
    grey = np.ascontiguousarray(view.crop(view.grey[modality], plane, index, PICTURE_MARGIN))
    scale = PICTURE_PIXELS / max(
        (part.stop - part.start) * mm for part, mm in zip(view.head_box(PICTURE_MARGIN), view.spacing_mm, strict=True)
    )
    size = (round(grey.shape[1] * width_mm * scale), round(grey.shape[0] * height_mm * scale))
    picture = Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR).convert("RGB")
    labels = view.crop(labels, plane, index, PICTURE_MARGIN)
    colours = region_colours(view.regions)
    rgba = np.zeros((*labels.shape, 4), np.uint8)
    for region in sorted(regions, key=lambda region: -len(view.regions[region])):
        rgba[np.isin(labels, view.regions[region])] = (*ImageColor.getrgb(colours[region]), round(255 * opacity))
    overlay = Image.fromarray(rgba).resize(size, Image.Resampling.NEAREST)
    picture.paste(overlay, (0, 0), overlay)
    corner = [part.start for part in view.head_box(PICTURE_MARGIN)[:2]]
    for line in lines:
        ends = [
            tuple((np.subtract(end, corner) + 0.5) * np.divide(picture.size, labels.shape[::-1]))  # from centres
            for end in line
        ]
        draw = ImageDraw.Draw(picture)
        draw.line(ends, fill="black", width=4)
        draw.line(ends, fill="white", width=2)
    draw_orientation_labels(picture, ORIENTATION_LABELS[plane])
    return np.asarray(picture)


def draw_orientation_labels(picture: Image.Image, letters: str) -> None:
    """Write which side of the patient lies left, right, at the top and at the bottom."""
    draw = ImageDraw.Draw(picture)
    middle = (picture.width // 2, picture.height // 2)
    places = [(4, middle[1]), (picture.width - 4, middle[1]), (middle[0], 3), (middle[0], picture.height - 3)]
    for letter, place, anchor in zip(letters, places, ("lm", "rm", "ma", "md"), strict=True):
        draw.text(place, letter, fill="white", font_size=15, anchor=anchor, stroke_width=1, stroke_fill="black")
