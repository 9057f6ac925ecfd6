"""Ensembles: one SAM2-UNet or several that segment together, from one folder or repository."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import extract_commit_hash

from .checkpoint_sam2unet import DOWNLOAD_ARGUMENTS
from .clean_up_sam2unet import CLEAN_UP_FILE, CleanUp
from .image_processing_sam2unet import Sam2UNetImageProcessor
from .members_sam2unet import check_alike, find_ensemble, find_file, read_members
from .modeling_sam2unet import Sam2UNetForSemanticSegmentation


class Sam2UNetEnsemble:
    """One SAM2-UNet or several that segment together, each with its own image processor.

    Sizes and windows of the processors may differ. Regions, modalities, neighbours and plane may not, because
    probabilities are averaged over the members.

    Args:
        models: One model, or one per member.
        processors: The image processor of each.
        names: What errors call the models. Default: their numbers.
        clean_up: Rules for the volumes that they segment, which `predict` does not apply.

    Attributes:
        models: The models, in eval mode.
        processors: Their image processors, with the regions of the models.
        clean_up: The rules, or `None`.

    Raises:
        ValueError: If there is no model, not one processor per model, a member differs from the first, or there are
            rules for other regions.
    """

    def __init__(
        self,
        models: Sam2UNetForSemanticSegmentation | Sequence[Sam2UNetForSemanticSegmentation],
        processors: Sam2UNetImageProcessor | Sequence[Sam2UNetImageProcessor],
        names: Sequence[str] = (),
        clean_up: CleanUp | None = None,
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
        names = names or [f"member {number}" for number in range(len(self.models))]
        check_alike(names, [model.config for model in self.models], self.processors)
        self.clean_up = clean_up
        if clean_up is not None:
            clean_up.check_regions(self.regions)

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike, device: str | torch.device | None = None, **kwargs: Any
    ) -> "Sam2UNetEnsemble":
        """Load a single checkpoint, or the members that `ensemble.json` lists, and `clean_up.json`, all of one commit.

        Args:
            name: Hub id or folder.
            device: Where to run. Default: a GPU if there is one.
            **kwargs: Arguments of the model's `from_pretrained`, such as `dtype=torch.bfloat16` and `revision`; those
                of downloads are the processor's too. With `device_map` the models stay where that puts them.

        Raises:
            OSError: As the `from_pretrained` of model and processor, or if folds are there without their list.
            ValueError: As these, if the list or the clean-up is wrong, or there are both `device` and `device_map`.
        """
        if device is not None and kwargs.get("device_map") is not None:
            raise ValueError(f"Pass `device` or `device_map`, got both: {device} and {kwargs['device_map']}.")
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)
        location = {key: kwargs[key] for key in (*DOWNLOAD_ARGUMENTS, "revision", "subfolder") if key in kwargs}
        path = find_ensemble(name, **location)
        location |= commit_of(name, path)
        rules = find_file(name, CLEAN_UP_FILE, **location)
        location |= commit_of(name, rules)
        places: list[dict[str, Any]] = [{}]
        if path is not None:
            members = ["/".join(filter(None, (kwargs.get("subfolder"), member))) for member in read_members(path)]
            places = [{"subfolder": member} for member in members]
        models, processors = [], []
        for place in places:
            try:
                model = Sam2UNetForSemanticSegmentation.from_pretrained(name, **{**kwargs, **location, **place})
                processors.append(Sam2UNetImageProcessor.from_pretrained(name, **{**location, **place}))
            except OSError as err:
                if path is None:
                    raise
                raise OSError(f"Member {place['subfolder']} of the ensemble {name} cannot be loaded: {err}") from err
            if kwargs.get("device_map") is None:
                model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            models.append(model)
        clean_up = None if rules is None else CleanUp.load(rules, models[0].config.regions)
        return cls(models, processors, [place.get("subfolder", str(name)) for place in places], clean_up)

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


def commit_of(name: str | os.PathLike, path: str | None) -> dict[str, Any]:
    """Return the commit of a file of a Hub repository as the `revision` of further downloads, if there is one.

    A push that comes between two downloads must not mix the members of two ensembles, or weights and rules for others.
    """
    commit = None if path is None or Path(name).is_dir() else extract_commit_hash(path, None)
    return {} if commit is None else {"revision": commit}


__all__ = ["Sam2UNetEnsemble"]
