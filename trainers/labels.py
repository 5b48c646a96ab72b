"""Class numbers of rows and batches, looked at before a model is: beyond its classes they end a process on an accelerator."""

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset

LABEL_COLUMNS = ("labels", "label", "label_ids")
_SHOWN = 8


def is_class(value: object, classes: int | None = None) -> bool:
    """
    Whether a label is the number of a class: a whole number of 64 bits, or a tensor of one.

    Args:
        value: the label.
        classes: number of classes; `None`: unknown.
    """
    number = plain(value)
    if not isinstance(number, numbers.Integral) or isinstance(number, bool):
        return False
    return abs(int(number)) < 2**63 if classes is None else 0 <= int(number) < classes


def plain(value: Any) -> Any:
    """
    A tensor or array of one number as that number; anything else as it is.

    Args:
        value: a label.
    """
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def names_of(config: Any) -> list[str]:
    """
    Names of a model's classes, by number; none where it does not tell them.

    Args:
        config: of a classifier of transformers.
    """
    names = getattr(config, "id2label", None) or {}
    return [str(names[number]) for number in sorted(names)]


def numbered_as(dataset: Dataset, column: str, class_names: Sequence[str]) -> Dataset:
    """
    A dataset with the class numbers of a model. One that names the same classes in another order gets its labels numbered
    anew; any other comes back as it is.

    Args:
        dataset: with a column of class numbers; `ClassLabel` has their names.
        column: of the labels. Missing ones stay missing.
        class_names: of the model, by number.
    """
    names, wanted = list(getattr(dataset.features[column], "names", None) or []), list(class_names)
    if names == wanted or sorted(names) != sorted(wanted):
        return dataset
    numbers_of = {number: wanted.index(name) for number, name in enumerate(names)}
    labels = [numbers_of.get(label, label) for label in dataset.with_format(None)[column]]
    return dataset.remove_columns(column).add_column(column, labels)


def first_wrong_label(dataset: Any, column: str, is_right: Callable[[Any], bool]) -> tuple[int, Any] | None:
    """
    The first row whose label is wrong, and the label; `None` if there is none that can be found without decoding a dataset.

    Of a `Dataset` all rows are looked at as they are stored, under any of the usual names: a transform may rename the column.
    Of a list all rows; of anything else the first.

    Args:
        dataset: map-style, not empty.
        column: name of the labels in the rows that the dataset gives.
        is_right: takes a label.
    """
    if not isinstance(dataset, Dataset):
        rows = dataset if isinstance(dataset, Sequence) else [dataset[0]]
        labels = [row.get(column) if isinstance(row, Mapping) else None for row in rows]
        return next(((row, plain(label)) for row, label in enumerate(labels) if not is_right(label)), None)
    stored = dataset.with_format(None)
    name = next((name for name in (column, *LABEL_COLUMNS) if name in stored.column_names), None)
    transformed = dataset.format["type"] == "custom"
    labels = [] if name is None else list(stored[name])
    found = next(((row, label) for row, label in enumerate(labels) if not is_right(label)), None)
    if found is None:
        first = dataset[0][column] if transformed else None
        return (0, plain(first)) if transformed and not is_right(first) else None
    if transformed:  # it may make another label of the one that is stored: batches are looked at too
        seen = plain(dataset[found[0]].get(column))
        return None if is_right(seen) else (found[0], seen)
    return found


def check_batch_labels(labels: Any, classes: int, where: str, remedy: str) -> None:
    """
    Refuse a batch with labels beyond the classes. Waits for the device once.

    Args:
        labels: `[batch]` int64.
        classes: their number.
        where: which batch, for the message.
        remedy: a sentence.

    Raises:
        ValueError: no tensor of whole numbers, or a label out of range; wrong ones are named by their rows.
    """
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.dim() != 1:
        kind = (
            f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, torch.Tensor) else f"{labels!r:.100}"
        )
        raise ValueError(f"`labels` is {kind} in {where}: give each row the number of one class (int64).")
    wrong = (labels < 0) | (labels >= classes)
    if not wrong.any():
        return
    rows = wrong.nonzero().flatten().tolist()
    raise ValueError(
        f"`labels` holds {sorted(set(labels[wrong].tolist()))[:_SHOWN]} in rows {rows[:_SHOWN]}"
        f"{'…' if len(rows) > _SHOWN else ''} of {where}, but there are {classes} classes: labels must lie in 0 … "
        f"{classes - 1}. {remedy}"
    )
