"""A model as `torch.onnx.export` can trace it for images of every size; the model itself is traced for one size."""

import torch
import torch.nn.functional as F
from torch import nn

from ..encoder_sam2unet import Sam2UNetWindowAttention
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


class FixedSizeLogits(nn.Module):
    """A model whose output is the logits alone, in float32 whatever type it computes in."""

    def __init__(self, model: Sam2UNetForSemanticSegmentation):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the logits, of the size of the images."""
        return self.model(pixel_values, return_dict=True).logits.float()


class UnpackedLayout:
    """Layout of tokens that stay maps of shape `(batch_size, height, width, channels)`."""

    pool = staticmethod(max_pool_tokens)


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


class AnySizeLogits(nn.Module):
    """The layers of a model, whose attention it replaces, with a graph for images of every size.

    The graph of the model itself is for one size, because the size of a map decides into how many groups of windows
    it is cut.
    """

    def __init__(self, model: Sam2UNetForSemanticSegmentation):
        super().__init__()
        self.encoder, self.decode_head = model.encoder, model.decode_head
        for block in self.encoder.blocks:
            block.attn = PaddedWindowAttention(block.attn)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the logits, of the size of the images."""
        height, width = pixel_values.shape[-2:]
        # Pad always, because the model pads only where it must, which the graph would decide once for all sizes.
        padding = (0, missing_to_multiple(width, STRIDE), 0, missing_to_multiple(height, STRIDE))
        pixel_values = F.pad(pixel_values, padding).to(self.encoder.patch_embed.projection.weight.dtype)
        maps = self.encoder.patch_embed(pixel_values)
        maps = maps + self.encoder.position_embedding(*maps.shape[1:3])
        feature_maps = []
        for index, block in enumerate(self.encoder.blocks):
            maps = block(maps, UnpackedLayout())
            if index in self.encoder.stage_ends:
                # (B, H, W, C) -> (B, C, H, W)
                feature_maps.append(maps.permute(0, 3, 1, 2))
        (logits,) = self.decode_head(*feature_maps)
        logits = F.interpolate(logits, size=pixel_values.shape[-2:], mode="bilinear")
        return crop(logits, (2, 3), height, width).float()
