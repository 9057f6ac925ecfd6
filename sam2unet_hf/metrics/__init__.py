"""The seven measures of the SAM2-UNet papers, as `evaluate` modules over one NumPy core.

`evaluate.load("<folder>/dice.py")` loads a module by path, `Dice()` does the same without copying it; `functional` has
the measures themselves.
"""

from .dice import Dice
from .e_measure import EMeasure
from .f_beta import FBeta
from .functional import Accumulator, score
from .iou import Iou
from .mae import Mae
from .s_measure import SMeasure
from .segmentation_report import SegmentationReport
from .weighted_f_beta import WeightedFBeta


__all__ = [
    "Accumulator",
    "Dice",
    "EMeasure",
    "FBeta",
    "Iou",
    "Mae",
    "SMeasure",
    "SegmentationReport",
    "WeightedFBeta",
    "score",
]
