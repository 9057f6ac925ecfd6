"""Evaluates and trains small models by the Trainer, perhaps as one of several processes; run by test_distributed.py.

Writes what was found, in all processes, for `torch.load`.
"""

import argparse
import os
import resource
import time
from pathlib import Path

import torch
import torch.distributed as dist
from common import BRATS_REGIONS, small_model
from datasets import Dataset
from test_training import SIZES, make_rows, make_trainer
from transformers import Trainer, TrainerCallback, TrainerState

from sam2unet_hf import Sam2UNetOutput


# One step of two processes, each of two batches of two images.
STEP = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0,
    "learning_rate": 0.01,
    "save_strategy": "no",
}


def bright_rows():
    """Eight images, each brighter than the one before."""
    rows = make_rows([(64, 64)] * 8)
    images = [row["image"].point(lambda grey, share=(index + 1) / 8: grey * share) for index, row in enumerate(rows)]
    return Dataset.from_dict({"image": images, "mask": list(rows["mask"])}, features=rows.features)


def evaluate_each_alone(folder, batch_size, rows=None):
    """Return the trainer and its metrics for a model that sees one image at a time.

    Convolutions differ in the last bit with the size of the batch.
    """
    model = small_model(regions=BRATS_REGIONS)
    forward = model.forward

    def forward_each(pixel_values, **kwargs):
        outputs = [forward(image[None], **kwargs) for image in pixel_values]
        return Sam2UNetOutput(
            logits=torch.cat([output.logits for output in outputs]),
            auxiliary_logits=tuple(map(torch.cat, zip(*(output.auxiliary_logits for output in outputs), strict=True))),
        )

    model.forward = forward_each
    rows = make_rows(SIZES).add_column("case_id", list("babcb")) if rows is None else rows
    trainer = make_trainer(
        model, rows, folder, per_device_eval_batch_size=batch_size, batch_eval_metrics=True, **backend()
    )
    metrics = trainer.evaluate()
    found = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    names = ["loss", *trainer.compute_metrics.names(), *trainer.compute_metrics.patient_names("voxels")]
    return trainer, {name: found[name] for name in names if name in found}


def backend():
    return {"ddp_backend": "gloo"} if "LOCAL_RANK" in os.environ else {}


class Recorder(TrainerCallback):
    """Notes images, gradients, and a batch norm's statistics after the step and after the evaluation."""

    def __init__(self, model):
        self.inputs, self.gradients, self.statistics = [], {}, {}
        self.norm = model.decode_head.up_blocks[0].conv1.norm
        model.register_forward_pre_hook(self.note_inputs, with_kwargs=True)

    def note_inputs(self, model, args, kwargs):
        if model.training and "labels" in kwargs:
            self.inputs.append((kwargs["pixel_values"].clone(), kwargs["labels"].clone()))

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = {
            name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
        }

    def on_step_end(self, args, state, control, **kwargs):
        self.statistics["step"] = self.norm.running_mean.clone()

    def on_evaluate(self, args, state, control, **kwargs):
        self.statistics["evaluation"] = self.norm.running_mean.clone()


def train_a_step(folder, **options):
    model = small_model(regions=BRATS_REGIONS)
    trainer = make_trainer(model, bright_rows(), folder, **{**STEP, **backend(), **options})
    trainer.train_dataset.format["format_kwargs"]["transform"].augment = None
    recorder = Recorder(model)
    trainer.add_callback(recorder)
    trainer.train()
    return trainer, recorder


def estimate_batch_norm(trainer):
    """Return the inputs of a batch norm behind the frozen encoder, and the statistics it is left with."""
    conv_norm = trainer.model.decode_head.receptive_field_blocks[0].shortcut
    batches = []
    hook = conv_norm.conv.register_forward_hook(lambda module, inputs, output: batches.append(output.clone()))
    trainer.batch_norm_images = 4
    trainer.estimate_batch_norm()
    hook.remove()
    return batches, conv_norm.norm.running_mean.clone(), conv_norm.norm.running_var.clone()


def train_with_an_average(folder):
    """Return the weights after each of three steps and a third one done again, and the models at both ends."""
    options = {**STEP, "max_steps": 3, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
    steps, models = [], []
    for name, checkpoint in (("average", None), ("average-resumed", str(folder / "average" / "checkpoint-2"))):
        model = small_model(regions=BRATS_REGIONS)
        trainer = make_trainer(
            model, bright_rows(), folder / name, ema_decay=0.2, batch_norm_images=4, **options, **backend()
        )
        recorder = Recorder(model)
        recorder.on_optimizer_step = lambda *args, model, **kwargs: steps.append(
            {name: weight.detach().clone() for name, weight in model.named_parameters()}
        )
        trainer.add_callback(recorder)
        trainer.train(resume_from_checkpoint=checkpoint)
        models.append(model.state_dict())
    return steps, models


def save_checkpoint_with_a_slow_process(folder):
    """Return whether the random state of process 1 was there when process 0 wrote the state of the Trainer."""
    seen = []
    save_rng_state, save_to_json = Trainer._save_rng_state, TrainerState.save_to_json

    def save_late(trainer, output_dir):
        time.sleep(trainer.args.process_index)
        save_rng_state(trainer, output_dir)

    def save_and_look(state, path):
        seen.append(Path(path).with_name("rng_state_1.pth").exists())
        save_to_json(state, path)

    Trainer._save_rng_state, TrainerState.save_to_json = save_late, save_and_look
    train_a_step(folder, save_strategy="steps", save_steps=1)
    Trainer._save_rng_state, TrainerState.save_to_json = save_rng_state, save_to_json
    return seen


def several_processes(folder):
    found = {}
    trainer, found["metrics"] = evaluate_each_alone(folder, batch_size=2)
    found["image_dice"] = trainer.compute_metrics.image_dice.tolist()
    variants = {
        "plain": {"eval_strategy": "steps", "eval_steps": 1},
        "activation checkpointing": {"activation_checkpointing": True},
    }
    for name, options in variants.items():
        trainer, recorder = train_a_step(folder, **options)
        found[name] = {"inputs": recorder.inputs, "gradients": recorder.gradients, "statistics": recorder.statistics}
        found[name]["find_unused_parameters"] = trainer.model_wrapped.find_unused_parameters
    found["batch norm"] = estimate_batch_norm(trainer)
    found["average"] = train_with_an_average(folder)
    found["rng state was there"] = save_checkpoint_with_a_slow_process(folder)
    try:
        train_a_step(folder, fsdp=True)
    except ValueError as err:
        found["fsdp"] = str(err)
    return trainer, found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--images", type=int, help="Measure the memory of evaluating this many images of 352x352.")
    args = parser.parse_args()
    folder = args.output.parent
    if args.images is None:
        trainer, found = several_processes(folder)
        gathered = [None] * trainer.args.world_size
        dist.all_gather_object(gathered, found)
        if trainer.is_world_process_zero():
            torch.save(gathered, args.output)
        trainer.end()
    else:
        # The same image over and over, so that the data take no memory themselves.
        rows = make_rows([(352, 352)]).select([0] * args.images)
        evaluate_each_alone(folder, batch_size=4, rows=rows)
        torch.save(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, args.output)
