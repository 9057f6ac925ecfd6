"""The help of `run_segmentation.py` shows the options of most runs on a screen, with the defaults that hold."""

import dataclasses
import re

import pytest

from sam2unet_hf.finetuning.arguments import ARGUMENTS
from sam2unet_hf.finetuning.option_help import GROUPS
from sam2unet_hf.finetuning.parsing import parse_arguments
from sam2unet_hf.finetuning.recipes import PHANTOM, RECIPES


def read_help(capsys, *argv):
    """Return what is printed, and the help of each option on a line of its own."""
    with pytest.raises(SystemExit) as end:
        parse_arguments(list(argv))
    assert end.value.code == 0
    printed = capsys.readouterr().out
    texts = [text.partition("\n\n")[0].split() for text in re.split(r"\n  --", printed)[1:]]
    return printed, {name: " ".join(words) for name, *words in texts}


def test_help_shows_the_defaults_of_the_command_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    printed, options = read_help(capsys, "--help")
    assert printed.count("\n") <= 45
    assert max(map(len, printed.splitlines())) <= 120
    assert list(options) == [name for usual, _ in GROUPS.values() for name in usual.split()]
    assert [line[:-1] for line in printed.splitlines() if line.endswith(":") and line[0] != " "] == list(GROUPS)
    assert options["output_dir"].endswith("Default: runs/phantom.")
    assert options["learning_rate"].endswith(f"Default: {PHANTOM['learning_rate']}.")
    assert options["recipe"].startswith("paper|volume")
    assert "Default: volume." in options["recipe"]
    assert "None" not in printed
    _, options = read_help(capsys, "-h", "--brats_dir", "BraTS2020", "--learning_rate", "3")
    assert options["output_dir"].endswith("Default: runs/BraTS2020.")
    assert options["learning_rate"].endswith(f"Default: {RECIPES['volume']['learning_rate']}.")
    _, options = read_help(capsys, "--dataset_name", "photographs", "--help")
    assert options["recipe"].endswith("none for --dataset_name.")


@pytest.mark.parametrize("option", ["--help-all", "--help_all"])
def test_all_options_are_there_to_be_found(capsys, option):
    printed, options = read_help(capsys, option)
    fields = [field.name for kind in ARGUMENTS for field in dataclasses.fields(kind) if field.init]
    assert sorted(options) == sorted(fields)
    assert "--help-all" not in printed


def test_abbreviations_are_refused(capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(["--num_train", "3"])
    assert end.value.code == 2
    assert "there is no option --num_train, perhaps --num_train_epochs" in capsys.readouterr().err
