"""Relearning: fine-tuning on part of the forget text, and what comes back with it."""

import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_robust.attacks.forgetting.model_copy import own_copy
from hf_robust.attacks.forgetting.rows import ForgetTokens, forget_batch, forget_tokens
from hf_robust.attacks.prompts import check_counts, pad_id
from hf_robust.objectives import per_row_mean, token_nll
from hf_robust.sites import LabelIndex, keep_differentiable, label_logits, quiet
from hf_robust.threats import check_at_least, check_choice

logger = logging.getLogger(__name__)

RELEARN_METHODS = ("full", "lora")
Measure = Callable[[nn.Module], Mapping[str, float | None]]


@dataclass(frozen=True)
class RelearnPoint:
    """
    One point of a relearning curve.

    Attributes:
        step: optimizer steps so far; 0 is the model as it was given.
        loss: mean loss on the rows that are relearned, in nats per token, mean over rows; `None` where it is not finite.
        figures: what `measure` said of the model.
    """

    step: int
    loss: float | None
    figures: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class RelearnCurve:
    """
    What relearning at one learning rate brings back.

    Attributes:
        learning_rate: of AdamW, constant.
        method: `"full"` or `"lora"`.
        rows: number of rows relearned.
        batch_size: rows per step.
        rank: of the LoRA that was added; `None` for `"full"`, and where the model's own adapter was trained.
        seed: of the order of rows.
        points: at the steps asked for, in order; none after a loss that is not finite.
        diverged: whether the loss became infinite or NaN, so that the curve ends early.
        num_forwards: rows of forward passes that the training took.
        num_backwards: rows of backward passes.
        seconds: wall time of the training, measuring left out.
    """

    learning_rate: float
    method: str
    rows: int
    batch_size: int
    rank: int | None
    seed: int
    points: list[RelearnPoint]
    diverged: bool
    num_forwards: int
    num_backwards: int
    seconds: float


def split_forget_rows(rows: Sequence[Any], share: float = 0.5, *, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """
    A slice of the forget set to relearn from, and the rest, to see whether it comes back with it.

    Recall of the slice itself shows no more than that a model can be taught; that of the rest cannot be taught, only brought
    back ("Eight Methods to Evaluate Robust Unlearning in LLMs", arXiv 2402.16835; "Unlearning or Obfuscating?", arXiv
    2406.13356).

    Args:
        rows: the forget set, two rows at least. Rows that say the same in other words should be one row here.
        share: of the rows to relearn from, above 0 and below 1; at least one row is on each side. Default: half.
        seed: chooses them. The global random state is not touched.

    Returns:
        The slice and the rest, each in the order of `rows`.

    Raises:
        ValueError: fewer than two rows, or `share` out of range.
    """
    if len(rows) < 2:
        raise ValueError(f"`rows` has {len(rows)} entries: a slice and a rest take two at least.")
    if not 0 < share < 1:
        raise ValueError(f"`share={share!r}` must lie between 0 and 1: the part of the rows to relearn from.")
    count = min(len(rows) - 1, max(1, round(len(rows) * share)))
    drawn = set(torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count].tolist())
    return [rows[i] for i in range(len(rows)) if i in drawn], [rows[i] for i in range(len(rows)) if i not in drawn]


def relearn(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Any],
    *,
    steps: Sequence[int] = (0, 1, 2, 5, 10, 20, 50),
    learning_rates: Sequence[float] = (1e-5, 5e-5, 2e-4),
    method: str = "full",
    rank: int = 16,
    batch_size: int = 4,
    measure: Measure | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[RelearnCurve]:
    """
    Fine-tune copies of a model on forget text and measure it along the way. The model given is never changed.

    Plain fine-tuning: AdamW without weight decay at a constant learning rate, token-mean cross-entropy of the completions
    with their eos, no dropout, each row once per round in an order drawn from `seed`; activations are recomputed if the
    model does so (activation checkpointing). Full fine-tuning is done in float32
    whatever the model's dtype: in bfloat16 small steps are rounded away, and the attack would look weaker than it is. What
    `"lora"` trains keeps its dtype (a head that is saved beside the adapter has the base's), and its steps add up in float32.

    Args:
        model: causal language model or PEFT model, unwrapped. One copy of it exists at a time (in float32 for `"full"`).
        tokenizer: its tokenizer.
        rows: what is relearned, such as the first half of [`split_forget_rows`]: mappings with `prompt` and `completion`,
            `messages`, `question` and `answer`, or `text`.
        steps: numbers of optimizer steps after which to measure; 0 measures the model as it is. Default: ours.
        learning_rates: one curve each. No single one will do: what is weakest differs from model to model. Default: ours, for
            models of a billion parameters and more; small ones take larger.
        method: `"full"` trains every weight, adapters merged first; `"lora"` a new LoRA on all linear layers or, of a PEFT
            model, its own adapter. A quantised base takes `"lora"` only.
        rank: of the new LoRA, whose alpha is twice as much.
        batch_size: rows per step; all rows where there are fewer.
        measure: takes the model in evaluation mode and returns figures, such as recall on the rest of the forget set. It must
            not keep the model.
        seed: of the order of rows and of the new LoRA's weights. The global random state is not touched.
        progress: whether to show a progress bar.

    Returns:
        One curve for each learning rate, in order.

    Raises:
        ValueError: no rows, an argument out of range, or `"full"` on a quantised base.

    Example:

    ```python
    >>> taught, rest = split_forget_rows(forget_rows)
    >>> curves = relearn(model, tokenizer, taught, measure=lambda model: {"recall": recall_of(model, rest)})
    >>> strongest(curves, "recall")
    ```
    """
    check_choice("method", method, RELEARN_METHODS)
    check_counts(
        {
            "rank": (rank, 1, "Give the rank of the LoRA."),
            "batch_size": (batch_size, 1, "Give the rows per step."),
            **{f"steps[{place}]": (step, 0, "Use 0 for the model as it is.") for place, step in enumerate(steps)},
        }
    )
    if not len(steps) or not len(learning_rates):
        empty = "learning_rates" if len(steps) else "steps"
        raise ValueError(f"`{empty}` is empty: give at least one value.")
    for place, rate in enumerate(learning_rates):
        check_at_least(f"learning_rates[{place}]", rate, 0, "Give AdamW's learning rate.")
    tokens = forget_tokens(model, tokenizer, rows, end=True)
    wanted = sorted({int(step) for step in steps})
    curves = []
    with tqdm(total=wanted[-1] * len(learning_rates), desc="Relearning", disable=not progress) as bar:
        for rate in learning_rates:
            trained, new_rank = trainable_copy(model, method, rank=rank, seed=seed)
            curves.append(
                _curve(
                    trained, tokenizer, tokens, wanted, float(rate), method, new_rank, batch_size, measure, seed, bar
                )
            )
            del trained  # before the next copy
    return curves


def strongest(curves: Sequence[RelearnCurve], figure: str) -> tuple[float, RelearnCurve, RelearnPoint]:
    """
    The point at which most came back: the figure to report, as an attacker chooses learning rate and steps.

    Args:
        curves: of [`relearn`].
        figure: name of a figure that `measure` returned, higher for more recalled.

    Returns:
        The highest value, and the first curve and point at which it stands.

    Raises:
        ValueError: no point has that figure.
    """
    found = [
        (value, curve, point)
        for curve in curves
        for point in curve.points
        if (value := point.figures.get(figure)) is not None
    ]
    if not found:
        known = sorted({name for curve in curves for point in curve.points for name in point.figures})
        raise ValueError(f"`figure={figure!r}` is in no point; choose one of {known}, and let `measure` return it.")
    return max(found, key=lambda entry: entry[0])


def trainable_copy(model: nn.Module, method: str, *, rank: int, seed: int) -> tuple[nn.Module, int | None]:
    """
    A copy of a model in evaluation mode, of which just what an attacker trains takes gradients.

    Args:
        model: see [`relearn`]; nothing of it is shared with the copy.
        method: `"full"` or `"lora"`, see [`relearn`].
        rank: of a new LoRA.
        seed: of its weights.

    Returns:
        The copy, and the rank of the LoRA that was added, if one was.

    Raises:
        ValueError: `"full"` on a quantised base, or a PEFT model without an adapter to train.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    trained: Any = own_copy(model).eval()
    keep_differentiable(trained)
    for module in trained.modules():
        function: Any = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(function, "keywords", {}).get("use_reentrant"):  # gives a new adapter no gradient
            module._gradient_checkpointing_func = functools.partial(function, use_reentrant=False)
    if method == "full":
        if not all(parameter.is_floating_point() for parameter in trained.parameters()):
            raise ValueError("`method='full'` cannot train the whole numbers of a quantised base: use `method='lora'`.")
        if isinstance(trained, PeftModel):
            trained = trained.merge_and_unload()
        trained.float().requires_grad_(True)
        return trained, None
    trained.requires_grad_(False)
    added = None
    if isinstance(trained, PeftModel):
        trained.set_adapter(trained.active_adapter)
    else:
        added = rank
        # PEFT draws a LoRA's weights on the CPU
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
            trained = get_peft_model(trained, config)
    if not any(parameter.requires_grad for parameter in trained.parameters()):
        raise ValueError(
            "`method='lora'`: the model's own adapter has nothing to train. Merge it (`model.merge_and_unload()`) first."
        )
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16 and "lora_" in name:
            parameter.data = parameter.data.float()  # float16 gradients of small losses are zero; LoRA casts its inputs
    return trained.eval(), added


def _curve(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[ForgetTokens],
    wanted: Sequence[int],
    rate: float,
    method: str,
    rank: int | None,
    batch_size: int,
    measure: Measure | None,
    seed: int,
    bar: Any,
) -> RelearnCurve:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # In float32 the parameters themselves
    sums = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
    optimizer = torch.optim.AdamW(sums, lr=rate, weight_decay=0.0)
    device, padding = parameters[0].device, pad_id(model, tokenizer)
    size = min(batch_size, len(rows))
    batches = _batches(len(rows), size, seed)
    points: list[RelearnPoint] = []
    seconds, diverged, done = 0.0, False, 0
    for step in range(wanted[-1] + 1):
        if step in wanted:
            loss = _mean_loss(model, rows, size, padding, device)
            if loss is None:
                diverged = True
                logger.warning("Relearning at a learning rate of %g diverged after %d steps.", rate, step)
                bar.update(wanted[-1] - done)
                break
            points.append(RelearnPoint(step, loss, dict(measure(model)) if measure is not None else {}))
            model.eval()
        if step == wanted[-1]:
            break
        start = time.perf_counter()
        inputs, labels = forget_batch([rows[row] for row in next(batches)], padding=padding, device=device)
        index = LabelIndex.from_labels(labels)
        model.train()  # in evaluation mode nothing is recomputed, also where the model does so to save memory
        with quiet(model):
            nn.functional.cross_entropy(label_logits(model, index, **inputs), index.targets).backward()
        model.eval()
        _step(optimizer, parameters, sums)
        seconds += time.perf_counter() - start
        done += 1
        bar.update(1)
    return RelearnCurve(
        learning_rate=rate,
        method=method,
        rows=len(rows),
        batch_size=size,
        rank=rank,
        seed=seed,
        points=points,
        diverged=diverged,
        num_forwards=done * size,
        num_backwards=done * size,
        seconds=seconds,
    )


@torch.no_grad()
def _step(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], sums: Sequence[nn.Parameter]) -> None:
    """An optimizer step of `sums`, which share the memory of parameters in float32, and are rounded to the others."""
    for parameter, total in zip(parameters, sums, strict=True):
        total.grad = None if parameter.grad is None else parameter.grad.float()
        parameter.grad = None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for parameter, total in zip(parameters, sums, strict=True):
        if parameter.dtype != total.dtype:
            parameter.copy_(total)


def _batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of places, every row once per round."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while True:
        if len(order) < size:
            order += torch.randperm(count, generator=generator).tolist()
        taken, order = order[:size], order[size:]
        yield taken


@torch.no_grad()
def _mean_loss(
    model: nn.Module, rows: Sequence[ForgetTokens], size: int, padding: int, device: torch.device
) -> float | None:
    losses: list[float] = []
    for start in range(0, len(rows), size):
        inputs, labels = forget_batch(rows[start : start + size], padding=padding, device=device)
        index = LabelIndex.from_labels(labels)
        nll = token_nll(label_logits(model, index, **inputs), index.targets)
        losses += per_row_mean(nll, index.rows, index.counts).tolist()
    mean = math.fsum(losses) / len(losses)
    return mean if math.isfinite(mean) else None
