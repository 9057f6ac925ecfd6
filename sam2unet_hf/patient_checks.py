"""What is suspicious in the scores of patients: known patients, results that cannot be, other contrasts."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from .cases_sam2unet import patient_of
from .members_sam2unet import ENSEMBLE_FILE, read_members


# Beside the weights of a run: the patients of each of its splits. It names patients, so it never goes to the Hub.
SPLITS_FILE = "splits.json"
EARLIER = "earlier"  # key of those that the model was trained on before the run
# Of a head. The largest tumours of BraTS fill a fifth.
LARGEST_SHARE = 1 / 3


def read_splits(model: str | os.PathLike | None) -> dict[str, list[str]]:
    """Return the patients of each split of the run that trained a model; nothing where they are not known.

    Args:
        model: Folder of a run, of a checkpoint in it, or of an ensemble, which knows the patients of all members;
            anything else knows none.

    Raises:
        ValueError: If a file is damaged.
    """
    if model is None or not Path(model).is_dir():
        return {}
    folder = Path(model).resolve()
    # The file of a checkpoint lies in the folder above it.
    if folder.name.startswith("checkpoint-") and not (folder / SPLITS_FILE).is_file():
        folder = folder.parent
    path = folder / SPLITS_FILE
    if not path.is_file() and (folder / ENSEMBLE_FILE).is_file():
        known: dict[str, list[str]] = {}
        for member in read_members(folder / ENSEMBLE_FILE):
            for split, patients in read_splits(folder / member).items():
                known[split] = sorted({*known.get(split, ()), *patients})
        return known
    if not path.is_file():
        return {}
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))
        return {str(split): list(map(str, patients)) for split, patients in splits.items()}
    except (AttributeError, TypeError, UnicodeDecodeError, ValueError) as err:
        raise ValueError(
            f"`{path}` cannot be read as the patients of each split ({err}). Put back what the run wrote, or remove "
            "it, if patients that the model was trained on need not be told apart."
        ) from err


def describe_known_patients(splits: Mapping[str, Sequence[str]], case_ids: Iterable[str]) -> str | None:
    """Say which cases are of patients that a model was trained on or chosen by, if there are any."""
    cases = list(dict.fromkeys(case_ids))
    for names, fault in ((("train", EARLIER), "was trained on"), (("validation",), "was chosen by")):
        known = {patient for name in names for patient in splits.get(name, ())}
        if found := [case for case in cases if patient_of(case) in known]:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            return (
                f"The model {fault} {len(found)} of the {len(cases)} patients that are scored: {', '.join(found[:5])}"
                f"{more}. Their scores are too good; score others."
            )
    return None


def why_implausible(label_map: np.ndarray, head_voxels: float) -> str | None:
    """Say why a segmentation is hardly believable, if it is.

    Args:
        label_map: Predicted label ids of a whole head, of any shape; 0 is the background.
        head_voxels: Size of the head.
    """
    found = np.count_nonzero(label_map)
    if not found:
        return "nothing was found at all. Look at the scan: is it of another contrast, or turned?"
    if found > LARGEST_SHARE * head_voxels:
        return (
            f"{found / max(head_voxels, 1):.0%} of the head was taken for tumour, more than a third. Look at the "
            "scan: is it of another contrast than those of the training, or not skull-stripped?"
        )
    return None


def describe_other_modalities(trained: Sequence[str] | None, given: Sequence[str]) -> str | None:
    """Say that a model sees other contrasts than those it was trained on, or in another order, if it does."""
    if not trained or list(trained) == list(given):
        return None
    return f"The model was trained on {', '.join(trained)}, and is to segment {', '.join(given)}."


__all__ = ["SPLITS_FILE", "read_splits"]
