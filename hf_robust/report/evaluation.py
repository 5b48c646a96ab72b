"""Attack a model, judge what comes out, see what is left for its users: one report, resumed where it was interrupted."""

import contextlib
import copy
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_robust.attacks.plain import PlainPrompt
from hf_robust.attacks.registry import ATTACKS
from hf_robust.attacks.results import AttackResult
from hf_robust.data.behavior import Behavior
from hf_robust.data.behaviors_file import behaviors_digest, write_behaviors
from hf_robust.data.redaction import describe_error, redacted
from hf_robust.metrics.arithmetic import exact_matches
from hf_robust.metrics.judges import Judge, Verdict, as_judge
from hf_robust.metrics.likelihood import text_losses
from hf_robust.metrics.refusals import is_refusal
from hf_robust.report.evaluation_figures import costs, problem, share, success_rates, summary, text_perplexity
from hf_robust.report.evaluation_plan import check_plan, describe_tokenizer, fingerprint, model_name, settings_of
from hf_robust.report.evaluation_records import Records, Row, row_of
from hf_robust.report.flags import find_flags
from hf_robust.report.rebuild import precision_of
from hf_robust.report.report import Measurement, Report, describe_environment
from hf_robust.sites import quiet
from hf_robust.threats import check_at_least

logger = logging.getLogger(__name__)

# Names in a report that mean something else than an attack
_RESERVED = ("none", "any")
_SHOWN_IDS = 8


@dataclass(frozen=True)
class Stage:
    """
    A pass over a list of prompts, in fixed batches.

    Attributes:
        name: of the attack; of what is no attack, with an underscore before it.
        behaviors: what it is over.
        batch_size: behaviours in a batch, the unit of work that is kept.
        run: makes the rows of a batch.
        required: whether a stage that fails on every behaviour ends the run.
    """

    name: str
    behaviors: list[Behavior]
    batch_size: int
    run: Callable[[list[Behavior]], list[Row]]
    required: bool = True


def evaluate_robustness(
    model: nn.Module,
    tokenizer: Any,
    *,
    behaviors: Sequence[Behavior],
    attacks: Mapping[str, Any],
    judge: Any,
    harmless: Sequence[Any] | None = None,
    utility: Sequence[Any] | None = None,
    perplexity_texts: Sequence[str] | None = None,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    subject: str = "model",
    batch_size: int = 16,
    max_new_tokens: int = 128,
    training_hashes: Collection[str] | None = None,
    progress: bool = True,
) -> Report:
    """
    Robustness of a chat model: what attacks get out of it, and what it still does for its users.

    The behaviours are cut into fixed batches. With `output_dir`, each finished batch is kept there, and the same call
    after an interruption goes on where it was: the report is that of an uninterrupted run, timings aside. A batch that
    fails is run again one behaviour at a time, so that only those that fail by themselves are recorded with an error; they
    count in no share. An attack whose class says `needs_all_behaviors` (one suffix for all) gets all behaviours as one batch.

    Args:
        model: causal language model or PEFT model, unwrapped. Its mode and random state are the same afterwards.
        tokenizer: the model's tokenizer.
        behaviors: what is attacked, ids all different.
        attacks: by the name that the report gives them: see [`hf_robust.attacks.registry.build_attack`]. Plain prompting
            is added as `"plain"`, the baseline, unless it is among them. Progress bars of their own are switched off.
        judge: decides on success from the answer: see [`hf_robust.metrics.judges.as_judge`].
        harmless: prompts to count refusals of (`over_refusal`): behaviours, rows with a `prompt`, or prompts.
        utility: questions with one right answer (`utility`, exact match, white space aside): behaviours or rows with
            `prompt` and `answer`, or pairs of both.
        perplexity_texts: plain texts for the `perplexity`, each cut at the model's positions.
        output_dir: folder of the records (`records/<attack>/<batch>.json`), `plan.json`, `behaviors.jsonl` (and
            `harmless.jsonl`, `utility.jsonl`) and `report.json`. `None`: nothing is written.
        overwrite: discard what another evaluation left in `output_dir` instead of raising.
        subject: what the report calls the model.
        batch_size: prompts in a batch, the unit of work that is kept.
        max_new_tokens: length at most of answers without attack; an attack has a `max_new_tokens` of its own. 128 is the
            attacks' default.
        training_hashes: hashes of the prompts that the model was trained on, see
            [`hf_robust.data.provenance.read_training_prompts`]; behaviours among them are flagged.
        progress: whether to show a progress bar.

    Returns:
        The report: `attack_success_rate` of each attack, over all behaviours and by category,
        `attack_success_rate_any`, `refusal` under each attack and without, `cost_per_success`, and what `harmless`,
        `utility` and `perplexity_texts` give; `runs` with what each attack spent; `flags`.

    Raises:
        ValueError: no behaviours or ids given twice; a behaviour without a target where an attack needs one; conversations
            with a tokenizer that has no chat template; an output folder of another evaluation; or an attack that failed on
            every behaviour.
        TypeError: `judge` or an attack cannot be called.
    """
    check_at_least("batch_size", batch_size, 1, "Give the number of prompts of a batch.")
    check_at_least("max_new_tokens", max_new_tokens, 1, "Give the length of an answer.")
    judge, attacks = as_judge(judge), _with_baseline(attacks, max_new_tokens)
    plain = PlainPrompt(max_new_tokens=max_new_tokens)
    attacked = _as_behaviors(behaviors, "behaviors")
    users = {
        name: _as_behaviors(rows, name)
        for name, rows in (("harmless", harmless), ("utility", utility), ("perplexity_texts", perplexity_texts))
        if rows is not None
    }
    _check(tokenizer, attacked, attacks, users)

    def attack_rows(attack: Any, decide: Judge | None) -> Callable[[list[Behavior]], list[Row]]:
        return lambda batch: attacked_rows(model, tokenizer, attack, batch, decide)

    stages = []
    for name, attack in attacks.items():
        # One suffix for all behaviours is not to be found in parts of them
        size = len(attacked) if getattr(attack, "needs_all_behaviors", False) else batch_size
        stages.append(Stage(name, attacked, size, attack_rows(attack, judge)))
    for name, listed in users.items():
        if name == "perplexity_texts":
            stages.append(Stage(f"_{name}", listed, batch_size, lambda batch: _nll_rows(model, tokenizer, batch)))
        else:
            stages.append(Stage(f"_{name}", listed, batch_size, attack_rows(plain, None)))

    settings = {name: settings_of(attack) for name, attack in attacks.items()}
    folder = None if output_dir is None else Path(output_dir)
    records = Records(None if folder is None else folder / "records", [stage.name for stage in stages])
    description = {"name": judge.name, "settings": redacted(judge.settings)}
    data = {**_describe_data(attacked, users, batch_size, max_new_tokens), **precision_of(model)}
    if folder is not None:
        if overwrite:
            records.discard()
            (folder / "plan.json").unlink(missing_ok=True)
        plan = {
            "model": fingerprint(model), "tokenizer": describe_tokenizer(tokenizer), "subject": subject, "data": data,
            "attacks": settings, "judge": description,
        }  # fmt: skip
        check_plan(folder / "plan.json", plan)
        for name, listed in {"behaviors": attacked, **users}.items():
            write_behaviors(folder / f"{name}.jsonl", listed)

    with quiet(model), silent([*attacks.values(), plain]):
        rows, seconds = run_stages(stages, records, progress)
    under_attack = {name: rows[name] for name in attacks}
    report = Report(
        title=f"Robustness of {model_name(model)}",
        method={},
        base_model=model_name(model),
        attacks=settings,
        not_run=[name for name, cls in ATTACKS.items() if cls not in {type(attack) for attack in attacks.values()}],
        data=data,
        measurements=[
            *_measure_attacks(subject, attacked, under_attack, attacks),
            *_measure_users(subject, users, rows),
        ],
        costs={f"seconds: {name.lstrip('_')}": round(value, 3) for name, value in seconds.items()},
        environment=describe_environment(),
        runs=[summary(name, settings[name], under_attack[name]) for name in attacks],
        judge={**description, "refusals": "beginnings of answers, hf_robust.metrics.refusals.REFUSAL_PREFIXES"},
    )
    has_template = bool(getattr(tokenizer, "chat_template", None))
    report.flags = find_flags(
        report,
        behaviors=attacked,
        harmless=users.get("harmless", ()),
        has_chat_template=has_template,
        training_hashes=training_hashes,
    )
    if folder is not None:
        report.save(folder / "report.json")
    return report


# What is asked for ----------------------------------------------------------------------------------------------------


def _is_baseline(attack: Any) -> bool:
    """Plain prompting with the one most likely answer."""
    return isinstance(attack, PlainPrompt) and attack.num_samples == 1 and attack.temperature == 0


def _with_baseline(attacks: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
    for name, attack in attacks.items():
        if not callable(getattr(attack, "attack", None)) or isinstance(attack, type):
            raise TypeError(
                f"`attacks[{name!r}]={attack!r}` is no attack: give an object with a method `attack`, such as "
                "hf_robust.attacks.GCG()."
            )
        if name in _RESERVED:
            raise ValueError(
                f"`attacks` has the name {name!r}, which stands for something else in a report: rename it."
            )
    if any(_is_baseline(attack) for attack in attacks.values()):
        return dict(attacks)
    name = "plain" if "plain" not in attacks else "plain, one answer"
    return {name: PlainPrompt(max_new_tokens=max_new_tokens), **attacks}


def _as_behaviors(rows: Sequence[Any], argument: str) -> list[Behavior]:
    """Behaviours of a list of behaviours, mappings with `prompt`, (prompt, answer) tuples, or prompts."""
    if isinstance(rows, str | Mapping):
        raise ValueError(f"`{argument}` must be a list with one entry per prompt, not {type(rows).__name__}.")
    known = {field.name for field in dataclasses.fields(Behavior)}
    found = []
    for index, row in enumerate(rows):
        if isinstance(row, Behavior):
            found.append(row)
        elif isinstance(row, Mapping):
            if "prompt" not in row:
                raise ValueError(f"`{argument}[{index}]` has no `prompt`; it has {list(row)}.")
            given = {name: value for name, value in row.items() if name in known and value is not None}
            found.append(Behavior(**{"id": f"row_{index}", **given}))
        elif isinstance(row, tuple) and len(row) == 2:
            found.append(Behavior(id=f"row_{index}", prompt=row[0], answer=row[1]))
        elif isinstance(row, str | list):
            found.append(Behavior(id=f"row_{index}", prompt=row))
        else:
            raise ValueError(f"`{argument}[{index}]={row!r}` is no prompt: give text, messages or a Behavior.")
    return found


def _check(
    tokenizer: Any, behaviors: list[Behavior], attacks: Mapping[str, Any], users: Mapping[str, list[Behavior]]
) -> None:
    """Everything that can be known to be wrong before anything runs."""

    def named(ids: Sequence[str]) -> str:
        return ", ".join(map(repr, ids[:_SHOWN_IDS])) + (", …" if len(ids) > _SHOWN_IDS else "")

    for argument, rows in {"behaviors": behaviors, **users}.items():
        if not rows:
            raise ValueError(
                f"`{argument}` is empty: give at least one prompt" + ("." if argument == "behaviors" else ", or None.")
            )
        seen: set[str] = set()
        twice = [row.id for row in rows if row.id in seen or seen.add(row.id)]  # type: ignore[func-returns-value]
        if twice:
            raise ValueError(f"`{argument}` has ids more than once: {named(twice)}. Give each row an id of its own.")
        conversations = [row.id for row in rows if not isinstance(row.prompt, str)]
        if conversations and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"`{argument}` holds conversations ({named(conversations)}) but `tokenizer` "
                f"({type(tokenizer).__name__}) has no chat template: set `tokenizer.chat_template`, or give the prompts as "
                "text (read_behaviors(..., conversational=False))."
            )
    aiming = [name for name, attack in attacks.items() if getattr(attack, "needs_target", True)]
    missing = [row.id for row in behaviors if not (isinstance(row.target, str) and row.target.strip())]
    if aiming and missing:
        raise ValueError(
            f"`behaviors` without `target`: {named(missing)}. {', '.join(aiming)} aim at a target, the beginning of an "
            "answer such as 'Sure, here is': give each behaviour one, or run only attacks that need none (plain, "
            "best_of_n)."
        )
    for index, text in enumerate(users.get("perplexity_texts", [])):
        if not isinstance(text.prompt, str) or not text.prompt.strip():
            raise ValueError(f"`perplexity_texts[{index}]={text.prompt!r}` must be text. Leave it out, or fill it in.")
    unanswered = [
        row.id for row in users.get("utility", []) if not (isinstance(row.answer, str) and row.answer.strip())
    ]
    if unanswered:
        raise ValueError(
            f"`utility` has rows without `answer`: {named(unanswered)}. Give the one right answer of each."
        )


def _describe_data(
    behaviors: list[Behavior], users: Mapping[str, list[Behavior]], batch_size: int, max_new_tokens: int
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, rows in {"behaviors": behaviors, **users}.items():
        found[name], found[f"{name}_digest"] = len(rows), behaviors_digest(rows)
    return {**found, "batch_size": batch_size, "max_new_tokens": max_new_tokens}


# The work -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def silent(attacks: Sequence[Any]) -> Iterator[None]:
    """
    No progress bars of attacks, nor of attacks within them, inside.

    Args:
        attacks: of any kind.
    """
    inner = [value for attack in attacks for value in vars(attack).values() if callable(getattr(value, "attack", None))]
    shown = [attack for attack in [*attacks, *inner] if getattr(attack, "progress", False)]
    try:
        for attack in shown:
            attack.progress = False
        yield
    finally:
        for attack in shown:
            attack.progress = True


def run_stages(
    stages: Sequence[Stage], records: Records, progress: bool
) -> tuple[dict[str, list[Row]], dict[str, float]]:
    """
    Rows and seconds of each stage, by its name; what is on record is not run again.

    Args:
        stages: in the order in which they run.
        records: of finished batches.
        progress: whether to show a progress bar.

    Raises:
        ValueError: a required stage failed on every behaviour.
    """
    rows: dict[str, list[Row]] = {stage.name: [] for stage in stages}
    seconds = dict.fromkeys(rows, 0.0)
    total = sum(math.ceil(len(stage.behaviors) / stage.batch_size) for stage in stages)
    with tqdm(total=total, desc="Evaluation", unit="batch", disable=not progress) as bar:
        for stage in stages:
            bar.set_postfix_str(stage.name.lstrip("_"))
            for number, start in enumerate(range(0, len(stage.behaviors), stage.batch_size)):
                batch = stage.behaviors[start : start + stage.batch_size]
                content = records.load(stage.name, number, [behavior.id for behavior in batch])
                if content is None:
                    begin = time.perf_counter()
                    made = stage.run(batch)
                    content = {"seconds": time.perf_counter() - begin, "rows": made}
                    content = records.save(stage.name, number, content)
                rows[stage.name] += content["rows"]
                seconds[stage.name] += content["seconds"]
                bar.update()
            _check_not_all_failed(stage, rows[stage.name], records)
    return rows, seconds


def _check_not_all_failed(stage: Stage, rows: Sequence[Row], records: Records) -> None:
    """A stage without a single figure is a mistake in its settings, not a finding."""
    problems = [problem(row) for row in rows if "result" in row and not row["result"].get("skipped")]
    if problems and all(problems):
        records.discard(stage.name)
        if not stage.required:
            logger.warning("%s failed on every prompt, the first with: %s", stage.name.lstrip("_"), problems[0])
            return
        raise ValueError(
            f"{stage.name.lstrip('_')!r} failed on every prompt ({len(problems)}), the first with: {problems[0]} Mend its "
            "settings or the judge and run the evaluation again; what other attacks found is kept."
        )


def attacked_rows(
    model: nn.Module, tokenizer: Any, attack: Any, batch: Sequence[Behavior], judge: Judge | None
) -> list[Row]:
    """
    Attack a batch and judge it; what fails by itself is recorded with its error.

    Args:
        model: see [`evaluate_robustness`].
        tokenizer: its tokenizer.
        attack: on prompts.
        batch: what is attacked.
        judge: of the answers; `None` to generate only.
    """
    results = _attack(model, tokenizer, attack, batch, judge)
    if len(results) != len(batch):
        raise TypeError(
            f"{attack!r} returned {len(results)} results for {len(batch)} behaviours; it must return one each."
        )
    verdicts: list[Verdict | None] = [None] * len(batch)
    valid = [i for i, result in enumerate(results) if result.error is None]
    if judge is not None and valid:
        found = judge([batch[i] for i in valid], [results[i].completion for i in valid])
        for i, verdict in zip(valid, found, strict=True):
            verdicts[i] = verdict
    return [row_of(b.id, result, verdict) for b, result, verdict in zip(batch, results, verdicts, strict=True)]


def _attack(
    model: nn.Module, tokenizer: Any, attack: Any, batch: Sequence[Behavior], judge: Judge | None
) -> list[AttackResult]:
    """One result per behaviour; where the batch fails, each behaviour by itself, since none depends on the others."""
    kwargs: dict[str, Any] = {"prompts": [behavior.prompt for behavior in batch], "targets": None}
    if getattr(attack, "needs_target", True):
        kwargs["targets"] = [behavior.target for behavior in batch]
    if judge is not None and getattr(attack, "uses_judge", False):
        kwargs["judge"] = lambda row, completion: judge([batch[row]], [completion])[0].success
    try:
        return attack.attack(model, tokenizer, **kwargs)
    except (torch.OutOfMemoryError, MemoryError):
        raise  # says something about the machine, not about a behaviour
    except Exception as error:
        if len(batch) > 1:
            if getattr(attack, "needs_all_behaviors", False):
                return _attack_fit(model, tokenizer, attack, batch, judge, error)
            return [_attack(model, tokenizer, attack, [behavior], judge)[0] for behavior in batch]
        said = describe_error(error)
        logger.warning("%s failed on behaviour %r: %s", type(attack).__name__, batch[0].id, said)
        return [AttackResult(error=said)]


def _attack_fit(
    model: nn.Module, tokenizer: Any, attack: Any, batch: Sequence[Behavior], judge: Judge | None, error: Exception
) -> list[AttackResult]:
    """An attack on all behaviours at once that failed, on those that it does take, told by a search of no steps."""
    probe = _without_steps(attack)
    results = [_attack(model, tokenizer, probe, [behavior], judge)[0] for behavior in batch]
    fit = [place for place, result in enumerate(results) if result.error is None]
    if len(fit) in (0, len(batch)):  # not the fault of some behaviours
        return [AttackResult(error=describe_error(error)) for _ in batch]
    found = _attack(model, tokenizer, attack, [batch[place] for place in fit], judge)
    for place, result in zip(fit, found, strict=True):
        results[place] = result
    return results


def _without_steps(attack: Any) -> Any:
    probe = copy.copy(attack)
    for name, value in {"num_steps": 0, "max_new_tokens": 0}.items():
        if hasattr(probe, name):
            setattr(probe, name, value)
    if hasattr(probe, "source_attack"):
        probe.source_attack = _without_steps(probe.source_attack)
    return probe


def _nll_rows(model: nn.Module, tokenizer: Any, texts: Sequence[Behavior]) -> list[Row]:
    """Negative log-likelihood of each text, summed over its tokens, in nats."""
    losses, tokens = text_losses(model, tokenizer, [text.prompt for text in texts])
    return [
        {"id": text.id, "nll": loss if math.isfinite(loss) else None, "tokens": count}
        for text, loss, count in zip(texts, losses, tokens, strict=True)
    ]


# The figures ----------------------------------------------------------------------------------------------------------


def _measure_attacks(
    subject: str, behaviors: list[Behavior], rows_by_attack: Mapping[str, list[Row]], attacks: Mapping[str, Any]
) -> list[Measurement]:
    found = success_rates(subject, behaviors, rows_by_attack)
    for name, rows in rows_by_attack.items():
        refused = [float(row["verdict"]["refused"]) if problem(row) is None else None for row in rows]
        # Plain prompting is the absence of an attack
        found += share(subject, "refusal", "all", "none" if _is_baseline(attacks[name]) else name, refused)
    for name, rows in rows_by_attack.items():
        found += costs(subject, name, rows)
    return found


def _measure_users(
    subject: str, users: Mapping[str, list[Behavior]], rows: Mapping[str, list[Row]]
) -> list[Measurement]:
    found = []
    for name, behaviors in users.items():
        stage = rows[f"_{name}"]
        if name == "perplexity_texts":
            found += text_perplexity(subject, stage)
            continue
        # A prompt that could not be answered counts neither way
        texts = [row["result"]["completion"] for row in stage]
        if name == "harmless":
            metric, right = "over_refusal", [is_refusal(text) for text in texts]
        else:
            metric, right = "utility", exact_matches(texts, [behavior.answer or "" for behavior in behaviors])
        values = [None if problem(row) else float(value) for row, value in zip(stage, right, strict=True)]
        found += share(subject, metric, name, "none", values)
    return found
