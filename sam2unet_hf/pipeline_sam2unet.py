"""The image segmentation pipeline of transformers, for pictures of more than 8 bits too."""

import base64
import contextlib
import io
import os
from typing import Any

from huggingface_hub import get_session
from PIL import Image, ImageOps
from transformers import ImageSegmentationPipeline
from transformers.image_utils import load_image


# Under this name in `config.json`; `pipeline` takes the class from the file beside it with `trust_remote_code=True`.
CUSTOM_PIPELINES = {
    task: {"impl": implementation, "pt": ["AutoModelForSemanticSegmentation"]}
    for task, implementation in (
        ("image-segmentation", "pipeline_sam2unet.Sam2UNetImagePipeline"),
        ("volume-segmentation", "volume_task_sam2unet.Sam2UNetVolumeTask"),
    )
}


def open_picture(picture: str | Image.Image, timeout: float | None = None) -> Image.Image:
    """Return a picture upright, given itself or its path, URL or base64 text.

    One of 16 bits or of floats stays as it is; `load_image` of transformers cuts its values at 255. All others are as
    from there.
    """
    opened = picture
    if isinstance(picture, str):
        if picture.startswith(("http://", "https://")):
            response = get_session().get(picture, timeout=timeout)
            response.raise_for_status()
            opened = Image.open(io.BytesIO(response.content))
        elif os.path.isfile(picture):
            opened = Image.open(picture)
        else:
            with contextlib.suppress(OSError, ValueError):  # no picture, of which `load_image` tells
                opened = Image.open(io.BytesIO(base64.b64decode(picture.rpartition(",")[2])))
    if isinstance(opened, Image.Image) and opened.mode.startswith(("I", "F")):
        return ImageOps.exif_transpose(opened)
    return load_image(opened, timeout=timeout)


class Sam2UNetImagePipeline(ImageSegmentationPipeline):
    """[`~transformers.ImageSegmentationPipeline`] that shows pictures of 16 bits and of floats to the model whole.

    `pipeline` takes it for checkpoints of this package with `trust_remote_code=True`, and where the package is
    installed with `pipeline_class=Sam2UNetImagePipeline`.

    Example:
        ```python
        >>> from sam2unet_hf import Sam2UNetImagePipeline
        >>> from transformers import pipeline

        >>> options = {"model": "runs/phantom", "pipeline_class": Sam2UNetImagePipeline}
        >>> segment = pipeline("image-segmentation", **options)  # doctest: +SKIP
        >>> [part["label"] for part in segment("slice.png")]  # doctest: +SKIP
        ['background', 'WT']

        ```
    """

    image_processor: Any

    def preprocess(  # type: ignore[override]
        self, image: str | Image.Image, subtask: str | None = None, timeout: float | None = None
    ) -> Any:
        """Prepare one picture for the model.

        Args:
            image: The picture, or its path, URL or base64 text.
            subtask: As in transformers; `"semantic"` is the only one.
            timeout: Seconds to wait for a URL, without end by default.
        """
        picture = open_picture(image, timeout)
        inputs: Any = self.image_processor(images=[picture], return_tensors="pt").to(self.dtype)
        inputs["target_size"] = [(picture.height, picture.width)]
        return inputs


__all__ = ["Sam2UNetImagePipeline"]
