"""Cross-validation, `run_segmentation.py --folds`: a run for each fold, and what they say together of all patients."""

import copy
import functools
import gc
import json
import logging
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from filelock import FileLock
from tqdm import tqdm

from sam2unet_hf.cases_sam2unet import BratsCase, find_cases
from sam2unet_hf.clean_up import RegionComponents, choose_clean_up, find_components, load_components, save_components
from sam2unet_hf.clean_up_sam2unet import CLEAN_UP_FILE, GAINS, CleanUp, RegionRule
from sam2unet_hf.finetuning.arguments import (
    DataArguments,
    ModelArguments,
    SegmentationTrainingArguments,
)
from sam2unet_hf.finetuning.data_sources import Fold, load_folds, scans_folder
from sam2unet_hf.finetuning.parsing import (
    resume_arguments,
    take_channels_of_model,
)
from sam2unet_hf.finetuning.plots import plot_folds
from sam2unet_hf.finetuning.processes import from_main_process
from sam2unet_hf.finetuning.provenance import (
    FOLDS_FILE,
    RECORD,
    RESULTS_FILE,
    check_same_arguments,
    remove_run,
    write_json,
)
from sam2unet_hf.labels_sam2unet import enhancing_label_of
from sam2unet_hf.members_sam2unet import ENSEMBLE_FILE
from sam2unet_hf.patient_table import PatientTable
from sam2unet_hf.training.resume import last_complete_checkpoint
from sam2unet_hf.volume_sam2unet import Sam2UNetVolumePipeline, VolumeSegmentation


logger = logging.getLogger("folds")

# What all folds give together, beside their runs in `fold_0`, `fold_1` and so on.
SEGMENTATIONS = "segmentations"
COMPONENTS = "components"  # what the clean-up is chosen by
TABLE = "patients"
PICTURE = "folds.png"

Arguments = tuple[ModelArguments, DataArguments, SegmentationTrainingArguments]


def run_folds(
    run: Callable[..., dict[str, float]],
    model_args: ModelArguments,
    data_args: DataArguments,
    args: SegmentationTrainingArguments,
) -> dict[str, float]:
    """Train and score each fold, or the one of `--fold`; with the last of them write what all give together.

    Args:
        run: Makes the run of a fold from the three arguments; it calls its argument `before_start` in the main process
            before it writes anything.
        model_args: The arguments of all folds.
        data_args: The same; `fold` chooses one.
        args: The same; each run has a folder of its own in their output folder.

    Returns:
        The content of `all_results.json`: means over folds, their standard deviations as `<name>_std`, and where there
        are scans what the clean-up gains, as [`report_gains`] names it. Nothing while there are folds to train.
    """
    take_channels_of_model(model_args, data_args, args)
    if args.load_best_model_at_end:
        logger.warning(
            "--load_best_model_at_end true chooses the epoch of a fold by the patients that it is scored on, so the "
            "out-of-fold scores are too good."
        )
    with args.main_process_first(desc="preparing the folds"):
        folds = load_folds(data_args)
    validation = CrossValidation(folds, (model_args, data_args, args))
    from_main_process(args, validation.check)
    for fold in range(len(folds)) if data_args.fold is None else [data_args.fold]:
        if from_main_process(args, functools.partial(validation.is_trained, fold)) and not validation.replaces:
            logger.info("Fold %d is trained.", fold)
        else:
            logger.info("Fold %d of %d: %d patients to score.", fold, len(folds), len(folds[fold].patients))
            run(*validation.arguments(fold), before_start=functools.partial(validation.start, fold))
            gc.collect()  # the Trainer and its model refer to each other
            torch.cuda.empty_cache()
            PartialState().wait_for_everyone()  # the main process is the last to end a run
        validation.segment(fold)
    return from_main_process(args, validation.finish)


class CrossValidation:
    """The folder of a cross-validation, with the run of each fold and what they give together.

    Args:
        folds: All folds.
        arguments: The arguments of all their runs.

    Attributes:
        replaces: The runs that are begun replace older ones.
    """

    def __init__(self, folds: list[Fold], arguments: Arguments):
        self.folds = folds
        self._arguments = arguments
        _, self.data_args, self.args = arguments
        self.folder = Path(self.args.output_dir)
        self.replaces = self.args.overwrite_output_dir and not self.args.resume_from_checkpoint
        self._is_to_clear = self.replaces and self.data_args.fold is None
        self._names = {self.name(fold): own.patients for fold, own in enumerate(folds)}

    @staticmethod
    def name(fold: int) -> str:
        """Return the name of the folder of a fold."""
        return f"fold_{fold}"

    def arguments(self, fold: int) -> Arguments:
        """Return the arguments of the run of a fold, which finds its checkpoints by itself."""
        model_args, data_args, args = copy.deepcopy(self._arguments)
        data_args.fold, args.output_dir = fold, str(self.folder / self.name(fold))
        args.resume_from_checkpoint = None
        args.overwrite_output_dir = self.replaces
        return model_args, data_args, args

    def check(self) -> None:
        """Refuse to mix two cross-validations, or to replace one unasked, before anything is trained or written."""
        if (self.folder / RECORD).exists():
            raise SystemExit(f"{self.folder} holds a run without --folds. Pass another --output_dir.")
        if self._is_to_clear:
            return
        path = self.folder / FOLDS_FILE
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) != self._names:
            raise SystemExit(
                f"{self.folder} holds a cross-validation with other folds, see {path}. Pass the data, --folds and "
                "--split_seed that it was begun with, --overwrite_output_dir without --fold to replace it, or another "
                "--output_dir."
            )
        if (self.folder / RESULTS_FILE).exists() and not (self.replaces or self.args.resume_from_checkpoint):
            raise SystemExit(
                f"{self.folder} holds a finished cross-validation. Pass --overwrite_output_dir to replace it, or "
                "another --output_dir to keep it."
            )
        for fold in range(len(self.folds)):
            run_folder = self.folder / self.name(fold)
            is_replaced = self.replaces and fold == self.data_args.fold
            if not is_replaced and (self.is_trained(fold) or last_complete_checkpoint(run_folder)):
                check_same_arguments(run_folder, resume_arguments(*self.arguments(fold)))

    def start(self, fold: int) -> None:
        """Note the folds, and remove what comes from an older run of this fold, or of all that are replaced."""
        with self._lock():
            for name in (RESULTS_FILE, ENSEMBLE_FILE, CLEAN_UP_FILE, PICTURE, f"{TABLE}.csv", f"{TABLE}.json"):
                (self.folder / name).unlink(missing_ok=True)
            outdated = [path for case in self._cases(fold) for path in self._files(case)]
            if self._is_to_clear:
                outdated = [*self.folder.glob(f"{SEGMENTATIONS}/*.nii.gz"), *self.folder.glob(f"{COMPONENTS}/*.json")]
                for path in self.folder.glob(self.name("*")):
                    remove_run(path)
                self._is_to_clear = False
            for path in outdated:
                path.unlink(missing_ok=True)
            self._write_folds()

    def is_trained(self, fold: int) -> bool:
        """Whether the run of a fold has finished."""
        return (self.folder / self.name(fold) / RESULTS_FILE).exists()

    def segment(self, fold: int) -> None:
        """Segment the scans of a fold by its model as `python -m sam2unet_hf.volume` does, by all processes together.

        Of the same probabilities those facts are kept that the clean-up is chosen by. Scans that were segmented before
        are passed over. There are scans if the data are a folder of them.
        """
        wanted = self._cases(fold)
        if not wanted:
            return
        for name in (SEGMENTATIONS, COMPONENTS):
            (self.folder / name).mkdir(exist_ok=True)
        own = wanted[self.args.process_index :: self.args.world_size]
        if missing := [case_id for case_id in own if not self._is_segmented(case_id)]:
            cases = {case.case_id: case for case in find_cases(scans_folder(self.data_args), self.data_args.labels)}
            model = self.folder / self.name(fold)
            segment = Sam2UNetVolumePipeline.from_pretrained(model, device=self.args.device)
            has_own_label = any(4 in label_ids for label_ids in segment.model.config.regions.values())
            options = {"progress": False, "return_probabilities": True, "clean_up": False}
            for case_id in tqdm(missing, desc=f"Segmenting fold {fold}", unit="scan", disable=self.args.disable_tqdm):
                segmentation, components = self._files(case_id)
                found = segment(cases[case_id], **options)
                save_components(components, components_of(found, cases[case_id]))
                label = 3 if has_own_label else enhancing_label_of(f"{case_id}_seg.nii.gz")
                found.save(segmentation, label)
        PartialState().wait_for_everyone()

    def finish(self) -> dict[str, float]:
        """Write what all folds give together, the results last, unless there are folds to train or to segment."""
        left = [
            fold
            for fold in range(len(self.folds))
            if not self.is_trained(fold) or not all(map(self._is_segmented, self._cases(fold)))
        ]
        if left:
            logger.info("The table of patients is written once all folds are trained; these are left: %s.", left)
            return {}
        with self._lock():  # another process may end the last fold at the same time, on a cluster
            path, clean_up = self.folder / RESULTS_FILE, self.folder / CLEAN_UP_FILE
            if path.exists() and (clean_up.exists() or not self._cases(0)):
                return json.loads(path.read_text(encoding="utf-8"))
            self._write_folds()
            table = self._read_table()
            if table.write(self.folder, TABLE):
                plot_folds(table.rows, self.folder / PICTURE)
                for region, columns in table.fold_summary().items():
                    logger.info(
                        "%s: Dice of patients %.4f, SD over folds %.4f.", region, *columns["volume_dice"].values()
                    )
            results = mean_and_std(self._read(fold, RESULTS_FILE) for fold in range(len(self.folds)))
            if self._cases(0):
                results |= self._clean_up()
            write_json(self.folder / ENSEMBLE_FILE, {"members": list(self._names)})
            write_json(path, results)
        logger.info("The results of all folds are in %s.", self.folder)
        return results

    def _lock(self) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / ".folds.lock")

    def _write_folds(self) -> None:
        write_json(self.folder / FOLDS_FILE, self._names, sort_keys=False)

    def _clean_up(self) -> dict[str, float]:
        """Choose the clean-up of the ensemble and write it; return what that gains on patients of other folds."""
        folds = [self._cases(fold) for fold in range(len(self.folds))]
        patients = {case: load_components(self._files(case)[1]) for cases in folds for case in cases}
        clean_up = choose_clean_up(patients, folds)
        clean_up.save(self.folder)
        return report_gains(clean_up)

    def _cases(self, fold: int) -> list[str]:
        """Return the cases of a fold that are segmented; none where the data are no folder of scans."""
        return self.folds[fold].cases if self.data_args.dataset_name is None else []

    def _files(self, case_id: str) -> list[Path]:
        """Return the segmentation of a case, and the file of its components."""
        return [self.folder / SEGMENTATIONS / f"{case_id}.nii.gz", self.folder / COMPONENTS / f"{case_id}.json"]

    def _is_segmented(self, case_id: str) -> bool:
        return all(path.exists() for path in self._files(case_id))

    def _read(self, fold: int, name: str) -> Any:
        return json.loads((self.folder / self.name(fold) / name).read_text(encoding="utf-8"))

    def _read_table(self) -> PatientTable:
        """Put the tables of the folds together, sorted by patient; without rows if they have none."""
        table = PatientTable()
        for fold in range(len(self.folds)):
            name = "validation_patients.json"
            rows = self._read(fold, name)["patients"] if (self.folder / self.name(fold) / name).exists() else []
            for row in rows:
                table.add(row["patient"], {row["region"]: row}, fold)
        table.rows.sort(key=lambda row: row["patient"])
        return table


def components_of(found: VolumeSegmentation, case: BratsCase) -> dict[str, RegionComponents]:
    """Return what the choice of a clean-up needs to know of a segmented case."""
    reference = case.read_mask(same_grid_as=found.scan)
    probabilities = np.stack([found.scan.from_file_grid(region) for region in found.probabilities])
    return find_components(probabilities, reference.voxels, found.regions, found.scan.spacing_mm)


def report_gains(clean_up: CleanUp) -> dict[str, float]:
    """Log what a clean-up gains; return it as `clean_up_<value>_<region>`, for each of `GAIN_VALUES`."""
    results: dict[str, float] = {}
    for region, gain in clean_up.record[GAINS].items():
        rule = clean_up.rules[region]
        chosen = "no clean-up" if rule == RegionRule() else f"clean-up by {rule}"
        logger.info(
            "%s: %s. On patients of other folds, by rules chosen without them, Dice went from %.4f to %.4f and false "
            "components of a patient from %.1f to %.1f.",
            region,
            chosen,
            *(gain[f"{name}_{when}"] for name in ("dice", "false_components") for when in ("before", "after")),
        )
        results |= {f"clean_up_{name}_{region}": value for name, value in gain.items()}
    return results


def mean_and_std(results: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each score over folds, and its standard deviation, that of a sample, as `<name>_std`."""
    results = list(results)
    found: dict[str, float] = {}
    for name in set.intersection(*map(set, results)):
        values = [scores[name] for scores in results]
        found[name] = math.fsum(values) / len(values)
        found[f"{name}_std"] = statistics.stdev(values)
    return found
