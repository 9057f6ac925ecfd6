"""From a patient's scans to a label volume: SAM2-UNet slice by slice."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .cases_sam2unet import BratsCase, read_scans
from .clean_up_sam2unet import CleanUp
from .ensemble_sam2unet import Sam2UNetEnsemble
from .image_processing_sam2unet import Sam2UNetImageProcessor
from .images_sam2unet import count_channels
from .labels_sam2unet import check_enhancing_label, enhancing_label_of
from .modeling_sam2unet import Sam2UNetForSemanticSegmentation
from .scans_sam2unet import (
    PLANES,
    Volume,
    check_modalities,
    foreground_slices,
    head_box,
    take_slice,
    to_grey,
    write_nifti,
)


@dataclass(frozen=True, eq=False)
class VolumeSegmentation:
    """The tumour of one patient.

    Args:
        label_map: Label ids on the grid of the input file, of its shape; `uint8`, or larger if an id needs it. 0 is
            the background.
        regions: Region name -> the label ids it joins.
        scan: The first scan that was segmented, with `voxels`, `affine` and `lps_affine`.
        probabilities: Of shape `(regions, *label_map.shape)`, float32 in [0, 1], if they were asked for. A clean-up
            leaves them as they are.
        disagreement: Standard deviation of the probabilities over members, mirror images and planes, of the same
            shape, float32 in [0, 0.5], if it was asked for.
    """

    label_map: np.ndarray
    regions: dict[str, list[int]]
    scan: Volume
    probabilities: np.ndarray | None = None
    disagreement: np.ndarray | None = None

    def region(self, name: str) -> np.ndarray:
        """Return the voxels of a region as booleans, on the grid of the input file."""
        return np.isin(self.label_map, self.regions[name])

    @property
    def volumes_ml(self) -> dict[str, float]:
        """Volume of each region in millilitres."""
        voxel_ml = abs(np.linalg.det(self.scan.affine[:3, :3])) / 1000
        return {name: float(np.count_nonzero(self.region(name)) * voxel_ml) for name in self.regions}

    @property
    def largest_slice(self) -> int | None:
        """Index of the axial slice with the most tumour, counted from the feet up; `None` without tumour."""
        pixels = np.count_nonzero(self.scan.from_file_grid(self.label_map), axis=(0, 1))
        return int(pixels.argmax()) if pixels.any() else None

    def save(self, path: str | os.PathLike, enhancing_label: int | None = None) -> None:
        """Write the label map as NIfTI on the grid of the scan, whole or not at all.

        Of the header of the scan the file keeps geometry and units, but no texts, which may name the patient.

        Args:
            path: Ends in `.nii` or `.nii.gz`.
            enhancing_label: Label of enhancing tumour, our id 3: 3 as in BraTS from 2023 on, 4 as before. Default: the
                one that masks of the file's name have, 4 for `BraTS20_Training_001_seg.nii.gz`, unless regions have a
                label 4 of their own.

        Raises:
            ValueError: If the path has another ending, the label is another, or 4 is a label of its own.
        """
        if enhancing_label is None:
            has_own = any(4 in label_ids for label_ids in self.regions.values())
            enhancing_label = 3 if has_own else enhancing_label_of(Path(path).name)
        check_enhancing_label(enhancing_label, self.regions)
        label_map = np.where(self.label_map == 3, np.uint8(enhancing_label), self.label_map)
        write_nifti(path, label_map, self.scan.affine, self.scan.header)

    def save_probabilities(self, path: str | os.PathLike, region: str) -> None:
        """Write the probabilities of a region as NIfTI, float32, on the grid of the scan and as [`save`] does.

        Raises:
            ValueError: If they were not asked for, or the path has another ending than `.nii` and `.nii.gz`.
        """
        if self.probabilities is None:
            raise ValueError("There are no probabilities. Segment with `return_probabilities=True`.")
        self._save_region(path, self.probabilities, region)

    def save_disagreement(self, path: str | os.PathLike, region: str) -> None:
        """Write the disagreement on a region as NIfTI, as [`save_probabilities`] does.

        Raises:
            ValueError: If it was not asked for, or the path has another ending than `.nii` and `.nii.gz`.
        """
        if self.disagreement is None:
            raise ValueError("There is no disagreement. Segment with `return_disagreement=True`.")
        self._save_region(path, self.disagreement, region)

    def _save_region(self, path: str | os.PathLike, values: np.ndarray, region: str) -> None:
        index = list(self.regions).index(region)
        write_nifti(path, values[index], self.scan.affine, self.scan.header)


class PlaneAverage:
    """Mean and standard deviation of probabilities over planes, which are added one by one."""

    def __init__(self) -> None:
        self.planes = 0

    def add(self, mean: np.ndarray, variance: np.ndarray | None) -> None:
        """Add the mean and, if it is asked for, the variance of the maps of a plane, as many as of any other.

        The arrays are kept and changed, because a second copy of them could fill the memory.
        """
        if not self.planes:
            self.total, self.variances = mean, variance
        else:
            if self.variances is not None and variance is not None:
                # How two samples are merged: https://doi.org/10.2307/2683386
                difference = mean - self.total / self.planes
                self.variances += variance + difference**2 * (self.planes / (self.planes + 1))
            self.total += mean
        self.planes += 1

    def finish(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the mean, and the standard deviation over the maps of all planes if it is asked for."""
        self.total /= self.planes
        if self.variances is not None:
            self.variances /= self.planes
            np.sqrt(self.variances, out=self.variances)
        return self.total, self.variances


class Sam2UNetVolumePipeline:
    """Segment a patient's scans slice by slice, with the intensities that the data set builder gives the model.

    Scans may have any orientation and spacing. Slices in which all scans are background become background unseen. A
    processor with `head_crop_size` crops every slice to one window about the head of the whole scans, and nothing is
    found outside the head.

    Of several models, the members of an ensemble, the probabilities are averaged. A clean-up then says what is kept.

    Args:
        model: The model, or the models of an ensemble.
        processor: Its image processor, which says of how many `neighbours` a slice comes with; one per model.
        modalities: Those that the model was trained on, in the order of the channels. Default: those that the
            processor names, which it does after training with `run_segmentation.py` on scans.
        clean_up: Rules for thresholds and for what is too small to be kept. Default: none, that is 0.5 and nothing.

    Attributes:
        ensemble: The models with their processors.
        clean_up: The rules, or `None`.

    Raises:
        ValueError: If neither `modalities` nor the processor names them, if they are not known or not distinct, if
            models differ in regions, modalities, neighbours or plane, or if there are rules for other regions.

    Example:
        ```python
        >>> from sam2unet_hf.volume import Sam2UNetVolumePipeline

        >>> segment = Sam2UNetVolumePipeline.from_pretrained("runs/phantom")  # doctest: +SKIP
        >>> found = segment("BraTS20_Training_001")  # doctest: +SKIP
        >>> found.volumes_ml  # doctest: +SKIP
        {'WT': 83.213}
        >>> found.save("BraTS20_Training_001_prediction.nii.gz")  # doctest: +SKIP

        ```
    """

    def __init__(
        self,
        model: Sam2UNetForSemanticSegmentation | Sequence[Sam2UNetForSemanticSegmentation],
        processor: Sam2UNetImageProcessor | Sequence[Sam2UNetImageProcessor],
        modalities: Sequence[str] | None = None,
        clean_up: CleanUp | None = None,
    ):
        self.ensemble = Sam2UNetEnsemble(model, processor, clean_up=clean_up)
        self.clean_up = clean_up
        named = modalities or self.processor.modalities
        if not named:
            raise ValueError(
                "The checkpoint does not say which modalities it segments. If it was trained on scans, pass "
                "`modalities` (`--modalities`), such as ['flair'] or ['t1ce', 't2', 'flair'], in the order of its "
                "training. If on pictures, segment such by `python -m sam2unet_hf.pictures`."
            )
        check_modalities(named)
        num_channels, expected = (
            count_channels(named, self.processor.neighbours),
            self.model.config.backbone_config.num_channels,
        )
        given = {processor.num_channels for processor in self.ensemble.processors}
        if {num_channels, *given} != {expected}:
            raise ValueError(
                f"`modalities` {list(named)} with {self.processor.neighbours} neighbours on each side make "
                f"{num_channels} channels, the image processor gives {', '.join(map(str, sorted(given)))}, and the "
                f"model takes {expected}. Pass the modalities and the image processor of its training."
            )
        self.modalities = list(named)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike,
        modalities: Sequence[str] | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> "Sam2UNetVolumePipeline":
        """Load a model and its processor, or all of an ensemble, with the clean-up that lies beside.

        An ensemble is a folder or repository whose `ensemble.json` lists the folders of its members, such as
        `{"members": ["fold_0", "fold_1"]}`, each of which holds a model and its processor. The clean-up is
        `clean_up.json` beside the weights of a single model or beside `ensemble.json`; those of members do not count.

        Args:
            model: Hub id or folder.
            modalities: As in the constructor.
            device: Where to run. Default: a GPU if there is one.
            **kwargs: Arguments of the model's `from_pretrained`, such as `dtype=torch.bfloat16` and `revision`; those
                of downloads are the processor's too. With `device_map` the model stays where that puts it.

        Raises:
            OSError: As the `from_pretrained` of model and processor, or if there are folds without `ensemble.json`.
            ValueError: As these and the constructor, if `ensemble.json` or `clean_up.json` is wrong, or if there are
                both `device` and `device_map`.
        """
        ensemble = Sam2UNetEnsemble.from_pretrained(model, device, **kwargs)
        return cls(ensemble.models, ensemble.processors, modalities, ensemble.clean_up)

    @property
    def model(self) -> Sam2UNetForSemanticSegmentation:
        """The model, the first one of an ensemble."""
        return self.ensemble.models[0]

    @property
    def processor(self) -> Sam2UNetImageProcessor:
        """The image processor of `model`."""
        return self.ensemble.processors[0]

    def check_disagreement(self, planes: Sequence[str] | None, flips: bool) -> None:
        """Check that there are probabilities to disagree.

        Args:
            planes: As in [`__call__`].
            flips: As there.

        Raises:
            ValueError: If one model sees every slice once.
        """
        if len(self.ensemble.models) == 1 and len(planes or [""]) == 1 and not flips:
            raise ValueError(
                "One model that sees every slice once has nothing to disagree with. Average over mirror images "
                "(`flips`) or several `planes`, or take an ensemble."
            )

    @torch.inference_mode()
    def __call__(
        self,
        case: str | os.PathLike | BratsCase | Mapping[str, str | os.PathLike],
        planes: Sequence[str] | None = None,
        flips: bool = False,
        batch_size: int = 8,
        threshold: float | None = None,
        return_probabilities: bool = False,
        progress: bool = True,
        return_disagreement: bool = False,
        clean_up: bool = True,
    ) -> VolumeSegmentation:
        """Segment one patient by the mean of the probabilities over members of an ensemble, mirror images and planes.

        Args:
            case: Folder of a BraTS case, a case of [`~cases_sam2unet.find_cases`], the path of a scan if the model
                takes one modality, or a path for each modality.
            planes: Planes to cut, of axial, coronal and sagittal. Default: the one that the processor names, or axial.
            flips: Show the models the mirror images of slices (horizontal, vertical, both) too.
            batch_size: Slices at once, mirror images not counted.
            threshold: A voxel belongs to a region if its probability is above this. Default: that of the region in the
                clean-up, or else 0.5. One that is given takes the place of all of these; what is too small by the
                clean-up goes all the same.
            return_probabilities: Keep the probabilities.
            progress: Show a progress bar.
            return_disagreement: Keep the standard deviation of all that is averaged.
            clean_up: Apply the clean-up, if the pipeline has one.

        Raises:
            ScanError: If a scan is missing, damaged or on another grid than the first.
            FileNotFoundError: If there is no case in a folder.
            ValueError: If an argument is off, there is more than one case in a folder, or a disagreement is asked for
                where nothing is averaged.
        """
        planes = [self.processor.plane or "axial"] if planes is None else planes
        if not planes or not set(planes) <= set(PLANES) or len(set(planes)) < len(planes):
            raise ValueError(f"`planes` must name each of {', '.join(PLANES)} at most once, got {list(planes)}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"`threshold` must be a probability in [0, 1], got {threshold}.")
        if return_disagreement:
            self.check_disagreement(planes, flips)
        scans = read_scans(case, self.modalities)
        greys = [to_grey(scan) for scan in scans]
        regions = self.ensemble.regions
        indices = {plane: foreground_slices(greys, plane) for plane in planes}
        average, n_slices = PlaneAverage(), sum(map(len, indices.values()))
        with tqdm(total=n_slices, desc=scans[0].name.split(": ")[0], unit="slice", disable=not progress) as bar:
            for plane in planes:
                box = head_box(greys, plane)
                mean = np.zeros((len(regions), *greys[0].shape), np.float32)
                variance = np.zeros_like(mean) if return_disagreement else None
                for start in range(0, len(indices[plane]), batch_size):
                    batch = indices[plane][start : start + batch_size]
                    images = self._take_images(greys, plane, batch, indices[plane])
                    for index, maps in zip(batch, self._predict(images, box, flips), strict=True):
                        put_slice(mean, plane, index, maps.mean(dim=0))
                        if variance is not None:
                            put_slice(variance, plane, index, maps.var(dim=0, correction=0))
                    bar.update(len(batch))
                average.add(mean, variance)
        total, deviation = average.finish()
        if clean_up and self.clean_up is not None:
            masks = self.clean_up.apply(total, regions, scans[0].spacing_mm, threshold)
            label_map = make_label_map(total, self.processor, 0, masks)
        else:
            label_map = make_label_map(total, self.processor, 0.5 if threshold is None else threshold)
        on_grid = np.ascontiguousarray(scans[0].to_file_grid(label_map))
        kept = [
            None if volumes is None else np.stack([scans[0].to_file_grid(region) for region in volumes])
            for volumes in (total if return_probabilities else None, deviation)
        ]
        return VolumeSegmentation(on_grid, regions, scans[0], *kept)

    def _take_images(
        self, greys: Sequence[np.ndarray], plane: str, batch: Sequence[int], of_head: Sequence[int]
    ) -> torch.Tensor:
        """Cut a batch of slices with their neighbours, of shape `(slices, channels, height, width)`.

        A neighbour beyond the slices of the head is the last of them, as in training, which has no others.
        """
        offsets = range(-self.processor.neighbours, self.processor.neighbours + 1)
        images = [
            [take_slice(grey, plane, min(max(index + i, of_head[0]), of_head[-1])) for grey in greys for i in offsets]
            for index in batch
        ]
        return torch.from_numpy(np.stack([np.stack(channels) for channels in images]))

    def _predict(self, images: torch.Tensor, head: Sequence[int], flips: bool) -> list[torch.Tensor]:
        """Return the probabilities to average of each slice, with one box of the head: see `predict` of ensembles."""
        options: dict[str, Any] = {"head_boxes": [head] * len(images), "input_data_format": "channels_first"}
        height, width = images.shape[-2:]
        return self.ensemble.predict(
            lambda processor: processor.preprocess(images, **options, return_tensors="pt"),
            [(height, width)] * len(images),
            flips,
        )


def make_label_map(
    probabilities: np.ndarray, processor: Sam2UNetImageProcessor, threshold: float, masks: np.ndarray | None = None
) -> np.ndarray:
    """Turn probabilities of shape `(regions, *volume)` into label ids, slice by slice, which saves memory.

    Args:
        probabilities: In [0, 1].
        processor: Turns those of an image into label ids.
        threshold: A voxel belongs to a region if its probability is above this.
        masks: Booleans of the same shape, the only voxels that may belong to each region.
    """
    highest_id = max(label_id for label_ids in processor.regions.values() for label_id in label_ids)
    label_map = np.empty(probabilities.shape[1:], np.min_scalar_type(highest_id))
    for index in range(label_map.shape[-1]):
        own = probabilities[..., index]
        if masks is not None:
            # A voxel of an inner region is one of the outer region, whose own probability may be 0.
            own = np.where(masks[..., index], np.maximum(own, np.finfo(own.dtype).tiny), 0)
        label_map[..., index] = processor.regions_to_label_map(torch.from_numpy(own), threshold).numpy()
    return label_map


def put_slice(volumes: np.ndarray, plane: str, index: int, values: torch.Tensor) -> None:
    """Put values of shape `(regions, height, width)` on a slice of volumes, one per region."""
    for volume, own in zip(volumes, values.cpu().numpy(), strict=True):
        take_slice(volume, plane, index)[...] = own


__all__ = ["Sam2UNetVolumePipeline", "VolumeSegmentation"]
