"""Base class of the `evaluate` modules for volumes, and [`VolumeScores`], which averages the scores of patients."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Features, Value
from datasets import List as ListFeature

from .streaming_metric import StreamingMetric
from .volume_functional import to_regions


BRATS_CITATION = """
    @article{menze2015brats,
        author = {Menze, Bjoern H. and Jakab, Andras and Bauer, Stefan and others},
        title = {The Multimodal Brain Tumor Image Segmentation Benchmark ({BRATS})},
        journal = {IEEE Transactions on Medical Imaging},
        volume = {34},
        number = {10},
        pages = {1993--2024},
        year = {2015},
        doi = {10.1109/TMI.2014.2377694}
    }
"""
DISTANCE_DETAILS = """
    Surface voxels have a face in common with a voxel outside the mask, or with the border of the volume. For each,
    take the distance in mm between its centre and that of the nearest surface voxel of the other mask; of these the
    95th percentile, interpolated linearly; and of both directions the larger. That is
    `compute_hausdorff_distance(percentile=95)` of [MONAI](https://github.com/Project-MONAI/MONAI). BraTS' own code
    of 2023 and 2024 weights distances by the area of surface elements, as
    [`surface-distance`](https://github.com/google-deepmind/surface-distance) does; here each voxel counts the same,
    so values are near those of the challenge, not equal to them. That of BraTS 2026 pools both directions, which is
    `hausdorff95_pooled_mm`.
"""
PANOPTICA_CITATION = """
    @article{kofler2023panoptica,
        author = {Kofler, Florian and M{\\"o}ller, Hendrik and Buchner, Josef A. and others},
        title = {Panoptica -- instance-wise evaluation of {3D} semantic and instance segmentation maps},
        journal = {arXiv preprint arXiv:2312.02608},
        year = {2023},
        doi = {10.48550/arXiv.2312.02608}
    }
"""
NSD_CITATION = """
    @article{nikolov2021clinically,
        author = {Nikolov, Stanislav and Blackwell, Sam and Zverovitch, Alexei and others},
        title = {Clinically Applicable Segmentation of Head and Neck Anatomy for Radiotherapy: Deep Learning Algorithm
            Development and Validation Study},
        journal = {Journal of Medical Internet Research},
        volume = {23},
        number = {7},
        pages = {e26151},
        year = {2021},
        doi = {10.2196/26151}
    }
"""
POOLED_DETAILS = """
    The distances of the surface voxels of either mask to the nearest one of the other are pooled, and their 95th
    percentile is taken, as in BraTS 2026; `hausdorff95_mm` takes the percentile of each direction and the larger of
    the two. BraTS took the larger in 2023 and 2024, weighted by area.
"""
NSD_DETAILS = """
    The share of the surface voxels of a mask whose centre lies within 0.5 or 1 mm of that of one of the other mask's,
    as the mean of both masks. At 0.5 mm, with voxels of 1 mm, it is the share of voxels that both surfaces have in
    common. Each voxel counts the same, as in BraTS from 2024 on;
    [`surface-distance`](https://github.com/google-deepmind/surface-distance) weights them by area. BraTS 2026 scores
    whole regions at half a voxel and lesions at the shortest side of a voxel: 0.5 and 1 mm for its volumes.
"""
LESION_DETAILS = """
    Lesions are the connected components of a region, whose voxels touch at least at a corner. Those of prediction and
    reference that have voxels in common are paired one to one, so that the sum of their Dice coefficients is largest;
    `lesion_f1` is twice the number of pairs by that of all lesions of both. `lesion_...` are means over all lesions,
    of which a missed or spurious one counts as the worst value; `matched_lesion_...` are means over the pairs alone,
    which say little without `lesion_f1`. The latter are equal to what `brats-evaluation` 0.0.10, the code of BraTS
    2026, calls `lesionwise_..._mean`; for metastases that is `lesion_...` with `min_lesion_mm3=27, one_empty_mm=373`.
    BraTS 2023 and 2024 counted missed and spurious lesions too, but joined lesions by dilation and left small ones
    out, so their values differ.
"""
_VOLUME = ListFeature(ListFeature(ListFeature(Value("int64"))))
_MISSING = object()


class VolumeScores:
    """Scores of patients, and their averages, which are rounded once so that the order of patients does not matter."""

    def __init__(self, metrics: Sequence[str]):
        self.metrics = tuple(metrics)
        self.patients: list[dict[str, dict[str, float]]] = []

    def __len__(self) -> int:
        """Return the number of patients."""
        return len(self.patients)

    def add(self, scores: dict[str, dict[str, float]]) -> None:
        """Add what [`~volume_functional.score_volume`] returned for one patient."""
        self.patients.append(scores)

    def merge(self, other: "VolumeScores") -> None:
        """Add the patients of others, after those that are there."""
        self.patients += other.patients

    def result(self) -> dict[str, Any]:
        """Return each metric's mean over regions, means over patients per region, and the values of the patients."""
        if not self.patients:
            raise ValueError("There is nothing to average: add patients first.")
        result: dict[str, Any] = {}
        for metric in self.metrics:
            values = {region: [patient[region][metric] for patient in self.patients] for region in self.patients[0]}
            means = {region: math.fsum(own) / len(own) for region, own in values.items()}
            result[metric] = math.fsum(means.values()) / len(means)
            result |= {f"{metric}_{region}": mean for region, mean in means.items()}
            result[f"{metric}_per_patient"] = values
        return result


class VolumeMetric(StreamingMetric):
    """Base class of the modules for volumes; see [`StreamingMetric`]."""

    sample = "patient"
    sample_data = "volume"
    sample_options = ("spacing",)
    scores_class = VolumeScores
    example_samples = "[[[2, 1, 0, 0], [2, 2, 0, 0]]], [[[2, 0, 0, 0], [2, 0, 0, 0]]]"
    example_key = "_WT"
    input_texts = {
        "predictions": "Volumes of label ids, one per patient, of shape `(x, y, z)` with the axes in any order: "
        "integers >= 0 (which may be stored as floats), 0 for the background. NumPy arrays, tensors or nested lists, "
        "in a list or a generator; patients may differ in size. Booleans and 0 and 1 will do for a region that is "
        "label 1.",
        "references": "Volumes of the same shapes.",
        "regions": "Region name -> the label ids it joins; ids in no region are background. Default: BraTS' regions "
        '`{"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}`, with which any other id than 0 to 3 is an error.',
        "spacing": "Size of a voxel in mm along the three axes of the volumes: three numbers for all patients, or "
        "three per patient. 1 mm by default, as in BraTS.",
        "one_empty_mm": "Distance where just one of prediction and reference is empty. The default is the diagonal of "
        "BraTS' volumes, 373.13 mm, as in results on BraTS until 2021; pass 374 for BraTS 2023, 373 for BraTS 2026. "
        "Metrics of lesions take it for a lesion without partner.",
        "min_lesion_mm3": "Lesions of the reference below this volume are left out of the means `lesion_...`; they "
        "count for `lesion_f1` and `matched_lesion_...`. 0 by default.",
    }
    # `evaluate` reads the names from them; no volume goes through Arrow.
    input_features = Features(predictions=_VOLUME, references=_VOLUME)

    @classmethod
    def outputs(cls) -> dict[str, str]:
        """Return the keys of the result, in Markdown, and what their values are."""

        def keys(ending: str) -> str:
            return ", ".join(f"`{metric}{ending}`" for metric in cls.metrics)

        return {
            f"{keys('_<region>')}, such as `{cls.metrics[0]}_WT`": "mean over patients",
            keys(""): "mean of these over regions",
            keys("_per_patient"): "a list per region, of the patients in the order they were added",
        }

    def _merge_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        merged = super()._merge_options(options)
        to_regions(merged["regions"])
        return merged

    def _samples(self, predictions: Any, references: Any, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        columns = {"prediction": predictions, "reference": references}
        shared: dict[str, Any] = {}
        if isinstance(spacing := options.get("spacing"), Iterable):
            # Three numbers hold for all patients; three numbers per patient are handed out in turn.
            spacing = list(spacing)
            (columns if any(map(np.ndim, spacing)) else shared)["spacing"] = spacing
        for index, values in enumerate(itertools.zip_longest(*columns.values(), fillvalue=_MISSING)):
            patient = dict(zip(columns, values, strict=True))
            if missing := [name for name, value in patient.items() if value is _MISSING]:
                raise ValueError(
                    f"Each patient needs one {', one '.join(columns)}, but patient {index} has no {missing[0]}."
                )
            yield shared | patient
