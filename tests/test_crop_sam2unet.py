"""The window about the head: cutting it out of slices, the model within it, and masks back on whole slices."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import BRATS_REGIONS, small_backbone_config, small_model
from PIL import Image
from transformers import AutoImageProcessor, pipeline

from sam2unet_hf import Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor
from sam2unet_hf.crop_sam2unet import OUTSIDE_LOGIT, crop, head_mask, head_window, uncrop


WINDOW = {"height": 64, "width": 96}
RAW = {"do_rescale": False, "do_normalize": False}


def head_slice(height=120, width=130, box=(20, 30, 100, 90), channels=None):
    """An ellipse of random grey with a dark spot in it, which fills a box, and its mask."""
    x_min, y_min, x_max, y_max = box
    y, x = np.mgrid[:height, :width]
    ellipse = ((x + 0.5 - (x_min + x_max) / 2) / (x_max - x_min)) ** 2 + (
        (y + 0.5 - (y_min + y_max) / 2) / (y_max - y_min)
    ) ** 2 <= 0.25
    shape = (height, width) if channels is None else (height, width, channels)
    image = np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8)
    image[~ellipse] = 0
    image[(y_min + y_max) // 2, (x_min + x_max) // 2] = 0
    return image, ellipse


def cropping_processor(**kwargs):
    return Sam2UNetImageProcessor(**{"head_crop_size": WINDOW, **kwargs})


@pytest.mark.parametrize(
    ("box", "window"),
    [
        ((20, 30, 100, 90), [12, 28, 108, 92]),  # centred, at its own resolution
        ((0, 0, 10, 7), [-43, -29, 53, 35]),  # beyond the slice at the left and the top
        ((20, 30, 116, 94), [20, 30, 116, 94]),  # of the size of the window
        ((0, 30, 120, 90), [0, 20, 120, 100]),  # too wide by a quarter, so that the region is 5/4 of the window
        ((50, 0, 60, 128), [-41, 0, 151, 128]),  # twice too high
        ((30, 40, 30, 40), [-18, 8, 78, 72]),  # nothing in the slice
    ],
)
def test_window_is_centred_on_the_head_and_holds_it(box, window):
    assert head_window(box, 64, 96) == window


@pytest.mark.parametrize("seed", range(20))
def test_window_of_a_larger_head_has_its_aspect_ratio(seed):
    rng = np.random.default_rng(seed)
    x_min, y_min, width, height = rng.integers(1, 300, 4).tolist()
    box = [x_min, y_min, x_min + width, y_min + height]
    left, top, right, bottom = head_window(box, 64, 96)
    assert left <= box[0]
    assert top <= box[1]
    assert right >= box[2]
    assert bottom >= box[3]
    scale = max((right - left) / 96, (bottom - top) / 64)
    assert abs((right - left) - scale * 96) < 1.5
    assert abs((bottom - top) - scale * 64) < 1.5
    assert scale <= max(1, width / 96, height / 64) + 1 / 64
    assert abs((left + right) - (box[0] + box[2])) <= 1


def test_crop_and_uncrop_undo_each_other():
    maps = torch.randn(2, 50, 70)
    inside = [10, 5, 60, 45]
    back = uncrop(crop(maps, inside), inside, (50, 70), fill=7.0)
    assert torch.equal(back[:, 5:45, 10:60], maps[:, 5:45, 10:60])
    back[:, 5:45, 10:60] = 7
    assert (back == 7).all()
    beyond = [-10, -20, 60, 80]
    window = crop(maps, beyond)
    assert window.shape == (2, 100, 70)
    assert not window[:, :20].any()
    assert not window[:, :, :10].any()
    back = uncrop(window, torch.tensor(beyond), (50, 70), fill=7.0)
    assert torch.equal(back[:, :, :60], maps[:, :, :60])
    assert (back[:, :, 60:] == 7).all()


def test_larger_region_is_scaled_up_again():
    maps = torch.randn(3, 64, 96)
    back = uncrop(maps, [-4, 3, 116, 83], (100, 110), fill=OUTSIDE_LOGIT)
    scaled = F.interpolate(maps[None], size=(80, 120), mode="bilinear")[0]
    assert torch.equal(back[:, 3:83], scaled[:, :, 4:114])
    assert (back[:, :3] == OUTSIDE_LOGIT).all()
    assert (back[:, 83:] == OUTSIDE_LOGIT).all()


def test_head_is_what_lies_between_the_outermost_pixels_of_row_and_column():
    rows = [
        "..####..",
        ".#....#.",
        ".#.##.#.",
        ".##..##.",
        "..#..#..",
        "........",
    ]
    expected = [
        "..####..",
        ".######.",
        ".######.",
        ".##..##.",
        "..#..#..",
        "........",
    ]
    image = torch.tensor([[pixel == "#" for pixel in row] for row in rows])
    found = head_mask(torch.stack([image * 5, image * 0]), (6, 8))
    assert ["".join(".#"[pixel] for pixel in row) for row in found.tolist()] == expected


def test_window_shows_the_pixels_as_they_are():
    image, ellipse = head_slice()
    mask = (ellipse * 3).astype(np.uint8)
    found = cropping_processor()(image, segmentation_maps=mask, return_tensors="pt", **RAW)
    assert found["crop_boxes"].tolist() == [[12, 28, 108, 92]]
    assert found["crop_boxes"].dtype == torch.int64
    assert found["pixel_values"].shape == (1, 3, 64, 96)
    expected = torch.from_numpy(image[28:92, 12:108])
    assert torch.equal(found["pixel_values"][0], expected.expand(3, -1, -1))
    assert torch.equal(found["labels"][0], torch.from_numpy(mask[28:92, 12:108]).long())
    # The dark spot within the head belongs to it.
    assert found["pixel_mask"].dtype == torch.bool
    assert torch.equal(found["pixel_mask"][0], torch.from_numpy(ellipse[28:92, 12:108]))


def test_enlarged_window_goes_to_the_model_and_comes_back_on_the_slice():
    image, ellipse = head_slice()
    mask = (ellipse * 3).astype(np.uint8)
    processor = cropping_processor(head_crop_scale=2)
    found = processor(image, segmentation_maps=mask, return_tensors="pt", **RAW)
    assert found["crop_boxes"].tolist() == [[12, 28, 108, 92]]
    plain = cropping_processor()(image, segmentation_maps=mask, return_tensors="pt", **RAW)
    enlarged = F.interpolate(plain["pixel_values"], size=(128, 192), mode="bilinear")
    torch.testing.assert_close(found["pixel_values"], enlarged.round(), atol=1, rtol=0)
    for name in ("labels", "pixel_mask"):  # each pixel is a block of two by two
        assert torch.equal(found[name][0], plain[name][0].repeat_interleave(2, 0).repeat_interleave(2, 1)), name
    logits = torch.where(found["pixel_mask"], 4.0, OUTSIDE_LOGIT)[:, None]
    outputs = SimpleNamespace(logits=logits, crop_boxes=found["crop_boxes"])
    (probabilities,) = processor.post_process_regions(outputs, target_sizes=[image.shape])
    assert torch.equal(probabilities[0] > 0.5, torch.from_numpy(ellipse))
    assert not probabilities[0][~torch.from_numpy(ellipse)].any()


def test_scale_of_the_window_is_kept_and_checked(tmp_path):
    cropping_processor(head_crop_scale=2).save_pretrained(tmp_path)
    assert Sam2UNetImageProcessor.from_pretrained(tmp_path).head_crop_scale == 2
    for options in ({"head_crop_scale": 0}, {"head_crop_scale": 1.5}, {"head_crop_scale": 2, "head_crop_size": None}):
        with pytest.raises(ValueError, match=r"whole number from 1 up, and enlarges the window of `head_crop_size`"):
            cropping_processor(**options)


def test_window_is_normalised_as_whole_images_are():
    image, _ = head_slice(channels=3)
    window = cropping_processor()(image, return_tensors="pt")["pixel_values"]
    whole = Sam2UNetImageProcessor(do_resize=False)(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(window, whole[..., 28:92, 12:108], atol=0, rtol=0)


def test_window_about_a_given_box_reaches_beyond_the_image():
    image, _ = head_slice()
    images = [image, image, image]
    boxes = torch.tensor([[0, 0, 20, 10], [20, 30, 100, 90], [110, 110, 130, 120]])
    for given in (boxes, boxes.numpy(), boxes.tolist(), list(boxes)):
        found = cropping_processor()(images, head_boxes=given, return_tensors="pt", **RAW)
        assert found["crop_boxes"].tolist() == [[-38, -27, 58, 37], [12, 28, 108, 92], [72, 83, 168, 147]]
        first = found["pixel_values"][0, 0]
        assert not first[:27].any()
        assert not first[:, :38].any()
        assert torch.equal(first[27:, 38:], torch.from_numpy(image[:37, :58]).to(first.dtype))


def test_larger_head_is_scaled_down_with_its_mask():
    image, ellipse = head_slice(height=200, width=220, box=(10, 20, 202, 140))
    found = cropping_processor()(image, segmentation_maps=ellipse, return_tensors="pt")
    assert found["crop_boxes"].tolist() == [[10, 16, 202, 144]]
    assert found["pixel_values"].shape == (1, 3, 64, 96)
    labels, inside = found["labels"][0].bool(), found["pixel_mask"][0]
    # A pixel of the mask stands for four of the image, all of them in the head.
    whole = torch.from_numpy(ellipse[16:144, 10:202]).reshape(64, 2, 96, 2)
    assert torch.equal(inside, whole.all(dim=3).all(dim=1))
    assert 0.9 < (inside & labels).sum() / labels.sum() < 1


def test_images_without_foreground_have_an_empty_mask():
    found = cropping_processor()(np.zeros((120, 130), np.uint8), return_tensors="pt")
    assert found["crop_boxes"].tolist() == [[17, 28, 113, 92]]
    assert not found["pixel_mask"].any()


@pytest.mark.parametrize("layout", ["last", "first"])
def test_channels_are_cropped_alike_and_the_head_is_that_of_the_slice_itself(layout):
    image, _ = head_slice(channels=6)
    image[30:60, :, [0, 2, 3, 5]] = 77  # the neighbours show more than the slices
    image[:, :, 4] = 0
    processor = cropping_processor(num_channels=6, neighbours=1)
    assert list(processor.image_mean) == pytest.approx([0.449] * 6)
    given = torch.from_numpy(image).permute(2, 0, 1) if layout == "first" else image
    found = processor(given, head_boxes=[[20, 30, 100, 90]], return_tensors="pt", **RAW)
    window = torch.from_numpy(image[28:92, 12:108]).permute(2, 0, 1)
    assert torch.equal(found["pixel_values"][0], window)
    assert torch.equal(found["pixel_mask"][0], head_mask(window[1:2], (64, 96)))
    assert not torch.equal(found["pixel_mask"][0], head_mask(window, (64, 96)))


@pytest.mark.parametrize("num_channels", [1, 4, 6])
def test_grey_images_are_repeated_to_all_channels(num_channels):
    image, _ = head_slice()
    processor = Sam2UNetImageProcessor(num_channels=num_channels, size={"height": 64, "width": 64})
    expected = processor(image, return_tensors="pt")["pixel_values"]
    assert expected.shape == (1, num_channels, 64, 64)
    assert torch.equal(expected, expected[:, :1].expand_as(expected))
    for mode in ("L", "RGB", "RGBA"):
        picture = Image.fromarray(image).convert(mode)
        assert torch.equal(processor(picture, return_tensors="pt")["pixel_values"], expected)


def test_four_channels_are_no_alpha_where_the_model_has_four():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    processor = Sam2UNetImageProcessor(num_channels=4, do_resize=False)
    found = processor(image, return_tensors="pt", **RAW)["pixel_values"]
    assert torch.equal(found[0], torch.from_numpy(image).permute(2, 0, 1))
    found = processor(image.transpose(2, 0, 1), return_tensors="pt", **RAW)["pixel_values"]
    assert torch.equal(found[0], torch.from_numpy(image).permute(2, 0, 1))
    with pytest.raises(ValueError, match=r"with 1 or 4 channels and at least one pixel, got \(64, 64, 3\)"):
        processor(image[..., :3])
    with pytest.raises(ValueError, match=r"with 1 or 4 channels and at least one pixel, got \(64, 64, 3\)"):
        processor(Image.fromarray(image[..., :3]))


def test_attributes_survive_saving(tmp_path):
    options = {"num_channels": 12, "neighbours": 1, "head_crop_size": WINDOW, "image_std": [0.3] * 12}
    names = ["flair", "t1", "t1ce", "t2"]
    Sam2UNetImageProcessor(modalities=names, **options).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, Sam2UNetImageProcessor)
    assert {name: getattr(loaded, name) for name in options} == {**options, "image_std": (0.3,) * 12}
    assert list(loaded.image_mean) == pytest.approx([0.449] * 12)
    assert AutoImageProcessor.from_pretrained(tmp_path, head_crop_size=None).head_crop_size is None
    # What was saved before there were these attributes.
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    for name in (*options, "image_mean"):
        del stored[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert (loaded.num_channels, loaded.neighbours, loaded.head_crop_size) == (3, 0, None)
    found = loaded(head_slice()[0], return_tensors="pt")
    assert list(found) == ["pixel_values"]
    assert found["pixel_values"].shape == (1, 3, 352, 352)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"head_crop_size": {"height": 160}}, r"`head_crop_size` must be .* got \{'height': 160\}"),
        ({"head_crop_size": {"height": 160, "width": 100}}, "multiples of 32 from 64 up, .* 'width': 100"),
        ({"head_crop_size": {"height": 32, "width": 96}}, "multiples of 32 from 64 up, .* got {'height': 32"),
        ({"head_crop_size": {"height": 40, "width": 96}, "head_crop_scale": 2}, "2 times enlarged multiples of 32"),
        ({"neighbours": 2}, "got `num_channels` 3 and `neighbours` 2"),
        ({"neighbours": -1}, "got `num_channels` 3 and `neighbours` -1"),
        ({"num_channels": 0}, "got `num_channels` 0 and"),
        ({"num_channels": 4, "image_mean": [0.5] * 3}, "`image_mean` must have one value per channel, got 3 for .* 4"),
    ],
)
def test_wrong_attributes_raise(options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        Sam2UNetImageProcessor(**options)
    Sam2UNetImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=match):
        Sam2UNetImageProcessor.from_pretrained(tmp_path, **options)


@pytest.mark.parametrize(
    ("boxes", "match"),
    [
        ([[0, 0, 9, 9]] * 2, "must hold one box per image, got 2 for 1 images"),
        ([[0, 0, 9]], r"`head_boxes\[0\]` must be .* in pixels of its image of 120x130 .*, got \[0, 0, 9\]"),
        ([[0, 0, 131, 9]], r"got \[0, 0, 131, 9\]"),
        ([[-1, 0, 13, 9]], r"got \[-1, 0, 13, 9\]"),
        ([[9, 0, 3, 9]], r"got \[9, 0, 3, 9\]"),
    ],
)
def test_wrong_boxes_raise(boxes, match):
    with pytest.raises(ValueError, match=match):
        cropping_processor()(head_slice()[0], head_boxes=boxes)


def test_region_probabilities_are_put_back_on_the_slices():
    processor = cropping_processor(regions=BRATS_REGIONS)
    logits = 20 * torch.randn(2, 3, 64, 96)
    boxes = torch.tensor([[12, 28, 108, 92], [-20, 10, 172, 138]])
    outputs = SimpleNamespace(logits=logits, crop_boxes=boxes)
    first, second = processor.post_process_regions(outputs, [(120, 130), (150, 160)])
    assert torch.equal(first[:, 28:92, 12:108], logits[0].sigmoid())
    outside = torch.ones(120, 130, dtype=torch.bool)
    outside[28:92, 12:108] = False
    assert (first[:, outside] == 0).all()
    scaled = F.interpolate(logits[1:], size=(128, 192), mode="bilinear")[0].sigmoid()
    torch.testing.assert_close(second[:, 10:138, :], scaled[..., 20:180], atol=1e-7, rtol=0)
    assert (second[:, :10] == 0).all()
    label_maps = processor.post_process_semantic_segmentation(outputs, [(120, 130), (150, 160)])
    assert [tuple(label_map.shape) for label_map in label_maps] == [(120, 130), (150, 160)]
    assert not label_maps[0][outside].any()
    assert label_maps[0].unique().tolist() == [0, 1, 2, 3]
    # The window itself without target sizes.
    assert torch.equal(torch.stack(processor.post_process_regions(outputs)), logits.sigmoid())


@pytest.mark.parametrize("box", [(20, 30, 100, 90), (3, 5, 127, 118)], ids=["fits", "larger"])
def test_nothing_is_found_outside_the_head(box):
    model = small_model(regions=BRATS_REGIONS)
    with torch.no_grad():
        model.decode_head.classifier.bias.fill_(30)  # everything is tumour
    image, ellipse = head_slice(box=box)
    processor = cropping_processor(regions=BRATS_REGIONS)
    inputs = processor(image, return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs)
    assert torch.equal(outputs.crop_boxes, inputs["crop_boxes"])
    (label_map,) = processor.post_process_semantic_segmentation(outputs, [image.shape])
    found = label_map.numpy() > 0
    assert not found[~ellipse].any()
    assert found[ellipse].mean() > (0.999 if box[0] == 20 else 0.9)


def test_pipeline_of_a_cropping_checkpoint_gives_masks_of_whole_pictures(tmp_path):
    model = small_model(regions=BRATS_REGIONS)
    processor = cropping_processor(regions=BRATS_REGIONS)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    slices = [head_slice(), head_slice(height=140, width=110, box=(5, 0, 60, 50)), head_slice(box=(0, 2, 130, 118))]
    pictures = [Image.fromarray(image) for image, _ in slices]
    segmenter = pipeline("image-segmentation", model=str(tmp_path), device="cpu")
    names = {"background": 0, "TC without ET": 1, "WT without TC": 2, "ET": 3}
    for batch_size in (1, 3):
        results = segmenter(pictures, batch_size=batch_size)
        assert len(results) == 3
        for (image, ellipse), result in zip(slices, results, strict=True):
            with torch.inference_mode():
                outputs = model(**processor(image, return_tensors="pt"))
            (expected,) = processor.post_process_semantic_segmentation(outputs, [image.shape])
            found = np.full(image.shape, -1)
            for part in result:
                assert part["mask"].size == image.shape[::-1]
                found[np.asarray(part["mask"]) == 255] = names[part["label"]]
            assert (found == expected.numpy()).mean() > 0.999  # batches round differently
            assert len(np.unique(found)) > 1
            assert not found[~ellipse].any()


def test_model_of_many_channels_segments_what_the_processor_makes():
    model = small_model(backbone_config=small_backbone_config(num_channels=6))
    processor = cropping_processor(num_channels=6, neighbours=1)
    image, ellipse = head_slice(channels=6)
    inputs = processor([image, image], return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs)
        assert not torch.equal(model(inputs["pixel_values"].flip(1)).logits, model(inputs["pixel_values"]).logits)
    for probabilities in processor.post_process_regions(outputs, [image.shape[:2]] * 2):
        assert probabilities.shape == (1, 120, 130)
        assert (probabilities[0, ~ellipse] == 0).all()
        assert (probabilities[0, ellipse] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixel_mask_changes_logits_alone(dtype):
    model = small_model().to(dtype)
    image, labels = torch.randn(2, 3, 64, 96, dtype=dtype), torch.randint(0, 2, (2, 64, 96))
    mask = torch.rand(2, 64, 96) > 0.5
    with torch.inference_mode():
        without = model(image, labels=labels)
        outputs = model(image, pixel_mask=mask, labels=labels)
        masks = mask[:, None]
        assert torch.equal(outputs.logits[masks], without.logits[masks])
        assert (outputs.logits[~masks] == OUTSIDE_LOGIT).all()
        assert (outputs.logits[~masks].float().sigmoid() == 0).all()
        assert torch.equal(outputs.loss, without.loss)
        assert torch.equal(outputs.auxiliary_logits[0], without.auxiliary_logits[0])
        assert torch.equal(model(image, pixel_mask=mask.long()).logits, outputs.logits)
        boxes = torch.tensor([[0, 0, 96, 64]] * 2)
        assert torch.equal(model(image, mask, boxes, return_dict=False)[1], boxes)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"pixel_mask": torch.ones(1, 64, 96)}, r"`pixel_mask` must have shape \(2, 64, 96\) .* got \(1, 64, 96\)"),
        ({"pixel_mask": torch.ones(2, 1, 64, 96)}, r"got \(2, 1, 64, 96\)"),
        ({"crop_boxes": torch.ones(2, 3)}, r"`crop_boxes` must have shape \(2, 4\) .* got \(2, 3\)"),
    ],
)
def test_masks_and_boxes_that_do_not_fit_raise(options, match):
    with pytest.raises(ValueError, match=match):
        small_model()(torch.zeros(2, 3, 64, 96), **options)


def test_checkpoints_of_many_channels_load_bit_equal(tmp_path):
    model = small_model(backbone_config=small_backbone_config(num_channels=6))
    model.save_pretrained(tmp_path)
    loaded = Sam2UNetForSemanticSegmentation.from_pretrained(tmp_path)
    assert loaded.config.backbone_config.num_channels == 6
    image = torch.randn(1, 6, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(image).logits, model(image).logits)
