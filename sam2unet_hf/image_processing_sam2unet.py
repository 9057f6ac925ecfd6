"""Image processor of SAM2-UNet: images to pixel values, masks to label maps, logits to masks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from transformers import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from .images_sam2unet import to_byte_range, to_channels_first, to_label_maps, to_list
from .regions_sam2unet import region_levels, regions_from_pairs


class Sam2UNetImageProcessor(TorchvisionBackend):
    """Prepare images and masks for SAM2-UNet, and turn its logits into masks.

    Images are resized to 352x352 (bilinear, antialiased), scaled to [0, 1] and normalised with ImageNet's mean and
    standard deviation. Masks are resized by nearest neighbour, so they never get new values.

    Args:
        regions: Region name -> the label ids it joins, in the order of the model's channels, as in
            [`Sam2UNetConfig`], or as `[name, label ids]` pairs. Defaults to `{"WT": [1, 2, 3]}`. Only post-processing
            reads them; they can be set later, as in `processor.regions = model.config.regions`.
        modalities: The contrasts of the scans that the images are slices of, such as `["flair"]`, or three for the
            channels in their order. Only volume inference reads them; `None` where they are not known.
        plane: The plane of these slices, `"axial"`, `"coronal"` or `"sagittal"`; as `modalities`.
        kwargs: `do_resize`, `size`, `resample`, `do_rescale`, `rescale_factor`, `do_normalize`, `image_mean`,
            `image_std` and `do_convert_rgb`, as in any image processor.

    Raises:
        ValueError: If the regions make no sense, see `region_levels`.

    Example:
        ```python
        >>> import numpy as np
        >>> from sam2unet_hf import Sam2UNetImageProcessor

        >>> processor = Sam2UNetImageProcessor()
        >>> batch = processor(np.zeros((240, 240), dtype=np.uint8), return_tensors="pt")
        >>> batch["pixel_values"].shape
        torch.Size([1, 3, 352, 352])

        ```
    """

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 352, "width": 352}
    default_to_square = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def __init__(
        self,
        regions: dict[str, list[int]] | list[list[Any]] | None = None,
        modalities: list[str] | None = None,
        plane: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.regions = regions_from_pairs({"WT": [1, 2, 3]} if regions is None else regions)
        region_levels(self.regions)  # raises if they are neither nested nor disjoint
        self.modalities = modalities
        self.plane = plane

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any):
        """Build an image processor from the attributes of its JSON file, with `kwargs` over them."""
        # transformers would set ours past the constructor, which checks them.
        own: dict[str, Any] = {name: kwargs.pop(name) for name in ("regions", "modalities", "plane") if name in kwargs}
        return super().from_dict({**image_processor_dict, **own}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes for JSON, with `regions` as pairs to keep their order."""
        return {**super().to_dict(), "regions": [list(pair) for pair in regions_from_pairs(self.regions).items()]}

    def preprocess(
        self, images: ImageInput, segmentation_maps: ImageInput | None = None, **kwargs: Unpack[ImagesKwargs]
    ) -> BatchFeature:
        """Prepare images, and masks if there are any.

        Args:
            images: One image or a list of them: PIL images, NumPy arrays or torch tensors, grey `(height, width)` or
                with 1, 3 or 4 channels first or last (first where both fit and `input_data_format` does not say; a
                fourth channel, alpha, is dropped); a 4-D array is a list of images. 8-bit images are taken as
                0..255, unsigned 16-bit ones as 0..65535, other integers as 0..255 if no value is larger, else as
                0..65535; floats as 0..1 if no value is larger, else as 0..255. With `do_rescale=False` values are
                taken as they are. An EXIF orientation is ignored, unlike in `datasets` and in pipelines: turn
                photographs upright first (`PIL.ImageOps.exif_transpose`).
            segmentation_maps: One map of label ids per image, of the image's size: `(height, width)`, or with a
                single channel, or with three equal ones. For several images also one array `(batch_size, height,
                width)`. Palette images give their indices, booleans 0 and 1.
            **kwargs: `kwargs` of the constructor, for this call.

        Returns:
            `pixel_values` of shape `(batch_size, 3, height, width)`, float32, and, with maps, `labels` of shape
            `(batch_size, height, width)`, int64.

        Raises:
            TypeError: If an argument is none of an image processor, as `regions` is not.
            ValueError: If an image or map has an unsupported shape, type or value range, or images and maps do not
                pair up.
        """
        return super().preprocess(images, segmentation_maps, **kwargs)

    def process_image(  # type: ignore[override]
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        do_rescale: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Turn one image of any kind into a `(channels, height, width)` tensor with values in 0..255."""
        if isinstance(image, Image.Image):
            # 16-bit and float images lose their range in `convert("RGB")`.
            if do_convert_rgb and image.mode not in ("L", "RGB") and not image.mode.startswith(("I", "F")):
                try:
                    image = image.convert("RGB")
                except ValueError as err:
                    raise ValueError(f"`images` of mode {image.mode} have no RGB values. Save them as RGB.") from err
            image, input_data_format = np.array(image), ChannelDimension.LAST
        image = to_channels_first(image, input_data_format)
        if do_rescale:
            image = to_byte_range(image)
        if image.shape[0] == 4:
            image = image[:3]
        if do_convert_rgb and image.shape[0] == 1:
            image = image.expand(3, -1, -1)
        return image.contiguous()

    def _preprocess_image_like_inputs(  # type: ignore[override]
        self, images: Any, segmentation_maps: Any, return_tensors: Any = None, device: Any = None, **kwargs: Any
    ) -> BatchFeature:
        if kwargs["do_center_crop"] or kwargs["do_pad"]:
            raise ValueError(
                "`do_center_crop` and `do_pad` must be False, because masks would no longer lie on their images. Crop "
                "or pad images and masks together first."
            )
        prepared = [self.process_image(image, **kwargs) for image in to_list(images)]
        if not prepared:
            raise ValueError("`images` must hold at least one image, got none.")
        on_device = [image.to(device=device) for image in prepared]
        features = dict(self._preprocess(on_device, return_tensors=None, **kwargs))
        if segmentation_maps is not None:
            label_maps = [label_map.to(device=device) for label_map in to_label_maps(segmentation_maps, prepared)]
            if kwargs["do_resize"]:
                # Take the nearest pixel, so that no label id is invented between two others.
                options = {"resample": InterpolationMode.NEAREST_EXACT, "antialias": False}
                label_maps = [self.resize(item[None], kwargs["size"], **options)[0].long() for item in label_maps]
            features["labels"] = label_maps
        return BatchFeature(data=features, tensor_type=return_tensors)

    def post_process_regions(
        self, outputs: Any, target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Turn logits into region probabilities.

        Args:
            outputs: Output of [`Sam2UNetForSemanticSegmentation`], or anything with `logits` of shape
                `(batch_size, num_regions, height, width)`.
            target_sizes: `(height, width)` per image; the logits' own size when `None`.

        Returns:
            One tensor per image of shape `(num_regions, height, width)`, float32 in [0, 1], in the order of `regions`.

        Raises:
            ValueError: If there is not one target size per image, or not one channel per region.
        """
        logits = outputs.logits
        if logits.shape[1] != len(self.regions):
            raise ValueError(
                f"`regions` {list(self.regions)} must name one region per channel of the logits, got "
                f"{logits.shape[1]} channels. Set `processor.regions = model.config.regions`."
            )
        if target_sizes is None:
            return list(logits.float().sigmoid())
        if len(target_sizes) != len(logits):
            raise ValueError(
                f"`target_sizes` must hold one (height, width) per image, got {len(target_sizes)} for "
                f"{len(logits)} images."
            )
        return [
            F.interpolate(scores[None], size=[int(side) for side in size], mode="bilinear")[0].sigmoid()
            for scores, size in zip(logits.float(), target_sizes, strict=True)
        ]

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
        threshold: float = 0.5,
    ) -> list[torch.Tensor]:
        """Turn logits into label maps.

        Nested regions are written from the outermost inward: for BraTS whole tumour as 2, then tumour core as 1, then
        enhancing tumour as 3. Where disjoint regions are above the threshold, the most probable one is written.
        `model.config.id2label` names the ids.

        Args:
            outputs: As in [`~Sam2UNetImageProcessor.post_process_regions`].
            target_sizes: As there.
            threshold: A pixel belongs to a region if its probability is above this, in [0, 1].

        Returns:
            One tensor of label ids per image of shape `(height, width)`, int64; 0 is the background.

        Raises:
            ValueError: As there, or if `threshold` is not in [0, 1].
        """
        found = self.post_process_regions(outputs, target_sizes)
        return [self.regions_to_label_map(probabilities, threshold) for probabilities in found]

    def regions_to_label_map(self, probabilities: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
        """Turn probabilities `(num_regions, height, width)` of one image into label ids `(height, width)`, int64.

        [`~Sam2UNetImageProcessor.post_process_semantic_segmentation`] says how.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"`threshold` must be a probability in [0, 1], got {threshold}.")
        regions = regions_from_pairs(self.regions)
        label_map = torch.zeros(probabilities.shape[1:], dtype=torch.int64, device=probabilities.device)
        for level in region_levels(regions):
            ids = torch.tensor(list(level.values()), device=probabilities.device)
            highest, winner = probabilities[[list(regions).index(name) for name in level]].max(dim=0)
            label_map = torch.where(highest > threshold, ids[winner], label_map)
        return label_map


__all__ = ["Sam2UNetImageProcessor"]
