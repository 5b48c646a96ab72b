"""Logits at label positions only: the LM head is the dearest layer of a small model with a large vocabulary."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class LabelIndex:
    """
    Where the label tokens of a batch are predicted. Built once per batch, outside any loop: it is the one place that
    waits for the device.

    Attributes:
        flat: `[N]` positions in the flattened `[batch * length]` sequence whose output predicts a label.
        targets: `[N]` label token ids.
        rows: `[N]` row of the batch that each label belongs to.
        counts: `[batch]` number of labels of each row.
        shape: `(batch, length)`.
    """

    flat: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    counts: torch.Tensor
    shape: tuple[int, int]

    @classmethod
    def from_labels(cls, labels: torch.Tensor) -> "LabelIndex":
        """
        Index the labels of a causal model: the label at position t is predicted at t - 1.

        Args:
            labels: `[batch, length]` int64, -100 where there is no label. The label at position 0 predicts from nothing
                and is ignored, as in transformers.
        """
        batch, length = labels.shape
        shifted = labels[:, 1:]
        rows, columns = (shifted != -100).nonzero(as_tuple=True)
        return cls(
            flat=rows * length + columns,
            targets=shifted[rows, columns],
            rows=rows,
            counts=(shifted != -100).sum(dim=1),
            shape=(batch, length),
        )


def label_logits(model: nn.Module, index: LabelIndex, **inputs: Any) -> torch.Tensor:
    """
    Next-token logits at the label positions of a batch.

    A pre-hook on the LM head passes on the hidden states of those positions only; whatever the model does after its head
    (soft-capping, scaling) still applies. A model whose head is not a module fed with `[batch, length, hidden]` states
    computes all logits, and those of the label positions are picked out.

    Args:
        model: causal language model, wrapped (DDP, FSDP) or not.
        index: label positions.
        inputs: the model's inputs, without labels.

    Returns:
        `[N, vocab]` float32.

    Raises:
        ValueError: the model's logits are not one row per input position (prompt-learning adapters add positions).
    """
    inner, head = _head_of(model)
    fired = False

    def keep_labels(module: nn.Module, args: tuple) -> tuple | None:
        nonlocal fired
        if not args or args[0].dim() != 3 or tuple(args[0].shape[:2]) != index.shape:
            return None
        fired = True
        return (args[0].flatten(0, 1).index_select(0, index.flat).unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(keep_labels) if isinstance(head, nn.Module) else None
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        if handle is not None:
            handle.remove()
        if not torch.is_grad_enabled() and hasattr(head, "reshard"):
            # FSDP2 leaves the head gathered for a backward that does not come. TRL's fused loss, which reads its weight without
            # calling it, would save it for its own backward, and FSDP frees it before.
            head.reshard()
    if fired:
        return logits[0].float()
    if tuple(logits.shape[:2]) != index.shape:
        raise ValueError(
            f"`model` ({type(inner).__name__}) returned logits of shape {tuple(logits.shape)} for inputs of shape "
            f"{index.shape}; adapters that add positions (prompt or prefix tuning) are not supported: use LoRA."
        )
    return logits.flatten(0, 1).index_select(0, index.flat).float()


def gather_head(model: nn.Module) -> None:
    """
    Make TRL's fused loss train an output head that FSDP2 has split on the rows of all processes; nothing otherwise.

    The loss (TRL 1.16) reads the weight without calling the head, and puts a split one together itself by `full_tensor()`. Each
    process then keeps the gradient of its own rows for its part of the head, and nobody takes the mean over processes.

    Args:
        model: causal language model, wrapped or not, before a forward whose backward follows.
    """
    _, head = _head_of(model)
    if not hasattr(head, "unshard") or not head.weight.requires_grad:
        return
    weights: list[Any] = [head.weight, getattr(head, "bias", None)]
    for weight in weights:
        if hasattr(weight, "full_tensor"):
            weight.full_tensor = functools.partial(_whole, weight)


def _whole(weight: Any) -> torch.Tensor:
    """A split weight put together; its gradient is the mean over the processes, as FSDP takes it."""
    from torch.distributed.tensor import DTensor, Partial

    whole: Any = DTensor.full_tensor(weight, grad_placements=[Partial("sum")])
    whole = whole.view_as(whole)
    if whole.requires_grad:
        processes = weight.device_mesh.size()
        whole.register_hook(lambda gradient: gradient / processes)
    return whole


def _head_of(model: nn.Module) -> tuple[Any, Any]:
    """The model inside its wrappers, whose hooks and outputs count, and its output head, if it has one."""
    inner: Any = model
    while not hasattr(inner, "get_output_embeddings") and isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module  # DDP and DeepSpeed
    getter = getattr(inner, "get_output_embeddings", None)
    return inner, getter() if getter is not None else None
