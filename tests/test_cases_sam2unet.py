import gzip
import logging
import os
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
from nibabel import orientations
from scan_files import LPS, RAS, SAL, SHAPE, make_mask, make_scan, save

from sam2unet_hf import scans_sam2unet
from sam2unet_hf.cases_sam2unet import find_cases
from sam2unet_hf.labels_sam2unet import NumberingError
from sam2unet_hf.scans_sam2unet import ScanError


OLD_NAMES = {name: f"_{name}" for name in ("t1", "t1ce", "t2", "flair", "seg")}
NEW_NAMES = {"t1": "-t1n", "t1ce": "-t1c", "t2": "-t2w", "flair": "-t2f", "seg": "-seg"}


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


@pytest.mark.parametrize("inner", ["{number}_brain_{name}.nii", "BraTS2021_00000_{name}.nii"])
def test_find_cases_a_folder_per_file_as_on_kaggle(tmp_path, inner):
    for case_id, number in (("BraTS2021_00000", "00000057"), ("BraTS2021_00002", "00000058")):
        folder = make_case(tmp_path / "flat", case_id, extension=".nii")
        for path in list(folder.iterdir()):
            name = path.stem.rsplit("_", 1)[1]
            nested = tmp_path / "kaggle" / case_id / path.name
            nested.mkdir(parents=True)
            shutil.copy(path, nested / inner.format(number=number, name=name))
            (nested / "._left by macOS.nii").write_bytes(b"")
    first, second = find_cases(tmp_path / "kaggle")
    assert (first.case_id, second.case_id) == ("BraTS2021_00000", "BraTS2021_00002")
    assert (first.problem, first.labels, len(first.files)) == (None, ("gli2017",), 5)
    (flat, _) = find_cases(tmp_path / "flat")
    for modality in ("t1", "flair"):
        (nested,), (plain,) = first.read_images([modality]), flat.read_images([modality])
        np.testing.assert_array_equal(nested.voxels, plain.voxels)
    np.testing.assert_array_equal(first.read_mask().voxels, flat.read_mask().voxels)


def test_find_cases_reads_upper_case_names(tmp_path):
    folder = tmp_path / "BraTS20_Training_001"
    for name in ("T1", "T1CE", "T2", "FLAIR"):
        save(folder / f"BraTS20_Training_001_{name}.nii.gz", make_scan()).rename(
            folder / f"BraTS20_Training_001_{name}.NII.GZ"
        )
    save(folder / "BraTS20_Training_001_Seg.nii", make_mask())
    (case,) = find_cases(tmp_path)
    assert set(case.files) == {"t1", "t1ce", "t2", "flair", "seg"}
    np.testing.assert_array_equal(case.read_images(["t1ce"])[0].voxels, make_scan())
    assert np.unique(case.read_mask().voxels).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("case_id", ["X", "BRATS_001"])
def test_find_cases_names_the_raw_layout_of_nnunet(tmp_path, case_id):
    for channel in range(4):
        save(tmp_path / "imagesTr" / f"{case_id}_{channel:04d}.nii.gz", make_scan())
    save(tmp_path / "labelsTr" / f"{case_id}.nii.gz", make_mask((1, 2, 3)))
    message = (
        rf"imagesTr` is in the raw layout of nnU-Net: a file per channel, such as {case_id}_0000\.nii\.gz.*_flair"
    )
    if case_id == "X":
        with pytest.raises(FileNotFoundError, match=f"No BraTS case in .*{message}"):
            find_cases(tmp_path)
    else:  # the name of the mask is one of the Decathlon
        with pytest.raises(ScanError, match=f"case BRATS_001: .*{message}"):
            find_cases(tmp_path)[0].read_images(["flair"])


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
        case.read_images(["flair"])


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
    np.testing.assert_array_equal(case.read_images(["t1"])[0].voxels, make_scan(1))
    with pytest.raises(ScanError, match=r"BRATS_485: no mask in `.*labelsTs`.*test cases come without masks"):
        case.read_mask()


def test_find_cases_decathlon_file_is_the_case(decathlon, tmp_path):
    (case,) = find_cases(decathlon / "imagesTr" / "BRATS_002.nii.gz")
    assert case == find_cases(decathlon)[1]
    (alone,) = find_cases(case.files["t2"].rename(tmp_path / "BRATS_002.nii.gz"))
    assert set(alone.files) == {"t1", "t1ce", "t2", "flair"}
    np.testing.assert_array_equal(alone.read_images(["t2"])[0].voxels, make_scan(3))


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
        find_cases(tmp_path)[0].read_images(["flair"])


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


@pytest.mark.parametrize("affine", [LPS, RAS, SAL], ids=["LPS", "RAS", "SAL"])
def test_decathlon_modalities_and_mask_voxel_exact_in_any_orientation(tmp_path, affine):
    make_decathlon_case(tmp_path, affine=affine)
    (case,) = find_cases(tmp_path)
    mask = case.read_mask()
    assert mask.voxels.dtype == np.uint8
    np.testing.assert_array_equal(mask.voxels, make_mask((1, 2, 3)))  # 1 and 2 are swapped in the file
    for modality, seed in {"flair": 0, "t1": 1, "t1ce": 2, "t2": 3}.items():
        (volume,) = case.read_images([modality], same_grid_as=mask)
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
        (one,) = case.read_images([modality])
        assert volume.name == one.name
        np.testing.assert_array_equal(volume.voxels, one.voxels)


def test_read_images_opens_a_decathlon_file_once_and_keeps_what_was_asked_for(decathlon, monkeypatch):
    opened = []
    open_file = scans_sam2unet.open_nifti
    monkeypatch.setattr(scans_sam2unet, "open_nifti", lambda path, name: opened.append(path) or open_file(path, name))
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
    np.testing.assert_array_equal(find_cases(decathlon)[0].read_images(["t1ce"])[0].voxels, make_scan(2) * 0.5 - 3)


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


@pytest.mark.parametrize(
    ("case_id", "labels", "values", "expected"),
    [
        ("BraTS-GLI-00000-000", None, (1, 2, 3), [1, 2, 3]),
        ("BraTS-GLI-00005-100", None, (2, 3, 4), [2, 3, 4]),
        ("BraTS-GLI-00000-000", "gli2024", (1, 2, 4), [1, 2, 4]),
        ("BraTS-GLI-00000-000", "gli2017", (1, 2, 4), [1, 2, 3]),
        ("BraTS-PED-00000-000", None, (1, 3, 4), [3, 4, 2]),
        ("BraTS-PED-00000-000", "ped2024", (1, 2, 3), [3, 1, 4]),
        ("BraTS-PED-00000-000", "ped2023", (1, 2, 3), [1, 2, 3]),
        ("renamed", "gli2024", (1, 3, 4), [1, 3, 4]),
    ],
)
def test_read_mask_numbering_of_task_and_year(tmp_path, case_id, labels, values, expected):
    folder = make_case(tmp_path, case_id, NEW_NAMES)
    save(folder / f"{case_id}-seg.nii.gz", make_mask(values))
    (case,) = find_cases(tmp_path, labels)
    assert case.read_mask().voxels[3:6, 4, 2].tolist() == expected
    assert (4 in case.regions["WT"]) == case_id.startswith("BraTS-PED")
    with pytest.raises(ValueError, match=r"`labels` must be one of gli2017, .*, got 'gli2020'"):
        find_cases(tmp_path, "gli2020")


def test_read_mask_of_the_year_in_the_name_of_a_folder(tmp_path):
    make_case(tmp_path / "BraTS-PEDs2024_Training", "BraTS-PED-00001-000", NEW_NAMES)
    (case,) = find_cases(tmp_path)
    assert case.read_mask().voxels[3:6, 4, 2].tolist() == [3, 1, 4]
    make_case(tmp_path / "elsewhere", "BraTS-PED-00002-000", NEW_NAMES)
    with pytest.raises(NumberingError, match="case BraTS-PED-00002-000: .*does not tell what they mean"):
        find_cases(tmp_path)[1].read_mask()


@pytest.mark.parametrize(("value", "count"), [(4, 1), (-1, 1), (0.5, 1)])
def test_read_mask_decathlon_unknown_label_names_case_file_and_set(decathlon, value, count):
    path = decathlon / "labelsTr" / "BRATS_001.nii.gz"
    save(path, np.where(make_mask() == 1, value, 0).astype(np.float32))
    message = (
        rf"holds {count} unknown labels \({value}\)\. A mask of the Decathlon may hold 0, 1, 2, 3: 1 is ED, 2 NCR"
    )
    with pytest.raises(ScanError, match=rf"case BRATS_001: `.*labelsTr.BRATS_001\.nii\.gz` {message}"):
        find_cases(decathlon)[0].read_mask()


# Broken and missing files. Each error names the case and the file.


def test_missing_modality_and_mask_say_what_is_expected(folder, case_files):
    case_files["t1ce"].unlink()
    case_files["seg"].unlink()
    (case,) = find_cases(folder)
    with pytest.raises(ScanError, match=r"case BraTS20_Training_001: no t1ce scan in `.*`, expected .*_t1ce\.nii"):
        case.read_images(["t1ce"])
    with pytest.raises(ScanError, match=r"case BraTS20_Training_001: no mask in `.*test cases come without masks"):
        case.read_mask()


def test_read_image_other_shape_is_an_error(folder, case_files):
    save(case_files["flair"], make_scan()[:, :, :4])
    (case,) = find_cases(folder)
    with pytest.raises(ScanError, match=r"_flair.nii.gz` has the shape \(8, 9, 4\), .*_seg.nii.gz` \(8, 9, 5\).*Res"):
        case.read_images(["flair"], same_grid_as=case.read_mask())


def test_read_image_other_affine_is_an_error_beyond_the_tolerance(folder, case_files):
    (case,) = find_cases(folder)
    moved = LPS.copy()
    moved[0, 3] += 0.05
    save(case_files["flair"], make_scan(), moved)
    case.read_images(["flair"], same_grid_as=case.read_mask())
    moved[0, 3] += 2
    save(case_files["flair"], make_scan(), moved)
    with pytest.raises(ScanError, match=r"flair.nii.gz` and .*seg.nii.gz` have different affines: .* 2\.05 mm apart"):
        case.read_images(["flair"], same_grid_as=case.read_mask())


def test_read_mask_same_grid_in_another_orientation_is_accepted(folder, case_files):
    save(case_files["seg"], make_mask()[::-1, ::-1], RAS)
    (case,) = find_cases(folder)
    mask = case.read_mask(same_grid_as=case.read_images(["flair"])[0])
    assert mask.voxels[3:6, 4, 2].tolist() == [1, 2, 3]


def test_decathlon_missing_image_and_mask_say_what_is_expected(decathlon):
    (decathlon / "imagesTr" / "BRATS_001.nii.gz").unlink()
    (decathlon / "labelsTr" / "BRATS_002.nii.gz").unlink()
    no_image, no_mask = find_cases(decathlon)
    with pytest.raises(
        ScanError, match=r"case BRATS_001: no t2 scan in `.*imagesTr`, expected BRATS_001\.nii\[\.gz\]\. Download"
    ):
        no_image.read_images(["t2"])
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
        find_cases(decathlon)[0].read_images(["flair"])


def test_decathlon_nan_concerns_the_modality_that_holds_it(decathlon):
    path = decathlon / "imagesTr" / "BRATS_001.nii.gz"
    scans = nib.load(path).get_fdata(dtype=np.float32)
    scans[1, 2, 3, 2] = np.nan
    save(path, scans)
    case = find_cases(decathlon)[0]
    case.read_images(["flair"])
    with pytest.raises(
        ScanError, match=r"case BRATS_001: `.*BRATS_001\.nii\.gz` \(t1ce\) holds 1 voxels that are NaN"
    ):
        case.read_images(["flair", "t1ce"])


def test_decathlon_cut_off_behind_the_wanted_volume_is_an_error(decathlon):
    path = decathlon / "imagesTr" / "BRATS_001.nii.gz"
    path.write_bytes(gzip.decompress(path.read_bytes())[:-1])
    with pytest.raises(ScanError, match=r"BRATS_001\.nii\.gz` is cut off: its header promises 2880 bytes"):
        find_cases(decathlon)[0].read_images(["flair"])


def test_decathlon_mask_on_another_grid_is_an_error(decathlon):
    save(decathlon / "labelsTr" / "BRATS_001.nii.gz", make_mask((1, 2, 3)), RAS)
    case = find_cases(decathlon)[0]
    case.read_images(["flair"], same_grid_as=case.read_mask())  # the same box, stored the other way round
    save(decathlon / "labelsTr" / "BRATS_001.nii.gz", make_mask((1, 2, 3))[:, :, :4])
    with pytest.raises(ScanError, match=r"\(flair\) has the shape \(8, 9, 5\), .*labelsTr.* \(8, 9, 4\)"):
        case.read_images(["flair"], same_grid_as=case.read_mask())


def test_read_images_without_a_mask_share_the_grid_of_the_first(folder, case_files):
    save(case_files["t2"], make_scan()[:, :, :4])
    with pytest.raises(ScanError, match=r"_t2.nii.gz` has the shape \(8, 9, 4\), .*_flair.nii.gz` \(8, 9, 5\)"):
        find_cases(folder)[0].read_images(["flair", "t2"])
