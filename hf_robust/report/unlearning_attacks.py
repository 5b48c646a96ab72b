"""Attacks on what an unlearned model holds, as an evaluation runs them: relearning, quantisation, logit lens."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_robust.attacks.forgetting.logit_lens import logit_lens
from hf_robust.attacks.forgetting.quantization import QUANTIZERS, quantized
from hf_robust.attacks.forgetting.relearning import RELEARN_METHODS, relearn, split_forget_rows
from hf_robust.attacks.forgetting.rows import question_and_answer
from hf_robust.attacks.prompts import check_counts
from hf_robust.attacks.registry import ATTACKS
from hf_robust.data.behavior import Behavior
from hf_robust.report.evaluation_plan import settings_of
from hf_robust.report.evaluation_records import finite
from hf_robust.report.unlearning_rows import group_of
from hf_robust.threats import check_at_least, check_choice

_SHOWN = 5


@dataclass(frozen=True)
class Changed:
    """
    What was done to a model before it was asked.

    Attributes:
        steps: of fine-tuning; `None` where there was none.
        learning_rate: of fine-tuning; `None` likewise.
        trained_rows: rows forward and backward of the training.
        note: what else there is to say, such as the quantizer that ran; stands in the report as the attack's setting `ran`.
    """

    steps: int | None = None
    learning_rate: float | None = None
    trained_rows: int = 0
    note: str | None = None


class Relearning:
    """
    Fine-tune on a part of the forget set and ask for the rest: what comes back was not forgotten, only hidden.

    With `source="retain"` or `rows` the control: the same training on other text. See
    [`~hf_robust.attacks.forgetting.relearn`].

    Args:
        steps: numbers of optimizer steps after which the model is asked; 0 is asked, too.
        learning_rates: each gives a curve of its own. The defaults are for models of a billion parameters and more; small
            ones take larger.
        method: `"full"` or `"lora"`, which a quantised base needs.
        share: part of the forget questions that is trained on; the others are measured. Questions of one `group` stay
            together.
        source: `"forget"` or `"retain"`: what is trained on; of the retain set as many rows, the first.
        rows: other rows to train on, instead; none of those that are asked, nor of their `group`.
        batch_size: rows per step.
        seed: of the choice of rows and of their order.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        steps: Sequence[int] = (1, 2, 5, 10, 20, 50),
        learning_rates: Sequence[float] = (1e-5, 5e-5, 2e-4),
        method: str = "full",
        share: float = 0.5,
        source: str = "forget",
        rows: Sequence[Any] | None = None,
        batch_size: int = 4,
        seed: int = 0,
    ):
        check_choice("source", source, ("forget", "retain"))
        check_choice("method", method, RELEARN_METHODS)
        check_counts({"batch_size": (batch_size, 1, "Give the number of rows per step.")})
        if not steps or not learning_rates:
            raise ValueError(f"`steps={steps!r}` and `learning_rates={learning_rates!r}` need one value each at least.")
        for count in steps:
            check_counts({"steps": (count, 0, "Give numbers of optimizer steps.")})
        for rate in learning_rates:
            check_at_least("learning_rates", rate, 0, "Give learning rates such as 1e-5.")
        if not 0 < share < 1:
            raise ValueError(
                f"`share={share!r}` must lie between 0 and 1: some questions are trained on, others asked."
            )
        self.steps = sorted({0, *steps})
        self.learning_rates, self.method, self.share = list(learning_rates), method, share
        self.source = source if rows is None else "rows"
        self.batch_size, self.seed = batch_size, seed
        self._rows = None if rows is None else list(rows)
        if self._rows is not None:
            self.rows_digest = hashlib.sha256(repr(self._rows).encode()).hexdigest()

    def measured(self, forget: Sequence[Behavior]) -> list[Behavior]:
        """
        The forget questions that are asked: those that are not trained on. They are the same whatever is trained on, so that
        the control compares.

        Args:
            forget: all of them.

        Raises:
            ValueError: there are too few to split.
        """
        groups = [group_of(question) for question in forget]
        _, asked = split_forget_rows(list(dict.fromkeys(groups)), self.share, seed=self.seed)
        return [question for question, group in zip(forget, groups, strict=True) if group in asked]

    def trained(self, forget: Sequence[Behavior], retain: Sequence[Behavior]) -> list[Any]:
        """
        The rows that are trained on.

        Args:
            forget: all forget questions.
            retain: the retain set.

        Raises:
            ValueError: `rows` holds questions that are asked afterwards, or others of their `group`.
        """
        if self._rows is not None:
            given, groups = {_said(row) for row in self._rows}, {_group(row) for row in self._rows}
            both = [q.id for q in self.measured(forget) if _said(q) in given or group_of(q) in groups]
            if both:
                raise ValueError(
                    f"`rows` holds {len(both)} of the questions that are asked afterwards, or others of their `group` "
                    f"({', '.join(both[:_SHOWN])}{', …' if len(both) > _SHOWN else ''}): the attack would teach what it "
                    "measures. Leave them out."
                )
            return self._rows
        asked = {question.id for question in self.measured(forget)}
        rows = [question for question in forget if question.id not in asked]
        return rows if self.source == "forget" else list(retain)[: len(rows)]

    def taught(self, forget: Sequence[Behavior], retain: Sequence[Behavior]) -> set[str]:
        """
        Ids of the retain questions that are trained on, or whose `group` is: what is said of utility leaves them out.

        Args:
            forget: all forget questions.
            retain: the retain set.

        Raises:
            ValueError: see [`trained`].
        """
        rows = self.trained(forget, retain)
        if self.source == "forget":
            return set()
        said, groups = {_said(row) for row in rows}, {_group(row) for row in rows}
        return {q.id for q in retain if _said(q) in said or group_of(q) in groups}

    def change(
        self,
        model: nn.Module,
        tokenizer: Any,
        forget: Sequence[Behavior],
        retain: Sequence[Behavior],
        measure: Callable[[nn.Module], None],
    ) -> list[Changed]:
        """
        Measure the model after each number of steps; the model itself is left alone.

        Args:
            model: causal language model or PEFT model, unwrapped.
            tokenizer: its tokenizer.
            forget: all forget questions.
            retain: the retain set.
            measure: asks a changed model, which it must not keep.

        Returns:
            What was done before each measurement, in order. A learning rate that makes the loss infinite has fewer.
        """

        def silent_measure(changed: nn.Module) -> dict[str, float | None]:
            measure(changed)
            return {}

        rows, whole = self.trained(forget, retain), len(forget) - len(self.measured(forget))
        note = None
        if len(rows) < whole:
            note = f"{len(rows)} rows were trained on, where relearning of the forget set has {whole}"
        curves = relearn(
            model,
            tokenizer,
            rows,
            steps=self.steps,
            learning_rates=self.learning_rates,
            method=self.method,
            batch_size=self.batch_size,
            measure=silent_measure,
            seed=self.seed,
            progress=False,
        )
        return [
            Changed(point.step, curve.learning_rate, point.step * curve.batch_size, note)
            for curve in curves
            for point in curve.points
        ]


def _group(row: Any) -> str | None:
    """The `group` of a row that has one."""
    given = row.metadata if isinstance(row, Behavior) else row
    group = given.get("group") if isinstance(given, Mapping) else None
    return None if group is None else str(group)


def _said(row: Any) -> str:
    """Prompt and completion, case and white space aside."""
    prompt, completion = question_and_answer(row)
    asked = [prompt or ""] if not isinstance(prompt, list) else [str(message["content"]) for message in prompt]
    return " ".join(" ".join([*asked, completion]).casefold().split())


class Quantization:
    """
    Round the weights to few bits and ask again: small changes of weights vanish in rounding (arXiv 2410.16454).

    See [`~hf_robust.attacks.forgetting.quantized`].

    Args:
        bits: 4 or 8.
        method: quantizer; `"auto"` takes an existing one where it runs.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, *, bits: int = 4, method: str = "auto"):
        check_choice("method", method, QUANTIZERS)
        if bits not in (4, 8):
            raise ValueError(f"`bits={bits!r}` must be 4 or 8.")
        self.bits, self.method = bits, method

    def measured(self, forget: Sequence[Behavior]) -> list[Behavior]:
        """The forget questions that are asked: all of them."""
        return list(forget)

    def change(
        self,
        model: nn.Module,
        tokenizer: Any,
        forget: Sequence[Behavior],
        retain: Sequence[Behavior],
        measure: Callable[[nn.Module], None],
    ) -> list[Changed]:
        """Measure a quantised copy; see [`Relearning.change`]."""
        found = quantized(model, bits=self.bits, method=self.method)
        measure(found.model)
        left = f"; left as they were: {', '.join(found.left)}" if found.left else ""
        return [Changed(note=f"{found.method}: {found.scheme}{left}")]


class LogitLensProbe:
    """
    Read the forgotten answers off after each layer: see [`~hf_robust.attacks.forgetting.logit_lens`].

    Args:
        batch_size: questions in a forward.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, *, batch_size: int = 8):
        check_counts({"batch_size": (batch_size, 1, "Give the number of questions in a forward.")})
        self.batch_size = batch_size

    def probe(self, model: nn.Module, tokenizer: Any, forget: Sequence[Behavior]) -> list[dict[str, Any]]:
        """
        What each layer would answer.

        Args:
            model: causal language model or PEFT model, unwrapped; the same afterwards.
            tokenizer: its tokenizer.
            forget: questions.

        Returns:
            For each question `id` and `layers`: after each layer the probability of the answer that the judge looks for where
            it stands in the completion, else of the whole completion, to the power of 1 / its tokens (`None` where it is
            not finite).
        """
        found = logit_lens(model, tokenizer, forget, batch_size=self.batch_size)
        return [
            {"id": question.id, "layers": finite(log_probs.mean(dim=1).exp().tolist())}
            for question, log_probs in zip(forget, found.log_probs, strict=True)
        ]


# On the command line and in reports, beside the attacks on prompts
_FORGETTING: dict[str, Any] = {
    "relearn": Relearning, "quantize": Quantization, "logit_lens": LogitLensProbe,
}  # fmt: skip


def forgetting_attacks() -> dict[str, Any]:
    """Every attack that an evaluation of unlearning takes by name: on prompts, on weights, and the look inside."""
    return {**ATTACKS, **_FORGETTING}


def forgetting_settings_of(attack: Any) -> dict[str, Any]:
    """
    Settings of an attack as JSON values: see [`~hf_robust.report.evaluation_plan.settings_of`]. `attack` is its name on the
    command line.

    Args:
        attack: of any kind.
    """
    found = settings_of(attack)
    name = {cls: name for name, cls in _FORGETTING.items()}.get(type(attack))
    return found if name is None else {"class": found.pop("class"), "attack": name, **found}


def not_run(attacks: Mapping[str, Any]) -> list[str]:
    """
    Names of the attacks of this library that an evaluation leaves out.

    Args:
        attacks: those that it runs. The questions without attack are `plain`.
    """
    kinds = {type(attack) for attack in attacks.values()}
    return [name for name, cls in forgetting_attacks().items() if cls not in kinds and name != "plain"]
