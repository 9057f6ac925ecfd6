"""Volumes through models that see a window about the head, with neighbouring slices as channels."""

import nibabel as nib
import numpy as np
import pytest
import torch
from common import BRATS_REGIONS, small_backbone_config, small_model

from dataset_scripts.phantom import write_phantom_cohort
from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.cases_sam2unet import find_cases
from sam2unet_hf.crop_sam2unet import OUTSIDE_LOGIT
from sam2unet_hf.scans_sam2unet import PLANES, head_box, take_slice, to_grey
from sam2unet_hf.volume import Sam2UNetVolumePipeline


THREE = ["flair", "t1ce", "t2"]
WINDOW = {"height": 64, "width": 96}
SHAPE = (100, 90, 63)  # in coronal and sagittal slices the head fits the window, in axial ones it is too high


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    cohort = write_phantom_cohort(tmp_path_factory.mktemp("crop") / "brats", num_patients=1, shape=SHAPE)
    return find_cases(cohort)[0]


@pytest.fixture(scope="module")
def greys(case):
    return [to_grey(scan) for scan in case.read_images(THREE)]


def heads(grey, planes):
    """Return for each plane the voxels between the first and the last that is not 0 along both axes of its slices."""
    marked = grey > 0
    between = [
        np.logical_or.accumulate(marked, axis) & np.flip(np.logical_or.accumulate(np.flip(marked, axis), axis), axis)
        for axis in range(3)
    ]
    return [np.logical_and.reduce([between[axis] for axis in range(3) if axis != PLANES[plane]]) for plane in planes]


def cropping_pipeline(modalities=THREE, neighbours=1, **kwargs):
    num_channels = 3 if (len(modalities), neighbours) == (1, 0) else len(modalities) * (2 * neighbours + 1)
    model = small_model(backbone_config=small_backbone_config(num_channels=num_channels), regions=BRATS_REGIONS)
    options = {"num_channels": num_channels, "neighbours": neighbours, "head_crop_size": WINDOW, **kwargs}
    processor = Sam2UNetImageProcessor(regions=BRATS_REGIONS, modalities=list(modalities), **options)
    return Sam2UNetVolumePipeline(model, processor)


def brightness(pixel_values, pixel_mask, crop_boxes):
    """Stand in for the model: regions are the pixels above thresholds, in the second channel."""
    grey = pixel_values[:, 1]
    logits = torch.stack([grey + 1.8, grey + 0.4, grey - 0.4], dim=1) * 30
    logits = logits.masked_fill(~pixel_mask[:, None], OUTSIDE_LOGIT)
    return type("Output", (), {"logits": logits, "crop_boxes": crop_boxes})


@pytest.mark.parametrize("plane", PLANES)
def test_each_slice_is_that_of_the_window_with_its_neighbours(case, greys, plane):
    segment = cropping_pipeline()
    found = segment(case, planes=[plane], batch_size=3, return_probabilities=True, progress=False)
    probabilities = [found.scan.from_file_grid(region) for region in found.probabilities]
    axis = PLANES[plane]
    others = tuple(other for other in range(3) if other != axis)
    of_head = np.flatnonzero(np.any([grey.any(axis=others) for grey in greys], axis=0))
    assert 10 < len(of_head) < SHAPE[axis]
    for index in range(SHAPE[axis]):
        actual = np.stack([take_slice(region, plane, index) for region in probabilities])
        if index not in of_head:
            assert not actual.any()
            continue
        # At the ends the last slice again.
        indices = [max(index - 1, of_head[0]), index, min(index + 1, of_head[-1])]
        channels = [take_slice(grey, plane, i) for grey in greys for i in indices]
        inputs = segment.processor(
            np.stack(channels, axis=-1), head_boxes=[head_box(greys, plane)], return_tensors="pt"
        )
        with torch.inference_mode():
            outputs = segment.model(**inputs)
        (expected,) = segment.processor.post_process_regions(outputs, [channels[0].shape])
        np.testing.assert_allclose(actual, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(("planes", "flips"), [(["axial"], True), (["coronal", "sagittal"], False)], ids=str)
def test_nothing_is_found_outside_the_head(case, greys, planes, flips):
    segment = cropping_pipeline(["flair"])
    with torch.no_grad():
        segment.model.decode_head.classifier.bias.fill_(30)  # everything is tumour
    found = segment(case, planes=planes, flips=flips, progress=False)
    label_map = found.scan.from_file_grid(found.label_map)
    head = np.any(heads(greys[0], planes), axis=0)
    assert 0.99 < np.count_nonzero(greys[0]) / np.count_nonzero(head) < 1
    assert not label_map[~head].any()
    # In axial slices the head is scaled down to the window, and its rim is lost.
    assert (label_map[head] > 0).mean() > (0.9 if "axial" in planes else 0.99)


@pytest.mark.parametrize("planes", [["axial"], list(PLANES)], ids=str)
def test_voxels_keep_their_place(case, greys, planes, monkeypatch):
    segment = cropping_pipeline(["flair"])
    monkeypatch.setattr(segment.processor, "head_crop_size", {"height": 96, "width": 96})
    monkeypatch.setattr(segment.model, "forward", brightness)
    found = segment(case, planes=planes, return_probabilities=True, progress=False)
    grey = greys[0] / 255
    head = np.mean(heads(grey, planes), axis=0)
    values = (grey - segment.processor.image_mean[1]) / segment.processor.image_std[1]
    for probabilities, shift in zip(found.probabilities, (1.8, 0.4, -0.4), strict=True):
        expected = torch.from_numpy((values + shift) * 30).sigmoid().numpy() * head
        np.testing.assert_allclose(found.scan.from_file_grid(probabilities), expected, atol=1e-4)
    assert set(np.unique(found.label_map)) == {0, 1, 2, 3}


def test_flips_are_those_of_the_window(case, monkeypatch, tmp_path):
    """A window that lies off the middle of its slices is mirrored in itself."""
    scan = nib.load(case.path("flair")).slicer[12:, 3:]
    nib.save(scan, tmp_path / "flair.nii")
    segment = cropping_pipeline(["flair"])
    monkeypatch.setattr(segment.model, "forward", brightness)
    once, mirrored = (
        segment(tmp_path / "flair.nii", flips=flips, return_probabilities=True, progress=False)
        for flips in (False, True)
    )
    left, top, right, bottom = head_box([to_grey(once.scan)], "axial")
    assert left + right != scan.shape[0]
    assert top + bottom != scan.shape[1]
    np.testing.assert_allclose(once.probabilities, mirrored.probabilities, atol=1e-5)


def test_one_modality_alone_stays_a_grey_image(case, greys):
    segment = cropping_pipeline(["t1ce"], neighbours=0)
    seen = []
    forward = segment.model.forward
    segment.model.forward = lambda **inputs: seen.append(inputs["pixel_values"]) or forward(**inputs)
    segment(case, progress=False, batch_size=4)
    assert {tuple(batch.shape[1:]) for batch in seen} == {(3, 64, 96)}
    grey = torch.cat(seen) * torch.tensor(segment.processor.image_std).view(3, 1, 1)
    grey += torch.tensor(segment.processor.image_mean).view(3, 1, 1)
    torch.testing.assert_close(grey[:, 0], grey[:, 2])
    assert len(grey) == np.count_nonzero(greys[1].any(axis=(0, 1))) < SHAPE[2]


@pytest.mark.parametrize(
    ("modalities", "match"),
    [
        (["flair", "t2"], r"\['flair', 't2'\] with 0 neighbours on each side make 2 channels, .* gives 3, .* takes 3"),
        (["flair", "t1", "t1ce", "t2"], "make 4 channels"),
    ],
)
def test_modalities_that_do_not_make_the_channels_of_the_model_raise(modalities, match):
    with pytest.raises(ValueError, match=match):
        Sam2UNetVolumePipeline(small_model(), Sam2UNetImageProcessor(), modalities)


def test_processor_of_another_model_raises():
    model = small_model(backbone_config=small_backbone_config(num_channels=6))
    processor = Sam2UNetImageProcessor(num_channels=3, neighbours=1)
    with pytest.raises(ValueError, match="the image processor gives 3, and the model takes 6. Pass the modalities"):
        Sam2UNetVolumePipeline(model, processor, ["flair", "t2"])
