"""PyTorch SAM2-UNet: SAM 2's Hiera encoder with adapters, receptive field blocks and a U-Net decoder."""

import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput, logging

from .checkpoint_sam2unet import Sam2UNetCheckpointMixin
from .configuration_sam2unet import Sam2UNetConfig
from .crop_sam2unet import OUTSIDE_LOGIT
from .decoder_sam2unet import Sam2UNetConvNorm, Sam2UNetDecodeHead
from .encoder_sam2unet import Sam2UNetEncoder
from .loss_sam2unet import deep_supervision_loss
from .weights_sam2unet import check_state_dict, is_pretrained_weight, load_sam2_encoder
from .windows_sam2unet import in_chunks


logger = logging.get_logger(__name__)

# The deepest stride; the window position embedding tiles only multiples of it.
STRIDE = 32

MIN_IMAGE_SIZE = 64


@dataclass
class Sam2UNetOutput(ModelOutput):
    """Output of [`Sam2UNetForSemanticSegmentation`].

    Args:
        loss: Scalar, when labels are given.
        logits: Raw scores of shape `(batch_size, num_regions, height, width)` at the size of the input; -110 where
            `pixel_mask` is false.
        auxiliary_logits: Raw scores of the side outputs at stride 16 and stride 8, each of the shape of `logits`;
            when asked for or when labels are given.
        hidden_states: The encoder's four feature maps, when asked for, each of shape
            `(batch_size, embed_dim_per_stage[i], height / stride, width / stride)` with strides 4, 8, 16 and 32,
            where height and width are those of the input padded to multiples of 32.
        crop_boxes: Those of the input, when given, so that the image processor puts masks back where they belong.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    auxiliary_logits: tuple[torch.Tensor, torch.Tensor] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    crop_boxes: torch.Tensor | None = None


class Sam2UNetPreTrainedModel(Sam2UNetCheckpointMixin):
    """Weight initialisation and the features that SAM2-UNet supports."""

    config_class = Sam2UNetConfig
    base_model_prefix = "sam2unet"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Sam2UNetBlock", "Sam2UNetReceptiveFieldBlock", "Sam2UNetUpBlock"]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers guesses from the source of the attention class, and guesses wrong here.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as PyTorch does, and an encoder that does not come from SAM 2 as transformers does."""
        if isinstance(module, Sam2UNetEncoder):
            init.zeros_(module.pos_embed)
            init.zeros_(module.pos_embed_window)
            # Called after the layers in it, so this replaces what the last branch did to them.
            for name, layer in module.named_modules():
                if isinstance(layer, (nn.Linear, nn.Conv2d)) and ".adapter." not in name:
                    init.trunc_normal_(layer.weight, std=self.config.backbone_config.initializer_range)
                    init.zeros_(layer.bias)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    def freeze_encoder(self, freeze: bool = True) -> None:
        """Freeze or release the encoder's own weights; adapters and decoder stay trainable.

        Sets `config.freeze_encoder` too, so that it is saved and restored with the model.

        Args:
            freeze: `False` makes every weight trainable.
        """
        self.config.freeze_encoder = freeze
        for name, parameter in self.named_parameters():
            # Quantised weights are integers, which have no gradient.
            if name.startswith("encoder.") and parameter.is_floating_point():
                parameter.requires_grad_(not (freeze and is_pretrained_weight(name)))

    def fuse_for_inference(self, fuse: bool = True) -> None:
        """Fold each batch norm into the convolution before it; logits change by rounding alone.

        Parameters and `state_dict` stay as they are. `train()`, loading weights and `fuse_for_inference(False)` undo
        it. Call it again after changing weights in any other way.

        Args:
            fuse: `False` undoes it.

        Raises:
            ValueError: If the model is in training mode, where batch norm takes its statistics from each batch, or if
                weights of it are offloaded, so that they are not there to be folded.
        """
        if fuse and self.training:
            raise ValueError("`fuse_for_inference` needs a model in eval mode. Call `model.eval()` first.")
        if fuse and any(weight.is_meta for weight in self.parameters()):
            raise ValueError(
                "`fuse_for_inference` needs all weights, of which some are offloaded. Load the model without "
                "`device_map`, or leave it out."
            )
        for module in self.modules():
            if isinstance(module, Sam2UNetConvNorm):
                module.fuse(fuse)


class Sam2UNetForSemanticSegmentation(Sam2UNetPreTrainedModel):
    """SAM2-UNet: SAM 2's Hiera encoder with adapters and a U-Net decoder, one sigmoid channel per region.

    With `config.freeze_encoder` only adapters and decoder are trained.

    Args:
        config: Sizes, regions and loss options.

    Source: arXiv 2408.08870; for brain tumours doi 10.3390/app15063267.

    Example:
        ```python
        >>> import torch
        >>> from sam2unet_hf import Sam2UNetConfig, Sam2UNetForSemanticSegmentation

        >>> model = Sam2UNetForSemanticSegmentation(Sam2UNetConfig.from_preset("tiny")).eval()
        >>> with torch.inference_mode():
        ...     logits = model(torch.zeros(1, 3, 96, 64)).logits
        >>> logits.shape
        torch.Size([1, 1, 96, 64])

        ```
    """

    def __init__(self, config: Sam2UNetConfig):
        super().__init__(config)
        self.encoder = Sam2UNetEncoder(config)
        self.decode_head = Sam2UNetDecodeHead(config)
        self.post_init()
        self.freeze_encoder(config.freeze_encoder)

    def get_input_embeddings(self) -> nn.Module:
        """Return the layer that makes tokens of pixels, which FSDP and PEFT ask for."""
        return self.encoder.patch_embed

    @classmethod
    def from_sam2(
        cls,
        source: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        num_channels: int | None = None,
        **config_kwargs: Any,
    ) -> "Sam2UNetForSemanticSegmentation":
        """Build a model on a pretrained SAM 2 or SAM 2.1 encoder; adapters and decoder are new.

        Args:
            source: Hub id such as `"facebook/sam2-hiera-large"`, local folder of such a checkpoint, or original `.pt`
                file of SAM 2. The papers use SAM 2, not 2.1.
            revision: Branch, tag or commit on the Hub.
            token: Access token for the Hub, as in `from_pretrained`.
            cache_dir: Folder for downloads, as in `from_pretrained`.
            num_channels: Channels of the images, by default the three of SAM 2. For another number n, each channel
                gets a patch embedding of the sum over SAM 2's three, divided by n, so that an image that is the same
                in all channels gives the features that it gives in three.
            **config_kwargs: Fields of [`Sam2UNetConfig`], such as `regions`.

        Raises:
            FileNotFoundError: If `source` is the path of a file that does not exist.
            OSError: If it is no folder with a checkpoint and no repository that can be reached.
            TypeError: If an argument is no field of the configuration.
            ValueError: If it holds no SAM 2 encoder, or one with missing keys or of another size.
        """
        if unknown := config_kwargs.keys() - Sam2UNetConfig.__dataclass_fields__.keys():
            raise TypeError(f"`from_sam2` got {', '.join(sorted(unknown))}, which is no field of `Sam2UNetConfig`.")
        backbone_config = config_kwargs.pop("backbone_config", None)
        download_kwargs: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
        encoder = load_sam2_encoder(source, backbone_config, num_channels, **download_kwargs)
        provenance = {"encoder_source": encoder.source, "encoder_revision": encoder.revision}
        model = cls(Sam2UNetConfig(backbone_config=encoder.backbone_config, **provenance, **config_kwargs))
        expected = {name: value for name, value in model.encoder.state_dict().items() if ".adapter." not in name}
        backbone = model.config.backbone_config
        size = f"an encoder of width {backbone.hidden_size} with blocks {backbone.blocks_per_stage}"
        check_state_dict(encoder.state_dict, expected, str(source), size)
        model.encoder.load_state_dict(encoder.state_dict, strict=False)
        return model

    def region_masks(self, label_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn label maps `(batch_size, height, width)` into the masks of the regions and of the pixels that count.

        The first is of shape `(batch_size, num_regions, height, width)`, float32; the other has one channel.
        """
        ids = [torch.tensor(label_ids, device=label_map.device) for label_ids in self.config.regions.values()]
        masks = torch.stack([torch.isin(label_map, region) for region in ids], dim=1)
        # As int64, because -100 would be 156 among bytes.
        return masks.float(), (label_map.long() != self.config.ignore_index).unsqueeze(1)

    def compute_loss(self, outputs: list[torch.Tensor], labels: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        """Deeply supervised loss, at the size of the labels, of scores `(batch_size, num_regions, height, width)`."""
        if not isinstance(labels, torch.Tensor):
            images = zip(labels, *outputs, strict=True)
            losses = [self.compute_loss([logits[None] for logits in image], label[None]) for label, *image in images]
            return torch.stack(losses).mean()
        labels = labels.to(outputs[0].device)
        if labels.is_floating_point():
            masks, valid = labels, labels != self.config.ignore_index
        else:
            masks, valid = self.region_masks(labels)
        if outputs[0].shape[-2:] != masks.shape[-2:]:
            outputs = [F.interpolate(logits, size=masks.shape[-2:], mode="bilinear") for logits in outputs]
        config = self.config
        return deep_supervision_loss(
            outputs,
            masks,
            output_weights=[1.0, *config.auxiliary_loss_weights],
            valid=valid,
            weight_bce=config.weight_bce,
            iou_over_batch=config.iou_over_batch,
        )

    def check_labels(self, labels: torch.Tensor | list[torch.Tensor], batch_size: int) -> None:
        """Raise a `ValueError` if the labels do not fit the batch and the regions."""
        num_regions = len(self.config.regions)

        def fits(label: torch.Tensor) -> bool:
            if label.is_floating_point():
                return label.ndim == 3 and len(label) == num_regions
            return label.ndim == 2 and label.dtype != torch.bool

        is_tensor = isinstance(labels, torch.Tensor)
        if len(labels) != batch_size or not all(fits(label) for label in (labels[:1] if is_tensor else labels)):
            got = [f"{tuple(label.shape)} {label.dtype}" for label in ([labels] if is_tensor else labels)]
            raise ValueError(
                f"`labels` must be integer label maps of shape ({batch_size}, height, width), or float masks in "
                f"[0, 1] of shape ({batch_size}, {num_regions}, height, width) with one channel per region of "
                f"{list(self.config.regions)}, or a list of {batch_size} of either without the batch dimension; got "
                f"{', '.join(got)}."
            )

    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        crop_boxes: torch.Tensor | None = None,
        labels: torch.Tensor | list[torch.Tensor] | None = None,
        output_auxiliary_logits: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> tuple | Sam2UNetOutput:
        """Segment a batch of images.

        Args:
            pixel_values: Normalised images of shape `(batch_size, num_channels, height, width)`, height and width
                from 64 up. Multiples of 32 are native; other sizes are padded with zeros at the right and bottom, and
                the logits are cropped.
            pixel_mask: Where something may be found, of shape `(batch_size, height, width)`, such as in the head.
                Logits become -110 elsewhere, a probability of exactly 0. The loss and the side outputs do not depend
                on it.
            crop_boxes: Where in its slice each image was cut out, of shape `(batch_size, 4)`; only handed through to
                the output.
            labels: Label maps `(batch_size, height, width)` of integer ids, or float region masks in [0, 1] of shape
                `(batch_size, num_regions, height, width)`, of any size: logits are resized to them for the loss. Where
                the images of a batch have labels of different sizes, a list with one tensor per image; the loss is
                then the mean over the images. Pixels of `config.ignore_index` count nowhere, in masks too.
            output_auxiliary_logits: Return the side outputs also without labels.
            output_hidden_states: Return the encoder's feature maps. Defaults to `config.output_hidden_states`.
            return_dict: `False` returns a tuple. Defaults to `config.return_dict`.

        Raises:
            ValueError: If an image is too small or has the wrong number of channels, or `pixel_mask`, `crop_boxes` or
                labels do not fit.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        num_channels = self.config.backbone_config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels:
            raise ValueError(
                f"`pixel_values` must have shape (batch_size, {num_channels}, height, width), got "
                f"{tuple(pixel_values.shape)}. `Sam2UNetImageProcessor` makes them from images."
            )
        height, width = pixel_values.shape[-2:]
        if min(height, width) < MIN_IMAGE_SIZE:
            raise ValueError(
                f"`pixel_values` must be at least {MIN_IMAGE_SIZE} pixels high and wide, got {height}x{width}. "
                "Resize the images, for example with `Sam2UNetImageProcessor`."
            )
        batch_size = pixel_values.shape[0]  # `len` would fix it in an exported graph
        for name, value, shape in (("pixel_mask", pixel_mask, (height, width)), ("crop_boxes", crop_boxes, (4,))):
            if value is not None and value.shape != (batch_size, *shape):
                raise ValueError(
                    f"`{name}` must have shape {(batch_size, *shape)} for `pixel_values` of shape "
                    f"{tuple(pixel_values.shape)}, got {tuple(value.shape)}. `Sam2UNetImageProcessor` makes both."
                )
        if labels is not None:
            self.check_labels(labels, batch_size)

        pixel_values = pixel_values.to(self.encoder.patch_embed.projection.weight.dtype)
        pad_height, pad_width = -height % STRIDE, -width % STRIDE
        if pad_height or pad_width:
            pixel_values = F.pad(pixel_values, (0, pad_width, 0, pad_height))
        feature_maps = self.encoder(pixel_values)
        decode = partial(self.decode_head, output_auxiliary_logits=output_auxiliary_logits or labels is not None)
        rows, columns = feature_maps[0].shape[-2:]
        if self.training:  # batch norm takes its statistics from the whole batch
            decoded = decode(*feature_maps)
        else:
            decoded = in_chunks(decode, *feature_maps, tokens_per_image=rows * columns)
        upsampled = [F.interpolate(scores, size=pixel_values.shape[-2:], mode="bilinear") for scores in decoded]
        outputs = [scores[..., :height, :width] for scores in upsampled]
        logits = outputs[0]
        if pixel_mask is not None:  # the inputs of a model that is spread over devices lie elsewhere
            logits = logits.masked_fill(~pixel_mask.to(logits.device).bool().unsqueeze(1), OUTSIDE_LOGIT)
        result = Sam2UNetOutput(
            loss=None if labels is None else self.compute_loss(outputs, labels),
            logits=logits,
            auxiliary_logits=tuple(outputs[1:]) or None,
            hidden_states=feature_maps if output_hidden_states else None,
            crop_boxes=crop_boxes,
        )
        return result if return_dict else result.to_tuple()


__all__ = ["Sam2UNetForSemanticSegmentation", "Sam2UNetOutput", "Sam2UNetPreTrainedModel"]
