"""Volumes: on the input's grid whatever its orientation, and what the model gives slice by slice."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import forks
import nibabel as nib
import numpy as np
import pytest
import torch
from common import small_model
from nibabel import orientations
from PIL import Image

from dataset_scripts.brats_slices import BratsSlices
from dataset_scripts.phantom import write_phantom_cohort
from sam2unet_hf import Sam2UNetImageProcessor, devices
from sam2unet_hf.cases_sam2unet import find_cases
from sam2unet_hf.clean_up_sam2unet import CleanUp, RegionRule
from sam2unet_hf.labels_sam2unet import check_enhancing_label
from sam2unet_hf.metrics import LesionReport, VolumeReport
from sam2unet_hf.scans_sam2unet import ScanError, take_slice, to_grey, write_nifti
from sam2unet_hf.training import SegmentationTransform
from sam2unet_hf.volume import Sam2UNetVolumePipeline, main
from sam2unet_hf.volume_sam2unet import VolumeSegmentation


BRATS_DIR = Path(os.environ.get("BRATS_DIR", Path(__file__).parents[2] / "shared" / "brats"))
REGIONS = {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}
THREE = ["flair", "t1ce", "t2"]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_phantom_cohort(tmp_path_factory.mktemp("volumes") / "brats", num_patients=2, shape=(40, 40, 26))


@pytest.fixture(scope="module")
def segment():
    """A pipeline of a model with random weights, whose masks cover about half of the head."""
    torch.manual_seed(0)
    model = small_model(regions=REGIONS).eval()
    processor = Sam2UNetImageProcessor(regions=REGIONS, size={"height": 64, "width": 64})
    return Sam2UNetVolumePipeline(model, processor, THREE)


def bright_voxels(pixel_values, **kwargs):
    """Stand in for the model: regions are the voxels above thresholds, as certain as they can be."""
    grey = pixel_values.mean(dim=1)
    return type("Output", (), {"logits": torch.stack([grey + 1.2, grey + 0.4, grey - 0.4], dim=1) * 30})


@pytest.fixture
def bright(segment, monkeypatch):
    """The pipeline with a model that sees single pixels, so that geometry shows, at the size of the slices."""
    monkeypatch.setattr(segment.model, "forward", bright_voxels)
    monkeypatch.setattr(segment.processor, "do_resize", False)
    return segment


def turned(path, codes, folder):
    """Write the scan of `path` with other axes, and return the new path."""
    image = nib.load(path)
    transform = orientations.ornt_transform(
        orientations.io_orientation(image.affine), orientations.axcodes2ornt(codes)
    )
    folder.mkdir(exist_ok=True)
    nib.save(image.as_reoriented(transform), folder / path.name)
    return folder / path.name


def test_slices_go_through_the_model_as_from_the_builder(cohort, segment, tmp_path, monkeypatch):
    """The same images, and at each voxel the probability of the slice that it lies in."""
    case = find_cases(cohort)[0]
    found = segment(case, return_probabilities=True, batch_size=3, progress=False)
    builder = BratsSlices(data_dir=str(cohort), cache_dir=str(tmp_path), modalities=THREE, slices="all")
    builder.download_and_prepare()
    rows = [row for split in builder.as_dataset().values() for row in split if row["case_id"] == case.case_id]
    assert len(rows) == 26
    seen = 0
    for row in rows:
        index = row["slice_index"]
        on_slice = found.scan.from_file_grid(found.label_map)[:, :, index].T
        image = np.stack([np.asarray(row[name]) for name in THREE], axis=-1)
        if not image.any():
            assert not on_slice.any()
            continue
        seen += 1
        inputs = SegmentationTransform(segment.processor, mask_column=None)({"image": [Image.fromarray(image)]})
        with torch.no_grad():
            outputs = segment.model(torch.stack(inputs["pixel_values"]))
        (expected,) = segment.processor.post_process_regions(outputs, target_sizes=[(40, 40)])
        for region, volume in zip(expected.numpy(), found.probabilities, strict=True):
            np.testing.assert_allclose(found.scan.from_file_grid(volume)[:, :, index].T, region, atol=1e-5)
        (label_map,) = segment.processor.post_process_semantic_segmentation(outputs, target_sizes=[(40, 40)])
        assert (label_map.numpy() == on_slice).mean() > 0.999
    assert seen > 10


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL"])
@pytest.mark.parametrize("planes", [["axial"], ["axial", "coronal", "sagittal"]])
def test_turned_axes_give_the_same_segmentation_in_space(cohort, bright, codes, planes, tmp_path):
    case = find_cases(cohort)[0]
    paths = {name: turned(case.path(name), codes, tmp_path / codes) for name in THREE}
    there, here = (bright(scans, planes=planes, progress=False) for scans in (paths, case))
    there.save(tmp_path / "there.nii.gz")
    here.save(tmp_path / "here.nii.gz")
    written, original = nib.load(tmp_path / "there.nii.gz"), nib.load(paths["flair"])
    assert nib.aff2axcodes(written.affine) == tuple(codes)
    assert written.shape == original.shape
    assert np.array_equal(written.affine, original.affine)
    back = written.as_reoriented(
        orientations.ornt_transform(
            orientations.io_orientation(written.affine),
            orientations.io_orientation(nib.load(tmp_path / "here.nii.gz").affine),
        )
    )
    assert np.array_equal(np.asarray(back.dataobj), here.label_map)
    assert there.volumes_ml == pytest.approx(here.volumes_ml)
    assert there.largest_slice == here.largest_slice
    assert set(np.unique(here.label_map)) == {0, 1, 2, 3}


@pytest.mark.slow
@pytest.mark.skipif(not BRATS_DIR.exists(), reason="needs real BraTS cases")
def test_every_real_case_on_its_own_grid_and_the_same_from_turned_axes(bright, tmp_path):
    cases = [case for case in find_cases(BRATS_DIR) if all(name in case.files for name in THREE)]
    assert cases
    for case, codes in zip(cases, ["RAS", "PIR", "SAL", "LAI", "IPL", "ASR", "PSL", "RSP"], strict=False):
        paths = {name: turned(case.path(name), codes, tmp_path / case.case_id) for name in THREE}
        here, there = (bright(scans, progress=False) for scans in (case, paths))
        assert set(np.unique(here.label_map)) == {0, 1, 2, 3}
        for found, path in ((here, case.path("flair")), (there, paths["flair"])):
            found.save(tmp_path / "seg.nii.gz")
            written, original = nib.load(tmp_path / "seg.nii.gz"), nib.load(path)
            assert written.shape == original.shape
            assert np.array_equal(written.affine, original.affine)
            assert np.array_equal(np.asarray(written.dataobj), found.label_map)
            assert np.array_equal(found.region("TC"), np.isin(np.asarray(written.dataobj), [1, 3]))
        assert np.array_equal(here.scan.from_file_grid(here.label_map), there.scan.from_file_grid(there.label_map))


def test_flips_leave_a_model_of_single_pixels_as_it_is(cohort, bright):
    case = find_cases(cohort)[0]
    options = {"return_probabilities": True, "progress": False}
    once, mirrored = (bright(case, flips=flips, **options) for flips in (False, True))
    np.testing.assert_allclose(once.probabilities, mirrored.probabilities, atol=1e-6)


def test_flips_average_the_mirror_images(segment, tmp_path):
    voxels = np.random.default_rng(0).integers(1, 999, (64, 64, 1)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.diag([-1.0, -1, 1, 1])), tmp_path / "scan.nii.gz")
    scans = dict.fromkeys(THREE, tmp_path / "scan.nii.gz")
    once, mirrored = (
        segment(scans, flips=flips, return_probabilities=True, progress=False) for flips in (False, True)
    )
    grey = segment.processor(take_slice(to_grey(once.scan), "axial", 0))
    pixel_values = torch.as_tensor(np.stack(grey["pixel_values"]))
    with torch.no_grad():
        maps = [
            segment.model(pixel_values.flip(axes)).logits.sigmoid().flip(axes) for axes in ((), (2,), (3,), (2, 3))
        ]
    for found, expected in ((once, maps[0][0]), (mirrored, torch.stack(maps).mean(dim=0)[0])):
        np.testing.assert_allclose(found.probabilities[..., 0], expected.numpy().transpose(0, 2, 1), atol=1e-5)
    assert np.abs(once.probabilities - mirrored.probabilities).max() > 0.01


def test_header_of_the_scan_and_labels_of_the_year(cohort, segment, tmp_path):
    case = find_cases(cohort)[0]
    image = nib.load(case.path("flair"))
    image.header["descrip"] = b"acquired at 3 T"
    image.header["scl_slope"], image.header["scl_inter"] = 2, 5
    image.set_sform(image.affine, code=4)
    scans = {name: case.path(name) for name in THREE} | {"flair": tmp_path / "flair.nii"}
    nib.save(image, scans["flair"])
    found = segment(scans, progress=False)
    for label, ids in ((3, {0, 1, 2, 3}), (4, {0, 1, 2, 4})):
        found.save(tmp_path / f"{label}.nii.gz", enhancing_label=label)
        written = nib.load(tmp_path / f"{label}.nii.gz")
        assert written.header["descrip"] == b""  # where the patient's name could be
        assert int(written.header["sform_code"]) == 4
        assert written.get_data_dtype() == np.uint8
        assert set(np.unique(written.get_fdata())) <= ids
    assert np.array_equal(written.get_fdata() == 4, found.label_map == 3)
    with pytest.raises(ValueError, match="must be 3 .* or 4 .*, got 2"):
        found.save(tmp_path / "x.nii.gz", enhancing_label=2)
    with pytest.raises(ValueError, match=r"must end in .nii or .nii.gz"):
        found.save(tmp_path / "x.mha")
    with pytest.raises(ValueError, match="return_probabilities=True"):
        found.save_probabilities(tmp_path / "x.nii.gz", "WT")


def test_volumes_and_largest_slice(cohort, bright, tmp_path):
    """Of voxels of 1 x 2 x 4 mm and a box of known size."""
    voxels = np.zeros((20, 24, 16), np.int16)
    voxels[2:18, 2:22, 1:15] = 100
    voxels[5:10, 5:9, 4:8] = 1000
    voxels[10, 5:9, 6] = 1000
    affine = np.diag([1.0, 2, 4, 1])
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "scan.nii.gz")
    single = Sam2UNetVolumePipeline(bright.model, bright.processor, ["flair"])
    found = single(tmp_path / "scan.nii.gz", progress=False)
    assert found.volumes_ml["ET"] == pytest.approx((5 * 4 * 4 + 4) * 8 / 1000)
    assert found.largest_slice == 6
    assert np.array_equal(found.region("ET"), voxels == 1000)
    assert found.region("WT").sum() >= found.region("TC").sum() >= found.region("ET").sum()


def test_command_writes_segmentations_and_leaves_out_bad_cases(cohort, segment, tmp_path, capsys):
    segment.processor.modalities = THREE
    segment.model.save_pretrained(tmp_path / "model")
    segment.processor.save_pretrained(tmp_path / "model")
    segment.processor.modalities = None
    bad = tmp_path / "scans" / "Bad_1"
    bad.mkdir(parents=True)
    for case in find_cases(cohort):
        (tmp_path / "scans" / case.case_id).symlink_to(case.folder)
    for name in THREE:
        (bad / f"Bad_1_{name}.nii.gz").write_bytes(b"no scan")
    options = ["-o", str(tmp_path / "out"), "--probabilities", "--et_label", "4"]
    options += ["--dtype", "float32", "--device", "cpu"]
    with pytest.raises(SystemExit, match="1 of 3 cases could not be segmented"):
        main([str(tmp_path / "model"), str(tmp_path / "scans"), *options])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["case"] for line in lines] == [case.case_id for case in find_cases(cohort)]
    expected = segment(find_cases(cohort)[0], progress=False, return_probabilities=True)
    written = nib.load(lines[0]["segmentation"])
    assert np.array_equal(np.minimum(written.get_fdata(), 3), expected.label_map)
    assert lines[0]["volumes_ml"] == pytest.approx(expected.volumes_ml, abs=1e-3)
    name = f"{lines[0]['case']}_TC_probability.nii.gz"
    np.testing.assert_allclose(nib.load(tmp_path / "out" / name).get_fdata(), expected.probabilities[1], atol=1e-6)
    assert len(list((tmp_path / "out").iterdir())) == 8


@pytest.mark.parametrize(
    ("case_id", "label"), [("Phantom_001", 4), ("BraTS20_Training_001", 4), ("BraTS-GLI-00000-000", 3)]
)
def test_results_are_read_as_masks_of_their_case(cohort, bright, tmp_path, case_id, label):
    source = find_cases(cohort)[0]
    (tmp_path / case_id).mkdir()
    for name, path in source.files.items():
        if name != "seg":
            shutil.copy(path, tmp_path / case_id / f"{case_id}_{name}.nii.gz")
    found = bright(source, progress=False)
    found.save(tmp_path / case_id / f"{case_id}_seg.nii.gz")
    labels = np.unique(nib.load(tmp_path / case_id / f"{case_id}_seg.nii.gz").get_fdata())
    assert labels.max() == label
    mask = find_cases(tmp_path)[0].read_mask()
    np.testing.assert_array_equal(mask.to_file_grid(mask.voxels), found.label_map)
    own_label = VolumeSegmentation(found.label_map, {"cavity": [4]}, found.scan)  # which 4 would hide
    own_label.save(tmp_path / f"{case_id}_seg.nii.gz")
    assert np.unique(nib.load(tmp_path / f"{case_id}_seg.nii.gz").get_fdata()).max() == 3


def test_command_scores_against_the_reference(cohort, segment, tmp_path, capsys, caplog):
    segment.model.save_pretrained(tmp_path / "model")
    segment.processor.save_pretrained(tmp_path / "model")
    case = find_cases(cohort)[0]
    options = ["-o", str(tmp_path / "out"), "--device", "cpu", "--score", "--modalities", *THREE]
    with caplog.at_level("INFO"):
        main([str(tmp_path / "model"), str(case.folder), *options])
    line = json.loads(capsys.readouterr().out)
    own = line["WT"]
    assert f"WT: Dice {own['volume_dice']:.3f}; 95 % Hausdorff distance {own['hausdorff95_mm']:.1f} mm." in caplog.text
    mask = case.read_mask()
    predicted = nib.load(line["segmentation"]).get_fdata().astype(np.uint8)
    predicted[predicted == 4] = 3  # ET in BraTS until 2021, whose name the case has
    pair = {"predictions": [mask.from_file_grid(predicted)], "references": [mask.voxels]}
    expected = VolumeReport(spacing=mask.spacing_mm).compute(**pair)
    expected |= LesionReport(spacing=mask.spacing_mm).compute(**pair)
    assert 0 < expected["volume_dice_WT"] < 1
    assert {"volume_dice", "nsd_1mm", "lesion_dice", "matched_lesion_dice"} <= line["WT"].keys()
    for region in ("WT", "TC", "ET"):
        for measure, value in line[region].items():
            assert value == pytest.approx(expected[f"{measure}_{region}"])
    table = json.loads((tmp_path / "out" / "patients.json").read_text())
    assert [(row["patient"], row["region"]) for row in table["patients"]] == [(case.case_id, name) for name in REGIONS]
    for row in table["patients"]:
        assert row["volume_dice"] == pytest.approx(expected[f"volume_dice_{row['region']}"], abs=1e-12)
        for column in ("hausdorff95_mm", "lesion_dice", "lesion_hausdorff95_pooled_mm", "nsd_0.5mm", "lesion_nsd_1mm"):
            assert row[column] == pytest.approx(expected[f"{column}_{row['region']}"])
        assert row["predicted_ml"] == pytest.approx(line["volumes_ml"][row["region"]], abs=1e-3)
    assert (tmp_path / "out" / "patients.csv").read_text().count("\n") == 4
    for file in (tmp_path / "out").glob("patients.*"):
        file.unlink()
    (tmp_path / "out" / f"{case.case_id}_seg.nii.gz").unlink()
    case.files["seg"].rename(tmp_path / "seg.nii.gz")
    try:
        with pytest.raises(SystemExit, match="The case has no mask to score by. Leave out --score to segment it"):
            main([str(tmp_path / "model"), str(case.folder), *options])
        assert not list((tmp_path / "out").iterdir())
        nib.save(nib.Nifti1Image(np.ones((40, 40, 25), np.uint8), mask.affine), case.files["seg"])
        with pytest.raises(SystemExit, match="1 of 1 cases could not be segmented or scored"):
            main([str(tmp_path / "model"), str(case.folder), *options])
        assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{case.case_id}_seg.nii.gz"]
    finally:
        (tmp_path / "seg.nii.gz").rename(case.files["seg"])


def test_command_names_what_is_hardly_believable(cohort, segment, tmp_path, caplog):
    first, second = find_cases(cohort)
    regions = {"WT": [1, 2, 3]}
    for name, bias in (("all", 40.0), ("none", -40.0)):
        model = small_model(regions=regions)
        model.decode_head.classifier.bias.data.fill_(bias)
        model.save_pretrained(tmp_path / name)
        processor = Sam2UNetImageProcessor(regions=regions, size={"height": 64, "width": 64}, modalities=["flair"])
        processor.save_pretrained(tmp_path / name)
    (tmp_path / "all" / "splits.json").write_text(json.dumps({"train": [second.case_id], "test": [first.case_id]}))
    options = ["-o", str(tmp_path / "out"), "--device", "cpu"]
    main([str(tmp_path / "none"), str(first.folder), *options])
    assert f"{first.case_id}: nothing was found at all." in caplog.text
    caplog.clear()
    main([str(tmp_path / "all"), str(cohort), *options])
    assert re.search(rf"{first.case_id}: \d{{3}}% of the head was taken for tumour, more than a third\.", caplog.text)
    main([str(tmp_path / "all"), str(first.folder), *options, "--score"])
    assert "The model was trained on" not in caplog.text
    main([str(tmp_path / "all"), str(cohort), *options, "--score"])
    known = (
        f"The model was trained on 1 of the 2 patients that are scored: {second.case_id}. Their scores are too good"
    )
    assert known in caplog.text


def test_command_refuses_other_contrasts_unless_asked(cohort, tmp_path, caplog):
    small_model().save_pretrained(tmp_path / "model")
    processor = Sam2UNetImageProcessor(size={"height": 64, "width": 64}, modalities=["flair"])
    processor.save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), str(find_cases(cohort)[0].folder), "-o", str(tmp_path / "out")]
    main([*arguments, "--modalities", "flair"])
    assert "The model was trained on" not in caplog.text
    with pytest.raises(SystemExit, match=r"trained on flair, and is to segment t1\. Leave out --modalities"):
        main([*arguments, "--modalities", "t1"])
    main([*arguments, "--modalities", "t1", "--allow_other_modalities"])
    assert "--allow_other_modalities goes on all the same" in caplog.text


def test_the_plane_of_the_training_is_the_default(cohort, segment, tmp_path):
    case = find_cases(cohort)[0]
    segment.processor.save_pretrained(tmp_path)
    segment.model.save_pretrained(tmp_path)
    axial, coronal = (segment(case, planes=[plane], progress=False).label_map for plane in ("axial", "coronal"))
    assert not np.array_equal(axial, coronal)
    assert np.array_equal(segment(case, progress=False).label_map, axial)
    processor = Sam2UNetImageProcessor.from_pretrained(tmp_path)
    processor.plane = "coronal"
    processor.save_pretrained(tmp_path)
    trained = Sam2UNetVolumePipeline.from_pretrained(tmp_path, THREE, device="cpu")
    assert np.array_equal(trained(case, progress=False).label_map, coronal)


def test_model_and_processor_come_from_the_same_place(segment, tmp_path):
    segment.processor.save_pretrained(tmp_path / "sub")
    segment.model.save_pretrained(tmp_path / "sub")
    Sam2UNetImageProcessor(size={"height": 96, "width": 96}).save_pretrained(tmp_path)
    options = {"modalities": THREE, "device": "cpu", "subfolder": "sub"}
    found = Sam2UNetVolumePipeline.from_pretrained(tmp_path, **options, torch_dtype=torch.bfloat16)
    assert found.processor.size == segment.processor.size
    assert found.model.dtype == torch.bfloat16
    assert Sam2UNetVolumePipeline.from_pretrained(tmp_path, **options).model.dtype == torch.float32


@pytest.mark.parametrize(("options", "expected"), [([], "bfloat16"), (["--dtype", "float16"], "float16")])
def test_command_takes_bfloat16_where_the_device_has_it(monkeypatch, cohort, tmp_path, options, expected):
    class Loaded(Exception):  # noqa: N818 - ends the command once the model would be there
        pass

    def load(*args, dtype):
        raise Loaded(str(dtype))

    monkeypatch.setattr(Sam2UNetVolumePipeline, "from_pretrained", load)
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: device == "cpu")
    command = ["model", str(cohort), "-o", str(tmp_path / "out"), *options, "--device"]
    with pytest.raises(Loaded, match=f"torch.{expected}"):
        main([*command, "cpu"])
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: False)
    with pytest.raises(Loaded, match="torch.float32" if not options else expected):
        main([*command, "cpu"])


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({"amx_bf16": False, "avx512_bf16": True}, True),
        ({"amx_bf16": False, "avx512_bf16": False, "avx512_f": True}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_processors_that_multiply_in_bfloat16_are_known(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert devices.has_bfloat16("cpu") is expected


def test_command_spares_the_masks_of_the_case(cohort, segment, tmp_path, capsys):
    case = find_cases(cohort)[0]
    before = case.files["seg"].read_bytes()
    with pytest.raises(SystemExit, match=f"holds the scans of {case.case_id}: .* Name another folder"):
        main(["nowhere", str(cohort), "-o", str(case.folder / ".." / case.folder.name)])
    assert case.files["seg"].read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="file"):
        main(["nowhere", str(cohort), "-o", str(tmp_path / "file")])
    for option, value in (("--threshold", "1.5"), ("--batch_size", "0")):
        with pytest.raises(SystemExit):
            main(["nowhere", str(cohort), "-o", str(tmp_path / "out"), option, value])
        assert f"{option} must be" in capsys.readouterr().err


def test_command_writes_into_its_folder_whatever_a_checkpoint_names_its_regions(cohort, tmp_path, capsys):
    regions = {"../../../WT": [1, 2, 3], "/ET": [3]}
    small_model(regions=regions).save_pretrained(tmp_path / "model")
    processor = Sam2UNetImageProcessor(regions=regions, size={"height": 64, "width": 64}, modalities=["flair"])
    processor.save_pretrained(tmp_path / "model")
    folder = find_cases(cohort)[0].folder
    out = tmp_path / "a" / "b" / "out"
    main([str(tmp_path / "model"), str(folder), "-o", str(out), "--probabilities", "--lesions", "--device", "cpu"])
    endings = ("_.._.._.._WT_probability.nii.gz", "__ET_probability.nii.gz", "_seg.nii.gz", "_lesions.csv")
    assert {path.name for path in out.iterdir()} == {f"{folder.name}{ending}" for ending in endings}
    table = (out / f"{folder.name}_lesions.csv").read_text().splitlines()
    assert table[0].startswith("region,lesion,inside,volume_ml,diameter_mm,perpendicular_mm")
    assert any(line.startswith("../../../WT,1,,") for line in table)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "model"]
    with pytest.raises(SystemExit, match=f"{folder.name} was named before, and would be written to the same file"):
        main([str(tmp_path / "model"), str(folder), str(folder), "-o", str(out)])


def test_wrong_use_says_what_to_do(cohort, segment, tmp_path):
    case = find_cases(cohort)[0]
    with pytest.raises(ValueError, match="holds 2 cases"):
        segment(cohort)
    with pytest.raises(ValueError, match=r"got the one file .*flair"):
        segment(case.path("flair"))
    with pytest.raises(ValueError, match=r"each of \['flair', 't1ce', 't2'\], \['t2'\] missing"):
        segment({name: case.path(name) for name in THREE[:2]})
    with pytest.raises(ValueError, match=r"at most once, got \['axial', 'oblique'\]"):
        segment(case, planes=["axial", "oblique"])
    with pytest.raises(ValueError, match=r"`threshold` must be a probability in \[0, 1\], got 1.5"):
        segment(case, threshold=1.5)
    with pytest.raises(ValueError, match="`enhancing_label` must be 3 where regions have a label 4 of their own"):
        check_enhancing_label(4, {"c3": [3], "c4": [4]})
    with pytest.raises(ValueError, match="does not say which modalities"):
        Sam2UNetVolumePipeline(segment.model, segment.processor)
    with pytest.raises(ValueError, match=r"`modalities` must name one or more of .*, got \['flair', 'flair'\]"):
        Sam2UNetVolumePipeline(segment.model, segment.processor, ["flair", "flair"])
    other = nib.Nifti1Image(np.ones((40, 40, 25), np.int16), nib.load(case.path("t2")).affine)
    nib.save(other, tmp_path / "t2.nii.gz")
    with pytest.raises(ScanError, match="Resample one onto the other"):
        segment({name: case.path(name) for name in THREE[:2]} | {"t2": tmp_path / "t2.nii.gz"})


def test_a_write_that_fails_leaves_the_file_that_was_there(cohort, segment, tmp_path, monkeypatch):
    found = segment(find_cases(cohort)[0], progress=False)
    path = tmp_path / "seg.nii.gz"
    path.write_bytes(b"older")

    def fail(target, data):
        with open(target, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space left"):
        write_nifti(path, found.label_map, found.scan.affine, found.scan.header)
    assert [path.name for path in tmp_path.iterdir()] == ["seg.nii.gz"]
    assert path.read_bytes() == b"older"


def test_a_case_of_another_copy_of_the_code_is_a_case(cohort, segment):
    case = find_cases(cohort)[0]
    other = SimpleNamespace(read_images=case.read_images)
    assert np.array_equal(segment(other, progress=False).label_map, segment(case, progress=False).label_map)


# The arguments are the checkpoint, a folder of a case and where to write.
FROM_CHECKPOINT = """
import sys

sys.modules["sam2unet_hf"] = sys.modules["isal"] = None  # an import fails, installed or not

import numpy as np
from transformers import pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module

checkpoint, folder, output = sys.argv[1:]
pipeline_class = get_class_from_dynamic_module("volume_sam2unet.Sam2UNetVolumePipeline", checkpoint)
segment = pipeline_class.from_pretrained(checkpoint, device="cpu")
name = folder.rsplit("/", 1)[1]
paths = {modality: f"{folder}/{name}_{modality}.nii.gz" for modality in segment.modalities}
found = [segment(case, progress=False) for case in (folder, paths)]
pipe = pipeline("volume-segmentation", checkpoint, trust_remote_code=True, device="cpu")
found += pipe([folder], progress=False)
found.append(pipe(paths, progress=False))
found[2].save(f"{output}/seg.nii.gz", enhancing_label=4)
np.savez(f"{output}/found.npz", *(one.label_map for one in found))
try:
    segment(paths["flair"])
except ValueError as error:
    print(error)
"""


def test_a_checkpoint_with_the_code_beside_it_segments_without_the_package(cohort, segment, tmp_path):
    case = find_cases(cohort)[0]
    processor = Sam2UNetImageProcessor(regions=REGIONS, size={"height": 64, "width": 64}, modalities=THREE)
    for part in (segment.model, processor):
        part.save_pretrained(tmp_path / "model")
    CleanUp({"WT": RegionRule(threshold=0.52)}).save(tmp_path / "model")
    done = forks.run(
        ["-c", FROM_CHECKPOINT, tmp_path / "model", case.folder, tmp_path],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "The model segments flair, t1ce, t2 together, got the one file" in done.stdout
    with_rules = Sam2UNetVolumePipeline.from_pretrained(tmp_path / "model", device="cpu")
    expected, found = with_rules(case, progress=False).label_map, np.load(tmp_path / "found.npz")
    assert not np.array_equal(expected, segment(case, progress=False).label_map)
    assert len(found.files) == 4
    for name in found.files:
        assert np.array_equal(found[name], expected), name
    written = np.asarray(nib.load(tmp_path / "seg.nii.gz").dataobj)
    assert np.array_equal(written, np.where(expected == 3, 4, expected))


def test_the_module_runs_as_a_command_elsewhere(tmp_path):
    (tmp_path / "scan.nii").touch()
    done = forks.run(
        ["-m", "sam2unet_hf.volume", "nowhere", tmp_path / "scan.nii", "-o", "out"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(forks.ROOT), "HF_HUB_OFFLINE": "1", "PATH": ""},
    )
    assert done.returncode == 1
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
