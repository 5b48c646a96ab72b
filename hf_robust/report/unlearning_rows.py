"""Questions of an unlearning evaluation, and what is kept of each: the answer and how likely the right one is."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_robust.attacks.forgetting.probes import probe_target
from hf_robust.attacks.forgetting.rows import ForgetTokens, forget_batch, question_and_answer
from hf_robust.attacks.generation import encode_prompts, evaluating, generate
from hf_robust.attacks.prompts import max_positions, pad_id, render_prompts
from hf_robust.data.behavior import Behavior
from hf_robust.data.behaviors_file import behaviors_digest
from hf_robust.metrics.judges import Judge
from hf_robust.metrics.unlearning import extraction_strength, min_k_score, rouge_l, rouge_words, truth_ratio
from hf_robust.report.evaluation_records import Row, finite
from hf_robust.sites import LabelIndex, label_logits

_SHOWN_IDS = 8
_FORMS = "Give rows with `prompt` and `completion` (text or messages), `question` and `answer`, `messages`, or `text`."
# What a row may say besides its question: other ways to say the right answer, and wrong answers of its form
PARAPHRASED, PERTURBED = "paraphrased_answer", "perturbed_answers"
# … and whether these very words were trained on
TRAINED = "trained"


def as_questions(rows: Any, argument: str) -> list[Behavior]:
    """
    Rows of a dataset as questions: `prompt`, the right completion in `metadata["completion"]`, and what a judge looks for in
    `answer`.

    Args:
        rows: `datasets.Dataset`, or a list of mappings or behaviours. `prompt` and `completion` (text or messages), `question`
            and `answer` (as in TOFU), `messages`, or `text`, of which the first half of the words is the prompt. Optional:
            `answer` (beside `completion`: the words that matter of it; default: all of it), `target` (the beginning of the
            completion that attacks aim at; default: [`~hf_robust.attacks.forgetting.probes.probe_target`]), `id`,
            `category`, `group` (the same for rows that ask for the same thing: relearning on one of them gives the others
            away, and forget quality counts them once), `paraphrased_answer` and `perturbed_answers` (or the other number; text,
            or a list of texts), `trained` (false for a row of the forget set whose words no model was trained on, such as
            another phrasing of one that was: membership inference leaves it out).
        argument: name of the argument, for errors.

    Raises:
        ValueError: no rows, a row without question or answer, a `trained` that is neither true nor false, or ids given twice.
    """
    if isinstance(rows, str | Mapping) or not hasattr(rows, "__len__") or not len(rows):
        raise ValueError(f"`{argument}={rows!r}` must be a dataset or list with at least one row. {_FORMS}")
    found = [_question(row, place, argument) for place, row in enumerate(rows)]
    seen: set[str] = set()
    twice = [row.id for row in found if row.id in seen or seen.add(row.id)]  # type: ignore[func-returns-value]
    if twice:
        raise ValueError(
            f"`{argument}` has ids more than once: {', '.join(map(repr, twice[:_SHOWN_IDS]))}. Give each row an id of its own."
        )
    aims = {row.id: probe_target(row, found) for row in found if row.target is None}
    return [row if row.target is not None else dataclasses.replace(row, target=aims[row.id].text) for row in found]


def _question(row: Any, place: int, argument: str) -> Behavior:
    if isinstance(row, Behavior):
        row = {**row.metadata, **{name: value for name, value in vars(row).items() if name != "metadata"}}
    try:
        prompt, completion = question_and_answer(row, place)
    except ValueError as error:
        raise ValueError(str(error).replace("`rows[", f"`{argument}[", 1)) from error
    if prompt is None:  # plain text: its first half asks for the second
        ends = [word.end() for word in re.finditer(r"\S+", completion)]
        if len(ends) < 2:
            raise ValueError(f"`{argument}[{place}]` has a text of {len(ends)} words: it needs two to be continued.")
        # With its line breaks and indentation, as it was trained on
        half = ends[len(ends) // 2 - 1]
        prompt, completion = completion[:half], completion[half:]
    if not rouge_words(completion):
        raise ValueError(
            f"`{argument}[{place}]` has the completion {completion!r} without a word to recall. Leave it out."
        )
    answer, target = row.get("answer"), row.get("target")
    extra: dict[str, Any] = {"completion": completion}
    if row.get("group") is not None:
        extra["group"] = str(row["group"])
    trained = row.get(TRAINED)
    if isinstance(trained, str):  # of a csv file
        trained = {"true": True, "1": True, "false": False, "0": False, "": None}.get(trained.strip().lower(), trained)
    if trained not in (None, True, False):
        raise ValueError(
            f"`{argument}[{place}]` has `{TRAINED}={row[TRAINED]!r}`: give true or false, or leave it out."
        )
    if trained is not None and not trained:
        extra[TRAINED] = False
    for key, other in ((PARAPHRASED, "paraphrased_answers"), (PERTURBED, "perturbed_answer")):
        given = row.get(key) or row.get(other)
        if given:
            extra[key] = [given] if isinstance(given, str) else [str(text) for text in given]
    return Behavior(
        id=f"row_{place}" if row.get("id") is None else str(row["id"]),
        prompt=prompt,
        target=target.strip() if isinstance(target, str) and target.strip() else None,
        category=None if row.get("category") is None else str(row["category"]),
        answer=answer.strip() if isinstance(answer, str) and answer.strip() else completion.strip(),
        metadata=extra,
    )


def is_trained(question: Behavior) -> bool:
    """
    Whether the words of a forget question were trained on, as far as its row says.

    Args:
        question: of [`as_questions`].
    """
    return bool(question.metadata.get(TRAINED, True))


def group_of(question: Behavior) -> str:
    """
    What a question shares with others that ask for the same thing: its `group`, or its own id.

    Args:
        question: of [`as_questions`].
    """
    return str(question.metadata.get("group", question.id))


def questions_digest(questions: Sequence[Behavior]) -> str:
    """
    Fingerprint of questions, their whole right answers included: see
    [`~hf_robust.data.behaviors_file.behaviors_digest`].

    Args:
        questions: of [`as_questions`].
    """
    return behaviors_digest([dataclasses.replace(q, id=f"{q.id}: {sorted(q.metadata.items())}") for q in questions])


def ask(
    model: nn.Module,
    tokenizer: Any,
    behaviors: Sequence[Behavior],
    judge: Judge,
    *,
    max_new_tokens: int,
    batch_size: int,
    truth_ratios: bool = True,
) -> list[Row]:
    """
    Ask questions and measure what the model still knows of their answers.

    Args:
        model: causal language model or PEFT model, unwrapped. Its mode and random state are the same afterwards.
        tokenizer: the model's tokenizer.
        behaviors: of [`as_questions`].
        judge: decides whether an answer is the right one.
        max_new_tokens: length of an answer at most.
        batch_size: rows in a forward.
        truth_ratios: whether the wrong answers are read, too, which takes most of the time.

    Returns:
        For each question a row: `id`; `result` and `verdict` as of an attack, with the greedy answer; `scores`: `rouge`
        (ROUGE-L recall of the completion), `probability` (of the completion, to the power of 1 / its tokens), `extraction`
        (extraction strength), `min_k` (Min-K% of the completion's log-probabilities, k = 20 %), and `truth_ratio` where the
        row has perturbed answers and they are asked for (`None` where a value is not finite).
    """
    prompts = [behavior.prompt for behavior in behaviors]
    encoded = encode_prompts(tokenizer, prompts, max_length=max_positions(model))
    answers = generate(model, tokenizer, encoded, max_new_tokens=max_new_tokens, batch_size=batch_size)
    verdicts = judge(behaviors, [answer.text for answer in answers])
    wanted = [behavior.metadata["completion"] for behavior in behaviors]
    scored = score_answers(model, tokenizer, prompts, wanted, batch_size=batch_size)
    ratios = _truth_ratios(model, tokenizer, behaviors, batch_size) if truth_ratios else [None] * len(behaviors)
    rows = []
    for place, (behavior, answer, verdict) in enumerate(zip(behaviors, answers, verdicts, strict=True)):
        losses, right = scored[place]
        whole = all(map(math.isfinite, losses))  # a model gone to NaN has no probabilities
        scores = {
            "rouge": rouge_l(answer.text, wanted[place]),
            "probability": math.exp(-math.fsum(losses) / len(losses)) if whole else None,
            "extraction": extraction_strength(right),
            "min_k": min_k_score([-loss for loss in losses]) if whole else None,
            "truth_ratio": ratios[place],
        }
        result: dict[str, Any] = {
            "completion": answer.text, "error": None, "truncated": not answer.finished, "losses": [], "num_forwards": 0,
            "num_backwards": 0, "num_generations": 0, "seconds": 0.0,
        }  # fmt: skip
        rows.append(
            {
                "id": behavior.id,
                "result": result,
                "verdict": finite(dataclasses.asdict(verdict)),
                "scores": finite(scores),
            }
        )
    return rows


@torch.no_grad()
def score_answers(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Any], answers: Sequence[str], *, batch_size: int
) -> list[tuple[list[float], list[bool]]]:
    """
    How a model reads given answers, token by token.

    Args:
        model: causal language model or PEFT model, unwrapped.
        tokenizer: its tokenizer.
        prompts: texts or conversations.
        answers: one for each.
        batch_size: rows in a forward.

    Returns:
        For each answer the losses of its tokens, in nats (float32), and whether each token is the most likely one, given those
        before it.
    """
    rendered = render_prompts(
        tokenizer, prompts=prompts, targets=answers, suffix_length=0, init=None, max_length=max_positions(model)
    )
    rows = [ForgetTokens([*row.prompt_ids(), *row.target], len(row.prompt_ids())) for row in rendered]
    device, padding = next(model.parameters()).device, pad_id(model, tokenizer)
    found: list[tuple[list[float], list[bool]]] = []
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            inputs, labels = forget_batch(batch, padding=padding, device=device)
            index = LabelIndex.from_labels(labels)
            logits = label_logits(model, index, **inputs)
            losses = torch.nn.functional.cross_entropy(logits, index.targets, reduction="none").clamp(min=0).tolist()
            right = (logits.argmax(dim=-1) == index.targets).tolist()
            begin = 0
            for row in batch:
                end = begin + len(row.ids) - row.start
                found.append((losses[begin:end], right[begin:end]))
                begin = end
    return found


def _begun_as(completion: str, behavior: Behavior, text: str) -> str:
    """An answer set apart from a plain prompt as the completion is; a chat template does so itself."""
    if not isinstance(behavior.prompt, str):
        return text
    return completion[: len(completion) - len(completion.lstrip())] + text.lstrip()


def _truth_ratios(
    model: nn.Module, tokenizer: Any, behaviors: Sequence[Behavior], batch_size: int
) -> list[float | None]:
    """Truth ratio of each question that has perturbed answers."""
    asked: list[tuple[int, bool, Any, str]] = []
    for place, behavior in enumerate(behaviors):
        wrong = behavior.metadata.get(PERTURBED)
        if wrong:
            completion = behavior.metadata["completion"]
            right = behavior.metadata.get(PARAPHRASED) or [completion]
            for is_right, texts in ((True, right), (False, wrong)):
                asked += [(place, is_right, behavior.prompt, _begun_as(completion, behavior, text)) for text in texts]
    if not asked:
        return [None] * len(behaviors)
    prompts, texts = [entry[2] for entry in asked], [entry[3] for entry in asked]
    scored = score_answers(model, tokenizer, prompts, texts, batch_size=batch_size)
    means: dict[int, dict[bool, list[float]]] = {}
    for (place, right, _, _), (losses, _) in zip(asked, scored, strict=True):
        means.setdefault(place, {True: [], False: []})[right].append(math.fsum(losses) / len(losses))
    return [
        truth_ratio(means[place][True], means[place][False])
        if place in means and all(map(math.isfinite, [*means[place][True], *means[place][False]]))
        else None
        for place in range(len(behaviors))
    ]
