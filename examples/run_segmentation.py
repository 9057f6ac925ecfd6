#!/usr/bin/env python
"""Fine-tune SAM2-UNet on BraTS, on any image/mask data set, or, with no arguments, on a phantom cohort.

python examples/run_segmentation.py
python examples/run_segmentation.py --brats_dir BraTS2020_TrainingData --sam2_checkpoint facebook/sam2-hiera-large
python examples/run_segmentation.py --dataset_name my_folder --sam2_checkpoint facebook/sam2-hiera-tiny
"""

import functools
import logging
import signal
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from arguments import (
    ModelArguments,
    SegmentationTrainingArguments,
    parse_arguments,
    requested_regions,
    resume_arguments,
)
from data_sources import DataArguments, find_columns, find_regions, load_data, name_of_source
from hp_search import search
from plots import plot_predictions, plot_training_curve
from predictions import choose_cases, write_predictions
from processes import from_main_process, mute_process, report_error_once, set_up_logging
from provenance import run_record, write_json
from run_folder import RESULTS_FILE, find_checkpoint, start_run
from safetensors import SafetensorError
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import TrainOutput

from dataset_scripts.brats_slices import CITATION
from sam2unet_hf import Sam2UNetConfig, Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor
from sam2unet_hf.training import Sam2UNetTrainer, SegmentationMetrics, SegmentationTransform, augmentation
from sam2unet_hf.training.resume import StopOnSigterm, last_complete_checkpoint


logger = logging.getLogger("run_segmentation")

TIMINGS = ("_runtime", "_per_second")  # suffixes of metrics that differ when the same run is repeated


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the script; return the content of `all_results.json`, in the main process."""
    model_args, data_args, training_args = parse_arguments(argv)
    set_up_logging()
    if not training_args.should_log:
        mute_process()
    output_dir = Path(training_args.output_dir)
    requested = requested_regions(model_args, data_args)
    arguments = resume_arguments(model_args, data_args, training_args)
    checkpoint = from_main_process(training_args, lambda: find_checkpoint(arguments, training_args))

    # Data
    with training_args.main_process_first(desc="preparing the data"):
        data = load_data(data_args)
    image_column, mask_column = find_columns(data, data_args)
    regions, label_mapping = from_main_process(
        training_args, lambda: find_regions(data, image_column, mask_column, requested)
    )

    # Model and image processor
    set_seed(training_args.seed)
    model, processor = load_model(model_args, regions)
    if data_args.dataset_name is None:
        keep_scan_settings(processor, data_args)

    # Transforms: training images are augmented, the others are scored at the size of their masks.
    transform = functools.partial(
        SegmentationTransform, processor, image_column, mask_column, label_mapping=label_mapping
    )
    augment = augmentation(*(name for name in training_args.augmentation if name != "none"))
    train_dataset = data["train"].with_transform(transform(augment=augment))
    at_mask_size = transform(resize_masks=False)
    evaluation = {split: rows.with_transform(at_mask_size) for split, rows in data.items() if split != "train"}

    # Trainer
    compute_metrics = SegmentationMetrics(list(regions))
    batch_norm_images = training_args.batch_norm_images
    if batch_norm_images is None:
        batch_norm_images = 0 if model.config.freeze_encoder else 128

    def make_trainer(args: TrainingArguments) -> Sam2UNetTrainer:
        return Sam2UNetTrainer(
            model,
            args,
            compute_metrics=compute_metrics,
            batch_norm_images=batch_norm_images,
            sync_batch_norm=training_args.sync_batch_norm,
            trainable_only=training_args.trainable_only,
            train_dataset=train_dataset,
            eval_dataset=evaluation["validation"],
            processing_class=processor,
        )

    try:
        trainer = make_trainer(training_args)
    except (OSError, ValueError) as err:  # such as no right to push, or no such metric
        raise SystemExit(str(err)) from err
    # An older run is removed only once data, model and Trainer exist, so that a mistyped option does not cost it.
    if training_args.process_index == 0:
        start_run(run_record(arguments, training_args, data), training_args)

    # Search of hyperparameters
    if training_args.hp_search:
        best = search(make_trainer, lambda: load_model(model_args, regions)[0], training_args, training_args.hp_search)
        for name, value in best.items():
            setattr(training_args, name, type(getattr(training_args, name))(value))
        model, _ = load_model(model_args, regions)
        trainer = make_trainer(training_args)
    logger.info(
        "Images: %s. Parameters: %.2f M, %.2f M of them trained.",
        ", ".join(f"{len(rows)} {split}" for split, rows in data.items()),
        model.num_parameters() / 1e6,
        model.num_parameters(only_trainable=True) / 1e6,
    )

    results: dict[str, float] = {}

    def keep(split: str, metrics: dict[str, float]) -> None:
        """Log and save the metrics of a split, and keep them for `all_results.json`, except for timings."""
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics, combined=False)
        results.update({name: value for name, value in metrics.items() if not name.endswith(TIMINGS)})

    # Training
    if training_args.do_train:
        keep("train", train(trainer, checkpoint).metrics)
    # The curves leave out the final evaluation, which belongs to an earlier epoch, that of the best checkpoint.
    history = list(trainer.state.log_history)

    # Evaluation
    keep("eval", trainer.evaluate())
    if "test" in evaluation:
        keep("test", trainer.evaluate(evaluation["test"], metric_key_prefix="test"))

    # Pictures of the split that was scored last
    if trainer.is_world_process_zero():
        if trainer.is_fsdp_enabled:  # each process holds a part of the weights
            model = Sam2UNetForSemanticSegmentation.from_pretrained(output_dir).to(training_args.device)
        rows = data["test" if "test" in data else "validation"]
        cases = choose_cases(rows, compute_metrics.image_dice.mean(axis=1), at_mask_size, model)
        plot_predictions(cases, regions, output_dir / "predictions.png")
        if training_args.do_train:
            plot_training_curve(history, output_dir / "training_curve.png")
        if training_args.do_predict:
            batch_size = training_args.per_device_eval_batch_size
            write_predictions(output_dir / "predictions", rows, at_mask_size, model, batch_size)

    # Model card and Hub
    if training_args.do_train:
        card = card_arguments(data, data_args, model_args, training_args)
        if training_args.push_to_hub:
            trainer.push_to_hub(**card)
        else:
            trainer.create_model_card(**card)
    if not trainer.is_world_process_zero():
        return {}
    write_json(output_dir / RESULTS_FILE, results)
    logger.info(
        "The results are in %s: %s.", output_dir, ", ".join(sorted(path.name for path in output_dir.iterdir()))
    )
    return results


def load_model(
    args: ModelArguments, regions: dict[str, list[int]]
) -> tuple[Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor]:
    """Load or build the model, and its image processor.

    Args:
        args: Which model to start from.
        regions: Regions to segment, name -> label ids.

    Raises:
        SystemExit: If the model segments other regions, or there is no such encoder.
    """
    size = {} if args.image_size is None else {"size": {"height": args.image_size, "width": args.image_size}}
    processor = Sam2UNetImageProcessor(regions=regions, **size)
    if args.model_name_or_path is not None:
        model = Sam2UNetForSemanticSegmentation.from_pretrained(args.model_name_or_path)
        if model.config.regions != regions:
            raise SystemExit(
                f"{args.model_name_or_path} segments {model.config.regions}, not {regions}. Leave out --regions, or "
                "start from --sam2_checkpoint."
            )
        try:
            processor = Sam2UNetImageProcessor.from_pretrained(args.model_name_or_path, **size)
        except OSError:
            logger.warning("%s has no image processor. Taking the default one.", args.model_name_or_path)
        if args.freeze_encoder is not None:
            model.freeze_encoder(args.freeze_encoder)
    elif args.sam2_checkpoint is not None:
        freeze = args.freeze_encoder is not False
        try:
            model = Sam2UNetForSemanticSegmentation.from_sam2(
                args.sam2_checkpoint, regions=regions, freeze_encoder=freeze
            )
        except (OSError, ValueError) as err:
            raise SystemExit(f"--sam2_checkpoint: {err}") from err
    else:
        freeze = bool(args.freeze_encoder)
        logger.warning(
            "Training the %s model from scratch%s. Pass --sam2_checkpoint for a pretrained encoder.",
            args.preset,
            " with a frozen random encoder" if freeze else "",
        )
        config = Sam2UNetConfig.from_preset(args.preset, regions=regions, freeze_encoder=freeze)
        model = Sam2UNetForSemanticSegmentation(config)
    return model, processor


def keep_scan_settings(processor: Sam2UNetImageProcessor, data_args: DataArguments) -> None:
    """Keep modalities and plane with the processor, for volume inference; warn if the model was trained on others."""
    for name in ("modalities", "plane"):
        before, now = getattr(processor, name), getattr(data_args, name)
        if before not in (None, now):
            logger.warning("The model is one of %s %s, and sees %s now (--%s).", name, before, now, name)
        setattr(processor, name, now)


def train(trainer: Sam2UNetTrainer, checkpoint: str | None) -> TrainOutput:
    """Train and save the model; after SIGTERM, exit with its status."""
    stop = StopOnSigterm(trainer.accelerator)
    trainer.add_callback(stop)
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        if stop.stopped:
            logger.warning(
                "Stopped by SIGTERM after step %d of %d. The same command%s goes on from %s.",
                trainer.state.global_step,
                trainer.state.max_steps,
                ", without --overwrite_output_dir," if trainer.args.overwrite_output_dir else "",
                last_complete_checkpoint(trainer.args.output_dir),
            )
            trainer.accelerator.wait_for_everyone()  # a launcher ends all processes when one of them ends
            raise SystemExit(128 + signal.SIGTERM)
        trainer.save_model(_internal_call=True)  # pushed at the end, with results and pictures
    except (OSError, SafetensorError) as err:  # such as a full disk, or a checkpoint of another encoder
        raise SystemExit(str(err)) from err
    trainer.save_state()
    return result


def card_arguments(
    data: datasets.DatasetDict,
    data_args: DataArguments,
    model_args: ModelArguments,
    training_args: SegmentationTrainingArguments,
) -> dict[str, Any]:
    """Return the arguments of `create_model_card`: what the card says of the data and of the start of the run."""
    has_scans = data_args.dataset_name is None
    is_phantom = has_scans and data_args.brats_dir is None
    rows: dict[str, Any] = {}
    for split, images in data.items():
        # The cases of photographs are the photographs, those of scans have many slices each.
        scans = f" of {len(set(images['case_id']))} scans" if "wt_pixels" in images.column_names else ""
        rows[f"{'training' if split == 'train' else split} images"] = f"{len(images)}{scans}"
    if has_scans:
        rows["slices"] = f"{data_args.plane}, {' '.join(data_args.slices)}"
        if "tumor" in data_args.slices:
            rows["slices"] += f" (at least {data_args.min_tumor_pixels} pixels of it)"
        rows["modalities"] = ", ".join(data_args.modalities)
        rows["intensities"] = "0.5 to 99.5 percentile of each volume's foreground, to 8 bits"
        rows["split"] = f"by patient, seed {data_args.split_seed}"
        name = "a phantom cohort in BraTS' layout" if is_phantom else "BraTS"
    else:
        name = name_of_source(data_args.dataset_name)
    return {
        "license": training_args.license,
        "tags": ["medical", "mri", "brain-tumor"] if has_scans else [],
        "finetuned_from": model_args.model_name_or_path,
        "dataset": name,
        "dataset_tags": None if has_scans or Path(data_args.dataset_name).exists() else data_args.dataset_name,
        "dataset_args": data_args.dataset_config_name,
        "data": rows,
        "data_citation": f"```bibtex\n{CITATION.strip()}\n```" if data_args.brats_dir is not None else None,
        "share_predictions": is_phantom or training_args.share_predictions,
    }


if __name__ == "__main__":
    with report_error_once():
        main()
        PartialState().destroy_process_group()
