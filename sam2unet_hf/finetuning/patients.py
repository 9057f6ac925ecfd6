"""The end of a run: its patients scored as a whole, in a table, and which of them its picture shows."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object

from sam2unet_hf import Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor
from sam2unet_hf.cases_sam2unet import patient_of
from sam2unet_hf.finetuning.arguments import DataArguments, SegmentationTrainingArguments
from sam2unet_hf.finetuning.case_names import case_ids
from sam2unet_hf.finetuning.cohort import COHORT
from sam2unet_hf.finetuning.data_checks import DataSplits
from sam2unet_hf.finetuning.image_folders import image_mask_folders
from sam2unet_hf.finetuning.predictions import name_ranks
from sam2unet_hf.finetuning.processes import exit_on
from sam2unet_hf.finetuning.provenance import write_json
from sam2unet_hf.metrics.volume_functional import VoxelCounts, dice
from sam2unet_hf.patient_checks import EARLIER, SPLITS_FILE, describe_known_patients, read_splits
from sam2unet_hf.patient_table import PatientTable
from sam2unet_hf.training import ImageRows, Sam2UNetTrainer
from sam2unet_hf.training.patients import read_column
from sam2unet_hf.training.volumes import PatientScores, rows_of_patients, score_patients, why_no_volumes


logger = logging.getLogger("patients")

OUT_OF_FOLD = "out_of_fold"


class KnownPatients:
    """Patients that a model has seen in training, in this run and in those before.

    Args:
        data: The splits of the run; none if it scores a second cohort alone.
        data_args: Say where they come from.
        args: Say whether the run trains.
        start: Model that the run starts from, or that it scores.

    Attributes:
        of_run: Patients by split, for the file beside the weights; `earlier` are those of the training before the run,
            `out_of_fold` those of a fold's validation where they did not choose the checkpoint.
        of_start: Patients that the model has seen before the run, by split.
    """

    def __init__(
        self, data: DataSplits, data_args: DataArguments, args: SegmentationTrainingArguments, start: str | None
    ):
        with exit_on(ValueError):
            self.of_start = read_splits(start)
        earlier = sorted({*self.of_start.get("train", ()), *self.of_start.get(EARLIER, ())})
        if not args.do_train:
            self.of_run = self.of_start
            return
        self.of_start = {EARLIER: earlier}
        # Pictures of two patients may have the same name, in two folders.
        has_patients = data_args.dataset_name is None or not image_mask_folders(Path(data_args.dataset_name))
        named = {split: case_ids(split, rows) if has_patients else [] for split, rows in data.items()}
        if data_args.folds is not None and not args.load_best_model_at_end:
            named[OUT_OF_FOLD] = named.pop("validation")  # they chose nothing
        self.of_run = {split: sorted(set(map(patient_of, cases))) for split, cases in named.items() if cases}
        if earlier:
            self.of_run[EARLIER] = earlier

    def warn(self, evaluation: Mapping[str, ImageRows], has_patients: bool) -> None:
        """Warn if patients are scored that the model has seen; `has_patients` says so of the second cohort."""
        known = {"test": self.of_start, **({COHORT: self.of_run} if has_patients else {})}
        for split in evaluation.keys() & known.keys():
            case_ids_of_split = map(str, read_column(evaluation[split], "case_id") or ())
            if text := describe_known_patients(known[split], case_ids_of_split):
                logger.warning("%s: %s", split, text)


def write_splits(folder: Path, splits: Mapping[str, Sequence[str]]) -> None:
    """Write the patients of each split beside the weights, for those who score the model later."""
    if splits:
        write_json(folder / SPLITS_FILE, splits)


def score_split(
    trainer: Sam2UNetTrainer,
    model: Sam2UNetForSemanticSegmentation,
    processor: Sam2UNetImageProcessor,
    rows: ImageRows,
    counts: Mapping[str, np.ndarray],
    name: str,
) -> PatientTable:
    """Score the patients of a split and write their table, `<name>_patients.csv` and `.json`, into the output folder.

    Whole heads are scored as volumes, by all processes together. Where a patient is a single picture, its size is in
    pixels and there is no Hausdorff distance.

    Args:
        trainer: Has evaluated the split.
        model: Its model, whole.
        processor: The image processor.
        rows: The split, with masks at their own size.
        counts: Pixels of each patient that the evaluation counted, see `SegmentationMetrics.patient_counts`.
        name: Name of the split.

    Returns:
        The table, in all processes; without patients, if the rows do not hold whole patients.
    """
    table, args = PatientTable(), trainer.args
    reason = why_no_volumes(rows, processor.plane or "axial")
    if reason is None:
        cases = list(rows_of_patients(rows))
        own = cases[args.process_index :: args.world_size]
        options = {"batch_size": args.eval_batch_size, "num_workers": args.dataloader_num_workers}
        scored = list(score_patients(model.eval(), processor, rows, own, **options))
        found = {scores.case_id: scores for scores in (gather_object(scored) if args.world_size > 1 else scored)}
        for case in cases:
            scores = PatientScores(*found[case])
            table.add(case, scores.scores)
            if scores.doubt:
                logger.warning("%s: %s", case, scores.doubt)
    elif counts and "slice_index" not in rows.column_names:
        for case, counts_of in counts.items():
            table.add(
                case,
                {
                    region: score_counts(*row)
                    for region, row in zip(model.config.regions, counts_of.tolist(), strict=True)
                },
            )
    else:
        logger.info("There is no table of patients of %s, because %s. --slices head takes whole heads.", name, reason)
    if trainer.is_world_process_zero():
        table.write(args.output_dir, f"{name}_patients")
    return table


def score_counts(true_positive: int, predicted: int, reference: int) -> dict[str, float]:
    """Return what a table has of a region of a picture."""
    overlap = dice(VoxelCounts(true_positive, predicted, reference, 0))
    return {"volume_dice": overlap, "reference_pixels": reference, "predicted_pixels": predicted}


def patients_to_show(rows: ImageRows, table: PatientTable) -> dict[int, str]:
    """Choose the best, the median and the worst patient of a table, and of each the row with the most tumour.

    Returns:
        Number of the row -> its title in a picture.
    """
    ranked = list(table.dice)
    rows_of = rows_of_patients(rows)
    tumour = read_column(rows, "wt_pixels") or [0] * len(rows)
    slices = read_column(rows, "slice_index")
    titles = {}
    for rank, place in name_ranks(range(len(ranked))).items():
        patient = ranked[place]
        index = max(rows_of[patient], key=tumour.__getitem__)
        shown = patient if slices is None else f"{patient}, slice {slices[index]} is shown"
        titles[index] = f"{rank} patient: Dice {table.dice[patient]:.3f}\n{shown}"
    return titles
