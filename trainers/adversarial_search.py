"""The inner maximisation on a classifier's inputs: every method's search, on the one engine."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_robust.attacks.gradient import SearchResult, StepRule, gradient_search, without_stuck
from hf_robust.objectives import kl_divergence, symmetric_kl
from hf_robust.objectives.adversarial_training import smoothed_cross_entropy
from hf_robust.sites import quiet
from hf_robust.threats import unit
from hf_robust.trainers.adversarial_inputs import Inputs, normal, uniform, unit_vector

# Power iteration replaces the direction instead of adding to it: a step this much longer leaves nothing of the old one
_REPLACE = 1e6


@dataclass(frozen=True)
class InputSearch:
    """
    A search for the perturbation of a classifier's inputs.

    Attributes:
        inputs: what is perturbed.
        norm: of the ball.
        epsilon: radius, in the inputs' unit.
        steps: gradient steps.
        step_size: length of a step, in the inputs' unit.
        objective: `"ce"`, `"kl"` or `"symmetric_kl"`: what is raised.
        start: `"zero"`, `"uniform"`, `"normal"` or `"power"`.
        start_scale: see [`~hf_robust.trainers.adversarial_recipes.Recipe`].
        clipped: whether steps are projected onto the ball.
    """

    inputs: Inputs
    norm: str
    epsilon: float
    steps: int
    step_size: float
    objective: str = "ce"
    start: str = "uniform"
    start_scale: float = 1.0
    clipped: bool = True

    def scaled(self, factor: float) -> "InputSearch":
        """
        The same search in a ball of another size.

        Args:
            factor: of radius and step.
        """
        return dataclasses.replace(self, epsilon=self.epsilon * factor, step_size=self.step_size * factor)

    @property
    def rule(self) -> str:
        """Steepest ascent in the norm."""
        return {"linf": "sign", "l1": "sparse_sign"}.get(self.norm, "normalized")

    def begin(self, model: nn.Module, given: dict[str, Any], seeds: list[int]) -> torch.Tensor:
        """
        The starting perturbation.

        Args:
            model: unwrapped.
            given: the model's inputs, without labels.
            seeds: of each row's random draw.
        """
        inputs, radius = self.inputs, self.epsilon * self.inputs.length(model)
        mask = inputs.mask(given)
        if self.start == "zero":
            return torch.zeros(inputs.shape(given), device=mask.device)
        if self.start == "power":
            return inputs.random(given, seeds, unit_vector) * self.start_scale
        if self.start == "normal":
            delta = inputs.random(given, seeds, normal) * self.start_scale
        else:
            delta = inputs.random(given, seeds, uniform(self.norm)) * (radius * self.start_scale)
        return inputs.projection(given, radius if self.clipped else None, self.norm)(delta)

    def carry(self, model: nn.Module, given: dict[str, Any], delta: torch.Tensor) -> torch.Tensor:
        """
        A perturbation of other inputs as the starting point for these: the nearest allowed one.

        Args:
            model: unwrapped.
            given: the model's inputs, without labels.
            delta: in the shape of their perturbation.
        """
        inputs, radius = self.inputs, self.epsilon * self.inputs.length(model)
        return inputs.projection(given, radius if self.clipped else None, self.norm)(delta * inputs.mask(given))

    def advance(
        self, model: nn.Module, given: dict[str, Any], delta: torch.Tensor, gradient: torch.Tensor
    ) -> torch.Tensor:
        """
        One step of the search along a gradient that somebody else computed, e.g. the backward pass that trains the model.

        Args:
            model: unwrapped.
            given: the model's inputs, without labels.
            delta: the perturbation.
            gradient: of the loss to be raised, in the shape of `delta`. Its scale does not matter.

        Returns:
            The moved perturbation; rows whose gradient is not finite stay.
        """
        fixed = gradient.detach().float()

        def linear(moved: torch.Tensor) -> tuple[torch.Tensor, None]:
            return -(moved * fixed).flatten(1).sum(dim=1), None

        return self._run(model, given, delta.detach(), linear, steps=1).delta

    def run(
        self,
        model: nn.Module,
        given: dict[str, Any],
        labels: torch.Tensor,
        seeds: list[int],
        *,
        until_wrong: bool = False,
    ) -> SearchResult:
        """
        Search.

        Args:
            model: unwrapped; its mode, gradients, statistics and random state are the same afterwards.
            given: the model's inputs, without labels.
            labels: `[B]` int64.
            seeds: of each row's random start.
            until_wrong: stop a row at its first misclassification, which the result then marks as a hit; one forward more.
        """
        with quiet(model):

            def logits(delta: torch.Tensor) -> torch.Tensor:
                with self.inputs.perturbed(model, given, delta) as moved:
                    return model(**moved).logits.float()

            clean = None
            if self.objective != "ce":
                with torch.no_grad():
                    clean = model(**given).logits.float()

            def loss_fn(delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
                found = logits(delta)
                if clean is None:
                    loss = smoothed_cross_entropy(found, labels)
                else:
                    loss = (kl_divergence if self.objective == "kl" else symmetric_kl)(found, clean)
                return -loss, found.detach().argmax(dim=-1) != labels if until_wrong else None

            start = self.begin(model, given, seeds)
            if self.start == "power":
                return self._power(model, given, start, loss_fn)
            return self._run(model, given, start, loss_fn, keep="best" if until_wrong else "last")

    def _run(
        self, model: nn.Module, given: dict[str, Any], start: torch.Tensor, loss_fn: Callable, **how: Any
    ) -> SearchResult:
        length = self.inputs.length(model)
        settings: dict[str, Any] = {
            "mask": self.inputs.mask(given),
            "radius": self.epsilon * length,
            "norm": self.norm,
            "steps": self.steps,
            "step_size": self.step_size * length,
            "step_rule": self.rule,
            "keep": "last",
            "projection": self.inputs.projection(given, self.epsilon * length if self.clipped else None, self.norm),
            "box": self._box(given),
        }
        return gradient_search(loss_fn, start, **{**settings, **how})

    def _box(self, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Ends of the coordinates' ranges for sparse steps; others lose nothing at an end."""
        return self.inputs.box(given) if self.norm == "l1" else None

    def _power(self, model: nn.Module, given: dict[str, Any], start: torch.Tensor, loss_fn: Callable) -> SearchResult:
        """Power iteration: the direction in which the divergence grows fastest, then the farthest point in it."""
        found = self._run(
            model,
            given,
            start,
            loss_fn,
            step_size=_REPLACE * self.start_scale,
            step_rule=StepRule("normalized", "l2", unit_length=False),
            projection=lambda moved: self.start_scale * unit(moved, "l2"),
            box=None,
        )
        radius = self.epsilon * self.inputs.length(model)
        uphill = -without_stuck(-found.delta, torch.zeros_like(found.delta), self._box(given))
        direction = StepRule(self.rule, self.norm, unit_length=False)(uphill) * self.inputs.mask(given)
        found.delta = self.inputs.projection(given, radius, self.norm)(radius * direction)
        return found
