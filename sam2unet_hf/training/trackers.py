"""What trackers, those of `report_to`, get of a run beyond what the Trainer logs: pictures, patients, and one name."""

import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..overlays import choose_scale, choose_slices, draw_outlines, evenly_spread, image_to_show, side_by_side
from ..patient_table import PatientTable
from .data import SegmentationTransform, transform_of
from .patients import read_column
from .rows import ImageRows, size_of


logger = logging.getLogger(__name__)

CAPTION = "reference (left) and prediction (right)"


class Trackers(NamedTuple):
    """The callbacks of transformers that report a run, those of them that there are."""

    tensorboard: TensorBoardCallback | None
    trackio: TrackioCallback | None
    wandb: WandbCallback | None


def find_trackers(trainer: Trainer) -> Trackers:
    """Return the callbacks of TensorBoard, trackio and W&B that a Trainer has."""
    kinds = (TensorBoardCallback, TrackioCallback, WandbCallback)
    callbacks = trainer.callback_handler.callbacks
    found = [next((one for one in callbacks if isinstance(one, kind)), None) for kind in kinds]
    return Trackers(*cast("Any", found))


def choose_rows(rows: ImageRows, count: int) -> list[int]:
    """Choose rows to look at again and again, the same ones in each run on the same rows.

    Of rows that know their tumour each is of another patient, see [`~overlays.choose_slices`]. Other rows are spread
    over the data set.

    Args:
        rows: The rows, of which no image is read.
        count: How many at most.

    Returns:
        Numbers of rows.
    """
    tumour = read_column(rows, "wt_pixels")
    case_ids = read_column(rows, "case_id")
    if tumour is None or case_ids is None:
        return evenly_spread(range(len(rows)), count)
    return choose_slices(list(map(str, case_ids)), tumour, count)


def keep_trackio_private(trainer: Trainer) -> None:
    """Keep transformers from publishing a trackio project with a push of the model, unless a Space is named for it.

    The project may hold what other runs logged to it, which nobody wanted to publish with this model.

    Args:
        trainer: Its `trackio_static_space_id` becomes false where it is `None`, if it reports to trackio.
    """
    if find_trackers(trainer).trackio is not None and trainer.args.trackio_static_space_id is None:
        trainer.args.trackio_static_space_id = False


class PredictionPicturesCallback(TrainerCallback):
    """Sends pictures of a few validation images to TensorBoard, trackio and W&B after each evaluation.

    Each picture has the outlines of the reference on its left and those of the prediction on its right. The images
    are the same throughout; see [`choose_rows`]. Without one of these trackers in `report_to` nothing is predicted.

    The main process alone predicts, by the model as it was scored, and no other process waits for it but for the next
    step of training. With FSDP and DeepSpeed, where a process holds a part of the weights, there are no pictures.

    Pictures of patients stay on this machine unless `share` is true: without it W&B and trackio get none, a local
    project of trackio neither, because trackio publishes a project as a whole, with the pictures of all its runs. A
    push of the model publishes no trackio project, as transformers would, unless `trackio_static_space_id` names a
    Space for it.

    Args:
        trainer: The Trainer; the callback is added by `trainer.add_callback`.
        rows: Validation images with masks and a [`SegmentationTransform`]; by default those of the Trainer.
        count: How many of them.
        share: Whether the pictures may leave this machine. Without it TensorBoard alone gets them.

    Raises:
        ValueError: If the rows are no [`ImageRows`] with masks and transform, or `count` is not positive.

    Example:
        ```python
        trainer = Sam2UNetTrainer(model, args, train_dataset=train_rows, eval_dataset=validation_rows)
        trainer.add_callback(PredictionPicturesCallback(trainer, count=6))
        trainer.train()  # with args.report_to = ["tensorboard"]
        ```
    """

    def __init__(self, trainer: Trainer, rows: ImageRows | None = None, count: int = 4, share: bool = False):
        rows = cast("Any", trainer.eval_dataset) if rows is None else rows
        transform = transform_of(rows)
        if not (isinstance(rows, ImageRows) and rows.mask_column and isinstance(transform, SegmentationTransform)):
            raise ValueError(
                f"`rows` must be `ImageRows` with masks and a `SegmentationTransform`, got {type(rows).__name__}. "
                "Pass the validation images as `ImageRows(...).with_transform(SegmentationTransform(...))`."
            )
        if count < 1:
            raise ValueError(f"`count` must be at least 1, got {count}. Leave the callback out for no pictures.")
        self.trainer = trainer
        self.transform = transform
        self.rows = rows.with_transform(None)
        self.numbers = choose_rows(rows, count)
        self.share = share
        self._drawn: tuple[int, bool] | None = None
        keep_trackio_private(trainer)
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            logger.warning("Trackers get no pictures, because each process holds a part of the weights.")
            self.numbers = []

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any):
        """Draw and send the pictures, unless another data set than the validation images was scored."""
        is_validation = any(name.startswith("eval_") for name in objects.get("metrics", {}))
        now = state.global_step, self.trainer.is_in_train
        if not (state.is_world_process_zero and is_validation and self.numbers) or self._drawn == now:
            return
        if senders := self._senders():
            self._drawn = now
            pictures = self.draw()
            for send in senders:
                send(pictures, state.global_step)

    def draw(self) -> list[np.ndarray]:
        """Segment the images in batches as large as those of an evaluation, and draw them.

        Returns:
            A picture of each image, of shape `(height, width, 3)`, uint8.
        """
        trainer, processor = self.trainer, self.transform.processor
        model = trainer.accelerator.unwrap_model(trainer.model)
        was_training = model.training
        model.eval()
        pictures = []
        for start in range(0, len(self.numbers), trainer.args.eval_batch_size):
            numbers = self.numbers[start : start + trainer.args.eval_batch_size]
            batch = self.rows[numbers]
            inputs = self.transform.prepare_images(batch).to(trainer.args.device)
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            with torch.inference_mode(), trainer.compute_loss_context_manager():
                outputs = model(**inputs)
            sizes = [size_of(image) for image in batch["image"]]
            label_maps = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
            for image, mask, predicted in zip(batch["image"], batch["mask"], label_maps, strict=True):
                shown = image_to_show(self.rows.own_slice(image), self.rows.image_columns)
                scale = choose_scale(*shown.shape[:2])
                maps = self.transform.to_label_ids(mask).numpy(), predicted.cpu().numpy()
                panels = [draw_outlines(shown, label_map, processor.regions, scale) for label_map in maps]
                pictures.append(side_by_side(panels))
        model.train(was_training)
        return pictures

    def _senders(self) -> list[Callable[[Sequence[np.ndarray], int], None]]:
        """Return what sends pictures to the trackers that may have them."""
        tensorboard, trackio, wandb = find_trackers(self.trainer)
        senders: list[Callable[[Sequence[np.ndarray], int], None]] = []
        if tensorboard is not None and (self.share or "://" not in str(tensorboard.logging_dir)):
            senders.append(self._send_to_tensorboard)
        if trackio is not None and self.share:
            senders.append(self._send_to_trackio)
        if wandb is not None and self.share:
            senders.append(self._send_to_wandb)
        return senders

    def _send_to_tensorboard(self, pictures: Sequence[np.ndarray], step: int) -> None:
        writer = cast("Any", find_trackers(self.trainer).tensorboard).tb_writer
        for name, picture in self._named(pictures).items():
            writer.add_image(name, picture, step, dataformats="HWC")
        writer.flush()

    def _send_to_trackio(self, pictures: Sequence[np.ndarray], step: int) -> None:
        import trackio

        images = {name: trackio.Image(one, caption=CAPTION) for name, one in self._named(pictures).items()}
        trackio.log({**images, "train/global_step": step})

    def _send_to_wandb(self, pictures: Sequence[np.ndarray], step: int) -> None:
        import wandb

        # Of an array the range of values would be guessed.
        named = {name: Image.fromarray(picture) for name, picture in self._named(pictures).items()}
        images = {name: wandb.Image(picture, caption=CAPTION) for name, picture in named.items()}
        wandb.log({**images, "train/global_step": step})

    def _named(self, pictures: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Return the pictures by their names in a tracker, which say nothing of patients."""
        return {f"eval/prediction_{number}": picture for number, picture in enumerate(pictures, start=1)}


def begin_trackers(trainer: Trainer, name: str, checkpoint: str | None = None) -> None:
    """Let trackers write a run under this name, and go on with the one that has it already.

    Nothing changes without TensorBoard, trackio or W&B. TensorBoard's files go into `runs/<name>` of the output
    folder, unless `TENSORBOARD_LOGGING_DIR` names another. A push of the model publishes no project of trackio, as
    transformers would, unless `trackio_static_space_id` names a Space for it.

    Args:
        trainer: Has not begun to train.
        name: Of the run; also its id in W&B.
        checkpoint: Folder of the checkpoint from which the run goes on, if it does. TensorBoard hides what was logged
            after its step, which would be there twice.
    """
    args = trainer.args
    tensorboard, _, wandb = find_trackers(trainer)
    args.run_name = name
    keep_trackio_private(trainer)
    if tensorboard is not None and tensorboard.logging_dir is None:
        tensorboard.logging_dir = str(Path(cast("str", args.output_dir), "runs", name))
    if tensorboard is not None and checkpoint is not None and trainer.is_world_process_zero():
        state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
        tensorboard.tb_writer = writer_after(state.global_step, cast("str", tensorboard.logging_dir))
    if wandb is not None and trainer.is_world_process_zero():
        begin_wandb(args.project, name)


def begin_wandb(project: str, name: str) -> None:
    """Begin a run of W&B, or go on with it; one that somebody began before is left as it is."""
    import wandb

    if wandb.run is None:
        run_id = os.environ.get("WANDB_RUN_ID") or re.sub(r"[^\w.-]+", "-", name)[-64:]
        wandb.init(project=os.environ.get("WANDB_PROJECT", project), name=name, id=run_id, resume="allow")


def writer_after(step: int, folder: str) -> Any:
    """Return a writer of TensorBoard that hides what lies in a folder of later steps; `None` with tensorboardX."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(log_dir=folder, purge_step=step + 1)


def log_patients(trainer: Trainer, table: PatientTable, prefix: str) -> None:
    """Log the mean and the worst value over patients of each metric, as the Trainer logs scores.

    Args:
        trainer: Its callbacks get them, such as `<prefix>_patients_mean_volume_dice_WT`.
        table: The patients; nothing is logged without any.
        prefix: `eval` or `test`.
    """
    scores = {
        f"{prefix}_patients_{statistic}_{column}_{region}": cast("float", values[statistic])
        for region, columns in table.summary().items()
        for column, values in columns.items()
        for statistic in ("mean", "worst")
    }
    if scores:
        trainer.log(scores)


def finish_trackers(trainer: Trainer) -> None:
    """End the run in trackers, so that another one may begin in this process.

    Args:
        trainer: Logs nothing more.
    """
    if not trainer.is_world_process_zero():
        return
    tensorboard, trackio, wandb = find_trackers(trainer)
    for callback in (tensorboard, trackio):
        if callback is not None:
            callback.on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
    if wandb is not None:
        import wandb as client

        client.finish()


__all__ = ["PredictionPicturesCallback", "begin_trackers", "finish_trackers", "log_patients"]
