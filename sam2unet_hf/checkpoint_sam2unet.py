"""Checkpoints in and out: loading, saving and pushing, with the encoder or without it."""

# transformers types the fields of a config by what the constructor takes, not by what an instance holds.
# mypy: disable-error-code="arg-type, assignment, union-attr"

import copy
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from .encoder_source_sam2unet import complete_state_dict, verify_encoder_source
from .pipeline_sam2unet import CUSTOM_PIPELINES
from .weights_sam2unet import is_local_source, is_pretrained_weight


logger = logging.get_logger(__name__)

# Arguments of `from_pretrained` that say how to reach a repository, whichever.
DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")


def copy_code(folder: str | os.PathLike) -> None:
    """Copy the code of other tasks than the model's own into the folder of a checkpoint, as far as it is at hand.

    A model that was loaded with `trust_remote_code` came with its own code alone.
    """
    for path in Path(__file__).parent.glob("*_sam2unet.py"):
        target = Path(folder, path.name)
        if not (target.exists() and target.samefile(path)):
            shutil.copyfile(path, target)


class Sam2UNetCheckpointMixin(PreTrainedModel):
    """How SAM2-UNet differs from other models of transformers in its checkpoints.

    They are safetensors files alone, may leave out the frozen encoder, and load by either auto class.
    """

    encoder: Any

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        # Where in the repository `name_or_path` the checkpoint was: `revision` and `subfolder`, where given.
        self.loaded_from: dict[str, Any] = {}

    @property
    def trainable_only(self) -> bool:
        """Whether `save_pretrained` leaves out the encoder, and a `Trainer` expects checkpoints without it."""
        return bool(self._keys_to_ignore_on_save)

    @trainable_only.setter
    def trainable_only(self, trainable_only: bool) -> None:
        left_out = filter(is_pretrained_weight, self.state_dict()) if trainable_only else ()
        self._keys_to_ignore_on_save = set(left_out)

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
        if name is not None and os.path.isfile(name):
            raise OSError(f"{name} is a file. Name the folder that holds it.")
        kwargs["use_safetensors"] = True
        loaded_from: dict[str, Any] = {
            argument: kwargs[argument] for argument in ("revision", "subfolder") if argument in kwargs
        }
        is_complete = True
        if name is not None and kwargs.get("state_dict") is None:
            download_kwargs = {argument: kwargs[argument] for argument in DOWNLOAD_ARGUMENTS if argument in kwargs}
            config = cls.read_config(kwargs.get("config"), name, kwargs)
            location: dict[str, Any] = {"variant": kwargs.get("variant"), **loaded_from}
            state_dict = complete_state_dict(str(name), config, location, **download_kwargs)
            if state_dict is not None:
                is_complete = False
                kwargs["state_dict"] = state_dict
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
            model.loaded_from = loaded_from
        if is_complete:
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

    def verify_encoder_source(self, may_be_local: bool = True) -> None:
        """Check that the encoder can be fetched again from `config.encoder_source`, and note its hash in the config.

        Raises:
            OSError: If the source cannot be reached.
            ValueError: If it is not known, holds other weights, or is a path and `may_be_local` is false.
        """
        verified = verify_encoder_source(self.config, self.encoder.state_dict(), may_be_local)
        for field, value in verified.items():
            setattr(self.config, field, value)

    @classmethod
    def is_remote_code(cls) -> bool:
        """Tell transformers whether to copy the file that defines this class when it saves a model."""
        # FSDP2 subclasses the model at run time, in a file of PyTorch.
        return super().is_remote_code() and not cls.__name__.startswith("FSDP")

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        *args,
        trainable_only: bool | None = None,
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
                with this one first. Defaults to the attribute `trainable_only` of the model.
            **kwargs: As in transformers.

        Raises:
            OSError: With `trainable_only=True`, if the encoder's source cannot be reached.
            ValueError: With `trainable_only=True`, if the encoder's source is not known, holds other weights, or is
                a path of this machine and the model is pushed.
        """
        config = self.config
        own_class = next(base for base in type(self).__mro__ if not base.__name__.startswith("FSDP"))
        # `register_for_auto_class` knows one auto class per model.
        name = f"{own_class.__module__.split('.')[-1]}.{own_class.__name__}"
        auto_map = {"AutoModel": name, "AutoModelForSemanticSegmentation": name}
        config.auto_map = {**(getattr(config, "auto_map", None) or {}), **auto_map}
        # Anew, since `pipeline` puts classes in place of the names in it.
        config.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)
        if is_main_process:
            os.makedirs(save_directory, exist_ok=True)
            if own_class is not type(self):
                custom_object_save(own_class, save_directory)
            copy_code(save_directory)
        default = self.trainable_only
        trainable_only = default if trainable_only is None else trainable_only
        if not trainable_only:
            config.encoder_sha256 = None
        elif is_main_process:  # the only one of several processes that writes
            self.verify_encoder_source(may_be_local=not push_to_hub)
        source, revision = config.encoder_source, config.encoder_revision
        if not trainable_only and is_local_source(source):
            # Do not publish local paths, which a whole model does without.
            config.encoder_source = config.encoder_revision = None
        try:
            self.trainable_only = trainable_only
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, *args, **kwargs)
        finally:
            config.encoder_source, config.encoder_revision = source, revision
            self.trainable_only = default

    def push_to_hub(  # type: ignore[override]
        self, repo_id: str, *, trainable_only: bool | None = None, **kwargs: Any
    ) -> str:
        """Upload weights, configuration, image processor, code and model card.

        The image processor is the one beside the checkpoint that this model was loaded from, with the regions of the
        model; where the model was trained since, one that lies on the Hub is kept. The card tells of the run in that
        folder, as long as the weights are those of the run; else it claims no results. A card that somebody edited is
        kept, in the folder or else on the Hub. `clean_up.json` in that folder goes along with the weights that it is
        for; with others, one that lies on the Hub is removed.

        Where this file came with the weights and the package is not installed, weights, configuration and code alone
        are uploaded.

        Args:
            repo_id: Repository `user/name`, made if need be.
            trainable_only: Leave out the encoder, see [`save_pretrained`].
            **kwargs: As in transformers: `commit_message`, `commit_description`, `private`, `token`, `revision`,
                `create_pr`, `max_shard_size` and `tags`.

        Raises:
            OSError: As [`save_pretrained`], or if the Hub cannot be reached or refuses.
            ValueError: As [`save_pretrained`].
        """
        default = self.trainable_only
        trainable_only = default if trainable_only is None else trainable_only
        if trainable_only:
            self.verify_encoder_source(may_be_local=False)
        try:
            from sam2unet_hf.hub import push_model
        except ImportError:
            logger.warning("Neither model card nor image processor is uploaded: that takes the package sam2unet-hf.")
            push = super().push_to_hub
        else:
            push = partial(push_model, self, loaded_from=self.loaded_from)
        try:
            self.trainable_only = trainable_only
            return push(repo_id, **kwargs)
        finally:
            self.trainable_only = default


__all__ = ["DOWNLOAD_ARGUMENTS"]
