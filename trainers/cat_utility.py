"""What CAT's utility rows are held to: the model's predictions and hidden states before training."""

import contextlib
from typing import Any

import torch
from torch import nn

from hf_robust.objectives import relative_shift
from hf_robust.sites import LabelIndex, adapter_off, label_logits, quiet, record_hidden_states


def without_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    """
    The model's inputs.

    Args:
        inputs: a batch.
    """
    return {name: value for name, value in inputs.items() if name not in ("labels", "use_cache")}


def attended(inputs: dict[str, Any]) -> torch.Tensor:
    """
    Args:
        inputs: a batch.

    Returns:
        `[batch, length]`, 1 on real tokens.
    """
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]) if mask is None else mask


@torch.no_grad()
def utility_before(
    model: nn.Module, inner: Any, inputs: dict[str, Any], *, layers: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """
    What the model without its adapter makes of a batch; one forward.

    Args:
        model: with an adapter, wrapped or not.
        inner: the same without its wrapper.
        inputs: the batch, with labels.
        layers: whether hidden states are wanted.

    Returns:
        Logits at the labels `[N, vocab]`, and the hidden states behind each layer `[batch, length, hidden]` or nothing.
    """
    index = LabelIndex.from_labels(inputs["labels"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet(inner))
        stack.enter_context(adapter_off(inner))
        states = stack.enter_context(record_hidden_states(inner)) if layers else []
        return label_logits(model, index, **without_labels(inputs)), states


def total_shift(states: list[torch.Tensor], before: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """
    How far hidden states have moved, relative to what they were.

    Args:
        states: behind each layer, `[batch, length, hidden]`.
        before: the same before training.
        mask: `[batch, length]`, 1 at the tokens that count.

    Returns:
        The sum over tokens, a mean over layers; scalar.
    """
    shifts = [(relative_shift(now, then) * mask).sum() for now, then in zip(states, before, strict=True)]
    return torch.stack(shifts).mean()
