"""Two reports side by side, and whether their figures compare at all."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_robust.report.report import Measurement, Report
from hf_robust.report.table import METRIC_NAMES, align

# Settings that change how long an attack takes, not what it finds
_NO_MATTER = ("batch_size", "candidate_batch_size", "prefix_cache", "progress")


@dataclass(frozen=True)
class Row:
    """
    One figure in two reports.

    Attributes:
        split: over which prompts.
        attack: under which attack.
        metric: which figure.
        first: in the first report; `None` if it has none.
        second: in the second report.
    """

    split: str
    attack: str
    metric: str
    first: Measurement | None
    second: Measurement | None

    @property
    def difference(self) -> float | None:
        """Second minus first; `None` where one is missing."""
        return None if self.first is None or self.second is None else self.second.value - self.first.value

    @property
    def overlap(self) -> bool | None:
        """Whether the 95 % intervals overlap; `None` where one is missing. Intervals that touch overlap."""
        a, b = self.first, self.second
        if a is None or b is None or a.low is None or a.high is None or b.low is None or b.high is None:
            return None
        return a.low <= b.high and b.low <= a.high


@dataclass
class Comparison:
    """
    Two reports side by side.

    Attributes:
        names: what the reports are called.
        rows: one for each figure of either report.
        warnings: why figures do not compare.
    """

    names: tuple[str, str]
    rows: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """As text: the table, then the warnings."""
        lines = [["prompts", "attack", "figure", *self.names, "difference", "intervals"]]
        overlaps = {None: "–", True: "overlap", False: "apart"}
        for row in self.rows:
            change = "–" if row.difference is None else f"{row.difference:+.2f}"
            values = [_cell(row.first), _cell(row.second), change, overlaps[row.overlap]]
            name = METRIC_NAMES.get(row.metric, row.metric)
            lines.append([row.split.replace("_", " "), row.attack, name, *values])
        return "\n".join([align(lines), *(f"WARNING: {warning}" for warning in self.warnings)])


def compare(
    first: Report,
    second: Report,
    *,
    names: tuple[str, str] = ("A", "B"),
    subjects: tuple[str | None, str | None] = (None, None),
) -> Comparison:
    """
    Lay two reports side by side.

    Args:
        first: a report.
        second: another one.
        names: what to call them.
        subjects: model of each report. Default: its only one, or `"after"`.

    Returns:
        A row for each figure of either report, and a warning for everything that keeps figures from comparing: other
        behaviours, another judge, other settings of an attack of the same name, another number of prompts.

    Raises:
        ValueError: a report has several models and no subject was given, or has none of that name.
    """
    found = [_figures(report, subject) for report, subject in zip((first, second), subjects, strict=True)]
    keys = list(dict.fromkeys([*found[0], *found[1]]))
    rows = [Row(*key, found[0].get(key), found[1].get(key)) for key in keys]
    return Comparison(names, rows, _warnings(first, second, rows))


def subject_of(report: Report, subject: str | None) -> str:
    """
    The model that a report is about.

    Args:
        report: the report.
        subject: the one asked for. Default: the report's only one, the one that its data names, or `"after"`.

    Raises:
        ValueError: there is none of that name.
    """
    subjects = list(dict.fromkeys(m.subject for m in report.measurements))
    if subject is None:
        if len(subjects) < 2:
            return subjects[0] if subjects else "model"
        # Beside controls (the original, an oracle) a report names the one that it is about
        subject = str(report.data.get("subject") or "after")
    if subject not in subjects:
        raise ValueError(f"`subject={subject!r}` has no figure in this report; name one of {subjects}.")
    return subject


def _figures(report: Report, subject: str | None) -> dict[tuple[str, str, str], Measurement]:
    subject = subject_of(report, subject)
    return {(m.split, m.attack, m.metric): m for m in report.measurements if m.subject == subject}


def _warnings(first: Report, second: Report, rows: list[Row]) -> list[str]:
    warnings = []
    judges = first.judge or None, second.judge or None
    if judges[0] != judges[1]:
        warnings.append(f"The judges differ ({_judge(judges[0])}; {_judge(judges[1])}): success rates do not compare.")
    for key in sorted(k for k in {*first.data, *second.data} if k.endswith("_digest")):
        if first.data.get(key) != second.data.get(key):
            name = key.removesuffix("_digest")
            warnings.append(
                f"The prompts of {name!r} are not the same (their digests differ): figures over them do not compare."
            )
    limits = [report.data.get("max_new_tokens") for report in (first, second)]
    if limits[0] != limits[1]:
        warnings.append(f"Answers are cut at {limits[0]} and {limits[1]} tokens (max_new_tokens).")
    for key in ("num_inference_steps", "guidance_scale"):
        if first.data.get(key) != second.data.get(key):
            warnings.append(f"Pictures are drawn with {key} {first.data.get(key)} and {second.data.get(key)}.")
    for name in (name for name in first.attacks if name in second.attacks):
        a, b = first.attacks[name], second.attacks[name]
        keys = [key for key in dict.fromkeys([*a, *b]) if key not in _NO_MATTER and a.get(key) != b.get(key)]
        if keys:
            shown = ", ".join(f"{key} {a.get(key)} → {b.get(key)}" for key in keys)
            warnings.append(f"The settings of {name} differ ({shown}): its figures do not compare.")
    other = (
        [name for name in first.attacks if name not in second.attacks],
        [name for name in second.attacks if name not in first.attacks],
    )
    if any(other):
        warnings.append(
            f"Run in one report only: {', '.join(other[0] + other[1])}. 'any attack' is over other attacks in each."
        )
    for row in rows:
        if row.first is not None and row.second is not None and row.first.count != row.second.count:
            name = METRIC_NAMES.get(row.metric, row.metric)
            warnings.append(
                f"{name} under {row.attack} ({row.split}) is over {row.first.count} and {row.second.count} prompts."
            )
    return warnings


def _judge(judge: dict[str, Any] | None) -> str:
    if judge is None:
        return "none stated"
    settings = ", ".join(f"{name} {value}" for name, value in (judge.get("settings") or {}).items())
    return str(judge.get("name", "unnamed")) + (f" with {settings}" if settings else "")


def _cell(m: Measurement | None) -> str:
    if m is None:
        return "–"
    places = ".2f" if m.unit == "share" else ".4g"
    text = f"{m.value:{places}}" + ("" if m.unit == "share" else f" {m.unit}")
    return text if m.low is None or m.high is None else f"{text} [{m.low:{places}}, {m.high:{places}}]"


def load_report(source: str | os.PathLike[str]) -> Report:
    """
    Read a report from a file, a folder or the Hub.

    Args:
        source: report.json, a folder with one, or the id of a Hub repository with one.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a report of this library.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / "report.json"
        if not path.is_file():
            raise FileNotFoundError(f"`source={str(source)!r}` has no report.json: give an evaluation's output folder.")
    elif not path.is_file():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

        try:
            path = Path(hf_hub_download(str(source), "report.json"))
        except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError) as error:
            raise FileNotFoundError(
                f"`source={str(source)!r}` is no file or folder, and no report.json of a Hub repository of that name can be "
                f"had ({type(error).__name__})."
            ) from error
    return Report.load(path)
