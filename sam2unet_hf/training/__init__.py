"""What the Trainer needs for SAM2-UNet: data, augmentation, metrics, streaming, resuming and model card."""

from .augmentation import AUGMENTATIONS, augmentation
from .data import SegmentationTransform, collate
from .metrics import SegmentationMetrics
from .rows import ImageRows, choose_head_crop_size
from .run_record import HYPERPARAMETERS
from .streaming import ParquetRows, RowGroupSampler, open_parquet
from .trackers import PredictionPicturesCallback
from .trainer import Sam2UNetTrainer


__all__ = [
    "AUGMENTATIONS",
    "HYPERPARAMETERS",
    "ImageRows",
    "ParquetRows",
    "PredictionPicturesCallback",
    "RowGroupSampler",
    "Sam2UNetTrainer",
    "SegmentationMetrics",
    "SegmentationTransform",
    "augmentation",
    "choose_head_crop_size",
    "collate",
    "open_parquet",
]
