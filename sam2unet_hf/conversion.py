"""Turning checkpoints of the reference SAM2-UNet, and encoders of SAM 2, into models of this package.

python -m sam2unet_hf.conversion SAM2-UNet.pth my_model
python -m sam2unet_hf.conversion facebook/sam2-hiera-large my_model --regions WT=1,2,3 TC=1,3 ET=3
"""

import argparse
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .configuration_sam2unet import Sam2UNetConfig
from .image_processing_sam2unet import Sam2UNetImageProcessor
from .modeling_sam2unet import Sam2UNetForSemanticSegmentation
from .regions_sam2unet import parse_regions, regions_from_pairs
from .weights_sam2unet import (
    SAM2_NAMES,
    check_state_dict,
    infer_backbone_config,
    inflate_patch_embedding,
    load_pickled_state_dict,
    rename,
    unwrap_names,
)


logger = logging.getLogger(__name__)

# Reference SAM2-UNet -> this package; a list index is the reference's number less one.
REFERENCE_NAMES = [
    (r"^encoder\.blocks\.(\d+)\.prompt_learn\.0\.", r"encoder.blocks.\1.adapter.down_proj."),
    (r"^encoder\.blocks\.(\d+)\.prompt_learn\.2\.", r"encoder.blocks.\1.adapter.up_proj."),
    (r"^encoder\.blocks\.(\d+)\.block\.", r"encoder.blocks.\1."),
    (r"^rfb(\d)\.branch(\d)\.", r"decode_head.receptive_field_blocks.#\1.branches.\2."),
    (r"^rfb(\d)\.conv_cat\.", r"decode_head.receptive_field_blocks.#\1.fusion."),
    (r"^rfb(\d)\.conv_res\.", r"decode_head.receptive_field_blocks.#\1.shortcut."),
    (r"^up(\d)\.conv\.double_conv\.0\.", r"decode_head.up_blocks.#\1.conv1.conv."),
    (r"^up(\d)\.conv\.double_conv\.1\.", r"decode_head.up_blocks.#\1.conv1.norm."),
    (r"^up(\d)\.conv\.double_conv\.3\.", r"decode_head.up_blocks.#\1.conv2.conv."),
    (r"^up(\d)\.conv\.double_conv\.4\.", r"decode_head.up_blocks.#\1.conv2.norm."),
    (r"^side(\d)\.", r"decode_head.auxiliary_classifiers.#\1."),
    (r"^head\.", "decode_head.classifier."),
    (r"\.bn\.", ".norm."),
]


def convert_reference_checkpoint(
    path_or_state_dict: str | os.PathLike | Mapping[str, torch.Tensor],
    config: Sam2UNetConfig | None = None,
    *,
    num_channels: int = 3,
    **config_kwargs: Any,
) -> Sam2UNetForSemanticSegmentation:
    """Turn a checkpoint of the reference SAM2-UNet into a model of this package.

    Args:
        path_or_state_dict: `.pth` file as the reference's training script writes it, or its state dict. Weights that
            lie beside other things, under a name such as `model_state_dict`, are found, and what `torch.compile` and
            distributed training put into their names is dropped.
        config: Configuration of the model. By default the encoder is the one of SAM 2's sizes that the shapes show,
            and the output is one region `"foreground"` of label id 1, because the checkpoint does not say what it
            segments.
        num_channels: Channels of the images if there is no `config`, see
            [`Sam2UNetForSemanticSegmentation.from_sam2`].
        **config_kwargs: Fields of [`Sam2UNetConfig`], such as `regions`, if there is no `config`.

    Returns:
        [`Sam2UNetForSemanticSegmentation`] in eval mode. Keys of the reference that it never uses (`up4`) are dropped
        and logged.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If there are both `config` and fields.
        ValueError: If the file is damaged, is no reference SAM2-UNet, or does not fit the configuration, which must
            name one region per channel of its output.

    Source: https://github.com/WZH0120/SAM2-UNet/blob/01598e5/SAM2UNet.py.
    """
    if config is not None and config_kwargs:
        raise TypeError(f"Pass `config` or fields of one, got both: {', '.join(config_kwargs)}.")
    if isinstance(path_or_state_dict, Mapping):
        source, reference = "the state dict", unwrap_names(path_or_state_dict)
    else:
        source, reference = os.fspath(path_or_state_dict), load_pickled_state_dict(path_or_state_dict)
    return convert_reference_weights(reference, source, config, num_channels, **config_kwargs)


def convert_reference_weights(
    reference: Mapping[str, torch.Tensor],
    source: str,
    config: Sam2UNetConfig | None,
    num_channels: int,
    **config_kwargs: Any,
) -> Sam2UNetForSemanticSegmentation:
    """Turn weights, whose names are unwrapped, into a model; `source` is what messages call them."""
    # The reference builds a fourth decoder step and never calls it.
    dropped = [name for name in reference if name.startswith("up4.")]
    kept = {name: value for name, value in reference.items() if name not in dropped}
    state_dict = {rename(name, REFERENCE_NAMES + SAM2_NAMES): value for name, value in kept.items()}
    if not any(name.startswith("encoder.") for name in state_dict):
        raise ValueError(f"{source} is not a reference SAM2-UNet: no key starts with 'encoder.'.")
    if config is None:
        encoder = {name.removeprefix("encoder."): value for name, value in state_dict.items()}
        backbone_config = infer_backbone_config(encoder, source)
        backbone_config.num_channels = num_channels
        config = Sam2UNetConfig(backbone_config=backbone_config, **{"regions": {"foreground": [1]}, **config_kwargs})
    check_number_of_regions(state_dict, regions_from_pairs(config.regions or {}), source)
    model = Sam2UNetForSemanticSegmentation(config)
    inflate_patch_embedding(state_dict, model.config.backbone_config.num_channels, prefix="encoder.")
    check_state_dict(state_dict, model.state_dict(), source, "SAM2-UNet with this configuration")
    model.load_state_dict(state_dict)
    if dropped:
        logger.warning("Dropped %d keys that the reference never uses: %s", len(dropped), ", ".join(dropped))
    return model.eval()


def check_number_of_regions(
    state_dict: Mapping[str, torch.Tensor], regions: Mapping[str, Sequence[int]], source: str
) -> None:
    """Raise a `ValueError` if a checkpoint, which does not name its regions, has more or fewer than are named."""
    weight = state_dict.get("decode_head.classifier.weight")
    if weight is not None and len(weight) != len(regions):
        raise ValueError(
            f"{source} gives {len(weight)} channel{'s' * (len(weight) != 1)}, of which `regions` must name each, got "
            f"{', '.join(regions)}. Name them in order, in Python by `regions`, else by `--regions` such as WT=1,2,3 "
            "TC=1,3 ET=3. A softmax over classes cannot be converted."
        )


def convert_checkpoint(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    revision: str | None = None,
    num_channels: int = 3,
    **config_kwargs: Any,
) -> Sam2UNetForSemanticSegmentation:
    """Write a checkpoint folder from a reference SAM2-UNet or a SAM 2 encoder, and check that it can be loaded.

    Args:
        source: `.pth` file of the reference, or what [`Sam2UNetForSemanticSegmentation.from_sam2`] takes: a Hub id, a
            folder, or an original `.pt` file of SAM 2, to which adapters and decoder are new.
        output: Folder to write, with model, code and image processor. It appears only when it is complete.
        revision: Branch, tag or commit on the Hub.
        num_channels: Channels of the images, see [`Sam2UNetForSemanticSegmentation.from_sam2`].
        **config_kwargs: Fields of [`Sam2UNetConfig`], such as `regions`. The default is `{"foreground": [1]}` for a
            reference SAM2-UNet and `{"WT": [1, 2, 3]}` for a SAM 2 encoder.

    Returns:
        The model as it loads from the folder, in eval mode.

    Raises:
        OSError: If there is no such source, or the folder exists and is not empty.
        RuntimeError: If the weights are not read back as they were written.
        ValueError: If the source is damaged, is neither of the two, or does not fit the fields.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder. Name another one, or remove it first.")
    is_pickle = Path(source).is_file() or Path(source).suffix in (".pt", ".pth")
    state_dict = load_pickled_state_dict(source) if is_pickle else {}
    if any(".prompt_learn." in name for name in state_dict):
        if revision is not None:
            raise ValueError(f"`revision` is for the Hub, but {source} is a file; got {revision}.")
        model = convert_reference_weights(state_dict, os.fspath(source), None, num_channels, **config_kwargs)
    else:
        options: dict[str, Any] = {"revision": revision, "num_channels": num_channels}
        model = Sam2UNetForSemanticSegmentation.from_sam2(source, **options, **config_kwargs).eval()
    del state_dict
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as folder:
        checkpoint = Path(folder) / "checkpoint"
        model.save_pretrained(checkpoint)
        Sam2UNetImageProcessor(model.config.regions, num_channels=num_channels).save_pretrained(checkpoint)
        loaded = Sam2UNetForSemanticSegmentation.from_pretrained(checkpoint)
        expected, got = model.state_dict(), loaded.state_dict()
        if different := [name for name in expected if not torch.equal(expected[name], got.get(name, torch.empty(0)))]:
            raise RuntimeError(
                f"{len(different)} weights, such as {different[0]!r}, were not read back as written. Is the disk full?"
            )
        checkpoint.replace(output)
    return loaded


def main(argv: Sequence[str] | None = None, prog: str = "python -m sam2unet_hf.conversion") -> None:
    """Run the command line, whose usage calls it `prog`."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=(__doc__ or "").replace("python -m sam2unet_hf.conversion", prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="reference .pth file, or SAM 2: Hub id, folder or original .pt file")
    parser.add_argument("output", type=Path, help="new checkpoint folder")
    parser.add_argument(
        "--regions",
        nargs="+",
        metavar="NAME=ID,ID",
        help="what the model segments (default: foreground=1 for a reference .pth file, WT=1,2,3 for a SAM 2 encoder)",
    )
    parser.add_argument("--num_channels", type=int, default=3, help="channels of the images (default: 3)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    args = parser.parse_args(argv)
    try:
        fields = {"regions": parse_regions(args.regions)} if args.regions else {}
        model = convert_checkpoint(
            args.source, args.output, revision=args.revision, num_channels=args.num_channels, **fields
        )
    except (OSError, RuntimeError, ValueError) as err:
        parser.error(str(err))
    parser.exit(
        message=f"{args.output} holds a SAM2-UNet of {model.num_parameters() / 1e6:.2f} M parameters that segments "
        f"{', '.join(model.config.regions)}.\n"
    )


__all__ = ["convert_checkpoint", "convert_reference_checkpoint"]


if __name__ == "__main__":
    main()
