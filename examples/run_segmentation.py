#!/usr/bin/env python
"""Fine-tune SAM2-UNet on BraTS, on any image/mask data set, or, with no arguments, on a phantom cohort.

python examples/run_segmentation.py
python examples/run_segmentation.py --brats_dir BraTS2020_TrainingData --sam2_checkpoint facebook/sam2-hiera-large
python examples/run_segmentation.py --dataset_name my_folder --sam2_checkpoint facebook/sam2-hiera-tiny
"""

import dataclasses
import functools
import importlib.util
import logging
import re
import shutil
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from accelerate import PartialState
from data_sources import DataArguments, case_names, find_columns, find_regions, load_data
from hp_search import RESULTS, STUDY, search
from PIL import Image
from plots import plot_predictions, plot_training_curve
from processes import from_main_process, is_main_process, mute_process, report_error_once
from provenance import RECORD, changed_values, read_record, run_record, write_json
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import HfArgumentParser, TrainingArguments, set_seed

from dataset_scripts.brats_slices import CITATION
from sam2unet_hf import Sam2UNetConfig, Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor
from sam2unet_hf.configuration_sam2unet import PRESETS
from sam2unet_hf.regions_sam2unet import parse_regions
from sam2unet_hf.training import HYPERPARAMETERS, Sam2UNetTrainer, SegmentationMetrics, SegmentationTransform
from sam2unet_hf.training.augmentation import AUGMENTATIONS, augmentation
from sam2unet_hf.training.resume import StopOnSigterm, last_complete_checkpoint, why_incomplete


logger = logging.getLogger("run_segmentation")

# Training on the phantom: minutes on two CPU cores, from scratch.
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
RESULTS_FILE = "all_results.json"  # written last: a folder that has it holds a finished run
TIMINGS = ("_runtime", "_per_second")  # ends of names of figures that no other run repeats
# What a run leaves in its folder besides the final checkpoint.
RUN_FILES = (
    "checkpoint-*",
    "*_results.json",
    "trainer_state.json",
    RECORD,
    "predictions*",
    "training_*.png",
    "training_info.json",
    "README.md",
    STUDY,
    RESULTS,
)


@dataclass
class ModelArguments:
    """Which model to start from: a SAM2-UNet, a SAM 2 encoder, or nothing."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "SAM2-UNet to go on from: Hub id or folder."},
    )
    sam2_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Pretrained encoder: Hub id such as facebook/sam2-hiera-large, folder, or original .pt file."
        },
    )
    preset: str = field(
        default="tiny",
        metadata={"help": "Encoder from scratch if there is no checkpoint.", "choices": list(PRESETS)},
    )
    freeze_encoder: bool | None = field(
        default=None, metadata={"help": "Train adapters and decoder only. Default: yes, unless from scratch."}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Height and width the images are resized to. Default: the checkpoint's, or else 352."},
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
        metadata={"help": "Normalise by the images of all processes, not by those of each. Needs GPUs."},
    )
    augmentation: list[str] = field(
        default_factory=lambda: ["flips"],
        metadata={"help": "How training images are changed at random, or none.", "choices": ("none", *AUGMENTATIONS)},
    )
    hp_search: int = field(
        default=0,
        metadata={
            "help": "Before training, try this many combinations of learning rate, batch size and optimiser, and "
            "train with the one that scores best on the validation images. Needs optuna."
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
            "help": "Show predictions.png, and so images of your data, in the model card, and upload it with "
            "--push_to_hub. Always so for the phantom."
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
    metric_for_best_model: str | None = field(default="dice", metadata={"help": "Which score picks the best."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logged losses."})
    hub_strategy: str = field(
        default="end", metadata={"help": "When to upload with --push_to_hub, such as every_save."}
    )
    batch_eval_metrics: bool = field(default=True, metadata={"help": "Score batch by batch, in bounded memory."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Must stay false: rows hold images."})

    def __post_init__(self):
        if self.push_to_hub and not self.do_train:
            raise ValueError("--push_to_hub pushes what was trained; it cannot go with --do_train false.")
        if "none" in self.augmentation and len(self.augmentation) > 1:
            raise ValueError(f"--augmentation takes none alone, got {' '.join(self.augmentation)}.")
        if self.hp_search and not self.do_train:
            raise ValueError("--hp_search searches for the best training; it cannot go with --do_train false.")
        if self.hp_search and importlib.util.find_spec("optuna") is None:
            raise ValueError('--hp_search needs optuna. Install it with `pip install "sam2unet-hf[search]"`.')
        if self.save_only_model:
            raise ValueError(
                "--save_only_model leaves nothing that a run could go on from. To keep less, pass --save_total_limit "
                "1 or --trainable_only."
            )
        if self.fsdp and not self.do_train:
            raise ValueError("--fsdp shards the training; it cannot go with --do_train false.")
        if self.lr_scheduler_type == "cosine_with_min_lr" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"min_lr": 1e-7}
        # transformers takes everything but a loss for the better the larger.
        if self.greater_is_better is None and (self.metric_for_best_model or "").removeprefix("eval_").startswith(
            "mae"
        ):
            self.greater_is_better = False
        super().__post_init__()
        # Pinned memory serves a GPU only; without one PyTorch warns at every epoch.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, SegmentationTrainingArguments]:
    """Read the command line; what it leaves open on a phantom run comes from `PHANTOM_RECIPE`."""
    parser = HfArgumentParser((ModelArguments, DataArguments, SegmentationTrainingArguments))
    if not is_main_process():
        parser.error = sys.exit  # without the usage, which the main process prints
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
    name = "phantom" if source is None else Path(source).resolve().name if Path(source).exists() else source
    name = re.sub(r"[^\w.-]+", "-", name) + ("" if given.do_train else "-evaluation")
    parser.set_defaults(output_dir=f"runs/{name}")
    try:
        return parser.parse_args_into_dataclasses(argv)
    except ValueError as err:
        parser.error(str(err))


def find_checkpoint(arguments: dict[str, Any], args: SegmentationTrainingArguments) -> str | None:
    """Return the checkpoint to resume from, if any; refuse to overwrite or mix runs unasked."""
    output_dir = Path(args.output_dir)
    last_checkpoint = last_complete_checkpoint(output_dir)
    if args.resume_from_checkpoint:
        if args.resume_from_checkpoint.lower() not in ("true", "last"):
            if fault := why_incomplete(args.resume_from_checkpoint):
                raise SystemExit(
                    f"--resume_from_checkpoint: {args.resume_from_checkpoint} is not whole ({fault}). Name another."
                )
            return args.resume_from_checkpoint
        if last_checkpoint is None:
            raise SystemExit(f"--resume_from_checkpoint: there is no checkpoint in {output_dir} to resume from.")
        return last_checkpoint
    if args.overwrite_output_dir:
        return None
    if (output_dir / RESULTS_FILE).exists():
        raise SystemExit(
            f"{output_dir} holds a finished run. Pass --overwrite_output_dir to replace it, another --output_dir to "
            "keep it, or --resume_from_checkpoint true to train it further."
        )
    if last_checkpoint is not None or (output_dir / STUDY).exists():
        before = read_record(output_dir)
        if changed := changed_values(before["arguments"] if before else arguments, arguments):
            raise SystemExit(
                f"{output_dir} holds an unfinished run with other values of {', '.join(changed)}. Start again with "
                f"{', '.join(f'{name}={value}' for name, value in changed.items())} to go on with it, or pass "
                "--overwrite_output_dir or another --output_dir."
            )
    if last_checkpoint is not None:
        logger.warning("Going on with the unfinished run in %s from %s.", output_dir, Path(last_checkpoint).name)
    return last_checkpoint


def resume_arguments(args: SegmentationTrainingArguments) -> dict[str, Any]:
    """Return the arguments of training that a run must keep when it goes on, or it would be another one."""
    names = (
        *HYPERPARAMETERS,
        "augmentation",
        "batch_norm_images",
        "sync_batch_norm",
        "trainable_only",
        "eval_strategy",
    )
    values = {name: getattr(args, name) for name in names}
    return {name: getattr(value, "value", value) for name, value in values.items()}


def start_run(record: dict[str, Any], args: SegmentationTrainingArguments) -> None:
    """Make the output folder, empty it of an older run if asked to, and note how this one was started."""
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if args.overwrite_output_dir and not args.resume_from_checkpoint:
        for path in [path for pattern in RUN_FILES for path in output_dir.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (output_dir / RESULTS_FILE).unlink(missing_ok=True)  # of a run that is trained further
    before = read_record(output_dir)
    for part in ("data", "versions", "git") if before else ():
        if changed := changed_values(before[part], record[part]):
            logger.warning(
                "Other %s than when this run began, so it may end otherwise: %s.",
                part,
                ", ".join(f"{name} {record[part].get(name)} (was {value})" for name, value in changed.items()),
            )
    write_json(output_dir / RECORD, record)


def load_model(
    args: ModelArguments, regions: dict[str, list[int]]
) -> tuple[Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor]:
    """Load or build the model and the processor that goes with it."""
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
            logger.warning("%s has no image processor, taking the default one.", args.model_name_or_path)
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


@torch.inference_mode()
def predict_label_maps(
    model: Sam2UNetForSemanticSegmentation, processor: Sam2UNetImageProcessor, images: list[Image.Image]
) -> list[np.ndarray]:
    """Segment images as a user of the checkpoint does: label maps at the images' own sizes."""
    inputs = processor(images, return_tensors="pt").to(model.device)
    sizes = [(image.height, image.width) for image in images]
    maps = processor.post_process_semantic_segmentation(model.eval()(**inputs), target_sizes=sizes)
    return [label_map.cpu().numpy() for label_map in maps]


def write_predictions(
    folder: Path,
    rows: datasets.Dataset,
    transform: SegmentationTransform,
    model: Sam2UNetForSemanticSegmentation,
    batch_size: int,
) -> None:
    """Write the predicted label map of every row as PNG, in the ids of the masks, named after its case."""
    folder.mkdir(exist_ok=True)
    names = case_names(rows)
    for start in tqdm(range(0, len(rows), batch_size), desc="Writing predictions", unit="batch"):
        images = rows[start : start + batch_size][transform.image_column]
        maps = predict_label_maps(model, transform.processor, images)
        for name, label_map in zip(names[start : start + batch_size], maps, strict=True):
            for original_id, label_id in transform.label_mapping.items():
                label_map = np.where(label_map == label_id, original_id, label_map)
            dtype = np.uint8 if label_map.max() < 256 else np.uint16
            Image.fromarray(label_map.astype(dtype)).save(folder / f"{name}.png")


def choose_cases(
    rows: datasets.Dataset,
    dice: np.ndarray,
    transform: SegmentationTransform,
    model: Sam2UNetForSemanticSegmentation,
) -> list[tuple[str, Image.Image, np.ndarray, np.ndarray]]:
    """Return title, image, truth and prediction of the best, median and worst image with something to find."""
    region_ids = [label_id for label_ids in model.config.regions.values() for label_id in label_ids]

    def truth(index: int) -> np.ndarray:
        return transform.to_label_ids(rows[index][transform.mask_column]).numpy()

    foreground = [index for index in range(len(rows)) if np.isin(truth(index), region_ids).any()]
    ranked = sorted(foreground or range(len(rows)), key=lambda index: -dice[index])
    names = case_names(rows)
    cases = []
    for title, index in (("best", ranked[0]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[-1])):
        image = rows[index][transform.image_column]
        (prediction,) = predict_label_maps(model, transform.processor, [image])
        cases.append((f"{title}: Dice {dice[index]:.3f}\n{names[index]}", image, truth(index), prediction))
    return cases


def describe_run(
    data: datasets.DatasetDict,
    data_args: DataArguments,
    model_args: ModelArguments,
    training_args: SegmentationTrainingArguments,
) -> dict[str, Any]:
    """Return what the model card says of the data and of where the run started, for `create_model_card`."""
    rows: dict[str, Any] = {}
    is_phantom = data_args.dataset_name is None and data_args.brats_dir is None
    for split, images in data.items():
        # Photographs have a name each, scans have many slices.
        scans = f" of {len(set(images['case_id']))} scans" if "wt_pixels" in images.column_names else ""
        rows[f"{'training' if split == 'train' else split} images"] = f"{len(images)}{scans}"
    if data_args.dataset_name is None:
        rows["slices"] = f"{data_args.plane}, {' '.join(data_args.slices)}"
        if "tumor" in data_args.slices:
            rows["slices"] += f" (at least {data_args.min_tumor_pixels} pixels of it)"
        rows["modalities"] = ", ".join(data_args.modalities)
        rows["intensities"] = "0.5 to 99.5 percentile of each volume's foreground, to 8 bits"
        rows["split"] = f"by patient, seed {data_args.split_seed}"
    name, hub_id = "a phantom cohort in BraTS' layout", None
    if data_args.brats_dir is not None:
        name = "BraTS"
    elif data_args.dataset_name is not None and Path(data_args.dataset_name).exists():
        name = Path(data_args.dataset_name).resolve().name
    elif data_args.dataset_name is not None:
        name = hub_id = data_args.dataset_name
    return {
        "license": training_args.license,
        "tags": ["medical", "mri", "brain-tumor"] if data_args.dataset_name is None else [],
        "finetuned_from": model_args.model_name_or_path,
        "dataset": name,
        "dataset_tags": hub_id,
        "dataset_args": data_args.dataset_config_name,
        "data": rows,
        "data_citation": f"```bibtex\n{CITATION.strip()}\n```" if data_args.brats_dir is not None else None,
        "share_predictions": is_phantom or training_args.share_predictions,
    }


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the script; return what `all_results.json` holds."""
    model_args, data_args, training_args = parse_arguments(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO, stream=sys.stderr)
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    if not training_args.should_log:
        mute_process()
    try:
        regions = None if data_args.regions is None else parse_regions(data_args.regions)
    except ValueError as err:
        raise SystemExit(f"--regions: {err}") from err
    if model_args.model_name_or_path is not None and regions is None:
        try:
            regions = Sam2UNetConfig.from_pretrained(model_args.model_name_or_path).regions
        except OSError as err:
            raise SystemExit(f"--model_name_or_path: {err}") from err
    output_dir = Path(training_args.output_dir)
    arguments = {**dataclasses.asdict(model_args), **dataclasses.asdict(data_args), **resume_arguments(training_args)}
    checkpoint = from_main_process(training_args, lambda: find_checkpoint(arguments, training_args))
    with training_args.main_process_first(desc="preparing the data"):
        data = load_data(data_args)
    set_seed(training_args.seed)
    image_column, mask_column = find_columns(data, data_args)
    regions, label_mapping = from_main_process(
        training_args, functools.partial(find_regions, data, image_column, mask_column, regions)
    )
    model, processor = load_model(model_args, regions)
    if data_args.dataset_name is None:
        for name in ("modalities", "plane"):
            before, now = getattr(processor, name), getattr(data_args, name)
            if before not in (None, now):
                logger.warning("The model is one of %s %s, and sees %s now (--%s).", name, before, now, name)
            setattr(processor, name, now)

    def transform(**kwargs: Any) -> SegmentationTransform:
        return SegmentationTransform(processor, image_column, mask_column, label_mapping=label_mapping, **kwargs)

    at_mask_size = transform(resize_masks=False)
    evaluation = {split: rows.with_transform(at_mask_size) for split, rows in data.items() if split != "train"}
    batch_norm_images = training_args.batch_norm_images
    if batch_norm_images is None:
        batch_norm_images = 0 if model.config.freeze_encoder else 128
    compute_metrics = SegmentationMetrics(list(regions))
    augment = augmentation(*(name for name in training_args.augmentation if name != "none"))

    def make_trainer(args: TrainingArguments) -> Sam2UNetTrainer:
        return Sam2UNetTrainer(
            model,
            args,
            compute_metrics=compute_metrics,
            batch_norm_images=batch_norm_images,
            sync_batch_norm=training_args.sync_batch_norm,
            trainable_only=training_args.trainable_only,
            train_dataset=data["train"].with_transform(transform(augment=augment)),
            eval_dataset=evaluation["validation"],
            processing_class=processor,
        )

    try:
        trainer = make_trainer(training_args)
    except (OSError, ValueError) as err:  # no right to push, no encoder to leave out, no such score
        raise SystemExit(str(err)) from err
    # Not before data, model and Trainer are there, so that a mistyped option costs nobody an older run.
    if training_args.process_index == 0:
        start_run(run_record(arguments, training_args, data), training_args)
    if training_args.hp_search:
        start = functools.partial(load_model, model_args, regions)
        best = search(make_trainer, lambda: start()[0], training_args, training_args.hp_search)
        for name, value in best.items():
            setattr(training_args, name, type(getattr(training_args, name))(value))
        model, _ = start()
        trainer = make_trainer(training_args)
    logger.info(
        "Images: %s. Parameters: %.2f M, %.2f M of them trained.",
        ", ".join(f"{len(rows)} {split}" for split, rows in data.items()),
        model.num_parameters() / 1e6,
        model.num_parameters(only_trainable=True) / 1e6,
    )

    results: dict[str, float] = {}

    def keep(split: str, metrics: dict[str, float]) -> None:
        """Log the scores of a split, write them to a file of its own, and keep those that another run would repeat."""
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics, combined=False)
        results.update({name: value for name, value in metrics.items() if not name.endswith(TIMINGS)})

    if training_args.do_train:
        stop = StopOnSigterm(trainer.accelerator)
        trainer.add_callback(stop)
        try:
            result = trainer.train(resume_from_checkpoint=checkpoint)
            if stop.stopped:
                logger.warning(
                    "Stopped by SIGTERM after step %d of %d. The same command%s goes on from %s.",
                    trainer.state.global_step,
                    trainer.state.max_steps,
                    ", without --overwrite_output_dir," if training_args.overwrite_output_dir else "",
                    last_complete_checkpoint(output_dir),
                )
                trainer.accelerator.wait_for_everyone()  # a launcher ends all processes once one of them has ended
                raise SystemExit(128 + signal.SIGTERM)
            trainer.save_model(_internal_call=True)  # pushed at the end, with results and pictures
        except (OSError, SafetensorError) as err:  # a full disk, a checkpoint of another encoder
            raise SystemExit(str(err)) from err
        trainer.save_state()
        keep("train", result.metrics)
    # Without the evaluation of the best checkpoint that follows, which belongs to no epoch of its own.
    history = list(trainer.state.log_history)
    keep("eval", trainer.evaluate())
    shown = "test" if "test" in evaluation else "validation"
    if shown == "test":
        keep("test", trainer.evaluate(evaluation["test"], metric_key_prefix="test"))

    if trainer.is_world_process_zero():
        if trainer.is_fsdp_enabled:  # a process has only a part of the weights
            model = Sam2UNetForSemanticSegmentation.from_pretrained(output_dir).to(training_args.device)
        dice = compute_metrics.image_dice.mean(axis=1)
        plot_predictions(choose_cases(data[shown], dice, at_mask_size, model), regions, output_dir / "predictions.png")
        if training_args.do_train:
            plot_training_curve(history, output_dir / "training_curve.png")
        if training_args.do_predict:
            batch_size = training_args.per_device_eval_batch_size
            write_predictions(output_dir / "predictions", data[shown], at_mask_size, model, batch_size)
    if training_args.do_train:
        card = describe_run(data, data_args, model_args, training_args)
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


if __name__ == "__main__":
    with report_error_once():
        main()
        PartialState().destroy_process_group()
