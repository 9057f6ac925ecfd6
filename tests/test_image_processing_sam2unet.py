import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import BRATS_REGIONS, small_model
from PIL import Image
from torchvision.transforms import v2
from transformers import AutoImageProcessor, pipeline

from sam2unet_hf import Sam2UNetImageProcessor


MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
# Resizing 8-bit images rounds to grey levels once along each axis, as PIL does: up to one level of 255 in all.
ROUNDING = 1.01 / 255 / 0.224


@pytest.fixture(scope="module")
def processor():
    return Sam2UNetImageProcessor()


def picture(height=40, width=56, channels=None):
    shape = (height, width) if channels is None else (height, width, channels)
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    image.flat[:2] = 0, 255
    return image


def pixels(processor, image, **kwargs):
    return processor(image, return_tensors="pt", **kwargs)["pixel_values"]


def normalised(grey_or_rgb):
    """What the processor should give without resizing, for values in 0..255."""
    values = torch.as_tensor(np.asarray(grey_or_rgb), dtype=torch.float32)
    values = values.expand(3, -1, -1) if values.ndim == 2 else values.permute(2, 0, 1)
    return ((values / 255 - MEAN) / STD)[None]


GREY = picture()
RGB = picture(channels=3)
GREY_CONTAINERS = {
    "PIL L": Image.fromarray(GREY),
    "PIL RGB": Image.fromarray(GREY).convert("RGB"),
    "PIL RGBA": Image.fromarray(GREY).convert("RGBA"),
    "PIL LA": Image.fromarray(GREY).convert("LA"),
    "PIL P": Image.fromarray(GREY).convert("P"),
    "PIL I": Image.fromarray(GREY.astype(np.int32)),
    "PIL I, 16-bit values": Image.fromarray(GREY.astype(np.int32) * 257),
    "PIL I;16": Image.fromarray(GREY.astype(np.uint16) * 257),
    "PIL F": Image.fromarray(GREY.astype(np.float32)),
    "PIL F in 0..1": Image.fromarray(GREY.astype(np.float32) / 255),
    "uint8": GREY,
    "uint8, channel first": GREY[None],
    "uint8, channel last": GREY[..., None],
    "uint8, three channels last": np.stack([GREY] * 3, axis=-1),
    "uint16": GREY.astype(np.uint16) * 257,
    "uint16, big-endian": GREY.astype(">u2") * 257,
    "int16": GREY.astype(np.int16),
    "int64": GREY.astype(np.int64),
    "int64, 16-bit values": GREY.astype(np.int64) * 257,
    "uint32": GREY.astype(np.uint32),
    "float32 in 0..1": (GREY / 255).astype(np.float32),
    "float32 in 0..255": GREY.astype(np.float32),
    "float64 in 0..1": GREY / 255,
    "float32, big-endian": GREY.astype(">f4"),
    "negative strides": GREY[::-1, ::-1].copy()[::-1, ::-1],
    "Fortran order": np.asfortranarray(GREY),
    "torch uint8": torch.from_numpy(GREY),
    "torch float": torch.from_numpy(GREY)[None] / 255,
    "torch uint16": torch.from_numpy(GREY.astype(np.uint16) * 257),
    "torch, channels last": torch.from_numpy(np.stack([GREY] * 3, axis=-1)),
}
RGB_CONTAINERS = {
    "PIL RGB": Image.fromarray(RGB),
    "PIL RGBA": Image.fromarray(np.dstack([RGB, picture()])),
    "uint8, channels last": RGB,
    "uint8, channels first": RGB.transpose(2, 0, 1),
    "uint8, alpha last": np.dstack([RGB, picture()]),
    "uint8, alpha first": np.dstack([RGB, picture()]).transpose(2, 0, 1),
    "float32 in 0..1": (RGB / 255).astype(np.float32),
    "uint16, channels first": RGB.transpose(2, 0, 1).astype(np.uint16) * 257,
    "torch uint8, channels first": torch.from_numpy(RGB).permute(2, 0, 1),
    "torch float, channels last": torch.from_numpy(RGB) / 255,
}


@pytest.mark.parametrize("name", GREY_CONTAINERS)
def test_grey_picture_gives_the_same_tensor_from_any_container(processor, name):
    expected = normalised(GREY)
    image = GREY_CONTAINERS[name]
    torch.testing.assert_close(pixels(processor, image, do_resize=False), expected, atol=2e-6, rtol=0)
    resized = pixels(processor, image)
    assert resized.dtype == torch.float32
    torch.testing.assert_close(resized, pixels(processor, GREY), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("name", RGB_CONTAINERS)
def test_colour_picture_gives_the_same_tensor_from_any_container(processor, name):
    actual = pixels(processor, RGB_CONTAINERS[name], do_resize=False)
    torch.testing.assert_close(actual, normalised(RGB), atol=2e-6, rtol=0)


@pytest.mark.parametrize("mask", [GREY > 127, Image.fromarray(GREY > 127), torch.from_numpy(GREY > 127)])
def test_boolean_picture_is_black_and_white(processor, mask):
    expected = normalised((GREY > 127) * 255)
    torch.testing.assert_close(pixels(processor, mask, do_resize=False), expected, atol=2e-6, rtol=0)


def test_cmyk_picture_is_converted(processor):
    image = Image.fromarray(RGB).convert("CMYK")
    expected = normalised(np.array(image.convert("RGB")))
    torch.testing.assert_close(pixels(processor, image, do_resize=False), expected, atol=2e-6, rtol=0)


def test_read_only_array_gives_no_warning(processor, recwarn):
    image = picture()
    image.flags.writeable = False
    processor(image, segmentation_maps=image)
    assert not recwarn.list


def test_pixel_value_worked_out_by_hand(processor):
    # (51/255 - 0.485)/0.229, (102/255 - 0.456)/0.224, (204/255 - 0.406)/0.225; one colour, so resizing keeps it.
    image = np.full((5, 7, 3), (51, 102, 204), dtype=np.uint8)
    expected = torch.tensor([-0.285 / 0.229, -0.056 / 0.224, 0.394 / 0.225])
    for options in ({}, {"do_resize": False}):
        torch.testing.assert_close(pixels(processor, image, **options)[0, :, 2, 3], expected)


def test_grey_levels_of_16_bit_pictures_are_not_rounded(processor):
    image = np.array([[0, 256, 257, 65535]], dtype=np.uint16)
    actual = pixels(processor, image, do_resize=False, do_normalize=False)[0, 0, 0]
    torch.testing.assert_close(actual, torch.tensor([0, 256 / 65535, 257 / 65535, 1]))


@pytest.mark.parametrize("size", [(40, 56), (500, 400), (352, 352)], ids=str)
@pytest.mark.parametrize("as_float", [False, True], ids=["uint8", "float"])
def test_resize_is_torchvisions_antialiased_bilinear(processor, size, as_float):
    image = torch.from_numpy(picture(*size, channels=3)).permute(2, 0, 1)
    image = image.float() if as_float else image
    resized = v2.functional.resize(image, [352, 352], v2.InterpolationMode.BILINEAR, antialias=True)
    assert resized.dtype == image.dtype
    torch.testing.assert_close(pixels(processor, image), normalised(resized.permute(1, 2, 0)), atol=1e-5, rtol=0)


def test_lists_of_mixed_sizes_keep_their_order(processor):
    images = [picture(30, 40), picture(64, 50, 3), Image.fromarray(picture(30, 40) // 2), picture(30, 40) / 255]
    batch = pixels(processor, images)
    assert batch.shape == (4, 3, 352, 352)
    for image, row in zip(images, batch, strict=True):
        torch.testing.assert_close(row, pixels(processor, image)[0], atol=ROUNDING, rtol=0)
    unresized = processor(images, do_resize=False)["pixel_values"]
    assert [tuple(image.shape) for image in unresized] == [(3, 30, 40), (3, 64, 50), (3, 30, 40), (3, 30, 40)]


@pytest.mark.parametrize("layout", ["numpy, last", "numpy, first", "torch, first", "grey"])
def test_four_dimensional_array_is_a_batch(processor, layout):
    images = [picture(30, 40, 3), picture(30, 40, 3)[::-1]]
    if layout == "grey":
        images = [image[..., 0] for image in images]
    batch = np.stack(images)
    batch = batch[..., None] if layout == "grey" else batch
    batch = batch.transpose(0, 3, 1, 2) if "first" in layout else batch
    batch = torch.from_numpy(batch.copy()) if "torch" in layout else batch
    torch.testing.assert_close(pixels(processor, batch), pixels(processor, images), atol=0, rtol=0)


def test_input_data_format_settles_ambiguous_shapes(processor):
    image = picture(3, 5, 3)
    last = pixels(processor, image, do_resize=False, input_data_format="channels_last")
    torch.testing.assert_close(last, normalised(image), atol=2e-6, rtol=0)
    from_pil = pixels(processor, Image.fromarray(image), do_resize=False, input_data_format="channels_first")
    torch.testing.assert_close(from_pil, last, atol=0, rtol=0)
    first = pixels(processor, image, do_resize=False)
    torch.testing.assert_close(first, normalised(image.transpose(1, 2, 0)), atol=2e-6, rtol=0)


def test_size_and_switches_can_be_overridden(processor):
    assert pixels(processor, GREY, size={"height": 64, "width": 96}).shape == (1, 3, 64, 96)
    batch = processor(GREY, segmentation_maps=GREY, size={"height": 64, "width": 96}, return_tensors="pt")
    assert batch["labels"].shape == (1, 64, 96)
    assert pixels(processor, GREY, do_resize=False).shape == (1, 3, *GREY.shape)
    assert pixels(Sam2UNetImageProcessor(size={"height": 32, "width": 64}), GREY).shape == (1, 3, 32, 64)
    # Floats that were normalised elsewhere stay as they are.
    image = np.random.default_rng(0).normal(size=(3, 8, 9)).astype(np.float32)
    as_given = pixels(processor, image, do_resize=False, do_rescale=False, do_normalize=False)
    torch.testing.assert_close(as_given, torch.from_numpy(image)[None], atol=0, rtol=0)


LABELS = np.random.default_rng(1).choice(np.array([0, 1, 2, 3, 255], dtype=np.uint8), (40, 56))
PALETTE = Image.fromarray(LABELS)
PALETTE.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
LABEL_CONTAINERS = {
    "PIL L": Image.fromarray(LABELS),
    "PIL palette": PALETTE,
    "PIL grey RGB": Image.fromarray(LABELS).convert("RGB"),
    "PIL grey RGBA": Image.fromarray(LABELS).convert("RGBA"),
    "PIL I;16": Image.fromarray(LABELS.astype(np.uint16)),
    "uint8": LABELS,
    "uint8, channel last": LABELS[..., None],
    "uint16, three channels first": np.stack([LABELS.astype(np.uint16)] * 3),
    "int64": LABELS.astype(np.int64),
    "int16, big-endian": LABELS.astype(">i2"),
    "whole floats": LABELS.astype(np.float64),
    "torch long": torch.from_numpy(LABELS).long(),
    "torch, channel first": torch.from_numpy(LABELS)[None],
}


@pytest.mark.parametrize("name", LABEL_CONTAINERS)
def test_mask_gives_the_same_labels_from_any_container(processor, name):
    batch = processor(GREY, segmentation_maps=LABEL_CONTAINERS[name], do_resize=False, return_tensors="pt")
    assert batch["labels"].dtype == torch.int64
    torch.testing.assert_close(batch["labels"], torch.from_numpy(LABELS).long()[None], atol=0, rtol=0)


@pytest.mark.parametrize("mask", [LABELS > 1, Image.fromarray(LABELS > 1)], ids=["numpy", "PIL 1"])
def test_boolean_mask_gives_zero_and_one(processor, mask):
    labels = processor(GREY, segmentation_maps=mask, do_resize=False, return_tensors="pt")["labels"]
    torch.testing.assert_close(labels[0], torch.from_numpy(LABELS > 1).long())


@pytest.mark.parametrize("size", [(40, 56), (500, 400), (1000, 1100)], ids=str)
def test_resized_mask_never_gets_new_values(processor, size):
    mask = np.random.default_rng(2).choice([0, 1, 3, 255, 40000], size)
    image = np.zeros(size, dtype=np.uint8)
    labels = processor(image, segmentation_maps=mask, return_tensors="pt")["labels"]
    assert labels.shape == (1, 352, 352)
    assert labels.unique().tolist() == [0, 1, 3, 255, 40000]


def test_resized_mask_is_the_nearest_pixel(processor):
    # 704 -> 352: the centre of output pixel i lies between input pixels 2i and 2i + 1, and counts as the latter.
    mask = np.arange(704)[None].repeat(704, axis=0)
    labels = processor(np.zeros((704, 704), dtype=np.uint8), segmentation_maps=mask, return_tensors="pt")["labels"]
    assert labels[0, 0].tolist() == list(range(1, 704, 2))
    # 176 -> 352: every pixel twice.
    mask = np.arange(176)[:, None].repeat(176, axis=1)
    labels = processor(np.zeros((176, 176), dtype=np.uint8), segmentation_maps=mask, return_tensors="pt")["labels"]
    assert labels[0, :, 0].tolist() == [i // 2 for i in range(352)]


@pytest.mark.parametrize(
    ("size", "square"),
    [((240, 240), (30, 90, 75, 180)), ((100, 130), (11, 47, 60, 121)), ((1056, 704), (300, 600, 99, 402))],
    ids=["brats", "small", "large"],
)
def test_mask_coincides_with_its_image_after_resizing(processor, size, square):
    top, bottom, left, right = square
    mask = np.zeros(size, dtype=np.uint8)
    mask[top:bottom, left:right] = 1
    batch = processor(mask * 255, segmentation_maps=mask, do_normalize=False, return_tensors="pt")
    image, labels = batch["pixel_values"][0, 0], batch["labels"][0]
    # The edges of the resized image are ramps; at half height they are the edges of the mask.
    row, column = round((top + bottom) / 2 / size[0] * 352), round((left + right) / 2 / size[1] * 352)
    for profile, mask_profile in ((image[row], labels[row]), (image[:, column], labels[:, column])):
        clear = (profile - 0.5).abs() > 0.01
        assert torch.equal(profile[clear] > 0.5, mask_profile[clear].bool())
        assert clear.sum() >= 350
    expected = torch.tensor([bottom - top, right - left]) / torch.tensor(size) * 352
    assert labels[:, column].sum().item() == pytest.approx(expected[0].item(), abs=1)
    assert labels[row].sum().item() == pytest.approx(expected[1].item(), abs=1)


@pytest.mark.parametrize("maps", ["list", "array", "tensor", "with channel"])
def test_batches_of_images_take_batches_of_masks(processor, maps):
    images = np.stack([GREY] * 3)[..., None]
    labels = np.stack([LABELS, LABELS // 2, LABELS // 3]).astype(np.int64)
    expected = torch.from_numpy(labels)
    given = {"list": list(labels), "array": labels, "tensor": expected, "with channel": labels[:, None]}[maps]
    actual = processor(images, segmentation_maps=given, do_resize=False, return_tensors="pt")["labels"]
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)


def test_images_and_masks_of_mixed_sizes(processor):
    images = [picture(30, 40), picture(64, 50, 3)]
    masks = [picture(30, 40) % 4, Image.fromarray(picture(64, 50) % 3)]
    batch = processor(images, segmentation_maps=masks, return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 352, 352)
    assert [labels.max().item() for labels in batch["labels"]] == [3, 2]


def with_value(value, dtype=np.float32):
    image = np.full((8, 9), 0.5 if np.dtype(dtype).kind == "f" else 1, dtype=dtype)
    image[3, 4] = value
    return image


@pytest.mark.parametrize(
    ("image", "match"),
    [
        (with_value(np.nan), "float images must be finite and in 0..1 or 0..255, got torch.float32 .* from nan"),
        (with_value(np.inf), "must be finite .* to inf"),
        (with_value(-0.1), "must be non-negative; .* from -0.1 to 0.5. Scale scans first"),
        (with_value(256), "in 0..1 or 0..255, .* to 256"),
        (
            with_value(-1, np.int16),
            "integer images in 0..65535, got torch.int16 .* from -1 to 1",
        ),
        (with_value(65536, np.int32), "integer images in 0..65535, .* to 65536"),
        (np.zeros(5), r"must have shape \(height, width\), .* got \(5,\)"),
        (np.zeros((8, 9, 2)), r"with 1, 3 or 4 channels and at least one pixel, got \(8, 9, 2\)"),
        (np.zeros((0, 9)), r"at least one pixel, got \(0, 9\)"),
        (np.zeros((3, 0, 9)), r"at least one pixel, got \(3, 0, 9\)"),
        (np.zeros((1, 2, 3, 4, 5)), r"got \(1, 2, 3, 4, 5\)"),
        (np.zeros((8, 9), dtype=np.complex64), "must be .* real numbers, got complex64 values"),
        (torch.zeros(8, 9, dtype=torch.complex64), "got torch.complex64 values"),
        (np.array([["a"]]), "got <U1 values"),
        ("scan.png", "must be PIL images, NumPy arrays or torch tensors of real numbers, got str"),
        ({"image": GREY}, "got dict"),
        ([[GREY]], "got list"),
        ([], "must hold at least one image, got none"),
    ],
)
def test_wrong_images_raise(processor, image, match):
    with pytest.raises(ValueError, match=match):
        processor(image)


COLOURS = np.zeros((40, 56, 3), dtype=np.uint8)
COLOURS[3, 4] = 255, 0, 0


@pytest.mark.parametrize(
    ("maps", "match"),
    [
        (LABELS / 255, "must hold whole label ids, got fractions, .* or non-finite ones. Was it resized"),
        (np.where(LABELS == 1, 1e30, 0), r"must hold whole label ids, got .* values beyond 2\*\*31"),
        (np.where(LABELS == 1, np.nan, 0), "must hold whole label ids"),
        (np.where(LABELS == 1, np.inf, 0), "must hold whole label ids"),
        (COLOURS, "must have one channel of label ids, got colours"),
        (Image.fromarray(COLOURS).convert("RGBA"), "must have one channel of label ids, got colours"),
        ([LABELS, LABELS], "must hold one map per image, got 2 for 1 images"),
        ([], "got 0 for 1 images"),
        (LABELS[:-1], r"`segmentation_maps\[0\]` has size \(39, 56\) where its image has \(40, 56\)"),
        (LABELS.T, r"has size \(56, 40\)"),
        (LABELS[0], r"must have shape .* got \(56,\)"),
        ("mask.png", "got str"),
    ],
)
def test_wrong_masks_raise(processor, maps, match):
    with pytest.raises(ValueError, match=match):
        processor(GREY, segmentation_maps=maps)


def test_one_mask_for_two_images_raises(processor):
    with pytest.raises(ValueError, match="must hold one map per image, got 1 for 2 images"):
        processor([GREY, GREY], segmentation_maps=LABELS)
    with pytest.raises(ValueError, match=r"`segmentation_maps\[1\]` has size \(40, 56\) where .* \(56, 40\)"):
        processor([GREY, GREY.T], segmentation_maps=[LABELS, LABELS])


@pytest.mark.parametrize("option", [{"do_center_crop": True, "crop_size": 8}, {"do_pad": True}], ids=str)
def test_cropping_raises_as_its_masks_would_not_fit(processor, option):
    with pytest.raises(ValueError, match="`do_center_crop` and `do_pad` must be False"):
        processor(GREY, **option)


@pytest.mark.parametrize(("highest", "warns"), [(1.0, False), (1.002, True), (1.99, True), (2.0, False)])
def test_floats_beyond_1_warn_that_they_are_taken_for_bytes(processor, highest, warns, recwarn):
    image = np.linspace(0, highest, 72, dtype=np.float32).reshape(8, 9)
    processor(image)
    assert ["will be nearly black" in str(warning.message) for warning in recwarn] == [True] * warns


@pytest.mark.parametrize("image", [with_value(4095, np.uint16), with_value(300, np.int32), with_value(9, np.uint16)])
def test_dark_16_bit_picture_warns(processor, image):
    with pytest.warns(UserWarning, match=f"uses only values up to {image.max()} of 65535 and will be nearly black"):
        processor(image)


@pytest.mark.parametrize(
    "image", [with_value(4096, np.uint16), np.zeros((8, 9), np.uint16), with_value(255, np.int32)]
)
def test_other_pictures_do_not_warn(processor, image, recwarn):
    processor(image)
    assert not recwarn.list


def outputs_with(probabilities):
    """Model output of one row of pixels; `probabilities[region][pixel]`."""
    return SimpleNamespace(logits=torch.logit(torch.tensor(probabilities))[None, :, None])


def test_nested_regions_are_written_inward_as_nnunet_does():
    processor = Sam2UNetImageProcessor(regions=BRATS_REGIONS)
    outputs = outputs_with(
        # nothing, WT, WT and TC, all three, ET alone, TC alone, ET likelier outside than inside
        [
            [0.4, 0.6, 0.6, 0.6, 0.1, 0.1, 0.9],
            [0.4, 0.4, 0.9, 0.6, 0.1, 0.6, 0.8],
            [0.4, 0.4, 0.4, 0.6, 0.6, 0.1, 0.7],
        ]
    )
    label_map = processor.post_process_semantic_segmentation(outputs)[0]
    assert label_map.dtype == torch.int64
    assert label_map.tolist() == [[0, 2, 1, 3, 3, 1, 3]]


def test_nested_regions_do_not_depend_on_the_order_of_channels():
    processor = Sam2UNetImageProcessor(regions={name: BRATS_REGIONS[name] for name in ("ET", "WT", "TC")})
    outputs = outputs_with([[0.1, 0.1, 0.6], [0.6, 0.6, 0.6], [0.1, 0.6, 0.6]])
    assert processor.post_process_semantic_segmentation(outputs)[0].tolist() == [[2, 1, 3]]


def test_highest_probability_wins_where_regions_are_disjoint():
    processor = Sam2UNetImageProcessor(regions={"liver": [1], "spleen": [2, 4], "kidney": [3]})
    outputs = outputs_with([[0.9, 0.6, 0.6, 0.4], [0.8, 0.7, 0.1, 0.45], [0.1, 0.6, 0.65, 0.3]])
    assert processor.post_process_semantic_segmentation(outputs)[0].tolist() == [[1, 2, 3, 0]]


def test_threshold_moves_the_boundary(processor):
    outputs = outputs_with([[0.1, 0.3, 0.5, 0.7, 0.9]])
    for threshold, expected in [(0, 5), (0.2, 4), (0.5, 2), (0.8, 1), (1, 0)]:
        label_map = processor.post_process_semantic_segmentation(outputs, threshold=threshold)[0]
        assert label_map.tolist() == [[0] * (5 - expected) + [1] * expected]


@pytest.mark.parametrize("threshold", [-0.1, 1.5, 128])
def test_threshold_beyond_probabilities_raises(processor, threshold):
    with pytest.raises(ValueError, match=rf"`threshold` must be a probability in \[0, 1\], got {threshold}"):
        processor.post_process_semantic_segmentation(outputs_with([[0.5]]), threshold=threshold)


SIZES = [(240, 240), (100, 133), (64, 511)]


@pytest.mark.parametrize("as_tensor", [False, True], ids=["list", "tensor"])
def test_target_sizes_are_exact(as_tensor):
    processor = Sam2UNetImageProcessor(regions=BRATS_REGIONS)
    torch.manual_seed(0)
    outputs = SimpleNamespace(logits=torch.randn(3, 3, 96, 64))
    sizes = torch.tensor(SIZES) if as_tensor else SIZES
    assert [tuple(m.shape) for m in processor.post_process_semantic_segmentation(outputs, sizes)] == SIZES
    assert [tuple(p.shape[1:]) for p in processor.post_process_regions(outputs, sizes)] == SIZES
    assert [tuple(m.shape) for m in processor.post_process_semantic_segmentation(outputs)] == [(96, 64)] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_region_probabilities_are_the_sigmoid_of_resized_logits(dtype):
    processor = Sam2UNetImageProcessor(regions=BRATS_REGIONS)
    torch.manual_seed(0)
    logits = (20 * torch.randn(3, 3, 96, 64)).to(dtype)
    outputs = SimpleNamespace(logits=logits)
    for index, probabilities in enumerate(processor.post_process_regions(outputs, SIZES)):
        resized = F.interpolate(logits[index : index + 1].float(), size=SIZES[index], mode="bilinear")[0]
        torch.testing.assert_close(probabilities, resized.sigmoid(), atol=0, rtol=0)
        assert 0 <= probabilities.min() < 0.01
        assert 0.99 < probabilities.max() <= 1
    unresized = torch.stack(processor.post_process_regions(outputs))
    torch.testing.assert_close(unresized, logits.float().sigmoid(), atol=0, rtol=0)


def test_wrong_outputs_raise(processor):
    outputs = SimpleNamespace(logits=torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"must hold one \(height, width\) per image, got 1 for 2 images"):
        processor.post_process_semantic_segmentation(outputs, [(8, 8)])
    outputs = SimpleNamespace(logits=torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"`regions` \['WT'\] must name one region per channel .* got 3 channels"):
        processor.post_process_regions(outputs)


def test_saving_keeps_regions_in_order_and_size(tmp_path):
    regions = {name: BRATS_REGIONS[name] for name in ("WT", "ET", "TC")}
    Sam2UNetImageProcessor(regions=regions, size={"height": 96, "width": 64}).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stored["regions"] == [["WT", [1, 2, 3]], ["ET", [3]], ["TC", [1, 3]]]
    assert "_regions" not in stored
    for loader in (Sam2UNetImageProcessor, AutoImageProcessor):
        loaded = loader.from_pretrained(tmp_path)
        assert isinstance(loaded, Sam2UNetImageProcessor)
        assert list(loaded.regions.items()) == list(regions.items())
        assert pixels(loaded, GREY).shape == (1, 3, 96, 64)
    assert Sam2UNetImageProcessor.from_pretrained(tmp_path, regions={"a": [1]}).regions == {"a": [1]}


def test_regions_can_be_set_later():
    processor = Sam2UNetImageProcessor()
    assert processor.regions == {"WT": [1, 2, 3]}
    config_regions = {"TC": [1, 3], "ET": [3]}
    processor.regions = config_regions
    assert processor.post_process_semantic_segmentation(outputs_with([[0.9, 0.9], [0.1, 0.9]]))[0].tolist() == [[1, 3]]
    processor.regions = [["ET", [3]], ["TC", [1, 3]]]
    assert processor.post_process_semantic_segmentation(outputs_with([[0.1, 0.9], [0.9, 0.9]]))[0].tolist() == [[1, 3]]
    assert processor.to_dict()["regions"] == [["ET", [3]], ["TC", [1, 3]]]
    assert Sam2UNetImageProcessor().regions == {"WT": [1, 2, 3]}


def test_wrong_regions_raise(tmp_path):
    with pytest.raises(ValueError, match="must be nested or disjoint"):
        Sam2UNetImageProcessor(regions={"a": [1, 2], "b": [2, 3]})
    processor = Sam2UNetImageProcessor()
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be nested or disjoint"):
        Sam2UNetImageProcessor.from_pretrained(tmp_path, regions={"a": [1, 2], "b": [2, 3]})
    processor.regions = {"a": [0]}
    with pytest.raises(ValueError, match="must list label ids >= 1"):
        processor.post_process_semantic_segmentation(outputs_with([[0.9]]))
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must list label ids >= 1"):
        Sam2UNetImageProcessor.from_pretrained(tmp_path)


def test_regions_per_call_raise(processor):
    with pytest.raises(TypeError, match="unexpected keyword argument 'regions'"):
        processor(GREY, regions={"a": [1]})


def test_image_segmentation_pipeline_gives_named_masks(caplog):
    model = small_model(regions=BRATS_REGIONS)
    processor = Sam2UNetImageProcessor(regions=model.config.regions, size={"height": 96, "width": 96})
    segmenter = pipeline("image-segmentation", model=model, image_processor=processor)
    image = Image.fromarray(picture(90, 130, 3))
    results = segmenter(image)
    with torch.inference_mode():
        outputs = model(**processor(image, return_tensors="pt"))
    label_map = processor.post_process_semantic_segmentation(outputs, [(90, 130)])[0].numpy()
    names = {0: "background", 1: "TC without ET", 2: "WT without TC", 3: "ET"}
    ids = np.unique(label_map).tolist()
    assert len(ids) > 1
    assert [result["label"] for result in results] == [names[label_id] for label_id in ids]
    for label_id, result in zip(ids, results, strict=True):
        assert result["mask"].size == (130, 90)
        np.testing.assert_array_equal(np.asarray(result["mask"]) == 255, label_map == label_id)
