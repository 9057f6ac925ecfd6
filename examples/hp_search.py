"""Search of learning rate, batch size and optimiser with Optuna, for `run_segmentation.py --hp_search`."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arguments import SegmentationTrainingArguments
from processes import from_main_process
from provenance import STUDY, write_json
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from sam2unet_hf.training import Sam2UNetTrainer


logger = logging.getLogger(__name__)


def search(
    make_trainer: Callable[[TrainingArguments], Sam2UNetTrainer],
    model_init: Callable[[], PreTrainedModel],
    training_args: SegmentationTrainingArguments,
) -> dict[str, Any]:
    """Train `hp_search` times with different hyperparameters, and return those of the best validation score.

    The output folder keeps the trials in `hp_search.db`, where a search that was stopped is resumed, and lists them in
    `hp_search.json`. Trials write no checkpoints.
    """
    import optuna

    args = copy.deepcopy(training_args)
    args.save_strategy, args.load_best_model_at_end, args.push_to_hub = SaveStrategy.NO, False, False
    trainer = make_trainer(args)
    trainer.model_init = lambda trial: model_init()
    batch_sizes = [factor * training_args.per_device_train_batch_size for factor in (1, 2, 4)]
    if args.dataloader_drop_last:  # no batch may be larger than the data
        batch_sizes = [size for size in batch_sizes if size * args.world_size <= len(trainer.train_dataset)]

    def space(trial: Any) -> dict[str, Any]:
        return {
            "learning_rate": trial.suggest_float("learning_rate", 1e-5, 3e-3, log=True),
            "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", batch_sizes),
            "optim": trial.suggest_categorical("optim", ["adamw_torch", "adafactor", "sgd"]),
        }

    folder = Path(training_args.output_dir)
    study = {
        "study_name": "hp_search",
        "storage": f"sqlite:///{(folder / STUDY).absolute()}",
        "direction": "maximize" if training_args.greater_is_better else "minimize",
        "load_if_exists": True,
    }
    score = f"eval_{str(training_args.metric_for_best_model).removeprefix('eval_')}"
    complete = [optuna.trial.TrialState.COMPLETE]
    num_done = from_main_process(args, lambda: len(optuna.create_study(**study).get_trials(states=complete)))
    if num_done < args.hp_search:
        trainer.hyperparameter_search(
            hp_space=space,
            compute_objective=lambda metrics: metrics[score],
            n_trials=args.hp_search - num_done,
            backend="optuna",
            # The seed depends on the trials that are done, so that a resumed search does not repeat them.
            sampler=optuna.samplers.TPESampler(seed=args.seed + num_done),
            # Unfinished trials of different batch sizes cannot be compared.
            pruner=optuna.pruners.NopPruner(),
            **study,
        )

    def write_results() -> dict[str, Any]:
        finished = optuna.create_study(**study)
        done = finished.get_trials(states=complete)
        trials = {trial.number: {"number": trial.number, score: trial.value, **trial.params} for trial in done}
        best = trials[finished.best_trial.number]
        write_json(folder / "hp_search.json", {"best": best, "trials": list(trials.values())})
        logger.info("Best of %d trials: %s.", len(trials), best)
        return finished.best_params

    return from_main_process(args, write_results)
