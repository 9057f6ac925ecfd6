"""The card of a model repository, rendered from the files of a checkpoint and its run."""

# transformers types the fields of a config by what the constructor takes, not by what an instance holds.
# mypy: disable-error-code="arg-type, union-attr"

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForSemanticSegmentation

from .card_scores import METRIC_TITLES, eval_results, parse_score
from .clean_up_sam2unet import CLEAN_UP_FILE, GAIN_VALUES, GAINS, CleanUp, RegionRule
from .configuration_sam2unet import PRESETS, Sam2UNetConfig, did_you_mean
from .image_processing_sam2unet import Sam2UNetImageProcessor
from .labels_sam2unet import REGION_TITLES
from .members_sam2unet import find_ensemble, read_members
from .patient_table import COLUMN_TITLES, PatientTable
from .weights_sam2unet import is_local_source


# What is known of a run, for its card; written by `Sam2UNetTrainer.create_model_card`.
TRAINING_INFO = "training_info.json"

PICTURES = {
    "predictions.png": "Image, truth and prediction for the best, the median and the worst image.",
    "training_curve.png": "Loss and validation scores over the epochs.",
}

# The tables of patients that a run writes, see `PatientTable`, and what they are of.
PATIENT_TABLES = {
    "validation_patients.json": "validation split",
    "test_patients.json": "test split",
    "test_dir_patients.json": "second cohort",
}
# The table of an ensemble of folds: each patient as the fold without it sees the patient.
FOLD_TABLES = {"patients.json": "cross-validation"}
# A card lists the patients of a larger table no more one by one.
MAX_LISTED_PATIENTS = 100
# Columns of the card's table of single patients. With all of them it would be wider than a page, so the others are
# only in the summary above it.
LISTED_COLUMNS = (
    "volume_dice",
    "hausdorff95_mm",
    "reference_ml",
    "predicted_ml",
    "reference_pixels",
    "predicted_pixels",
)

TEMPLATE = Path(__file__).with_name("model_card.md")


def counted(number: float, noun: str) -> str:
    """Return a number with its noun, in the plural unless the number is 1."""
    text = str(number) if isinstance(number, int) else f"{number:g}"
    return f"{text} {noun}{'' if number == 1 else 's'}"


def score_table(split: str, scores: Mapping[str, float], regions: Sequence[str]) -> dict[str, Any]:
    """Arrange the scores of a split with a row per metric and region, and a column per kind."""
    kinds = ["", "mean", "max", "adaptive"]
    rows: dict[str, list[str]] = {}
    for key, value in scores.items():
        if (found := parse_score(key, regions)) is not None:
            kind, metric, region = found
            row = rows.setdefault(METRIC_TITLES[metric] + (f", {region}" if region else ""), [""] * len(kinds))
            row[kinds.index(kind)] = f"{value:.3f}" if math.isfinite(value) else "undefined"
    return {"split": split, "rows": list(rows.items())}


def input_facts(num_channels: int, processor: Sam2UNetImageProcessor | None) -> dict[str, Any]:
    """Say what the model sees of an image, for the card: the size, the window about the head, and the channels."""
    facts: dict[str, Any] = {"size": None, "window": None, "window_scale": 1, "channels": None, "neighbours": 0}
    if num_channels != 3:
        facts["channels"] = counted(num_channels, "channel")
    if processor is None:
        return facts
    size = processor.head_crop_size or (processor.size if processor.do_resize else None)
    if size is not None:
        facts["window" if processor.head_crop_size else "size"] = f"{size['height']} x {size['width']}"
        facts["window_scale"] = processor.head_crop_scale
    facts["neighbours"] = processor.neighbours
    if processor.modalities:
        channels = f"{counted(num_channels, 'channel')}: {', '.join(processor.modalities)}"
        if processor.neighbours:
            slices = 2 * processor.neighbours + 1
            channels += f", each as {slices} adjacent slices from the lowest to the highest"
        facts["channels"] = channels
    return facts


def patient_section(path: Path, source: str) -> dict[str, Any]:
    """Arrange a table of patients for the card, which numbers patients from the best to the worst and names none."""
    table = PatientTable()
    table.rows = json.loads(path.read_text(encoding="utf-8"))["patients"]

    def cell(column: str, value: float | None) -> str:
        digits = 0 if column.endswith("_pixels") else 1 if column.endswith(("_mm", "_ml")) else 3
        return "" if value is None else f"{value:.{digits}f}"

    summary = [
        [region, COLUMN_TITLES[column], *(cell(column, value) for value in values.values())]
        for region, columns in table.summary().items()
        for column, values in columns.items()
    ]
    numbers = {patient: number for number, patient in enumerate(table.dice, start=1)}
    columns = [name for name in LISTED_COLUMNS if name in table.rows[0]]
    rows = [
        [str(numbers[row["patient"]]), row["region"], *(cell(column, row[column]) for column in columns)]
        for row in sorted(table.rows, key=lambda row: numbers[row["patient"]])
    ]
    return {
        "source": source,
        "count": counted(len(numbers), "patient"),
        "summary": summary,
        "has_lesions": "lesion_dice" in table.rows[0],
        "titles": [COLUMN_TITLES[column] for column in columns],
        "rows": rows if len(numbers) <= MAX_LISTED_PATIENTS else [],
    }


def clean_up_section(path: Path, regions: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Arrange the rules of a clean-up for the card, with what they gain as far as their file says."""
    clean_up = CleanUp.load(path, regions)
    gains = clean_up.record.get(GAINS, {})

    def row(region: str, rule: RegionRule) -> list[str]:
        values = [f"{value:g}" for value in (rule.threshold, rule.min_component_ml, rule.min_region_ml)]
        own = gains.get(region, {})
        gained = [
            f"{own[name]:.{3 if name.startswith('dice') else 1}f}" if name in own else "" for name in GAIN_VALUES
        ]
        return [region, *values, *gained]

    return {
        "chosen_on": clean_up.record.get("chosen_on"),
        "rows": [row(region, rule) for region, rule in clean_up.rules.items()],
        "has_gains": bool(gains),
    }


def read_info(folder: Path, members: Sequence[str] = ()) -> dict[str, Any]:
    """Read what is known of a run for its card; of an ensemble what all of its members have in common.

    The scores of the members' own splits are left out, because they are not those of the ensemble.
    """
    paths = [folder / member / TRAINING_INFO for member in members or [""]]
    infos = [json.loads(path.read_text()) if path.is_file() else {} for path in paths]
    if not members:
        return infos[0]

    def shared(contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        first, *others = contents
        return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}

    tables = {name: shared([info.get(name, {}) for info in infos]) for name in ("data", "recipe")}
    return {**shared(infos), **tables, "results": {}, "model_name": None, "share_predictions": False}


def append_checksum(text: str) -> str:
    """Return a card with its own hash in a comment at its end, which shows whether somebody has edited it since."""
    text = text.rstrip("\n") + "\n"
    return f"{text}\n<!-- written by sam2unet_hf, sha256 {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def has_valid_checksum(text: str) -> bool:
    """Whether a card is just as `append_checksum` left it."""
    body, _, _ = text.rpartition("\n<!-- written by sam2unet_hf, sha256 ")
    return bool(body) and append_checksum(body) == text


def render_model_card(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    tags: Sequence[str] | None = None,
    run: str | os.PathLike | None = None,
) -> str:
    """Write the card of a checkpoint or an ensemble from the files in its folder; what they do not tell stays out.

    Args:
        folder: Checkpoint folder, such as the output folder of a run: `config.json`, and if there are any
            `preprocessor_config.json`, `training_info.json`, `training_curve.png` and `predictions.png`. The last is
            shown only if the run says that its images may be shared. Or the folder of an ensemble: `ensemble.json`,
            the folders of its members, and if there is one the table of patients `patients.json`. Either may hold
            `clean_up.json`.
        repo_id: Where on the Hub it will be.
        tags: Further tags.
        run: Folder of the run that made the checkpoint, if that is another one.

    Raises:
        FileNotFoundError: If there is neither `config.json` nor `ensemble.json`, or not in the folder of a member.
        ValueError: If `ensemble.json` or `clean_up.json` is wrong, or there is an ensemble beside a checkpoint.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}{did_you_mean(folder)}. Name that of a run or an ensemble."
        )
    run = folder if run is None else Path(run)
    ensemble = find_ensemble(folder)
    members = [] if ensemble is None else read_members(ensemble)
    checkpoint = folder / members[0] if members else folder
    if not (checkpoint / "config.json").is_file():
        raise FileNotFoundError(f"{checkpoint} holds no checkpoint: there is no config.json in it.")
    config = Sam2UNetConfig.from_pretrained(checkpoint)
    info = read_info(run, members)
    processor = None
    if (checkpoint / "preprocessor_config.json").is_file():
        processor = Sam2UNetImageProcessor.from_pretrained(checkpoint)
    with torch.device("meta"):
        model = AutoModelForSemanticSegmentation.from_config(config)
    backbone = config.backbone_config.to_dict()
    preset = [name for name, values in PRESETS.items() if all(backbone[key] == values[key] for key in values)]
    regions = list(config.regions)
    title = info.get("model_name") or (repo_id or folder.resolve().name).split("/")[-1]
    encoder_source = None if is_local_source(config.encoder_source) else config.encoder_source
    finetuned_from = info.get("finetuned_from")
    dataset = info.get("dataset", {})
    tables = FOLD_TABLES if members else PATIENT_TABLES
    tables = {name: text for name, text in tables.items() if (run / name).is_file()}
    results = eval_results(info, regions, {name: run / name for name in tables})
    pictures = [(name, text) for name, text in PICTURES.items() if (run / name).is_file()]
    if not info.get("share_predictions"):
        pictures = [(name, text) for name, text in pictures if name != "predictions.png"]
    patients = [patient_section(run / name, text) for name, text in tables.items()]
    rules = folder / CLEAN_UP_FILE
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        license=info.get("license"),
        language=info.get("language"),
        base_model=finetuned_from or encoder_source,
        datasets=[dataset["id"]] if dataset.get("id") else None,
        metrics=[metric for metric in METRIC_TITLES if any(result.metric_type == metric for result in results)]
        or None,
        tags=list(dict.fromkeys(["sam2-unet", "sam2", "hiera", "unet", *info.get("tags", []), *(tags or [])])),
        model_name=title if results else None,
        eval_results=results or None,
        # The page of a repository would offer to run a checkpoint at its top, where an ensemble has none.
        inference=False if members else None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=title,
        region_names=", ".join(regions),
        dataset_name=dataset.get("name"),
        preset=preset[0] if preset else None,
        parameters=model.num_parameters() / 1e6,
        trained_parameters=model.num_parameters(only_trainable=True) / 1e6,
        frozen=config.freeze_encoder,
        encoder_source=encoder_source,
        encoder_revision=config.encoder_revision,
        trainable_only=config.encoder_sha256 is not None,
        finetuned_from=finetuned_from,
        transformers_version=metadata.version("transformers"),
        checkpoint=repo_id or "path/to/this/folder",
        members=members,
        modalities=processor.modalities if processor is not None else None,
        **input_facts(backbone["num_channels"], processor),
        regions=config.regions,
        region_titles=REGION_TITLES,
        id2label=config.id2label,
        data_rows=list(info.get("data", {}).items()),
        recipe=list(info.get("recipe", {}).items()),
        results=[score_table(split, scores, regions) for split, scores in info.get("results", {}).items()],
        patients=patients,
        clean_up=clean_up_section(rules, config.regions) if rules.is_file() else None,
        zero_division=info.get("zero_division"),
        chosen="checkpoint" in info.get("recipe", {}),
        all_show_foreground=info.get("all_show_foreground"),
        pictures=pictures,
        data_citation=dataset.get("citation"),
        license=info.get("license"),
    )
    return append_checksum(str(card))


def pictures_in_card(card: str) -> list[str]:
    """Return the pictures of a run that its card shows."""
    return [name for name in PICTURES if f"]({name})" in card]


def write_model_card(folder: str | os.PathLike, repo_id: str | None = None, tags: Sequence[str] | None = None) -> Path:
    """Write `README.md` of a checkpoint folder, see [`render_model_card`].

    A card that was written so before is replaced; one that somebody edited is an error.

    Args:
        folder: Checkpoint folder.
        repo_id: Where on the Hub it will be.
        tags: Further tags.

    Raises:
        FileExistsError: If there is a card that was edited.
        FileNotFoundError: As [`render_model_card`].
        ValueError: As [`render_model_card`].
    """
    path = Path(folder) / "README.md"
    text = render_model_card(folder, repo_id, tags)
    if path.is_file() and not has_valid_checksum(path.read_text(encoding="utf-8")):
        raise FileExistsError(f"{path} was edited. Move it away to have a card written anew.")
    path.write_text(text, encoding="utf-8")
    return path


__all__ = ["PICTURES", "TRAINING_INFO", "render_model_card", "write_model_card"]
