"""Writing a model as an ONNX file that is checked against it in onnxruntime."""

import copy
import importlib.util
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..image_processing_sam2unet import Sam2UNetImageProcessor
from ..modeling_sam2unet import MIN_IMAGE_SIZE, Sam2UNetForSemanticSegmentation
from ..regions_sam2unet import region_levels
from .graph import AnySizeLogits, FixedSizeLogits


MAX_SIZE = 2**31 - 1

# How far logits may be from those in float32, as a part of the largest. In float32 a difference of 1e-4 is always all
# right, because rounding alone makes 1e-3 of logits of 1e3.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 0.02}


class OnnxExportError(RuntimeError):
    """A model cannot be written as ONNX, or the file does not compute what the model does."""


def require_onnx() -> None:
    """Raise an `ImportError` if a package is missing that writing or checking needs."""
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"ONNX export needs {', '.join(missing)}, not installed. Run: pip install {' '.join(missing)}"
        )


def copy_on_cpu(
    model: Sam2UNetForSemanticSegmentation, dtype: torch.dtype = torch.float32
) -> Sam2UNetForSemanticSegmentation:
    """Return a copy on the CPU, in eval mode, none of whose weights is trained."""
    copied: Any = copy.deepcopy(model)
    return copied.to("cpu", dtype).eval().requires_grad_(False)


def largest_window(model: Sam2UNetForSemanticSegmentation) -> int:
    """Return the side in pixels of the largest window, where all stages of SAM 2's encoders have whole windows."""
    sides = [size * 4 * 2**stage for stage, size in enumerate(model.config.backbone_config.window_size_per_stage)]
    return max(MIN_IMAGE_SIZE, *sides)


def convert(
    model: Sam2UNetForSemanticSegmentation,
    image_size: tuple[int, int],
    dynamic_size: bool,
    dtype: torch.dtype = torch.float32,
) -> torch.onnx.ONNXProgram:
    """Turn a model into an ONNX graph without metadata."""
    import onnxscript.optimizer

    model = copy_on_cpu(model, dtype)
    module: torch.nn.Module = AnySizeLogits(model) if dynamic_size else FixedSizeLogits(model)
    # Give a largest size, because torch 2.7 compares with infinity without one, and fails.
    shape: dict[int, Any] = {0: torch.export.Dim("batch", max=MAX_SIZE)}
    if dynamic_size:
        for axis, name in ((2, "height"), (3, "width")):
            shape[axis] = torch.export.Dim(name, min=MIN_IMAGE_SIZE, max=MAX_SIZE)
        # Trace several windows a side, and padding, because a count of 0 or 1 would be taken as fixed.
        side = 2 * largest_window(model)
        image_size = (side + 42, side + 74)
    pixel_values = torch.zeros(2, model.config.backbone_config.num_channels, *image_size)
    try:
        program: Any = torch.onnx.export(
            module.eval(),
            (pixel_values,),
            dynamo=True,
            dynamic_shapes={"pixel_values": shape},
            input_names=["pixel_values"],
            output_names=["logits"],
            opset_version=20,  # the first with GELU; onnxruntime reads it from 1.17 on
            # The rewriting rules take time quadratic in the number of nodes, over 10 minutes for the large preset.
            optimize=False,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as err:
        remedy = "Leave `dynamic_size` out, or install a newer torch." if dynamic_size else "Install another torch."
        reason = err.__cause__ or err
        raise OnnxExportError(f"torch {torch.__version__} cannot export the model: {reason} {remedy}") from err
    onnxscript.optimizer.fold_constants(program.model)
    onnxscript.optimizer.remove_unused_nodes(program.model)
    return program


def onnx_metadata(
    model: Sam2UNetForSemanticSegmentation, processor: Sam2UNetImageProcessor, image_size: tuple[int, int]
) -> dict[str, str]:
    """Return what a user of the file alone must know, each value as JSON."""
    fields = ("do_convert_rgb", "do_resize", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    preparation = {name: getattr(processor, name) for name in fields}
    preparation["size"] = {"height": image_size[0], "width": image_size[1]}
    preparation["resample"] = Image.Resampling(processor.resample).name.lower()
    if processor.head_crop_size is not None:
        scale = processor.head_crop_scale
        preparation["head_crop_size"] = {side: pixels // scale for side, pixels in preparation["size"].items()}
        preparation["do_resize"] = scale > 1
        if scale == 1:
            del preparation["size"]
    scans = {name: getattr(processor, name) for name in ("modalities", "plane", "neighbours")}
    preparation |= {name: value for name, value in scans.items() if value}
    values = {
        "regions": list(model.config.regions.items()),
        "region_levels": region_levels(model.config.regions),
        "id2label": model.config.id2label,
        "image_processor": preparation,
    }
    return {name: json.dumps(value) for name, value in values.items()}


def check_onnx(
    path: str | os.PathLike,
    model: Sam2UNetForSemanticSegmentation,
    shapes: Sequence[tuple[int, int, int]],
    dtype: torch.dtype = torch.float32,
) -> float:
    """Compare a file in onnxruntime with a model, on normally distributed noise.

    Args:
        path: ONNX file, as [`export_onnx`] writes it.
        model: What it must compute. It is compared in float32 on the CPU, in eval mode.
        shapes: Batch size, height and width of each comparison.
        dtype: What the file computes in.

    Returns:
        The largest absolute difference of a logit: at most 1e-5 of the largest logit, for float16 0.02 of it, or 1e-4
        if that is more.

    Raises:
        ImportError: If onnxruntime is not installed.
        OnnxExportError: If a difference is larger, or onnxruntime cannot compute the file.
    """
    require_onnx()
    import onnxruntime  # type: ignore[import-not-found, import-untyped]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Log fatal errors only, because the others are raised.
    options.log_severity_level = 4
    remedy = "Export with another torch version, or with a fixed size."
    if dtype != torch.float32:
        remedy = "Export in float32."
    model = copy_on_cpu(model)
    generator = torch.Generator().manual_seed(0)
    num_channels = model.config.backbone_config.num_channels
    largest, session = 0.0, None
    for batch_size, height, width in shapes:
        pixel_values = torch.randn(batch_size, num_channels, height, width, generator=generator)
        with torch.inference_mode():
            expected = model(pixel_values, return_dict=True).logits
        what = f"{Path(path).name} for {batch_size} images of {height}x{width}"
        try:
            session = session or onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            (output,) = session.run(["logits"], {"pixel_values": pixel_values.numpy()})
        except Exception as err:  # onnxruntime's errors have no public base class
            raise OnnxExportError(f"onnxruntime cannot compute {what}: {str(err).strip()} {remedy}") from err
        same_shape = output.shape == expected.shape
        difference = (torch.from_numpy(output) - expected).abs().max().item() if same_shape else float("inf")
        allowed = max(1e-4, TOLERANCES[dtype] * expected.abs().max().item())
        # Ask for what must hold, because a comparison with NaN is false.
        if not difference <= allowed:
            raise OnnxExportError(
                f"The logits of {what}, of shape {output.shape}, differ from the model's by up to {difference:.3g}, "
                f"where {allowed:.3g} is allowed. {remedy}"
            )
        largest = max(largest, difference)
    return largest


def export_onnx(
    model: Sam2UNetForSemanticSegmentation,
    output: str | os.PathLike,
    *,
    processor: Sam2UNetImageProcessor | None = None,
    image_size: tuple[int, int] | None = None,
    dynamic_size: bool = False,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Write a model as an ONNX file and check the file in onnxruntime.

    The file takes `pixel_values` of shape `(batch_size, num_channels, height, width)`, float32, and gives `logits` of
    shape `(batch_size, num_regions, height, width)`, raw scores, for any batch size. Its metadata say how to make the
    one and read the other, each value as JSON: `image_processor` (size, mean, standard deviation and so on; where
    slices are cropped to the head, `head_crop_size` in place of the size, and masks must be cleared outside the head),
    `regions` (pairs of name and label ids, in the order of the channels), `region_levels` (what to write into a label
    map, from the outermost level inward: region -> label id) and `id2label`.

    Args:
        model: Model in any type, on any device, in any mode; it stays as it is.
        output: File to write. Weights over 1.5 GB go into a second file beside it, `{output}.data`. An existing file
            is replaced once the new one has passed the check; one that has not passed is not kept.
        processor: How images are prepared, for the metadata. By default the default processor.
        image_size: Height and width of the images in pixels, from 64 up. By default those of `processor`.
        dynamic_size: Let the file take images of every size from 64x64 up, and only recommend `image_size`. It then
            computes attention on padded windows, as SAM 2 does, and so more than a file for one size.
        dtype: Type of the weights and of what is computed, `torch.float32` or `torch.float16`. Images and logits are
            float32 all the same.

    Returns:
        As [`check_onnx`], over batches of 1 and 3 images, and with `dynamic_size` four other sizes.

    Raises:
        ImportError: If onnx, onnxruntime or onnxscript is not installed.
        OnnxExportError: If torch cannot export the model, or the file does not compute what the model does.
        OSError: If the file cannot be written.
        ValueError: If `image_size` is too small, or `processor` has none, or `dtype` is another.
    """
    require_onnx()
    if dtype not in TOLERANCES:
        raise ValueError(
            f"`dtype` must be torch.float32 or torch.float16, got {dtype}. onnxruntime has no other convolutions."
        )
    output = Path(os.path.abspath(output))
    if output.is_dir():
        raise IsADirectoryError(f"`output` must be a file, got the folder {output}. Pass {output / 'model.onnx'}.")
    num_channels = model.config.backbone_config.num_channels
    processor = processor or Sam2UNetImageProcessor(model.config.regions, num_channels=num_channels)
    if image_size is None:
        size = dict(processor.size)
        if processor.head_crop_size is not None:
            size = {side: pixels * processor.head_crop_scale for side, pixels in processor.head_crop_size.items()}
        if not {"height", "width"} <= size.keys():
            raise ValueError(
                f"The image processor's `size` must have a height and a width, got {size}. Pass `image_size`."
            )
        image_size = (size["height"], size["width"])
    if min(image_size) < MIN_IMAGE_SIZE:
        raise ValueError(
            f"`image_size` must be at least {MIN_IMAGE_SIZE} pixels high and wide, got "
            f"{image_size[0]}x{image_size[1]}. Pass a larger one and resize the images to it."
        )
    shapes = [(1, *image_size), (3, *image_size)]
    if dynamic_size:
        side = largest_window(model)
        # Smallest; no multiples of the stride; no window padded; windows padded on both sides.
        shapes += [(1, MIN_IMAGE_SIZE, MIN_IMAGE_SIZE), (2, 70, 90), (1, side, 2 * side), (1, side + 42, side + 10)]
    program = convert(model, image_size, dynamic_size, dtype)
    for node in program.model.graph.all_nodes():
        # Remove stack traces, because they hold local paths.
        node.metadata_props.clear()
    program.model.metadata_props.update(onnx_metadata(model, processor, image_size))

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as staging:
        program.save(Path(staging, output.name))
        del program
        difference = check_onnx(Path(staging, output.name), model, shapes, dtype)
        # Move the graph last, because it may name the file of the weights.
        for path in sorted(Path(staging).iterdir(), key=lambda path: path.name == output.name):
            os.replace(path, output.parent / path.name)
    return difference


__all__ = ["OnnxExportError", "check_onnx", "export_onnx"]
