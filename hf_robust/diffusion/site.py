"""Token embeddings of a pipeline's text encoders as a perturbation site."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hf_robust.diffusion.loading import base_of
from hf_robust.diffusion.model import DiffusionModel
from hf_robust.sites.embeddings import EmbeddingSite


class TextTokenSite:
    """
    The output of the token embedding module of each text encoder, before the position embeddings are added.

    Perturbations enter by forward hooks, since CLIP text models of transformers 5 take no `inputs_embeds`. For SDXL the
    features of the two text encoders lie side by side: H is the sum of the two widths.

    Args:
        model: the model that is run inside the contexts, unwrapped. To run a distributed wrapper of it is fine.
    """

    def __init__(self, model: DiffusionModel):
        self._sites = [EmbeddingSite(base_of(encoder)) for encoder in model.text_encoders]
        self.widths = [site.hidden_size for site in self._sites]

    @property
    def hidden_size(self) -> int:
        """H, the widths of all text encoders together."""
        return sum(self.widths)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the perturbation of one token: `(H,)`."""
        return (self.hidden_size,)

    @torch.no_grad()
    def lookup(self, input_ids: Sequence[torch.Tensor]) -> torch.Tensor:
        """
        Embeddings of token ids, as the text encoders look them up.

        Args:
            input_ids: one `[B, L]` tensor per text encoder.

        Returns:
            `[B, L, H]` in the embeddings' dtype, without gradient.
        """
        parts = []
        for site, ids in zip(self._sites, input_ids, strict=True):
            device = next(site.module.parameters()).device
            parts.append(site.module.forward(ids.to(device)))  # `forward`: no hook of a surrounding context acts
        return torch.cat(parts, dim=-1)

    def rows(self) -> torch.Tensor:
        """
        All rows of the embedding tables: `[vocab, H]` without gradient.

        Raises:
            ValueError: SDXL text encoders with vocabularies of different sizes.
        """
        tables = [site.rows() for site in self._sites]
        if len({len(table) for table in tables}) > 1:
            raise ValueError(
                f"`model`: its vocabularies have {' and '.join(str(len(table)) for table in tables)} tokens, so their rows do "
                "not lie side by side."
            )
        return torch.cat(tables, dim=-1)

    def mean_row_norm(self) -> torch.Tensor:
        """Mean L2 norm of the rows, all text encoders' features together: a 0-dim float32 tensor."""
        return self.rows().float().norm(dim=-1).mean()

    @contextlib.contextmanager
    def add(self, delta: torch.Tensor, mask: torch.Tensor | None = None) -> Iterator[None]:
        """
        Add `delta` to the token embeddings in every forward inside the context.

        Args:
            delta: `[B, L, H]`; cast to the embeddings' dtype when added. Gradients flow to it.
            mask: boolean `[B, L]`: where it is false nothing is added and no gradient flows. Default: everywhere.

        Raises:
            ValueError: `delta` has not H features; in the forward, when the prompts have another shape.
        """

        def add(output: torch.Tensor, part: torch.Tensor, where: torch.Tensor | None) -> torch.Tensor:
            moved = output + part
            return moved if where is None else torch.where(where, moved, output)

        with self._hooked("delta", delta, mask, add):
            yield

    @contextlib.contextmanager
    def replace(self, embeddings: torch.Tensor, mask: torch.Tensor) -> Iterator[None]:
        """
        Put `embeddings` in the place of the token embeddings in every forward inside the context.

        Args:
            embeddings: `[B, L, H]`; cast to the embeddings' dtype. Gradients flow to it.
            mask: boolean `[B, L]`: where they are put. Elsewhere the looked-up embeddings stay.

        Raises:
            ValueError: `embeddings` has not H features; in the forward, when the prompts have another shape.
        """

        def swap(output: torch.Tensor, part: torch.Tensor, where: torch.Tensor | None) -> torch.Tensor:
            return part.expand_as(output) if where is None else torch.where(where, part, output)

        with self._hooked("embeddings", embeddings, mask, swap):
            yield

    @contextlib.contextmanager
    def _hooked(self, name: str, values: torch.Tensor, mask: torch.Tensor | None, change: Any) -> Iterator[None]:
        if values.dim() != 3 or values.shape[-1] != self.hidden_size:
            raise ValueError(
                f"`{name}` has shape {tuple(values.shape)}; it must be [batch, length, {self.hidden_size}], the widths "
                f"{self.widths} of the text encoders side by side."
            )
        if mask is not None and (mask.dtype != torch.bool or mask.shape != values.shape[:2]):
            raise ValueError(
                f"`mask` is {mask.dtype} of shape {tuple(mask.shape)}; it must be boolean, {tuple(values.shape[:2])}."
            )
        with contextlib.ExitStack() as stack:
            for site, part in zip(self._sites, values.split(self.widths, dim=-1), strict=True):
                handle = site.module.register_forward_hook(_hook(name, part, mask, change))
                stack.callback(handle.remove)
            yield


def _hook(name: str, part: torch.Tensor, mask: torch.Tensor | None, change: Any) -> Any:
    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if output.shape != part.shape:
            raise ValueError(
                f"`{name}` is for token embeddings of shape {tuple(part.shape)} and those of the forward have shape "
                f"{tuple(output.shape)}: encode the same prompts, and the unconditional one outside the context."
            )
        where = None if mask is None else mask.to(output.device).unsqueeze(-1)
        return change(output, part.to(device=output.device, dtype=output.dtype), where)

    return hook
