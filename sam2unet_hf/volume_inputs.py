"""What the volume command segments: the cases and scans that its arguments name, checked before the work."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from transformers.utils import CONFIG_NAME

from .cases_sam2unet import BratsCase, count_dicom_files, find_cases, modality_of
from .members_sam2unet import ENSEMBLE_FILE
from .pictures import SCAN_SUFFIXES, first_file
from .scans_sam2unet import MODALITIES


logger = logging.getLogger(__name__)

# A case, the path of the scan of a model of one modality, or a path for each modality.
Input: TypeAlias = str | BratsCase | dict[str, str]

_PAIR = re.compile(rf"({'|'.join(MODALITIES)})=(.+)", re.DOTALL | re.IGNORECASE)


def name_inputs(arguments: Sequence[str], labels: str | None) -> dict[str, Input]:
    """Return the cases in folders and the scans among the arguments, by what their results will be called.

    Args:
        arguments: Folders and scans, or `MODALITY=SCAN` for each scan of one patient.
        labels: As in `find_cases`.

    Raises:
        FileNotFoundError: If there is no case in a folder.
        SystemExit: If something is not there, is no scan, or would be written to the same file as another.
    """
    if scans := _read_pairs(arguments):
        return {_stem(next(iter(scans.values()))): scans}
    cases: dict[str, Input] = {}
    for path in arguments:
        if not Path(path).exists():
            raise SystemExit(f"{path} does not exist. Pass the folder of one case or of many, or a scan.")
        named: dict[str, Input] = {_stem(path): path}
        try:
            if Path(path).is_dir():
                named = {case.case_id: case for case in find_cases(path, labels)}
            else:
                _check_scan(path)
        except FileNotFoundError:  # there is no case
            _refuse_models(path)
            _refuse_pictures(path)
            raise
        if twice := sorted(named.keys() & cases.keys()):
            raise SystemExit(f"{path}: {twice[0]} was named before, and would be written to the same file.")
        cases |= named
    return cases


def _stem(path: str) -> str:
    return re.sub(r"\.nii(\.gz)?\Z", "", Path(path).name, flags=re.IGNORECASE)


def _read_pairs(arguments: Sequence[str]) -> dict[str, str]:
    """Return the scans that are named as `MODALITY=SCAN`, by modality, or nothing if the arguments are paths."""
    scans: dict[str, str] = {}
    others = []
    for argument in arguments:
        pair = _PAIR.fullmatch(argument)
        if pair is None or Path(argument).exists():
            others.append(argument)
            continue
        modality, path = pair[1].lower(), os.path.expanduser(pair[2])
        if modality in scans:
            raise SystemExit(f"{argument}: the {modality} scan was named before, {scans[modality]}. Name it once.")
        if not Path(path).is_file():
            raise SystemExit(f"{argument}: there is no file {path}. Pass the {modality} scan of the patient.")
        _check_scan(path)
        scans[modality] = path
    if scans and others:
        raise SystemExit(
            f"{', '.join(f'{modality}=...' for modality in scans)} names the scans of one patient. Segment "
            f"{others[0]} by a command of its own, or name its modality, too."
        )
    return scans


def _check_scan(path: str) -> None:
    """Refuse a file that is no scan by its name."""
    _refuse_pictures(path)
    if modality_of(path) == "seg":
        raise SystemExit(f"{Path(path).name} is a mask by its name, not a scan. Name the scan, or the case's folder.")
    if count_dicom_files(path):
        raise SystemExit(f"{path} is a DICOM file: convert its series to NIfTI first, e.g. with dcm2niix.")


def _refuse_models(path: str) -> None:
    """Say what comes first where a model is named as a case."""
    if any(Path(path, name).is_file() for name in (CONFIG_NAME, ENSEMBLE_FILE)):
        raise SystemExit(f"{path} is a model, no case. Name the model first, then the cases: MODEL CASE -o OUT.")


def _refuse_pictures(path: str) -> None:
    """Name the command for pictures if there are some and no scan."""
    if not first_file(path, SCAN_SUFFIXES) and (picture := first_file(path)):
        raise SystemExit(f"{picture} is a picture, no scan. Segment pictures by `python -m sam2unet_hf.pictures`.")


def check_modalities_of(
    cases: Mapping[str, Input], modalities: Sequence[str], trained: Sequence[str], allow_others: bool, where: str
) -> None:
    """End the command if what is named does not give a model its modalities.

    Args:
        cases: Of [`name_inputs`].
        modalities: Those that the model is to segment.
        trained: Those that it was trained on.
        allow_others: Warn only of a scan of another modality.
        where: The folders of the cases, for the message.
    """
    for case in cases.values():
        if isinstance(case, str):
            if len(modalities) > 1:
                others = " ".join(f"{modality}=..." for modality in modalities)
                raise SystemExit(
                    f"The model segments {', '.join(modalities)} together, got the one file {case}. Name the folder "
                    f"of the case, or each scan: {others}"
                )
            _check_names({modalities[0]: case}, trained, allow_others)
        elif isinstance(case, dict):
            if missing := [modality for modality in modalities if modality not in case]:
                given = ", ".join(case)
                raise SystemExit(
                    f"The model segments {', '.join(modalities)}, got {given}. Name {missing[0]}=SCAN of the patient."
                )
            for modality in case.keys() - set(modalities):
                logger.warning(
                    "%s=%s is not read: the model takes %s.", modality, case[modality], ", ".join(modalities)
                )
            _check_names({modality: case[modality] for modality in modalities}, trained, allow_others)
    own = [case for case in cases.values() if isinstance(case, BratsCase) and not case.problem]
    for modality in modalities if len(own) > 1 else ():
        if not any(modality in case.files for case in own):
            there = [name for name in MODALITIES if any(name in case.files for case in own)]
            verb = "was trained on" if list(modalities) == list(trained) else "is to segment"
            raise SystemExit(
                f"The model {verb} {', '.join(modalities)}; none of the {len(own)} cases in {where} has "
                f"{'it' if len(modalities) == 1 else modality} (they have {', '.join(there)})."
            )


def _check_names(scans: Mapping[str, str], trained: Sequence[str], allow_others: bool) -> None:
    """Refuse scans whose names tell another modality than they are taken for."""
    for modality, path in scans.items():
        told = modality_of(path)
        if told is None or told == modality:
            continue
        fault = f"{Path(path).name} is a {told} scan by its name; the model was trained on {', '.join(trained)}."
        if not allow_others:
            raise SystemExit(
                f"{fault} Name the {modality} scan or the folder of the case, or pass --allow_other_modalities."
            )
        logger.warning("%s --allow_other_modalities takes it for %s all the same.", fault, modality)


def has_mask(case: Input) -> bool:
    """Whether there is a mask to score a case by, or files that cannot be told apart, of which reading it tells."""
    return isinstance(case, BratsCase) and (case.problem is not None or "seg" in case.files)
