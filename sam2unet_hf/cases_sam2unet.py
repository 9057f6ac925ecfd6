"""BraTS and Decathlon layouts: which files make a case."""

import csv
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .labels_sam2unet import NUMBERINGS, numberings_of, region_ids, to_label_ids
from .scans_sam2unet import DECATHLON_ORDER, MODALITIES, ScanError, Volume, check_same_grid, read_volume, read_volumes


logger = logging.getLogger(__name__)

# The endings of the files of a case, in BraTS 2017-2021 and from 2023 on.
_ENDINGS = {**MODALITIES, "seg": ("_seg", "-seg")}
_NAME_OF_ENDING = {ending: name for name, endings in _ENDINGS.items() for ending in endings}
_NIFTI_NAME = re.compile(r"[^.].*\.nii(?:\.gz)?", re.DOTALL | re.IGNORECASE)
_FILE_NAME = re.compile(
    rf"(?P<prefix>[^.].*)(?P<ending>{'|'.join(map(re.escape, _NAME_OF_ENDING))})\.nii(?:\.gz)?",
    re.DOTALL | re.IGNORECASE,
)
_MISNAMED_MASK = re.compile(r"W39_1998\.09\.19_Segm\.nii(?:\.gz)?")  # case 355 of BraTS 2020, as released
_DECATHLON_NAME = re.compile(r"(BRATS_\d+)\.nii(?:\.gz)?", re.IGNORECASE)
_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_NNUNET_NAME = re.compile(r".+_\d{4}\.nii(?:\.gz)?", re.DOTALL | re.IGNORECASE)

_OLD_ENDINGS, _NEW_ENDINGS = (",".join(ending[1:] for ending in year) for year in zip(*_ENDINGS.values(), strict=True))
_LAYOUT = f"""Expected one folder per case, at any depth, with one file per modality:
  BraTS 2017-2021   BraTS20_Training_001/BraTS20_Training_001_{{{_OLD_ENDINGS}}}.nii[.gz]
  BraTS 2023 on     BraTS-GLI-00000-000/BraTS-GLI-00000-000-{{{_NEW_ENDINGS}}}.nii[.gz]
  BraTS on Kaggle   a folder of each of these names, with the file in it
or all modalities of a case in one file, as the Medical Segmentation Decathlon has them:
  Task01_BrainTumour   imagesTr/BRATS_001.nii[.gz] and labelsTr/BRATS_001.nii[.gz]; imagesTs, which has no masks,
                       must be named itself
The scans are free for research after registration: https://www.synapse.org/brats (all years) or
https://www.med.upenn.edu/cbica/brats2020/ (2020). Those of the Decathlon need none: http://medicaldecathlon.com."""

FEW_VALUES = 5  # as many as masks have

_NNUNET_ADVICE = (
    "is in the raw layout of nnU-Net: a file per channel, such as {name}, whose modality only its dataset.json tells. "
    "Give each case a folder of its own and each file its modality, such as "
    f"CASE/CASE{MODALITIES['flair'][0]}.nii.gz, and the mask as CASE/CASE{_ENDINGS['seg'][0]}.nii.gz."
)


@dataclass(frozen=True)
class BratsCase:
    """The files of one scanning session of one patient.

    Args:
        case_id: The prefix its files share, `"BraTS20_Training_001"` for example.
        folder: Where the scans lie.
        files: Path by modality, see `MODALITIES`, and of the mask by `"seg"`; what is missing is absent.
        grade: `"HGG"` or `"LGG"` if a folder name or `name_mapping.csv` tells, else `None`.
        problem: Why the files cannot be told apart, else `None`. Reading such a case raises.
        decathlon: The case is of the Medical Segmentation Decathlon: one file holds all four modalities.
        labels: Which of `labels_sam2unet.NUMBERINGS` its mask may have: one if it was named or the names tell.
    """

    case_id: str
    folder: Path
    files: dict[str, Path]
    grade: str | None = None
    problem: str | None = None
    decathlon: bool = False
    labels: tuple[str, ...] = ("gli2017",)

    @property
    def regions(self) -> dict[str, list[int]]:
        """The label ids of whole tumour (WT), tumour core (TC) and enhancing tumour (ET) in its mask."""
        return region_ids(self.labels)

    @property
    def patient_id(self) -> str:
        """The case id less the timepoint that names have from 2023 on."""
        return patient_of(self.case_id)

    def path(self, name: str) -> Path:
        """Return the file of a modality, or of the mask (`"seg"`).

        Raises:
            ScanError: If it is missing, or if the files of the case cannot be told apart.
        """
        if self.problem:
            raise ScanError(f"case {self.case_id}: {self.problem}")
        if name not in self.files:
            folder = self.folder
            endings: tuple[str, ...] = _ENDINGS.get(name, ())
            if self.decathlon:
                folder, endings = _label_folder(folder) if name == "seg" else folder, ("",)
            expected = " or ".join(f"{self.case_id}{ending}.nii[.gz]" for ending in endings)
            what = "mask" if name == "seg" else f"{name} scan"
            hint = " The challenge's validation and test cases come without masks." if name == "seg" else ""
            raise ScanError(
                f"case {self.case_id}: no {what} in `{folder}`, expected {expected}. Download the case again.{hint}"
            )
        return self.files[name]

    def read_images(self, modalities: Sequence[str], same_grid_as: Volume | None = None) -> list[Volume]:
        """Read several modalities at once: a file that holds them all is read and decompressed once.

        Args:
            modalities: One or more of `MODALITIES`.
            same_grid_as: Another volume of the case. The modalities must cover the same voxels in space as it does,
                or as the first of them if it is left out.

        Raises:
            ScanError: If a file is missing, damaged or on another grid, or if one of the Decathlon does not hold
                four volumes.
        """
        paths = [self.path(modality) for modality in modalities]
        if self.decathlon:
            volumes = read_volumes(paths[0], self.case_id, modalities)
        else:
            volumes = [read_volume(path, self.case_id) for path in paths]
        for volume in volumes:
            check_same_grid(volume, same_grid_as or volumes[0])
        return volumes

    def read_mask(self, same_grid_as: Volume | None = None) -> Volume:
        """Read the reference, the expert's mask, as `uint8` label ids: 0 background, 1 NCR/NET, 2 ED, 3 ET.

        Where the challenge has a fourth label, its id is 4: the resection cavity of treated tumours, which belongs to
        none of `regions`, or the cysts of children's tumours, which belong to WT and TC.

        Args:
            same_grid_as: Another volume of the case, which must cover the same voxels in space.

        Raises:
            NumberingError: If the names do not tell what the labels mean, or promise others.
            ScanError: If the file is missing, damaged, on another grid or holds labels of no challenge.
        """
        volume = read_volume(self.path("seg"), self.case_id)
        if same_grid_as is not None:
            check_same_grid(volume, same_grid_as)
        return replace(volume, voxels=to_label_ids(volume.voxels, volume.name, self.labels))


def modality_of(path: str | os.PathLike) -> str | None:
    """Return the modality of a scan, or `"seg"` of a mask, if the name of the file tells it as those of BraTS do."""
    match = _FILE_NAME.fullmatch(Path(path).name)
    return _NAME_OF_ENDING[match["ending"].lower()] if match else None


def count_dicom_files(path: str | os.PathLike) -> int:
    """Count the DICOM files below a folder, or whether a file is one, by suffix, or without one by the first bytes."""
    files = [Path(path)]
    if Path(path).is_dir():
        files = [Path(folder, name) for folder, _, names in os.walk(os.fspath(path)) for name in names]
    return sum(file.name.lower().endswith(_DICOM_SUFFIXES) or _starts_as_dicom(file) for file in files)


def _starts_as_dicom(path: Path) -> bool:
    """Whether a file without suffix, as scanners name them, has the first bytes of DICOM."""
    if re.search(r"\.[A-Za-z]", path.name) or not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def patient_of(case_id: str) -> str:
    """Return the case id less the timepoint: `"BraTS-GLI-00001-001"` is the second scan of `"BraTS-GLI-00001"`."""
    return re.sub(r"\A(BraTS-.+-\d+)-\d{3}\Z", r"\1", case_id)


def find_cases(root: str | os.PathLike, labels: str | None = None) -> list[BratsCase]:
    """Find the BraTS cases below a folder, or the one that the folder itself is.

    A file belongs to a case if its name is exactly `{prefix}{ending}.nii` or `.nii.gz`, in lower or upper case, where
    the prefix is the name of its folder or, in a renamed folder, the one prefix that the scans there share. A folder
    of such a name with one NIfTI file in it, as archives on Kaggle have them, counts as that file. Predictions, brain
    masks and hidden files have other names and are not looked at. A plain file is taken before its gzipped copy.

    In the Medical Segmentation Decathlon a case is a file `imagesTr/BRATS_{number}.nii.gz` and its mask, of the same
    name, in `labelsTr`. The cases in `imagesTs` have no masks, of which a data set could not be built: they are found
    only if `root` is that folder itself, or one of the files in it.

    Args:
        root: Any folder above the cases, or a scan of the Decathlon. Hidden folders are left out, links are followed.
        labels: What the labels of the masks mean, one of `labels_sam2unet.NUMBERINGS`, such as `"ped2024"`. Default:
            what the names tell, of case, folder and file.

    Returns:
        Cases sorted by id. A case with missing files is listed too: reading it says what it lacks.

    Raises:
        FileNotFoundError: If there is no such folder, or no case in it.
        ValueError: If `labels` names no numbering.
    """
    if labels is not None and labels not in NUMBERINGS:
        raise ValueError(f"`labels` must be one of {', '.join(NUMBERINGS)}, got {labels!r}.")
    root = Path(os.path.abspath(os.path.expanduser(root)))
    if root.is_file() and _DECATHLON_NAME.fullmatch(root.name):
        cases = [case for case in _decathlon_cases(root.parent, {root.name: root}) if root in case.files.values()]
        return [replace(case, labels=(labels,)) for case in cases] if labels else cases
    if not root.is_dir():
        raise FileNotFoundError(f"No folder `{root}`. Give the folder that holds the BraTS cases.\n{_LAYOUT}")
    cases, n_nifti, nnunet_problem = [], 0, ""
    for folder, files in _walk(root):
        n_nifti += len(files)
        case = _case_in(folder, files)
        if case:
            cases.append(case)
        if folder.name == "imagesTr" or (folder == root and folder.name == "imagesTs"):
            cases.extend(_decathlon_cases(folder, files))
            nnunet_problem = nnunet_problem or _nnunet_problem(folder, files)
    if not cases:
        found = f": {nnunet_problem}" if nnunet_problem else f" ({n_nifti} other NIfTI files there)."
        if n_dicom := 0 if n_nifti else count_dicom_files(root):
            there = "1 DICOM file is" if n_dicom == 1 else f"{n_dicom} DICOM files are"
            found = f". {there} there: convert them to NIfTI first, e.g. with dcm2niix."
        raise FileNotFoundError(f"No BraTS case in `{root}`{found}\n{_LAYOUT}")

    counts = Counter(case.case_id for case in cases)
    remedy = "Keep one of them."
    if min(counts.values()) > 1:
        remedy += " Was a folder too high named? Each case is found in several."
    grades = _grades_from_tables({root, *(case.folder.parent for case in cases)})
    for i, case in enumerate(cases):
        parts = (root.name, *case.folder.relative_to(root).parts)
        grade = next((part.upper() for part in reversed(parts) if part.upper() in ("HGG", "LGG")), None)
        problem = case.problem
        if counts[case.case_id] > 1:
            problem = f"found in {counts[case.case_id]} folders, `{case.folder}` is one. {remedy}"
        told = (labels,) if labels else case.labels
        cases[i] = replace(case, grade=grade or grades.get(case.case_id), problem=problem, labels=told)
    return sorted(cases, key=lambda case: (case.case_id, case.folder))


def _warn(err: OSError) -> None:
    logger.warning("Cannot look into `%s` (%s).", err.filename, err.strerror)


def _list(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as err:
        _warn(err)
        return []


def _walk(root: Path) -> Iterator[tuple[Path, dict[str, Path]]]:
    """Yield folders and the NIfTI files in them by name, following links but visiting each folder once.

    A folder that is named as a file of a case and holds one NIfTI file stands for that file.
    """
    seen = set()
    for path, subfolders, names in os.walk(root, onerror=_warn, followlinks=True):
        folder, real = Path(path), os.path.realpath(path)
        subfolders[:] = [] if real in seen else sorted(name for name in subfolders if not name.startswith("."))
        if real in seen:
            continue
        seen.add(real)
        files = {name: folder / name for name in names if _NIFTI_NAME.fullmatch(name)}
        for name in filter(_FILE_NAME.fullmatch, subfolders):
            inside = [other for other in _list(folder / name) if _NIFTI_NAME.fullmatch(other)]
            if len(inside) == 1 and (folder / name / inside[0]).is_file():
                files[name] = folder / name / inside[0]
        subfolders[:] = [name for name in subfolders if name not in files]
        yield folder, dict(sorted(files.items()))


def _case_in(folder: Path, files_there: dict[str, Path]) -> BratsCase | None:
    """Group the NIfTI files of one folder into a case, or return `None` if it is no case folder."""
    found = [match for match in map(_FILE_NAME.fullmatch, files_there) if match]
    name_of = {match: _NAME_OF_ENDING[match["ending"].lower()] for match in found}
    prefixes = sorted({match["prefix"] for match in found if name_of[match] != "seg"})
    if any(match["prefix"] == folder.name for match in found):
        prefixes = [folder.name]
    if not prefixes:
        return None
    problem = None
    if len(prefixes) > 1:
        problem = f"`{folder}` holds scans of {', '.join(prefixes)}. Give each case a folder of its own."
        return BratsCase(folder.name, folder, {}, problem=problem)

    (case_id,) = prefixes
    files: dict[str, Path] = {}
    taken: dict[str, str] = {}
    new_ending = False
    for match in found:  # sorted, so that x.nii comes before x.nii.gz
        if match["prefix"] != case_id:
            continue
        name = name_of[match]
        first = taken.setdefault(name, match[0])
        if first == match[0]:
            files[name] = files_there[first]
            new_ending |= name == "seg" and match["ending"].startswith("-")
        elif match[0].lower() == f"{first}.gz".lower():
            logger.warning("`%s` is there plain and gzipped, taking the plain file.", folder / first)
        else:
            problem = f"`{folder / first}` and `{match[0]}` are both {name} files. Keep one of them."
    if "seg" not in files:
        files.update(("seg", path) for name, path in files_there.items() if _MISNAMED_MASK.fullmatch(name))
    labels = numberings_of(case_id, new_ending, [parent.name for parent in (folder, *folder.parents)])
    return BratsCase(case_id, folder, files, problem=problem, labels=labels)


def _decathlon_cases(folder: Path, scans: dict[str, Path]) -> list[BratsCase]:
    """Pair the scans in an image folder of the Decathlon with the masks in the label folder beside it."""
    folder_of_labels = _label_folder(folder)
    masks = next(_walk(folder_of_labels), (folder_of_labels, {}))[1] if folder_of_labels.is_dir() else {}
    files: defaultdict[str, dict[str, Path]] = defaultdict(dict)
    for contents, files_there in ((DECATHLON_ORDER, scans), (("seg",), masks)):
        for match in filter(None, map(_DECATHLON_NAME.fullmatch, sorted(files_there))):  # x.nii before x.nii.gz
            taken = files[match[1]].get(contents[0])
            if taken:
                logger.warning("`%s` is there plain and gzipped, taking the plain file.", taken)
            else:
                files[match[1]].update(dict.fromkeys(contents, files_there[match[0]]))
    problem = _nnunet_problem(folder, scans)
    return [
        BratsCase(
            *(case_id, folder, files[case_id]),
            problem=problem if problem and "flair" not in files[case_id] else None,
            decathlon=True,
            labels=("decathlon",),
        )
        for case_id in sorted(files)
    ]


def _nnunet_problem(folder: Path, files_there: dict[str, Path]) -> str:
    """Return what to do with an image folder of nnU-Net, or nothing if it is none."""
    names = [name for name in files_there if _NNUNET_NAME.fullmatch(name) and not _DECATHLON_NAME.fullmatch(name)]
    return f"`{folder}` {_NNUNET_ADVICE.format(name=names[0])}" if names else ""


def _label_folder(image_folder: Path) -> Path:
    return image_folder.with_name(f"labels{image_folder.name.removeprefix('images')}")


def _grades_from_tables(folders: set[Path]) -> dict[str, str]:
    """Read the grade of every case id from the `name_mapping.csv` files in these folders."""
    grades = {}
    for folder in sorted(folders):
        path = folder / "name_mapping.csv"
        if path.is_file():
            try:
                with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
                    rows = list(csv.DictReader(file))
            except (OSError, csv.Error) as err:
                logger.warning("Cannot read grades from `%s` (%s).", path, err)
                continue
            for row in rows:
                if row.get("Grade") in ("HGG", "LGG"):
                    grades.update({row[column]: row["Grade"] for column in row if str(column).startswith("BraTS")})
    return grades


def read_scans(
    case: str | os.PathLike | BratsCase | Mapping[str, str | os.PathLike], modalities: Sequence[str]
) -> list[Volume]:
    """Read the scans that a model takes of a patient.

    Args:
        case: Folder of a case, a case of [`find_cases`], the path of a scan if there is one modality, or a path for
            each modality.
        modalities: Which scans, in this order.

    Raises:
        ScanError: If a scan is missing, damaged or on another grid than the first.
        FileNotFoundError: If there is no case in a folder.
        ValueError: If there are several, or no path for a modality.
    """
    if isinstance(case, (str, os.PathLike)) and Path(case).is_dir():
        cases = find_cases(case)
        if len(cases) > 1:
            raise ValueError(f"`{case}` holds {len(cases)} cases. Pass them one by one: `find_cases` lists them.")
        (case,) = cases
    if isinstance(case, (str, os.PathLike)):
        if len(modalities) > 1:
            raise ValueError(
                f"The model segments {', '.join(modalities)} together, got the one file `{case}`. Pass a "
                f"folder, or a path for each: {{'{modalities[0]}': ..., ...}}."
            )
        case = {modalities[0]: case}
    if not isinstance(case, Mapping):
        # Do not ask for a `BratsCase`: code that was loaded from a checkpoint has its own class of this name.
        scans = case.read_images(modalities)
    else:
        if missing := [name for name in modalities if name not in case]:
            raise ValueError(f"`case` must give a path for each of {list(modalities)}, {missing} missing.")
        scans = [read_volume(case[name]) for name in modalities]
    for scan, modality in zip(scans, modalities, strict=True):
        check_same_grid(scan, scans[0])
        _warn_of_few_values(scan, modality)
    return scans


def _warn_of_few_values(scan: Volume, modality: str) -> None:
    """Warn of a scan that may be a mask."""
    # Look at a part first, because all voxels take a second.
    if (
        len(np.unique(scan.voxels[::5, ::5, ::5])) <= FEW_VALUES
        and (count := len(np.unique(scan.voxels))) <= FEW_VALUES
    ):
        logger.warning("%s: %s holds only %d value%s, as a mask has.", scan.name, modality, count, "s" * (count != 1))


__all__ = ["BratsCase", "find_cases", "read_scans"]
