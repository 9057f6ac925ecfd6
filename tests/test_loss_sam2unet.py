import math

import pytest
import torch
import torch.nn.functional as F

from sam2unet_hf import deep_supervision_loss, structure_loss
from sam2unet_hf.loss_sam2unet import boundary_weights


def test_boundary_weights_equal_the_definition():
    masks = (torch.rand(2, 1, 40, 37, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) > 0.5).double()
    expected = 1 + 5 * (F.avg_pool2d(masks, kernel_size=31, stride=1, padding=15) - masks).abs()
    torch.testing.assert_close(boundary_weights(masks), expected)


@pytest.mark.parametrize("weight_bce", [False, True])
def test_two_by_two_by_hand(weight_bce):
    # One foreground pixel of four. A 31-pixel window holds all four and 957 zeros, so its mean is 1/961:
    # w = 1 + 5 * (1 - 1/961) on the foreground, 1 + 5/961 elsewhere.
    labels = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]], dtype=torch.float64)
    # p = 1/2 on the first row; sigmoid(log 3) = 3/4 and sigmoid(-log 3) = 1/4 on the second.
    logits = torch.tensor([[[[0.0, 0.0], [math.log(3), -math.log(3)]]]], dtype=torch.float64)
    foreground, background = 1 + 5 * 960 / 961, 1 + 5 / 961
    intersection = foreground * 0.5
    total = foreground * (0.5 + 1) + background * (0.5 + 0.75 + 0.25)
    iou_loss = 1 - (intersection + 1) / (total - intersection + 1)
    # BCE: log 2 twice, then -log(1 - 3/4) and -log(1 - 1/4).
    bce = [math.log(2), math.log(2), math.log(4), math.log(4 / 3)]
    weights = [foreground, background, background, background]
    if weight_bce:
        bce_loss = sum(w * b for w, b in zip(weights, bce, strict=True)) / sum(weights)
    else:
        bce_loss = sum(bce) / 4
    loss = structure_loss(logits, labels, weight_bce=weight_bce)
    assert loss.item() == pytest.approx(iou_loss + bce_loss, rel=1e-12)


@pytest.mark.parametrize("weight_bce", [False, True])
@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_perfect_prediction_is_near_zero_also_for_empty_and_full_masks(weight_bce, fill):
    labels = torch.full((1, 2, 20, 20), fill)
    labels[:, 1, 5:15, 5:15] = 1
    loss = structure_loss((labels * 2 - 1) * 30, labels, weight_bce=weight_bce)
    assert 0 <= loss.item() < 1e-5
    assert structure_loss((1 - labels * 2) * 30, labels, weight_bce=weight_bce).item() > 10


@pytest.mark.parametrize("weight_bce", [False, True])
def test_ignoring_a_border_equals_cropping_it(weight_bce):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 50, 40, generator=generator, dtype=torch.float64)
    labels = (torch.rand(2, 3, 50, 40, generator=generator) > 0.5).double()
    valid = torch.ones(2, 1, 50, 40, dtype=torch.bool)
    valid[..., 44:, :] = False
    valid[..., :, 33:] = False
    options = {"output_weights": [1.0, 0.5], "weight_bce": weight_bce}
    ignored = deep_supervision_loss([logits, -logits], labels, valid=valid, **options)
    cropped = deep_supervision_loss([logits[..., :44, :33], -logits[..., :44, :33]], labels[..., :44, :33], **options)
    torch.testing.assert_close(ignored, cropped)


@pytest.mark.parametrize("weight_bce", [False, True])
def test_nothing_valid_is_zero_with_zero_gradient(weight_bce):
    logits = torch.randn(1, 1, 8, 8, requires_grad=True)
    loss = structure_loss(logits, torch.ones(1, 1, 8, 8), valid=torch.zeros(1, 1, 8, 8), weight_bce=weight_bce)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_iou_over_the_batch_by_hand():
    # Two images of one pixel each, with the region and without: w = 1 + 5 * (1 - 1/961) and 1, and p = 1/2 and 1/4.
    labels = torch.tensor([1.0, 0.0], dtype=torch.float64).view(2, 1, 1, 1)
    logits = torch.tensor([0.0, -math.log(3)], dtype=torch.float64).view(2, 1, 1, 1)
    foreground = 1 + 5 * 960 / 961
    bce_loss = (math.log(2) + math.log(4 / 3)) / 2
    intersection = foreground / 2
    total = foreground * (1 / 2 + 1) + 1 / 4
    expected = bce_loss + 1 - (intersection + 1) / (total - intersection + 1)
    assert structure_loss(logits, labels, iou_over_batch=True).item() == pytest.approx(expected, rel=1e-12)
    each = [1 - (intersection + 1) / (foreground + 1), 1 - 1 / (1 / 4 + 1)]
    assert structure_loss(logits, labels).item() == pytest.approx(bce_loss + sum(each) / 2, rel=1e-12)


def test_iou_over_the_batch_is_that_of_its_images_side_by_side():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, 40, 48, generator=generator, dtype=torch.float64)
    labels = torch.zeros(3, 2, 40, 48, dtype=torch.float64)
    labels[0, 0, 10:30, 16:32] = labels[1, 1, 15:20, 20:30] = 1
    valid = torch.ones(3, 1, 40, 48)
    valid[2, :, :5] = 0
    images = {"weights": boundary_weights(labels), "labels": labels, "logits": logits, "valid": valid}
    side_by_side = {name: torch.cat(list(values), dim=-1)[None] for name, values in images.items()}
    loss = structure_loss(logits, labels, valid=valid, iou_over_batch=True)
    torch.testing.assert_close(loss, structure_loss(**side_by_side))
    assert abs(loss - structure_loss(logits, labels, valid=valid)) > 0.01


def test_one_image_is_a_batch_of_its_own():
    logits, labels = torch.randn(1, 2, 16, 16), torch.ones(1, 2, 16, 16)
    options = {"output_weights": [1.0, 0.5]}
    losses = [deep_supervision_loss([logits, -logits], labels, iou_over_batch=on, **options) for on in (False, True)]
    torch.testing.assert_close(*losses)


def test_deep_supervision_is_the_weighted_sum():
    outputs = [torch.randn(1, 1, 16, 16) for _ in range(3)]
    labels = torch.zeros(1, 1, 16, 16)
    labels[..., 4:9, 3:12] = 1
    expected = sum(
        weight * structure_loss(logits, labels) for weight, logits in zip([1, 0.5, 0.25], outputs, strict=True)
    )
    torch.testing.assert_close(deep_supervision_loss(outputs, labels, output_weights=[1, 0.5, 0.25]), expected)


def test_half_precision_logits_give_a_float32_loss():
    logits = torch.randn(1, 1, 16, 16)
    labels = torch.ones(1, 1, 16, 16)
    loss = structure_loss(logits.bfloat16(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, structure_loss(logits.bfloat16().float(), labels))


def test_wrong_labels_raise():
    with pytest.raises(ValueError, match=r"shape of `logits` \(1, 1, 4, 4\), got \(1, 4, 4\)"):
        structure_loss(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="must be floating point masks"):
        structure_loss(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="one weight per output, got 1 for 2"):
        deep_supervision_loss([torch.zeros(1, 1, 4, 4)] * 2, torch.zeros(1, 1, 4, 4), output_weights=[1.0])
