"""The systems of a comparison behind one interface: measure what one costs, train it on a fold, segment its patients.

`SliceSystem` is SAM2-UNet or a baseline, trained as `run_segmentation.py` trains, with another model if need be, and
segmenting by the volume pipeline. `NNUNetSystem` is nnU-Net, 2-D or 3-D.
"""

import abc
import dataclasses
import functools
import gc
import json
import logging
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import nnunet_files
import torch
from baselines import build_baseline, load_baseline
from benchmarks.timing import count_flops, peak_memory_gb, step_clock, synchronize
from tqdm import tqdm
from transformers import TrainerCallback

from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.cases_sam2unet import BratsCase
from sam2unet_hf.finetuning.parsing import parse_arguments, resume_arguments
from sam2unet_hf.finetuning.provenance import RESULTS_FILE, check_same_arguments, write_json
from sam2unet_hf.finetuning.run_segmentation import run_training
from sam2unet_hf.patient_table import PatientTable, score_patient
from sam2unet_hf.scans_sam2unet import read_volume, write_nifti
from sam2unet_hf.training.resume import last_complete_checkpoint
from sam2unet_hf.volume import Sam2UNetVolumePipeline


logger = logging.getLogger(__name__)

WARMUP_STEPS, TIMED_STEPS = 2, 8
CHECKPOINTS = 10  # of a training, to go on from
COSTS, TABLE, SECONDS = "costs.json", "patients", "seconds.json"


class Facts(NamedTuple):
    """Name of a system, and its scores of images of BraTS 2020 as published: doi 10.3390/app15063267, Table 3."""

    name: str
    mean_dice: float | None = None
    mean_iou: float | None = None
    mae: float | None = None


SYSTEMS = {
    "sam2unet": Facts("SAM2-UNet", 0.771, 0.569, 0.046),
    "unet": Facts("U-Net", 0.563, 0.392, 0.178),
    "unetplusplus": Facts("U-Net++", 0.610, 0.439, 0.167),
    "maskrcnn": Facts("Mask R-CNN", 0.746, 0.571, 0.094),
    "deeplabv3": Facts("DeepLabV3", 0.709, 0.549, 0.062),
    "resunet": Facts("ResUNet", 0.591, 0.419, 0.183),
    "nnunet_2d": Facts("nnU-Net 2-D"),
    "nnunet_3d": Facts("nnU-Net 3-D"),
}
# Options of `run_segmentation.py` that are the same for all folds.
OPTIONS_OF_FOLDS = {
    "eval_strategy": "no",  # no patient chooses a checkpoint
    "load_best_model_at_end": "false",
    "save_strategy": "steps",
    "save_total_limit": 1,
    "dataloader_drop_last": "true",  # DeepLabV3 trains on no single image
    "report_to": "none",
}
CONFIGURATIONS = {"nnunet_2d": "2d", "nnunet_3d": "3d_fullres"}


@dataclasses.dataclass(frozen=True)
class Task:
    """What all systems of a comparison share.

    Args:
        folder: Where it is written.
        folds: The cases of each fold, which its systems are not trained on.
        modalities: Those of the scans that are seen.
        regions: What is segmented, region name -> label ids.
        device: `"cpu"` or `"cuda"`.
        mirrors: `"all"`: all systems average over mirror images; `"none"`: no system does; `"own"`: nnU-Net alone
            does, as by itself.
        memory_gb: What nnU-Net's planner may use, by default as much as it takes by itself.
    """

    folder: Path
    folds: Sequence[Sequence[BratsCase]]
    modalities: Sequence[str]
    regions: dict[str, list[int]]
    device: str
    mirrors: str
    memory_gb: float | None


class System(abc.ABC):
    """A system of a comparison.

    Args:
        key: Of `SYSTEMS`.
        recipe: What its input is made by, `"own"` of nnU-Net.
        task: What it is to do.

    Attributes:
        folder: Holds its costs, and a folder for each fold.
    """

    def __init__(self, key: str, recipe: str, task: Task):
        self.key, self.recipe, self.task = key, recipe, task
        self.folder = task.folder / recipe / key

    @property
    def name(self) -> str:
        """What a reader calls it."""
        return SYSTEMS[self.key].name

    def fold_folder(self, fold: int) -> Path:
        """Return the folder of a fold."""
        return self.folder / f"fold_{fold}"

    @abc.abstractmethod
    def check(self) -> None:
        """Exit if it cannot be run, or was begun in another way."""

    @abc.abstractmethod
    def measure(self) -> dict[str, Any]:
        """Return what it costs: `parameters`, `trained_parameters`, `input` (the shape of one), `flops` of one,
        `batch_size`, `seconds_per_step` and `peak_memory_gb`.
        """

    @abc.abstractmethod
    def train(self, fold: int, steps: int) -> None:
        """Train on all other folds for so many steps, or go on; if it is trained, do nothing."""

    @abc.abstractmethod
    def segment(self, fold: int) -> None:
        """Segment the patients of a fold that are not segmented; write `segmentations` and `seconds.json`."""

    def segmentation(self, fold: int, case: BratsCase) -> Path:
        """Return the path of the label map of a case, with our label ids."""
        return self.fold_folder(fold) / "segmentations" / f"{case.case_id}.nii.gz"

    def is_finished(self, fold: int) -> bool:
        """Whether a fold is trained, segmented and scored."""
        return (self.fold_folder(fold) / f"{TABLE}.json").exists()

    def costs(self, steps: int | None, minutes: float | None) -> dict[str, Any]:
        """Return what it costs and how many `steps` it trains, by `costs.json`, or else by measuring it."""
        path = self.folder / COSTS
        if not path.exists():
            logger.info("%s (%s): measuring what it costs.", self.name, self.recipe)
            costs = self.measure()
            costs["steps"] = steps or steps_in(minutes or 0, costs["seconds_per_step"])
            write_json(path, costs, sort_keys=False)
        return json.loads(path.read_text())

    def run(self, fold: int, steps: int) -> None:
        """Train on a fold, segment its patients, and score them; what is done is not done again."""
        if self.is_finished(fold):
            logger.info("%s (%s), fold %d: finished before.", self.name, self.recipe, fold)
            return
        logger.info("%s (%s), fold %d: %d steps.", self.name, self.recipe, fold, steps)
        self.train(fold, steps)
        gc.collect()  # a Trainer and its model refer to each other
        self.segment(fold)
        table = PatientTable()
        for case in self.task.folds[fold]:
            found = read_volume(self.segmentation(fold, case))
            reference = case.read_mask(same_grid_as=found)
            scores = score_patient(found.voxels, reference.voxels, self.task.regions, reference.spacing_mm)
            table.add(case.case_id, scores, fold)
        table.write(self.fold_folder(fold), TABLE)
        for checkpoint in self.fold_folder(fold).glob("checkpoint-*"):  # the last weights are beside them
            shutil.rmtree(checkpoint)


def steps_in(minutes: float, seconds_per_step: float) -> int:
    """Return how many steps fit into a time, one at least."""
    return max(1, round(60 * minutes / seconds_per_step))


class StepTimer(TrainerCallback):
    """Times the steps of a training, loading included, and ends it.

    Attributes:
        costs: What was measured.
    """

    class Done(Exception):
        """Ends the training."""

    def __init__(self) -> None:
        self.costs: dict[str, Any] = {}
        self._start = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the time, and measure all else once that is known."""
        if state.global_step not in (WARMUP_STEPS, WARMUP_STEPS + TIMED_STEPS):
            return
        device = args.device.type
        synchronize(device)
        if state.global_step == WARMUP_STEPS:
            self._start = step_clock(device)()
            return
        seconds = (step_clock(device)() - self._start) / TIMED_STEPS
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        peak = peak_memory_gb(device)
        shape = list(loader.dataset[0]["pixel_values"].shape)
        self.costs = {
            "parameters": model.num_parameters(),
            "trained_parameters": model.num_parameters(only_trainable=True),
            "input": shape,
            "batch_size": args.per_device_train_batch_size,
            "flops": count_flops(model, torch.zeros(1, *shape, device=device)),
            "seconds_per_step": seconds,
            "peak_memory_gb": peak,
        }
        raise self.Done


class SliceSystem(System):
    """A model of slices, trained by `run_segmentation.py`'s own code with the input of a recipe.

    Args:
        key: As in `System`.
        recipe: As there, one of the recipes of `run_segmentation.py`.
        task: As there.
        words: Options of `run_segmentation.py` but for those that a fold sets.
        weights: `"imagenet"` for a pretrained encoder of a baseline.
    """

    def __init__(self, key: str, recipe: str, task: Task, words: Sequence[str], weights: str | None = None):
        super().__init__(key, recipe, task)
        self.words, self.weights = list(words), weights

    def arguments(self, fold: int, steps: int, folder: Path | None = None) -> tuple[Any, Any, Any]:
        """Return the arguments of the run of a fold, as its command line would give them."""
        every = max(1, steps // CHECKPOINTS)
        own = {"fold": fold, "max_steps": steps, "output_dir": folder or self.fold_folder(fold), "save_steps": every}
        words = [f"--{name}={value}" for name, value in (own | OPTIONS_OF_FOLDS).items()]
        arguments = parse_arguments([*self.words, *words])
        args = arguments[-1]
        args.warmup_steps = min(args.warmup_steps, steps // 5)
        return arguments

    def run_training(self, arguments: tuple[Any, Any, Any], callbacks: Sequence[TrainerCallback] = ()) -> None:
        """Train as `run_segmentation.py` does."""
        build_model = None
        if self.key != "sam2unet":
            options = {"weights": self.weights, "iou_over_batch": bool(arguments[0].iou_over_batch)}
            build_model = functools.partial(build_baseline, self.key, **options)
        run_training(*arguments, build_model=build_model, callbacks=callbacks)

    def check(self) -> None:
        """Exit if a library is missing, or a fold was begun with other arguments."""
        if self.key != "sam2unet":
            build_baseline(self.key, {"WT": [1]})
        if not (self.folder / COSTS).exists():
            return
        steps = json.loads((self.folder / COSTS).read_text())["steps"]
        for fold in range(len(self.task.folds)):
            folder = self.fold_folder(fold)
            if self.is_finished(fold) or last_complete_checkpoint(folder):
                check_same_arguments(folder, resume_arguments(*self.arguments(fold, steps)))

    def measure(self) -> dict[str, Any]:
        """Measure some steps of the first fold in a new process, whose memory is all its own."""
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(measure_steps, self).result()

    def train(self, fold: int, steps: int) -> None:
        """Train as `System` says."""
        if not (self.fold_folder(fold) / RESULTS_FILE).exists():
            self.run_training(self.arguments(fold, steps))

    def segment(self, fold: int) -> None:
        """Segment by the volume pipeline, as `System` says."""
        folder = self.fold_folder(fold)
        if self.key == "sam2unet":
            pipeline = Sam2UNetVolumePipeline.from_pretrained(folder, device=self.task.device)
        else:
            model = load_baseline(folder).to(self.task.device)
            pipeline = Sam2UNetVolumePipeline(model, Sam2UNetImageProcessor.from_pretrained(folder))
        path = folder / SECONDS
        seconds = json.loads(path.read_text()) if path.exists() else {}
        for case in tqdm(self.task.folds[fold], desc=f"{self.name}, fold {fold}", unit="scan"):
            if case.case_id in seconds:
                continue
            start = time.perf_counter()
            found = pipeline(case, flips=self.task.mirrors == "all", progress=False)
            found.save(self.segmentation(fold, case), enhancing_label=3)
            seconds[case.case_id] = time.perf_counter() - start
            write_json(path, seconds)


def measure_steps(system: SliceSystem) -> dict[str, Any]:
    """Return what a system costs, by some steps of the first fold that are then thrown away."""
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as folder:
        arguments = system.arguments(0, WARMUP_STEPS + TIMED_STEPS + 1, Path(folder))
        arguments[-1].save_strategy = "no"
        try:
            system.run_training(arguments, [timer])
        except StepTimer.Done:
            pass
    return timer.costs


class NNUNetSystem(System):
    """nnU-Net, which plans, preprocesses, augments, trains and segments by itself: the same patients, its own recipe.

    Its files are in `nnunet` in the folder of the comparison, one data set for both configurations.
    """

    def __init__(self, key: str, task: Task):
        super().__init__(key, "own", task)
        self.files = task.folder / "nnunet"

    def _work(self, *words: Any) -> None:
        nnunet_files.run_worker(
            self.files, self.task.device, words[0], "--configuration", CONFIGURATIONS[self.key], *words[1:]
        )

    def check(self) -> None:
        """Exit if it is not installed; write its data set and let it plan, once."""
        if not nnunet_files.is_installed():
            raise SystemExit(
                f'{self.key} needs nnunetv2. Install it with `pip install -e ".[rivals]"` in this checkout, in an '
                "environment of its own because it needs an older timm, or leave it out of --systems."
            )
        splits = self.files / "preprocessed" / nnunet_files.DATASET / "splits_final.json"
        if not splits.exists():
            cases = [case for fold in self.task.folds for case in fold]
            nnunet_files.write_raw(self.files, cases, self.task.modalities, self.task.regions)
            memory = [] if self.task.memory_gb is None else ["--memory_gb", self.task.memory_gb]
            self._work("plan", *memory)
            nnunet_files.write_folds(self.files, [[case.case_id for case in fold] for fold in self.task.folds])

    def measure(self) -> dict[str, Any]:
        """Measure as `System` says."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, COSTS)
            self._work("measure", "--output", path)
            return json.loads(path.read_text())

    def train(self, fold: int, steps: int) -> None:
        """Train as `System` says."""
        self._work("train", "--fold", fold, "--steps", steps)

    def segment(self, fold: int) -> None:
        """Segment by nnU-Net's own inference, as `System` says."""
        predicted = self.fold_folder(fold) / "predicted"
        mirrors = ["--no_mirrors"] if self.task.mirrors == "none" else []
        self._work("segment", "--fold", fold, "--output", predicted, *mirrors)
        for case in self.task.folds[fold]:
            (scan,) = case.read_images(self.task.modalities[:1])
            label_map = nnunet_files.read_segmentation(
                predicted / f"{case.case_id}{nnunet_files.ENDING}", self.task.regions
            )
            write_nifti(self.segmentation(fold, case), label_map, scan.affine, scan.header)
        write_json(self.fold_folder(fold) / SECONDS, json.loads((predicted / SECONDS).read_text()))
