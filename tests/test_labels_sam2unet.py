import numpy as np
import pytest

from sam2unet_hf.labels_sam2unet import (
    NUMBERINGS,
    NumberingError,
    enhancing_label_of,
    numberings_of,
    region_ids,
    to_label_ids,
)
from sam2unet_hf.nifti_sam2unet import ScanError


def mask(*labels, dtype=np.float64):
    """A mask with one voxel of each label."""
    voxels = np.zeros((4, 5, 6), dtype)
    voxels[2, 1, : len(labels)] = labels
    return voxels


def ids(numberings, *labels, dtype=np.float64):
    found = to_label_ids(mask(*labels, dtype=dtype), "the mask", numberings)
    assert found.dtype == np.uint8
    assert np.count_nonzero(found) == np.count_nonzero(found[2, 1, : len(labels)])
    return found[2, 1, : len(labels)].tolist()


@pytest.mark.parametrize(
    ("numbering", "labels", "expected"),
    [
        ("gli2017", (1, 2, 4), [1, 2, 3]),  # NCR/NET, ED, ET
        ("gli2023", (1, 2, 3), [1, 2, 3]),  # NCR, ED, ET
        ("gli2024", (1, 2, 3, 4), [1, 2, 3, 4]),  # NETC, SNFH, ET, RC
        ("ssa2023", (1, 2, 3), [1, 2, 3]),
        ("men2023", (1, 2, 3), [1, 2, 3]),
        ("met2023", (1, 2, 3), [1, 2, 3]),
        ("met2025", (1, 2, 3, 4), [1, 2, 3, 4]),
        ("ped2023", (1, 2, 3), [1, 2, 3]),
        ("ped2024", (1, 2, 3, 4), [3, 1, 4, 2]),  # ET, NET, CC, ED
        ("decathlon", (1, 2, 3), [2, 1, 3]),  # ED, NCR/NET, ET
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_every_numbering_maps_its_labels(numbering, labels, expected, dtype):
    assert ids([numbering], *labels, dtype=dtype) == expected
    assert NUMBERINGS[numbering].source.startswith("http")
    with pytest.raises(ScanError, match="holds 1 unknown labels"):
        ids([numbering], *labels, 5)


def test_every_numbering_is_tested():
    assert len(NUMBERINGS) == 10


@pytest.mark.parametrize(
    ("case_id", "new_ending", "folders", "expected"),
    [
        ("BraTS20_Training_001", False, [], "gli2017"),
        ("anything", False, [], "gli2017"),
        ("anything", True, [], "gli2023"),
        ("BraTS-GLI-00000-000", True, [], "gli2023 gli2024 gli2017"),
        ("BraTS-GLI-00000-000", False, [], "gli2023 gli2017"),  # as this package writes it, or as of 2021
        ("BraTS-GLI-00005-100", True, [], "gli2024"),
        ("BraTS-GLI-00000-000", True, ["BraTS2024-BraTS-GLI-TrainingData"], "gli2024"),
        ("BraTS-GLI-20240-000", True, ["BraTS-GLI-20240-000"], "gli2023 gli2024 gli2017"),
        ("BraTS-PED-00001-000", True, [], "ped2023 ped2024"),
        ("BraTS-PED-00001-000", True, ["BraTS-PEDs2024_Training"], "ped2024"),
        ("BraTS-PED-00001-000", True, ["x", "ASNR-MICCAI-BraTS2023-PED-Challenge-TrainingData"], "ped2023"),
        ("BraTS-PED-00001-000", True, ["speed2024", "BraTS2024"], "ped2023 ped2024"),
        ("BraTS-MET-00001-000", True, [], "met2023 met2025"),
        ("BraTS-MET-00001-000", True, ["MICCAI-LH-BraTS2025-MET-Challenge-Training"], "met2025"),
        ("BraTS-MET-00001-000", True, ["BraTS2024-MET"], "met2023"),
        ("BraTS-MEN-00001-000", True, [], "men2023"),
        ("BraTS-SSA-00001-000", True, [], "ssa2023"),
    ],
)
def test_names_tell_the_numberings_that_a_mask_may_have(case_id, new_ending, folders, expected):
    assert " ".join(numberings_of(case_id, new_ending, folders)) == expected


@pytest.mark.parametrize(
    ("labels", "expected"), [((), []), ((1, 2), [1, 2]), ((1, 2, 3), [1, 2, 3]), ((2, 3, 4), [2, 3, 4])]
)
def test_labels_that_mean_one_thing_in_all_numberings_are_read(labels, expected):
    assert ids(["gli2023", "gli2024", "gli2017"], *labels) == expected


def test_labels_that_may_mean_two_things_are_asked_for():
    # 4 is the resection cavity of 2024, or ET in a mask of 2021 that bears the name of 2023.
    with pytest.raises(NumberingError, match=r"labels 1, 2, 4, and its name does not tell .*--labels gli2017"):
        ids(["gli2023", "gli2024", "gli2017"], 1, 2, 4)
    # Without a 4 a mask of children may be of 2023 or of 2024, where ET and cysts have each other's label.
    with pytest.raises(NumberingError, match=r"labels 1, 3, .*ped2023: 1 is NCR.*ped2024: 1 is ET.*--labels ped2024"):
        ids(["ped2023", "ped2024"], 1, 3)
    assert ids(["ped2023", "ped2024"], 1, 3, 4) == [3, 4, 2]
    assert ids(["gli2023", "gli2017"], 1, 2, 4) == [1, 2, 3]


@pytest.mark.parametrize(
    ("numberings", "labels", "message"),
    [
        (["gli2017"], (1, 2, 3), r"1 unknown labels \(3\).*may hold 0, 1, 2, 4.*--labels gli2023.*--labels ped2024"),
        (["gli2023"], (1, 4), r"1 unknown labels \(4\).*may hold 0, 1, 2, 3.*--labels gli2024.*resection cavity"),
        (["men2023"], (4,), r"1 unknown labels \(4\).*--labels gli2024"),
    ],
)
def test_labels_of_another_numbering_say_which(numberings, labels, message):
    with pytest.raises(NumberingError, match=message):
        ids(numberings, *labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((7,), r"1 unknown labels \(7\).*Relabel it or download it again"),
        ((-1, 300), r"2 unknown labels \(-1, 300\)"),
        ((1e30,), r"1 unknown labels \(1e\+30\)"),
        ((1, 2.9), r"1 unknown labels \(2\.9\).*Resample masks with nearest neighbour"),
        ((0.5, 1.02), r"2 unknown labels \(0\.5, 1\.02\).*nearest neighbour"),
        (tuple(np.linspace(10, 12, 6)), r"6 unknown labels|4 unknown labels \(10\.4"),
    ],
)
def test_labels_of_no_numbering_concern_one_mask(labels, message):
    with pytest.raises(ScanError, match=message) as info:
        ids(["gli2023"], *labels)
    assert not isinstance(info.value, NumberingError)


def test_labels_nearly_whole_are_rounded():
    """Float masks that were saved as scaled integers."""
    assert ids(["gli2017"], 0.00392, 1.00392, 2.0000001, 3.9999999991) == [0, 1, 2, 3]


def test_memory_order_and_turned_axes_change_nothing():
    voxels = np.random.default_rng(0).integers(0, 5, (6, 7, 8)).astype(np.int16)
    expected = np.array([0, 3, 1, 4, 2], np.uint8)[voxels]
    for turned in (voxels, np.asfortranarray(voxels), voxels[::-1, :, ::-1].copy()[::-1, :, ::-1]):
        np.testing.assert_array_equal(to_label_ids(turned, "the mask", ["ped2024"]), expected)


def test_regions_hold_the_cysts_of_children_and_no_cavity():
    assert region_ids(["gli2024"]) == {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}
    assert region_ids(["ped2023", "ped2024"]) == {"WT": [1, 2, 3, 4], "TC": [1, 3, 4], "ET": [3]}


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("BraTS20_Training_001_seg.nii.gz", 4),
        ("BraTS20_Training_001_prediction.nii.gz", 4),
        ("Brats18_CBICA_AAB_1_seg.nii", 4),
        ("BraTS2021_00000_seg.nii.gz", 4),
        ("Phantom_001_seg.nii.gz", 4),
        ("BraTS-GLI-00000-000_seg.nii.gz", 3),
        ("BraTS-GLI-00000-000-seg.nii.gz", 3),
        ("BRATS_001.nii.gz", 3),
        ("prediction.nii.gz", 3),
    ],
)
def test_enhancing_tumour_has_the_label_that_the_reader_of_the_name_expects(name, label):
    assert enhancing_label_of(name) == label
