import nibabel as nib
import numpy as np
import pytest

from dataset_scripts.phantom import cohort, make_phantom_case, write_phantom_cohort


MODALITIES = ("t1", "t1ce", "t2", "flair")
SHAPE = (96, 96, 62)
SMALL_SHAPE = (48, 48, 31)


@pytest.fixture(scope="module")
def cases():
    return [make_phantom_case([0, number], SHAPE) for number in range(1, 25)]


@pytest.fixture(scope="module")
def cohort_dir(tmp_path_factory):
    return write_phantom_cohort(tmp_path_factory.mktemp("phantom") / "cohort", 2, SMALL_SHAPE)


def read_files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.nii.gz")}


def touching(mask):
    """Voxels that share a face with `mask`."""
    shifts = [np.roll(mask, step, axis) for axis in range(3) for step in (-1, 1)]
    return np.logical_or.reduce(shifts)


def healthy_tissues(case):
    """Fluid, grey and white matter outside the tumour, told apart by T1 alone."""
    healthy = (case["t1"] > 0) & (case["seg"] == 0)
    low, middle_low, middle_high, high = np.quantile(case["t1"][healthy], [0.05, 0.30, 0.45, 0.75])
    t1 = case["t1"]
    return healthy & (t1 < low), healthy & (t1 > middle_low) & (t1 < middle_high), healthy & (t1 > high)


def test_write_phantom_cohort_layout_is_that_of_brats(cohort_dir):
    assert sorted(read_files(cohort_dir)) == sorted(
        f"Phantom_00{number}/Phantom_00{number}_{suffix}.nii.gz"
        for number in (1, 2)
        for suffix in (*MODALITIES, "seg")
    )
    assert sorted(path.name for path in cohort_dir.parent.iterdir()) == ["cohort"]


@pytest.mark.parametrize("suffix", [*MODALITIES, "seg"])
def test_write_phantom_cohort_volume_equals_case_on_brats_axes(cohort_dir, suffix):
    image = nib.load(cohort_dir / "Phantom_002" / f"Phantom_002_{suffix}.nii.gz")
    assert image.get_data_dtype() == np.int16
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    np.testing.assert_allclose(image.affine, [[-5, 0, 0, 0], [0, -5, 0, 235], [0, 0, 5, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(image.header.get_zooms(), 5)
    np.testing.assert_array_equal(np.asarray(image.dataobj), make_phantom_case([0, 2], SMALL_SHAPE)[suffix])


def test_write_phantom_cohort_twice_gives_the_same_bytes(cohort_dir, tmp_path):
    again = read_files(write_phantom_cohort(tmp_path / "again", 2, SMALL_SHAPE))
    assert again == read_files(cohort_dir)
    assert all(content[4:8] == bytes(4) for content in again.values())  # no time in the gzip header


def test_write_phantom_cohort_growing_keeps_earlier_patients(cohort_dir, tmp_path):
    larger = read_files(write_phantom_cohort(tmp_path / "larger", 3, SMALL_SHAPE))
    last = read_files(write_phantom_cohort(tmp_path / "last", 1, SMALL_SHAPE, first=3))
    assert last == {name: content for name, content in larger.items() if "Phantom_003" in str(name)}
    assert len(larger) == 15
    assert larger.items() > read_files(cohort_dir).items()


def test_write_phantom_cohort_other_seed_gives_other_patients(cohort_dir, tmp_path):
    first, other = read_files(cohort_dir), read_files(write_phantom_cohort(tmp_path / "other", 2, SMALL_SHAPE, seed=1))
    assert first.keys() == other.keys()
    assert not set(first.values()) & set(other.values())
    assert len(set(first.values())) == len(first)


def test_write_phantom_cohort_refuses_folder_that_holds_something(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="`output_dir` must be new or empty, got .*Remove it or pass another"):
        write_phantom_cohort(tmp_path, 1, SMALL_SHAPE)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_write_phantom_cohort_accepts_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    assert len(read_files(write_phantom_cohort(tmp_path / "empty", 1, SMALL_SHAPE))) == 5


def test_write_phantom_cohort_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def fail_at_second_patient(seed, shape):
        if seed == [0, 2]:
            raise OSError("disk full")
        return make_phantom_case(seed, shape)

    monkeypatch.setattr(cohort, "make_phantom_case", fail_at_second_patient)
    with pytest.raises(OSError, match="disk full"):
        write_phantom_cohort(tmp_path / "cohort", 2, SMALL_SHAPE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_patients": 0}, "`num_patients` must be >= 1, got 0"),
        ({"seed": -1}, "`seed` must be >= 0, got -1"),
        ({"first": 0}, "`first` must be >= 1, got 0"),
        ({"shape": (96, 96, 40)}, r"`shape` must .* hold a head .*got \(96, 96, 40\)\. Pass the proportions"),
        ({"shape": (16, 16, 11)}, "`shape` must be at least 24 voxels wide"),
        ({"shape": (96, 96)}, r"`shape` must have three sizes, got \(96, 96\)"),
    ],
)
def test_write_phantom_cohort_bad_argument_is_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_phantom_cohort(tmp_path / "cohort", **arguments)
    assert not list(tmp_path.iterdir())


def test_make_phantom_case_takes_a_generator():
    from_seed = make_phantom_case(7, SMALL_SHAPE)
    from_generator = make_phantom_case(np.random.default_rng(7), SMALL_SHAPE)
    assert from_seed.keys() == {*MODALITIES, "seg"}
    for name, volume in from_seed.items():
        np.testing.assert_array_equal(volume, from_generator[name])


def test_make_phantom_case_at_another_time_has_another_tumour_in_the_same_brain():
    case = make_phantom_case(7, SMALL_SHAPE)
    earlier = make_phantom_case(7, SMALL_SHAPE, tumour_growth=0.4)
    sizes = [np.count_nonzero(drawn["seg"]) for drawn in (earlier, case)]
    assert 0.3 < sizes[0] / sizes[1] < 0.5
    heads = [drawn["t1"] > 0 for drawn in (earlier, case)]
    assert np.count_nonzero(heads[0] != heads[1]) < 0.1 * np.count_nonzero(heads[1])
    assert np.count_nonzero((earlier["seg"] > 0) & (case["seg"] > 0)) > 0.7 * sizes[0]
    for growth in (0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"`tumour_growth` must be a finite number above 0, got {growth}"):
            make_phantom_case(7, SMALL_SHAPE, tumour_growth=growth)


def test_make_phantom_case_is_skull_stripped(cases):
    for case in cases:
        brain = case["t1"] > 0
        assert all(volume.dtype == np.int16 and volume.shape == SHAPE for volume in case.values())
        assert all(case[name].min() == 0 for name in MODALITIES)
        assert all(np.array_equal(case[name] > 0, brain) for name in MODALITIES)
        assert not (case["seg"] > 0)[~brain].any()
        assert 1.1e6 < brain.sum() * 2.5**3 < 1.9e6  # mm^3
        edges = [brain[[0, -1]], brain[:, [0, -1]], brain[:, :, [-1]]]
        assert not any(edge.any() for edge in edges)
        assert brain[48, 48, 31]
        width, length = np.ptp(np.argwhere(brain)[:, :2], axis=0)
        assert width < length


def test_make_phantom_case_tumours_are_nested_and_varied(cases):
    fractions, enhancing, necrotic, in_tumour, rims, on_left = [], [], [], [], [], []
    for case in cases:
        seg, brain = case["seg"], case["t1"] > 0
        core = np.isin(seg, [1, 4])
        assert set(np.unique(seg)) <= {0, 1, 2, 4}
        assert core.any()
        assert (seg == 2).any()
        fractions.append((seg > 0).sum() / brain.sum())
        enhancing.append((seg == 4).any())
        necrotic.append((seg == 1).any())
        surroundings = touching(core) & ~core
        in_tumour.append((seg[surroundings] == 2).mean())
        if enhancing[-1] and necrotic[-1]:
            # The rim lies around the necrosis: what touches necrosis from outside enhances, nearly everywhere.
            outside = touching(seg == 1) & (seg != 1) & (seg > 0)
            rims.append((seg[outside] == 4).mean())
        on_left.append(np.argwhere(core)[:, 0].mean() > SHAPE[0] / 2)
    assert 0.01 < min(fractions) < 0.03
    assert 0.06 < max(fractions) < 0.12
    assert np.mean(in_tumour) > 0.6  # 0.42 to 0.87 in BraTS, where cores reach cortex and ventricles too
    assert np.mean(rims) > 0.85
    assert 0.6 < np.mean(enhancing) < 1
    assert 0.6 < np.mean(necrotic)
    assert 0.2 < np.mean(on_left) < 0.8


def test_make_phantom_case_modalities_are_in_clinical_order(cases):
    for case in cases:
        fluid, grey, white = healthy_tissues(case)
        mean = {name: [case[name][tissue].mean() for tissue in (fluid, grey, white)] for name in MODALITIES}
        assert mean["t1ce"][0] < mean["t1ce"][1] < mean["t1ce"][2]
        assert mean["t2"][0] > 1.1 * mean["t2"][1] > 1.2 * mean["t2"][2]
        assert mean["flair"][0] < 0.6 * mean["flair"][2]
        oedema, enhancing = case["seg"] == 2, case["seg"] == 4
        assert case["flair"][oedema].mean() > 1.2 * mean["flair"][2]
        assert case["t2"][oedema].mean() > 1.2 * mean["t2"][2]
        if enhancing.any():
            assert case["t1ce"][enhancing].mean() > 1.15 * mean["t1ce"][2]
            assert case["t1ce"][enhancing].mean() > 1.3 * case["t1ce"][oedema].mean()


def test_make_phantom_case_white_matter_lies_inside_grey_and_is_brighter_in_t1(cases):
    for case in cases:
        healthy = case["seg"] == 0
        depth = (case["t1"] > 0).astype(int)
        for _ in range(10):
            depth += (depth == depth.max()) & ~touching(depth < depth.max())
        # From 3 to 8 mm below the surface there is cortex, 18 mm and more below it mostly white matter.
        shallow, deep = healthy & (depth >= 2) & (depth <= 3), healthy & (depth >= 7)
        assert np.median(case["t1"][shallow]) < 0.95 * np.median(case["t1"][deep])


def test_make_phantom_case_intensity_scale_differs_between_patients(cases):
    tops = np.array([[case[name].max() for name in MODALITIES] for case in cases])
    assert tops.min() > 150
    assert tops.max() < 2500
    assert (tops.max(axis=0) > 1.8 * tops.min(axis=0)).all()


def test_make_phantom_case_no_single_flair_threshold_solves_it(cases):
    best = []
    for case in cases:
        flair, tumour = case["flair"], case["seg"] > 0
        bright = [flair > level for level in np.quantile(flair[flair > 0], np.linspace(0.5, 0.995, 40))]
        best.append(max(2 * (mask & tumour).sum() / (mask.sum() + tumour.sum()) for mask in bright))
    assert 0.6 < np.mean(best) < 0.93


def test_phantom_command_line_writes_cohort(tmp_path, monkeypatch):
    from dataset_scripts.phantom.__main__ import main

    out = tmp_path / "cohort"
    arguments = ["--output_dir", str(out), "--num_patients", "1", "--shape", "48", "48", "31", "--seed", "3"]
    monkeypatch.setattr("sys.argv", ["phantom", *arguments])
    main()
    seg = nib.load(out / "Phantom_001" / "Phantom_001_seg.nii.gz")
    np.testing.assert_array_equal(np.asarray(seg.dataobj), make_phantom_case([3, 1], SMALL_SHAPE)["seg"])
