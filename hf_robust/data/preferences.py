"""Preference rows for adversarial training: validation, tokenization as TRL's `DPOTrainer` does it, and collation."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, Features, List, Value

from hf_robust.data.checks import SHOWN_ROWS, check_preferences, with_prompt
from hf_robust.data.random_suffixes import SUFFIX_COLUMN
from hf_robust.data.text_rows import rows_explained
from hf_robust.data.user_tokens import chat_ids, suffix_token_mask, user_token_mask
from hf_robust.threats import check_choice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TRUNCATION_MODES = ("keep_start", "keep_end")


def _tokenizer_of(processing_class: Any) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerBase

    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            f"`processing_class` is a `{type(processing_class).__name__}`, not a tokenizer: pass that of the text model "
            "(`AutoTokenizer.from_pretrained(...)`). Rows for a vision-language model go with its processor through "
            "`hf_robust.data.vision_preferences.tokenize_vision_preferences`."
        )
    return processing_class


def _common_prefix_length(ids: Sequence[int], others: Sequence[int]) -> int:
    for position, (left, right) in enumerate(zip(ids, others, strict=False)):
        if left != right:
            return position
    return min(len(ids), len(others))


def without_end(ids: list[int], answer: str | list[dict[str, Any]], tokenizer: Any) -> list[int]:
    """
    Token ids of an answer up to where its own words end: no end-of-sequence or end-of-turn token behind them.

    Args:
        ids: token ids of the answer.
        answer: the answer as text or messages, of which the last one counts; its content is text or a list of blocks.
        tokenizer: decodes them.
    """
    text = answer if isinstance(answer, str) else answer[-1].get("content")
    if isinstance(text, list):
        text = " ".join(str(block.get("text") or "") for block in text)
    # Without white space: chat templates put their own between the blocks of a message
    words, end = "".join(str(text or "").split()), len(ids)
    if not words:
        return ids
    while end > 1 and words in "".join(tokenizer.decode(ids[: end - 1]).split()):
        end -= 1
    return ids[:end]


def _tokenize_row(
    row: dict[str, Any],
    *,
    tokenizer: Any,
    max_length: int | None,
    truncation_mode: str,
    conversational: bool,
    rejected_end: bool,
) -> dict[str, Any]:
    """One row as TRL's `DPOTrainer` tokenizes it, cut to `max_length`; `drop` says why nothing is left of it."""
    row = with_prompt(row)
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    kwargs = {"tools": tools, **(row.get("chat_template_kwargs") or {})}
    prompt = row["prompt"]
    if conversational:
        prompt_ids = chat_ids(tokenizer, prompt, add_generation_prompt=True, **kwargs)
        chosen_ids, rejected_ids = (chat_ids(tokenizer, prompt + row[key], **kwargs) for key in ("chosen", "rejected"))
    else:
        prompt_ids = list(tokenizer(text=prompt)["input_ids"])
        eos = tokenizer.eos_token
        chosen_ids, rejected_ids = (
            list(tokenizer(text=prompt + row[key] + ("" if row[key].endswith(eos) else eos))["input_ids"])
            for key in ("chosen", "rejected")
        )
    user_mask = user_token_mask(prompt, tokenizer, template_kwargs=kwargs)
    suffix = (row.get(SUFFIX_COLUMN) or "") if conversational else ""
    suffix_mask = (
        suffix_token_mask(prompt, suffix, tokenizer, template_kwargs=kwargs) if suffix else [0] * len(prompt_ids)
    )
    prompt_length = min(_common_prefix_length(prompt_ids, ids) for ids in (chosen_ids, rejected_ids))
    cut_off = prompt_ids[prompt_length:]
    prompt_ids = prompt_ids[:prompt_length]
    chosen_ids, rejected_ids = chosen_ids[prompt_length:], rejected_ids[prompt_length:]
    if not rejected_end:
        rejected_ids = without_end(rejected_ids, row["rejected"], tokenizer)
    user_mask = None if user_mask is None else user_mask[:prompt_length]
    suffix_mask = None if suffix_mask is None else suffix_mask[:prompt_length]

    # What `max_length` must be for at least one label of either answer behind the prompt.
    longest = max(len(chosen_ids), len(rejected_ids))
    needed = prompt_length + 1 if truncation_mode == "keep_start" else longest + 1
    if max_length is not None and truncation_mode == "keep_start":
        prompt_ids, room = prompt_ids[:max_length], max(max_length - prompt_length, 0)
        chosen_ids, rejected_ids = chosen_ids[:room], rejected_ids[:room]
    elif max_length is not None:
        # One prompt for both answers, as one perturbation serves both: the longer answer decides what is kept of it.
        first = max(prompt_length - max(max_length - longest, 0), 0)
        prompt_ids = prompt_ids[first:]
        user_mask = None if user_mask is None else user_mask[first:]
        suffix_mask = None if suffix_mask is None else suffix_mask[first:]
    if user_mask is not None:
        user_mask = user_mask[: len(prompt_ids)]
        user_mask = user_mask if any(user_mask) else None
    drop = ""
    if not prompt_ids:
        drop = "no prompt token" if prompt_length == 0 else "no prompt token within `max_length`"
    elif not chosen_ids or not rejected_ids:
        truncated = truncation_mode == "keep_start" and max_length is not None and prompt_length >= max_length
        drop = "no label within `max_length`" if truncated else "an answer without a token"
    return {
        "prompt_ids": prompt_ids,
        "chosen_ids": chosen_ids,
        "rejected_ids": rejected_ids,
        "user_mask": user_mask,
        "suffix_mask": None if suffix_mask is None else suffix_mask[: len(prompt_ids)],
        "drop": drop,
        "needed": needed,
        "cut_off": cut_off,
    }


def tokenize_preferences(
    dataset: Dataset,
    processing_class: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    rejected_end: bool = True,
    num_proc: int | None = None,
    name: str = "adversarial_dataset",
) -> Dataset:
    """
    Validate and tokenize preference rows, with the token ids that TRL's `DPOTrainer` gives the same rows.

    A prompt that is implicit in both answers is extracted, the end-of-sequence token is appended to plain answers,
    messages go through the chat template with the row's `tools` and `chat_template_kwargs`, and the answers start
    where the tokens of the prompt and of prompt and answer diverge.

    Args:
        dataset: preference rows, plain or conversational.
        processing_class: the tokenizer.
        max_length: most tokens of prompt and answer together; `None` for no limit.
        truncation_mode: `"keep_start"` (TRL's default) cuts the answer's end; `"keep_end"` cuts the prompt's start, to
            one common prompt for both answers (TRL cuts each pair on its own).
        rejected_end: whether the rejected answer keeps the end-of-sequence or end-of-turn token behind its words, as in
            TRL. `False` for rejected answers that are beginnings ("Sure, here is"): no model would end there.
        num_proc: processes of `Dataset.map`.
        name: name of the dataset's argument, for messages.

    Returns:
        A dataset of five columns, each a list of integers: `prompt_ids`, `chosen_ids`, `rejected_ids`, and, as long as
        `prompt_ids`, `user_mask`, 1 on the user's own words (see [`user_token_mask`]), and `suffix_mask`, 1 on what
        [`with_random_suffixes`] put behind them; either is `None` where that cannot be told. Rows that keep no label of one
        answer, or no prompt, are left out with a warning.

    Raises:
        TypeError: if `dataset` is not a map-style dataset or `processing_class` not a tokenizer.
        ValueError: for a bad argument or row, or if no row is left.
    """
    kind = check_preferences(dataset, name)
    check_choice("truncation_mode", truncation_mode, TRUNCATION_MODES)
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1):
        raise ValueError(f"`max_length={max_length!r}` must be a whole number of tokens above 0, or None for no limit.")
    tokenizer: Any = _tokenizer_of(processing_class)
    if kind == "messages" and tokenizer.chat_template is None:
        raise ValueError(
            f"`{name}` holds messages, but `processing_class` ({type(tokenizer).__name__}) has no chat template. "
            "Set `processing_class.chat_template`, or give plain text rows."
        )
    if kind == "text" and tokenizer.eos_token is None:
        raise ValueError(
            f"`{name}` holds plain text, whose answers end with the end-of-sequence token, but `processing_class` has "
            "`eos_token=None`. Set `processing_class.eos_token`."
        )
    ids = List(Value("int64"))
    columns = {"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids, "user_mask": ids, "suffix_mask": ids}
    notes = {"drop": Value("string"), "needed": Value("int64"), "cut_off": ids}
    with rows_explained(dataset, name, processing_class):
        tokenized = dataset.with_format(None).map(
            _tokenize_row,
            fn_kwargs={
                "tokenizer": tokenizer,
                "max_length": max_length,
                "truncation_mode": truncation_mode,
                "conversational": kind == "messages",
                "rejected_end": rejected_end,
            },
            remove_columns=dataset.column_names,
            # Given, because a column of `None` alone has no type of its own.
            features=Features({**columns, **notes}),
            num_proc=num_proc,
            desc=f"Tokenizing {name}",
        )
    diverged = [index for index, cut_off in enumerate(tokenized["cut_off"]) if cut_off]
    if diverged:
        logger.warning(
            "In %d of the %d rows of `%s` the tokenized prompt is not the beginning of the tokenized prompt and answer "
            "(first rows: %s). The answer starts where they diverge; %r of the first such prompt is left out. Use a "
            "chat template that renders the prompt the same way in both cases, or end prompts on a token boundary.",
            *(len(diverged), len(dataset), name, diverged[:SHOWN_ROWS]),
            tokenizer.decode(tokenized[diverged[0]]["cut_off"]),
        )
    kept = _drop_rows(tokenized, max_length, truncation_mode, name)
    return kept.remove_columns(list(notes))


def _drop_rows(tokenized: Dataset, max_length: int | None, truncation_mode: str, name: str) -> Dataset:
    """The rows that can be trained on; a warning for the others, an error if there are only others."""
    reasons = list(tokenized["drop"])
    dropped = [index for index, reason in enumerate(reasons) if reason]
    if not dropped:
        return tokenized
    counts = ", ".join(f"{reasons.count(reason)} with {reason}" for reason in dict.fromkeys(reasons) if reason)
    if len(dropped) < len(reasons):
        logger.warning(
            "%d of the %d rows of `%s` are left out under `max_length=%s`, `truncation_mode=%r`: %s (first rows: %s).",
            *(len(dropped), len(reasons), name, max_length, truncation_mode, counts, dropped[:SHOWN_ROWS]),
        )
        return tokenized.select([index for index, reason in enumerate(reasons) if not reason])
    remedy = "Check the tokenizer and its chat template."
    if any("max_length" in reason for reason in reasons):
        needed = list(tokenized["needed"])
        other = "truncation_mode='keep_end'" if truncation_mode == "keep_start" else "truncation_mode='keep_start'"
        remedy = (
            f"Raise `max_length` (the shortest row needs {min(needed)}, the longest {max(needed)} tokens for one "
            f"label), shorten the texts, or try `{other}`."
        )
    raise ValueError(
        f"`max_length={max_length}` with `truncation_mode={truncation_mode!r}` leaves none of the {len(reasons)} rows "
        f"of `{name}`: {counts}. {remedy}"
    )


def collate_preferences(
    rows: Sequence[Mapping[str, Any]], pad_token_id: int, *, pad_to_multiple_of: int | None = None
) -> dict[str, torch.Tensor]:
    """
    A batch of n tokenized preference rows, padded on the right: first n × prompt and chosen, then n × prompt and
    rejected answer.

    Args:
        rows: n rows of [`tokenize_preferences`].
        pad_token_id: token id of the padding.
        pad_to_multiple_of: round T up to a multiple of this.

    Returns:
        - `input_ids` `[2n, T]` int64
        - `attention_mask` `[2n, T]` int64, 1 on the row's tokens
        - `labels` `[2n, T]` int64, the answer's token ids, -100 on prompt and padding
        - `prompt_mask` `[2n, T]` bool, the prompt's tokens
        - `user_mask` `[2n, T]` bool, the user's own words in it; False throughout where the row's `user_mask` is `None`
        - `suffix_mask` `[2n, T]` bool, the random tokens behind them, in the same way

    Raises:
        ValueError: if there is no row.
    """
    if not rows:
        raise ValueError("`rows` is empty; a batch needs at least one preference row.")
    pairs = [(row, row[answer]) for answer in ("chosen_ids", "rejected_ids") for row in rows]
    length = max(len(row["prompt_ids"]) + len(answer) for row, answer in pairs)
    if pad_to_multiple_of:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    shape = (len(pairs), length)
    batch = {
        "input_ids": torch.full(shape, pad_token_id, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, -100, dtype=torch.long),
        "prompt_mask": torch.zeros(shape, dtype=torch.bool),
        "user_mask": torch.zeros(shape, dtype=torch.bool),
        "suffix_mask": torch.zeros(shape, dtype=torch.bool),
    }
    for index, (row, answer) in enumerate(pairs):
        start = len(row["prompt_ids"])
        end = start + len(answer)
        batch["input_ids"][index, :end] = torch.tensor([*row["prompt_ids"], *answer])
        batch["attention_mask"][index, :end] = 1
        batch["labels"][index, start:end] = torch.tensor(answer)
        batch["prompt_mask"][index, :start] = True
        for name in ("user_mask", "suffix_mask"):
            if row.get(name) is not None:
                batch[name][index, :start] = torch.tensor(row[name], dtype=torch.bool)
    return batch
