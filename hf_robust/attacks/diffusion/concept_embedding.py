"""The inner maximisation of AdvUnlearn: embeddings that bring an erased concept back."""

import math
from collections.abc import Callable
from typing import Any

import torch

from hf_robust.attacks.gradient import SearchResult, gradient_search
from hf_robust.attacks.prompts import check_counts
from hf_robust.objectives import per_image_mse
from hf_robust.sites import check_not_reentrant, quiet
from hf_robust.threats import check_at_least, check_choice

METHODS = ("adam", "pgd", "fast", "none")


class ConceptEmbeddingAttack:
    """
    Find embeddings for the tokens inserted into a prompt under which a model predicts what the original model predicts
    under the concept (arXiv 2405.15234).

    Minimises the mean squared error of the model's prediction under the attacked prompt against the original's under the
    clean one, at other latents and time steps in every step. The embeddings enter before the position embeddings; the
    search starts from those of the tokens in the prompt. Departures from the released code: the gradient is that of
    the current step alone, the result is the last point of the search, and one step is a step (`reference_compat` has none
    of the three).

    Args:
        method: `"adam"`: Adam, unbounded (the form of the released loop, as intended); `"pgd"`: signed steps in an L2 ball
            around each embedding; `"fast"`: one signed step as long as the ball is wide; `"none"`: no attack.
        steps: gradient steps (30 in the released code; 1 under `"fast"`, whatever is given). 0 switches the attack off.
        step_size: under `"adam"` the largest change of a coordinate in a step (released code: 1e-3, the default); under
            `"pgd"` a share of the radius (default: `min(1, 2.5 / steps)`). Not used by `"fast"`.
        epsilon: radius of the ball around each starting embedding, as a multiple of that embedding's L2 norm (default 1.0,
            ours). Not used by `"adam"`.
        reference_compat: reproduce the released loop where it is at fault: its gradient is never cleared, so each step
            follows the sum of all so far, and the embedding taken is that before the last step. One step does nothing.

    Raises:
        ValueError: an argument is out of range or unknown.
    """

    def __init__(
        self,
        *,
        method: str = "adam",
        steps: int = 30,
        step_size: float | None = None,
        epsilon: float = 1.0,
        reference_compat: bool = False,
    ):
        check_choice("method", method, METHODS)
        check_counts({"steps": (steps, 0, "Use 0 to switch the attack off.")})
        check_at_least("epsilon", epsilon, 0, "Use 0 to switch the attack off, `method='adam'` for no bound.")
        if step_size is not None:
            check_at_least("step_size", step_size, 0, "Leave it out for the default.")
        self.method, self.epsilon, self.reference_compat = method, float(epsilon), reference_compat
        self.steps = 1 if method == "fast" and steps else int(steps)
        if step_size is None:
            step_size = {"adam": 1e-3, "pgd": min(1.0, 2.5 / max(self.steps, 1))}.get(method, 1.0)
        self.step_size = 1.0 if method == "fast" else float(step_size)

    @property
    def is_off(self) -> bool:
        """Whether prompts stay as they are."""
        return self.method == "none" or self.steps == 0 or (self.method != "adam" and self.epsilon == 0)

    def __repr__(self) -> str:
        shown = ("method", "steps", "step_size", "epsilon", "reference_compat")
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def describe(self) -> str:
        """The threat model in words."""
        if self.is_off:
            return "none: the attack is off"
        faults = ", with the released loop's faults" if self.reference_compat else ""
        if self.method == "adam":
            return f"embeddings of inserted tokens, unbounded, {self.steps} Adam steps of {self.step_size:g}{faults}"
        return (
            f"embeddings of inserted tokens, ε {self.epsilon:g} × the norm of the starting embedding, norm l2_token, "
            f"{self.steps} sign steps of {self.step_size:g} × ε{faults}"
        )

    def search(
        self,
        model: Any,
        *,
        input_ids: list[torch.Tensor],
        mask: torch.Tensor,
        draw: Callable[[int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, SearchResult]:
        """
        Search for the embeddings of all rows together; a row's result does not depend on its companions.

        Args:
            model: a [`~hf_robust.diffusion.DiffusionModel`], unwrapped. Its weights get no gradient; its mode is the same
                afterwards.
            input_ids: `[B, L]` int64 for each text encoder, with the tokens to start from in their places.
            mask: `[B, L]` bool, the places of the attacked tokens.
            draw: takes the number of the step and returns latents `[B, c, h, w]`, time steps `[B]` and the prediction to
                reach `[B, c, h, w]`.

        Returns:
            The embeddings `[B, L, H]` float32, those of `input_ids` outside `mask`, and the search's [`SearchResult`].
        """
        from hf_robust.diffusion import TextTokenSite

        check_not_reentrant(model)
        site = TextTokenSite(model)
        start = site.lookup(input_ids).detach().float()
        places = mask.unsqueeze(-1)
        radius: torch.Tensor | float = math.inf
        step_size: torch.Tensor | float = self.step_size
        if self.method != "adam":
            radius = self.epsilon * start.norm(dim=-1, keepdim=True)
            step_size = self.step_size * radius
        calls = iter(range(self.steps))

        def loss_fn(delta: torch.Tensor) -> tuple[torch.Tensor, None]:
            latents, timesteps, target = draw(next(calls))
            with site.replace(start + delta, mask):
                prediction = model(latents, timesteps, input_ids)
            return per_image_mse(prediction, target), None

        with quiet(model):
            result = gradient_search(
                loss_fn,
                torch.zeros_like(start),
                mask=places.float(),
                radius=radius,
                norm="l2_token",
                # The embedding before the last step is that after one step less
                steps=max(self.steps - 1, 0) if self.reference_compat else self.steps,
                step_size=step_size,
                step_rule="adam" if self.method == "adam" else "sign",
                unit_length=self.method != "adam",
                keep="last",  # losses at different latents do not compare
                accumulate=self.reference_compat,
            )
        return start + result.delta * places, result
