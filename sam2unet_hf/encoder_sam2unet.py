"""The encoder of SAM2-UNet: SAM 2's Hiera trunk with an adapter in each block."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Sam2HieraDetConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import maybe_autocast

from .configuration_sam2unet import Sam2UNetConfig
from .windows_sam2unet import Sam2UNetWindowLayout, in_chunks, pool_windows


# Up to how many keys `eager_attention` is preferred in inference: twice as fast there, but its scores take memory.
MAX_EAGER_KEYS = 1024


class Sam2UNetPatchEmbeddings(nn.Module):
    """Convolution of stride 4 from pixels to tokens."""

    def __init__(self, config: Sam2HieraDetConfig):
        super().__init__()
        kernel_size, stride, padding = config.patch_kernel_size, config.patch_stride, config.patch_padding
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size, stride, padding)

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


def eager_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None
) -> torch.Tensor:
    """Compute what `scaled_dot_product_attention` computes, step by step."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores + attn_mask
    # The softmax sums up in float32 in any case. For the backward pass its result is kept in float32, too.
    dtype = torch.promote_types(scores.dtype, torch.float32) if scores.requires_grad else None
    return scores.softmax(dim=-1, dtype=dtype).to(value.dtype) @ value


def has_avx512_bfloat16_alone(capabilities: Mapping[str, Any]) -> bool:
    """Return whether a processor multiplies in bfloat16 by AVX512_BF16 and not by AMX, as AMD's do since Zen 4.

    Args:
        capabilities: What `torch.cpu.get_capabilities` returns.
    """
    return bool(capabilities.get("avx512_bf16", False)) and not capabilities.get("amx_bf16", False)


# Older PyTorch does not tell what the processor can do.
HAS_AVX512_BFLOAT16_ALONE = has_avx512_bfloat16_alone(getattr(torch.cpu, "get_capabilities", dict)())


def prefers_eager_attention(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Return whether `eager_attention` is faster than PyTorch's own, whose half-precision kernel for the CPU is slow.

    Its backward pass takes up to five times as long, measured on a Xeon with AMX; in bfloat16 on an EPYC of Zen 5 its
    forward pass takes 1.7 to 2.5 times as long, with 64 to 1024 tokens.
    """
    if query.device.type != "cpu" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    is_short = key.shape[-2] <= MAX_EAGER_KEYS
    return query.requires_grad or (query.dtype == torch.bfloat16 and HAS_AVX512_BFLOAT16_ALONE and is_short)


class Sam2UNetWindowAttention(nn.Module):
    """Multi-head attention within windows, with optional query pooling, that never computes on padding.

    SAM 2 pads a map with zeros until windows tile it, and lets the padded tokens be attended to. This gives the same
    result without them. A padded token is zero after the layer norm, so its key and its value are those parts of the
    bias of `qkv`: the same for all n padded tokens of a window. In the softmax, n equal keys `k` with equal values
    `v` add `n * exp(q.k)` to the denominator and `n * exp(q.k) * v` to the numerator, and `n * exp(q.k)` is
    `exp(q.k + log(n))`. So one key with `log(n)` added to its score stands for all of them, exactly. The queries of
    padded tokens are thrown away in the original, so none is computed.
    """

    def __init__(self, config: Sam2HieraDetConfig, input_stage: int, stage: int, is_global: bool):
        super().__init__()
        self.config = config
        self.num_attention_heads = config.num_attention_heads_per_stage[stage]
        self.window_size = 0 if is_global else config.window_size_per_stage[input_stage]
        self.query_stride = config.query_stride if stage != input_stage else None
        dim, dim_out = config.embed_dim_per_stage[input_stage], config.embed_dim_per_stage[stage]
        self.qkv = nn.Linear(dim, dim_out * 3)
        self.proj = nn.Linear(dim_out, dim_out)

    def forward(self, hidden_states: torch.Tensor, layout: Sam2UNetWindowLayout) -> torch.Tensor:
        """Attend within windows; tokens of shape `(tokens, dim)` -> `(tokens, dim_out)`, maybe pooled."""
        qkv, padded_token = self.project(hidden_states)
        pooled = layout if self.query_stride is None else layout.after_pooling(self.query_stride)
        if self.window_size == 0:
            # Attention over all tokens of an image does not depend on their order.
            query, key, value = layout.to_sequences(qkv).chunk(3, dim=-1)
            if self.query_stride is not None:
                query = pooled.to_sequences(layout.pool(qkv.chunk(3, dim=-1)[0], self.query_stride))
            return self.proj(pooled.from_sequences(self.attend(query, key, value)))
        outputs = []
        for group, windows in zip(layout.groups, layout.split(qkv), strict=True):
            query, key, value = windows.chunk(3, dim=-1)
            if self.query_stride is not None:
                query = pool_windows(query, group.window_height, group.window_width, self.query_stride)
            num_padded = self.window_size**2 - group.window_height * group.window_width
            outputs.append(self.attend(query, key, value, num_padded, padded_token))
        return self.proj(pooled.merge(outputs))

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return query, key and value of each token, `(tokens, dim_out * 3)`, and those of a padded one."""
        qkv = self.qkv
        if type(qkv) is nn.Linear and qkv.bias.device == hidden_states.device:
            return qkv(hidden_states), qkv.bias
        # Ask the layer itself, because one that is quantised, adapted or offloaded has its bias in its forward alone.
        projected = qkv(torch.cat([hidden_states, hidden_states.new_zeros(1, hidden_states.shape[-1])]))
        return projected[:-1], projected[-1]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        num_padded: int = 0,
        padded_token: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend within windows of shape `(num_windows, tokens, dim_out)`, with `num_padded` more keys in each.

        `padded_token` is query, key and value of a padded token, of shape `(dim_out * 3,)`.
        """
        # (num_windows, tokens, dim_out) -> (num_windows, heads, tokens, head_dim)
        query, key, value = (
            tokens.unflatten(2, (self.num_attention_heads, -1)).transpose(1, 2) for tokens in (query, key, value)
        )
        mask = None
        if num_padded and padded_token is not None:
            num_windows, heads, num_tokens, _ = key.shape
            # The one key and value that stand for all padded tokens.
            _, padded_key, padded_value = padded_token.to(key.dtype).view(3, 1, heads, 1, -1)
            key = torch.cat([key, padded_key.expand(num_windows, -1, -1, -1)], dim=2)
            value = torch.cat([value, padded_value.expand(num_windows, -1, -1, -1)], dim=2)
            mask = torch.zeros(1, 1, 1, num_tokens, dtype=key.dtype, device=key.device)
            mask = F.pad(mask, (0, 1), value=math.log(num_padded))
        is_eager = self.config._attn_implementation == "eager" or prefers_eager_attention(query, key)
        attention = eager_attention if is_eager else F.scaled_dot_product_attention
        return attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def interpolate_bicubic(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Interpolate as `F.interpolate` does, one axis after the other by matrix products: much faster on a CPU."""
    dtype = torch.promote_types(maps.dtype, torch.float32)
    weights = []
    for old, new in zip(maps.shape[2:], (height, width), strict=True):
        identity = torch.eye(old, dtype=dtype, device=maps.device)[None, None]
        weights.append(F.interpolate(identity, size=(new, old), mode="bicubic")[0, 0])
    with maybe_autocast(maps.device.type, enabled=False):
        return (weights[0] @ maps.to(dtype) @ weights[1].T).to(maps.dtype)


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

    def __init__(self, config: Sam2UNetConfig, input_stage: int, stage: int, is_global: bool):
        super().__init__()
        backbone = config.backbone_config
        dim, dim_out = backbone.embed_dim_per_stage[input_stage], backbone.embed_dim_per_stage[stage]
        self.adapter = Sam2UNetAdapter(dim, config.adapter_hidden_size)
        self.layer_norm1 = nn.LayerNorm(dim, eps=backbone.layer_norm_eps)
        self.attn = Sam2UNetWindowAttention(backbone, input_stage, stage, is_global)
        self.query_stride = self.attn.query_stride
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

    def __init__(self, config: Sam2UNetConfig):
        super().__init__()
        backbone = config.backbone_config
        self.patch_embed = Sam2UNetPatchEmbeddings(backbone)
        self.window_sizes = backbone.window_size_per_stage
        background, side = backbone.window_positional_embedding_background_size, self.window_sizes[0]
        self.pos_embed = nn.Parameter(torch.zeros(1, backbone.hidden_size, *background))
        self.pos_embed_window = nn.Parameter(torch.zeros(1, backbone.hidden_size, side, side))
        self.blocks = nn.ModuleList()
        self.stage_ends = []
        for stage, num_blocks in enumerate(backbone.blocks_per_stage):
            for position in range(num_blocks):
                # The first block of a stage still has the dimension and the window of the stage before.
                input_stage = stage if position else max(stage - 1, 0)
                is_global = len(self.blocks) in backbone.global_attention_blocks
                self.blocks.append(Sam2UNetBlock(config, input_stage, stage, is_global))
            self.stage_ends.append(len(self.blocks) - 1)

    def position_embedding(self, height: int, width: int) -> torch.Tensor:
        """Return the embedding of shape `(1, height, width, hidden_size)`: background plus tiled window."""
        background = interpolate_bicubic(self.pos_embed, height, width)
        window = self.pos_embed_window.tile(1, 1, height // self.window_sizes[0], width // self.window_sizes[0])
        return (background + window).permute(0, 2, 3, 1)

    def run_stage(self, maps: torch.Tensor, stage: int) -> tuple[torch.Tensor, ...]:
        """Run a stage, and the first block of the next, which has the windows of this one and is left out there.

        Maps are of shape `(batch_size, height, width, channels)`; two are returned, for the last stage one.
        """
        batch_size, height, width, _ = maps.shape
        layout = Sam2UNetWindowLayout(batch_size, height, width, self.window_sizes[stage])
        tokens = layout.pack(maps)
        start = self.stage_ends[stage - 1] + 2 if stage else 0
        end = self.stage_ends[stage] + 1
        for block in self.blocks[start:end]:
            tokens = block(tokens, layout)
        feature_map = layout.unpack(tokens)
        if end == len(self.blocks):
            return (feature_map,)
        pool = self.blocks[end]
        return feature_map, layout.after_pooling(pool.query_stride).unpack(pool(tokens, layout))

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
