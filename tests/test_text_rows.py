"""Rows that cannot be tokenised are named, and so are batches that cannot be made."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset

from hf_robust.data.text_rows import check_has_rows, rows_explained
from hf_robust.trainers.batches import CheckedCollator, _positions
from tests.helpers import tiny_model
from tests.trainer_data import adversarial_rows, capo_trainer, cat_trainer, noisefit_trainer, tiny_tokenizer
from tests.unlearn_data import unlearn_trainer

USER = [{"role": "user", "content": "how"}]
ANSWER = [{"role": "assistant", "content": "no"}]

BAD = {
    "number": ({"prompt": ["how", "do"], "completion": [1, 2]}, "`completion` of row 0 of `rows` is 1 (int)"),
    "hole": ({"prompt": ["how", None], "completion": ["a", "b"]}, "`prompt` of row 1 of `rows` is None (NoneType)"),
    "mixed": ({"prompt": ["how"], "completion": [ANSWER]}, "Row 0 of `rows` mixes text and messages"),
    "role": ({"messages": [[{"role": None, "content": "a"}]]}, "`messages` of row 0 of `rows` holds"),
    "content": ({"messages": [[{"role": "user", "content": 3}]]}, "whose content is 3"),
    "no messages": ({"messages": [[]]}, "`messages` of row 0 of `rows` is empty"),
    "no prompt": ({"prompt": [[]], "completion": [ANSWER]}, "`prompt` of row 0 of `rows` is empty"),
    "no completion": ({"prompt": ["how"], "text": ["a"]}, "Row 0 of `rows` has the columns ['prompt', 'text']"),
    "no text": ({"a": [1]}, "Row 0 of `rows` has the columns ['a']"),
    "text": ({"text": [["how"]]}, "`text` of row 0 of `rows` holds 'how', which is not a message"),
    "tools": ({"prompt": [USER], "completion": [ANSWER], "tools": ["{"]}, "`tools` of row 0 of `rows` is '{'"),
    "ids": ({"input_ids": [[1, 2], None]}, "`input_ids` of row 1 of `rows` is None"),
    "rejected": ({"chosen": ["a"], "rejected": [3]}, "`rejected` of row 0 of `rows` is 3 (int)"),
}


def stumble() -> None:
    raise KeyError("deep inside")


@pytest.mark.parametrize("kind", BAD)
def test_the_row_at_fault_is_named(kind: str):
    columns, message = BAD[kind]
    with pytest.raises(ValueError) as caught, rows_explained(Dataset.from_dict(columns), "rows", tiny_tokenizer()):
        stumble()
    assert message in str(caught.value) and isinstance(caught.value.__cause__, KeyError)


def test_a_template_that_refuses_a_row():
    tokenizer = tiny_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    rows = Dataset.from_dict({"prompt": [USER], "completion": [ANSWER]})
    with (
        pytest.raises(ValueError, match="`completion` of row 0 .* roles must alternate.*Mend the row"),
        rows_explained(rows, "rows", tokenizer),
    ):
        stumble()


def test_errors_that_no_row_explains_stay_as_they_are():
    rows = Dataset.from_dict({"prompt": [USER], "completion": [ANSWER]})
    for dataset in (rows, rows.to_iterable_dataset(), None):
        with pytest.raises(KeyError, match="deep inside"), rows_explained(dataset, "rows", tiny_tokenizer()):
            stumble()


def test_no_rows():
    empty = Dataset.from_dict({"prompt": []})
    for dataset in (empty, IterableDataset.from_generator(lambda: iter(()))):
        with pytest.raises(ValueError, match="`train_dataset` has 0 rows"):
            check_has_rows(dataset, "train_dataset")
    check_has_rows(None, "train_dataset")


@pytest.mark.parametrize(
    ("make", "name", "argument"),
    [
        (cat_trainer, "train_dataset", "train_dataset"),
        (noisefit_trainer, "train_dataset", "train_dataset"),
        (unlearn_trainer, "forget_dataset", "forget_dataset"),
        (unlearn_trainer, "retain_dataset", "retain_dataset"),
    ],
)
def test_trainers_name_the_row(make: Any, name: str, argument: str, tmp_path: Path):
    rows = Dataset.from_dict({"prompt": ["how", "do"], "completion": ["i", None]})
    with pytest.raises(ValueError, match=f"`completion` of row 1 of `{argument}` is None"):
        make(tiny_model(), tmp_path, {name: rows})
    with pytest.raises(ValueError, match=f"`{argument}` has 0 rows"):
        make(tiny_model(), tmp_path, {name: rows.select([])})


@pytest.mark.parametrize(
    ("make", "name"),
    [(cat_trainer, "adversarial_dataset"), (capo_trainer, "train_dataset")],
)
def test_trainers_name_the_row_with_broken_tools(make: Any, name: str, tmp_path: Path):
    rows = adversarial_rows(4).add_column("tools", ["[]", "[]", "{", "[]"])
    with pytest.raises(ValueError, match=f"`tools` of row 2 of `{name}` is '{{', which is no JSON"):
        make(tiny_model(), tmp_path, {name: rows})


# ---- Batches ----


def stack(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([torch.tensor(row[name]) for row in rows]) for name in rows[0]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input_ids": [1, 2]}, {"input_ids": [1]}], r"`data_collator` \(function\) .* `input_ids`: \[1, 2\], \[1\]"),
        ([{"input_ids": [[1, 2]]}, {"input_ids": [[1]]}], "`input_ids`: lists of 1 × 2, lists of 1 × 1"),
        ([{"input_ids": [1, 7]}], "`input_ids` of a batch lies in 1 … 7, but the model has the token ids 0 … 6"),
        ([{"input_ids": [1, -1]}], "`input_ids` of a batch lies in -1 … 1"),
        ([{"input_ids": [1, 2], "labels": [-100, 9]}], "`labels` of a batch lies in 9 … 9"),
        ([{"input_ids": [1, 2], "labels": [1]}], r"`labels` of a batch have shape \(1, 1\)"),
        ([{"input_ids": [0.5]}], "`input_ids` has type torch.float32"),
        ([{"input_ids": 3}], "`input_ids` has type torch.int64 and shape"),
        ([{"input_ids": []}], "`input_ids` (of a batch is empty|has type)"),
    ],
)
def test_batches_that_the_model_cannot_take(rows: list[dict[str, Any]], message: str):
    with pytest.raises(ValueError, match=message):
        CheckedCollator(stack, 7)(rows)


def test_good_batches_pass():
    rows = [{"input_ids": [1, 6], "labels": [-100, 6]}]
    assert CheckedCollator(stack, 7)(rows)["labels"].tolist() == [[-100, 6]]
    assert CheckedCollator(stack)([{"input_ids": [99]}])["input_ids"].tolist() == [[99]]


def test_rows_longer_than_learned_positions():
    CheckedCollator(stack, 7, positions=2)([{"input_ids": [1, 2]}])
    with pytest.raises(ValueError, match="rows of 3 tokens, but the model has 2 positions"):
        CheckedCollator(stack, 7, positions=2)([{"input_ids": [1, 2, 3]}])


@pytest.mark.parametrize(("name", "positions"), [("llama", None), ("gpt2", 64), ("opt", 64)])
def test_learned_positions(name: str, positions: int | None):
    assert _positions(tiny_model(name)) == positions


def test_ids_beyond_the_vocabulary_are_refused_by_a_trainer(tmp_path: Path):
    rows = Dataset.from_dict({"input_ids": [[5, 61]] * 4, "labels": [[-100, 5]] * 4})
    trainer = noisefit_trainer(tiny_model(), tmp_path, {"train_dataset": rows})
    collator = trainer.data_collator
    with pytest.raises(ValueError, match="`input_ids` of a batch lies in 5 … 61.* 0 … 60"):
        trainer.train()
    assert trainer.data_collator is collator
