"""Where training time goes: data, attack, outer forward, backward, optimizer, and what is left."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainerCallback

from hf_robust.data.redaction import redacted
from hf_robust.threats import check_at_least, check_count, check_number

PHASES = ("data", "attack", "forward", "backward", "optimizer", "other")

# Fields of the parents that they take as they come: out of range they end in an error far from here, or in weights of NaN
_PARENT_FIELDS: tuple[tuple[str, Callable[..., None], int, str], ...] = (
    ("learning_rate", check_at_least, 0, "1e-5 is a usual rate."),
    ("weight_decay", check_at_least, 0, "Use 0 for none."),
    ("warmup_steps", check_at_least, 0, "Give steps, or a share of the training below 1."),
    ("label_smoothing_factor", check_at_least, 0, "Use 0 for none."),
    ("neftune_noise_alpha", check_at_least, 0, "Leave it unset for no noise."),
    ("per_device_train_batch_size", check_count, 1, "Give the rows of a batch on one device."),
    ("gradient_accumulation_steps", check_count, 1, "Use 1 to update at each batch."),
    ("max_length", check_count, 1, "Use `None` to cut nothing."),
    ("seed", check_count, 0, "Give a number below 2**32."),
)
_OPTIONAL = ("max_length", "neftune_noise_alpha")


@dataclass
class RunArguments:
    """
    Fields of every configuration of this library.

    Parameters:
        profile (`bool`, defaults to `False`):
            Log the shares of the wall time since the last log that went into `profile/data` (batches, collation),
            `profile/attack` (the inner search), `profile/forward` (of the loss that trains), `profile/backward`,
            `profile/optimizer` (clipping and update) and `profile/other` (all else, evaluation and checkpoints too); they add
            up to 1. Time is that of the main process. On an accelerator each change of phase waits for the device, which costs
            a few percent: leave it off but for measuring.
    """

    profile: bool = field(
        default=False, metadata={"help": "Log the shares of time of data, attack, forward, backward and optimizer."}
    )

    def __post_init__(self) -> None:
        for name, check, least, remedy in _PARENT_FIELDS:
            value = getattr(self, name, least)
            if value is not None or name not in _OPTIONAL:
                check(name, value, least, remedy)
        norm = getattr(self, "max_grad_norm", 0)  # at most 0 it clips nothing; infinite, it is logged besides
        if isinstance(norm, bool) or not isinstance(norm, int | float) or norm != norm:
            raise ValueError(f"`max_grad_norm={norm!r}` must be a number. Use 0 to clip nothing.")
        epochs = getattr(self, "num_train_epochs", 0)
        check_number("num_train_epochs", epochs, "Give the number of epochs.")
        if getattr(self, "max_steps", 1) <= 0:  # steps override epochs
            check_at_least("num_train_epochs", epochs, 0, "Give the number of epochs.")
        smoothing = getattr(self, "label_smoothing_factor", 0)
        if smoothing > 1:
            raise ValueError(
                f"`label_smoothing_factor={smoothing!r}` must be at most 1: it is a share. Use 0 for none."
            )
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()

    def __getstate__(self) -> dict[str, Any]:
        """State without access tokens: the Trainer pickles its arguments into the folder that `push_to_hub` sends."""
        return redacted(self.__dict__, None)

    def to_dict(self) -> dict[str, Any]:
        """The parent's values without access tokens in mappings such as `model_init_kwargs`: they go to the trackers."""
        return redacted(super().to_dict(), None)  # type: ignore[misc]

    def __str__(self) -> str:
        """The fields without access tokens."""
        shown = redacted({f.name: getattr(self, f.name) for f in fields(self)})
        lines = [f"{name}={shown[name]},\n" for name in sorted(shown)]
        return f"{type(self).__name__}(\n{''.join(lines)})"

    __repr__ = __str__


class Phases:
    """
    Time spent in phases. Each moment belongs to the innermost one, and outside all of them to `other`.

    Args:
        device: is waited for at every change.
        clock: tells seconds.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self._device, self._clock = device, clock
        self._open: list[str] = []
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._since = clock()

    def _settle(self) -> None:
        """Give the time since the last change to the phase that it was spent in."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = self._clock()
        self._seconds[self._open[-1] if self._open else "other"] += now - self._since
        self._since = now

    def enter(self, name: str) -> None:
        """Begin a phase inside the present one; whatever an attack does is attack."""
        self._settle()
        if name == "attack" and not self._open:
            name = "other"  # of an evaluation
        self._open.append("attack" if "attack" in self._open else name)

    def leave(self) -> None:
        """End the innermost phase."""
        self._settle()
        self._open.pop()

    def read(self) -> dict[str, float]:
        """Shares of the time since the last read, which add up to 1; starts anew."""
        self._settle()
        total = sum(self._seconds.values())
        shares = {f"profile/{name}": seconds / total if total else 0.0 for name, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return shares


class _UpdateCallback(TrainerCallback):
    """Tells the phases when the optimizer updates."""

    def __init__(self, phases: Phases):
        self.phases = phases

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.phases.enter("optimizer")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.phases.leave()


@contextlib.contextmanager
def watched(trainer: Any) -> Iterator[Phases]:
    """
    Training goes inside: the trainer's methods are timed until the end of the context. Evaluation counts as `other`.

    Args:
        trainer: its attack is what runs inside its `_stopwatch`, if it has one.
    """
    phases = Phases(trainer.accelerator.device)
    places = [
        (trainer, "get_batch_samples", "data"),
        (trainer, "training_step", "other"),
        (trainer, "compute_loss", "forward"),
        (trainer, "forget_loss", "forward"),
        (trainer, "_clip_grad_norm", "optimizer"),
        (trainer.accelerator, "backward", "backward"),
    ]
    places = [place for place in places if hasattr(place[0], place[1])]
    users = [(owner, name, vars(owner)[name]) for owner, name, _ in places if name in vars(owner)]
    for owner, name, phase in places:
        setattr(owner, name, _timed(getattr(owner, name), phase, phases, trainer))
    stopwatch, callback = getattr(trainer, "_stopwatch", None), _UpdateCallback(phases)
    if stopwatch is not None:
        stopwatch.phases = phases
    trainer.add_callback(callback)
    try:
        yield phases
    finally:
        trainer.remove_callback(callback)
        if stopwatch is not None:
            stopwatch.phases = None
        for owner, name, _ in places:
            delattr(owner, name)  # the class's own method shows again
        for owner, name, method in users:
            setattr(owner, name, method)


def _timed(function: Callable[..., Any], phase: str, phases: Phases, trainer: Any) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        # The first step's batches are fetched, and the step begins, before the model is put into training mode
        if phase == "forward" and not trainer.model.training:
            return function(*args, **kwargs)
        phases.enter(phase)
        try:
            return function(*args, **kwargs)
        finally:
            phases.leave()

    return timed
