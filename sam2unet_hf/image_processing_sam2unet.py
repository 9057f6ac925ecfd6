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

from .images_sam2unet import to_byte_range, to_channels_first, to_label_map
from .regions_sam2unet import region_levels, regions_from_pairs


class Sam2UNetImageProcessorKwargs(ImagesKwargs, total=False):
    """Arguments of [`Sam2UNetImageProcessor`] beyond those of every image processor.

    Args:
        regions: Region name -> label ids, as in [`Sam2UNetConfig`].
    """

    regions: dict[str, list[int]] | list[list[Any]]


class Sam2UNetImageProcessor(TorchvisionBackend):
    """Prepare images and masks for SAM2-UNet, and turn its logits into masks.

    Images are resized to 352x352 (bilinear, antialiased), scaled to [0, 1] and normalised with ImageNet's mean and
    standard deviation. Masks are resized by nearest neighbour, so they never get new values.

    Args:
        regions: Region name -> the label ids it joins, in the order of the model's channels, as in
            [`Sam2UNetConfig`]. Defaults to `{"WT": [1, 2, 3]}`. Post-processing alone reads them; they can be set
            later, as in `processor.regions = model.config.regions`.
        modalities: The contrasts of the scans that the images are slices of, such as `["flair"]`, or three for the
            channels in their order. Volume inference alone reads them; `None` where they are not known.
        plane: The plane of these slices, `"axial"`, `"coronal"` or `"sagittal"`; as `modalities`.
        kwargs: `do_resize`, `size`, `resample`, `do_rescale`, `rescale_factor`, `do_normalize`, `image_mean`,
            `image_std` and `do_convert_rgb`, as in any image processor.

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

    valid_kwargs = Sam2UNetImageProcessorKwargs
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
        super().__init__(regions=regions, **kwargs)  # type: ignore[call-arg]
        self.modalities = modalities
        self.plane = plane

    @property
    def regions(self) -> dict[str, list[int]]:
        """Region name -> label ids, in the order of the model's channels; pairs are accepted too."""
        return self._regions

    @regions.setter
    def regions(self, regions: dict[str, list[int]] | list[list[Any]] | None) -> None:
        regions = regions_from_pairs({"WT": [1, 2, 3]} if regions is None else regions)
        # Raises if they are neither nested nor disjoint.
        region_levels(regions)
        self._regions = regions

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes for JSON, with `regions` as pairs to keep their order."""
        attributes = super().to_dict()
        del attributes["_regions"]
        return {**attributes, "regions": [[name, ids] for name, ids in self.regions.items()]}

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[Sam2UNetImageProcessorKwargs],
    ) -> BatchFeature:
        """Prepare images, and masks if there are any.

        Args:
            images: One image or a list of them: PIL images, NumPy arrays or torch tensors, grey `(height, width)` or
                with 1, 3 or 4 channels first or last (first where both fit and `input_data_format` does not say; a
                fourth channel, alpha, is dropped); a 4-D array is a list of images. 8-bit images are taken as
                0..255, unsigned 16-bit ones as 0..65535, other integers as 0..255 if no value is larger, else as
                0..65535; floats as 0..1 if no value is larger, else as 0..255. With `do_rescale=False` values are
                taken as they are. An EXIF orientation is not heeded, as it is by `datasets` and by pipelines:
                turn photographs upright first (`PIL.ImageOps.exif_transpose`).
            segmentation_maps: One map of label ids per image, of the image's size: `(height, width)`, or with a
                single channel, or with three equal ones. For several images also one array `(batch_size, height,
                width)`. Palette images give their indices, booleans 0 and 1.
            **kwargs: Arguments of the constructor but `regions`, for this call.

        Returns:
            `pixel_values` of shape `(batch_size, 3, height, width)`, float32, and, with maps, `labels` of shape
            `(batch_size, height, width)`, int64.

        Raises:
            ValueError: If an image or map has an unsupported shape, type or value range, or images and maps do not
                pair up.
        """
        if "regions" in kwargs:
            raise ValueError("`regions` plays no part in preparing images. Set `processor.regions` instead.")
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

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
            return list(images)
        return list(images) if isinstance(images, (list, tuple)) else [images]

    def _preprocess_image_like_inputs(  # type: ignore[override]
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None,
        return_tensors: str | None = None,
        device: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        if kwargs["do_center_crop"] or kwargs["do_pad"]:
            raise ValueError(
                "`do_center_crop` and `do_pad` must be False: masks that come out would not lie on the images. Crop "
                "or pad images and masks together first."
            )
        prepared = [self.process_image(image, **kwargs) for image in self._prepare_images_structure(images)]
        if not prepared:
            raise ValueError("`images` must hold at least one image, got none.")
        if device is not None:
            prepared = [image.to(device) for image in prepared]
        # `_preprocess` returns a `BatchFeature` with `pixel_values`.
        features = dict(self._preprocess(prepared, return_tensors=None, **kwargs))
        if segmentation_maps is not None:
            maps = self._prepare_images_structure(segmentation_maps)
            if len(maps) == 1 and len(prepared) > 1 and isinstance(maps[0], (np.ndarray, torch.Tensor)):
                maps = list(maps[0]) if maps[0].ndim == 3 else maps
            maps = [to_label_map(item) for item in maps]
            if len(maps) != len(prepared):
                raise ValueError(
                    f"`segmentation_maps` must hold one map per image, got {len(maps)} for {len(prepared)} images."
                )
            for index, (image, label_map) in enumerate(zip(prepared, maps, strict=True)):
                if image.shape[-2:] != label_map.shape:
                    raise ValueError(
                        f"`segmentation_maps[{index}]` has size {tuple(label_map.shape)} where its image has "
                        f"{tuple(image.shape[-2:])}. Resize one to the other, masks by nearest neighbour."
                    )
            if device is not None:
                maps = [label_map.to(device) for label_map in maps]
            if kwargs["do_resize"]:
                # Nearest, so that no label id is invented between two others.
                nearest = InterpolationMode.NEAREST_EXACT
                maps = [self.resize(item[None], kwargs["size"], resample=nearest, antialias=False)[0] for item in maps]
            features["labels"] = [item.long() for item in maps]
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
        probabilities = []
        for scores, size in zip(logits.float(), target_sizes, strict=True):
            height, width = int(size[0]), int(size[1])
            resized = F.interpolate(scores[None], size=(height, width), mode="bilinear", align_corners=False)[0]
            probabilities.append(resized.sigmoid())
        return probabilities

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
        """Turn region probabilities of one image into label ids, as `post_process_semantic_segmentation` does.

        Args:
            probabilities: Of shape `(num_regions, height, width)`, in the order of `regions`.
            threshold: As there.

        Returns:
            Label ids of shape `(height, width)`, int64.

        Raises:
            ValueError: If `threshold` is not in [0, 1].
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"`threshold` must be a probability in [0, 1], got {threshold}.")
        names = list(self.regions)
        label_map = torch.zeros(probabilities.shape[1:], dtype=torch.int64, device=probabilities.device)
        for level in region_levels(self.regions):
            ids = torch.tensor(list(level.values()), device=probabilities.device)
            highest, winner = probabilities[[names.index(name) for name in level]].max(dim=0)
            label_map = torch.where(highest > threshold, ids[winner], label_map)
        return label_map


__all__ = ["Sam2UNetImageProcessor"]
