"""Write BraTS slices as Parquet files with a data set card, and push them to the Hub if asked to."""

import argparse
import logging
import os
import string
import sys
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sam2unet_hf.nifti import MODALITIES, PLANES

from .brats_slices import CITATION, BratsSlices


logger = logging.getLogger(__name__)

SIZE_CATEGORIES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (float("inf"), "100K<n<1M"))  # the Hub's


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; the options of the data set have the names of `BratsSlicesConfig`."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset_scripts.brats_slices",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--brats_dir", required=True, help="folder that holds the BraTS cases, at any depth")
    parser.add_argument("--output_dir", required=True, type=Path, help="new folder for the data set")
    parser.add_argument("--push_to_hub", metavar="ID", help="upload to this data set repository, made private")
    parser.add_argument(
        "--modalities", nargs="+", default=["flair"], choices=MODALITIES, help="one, or three as red, green and blue"
    )
    parser.add_argument(
        "--slices", nargs="+", default=["95"], help="indices, `all`, or `tumor` for the slices that show enough of it"
    )
    parser.add_argument("--min_tumor_pixels", type=int, default=1, help="how much is enough for `--slices tumor`")
    parser.add_argument("--plane", default="axial", choices=sorted(PLANES), help="how to cut")
    parser.add_argument("--seed", type=int, default=0, help="chooses the split")
    parser.add_argument("--num_proc", type=int, default=1, help="number of processes")
    parser.add_argument("--skip_bad_cases", action="store_true", help="leave out and list cases that cannot be used")
    args = parser.parse_args(argv)
    words = " ".join(args.slices).split()  # `--slices 80 95` and `--slices "80 95"`
    try:
        args.slices = words[0] if words in (["all"], ["tumor"]) else [int(word) for word in words]
    except ValueError:
        parser.error(f"argument --slices: expected indices, `all` or `tumor`, got {' '.join(words)}")
    return args


def write_dataset(
    builder: BratsSlices, output_dir: Path, num_proc: int = 1, repo_id: str | None = None
) -> dict[str, str]:
    """Build a data set and write it to a folder that appears whole or not at all.

    Args:
        builder: Builder whose options are set.
        output_dir: New or empty folder. It gets `data/{split}-*.parquet` and `README.md`.
        num_proc: Number of processes.
        repo_id: Where on the Hub it will be, for the card.

    Returns:
        Why cases have no rows, by case id.

    Raises:
        FileExistsError: If the folder is not empty.
        BratsCaseError: If a case cannot be used and the builder does not skip bad cases.
    """
    output_dir = Path(os.path.abspath(output_dir))
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise FileExistsError(f"`{output_dir}` is not empty. Remove it or choose another `--output_dir`.")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as staging:
        build, whole = Path(staging, "build"), Path(staging, "whole")
        builder.download_and_prepare(str(build), file_format="parquet", num_proc=num_proc)
        (whole / "data").mkdir(parents=True)
        for path in sorted(build.glob("*.parquet")):
            name = path.stem.removeprefix(f"{builder.dataset_name}-")
            path.rename(whole / "data" / f"{name if '-of-' in name else f'{name}-00000-of-00001'}.parquet")
        skipped = builder.skipped_cases
        card = render_card(builder, whole / "data", skipped, repo_id or output_dir.name)
        (whole / "README.md").write_text(card, encoding="utf-8")
        if output_dir.exists():
            output_dir.rmdir()
        whole.rename(output_dir)
    return skipped


def render_card(builder: BratsSlices, data_folder: Path, skipped: dict[str, str], load_path: str) -> str:
    """Fill the template of the card with the options and with what the Parquet files hold."""
    config = builder.config
    patient_of = {case.case_id: case.patient_id for case in config.cases}
    all_cases: set[str] = set()
    n_slices = 0
    split_rows = []
    for split in builder.info.splits:
        tables = [pq.read_table(path, columns=["case_id", "wt_pixels"]) for path in data_folder.glob(f"{split}-*")]
        table = pa.concat_tables(tables)
        cases = set(table["case_id"].to_pylist())
        n_patients = len({patient_of[case] for case in cases})
        n_tumor = np.count_nonzero(table["wt_pixels"])
        split_rows.append(f"| {split} | {n_patients} | {len(cases)} | {len(table)} | {n_tumor} |")
        all_cases |= cases
        n_slices += len(table)
    options = {
        "modalities": " ".join(config.modalities),
        "slices": " ".join(map(str, config.slices)) if isinstance(config.slices, list) else config.slices,
        "min_tumor_pixels": config.min_tumor_pixels if config.slices == "tumor" else "not used",
        "plane": config.plane,
        "seed": config.seed,
        "skip_bad_cases": config.skip_bad_cases,
    }
    grey = f"grey, {config.modalities[0]}"
    template = resources.files(__package__).joinpath("README.md").read_text(encoding="utf-8")
    return string.Template(template).substitute(
        size_category=next(name for limit, name in SIZE_CATEGORIES if n_slices < limit),
        data_files="\n".join(f"  - split: {split}\n    path: data/{split}-*" for split in builder.info.splits),
        n_cases=len(all_cases),
        n_patients=len({patient_of[case] for case in all_cases}),
        load_path=load_path,
        split_rows="\n".join(split_rows),
        image_content=grey if len(config.modalities) == 1 else f"RGB: {', '.join(config.modalities)}",
        version=builder.VERSION,
        option_rows="\n".join(f"| `{name}` | {value} |" for name, value in options.items()),
        skipped=f"Cases without rows: {', '.join(skipped)}." if skipped else "All cases found have rows.",
        citation=CITATION,
    )


def push_dataset(folder: Path, repo_id: str) -> None:
    """Upload a data set folder to a private repository; a public one is refused, for BraTS forbids it."""
    api = huggingface_hub.HfApi()
    api.create_repo(repo_id, repo_type="dataset", private=True, exist_ok=True)
    if not api.repo_info(repo_id, repo_type="dataset").private:
        raise ValueError(
            f"`{repo_id}` is public, and the terms of BraTS forbid to pass the scans on. Make the repository private, "
            f"then run: hf upload --repo-type dataset {repo_id} {folder}"
        )
    api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=folder, delete_patterns="data/*")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line tool."""
    logger.handlers = [logging.StreamHandler()]
    logger.setLevel(logging.INFO)
    args = parse_args(argv)
    try:
        if args.push_to_hub:
            huggingface_hub.HfApi().whoami()  # no token is better known before the scans are read
        builder = BratsSlices(
            data_dir=args.brats_dir,
            modalities=args.modalities,
            slices=args.slices,
            min_tumor_pixels=args.min_tumor_pixels,
            plane=args.plane,
            seed=args.seed,
            skip_bad_cases=args.skip_bad_cases,
        )
        skipped = write_dataset(builder, args.output_dir, args.num_proc, args.push_to_hub)
        counts = ", ".join(f"{split.num_examples} {name}" for name, split in builder.info.splits.items())
        n_used = len({case.case_id for case in builder.config.cases} - set(skipped))
        logger.info(
            "Wrote %s slices of %d cases to %s (cases left out: %d).", counts, n_used, args.output_dir, len(skipped)
        )
        if args.push_to_hub:
            push_dataset(args.output_dir, args.push_to_hub)
            logger.info("Pushed to https://huggingface.co/datasets/%s", args.push_to_hub)
    except (ValueError, OSError) as err:
        sys.exit(f"error: {err}")
    logger.info('Read it with: datasets.load_dataset("%s")', args.push_to_hub or args.output_dir)


if __name__ == "__main__":
    main()
