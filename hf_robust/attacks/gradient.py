"""The one gradient search behind every continuous attack: any site, any objective."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_robust.attacks.budget import Budget, Clock
from hf_robust.threats import project, sparse_sign, unit

STEP_RULES = ("sign", "normalized", "momentum", "adam", "rmsprop")
KEEPS = ("best", "last")

# Of the coordinates, the share that a step in an L1 ball moves: that of Tramèr & Boneh (arXiv 1904.13000)
SPARSE_SHARE = 0.01

# Float16 gradients of small losses underflow. A power of two is exact to multiply by and to undo, so it can stay on for
# every dtype (an autocast inside the model's forward cannot be seen from here).
_LOSS_SCALE = 128.0

# From the end of a coordinate's range at which it counts as reached: units of an image processor have rounded it
_END = 1e-6


@dataclass
class SearchResult:
    """
    What a search found and what it spent.

    Attributes:
        delta: `[batch, ..., features]` float32, no gradient.
        first_loss: `[batch]` loss at the initial perturbation.
        last_loss: `[batch]` loss at `delta` for `keep="best"`; at the last perturbation that was evaluated otherwise.
        losses: `[evaluations, batch]` loss of every forward, in order.
        non_finite: `[batch]` bool, rows that met a non-finite loss or gradient and stopped at a finite perturbation.
        hit: `[batch]` bool, rows that reached the caller's stopping criterion (all `False` without one).
        num_forwards: forward passes of the batch.
        num_backwards: backward passes of the batch.
        evaluations: `[batch]` int64, entries of `losses` up to the one where a row reached the stopping criterion; all of
            them for a row that never did. What a row costs, whatever its companions go on to cost.
        exhausted: whether the search ended because its budget was spent.
    """

    delta: torch.Tensor
    first_loss: torch.Tensor
    last_loss: torch.Tensor
    losses: torch.Tensor
    non_finite: torch.Tensor
    hit: torch.Tensor
    num_forwards: int
    num_backwards: int
    evaluations: torch.Tensor
    exhausted: bool = False

    def spent(self, row: int) -> dict[str, Any]:
        """Losses and costs of one row, as arguments of [`~hf_robust.attacks.AttackResult`]."""
        count, hit = int(self.evaluations[row]), bool(self.hit[row])
        return {
            "loss": float(self.last_loss[row]),
            "losses": self.losses[:count, row].tolist(),
            "hit": hit,
            "num_forwards": count,
            "num_backwards": min(count, self.num_backwards),
            "budget_exhausted": self.exhausted and not hit,
        }


class StepRule:
    """
    Turns a gradient into a direction of descent; keeps moments for the adaptive rules.

    Args:
        name: `"sign"`; `"normalized"` (unit length in the threat model's norm); `"momentum"` (sign of an average of
            normalised gradients, decay 1.0, arXiv 1710.06081); `"adam"` (0.9, 0.999) and `"rmsprop"` (0.99), as in
            PyTorch's optimizers; `"sparse_sign"` (the largest hundredth of a sample's coordinates, L1 length 1).
        norm: norm of the threat model.
        unit_length: rescale the direction to length 1 in `norm`, so that the step size is a length.
        weight_decay: multiple of the variable that is added to its gradient before the rule applies, as `weight_decay` of
            `torch.optim.Adam` and `RMSprop`.
    """

    def __init__(self, name: str, norm: str, *, unit_length: bool, weight_decay: float = 0.0):
        self.name, self.norm, self.unit_length, self.weight_decay = name, norm, unit_length, weight_decay
        self.mean: torch.Tensor | None = None
        self.square: torch.Tensor | None = None
        self.count = 0

    def __call__(self, grad: torch.Tensor) -> torch.Tensor:
        self.count += 1
        if self.name == "sign":
            direction = grad.sign()
        elif self.name == "normalized":
            return unit(grad, self.norm)
        elif self.name == "sparse_sign":
            return sparse_sign(grad, SPARSE_SHARE)
        elif self.name == "momentum":
            scale = grad.abs().flatten(1).mean(dim=1).view(-1, *[1] * (grad.dim() - 1))
            grad = grad / scale.clamp(min=torch.finfo(grad.dtype).tiny)
            self.mean = grad if self.mean is None else self.mean + grad
            direction = self.mean.sign()
        else:
            direction = self._adaptive(grad)
        return unit(direction, self.norm) if self.unit_length else direction

    def select(self, rows: torch.Tensor) -> None:
        """
        Keep the moments of some rows, for a search that goes on with these only.

        Args:
            rows: indices `[kept]` or mask `[batch]`.
        """
        self.mean = None if self.mean is None else self.mean[rows]
        self.square = None if self.square is None else self.square[rows]

    def _adaptive(self, grad: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros_like(grad)
        decay = 0.999 if self.name == "adam" else 0.99
        self.square = decay * (zeros if self.square is None else self.square) + (1 - decay) * grad * grad
        if self.name == "rmsprop":
            return grad / (self.square.sqrt() + 1e-8)
        self.mean = 0.9 * (zeros if self.mean is None else self.mean) + 0.1 * grad
        mean = self.mean / (1 - 0.9**self.count)
        square = self.square / (1 - decay**self.count)
        return mean / (square.sqrt() + 1e-8)


def without_stuck(
    grad: torch.Tensor, delta: torch.Tensor, box: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    """
    A gradient that is zero at coordinates which are at an end of their range and would be moved out of it. A step of few
    coordinates (in an L1 ball) must not be spent on those: the projection would take it back.

    Args:
        grad: of the loss to be lowered, in the shape of `delta`.
        delta: perturbation `[batch, ..., features]`.
        box: lower and upper end of each coordinate of `delta`; `None`: no ends.
    """
    if box is None:
        return grad
    low, high = box
    stuck = ((grad > 0) & (delta <= low + _END)) | ((grad < 0) & (delta >= high - _END))
    return torch.where(stuck, 0.0, grad)


def gradient_search(
    loss_fn: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]],
    delta: torch.Tensor,
    *,
    mask: torch.Tensor,
    radius: torch.Tensor | float,
    norm: str,
    steps: int,
    step_size: torch.Tensor | float,
    step_rule: str | StepRule,
    unit_length: bool = False,
    keep: str = "best",
    accumulate: bool = False,
    stop_on_hit: bool = False,
    budget: Budget | None = None,
    projection: Callable[[torch.Tensor], torch.Tensor] | None = None,
    box: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> SearchResult:
    """
    Minimise a per-row loss over a ball by projected gradient steps.

    Only `torch.autograd.grad` with respect to the perturbation runs: no weight receives a gradient. Rows never mix: the
    gradient is that of the sum of the rows' losses. Nothing in the loop waits for the device, unless `stop_on_hit` or a
    budget in seconds asks for it.

    Args:
        loss_fn: takes the perturbation and returns the loss of each row `[batch]`, and either `None` or a `[batch]` bool
            tensor of rows that reached their goal; those stop moving.
        delta: starting perturbation `[batch, ..., features]`, float32.
        mask: broadcastable to `delta`; 1 where it may move. `delta` must be zero elsewhere.
        radius: radius of the ball (`inf`: unbounded), see [`~hf_robust.threats.project`].
        norm: norm of the ball.
        steps: number of gradient steps; 0 evaluates nothing.
        step_size: length of a step, in the units of `delta`.
        step_rule: one of [`STEP_RULES`]; or a [`StepRule`], whose moments go on where an earlier search of the same rows
            left them (its own `norm` and `unit_length` hold).
        unit_length: whether directions are rescaled to length 1 in `norm` before `step_size` applies.
        keep: `"best"` returns the perturbation of lowest loss of each row (one forward more); `"last"` the final one.
        accumulate: step along the sum of all gradients so far instead of the last one: what a loop does that never clears
            its gradient.
        stop_on_hit: leave the loop once every row (on every process) has reached its goal. Costs one wait a step.
        budget: what each row may spend. Forwards and backwards bound the number of steps beforehand, the forward of
            `keep="best"` included; seconds are looked at before each step, which costs one wait a step.
        projection: takes the perturbation after a step and returns its nearest allowed point, each row by itself, for a
            set that is no ball (`radius` and `norm` then bound nothing). Default: [`~hf_robust.threats.project`].
        box: lower and upper end of each coordinate, which `projection` keeps to; steps leave out coordinates that would only
            be projected back: see [`without_stuck`]. For steps of few coordinates.

    Returns:
        [`SearchResult`].
    """
    rule = step_rule if isinstance(step_rule, StepRule) else StepRule(step_rule, norm, unit_length=unit_length)
    gradients: torch.Tensor | None = None
    step = step_size * mask

    def advance(delta: torch.Tensor, grad: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        nonlocal gradients
        if accumulate:
            grad = gradients = grad if gradients is None else gradients + grad
        if rule.weight_decay:
            grad = grad + rule.weight_decay * delta
        moved = delta - step * rule(without_stuck(grad * mask, delta, box))
        return project(moved, radius, norm) if projection is None else projection(moved)

    return descend(loss_fn, delta, advance, steps=steps, keep=keep, stop_on_hit=stop_on_hit, budget=budget)


def descend(
    loss_fn: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]],
    delta: torch.Tensor,
    advance: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    steps: int,
    keep: str = "best",
    stop_on_hit: bool = False,
    budget: Budget | None = None,
) -> SearchResult:
    """
    The loop of [`gradient_search`] around a step of the caller's own, which knows the losses too.

    Args:
        loss_fn: see [`gradient_search`].
        delta: starting perturbation `[batch, ..., features]`, float32.
        advance: takes the perturbation, the gradient of its loss (float32; zero for rows that stopped) and its loss `[batch]`,
            and returns the next perturbation, each row by itself. Rows that stopped stay, whatever it returns for them.
        steps: number of calls of `advance`; 0 evaluates nothing.
        keep: see [`gradient_search`].
        stop_on_hit: see [`gradient_search`].
        budget: see [`gradient_search`].

    Returns:
        [`SearchResult`].
    """
    batch = delta.shape[0]
    per_row = (batch, *[1] * (delta.dim() - 1))
    best = safe = delta.detach()
    best_loss = torch.full((batch,), math.inf, device=delta.device)
    zero = torch.zeros((), device=delta.device)
    active = torch.ones(batch, dtype=torch.bool, device=delta.device)
    non_finite = torch.zeros_like(active)
    hit = torch.zeros_like(active)
    evaluations = torch.zeros(batch, dtype=torch.long, device=delta.device)
    losses: list[torch.Tensor] = []
    forwards = backwards = 0
    clock = Clock()
    allowed = _allowed_steps(steps, keep, budget)
    exhausted, timed_out = allowed < steps, False

    def record(loss: torch.Tensor, reached: torch.Tensor | None) -> torch.Tensor:
        """Bookkeeping of one evaluation; returns the rows whose loss is finite."""
        nonlocal best, best_loss, hit, non_finite, active, evaluations
        finite = loss.isfinite()
        losses.append(loss)
        evaluations = evaluations + ~hit
        newly = None if reached is None else reached & finite & ~hit
        if keep == "best":
            better = finite & (loss < best_loss) & ~hit
            # A row that reaches its goal keeps that perturbation, whatever loss came before it
            better = better if newly is None else better | newly
            best = torch.where(better.view(per_row), delta.detach(), best)
            best_loss = torch.where(better, loss, best_loss)
        if newly is not None:
            hit, active = hit | newly, active & ~newly
        non_finite = non_finite | ~finite
        active = active & finite
        return finite

    for _ in range(allowed):
        if budget is not None and budget.seconds is not None:
            if losses:
                losses[-1].sum().item()  # the clock would otherwise only see steps being queued
            if not budget.allows(seconds=clock.seconds):
                exhausted = timed_out = True
                break
        delta = delta.detach().requires_grad_(True)
        with torch.enable_grad():
            loss, reached = loss_fn(delta)
            (grad,) = torch.autograd.grad(loss.sum() * _LOSS_SCALE, delta)
        forwards, backwards = forwards + 1, backwards + 1
        with torch.no_grad():
            finite = record(loss.detach().float(), reached)
            # Fall back on the last perturbation whose loss was finite
            safe = torch.where(finite.view(per_row), delta.detach(), safe)
            grad = grad.float() / _LOSS_SCALE
            # Zero times an infinity is NaN: on a CPU a fraction of the time of looking at each entry
            grad_finite = (0 * grad).flatten(1).sum(dim=1).isfinite()
            non_finite = non_finite | (~grad_finite & active)
            active = active & grad_finite
            grad = torch.where(active.view(per_row), grad, zero)
            moved = advance(safe, grad, loss.detach().float())
            delta = torch.where(active.view(per_row), moved, safe)
        if stop_on_hit and not _any_process(active):
            exhausted = False
            break
    if keep == "best" and losses:
        if not timed_out:
            with torch.no_grad():
                loss, reached = loss_fn(delta)
                record(loss.float(), reached)
            forwards += 1
        delta = torch.where(best_loss.isfinite().view(per_row), best, safe)
    history = torch.stack(losses) if losses else delta.new_zeros(0, batch)
    first = history[0] if losses else delta.new_full((batch,), math.nan)
    last = best_loss if keep == "best" and losses else (history[-1] if losses else first)
    return SearchResult(
        delta.detach(), first, last, history, non_finite, hit, forwards, backwards, evaluations, exhausted
    )


def _allowed_steps(steps: int, keep: str, budget: Budget | None) -> int:
    """Steps that a budget in forwards and backwards leaves."""
    if budget is None:
        return steps
    if budget.forwards is not None:
        steps = min(steps, int(budget.forwards) - (keep == "best"))
    if budget.backwards is not None:
        steps = min(steps, int(budget.backwards))
    return max(steps, 0)


def _any_process(active: torch.Tensor) -> bool:
    """Whether any row on any process is still active: ranks must leave the loop together or wait for ever."""
    flag = active.any().int()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())
