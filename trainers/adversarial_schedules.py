"""Schedules of adversarial training: the learning rate's slow start and fast decay, the radius' way up, replayed batches."""

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler

from hf_robust.threats import check_at_least

SLOW_START = "slow_start_fast_decay"
EPSILON_SCHEDULES = ("constant", "linear", "cosine")


def slow_start_factor(
    step: int, total: int, *, warmup: int, start_factor: float = 0.0, end_factor: float = 0.01
) -> float:
    """
    Learning rate, as a share of its peak: a line from `start_factor` up to 1, then a geometric decay to `end_factor`.

    "Slow start, fast decay" is what fine-tuning of a pretrained model to robustness takes (arXiv 2012.13628). The paper
    draws its curve and gives no formula; this one has its shape, and its parameters are free.

    Args:
        step: optimizer steps done.
        total: optimizer steps of the training.
        warmup: steps of the first part.
        start_factor: share at step 0.
        end_factor: share at the last step.
    """
    if step < warmup:
        return start_factor + (1 - start_factor) * step / warmup
    return end_factor ** min(1.0, (step - warmup) / max(1, total - warmup))


def slow_start_fast_decay(
    optimizer: Optimizer,
    num_training_steps: int,
    *,
    num_warmup_steps: int = 0,
    peak_at: float = 0.5,
    start_factor: float = 0.0,
    end_factor: float = 0.01,
) -> LambdaLR:
    """
    The scheduler of `lr_scheduler_type="slow_start_fast_decay"`; its parameters come from `lr_scheduler_kwargs`.

    Args:
        optimizer: whose learning rate is the peak.
        num_training_steps: optimizer steps of the training.
        num_warmup_steps: steps of the way up; 0: `peak_at` decides.
        peak_at: share of the training at which the peak is reached.
        start_factor: share of the peak at the first step.
        end_factor: share of the peak at the last step.

    Raises:
        ValueError: a parameter is out of range.
    """
    for name, value, least in (
        ("peak_at", peak_at, 0),
        ("start_factor", start_factor, 0),
        ("end_factor", end_factor, 1e-12),
    ):
        check_at_least(name, value, least, "Give a share, between 0 and 1.")
        if value > 1:
            raise ValueError(f"`{name}={value!r}` of `lr_scheduler_kwargs` must be at most 1: it is a share.")
    warmup = num_warmup_steps or math.ceil(peak_at * num_training_steps)
    settings = {"total": num_training_steps, "warmup": warmup, "start_factor": start_factor, "end_factor": end_factor}
    return LambdaLR(optimizer, partial(slow_start_factor, **settings))  # type: ignore[arg-type]


def epsilon_factor(step: int, total: int, *, schedule: str, warmup: float) -> float:
    """
    Radius, as a share of its final value.

    Args:
        step: optimizer steps done.
        total: optimizer steps of the training.
        schedule: `"constant"`, `"linear"` or `"cosine"`.
        warmup: steps of the way up: a share of the training below 1, a number of steps from 1 on.

    Returns:
        A share in (0, 1]; already above 0 in the first step, which would otherwise train without an attack.
    """
    if schedule == "constant":
        return 1.0
    steps = math.ceil(warmup * total) if warmup < 1 else int(warmup)
    share = min(1.0, (step + 1) / (steps + 1))
    return share if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * share))


class ReplaySampler(Sampler[int]):
    """
    Shuffles a dataset and hands out each block of rows several times in a row: Free AT's replays.

    A block is the data of one optimizer step over all micro-batches and processes. The last block of an epoch is filled up
    with the epoch's first rows. The order is a function of seed and epoch, so that nothing has to be saved to resume.

    Args:
        size: rows of the dataset.
        block: rows of a block.
        replays: how many times each block is handed out.
        seed: of the orders.
    """

    def __init__(self, size: int, block: int, replays: int, seed: int):
        self.size, self.block, self.replays, self.seed = size, block, replays, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """
        Choose the order.

        Args:
            epoch: its number.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.size / self.block) * self.block * self.replays

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        for start in range(0, self.size, self.block):
            rows = order[start : start + self.block]
            rows += (order * math.ceil(self.block / self.size))[: self.block - len(rows)]
            for _ in range(self.replays):
                yield from rows
