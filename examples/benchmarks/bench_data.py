#!/usr/bin/env python
"""Time the builder against a plain loop of nibabel, NumPy and Pillow over the same slices, in turn.

python examples/benchmarks/bench_data.py --brats_dir BraTS2020_TrainingData
python examples/benchmarks/bench_data.py --brats_dir BraTS2020_TrainingData --num_proc 4
python examples/benchmarks/bench_data.py --brats_dir a/few/cases --copies 16

Both read FLAIR and mask of each case, cut the slices that show tumour, scale intensities and encode PNGs; the builder
also writes its Arrow file. Where MONAI is installed, reading alone is timed with its `LoadImage` too.
"""

import importlib.util
import io
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import nibabel as nib
import numpy as np
from PIL import Image
from timing import make_parser, report, time_in_turn

from dataset_scripts.brats_slices import BratsSlices
from sam2unet_hf.cases_sam2unet import BratsCase, find_cases


def plain_loop(cases: list[BratsCase]) -> int:
    """Make the slices as a script would that reads with nibabel; return how many."""
    count = 0
    for case in cases:
        mask = nib.load(case.path("seg")).get_fdata()
        scan = nib.load(case.path("flair")).get_fdata()
        low, high = np.percentile(scan[scan != 0], (0.5, 99.5))
        for index in np.flatnonzero(mask.any(axis=(0, 1))):
            image = np.clip((scan[:, :, index] - low) / (high - low), 0, 1) * 255
            for pixels in (image, mask[:, :, index]):
                Image.fromarray(pixels.T.astype(np.uint8)).save(io.BytesIO(), format="PNG")
            count += 1
    return count


def monai_reading(cases: list[BratsCase]) -> None:
    """Read the same files with MONAI."""
    from monai.transforms import LoadImage

    load = LoadImage(image_only=True)
    for case in cases:
        load(case.path("flair")), load(case.path("seg"))


def build(brats_dir: Path, num_proc: int | None) -> int:
    """Build the data set into an empty cache; return how many slices it has."""
    with tempfile.TemporaryDirectory() as cache:
        builder = BratsSlices(data_dir=str(brats_dir), modalities="flair", slices="tumor", cache_dir=cache)
        builder.download_and_prepare(num_proc=num_proc)
        return sum(split.num_examples for split in builder.info.splits.values())


def link_copies(cases: list[BratsCase], copies: int, folder: Path) -> None:
    """Link each case `copies` times under other names, to read as many files as a larger cohort has."""
    for case in cases:
        for copy in range(copies):
            # Put the number before the id, whose end may tell the timepoint.
            case_id = f"Copy{copy}{case.case_id}"
            (folder / case_id).mkdir()
            for name in ("flair", "seg"):
                path = case.path(name)
                (folder / case_id / path.name.replace(case.case_id, case_id)).symlink_to(path.resolve())


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = make_parser(__doc__, rounds=3, device=False)
    parser.add_argument("--brats_dir", type=Path, required=True, help="folder that holds the cases")
    parser.add_argument("--num_proc", type=int, default=2, help="number of processes of the second build")
    parser.add_argument("--copies", type=int, default=1, help="how many times each case is read")
    args = parser.parse_args(argv)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        brats_dir = args.brats_dir
        if args.copies > 1:
            brats_dir = Path(folder)
            link_copies(find_cases(args.brats_dir), args.copies, brats_dir)
        cases = find_cases(brats_dir)
        competitors: dict[str, Callable[[], Any]] = {
            "plain loop": lambda: plain_loop(cases),
            "builder": lambda: build(brats_dir, None),
        }
        made = {name: function() for name, function in competitors.items()}
        slices = made["builder"]
        if made["plain loop"] != slices:
            raise SystemExit(f"Not the same slices were made: {made}.")
        parallel = f"builder, {args.num_proc} processes"
        competitors[parallel] = lambda: build(brats_dir, args.num_proc)
        if importlib.util.find_spec("monai") is not None:
            competitors["MONAI, reading alone"] = lambda: monai_reading(cases)
        seconds = time_in_turn(competitors, args.rounds, warmup=0)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    plain, built = medians["plain loop"], medians["builder"]
    found = {"cases": len(cases), "slices": slices, "seconds": medians}
    found["builder_against_plain_loop"] = plain / built
    found["processes_against_one"] = built / medians[parallel]
    rows = []
    for name, median in medians.items():
        row = {"what": name, "time": f"{median:.2f} s", "slices/s": f"{slices / median:.0f}"}
        rows.append({**row, "against the plain loop": f"{plain / median:.2f}x"})
    return report(__file__, argv, args, found, rows)


if __name__ == "__main__":
    main()
