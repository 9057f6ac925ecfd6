"""Averages of weights: what they are, where they are scored and saved, and that a run goes on with them."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from common import BRATS_REGIONS, sam2_model, small_model
from safetensors.torch import load_file
from test_training import SIZES, make_rows, make_trainer
from transformers import TrainerCallback

from sam2unet_hf import Sam2UNetForSemanticSegmentation
from sam2unet_hf.training.averaging import RAW_WEIGHTS, WeightAverage
from sam2unet_hf.training.resume import why_incomplete


# Five images, and so three steps an epoch.
RUN = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "learning_rate": 1e-2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 1,
    "batch_norm_images": 4,
}
AVERAGED = {**RUN, "ema_decay": 0.6}


@pytest.fixture(scope="module")
def rows():
    return make_rows(SIZES)


class RawWeights(TrainerCallback):
    """Keeps the weights after each step."""

    def __init__(self):
        self.steps = []

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps.append({name: weight.detach().clone() for name, weight in model.named_parameters()})


def train(rows, folder, checkpoint=None, **options):
    torch.manual_seed(3)
    trainer = make_trainer(small_model(regions=BRATS_REGIONS), rows, folder, **options)
    raw = RawWeights()
    trainer.add_callback(raw)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return trainer, raw.steps


@pytest.fixture(scope="module")
def run(rows, tmp_path_factory):
    return train(rows, tmp_path_factory.mktemp("averaged"), **AVERAGED)


def average_of(steps, decay):
    average = steps[0]
    for step, weights in enumerate(steps[1:], start=1):
        keep = min(decay, (1 + step) / (10 + step))
        average = {name: keep * old + (1 - keep) * weights[name] for name, old in average.items()}
    return average


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_an_average_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(0.15)
    average.on_train_begin(None, SimpleNamespace(stateful_callbacks={}), None, model=model)
    found = []
    for weight in (1.0, 2.0, 4.0):
        average.on_step_begin()
        torch.nn.init.constant_(model.weight, weight)
        average.on_step_end()
        assert average.swap_in()
        assert not average.swap_in()
        found.append(model.weight.item())
        average.on_step_begin()
        assert model.weight.item() == weight
    # The decay of the second step, 2/11, and that of the third, 3/12, are more than 0.15.
    second = 0.15 * 1 + 0.85 * 2
    assert found == pytest.approx([1, second, 0.15 * second + 0.85 * 4])


def test_the_decay_is_small_at_first():
    model = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(0.99)
    average.on_train_begin(None, SimpleNamespace(stateful_callbacks={}), None, model=model)
    for weight in (1.0, 0.0, 0.0):
        torch.nn.init.constant_(model.weight, weight)
        average.on_step_end()
    average.swap_in()
    assert model.weight.item() == pytest.approx(2 / 11 * 3 / 12)


def test_checkpoints_and_the_model_at_the_end_hold_the_average(run):
    trainer, steps = run
    assert len(steps) == 6
    for step in (2, 4, 6):
        folder = f"{trainer.args.output_dir}/checkpoint-{step}"
        model = Sam2UNetForSemanticSegmentation.from_pretrained(folder)
        expected = average_of(steps[:step], 0.6)
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        assert any(not torch.equal(model.get_parameter(name), steps[step - 1][name]) for name in trained)
        assert_same(load_file(f"{folder}/{RAW_WEIGHTS}"), {name: steps[step - 1][name] for name in sorted(trained)})
    assert_same(trainer.model.state_dict(), model.state_dict())


def test_scores_are_those_of_the_average_with_batch_norm_of_its_own(run, rows, tmp_path):
    trainer, _ = run
    history = {entry["step"]: entry for entry in trainer.state.log_history if "eval_dice" in entry}
    assert list(history) == [2, 4, 6]
    for step, scores in history.items():
        model = Sam2UNetForSemanticSegmentation.from_pretrained(f"{trainer.args.output_dir}/checkpoint-{step}")
        again = make_trainer(model, rows, tmp_path, per_device_eval_batch_size=2).evaluate()
        for name in ("eval_loss", "eval_dice", "eval_mae"):
            assert again[name] == scores[name], (step, name)
    # The statistics are those of the average, to the images that the run took for them.
    before = {name: value.clone() for name, value in trainer.model.named_buffers() if "running" in name}
    trainer.estimate_batch_norm()
    assert_same(before, {name: value for name, value in trainer.model.named_buffers() if "running" in name})


def test_averaging_leaves_the_training_as_it_is(run, rows, tmp_path):
    trainer, steps = run
    plain, expected = train(rows, tmp_path, **RUN)
    for found, weights in zip(steps, expected, strict=True):
        assert_same(found, weights)
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (trainer, plain)]
    assert losses[0] == losses[1]
    name = next(name for name, weight in plain.model.named_parameters() if weight.requires_grad)
    assert not torch.equal(trainer.model.get_parameter(name), plain.model.get_parameter(name))


@pytest.mark.parametrize("step", [2, 4, 6])  # the second within an epoch, and the last with nothing left to do
def test_a_run_that_goes_on_ends_with_the_average_of_one_that_never_stopped(run, rows, tmp_path, step):
    trainer, steps = run
    checkpoint = f"{trainer.args.output_dir}/checkpoint-{step}"
    resumed, rest = train(rows, tmp_path, checkpoint, **AVERAGED)
    assert_same(resumed.model.state_dict(), trainer.model.state_dict())
    assert len(rest) == 6 - step
    for found, weights in zip(rest, steps[step:], strict=True):
        assert_same(found, weights)
    history = [entry for entry in trainer.state.log_history if "eval_dice" in entry]
    again = [entry for entry in resumed.state.log_history if "eval_dice" in entry]
    assert [entry["eval_dice"] for entry in history] == [entry["eval_dice"] for entry in again]
    if step < 6:
        name = f"checkpoint-6/{RAW_WEIGHTS}"
        assert_same(load_file(f"{resumed.args.output_dir}/{name}"), load_file(f"{trainer.args.output_dir}/{name}"))


def test_the_best_checkpoint_is_that_of_an_average(run, rows, tmp_path):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer, _ = train(rows, tmp_path, **AVERAGED, **options)
    best = Sam2UNetForSemanticSegmentation.from_pretrained(trainer.state.best_model_checkpoint)
    assert trainer.state.best_global_step != 6  # the loss falls, so that the best is not the last one
    assert_same(trainer.model.state_dict(), best.state_dict())
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


def test_an_average_of_what_is_trained_alone(rows, tmp_path):
    sam2_model("sam2").save_pretrained(tmp_path / "sam2")
    models = []
    for folder, checkpoint in (("whole", None), ("resumed", tmp_path / "whole" / "checkpoint-4")):
        torch.manual_seed(1)
        model = Sam2UNetForSemanticSegmentation.from_sam2(tmp_path / "sam2", regions=BRATS_REGIONS)
        trainer = make_trainer(model, rows, tmp_path / folder, trainable_only=True, **AVERAGED)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        models.append(model.state_dict())
    assert_same(*models)
    names = set(load_file(tmp_path / "whole" / "checkpoint-6" / "model.safetensors"))
    assert set(load_file(tmp_path / "whole" / "checkpoint-6" / RAW_WEIGHTS)) < names
    assert not any(name.startswith("encoder.pos_embed") for name in names)


def test_a_run_may_begin_to_average_at_a_checkpoint_without_an_average(rows, tmp_path):
    plain, _ = train(rows, tmp_path / "plain", **RUN)
    trainer, steps = train(rows, tmp_path / "on", f"{plain.args.output_dir}/checkpoint-4", **AVERAGED)
    expected = average_of(steps, 0.6)
    assert len(steps) == 2
    for name, weight in trainer.model.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


def test_trials_of_a_search_begin_anew(rows, tmp_path):
    pytest.importorskip("optuna")
    trainer = make_trainer(small_model(regions=BRATS_REGIONS), rows, tmp_path, **{**AVERAGED, "save_strategy": "no"})
    trainer.model_init = lambda trial: small_model(regions=BRATS_REGIONS)
    scores = []
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-2])},
        compute_objective=lambda metrics: scores.append(metrics["eval_loss"]) or metrics["eval_loss"],
        n_trials=2,
        backend="optuna",
        direction="minimize",
    )
    assert len(scores) == 6  # three evaluations a trial
    assert scores[:3] == scores[3:]
    assert len(set(scores)) == 3


def test_an_average_is_gone_on_with_or_refused(run, rows, tmp_path):
    trainer, _ = run
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(f"{trainer.args.output_dir}/checkpoint-4", checkpoint)
    with pytest.raises(
        ValueError, match="checkpoint-4` holds an average of the weights, so `ema_decay` must not be 0"
    ):
        train(rows, tmp_path / "plain", checkpoint, **RUN)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["average"]["attributes"] == {"num_averaged": 4}
    (checkpoint / RAW_WEIGHTS).unlink()
    assert why_incomplete(checkpoint) == f"no {RAW_WEIGHTS}"
    with pytest.raises(ValueError, match=f"checkpoint-4` is not complete, .*: no {RAW_WEIGHTS}"):
        train(rows, tmp_path / "again", checkpoint, **AVERAGED)


@pytest.mark.parametrize(
    ("options", "dtype", "match"),
    [
        ({"ema_decay": 1.0}, torch.float32, "`ema_decay` must be above 0 and below 1, .* got 1.0"),
        ({"ema_decay": -0.5}, torch.float32, "`ema_decay` must be above 0 and below 1, .* got -0.5"),
        ({"batch_norm_images": 0}, torch.float32, "`batch_norm_images` must be above 0 with `ema_decay`"),
        ({}, torch.bfloat16, r"must be 0 for weights of half precision, .* got .*adapter.* in torch.bfloat16"),
    ],
    ids=["decay 1", "decay below 0", "no batch norm", "half precision"],
)
def test_averages_that_cannot_be_are_refused(rows, tmp_path, options, dtype, match):
    with pytest.raises(ValueError, match=match):
        make_trainer(small_model().to(dtype), rows, tmp_path, **{**AVERAGED, **options})
