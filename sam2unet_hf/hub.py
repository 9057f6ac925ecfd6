"""Sharing on the Hugging Face Hub: model cards, and metrics as Spaces.

python -m sam2unet_hf.hub card runs/phantom
python -m sam2unet_hf.hub metric dice my_dice_space
"""

# transformers types the fields of a config by what the constructor takes, not by what an instance holds.
# mypy: disable-error-code="arg-type, union-attr"

import argparse
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from .configuration_sam2unet import PRESETS, Sam2UNetConfig
from .image_processing_sam2unet import Sam2UNetImageProcessor
from .metrics.space import write_metric_space
from .modeling_sam2unet import Sam2UNetForSemanticSegmentation
from .weights_sam2unet import is_local_source, is_pretrained_weight, read_safetensors


# What a model repository holds, of all that a run leaves in its folder. Nothing in it is a pickle.
CHECKPOINT_FILES = (
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "*_sam2unet.py",
)
# What is known of a run, for its card; written by `Sam2UNetTrainer.create_model_card`.
TRAINING_INFO = "training_info.json"
PICTURES = {
    "predictions.png": "Image, truth and prediction for the best, the median and the worst image.",
    "training_curve.png": "Loss and validation scores over the epochs.",
}
TEMPLATE = Path(__file__).with_name("model_card.md")
MEASURES = {
    "dice": "Dice",
    "iou": "IoU",
    "f_beta": "F-measure",
    "weighted_f_beta": "weighted F-measure",
    "e_measure": "E-measure",
    "s_measure": "S-measure",
    "mae": "mean absolute error",
}


def parse_score(key: str, regions: Sequence[str]) -> tuple[str, str, str | None] | None:
    """Split the key of a score into kind, measure and region; `None` if it is no score.

    `"mean_dice_WT"` gives `("mean", "dice", "WT")`, and `"dice"` gives `("", "dice", None)`. A single region is not
    told apart from the average over all.
    """
    for region in [None, *regions]:
        # "mean_dice" is the mean Dice even where a region is called "dice".
        match = re.fullmatch(r"(?:(mean|max|adaptive)_)?(\w+)", key.removesuffix(f"_{region}"))
        if match is not None and match[2] in MEASURES and (region is None or key.endswith(f"_{region}")):
            return None if region is not None and len(regions) == 1 else (match[1] or "", match[2], region)
    return None


def score_table(split: str, scores: Mapping[str, float], regions: Sequence[str]) -> dict[str, Any]:
    """Arrange the scores of a split with a row per measure and region, and a column per kind."""
    kinds = ["", "mean", "max", "adaptive"]
    rows: dict[str, list[str]] = {}
    for key, value in scores.items():
        if (found := parse_score(key, regions)) is not None:
            kind, measure, region = found
            row = rows.setdefault(MEASURES[measure] + (f", {region}" if region else ""), [""] * len(kinds))
            row[kinds.index(kind)] = f"{value:.3f}" if math.isfinite(value) else "undefined"
    return {"split": split, "rows": list(rows.items())}


def eval_results(info: Mapping[str, Any], regions: Sequence[str]) -> list[EvalResult]:
    """Return the scores of the test split, or of the validation split if there is no other, for the front matter."""
    dataset = info.get("dataset", {})
    results: list[EvalResult] = []
    if not dataset.get("name"):
        return results
    for split, scores in [*info.get("results", {}).items()][-1:]:
        for key, value in scores.items():
            if (found := parse_score(key, regions)) is None or not math.isfinite(value):
                continue
            kind, measure, region = found
            name = f"{kind} {MEASURES[measure]}".strip()
            results.append(
                EvalResult(
                    task_type="image-segmentation",
                    dataset_type=dataset.get("id") or re.sub(r"[^a-z0-9.-]+", "-", dataset["name"].lower()),
                    dataset_name=dataset["name"],
                    dataset_split=split,
                    metric_type=f"{kind}_{measure}" if kind else measure,
                    metric_name=name if region is None else f"{name}, {region}",
                    metric_value=value,
                )
            )
    return results


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
    """Write the card of a checkpoint from the files in its folder; what they do not tell stays out.

    Args:
        folder: Checkpoint folder, such as the output folder of a run: `config.json`, and if there are any
            `preprocessor_config.json`, `training_info.json`, `training_curve.png` and `predictions.png`. The last is
            shown only if the run says that its images may be shared.
        repo_id: Where on the Hub it will be.
        tags: Further tags.
        run: Folder of the run that made the checkpoint, if that is another one.

    Raises:
        FileNotFoundError: If there is no `config.json`.
    """
    folder = Path(folder)
    run = folder if run is None else Path(run)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no checkpoint: there is no config.json in it.")
    config = Sam2UNetConfig.from_pretrained(folder)
    info = json.loads((run / TRAINING_INFO).read_text()) if (run / TRAINING_INFO).is_file() else {}
    size = None
    if (folder / "preprocessor_config.json").is_file():
        processor = Sam2UNetImageProcessor.from_pretrained(folder)
        size = f"{processor.size['height']} x {processor.size['width']}" if processor.do_resize else None
    with torch.device("meta"):
        model = Sam2UNetForSemanticSegmentation(config)
    backbone = config.backbone_config.to_dict()
    preset = [name for name, values in PRESETS.items() if all(backbone[key] == values[key] for key in values)]
    regions = list(config.regions)
    title = info.get("model_name") or (repo_id or folder.resolve().name).split("/")[-1]
    encoder_source = None if is_local_source(config.encoder_source) else config.encoder_source
    finetuned_from = info.get("finetuned_from")
    dataset = info.get("dataset", {})
    results = eval_results(info, regions)
    pictures = [(name, text) for name, text in PICTURES.items() if (run / name).is_file()]
    if not info.get("share_predictions"):
        pictures = [(name, text) for name, text in pictures if name != "predictions.png"]
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        license=info.get("license"),
        language=info.get("language"),
        base_model=finetuned_from or encoder_source,
        datasets=[dataset["id"]] if dataset.get("id") else None,
        metrics=[measure for measure in MEASURES if any(result.metric_type == measure for result in results)] or None,
        tags=list(dict.fromkeys(["sam2-unet", "sam2", "hiera", "unet", *info.get("tags", []), *(tags or [])])),
        model_name=title if results else None,
        eval_results=results or None,
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
        size=size,
        regions=config.regions,
        id2label=config.id2label,
        data_rows=list(info.get("data", {}).items()),
        recipe=list(info.get("recipe", {}).items()),
        results=[score_table(split, scores, regions) for split, scores in info.get("results", {}).items()],
        zero_division=info.get("zero_division"),
        chosen="checkpoint" in info.get("recipe", {}),
        pictures=pictures,
        data_citation=dataset.get("citation"),
        license=info.get("license"),
    )
    return append_checksum(str(card))


def pictures_in_card(card: str) -> list[str]:
    """Return the pictures of a run that its card shows."""
    return [name for name in PICTURES if f"]({name})" in card]


def files_to_push(folder: str | os.PathLike) -> list[str]:
    """Return patterns of what goes to the Hub of a run's folder: checkpoint, card and the pictures in the card."""
    card = Path(folder) / "README.md"
    return [*CHECKPOINT_FILES, "README.md", *pictures_in_card(card.read_text() if card.is_file() else "")]


def have_equal_weights(folder: Path, other: Path) -> bool:
    """Whether two checkpoints agree in regions, in all that was trained, and in the encoder if both hold one."""
    try:
        configs = [json.loads((path / "config.json").read_text()) for path in (folder, other)]
        first, second = read_safetensors(folder), read_safetensors(other)
    except (OSError, ValueError):
        return False
    if configs[0]["regions"] != configs[1]["regions"]:
        return False
    for names in (first.keys() - second.keys(), second.keys() - first.keys()):
        if not all(map(is_pretrained_weight, names)):
            return False
    return all(torch.equal(first[name], second[name]) for name in first.keys() & second.keys())


def add_model_card(
    folder: str | os.PathLike,
    source: str,
    repo_id: str,
    revision: str | None = None,
    token: str | bool | None = None,
    tags: Sequence[str] | None = None,
) -> list[str]:
    """Put a card into a checkpoint folder that is about to be uploaded.

    It tells of the run in `source`, with its pictures, if the model is the one of that run. A card that somebody
    edited is kept: that of the run as it is, and that on the Hub by writing none.

    Args:
        folder: What will be uploaded.
        source: Where the model was loaded from.
        repo_id: Where it goes.
        revision: Branch it goes to.
        token: Token for the Hub.
        tags: Tags for the card.

    Returns:
        The pictures on the Hub that no card shows any more.
    """
    folder = Path(folder)
    run = Path(source) if source and have_equal_weights(folder, Path(source)) else None
    text = None
    if run is not None and (run / "README.md").is_file():
        text = (run / "README.md").read_text(encoding="utf-8")
    if text is None or has_valid_checksum(text):
        api = HfApi(token=token)
        if api.file_exists(repo_id, "README.md", revision=revision):
            there = Path(api.hf_hub_download(repo_id, "README.md", revision=revision)).read_text(encoding="utf-8")
            if not has_valid_checksum(there):
                return []
        text = render_model_card(folder, repo_id, tags, run)
    (folder / "README.md").write_text(text, encoding="utf-8")
    shown = [] if run is None else [name for name in pictures_in_card(text) if (run / name).is_file()]
    for name in shown:
        shutil.copyfile(Path(source) / name, folder / name)
    return [name for name in PICTURES if name not in shown]


def write_model_card(folder: str | os.PathLike, repo_id: str | None = None, tags: Sequence[str] | None = None) -> Path:
    """Write `README.md` of a checkpoint folder, see [`render_model_card`].

    A card that was written so before is replaced; one that somebody edited is an error.

    Args:
        folder: Checkpoint folder.
        repo_id: Where on the Hub it will be.
        tags: Further tags.

    Raises:
        FileExistsError: If there is a card that was edited.
        FileNotFoundError: If there is no `config.json`.
    """
    path = Path(folder) / "README.md"
    text = render_model_card(folder, repo_id, tags)
    if path.is_file() and not has_valid_checksum(path.read_text(encoding="utf-8")):
        raise FileExistsError(f"{path} was edited. Move it away to have a card written anew.")
    path.write_text(text, encoding="utf-8")
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: Arguments, those of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sam2unet_hf.hub", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    metric = commands.add_parser("metric", help="write one metric as a Space, ready to upload")
    metric.add_argument("name", help="such as dice or segmentation_report")
    metric.add_argument("folder", type=Path, help="empty or new folder")
    card = commands.add_parser("card", help="write the model card of a run anew")
    card.add_argument("folder", type=Path, help="output folder of the run")
    card.add_argument("--repo_id", help="where on the Hub it will be")
    args = parser.parse_args(argv)
    if args.command == "card":
        try:
            parser.exit(message=f"Wrote {write_model_card(args.folder, args.repo_id)}.\n")
        except (OSError, ValueError) as err:
            parser.error(str(err))
    try:
        files = write_metric_space(args.name, args.folder)
    except (FileExistsError, ValueError) as err:
        parser.error(str(err))
    names = ", ".join(file.name for file in files)
    parser.exit(
        message=f"Wrote {names} to {args.folder}. Upload them with\n"
        f"  hf upload YOUR_NAME/{args.name} {args.folder} --repo-type space\n"
    )


__all__ = ["render_model_card", "write_metric_space", "write_model_card"]


if __name__ == "__main__":
    main()
