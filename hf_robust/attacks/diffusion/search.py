"""Rounds of gradient search, each followed by a picture that is judged: the loop of every gradient attack on prompts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hf_robust.attacks.diffusion.base import DiffusionAttack
from hf_robust.attacks.diffusion.run import Run
from hf_robust.attacks.gradient import StepRule, gradient_search
from hf_robust.objectives import per_image_mse

if TYPE_CHECKING:
    from hf_robust.diffusion import Conditioning


class Draw(NamedTuple):
    """
    One step's random draw.

    Attributes:
        noisy: `[B, c, h, w]` noised latents of the target pictures.
        latents: `[B, c, h, w]` those latents.
        noise: `[B, c, h, w]`.
        timesteps: `[B]` int64.
    """

    noisy: torch.Tensor
    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor


@dataclass
class Variable:
    """
    What is searched for, a row for each attacked prompt.

    Attributes:
        start: `[B, ..., features]` float32.
        condition: `(places, values)` → what the UNet is told about the prompts at `places` (in `start`), with gradient.
        found: `(places, values)` → arguments of [`Run.judge_pictures`] that say what to draw from.
        mask: broadcastable to `start`, 1 where it may move.
        radius: radius of the ball around 0 (`inf`: none).
        norm: norm of the ball.
        projection: of a set that is no ball.
    """

    start: torch.Tensor
    condition: Callable[[list[int], torch.Tensor], "Conditioning"]
    found: Callable[[list[int], torch.Tensor], dict[str, Any]]
    mask: torch.Tensor = field(default_factory=lambda: torch.ones(()))
    radius: torch.Tensor | float = math.inf
    norm: str = "l2_token"
    projection: Callable[[torch.Tensor], torch.Tensor] | None = None

    def select(self, values: torch.Tensor | float, places: list[int]) -> Any:
        """The rows of a setting that has one for each prompt."""
        if not isinstance(values, torch.Tensor) or values.dim() == 0 or values.shape[0] != len(self.start):
            return values
        return values[torch.tensor(places, device=values.device)]


def draw_noised(
    run: Run, latents: torch.Tensor, generators: Sequence[torch.Generator], timestep: int | None = None
) -> Draw:
    """
    Noise the latents of target pictures, each row from its own generator.

    Args:
        run: its model gives the noise schedule.
        latents: `[B, c, h, w]`.
        generators: one for each row, on the CPU.
        timestep: of all rows; `None` draws one for each row.
    """
    count = len(run.model.alphas_cumprod)
    if timestep is None:
        drawn = [int(torch.randint(count, (), generator=generator)) for generator in generators]
    else:
        drawn = [timestep] * len(latents)
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    noise, timesteps = noise.to(latents.device), torch.tensor(drawn, device=latents.device)
    return Draw(run.model.add_noise(latents, noise, timesteps), latents, noise, timesteps)


class GradientAttack(DiffusionAttack):
    """
    Search by gradient for what makes the attacked model denoise a picture of the concept, one picture judged a round.

    Subclasses say what is searched for (`_variable`), in which rounds (`_rounds`), what the prediction should be (`_goal`).
    """

    needs_target_images = True
    step_size: float
    step_rule: str
    weight_decay: float = 0.0

    def _variable(self, run: Run, rows: list[int], shared: Any) -> Variable:
        raise NotImplementedError

    def _rounds(self, run: Run) -> list[tuple[int, int | None]]:
        """Gradient steps of each round, and its timestep (`None`: drawn anew in every step)."""
        raise NotImplementedError

    def _goal(self, run: Run, rows: list[int]) -> Callable[[list[int], Draw], torch.Tensor]:
        """`(places, draw)` → what the attacked model should predict, `[B, c, h, w]`."""
        return lambda places, draw: run.model.target(draw.latents, draw.noise, draw.timesteps)

    def _items_per_step(self) -> int:
        """UNet items that a step runs forward for each row."""
        return 1

    def _attack_group(self, run: Run, target_images: torch.Tensor | None, shared: Any) -> None:
        rows, latents = self._targets(run, target_images)
        if not rows:
            return
        variable, goal = self._variable(run, rows, shared), self._goal(run, rows)
        values, places = variable.start, list(range(len(rows)))
        rule = StepRule(self.step_rule, variable.norm, unit_length=False, weight_decay=self.weight_decay)
        for steps, timestep in self._rounds(run):
            values, places = self._round(run, rows, latents, variable, goal, rule, values, places, steps, timestep)
            if not places:
                return

    def _round(
        self,
        run: Run,
        rows: list[int],
        latents: torch.Tensor,
        variable: Variable,
        goal: Callable[[list[int], Draw], torch.Tensor],
        rule: StepRule,
        values: torch.Tensor,
        places: list[int],
        steps: int,
        timestep: int | None,
    ) -> tuple[torch.Tensor, list[int]]:
        """One search and the pictures after it, for the prompts at `places`; returns those that go on."""
        cost = self._items_per_step() + run.picture_cost
        active = run.affordable([rows[place] for place in places], forwards=cost, backwards=1)
        if not active:
            return values, []
        kept = [index for index, place in enumerate(places) if rows[place] in active]
        values, places = values[kept], [places[index] for index in kept]
        rule.select(torch.tensor(kept, device=values.device))
        generators, clean = [run.generators[row] for row in active], latents[places]

        def loss_fn(moved: torch.Tensor) -> tuple[torch.Tensor, None]:
            draw = draw_noised(run, clean, generators, timestep)
            prediction = run.model.predict(draw.noisy, draw.timesteps, variable.condition(places, moved))
            with torch.no_grad():
                wanted = goal(places, draw)
            return per_image_mse(prediction, wanted), None

        with run.spending(active):
            found = gradient_search(
                loss_fn,
                values,
                mask=variable.select(variable.mask.to(values.device), places),
                radius=variable.select(variable.radius, places),
                norm=variable.norm,
                steps=steps,
                step_size=self.step_size,
                step_rule=rule,
                keep="last",  # losses of different noise do not compare
                budget=run.search_budget(active, forwards_per_step=self._items_per_step()),
                projection=variable.projection,
            )
        hits = run.judge_pictures(active, **variable.found(places, found.delta))
        going = []
        for place, row in enumerate(active):
            result = run.results[row]
            result.losses += found.losses[:, place].tolist()
            if found.non_finite[place] and not hits[place]:  # a hit counts, however its search ended
                result.error = "the loss or its gradient is not finite: the search of this prompt ended there."
            result.budget_exhausted = found.exhausted and not hits[place]
            if not hits[place] and not found.exhausted and not found.non_finite[place]:
                going.append(place)
        rule.select(torch.tensor(going, dtype=torch.long, device=values.device))
        return found.delta[going], [places[place] for place in going]
