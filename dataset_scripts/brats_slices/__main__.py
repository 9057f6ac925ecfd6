"""Write BraTS slices as Parquet files with a data set card, and push them to the Hub if asked to."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.errors import HTTPError

from sam2unet_hf.labels_sam2unet import NUMBERINGS
from sam2unet_hf.scans_sam2unet import MODALITIES, PLANES

from .brats_slices import OPTIONS, SLICE_CHOICES, BratsSlices
from .publish import prepare_repository, push_dataset, write_dataset


logger = logging.getLogger(__package__)  # of all modules here: what they say goes to the terminal


def parse_args(
    argv: Sequence[str] | None = None, prog: str = "python -m dataset_scripts.brats_slices"
) -> argparse.Namespace:
    """Read the command line; the options of the data set have the names of `BratsSlicesConfig`."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
    )
    parser.add_argument("--brats_dir", required=True, help="folder that holds the cases, at any depth")
    parser.add_argument("--output_dir", required=True, type=Path, help="new folder for the data set")
    parser.add_argument("--push_to_hub", metavar="ID", help="upload to this data set repository, private if it is new")
    parser.add_argument(
        "--public",
        action="store_true",
        help="the repository is public: only for scans you may pass on, which those of BraTS are not; an existing "
        "private one stays private",
    )
    parser.add_argument(
        "--show_slices",
        action="store_true",
        help="show slices of a few patients in the card, to all who may see the data set; those of a phantom are "
        "shown anyway",
    )
    parser.add_argument(
        "--modalities", nargs="+", choices=MODALITIES, help="a column each; by default those that every case has"
    )
    parser.add_argument(
        "--slices",
        nargs="+",
        default=["95"],
        help="indices, `all`, `head` for those that show the head, or `tumor` for those that show enough of it; "
        "default: 95",
    )
    parser.add_argument(
        "--min_tumor_pixels", type=int, default=1, help="how much is enough for `--slices tumor`; default: 1"
    )
    parser.add_argument("--plane", default="axial", choices=sorted(PLANES), help="how to cut; default: axial")
    parser.add_argument(
        "--labels", choices=list(NUMBERINGS), help="what the labels of the masks mean; by default what the names tell"
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses the split; default: 0")
    parser.add_argument("--num_proc", type=int, default=1, help="number of processes; default: 1")
    parser.add_argument("--skip_bad_cases", action="store_true", help="leave out and list cases that cannot be used")
    args = parser.parse_args(argv)
    if args.public and not args.push_to_hub:
        parser.error("argument --public: needs --push_to_hub, which names the repository")
    words = " ".join(args.slices).split()  # `--slices 80 95` and `--slices "80 95"`
    try:
        args.slices = words[0] if len(words) == 1 and words[0] in SLICE_CHOICES else [int(word) for word in words]
    except ValueError:
        choices = ", ".join(SLICE_CHOICES)
        parser.error(f"argument --slices: expected indices or one of {choices}, got {' '.join(words)}")
    return args


def main(argv: Sequence[str] | None = None, prog: str = "python -m dataset_scripts.brats_slices") -> None:
    """Run the command line tool, whose usage calls it `prog`."""
    logger.handlers = [logging.StreamHandler()]
    logger.setLevel(logging.INFO)
    args = parse_args(argv, prog)
    try:
        builder = BratsSlices(data_dir=args.brats_dir, **{name: getattr(args, name) for name in OPTIONS})
        url = prepare_repository(args.push_to_hub, args.public) if args.push_to_hub else None
        repo_id = url.repo_id if url else None
        skipped = write_dataset(builder, args.output_dir, args.num_proc, repo_id, args.public, args.show_slices)
        counts = ", ".join(f"{split.num_examples} {name}" for name, split in builder.info.splits.items())
        n_used = len({case.case_id for case in builder.config.cases} - set(skipped))
        logger.info(
            "Wrote %s slices of %d cases to %s (cases left out: %d).", counts, n_used, args.output_dir, len(skipped)
        )
        if repo_id:
            push_dataset(args.output_dir, repo_id, args.public)
            logger.info("Pushed to %s", url)
    except (ValueError, OSError, HTTPError) as err:
        sys.exit(f"error: {err}")
    logger.info('Read it with: datasets.load_dataset("%s")', repo_id or args.output_dir)


if __name__ == "__main__":
    main()
