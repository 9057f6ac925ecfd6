"""SAM2-UNet for the Hugging Face ecosystem.

Importing this package registers the model with transformers' Auto classes, and has `save_pretrained` put the code
beside the weights, so that they load without this package by `trust_remote_code=True`.
"""

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation

from .configuration_sam2unet import Sam2UNetConfig
from .image_processing_sam2unet import Sam2UNetImageProcessor
from .loss_sam2unet import deep_supervision_loss, structure_loss
from .modeling_sam2unet import Sam2UNetForSemanticSegmentation, Sam2UNetOutput, Sam2UNetPreTrainedModel
from .pipeline_sam2unet import Sam2UNetImagePipeline


if TYPE_CHECKING:
    from .conversion import convert_reference_checkpoint

AutoConfig.register(Sam2UNetConfig.model_type, Sam2UNetConfig)
AutoModel.register(Sam2UNetConfig, Sam2UNetForSemanticSegmentation)
AutoModelForSemanticSegmentation.register(Sam2UNetConfig, Sam2UNetForSemanticSegmentation)
AutoImageProcessor.register(Sam2UNetConfig, image_processor_classes={"torchvision": Sam2UNetImageProcessor})

Sam2UNetConfig.register_for_auto_class()
Sam2UNetForSemanticSegmentation.register_for_auto_class(AutoModelForSemanticSegmentation)
Sam2UNetImageProcessor.register_for_auto_class()


def __getattr__(name: str) -> Any:
    # Not imported before it is asked for, because Python warns of a module that is imported before it runs as a
    # command, `python -m sam2unet_hf.conversion`.
    if name == "convert_reference_checkpoint":
        from .conversion import convert_reference_checkpoint

        return convert_reference_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Sam2UNetConfig",
    "Sam2UNetForSemanticSegmentation",
    "Sam2UNetImagePipeline",
    "Sam2UNetImageProcessor",
    "Sam2UNetOutput",
    "Sam2UNetPreTrainedModel",
    "convert_reference_checkpoint",
    "deep_supervision_loss",
    "structure_loss",
]
