"""What a run was made of: arguments, versions, commit and data, kept beside its checkpoints."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
from data_sources import file_bytes
from transformers import TrainingArguments

from sam2unet_hf.training.streaming import ParquetRows


RECORD = "run.json"


def run_record(
    arguments: dict[str, Any], args: TrainingArguments, data: Mapping[str, datasets.Dataset | ParquetRows]
) -> dict[str, Any]:
    """Return what repeats a run.

    Args:
        arguments: Those that a run must keep when it goes on.
        args: All arguments of the training; tokens are left out.
        data: Splits of the data set.
    """
    return {
        "command": ["<token>" if args.hub_token and args.hub_token in word else word for word in sys.argv],
        "arguments": arguments,
        "training_arguments": {
            name: value for name, value in args.to_dict().items() if not name.endswith("_token") and value is not None
        },
        "processes": args.world_size,
        "data": {split: fingerprint(rows) for split, rows in data.items()},
        "versions": {"python": platform.python_version(), **versions()},
        "git": commit(),
        "platform": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Return the version of every installed package, as `pip freeze` lists them."""
    found = {dist.metadata["Name"]: dist.version for dist in metadata.distributions() if dist.metadata["Name"]}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def commit() -> dict[str, str | bool]:
    """Return the commit of the checkout that this script is in, and whether files of it were changed since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        # The words are our own, and there is no shell.
        found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)  # nosec B603
        return found.stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return {}  # installed without git, or copied


def fingerprint(rows: datasets.Dataset | ParquetRows) -> str:
    """Return the SHA-256 of what the rows hold, images as the bytes of their files; the same on every machine.

    Of rows that are streamed it is that of the footers of their files.
    """
    if isinstance(rows, ParquetRows):
        return rows.fingerprint()
    digest = hashlib.sha256(repr(sorted(rows.column_names)).encode())
    images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    for name in images:
        rows = rows.cast_column(name, datasets.Image(decode=False))
    for row in rows:
        for name in sorted(row):
            value = row[name]
            if name in images and value is not None:
                value = hashlib.sha256(file_bytes(value, name)).hexdigest()
            digest.update(repr(value).encode())
    return digest.hexdigest()


def changed_values(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the values that `before` has and `now` has not, by name."""
    # As JSON has them, where tuples are lists.
    now = json.loads(json.dumps(now))
    return {name: before.get(name) for name in sorted({*before, *now}) if before.get(name) != now.get(name)}


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a run, if there is one."""
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_json(path: Path, content: dict[str, Any], sort_keys: bool = True) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=sort_keys) + "\n", encoding="utf-8")
    os.replace(partial, path)
