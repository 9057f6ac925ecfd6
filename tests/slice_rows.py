"""Slices of scans made by hand, as the builder writes them: a column of grey images per modality."""

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage


MODALITIES = ("flair", "t1ce")
COUNT, TEXT = Value("int32"), Value("string")


def pixel(case, modality, index):
    """The value of all pixels of a slice but those of its tumour."""
    return 1 + 60 * "abc".index(case) + 20 * MODALITIES.index(modality) + index


def make_slices(shown, size=(64, 64), tumour=()):
    """Rows of the slices `shown`, by case of one letter; those in `tumour`, `(case, slice)`, show one."""
    columns = {name: [] for name in (*MODALITIES, "mask", "case_id", "slice_index", "wt_pixels", "head_boxes")}
    for case, indices in shown.items():
        for index in indices:
            mask = np.zeros(size, np.uint8)
            if (case, index) in tumour:
                mask[10:30, 20:50] = 2
            for modality in MODALITIES:
                grey = np.where(mask > 0, 255, pixel(case, modality, index)).astype(np.uint8)
                columns[modality].append(PILImage.fromarray(grey))
            columns["mask"].append(PILImage.fromarray(mask))
            columns["case_id"].append(case)
            columns["slice_index"].append(index)
            columns["wt_pixels"].append(int((mask > 0).sum()))
            shift = "abc".index(case)
            columns["head_boxes"].append({"flair": [8 + shift, 4, 50, 60], "t1ce": [10, 2 + shift, 55 + shift, 58]})
    types = {name: Image() for name in (*MODALITIES, "mask")}
    types |= {"case_id": TEXT, "slice_index": COUNT, "wt_pixels": COUNT}
    types["head_boxes"] = {name: List(COUNT, length=4) for name in MODALITIES}
    return Dataset.from_dict(columns, features=Features(types))
