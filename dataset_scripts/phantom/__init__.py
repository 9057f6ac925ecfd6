"""Phantom cohort: brain tumour scans that look like BraTS and belong to nobody."""

from .cohort import VERSION, make_phantom_case, write_phantom_cohort


__all__ = ["VERSION", "make_phantom_case", "write_phantom_cohort"]
