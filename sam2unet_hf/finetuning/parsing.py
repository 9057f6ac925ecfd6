"""Command line of `run_segmentation.py`, and what it says of regions, resuming and the model card."""

import dataclasses
import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from dataset_scripts.brats_slices import citation_of
from dataset_scripts.phantom import is_phantom
from sam2unet_hf import Sam2UNetConfig, Sam2UNetImageProcessor
from sam2unet_hf.devices import default_device, has_bfloat16
from sam2unet_hf.finetuning.arguments import (
    ARGUMENTS,
    RESUME_WORDS,
    DataArguments,
    ModelArguments,
    SegmentationTrainingArguments,
)
from sam2unet_hf.finetuning.case_names import to_file_name
from sam2unet_hf.finetuning.option_help import HELP, HELP_ALL, describe_options, wants_help
from sam2unet_hf.finetuning.processes import choose_num_workers, exit_on, is_main_process
from sam2unet_hf.finetuning.recipes import recipe_defaults
from sam2unet_hf.model_card import counted
from sam2unet_hf.regions_sam2unet import parse_regions
from sam2unet_hf.scans_sam2unet import MODALITIES
from sam2unet_hf.training import HYPERPARAMETERS, ImageRows


# Options that name folders or repositories.
PATHS = ("dataset_name", "brats_dir", "test_dir", "model_name_or_path", "sam2_checkpoint", "output_dir")
# Options of other tools, and ours.
OTHER_NAMES = {"device": "use_cpu", "lr": "learning_rate", "batch_size": "per_device_train_batch_size"}


def name_of_source(source: str) -> str:
    """Return the name of a folder, or a Hub id as it is."""
    return Path(source).resolve().name if Path(source).exists() else source


def parse_arguments(
    argv: list[str] | None, prog: str | None = None
) -> tuple[ModelArguments, DataArguments, SegmentationTrainingArguments]:
    """Read the command line, with the defaults of the recipe; its usage calls it `prog`, or by its file."""
    argv = sys.argv[1:] if argv is None else list(argv)
    # Usage that lists every option would hide what is wrong, and the help shows the defaults of the recipe.
    usage = "%(prog)s [--OPTION VALUE ...], options are listed by --help"
    parser = HfArgumentParser(ARGUMENTS, prog=prog, usage=usage, add_help=False, allow_abbrev=False)
    has_all = wants_help(argv)
    argv = [word for word in argv if word not in (*HELP, *HELP_ALL)]
    if not is_main_process():
        parser.error = sys.exit  # type: ignore[assignment, method-assign] # the main process prints the usage, once
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(describe_unknown(unknown))
    for one, other in (("dataset_name", "brats_dir"), ("model_name_or_path", "sam2_checkpoint")):
        if getattr(given, one) is not None and getattr(given, other) is not None:
            parser.error(f"pass one of --{one} and --{other}")
    for name in PATHS:
        if getattr(given, name) == "":
            parser.error(f"--{name} is empty, such as by a variable that is not set")
    if given.preset is not None and (start := given.model_name_or_path or given.sam2_checkpoint):
        parser.error(f"--preset is the size of an encoder from scratch, and {start} has its own: leave it out")
    source = given.dataset_name or given.brats_dir
    if source is None and scores_cohort_alone(given, given):
        source = given.test_dir
        if given.model_name_or_path is None:
            parser.error("--test_dir with --do_train false scores a model: name it by --model_name_or_path")
    recipe = given.recipe or ("volume" if source is None or given.brats_dir is not None else None)
    has_model = given.model_name_or_path is not None
    device = "cpu" if given.use_cpu else default_device()
    defaults = recipe_defaults(recipe, source is None, has_model, not given.fp16 and has_bfloat16(device))
    if given.image_size is not None:  # a size to resize to takes the place of a window
        defaults.pop("head_crop_size", None)
        defaults.pop("head_crop_scale", None)
    if not (has_model or given.sam2_checkpoint):
        defaults["preset"] = "tiny"
    parser.set_defaults(recipe=recipe, dataloader_num_workers=choose_num_workers(device), **defaults)
    name = to_file_name("phantom" if source is None else name_of_source(source), separator="-")
    kind = "-folds" if given.folds is not None else "" if given.do_train else "-evaluation"
    # A project of trackio is published as a whole, so each data set has its own. Data sets in folders of the same name
    # share one, which therefore holds no pictures of patients unless they may be shared.
    parser.set_defaults(output_dir=f"runs/{name}{kind}", project=f"sam2unet-{name}")
    if given.folds is not None:  # the patients that a fold is scored on must not choose its epoch
        parser.set_defaults(load_best_model_at_end=False)
    if has_all is not None:
        sys.stdout.write(f"{describe_options(parser, ARGUMENTS, has_all)}\n")
        raise SystemExit(0)
    try:
        model_args, data_args, args = parser.parse_args_into_dataclasses(argv)
        check_folds(data_args, args)
    except (ImportError, OSError, ValueError) as err:  # such as --deepspeed without the package, or its file
        parser.error(str(err))
    if not (args.do_train or has_model):
        parser.error("--do_train false scores a model that was trained before: name it by --model_name_or_path")
    for option in ("dataset_name", "brats_dir", "test_dir"):
        folder = getattr(given, option)
        if folder is not None and Path(folder).resolve() == Path(args.output_dir).resolve():
            parser.error(f"--output_dir {args.output_dir} is the folder of --{option}: name another")
    if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        parser.error(f"--output_dir {args.output_dir} is a file: name a folder")
    return model_args, data_args, args


def describe_unknown(words: list[str]) -> str:
    """Say which words of the command line are no options, and which options were perhaps meant."""
    if not words[0].startswith("-"):
        return f"{words[0]} belongs to no option. Name data by --dataset_name or --brats_dir"
    word = words[0].split("=")[0]
    name = word.strip("-").replace("-", "_")
    names = [field.name for arguments in ARGUMENTS for field in dataclasses.fields(arguments)]
    near = [OTHER_NAMES[name]] if name in OTHER_NAMES else difflib.get_close_matches(name, names, n=3)
    near = near or [other for other in names if name in other][:3]
    return f"there is no option {word}" + (f", perhaps --{' or --'.join(near)} was meant" if near else "")


def check_folds(data_args: DataArguments, args: SegmentationTrainingArguments) -> None:
    """Raise a `ValueError` for options that a cross-validation cannot go with."""
    if data_args.folds is None:
        return
    if data_args.streaming:
        raise ValueError(
            "--folds chooses rows by their patients, but --streaming reads whole files as they are. Leave out "
            "--streaming, or write a data set for each fold."
        )
    if not args.do_train:
        raise ValueError(
            "--folds trains a model for each fold; it cannot go with --do_train false. Leave out --folds to score the "
            "model of one."
        )
    if args.push_to_hub:
        raise ValueError(
            "--push_to_hub would push the models of all --folds to one repository. Leave it out, and push the model "
            "of a fold from its folder."
        )
    if (args.resume_from_checkpoint or "true").lower() not in RESUME_WORDS:
        raise ValueError(
            f"--resume_from_checkpoint must be true with --folds, since each fold has checkpoints of its own, got "
            f"{args.resume_from_checkpoint}."
        )


def scores_cohort_alone(data_args: Any, args: Any) -> bool:
    """Whether only the cohort of `--test_dir` is scored: the run neither trains nor has data of its own."""
    return bool(args.test_dir) and not (args.do_train or data_args.dataset_name or data_args.brats_dir)


def requested_regions(model_args: ModelArguments, data_args: DataArguments) -> dict[str, list[int]] | None:
    """Return the regions that `--regions` names, else those of the model to start from, if there is one."""
    regions: Any = None
    if model_args.model_name_or_path is not None:  # read in any case, since data may take minutes to read
        with exit_on(OSError, ValueError, prefix="--model_name_or_path: "):
            regions = Sam2UNetConfig.from_pretrained(model_args.model_name_or_path).regions
    if data_args.regions is not None:
        with exit_on(ValueError, prefix="--regions: "):
            regions = parse_regions(data_args.regions)
    return regions


def take_channels_of_model(
    model_args: ModelArguments, data_args: DataArguments, args: SegmentationTrainingArguments
) -> None:
    """Set modalities and neighbours that are not given to those of the model to start from, if there is one.

    A second cohort that is scored alone is cut in the plane of the model, too.
    """
    if model_args.model_name_or_path is None:
        return
    try:
        processor = Sam2UNetImageProcessor.from_pretrained(model_args.model_name_or_path)
    except OSError:  # it has none, which is said when it is loaded
        return
    data_args.modalities = data_args.modalities or processor.modalities
    if data_args.neighbours is None:
        data_args.neighbours = processor.neighbours
    if scores_cohort_alone(data_args, args):
        data_args.plane = processor.plane or data_args.plane


def resume_arguments(
    model_args: ModelArguments, data_args: DataArguments, training_args: SegmentationTrainingArguments
) -> dict[str, Any]:
    """Return the arguments that must stay the same when a run is resumed, because they change its result."""
    names = [*HYPERPARAMETERS, "augmentation", "batch_norm_images", "ema_decay", "sync_batch_norm"]
    values = {name: getattr(training_args, name) for name in [*names, "trainable_only", "eval_strategy"]}
    plain = {name: getattr(value, "value", value) for name, value in values.items()}  # JSON has no enumerations
    return {**dataclasses.asdict(model_args), **dataclasses.asdict(data_args), **plain}


def card_arguments(
    data: Mapping[str, ImageRows],
    model_args: ModelArguments,
    data_args: DataArguments,
    args: SegmentationTrainingArguments,
    split_rule: str,
) -> dict[str, Any]:
    """Return the arguments of `create_model_card`: what the card says of the data and of the start of the run.

    `split_rule` says how the images came into their splits.
    """
    has_scans = data_args.dataset_name is None
    case_ids = set(data["train"]["case_id"]) if has_scans else set()
    made_up = bool(case_ids) and all(map(is_phantom, case_ids))
    citation = citation_of(case_ids) if has_scans else ""
    rows: dict[str, Any] = {} if data_args.recipe is None else {"recipe": data_args.recipe}
    for split, images in data.items():
        # The cases of photographs are the photographs, those of scans have many slices each.
        has_slices = "wt_pixels" in images.column_names and "case_id" in images.column_names
        scans = f" of {counted(len(set(images['case_id'])), 'scan')}" if has_slices else ""
        rows[f"{'training' if split == 'train' else split} images"] = f"{len(images)}{scans}"
    if has_scans:
        rows["slices"] = f"{data_args.plane}, {' '.join(data_args.slices)}"
        if "tumor" in data_args.slices:
            rows["slices"] += f" (at least {counted(data_args.min_tumor_pixels, 'pixel')} of it)"
        rows["intensities"] = "0.5 to 99.5 percentile of each volume's foreground, to 8 bits"
        name = "a phantom cohort in BraTS' layout" if made_up else "BraTS"
    else:
        name = name_of_source(data_args.dataset_name)
    rows["split"] = split_rule
    if set(data["train"].image_columns) <= set(MODALITIES):
        rows["modalities"] = ", ".join(data["train"].image_columns)
    if count := data["train"].neighbours:
        rows["neighbours"] = f"{counted(count, 'slice')} below and {count} above, as further channels"
    return {
        "license": args.license,
        "tags": ["medical", "mri", "brain-tumor"] if has_scans else [],
        "finetuned_from": model_args.model_name_or_path,
        "dataset": name,
        "dataset_tags": None if has_scans or Path(data_args.dataset_name).exists() else data_args.dataset_name,
        "dataset_args": data_args.dataset_config_name,
        "data": rows,
        "data_citation": f"```bibtex\n{citation.strip()}\n```" if citation else None,
        "share_predictions": (has_scans and data_args.brats_dir is None) or args.share_predictions,
    }
