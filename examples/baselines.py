"""The systems that the paper compares SAM2-UNet with, each as a model of `pixel_values` and `labels`.

U-Net, U-Net++ and DeepLabV3 are those of segmentation_models_pytorch with its default encoder, a ResNet-34. ResUNet is
MONAI's U-Net of residual units, because it has them in encoder and decoder, as arXiv 1711.10684 describes; a U-Net of
segmentation_models_pytorch has them in the encoder alone. Mask R-CNN is torchvision's, on a ResNet-50 with a feature
pyramid.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.ops import masks_to_boxes
from transformers import PreTrainedConfig, PreTrainedModel

from sam2unet_hf import Sam2UNetForSemanticSegmentation
from sam2unet_hf.modeling_sam2unet import Sam2UNetOutput
from sam2unet_hf.regions_sam2unet import default_ignore_index


Labels = torch.Tensor | Sequence[torch.Tensor] | None
# Height and width of the input must be multiples of the deepest stride of the networks.
STRIDE = 32


class BaselineConfig(PreTrainedConfig):
    """A system other than SAM2-UNet, its regions, one channel each, and ImageNet weights of its encoder, if any."""

    model_type = "segmentation_baseline"

    system: str = "unet"
    regions: dict[str, list[int]] | None = None
    weights: str | None = None
    # Train with the loss of SAM2-UNet for one output.
    auxiliary_loss_weights: tuple = ()
    weight_bce: bool = False
    iou_over_batch: bool = False
    ignore_index: int = 255


def build_network(system: str, num_regions: int, weights: str | None) -> nn.Module:
    """Build the network of a system; `weights` are `"imagenet"` or none, and ResUNet has none."""
    if system == "maskrcnn":
        # Leave the images as they are, because the image processor normalises and resizes them.
        return maskrcnn_resnet50_fpn(
            weights_backbone=None if weights is None else "IMAGENET1K_V1",
            num_classes=num_regions + 1,
            image_mean=[0.0] * 3,
            image_std=[1.0] * 3,
            # Propose fewer boxes than for photographs, because a slice shows few tumours.
            rpn_post_nms_top_n_train=256,
            rpn_post_nms_top_n_test=256,
            box_batch_size_per_image=128,
            # Drop no instance for a low score, because masks are weighted by their scores.
            box_score_thresh=0.0,
            box_detections_per_img=20,
        )
    if system == "resunet":
        from monai.networks.nets import UNet

        channels = (64, 128, 256, 512, 1024)
        network = UNet(2, 3, channels[0], channels, strides=(2, 2, 2, 2), num_res_units=2, norm="BATCH")
        # End with a convolution, as the paper does: the last unit normalises its output channels, and with one channel
        # per region this would bound the logits and leave the background near 0.5.
        return nn.Sequential(network, nn.BatchNorm2d(channels[0]), nn.PReLU(), nn.Conv2d(channels[0], num_regions, 1))
    import segmentation_models_pytorch as smp

    return smp.create_model(system, encoder_weights=weights, classes=num_regions)


class Baseline(PreTrainedModel):
    """A network with one output channel per region, trained with the loss of SAM2-UNet."""

    config_class = BaselineConfig
    main_input_name = "pixel_values"

    def __init__(self, config: BaselineConfig):
        super().__init__(config)
        self.network = build_network(config.system, len(config.regions), config.weights)

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the initial weights of the network's library."""

    region_masks = Sam2UNetForSemanticSegmentation.region_masks
    compute_loss = Sam2UNetForSemanticSegmentation.compute_loss

    def forward(self, pixel_values: torch.Tensor, labels: Labels = None) -> Sam2UNetOutput:
        """Segment images of shape `(batch_size, 3, height, width)`; labels are as those of SAM2-UNet."""
        height, width = pixel_values.shape[-2:]
        padded = F.pad(pixel_values, (0, -width % STRIDE, 0, -height % STRIDE))
        logits = self.network(padded)[..., :height, :width]
        return Sam2UNetOutput(loss=None if labels is None else self.compute_loss([logits], labels), logits=logits)


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

    def forward(self, pixel_values: torch.Tensor, labels: Labels = None) -> Sam2UNetOutput:
        """Segment as [`Baseline.forward`] does, but return no logits in training mode with labels: there are none."""
        height, width = pixel_values.shape[-2:]
        # The network resizes images to these sizes; set those of the images.
        self.network.transform.min_size, self.network.transform.max_size = (min(height, width),), max(height, width)
        # Detect without labels in training mode too, in which the batch norm of the backbone is estimated anew.
        is_trained = self.training and labels is not None
        self.network.train(is_trained)
        self.network.backbone.train(self.training)
        if is_trained:
            masks, _ = self.region_masks(labels)
            losses = self.network(list(pixel_values), [instances(image_masks) for image_masks in masks])
            return Sam2UNetOutput(loss=torch.stack(list(losses.values())).sum())
        detections = self.network(list(pixel_values))
        probabilities = pixel_values.new_zeros(len(pixel_values), len(self.config.regions), height, width)
        for image, detection in zip(probabilities, detections, strict=True):
            weighted = detection["masks"][:, 0] * detection["scores"][:, None, None]
            for label in detection["labels"].unique().tolist():
                image[label - 1] = weighted[detection["labels"] == label].amax(dim=0)
        logits = torch.logit(probabilities, eps=1e-6)
        return Sam2UNetOutput(loss=None if labels is None else self.compute_loss([logits], labels), logits=logits)


def build_baseline(system: str, regions: dict[str, list[int]], weights: str | None = None) -> Baseline:
    """Build a system other than SAM2-UNet, or exit if its library is missing."""
    model_class = MaskRCNNBaseline if system == "maskrcnn" else Baseline
    try:
        ignore_index = default_ignore_index(regions)
        return model_class(BaselineConfig(system=system, regions=regions, weights=weights, ignore_index=ignore_index))
    except ImportError as err:
        raise SystemExit(f'{system} needs {err.name}. Install it with `pip install "sam2unet-hf[compare]"`.') from err
