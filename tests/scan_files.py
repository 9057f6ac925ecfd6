"""Scans and masks of a few voxels, shared by the tests."""

import nibabel as nib
import numpy as np


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
