"""Metrics of one predicted mask.

[`score`] computes any of the seven metrics in one pass over an image, `Accumulator` averages what it returns. The
values are those of `py_sod_metrics`, which the authors of SAM2-UNet use; where it returns NaN they are defined here.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from .distances import FRAME, REACH, bounding_box, nearest_pixels, squared_distance


# Dice, IoU, F and E are known at 258 thresholds: probability > 0.5, the adaptive one, and >= 0/255 ... 255/255.
CURVES = ("dice", "iou", "f_beta", "e_measure")
NUM_THRESHOLDS = 258
METRICS = (*CURVES, "s_measure", "weighted_f_beta", "mae")
EPS = float(np.finfo(np.float64).eps)
OBJECT_WEIGHT = 0.5  # of the S-measure's objects against its regions, as in the paper
# 1-D factor of the 7x7 Gaussian with sigma 5 of the weighted F-measure.
_GAUSSIAN = np.exp(-(np.arange(-3.0, 4.0) ** 2) / 50)
_GAUSSIAN /= _GAUSSIAN.sum()


class MaskPair(NamedTuple):
    """One prediction and its mask, with what several metrics need of them; [`make_pair`] makes it."""

    probability: np.ndarray  # in [0, 1], contiguous float64 array of shape (height, width)
    mask: np.ndarray  # boolean, of the same shape
    inside: np.ndarray  # probabilities of the pixels of the mask, in reading order
    sum: float  # of all probabilities
    box: tuple[slice, slice]  # rows and columns that hold the mask, both empty if it is empty


class ThresholdCounts(NamedTuple):
    """Pixels of one image at each of the 258 thresholds of its prediction."""

    true_positive: np.ndarray  # predicted pixels inside the mask, int64 of shape (258,)
    predicted: np.ndarray  # predicted pixels, int64 of shape (258,)
    reference: int  # pixels of the mask
    total: int  # pixels of the image


def to_array(image: Any, name: str) -> np.ndarray:
    """Turn an array, tensor, PIL image or nested list into an array of one channel, with or without regions."""
    if hasattr(image, "getbands") and (len(image.getbands()) > 1 or image.mode == "P"):
        raise ValueError(
            f"`{name}` must be an image of one channel, got a PIL image of mode {image.mode}. Turn its colours into a "
            'mask first; `image.convert("L")` takes their brightness.'
        )
    if hasattr(image, "detach"):
        image = image.detach().cpu()
        # NumPy has no bfloat16.
        image = image.float().numpy() if "bfloat16" in str(image.dtype) else image.numpy()
    array = np.asarray(image)
    if array.ndim not in (2, 3) or array.size == 0 or array.dtype.kind not in "biuf":
        raise ValueError(
            f"`{name}` must have shape (height, width) or (regions, height, width), got {array.shape} of type "
            f"{array.dtype}. Several images go in a list, colour images must be turned into masks first."
        )
    if array.ndim == 3 and array.shape[-1] in (1, 3, 4) and array.shape[0] > 16:
        raise ValueError(f"`{name}` of shape {array.shape} looks like (height, width, channels). Pass one channel.")
    return array


def to_probability(prediction: Any, normalize: Literal["minmax"] | None = None) -> np.ndarray:
    """Turn a prediction into probabilities: a contiguous float64 array of the same shape, in [0, 1]."""
    array = to_array(prediction, "prediction")
    if normalize not in (None, "minmax"):
        raise ValueError(f'`normalize` must be "minmax" or None, got {normalize!r}.')
    low, high = float(array.min()), float(array.max())
    integer = np.issubdtype(array.dtype, np.integer)
    limit = 255 if integer else 1
    if not (low >= 0 and high <= limit):
        found = "NaN" if math.isnan(low) or math.isnan(high) else f"values from {low} to {high}"
        raise ValueError(
            f"`prediction` must hold probabilities in [0, 1], an 8-bit map in 0..255 or a binary mask, got {found} of "
            f"type {array.dtype}. Pass logits through a sigmoid, divide 8-bit values that are floats by 255."
        )
    eight_bit = integer and (high > 1 or normalize is not None)

    def plane_to_probability(plane: np.ndarray) -> np.ndarray:
        # Convert the 256 levels of an 8-bit map that is stretched, which is faster than converting its pixels.
        if eight_bit and (normalize is None or (plane.min() == 0 and plane.max() == 255)):
            return np.divide(plane, 255, dtype=np.float64)
        values = np.arange(256) / 255 if eight_bit else np.ascontiguousarray(plane, dtype=np.float64)
        if normalize is not None:
            low, high = values[[plane.min(), plane.max()]] if eight_bit else (values.min(), values.max())
            values = (values - low) / (high - low) if low != high else values
        return values.take(plane, mode="clip") if eight_bit else values

    return plane_to_probability(array) if array.ndim == 2 else np.stack([plane_to_probability(p) for p in array])


def to_mask(reference: Any) -> np.ndarray:
    """Turn a reference into a contiguous boolean mask of the same shape, and refuse label ids."""
    array = np.ascontiguousarray(to_array(reference, "reference"))
    if array.dtype == bool:
        return array
    low, high = float(array.min()), float(array.max())
    if np.issubdtype(array.dtype, np.integer) and low >= 0:
        if high <= 1:
            return array > 0
        bright = array > 128
        has_dark_values = np.count_nonzero(array) != np.count_nonzero(bright)
        # Small values besides 0 and 255, the usual value of pixels to ignore, are label ids if there is no grey level.
        if 128 < high <= 255 and (not has_dark_values or ((array > 31) & (array < 255)).any()):
            return bright
    if np.issubdtype(array.dtype, np.floating) and np.isin(array, (0, 1)).all():
        return array > 0
    raise ValueError(
        f"`reference` must be a binary mask, boolean or of 0 and 1 or of 0 and 255, got values from {low:g} to "
        f"{high:g} of type {array.dtype}. Turn label ids into one mask per region, such as `label_map == 1`."
    )


def make_pair(probability: np.ndarray, mask: np.ndarray) -> MaskPair:
    """Put what [`to_probability`] and [`to_mask`] returned together, both of shape `(height, width)`."""
    box = bounding_box(mask)
    return MaskPair(probability, mask, probability[box][mask[box]], float(probability.sum()), box)


def count_at_thresholds(pair: MaskPair) -> ThresholdCounts:
    """Count predicted pixels at all thresholds, with one histogram of 256 levels."""
    # Compute the mean as `py_sod_metrics` does, since pixels may lie on the threshold.
    adaptive = min(2 * pair.sum / pair.mask.size, 1)
    true_positive, predicted = _count_above(pair.inside, adaptive), _count_above(pair.probability, adaptive)
    return ThresholdCounts(true_positive, predicted, pair.inside.size, pair.mask.size)


def _count_above(probability: np.ndarray, adaptive: float) -> np.ndarray:
    """Return the number of pixels above 0.5, not below the adaptive threshold, and not below each of 256 levels."""
    counts = np.empty(NUM_THRESHOLDS, dtype=np.int64)
    counts[0], counts[1] = np.count_nonzero(probability > 0.5), np.count_nonzero(probability >= adaptive)
    levels = np.empty(probability.size, dtype=np.uint8)
    np.multiply(probability.ravel(), 255, out=levels, casting="unsafe")
    rest, left_out = levels, np.zeros(256, dtype=np.int64)
    # To count one level many times in a row is slow. Where two are almost all, count words of 8 pixels of either.
    sample = np.bincount(levels[:: levels.size // 512 + 1], minlength=256)
    common = np.argpartition(sample, -2)[-2:]
    if 4 * sample[common].sum() > 3 * sample.sum():
        words = levels[: levels.size // 8 * 8].view(np.uint64)
        first, second = (words == level * 0x0101010101010101 for level in common.tolist())
        left_out[common] = 8 * np.count_nonzero(first), 8 * np.count_nonzero(second)
        rest = np.concatenate([words[~(first | second)].view(np.uint8), levels[8 * words.size :]])
    if rest.size < 2**15 or rest.size % 2:
        histogram = np.bincount(rest, minlength=256)
    else:
        # Count two neighbours at once, which are often alike.
        pairs = np.bincount(rest.view(np.uint16), minlength=2**16).reshape(256, 256)
        histogram = pairs.sum(axis=0) + pairs.sum(axis=1)
    histogram += left_out
    # The sums from bright to dark are the numbers of pixels at or above each level.
    np.cumsum(histogram[::-1], out=counts[:1:-1])
    counts[2] = levels.size
    return counts


def _sum_of_products(first: np.ndarray, second: np.ndarray) -> float:
    # Not by `@` or `np.vdot`, whose BLAS starts threads that wait for each other on a busy machine.
    axes = "ij"[-first.ndim :]
    return float(np.einsum(f"{axes},{axes}->", first, second))


def _squares(values: np.ndarray) -> float:
    return _sum_of_products(values, values)


def _ratio(numerator: np.ndarray, denominator: np.ndarray, zero_division: float) -> np.ndarray:
    quotient = np.full(numerator.shape, zero_division, dtype=np.float64)
    return np.divide(numerator, denominator, out=quotient, where=denominator != 0)


def dice(counts: ThresholdCounts, zero_division: float = 0.0) -> np.ndarray:
    """Return Dice in [0, 1], best at 1: `zero_division` if mask and prediction are both empty, 0 if only one is."""
    return _ratio(2 * counts.true_positive, counts.predicted + counts.reference, zero_division)


def iou(counts: ThresholdCounts, zero_division: float = 0.0) -> np.ndarray:
    """Return IoU in [0, 1], best at 1: `zero_division` if mask and prediction are both empty, 0 if only one is."""
    union = counts.predicted + counts.reference - counts.true_positive
    return _ratio(counts.true_positive, union, zero_division)


def f_beta(counts: ThresholdCounts, beta_squared: float = 0.3, zero_division: float = 0.0) -> np.ndarray:
    """Return F in [0, 1], best at 1: `zero_division` if mask and prediction are both empty, 0 if only one is.

    Source: Achanta et al., CVPR 2009, doi 10.1109/CVPR.2009.5206596.
    """
    # P = TP / predicted and R = TP / reference, multiplied out.
    denominator = beta_squared * counts.reference + counts.predicted
    return _ratio((1 + beta_squared) * counts.true_positive, denominator, zero_division)


def e_measure(counts: ThresholdCounts, ddof: int = 1) -> np.ndarray:
    """Return the enhanced-alignment measure, in [0, n / (n - ddof)] for n pixels, best at the upper end.

    With an empty mask it is the share of pixels left empty, with a full mask the share of predicted pixels.

    Source: Fan et al., IJCAI 2018, doi 10.24963/ijcai.2018/97, equations 3 to 5.
    """
    true_positive, predicted, reference, total = counts
    if reference == 0:
        aligned = total - predicted
    elif reference == total:
        aligned = predicted
    else:
        share, mask_share = predicted / total, reference / total
        missed, wrong = reference - true_positive, predicted - true_positive
        aligned = np.zeros(NUM_THRESHOLDS)
        for prediction, in_mask, outside in (
            (1 - share, true_positive, wrong),
            (-share, missed, total - predicted - missed),
        ):
            for target, pixels in ((1 - mask_share, in_mask), (-mask_share, outside)):
                alignment = 2 * target * prediction / (prediction**2 + (target**2 + EPS))
                aligned += (alignment + 1) ** 2 * pixels
        aligned /= 4
    return aligned / (total - ddof + EPS)


def s_measure(pair: MaskPair) -> float:
    """Return the structure measure, in [0, 1], best at 1.

    With an empty mask it is one minus the mean probability, with a full mask the mean probability.

    Source: Fan et al., ICCV 2017, doi 10.1109/ICCV.2017.487, equations 3 to 8.
    """
    mask, inside, total = pair.mask, pair.inside, pair.sum
    foreground, background = inside.size, mask.size - inside.size
    if not foreground or not background:
        return total / mask.size if foreground else 1 - total / mask.size
    inside_sum = float(inside.sum())
    inside_mean, outside_mean = inside_sum / foreground, (total - inside_sum) / background
    regions, square = _region_similarity(pair)
    outside_variance = (square - _squares(inside) - background * outside_mean**2) / max(background - 1, 1)
    if outside_variance < 1e-7:
        # The difference of two sums would lose most of its digits.
        outside_variance = _squares(pair.probability[~mask] - outside_mean) / max(background - 1, 1)
    inside_variance = _squares(inside - inside_mean) / max(foreground - 1, 1)
    objects = foreground / mask.size * _object_similarity(inside_mean, inside_variance)
    objects += background / mask.size * _object_similarity(1 - outside_mean, outside_variance)
    return max(0.0, OBJECT_WEIGHT * objects + (1 - OBJECT_WEIGHT) * regions)


def _object_similarity(mean: float, variance: float) -> float:
    return 2 * mean / (mean**2 + 1 + math.sqrt(variance) + EPS)


def _region_similarity(pair: MaskPair) -> tuple[float, float]:
    """Return the structural similarity of four quadrants, weighted by size, and the sum of squared probabilities."""
    probability, mask, inside, _, box = pair
    halves = []
    for axis, part in enumerate(box):
        pixels = np.add.reduce(mask[box], axis=1 - axis, dtype=np.int32)
        total = int(np.multiply(pixels, np.arange(part.start, part.stop), dtype=np.int64).sum())
        # The quadrants meet behind the pixel of the mask's centre, as in the authors' code.
        middle = round(total / inside.size) + 1
        halves.append(((slice(0, middle), slice(part.start, middle)), (slice(middle, None), slice(middle, part.stop))))
    similarity, squares = 0.0, 0.0
    for (rows, box_rows), (columns, box_columns) in itertools.product(*halves):
        values = probability[rows, columns]
        # A centre in the last row or column leaves quadrants empty; `py_sod_metrics` returns NaN then.
        if not values.size:
            continue
        found = probability[box_rows, box_columns][mask[box_rows, box_columns]]
        reference, inside_sum = found.size, float(found.sum())
        weight, share = values.size / mask.size, reference / values.size
        square, sum_ = _squares(values), float(values.sum())
        squares += square
        if 0 < reference < values.size:
            mean = sum_ / values.size
            divisor = values.size - 1 + EPS
            variance = (square - sum_**2 / values.size + reference * (1 - share)) / divisor
            covariance = (inside_sum - sum_ * share) / divisor
            similarity += weight * 4 * mean * share * covariance / ((mean**2 + share**2) * variance + EPS)
        else:
            # A constant mask has no covariance with anything; it is like another constant, or like a prediction of 0.
            mean = float(values.mean())
            similarity += weight * ((mean**2 + share**2) * float(np.square(values - mean).sum()) == 0)
    return similarity, squares


@functools.cache
def _background_weights() -> np.ndarray:
    """Return the weight of an error by squared distance to the mask; from 265 pixels on it is 2 to the last bit."""
    weights = 2 - np.exp(math.log(0.5) / 5 * np.sqrt(np.arange(270.0**2)))
    weights[0] = 0  # errors in the mask are counted apart
    return weights


def weighted_f_beta(pair: MaskPair, zero_division: float = 0.0) -> float:
    """Return the weighted F-measure, in [0, 1], best at 1: errors count less beside others, more far from the mask.

    With an empty mask it is `zero_division` if no probability is above 0.5, else 0. What lies outside the image is
    taken for right, as in the authors' code, so that a mask at the border scores more than 0 for no prediction at all.

    Source: Margolin et al., CVPR 2014, doi 10.1109/CVPR.2014.39.
    """
    probability, mask, inside, _, box = pair
    if not inside.size:
        return 0.0 if (probability > 0.5).any() else zero_division
    # Outside the mask there is no error where the prediction is 0.
    part: tuple[slice, slice] = (slice(0, mask.shape[0]), slice(0, mask.shape[1]))
    if not all(edge.any() for edge in (probability[0], probability[-1], probability[:, 0], probability[:, -1])):
        needed = probability > 0
        needed[box] = True
        part = bounding_box(needed)
    errors, wrong = probability[part], (probability[part] > 0) & ~mask[part]
    squares = squared_distance(mask[part], wrong)
    if 8 * np.count_nonzero(wrong) < wrong.size:
        # Look up the weights of these few alone.
        errors, squares = errors[wrong], squares[wrong]
    false_positive = _sum_of_products(errors, _background_weights().take(squares, mode="clip"))
    missed = _missed(pair)
    true_positive = inside.size - missed
    recall = 1 - missed / inside.size
    precision = true_positive / (true_positive + false_positive + EPS)
    return float(2 * recall * precision / (recall + precision + EPS))


def _missed(pair: MaskPair) -> float:
    """Return the sum of the errors in the mask, where each counts no more than the mean error around it."""
    # Compute in the box around the mask, with a frame of error 0, as all errors outside the image are.
    rows, columns = (
        slice(max(axis.start - REACH, 0), min(axis.stop + REACH, size))
        for axis, size in zip(pair.box, pair.mask.shape, strict=True)
    )
    mask = pair.mask[rows, columns]
    errors = np.zeros([size + 2 * FRAME for size in mask.shape])
    errors[FRAME:-FRAME, FRAME:-FRAME][mask] = 1 - pair.inside
    # Each pixel outside the mask takes the error of the nearest pixel inside.
    at, nearest = nearest_pixels(mask)
    flat = errors.ravel()
    flat[at] = flat.take(nearest)
    # Rows lie end to end, and the frame keeps them apart.
    blurred = np.correlate(flat, _GAUSSIAN, mode="same").reshape(errors.shape)
    flat[at] = 0
    # The view has a third axis, along which lie the pixels that the Gaussian reaches in a column.
    height, width = mask.shape[0], errors.shape[1]
    shape, strides = (height, width, _GAUSSIAN.size), (*blurred.strides, blurred.strides[0])
    reached = np.ndarray(shape, blurred.dtype, blurred, (FRAME - REACH) * blurred.strides[0], strides)
    mean = np.einsum("ijk,k->ij", reached, _GAUSSIAN)
    return float(np.minimum(errors[FRAME:-FRAME], mean, out=mean).sum())


def mean_absolute_error(pair: MaskPair) -> float:
    """Return the mean absolute difference of probability and mask, in [0, 1], best at 0; 0 if both are empty.

    Source: Perazzi et al., CVPR 2012, doi 10.1109/CVPR.2012.6247743, equation 10.
    """
    # The difference is 1 - p in the mask and p outside.
    return max(0.0, pair.sum + pair.inside.size - 2 * float(pair.inside.sum())) / pair.mask.size


def score(
    prediction: Any,
    reference: Any,
    metrics: Sequence[str] = METRICS,
    *,
    normalize: Literal["minmax"] | None = None,
    zero_division: float = 0.0,
    beta_squared: float = 0.3,
    ddof: int = 1,
    valid_mask: np.ndarray | None = None,
) -> np.ndarray:
    """Score one prediction.

    Args:
        prediction: Probabilities in [0, 1], 8-bit map in 0..255 or binary mask (boolean, or 0 and 1) of shape
            `(height, width)` or `(regions, height, width)`: NumPy array, tensor, PIL image or nested list.
        reference: Binary mask of the same shape: boolean, 0 and 1, or 8-bit, where the mask is what lies above 128.
        metrics: Which of `METRICS` to compute.
        normalize: `"minmax"` stretches each region to [0, 1] first unless it is constant, and takes every integer
            prediction for an 8-bit map. With `None`, integers not above 1 are taken for a binary mask.
        zero_division: Value of Dice, IoU, F and weighted F where mask and prediction (at each threshold) are both
            empty: 0 or 1, or NaN to leave out images where both are empty at probability > 0.5.
        beta_squared: Weight of recall against precision in F; below 1 precision counts more.
        ddof: The sum over n pixels in E is divided by `n - ddof`. 1 is what the authors' code does; a perfect score is
            then n / (n - 1), and an image of one pixel scores 0 or 4.5e15. 0 is the equation of the paper.
        valid_mask: Boolean array of shape `(height, width)`, false at pixels that do not count. S-measure and
            weighted F, which need neighbours, take them for rightly predicted background.

    Returns:
        Float64 array of shape `(columns,)` or `(regions, columns)`: 258 columns, one for each threshold, for each
        metric in `CURVES`, and one for each other. `Accumulator` takes it.

    Raises:
        ValueError: If a value or the shapes are wrong.
    """
    if unknown := sorted(set(metrics) - set(METRICS)):
        raise ValueError(f"`metrics` must be among {', '.join(METRICS)}, got {', '.join(unknown)}.")
    probability, mask = to_probability(prediction, normalize), to_mask(reference)
    if probability.shape != mask.shape:
        raise ValueError(
            f"`prediction` and `reference` must have the same shape, got {probability.shape} and {mask.shape}. Resize "
            "the prediction to the reference, not the other way round."
        )
    if zero_division not in (0, 1) and not (isinstance(zero_division, float) and math.isnan(zero_division)):
        raise ValueError(f"`zero_division` must be 0, 1 or NaN, got {zero_division!r}.")
    if not beta_squared > 0:
        raise ValueError(f"`beta_squared` must be above 0, got {beta_squared}.")
    if ddof not in (0, 1):
        raise ValueError(f"`ddof` must be 0 or 1, got {ddof}.")
    valid_mask = None if valid_mask is None or valid_mask.all() else valid_mask

    def score_region(probability: np.ndarray, mask: np.ndarray) -> np.ndarray:
        pair = counted = make_pair(probability, mask)
        if valid_mask is not None:
            pair = make_pair(probability * valid_mask, mask & valid_mask)
            counted = make_pair(probability[valid_mask][None], mask[valid_mask][None])
        counts: Any = count_at_thresholds(counted) if set(CURVES) & set(metrics) else None
        functions: dict[str, Callable[[], Any]] = {
            "dice": lambda: dice(counts, zero_division),
            "iou": lambda: iou(counts, zero_division),
            "f_beta": lambda: f_beta(counts, beta_squared, zero_division),
            "e_measure": lambda: e_measure(counts, ddof),
            "s_measure": lambda: [s_measure(pair)],
            "weighted_f_beta": lambda: [weighted_f_beta(pair, zero_division)],
            "mae": lambda: [mean_absolute_error(counted)],
        }
        if math.isnan(zero_division) and not counted.inside.size:
            # Leave the image out, or count it as wrong, at all thresholds, so that all average the same images.
            value = 0.0 if (counted.probability > 0.5).any() else math.nan
            functions |= dict.fromkeys(("dice", "iou", "f_beta"), lambda: np.full(NUM_THRESHOLDS, value))
        return np.concatenate([functions[metric]() for metric in metrics])

    if valid_mask is not None and not valid_mask.any():
        return np.full((*mask.shape[:-2], sum(map(num_columns, metrics))), np.nan)
    if mask.ndim == 2:
        return score_region(probability, mask)
    return np.stack([score_region(*region) for region in zip(probability, mask, strict=True)])


def num_columns(metric: str) -> int:
    """Return how many columns of [`score`] a metric takes."""
    return NUM_THRESHOLDS if metric in CURVES else 1


__all__ = ["CURVES", "METRICS", "score"]
