"""The metrics of volumes against MONAI and by hand, and the `evaluate` modules of these and of lesions."""

import doctest
import math
import os
import re
import shutil
import sys
import tracemalloc
from pathlib import Path

import evaluate
import forks
import numpy as np
import pytest
import torch
import yaml
from common import BRATS_REGIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from sam2unet_hf import metrics
from sam2unet_hf.cases_sam2unet import find_cases
from sam2unet_hf.metrics.lesion_functional import LESION_METRICS
from sam2unet_hf.metrics.space import render_metric_card
from sam2unet_hf.metrics.volume_functional import (
    ONE_EMPTY_MM,
    VOLUME_METRICS,
    count_voxels,
    dice,
    hausdorff_distance_95,
    score_volume,
    sensitivity,
    specificity,
)


BRATS_DIR = Path(os.environ.get("BRATS_DIR", Path(__file__).parents[2] / "shared" / "brats"))
FOLDER = Path(metrics.__file__).parent
MODULES = {
    "hausdorff_95": metrics.Hausdorff95,
    "hausdorff_95_pooled": metrics.Hausdorff95Pooled,
    "lesion_dice": metrics.LesionDice,
    "lesion_hausdorff_95": metrics.LesionHausdorff95,
    "lesion_report": metrics.LesionReport,
    "lesion_surface_distance": metrics.LesionSurfaceDistance,
    "normalized_surface_distance": metrics.NormalizedSurfaceDistance,
    "sensitivity": metrics.Sensitivity,
    "specificity": metrics.Specificity,
    "volume_dice": metrics.VolumeDice,
    "volume_report": metrics.VolumeReport,
}
METRICS = {
    "hausdorff_95": ("hausdorff95_mm",),
    "hausdorff_95_pooled": ("hausdorff95_pooled_mm",),
    "lesion_dice": ("lesion_dice", "matched_lesion_dice", "lesion_f1"),
    "lesion_hausdorff_95": ("lesion_hausdorff95_pooled_mm", "matched_lesion_hausdorff95_pooled_mm"),
    "lesion_report": LESION_METRICS,
    "lesion_surface_distance": (
        "lesion_nsd_1mm",
        "lesion_nsd_0.5mm",
        "matched_lesion_nsd_1mm",
        "matched_lesion_nsd_0.5mm",
    ),
    "normalized_surface_distance": ("nsd_1mm", "nsd_0.5mm"),
    "sensitivity": ("sensitivity",),
    "specificity": ("specificity",),
    "volume_dice": ("volume_dice",),
    "volume_report": VOLUME_METRICS,
}

pytestmark = pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI's own


def assert_agrees_with_monai(ours, prediction, reference, spacing):
    monai_metrics = pytest.importorskip("monai.metrics")
    pair = [torch.from_numpy(np.ascontiguousarray(mask)) for mask in (prediction, reference)]
    spacing = [float(length) for length in spacing]
    _, distances, _ = monai_metrics.utils.get_edge_surface_distance(*pair, spacing=spacing, symmetric=True)
    expected = max(np.percentile(each.double().numpy(), 95) for each in distances)
    assert ours == pytest.approx(expected, rel=1e-6, abs=1e-6)
    # MONAI itself takes the percentile in float32, with a place between two voxels that has some four digits.
    theirs = monai_metrics.compute_hausdorff_distance(
        *(mask[None, None] for mask in pair), include_background=True, percentile=95, spacing=spacing
    )
    assert ours == pytest.approx(theirs.item(), rel=1e-4)


def volume(shape, *places):
    mask = np.zeros(shape, dtype=bool)
    for place in places:
        mask[place] = True
    return mask


def make_mask(kind, shape, generator):
    if kind == "voxel":
        return volume(shape, tuple(generator.integers(shape)))
    if kind == "parts":
        # A box at the border, a voxel anywhere, and a box in the middle.
        middle = tuple(slice(size // 3, size // 3 + 2) for size in shape)
        return volume(shape, tuple(slice(0, 2) for _ in shape), tuple(generator.integers(shape)), middle)
    if kind == "noise":
        mask = generator.random(shape) < generator.choice([0.03, 0.5, 0.97])
    elif kind == "full":
        mask = np.ones(shape, dtype=bool)
    else:
        field = ndimage.gaussian_filter(generator.standard_normal(shape), 2)
        mask = field > np.quantile(field, generator.choice([0.3, 0.8, 0.95]))
    mask[tuple(generator.integers(shape))] = True
    return mask


KINDS = st.sampled_from(["voxel", "parts", "noise", "full", "blob", "blob"])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 18), st.integers(1, 14)),
    kinds=st.tuples(KINDS, KINDS),
    spacing=st.sampled_from([(1, 1, 1), (1, 1, 3), (0.9375, 0.9375, 5.5), (2.5, 0.7, 1.3)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_distance_agrees_with_monai(shape, kinds, spacing, seed):
    generator = np.random.default_rng(seed)
    prediction, reference = (make_mask(kind, shape, generator) for kind in kinds)
    ours = hausdorff_distance_95(prediction, reference, spacing)
    assert_agrees_with_monai(ours, prediction, reference, spacing)


def test_overlap_agrees_with_monai():
    monai_metrics = pytest.importorskip("monai.metrics")
    generator = np.random.default_rng(0)
    for kind in ("blob", "noise", "parts"):
        masks = [make_mask(kind, (15, 17, 9), generator) for _ in range(2)]
        pair = [torch.from_numpy(mask)[None, None].float() for mask in masks]
        confusion = monai_metrics.get_confusion_matrix(*pair)
        counts = count_voxels(*masks)
        for ours, theirs in ((dice, "f1 score"), (sensitivity, "sensitivity"), (specificity, "specificity")):
            expected = monai_metrics.compute_confusion_matrix_metric(theirs, confusion).item()
            assert ours(counts) == pytest.approx(expected, rel=1e-6), theirs


def test_distance_of_two_voxels_is_that_of_their_centres_in_mm():
    prediction, reference = volume((9, 9, 9), (1, 2, 3)), volume((9, 9, 9), (2, 4, 6))
    assert hausdorff_distance_95(prediction, reference) == pytest.approx(math.sqrt(1 + 4 + 9))
    assert hausdorff_distance_95(prediction, reference, (3, 2, 1)) == pytest.approx(math.sqrt(9 + 16 + 9))
    assert hausdorff_distance_95(prediction, prediction, (3, 2, 1)) == 0


def test_distance_is_the_95th_percentile_of_the_worse_direction():
    # 20 voxels in a row, of which the last lies k voxels away from the rest: the place of the percentile is 18.05.
    row = volume((1, 1, 40), np.s_[0, 0, :19], (0, 0, 30))
    rest = volume((1, 1, 40), np.s_[0, 0, :19])
    assert hausdorff_distance_95(row, rest) == pytest.approx(0.05 * 12)
    assert hausdorff_distance_95(rest, row) == pytest.approx(0.05 * 12)


def test_surface_is_what_has_a_face_outside_the_mask_or_at_the_border_of_the_volume():
    full = np.ones((7, 7, 7), dtype=bool)
    centre = volume((7, 7, 7), (3, 3, 3))
    # The surface of the full volume is its 218 outer voxels: 3 to sqrt(27) from the centre. Were the border of the
    # volume no surface, there would be none at all.
    outer = [
        math.dist((x, y, z), (3, 3, 3)) for x in range(7) for y in range(7) for z in range(7) if {0, 6} & {x, y, z}
    ]
    assert len(outer) == 218
    assert hausdorff_distance_95(full, centre) == pytest.approx(np.percentile(outer, 95))


def distance_by_definition(prediction, reference, spacing):
    """The distance between all pairs of surface voxels, without any of SciPy."""
    surfaces = []
    for mask in (prediction, reference):
        around = np.pad(mask, 1)
        faces = [np.roll(around, step, axis) for axis in range(3) for step in (-1, 1)]
        surfaces.append(np.argwhere(around & ~np.logical_and.reduce(faces)) * np.asarray(spacing))
    between = np.linalg.norm(surfaces[0][:, None] - surfaces[1], axis=-1)
    return max(np.percentile(between.min(axis=axis), 95) for axis in (0, 1))


@pytest.mark.parametrize("kinds", [("blob", "blob"), ("noise", "blob"), ("parts", "full"), ("voxel", "parts")])
@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.5, 1.25, 4)])
def test_distance_is_what_the_definition_says(kinds, spacing):
    generator = np.random.default_rng(len(kinds[0]))
    prediction, reference = (make_mask(kind, (9, 8, 7), generator) for kind in kinds)
    expected = distance_by_definition(prediction, reference, spacing)
    assert expected > 0
    assert hausdorff_distance_95(prediction, reference, spacing) == pytest.approx(expected, rel=1e-12)


def test_voxels_of_the_surface_count_the_same():
    # 64 surface voxels in one slice, 48 of them in the other mask too; 8 lie one voxel outside, 8 two.
    slab, shifted = volume((12, 12, 4), np.s_[2:10, 2:10, 1]), volume((12, 12, 4), np.s_[2:10, 4:12, 1])
    assert hausdorff_distance_95(slab, shifted, (1, 1, 5)) == 2
    assert hausdorff_distance_95(slab, shifted, (1, 7, 5)) == 14


SHAPE = (5, 4, 6)
SOME, FULL, NONE = volume(SHAPE, np.s_[1:3, 1:3, 1:3]), np.ones(SHAPE, dtype=bool), np.zeros(SHAPE, dtype=bool)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        (NONE, NONE, {"volume_dice": 1, "sensitivity": 1, "specificity": 1, "hausdorff95_mm": 0}),
        (SOME, NONE, {"volume_dice": 0, "sensitivity": 1, "specificity": 112 / 120, "hausdorff95_mm": 373.12866}),
        (NONE, SOME, {"volume_dice": 0, "sensitivity": 0, "specificity": 1, "hausdorff95_mm": 373.12866}),
        (FULL, NONE, {"volume_dice": 0, "sensitivity": 1, "specificity": 0, "hausdorff95_mm": 373.12866}),
        (NONE, FULL, {"volume_dice": 0, "sensitivity": 0, "specificity": 1, "hausdorff95_mm": 373.12866}),
        (SOME, FULL, {"volume_dice": 16 / 128, "sensitivity": 8 / 120, "specificity": 1}),
        (FULL, SOME, {"volume_dice": 16 / 128, "sensitivity": 1, "specificity": 0}),
        (SOME, SOME, {"volume_dice": 1, "sensitivity": 1, "specificity": 1, "hausdorff95_mm": 0}),
    ],
)
def test_empty_and_full_regions(prediction, reference, expected):
    scores = score_volume(prediction, reference, regions={"lesion": [1]})["lesion"]
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    counts = count_voxels(prediction, reference)
    assert (dice(counts), sensitivity(counts), specificity(counts)) == tuple(scores[m] for m in VOLUME_METRICS[:3])


def test_distance_where_one_is_empty_may_be_another():
    assert pytest.approx(math.sqrt(240**2 + 240**2 + 155**2)) == ONE_EMPTY_MM
    assert hausdorff_distance_95(SOME, NONE, one_empty_mm=374) == 374
    assert score_volume(SOME, NONE, regions={"lesion": [1]}, one_empty_mm=374)["lesion"]["hausdorff95_mm"] == 374
    assert hausdorff_distance_95(NONE, NONE, one_empty_mm=374) == 0


def random_labels(seed, shape=(14, 12, 10)):
    """Nested blobs of oedema, necrosis and enhancing tumour, and the same moved and torn."""
    generator = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(generator.standard_normal(shape), 2)
    field /= field.max()
    reference = np.select([field > 0.8, field > 0.5, field > 0.2], [3, 1, 2], 0).astype(np.uint8)
    prediction = np.where(generator.random(shape) < 0.05, 2, np.roll(reference, 1, axis=0)).astype(np.uint8)
    return prediction, reference


def test_regions_join_labels():
    prediction, reference = random_labels(0)
    scores = score_volume(prediction, reference, spacing=(1, 2, 3))
    assert list(scores) == ["WT", "TC", "ET"]
    for name, ids in BRATS_REGIONS.items():
        pair = np.isin(prediction, ids), np.isin(reference, ids)
        assert all(mask.any() for mask in pair)
        counts = count_voxels(*pair)
        assert scores[name] == {
            "volume_dice": dice(counts),
            "sensitivity": sensitivity(counts),
            "specificity": specificity(counts),
            "hausdorff95_mm": hausdorff_distance_95(*pair, (1, 2, 3)),
        }
    assert len({scores[name]["volume_dice"] for name in scores}) == 3
    # Labels of another data set: 4 is enhancing tumour, 9 nothing.
    renamed = [np.where(array == 3, 4, array) for array in (prediction, reference)]
    renamed[0][0, 0, 0] = 9
    regions = {"WT": [1, 2, 4], "ET": np.array([4])}
    other = score_volume(*renamed, regions=regions, spacing=(1, 2, 3))
    assert other["ET"] == scores["ET"]


def test_metrics_are_computed_alone():
    prediction, reference = random_labels(1)
    scores = score_volume(prediction, reference)
    for metric in VOLUME_METRICS:
        alone = score_volume(prediction, reference, [metric])
        assert alone == {name: {metric: scores[name][metric]} for name in scores}


LABELS = {
    "int64": lambda x: x.astype(np.int64),
    "uint64": lambda x: x.astype(np.uint64),
    "float64": lambda x: x.astype(np.float64),
    "float16": lambda x: x.astype(np.float16),
    "torch": torch.from_numpy,
    "bfloat16": lambda x: torch.from_numpy(x).bfloat16(),
    "list": lambda x: x.tolist(),
    "Fortran order": np.asfortranarray,
    "turned": lambda x: np.ascontiguousarray(x.T).T,
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_may_come_as(kind):
    prediction, reference = random_labels(2)
    expected = score_volume(prediction, reference)
    assert score_volume(LABELS[kind](prediction), LABELS[kind](reference)) == expected


@pytest.mark.parametrize("axes", [(1, 2, 0), (2, 0, 1), (0, 2, 1)])
def test_axes_may_have_any_order_if_the_spacing_has_it_too(axes):
    prediction, reference = random_labels(3)
    spacing = np.array([1.0, 2.0, 3.5])
    turned = score_volume(prediction.transpose(axes), reference.transpose(axes), spacing=spacing[list(axes)])
    expected = score_volume(prediction, reference, spacing=spacing)
    for region, scores in expected.items():
        assert turned[region] == pytest.approx(scores, rel=1e-12)


def test_empty_margins_change_nothing_but_specificity():
    prediction, reference = random_labels(4)
    prediction[[0, -1]] = reference[[0, -1]] = 0
    prediction[:, [0, -1]] = reference[:, [0, -1]] = 0
    prediction[:, :, [0, -1]] = reference[:, :, [0, -1]] = 0
    expected = score_volume(prediction, reference)
    padded = score_volume(np.pad(prediction, ((9, 3), (0, 5), (7, 7))), np.pad(reference, ((9, 3), (0, 5), (7, 7))))
    for region, scores in expected.items():
        for metric in ("volume_dice", "sensitivity"):
            assert padded[region][metric] == scores[metric]
        assert padded[region]["hausdorff95_mm"] == pytest.approx(scores["hausdorff95_mm"], rel=1e-12)
        assert padded[region]["specificity"] > scores["specificity"]


@pytest.mark.skipif(not BRATS_DIR.is_dir(), reason="no BraTS scans; set BRATS_DIR")
def test_real_masks_agree_with_monai():
    masks = [case.read_mask() for case in find_cases(BRATS_DIR)[:2]]
    assert [mask.voxels.shape for mask in masks] == [(240, 240, 155)] * 2
    assert [mask.spacing_mm for mask in masks] == [(1, 1, 1)] * 2
    for mask, spacing in zip(masks, [(1.0, 1.0, 1.0), (0.5, 1.2, 3.0)], strict=True):
        reference = mask.voxels
        shifted = np.roll(reference, (3, -2, 1), axis=(0, 1, 2))
        eroded = reference * ndimage.binary_erosion(reference > 0, iterations=2)
        for prediction in (shifted, eroded):
            # The box around the tumour spares MONAI some work.
            box = tuple(slice(max(int(at.min()) - 4, 0), int(at.max()) + 5) for at in np.nonzero(reference))
            scores = score_volume(prediction, reference, spacing=spacing)
            assert scores["WT"]["hausdorff95_mm"] > 0
            for name, ids in BRATS_REGIONS.items():
                pair = np.isin(prediction[box], ids), np.isin(reference[box], ids)
                assert_agrees_with_monai(scores[name]["hausdorff95_mm"], *pair, spacing)
    same = score_volume(reference, reference)
    assert all(list(values.values()) == [1, 1, 1, 0] for values in same.values())


def labels(*values):
    return np.array(values).reshape(1, 1, -1)


@pytest.mark.parametrize(
    ("prediction", "reference", "options", "message"),
    [
        (labels(1, 2), labels(1, 2, 3), {}, r"same shape, got \(1, 1, 2\) and \(1, 1, 3\)\. Resample the prediction"),
        (labels(1, np.nan), labels(1, 2), {}, r"`prediction` must hold label ids, got nan\. Turn probabilities"),
        (labels(1, 2), labels(1, np.inf), {}, r"`reference` must hold label ids, got inf\."),
        (labels(1, 0.25), labels(1, 2), {}, r"`prediction` must hold label ids, got 0\.25\. .*nearest neighbour"),
        (labels(1, -1), labels(1, 2), {}, r"`prediction` must hold label ids >= 0, got -1\. Write 0"),
        (labels(1, 2), labels(1, 4), {}, r"`reference` must hold the label ids 0 to 3, got 4\. Map the 4 of BraTS"),
        (labels(True), labels(1), {}, r"`prediction` holds booleans, which is one region.*regions=\{\"WT\": \[1\]\}"),
        (np.zeros((4, 5)), labels(1), {}, r"`prediction` must have three axes, got shape \(4, 5\) of type float64\."),
        (labels(1), np.zeros((2, 3, 4, 5)), {}, r"`reference` must have three axes, got shape \(2, 3, 4, 5\)"),
        (np.zeros((0, 4, 4)), labels(1), {}, r"`prediction` must have three axes, got shape \(0, 4, 4\)"),
        (labels("a"), labels(1), {}, r"`prediction` must have three axes, got shape \(1, 1, 1\) of type <U1"),
        (labels(1), labels(1), {"spacing": (1, 1)}, r"`spacing` must be three lengths above 0.*got \(1, 1\)\. Take"),
        (labels(1), labels(1), {"spacing": 1}, r"`spacing` must be three lengths above 0 in mm.*got 1\."),
        (labels(1), labels(1), {"spacing": (1, 0, 1)}, r"`spacing` must be three lengths.*got \(1, 0, 1\)"),
        (labels(1), labels(1), {"spacing": (1, 1, -2)}, r"`spacing` must be three lengths.*got \(1, 1, -2\)"),
        (labels(1), labels(1), {"spacing": (1, 1, math.nan)}, r"`spacing` must be three lengths.*got \(1, 1, nan\)"),
        (labels(1), labels(1), {"spacing": "1mm"}, r"`spacing` must be three lengths.*got '1mm'"),
        (labels(1), labels(1), {"one_empty_mm": -1}, r"`one_empty_mm` must be a length >= 0 in mm, got -1\. Pass 374"),
        (labels(1), labels(1), {"one_empty_mm": math.nan}, r"`one_empty_mm` must be a length >= 0 in mm, got nan"),
        (labels(1), labels(1), {"one_empty_mm": "far"}, r"`one_empty_mm` must be a length >= 0 in mm, got 'far'"),
        (labels(1), labels(1), {"regions": {}}, r"`regions` must map names to label ids, such as .*, got \{\}"),
        (labels(1), labels(1), {"regions": ["WT"]}, r"`regions` must map names to label ids, such as .*\['WT'\]"),
        (labels(1), labels(1), {"regions": {"ET": []}}, r"`regions\['ET'\]` must list label ids >= 1.*got \[\]"),
        (labels(1), labels(1), {"regions": {"ET": [0]}}, r"`regions\['ET'\]` must list label ids >= 1.*got \[0\]"),
        (labels(1), labels(1), {"regions": {"ET": 3}}, r"`regions\['ET'\]` must list label ids >= 1.*got 3\."),
        (labels(1), labels(1), {"regions": {"ET": "3"}}, r"`regions\['ET'\]` must list label ids >= 1.*got '3'"),
        (labels(1), labels(1), {"regions": {"ET": [0.5]}}, r"`regions\['ET'\]` must list label ids >= 1.*\[0\.5\]"),
        (labels(1), labels(1), {"metrics": ["iou"]}, r"`metrics` must be among volume_dice, .*, got iou"),
    ],
)
def test_wrong_input_raises(prediction, reference, options, message):
    with pytest.raises(ValueError, match=message):
        score_volume(prediction, reference, **options)


def test_masks_hold_0_and_1():
    with pytest.raises(ValueError, match=r"`reference` must be a mask of 0 and 1, got 3\. Pick a region"):
        hausdorff_distance_95(labels(1, 0), labels(3, 0))
    with pytest.raises(ValueError, match=r"same shape, got \(1, 1, 1\) and \(1, 1, 2\)"):
        count_voxels(labels(1), labels(1, 0))
    assert count_voxels(labels(1.0, 0.0), labels(True, True)) == (1, 1, 2, 2)


# The `evaluate` modules


@pytest.fixture(scope="module")
def patients():
    """Label volumes of three sizes, one without tumour that was predicted nevertheless."""
    pairs = [random_labels(5), random_labels(6, (9, 16, 8)), random_labels(7, (10, 10, 10))]
    pairs[1] = (pairs[1][0], np.zeros_like(pairs[1][1]))
    return [list(volumes) for volumes in zip(*pairs, strict=True)]


def keys_of(name, regions=BRATS_REGIONS):
    return {
        key
        for metric in METRICS[name]
        for key in (metric, f"{metric}_per_patient", *(f"{metric}_{region}" for region in regions))
    }


@pytest.mark.parametrize("name", MODULES)
def test_loaded_by_path_it_is_the_class(name, patients, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predictions, references = patients
    loaded = evaluate.load(str(FOLDER / f"{name}.py"))
    # `evaluate` makes the name of that of the class.
    assert loaded.name == name.replace("_95", "95")
    result = loaded.compute(predictions=predictions, references=references)
    assert result == MODULES[name]().compute(predictions=predictions, references=references)
    assert set(result) == keys_of(name)


def test_all_modules_load_outside_the_checkout_without_network(tmp_path):
    # A folder per module, as a Space has it.
    for name in MODULES:
        (tmp_path / name).mkdir()
        shared = ("lesion_functional", "streaming_metric", "volume_functional", "volume_metric")
        if "lesion_functional" not in (FOLDER / f"{name}.py").read_text():
            shared = shared[1:]
        for file in (name, *shared):
            shutil.copy(FOLDER / f"{file}.py", tmp_path / name)
    code = f"""
import socket, sys
def refuse(*args, **kwargs):
    raise OSError("there is no network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.modules["sam2unet_hf"] = None
import evaluate
for name in {list(MODULES)}:
    result = evaluate.load(name).compute(predictions=[[[[3, 1]]]], references=[[[[3, 0]]]])
    print(name, sorted(result))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
    environment |= {"HF_HOME": str(tmp_path / "home")}
    run = forks.run(["-c", code], cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [f"{name} {sorted(keys_of(name))}" for name in MODULES]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_card_and_module_run(name, monkeypatch):
    monkeypatch.chdir(FOLDER)
    card = doctest.DocTestParser().get_doctest(render_metric_card(name), {}, name, None, 0)
    assert doctest.DocTestRunner().run(card).failed == 0
    assert len(re.findall(r"^```python\n", card.docstring, flags=re.MULTILINE)) == 2
    assert sum(bool(example.want) for example in card.examples) >= 2
    finder = doctest.DocTestFinder(exclude_empty=True)
    (module_test,) = finder.find(MODULES[name], module=sys.modules[MODULES[name].__module__], globs={})[:1]
    assert len(module_test.examples) == 5
    assert doctest.DocTestRunner().run(module_test).failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_cards_have_what_a_space_needs(name):
    text = render_metric_card(name)
    _, front, body = text.split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["sdk"] == "gradio"
    assert data["app_file"] == "app.py"
    assert {"evaluate", "metric"} <= set(data["tags"])
    assert " ".join(MODULES[name]().description.split()) == data["description"]
    assert re.search(r"doi = \{10\.\d{4,}/\S+\}", body)
    for heading in ("How to use", "Inputs", "Output", "Special volumes", "Citation"):
        assert f"\n## {heading}\n" in body
    for option in MODULES[name]()._options:
        assert f"- `{option}`: " in body, option
        assert f"    {option}: " in MODULES[name]().inputs_description, option


def test_values_are_those_of_each_patient_and_their_means(patients):
    predictions, references = patients
    result = metrics.VolumeReport().compute(predictions=predictions, references=references, spacing=(1, 1, 2))
    scores = [score_volume(*pair, spacing=(1, 1, 2)) for pair in zip(predictions, references, strict=True)]
    for metric in VOLUME_METRICS:
        means = []
        for region in BRATS_REGIONS:
            values = [patient[region][metric] for patient in scores]
            assert result[f"{metric}_per_patient"][region] == values
            assert result[f"{metric}_{region}"] == pytest.approx(np.mean(values), rel=1e-14)
            means.append(np.mean(values))
        assert result[metric] == pytest.approx(np.mean(means), rel=1e-14)
    assert result["volume_dice_per_patient"]["WT"][1] == 0
    assert result["hausdorff95_mm_per_patient"]["WT"][1] == ONE_EMPTY_MM


def test_modules_for_one_metric_agree_with_the_reports(patients):
    predictions, references = patients
    report = metrics.VolumeReport().compute(predictions=predictions, references=references)
    report |= metrics.LesionReport().compute(predictions=predictions, references=references)
    parts = {}
    for name in MODULES.keys() - {"lesion_report", "volume_report"}:
        parts |= MODULES[name]().compute(predictions=predictions, references=references)
    assert parts == report


def test_all_ways_to_add_patients_give_the_same(patients):
    predictions, references = patients
    metric = metrics.VolumeReport()
    expected = metric.compute(predictions=predictions, references=references)
    for prediction, reference in zip(predictions, references, strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert len(metric) == 3
    assert metric.compute() == expected
    metric.add_batch(predictions=predictions[:1], references=references[:1])
    assert metric.compute(predictions=predictions[1:], references=references[1:]) == expected
    assert len(metric) == 0
    assert metric.compute(predictions=iter(predictions), references=(array for array in references)) == expected


def test_averages_do_not_depend_on_the_order_of_patients(patients):
    predictions, references = patients
    forth = metrics.VolumeReport().compute(predictions=predictions, references=references)
    back = metrics.VolumeReport().compute(predictions=predictions[::-1], references=references[::-1])
    assert back["volume_dice_per_patient"]["WT"] == forth["volume_dice_per_patient"]["WT"][::-1]
    for key in keys_of("volume_report"):
        if not key.endswith("_per_patient"):
            assert back[key] == forth[key]


def test_combine_joins_the_modules(patients, monkeypatch):
    predictions, references = patients
    monkeypatch.chdir(FOLDER)
    combined = evaluate.combine(["./volume_dice.py", "./hausdorff_95.py", metrics.Specificity()])
    together = combined.compute(predictions=predictions, references=references)
    assert set(together) == keys_of("volume_dice") | keys_of("hausdorff_95") | keys_of("specificity")
    for prediction, reference in zip(predictions, references, strict=True):
        combined.add(prediction, reference)
    assert combined.compute() == together
    combined.add_batch(predictions, references)
    assert combined.compute() == together


def test_spacing_is_one_for_all_or_one_per_patient(patients):
    predictions, references = patients
    spacings = [(1, 1, 3), (0.5, 2, 1), np.array([2.0, 2.0, 2.0])]
    metric = metrics.Hausdorff95()
    each = metric.compute(predictions=predictions, references=references, spacing=spacings)
    for prediction, reference, spacing in zip(predictions, references, spacings, strict=True):
        metric.add(prediction=prediction, reference=reference, spacing=spacing)
    assert metric.compute() == each
    metric.add(prediction=predictions[0], reference=references[0], spacing=spacings[0])
    metric.add_batch(predictions=predictions[1:], references=references[1:], spacing=np.array(spacings[1:]))
    assert metric.compute() == each
    for index, spacing in enumerate(spacings):
        one = metrics.Hausdorff95(spacing=spacing).compute(predictions=predictions, references=references)
        for region in BRATS_REGIONS:
            values = one["hausdorff95_mm_per_patient"][region]
            assert values[index] == each["hausdorff95_mm_per_patient"][region][index]
    assert one != each
    for wrong, message in (
        (spacings[:2], "one prediction, one reference, one spacing, but patient 2 has no spacing"),
        (spacings * 2, "one prediction, one reference, one spacing, but patient 3 has no prediction"),
        ([(1, 1, 1), (1, 1), (1, 1, 1)], r"Patient 1: `spacing` must be three lengths above 0 .* got \(1, 1\)"),
        ((1, 1), r"Patient 0: `spacing` must be three lengths above 0 .* got \[1, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.add_batch(predictions=predictions, references=references, spacing=wrong)
    assert len(metric) == 0


def test_options_go_to_load_or_compute(patients, monkeypatch):
    predictions, references = patients
    monkeypatch.chdir(FOLDER)
    options = {"regions": {"all": [1, 2, 3]}, "one_empty_mm": 374}
    at_compute = metrics.Hausdorff95().compute(predictions=predictions, references=references, **options)
    assert set(at_compute) == {"hausdorff95_mm", "hausdorff95_mm_all", "hausdorff95_mm_per_patient"}
    assert at_compute["hausdorff95_mm_per_patient"]["all"][1] == 374
    metric = evaluate.load("./hausdorff_95.py", **options)
    metric.add_batch(predictions=predictions[:2], references=references[:2])
    for changed in ({"one_empty_mm": 0}, {"regions": {"WT": [1]}}, {"spacing": (1, 1, 2)}):
        with pytest.raises(ValueError, match=f"2 patients were added with another value of {next(iter(changed))}"):
            metric.compute(**changed)
    rest = {"predictions": predictions[2:], "references": references[2:]}
    assert metric.compute(**rest, **options) == at_compute


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"spacings": (1, 1, 1)}, TypeError, "VolumeDice has no option spacings; it has regions"),
        ({"spacing": (1, 1, 1)}, TypeError, "VolumeDice has no option spacing; it has regions"),
        ({"regions": ["WT"]}, ValueError, "`regions` must map names to label ids"),
        ({"num_process": 2}, ValueError, "`num_process` must be 1 for VolumeDice, got 2. Gather the scores"),
    ],
)
def test_wrong_options_raise(options, error, message):
    with pytest.raises(error, match=message):
        metrics.VolumeDice(**options)
    if "num_process" not in options:
        with pytest.raises(error, match=message):
            metrics.VolumeDice().compute(predictions=[labels(1)], references=[labels(1)], **options)


def test_a_wrong_patient_costs_nothing_and_is_named(patients):
    predictions, references = patients
    metric = metrics.VolumeDice()
    expected = metric.compute(predictions=predictions, references=references)
    metric.add(prediction=predictions[0], reference=references[0])
    with pytest.raises(ValueError, match=r"Patient 1: `prediction` must hold label ids, got 0\.5"):
        metric.add_batch(predictions=[predictions[1], labels(0.5)], references=[references[1], labels(1)])
    with pytest.raises(ValueError, match=r"Patient 0: .* same shape, got \(9, 16, 8\) and \(10, 10, 10\)"):
        metric.compute(predictions=predictions[1:2], references=references[2:])
    with pytest.raises(ValueError, match="one prediction, one reference, but patient 1 has no reference"):
        metric.compute(predictions=predictions[1:], references=references[1:2])
    # One patient in place of a list of them.
    with pytest.raises(
        ValueError, match=r"Patient 0: .* three axes, got shape \(12, 10\).*Several patients go in a list"
    ):
        metric.add_batch(predictions=predictions[0], references=references[0])
    with pytest.raises(TypeError, match="`predictions` and `references` together"):
        metric.compute(predictions=predictions)
    with pytest.raises(TypeError, match="`prediction` and `reference` together"):
        metric.add(prediction=predictions[0])
    with pytest.raises(TypeError, match="takes `predictions` and `references`, got sources"):
        metric.add_batch(predictions=predictions, references=references, sources=[])
    assert len(metric) == 1
    assert metric.compute(predictions=predictions[1:], references=references[1:]) == expected
    with pytest.raises(ValueError, match="There is nothing to average"):
        metric.compute()


def test_memory_does_not_grow_with_patients(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    reference = np.zeros((40, 40, 40), dtype=np.uint8)
    reference[5:9, 5:9, 5:9] = 3
    metric = metrics.VolumeReport(cache_dir=str(tmp_path))
    metric.add(prediction=reference.copy(), reference=reference)
    tracemalloc.start()
    try:
        metric.add_batch(
            predictions=(reference.copy() for _ in range(30)), references=(reference.copy() for _ in range(30))
        )
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Less than one volume of 64,000 bytes stays, and at no time were there many.
    assert kept < reference.nbytes
    assert peak < 15 * reference.nbytes
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) == 0
    assert len(metric) == 31
