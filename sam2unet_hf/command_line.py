"""What the commands that segment have in common: rare options, a model that is forgotten, and the output folder."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn


class HelpAll(argparse.Action):
    """Print the help with the rare options of a [`CommandParser`], and end the command."""

    def __call__(self, parser: Any, *args: Any, **kwargs: Any):
        """Show the rare options in the help that is printed."""
        for action, text in parser.rare:
            action.help = text
        parser.print_help()
        parser.exit()


class CommandParser(argparse.ArgumentParser):
    """A parser whose `--help` leaves out the rare options, so that it fits a screen. `--help-all` lists them.

    Args:
        **kwargs: Arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.rare: list[tuple[argparse.Action, str]] = []

    def add_rare_argument(self, *names: str, help: str, **kwargs: Any) -> None:
        """Add an option that `--help-all` alone lists; the arguments are those of `add_argument`."""
        if not self.rare:
            self.add_argument("--help-all", action=HelpAll, nargs=0, help="list the rarer options, too, and exit")
        self.rare.append((self.add_argument(*names, help=argparse.SUPPRESS, **kwargs), help))


class ModelParser(CommandParser):
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
