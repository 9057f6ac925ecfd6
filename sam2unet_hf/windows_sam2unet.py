"""Windows of tokens: the order in which the tokens of a batch lie in memory, and batches cut to fit the cache."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


# Tokens of the images that inference on a CPU runs at once. Larger batches were timed and gained no speed.
MAX_TOKENS = 8192


def in_chunks(
    function: Callable[..., tuple[torch.Tensor, ...]], *maps: torch.Tensor, tokens_per_image: int
) -> tuple[torch.Tensor, ...]:
    """Apply a function that treats each image of a batch alone, in inference on a CPU to a few images at a time.

    Large tensors are slow there, because the system hands out their memory anew each time.
    """
    chunk_size = max(1, MAX_TOKENS // tokens_per_image)
    is_inference = not torch.is_grad_enabled() and maps[0].device.type == "cpu" and not torch.compiler.is_compiling()
    if not is_inference or len(maps[0]) <= chunk_size:
        return function(*maps)
    chunks = zip(*(tensor.split(chunk_size) for tensor in maps), strict=True)
    return tuple(torch.cat(parts) for parts in zip(*(function(*chunk) for chunk in chunks), strict=True))


def join(parts: list[torch.Tensor] | tuple[torch.Tensor, ...], dim: int = 0) -> torch.Tensor:
    """Concatenate tensors; return a single one as it is, because `torch.cat` would copy it."""
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def max_pool_tokens(tokens: torch.Tensor, stride: list[int]) -> torch.Tensor:
    """Max-pool maps of tokens of shape `(batch_size, height, width, channels)`."""
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
    """A part of a map and the size of the equal windows that tile it; all in tokens."""

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
        return join(packed)

    def unpack(self, tokens: torch.Tensor) -> torch.Tensor:
        """Undo `pack`."""
        parts = []
        for (_, _, height, width, *window), windows in zip(self.groups, self.split(tokens), strict=True):
            part = windows.unflatten(1, window).unflatten(0, (-1, height // window[0], width // window[1]))
            parts.append(part.transpose(2, 3).flatten(3, 4).flatten(1, 2))
        # Two parts side by side make a band.
        per_band = len(split_length(self.width, self.window_size))
        bands = [parts[start : start + per_band] for start in range(0, len(parts), per_band)]
        return join([join(band, dim=2) for band in bands], dim=1)

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
        return join([part.flatten(0, 1) for part in windows])

    def to_sequences(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the tokens of each image, `(batch_size, height * width, channels)`, in the order of the windows."""
        return join([part.flatten(0, 1).unflatten(0, (self.batch_size, -1)) for part in self.split(tokens)], dim=1)

    def from_sequences(self, sequences: torch.Tensor) -> torch.Tensor:
        """Undo `to_sequences`."""
        sizes = [group.height * group.width for group in self.groups]
        return self.merge(list(sequences.split(sizes, dim=1)) if len(sizes) > 1 else [sequences])

    def pool(self, tokens: torch.Tensor, stride: list[int]) -> torch.Tensor:
        """Max-pool within windows, whose sides are even; the result is in the order of `after_pooling(stride)`."""
        groups = zip(self.split(tokens), self.groups, strict=True)
        return self.merge(
            [pool_windows(part, group.window_height, group.window_width, stride) for part, group in groups]
        )

    def after_pooling(self, stride: list[int]) -> "Sam2UNetWindowLayout":
        """Return the layout of the tokens that `pool` gives."""
        return Sam2UNetWindowLayout(
            self.batch_size, self.height // stride[0], self.width // stride[1], self.window_size // stride[0]
        )
