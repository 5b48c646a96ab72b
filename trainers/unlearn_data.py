"""Forget rows and retain rows as the pairs that [`UnlearnTrainer`] trains on."""

import contextlib
import hashlib
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from trl import is_conversational_from_value, maybe_convert_to_chatml

from hf_robust.data import forget_retain_overlap, load_utility
from hf_robust.data.checks import SHOWN_ROWS
from hf_robust.data.text_rows import rows_explained
from hf_robust.trainers.unlearn_losses import REFERENCE

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "images")
FORGET, RETAIN = "forget", "retain"
# Summed negative log-likelihood under the model before training, where it is computed beforehand
REFERENCE_NLL = "reference_nll"
# Number of a row as the user gave it, while it is prepared
ROW = "unlearn_row"
# How many rows are made into batches before training
_COLLATED = 1_000
# What rows say as they are stored, whatever a transform makes of them
_WORDS = ("messages", "prompt", "conversations", "question", "input_ids")


class PairedRows(torch.utils.data.Dataset):
    """
    A forget row with the retain row that goes with it.

    The retain rows come from an endless stream of seeded permutations, in which forget row `i` of epoch `e` has the place
    `e * len(forget) + i`: all of them are used equally often, and a pair depends on nothing but its epoch and its number. Batch
    sizes, processes and interruptions make no difference.

    Args:
        forget: rows to forget, tokenised.
        retain: rows to keep, or `None`.
        seed: of the permutations.

    Attributes:
        reference_nll: of each forget row, once it has been computed: the summed negative log-likelihood under the model before
            training. It goes with the pair, not with the row, of which a dataset's transform returns what it likes.
    """

    def __init__(self, forget: Dataset, retain: Dataset | None, seed: int):
        self.forget, self.retain, self.seed = forget, retain, seed
        # Shared, so that worker processes that live on over epochs see it too
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()
        self._permutation: tuple[int, list[int]] = (-1, [])
        self.reference_nll: list[float] | None = None

    def __len__(self) -> int:
        return len(self.forget)

    def set_epoch(self, epoch: int) -> None:
        """
        Choose the pairs of an epoch.

        Args:
            epoch: counted from 0.
        """
        self._epoch.fill_(epoch)

    def partner(self, index: int) -> int:
        """
        The retain row of a forget row in the current epoch.

        Args:
            index: number of the forget row.
        """
        assert self.retain is not None
        turn, offset = divmod(int(self._epoch) * len(self.forget) + index, len(self.retain))
        if self._permutation[0] != turn:
            generator = torch.Generator().manual_seed((self.seed + turn) % 2**63)
            self._permutation = (turn, torch.randperm(len(self.retain), generator=generator).tolist())
        return self._permutation[1][offset]

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = {FORGET: self.forget[index]}
        if self.reference_nll is not None:
            pair[REFERENCE_NLL] = self.reference_nll[index]
        if self.retain is not None:
            pair[RETAIN] = self.retain[self.partner(index)]
        return pair


class PairCollator:
    """
    Batches of pairs as `{"forget": batch, "retain": batch}`; other rows (those of an evaluation) as they always were. The first
    batch with a row without a label is warned of.

    Args:
        collator: makes a batch of rows.
        skip_tokens: label tokens at the beginning of each forget row that are none any more.
    """

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]], skip_tokens: int = 0):
        self.collator, self.skip_tokens = collator, skip_tokens
        self._warned: set[str] = set()

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if FORGET not in rows[0]:
            return self.collator(rows)
        forget = dict(self._labelled(FORGET, rows, self.skip_tokens))
        if self.skip_tokens:
            forget["labels"] = skip_labels(forget["labels"], self.skip_tokens)
        if REFERENCE_NLL in rows[0]:
            forget[REFERENCE] = torch.tensor([row[REFERENCE_NLL] for row in rows])
        batch = {FORGET: forget}
        if RETAIN in rows[0]:
            batch[RETAIN] = dict(self._labelled(RETAIN, rows, 0))
        return batch

    def _labelled(self, kind: str, rows: list[dict[str, Any]], skip_tokens: int) -> dict[str, Any]:
        batch = self.collator([row[kind] for row in rows])
        if kind not in self._warned and not all(_has_labels(batch["labels"], skip_tokens)):
            self._warned.add(kind)
            logger.warning(
                "A batch of `%s_dataset` holds rows without a label token, which teach nothing: they hold no answer, or "
                "`max_length` cuts it off. Fill them, take them out, or raise `max_length`.",
                kind,
            )
        return batch


def skip_labels(labels: torch.Tensor, count: int) -> torch.Tensor:
    """
    Labels without the first ones of each row.

    Args:
        labels: `[batch, length]` int64, -100 where there is none.
        count: how many to drop.
    """
    given = labels != -100
    return labels.masked_fill(given & (given.cumsum(dim=1) <= count), -100)


def _has_labels(labels: torch.Tensor, skip_tokens: int) -> list[bool]:
    """For each row of a batch whether it has labels beyond the first `skip_tokens`, and one that something predicts."""
    given = labels != -100
    return ((given.sum(dim=1) > skip_tokens) & given[:, 1:].any(dim=1)).tolist()


def rows_of(source: Any, argument: str) -> Any:
    """
    A dataset, or the one of a name.

    Args:
        source: dataset; or Hub id, folder or file of rows as `SFTTrainer` takes them.
        argument: what the user calls it, for error messages.
    """
    return load_utility(source, argument=argument) if isinstance(source, str) else source


def numbered(dataset: Dataset) -> Dataset:
    """
    With a column of row numbers, [`ROW`], which stay with the rows that the parent keeps.

    Args:
        dataset: rows as given.
    """
    return dataset.add_column(ROW, list(range(len(dataset))))


def check_rows(dataset: Any, argument: str) -> Dataset:
    """
    The dataset itself if its rows can be paired.

    Args:
        dataset: what the user gave.
        argument: name of the argument.

    Raises:
        TypeError: not a map-style dataset.
        ValueError: none, or one without rows.
    """
    what = {"forget_dataset": "what the model is to forget", "retain_dataset": "what it is to keep"}[argument]
    hint = "rows as `SFTTrainer` takes them (`prompt` and `completion`, `messages` or `text`)"
    none = "" if argument == "forget_dataset" else ", or set `retain_weight=0`"
    if dataset is None:
        raise ValueError(f"`{argument}` is required: {hint} of {what}{none}.")
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`{argument}` must be a map-style `datasets.Dataset`, not `{type(dataset).__name__}`: forget and retain rows are "
            "paired by their numbers. Choose one split, load it with `streaming=False`, or give a Hub id, folder or file."
        )
    if len(dataset) == 0:
        raise ValueError(f"`{argument}` has 0 rows. Give {hint} of {what}{none}.")
    return dataset


def has_images(dataset: Dataset) -> bool:
    """
    Whether rows have images, as the parent sees it: behind a transform, if there is one.

    Args:
        dataset: at least one row.
    """
    return any(column in dataset[0] for column in IMAGE_COLUMNS)


def check_overlap(
    forget: Dataset, retain: Dataset, formatting_func: Callable[[Any], str] | None = None, text_field: str = "text"
) -> None:
    """
    Refuse rows that are to be forgotten and kept at once. The same question about another image is another row; images are
    compared pixel by pixel.

    Args:
        forget: rows to forget, as given.
        retain: rows to keep, as given.
        formatting_func: the trainer's argument, which rows with images are not given to.
        text_field: column of plain text, the configuration's `dataset_text_field`.

    Raises:
        ValueError: there are such rows; the message has their numbers.
    """
    if any(has_images(dataset) or set(IMAGE_COLUMNS) & set(dataset.column_names) for dataset in (forget, retain)):
        both = _overlap_with_images(forget, retain, text_field)
    else:
        named = {"retain_dataset": retain, "forget_dataset": forget} if formatting_func is None else {}
        with contextlib.ExitStack() as stack:
            for name, rows in named.items():
                stack.enter_context(rows_explained(rows, name, text_field=text_field))
            both = forget_retain_overlap(*(_spoken(rows, formatting_func, text_field) for rows in (forget, retain)))
    if both:
        shown = ", ".join(f"{a} ({b})" for a, b in both[:SHOWN_ROWS]) + (", …" if len(both) > SHOWN_ROWS else "")
        raise ValueError(
            f"`forget_dataset` and `retain_dataset` share {len(both)} rows, which cannot be forgotten and kept at once: forget "
            f"rows (and their retain rows) {shown}. Take them out of one of the two; "
            "`hf_robust.data.forget_retain_overlap` lists them all."
        )


def _spoken(dataset: Dataset, formatting_func: Callable[[Any], str] | None, text_field: str) -> Any:
    """What the parent makes of rows before it tokenises them."""
    if "input_ids" in dataset.column_names:
        return ({"text": ids} for ids in dataset["input_ids"])
    if formatting_func is not None:
        return ({"text": formatting_func(row)} for row in dataset)
    if is_conversational_from_value(dataset[0]):
        return map(maybe_convert_to_chatml, dataset)
    if text_field in dataset.column_names and not {"prompt", "messages"} & set(dataset.column_names):
        return ({"text": text} for text in dataset[text_field])
    return dataset


def _overlap_with_images(forget: Dataset, retain: Dataset, text_field: str) -> list[tuple[int, int]]:
    """Numbers of the rows that say the same about the same images, both as they are stored if they are stored."""
    said = []
    for dataset in (forget, retain):
        words = dataset
        if {*_WORDS, text_field} & set(dataset.column_names):
            words = dataset.with_format(None)
            words = words.remove_columns([column for column in IMAGE_COLUMNS if column in dataset.column_names])
        said.append(list(_spoken(words, None, text_field)))
    # Images are opened where words do not tell rows apart, and nowhere else
    alike = [[number for number, _ in forget_retain_overlap(*pair)] for pair in (said, said[::-1])]
    rows = [
        [_beside_images(words[number], _images(dataset, number)) for number in numbers]
        for words, dataset, numbers in zip(said, (forget, retain), alike, strict=True)
    ]
    return [(alike[0][first], alike[1][second]) for first, second in forget_retain_overlap(*rows)]


def _images(dataset: Dataset, number: int) -> list[Any]:
    """As stored: a transform may hide them, or draw a crop."""
    stored = any(column in dataset.column_names for column in IMAGE_COLUMNS)
    row = dataset.with_format(None)[number] if stored else dataset[number]
    return [row["image"]] if row.get("image") is not None else row.get("images") or []


def _beside_images(words: Mapping[str, Any], images: list[Any]) -> dict[str, Any]:
    """What a row says, with digests of its images in front."""
    digests = " ".join(map(_digest, images))
    first = next(name for name in ("messages", "prompt", "text", "question") if words.get(name) is not None)
    value = words[first]
    said = [{"role": "image", "content": digests}, *value] if isinstance(value, list) else f"{digests} {value}"
    return {**words, first: said}


def _digest(image: Any) -> str:
    """Of a picture its size and pixels; of its path, its file's bytes or an array, those."""
    if hasattr(image, "convert"):
        data = str(image.size).encode() + image.convert("RGBA").tobytes()
    elif isinstance(image, Mapping):
        data = image.get("bytes") or str(image.get("path")).encode()
    else:
        data = np.asarray(image).tobytes()
    return hashlib.sha256(data).hexdigest()


def check_labels(prepared: Dataset, given: int, argument: str, max_length: int | None, skip_tokens: int = 0) -> Dataset:
    """
    Rows ready to be paired, without the columns that nobody needs any more.

    Args:
        prepared: tokenised rows, each with its number in the column [`ROW`]; those without a label may be missing.
        given: how many there were.
        argument: name of the argument.
        max_length: names what may have cut labels off.
        skip_tokens: label tokens at the beginning of each row that do not count.

    Raises:
        ValueError: rows without a label token; the message has their numbers.
    """
    prepared = prepared.with_format(None)
    labelled = {
        number
        for number, labels in zip(prepared[ROW], prepared["labels"], strict=True)
        if sum(label != -100 for label in labels) > skip_tokens and any(label != -100 for label in labels[1:])
    }
    missing = [number for number in range(given) if number not in labelled]
    _refuse_unlabelled(missing, f"{given} rows", argument, max_length, skip_tokens)
    return prepared.select_columns(["input_ids", "labels"])


def check_collated_labels(
    dataset: Dataset,
    collator: Callable[[list[Any]], dict[str, Any]],
    argument: str,
    max_length: int | None,
    skip_tokens: int = 0,
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> None:
    """
    Refuse rows without a label where labels are made with each batch, as those of rows with images are. Up to 1,000 rows,
    spread over the dataset, are made into batches, as in training; for the rest [`PairCollator`] looks at each batch.

    Args:
        dataset: rows as the collator takes them.
        collator: makes a batch of rows.
        argument: see [`check_labels`].
        max_length: see [`check_labels`].
        skip_tokens: see [`check_labels`].
        batch_size: rows in a batch.
        progress: whether to show a progress bar.

    Raises:
        ValueError: rows without a label token; the message has their numbers.
    """
    count = min(len(dataset), _COLLATED)
    chosen = [place * len(dataset) // count for place in range(count)]
    missing: list[int] = []
    with _random_states_kept():
        for start in tqdm(range(0, count, batch_size), desc=f"Labels of {argument}", disable=not progress):
            places = chosen[start : start + batch_size]
            enough = _has_labels(collator([dataset[place] for place in places])["labels"], skip_tokens)
            missing += [place for place, is_enough in zip(places, enough, strict=True) if not is_enough]
    among = "" if count == len(dataset) else f" looked at (of {len(dataset)})"
    _refuse_unlabelled(missing, f"{count} rows{among}", argument, max_length, skip_tokens)


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """A collator may draw from the global generators; training begins as if it had not."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _refuse_unlabelled(
    missing: Sequence[int], looked_at: str, argument: str, max_length: int | None, skip_tokens: int
) -> None:
    if missing:
        beyond = f" behind the first {skip_tokens} (`ce_u_skip_tokens`)" if skip_tokens else ""
        shown = ", ".join(map(str, missing[:SHOWN_ROWS])) + (", …" if len(missing) > SHOWN_ROWS else "")
        raise ValueError(
            f"`{argument}` has {len(missing)} of {looked_at} without a label token{beyond}: rows {shown}. They hold no "
            f"answer, or `max_length={max_length!r}` cuts it off. Fill them, take them out, or raise `max_length`."
        )
