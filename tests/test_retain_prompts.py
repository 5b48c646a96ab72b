"""Retain prompts: lists, files, and built-in names without what is erased."""

import json
import logging
from pathlib import Path

import pytest

from hf_robust.data import load_retain_prompts, object_names


def test_built_in_names_are_many_and_different():
    names = object_names()
    assert len(set(names)) == len(names) >= 240
    assert load_retain_prompts("objects") == [f"a photo of {name}" for name in names]


def test_words_of_the_concept_are_filtered_out():
    kept = load_retain_prompts("objects", concepts=["Apples in the style of a Church"], exclude_words=["fire"])
    dropped = {prompt.removeprefix("a photo of ") for prompt in set(load_retain_prompts("objects")) - set(kept)}
    # Plural against singular; a phrase that holds the word; "photo", "of" and the like drop nothing
    assert dropped == {"apple", "church", "fire hydrant"}


def test_lists_are_stripped_and_each_prompt_is_kept_once(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        assert load_retain_prompts([" a dog", "a cat", "a dog", ""], concepts=["cat"]) == ["a dog", "a cat"]
    assert "'a cat'" in caplog.text  # the user's own: said, not dropped


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prompts.txt", "a dog\n\na cat\n"),
        ("prompts.json", json.dumps(["a dog", {"prompt": "a cat"}])),
        ("prompts.csv", "id,prompt\n1,a dog\n2,a cat\n"),
    ],
)
def test_files(name: str, content: str, tmp_path: Path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert load_retain_prompts(str(tmp_path / name)) == ["a dog", "a cat"]


def test_bad_sources_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="retain_weight=0"):
        load_retain_prompts([])
    with pytest.raises(FileNotFoundError, match="is no file"):
        load_retain_prompts("object")
    with pytest.raises(ValueError, match="no string"):
        load_retain_prompts([3])  # type: ignore[list-item]
    (tmp_path / "a.csv").write_text("text\nx\n", encoding="utf-8")
    with pytest.raises(ValueError, match="none of them `prompt`"):
        load_retain_prompts(str(tmp_path / "a.csv"))
    (tmp_path / "a.json").write_text('{"prompt": "x"}', encoding="utf-8")
    with pytest.raises(ValueError, match="list of prompts"):
        load_retain_prompts(str(tmp_path / "a.json"))
