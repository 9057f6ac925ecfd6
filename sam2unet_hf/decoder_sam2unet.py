"""The decoder of SAM2-UNet: receptive field blocks, a U-Net decoder and the classifiers."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .configuration_sam2unet import Sam2UNetConfig


def undo_fusion(module: "Sam2UNetConvNorm", incompatible_keys: object) -> None:
    """Undo `fuse` after loading other weights; a function, so that the module can be pickled."""
    module.fuse(False)


class Sam2UNetConvNorm(nn.Module):
    """Convolution without bias and batch norm, which `fuse` turns into one convolution with bias until `train`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], dilation: int = 1):
        super().__init__()
        # Write "same" padding as numbers, because the string cannot be exported.
        height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        padding = (height // 2 * dilation, width // 2 * dilation)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        # Keep the parameters beside these, so that the model is saved and trained on as if never fused.
        self.fused_weight: torch.Tensor | None
        self.fused_bias: torch.Tensor | None
        self.register_buffer("fused_weight", None, persistent=False)
        self.register_buffer("fused_bias", None, persistent=False)
        self.register_load_state_dict_post_hook(undo_fusion)

    @torch.no_grad()
    def fuse(self, fuse: bool = True) -> None:
        """Fold what batch norm does in eval mode into weight and bias of the convolution, or undo it."""
        self.fused_weight, self.fused_bias = None, None
        if fuse:
            conv, norm = self.conv, self.norm
            weight, bias = fuse_conv_bn_weights(
                conv.weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            # Detach them, because parameters would be saved and trained.
            self.fused_weight, self.fused_bias = weight.detach(), bias.detach()

    def train(self, mode: bool = True) -> "Sam2UNetConvNorm":
        """Undo `fuse` before training, which changes what was folded."""
        if mode:
            self.fuse(False)
        return super().train(mode)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.fused_weight is None:
            return self.norm(self.conv(hidden_states))
        padding, dilation = self.conv.padding, self.conv.dilation
        return F.conv2d(hidden_states, self.fused_weight, self.fused_bias, padding=padding, dilation=dilation)


class Sam2UNetReceptiveFieldBlock(nn.Module):
    """Four branches of growing receptive field over one encoder feature map, fused to the decoder's channels.

    The reference's convolutions carry a ReLU that its forward never calls; there is none here either.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()

        def branch(size: int) -> nn.Sequential:
            return nn.Sequential(
                Sam2UNetConvNorm(in_channels, out_channels, 1),
                Sam2UNetConvNorm(out_channels, out_channels, (1, size)),
                Sam2UNetConvNorm(out_channels, out_channels, (size, 1)),
                Sam2UNetConvNorm(out_channels, out_channels, 3, dilation=size),
            )

        first = nn.Sequential(Sam2UNetConvNorm(in_channels, out_channels, 1))
        self.branches = nn.ModuleList([first, branch(3), branch(5), branch(7)])
        self.fusion = Sam2UNetConvNorm(4 * out_channels, out_channels, 3)
        self.shortcut = Sam2UNetConvNorm(in_channels, out_channels, 1)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        branches = torch.cat([branch(feature_map) for branch in self.branches], dim=1)
        return F.relu(self.fusion(branches) + self.shortcut(feature_map))


class Sam2UNetUpBlock(nn.Module):
    """One decoder step: upsample by two, join the skip connection, convolve twice."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = Sam2UNetConvNorm(2 * channels, channels, 3)
        self.conv2 = Sam2UNetConvNorm(channels, channels, 3)

    def forward(self, hidden_states: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        # The maps are exactly twice as large from stage to stage, so the reference's padding here never applies.
        upsampled = F.interpolate(hidden_states, scale_factor=2, mode="bilinear", align_corners=True)
        hidden_states = F.relu(self.conv1(torch.cat([skip, upsampled], dim=1)))
        return F.relu(self.conv2(hidden_states))


class Sam2UNetDecodeHead(nn.Module):
    """Receptive field blocks, U-Net decoder and the three classifiers."""

    def __init__(self, config: Sam2UNetConfig):
        super().__init__()
        channels, num_regions = config.decoder_channels, len(config.regions)
        self.receptive_field_blocks = nn.ModuleList(
            [Sam2UNetReceptiveFieldBlock(dim, channels) for dim in config.backbone_config.embed_dim_per_stage]
        )
        self.up_blocks = nn.ModuleList([Sam2UNetUpBlock(channels) for _ in range(3)])
        self.auxiliary_classifiers = nn.ModuleList([nn.Conv2d(channels, num_regions, 1) for _ in range(2)])
        self.classifier = nn.Conv2d(channels, num_regions, 1)

    def forward(self, *feature_maps: torch.Tensor, output_auxiliary_logits: bool = False) -> tuple[torch.Tensor, ...]:
        """Return raw scores `(batch_size, num_regions, ...)` at stride 4 and, when asked for, at strides 16 and 8."""
        *skips, hidden_states = [
            block(feature_map) for block, feature_map in zip(self.receptive_field_blocks, feature_maps, strict=True)
        ]
        decoded = []
        for up_block, skip in zip(self.up_blocks, reversed(skips), strict=True):
            hidden_states = up_block(hidden_states, skip)
            decoded.append(hidden_states)
        logits = [self.classifier(hidden_states)]
        if output_auxiliary_logits:
            logits += [head(side) for head, side in zip(self.auxiliary_classifiers, decoded[:2], strict=True)]
        return tuple(logits)
