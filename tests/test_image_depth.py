"""Images of more than 8 bits: which value is white is chosen once for a data set, and goes with the model."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import small_model
from PIL import Image
from torchvision import tv_tensors

from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.finetuning import run_segmentation
from sam2unet_hf.finetuning.image_depth import Brightest, brighter, fit_white_level
from sam2unet_hf.training import augmentation


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import error_analysis  # noqa: E402


GREY = np.random.default_rng(0).integers(0, 4096, (8, 9))
QUICK = ["--use_cpu", "--disable_tqdm", "true", "--image_size", "64", "--num_train_epochs", "1"]


@pytest.mark.parametrize(
    "image",
    [GREY.astype(np.uint16), GREY.astype(np.int32), GREY // 20, Image.fromarray(GREY.astype(np.uint16))],
    ids=["uint16", "int32", "int64 below 256", "PIL"],
)
def test_white_level_scales_all_images_alike(image, recwarn):
    processor = Sam2UNetImageProcessor(do_resize=False, do_normalize=False, white_level=4095)
    pixels = processor(image, return_tensors="pt")["pixel_values"][0]
    expected = torch.from_numpy(np.asarray(image).astype(np.float32)) / 4095
    torch.testing.assert_close(pixels, expected.expand(3, -1, -1))
    assert not recwarn.list
    blank = processor(np.full((8, 9), 200, np.uint8), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(blank, torch.full_like(blank, 200 / 255))


def test_white_level_65535_is_the_scale_without_it():
    image = np.random.default_rng(0).integers(0, 65536, (8, 9)).astype(np.uint16)
    images = [Sam2UNetImageProcessor(white_level=level)(image)["pixel_values"][0] for level in (None, 65535)]
    assert torch.equal(*images)


def test_white_level_goes_with_the_processor(tmp_path):
    Sam2UNetImageProcessor(white_level=4095).save_pretrained(tmp_path)
    assert Sam2UNetImageProcessor.from_pretrained(tmp_path).white_level == 4095
    assert Sam2UNetImageProcessor.from_pretrained(tmp_path, white_level=1023).white_level == 1023
    with pytest.raises(ValueError, match="`white_level` must be a value from 255 to 65535, such as 4095, got 12"):
        Sam2UNetImageProcessor(white_level=12)
    with pytest.raises(ValueError, match=r"integer images in 0..1023, .* to 4"):
        Sam2UNetImageProcessor(white_level=1023)(GREY.astype(np.uint16))


def test_the_warning_of_a_dark_picture_says_what_to_set():
    with pytest.warns(UserWarning, match="nearly black. Say which value is white, such as by `processor.white_level"):
        Sam2UNetImageProcessor()(GREY.astype(np.uint16))


@pytest.mark.parametrize("name", ["gamma", "strong"])
def test_augmented_images_have_the_scale_of_the_processor(name, recwarn):
    image = Image.fromarray(np.full((64, 64), 4095, np.uint16))
    for seed in range(5):
        torch.manual_seed(seed)
        changed, _ = augmentation(name, white_level=4095)(image, tv_tensors.Mask(torch.zeros(64, 64).long()))
        assert changed.max() > 0.5
    assert not recwarn.list


@pytest.mark.parametrize(
    ("value", "level"), [(300, 1023), (1023, 1023), (1024, 4095), (3071, 4095), (4096, 65535), (65535, 65535)]
)
def test_the_least_level_that_no_image_exceeds_is_white(value, level, caplog):
    processor = Sam2UNetImageProcessor()
    fit_white_level(processor, Brightest(value, "x"))
    assert processor.white_level == level
    assert (f"values up to {value}: taking {level} for white" in caplog.text) == (level < 65535)


def test_pictures_of_bytes_have_no_level():
    for image in (Image.fromarray(GREY.astype(np.uint8)), Image.fromarray((GREY // 20).astype(np.int32))):
        assert brighter(image, "x", None) is None
    assert brighter(Image.fromarray((GREY // 20).astype(np.uint16)), "x", None) == Brightest(
        int(GREY.max() // 20), "x"
    )
    processor = Sam2UNetImageProcessor()
    fit_white_level(processor, None)
    assert processor.white_level is None


def test_a_model_keeps_its_level_unless_it_is_trained(caplog):
    processor = Sam2UNetImageProcessor(white_level=4095)
    fit_white_level(processor, Brightest(900, "x"))
    assert (processor.white_level, caplog.text) == (4095, "")
    fit_white_level(processor, Brightest(200, "x"))
    assert "values up to 200 alone, where 4095 is white, so that they are nearly black" in caplog.text
    with pytest.raises(
        SystemExit, match="x holds values up to 9000, and 4095 is white. .*--white_level 65535 when trai"
    ):
        fit_white_level(processor, Brightest(9000, "x"))
    fit_white_level(processor, Brightest(9000, "x"), has_trained=False)
    assert processor.white_level == 65535
    assert "The model takes 4095 for white, and sees images of 65535 now" in caplog.text
    with pytest.raises(
        SystemExit, match="The first images have more than 8 bits, and values up to 900 .x.. Say which"
    ):
        fit_white_level(Sam2UNetImageProcessor(), Brightest(900, "x"), is_sample=True)


def write_12_bit(folder, highest=4095):
    for number, split in enumerate(("train", "train", "validation", "test")):
        mask = np.zeros((70, 80), np.uint8)
        mask[20 : 50 - number, 20:60] = 1
        image = (
            mask.astype(int) * 2000 + np.random.default_rng(number).integers(0, highest - 2000, mask.shape)
        ).astype(np.uint16)
        for kind, pixels in (("images", image), ("masks", mask)):
            path = folder / split / kind / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return str(folder)


def test_images_of_12_bits_from_training_to_scores(tmp_path, recwarn, caplog):
    data = write_12_bit(tmp_path / "data")
    small_model(regions={"foreground": [1]}).save_pretrained(tmp_path / "start")
    start = ["--model_name_or_path", str(tmp_path / "start"), "--dataset_name", data, *QUICK]
    run_segmentation.main([*start, "--augmentation", "gamma", "--output_dir", str(tmp_path / "run")])
    assert "taking 4095 for white (--white_level)" in caplog.text
    assert Sam2UNetImageProcessor.from_pretrained(tmp_path / "run").white_level == 4095
    error_analysis.main(["--model", str(tmp_path / "run"), "--device", "cpu"])
    assert not [warning for warning in recwarn if "nearly black" in str(warning.message)]
    # A second cohort has the scale of the model.
    scored = ["--do_train", "false", "--model_name_or_path", str(tmp_path / "run"), "--test_dir"]
    other = write_12_bit(tmp_path / "other", 60000)
    with pytest.raises(SystemExit, match="holds values up to .*, and 4095 is white"):
        run_segmentation.main([*scored, other, "--output_dir", str(tmp_path / "scored"), *QUICK])
    run_segmentation.main([*start, "--white_level", "65535", "--output_dir", str(tmp_path / "other_run")])
    assert Sam2UNetImageProcessor.from_pretrained(tmp_path / "other_run").white_level == 65535
