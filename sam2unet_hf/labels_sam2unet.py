"""What the labels in a mask mean: a numbering per challenge, and which of them a mask has.

Label ids here: 0 background; 1 necrotic and non-enhancing core (NCR, NET, NETC); 2 oedema (ED, SNFH); 3 enhancing
tumour (ET); 4 what only some challenges have, the resection cavity (RC) of treated tumours, which is no tumour, or the
cysts (CC) of children's, which are.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .head_sam2unet import bounding_box, memory_order
from .nifti_sam2unet import ScanError


METRICS_2023 = (
    "https://github.com/rachitsaluja/BraTS-2023-Metrics/blob/0e272e697a193474ed75cef99cf2de110cc52d37/eval.py"
)
METRICS_2024 = "https://github.com/rachitsaluja/BraTS-2024-Metrics/blob"


@dataclass(frozen=True)
class Numbering:
    """The labels of a challenge.

    Args:
        ids: Our id of each label of the file.
        meaning: What the labels stand for, for messages.
        source: Where this is written down: the code by which the challenge scores, or its paper.
    """

    ids: dict[int, int]
    meaning: str
    source: str


_THREE = {1: 1, 2: 2, 3: 3}
_OF_THREE = "1 is NCR/NET, 2 ED and 3 ET"
_WITH_CAVITY = "1 is NETC, 2 SNFH, 3 ET and 4 the resection cavity"

# What the regions of BraTS are called in words.
REGION_TITLES = {"WT": "whole tumour", "TC": "tumour core", "ET": "enhancing tumour"}

# By the names that `labels` takes: the task, and the year from which on it has these labels.
NUMBERINGS: dict[str, Numbering] = {
    "gli2017": Numbering({1: 1, 2: 2, 4: 3}, "1 is NCR/NET, 2 ED and 4 ET", "https://arxiv.org/abs/2107.02314"),
    "gli2023": Numbering(_THREE, _OF_THREE, METRICS_2023),
    "gli2024": Numbering(
        {**_THREE, 4: 4}, _WITH_CAVITY, f"{METRICS_2024}/0ee58554a6726589f60c2c35f66e658c406a57cb/metrics_GLI.py"
    ),
    "ssa2023": Numbering(_THREE, _OF_THREE, METRICS_2023),
    "men2023": Numbering(_THREE, _OF_THREE, METRICS_2023),
    "met2023": Numbering(_THREE, _OF_THREE, METRICS_2023),
    "met2025": Numbering({**_THREE, 4: 4}, _WITH_CAVITY, "https://arxiv.org/abs/2504.12527"),
    "ped2023": Numbering(_THREE, _OF_THREE, METRICS_2023),
    "ped2024": Numbering(
        {1: 3, 2: 1, 3: 4, 4: 2},
        "1 is ET, 2 NET, 3 the cysts and 4 ED",
        f"{METRICS_2024}/7fa0b9ef5a2c96a1839d55c18a73b898ad57f9e9/metrics_PED.py",
    ),
    "decathlon": Numbering({1: 2, 2: 1, 3: 3}, "1 is ED, 2 NCR/NET and 3 ET", "http://medicaldecathlon.com"),
}

_TASK = re.compile(r"BraTS-(GLI|PED|MEN|MET|SSA)-.*?(?:-(\d{3}))?\Z", re.IGNORECASE | re.DOTALL)
_YEAR = re.compile(r"(?<!\d)20\d\d(?!\d)")
_TREATED = 100  # timepoints of BraTS-GLI from here on are of treated tumours, first published in 2024


class NumberingError(ScanError):
    """A mask whose labels may mean different things, or are those of another numbering than its name promises.

    It concerns all cases of a cohort, for the others would be read wrong without a word.
    """


def numberings_of(case_id: str, new_ending: bool, folders: Iterable[str] = ()) -> tuple[str, ...]:
    """Return which of `NUMBERINGS` a mask may have, by its names.

    Args:
        case_id: The name of the case, `"BraTS-GLI-00000-000"` for example.
        new_ending: The mask ends in `-seg`, as from 2023 on, not in `_seg`.
        folders: Names of the folders above the case, from the nearest on. One that names the task tells the year, as
            `BraTS-PEDs2024_Training` does.
    """
    match = _TASK.match(case_id)
    if not match:
        return ("gli2023",) if new_ending else ("gli2017",)
    task, timepoint = match[1].lower(), match[2]
    if task == "gli" and timepoint and int(timepoint) >= _TREATED:
        return ("gli2024",)
    names_task = re.compile(rf"(?<![a-z]){task}s?(?![a-z])", re.IGNORECASE)
    years = [int(year) for folder in folders if names_task.search(folder) for year in _YEAR.findall(folder)]
    of_task = [name for name in NUMBERINGS if name.startswith(task) and name != "gli2017"]
    if known := [name for name in of_task if years and int(name[-4:]) <= years[0]]:
        return (known[-1],)
    if task != "gli":
        return tuple(of_task)
    # The cases of 2023 are those of 2021 under other names, whose masks may come with the labels of 2021.
    return ("gli2023", "gli2024", "gli2017") if new_ending else ("gli2023", "gli2017")


def region_ids(numberings: Iterable[str]) -> dict[str, list[int]]:
    """Return the regions of BraTS in our label ids.

    Args:
        numberings: Those that a mask may have. In children's tumours the cysts belong to whole tumour and core.

    Returns:
        Label ids of whole tumour (`"WT"`), tumour core (`"TC"`) and enhancing tumour (`"ET"`).
    """
    cysts = [4] if any(name.startswith("ped") for name in numberings) else []
    return {"WT": [1, 2, 3, *cysts], "TC": [1, 3, *cysts], "ET": [3]}


def enhancing_label_of(name: str) -> int:
    """Return the label that enhancing tumour has in a mask of this name: 4 until BraTS 2021, else 3."""
    stem = re.sub(r"\.nii(\.gz)?\Z", "", name, flags=re.IGNORECASE)
    if _TASK.match(stem) or stem.endswith("-seg"):
        return 3
    return 4 if re.match(r"brats_?(1[7-9]|20)\d*_", stem, re.IGNORECASE) or stem.endswith("_seg") else 3


def to_label_ids(voxels: np.ndarray, name: str, numberings: Sequence[str]) -> np.ndarray:
    """Map the labels of a mask to our ids.

    Args:
        voxels: The mask; labels within 0.01 of a whole number are rounded.
        name: Of the file, for messages.
        numberings: Those that it may have, as [`numberings_of`] gives them.

    Returns:
        `uint8` array of the shape of `voxels`.

    Raises:
        NumberingError: If the labels mean different things in these numberings, or belong to another one.
        ScanError: If a label is in no numbering at all.
    """
    ids = np.zeros_like(voxels, np.uint8)
    axes = memory_order(voxels)
    in_order = voxels.transpose(axes)
    box = bounding_box(in_order != 0)  # tumours are small
    tumour = in_order[box] != 0
    values = in_order[box][tumour]
    labels = np.unique(values)
    whole = np.rint(labels)
    if (np.abs(labels - whole) > 0.01).any():
        _raise_for_labels(labels[np.abs(labels - whole) > 0.01], name, numberings)
    present = {int(label) for label in whole} - {0}
    fitting = [numbering for numbering in numberings if present <= NUMBERINGS[numbering].ids.keys()]
    if not fitting:
        unknown = present.difference(*(NUMBERINGS[numbering].ids for numbering in numberings))
        _raise_for_labels(np.array(sorted(unknown or present), np.float64), name, numberings)
    if len({tuple(NUMBERINGS[numbering].ids[label] for label in sorted(present)) for numbering in fitting}) > 1:
        meanings = "; ".join(f"{numbering}: {NUMBERINGS[numbering].meaning}" for numbering in fitting)
        raise NumberingError(
            f"{name} holds the labels {', '.join(map(str, sorted(present)))}, and its name does not tell what they "
            f"mean ({meanings}). Say which it is, such as by `labels={fitting[-1]!r}` (`--labels {fitting[-1]}`)."
        )
    id_of = {0: 0, **NUMBERINGS[fitting[0]].ids}
    new_ids = np.array([id_of[int(label)] for label in whole], np.uint8)
    ids.transpose(axes)[box][tumour] = new_ids[np.searchsorted(labels, values)]
    return ids


def _raise_for_labels(labels: np.ndarray, name: str, numberings: Sequence[str]) -> None:
    """Raise for labels that are not those of a numbering, and say whose they could be."""
    known = [NUMBERINGS[numbering] for numbering in numberings]
    shown = ", ".join(f"{label:g}" for label in labels[:5])
    source = "of the Decathlon" if numberings[0] == "decathlon" else f"of this name ({', '.join(numberings)})"
    message = (
        f"{name} holds {labels.size} unknown labels ({shown}). A mask {source} may hold "
        f"{', '.join(map(str, sorted({0}.union(*(one.ids for one in known)))))}: "
        f"{', or '.join(dict.fromkeys(one.meaning for one in known))}."
    )
    others = [
        f"`--labels {other}` ({NUMBERINGS[other].meaning})"
        for other in ("gli2017", "gli2023", "gli2024", "ped2024")
        if other not in numberings and {float(label) for label in labels} <= NUMBERINGS[other].ids.keys()
    ]
    if others:
        raise NumberingError(f"{message} If it is numbered otherwise, say so: {', '.join(others)}. Else relabel it.")
    advice = "Relabel it or download it again."
    if (labels != np.rint(labels)).any():
        advice = "Resample masks with nearest neighbour, which makes no labels between others."
    raise ScanError(f"{message} {advice}")


def check_enhancing_label(enhancing_label: int, regions: Mapping[str, Sequence[int]]) -> None:
    """Check that enhancing tumour can be written with a label, which must not be that of something else.

    Args:
        enhancing_label: The label in a file.
        regions: Region name -> the label ids it joins.

    Raises:
        ValueError: If it is neither 3 nor 4, or 4 is a label of its own.
    """
    if enhancing_label not in (3, 4):
        raise ValueError(f"`enhancing_label` must be 3 (BraTS from 2023 on) or 4 (before), got {enhancing_label}.")
    if enhancing_label == 4 and any(4 in label_ids for label_ids in regions.values()):
        raise ValueError(
            f"`enhancing_label` must be 3 where regions have a label 4 of their own, got {dict(regions)}."
        )


__all__ = ["NUMBERINGS", "REGION_TITLES", "Numbering", "NumberingError", "check_enhancing_label", "region_ids"]
