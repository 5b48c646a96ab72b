"""The model before training, which some losses of unlearning compare with."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from torch import nn
from trl.models import prepare_deepspeed, prepare_fsdp

from hf_robust.sites import adapter_off, quiet
from hf_robust.trainers.unlearn_checks import check_adapter_alone_is_trained


class ReferenceModel:
    """
    The model before training: of a model with an adapter the model without it, of another one a frozen copy.

    The copy is made at once, so this has to be built before training; a resumed run builds it from the same start.

    Args:
        model: the model to be trained, unwrapped.
        accelerator: the trainer's.
        copies: whether a copy may be made; without one, the reference of a full model is the model itself, and holds until it
            is trained.

    Raises:
        ValueError: weights outside the adapter are trained too.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, *, copies: bool = True):
        self._accelerator = accelerator
        self.copy: Any = None
        if is_peft_model(model):
            check_adapter_alone_is_trained(model)
        if copies and not is_peft_model(model):
            frozen: Any = copy.deepcopy(model)
            # TRL's forward of the trained model comes along with it, bound to the copy; nobody needs it there
            frozen.__dict__.pop("forward", None)
            frozen.eval().requires_grad_(False)
            kind = accelerator.distributed_type.value
            if kind == "DEEPSPEED":
                self.copy = prepare_deepspeed(frozen, accelerator)
            elif kind == "FSDP":
                self.copy = prepare_fsdp(frozen, accelerator)
            else:
                self.copy = accelerator.prepare_model(frozen, evaluation_mode=True)

    @contextlib.contextmanager
    def use(self, model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
        """
        The model before training, without dropout and without gradients.

        Args:
            model: the model of the training step, wrapped or not.

        Yields:
            What to call, and the same without its wrapper, for hooks.
        """
        if self.copy is not None:
            with torch.no_grad():
                yield self.copy, self._accelerator.unwrap_model(self.copy)
            return
        inner = self._accelerator.unwrap_model(model)
        with torch.no_grad(), quiet(inner), adapter_off(inner) if is_peft_model(inner) else contextlib.nullcontext():
            yield model, inner
