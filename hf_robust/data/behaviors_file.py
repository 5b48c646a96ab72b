"""Files of behaviours for evaluation: public ones (HarmBench, AdvBench, JailbreakBench) and our own JSONL."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_robust.data.behavior import Behavior
from hf_robust.data.behaviors import (
    BEHAVIOR_COLUMNS,
    CONTEXT_SEPARATOR,
    PathLike,
    _csv_rows,
    _existing,
    _filled,
    _read_targets,
    behavior_format,
    csv_header,
    targets_path,
)
from hf_robust.data.checks import SHOWN_ROWS, check_text_or_messages
from hf_robust.files import whole_file

logger = logging.getLogger(__name__)

_OWN_COLUMNS = ("id", "prompt", "target", "category", "answer", "metadata")
# Names of the right answer in question-and-answer files, tried in this order
_ANSWER_COLUMNS = ("answer", "response", "completion")
_ROW_HINT = "A prompt is text, or a list of messages that ends with the user's."


def read_behaviors(
    path: PathLike,
    *,
    targets: PathLike | None = None,
    conversational: bool | None = True,
    require_targets: bool = False,
    argument: str = "path",
) -> list[Behavior]:
    """
    Behaviours to evaluate on, in the order of the file.

    The format is told by the columns: HarmBench (`Behavior`, `BehaviorID`; the targets in a JSON file of their own),
    JailbreakBench (`Goal`, `Target`), AdvBench (`goal`, `target`), or our own: `prompt` and, optionally, `id`, `target`,
    `category` and `answer` (or `response`, `completion`), as JSONL (one object a line, as [`write_behaviors`] writes) or
    CSV. Ids are those of [`read_harmbench`] and the other readers of training rows; rows of our own format without `id` are
    called `row_0`, `row_1`, ... Columns of no meaning here go to `metadata`.

    Args:
        path: .csv or .jsonl file.
        targets: JSON of a HarmBench file's targets. Default: beside it, see [`targets_path`]; where none is there, the
            behaviours have no target. Of several targets the first is taken; all are kept in `metadata["targets"]`.
        conversational: `True` turns a text prompt into one user message (for a chat template); `False` leaves it as it is
            and refuses messages; `None` leaves all prompts as they are.
        require_targets: whether a behaviour without target is an error. Attacks that aim need one; plain prompting and
            best-of-N do not.
        argument: what the user calls `path`, for the error messages.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: missing columns (the message lists what there is), a row that is no JSON object, an empty or unsuitable
            cell, repeated ids, or, with `require_targets`, a behaviour without target; names argument, row and remedy.
    """
    path = _existing(Path(path).expanduser(), argument)
    where = f"`{argument}={str(path)!r}`"
    ending = path.suffix.lower()
    if ending not in (".csv", ".jsonl"):
        raise ValueError(f"{where} is a file of an unknown kind ({path.suffix!r}). Give a .csv or .jsonl file.")
    kind = behavior_format(csv_header(path)) if ending == ".csv" else None
    if targets is not None and kind != "harmbench":
        raise ValueError(f"`targets={str(targets)!r}` belongs to HarmBench behaviours, which {where} does not hold.")
    if ending == ".jsonl":
        behaviors = _from_own(read_jsonl(path, where), where)
    else:
        rows = _csv_rows(path, argument, BEHAVIOR_COLUMNS[kind] if kind else ())
        if kind == "harmbench":
            behaviors = _from_harmbench(rows, where, _find_targets(path, targets, where))
        else:
            behaviors = _from_goals(rows, where, kind) if kind else _from_own(rows, where)
    return checked_behaviors(behaviors, where, conversational=conversational, require_targets=require_targets)


def checked_behaviors(
    behaviors: Sequence[Behavior], where: str, *, conversational: bool | None, require_targets: bool
) -> list[Behavior]:
    """
    The behaviours with their prompts as text or messages, after the checks that [`read_behaviors`] names.

    Args:
        behaviors: as read.
        where: how errors name the file.
        conversational: see [`read_behaviors`].
        require_targets: see [`read_behaviors`].
    """
    rows: dict[str, int] = {}
    checked = []
    for index, behavior in enumerate(behaviors):
        row = f"row {index} ({behavior.id!r}) of {where}"
        if behavior.id in rows:
            raise ValueError(
                f"The id {behavior.id!r} stands in rows {rows[behavior.id]} and {index} of {where}; ids must be unique."
            )
        rows[behavior.id] = index
        if require_targets and behavior.target is None:
            raise ValueError(
                f"{row[0].upper()}{row[1:]} has no target, which attacks aim at. Add the beginning of a compliant answer as "
                "its `target` (for HarmBench: in the targets' JSON), or run only attacks that need none."
            )
        kind = check_text_or_messages(behavior.prompt, f"`prompt` of {row}", _ROW_HINT)
        if kind == "messages":
            if conversational is False:
                raise ValueError(f"`prompt` of {row} holds messages; `conversational=False` asks for plain text.")
            last = behavior.prompt[-1]
            if last["role"] != "user" or not isinstance(last["content"], str):
                raise ValueError(f"`prompt` of {row} ends with {last!r}. {_ROW_HINT}")
        prompt = behavior.prompt
        if kind == "text" and conversational:
            prompt = [{"role": "user", "content": behavior.prompt}]
        checked.append(
            Behavior(behavior.id, prompt, behavior.target, behavior.category, behavior.answer, behavior.metadata)
        )
    return checked


def read_jsonl(path: Path, where: str) -> list[dict[str, Any]]:
    """
    Objects of a JSONL file; blank lines are skipped.

    Args:
        path: the file.
        where: how errors name it.

    Raises:
        ValueError: a line that is no JSON object, or no line at all.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} of {where} is not JSON ({error}). Write one object a line.") from error
        if not isinstance(row, dict):
            raise ValueError(f"Line {number} of {where} is {row!r}, not an object. Write one object a line.")
        rows.append(row)
    if not rows:
        raise ValueError(f"{where} has no row.")
    return rows


def _text_or_none(row: Mapping[str, Any], column: str, index: int, where: str) -> str | None:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise ValueError(
            f"`{column}` of row {index} of {where} is {value!r}, not text. Write it as text, or leave it out."
        )
    return value if value and value.strip() else None


def _from_own(rows: Sequence[Mapping[str, Any]], where: str) -> list[Behavior]:
    behaviors = []
    for index, row in enumerate(rows):
        if "prompt" not in row:
            raise ValueError(
                f"Row {index} of {where} has no `prompt`; it has {list(row)}. Give HarmBench, AdvBench or JailbreakBench "
                f"columns ({list(BEHAVIOR_COLUMNS.values())}), or `prompt` and optionally `id`, `target`, `category`, "
                "`answer`."
            )
        behavior_id = row.get("id")
        behavior_id = (
            f"row_{index}" if behavior_id is None or not str(behavior_id).strip() else str(behavior_id).strip()
        )
        metadata = row.get("metadata") or {}
        if not isinstance(metadata, Mapping):
            raise ValueError(f"`metadata` of row {index} of {where} is {metadata!r}, not an object.")
        answer = next((column for column in _ANSWER_COLUMNS if column in row), "answer")
        extra = {name: value for name, value in row.items() if name not in (*_OWN_COLUMNS, answer)}
        texts = {name: _text_or_none(row, name, index, where) for name in ("target", "category", answer)}
        behaviors.append(
            Behavior(
                id=behavior_id,
                prompt=row["prompt"],
                target=texts["target"],
                category=texts["category"],
                answer=texts[answer],
                metadata={**extra, **metadata},
            )
        )
    return behaviors


def _find_targets(path: Path, targets: PathLike | None, where: str) -> dict[str, list[str]]:
    if targets is not None:
        return _read_targets(targets, "targets")
    beside = targets_path(path)
    if beside.is_file():
        return _read_targets(beside, "targets")
    logger.warning("%s holds HarmBench behaviours; no targets are at %r, so they have none.", where, str(beside))
    return {}


def _from_harmbench(rows: Sequence[Mapping[str, str]], where: str, targets: Mapping[str, list[str]]) -> list[Behavior]:
    behaviors = []
    for index, row in enumerate(rows):
        behavior_id = _filled(row, "BehaviorID", index, where)
        prompt = _filled(row, "Behavior", index, where)
        context = row.get("ContextString", "").strip()
        found = targets.get(behavior_id, [])
        # HarmBench's test files say SemanticCategory, its training files Category
        category = (row.get("SemanticCategory") or row.get("Category") or "").strip() or None
        used = ("Behavior", "BehaviorID", "ContextString", "SemanticCategory", "Category")
        behaviors.append(
            Behavior(
                id=behavior_id,
                prompt=f"{context}{CONTEXT_SEPARATOR}{prompt}" if context else prompt,
                target=found[0] if found else None,
                category=category,
                metadata=_further(row, used) | ({"targets": found} if len(found) > 1 else {}),
            )
        )
    if targets and not any(behavior.target for behavior in behaviors):
        raise ValueError(
            f"The targets have an entry for none of the behaviours of {where} (first id: {behaviors[0].id!r}, first "
            f"targets: {list(targets)[:SHOWN_ROWS]}). Give the file that belongs to them as `targets`."
        )
    return behaviors


def _from_goals(rows: Sequence[Mapping[str, str]], where: str, kind: str) -> list[Behavior]:
    """Rows of a goal and a target; ids as in the preference rows of the same file."""
    goal, target = BEHAVIOR_COLUMNS[kind]
    numbers = [row.get("Index", "").strip() for row in rows]
    if len(set(numbers)) < len(rows) or "" in numbers:
        numbers = [str(number) for number in range(1, len(rows) + 1)]
    prefix = "jbb" if kind == "jailbreakbench" else kind
    return [
        Behavior(
            id=f"{prefix}_{number}",
            prompt=_filled(row, goal, index, where),
            target=row[target].strip() or None,
            category=row.get("Category", "").strip() or None,
            metadata=_further(row, (goal, target, "Index", "Category")),
        )
        for index, (number, row) in enumerate(zip(numbers, rows, strict=True))
    ]


def _further(row: Mapping[str, str], used: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in used and value.strip()}


def _as_json(behavior: Behavior) -> dict[str, Any]:
    values = {name: getattr(behavior, name) for name in _OWN_COLUMNS}
    return {name: value for name, value in values.items() if value is not None and value != {}}


def write_behaviors(path: PathLike, behaviors: Iterable[Behavior]) -> Path:
    """
    Write behaviours as JSONL, which [`read_behaviors`] reads back; an older file is replaced only once the new one is whole.

    Args:
        path: file to write, ending in .jsonl.
        behaviors: with metadata of JSON values.

    Raises:
        ValueError: `path` has another ending.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() != ".jsonl":
        raise ValueError(f"`path={str(path)!r}` must end in .jsonl: the ending tells readers the format.")
    lines = [json.dumps(_as_json(behavior), ensure_ascii=False, allow_nan=False) for behavior in behaviors]
    with whole_file(path) as draft:
        draft.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def behaviors_digest(behaviors: Iterable[Behavior]) -> str:
    """
    Fingerprint of a list of behaviours: SHA-256, as hexadecimal digits, of all that an evaluation uses (id, prompt, target,
    category and answer, in this order of behaviours; no metadata).

    Args:
        behaviors: the list.
    """
    rows = [{name: value for name, value in _as_json(behavior).items() if name != "metadata"} for behavior in behaviors]
    text = json.dumps(rows, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
