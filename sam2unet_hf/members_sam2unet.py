"""Which checkpoints make an ensemble: the list of its members, and what they must have in common."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, cached_file

from .image_processing_sam2unet import Sam2UNetImageProcessor


# Beside the folders of the members, each a whole checkpoint: `{"members": ["fold_0", "fold_1"]}`.
ENSEMBLE_FILE = "ensemble.json"
# The name of a folder beside the file, which cannot lead elsewhere.
MEMBER_NAME = re.compile(r"\w([\w.-]*\w)?", re.ASCII)


def find_file(name: str | os.PathLike, file: str, **location: Any) -> str | None:
    """Return the path of a file of a folder or Hub repository, downloaded if need be; `None` where there is none."""
    try:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **location)
    except OSError:  # no such repository, of which loading tells
        return None


def find_ensemble(name: str | os.PathLike, **location: Any) -> str | None:
    """Return the path of the list of members of a folder or Hub repository; `None` of a single checkpoint.

    Args:
        name: Folder or Hub id.
        **location: Arguments of downloads, such as `token`, and `revision` and `subfolder`.

    Raises:
        FileNotFoundError: If there are folds in a folder, but no list of them.
        ValueError: If a folder holds a checkpoint beside the list, because it is not known which one is meant.
    """
    config = find_file(name, CONFIG_NAME, **location)
    is_local = Path(name).is_dir()
    if config is not None and not is_local:
        return None
    path = find_file(name, ENSEMBLE_FILE, **location)
    if path is None:
        folder = Path(name, location.get("subfolder") or "")
        folds = sorted((file.parent.name for file in folder.glob(f"fold_*/{CONFIG_NAME}")), key=lambda f: (len(f), f))
        if is_local and config is None and folds:
            raise FileNotFoundError(
                f"`{folder}` holds {', '.join(folds)} but no {ENSEMBLE_FILE}, which lists the folds once all of them "
                "are trained. Finish the run, name the folder of one fold, or write that file yourself: "
                f"{json.dumps({'members': folds})}."
            )
        return None
    if config is not None:
        raise ValueError(
            f"`{name}` holds a single checkpoint ({CONFIG_NAME}) and an ensemble ({ENSEMBLE_FILE}). Move one of them "
            "into a folder of its own."
        )
    return path


def read_members(path: str | os.PathLike) -> list[str]:
    """Return the folders of the members that a file lists, which lie beside it.

    Raises:
        ValueError: If it does not list distinct names of folders.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as err:
        raise ValueError(f"`{path}` is no JSON file ({err}). Write it anew.") from err
    members = content.get("members") if isinstance(content, Mapping) else None
    is_list = isinstance(members, list) and all(
        isinstance(name, str) and MEMBER_NAME.fullmatch(name) for name in members
    )
    if not members or not is_list or len(set(members)) < len(members):
        raise ValueError(
            f'`{path}` must list the folders beside it, each once, such as {{"members": ["fold_0", "fold_1"]}}, '
            f"got {content!r:.200}."
        )
    return members


def check_alike(names: Sequence[str], configs: Sequence[Any], processors: Sequence[Sam2UNetImageProcessor]) -> None:
    """Check that models segment the same regions of the same images, so that their probabilities can be averaged.

    Raises:
        ValueError: If one of them differs from the first.
    """
    facts = [
        {
            "regions": dict(config.regions),
            "modalities": processor.modalities,
            "neighbours": processor.neighbours,
            "plane": processor.plane or "axial",
            "num_channels": config.backbone_config.num_channels,
        }
        for config, processor in zip(configs, processors, strict=True)
    ]
    for name, own in zip(names, facts, strict=True):
        for fact, value in own.items():
            first = facts[0][fact]
            # Regions in another order are other channels.
            if value != first or (fact == "regions" and list(value) != list(first)):
                raise ValueError(
                    f"The members of an ensemble must have the same `{fact}`, got {first} in {names[0]} and {value} "
                    f"in {name}. Leave one of them out, or train it anew."
                )


__all__ = ["ENSEMBLE_FILE"]
