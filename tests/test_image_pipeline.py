"""Pictures through the image segmentation pipeline, from the package and from a checkpoint alone."""

import base64
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from common import BRATS_REGIONS, small_model
from PIL import ExifTags, Image
from transformers import pipeline

from sam2unet_hf import Sam2UNetConfig, Sam2UNetImagePipeline, Sam2UNetImageProcessor


NAMES = {"background": 0, "TC without ET": 1, "WT without TC": 2, "ET": 3}

# Run where the package cannot be imported; the arguments are the checkpoint, a picture and where to write.
SEGMENT = """
import sys

sys.modules["sam2unet_hf"] = None

import numpy as np
from transformers import pipeline

checkpoint, picture, output = sys.argv[1:]
segment = pipeline("image-segmentation", model=checkpoint, trust_remote_code=True, device="cpu")
np.savez(output, **{part["label"]: np.asarray(part["mask"]) for part in segment(picture)})
segment.model.save_pretrained(output + "-again")
"""


@pytest.fixture(scope="module")
def model():
    return small_model(regions=BRATS_REGIONS)


@pytest.fixture(scope="module")
def processor():
    return Sam2UNetImageProcessor(regions=BRATS_REGIONS, size={"height": 96, "width": 96})


@pytest.fixture(scope="module")
def checkpoint(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture_of(mode):
    """A picture of 90 x 110 pixels whose values use what the mode has."""
    values = np.random.default_rng(0).random((90, 110, 3), np.float32)
    values[:20] = 0
    if mode == "F":
        return Image.fromarray(values[..., 0])
    if mode in ("I;16", "I"):
        return Image.fromarray((values[..., 0] * 65535).astype(np.uint16 if mode == "I;16" else np.int32))
    return Image.fromarray((values * 255).astype(np.uint8)).convert(mode)


def label_map_of(parts):
    found = np.full(parts[0]["mask"].size[::-1], -1)
    for part in parts:
        found[np.asarray(part["mask"]) == 255] = NAMES[part["label"]]
    return found


def expected_map(model, processor, picture):
    with torch.inference_mode():
        outputs = model(**processor(picture, return_tensors="pt"))
    (label_map,) = processor.post_process_semantic_segmentation(outputs, [(picture.height, picture.width)])
    assert len(label_map.unique()) > 1
    return label_map.numpy()


@pytest.mark.parametrize(
    ("mode", "suffix"), [("I;16", "png"), ("I", "tif"), ("F", "tif"), ("L", "png"), ("RGB", "png")]
)
def test_pictures_of_all_depths_get_the_masks_of_the_processor(checkpoint, model, processor, tmp_path, mode, suffix):
    picture, path = picture_of(mode), tmp_path / f"picture.{suffix}"
    picture.save(path)
    text = base64.b64encode(path.read_bytes()).decode()
    expected = expected_map(model, processor, picture)
    segment = pipeline("image-segmentation", str(checkpoint), pipeline_class=Sam2UNetImagePipeline, device="cpu")
    for given in (picture, str(path), text, f"data:image/{suffix};base64,{text}"):
        np.testing.assert_array_equal(label_map_of(segment(given)), expected)
    for parts in segment([str(path)] * 2):
        np.testing.assert_array_equal(label_map_of(parts), expected)


def test_eight_bits_get_the_masks_of_transformers_own_pipeline(checkpoint):
    own, theirs = (
        pipeline("image-segmentation", str(checkpoint), device="cpu", **options)
        for options in ({"pipeline_class": Sam2UNetImagePipeline}, {})
    )
    turned = picture_of("RGB")
    turned.getexif()[ExifTags.Base.Orientation] = 6
    for picture in (picture_of("L"), picture_of("RGBA"), picture_of("P"), turned):
        np.testing.assert_array_equal(label_map_of(own(picture)), label_map_of(theirs(picture)))
    with pytest.raises(ValueError, match="Incorrect image source"):
        own("absent.png")


def test_checkpoint_alone_segments_a_16_bit_picture(checkpoint, model, processor, tmp_path):
    picture_of("I;16").save(tmp_path / "picture.png")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment.update(HF_HOME=str(tmp_path / "hf_home"), HF_HUB_OFFLINE="1")
    arguments = [str(checkpoint), str(tmp_path / "picture.png"), str(tmp_path / "masks.npz")]
    run = subprocess.run(
        [sys.executable, "-c", SEGMENT, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    masks = np.load(tmp_path / "masks.npz")
    found = label_map_of([{"label": name, "mask": Image.fromarray(masks[name])} for name in masks])
    np.testing.assert_array_equal(found, expected_map(model, processor, picture_of("I;16")))
    again = tmp_path / "masks.npz-again"
    assert (again / "pipeline_sam2unet.py").is_file()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (checkpoint, again)]
    assert configs[1]["custom_pipelines"] == configs[0]["custom_pipelines"]
    assert configs[0]["custom_pipelines"]["image-segmentation"]["impl"] == "pipeline_sam2unet.Sam2UNetImagePipeline"


def test_package_needs_no_trust_for_the_pipeline_of_transformers(checkpoint):
    assert not getattr(Sam2UNetConfig.from_pretrained(checkpoint), "custom_pipelines", None)
    segment = pipeline("image-segmentation", str(checkpoint), device="cpu")
    assert type(segment).__name__ == "ImageSegmentationPipeline"


def test_a_picture_cut_to_8_bits_is_told(checkpoint, tmp_path):
    segment = pipeline("image-segmentation", str(checkpoint), device="cpu")
    with pytest.warns(
        UserWarning, match=r"Of a grey picture \d+% .* is white, .* Pass `pipeline_class=Sam2UNetImagePi"
    ):
        segment(picture_of("I;16"))
    # The middle of the values of a scan of 12 bits.
    values = np.random.default_rng(0).normal(800, 400, (90, 110)).clip(0, 4095).astype(np.uint16)
    with pytest.warns(UserWarning, match="as if 16 bits had been cut to 8"):
        segment(Image.fromarray(values))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_picture_of_8_bits_is_no_reason_to_warn(processor, mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor(picture_of(mode).convert("RGB"), return_tensors="pt")
        processor(Image.new("RGB", (90, 80)), return_tensors="pt")
