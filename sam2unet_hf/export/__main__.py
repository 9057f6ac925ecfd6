"""Writing a model as an ONNX file that is checked against it in onnxruntime."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..image_processing_sam2unet import Sam2UNetImageProcessor
from ..modeling_sam2unet import Sam2UNetForSemanticSegmentation
from .onnx import OnnxExportError, export_onnx, require_onnx


logger = logging.getLogger(__name__)


def load_checkpoint(source: str) -> tuple[Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor]:
    """Load a model in float32 and its image processor, or the default one where there is none."""
    load = Sam2UNetForSemanticSegmentation.from_pretrained
    model, info = load(source, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{source} lacks {len(missing)} weights, such as {missing[0]}. Save or download it again.")
    try:
        processor = Sam2UNetImageProcessor.from_pretrained(source)
    except OSError:
        if Path(source, "preprocessor_config.json").exists():
            raise
        logger.warning("%s has no image processor, taking the default one.", source)
        num_channels = model.config.backbone_config.num_channels
        processor = Sam2UNetImageProcessor(model.config.regions, num_channels=num_channels)
    return model, processor


def parse_args(argv: Sequence[str] | None = None, prog: str = "python -m sam2unet_hf.export") -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="SAM2-UNet: Hub id or folder")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="ONNX file to write")
    parser.add_argument(
        "--image_size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="side of the images, or height and width; default: that of the model's image processor",
    )
    parser.add_argument("--dynamic_size", action="store_true", help="take images of every size from 64x64 up")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "float16"),
        help="type of weights and computation; images and logits are float32 (default: float32)",
    )
    args = parser.parse_args(argv)
    if args.image_size is not None:
        if len(args.image_size) > 2:
            parser.error(f"argument --image_size: expected one or two numbers, got {len(args.image_size)}")
        args.image_size = (args.image_size[0], args.image_size[-1])
    return args


def main(argv: Sequence[str] | None = None, prog: str = "python -m sam2unet_hf.export") -> None:
    """Run the command line, whose usage calls it `prog`."""
    logger.handlers = [logging.StreamHandler()]
    logger.setLevel(logging.INFO)
    args = parse_args(argv, prog)
    try:
        require_onnx()
        model, processor = load_checkpoint(args.model)
        difference = export_onnx(
            model,
            args.output,
            processor=processor,
            image_size=args.image_size,
            dynamic_size=args.dynamic_size,
            dtype=getattr(torch, args.dtype),
        )
    except (ImportError, OnnxExportError, OSError, ValueError) as err:
        sys.exit(f"error: {err}")
    logger.info("Wrote %s. Its logits differ from PyTorch's by at most %.1e.", args.output, difference)


if __name__ == "__main__":
    main()
