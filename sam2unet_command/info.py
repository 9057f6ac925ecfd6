"""What a model segments, of what, and how it scored, read from the files beside its weights without PyTorch."""

import argparse
import ast
import difflib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any


CONFIG, PROCESSOR, ENSEMBLE, CLEAN_UP = "config.json", "preprocessor_config.json", "ensemble.json", "clean_up.json"
RESULTS, FOLDS = "all_results.json", "folds.json"  # written last, and first
# A file of the model -> its path, or `None` where there is none.
Finder = Callable[[str], Path | None]


def make_finder(model: str) -> Finder:
    """Return what finds the files of a folder, or of a model of the Hub that is in the cache."""
    if Path(model).is_dir():
        return lambda file: path if (path := Path(model, file)).is_file() else None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return lambda file: None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    def find(file: str) -> Path | None:
        try:
            path = try_to_load_from_cache(model, file)
        except HFValidationError:  # a mistyped path, such as `../runs`
            return None
        return Path(path) if isinstance(path, str) else None

    return find


def read_json(find: Finder, file: str) -> dict[str, Any]:
    """Return the content of a file, nothing where there is none."""
    path = find(file)
    try:
        content = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise ValueError(f"{path} cannot be read: {err}. Write or download it again.") from err
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {content!r:.80}. Write or download it again.")
    return content


def find_preset(backbone: Mapping[str, Any]) -> str | None:
    """Return which of SAM 2's sizes an encoder has, `None` if none of them."""
    spec = find_spec("sam2unet_hf")  # which does not import it
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    tables = {}
    for node in ast.parse((folder / "configuration_sam2unet.py").read_text(encoding="utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id in ("PRESET_FIELDS", "PRESET_ROWS"):
            tables[target.id] = ast.literal_eval(node.value)  # type: ignore[attr-defined]
    for name, row in tables["PRESET_ROWS"].items():
        if all(backbone.get(field) == value for field, value in zip(tables["PRESET_FIELDS"], row, strict=True)):
            return name
    return None


def read_card_scores(find: Finder) -> dict[str, float]:
    """Return the scores in the header of a model card, as `<split>_<metric>`, or `<split>_<metric>_<region>`."""
    if (path := find("README.md")) is None:
        return {}
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        results = ModelCard.load(path).data.eval_results or []
    except (TypeError, ValueError, YAMLError) as err:
        reason = " ".join(str(err).split())
        raise ValueError(f"{path} has a damaged header: {reason}. Write it anew by `sam2unet card`.") from err
    scores = {}
    for result in results:
        region = (result.metric_name or "").partition(", ")[2]
        scores["_".join(filter(None, (result.dataset_split, result.metric_type, region)))] = result.metric_value
    return scores


def describe_model(model: str) -> dict[str, Any]:
    """Return the facts of a model or an ensemble.

    Args:
        model: Folder, or id of a model of the Hub that was downloaded before.

    Returns:
        `model`; `members`, of an ensemble; `preset`, the size of the encoder; `regions`, name -> label ids; `input`,
        with the channels of an image, modalities, neighbouring slices, plane and what becomes of the size; `recipe`;
        `data`; `scores`, as `all_results.json` or else the card has them; `clean_up`, region -> rules. What is not
        known is `None` or empty.

    Raises:
        FileNotFoundError: If there is no model.
        ValueError: If a file is damaged, or of another model.
    """
    find = make_finder(model)
    members = read_json(find, ENSEMBLE).get("members", []) if find(CONFIG) is None else []
    part = f"{members[0]}/" if members else ""
    config = read_json(find, f"{part}{CONFIG}")
    if not config:
        raise FileNotFoundError(why_missing(model))
    if config.get("model_type") != "sam2unet":
        raise ValueError(f"{model} holds a model of type {config.get('model_type')!r}, not a SAM2-UNet. Name another.")
    if (backbone := config.get("backbone_config")) is None or (regions := config.get("regions")) is None:
        raise ValueError(f"{find(part + CONFIG)} lacks `backbone_config` or `regions`. Write or download it again.")
    processor, record = read_json(find, f"{part}{PROCESSOR}"), read_json(find, f"{part}run.json")
    options = record.get("arguments", {})
    size = {name: processor.get(name) for name in ("head_crop_size", "head_crop_scale")}
    if not size["head_crop_size"]:
        size = {"size": processor.get("size") if processor.get("do_resize", True) else None}
    return {
        "model": model,
        "members": members,
        "preset": find_preset(backbone),
        "regions": dict(regions),
        "input": {
            "channels": backbone.get("num_channels", 3),
            **{name: processor.get(name) for name in ("modalities", "neighbours", "plane")},
            **size,
        },
        "recipe": options.get("recipe"),
        "data": (options.get("dataset_name") or options.get("brats_dir") or "phantom") if options else None,
        "scores": read_json(find, RESULTS) or read_card_scores(find),
        "clean_up": read_json(find, CLEAN_UP).get("regions", {}),
    }


def why_missing(model: str) -> str:
    """Say why there is no model of this name."""
    path = Path(model)
    if (path / FOLDS).is_file() and not (path / ENSEMBLE).is_file():
        return f"The cross-validation in {model} has not ended. The command that began it goes on."
    if any(path.glob("checkpoint-*/")) and not (path / RESULTS).is_file():
        return f"The training in {model} has not ended. The command that began it goes on from its last checkpoint."
    if path.is_dir():
        return f"{model} holds no model: there is neither {CONFIG} nor {ENSEMBLE} in it. Name the folder of a run."
    siblings = [other.name for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    meant = f" Did you mean {path.with_name(near[0])}?" if near else ""
    return (
        f"There is no folder {model}, and no model of this name that was downloaded from the Hub.{meant} "
        "`hf download ID` downloads one."
    )


def as_text(facts: Mapping[str, Any]) -> str:
    """Return the facts for a reader, a line each."""
    given, lines = facts["input"], []
    if facts["members"]:
        lines.append(("members", ", ".join(facts["members"])))
    lines.append(("encoder", f"SAM 2's, {facts['preset']}" if facts["preset"] else "of a size of its own"))
    regions = [f"{name} = {', '.join(map(str, ids))}" for name, ids in facts["regions"].items()]
    lines.append(("regions", "; ".join(regions) + " (label ids)"))
    parts = [f"{given['channels']} channels", ", ".join(given["modalities"] or [])]
    if count := given["neighbours"]:
        parts.append(f"{count} {'slice' if count == 1 else 'slices'} below and above")
    parts.append(f"{given['plane']} slices" if given["plane"] else "")
    for name, what in (("head_crop_size", "window about the head"), ("size", "resized to")):
        if size := given.get(name):
            parts.append(f"{what} {size['height']} x {size['width']}")
    lines.append(("input", "; ".join(filter(None, parts))))
    lines.append(("recipe", facts["recipe"] or "unknown"))
    lines.append(("data", facts["data"] or "unknown"))
    rules = [
        f"{name}: {', '.join(f'{rule} {value:g}' for rule, value in own.items() if value is not None)}"
        for name, own in facts["clean_up"].items()
    ]
    lines.append(("clean-up", "; ".join(rules) or "none"))
    shown = {name: value for name, value in facts["scores"].items() if re.search(r"(^|_)(dice|iou)(_|$)", name)}
    shown = {name: value for name, value in shown.items() if not re.search(r"_(max|mean|adaptive)_", name)}
    if len(facts["regions"]) == 1:  # whose scores are the means
        shown = {name: value for name, value in shown.items() if not name.endswith(f"_{[*facts['regions']][0]}")}
    scores = [f"{name} {value:.3f}" for name, value in shown.items() if value is not None]
    lines += [("scores" if index == 0 else "", score) for index, score in enumerate(scores or ["unknown"])]
    return "\n".join([facts["model"], *(f"  {name:<10}{text}" for name, text in lines)])


def main(argv: Sequence[str] | None = None, prog: str = "sam2unet info") -> None:
    """Print the facts of a model."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Say what a model segments, of what, how it was trained and how it scored."
    )
    parser.add_argument("model", help="folder of a model, a run or an ensemble, or Hub id of one that is in the cache")
    parser.add_argument("--json", action="store_true", help="print all facts and scores as JSON")
    args = parser.parse_args(argv)
    try:
        facts = describe_model(args.model)
    except (OSError, ValueError) as err:
        raise SystemExit(str(err)) from err
    sys.stdout.write((json.dumps(facts, indent=2) if args.json else as_text(facts)) + "\n")
