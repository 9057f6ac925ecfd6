"""The systems that the paper compares SAM2-UNet with, each as a model of `pixel_values` and `labels`.

U-Net, U-Net++ and DeepLabV3 are those of segmentation_models_pytorch with its default encoder, a ResNet-34. ResUNet is
MONAI's U-Net of residual units, because it has them in encoder and decoder, as arXiv 1711.10684 describes; a U-Net of
segmentation_models_pytorch has them in the encoder alone. Mask R-CNN is torchvision's, on a ResNet-50 with a feature
pyramid.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy import ndimage
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.ops import masks_to_boxes
from transformers import PreTrainedConfig, PreTrainedModel

from sam2unet_hf import Sam2UNetForSemanticSegmentation
from sam2unet_hf.crop_sam2unet import OUTSIDE_LOGIT
from sam2unet_hf.modeling_sam2unet import Sam2UNetOutput
from sam2unet_hf.regions_sam2unet import default_ignore_index, regions_from_pairs


Labels = torch.Tensor | Sequence[torch.Tensor] | None
# Height and width of the input must be multiples of the deepest stride of the networks.
STRIDE = 32


class BaselineConfig(PreTrainedConfig):
    """A system other than SAM2-UNet, its regions, one output each, its channels, and ImageNet weights if any."""

    model_type = "segmentation_baseline"

    system: str = "unet"
    regions: Any = None
    num_channels: int = 3
    weights: str | None = None
    # Train with the loss of SAM2-UNet for one output.
    auxiliary_loss_weights: tuple = ()
    weight_bce: bool = False
    iou_over_batch: bool = False
    ignore_index: int = 255
    freeze_encoder: bool = False

    def __post_init__(self, **kwargs: Any):
        self.regions = regions_from_pairs(self.regions or {"WT": [1, 2, 3]})
        super().__post_init__(**kwargs)

    @property
    def backbone_config(self) -> "BaselineConfig":
        """The configuration that knows the channels, which volume inference asks for; there is only one."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, with `regions` as pairs to keep their order."""
        return {**super().to_dict(), "regions": [[name, ids] for name, ids in self.regions.items()]}


def build_network(system: str, num_regions: int, num_channels: int, weights: str | None) -> nn.Module:
    """Build the network of a system; `weights` are `"imagenet"` or none, and ResUNet has none."""
    if system == "maskrcnn":
        # Leave the images as they are, because the image processor normalises and resizes them.
        network = maskrcnn_resnet50_fpn(
            weights_backbone=None if weights is None else "IMAGENET1K_V1",
            num_classes=num_regions + 1,
            image_mean=[0.0] * num_channels,
            image_std=[1.0] * num_channels,
            # Propose fewer boxes than for photographs, because a slice shows few tumours.
            rpn_post_nms_top_n_train=256,
            rpn_post_nms_top_n_test=256,
            box_batch_size_per_image=128,
            # Drop no instance for a low score, because masks are weighted by their scores.
            box_score_thresh=0.0,
            box_detections_per_img=20,
        )
        widen(network.backbone.body, num_channels)
        return network
    if system == "resunet":
        from monai.networks.nets import UNet

        channels = (64, 128, 256, 512, 1024)
        network = UNet(2, num_channels, channels[0], channels, strides=(2, 2, 2, 2), num_res_units=2, norm="BATCH")
        # End with a convolution, as the paper does: the last unit normalises its output channels, and with one channel
        # per region this would bound the logits and leave the background near 0.5.
        return nn.Sequential(network, nn.BatchNorm2d(channels[0]), nn.PReLU(), nn.Conv2d(channels[0], num_regions, 1))
    import segmentation_models_pytorch as smp

    return smp.create_model(system, encoder_weights=weights, in_channels=num_channels, classes=num_regions)


def widen(resnet: nn.Module, num_channels: int) -> None:
    """Let a ResNet see images of other than three channels, as segmentation_models_pytorch does with its encoders."""
    first = resnet.conv1
    if num_channels == first.in_channels:
        return
    options = {name: getattr(first, name) for name in ("kernel_size", "stride", "padding")}
    resnet.conv1 = nn.Conv2d(num_channels, first.out_channels, bias=False, **options)
    repeated = torch.arange(num_channels) % first.in_channels
    with torch.no_grad():
        resnet.conv1.weight.copy_(first.weight[:, repeated] * first.in_channels / num_channels)


class Baseline(PreTrainedModel):
    """A network with one output channel per region, trained with the loss of SAM2-UNet."""

    config_class = BaselineConfig
    main_input_name = "pixel_values"

    def __init__(self, config: BaselineConfig):
        super().__init__(config)
        self.network = build_network(config.system, len(config.regions), config.num_channels, config.weights)

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the initial weights of the network's library."""

    region_masks = Sam2UNetForSemanticSegmentation.region_masks
    compute_loss = Sam2UNetForSemanticSegmentation.compute_loss

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: Labels = None,
        pixel_mask: torch.Tensor | None = None,
        crop_boxes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Sam2UNetOutput:
        """Segment images of shape `(batch_size, num_channels, height, width)`, all arguments as those of SAM2-UNet.

        Options of outputs that a baseline has not, such as `output_auxiliary_logits`, change nothing. A system that
        trains by losses of its own returns no logits in training mode with labels.
        """
        if self.training and labels is not None and (loss := self.own_loss(pixel_values, labels)) is not None:
            return Sam2UNetOutput(loss=loss)
        logits = self.find_logits(pixel_values)
        if pixel_mask is not None:  # outside is background
            logits = logits.masked_fill(~pixel_mask.bool().unsqueeze(1), OUTSIDE_LOGIT)
        loss = None if labels is None else self.compute_loss([logits], labels)
        return Sam2UNetOutput(loss=loss, logits=logits, crop_boxes=crop_boxes)

    def own_loss(self, pixel_values: torch.Tensor, labels: Labels) -> torch.Tensor | None:
        """Return the loss of a system that does not train by that of SAM2-UNet; `None` of those that do."""
        return None

    def find_logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the logits of images, of shape `(batch_size, num_regions, height, width)`."""
        height, width = pixel_values.shape[-2:]
        padded = F.pad(pixel_values, (0, -width % STRIDE, 0, -height % STRIDE))
        return self.network(padded)[..., :height, :width]


def instances(masks: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the connected components of the region masks of an image as the instances that Mask R-CNN learns.

    Masks have the shape `(num_regions, height, width)`, boxes are `(left, top, right, bottom)` in pixels, labels count
    the regions from 1.
    """
    found, labels = [], []
    for label, mask in enumerate(masks.cpu().numpy(), start=1):
        components, count = ndimage.label(mask, structure=[[1, 1, 1]] * 3)  # join pixels that touch at a corner
        found.append(torch.from_numpy(components) == torch.arange(1, count + 1)[:, None, None])
        labels += [label] * count
    instance_masks = torch.cat(found).to(masks.device, torch.uint8)
    boxes = masks_to_boxes(instance_masks)
    boxes[:, 2:] += 1  # a box ends behind its last pixel
    return {
        "boxes": boxes,
        "labels": torch.tensor(labels, dtype=torch.int64, device=masks.device),
        "masks": instance_masks,
    }


class MaskRCNNBaseline(Baseline):
    """Mask R-CNN, trained on connected components by its own losses.

    The probability of a pixel is the maximum over instances of mask probability times score.
    """

    def prepare(self, pixel_values: torch.Tensor, is_trained: bool) -> list[torch.Tensor]:
        """Set the network up for images, and return them as it takes them."""
        height, width = pixel_values.shape[-2:]
        # The network resizes images to these sizes; set those of the images.
        self.network.transform.min_size, self.network.transform.max_size = (min(height, width),), max(height, width)
        # Detect without labels in training mode too, in which the batch norm of the backbone is estimated anew.
        self.network.train(is_trained)
        self.network.backbone.train(self.training)
        return list(pixel_values)

    def own_loss(self, pixel_values: torch.Tensor, labels: Labels) -> torch.Tensor:
        """Return the sum of the losses of Mask R-CNN."""
        masks, _ = self.region_masks(labels)
        images = self.prepare(pixel_values, is_trained=True)
        losses = self.network(images, [instances(image_masks) for image_masks in masks])
        return torch.stack(list(losses.values())).sum()

    def find_logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the logits of images, of shape `(batch_size, num_regions, height, width)`."""
        height, width = pixel_values.shape[-2:]
        detections = self.network(self.prepare(pixel_values, is_trained=False))
        probabilities = pixel_values.new_zeros(len(pixel_values), len(self.config.regions), height, width)
        for image, detection in zip(probabilities, detections, strict=True):
            weighted = detection["masks"][:, 0] * detection["scores"][:, None, None]
            for label in detection["labels"].unique().tolist():
                image[label - 1] = weighted[detection["labels"] == label].amax(dim=0)
        return torch.logit(probabilities, eps=1e-6)


def build_baseline(
    system: str,
    regions: dict[str, list[int]],
    num_channels: int = 3,
    weights: str | None = None,
    iou_over_batch: bool = False,
) -> Baseline:
    """Build a system other than SAM2-UNet, or exit if its library is missing."""
    return make_baseline(
        BaselineConfig(
            system=system,
            regions=regions,
            num_channels=num_channels,
            weights=weights,
            iou_over_batch=iou_over_batch,
            ignore_index=default_ignore_index(regions),
        )
    )


def load_baseline(folder: str | os.PathLike) -> Baseline:
    """Load a system from a folder that `save_pretrained` wrote.

    It is built before its weights are read, because `from_pretrained` builds without memory, in which the anchors of
    Mask R-CNN would be lost.
    """
    model = make_baseline(BaselineConfig.from_pretrained(folder))
    model.load_state_dict(load_file(Path(folder, "model.safetensors")))
    return model.eval()


def make_baseline(config: BaselineConfig) -> Baseline:
    """Build the system of a configuration."""
    try:
        return (MaskRCNNBaseline if config.system == "maskrcnn" else Baseline)(config)
    except ImportError as err:
        raise SystemExit(
            f'{config.system} needs {err.name}. Install it with `pip install -e ".[compare]"` in this checkout.'
        ) from err
