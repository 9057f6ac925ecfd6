"""Random changes of image and mask: both are moved alike, and masks keep their ids."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.training import SegmentationTransform
from sam2unet_hf.training.augmentation import AUGMENTATIONS, RandomBiasField, RandomGamma, augmentation


def smooth_image(mode="L"):
    """A disc that fades to its rim and keeps away from the edges, and the disc as mask of id 3, both 96 x 80."""
    rows, columns = np.mgrid[:96, :80]
    distance = np.hypot(rows - 35, columns - 50)
    mask = torch.from_numpy(np.where(distance < 20, 3, 0))
    values = (1 - distance / 80) * (distance < 20)
    if mode == "RGB":
        pixels = np.dstack([values * 255] * 3).astype(np.uint8)
    else:
        limit, dtype = {"L": (255, np.uint8), "I;16": (65535, np.uint16)}[mode]
        pixels = (values * limit).astype(dtype)
    return Image.fromarray(pixels), tv_tensors.Mask(mask)


def changed(names, seed=0, mode="L"):
    """Return what becomes of the smooth image, as an array in [0, 1], and of its mask."""
    torch.manual_seed(seed)
    image, mask = augmentation(*names)(*smooth_image(mode))
    return image.numpy(), mask


@pytest.mark.parametrize("names", [("rotation",), ("scaling",), ("flips", "rotation", "scaling")])
def test_geometry_moves_image_and_mask_alike(names):
    moved = 0
    for seed in range(8):
        image, mask = changed(names, seed)
        assert set(mask.unique().tolist()) == {0, 3}
        # The image is above 0.75 wherever the mask is, but for the pixels that are blended at its rim.
        assert ((image[0] > 0.5) == (mask.numpy() == 3)).mean() > 0.99
        moved += not torch.equal(mask, smooth_image()[1])
    assert moved >= 7


def test_scaling_covers_its_range():
    area = (smooth_image()[1] > 0).sum().item()
    factors = [((changed(("scaling",), seed)[1] > 0).sum().item() / area) ** 0.5 for seed in range(60)]
    assert min(factors) == pytest.approx(0.8, abs=0.06)
    assert max(factors) == pytest.approx(1.25, abs=0.06)


@pytest.mark.parametrize("name", ["gamma", "bias_field", "noise"])
def test_intensity_changes_half_of_the_images_and_no_mask(name):
    original = np.asarray(smooth_image()[0], dtype=np.float32) / 255
    counts = 0
    for seed in range(60):
        image, mask = changed((name,), seed)
        assert torch.equal(mask, smooth_image()[1])
        assert image.dtype == np.float32
        assert image.min() >= 0
        assert image.max() <= 1
        counts += not np.array_equal(image[0], original)
    assert 18 < counts < 42


def test_gamma_is_a_power():
    torch.manual_seed(0)
    image = tv_tensors.Image(torch.rand(1, 8, 8))
    powers = []
    for _ in range(200):
        power = RandomGamma((0.5, 2.0))(image).log() / image.log()
        assert power.std() < 1e-4
        powers.append(power.mean().item())
    assert 0.5 <= min(powers) < 0.55
    assert 1.85 < max(powers) <= 2
    assert np.mean(np.array(powers) < 1) == pytest.approx(0.5, abs=0.1)


def test_bias_field_is_a_smooth_field_alike_in_all_channels():
    torch.manual_seed(0)
    image = tv_tensors.Image(torch.full((3, 40, 60), 0.25))
    fields = RandomBiasField(strength=0.2, degree=3)(image) / 0.25
    assert torch.equal(fields[0], fields[2])
    # The logarithm is a polynomial of degree 3 without a constant: fourth differences vanish, and so it does at 0.
    logarithm = fields[0].double().log()
    assert logarithm.std() > 0.02
    assert torch.diff(logarithm, n=4, dim=0).abs().max() < 1e-5
    assert torch.diff(logarithm, n=4, dim=1).abs().max() < 1e-5
    assert logarithm[19:21, 29:31].mean().abs() < 2e-3


def test_noise_has_its_standard_deviation():
    grey = Image.new("L", (200, 200), 128), tv_tensors.Mask(torch.zeros(200, 200).long())
    deviations = []
    for seed in range(20):
        torch.manual_seed(seed)
        deviations.append(augmentation("noise")(*grey)[0].std().item())
    assert max(deviations) == pytest.approx(0.02, rel=0.05)
    assert min(deviations) == 0


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_unchanged_images_reach_the_model_as_without_augmentation(mode, monkeypatch):
    image, mask = smooth_image(mode)
    rows = {"image": [image], "mask": [Image.fromarray(mask.numpy().astype(np.uint8))]}
    processor = Sam2UNetImageProcessor(size={"height": 96, "width": 80})
    augment = augmentation("gamma", "bias_field", "noise")
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: torch.ones(1))  # none of the three is drawn
    plain, augmented = (SegmentationTransform(processor, augment=choice)(rows) for choice in (None, augment))
    assert torch.allclose(plain["pixel_values"][0], augmented["pixel_values"][0], atol=1e-5)
    assert torch.equal(plain["labels"][0], augmented["labels"][0])


@pytest.mark.parametrize("names", [AUGMENTATIONS[:-1], ("strong",)], ids=["each", "strong"])
def test_same_seed_same_images(names):
    first, second = (changed(names, seed=3) for _ in range(2))
    assert np.array_equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not np.array_equal(first[0], changed(names, seed=4)[0])


def test_no_names_change_nothing():
    image, mask = smooth_image()
    found = augmentation()(image, mask)
    assert found[0] is image
    assert found[1] is mask


def test_names_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="strong must stand alone.*, got flips, strong"):
        augmentation("flips", "strong")
    with pytest.raises(ValueError, match="must be among flips, .*, got blur, mixup"):
        augmentation("flips", "blur", "mixup")
