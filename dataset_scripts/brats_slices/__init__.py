"""2-D slices of BraTS scans as a data set.

In Python use `BratsSlices`, on the command line `python -m dataset_scripts.brats_slices`.
"""

from .brats_slices import CITATION, BratsSlices, BratsSlicesConfig, citation_of, fold_patients, split_patients


__all__ = ["CITATION", "BratsSlices", "BratsSlicesConfig", "citation_of", "fold_patients", "split_patients"]
