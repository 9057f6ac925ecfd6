"""The metrics against `py_sod_metrics`, which the field uses, and by hand."""

import itertools
import math
import pickle
import random
import warnings

import numpy as np
import py_sod_metrics
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from scipy import ndimage

from sam2unet_hf.metrics import distances
from sam2unet_hf.metrics.functional import METRICS, num_columns, score, to_mask, to_probability
from sam2unet_hf.metrics.segmentation_metric import Accumulator


MINMAX = {"normalize": "minmax"}
NAN = float("nan")


def result(prediction, reference, metrics=METRICS, **options):
    accumulator = Accumulator(metrics)
    accumulator.add(score(prediction, reference, metrics, **options))
    return accumulator.result()


def field_result(prediction, reference, normalize, beta_squared=0.3):
    """The same keys from `py_sod_metrics`."""
    options = {"with_dynamic": True, "with_adaptive": True, "with_binary": True}
    handlers = {
        "dice": py_sod_metrics.DICEHandler(**options),
        "iou": py_sod_metrics.IOUHandler(**options),
        "f_beta": py_sod_metrics.FmeasureHandler(**options, beta=beta_squared),
    }
    thresholded = py_sod_metrics.FmeasureV2(handlers)
    e_measure, mae = py_sod_metrics.Emeasure(), py_sod_metrics.MAE()
    s_measure = py_sod_metrics.Smeasure()
    weighted = py_sod_metrics.WeightedFmeasure()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # means of empty quadrants
        for metric in (thresholded, e_measure, mae, s_measure, weighted):
            metric.step(prediction, reference, normalize=normalize)
        s_value = float(s_measure.get_results()["sm"])
    values = {}
    for name, value in thresholded.get_results().items():
        values |= {name: value["binary"], f"adaptive_{name}": value["adaptive"]}
        values |= {f"mean_{name}": value["dynamic"].mean(), f"max_{name}": value["dynamic"].max()}
    e_values = e_measure.get_results()["em"]
    values |= {"adaptive_e_measure": e_values["adp"], "mean_e_measure": e_values["curve"].mean()}
    values |= {"max_e_measure": e_values["curve"].max(), "s_measure": s_value, "mae": mae.get_results()["mae"]}
    return {name: float(value) for name, value in values.items()} | {
        "weighted_f_beta": float(weighted.get_results()["wfm"])
    }


def make_mask(kind, shape, generator):
    if kind == "empty":
        return np.zeros(shape, dtype=bool)
    if kind == "full":
        return np.ones(shape, dtype=bool)
    if kind == "pixel":
        mask = np.zeros(shape, dtype=bool)
        mask[tuple(generator.integers(shape))] = True
        return mask
    if kind == "few":
        mask = np.zeros(shape, dtype=bool)
        mask.flat[generator.integers(0, mask.size, 5)] = True
        return mask
    if kind == "row":
        mask = np.zeros(shape, dtype=bool)
        mask[generator.integers(shape[0])] = True
        return mask
    if kind == "noisy":
        return generator.random(shape) < generator.choice([0.02, 0.5, 0.98])
    field = ndimage.gaussian_filter(generator.standard_normal(shape), min(shape) / 6)
    return field > np.quantile(field, generator.choice([0.2, 0.7, 0.95]))


def make_prediction(kind, mask, generator):
    if kind == "constant":
        return np.full(mask.shape, generator.choice([0.0, 1.0, 0.5, generator.random()]))
    if kind == "noisy":
        return generator.random(mask.shape)
    if kind == "binary":
        return np.logical_xor(mask, generator.random(mask.shape) < 0.1).astype(np.float64)
    if kind == "right":
        return mask.astype(np.float64)
    if kind == "sparse":
        return np.where(generator.random(mask.shape) < 0.1, generator.random(mask.shape), 0.0)
    field = ndimage.gaussian_filter(mask + 0.3 * generator.standard_normal(mask.shape), 2)
    return 1 / (1 + np.exp(-12 * (field - 0.5)))


PAIRS = {
    "shape": st.tuples(st.integers(1, 97), st.integers(1, 131)),
    "mask_kind": st.sampled_from(["empty", "full", "pixel", "few", "row", "noisy", "smooth", "smooth"]),
    "prediction_kind": st.sampled_from(["constant", "noisy", "binary", "right", "sparse", "smooth", "smooth"]),
    "seed": st.integers(0, 2**32 - 1),
}


def assert_agree(ours, theirs):
    for name, value in theirs.items():
        if math.isnan(value):
            # The one exception: a quadrant of the S-measure without pixels, whose weight is 0 all the same.
            assert name == "s_measure"
            assert 0 <= ours[name] <= 1
        else:
            assert ours[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name


@settings(max_examples=400, deadline=None, derandomize=True)
@given(**PAIRS)
def test_probabilities_agree_with_py_sod_metrics(shape, mask_kind, prediction_kind, seed):
    generator = np.random.default_rng(seed)
    mask = make_mask(mask_kind, shape, generator)
    prediction = make_prediction(prediction_kind, mask, generator)
    ours = result(prediction, mask)
    assert_agree(ours, field_result(prediction, mask, normalize=False))
    assert set(ours) == set(field_result(prediction, mask, normalize=False)) | {"e_measure"}


@settings(max_examples=400, deadline=None, derandomize=True)
@given(**PAIRS)
def test_stretched_8_bit_maps_agree_with_py_sod_metrics(shape, mask_kind, prediction_kind, seed):
    generator = np.random.default_rng(seed)
    mask = make_mask(mask_kind, shape, generator)
    prediction = (make_prediction(prediction_kind, mask, generator) * 255).round().astype(np.uint8)
    reference = mask.astype(np.uint8) * 255
    assert_agree(result(prediction, reference, **MINMAX), field_result(prediction, reference, normalize=True))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**PAIRS, beta_squared=st.sampled_from([0.1, 1.0, 4.0]))
def test_options_agree_with_py_sod_metrics(shape, mask_kind, prediction_kind, seed, beta_squared):
    generator = np.random.default_rng(seed)
    mask = make_mask(mask_kind, shape, generator)
    prediction = make_prediction(prediction_kind, mask, generator)
    options = {"beta_squared": beta_squared}
    assert_agree(result(prediction, mask, **options), field_result(prediction, mask, normalize=False, **options))


HALF = np.array([[1, 1], [0, 0]], dtype=bool)
DOT = np.zeros((20, 20), dtype=bool)
DOT[10, 10] = True
EMPTY, FULL = np.zeros((2, 2), dtype=bool), np.ones((2, 2), dtype=bool)
# Prediction, mask, and what the values are by hand. With n pixels a perfect E is n / (n - 1).
SPECIAL = {
    "right": (
        HALF,
        HALF,
        {"dice": 1, "iou": 1, "f_beta": 1, "e_measure": 4 / 3, "s_measure": 1, "weighted_f_beta": 1},
    ),
    "wrong": (~HALF, HALF, {"dice": 0, "iou": 0, "f_beta": 0, "e_measure": 0, "mae": 1}),
    # Dice 2 * 1 / (1 + 2), IoU 1 / 2, P = 1 and R = 1/2: F = 1.3 * 0.5 / (0.3 + 0.5).
    "half found": ([[1.0, 0], [0, 0]], HALF, {"dice": 2 / 3, "iou": 0.5, "f_beta": 0.8125, "mae": 0.25}),
    "empty reference": (
        [[0.9, 0.1], [0, 0]],
        EMPTY,
        # At the threshold of 0 all is predicted, at 0.1 * 255 = 25 two pixels, and above one, until 0.9 * 255 = 229.
        {"dice": 0, "iou": 0, "mean_dice": 0, "adaptive_f_beta": 0, "weighted_f_beta": 0}
        | {"s_measure": 0.75, "e_measure": 1, "mean_e_measure": (25 * 2 + 204 * 3 + 26 * 4) / 3 / 256, "mae": 0.25},
    ),
    "full reference": (
        [[0.9, 0.1], [1, 1]],
        FULL,
        {"dice": 6 / 7, "iou": 3 / 4, "s_measure": 0.75, "e_measure": 1, "max_e_measure": 4 / 3, "mae": 0.25},
    ),
    "both empty": (
        EMPTY,
        EMPTY,
        {"dice": 0, "iou": 0, "f_beta": 0, "max_dice": 0, "weighted_f_beta": 0}
        | {"s_measure": 1, "e_measure": 4 / 3, "mae": 0, "adaptive_e_measure": 0},
    ),
    "both full": (FULL, FULL, {"dice": 1, "mean_iou": 1, "s_measure": 1, "e_measure": 4 / 3, "weighted_f_beta": 1}),
    # At twice its mean a constant predicts nothing.
    "constant": (np.full((2, 2), 0.6), HALF, {"dice": 2 / 3, "iou": 0.5, "adaptive_dice": 0, "mae": 0.5}),
    # At twice its mean of 0 everything is predicted.
    "zero": (EMPTY, HALF, {"dice": 0, "adaptive_dice": 2 / 3, "mae": 0.5}),
    # Far from the border; objects score 1/2 of (1 of 400 pixels * 0 + 399 * 1), regions 1 but for the mask's quadrant.
    "nothing found": (
        np.zeros((20, 20)),
        DOT,
        {"dice": 0, "weighted_f_beta": 0, "mae": 1 / 400, "s_measure": (399 / 400 + 1 - 11 * 11 / 400) / 2},
    ),
    "one pixel, found": ([[1.0]], [[1]], {"dice": 1, "iou": 1, "s_measure": 1, "weighted_f_beta": 1, "mae": 0}),
    "one pixel, missed": ([[0.0]], [[1]], {"dice": 0, "iou": 0, "s_measure": 0, "e_measure": 0, "mae": 1}),
    "one pixel, right E": ([[0.0]], [[0]], {"e_measure": 2.0**52, "s_measure": 1, "mae": 0}),
    "one row": (
        [[1.0, 1, 0, 0]],
        [[1, 0, 0, 0]],
        {"dice": 2 / 3, "iou": 0.5, "f_beta": 0.65 / 1.15},
    ),
    "last column": ([[0.0, 0, 1]], [[0, 0, 1]], {"dice": 1, "s_measure": 1, "weighted_f_beta": 1}),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_special_images_by_hand(case):
    prediction, reference, expected = SPECIAL[case]
    values = result(prediction, reference)
    assert {name: values[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert all(math.isfinite(value) for value in values.values())


@pytest.mark.parametrize("metric", ["dice", "iou", "f_beta", "weighted_f_beta"])
@pytest.mark.parametrize("value", [0.0, 1.0, NAN])
def test_zero_division_is_the_value_of_both_empty_and_of_nothing_else(metric, value):
    def values(prediction, reference):
        return result(prediction, reference, [metric], zero_division=value)

    assert values(EMPTY, EMPTY)[metric] == pytest.approx(value, nan_ok=True)
    for prediction, reference in ((HALF, EMPTY), (np.zeros((20, 20)), DOT)):
        assert values(prediction, reference)[metric] == 0
    assert values(HALF, HALF)[metric] == pytest.approx(1)


def test_curve_of_an_empty_image_is_zero_division_above_the_prediction():
    # At the threshold of 0 everything is predicted, so one of 256 is 0.
    assert result(EMPTY, EMPTY, ["dice"], zero_division=1)["mean_dice"] == pytest.approx(255 / 256)


@pytest.mark.parametrize(
    ("prediction", "reference"), [([[1.0]], [[1]]), ([[0.0]], [[0]]), (HALF, HALF), (EMPTY, EMPTY), (FULL, FULL)]
)
def test_e_measure_by_the_equation_of_the_paper_is_at_most_one(prediction, reference):
    assert result(prediction, reference, ["e_measure"], ddof=0)["e_measure"] == pytest.approx(1)


def test_weighted_f_beta_far_from_the_mask():
    # Farther than the table of weights reaches: the weight of a false pixel is 2.
    shape = (3, 700)
    mask, prediction = np.zeros(shape, dtype=bool), np.zeros(shape)
    mask[1, 0] = prediction[1, 0] = prediction[1, 690] = 1
    # TP = 1, FP = 2: P = 1/3, R = 1.
    assert result(prediction, mask, ["weighted_f_beta"])["weighted_f_beta"] == pytest.approx(0.5, abs=1e-12)
    assert_agree(result(prediction, mask), field_result(prediction, mask, normalize=False))


@pytest.mark.parametrize("size", [100, 352, 1024])
@pytest.mark.parametrize("pixels", [1, 3, 36])
def test_small_masks_in_large_images_agree_with_py_sod_metrics(size, pixels):
    generator = np.random.default_rng(size + pixels)
    mask = np.zeros((size, size), dtype=bool)
    mask.flat[generator.choice(size * size, pixels, replace=False)] = True
    for prediction in (mask * 1.0, mask * 0.9 + 0.05, make_prediction("smooth", mask, generator)):
        assert_agree(result(prediction, mask), field_result(prediction, mask, normalize=False))


def test_empty_background_changes_nothing_in_weighted_f_beta():
    # The background without prediction is cut off, ties of the nearest pixel must stay the same.
    generator = np.random.default_rng(0)
    # Away from the border, which lowers errors beside it.
    mask = np.pad(make_mask("smooth", (60, 70), generator), 3)
    prediction = make_prediction("noisy", mask, generator) * (ndimage.gaussian_filter(mask * 1.0, 3) > 0.01)
    padded = [np.pad(array, ((31, 17), (5, 43))) for array in (prediction, mask)]
    assert_agree(result(*padded), field_result(*padded, normalize=False))
    metrics = ["weighted_f_beta"]
    assert result(*padded, metrics) == result(prediction, mask, metrics)


@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (70, 1), (97, 131), (240, 240), (12, 700)])
@pytest.mark.parametrize("mask_kind", ["full", "pixel", "few", "row", "noisy", "smooth"])
def test_distances_are_those_of_scipy(shape, mask_kind, monkeypatch):
    mask = make_mask(mask_kind, shape, np.random.default_rng(0))
    mask[-1, 0] = True  # nothing is near an empty one
    expected, indices = ndimage.distance_transform_edt(~mask, return_indices=True)
    for small, dense in ((math.inf, 1), (0, 0), (0, 2)):
        monkeypatch.setattr(distances, "_SMALL", small)
        monkeypatch.setattr(distances, "_DENSE", dense)
        squared = distances.squared_distance(mask)
        assert np.array_equal(np.minimum(squared, 255**2), np.minimum(np.square(expected).round(), 255**2))
    # Where only some are needed, however few and far, their distances are the same.
    monkeypatch.setattr(distances, "_FEW", 1)
    for share in (0.001, 0.3):
        needed = np.random.default_rng(1).random(shape) < share
        squared = distances.squared_distance(mask, needed)
        assert np.array_equal(
            np.minimum(squared, 255**2)[needed], np.minimum(np.square(expected).round(), 255**2)[needed]
        )
    # All pixels around the mask have their nearest one in it, and of several the one that SciPy names.
    framed = np.pad(mask, distances.FRAME)
    at, nearest = distances.nearest_pixels(mask)
    named = np.ravel_multi_index(
        tuple(np.pad(index, distances.FRAME) + distances.FRAME for index in indices), framed.shape
    )
    assert np.array_equal(nearest, named.ravel()[at])
    around = ndimage.binary_dilation(framed, np.ones((7, 7))) & ~framed & np.pad(np.ones_like(mask), distances.FRAME)
    assert np.isin(np.flatnonzero(around), at).all()
    assert not framed.ravel()[at].any()


@pytest.mark.parametrize("size", [100, 352, 600])
@pytest.mark.parametrize("share", [0.15, 0.5, 0.9])
def test_masks_that_fill_much_of_the_image_agree_with_py_sod_metrics(size, share):
    generator = np.random.default_rng(size)
    field = ndimage.gaussian_filter(generator.standard_normal((size, size)), size / 16)
    left = np.broadcast_to(np.arange(size) < share * size, (size, size))
    for mask in (field > np.quantile(field, 1 - share), left):
        prediction = make_prediction("smooth", mask, generator)
        assert_agree(result(prediction, mask), field_result(prediction, mask, normalize=False))


@pytest.mark.parametrize("shape", [(1, 1), (9, 7), (353, 351), (200, 200)])
@pytest.mark.parametrize("mask_kind", ["empty", "full", "pixel", "row", "smooth"])
def test_maps_of_few_levels_agree_with_py_sod_metrics(shape, mask_kind):
    # Trained networks give maps that are almost all 0 and 255, whose levels are counted and whose errors are weighted
    # in other ways.
    generator = np.random.default_rng(0)
    mask = make_mask(mask_kind, shape, generator)
    grey = ndimage.gaussian_filter(mask * 255.0, 1)
    rare = generator.random(shape) < 0.01
    for prediction in (grey, np.where(rare, 128, grey), np.where(rare, 255 - grey, 255 * mask), np.zeros(shape)):
        prediction = prediction.round().astype(np.uint8)
        theirs = field_result(prediction, mask.astype(np.uint8) * 255, normalize=True)
        assert_agree(result(prediction, mask, **MINMAX), theirs)


def test_stretched_probabilities_are_those_of_minmax():
    generator = np.random.default_rng(0)
    mask = make_mask("smooth", (50, 40), generator)
    prediction = 0.2 + 0.3 * make_prediction("smooth", mask, generator)
    low, high = prediction.min(), prediction.max()
    expected = field_result((prediction - low) / (high - low), mask, normalize=False)
    assert_agree(result(prediction, mask, **MINMAX), expected)
    both = np.stack([prediction, prediction / 2])
    assert np.array_equal(*to_probability(both, "minmax"))


def test_measures_alone_equal_all_together():
    generator = np.random.default_rng(0)
    mask = make_mask("smooth", (50, 40), generator)
    prediction = make_prediction("noisy", mask, generator)
    together = score(prediction, mask)
    columns = 0
    for metric in METRICS:
        alone = score(prediction, mask, [metric])
        assert np.array_equal(alone, together[columns : columns + num_columns(metric)])
        columns += num_columns(metric)
    assert columns == len(together)


@pytest.mark.parametrize("metric", ["dice", "iou", "f_beta", "e_measure", "mae"])
def test_pixels_that_do_not_count_are_cut_out(metric):
    generator = np.random.default_rng(0)
    prediction, mask = generator.random((6, 8)), generator.random((6, 8)) < 0.4
    valid_mask = np.ones((6, 8), dtype=bool)
    valid_mask[:, 5:] = False
    assert np.array_equal(
        score(prediction, mask, [metric], valid_mask=valid_mask),
        score(prediction[:, :5].copy(), mask[:, :5].copy(), [metric]),
    )


def test_pixels_that_do_not_count_are_background_where_neighbours_matter():
    generator = np.random.default_rng(0)
    prediction, mask = generator.random((6, 8)), generator.random((6, 8)) < 0.4
    valid_mask = generator.random((6, 8)) < 0.8
    metrics = ["s_measure", "weighted_f_beta"]
    expected = score(prediction * valid_mask, mask & valid_mask, metrics)
    assert np.array_equal(score(prediction, mask, metrics, valid_mask=valid_mask), expected)
    assert np.isnan(score(prediction, mask, valid_mask=np.zeros_like(valid_mask))).all()


ONES = np.ones((2, 2))


@pytest.mark.parametrize(
    ("prediction", "reference", "options", "message"),
    [
        (ONES * 1.5, FULL, {}, r"`prediction` must hold .* got values from 1.5 to 1.5 of type float64.*sigmoid"),
        (-ONES, FULL, {}, r"`prediction` must hold .* got values from -1.0 to -1.0"),
        (ONES * NAN, FULL, {}, r"`prediction` must hold .* got NaN"),
        (
            ONES.astype(np.int64) * 300,
            FULL,
            {},
            r"`prediction` must hold .* got values from 300.0 to 300.0 of type int64",
        ),
        (ONES[0], FULL, {}, r"`prediction` must have shape \(height, width\).*got \(2,\).*go in a list"),
        (np.ones((2, 2, 2, 2)), FULL, {}, r"`prediction` must have shape .* got \(2, 2, 2, 2\)"),
        ([["a", "b"]], [[0, 1]], {}, r"`prediction` must have shape .* got \(1, 2\) of type <U1"),
        (np.ones((0, 2)), FULL, {}, r"`prediction` must have shape .* got \(0, 2\)"),
        (
            np.ones((40, 30, 3)),
            FULL,
            {},
            r"`prediction` of shape \(40, 30, 3\) looks like \(height, width, channels\)",
        ),
        (
            PILImage.new("RGB", (2, 2)),
            FULL,
            {},
            r"`prediction` must be an image of one channel, got .* mode RGB.*convert",
        ),
        (ONES, PILImage.new("P", (2, 2)), {}, r"`reference` must be an image of one channel, got .* mode P"),
        (
            ONES,
            np.uint8([[1, 0], [2, 255]]),
            {},
            r"`reference` must be a binary mask.*from 0 to 255 of type uint8",
        ),
        (ONES, FULL, {"zero_division": None}, r"`zero_division` must be 0, 1 or NaN, got None"),
        (ONES, FULL * 3, {}, r"`reference` must be a binary mask.*values from 3 to 3 of type int64.*`label_map == 1`"),
        (ONES, ONES * 0.5, {}, r"`reference` must be a binary mask.*values from 0.5 to 0.5"),
        (ONES, -FULL.astype(np.int8), {}, r"`reference` must be a binary mask.*values from -1 to -1"),
        (ONES, np.ones((2, 3)), {}, r"same shape, got \(2, 2\) and \(2, 3\)\. Resize the prediction"),
        (ONES, FULL, {"normalize": "max"}, r"`normalize` must be \"minmax\" or None, got 'max'"),
        (ONES, FULL, {"zero_division": 0.5}, r"`zero_division` must be 0, 1 or NaN, got 0.5"),
        (ONES, FULL, {"beta_squared": 0}, r"`beta_squared` must be above 0, got 0"),
        (ONES, FULL, {"ddof": 2}, r"`ddof` must be 0 or 1, got 2"),
        (ONES, FULL, {"metrics": ["dise"]}, r"`metrics` must be among dice, .*, got dise"),
    ],
)
def test_bad_input_raises(prediction, reference, options, message):
    with pytest.raises(ValueError, match=message):
        score(prediction, reference, **options)


def test_integers_are_masks_or_8_bit_maps():
    ones = np.ones((2, 2), dtype=np.uint8)
    assert to_probability(ones).max() == 1
    assert to_probability(ones, "minmax").max() == 1 / 255  # always an 8-bit map, as in py_sod_metrics
    assert to_probability(ones * 51).max() == 51 / 255
    assert to_mask([[0, 129], [128, 255]]).tolist() == [[False, True], [False, True]]
    assert to_mask(PILImage.fromarray(ones.astype(bool))).all()
    assert to_mask(torch.ones(2, 2)).all()


def random_scores(count, regions=2):
    generator = np.random.default_rng(0)
    shape = (24, 31)
    return [
        score(generator.random((regions, *shape)) ** 3, generator.random((regions, *shape)) < 0.2)
        for _ in range(count)
    ]


def test_averages_are_exact_in_any_order_and_grouping():
    scores = random_scores(40)
    expected = Accumulator()
    for image in scores:
        expected.add(image)
    # What exact arithmetic gives, rounded once; a unit of 2^-52 is the most a score may be off.
    exact = [math.fsum(column) / 40 for column in np.stack(scores).reshape(40, -1).T]
    np.testing.assert_allclose(expected.mean().ravel(), exact, rtol=0, atol=2**-52)
    order = random.Random(0)
    for _ in range(5):
        order.shuffle(scores)
        parts = [Accumulator() for _ in range(order.randint(1, 7))]
        for image in scores:
            order.choice(parts).add(image)
        merged = Accumulator()
        for part in parts:
            merged.merge(pickle.loads(pickle.dumps(part)))
        assert merged.images == 40
        assert np.array_equal(merged.mean(), expected.mean())
        assert merged.result(["a", "b"]) == expected.result(["a", "b"])


def test_accumulator_does_not_grow():
    accumulator = Accumulator()
    (image,) = random_scores(1)
    accumulator.add(image)
    size = len(pickle.dumps(accumulator))
    for _ in range(5000):
        accumulator.add(image)
    assert len(pickle.dumps(accumulator)) < size + 16
    np.testing.assert_allclose(accumulator.mean(), image, rtol=0, atol=2**-52)


def test_nan_is_left_out_of_averages():
    accumulator = Accumulator(["dice"])
    for prediction, reference in ((EMPTY, EMPTY), (HALF, HALF), (EMPTY, HALF)):
        accumulator.add(score(prediction, reference, ["dice"], zero_division=NAN))
    assert accumulator.result()["dice"] == 0.5
    assert math.isnan(result(EMPTY, EMPTY, ["dice"], zero_division=NAN)["dice"])
    # A region that is nowhere does not make the mean NaN.
    regions = Accumulator(["dice"])
    regions.add(score(np.stack([HALF, EMPTY]), np.stack([HALF, EMPTY]), ["dice"], zero_division=NAN))
    values = regions.result(["a", "b"])
    for name in ("dice", "mean_dice", "max_dice", "adaptive_dice"):
        assert math.isnan(values[f"{name}_b"])
        assert values[name] == values[f"{name}_a"]
        assert values[name] > 0.99


def test_nan_leaves_out_whole_images_and_no_single_thresholds():
    # Something wrongly found counts 0 at every threshold, also where the prediction is empty.
    values = result([[0.9, 0.1], [0, 0]], EMPTY, zero_division=NAN)
    assert (values["dice"], values["mean_dice"], values["max_iou"], values["weighted_f_beta"]) == (0, 0, 0, 0)
    # Little enough is nothing.
    values = result([[0.4, 0.1], [0, 0]], EMPTY, zero_division=NAN)
    for name in ("dice", "mean_dice", "max_iou", "adaptive_f_beta", "weighted_f_beta"):
        assert math.isnan(values[name])
    assert math.isfinite(values["mean_e_measure"])
    assert result([[0.4, 0.1], [0, 0]], EMPTY, zero_division=1)["weighted_f_beta"] == 1


def test_one_pixel_e_measures_do_not_overflow_silently():
    accumulator = Accumulator(["e_measure"])
    image = score([[0.0]], [[0]], ["e_measure"])
    with pytest.raises(OverflowError, match="pass `ddof=0`"):  # noqa: PT012
        for _ in itertools.count():
            accumulator.add(image)
    assert accumulator.result()["e_measure"] == 2**52


def test_what_does_not_fit_together_raises():
    accumulator = Accumulator()
    with pytest.raises(ValueError, match="nothing to average"):
        accumulator.result()
    scores = random_scores(1)[0]
    accumulator.add(scores)
    with pytest.raises(ValueError, match="same regions, got no axis of regions after 2 regions"):
        accumulator.add(scores[0])
    with pytest.raises(ValueError, match=r"`regions` must hold 2 different names.*\['a', 'a'\]"):
        accumulator.result(["a", "a"])
    with pytest.raises(ValueError, match="`regions` must hold 2 different names"):
        accumulator.result("WT")
    with pytest.raises(ValueError, match="`other` must hold the metrics"):
        accumulator.merge(Accumulator(["dice"]))
    single = Accumulator()
    single.add(scores[0])
    with pytest.raises(ValueError, match="no axis of regions"):
        single.result(["a"])
    assert accumulator.images == single.images == 1
