"""What the attacks on pixels share: units, checks, random starts, restarts and targets around the one engine."""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hf_robust.attacks.gradient import SearchResult, descend
from hf_robust.attacks.prompts import check_counts
from hf_robust.attacks.vision.ball import Merged, PixelBall, pixel_generators
from hf_robust.attacks.vision.classifier import check_labels, class_numbers, input_dtype, logits_of
from hf_robust.attacks.vision.losses import PIXEL_LOSSES, attack_loss, best_other_classes
from hf_robust.sites.pixels import PixelUnits, check_epsilon
from hf_robust.sites.quiet import check_not_reentrant, quiet
from hf_robust.threats import PIXEL_NORMS, check_choice, initial

Objective = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
Advance = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Classes that the targeted loss tries, those of highest logit first (Croce & Hein, arXiv 2003.01690)
NUM_TARGETS = 9


class PixelAttack:
    """
    Base of the attacks on pixels. A subclass gives the first perturbation ([`_start`]) and the step ([`_stepper`]).

    Constructor arguments are public attributes of the same names.
    """

    random_start: bool = True
    fixed_starts: bool = True

    def __init__(
        self,
        *,
        epsilon: float,
        norm: str,
        steps: int,
        restarts: int,
        loss: str,
        image_processor: Any,
        keep: str,
        seed: int,
    ):
        check_choice("norm", norm, PIXEL_NORMS)
        check_choice("loss", loss, PIXEL_LOSSES)
        check_epsilon(epsilon, norm)
        check_counts(
            {
                "steps": (steps, 0, "Use 0 to switch the attack off."),
                "restarts": (restarts, 1, "1 searches once."),
            }
        )
        self.epsilon, self.norm, self.steps, self.restarts = float(epsilon), norm, int(steps), int(restarts)
        self.loss, self.image_processor, self.keep, self.seed = loss, image_processor, keep, seed
        self.generator = torch.Generator().manual_seed(seed)
        self._units: dict[int, PixelUnits] = {}

    def __repr__(self) -> str:
        names = [name for name in inspect.signature(type(self)).parameters if name != "image_processor"]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    @property
    def is_off(self) -> bool:
        """Whether the attack leaves every image as it is (`epsilon` or `steps` 0)."""
        return self.epsilon == 0 or self.steps == 0

    def units(self, channels: int) -> PixelUnits:
        """
        Units of `pixel_values`, by the image processor.

        Args:
            channels: number of channels.

        Raises:
            ValueError: the processor's mean and std do not match the channels.
        """
        if channels not in self._units:
            self._units[channels] = PixelUnits(self.image_processor, channels=channels)
        return self._units[channels]

    def ball(self, pixel_values: torch.Tensor) -> PixelBall:
        """
        The allowed perturbations of some images, which are checked.

        Args:
            pixel_values: `[batch, ..., channels, height, width]` float.

        Raises:
            ValueError: see [`~hf_robust.sites.PixelUnits.check`].
        """
        images = isinstance(pixel_values, torch.Tensor) and pixel_values.dim() > 3
        units = self.units(pixel_values.shape[-3] if images else 3)
        units.check(pixel_values, self.epsilon, self.norm)
        return PixelBall.around(pixel_values, units, self.epsilon, self.norm)

    def perturb(
        self,
        model: Any,
        *,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        objective: Objective | None = None,
        generators: Sequence[torch.Generator] | None = None,
        **inputs: Any,
    ) -> torch.Tensor:
        """
        Find a perturbation of each image.

        Args:
            model: image classifier of transformers, a PEFT model around one, or any callable that takes images and returns
                logits or an object with `.logits`; not wrapped for several processes. Its mode, gradients, hooks,
                statistics and the global random state are the same afterwards; dropout is off and batch normalisation uses
                its running statistics meanwhile.
            pixel_values: `[batch, ..., channels, height, width]` float: raw pixels in [0, 1], or what the image processor
                made of them. A module sees them in the dtype of its weights.
            labels: `[batch]` int64, the true classes. Required without `objective`.
            objective: takes δ (float32, in the shape and units of `pixel_values`) and returns each row's loss `[batch]`, to
                be minimised, and which rows reached their goal (`[batch]` bool) or `None`; it takes the place of `loss`.
            generators: one for each row, of its random starts. Default: see the class.
            inputs: further inputs of the model.

        Returns:
            δ in the shape and units of `pixel_values`, float32 without gradient. `pixel_values + δ` is in the box.

        Raises:
            ValueError: pixels are NaN or outside the raw range, labels are missing or no class of the model, there are too
                few classes for `loss`, the image processor does not match the channels, or the model checkpoints activations
                in the reentrant way.
        """
        return self.search(
            model, pixel_values=pixel_values, labels=labels, objective=objective, generators=generators, **inputs
        ).delta

    def search(
        self,
        model: Any,
        *,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        objective: Objective | None = None,
        generators: Sequence[torch.Generator] | None = None,
        **inputs: Any,
    ) -> SearchResult:
        """
        As [`perturb`], but returns losses and costs too ([`~hf_robust.attacks.SearchResult`]).

        With `keep="best"` and `labels`, `hit` says which rows were misclassified. The clean images are looked at first; a row
        misclassified there has δ = 0. A row takes no part in what follows its hit, so that `losses` holds NaN for it there.
        """
        ball = self.ball(pixel_values)
        if objective is None and labels is None:
            raise ValueError("`labels=None`: give the true classes `[batch]`, or an `objective`.")
        if generators is not None and len(generators) != len(pixel_values):
            raise ValueError(
                f"`generators` has {len(generators)} entries for {len(pixel_values)} images: give one for each row."
            )
        if generators is None and self.random_start and self.fixed_starts and not self.is_off:
            generators = pixel_generators(self.seed, pixel_values)
        if isinstance(model, nn.Module):
            check_not_reentrant(model)
        with quiet(model) if isinstance(model, nn.Module) else contextlib.nullcontext():
            if objective is not None:
                return self._search_objective(ball, objective, generators)
            assert labels is not None
            return self._search_classes(model, ball, pixel_values, labels, generators, inputs)

    def _search_objective(
        self, ball: PixelBall, objective: Objective, generators: Sequence[torch.Generator] | None
    ) -> SearchResult:
        merged = Merged(ball.raw)
        everyone = torch.arange(len(ball.raw), device=ball.raw.device)

        def loss_fn(delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            return objective(ball.to_model(delta))

        for _ in range(0 if self.is_off else self.restarts):
            merged.add(self._run(ball, loss_fn, generators), everyone)
        return merged.result(ball)

    def _search_classes(
        self,
        model: Any,
        ball: PixelBall,
        pixel_values: torch.Tensor,
        labels: torch.Tensor,
        generators: Sequence[torch.Generator] | None,
        inputs: dict[str, Any],
    ) -> SearchResult:
        best = self.keep == "best"
        merged = Merged(ball.raw)
        pixels = pixel_values.detach().float()
        rows = torch.arange(len(pixels), device=pixels.device)
        labels = class_numbers(labels, pixels)
        dtype, checked = input_dtype(model, pixel_values), False

        def logits_at(shifted: torch.Tensor) -> torch.Tensor:
            nonlocal checked
            logits = logits_of(model, shifted.to(dtype), **inputs)
            if not checked:
                checked = True
                check_labels(labels, logits, self.loss)
            return logits

        others: torch.Tensor | None = None
        if best:
            with torch.no_grad():
                logits = logits_at(pixels)
                others = best_other_classes(logits, labels, NUM_TARGETS)
                clean_loss = attack_loss(logits, labels, "ce" if self.loss == "ce" else "dlr")
                merged.add_clean(clean_loss, logits.argmax(dim=1) != labels)
        if self.is_off:
            return merged.result(ball)

        for _ in range(self.restarts):
            for target in range(others.shape[1] if others is not None and self.loss == "targeted_dlr" else 1):
                if best and not inputs:
                    # Rows already misclassified leave; further inputs of the model cannot be told to be one for each row
                    rows = (~merged.hit).nonzero().flatten()
                    if not len(rows):
                        return merged.result(ball)
                aims = others[rows, target] if others is not None else None
                some = ball.rows(rows)
                loss_fn = self._classes_loss(logits_at, some, pixels[rows], labels[rows], aims)
                own = None if generators is None else [generators[row] for row in rows.tolist()]
                merged.add(self._run(some, loss_fn, own), rows)
        return merged.result(ball)

    def _classes_loss(
        self,
        logits_at: Callable[[torch.Tensor], torch.Tensor],
        ball: PixelBall,
        pixels: torch.Tensor,
        labels: torch.Tensor,
        targets: torch.Tensor | None,
    ) -> Objective:
        def loss_fn(delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            logits = logits_at(pixels + ball.to_model(delta))
            wrong = logits.detach().argmax(dim=1) != labels if self.keep == "best" else None
            return attack_loss(logits, labels, self.loss, targets), wrong

        return loss_fn

    def _run(self, ball: PixelBall, loss_fn: Objective, generators: Sequence[torch.Generator] | None) -> SearchResult:
        start = self._start(ball, generators)
        return descend(loss_fn, start, self._stepper(ball), steps=self.steps, keep=self.keep)

    def _random(self, ball: PixelBall, generators: Sequence[torch.Generator] | None) -> torch.Tensor:
        """Uniform in the ball, in raw pixels; not yet in the box."""

        def draw(rows: int, generator: torch.Generator) -> torch.Tensor:
            shape = (rows, *ball.raw.shape[1:])
            return initial(shape, self.epsilon, self.norm, "random", device=ball.raw.device, generator=generator)

        if generators is None:
            return draw(len(ball.raw), self.generator)
        return torch.cat([draw(1, generator) for generator in generators])

    def _start(self, ball: PixelBall, generators: Sequence[torch.Generator] | None) -> torch.Tensor:
        raise NotImplementedError

    def _stepper(self, ball: PixelBall) -> Advance:
        raise NotImplementedError
