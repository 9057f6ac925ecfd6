"""What the commands that segment have in common: a model that is forgotten, and the folder that they write to."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn


class ModelParser(argparse.ArgumentParser):
    """A parser of `MODEL INPUT...`, which says what was taken for the model where only one of them is given.

    Args:
        inputs: Name of the positional argument after `model`, such as `"case"`.
        **kwargs: Arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, inputs: str, **kwargs: Any):
        super().__init__(**kwargs)
        self.inputs = inputs
        self.found = argparse.Namespace()

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse as `argparse` does, and keep what was found up to an error."""
        self.found = argparse.Namespace() if namespace is None else namespace
        return super().parse_known_args(args, self.found)

    def error(self, message: str) -> NoReturn:
        """End the command with this message, or a better one."""
        model = getattr(self.found, "model", None)
        if model is not None and message.startswith(f"the following arguments are required: {self.inputs}"):
            message = (
                f"{model} was taken for the model, and no {self.inputs} is named: {self.prog} MODEL "
                f"{self.inputs.upper()} -o OUT"
            )
        super().error(message)


def make_output_dir(folder: Path, option: str = "--output_dir") -> None:
    """Make a folder, and check before the work that it can be written to; end the command if not.

    Args:
        folder: The folder, which may be there.
        option: Which option names it.
    """
    if folder.exists() and not folder.is_dir():
        raise SystemExit(f"{option} {folder} is a file. Name a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise SystemExit(f"{option} {folder} cannot be made: {err.strerror}. Name another folder.") from err
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as err:
        raise SystemExit(f"{option} {folder} cannot be written to: {err.strerror}. Name another folder.") from err
