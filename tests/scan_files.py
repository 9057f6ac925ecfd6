"""Scans and masks of a few voxels, shared by the tests."""

import nibabel as nib
import numpy as np
from common import BRATS_REGIONS

from sam2unet_hf.scans_sam2unet import read_volume
from sam2unet_hf.volume import VolumeSegmentation


SHAPE = (8, 9, 5)
# Three ways to store one box: voxels of 1.5 x 2 x 3 mm, x from -5.25 to 5.25, y from -8 to 8, z from -6 to 6.
LPS = np.array([[-1.5, 0, 0, 5.25], [0, -2, 0, 8], [0, 0, 3, -6], [0, 0, 0, 1]])
RAS = np.array([[1.5, 0, 0, -5.25], [0, 2, 0, -8], [0, 0, 3, -6], [0, 0, 0, 1]])
SAL = np.array([[0, 0, -1.5, 5.25], [0, 2, 0, -8], [3, 0, 0, -6], [0, 0, 0, 1]])


def save(path, voxels, affine=LPS, image_class=nib.Nifti1Image):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image_class(voxels, affine), path)
    return path


def make_scan(seed=0):
    voxels = np.random.default_rng(seed).integers(100, 900, SHAPE).astype(np.int16)
    voxels[[0, -1]] = 0
    return voxels


def make_mask(values=(1, 2, 4)):
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[3:6, 4, 2] = values
    return voxels


def make_segmentation(labels, tmp_path, axes="LPS", spacing=(1.0, 1.0, 1.0), regions=BRATS_REGIONS, rotation=None):
    """Make a segmentation from labels with the axes (left, posterior, superior), on a file with other axes."""
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    if rotation is not None:
        affine[:3, :3] = rotation @ affine[:3, :3]
    transform = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("LPS"), nib.orientations.axcodes2ornt(axes)
    )
    on_file = nib.orientations.apply_orientation(labels, transform)
    path = tmp_path / f"{axes}_flair.nii.gz"
    nib.save(nib.Nifti1Image(on_file, affine @ nib.orientations.inv_ornt_aff(transform, labels.shape)), path)
    return VolumeSegmentation(on_file, regions, read_volume(path))


def make_tumours():
    """A tumour with two enhancing parts in one core, and a second tumour of two parts that touch at a corner."""
    labels = np.zeros((40, 30, 12), np.uint8)
    labels[2:22, 3:15, 2:9] = 2
    labels[4:18, 5:12, 3:8] = 1
    labels[5:7, 6:8, 4:6] = labels[10:16, 7:11, 4:7] = 3
    labels[28:31, 20:22, 5] = 2
    labels[31, 22, 6] = 3
    return labels
