"""Ask an unlearned model what it was to forget, attack it, see what is left: one report, resumed where interrupted."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_robust.data.behavior import Behavior
from hf_robust.data.behaviors_file import write_behaviors
from hf_robust.data.redaction import redacted
from hf_robust.metrics.judges import ExactJudge, Judge, as_judge
from hf_robust.report.evaluation import Stage, attacked_rows, run_stages, silent
from hf_robust.report.evaluation_figures import costs, summary
from hf_robust.report.evaluation_plan import check_plan, describe_tokenizer, fingerprint, model_name
from hf_robust.report.evaluation_records import Records, Row
from hf_robust.report.rebuild import precision_of
from hf_robust.report.report import Measurement, Report, describe_environment
from hf_robust.report.unlearning_attacks import forgetting_settings_of, not_run
from hf_robust.report.unlearning_figures import (
    Point,
    above_oracle,
    attack_rates,
    changed_nothing,
    curve,
    known,
    layers,
    membership,
    model_utility,
    points_of,
    quality,
    recoveries,
    weights_summary,
)
from hf_robust.report.unlearning_flags import find_unlearning_flags
from hf_robust.report.unlearning_rows import as_questions, ask, group_of, is_trained, questions_digest
from hf_robust.sites import quiet
from hf_robust.threats import check_at_least

KIND = "unlearning"
CONTROLS = ("original", "oracle")
_RESERVED = ("none", "any")
_SETS = ("forget", "retain", "holdout")


def evaluate_unlearning(
    model: nn.Module,
    *,
    tokenizer: Any,
    forget: Any,
    retain: Any,
    attacks: Mapping[str, Any],
    utility: Mapping[str, Any] | None = None,
    holdout: Any = None,
    original: nn.Module | None = None,
    oracle: nn.Module | None = None,
    attack_controls: bool = True,
    judge: Any = None,
    output_dir: str | Path | None = None,
    controls_dir: str | Path | None = None,
    overwrite: bool = False,
    subject: str = "model",
    batch_size: int = 16,
    max_new_tokens: int = 64,
    progress: bool = True,
) -> Report:
    """
    How well a language model has forgotten: what it still answers of the forget set, what attacks on its prompts, fine-tuning
    and quantisation bring back, and what it still knows of the rest. The same is measured of the `original`, the ceiling,
    and of an `oracle` that was trained without the forget set, the floor, attacks included.

    With `output_dir`, finished work is kept there (batches of questions; an attack on weights as a whole), and the same
    call after an interruption goes on where it was.

    Args:
        model: causal language model or PEFT model, unwrapped. It is the same afterwards.
        tokenizer: of all the models.
        forget: what was to be forgotten, as questions with answers: see
            [`~hf_robust.report.unlearning_rows.as_questions`] for the forms of rows.
        retain: the same, of what was to be kept.
        attacks: by the name that the report gives them: attacks on prompts of [`hf_robust.attacks`] and attacks on weights
            of [`~hf_robust.report.unlearning_attacks`] (relearning, quantisation, logit lens). Progress bars of their own are
            switched off.
        utility: further lists of questions that the model should answer, by name (real authors, world facts).
        holdout: questions that none of the models was trained on and that are like those of `forget`, but for its rows that
            are not `trained`; for `membership_inference`: how well the two are told apart by how likely their answers are.
        original: the model before unlearning.
        oracle: a model trained without the forget set.
        attack_controls: whether the attacks run on original and oracle, too, which is three times the work. Without, nobody
            can tell what an attack brings back from what it teaches, which is flagged.
        judge: decides whether an answer is right: see [`hf_robust.metrics.judges.as_judge`]. Default:
            [`~hf_robust.metrics.judges.ExactJudge`]: the row's `answer` (by default the whole completion) stands in it.
        output_dir: folder of `report.json`, `plan.json`, `behaviors.jsonl` (the forget set), `utility.jsonl` (the other lists,
            by category) and `records/`. `None`: nothing is written.
        controls_dir: folder where the finished work on original and oracle is kept, instead of `output_dir`. Evaluations of
            several models that have both, questions, attacks and judge in common share it: the controls are then attacked once.
        overwrite: discard what another evaluation left in `output_dir` (not in `controls_dir`) instead of raising.
        subject: what the report calls the model.
        batch_size: questions in a batch, the unit of work that is kept.
        max_new_tokens: length of an answer at most; an attack on prompts has a `max_new_tokens` of its own.
        progress: whether to show a progress bar.

    Returns:
        The report. Of each model: `pre_attack_success_rate` (forget questions answered), `attack_success_rate` of each attack
        and `attack_success_rate_any`, `recovery` and `above_oracle` of each, `utility` of each other list (under attacks on
        weights, too), `relearned` and `relearned_utility` by step, both without what the attack trained on; `rouge`,
        `answer_probability`, `extraction_strength`, `truth_ratio`, `model_utility`, `membership_inference`; with an oracle
        `forget_quality`. 95 % intervals are over groups where rows have a `group`.
        `runs`: what the attacks on `model` spent. `flags`.

    Raises:
        ValueError: an empty list of questions, ids given twice, a name that means something else, an output or controls folder
            of another evaluation, or an attack on the prompts that failed on all of them.
        TypeError: the judge or an attack cannot be called.
    """
    check_at_least("batch_size", batch_size, 1, "Give the number of questions of a batch.")
    check_at_least("max_new_tokens", max_new_tokens, 1, "Give the length of an answer.")
    judge = as_judge(ExactJudge() if judge is None else judge)
    questions = {"forget": as_questions(forget, "forget"), "retain": as_questions(retain, "retain")}
    for name, rows in (utility or {}).items():
        if name in _SETS:
            raise ValueError(f"`utility` has the name {name!r}, which stands for another list: rename it.")
        questions[name] = as_questions(rows, f"utility[{name!r}]")
    if holdout is not None:
        questions["holdout"] = as_questions(holdout, "holdout")
        if not any(map(is_trained, questions["forget"])):
            raise ValueError(
                "`forget` has no row that was trained on (`trained` is false in all): membership inference against `holdout` "
                "needs some. Leave `holdout` out, or give the rows as they were trained on."
            )
    _check(attacks, subject)

    models = {subject: model, "original": original, "oracle": oracle}
    given = {name: one for name, one in models.items() if one is not None}
    on_weights = {name: attack for name, attack in attacks.items() if changes_weights(attack)}
    # Before a model runs: rows to train on that are asked afterwards are refused
    taught = {
        name: attack.taught(questions["forget"], questions["retain"])
        for name, attack in on_weights.items()
        if hasattr(attack, "taught")
    }
    probes = {name: attack for name, attack in attacks.items() if looks_inside(attack)}
    on_prompts = {name: attack for name, attack in attacks.items() if name not in {**on_weights, **probes}}
    settings = {name: forgetting_settings_of(attack) for name, attack in attacks.items()}
    stages = {(one, name): f"_{one} {name}" for one in given for name in questions}
    attacked = list(given) if attack_controls else [subject]
    stages |= {(one, name): name if one == subject else f"{one}: {name}" for one in attacked for name in attacks}
    data = {
        "evaluation": KIND, "subject": subject, **_describe(questions), "batch_size": batch_size,
        "max_new_tokens": max_new_tokens, **precision_of(model),
        **{name: fingerprint(given[name])["weights"] for name in CONTROLS if name in given},
    }  # fmt: skip
    description = {"name": judge.name, "settings": redacted(judge.settings)}
    folder = None if output_dir is None else Path(output_dir)
    shared = None if controls_dir is None else Path(controls_dir)
    elsewhere = {
        stage: shared / "records" for (one, _), stage in stages.items() if shared is not None and one != subject
    }
    records = Records(None if folder is None else folder / "records", list(stages.values()), elsewhere)
    if shared is not None:
        controls = {name: fingerprint(given[name]) for name in CONTROLS if name in given}
        asked = {**_describe(questions), "batch_size": batch_size, "max_new_tokens": max_new_tokens}
        check_plan(
            shared / "plan.json",
            {
                **controls,
                "tokenizer": describe_tokenizer(tokenizer),
                "data": asked,
                "attacks": settings,
                "judge": description,
            },
            argument="controls_dir",
        )
    if folder is not None:
        if overwrite:
            records.discard()
            (folder / "plan.json").unlink(missing_ok=True)
        plan = {
            "model": fingerprint(model), "tokenizer": describe_tokenizer(tokenizer), "data": data, "attacks": settings,
            "judge": description,
        }  # fmt: skip
        check_plan(folder / "plan.json", plan)
        write_behaviors(folder / "behaviors.jsonl", questions["forget"])
        write_behaviors(folder / "utility.jsonl", _others(questions))

    work = _Work(tokenizer, judge, questions, max_new_tokens, batch_size)
    with contextlib.ExitStack() as stack:
        for one in {id(one): one for one in given.values()}.values():
            stack.enter_context(quiet(one))
        stack.enter_context(silent(list(on_prompts.values())))
        planned = []
        for (name, what), stage in stages.items():
            one = given[name]
            if what in questions:
                planned.append(Stage(stage, questions[what], batch_size, work.asking(one)))
            elif what in on_prompts:
                size = len(questions["forget"]) if _takes_all(attacks[what]) else batch_size
                run = work.prompting(one, attacks[what])
                planned.append(Stage(stage, questions["forget"], size, run, required=name == subject))
            elif what in probes:
                planned.append(Stage(stage, questions["forget"], batch_size, work.probing(one, attacks[what])))
            else:
                both = work.both(attacks[what])
                planned.append(Stage(stage, both, len(both), work.changing(one, attacks[what])))
        found, seconds = run_stages(planned, records, progress)

    rows = {key: found[stage] for key, stage in stages.items()}
    for name in on_weights:
        notes = dict.fromkeys(point["note"] for point in rows[subject, name][0]["points"] if point["note"])
        if notes:
            settings[name]["ran"] = "; ".join(notes)
    report = Report(
        title=f"Unlearning in {Path(model_name(model)).name}",
        method={},
        base_model=model_name(model),
        attacks=settings,
        not_run=not_run(attacks),
        data=data,
        measurements=_measure(list(given), questions, rows, on_prompts, on_weights, probes, taught),
        costs={f"seconds: {stage.lstrip('_')}": round(value, 3) for stage, value in seconds.items()},
        environment=describe_environment(),
        runs=[
            weights_summary(name, settings[name], rows[subject, name], seconds[name])
            if name in on_weights
            else summary(name, settings[name], rows[subject, name])
            for name in attacks
            if name not in probes
        ],
        judge=description,
    )
    inert = [name for name in on_weights if changed_nothing(rows[subject, name], rows[subject, "forget"])]
    report.flags = find_unlearning_flags(report, questions, subject=subject, inert=inert)
    if folder is not None:
        report.save(folder / "report.json")
    return report


def changes_weights(attack: Any) -> bool:
    """Whether an attack makes another model instead of another prompt."""
    return callable(getattr(attack, "change", None))


def looks_inside(attack: Any) -> bool:
    """Whether an attack reads what the model holds instead of making it answer."""
    return callable(getattr(attack, "probe", None))


def _check(attacks: Mapping[str, Any], subject: str) -> None:
    if subject in (*CONTROLS, *_RESERVED) or not subject:
        raise ValueError(f"`subject={subject!r}` stands for something else in a report: choose another name.")
    for name, attack in attacks.items():
        on_prompts = callable(getattr(attack, "attack", None))
        if isinstance(attack, type) or not (on_prompts or changes_weights(attack) or looks_inside(attack)):
            raise TypeError(
                f"`attacks[{name!r}]={attack!r}` is no attack: give an object with a method `attack`, such as "
                "hf_robust.attacks.GCG(), or one that changes weights, such as hf_robust.report.Relearning()."
            )
        if name in (*_RESERVED, *_SETS):
            raise ValueError(
                f"`attacks` has the name {name!r}, which stands for something else in a report: rename it."
            )


def _describe(questions: Mapping[str, Sequence[Behavior]]) -> dict[str, Any]:
    others = _others(questions)
    return {
        "behaviors": len(questions["forget"]),
        "behaviors_digest": questions_digest(questions["forget"]),
        "utility": {name: len(rows) for name, rows in questions.items() if name != "forget"},
        "utility_digest": questions_digest(others),
    }


def _others(questions: Mapping[str, Sequence[Behavior]]) -> list[Behavior]:
    """All lists but the forget set as one, the category telling which."""
    return [
        dataclasses.replace(row, id=f"{name}/{row.id}", category=name)
        for name, rows in questions.items()
        if name != "forget"
        for row in rows
    ]


def _takes_all(attack: Any) -> bool:
    return bool(getattr(attack, "needs_all_behaviors", False))


# The work -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Work:
    """Makes the rows of each kind of stage."""

    tokenizer: Any
    judge: Judge
    questions: Mapping[str, list[Behavior]]
    max_new_tokens: int
    batch_size: int

    def ask(self, model: nn.Module, batch: Sequence[Behavior], truth_ratios: bool = True) -> list[Row]:
        options = {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}
        return ask(model, self.tokenizer, batch, self.judge, truth_ratios=truth_ratios, **options)

    def asking(self, model: nn.Module) -> Callable[[list[Behavior]], list[Row]]:
        """Asks without attack."""
        return lambda batch: self.ask(model, batch)

    def prompting(self, model: nn.Module, attack: Any) -> Callable[[list[Behavior]], list[Row]]:
        """Attacks the prompts."""
        return lambda batch: attacked_rows(model, self.tokenizer, attack, batch, self.judge)

    def probing(self, model: nn.Module, attack: Any) -> Callable[[list[Behavior]], list[Row]]:
        """Looks inside."""
        return lambda batch: attack.probe(model, self.tokenizer, batch)

    def both(self, attack: Any) -> list[Behavior]:
        """What is asked of a changed model: the forget questions that the attack does not train on, and the retain set."""
        listed = {"forget": attack.measured(self.questions["forget"]), "retain": self.questions["retain"]}
        return [dataclasses.replace(row, id=f"{name}/{row.id}") for name, rows in listed.items() for row in rows]

    def changing(self, model: nn.Module, attack: Any) -> Callable[[list[Behavior]], list[Row]]:
        """Attacks the weights and asks each changed model everything."""

        def run(batch: list[Behavior]) -> list[Row]:
            rows: list[Row] = []
            for behavior in batch:
                name, _, question = behavior.id.partition("/")
                rows.append({"id": behavior.id, "set": name, "question": question, "points": []})

            def measure(changed: nn.Module) -> None:
                # No figure of a changed model takes truth ratios
                for row, answered in zip(rows, self.ask(changed, batch, truth_ratios=False), strict=True):
                    row["points"].append(
                        {
                            "success": bool(answered["verdict"]["success"]),
                            "completion": answered["result"]["completion"],
                            "scores": answered["scores"],
                        }
                    )

            done = attack.change(model, self.tokenizer, self.questions["forget"], self.questions["retain"], measure)
            for row in rows:
                for point, changed in zip(row["points"], done, strict=True):
                    point.update(dataclasses.asdict(changed))
            return rows

        return run


def _measure(
    subjects: Sequence[str],
    questions: Mapping[str, list[Behavior]],
    rows: Mapping[tuple[str, str], list[Row]],
    on_prompts: Mapping[str, Any],
    on_weights: Mapping[str, Any],
    probes: Mapping[str, Any],
    taught: Mapping[str, set[str]],
) -> list[Measurement]:
    found: list[Measurement] = []
    # Of questions that ask for the same thing one: a test over all would take them for independent
    first = set({group_of(question): question.id for question in reversed(questions["forget"])}.values())
    groups = {name: {question.id: group_of(question) for question in listed} for name, listed in questions.items()}
    members = {question.id for question in questions["forget"] if is_trained(question)}
    alone = {one: [row for row in rows[one, "forget"] if row["id"] in first] for one in subjects}
    all_changed, all_prompted = dict[str, dict[str, list[Point]]](), dict[str, dict[str, list[Row]]]()
    for one in subjects:
        every = {name: points_of(rows.get((one, name), []), taught.get(name, ())) for name in on_weights}
        all_changed[one] = {name: points for name, points in every.items() if points}
        all_prompted[one] = {name: rows[one, name] for name in on_prompts if (one, name) in rows}
    for one in subjects:
        changed, prompted = all_changed[one], all_prompted[one]
        found += attack_rates(one, questions["forget"], rows[one, "forget"], prompted, changed)
        if "original" in subjects and one != "original":
            found += recoveries(one, rows[one, "forget"], rows["original", "forget"], prompted, changed)
        if "oracle" in subjects and one != "oracle":
            found += above_oracle(one, prompted, changed, all_prompted["oracle"], all_changed["oracle"])
        kept = {name: rows[one, name] for name in questions if name not in ("forget", "holdout")}
        for name, listed in {"forget": rows[one, "forget"], **kept}.items():
            found += known(one, name, listed, groups[name])
        found += model_utility(one, kept)
        if "holdout" in questions:
            found += membership(
                one, [row for row in rows[one, "forget"] if row["id"] in members], rows[one, "holdout"], groups
            )
        if "oracle" in subjects:
            found += quality(one, alone[one], alone["oracle"])
        for name, points in changed.items():
            found += curve(one, name, points, groups)
        for name, listed in prompted.items():
            found += costs(one, name, listed)
        for name in probes:
            found += layers(one, name, rows.get((one, name), []), groups["forget"])
    return found
