"""Epochs of which a share of the slices shows foreground."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import run_two_processes
from sampling_worker import SHOWN, TUMOUR, train
from slice_rows import make_slices
from test_streaming import write_parquet

from sam2unet_hf.training.sampling import ForegroundSampler, ForegroundShare
from sam2unet_hf.training.streaming import ParquetRows, RowGroupSampler, open_parquet


# Seven slices with foreground, 13 without.
PIXELS = [5, 0, 0, 1, 0, 0, 9, 0, 0, 7, 0, 0, 2, 0, 0, 3, 0, 0, 8, 0]
FOREGROUND = {0, 3, 6, 9, 12, 15, 18}


@pytest.fixture(scope="module")
def rows():
    return make_slices(SHOWN, tumour=TUMOUR)


@pytest.mark.parametrize(("share", "num_empty"), [(1, 0), (0.9, 1), (0.5, 7), (0.4, 10), (0.35, 13), (0.1, 13)])
def test_an_epoch_has_all_foreground_and_the_share_of_empty_slices(share, num_empty):
    foreground = ForegroundShare(PIXELS, share)
    assert len(foreground) == 7 + num_empty
    assert foreground.reached_share == pytest.approx(7 / (7 + num_empty))
    for epoch in range(4):
        chosen = foreground.choose(3, epoch).tolist()
        assert len(chosen) == len(set(chosen)) == len(foreground)
        assert set(chosen) & FOREGROUND == FOREGROUND


@pytest.mark.parametrize("share", [0.9, 0.6, 0.4])
def test_empty_slices_come_in_turn_until_all_were_shown(share):
    foreground = ForegroundShare(PIXELS, share)
    taken = [row for epoch in range(39) for row in set(foreground.choose(0, epoch).tolist()) - FOREGROUND]
    counts = Counter(taken)
    assert set(counts) == set(range(20)) - FOREGROUND
    assert max(counts.values()) - min(counts.values()) <= 1
    # The next epoch goes on where the one before ended.
    first, second = (set(foreground.choose(0, epoch).tolist()) - FOREGROUND for epoch in (0, 1))
    assert len(first & second) == max(0, 2 * foreground.num_empty - 13)


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    foreground = ForegroundShare(PIXELS, 0.5)
    sampler = ForegroundSampler(foreground)
    orders = {}
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        foreground.set_epoch(epoch, seed)
        torch.rand(1)
        order = list(sampler)
        assert orders.setdefault((seed, epoch), order) == order
        assert len(order) == len(sampler) == 14
        assert set(order) == set(foreground.choose(seed, epoch).tolist())
        assert order != sorted(order)
    assert len({tuple(order) for order in orders.values()}) == 3
    # Each part of an epoch is mixed.
    orders = np.array([list(ForegroundSampler(foreground, seed)) for seed in range(200)])
    assert np.isin(orders, list(FOREGROUND)).mean(axis=0) == pytest.approx(np.full(14, 0.5), abs=0.15)


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan")])
def test_shares_out_of_range_are_refused(share):
    with pytest.raises(ValueError, match=f"`foreground_share` must be above 0 and at most 1, got {share}"):
        ForegroundShare(PIXELS, share)


def test_data_without_foreground_or_without_knowledge_of_it_are_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="needs training images with foreground, and none of 3 has any"):
        ForegroundShare([0, 0, 0], 0.5)
    with pytest.raises(ValueError, match="must be None, got 0.5, for training images without the column `wt_pixels`"):
        train(tmp_path, 0.5, rows=rows.remove_columns("wt_pixels"))


def numbers(batches):
    return [number for batch in batches for number in batch]


@pytest.mark.parametrize("streamed", [False, True])
def test_the_trainer_shows_the_share_and_goes_on_alike_within_an_epoch(rows, tmp_path, streamed):
    if streamed:
        write_parquet(tmp_path / "parquet", "train", rows, [(5, 5, 5), (5, 1)])

    def data():
        return open_parquet(str(tmp_path / "parquet"), shuffle_buffer=6)["train"] if streamed else rows

    trainer, seen = train(tmp_path / "whole", 0.5, data(), save_strategy="steps", save_steps=4)
    assert trainer.state.max_steps == 3 * 6
    assert trainer.notes["slices with foreground"] == "50% of each epoch"
    epochs = [numbers(seen[start : start + 6]) for start in (0, 6, 12)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 12
        assert set(epoch) & TUMOUR == TUMOUR
    assert len({tuple(epoch) for epoch in epochs}) == 3
    everything = {(case, index) for case, indices in SHOWN.items() for index in indices}
    assert set(numbers(seen)) == everything
    for step in (8, 12):  # within the second epoch, and at its end
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        again, seen_again = train(tmp_path / "again", 0.5, data(), checkpoint)
        assert seen_again == seen[step:]
        weights = trainer.model.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in again.model.state_dict().items())


def test_two_processes_share_the_slices_of_an_epoch_and_go_on_alike(tmp_path):
    run_two_processes(tmp_path, Path(__file__).with_name("sampling_worker.py"), tmp_path)
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    _, expected = train(tmp_path / "one", 0.5, per_device_train_batch_size=1)
    for process in found:
        assert process["steps"] == 3 * 6
        assert process["seen_again"] == process["seen"][8:]
        assert process["ends_alike"]
    # The processes take the slices of the order of a single one in turn.
    together = [slices for pair in zip(*(process["seen"] for process in found), strict=True) for slices in pair]
    assert together == expected


def test_batch_norm_is_estimated_on_the_same_share(rows, tmp_path):
    trainer, seen = train(tmp_path, 0.5, max_steps=1)
    seen.clear()
    trainer.batch_norm_images = 12
    trainer.estimate_batch_norm()
    assert len(set(numbers(seen)) & TUMOUR) == 6
    assert len(numbers(seen)) == 12


@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 0), (2, 0), (2, 3)])
def test_streamed_row_groups_are_read_once_though_rows_are_left_out(
    rows, tmp_path, monkeypatch, num_processes, num_workers
):
    write_parquet(tmp_path, "train", rows, [(4, 4, 4), (4, 4), (1,)])
    streamed = open_parquet(str(tmp_path), shuffle_buffer=8)["train"]
    foreground = ForegroundShare(streamed["wt_pixels"], 0.5)
    reads = []
    read_group = ParquetRows._read_group
    monkeypatch.setattr(ParquetRows, "_read_group", lambda rows, group: reads.append(group) or read_group(rows, group))
    for epoch in range(5):
        streamed.set_epoch(epoch, 0)
        foreground.set_epoch(epoch, 0)
        sampler = RowGroupSampler(streamed, 1, num_processes, num_workers, shuffle=True, foreground=foreground)
        order = sampler.order().tolist()
        assert len(sampler) == 12
        assert sorted(order) == sorted(foreground.choose(0, epoch).tolist())
        if num_processes == 1:
            reads.clear()
            for row in order:
                streamed[row]
            assert len(reads) == len(set(reads))
