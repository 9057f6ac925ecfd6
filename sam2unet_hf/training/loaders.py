"""In which order a Trainer reads the rows of a data set, and how many processes share them."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, cast

from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import seed_worker

from .push import HubTrainer
from .resume import protect_workers
from .rows import streamed_rows
from .sampling import ForegroundSampler, ForegroundShare
from .streaming import RowGroupSampler


def foreground_share_of(dataset: Any, share: float | None) -> ForegroundShare | None:
    """Return what chooses the slices of an epoch of a data set for `foreground_share`, if it is given.

    Raises:
        ValueError: If the rows do not tell which of them show foreground, or as [`ForegroundShare`].
    """
    if share is None:
        return None
    if "wt_pixels" not in getattr(dataset, "column_names", ()):
        raise ValueError(
            f"`foreground_share` must be None, got {share}, for training images without the column `wt_pixels`, the "
            "number of pixels of foreground in each mask, as `python -m dataset_scripts.brats_slices` writes it."
        )
    rows = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset
    return ForegroundShare(rows["wt_pixels"][:], share)


def make_sampler(
    dataset: Any,
    batch_size: int,
    num_processes: int = 1,
    num_workers: int = 0,
    shuffle: bool = False,
    foreground: ForegroundShare | None = None,
    seed: int | None = None,
) -> RowGroupSampler | ForegroundSampler | None:
    """Return the order in which a data set is read, or `None` where any other does as well."""
    if (streamed := streamed_rows(dataset)) is not None:
        return RowGroupSampler(streamed, batch_size, num_processes, num_workers, shuffle, seed, foreground)
    return None if foreground is None else ForegroundSampler(foreground, seed)


def make_loader(
    dataset: Any,
    sampler: Iterable[int],
    args: TrainingArguments,
    batch_size: int,
    collate: Callable[[Any], Any],
    is_training: bool = False,
) -> DataLoader:
    """Return a loader in the order of a sampler, of all processes together until accelerate prepares it."""
    names = ("num_workers", "pin_memory", "prefetch_factor", "multiprocessing_context", "in_order")
    options = {name: getattr(args, f"dataloader_{name}") for name in names if hasattr(args, f"dataloader_{name}")}
    if is_training:
        options["drop_last"] = args.dataloader_drop_last
        options["worker_init_fn"] = functools.partial(
            seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
        )
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=collate, **options)


class LoaderTrainer(HubTrainer):
    """A [`~transformers.Trainer`] that reads row groups once, and shows a share of foreground in each epoch.

    Attributes:
        foreground: Chooses the slices of an epoch, if not all of them are shown.
    """

    foreground: ForegroundShare | None = None

    def get_train_dataloader(self) -> DataLoader:
        """Return the training images as [`~transformers.Trainer`] does, or in an order of our own.

        With it row groups are read once, and a share of the images of an epoch shows foreground.
        """
        rows, args = self.train_dataset, self.args
        sizes = (args.train_batch_size, args.world_size, args.dataloader_num_workers)
        sampler = make_sampler(rows, *sizes, shuffle=True, foreground=self.foreground)
        if sampler is None:
            return protect_workers(super().get_train_dataloader())
        loader = make_loader(rows, sampler, args, args.train_batch_size, self.data_collator, is_training=True)
        return protect_workers(self.accelerator.prepare(loader))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the images of an evaluation, all of them whatever `dataloader_drop_last` says of training."""
        rows = cast("Any", self.eval_dataset if eval_dataset is None else eval_dataset)
        rows = cast("Any", self.eval_dataset)[rows] if isinstance(rows, str) else rows
        size, processes, workers = self.args.eval_batch_size, self.args.world_size, self.args.dataloader_num_workers
        if (sampler := make_sampler(rows, size, processes, workers)) is not None:
            loader = make_loader(rows, sampler, self.args, size, self.data_collator)
            return protect_workers(self.accelerator.prepare(loader))
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return protect_workers(super().get_eval_dataloader(eval_dataset))
        finally:
            self.args.dataloader_drop_last = drop_last

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return the images to predict, as `get_eval_dataloader` does."""
        return self.get_eval_dataloader(test_dataset)
