"""Auto-PGD: projected gradient descent that chooses its step size."""

from collections.abc import Sequence
from typing import Any

import torch

from hf_robust.attacks.vision.ball import PixelBall
from hf_robust.attacks.vision.base import Advance, PixelAttack
from hf_robust.threats import sparse_sign, unit


class APGD(PixelAttack):
    """
    Auto-PGD: perturb images as [`PGD`] does, without a step size to choose; for evaluation.

    "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks" (arXiv 2003.01690): steps
    with momentum 0.75, which begin at twice the radius and are halved at checkpoints where the search has stalled, going on
    from the best perturbation so far. With `norm="l1"` the steps are sparse, and their number of coordinates follows that of
    the best perturbation (arXiv 2103.01208, of which the sequence of larger radii is not part).

    A row is done at its first misclassified perturbation, which is the one returned; the clean images come first. APGD on
    `"ce"` and on `"targeted_dlr"` are two of AutoAttack's four parts.

    Args:
        epsilon: radius in raw [0, 1] pixels, such as 8/255, whatever an image processor makes of them. 0 switches the attack
            off.
        norm: `"linf"`, `"l2"` or `"l1"`.
        steps: gradient steps (the paper's 100).
        restarts: searches for each image (for `"targeted_dlr"`, and each target), of which the best counts. Each starts at
            random at the edge of the ball.
        loss: `"ce"`, `"dlr"` or `"targeted_dlr"`: see [`~hf_robust.attacks.vision.attack_loss`]. The last searches once for
            each of the 9 other classes of highest logit.
        image_processor: what made `pixel_values`; its mean and std are undone for radius and box. `None`: they are raw.
        seed: seed of random starts, which depend on the seed and the image alone. The global random state is never touched.

    Raises:
        ValueError: an argument is out of range or unknown, such as an L∞ radius of 8 instead of 8/255.

    Example:

    ```python
    >>> attack = APGD(epsilon=8 / 255, loss="targeted_dlr", image_processor=image_processor)
    >>> found = attack.search(model, pixel_values=pixel_values, labels=labels)
    >>> robust_accuracy = 1 - found.hit.float().mean()
    ```
    """

    def __init__(
        self,
        *,
        epsilon: float,
        norm: str = "linf",
        steps: int = 100,
        restarts: int = 1,
        loss: str = "ce",
        image_processor: Any = None,
        seed: int = 0,
    ):
        super().__init__(
            epsilon=epsilon, norm=norm, steps=steps, restarts=restarts, loss=loss, image_processor=image_processor,
            keep="best", seed=seed,
        )  # fmt: skip

    def _start(self, ball: PixelBall, generators: Sequence[torch.Generator] | None) -> torch.Tensor:
        return ball.project(self.epsilon * unit(self._random(ball, generators), self.norm))

    def _stepper(self, ball: PixelBall) -> Advance:
        return _SparseSteps(ball, self.steps) if self.norm == "l1" else _AdaptiveSteps(ball, self.steps)


def checkpoints(steps: int) -> list[int]:
    """
    Steps at which APGD looks back: the shares p of the steps with p_1 = 0.22 and gaps that shrink by 0.03 down to 0.06.

    Args:
        steps: gradient steps.
    """
    # In hundredths: sums of binary fractions would put 0.41 * 100 at 42
    shares, gap = [0], 22
    while shares[-1] + gap <= 100:
        shares.append(shares[-1] + gap)
        gap = max(gap - 3, 6)
    return sorted({-(-share * steps // 100) for share in shares[1:]})


class _BestSoFar:
    """The best perturbation of each row that a stepper has seen, with its gradient."""

    def __init__(self, ball: PixelBall):
        self.ball = ball
        self.per_row = (-1, *[1] * (ball.raw.dim() - 1))
        self.count = 0
        self.delta = self.grad = torch.zeros_like(ball.raw)
        self.loss = torch.full_like(ball.raw.flatten(1)[:, 0], torch.inf)

    def see(self, delta: torch.Tensor, grad: torch.Tensor, loss: torch.Tensor) -> None:
        better = loss < self.loss
        self.loss = torch.where(better, loss, self.loss)
        self.delta = torch.where(better.view(self.per_row), delta, self.delta)
        self.grad = torch.where(better.view(self.per_row), grad, self.grad)

    def back(self, rows: torch.Tensor, delta: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best perturbation for some rows (mask `[batch]`), the given one for the others."""
        rows = rows.view(self.per_row)
        return torch.where(rows, self.delta, delta), torch.where(rows, self.grad, grad)


class _AdaptiveSteps(_BestSoFar):
    """Steps of APGD in an L∞ or L2 ball."""

    # The paper's: weight of the new direction, and share of improving steps below which a step size is too large
    MOMENTUM, IMPROVING = 0.75, 0.75

    def __init__(self, ball: PixelBall, steps: int):
        super().__init__(ball)
        self.checkpoints, self.last_checkpoint = set(checkpoints(steps)), 0
        self.step_size = torch.full_like(self.loss, 2 * ball.epsilon)
        self.previous = self.delta
        self.last_loss = self.loss_at_checkpoint = self.loss
        self.improvements = torch.zeros_like(self.loss)
        self.halved = torch.ones_like(self.loss, dtype=torch.bool)

    def __call__(self, delta: torch.Tensor, grad: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        first = self.count == 0
        if first:
            self.loss_at_checkpoint = loss
        else:
            self.improvements = self.improvements + (loss < self.last_loss)
        self.last_loss = loss
        self.see(delta, grad, loss)
        if self.count in self.checkpoints:
            delta, grad = self._look_back(delta, grad)
        self.count += 1

        direction = grad.sign() if self.ball.norm == "linf" else unit(grad, self.ball.norm)
        step = self.ball.project(delta - self.step_size.view(self.per_row) * direction) - delta
        if not first:
            step = self.MOMENTUM * step + (1 - self.MOMENTUM) * (delta - self.previous)
        self.previous = delta
        return self.ball.project(delta + step)

    def _look_back(self, delta: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stalled = self.improvements <= self.IMPROVING * (self.count - self.last_checkpoint)
        # Neither a smaller step nor a better perturbation since the last checkpoint
        stalled = stalled | (~self.halved & (self.loss >= self.loss_at_checkpoint))
        self.step_size = torch.where(stalled, self.step_size / 2, self.step_size)
        self.halved, self.loss_at_checkpoint, self.last_checkpoint = stalled, self.loss, self.count
        self.improvements = torch.zeros_like(self.improvements)
        return self.back(stalled, delta, grad)


class _SparseSteps(_BestSoFar):
    """Steps of APGD in an L1 ball (arXiv 2103.01208)."""

    # The paper's: share of coordinates at first, its relation to those of the best perturbation, and of step sizes
    FIRST_SHARE, SHARE, SHRINK, SMALLEST, SPARSER = 0.2, 1 / 1.5, 1 / 1.5, 0.1, 0.95

    def __init__(self, ball: PixelBall, steps: int):
        super().__init__(ball)
        self.every = max(steps * 4 // 100, 1)
        self.size = ball.raw[0].numel()
        self.share = torch.full_like(self.loss, self.FIRST_SHARE)
        self.used = torch.full_like(self.loss, self.size)
        self.step_size = torch.full_like(self.loss, ball.epsilon)

    def __call__(self, delta: torch.Tensor, grad: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        self.see(delta, grad, loss)
        if self.count and self.count % self.every == 0:
            delta, grad = self._look_back(delta, grad)
        self.count += 1
        moved = delta - self.step_size.view(self.per_row) * sparse_sign(grad, self.share)
        return self.ball.project(moved)

    def _look_back(self, delta: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        used = self.delta.flatten(1).count_nonzero(dim=1).to(self.loss.dtype)
        sparser = used < self.SPARSER * self.used
        self.share, self.used = used / self.size * self.SHARE, used
        epsilon = self.ball.epsilon
        smaller = (self.step_size * self.SHRINK).clamp(min=self.SMALLEST * epsilon)
        self.step_size = torch.where(sparser, epsilon, smaller)
        return self.back(sparser, delta, grad)
