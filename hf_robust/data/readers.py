"""Readers: preference and utility data from the Hub, a folder or a file, and the split by behaviour."""

import glob
import json
import logging
import math
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from hf_robust.data.behaviors import (
    SAFE_RESPONSE,
    PathLike,
    behavior_format,
    convert_behaviors,
    csv_header,
    read_advbench,
    read_harmbench,
    read_jailbreakbench,
)
from hf_robust.data.checks import (
    check_preference_columns,
    check_preference_row,
    check_preferences,
    check_text_or_messages,
    with_prompt,
)
from hf_robust.threats import check_choice

__all__ = [
    "load_preferences",
    "load_utility",
    "read_advbench",
    "read_harmbench",
    "read_jailbreakbench",
    "split_by_behavior",
]

logger = logging.getLogger(__name__)

SUFFIXES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# Columns besides the texts that TRL passes to the chat template.
_TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
# Of vision-language models, each with the placeholders in its row's messages
_IMAGE_COLUMNS = ("images", "image")
_TEXT_COLUMNS = ("prompt", "chosen", "rejected", "completion", "messages")
_SOURCE_HINT = "Give a Hub id, a folder, or a .csv, .json, .jsonl or .parquet file."
_UTILITY_FORMATS = (("prompt", "completion"), ("messages",), ("text",))
_UTILITY_HINT = (
    "Give rows as for `SFTTrainer`: `prompt` and `completion` (or `response`), or `messages`, or `text`; prompt and "
    "completion both strings or both lists of messages."
)

AnyDataset: TypeAlias = Dataset | IterableDataset


def _load(source: PathLike, split: str, name: str | None, streaming: bool, where: str) -> AnyDataset:
    """One split of a dataset, wherever it lies; texts of a CSV stay texts."""
    path = Path(source).expanduser()
    text = str(source)
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        saved = load_from_disk(str(path))
        if isinstance(saved, DatasetDict):
            check_choice("split", split, list(saved))
            saved = saved[split]
        return saved.to_iterable_dataset() if streaming else saved
    arguments: dict[str, Any] = {"path": str(path) if path.is_dir() else text, "name": name}
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{where} is a file of an unknown kind ({path.suffix!r}). {_SOURCE_HINT}")
        # `data_files` is a pattern, in which a bracket of the path would stand for something else.
        arguments = {"path": SUFFIXES[path.suffix.lower()], "data_files": glob.escape(str(path))}
        if arguments["path"] == "csv":
            header = csv_header(path)
            if not header:
                raise ValueError(f"{where} is empty. {_SOURCE_HINT}")
            # Without these an answer "42" becomes a number and an answer "None" a missing value.
            arguments |= {"features": Features({c: Value("string") for c in header}), "keep_default_na": False}
    elif not path.is_dir() and (path.suffix.lower() in SUFFIXES or path.is_absolute() or text.startswith((".", "~"))):
        raise FileNotFoundError(f"{where} does not exist. {_SOURCE_HINT}")
    try:
        return load_dataset(**arguments, split=split, streaming=streaming)
    except (ValueError, OSError, DatasetsError) as error:
        reason = " ".join(str(cause) for cause in (error, error.__cause__) if cause)
        raise ValueError(
            f"{where} could not be loaded (`split={split!r}`, `name={name!r}`): {reason} Check that it has rows and "
            f"such a split. {_SOURCE_HINT}"
        ) from error


def _columns(dataset: AnyDataset, where: str) -> list[str]:
    """Column names; of a stream that does not know them, those of its first row."""
    return list(dataset.column_names or _first(dataset, where))


def _first(dataset: AnyDataset, where: str) -> dict[str, Any]:
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"{where} has 0 rows. Check the file and `split`.")
    return dict(row)


def _keep(dataset: AnyDataset, columns: Sequence[str], wanted: Sequence[str]) -> AnyDataset:
    """Only the columns wanted: TRL tells conversational rows by any one column, so a stray `messages` misleads it."""
    return dataset.remove_columns([column for column in columns if column not in wanted])


def _decode_row(row: dict[str, Any], index: int, columns: Sequence[str], where: str) -> dict[str, Any]:
    decoded = {}
    for column in columns:
        try:
            decoded[column] = json.loads(row[column])
        except json.JSONDecodeError as error:
            raise ValueError(
                f"`{column}` of row {index} of {where} is not JSON ({error}), but that of row 0 is: {row[column]!r}."
            ) from error
    return decoded


def _decode_messages(dataset: AnyDataset, columns: Sequence[str], where: str) -> AnyDataset:
    """Text columns that hold messages as JSON, as a CSV must, decoded; the first row decides."""
    first = _first(dataset, where)
    encoded = []
    for column in set(columns) & set(_TEXT_COLUMNS):
        value = first[column]
        if isinstance(value, str) and value.lstrip().startswith("[{"):
            try:
                content = json.loads(value)
            except json.JSONDecodeError:
                continue
            if all(isinstance(message, dict) and "role" in message for message in content):
                encoded.append(column)
    if not encoded:
        return dataset
    if isinstance(dataset, Dataset):
        rows = [{**row, **_decode_row(row, index, encoded, where)} for index, row in enumerate(dataset)]
        return Dataset.from_list(rows)
    return dataset.map(partial(_decode_row, columns=encoded, where=where), with_indices=True, features=None)


def _as_messages(row: dict[str, Any], roles: dict[str, str]) -> dict[str, Any]:
    return {column: [{"role": role, "content": row[column].strip()}] for column, role in roles.items()}


def load_preferences(
    source: PathLike,
    *,
    split: str = "train",
    name: str | None = None,
    streaming: bool = False,
    targets: PathLike | None = None,
    safe_responses: PathLike | None = None,
    safe_response: str = SAFE_RESPONSE,
    conversational: bool | None = None,
    max_targets: int | None = None,
    argument: str = "source",
) -> AnyDataset:
    """
    Adversarial rows: TRL preference data, or a behaviour file of HarmBench, AdvBench or JailbreakBench, recognised by
    its columns.

    Args:
        source: Hub id, folder (also one written by `save_to_disk`), or .csv, .json, .jsonl or .parquet file.
        split: split to read. A file has only `"train"`.
        name: configuration of a Hub dataset.
        streaming: return an `IterableDataset`, of which only the first row has been checked.
        targets: JSON of a HarmBench file's targets. Default: beside it, see [`read_harmbench`].
        safe_responses: CSV of a behaviour file's safe answers.
        safe_response: safe answer to a behaviour that has none.
        conversational: `True` turns plain rows into messages, `None` (default) leaves preference rows as they are and
            makes messages of behaviours, `False` gives plain behaviours and refuses messages.
        max_targets: keep only the first so many targets of a HarmBench behaviour.
        argument: what the user calls `source`, for error messages.

    Returns:
        A dataset with the columns `chosen`, `rejected`, `prompt` (unless it is implicit in both) and, if present,
        `behavior_id`, `tools`, `chat_template_kwargs`; other columns are dropped. In a CSV, messages are JSON text.

    Raises:
        FileNotFoundError: if a file is missing; a missing targets file is named by the path expected.
        ValueError: for a source that cannot be read, missing columns, empty or unsuitable cells.
    """
    label = f"{argument}={str(source)!r}"
    where = f"`{label}`"
    behaviors = {
        "targets": targets,
        "safe_responses": safe_responses,
        "safe_response": safe_response,
        "conversational": conversational is not False,
        "max_targets": max_targets,
        "arguments": (argument, "targets", "safe_responses"),
    }
    path = Path(source).expanduser()
    kind = behavior_format(csv_header(path)) if path.suffix.lower() == ".csv" and path.is_file() else None
    if kind is not None:
        check_choice("split", split, ["train"])
        dataset: AnyDataset = convert_behaviors(kind, None, path, **behaviors)  # type: ignore[arg-type]
        return dataset.to_iterable_dataset() if streaming else dataset
    dataset = _load(source, split, name, streaming, where)
    columns = _columns(dataset, where)
    kind = behavior_format(columns)
    if kind is not None:
        rows = [dict(row) for row in dataset]
        dataset = convert_behaviors(kind, rows, source, **behaviors)  # type: ignore[arg-type]
        return dataset.to_iterable_dataset() if streaming else dataset
    check_preference_columns(columns, label)
    if path.suffix.lower() == ".csv":
        dataset = _decode_messages(dataset, columns, where)
    first = _first(dataset, where)
    if isinstance(first.get("prompt"), str) and isinstance(first["chosen"], list):
        # As in ultrafeedback_binarized: the prompt once more beside two whole conversations.
        turns = first["chosen"]
        if turns and isinstance(turns[0], dict) and turns[0].get("role") in ("system", "user"):
            logger.info("The text column `prompt` of %s is dropped: the conversations begin with it.", where)
            columns = [column for column in columns if column != "prompt"]
            dataset = dataset.remove_columns("prompt")
    dataset = _keep(dataset, columns, ("prompt", "chosen", "rejected", "behavior_id", *_TEMPLATE_COLUMNS))
    if isinstance(dataset, Dataset):
        found = check_preferences(dataset, label)
    else:
        found = check_preference_row(_first(dataset, where), 0, label)
    if conversational is False and found == "messages":
        raise ValueError(f"{where} holds messages, `conversational=False` asks for plain text. Leave it at None.")
    if conversational and found == "text":
        if "prompt" not in columns:
            raise ValueError(
                f"`conversational=True` needs a `prompt` column in {where} to tell question and answer apart; its "
                f"columns are {columns}."
            )
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        dataset = dataset.map(partial(_as_messages, roles=roles))
    return dataset


def load_utility(
    source: PathLike,
    *,
    split: str = "train",
    name: str | None = None,
    streaming: bool = False,
    conversational: bool | None = None,
    argument: str = "source",
) -> AnyDataset:
    """
    Utility rows, as `SFTTrainer` takes them: prompt and completion, messages or text.

    Args:
        source: Hub id, folder (also one written by `save_to_disk`), or .csv, .json, .jsonl or .parquet file.
        split: split to read. A file has only `"train"`.
        name: configuration of a Hub dataset.
        streaming: return an `IterableDataset`, of which only the first row has been checked.
        conversational: `True` turns plain prompts and completions into messages, `None` (default) leaves rows as they
            are, `False` refuses messages.
        argument: what the user calls `source`, for error messages.

    Returns:
        A dataset with the columns `prompt` and `completion`, or `messages`, or `text` (the first of these that is
        there), and, if present, `images` or `image`, `tools` and `chat_template_kwargs`; other columns are dropped. A column
        `response` beside `prompt` is renamed to `completion`. In a CSV, messages are JSON text.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: for a source that cannot be read, missing columns, empty or unsuitable cells.
    """
    where = f"`{argument}={str(source)!r}`"
    dataset = _load(source, split, name, streaming, where)
    return utility_rows(dataset, where, conversational=conversational, csv=Path(source).suffix.lower() == ".csv")


def utility_rows(
    dataset: AnyDataset, where: str, *, conversational: bool | None, csv: bool = False, keep: bool = False
) -> AnyDataset:
    """
    Rows as [`load_utility`] returns them.

    Args:
        dataset: the rows as they were read.
        where: how errors name their source.
        conversational: see [`load_utility`].
        csv: whether messages may be JSON text.
        keep: whether columns that say nothing else of prompt, completion or messages stay.

    Raises:
        ValueError: missing columns, empty or unsuitable cells.
    """
    columns = _columns(dataset, where)
    if {"prompt", "response"} <= set(columns) and "completion" not in columns:
        logger.info("The column `response` of %s is renamed to `completion`.", where)
        dataset = dataset.rename_column("response", "completion")
        columns = ["completion" if column == "response" else column for column in columns]
    wanted = next((kind for kind in _UTILITY_FORMATS if set(kind) <= set(columns)), None)
    if wanted is None:
        adversarial = behavior_format(columns) or {"chosen", "rejected"} <= set(columns)
        hint = "These are adversarial rows, which belong in the adversarial dataset. " if adversarial else ""
        raise ValueError(f"{where} is no utility data; its columns are {columns}. {hint}{_UTILITY_HINT}")
    others = {column for kind in _UTILITY_FORMATS for column in kind}
    kept = [c for c in columns if c not in others] if keep else [*_IMAGE_COLUMNS, *_TEMPLATE_COLUMNS]
    dataset = _keep(dataset, columns, (*wanted, *kept))
    if csv:
        dataset = _decode_messages(dataset, wanted, where)
    first = _first(dataset, where)
    if isinstance(dataset, Dataset):
        texts = dataset.select_columns(list(wanted))  # decodes no image
        kinds = {_check_utility_row(row, index, wanted, where) for index, row in enumerate(texts)}
        if len(kinds) > 1:
            raise ValueError(f"{where} has rows of text and rows of messages; all must be alike. {_UTILITY_HINT}")
        found = kinds.pop()
    else:
        found = _check_utility_row(first, 0, wanted, where)
    if conversational is False and found == "messages":
        raise ValueError(f"{where} holds messages, `conversational=False` asks for plain text. Leave it at None.")
    if conversational and found == "text":
        if "prompt" not in wanted:
            raise ValueError(
                f"`conversational=True` needs `prompt` and `completion` in {where} to tell question and answer apart; "
                f"its columns are {columns}."
            )
        dataset = dataset.map(partial(_as_messages, roles={"prompt": "user", "completion": "assistant"}))
    return dataset


def _check_utility_row(row: dict[str, Any], index: int, wanted: Sequence[str], where: str) -> str:
    """`"text"` or `"messages"`; an error for anything else."""
    kinds = {c: check_text_or_messages(row[c], f"`{c}` of row {index} of {where}", _UTILITY_HINT) for c in wanted}
    expected = {"messages": "messages", "text": "text"}.get(wanted[0], kinds[wanted[0]])
    if any(kind != expected for kind in kinds.values()):
        raise ValueError(f"Row {index} of {where} holds {kinds}, expected {expected}. {_UTILITY_HINT}")
    return expected


def _user_text(row: dict[str, Any]) -> str:
    """What the user asks in a preference row, in lower case and with single spaces: the behaviour's identity."""
    prompt = with_prompt(row)["prompt"]
    if isinstance(prompt, list):
        asked = [message for message in prompt if message["role"] == "user"] or prompt
        prompt = " ".join(str(message["content"]) for message in asked)
    return " ".join(prompt.casefold().split())


def split_by_behavior(dataset: Dataset, fraction_or_count: float | int = 0.2, seed: int = 0) -> tuple[Dataset, Dataset]:
    """
    Split preference rows so that no behaviour is on both sides, whatever its targets.

    Rows belong to one behaviour if the user asks the same in them (case and white space aside) or if their
    `behavior_id` is the same.

    Args:
        dataset: preference rows.
        fraction_or_count: how many behaviours to hold out: a share (float between 0 and 1) or a number (int).
        seed: seed of the choice.

    Returns:
        The rows to train on and the rows held out, each in the order of `dataset`.

    Raises:
        ValueError: if either side would be empty, or a row is not a preference row.
        TypeError: if `dataset` is not a map-style dataset.
    """
    check_preferences(dataset, "dataset")
    groups: list[int] = []  # of each row: the first row of its behaviour
    seen: dict[tuple[str, str], int] = {}
    for index, row in enumerate(dataset):
        keys = [("text", _user_text(row))]
        if row.get("behavior_id") is not None:
            keys.append(("id", str(row["behavior_id"])))
        found = {seen[key] for key in keys if key in seen}
        group = min(found, default=index)
        if len(found) > 1:  # this row shows that two behaviours are one
            groups = [group if other in found else other for other in groups]
            seen = {key: group if other in found else other for key, other in seen.items()}
        seen |= dict.fromkeys(keys, group)
        groups.append(group)
    behaviors = sorted(set(groups))
    count = fraction_or_count
    if isinstance(count, bool) or not isinstance(count, int | float) or not math.isfinite(count):
        count = -1
    elif isinstance(count, float):
        count = max(round(count * len(behaviors)), 1) if 0 < count < 1 else -1
    if not 0 < count < len(behaviors):
        raise ValueError(
            f"`fraction_or_count={fraction_or_count!r}` must be a share between 0 and 1, or a number of behaviours "
            f"from 1 to {len(behaviors) - 1}: `dataset` has {len(behaviors)} behaviours, and both sides need one."
        )
    held = set(random.Random(seed).sample(behaviors, count))
    return (
        dataset.select([index for index, group in enumerate(groups) if group not in held]),
        dataset.select([index for index, group in enumerate(groups) if group in held]),
    )
