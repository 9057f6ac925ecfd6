"""What a Trainer writes and uploads for the Hub: checkpoints while it trains, card and checkpoint at the end."""

import contextlib
import copy
import functools
import json
import logging
import shutil
from collections.abc import Iterator, Sized
from concurrent import futures
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from ..hub import CHECKPOINT_FILES, push_folder, write_model_card
from ..model_card import TRAINING_INFO
from ..weights_sam2unet import is_local_source
from .data import transform_of
from .metrics import SegmentationMetrics
from .run_record import all_show_foreground, dataset_revision, hyperparameters, scores_by_split


logger = logging.getLogger(__name__)

CARD_FACTS = (
    *("license", "tags", "model_name", "finetuned_from", "dataset", "dataset_tags", "dataset_args"),
    *("data", "data_citation", "share_predictions"),
)


@contextlib.contextmanager
def no_push_by_transformers(args: TrainingArguments) -> Iterator[None]:
    """Keep transformers from uploading a checkpoint that it saves, with its pickles; [`PushCallback`] does it."""
    strategy = args.hub_strategy
    try:
        args.hub_strategy = HubStrategy.END
        yield
    finally:
        args.hub_strategy = strategy


class PushCallback(TrainerCallback):
    """Uploads checkpoints as `hub_strategy` says, without what transformers would upload along.

    Args:
        repo_id: Repository `user/name`, which exists.

    Attributes:
        jobs: Uploads that were begun.
    """

    def __init__(self, repo_id: str):
        self.repo_id = repo_id
        self.jobs: list[futures.Future] = []

    def wait(self) -> None:
        """Wait for the end of all uploads."""
        futures.wait(self.jobs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begin to upload the checkpoint, unless an upload is under way and `hub_always_push` is false."""
        # The trials of a search have folders of their own, and none is the model to be shared.
        if not state.is_world_process_zero or args.hub_strategy == HubStrategy.END or state.is_hyper_param_search:
            return
        if not all(job.done() for job in self.jobs) and not args.hub_always_push:
            return
        output_dir = Path(cast("str", args.output_dir))
        checkpoint = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        # Checkpoint folders come and go while the upload is running.
        for pattern in CHECKPOINT_FILES:
            for path in checkpoint.glob(pattern):
                shutil.copy(path, output_dir)
        message = f"Training in progress, step {state.global_step}"
        options: dict[str, Any] = {"revision": args.hub_revision, "run_as_future": True}
        # The card is written at the end; one that lies there already tells of another run.
        self.jobs.append(
            push_folder(
                output_dir, self.repo_id, token=args.hub_token, with_card=False, commit_message=message, **options
            )
        )
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            job = HfApi(token=args.hub_token).upload_folder(
                repo_id=self.repo_id,
                folder_path=checkpoint,
                path_in_repo="last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name,
                commit_message=f"{message}, checkpoint",
                ignore_patterns=["training_args.bin"],
                **options,
            )
            self.jobs.append(job)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Wait for the uploads."""
        self.wait()


class HubTrainer(Trainer):
    """Trainer that writes our model card and uploads nothing that a model repository does not need.

    Attributes:
        card: What was said of the run for its card, under the names of the arguments of `create_model_card`.
        final_scores: Scores of evaluations after the training, with the prefix `eval_` or `test_`.
        notes: Rows of the card beside the hyperparameters.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.has_own_optimizer = kwargs.get("optimizers", (None, None)) != (None, None)
        self.card: dict[str, Any] = {}
        self.final_scores: dict[str, float] = {}
        self.notes: dict[str, str] = {}
        if self.args.push_to_hub:
            self.add_callback(PushCallback(cast("str", self.hub_model_id)))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as [`~transformers.Trainer`] does, without the token for the Hub in `training_args.bin`."""
        args = self.args
        self.args = copy.copy(args)
        self.args.hub_token = None
        try:
            super().save_model(output_dir, _internal_call=True)
        finally:
            self.args = args
        if args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def create_model_card(self, **facts: Any) -> None:  # type: ignore[override]
        """Write `training_info.json` and from it the model card, `README.md`, into the output folder.

        What is not given is as in the call before. A card that somebody edited is left as it is.

        Args:
            **facts: Of `license` (of the weights, as the Hub names it), `tags`, `model_name` (title of the card),
                `finetuned_from` (model that training started from), `dataset` (its name), `dataset_tags` (its Hub
                id), `dataset_args` (its configuration), `data` (what the reader should know of it, a row of a table
                each), `data_citation`, and `share_predictions` (show `predictions.png`, which shows images of the
                data, and so upload it).

        Raises:
            TypeError: If a name is none of these.
        """
        if unknown := facts.keys() - CARD_FACTS:
            raise TypeError(f"The model card has no {', '.join(sorted(unknown))}; it has {', '.join(CARD_FACTS)}.")
        if not self.is_world_process_zero():
            return
        # `save_model` pushes too, and knows none of them.
        self.card |= {name: value for name, value in facts.items() if value is not None}
        card = self.card
        # transformers gives some of them as lists.
        name, hub_id, configuration = (
            value[0] if isinstance(value := card.get(key), list) and value else value
            for key in ("dataset", "dataset_tags", "dataset_args")
        )
        revision = dataset_revision(self.train_dataset, cast("str | None", hub_id))
        rows = dict(card.get("data", {})) | ({"configuration": configuration} if configuration else {})
        for title, images in (("training images", self.train_dataset), ("validation images", self.eval_dataset)):
            if isinstance(images, Sized) and not isinstance(images, dict):
                rows.setdefault(title, len(images))
        metrics = self.compute_metrics
        names = set(metrics.names()) if isinstance(metrics, SegmentationMetrics) else set()
        info = {
            **{key: card.get(key) for key in ("license", "model_name")},
            "finetuned_from": None if is_local_source(card.get("finetuned_from")) else card.get("finetuned_from"),
            "tags": [tags] if isinstance(tags := card.get("tags", []), str) else tags,
            "dataset": {"id": hub_id, "name": name, "citation": card.get("data_citation"), "revision": revision},
            "data": rows,
            "recipe": self.hyperparameters(),
            "results": scores_by_split(self.args, self.state, self.final_scores, names),
            "zero_division": getattr(metrics, "zero_division", None),
            "share_predictions": card.get("share_predictions", False),
            "all_show_foreground": self.all_show_foreground,
        }
        folder = Path(cast("str", self.args.output_dir))
        (folder / TRAINING_INFO).write_text(json.dumps(info, indent=2) + "\n")
        try:
            write_model_card(folder, getattr(self, "hub_model_id", None))
        except FileExistsError as err:
            logger.warning("The model card is left as it is: %s", err)

    @functools.cached_property
    def all_show_foreground(self) -> bool | None:
        """Whether each of the training images shows a region; `None` if they do not tell."""
        return all_show_foreground(self.train_dataset, self.accelerator.unwrap_model(self.model).config.regions)

    def hyperparameters(self) -> dict[str, Any]:
        """Return what repeats this training: rows for the model card."""
        optimizer = type(self.optimizer).__name__ if self.has_own_optimizer else None
        config = self.accelerator.unwrap_model(self.model).config
        augment = getattr(transform_of(self.train_dataset), "augment", None)
        return hyperparameters(self.args, self.state, config, optimizer, self.notes, augment)

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload checkpoint, image processor, code and card, and no other file of the output folder.

        Args:
            commit_message: Title of the commit.
            blocking: Wait for the end of the upload.
            token: Token for the Hub.
            revision: Branch, `hub_revision` by default.
            private: Make the repository private, if it is new; `hub_private_repo` by default.
            **kwargs: Arguments of [`create_model_card`].
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, PushCallback):
                callback.wait()
        return push_folder(
            Path(cast("str", self.args.output_dir)),
            cast("str", self.hub_model_id),
            token=token,
            commit_message=commit_message,
            revision=revision or self.args.hub_revision,
            run_as_future=not blocking,
        )


__all__ = ["PushCallback"]
