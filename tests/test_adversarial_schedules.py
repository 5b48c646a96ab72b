"""Schedules of adversarial training against values derived by hand."""

import pytest
import torch

from hf_robust.trainers.adversarial_schedules import (
    ReplaySampler,
    epsilon_factor,
    slow_start_factor,
    slow_start_fast_decay,
)


def test_slow_start_fast_decay_by_hand():
    rates = [slow_start_factor(step, 10, warmup=4, start_factor=0.2, end_factor=0.01) for step in range(11)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    # Two decades in six steps
    assert rates[5:] == pytest.approx([10 ** (-step / 3) for step in range(1, 7)])


def test_scheduler_steps_an_optimizer():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = slow_start_fast_decay(optimizer, 4, peak_at=0.5, end_factor=0.25)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.0, 0.25, 0.5, 0.25, 0.125])
    warm = slow_start_fast_decay(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), 4, num_warmup_steps=1)
    assert warm.lr_lambdas[0](1) == 1.0


@pytest.mark.parametrize("name", ["peak_at", "start_factor", "end_factor"])
@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_shares_out_of_range_are_refused(name: str, value: float):
    with pytest.raises(ValueError, match=name):
        slow_start_fast_decay(torch.optim.SGD([torch.zeros(1)], lr=1.0), 4, **{name: value})


def test_epsilon_factor_by_hand():
    linear = [epsilon_factor(step, 8, schedule="linear", warmup=0.5) for step in range(8)]
    assert linear == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])
    assert epsilon_factor(1, 8, schedule="cosine", warmup=3) == pytest.approx(0.5)
    assert epsilon_factor(0, 8, schedule="constant", warmup=3) == 1.0


def test_replay_sampler_repeats_blocks_and_shows_every_row():
    sampler = ReplaySampler(10, 4, 3, seed=0)
    found = list(sampler)
    assert len(found) == len(sampler) == 36
    blocks = [found[start : start + 4] for start in range(0, 36, 4)]
    assert all(blocks[i] == blocks[i - i % 3] for i in range(9))
    assert set(found) == set(range(10))
    assert blocks[6][2:] == blocks[0][:2]  # the last block is filled up
    assert list(sampler) == found
    sampler.set_epoch(1)
    assert list(sampler) != found


def test_replay_sampler_fills_a_block_larger_than_the_dataset():
    found = list(ReplaySampler(3, 8, 2, seed=0))
    assert len(found) == 16 and found[:3] == found[3:6] and found[6:8] == found[:2]
