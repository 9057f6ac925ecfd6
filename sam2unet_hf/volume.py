"""Segment BraTS cases on the command line.

python -m sam2unet_hf.volume runs/phantom BraTS20_Training_001 -o segmentations
python -m sam2unet_hf.volume runs/phantom BraTS2020_TrainingData -o segmentations --planes axial coronal --flips
python -m sam2unet_hf.volume runs/cv BraTS20_Training_001 -o segmentations --disagreement
python -m sam2unet_hf.volume runs/three flair=AX_FLAIR.nii.gz t1ce=AX_T1_GD.nii.gz t2=AX_T2.nii.gz -o segmentations
"""

import argparse
import json
import logging
import re
import sys
from pathlib import Path

import numpy as np
import torch

from .cases_sam2unet import BratsCase
from .command_line import ModelParser, make_output_dir
from .devices import default_device, device_name, fast_dtype
from .labels_sam2unet import NUMBERINGS, check_enhancing_label
from .lesions import measure_lesions, save_lesions
from .model_card import counted
from .patient_checks import describe_known_patients, describe_other_modalities, read_splits, why_implausible
from .patient_table import PATIENT_METRICS, PatientTable, score_patient
from .scans_sam2unet import MODALITIES, PLANES, ScanError, check_same_grid, to_grey
from .volume_inputs import Input, check_modalities_of, has_mask, name_inputs
from .volume_sam2unet import Sam2UNetVolumePipeline, VolumeSegmentation


logger = logging.getLogger(__name__)


PROG = "python -m sam2unet_hf.volume"


def parse_args(argv: list[str] | None = None, prog: str = PROG, is_scored: bool = False) -> argparse.Namespace:
    """Read the command line, whose usage calls it `prog`, and which has no `--score` if it always scores."""
    aim = "score them against their masks" if is_scored else "print the volume of each region in ml"
    parser = ModelParser("case", prog=prog, description=f"Segment the BraTS cases of a folder, and {aim}.")
    parser.add_argument("model", help="Hub id or folder of a SAM2-UNet, or of an ensemble of them")
    parser.add_argument(
        "case",
        nargs="+",
        help="folder of one BraTS case or of many, or scan of a single modality; or MODALITY=SCAN for each scan of "
        "one patient, such as flair=AX_FLAIR.nii.gz t1ce=AX_T1_GD.nii.gz",
    )
    parser.add_argument("-o", "--output_dir", type=Path, required=True, help="folder for CASE_seg.nii.gz")
    parser.add_argument("--modalities", nargs="+", choices=MODALITIES, help="default: those the checkpoint names")
    parser.add_argument(
        "--planes", nargs="+", choices=sorted(PLANES), help="averaged; default: that of the checkpoint, or axial"
    )
    parser.add_argument("--flips", action="store_true", help="average over mirror images, four times the work")
    parser.add_rare_argument(
        "--threshold",
        type=float,
        help="probability above which a voxel is tumour; default: that of the region in the clean-up, or else 0.5",
    )
    parser.add_rare_argument(
        "--no_clean_up",
        action="store_true",
        help="leave out the clean-up by clean_up.json beside the model: its thresholds, and its smallest sizes",
    )
    parser.add_rare_argument(
        "--et_label",
        type=int,
        choices=[3, 4],
        help="label of enhancing tumour: 3 as in BraTS from 2023 on, 4 as before; default: that of the case's name",
    )
    parser.add_rare_argument("--probabilities", action="store_true", help="write CASE_REGION_probability.nii.gz too")
    parser.add_argument(
        "--disagreement",
        action="store_true",
        help="write CASE_REGION_disagreement.nii.gz too, the standard deviation over members of an ensemble, mirror "
        "images and planes",
    )
    parser.add_rare_argument(
        "--lesions",
        action="store_true",
        help="write CASE_lesions.csv too: volume, longest axial diameter and its perpendicular of each lesion",
    )
    if is_scored:
        parser.set_defaults(score=True)
    else:
        parser.add_argument(
            "--score",
            action="store_true",
            help="print Dice and other metrics against the reference too, and write them as patients.csv and .json",
        )
    parser.add_rare_argument(
        "--labels",
        choices=list(NUMBERINGS),
        help="what the labels of references mean, for --score where names do not tell",
    )
    parser.add_rare_argument(
        "--allow_other_modalities",
        action="store_true",
        help="segment other --modalities than those of the training, or scans that are named as such, which is hardly "
        "ever right",
    )
    parser.add_rare_argument("--batch_size", type=int, default=8, help="slices at once")
    parser.add_rare_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="precision of the model; auto is bfloat16 where the device has instructions for it, else float32",
    )
    parser.add_argument("--device", type=device_name, help="such as cpu or cuda:1; default: a GPU if there is one")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch_size must be at least 1, got {args.batch_size}")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        parser.error(f"--threshold must be a probability in [0, 1], got {args.threshold}")
    return args


def _prepare_output_dir(output_dir: Path, cases: dict[str, Input]) -> None:
    """Make the folder, and check before the work that it can be written to and holds no scans."""
    make_output_dir(output_dir)
    for name, case in cases.items():
        folders = {file.parent.resolve() for file in case.files.values()} if isinstance(case, BratsCase) else set()
        if output_dir.resolve() in folders:
            raise SystemExit(
                f"--output_dir {output_dir} holds the scans of {name}: the result would replace the reference "
                "there, or be mistaken for it. Name another folder."
            )


def _load(args: argparse.Namespace) -> Sam2UNetVolumePipeline:
    """Load the model, which segments other contrasts than those of its training only if that is asked for."""
    dtype = fast_dtype(args.device or default_device()) if args.dtype == "auto" else getattr(torch, args.dtype)
    try:
        segment = Sam2UNetVolumePipeline.from_pretrained(args.model, args.modalities, args.device, dtype=dtype)
        if args.et_label is not None:
            check_enhancing_label(args.et_label, segment.model.config.regions)
        if args.disagreement:
            segment.check_disagreement(args.planes, args.flips)
    except (OSError, ValueError) as err:
        raise SystemExit(str(err) if args.model in str(err) else f"{args.model}: {err}") from err
    if others := describe_other_modalities(segment.processor.modalities, segment.modalities):
        if not args.allow_other_modalities:
            raise SystemExit(f"{others} Leave out --modalities, or go on all the same with --allow_other_modalities.")
        logger.warning("%s --allow_other_modalities goes on all the same.", others)
    if segment.clean_up is not None and not args.no_clean_up:
        rules = ", ".join(f"{region} by {rule}" for region, rule in segment.clean_up.rules.items())
        logger.info("Cleaning up %s. --no_clean_up leaves this out.", rules)
    return segment


def _warn_of_known_patients(model: str, cases: dict[str, Input]) -> None:
    """Warn of patients that the model was trained on, if the folder of its run tells."""
    try:
        if known := describe_known_patients(read_splits(model), cases):
            logger.warning(known)
    except ValueError as err:
        raise SystemExit(str(err)) from err


def _save(found: VolumeSegmentation, name: str, args: argparse.Namespace) -> Path:
    """Write the segmentation of a case, and its probabilities, the disagreement on them and lesions if asked to."""
    path = args.output_dir / f"{name}_seg.nii.gz"
    try:
        found.save(path, args.et_label)
        for region in found.regions:
            region_name = re.sub(r"[^\w.-]+", "_", region)  # a checkpoint may hold any name
            if args.probabilities:
                found.save_probabilities(args.output_dir / f"{name}_{region_name}_probability.nii.gz", region)
            if args.disagreement:
                found.save_disagreement(args.output_dir / f"{name}_{region_name}_disagreement.nii.gz", region)
        if args.lesions:
            save_lesions(measure_lesions(found), args.output_dir / f"{name}_lesions.csv")
    except OSError as err:  # a full disk
        raise SystemExit(f"{path} could not be written: {err}") from err
    return path


def score(argv: list[str] | None = None, prog: str = f"{PROG} --score") -> None:
    """Segment and score the cases of a folder; as [`main`] with `--score`."""
    main(argv, prog, is_scored=True)


def main(argv: list[str] | None = None, prog: str = PROG, is_scored: bool = False) -> None:
    """Segment the cases of a folder; print the volumes of each, and its scores if asked to, as a line of JSON.

    Scores are written as a table, too.
    """
    args = parse_args(argv, prog, is_scored)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        cases = name_inputs(args.case, args.labels)
    except OSError as err:
        raise SystemExit(str(err)) from err
    if args.score and not any(map(has_mask, cases.values())):
        whose = "The case has no mask" if len(cases) == 1 else f"None of the {len(cases)} cases has a mask"
        what = "it" if len(cases) == 1 else "them"
        remedy = f"`sam2unet segment` segments {what}" if is_scored else f"Leave out --score to segment {what}"
        raise SystemExit(f"{whose} to score by. {remedy}.")
    _prepare_output_dir(args.output_dir, cases)
    segment = _load(args)
    trained = segment.processor.modalities or segment.modalities
    check_modalities_of(cases, segment.modalities, trained, args.allow_other_modalities, ", ".join(args.case))
    if args.score:
        _warn_of_known_patients(args.model, cases)
    table = PatientTable()
    failed = 0
    for name, case in cases.items():
        try:
            # A damaged mask makes the work useless, so read it first.
            reference = case.read_mask() if args.score and isinstance(case, BratsCase) and has_mask(case) else None
            found = segment(
                *(case, args.planes, args.flips, args.batch_size, args.threshold),
                return_probabilities=args.probabilities,
                return_disagreement=args.disagreement,
                clean_up=not args.no_clean_up,
            )
        except ScanError as err:  # go on with the other cases
            logger.error("Left out: %s", err)
            failed += 1
            continue
        path = _save(found, name, args)
        head_voxels = int(np.count_nonzero(to_grey(found.scan)))
        if doubt := why_implausible(found.label_map, head_voxels):
            logger.warning("%s: %s", name, doubt)
        volumes = {region: round(value, 3) for region, value in found.volumes_ml.items()}
        line = {"case": name, "segmentation": str(path), "volumes_ml": volumes, "largest_slice": found.largest_slice}
        try:
            if reference is not None:
                check_same_grid(reference, found.scan)
                label_map = found.scan.from_file_grid(found.label_map)
                scores = score_patient(label_map, reference.voxels, found.regions, found.scan.spacing_mm)
                table.add(name, scores)
                for region, own in scores.items():
                    line[region] = {metric: own[metric] for metric in PATIENT_METRICS}
        except ScanError as err:  # keep the segmentation
            logger.error("Not scored: %s", err)
            failed += 1
        if args.score and not has_mask(case):
            logger.warning("%s: not scored, no mask.", name)
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
    try:
        written = table.write(args.output_dir)
    except OSError as err:  # a full disk
        raise SystemExit(f"The table of patients could not be written: {err}") from err
    if written:
        logger.info("Scores of %s: %s.", counted(len(table.dice), "patient"), ", ".join(map(str, written)))
        for sentence in table.sentences():
            logger.info("%s", sentence)
    if failed:
        raise SystemExit(f"{failed} of {len(cases)} cases could not be segmented or scored, see above.")


__all__ = ["Sam2UNetVolumePipeline", "VolumeSegmentation"]


if __name__ == "__main__":
    main()
