"""Write a phantom cohort: `python -m dataset_scripts.phantom --output_dir DIR`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .cohort import DEFAULT_SHAPE, NUM_PATIENTS, write_phantom_cohort


def main(argv: Sequence[str] | None = None, prog: str = "python -m dataset_scripts.phantom") -> None:
    """Write phantom patients as BraTS has patients: a folder each, with four contrasts and a mask in NIfTI."""
    parser = argparse.ArgumentParser(prog=prog, description=main.__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="new or empty folder")
    parser.add_argument("--num_patients", type=int, default=NUM_PATIENTS, help=f"default: {NUM_PATIENTS}")
    parser.add_argument(
        "--shape", type=int, nargs=3, default=DEFAULT_SHAPE, help="voxels left, back, up; 240 240 155 is BraTS' size"
    )
    parser.add_argument("--seed", type=int, default=0, help="makes other patients; default: 0")
    args = parser.parse_args(argv)
    try:
        write_phantom_cohort(args.output_dir, args.num_patients, args.shape, args.seed)
    except (OSError, ValueError) as err:
        parser.error(str(err))


if __name__ == "__main__":
    main()
