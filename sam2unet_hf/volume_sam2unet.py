"""From a patient's scans to a label volume: SAM2-UNet slice by slice."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .cases_sam2unet import BratsCase, find_cases
from .checkpoint_sam2unet import DOWNLOAD_ARGUMENTS
from .image_processing_sam2unet import Sam2UNetImageProcessor
from .images_sam2unet import count_channels
from .labels_sam2unet import enhancing_label_of
from .modeling_sam2unet import Sam2UNetForSemanticSegmentation
from .scans_sam2unet import (
    PLANES,
    Volume,
    check_modalities,
    check_same_grid,
    foreground_slices,
    head_box,
    read_volume,
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
        probabilities: Of shape `(regions, *label_map.shape)`, float32 in [0, 1], if they were asked for.
    """

    label_map: np.ndarray
    regions: dict[str, list[int]]
    scan: Volume
    probabilities: np.ndarray | None = None

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
        index = list(self.regions).index(region)
        write_nifti(path, self.probabilities[index], self.scan.affine, self.scan.header)


class Sam2UNetVolumePipeline:
    """Segment a patient's scans slice by slice, with the intensities that the data set builder gives the model.

    Scans may have any orientation and spacing. Slices in which all scans are background become background unseen. A
    processor with `head_crop_size` crops every slice to one window about the head of the whole scans, and nothing is
    found outside the head.

    Args:
        model: The model.
        processor: Its image processor, which says of how many `neighbours` a slice comes with.
        modalities: Those that the model was trained on, in the order of the channels. Default: those that the
            processor names, which it does after training with `run_segmentation.py` on scans.

    Raises:
        ValueError: If neither `modalities` nor the processor names them, or if they are not known or not distinct.

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
        model: Sam2UNetForSemanticSegmentation,
        processor: Sam2UNetImageProcessor,
        modalities: Sequence[str] | None = None,
    ):
        self.model = model.eval()
        self.processor = processor
        processor.regions = model.config.regions
        named = modalities or processor.modalities
        if not named:
            raise ValueError(
                "The checkpoint does not say which modalities it segments. If it was trained on scans, pass "
                "`modalities` (`--modalities`), such as ['flair'] or ['t1ce', 't2', 'flair'], in the order of its "
                "training. If on pictures, segment such by `python -m sam2unet_hf.pictures`."
            )
        check_modalities(named)
        num_channels, expected = count_channels(named, processor.neighbours), model.config.backbone_config.num_channels
        if num_channels != expected or processor.num_channels != expected:
            raise ValueError(
                f"`modalities` {list(named)} with {processor.neighbours} neighbours on each side make {num_channels} "
                f"channels, the image processor gives {processor.num_channels}, and the model takes {expected}. Pass "
                "the modalities and the image processor of its training."
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
        """Load a model and its processor.

        Args:
            model: Hub id or folder.
            modalities: As in the constructor.
            device: Where to run. Default: a GPU if there is one.
            **kwargs: Arguments of the model's `from_pretrained`, such as `dtype=torch.bfloat16` and `revision`; those
                of downloads are the processor's too. With `device_map` the model stays where that puts it.

        Raises:
            OSError: As the `from_pretrained` of model and processor.
            ValueError: As these and the constructor, or if there are both `device` and `device_map`.
        """
        if device is not None and kwargs.get("device_map") is not None:
            raise ValueError(f"Pass `device` or `device_map`, got both: {device} and {kwargs['device_map']}.")
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)
        loaded = Sam2UNetForSemanticSegmentation.from_pretrained(model, **kwargs)
        shared = {name: kwargs[name] for name in (*DOWNLOAD_ARGUMENTS, "revision", "subfolder") if name in kwargs}
        processor = Sam2UNetImageProcessor.from_pretrained(model, **shared)
        if kwargs.get("device_map") is None:
            loaded = loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(loaded, processor, modalities)

    @torch.inference_mode()
    def __call__(
        self,
        case: str | os.PathLike | BratsCase | Mapping[str, str | os.PathLike],
        planes: Sequence[str] | None = None,
        flips: bool = False,
        batch_size: int = 8,
        threshold: float = 0.5,
        return_probabilities: bool = False,
        progress: bool = True,
    ) -> VolumeSegmentation:
        """Segment one patient.

        Args:
            case: Folder of a BraTS case, a case of [`~cases_sam2unet.find_cases`], the path of a scan if the model
                takes one modality, or a path for each modality.
            planes: Planes to cut, of axial, coronal and sagittal; probabilities are averaged over them. Default: the
                one that the processor names, or axial.
            flips: Average over the slices and their mirror images (horizontal, vertical, both) too.
            batch_size: Slices at once, mirror images not counted.
            threshold: A voxel belongs to a region if its probability is above this.
            return_probabilities: Keep the probabilities.
            progress: Show a progress bar.

        Raises:
            ScanError: If a scan is missing, damaged or on another grid than the first.
            FileNotFoundError: If there is no case in a folder.
            ValueError: If an argument is off, or there is more than one case in a folder.
        """
        planes = [self.processor.plane or "axial"] if planes is None else planes
        if not planes or not set(planes) <= set(PLANES) or len(set(planes)) < len(planes):
            raise ValueError(f"`planes` must name each of {', '.join(PLANES)} at most once, got {list(planes)}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if not 0 <= threshold <= 1:
            raise ValueError(f"`threshold` must be a probability in [0, 1], got {threshold}.")
        scans = self._read(case)
        greys = [to_grey(scan) for scan in scans]
        regions = self.model.config.regions
        total = np.zeros((len(regions), *greys[0].shape), np.float32)
        indices = {plane: foreground_slices(greys, plane) for plane in planes}
        n_slices = sum(map(len, indices.values()))
        with tqdm(total=n_slices, desc=scans[0].name.split(": ")[0], unit="slice", disable=not progress) as bar:
            for plane in planes:
                box = head_box(greys, plane)
                for start in range(0, len(indices[plane]), batch_size):
                    batch = indices[plane][start : start + batch_size]
                    images = self._take_images(greys, plane, batch, indices[plane])
                    for index, probabilities in zip(batch, self._probabilities(images, box, flips), strict=True):
                        for region, values in zip(total, probabilities, strict=True):
                            take_slice(region, plane, index)[...] += values
                    bar.update(len(batch))
        total /= len(planes)
        highest_id = max(label_id for label_ids in regions.values() for label_id in label_ids)
        label_map = np.empty(total.shape[1:], np.min_scalar_type(highest_id))
        for index in range(total.shape[-1]):
            ids = self.processor.regions_to_label_map(torch.from_numpy(total[..., index]), threshold)
            label_map[..., index] = ids.numpy()
        kept = np.stack([scans[0].to_file_grid(region) for region in total]) if return_probabilities else None
        on_grid = np.ascontiguousarray(scans[0].to_file_grid(label_map))
        return VolumeSegmentation(on_grid, regions, scans[0], kept)

    def _read(self, case: str | os.PathLike | BratsCase | Mapping[str, str | os.PathLike]) -> list[Volume]:
        """Read the scans of the model's modalities."""
        if isinstance(case, (str, os.PathLike)) and Path(case).is_dir():
            cases = find_cases(case)
            if len(cases) > 1:
                raise ValueError(f"`{case}` holds {len(cases)} cases. Pass them one by one: `find_cases` lists them.")
            (case,) = cases
        if isinstance(case, (str, os.PathLike)):
            if len(self.modalities) > 1:
                raise ValueError(
                    f"The model segments {', '.join(self.modalities)} together, got the one file `{case}`. Pass a "
                    f"folder, or a path for each: {{'{self.modalities[0]}': ..., ...}}."
                )
            case = {self.modalities[0]: case}
        if not isinstance(case, Mapping):
            # Do not ask for a `BratsCase`: code that was loaded from a checkpoint has its own class of this name.
            return case.read_images(self.modalities)
        if missing := [name for name in self.modalities if name not in case]:
            raise ValueError(f"`case` must give a path for each of {self.modalities}, {missing} missing.")
        scans = [read_volume(case[name]) for name in self.modalities]
        for scan in scans[1:]:
            check_same_grid(scan, scans[0])
        return scans

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

    def _probabilities(self, images: torch.Tensor, head: Sequence[int], flips: bool) -> np.ndarray:
        """Return the probabilities of slices with one box of the head, `(slices, regions, height, width)`."""
        boxes = [head] * len(images)
        inputs = self.processor.preprocess(
            images, head_boxes=boxes, input_data_format="channels_first", return_tensors="pt"
        )
        # Offloaded weights lie on no device; the model takes its inputs from any then.
        device = self.model.device if self.model.device.type != "meta" else torch.device("cpu")
        inputs = inputs.to(device, self.model.dtype)
        height, width = images.shape[-2:]
        sizes = [(height, width)] * len(images)
        mirrored: list[tuple[int, ...]] = [(), (-1,), (-2,), (-2, -1)] if flips else [()]
        found = []
        for axes in mirrored:
            turned = {
                name: inputs[name].flip(axes) for name in ("pixel_values", "pixel_mask") if axes and name in inputs
            }
            outputs = self.model(**{**inputs, **turned})
            if axes:  # back before they are put on the slice, where the window need not lie in the middle
                outputs.logits = outputs.logits.flip(axes)
            found.append(torch.stack(self.processor.post_process_regions(outputs, target_sizes=sizes)))
        return torch.stack(found).mean(dim=0).cpu().numpy()


def check_enhancing_label(enhancing_label: int, regions: Mapping[str, Sequence[int]]) -> None:
    """Check that enhancing tumour can be written with a label, which must not be that of something else."""
    if enhancing_label not in (3, 4):
        raise ValueError(f"`enhancing_label` must be 3 (BraTS from 2023 on) or 4 (before), got {enhancing_label}.")
    if enhancing_label == 4 and any(4 in label_ids for label_ids in regions.values()):
        raise ValueError(
            f"`enhancing_label` must be 3 where regions have a label 4 of their own, got {dict(regions)}."
        )


__all__ = ["Sam2UNetVolumePipeline", "VolumeSegmentation"]
