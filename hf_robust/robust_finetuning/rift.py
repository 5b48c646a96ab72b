"""RiFT: give an adversarially trained classifier its accuracy back where that costs no robustness."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_robust.robust_finetuning.criticality import module_robust_criticality, weight_modules
from hf_robust.robust_finetuning.interpolation import has_lora, interpolate_weights
from hf_robust.sites import quiet
from hf_robust.threats import check_at_least

logger = logging.getLogger(__name__)

Collator = Callable[[list[Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class RiFTPoint:
    """
    A model between the two ends, on the held-out data.

    Attributes:
        alpha: share of the fine-tuned model.
        accuracy: share of clean examples classified rightly.
        robust_accuracy: share classified rightly under attack.
    """

    alpha: float
    accuracy: float
    robust_accuracy: float


@dataclass(frozen=True)
class RiFTResult:
    """
    What was fine-tuned and what was kept.

    Attributes:
        module: name of the module that was fine-tuned.
        criticality: of every module that was a candidate, in nats.
        alpha: share of the fine-tuned model in the model that was kept.
        curve: every α that was tried, rising.
    """

    module: str
    criticality: dict[str, float]
    alpha: float
    curve: list[RiFTPoint]


def rift(
    model: nn.Module,
    args: TrainingArguments,
    *,
    train_dataset: Any,
    attack: Any,
    held_out: float = 0.1,
    modules: Sequence[str] | None = None,
    alphas: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    tolerance: float = 0.001,
    radius: float = 0.1,
    steps: int = 10,
    data_collator: Collator = default_data_collator,
    batch_size: int = 64,
    seed: int = 0,
) -> RiFTResult:
    """
    Robust critical fine-tuning (RiFT; Zhu et al. 2023, arXiv 2308.02533): find the module on which robustness hangs least
    ([`~hf_robust.robust_finetuning.module_robust_criticality`]), fine-tune it alone on clean data with a plain `Trainer`,
    walk from the old weights to the new ones, and keep the point of highest accuracy that is as robust as before.

    All choices are made on a held-out part of the training data, which is not fine-tuned on; test data plays no part.

    Args:
        model: adversarially trained image classifier. Ends with the weights that were kept.
        args: of the fine-tuning. The paper: SGD, learning rate 0.001, momentum 0.9, weight decay 5e-4, 10 epochs.
        train_dataset: the training data, with length and rows by number, collated to `pixel_values` and `labels`.
        attack: object whose `perturb(model, pixel_values=…, labels=…)` returns δ, such as
            [`~hf_robust.attacks.PGD`].
        held_out: share of the training data that is held out.
        modules: candidates; those without trainable weights are left out. Default:
            [`~hf_robust.robust_finetuning.criticality.weight_modules`].
        alphas: shares of the fine-tuned model to try; 0, the model as it was, is always among them.
        tolerance: how far robust accuracy may lie below that of the model as it was. 0.001: the paper's 0.1 points.
        radius: see [`~hf_robust.robust_finetuning.module_robust_criticality`].
        steps: likewise.
        data_collator: makes a batch of rows. Default: transformers' `default_data_collator`.
        batch_size: rows in a batch of the measurements.
        seed: of the split.

    Returns:
        [`RiFTResult`].

    Raises:
        ValueError: too few rows to hold any out, no module to fine-tune, a model with LoRA adapters, or a value out of range;
            before anything is measured.
    """
    check_at_least("tolerance", tolerance, 0, "0.001 is the paper's.")
    check_at_least("batch_size", batch_size, 1, "Give the rows of a batch.")
    tried = sorted({0.0, *map(float, alphas)})
    if tried[0] < 0 or tried[-1] > 1:
        raise ValueError(f"`alphas={list(alphas)!r}` must lie in [0, 1]: 0 is the model as it was.")
    if has_lora(model.state_dict()):
        raise ValueError(
            "`model` has LoRA adapters, between two states of which the weights are no straight line: merge them "
            "(`merge_and_unload`) first."
        )
    names = weight_modules(model) if modules is None else _trainable(model, modules)
    if not names:
        raise ValueError(
            f"`modules={modules!r}` has no module with trainable weights: name modules of `model.named_modules()` to choose "
            "among, and set `requires_grad` of their weights."
        )
    tuned, kept = _split(train_dataset, held_out, seed)

    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and not args.use_cpu:
        model.to(accelerator)
    clean = _batches(model, kept, data_collator, batch_size)
    criticality = module_robust_criticality(
        model, adversarial_batches(model, attack, clean), modules=names, radius=radius, steps=steps
    )
    module = min(criticality, key=lambda name: criticality[name])
    logger.info("Least critical of %d modules: %s (%.4g nats).", len(names), module, criticality[module])

    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    _finetune(model, module, args, tuned, data_collator)
    after = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    curve = []
    for alpha in tried:
        model.load_state_dict(interpolate_weights(before, after, alpha))
        curve.append(RiFTPoint(alpha, *_accuracies(model, attack, clean)))
        logger.info("alpha %.2f: accuracy %.4f, robust %.4f", alpha, curve[-1].accuracy, curve[-1].robust_accuracy)
    best = best_point(curve, tolerance)
    model.load_state_dict(interpolate_weights(before, after, best.alpha))
    return RiFTResult(module, criticality, best.alpha, curve)


def best_point(curve: Sequence[RiFTPoint], tolerance: float) -> RiFTPoint:
    """
    The point of highest accuracy among those at most `tolerance` less robust than α = 0; of equal ones the nearest to it.

    Args:
        curve: rising in α, the first with α = 0.
        tolerance: share, at least 0.
    """
    # Robust accuracies are ratios of counts: without slack, 0.5 - 0.1 <= 0.4 fails in floating point
    floor = curve[0].robust_accuracy - tolerance - 1e-9
    return max((point for point in curve if point.robust_accuracy >= floor), key=lambda p: (p.accuracy, -p.alpha))


def adversarial_batches(
    model: nn.Module, attack: Any, batches: Sequence[Mapping[str, torch.Tensor]]
) -> list[dict[str, torch.Tensor]]:
    """
    The same batches under attack.

    Args:
        model: what is attacked, in evaluation mode meanwhile.
        attack: see [`rift`].
        batches: with `pixel_values`, `labels`, and other inputs of the model.
    """
    found = []
    with quiet(model):
        for batch in batches:
            delta = attack.perturb(model, **batch)
            pixels = batch["pixel_values"]
            found.append({**batch, "pixel_values": (pixels.float() + delta).to(pixels.dtype)})
    return found


def _trainable(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Those that can be fine-tuned. Frozen ones have criticality 0, and one would be chosen."""
    known = dict(model.named_modules())
    # An unknown name is refused where criticality is measured
    kept = [name for name in names if name not in known or any(p.requires_grad for p in known[name].parameters())]
    if len(kept) < len(names):
        logger.warning("No candidates, without trainable weights: %s.", sorted(set(names) - set(kept)))
    return kept


def _split(dataset: Any, held_out: float, seed: int) -> tuple[Any, Any]:
    """Training rows that are fine-tuned on, and those held out."""
    count = len(dataset)
    size = round(count * held_out)
    if not 0 < size < count:
        raise ValueError(
            f"`held_out={held_out!r}` of the {count} rows of `train_dataset` leaves nothing on one side: give a share between "
            "0 and 1 that leaves rows on both."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()

    def rows(places: list[int]) -> Any:
        places = sorted(places)
        return dataset.select(places) if hasattr(dataset, "select") else torch.utils.data.Subset(dataset, places)

    return rows(order[size:]), rows(order[:size])


def _batches(model: nn.Module, dataset: Any, collator: Collator, batch_size: int) -> list[dict[str, torch.Tensor]]:
    device = next(model.parameters()).device
    loader = torch.utils.data.DataLoader(dataset, batch_size=batch_size, collate_fn=collator)
    return [{name: value.to(device) for name, value in batch.items()} for batch in loader]


def _finetune(model: nn.Module, module: str, args: TrainingArguments, dataset: Any, collator: Collator) -> None:
    """Train one module alone; what else may be trained is as before afterwards."""
    prefix = f"{module}." if module else ""
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    # BatchNorm statistics elsewhere are part of the frozen model
    momentum = [
        (part, part.momentum)
        for name, part in model.named_modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and not f"{name}.".startswith(prefix)
    ]
    mode = model.training
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name] and name.startswith(prefix))
        for part, _ in momentum:
            part.momentum = 0.0
        Trainer(model=model, args=args, train_dataset=dataset, data_collator=collator).train()
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
            parameter.grad = None
        for part, value in momentum:
            part.momentum = value
        model.train(mode)


def _accuracies(model: nn.Module, attack: Any, batches: Sequence[Mapping[str, torch.Tensor]]) -> tuple[float, float]:
    """Share of rows that are classified rightly as they are, and as they are and under attack."""
    right = robust = count = 0
    attacked = adversarial_batches(model, attack, batches)
    with quiet(model), torch.no_grad():
        for clean, adversarial in zip(batches, attacked, strict=True):
            found = [_predict(model, batch) == batch["labels"] for batch in (clean, adversarial)]
            right += int(found[0].sum())
            robust += int((found[0] & found[1]).sum())
            count += len(found[0])
    return right / count, robust / count


def _predict(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    output = model(**{name: value for name, value in batch.items() if name != "labels"})
    return getattr(output, "logits", output).argmax(dim=-1)
