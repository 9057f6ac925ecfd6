#!/usr/bin/env python
"""Show where a model errs: a report over a test split, or the figures of one patient.

python examples/error_analysis.py --model runs/phantom
python examples/error_analysis.py --model runs/slices --spacing_mm 1
python examples/error_analysis.py --model runs/slices --dataset_name others
python examples/error_analysis.py --model runs/slices --case BraTS20_Training_001 --output_dir figures
python examples/error_analysis.py --model runs/cv --test_dir hospital_b

Data options that are left out are those of the run that trained the model, if `run.json` is in its folder.
"""

import argparse
import logging
import math
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from case_view import segment_case
from error_metrics import Analysis
from error_plots import draw_case
from error_report import write_report
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from sam2unet_hf.cases_sam2unet import find_cases
from sam2unet_hf.devices import device_name
from sam2unet_hf.ensemble_sam2unet import Sam2UNetEnsemble
from sam2unet_hf.finetuning.cohort import load_cohort
from sam2unet_hf.finetuning.data_sources import (
    DEFAULT_MODALITIES,
    DataArguments,
    find_columns,
    find_regions,
    load_data,
    make_images,
)
from sam2unet_hf.finetuning.image_depth import Brightest, fit_white_level
from sam2unet_hf.finetuning.processes import set_up_logging
from sam2unet_hf.finetuning.provenance import RECORD, read_record
from sam2unet_hf.finetuning.recipes import RECIPES
from sam2unet_hf.patient_checks import describe_known_patients, read_splits
from sam2unet_hf.regions_sam2unet import parse_regions
from sam2unet_hf.training import ImageRows, SegmentationTransform
from sam2unet_hf.training.patients import read_column
from sam2unet_hf.volume import Sam2UNetVolumePipeline


logger = logging.getLogger("error_analysis")

# Options that are taken from the run unless they are given; those of scans only from a run on scans.
SCAN_OPTIONS = ("slices", "plane", "min_tumor_pixels", "modalities", "skip_bad_cases")
DATA_OPTIONS = ("dataset_name", "dataset_config_name", "brats_dir", "image_column", "mask_column", "split_seed")
DATA_OPTIONS += ("group_by", "test_split", "folds", "fold")
# They make the test split.
SPLIT_OPTIONS = (
    "split_seed",
    "group_by",
    "test_split",
    "folds",
    "fold",
    "slices",
    "plane",
    "min_tumor_pixels",
    "modalities",
)


@dataclass
class AnalysisArguments:
    """Model, images and output of an error analysis."""

    model: str = HfArg(
        default="runs/phantom",
        help="SAM2-UNet or ensemble: Hub id or folder. Data options that are left out are those in the run.json of "
        "its folder; without one it is the phantom.",
    )
    split: str = HfArg(default="test", help="Split to analyse: train, validation or test.")
    test_dir: str | None = HfArg(
        default=None, help="Second cohort to analyse all of: folder of BraTS scans, data set or image folder."
    )
    case: str | None = HfArg(
        default=None, help="Folder of one patient's scans: draw the figures of this case instead."
    )
    output_dir: str | None = HfArg(default=None, help="Folder to write to. Default: errors in that of the model.")
    max_images: int | None = HfArg(default=None, help="Analyse this many images, evenly spread over the split.")
    worst: int = HfArg(default=6, help="Worst images shown per region, of different cases if possible.")
    spacing_mm: list[float] | None = HfArg(
        default=None, help="Height and width of a pixel, or both in one number, for mm instead of pixels."
    )
    format: list[str] = HfArg(
        default_factory=lambda: ["png"],
        metadata={"choices": ("png", "pdf", "svg")},
        help="File formats of the figures.",
    )
    batch_size: int = HfArg(default=8, help="Images that the model takes at once.")
    device: str | None = HfArg(default=None, help="Device, such as cpu or cuda:1. Default: a GPU if there is one.")


def prepare_folder(path: str) -> Path:
    """Make the folder of the results, and check before the analysis that it can be written to."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as err:
        raise SystemExit(f"{folder} cannot be written to ({err}). Pass another folder by --output_dir.") from err
    return folder


def read_run(model: str) -> tuple[Path, dict[str, Any] | None]:
    """Return the path of the record of the run that trained a model, and the arguments in it, `None` without one."""
    folder = Path(model)
    # The record of a checkpoint lies in the folder above it.
    if folder.resolve().name.startswith("checkpoint-") and not (folder / RECORD).exists():
        folder = folder.resolve().parent
    path = folder / RECORD
    try:
        record = read_record(folder)
        return path, None if record is None else dict(record["arguments"])
    except (OSError, KeyError, TypeError, ValueError) as err:
        raise SystemExit(
            f"{path} cannot be read as the record of a run ({err!r}). Put back what the run wrote, or remove it and "
            "name the data by --dataset_name or --brats_dir."
        ) from err


def format_option(name: str, value: Any) -> str:
    """Return an option as it is given on the command line."""
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def fill_from_run(model: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the data options of the run for those that are not given, or the phantom's without a run."""
    path, run = read_run(model)
    names_data = "dataset_name" in given or "brats_dir" in given
    if run is None:
        if names_data:
            return {}
        logger.warning("There is no %s to tell what the model was trained on: taking the phantom.", path)
        return {"slices": RECIPES["volume"]["slices"]}
    names = [*DATA_OPTIONS, *(SCAN_OPTIONS if run.get("dataset_name") is None else ())]
    run = {name: run[name] for name in names if run.get(name) is not None}
    for name in SPLIT_OPTIONS:
        ours, theirs = (format_option(name, options.get(name)) for options in (given, run))
        if name in given and name in run and ours != theirs:
            logger.warning(
                f"{ours} is given, but {path} has {theirs}: this is not the split of that run, and may hold what the "
                "model was trained on."
            )
    left = {*given, *(("dataset_name", "brats_dir", "test_split", "folds", "fold") if names_data else ())}
    if names_data and given.get("dataset_name") != run.get("dataset_name"):
        left.add("dataset_config_name")
    taken = {name: value for name, value in run.items() if name not in left}
    logger.info("As in %s: %s.", path, " ".join(format_option(*item) for item in taken.items()) or "nothing")
    return taken


def parse_arguments(argv: list[str] | None) -> tuple[AnalysisArguments, DataArguments]:
    """Read the command line; take data options that are not given from the run that trained the model."""
    parser = HfArgumentParser((AnalysisArguments, DataArguments), description=__doc__.split("\n")[0])
    # The parser sets no default where the namespace has a value, so what is still open afterwards was not given.
    is_open = object()
    names = [option.name for option in fields(DataArguments)]
    found, _ = parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(names, is_open)))
    given = {name: getattr(found, name) for name in names if getattr(found, name) is not is_open}
    if (found.case is not None) + ("dataset_name" in given) + ("brats_dir" in given) > 1:
        parser.error("pass one of --case, --dataset_name and --brats_dir")
    if found.test_dir is not None and (found.case is not None or "dataset_name" in given or "brats_dir" in given):
        parser.error("--test_dir is analysed alone: pass it without --case, --dataset_name and --brats_dir")
    if found.case is None and found.test_dir is None:
        parser.set_defaults(**fill_from_run(found.model, given))
    args, data_args = parser.parse_args_into_dataclasses(argv)
    if data_args.folds is not None and data_args.fold is None:
        parser.error("--folds cuts the data into several splits: name one by --fold")
    for name in ("max_images", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if args.device is not None:
        try:
            device_name(args.device)
        except argparse.ArgumentTypeError as err:
            parser.error(f"argument --device: {err}")
    if args.worst < 0:
        parser.error(f"--worst must not be negative, got {args.worst}")
    if args.spacing_mm is not None:
        if len(args.spacing_mm) > 2 or not all(0 < value < math.inf for value in args.spacing_mm):
            parser.error(f"--spacing_mm takes one or two positive numbers, got {args.spacing_mm}")
        args.spacing_mm = [args.spacing_mm[0], args.spacing_mm[-1]]
    if args.output_dir is None:
        folder = Path(args.model) if Path(args.model).is_dir() else Path("runs") / Path(args.model).name
        args.output_dir = str(folder / "errors")
    return args, data_args


def load_model(args: AnalysisArguments) -> Sam2UNetEnsemble:
    """Load the model, or all of an ensemble, with image processors."""
    try:
        return Sam2UNetEnsemble.from_pretrained(args.model, args.device)
    except (OSError, ValueError) as err:
        raise SystemExit(
            f"--model {args.model}: {err} Train one with `python examples/run_segmentation.py`, or pass the folder or "
            "Hub id of another."
        ) from err


def analyse_case(args: AnalysisArguments, segment: Sam2UNetVolumePipeline) -> None:
    """Write the figures of one patient."""
    try:
        cases = find_cases(args.case)
        if len(cases) > 1:
            raise ValueError(
                f"{args.case} holds {len(cases)} cases, such as {cases[0].folder}. Pass the folder of one."
            )
        folder = prepare_folder(args.output_dir)
        if "seg" not in cases[0].files:
            logger.warning("Case %s has no expert's mask: its figures show the prediction alone.", cases[0].case_id)
        view = segment_case(segment, cases[0], batch_size=args.batch_size, return_probabilities=True)
    except (OSError, ValueError) as err:  # there is no case, or it cannot be read
        raise SystemExit(f"--case: {err}") from err
    draw_case(view, folder, args.format)


def read_split(
    args: AnalysisArguments, data_args: DataArguments, regions: dict[str, list[int]]
) -> tuple[ImageRows, dict[int, int], Brightest | None]:
    """Return the images of a split, the ids to replace in their masks, and the brightest image of many bits."""
    data = load_data(data_args)
    if args.split not in data:
        raise SystemExit(f"--split {args.split}: the data set has {', '.join(data)}. Pass one of them.")
    columns = find_columns(data, data_args)
    try:
        _, mapping, brightest = find_regions(data, *columns, regions, binarize=data_args.binarize)
    except SystemExit as err:
        raise SystemExit(f"{err} {args.model} segments {regions}: pass data with masks of these ids.") from err
    count, total = len(data[args.split]), sum(map(len, data.values()))
    logger.info("The %s split has %d of %d images; --test_dir takes all of a second cohort.", args.split, count, total)
    images = make_images({args.split: data[args.split]}, *columns, data_args.neighbours)
    return images[args.split], mapping, brightest


def analyse_images(args: AnalysisArguments, data_args: DataArguments, ensemble: Sam2UNetEnsemble) -> None:
    """Write the report on a split of a data set, or on all of a second cohort."""
    processor, regions = ensemble.processors[0], ensemble.regions
    data_args.modalities = data_args.modalities or processor.modalities or DEFAULT_MODALITIES
    if data_args.neighbours is None:
        data_args.neighbours = processor.neighbours
    if args.test_dir is None:
        rows, mapping, brightest = read_split(args, data_args, regions)
    else:
        data_args.plane = processor.plane or data_args.plane
        cohort = load_cohort(args.test_dir, data_args, regions)
        rows, mapping, brightest = cohort.images, cohort.label_mapping, cohort.brightest
    for own in ensemble.processors:
        fit_white_level(own, brightest, data_args.white_level)
    folder = prepare_folder(args.output_dir)
    transform = SegmentationTransform(processor, label_mapping=mapping)
    try:
        known = describe_known_patients(read_splits(args.model), map(str, read_column(rows, "case_id") or ()))
    except ValueError as err:
        raise SystemExit(f"--model {args.model}: {err}") from err
    if known:
        logger.warning(known)
    analysis = Analysis(ensemble, rows, transform, args.spacing_mm)
    analysis.run(args.batch_size, args.max_images)
    split = "" if args.test_dir else f"{args.split} "
    images = f"{len(analysis.records) // len(regions)} of {len(rows)} {split}images"
    source = args.test_dir or data_args.dataset_name or data_args.brats_dir or "the phantom"
    write_report(analysis, folder, f"Errors of {args.model} on {images} of {source}", args.worst, args.format)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    set_up_logging()
    args, data_args = parse_arguments(argv)
    ensemble = load_model(args)
    regions = ensemble.regions
    try:
        given = regions if data_args.regions is None else parse_regions(data_args.regions)
        if given != regions:
            raise ValueError(f"{args.model} segments {regions}, not {given}. Leave out --regions.")
    except ValueError as err:
        raise SystemExit(f"--regions: {err}") from err
    if args.case is None:
        analyse_images(args, data_args, ensemble)
    else:
        try:
            segment = Sam2UNetVolumePipeline(
                ensemble.models, ensemble.processors, data_args.modalities, ensemble.clean_up
            )
        except ValueError as err:
            raise SystemExit(f"--modalities: {err}") from err
        analyse_case(args, segment)
    logger.info("The results are in %s.", Path(args.output_dir))


if __name__ == "__main__":
    main()
