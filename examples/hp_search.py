"""Search of learning rate, batch size and optimiser with Optuna, for `run_segmentation.py --hp_search`."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import from_main_process
from provenance import write_json
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from sam2unet_hf.training import Sam2UNetTrainer


logger = logging.getLogger(__name__)

STUDY = "hp_search.db"
RESULTS = "hp_search.json"
OPTIMIZERS = ("adamw_torch", "adafactor", "sgd")


def search(
    make_trainer: Callable[[TrainingArguments], Sam2UNetTrainer],
    model_init: Callable[[], PreTrainedModel],
    training_args: TrainingArguments,
    num_trials: int,
) -> dict[str, Any]:
    """Train `num_trials` times with different hyperparameters, and return those of the best validation score.

    The output folder keeps the trials in `hp_search.db`, so that a search that was stopped can be resumed, and lists
    them in `hp_search.json`. Trials write no checkpoints.

    Args:
        make_trainer: Builds a trainer from training arguments.
        model_init: Builds the model that every trial starts from.
        training_args: Arguments that all trials share. Batches are of 1, 2 or 4 times
            `per_device_train_batch_size` images, learning rates from 1e-5 to 3e-3.
        num_trials: Number of trials, including those of a search in the same folder that is resumed.
    """
    import optuna

    args = copy.deepcopy(training_args)
    args.save_strategy, args.load_best_model_at_end, args.push_to_hub = SaveStrategy.NO, False, False
    trainer = make_trainer(args)
    trainer.model_init = lambda trial: model_init()
    batch_size = training_args.per_device_train_batch_size

    def space(trial: Any) -> dict[str, Any]:
        return {
            "learning_rate": trial.suggest_float("learning_rate", 1e-5, 3e-3, log=True),
            "per_device_train_batch_size": trial.suggest_categorical(
                "per_device_train_batch_size", [batch_size, 2 * batch_size, 4 * batch_size]
            ),
            "optim": trial.suggest_categorical("optim", OPTIMIZERS),
        }

    folder = Path(training_args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    study = {
        "study_name": "hp_search",
        "storage": f"sqlite:///{(folder / STUDY).absolute()}",
        "direction": "maximize" if training_args.greater_is_better else "minimize",
        "load_if_exists": True,
    }
    score = f"eval_{str(training_args.metric_for_best_model).removeprefix('eval_')}"
    complete = [optuna.trial.TrialState.COMPLETE]
    left = num_trials - from_main_process(
        training_args, lambda: len(optuna.create_study(**study).get_trials(states=complete))
    )
    if left > 0:
        trainer.hyperparameter_search(
            hp_space=space,
            compute_objective=lambda metrics: metrics[score],
            n_trials=left,
            backend="optuna",
            # The seed depends on the trials that are done, so that a resumed search does not repeat them.
            sampler=optuna.samplers.TPESampler(seed=training_args.seed + num_trials - left),
            # Unfinished trials of different batch sizes cannot be compared.
            pruner=optuna.pruners.NopPruner(),
            **study,
        )

    def write_results() -> dict[str, Any]:
        finished = optuna.create_study(**study)
        trials = [
            {"number": trial.number, score: trial.value, **trial.params}
            for trial in finished.get_trials(states=complete)
        ]
        best = next(trial for trial in trials if trial["number"] == finished.best_trial.number)
        write_json(folder / RESULTS, {"best": best, "trials": trials})
        logger.info("Best of %d trials: %s.", len(trials), best)
        return finished.best_params

    return from_main_process(training_args, write_results)
