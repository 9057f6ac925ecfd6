"""The Trainer of SAM2-UNet."""

import contextlib
import math
import os
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..model_card import counted
from ..modeling_sam2unet import Sam2UNetForSemanticSegmentation
from .averaging import AVERAGE, WeightAverage, check_averaging
from .batch_norm import batch_norm_loader, estimate_batch_norm
from .data import SegmentationTransform, collate, transform_of
from .evaluation import MixedPrecision, computes_own_loss, evaluation_order, losses_of_images, reorder
from .loaders import LoaderTrainer, foreground_share_of
from .metrics import SegmentationMetrics, check_best_metric
from .patients import find_patients
from .push import no_push_by_transformers
from .resume import (
    LOSSES,
    ResumeCallback,
    RunningLoss,
    complete_or_removed,
    find_resumable,
)
from .rows import streamed_rows
from .sampling import ForegroundShare


UNUSABLE_ARGUMENTS = {
    "remove_unused_columns": "it drops the images",
    "prediction_loss_only": "there would be no scores",
    "use_liger_kernel": "it has kernels for language models alone",
    "dataloader_persistent_workers": "transformers would score one data set by the images of another, and workers "
    "that outlive an epoch do not hear of the next one",
}


class SetEpochCallback(TrainerCallback):
    """Tells the training images, their choice and their transform the epoch."""

    def __init__(self, foreground: ForegroundShare | None):
        self.foreground = foreground

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any):
        """Set the last epoch where no step is left, on whose images batch norm may be estimated."""
        if state.global_step >= state.max_steps:
            self.set_epoch(objects["train_dataloader"].dataset, math.ceil(state.epoch or 1) - 1, args.seed)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any):
        """Set the epoch."""
        self.set_epoch(objects["train_dataloader"].dataset, int(state.epoch or 0), args.seed)

    def set_epoch(self, dataset: Any, epoch: int, seed: int) -> None:
        """Tell a data set, its choice and its transform the epoch."""
        if self.foreground is not None:
            self.foreground.set_epoch(epoch, seed)
        if (streamed := streamed_rows(dataset)) is not None:
            streamed.set_epoch(epoch, seed)
        transform = transform_of(dataset)
        if isinstance(transform, SegmentationTransform):
            transform.set_epoch(epoch, seed)


def check_arguments(args: TrainingArguments, rows: Any, sync_batch_norm: bool) -> None:
    """Raise a `ValueError` if an argument would drop the images or the scores, or cannot be had on this device."""
    for name, reason in UNUSABLE_ARGUMENTS.items():
        if getattr(args, name):
            raise ValueError(f"`{name}` must be False for SAM2-UNet: {reason}.")
    if args.label_smoothing_factor:
        raise ValueError(
            f"`label_smoothing_factor` must be 0 for SAM2-UNet, whose loss takes masks of regions and no classes, got "
            f"{args.label_smoothing_factor}."
        )
    batch_size = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and isinstance(rows, Sized) and len(rows) < batch_size:
        raise ValueError(
            f"`dataloader_drop_last` leaves nothing to train on: there are {len(rows)} training images, and a batch "
            f"of all processes takes {batch_size}. Lower `per_device_train_batch_size`, or leave it out."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"One process sees {args.n_gpu} GPUs, which would split batches by `DataParallel`. Start one process "
            "per GPU with `torchrun --nproc_per_node N`, or show it one GPU with CUDA_VISIBLE_DEVICES=0."
        )
    # Set by `accelerate launch`, too.
    is_sharded = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if sync_batch_norm and (args.device.type == "cpu" or is_sharded):
        place = "with FSDP" if is_sharded else "on the CPU"
        raise ValueError(
            f"`sync_batch_norm` must be False {place}: `torch.nn.SyncBatchNorm` works on GPUs and with "
            "`DistributedDataParallel` only."
        )


def check_sharding(trainer: Trainer, whole: Mapping[str, float]) -> None:
    """Raise a `ValueError` if the weights are split with options that need them `whole`, or cannot be split."""
    args = trainer.args
    if args.fsdp and not trainer.is_fsdp_enabled:
        raise ValueError(
            f"`fsdp` needs several processes with a GPU each, got {args.world_size} on {args.device.type}, where "
            "accelerate would train without it. Start with `torchrun --nproc_per_node N`."
        )
    for name, value in whole.items() if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled else ():
        if value:
            raise ValueError(f"`{name}` must be {type(value)()} with FSDP and DeepSpeed, which split the weights.")


def leave_out_encoder(model: Sam2UNetForSemanticSegmentation, may_be_local: bool) -> None:
    """Let checkpoints hold no encoder; raise an error if it is trained or cannot be fetched again."""
    if not model.config.freeze_encoder:
        raise ValueError("`trainable_only` must be False for a model whose encoder is trained.")
    # Check before training, which takes hours.
    model.verify_encoder_source(may_be_local=may_be_local)
    model.trainable_only = True


def notes_for_card(ema_decay: float, batch_norm_images: int, sync_batch_norm: bool, rows: Any) -> dict[str, str]:
    """Return what the model card says of these options."""
    notes = {}
    if ema_decay:
        notes["weights"] = f"exponential moving average over the steps, decay {ema_decay:g}"
    if batch_norm_images:
        count = min(batch_norm_images, len(rows)) if isinstance(rows, Sized) else batch_norm_images
        notes["batch norm"] = f"statistics estimated anew on {counted(count, 'training image')}"
    if sync_batch_norm:
        notes["batch norm over"] = "all processes"
    return notes


class Sam2UNetTrainer(LoaderTrainer):
    """Trainer that scores each image where it was predicted and passes on its scores instead of logits.

    So masks of different sizes need no padding, processes exchange a few kilobytes per image, and memory is that of
    one batch (with `batch_eval_metrics=True`; without it the scores are kept, 8 kB per image and region, as they are
    for `predict(...).predictions`). A `compute_metrics` that is no [`SegmentationMetrics`] gets logits and labels as
    from any Trainer.

    Args:
        model: The model to train.
        args: Training arguments; `remove_unused_columns` must be false, since rows hold images.
        batch_norm_images: Estimate batch norm anew on this many training images, per process, before each evaluation
            during training and at its end. For models whose encoder is trained: its features drift faster than the
            running averages of batch norm follow. 0 keeps the averages, which do for a frozen encoder.
        sync_batch_norm: With several processes, normalise by the images of all of them (`torch.nn.SyncBatchNorm`,
            GPUs only). Otherwise each process normalises by its own, and the running averages are those of process 0.
            Checkpoints are the same either way.
        trainable_only: Save and push checkpoints without the encoder, which must be frozen and come from
            `from_sam2`; see [`Sam2UNetForSemanticSegmentation.save_pretrained`].
        foreground_share: Show each training slice with foreground once an epoch, and as many empty ones in turn as
            make this their share of all; see [`~sampling.ForegroundShare`]. By default an epoch is all slices once.
        ema_decay: Score, save and end with an exponential moving average of the trained weights, and batch norm
            statistics for it; see [`~averaging.WeightAverage`]. A checkpoint holds the raw weights too, in a file of
            their own, from which a run goes on. 0 keeps no average.
        kwargs: Arguments of [`~transformers.Trainer`]. `data_collator` and `compute_metrics` have the right defaults.

    Data sets may be [`~streaming.ParquetRows`], of which each process reads its share. With FSDP, which needs GPUs,
    checkpoints still hold the whole model. With `push_to_hub=True` checkpoint, code, card and the pictures in the card
    are uploaded, and no pickle. (`hub_strategy="checkpoint"` and `"all_checkpoints"` upload what resuming needs, too.)

    Raises:
        OSError: With `trainable_only=True`, if the encoder's source cannot be reached.
        ValueError: If an argument would drop images or scores, or cannot be had on this device, or if, with
            `trainable_only=True`, the encoder is trained or not that of its source.
    """

    def __init__(
        self,
        model: Sam2UNetForSemanticSegmentation,
        args: TrainingArguments,
        batch_norm_images: int = 0,
        sync_batch_norm: bool = False,
        trainable_only: bool = False,
        foreground_share: float | None = None,
        ema_decay: float = 0.0,
        **kwargs: Any,
    ):
        check_arguments(args, kwargs.get("train_dataset"), sync_batch_norm)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # the loss depends on every weight that is trained
        kwargs.setdefault("data_collator", collate)
        metrics = kwargs.setdefault("compute_metrics", SegmentationMetrics(list(model.config.regions)))
        if isinstance(metrics, SegmentationMetrics):
            check_best_metric(args, metrics, kwargs.get("eval_dataset"))
        if trainable_only:
            leave_out_encoder(model, may_be_local=not args.push_to_hub)
        if ema_decay:
            check_averaging(model, batch_norm_images)
        self.average = WeightAverage(ema_decay) if ema_decay else None
        self.foreground = foreground_share_of(kwargs.get("train_dataset"), foreground_share)
        self.batch_norm_images = batch_norm_images
        self.mixed_precision = MixedPrecision()
        self.sync_batch_norm = sync_batch_norm and args.world_size > 1
        super().__init__(self.to_sync_batch_norm(model), args, **kwargs)
        check_sharding(self, {"trainable_only": trainable_only, "ema_decay": ema_decay})
        self.losses = RunningLoss(args.device, args.logging_nan_inf_filter)
        self.add_callback(SetEpochCallback(self.foreground))
        self.add_callback(ResumeCallback(self.losses))
        if self.average:
            self.add_callback(self.average)
        self.notes |= notes_for_card(ema_decay, batch_norm_images, self.sync_batch_norm, self.train_dataset)
        if self.foreground is not None:
            self.notes["slices with foreground"] = f"{self.foreground.reached_share:.0%} of each epoch"

    def to_sync_batch_norm(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the model with batch norm over all processes, if `sync_batch_norm` says so and there are several."""
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) if self.sync_batch_norm else model

    def call_model_init(self, trial: Any = None) -> Any:
        """Build the model of a trial as [`~transformers.Trainer`] does."""
        return self.to_sync_batch_norm(super().call_model_init(trial))

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as [`~transformers.Trainer`] does, and end with fresh batch norm statistics.

        A run that goes on from a checkpoint ends with the weights, scores and losses of one that was never stopped,
        on a CPU to the last bit.

        Args:
            resume_from_checkpoint: Folder of a checkpoint, or `True` for the newest complete one in the output folder.
            *args: As in transformers.
            **kwargs: As in transformers.

        Raises:
            OSError: If a checkpoint cannot be written, as on a full disk. Those before it are complete.
            ValueError: If there is no complete checkpoint, the one named is not, or it was trained on another encoder.
        """
        self.final_scores = {}
        self.mixed_precision.put_back()
        if resume_from_checkpoint:
            output_dir = cast("str", self.args.output_dir)
            sha256 = getattr(self.accelerator.unwrap_model(self.model).config, "encoder_sha256", None)
            resume_from_checkpoint = find_resumable(resume_from_checkpoint, output_dir, sha256, bool(self.average))
        if self.average:
            self.average.checkpoint = resume_from_checkpoint or None
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        # The best checkpoint has them since its evaluation.
        if self.batch_norm_images and not (self.args.load_best_model_at_end and self.state.best_model_checkpoint):
            self.settle_weights()
        return result._replace(training_loss=result.metrics["train_loss"])

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train on a batch as [`~transformers.Trainer`] does, and keep its loss.

        Raises:
            FloatingPointError: If the loss is no number any more, as with a learning rate that is too high; under
                float16 the steps of such losses are left out.
        """
        loss = super().training_step(*args, **kwargs)
        if not self.args.fp16 and not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}. Lower `learning_rate` "
                f"({self.args.learning_rate:g}), or raise `warmup_steps` ({self.args.warmup_steps:g})."
            )
        self.losses.add(loss, self.state.global_step)
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batches of a step as [`~transformers.Trainer`] does, but none after the last step.

        It would train another step when it resumes from the last checkpoint of a run that `max_steps` ends within an
        epoch.
        """
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as [`~transformers.Trainer`] does, with losses that count the steps before a stop, too."""
        self.losses.replace(logs, self.state.global_step, self.accelerator)
        super().log(logs, start_time)

    def settle_weights(self) -> None:
        """Give the model what is scored and saved: averaged weights, if any, and batch norm statistics for them."""
        if self.average is None or self.average.swap_in():
            self.estimate_batch_norm()

    def estimate_batch_norm(self) -> None:
        """Replace the running statistics of batch norm by those over `batch_norm_images` training images."""
        model = self.accelerator.unwrap_model(self.model)
        loader = batch_norm_loader(self.train_dataset, self.args, self.data_collator, self.foreground)
        estimate_batch_norm(model, loader, self.batch_norm_images, self.accelerator)

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate as [`~transformers.Trainer`] does, during training with fresh batch norm statistics."""
        if self.is_in_train and self.batch_norm_images:
            self.settle_weights()
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        # Another data set under the name of the validation split is none for the model card.
        is_own = metric_key_prefix != "eval" or eval_dataset is None or eval_dataset is self.eval_dataset
        if not self.is_in_train and is_own:
            self.final_scores.update(metrics)
        return metrics

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as [`~transformers.Trainer`] does, with the batch norm statistics of process 0, which are saved."""
        metrics, rows = self.compute_metrics, dataloader.dataset
        streamed = streamed_rows(rows)
        order = None if streamed is None else evaluation_order(streamed, self.args)
        if isinstance(metrics, SegmentationMetrics):
            metrics.reset()
            metrics.patient_rows = find_patients(rows, order)
        if self.accelerator.num_processes > 1 and self.state.global_step:
            for buffer in self.accelerator.unwrap_model(self.model).buffers():
                torch.distributed.broadcast(buffer, src=0)
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        if order is None:
            return output
        places = np.argsort(order)
        if isinstance(metrics, SegmentationMetrics) and len(metrics.image_dice):
            metrics.image_dice = metrics.image_dice[places]
        return output._replace(
            predictions=reorder(output.predictions, places), label_ids=reorder(output.label_ids, places)
        )

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return no loss, and scores of each image of the batch, with losses and counts in the place of the labels.

        [`~transformers.Trainer`] averages losses of batches, and the last batches of several processes are filled up
        with images of the first ones. It leaves those out of all else.

        Mixed precision ends with training: what is scored after it is the model as `from_pretrained` loads it.
        """
        if not isinstance(self.compute_metrics, SegmentationMetrics) or "labels" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if not (self.is_in_train or self.args.bf16_full_eval or self.args.fp16_full_eval):
            self.mixed_precision.leave(model, self.accelerator)
        own_model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if computes_own_loss(own_model) and self.compute_loss_func is None:
            inputs = send_to_device(inputs, self.args.device)
            labels, crop_boxes = inputs["labels"], inputs.get("crop_boxes")
            crops = {name: inputs[name] for name in ("pixel_mask", "crop_boxes") if name in inputs}
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = model(inputs["pixel_values"], output_auxiliary_logits=True, return_dict=True, **crops)
                logits, losses = outputs.logits, losses_of_images(own_model, outputs, labels, crop_boxes)
        else:
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            losses, crop_boxes = cast("torch.Tensor", loss).repeat(len(cast("torch.Tensor", logits))), None
        found = self.compute_metrics.score_and_count(logits, labels, own_model, crop_boxes)
        scores, counts = map(torch.from_numpy, found)
        if self.accelerator.num_processes > 1:
            scores, counts = scores.to(self.accelerator.device), counts.to(self.accelerator.device)
        return None, scores, cast("Any", (losses, counts))

    # Checkpoints

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save as [`~transformers.Trainer`] does, with the losses so far; leave nothing half-written."""
        kept = cast("Any", self.state.stateful_callbacks)
        kept[LOSSES] = {"args": {}, "attributes": self.losses.state(self.accelerator)}
        if self.average:
            self.settle_weights()
            kept[AVERAGE] = self.average.state()
        folder = Path(cast("str", self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with no_push_by_transformers(self.args), contextlib.ExitStack() as stack:
            if trial is None:  # transformers names the folders of a search by a private method
                stack.enter_context(complete_or_removed(folder, self.accelerator, self.args.should_save))
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save as [`~transformers.Trainer`] does, all before `trainer_state.json`, which marks it as complete."""
        super()._save_rng_state(output_dir)
        if self.average and self.args.should_save:
            self.average.save_raw(output_dir)
        self.accelerator.wait_for_everyone()


__all__ = ["Sam2UNetTrainer"]
