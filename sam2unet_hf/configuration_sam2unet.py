"""SAM2-UNet configuration: encoder preset, decoder sizes, regions and loss options."""

# transformers types the fields of a config by what the constructor takes, not by what an instance holds.
# mypy: disable-error-code="arg-type, index, operator, union-attr"

import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig, Sam2HieraDetConfig
from transformers.configuration_utils import SubConfigSpec

from .regions_sam2unet import label_names, regions_from_pairs


# SAM 2's four released encoders; `embed_dim_per_stage` doubles from `hidden_size`.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 96,
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "blocks_per_stage": [1, 2, 7, 2],
        "window_size_per_stage": [8, 4, 14, 7],
        "global_attention_blocks": [5, 7, 9],
        "window_positional_embedding_background_size": [7, 7],
    },
    "small": {
        "hidden_size": 96,
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "blocks_per_stage": [1, 2, 11, 2],
        "window_size_per_stage": [8, 4, 14, 7],
        "global_attention_blocks": [7, 10, 13],
        "window_positional_embedding_background_size": [7, 7],
    },
    "base_plus": {
        "hidden_size": 112,
        "num_attention_heads_per_stage": [2, 4, 8, 16],
        "blocks_per_stage": [2, 3, 16, 3],
        "window_size_per_stage": [8, 4, 14, 7],
        "global_attention_blocks": [12, 16, 20],
        "window_positional_embedding_background_size": [14, 14],
    },
    "large": {
        "hidden_size": 144,
        "num_attention_heads_per_stage": [2, 4, 8, 16],
        "blocks_per_stage": [2, 6, 36, 4],
        "window_size_per_stage": [8, 4, 16, 8],
        "global_attention_blocks": [23, 33, 43],
        "window_positional_embedding_background_size": [7, 7],
    },
}


def preset_backbone_config(preset: str) -> Sam2HieraDetConfig:
    """Return the encoder configuration of one of SAM 2's released sizes.

    Args:
        preset: `"tiny"`, `"small"`, `"base_plus"` or `"large"`.

    Raises:
        ValueError: If `preset` is none of these.
    """
    if preset not in PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {preset!r}.")
    values = copy.deepcopy(PRESETS[preset])
    return Sam2HieraDetConfig(
        **values,
        num_attention_heads=values["num_attention_heads_per_stage"][0],
        embed_dim_per_stage=[values["hidden_size"] * 2**stage for stage in range(4)],
    )


@strict
class Sam2UNetConfig(PreTrainedConfig):
    r"""Configuration of [`Sam2UNetForSemanticSegmentation`].

    Args:
        backbone_config: Encoder, SAM 2's Hiera trunk, as `Sam2HieraDetConfig` or as a dict of its fields. The default
            is the tiny encoder; see [`Sam2UNetConfig.from_preset`] for the others.
        adapter_hidden_size: Width of the bottleneck of the adapter before each encoder block.
        decoder_channels: Channels of the four receptive field blocks and of the decoder.
        regions: Region name -> the label ids it joins; the model gives one sigmoid channel per region, in this
            order. Regions are nested (as BraTS' WT={1,2,3}, TC={1,3}, ET={3}) or disjoint. Defaults to
            `{"WT": [1, 2, 3]}`, the whole tumour.
        freeze_encoder: Train adapters and decoder only, as the papers do. `False` trains everything, which a model
            without pretrained encoder needs.
        auxiliary_loss_weights: Weights of the losses of the two auxiliary outputs, at stride 16 and stride 8; the
            loss of the prediction has weight 1. Defaults to `[1.0, 1.0]`.
        boundary_kernel_size: Side in pixels (odd) of the average pool that finds mask boundaries for the loss.
        boundary_weight: How much more a pixel on the boundary counts than one far from it, in
            `1 + boundary_weight * |avgpool(mask) - mask|`.
        weight_bce: Apply the boundary weight to the BCE term too, as arXiv 2408.08870 writes it. `False` is the plain
            mean of the BraTS paper's equation and of the reference code as it runs.
        ignore_index: Label id whose pixels count nowhere in the loss.
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
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="sam2_hiera_det_model"),
    }

    backbone_config: dict | PreTrainedConfig | None = None
    adapter_hidden_size: int = 32
    decoder_channels: int = 64
    regions: dict[str, list[int]] | list[list[Any]] | None = None
    freeze_encoder: bool = True
    auxiliary_loss_weights: list[float] | None = None
    boundary_kernel_size: int = 31
    boundary_weight: float = 5.0
    weight_bce: bool = False
    ignore_index: int = 255
    encoder_source: str | None = None
    encoder_revision: str | None = None
    encoder_sha256: str | None = None

    @classmethod
    def from_preset(cls, preset: str, **kwargs) -> "Sam2UNetConfig":
        """Build the configuration of one of SAM 2's four encoder sizes.

        Args:
            preset: `"tiny"`, `"small"`, `"base_plus"` or `"large"` (the papers').
            **kwargs: Any other field of the configuration.

        Raises:
            ValueError: If `preset` is none of these.
        """
        return cls(backbone_config=preset_backbone_config(preset), **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Build a configuration from a dict, with `kwargs` over it, checked together."""
        # transformers would set our fields one by one on the finished, checked configuration.
        own = set(Sam2UNetConfig.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
        names = {"id2label", "label2id"}
        overrides = {name: kwargs.pop(name) for name in (own | names) & kwargs.keys()}
        if overrides.keys() & {"regions", "id2label"}:
            # The names of other regions.
            config_dict = {name: config_dict[name] for name in config_dict if name not in names}
        config_dict = {**config_dict, **overrides}
        if "encoder_source" in overrides:
            # The commit is one of the other source.
            config_dict["encoder_revision"] = overrides.get("encoder_revision")
        num_labels = kwargs.pop("num_labels", None)
        found = super().from_dict(config_dict, **kwargs)
        config = found[0] if isinstance(found, tuple) else found  # with `return_unused_kwargs`
        if num_labels not in (None, config.num_labels):
            raise ValueError(
                f"`num_labels` {num_labels} does not fit `regions` {config.regions}, which write {config.num_labels} "
                "label ids, background among them. Say what to segment by `regions`, such as {'liver': [1], 'spleen': "
                "[2]}."
            )
        return found

    def __post_init__(self, **kwargs):
        # A dict without `model_type` is meant as the only encoder there is.
        if isinstance(self.backbone_config, dict):
            self.backbone_config = {"model_type": Sam2HieraDetConfig.model_type, **self.backbone_config}
        self.regions = {"WT": [1, 2, 3]} if self.regions is None else regions_from_pairs(self.regions)
        if self.auxiliary_loss_weights is None:
            self.auxiliary_loss_weights = [1.0, 1.0]
        if self.id2label is None:
            self.id2label = dict(label_names(self.regions))
            self.label2id = None
        super().__post_init__(**kwargs)
        if self.label2id is None:
            self.label2id = {str(name): int(label_id) for label_id, name in self.id2label.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, with `regions` as pairs to keep their order."""
        return {**super().to_dict(), "regions": [[name, ids] for name, ids in self.regions.items()]}

    def validate_architecture(self):
        """Check the fields that depend on each other; called by the strict dataclass."""
        backbone = self.backbone_config
        if not isinstance(backbone, Sam2HieraDetConfig):
            raise ValueError(
                f"`backbone_config` must be a `Sam2HieraDetConfig`, got {type(backbone).__name__}. "
                "SAM2-UNet runs on SAM 2's Hiera encoder only."
            )
        if len(backbone.blocks_per_stage) != 4 or backbone.num_query_pool_stages != 3:
            raise ValueError(
                "`backbone_config` must have four stages that halve the resolution three times, got "
                f"`blocks_per_stage` {backbone.blocks_per_stage} and `num_query_pool_stages` "
                f"{backbone.num_query_pool_stages}."
            )
        for name in ("embed_dim_per_stage", "num_attention_heads_per_stage", "window_size_per_stage"):
            if len(getattr(backbone, name)) != 4:
                raise ValueError(f"`backbone_config.{name}` must have four entries, got {getattr(backbone, name)}.")
        stride = {"patch_stride": 4, "query_stride": 2}
        for name, value in stride.items():
            if getattr(backbone, name) not in (value, [value, value], (value, value)):
                raise ValueError(
                    f"`backbone_config.{name}` must be {value}, because the decoder works at strides 4, 8, 16 and 32, "
                    f"got {getattr(backbone, name)}."
                )
        if 8 % backbone.window_size_per_stage[0]:
            raise ValueError(
                "`backbone_config.window_size_per_stage` must start with 2, 4 or 8, so that the position embedding "
                f"tiles every image, got {backbone.window_size_per_stage}."
            )
        if any(window % 2 for window in backbone.window_size_per_stage[:3]):
            raise ValueError(
                "`backbone_config.window_size_per_stage` must be even but for the last stage, because query pooling "
                f"halves the windows, got {backbone.window_size_per_stage}."
            )
        for dim, heads in zip(backbone.embed_dim_per_stage, backbone.num_attention_heads_per_stage, strict=True):
            if dim % heads:
                raise ValueError(f"`embed_dim_per_stage` {dim} is not a multiple of its {heads} attention heads.")
        for name in ("adapter_hidden_size", "decoder_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, got {getattr(self, name)}.")
        if self.boundary_kernel_size < 1 or self.boundary_kernel_size % 2 == 0:
            raise ValueError(f"`boundary_kernel_size` must be odd and >= 1, got {self.boundary_kernel_size}.")
        if self.boundary_weight < 0:
            raise ValueError(f"`boundary_weight` must be >= 0, got {self.boundary_weight}.")
        if len(self.auxiliary_loss_weights) != 2 or min(self.auxiliary_loss_weights) < 0:
            raise ValueError(
                "`auxiliary_loss_weights` must be two weights >= 0, for the outputs at stride 16 and stride 8, got "
                f"{self.auxiliary_loss_weights}."
            )
        named = label_names(self.regions)
        for name, label_ids in self.regions.items():
            if self.ignore_index in label_ids:
                raise ValueError(
                    f"`regions[{name!r}]` {label_ids} holds `ignore_index` {self.ignore_index}. Masks with values 0 "
                    "and 255 must be mapped to 0 and 1 first."
                )
        unnamed = [label_id for label_id in named if label_id not in self.id2label]
        if unnamed:
            raise ValueError(
                f"`id2label` {self.id2label} does not name the label ids {unnamed} that `regions` {self.regions} "
                "write."
            )
        # As `num_labels` and `id2label` alone would.
        if unknown := [label_id for label_id in self.id2label if label_id not in named]:
            raise ValueError(
                f"`id2label` {self.id2label} names the label ids {unknown}, which `regions` {self.regions} do not "
                "write. Say what to segment by `regions`, such as {'liver': [1], 'spleen': [2]}, instead of "
                "`num_labels` or `id2label`."
            )


__all__ = ["PRESETS", "Sam2UNetConfig", "preset_backbone_config"]
