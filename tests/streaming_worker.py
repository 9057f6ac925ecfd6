"""Trains on streamed rows as one of two processes; run by test_streaming.py, which loads what all of them found."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from common import BRATS_REGIONS, small_model
from test_streaming import train

from sam2unet_hf.training.streaming import ParquetRows


if __name__ == "__main__":
    parquet, folder, num_workers = sys.argv[1:]
    reads = []
    read_group = ParquetRows._read_group

    def note(rows, group):
        reads.append(group)
        return read_group(rows, group)

    ParquetRows._read_group = note
    options = {"save_strategy": "no", "ddp_backend": "gloo", "per_device_eval_batch_size": 1}
    trainer, seen = train(folder, parquet, options={**options, "dataloader_num_workers": int(num_workers)})
    found = {"seen": seen, "reads": len(reads), "steps": trainer.state.max_steps}
    trainer.accelerator.unwrap_model(trainer.model).load_state_dict(small_model(regions=BRATS_REGIONS).state_dict())
    found["metrics"] = trainer.evaluate()
    found["image_dice"] = trainer.compute_metrics.image_dice
    found["patient_counts"] = {name: own.tolist() for name, own in trainer.compute_metrics.patient_counts.items()}
    gathered = [None] * trainer.args.world_size
    dist.all_gather_object(gathered, found)
    if trainer.is_world_process_zero():
        torch.save(gathered, Path(folder, "found.pt"))
    trainer.end()
