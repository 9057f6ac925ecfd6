"""nnU-Net's files: its environment, its raw data set of BraTS scans, the folds, and its label maps with our ids.

Its work is done by `nnunet_worker.py` in processes of its own, because nnU-Net finds its folders by environment
variables. Nothing here needs nnU-Net.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from sam2unet_hf.cases_sam2unet import BratsCase
from sam2unet_hf.finetuning.processes import choose_num_workers
from sam2unet_hf.finetuning.provenance import write_json
from sam2unet_hf.regions_sam2unet import region_levels
from sam2unet_hf.scans_sam2unet import write_nifti


DATASET = "Dataset001_BraTS"  # nnU-Net's rule for names
ENDING = ".nii.gz"


def is_installed() -> bool:
    """Whether nnU-Net can be run."""
    return importlib.util.find_spec("nnunetv2") is not None


def environment(folder: Path, device: str = "cpu") -> dict[str, str]:
    """Return the environment variables that tell nnU-Net its folders, and how many processes it may have.

    On a CPU the training augments in its own process, since others would take its cores.
    """
    names = ("raw", "preprocessed", "results")
    folders = {f"nnUNet_{name}": str(folder.resolve() / name) for name in names}
    num_threads = str(torch.get_num_threads())
    return {**folders, "nnUNet_def_n_proc": num_threads, "nnUNet_n_proc_DA": str(choose_num_workers(device))}


def number_labels(regions: Mapping[str, Sequence[int]]) -> tuple[dict[str, int], dict[int, int]]:
    """Number the label ids of regions from 1 up without gaps, as nnU-Net wants them.

    Ids that are in the same regions have the same number, so that whole tumour alone is a label, not three.

    Returns:
        Region name -> the number of those voxels that are in it and in no region inside it, from the outermost region
        inward, and label id -> number.
    """
    names = [name for level in region_levels(regions) for name in level]
    numbers = {name: number for number, name in enumerate(names, start=1)}
    # Inner regions come last and win.
    return numbers, {label_id: numbers[name] for name in names for label_id in regions[name]}


def describe_labels(regions: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return what `dataset.json` says of labels: plain ones, or nested regions, which nnU-Net trains as such."""
    numbers, number_of = number_labels(regions)
    own = {name: sorted({number_of[label_id] for label_id in regions[name]}) for name in numbers}
    labels = {name: ids[0] if len(ids) == 1 else ids for name, ids in own.items()}
    described: dict[str, Any] = {"labels": {"background": 0, **labels}}
    if any(len(ids) > 1 for ids in own.values()):
        described["regions_class_order"] = list(numbers.values())
    return described


def write_raw(
    folder: Path, cases: Sequence[BratsCase], modalities: Sequence[str], regions: Mapping[str, Sequence[int]]
) -> None:
    """Write scans and masks as nnU-Net's raw data set, on the grids of the scans; those that are there are kept.

    Args:
        folder: That of `environment`.
        cases: They need masks.
        modalities: The channels, in this order.
        regions: What is to be segmented, region name -> label ids.
    """
    raw = folder / "raw" / DATASET
    _, number_of = number_labels(regions)
    for case in cases:
        label_path = raw / "labelsTr" / f"{case.case_id}{ENDING}"
        if label_path.exists():  # written last
            continue
        scans = case.read_images(modalities)
        for channel, scan in enumerate(scans):
            image_path = raw / "imagesTr" / f"{case.case_id}_{channel:04d}{ENDING}"
            # The first scan's grid, because nnU-Net takes no other for the mask.
            write_nifti(image_path, scans[0].to_file_grid(scan.voxels), scans[0].affine, scans[0].header)
        label_ids = case.read_mask(same_grid_as=scans[0]).voxels
        write_nifti(
            label_path, scans[0].to_file_grid(replace_ids(label_ids, number_of)), scans[0].affine, scans[0].header
        )
    dataset = {
        "channel_names": {str(channel): name for channel, name in enumerate(modalities)},
        **describe_labels(regions),
        "numTraining": len(cases),
        "file_ending": ENDING,
    }
    write_json(raw / "dataset.json", dataset, sort_keys=False)


def write_folds(folder: Path, folds: Sequence[Sequence[str]]) -> None:
    """Write the cases that each fold trains on and leaves out, where nnU-Net looks for them once it has planned."""
    splits = [
        {"train": sorted(case for other in folds if other is not own for case in other), "val": list(own)}
        for own in folds
    ]
    write_json(folder / "preprocessed" / DATASET / "splits_final.json", splits)


def read_segmentation(path: Path, regions: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Read a label map of nnU-Net, on the grid of the file, and return it with the label ids that regions write."""
    numbers, _ = number_labels(regions)
    id_of = {numbers[name]: label_id for level in region_levels(regions) for name, label_id in level.items()}
    return replace_ids(np.asarray(nibabel.load(path).dataobj), id_of)


def replace_ids(label_map: np.ndarray, new: Mapping[int, int]) -> np.ndarray:
    """Replace label ids; those without a new one become background."""
    dtype = np.min_scalar_type(max(new.values()))
    replaced = np.zeros(label_map.shape, dtype)
    for old_id, new_id in new.items():
        replaced[label_map == old_id] = new_id
    return replaced


def run_worker(folder: Path, device: str, *words: Any) -> None:
    """Let nnU-Net do a task of `nnunet_worker.py`, and exit if it fails; what it prints goes to its log."""
    script = Path(__file__).with_name("nnunet_worker.py")
    log = folder / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(script), *map(str, words), "--device", device]
    with log.open("a") as output:
        done = subprocess.run(  # nosec B603 # our own script
            command, env={**os.environ, **environment(folder, device)}, stdout=output, stderr=output, check=False
        )
    if done.returncode:
        raise SystemExit(f"nnU-Net could not {words[0]}. The end of {log} says why.")
