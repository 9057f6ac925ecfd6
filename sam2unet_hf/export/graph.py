"""Modules that `torch.onnx.export` traces: a model for images of one size, and for images of every size."""

import torch
import torch.nn.functional as F
from torch import nn

from ..encoder_sam2unet import Sam2UNetEncoder, Sam2UNetWindowAttention
from ..modeling_sam2unet import STRIDE, Sam2UNetForSemanticSegmentation
from ..windows_sam2unet import max_pool_tokens, pool_windows


def missing_to_multiple(length: int, divisor: int) -> int:
    """Return `-length % divisor` without a negative number, because ONNX rounds its quotient towards zero."""
    return (length + divisor - 1) // divisor * divisor - length


def crop(tensor: torch.Tensor, dims: tuple[int, int], height: int, width: int) -> torch.Tensor:
    """Return the top left part of a map by `index_select`, because torch.export does not know the size of a slice."""
    for dim, length in zip(dims, (height, width), strict=True):
        tensor = tensor.index_select(dim, torch.arange(length))
    return tensor


class UnpackedLayout:
    """Layout of tokens that stay maps of shape `(batch_size, height, width, channels)`."""

    def pool(self, maps: torch.Tensor, stride: list[int]) -> torch.Tensor:
        """Max-pool the maps."""
        return max_pool_tokens(maps, stride)


class PaddedWindowAttention(nn.Module):
    """Window attention on a map padded until windows tile it, as SAM 2 computes it.

    It shares the layers of `attention` and gives the same result, up to rounding, by the same steps at every size.
    """

    def __init__(self, attention: Sam2UNetWindowAttention):
        super().__init__()
        self.attention = attention

    def forward(self, maps: torch.Tensor, layout: UnpackedLayout) -> torch.Tensor:
        """Attend within windows; `(batch_size, height, width, dim)` -> the same with `dim_out`, maybe pooled."""
        attention, size, stride = self.attention, self.attention.window_size, self.attention.query_stride
        height, width = maps.shape[1:3]
        if stride is not None:
            height, width = height // stride[0], width // stride[1]
        if size == 0:
            query, key, value = attention.qkv(maps).chunk(3, dim=-1)
            if stride is not None:
                query = layout.pool(query, stride)
            attended = attention.attend(query.flatten(1, 2), key.flatten(1, 2), value.flatten(1, 2))
            return attention.proj(attended.unflatten(1, (height, width)))
        padding = (0, 0, 0, missing_to_multiple(maps.shape[2], size), 0, missing_to_multiple(maps.shape[1], size))
        # (B, H, W, C) -> (B, rows, size, columns, size, C) -> (B * rows * columns, size * size, C)
        windows = attention.qkv(F.pad(maps, padding)).unflatten(2, (-1, size)).unflatten(1, (-1, size))
        batch_size, rows, _, columns = windows.shape[:4]
        query, key, value = windows.transpose(2, 3).flatten(3, 4).flatten(0, 2).chunk(3, dim=-1)
        if stride is not None:
            query = pool_windows(query, size, size, stride)
            size = size // stride[0]
        attended = attention.attend(query, key, value).unflatten(1, (size, size))
        attended = attended.unflatten(0, (batch_size, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return attention.proj(crop(attended, (1, 2), height, width))


class AnySizeEncoder(nn.Module):
    """Encoder with the layers of `encoder`, whose attention it replaces, and a graph for images of every size.

    The graph of the encoder itself is for one size, because the size of a map decides into how many groups of windows
    it is cut.
    """

    def __init__(self, encoder: Sam2UNetEncoder):
        super().__init__()
        for block in encoder.blocks:
            block.attn = PaddedWindowAttention(block.attn)
        self.encoder = encoder

    @property
    def patch_embed(self) -> nn.Module:
        """The encoder's first layer, from which the model takes the type of its input."""
        return self.encoder.patch_embed

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the four feature maps, `(batch_size, channels, height / stride, width / stride)`."""
        maps = self.patch_embed(pixel_values)
        maps = maps + self.encoder.position_embedding(*maps.shape[1:3])
        feature_maps = []
        for index, block in enumerate(self.encoder.blocks):
            maps = block(maps, UnpackedLayout())
            if index in self.encoder.stage_ends:
                # (B, H, W, C) -> (B, C, H, W)
                feature_maps.append(maps.permute(0, 3, 1, 2))
        return tuple(feature_maps)


class FixedSizeLogits(nn.Module):
    """A model whose input and output are one tensor."""

    def __init__(self, model: Sam2UNetForSemanticSegmentation):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the logits, of the size of the images."""
        return self.model(pixel_values, return_dict=True).logits


class AnySizeLogits(FixedSizeLogits):
    """A model with a graph for images of every size, which replaces the model's encoder."""

    def __init__(self, model: Sam2UNetForSemanticSegmentation):
        super().__init__(model)
        model.register_module("encoder", AnySizeEncoder(model.encoder))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the logits, of the size of the images."""
        height, width = pixel_values.shape[-2:]
        # Pad always, because the model pads only where it must, which the graph would decide once for all sizes.
        padding = (0, missing_to_multiple(width, STRIDE), 0, missing_to_multiple(height, STRIDE))
        return crop(super().forward(F.pad(pixel_values, padding)), (2, 3), height, width)
