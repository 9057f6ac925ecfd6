"""Ensembles: one SAM2-UNet or several that segment together, from one folder or repository."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import CONFIG_NAME, cached_file, extract_commit_hash

from .checkpoint_sam2unet import DOWNLOAD_ARGUMENTS
from .image_processing_sam2unet import Sam2UNetImageProcessor
from .modeling_sam2unet import Sam2UNetForSemanticSegmentation


# Beside the folders of the members, each a whole checkpoint: `{"members": ["fold_0", "fold_1"]}`.
ENSEMBLE_FILE = "ensemble.json"
# The name of a folder beside the file, which cannot lead elsewhere.
MEMBER_NAME = re.compile(r"\w([\w.-]*\w)?", re.ASCII)


def find_file(name: str | os.PathLike, file: str, **location: Any) -> str | None:
    """Return the path of a file of a folder or Hub repository, downloaded if need be; `None` where there is none."""
    try:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **location)
    except OSError:  # no such repository, of which loading tells
        return None


def find_ensemble(name: str | os.PathLike, **location: Any) -> str | None:
    """Return the path of the list of members of a folder or Hub repository; `None` of a single checkpoint.

    Args:
        name: Folder or Hub id.
        **location: Arguments of downloads, such as `token`, and `revision` and `subfolder`.

    Raises:
        FileNotFoundError: If there are folds in a folder, but no list of them.
        ValueError: If a folder holds a checkpoint beside the list, because it is not known which one is meant.
    """
    config = find_file(name, CONFIG_NAME, **location)
    is_local = Path(name).is_dir()
    if config is not None and not is_local:
        return None
    path = find_file(name, ENSEMBLE_FILE, **location)
    if path is None:
        folder = Path(name, location.get("subfolder") or "")
        folds = sorted((file.parent.name for file in folder.glob(f"fold_*/{CONFIG_NAME}")), key=lambda f: (len(f), f))
        if is_local and config is None and folds:
            raise FileNotFoundError(
                f"`{folder}` holds {', '.join(folds)} but no {ENSEMBLE_FILE}, which lists the folds once all of them "
                "are trained. Finish the run, name the folder of one fold, or write that file yourself: "
                f"{json.dumps({'members': folds})}."
            )
        return None
    if config is not None:
        raise ValueError(
            f"`{name}` holds a single checkpoint ({CONFIG_NAME}) and an ensemble ({ENSEMBLE_FILE}). Move one of them "
            "into a folder of its own."
        )
    return path


def read_members(path: str | os.PathLike) -> list[str]:
    """Return the folders of the members that a file lists, which lie beside it.

    Raises:
        ValueError: If it does not list distinct names of folders.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as err:
        raise ValueError(f"`{path}` is no JSON file ({err}). Write it anew.") from err
    members = content.get("members") if isinstance(content, Mapping) else None
    is_list = isinstance(members, list) and all(
        isinstance(name, str) and MEMBER_NAME.fullmatch(name) for name in members
    )
    if not members or not is_list or len(set(members)) < len(members):
        raise ValueError(
            f'`{path}` must list the folders beside it, each once, such as {{"members": ["fold_0", "fold_1"]}}, '
            f"got {content!r:.200}."
        )
    return members


def check_alike(names: Sequence[str], configs: Sequence[Any], processors: Sequence[Sam2UNetImageProcessor]) -> None:
    """Check that models segment the same regions of the same images, so that their probabilities can be averaged.

    Raises:
        ValueError: If one of them differs from the first.
    """
    facts = [
        {
            "regions": dict(config.regions),
            "modalities": processor.modalities,
            "neighbours": processor.neighbours,
            "plane": processor.plane or "axial",
            "num_channels": config.backbone_config.num_channels,
        }
        for config, processor in zip(configs, processors, strict=True)
    ]
    for name, own in zip(names, facts, strict=True):
        for fact, value in own.items():
            first = facts[0][fact]
            # Regions in another order are other channels.
            if value != first or (fact == "regions" and list(value) != list(first)):
                raise ValueError(
                    f"The members of an ensemble must have the same `{fact}`, got {first} in {names[0]} and {value} "
                    f"in {name}. Leave one of them out, or train it anew."
                )


class Sam2UNetEnsemble:
    """One SAM2-UNet or several that segment together, each with its own image processor.

    Sizes and windows of the processors may differ. Regions, modalities, neighbours and plane may not, because
    probabilities are averaged over the members.

    Args:
        models: One model, or one per member.
        processors: The image processor of each.

    Attributes:
        models: The models, in eval mode.
        processors: Their image processors, with the regions of the models.

    Raises:
        ValueError: If there is no model, not one processor per model, or a member differs from the first.
    """

    def __init__(
        self,
        models: Sam2UNetForSemanticSegmentation | Sequence[Sam2UNetForSemanticSegmentation],
        processors: Sam2UNetImageProcessor | Sequence[Sam2UNetImageProcessor],
    ):
        self.models = list(models) if isinstance(models, Sequence) else [models]
        self.processors = list(processors) if isinstance(processors, Sequence) else [processors]
        if not self.models or len(self.models) != len(self.processors):
            raise ValueError(
                "An ensemble takes one image processor per model, and one model or more, got "
                f"{len(self.models)} models and {len(self.processors)} image processors."
            )
        for model, processor in zip(self.models, self.processors, strict=True):
            model.eval()
            processor.regions = model.config.regions
        places = [(model.name_or_path, model._loaded_from.get("subfolder")) for model in self.models]
        names = [f"member {number} ({'/'.join(filter(None, place))})" for number, place in enumerate(places)]
        check_alike(names, [model.config for model in self.models], self.processors)

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike, device: str | torch.device | None = None, **kwargs: Any
    ) -> "Sam2UNetEnsemble":
        """Load a single checkpoint, or the members that `ensemble.json` lists, all of one commit.

        Args:
            name: Hub id or folder.
            device: Where to run. Default: a GPU if there is one.
            **kwargs: Arguments of the model's `from_pretrained`, such as `dtype=torch.bfloat16` and `revision`; those
                of downloads are the processor's too. With `device_map` the models stay where that puts them.

        Raises:
            OSError: As the `from_pretrained` of model and processor, or if folds are there without their list.
            ValueError: As these, if the list is wrong, or there are both `device` and `device_map`.
        """
        if device is not None and kwargs.get("device_map") is not None:
            raise ValueError(f"Pass `device` or `device_map`, got both: {device} and {kwargs['device_map']}.")
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)
        location = {key: kwargs[key] for key in (*DOWNLOAD_ARGUMENTS, "revision", "subfolder") if key in kwargs}
        path = find_ensemble(name, **location)
        places: list[dict[str, Any]] = [{}]
        if path is not None:
            members = ["/".join(filter(None, (kwargs.get("subfolder"), member))) for member in read_members(path)]
            places = [{"subfolder": member} for member in members]
            if not Path(name).is_dir() and (commit := extract_commit_hash(path, None)) is not None:
                # A push that comes between the downloads must not mix the members of two ensembles.
                places = [{**place, "revision": commit} for place in places]
        models, processors = [], []
        for place in places:
            try:
                model = Sam2UNetForSemanticSegmentation.from_pretrained(name, **{**kwargs, **place})
                processors.append(Sam2UNetImageProcessor.from_pretrained(name, **{**location, **place}))
            except OSError as err:
                if path is None:
                    raise
                raise OSError(f"Member {place['subfolder']} of the ensemble {name} cannot be loaded: {err}") from err
            if kwargs.get("device_map") is None:
                model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            models.append(model)
        return cls(models, processors)

    @property
    def regions(self) -> dict[str, list[int]]:
        """Region name -> the label ids it joins."""
        return self.models[0].config.regions

    @torch.inference_mode()
    def predict(
        self,
        prepare: Callable[[Sam2UNetImageProcessor], Mapping[str, Any]],
        target_sizes: Sequence[tuple[int, int]],
        flips: bool = False,
    ) -> list[torch.Tensor]:
        """Return what each member finds in a batch of images; their mean is what the ensemble finds.

        Members run one after the other, so that memory holds their weights and one batch.

        Args:
            prepare: Function of the processor of a member that returns what this makes of the images.
            target_sizes: `(height, width)` of each image.
            flips: Show each member the mirror images (horizontal, vertical, both) too.

        Returns:
            Per image the probabilities by member and mirror image, of shape `(maps, regions, height, width)`.
        """
        mirrored: list[tuple[int, ...]] = [(), (-1,), (-2,), (-2, -1)] if flips else [()]
        found: list[list[torch.Tensor]] = [[] for _ in target_sizes]
        for model, processor in zip(self.models, self.processors, strict=True):
            # Offloaded weights lie on no device; the model takes its inputs from any then.
            device = model.device if model.device.type != "meta" else torch.device("cpu")
            inputs: Any = prepare(processor)
            inputs = inputs.to(device, model.dtype)
            for axes in mirrored:
                turned = {
                    name: inputs[name].flip(axes) for name in ("pixel_values", "pixel_mask") if axes and name in inputs
                }
                outputs = model(**{**inputs, **turned})
                if axes:  # back before they are put on the image, where the window need not lie in the middle
                    outputs.logits = outputs.logits.flip(axes)
                for maps, own in zip(
                    found, processor.post_process_regions(outputs, target_sizes=target_sizes), strict=True
                ):
                    maps.append(own.to(maps[0].device) if maps else own)
        return [torch.stack(maps) for maps in found]


__all__ = ["Sam2UNetEnsemble"]
