"""A PEFT model without its adapter."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def same_trained(model: nn.Module) -> Iterator[None]:
    """
    On exit, what `requires_grad` says of every parameter is what it said on entry, by name.

    Args:
        model: any module.
    """
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        _mark(model, before)


@contextlib.contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """
    The model without its adapter inside the context, which parameters are trained being the same inside and afterwards.

    PEFT's own context freezes the adapter's weights on entry and makes all of them trainable on exit, also those that were
    frozen. Under FSDP2 the weights outside its layers would stay frozen: they are gathered from the first forward inside to
    the next backward, and it is the gathered ones that would be made trainable again.

    Args:
        model: a PEFT model, unwrapped.
    """
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with same_trained(model), model.disable_adapter():
        _mark(model, before)
        yield


def _mark(model: nn.Module, trained: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        # Adapters that wrap whole modules take the wrapping off, and with it change names
        wanted = trained.get(name, parameter.requires_grad)
        if parameter.requires_grad != wanted:
            parameter.requires_grad_(wanted)
