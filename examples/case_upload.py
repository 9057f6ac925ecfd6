"""Uploaded files of the app: one case from scans of any name, and the phantom example."""

import atexit
import contextlib
import functools
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataset_scripts.phantom import NUM_PATIENTS, make_phantom_case, write_phantom_cohort
from sam2unet_hf.cases_sam2unet import FEW_VALUES, BratsCase, find_cases
from sam2unet_hf.nifti_sam2unet import open_nifti, read_header
from sam2unet_hf.scans_sam2unet import MODALITIES, ScanError, read_volume, write_nifti


ENDINGS = "|".join(ending for endings in MODALITIES.values() for ending in endings)
SCAN_NAME = re.compile(rf"(.+)(?:{ENDINGS})\.nii(?:\.gz)?", re.IGNORECASE)
DECATHLON_NAME = re.compile(r"(BRATS_\d+)\.nii(?:\.gz)?", re.IGNORECASE)
EARLIER_SHARE = 0.4  # of the phantom's tumour at the earlier time


def patient_in(name: str) -> str | None:
    """Return the patient that the name of a scan tells, if it is one of BraTS or of the Decathlon."""
    match = SCAN_NAME.fullmatch(name) or DECATHLON_NAME.fullmatch(name)
    return None if match is None else match[1]


def folder_of(scan: Path) -> str:
    """Return the folder of a scan or mask in its case: those of the Decathlon have the same name, in two folders."""
    if not DECATHLON_NAME.fullmatch(scan.name):
        return ""
    with open_nifti(scan, scan.name) as file:
        return "imagesTr" if len(read_header(file, scan.name).get_data_shape()) > 3 else "labelsTr"


def gather_case(paths: Sequence[str], modalities: Sequence[str], folder: Path) -> BratsCase:
    """Link uploaded files in a folder as one case: scans under their BraTS names, or one scan for one modality."""
    scans = [Path(path) for path in paths if path.lower().endswith((".nii", ".nii.gz"))]
    if not scans:
        raise ValueError("No scan among the files. Upload files that end in .nii or .nii.gz.")
    patients = sorted({patient for scan in scans if (patient := patient_in(scan.name)) is not None})
    if len(patients) > 1:
        raise ValueError(f"The files are of {len(patients)} patients: {', '.join(patients)}. Upload those of one.")
    for scan in scans:
        link = folder / folder_of(scan) / scan.name
        if link.exists():
            raise ValueError(f"Two files are named {scan.name}. Upload each scan of one patient once.")
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(scan.resolve())
    try:
        return find_cases(folder)[0]
    except FileNotFoundError:
        if len(scans) > 1 or len(modalities) > 1:
            raise ValueError(
                f"The model takes {', '.join(modalities)}. Upload them under their BraTS names, such as "
                f"Case_{modalities[0]}.nii.gz, got {', '.join(scan.name for scan in scans)}."
            ) from None
        check_is_scan(link)
        return BratsCase(re.sub(r"\.nii(\.gz)?$", "", link.name), folder, {modalities[0]: link})


def check_is_scan(path: Path) -> None:
    """Refuse a file that holds as few values as masks do; one that cannot be read is told of when it is segmented."""
    with contextlib.suppress(ScanError):
        num_values = len(np.unique(read_volume(path).voxels))
        if num_values <= FEW_VALUES:
            raise ValueError(
                f"{path.name} is no scan: it holds {num_values} different values, as a mask does. Upload the scans of "
                "the patient under their BraTS names, and the mask with them as Case_seg.nii.gz."
            )


def explain_upload(err: Exception, folder: Path) -> str:
    """Return the text of an error in words for one who uploads files, and without the paths of the server."""
    text = str(err).replace(f"{folder}/", "").replace(str(folder), "the upload")
    return text.replace("Download the case again.", "Upload it together with the others.")


@functools.cache
def phantom_files() -> tuple[list[str], list[str]]:
    """Draw a phantom patient once, the first that the examples do not train on, as it is and at an earlier time.

    Returns:
        The files of the scan, and those of the earlier one, in which the tumour is smaller.
    """
    folder = Path(tempfile.mkdtemp(prefix="phantom_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    number = NUM_PATIENTS + 1
    files = sorted(write_phantom_cohort(folder / "cohort", num_patients=1, first=number).glob("*/*"))
    affine, earlier = read_volume(files[0]).affine, []
    for suffix, volume in make_phantom_case([0, number], tumour_growth=EARLIER_SHARE).items():
        if suffix != "seg":
            earlier.append(folder / "earlier" / f"Phantom_{number:03d}_{suffix}.nii.gz")
            write_nifti(earlier[-1], volume, affine)
    return [str(path) for path in files], [str(path) for path in earlier]
