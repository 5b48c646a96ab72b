"""Free tokens in prompts: which tokens an attacker may write, where they stand, and the text that they make."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hf_robust.attacks.prompts import check_counts
from hf_robust.diffusion.site import TextTokenSite
from hf_robust.diffusion.tokens import decode_tokens, ordinary_ids, place_in_prompts
from hf_robust.threats import check_choice

if TYPE_CHECKING:
    from hf_robust.diffusion import Conditioning, DiffusionModel

TOKEN_POSITIONS = ("prefix", "suffix", "replace", "insert")


def check_place(num_tokens: int, position: str, concept: str | None) -> None:
    """
    Check where an attack puts its tokens.

    Args:
        num_tokens: how many.
        position: one of [`TOKEN_POSITIONS`].
        concept: the words that `"replace"` and `"insert"` look for.

    Raises:
        ValueError: an argument is out of range or unknown, or `concept` is missing.
    """
    check_counts({"num_tokens": (num_tokens, 1, "Give the number of free tokens.")})
    check_choice("position", position, TOKEN_POSITIONS)
    if position in ("replace", "insert") and not concept:
        raise ValueError(f"`position={position!r}` needs `concept`, the words of the prompt that it looks for.")


class Vocabulary:
    """
    The tokens that an attacker may write.

    Args:
        model: whose tokenizers are used; SDXL's two must share one vocabulary.
        filter_ids: only tokens that come back alone from decoding and encoding. A piece that only ever stands inside a word
            would be read as something else once it is text.

    Attributes:
        ids: `[V]` int64 token ids, without the special ones.

    Raises:
        ValueError: two different vocabularies, or no token is left.
    """

    def __init__(self, model: "DiffusionModel", *, filter_ids: bool = True):
        tokenizer, *others = model.tokenizers
        if any(other.get_vocab() != tokenizer.get_vocab() for other in others):
            raise ValueError("`model`: its tokenizers have different vocabularies, so no text means one row of tokens.")
        ids = sorted(set(ordinary_ids(tokenizer)).intersection(*(ordinary_ids(other) for other in others)))
        if filter_ids and ids:
            texts = tokenizer.batch_decode([[index] for index in ids])
            encoded = tokenizer(texts, add_special_tokens=False).input_ids
            ids = [index for index, again in zip(ids, encoded, strict=True) if list(again) == [index]]
        if not ids:
            raise ValueError(
                "`model`: no ordinary token of its vocabulary comes back from decoding; use `filter_ids=False`."
            )
        self.ids = torch.tensor(ids)

    def rows(self, site: TextTokenSite) -> torch.Tensor:
        """Their embeddings, as the text encoders look them up: `[V, H]` float32."""
        return site.lookup([self.ids.unsqueeze(0)] * len(site.widths))[0].float()


class Slots:
    """
    Prompts with free tokens in them.

    Args:
        model: whose text encoders read them.
        prompts: `B` texts.
        count: free tokens in each, `K`.
        position: where they stand; see [`~hf_robust.diffusion.place_tokens`].
        concept: words to look for, for `"replace"` and `"insert"`.

    Raises:
        ValueError: a prompt is too long with its tokens, or lacks the concept; the message names it.
    """

    def __init__(
        self, model: "DiffusionModel", prompts: Sequence[str], *, count: int, position: str, concept: str | None = None
    ):
        self.model, self.site = model, TextTokenSite(model)
        self.ids, self.mask = place_in_prompts(model, prompts, count=count, position=position, concept=concept)

    def encode(self, places: list[int], embeddings: torch.Tensor) -> "Conditioning":
        """
        What the text encoders make of prompts whose free tokens have these embeddings; gradients flow to them.

        Args:
            places: which prompts.
            embeddings: `[len(places), K, H]`.
        """
        mask = self.mask[places].to(embeddings.device)
        full = embeddings.new_zeros(*mask.shape, embeddings.shape[-1])
        full[mask] = embeddings.flatten(0, 1)
        with self.site.replace(full, mask):
            return self.model.encode([ids[places] for ids in self.ids])

    def texts(self, places: list[int], tokens: torch.Tensor) -> list[str]:
        """
        The prompts with tokens in their free places, as text.

        Args:
            places: which prompts.
            tokens: `[len(places), K]` int64 ids.
        """
        ids = self.ids[0][places].clone()
        ids[self.mask[places]] = tokens.to(ids.device).flatten()
        return [decode_tokens(self.model.tokenizers[0], row) for row in ids]
