"""The allowed perturbations of some images, random points for them, and the best of several searches."""

import hashlib
import math
from dataclasses import dataclass

import torch

from hf_robust.attacks.gradient import SearchResult
from hf_robust.sites.pixels import PixelUnits
from hf_robust.threats import project_box


@dataclass
class PixelBall:
    """
    The set of allowed perturbations of some images, in raw pixels.

    Attributes:
        raw: `[batch, ..., channels, height, width]` float32, the images in raw pixels.
        low: lower end of the box of δ, at most 0.
        high: upper end, at least 0.
        gain: `[channels, 1, 1]`, what one raw pixel is in `pixel_values`; `None` where they are raw.
        epsilon: radius.
        norm: of the ball.
    """

    raw: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    gain: torch.Tensor | None
    epsilon: float
    norm: str

    @classmethod
    def around(cls, pixel_values: torch.Tensor, units: PixelUnits, epsilon: float, norm: str) -> "PixelBall":
        """The ball around images `[batch, ..., channels, height, width]` in the model's units."""
        raw = units.to_raw(pixel_values.detach().float())
        # Rounding may leave a pixel just outside of [0, 1]: it need not come back, so that 0 stays allowed
        low, high = (-raw).clamp(max=0.0), (1 - raw).clamp(min=0.0)
        gain = None if units.is_raw else units.radius(1.0).to(raw.device)
        return cls(raw, low, high, gain, epsilon, norm)

    def project(self, delta: torch.Tensor) -> torch.Tensor:
        """An allowed δ near the given one, in raw pixels: see [`~hf_robust.threats.project_box`]."""
        return project_box(delta, self.epsilon, self.norm, self.low, self.high)

    def to_model(self, delta: torch.Tensor) -> torch.Tensor:
        """δ of raw pixels in the units of `pixel_values`."""
        return delta if self.gain is None else delta * self.gain

    def to_pixels(self, delta: torch.Tensor) -> torch.Tensor:
        """δ of `pixel_values` in raw pixels."""
        return delta if self.gain is None else delta / self.gain

    def rows(self, index: torch.Tensor) -> "PixelBall":
        """
        The ball around some of the images.

        Args:
            index: `[kept]` int64.
        """
        return PixelBall(self.raw[index], self.low[index], self.high[index], self.gain, self.epsilon, self.norm)


class Merged:
    """The best of several searches, for each row; rows leave at their first hit."""

    def __init__(self, like: torch.Tensor):
        batch = len(like)
        self.delta = torch.zeros_like(like)
        self.last_loss = like.new_full((batch,), math.nan)
        self.searched = torch.zeros(batch, dtype=torch.bool, device=like.device)
        self.hit, self.non_finite = self.searched.clone(), self.searched.clone()
        self.evaluations = self.searched.long()
        self.losses: list[torch.Tensor] = []
        self.forwards = self.backwards = 0

    def add_clean(self, loss: torch.Tensor, wrong: torch.Tensor) -> None:
        """The clean images' own evaluation."""
        self.last_loss = loss.clone()  # changed in place later, the history is not
        self.non_finite = ~loss.isfinite()
        self.hit = wrong & ~self.non_finite
        self.losses.append(loss[None])
        self.evaluations, self.forwards = self.evaluations + 1, self.forwards + 1

    def add(self, found: SearchResult, rows: torch.Tensor) -> None:
        """What a search of some rows found."""
        going = ~self.hit[rows]
        better = going & (found.hit | ~self.searched[rows] | (found.last_loss < self.last_loss[rows]))
        shape = (-1, *[1] * (self.delta.dim() - 1))
        self.delta[rows] = torch.where(better.view(shape), found.delta, self.delta[rows])
        self.last_loss[rows] = torch.where(better, found.last_loss, self.last_loss[rows])
        history = self.last_loss.new_full((len(found.losses), len(self.delta)), math.nan)
        history[:, rows] = torch.where(going, found.losses, math.nan)
        self.losses.append(history)
        self.evaluations[rows] += found.evaluations * going
        self.non_finite[rows] |= found.non_finite & going
        self.hit[rows] |= found.hit
        self.searched[rows] = True
        self.forwards += found.num_forwards
        self.backwards += found.num_backwards

    def result(self, ball: PixelBall) -> SearchResult:
        """All together, δ in the model's units."""
        losses = torch.cat(self.losses) if self.losses else self.last_loss.new_zeros(0, len(self.delta))
        first = losses[0] if len(losses) else self.last_loss
        return SearchResult(
            ball.to_model(self.delta), first, self.last_loss, losses, self.non_finite, self.hit, self.forwards,
            self.backwards, self.evaluations,
        )  # fmt: skip


def pixel_generators(seed: int, pixel_values: torch.Tensor) -> list[torch.Generator]:
    """
    One random generator for each image, which depends on nothing but the seed and the image: neither on its place in the
    batch nor on its companions. The same image twice gets the same.

    Args:
        seed: the attack's seed.
        pixel_values: `[batch, ...]` float.
    """
    found = []
    for row in pixel_values.detach().float().cpu().contiguous():
        digest = hashlib.blake2b(row.numpy().tobytes(), digest_size=8, key=str(seed).encode()).digest()
        found.append(torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1))
    return found
