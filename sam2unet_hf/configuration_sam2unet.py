"""SAM2-UNet configuration: encoder preset, decoder sizes, regions and loss options."""

import copy
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode
from huggingface_hub.dataclasses import strict
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoConfig, PreTrainedConfig, Sam2HieraDetConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .regions_sam2unet import default_ignore_index, label_names, regions_from_pairs


# Options that earlier configurations hold, with the only value that the loss has left of each.
REMOVED_OPTIONS = {"boundary_kernel_size": 31, "boundary_weight": 5.0}


# SAM 2's four released encoders, in the fields in which they differ. Another size takes one more row.
PRESET_FIELDS = (
    "hidden_size",
    "num_attention_heads_per_stage",
    "blocks_per_stage",
    "window_size_per_stage",
    "global_attention_blocks",
    "window_positional_embedding_background_size",
)
PRESET_ROWS: dict[str, tuple[Any, ...]] = {
    "tiny": (96, [1, 2, 4, 8], [1, 2, 7, 2], [8, 4, 14, 7], [5, 7, 9], [7, 7]),
    "small": (96, [1, 2, 4, 8], [1, 2, 11, 2], [8, 4, 14, 7], [7, 10, 13], [7, 7]),
    "base_plus": (112, [2, 4, 8, 16], [2, 3, 16, 3], [8, 4, 14, 7], [12, 16, 20], [14, 14]),
    "large": (144, [2, 4, 8, 16], [2, 6, 36, 4], [8, 4, 16, 8], [23, 33, 43], [7, 7]),
}
PRESETS = {name: dict(zip(PRESET_FIELDS, row, strict=True)) for name, row in PRESET_ROWS.items()}


def did_you_mean(name: str | os.PathLike, is_file: bool = False) -> str:
    """Return ` (did you mean runs/phantom?)` if that is there and much like a path that is not, else nothing."""
    path = Path(name)
    wrong = next((part for part in (*reversed(path.parents), path) if not part.exists()), path)
    try:
        siblings = [other.name for other in wrong.parent.iterdir()]
    except OSError:
        siblings = []
    near = [wrong.with_name(other) / path.relative_to(wrong) for other in get_close_matches(wrong.name, siblings)]
    found = next((other for other in near if (other.is_file() if is_file else other.is_dir())), None)
    return f" (did you mean {found}?)" if found else ""


def check_source(name: str | os.PathLike, remedy: str) -> None:
    """Raise a `FileNotFoundError` that ends in `remedy` where nothing is at a path that cannot be a Hub id."""
    if os.path.exists(name):
        return
    try:
        validate_repo_id(os.fspath(name))
    except HFValidationError as err:
        raise FileNotFoundError(f"There is no folder {name}{did_you_mean(name)}. {remedy}") from err


def describe_unreachable(name: str | os.PathLike, err: OSError) -> str:
    """Say that a name is neither a folder here nor, for the reason that `err` tells, a repository of the Hub."""
    reason = "HF_HUB_OFFLINE is set, and it is not in the cache." if is_offline_mode() else str(err)
    return f"There is no folder {name}{did_you_mean(name)}, and none could be fetched from the Hub: {reason}"


def preset_backbone_config(preset: str, num_channels: int = 3) -> Sam2HieraDetConfig:
    """Return the encoder configuration of one of `PRESETS`, for images of this many channels."""
    if preset not in PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {preset!r}.")
    fields = copy.deepcopy(PRESETS[preset])
    return Sam2HieraDetConfig(
        **fields,
        num_channels=num_channels,
        num_attention_heads=fields["num_attention_heads_per_stage"][0],
        embed_dim_per_stage=[fields["hidden_size"] * 2**stage for stage in range(4)],
    )


def check_backbone(backbone: PreTrainedConfig | None) -> None:
    """Raise a `ValueError` unless the windows of an encoder tile every image and its four maps fit the decoder."""
    if not isinstance(backbone, Sam2HieraDetConfig):
        raise ValueError(
            f"`backbone_config` must be a `Sam2HieraDetConfig`, got {type(backbone).__name__}. "
            "SAM2-UNet runs on SAM 2's Hiera encoder only."
        )

    def require(holds: bool, name: str, rule: str) -> None:
        if not holds:
            raise ValueError(f"`backbone_config.{name}` must {rule}, got {getattr(backbone, name)}.")

    require(backbone.num_channels >= 1, "num_channels", "be at least 1")
    require(len(backbone.blocks_per_stage) == 4, "blocks_per_stage", "have four stages for the decoder's four maps")
    require(backbone.num_query_pool_stages == 3, "num_query_pool_stages", "be 3, because three stages halve the map")
    for name in ("embed_dim_per_stage", "num_attention_heads_per_stage", "window_size_per_stage"):
        require(len(getattr(backbone, name)) == 4, name, "have four entries, one per stage")
    for name, stride in (("patch_stride", 4), ("query_stride", 2)):
        is_square = getattr(backbone, name) in (stride, [stride, stride], (stride, stride))
        require(is_square, name, f"be {stride}, because the decoder works at strides 4, 8, 16 and 32")

    name, windows = "window_size_per_stage", backbone.window_size_per_stage
    require(8 % windows[0] == 0, name, "start with 2, 4 or 8, so that the position embedding tiles every image")
    is_even = all(window % 2 == 0 for window in windows[:3])
    require(is_even, name, "be even but for the last stage, because query pooling halves the windows")
    for dim, heads in zip(backbone.embed_dim_per_stage, backbone.num_attention_heads_per_stage, strict=True):
        if dim % heads:
            raise ValueError(f"`embed_dim_per_stage` {dim} is not a multiple of its {heads} attention heads.")


@strict
class Sam2UNetConfig(PreTrainedConfig):
    r"""Configuration of [`Sam2UNetForSemanticSegmentation`].

    Args:
        backbone_config: Encoder, SAM 2's Hiera trunk, as `Sam2HieraDetConfig` or as a dict of its fields. The default
            is the tiny encoder; see [`Sam2UNetConfig.from_preset`] for the others. Its `num_channels` is how many
            channels images have, by default 3.
        adapter_hidden_size: Width of the bottleneck of the adapter before each encoder block.
        decoder_channels: Channels of the four receptive field blocks and of the decoder.
        regions: Region name -> the label ids it joins; the model gives one sigmoid channel per region, in this
            order. Regions are nested (as BraTS' WT={1,2,3}, TC={1,3}, ET={3}) or disjoint. Defaults to
            `{"WT": [1, 2, 3]}`, the whole tumour.
        freeze_encoder: Train adapters and decoder only, as the papers do. `False` trains everything, which a model
            without pretrained encoder needs.
        auxiliary_loss_weights: Weights of the losses of the two auxiliary outputs, at stride 16 and stride 8; the
            loss of the prediction has weight 1. Defaults to `[1.0, 1.0]`.
        weight_bce: Apply the boundary weights of the loss to the BCE term too, as arXiv 2408.08870 writes it. `False`
            is the plain mean of the BraTS paper's equation and of the reference code as it runs.
        iou_over_batch: Sum intersection and union of the IoU term over the images of a batch before their ratio is
            taken, per region, instead of averaging the ratios of the images as the papers do. For batches with images
            that lack a region. Each process and each accumulated step has its own batch. Images with labels of
            different sizes, and so `eval_loss` of [`~training.Sam2UNetTrainer`], have one ratio each.
        ignore_index: Label id whose pixels count nowhere in the loss. Defaults to 255, or to -100, which masks do not
            hold, if a region names 255.
        encoder_source: Where the encoder's weights come from, as `from_sam2` records it: Hub id, or absolute path.
        encoder_revision: Commit of `encoder_source` on the Hub.
        encoder_sha256: Only in checkpoints saved with `trainable_only=True`, which lack the encoder: the SHA-256 that
            the weights from `encoder_source` must have.
        kwargs: Fields of `PreTrainedConfig`. `id2label` names the ids of the label map that the image processor
            rebuilds from the regions; by default it is derived from `regions`.

    Raises:
        huggingface_hub.errors.StrictDataclassError: If a value has the wrong type, is out of range, or does not fit
            another.
        ValueError: If the regions make no sense, see `region_levels`.

    Example:
        ```python
        >>> from sam2unet_hf import Sam2UNetConfig

        >>> config = Sam2UNetConfig.from_preset("tiny", regions={"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]})
        >>> config.backbone_config.embed_dim_per_stage
        [96, 192, 384, 768]

        ```
    """

    model_type = "sam2unet"
    keys_to_ignore_at_inference = ["auxiliary_logits", "hidden_states"]
    sub_configs_defaults = {"backbone_config": SubConfigSpec(AutoConfig, model_type="sam2_hiera_det_model")}

    backbone_config: dict | PreTrainedConfig | None = None
    adapter_hidden_size: int = 32
    decoder_channels: int = 64
    regions: dict[str, list[int]] | list[list[Any]] | None = None
    freeze_encoder: bool = True
    auxiliary_loss_weights: list[float] | None = None
    weight_bce: bool = False
    iou_over_batch: bool = False
    ignore_index: int | None = None
    encoder_source: str | None = None
    encoder_revision: str | None = None
    encoder_sha256: str | None = None

    @classmethod
    def from_preset(cls, preset: str, num_channels: int = 3, **kwargs) -> "Sam2UNetConfig":
        """Build the configuration of one of SAM 2's four encoder sizes.

        Args:
            preset: `"tiny"`, `"small"`, `"base_plus"` or `"large"` (the papers').
            num_channels: Channels of the images, stored as `backbone_config.num_channels`.
            **kwargs: Any other field of the configuration.

        Raises:
            ValueError: If `preset` is none of these.
        """
        return cls(backbone_config=preset_backbone_config(preset, num_channels), **kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the fields of a checkpoint's configuration.

        transformers takes the defaults for a folder without one, and for the fields of another model.

        Raises:
            OSError: If there is no such folder or repository, or no config.json in it.
            ValueError: If it is the configuration of another model.
        """
        name = os.fspath(pretrained_model_name_or_path)
        if os.path.isfile(name) and not name.endswith(".json"):
            raise OSError(f"{name} is a file. Name the folder that holds it.")
        check_source(name, "Name the folder of a run or of a checkpoint, or a Hub id.")
        try:
            fields, unused = super().get_config_dict(name, **kwargs)
        except OSError as err:
            if os.path.exists(name):
                raise
            raise OSError(describe_unreachable(name, err)) from err
        if not fields:
            inside = sorted(str(path.parent) for path in Path(name).glob("*/config.json"))
            raise OSError(
                f"{name} holds no config.json, so that it is no SAM2-UNet. Name the folder of a run or of a checkpoint"
                f"{f', such as {inside[0]}' if inside else ''}, or a Hub id."
            )
        if (found := fields.get("model_type", cls.model_type)) != cls.model_type:
            remedy = " Take its encoder by `from_sam2` (`--sam2_checkpoint`)." if found.startswith("sam2") else ""
            raise ValueError(f"{name} holds a model of type {found!r}, not a SAM2-UNet.{remedy}")
        return fields, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Build a configuration from a dict, with `kwargs` over it, checked together."""
        # transformers would set our fields one by one on the finished, checked configuration.
        own_fields = Sam2UNetConfig.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
        own_fields |= {"id2label", "label2id"} | REMOVED_OPTIONS.keys()
        overrides = {name: kwargs.pop(name) for name in own_fields & kwargs.keys()}
        stored = dict(config_dict)
        if overrides.keys() & {"regions", "id2label"}:
            # The stored names are those of other regions.
            stored.update(id2label=None, label2id=None)
        if "encoder_source" in overrides:
            # The stored commit is one of the other source.
            stored["encoder_revision"] = None
        return super().from_dict({**stored, **overrides}, **kwargs)

    def __post_init__(self, **kwargs):
        for name, value in REMOVED_OPTIONS.items():
            if (given := kwargs.pop(name, value)) != value:
                raise ValueError(
                    f"`{name}` is no longer an option, because the loss always takes {value}, got {given}. Remove it; "
                    "predictions do not depend on it."
                )
        if not type(self).__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
            # Where the package is installed, `pipeline` would ask to trust the code of the checkpoint nonetheless.
            kwargs.pop("custom_pipelines", None)
        if isinstance(self.backbone_config, dict):
            # There is only one encoder that a dict without `model_type` can mean.
            self.backbone_config = {"model_type": Sam2HieraDetConfig.model_type, **self.backbone_config}
        self.regions = {"WT": [1, 2, 3]} if self.regions is None else regions_from_pairs(self.regions)
        if self.ignore_index is None:
            self.ignore_index = default_ignore_index(self.regions)
        if self.auxiliary_loss_weights is None:
            self.auxiliary_loss_weights = [1.0, 1.0]
        names = label_names(self.regions)
        if (num_labels := kwargs.get("num_labels")) not in (None, len(names)):
            raise ValueError(
                f"`num_labels` {num_labels} does not fit `regions` {self.regions}, which write {len(names)} label "
                "ids, background among them. Say what to segment by `regions`, such as {'liver': [1], 'spleen': [2]}."
            )
        if self.id2label is None:
            self.id2label, self.label2id = names, None
        super().__post_init__(**kwargs)
        if self.label2id is None:
            self.label2id = {str(name): int(label_id) for label_id, name in self.id2label.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, with `regions` as pairs to keep their order."""
        return {**super().to_dict(), "regions": [[name, ids] for name, ids in self.regions.items()]}

    # The strict dataclass calls each `validate_*` method.

    def validate_architecture(self):
        """Check the sizes of the encoder, the adapters and the decoder."""
        check_backbone(self.backbone_config)
        for name in ("adapter_hidden_size", "decoder_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, got {getattr(self, name)}.")

    def validate_auxiliary_loss_weights(self):
        """Check that there is one weight per auxiliary output."""
        weights = self.auxiliary_loss_weights
        if len(weights) != 2 or min(weights) < 0:
            raise ValueError(f"`auxiliary_loss_weights` must be two weights >= 0, at stride 16 and 8, got {weights}.")

    def validate_labels(self):
        """Check that the regions and the names of the label ids fit each other."""
        for name, label_ids in self.regions.items():
            if self.ignore_index in label_ids:
                raise ValueError(
                    f"`regions[{name!r}]` {label_ids} holds `ignore_index` {self.ignore_index}, whose pixels count "
                    "nowhere. Leave out `ignore_index`, or pass an id that no mask holds, such as -100."
                )
        written = label_names(self.regions)
        if unnamed := [label_id for label_id in written if label_id not in self.id2label]:
            raise ValueError(
                f"`id2label` {self.id2label} does not name the label ids {unnamed} that `regions` {self.regions} "
                "write."
            )
        # `num_labels` or `id2label` without `regions` would name such ids.
        if unknown := [label_id for label_id in self.id2label if label_id not in written]:
            raise ValueError(
                f"`id2label` {self.id2label} names the label ids {unknown}, which `regions` {self.regions} do not "
                "write. Say what to segment by `regions`, such as {'liver': [1], 'spleen': [2]}, instead of "
                "`num_labels` or `id2label`."
            )


__all__ = ["Sam2UNetConfig"]
