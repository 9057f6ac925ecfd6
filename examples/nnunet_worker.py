"""What nnU-Net does for the comparison, in a process of its own: plans, times, trains and segments.

`nnunet_files.py` starts it, with the folders of nnU-Net in the environment. Plans, preprocessing, augmentation,
network, loss, optimiser and inference are nnU-Net's own. The length of the schedule alone is ours: `--steps`
iterations in about fifty epochs, over which its polynomial learning rate ends at zero.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch
from benchmarks.timing import flops_of, peak_memory_gb, step_clock, synchronize
from nnunet_files import DATASET
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


DATASET_ID = 1  # that of `DATASET`
EPOCHS = 50
CHECKPOINTS = 10  # in the whole training, to go on from
FINAL, LATEST = "checkpoint_final.pth", "checkpoint_latest.pth"
WARMUP_STEPS, TIMED_STEPS = 2, 6


class ComparedTrainer(nnUNetTrainer):
    """nnU-Net's trainer, whose checkpoints are whole when it is killed."""

    def save_checkpoint(self, filename: str) -> None:
        """Save what is trained on from or segmented with; the best by the patients of validation is neither."""
        if Path(filename).name not in (FINAL, LATEST):
            return
        super().save_checkpoint(f"{filename}.partial")
        os.replace(f"{filename}.partial", filename)


def plan(memory_gb: float | None) -> None:
    """Let nnU-Net plan its networks for the cases, to be trained within a memory that its planner has a default of."""
    num_processes = int(os.environ["nnUNet_def_n_proc"])
    os.environ["nnUNet_n_proc_DA"] = str(num_processes)  # which the planner takes for its threads, and 0 is none
    extract_fingerprints([DATASET_ID], num_processes=num_processes, verbose=False, show_progress_bar=False)
    plan_experiments([DATASET_ID], gpu_memory_target_in_gb=memory_gb)


def preprocess_for(configuration: str) -> None:
    """Let nnU-Net preprocess the cases for a configuration, unless it has."""
    folder = Path(os.environ["nnUNet_preprocessed"], DATASET)
    done = folder / f".{configuration}_preprocessed"
    if not done.exists():
        num_processes = [int(os.environ["nnUNet_def_n_proc"])]
        preprocess([DATASET_ID], configurations=(configuration,), num_processes=num_processes, show_progress_bar=False)
        done.touch()


def make_trainer(configuration: str, fold: int, device: str, steps: int = EPOCHS) -> ComparedTrainer:
    """Return the trainer of a fold for so many iterations."""
    folder = Path(os.environ["nnUNet_preprocessed"], DATASET)
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    if configuration not in plans["configurations"]:
        raise SystemExit(f"nnU-Net plans no {configuration} for these scans. Leave it out of --systems.")
    dataset = json.loads((folder / "dataset.json").read_text())
    plans["continue_training"] = False
    trainer = ComparedTrainer(plans, configuration, fold, dataset, torch.device(device))
    trainer.num_iterations_per_epoch = max(1, round(steps / EPOCHS))
    trainer.num_epochs = max(1, round(steps / trainer.num_iterations_per_epoch))
    trainer.num_val_iterations_per_epoch = 1  # they choose nothing
    trainer.save_every = max(1, trainer.num_epochs // CHECKPOINTS)
    return trainer


def measure(configuration: str, device: str) -> dict[str, object]:
    """Return what a configuration costs, by some iterations of the first fold."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["nnUNet_results"] = folder
        trainer = make_trainer(configuration, 0, device)
        trainer.on_train_start()
        trainer.network.train()
        for step in range(WARMUP_STEPS + TIMED_STEPS):
            if step == WARMUP_STEPS:
                synchronize(device)
                start = step_clock(device)()
            trainer.train_step(next(trainer.dataloader_train))
        synchronize(device)
        seconds = (step_clock(device)() - start) / TIMED_STEPS
        trainer.on_train_end()
    planned = trainer.configuration_manager
    shape = [trainer.num_input_channels, *planned.patch_size]
    trainer.set_deep_supervision_enabled(False)
    return {
        "parameters": sum(weight.numel() for weight in trainer.network.parameters()),
        "trained_parameters": sum(weight.numel() for weight in trainer.network.parameters() if weight.requires_grad),
        "input": list(map(int, shape)),
        "batch_size": int(planned.batch_size),
        "flops": flops_of(trainer.network, (1, *shape)),
        "seconds_per_step": seconds,
        "peak_memory_gb": peak_memory_gb(device),
    }


def train(configuration: str, fold: int, device: str, steps: int) -> None:
    """Train a fold, or go on from its last checkpoint."""
    trainer = make_trainer(configuration, fold, device, steps)
    folder = Path(trainer.output_folder)
    if (folder / FINAL).exists():
        return
    if (folder / LATEST).exists():
        trainer.load_checkpoint(str(folder / LATEST))
    trainer.run_training()


def segment(configuration: str, fold: int, device: str, output_dir: Path, mirrors: bool) -> None:
    """Segment the patients of a fold that are not segmented, with the weights of the last step and no postprocessing.

    Label maps have the numbers of nnU-Net's data set. `seconds.json` says how long each took.
    """
    trainer = make_trainer(configuration, fold, device)
    trainer.load_checkpoint(str(Path(trainer.output_folder, FINAL)))
    trainer.set_deep_supervision_enabled(False)
    predictor = nnUNetPredictor(
        use_mirroring=mirrors, perform_everything_on_device=device != "cpu", device=trainer.device, allow_tqdm=False
    )
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [trainer.network.state_dict()],
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    ending, images = trainer.dataset_json["file_ending"], Path(os.environ["nnUNet_raw"], DATASET, "imagesTr")
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / "seconds.json"
    seconds = json.loads(path.read_text()) if path.exists() else {}
    _, cases = trainer.do_split()
    for case in cases:
        if case in seconds:
            continue
        start = time.perf_counter()
        files = [str(images / f"{case}_{channel:04d}{ending}") for channel in range(trainer.num_input_channels)]
        predictor.predict_from_files_sequential([files], [str(output_dir / case)])
        seconds[case] = time.perf_counter() - start
        path.write_text(json.dumps(seconds, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["plan", "measure", "train", "segment"])
    parser.add_argument("--configuration", help="such as 2d or 3d_fullres")
    parser.add_argument("--memory_gb", type=float, help="of the planner; default: its own")
    parser.add_argument("--fold", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="file of the costs, or folder of the segmentations")
    parser.add_argument("--no_mirrors", action="store_true", help="do not average over mirror images")
    args = parser.parse_args(argv)
    if args.task == "plan":
        plan(args.memory_gb)
        return
    preprocess_for(args.configuration)
    if args.task == "measure":
        args.output.write_text(json.dumps(measure(args.configuration, args.device), indent=2) + "\n")
    elif args.task == "train":
        train(args.configuration, args.fold, args.device, args.steps)
    else:
        segment(args.configuration, args.fold, args.device, args.output, not args.no_mirrors)


if __name__ == "__main__":
    main()
