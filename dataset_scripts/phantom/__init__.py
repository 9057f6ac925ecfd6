"""Phantom cohort: brain tumour scans that look like BraTS and belong to nobody."""

from .cohort import NUM_PATIENTS, VERSION, is_phantom, make_phantom_case, write_phantom_cohort


__all__ = ["NUM_PATIENTS", "VERSION", "is_phantom", "make_phantom_case", "write_phantom_cohort"]
