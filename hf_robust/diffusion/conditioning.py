"""What a UNet is told about the prompts of a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Conditioning:
    """
    Encoded prompts, one row each.

    Attributes:
        hidden: `[B, L, C]` states of the text encoder(s); of SDXL's two, side by side along C.
        pooled: `[B, P]` pooled state of SDXL's second text encoder, `None` for other pipelines.
        time_ids: `[B, 6]` SDXL's original size, crop corner and target size in pixels, `None` for other pipelines.
    """

    hidden: torch.Tensor
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Conditioning":
        """The conditioning with `function` applied to each of its tensors."""
        return Conditioning(
            function(self.hidden),
            None if self.pooled is None else function(self.pooled),
            None if self.time_ids is None else function(self.time_ids),
        )

    def select(self, index: torch.Tensor | slice | Sequence[int]) -> "Conditioning":
        """
        Some of the rows.

        Args:
            index: row numbers (a tensor or a sequence), a boolean mask `[B]`, or a slice.
        """
        rows = torch.as_tensor(index) if isinstance(index, Sequence) else index
        return self.map(lambda t: t[rows.to(t.device)] if isinstance(rows, torch.Tensor) else t[rows])

    def repeat(self, n: int) -> "Conditioning":
        """All rows, then all again, `n` times in all: `[n * B, …]`."""
        return self.map(lambda t: t.repeat(n, *(1,) * (t.dim() - 1)))

    def detach(self) -> "Conditioning":
        """The same values, cut off from the graph."""
        return self.map(torch.Tensor.detach)

    def to(self, device: torch.device | str) -> "Conditioning":
        """The same values on another device."""
        return self.map(lambda t: t.to(device))

    @classmethod
    def cat(cls, parts: Sequence["Conditioning"]) -> "Conditioning":
        """
        The rows of several conditionings, one after the other.

        Raises:
            ValueError: none is given, or only some of them have pooled states or time ids.
        """
        pooled = [p.pooled for p in parts if p.pooled is not None]
        time_ids = [p.time_ids for p in parts if p.time_ids is not None]
        if not parts or any(len(column) not in (0, len(parts)) for column in (pooled, time_ids)):
            raise ValueError(
                "`parts` must hold one conditioning at least, all of the same kind of pipeline: with pooled states and time "
                "ids (SDXL) or without."
            )
        return cls(
            torch.cat([p.hidden for p in parts]),
            torch.cat(pooled) if pooled else None,
            torch.cat(time_ids) if time_ids else None,
        )
