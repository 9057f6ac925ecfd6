import gzip
import logging
import os
import re

import nibabel as nib
import numpy as np
import pytest
from nibabel import orientations

from sam2unet_hf import scans_sam2unet
from sam2unet_hf.cases import find_cases
from sam2unet_hf.scans_sam2unet import IntensityWindow, ScanError, intensity_window, read_volume, take_slice


SHAPE = (8, 9, 5)
# Three ways to store one box: voxels of 1.5 x 2 x 3 mm, x from -5.25 to 5.25, y from -8 to 8, z from -6 to 6.
LPS = np.array([[-1.5, 0, 0, 5.25], [0, -2, 0, 8], [0, 0, 3, -6], [0, 0, 0, 1]])
RAS = np.array([[1.5, 0, 0, -5.25], [0, 2, 0, -8], [0, 0, 3, -6], [0, 0, 0, 1]])
SAL = np.array([[0, 0, -1.5, 5.25], [0, 2, 0, -8], [3, 0, 0, -6], [0, 0, 0, 1]])
OLD_NAMES = {name: f"_{name}" for name in ("t1", "t1ce", "t2", "flair", "seg")}
NEW_NAMES = {"t1": "-t1n", "t1ce": "-t1c", "t2": "-t2w", "flair": "-t2f", "seg": "-seg"}


def save(path, voxels, affine=LPS, image_class=nib.Nifti1Image):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image_class(voxels, affine), path)
    return path


def make_scan(seed=0):
    voxels = np.random.default_rng(seed).integers(100, 900, SHAPE).astype(np.int16)
    voxels[[0, -1]] = 0
    return voxels


def make_mask(values=(1, 2, 4)):
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[3:6, 4, 2] = values
    return voxels


def make_case(root, case_id="BraTS20_Training_001", names=OLD_NAMES, extension=".nii.gz"):
    folder = root / case_id
    for name, ending in names.items():
        voxels = make_mask((1, 2, 4 if names is OLD_NAMES else 3)) if name == "seg" else make_scan()
        save(folder / f"{case_id}{ending}{extension}", voxels)
    return folder


def make_decathlon_case(root, case_id="BRATS_001", affine=LPS, images="imagesTr"):
    """Write a case of Task01_BrainTumour, four scans with seeds 0 to 3, and return the files."""
    scans = np.stack([make_scan(seed) for seed in range(4)], axis=-1)  # FLAIR, T1w, t1gd, T2w
    to_file = orientations.ornt_transform(orientations.io_orientation(LPS), orientations.io_orientation(affine))
    scan_path, mask_path = root / images / f"{case_id}.nii.gz", root / "labelsTr" / f"{case_id}.nii.gz"
    save(scan_path, orientations.apply_orientation(scans, to_file), affine)
    if images == "imagesTr":
        save(mask_path, orientations.apply_orientation(make_mask((2, 1, 3)), to_file), affine)
    return scan_path, mask_path


@pytest.fixture
def decathlon(tmp_path):
    """Two cases with masks and one without, among the hidden files that macOS leaves."""
    root = tmp_path / "Task01_BrainTumour"
    for case_id in ("BRATS_002", "BRATS_001"):
        make_decathlon_case(root, case_id)
    make_decathlon_case(root, "BRATS_485", images="imagesTs")
    (root / "dataset.json").write_text("{}")
    for path in list(root.rglob("*")):
        (path.parent / f"._{path.name}").write_bytes(b"left by macOS")
    return root


@pytest.fixture
def folder(tmp_path):
    return make_case(tmp_path)


@pytest.fixture
def case_files(folder):
    return {name: folder / f"BraTS20_Training_001_{name}.nii.gz" for name in OLD_NAMES}


# Finding cases


@pytest.mark.parametrize(
    ("parents", "case_id", "names", "extension"),
    [
        ("BraTS2020_TrainingData/MICCAI_BraTS2020_TrainingData", "BraTS20_Training_001", OLD_NAMES, ".nii"),
        ("HGG", "Brats18_CBICA_AAB_1", OLD_NAMES, ".nii.gz"),
        ("", "BraTS2021_00000", OLD_NAMES, ".nii.gz"),
        ("", "BraTS-GLI-00000-000", NEW_NAMES, ".nii.gz"),
        ("", "Phantom_001", OLD_NAMES, ".nii.gz"),
    ],
)
def test_find_cases_every_layout_finds_all_files(tmp_path, parents, case_id, names, extension):
    folder = make_case(tmp_path / parents, case_id, names, extension)
    (case,) = find_cases(tmp_path)
    assert case.case_id == case_id
    assert case.files == {name: folder / f"{case_id}{ending}{extension}" for name, ending in names.items()}
    assert np.unique(case.read_mask().voxels).tolist() == [0, 1, 2, 3]


def test_find_cases_root_is_a_case_folder_finds_it(folder):
    assert [case.case_id for case in find_cases(folder)] == ["BraTS20_Training_001"]


def test_find_cases_many_cases_sorted_by_id(tmp_path):
    for case_id in ("B_2", "A_1", "C_3"):
        make_case(tmp_path, case_id)
    assert [case.case_id for case in find_cases(str(tmp_path))] == ["A_1", "B_2", "C_3"]


def test_find_cases_other_files_are_not_mistaken(folder):
    expected = find_cases(folder)[0].files
    decoys = ["{}_seg_pred", "{}_pred_seg", "{}_flair_brain_mask", "._{}_flair", "{}_flair_seg", "seg", "{}-seg-old"]
    for decoy in decoys:
        save(folder / f"{decoy.format(folder.name)}.nii.gz", make_mask())
    (case,) = find_cases(folder)
    assert case.files == expected


def test_find_cases_predictions_in_a_folder_of_their_own_are_no_case(tmp_path, folder):
    save(tmp_path / "predictions" / "BraTS20_Training_001_seg.nii.gz", make_mask())
    assert len(find_cases(tmp_path)) == 1


def test_find_cases_misnamed_mask_of_case_355_found(tmp_path):
    folder = make_case(tmp_path, "BraTS20_Training_355", extension=".nii")
    (folder / "BraTS20_Training_355_seg.nii").rename(folder / "W39_1998.09.19_Segm.nii")
    (case,) = find_cases(tmp_path)
    assert case.files["seg"].name == "W39_1998.09.19_Segm.nii"
    assert np.unique(case.read_mask().voxels).tolist() == [0, 1, 2, 3]


def test_find_cases_plain_and_gzipped_takes_plain_and_warns(folder, caplog):
    plain = save(folder / "BraTS20_Training_001_flair.nii", make_scan())
    with caplog.at_level(logging.WARNING):
        (case,) = find_cases(folder)
    assert case.files["flair"] == plain
    assert "BraTS20_Training_001_flair.nii` is there plain and gzipped" in caplog.text


def test_find_cases_renamed_folder_takes_the_prefix_of_the_scans(folder):
    save(folder / "BraTS20_Training_001_pred_seg.nii.gz", make_mask())
    (folder / "._BraTS20_Training_001_flair.nii.gz").write_bytes(b"left by macOS")
    renamed = folder.rename(folder.with_name("patient one"))
    (case,) = find_cases(renamed)
    assert (case.case_id, case.folder, len(case.files)) == ("BraTS20_Training_001", renamed, 5)


def test_find_cases_scans_of_two_cases_in_one_folder_is_an_error(tmp_path):
    save(tmp_path / "A_1_flair.nii", make_scan())
    save(tmp_path / "B_2_flair.nii", make_scan())
    (case,) = find_cases(tmp_path)
    with pytest.raises(ScanError, match=r"holds scans of A_1, B_2\. Give each case a folder of its own"):
        case.read_image("flair")


def test_find_cases_same_case_twice_is_an_error(tmp_path):
    make_case(tmp_path / "HGG")
    make_case(tmp_path / "copy")
    for case in find_cases(tmp_path):
        with pytest.raises(ScanError, match=r"case BraTS20_Training_001: found in 2 folders.*Keep one of them"):
            case.read_mask()


def test_find_cases_two_naming_styles_in_one_case_is_an_error(folder):
    save(folder / "BraTS20_Training_001-seg.nii.gz", make_mask())
    with pytest.raises(ScanError, match="_seg.nii.gz.* are both seg files. Keep one of them"):
        find_cases(folder)[0].read_mask()


def test_find_cases_follows_links_once(tmp_path, folder):
    os.symlink(folder, tmp_path / "link", target_is_directory=True)
    os.symlink(tmp_path, folder / "loop", target_is_directory=True)
    assert len(find_cases(tmp_path)) == 1


def test_grade_from_folder_name_or_table_or_none(tmp_path):
    make_case(tmp_path / "HGG", "A_1")
    make_case(tmp_path / "LGG", "B_1")
    make_case(tmp_path / "MICCAI", "BraTS20_Training_001")
    make_case(tmp_path / "MICCAI", "BraTS20_Training_002")
    table = "Grade,BraTS_2019_subject_ID,BraTS_2020_subject_ID\nLGG,NA,BraTS20_Training_001\n"
    (tmp_path / "MICCAI" / "name_mapping.csv").write_text(table)
    grades = {case.case_id: case.grade for case in find_cases(tmp_path)}
    assert grades == {"A_1": "HGG", "B_1": "LGG", "BraTS20_Training_001": "LGG", "BraTS20_Training_002": None}
    assert find_cases(tmp_path / "HGG")[0].grade == "HGG"


@pytest.mark.parametrize(
    ("case_id", "patient_id"),
    [
        ("BraTS-GLI-00000-001", "BraTS-GLI-00000"),
        ("BraTS-MET-00123-000", "BraTS-MET-00123"),
        ("BraTS20_Training_001", "BraTS20_Training_001"),
        ("Brats18_CBICA_AAB_1", "Brats18_CBICA_AAB_1"),
    ],
)
def test_patient_id_drops_the_timepoint(tmp_path, case_id, patient_id):
    make_case(tmp_path, case_id)
    assert find_cases(tmp_path)[0].patient_id == patient_id


def test_find_cases_decathlon_finds_the_cases_with_masks(decathlon):
    for root in (decathlon, decathlon.parent, decathlon / "imagesTr"):
        cases = find_cases(root)
        assert [case.case_id for case in cases] == ["BRATS_001", "BRATS_002"]
    for case in cases:
        names = ("imagesTr", "imagesTr", "imagesTr", "imagesTr", "labelsTr")
        paths = [decathlon / name / f"{case.case_id}.nii.gz" for name in names]
        assert case.files == dict(zip(("flair", "t1", "t1ce", "t2", "seg"), paths, strict=True))
        assert (case.patient_id, case.grade, case.problem, case.decathlon) == (case.case_id, None, None, True)


@pytest.mark.parametrize("path", ["imagesTs", "imagesTs/BRATS_485.nii.gz"])
def test_find_cases_decathlon_without_masks_only_if_named(decathlon, path):
    (case,) = find_cases(decathlon / path)
    assert case.case_id == "BRATS_485"
    np.testing.assert_array_equal(case.read_image("t1").voxels, make_scan(1))
    with pytest.raises(ScanError, match=r"BRATS_485: no mask in `.*labelsTs`.*test cases come without masks"):
        case.read_mask()


def test_find_cases_decathlon_file_is_the_case(decathlon, tmp_path):
    (case,) = find_cases(decathlon / "imagesTr" / "BRATS_002.nii.gz")
    assert case == find_cases(decathlon)[1]
    (alone,) = find_cases(case.files["t2"].rename(tmp_path / "BRATS_002.nii.gz"))
    assert set(alone.files) == {"t1", "t1ce", "t2", "flair"}
    np.testing.assert_array_equal(alone.read_image("t2").voxels, make_scan(3))


def test_find_cases_decathlon_plain_and_gzipped_takes_plain_and_warns(decathlon, caplog):
    plain = decathlon / "imagesTr" / "BRATS_001.nii"
    plain.write_bytes(gzip.decompress((decathlon / "imagesTr" / "BRATS_001.nii.gz").read_bytes()))
    with caplog.at_level(logging.WARNING):
        case = find_cases(decathlon)[0]
    assert (case.files["flair"], case.files["seg"].name) == (plain, "BRATS_001.nii.gz")
    assert "BRATS_001.nii` is there plain and gzipped" in caplog.text


def test_find_cases_decathlon_beside_brats(tmp_path, folder, decathlon):
    assert [case.case_id for case in find_cases(tmp_path)] == ["BRATS_001", "BRATS_002", "BraTS20_Training_001"]


def test_find_cases_decathlon_twice_is_an_error(tmp_path):
    for copy in ("a", "b"):
        make_decathlon_case(tmp_path / copy)
    with pytest.raises(ScanError, match="case BRATS_001: found in 2 folders.*Keep one of them"):
        find_cases(tmp_path)[0].read_image("flair")


def test_find_cases_no_such_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="No folder `.*nowhere`. Give the folder that holds the BraTS cases"):
        find_cases(tmp_path / "nowhere")


def test_find_cases_empty_folder_lists_layout_and_where_to_register(tmp_path):
    save(tmp_path / "imagesTr" / "hippocampus_001.nii.gz", make_scan())
    with pytest.raises(FileNotFoundError) as info:
        find_cases(tmp_path)
    assert info.match(r"No BraTS case in .* \(1 other NIfTI files there\)")
    assert info.match(r"BraTS20_Training_001/BraTS20_Training_001_\{t1,t1ce,t2,flair,seg\}\.nii\[\.gz\]")
    assert info.match(
        r"imagesTr/BRATS_001\.nii\[\.gz\] and labelsTr/BRATS_001\.nii\[\.gz\]; imagesTs, which has no masks"
    )
    assert info.match("https://www.synapse.org/brats")
    assert info.match("https://www.med.upenn.edu/cbica/brats2020/")
    assert info.match("http://medicaldecathlon.com")


# Reading


@pytest.mark.parametrize(
    ("affine", "shape", "marker"),
    [(LPS, (8, 9, 5), (6, 1, 3)), (RAS, (8, 9, 5), (1, 7, 3)), (SAL, (5, 9, 8), (3, 7, 6))],
    ids=["LPS", "RAS", "SAL"],
)
def test_read_volume_marker_lands_where_it_lies_in_the_head(tmp_path, affine, shape, marker):
    # A voxel at the left, front and top of the head: x = -3.75, y = 6, z = 3 mm.
    assert (affine @ [*marker, 1]).tolist() == [-3.75, 6, 3, 1]
    voxels = np.zeros(shape, np.int16)
    voxels[marker] = 7
    volume = read_volume(save(tmp_path / "x.nii.gz", voxels, affine))
    assert np.argwhere(volume.voxels == 7).tolist() == [[6, 1, 3]]
    assert volume.spacing_mm == (1.5, 2, 3)
    np.testing.assert_allclose(volume.affine, affine)
    np.testing.assert_allclose(volume.lps_affine, LPS)
    np.testing.assert_array_equal(volume.to_file_grid(volume.voxels), voxels)

    axial, coronal, sagittal = (
        take_slice(volume.voxels, plane, index) for plane, index in (("axial", 3), ("coronal", 1), ("sagittal", 6))
    )
    assert (axial.shape, coronal.shape, sagittal.shape) == ((9, 8), (5, 8), (5, 9))
    assert np.argwhere(axial == 7).tolist() == [[1, 6]]  # near the top is the front, near the right is the left
    assert np.argwhere(coronal == 7).tolist() == [[1, 6]]
    assert np.argwhere(sagittal == 7).tolist() == [[1, 1]]  # near the left is the front


def test_take_slice_literal_volume_in_every_plane():
    voxels = np.arange(8).reshape(2, 2, 2)  # (left, posterior, superior)
    assert take_slice(voxels, "axial", 0).tolist() == [[0, 4], [2, 6]]
    assert take_slice(voxels, "coronal", 0).tolist() == [[1, 5], [0, 4]]
    assert take_slice(voxels, "sagittal", 0).tolist() == [[1, 3], [0, 2]]
    with pytest.raises(ValueError, match="`plane` must be one of sagittal, coronal, axial, got 'oblique'"):
        take_slice(voxels, "oblique", 0)


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("kind", ["u1", "i1", "i2", "u2", "i4", "i8", "f4", "f8"])
def test_read_volume_every_type_and_byte_order_equals_nibabel(tmp_path, kind, byte_order):
    voxels = (make_scan() % 100).astype(kind)
    image = nib.Nifti1Image(voxels, LPS, nib.Nifti1Header(endianness=byte_order), dtype=voxels.dtype)
    nib.save(image, tmp_path / "x.nii.gz")
    volume = read_volume(tmp_path / "x.nii.gz")
    assert volume.voxels.dtype == np.dtype(kind)
    np.testing.assert_array_equal(volume.voxels, voxels)


def test_read_volume_scaled_values_follow_the_header(tmp_path):
    image = nib.Nifti1Image(make_scan(), LPS)
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / "x.nii")
    volume = read_volume(tmp_path / "x.nii")
    assert volume.voxels.dtype == np.float32
    np.testing.assert_array_equal(volume.voxels, make_scan() * 0.5 - 3)


def test_read_volume_nifti2_trailing_axis_and_gzip_under_a_plain_name(tmp_path):
    path = save(tmp_path / "x.nii.gz", make_scan()[..., None], image_class=nib.Nifti2Image)
    np.testing.assert_array_equal(read_volume(path).voxels, make_scan())
    np.testing.assert_array_equal(read_volume(path.rename(tmp_path / "x.nii")).voxels, make_scan())


def test_read_volume_takes_no_copy(tmp_path):
    assert not read_volume(save(tmp_path / "x.nii", make_scan(), RAS)).voxels.flags.owndata


@pytest.mark.parametrize("affine", [LPS, RAS, SAL], ids=["LPS", "RAS", "SAL"])
def test_decathlon_modalities_and_mask_voxel_exact_in_any_orientation(tmp_path, affine):
    make_decathlon_case(tmp_path, affine=affine)
    (case,) = find_cases(tmp_path)
    mask = case.read_mask()
    assert mask.voxels.dtype == np.uint8
    np.testing.assert_array_equal(mask.voxels, make_mask((1, 2, 3)))  # 1 and 2 are swapped in the file
    for modality, seed in {"flair": 0, "t1": 1, "t1ce": 2, "t2": 3}.items():
        volume = case.read_image(modality, same_grid_as=mask)
        np.testing.assert_array_equal(volume.voxels, make_scan(seed))
        assert volume.voxels.dtype == np.int16
        assert volume.spacing_mm == (1.5, 2, 3)
        np.testing.assert_allclose(volume.affine, affine)
        np.testing.assert_allclose(volume.lps_affine, LPS)
        on_file = nib.load(case.files[modality]).get_fdata()[..., seed]
        np.testing.assert_array_equal(volume.to_file_grid(volume.voxels), on_file)


@pytest.mark.parametrize("layout", ["brats", "decathlon"])
def test_read_images_equals_reading_one_by_one(request, layout):
    root = request.getfixturevalue("folder" if layout == "brats" else "decathlon")
    case = find_cases(root)[0]
    modalities = ["t2", "flair", "t1ce"]
    volumes = case.read_images(modalities, same_grid_as=case.read_mask())
    for modality, volume in zip(modalities, volumes, strict=True):
        one = case.read_image(modality)
        assert volume.name == one.name
        np.testing.assert_array_equal(volume.voxels, one.voxels)


def test_read_images_opens_a_decathlon_file_once_and_keeps_what_was_asked_for(decathlon, monkeypatch):
    opened = []
    open_file = scans_sam2unet._open
    monkeypatch.setattr(scans_sam2unet, "_open", lambda path, name: opened.append(path) or open_file(path, name))
    case = find_cases(decathlon)[0]
    for volume in case.read_images(["t1ce", "t2", "flair"]):
        memory = volume.voxels
        while memory.base is not None:
            memory = memory.base
        assert memory.nbytes == volume.voxels.nbytes
    assert opened == [case.files["flair"]]


def test_decathlon_big_endian_scaled_volumes_follow_the_header(decathlon):
    path = decathlon / "imagesTr" / "BRATS_001.nii.gz"
    scans = np.asarray(nib.load(path).dataobj)
    image = nib.Nifti1Image(scans, LPS, nib.Nifti1Header(endianness=">"))
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, path)
    np.testing.assert_array_equal(find_cases(decathlon)[0].read_image("t1ce").voxels, make_scan(2) * 0.5 - 3)


def test_read_volume_checks_the_sum_of_a_gzipped_file(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 900, (120, 120, 80)).astype(np.int16)
    data = bytearray(gzip.compress(nib.Nifti1Image(voxels, LPS).to_bytes(), 1))
    data[-8] ^= 1
    (tmp_path / "x.nii.gz").write_bytes(data)
    with pytest.raises(ScanError, match=r"x\.nii\.gz` is damaged \(CRC check failed.*Copy or download it again"):
        read_volume(tmp_path / "x.nii.gz")


def test_read_volume_many_gzip_members_and_padding(tmp_path):
    data = nib.Nifti1Image(make_scan(), LPS).to_bytes() + bytes(4096)
    members = b"".join(gzip.compress(data[at : at + 7]) for at in range(0, len(data), 7))
    (tmp_path / "x.nii.gz").write_bytes(members + gzip.compress(b"") * 1000)
    np.testing.assert_array_equal(read_volume(tmp_path / "x.nii.gz").voxels, make_scan())


@pytest.mark.parametrize(("slope", "intercept"), [(1e-3, 1e6), (1e-38, 0), (3e38, 3e37), (1e20, -1e25)])
def test_read_volume_unusual_scaling_keeps_small_differences(tmp_path, slope, intercept):
    image = nib.Nifti1Image(make_scan(), LPS)
    image.header.set_slope_inter(slope, intercept)
    nib.save(image, tmp_path / "x.nii")
    volume, expected = read_volume(tmp_path / "x.nii"), nib.load(tmp_path / "x.nii").get_fdata()
    np.testing.assert_allclose(volume.voxels, expected, rtol=1e-12)
    assert len(np.unique(intensity_window(volume).apply(volume.voxels))) > 150


def test_read_volume_integers_beyond_double_precision_are_an_error(tmp_path):
    voxels = make_scan().astype(np.int64)
    voxels[2, 2, 2] = 2**53
    image = nib.Nifti1Image(voxels, LPS, dtype=np.int64)
    nib.save(image, tmp_path / "x.nii")
    assert read_volume(tmp_path / "x.nii").voxels.max() == 2**53
    voxels[2, 2, 2] = -(2**53) - 1
    nib.save(nib.Nifti1Image(voxels, LPS, dtype=np.int64), tmp_path / "x.nii")
    with pytest.raises(ScanError, match=r"x\.nii` holds integers beyond 2\*\*53, which no scan does"):
        read_volume(tmp_path / "x.nii")


def test_read_volume_extensions_are_passed_over(tmp_path):
    image = nib.Nifti1Image(make_scan(), LPS)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"patient" * 99))
    data = bytearray(image.to_bytes())
    for broken in (bytes(8), b"\xff" * 8):
        data[352:360] = broken
        (tmp_path / "x.nii").write_bytes(data)
        np.testing.assert_array_equal(read_volume(tmp_path / "x.nii").voxels, make_scan())


# Labels


def test_read_mask_old_labels_become_ours(folder):
    mask = find_cases(folder)[0].read_mask()
    assert mask.voxels.dtype == np.uint8
    assert mask.voxels[3:6, 4, 2].tolist() == [1, 2, 3]
    assert np.count_nonzero(mask.voxels) == 3


@pytest.mark.parametrize(
    ("names", "values", "message"),
    [
        (OLD_NAMES, (1, 2, 3), r"unknown labels \(3\).* may hold 0, 1, 2, 4"),
        (NEW_NAMES, (1, 2, 4), r"unknown labels \(4\).* may hold 0, 1, 2, 3.*resection cavity"),
        (OLD_NAMES, (1, 2, 0.5), r"unknown labels \(0\.5\)"),
        (OLD_NAMES, (-1, 2, 9), r"2 unknown labels \(-1, 9\)"),
        (OLD_NAMES, (256, 257, 260), r"3 unknown labels \(256, 257, 260\)"),
    ],
)
def test_read_mask_unknown_label_names_case_file_and_set(tmp_path, names, values, message):
    folder = make_case(tmp_path, "X_1", names)
    path = folder / f"X_1{names['seg']}.nii.gz"
    voxels = np.zeros(SHAPE, np.float32)
    voxels[3:6, 4, 2] = values
    save(path, voxels)
    with pytest.raises(ScanError, match=rf"case X_1: `.*X_1{names['seg']}\.nii\.gz` holds .*{message}"):
        find_cases(tmp_path)[0].read_mask()


@pytest.mark.parametrize(("value", "count"), [(4, 1), (-1, 1), (0.5, 1)])
def test_read_mask_decathlon_unknown_label_names_case_file_and_set(decathlon, value, count):
    path = decathlon / "labelsTr" / "BRATS_001.nii.gz"
    save(path, np.where(make_mask() == 1, value, 0).astype(np.float32))
    message = (
        rf"holds {count} unknown labels \({value}\)\. A mask of the Decathlon may hold 0, 1, 2, 3: 1 is ED, 2 NCR"
    )
    with pytest.raises(ScanError, match=rf"case BRATS_001: `.*labelsTr.BRATS_001\.nii\.gz` {message}"):
        find_cases(decathlon)[0].read_mask()


# Broken files. Each error names the case and the file.


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def test_missing_modality_and_mask_say_what_is_expected(folder, case_files):
    case_files["t1ce"].unlink()
    case_files["seg"].unlink()
    (case,) = find_cases(folder)
    with pytest.raises(ScanError, match=r"case BraTS20_Training_001: no t1ce scan in `.*`, expected .*_t1ce\.nii"):
        case.read_image("t1ce")
    with pytest.raises(ScanError, match=r"case BraTS20_Training_001: no mask in `.*test cases come without masks"):
        case.read_mask()


def write_truncated_gzip(path):
    truncate(path, path.stat().st_size // 2)


def write_corrupt_gzip(path):
    data = bytearray(gzip.compress(bytes(5000)))
    data[12] ^= 0xFF
    path.write_bytes(data)


def write_truncated_plain(path):
    path.write_bytes(nib.Nifti1Image(make_scan(), LPS).to_bytes()[:-1])


def write_text(path):
    path.write_text("not a scan")


def write_broken_header(path):
    data = bytearray(nib.Nifti1Image(make_scan(), LPS).to_bytes())
    data[70:72] = b"\x01\x7f"  # datatype
    path.write_bytes(data)


def write_time_series(path):
    save(path, np.zeros((*SHAPE, 2), np.int16))


def write_colours(path):
    save(path, np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]))


def write_nan(path):
    voxels = make_scan().astype(np.float32)
    voxels[1, 2, 3], voxels[2, 2, 2] = np.nan, np.inf
    save(path, voxels)


def write_flat_affine(path):
    image = nib.Nifti1Image(make_scan(), LPS)
    image.header["srow_x"], image.header["vox_offset"] = 0, 352
    path.write_bytes(image.header.binaryblock + bytes(4) + make_scan().tobytes())


def write_infinite_intercept(path):
    image = nib.Nifti1Image(make_scan(), LPS)
    image.header["scl_slope"], image.header["scl_inter"] = 1, np.inf
    path.write_bytes(image.header.binaryblock + bytes(4) + make_scan().tobytes())


def write_impossible_rotation(path):
    image = nib.Nifti1Image(make_scan(), LPS)
    image.header["sform_code"], image.header["qform_code"] = 0, 1
    image.header["quatern_b"], image.header["quatern_c"] = 2, 2
    path.write_bytes(image.header.binaryblock + bytes(4) + make_scan().tobytes())


def write_huge_claim(path):
    header = nib.Nifti1Header()
    header.set_data_shape((32767, 32767, 32767))
    header["vox_offset"] = 352
    path.write_bytes(header.binaryblock + bytes(100))


def header_bytes(**fields):
    image = nib.Nifti1Image(make_scan(), LPS)
    for field, value in {"vox_offset": 352, **fields}.items():
        image.header[field] = value
    return image.header.binaryblock + bytes(4)


def write_header(**fields):
    return lambda path: path.write_bytes(header_bytes(**fields) + make_scan().tobytes(order="F"))


def write_bomb(path):
    """A sound volume, and behind it 8 GB of zeros in 8 MB."""
    zeros = gzip.compress(bytes(2**27), 1, mtime=0)
    path.write_bytes(gzip.compress(nib.Nifti1Image(make_scan(), LPS).to_bytes()) + zeros * 64)


def write_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_bomb, "goes on for more than 4096 bytes behind the 720 bytes of voxels that its header promises. Down"),
        (write_pipe, r"cannot be read \(it is no regular file\). Check the path"),
        (lambda path: path.write_bytes(b""), "is not a NIfTI file"),
        (write_header(vox_offset=8), "has a broken NIfTI header .*offset 8.*Download it again"),
        (write_header(vox_offset=-352), "has a broken NIfTI header .*Download it again"),
        (write_header(vox_offset=np.nan), "has a broken NIfTI header .*NaN.*Download it again"),
        (write_header(vox_offset=1e15), "is too large: .* from byte 999999986991104 on, and 536870912 are allowed"),
        (write_header(magic=b"ni1"), "has a broken NIfTI header .*a pair of files, .hdr and .img"),
        (write_header(sizeof_hdr=7, vox_offset=4000), "is cut off: .* from byte 4000 on, the file has 1072 bytes"),
        (write_header(dim=[3, 8, 0, 5, 1, 1, 1, 1]), r"has the shape \(8, 0, 5\), expected one 3-D volume"),
        (write_header(dim=[3, 8, -9, 5, 1, 1, 1, 1]), r"has the shape \(8, -9, 5\), expected one 3-D volume"),
        (
            write_header(dim=[3, 512, 512, 513, 1, 1, 1, 1]),
            "is too large: .* 268959744 bytes of voxels .* at 4 or more",
        ),
        (write_header(dim=[3, -1, 1, 1, 1, 1, 1, 1]), "has a broken NIfTI header .*-1 in dim.*Download"),
        (
            write_header(sform_code=0, pixdim=[1, 0, 2, np.nan, 0, 0, 0, 0]),
            r"has a broken NIfTI header .voxels of 0\.0 x 2\.0 x nan mm",
        ),
        (write_header(srow_x=[np.nan, 0, 0, 0]), "has no usable affine: .*nan.* Repair its header"),
        (write_header(datatype=32, bitpix=64), "holds voxels of type complex64, expected integers or floats"),
        (write_header(datatype=1536, bitpix=128), "has a broken NIfTI header .data code 1536|holds voxels of type"),
        (write_truncated_gzip, "is cut off: its gzip stream ends early. Copy or download it again"),
        (write_corrupt_gzip, "is damaged .*Copy or download it again"),
        (
            write_truncated_plain,
            "is cut off: its header promises 720 bytes of voxels from byte 352 on, .*has 1071 bytes",
        ),
        (write_text, "is not a NIfTI file. Download it again, or convert it"),
        (write_broken_header, "has a broken NIfTI header .*Download it again"),
        (write_time_series, r"has the shape \(8, 9, 5, 2\), expected one 3-D volume. Split it"),
        (write_colours, "holds voxels of type .*, expected integers or floats"),
        (write_nan, "holds 2 voxels that are NaN or infinite. Repair it or download it again"),
        (write_flat_affine, "has no usable affine: .*Repair its header"),
        (write_infinite_intercept, "has a broken NIfTI header .*intercept.*Download it again"),
        (write_impossible_rotation, "has a broken NIfTI header .*Download it again"),
        (
            write_huge_claim,
            r"is too large: its header promises 140724603846652 bytes .* \(32767, 32767, 32767\) from byte 352 on, "
            "and 536870912 are allowed, at 4 or more per voxel. Download it again if that is not its size, else res",
        ),
        (lambda path: (path.unlink(), path.mkdir()), r"cannot be read \(Is a directory\). Check the path"),
    ],
)
def test_read_image_bad_file_names_case_file_and_remedy(folder, case_files, write, message):
    (case,) = find_cases(folder)
    write(case_files["flair"])
    with pytest.raises(ScanError, match=rf"case BraTS20_Training_001: `.*001_flair\.nii\.gz` {message}"):
        case.read_image("flair")


def test_read_image_other_shape_is_an_error(folder, case_files):
    save(case_files["flair"], make_scan()[:, :, :4])
    (case,) = find_cases(folder)
    with pytest.raises(ScanError, match=r"_flair.nii.gz` has the shape \(8, 9, 4\), .*_seg.nii.gz` \(8, 9, 5\).*Res"):
        case.read_image("flair", same_grid_as=case.read_mask())


def test_read_image_other_affine_is_an_error_beyond_the_tolerance(folder, case_files):
    (case,) = find_cases(folder)
    moved = LPS.copy()
    moved[0, 3] += 0.05
    save(case_files["flair"], make_scan(), moved)
    case.read_image("flair", same_grid_as=case.read_mask())
    moved[0, 3] += 2
    save(case_files["flair"], make_scan(), moved)
    with pytest.raises(ScanError, match=r"flair.nii.gz` and .*seg.nii.gz` have different affines: .* 2\.05 mm apart"):
        case.read_image("flair", same_grid_as=case.read_mask())


def test_read_mask_same_grid_in_another_orientation_is_accepted(folder, case_files):
    save(case_files["seg"], make_mask()[::-1, ::-1], RAS)
    (case,) = find_cases(folder)
    mask = case.read_mask(same_grid_as=case.read_image("flair"))
    assert mask.voxels[3:6, 4, 2].tolist() == [1, 2, 3]


def test_decathlon_missing_image_and_mask_say_what_is_expected(decathlon):
    (decathlon / "imagesTr" / "BRATS_001.nii.gz").unlink()
    (decathlon / "labelsTr" / "BRATS_002.nii.gz").unlink()
    no_image, no_mask = find_cases(decathlon)
    with pytest.raises(
        ScanError, match=r"case BRATS_001: no t2 scan in `.*imagesTr`, expected BRATS_001\.nii\[\.gz\]\. Download"
    ):
        no_image.read_image("t2")
    with pytest.raises(
        ScanError, match=r"case BRATS_002: no mask in `.*labelsTr`, expected BRATS_002\.nii\[\.gz\]\. Download"
    ):
        no_mask.read_mask()


@pytest.mark.parametrize(
    ("shape", "shown"),
    [((8, 9, 5), "(8, 9, 5)"), ((8, 9, 5, 3), "(8, 9, 5, 3)"), ((8, 9, 5, 4, 2), "(8, 9, 5, 4, 2)")],
)
def test_decathlon_other_than_four_volumes_is_an_error(decathlon, shape, shown):
    save(decathlon / "imagesTr" / "BRATS_001.nii.gz", np.ones(shape, np.int16))
    message = rf"has the shape {re.escape(shown)}, expected four 3-D volumes, flair, t1, t1ce, t2\. Download it again"
    with pytest.raises(ScanError, match=rf"case BRATS_001: `.*imagesTr.BRATS_001\.nii\.gz` {message}"):
        find_cases(decathlon)[0].read_image("flair")


def test_decathlon_nan_concerns_the_modality_that_holds_it(decathlon):
    path = decathlon / "imagesTr" / "BRATS_001.nii.gz"
    scans = nib.load(path).get_fdata(dtype=np.float32)
    scans[1, 2, 3, 2] = np.nan
    save(path, scans)
    case = find_cases(decathlon)[0]
    case.read_image("flair")
    with pytest.raises(
        ScanError, match=r"case BRATS_001: `.*BRATS_001\.nii\.gz` \(t1ce\) holds 1 voxels that are NaN"
    ):
        case.read_images(["flair", "t1ce"])


def test_decathlon_cut_off_behind_the_wanted_volume_is_an_error(decathlon):
    path = decathlon / "imagesTr" / "BRATS_001.nii.gz"
    path.write_bytes(gzip.decompress(path.read_bytes())[:-1])
    with pytest.raises(ScanError, match=r"BRATS_001\.nii\.gz` is cut off: its header promises 2880 bytes"):
        find_cases(decathlon)[0].read_image("flair")


def test_decathlon_mask_on_another_grid_is_an_error(decathlon):
    save(decathlon / "labelsTr" / "BRATS_001.nii.gz", make_mask((1, 2, 3)), RAS)
    case = find_cases(decathlon)[0]
    case.read_image("flair", same_grid_as=case.read_mask())  # the same box, stored the other way round
    save(decathlon / "labelsTr" / "BRATS_001.nii.gz", make_mask((1, 2, 3))[:, :, :4])
    with pytest.raises(ScanError, match=r"\(flair\) has the shape \(8, 9, 5\), .*labelsTr.* \(8, 9, 4\)"):
        case.read_images(["flair"], same_grid_as=case.read_mask())


def test_read_images_without_a_mask_share_the_grid_of_the_first(folder, case_files):
    save(case_files["t2"], make_scan()[:, :, :4])
    with pytest.raises(ScanError, match=r"_t2.nii.gz` has the shape \(8, 9, 4\), .*_flair.nii.gz` \(8, 9, 5\)"):
        find_cases(folder)[0].read_images(["flair", "t2"])


# Intensities


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("size", [5, 1000])
def test_intensity_window_percentiles_equal_numpy(tmp_path, dtype, size):
    values = np.random.default_rng(size).normal(60, 20, size).clip(1, 127).astype(dtype)
    if np.dtype(dtype).itemsize == 2:
        values[:3] = (1, 2, 32767)
    if dtype == np.int16:
        values[3:5] = (-32768, -5)
    voxels = np.zeros((12, 12, 12), dtype)
    voxels[1:11, 1:11, 1:11].flat[:size] = values
    volume = read_volume(save(tmp_path / "x.nii", voxels, RAS))
    window = intensity_window(volume)
    expected = np.percentile(voxels[voxels != 0].astype(np.float64), [0.5, 99.5])
    np.testing.assert_allclose((window.low, window.high), expected, rtol=1e-6)
    assert window.background == 0


def test_intensity_window_z_scored_volume_has_its_constant_as_background(tmp_path):
    voxels = np.full(SHAPE, -0.75, np.float32)
    voxels[1:-1, 1:-1, 1:-1] = np.linspace(-0.5, 2, 6 * 7 * 3).reshape(6, 7, 3)
    volume = read_volume(save(tmp_path / "x.nii", voxels))
    window = intensity_window(volume)
    assert window.background == -0.75
    assert window.low > -0.5
    grey = window.apply(volume.voxels)
    assert (grey[0] == 0).all()
    assert grey.max() == 255


def test_intensity_window_z_scored_brain_keeps_zero_as_background(tmp_path):
    voxels = np.zeros(SHAPE, np.float32)
    voxels[1:-1, 1:-1, 1:-1] = np.linspace(-2, 2, 6 * 7 * 3).reshape(6, 7, 3)
    volume = read_volume(save(tmp_path / "x.nii", voxels))
    grey = intensity_window(volume).apply(volume.voxels)
    assert grey[0, 0, 0] == 0
    assert grey[-2, -2, -2] == 255
    assert 100 < grey[4, 3, 2] < 150


def test_intensity_window_corner_in_the_brain_takes_zero(tmp_path):
    voxels = make_scan() - 500
    voxels[0], voxels[0, 0, 0] = 0, 3
    assert intensity_window(read_volume(save(tmp_path / "x.nii", voxels))).background == 0


def test_intensity_window_apply_literal_values():
    window = IntensityWindow(low=10, high=20, background=0)
    values = np.array([[0, 5, 10, 12], [15, 20, 32767, -9]], np.int16)
    assert window.apply(values).tolist() == [[0, 0, 0, 51], [128, 255, 255, 0]]
    flat = IntensityWindow(low=7, high=7, background=0)
    assert flat.apply(np.array([0, 7])).tolist() == [0, 255]


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 5), (8, 1, 5), (8, 9, 1)])
def test_volumes_one_voxel_thick(tmp_path, shape):
    voxels = np.random.default_rng(0).integers(1, 900, shape).astype(np.int16)
    volume = read_volume(save(tmp_path / "x.nii.gz", voxels))
    np.testing.assert_array_equal(volume.voxels, voxels)
    if shape == (1, 1, 1):
        with pytest.raises(ScanError, match=r"x\.nii\.gz` is empty: all voxels are \d+, there is nothing to scale"):
            intensity_window(volume)
    else:
        assert intensity_window(volume).apply(voxels).max() == 255


def test_one_foreground_voxel_becomes_255(tmp_path):
    voxels = np.zeros(SHAPE, np.float32)
    voxels[3, 3, 3] = 1e-40
    volume = read_volume(save(tmp_path / "x.nii", voxels))
    grey = intensity_window(volume).apply(volume.voxels)
    assert grey[3, 3, 3] == 255
    assert np.count_nonzero(grey) == 1


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        (np.float32, -3e38, 3e38),
        (np.float32, 0, 1e-42),
        (np.float32, -2e-40, 1e-39),
        (np.float64, -1.7e308, 1.7e308),
        (np.float64, 1e-320, 1e-318),
        (np.int32, -(2**31), 2**31 - 1),
        (np.int64, -(2**53), 2**53),
        (np.uint32, 1, 2**32 - 1),
        (np.uint16, 1, 65535),
        (np.int16, -32768, 32767),
    ],
)
@pytest.mark.filterwarnings("error")
def test_extremes_of_every_type_become_the_right_grey(tmp_path, dtype, low, high):
    voxels = np.zeros((12, 12, 12), dtype)
    steps = np.linspace(0, 1, 1000, dtype=np.longdouble)
    voxels[1:-1, 1:-1, 1:-1] = (low * (1 - steps) + high * steps).astype(dtype).reshape(10, 10, 10)
    nib.save(nib.Nifti1Image(voxels, LPS, dtype=dtype), tmp_path / "x.nii")
    volume = read_volume(tmp_path / "x.nii")
    grey = intensity_window(volume).apply(volume.voxels)[1:-1, 1:-1, 1:-1].ravel()
    values = voxels[1:-1, 1:-1, 1:-1].ravel().astype(np.longdouble)
    bottom, top = np.percentile(values[values != 0], [0.5, 99.5])
    expected = np.where(values == 0, 0, np.clip((values - bottom) / (top - bottom) * 255, 0, 255))
    np.testing.assert_allclose(grey, expected.astype(float), atol=0.501)


@pytest.mark.parametrize("value", [0, 5])
def test_intensity_window_constant_volume_is_an_error(tmp_path, value):
    volume = read_volume(save(tmp_path / "x.nii", np.full(SHAPE, value, np.int16)))
    with pytest.raises(ScanError, match=rf"x\.nii` is empty: all voxels are {value}, there is nothing to scale"):
        intensity_window(volume)


@pytest.mark.parametrize(("plane", "expected"), [("axial", (2, 1)), ("coronal", (3, 1)), ("sagittal", (3, 2))])
def test_pixels_are_as_high_and_wide_as_their_voxels(plane, expected):
    assert scans_sam2unet.pixel_size_mm((1, 2, 3), plane) == expected
