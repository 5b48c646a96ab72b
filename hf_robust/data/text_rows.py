"""What is wrong with rows of texts that could not be tokenised: the row, the column, the value and the remedy."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from hf_robust.data.checks import cell_kind, is_of_the_machine

_HINT = (
    "Give rows as `SFTTrainer` takes them: `prompt` and `completion`, both strings or both lists of "
    "{'role': ..., 'content': ...} messages; or `messages`; or `text`."
)
# How many rows are looked at behind an error
_LOOKED_AT = 10_000
# The columns of the kinds of rows that are not plain text
_KINDS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"), ("prompt", "completion"), ("messages",))


def check_has_rows(dataset: object, name: str) -> None:
    """
    Refuse a dataset of which not even the first row is there.

    Args:
        dataset: what the user gave; one without a first row to look at (`None`, a dictionary of splits) is left to others.
        name: name of the argument.

    Raises:
        ValueError: no rows.
    """
    if isinstance(dataset, Dataset | IterableDataset) and next(iter(dataset), None) is None:
        raise ValueError(f"`{name}` has 0 rows. {_HINT}")


@contextlib.contextmanager
def rows_explained(
    dataset: object, name: str, processing_class: Any = None, text_field: str = "text"
) -> Iterator[None]:
    """
    Say which row was at fault if what runs inside fails on one.

    Rows that can be tokenised cost nothing: only behind an error are they looked at one by one, the first 10,000 of them. An
    error about memory or a disk is about no row.

    Args:
        dataset: the rows; streaming ones, and those that a transform makes, are not looked at.
        name: name of the argument, for the message.
        processing_class: tokenizer or processor whose chat template renders messages; `None`: they are not rendered.
        text_field: column of plain text.

    Raises:
        ValueError: instead of the error from inside, if a row explains it.
    """
    try:
        yield
    except Exception as error:
        # TRL says itself why it takes no transform
        if is_of_the_machine(error) or not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
            raise
        problem = _first_problem(dataset, name, processing_class, text_field)
        if problem is not None:
            raise ValueError(problem) from error
        if len(dataset) > _LOOKED_AT:
            error.add_note(f"None of the first {_LOOKED_AT} of {len(dataset)} rows of `{name}` explains it.")
        raise


def _first_problem(dataset: Dataset, name: str, processing_class: Any, text_field: str) -> str | None:
    # At the top of the file it would load TRL with the package
    from trl import is_conversational_from_value, maybe_convert_to_chatml

    rows = dataset.with_format(None).select(range(min(len(dataset), _LOOKED_AT)))
    shared = False
    for index, row in enumerate(rows):
        where = f"row {index} of `{name}`"
        if index == 0 and "conversations" in row:  # the first row decides, as for TRL, which stumbles over an empty one
            shared = not row["conversations"] or is_conversational_from_value(row)
        if shared:
            row, where = maybe_convert_to_chatml(row), f"{where} (its `conversations` read as `messages`)"
        problem = _row_problem(row, where, processing_class, text_field)
        if problem is not None:
            return problem
    return None


def _row_problem(row: Mapping[str, Any], where: str, processing_class: Any, text_field: str) -> str | None:
    """What is wrong with a row, if anything is."""
    if "input_ids" in row:
        ids = row["input_ids"]
        if isinstance(ids, list) and all(isinstance(token, int) for token in ids):
            return None
        return f"`input_ids` of {where} is {ids!r:.200}, not a list of token ids. Tokenise the row, or take it out."
    columns = next((names for names in _KINDS if set(names) <= row.keys()), (text_field,))
    if columns[-1] not in row or (columns == (text_field,) and "prompt" in row):
        return f"{where[:1].upper()}{where[1:]} has the columns {list(row)}, none of which holds a text to train on. {_HINT}"
    try:
        kinds = {column: cell_kind(row[column], f"`{column}` of {where}", _HINT) for column in columns}
    except ValueError as error:
        return str(error)
    empty = next((column for column in columns if row[column] == []), None)
    if empty is not None:
        return f"`{empty}` of {where} is empty ([]). Remove the row or fill it in. {_HINT}"
    if len(set(kinds.values())) > 1:
        return f"{where[:1].upper()}{where[1:]} mixes text and messages ({kinds}). {_HINT}"
    try:
        tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
    except ValueError as error:
        return (
            f"`tools` of {where} is {row['tools']!r:.200}, which is no JSON ({error}). Mend it, or remove the column."
        )
    if "messages" not in kinds.values() or processing_class is None:
        return None
    prompt = row["prompt"] if "prompt" in columns else []
    for answer in [column for column in columns if column != "prompt"]:
        conversation = [*prompt, *row[answer]]
        try:
            kwargs = {"tools": tools, **(row.get("chat_template_kwargs") or {})}
            processing_class.apply_chat_template(conversation, tokenize=False, **kwargs)
        except Exception as error:
            return (
                f"`{answer}` of {where} cannot be put into the chat template ({type(error).__name__}: {error}): "
                f"{conversation!r:.300}. Mend the row, or set `processing_class.chat_template`."
            )
    return None
