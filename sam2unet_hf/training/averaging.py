"""Averages of weights over the steps of a training, which are scored and saved in place of the last ones."""

from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


# In a checkpoint: the weights of the last step, beside `model.safetensors`, which holds their average.
RAW_WEIGHTS = "raw_weights.safetensors"
AVERAGE = "average"  # under this name in the state of the Trainer


def check_averaging(model: nn.Module, batch_norm_images: int) -> None:
    """Raise a `ValueError` if weights cannot be averaged, or batch norm is not to be estimated for the average."""
    if not batch_norm_images:
        raise ValueError(
            "`batch_norm_images` must be above 0 with `ema_decay`, because the running statistics of batch norm are "
            "those of the raw weights. 128 do."
        )
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                "`ema_decay` must be 0 for weights of half precision, which round the steps of an average away, got "
                f"{name} in {weight.dtype}. Load the model with `dtype=torch.float32` and train with `bf16=True`."
            )


class WeightAverage(TrainerCallback):
    """Keeps an exponential moving average of the weights that are trained.

    After step `t`, counted from 0, it becomes `d * average + (1 - d) * weights` with `d = min(decay, (1 + t) / (10 +
    t))`, so that it forgets the first weights soon, and is the weights themselves after the first step. This warm-up
    of the decay is that of TensorFlow's `ExponentialMovingAverage`.

    The model trains with its own, raw weights. `swap_in` gives it the average, to be scored or saved, until the next
    step begins. Batch norm statistics are none of the average: estimate them for it.

    Args:
        decay: Above 0 and below 1. The average spans about the last `1 / (1 - decay)` steps.

    Attributes:
        checkpoint: The folder of the checkpoint that the training goes on from, or `None`. Of one that holds no
            average the weights are the beginning of it.

    Raises:
        ValueError: If the decay is out of range.
    """

    def __init__(self, decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"`ema_decay` must be above 0 and below 1, such as 0.999, or 0 for none, got {decay}.")
        self.decay = decay
        self.checkpoint: str | None = None
        self._names: list[str] = []
        self._weights = nn.ParameterList()
        self._average = self._new_average()
        self._raw: list[torch.Tensor] | None = None

    def _new_average(self) -> AveragedModel:
        def update(average: Any, weights: Any, num_averaged: torch.Tensor | int) -> None:
            step = int(num_averaged)
            get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))(average, weights, num_averaged)

        # The list holds the weights of the model itself, and `AveragedModel` copies them.
        return AveragedModel(self._weights, multi_avg_fn=update)

    @torch.no_grad()
    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any):
        """Begin with the weights of the model, or where the checkpoint was written."""
        model = cast("PreTrainedModel", objects["model"])
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._names, self._weights, self._raw = list(trained), nn.ParameterList(trained.values()), None
        self._average = self._new_average()
        saved = cast("Any", state.stateful_callbacks).get(AVERAGE)
        if self.checkpoint is None or saved is None:
            return
        self._average.n_averaged.fill_(saved["attributes"]["num_averaged"])
        for file_name, weights in (("model.safetensors", self._average.module), (RAW_WEIGHTS, self._weights)):
            with safe_open(Path(self.checkpoint, file_name), framework="pt") as file:
                for name, weight in zip(self._names, cast("nn.ParameterList", weights), strict=True):
                    weight.copy_(file.get_tensor(name))

    def on_step_begin(self, *args: Any, **objects: Any) -> None:
        """Give the model its raw weights back, if it has the average."""
        if self._raw is not None:
            self._copy(self._raw)
            self._raw = None

    def on_step_end(self, *args: Any, **objects: Any) -> None:
        """Take the weights into the average."""
        self._average.update_parameters(self._weights)

    def swap_in(self) -> bool:
        """Give the model the average; return whether it did not have it before."""
        if self._raw is not None:
            return False
        self._raw = [weight.detach().clone() for weight in self._weights]
        self._copy(self._average.module.parameters())
        return True

    @torch.no_grad()
    def _copy(self, weights: Any) -> None:
        for own, weight in zip(self._weights, weights, strict=True):
            own.copy_(weight)

    def state(self) -> dict[str, Any]:
        """Return what the state of the Trainer keeps in a checkpoint."""
        return {"args": {}, "attributes": {"num_averaged": int(self._average.n_averaged)}}

    def save_raw(self, folder: str) -> None:
        """Write the raw weights into a checkpoint, while the model has the average."""
        raw = dict(zip(self._names, cast("list[torch.Tensor]", self._raw), strict=True))
        save_file(raw, Path(folder, RAW_WEIGHTS), metadata={"format": "pt"})


__all__ = ["WeightAverage"]
