"""AutoAttack of its authors, through `pyautoattack`: called by that name only where it is the standard set."""

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hf_robust.attacks.gradient import SearchResult
from hf_robust.attacks.vision.classifier import check_labels, class_numbers, logits_of
from hf_robust.report.vision_attacks import checked_units
from hf_robust.sites import PixelUnits
from hf_robust.sites.pixels import check_epsilon
from hf_robust.threats import check_choice

#: The standard set: APGD on the cross-entropy, targeted APGD on the DLR loss, targeted FAB, Square.
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
PARTS = (*STANDARD, "apgd-dlr", "fab")
_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
_TARGETS = 9
# The targeted DLR loss divides by a difference to the third and fourth logit
_MIN_CLASSES = {"apgd-t": 4, "apgd-dlr": 3}


class PyAutoAttack:
    """
    AutoAttack (Croce & Hein 2020, arXiv 2003.01690), run by the package `pyautoattack`: 100 iterations of APGD on the
    cross-entropy, of targeted APGD-DLR and targeted FAB against the 9 classes of highest logits, and 5000 queries of
    Square, each from the clean image, each on the images that those before it left standing: the pointwise worst case.

    Only the standard set of parts on at least 10 classes in the norm L∞ or L2 is AutoAttack and has that [`name`];
    anything else has the names of its parts.

    Args:
        epsilon: radius in raw [0, 1] pixels.
        norm: `"linf"`, `"l2"` or `"l1"`.
        parts: of `"apgd-ce"`, `"apgd-t"`, `"fab-t"`, `"square"` (the standard set), `"apgd-dlr"`, `"fab"`; run in this order.
        image_processor: of `pixel_values` that are normalised. Default: they are raw pixels.
        seed: of every part.

    Raises:
        ImportError: `pyautoattack` is not installed.
        ValueError: an unknown part or norm, no part, or a radius that is none of raw pixels.
    """

    def __init__(
        self,
        *,
        epsilon: float,
        norm: str = "linf",
        parts: Sequence[str] = STANDARD,
        image_processor: Any = None,
        seed: int = 0,
    ):
        check_choice("norm", norm, list(_NORMS))
        check_epsilon(epsilon, norm)
        if isinstance(parts, str) or not parts:
            raise ValueError(f"`parts={parts!r}` must be a list of at least one of {', '.join(map(repr, PARTS))}.")
        for part in parts:
            check_choice("parts", part, PARTS)
        _import()
        self.epsilon, self.norm, self.parts, self.seed = epsilon, norm, tuple(parts), seed
        self.image_processor = image_processor

    def name(self, num_classes: int) -> str:
        """
        What the attack may be called.

        Args:
            num_classes: of the model.

        Returns:
            `"AutoAttack"` for the standard set, else the names of the parts.
        """
        standard = sorted(self.parts) == sorted(STANDARD)
        if standard and num_classes > _TARGETS and self.norm in ("linf", "l2"):
            return "AutoAttack"
        return " + ".join(self.parts)

    def perturb(self, model: Any, *, pixel_values: torch.Tensor, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """δ in the shape of `pixel_values`, float32; 0 where nothing was found."""
        return self.search(model, pixel_values=pixel_values, labels=labels, **inputs).delta

    def search(
        self, model: Any, *, pixel_values: torch.Tensor, labels: torch.Tensor, **inputs: Any
    ) -> "AutoAttackResult":
        """
        Attack a batch. Neither weights, gradients nor the global random state are touched.

        Args:
            model: classifier.
            pixel_values: `[batch, channels, height, width]`.
            labels: `[batch]`.
            inputs: further inputs of the model.

        Returns:
            [`~hf_robust.attacks.gradient.SearchResult`] with `warnings`, what the package warns of. `num_forwards` and
            `num_backwards` count rows divided by the batch, rounded up; there are no losses.

        Raises:
            ValueError: too few classes for a part, or as [`~hf_robust.attacks.PGD.perturb`], of pixels and labels.
        """
        package = _import()
        units = checked_units(self, pixel_values)
        labels = class_numbers(labels, pixel_values)
        clean = pixel_values.float()
        raw = units.to_raw(clean).clamp(0, 1)
        wrapped = _RawModel(model, units, inputs)
        with torch.no_grad():
            logits = wrapped(raw[:1])
        check_labels(labels, logits, "ce")
        classes = logits.shape[-1]
        for part in self.parts:
            if classes < _MIN_CLASSES.get(part, 2):
                raise ValueError(
                    f"`parts` has {part!r}, which needs {_MIN_CLASSES[part]} classes; the model has {classes}: leave it out."
                )
        wrapped.forwards = wrapped.backwards = 0
        devices = [raw.device] if raw.device.type == "cuda" else []
        with _frozen(model), _untraced(), torch.random.fork_rng(devices=devices), _warnings() as messages:
            attack = package.AutoAttack(
                wrapped, norm=_NORMS[self.norm], eps=self.epsilon, seed=self.seed, device=raw.device, version="standard"
            )
            attack.verbose = False
            attack.attacks_to_run = list(self.parts)
            for targeted in (attack.apgd_targeted, attack.fab):
                targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
            found, said = attack.run_standard_evaluation(raw, labels, batch_size=len(raw))
        hit = said.to(labels.device) != labels
        moved = (found != raw).flatten(1).any(dim=1).view(-1, *[1] * (raw.dim() - 1))
        delta = torch.where(moved, units.from_raw(found.detach().float()) - clean, torch.zeros_like(clean))
        batch = len(raw)
        forwards, backwards = (-(-count // batch) for count in (wrapped.forwards, wrapped.backwards))
        nan = clean.new_full((batch,), torch.nan)
        return AutoAttackResult(
            delta=delta,
            first_loss=nan,
            last_loss=nan,
            losses=clean.new_zeros(0, batch),
            non_finite=~delta.flatten(1).isfinite().all(dim=1),
            hit=hit,
            num_forwards=forwards,
            num_backwards=backwards,
            evaluations=torch.full((batch,), forwards, device=clean.device),
            warnings=list(dict.fromkeys(messages)),
        )


class AutoAttackResult(SearchResult):
    """A search's result with what the package warned of."""

    def __init__(self, *, warnings: list[str], **values: Any):
        super().__init__(**values)
        self.warnings = warnings


class _RawModel(nn.Module):
    """A classifier as AutoAttack takes it: raw pixels in, logits out; counts the rows that pass."""

    def __init__(self, model: Any, units: PixelUnits, inputs: dict[str, Any]):
        super().__init__()
        self.forwards = self.backwards = 0
        self._call = lambda raw: logits_of(model, units.from_raw(raw), **inputs)

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        self.forwards += len(raw)
        logits = self._call(raw)
        if logits.requires_grad:
            self.backwards += len(raw)
        return logits


def _import() -> Any:
    try:
        import pyautoattack
    except ImportError as error:
        raise ImportError("AutoAttack needs pyautoattack: `pip install 'hf_robust[eval]'`.") from error
    return pyautoattack


@contextlib.contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """FAB calls `backward`, which would fill the weights' gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    """The package's check for dynamic defences ends whatever traces this thread (debuggers, coverage)."""
    before = sys.gettrace()
    try:
        yield
    finally:
        sys.settrace(before)


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """What the package warns of, in a list instead of the log."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                messages.append(record.getMessage())

    logger, handler = logging.getLogger("auto-attack"), Keep()
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.propagate = propagate
        logger.removeHandler(handler)
