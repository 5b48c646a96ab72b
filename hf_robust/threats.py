"""Threat models: norm, radius, projection and initialisation of a perturbation. Pure tensor maths, no model."""

import difflib
import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch

# l2_token: one L2 ball per token vector; l2: one per sample; linf: a box.
NORMS = ("l2_token", "l2", "linf")
# Those of images; l1: one L1 ball per sample.
PIXEL_NORMS = ("linf", "l2", "l1")
INITS = ("zero", "random")


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    """
    Raise a `ValueError` that names the argument, the value, the choices and the nearest one.

    Args:
        argument: name of the argument as the user wrote it.
        value: what the user gave.
        choices: the accepted names.
    """
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"`{argument}={value!r}` is unknown; choose one of {', '.join(map(repr, choices))}.{hint}")


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number that float32 (or int64) has room for; NaN is not."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    largest = 2**63 - 1 if isinstance(value, numbers.Integral) else torch.finfo(torch.float32).max
    return is_real and bool(abs(value) <= largest)


def check_number(argument: str, value: object, remedy: str) -> None:
    """
    Raise a `ValueError` unless `value` is a finite number (of float32, whose largest is 3.4e38).

    Args:
        argument: name of the argument as the user wrote it.
        value: what the user gave.
        remedy: one sentence that says what to do instead.
    """
    if not _is_number(value):
        raise ValueError(f"`{argument}={value!r}` must be a finite number. {remedy}")


def check_at_least(argument: str, value: float | int, minimum: float | int, remedy: str) -> None:
    """
    Raise a `ValueError` unless `value` is a finite number (of float32, whose largest is 3.4e38) that is at least `minimum`.

    Args:
        argument: name of the argument as the user wrote it.
        value: what the user gave.
        minimum: smallest accepted value.
        remedy: one sentence that says what to do instead.
    """
    if not _is_number(value) or value < minimum:
        raise ValueError(f"`{argument}={value!r}` must be a number that is at least {minimum}. {remedy}")


def check_count(argument: str, value: object, minimum: int, remedy: str) -> None:
    """
    Raise a `ValueError` unless `value` is a whole number (1.0 is none) that is at least `minimum`.

    Args:
        argument: name of the argument as the user wrote it.
        value: what the user gave.
        minimum: smallest accepted value.
        remedy: one sentence that says what to do instead.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < minimum:
        raise ValueError(f"`{argument}={value!r}` must be a whole number that is at least {minimum}. {remedy}")


def _norms(delta: torch.Tensor, norm: str) -> torch.Tensor:
    """Norm of each vector (`l2_token`) or sample (`l2`, `l1`, `linf`) of `delta`, kept broadcastable."""
    if norm == "l2_token":
        return delta.norm(dim=-1, keepdim=True)
    dims = tuple(range(1, delta.dim()))
    if norm == "l2":
        return delta.pow(2).sum(dim=dims, keepdim=True).sqrt()
    if norm == "l1":
        return delta.abs().sum(dim=dims, keepdim=True)
    return delta.abs().amax(dim=dims, keepdim=True)


def _on_device(number: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """A number as a tensor of the dtype and on the device of another. Filled in there: copying it there would be waited for."""
    if isinstance(number, torch.Tensor):
        return number.to(like)
    return torch.full((), number, dtype=like.dtype, device=like.device)


def project(delta: torch.Tensor, radius: torch.Tensor | float, norm: str) -> torch.Tensor:
    """
    Nearest point of the ball of the given radius.

    Args:
        delta: perturbation `[batch, ..., features]`.
        radius: radius in the units of `delta`; a float or a tensor that broadcasts. `inf` means unbounded.
        norm: `"l2_token"` (an L2 ball for each vector along the last dimension), `"l2"` (one L2 ball per sample), `"l1"`
            (one L1 ball per sample; `radius` one number, or one for each sample) or `"linf"` (each coordinate).

    Returns:
        Tensor of the shape of `delta`.
    """
    radius = _on_device(radius, delta)
    if norm == "linf":
        return torch.maximum(torch.minimum(delta, radius), -radius)
    if norm == "l1":
        return _project_l1(delta, radius, None)
    norms = _norms(delta, norm)
    # clamp(min=tiny) instead of an epsilon: a vector inside the ball is returned as it is, bit for bit
    scale = radius / norms.clamp(min=torch.finfo(delta.dtype).tiny)
    return torch.where(norms > radius, delta * scale, delta)


def project_box(
    delta: torch.Tensor, radius: torch.Tensor | float, norm: str, low: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """
    A point of the ball that lies in a box too.

    The nearest one for `"linf"` and `"l1"` (Croce & Hein, arXiv 2103.01208). For `"l2"` the nearest point of the ball, clipped
    to the box, which never leaves the ball because the box holds 0.

    Args:
        delta: perturbation `[batch, ..., features]`.
        radius: see [`project`].
        norm: see [`project`].
        low: lower end of the box, at most 0, in the shape of `delta`.
        high: upper end of the box, at least 0, in the shape of `delta`.

    Returns:
        Tensor of the shape of `delta`.
    """
    if norm == "l1":
        return _project_l1(delta, _on_device(radius, delta), torch.where(delta < 0, -low, high))
    return torch.maximum(torch.minimum(project(delta, radius, norm), high), low)


def _project_l1(delta: torch.Tensor, radius: torch.Tensor, room: torch.Tensor | None) -> torch.Tensor:
    """
    Nearest point of the L1 ball whose entries are at most `room` in magnitude (`None`: no bound).

    Its entries are `min(max(|delta| - t, 0), room)` with the t that makes them sum to the radius. The sum falls linearly in t
    between the values where an entry leaves its bound or reaches 0, so that sorting these finds t exactly.
    """
    # In float64, or the rounding of large entries would show in small radii
    size = delta.flatten(1).abs().double()
    room = torch.full_like(size, math.inf) if room is None else room.flatten(1).double()
    bounded = torch.minimum(size, room)
    radius = radius.reshape(-1, 1).double()
    total = bounded.sum(dim=1, keepdim=True)
    knots, order = torch.cat([(size - room).clamp(min=0), size], dim=1).sort(dim=1)
    # How many entries shrink behind each knot, and what is left of the sum at it
    shrinking = torch.where(order < size.shape[1], 1, -1).cumsum(dim=1)
    gaps = knots.diff(dim=1, prepend=torch.zeros_like(total))
    before = torch.nn.functional.pad(shrinking[:, :-1], (1, 0))
    left = total - (gaps * before).cumsum(dim=1)
    last = ((left >= radius).sum(dim=1, keepdim=True) - 1).clamp(min=0)
    rest = (left.gather(1, last) - radius) / shrinking.gather(1, last).clamp(min=1)
    threshold = knots.gather(1, last) + rest
    shrunk = torch.minimum((size - threshold).clamp(min=0), room)
    return delta.sign() * torch.where(total > radius, shrunk, bounded).to(delta.dtype).view_as(delta)


def project_simplex(values: torch.Tensor) -> torch.Tensor:
    """
    Nearest point (in L2) of the probability simplex: entries at least 0 that sum to 1.

    The exact solution by sorting: entries above a threshold are lowered by it, the others become 0, and the threshold is
    the one that makes the sum 1.

    Args:
        values: `[..., size]`; each vector along the last dimension is projected by itself.

    Returns:
        Tensor of the shape of `values`.
    """
    ordered = values.sort(dim=-1, descending=True).values
    excess = ordered.cumsum(dim=-1) - 1
    count = torch.arange(1, values.shape[-1] + 1, device=values.device, dtype=values.dtype)
    # The entries that stay positive are a prefix of the order: the largest k with ordered[k] > excess[k] / k
    kept = (ordered * count > excess).sum(dim=-1, keepdim=True).clamp(min=1)
    threshold = excess.gather(-1, kept - 1) / kept
    return (values - threshold).clamp(min=0)


def unit(direction: torch.Tensor, norm: str) -> torch.Tensor:
    """
    Rescale a direction to length 1 in the given norm (zero stays zero), so that a step size can be a share of the radius.

    Args:
        direction: `[batch, ..., features]`.
        norm: see [`project`].
    """
    norms = _norms(direction, norm)
    return torch.where(norms > 0, direction / norms.clamp(min=torch.finfo(direction.dtype).tiny), direction)


def sparse_sign(direction: torch.Tensor, share: torch.Tensor | float) -> torch.Tensor:
    """
    The steepest direction in an L1 ball, spread over several coordinates: the signs of the largest ones, with L1 length 1.

    One coordinate alone would be steepest; more of them make progress when they are bounded (Tramèr & Boneh, arXiv 1904.13000).

    Args:
        direction: `[batch, ..., features]`.
        share: share of each sample's coordinates that is kept, at least one; a float or `[batch]`.

    Returns:
        Tensor of the shape of `direction`; zero where all of a sample is zero.
    """
    size = direction.flatten(1).abs()
    count = size.shape[1]
    kept = (_on_device(share, size) * count).long().clamp(1, count).reshape(-1, 1)
    smallest = size.sort(dim=1, descending=True).values.gather(1, (kept - 1).expand(size.shape[0], 1))
    signs = torch.where(size >= smallest, direction.flatten(1).sign(), 0.0)
    return (signs / signs.abs().sum(dim=1, keepdim=True).clamp(min=1)).view_as(direction)


def initial(
    shape: Sequence[int],
    radius: torch.Tensor | float,
    norm: str,
    init: str,
    *,
    device: torch.device | str,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    Starting perturbation in float32.

    Args:
        shape: `[batch, ..., features]`.
        radius: radius of the ball, in the units of the perturbation.
        norm: see [`project`].
        init: `"zero"`, or `"random"`: uniform in the ball.
        device: device of the result.
        generator: a CPU generator of the caller's own; the global random state is never used.

    Returns:
        `shape`, float32.
    """
    if init == "zero":
        return torch.zeros(tuple(shape), device=device)
    if generator is None:
        raise ValueError("`init='random'` needs a `generator`, so that the global random state stays untouched.")
    shape = tuple(shape)
    if norm == "linf":
        noise = torch.rand(shape, generator=generator) * 2 - 1
    else:
        # Uniform in an n-ball: a Gaussian (for L1: Laplace) direction times U^(1/n)
        size = shape[-1] if norm == "l2_token" else math.prod(shape[1:])
        outer = shape[:-1] + (1,) if norm == "l2_token" else (shape[0],) + (1,) * (len(shape) - 1)
        if norm == "l1":
            noise = torch.empty(shape).exponential_(generator=generator)
            noise = noise * (torch.randint(0, 2, shape, generator=generator) * 2 - 1)
        else:
            noise = torch.randn(shape, generator=generator)
        noise = unit(noise, norm)
        noise = noise * torch.rand(outer, generator=generator) ** (1.0 / size)
    return noise.to(device) * torch.as_tensor(radius, dtype=torch.float32, device=device)
