"""Score a folder of predictions against a folder of masks.

python -m sam2unet_hf.metrics --pred_dir predictions --ref_dir masks
python -m sam2unet_hf.metrics --pred_dir runs/my_data/predictions --ref_dir my_data/masks --regions liver=1 lesion=2,3

Masks in black and white are scored as the `eval.py` of the reference implementation does; masks and predictions of
label ids, as `sam2unet train --do_predict` writes them, by region: one per id, or those of --regions.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ..images_sam2unet import to_label_map
from ..regions_sam2unet import parse_regions
from .functional import score
from .segmentation_metric import Accumulator


logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
# The reference implementation prints this table.
TABLE = {
    "mDice": "mean_dice",
    "mIoU": "mean_iou",
    "S_{alpha}": "s_measure",
    "F^{w}_{beta}": "weighted_f_beta",
    "F_{beta}": "adaptive_f_beta",
    "E_{phi}": "mean_e_measure",
    "MAE": "mae",
}
# Label maps have no thresholds, so that their table is of the masks themselves.
LABEL_TABLE = {"Dice": "dice", "IoU": "iou", "S_{alpha}": "s_measure", "F^{w}_{beta}": "weighted_f_beta", "MAE": "mae"}
IGNORED = 255  # in masks of label ids, unless a region names it
WHITE = 128  # values above are white where masks are black and white, as in the reference protocol
FEW_GREYS = 64  # as many as blurred edges may have in any mask; photographs have more
LARGEST_ID = 31  # that is a label id without being named by a region; beyond it values may be grey levels


def find_pairs(pred_dir: Path, ref_dir: Path, skip_missing: bool = False) -> list[tuple[Path, Path]]:
    """Pair predictions and masks by their names without suffix; folders in them and hidden files do not count."""
    folders = []
    for name, folder in (("pred_dir", pred_dir), ("ref_dir", ref_dir)):
        if not folder.is_dir():
            raise ValueError(f"`{name}` must be a folder, got {folder}.")
        if name == "ref_dir" and folder.samefile(pred_dir):
            raise ValueError(f"`pred_dir` and `ref_dir` are the same folder, {folder}. Name that of the predictions.")
        files: dict[str, Path] = {}
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
                continue
            if other := files.get(path.stem):
                raise ValueError(f"`{name}` holds {other.name} and {path.name}; remove one of them.")
            files[path.stem] = path
        if not files:
            if any(path.name.lower().endswith((".nii", ".nii.gz")) for path in folder.iterdir()):
                raise ValueError(
                    f"{folder} holds scans. `python -m sam2unet_hf.volume MODEL CASE -o OUT --score` scores such."
                )
            raise ValueError(f"`{name}` must hold images ({', '.join(SUFFIXES)}), but {folder} holds none.")
        folders.append(files)
    predictions, references = folders
    missing, extra = sorted(references.keys() - predictions.keys()), sorted(predictions.keys() - references.keys())
    pairs = [(path, references[stem]) for stem, path in predictions.items() if stem in references]
    if not pairs:
        raise ValueError(f"No file in {pred_dir} has the name of one in {ref_dir}, such as {missing[0]}.")
    if (missing or extra) and not skip_missing:
        found = ((f"prediction in {pred_dir}", missing), (f"mask in {ref_dir}", extra))
        problems = [f"without {partner}: {', '.join(names)}" for partner, names in found if names]
        raise ValueError(f"{'; '.join(problems)}. Pass --skip_missing to score the others.")
    return pairs


def read_map(path: Path) -> np.ndarray:
    """Read an image of 1, 8 or 24 bits, or with a palette, as an 8-bit map; colours become their brightness."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")) or image.mode.endswith("A"):
                raise ValueError(
                    f"{path} must have 8 bits per channel and no alpha channel, got mode {image.mode}. Label ids of "
                    "16 bits are read with --regions."
                )
            return np.asarray(image.convert("L"))
    except (UnidentifiedImageError, OSError) as err:
        raise ValueError(f"{path} cannot be read as an image: {err}.") from err


def read_labels(path: Path) -> np.ndarray:
    """Read an image of label ids: one channel of 8 or 16 bits, or a palette, whose indices are the ids."""
    try:
        with Image.open(path) as image:
            if image.format == "JPEG":
                raise ValueError(f"{path} is a JPEG, which blurs label ids. Save it as PNG.")
            return to_label_map(image).numpy()
    except (UnidentifiedImageError, OSError) as err:
        raise ValueError(f"{path} cannot be read as an image: {err}.") from err
    except ValueError as err:
        raise err if str(path) in str(err) else ValueError(f"{path}: {err}") from err


def find_values(path: Path) -> frozenset[int]:
    """Return the label ids of an image but 0."""
    return frozenset(np.unique(read_labels(path)).tolist()) - {0}


def look_at_mask(path: Path) -> tuple[frozenset[int], bool]:
    """Return the values of a mask but 0, and whether it is more grey than white, and so hardly a mask."""
    if _holds_ids(path):
        return find_values(path), False
    values, counts = np.unique(read_map(path), return_counts=True)
    grey = (values > LARGEST_ID) & (values < 255 - LARGEST_ID)
    is_photograph = grey.sum() > FEW_GREYS and counts[grey].sum() > counts[values > LARGEST_ID].sum() / 2
    return frozenset(values.tolist()) - {0}, bool(is_photograph)


def check_photographs(photographs: Sequence[Path], total: int) -> None:
    """Refuse masks of which most are grey all over; warn if some are, since the reference protocol takes any grey."""
    if not photographs:
        return
    fault = (
        f"{len(photographs)} of {total} masks are rather grey than black and white, as photographs are, such as "
        f"{photographs[0]}."
    )
    if len(photographs) > total / 2:
        raise ValueError(f"{fault} Masks are in black and white, with blurred edges at most, or of label ids.")
    logger.warning("%s Values above %d are taken for the mask.", fault, WHITE)


def _holds_ids(path: Path) -> bool:
    """Whether an image can only hold label ids, for it has 16 bits, or a palette of colours."""
    try:
        with Image.open(path) as image:
            if image.mode != "P":
                return image.mode.startswith("I")
            colours = np.asarray(image.convert("RGB"))
            return bool((colours != colours[..., :1]).any())
    except (UnidentifiedImageError, OSError):  # named when it is read
        return False


def _in_processes(task: Callable, items: Sequence[Any], num_proc: int, title: str) -> Iterator[Any]:
    """Return what a function makes of each item, in several processes, with a progress bar."""
    pool = ProcessPoolExecutor(num_proc) if num_proc > 1 else None
    with pool or nullcontext():
        results = pool.map(task, items, chunksize=8) if pool else map(task, items)
        yield from tqdm(results, total=len(items), desc=title, unit="image")


def find_label_ids(pairs: Sequence[tuple[Path, Path]], num_proc: int = 1) -> list[int]:
    """Return the label ids in masks; nothing if they are in black and white, for which soft edges are no ids.

    Raises:
        ValueError: If a file cannot be read, most are photographs, or some masks hold ids and others are in black and
            white.
    """
    masks: dict[frozenset[int], Path] = {}  # by their values, the first of each
    paths = [reference for _, reference in pairs]
    photographs = []
    found = _in_processes(look_at_mask, paths, num_proc, "Reading masks")
    for path, (values, is_photograph) in zip(paths, found, strict=True):
        masks.setdefault(values, path)
        photographs += [path] if is_photograph else []
    check_photographs(photographs, len(paths))
    values = frozenset().union(*masks)
    ids = sorted(value for value in values if value <= LARGEST_ID)
    has_ignored = any(IGNORED in own and len(own) > 1 for own in masks)
    if not ids or any(LARGEST_ID < value < IGNORED for value in values) or (ids == [1] and not has_ignored):
        return []
    black_and_white = masks.get(frozenset([IGNORED]))
    if black_and_white is not None and not has_ignored:
        other = next(path for own, path in masks.items() if ids[-1] in own)
        raise ValueError(
            f"{other} holds label ids up to {ids[-1]}, and {black_and_white} nothing but 0 and 255. Masks are all of "
            "label ids or all in black and white; if 255 is a class, name all classes by --regions."
        )
    return ids


def score_labels(
    pair: tuple[Path, Path], regions: Mapping[str, Sequence[int]], known: frozenset[int], zero_division: float
) -> np.ndarray:
    """Score the regions of one label map, whose ids are `known` or up to 31; return an array per region."""
    prediction, reference = map(read_labels, pair)
    named = {label_id for label_ids in regions.values() for label_id in label_ids}
    values = set(np.unique(prediction).tolist()) - {0, *named}
    if unknown := sorted(value for value in values if value == IGNORED or (value > LARGEST_ID and value not in known)):
        raise ValueError(
            f"{pair[0]} holds {unknown[0]}, which is no label id of the masks or of a region. Predictions for masks "
            "of label ids are label ids, too, as `--do_predict` writes them; a region can name other ids (--regions)."
        )
    predicted, masks = (np.stack([np.isin(i, ids) for ids in regions.values()]) for i in (prediction, reference))
    options: dict[str, Any] = {} if IGNORED in named else {"valid_mask": reference != IGNORED}
    try:
        return score(predicted, masks, zero_division=zero_division, **options)
    except ValueError as err:
        raise ValueError(f"{pair[0]} and {pair[1]}: {err}") from err


def score_label_folders(
    pairs: Sequence[tuple[Path, Path]],
    regions: Mapping[str, Sequence[int]] | None = None,
    num_proc: int = 1,
    zero_division: float = 1.0,
) -> tuple[Accumulator, dict[str, list[int]]]:
    """Score label maps by region.

    Args:
        pairs: Files of predictions and masks.
        regions: Name -> the label ids it joins. By default one per id in masks and predictions, `class_<id>`.
        num_proc: Processes.
        zero_division: Score of a region that neither mask nor prediction has.

    Returns:
        The scores, and the regions.

    Raises:
        ValueError: If a file cannot be read, holds no label ids, or the two of a pair differ in size; or if there are
            other ids than those of regions, and a region is nowhere.
    """
    found = []
    for title, side in (("Reading predictions", 0), ("Reading masks", 1)):
        paths = [pair[side] for pair in pairs]
        found.append(frozenset().union(*_in_processes(find_values, paths, num_proc, title)))
    predicted, known = found
    if regions is None:
        ids = sorted({value for value in predicted | known if value <= LARGEST_ID})
        regions = {"foreground": ids} if ids == [1] else {f"class_{label_id}": [label_id] for label_id in ids}
    check_regions_are_there(regions, known, predicted)
    for name, label_ids in regions.items():
        if known.isdisjoint(label_ids):
            logger.warning("No mask holds the label ids %s of region %s.", list(label_ids), name)
        if predicted.isdisjoint(label_ids):
            advice = "If the model joins several ids, name its regions by --regions."
            logger.warning("No prediction holds the label ids %s of region %s. %s", list(label_ids), name, advice)
    accumulator = Accumulator()
    task = partial(score_labels, regions=regions, known=known, zero_division=zero_division)
    for scores in _in_processes(task, pairs, num_proc, "Scoring"):
        accumulator.add(scores)
    return accumulator, {name: list(label_ids) for name, label_ids in regions.items()}


def check_regions_are_there(
    regions: Mapping[str, Sequence[int]], known: frozenset[int], predicted: frozenset[int]
) -> None:
    """Refuse a region that is nowhere where ids have no region, since it is likely that one of these was meant.

    Where all ids have a region, one that is nowhere is just empty.
    """
    named = {label_id for label_ids in regions.values() for label_id in label_ids}
    left = known | predicted
    left -= named | ({IGNORED} if left != {IGNORED} else set())
    for name, label_ids in regions.items():
        if left and not (known | predicted) & set(label_ids):
            masks, predictions = (", ".join(map(str, sorted(ids))) or "nothing but 0" for ids in (known, predicted))
            raise ValueError(
                f"Region {name} has the label ids {list(label_ids)}, the masks hold {masks}, the predictions "
                f"{predictions}. Name some of these by --regions."
            )


def score_files(pair: tuple[Path, Path], threshold: int, **options: Any) -> tuple[np.ndarray, int, int]:
    """Score one prediction against what of the mask lies above `threshold`; return the largest values of both too."""
    prediction, reference = map(read_map, pair)
    highest = int(reference.max())
    try:
        # Pass probabilities, since an 8-bit map that is nearly empty would be taken for a mask of 0 and 1.
        scores = score(prediction / 255, reference > threshold, **options)
    except ValueError as err:
        raise ValueError(f"{pair[0]} and {pair[1]}: {err}") from err
    return scores, int(prediction.max()), highest


def score_folders(pairs: Sequence[tuple[Path, Path]], num_proc: int = 1, **options: Any) -> Accumulator:
    """Score all predictions, in `num_proc` processes, with a progress bar."""
    # The mask is above half of 255, as in the reference protocol, or above 0 if all masks are of 0 and 1.
    for threshold in (WHITE, 0):
        accumulator, largest = Accumulator(), 0
        masks: dict[int, Path] = {}  # by their largest value, the first of each
        results = _in_processes(partial(score_files, threshold=threshold, **options), pairs, num_proc, "Scoring")
        for (_, reference), (scores, value, reference_value) in zip(pairs, results, strict=True):
            accumulator.add(scores)
            largest = max(largest, value)
            masks.setdefault(reference_value, reference)
            if 1 in masks and (highest := max(masks)) > 128:
                raise ValueError(
                    f"{masks[1]} holds nothing but 0 and 1, and {masks[highest]} values up to {highest}. Masks "
                    "are all of 0 and 255 or all of 0 and 1: multiply those of 0 and 1 by 255."
                )
        largest_reference = max(masks)
        if largest_reference != 1:
            break
    pred_dir, ref_dir = (path.parent for path in pairs[0])
    if 1 < largest_reference <= 128:
        raise ValueError(
            f"{ref_dir} holds nothing above {largest_reference}. Masks are of 0 and 255 or of 0 and 1; name label ids "
            "beyond 31 by --regions."
        )
    if largest == 1 and options.get("normalize") is None:
        raise ValueError(
            f"{pred_dir} holds nothing above 1 of 255. Save masks as 0 and 255, or pass --normalize minmax."
        )
    return accumulator


def _write_table(scores: Mapping[str, float], regions: Mapping[str, Sequence[int]] | None) -> str:
    """Return the scores to read, a line each; of label ids those of each region, too."""
    if not regions:
        return "\n".join(f"{name + ':':<14}{scores[key]:.3f}" for name, key in TABLE.items())
    lines = [f"{'':<14}{'all':<8}{' '.join(f'{name:<7}' for name in regions)}".rstrip()]
    for name, key in LABEL_TABLE.items():
        own = " ".join(f"{scores[f'{key}_{region}']:<{max(7, len(region))}.3f}" for region in regions)
        lines.append(f"{name + ':':<14}{scores[key]:<8.3f}{own}".rstrip())
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, prog: str = "python -m sam2unet_hf.metrics") -> dict[str, Any]:
    """Run the command line, whose usage calls it `prog`; return what it writes as JSON."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=(__doc__ or "").replace("python -m sam2unet_hf.metrics", prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pred_dir", type=Path, required=True, help="folder of predictions: maps, masks or label ids")
    parser.add_argument("--ref_dir", type=Path, required=True, help="folder of masks with the same names")
    parser.add_argument(
        "--regions", nargs="+", help="regions of label ids, NAME=ID[,ID...] each; default: one per id in the masks"
    )
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    parser.add_argument(
        "--normalize",
        choices=["minmax", "none"],
        default="minmax",
        help="stretch each prediction to its full range first, as the reference protocol does (default), or not",
    )
    parser.add_argument(
        "--zero_division",
        choices=["0", "1", "nan"],
        help="score where mask and prediction are both empty: 0 (reference protocol, default for masks in black and "
        "white), 1 (BraTS, default for label ids) or nan",
    )
    parser.add_argument("--skip_missing", action="store_true", help="pass over files without partner")
    parser.add_argument("--num_proc", type=int, default=1, help="number of processes")
    args = parser.parse_args(argv)
    normalize = None if args.normalize == "none" else args.normalize
    if args.num_proc < 1:
        parser.error(f"--num_proc must be >= 1, got {args.num_proc}.")
    try:
        pairs = find_pairs(args.pred_dir, args.ref_dir, args.skip_missing)
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
        regions = parse_regions(args.regions) if args.regions else None
        has_labels = regions is not None or bool(find_label_ids(pairs, args.num_proc))
        zero_division = float(args.zero_division or has_labels)
        if has_labels:
            normalize = None
            accumulator, regions = score_label_folders(pairs, regions, args.num_proc, zero_division)
        else:
            accumulator = score_folders(pairs, args.num_proc, normalize=normalize, zero_division=zero_division)
    except (OSError, ValueError) as err:
        parser.error(str(err))
    scores = accumulator.result(list(regions) if regions else None)
    result: dict[str, Any] = {"pred_dir": str(args.pred_dir), "ref_dir": str(args.ref_dir), "images": len(pairs)}
    result |= {"regions": regions} if regions else {}
    result |= {"normalize": normalize, "zero_division": zero_division, **scores}
    result = {name: None if value != value else value for name, value in result.items()}  # JSON has no NaN
    text = json.dumps(result, indent=2)
    if args.output is not None:
        args.output.write_text(text + "\n")
    sys.stdout.write(f"{len(pairs)} images\n{_write_table(scores, regions)}\n\n{text}\n")
    return result


if __name__ == "__main__":
    main()
