import glob
import io
import logging
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import datasets
import forks
import nibabel as nib
import numpy as np
import PIL.Image
import psutil
import pytest
from huggingface_hub import DatasetCard

from dataset_scripts.brats_slices import BratsSlices, split_patients
from dataset_scripts.brats_slices.__main__ import main
from dataset_scripts.brats_slices.png import encode_png
from dataset_scripts.phantom import write_phantom_cohort
from sam2unet_hf.labels_sam2unet import NumberingError
from sam2unet_hf.overlays import COLOURS, GAP
from sam2unet_hf.scans_sam2unet import MODALITIES, ScanError


REPO = Path(__file__).parents[1]
BRATS_DIR = Path(os.environ.get("BRATS_DIR", REPO.parent / "shared" / "brats"))
SHAPE = (8, 9, 5)
LPS = np.array([[-1.5, 0, 0, 5.25], [0, -2, 0, 8], [0, 0, 3, -6], [0, 0, 0, 1]])


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def save(path, voxels):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, LPS), path)


def make_case(root, case_id, seed=0):
    """Write four modalities, and a mask with tumour in the axial slices 2 (4 voxels) and 3 (1 voxel)."""
    rng = np.random.default_rng(seed)
    for name in ("t1", "t1ce", "t2", "flair"):
        voxels = rng.integers(100, 900, SHAPE).astype(np.int16)
        voxels[0] = voxels[-1] = 0
        save(root / case_id / f"{case_id}_{name}.nii.gz", voxels)
    mask = np.zeros(SHAPE, np.uint8)
    mask[2:6, 4, 2], mask[6, 1, 3] = (1, 2, 2, 4), 2
    save(root / case_id / f"{case_id}_seg.nii.gz", mask)


def copy_as_decathlon(brats_dir, root):
    """Write the cases of `make_case` in the layout of Task01_BrainTumour; return its name of each."""
    names = {}
    for number, folder in enumerate(sorted(path.parent for path in brats_dir.rglob("*_seg.nii.gz")), start=1):
        names[folder.name] = case_id = f"BRATS_{number:03d}"
        files = {name: folder / f"{folder.name}_{name}.nii.gz" for name in ("flair", "t1", "t1ce", "t2", "seg")}
        voxels = {name: np.asarray(nib.load(path).dataobj) for name, path in files.items()}
        labels = np.array([0, 2, 1, 0, 3], np.uint8)[voxels.pop("seg")]  # NCR/NET 2, ED 1, ET 3
        save(root / "imagesTr" / f"{case_id}.nii.gz", np.stack(list(voxels.values()), axis=-1))
        save(root / "imagesTr" / f"._{case_id}.nii.gz", labels)
        save(root / "labelsTr" / f"{case_id}.nii.gz", labels)
    save(root / "imagesTs" / "BRATS_485.nii.gz", np.stack(list(voxels.values()), axis=-1))
    return names


@pytest.fixture
def brats_dir(tmp_path):
    """Five patients: three for training, one each for validation and testing."""
    for number in range(1, 6):
        make_case(tmp_path / "brats" / "HGG", f"Brats18_{number}_1", seed=number)
    return tmp_path / "brats"


def build(brats_dir, num_proc=None, **options):
    builder = BratsSlices(data_dir=str(brats_dir), **{"slices": 2, **options})
    builder.download_and_prepare(num_proc=num_proc)
    return builder


def rows(builder):
    """Return all rows, with the bytes of their pictures."""
    found = []
    for split in builder.as_dataset().values():
        for name in builder.config.columns:
            split = split.cast_column(name, datasets.Image(decode=False))
        found.extend(split)
    return found


# Splits


def test_split_patients_369_as_in_the_paper():
    splits = split_patients(f"BraTS20_Training_{number:03d}" for number in range(1, 370))
    assert {name: len(patients) for name, patients in splits.items()} == {"train": 266, "validation": 29, "test": 74}
    assert len({patient for patients in splits.values() for patient in patients}) == 369


@pytest.mark.parametrize(
    ("n", "sizes"), [(0, (0, 0, 0)), (1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (5, (3, 1, 1)), (22, (17, 1, 4))]
)
def test_split_patients_few_patients(n, sizes):
    assert tuple(map(len, split_patients(map(str, range(n))).values())) == sizes


def test_split_patients_same_on_every_machine_whatever_the_order():
    # printf 0:d | sha256sum gives the smallest of the five sums, 0:a the next
    expected = {"train": ["c", "b", "e"], "validation": ["a"], "test": ["d"]}
    assert split_patients("abcde") == split_patients("edcbaab") == expected
    assert split_patients("abcde", seed=1) != expected


def test_timepoints_of_a_patient_stay_in_one_split(tmp_path):
    for patient in range(4):
        for timepoint in range(3):
            make_case(tmp_path / "brats", f"BraTS-GLI-{patient:05d}-{timepoint:03d}")
    # The old endings do for this test: the id alone tells the patient.
    dataset = build(tmp_path / "brats").as_dataset()
    patients = {name: {case_id[:-4] for case_id in split["case_id"]} for name, split in dataset.items()}
    assert {name: len(found) for name, found in patients.items()} == {"train": 2, "validation": 1, "test": 1}
    assert len(set.union(*patients.values())) == 4


def test_empty_split_is_left_out(tmp_path):
    make_case(tmp_path / "brats", "A_1")
    assert list(build(tmp_path / "brats").as_dataset()) == ["train"]


# Rows


def test_rows_of_one_slice_have_scans_mask_and_facts(brats_dir):
    dataset = build(brats_dir).as_dataset()
    assert {name: len(split) for name, split in dataset.items()} == {"train": 3, "validation": 1, "test": 1}
    counts = ["wt_pixels", "tc_pixels", "et_pixels"]
    names = [*MODALITIES, "mask", "case_id", "slice_index", "grade", *counts, "head_boxes", "spacing_mm"]
    assert dataset["train"].column_names == names
    row = dataset["train"][0]
    for modality in MODALITIES:
        voxels = nib.load(next(brats_dir.rglob(f"{row['case_id']}_{modality}.nii.gz"))).get_fdata()
        low, high = np.percentile(voxels[voxels != 0], [0.5, 99.5])
        expected = np.rint((voxels[:, :, 2].T - low).clip(0, high - low) / (high - low) * 255)
        np.testing.assert_allclose(np.asarray(row[modality]), expected, atol=1)
        assert (row[modality].mode, row[modality].size) == ("L", (8, 9))
        assert row["head_boxes"][modality] == [1, 0, 7, 9]  # all but the outermost columns, which are 0
    assert row["spacing_mm"] == [1.5, 2, 3]

    mask = np.zeros((9, 8))
    mask[4, 2:6] = (1, 2, 2, 3)
    np.testing.assert_array_equal(np.asarray(row["mask"]), mask)
    assert row["mask"].mode == "L"
    assert (row["slice_index"], row["grade"]) == (2, "HGG")
    assert (row["wt_pixels"], row["tc_pixels"], row["et_pixels"]) == (4, 2, 1)


def test_modalities_are_columns_in_the_order_of_the_table_and_all_of_one_cache(brats_dir):
    every = build(brats_dir)
    assert every.config.columns == list(MODALITIES)
    some = build(brats_dir, modalities=["flair", "t1ce"])
    assert some.cache_dir == build(brats_dir, modalities=("t1ce", "flair")).cache_dir != every.cache_dir
    of_every, of_some = every.as_dataset(split="train"), some.as_dataset(split="train")
    assert of_some.column_names[:3] == ["t1ce", "flair", "mask"]
    assert list(of_some[0]["head_boxes"]) == ["t1ce", "flair"]
    np.testing.assert_array_equal(np.asarray(of_some[0]["flair"]), np.asarray(of_every[0]["flair"]))
    assert build(brats_dir, modalities="t2").as_dataset(split="train").column_names[:2] == ["t2", "mask"]


def test_modalities_default_to_those_that_every_case_with_a_mask_has(brats_dir, caplog):
    for path in brats_dir.rglob("*_t1.nii.gz"):
        path.unlink()
    next(brats_dir.rglob("Brats18_3_1_t2.nii.gz")).unlink()
    make_case(brats_dir, "Brats18_6_1")
    for name in ("seg", "flair"):
        next(brats_dir.rglob(f"Brats18_6_1_{name}.nii.gz")).unlink()
    builder = build(brats_dir, skip_bad_cases=True)
    assert builder.config.columns == ["t1ce", "flair"]
    assert "No column for t2, which 1 of 5 cases lack, such as Brats18_3_1. To leave out these cases" in caplog.text
    assert "No column for t1," not in caplog.text  # no case has it
    assert list(builder.skipped_cases) == ["Brats18_6_1"]
    assert list(build(brats_dir, modalities="t2", skip_bad_cases=True).skipped_cases) == ["Brats18_3_1", "Brats18_6_1"]
    for name in ("t1ce", "flair"):
        next(brats_dir.rglob(f"Brats18_{len(name)}_1_{name}.nii.gz")).unlink()
    with pytest.raises(
        ScanError, match=r"No modality is there in each of the 5 cases .*\(t1 0, t1ce 4, t2 4, flair 4\)"
    ):
        build(brats_dir)


def write_points(brats_dir, **places):
    """Replace scans of the case A_1 by such that show single voxels."""
    for modality, indices in places.items():
        voxels = np.zeros(SHAPE, np.int16)
        for index in indices:
            voxels[index] = 9
        save(brats_dir / "A_1" / f"A_1_{modality}.nii.gz", voxels)


@pytest.mark.parametrize(("plane", "expected"), [("axial", [2, 3, 6, 7]), ("coronal", [2, 1, 6, 4])])
def test_head_boxes_are_of_the_whole_volume_in_pixels_of_the_plane(tmp_path, plane, expected):
    make_case(tmp_path / "brats", "A_1")
    write_points(tmp_path / "brats", flair=[(2, 4, 1), (5, 6, 2)], t2=[(2, 3, 3)])
    dataset = build(tmp_path / "brats", plane=plane, slices="all", modalities=["flair", "t2"]).as_dataset("train")
    boxes = dataset[0]["head_boxes"]
    assert all(row == boxes for row in dataset["head_boxes"])
    assert boxes["flair"] == {"axial": [2, 4, 6, 7], "coronal": [2, 2, 6, 4]}[plane]
    union = [*np.minimum(boxes["flair"], boxes["t2"])[:2], *np.maximum(boxes["flair"], boxes["t2"])[2:]]
    assert union == expected


@pytest.mark.parametrize(
    ("modalities", "plane", "indices"),
    [("flair", "axial", [1, 2]), (["flair", "t2"], "axial", [1, 2, 4]), (["flair", "t2"], "sagittal", [2, 3, 6])],
)
def test_slices_head_are_those_that_show_the_head_in_any_scan(tmp_path, modalities, plane, indices):
    make_case(tmp_path / "brats", "A_1")
    write_points(tmp_path / "brats", flair=[(2, 4, 1), (3, 6, 2)], t2=[(6, 1, 4)])
    builder = build(tmp_path / "brats", modalities=modalities, plane=plane, slices="head")
    assert builder.as_dataset(split="train")["slice_index"] == indices


@pytest.mark.parametrize(
    ("options", "indices"),
    [
        ({"slices": [4, 1]}, [1, 4]),
        ({"slices": "all"}, [0, 1, 2, 3, 4]),
        ({"slices": "tumor"}, [2, 3]),
        ({"slices": "tumor", "min_tumor_pixels": 2}, [2]),
        ({"slices": "tumor", "plane": "coronal"}, [1, 4]),
        ({"slices": "tumor", "plane": "sagittal"}, [2, 3, 4, 5, 6]),
    ],
)
def test_slices_chosen(tmp_path, options, indices):
    make_case(tmp_path / "brats", "A_1")
    assert build(tmp_path / "brats", **options).as_dataset(split="train")["slice_index"] == indices


@pytest.mark.parametrize(
    ("plane", "index", "size", "position"),
    [("axial", 3, (8, 9), (1, 6)), ("coronal", 1, (8, 5), (1, 6)), ("sagittal", 6, (9, 5), (1, 1))],
)
def test_plane_shows_the_voxel_at_the_left_front_top_where_it_belongs(tmp_path, plane, index, size, position):
    make_case(tmp_path / "brats", "A_1")  # its mask has ED at (left, posterior, superior) = (6, 1, 3)
    row = build(tmp_path / "brats", plane=plane, slices=index).as_dataset(split="train")[0]
    assert row["mask"].size == row["flair"].size == size
    assert np.asarray(row["mask"])[position] == 2
    assert row["wt_pixels"] == 1


@pytest.mark.parametrize("order", ["C", "F"])
def test_encode_png_is_lossless(order):
    pixels = np.asarray(np.random.default_rng(0).integers(0, 256, (7, 5), dtype=np.uint8), order=order)
    with PIL.Image.open(io.BytesIO(encode_png(pixels))) as image:
        image.load()
        assert image.mode == "L"
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_num_proc_gives_the_same_rows(brats_dir, tmp_path, monkeypatch):
    one = rows(build(brats_dir, slices="all"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other cache")
    assert rows(build(brats_dir, slices="all", num_proc=2)) == one
    assert len(one) == 25


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("modalities", ["flair", ["t1ce", "t2", "t1"]])
def test_decathlon_gives_the_rows_of_the_same_patients_in_brats_layout(brats_dir, tmp_path, num_proc, modalities):
    names = copy_as_decathlon(brats_dir, tmp_path / "Task01_BrainTumour")
    expected = {
        (names[row["case_id"]], row["slice_index"]): {**row, "case_id": names[row["case_id"]], "grade": None}
        for row in rows(build(brats_dir, slices="all", modalities=modalities))
    }
    found = rows(build(tmp_path / "Task01_BrainTumour", num_proc, slices="all", modalities=modalities))
    assert {(row["case_id"], row["slice_index"]): row for row in found} == expected
    assert len(found) == 25


# Cache


def is_at_work(pid, started):
    try:
        process = psutil.Process(pid)
        # Where nothing reaps orphans they stay as zombies.
        return process.create_time() == started and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_readers_end_when_the_process_that_writes_is_killed():
    script = """
import os, signal, time
import psutil
from dataset_scripts.brats_slices.brats_slices import start_readers
pool = start_readers(2)
reading = [pool.submit(time.sleep, 600) for _ in range(2)]
while not all(future.running() for future in reading):
    time.sleep(0.01)
print(*(f"{pid} {psutil.Process(pid).create_time()}" for pid in pool._processes), sep="\\n", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = forks.run(["-c", script], cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)})
    assert done.returncode == -signal.SIGKILL, done.stderr
    readers = [line.split() for line in done.stdout.splitlines()]
    assert len(readers) == 2
    deadline = time.monotonic() + 20
    while any(is_at_work(int(pid), float(started)) for pid, started in readers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_cache_same_options_same_rows_other_options_other_folder(brats_dir):
    first = build(brats_dir)
    second = build(brats_dir, modalities=MODALITIES, slices=[2, 2])
    assert second.cache_dir == first.cache_dir
    assert rows(second) == rows(first)
    folders = {first.cache_dir}
    for options in ({"plane": "coronal"}, {"slices": 3}, {"modalities": "t2"}, {"seed": 1}, {"skip_bad_cases": True}):
        folders.add(BratsSlices(data_dir=str(brats_dir), **{"slices": 2, **options}).cache_dir)
    assert len(folders) == 6


@pytest.mark.parametrize("change", ["scan", "mask", "added", "removed", "grade"])
def test_cache_changed_scans_make_a_new_build(brats_dir, change):
    folder = brats_dir / "HGG" / "Brats18_1_1"
    before = build(brats_dir)
    if change == "scan":
        save(folder / "Brats18_1_1_flair.nii.gz", np.random.default_rng(9).integers(1, 99, SHAPE).astype(np.int16))
    elif change == "mask":
        os.utime(folder / "Brats18_1_1_seg.nii.gz", ns=(0, 0))
    elif change == "added":
        make_case(brats_dir, "Brats18_6_1")
    elif change == "removed":
        folder.rename(brats_dir.parent / "elsewhere")
    else:
        (brats_dir / "HGG").rename(brats_dir / "LGG")
    after = build(brats_dir)
    assert after.cache_dir != before.cache_dir
    assert len(rows(after)) == {"added": 6, "removed": 4}.get(change, 5)
    if change in ("scan", "grade"):
        assert rows(after) != rows(before)


@pytest.mark.parametrize("changed", ["imagesTr/BRATS_001.nii.gz", "labelsTr/BRATS_001.nii.gz"])
def test_cache_changed_decathlon_scans_make_a_new_build(brats_dir, tmp_path, changed):
    root = tmp_path / "Task01_BrainTumour"
    copy_as_decathlon(brats_dir, root)
    before = BratsSlices(data_dir=str(root), slices=2).cache_dir
    os.utime(root / "imagesTs" / "BRATS_485.nii.gz", ns=(0, 0))
    assert BratsSlices(data_dir=str(root), slices=2).cache_dir == before
    os.utime(root / changed, ns=(0, 0))
    assert BratsSlices(data_dir=str(root), slices=2).cache_dir != before


def test_cache_ignores_files_that_are_not_read(brats_dir):
    options = {"data_dir": str(brats_dir), "slices": 2, "modalities": ["flair", "t1"]}
    before = BratsSlices(**options).cache_dir
    os.utime(brats_dir / "HGG" / "Brats18_1_1" / "Brats18_1_1_t2.nii.gz", ns=(0, 0))
    assert BratsSlices(**options).cache_dir == before


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modalities": []}, r"`modalities` must name one or more of t1, t1ce, t2, flair, each once, got \[\]"),
        ({"modalities": ["t2", "t2"]}, r"`modalities` must name one or more of .*, got \['t2', 't2'\]"),
        ({"modalities": "t1gd"}, r"`modalities` must name one or more of .*, got \['t1gd'\]"),
        ({"slices": -1}, r"`slices` must be an index from 0 on, .*, got -1"),
        ({"slices": True}, r"`slices` must be an index from 0 on, .*, got True"),
        ({"slices": []}, r"`slices` must be .* or one of all, head, tumor, got \[\]"),
        ({"slices": "some"}, r"`slices` must be .*, got 'some'"),
        ({"slices": 1.5}, r"`slices` must be .*, got 1.5"),
        ({"slices": [1.5]}, r"`slices` must be .*, got \[1.5\]"),
        ({"min_tumor_pixels": 0}, "`min_tumor_pixels` must be an integer from 1 on, got 0"),
        ({"labels": "gli2020"}, "`labels` must be one of gli2017, .*, got 'gli2020'"),
        ({"plane": "oblique"}, "`plane` must be one of sagittal, coronal, axial, got 'oblique'"),
        ({"data_dir": None}, "`data_dir` is missing. Pass the folder that holds the BraTS cases"),
    ],
)
def test_bad_option_says_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        BratsSlices(**{"data_dir": "nowhere", **options})


def test_no_folder_and_no_case_are_found_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="No folder `.*nowhere`"):
        BratsSlices(data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="(?s)No BraTS case in .*https://www.synapse.org/brats"):
        BratsSlices(data_dir=str(tmp_path))


def test_missing_files_are_listed_before_any_reading(brats_dir):
    for number in (1, 2):
        next(brats_dir.rglob(f"Brats18_{number}_1_flair.nii.gz")).unlink()
    next(brats_dir.rglob("Brats18_3_1_seg.nii.gz")).unlink()
    message = (
        "case Brats18_1_1: no flair scan.*case Brats18_2_1: no flair.*case Brats18_3_1: no mask.*skip_bad_cases=True"
    )
    with pytest.raises(ScanError, match=f"(?s){message}"):
        build(brats_dir, modalities="flair")


def test_decathlon_bad_cases_raise_or_are_skipped(brats_dir, tmp_path):
    root = tmp_path / "Task01_BrainTumour"
    copy_as_decathlon(brats_dir, root)
    save(root / "imagesTr" / "BRATS_002.nii.gz", np.ones((*SHAPE, 3), np.int16))
    with pytest.raises(ScanError, match=r"case BRATS_002: .* expected four 3-D volumes.*skip_bad_cases=True"):
        build(root)
    (root / "labelsTr" / "BRATS_003.nii.gz").unlink()
    with pytest.raises(ScanError, match=r"(?s)case BRATS_003: no mask in `.*labelsTr`.*skip_bad_cases=True"):
        build(root)
    assert list(build(root, skip_bad_cases=True).skipped_cases) == ["BRATS_002", "BRATS_003"]


def test_slice_out_of_range_names_case_plane_and_count(brats_dir):
    with pytest.raises(ScanError, match=r"case Brats18_\d_1: `.*` has 5 axial slices, there is no slice 95\. Choose"):
        build(brats_dir, slices=95)


def test_empty_scan_names_case_and_file(brats_dir):
    save(next(brats_dir.rglob("Brats18_2_1_flair.nii.gz")), np.zeros(SHAPE, np.int16))
    with pytest.raises(
        ScanError, match=r"case Brats18_2_1: `.*Brats18_2_1_flair\.nii\.gz` is empty: all voxels are 0"
    ):
        build(brats_dir)


def test_strange_case_names_stay_in_the_cache_and_leave_nothing_out(brats_dir):
    names = ["...", "a b*[x]#%", "~", "\n", "x" * 230]
    for name in names:
        make_case(brats_dir, f"1{name}")
        next(brats_dir.glob(f"1{glob.escape(name)}/*_seg.nii.gz")).write_bytes(b"no scan")
    builder = build(brats_dir, skip_bad_cases=True)
    assert sorted(builder.skipped_cases) == sorted(f"1{name}" for name in names)
    assert len(rows(builder)) == 5


def test_dangling_link_names_the_case(brats_dir):
    flair = brats_dir / "HGG" / "Brats18_3_1" / "Brats18_3_1_flair.nii.gz"
    flair.unlink()
    flair.symlink_to("annex/not-here")
    with pytest.raises(ScanError, match="case Brats18_3_1: .*cannot be read"):
        build(brats_dir)
    assert list(build(brats_dir, skip_bad_cases=True).skipped_cases) == ["Brats18_3_1"]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_bad_case_found_on_the_way_raises_or_is_skipped(brats_dir, num_proc, caplog):
    bad = next(brats_dir.rglob("Brats18_2_1_flair.nii.gz"))
    bad.write_bytes(bad.read_bytes()[:200])
    message = (
        r"case Brats18_2_1: `.*Brats18_2_1_flair\.nii\.gz` is cut off.*Or leave such cases out: `skip_bad_cases=True`"
    )
    with pytest.raises(ScanError, match=message):
        build(brats_dir, num_proc, slices="all")

    for _ in range(2):  # the second build comes from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            builder = build(brats_dir, num_proc, slices="all", skip_bad_cases=True)
        assert list(builder.skipped_cases) == ["Brats18_2_1"]
        assert "is cut off: its gzip stream ends early" in builder.skipped_cases["Brats18_2_1"]
        assert "Left out: case Brats18_2_1: " in caplog.text
        assert {row["case_id"] for row in rows(builder)} == {f"Brats18_{number}_1" for number in (1, 3, 4, 5)}


def test_skipping_leaves_the_other_cases_in_their_splits(brats_dir, caplog):
    splits = {row["case_id"]: name for name, split in build(brats_dir).as_dataset().items() for row in split}
    bad = next(case_id for case_id, split in splits.items() if split == "validation")
    next(brats_dir.rglob(f"{bad}_seg.nii.gz")).write_bytes(b"no scan")
    for _ in range(2):  # the second build comes from the cache
        caplog.clear()
        after = build(brats_dir, skip_bad_cases=True).as_dataset()
        assert list(after) == ["train", "test"]
        assert {row["case_id"]: name for name, split in after.items() for row in split} == {
            case_id: name for case_id, name in splits.items() if case_id != bad
        }
        assert "There is no validation split, for none of its 1 cases gives a slice. Repair one, or" in caplog.text


def test_cases_without_masks_take_no_part_in_the_split(brats_dir, caplog):
    """The cases of the challenge's validation, in the same folder."""
    expected = build(brats_dir).as_dataset()
    for number in range(40):
        make_case(brats_dir / "Validation", f"Brats18_V{number}_1")
        next(brats_dir.rglob(f"Brats18_V{number}_1_seg.nii.gz")).unlink()
    builder = build(brats_dir, skip_bad_cases=True)
    assert len(builder.skipped_cases) == 40
    assert "no mask in" in builder.skipped_cases["Brats18_V0_1"]
    found = builder.as_dataset()
    assert {name: split["case_id"][:] for name, split in found.items()} == {
        name: split["case_id"][:] for name, split in expected.items()
    }
    assert "There is no" not in caplog.text


# Numbering of labels


def name_anew(brats_dir, task, labels):
    """Give the five cases the names of a task, and masks with these labels."""
    for number, folder in enumerate(sorted((brats_dir / "HGG").iterdir())):
        case_id = f"BraTS-{task}-{number:05d}-000"
        for path in folder.iterdir():
            ending = path.name.removeprefix(folder.name).removesuffix(".nii.gz")
            new = {"_t1": "-t1n", "_t1ce": "-t1c", "_t2": "-t2w", "_flair": "-t2f", "_seg": "-seg"}[ending]
            path.rename(folder / f"{case_id}{new}.nii.gz")
        mask = np.zeros(SHAPE, np.uint8)
        mask[1 : 1 + len(labels[number]), 4, 2] = labels[number]
        mask[2, 2, 3] = labels[number][-1]
        save(folder / f"{case_id}-seg.nii.gz", mask)
        folder.rename(folder.with_name(case_id))


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_case_that_contradicts_the_numbering_stops_the_build_for_all(brats_dir, num_proc):
    name_anew(brats_dir, "PED", [(1, 2, 3, 4)] * 3 + [(1, 2, 3)] + [(2, 4)])
    message = r"case BraTS-PED-00003-000: .*its name does not tell what they mean.*--labels ped2024"
    with pytest.raises(NumberingError, match=message):
        build(brats_dir, num_proc, skip_bad_cases=True)
    with pytest.raises(NumberingError, match=r"case BraTS-PED-0000\d-000: .*unknown labels \(4\)"):
        build(brats_dir, num_proc, skip_bad_cases=True, labels="ped2023")


@pytest.mark.parametrize(
    ("labels", "label_ids", "counts", "tumor_slices"),
    [
        ("ped2024", [3, 1, 4, 2], (4, 3, 1), [2, 3]),  # the cysts are tumour, 4 is ED
        ("gli2024", [1, 2, 3, 4], (3, 2, 1), [2]),  # the cavity is none
    ],
)
def test_fourth_label_is_kept_and_counted_where_it_is_tumour(brats_dir, labels, label_ids, counts, tumor_slices):
    name_anew(brats_dir, "PED" if labels == "ped2024" else "GLI", [(1, 2, 3, 4)] * 5)
    for told in (labels, None):  # all four labels are there, so that they tell by themselves
        dataset = build(brats_dir, slices="tumor", labels=told).as_dataset(split="train")
        row = dataset[0]
        assert np.asarray(row["mask"])[4, 1:5].tolist() == label_ids
        assert (row["wt_pixels"], row["tc_pixels"], row["et_pixels"]) == counts
        assert sorted(set(dataset["slice_index"])) == tumor_slices


def test_case_without_tumor_slice_is_reported_not_dropped_silently(brats_dir, caplog):
    save(next(brats_dir.rglob("Brats18_4_1_seg.nii.gz")), np.zeros(SHAPE, np.uint8))
    builder = build(brats_dir, slices="tumor")
    assert builder.skipped_cases == {
        "Brats18_4_1": "case Brats18_4_1: no axial slice shows 1 or more pixels of tumour."
    }
    assert "Left out: case Brats18_4_1: no axial slice" in caplog.text


def test_no_slice_at_all_is_an_error(brats_dir):
    with pytest.raises(
        ScanError, match=r"(?s)None of the 5 cases gives a slice:.*no axial slice shows 999 or more pixels"
    ):
        build(brats_dir, slices="tumor", min_tumor_pixels=999)


def test_rebuild_on_demand_after_an_empty_split(brats_dir):
    save(next(brats_dir.rglob("Brats18_4_1_seg.nii.gz")), np.zeros(SHAPE, np.uint8))
    first = build(brats_dir, slices="tumor")
    again = BratsSlices(data_dir=str(brats_dir), slices="tumor")
    again.download_and_prepare(download_mode="force_redownload")
    assert rows(again) == rows(first)


# Command line


def run(brats_dir, output_dir, *options):
    main(["--brats_dir", str(brats_dir), "--output_dir", str(output_dir), *options])


def test_cli_folder_loads_anywhere_without_our_code(brats_dir, tmp_path):
    output_dir = tmp_path / "new" / "out"
    command = [sys.executable, "-m", "dataset_scripts.brats_slices", "--brats_dir", "brats", "--output_dir", "new/out"]
    env = {**os.environ, "PYTHONPATH": str(REPO), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    options = ["--slices", "1 2", "--modalities", "t1ce", "t2", "flair", "--num_proc", "2"]
    done = subprocess.run([*command, *options], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Wrote 6 train, 2 validation, 2 test slices of 5 cases to new/out (cases left out: 0)" in done.stderr
    assert 'load_dataset("new/out")' in done.stderr
    assert sorted(path.name for path in output_dir.parent.iterdir()) == ["out"]

    script = f"""
import datasets, sys
dataset = datasets.load_dataset({str(output_dir)!r})
assert "sam2unet_hf" not in sys.modules
print({{name: len(split) for name, split in dataset.items()}})
row = dataset["test"][0]
print(list(row)[:4], row["flair"].mode, row["mask"].getextrema(), row["head_boxes"]["t2"], row["spacing_mm"])
"""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env["PYTHONPATH"] = ""
    done = forks.run(["-c", script], cwd=elsewhere, env=env)
    assert done.stdout.splitlines() == [
        "{'train': 6, 'validation': 2, 'test': 2}",
        "['t1ce', 't2', 'flair', 'mask'] L (0, 0) [1, 0, 7, 9] [1.5, 2.0, 3.0]",
    ], done.stderr


def test_cli_folder_written_anew_is_loaded_anew(brats_dir, tmp_path):
    """`datasets` caches a local folder by its card."""
    found = []
    for slices in ("2", "3", "2 3"):
        run(brats_dir, tmp_path / "out", "--slices", slices)
        dataset = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
        found.append(dataset["test"]["slice_index"][:])
        shutil.rmtree(tmp_path / "out")
    assert found == [[2], [3], [2, 3]]


def test_cli_card_states_facts(brats_dir, tmp_path):
    save(next(brats_dir.rglob("Brats18_4_1_seg.nii.gz")), np.full(SHAPE, 7, np.uint8))
    run(brats_dir, tmp_path / "out", "--slices", "tumor", "--min_tumor_pixels", "2", "--skip_bad_cases")
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "other"
    assert card.data.task_categories == ["image-segmentation"]
    assert card.data.size_categories == ["n<1K"]
    assert [split["num_examples"] for split in card.data.dataset_info["splits"]] == [3, 1]
    for entry in card.data.configs[0]["data_files"]:
        assert entry["path"] == f"data/{entry['split']}-*"
        assert list((tmp_path / "out").glob(entry["path"]))
    assert "cut from 4 scanning sessions of 4 patients" in card.text
    assert "| train | " in card.text
    assert "| `min_tumor_pixels` | 2 |" in card.text
    assert "| `modalities` | t1 t1ce t2 flair |" in card.text
    assert "| `t1`, `t1ce`, `t2`, `flair` | 8-bit grey PNG of each modality |" in card.text
    assert "| `head_boxes` | for each modality the box" in card.text
    assert "Cases without rows: Brats18_4_1." in card.text
    assert "10.1109/TMI.2014.2377694" in card.text
    assert "$" not in card.text
    assert not list((tmp_path / "out").glob("*.png"))  # a patient's slices are shown only when that is asked for
    assert "![" not in card.text


def test_cli_card_has_statistics_of_each_split(brats_dir, tmp_path):
    mask = np.zeros(SHAPE, np.uint8)  # large enough for volumes that one digit after the point tells apart
    mask[1:7, 1:8, 2] = mask[1:7, 1:4, 3] = 2
    mask[1:7, 1:3, 2], mask[1:7, 3, 2] = 1, 4
    for path in brats_dir.rglob("*_seg.nii.gz"):
        save(path, mask)
    run(brats_dir, tmp_path / "out", "--slices", "all")
    lines = DatasetCard.load(tmp_path / "out" / "README.md").text.split("## Statistics")[1].splitlines()
    table = {cells[1]: cells[2:-1] for line in lines if len(cells := [cell.strip() for cell in line.split("|")]) > 2}
    splits = datasets.load_dataset(str(tmp_path / "out"))
    assert table[""] == list(splits) == ["train", "validation", "test"]
    # Two of five slices show tumour: 42 voxels, of which 12 are NCR/NET and 6 ET, and 18 voxels.
    voxel_ml = np.prod([1.5, 2.0, 3.0]) / 1000
    volumes = {"whole tumour": "0.5", "tumour core": "0.2", "enhancing tumour": "0.1"}
    assert list(volumes.values()) == [f"{voxels * voxel_ml:.1f}" for voxels in (60, 18, 6)]
    expected = {
        "share of slices with tumour": "40%",
        "whole tumour (pixels in a slice that shows it)": "30 (18 to 42)",
        **{f"{name} (ml)": volume for name, volume in volumes.items()},
        "tumour core (pixels in a slice that shows it)": "18",
        "enhancing tumour (pixels in a slice that shows it)": "6",
        "width of the head (pixels)": "6",
        "height of the head (pixels)": "9",
        "voxels from left to right (mm)": "1.50",
        "voxels from front to back (mm)": "2.00",
        "voxels from feet to head (mm)": "3.00",
    }
    for name, value in expected.items():
        assert table[name] == [value] * 3, name
    for name in ("t1", "flair"):
        for value, rows in zip(table[f"`{name}`, mean grey value of the head"], splits.values(), strict=True):
            slices = [np.asarray(row[name]) for row in rows if row["wt_pixels"] == 42]
            means = sorted(pixels[pixels > 0].mean() for pixels in slices)
            median = statistics.median(means)
            assert value in (f"{median:.0f}", f"{median:.0f} ({means[0]:.0f} to {means[-1]:.0f})")
    grades = [cell for cell in table["sessions by grade"] if cell]
    assert sum(int(part.split()[1]) for cell in grades for part in cell.split(", ")) == 5
    run(brats_dir, tmp_path / "some", "--slices", "2", "--show_slices")
    card = (tmp_path / "some" / "README.md").read_text()
    assert "(ml)" not in card  # of a part of a tumour
    assert "![Slices of a few patients, with the outlines of the tumour](card_slices.png)" in card
    assert (tmp_path / "some" / "card_slices.png").is_file()


def test_cli_card_of_the_decathlon_states_its_licence(brats_dir, tmp_path):
    copy_as_decathlon(brats_dir, tmp_path / "Task01_BrainTumour")
    run(tmp_path / "Task01_BrainTumour", tmp_path / "out", "--slices", "2")
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "cc-by-sa-4.0"
    assert "of task 1 of the [Medical Segmentation Decathlon]" in card.text
    assert "do not pass them on" not in card.text
    assert "10.1038/s41467-022-30695-9" in card.text
    copy_as_decathlon(brats_dir, brats_dir / "Task01_BrainTumour")  # beside scans of the challenge
    run(brats_dir, tmp_path / "mixed", "--slices", "2")
    assert DatasetCard.load(tmp_path / "mixed" / "README.md").data.license == "other"


def test_cli_card_of_a_phantom_has_neither_terms_nor_citation_of_brats(tmp_path):
    cohort = write_phantom_cohort(tmp_path / "cohort", 4, (32, 32, 21))
    run(cohort, tmp_path / "out", "--slices", "8")
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "apache-2.0"
    assert "No scan is of a person: `dataset_scripts.phantom` drew them, and they may be passed on." in card.text
    assert "cut from 4 scanning sessions of 4 patients made up in the layout" in card.text
    for absent in ("experts", "do not pass them on", "Citation", "bibtex", "10.1109", "$"):
        assert absent not in card.text, absent
    # A row for each of the three training patients: four contrasts, and outlines on FLAIR, all enlarged five times.
    assert "![Slices of a few patients, with the outlines of the tumour](card_slices.png)" in card.text
    with PIL.Image.open(tmp_path / "out" / "card_slices.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (2 * 160 + GAP, 5 * 160 + 4 * GAP, 3)
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train").sort("wt_pixels", reverse=True)
    for top, row in zip((0, 160 + GAP), (rows[0], rows[-1]), strict=True):
        panels = [pixels[top : top + 160, left : left + 160] for left in range(0, 5 * (160 + GAP), 160 + GAP)]
        for panel, name in zip(panels, MODALITIES, strict=False):
            np.testing.assert_array_equal(panel[2::5, 2::5, 0], np.asarray(row[name]), err_msg=name)
        outlined = (panels[4] == COLOURS[0]).all(axis=-1)
        whole_tumour = np.kron(np.asarray(row["mask"]) > 0, np.ones((5, 5), bool))
        assert outlined.any()
        assert not (outlined & ~whole_tumour).any()
    builder = BratsSlices(data_dir=str(cohort))
    assert (builder.info.citation, builder.info.homepage) == ("", "")
    (cohort / "Phantom_001").rename(cohort / "BraTS20_Training_001")  # beside a scan of the challenge
    for path in sorted((cohort / "BraTS20_Training_001").iterdir()):
        path.rename(path.with_name(path.name.replace("Phantom_001", "BraTS20_Training_001")))
    run(cohort, tmp_path / "mixed", "--slices", "8")
    mixed = DatasetCard.load(tmp_path / "mixed" / "README.md")
    assert mixed.data.license == "other"
    assert "10.1109/TMI.2014.2377694" in mixed.text


def test_cli_bad_case_is_one_line_and_leaves_nothing(brats_dir, tmp_path):
    bad = next(brats_dir.rglob("Brats18_2_1_seg.nii.gz"))
    bad.write_bytes(b"no scan")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit, match=r"^error: case Brats18_2_1: `.*` is not a NIfTI file.*--skip_bad_cases"):
        run(brats_dir, tmp_path / "out", "--slices", "2")
    assert sorted(set(tmp_path.iterdir()) - set(before)) in ([], [tmp_path / "cache"])


def test_cli_full_output_folder_is_refused_and_an_empty_one_taken(brats_dir, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    run(brats_dir, out, "--slices", "2")
    with pytest.raises(SystemExit, match="^error: `.*out` is not empty. Remove it or choose another `--output_dir`"):
        run(brats_dir, out, "--slices", "2")


def test_cli_usage_error_exits_with_2(brats_dir, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(brats_dir, tmp_path / "out", "--slices", "some")
    assert "argument --slices: expected indices or one of all, head, tumor, got some" in capsys.readouterr().err


# Real scans


@pytest.mark.skipif(not BRATS_DIR.is_dir(), reason="no BraTS scans; set BRATS_DIR")
def test_real_scans_22_cases_4_without_tumor_in_slice_95():
    found = rows(build(BRATS_DIR, slices=95, num_proc=2))
    assert len(found) == 22
    assert sum(row["wt_pixels"] == 0 for row in found) == 4
    assert all(PIL.Image.open(io.BytesIO(row["flair"]["bytes"])).size == (240, 240) for row in found)
