"""The builder of the BraTS slice data set."""

import functools
import hashlib
import json
import logging
import multiprocessing
import os
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, TypeAlias, cast

import datasets
import numpy as np

from sam2unet_hf.cases_sam2unet import BratsCase, find_cases
from sam2unet_hf.labels_sam2unet import NumberingError
from sam2unet_hf.scans_sam2unet import (
    MODALITIES,
    PLANES,
    ScanError,
    Volume,
    check_modalities,
    foreground_slices,
    head_box,
    take_slice,
    to_grey,
)

from ..phantom import is_phantom
from .png import encode_png


logger = logging.getLogger(__name__)

CITATION = resources.files(__package__).joinpath("brats.bib").read_text(encoding="utf-8")
DECATHLON_CITATION = resources.files(__package__).joinpath("decathlon.bib").read_text(encoding="utf-8")

Rows: TypeAlias = list[dict[str, Any]] | ScanError  # of a case, or why it has none

SLICE_CHOICES = ("all", "head", "tumor")  # besides indices
# The fields of the config, which the command line has too.
OPTIONS = ("modalities", "slices", "min_tumor_pixels", "plane", "labels", "seed", "skip_bad_cases")
# Cases that are read ahead: more than there are likely to be processes, few enough to hold in memory.
READ_AHEAD = 32
_SKIP_ADVICE = "Or leave such cases out: `skip_bad_cases=True` (`--skip_bad_cases`)."


def citation_of(case_ids: Iterable[str]) -> str:
    """Return what to cite, as BibTeX, where scans with these ids are used; nothing if all are of the phantom."""
    case_ids = list(case_ids)
    if all(map(is_phantom, case_ids)):
        return ""
    is_decathlon = all(re.fullmatch(r"BRATS_\d+", case_id) for case_id in case_ids)
    return CITATION + DECATHLON_CITATION if is_decathlon else CITATION


@dataclass
class BratsSlicesConfig(datasets.BuilderConfig):
    """Options of `BratsSlices`.

    Attributes:
        modalities: Names of `sam2unet_hf.scans_sam2unet.MODALITIES`, which every case must have. Default: those that
            every case with a mask has. Their columns have the order of that table, whatever order is given here.
        slices: Index of a slice, a list of them, `"all"`, `"head"` for the slices that show the head in any of the
            modalities, or `"tumor"` for those that show enough of it. See `sam2unet_hf.scans_sam2unet.take_slice` for
            where each plane counts from. 95 is the slice of the paper.
        min_tumor_pixels: How many pixels of tumour a slice must show; read with `slices="tumor"` alone.
        plane: `"axial"`, `"coronal"` or `"sagittal"`.
        labels: What the labels of the masks mean, one of `sam2unet_hf.labels_sam2unet.NUMBERINGS`. Default: what the
            names of cases, folders and files tell.
        seed: Chooses the split.
        skip_bad_cases: Leave out and report the cases that cannot be used, instead of raising. Masks whose labels may
            mean something else than those of the other cases raise all the same.
    """

    modalities: str | list[str] | tuple[str, ...] | None = None
    slices: int | str | list[int] | tuple[int, ...] = 95
    min_tumor_pixels: int = 1
    plane: str = "axial"
    labels: str | None = None
    seed: int = 0
    skip_bad_cases: bool = False

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.modalities, str):
            self.modalities = [self.modalities]
        if self.modalities is not None:
            check_modalities(self.modalities)
            self.modalities = [modality for modality in MODALITIES if modality in self.modalities]
        if self.slices not in SLICE_CHOICES:
            indices = self.slices if isinstance(self.slices, (list, tuple, range)) else [self.slices]
            if not indices or not all(type(index) is int and index >= 0 for index in indices):
                raise ValueError(
                    f"`slices` must be an index from 0 on, a list of them, or one of {', '.join(SLICE_CHOICES)}, got "
                    f"{self.slices!r}."
                )
            self.slices = sorted(set(cast("list[int]", indices)))
        if type(self.min_tumor_pixels) is not int or self.min_tumor_pixels < 1:
            raise ValueError(f"`min_tumor_pixels` must be an integer from 1 on, got {self.min_tumor_pixels!r}.")
        if self.plane not in PLANES:
            raise ValueError(f"`plane` must be one of {', '.join(PLANES)}, got {self.plane!r}.")
        if self.data_dir is None:
            raise ValueError("`data_dir` is missing. Pass the folder that holds the BraTS cases.")

    @functools.cached_property
    def cases(self) -> list[BratsCase]:
        """The cases found in `data_dir`."""
        return find_cases(self.data_dir, self.labels)

    @functools.cached_property
    def columns(self) -> list[str]:
        """The modalities that become columns: those asked for, or those that every case with a mask has.

        Raises:
            ScanError: If none was asked for, and no modality is there in every case.
        """
        if self.modalities is not None:
            return list(self.modalities)
        cases = [case for case in self.cases if "seg" in case.files] or self.cases
        lacking = {name: [case.case_id for case in cases if name not in case.files] for name in MODALITIES}
        found = [name for name in MODALITIES if not lacking[name]]
        if not found:
            counts = ", ".join(f"{name} {len(cases) - len(case_ids)}" for name, case_ids in lacking.items())
            raise ScanError(
                f"No modality is there in each of the {len(cases)} cases in `{self.data_dir}` ({counts}). Name those "
                f"to use: `modalities` (`--modalities`). {_SKIP_ADVICE}"
            )
        for name in (name for name in MODALITIES if len(lacking[name]) not in (0, len(cases))):
            logger.warning(
                "No column for %s, which %d of %d cases lack, such as %s. To leave out these cases instead, name %s "
                "among the `modalities` (`--modalities`) and skip bad cases.",
                *(name, len(lacking[name]), len(cases), lacking[name][0], name),
            )
        return found

    def create_config_id(self, config_kwargs: dict, custom_features: datasets.Features | None = None) -> str:
        """Name the cache folder after the options and the scans found, so that changed scans make a new build."""
        options = {**{name: getattr(self, name) for name in OPTIONS}, "modalities": self.columns}
        digest = hashlib.sha256()
        for case in self.cases:
            digest.update(repr((case.case_id, case.grade, case.problem, case.labels)).encode())
            for name in (*self.columns, "seg"):
                if name in case.files:
                    path = case.files[name]
                    # Take those of a dangling link itself; the error of reading it names the case.
                    stat = path.stat() if path.exists() else path.lstat()
                    digest.update(repr((name, path.name, stat.st_size, stat.st_mtime_ns)).encode())
        options["scans"] = digest.hexdigest()
        return super().create_config_id({**config_kwargs, **options}, custom_features)


class BratsSlices(datasets.GeneratorBasedBuilder):
    """2-D slices of BraTS scans with the experts' masks, split by patient.

    Each row holds an 8-bit grey image per modality, named as it (`flair`, `t1ce`, ...), `mask` (label ids 0
    background, 1 NCR/NET, 2 ED, 3 ET, and 4 where the challenge has the resection cavity or cysts, see
    `sam2unet_hf.labels_sam2unet`), `case_id`, `slice_index`, `grade` (`"HGG"`, `"LGG"` or `None`), the number of
    pixels of whole tumour (labels 1, 2, 3 and cysts), tumour core (1, 3 and cysts) and enhancing tumour (3),
    `head_boxes` (per modality the box of the volume's head, `[x_min, y_min, x_max, y_max]` in pixels, half-open, the
    same for all slices of a volume) and `spacing_mm` (size of a voxel from left to right, front to back and feet to
    head).

    Slices are oriented as `sam2unet_hf.scans_sam2unet.take_slice` says, one voxel per pixel, and their intensities
    are scaled per scan as `to_grey` there does. Which modalities a model takes, and in which order, is chosen when it
    is trained.

    ```python
    builder = BratsSlices(data_dir="BraTS2020_TrainingData", slices="tumor", min_tumor_pixels=50)
    builder.download_and_prepare(num_proc=4)
    dataset = builder.as_dataset()
    ```

    The cache folder depends on the options and on name, size and time of every file used.

    Args:
        data_dir: Folder that holds the cases, in any layout that `sam2unet_hf.cases_sam2unet.find_cases` knows:
            BraTS from 2017 to 2023, or Task01_BrainTumour of the Medical Segmentation Decathlon, less its cases
            without masks.
        **config_kwargs: Options, see `BratsSlicesConfig`, and the arguments of `datasets.DatasetBuilder`.

    Raises:
        FileNotFoundError: If `data_dir` does not exist or holds no case.
        ValueError: If an option has an invalid value, or the cases have no modality in common.
        ScanError: From `download_and_prepare`, if a case cannot be used and `skip_bad_cases` is false.
    """

    VERSION = datasets.Version("2.0.0")  # part of the cache folder: raise it whenever the rows change
    BUILDER_CONFIG_CLASS = BratsSlicesConfig
    config: BratsSlicesConfig
    _pool: ProcessPoolExecutor | None = None  # reads cases, ahead of this process, which writes

    @property
    def skipped_cases(self) -> dict[str, str]:
        """Why cases have no rows, by case id. The cache keeps it beside the data, once they are prepared."""
        path = f"{self._output_dir}/skipped.json"
        return json.loads(self._fs.read_text(path)) if self._fs.exists(path) else {}

    def download_and_prepare(self, *args, num_proc: int | None = None, **kwargs) -> None:
        """Build the data set as `datasets.DatasetBuilder` does, and warn of every case that has no rows.

        `num_proc` processes read cases ahead of this one, which writes: `datasets` would start them anew for each
        split.
        """
        if num_proc is not None and num_proc > 1:
            self._pool = start_readers(num_proc)
        try:
            super().download_and_prepare(*args, **kwargs)
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
                self._pool = None
        for reason in self.skipped_cases.values():
            logger.warning("Left out: %s", reason)
        for split, cases in self._cases_of_splits().items():
            if cases and split not in self.info.splits:
                logger.warning(
                    "There is no %s split, for none of its %d cases gives a slice. Repair one, or split otherwise by "
                    "another `seed` (`--seed`).",
                    *(split, len(cases)),
                )

    def _info(self) -> datasets.DatasetInfo:
        text, count = datasets.Value("string"), datasets.Value("int32")
        features: dict[str, Any] = {name: datasets.Image() for name in (*self.config.columns, "mask")}
        features |= {"case_id": text, "slice_index": count, "grade": text}
        features |= {"wt_pixels": count, "tc_pixels": count, "et_pixels": count}
        features["head_boxes"] = {name: datasets.Sequence(count, length=4) for name in self.config.columns}
        features["spacing_mm"] = datasets.Sequence(datasets.Value("float64"), length=3)
        info = datasets.DatasetInfo(features=datasets.Features(features))
        case_ids = [case.case_id for case in self.config.cases]
        if all(map(is_phantom, case_ids)):
            info.description = "2-D slices of made-up scans with masks of the tumour."
            return info
        info.description = "2-D slices of BraTS scans with expert masks of the tumour."
        info.homepage, info.citation = "https://www.synapse.org/brats", citation_of(case_ids)
        return info

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        config = self.config
        if not config.skip_bad_cases:
            _check_complete(config.cases, (*config.columns, "seg"))
        cases_of = self._cases_of_splits()
        ordered = sum(cases_of.values(), [])
        self._skipped = {case.case_id: why for case in config.cases if (why := _why_no_mask(case))}
        if self._pool is not None:
            self._read_ahead = _read_ahead(self._pool, ordered, config)
        return [datasets.SplitGenerator(split, {"cases": cases}) for split, cases in cases_of.items() if cases]

    def _cases_of_splits(self) -> dict[str, list[BratsCase]]:
        """Split all patients that have a mask, so that a bad case found on the way does not move the others.

        Cases without one, such as those of the challenge's validation, would only leave places in the splits empty.
        """
        cases = [case for case in self.config.cases if not _why_no_mask(case)]
        patients_of = split_patients((case.patient_id for case in cases), self.config.seed)
        return {
            split: [case for case in cases if case.patient_id in patients] for split, patients in patients_of.items()
        }

    def _generate_examples(self, cases: list[BratsCase]) -> Iterator[tuple[str, dict[str, Any]]]:
        config = self.config
        rows_of_cases = (_read(case, config) for case in cases) if self._pool is None else self._read_ahead
        # The processes go on with the next split, so that there may be more rows than cases.
        for case, rows in zip(cases, rows_of_cases, strict=False):
            if isinstance(rows, NumberingError):  # the labels of the other cases may be wrong, too
                raise rows
            if isinstance(rows, ScanError):
                if not config.skip_bad_cases:
                    raise ScanError(f"{rows} {_SKIP_ADVICE}") from rows
                self._skipped[case.case_id] = str(rows)
                continue
            if not rows:
                reason = f"no {config.plane} slice shows {config.min_tumor_pixels} or more pixels of tumour"
                self._skipped[case.case_id] = f"case {case.case_id}: {reason}."
            for row in rows:
                yield f"{case.case_id}/{row['slice_index']:03d}", row

    def _download_and_prepare(self, dl_manager, verification_mode, **prepare_split_kwargs) -> None:
        self.info.splits = None  # forget those of an older build, whose bad cases may have been repaired
        try:
            super()._download_and_prepare(dl_manager, verification_mode, **prepare_split_kwargs)
        except datasets.exceptions.DatasetGenerationError as err:
            if isinstance(err.__cause__, ScanError):
                raise err.__cause__ from None
            raise
        splits = self.info.splits
        for name in [name for name, split in splits.items() if not split.num_examples]:
            del splits[name]
        skipped = dict(sorted(self._skipped.items()))
        if not splits:
            reasons = "\n".join(skipped.values())
            raise ScanError(f"None of the {len(self.config.cases)} cases gives a slice:\n{reasons}")
        self._fs.write_text(f"{self._output_dir}/skipped.json", json.dumps(skipped))


def order_patients(patients: Iterable[str], seed: int = 0) -> list[str]:
    """Order patients, each once, by a hash of seed and name, which is the same on every machine."""
    return sorted(set(patients), key=lambda patient: hashlib.sha256(f"{seed}:{patient}".encode()).digest())


def split_patients(patients: Iterable[str], seed: int = 0) -> dict[str, list[str]]:
    """Split patients as the paper does: 20 % for testing, 10 % of the rest for validation.

    They are taken in the order of `order_patients`. The test split is rounded, the validation split rounded down but
    not to nothing where two patients are left. 369 patients give 266, 29, 74.

    Args:
        patients: Names of patients; the same name may come up more than once.
        seed: Chooses the order.

    Returns:
        Patients of `"train"`, `"validation"` and `"test"`; with very few patients a split can be empty.
    """
    ordered = order_patients(patients, seed)
    n_test = round(len(ordered) / 5)
    n_rest = len(ordered) - n_test
    n_validation = max(n_rest // 10, 1 if n_rest > 1 else 0)
    return {
        "train": ordered[n_test + n_validation :],
        "validation": ordered[n_test : n_test + n_validation],
        "test": ordered[:n_test],
    }


def fold_patients(patients: Iterable[str], num_folds: int, seed: int = 0) -> list[list[str]]:
    """Deal patients into folds for a cross-validation, in the order of `order_patients`.

    Args:
        patients: Names of patients; the same name may come up more than once.
        num_folds: How many folds.
        seed: Chooses the order.

    Returns:
        The patients of each fold, sorted by name. Each patient is in one fold, and the sizes of folds differ by one at
        most.

    Raises:
        ValueError: If there are fewer than 2 folds, or fewer patients than folds.
    """
    ordered = order_patients(patients, seed)
    if not 2 <= num_folds <= len(ordered):
        raise ValueError(f"`num_folds` must be from 2 to the number of patients, {len(ordered)}, got {num_folds}.")
    return [sorted(ordered[fold::num_folds]) for fold in range(num_folds)]


def _why_no_mask(case: BratsCase) -> str:
    """Return what the file names alone tell against the mask of a case, or nothing."""
    try:
        case.path("seg")
    except ScanError as err:
        return str(err)
    return ""


def _check_complete(cases: list[BratsCase], names: tuple[str, ...]) -> None:
    """Raise for what the file names alone tell, before minutes are spent on reading."""
    problems = []
    for case in cases:
        try:
            for name in names:
                case.path(name)
        except ScanError as err:
            problems.append(str(err))
    if problems:
        more = f"\n... and {len(problems) - 5} more cases" if len(problems) > 5 else ""
        advice = f"\n{_SKIP_ADVICE}" if len(problems) < len(cases) else ""  # else nothing would be left
        raise ScanError("\n".join(problems[:5]) + f"{more}{advice}")


def start_readers(num_proc: int) -> ProcessPoolExecutor:
    """Return processes that end when this one does, even if it is killed and cannot end them."""
    return ProcessPoolExecutor(num_proc, initializer=_end_with_parent)


def _end_with_parent() -> None:
    parent = cast("multiprocessing.Process", multiprocessing.parent_process())

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _read_ahead(pool: ProcessPoolExecutor, cases: list[BratsCase], config: BratsSlicesConfig) -> Iterator[Rows]:
    """Yield the rows of each case in turn, while the processes read the next ones."""
    config = replace(config, modalities=config.columns)  # a copy without the list of all cases, for the processes
    begun: deque[Future[Rows]] = deque()
    for case in cases:
        begun.append(pool.submit(_read, case, config))
        if len(begun) == READ_AHEAD:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _read(case: BratsCase, config: BratsSlicesConfig) -> Rows:
    """Return the rows of a case, all or none, or why it cannot be used."""
    try:
        return list(_rows(case, config))
    except ScanError as err:
        return err


def _rows(case: BratsCase, config: BratsSlicesConfig) -> Iterator[dict[str, Any]]:
    """Yield the rows of one case. Read the mask first: without tumour there may be no need to read the scans."""
    mask = case.read_mask()
    indices = None if config.slices == "head" else _slice_indices(mask, case, config)
    if indices == []:
        return
    scans = case.read_images(config.columns, same_grid_as=mask)
    greys = {name: to_grey(scan) for name, scan in zip(config.columns, scans, strict=True)}
    if indices is None:
        indices = foreground_slices(list(greys.values()), config.plane)
    of_the_case = {
        "case_id": case.case_id,
        "grade": case.grade,
        "head_boxes": {name: head_box([grey], config.plane) for name, grey in greys.items()},
        "spacing_mm": list(scans[0].spacing_mm),
    }
    regions = case.regions
    for index in indices:
        pictures = {name: take_slice(grey, config.plane, index) for name, grey in greys.items()}
        pictures["mask"] = labels = take_slice(mask.voxels, config.plane, index)
        pixels_of = {label_id: np.count_nonzero(labels == label_id) for label_id in regions["WT"]}
        yield {
            **{name: {"path": None, "bytes": encode_png(pixels)} for name, pixels in pictures.items()},
            **of_the_case,
            "slice_index": index,
            **{
                f"{name.lower()}_pixels": sum(pixels_of[label_id] for label_id in label_ids)
                for name, label_ids in regions.items()
            },
        }


def _slice_indices(mask: Volume, case: BratsCase, config: BratsSlicesConfig) -> list[int]:
    """Return the slices that the options choose, as far as the mask tells."""
    axis = PLANES[config.plane]
    n_slices = mask.voxels.shape[axis]
    if config.slices == "all":
        return list(range(n_slices))
    if config.slices == "tumor":
        other_axes = tuple(other for other in range(3) if other != axis)
        tumour = mask.voxels
        if 4 not in case.regions["WT"] and (tumour == 4).any():
            tumour = np.where(tumour == 4, 0, tumour)  # the resection cavity is none
        wt_pixels = np.count_nonzero(tumour, axis=other_axes)
        return np.flatnonzero(wt_pixels >= config.min_tumor_pixels).tolist()
    indices = cast("list[int]", config.slices)  # checked by `__post_init__`
    if indices[-1] >= n_slices:
        raise ScanError(
            f"{mask.name} has {n_slices} {config.plane} slices, there is no slice {indices[-1]}. "
            f"Choose `slices` from 0 to {n_slices - 1}."
        )
    return indices
