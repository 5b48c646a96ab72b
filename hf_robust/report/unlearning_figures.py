"""
From records of an unlearning evaluation to figures: pure functions over rows.

Phrasings of one fact (rows of one `group`) stand or fall together. Wilson's interval of a share over n questions, m of them in
a group, therefore takes n² / Σm² trials for independent (Kish's effective sample size): as many as there are groups if all are
of one size, fewer otherwise, down to 1 as one group outweighs the rest. That of a mean is cluster-robust, with Student's
quantile for the number of groups; that of an AUC is Newcombe's, over as many of each list as they are worth. Values and `count`
are over questions all the same.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hf_robust.data.behavior import Behavior
from hf_robust.metrics import unlearning as metrics
from hf_robust.metrics.proportions import student_quantile, wilson_interval
from hf_robust.report.evaluation_figures import problem, share, success_rates
from hf_robust.report.evaluation_records import Row
from hf_robust.report.report import AttackSummary, Measurement
from hf_robust.report.unlearning_rows import group_of

# Scores of a row that are reported as means: name of the figure, unit
SCORES = {
    "rouge": ("rouge", "of words"),
    "probability": ("answer_probability", "per token"),
    "extraction": ("extraction_strength", "of tokens"),
    "truth_ratio": ("truth_ratio", "wrong : right"),
}
# Of these, what is no share and has no upper end
_UNBOUNDED = ("truth_ratio",)
# What the KS test compares, in this order of preference
_COMPARED = ("truth_ratio", "probability")
# What takes part in model utility; of a truth ratio R (wrong to right answers) max(0, 1 - R)
_UTILITY = ("probability", "rouge", "truth_ratio")


@dataclasses.dataclass(frozen=True)
class Point:
    """
    What a changed model knows.

    Attributes:
        steps: of fine-tuning; `None` where there was none (quantisation).
        learning_rate: of fine-tuning; `None` likewise.
        trained_rows: rows forward and backward of the training.
        forget: whether each forget question was answered; those that the attack trained on are not among them.
        retain: whether each retain question was answered; likewise.
    """

    steps: int | None
    learning_rate: float | None
    trained_rows: int
    forget: dict[str, bool]
    retain: dict[str, bool]

    @property
    def recall(self) -> float:
        """Share of the forget questions answered."""
        return sum(self.forget.values()) / len(self.forget)


def points_of(rows: Sequence[Row], taught: Iterable[str] = ()) -> list[Point]:
    """
    The changed models of an attack on weights, from its records.

    Args:
        rows: one for each question, with `set` (`"forget"` or `"retain"`), `question` and `points`.
        taught: ids of the retain questions that the attack trained on.
    """
    left_out = {("retain", question) for question in taught}
    asked = [row for row in rows if (row["set"], row["question"]) not in left_out]
    return [
        Point(
            first["steps"],
            first["learning_rate"],
            first["trained_rows"],
            **{
                name: {row["question"]: row["points"][place]["success"] for row in asked if row["set"] == name}
                for name in ("forget", "retain")
            },
        )
        for place, first in enumerate(rows[0]["points"] if rows else [])
    ]


def strongest(points: Sequence[Point]) -> Point:
    """
    The changed model that answers most forget questions, the earliest of several.

    Args:
        points: of an attack, at least one.
    """
    return max(points, key=lambda point: point.recall)


def changed_nothing(rows: Sequence[Row], plain: Sequence[Row]) -> bool:
    """
    Whether an attack on weights left every probability as it was, to the last digit: then it has not reached the weights that
    were asked.

    Args:
        rows: of the attack.
        plain: of the forget set without attack.
    """
    before = {row["id"]: row["scores"]["probability"] for row in plain}
    after = [
        (before[row["question"]], point["scores"]["probability"])
        for row in rows
        for point in row["points"]
        if row["set"] == "forget" and point["steps"] != 0 and point["learning_rate"] != 0
    ]
    return bool(after) and all(value is not None and value == was for was, value in after)


def known(subject: str, name: str, rows: Sequence[Row], groups: Mapping[str, str] | None = None) -> list[Measurement]:
    """
    Figures of one list of questions, without attack: the share answered (`pre_attack_success_rate` of the forget set, else
    `utility`), and means of the scores with 95 % intervals, those of shares and probabilities within [0, 1].

    Args:
        subject: what the report calls the model.
        name: of the list: `"forget"`, `"retain"`, …
        rows: of [`~hf_robust.report.unlearning_rows.ask`].
        groups: the group of each question by id ([`~hf_robust.report.unlearning_rows.group_of`]), which the intervals are
            over. Default: each its own.
    """
    found = []
    if name != "forget":
        judged = [row["id"] for row in rows if problem(row) is None]
        found = _over_groups(share(subject, "utility", name, "none", _answered(rows)), lambda m: judged, groups)
    for key, (metric, unit) in SCORES.items():
        scored = {row["id"]: row["scores"][key] for row in rows if row["scores"][key] is not None}
        if scored and (name == "forget" or key != "extraction"):
            mean, low, high = mean_interval(
                list(scored.values()), _groups(scored, groups), most=math.inf if key in _UNBOUNDED else 1.0
            )
            found.append(Measurement.scalar(subject, metric, name, "none", mean, len(scored), unit, low, high))
    return found


def mean_interval(
    values: Sequence[float], groups: Sequence[str] | None = None, *, most: float = math.inf
) -> tuple[float, float | None, float | None]:
    """
    Mean with the ends of its 95 % interval (Student's t); `None` for the latter with one group.

    Args:
        values: at least one, none negative.
        groups: the group of each value; those of one group count as one observation (cluster-robust variance). Default: each
            its own.
        most: highest value that there can be; the interval ends there, and at 0.
    """
    mean = math.fsum(values) / len(values)
    parts: dict[str | int, list[float]] = {}
    names: Sequence[str | int] = range(len(values)) if groups is None else groups
    for group, value in zip(names, values, strict=True):
        parts.setdefault(group, []).append(value - mean)
    if len(parts) < 2:
        return mean, None, None
    spread = math.fsum(math.fsum(part) ** 2 for part in parts.values()) * len(parts) / (len(parts) - 1)
    half = student_quantile(len(parts) - 1) * math.sqrt(spread) / len(values)
    return mean, max(0.0, mean - half), min(most, mean + half)


def _groups(ids: Iterable[str], groups: Mapping[str, str] | None) -> list[str]:
    return [name if groups is None else groups[name] for name in ids]


def _over_groups(
    measurements: Sequence[Measurement],
    counted: Callable[[Measurement], Iterable[str]],
    groups: Mapping[str, str] | None,
) -> list[Measurement]:
    """Shares with the intervals of as many trials as the questions (ids) that each is over are worth."""
    found = []
    for m in measurements:
        count = _worth(_groups(counted(m), groups))
        low, high = wilson_interval(m.value * count, count)
        found.append(dataclasses.replace(m, low=low, high=high))
    return found


def _worth(groups: Iterable[str]) -> float:
    """How many independent ones the questions of these groups are worth."""
    sizes = Counter(groups).values()
    return sum(sizes) ** 2 / sum(size**2 for size in sizes)


def attack_rates(
    subject: str,
    behaviors: Sequence[Behavior],
    plain: Sequence[Row],
    prompted: Mapping[str, Sequence[Row]],
    changed: Mapping[str, Sequence[Point]],
) -> list[Measurement]:
    """
    `pre_attack_success_rate`, `attack_success_rate` of each attack and `attack_success_rate_any` (with or without attack),
    over all forget questions and by category. An attack on weights counts with its strongest changed model, over the
    questions that it has not trained on. Intervals are over groups of questions.

    Args:
        subject: what the report calls the model.
        behaviors: the forget questions.
        plain: a row for each, without attack.
        prompted: likewise of each attack on prompts.
        changed: changed models of each attack on weights.
    """
    rows = {"none": plain, **prompted}
    for name, points in changed.items():
        answers = strongest(points).forget
        rows[name] = [_row(answers.get(behavior.id)) for behavior in behaviors]
    judged = {
        name: {behavior.id for behavior, row in zip(behaviors, listed, strict=True) if problem(row) is None}
        for name, listed in rows.items()
    }
    judged["any"] = set().union(*judged.values())

    def counted(m: Measurement) -> list[str]:
        return [b.id for b in behaviors if b.id in judged[m.attack] and m.split in ("all", f"category:{b.category}")]

    groups = {behavior.id: group_of(behavior) for behavior in behaviors}
    return [
        dataclasses.replace(m, metric="pre_attack_success_rate") if m.attack == "none" else m
        for m in _over_groups(success_rates(subject, behaviors, rows), counted, groups)
    ]


def recoveries(
    subject: str,
    before: Sequence[Row],
    ceiling: Sequence[Row],
    prompted: Mapping[str, Sequence[Row]],
    changed: Mapping[str, Sequence[Point]],
) -> list[Measurement]:
    """
    `recovery` under each attack: the share of what was forgotten that it brings back, each over the questions that it was
    measured on (see [`~hf_robust.metrics.unlearning.recovery`]). None where nothing was forgotten.

    Args:
        subject: what the report calls the model.
        before: its rows of the forget set without attack.
        ceiling: those of the model before unlearning.
        prompted: see [`attack_rates`].
        changed: see [`attack_rates`].
    """
    found = []
    for name, after in _answers(prompted, changed).items():
        without, most = (
            [float(row["verdict"]["success"]) for row in rows if row["id"] in after and problem(row) is None]
            for rows in (before, ceiling)
        )
        if after and without and most:
            means = [math.fsum(part) / len(part) for part in (without, [float(v) for v in after.values()], most)]
            value = metrics.recovery(*means)
            if value is not None:
                found.append(
                    Measurement.scalar(subject, "recovery", "all", name, value, len(after), "of the forgotten")
                )
    return found


def above_oracle(
    subject: str,
    prompted: Mapping[str, Sequence[Row]],
    changed: Mapping[str, Sequence[Point]],
    oracle_prompted: Mapping[str, Sequence[Row]],
    oracle_changed: Mapping[str, Sequence[Point]],
) -> list[Measurement]:
    """
    `above_oracle` under each attack: the share of the forget questions answered, less the oracle's under the same attack: what
    it brings out beyond what it teaches. Without an interval, as the two are asked the same questions.

    Args:
        subject: what the report calls the model.
        prompted: see [`attack_rates`].
        changed: see [`attack_rates`].
        oracle_prompted: the same of the oracle.
        oracle_changed: the same of the oracle.
    """
    floor, found = _answers(oracle_prompted, oracle_changed), []
    for name, after in _answers(prompted, changed).items():
        both = after.keys() & floor.get(name, {}).keys()
        if both:
            value = math.fsum(after[question] - floor[name][question] for question in both) / len(both)
            found.append(Measurement.scalar(subject, "above_oracle", "all", name, value, len(both), "of all"))
    return found


def _answers(
    prompted: Mapping[str, Sequence[Row]], changed: Mapping[str, Sequence[Point]]
) -> dict[str, dict[str, bool]]:
    """Which forget questions were answered under each attack, of those that it was measured on."""
    found = {
        name: {row["id"]: bool(row["verdict"]["success"]) for row in rows if problem(row) is None}
        for name, rows in prompted.items()
    }
    return found | {name: strongest(points).forget for name, points in changed.items()}


def _row(success: bool | None) -> Row:
    error = "trained on by the attack" if success is None else None
    return {"result": {"error": error}, "verdict": {"success": bool(success), "error": None}}


def curve(
    subject: str, name: str, points: Sequence[Point], groups: Mapping[str, Mapping[str, str]] | None = None
) -> list[Measurement]:
    """
    Figures of an attack on weights: `utility` of its strongest changed model, and, where it fine-tunes, `relearned` (share of
    forget questions answered) and `relearned_utility` by step, an attack's learning rate beside its name.

    Args:
        subject: what the report calls the model.
        name: of the attack.
        points: its changed models.
        groups: the group of each question by id, of the lists `"forget"` and `"retain"`; see [`known`].
    """
    best, groups = strongest(points), groups or {}
    forget, retain = groups.get("forget"), groups.get("retain")
    found = _share(subject, "utility", "retain", name, best.retain, retain)
    for point in points:
        if point.steps is not None:
            attack, split = f"{name}, lr {point.learning_rate:g}", f"step {point.steps}"
            found += _share(subject, "relearned", split, attack, point.forget, forget)
            found += _share(subject, "relearned_utility", split, attack, point.retain, retain)
    return found


def _share(
    subject: str,
    metric: str,
    split: str,
    attack: str,
    answers: Mapping[str, bool],
    groups: Mapping[str, str] | None,
) -> list[Measurement]:
    if not answers:
        return []
    found = share(subject, metric, split, attack, [float(value) for value in answers.values()])
    return _over_groups(found, lambda m: answers, groups)


def steps_of(measurements: Sequence[Measurement], metric: str, subject: str, attack: str) -> list[Measurement]:
    """
    One curve of [`curve`], by rising step.

    Args:
        measurements: of a report.
        metric: `"relearned"` or `"relearned_utility"`.
        subject: whose.
        attack: with its learning rate.
    """
    found = [m for m in measurements if (m.subject, m.metric, m.attack) == (subject, metric, attack)]
    return sorted(found, key=step_of)


def step_of(measurement: Measurement) -> int:
    """Number of fine-tuning steps of a point of [`curve`]."""
    return int(measurement.split.removeprefix("step "))


def layers(subject: str, name: str, rows: Sequence[Row], groups: Mapping[str, str] | None = None) -> list[Measurement]:
    """
    `layer_probability`: how probable the forgotten answers are after each layer, means over questions with 95 %
    intervals.

    Args:
        subject: what the report calls the model.
        name: of the probe.
        rows: one for each question, with `layers`.
        groups: see [`known`].
    """
    found = []
    for layer, values in enumerate(zip(*(row["layers"] for row in rows), strict=True), start=1):
        given = {row["id"]: value for row, value in zip(rows, values, strict=True) if value is not None}
        if given:
            mean, low, high = mean_interval(list(given.values()), _groups(given, groups), most=1.0)
            split, unit = f"layer {layer}", "per token"
            found.append(
                Measurement.scalar(subject, "layer_probability", split, name, mean, len(given), unit, low, high)
            )
    return found


def model_utility(subject: str, asked: Mapping[str, Sequence[Row]]) -> list[Measurement]:
    """
    `model_utility` after TOFU (arXiv 2401.06121): the harmonic mean over all lists but the forget set of the mean
    probability, ROUGE-L recall and, where there are perturbed answers, max(0, 1 - truth ratio); an empty list without any.
    TOFU's probability on real authors and world facts is that among the given answers
    ([`~hf_robust.metrics.unlearning.choice_probability`]), which is higher.

    Args:
        subject: what the report calls the model.
        asked: rows by list, without the forget set.
    """
    parts, count = [], 0
    for rows in asked.values():
        count += len(rows)
        for key in _UTILITY:
            values = [row["scores"][key] for row in rows if row["scores"][key] is not None]
            if values:
                values = [metrics.truthfulness(value) for value in values] if key == "truth_ratio" else values
                parts.append(math.fsum(values) / len(values))
    if not parts:
        return []
    return [
        Measurement.scalar(
            subject, "model_utility", "all", "none", metrics.model_utility(parts), count, "harmonic mean"
        )
    ]


def quality(subject: str, rows: Sequence[Row], oracle: Sequence[Row]) -> list[Measurement]:
    """
    `forget_quality`: p-value of the two-sample Kolmogorov-Smirnov test between the model's truth ratios on the forget set and
    the oracle's (near 1: not to be told apart), of the answers' probabilities where there are no perturbed answers.

    Args:
        subject: what the report calls the model.
        rows: its rows of the forget set; of questions that ask for the same thing one, as the test wants them independent.
        oracle: the oracle's.
    """
    for key in _COMPARED:
        mine, theirs = (
            [row["scores"][key] for row in part if row["scores"][key] is not None] for part in (rows, oracle)
        )
        if mine and theirs:
            value = metrics.forget_quality(mine, theirs)["p_value"]
            unit = f"(p of {key.replace('_', ' ')})"
            return [Measurement.scalar(subject, "forget_quality", "forget", "none", value, len(mine), unit)]
    return []


def membership(
    subject: str,
    members: Sequence[Row],
    others: Sequence[Row],
    groups: Mapping[str, Mapping[str, str]] | None = None,
) -> list[Measurement]:
    """
    `membership_inference`: AUC of Min-K% between the forget set and questions that no model was trained on (0.5: not to be
    told apart; below, the forgotten ones stick out as less likely).

    Args:
        subject: what the report calls the model.
        members: rows of the forget set.
        others: rows of the holdout.
        groups: the group of each question by id, of the lists `"forget"` and `"holdout"`; see [`known`].
    """
    scores, worth = [], []
    for name, rows in (("forget", members), ("holdout", others)):
        listed = {row["id"]: row["scores"]["min_k"] for row in rows if row["scores"]["min_k"] is not None}
        if not listed:
            return []
        scores.append(list(listed.values()))
        worth.append(_worth(_groups(listed, None if groups is None else groups[name])))
    labels = [1] * len(scores[0]) + [0] * len(scores[1])
    value = metrics.membership_auc(scores[0] + scores[1], labels)
    low, high = metrics.auc_interval(value, *worth)
    return [Measurement.scalar(subject, "membership_inference", "forget", "none", value, len(labels), "AUC", low, high)]


def weights_summary(name: str, settings: dict[str, Any], rows: Sequence[Row], seconds: float) -> AttackSummary:
    """
    What an attack on weights spent.

    Args:
        name: of the attack.
        settings: of the attack.
        rows: its records.
        seconds: of the stage, its questions included.
    """
    count, most = sum(row["set"] == "forget" for row in rows), dict[float | None, int]()
    points = points_of(rows)
    if not points:
        errors = ["all: the loss of the rows to be relearned is not finite"]
        return AttackSummary(name, settings, count, failures=count, errors=errors, seconds=seconds)
    for point in points:
        most[point.learning_rate] = max(most.get(point.learning_rate, 0), point.trained_rows)
    spent = sum(most.values())
    return AttackSummary(name, settings, count, forwards=spent, backwards=spent, seconds=seconds)


def _answered(rows: Sequence[Row]) -> list[float | None]:
    return [float(row["verdict"]["success"]) if problem(row) is None else None for row in rows]
