"""Public behaviour files (HarmBench, AdvBench, JailbreakBench) as TRL preference rows."""

import csv
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_robust.data.checks import SHOWN_ROWS

logger = logging.getLogger(__name__)

# The constant safe answer of the CAT authors' configuration (arXiv 2405.15589).
SAFE_RESPONSE = "Sorry, I can't do that."
# What HarmBench puts between a behaviour's context and the behaviour.
CONTEXT_SEPARATOR = "\n\n---\n\n"
# Behaviour formats by the columns that tell them apart.
BEHAVIOR_COLUMNS = {
    "harmbench": ("Behavior", "BehaviorID"),
    "jailbreakbench": ("Goal", "Target"),
    "advbench": ("goal", "target"),
}
PathLike = str | Path


def _existing(path: PathLike, argument: str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`{argument}={str(path)!r}` is not a file. Give the path of an existing file.")
    return path


def csv_header(path: Path) -> list[str]:
    """First row of a CSV."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file), [])


def _csv_rows(path: PathLike, argument: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """All rows as text, so that an answer `None` or `007` stays what it is; checks the columns."""
    path = _existing(path, argument)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        header = list(reader.fieldnames or [])
        rows: list[dict[Any, Any]] = list(reader)
    missing = [column for column in columns if column not in header]
    if missing:
        raise ValueError(f"`{argument}={str(path)!r}` lacks the columns {missing}; it has {header}. Check the format.")
    if not rows:
        raise ValueError(f"`{argument}={str(path)!r}` has a header but no row.")
    for index, row in enumerate(rows):
        # More cells than columns: most often a text with a comma that is not quoted, and would be cut off at it.
        if None in row:
            raise ValueError(f"Row {index} of `{argument}={str(path)!r}` has too many cells ({row}). Quote its text.")
    return [{key: value or "" for key, value in row.items()} for row in rows]


def _filled(row: Mapping[str, Any], column: str, index: int, where: str) -> str:
    value = str(row[column] if row[column] is not None else "").strip()
    if not value:
        raise ValueError(f"`{column}` of row {index} of {where} is empty. Remove the row or fill it in.")
    return value


def _check_max_targets(max_targets: int | None) -> None:
    if max_targets is not None and (
        isinstance(max_targets, bool) or not isinstance(max_targets, int) or max_targets < 1
    ):
        raise ValueError(f"`max_targets={max_targets!r}` must be a whole number above 0, or None for all targets.")


def _preference_rows(
    behaviors: Iterable[tuple[str, str, str, Sequence[str]]], conversational: bool, max_targets: int | None
) -> Dataset:
    """One row per behaviour × target from (id, prompt, safe answer, targets)."""
    rows: dict[str, list[Any]] = {"prompt": [], "chosen": [], "rejected": [], "behavior_id": []}
    for behavior_id, prompt, safe, targets in behaviors:
        for target in targets[:max_targets]:
            rows["behavior_id"].append(behavior_id)
            if conversational:
                rows["prompt"].append([{"role": "user", "content": prompt}])
                rows["chosen"].append([{"role": "assistant", "content": safe}])
                rows["rejected"].append([{"role": "assistant", "content": target}])
            else:
                # TRL joins plain prompt and answer as they stand: without the space their words would run together.
                rows["prompt"].append(prompt)
                rows["chosen"].append(f" {safe}")
                rows["rejected"].append(f" {target}")
    return Dataset.from_dict(rows)


def targets_path(behaviors_csv: PathLike) -> Path:
    """Where the targets of a HarmBench behaviours CSV are looked for: `x_behaviors.csv` → `x_targets.json`."""
    path = Path(behaviors_csv)
    head, found, tail = path.stem.rpartition("behaviors")
    stem = f"{head}targets{tail}" if found else f"{path.stem}_targets"
    return path.with_name(f"{stem}.json")


def _read_targets(targets_json: PathLike, argument: str) -> dict[str, list[str]]:
    path = _existing(targets_json, argument)
    where = f"`{argument}={str(path)!r}`"
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}).") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f'{where} must hold an object {{"behaviour id": "target" or ["target", ...], ...}}.')
    targets, blank = {}, []
    for key, value in content.items():
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
            raise ValueError(f"The target of {key!r} in {where} is {value!r}, not text or a list of texts.")
        # HarmBench's own adversarial-training file has a blank among twelve targets.
        targets[key] = [text for text in values if text.strip()]
        if not targets[key]:
            raise ValueError(f"The target of {key!r} in {where} is empty ({value!r}). Fill it in.")
        blank += [key] * (len(values) - len(targets[key]))
    if blank:
        logger.warning("%d blank targets of %s are skipped (first ids: %s).", len(blank), where, blank[:SHOWN_ROWS])
    return targets


def _safe_responses(path: PathLike | None, behaviors: Sequence[str], safe_response: str, argument: str) -> list[str]:
    """The safe answer to each behaviour."""
    if not isinstance(safe_response, str) or not safe_response.strip():
        raise ValueError(f"`safe_response={safe_response!r}` must be a text, such as {SAFE_RESPONSE!r}.")
    if path is None:
        return [safe_response] * len(behaviors)
    rows = _csv_rows(path, argument, ("Behavior", "Safe_Response"))
    where = f"`{argument}={str(path)!r}`"
    safe = {row["Behavior"].strip(): _filled(row, "Safe_Response", i, where) for i, row in enumerate(rows)}
    missing = [index for index, behavior in enumerate(behaviors) if behavior not in safe]
    if len(missing) == len(behaviors):
        raise ValueError(
            f"{where} answers none of the behaviours: its `Behavior` column must repeat the behaviours' text. "
            "Give the file that belongs to them, or none."
        )
    if missing:
        logger.warning(
            "%s has no answer to %d of the %d behaviours (first rows: %s); they get safe_response=%r.",
            *(where, len(missing), len(behaviors), missing[:SHOWN_ROWS], safe_response),
        )
    return [safe.get(behavior, safe_response) for behavior in behaviors]


def _targets_or_sibling(behaviors: PathLike, targets: PathLike | None, argument: str, targets_argument: str) -> Path:
    path = targets_path(behaviors) if targets is None else Path(targets)
    if not path.is_file():
        asked = f"`{targets_argument}={str(path)!r}` is not a file"
        expected = f"`{argument}={str(behaviors)!r}` holds HarmBench behaviours, whose targets are not at {str(path)!r}"
        raise FileNotFoundError(
            f"{expected if targets is None else asked}. Put the targets' JSON there, or give its path as "
            f"`{targets_argument}`."
        )
    return path


def _from_harmbench(
    rows: Sequence[Mapping[str, Any]],
    where: str,
    targets_json: PathLike,
    targets_argument: str,
    safe_responses: PathLike | None,
    safe_argument: str,
    safe_response: str,
    conversational: bool,
    max_targets: int | None,
) -> Dataset:
    ids = [_filled(row, "BehaviorID", index, where) for index, row in enumerate(rows)]
    behaviors = [_filled(row, "Behavior", index, where) for index, row in enumerate(rows)]
    twice = [behavior_id for behavior_id, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"`BehaviorID` {twice[:SHOWN_ROWS]} of {where} stands in several rows; ids must be unique.")
    targets = _read_targets(targets_json, targets_argument)
    missing = [behavior_id for behavior_id in ids if behavior_id not in targets]
    if missing:
        raise ValueError(
            f"`{targets_argument}={str(targets_json)!r}` has no target for {len(missing)} of the {len(ids)} behaviours "
            f"of {where} (first: {missing[:SHOWN_ROWS]}). Give the targets that belong to these behaviours."
        )
    safe = _safe_responses(safe_responses, behaviors, safe_response, safe_argument)
    contexts = [str(row.get("ContextString") or "").strip() for row in rows]
    prompts = [f"{c}{CONTEXT_SEPARATOR}{b}" if c else b for c, b in zip(contexts, behaviors, strict=True)]
    columns = zip(ids, prompts, safe, (targets[behavior_id] for behavior_id in ids), strict=True)
    return _preference_rows(columns, conversational, max_targets)


def _from_goals(
    rows: Sequence[Mapping[str, Any]],
    where: str,
    kind: str,
    safe_responses: PathLike | None,
    safe_argument: str,
    safe_response: str,
    conversational: bool,
) -> Dataset:
    """Rows of a goal and a target; ids from `Index` or, where it is absent or not unique, counted from 1."""
    goal, target = BEHAVIOR_COLUMNS[kind]
    goals = [_filled(row, goal, index, where) for index, row in enumerate(rows)]
    targets = [[_filled(row, target, index, where)] for index, row in enumerate(rows)]
    numbers = ["" if row.get("Index") is None else str(row["Index"]).strip() for row in rows]
    if len(set(numbers)) < len(rows) or "" in numbers:
        numbers = [str(number) for number in range(1, len(rows) + 1)]
    prefix = "jbb" if kind == "jailbreakbench" else kind
    safe = _safe_responses(safe_responses, goals, safe_response, safe_argument)
    behaviors = zip((f"{prefix}_{number}" for number in numbers), goals, safe, targets, strict=True)
    return _preference_rows(behaviors, conversational, None)


def behavior_format(columns: Iterable[str]) -> str | None:
    """`"harmbench"`, `"jailbreakbench"` or `"advbench"` if the columns are those of such a file, else `None`."""
    present = set(columns)
    if {"chosen", "rejected"} <= present:
        return None
    return next((kind for kind, wanted in BEHAVIOR_COLUMNS.items() if set(wanted) <= present), None)


def convert_behaviors(
    kind: str,
    rows: Sequence[Mapping[str, Any]] | None,
    source: PathLike,
    *,
    targets: PathLike | None = None,
    safe_responses: PathLike | None = None,
    safe_response: str = SAFE_RESPONSE,
    conversational: bool = True,
    max_targets: int | None = None,
    arguments: tuple[str, str, str] = ("source", "targets", "safe_responses"),
) -> Dataset:
    """
    Rows of a behaviour file as preference rows; what `read_*` and `load_preferences` have in common.

    Args:
        kind: see [`behavior_format`].
        rows: the file's rows, or `None` to read them from the CSV at `source`.
        source: path of the file, or Hub id.
        targets: see `targets_json` of [`read_harmbench`], as for the other arguments.
        safe_responses: file with the safe answers.
        safe_response: safe answer where there is no such file.
        conversational: messages or plain text.
        max_targets: first so many targets only.
        arguments: what the user calls `source`, `targets` and `safe_responses`, for the error messages.
    """
    argument, targets_argument, safe_argument = arguments
    _check_max_targets(max_targets)
    rows = _csv_rows(source, argument, BEHAVIOR_COLUMNS[kind]) if rows is None else rows
    where = f"`{argument}={str(source)!r}`"
    safe = (safe_responses, safe_argument, safe_response)
    if kind == "harmbench":
        path = _targets_or_sibling(source, targets, argument, targets_argument)
        return _from_harmbench(rows, where, path, targets_argument, *safe, conversational, max_targets)
    if "benign" in Path(source).stem.lower():
        logger.warning("%s seems to hold benign behaviours: training against them teaches over-refusal.", where)
    return _from_goals(rows, where, kind, *safe, conversational)


_READER_ARGUMENTS = ("behaviors_csv", "targets_json", "safe_responses_csv")


def read_harmbench(
    behaviors_csv: PathLike,
    targets_json: PathLike | None = None,
    safe_responses_csv: PathLike | None = None,
    *,
    safe_response: str = SAFE_RESPONSE,
    conversational: bool = True,
    max_targets: int | None = None,
) -> Dataset:
    """
    HarmBench behaviours and targets as TRL preference rows, one row per behaviour × target.

    Args:
        behaviors_csv: file with the columns `Behavior`, `BehaviorID` and, optionally, `ContextString`, which is put
            before the behaviour as HarmBench does.
        targets_json: object of behaviour id → affirmative target, or list of them. Default: the file beside
            `behaviors_csv` with "targets" for "behaviors" in its name (see [`targets_path`]).
        safe_responses_csv: file with the columns `Behavior` and `Safe_Response`.
        safe_response: safe answer where there is no such file. Default: the CAT authors' (arXiv 2405.15589).
        conversational: messages (for a chat template) or plain text, whose answers then begin with a space.
        max_targets: keep only the first so many targets of each behaviour. Default: all.

    Returns:
        A dataset with the columns `prompt`, `chosen` (safe), `rejected` (the target) and `behavior_id`.

    Raises:
        FileNotFoundError: if a file is missing; names the argument and the path expected.
        ValueError: for missing columns, empty cells, repeated ids, behaviours without target.
    """
    return convert_behaviors(
        "harmbench",
        None,
        behaviors_csv,
        targets=targets_json,
        safe_responses=safe_responses_csv,
        safe_response=safe_response,
        conversational=conversational,
        max_targets=max_targets,
        arguments=_READER_ARGUMENTS,
    )


def read_advbench(
    behaviors_csv: PathLike,
    targets_json: PathLike | None = None,
    safe_responses_csv: PathLike | None = None,
    *,
    safe_response: str = SAFE_RESPONSE,
    conversational: bool = True,
    max_targets: int | None = None,
) -> Dataset:
    """
    AdvBench as TRL preference rows: the original CSV (`goal`, `target`; ids `advbench_1`, ...) or the one in
    HarmBench's format, for which see [`read_harmbench`], also for arguments, columns and errors.
    """
    header = csv_header(_existing(behaviors_csv, "behaviors_csv"))
    return convert_behaviors(
        "harmbench" if behavior_format(header) == "harmbench" else "advbench",
        None,
        behaviors_csv,
        targets=targets_json,
        safe_responses=safe_responses_csv,
        safe_response=safe_response,
        conversational=conversational,
        max_targets=max_targets,
        arguments=_READER_ARGUMENTS,
    )


def read_jailbreakbench(
    behaviors_csv: PathLike,
    safe_responses_csv: PathLike | None = None,
    *,
    safe_response: str = SAFE_RESPONSE,
    conversational: bool = True,
) -> Dataset:
    """
    JBB-Behaviors' harmful behaviours (`Index`, `Goal`, `Target`, `Behavior`, `Category`, `Source`) as TRL preference
    rows with ids `jbb_<Index>`. The benign file has the same columns, but must not be trained against.
    For arguments, columns and errors see [`read_harmbench`].
    """
    return convert_behaviors(
        "jailbreakbench",
        None,
        behaviors_csv,
        safe_responses=safe_responses_csv,
        safe_response=safe_response,
        conversational=conversational,
        arguments=_READER_ARGUMENTS,
    )
