"""Command line of `run_segmentation.py`, and what it says of regions, resuming and the model card."""

import dataclasses
import difflib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from case_names import to_file_name
from option_help import HELP, HELP_ALL, describe_options, wants_help
from processes import choose_num_workers, exit_on, is_main_process
from recipes import RECIPES, recipe_defaults
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.integrations import get_available_reporting_integrations

from dataset_scripts.brats_slices import citation_of
from dataset_scripts.phantom import is_phantom
from sam2unet_hf import Sam2UNetConfig, Sam2UNetImageProcessor
from sam2unet_hf.configuration_sam2unet import PRESETS
from sam2unet_hf.devices import default_device, has_bfloat16
from sam2unet_hf.labels_sam2unet import NUMBERINGS
from sam2unet_hf.model_card import counted
from sam2unet_hf.modeling_sam2unet import MIN_IMAGE_SIZE
from sam2unet_hf.regions_sam2unet import parse_regions
from sam2unet_hf.scans_sam2unet import MODALITIES, PLANES
from sam2unet_hf.training import AUGMENTATIONS, HYPERPARAMETERS, ImageRows
from sam2unet_hf.training.metrics import lower_is_better


# Options of which PyTorch or transformers refuse smaller values by a traceback, after an older run was removed.
LEAST_VALUES = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
}
# Options that name folders or repositories.
PATHS = ("dataset_name", "brats_dir", "test_dir", "model_name_or_path", "sam2_checkpoint", "output_dir")
# Options of other tools, and ours.
OTHER_NAMES = {"device": "use_cpu", "lr": "learning_rate", "batch_size": "per_device_train_batch_size"}
# Values of --resume_from_checkpoint for the last checkpoint of the output folder.
RESUME_WORDS = ("true", "last")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """Return the field of an option, whose default may be a list, and whose metadata may name its `choices`."""
    kind = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return HfArg(help=help, metadata=metadata, **kind)


@dataclass
class ModelArguments:
    """Which model to start from: a SAM2-UNet, a SAM 2 encoder, or nothing."""

    model_name_or_path: str | None = option(None, "SAM2-UNet to start from: Hub id or folder.")
    sam2_checkpoint: str | None = option(
        None, "Pretrained encoder: Hub id such as facebook/sam2-hiera-large, folder, or original .pt file."
    )
    preset: str | None = option(
        None, "Size of an encoder from scratch, without a checkpoint. Default: tiny.", choices=list(PRESETS)
    )
    freeze_encoder: bool | None = option(None, "Train adapters and decoder only. Default: yes, unless from scratch.")
    iou_over_batch: bool | None = option(
        None,
        "Take the IoU of the loss over a batch instead of each image, for images without the region. "
        "Default: as the model says, else no.",
    )
    image_size: int | None = option(
        None, "Height and width to resize images to. Default: those of the checkpoint, else 352."
    )
    head_crop_size: list[str] | None = option(
        None,
        "Crop images to a window about the head instead of resizing them: its height and width in pixels, multiples "
        "of 32 when enlarged, or auto, the smallest that holds each head of the training images. Default: as the "
        "checkpoint does.",
    )
    head_crop_scale: int | None = option(
        None,
        "Whole number of times that the window about the head is enlarged for the model: 2 where voxels are 2 mm wide "
        "or more. Default: as the checkpoint does, else 1.",
    )

    def __post_init__(self):
        words = self.head_crop_size
        if words not in (None, ["auto"]) and (len(words) != 2 or not all(map(str.isdecimal, words))):
            raise ValueError(f"--head_crop_size takes auto, or height and width in pixels, got {' '.join(words)}.")
        if self.image_size is not None and self.image_size < MIN_IMAGE_SIZE:
            raise ValueError(f"--image_size must be at least {MIN_IMAGE_SIZE}, got {self.image_size}.")
        if self.head_crop_scale is not None and self.head_crop_scale < 1:
            raise ValueError(f"--head_crop_scale must be a whole number from 1 up, got {self.head_crop_scale}.")


@dataclass
class DataArguments:
    """Where images and masks come from: a data set, BraTS scans, or a phantom."""

    dataset_name: str | None = option(
        None,
        "Hub id; folder written by `python -m dataset_scripts.brats_slices`; or folder with `images` and "
        "`masks` in it, files paired by name, at its top or in train, validation and test.",
    )
    dataset_config_name: str | None = option(None, "Configuration of the data set.")
    brats_dir: str | None = option(None, "Folder of BraTS cases, in NIfTI.")
    recipe: str | None = option(
        None,
        "Defaults of the other options: `paper` for the protocol of the paper, `volume` for whole patients. "
        "Default: volume for --brats_dir and the phantom, none for --dataset_name.",
        choices=list(RECIPES),
    )
    streaming: bool = option(
        False, "Read the Parquet files of --dataset_name while training, and keep no copy on disk."
    )
    shuffle_buffer: int = option(1000, "Rows that --streaming shuffles together, and each reader holds in memory.")
    image_column: str | None = option(
        None, "Column of the images. Default: those of --modalities if there are any, else the first column of images."
    )
    mask_column: str | None = option(None, "Column of the masks. Default: mask, label or the like.")
    regions: list[str] | None = option(
        None,
        "Regions to segment, NAME=ID[,ID...] each, nested or disjoint. Default: WT=1,2,3 for BraTS, else "
        "one region per id in the masks; with --model_name_or_path those of the model.",
    )
    binarize: bool = option(
        False,
        "Take masks that are black and white with blurred edges, as resizing and JPEG leave them: values above 128 of "
        "255 are foreground, label id 1, and the rest is background.",
    )
    white_level: int | None = option(
        None,
        "Value that is white in images of more than 8 bits. Default: that of the model, or 1023, 4095 or 65535, the "
        "least that no image exceeds.",
    )
    modalities: list[str] | None = option(
        None,
        "Modalities of the scans that an image is made of, in this order. Default: those of the model, or flair.",
        choices=MODALITIES,
    )
    neighbours: int | None = option(
        None, "Slices below and above each slice that its image takes in. Default: as many as the model, or 0."
    )
    foreground_share: float | None = option(
        None,
        "Show each training slice with tumour once an epoch, and as many others in turn as make this their share. "
        "Default: show all once.",
    )
    slices: list[str] = option(["95"], "Slices of the scans: indices such as 90 95, all, head, or tumor.")
    min_tumor_pixels: int = option(1, "Least number of tumour pixels in a slice of --slices tumor.")
    plane: str = option("axial", "Plane of the slices.", choices=sorted(PLANES))
    labels: str | None = option(
        None, "What the labels of the masks of scans mean. Default: what the names tell.", choices=list(NUMBERINGS)
    )
    num_proc: int | None = option(None, "Processes that read the scans.")
    skip_bad_cases: bool = option(False, "Leave out scans that cannot be used, and list them.")
    split_seed: int = option(0, "Seed of the split by patient, for data without splits and for --folds.")
    test_split: bool = option(
        True,
        "Keep a fifth of the patients for testing, of data without a test split. False trains on them, too, where "
        "--test_dir is the test.",
    )
    folds: int | None = option(
        None,
        "Cross-validate: cut the patients into this many folds, and for each train on all others and score its own. "
        "A test split of the data set takes no part.",
    )
    fold: int | None = option(None, "Train and score this one of the --folds alone, counted from 0, as on a cluster.")
    group_by: str | None = option(
        None,
        "What tells the patients of --dataset_name, who are kept whole in splits: a column; a regular expression "
        "whose first group in the path of an image is the patient; or none. Default: the folder below `images`, or a "
        "column patient_id, patient, subject_id or subject, else case_id.",
    )
    allow_leaks: bool = option(False, "Accept a patient or an image in two splits, which makes the scores too good.")

    def __post_init__(self):
        if self.folds is not None and self.folds < 2:
            raise ValueError(f"--folds must be from 2 to the number of patients, got {self.folds}.")
        if self.fold is not None and self.folds is None:
            raise ValueError("--fold is one of several folds. Pass --folds too, such as --folds 5.")
        if self.fold is not None and not 0 <= self.fold < self.folds:
            raise ValueError(f"--fold must be from 0 to {self.folds - 1} with --folds {self.folds}, got {self.fold}.")


@dataclass
class SegmentationTrainingArguments(TrainingArguments):
    """Transformers' training arguments; without a recipe the defaults are those of `paper`."""

    do_train: bool = option(True, "Train.")
    test_dir: str | None = option(
        None,
        "Second cohort to score, all of it, with or without training: folder of BraTS scans, folder with `images` and "
        "`masks` in it, or data set.",
    )
    allow_other_modalities: bool = option(
        False, "Score other modalities than those that the model was trained on, which is hardly ever right."
    )
    do_predict: bool = option(False, "Write the label map of every test (else validation) image as PNG.")
    batch_norm_images: int | None = option(
        None,
        "Training images, per process, on which batch norm is estimated anew before each evaluation. "
        "Default: 128, or 0 with a frozen encoder and no --ema_decay.",
    )
    ema_decay: float = option(
        0.0,
        "Score and save an exponential moving average of the weights, with this decay per step, such as 0.999. "
        "Default: 0, the weights themselves.",
    )
    sync_batch_norm: bool = option(
        False, "Normalise by the images of all processes instead of those of each. Needs GPUs."
    )
    augmentation: list[str] = option(
        ["flips"], "Random changes of training images, or none.", choices=("none", *AUGMENTATIONS)
    )
    trainable_only: bool = option(
        False, "Save checkpoints without the encoder, which is fetched from --sam2_checkpoint when loaded again."
    )
    share_predictions: bool = option(
        False,
        "Show predictions.png, and with it images of your data, in the model card, upload it with --push_to_hub, and "
        "let W&B and Spaces of trackio have pictures. Those of the phantom are always shown.",
    )
    license: str | None = option(None, "Licence of the weights for the model card, as the Hub names it.")
    overwrite_output_dir: bool = option(False, "Replace the run in the output folder.")
    resume_from_checkpoint: str | None = option(
        None, "Go on from the last checkpoint in the output folder, true, or from the one named."
    )
    num_train_epochs: float = option(30.0, "Passes over the training images.")
    learning_rate: float = option(1e-4, "Initial learning rate of AdamW.")
    weight_decay: float = option(1e-4, "Weight decay of AdamW.")
    per_device_train_batch_size: int = option(1, "Training images per step and device.")
    per_device_eval_batch_size: int = option(4, "Evaluation images per step and device.")
    lr_scheduler_type: str = option("cosine_with_min_lr", "Learning rate schedule; the default ends at 1e-7.")
    eval_strategy: str = option("epoch", "When to evaluate.")
    save_strategy: str = option("epoch", "When to save a checkpoint.")
    save_total_limit: int | None = option(2, "Checkpoints kept, the best one among them.")
    load_best_model_at_end: bool = option(
        True, "End with the best checkpoint. Default: no with --folds, whose scores it would make too good, else yes."
    )
    metric_for_best_model: str | None = option("dice", "Metric that chooses the best checkpoint.")
    logging_steps: float = option(10, "Steps between two logged losses.")
    hub_strategy: str = option("end", "When to upload with --push_to_hub, such as every_save.")
    batch_eval_metrics: bool = option(True, "Score batch by batch, which bounds the memory.")
    remove_unused_columns: bool | None = option(False, "Must stay false, because rows hold images.")

    def __post_init__(self):
        for name, reason in (
            ("push_to_hub", "pushes what was trained"),
            ("fsdp", "shards the training"),
        ):
            if getattr(self, name) and not self.do_train:
                raise ValueError(f"--{name} {reason}; it cannot go with --do_train false.")
        for name, least in LEAST_VALUES.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}.")
        if self.do_train and self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(
                f"--num_train_epochs must be above 0, got {self.num_train_epochs:g}. To score a model alone pass "
                "--do_train false."
            )
        if self.fp16 and (self.use_cpu or default_device() == "cpu"):
            raise ValueError("--fp16 needs a GPU, and there is none. Leave it out, or pass --bf16.")
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"--learning_rate must not be negative, such as 1e-4, got {self.learning_rate}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be in 0..2**32 - 1, got {self.seed}.")
        if {"none", "strong"} & set(self.augmentation) and len(self.augmentation) > 1:
            raise ValueError(f"--augmentation takes none and strong alone, got {' '.join(self.augmentation)}.")
        if self.save_only_model:
            raise ValueError(
                "--save_only_model leaves nothing that a run could go on from. To keep less, pass --save_total_limit "
                "1 or --trainable_only."
            )
        if self.lr_scheduler_type == "cosine_with_min_lr" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"min_lr": 1e-7}
        # transformers considers larger values better unless the name ends in "loss".
        best_metric = (self.metric_for_best_model or "").removeprefix("eval_")
        if self.greater_is_better is None and lower_is_better(best_metric):
            self.greater_is_better = False
        # transformers takes bfloat16 on a CPU only if this is given.
        self.use_cpu = self.use_cpu or (self.bf16 and not torch.accelerator.is_available())
        super().__post_init__()
        # transformers does not look for flyte.
        installed = [*get_available_reporting_integrations(), "flyte"]
        if missing := [name for name in self.report_to if name not in installed]:
            raise ValueError(
                f"--report_to {' '.join(missing)} is not installed. Try `pip install {' '.join(missing)}`, or pass "
                f"{' or '.join([*installed[:-1], 'none'])}."
            )
        # Pinned memory speeds up copies to a GPU; without one PyTorch warns in every epoch.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()


ARGUMENTS = (ModelArguments, DataArguments, SegmentationTrainingArguments)


def name_of_source(source: str) -> str:
    """Return the name of a folder, or a Hub id as it is."""
    return Path(source).resolve().name if Path(source).exists() else source


def parse_arguments(argv: list[str] | None) -> tuple[ModelArguments, DataArguments, SegmentationTrainingArguments]:
    """Read the command line, with the defaults of the recipe."""
    argv = sys.argv[1:] if argv is None else list(argv)
    # Usage that lists every option would hide what is wrong, and the help shows the defaults of the recipe.
    usage = "%(prog)s [--OPTION VALUE ...], options are listed by --help"
    parser = HfArgumentParser(ARGUMENTS, usage=usage, add_help=False, allow_abbrev=False)
    has_all = wants_help(argv)
    argv = [word for word in argv if word not in (*HELP, *HELP_ALL)]
    if not is_main_process():
        parser.error = sys.exit  # the main process prints the usage, once
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
    parser.set_defaults(output_dir=f"runs/{name}{kind}")
    # A project of trackio is published as a whole, so each data set has its own.
    parser.set_defaults(project=f"sam2unet-{name}")
    if given.folds is not None:  # the patients that a fold is scored on must not choose its epoch
        parser.set_defaults(load_best_model_at_end=False)
    if has_all is not None:
        print(describe_options(parser, ARGUMENTS, has_all))
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
    regions = None
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
