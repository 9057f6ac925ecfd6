"""The seven metrics of the SAM2-UNet papers, and those of BraTS for volumes, as `evaluate` modules over NumPy.

`evaluate.load("<folder>/dice.py")` loads a module by path, `Dice()` does the same without copying it; `score` and
`score_volume` compute them for one image and one volume, and `space` writes a module as a Space.
"""

from .dice import Dice
from .e_measure import EMeasure
from .f_beta import FBeta
from .functional import score
from .hausdorff_95 import Hausdorff95
from .iou import Iou
from .mae import Mae
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
    "Iou",
    "Mae",
    "SMeasure",
    "SegmentationReport",
    "Sensitivity",
    "Specificity",
    "VolumeDice",
    "VolumeReport",
    "WeightedFBeta",
    "score",
    "score_volume",
]
