"""PyTorch SAM2-UNet: SAM 2's Hiera encoder with adapters, receptive field blocks and a U-Net decoder."""

# transformers types the fields of a config by what the constructor takes, not by what an instance holds.
# mypy: disable-error-code="arg-type, union-attr"

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, logging

from .configuration_sam2unet import Sam2UNetConfig
from .decoder_sam2unet import Sam2UNetConvNorm, Sam2UNetDecodeHead
from .encoder_sam2unet import Sam2UNetEncoder
from .encoder_source_sam2unet import encoder_sha256, fetch_encoder
from .image_processing_sam2unet import Sam2UNetImageProcessor
from .loss_sam2unet import deep_supervision_loss
from .weights_sam2unet import (
    check_state_dict,
    is_local_source,
    is_pretrained_weight,
    load_sam2_encoder,
    read_safetensors,
    weight_files,
)
from .windows_sam2unet import in_chunks


logger = logging.get_logger(__name__)

# The deepest stride; the window position embedding tiles only multiples of it.
STRIDE = 32

MIN_IMAGE_SIZE = 64

# Arguments of `from_pretrained` that say how to reach a repository, whichever.
DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")


@dataclass
class Sam2UNetOutput(ModelOutput):
    """Output of [`Sam2UNetForSemanticSegmentation`].

    Args:
        loss: Scalar, when labels are given.
        logits: Raw scores of shape `(batch_size, num_regions, height, width)` at the size of the input.
        auxiliary_logits: Raw scores of the side outputs at stride 16 and stride 8, each of the shape of `logits`;
            when asked for or when labels are given.
        hidden_states: The encoder's four feature maps, when asked for, each of shape
            `(batch_size, embed_dim_per_stage[i], height / stride, width / stride)` with strides 4, 8, 16 and 32,
            where height and width are those of the input padded to multiples of 32.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    auxiliary_logits: tuple[torch.Tensor, torch.Tensor] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class Sam2UNetPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the features that SAM2-UNet supports."""

    config_class = Sam2UNetConfig
    base_model_prefix = "sam2unet"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Sam2UNetBlock", "Sam2UNetReceptiveFieldBlock", "Sam2UNetUpBlock"]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers guesses from the source of the attention class, and guesses wrong here.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as PyTorch does, and an encoder that does not come from SAM 2 as transformers does."""
        if isinstance(module, Sam2UNetEncoder):
            init.zeros_(module.pos_embed)
            init.zeros_(module.pos_embed_window)
            # Called after the layers in it, so this replaces what the last branch did to them.
            for name, layer in module.named_modules():
                if isinstance(layer, (nn.Linear, nn.Conv2d)) and ".adapter." not in name:
                    init.trunc_normal_(layer.weight, std=self.config.backbone_config.initializer_range)
                    init.zeros_(layer.bias)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    # Where in the repository `name_or_path` the checkpoint was: `revision` and `subfolder`, where given.
    placed: dict[str, Any] = {}

    def freeze_encoder(self, freeze: bool = True) -> None:
        """Freeze or release the encoder's own weights; adapters and decoder stay trainable.

        Sets `config.freeze_encoder` too, so that it is saved and restored with the model.

        Args:
            freeze: `False` makes every weight trainable.
        """
        self.config.freeze_encoder = freeze
        for name, parameter in self.named_parameters():
            # Quantised weights are integers, which have no gradient.
            if name.startswith("encoder.") and parameter.is_floating_point():
                parameter.requires_grad_(not (freeze and is_pretrained_weight(name)))

    def fuse_for_inference(self, fuse: bool = True) -> None:
        """Fold each batch norm into the convolution before it; logits change by rounding alone.

        Parameters and `state_dict` stay as they are. `train()`, loading weights and `fuse_for_inference(False)` undo
        it. Call it again after changing weights in any other way.

        Args:
            fuse: `False` undoes it.

        Raises:
            ValueError: If the model is in training mode, where batch norm takes its statistics from each batch.
        """
        if fuse and self.training:
            raise ValueError("`fuse_for_inference` needs a model in eval mode. Call `model.eval()` first.")
        for module in self.modules():
            if isinstance(module, Sam2UNetConvNorm):
                module.fuse(fuse)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load a checkpoint as any transformers model, with the encoder frozen or not as its config says.

        The encoder of a checkpoint that was saved with `trainable_only=True` is fetched from where the config says,
        or from `encoder_source=` (and `encoder_revision=`).

        Raises:
            OSError: If there is no checkpoint, no safetensors file in it, or its encoder cannot be reached.
            ValueError: If a weight file is damaged or a pickle, or the encoder is not the one that was trained on.
        """
        name = pretrained_model_name_or_path
        is_pickle = str(name).endswith((".bin", ".ckpt", ".pt", ".pth"))
        if kwargs.get("use_safetensors") is False or is_pickle:
            raise ValueError(
                f"Weights are loaded from safetensors files only, not from pickles, got {name}. Convert checkpoints "
                "of the reference SAM2-UNet with `python -m sam2unet_hf.conversion`."
            )
        kwargs["use_safetensors"] = True
        is_small = False
        placed: dict[str, Any] = {
            argument: kwargs[argument] for argument in ("revision", "subfolder") if argument in kwargs
        }
        if name is not None and kwargs.get("state_dict") is None:
            config = cls.read_config(kwargs.get("config"), name, kwargs)
            if config.get("transformers_weights") is not None:
                raise ValueError(
                    f"The config of {name} names {config['transformers_weights']} as `transformers_weights`. Weights "
                    "are read from model.safetensors only; remove the field."
                )
            # Raises where a pickle hides among the shards.
            files = {"variant": kwargs.get("variant"), **placed}
            download_kwargs = {argument: kwargs[argument] for argument in DOWNLOAD_ARGUMENTS if argument in kwargs}
            weight_files(name, **files, **{**download_kwargs, "force_download": False})  # super() downloads
            if config.get("encoder_sha256") is not None:
                state_dict = read_safetensors(name, **files, **download_kwargs)
                is_small = not any(map(is_pretrained_weight, state_dict))
            if is_small:
                backbone_config = cls.config_class(backbone_config=config["backbone_config"]).backbone_config
                encoder = fetch_encoder(config, str(name), backbone_config, **download_kwargs)
                kwargs["state_dict"] = {**state_dict, **{f"encoder.{key}": value for key, value in encoder.items()}}
                kwargs["config"] = kwargs.get("config") or name
                pretrained_model_name_or_path = None
        output_loading_info = kwargs.pop("output_loading_info", False)
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except SafetensorError as err:
            raise ValueError(
                f"A weight file of {name} is damaged ({err}). Copy it again, or pass `force_download=True`."
            ) from err
        model, loading_info = loaded
        if lost := [weight for weight in loading_info["missing_keys"] if is_pretrained_weight(weight)]:
            raise ValueError(
                f"{name} lacks {len(lost)} weights of the encoder, such as {sorted(lost)[0]!r}, and its config does "
                "not say where they are: `encoder_source` and `encoder_sha256` are missing. Save it again, with "
                "`trainable_only=True` if the encoder is to stay out."
            )
        if name is not None:
            model.name_or_path = model.config.name_or_path = str(name)
            model.placed = placed
        if not is_small:
            model.config.encoder_sha256 = None
        # transformers replaces the parameters of the constructor by new ones, all trainable.
        model.freeze_encoder(model.config.freeze_encoder)
        return (model, loading_info) if output_loading_info else model

    @classmethod
    def read_config(cls, config: Any, name: str | os.PathLike, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of the config that `from_pretrained` will use."""
        if isinstance(config, PreTrainedConfig):
            return config.to_dict()
        arguments = (*DOWNLOAD_ARGUMENTS, "revision", "subfolder")
        download_kwargs = {argument: kwargs[argument] for argument in arguments if argument in kwargs}
        fields, _ = cls.config_class.get_config_dict(config or name, **download_kwargs)
        overrides = {field: kwargs[field] for field in ("encoder_source", "encoder_revision") if field in kwargs}
        return cls.config_class.from_dict(fields, **overrides).to_dict()


class Sam2UNetForSemanticSegmentation(Sam2UNetPreTrainedModel):
    """SAM2-UNet: SAM 2's Hiera encoder with adapters and a U-Net decoder, one sigmoid channel per region.

    With `config.freeze_encoder` only adapters and decoder are trained.

    Args:
        config: Sizes, regions and loss options.

    Source: arXiv 2408.08870; for brain tumours doi 10.3390/app15063267.

    Example:
        ```python
        >>> import torch
        >>> from sam2unet_hf import Sam2UNetConfig, Sam2UNetForSemanticSegmentation

        >>> model = Sam2UNetForSemanticSegmentation(Sam2UNetConfig.from_preset("tiny")).eval()
        >>> with torch.inference_mode():
        ...     logits = model(torch.zeros(1, 3, 96, 64)).logits
        >>> logits.shape
        torch.Size([1, 1, 96, 64])

        ```
    """

    def __init__(self, config: Sam2UNetConfig):
        super().__init__(config)
        self.encoder = Sam2UNetEncoder(config)
        self.decode_head = Sam2UNetDecodeHead(config)
        self.post_init()
        self.freeze_encoder(config.freeze_encoder)

    def get_input_embeddings(self) -> nn.Module:
        """Return the layer that makes tokens of pixels, which FSDP and PEFT ask for."""
        return self.encoder.patch_embed

    @classmethod
    def from_sam2(
        cls,
        source: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        **config_kwargs: Any,
    ) -> "Sam2UNetForSemanticSegmentation":
        """Build a model on a pretrained SAM 2 or SAM 2.1 encoder; adapters and decoder are new.

        Args:
            source: Hub id such as `"facebook/sam2-hiera-large"`, local folder of such a checkpoint, or original `.pt`
                file of SAM 2. The papers use SAM 2, not 2.1.
            revision: Branch, tag or commit on the Hub.
            token: Access token for the Hub, as in `from_pretrained`.
            cache_dir: Folder for downloads, as in `from_pretrained`.
            **config_kwargs: Fields of [`Sam2UNetConfig`], such as `regions`.

        Raises:
            FileNotFoundError: If `source` is the path of a file that does not exist.
            OSError: If it is no folder with a checkpoint and no repository that can be reached.
            TypeError: If an argument is no field of the configuration.
            ValueError: If it holds no SAM 2 encoder, or one with missing keys or of another size.
        """
        if unknown := config_kwargs.keys() - Sam2UNetConfig.__dataclass_fields__.keys():
            raise TypeError(f"`from_sam2` got {', '.join(sorted(unknown))}, which is no field of `Sam2UNetConfig`.")
        encoder = load_sam2_encoder(
            source, config_kwargs.pop("backbone_config", None), revision=revision, token=token, cache_dir=cache_dir
        )
        provenance = {"encoder_source": encoder.source, "encoder_revision": encoder.revision}
        model = cls(Sam2UNetConfig(backbone_config=encoder.backbone_config, **provenance, **config_kwargs))
        expected = {name: value for name, value in model.encoder.state_dict().items() if ".adapter." not in name}
        backbone = model.config.backbone_config
        size = f"an encoder of width {backbone.hidden_size} with blocks {backbone.blocks_per_stage}"
        check_state_dict(encoder.state_dict, expected, str(source), size)
        model.encoder.load_state_dict(encoder.state_dict, strict=False)
        return model

    def verify_encoder_source(self, may_be_local: bool = True) -> dict[str, str | None]:
        """Check that the encoder can be fetched again from `config.encoder_source`, weight by weight.

        Args:
            may_be_local: Whether a path of this machine will do.

        Returns:
            What the config must say to fetch just that one: `encoder_source`, `encoder_revision`, `encoder_sha256`.

        Raises:
            OSError: If it cannot be reached.
            ValueError: If no source is known, or the weights there are not those of this model, or it is a path and
                must not be.
        """
        config = self.config
        if config.encoder_source is None:
            raise ValueError(
                "`trainable_only=True` needs to know where the encoder comes from. Build the model with `from_sam2`, "
                'set `model.config.encoder_source` to a Hub id such as "facebook/sam2-hiera-large" if it is that '
                "encoder, or save the whole model."
            )
        if not may_be_local and is_local_source(config.encoder_source):
            raise ValueError(
                f"The encoder comes from {config.encoder_source}, which nobody else can reach. Set "
                "`model.config.encoder_source` to a Hub id with the same weights, such as "
                '"facebook/sam2-hiera-large", or push without `trainable_only=True`.'
            )
        found = load_sam2_encoder(config.encoder_source, config.backbone_config, revision=config.encoder_revision)
        for name, value in self.encoder.state_dict().items():
            if ".adapter." not in name:
                there = found.state_dict.get(name)
                if there is None or not torch.equal(there.to(value.dtype), value.cpu()):
                    raise ValueError(
                        f"The encoder is not the one in {config.encoder_source}: {name!r} differs. It was trained, or "
                        "comes from elsewhere; save the whole model, without `trainable_only=True`."
                    )
        return {
            "encoder_source": found.source,
            "encoder_revision": found.revision,
            "encoder_sha256": encoder_sha256(found.state_dict),
        }

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        *args,
        trainable_only: bool = False,
        **kwargs,
    ) -> None:
        """Save weights, configuration and code as any transformers model, for both of its auto classes.

        Args:
            save_directory: Folder to write.
            is_main_process: As in transformers, like all that is not listed here.
            state_dict: The weights, if not those of the model.
            push_to_hub: Upload what was written too. [`push_to_hub`] adds a model card and the image processor.
            *args: As in transformers.
            trainable_only: Leave out the encoder and note in the config where it comes from, so that
                `from_pretrained` fetches it there: 17 MB instead of 0.87 GB for Hiera-L. The encoder there is compared
                with this one first.
            **kwargs: As in transformers.

        Raises:
            OSError: With `trainable_only=True`, if the encoder's source cannot be reached.
            ValueError: With `trainable_only=True`, if the encoder's source is not known, holds other weights, or is
                a path of this machine and the model is pushed.
        """
        config = self.config
        # FSDP makes a class of its own of this one, whose code is no use to anybody else.
        current_class = type(self)
        own_name = current_class.__name__.removeprefix("FSDP")
        own_class = next(base for base in current_class.__mro__ if base.__name__ == own_name)
        # `register_for_auto_class` knows one auto class per model.
        name = f"{own_class.__module__.split('.')[-1]}.{own_name}"
        auto_map = {"AutoModel": name, "AutoModelForSemanticSegmentation": name}
        config.auto_map = {**(getattr(config, "auto_map", None) or {}), **auto_map}
        provenance = {field: getattr(config, field) for field in ("encoder_source", "encoder_revision")}
        written = {**provenance, "encoder_sha256": None}
        if trainable_only:
            # Only one process of several writes.
            if is_main_process:
                provenance = written = self.verify_encoder_source(may_be_local=not push_to_hub)
            weights = self.state_dict() if state_dict is None else state_dict
            state_dict = {name: value for name, value in weights.items() if not is_pretrained_weight(name)}
        elif is_local_source(config.encoder_source):
            # A path is nobody else's business, and a whole model does without.
            written = dict.fromkeys(written)
        for field, value in written.items():
            setattr(config, field, value)
        try:
            self.__class__ = own_class
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, *args, **kwargs)
        finally:
            self.__class__ = current_class
            for field, value in provenance.items():
                setattr(config, field, value)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        trainable_only: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> str:
        """Upload weights, configuration, image processor, code and model card.

        The image processor is the one beside the checkpoint that this model was loaded from, with the regions of the
        model; where the model was trained since, one that lies on the Hub is kept. The card tells of the run in that
        folder, as long as the weights are those of the run; else it claims no results. A card that somebody edited is
        kept, in the folder or else on the Hub.

        Args:
            repo_id: Repository `user/name`, made if need be.
            trainable_only: Leave out the encoder, see [`save_pretrained`].
            commit_message: Title of the commit, `"Upload model"` by default.
            commit_description: Text of the commit.
            private: Make the repository private, where it is new.
            token: Token with the right to write; by default the one of `hf auth login`.
            revision: Branch, made if need be.
            create_pr: Open a pull request instead.
            max_shard_size: Size from which weights are split, such as `"5GB"`.
            tags: Tags for a new card.

        Raises:
            OSError: As [`save_pretrained`], or if the Hub cannot be reached or refuses.
            ValueError: As [`save_pretrained`].
        """
        if trainable_only:
            self.verify_encoder_source(may_be_local=False)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # Or weights in one file would go before new ones in shards.
        outdated = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, trainable_only=trainable_only, max_shard_size=max_shard_size)
            Sam2UNetImageProcessor.register_for_auto_class()
            try:
                # Where this file came with the weights, the package and its template may be missing.
                from sam2unet_hf import hub
            except ImportError:
                hub = None  # type: ignore[assignment]
            is_source = hub and self.name_or_path and hub.have_equal_weights(Path(folder), Path(self.name_or_path))
            if is_source or not api.file_exists(repo_id, "preprocessor_config.json", revision=revision):
                try:
                    processor = Sam2UNetImageProcessor.from_pretrained(self.name_or_path, token=token, **self.placed)
                except OSError:  # a new model, or a folder without one
                    processor = Sam2UNetImageProcessor()
                processor.regions = self.config.regions
                processor.save_pretrained(folder)
            if hub is None:
                logger.warning("No model card is written: that takes the package sam2unet-hf.")
            else:
                outdated += hub.add_model_card(folder, self.name_or_path, repo_id, revision, token, tags)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload model",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                delete_patterns=outdated,
            )

    def region_masks(self, label_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn label maps into region masks.

        Args:
            label_map: Integer ids of shape `(batch_size, height, width)`.

        Returns:
            Masks of shape `(batch_size, num_regions, height, width)`, float32 in {0, 1}, and the mask of the pixels
            that count, `(batch_size, 1, height, width)`: all that are not `config.ignore_index`.
        """
        ids = [torch.tensor(label_ids, device=label_map.device) for label_ids in self.config.regions.values()]
        masks = torch.stack([torch.isin(label_map, region) for region in ids], dim=1)
        return masks.float(), (label_map != self.config.ignore_index).unsqueeze(1)

    def compute_loss(
        self, outputs: Sequence[torch.Tensor], labels: torch.Tensor | Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Deeply supervised loss of the prediction and the side outputs, all of the input's size, at label size.

        Args:
            outputs: Raw scores of shape `(batch_size, num_regions, height, width)`.
            labels: As in [`forward`].
        """
        if not isinstance(labels, torch.Tensor):
            per_image = zip(labels, *outputs, strict=True)
            losses = [
                self.compute_loss([logits[None] for logits in image], label[None]) for label, *image in per_image
            ]
            return torch.stack(losses).mean()
        if labels.is_floating_point():
            masks, valid = labels, labels != self.config.ignore_index
        else:
            masks, valid = self.region_masks(labels)
        if outputs[0].shape[-2:] != masks.shape[-2:]:
            outputs = [F.interpolate(logits, size=masks.shape[-2:], mode="bilinear") for logits in outputs]
        return deep_supervision_loss(
            outputs,
            masks,
            output_weights=[1.0, *self.config.auxiliary_loss_weights],
            valid=valid,
            weight_bce=self.config.weight_bce,
        )

    def check_labels(self, labels: torch.Tensor | list[torch.Tensor], batch_size: int) -> None:
        """Raise a `ValueError` if the labels do not fit the batch and the regions."""
        num_regions = len(self.config.regions)
        maps = labels if isinstance(labels, torch.Tensor) else list(labels)
        fits = len(maps) == batch_size
        for label in [maps[0]] if fits and isinstance(maps, torch.Tensor) else maps:
            is_map = label.ndim == 2 and not label.is_floating_point() and label.dtype != torch.bool
            is_masks = label.ndim == 3 and label.is_floating_point() and label.shape[0] == num_regions
            fits = fits and (is_map or is_masks)
        if not fits:
            got = [(tuple(label.shape), label.dtype) for label in ([maps] if isinstance(maps, torch.Tensor) else maps)]
            raise ValueError(
                f"`labels` must be integer label maps of shape ({batch_size}, height, width), or float masks in "
                f"[0, 1] of shape ({batch_size}, {num_regions}, height, width) with one channel per region of "
                f"{list(self.config.regions)}, or a list of {batch_size} of either without the batch dimension; got "
                f"{', '.join(f'{shape} {dtype}' for shape, dtype in got)}."
            )

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | list[torch.Tensor] | None = None,
        output_auxiliary_logits: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> tuple | Sam2UNetOutput:
        """Segment a batch of images.

        Args:
            pixel_values: Normalised images of shape `(batch_size, num_channels, height, width)`, height and width
                from 64 up. Multiples of 32 are native; other sizes are padded with zeros at the right and bottom, and
                the logits are cropped.
            labels: Label maps `(batch_size, height, width)` of integer ids, or float region masks in [0, 1] of shape
                `(batch_size, num_regions, height, width)`, of any size: logits are resized to them for the loss. Where
                the images of a batch have labels of different sizes, a list with one tensor per image; the loss is
                then the mean over the images. Pixels of `config.ignore_index` count nowhere, in masks too.
            output_auxiliary_logits: Return the side outputs also without labels.
            output_hidden_states: Return the encoder's feature maps. Defaults to `config.output_hidden_states`.
            return_dict: `False` returns a tuple. Defaults to `config.return_dict`.

        Raises:
            ValueError: If an image is too small or has the wrong number of channels, or labels do not fit.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        num_channels = self.config.backbone_config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels:
            raise ValueError(
                f"`pixel_values` must have shape (batch_size, {num_channels}, height, width), got "
                f"{tuple(pixel_values.shape)}. `Sam2UNetImageProcessor` makes them from images."
            )
        height, width = pixel_values.shape[-2:]
        if min(height, width) < MIN_IMAGE_SIZE:
            raise ValueError(
                f"`pixel_values` must be at least {MIN_IMAGE_SIZE} pixels high and wide, got {height}x{width}. "
                "Resize the images, for example with `Sam2UNetImageProcessor`."
            )
        if labels is not None:
            self.check_labels(labels, pixel_values.shape[0])

        pixel_values = pixel_values.to(self.encoder.patch_embed.projection.weight.dtype)
        pad_height, pad_width = -height % STRIDE, -width % STRIDE
        if pad_height or pad_width:
            pixel_values = F.pad(pixel_values, (0, pad_width, 0, pad_height))
        feature_maps = self.encoder(pixel_values)
        decode = partial(self.decode_head, output_auxiliary_logits=output_auxiliary_logits or labels is not None)
        rows, columns = feature_maps[0].shape[-2:]
        if self.training:  # batch norm takes its statistics from the whole batch
            decoded = decode(*feature_maps)
        else:
            decoded = in_chunks(decode, *feature_maps, tokens_per_image=rows * columns)
        outputs = []
        for output in decoded:
            upsampled = F.interpolate(output, size=pixel_values.shape[-2:], mode="bilinear")
            outputs.append(upsampled[..., :height, :width])

        result = Sam2UNetOutput(
            loss=None if labels is None else self.compute_loss(outputs, labels),
            logits=outputs[0],
            auxiliary_logits=tuple(outputs[1:]) or None,
            hidden_states=feature_maps if output_hidden_states else None,
        )
        return result if return_dict else result.to_tuple()


__all__ = ["Sam2UNetForSemanticSegmentation", "Sam2UNetOutput", "Sam2UNetPreTrainedModel"]
