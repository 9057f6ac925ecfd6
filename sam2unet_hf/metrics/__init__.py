"""The seven metrics of the SAM2-UNet papers, and those of BraTS for volumes, as `evaluate` modules over NumPy.

`evaluate.load("<folder>/dice.py")` loads a module by path, `Dice()` does the same without copying it; `score` computes
them for one image, `score_volume` and `score_lesions` for one volume, and `space` writes a module as a Space.
"""

from .dice import Dice
from .e_measure import EMeasure
from .f_beta import FBeta
from .functional import score
from .hausdorff_95 import Hausdorff95
from .hausdorff_95_pooled import Hausdorff95Pooled
from .iou import Iou
from .lesion_dice import LesionDice
from .lesion_functional import score_lesions
from .lesion_hausdorff_95 import LesionHausdorff95
from .lesion_report import LesionReport
from .lesion_surface_distance import LesionSurfaceDistance
from .mae import Mae
from .normalized_surface_distance import NormalizedSurfaceDistance
from .s_measure import SMeasure
from .segmentation_metric import Accumulator
from .segmentation_report import SegmentationReport
from .sensitivity import Sensitivity
from .specificity import Specificity
from .volume_dice import VolumeDice
from .volume_functional import score_volume
from .volume_report import VolumeReport
from .weighted_f_beta import WeightedFBeta


__all__ = [
    "Accumulator",
    "Dice",
    "EMeasure",
    "FBeta",
    "Hausdorff95",
    "Hausdorff95Pooled",
    "Iou",
    "LesionDice",
    "LesionHausdorff95",
    "LesionReport",
    "LesionSurfaceDistance",
    "Mae",
    "NormalizedSurfaceDistance",
    "SMeasure",
    "SegmentationReport",
    "Sensitivity",
    "Specificity",
    "VolumeDice",
    "VolumeReport",
    "WeightedFBeta",
    "score",
    "score_lesions",
    "score_volume",
]
