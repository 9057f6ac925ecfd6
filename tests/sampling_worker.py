"""Trains on a share of slices with foreground, in this process or as one of two; run by test_sampling.py.

Writes what all processes found, for `torch.load`.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from common import BRATS_REGIONS, small_model
from slice_rows import make_slices
from transformers import TrainingArguments

from sam2unet_hf import Sam2UNetImageProcessor, Sam2UNetOutput
from sam2unet_hf.training import ImageRows, Sam2UNetTrainer, SegmentationTransform, collate


SHOWN = {"a": range(8), "b": range(8), "c": range(5)}
# Six of 21 slices.
TUMOUR = {("a", 3), ("a", 4), ("b", 2), ("b", 3), ("b", 6), ("c", 1)}


class Numbered(SegmentationTransform):
    """Tells the number of each row, which is its case and slice."""

    def __call__(self, rows):
        return super().__call__(rows) | {"number": list(zip(rows["case_id"], rows["slice_index"], strict=True))}


def train(folder, share, rows=None, checkpoint=None, **options):
    """Train by a loss that costs nothing; return the trainer, and the slices of each batch."""
    model = small_model(regions=BRATS_REGIONS)
    seen = []

    def forward_fast(pixel_values, labels=None, **kwargs):
        weights = torch.stack([weight.mean() for weight in model.parameters() if weight.requires_grad])
        return Sam2UNetOutput(loss=(weights.sum() - pixel_values.mean()) ** 2, logits=pixel_values)

    def note(examples):
        seen.append([example.pop("number") for example in examples])
        return collate(examples)

    model.forward = forward_fast
    model.requires_grad_(False)
    model.decode_head.classifier.requires_grad_(True)
    values = {"num_train_epochs": 3, "per_device_train_batch_size": 2, "learning_rate": 0.01, "report_to": "none"}
    values |= {"remove_unused_columns": False, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    processor = Sam2UNetImageProcessor(size={"height": 32, "width": 32})
    rows = make_slices(SHOWN, tumour=TUMOUR) if rows is None else rows
    trainer = Sam2UNetTrainer(
        model,
        TrainingArguments(folder, **{**values, **options}),
        foreground_share=share,
        train_dataset=ImageRows(rows, ["flair"], neighbours=1).with_transform(Numbered(processor)),
        data_collator=note,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, seen


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    options = {"ddp_backend": "gloo", "per_device_train_batch_size": 1}
    trainer, seen = train(folder / "whole", 0.5, save_strategy="steps", save_steps=4, **options)
    found = {"seen": seen, "steps": trainer.state.max_steps}
    checkpoint = str(folder / "whole" / "checkpoint-8")
    again, found["seen_again"] = train(folder / "again", 0.5, checkpoint=checkpoint, **options)
    weights = [one.accelerator.unwrap_model(one.model).state_dict() for one in (trainer, again)]
    found["ends_alike"] = all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    gathered = [None] * trainer.args.world_size
    dist.all_gather_object(gathered, found)
    if trainer.is_world_process_zero():
        torch.save(gathered, folder / "found.pt")
    trainer.end()
