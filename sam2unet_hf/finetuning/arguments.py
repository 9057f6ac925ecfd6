"""Options of `run_segmentation.py`: of the model, the data and the training."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.integrations import get_available_reporting_integrations

from sam2unet_hf.configuration_sam2unet import PRESETS
from sam2unet_hf.devices import default_device
from sam2unet_hf.finetuning.recipes import RECIPES
from sam2unet_hf.labels_sam2unet import NUMBERINGS
from sam2unet_hf.modeling_sam2unet import MIN_IMAGE_SIZE
from sam2unet_hf.scans_sam2unet import MODALITIES, PLANES
from sam2unet_hf.training import AUGMENTATIONS
from sam2unet_hf.training.metrics import lower_is_better


# Options of which PyTorch or transformers refuse smaller values by a traceback, after an older run was removed.
LEAST_VALUES = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
}
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
        "Hub id; folder written by `sam2unet build`; or folder with `images` and "
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
        "Regions to segment, NAME=ID[,ID...] each, nested or disjoint. Default: WT=1,2,3, the whole tumour, "
        "for BraTS, else one region per id in the masks; with --model_name_or_path those of the model.",
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
    report_to: list[str] = option(
        ["none"], "Trackers that get losses, scores and pictures of the run: tensorboard, trackio, wandb or others."
    )
    trainable_only: bool = option(
        False, "Save checkpoints without the encoder, which is fetched from --sam2_checkpoint when loaded again."
    )
    share_predictions: bool = option(
        False,
        "Show predictions.png, and with it images of your data, in the model card, upload it with --push_to_hub, and "
        "let W&B and trackio have pictures. Those of the phantom are always shown.",
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
    remove_unused_columns: bool | None = option(  # type: ignore[assignment]
        False, "Must stay false, because rows hold images."
    )

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
