"""Candidates of a discrete search: which tokens may be used, which replacements are tried, which survive as text."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from hf_robust.attacks.prompts import Window, decode, encode

ALLOWED = ("ascii", "all")


def allowed_token_ids(tokenizer: Any, vocab_size: int, allowed: str) -> torch.Tensor:
    """
    Tokens that a suffix may be made of: never a special one, nor a row of the embedding table without a token.

    Args:
        tokenizer: transformers tokenizer.
        vocab_size: rows of the embedding table.
        allowed: `"ascii"` leaves out tokens that hold anything but printable ASCII characters; `"all"` keeps them.

    Returns:
        `[A]` int64, ascending.

    Raises:
        ValueError: no token is left.
    """
    special = set(tokenizer.all_special_ids)
    special.update(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    ids = sorted(i for i in set(tokenizer.get_vocab().values()) if i < vocab_size and i not in special)
    texts = decode(tokenizer, [[index] for index in ids])
    if allowed == "ascii":
        keep = [i for i, text in zip(ids, texts, strict=True) if text and text.isascii() and text.isprintable()]
    else:
        keep = [i for i, text in zip(ids, texts, strict=True) if text]
    if not keep:
        raise ValueError(
            f"`allowed={allowed!r}` leaves none of the {len(ids)} ordinary tokens of `tokenizer`: use `allowed='all'`."
        )
    return torch.tensor(keep)


def behavior_generator(seed: int, *parts: object) -> torch.Generator:
    """
    A generator of a behaviour's own, so that what it draws does not depend on what is attacked beside it.

    Args:
        seed: the attack's seed.
        parts: what tells the behaviour from others (prompt, target, restart).
    """
    digest = hashlib.sha256(repr((seed, *parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def sample_replacements(
    ids: torch.Tensor, replacements: torch.Tensor, *, width: int, n_replace: int, generator: torch.Generator
) -> torch.Tensor:
    """
    Random variants of a suffix, each with `n_replace` tokens replaced.

    Args:
        ids: `[S]` int64, the suffix.
        replacements: `[S, K]` int64, the tokens that may stand at each position.
        width: how many variants to draw.
        n_replace: tokens replaced in each, at distinct positions.
        generator: CPU generator.

    Returns:
        `[<= width, S]` int64 without duplicates, in the order drawn.
    """
    length, choices = replacements.shape
    if n_replace == 1:
        places = torch.randint(length, (width, 1), generator=generator)
    else:
        places = torch.rand(width, length, generator=generator).argsort(dim=1)[:, :n_replace]
    picks = torch.randint(choices, (width, n_replace), generator=generator)
    drawn = ids.repeat(width, 1).scatter_(1, places, replacements[places, picks])
    return torch.tensor(list(dict.fromkeys(map(tuple, drawn.tolist()))))


def survivors(tokenizer: Any, candidates: Sequence[torch.Tensor], windows: Sequence[Window]) -> list[torch.Tensor]:
    """
    Which candidates come back unchanged when decoded and encoded again in their surroundings: what a user could type.

    All candidates of all behaviours go through the tokenizer in one call. A candidate that ends in white space is
    dropped too, since chat templates trim messages.

    Args:
        tokenizer: transformers tokenizer.
        candidates: `[C, S]` int64 for each behaviour.
        windows: the surroundings of each behaviour's suffix.

    Returns:
        `[C]` bool for each behaviour.
    """
    rows = [row for table in candidates for row in table.tolist()]
    owners = [window for table, window in zip(candidates, windows, strict=True) for _ in range(len(table))]
    texts = decode(tokenizer, rows)
    full = [window.left + text + window.right for window, text in zip(owners, texts, strict=True)]
    again: dict[int, list[int]] = {}
    for special in {window.special for window in windows}:
        places = [place for place, window in enumerate(owners) if window.special == special]
        again.update(zip(places, encode(tokenizer, [full[i] for i in places], special=special), strict=True))
    kept = [
        again[place] == window.left_ids + row + window.right_ids and text == text.rstrip()
        for place, (row, text, window) in enumerate(zip(rows, texts, owners, strict=True))
    ]
    return list(torch.tensor(kept, dtype=torch.bool).split([len(table) for table in candidates]))
