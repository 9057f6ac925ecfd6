"""2-D slices of BraTS scans as a data set.

In Python use `BratsSlices`, on the command line `python -m dataset_scripts.brats_slices`.
"""

from .brats_slices import BratsSlices, BratsSlicesConfig, split_patients
from .citations import CITATION


__all__ = ["CITATION", "BratsSlices", "BratsSlicesConfig", "split_patients"]
