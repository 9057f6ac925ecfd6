#!/usr/bin/env python
"""Train and score SAM2-UNet and the five systems of its paper alike, and write the paper's table.

python examples/compare_models.py --quick
python examples/compare_models.py --data my_slices --minutes 12
python examples/compare_models.py --data my_slices --seeds 0 1 2 --sam2_checkpoint facebook/sam2-hiera-large

All systems get the same splits, transforms, optimiser and number of steps, or as many steps as fit into the same time.
A comparison that was stopped resumes when the same command is run on the same data.
"""

import argparse
import json
import logging
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from baselines import build_baseline
from benchmarks.timing import count_flops, time_in_turn
from comparison_data import ComparisonData
from comparison_report import SYSTEMS, write_report
from transformers import PreTrainedModel, set_seed

from sam2unet_hf import Sam2UNetConfig, Sam2UNetForSemanticSegmentation
from sam2unet_hf.configuration_sam2unet import PRESETS
from sam2unet_hf.finetuning.arguments import SegmentationTrainingArguments
from sam2unet_hf.finetuning.provenance import changed_values, fingerprint, write_json
from sam2unet_hf.scans_sam2unet import MODALITIES
from sam2unet_hf.training import Sam2UNetTrainer, SegmentationMetrics
from sam2unet_hf.training.augmentation import AUGMENTATIONS
from sam2unet_hf.training.resume import last_complete_checkpoint


logger = logging.getLogger("compare_models")

# Options of `SegmentationMetrics` by protocol of scoring the test images.
PROTOCOLS = {"plain": {"zero_division": 1.0}, "paper": {"zero_division": 0.0, "normalize": "minmax"}}
QUICK = {"steps": 60, "image_size": 96, "batch_size": 8, "learning_rate": ["5e-4"], "evaluations": 3, "warmup": 10}
# Arguments that may differ when a comparison resumes.
RESUMABLE_ARGUMENTS = ("systems", "seeds", "output_dir", "measure", "allow_leaks")
LEAST_VALUES = {"steps": 1, "image_size": 64, "batch_size": 2, "evaluations": 1, "warmup": 0, "num_workers": 0}
SAM2UNET_ONLY = ("sam2_checkpoint", "preset", "freeze_encoder")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the builder, or Hub id; default: a phantom")
    parser.add_argument("--allow_leaks", action="store_true", help="accept splits that share a patient or an image")
    parser.add_argument("--group_by", help="what tells the patients of --data, as in run_segmentation.py")
    parser.add_argument("--binarize", action="store_true", help="take masks in black and white with blurred edges")
    parser.add_argument("--regions", nargs="+", help="regions to segment, NAME=ID[,ID...] each, as there")
    parser.add_argument(
        "--modalities", nargs="+", choices=MODALITIES, help="one modality, or three as colours; default: flair"
    )
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="each system is trained once per seed")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--steps", type=int, default=7500, help="training steps of each system; default: 7500, the paper's 30 x 250"
    )
    length.add_argument("--minutes", type=float, help="training time of each system, turned into steps by timing some")
    parser.add_argument("--image_size", type=int, default=352)
    parser.add_argument("--batch_size", type=int, default=4, help="at least 2, for DeepLabV3's batch norm")
    parser.add_argument(
        "--learning_rate", nargs="+", default=["1e-4"], help="a number, and SYSTEM=NUMBER for each exception"
    )
    names, changes = ["none", *AUGMENTATIONS], "random changes of training images"
    parser.add_argument("--augmentation", nargs="+", default=["flips"], choices=names, help=changes)
    parser.add_argument("--warmup", type=int, default=50, help="steps of linear warm-up")
    parser.add_argument("--evaluations", type=int, default=10, help="how often the best checkpoint is chosen")
    parser.add_argument("--weights", choices=["imagenet"], help="pretrained encoders for the other systems")
    parser.add_argument("--sam2_checkpoint", help="pretrained encoder of SAM2-UNet, frozen; default: from scratch")
    parser.add_argument("--preset", default="tiny", choices=list(PRESETS), help="size of SAM2-UNet from scratch")
    parser.add_argument(
        "--freeze_encoder", action="store_true", help="freeze the encoder even of a SAM2-UNet from scratch"
    )
    parser.add_argument("--bf16", action="store_true", help="train and score under bfloat16 autocast")
    parser.add_argument("--use_cpu", action="store_true", help="run on the CPU even if there is a GPU")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--quick", action="store_true", help="train 60 steps at 96x96, which takes minutes")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--measure", choices=list(SYSTEMS), help=argparse.SUPPRESS)
    if "--quick" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    if args.minutes is not None:
        args.steps = None
    if len(args.modalities or [""]) not in (1, 3):  # the encoders of all systems take three channels
        parser.error(f"--modalities takes one modality or three, got {' '.join(args.modalities)}")
    for name, least in LEAST_VALUES.items():
        if (value := getattr(args, name)) is not None and not value >= least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    if {"none", "strong"} & set(args.augmentation) and len(args.augmentation) > 1:
        parser.error(f"--augmentation takes none and strong alone, got {' '.join(args.augmentation)}")
    try:
        learning_rate(args, "unet")
    except (KeyError, ValueError) as err:
        parser.error(f"--learning_rate takes one number and SYSTEM=NUMBER, got {' '.join(args.learning_rate)}: {err}")
    return args


def learning_rate(args: argparse.Namespace, system: str) -> float:
    """Return the learning rate of a system."""
    own = dict(text.split("=") for text in args.learning_rate if "=" in text)
    if unknown := set(own) - set(SYSTEMS):
        raise KeyError(*unknown)
    (common,) = [text for text in args.learning_rate if "=" not in text]
    return float(own.get(system, common))


def build_model(args: argparse.Namespace, system: str, regions: dict[str, list[int]]) -> PreTrainedModel:
    """Build a system, whose output has one channel per region."""
    if system != "sam2unet":
        return build_baseline(system, regions, args.weights)
    if args.sam2_checkpoint is not None:
        return Sam2UNetForSemanticSegmentation.from_sam2(args.sam2_checkpoint, regions=regions)
    config = Sam2UNetConfig.from_preset(args.preset, regions=regions, freeze_encoder=args.freeze_encoder)
    return Sam2UNetForSemanticSegmentation(config)


def time_step(model: PreTrainedModel, batches: Iterator[dict[str, Any]], bf16: bool) -> float:
    """Return the median seconds of a training step, loading included."""
    device = model.device.type
    model.train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])

    def step() -> None:
        batch = next(batches)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = model(batch["pixel_values"].to(device), labels=batch["labels"].to(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return statistics.median(time_in_turn({"step": step}, 5, device, warmup=2)["step"])


def measure(args: argparse.Namespace, system: str) -> dict[str, float]:
    """Measure what a system costs; call it in a new process, because the peak memory is that of the process."""
    data = ComparisonData(args)
    set_seed(0)
    device = "cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu"
    model = build_model(args, system, data.regions).to(device).eval()
    image = torch.randn(1, 3, args.image_size, args.image_size, device=device)

    # Do not use inference mode, because the model is trained next, which fails with inference tensors that it keeps.
    @torch.no_grad()
    def segment() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
            model(image)

    costs = {
        "parameters": model.num_parameters(),
        "trained_parameters": model.num_parameters(only_trainable=True),
        "flops": count_flops(model, image),
        "seconds_per_image": statistics.median(time_in_turn({"image": segment}, 5, device, warmup=2)["image"]),
        "seconds_per_step": time_step(model, data.training_batches(args.batch_size, args.num_workers), args.bf16),
    }
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**costs, "peak_memory_gb": (torch.cuda.max_memory_allocated() if device == "cuda" else peak) / 1e9}


def measure_costs(args: argparse.Namespace, system: str, argv: Sequence[str]) -> dict[str, float]:
    """Return what a system costs and how many steps it trains; measure it if `costs.json` does not tell."""
    path = args.output_dir / system / "costs.json"
    if not path.exists():
        logger.info("%s: measuring what it costs.", SYSTEMS[system].name)
        command = [sys.executable, __file__, *argv, "--measure", system]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # nosec B603 # this script
        if done.returncode:
            raise SystemExit(f"{SYSTEMS[system].name} could not be run, see above.")
        costs = json.loads(done.stdout.splitlines()[-1])
        costs["steps"] = args.steps or max(1, round(60 * args.minutes / costs["seconds_per_step"]))
        write_json(path, costs, sort_keys=False)
    return json.loads(path.read_text())


def run(args: argparse.Namespace, data: ComparisonData, system: str, seed: int, steps: int) -> None:
    """Train and score a system, or resume it, and write `result.json` and `examples.npz` into its folder."""
    folder = args.output_dir / system / f"seed-{seed}"
    if (folder / "result.json").exists():
        logger.info("%s, seed %d: finished before.", SYSTEMS[system].name, seed)
        return
    every = max(1, steps // args.evaluations)
    training_args = SegmentationTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=learning_rate(args, system),
        warmup_steps=min(args.warmup, steps // 5),
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,  # the best and the last; of one, transformers removes the last when training ends
        logging_steps=max(1, steps // 100),
        dataloader_drop_last=True,
        dataloader_num_workers=args.num_workers,
        dataloader_pin_memory=not args.use_cpu,
        bf16=args.bf16,
        use_cpu=args.use_cpu,
        seed=seed,
        report_to="none",
    )
    set_seed(seed)
    from_scratch = (args.sam2_checkpoint if system == "sam2unet" else args.weights) is None
    trainer = Sam2UNetTrainer(
        build_model(args, system, data.regions),
        training_args,
        batch_norm_images=128 if from_scratch else 0,
        train_dataset=data.train(),
        eval_dataset=data.evaluation("validation"),
        processing_class=data.processor,
    )
    logger.info("%s, seed %d: %d steps.", SYSTEMS[system].name, seed, steps)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    keys = ("step", "loss", "eval_dice", "eval_loss")
    curve = [{key: entry[key] for key in keys if key in entry} for entry in trainer.state.log_history]
    scores = {}
    for protocol, options in PROTOCOLS.items():
        trainer.compute_metrics = SegmentationMetrics(list(data.regions), **options)
        found = trainer.evaluate(data.evaluation("test"), metric_key_prefix="test")
        scores[protocol] = {key.removeprefix("test_"): value for key, value in found.items()}
    np.savez_compressed(folder / "examples.npz", **data.predict_examples(trainer.model))
    trainer.save_model()
    result = {"steps": steps, "best_step": trainer.state.best_global_step, "scores": scores, "curve": curve}
    write_json(folder / "result.json", result, sort_keys=False)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def check_arguments(args: argparse.Namespace) -> dict[Path, dict[str, Any]]:
    """Return the arguments to note of each system by path, or exit if a system was begun with others."""
    notes = {}
    for system in args.systems:
        path = args.output_dir / system / "arguments.json"
        skipped = RESUMABLE_ARGUMENTS if system == "sam2unet" else (*RESUMABLE_ARGUMENTS, *SAM2UNET_ONLY)
        now = {key: value for key, value in vars(args).items() if key not in skipped}
        now["learning_rate"] = learning_rate(args, system)
        before = json.loads(path.read_text()) if path.exists() else now
        before = {key: value for key, value in before.items() if key in now}
        if changed := changed_values(before, now):
            raise SystemExit(
                f"{path.parent} holds a run with other values of {', '.join(changed)}: "
                f"{', '.join(f'{key}={value}' for key, value in changed.items())}. Choose another --output_dir."
            )
        notes[path] = now
    return notes


def check_data(data: ComparisonData, notes: dict[Path, dict[str, Any]]) -> None:
    """Note arguments and data of each system, or exit and note nothing if a system was begun on other data."""
    now = {split: fingerprint(rows) for split, rows in data.splits.items()}
    for path in notes:
        before = json.loads(path.read_text()).get("fingerprints") if path.exists() else now
        if before is None:
            logger.warning("%s does not tell which data its run began on. The data of now is taken for it.", path)
        elif changed := changed_values(before, now):
            raise SystemExit(
                f"{path.parent} holds a run on other data: it differs in the split {', '.join(changed)}. "
                "Choose another --output_dir."
            )
    for path, arguments in notes.items():
        write_json(path, {**arguments, "fingerprints": now}, sort_keys=False)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO, stream=sys.stderr)
    if args.measure is not None:
        print(json.dumps(measure(args, args.measure)))
        return
    transformers.utils.logging.set_verbosity_error()
    notes = check_arguments(args)
    data = ComparisonData(args)
    if (count := len(data.images["train"])) < args.batch_size:
        raise SystemExit(f"--batch_size {args.batch_size} is more than there are training images, {count}. Lower it.")
    check_data(data, notes)
    # Measure all systems before training any, because it shows a missing library within minutes.
    costs = {system: measure_costs(args, system, argv) for system in args.systems}
    for seed in args.seeds:
        for system in args.systems:
            run(args, data, system, seed, int(costs[system]["steps"]))
    write_report(args, data, costs, f"python examples/compare_models.py {' '.join(argv)}".strip())


if __name__ == "__main__":
    main()
