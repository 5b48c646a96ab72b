"""Attacks on pixels as an evaluation runs them: a search without gradients, variants of an attack, names."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_robust.attacks.gradient import SearchResult
from hf_robust.attacks.vision import APGD, PGD
from hf_robust.attacks.vision.classifier import check_labels, class_numbers, logits_of
from hf_robust.report.evaluation_plan import settings_of
from hf_robust.sites import PixelUnits, quiet
from hf_robust.sites.pixels import check_epsilon, normalisation
from hf_robust.threats import check_at_least, check_choice, unit

# Radii within which every image of [0, 1] lies, by norm, for an image of n values
_WHOLE_BOX: dict[str, Callable[[int], float]] = {
    "linf": lambda n: 1.0,
    "l2": lambda n: float(n) ** 0.5,
    "l1": lambda n: float(n),
}
_DRAWS = 50

# What is known to break image models and is not in this library
NOT_IN_LIBRARY = ("adaptive attacks", "patches and physical attacks", "spatial transformations", "common corruptions")


class RandomNoise:
    """
    Random points at the edge of the ball, the first that fools the model or else the one nearest to it: what an attack with
    gradients has to beat. A black-box attack: it sees losses only.

    Args:
        epsilon: radius in raw [0, 1] pixels.
        norm: `"linf"` (each value ± ε), `"l2"` or `"l1"` (a random direction of that length).
        samples: points tried for an image.
        image_processor: of `pixel_values` that are normalised. Default: they are raw pixels.
        seed: of the points.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self, *, epsilon: float, norm: str = "linf", samples: int = 100, image_processor: Any = None, seed: int = 0
    ):
        check_choice("norm", norm, list(_WHOLE_BOX))
        check_epsilon(epsilon, norm)
        check_at_least("samples", samples, 1, "100 is the default.")
        self.epsilon, self.norm, self.samples, self.seed = epsilon, norm, samples, seed
        self.image_processor = image_processor

    def perturb(self, model: Any, *, pixel_values: torch.Tensor, labels: Any = None, **inputs: Any) -> torch.Tensor:
        """δ in the shape of `pixel_values`, float32: see [`search`]."""
        return self.search(model, pixel_values=pixel_values, labels=labels, **inputs).delta

    @torch.no_grad()
    def search(
        self,
        model: Any,
        *,
        pixel_values: torch.Tensor,
        labels: Any = None,
        objective: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]] | None = None,
        **inputs: Any,
    ) -> SearchResult:
        """
        Try the points.

        Args:
            model: classifier, or any callable that takes `pixel_values`.
            pixel_values: `[batch, channels, height, width]`.
            labels: `[batch]`, of a classifier.
            objective: takes δ and returns each row's loss, to be minimised, and whether it is fooled (or `None`); instead of
                the margin of the true class.
            inputs: further inputs of the model.

        Raises:
            ValueError: as [`~hf_robust.attacks.PGD.perturb`], of pixels and labels.
        """
        units = checked_units(self, pixel_values)
        if objective is None:
            labels = class_numbers(labels, pixel_values)
        clean, raw = pixel_values.float(), units.to_raw(pixel_values.float())
        generator = torch.Generator().manual_seed(self.seed)
        batch = len(clean)
        best = torch.zeros_like(clean)
        best_loss = clean.new_full((batch,), torch.inf)
        hit = torch.zeros(batch, dtype=torch.bool, device=clean.device)
        non_finite, evaluations = hit.clone(), torch.zeros(batch, dtype=torch.long, device=clean.device)
        losses = []
        reached: torch.Tensor | None
        for _ in range(self.samples):
            noise = torch.randn(clean.shape, generator=generator).to(clean.device)
            noise = noise.sign() if self.norm == "linf" else unit(noise, self.norm)
            delta = units.from_raw((raw + self.epsilon * noise).clamp(0, 1)) - clean
            if objective is None:
                loss, reached = margins(model, pixel_values, delta, labels, **inputs)
            else:
                loss, reached = objective(delta)
                loss = loss.float()
            evaluations += (~hit).long()
            finite = loss.isfinite()
            non_finite |= ~finite
            newly = torch.zeros_like(hit) if reached is None else reached & finite & ~hit
            better = ((loss < best_loss) & finite & ~hit) | newly
            best = torch.where(better.view(-1, *[1] * (clean.dim() - 1)), delta, best)
            best_loss = torch.where(better, loss, best_loss)
            hit |= newly
            losses.append(best_loss.clone())
            if bool(hit.all()):
                break
        history = torch.stack(losses)
        return SearchResult(
            best, history[0], best_loss, history, non_finite, hit, len(losses), 0, evaluations, exhausted=False
        )


def checked_units(attack: Any, pixel_values: torch.Tensor) -> PixelUnits:
    """
    Units of the images that an attack is given, which are checked.

    Args:
        attack: with `epsilon`, `norm` and `image_processor`.
        pixel_values: `[batch, channels, height, width]` float.

    Raises:
        ValueError: see [`~hf_robust.sites.PixelUnits.check`].
    """
    images = isinstance(pixel_values, torch.Tensor) and pixel_values.dim() > 3
    units = PixelUnits(attack.image_processor, channels=pixel_values.shape[-3] if images else 3)
    units.check(pixel_values, attack.epsilon, attack.norm)
    return units


def margins(
    model: Any, pixel_values: torch.Tensor, delta: torch.Tensor, labels: torch.Tensor, **inputs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Logit of the true class minus the highest other, and whether another class wins.

    Args:
        model: classifier.
        pixel_values: `[batch, channels, height, width]`.
        delta: perturbation of that shape.
        labels: `[batch]`.
        inputs: further inputs of the model.

    Returns:
        `[batch]` float32 and `[batch]` bool.

    Raises:
        ValueError: a label is no class of the model.
    """
    logits = logits_of(model, pixel_values.float() + delta, **inputs)
    check_labels(labels, logits, "ce")
    own = logits.gather(1, labels[:, None]).squeeze(1)
    other = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    return own - other, logits.argmax(dim=1) != labels


# Variants of an attack ------------------------------------------------------------------------------------------------


def vary(attack: Any, **changes: Any) -> Any:
    """
    An attack of the same class with some settings changed.

    Args:
        attack: whose constructor's arguments are public attributes of the same names.
        changes: settings by name.

    Raises:
        ValueError: the attack has no such setting, or does not take the value.
    """
    known = inspect.signature(type(attack)).parameters
    for name in changes:
        if name not in known:
            raise ValueError(f"`{name}` is no setting of {type(attack).__name__}; it has {list(known)}.")
    given = {name: getattr(attack, name) for name in known if hasattr(attack, name)}
    return type(attack)(**{**given, **changes})


def epsilon_curve(name: str, attack: Any, epsilons: Sequence[float]) -> dict[str, Any]:
    """
    One attack at several radii, for `attacks` of an evaluation, which draws a curve of them.

    Args:
        name: of the attack; each radius is added to it.
        attack: with a setting `epsilon`.
        epsilons: radii in raw [0, 1] pixels.
    """
    return {f"{name} {radius_text(epsilon)}": vary(attack, epsilon=epsilon) for epsilon in epsilons}


def radius_text(epsilon: float) -> str:
    """A radius as people write it: a short decimal, or 255ths where it is a whole or half number of them."""
    steps = epsilon * 255
    if round(epsilon, 3) != epsilon and abs(steps * 2 - round(steps * 2)) < 1e-6:
        return f"{steps:.4g}/255"
    return f"{epsilon:.4g}"


def sanity_variants(attack: Any, size: int) -> dict[str, tuple[str, Any]]:
    """
    Runs that a sound attack must compare well with: with one step, half the steps, half the radius, a radius that reaches
    every image, and random noise of the same radius.

    Args:
        attack: an attack with gradients.
        size: values in an image.

    Returns:
        By role, a name that describes it and the attack. Roles that the attack has no setting for are missing; none at all
        where the attack has no `epsilon`.
    """
    known = inspect.signature(type(attack)).parameters
    epsilon, norm = getattr(attack, "epsilon", None), getattr(attack, "norm", None)
    if epsilon is None or norm not in _WHOLE_BOX or isinstance(attack, RandomNoise):
        return {}
    steps = getattr(attack, "steps", None)
    free = {"step_size": None} if "step_size" in known else {}
    wanted: dict[str, tuple[str, dict[str, Any]]] = {
        "half_epsilon": (f"with ε {radius_text(epsilon / 2)}", {"epsilon": epsilon / 2, **free}),
        "whole_box": ("with any ε", {"epsilon": _WHOLE_BOX[norm](size), **free}),
    }
    if isinstance(steps, int) and "steps" in known:
        wanted["one_step"] = ("with one step", {"steps": 1, **free})
        if steps >= 4:
            wanted["half_steps"] = (f"with {steps // 2} steps", {"steps": steps // 2})
    found: dict[str, tuple[str, Any]] = {}
    for role, (text, changes) in wanted.items():
        try:
            found[role] = (text, vary(attack, **changes))
        except ValueError:  # such as one step of an attack that needs several
            continue
    processor = getattr(attack, "image_processor", None)
    found["black_box"] = (
        f"{_DRAWS} random points at its ε",
        RandomNoise(epsilon=epsilon, norm=norm, samples=_DRAWS, image_processor=processor),
    )
    return found


# Names ----------------------------------------------------------------------------------------------------------------


def vision_attacks() -> dict[str, type]:
    """Attacks on pixels by their names on the command line and in reports."""
    from hf_robust.report.vision_autoattack import PyAutoAttack

    return {"pgd": PGD, "apgd": APGD, "autoattack": PyAutoAttack, "random_noise": RandomNoise}


def vision_settings_of(attack: Any) -> dict[str, Any]:
    """
    Settings of an attack as JSON values, with its `attack` name, as [`~hf_robust.report.evaluation_plan.settings_of`] gives
    them, and `space`, the unit of ε. An image processor is told by its mean and std.

    Args:
        attack: any attack on pixels.
    """
    found = settings_of(attack)
    names = {cls: name for name, cls in vision_attacks().items()}
    if type(attack) in names:
        found = {"class": found.pop("class"), "attack": names[type(attack)], **found}
    processor = getattr(attack, "image_processor", None)
    found["image_processor"] = describe_processor(processor)
    return {**found, "space": "raw pixels in [0, 1]"}


def describe_processor(processor: Any) -> dict[str, Any] | None:
    """
    What of an image processor decides on ε and on what a model sees.

    Args:
        processor: image processor, a processor that holds one, or `None`.
    """
    if processor is None:
        return None
    inner = getattr(processor, "image_processor", processor)
    names = (
        "image_mean",
        "image_std",
        "do_normalize",
        "do_rescale",
        "rescale_factor",
        "do_resize",
        "size",
        "crop_size",
    )
    values = {name: getattr(inner, name, None) for name in names}
    scale = normalisation(inner)
    if scale is not None:  # under one name, wherever the processor has them
        values |= dict(zip(("image_mean", "image_std"), scale.values(), strict=True))
    plain = {name: _plain(value) for name, value in values.items() if value is not None}
    return {"processor": type(inner).__name__, **plain}


def _plain(value: Any) -> Any:
    """A setting of an image processor as a JSON value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # sizes
        return {name: item for name, item in dataclasses.asdict(value).items() if item is not None}
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple | list) else value


def run_attack(attack: Any, model: Any, pixel_values: torch.Tensor, **inputs: Any) -> SearchResult:
    """
    Run an attack, and what it spent where it tells.

    Args:
        attack: object with `search`, or with `perturb` alone (an attack of another library behind an adapter).
        model: what it attacks, silenced meanwhile.
        pixel_values: `[batch, channels, height, width]`.
        inputs: `labels` or `objective`, and further inputs of the model.
    """

    def call() -> SearchResult:
        if callable(getattr(attack, "search", None)):
            return attack.search(model, pixel_values=pixel_values, **inputs)
        delta = torch.as_tensor(attack.perturb(model, pixel_values=pixel_values, **inputs)).detach().float()
        batch = len(pixel_values)
        none = torch.zeros(batch, dtype=torch.bool, device=delta.device)
        empty = delta.new_zeros(0, batch)
        nan = delta.new_full((batch,), torch.nan)
        return SearchResult(delta, nan, nan, empty, none, none, 0, 0, none.long())

    if not isinstance(model, nn.Module):
        return call()
    with quiet(model):
        return call()
