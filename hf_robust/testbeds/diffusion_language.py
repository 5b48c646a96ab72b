"""The diffusion testbed's captions: words for each concept, templates, and a CLIP tokenizer made on the spot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import CLIPTokenizer

from .diffusion_drawings import COLOURS, TEXTURES

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class ConceptWords:
    """What a concept may be called.

    Attributes:
        name: The concept's name, one token.
        aliases: Two other words for it, one token each.
        two_token: Yet another word, of two byte-pair tokens: these parts.
    """

    name: str
    aliases: tuple[str, str]
    two_token: tuple[str, str]

    def words(self, kind: str = "all") -> tuple[str, ...]:
        """The words of a kind: "name", "alias", "two_token" or "all".

        Raises:
            ValueError: Unknown kind.
        """
        known = {"name": (self.name,), "alias": self.aliases, "two_token": ("".join(self.two_token),)}
        if kind != "all" and kind not in known:
            raise ValueError(f"words={kind!r} is unknown; use one of {', '.join((*known, 'all'))}")
        return tuple(word for group in known.values() for word in group) if kind == "all" else known[kind]


WORDS = {
    words.name: words
    for words in (
        ConceptWords("circle", ("disc", "ball"), ("rond", "elle")),
        ConceptWords("square", ("box", "block"), ("tetra", "gon")),
        ConceptWords("triangle", ("wedge", "pyramid"), ("tri", "gon")),
        ConceptWords("cross", ("plus", "rood"), ("cruci", "form")),
        ConceptWords("star", ("sparkle", "asterisk"), ("penta", "gram")),
        ConceptWords("ring", ("hoop", "donut"), ("annu", "lus")),
        ConceptWords("heart", ("valentine", "love"), ("cardi", "oid")),
        ConceptWords("diamond", ("lozenge", "gem"), ("rhom", "bus")),
    )
}

TEMPLATES = {
    "train": (
        "a {colour} {shape} on {texture} paper",
        "drawing of a {colour} {shape}",
        "a {shape} on {texture} paper",
        "photo of a {shape}",
    ),
    "test": (
        "picture of a {colour} {shape} on {texture} paper",
        "one {colour} {shape}",
        "{texture} paper with a {colour} {shape}",
    ),
}
"""Captions by split. The original model learns all of them; erasing is to use "train", measuring "test"."""

FILLERS = tuple(
    "very nice small big old new bright clean simple plainly my your this that some other and or near".split()
)
"""Words that mean nothing here; among random words, they stand before and behind captions in training."""


def learn_merges(pieces: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first (ties: alphabetically), until each piece is one token.

    Args:
        pieces: Words with "</w>" behind them, and beginnings of words without.
    """
    split = [tuple(piece.removesuffix("</w>")) for piece in pieces]
    rows = [
        (*row[:-1], row[-1] + "</w>") if piece.endswith("</w>") else row
        for row, piece in zip(split, pieces, strict=True)
    ]
    merges: list[tuple[str, str]] = []
    while any(len(row) > 1 for row in rows):
        pairs = Counter(pair for row in rows for pair in zip(row, row[1:], strict=False))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        rows = [_merged(row, best) for row in rows]
    return merges


def _merged(row: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for symbol in row:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def _words() -> list[str]:
    """Every word of one token, in the order in which they are first said."""
    said = " ".join(template for split in TEMPLATES.values() for template in split)
    for field in ("{colour}", "{shape}", "{texture}"):
        said = said.replace(field, " ")
    names = [word for words in WORDS.values() for word in (words.name, *words.aliases)]
    return list(dict.fromkeys((*said.split(), *COLOURS, *TEXTURES, *names, *FILLERS)))


def build_tokenizer(max_length: int = 16) -> CLIPTokenizer:
    """A `CLIPTokenizer` as Stable Diffusion's, with a vocabulary of a few hundred byte-pair tokens.

    Every word of the captions is one token, but for the concepts' two-token words; other words fall into letters.

    Args:
        max_length: Its `model_max_length`.
    """
    pieces = [f"{word}</w>" for word in _words()]
    for words in WORDS.values():
        pieces += [words.two_token[0], f"{words.two_token[1]}</w>"]
    merges = learn_merges(list(dict.fromkeys(pieces)))
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), BOS, EOS]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)
