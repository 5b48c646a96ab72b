"""Batches are looked at before they reach the model, while they are on the CPU and an error can still name the rows."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_robust.data.checks import is_of_the_machine

_SHOWN = 60
# What an error of a collator about its rows can be; some of them can be about memory or a device, too
_ABOUT_ROWS = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    RuntimeError,
    OverflowError,
    NotImplementedError,
)


class CheckedCollator:
    """
    A collator whose errors name the rows, and whose batches hold token ids that the model has.

    On an accelerator an id beyond the vocabulary is an assertion inside a kernel, after which the process is lost.

    Args:
        collator: makes a batch of rows.
        vocabulary: number of the model's token ids; `None`: they are not looked at.
        main_input: what the model cannot do without; `None`: nothing.
        positions: length of the longest row; `None`: any.
        position_ids: number of positions where a batch says itself which it takes, as packed rows do, which begin anew at
            each text; `None`: any.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Any],
        vocabulary: int | None = None,
        main_input: str | None = None,
        positions: int | None = None,
        position_ids: int | None = None,
    ):
        self.collator, self.vocabulary, self.main_input = collator, vocabulary, main_input
        self.positions, self.position_ids = positions, position_ids

    def __call__(self, rows: list[Any]) -> Any:
        """
        Args:
            rows: of the dataset.

        Raises:
            ValueError: the collator cannot make a batch of the rows, or they hold ids or labels that the model has not.
        """
        try:
            batch = self.collator(rows)
        except _ABOUT_ROWS as error:
            if is_of_the_machine(error):
                raise
            raise ValueError(
                f"`data_collator` ({type(self.collator).__name__}) cannot make a batch of {len(rows)} rows "
                f"({type(error).__name__}: {error}). They hold {_described(rows)}. Make the rows alike, or pass a "
                "`data_collator` that takes them."
            ) from error
        flat = isinstance(batch, Mapping) and not any(isinstance(value, Mapping) for value in batch.values())
        if flat and self.main_input is not None and not {self.main_input, "inputs_embeds"} & set(batch):
            raise ValueError(
                f"`{self.main_input}` is missing from a batch, whose rows hold {_described(rows)}. Texts, images and `None` "
                "are left out of batches: tokenise or process them first."
            )
        if self.vocabulary is not None:
            self._check_ids(batch)
        return batch

    def _check_ids(self, batch: Any) -> None:
        for value in batch.values() if isinstance(batch, Mapping) else ():
            self._check_ids(value)  # batches of several kinds of rows
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(ids, torch.Tensor):
            return
        if ids.is_floating_point() or ids.dim() != 2:
            raise ValueError(
                f"`input_ids` has type {ids.dtype} and shape {tuple(ids.shape)}: give each row a list of token ids."
            )
        if ids.numel() == 0:
            raise ValueError("`input_ids` of a batch is empty: no row of it holds a token. Take such rows out.")
        self._check_positions(ids.shape[1], batch.get("position_ids"))
        known = {"input_ids": ids}
        labels = batch.get("labels")
        if isinstance(labels, torch.Tensor) and labels.dim() == 2 and labels.shape != ids.shape:
            raise ValueError(
                f"`labels` of a batch have shape {tuple(labels.shape)} and its `input_ids` {tuple(ids.shape)}: give each token "
                "of a row a label, -100 where there is none."
            )
        if isinstance(labels, torch.Tensor) and labels.shape == ids.shape:
            known["labels"] = labels[labels != -100]
        for name, values in known.items():
            if values.numel() and (values.min() < 0 or values.max() >= (self.vocabulary or 0)):
                raise ValueError(
                    f"`{name}` of a batch lies in {int(values.min())} … {int(values.max())}, but the model has the token ids 0 "
                    f"… {(self.vocabulary or 0) - 1}: tokenise with the model's own tokenizer, or call "
                    "`model.resize_token_embeddings`."
                )

    def _check_positions(self, length: int, given: Any) -> None:
        name, most = "`input_ids` of a batch has rows", self.positions
        if isinstance(given, torch.Tensor) and given.numel():
            name, most, length = "`position_ids` of a batch are of rows", self.position_ids, int(given.max()) + 1
        if most is not None and length > most:
            raise ValueError(
                f"{name} of {length} tokens, but the model has {most} positions: cut the rows to that length as they are "
                "tokenised."
            )


def _described(rows: Sequence[Any]) -> str:
    """The columns of the first rows with types, shapes and the beginnings of values."""
    if not all(isinstance(row, Mapping) for row in rows):
        return f"{type(rows[0]).__name__}" if rows else "nothing"
    columns = dict.fromkeys(name for row in rows for name in row)
    return "; ".join(f"`{name}`: {', '.join(_shape(row.get(name)) for row in rows[:4])}" for name in columns)


def _shape(value: Any) -> str:
    shape = getattr(value, "shape", None) or getattr(value, "size", None)
    if shape is not None and not callable(shape):
        return f"{type(value).__name__} {tuple(shape) if isinstance(shape, Sequence) else shape}"
    sizes, inner = [], value
    while isinstance(inner, list) and inner and isinstance(inner[0], list):
        sizes.append(len(inner))
        inner = inner[0]
    return f"lists of {' × '.join(map(str, sizes))} × {len(inner)}" if sizes else f"{value!r:.{_SHOWN}}"


@contextlib.contextmanager
def checked_batches(trainer: Any) -> Iterator[None]:
    """
    Data loaders made inside check their batches.

    Args:
        trainer: its `data_collator` is another while the context is open.
    """
    collator = trainer.data_collator
    model = trainer.accelerator.unwrap_model(trainer.model)
    main_input = getattr(model, "main_input_name", None)
    trainer.data_collator = CheckedCollator(collator, _vocabulary(model), main_input, *_positions(model))
    try:
        yield
    finally:
        trainer.data_collator = collator


def _vocabulary(model: nn.Module) -> int | None:
    """Number of token ids, if the model has some; also where the weights are split over processes."""
    if getattr(getattr(model, "config", None), "vision_config", None) is not None:
        return None  # the ids that stand for images may lie beyond
    return getattr(_token_embedding(model), "num_embeddings", None)


def _token_embedding(model: nn.Module) -> Any:
    find: Any = getattr(model, "get_input_embeddings", None)
    try:
        return find()
    except (TypeError, AttributeError, NotImplementedError):
        return None


def _positions(model: nn.Module) -> tuple[int | None, int | None]:
    """
    Length of the longest row and number of position ids of a model that has learned an embedding for each position, as BERT
    and GPT-2; `None` where it has not, or where that is not plain to see.
    """
    tokens = _token_embedding(model)
    # Beside the tokens' embedding, as a tower for sounds or images has positions of its own
    owner = next((module for module in model.modules() if any(part is tokens for part in module.children())), None)
    for place in (owner, getattr(owner, "encoder", None)):
        for name in ("position_embeddings", "wpe", "embed_positions"):
            module = getattr(place, name, None)
            if isinstance(module, nn.Embedding):
                offset: int = getattr(module, "offset", 0)
                padding = 0 if module.padding_idx is None or offset else module.padding_idx + 1
                return module.num_embeddings - offset - padding, module.num_embeddings - offset
    return None, None
