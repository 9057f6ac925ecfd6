"""Recipes of `run_segmentation.py`: named sets of defaults, beside which any option that is given wins."""

from typing import Any


RECIPES: dict[str, dict[str, Any]] = {
    # "Advanced Brain Tumor Segmentation Using SAM2-UNet", Appl. Sci. 2025, 15, 3267, doi 10.3390/app15063267: Table 2,
    # and the schedule, flips and validation of the reference implementation.
    "paper": {
        "modalities": ["flair"],
        "slices": ["95"],
        "image_size": 352,
        "num_train_epochs": 30.0,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-4,
        "weight_decay": 1e-4,
        "lr_scheduler_type": "cosine_with_min_lr",
        "augmentation": ["flips"],
        "metric_for_best_model": "dice",
    },
    # For segmenting patients: whole heads at their own resolution, judged by patients.
    "volume": {
        "modalities": ["flair"],
        "slices": ["head"],
        "neighbours": 1,
        "head_crop_size": ["auto"],
        "foreground_share": 0.67,
        "iou_over_batch": True,
        "num_train_epochs": 30.0,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "learning_rate": 5e-4,
        "weight_decay": 1e-4,
        "warmup_steps": 50,
        "lr_scheduler_type": "cosine_with_min_lr",
        "ema_decay": 0.99,
        "augmentation": ["strong"],
        "bf16": True,  # on devices with instructions for it
        "metric_for_best_model": "patient_dice",
    },
}

# What the phantom needs less or more of, so that training from scratch takes minutes on two CPU cores.
PHANTOM: dict[str, Any] = {
    "head_crop_scale": 2,  # voxels of 2.5 mm
    "foreground_share": 0.8,
    "num_train_epochs": 2.5,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 20,
    "batch_norm_images": 64,
    "augmentation": ["flips"],
}

# What a model to start from brings along.
OPTIONS_OF_MODEL = ("modalities", "neighbours", "head_crop_size", "head_crop_scale", "image_size", "iou_over_batch")


def recipe_defaults(recipe: str | None, is_phantom: bool, has_model: bool, can_use_bfloat16: bool) -> dict[str, Any]:
    """Return the defaults of a recipe.

    Args:
        recipe: Name of the recipe, or `None` for the defaults of the options themselves.
        is_phantom: Whether the data are the phantom's.
        has_model: Whether a model of SAM2-UNet is trained further, which keeps its own input and loss.
        can_use_bfloat16: Whether mixed precision in bfloat16 may be a default.
    """
    defaults = dict(RECIPES[recipe]) if recipe else {}
    if not can_use_bfloat16:
        defaults.pop("bf16", None)
    if is_phantom and recipe == "volume":
        defaults |= PHANTOM
    return {name: value for name, value in defaults.items() if not (has_model and name in OPTIONS_OF_MODEL)}
