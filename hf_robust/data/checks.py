"""Checks of preference rows before anything is computed from them: every error names argument, row, value, remedy."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

_FORMAT_HINT = (
    "Give TRL preference rows: `prompt` (optional), `chosen` (safe answer) and `rejected` (harmful answer), all three "
    "strings or all three lists of {'role': ..., 'content': ...} messages."
)
# How many row numbers a message lists.
SHOWN_ROWS = 5


def check_map_style(dataset: object, name: str = "adversarial_dataset") -> Dataset:
    """
    The dataset itself if it is a non-empty map-style `datasets.Dataset`.

    Args:
        dataset: what the user gave.
        name: name of the argument, for the error messages.

    Raises:
        TypeError: for a streaming dataset, a dictionary of splits, or anything else than a `datasets.Dataset`.
        ValueError: if there is no row.
    """
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"`{name}` is an `IterableDataset` (streaming), but its rows are mixed into every batch at random and so "
            "must be a map-style `datasets.Dataset`. Load it with `streaming=False`, or make one with "
            "`Dataset.from_list(list(dataset.take(n)))`."
        )
    if isinstance(dataset, Mapping):
        splits = ", ".join(map(repr, dataset))
        raise TypeError(f"`{name}` is a dictionary of splits ({splits}). Choose one, e.g. `dataset['train']`.")
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`{name}` must be a `datasets.Dataset`, not `{type(dataset).__name__}`. "
            "Make one with `Dataset.from_list(rows)` or `hf_robust.data.load_preferences(path)`."
        )
    if len(dataset) == 0:
        raise ValueError(f"`{name}` has 0 rows. {_FORMAT_HINT}")
    return dataset


def is_of_the_machine(error: Exception) -> bool:
    """
    Whether an error is about memory, disk or device: no row explains it, and callers (`auto_find_batch_size`) know it by its
    type.

    Args:
        error: while rows were read, prepared or made into a batch.
    """
    from accelerate.utils.memory import should_reduce_batch_size

    kinds = (OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
    # Without memory on the CPU, torch raises a bare RuntimeError
    return isinstance(error, kinds) or should_reduce_batch_size(error)


def is_empty_answer(value: str | list[Any]) -> bool:
    """Whether a string is blank, or a list of messages holds neither text nor a tool call."""
    if isinstance(value, str):
        return not value.strip()
    return not any(_has_text(message.get("content")) or message.get("tool_calls") for message in value)


def _has_text(content: Any) -> bool:
    if isinstance(content, list):
        return any(_has_text(block.get("text")) if isinstance(block, dict) else bool(block) for block in content)
    return isinstance(content, str) and bool(content.strip())


def cell_kind(value: object, where: str, remedy: str = _FORMAT_HINT) -> str:
    """
    Tell text from messages, and refuse everything else.

    Args:
        value: one cell of a dataset.
        where: how an error names the cell, e.g. `` `prompt` of row 3 of `train_dataset` ``.
        remedy: last sentence of an error.

    Returns:
        `"text"` or `"messages"`.

    Raises:
        ValueError: if the cell is neither.
    """
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        raise ValueError(f"{where} is {value!r:.200} ({type(value).__name__}), not text or messages. {remedy}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"{where} holds {message!r:.200}, which is not a message. {remedy}")
        if not isinstance(message["content"], str | list | None):
            raise ValueError(f"{where} holds a message whose content is {message['content']!r:.200}. {remedy}")
    return "messages"


def check_text_or_messages(value: Any, where: str, remedy: str = _FORMAT_HINT) -> str:
    """
    As [`cell_kind`], and refuse a cell that is empty.

    Args:
        value: one cell of a dataset.
        where: how an error names the cell.
        remedy: last sentence of an error.

    Returns:
        `"text"` or `"messages"`.

    Raises:
        ValueError: if the cell is neither, or is empty.
    """
    kind = cell_kind(value, where, remedy)
    if is_empty_answer(value):
        raise ValueError(f"{where} is empty ({value!r:.200}). Remove the row or fill it in. {remedy}")
    return kind


def check_preference_row(row: Mapping[str, Any], index: int, name: str = "adversarial_dataset") -> str:
    """
    Check one preference row.

    Args:
        row: `chosen`, `rejected` and, unless it is implicit in both, `prompt`.
        index: number of the row, for the error messages.
        name: name of the dataset's argument, for the error messages.

    Returns:
        `"text"` or `"messages"`, the same for all columns.

    Raises:
        ValueError: naming argument, row, column, value and remedy.
    """
    columns = ("prompt", "chosen", "rejected") if "prompt" in row else ("chosen", "rejected")
    kinds = {
        column: check_text_or_messages(row[column], f"`{column}` of row {index} of `{name}`") for column in columns
    }
    if len(set(kinds.values())) > 1:
        raise ValueError(
            f"Row {index} of `{name}` mixes text and messages ({kinds}). Remove the `prompt` column if `chosen` and "
            f"`rejected` hold the whole conversation. {_FORMAT_HINT}"
        )
    if "prompt" not in row:
        prompt = with_prompt(row)["prompt"] if row["chosen"][0] == row["rejected"][0] else ""
        if not prompt or is_empty_answer(prompt):
            raise ValueError(
                f"Row {index} of `{name}` has no `prompt` column and `chosen` and `rejected` share no beginning to "
                f"take as the prompt. Add a `prompt` column. {_FORMAT_HINT}"
            )
    return kinds["chosen"]


def with_prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with an explicit prompt, found as TRL finds it."""
    if "prompt" in row:
        return dict(row)
    from trl import extract_prompt

    return {**row, **extract_prompt(dict(row))}


def check_preferences(dataset: object, name: str = "adversarial_dataset", *, images: bool = False) -> str:
    """
    Check every row of a preference dataset before anything is computed from it; warn of rows whose answers are equal.

    Args:
        dataset: a map-style `datasets.Dataset`.
        name: name of the argument, for the error messages.
        images: whether there may be some.

    Returns:
        `"text"` or `"messages"`: the format of all rows.

    Raises:
        TypeError: see [`check_map_style`].
        ValueError: naming argument, row, column, value and remedy.
    """
    checked = check_map_style(dataset, name)
    check_preference_columns(checked.column_names, name, images=images)
    columns = [column for column in ("prompt", "chosen", "rejected") if column in checked.column_names]
    first_kind, same = "", []
    for index, row in enumerate(checked.select_columns(columns).with_format(None)):
        kind = check_preference_row(row, index, name)
        first_kind = first_kind or kind
        if kind != first_kind:
            raise ValueError(f"Row {index} of `{name}` is {kind}, row 0 is {first_kind}; all must be alike.")
        if row["chosen"] == row["rejected"]:
            same.append(index)
    if same:
        logger.warning(
            "%d of the %d rows of `%s` have the same `chosen` and `rejected` answer (first rows: %s): they pull the "
            "model towards and away from the same text. Check the columns, or remove these rows.",
            *(len(same), len(checked), name, same[:SHOWN_ROWS]),
        )
    return first_kind


def check_preference_columns(
    columns: Sequence[str], name: str = "adversarial_dataset", *, images: bool = False
) -> None:
    """Raise a `ValueError` if a required column is missing, or there are images where there may be none."""
    missing = [column for column in ("chosen", "rejected") if column not in columns]
    if missing:
        raise ValueError(f"`{name}` lacks {' and '.join(missing)}; its columns are {list(columns)}. {_FORMAT_HINT}")
    found = [column for column in ("image", "images") if column in columns]
    if found and not images:
        raise ValueError(
            f"`{name}` has the column {found[0]!r}, but `processing_class` is a tokenizer: pass a vision-language model's "
            "processor, or remove the column."
        )
