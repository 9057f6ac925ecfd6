"""The Trainer of SAM2-UNet."""

import copy
import functools
import itertools
import json
import logging
import math
import os
import platform
import shutil
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torchvision.transforms import v2
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress

from ..hub import CHECKPOINT_FILES, PICTURES, TRAINING_INFO, files_to_push, write_model_card
from ..modeling_sam2unet import Sam2UNetForSemanticSegmentation
from ..weights_sam2unet import is_local_source, is_pretrained_weight
from .data import SegmentationTransform, collate, transform_of
from .metrics import SegmentationMetrics, check_best_metric
from .resume import LOSSES, ResumeCallback, ignore_sigterm, last_complete_checkpoint, why_incomplete
from .streaming import ParquetRows, RowGroupSampler


logger = logging.getLogger(__name__)

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
    "gradient_checkpointing",
    "seed",
    "metric_for_best_model",
)


class _SetEpoch(TrainerCallback):
    """Tells the training images and their transform the epoch."""

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        dataset, epoch = kwargs["train_dataloader"].dataset, int(state.epoch or 0)
        if isinstance(dataset, ParquetRows):
            dataset.set_epoch(epoch, args.seed)
        transform = transform_of(dataset)
        if isinstance(transform, SegmentationTransform):
            transform.set_epoch(epoch, args.seed)


class Sam2UNetTrainer(Trainer):
    """Trainer that scores each image where it was predicted and passes on its scores instead of logits.

    So masks of different sizes need no padding, processes exchange a few kilobytes per image, and memory is that of
    one batch (with `batch_eval_metrics=True`; without it the scores are kept, 8 kB per image and region, as they are
    for `predict(...).predictions`). A `compute_metrics` that is no [`SegmentationMetrics`] gets logits and labels as
    from any Trainer.

    Args:
        model: The model to train.
        args: Training arguments; `remove_unused_columns` must be false, since rows hold images.
        batch_norm_images: Re-estimate the statistics of batch norm on this many training images before each
            evaluation during training, and so before each checkpoint, and at the end. For models whose encoder is
            trained: batch norm cancels the mean of the encoder's features, which therefore drifts, faster than the
            running averages of the decoder's batch norms follow. 0 keeps the running averages, which do for a frozen
            encoder. With several processes each takes as many images, and the statistics are those of all.
        sync_batch_norm: With several processes, normalise by the statistics of the images of all of them
            (`torch.nn.SyncBatchNorm`, GPUs only). Otherwise each process normalises its images by their own
            statistics, as if `per_device_train_batch_size` were the batch size, and the running averages are those of
            process 0, which `DistributedDataParallel` sends to the others. Checkpoints are the same either way.
        trainable_only: Save and push checkpoints without the encoder, which must be frozen and come from
            `from_sam2`; see [`Sam2UNetForSemanticSegmentation.save_pretrained`].
        kwargs: Arguments of [`~transformers.Trainer`]. `data_collator` and `compute_metrics` have the right defaults.

    Data sets may be [`~streaming.ParquetRows`], too, read while training, of which each process reads its share.

    With FSDP, which shards the weights, checkpoints still hold the whole model, for `from_pretrained`. It needs GPUs.

    With `push_to_hub=True` only checkpoint, code, card and the pictures that the card shows are uploaded, and nothing
    that is a pickle. (`hub_strategy="checkpoint"` and `"all_checkpoints"` also upload what resuming needs.)

    Raises:
        OSError: With `trainable_only=True`, if the encoder's source cannot be reached.
        ValueError: If an argument would drop the images or the scores, or cannot be had on this device, or with
            `trainable_only=True` the encoder is trained or not that of its source.
    """

    def __init__(
        self,
        model: Sam2UNetForSemanticSegmentation,
        args: TrainingArguments,
        batch_norm_images: int = 0,
        sync_batch_norm: bool = False,
        trainable_only: bool = False,
        **kwargs: Any,
    ):
        unusable = {
            "remove_unused_columns": "it drops the images",
            "prediction_loss_only": "there would be no scores",
            "dataloader_persistent_workers": "transformers would score one data set by the images of another, and "
            "workers that outlive an epoch do not hear of the next one",
        }
        for name, reason in unusable.items():
            if getattr(args, name):
                raise ValueError(f"`{name}` must be False for SAM2-UNet: {reason}.")
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
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # the loss depends on every weight that is trained
        kwargs.setdefault("data_collator", collate)
        metrics = kwargs.setdefault("compute_metrics", SegmentationMetrics(list(model.config.regions)))
        if isinstance(metrics, SegmentationMetrics):
            check_best_metric(args, ["loss", *metrics.names()], kwargs.get("eval_dataset"))
        if trainable_only:
            if not model.config.freeze_encoder:
                raise ValueError("`trainable_only` must be False for a model whose encoder is trained.")
            # Now, not after hours of training.
            for field, value in model.verify_encoder_source(may_be_local=not args.push_to_hub).items():
                setattr(model.config, field, value)
        self.sync_batch_norm = sync_batch_norm and args.world_size > 1
        super().__init__(self.to_sync_batch_norm(model), args, **kwargs)
        if args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(
                f"`fsdp` needs several processes with a GPU each, got {args.world_size} on {args.device.type}, where "
                "accelerate would train without it. Start with `torchrun --nproc_per_node N`."
            )
        if trainable_only and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("`trainable_only` must be False with FSDP and DeepSpeed, which split the weights.")
        self.add_callback(_SetEpoch())
        self.add_callback(ResumeCallback(self))
        self.has_own_optimizer = kwargs.get("optimizers", (None, None)) != (None, None)
        self.batch_norm_images = batch_norm_images
        self.trainable_only = trainable_only
        self._final_scores: dict[str, float] = {}
        self._card: dict[str, Any] = {}

    def to_sync_batch_norm(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the model with batch norm over all processes, if `sync_batch_norm` says so and there are several."""
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) if self.sync_batch_norm else model

    def call_model_init(self, trial: Any = None) -> Any:
        """Build the model of a trial as [`~transformers.Trainer`] does."""
        return self.to_sync_batch_norm(super().call_model_init(trial))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as [`~transformers.Trainer`] does, and end with fresh batch norm statistics.

        A run that goes on from a checkpoint ends with the weights, scores and losses of one that was never stopped,
        on a CPU to the last bit.

        Args:
            resume_from_checkpoint: Folder of a checkpoint, or `True` for the newest whole one in the output folder.
            *args: As in transformers.
            **kwargs: As in transformers.

        Raises:
            OSError: If a checkpoint cannot be written, as on a full disk. Those before it are whole.
            ValueError: If there is no whole checkpoint, the one named is not, or it was trained on another encoder.
        """
        self._final_scores = {}
        if resume_from_checkpoint is True:
            output_dir = cast("str", self.args.output_dir)
            resume_from_checkpoint = last_complete_checkpoint(output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no whole checkpoint in `{output_dir}` to resume from.")
        if resume_from_checkpoint and (fault := why_incomplete(resume_from_checkpoint)):
            raise ValueError(
                f"`{resume_from_checkpoint}` is not whole, so it cannot be resumed from: {fault}. Name another one, "
                "or pass True for the newest whole one in the output folder."
            )
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        # The best checkpoint has them since its evaluation.
        if self.batch_norm_images and not self.args.load_best_model_at_end:
            self.estimate_batch_norm()
        return result._replace(training_loss=result.metrics["train_loss"])

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """Return the order of training images as [`~transformers.Trainer`] does, or for reading row groups once."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(rows, ParquetRows):
            return self._row_group_sampler(rows, self.args.train_batch_size, shuffle=True)
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        """Return the order of images to evaluate as [`~transformers.Trainer`] does, or for reading row groups once."""
        if isinstance(eval_dataset, ParquetRows):
            return self._row_group_sampler(eval_dataset, self.args.eval_batch_size)
        return super()._get_eval_sampler(eval_dataset)

    def _row_group_sampler(self, rows: ParquetRows, batch_size: int, shuffle: bool = False) -> RowGroupSampler:
        return RowGroupSampler(rows, batch_size, self.args.world_size, self.args.dataloader_num_workers, shuffle)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Return the DataLoader of [`~transformers.Trainer`], whose workers go on when a scheduler sends SIGTERM.

        `dataloader_drop_last` is for training: every image is scored.
        """
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and kwargs.get("is_training", False)
        try:
            loader = super()._get_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last
        inner = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
        inner.worker_init_fn = functools.partial(ignore_sigterm, inner.worker_init_fn)
        return loader

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as [`~transformers.Trainer`] does; the loss at the end is that of all steps, those before a stop too."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batches of a step as [`~transformers.Trainer`] does, but none after the last step.

        It would train another step when it resumes from the last checkpoint of a run that `max_steps` ends within an
        epoch.
        """
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def restore_losses(self, sum_logged: float, sum_since: float, last_logged_step: int) -> None:
        """Set the losses of a run to what they were when a checkpoint was written."""
        self._total_loss_scalar = sum_logged
        self._tr_loss.fill_(sum_since)
        self._globalstep_last_logged = last_logged_step

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save as [`~transformers.Trainer`] does, with the losses so far; leave nothing half-written."""
        run_folder = self._get_output_dir(trial)
        folder = Path(run_folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        losses = {
            "sum_logged": self._total_loss_scalar,
            "sum_since": self.accelerator.reduce(self._tr_loss, "mean").item(),
            "last_logged_step": self._globalstep_last_logged,
        }
        cast("Any", self.state.stateful_callbacks)[LOSSES] = {"args": {}, "attributes": losses}
        try:
            if self.args.should_save and folder.exists():
                shutil.rmtree(folder)  # of a run that was killed while it wrote this one
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as err:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            free_gb = shutil.disk_usage(run_folder).free / 1e9
            whole = last_complete_checkpoint(run_folder)
            advice = f"`{whole}` is whole: resume from it" if whole else "Start again"
            raise OSError(
                f"`{folder}` could not be written ({err}), with {free_gb:.3g} GB free on its disk. {advice} once "
                "there is room, or write fewer or smaller checkpoints (`save_total_limit`, `trainable_only`)."
            ) from err

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate as [`~transformers.Trainer`] does, during training with fresh batch norm statistics."""
        if self.is_in_train and self.batch_norm_images:
            self.estimate_batch_norm()
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        # Another data set under the name of the validation split is none for the model card.
        is_own = metric_key_prefix != "eval" or eval_dataset is None or eval_dataset is self.eval_dataset
        if not self.is_in_train and is_own:
            self._final_scores.update(metrics)
        return metrics

    @torch.no_grad()
    def estimate_batch_norm(self) -> None:
        """Replace the running statistics of batch norm by those over `batch_norm_images` training images.

        The mean is that of all images of all processes, and the variance is that about it: the mean variance within
        batches plus the variance of the batches' means.

        Source: "precise batch norm", Wu and Johnson, arXiv 2105.07576, section 3.
        """
        model = self.accelerator.unwrap_model(self.model)
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = 1.0  # leaves the statistics of the last batch
        model.train()
        batch_size = max(self.args.per_device_train_batch_size, self.args.per_device_eval_batch_size)
        # The same images at each call, other ones in each process.
        seed = self.args.seed + self.args.process_index
        sampler = None
        if isinstance(self.train_dataset, ParquetRows):
            sampler = RowGroupSampler(self.train_dataset, batch_size, shuffle=True, seed=seed)
        loader = DataLoader(
            cast("Dataset", self.train_dataset),
            batch_size,
            shuffle=sampler is None and not isinstance(self.train_dataset, IterableDataset),
            sampler=sampler,
            generator=torch.Generator().manual_seed(seed),
            collate_fn=self.data_collator,
        )
        sizes = [norm.num_features for norm in norms]
        # Of images, means and mean squares.
        sums = torch.zeros(3, sum(sizes), dtype=torch.float64)
        for batch in itertools.islice(loader, math.ceil(self.batch_norm_images / batch_size)):
            inputs = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                model(inputs["pixel_values"])
            mean = torch.cat([cast("torch.Tensor", norm.running_mean) for norm in norms]).cpu().double()
            variance = torch.cat([cast("torch.Tensor", norm.running_var) for norm in norms]).cpu().double()
            sums += len(inputs["pixel_values"]) * torch.stack([torch.ones_like(mean), mean, variance + mean**2])
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device))
        count, mean, square = sums
        means, variances = (mean / count).split(sizes), (square / count - (mean / count) ** 2).split(sizes)
        for norm, momentum, *statistics in zip(norms, momenta, means, variances, strict=True):
            norm.momentum = momentum
            cast("torch.Tensor", norm.running_mean).copy_(statistics[0])
            cast("torch.Tensor", norm.running_var).copy_(statistics[1])

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return no loss, and scores and loss of each image of the batch, the loss in the place of the labels.

        [`~transformers.Trainer`] averages losses of batches, and the last batches of several processes are filled up
        with images of the first ones. It leaves those out of scores and labels.
        """
        if not isinstance(self.compute_metrics, SegmentationMetrics) or "labels" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        own_model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if isinstance(own_model, Sam2UNetForSemanticSegmentation) and self.compute_loss_func is None:
            inputs = self._prepare_inputs(inputs)
            labels = inputs["labels"]
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = model(inputs["pixel_values"], output_auxiliary_logits=True, return_dict=True)
                logits = outputs.logits
                images = zip(labels, logits, *outputs.auxiliary_logits, strict=True)
                losses = torch.stack(
                    [own_model.compute_loss([output[None] for output in image], mask[None]) for mask, *image in images]
                )
        else:
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            losses = cast("torch.Tensor", loss).repeat(len(cast("torch.Tensor", logits)))
        scores = torch.from_numpy(self.compute_metrics.score(logits, labels, own_model))
        if self.accelerator.num_processes > 1:
            scores = scores.to(self.accelerator.device)
        return None, scores, losses

    def _save_rng_state(self, output_dir: str) -> None:
        """Save as [`~transformers.Trainer`] does, before `trainer_state.json`, which marks a checkpoint as whole."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save as [`~transformers.Trainer`] does, without the token for the Hub in `training_args.bin`."""
        model = self.accelerator.unwrap_model(self.model)
        args = self.args
        self.args = copy.copy(args)
        self.args.hub_token = None
        if self.trainable_only:
            model.save_pretrained = functools.partial(model.save_pretrained, trainable_only=True)
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args = args
            if self.trainable_only:
                del model.save_pretrained

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load as [`~transformers.Trainer`] does, but not what was trained on another encoder than this one."""
        config = self.accelerator.unwrap_model(self.model).config
        path = Path(resume_from_checkpoint, "config.json")
        saved = json.loads(path.read_text()).get("encoder_sha256") if path.is_file() else None
        if saved is not None and saved != config.encoder_sha256:
            raise ValueError(
                f"{resume_from_checkpoint} was trained on an encoder with SHA-256 {saved}, the one of this model has "
                f"{config.encoder_sha256}. Start from the same encoder, with `trainable_only=True`."
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn as [`~transformers.Trainer`] does, but not of the encoder that small checkpoints lack."""
        if self.trainable_only:
            missing = [name for name in load_result.missing_keys if not is_pretrained_weight(name)]
            load_result = load_result._replace(missing_keys=missing)
        super()._issue_warnings_after_load(load_result)

    def results(self) -> dict[str, dict[str, float]]:
        """Return the scores of the trained model by split: those of evaluations after the training, or its last."""
        entries = [entry for entry in self.state.log_history if "eval_loss" in entry]
        step = self.state.best_global_step if self.args.load_best_model_at_end else self.state.global_step
        scores = next((entry for entry in reversed(entries) if entry["step"] == step), {})
        scores = {**scores, **self._final_scores}
        names = set(self.compute_metrics.names()) if isinstance(self.compute_metrics, SegmentationMetrics) else set()
        found = {}
        for prefix, split in (("eval_", "validation"), ("test_", "test")):
            own = {key.removeprefix(prefix): value for key, value in scores.items() if key.startswith(prefix)}
            if own := {key: value for key, value in own.items() if key in names}:
                found[split] = own
        return found

    def hyperparameters(self) -> dict[str, Any]:
        """Return what repeats this training: rows for the model card."""
        default = {name: field.default for name, field in TrainingArguments.__dataclass_fields__.items()}
        rows = {}
        always = ("num_train_epochs", "per_device_train_batch_size", "optim", "learning_rate", "weight_decay", "seed")
        for name in HYPERPARAMETERS:
            value = getattr(self.args, name)
            if name in always or (value not in (None, False) or value == 0.0) and value != default[name]:
                rows[f"`{name}`"] = getattr(value, "value", value)
        if self.has_own_optimizer:
            names = ("optim", "learning_rate", "lr_scheduler_type", "weight_decay")
            rows = {name: value for name, value in rows.items() if name.strip("`") not in names}
            rows["optimizer"] = type(self.optimizer).__name__
        if self.batch_norm_images:
            rows["batch norm"] = f"statistics estimated anew on {self.batch_norm_images} training images"
        if self.sync_batch_norm:
            rows["batch norm over"] = "all processes"
        if self.args.max_steps > 0:
            del rows["`num_train_epochs`"]
        augment = getattr(transform_of(self.train_dataset), "augment", None)
        if isinstance(augment, v2.Compose):
            steps = [part for step in augment.transforms for part in getattr(step, "transforms", [step])]
            rows["augmentation"] = ", ".join(type(step).__name__ for step in steps)
        config = self.accelerator.unwrap_model(self.model).config
        rows["loss"] = (
            f"IoU and {'boundary-weighted' if config.weight_bce else 'plain'} BCE, outputs weighted "
            f"{', '.join(f'{weight:g}' for weight in [1.0, *config.auxiliary_loss_weights])}"
        )
        rows["trained for"] = f"{self.state.epoch:g} epochs, {self.state.global_step} steps"
        runtime = [entry["train_runtime"] for entry in self.state.log_history if "train_runtime" in entry]
        if runtime:
            rows["training time"] = f"{runtime[-1] / 60:.1f} min"
        if self.args.load_best_model_at_end and self.state.best_global_step:
            rows["checkpoint"] = f"step {self.state.best_global_step}, the best `{self.args.metric_for_best_model}`"
        if self.args.device.type == "cuda":
            device = torch.cuda.get_device_name(self.args.device)
        else:
            device = f"{self.args.device.type.upper()} ({platform.machine()}, {torch.get_num_threads()} threads)"
        rows["hardware"] = device if self.args.world_size == 1 else f"{self.args.world_size} x {device}"
        rows["software"] = f"torch {torch.__version__}, transformers {transformers.__version__}"
        return rows

    def create_model_card(  # type: ignore[override]
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        data: Mapping[str, Any] | None = None,
        data_citation: str | None = None,
        share_predictions: bool | None = None,
    ) -> None:
        """Write `training_info.json` and from it the model card, `README.md`, into the output folder.

        What is not given is as in the call before. A card that somebody edited is left as it is.

        Args:
            language: As in transformers, like what is not listed here.
            license: Licence of the weights, as the Hub names it.
            tags: Tags for the Hub.
            model_name: Title of the card.
            finetuned_from: Model that training started from.
            tasks: Not used; the task is image segmentation.
            dataset_tags: Hub id of the data set.
            dataset: Its name.
            dataset_args: Its configuration.
            data: What the reader should know of the data, a row of a table each.
            data_citation: How to cite it.
            share_predictions: Show `predictions.png`, and so upload it. It shows images of the data.
        """
        if not self.is_world_process_zero():
            return

        def first(value: str | list[str] | None) -> str | None:
            return value[0] if isinstance(value, list) and value else cast("str | None", value)

        given = {
            "language": language,
            "license": license,
            "tags": [tags] if isinstance(tags, str) else tags,
            "model_name": model_name,
            "finetuned_from": None if is_local_source(finetuned_from) else finetuned_from,
            "dataset_id": first(dataset_tags),
            "dataset": first(dataset),
            "dataset_args": first(dataset_args),
            "data": data,
            "data_citation": data_citation,
            "share_predictions": share_predictions,
        }
        # `save_model` pushes too, and knows none of them.
        self._card |= {name: value for name, value in given.items() if value is not None}
        card = self._card
        rows = dict(card.get("data", {}))
        if "dataset_args" in card:
            rows["configuration"] = card["dataset_args"]
        for name, images in (("training images", self.train_dataset), ("validation images", self.eval_dataset)):
            if isinstance(images, Sized) and not isinstance(images, dict):
                rows.setdefault(name, len(images))
        info = {
            **{name: card.get(name) for name in ("language", "license", "model_name", "finetuned_from")},
            "tags": card.get("tags", []),
            "dataset": {
                "id": card.get("dataset_id"),
                "name": card.get("dataset"),
                "citation": card.get("data_citation"),
            },
            "data": rows,
            "recipe": self.hyperparameters(),
            "results": self.results(),
            "zero_division": getattr(self.compute_metrics, "zero_division", None),
            "share_predictions": card.get("share_predictions", False),
        }
        folder = Path(cast("str", self.args.output_dir))
        (folder / TRAINING_INFO).write_text(json.dumps(info, indent=2) + "\n")
        try:
            write_model_card(folder, getattr(self, "hub_model_id", None))
        except FileExistsError as err:
            logger.warning("The model card is left as it is: %s", err)

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload checkpoint, image processor, code and card, and no other file of the output folder.

        Args:
            commit_message: Title of the commit.
            blocking: Wait for the end of the upload.
            token: Token for the Hub.
            revision: Branch, `hub_revision` by default.
            private: Make the repository private, if it is new; `hub_private_repo` by default.
            **kwargs: Arguments of [`create_model_card`].
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        folder = cast("str", self.args.output_dir)
        return self.upload(folder, files_to_push(folder), commit_message, token, revision, not blocking)

    def upload(
        self,
        folder: str,
        files: list[str],
        commit_message: str | None,
        token: str | None,
        revision: str | None,
        run_as_future: bool,
    ) -> Any:
        """Upload files of a folder, and remove weights and pictures of older uploads that are not among them."""
        return HfApi(token=token).upload_folder(
            repo_id=cast("str", self.hub_model_id),
            folder_path=folder,
            commit_message=commit_message,
            revision=revision or self.args.hub_revision,
            allow_patterns=files,
            delete_patterns=[name for name in CHECKPOINT_FILES if "safetensors" in name]
            + ([name for name in PICTURES if name not in files] if "README.md" in files else []),
            run_as_future=run_as_future,  # type: ignore[call-overload]
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint while training goes on, if `hub_strategy` says so."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        before: list[Any] = [] if self.push_in_progress is None else self.push_in_progress.jobs
        if not all(job.done() for job in before) and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        output_dir = cast("str", self.args.output_dir)
        # Checkpoint folders come and go while the upload is running.
        for pattern in CHECKPOINT_FILES:
            for path in Path(checkpoint_folder).glob(pattern):
                shutil.copy(path, output_dir)
        message = f"Training in progress, step {self.state.global_step}"
        token = self.args.hub_token
        # The card is written at the end; one that lies there already tells of another run.
        jobs = [self.upload(output_dir, list(CHECKPOINT_FILES), message, token, None, run_as_future=True)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else Path(checkpoint_folder).name
            job = HfApi(token=token).upload_folder(
                repo_id=cast("str", self.hub_model_id),
                folder_path=checkpoint_folder,
                path_in_repo=name,
                commit_message=f"{message}, checkpoint",
                ignore_patterns=["training_args.bin"],
                revision=self.args.hub_revision,
                run_as_future=True,
            )
            jobs.append(job)
        self.push_in_progress = PushInProgress([*before, *jobs])  # type: ignore[assignment, arg-type]

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as [`~transformers.Trainer`] does, with the batch norm statistics of process 0, which are saved."""
        if isinstance(self.compute_metrics, SegmentationMetrics):
            self.compute_metrics.reset()
        if self.accelerator.num_processes > 1 and self.state.global_step:
            for buffer in self.accelerator.unwrap_model(self.model).buffers():
                torch.distributed.broadcast(buffer, src=0)
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        if not isinstance(dataloader.dataset, ParquetRows):
            return output
        places = np.argsort(cast("RowGroupSampler", self._get_eval_sampler(dataloader.dataset)).order())
        metrics = self.compute_metrics
        if isinstance(metrics, SegmentationMetrics) and len(metrics.image_dice):
            metrics.image_dice = metrics.image_dice[places]
        if isinstance(output.predictions, np.ndarray) and isinstance(output.label_ids, np.ndarray):
            output = output._replace(predictions=output.predictions[places], label_ids=output.label_ids[places])
        return output


__all__ = ["HYPERPARAMETERS", "Sam2UNetTrainer"]
