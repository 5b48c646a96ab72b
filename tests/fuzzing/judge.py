"""Whether an error tells a user what to mend, and whether a model was left as it was found."""

import re
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

_ROOT = Path(__file__).resolve().parents[2]
_OURS = (f"{_ROOT / 'hf_robust'}/", f"{_ROOT / 'trainers'}/")
# Forwards and hooks run under this file; by then it is too late for an error to be about an argument
_MODULE_CALLS = "/torch/nn/modules/module.py"
_CLEAR = (ValueError, TypeError, ImportError, NotImplementedError, FileNotFoundError)


class Hang(BaseException):
    """A case ran past its deadline; not an `Exception`, which somebody might handle."""


@dataclass(frozen=True)
class Upstream:
    """
    An error of a dependency that is clear enough as it is: where it is raised, what it says, why it may pass, and whether it
    may come from inside a forward.
    """

    where: str
    says: str
    why: str
    inside: bool = False


# What dependencies check themselves before the first step, in words that name the argument.
UPSTREAM: tuple[Upstream, ...] = (
    Upstream(
        "/transformers/models/",
        r"Input image size \(.*\) doesn't match model",
        "names both sizes; only the model knows whether it takes others than its configuration's",
        inside=True,
    ),
    Upstream(
        "/trl/trainer/", r"Unsupported truncation mode: .*, expected", "names the option, its value and the known ones"
    ),
    Upstream("/trl/trainer/", r"Unknown loss type: .* Should be one of", "DPOTrainer's: the value and the known ones"),
    Upstream("/transformers/", r"is not a valid SchedulerType", "of `lr_scheduler_type`: the value and the known ones"),
    Upstream("numpy/random/", r"Seed must be between", "numpy's, of `seed`, which transformers hands over"),
    Upstream("/trl/trainer/", r"`\w[^`]*`.*\.", "TRL's checks in its constructors name the argument and the remedy"),
)


def complaint(error: BaseException) -> str | None:
    """
    What is wrong with an error that a trainer raised; `None` if it is clear.

    Clear is a `ValueError`, `TypeError`, `ImportError`, `NotImplementedError` or `FileNotFoundError` (none of their
    subclasses, which something deeper raises) that our code raised outside all forwards and hooks, and whose message names an
    argument, column or field in backquotes; or one of `UPSTREAM`.

    Args:
        error: as it was caught.
    """
    if isinstance(error, Hang):
        return f"hang: {error}"
    files = [frame.f_code.co_filename for frame in _frames(error)]
    raised_in = files[-1] if files else ""
    inside = any(_MODULE_CALLS in file for file in files)
    for known in UPSTREAM:
        if known.where in raised_in and re.search(known.says, str(error), re.DOTALL) and known.inside >= inside:
            return (
                None if isinstance(error, ValueError | TypeError | NotImplementedError) else f"{type(error).__name__}"
            )
    if inside:
        return "raised inside a forward or a hook"
    if not raised_in.startswith(_OURS):
        return f"raised by {raised_in}, which is neither ours nor known to be clear"
    if type(error) not in _CLEAR:
        return f"{type(error).__name__} is no error that says what to mend"
    if not re.search(r"`\w[^`]*`", str(error)):
        return "the message names no argument, column or field in backquotes"
    if isinstance(error, KeyError | IndexError | AttributeError):
        return f"{type(error).__name__} comes from a place that did not expect it"
    return None


def _frames(error: BaseException) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


class Snapshot:
    """
    What a trainer must not change for good if it refuses, and what it may change if it trains.

    Args:
        model: the model before the trainer has it.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._modes = {name: module.training for name, module in model.named_modules()}
        self._trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._hooks = _hooks(model)

    def leftovers(self, *, refused: bool, trained: nn.Module | None = None) -> list[str]:
        """
        What is not as it should be.

        Args:
            refused: whether the trainer raised: then modes and `requires_grad` must be the old ones.
            trained: the model with an adapter, if one was made; its weights are looked at too.
        """
        found = []
        for kind, now in _hooks(self._model).items():
            if now != self._hooks[kind]:
                found.append(f"{kind}: {now} instead of {self._hooks[kind]}")
        if refused:
            modes = {name: module.training for name, module in self._model.named_modules()}
            trains = {name: parameter.requires_grad for name, parameter in self._model.named_parameters()}
            found += [f"mode of {name!r} changed" for name in _changed(self._modes, modes)]
            found += [f"requires_grad of {name!r} changed" for name in _changed(self._trained, trains)]
        for model in (self._model, trained):
            for name, parameter in model.named_parameters() if model is not None else ():
                if not bool(torch.isfinite(parameter).all()):
                    found.append(f"weight {name!r} is not finite")
        return found[:5]


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name, value in before.items() if after.get(name, value) != value][:2]


def _hooks(model: nn.Module) -> dict[str, int]:
    """Number of hooks by kind, but for those that transformers puts onto a model once and for all to record its states."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        kind: sum(
            not str(getattr(hook, "__module__", "")).startswith("transformers.")
            for module in model.modules()
            for hook in getattr(module, kind).values()
        )
        for kind in kinds
    }
