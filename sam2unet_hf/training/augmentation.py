"""Random changes of an image and its mask for training, as transforms of `torchvision.transforms.v2`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..images_sam2unet import to_byte_range, to_channels_first
from .strong_augmentation import strong_transforms


AUGMENTATIONS = ("flips", "rotation", "scaling", "gamma", "bias_field", "noise", "strong")


def augmentation(*names: str, neighbours: int = 0, white_level: int | None = None) -> Callable:
    """Return a function that changes an image and its mask at random, for [`SegmentationTransform`].

    Args:
        names: Which changes, each independent of the others:

            - `"flips"`: horizontal and vertical, each with probability 0.5, as in the papers;
            - `"rotation"`: by up to 15 degrees; what comes in from outside is 0, in the mask too;
            - `"scaling"`: by a factor of 0.8 to 1.25 about the centre, at the same image size;
            - `"gamma"`, probability 0.5: [`RandomGamma`];
            - `"bias_field"`, probability 0.5: [`RandomBiasField`];
            - `"noise"`, probability 0.5: Gaussian, of standard deviation 0.02 where the image goes from 0 to 1;
            - `"strong"`, alone: [`~strong_augmentation.strong_transforms`], what nnU-Net does in 2-D.

        neighbours: Channels of `"strong"`, see there.
        white_level: That of the image processor, for images of more than 8 bits.

    Returns:
        A transform of `(image, mask)`: a PIL image or a tensor `(channels, height, width)`, uint8 or of floats in
        [0, 1], with any number of channels, and a `tv_tensors.Mask` of label ids. Masks are only moved, to the nearest
        pixel, so they get no new ids. Flips alone return the type that they are given; with anything else the image
        becomes float32 of shape `(channels, height, width)` in [0, 1].

    Raises:
        ValueError: If a name is unknown, or `"strong"` is not the only one.

    Example:
        ```python
        >>> import torch
        >>> from PIL import Image
        >>> from torchvision import tv_tensors
        >>> from sam2unet_hf.training.augmentation import augmentation

        >>> augment = augmentation("flips", "rotation", "gamma")
        >>> image, mask = augment(Image.new("L", (240, 200)), tv_tensors.Mask(torch.zeros(200, 240).long()))
        >>> image.shape, mask.shape
        (torch.Size([1, 200, 240]), torch.Size([200, 240]))

        ```
    """
    if unknown := [name for name in names if name not in AUGMENTATIONS]:
        raise ValueError(f"Augmentations must be among {', '.join(AUGMENTATIONS)}, got {', '.join(unknown)}.")
    if "strong" in names:
        if set(names) != {"strong"}:
            raise ValueError(
                f"The augmentation strong must stand alone, because it holds most others, got {', '.join(names)}."
            )
        return v2.Compose([ToUnitRange(white_level), *strong_transforms(neighbours)])
    steps: list[Any] = []
    if set(names) - {"flips"}:
        steps.append(ToUnitRange(white_level))
    if "flips" in names:
        steps += [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    if "rotation" in names or "scaling" in names:
        # One resampling for both, which blurs once.
        steps.append(
            v2.RandomAffine(
                degrees=15 if "rotation" in names else 0,
                scale=(0.8, 1.25) if "scaling" in names else None,
                interpolation=v2.InterpolationMode.BILINEAR,
            )
        )
    intensity = {"gamma": RandomGamma(), "bias_field": RandomBiasField(), "noise": v2.GaussianNoise(sigma=0.02)}
    steps += [v2.RandomApply([transform], p=0.5) for name, transform in intensity.items() if name in names]
    return v2.Compose(steps or [v2.Identity()])


def is_plain_tensor(item: Any) -> bool:
    """Whether something is a tensor that `torchvision` has no name for, which it takes as an image."""
    return type(item) is torch.Tensor


class ToUnitRange(v2.Transform):
    """Turn an image into float32 of shape `(channels, height, width)` in [0, 1], as the image processor scales.

    Args:
        white_level: That of the image processor.
    """

    _transformed_types = (Image.Image, tv_tensors.Image, is_plain_tensor)

    def __init__(self, white_level: int | None = None):
        super().__init__()
        self.white_level = white_level

    def transform(self, inpt: Image.Image | torch.Tensor, params: dict[str, Any]) -> tv_tensors.Image:
        """Convert an image."""
        if isinstance(inpt, Image.Image):
            # 16-bit and float images lose their range in `convert("RGB")`.
            grey = inpt.mode == "L" or inpt.mode.startswith(("I", "F"))
            inpt = to_channels_first(np.array(inpt if grey else inpt.convert("RGB")), "channels_last")
        return tv_tensors.Image(to_byte_range(inpt, self.white_level).float() / 255)


class RandomGamma(v2.Transform):
    """Raise an image in [0, 1] to a power, as another contrast does.

    Args:
        gamma: Range of the power, which is drawn evenly on a logarithmic scale.
    """

    _transformed_types = (tv_tensors.Image,)

    def __init__(self, gamma: tuple[float, float] = (0.7, 1.5)):
        super().__init__()
        self.gamma = gamma

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the power."""
        low, high = np.log(self.gamma)
        return {"gamma": torch.empty(()).uniform_(low, high).exp().item()}

    def transform(self, inpt: tv_tensors.Image, params: dict[str, Any]) -> tv_tensors.Image:
        """Raise an image to the power."""
        return tv_tensors.wrap(inpt ** params["gamma"], like=inpt)


class RandomBiasField(v2.Transform):
    """Multiply an image in [0, 1] by a smooth field, as the uneven sensitivity of receiver coils does.

    The field is the exponential of a polynomial of the position (Van Leemput et al., doi 10.1109/42.811268), the same
    for all channels; what it lifts above 1 is clipped.

    Args:
        strength: Coefficients are drawn from -strength to strength, of positions from -1 to 1.
        degree: Degree of the polynomial.
    """

    _transformed_types = (tv_tensors.Image,)

    def __init__(self, strength: float = 0.3, degree: int = 3):
        super().__init__()
        self.strength = strength
        self.degree = degree

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the coefficients."""
        coefficients = torch.empty(self.degree + 1, self.degree + 1).uniform_(-self.strength, self.strength)
        # Terms of x^i y^j with i + j up to the degree, and no constant one, which would be brightness.
        powers = torch.arange(self.degree + 1)
        coefficients[powers[:, None] + powers > self.degree] = 0
        coefficients[0, 0] = 0
        return {"coefficients": coefficients}

    def transform(self, inpt: tv_tensors.Image, params: dict[str, Any]) -> tv_tensors.Image:
        """Multiply an image by the field."""
        height, width = inpt.shape[-2:]
        powers = torch.arange(self.degree + 1)
        rows = torch.linspace(-1, 1, height)[:, None] ** powers
        columns = torch.linspace(-1, 1, width)[:, None] ** powers
        field = (rows @ params["coefficients"] @ columns.T).exp()
        return tv_tensors.wrap((inpt * field).clamp(0, 1), like=inpt)


__all__ = ["AUGMENTATIONS", "RandomBiasField", "RandomGamma", "augmentation"]
