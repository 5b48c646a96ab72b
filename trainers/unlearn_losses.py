"""Forget and retain losses of a part of a batch: the forwards around [`hf_robust.objectives.unlearning`]."""

import dataclasses
from typing import Any

import torch
from torch import nn

from hf_robust.objectives import (
    activation_mse,
    ce_u_loss,
    grad_diff_loss,
    npo_loss,
    per_row_mean,
    per_row_sum,
    retain_kl,
    rmu_loss,
    simnpo_loss,
    token_nll,
    undial_loss,
)
from hf_robust.sites import LabelIndex, label_logits, record_hidden_states
from hf_robust.trainers.unlearn_config import UnlearnConfig

# What a part carries besides the model's inputs
INDEX, TOTALS, REFERENCE = "label_index", "totals", "reference"
_OWN = ("labels", "use_cache", INDEX, TOTALS, REFERENCE)
# Losses that are a mean over rows; the others are one over tokens
_BY_ROW = ("npo", "simnpo", "rmu", "activation")


def model_inputs(part: dict[str, Any]) -> dict[str, Any]:
    """
    What of a part of a batch the model is called with: everything but labels and our own notes.

    Args:
        part: the forget or the retain rows of a micro-batch.
    """
    return {name: value for name, value in part.items() if name not in _OWN}


def label_index(part: dict[str, Any]) -> LabelIndex:
    """
    Where the label tokens of a part are predicted, made once and kept with it.

    Args:
        part: the forget or the retain rows of a micro-batch.
    """
    if INDEX not in part:
        part[INDEX] = LabelIndex.from_labels(part["labels"])
    return part[INDEX]


def count_rows(labels: list[torch.Tensor]) -> torch.Tensor:
    """
    Sizes that losses are means over.

    Args:
        labels: `[batch, length]` of each part.

    Returns:
        `[2]` int64: rows, and labels that something predicts.
    """
    rows = torch.tensor(sum(len(part) for part in labels), device=labels[0].device)
    return torch.stack([rows, torch.stack([(part[:, 1:] != -100).sum() for part in labels]).sum()])


def row_weights(kind: str, part: dict[str, Any]) -> torch.Tensor:
    """
    Share of each row of a part in a window's mean.

    Args:
        kind: forget or retain loss.
        part: with the window's numbers of rows and of label tokens over all processes, where the trainer noted them; its own
            otherwise.

    Returns:
        `[batch]` float32; over the window they sum up to 1.
    """
    counts = label_index(part).counts
    rows, tokens = part[TOTALS].unbind() if TOTALS in part else (len(counts), counts.sum())
    if kind in _BY_ROW:
        return torch.ones_like(counts, dtype=torch.float32) / rows
    return counts / torch.as_tensor(tokens, device=counts.device).clamp(min=1)


def forget_rows(
    model: nn.Module, part: dict[str, Any], args: UnlearnConfig, *, inner: nn.Module, direction: torch.Tensor | None
) -> torch.Tensor:
    """
    The forget loss of each row; one forward.

    Args:
        model: the model that is trained, wrapped or not.
        part: the rows, with a reference where the loss has one (see [`reference_of`]).
        args: names the loss.
        inner: the model without its wrapper, for hooks.
        direction: RMU's unit vector.

    Returns:
        `[batch]` float32; of a loss over tokens the mean over the row's own.
    """
    index, kind = label_index(part), args.loss_type
    beta: Any = args.beta  # set wherever a loss has one
    if kind == "rmu":
        assert direction is not None
        states = hidden_states(model, part, inner=inner, layer=args.activation_layer)
        return rmu_loss(states, direction, part["labels"] != -100, coefficient=args.rmu_coefficient)
    logits = label_logits(model, index, **model_inputs(part))
    if kind == "npo":
        nll = per_row_sum(token_nll(logits, index.targets), index.rows, index.counts)
        return npo_loss(nll, part[REFERENCE], beta=beta)
    if kind == "simnpo":
        nll = per_row_sum(token_nll(logits, index.targets), index.rows, index.counts)
        return simnpo_loss(nll, index.counts, beta=beta, delta=args.simnpo_delta)
    if kind == "undial":
        values = undial_loss(logits, part[REFERENCE], index.targets, beta=beta)
    else:
        values = (grad_diff_loss if kind == "grad_diff" else ce_u_loss)(logits, index.targets)
    return per_row_mean(values, index.rows, index.counts)


def retain_rows(model: nn.Module, part: dict[str, Any], args: UnlearnConfig, *, inner: nn.Module) -> torch.Tensor:
    """
    The retain loss of each row; one forward.

    Args:
        model: see [`forget_rows`].
        part: see [`forget_rows`].
        args: names the loss.
        inner: see [`forget_rows`].

    Returns:
        `[batch]` float32; of a loss over tokens the mean over the row's own.
    """
    index = label_index(part)
    if args.retain_type == "activation":
        states = hidden_states(model, part, inner=inner, layer=args.activation_layer)
        return activation_mse(states, part[REFERENCE], part["labels"] != -100)
    logits = label_logits(model, index, **model_inputs(part))
    values = retain_kl(logits, part[REFERENCE]) if args.retain_type == "kl" else token_nll(logits, index.targets)
    return per_row_mean(values, index.rows, index.counts)


def reference_of(kind: str, model: nn.Module, part: dict[str, Any], *, inner: nn.Module, layer: int) -> torch.Tensor:
    """
    What a loss compares with, from the model before training; one forward.

    Args:
        kind: forget or retain loss.
        model: the model before training.
        part: the rows.
        inner: the same without its wrapper.
        layer: of the hidden states.

    Returns:
        Summed negative log-likelihoods `[batch]` for `"npo"`, hidden states `[batch, length, hidden]` for `"activation"`,
        logits at the label positions `[N, vocab]` for the others.
    """
    if kind == "activation":
        return hidden_states(model, part, inner=inner, layer=layer)
    index = label_index(part)
    logits = label_logits(model, index, **model_inputs(part))
    if kind == "npo":
        return per_row_sum(token_nll(logits, index.targets), index.rows, index.counts)
    return logits


def hidden_states(model: nn.Module, part: dict[str, Any], *, inner: nn.Module, layer: int) -> torch.Tensor:
    """
    What a layer returns; the LM head is spared all positions but one.

    Args:
        model: the model, wrapped or not.
        part: the rows.
        inner: the model without its wrapper, for the hook.
        layer: counted from 0, or from the end if negative.

    Returns:
        `[batch, length, hidden]`.
    """
    index = label_index(part)
    with record_hidden_states(inner, layers=[layer]) as states:
        label_logits(model, dataclasses.replace(index, flat=index.flat[:1]), **model_inputs(part))
    return states[0]
