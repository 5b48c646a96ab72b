"""What an attack on generated text found."""

import math
from dataclasses import dataclass, field

import torch


@dataclass
class AttackResult:
    """
    Outcome of an attack on one behaviour.

    Judge success on `completion`, never on `loss` alone: a target may be likely token by token and still not come out.

    Attributes:
        suffix: the string appended to the user's message, its leading space included; `None` for a continuous attack.
        suffix_ids: the suffix's token ids; `None` for a continuous attack.
        embeddings: `[suffix_length, hidden]` float32 on the CPU, the suffix's embeddings as the model applies them;
            `None` for a discrete attack.
        loss: loss of the suffix returned, in nats per target token: the lowest of the search, unless a hit ended it.
        losses: the loss before the first step, then after each step. It may rise where a search walks on from a step's
            best candidate.
        completion: what the model writes under the attack (greedy decoding, special tokens left out).
        hit: whether every target token is the model's most likely next token under the attack, given the target so far.
            Known with `early_stop` only, `False` otherwise.
        num_forwards: rows (sequences) of forward passes that the search spent on this behaviour, generation not
            counted.
        num_backwards: rows of backward passes.
        num_unfiltered: steps in which no candidate survived decoding and encoding, so that all were kept.
    """

    suffix: str | None = None
    suffix_ids: list[int] | None = None
    embeddings: torch.Tensor | None = None
    loss: float = math.nan
    losses: list[float] = field(default_factory=list)
    completion: str = ""
    hit: bool = False
    num_forwards: int = 0
    num_backwards: int = 0
    num_unfiltered: int = 0
