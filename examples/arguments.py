"""Command line of `run_segmentation.py`."""

import dataclasses
import importlib.util
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from case_names import to_file_name
from data_sources import DataArguments, name_of_source
from processes import is_main_process
from transformers import HfArgumentParser, TrainingArguments

from sam2unet_hf import Sam2UNetConfig
from sam2unet_hf.configuration_sam2unet import PRESETS
from sam2unet_hf.regions_sam2unet import parse_regions
from sam2unet_hf.training import AUGMENTATIONS, HYPERPARAMETERS


# Defaults for the phantom, on which training from scratch takes minutes on two CPU cores.
PHANTOM_RECIPE = {
    "slices": ["tumor"],
    "min_tumor_pixels": 20,
    "image_size": 96,
    "num_train_epochs": 6.0,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 32,
    "learning_rate": 5e-4,
    "warmup_steps": 20,
}


@dataclass
class ModelArguments:
    """Which model to start from: a SAM2-UNet, a SAM 2 encoder, or nothing."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "SAM2-UNet to start from: Hub id or folder."},
    )
    sam2_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Pretrained encoder: Hub id such as facebook/sam2-hiera-large, folder, or original .pt file."
        },
    )
    preset: str = field(
        default="tiny",
        metadata={"help": "Size of an encoder from scratch, without a checkpoint.", "choices": list(PRESETS)},
    )
    freeze_encoder: bool | None = field(
        default=None, metadata={"help": "Train adapters and decoder only. Default: yes, unless from scratch."}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Height and width to resize images to. Default: those of the checkpoint, else 352."},
    )


@dataclass
class SegmentationTrainingArguments(TrainingArguments):
    """Transformers' training arguments with the defaults of the paper's recipe (doi 10.3390/app15063267, Table 2)."""

    do_train: bool = field(default=True, metadata={"help": "Train."})
    do_predict: bool = field(
        default=False, metadata={"help": "Write the label map of every test (else validation) image as PNG."}
    )
    batch_norm_images: int | None = field(
        default=None,
        metadata={
            "help": "Training images, per process, on which batch norm is estimated anew before each evaluation. "
            "Default: 0 with a frozen encoder, else 128."
        },
    )
    sync_batch_norm: bool = field(
        default=False,
        metadata={"help": "Normalise by the images of all processes instead of those of each. Needs GPUs."},
    )
    augmentation: list[str] = field(
        default_factory=lambda: ["flips"],
        metadata={"help": "Random changes of training images, or none.", "choices": ("none", *AUGMENTATIONS)},
    )
    hp_search: int = field(
        default=0,
        metadata={
            "help": "Try this many combinations of learning rate, batch size and optimiser first, and train with the "
            "one that scores best on the validation images. Needs optuna."
        },
    )
    trainable_only: bool = field(
        default=False,
        metadata={
            "help": "Save checkpoints without the encoder, which is fetched from --sam2_checkpoint when loaded again."
        },
    )
    share_predictions: bool = field(
        default=False,
        metadata={
            "help": "Show predictions.png, and with it images of your data, in the model card, and upload it with "
            "--push_to_hub. The phantom's is always shown."
        },
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence of the weights for the model card, as the Hub names it."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the run in the output folder."})
    num_train_epochs: float = field(default=30.0, metadata={"help": "Passes over the training images."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate of AdamW."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of AdamW."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Training images per step and device."})
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Evaluation images per step and device."})
    lr_scheduler_type: str = field(
        default="cosine_with_min_lr", metadata={"help": "Learning rate schedule; the default ends at 1e-7."}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept, the best one among them."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    metric_for_best_model: str | None = field(
        default="dice", metadata={"help": "Metric that chooses the best checkpoint."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logged losses."})
    hub_strategy: str = field(
        default="end", metadata={"help": "When to upload with --push_to_hub, such as every_save."}
    )
    batch_eval_metrics: bool = field(default=True, metadata={"help": "Score batch by batch, which bounds the memory."})
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay false, because rows hold images."}
    )

    def __post_init__(self):
        for option, reason in (
            ("push_to_hub", "pushes what was trained"),
            ("hp_search", "searches for the best training"),
            ("fsdp", "shards the training"),
        ):
            if getattr(self, option) and not self.do_train:
                raise ValueError(f"--{option} {reason}; it cannot go with --do_train false.")
        if "none" in self.augmentation and len(self.augmentation) > 1:
            raise ValueError(f"--augmentation takes none alone, got {' '.join(self.augmentation)}.")
        if self.hp_search and importlib.util.find_spec("optuna") is None:
            raise ValueError('--hp_search needs optuna. Install it with `pip install "sam2unet-hf[search]"`.')
        if self.save_only_model:
            raise ValueError(
                "--save_only_model leaves nothing that a run could go on from. To keep less, pass --save_total_limit "
                "1 or --trainable_only."
            )
        if self.lr_scheduler_type == "cosine_with_min_lr" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"min_lr": 1e-7}
        # transformers considers larger values better unless the name ends in "loss".
        best_metric = (self.metric_for_best_model or "").removeprefix("eval_")
        if self.greater_is_better is None and best_metric.startswith("mae"):
            self.greater_is_better = False
        super().__post_init__()
        # Pinned memory speeds up copies to a GPU; without one PyTorch warns in every epoch.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()


def parse_arguments(argv: list[str] | None) -> tuple[ModelArguments, DataArguments, SegmentationTrainingArguments]:
    """Read the command line; without a source of data the defaults are those of `PHANTOM_RECIPE`."""
    parser = HfArgumentParser((ModelArguments, DataArguments, SegmentationTrainingArguments))
    if not is_main_process():
        parser.error = sys.exit  # the main process prints the usage, once
    given, _ = parser.parse_known_args(argv)
    if given.dataset_name is not None and given.brats_dir is not None:
        parser.error("pass one of --dataset_name and --brats_dir")
    if given.model_name_or_path is not None and given.sam2_checkpoint is not None:
        parser.error("pass one of --model_name_or_path and --sam2_checkpoint")
    source = given.dataset_name or given.brats_dir
    if source is None:
        parser.set_defaults(**PHANTOM_RECIPE)
        if given.model_name_or_path is not None:
            parser.set_defaults(image_size=None)
    name = to_file_name("phantom" if source is None else name_of_source(source), separator="-")
    name += "" if given.do_train else "-evaluation"
    parser.set_defaults(output_dir=f"runs/{name}")
    try:
        return parser.parse_args_into_dataclasses(argv)
    except ValueError as err:
        parser.error(str(err))


def requested_regions(model_args: ModelArguments, data_args: DataArguments) -> dict[str, list[int]] | None:
    """Return the regions that `--regions` names, else those of the model to start from, if there is one."""
    if data_args.regions is not None:
        try:
            return parse_regions(data_args.regions)
        except ValueError as err:
            raise SystemExit(f"--regions: {err}") from err
    if model_args.model_name_or_path is None:
        return None
    try:
        return Sam2UNetConfig.from_pretrained(model_args.model_name_or_path).regions
    except OSError as err:
        raise SystemExit(f"--model_name_or_path: {err}") from err


def resume_arguments(
    model_args: ModelArguments, data_args: DataArguments, training_args: SegmentationTrainingArguments
) -> dict[str, Any]:
    """Return the arguments that must stay the same when a run is resumed, because they change its result."""
    names = [*HYPERPARAMETERS, "augmentation", "batch_norm_images", "sync_batch_norm", "trainable_only"]
    values = {name: getattr(training_args, name) for name in [*names, "eval_strategy"]}
    plain = {name: getattr(value, "value", value) for name, value in values.items()}  # JSON has no enumerations
    return {**dataclasses.asdict(model_args), **dataclasses.asdict(data_args), **plain}
