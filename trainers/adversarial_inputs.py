"""What a classifier's perturbation is added to: pixels, or the embeddings of tokens."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from hf_robust.attacks.vision.ball import PixelBall
from hf_robust.sites import EmbeddingSite, PixelUnits
from hf_robust.threats import PIXEL_NORMS, initial, project, unit


class ImageInputs:
    """
    Images. Perturbations are in raw [0, 1] pixels, so that one ball holds whatever an image processor normalises.

    Args:
        image_processor: what made `pixel_values`; `None`: they are raw.
        channels: of the images.
    """

    norms = PIXEL_NORMS

    def __init__(self, image_processor: Any, channels: int):
        self.image_processor = image_processor
        self.units = PixelUnits(image_processor, channels=channels)
        self._gain = self.units.radius(1.0)

    def check(self, inputs: dict[str, Any], radius: float, norm: str, where: str) -> None:
        """
        Refuse a batch with pixels that are not finite or not in the raw range. Waits for the device once.

        Args:
            inputs: of the model.
            radius: in raw pixels.
            norm: of the ball.
            where: which batch, for the message.
        """
        self.units.check(inputs["pixel_values"], radius, norm, where=where)

    def mask(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Where the perturbation may be non-zero, broadcastable to it: everywhere."""
        return torch.ones((), device=inputs["pixel_values"].device)

    def shape(self, inputs: dict[str, Any]) -> tuple[int, ...]:
        """Shape of the perturbation: that of `pixel_values`."""
        return tuple(inputs["pixel_values"].shape)

    def length(self, model: nn.Module) -> float:
        """What a radius of 1 is: the range of a pixel."""
        return 1.0

    def forget(self) -> None:
        """Nothing: no measure of the model is kept."""

    def random(
        self, inputs: dict[str, Any], seeds: list[int], draw: Callable[[tuple[int, ...], torch.Generator], torch.Tensor]
    ) -> torch.Tensor:
        """
        A random perturbation, each row of which depends on its seed and shape alone.

        Args:
            inputs: of the model.
            seeds: one for each row.
            draw: takes a shape `[1, ...]` and a generator.

        Returns:
            Float32, in the shape of the perturbation.
        """
        pixels = inputs["pixel_values"]
        generator = torch.Generator()
        return torch.cat([draw((1, *pixels.shape[1:]), generator.manual_seed(seed)) for seed in seeds]).to(
            pixels.device
        )

    def projection(
        self, inputs: dict[str, Any], radius: torch.Tensor | float | None, norm: str
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """
        Nearest point of the box of pixels and, with a radius, of the ball.

        Args:
            inputs: of the model.
            radius: in raw pixels; `None`: no ball.
            norm: of the ball.
        """
        radius = math.inf if radius is None else float(radius)
        ball = PixelBall.around(inputs["pixel_values"], self.units, radius, norm)
        if norm != "linf":
            return ball.project
        low, high = ball.low.clamp(min=-radius), ball.high.clamp(max=radius)
        return lambda delta: delta.clamp(low, high)

    def box(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Lower and upper end of each pixel's perturbation, in its shape."""
        ball = PixelBall.around(inputs["pixel_values"], self.units, math.inf, "linf")
        return ball.low, ball.high

    @contextlib.contextmanager
    def perturbed(self, model: nn.Module, inputs: dict[str, Any], delta: torch.Tensor) -> Iterator[dict[str, Any]]:
        """
        The model's inputs with the perturbation.

        Args:
            model: the model, unwrapped.
            inputs: of the model.
            delta: `[B, C, H, W]` float32, raw pixels.
        """
        pixels = inputs["pixel_values"]
        self._gain = self._gain.to(pixels.device)
        moved = pixels + delta * self._gain
        yield {**inputs, "pixel_values": moved.to(pixels.dtype)}


class TextInputs:
    """
    Texts: perturbations of the input embeddings of the attended tokens, `[B, length, hidden]`.

    Args:
        relative: whether radii count in mean L2 norms of the embedding rows.
    """

    norms = (*PIXEL_NORMS, "l2_token")

    def __init__(self, relative: bool, hidden_size: int):
        self.relative, self.hidden_size = relative, hidden_size
        self._measured: tuple[nn.Module, torch.Tensor] | None = None

    def check(self, inputs: dict[str, Any], radius: float, norm: str, where: str) -> None:
        """As for images; token ids have no range of their own."""

    def mask(self, inputs: dict[str, Any]) -> torch.Tensor:
        """1 at attended tokens, `[B, length, 1]`."""
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
        return mask.unsqueeze(-1).float()

    def shape(self, inputs: dict[str, Any]) -> tuple[int, ...]:
        """Shape of the perturbation."""
        return (*inputs["input_ids"].shape, self.hidden_size)

    def length(self, model: nn.Module) -> torch.Tensor | float:
        """What a radius of 1 is, in embedding units; measured once, until [`forget`]."""
        if not self.relative:
            return 1.0
        if self._measured is None or self._measured[0] is not model:
            self._measured = model, EmbeddingSite(model).mean_row_norm()
        return self._measured[1]

    def forget(self) -> None:
        """Measure the embeddings anew when asked next: they have moved."""
        self._measured = None

    def random(
        self, inputs: dict[str, Any], seeds: list[int], draw: Callable[[tuple[int, ...], torch.Generator], torch.Tensor]
    ) -> torch.Tensor:
        """As for images; drawn for a row's own tokens, so that it is the same however long the companions are."""
        attended = self.mask(inputs).squeeze(-1).bool().cpu()
        delta = torch.zeros(self.shape(inputs))
        generator = torch.Generator()
        for row, seed in enumerate(seeds):
            tokens = int(attended[row].sum())
            if tokens:
                delta[row, attended[row]] = draw((1, tokens, self.hidden_size), generator.manual_seed(seed))[0]
        return delta.to(inputs["input_ids"].device)

    def projection(
        self, inputs: dict[str, Any], radius: torch.Tensor | float | None, norm: str
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """As for images; there is no box."""
        return (lambda delta: delta) if radius is None else (lambda delta: project(delta, radius, norm))

    def box(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """None: embeddings have no range."""
        return None

    @contextlib.contextmanager
    def perturbed(self, model: nn.Module, inputs: dict[str, Any], delta: torch.Tensor) -> Iterator[dict[str, Any]]:
        """As for images; by a hook on the embedding module while the context is open."""
        with EmbeddingSite(model).add(delta):
            yield inputs


Inputs = ImageInputs | TextInputs


def uniform(norm: str) -> Callable[[tuple[int, ...], torch.Generator], torch.Tensor]:
    """
    A draw from the unit ball, for [`ImageInputs.random`].

    Args:
        norm: of the ball.
    """
    return lambda shape, generator: initial(shape, 1.0, norm, "random", device="cpu", generator=generator)


def normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """
    A standard normal draw.

    Args:
        shape: of the draw.
        generator: a CPU generator.
    """
    return torch.randn(shape, generator=generator)


def unit_vector(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """
    A random direction of L2 length 1.

    Args:
        shape: `[1, ...]`.
        generator: a CPU generator.
    """
    return unit(normal(shape, generator), "l2")
