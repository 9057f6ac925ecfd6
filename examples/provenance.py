"""The record of a run beside its checkpoints: arguments, versions, commit and data."""

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
from data_checks import file_bytes, image_columns
from transformers import TrainingArguments

from sam2unet_hf.training import ParquetRows


RECORD = "run.json"


def run_record(
    arguments: dict[str, Any], args: TrainingArguments, data: Mapping[str, datasets.Dataset | ParquetRows]
) -> dict[str, Any]:
    """Return what is needed to repeat a run.

    Args:
        arguments: Arguments that must stay the same when the run is resumed.
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
    """Return the commit of the checkout that holds this script, and whether tracked files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        # No argument comes from outside, and no shell reads them.
        found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)  # nosec B603
        return found.stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return {}  # there is no git, or no checkout


def fingerprint(rows: datasets.Dataset | ParquetRows) -> str:
    """Return the SHA-256 of the rows, which is the same on every machine.

    Images count by the bytes of their files. Streamed rows count by the footers of theirs, because reading all of them
    would take too long.
    """
    if isinstance(rows, ParquetRows):
        return rows.fingerprint()
    digest = hashlib.sha256(repr(sorted(rows.column_names)).encode())
    images = image_columns(rows)
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
    """Return by name the values of `before` that differ now; `None` for names that are new."""
    # `before` was read from JSON, which has lists for tuples.
    now = json.loads(json.dumps(now))
    return {name: before.get(name) for name in sorted({*before, *now}) if before.get(name) != now.get(name)}


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of the run in a folder, if there is one."""
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_json(path: Path, content: Any, sort_keys: bool = True) -> None:
    """Write a JSON file in one step, so that an error leaves the old one; make its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=sort_keys) + "\n", encoding="utf-8")
    os.replace(partial, path)
