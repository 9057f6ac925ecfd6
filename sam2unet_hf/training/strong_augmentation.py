"""What nnU-Net changes at random in 2-D images for training, as transforms of `torchvision.transforms.v2`."""

from typing import Any

import torch
import torch.nn.functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2


def strong_transforms(neighbours: int = 0) -> list[v2.Transform]:
    """Return nnU-Net's changes of 2-D images for training, with its probabilities, ranges and order.

    They take images `(channels, height, width)` as `tv_tensors.Image` of floats in [0, 1], and masks.

    - [`RandomRotationAndScaling`], each with probability 0.2;
    - [`HeadNoise`] 0.1, [`HeadBlur`] 0.2, [`HeadBrightness`] 0.15, [`HeadContrast`] 0.15 and [`HeadLowResolution`]
      0.25; where blur and low resolution are drawn, half of the modalities get them;
    - [`HeadGamma`] of the inverted image 0.1, and of the image 0.3;
    - mirroring along each axis, 0.5.

    nnU-Net's images have mean 0 and standard deviation 1 in the head. Here they go from 0, the background, to 1, so
    noise is measured in standard deviations of the head, brightness multiplies grey values, statistics are those of
    the head, and values beyond [0, 1] are clipped.

    Source: `get_training_transforms` of https://github.com/MIC-DKFZ/nnUNet/blob/017de4a/nnunetv2/training/nnUNetTrainer/nnUNetTrainer.py
    with https://github.com/MIC-DKFZ/batchgeneratorsv2; Isensee et al., doi 10.1038/s41592-020-01008-z.

    Args:
        neighbours: The channels of an image are its modalities in turn, each with `2 * neighbours + 1` slices, which
            change alike; modalities change independently of each other.
    """
    intensity: list[tuple[HeadTransform, float]] = [
        (HeadNoise(neighbours), 0.1),
        (HeadBlur(neighbours, p=0.5), 0.2),
        (HeadBrightness(neighbours), 0.15),
        (HeadContrast(neighbours), 0.15),
        (HeadLowResolution(neighbours, p=0.5), 0.25),
        (HeadGamma(neighbours, invert=True), 0.1),
        (HeadGamma(neighbours), 0.3),
    ]
    drawn = [v2.RandomApply([transform], p=p) for transform, p in intensity]
    return [RandomRotationAndScaling(), *drawn, v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]


def uniform(low: float, high: float) -> float:
    """Draw a number from `low` to `high`."""
    return torch.empty(()).uniform_(low, high).item()


def below_or_above_one(low: float, high: float) -> float:
    """Draw a number below 1 or above 1 with equal probability, where both are in the range."""
    return uniform(low, 1) if torch.rand(()) < 0.5 else uniform(1, high)


def head_mask(image: torch.Tensor) -> torch.Tensor:
    """Return where the head is in images `(..., height, width)` that are 0 outside it.

    It is what lies between the first and the last pixel above 0 of its row, and of its column.
    """

    def between(is_above: torch.Tensor) -> torch.Tensor:
        numbers = torch.arange(1, is_above.shape[-1] + 1, dtype=torch.int16)
        last = (is_above * numbers).amax(dim=-1, keepdim=True)
        first = len(numbers) + 1 - (is_above * numbers.flip(0)).amax(dim=-1, keepdim=True)
        return (first <= numbers) & (numbers <= last)

    is_above = image > 0
    return between(is_above) & between(is_above.mT.contiguous()).mT


class RandomRotationAndScaling(v2.Transform):
    """Rotate and scale image and mask about their centre, in one resampling; what comes in from outside is 0.

    The angle is up to 180 degrees, or up to 15 where one side is over 1.5 times the other.

    Args:
        p_rotation: Probability of the rotation.
        p_scaling: Probability of the scaling.
        scaling: Range of the size of a pixel of the result in pixels of the image, so larger is a smaller head.
    """

    def __init__(self, p_rotation: float = 0.2, p_scaling: float = 0.2, scaling: tuple[float, float] = (0.7, 1.4)):
        super().__init__()
        self.p_rotation = p_rotation
        self.p_scaling = p_scaling
        self.scaling = scaling

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw angle and scale."""
        sides = v2.functional.get_size(flat_inputs[0])
        limit = 15 if max(sides) / min(sides) > 1.5 else 180
        angle = uniform(-limit, limit) if torch.rand(()) < self.p_rotation else 0.0
        scale = 1 / uniform(*self.scaling) if torch.rand(()) < self.p_scaling else 1.0
        return {"angle": angle, "scale": scale}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Rotate and scale image or mask."""
        if params == {"angle": 0.0, "scale": 1.0}:
            return inpt
        fixed: dict[str, Any] = {"translate": [0, 0], "shear": [0.0, 0.0]}
        return v2.functional.affine(inpt, interpolation=v2.InterpolationMode.BILINEAR, **fixed, **params)


class HeadTransform(v2.Transform):
    """Base of changes of the head in an image in [0, 1]; all outside it stays 0, and values are clipped to [0, 1].

    In pictures without a black surround the head is the whole picture.

    Args:
        neighbours: The channels are modalities in turn, each with `2 * neighbours + 1` slices, which change alike.
        p: Probability that a modality is changed.
    """

    _transformed_types = (tv_tensors.Image,)

    def __init__(self, neighbours: int = 0, p: float = 1.0):
        super().__init__()
        self.neighbours = neighbours
        self.p = p

    def draw(self) -> Any:
        """Draw what changes one modality."""
        raise NotImplementedError

    def change(self, slices: torch.Tensor, head: torch.Tensor, drawn: Any) -> torch.Tensor:
        """Return slices `(2 * neighbours + 1, height, width)` of a modality changed by what was drawn."""
        raise NotImplementedError

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw for each modality."""
        num_channels, num_slices = flat_inputs[0].shape[-3], 2 * self.neighbours + 1
        if num_channels % num_slices:
            raise ValueError(
                f"An image must have a multiple of {num_slices} channels where `neighbours` is {self.neighbours}, got "
                f"{num_channels}. Pass the `neighbours` that the images have."
            )
        drawn = [self.draw() if torch.rand(()) < self.p else None for _ in range(num_channels // num_slices)]
        return {"drawn": drawn}

    def transform(self, inpt: tv_tensors.Image, params: dict[str, Any]) -> tv_tensors.Image:
        """Change the modalities of an image."""
        image = inpt.as_subclass(torch.Tensor)
        modalities = list(image.split(2 * self.neighbours + 1))
        for index, (slices, drawn) in enumerate(zip(modalities, params["drawn"], strict=True)):
            if drawn is not None and (head := head_mask(slices)).any():
                modalities[index] = self.change(slices, head, drawn).clamp(0, 1) * head
        return tv_tensors.wrap(torch.cat(modalities), like=inpt)


class HeadNoise(HeadTransform):
    """Add Gaussian noise of up to 0.1 standard deviations of the head, the same in all channels."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the noise once."""
        params = super().make_params(flat_inputs)
        noise = uniform(0, 0.1) * torch.randn(flat_inputs[0].shape[-2:])
        return {"drawn": [noise for _ in params["drawn"]]}

    def draw(self) -> bool:
        """Draw nothing, since all modalities get the same noise."""
        return True

    def change(self, slices: torch.Tensor, head: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Add the noise."""
        return slices + drawn * slices[head].std(correction=0)


class HeadBlur(HeadTransform):
    """Blur by a Gaussian of 0.5 to 1 pixels, drawn for each axis."""

    def draw(self) -> list[float]:
        """Draw the standard deviations along both axes."""
        return [uniform(0.5, 1), uniform(0.5, 1)]

    def change(self, slices: torch.Tensor, head: torch.Tensor, drawn: list[float]) -> torch.Tensor:
        """Blur the slices."""
        return v2.functional.gaussian_blur(slices, [7, 7], drawn)


class HeadBrightness(HeadTransform):
    """Multiply by a factor of 0.75 to 1.25."""

    def draw(self) -> float:
        """Draw the factor."""
        return below_or_above_one(0.75, 1.25)

    def change(self, slices: torch.Tensor, head: torch.Tensor, drawn: float) -> torch.Tensor:
        """Multiply the slices."""
        return slices * drawn


class HeadContrast(HeadTransform):
    """Multiply what differs from the head's mean by a factor of 0.75 to 1.25, within the head's range of values."""

    def draw(self) -> float:
        """Draw the factor."""
        return below_or_above_one(0.75, 1.25)

    def change(self, slices: torch.Tensor, head: torch.Tensor, drawn: float) -> torch.Tensor:
        """Spread or narrow the values."""
        values = slices[head]
        return ((slices - values.mean()) * drawn + values.mean()).clamp(values.min(), values.max())


class HeadLowResolution(HeadTransform):
    """Sample at 0.5 to 1 times the resolution, the nearest pixels, and interpolate these linearly."""

    def draw(self) -> float:
        """Draw the resolution."""
        return uniform(0.5, 1)

    def change(self, slices: torch.Tensor, head: torch.Tensor, drawn: float) -> torch.Tensor:
        """Sample the slices down and up."""
        size = [round(side * drawn) for side in slices.shape[-2:]]
        sampled = F.interpolate(slices[None], size, mode="nearest-exact")
        return F.interpolate(sampled, slices.shape[-2:], mode="bilinear")[0]


class HeadGamma(HeadTransform):
    """Raise the values, scaled to the head's range, to a power of 0.7 to 1.5, and keep the head's mean and spread.

    Args:
        neighbours: As in [`HeadTransform`].
        p: As there.
        invert: Do this to the negative image, which spreads bright instead of dark values.
    """

    def __init__(self, neighbours: int = 0, p: float = 1.0, invert: bool = False):
        super().__init__(neighbours, p)
        self.invert = invert

    def draw(self) -> float:
        """Draw the power."""
        return below_or_above_one(0.7, 1.5)

    def change(self, slices: torch.Tensor, head: torch.Tensor, drawn: float) -> torch.Tensor:
        """Raise the values of the head to the power."""
        values = -slices[head] if self.invert else slices[head]
        low, extent = values.min(), (values.max() - values.min()).clamp(min=1e-7)
        raised = ((values - low) / extent) ** drawn
        spread = values.std(correction=0) / raised.std(correction=0).clamp(min=1e-7)
        raised = (raised - raised.mean()) * spread + values.mean()
        return torch.zeros_like(slices).masked_scatter(head, -raised if self.invert else raised)


__all__ = ["strong_transforms"]
