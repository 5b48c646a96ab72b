"""A small robustness evaluation in the middle of training, inside any Hugging Face trainer."""

import contextlib
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, extract_model_from_parallel
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_robust.data.behavior import Behavior
from hf_robust.report.report import Report
from hf_robust.threats import check_at_least

logger = logging.getLogger(__name__)

_PREFIX = "robustness/"


class RobustnessCallback(TrainerCallback):
    """
    Attacks the model every few steps, and in every evaluation of the trainer, and logs what comes out.

    After each of its evaluations, `trainer.state.log_history` (and so `trainer_state.json`) holds an entry with

    - `robustness/attack_success_rate/<attack>` for each attack, plain prompting (`plain`) included;
    - `robustness/attack_success_rate`: share of behaviours that at least one attack broke;
    - `robustness/refusal/<attack>`, and `robustness/refusal/none` without attack;
    - `robustness/over_refusal`, if `harmless` prompts are given.

    Callbacks are not told their trainer. After `callback.bind(trainer)` the entry goes through `trainer.log`, and with it to
    Weights & Biases, TensorBoard and the like.

    **Choosing the best checkpoint.** When the trainer evaluates, it hands its metrics to its callbacks before it compares
    them with the best so far. This one adds `eval_attack_success_rate`, `eval_attack_success_rate_<attack>`,
    `eval_refusal_<attack>` and `eval_over_refusal` there; so the trainer needs an `eval_dataset`, and

    ```python
    load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", eval_steps=100, save_steps=100,
    metric_for_best_model="eval_attack_success_rate", greater_is_better=False
    ```

    A model that refuses everything has a success rate of 0, too: look at `over_refusal` before you choose by it.

    Training is not changed by it: random states, gradients and the modes of the modules are the same afterwards. On several
    processes, all of them run the same evaluation in step, because the forwards of a sharded model (FSDP, ZeRO-3) need every
    process; the figures of the first one count on all. An attack must then not have a budget in seconds, which are over at
    different steps of the search on different processes.

    Args:
        behaviors ([`~hf_robust.data.behavior.Behavior`]s):
            What is attacked. A few dozen: every evaluation attacks them all.
        attacks (`dict[str, Any]`, *optional*):
            Attacks by the name that the log gives them. Default: plain prompting alone, which is always added.
        judge:
            Decides on success, see [`~hf_robust.metrics.judges.as_judge`].
        tokenizer (*optional*):
            Default: the trainer's `processing_class`.
        every_steps (`int`, *optional*):
            Optimizer steps between two evaluations. Default: only when the trainer evaluates.
        harmless (*optional*):
            Prompts that must not be refused.
        batch_size (`int`, defaults to `16`):
            Prompts at a time.
        max_new_tokens (`int`, defaults to `64`):
            Length of answers without attack; an attack has a `max_new_tokens` of its own.

    Raises:
        ValueError: no behaviours, or `every_steps` below 1. When training begins: an attack with `budget.seconds`, and weights
            that are split over processes.

    Example:

    ```python
    >>> callback = RobustnessCallback(
    ...     behaviors=read_behaviors("behaviors.jsonl")[:32],
    ...     attacks={"embedding": build_attack("embedding", epsilon=0.05)},
    ...     judge=StringJudge(),
    ...     every_steps=100,
    ... )
    >>> trainer = SFTTrainer(..., callbacks=[callback])
    >>> trainer.train()
    ```
    """

    def __init__(
        self,
        *,
        behaviors: Sequence[Behavior],
        judge: Any,
        attacks: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        every_steps: int | None = None,
        harmless: Sequence[Any] | None = None,
        batch_size: int = 16,
        max_new_tokens: int = 64,
    ):
        if not behaviors:
            raise ValueError("`behaviors` is empty: give the requests to attack, a few dozen for a small evaluation.")
        if every_steps is not None:
            check_at_least("every_steps", every_steps, 1, "Leave it out to evaluate when the trainer does.")
        self.behaviors, self.attacks, self.judge, self.tokenizer = (
            list(behaviors),
            dict(attacks or {}),
            judge,
            tokenizer,
        )
        self.every_steps, self.harmless = every_steps, harmless
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.last_report: Report | None = None
        self._trainer: Trainer | None = None
        # Step and figures of the last evaluation in a training that goes on: a trainer that evaluates at the same step, or
        # several datasets one after another, does not attack again. Outside training, steps do not tell weights apart.
        self._step: int | None = None
        self._figures: dict[str, float] = {}
        self._in_training = False

    def bind(self, trainer: Trainer) -> None:
        """
        Log through a trainer's own `log`, which also tells the trackers of `report_to`.

        Args:
            trainer: the trainer that this callback was given to.
        """
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an earlier training, whose steps had the same numbers."""
        self._check_budgets(args, kwargs.get("model"))
        self._step, self._in_training = None, True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluations after training are always new ones: the best checkpoint may have been loaded."""
        self._in_training = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate every `every_steps` optimizer steps."""
        if self.every_steps is not None and state.global_step % self.every_steps == 0:
            self._evaluate(args, state, **kwargs)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Evaluate with the trainer, and add the figures to the metrics by which it chooses the best checkpoint."""
        # By its run time, as SFTTrainer calls some figures `eval_` under every prefix. Checkpoints are chosen by `eval_` only.
        if metrics is None or not any(name.startswith("eval_") and name.endswith("_runtime") for name in metrics):
            return
        self._evaluate(args, state, **kwargs)
        for name, value in self._figures.items():
            metrics["eval_" + name.removeprefix(_PREFIX).replace("/", "_")] = value

    def _evaluate(
        self, args: TrainingArguments, state: TrainerState, model: Any = None, processing_class: Any = None, **_: Any
    ) -> None:
        if self._in_training and self._step == state.global_step:
            return
        self._check_budgets(args, model)
        from hf_robust.report.evaluation import evaluate_robustness

        tokenizer = self.tokenizer if self.tokenizer is not None else processing_class
        with _untouched(model):
            self.last_report = evaluate_robustness(
                extract_model_from_parallel(model),
                getattr(tokenizer, "tokenizer", tokenizer),
                behaviors=self.behaviors,
                attacks=self.attacks,
                judge=self.judge,
                harmless=self.harmless,
                batch_size=self.batch_size,
                max_new_tokens=self.max_new_tokens,
                progress=False,
            )
        shared = [figures_of(self.last_report)]
        if args.world_size > 1:
            broadcast_object_list(shared, from_process=0)
        self._step, self._figures = state.global_step, shared[0]
        if self._trainer is not None:
            self._trainer.log(dict(self._figures))
        else:
            state.log_history.append({**self._figures, "epoch": state.epoch, "step": state.global_step})
        logger.info("Step %d: %s", state.global_step, self._figures)

    def _check_budgets(self, args: TrainingArguments, model: Any) -> None:
        if args.world_size == 1 or model is None or not _is_split(model):
            return
        for name, attack in self.attacks.items():
            seconds = _seconds_of(attack)
            if seconds is not None:
                raise ValueError(
                    f"`attacks[{name!r}]` has a budget of `seconds={seconds!r}`, which are over at different steps of its "
                    "search on different processes, and with weights that are split over processes (FSDP, ZeRO-3) each forward "
                    "needs all of them: training would hang. Bound `forwards` or `backwards` instead."
                )


def figures_of(report: Report) -> dict[str, float]:
    """
    What the callback logs of a report.

    Args:
        report: of [`~hf_robust.report.evaluate_robustness`].

    Returns:
        Values by name, over all prompts; see [`RobustnessCallback`].
    """
    figures = {}
    for m in report.measurements:
        if m.metric == "attack_success_rate_any":
            figures[f"{_PREFIX}attack_success_rate"] = m.value
        elif m.metric in ("attack_success_rate", "refusal") and m.split == "all":
            figures[f"{_PREFIX}{m.metric}/{m.attack}"] = m.value
        elif m.metric == "over_refusal":
            figures[f"{_PREFIX}over_refusal"] = m.value
    if f"{_PREFIX}attack_success_rate" not in figures:  # one attack alone has no "any"
        rates = [value for name, value in figures.items() if name.startswith(f"{_PREFIX}attack_success_rate/")]
        if rates:
            figures[f"{_PREFIX}attack_success_rate"] = max(rates)
    return figures


def _is_split(model: torch.nn.Module) -> bool:
    """Whether a forward gathers weights from other processes: under FSDP2 and tensor parallelism, ZeRO-3, FSDP's version 1."""
    parts = any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters())
    return parts or any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def _seconds_of(attack: Any, seen: frozenset[int] = frozenset()) -> float | None:
    """Of an attack's budget, or of that of an attack inside it."""
    seen |= {id(attack)}
    values = getattr(attack, "__dict__", {}).values()
    inner = [value for value in values if callable(getattr(value, "attack", None)) and id(value) not in seen]
    found = [getattr(getattr(attack, "budget", None), "seconds", None), *(_seconds_of(value, seen) for value in inner)]
    return next((seconds for seconds in found if seconds is not None), None)


@contextlib.contextmanager
def _untouched(model: torch.nn.Module) -> Iterator[None]:
    """Put back what an evaluation, a judge or an attack of the user's might change: random states, gradients, modes."""
    python, numpy = random.getstate(), np.random.get_state()
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _, _ in gradients:
        parameter.grad = None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, training in modes:
            module.training = training
        for parameter, gradient, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
