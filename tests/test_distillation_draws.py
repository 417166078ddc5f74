"""What every step of a training draws: a function of seed and step alone, however the batch is cut."""

from __future__ import annotations

import pytest
import torch

from asdm_compress.core.distillation import Distillation, Losses
from asdm_compress.distillation.draws import Draws, micro_batches


def draws(batch=6, **values):
    settings = Distillation(batch=batch, losses=Losses(caption_dropout=0.3, random_conditioning=2.0), **values)
    return Draws(settings, 10, (4, 2, 2), 1000)


def test_draws_are_a_function_of_seed_and_step():
    for name in ("items", "timesteps", "noise", "captions", "captioned", "own", "rolled"):
        assert torch.equal(getattr(draws().of(7), name), getattr(draws().of(7), name))
    assert not torch.equal(draws().of(7).noise, draws().of(8).noise)
    assert not torch.equal(draws().of(7).noise, draws(seed=1).of(7).noise)


def test_every_epoch_sees_every_item_once_in_another_order():
    seen = torch.cat([draws().of(step).items for step in range(10)]).tolist()
    epochs = [seen[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3


def test_timesteps_are_stratified_and_captions_dropped_and_swapped():
    times, dropped, swapped = [], 0, {True: [0, 0], False: [0, 0]}
    for step in range(300):
        draw = draws(batch=5).of(step)
        assert sorted((draw.timesteps // 200).tolist()) == list(range(5))
        times += draw.timesteps.tolist()
        dropped += int((~draw.captioned).sum())
        for t, own, captioned in zip(draw.timesteps, draw.own, draw.captioned, strict=True):
            if captioned:
                swapped[bool(t > 500)][int(own)] += 1
    assert min(times) < 10
    assert max(times) > 990
    assert dropped / 1500 == pytest.approx(0.3, abs=0.04)
    share = {late: others / (others + own) for late, (others, own) in swapped.items()}
    assert share[False] < share[True]  # the mean of exp(-2 (1 - t / T)) over either half
    assert share[True] == pytest.approx(0.632, abs=0.05)
    assert share[False] == pytest.approx(0.233, abs=0.05)


def test_batches_are_cut_evenly():
    assert micro_batches(64, 2, None) == (32, 1)
    assert micro_batches(64, 1, 24) == (16, 4)
    assert micro_batches(6, 1, 4) == (3, 2)
