"""Fine-tune SAM2-UNet on BraTS, on any image/mask data set, or, with no arguments, on a phantom cohort."""

import functools
import logging
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import PreTrainedModel, TrainerCallback, set_seed

from sam2unet_hf import Sam2UNetConfig, Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor
from sam2unet_hf.finetuning.arguments import (
    DataArguments,
    ModelArguments,
    SegmentationTrainingArguments,
)
from sam2unet_hf.finetuning.cohort import COHORT, load_cohort
from sam2unet_hf.finetuning.console import (
    describe_files,
    describe_images,
    describe_split_scores,
    describe_training,
    set_up_console,
)
from sam2unet_hf.finetuning.data_checks import DataSplits
from sam2unet_hf.finetuning.data_sources import (
    DataFacts,
    describe_split,
    find_columns,
    find_regions,
    load_data,
    make_images,
)
from sam2unet_hf.finetuning.folds import run_folds
from sam2unet_hf.finetuning.image_depth import fit_white_level
from sam2unet_hf.finetuning.parsing import (
    card_arguments,
    parse_arguments,
    requested_regions,
    resume_arguments,
    scores_cohort_alone,
    take_channels_of_model,
)
from sam2unet_hf.finetuning.patients import KnownPatients, patients_to_show, score_split, write_splits
from sam2unet_hf.finetuning.plots import name_of_image, plot_predictions, plot_training_curve
from sam2unet_hf.finetuning.predictions import rows_to_show, show_cases, write_predictions
from sam2unet_hf.finetuning.processes import (
    describe_busy_machine,
    exit_on,
    from_main_process,
    report_error_once,
    set_up_logging,
)
from sam2unet_hf.finetuning.provenance import (
    RESULTS_FILE,
    check_steps_left,
    find_checkpoint,
    name_for_trackers,
    run_record,
    start_run,
    write_json,
)
from sam2unet_hf.patient_checks import describe_other_modalities
from sam2unet_hf.scans_sam2unet import MODALITIES
from sam2unet_hf.training import (
    ImageRows,
    Sam2UNetTrainer,
    SegmentationMetrics,
    SegmentationTransform,
    augmentation,
    choose_head_crop_size,
)
from sam2unet_hf.training.resume import StopOnSigterm, last_complete_checkpoint
from sam2unet_hf.training.trackers import PredictionPicturesCallback, begin_trackers, finish_trackers, log_patients


logger = logging.getLogger("run_segmentation")

# Builds a model for regions, name -> label ids, and images of so many channels.
ModelBuilder = Callable[[dict[str, list[int]], int], PreTrainedModel]

# Suffixes of metrics that differ when the same run is repeated.
TIMINGS = ("_runtime", "_per_second", "_preparation_time")


def main(argv: list[str] | None = None, prog: str | None = None) -> dict[str, float]:
    """Train and score as the command line says; return the content of `all_results.json`, in the main process."""
    model_args, data_args, training_args = parse_arguments(argv, prog)
    set_up_logging(is_muted=not training_args.should_log)
    if data_args.folds is not None:
        return run_folds(run_training, model_args, data_args, training_args)
    return run_training(model_args, data_args, training_args)


def run_command(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Run as a command, in one process or as one of several; its usage calls it `prog`, or by its file."""
    with report_error_once():
        main(argv, prog)
        PartialState().destroy_process_group()


def run_training(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: SegmentationTrainingArguments,
    before_start: Callable[[], None] | None = None,
    build_model: ModelBuilder | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, float]:
    """Train and score a model, or score it alone; return the content of `all_results.json`, in the main process.

    Args:
        model_args: Which model to start from.
        data_args: Where images and masks come from.
        training_args: How it is trained.
        before_start: Called in the main process before anything is written, once data, model and Trainer exist.
        build_model: Builds another model than SAM2-UNet, to compare both. It must have the same outputs.
        callbacks: Of the Trainer.
    """
    output_dir = Path(training_args.output_dir)
    requested = requested_regions(model_args, data_args)
    take_channels_of_model(model_args, data_args, training_args)
    arguments = resume_arguments(model_args, data_args, training_args)
    checkpoint = from_main_process(training_args, lambda: find_checkpoint(arguments, training_args))

    data: DataSplits = {}
    images: dict[str, ImageRows] = {}
    facts = DataFacts(requested, {}, None)
    if not scores_cohort_alone(data_args, training_args):
        with training_args.main_process_first(desc="preparing the data"):
            data = load_data(data_args)
        columns, mask_column = find_columns(data, data_args)
        facts = from_main_process(
            training_args,
            lambda: find_regions(data, columns, mask_column, requested, data_args.labels, data_args.binarize),
        )
        images = make_images(data, columns, mask_column, data_args.neighbours)
    regions, cohort = facts.regions, None
    if training_args.test_dir is not None:
        with training_args.main_process_first(desc="preparing the second cohort"):
            cohort = load_cohort(training_args.test_dir, data_args, regions)

    # Model and image processor
    set_seed(training_args.seed)
    first = images["train"] if images else cohort.images
    image_options = choose_image_options(model_args, first)
    model, processor = load_model(model_args, regions, build_model, **image_options)
    note_scans(processor, first.image_columns, data_args, training_args)
    options = {"has_trained": not training_args.do_train, "is_sample": data_args.streaming}
    fit_white_level(processor, facts.brightest, data_args.white_level, **options)
    if cohort is not None:
        fit_white_level(processor, cohort.brightest, None if images else data_args.white_level)

    # Transforms: training images are augmented, the others are scored at the size of their masks.
    transform = functools.partial(SegmentationTransform, processor, label_mapping=facts.label_mapping)
    names = [name for name in training_args.augmentation if name != "none"]
    augment = augmentation(*names, neighbours=processor.neighbours, white_level=processor.white_level)
    train_dataset = images["train"].with_transform(transform(augment=augment)) if images else None
    at_mask_size = transform(resize_masks=False)
    evaluation = {split: rows.with_transform(at_mask_size) for split, rows in images.items() if split != "train"}
    if cohort is not None:
        at_mask_size = transform(resize_masks=False, label_mapping=cohort.label_mapping)
        evaluation[COHORT] = cohort.images.with_transform(at_mask_size)

    compute_metrics = SegmentationMetrics(list(regions))
    batch_norm_images = training_args.batch_norm_images
    if batch_norm_images is None:
        batch_norm_images = 0 if model.config.freeze_encoder and not training_args.ema_decay else 128
    # Such as no right to push, no such metric, or an optimizer of a package that is not installed.
    with exit_on(ImportError, OSError, ValueError):
        trainer = Sam2UNetTrainer(
            model,
            training_args,
            compute_metrics=compute_metrics,
            batch_norm_images=batch_norm_images,
            sync_batch_norm=training_args.sync_batch_norm,
            trainable_only=training_args.trainable_only,
            foreground_share=data_args.foreground_share,
            ema_decay=training_args.ema_decay,
            train_dataset=train_dataset,
            eval_dataset=evaluation.get("validation", evaluation.get(COHORT)),
            processing_class=processor,
            callbacks=list(callbacks),
        )
        set_up_console(trainer, list(regions))
        if training_args.do_train:
            trainer.get_optimizer_cls_and_kwargs(training_args, model)
    if checkpoint is not None and training_args.do_train:
        check_steps_left(trainer, checkpoint, arguments)
    if training_args.report_to:
        resumed = checkpoint if training_args.do_train else None
        begin_trackers(trainer, name_for_trackers(resumed, training_args), resumed)
        if "validation" in evaluation:  # the phantom's images may be shown to anybody
            may_share = training_args.share_predictions or not (data_args.dataset_name or data_args.brats_dir)
            trainer.add_callback(PredictionPicturesCallback(trainer, share=may_share))
    known = KnownPatients(data, data_args, training_args, model_args.model_name_or_path)
    # An older run is removed only once data, model and Trainer exist, so that a mistyped option does not cost it.
    if training_args.process_index == 0:
        recorded = data if cohort is None else {**data, COHORT: cohort.rows}
        if before_start is not None:
            before_start()
        start_run(run_record(arguments, training_args, recorded), training_args)
        if training_args.do_train:
            write_splits(output_dir, known.of_run)
        known.warn(evaluation, has_patients=cohort is not None and cohort.has_patients)

    counts = describe_images({**images, **evaluation})
    parameters = [model.num_parameters(only_trainable=only) / 1e6 for only in (False, True)]
    logger.info("Images: %s. Parameters: %.2f M, %.2f M of them trained.", counts, *parameters)
    if training_args.device.type == "cpu" and (busy := describe_busy_machine(torch.get_num_threads())):
        logger.warning(busy)

    results: dict[str, float] = {}

    def keep(split: str, metrics: dict[str, float]) -> None:
        """Save the metrics of a split, and keep them for `all_results.json`, except for timings."""
        trainer.save_metrics(split, metrics, combined=False)
        results.update({name: value for name, value in metrics.items() if not name.endswith(TIMINGS)})

    # Training and evaluation
    said: list[str] = []
    if training_args.do_train:
        metrics = train(trainer, checkpoint)
        keep("train", metrics)
        start = model_args.model_name_or_path or model_args.sam2_checkpoint
        start = f"from {start}" if start else f"{model_args.preset} from scratch"
        start = start if build_model is None else "another model"
        said += describe_training(trainer, metrics["train_runtime"], start)
    # The curves leave out the final evaluation, which belongs to an earlier epoch, that of the best checkpoint.
    history = list(trainer.state.log_history)
    found: dict[str, tuple[np.ndarray, dict[str, np.ndarray]]] = {}
    for split, rows in evaluation.items():
        prefix = "eval" if split == "validation" else split
        keep(prefix, trainer.evaluate(rows, metric_key_prefix=prefix))
        found[split] = compute_metrics.image_dice.mean(axis=1), compute_metrics.patient_counts

    # Patients and pictures, of the run's own split that was scored last, and of the second cohort
    if trainer.is_fsdp_enabled:  # each process holds a part of the weights
        model = Sam2UNetForSemanticSegmentation.from_pretrained(output_dir).to(training_args.device)
    own = [split for split in ("validation", "test") if split in evaluation][-1:]
    for split in (*own, COHORT) if COHORT in evaluation else own:
        rows, (dice, patient_counts) = evaluation[split], found[split]
        table = score_split(trainer, model, processor, rows, patient_counts, split)
        scored_as = "eval" if split == "validation" else split
        log_patients(trainer, table, scored_as)
        if not trainer.is_world_process_zero():
            continue
        said += describe_split_scores(results, scored_as, len(rows), table, list(regions))
        to_show: Any = rows.transform
        rows = rows.with_transform(None)
        titles = patients_to_show(rows, table) if table.rows else rows_to_show(rows, dice, to_show)
        prefix = f"{COHORT}_" if split == COHORT else ""
        cases = show_cases(rows, titles, to_show, model)
        image_title = name_of_image(rows.image_columns)
        plot_predictions(cases, regions, output_dir / f"{prefix}predictions.png", image_title)
        if training_args.do_predict:
            batch_size = training_args.per_device_eval_batch_size
            write_predictions(output_dir / f"{prefix}predictions", rows, to_show, model, batch_size)
    if training_args.do_train and trainer.is_world_process_zero():
        plot_training_curve(history, output_dir / "training_curve.png")

    # Model card and Hub, which are of SAM2-UNet alone
    if training_args.do_train and build_model is None:
        write_card = trainer.push_to_hub if training_args.push_to_hub else trainer.create_model_card
        write_card(**card_arguments(images, model_args, data_args, training_args, describe_split(images, data_args)))
    finish_trackers(trainer)
    if not trainer.is_world_process_zero():
        return {}
    write_json(output_dir / RESULTS_FILE, results)
    for line in (*said, describe_files(output_dir)):
        logger.info("%s", line)
    return results


def choose_image_options(args: ModelArguments, rows: ImageRows) -> dict[str, Any]:
    """Return what the image processor must know of the training images, and the window about the head."""
    options: dict[str, Any] = {"num_channels": rows.num_channels, "neighbours": rows.neighbours}
    if args.head_crop_size == ["auto"]:
        with exit_on(ValueError, prefix="--head_crop_size auto: "):
            options["head_crop_size"] = choose_head_crop_size(rows.head_boxes(), args.head_crop_scale or 1)
    elif args.head_crop_size is not None:
        options["head_crop_size"] = dict(zip(("height", "width"), map(int, args.head_crop_size), strict=True))
    if args.head_crop_scale is not None:
        options["head_crop_scale"] = args.head_crop_scale
    return options


def note_scans(
    processor: Sam2UNetImageProcessor,
    columns: list[str],
    data_args: DataArguments,
    args: SegmentationTrainingArguments,
) -> None:
    """Note modalities and plane of the scans in the image processor, since volume inference needs them.

    A model is not scored on other modalities than its own, unless that is asked for; it can be trained on others.
    """
    facts: dict[str, Any] = {"modalities": columns} if set(columns) <= set(MODALITIES) else {}
    facts |= {"plane": data_args.plane} if data_args.dataset_name is None else {}
    others = describe_other_modalities(processor.modalities, facts.get("modalities", processor.modalities))
    if others and not (args.do_train or args.allow_other_modalities):
        raise SystemExit(f"{others} Leave out --modalities, or go on all the same with --allow_other_modalities.")
    for name, now in facts.items():
        before = getattr(processor, name)
        if before not in (None, now):
            logger.warning("The model is one of %s %s, and sees %s now (--%s).", name, before, now, name)
        setattr(processor, name, now)


def load_model(
    args: ModelArguments,
    regions: dict[str, list[int]],
    build_model: ModelBuilder | None = None,
    **image_options: Any,
) -> tuple[Any, Sam2UNetImageProcessor]:
    """Load or build the model and its image processor for regions, name -> label ids, and images, which must fit."""
    if args.image_size is not None:
        image_options["size"] = {"height": args.image_size, "width": args.image_size}
    with exit_on(ValueError, prefix="--head_crop_size: "):
        processor = Sam2UNetImageProcessor(regions=regions, **image_options)
    if build_model is not None:
        return build_model(regions, processor.num_channels), processor
    if args.model_name_or_path is not None:
        with exit_on(OSError, ValueError, prefix="--model_name_or_path: "):
            model = Sam2UNetForSemanticSegmentation.from_pretrained(args.model_name_or_path)
        if model.config.regions != regions:
            raise SystemExit(
                f"{args.model_name_or_path} segments {model.config.regions}, not {regions}. Leave out --regions, or "
                "start from --sam2_checkpoint."
            )
        if (num_channels := model.config.backbone_config.num_channels) != processor.num_channels:
            raise SystemExit(
                f"{args.model_name_or_path} takes images of {num_channels} channels, the images have "
                f"{processor.num_channels}. Leave out --modalities and --neighbours, or start from --sam2_checkpoint."
            )
        try:
            processor = Sam2UNetImageProcessor.from_pretrained(args.model_name_or_path, **image_options)
        except OSError:
            logger.warning("%s has no image processor. Taking the default one.", args.model_name_or_path)
        if args.freeze_encoder is not None:
            model.freeze_encoder(args.freeze_encoder)
        if args.iou_over_batch is not None:
            model.config.iou_over_batch = args.iou_over_batch
        return model, processor
    freeze = args.sam2_checkpoint is not None if args.freeze_encoder is None else args.freeze_encoder
    options = {"regions": regions, "freeze_encoder": freeze, "iou_over_batch": bool(args.iou_over_batch)}
    options["num_channels"] = processor.num_channels
    if args.sam2_checkpoint is not None:
        with exit_on(OSError, ValueError, prefix="--sam2_checkpoint: "):
            model = Sam2UNetForSemanticSegmentation.from_sam2(args.sam2_checkpoint, **options)
    else:
        frozen = " with a frozen random encoder" if freeze else ""
        advice = "Pass --sam2_checkpoint for a pretrained encoder."
        logger.warning("Training the %s model from scratch%s. %s", args.preset, frozen, advice)
        model = Sam2UNetForSemanticSegmentation(Sam2UNetConfig.from_preset(args.preset, **options))
    return model, processor


def train(trainer: Sam2UNetTrainer, checkpoint: str | None) -> dict[str, float]:
    """Train and save the model, and return the metrics of the training; after SIGTERM, exit with its status."""
    args: Any = trainer.args
    stop = StopOnSigterm(trainer.accelerator)
    trainer.add_callback(stop)
    # Such as a full disk, a checkpoint of another encoder, or a learning rate that is too high.
    with exit_on(FloatingPointError, OSError, SafetensorError):
        result = trainer.train(resume_from_checkpoint=checkpoint)
        if stop.stopped:
            logger.warning(
                "Stopped by SIGTERM after step %d of %d. The same command%s goes on from %s.",
                trainer.state.global_step,
                trainer.state.max_steps,
                ", without --overwrite_output_dir," if args.overwrite_output_dir else "",
                last_complete_checkpoint(args.output_dir),
            )
            trainer.accelerator.wait_for_everyone()  # a launcher ends all processes when one of them ends
            raise SystemExit(128 + signal.SIGTERM)
        trainer.save_model(_internal_call=True)  # pushed at the end, with results and pictures
    trainer.save_state()
    return result.metrics
