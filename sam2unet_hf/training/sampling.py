"""Which slices an epoch shows: all that show foreground, and a share of those that do not."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class ForegroundShare:
    """Chooses the slices of each epoch such that a share of them shows foreground.

    Each epoch holds every slice with foreground once, and as many empty ones as make the share. The empty ones are
    taken in turn from a random order of all of them, in which each epoch goes on where the one before ended, so that
    every slice is seen within a few epochs, and none twice in one. Where there are too few of them, each epoch holds
    all of them, and the share is larger.

    The choice depends on seed and epoch alone.

    Args:
        foreground_pixels: Pixels of foreground of each slice, such as the column `wt_pixels` of BraTS slices.
        share: Slices with foreground over all slices of an epoch, above 0 and up to 1.

    Attributes:
        reached_share: The share that there is.

    Raises:
        ValueError: If `share` is out of range, or no slice shows foreground.
    """

    def __init__(self, foreground_pixels: Sequence[int], share: float):
        if not 0 < share <= 1:
            raise ValueError(f"`foreground_share` must be above 0 and at most 1, got {share}.")
        shows_foreground = np.asarray(foreground_pixels) > 0
        self.with_foreground = np.flatnonzero(shows_foreground)
        self.empty = np.flatnonzero(~shows_foreground)
        if not len(self.with_foreground):
            raise ValueError(
                f"`foreground_share` needs training images with foreground, and none of {len(self.empty)} has any. "
                "Leave it out, or build the slices that show it."
            )
        num_empty = round(len(self.with_foreground) * (1 - share) / share)
        self.num_empty = min(num_empty, len(self.empty))
        self.reached_share = len(self.with_foreground) / len(self)
        self.seeds = (0, 0)

    def set_epoch(self, epoch: int, seed: int) -> None:
        """Let samplers that have no seed of their own choose by seed and epoch, from now on."""
        self.seeds = (seed, epoch)

    def __len__(self) -> int:
        return len(self.with_foreground) + self.num_empty

    def choose(self, seed: int, epoch: int) -> np.ndarray:
        """Return the numbers of the slices of an epoch, in no order of use, of shape `(slices,)`."""
        if not self.num_empty:
            return self.with_foreground
        order = np.random.default_rng(seed).permutation(self.empty)
        places = (epoch * self.num_empty + np.arange(self.num_empty)) % len(order)
        return np.concatenate([self.with_foreground, order[places]])


class ForegroundSampler(Sampler[int]):
    """Shuffles the slices that a [`ForegroundShare`] chooses for the epoch.

    Args:
        foreground: Chooses the slices.
        seed: For choice and order. By default they depend on `foreground.set_epoch`.
    """

    def __init__(self, foreground: ForegroundShare, seed: int | None = None):
        self.foreground = foreground
        self.seed = seed

    def __len__(self) -> int:
        return len(self.foreground)

    def __iter__(self) -> Iterator[int]:
        seeds = self.foreground.seeds if self.seed is None else (self.seed, 0)
        return iter(np.random.default_rng(seeds).permutation(self.foreground.choose(*seeds)).tolist())


__all__ = ["ForegroundSampler", "ForegroundShare"]
