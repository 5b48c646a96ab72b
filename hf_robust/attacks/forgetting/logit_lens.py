"""Logit lens: what each layer would answer, to see whether an answer is gone or only held back at the end."""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_robust.attacks.forgetting.probes import columns_of
from hf_robust.attacks.forgetting.rows import ForgetTokens, forget_batch, forget_tokens
from hf_robust.attacks.generation import evaluating
from hf_robust.attacks.prompts import check_counts, pad_id
from hf_robust.sites import LabelIndex, decoder_layers, label_logits


@dataclass(frozen=True)
class LogitLens:
    """
    Answers read off after each layer.

    Attributes:
        log_probs: for each row `[layers, tokens]` float32 on the CPU: log-probability of each token that is measured (see
            [`logit_lens`]), given those before it, if the model ended after that layer.
        ranks: for each row `[layers, tokens]` int64: how many tokens of the vocabulary are more likely, plus 1.
    """

    log_probs: list[torch.Tensor]
    ranks: list[torch.Tensor]

    @property
    def layers(self) -> int:
        """Number of layers; the last one's answer is the model's own."""
        return int(self.log_probs[0].shape[0])

    def probabilities(self) -> list[float]:
        """Of each layer the answers' probability, to the power of 1 / measured tokens each, mean over rows."""
        return torch.stack([found.mean(dim=1).exp() for found in self.log_probs]).mean(dim=0).tolist()

    def first(self) -> list[float]:
        """Of each layer the share of the answers' tokens that are the most likely, mean over rows."""
        return torch.stack([(found == 1).float().mean(dim=1) for found in self.ranks]).mean(dim=0).tolist()

    def mean_ranks(self) -> list[float]:
        """Of each layer the rank of the answers' tokens, geometric mean over tokens and then over rows; 1 is best."""
        return torch.stack([found.float().log().mean(dim=1) for found in self.ranks]).mean(dim=0).exp().tolist()

    def best_layer(self) -> int:
        """The layer at which answers are most probable; before the last, they are known inside and held back after."""
        found = self.probabilities()
        return max(range(len(found)), key=lambda layer: -math.inf if math.isnan(found[layer]) else found[layer])


@torch.no_grad()
def logit_lens(model: nn.Module, tokenizer: Any, rows: Sequence[Any], *, batch_size: int = 8) -> LogitLens:
    """
    Read the answers to a forget set off after each layer.

    The logit lens (nostalgebraist 2020): the model's own final norm and head, applied to the hidden states after a layer. The
    model runs once; behind its last layer the states of all layers take the place of the batch, so that norm, head and
    whatever else the model does to its logits are its own, in every architecture.

    Args:
        model: causal language model or PEFT model, unwrapped. Its mode, hooks and random state are the same afterwards.
        tokenizer: its tokenizer.
        rows: mappings with `prompt` and `completion`, `messages`, `question` and `answer`, or `text`; or behaviours. Measured
            are the tokens of the row's `answer` (or `value`), which a judge looks for, where it stands in the completion (in
            upper or lower case; its first occurrence); the words before it are given, those behind it are left out. Where
            there is none, or it is nowhere in the completion as whole words, all tokens of the completion are measured,
            words included that anyone can guess.
        batch_size: rows per forward. Behind the last layer there are as many times more as the model has layers.

    Returns:
        Log-probabilities and ranks for each row, layer and token that is measured.

    Raises:
        ValueError: no rows, a row without completion or too long, or layers that are not found.
    """
    check_counts({"batch_size": (batch_size, 1, "Give the rows per forward.")})
    tokens = forget_tokens(model, tokenizer, rows)
    spans = [_span(tokenizer, row, of_row) for row, of_row in zip(rows, tokens, strict=True)]
    device, padding = next(model.parameters()).device, pad_id(model, tokenizer)
    depth = len(decoder_layers(model))
    found = LogitLens([], [])
    with evaluating(model):
        for start in range(0, len(tokens), batch_size):
            batch = tokens[start : start + batch_size]
            inputs, labels = forget_batch(batch, padding=padding, device=device)
            for of_row, (first, end) in zip(labels, spans[start : start + batch_size], strict=True):
                of_row[:first] = -100
                of_row[end:] = -100
            index = LabelIndex.from_labels(labels.repeat(depth, 1))
            with _all_layers_at_the_end(model):
                logits = label_logits(model, index, **inputs)
            log_probs = logits.log_softmax(dim=-1).gather(1, index.targets.unsqueeze(1)).squeeze(1)
            wanted = logits.gather(1, index.targets.unsqueeze(1))
            ranks = (logits > wanted).sum(dim=1) + 1
            for place in range(len(batch)):
                of_row = index.rows % len(batch) == place
                found.log_probs.append(log_probs[of_row].view(depth, -1).cpu())
                found.ranks.append(ranks[of_row].view(depth, -1).cpu())
    return found


def _span(tokenizer: Any, row: Any, tokens: ForgetTokens) -> tuple[int, int]:
    """Where in a row's ids that begins and ends which is measured."""
    ids = tokens.ids[tokens.start :]
    answers = [value for name in ("answer", "value") if isinstance(value := columns_of(row).get(name), str)]
    if any(map(str.strip, answers)):
        # What each token adds, read off from the beginnings: tokens alone may be read otherwise
        read = [tokenizer.decode(ids[:count]) for count in range(len(ids) + 1)]
        for answer in filter(str.strip, answers):
            found = re.search(rf"(?<!\w){re.escape(answer.strip())}(?!\w)", read[-1], re.IGNORECASE)
            if found is not None:
                first = max(count for count, text in enumerate(read[:-1]) if len(text) <= found.start())
                end = min(count for count, text in enumerate(read) if len(text) >= found.end())
                return tokens.start + first, tokens.start + end
    return tokens.start, len(tokens.ids)


@contextlib.contextmanager
def _all_layers_at_the_end(model: nn.Module) -> Iterator[None]:
    """Let the last layer return the states after every layer, one batch after the other."""
    layers = list(decoder_layers(model))
    states: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> Any:
        states.append(output[0] if isinstance(output, tuple) else output)
        if len(states) < len(layers):
            return None
        everything = torch.cat(states)
        states.clear()
        return (everything, *output[1:]) if isinstance(output, tuple) else everything

    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(keep).remove)
        yield
