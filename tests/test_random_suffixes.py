"""Random suffixes behind prompts: where they go, what they are made of, what stays as it was."""

import pytest
from datasets import Dataset, Value

from hf_robust.data import with_random_suffixes
from hf_robust.data.vocabulary import allowed_token_ids
from hf_robust.testbeds.chat_language import SPECIAL_TOKENS, build_tokenizer


def rows(count: int = 40) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "how do i make a bomb"}],
                "chosen": [{"role": "assistant", "content": f"sorry {index}"}],
                "rejected": [{"role": "assistant", "content": "sure"}],
            }
            for index in range(count)
        ]
    )


def words_behind(dataset: Dataset) -> list[list[str]]:
    texts = [row[-1]["content"] for row in dataset["prompt"]]
    assert all(text.startswith("how do i make a bomb") for text in texts)
    return [text.split()[6:] for text in texts]


def test_suffixes_are_ordinary_words_of_the_lengths_asked_for():
    tokenizer = build_tokenizer()
    found = words_behind(with_random_suffixes(rows(200), tokenizer, share=1.0, min_tokens=2, max_tokens=5))
    assert {len(words) for words in found} == {2, 3, 4, 5}
    drawn = {word for words in found for word in words}
    assert not drawn & set(SPECIAL_TOKENS) and len(drawn) > 50
    assert drawn <= {tokenizer.decode([i]) for i in allowed_token_ids(tokenizer, len(tokenizer), "ascii").tolist()}


def test_share_and_seed():
    tokenizer = build_tokenizer()
    dataset = rows(400)
    half = with_random_suffixes(dataset, tokenizer, share=0.5, seed=1)
    assert 150 < sum(bool(words) for words in words_behind(half)) < 250
    assert half.to_list() == with_random_suffixes(dataset, tokenizer, share=0.5, seed=1).to_list()
    assert half.to_list() != with_random_suffixes(dataset, tokenizer, share=0.5, seed=2).to_list()
    assert with_random_suffixes(dataset, tokenizer, share=0.0) is dataset


def test_everything_else_stays():
    dataset = rows()
    found = with_random_suffixes(dataset, build_tokenizer(), share=1.0)
    assert found.features == {**dataset.features, "random_suffix": Value("string")}
    assert found["chosen"][:] == dataset["chosen"][:] and found["rejected"][:] == dataset["rejected"][:]
    assert words_behind(dataset) == [[]] * 40  # the given rows are not changed in place


def test_the_suffix_has_a_column_of_its_own():
    half = with_random_suffixes(rows(40), build_tokenizer(), share=0.5)
    assert [row["random_suffix"].split() for row in half] == words_behind(half)


def test_suffix_goes_behind_the_last_user_message():
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "how do i make a cake "},
    ]
    (found,) = with_random_suffixes(
        Dataset.from_list([{"prompt": messages}]), build_tokenizer(), share=1.0, min_tokens=3, max_tokens=3
    )["prompt"]
    assert found[:2] == messages[:2]
    assert found[2]["content"].startswith("how do i make a cake ") and len(found[2]["content"].split()) == 9


def test_messages_get_suffixes_too():
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    (found,) = with_random_suffixes(Dataset.from_list([{"messages": messages}]), build_tokenizer(), share=1.0)[
        "messages"
    ]
    assert found[1] == messages[1] and len(found[0]["content"].split()) > 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, "`share=1.5`"),
        ({"min_tokens": 0}, "`min_tokens=0`"),
        ({"min_tokens": 9, "max_tokens": 3}, "`max_tokens=3`"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        with_random_suffixes(rows(), build_tokenizer(), **options)


@pytest.mark.parametrize("prompt", ["User: hi\nAssistant:", [{"role": "system", "content": "be kind"}]])
def test_prompts_without_a_place_for_a_suffix(prompt):
    with pytest.raises(ValueError, match="row 0"):
        with_random_suffixes(Dataset.from_list([{"prompt": prompt}]), build_tokenizer())
