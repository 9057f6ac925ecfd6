"""What a model card tells of a run: its hyperparameters and scores."""

import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torchvision.transforms import v2
from transformers import TrainerState, TrainingArguments

from ..configuration_sam2unet import Sam2UNetConfig
from ..model_card import counted
from .data import SegmentationTransform, transform_of
from .rows import ImageRows
from .streaming import ParquetRows


_FIELDS = TrainingArguments.__dataclass_fields__
# Rows of every card, whatever their values.
_ALWAYS_SHOWN = {"num_train_epochs", "per_device_train_batch_size", "optim", "learning_rate", "weight_decay", "seed"}
_OF_THE_OPTIMIZER = {"optim", "learning_rate", "lr_scheduler_type", "weight_decay"}
# The arguments of training that say how a run can be repeated.
HYPERPARAMETERS = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "fp16",
    # The name until transformers 5.23 and the one from 5.24 on.
    "activation_checkpointing" if "activation_checkpointing" in _FIELDS else "gradient_checkpointing",
    "seed",
    "metric_for_best_model",
)


def hyperparameters(
    args: TrainingArguments,
    state: TrainerState,
    config: Sam2UNetConfig,
    optimizer: str | None = None,
    notes: Mapping[str, str] | None = None,
    augment: Any = None,
) -> dict[str, Any]:
    """Return what repeats a training, as rows for the model card.

    `optimizer` names one that does not come from `args`, `notes` are further rows, `augment` changes training images.
    """
    rows: dict[str, Any] = {}
    for name in HYPERPARAMETERS:
        value = getattr(args, name)
        is_set = (value not in (None, False) or value == 0.0) and value != _FIELDS[name].default
        if (name in _ALWAYS_SHOWN or is_set) and not (optimizer and name in _OF_THE_OPTIMIZER):
            rows[f"`{name}`"] = getattr(value, "value", value)
    if optimizer:
        rows["optimizer"] = optimizer
    rows |= notes or {}
    if args.max_steps > 0:
        del rows["`num_train_epochs`"]
    if isinstance(augment, v2.Compose):
        steps = [part for step in augment.transforms for part in getattr(step, "transforms", [step])]
        rows["augmentation"] = ", ".join(type(step).__name__ for step in steps)
    weights = ", ".join(f"{weight:g}" for weight in [1.0, *config.auxiliary_loss_weights])  # type: ignore[misc]
    bce = "boundary-weighted" if config.weight_bce else "plain"
    iou = "IoU over the batch" if config.iou_over_batch else "IoU"
    rows["loss"] = f"{iou} and {bce} BCE, outputs weighted {weights}"
    rows["trained for"] = f"{counted(state.epoch or 0, 'epoch')}, {counted(state.global_step, 'step')}"
    if runtimes := [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]:
        rows["training time"] = f"{runtimes[-1] / 60:.1f} min"
    if args.load_best_model_at_end and state.best_global_step:
        rows["checkpoint"] = f"step {state.best_global_step}, the best `{args.metric_for_best_model}`"
    device = f"{args.device.type.upper()} ({platform.machine()}, {torch.get_num_threads()} threads)"
    if args.device.type == "cuda":
        device = torch.cuda.get_device_name(args.device)
    rows["hardware"] = device if args.world_size == 1 else f"{args.world_size} x {device}"
    rows["software"] = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return rows


def all_show_foreground(rows: Any, regions: Mapping[str, Sequence[int]]) -> bool | None:
    """Whether each of the training images shows a region, so that no model could learn where there is none.

    The column `wt_pixels` tells it, or else the masks, which are read up to the first that is empty. `None` where
    neither does: of streamed images, and of rows that are no [`~rows.ImageRows`].
    """
    if "wt_pixels" in (getattr(rows, "column_names", None) or ()):
        rows = rows.with_format(None) if hasattr(rows, "with_format") else rows
        return all(rows["wt_pixels"][:])
    transform = transform_of(rows)
    if not isinstance(rows, ImageRows) or isinstance(rows.rows, ParquetRows) or rows.mask_column is None:
        return None
    if not isinstance(transform, SegmentationTransform):
        return None
    ids = torch.tensor([label_id for label_ids in regions.values() for label_id in label_ids])
    return all(torch.isin(transform.to_label_ids(rows.mask(index)), ids).any() for index in range(len(rows)))


def dataset_revision(rows: Any, hub_id: str | None) -> str | None:
    """Return the commit of the data set of the Hub that rows were loaded from, if they tell it."""
    files = getattr(getattr(rows, "rows", rows), "cache_files", None)
    # `datasets` names the folder of what it has loaded from the Hub after the commit.
    folder = Path(files[0]["filename"]).parent.name if files and hub_id else ""
    return folder if re.fullmatch("[0-9a-f]{40}", folder) else None


def scores_by_split(
    args: TrainingArguments, state: TrainerState, final_scores: Mapping[str, float], names: Iterable[str]
) -> dict[str, dict[str, float]]:
    """Return the scores of these names of the trained model: those after the training, or else of its last evaluation.

    `final_scores` are those after the training, with the prefix `eval_` or `test_`.
    """
    entries = [entry for entry in state.log_history if "eval_loss" in entry]
    step = state.best_global_step if args.load_best_model_at_end else state.global_step
    scores = {**next((entry for entry in reversed(entries) if entry["step"] == step), {}), **final_scores}
    found = {}
    for prefix, split in (("eval_", "validation"), ("test_", "test")):
        own = {key.removeprefix(prefix): value for key, value in scores.items() if key.startswith(prefix)}
        if own := {key: value for key, value in own.items() if key in names}:
            found[split] = own
    return found


__all__ = ["HYPERPARAMETERS"]
