"""What nnU-Net changes at random: ranges and probabilities, any channels, and a background that stays 0."""

import numpy as np
import pytest
import torch
from common import BRATS_REGIONS
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.training import SegmentationTransform, augmentation
from sam2unet_hf.training.strong_augmentation import (
    HeadBlur,
    HeadBrightness,
    HeadContrast,
    HeadGamma,
    HeadLowResolution,
    HeadNoise,
    HeadTransform,
    RandomRotationAndScaling,
    head_mask,
)


INTENSITY = {
    "noise": HeadNoise,
    "blur": HeadBlur,
    "brightness": HeadBrightness,
    "contrast": HeadContrast,
    "low resolution": HeadLowResolution,
    "gamma": HeadGamma,
    "inverted gamma": lambda *args, **kwargs: HeadGamma(*args, invert=True, **kwargs),
}


def head_image(num_channels=1):
    """Noise in a disc of another size in each channel, 0 at some inner pixels, on a background of 0, 96 x 80."""
    rows, columns = np.mgrid[:96, :80]
    generator = np.random.default_rng(0)
    distance = np.hypot(rows - 45, columns - 40)
    discs = np.stack([distance < 20 + channel for channel in range(num_channels)])
    pixels = np.maximum(generator.integers(0, 200, discs.shape), distance > 16) * discs
    return torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(discs)


def as_image(pixels):
    return tv_tensors.Image(pixels.float() / 255)


def no_mask(pixels):
    return tv_tensors.Mask(torch.zeros(pixels.shape[-2:], dtype=torch.long))


@pytest.mark.parametrize("name", INTENSITY)
def test_what_is_0_outside_the_head_stays_0_and_all_else_is_in_range(name):
    pixels, discs = head_image(num_channels=4)
    image = as_image(pixels)
    before = image.clone()
    for seed in range(10):
        torch.manual_seed(seed)
        found = INTENSITY[name]()(image)
        assert found.shape == image.shape
        assert not found[~discs].any()
        assert found.min() >= 0
        assert found.max() <= 1
        assert not torch.equal(found, image)
    assert torch.equal(image, before)


def test_the_head_holds_its_dark_pixels():
    pixels, discs = head_image(num_channels=3)
    assert (pixels[discs] == 0).any()
    assert torch.equal(head_mask(pixels), discs)
    assert not head_mask(torch.zeros(2, 8, 9)).any()


@pytest.mark.parametrize("name", INTENSITY)
def test_an_empty_image_stays_empty(name):
    assert not INTENSITY[name]()(tv_tensors.Image(torch.zeros(2, 64, 64))).any()


@pytest.mark.parametrize("name", [name for name in INTENSITY if name != "noise"])
def test_slices_of_a_modality_change_alike_and_modalities_do_not(name):
    image = as_image(head_image()[0].repeat(6, 1, 1))
    torch.manual_seed(0)
    found = INTENSITY[name](neighbours=1)(image)
    for first in (0, 3):
        assert torch.equal(found[first], found[first + 1])
        assert torch.equal(found[first], found[first + 2])
    assert not torch.allclose(found[0], found[3], atol=1e-4)
    with pytest.raises(ValueError, match="multiple of 3 channels where `neighbours` is 1, got 4"):
        INTENSITY[name](neighbours=1)(tv_tensors.Image(image[:4]))


def test_noise_is_that_of_all_channels_and_up_to_a_tenth_of_the_heads_deviation():
    pixels, discs = head_image(num_channels=2)
    image = as_image(pixels // 2 + 60 * discs)
    deviations = []
    for seed in range(60):
        torch.manual_seed(seed)
        noise = (HeadNoise()(image) - image)[:, discs[0]]
        shares = (
            noise / torch.stack([channel[disc].std() for channel, disc in zip(image, discs, strict=True)])[:, None]
        )
        assert torch.allclose(shares[0], shares[1], atol=1e-3)
        deviations.append(shares[0].std().item())
    assert min(deviations) < 0.01
    assert max(deviations) == pytest.approx(0.1, abs=0.01)


def factors(transform, measure):
    """What a transform does to a random image, by a measure of it before and after, for 200 seeds."""
    pixels, _ = head_image()
    image = as_image(pixels // 2)
    found = []
    for seed in range(200):
        torch.manual_seed(seed)
        found.append(measure(image, transform(image)))
    return found


@pytest.mark.parametrize(
    ("transform", "measure", "low", "high"),
    [
        (HeadBrightness(), lambda before, after: (after.sum() / before.sum()).item(), 0.75, 1.25),
        (HeadContrast(), lambda before, after: contrast(before, after), 0.75, 1.25),
    ],
    ids=["brightness", "contrast"],
)
def test_brightness_and_contrast_cover_their_range_evenly_below_and_above_1(transform, measure, low, high):
    found = factors(transform, measure)
    assert min(found) == pytest.approx(low, abs=0.01)
    assert max(found) == pytest.approx(high, abs=0.01)
    assert np.mean(np.array(found) < 1) == pytest.approx(0.5, abs=0.1)


def contrast(before, after):
    """The slope about the mean of the head, where the range of values is not met."""
    head = head_mask(before)
    old, new, mean = before[head], after[head], before[head].mean()
    assert new.min() >= old.min()
    assert new.max() <= old.max()
    inner = (old - mean).abs().argsort()[100:200]
    slopes = (new[inner] - mean) / (old[inner] - mean)
    assert slopes.std() < 1e-3
    return slopes.mean().item()


@pytest.mark.parametrize("invert", [False, True])
def test_gamma_keeps_mean_and_spread_and_is_a_power(invert):
    pixels, discs = head_image()
    image = as_image(pixels // 2 + 60 * discs)
    values = image[discs].double()
    powers = []
    for seed in range(100):
        torch.manual_seed(seed)
        found = HeadGamma(invert=invert)(image)[discs].double()
        assert found.mean() == pytest.approx(values.mean().item(), abs=1e-5)
        assert found.std() == pytest.approx(values.std().item(), abs=1e-5)

        def scaled(grey):
            return (grey.max() - grey if invert else grey - grey.min()) / (grey.max() - grey.min())

        inner = (scaled(values) > 0.05) & (scaled(values) < 0.95)
        power = scaled(found)[inner].log() / scaled(values)[inner].log()
        assert power.std() < 1e-3
        powers.append(power.mean().item())
    assert min(powers) == pytest.approx(0.7, abs=0.02)
    assert max(powers) == pytest.approx(1.5, abs=0.03)
    assert np.mean(np.array(powers) < 1) == pytest.approx(0.5, abs=0.15)


def test_blur_spreads_a_point_by_half_to_one_pixel_along_each_axis():
    image = tv_tensors.Image(torch.full((1, 41, 41), 0.2))
    image[0, 20, 20] = 1.0
    spreads = []
    for seed in range(40):
        torch.manual_seed(seed)
        point = HeadBlur()(image)[0].double() - 0.2
        assert point.sum() == pytest.approx(0.8, abs=1e-3)
        places = (torch.arange(41.0) - 20).double() ** 2
        spreads.append([((point.sum(dim=axis) @ places) / point.sum()).item() ** 0.5 for axis in (0, 1)])
    found = np.array(spreads)
    assert found.min() == pytest.approx(0.46, abs=0.03)  # of half a pixel, sampled at whole ones
    assert found.max() == pytest.approx(1.0, abs=0.03)
    assert np.abs(found[:, 0] - found[:, 1]).max() > 0.2


def test_low_resolution_loses_detail_and_keeps_what_is_smooth():
    columns = torch.linspace(0.1, 0.9, 80).expand(1, 96, 80)
    stripes = (torch.arange(80) % 2 * 0.5 + 0.2).expand(1, 96, 80)
    losses = []
    for seed in range(40):
        torch.manual_seed(seed)
        assert (HeadLowResolution()(tv_tensors.Image(columns)) - columns).abs().max() < 0.02
        torch.manual_seed(seed)
        losses.append((HeadLowResolution()(tv_tensors.Image(stripes)) - stripes).abs().mean().item())
    assert max(losses) > 0.2
    assert min(losses) < 0.15


def test_rotation_and_scaling_move_image_and_mask_alike_within_their_ranges():
    rows, columns = np.mgrid[:90, :80]
    bar = (np.abs(rows - 44.5) < 15) & (np.abs(columns - 39.5) < 5)
    image, mask = tv_tensors.Image(torch.from_numpy(bar).float()[None]), tv_tensors.Mask(torch.from_numpy(bar * 3))
    angles, scales = [], []
    for seed in range(200):
        torch.manual_seed(seed)
        moved, moved_mask = RandomRotationAndScaling(p_rotation=1, p_scaling=1)(image, mask)
        assert set(moved_mask.unique().tolist()) == {0, 3}
        assert ((moved[0] > 0.5) == (moved_mask == 3)).float().mean() > 0.98
        places = np.argwhere(moved_mask.numpy() == 3) - np.array([44.5, 39.5])
        _, axes = np.linalg.eigh(places.T @ places)
        angles.append(np.degrees(np.arctan2(*axes[:, 1])) % 180)
        scales.append((len(places) / bar.sum()) ** 0.5)
    assert np.histogram(angles, bins=4, range=(0, 180))[0].min() > 30
    assert min(scales) == pytest.approx(1 / 1.4, abs=0.05)
    assert max(scales) == pytest.approx(1 / 0.7, abs=0.05)


def test_long_images_are_rotated_little():
    torch.manual_seed(0)
    transform = RandomRotationAndScaling(p_rotation=1)
    for size, limit in (((60, 100), 15), ((70, 100), 180)):
        angles = [transform.make_params([torch.zeros(1, *size)])["angle"] for _ in range(200)]
        assert 0.95 * limit < max(angles) <= limit
        assert -limit <= min(angles) < -0.95 * limit


def test_each_change_is_drawn_as_often_as_nnunet_draws_it(monkeypatch):
    counts = {}

    def count(self, slices, head, drawn):
        name = type(self).__name__ + (" inverted" if getattr(self, "invert", False) else "")
        counts[name] = counts.get(name, 0) + 1
        return slices

    for transform in (HeadNoise, HeadBlur, HeadBrightness, HeadContrast, HeadLowResolution, HeadGamma):
        monkeypatch.setattr(transform, "change", count)
    image = as_image(head_image()[0])
    augment = augmentation("strong")
    torch.manual_seed(0)
    num_moved = 0
    for _ in range(1500):
        augment(image, no_mask(image))
        params = augment.transforms[1].make_params([image])
        num_moved += params["angle"] != 0
    expected = {
        "HeadNoise": 0.1,
        "HeadBlur": 0.2 * 0.5,
        "HeadBrightness": 0.15,
        "HeadContrast": 0.15,
        "HeadLowResolution": 0.25 * 0.5,
        "HeadGamma inverted": 0.1,
        "HeadGamma": 0.3,
    }
    assert {name: number / 1500 for name, number in counts.items()} == pytest.approx(expected, abs=0.03)
    assert num_moved / 1500 == pytest.approx(0.2, abs=0.03)
    order = [type(part).__name__ for step in augment.transforms for part in getattr(step, "transforms", [step])]
    assert order[2:9] == ["HeadNoise", "HeadBlur", "HeadBrightness", "HeadContrast", "HeadLowResolution"] + 2 * [
        "HeadGamma"
    ]
    assert [type(step) for step in augment.transforms[-2:]] == [v2.RandomHorizontalFlip, v2.RandomVerticalFlip]
    assert all(step.p == 0.5 for step in augment.transforms[-2:])


def test_pictures_bytes_and_floats_give_the_same():
    pixels, _ = head_image()
    kinds = [Image.fromarray(pixels[0].numpy()), pixels, pixels.float() / 255, as_image(pixels)]
    for seed in range(12):
        found = []
        for image in kinds:
            torch.manual_seed(seed)
            found.append(augmentation("strong")(image, no_mask(pixels))[0])
        for other in found:
            assert isinstance(other, tv_tensors.Image)
            torch.testing.assert_close(other.as_subclass(torch.Tensor), found[0].as_subclass(torch.Tensor))


@pytest.mark.parametrize("num_channels", [1, 2, 5, 9])
def test_any_number_of_channels_is_changed(num_channels):
    pixels, _ = head_image(num_channels)
    for neighbours in (0, 1) if num_channels % 3 == 0 else (0,):
        for seed in range(8):
            torch.manual_seed(seed)
            image, mask = augmentation("strong", neighbours=neighbours)(pixels, no_mask(pixels))
            assert image.shape == pixels.shape
            assert image.dtype == torch.float32
            assert mask.shape == pixels.shape[1:]
            assert 0 <= image.min() < image.max() <= 1


def test_rows_become_inputs_of_the_model_with_the_ids_of_their_masks():
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 255, (70, 64), dtype=np.uint8)) for _ in range(6)]
    ids = generator.integers(0, 4, (70, 64), dtype=np.uint8)
    processor = Sam2UNetImageProcessor(regions=BRATS_REGIONS, size={"height": 64, "width": 64})
    transform = SegmentationTransform(processor, augment=augmentation("strong"))
    transform.set_epoch(0)
    inputs = transform({"image": pictures, "mask": [Image.fromarray(ids)] * 6})
    assert all(image.shape == (3, 64, 64) and image.isfinite().all() for image in inputs["pixel_values"])
    assert all(set(labels.unique().tolist()) <= {0, 1, 2, 3} for labels in inputs["labels"])
    assert not torch.equal(inputs["labels"][0], inputs["labels"][1])


def test_a_change_of_ones_own_says_what_it_draws():
    class HeadDoubling(HeadTransform):
        def draw(self):
            return 2.0

        def change(self, slices, head, drawn):
            return slices * drawn

    image = tv_tensors.Image(torch.full((2, 8, 8), 0.3))
    torch.testing.assert_close(HeadDoubling()(image).as_subclass(torch.Tensor), torch.full((2, 8, 8), 0.6))
    assert torch.equal(HeadDoubling(p=0.0)(image), image)
