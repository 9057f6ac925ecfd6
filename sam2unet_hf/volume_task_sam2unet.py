"""The task `volume-segmentation` of transformers' `pipeline`, which needs this package no more than the model does."""

from typing import Any

from transformers import ImageSegmentationPipeline

from .clean_up_sam2unet import CLEAN_UP_FILE, CleanUp
from .members_sam2unet import find_file
from .volume_sam2unet import Sam2UNetVolumePipeline


class Sam2UNetVolumeTask(ImageSegmentationPipeline):
    """Segments patients' scans as [`~volume_sam2unet.Sam2UNetVolumePipeline`] does.

    `pipeline` takes it for checkpoints of this package with `trust_remote_code=True`. It needs nibabel and SciPy.
    `clean_up.json` beside the checkpoint that the model was loaded from is applied, so pass `clean_up=False` for a
    model that was trained since.

    Args:
        *args: As of the pipelines of transformers; `pipeline` passes the model.
        **kwargs: As there, with the image processor.

    Raises:
        ValueError: If the image processor does not say which modalities the model segments, or the clean-up beside the
            model is wrong.

    Example:
        ```python
        >>> from transformers import pipeline

        >>> pipe = pipeline("volume-segmentation", "runs/phantom", trust_remote_code=True)  # doctest: +SKIP
        >>> found = pipe("phantom/Phantom_001")  # or {"flair": "flair.nii.gz"}  # doctest: +SKIP
        >>> found.save("seg.nii.gz")  # doctest: +SKIP

        ```
    """

    model: Any
    image_processor: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        name, place = self.model.name_or_path, self.model.loaded_from
        rules = find_file(name, CLEAN_UP_FILE, **place) if name else None
        clean_up = None if rules is None else CleanUp.load(rules, self.model.config.regions)
        self.segment = Sam2UNetVolumePipeline(self.model, self.image_processor, clean_up=clean_up)

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Segment one patient, or a list of patients.

        Args:
            inputs: A case as the volume pipeline takes it: the folder of a BraTS case, the path of a scan, or a path
                for each modality; or a list of those.
            **kwargs: Options of the volume pipeline, such as `flips=True`.

        Returns:
            A [`~volume_sam2unet.VolumeSegmentation`], or a list of them.

        Raises:
            FileNotFoundError: As the volume pipeline.
            ScanError: As the volume pipeline.
            ValueError: As the volume pipeline.
        """
        if isinstance(inputs, list):
            return [self.segment(case, **kwargs) for case in inputs]
        return self.segment(inputs, **kwargs)


__all__ = ["Sam2UNetVolumeTask"]
