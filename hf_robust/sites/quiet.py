"""A model without randomness, its activation checkpointing still on."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


def check_not_reentrant(model: nn.Module) -> None:
    """
    Raise if the model recomputes activations in PyTorch's reentrant way, which allows no `torch.autograd.grad`.

    Raises:
        ValueError: reentrant checkpointing is on; the message says how to switch to the other kind.
    """
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) and module.training:
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant"):
                raise ValueError(
                    "`use_reentrant=True`: reentrant activation checkpointing allows no gradient with respect to a "
                    "perturbation. Set `gradient_checkpointing_kwargs={'use_reentrant': False}`."
                )


def keep_differentiable(model: nn.Module) -> None:
    """
    Keep bitsandbytes' 4-bit layers on a CPU in a form that gradients pass through.

    Where the CPU has AVX512-BF16, bitsandbytes (0.50) repacks a layer's weight in its first forward in evaluation mode, for a
    kernel that has no backward: every later gradient would silently stop there, in plain training too. The repacking is
    switched off, and undone where it has happened. To be removed once that kernel has a backward.

    Args:
        model: any module; without such layers nothing changes.
    """
    layers: list[Any] = [m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            layer.state_dict()  # puts the weight back into the form that it is saved in


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """
    Silence dropout (functional attention dropout and layer drop included) and NEFTune noise inside the context.

    `model.eval()` would also switch activation checkpointing off and raise the peak memory of an attack, so the mode is
    lowered module by module: a module that checkpoints keeps its mode and has its dropout rates set to 0 instead.
    Everything is put back on exit, also after an error. 4-bit layers on a CPU are kept differentiable for good, see
    [`keep_differentiable`].

    Args:
        model: any module; in evaluation mode nothing else changes.
    """
    changed: list[tuple[nn.Module, str, object]] = []

    def put(module: nn.Module, name: str, value: object) -> None:
        changed.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    keep_differentiable(model)
    try:
        for module in model.modules():
            if not module.training:
                continue
            if getattr(module, "gradient_checkpointing", False):
                for name, value in list(vars(module).items()):
                    if isinstance(value, float) and value != 0.0 and ("drop" in name or "jitter" in name):
                        put(module, name, 0.0)
            else:
                put(module, "training", False)
        yield
    finally:
        for module, name, value in reversed(changed):
            setattr(module, name, value)
