"""Score a folder of predictions against a folder of masks, as the `eval.py` of the reference implementation does.

python -m sam2unet_hf.metrics --pred_dir predictions --ref_dir masks
"""

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from .functional import score
from .segmentation_metric import Accumulator


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


def find_pairs(pred_dir: Path, ref_dir: Path, skip_missing: bool = False) -> list[tuple[Path, Path]]:
    """Pair predictions and masks by their names without suffix; folders in them and hidden files do not count."""
    folders = []
    for name, folder in (("pred_dir", pred_dir), ("ref_dir", ref_dir)):
        if not folder.is_dir():
            raise ValueError(f"`{name}` must be a folder, got {folder}.")
        files: dict[str, Path] = {}
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
                continue
            if other := files.get(path.stem):
                raise ValueError(f"`{name}` holds {other.name} and {path.name}; remove one of them.")
            files[path.stem] = path
        if not files:
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
                raise ValueError(f"{path} must have 8 bits per channel and no alpha channel, got mode {image.mode}.")
            return np.asarray(image.convert("L"))
    except (UnidentifiedImageError, OSError) as err:
        raise ValueError(f"{path} cannot be read as an image: {err}.") from err


def score_files(pair: tuple[Path, Path], threshold: int, **options: Any) -> tuple[np.ndarray, int, int]:
    """Score one prediction against what of the mask lies above `threshold`; return the largest values of both too."""
    prediction, reference = map(read_map, pair)
    if 1 < (highest := int(reference.max())) < 32:
        raise ValueError(
            f"{pair[1]} holds label ids up to {highest}. Masks are of 0 and 255 or of 0 and 1: write one mask per "
            "region."
        )
    try:
        # Pass probabilities, since an 8-bit map that is nearly empty would be taken for a mask of 0 and 1.
        scores = score(prediction / 255, reference > threshold, **options)
    except ValueError as err:
        raise ValueError(f"{pair[0]} and {pair[1]}: {err}") from err
    return scores, int(prediction.max()), highest


def score_folders(pairs: Sequence[tuple[Path, Path]], num_proc: int = 1, **options: Any) -> Accumulator:
    """Score all predictions, in `num_proc` processes, with a progress bar."""
    # The mask is above half of 255, as in the reference protocol, or above 0 if all masks are of 0 and 1.
    for threshold in (128, 0):
        accumulator, largest = Accumulator(), 0
        masks: dict[int, Path] = {}  # by their largest value, the first of each
        pool = ProcessPoolExecutor(num_proc) if num_proc > 1 else None
        with pool or nullcontext():
            task = partial(score_files, threshold=threshold, **options)
            results = pool.map(task, pairs, chunksize=8) if pool else map(task, pairs)
            results = tqdm(results, total=len(pairs), desc="Scoring", unit="image")
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
        raise ValueError(f"{ref_dir} holds nothing above {largest_reference}. Masks are of 0 and 255 or of 0 and 1.")
    if largest == 1 and options.get("normalize") is None:
        raise ValueError(
            f"{pred_dir} holds nothing above 1 of 255. Save masks as 0 and 255, or pass --normalize minmax."
        )
    return accumulator


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; return what it writes as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m sam2unet_hf.metrics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pred_dir", type=Path, required=True, help="folder of predictions: 8-bit maps or masks")
    parser.add_argument("--ref_dir", type=Path, required=True, help="folder of masks with the same names")
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
        default="0",
        help="score where mask and prediction are both empty: 0 (default, reference protocol), 1 (BraTS) or nan",
    )
    parser.add_argument("--skip_missing", action="store_true", help="pass over files without partner")
    parser.add_argument("--num_proc", type=int, default=1, help="number of processes")
    args = parser.parse_args(argv)
    normalize, zero_division = None if args.normalize == "none" else args.normalize, float(args.zero_division)
    if args.num_proc < 1:
        parser.error(f"--num_proc must be >= 1, got {args.num_proc}.")
    try:
        pairs = find_pairs(args.pred_dir, args.ref_dir, args.skip_missing)
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
        accumulator = score_folders(pairs, args.num_proc, normalize=normalize, zero_division=zero_division)
    except (OSError, ValueError) as err:
        parser.error(str(err))
    scores = accumulator.result()
    result: dict[str, Any] = {"pred_dir": str(args.pred_dir), "ref_dir": str(args.ref_dir), "images": len(pairs)}
    result |= {"normalize": normalize, "zero_division": zero_division, **scores}
    result = {name: None if value != value else value for name, value in result.items()}  # JSON has no NaN
    text = json.dumps(result, indent=2)
    if args.output is not None:
        args.output.write_text(text + "\n")
    table = "\n".join(f"{name + ':':<14}{scores[key]:.3f}" for name, key in TABLE.items())
    sys.stdout.write(f"{len(pairs)} images\n{table}\n\n{text}\n")
    return result


if __name__ == "__main__":
    main()
