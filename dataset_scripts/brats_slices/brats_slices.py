"""The builder of the BraTS slice data set."""

import functools
import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import datasets
import numpy as np

from sam2unet_hf.cases_sam2unet import BratsCase, find_cases
from sam2unet_hf.scans_sam2unet import PLANES, ScanError, Volume, check_modalities, intensity_window, take_slice

from .citations import CITATION
from .png import encode_png
from .readers import CaseReaders


logger = logging.getLogger(__name__)

_SKIP_ADVICE = "Or leave such cases out: `skip_bad_cases=True` (`--skip_bad_cases`)."


@dataclass
class BratsSlicesConfig(datasets.BuilderConfig):
    """Options of `BratsSlices`.

    Attributes:
        modalities: One of `sam2unet_hf.scans_sam2unet.MODALITIES` for grey images, or three as red, green and blue.
        slices: Index of a slice, a list of them, `"all"`, or `"tumor"` for the slices that show enough of it. See
            `sam2unet_hf.scans_sam2unet.take_slice` for where each plane counts from. 95 is the slice of the paper.
        min_tumor_pixels: How many pixels of tumour a slice must show; read with `slices="tumor"` alone.
        plane: `"axial"`, `"coronal"` or `"sagittal"`.
        seed: Chooses the split.
        skip_bad_cases: Leave out and report the cases that cannot be used, instead of raising.
    """

    modalities: str | list[str] | tuple[str, ...] = ("flair",)
    slices: int | str | list[int] | tuple[int, ...] = 95
    min_tumor_pixels: int = 1
    plane: str = "axial"
    seed: int = 0
    skip_bad_cases: bool = False

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.modalities, str):
            self.modalities = [self.modalities]
        self.modalities = list(self.modalities)
        check_modalities(self.modalities)
        if self.slices not in ("all", "tumor"):
            indices = self.slices if isinstance(self.slices, (list, tuple, range)) else [self.slices]
            if not indices or not all(type(index) is int and index >= 0 for index in indices):
                raise ValueError(
                    f'`slices` must be an index from 0 on, a list of them, "all" or "tumor", got {self.slices!r}.'
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
        return find_cases(self.data_dir)

    def create_config_id(self, config_kwargs: dict, custom_features: datasets.Features | None = None) -> str:
        """Name the cache folder after the options and the scans found, so that changed scans make a new build."""
        names = ("modalities", "slices", "min_tumor_pixels", "plane", "seed", "skip_bad_cases")
        options = {name: getattr(self, name) for name in names}
        return super().create_config_id({**config_kwargs, **options, "scans": self._fingerprint()}, custom_features)

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for case in self.cases:
            digest.update(repr((case.case_id, case.grade, case.problem)).encode())
            for name in (*self.modalities, "seg"):
                if name in case.files:
                    path = case.files[name]
                    # Take those of a dangling link itself; the error of reading it names the case.
                    stat = path.stat() if path.exists() else path.lstat()
                    digest.update(repr((name, path.name, stat.st_size, stat.st_mtime_ns)).encode())
        return digest.hexdigest()


class BratsSlices(datasets.GeneratorBasedBuilder):
    """2-D slices of BraTS scans with the experts' masks, split by patient.

    Each row holds `image` (8-bit, grey or three modalities as RGB), `mask` (label ids 0 background, 1 NCR/NET, 2 ED,
    3 ET), `case_id`, `slice_index`, `grade` (`"HGG"`, `"LGG"` or `None`) and the number of pixels of whole tumour
    (labels 1, 2, 3), tumour core (1, 3) and enhancing tumour (3).

    Images are upright and one voxel per pixel: axial slices show the front at the top and coronal ones the head, both
    with the patient's left at the right; sagittal slices show the head at the top and the front at the left.
    Intensities are scaled per scan, see `sam2unet_hf.scans_sam2unet.intensity_window`.

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
        ValueError: If an option has an invalid value.
        ScanError: From `download_and_prepare`, if a case cannot be used and `skip_bad_cases` is false.
    """

    VERSION = datasets.Version("1.0.0")  # part of the cache folder: raise it whenever the rows change
    BUILDER_CONFIG_CLASS = BratsSlicesConfig
    config: BratsSlicesConfig
    _readers: CaseReaders[list[dict[str, Any]] | ScanError] | None = None

    @property
    def skipped_cases(self) -> dict[str, str]:
        """Why cases have no rows, by case id. Complete once the data set is prepared; the cache keeps it."""
        folder = f"{self._output_dir}/skipped"
        paths = sorted(self._fs.ls(folder, detail=False)) if self._fs.exists(folder) else []
        return {path.rsplit("/", 1)[1].removesuffix(".txt"): self._fs.read_text(path) for path in paths}

    def download_and_prepare(self, *args, num_proc: int | None = None, **kwargs) -> None:
        """Build the data set as `datasets.DatasetBuilder` does, and warn of every case that has no rows.

        Args:
            *args: As in `datasets`.
            num_proc: Processes that read cases, ahead of the one that writes. Left to `datasets`, they would start
                anew for each split, each with its share of the cases.
            **kwargs: As in `datasets`.
        """
        if num_proc is None or num_proc <= 1:
            super().download_and_prepare(*args, **kwargs)
        else:
            # A copy of the options goes to the processes, without the list of all cases.
            self._readers = CaseReaders(num_proc, functools.partial(_read, config=replace(self.config)))
            try:
                super().download_and_prepare(*args, **kwargs)
            finally:
                self._readers.close()
                self._readers = None
        for reason in self.skipped_cases.values():
            logger.warning("Left out: %s", reason)

    def _info(self) -> datasets.DatasetInfo:
        features = {
            "image": datasets.Image(),
            "mask": datasets.Image(),
            "case_id": datasets.Value("string"),
            "slice_index": datasets.Value("int32"),
            "grade": datasets.Value("string"),
            "wt_pixels": datasets.Value("int32"),
            "tc_pixels": datasets.Value("int32"),
            "et_pixels": datasets.Value("int32"),
        }
        return datasets.DatasetInfo(
            description="2-D slices of BraTS scans with expert masks of the tumour.",
            features=datasets.Features(features),
            homepage="https://www.synapse.org/brats",
            citation=CITATION,
        )

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        """Split all the cases found, so that a bad one does not move the others; empty splits are left out."""
        cases = self.config.cases
        if not self.config.skip_bad_cases:
            _check_complete(cases, (*self.config.modalities, "seg"))
        split_of = {
            patient: split
            for split, patients in split_patients((case.patient_id for case in cases), self.config.seed).items()
            for patient in patients
        }
        generators = []
        for split in (datasets.Split.TRAIN, datasets.Split.VALIDATION, datasets.Split.TEST):
            cases_of_split = [case for case in cases if split_of[case.patient_id] == split]
            if cases_of_split:
                generators.append(datasets.SplitGenerator(split, gen_kwargs={"cases": cases_of_split}))
                if self._readers is not None:
                    self._readers.expect(cases_of_split)
        return generators

    def _generate_examples(self, cases: list[BratsCase]) -> Iterator[tuple[str, dict[str, Any]]]:
        for case in cases:
            rows = _read(case, self.config) if self._readers is None else self._readers.read(case)
            if isinstance(rows, ScanError):
                if not self.config.skip_bad_cases:
                    raise ScanError(f"{rows} {_SKIP_ADVICE}") from rows
                self._note_skipped(case, str(rows))
                continue
            if not rows:
                reason = f"no {self.config.plane} slice shows {self.config.min_tumor_pixels} or more pixels of tumour"
                self._note_skipped(case, f"case {case.case_id}: {reason}.")
            for row in rows:
                yield f"{case.case_id}/{row['slice_index']:03d}", row

    def _note_skipped(self, case: BratsCase, text: str) -> None:
        """Write the reason to a file beside the data, so that a later process finds it in the cache."""
        path = f"{self._output_dir}/skipped/{case.case_id}.txt"
        self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        self._fs.write_text(path, text)

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
        if not splits:
            reasons = "\n".join(self.skipped_cases.values())
            raise ScanError(f"None of the {len(self.config.cases)} cases gives a slice:\n{reasons}")


def split_patients(patients: Iterable[str], seed: int = 0) -> dict[str, list[str]]:
    """Split patients as the paper does: 20 % for testing, 10 % of the rest for validation.

    Patients are ordered by a hash of seed and name, which is the same on every machine. The test split is rounded,
    the validation split rounded down but not to nothing where two patients are left. 369 patients give 266, 29, 74.

    Args:
        patients: Names of patients; the same name may come up more than once.
        seed: Chooses the order.

    Returns:
        Patients of `"train"`, `"validation"` and `"test"`; with very few patients a split can be empty.
    """
    ordered = sorted(set(patients), key=lambda patient: hashlib.sha256(f"{seed}:{patient}".encode()).digest())
    n_test = round(len(ordered) / 5)
    n_rest = len(ordered) - n_test
    n_validation = max(n_rest // 10, 1 if n_rest > 1 else 0)
    return {
        "train": ordered[n_test + n_validation :],
        "validation": ordered[n_test : n_test + n_validation],
        "test": ordered[:n_test],
    }


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
        raise ScanError("\n".join(problems[:5]) + f"{more}\n{_SKIP_ADVICE}")


def _read(case: BratsCase, config: BratsSlicesConfig) -> list[dict[str, Any]] | ScanError:
    """Return the rows of a case, all or none, or why it cannot be used."""
    try:
        return list(_rows(case, config))
    except ScanError as err:
        return err


def _rows(case: BratsCase, config: BratsSlicesConfig) -> Iterator[dict[str, Any]]:
    """Yield the rows of one case. Read the mask first: without tumour there may be no need to read the scans."""
    mask = case.read_mask()
    indices = _slice_indices(mask, config)
    if not indices:
        return
    scans = case.read_images(config.modalities, same_grid_as=mask)
    windows = [intensity_window(scan) for scan in scans]
    for index in indices:
        channels = [
            window.apply(take_slice(scan.voxels, config.plane, index))
            for scan, window in zip(scans, windows, strict=True)
        ]
        labels = take_slice(mask.voxels, config.plane, index)
        _, ncr, ed, et = np.bincount(labels.ravel(), minlength=4).tolist()
        yield {
            "image": {"path": None, "bytes": encode_png(np.stack(channels, axis=-1))},
            "mask": {"path": None, "bytes": encode_png(labels[..., None])},
            "case_id": case.case_id,
            "slice_index": index,
            "grade": case.grade,
            "wt_pixels": ncr + ed + et,
            "tc_pixels": ncr + et,
            "et_pixels": et,
        }


def _slice_indices(mask: Volume, config: BratsSlicesConfig) -> list[int]:
    axis = PLANES[config.plane]
    n_slices = mask.voxels.shape[axis]
    if config.slices == "all":
        return list(range(n_slices))
    if config.slices == "tumor":
        other_axes = tuple(other for other in range(3) if other != axis)
        wt_pixels = np.count_nonzero(mask.voxels, axis=other_axes)
        return np.flatnonzero(wt_pixels >= config.min_tumor_pixels).tolist()
    indices = cast("list[int]", config.slices)  # checked by `__post_init__`
    if indices[-1] >= n_slices:
        raise ScanError(
            f"{mask.name} has {n_slices} {config.plane} slices, there is no slice {indices[-1]}. "
            f"Choose `slices` from 0 to {n_slices - 1}."
        )
    return indices
