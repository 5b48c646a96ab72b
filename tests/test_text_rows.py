"""Rows that cannot be tokenised are named, and so are batches that cannot be made."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import (
    BartConfig,
    BartModel,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    RobertaConfig,
    RobertaModel,
)

from hf_robust.data.text_rows import check_has_rows, rows_explained
from hf_robust.trainers.batches import CheckedCollator, _positions
from tests.helpers import tiny_model
from tests.trainer_data import (
    adversarial_rows,
    capo_trainer,
    cat_trainer,
    noisefit_trainer,
    tiny_tokenizer,
    utility_rows,
)
from tests.unlearn_data import unlearn_trainer

USER = [{"role": "user", "content": "how"}]
ANSWER = [{"role": "assistant", "content": "no"}]
SHARED = [{"from": "human", "value": "how"}, {"from": "gpt", "value": "no"}]

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
    "share": ({"conversations": [SHARED, []]}, "row 1 of `rows` (its `conversations` read as `messages`) is empty"),
    "no share": ({"conversations": [[]]}, "row 0 of `rows` (its `conversations` read as `messages`) is empty"),
    "rejected": ({"chosen": ["a"], "rejected": [3]}, "`rejected` of row 0 of `rows` is 3 (int)"),
}


def stumble(error: BaseException | None = None) -> None:
    raise error or KeyError("deep inside")


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


def test_rows_that_train_are_not_blamed():
    template = "{% if not who %}{{ raise_exception('give who') }}{% endif %}{{ messages[0]['content'] }}"
    good = {
        "shared": ({"conversations": [SHARED]}, tiny_tokenizer()),
        "arguments": (
            {"messages": [USER], "chat_template_kwargs": [{"who": "me"}]},
            tiny_tokenizer(chat_template=template),
        ),
        "no arguments": ({"messages": [USER], "chat_template_kwargs": [None]}, tiny_tokenizer()),
    }
    for columns, tokenizer in good.values():
        with (
            pytest.raises(KeyError, match="deep inside"),
            rows_explained(Dataset.from_dict(columns), "rows", tokenizer),
        ):
            stumble()
    bare = tiny_tokenizer(chat_template=None)
    with (
        pytest.raises(ValueError, match="`messages` of row 0 .*cannot be put into the chat template"),
        rows_explained(Dataset.from_dict({"conversations": [SHARED]}), "rows", bare),
    ):
        stumble()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_the_machine_stay_as_they_are(error: Exception):
    rows = Dataset.from_dict({"prompt": [None], "completion": ["a"]})
    with pytest.raises(type(error)) as caught, rows_explained(rows, "rows"):
        stumble(error)
    assert caught.value is error
    with pytest.raises(type(error)) as caught:
        CheckedCollator(lambda rows: stumble(error), 7)([{"input_ids": [1]}])
    assert caught.value is error


def test_rows_of_a_transform_are_trl_s_business():
    rows = Dataset.from_dict({"doc": ["a"]}).with_transform(lambda batch: {"text": batch["doc"]})
    with pytest.raises(KeyError, match="deep inside"), rows_explained(rows, "rows", tiny_tokenizer()):
        stumble()


def test_how_many_rows_were_looked_at_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hf_robust.data.text_rows._LOOKED_AT", 2)
    rows = Dataset.from_dict({"text": ["a", "b", None]})
    with pytest.raises(KeyError) as caught, rows_explained(rows, "rows"):
        stumble()
    assert caught.value.__notes__ == ["None of the first 2 of 3 rows of `rows` explains it."]
    with pytest.raises(KeyError) as caught, rows_explained(rows.select([0, 1]), "rows"):
        stumble()
    assert not hasattr(caught.value, "__notes__")


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
    # Packed texts begin anew
    packed = {"input_ids": [1, 2, 3, 4], "position_ids": [0, 1, 0, 1]}
    check = CheckedCollator(stack, 7, positions=2, position_ids=2)
    check([packed])
    with pytest.raises(ValueError, match="`position_ids` of a batch are of rows of 3 tokens.* 2 positions"):
        check([{**packed, "position_ids": [0, 1, 2, 0]}])


@pytest.mark.parametrize(("name", "positions"), [("llama", None), ("gpt2", 64), ("opt", 64)])
def test_learned_positions(name: str, positions: int | None):
    model = tiny_model(name)
    assert _positions(model) == (positions, positions)
    if name != "opt":
        lora = LoraConfig(target_modules=["wte" if name == "gpt2" else "embed_tokens"])
        assert _positions(get_peft_model(model, lora)) == (positions, positions)


def test_learned_positions_of_other_models():
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    roberta = RobertaConfig(**sizes, num_attention_heads=2, max_position_embeddings=34, pad_token_id=1)
    assert _positions(RobertaModel(roberta)) == (32, 34)
    ends = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    parts = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    assert _positions(BartModel(BartConfig(vocab_size=61, d_model=16, **ends, **parts))) == (32, 32)
    # Ten positions are those of its tower for sounds
    sound = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16}
    config = Qwen2AudioConfig(
        audio_config={**sound, "num_mel_bins": 8, "max_source_positions": 10},
        text_config={**sizes, **heads, "model_type": "qwen2"},
    )
    assert _positions(Qwen2AudioForConditionalGeneration(config)) == (None, None)


def test_packed_rows_longer_than_the_positions_are_trained_on(tmp_path: Path):
    kept = {"ce_weight": 1.0, "consistency_weight": 0.0}
    trainer = noisefit_trainer(
        tiny_model("gpt2"),
        tmp_path,
        {"train_dataset": utility_rows(64)},
        packing=True,
        max_length=32,
        max_steps=1,
        **kept,
    )
    lengths = []
    collator = trainer.data_collator

    def measured(rows: list[dict[str, Any]]) -> Any:
        batch = collator(rows)
        lengths.append(batch["input_ids"].shape)
        return batch

    trainer.data_collator = measured
    trainer.train()
    assert lengths[0][0] == 1 and lengths[0][1] > 64


def test_a_smaller_batch_is_found_where_memory_is_short(tmp_path: Path):
    def short(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        batch = stack([{name: row[name][-4:] for name in ("input_ids", "labels")} for row in rows])
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    args = {"auto_find_batch_size": True, "max_steps": 1, "calibration_batch_size": 1}
    trainer = noisefit_trainer(tiny_model(), tmp_path, {"data_collator": short}, **args)
    trainer.train()
    assert trainer.state.train_batch_size == 2


def test_ids_beyond_the_vocabulary_are_refused_by_a_trainer(tmp_path: Path):
    rows = Dataset.from_dict({"input_ids": [[5, 61]] * 4, "labels": [[-100, 5]] * 4})
    trainer = noisefit_trainer(tiny_model(), tmp_path, {"train_dataset": rows})
    collator = trainer.data_collator
    with pytest.raises(ValueError, match="`input_ids` of a batch lies in 5 … 61.* 0 … 60"):
        trainer.train()
    assert trainer.data_collator is collator
