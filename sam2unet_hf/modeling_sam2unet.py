"""PyTorch SAM2-UNet: SAM 2's Hiera encoder with adapters, receptive field blocks and a U-Net decoder."""

# transformers types the fields of a config by what the constructor takes, not by what an instance holds.
# mypy: disable-error-code="arg-type, union-attr"

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from transformers import PreTrainedConfig, PreTrainedModel, Sam2HieraDetConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, logging

from .configuration_sam2unet import Sam2UNetConfig
from .image_processing_sam2unet import Sam2UNetImageProcessor
from .loss_sam2unet import deep_supervision_loss
from .sam2_encoder import (
    check_state_dict,
    encoder_sha256,
    is_local,
    load_sam2_encoder,
    read_safetensors,
    restore_encoder,
    weight_files,
)


logger = logging.get_logger(__name__)

# The deepest stride; the window position embedding tiles only multiples of it.
STRIDE = 32
MIN_IMAGE_SIZE = 64

# Tokens of the images that inference on a CPU runs at once. From here on larger batches gained no speed when timed.
MAX_TOKENS = 8192

# Arguments of `from_pretrained` that say how to reach a repository, whichever.
DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")


@dataclass
class Sam2UNetOutput(ModelOutput):
    """Output of [`Sam2UNetForSemanticSegmentation`].

    Args:
        loss: Scalar, when labels are given.
        logits: Raw scores of shape `(batch_size, num_regions, height, width)` at the size of the input.
        auxiliary_logits: Raw scores of the side outputs at stride 16 and stride 8, each of the shape of `logits`;
            when asked for or when labels are given.
        hidden_states: The encoder's four feature maps, when asked for, each of shape
            `(batch_size, embed_dim_per_stage[i], height / stride, width / stride)` with strides 4, 8, 16 and 32,
            where height and width are those of the input padded to multiples of 32.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    auxiliary_logits: tuple[torch.Tensor, torch.Tensor] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class Sam2UNetPatchEmbeddings(nn.Module):
    """Convolution of stride 4 from pixels to tokens."""

    def __init__(self, config: Sam2HieraDetConfig):
        super().__init__()
        self.projection = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            kernel_size=config.patch_kernel_size,
            stride=config.patch_stride,
            padding=config.patch_padding,
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        # (B, C, H, W) -> (B, H/4, W/4, hidden_size)
        return self.projection(pixel_values).permute(0, 2, 3, 1)


class Sam2UNetAdapter(nn.Module):
    """Trainable bottleneck in front of an encoder block: `x + GELU(W2 GELU(W1 x))`."""

    def __init__(self, hidden_size: int, bottleneck_size: int):
        super().__init__()
        self.down_proj = nn.Linear(hidden_size, bottleneck_size)
        self.up_proj = nn.Linear(bottleneck_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + F.gelu(self.up_proj(F.gelu(self.down_proj(hidden_states))))


def is_sam2_weight(name: str) -> bool:
    """Whether a weight of the model comes from SAM 2: those of the encoder but for the adapters."""
    return name.startswith("encoder.") and ".adapter." not in name


def in_chunks(
    function: Callable[..., tuple[torch.Tensor, ...]], *maps: torch.Tensor, tokens_per_image: int
) -> tuple[torch.Tensor, ...]:
    """Apply a function of batches of images, in inference on a CPU to a few images at a time.

    Large tensors are slow there: the system hands out their memory anew each time. So this saves time and memory both.

    Args:
        function: Takes and returns tensors whose first dimension is the batch; each image is treated alone.
        *maps: The tensors.
        tokens_per_image: How many of `MAX_TOKENS` an image counts for.
    """
    chunk_size = max(1, MAX_TOKENS // tokens_per_image)
    is_inference = not torch.is_grad_enabled() and maps[0].device.type == "cpu" and not torch.compiler.is_compiling()
    if not is_inference or len(maps[0]) <= chunk_size:
        return function(*maps)
    chunks = zip(*(tensor.split(chunk_size) for tensor in maps), strict=True)
    return tuple(torch.cat(parts) for parts in zip(*(function(*chunk) for chunk in chunks), strict=True))


def max_pool_tokens(tokens: torch.Tensor, stride: list[int]) -> torch.Tensor:
    """Max-pool a map of tokens of shape `(batch_size, height, width, channels)`."""
    return F.max_pool2d(tokens.permute(0, 3, 1, 2), kernel_size=stride, stride=stride).permute(0, 2, 3, 1)


def pool_windows(windows: torch.Tensor, height: int, width: int, stride: list[int]) -> torch.Tensor:
    """Max-pool windows of shape `(num_windows, height * width, channels)`."""
    return max_pool_tokens(windows.unflatten(1, (height, width)), stride).flatten(1, 2)


def split_length(length: int, window_size: int) -> list[tuple[int, int, int]]:
    """Cut `length` into a band of full windows and a band of what is left: `[(start, band, window), ...]`."""
    full = length // window_size * window_size
    bands = ((0, full, window_size), (full, length - full, length - full))
    return [band for band in bands if band[1]]


class WindowGroup(NamedTuple):
    """Equal windows that tile a part of a map; all in tokens.

    Attributes:
        top: First row of the part.
        left: First column of the part.
        height: Rows of the part.
        width: Columns of the part.
        window_height: Rows of a window.
        window_width: Columns of a window.
    """

    top: int
    left: int
    height: int
    width: int
    window_height: int
    window_width: int


class Sam2UNetWindowLayout:
    """The order in which the tokens of a batch of maps lie in memory: window after window.

    All layers but the attention and the pooling treat each token alone, so tokens are brought into this order once per
    change of the window size, and not, as in SAM 2, into windows and back in every block. Windows on the right and
    bottom edges are smaller than the others, so a map is cut into at most four groups of equal windows (full, right,
    bottom, corner). The tokens of a batch lie group by group, and within a group image by image, so that the windows
    of a group are a view.

    Args:
        batch_size: Number of maps.
        height: Rows of a map.
        width: Columns of a map.
        window_size: Side of a full window.
    """

    def __init__(self, batch_size: int, height: int, width: int, window_size: int):
        self.batch_size, self.height, self.width, self.window_size = batch_size, height, width, window_size
        self.groups = [
            WindowGroup(top, left, band_height, band_width, window_height, window_width)
            for top, band_height, window_height in split_length(height, window_size)
            for left, band_width, window_width in split_length(width, window_size)
        ]

    def pack(self, maps: torch.Tensor) -> torch.Tensor:
        """Order maps of shape `(batch_size, height, width, channels)` as tokens of shape `(tokens, channels)`."""
        packed = []
        for top, left, height, width, window_height, window_width in self.groups:
            windows = maps[:, top : top + height, left : left + width]
            windows = windows.unflatten(2, (-1, window_width)).unflatten(1, (-1, window_height))
            # (B, rows, window height, columns, window width, C) -> (B, rows, columns, window height, width, C)
            packed.append(windows.transpose(2, 3).flatten(0, 4))
        return torch.cat(packed) if len(packed) > 1 else packed[0]

    def unpack(self, tokens: torch.Tensor) -> torch.Tensor:
        """Undo `pack`."""
        parts = []
        for group, windows in zip(self.groups, self.split(tokens), strict=True):
            _, _, height, width, window_height, window_width = group
            rows, columns = height // window_height, width // window_width
            part = windows.unflatten(1, (window_height, window_width)).unflatten(0, (-1, rows, columns))
            parts.append(part.transpose(2, 3).flatten(3, 4).flatten(1, 2))
        # Two parts side by side make a band.
        per_band = len(split_length(self.width, self.window_size))
        bands = [parts[start : start + per_band] for start in range(0, len(parts), per_band)]
        joined = [torch.cat(band, dim=2) if len(band) > 1 else band[0] for band in bands]
        return torch.cat(joined, dim=1) if len(joined) > 1 else joined[0]

    def split(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Return the windows of each group, `(num_windows, window_height * window_width, channels)`; views."""
        sizes = [self.batch_size * group.height * group.width for group in self.groups]
        groups = tokens.split(sizes) if len(sizes) > 1 else [tokens]
        return [
            part.unflatten(0, (-1, group.window_height * group.window_width))
            for part, group in zip(groups, self.groups, strict=True)
        ]

    def merge(self, windows: list[torch.Tensor]) -> torch.Tensor:
        """Undo `split`."""
        return torch.cat([part.flatten(0, 1) for part in windows]) if len(windows) > 1 else windows[0].flatten(0, 1)

    def images(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the tokens of each image, `(batch_size, height * width, channels)`, in the order of the windows."""
        parts = [part.flatten(0, 1).unflatten(0, (self.batch_size, -1)) for part in self.split(tokens)]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def from_images(self, images: torch.Tensor) -> torch.Tensor:
        """Undo `images`."""
        parts = images.split([group.height * group.width for group in self.groups], dim=1)
        return torch.cat([part.flatten(0, 1) for part in parts]) if len(parts) > 1 else images.flatten(0, 1)

    def pool(self, tokens: torch.Tensor, stride: list[int]) -> torch.Tensor:
        """Max-pool within windows, whose sides are even; the result is in the order of `pooled(stride)`."""
        return self.merge(
            [
                pool_windows(windows, group.window_height, group.window_width, stride)
                for windows, group in zip(self.split(tokens), self.groups, strict=True)
            ]
        )

    def pooled(self, stride: list[int]) -> "Sam2UNetWindowLayout":
        """Return the layout after `pool`."""
        return type(self)(
            self.batch_size, self.height // stride[0], self.width // stride[1], self.window_size // stride[0]
        )


def eager_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None
) -> torch.Tensor:
    """Compute what `scaled_dot_product_attention` computes, step by step."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype) @ value


class Sam2UNetWindowAttention(nn.Module):
    """Multi-head attention within windows, with optional query pooling, that never computes on padding.

    SAM 2 pads a map with zeros until windows tile it, and lets the padded tokens be attended to. This gives the same
    result without them. A padded token is zero after the layer norm, so its key and its value are those parts of the
    bias of `qkv`: the same for all n padded tokens of a window. In the softmax, n equal keys `k` with equal values
    `v` add `n * exp(q.k)` to the denominator and `n * exp(q.k) * v` to the numerator, and `n * exp(q.k)` is
    `exp(q.k + log(n))`. So one key with `log(n)` added to its score stands for all of them, exactly. The queries of
    padded tokens are thrown away in the original, so none is computed.
    """

    def __init__(
        self,
        config: Sam2HieraDetConfig,
        dim: int,
        dim_out: int,
        num_attention_heads: int,
        window_size: int,
        query_stride: list[int] | None,
    ):
        super().__init__()
        self.config = config
        self.num_attention_heads = num_attention_heads
        self.window_size = window_size
        self.query_stride = query_stride
        self.qkv = nn.Linear(dim, dim_out * 3)
        self.proj = nn.Linear(dim_out, dim_out)

    def forward(self, hidden_states: torch.Tensor, layout: Sam2UNetWindowLayout) -> torch.Tensor:
        """Attend within windows; tokens of shape `(tokens, dim)` -> `(tokens, dim_out)`, maybe pooled."""
        # (tokens, 3 * dim_out)
        qkv = self.qkv(hidden_states)
        pooled = layout if self.query_stride is None else layout.pooled(self.query_stride)
        if self.window_size == 0:
            # The order of the tokens of an image is of no importance to attention over all of them.
            query, key, value = layout.images(qkv).chunk(3, dim=-1)
            if self.query_stride is not None:
                query = pooled.images(layout.pool(qkv.chunk(3, dim=-1)[0], self.query_stride))
            return self.proj(pooled.from_images(self.attend(query, key, value)))
        outputs = []
        for group, windows in zip(layout.groups, layout.split(qkv), strict=True):
            query, key, value = windows.chunk(3, dim=-1)
            if self.query_stride is not None:
                query = pool_windows(query, group.window_height, group.window_width, self.query_stride)
            num_padded = self.window_size**2 - group.window_height * group.window_width
            outputs.append(self.attend(query, key, value, num_padded))
        return self.proj(pooled.merge(outputs))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_padded: int = 0) -> torch.Tensor:
        """Attend within windows of shape `(num_windows, tokens, dim_out)`, with `num_padded` more keys in each."""
        # (num_windows, tokens, dim_out) -> (num_windows, heads, tokens, head_dim)
        query, key, value = (
            tokens.unflatten(2, (self.num_attention_heads, -1)).transpose(1, 2) for tokens in (query, key, value)
        )
        mask = None
        if num_padded:
            num_windows, heads, num_tokens, _ = key.shape
            # The one key and value that stand for all padded tokens.
            _, key_bias, value_bias = self.qkv.bias.to(key.dtype).view(3, 1, heads, 1, -1)
            key = torch.cat([key, key_bias.expand(num_windows, -1, -1, -1)], dim=2)
            value = torch.cat([value, value_bias.expand(num_windows, -1, -1, -1)], dim=2)
            mask = F.pad(key.new_zeros(1, 1, 1, num_tokens), (0, 1), value=math.log(num_padded))
        is_eager = self.config._attn_implementation == "eager"
        is_half = query.dtype in (torch.bfloat16, torch.float16)
        if is_half and query.device.type == "cpu" and query.requires_grad:
            # The backward pass of PyTorch's half-precision kernel for the CPU is up to five times slower.
            is_eager = True
        attention = eager_attention if is_eager else F.scaled_dot_product_attention
        output = attention(query, key, value, attn_mask=mask)
        return output.transpose(1, 2).flatten(2)


class Sam2UNetFeedForward(nn.Module):
    """Two linear layers with the encoder's activation."""

    def __init__(self, config: Sam2HieraDetConfig, dim: int):
        super().__init__()
        hidden_size = int(dim * config.mlp_ratio)
        self.proj_in = nn.Linear(dim, hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.proj_out = nn.Linear(hidden_size, dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.proj_out(self.activation(self.proj_in(hidden_states)))


class Sam2UNetBlock(GradientCheckpointingLayer):
    """Adapter and Hiera block; the first block of stages 2 to 4 halves the resolution by query pooling."""

    def __init__(self, config: Sam2UNetConfig, stage: int, is_first_of_stage: bool, is_global: bool):
        super().__init__()
        backbone = config.backbone_config
        # The first block of a stage still has the dimension and the window of the stage before.
        input_stage = max(stage - 1, 0) if is_first_of_stage else stage
        dim, dim_out = backbone.embed_dim_per_stage[input_stage], backbone.embed_dim_per_stage[stage]
        self.query_stride = backbone.query_stride if is_first_of_stage and stage > 0 else None
        self.adapter = Sam2UNetAdapter(dim, config.adapter_hidden_size)
        self.layer_norm1 = nn.LayerNorm(dim, eps=backbone.layer_norm_eps)
        self.attn = Sam2UNetWindowAttention(
            backbone,
            dim,
            dim_out,
            num_attention_heads=backbone.num_attention_heads_per_stage[stage],
            window_size=0 if is_global else backbone.window_size_per_stage[input_stage],
            query_stride=self.query_stride,
        )
        self.layer_norm2 = nn.LayerNorm(dim_out, eps=backbone.layer_norm_eps)
        self.mlp = Sam2UNetFeedForward(backbone, dim_out)
        self.proj = nn.Linear(dim, dim_out) if dim != dim_out else None

    def forward(self, hidden_states: torch.Tensor, layout: Sam2UNetWindowLayout) -> torch.Tensor:
        residual = self.adapter(hidden_states)
        hidden_states = self.layer_norm1(residual)
        if self.proj is not None:
            residual = self.proj(hidden_states)
        if self.query_stride is not None:
            residual = layout.pool(residual, self.query_stride)
        hidden_states = residual + self.attn(hidden_states, layout)
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class Sam2UNetEncoder(nn.Module):
    """SAM 2's Hiera trunk with an adapter in each block.

    Parameters are named as in transformers' `Sam2HieraDetModel`, adapters aside, so that SAM 2 weights load by name.
    """

    layout_class = Sam2UNetWindowLayout

    def __init__(self, config: Sam2UNetConfig):
        super().__init__()
        backbone = config.backbone_config
        self.patch_embed = Sam2UNetPatchEmbeddings(backbone)
        self.window_sizes = backbone.window_size_per_stage
        background_size = backbone.window_positional_embedding_background_size
        self.pos_embed = nn.Parameter(torch.zeros(1, backbone.hidden_size, *background_size))
        window = (self.window_sizes[0], self.window_sizes[0])
        self.pos_embed_window = nn.Parameter(torch.zeros(1, backbone.hidden_size, *window))
        self.blocks = nn.ModuleList()
        self.stage_ends = []
        for stage, num_blocks in enumerate(backbone.blocks_per_stage):
            for position in range(num_blocks):
                is_global = len(self.blocks) in backbone.global_attention_blocks
                self.blocks.append(Sam2UNetBlock(config, stage, position == 0, is_global))
            self.stage_ends.append(len(self.blocks) - 1)

    def position_embedding(self, height: int, width: int) -> torch.Tensor:
        """Return the embedding of shape `(1, height, width, hidden_size)`: background plus tiled window."""
        background = F.interpolate(self.pos_embed, size=(height, width), mode="bicubic")
        window_height, window_width = self.pos_embed_window.shape[-2:]
        window = self.pos_embed_window.tile(1, 1, height // window_height, width // window_width)
        return (background + window).permute(0, 2, 3, 1)

    def run_stage(self, maps: torch.Tensor, stage: int) -> tuple[torch.Tensor, ...]:
        """Run a stage but for its first block, and the first block of the next, whose windows are those of this one.

        Args:
            maps: Tokens `(batch_size, height, width, channels)`.
            stage: From 0; the first stage is run from its first block on.

        Returns:
            The feature map of the stage and, but for the last stage, the tokens after the next stage's first block,
            both `(batch_size, height, width, channels)`.
        """
        batch_size, height, width, _ = maps.shape
        layout = self.layout_class(batch_size, height, width, self.window_sizes[stage])
        tokens = layout.pack(maps)
        start = self.stage_ends[stage - 1] + 2 if stage else 0
        end = self.stage_ends[stage] + 1
        for block in self.blocks[start:end]:
            tokens = block(tokens, layout)
        feature_map = layout.unpack(tokens)
        if end == len(self.blocks):
            return (feature_map,)
        pool = self.blocks[end]
        return feature_map, layout.pooled(pool.query_stride).unpack(pool(tokens, layout))

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the four feature maps, `(batch_size, channels, height / stride, width / stride)`."""
        maps = self.patch_embed(pixel_values)
        maps = maps + self.position_embedding(*maps.shape[1:3])
        feature_maps = []
        for stage in range(len(self.stage_ends)):
            height, width = maps.shape[1:3]
            feature_map, *rest = in_chunks(partial(self.run_stage, stage=stage), maps, tokens_per_image=height * width)
            # (B, H, W, C) -> (B, C, H, W); a view, channels last in memory
            feature_maps.append(feature_map.permute(0, 3, 1, 2))
            maps = rest[0] if rest else maps
        return tuple(feature_maps)


class Sam2UNetConvNorm(nn.Module):
    """Convolution without bias, then batch norm; one convolution with bias between `fuse` and `train`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], dilation: int = 1):
        super().__init__()
        # "same" padding, written as numbers: the string cannot be exported.
        height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        padding = (height // 2 * dilation, width // 2 * dilation)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        # Beside the parameters, not in their place, so that the model is saved and trained on as if never fused.
        self.fused_weight: torch.Tensor | None
        self.fused_bias: torch.Tensor | None
        self.register_buffer("fused_weight", None, persistent=False)
        self.register_buffer("fused_bias", None, persistent=False)

    @torch.no_grad()
    def fuse(self, fuse: bool = True) -> None:
        """Fold what batch norm does in eval mode into weight and bias of the convolution, or undo it."""
        self.fused_weight, self.fused_bias = None, None
        if fuse:
            conv, norm = self.conv, self.norm
            weight, bias = fuse_conv_bn_weights(
                conv.weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            # Without `detach` they would be parameters.
            self.fused_weight, self.fused_bias = weight.detach(), bias.detach()

    def train(self, mode: bool = True) -> "Sam2UNetConvNorm":
        """Undo `fuse` before training, which changes what was folded."""
        if mode:
            self.fuse(False)
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.fuse(False)
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.fused_weight is not None:
            conv = self.conv
            return F.conv2d(
                hidden_states, self.fused_weight, self.fused_bias, padding=conv.padding, dilation=conv.dilation
            )
        return self.norm(self.conv(hidden_states))


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
        """Return the scores at stride 4 and, when asked for, those of the side outputs at strides 16 and 8."""
        *skips, hidden_states = [
            block(feature_map) for block, feature_map in zip(self.receptive_field_blocks, feature_maps, strict=True)
        ]
        decoded = []
        for up_block, skip in zip(self.up_blocks, reversed(skips), strict=True):
            hidden_states = up_block(hidden_states, skip)
            decoded.append(hidden_states)
        auxiliary = []
        if output_auxiliary_logits:
            auxiliary = [head(side) for head, side in zip(self.auxiliary_classifiers, decoded[:2], strict=True)]
        return self.classifier(hidden_states), *auxiliary


class Sam2UNetPreTrainedModel(PreTrainedModel):
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

    # Where in the repository `name_or_path` the checkpoint was: `revision` and `subfolder`, where given.
    placed: dict[str, Any] = {}

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
                parameter.requires_grad_(not (freeze and is_sam2_weight(name)))

    def fuse_for_inference(self, fuse: bool = True) -> None:
        """Fold each batch norm into the convolution before it; logits change by rounding alone.

        Parameters and `state_dict` stay as they are. `train()`, loading weights and `fuse_for_inference(False)` undo
        it. Call it again after changing weights in any other way.

        Args:
            fuse: `False` undoes it.

        Raises:
            ValueError: If the model is in training mode, where batch norm takes its statistics from each batch.
        """
        if fuse and self.training:
            raise ValueError("`fuse_for_inference` needs a model in eval mode. Call `model.eval()` first.")
        for module in self.modules():
            if isinstance(module, Sam2UNetConvNorm):
                module.fuse(fuse)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load a checkpoint as any transformers model, with the encoder frozen or not as its config says.

        The encoder of a checkpoint that was saved with `trainable_only=True` is fetched from where the config says,
        or from `encoder_source=` (and `encoder_revision=`).

        Raises:
            OSError: If there is no checkpoint, no safetensors file in it, or its encoder cannot be reached.
            ValueError: If a weight file is damaged or a pickle, or the encoder is not the one that was trained on.
        """
        name = pretrained_model_name_or_path
        is_pickle = str(name).endswith((".bin", ".ckpt", ".pt", ".pth"))
        if kwargs.get("use_safetensors") is False or is_pickle:
            raise ValueError(
                f"Weights are loaded from safetensors files only, not from pickles, got {name}. Convert checkpoints "
                "of the reference SAM2-UNet with `python -m sam2unet_hf.conversion`."
            )
        kwargs["use_safetensors"] = True
        is_small = False
        placed: dict[str, Any] = {
            argument: kwargs[argument] for argument in ("revision", "subfolder") if argument in kwargs
        }
        if name is not None and kwargs.get("state_dict") is None:
            config = cls.read_config(kwargs.get("config"), name, kwargs)
            if config.get("transformers_weights") is not None:
                raise ValueError(
                    f"The config of {name} names {config['transformers_weights']} as `transformers_weights`. Weights "
                    "are read from model.safetensors only; remove the field."
                )
            # Raises where a pickle hides among the shards.
            files = {"variant": kwargs.get("variant"), **placed}
            download_kwargs = {argument: kwargs[argument] for argument in DOWNLOAD_ARGUMENTS if argument in kwargs}
            weight_files(name, **files, **{**download_kwargs, "force_download": False})  # super() downloads
            if config.get("encoder_sha256") is not None:
                state_dict = read_safetensors(name, **files, **download_kwargs)
                is_small = not any(map(is_sam2_weight, state_dict))
            if is_small:
                backbone_config = cls.config_class(backbone_config=config["backbone_config"]).backbone_config
                encoder = restore_encoder(config, str(name), backbone_config, **download_kwargs)
                kwargs["state_dict"] = {**state_dict, **{f"encoder.{key}": value for key, value in encoder.items()}}
                kwargs["config"] = kwargs.get("config") or name
                pretrained_model_name_or_path = None
        output_loading_info = kwargs.pop("output_loading_info", False)
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except SafetensorError as err:
            raise ValueError(
                f"A weight file of {name} is damaged ({err}). Copy it again, or pass `force_download=True`."
            ) from err
        model, loading_info = loaded
        if lost := [weight for weight in loading_info["missing_keys"] if is_sam2_weight(weight)]:
            raise ValueError(
                f"{name} lacks {len(lost)} weights of the encoder, such as {sorted(lost)[0]!r}, and its config does "
                "not say where they are: `encoder_source` and `encoder_sha256` are missing. Save it again, with "
                "`trainable_only=True` if the encoder is to stay out."
            )
        if name is not None:
            model.name_or_path = model.config.name_or_path = str(name)
            model.placed = placed
        if not is_small:
            model.config.encoder_sha256 = None
        # transformers replaces the parameters of the constructor by new ones, all trainable.
        model.freeze_encoder(model.config.freeze_encoder)
        return (model, loading_info) if output_loading_info else model

    @classmethod
    def read_config(cls, config: Any, name: str | os.PathLike, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of the config that `from_pretrained` will use."""
        if isinstance(config, PreTrainedConfig):
            return config.to_dict()
        arguments = (*DOWNLOAD_ARGUMENTS, "revision", "subfolder")
        download_kwargs = {argument: kwargs[argument] for argument in arguments if argument in kwargs}
        fields, _ = cls.config_class.get_config_dict(config or name, **download_kwargs)
        overrides = {field: kwargs[field] for field in ("encoder_source", "encoder_revision") if field in kwargs}
        return cls.config_class.from_dict(fields, **overrides).to_dict()


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
        **config_kwargs: Any,
    ) -> "Sam2UNetForSemanticSegmentation":
        """Build a model on a pretrained SAM 2 or SAM 2.1 encoder; adapters and decoder are new.

        Args:
            source: Hub id such as `"facebook/sam2-hiera-large"`, local folder of such a checkpoint, or original `.pt`
                file of SAM 2. The papers use SAM 2, not 2.1.
            revision: Branch, tag or commit on the Hub.
            token: Access token for the Hub, as in `from_pretrained`.
            cache_dir: Folder for downloads, as in `from_pretrained`.
            **config_kwargs: Fields of [`Sam2UNetConfig`], such as `regions`.

        Raises:
            FileNotFoundError: If `source` is the path of a file that does not exist.
            OSError: If it is no folder with a checkpoint and no repository that can be reached.
            TypeError: If an argument is no field of the configuration.
            ValueError: If it holds no SAM 2 encoder, or one with missing keys or of another size.
        """
        if unknown := config_kwargs.keys() - Sam2UNetConfig.__dataclass_fields__.keys():
            raise TypeError(f"`from_sam2` got {', '.join(sorted(unknown))}, which is no field of `Sam2UNetConfig`.")
        encoder = load_sam2_encoder(
            source, config_kwargs.pop("backbone_config", None), revision=revision, token=token, cache_dir=cache_dir
        )
        provenance = {"encoder_source": encoder.source, "encoder_revision": encoder.revision}
        model = cls(Sam2UNetConfig(backbone_config=encoder.backbone_config, **provenance, **config_kwargs))
        expected = {name: value for name, value in model.encoder.state_dict().items() if ".adapter." not in name}
        backbone = model.config.backbone_config
        size = f"an encoder of width {backbone.hidden_size} with blocks {backbone.blocks_per_stage}"
        check_state_dict(encoder.state_dict, expected, str(source), size)
        model.encoder.load_state_dict(encoder.state_dict, strict=False)
        return model

    def check_encoder(self, may_be_local: bool = True) -> dict[str, str | None]:
        """Check that the encoder can be fetched again from `config.encoder_source`, weight by weight.

        Args:
            may_be_local: Whether a path of this machine will do.

        Returns:
            What the config must say to fetch just that one: `encoder_source`, `encoder_revision`, `encoder_sha256`.

        Raises:
            OSError: If it cannot be reached.
            ValueError: If no source is known, or the weights there are not those of this model, or it is a path and
                must not be.
        """
        config = self.config
        if config.encoder_source is None:
            raise ValueError(
                "`trainable_only=True` needs to know where the encoder comes from. Build the model with `from_sam2`, "
                'set `model.config.encoder_source` to a Hub id such as "facebook/sam2-hiera-large" if it is that '
                "encoder, or save the whole model."
            )
        if not may_be_local and is_local(config.encoder_source):
            raise ValueError(
                f"The encoder comes from {config.encoder_source}, which nobody else can reach. Set "
                "`model.config.encoder_source` to a Hub id with the same weights, such as "
                '"facebook/sam2-hiera-large", or push without `trainable_only=True`.'
            )
        found = load_sam2_encoder(config.encoder_source, config.backbone_config, revision=config.encoder_revision)
        for name, value in self.encoder.state_dict().items():
            if ".adapter." not in name:
                there = found.state_dict.get(name)
                if there is None or not torch.equal(there.to(value.dtype), value.cpu()):
                    raise ValueError(
                        f"The encoder is not the one in {config.encoder_source}: {name!r} differs. It was trained, or "
                        "comes from elsewhere; save the whole model, without `trainable_only=True`."
                    )
        return {
            "encoder_source": found.source,
            "encoder_revision": found.revision,
            "encoder_sha256": encoder_sha256(found.state_dict),
        }

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        *args,
        trainable_only: bool = False,
        **kwargs,
    ) -> None:
        """Save weights, configuration and code as any transformers model, for both of its auto classes.

        Args:
            save_directory: Folder to write.
            is_main_process: As in transformers, like all that is not listed here.
            state_dict: The weights, if not those of the model.
            push_to_hub: Upload what was written too. [`push_to_hub`] adds a model card and the image processor.
            *args: As in transformers.
            trainable_only: Leave out the encoder and note in the config where it comes from, so that
                `from_pretrained` fetches it there: 17 MB instead of 0.87 GB for Hiera-L. The encoder there is compared
                with this one first.
            **kwargs: As in transformers.

        Raises:
            OSError: With `trainable_only=True`, if the encoder's source cannot be reached.
            ValueError: With `trainable_only=True`, if the encoder's source is not known, holds other weights, or is
                a path of this machine and the model is pushed.
        """
        config = self.config
        # FSDP makes a class of its own of this one, whose code is no use to anybody else.
        current_class = type(self)
        own_name = current_class.__name__.removeprefix("FSDP")
        own_class = next(base for base in current_class.__mro__ if base.__name__ == own_name)
        # `register_for_auto_class` knows one auto class per model.
        name = f"{own_class.__module__.split('.')[-1]}.{own_name}"
        auto_map = {"AutoModel": name, "AutoModelForSemanticSegmentation": name}
        config.auto_map = {**(getattr(config, "auto_map", None) or {}), **auto_map}
        provenance = {field: getattr(config, field) for field in ("encoder_source", "encoder_revision")}
        written = {**provenance, "encoder_sha256": None}
        if trainable_only:
            # Only one process of several writes.
            if is_main_process:
                provenance = written = self.check_encoder(may_be_local=not push_to_hub)
            weights = self.state_dict() if state_dict is None else state_dict
            state_dict = {name: value for name, value in weights.items() if not is_sam2_weight(name)}
        elif is_local(config.encoder_source):
            # A path is nobody else's business, and a whole model does without.
            written = dict.fromkeys(written)
        for field, value in written.items():
            setattr(config, field, value)
        try:
            self.__class__ = own_class
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, *args, **kwargs)
        finally:
            self.__class__ = current_class
            for field, value in provenance.items():
                setattr(config, field, value)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        trainable_only: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> str:
        """Upload weights, configuration, image processor, code and model card.

        The image processor is the one beside the checkpoint that this model was loaded from, with the regions of the
        model; where the model was trained since, one that lies on the Hub is kept. The card tells of the run in that
        folder, as long as the weights are those of the run; else it claims no results. A card that somebody edited is
        kept, in the folder or else on the Hub.

        Args:
            repo_id: Repository `user/name`, made if need be.
            trainable_only: Leave out the encoder, see [`save_pretrained`].
            commit_message: Title of the commit, `"Upload model"` by default.
            commit_description: Text of the commit.
            private: Make the repository private, where it is new.
            token: Token with the right to write; by default the one of `hf auth login`.
            revision: Branch, made if need be.
            create_pr: Open a pull request instead.
            max_shard_size: Size from which weights are split, such as `"5GB"`.
            tags: Tags for a new card.

        Raises:
            OSError: As [`save_pretrained`], or if the Hub cannot be reached or refuses.
            ValueError: As [`save_pretrained`].
        """
        if trainable_only:
            self.check_encoder(may_be_local=False)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # Or weights in one file would go before new ones in shards.
        outdated = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, trainable_only=trainable_only, max_shard_size=max_shard_size)
            Sam2UNetImageProcessor.register_for_auto_class()
            try:
                # Where this file came with the weights, the package and its template may be missing.
                from sam2unet_hf import hub
            except ImportError:
                hub = None  # type: ignore[assignment]
            is_source = hub and self.name_or_path and hub.is_same_model(Path(folder), Path(self.name_or_path))
            if is_source or not api.file_exists(repo_id, "preprocessor_config.json", revision=revision):
                try:
                    processor = Sam2UNetImageProcessor.from_pretrained(self.name_or_path, token=token, **self.placed)
                except OSError:  # a new model, or a folder without one
                    processor = Sam2UNetImageProcessor()
                processor.regions = self.config.regions
                processor.save_pretrained(folder)
            if hub is None:
                logger.warning("No model card is written: that takes the package sam2unet-hf.")
            else:
                outdated += hub.add_model_card(folder, self.name_or_path, repo_id, revision, token, tags)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload model",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                delete_patterns=outdated,
            )

    def region_masks(self, label_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn label maps into region masks.

        Args:
            label_map: Integer ids of shape `(batch_size, height, width)`.

        Returns:
            Masks of shape `(batch_size, num_regions, height, width)`, float32 in {0, 1}, and the mask of the pixels
            that count, `(batch_size, 1, height, width)`: all that are not `config.ignore_index`.
        """
        ids = [torch.tensor(label_ids, device=label_map.device) for label_ids in self.config.regions.values()]
        masks = torch.stack([torch.isin(label_map, region) for region in ids], dim=1)
        return masks.float(), (label_map != self.config.ignore_index).unsqueeze(1)

    def compute_loss(
        self, outputs: Sequence[torch.Tensor], labels: torch.Tensor | Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Deeply supervised loss of the prediction and the side outputs, all of the input's size, at label size.

        Args:
            outputs: Raw scores of shape `(batch_size, num_regions, height, width)`.
            labels: As in [`forward`].
        """
        if not isinstance(labels, torch.Tensor):
            per_image = zip(labels, *outputs, strict=True)
            losses = [
                self.compute_loss([logits[None] for logits in image], label[None]) for label, *image in per_image
            ]
            return torch.stack(losses).mean()
        if labels.is_floating_point():
            masks, valid = labels, labels != self.config.ignore_index
        else:
            masks, valid = self.region_masks(labels)
        if outputs[0].shape[-2:] != masks.shape[-2:]:
            outputs = [F.interpolate(logits, size=masks.shape[-2:], mode="bilinear") for logits in outputs]
        return deep_supervision_loss(
            outputs,
            masks,
            output_weights=[1.0, *self.config.auxiliary_loss_weights],
            valid=valid,
            boundary_kernel_size=self.config.boundary_kernel_size,
            boundary_weight=self.config.boundary_weight,
            weight_bce=self.config.weight_bce,
        )

    def check_labels(self, labels: torch.Tensor | list[torch.Tensor], batch_size: int) -> None:
        """Raise a `ValueError` if the labels do not fit the batch and the regions."""
        num_regions = len(self.config.regions)
        maps = labels if isinstance(labels, torch.Tensor) else list(labels)
        fits = len(maps) == batch_size
        for label in [maps[0]] if fits and isinstance(maps, torch.Tensor) else maps:
            is_map = label.ndim == 2 and not label.is_floating_point() and label.dtype != torch.bool
            is_masks = label.ndim == 3 and label.is_floating_point() and label.shape[0] == num_regions
            fits = fits and (is_map or is_masks)
        if not fits:
            got = [(tuple(label.shape), label.dtype) for label in ([maps] if isinstance(maps, torch.Tensor) else maps)]
            raise ValueError(
                f"`labels` must be integer label maps of shape ({batch_size}, height, width), or float masks in "
                f"[0, 1] of shape ({batch_size}, {num_regions}, height, width) with one channel per region of "
                f"{list(self.config.regions)}, or a list of {batch_size} of either without the batch dimension; got "
                f"{', '.join(f'{shape} {dtype}' for shape, dtype in got)}."
            )

    def forward(
        self,
        pixel_values: torch.Tensor,
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
            labels: Label maps `(batch_size, height, width)` of integer ids, or float region masks in [0, 1] of shape
                `(batch_size, num_regions, height, width)`, of any size: logits are resized to them for the loss. Where
                the images of a batch have labels of different sizes, a list with one tensor per image; the loss is
                then the mean over the images. Pixels of `config.ignore_index` count nowhere, in masks too.
            output_auxiliary_logits: Return the side outputs also without labels.
            output_hidden_states: Return the encoder's feature maps. Defaults to `config.output_hidden_states`.
            return_dict: `False` returns a tuple. Defaults to `config.return_dict`.

        Raises:
            ValueError: If an image is too small or has the wrong number of channels, or labels do not fit.
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
        if labels is not None:
            self.check_labels(labels, pixel_values.shape[0])

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
        outputs = []
        for output in decoded:
            upsampled = F.interpolate(output, size=pixel_values.shape[-2:], mode="bilinear")
            outputs.append(upsampled[..., :height, :width])

        result = Sam2UNetOutput(
            loss=None if labels is None else self.compute_loss(outputs, labels),
            logits=outputs[0],
            auxiliary_logits=tuple(outputs[1:]) or None,
            hidden_states=feature_maps if output_hidden_states else None,
        )
        return result if return_dict else result.to_tuple()


__all__ = ["Sam2UNetForSemanticSegmentation", "Sam2UNetOutput", "Sam2UNetPreTrainedModel"]
