"""What is to be forgotten and what is to be kept: the public unlearning sets as local files, and rows that are in both."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_robust.data.behaviors import PathLike
from hf_robust.data.readers import SUFFIXES, _load, utility_rows
from hf_robust.threats import check_choice

logger = logging.getLogger(__name__)

# Forms of files; `"auto"` tells them by the columns
FORMATS = ("auto", "tofu", "muse", "wmdp")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_QUESTION_COLUMNS = ("question", "answer")
_TOFU_EXTRAS = ("paraphrased_question", "paraphrased_answer", "perturbed_answer")
_WMDP_COLUMNS = ("question", "choices", "answer")
# What an evaluation takes from a row of any form: see `hf_robust.report.unlearning_rows.as_questions`
_NOTES = ("id", "category", "group", "target", "trained")
# Text beside one of these is not all that a row says
_NO_CORPUS = {"messages", "prompt", "question", "image", "images"}


def read_tofu(path: PathLike, *, conversational: bool = True, argument: str = "path") -> Dataset:
    """
    Questions and answers of TOFU (Maini et al. 2024, arXiv 2401.06121), e.g. `forget10.json`, `retain90.json`,
    `forget10_perturbed.json` or `world_facts_perturbed.json`, or of any file in its form.

    Args:
        path: .json (a list, or one object per line), .jsonl, .csv or .parquet file with the columns `question` and `answer`.
        conversational: messages (for a chat template, default) or plain text.
        argument: what the user calls `path`, for error messages.

    Returns:
        A row for each of the file's, in its order: `prompt` and `completion` as `SFTTrainer` takes them, `question`,
        `answer` and, where the file has them, `paraphrased_question`, `paraphrased_answer` (texts), `perturbed_answers`
        (the file's `perturbed_answer`: the wrong answers, a list of texts), and `id`, `category`, `group`, `target` and
        `trained` as they are.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: for a file that cannot be read or has no row, missing columns (the message lists what there is), or an
            empty cell.
    """
    return _tofu(*_read(path, argument), conversational)


def _tofu(dataset: Dataset, where: str, conversational: bool) -> Dataset:
    _check_columns(dataset, _QUESTION_COLUMNS, where, "TOFU")
    extras = [column for column in _TOFU_EXTRAS if column in dataset.column_names]
    rows = []
    for index, row in enumerate(dataset):
        question, answer = (_filled(row, column, index, where) for column in _QUESTION_COLUMNS)
        found = {**_pair(question, answer, conversational), "question": question, "answer": answer}
        for column in extras:
            if column == "perturbed_answer":
                found["perturbed_answers"] = _texts(row[column], column, index, where)
            else:
                found[column] = _filled(row, column, index, where)
        rows.append({**found, **_notes(row)})
    return Dataset.from_list(rows)


def read_muse(path: PathLike, *, conversational: bool = True, argument: str = "path") -> Dataset:
    """
    Rows of MUSE (Shi et al. 2024, arXiv 2407.06460), or of any file in one of its forms, told by the columns.

    Args:
        path: .json, .jsonl, .csv or .parquet file of one subset and split, or a .txt file. Questions (`knowmem`) have the
            columns `question` and `answer`; passages to be continued (`verbmem`) `prompt` and `gt`; documents (`raw`,
            `train`, `privleak`, `scal`, `sust`) `text`, or are a JSON list of strings. A .txt file is split at blank lines.
        conversational: whether questions are messages (for a chat template, default) or plain text. Passages and documents
            are always plain text.
        argument: what the user calls `path`, for error messages.

    Returns:
        Questions: `prompt`, `completion`, `question`, `answer`. Passages: `prompt`, `completion`, and `answer`, which is the
        completion once more. Documents: `text`. All in the order of the file; blank documents are left out.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: for a file that cannot be read or has no row, unknown columns, or an empty cell.
    """
    return _muse(*_read(path, argument), conversational)


def _muse(dataset: Dataset, where: str, conversational: bool) -> Dataset:
    columns = set(dataset.column_names)
    if set(_QUESTION_COLUMNS) <= columns:
        return _tofu(dataset, where, conversational).select_columns(["prompt", "completion", *_QUESTION_COLUMNS])
    if {"prompt", "gt"} <= columns:
        rows = []
        for index, row in enumerate(dataset):
            prompt, rest = (_filled(row, column, index, where, strip=False) for column in ("prompt", "gt"))
            rows.append({"prompt": prompt, "completion": rest, "answer": rest})
        return Dataset.from_list(rows)
    if "text" in columns:
        return _documents(dataset, where)
    raise ValueError(
        f"{where} is no subset of MUSE; its columns are {dataset.column_names}. Give a file with `question` and `answer`, "
        "with `prompt` and `gt`, or with `text`."
    )


def read_wmdp(path: PathLike, *, conversational: bool = True, argument: str = "path") -> Dataset:
    """
    Multiple-choice questions or a corpus of WMDP (Li et al. 2024, arXiv 2403.03218), told by the columns.

    Args:
        path: .json, .jsonl, .csv or .parquet file. Questions (e.g. `bio_questions.json`) have the columns `question`,
            `choices` (a list) and `answer` (number of the right choice, from 0). Corpora (e.g. `cyber-forget-corpus.jsonl`,
            `bio_remove_dataset.jsonl`) have `text`; others of their columns are dropped.
        conversational: whether questions are messages (for a chat template, default) or plain text. Documents are always
            plain text.
        argument: what the user calls `path`, for error messages.

    Returns:
        Questions: `prompt` (the question, the lettered choices and "Answer:"), `completion` (the right choice with its
        letter, "B. …"), `question`, `choices`, `answer` (as `completion`, text), `perturbed_answers` (the wrong choices with
        their letters) and, where the file has them, `id`, `category`, `group`, `target` and `trained`. Corpora: `text`;
        blank documents are left out.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: for a file that cannot be read or has no row, unknown columns, an empty cell, fewer than 2 choices, or an
            `answer` that is none of them.
    """
    return _wmdp(*_read(path, argument), conversational)


def _wmdp(dataset: Dataset, where: str, conversational: bool) -> Dataset:
    if "text" in dataset.column_names and "choices" not in dataset.column_names:
        return _documents(dataset, where)
    _check_columns(dataset, _WMDP_COLUMNS, where, "WMDP")
    rows = []
    for index, row in enumerate(dataset):
        question = _filled(row, "question", index, where)
        choices = _texts(row["choices"], "choices", index, where)
        answer = row["answer"]
        if isinstance(answer, str) and answer.strip().isdecimal():
            answer = int(answer)
        if not 2 <= len(choices) <= len(_LETTERS):
            raise ValueError(
                f"`choices` of row {index} of {where} has {len(choices)} choices; give from 2 to {len(_LETTERS)}."
            )
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise ValueError(
                f"`answer` of row {index} of {where} is {answer!r}; give the number of the right choice, from 0 to "
                f"{len(choices) - 1}."
            )
        options = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=False)]
        asked = "\n".join((question, *options, "Answer:"))
        rows.append(
            {
                **_pair(asked, options[answer], conversational),
                "question": question,
                "choices": choices,
                "answer": options[answer],
                "perturbed_answers": [option for place, option in enumerate(options) if place != answer],
                **_notes(row),
            }
        )
    return Dataset.from_list(rows)


_CONVERTERS = {"tofu": _tofu, "muse": _muse, "wmdp": _wmdp}


def load_unlearning(
    source: PathLike,
    *,
    split: str = "train",
    name: str | None = None,
    file_format: str = "auto",
    conversational: bool | None = True,
    argument: str = "source",
) -> tuple[Dataset, str]:
    """
    Rows of TOFU, MUSE or WMDP, or whatever others there are.

    Args:
        source: a file as [`read_tofu`] and the others take it; or Hub id or folder.
        split: split of a Hub dataset or a folder. A file has only `"train"`.
        name: configuration of a Hub dataset, such as TOFU's `forget10`. A file has none.
        file_format: `"tofu"`, `"muse"` or `"wmdp"`; `"auto"` (default) tells them by the columns of the first row.
        conversational: `True` (default) turns questions, and plain prompts and completions, into messages. `None` leaves rows
            as they are and questions plain text; `False` also refuses messages. Passages and documents are always plain text.
        argument: what the user calls `source`, for error messages.

    Returns:
        The rows and their format: see [`read_tofu`], [`read_muse`] and [`read_wmdp`]; documents that were told by their
        columns (`text`, and neither messages, prompts, questions nor images) keep their other columns. Rows of none of these
        and `"auto"`: as of [`load_utility`], with all columns that do not say the same in another form.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an unknown format, a split or configuration that there is not, or what the readers raise.
    """
    check_choice("file_format", file_format, FORMATS)
    where = f"`{argument}={str(source)!r}`"
    if Path(source).expanduser().is_file():
        if split != "train" or name is not None:
            given = f"name={name!r}" if split == "train" else f"split={split!r}"
            raise ValueError(
                f"`{given}` with {where}: a file has the split 'train' alone, and no configurations. Leave it out, or give "
                "the file that holds those rows."
            )
        dataset, where = _read(source, argument)
    else:
        dataset = _load(source, split, name, False, where)
        if not len(dataset):
            raise ValueError(f"{where} has no rows. Check `split={split!r}`.")
    columns = set(dataset.column_names)
    found = _told_format(columns) if file_format == "auto" else file_format
    if found == "auto":
        csv = Path(source).suffix.lower() == ".csv"
        return utility_rows(dataset, where, conversational=conversational, csv=csv, keep=True), found
    if file_format == "auto" and _is_corpus(columns):
        return _documents(dataset, where, keep=True), found
    return _CONVERTERS[found](dataset, where, bool(conversational)), found


def _is_corpus(columns: set[str]) -> bool:
    return "text" in columns and not columns & _NO_CORPUS


def _told_format(columns: set[str]) -> str:
    """The public set that has such columns; `auto` for rows as `SFTTrainer` takes them."""
    if {"prompt", "gt"} <= columns or _is_corpus(columns):
        return "muse"
    if "prompt" in columns or not set(_QUESTION_COLUMNS) <= columns:
        return "auto"
    return "wmdp" if "choices" in columns else "tofu"


def forget_retain_overlap(
    forget: Iterable[Mapping[str, Any]], retain: Iterable[Mapping[str, Any]]
) -> list[tuple[int, int]]:
    """
    Rows that are to be forgotten and kept at once.

    Two rows are the same if what they say is (case and white space aside), be it as `prompt` and `completion`, `messages`,
    `text` or `question` and `answer`; as messages or as plain text.

    Args:
        forget: rows to forget, in any form that `SFTTrainer` takes.
        retain: rows to keep, likewise.

    Returns:
        For each forget row that is also a retain row its number and that of the first such retain row, in the order of
        `forget`; empty if the sets are disjoint.

    Raises:
        ValueError: for a row in none of the forms, named with its number.
    """
    kept: dict[str, int] = {}
    for index, row in enumerate(retain):
        kept.setdefault(_content(row, index, "retain"), index)
    found = []
    for index, row in enumerate(forget):
        content = _content(row, index, "forget")
        if content in kept:
            found.append((index, kept[content]))
    return found


def _content(row: Mapping[str, Any], index: int, argument: str) -> str:
    """All that a row says, in lower case and with single spaces."""
    for columns in (("messages",), ("prompt", "completion"), ("text",), _QUESTION_COLUMNS):
        parts = [row.get(column) for column in columns]
        if all(part is not None for part in parts):
            texts = [
                str(message["content"]) if isinstance(message, Mapping) else str(message)
                for part in parts
                for message in (part if isinstance(part, list) else [part])
            ]
            return " ".join(" ".join(texts).casefold().split())
    raise ValueError(
        f"Row {index} of `{argument}` has the columns {list(row)}. Give `prompt` and `completion`, `messages`, `text`, or "
        "`question` and `answer`."
    )


def _read(path: PathLike, argument: str) -> tuple[Dataset, str]:
    """The rows of one file as they are, and how errors name it."""
    file = Path(path).expanduser()
    where = f"`{argument}={str(path)!r}`"
    if file.is_dir() or file.suffix.lower() not in (*SUFFIXES, ".txt"):
        raise ValueError(f"{where} is no file of a known kind. Give a .json, .jsonl, .csv, .parquet or .txt file.")
    if not file.is_file():
        raise FileNotFoundError(f"{where} does not exist. Give a .json, .jsonl, .csv, .parquet or .txt file.")
    texts = _plain_texts(file)
    if texts is not None:
        dataset = Dataset.from_dict({"text": texts})
    else:
        # A blank JSON file ends in a bare StopIteration in datasets 5
        blank = file.suffix.lower() != ".parquet" and file.stat().st_size < 64 and not file.read_bytes().strip()
        dataset = Dataset.from_dict({}) if blank else _load(file, "train", None, False, where)
    if not len(dataset):
        raise ValueError(f"{where} has no rows. Check the file.")
    return dataset, where


def _plain_texts(file: Path) -> list[str] | None:
    """The texts of a .txt file, or of a JSON file of strings; `None` for any other file."""
    suffix = file.suffix.lower()
    if suffix == ".txt":
        blocks: list[list[str]] = [[]]
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.strip():
                blocks[-1].append(line)
            elif blocks[-1]:
                blocks.append([])
        return ["\n".join(block) for block in blocks if block]
    if suffix not in (".json", ".jsonl"):
        return None
    with file.open(encoding="utf-8") as handle:
        if handle.read(256).lstrip().removeprefix("[").lstrip()[:1] != '"':
            return None
        handle.seek(0)
        content = handle.read()
    try:
        values = json.loads(content)
    except json.JSONDecodeError:  # not one value: one on each line
        try:
            values = [json.loads(line) for line in content.splitlines() if line.strip()]
        except json.JSONDecodeError:
            return None
    values = [values] if isinstance(values, str) else values
    return values if all(isinstance(value, str) for value in values) else None


def _notes(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in _NOTES if name in row}


def _documents(dataset: Dataset, where: str, keep: bool = False) -> Dataset:
    """Only the column `text` (unless the others are kept), without blank rows."""
    documents = dataset if keep else dataset.select_columns("text")
    kept = documents.filter(lambda text: isinstance(text, str) and bool(text.strip()), input_columns="text")
    if not len(kept):
        raise ValueError(f"{where} has no text. Check the file.")
    if len(kept) < len(documents):
        logger.info("%d blank rows of %s are left out.", len(documents) - len(kept), where)
    return kept


def _check_columns(dataset: Dataset, wanted: Sequence[str], where: str, name: str) -> None:
    missing = [column for column in wanted if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"{where} lacks {' and '.join(missing)}; its columns are {dataset.column_names}. Give a file in {name}'s form, "
            f"with {', '.join(f'`{column}`' for column in wanted)}."
        )


def _filled(row: Mapping[str, Any], column: str, index: int, where: str, strip: bool = True) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{column}` of row {index} of {where} is {value!r}. Give a text, or remove the row.")
    return value.strip() if strip else value


def _texts(value: Any, column: str, index: int, where: str) -> list[str]:
    """A cell that lists texts; in a CSV as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v.strip() for v in value):
        raise ValueError(f"`{column}` of row {index} of {where} is {value!r}. Give a list of texts, or remove the row.")
    return [text.strip() for text in value]


def _pair(question: str, answer: str, conversational: bool) -> dict[str, Any]:
    """`prompt` and `completion`; plain texts are set apart by a space, so that they can be joined as they are."""
    if not conversational:
        return {"prompt": question, "completion": f" {answer}"}
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }
