"""Projected gradient descent on pixels."""

from collections.abc import Sequence
from typing import Any

import torch

from hf_robust.attacks.gradient import KEEPS, STEP_RULES, StepRule, without_stuck
from hf_robust.attacks.vision.ball import PixelBall
from hf_robust.attacks.vision.base import Advance, PixelAttack
from hf_robust.sites.pixels import check_step_size
from hf_robust.threats import check_choice

# Steepest in each norm
_RULES = {"linf": "sign", "l2": "normalized", "l1": "sparse_sign"}
PIXEL_STEP_RULES = (*STEP_RULES, "sparse_sign")


class PGD(PixelAttack):
    """
    Perturb images within a small ball of raw pixels so that they are misclassified.

    "Towards Deep Learning Models Resistant to Adversarial Attacks" (arXiv 1706.06083): steps along the steepest direction of
    the norm, each followed by a projection onto the ball and the box [0, 1]. With `norm="linf"`, `random_start=False`,
    `keep="last"` and raw pixels the images are bit for bit those of torchattacks and foolbox.

    Args:
        epsilon: radius in raw [0, 1] pixels, such as 8/255, whatever an image processor makes of them. 0 switches the attack
            off.
        norm: `"linf"`, `"l2"` or `"l1"`.
        steps: gradient steps; 0 switches the attack off.
        step_size: length of a step in raw pixels. Default: `2.5 * epsilon / steps` (the paper's), at most `epsilon`.
        random_start: start uniformly in the ball instead of at the clean image. Needed wherever the loss has no gradient there
            (KL and feature distances to the clean image).
        restarts: searches for each image, of which the best counts.
        image_processor: what made `pixel_values`; its mean and std are undone for radius, step and box. `None`: they are raw.
        step_rule: `"sign"`, `"normalized"`, `"sparse_sign"`, `"momentum"`, `"adam"` or `"rmsprop"`. Default: the steepest of
            the norm, which are the first three for `"linf"`, `"l2"` and `"l1"`. For the latter two, every step has length
            `step_size` in `norm`.
        loss: `"ce"`, `"dlr"` or `"targeted_dlr"`: see [`~hf_robust.attacks.vision.attack_loss`]. The last searches once for
            each of the 9 other classes of highest logit.
        keep: `"best"`, for evaluation: the first perturbation that is misclassified, else the one of lowest loss; looks at
            the clean images first and at the last perturbation, two forwards more. `"last"`, for training: the final one,
            however good.
        fixed_starts: whether the random start of an image depends on `seed` and the image alone, so that results do not
            depend on the batch. `False`, for training: all draw from `generator`, anew at every call, which may be seeded at
            any time.
        seed: seed of random starts. The global random state is never touched.

    Raises:
        ValueError: an argument is out of range or unknown, such as an L∞ radius of 8 instead of 8/255.

    Example:

    ```python
    >>> attack = PGD(epsilon=8 / 255, steps=20, image_processor=image_processor)
    >>> delta = attack.perturb(model, pixel_values=pixel_values, labels=labels)
    >>> logits = model(pixel_values=pixel_values + delta).logits
    ```
    """

    def __init__(
        self,
        *,
        epsilon: float,
        norm: str = "linf",
        steps: int,
        step_size: float | None = None,
        random_start: bool = True,
        restarts: int = 1,
        image_processor: Any = None,
        step_rule: str | None = None,
        loss: str = "ce",
        keep: str = "best",
        fixed_starts: bool = True,
        seed: int = 0,
    ):
        check_choice("keep", keep, KEEPS)
        super().__init__(
            epsilon=epsilon, norm=norm, steps=steps, restarts=restarts, loss=loss, image_processor=image_processor,
            keep=keep, seed=seed,
        )  # fmt: skip
        if step_size is not None:
            check_step_size("step_size", step_size, norm)
        if step_rule is not None:
            check_choice("step_rule", step_rule, PIXEL_STEP_RULES)
        if keep == "last" and (restarts > 1 or loss == "targeted_dlr"):
            argument = f"`restarts={restarts!r}`" if restarts > 1 else f"`loss={loss!r}`"
            raise ValueError(
                f"{argument} chooses among several searches, which `keep='last'` does not: use `keep='best'`."
            )
        if restarts > 1 and not random_start:
            raise ValueError(f"`restarts={restarts!r}` with `random_start=False` repeats one search: use `restarts=1`.")
        self.step_size, self.random_start, self.step_rule = step_size, random_start, step_rule
        self.fixed_starts = fixed_starts

    def start(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        A first perturbation, for a loop that has gradients from elsewhere and calls [`advance`] with them (Free AT, whose one
        backward serves weights and perturbation).

        Args:
            pixel_values: `[batch, ..., channels, height, width]` float; checked as in [`perturb`].

        Returns:
            δ in the shape and units of `pixel_values`, float32: zero, or drawn from `generator`.
        """
        ball = self.ball(pixel_values)
        return ball.to_model(self._start(ball, None))

    def advance(self, delta: torch.Tensor, gradient: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        One step of the search, uphill.

        Args:
            delta: in the shape and units of `pixel_values`.
            gradient: of the loss that the attack raises, with respect to `delta`.
            pixel_values: the clean images.

        Returns:
            The next δ, float32. Step rules with moments begin anew.
        """
        units = self.units(pixel_values.shape[-3])
        ball = PixelBall.around(pixel_values, units, self.epsilon, self.norm)
        downhill = -ball.to_model(gradient.detach().float())
        moved = self._stepper(ball)(ball.to_pixels(delta.detach().float()), downhill, downhill)
        return ball.to_model(moved)

    def _start(self, ball: PixelBall, generators: Sequence[torch.Generator] | None) -> torch.Tensor:
        return ball.project(self._random(ball, generators)) if self.random_start else torch.zeros_like(ball.raw)

    def _stepper(self, ball: PixelBall) -> Advance:
        rule = StepRule(self.step_rule or _RULES[self.norm], self.norm, unit_length=self.norm != "linf")
        length = (
            min(self.epsilon, 2.5 * self.epsilon / max(self.steps, 1)) if self.step_size is None else self.step_size
        )

        def advance(delta: torch.Tensor, grad: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
            if self.norm == "l1":
                grad = without_stuck(grad, delta, (ball.low, ball.high))
            # Through the image, as others do: differences of rounding would part the two after some steps
            moved = ball.raw + delta - length * rule(grad)
            return ball.project(moved - ball.raw)

        return advance
