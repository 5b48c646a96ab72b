"""Module robust criticality: how much robustness hangs on the weights of one module."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from hf_robust.attacks.gradient import gradient_search
from hf_robust.sites import quiet
from hf_robust.threats import check_at_least

Batch = Mapping[str, torch.Tensor]


def weight_modules(model: nn.Module) -> list[str]:
    """
    Names of the modules whose own weights can be moved: those with a trainable parameter of at least two dimensions
    (linear, convolution, embedding), in the model's order.

    Args:
        model: any module.
    """
    return [
        name
        for name, module in model.named_modules()
        if any(p.requires_grad and p.dim() > 1 for p in module.parameters(recurse=False))
    ]


def module_robust_criticality(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    modules: Sequence[str] | None = None,
    radius: float = 0.1,
    steps: int = 10,
    loss: Callable[[nn.Module, Batch], torch.Tensor] | None = None,
) -> dict[str, float]:
    """
    Module robust criticality (MRC) of RiFT (Zhu et al. 2023, arXiv 2308.02533): how far the loss on given adversarial
    examples rises when the weights of one module move within a ball of L2 radius `radius`·‖θ_module‖, all others fixed. The
    module of lowest criticality can be fine-tuned at the least cost in robustness.

    The examples are made once, at the model as it is, and stay the same, as in the paper. The search is
    [`~hf_robust.attacks.gradient.gradient_search`] over the module's weights, steps of 2.5 · radius / steps along the
    normalised gradient; its best point counts, the starting point included: no criticality is below 0. A module without
    trainable weights (frozen, or an identity) has exactly 0.

    Args:
        model: image or text classifier. Unchanged afterwards.
        batches: adversarial examples with `labels`, as the model takes them: see
            [`~hf_robust.robust_finetuning.adversarial_batches`]. From a held-out part of the training data.
        modules: names from `model.named_modules()`; each includes its submodules. Default: [`weight_modules`].
        radius: of the ball, as a share of the norm of the module's weights. 0.1: the paper's.
        steps: gradient steps over all batches. 10: the paper's.
        loss: takes model and batch and returns the mean loss of the batch. Default: cross-entropy of `.logits` (or the
            output itself) against `labels`.

    Returns:
        Criticality of each module, in nats, in the order of `modules`.

    Raises:
        ValueError: no batches, an unknown module, or a value out of range.
    """
    check_at_least("radius", radius, 0, "0.1 is the paper's.")
    check_at_least("steps", steps, 1, "10 is the paper's.")
    if not batches:
        raise ValueError("`batches` is empty: give adversarial examples of a held-out part of the training data.")
    known = dict(model.named_modules())
    names = weight_modules(model) if modules is None else list(modules)
    for name in names:
        if name not in known:
            raise ValueError(f"`modules` has {name!r}, which is no module of the model; see `model.named_modules()`.")
    loss = classification_loss if loss is None else loss
    with quiet(model):
        return {name: _criticality(model, known[name], name, batches, radius, steps, loss) for name in names}


def classification_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """
    Mean cross-entropy of a batch.

    Args:
        model: returns logits, as `.logits` or as they are.
        batch: inputs and `labels`.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    output = model(**inputs)
    logits = getattr(output, "logits", output)
    return nn.functional.cross_entropy(logits.float(), batch["labels"])


def _criticality(
    model: nn.Module,
    module: nn.Module,
    name: str,
    batches: Sequence[Batch],
    radius: float,
    steps: int,
    loss: Callable[[nn.Module, Batch], torch.Tensor],
) -> float:
    prefix = f"{name}." if name else ""
    weights = {f"{prefix}{own}": p.detach() for own, p in module.named_parameters() if p.requires_grad}
    bound = radius * math.sqrt(sum(float(p.float().pow(2).sum()) for p in weights.values()))
    if bound == 0.0:  # no weights, or all of them zero: nothing within a ball relative to them
        return 0.0
    sizes = [p.numel() for p in weights.values()]
    count = sum(len(batch["labels"]) for batch in batches)
    wrapped = _Moved(model, loss)

    def raised(delta: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Minus the loss of the moved model, over all batches; activations are kept of one batch at a time."""
        parts = delta[0].split(sizes)
        moved = {key: p + part.view_as(p).to(p.dtype) for (key, p), part in zip(weights.items(), parts, strict=True)}
        total = 0.0 * delta.sum()  # a module that the loss does not use has the gradient 0
        for batch in batches:
            share = len(batch["labels"]) / count
            value = checkpoint(_call, wrapped, moved, batch, use_reentrant=False, preserve_rng_state=False)
            total = total + share * value.float()
        return -total[None], None

    device = next(iter(weights.values())).device
    found = gradient_search(
        raised,
        torch.zeros(1, sum(sizes), device=device),
        mask=torch.ones(1, 1, device=device),
        radius=bound,
        norm="l2",
        steps=steps,
        step_size=2.5 * bound / steps,
        step_rule="normalized",
    )
    return float(found.first_loss[0] - found.last_loss[0])


class _Moved(nn.Module):
    """A model's loss as a module, so that weights can be replaced whatever the loss calls of the model."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Batch], torch.Tensor]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.loss(self.model, batch)


def _call(wrapped: nn.Module, moved: Mapping[str, torch.Tensor], batch: Batch) -> Any:
    return functional_call(wrapped, {f"model.{name}": value for name, value in moved.items()}, (batch,))
