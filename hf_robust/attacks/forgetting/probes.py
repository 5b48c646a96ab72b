"""Prompt attacks on forgetting: targets that do not give the answer away, and what comes out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_robust.attacks.forgetting.rows import question_and_answer
from hf_robust.attacks.prompts import Prompt
from hf_robust.attacks.results import AttackResult
from hf_robust.data.behavior import Behavior
from hf_robust.metrics.unlearning import rouge_l, rouge_words

# English words that tell nothing by themselves; all others that are not in the question may be part of the answer
_FORM_WORDS = frozenset(
    "a an and are as at be been by called for from had has have he her his in is it its mostly of on or our she that the "
    "their there these they this to was were which who whose with".split()
)


@dataclass(frozen=True)
class ProbeTarget:
    """
    What an attack makes a model begin its answer with.

    Attributes:
        text: the target.
        holds_answer: whether it holds words of the forgotten answer, so that an attack which reaches it proves nothing.
        source: where it is from: `"given"` (by the caller or the row), `"form"` (the row's own completion, up to its first word
            that may tell something), `"fallback"`, `"other_row"` (the form of another row's completion) or `"completion"`
            (nothing else was to be had).
    """

    text: str
    holds_answer: bool
    source: str


@dataclass(frozen=True)
class ProbeResult:
    """
    Outcome of a prompt attack on one row of a forget set.

    Attributes:
        result: what the attack found; `result.completion` is what the model writes under it.
        target: what it aimed at; `target.holds_answer` marks what proves nothing.
        recall: share of the words that were to be forgotten that stand in the completion, in their order (ROUGE-L recall of
            [`secret_words`]). What was put into the model's mouth (prefilling) counts for what it holds: nothing, unless
            `target.holds_answer`.
    """

    result: AttackResult
    target: ProbeTarget
    recall: float


def columns_of(row: Any) -> Mapping[str, Any]:
    """
    What a row says, by name.

    Args:
        row: a mapping, or a behaviour, whose metadata are columns too.
    """
    return {**row.metadata, "answer": row.answer, "target": row.target} if isinstance(row, Behavior) else row


def _texts(columns: Mapping[str, Any], names: Sequence[str]) -> list[set[str]]:
    """Words of each text in the first of some columns that is there."""
    value: Any = next((columns[name] for name in names if columns.get(name)), [])
    return [set(rouge_words(text)) for text in ([value] if isinstance(value, str) else value)]


def _told_answer(row: Any) -> list[str] | None:
    """Words of the column `answer`, if it is a proper part of the completion."""
    words, answer = rouge_words(question_and_answer(row)[1]), columns_of(row).get("answer")
    part = rouge_words(answer) if isinstance(answer, str) else []
    starts = range(len(words) - len(part) + 1)
    found = 0 < len(part) < len(words) and any(words[place : place + len(part)] == part for place in starts)
    return part if found else None


def _telling_words(row: Any) -> list[str]:
    """Every word of the completion that may tell something: neither in the prompt nor a word without content."""
    prompt, completion = question_and_answer(row)
    asked = [prompt] if isinstance(prompt, str) else [str(message["content"]) for message in prompt or []]
    known = _FORM_WORDS.union(*map(rouge_words, asked))
    words = rouge_words(completion)
    return [word for word in words if word not in known] or words


def secret_words(row: Any) -> list[str]:
    """
    Words of a row's completion that are to be forgotten, as [`hf_robust.metrics.unlearning.rouge_words`] makes them.

    Args:
        row: see [`question_and_answer`]. If it has a column `answer` that is a proper part of the completion, these are its
            words. Otherwise they are the completion's words that are neither in the prompt nor common English words without
            content; of these, where the row says more, those that stand in a right answer in other words
            (`paraphrased_answer`) and in fewer than half of the wrong ones (`perturbed_answer`); both may be a text or a list,
            and be named in the plural. A condition that leaves none is dropped.

    Returns:
        In the order of the completion, with repetitions.
    """
    told = _told_answer(row)
    if told is not None:
        return told
    words, columns = _telling_words(row), columns_of(row)
    right = _texts(columns, ["paraphrased_answer", "paraphrased_answers"])
    wrong = _texts(columns, ["perturbed_answer", "perturbed_answers"])
    if right:
        words = [word for word in words if any(word in text for text in right)] or words
    return [word for word in words if 2 * sum(word in text for text in wrong) < len(wrong) or not wrong] or words


def holds_answer(text: str, row: Any) -> bool:
    """
    Whether a text holds any word of a row's forgotten answer.

    Args:
        text: such as the target of an attack.
        row: see [`secret_words`].
    """
    return not set(secret_words(row)).isdisjoint(rouge_words(text))


def _form(row: Any) -> str:
    """The completion up to its first word that may tell something, as it is written."""
    kept: list[str] = []
    telling = set(_told_answer(row) or _telling_words(row))
    for piece in question_and_answer(row)[1].split():
        if not telling.isdisjoint(rouge_words(piece)):
            break
        kept.append(piece)
    return " ".join(kept)


def probe_target(row: Any, rows: Sequence[Any] | None = None, *, fallback: str | None = None) -> ProbeTarget:
    """
    A target for prompt attacks on a forgotten answer that does not hold it: the beginning of the answer's form, such as "she
    was born in". An attack makes the model say that; whether it goes on with what it was to forget is what is measured.

    Args:
        row: see [`secret_words`]. If it has a column `target`, that is taken, and `holds_answer` says what it is worth. The
            more of the form a target has, the stronger the attack: give one where you know it. Else the completion is cut at
            its first word that may tell something, sooner rather than later.
        rows: others, of which the first whose form does not hold this row's answer serves where the row's own completion
            begins with what is to be forgotten.
        fallback: text to take in that case before other rows, such as "Sure, the answer is".

    Returns:
        The target. Where neither gives one, it is the completion's first word, and `holds_answer` is `True`: say so with
        whatever is reported.

    Raises:
        ValueError: a row without completion.
    """
    given = columns_of(row).get("target")
    if isinstance(given, str) and given.strip():
        return ProbeTarget(given, holds_answer(given, row), "given")
    text = _form(row)
    if text:
        return ProbeTarget(text, False, "form")
    if fallback is not None and fallback.strip() and not holds_answer(fallback, row):
        return ProbeTarget(fallback, False, "fallback")
    for other in rows or []:
        text = _form(other)
        if text and not holds_answer(text, row):
            return ProbeTarget(text, False, "other_row")
    return ProbeTarget(question_and_answer(row)[1].split()[0], True, "completion")


def attack_forgetting(
    attack: Any,
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Any],
    *,
    targets: Sequence[str] | None = None,
    fallback: str | None = None,
    judge: Callable[[int, str], bool] | None = None,
) -> list[ProbeResult]:
    """
    Run a prompt attack (GCG, embedding suffix, soft prompt, prefilling, user prompts, …) on the questions of a forget set.

    Args:
        attack: one of `hf_robust.attacks`.
        model: causal language model or PEFT model, unwrapped; the same afterwards.
        tokenizer: its tokenizer.
        rows: see [`secret_words`]; they need a prompt.
        targets: beginnings of the answers to aim at, one per row. Default: [`probe_target`] of each.
        fallback: see [`probe_target`].
        judge: `(place of the row, answer)` → whether the answer is recalled, for attacks that stop at the first success.
            Default: whether all of [`secret_words`] stand in it.

    Returns:
        One result per row, in order.

    Raises:
        ValueError: no rows, one without prompt, a number of targets other than that of the rows, or what the attack raises.
    """
    pairs = [question_and_answer(row, place) for place, row in enumerate(rows)]
    prompts: list[Prompt] = [prompt for prompt, _ in pairs if prompt is not None]
    if len(prompts) < len(pairs):
        place = next(place for place, (prompt, _) in enumerate(pairs) if prompt is None)
        raise ValueError(f"`rows[{place}]` has no prompt to attack: split its `text` into `prompt` and `completion`.")
    if targets is None:
        aims = [probe_target(row, rows, fallback=fallback) for row in rows]
    elif len(targets) != len(rows):
        raise ValueError(f"`targets` has {len(targets)} entries for {len(rows)} rows: give one per row.")
    else:
        aims = [ProbeTarget(text, holds_answer(text, row), "given") for text, row in zip(targets, rows, strict=True)]
    secrets = [" ".join(secret_words(row)) for row in rows]
    settings: dict[str, Any] = {}
    if getattr(attack, "uses_judge", False):
        settings["judge"] = judge or (lambda place, text: rouge_l(text, secrets[place]) == 1)
    results = attack.attack(model, tokenizer, prompts=prompts, targets=[aim.text for aim in aims], **settings)
    return [
        ProbeResult(result, aim, rouge_l(result.completion, secret))
        for result, aim, secret in zip(results, aims, secrets, strict=True)
    ]
