"""Image processor of SAM2-UNet: images to pixel values, masks to label maps, logits to masks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
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
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from .crop_sam2unet import check_head_boxes, crop, head_mask, head_window
from .images_sam2unet import to_byte_range, to_channels_first, to_label_maps, to_list, warn_of_lost_bits
from .post_processing_sam2unet import Sam2UNetPostProcessingMixin
from .regions_sam2unet import region_levels, regions_from_pairs


OWN_ATTRIBUTES = (
    "regions",
    "modalities",
    "plane",
    "num_channels",
    "neighbours",
    "head_crop_size",
    "head_crop_scale",
    "white_level",
)


class Sam2UNetImageProcessor(Sam2UNetPostProcessingMixin, TorchvisionBackend):
    """Prepare images and masks for SAM2-UNet, and turn its logits into masks.

    Images are resized to 352x352 (bilinear, antialiased), scaled to [0, 1] and normalised with ImageNet's mean and
    standard deviation. Masks are resized by nearest neighbour, so they never get new values.

    With `head_crop_size` they are cropped to a window about the head instead, at the resolution that they have, and
    post-processing puts probabilities and label maps back on the whole slice, with nothing outside the head. The head
    is what is not 0, as in slices that the data set builder writes.

    Args:
        regions: Region name -> the label ids it joins, in the order of the model's channels, as in
            [`Sam2UNetConfig`], or as `[name, label ids]` pairs. Defaults to `{"WT": [1, 2, 3]}`. Only post-processing
            reads them; they can be set later, as in `processor.regions = model.config.regions`.
        modalities: The contrasts of the scans that the images are slices of, such as `["flair", "t1ce"]`, in the
            order of the channels. Only volume inference reads them; `None` where they are not known.
        plane: The plane of these slices, `"axial"`, `"coronal"` or `"sagittal"`; as `modalities`.
        num_channels: Channels of the model. Grey images are repeated to them; other images must have as many.
        neighbours: Slices below and above each slice that are channels, too: of each modality in turn, from the
            lowest slice to the highest, the slice itself in the middle.
        head_crop_size: Height and width in pixels of the window about the head, which `head_crop_scale` turns into
            multiples of 32; `size` then counts for nothing. `None` resizes whole images.
        head_crop_scale: Whole number of times that the window is enlarged for the model (bilinear), which decides at a
            quarter of the resolution that it gets: 2 for voxels of 2 mm and more, in which a small tumour is only a
            few voxels wide.
        white_level: Value that is white in images of integers other than bytes, such as 4095 of a camera with 12
            bits. `None` takes 65535 if a value is over 255 or they are unsigned 16-bit, else 255.
        kwargs: `do_resize`, `size`, `resample`, `do_rescale`, `rescale_factor`, `do_normalize`, `image_mean`,
            `image_std` and `do_convert_rgb`, as in any image processor. Mean and standard deviation are by default
            those of ImageNet, for other than three channels the mean over its three.

    Raises:
        ValueError: If the regions make no sense, see `region_levels`, or a number does not fit.

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
        num_channels: int = 3,
        neighbours: int = 0,
        head_crop_size: Mapping[str, int] | None = None,
        head_crop_scale: int = 1,
        white_level: int | None = None,
        **kwargs: Any,
    ):
        if num_channels != 3:
            for name, values in (("image_mean", self.image_mean), ("image_std", self.image_std)):
                if kwargs.get(name) is None:
                    kwargs[name] = [sum(values) / 3] * num_channels
        super().__init__(**kwargs)
        self.regions = regions_from_pairs({"WT": [1, 2, 3]} if regions is None else regions)
        region_levels(self.regions)  # raises if they are neither nested nor disjoint
        self.modalities = modalities
        self.plane = plane
        self.num_channels = num_channels
        self.neighbours = neighbours
        self.head_crop_size = None if head_crop_size is None else dict(head_crop_size)
        self.head_crop_scale = head_crop_scale
        self.white_level = white_level
        self.check_channels()
        if white_level is not None and not 255 <= white_level <= 65535:
            raise ValueError(f"`white_level` must be a value from 255 to 65535, such as 4095, got {white_level}.")

    def check_channels(self) -> None:
        """Raise a `ValueError` if channels, neighbours, normalisation and window do not fit each other."""
        slices = 2 * self.neighbours + 1
        if self.neighbours < 0 or self.num_channels < 1 or self.num_channels % slices:
            raise ValueError(
                "`num_channels` must be one or more times the 2 * `neighbours` + 1 slices of each modality, got "
                f"`num_channels` {self.num_channels} and `neighbours` {self.neighbours}."
            )
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if isinstance(values, Sequence) and len(values) != self.num_channels:
                raise ValueError(
                    f"`{name}` must have one value per channel, got {len(values)} for `num_channels` "
                    f"{self.num_channels}. Leave it out for the default."
                )
        size, scale = self.head_crop_size, self.head_crop_scale
        if isinstance(scale, bool) or not isinstance(scale, int) or scale < 1 or (scale > 1 and size is None):
            raise ValueError(
                "`head_crop_scale` must be a whole number from 1 up, and enlarges the window of `head_crop_size`, got "
                f"{scale!r} with `head_crop_size` {size}."
            )
        if size is not None and (
            size.keys() != {"height", "width"} or any(side * scale < 64 or side * scale % 32 for side in size.values())
        ):
            enlarged = f", {scale} times enlarged" if scale > 1 else ""
            raise ValueError(
                f"`head_crop_size` must be a height and a width in pixels,{enlarged} multiples of 32 from 64 up, such "
                f"as {{'height': 160, 'width': 192}}, got {size}."
            )

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any):
        """Build an image processor from the attributes of its JSON file, with `kwargs` over them."""
        # transformers would set ours past the constructor, which checks them.
        own: dict[str, Any] = {name: kwargs.pop(name) for name in OWN_ATTRIBUTES if name in kwargs}
        return super().from_dict({**image_processor_dict, **own}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes for JSON, with `regions` as pairs to keep their order."""
        return {**super().to_dict(), "regions": [list(pair) for pair in regions_from_pairs(self.regions).items()]}

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        head_boxes: Sequence[Sequence[int]] | np.ndarray | torch.Tensor | None = None,
        **kwargs: Unpack[ImagesKwargs],
    ) -> BatchFeature:
        """Prepare images, and masks if there are any.

        Args:
            images: One image or a list of them: PIL images, NumPy arrays or torch tensors, grey `(height, width)` or
                with 1 or `num_channels` channels first or last (first where both fit and `input_data_format` does not
                say; alpha, a fourth channel where there should be three, is dropped); a 4-D array is a list of
                images. 8-bit images are taken as 0..255, other integers as 0..`white_level`: by default unsigned
                16-bit ones as 0..65535, others as 0..255 if no value is larger, else as 0..65535. Floats are taken as
                0..1 if no value is larger, else as 0..255. With `do_rescale=False` values are taken as they are. An
                EXIF orientation is ignored, unlike in `datasets` and in pipelines: turn photographs upright first
                (`PIL.ImageOps.exif_transpose`).
            segmentation_maps: One map of label ids per image, of the image's size: `(height, width)`, or with a
                single channel, or with three equal ones. For several images also one array `(batch_size, height,
                width)`. Palette images give their indices, booleans 0 and 1.
            head_boxes: The box of the head in each image, `[x_min, y_min, x_max, y_max]` in pixels, half-open, such
                as that of the head in all slices of the patient. By default that of the pixels of each image that
                are not 0. Only read with `head_crop_size`.
            **kwargs: `kwargs` of the constructor, for this call.

        Returns:
            `pixel_values` of shape `(batch_size, num_channels, height, width)`, float32, and, with maps, `labels` of
            shape `(batch_size, height, width)`, int64. With `head_crop_size`, height and width are those of the window
            times `head_crop_scale`. The window is centred on the box of the head and shows pixels as they are, 0
            beyond the image; a head that does not fit is scaled down. Then there are also `crop_boxes` of shape
            `(batch_size, 4)`, int64, the regions that the windows show, like `head_boxes` but maybe beyond the image,
            and `pixel_mask` of shape `(batch_size, height, width)`, boolean: the head, that is what lies between the
            first and the last pixel that is not 0 of its row and of its column, in the slice itself. The model takes
            all of these.

        Raises:
            TypeError: If an argument is none of an image processor, as `regions` is not.
            ValueError: If an image, map or box has an unsupported shape, type or value range, or images and maps or
                boxes do not pair up.
        """
        return super().preprocess(images, segmentation_maps, head_boxes, **kwargs)

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
            if self.num_channels != 3 and image.ndim == 3 and (image == image[..., :1]).all():
                image = image[..., :1]  # a grey picture that was saved as RGB
        image = to_channels_first(image, input_data_format, self.num_channels)
        if do_rescale:
            image = to_byte_range(image, self.white_level)
        if image.shape[0] == 4 and self.num_channels == 3:
            image = image[:3]
        if do_convert_rgb and image.shape[0] == 1:
            image = image.expand(self.num_channels, -1, -1)
        return image.contiguous()

    def _preprocess_image_like_inputs(  # type: ignore[override]
        self,
        images: Any,
        segmentation_maps: Any,
        head_boxes: Any,
        return_tensors: Any = None,
        device: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        if kwargs["do_center_crop"] or kwargs["do_pad"]:
            raise ValueError(
                "`do_center_crop` and `do_pad` must be False, because masks would no longer lie on their images. Crop "
                "or pad images and masks together first."
            )
        prepared = [self.process_image(image, **kwargs) for image in to_list(images)]
        if not prepared:
            raise ValueError("`images` must hold at least one image, got none.")
        if segmentation_maps is None:
            for image in to_list(images):
                if isinstance(image, Image.Image):
                    warn_of_lost_bits(image)
        label_maps = None if segmentation_maps is None else to_label_maps(segmentation_maps, prepared)
        features: dict[str, Any] = {}
        if self.head_crop_size is not None:
            height, width = self.head_crop_size["height"], self.head_crop_size["width"]
            size = (height * self.head_crop_scale, width * self.head_crop_scale)
            boxes = [head_window(box, height, width) for box in check_head_boxes(head_boxes, prepared)]
            prepared = [crop(image, box) for image, box in zip(prepared, boxes, strict=True)]
            own_channels = slice(self.neighbours, None, 2 * self.neighbours + 1)
            masks = [head_mask(window[own_channels], size) for window in prepared]
            features["crop_boxes"] = [torch.tensor(box) for box in boxes]
            features["pixel_mask"] = [mask.to(device=device) for mask in masks]
            if label_maps is not None:
                label_maps = [crop(label_map, box) for label_map, box in zip(label_maps, boxes, strict=True)]
            # This scales down larger heads, and leaves windows as they are where they are not to be enlarged.
            kwargs |= {"do_resize": True, "size": SizeDict(height=size[0], width=size[1])}
        features |= self._preprocess([image.to(device=device) for image in prepared], return_tensors=None, **kwargs)
        if label_maps is not None:
            label_maps = [label_map.to(device=device) for label_map in label_maps]
            if kwargs["do_resize"]:
                # Take the nearest pixel, so that no label id is invented between two others.
                options = {"resample": InterpolationMode.NEAREST_EXACT, "antialias": False}
                label_maps = [self.resize(item[None], kwargs["size"], **options)[0].long() for item in label_maps]
            features["labels"] = label_maps
        return BatchFeature(data=features, tensor_type=return_tensors)


__all__ = ["Sam2UNetImageProcessor"]
