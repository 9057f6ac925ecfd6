"""Help of `run_segmentation.py`: `--help` lists the options of most runs, on a screen, `--help-all` all of them."""

import dataclasses
import shutil
import textwrap
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import TrainingArguments


HELP = ("-h", "--help")
HELP_ALL = ("--help-all", "--help_all")

# What `--help` lists, and what `--help-all` adds, besides options of none of these groups.
GROUPS = {
    "Data": (
        "brats_dir dataset_name modalities regions folds",
        "test_dir test_split labels group_by fold num_proc skip_bad_cases streaming",
    ),
    "Model": ("sam2_checkpoint model_name_or_path preset", "freeze_encoder"),
    "Recipe, and what it sets unless given": (
        "recipe slices num_train_epochs per_device_train_batch_size learning_rate",
        "augmentation neighbours head_crop_size foreground_share image_size iou_over_batch ema_decay "
        "per_device_eval_batch_size weight_decay warmup_steps bf16 metric_for_best_model",
    ),
    "Training": (
        "do_train",
        "use_cpu max_steps gradient_accumulation_steps activation_checkpointing dataloader_num_workers "
        "torch_compile seed",
    ),
    "Output": (
        "output_dir overwrite_output_dir do_predict",
        "resume_from_checkpoint save_total_limit trainable_only report_to",
    ),
    "Hub": ("push_to_hub", "hub_model_id hub_private_repo license share_predictions"),
}
INDENT = 34
TRANSFORMERS = {field.name for field in dataclasses.fields(TrainingArguments)}


def wants_help(argv: Sequence[str]) -> bool | None:
    """Return whether a command line asks for all options, or `None` if for no help."""
    has_all = any(word in HELP_ALL for word in argv)
    return has_all if has_all or any(word in HELP for word in argv) else None


def describe_options(parser: ArgumentParser, arguments: Sequence[type[Any]], has_all: bool) -> str:
    """Return the help.

    Args:
        parser: Has the defaults that hold.
        arguments: The dataclasses of its options.
        has_all: Whether to list all of them.
    """
    fields = {field.name: field for kind in arguments for field in dataclasses.fields(kind) if field.init}
    groups = {title: [*usual.split(), *(rare.split() if has_all else ())] for title, (usual, rare) in GROUPS.items()}
    if has_all:
        listed = {name for names in groups.values() for name in names}
        groups["Further options"] = [name for name in fields if name not in listed]
    lines = [line for title, names in groups.items() for line in _describe_group(parser, title, names, fields)]
    lines += ["", "Defaults are those of this command line. --OPTION false turns off what is true."]
    if not has_all:
        lines.append("--help-all lists the other options, those of transformers' TrainingArguments among them.")
    return "\n".join(lines).lstrip()


def _describe_group(
    parser: ArgumentParser, title: str, names: Sequence[str], fields: dict[str, dataclasses.Field]
) -> Iterator[str]:
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    yield f"\n{title}:"
    for name in names:
        text = _describe_field(fields[name], parser.get_default(name))
        column = f"  --{name}{_placeholder(fields[name])}"
        if len(column) >= INDENT:
            yield column
            column = ""
        paragraph = textwrap.wrap(text, max(width - INDENT, 30), break_on_hyphens=False) or [""]
        yield column.ljust(INDENT) + paragraph[0]
        yield from (" " * INDENT + line for line in paragraph[1:])


def _placeholder(field: dataclasses.Field) -> str:
    """Return how the value of an option is written."""
    kind = str(field.type)
    if "bool" in kind and "str" not in kind:
        return ""
    choices = field.metadata.get("choices") or ()
    word = "NAME" if choices else "N" if "int" in kind else "X" if "float" in kind else "VALUE"
    if "list" in kind:
        return f" {word} ..."
    return f" {'|'.join(map(str, choices))}" if 0 < len(choices) < 5 else f" {word}"


def _describe_field(field: dataclasses.Field, default: Any) -> str:
    """Return the help of an option, with its default."""
    text = " ".join(str(field.metadata.get("help") or "").split())
    if field.name in TRANSFORMERS:  # a paragraph
        text = text.split(". ")[0].rstrip(".") + "."
    if default in (None, False, "", [], {}) or default is dataclasses.MISSING:
        return text
    value = " ".join(map(str, default)) if isinstance(default, list) else getattr(default, "value", default)
    value = str(value).lower() if isinstance(value, bool) else value
    return f"{text.split('Default:')[0].rstrip()} Default: {value}."
