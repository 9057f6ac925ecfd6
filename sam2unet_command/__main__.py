"""`sam2unet COMMAND ...`: the commands of this package, each of which is imported when it is called."""

import difflib
import importlib
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import NamedTuple


class Command(NamedTuple):
    """A command.

    Args:
        function: What runs it, `module:name`, called with its arguments and what its usage calls it.
        summary: What it does, in a line.
        prefix: Arguments before those of the user.
    """

    function: str
    summary: str
    prefix: tuple[str, ...] = ()


# In the order in which a user needs them.
COMMANDS = {
    "phantom": Command("dataset_scripts.phantom.__main__:main", "write scans of made-up patients, to try all this on"),
    "build": Command(
        "dataset_scripts.brats_slices.__main__:main", "cut BraTS scans into a data set of slices, which train can read"
    ),
    "train": Command(
        "sam2unet_hf.finetuning.run_segmentation:run_command",
        "fine-tune on scans, on images and masks, or on the phantom; score, and cross-validate",
    ),
    "segment": Command("sam2unet_hf.volume:main", "segment patients' scans, with volumes in ml"),
    "score": Command("sam2unet_hf.volume:score", "segment patients' scans and score them against their masks"),
    "pictures": Command("sam2unet_hf.pictures:main", "segment pictures, such as photographs or single slices"),
    "metrics": Command("sam2unet_hf.metrics.__main__:main", "score a folder of predicted pictures against masks"),
    "info": Command("sam2unet_command.info:main", "say what a model segments, of what, and how it scored"),
    "card": Command("sam2unet_hf.hub:main", "write the model card of a run or an ensemble anew", ("card",)),
    "convert": Command("sam2unet_hf.conversion:main", "make a model of a reference checkpoint or a SAM 2 encoder"),
    "export": Command("sam2unet_hf.export.__main__:main", "write a model as ONNX"),
}
# What other tools call them.
OTHER_NAMES = {"finetune": "train", "fit": "train", "predict": "segment", "eval": "score", "evaluate": "score"}


def describe_commands() -> str:
    """Return the help."""
    lines = [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sam2unet COMMAND ...",
            "",
            "SAM2-UNet: train it, segment with it, score and share it. For research, not for diagnosis.",
            "",
            *lines,
            "",
            "sam2unet COMMAND --help lists the options of a command. A first try, in about ten minutes:",
            "  sam2unet train                          # on the phantom, into runs/phantom",
            "  sam2unet phantom --output_dir phantom   # the same scans as files",
            "  sam2unet score runs/phantom phantom/Phantom_001 -o segmentations   # a test patient of that run",
            "  sam2unet info runs/phantom",
            "",
        ]
    )


def why_unknown(name: str) -> str:
    """Say that there is no such command, and which one was perhaps meant."""
    known = OTHER_NAMES.get(name.lower())
    near = [known] if known else difflib.get_close_matches(name.lower(), COMMANDS, n=1)
    meant = f" Did you mean `sam2unet {near[0]}`?" if near else ""
    return f"sam2unet: there is no command {name}.{meant} `sam2unet` lists the commands."


def requirements_like(package: str) -> list[str]:
    """Return the requirements of the extra that a package belongs to, as `pip install` takes them."""
    if not package:
        return []
    try:
        lines = metadata.requires("sam2unet-hf") or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return []
    extras: dict[str, list[str]] = {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        if found := re.search(r"extra == ['\"]([\w-]+)", marker):
            extras.setdefault(found[1], []).append(requirement.strip())
    for own in extras.values():
        if any(re.match(rf"{re.escape(package)}\b(?!-)", requirement) for requirement in own):
            return own
    return []


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    argv = sys.argv[1:] if argv is None else argv
    name, arguments = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in ("-h", "--help", "help"):
        sys.stdout.write(describe_commands())
        return
    if name == "--version":
        sys.stdout.write(f"sam2unet {metadata.version('sam2unet-hf')}\n")
        return
    if name not in COMMANDS:
        sys.stderr.write(f"{why_unknown(name)}\n")
        raise SystemExit(2)
    command = COMMANDS[name]
    module, function = command.function.split(":")
    try:
        run = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as err:
        missing = (err.name or "").split(".")[0]
        if not (needed := requirements_like(missing)):
            raise
        packages = " ".join(f'"{requirement}"' for requirement in needed)
        raise SystemExit(f"sam2unet {name} needs {missing}, not installed. Run: pip install {packages}") from err
    # A command with a prefix has the rest of its name from there.
    run([*command.prefix, *arguments], prog="sam2unet" if command.prefix else f"sam2unet {name}")


if __name__ == "__main__":
    main()
