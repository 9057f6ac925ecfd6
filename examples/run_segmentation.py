#!/usr/bin/env python
"""Fine-tune SAM2-UNet on BraTS, on any image/mask data set, or, with no arguments, on a phantom cohort.

python examples/run_segmentation.py
python examples/run_segmentation.py --brats_dir BraTS2020_TrainingData --sam2_checkpoint facebook/sam2-hiera-large
python examples/run_segmentation.py --dataset_name my_folder --sam2_checkpoint facebook/sam2-hiera-tiny
"""

import json
import logging
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import matplotlib
import numpy as np
import torch
import transformers
from PIL import Image
from tqdm import tqdm
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from dataset_scripts.brats_slices import BratsSlices, split_patients
from dataset_scripts.phantom import write_phantom_cohort
from sam2unet_hf import Sam2UNetConfig, Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor
from sam2unet_hf.configuration_sam2unet import PRESETS
from sam2unet_hf.nifti import MODALITIES, PLANES
from sam2unet_hf.training import Sam2UNetTrainer, SegmentationTransform, flips


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 - after the choice of backend


logger = logging.getLogger("run_segmentation")

# Training on the phantom: minutes on two CPU cores, from scratch.
PHANTOM_RECIPE = {
    "slices": ["tumor"],
    "min_tumor_pixels": 20,
    "image_size": 96,
    "num_train_epochs": 4.0,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 32,
    "learning_rate": 5e-4,
    "warmup_steps": 20,
}
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
MASK_COLUMNS = ("mask", "label", "labels", "annotation", "segmentation", "segmentation_mask", "masks")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
# One colour per region, told apart also by the colour-blind (Okabe and Ito).
COLOURS = ("#D55E00", "#56B4E9", "#F0E442", "#009E73", "#CC79A7")


@dataclass
class ModelArguments:
    """Which model to start from: a SAM2-UNet, a SAM 2 encoder, or nothing."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "SAM2-UNet to go on from: Hub id or folder with weights, config and processor."},
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
class DataArguments:
    """Where the slices come from: a data set, BraTS scans, or a phantom."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id; folder written by `python -m dataset_scripts.brats_slices`; or folder with `images` and "
            "`masks` in it, files paired by name, at its top or in train, validation and test."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    brats_dir: str | None = field(default=None, metadata={"help": "Folder of BraTS cases, in NIfTI."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the images. Default: found by type."})
    mask_column: str | None = field(default=None, metadata={"help": "Column of the masks. Default: found by name."})
    regions: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to segment, NAME=ID[,ID...] each, nested or disjoint. Default: WT=1,2,3 for BraTS, else one "
            "region per id in the masks; with --model_name_or_path those of the model."
        },
    )
    modalities: list[str] = field(
        default_factory=lambda: ["flair"], metadata={"help": "For scans: one, or three as RGB.", "choices": MODALITIES}
    )
    slices: list[str] = field(
        default_factory=lambda: ["95"], metadata={"help": "For scans: indices such as 90 95, or all, or tumor."}
    )
    min_tumor_pixels: int = field(
        default=1, metadata={"help": "For scans with --slices tumor: tumour a slice must show."}
    )
    plane: str = field(default="axial", metadata={"help": "For scans: how to cut.", "choices": sorted(PLANES)})
    num_proc: int | None = field(default=None, metadata={"help": "For scans: processes that read them."})
    skip_bad_cases: bool = field(default=False, metadata={"help": "For scans: leave out and list unusable cases."})
    split_seed: int = field(default=0, metadata={"help": "Seed of the split by patient, where the data has none."})


@dataclass
class SegmentationTrainingArguments(TrainingArguments):
    """Transformers' training arguments with the defaults of the paper's recipe (doi 10.3390/app15063267, Table 2)."""

    do_train: bool = field(default=True, metadata={"help": "Train."})
    do_predict: bool = field(default=False, metadata={"help": "Write the label map of every test image as PNG."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace a finished run in the output folder."}
    )
    num_train_epochs: float = field(default=30.0, metadata={"help": "Passes over the training images."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate of AdamW."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of AdamW."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Training images per step and device."})
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Evaluation images per step and device."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "Learning rate schedule."})
    lr_scheduler_kwargs: dict | str | None = field(
        default_factory=lambda: {"min_lr": 1e-7}, metadata={"help": "Arguments of the schedule, as JSON."}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept, the best one among them."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    metric_for_best_model: str | None = field(
        default="dice", metadata={"help": "What the best checkpoint is best in."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logged losses."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Must stay false: rows hold images."})

    def __post_init__(self):
        super().__post_init__()
        # Pinned memory serves a GPU only; without one PyTorch warns at every epoch.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, SegmentationTrainingArguments]:
    """Read the command line; what it leaves open on a phantom run comes from `PHANTOM_RECIPE`."""
    parser = HfArgumentParser((ModelArguments, DataArguments, SegmentationTrainingArguments))
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
    name = re.sub(r"[^\w.-]+", "-", Path(source).resolve().name if Path(source).exists() else source) if source else ""
    parser.set_defaults(output_dir=f"runs/{name or 'phantom'}")
    return parser.parse_args_into_dataclasses(argv)


def prepare_output_dir(args: SegmentationTrainingArguments) -> str | None:
    """Return the checkpoint to resume from, if any; never overwrite a finished run unasked."""
    output_dir = Path(args.output_dir)
    last_checkpoint = get_last_checkpoint(args.output_dir) if output_dir.is_dir() else None
    if args.resume_from_checkpoint:
        if args.resume_from_checkpoint.lower() not in ("true", "last"):
            return args.resume_from_checkpoint
        if last_checkpoint is None:
            raise SystemExit(f"--resume_from_checkpoint: there is no checkpoint in {output_dir} to resume from.")
        return last_checkpoint
    if args.overwrite_output_dir or not args.do_train:
        if args.do_train and args.process_index == 0:
            for old_checkpoint in output_dir.glob("checkpoint-*"):
                shutil.rmtree(old_checkpoint)
        return None
    if (output_dir / "all_results.json").exists():
        raise SystemExit(
            f"{output_dir} holds a finished run. Pass --overwrite_output_dir to replace it, another --output_dir to "
            "keep it, or --resume_from_checkpoint true to train it further."
        )
    if last_checkpoint is not None:
        logger.warning("Going on with the unfinished run in %s from %s.", output_dir, Path(last_checkpoint).name)
    return last_checkpoint


def load_data(args: DataArguments) -> datasets.DatasetDict:
    """Load or build the data set, with the splits train, validation and, if there is enough, test."""
    if args.dataset_name is None:
        brats_dir = args.brats_dir or phantom_dir()
        words = " ".join(args.slices).split()
        try:
            builder = BratsSlices(
                data_dir=str(brats_dir),
                modalities=args.modalities,
                slices=[int(word) for word in words] if all(map(str.isdecimal, words)) else " ".join(words),
                min_tumor_pixels=args.min_tumor_pixels,
                plane=args.plane,
                seed=args.split_seed,
                skip_bad_cases=args.skip_bad_cases,
            )
            builder.download_and_prepare(num_proc=args.num_proc)
        except (FileNotFoundError, ValueError) as err:
            raise SystemExit(str(err)) from err
        data = builder.as_dataset()
    elif (folder := Path(args.dataset_name)).is_dir() and (pairs := image_mask_folders(folder)):
        data = datasets.DatasetDict({split: pair_images_and_masks(*pair) for split, pair in pairs.items()})
    else:
        data = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
    return with_all_splits(data, args.split_seed)


def phantom_dir() -> Path:
    """Return the cached phantom cohort, drawn at the first run."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "sam2unet-phantom-1.0"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_phantom_cohort(folder)
    return folder


def image_mask_folders(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Find the folders `images` and `masks`, in `folder` or in one folder per split; none if there are none."""
    if (folder / "images").is_dir():
        return {"train": (folder / "images", folder / "masks")}
    found = {}
    for split, names in SPLITS.items():
        for name in names:
            if (folder / name / "images").is_dir():
                found[split] = (folder / name / "images", folder / name / "masks")
    return found


def pair_images_and_masks(image_dir: Path, mask_dir: Path) -> datasets.Dataset:
    """Pair the files of two folders by name, whatever their suffix."""
    if not mask_dir.is_dir():
        raise SystemExit(f"{image_dir} has no masks beside it: expected a folder {mask_dir}.")
    files: list[dict[str, Path]] = []
    for folder in (image_dir, mask_dir):
        by_stem: dict[str, Path] = {}
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
                continue
            stem = str(path.relative_to(folder).with_suffix(""))
            if stem in by_stem:
                raise SystemExit(f"{by_stem[stem]} and {path} have the same name. Remove one.")
            by_stem[stem] = path
        files.append(by_stem)
    images, masks = files
    if not images:
        raise SystemExit(f"{image_dir} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    unpaired = [str(images[stem]) for stem in sorted(images.keys() - masks.keys())]
    unpaired += [str(masks[stem]) for stem in sorted(masks.keys() - images.keys())]
    if unpaired:
        more = f" and {len(unpaired) - 5} more" if len(unpaired) > 5 else ""
        raise SystemExit(
            f"{len(unpaired)} files have no partner of the same name: {', '.join(unpaired[:5])}{more}. An image "
            f"{image_dir / 'x.png'} needs a mask {mask_dir / 'x.png'}; the suffixes may differ."
        )
    rows = {
        "image": [str(images[stem]) for stem in images],
        "mask": [str(masks[stem]) for stem in images],
        "case_id": list(images),
    }
    features = {"image": datasets.Image(), "mask": datasets.Image(), "case_id": datasets.Value("string")}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def with_all_splits(data: datasets.DatasetDict, seed: int) -> datasets.DatasetDict:
    """Name the splits as we do; cut off validation, and test if nothing else is there, by patient where known."""
    if not isinstance(data, datasets.DatasetDict):
        raise SystemExit(f"Expected a data set with splits, got {type(data).__name__}.")
    named = {split: data[name] for split, names in SPLITS.items() for name in names if name in data}
    if "train" not in named:
        raise SystemExit(f"The data set has no split named train, only {', '.join(data)}.")
    if "validation" not in named:
        train = named["train"]
        groups = train["case_id"] if "case_id" in train.column_names else list(map(str, range(len(train))))
        split_of = {group: split for split, names in split_patients(groups, seed).items() for group in names}
        if "test" in named:  # the data has its own: what would be test is for training
            split_of = {group: "train" if split == "test" else split for group, split in split_of.items()}
        for split in ("train", "validation", "test"):
            rows = [index for index, group in enumerate(groups) if split_of[group] == split]
            if rows:
                named[split] = train.select(rows)
        if "validation" not in named:
            raise SystemExit(f"{len(train)} images of {len(split_of)} cases are too few to train and to validate.")
        counts = ", ".join(f"{len(named[split])} {split}" for split in SPLITS if split in named)
        logger.warning("The data set has no validation split; cut it into %s.", counts)
    empty = [split for split, rows in named.items() if not len(rows)]
    if empty:
        raise SystemExit(f"The split {empty[0]} of the data set is empty.")
    return datasets.DatasetDict(named)


def find_columns(data: datasets.DatasetDict, args: DataArguments) -> tuple[str, str]:
    """Return the columns of images and masks."""
    features = data["train"].features
    image_columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    mask_column = args.mask_column or next((name for name in MASK_COLUMNS if name in image_columns), None)
    image_column = args.image_column or next((name for name in image_columns if name != mask_column), None)
    for option, column in (("--image_column", image_column), ("--mask_column", mask_column)):
        if column not in image_columns:
            raise SystemExit(
                f"{option}: {'no column found' if column is None else f'{column!r} is no column of images'}. The data "
                f"set's columns of images are {image_columns or 'none'}, of {list(features)}."
            )
    return image_column, mask_column


def find_regions(
    data: datasets.DatasetDict, image_column: str, mask_column: str, args: DataArguments
) -> tuple[dict[str, list[int]], dict[int, int]]:
    """Return the regions to segment and the ids to replace in the masks."""
    regions: dict[str, list[int]] = {}
    for text in args.regions or []:
        match = re.fullmatch(r"([^=]+)=(\d+(?:,\d+)*)", text)
        if match is None or match[1] in regions:
            raise SystemExit(f"--regions takes NAME=ID[,ID...] with different names, such as WT=1,2,3, got {text!r}.")
        regions[match[1]] = [int(label_id) for label_id in match[2].split(",")]
    if "wt_pixels" in data["train"].column_names:  # written by the BraTS builder, which checked it all
        return regions or {"WT": [1, 2, 3]}, {}

    found: set[int] = set()
    for split, rows in data.items():
        found |= check_images_and_masks(split, rows, image_column, mask_column)
    ids = sorted(found - {0, 255})
    if not ids and 255 in found:
        logger.warning("The masks hold 0 and 255 only: taking 255 as the foreground, label id 1.")
        ids, mapping = [1], {255: 1}
    elif not ids:
        raise SystemExit(f"The masks in column {mask_column!r} are all background (0).")
    else:
        mapping = {}
        if 255 in found:
            logger.warning("Pixels of 255 in the masks are ignored in training and evaluation.")
    if not regions:
        regions = {"foreground": ids} if ids == [1] else {f"class_{label_id}": [label_id] for label_id in ids}
    if unknown := sorted({label_id for label_ids in regions.values() for label_id in label_ids} - set(ids)):
        raise SystemExit(f"--regions names label ids {unknown} that no mask holds; the masks hold {ids}.")
    logger.info("Label ids in the masks: %s. Regions: %s.", ids, regions)
    return regions, mapping


def check_images_and_masks(split: str, rows: datasets.Dataset, image_column: str, mask_column: str) -> set[int]:
    """Read every image and mask once, before hours of training, and return the ids in the masks."""
    read_mask = SegmentationTransform(Sam2UNetImageProcessor()).read_mask
    found: set[int] = set()
    for index, name in enumerate(tqdm(case_names(rows), desc=f"Checking {split} images and masks", unit="image")):
        try:
            row = rows[index]
            label_map = read_mask(row[mask_column])
        except (OSError, SyntaxError, ValueError) as err:  # what Pillow and we raise for broken files
            raise SystemExit(f"{split} image {name}: {err}") from err
        height, width = label_map.shape
        if row[image_column].size != (width, height):
            raise SystemExit(
                f"{split} image {name} is {row[image_column].height}x{row[image_column].width} pixels, its mask "
                f"{height}x{width}. Resize one to the other, masks by nearest neighbour."
            )
        found.update(label_map.unique().tolist())
        if len(found) > 64:
            raise SystemExit(
                f"The masks up to {split} image {name} hold more than 64 different values, such as "
                f"{sorted(found)[:8]}. Are they photographs, or saved as JPEG, which blurs ids? Save label ids as PNG."
            )
    return found


def load_model(
    args: ModelArguments, regions: dict[str, list[int]]
) -> tuple[Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor]:
    """Load or build the model and the processor that goes with it."""
    size = {} if args.image_size is None else {"size": {"height": args.image_size, "width": args.image_size}}
    if args.model_name_or_path is None:
        return new_model(args, regions), Sam2UNetImageProcessor(regions=regions, **size)
    model = Sam2UNetForSemanticSegmentation.from_pretrained(args.model_name_or_path)
    processor = Sam2UNetImageProcessor.from_pretrained(args.model_name_or_path, **size)
    if model.config.regions != regions:
        raise SystemExit(
            f"{args.model_name_or_path} segments {model.config.regions}, not {regions}. Leave out --regions, or start "
            "from --sam2_checkpoint."
        )
    if args.freeze_encoder is not None:
        model.freeze_encoder(args.freeze_encoder)
    return model, processor


def new_model(args: ModelArguments, regions: dict[str, list[int]]) -> Sam2UNetForSemanticSegmentation:
    """Build a model on a SAM 2 encoder or from scratch."""
    if args.sam2_checkpoint is not None:
        freeze = args.freeze_encoder is not False
        try:
            return Sam2UNetForSemanticSegmentation.from_sam2(
                args.sam2_checkpoint, regions=regions, freeze_encoder=freeze
            )
        except (OSError, ValueError) as err:
            raise SystemExit(f"--sam2_checkpoint: {err}") from err
    freeze = bool(args.freeze_encoder)
    logger.warning(
        "Training the %s model from scratch%s. Pass --sam2_checkpoint for a pretrained encoder.",
        args.preset,
        " with a frozen random encoder" if freeze else "",
    )
    config = Sam2UNetConfig.from_preset(args.preset, regions=regions, freeze_encoder=freeze)
    return Sam2UNetForSemanticSegmentation(config)


def case_names(rows: datasets.Dataset) -> list[str]:
    """Name each row after its case and slice, or after its place."""
    cases = rows["case_id"] if "case_id" in rows.column_names else [f"{index:05d}" for index in range(len(rows))]
    slices = rows["slice_index"] if "slice_index" in rows.column_names else [None] * len(rows)
    return [case if index is None else f"{case}_{index:03d}" for case, index in zip(cases, slices, strict=True)]


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
    image_column: str,
    model: Sam2UNetForSemanticSegmentation,
    processor: Sam2UNetImageProcessor,
    batch_size: int,
) -> None:
    """Write the predicted label map of every row as an 8-bit PNG named after its case."""
    names = case_names(rows)
    for start in tqdm(range(0, len(rows), batch_size), desc="Writing predictions", unit="batch"):
        images = rows[start : start + batch_size][image_column]
        for name, label_map in zip(names[start:], predict_label_maps(model, processor, images), strict=False):
            path = folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(label_map.astype(np.uint8)).save(path)


def plot_training_curve(log_history: list[dict[str, Any]], path: Path) -> None:
    """Draw losses and validation scores over epochs."""
    figure, (losses, scores) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(entry["epoch"], entry[key]) for entry in log_history if key in entry]
        if points:
            losses.plot(*zip(*points, strict=True), label=label, marker="o" if key == "eval_loss" else None)
    for key, label in (("eval_dice", "Dice"), ("eval_iou", "IoU")):
        points = [(entry["epoch"], entry[key]) for entry in log_history if key in entry]
        if points:
            scores.plot(*zip(*points, strict=True), label=label, marker="o")
    losses.set(xlabel="epoch", ylabel="loss (three outputs)", title="Loss", ylim=(0, None))
    scores.set(xlabel="epoch", ylabel="score", title="Validation scores", ylim=(0, 1))
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_predictions(
    cases: list[tuple[str, Image.Image, np.ndarray, np.ndarray]], regions: dict[str, list[int]], path: Path
) -> None:
    """Draw image, truth, prediction and their outlines, one row per case."""
    figure, axes = plt.subplots(
        len(cases), 4, figsize=(12, 3.3 * len(cases)), layout="constrained", squeeze=False, facecolor="white"
    )
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(regions))]
    for row, (title, image, truth, prediction) in zip(axes, cases, strict=True):
        pixels = np.asarray(image.convert("L") if image.mode in ("L", "RGB", "P", "RGBA") else image, dtype=float)
        for axis in row:
            axis.imshow(pixels, cmap="gray")
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(title)
        # Large regions first, so that those inside them stay visible.
        for (_, label_ids), colour in sorted(
            zip(regions.items(), colours, strict=True), key=lambda item: -len(item[0][1])
        ):
            rgb = matplotlib.colors.to_rgb(colour)
            for axis, label_map, style in ((row[1], truth, "solid"), (row[2], prediction, "dashed")):
                mask = np.isin(label_map, label_ids)
                axis.imshow(np.dstack([np.broadcast_to(rgb, (*mask.shape, 3)), mask * 0.5]), interpolation="nearest")
                if mask.any() and not mask.all():
                    row[3].contour(mask, levels=[0.5], colors=[colour], linestyles=style, linewidths=1.2)
    for axis, title in zip(
        axes[0], ("image", "truth", "prediction", "truth (solid), prediction (dashed)"), strict=True
    ):
        axis.set_title(title)
    handles = [plt.Line2D([], [], color=colour, label=name) for name, colour in zip(regions, colours, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the script; return what `all_results.json` holds."""
    model_args, data_args, training_args = parse_arguments(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO, stream=sys.stderr)
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    checkpoint = prepare_output_dir(training_args)
    output_dir = Path(training_args.output_dir)
    set_seed(training_args.seed)

    if model_args.model_name_or_path is not None and data_args.regions is None:
        regions = Sam2UNetConfig.from_pretrained(model_args.model_name_or_path).regions
        data_args.regions = [f"{name}={','.join(map(str, ids))}" for name, ids in regions.items()]
    with training_args.main_process_first(desc="preparing the data"):
        data = load_data(data_args)
    image_column, mask_column = find_columns(data, data_args)
    regions, label_mapping = find_regions(data, image_column, mask_column, data_args)
    model, processor = load_model(model_args, regions)

    def transform(**kwargs: Any) -> SegmentationTransform:
        return SegmentationTransform(processor, image_column, mask_column, label_mapping=label_mapping, **kwargs)

    evaluation = {
        split: rows.with_transform(transform(resize_masks=False)) for split, rows in data.items() if split != "train"
    }
    trainer = Sam2UNetTrainer(
        model,
        training_args,
        train_dataset=data["train"].with_transform(transform(augment=flips())),
        eval_dataset=evaluation["validation"],
        processing_class=processor,
    )
    counts = ", ".join(f"{len(rows)} {split}" for split, rows in data.items())
    logger.info(
        "Images: %s. Parameters: %.2f M, %.2f M of them trained.",
        counts,
        model.num_parameters() / 1e6,
        model.num_parameters(only_trainable=True) / 1e6,
    )

    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.save_state()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)

    shown = "test" if "test" in evaluation else "validation"
    prediction = trainer.predict(evaluation[shown], metric_key_prefix=shown)
    if shown == "test":
        trainer.log_metrics("test", prediction.metrics)
        trainer.save_metrics("test", prediction.metrics)

    if trainer.is_world_process_zero():
        rows, dice = data[shown], prediction.predictions[..., 0].mean(axis=1)
        names = case_names(rows)
        read_mask = transform().read_mask
        foreground = [index for index in range(len(rows)) if bool((read_mask(rows[index][mask_column]) % 255).any())]
        ranked = sorted(foreground or range(len(rows)), key=lambda index: -dice[index])
        cases = []
        for title, place in (("best", 0), ("median", len(ranked) // 2), ("worst", -1)):
            row, index = rows[ranked[place]], ranked[place]
            (predicted,) = predict_label_maps(model, processor, [row[image_column]])
            label = f"{title}: Dice {dice[index]:.3f}\n{names[index]}"
            cases.append((label, row[image_column], read_mask(row[mask_column]).numpy(), predicted))
        plot_predictions(cases, regions, output_dir / "predictions.png")
        plot_training_curve(trainer.state.log_history, output_dir / "training_curve.png")
        if training_args.do_predict:
            batch_size = training_args.per_device_eval_batch_size
            write_predictions(output_dir / "predictions", rows, image_column, model, processor, batch_size)
        logger.info("Checkpoint, all_results.json, training_curve.png and predictions.png are in %s.", output_dir)
    return json.loads((output_dir / "all_results.json").read_text())


if __name__ == "__main__":
    main()
