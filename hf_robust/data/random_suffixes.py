"""Prompts followed by random tokens: what a suffix attack looks like before its search has begun."""

import random

from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from hf_robust.data.vocabulary import allowed_token_ids

# Column that holds a row's suffix as text, empty where it has none
SUFFIX_COLUMN = "random_suffix"


def with_random_suffixes(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    share: float = 0.5,
    min_tokens: int = 4,
    max_tokens: int = 20,
    seed: int = 0,
) -> Dataset:
    """
    Put random tokens behind the last user message of a share of the rows.

    An attack in a ball around the embeddings of clean prompts never shows the model what suffix attacks look like: more
    positions, filled with unrelated tokens. With these rows in adversarial training, the ball is also searched around such
    prompts. Give the utility rows suffixes too: otherwise the suffix alone tells what is to be refused, and the model
    refuses whatever has one. The tokens are drawn evenly from the tokenizer's ordinary printable ASCII tokens; no attack
    is run to find them.

    Args:
        dataset: rows with a conversational `prompt` (list of messages), such as preference rows, or with `messages`.
        tokenizer: whose tokens are drawn.
        share: share of the rows, in [0, 1], chosen at random.
        min_tokens: tokens of a suffix at least, 1 or more.
        max_tokens: tokens of a suffix at most. Text may be split into a few tokens more or less than were drawn.
        seed: of the choice of rows, lengths and tokens.

    Returns:
        The rows in their order, with the other columns as they were, and the suffix in the column `random_suffix` (empty
        where there is none), by which a trainer finds its tokens.

    Raises:
        ValueError: `share` outside [0, 1], `min_tokens` and `max_tokens` out of order, or a plain text prompt, in which
            the end of the user's words cannot be found.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"`share={share!r}` must lie in [0, 1]: the share of rows that get a suffix.")
    if not 1 <= min_tokens <= max_tokens:
        raise ValueError(f"`min_tokens={min_tokens!r}` must be at least 1 and at most `max_tokens={max_tokens!r}`.")
    words = allowed_token_ids(tokenizer, len(tokenizer), "ascii").tolist()
    draw = random.Random(seed)

    column = "prompt" if "prompt" in dataset.column_names else "messages"

    def add(row: dict, index: int) -> dict:
        prompt = row.get(column, "")
        users = [] if isinstance(prompt, str) else [message for message in prompt if message["role"] == "user"]
        if not users or not isinstance(users[-1]["content"], str):
            raise ValueError(
                f"`{column}` of row {index} is not a conversation with a user message, so that nothing says where a suffix "
                "would go: give conversational rows whose `content` is text, or `share=0`."
            )
        if draw.random() >= share:
            return {**row, SUFFIX_COLUMN: ""}
        suffix = tokenizer.decode([draw.choice(words) for _ in range(draw.randint(min_tokens, max_tokens))]).strip()
        messages = [dict(message) for message in prompt]
        last = max(place for place, message in enumerate(messages) if message["role"] == "user")
        messages[last]["content"] = f"{messages[last]['content'].rstrip()} {suffix}"
        return {**row, column: messages, SUFFIX_COLUMN: suffix}

    # Drawn anew in every process: the cache of `datasets` would not see the generator's state
    rows = [add(row, index) for index, row in enumerate(dataset)] if share > 0 else None
    if rows is None:
        return dataset
    return Dataset.from_list(rows, features=Features({**dataset.features, SUFFIX_COLUMN: Value("string")}))
