"""Quantised copies of a model: small changes of the weights, such as unlearning's, may be rounded away."""

import logging
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_robust.attacks.forgetting.model_copy import own_copy
from hf_robust.attacks.prompts import check_counts
from hf_robust.sites import decoder_layers
from hf_robust.threats import check_choice

logger = logging.getLogger(__name__)


class _Once(logging.Filter):
    """
    Each message once. bitsandbytes (0.50) says in every layer of every forward that LLM.int8() works in float16; to be removed
    once it does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is new."""
        fresh = record.getMessage() not in self._seen
        self._seen.add(record.getMessage())
        return fresh


_ONCE = _Once()

# Experts whose weights are [experts, in, out] without an attribute that says so (transformers 5.23)
_TRANSPOSED = ("Llama4TextExperts",)
QUANTIZERS = ("auto", "bitsandbytes", "round_to_nearest")


@dataclass(frozen=True)
class QuantizedModel:
    """
    A quantised copy of a model, and how it was made.

    Attributes:
        model: the copy, in evaluation mode, for inference; adapters are merged into it.
        bits: 8 or 4.
        method: `"bitsandbytes"` or `"round_to_nearest"`.
        scheme: what that means here, for a report, such as `"nf4, blocks of 64"`.
        layers: number of linear layers quantised: all those of the decoder layers; embeddings and head are left alone. The
            experts of a layer that share a weight count once.
        left: weights of the decoder layers that were not quantised, by their names in a layer, such as `"mlp.gate.weight"`,
            the router of a mixture of experts.
        fallback: why `method="auto"` did not take bitsandbytes; `None` if it did or was not asked to.
    """

    model: nn.Module
    bits: int
    method: str
    scheme: str
    layers: int
    left: tuple[str, ...] = ()
    fallback: str | None = None


def quantized(model: nn.Module, *, bits: int = 4, method: str = "auto", group_size: int = 128) -> QuantizedModel:
    """
    A copy of a model with quantised weights, as a deployment would have it; the model given is never changed.

    Unlearning that keeps the rest of a model intact changes weights little, often by less than half a quantisation step:
    "Catastrophic Failure of LLM Unlearning via Quantization" (arXiv 2410.16454) finds 21 % of the forgotten knowledge
    before and 83 % after quantisation to 4 bits.

    Args:
        model: causal language model or PEFT model, unwrapped, not quantised. Adapters are merged first, so that what they
            changed is quantised too. The experts of a mixture are rounded one by one; bitsandbytes does not take those that
            share a weight.
        bits: 8 or 4.
        method: `"bitsandbytes"` (LLM.int8() or NF4), on CPUs too; `"round_to_nearest"`, whose weights are rounded and kept in
            the model's dtype, so that it runs anywhere and is differentiable; `"auto"`: bitsandbytes where it is installed and
            runs, and rounding elsewhere. The two are different attacks: run both where you can.
        group_size: weights that share a scale and a zero point in `"round_to_nearest"`, along the input features; 128 as usual.

    Returns:
        The copy and how it was made.

    Raises:
        ImportError: `method="bitsandbytes"` and it is not installed.
        ValueError: an argument out of range, a model that is quantised already or has no linear layer in its decoder layers, or
            `method="bitsandbytes"` where it does not run on the model (the message says why).

    Example:

    ```python
    >>> small = quantized(model, bits=4)
    >>> small.method, recall_of(small.model, forget_rows)
    ```
    """
    check_choice("method", method, QUANTIZERS)
    check_counts({"group_size": (group_size, 1, "Give the number of weights that share a scale.")})
    if bits not in (8, 4):
        raise ValueError(f"`bits={bits!r}` must be 8 or 4.")
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise ValueError("`model` is quantised already: give the model that was unlearned, in floating point.")
    fallback = None
    if method in ("auto", "bitsandbytes"):
        try:
            return _with_bitsandbytes(_merged_copy(model), bits)
        except Exception as error:  # kernels raise what they like
            if method == "bitsandbytes" and isinstance(error, ImportError):
                raise ImportError(
                    '`method="bitsandbytes"` needs it: pip install "hf_robust[quantization]", or use '
                    '`method="round_to_nearest"`.'
                ) from error
            fallback = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if method == "bitsandbytes":
                raise ValueError(
                    f"`method='bitsandbytes'` does not run on this model at `bits={bits}` ({fallback}): use "
                    "`method='round_to_nearest'`."
                ) from error
            logger.warning("bitsandbytes does not run here (%s): weights are rounded to nearest instead.", fallback)
    rounded = _merged_copy(model)
    # A linear layer's weight is [out, in], a Conv1D's [in, out]; experts have a first dimension more
    linear: dict[Any, bool] = {layer.weight: isinstance(layer, Conv1D) for _, _, layer in _linear_layers(rounded)}
    weights = linear | _experts(rounded)
    for weight, transposed in weights.items():
        for matrix in weight.data.unbind() if weight.dim() == 3 else [weight.data]:
            rows = matrix.T if transposed else matrix
            rows.copy_(round_to_nearest(rows, bits=bits, group_size=group_size))
    scheme = f"asymmetric, groups of {group_size}"
    left = _left(rounded, weights)
    return QuantizedModel(rounded, bits, "round_to_nearest", scheme, len(weights), left, fallback)


def round_to_nearest(weight: torch.Tensor, *, bits: int, group_size: int) -> torch.Tensor:
    """
    Weights rounded to the 2^bits values of a grid from the least to the greatest weight of each group, 0 always among them.

    Args:
        weight: `[out, in]`, any floating dtype.
        bits: at least 2.
        group_size: neighbours along `in` that share a grid; the last group of a row may be smaller.

    Returns:
        `[out, in]` in the weight's dtype (worked out in float32): the values after quantisation and back.
    """
    groups = [
        _rounded_group(group, 2**bits - 1) for group in weight.float().split(min(group_size, weight.shape[1]), dim=1)
    ]
    return torch.cat(groups, dim=1).to(weight.dtype)


def _rounded_group(group: torch.Tensor, top: int) -> torch.Tensor:
    low, high = group.amin(dim=1, keepdim=True).clamp(max=0), group.amax(dim=1, keepdim=True).clamp(min=0)
    scale = (high - low) / top
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = (-low / scale).round()
    return ((group / scale).round().add(zero).clamp(0, top) - zero) * scale


def _merged_copy(model: nn.Module) -> Any:
    from peft import PeftModel

    copied: Any = own_copy(model)
    if isinstance(copied, PeftModel):
        copied = copied.merge_and_unload()
    return copied.eval().requires_grad_(False)


def _linear_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Parent, name and module of each linear layer inside the decoder layers."""
    found = [
        (parent, name, module)
        for parent in decoder_layers(model).modules()
        for name, module in parent.named_children()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    if not found:
        raise ValueError(f"`model` ({type(model).__name__}) has no linear layer in its decoder layers to quantise.")
    yield from found


def _experts(model: nn.Module) -> dict[nn.Parameter, bool]:
    """Weights `[experts, out, in]` that all experts of a layer share, and whether they are `[experts, in, out]` instead."""
    return {
        weight: bool(getattr(module, "is_transposed", type(module).__name__ in _TRANSPOSED))
        for module in decoder_layers(model).modules()
        if "Experts" in type(module).__name__
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3 and not name.endswith("bias")
    }


def _left(model: nn.Module, quantised: Container[nn.Parameter] = ()) -> tuple[str, ...]:
    """Names of the other weights of the decoder layers, without the layers' numbers; biases and norms are no weights here."""
    found = [
        name.partition(".")[2]
        for name, weight in decoder_layers(model).named_parameters()
        if weight.dim() > 1 and weight.is_floating_point() and weight not in quantised and not name.endswith("bias")
    ]
    return tuple(dict.fromkeys(found))


def _with_bitsandbytes(model: Any, bits: int) -> QuantizedModel:
    import bitsandbytes

    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_ONCE)
    if _experts(model):
        raise ValueError("experts that share a weight are not supported")
    count = 0
    for parent, name, layer in _linear_layers(model):
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"layers of type {type(layer).__name__} are not supported")
        weight, device = layer.weight.data, layer.weight.device
        new: Any
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        if bits == 4:
            new = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
            new.weight = bitsandbytes.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
        else:
            new = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
            new.weight = bitsandbytes.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        if layer.bias is not None:
            new.bias = nn.Parameter(layer.bias.data, requires_grad=False)
        setattr(parent, name, new.eval().to(device))  # it quantises when it moves
        count += 1
    _try_out(model)
    scheme = "nf4, blocks of 64" if bits == 4 else "LLM.int8(), one scale per row"
    return QuantizedModel(model, bits, "bitsandbytes", scheme, count, _left(model))


@torch.no_grad()
def _try_out(model: Any) -> None:
    """Kernels may be missing or refuse the model's widths, which only a forward shows."""
    ids = torch.arange(2, device=next(model.parameters()).device).expand(2, 2)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    if not logits.isfinite().all():
        raise ValueError("the quantised model's logits are not finite")
