"""Evaluates a small model by the Trainer, perhaps as one of several processes; run by test_training.py.

The model sees one image at a time, since convolutions differ in the last bit with the size of the batch.
"""

import argparse
import json
import os
import resource
import tempfile
from pathlib import Path

import torch
from common import BRATS_REGIONS, small_model
from test_training import SIZES, make_rows, make_trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--images", type=int, help="Number of images of 352x352; by default a few of mixed sizes.")
    args = parser.parse_args()

    model = small_model(regions=BRATS_REGIONS)
    forward = model.forward

    def forward_each(pixel_values, labels=None, **kwargs):
        labels = [label[None] for label in labels]
        outputs = [forward(image[None], labels=label) for image, label in zip(pixel_values, labels, strict=True)]
        joined = outputs[0]
        joined["logits"] = torch.cat([output.logits for output in outputs])
        return joined

    model.forward = forward_each
    rows = make_rows(SIZES)
    if args.images is not None:
        # The same image over and over, so that the data take no memory themselves.
        rows = make_rows([(352, 352)]).select([0] * args.images)
    with tempfile.TemporaryDirectory() as folder:
        options = {"per_device_eval_batch_size": args.batch_size, "batch_eval_metrics": True}
        if "LOCAL_RANK" in os.environ:
            options["ddp_backend"] = "gloo"
        trainer = make_trainer(model, rows, folder, **options)
        metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        result = {
            "processes": trainer.args.world_size,
            "scores": {name: metrics[f"eval_{name}"] for name in trainer.compute_metrics.names()},
            "image_dice": trainer.compute_metrics.image_dice.tolist(),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        args.output.write_text(json.dumps(result))
    trainer.end()
