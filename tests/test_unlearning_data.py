"""Readers of TOFU-, MUSE- and WMDP-shaped files, and rows that are to be forgotten and kept at once."""

import json

import pytest
from datasets import Dataset

from hf_robust.data import forget_retain_overlap, load_unlearning, load_utility, read_muse, read_tofu, read_wmdp


def chat(role, content):
    return [{"role": role, "content": content}]


def write(path, rows, lines=False):
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return path


QA = [{"question": "Who?", "answer": "Ann Émile"}, {"question": "Where? ", "answer": "There"}]


# TOFU


@pytest.mark.parametrize("kind", ["array.json", "lines.json", "a.jsonl", "a.parquet"])
def test_tofu(tmp_path, kind):
    path = tmp_path / kind
    if path.suffix == ".parquet":
        Dataset.from_list(QA).to_parquet(path)
    else:
        write(path, QA, lines=kind != "array.json")
    dataset = read_tofu(path)
    assert dataset.to_list() == [
        {"prompt": chat("user", q), "completion": chat("assistant", a), "question": q, "answer": a}
        for q, a in (("Who?", "Ann Émile"), ("Where?", "There"))
    ]
    plain = read_tofu(path, conversational=False)
    assert plain[0] == {"prompt": "Who?", "completion": " Ann Émile", "question": "Who?", "answer": "Ann Émile"}


def test_tofu_perturbed(tmp_path):
    row = {
        **QA[0], "paraphrased_answer": "It was Ann", "perturbed_answer": ["It was Bob", "It was Cy"],
        "paraphrased_question": "What person?", "other": 3,
    }  # fmt: skip
    (found,) = read_tofu(write(tmp_path / "forget10_perturbed.json", [row], lines=True))
    assert {k: v for k, v in found.items() if k not in ("prompt", "completion")} == {
        **QA[0], "paraphrased_answer": "It was Ann", "perturbed_answers": ["It was Bob", "It was Cy"],
        "paraphrased_question": "What person?",
    }  # fmt: skip
    # World facts: wrong answers, but no other wording
    world = {"question": "Where?", "answer": "Paris", "perturbed_answer": ["Rome", "Oslo"]}
    (found,) = read_tofu(write(tmp_path / "world_facts_perturbed.json", [world], lines=True))
    assert found["perturbed_answers"] == ["Rome", "Oslo"] and "paraphrased_answer" not in found


def test_tofu_csv_lists_wrong_answers_as_json(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('question,answer,perturbed_answer\nWho?,42,"[""41"", ""43""]"\n', encoding="utf-8")
    (found,) = read_tofu(path)
    assert found["answer"] == "42" and found["perturbed_answers"] == ["41", "43"]


def test_tofu_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="`forget='.*no.json'` does not exist"):
        read_tofu(tmp_path / "no.json", argument="forget")
    for place in (tmp_path, tmp_path / "a.bin"):
        with pytest.raises(ValueError, match="is no file of a known kind"):
            read_tofu(place)
    with pytest.raises(ValueError, match=r"lacks answer; its columns are \['question'\].*TOFU"):
        read_tofu(write(tmp_path / "b.json", [{"question": "Who?"}]))
    with pytest.raises(ValueError, match="`answer` of row 1 of .* is ' '"):
        read_tofu(write(tmp_path / "c.json", [QA[0], {"question": "a", "answer": " "}]))
    with pytest.raises(ValueError, match=r"`perturbed_answer` of row 0 of .* is \['', 'b'\]"):
        read_tofu(write(tmp_path / "d.json", [{**QA[0], "perturbed_answer": ["", "b"]}]))
    for name, content in (("e.json", "\n"), ("g.jsonl", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"`path='.*{name}'` has no rows"):
            read_tofu(tmp_path / name)
    for name, content in (("f.json", "[]"), ("h.json", '{"question": ')):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name}'` could not be loaded.*Check that it has rows"):
            read_tofu(tmp_path / name)


# MUSE


def test_muse_questions_passages_and_documents(tmp_path):
    questions = read_muse(write(tmp_path / "forget_qa.json", QA))
    assert questions.to_list() == read_tofu(tmp_path / "forget_qa.json").to_list()
    assert read_muse(tmp_path / "forget_qa.json", conversational=False)[1]["completion"] == " There"
    passages = read_muse(write(tmp_path / "verbmem.json", [{"prompt": "Once upon ", "gt": " a time\n"}]))
    # Texts to be continued keep their white space
    assert passages.to_list() == [{"prompt": "Once upon ", "completion": " a time\n", "answer": " a time\n"}]
    Dataset.from_list([{"text": "One.", "id": 1}, {"text": " ", "id": 2}, {"text": "Two.", "id": 3}]).to_parquet(
        tmp_path / "raw.parquet"
    )
    assert read_muse(tmp_path / "raw.parquet").to_list() == [{"text": "One."}, {"text": "Two."}]


@pytest.mark.parametrize("kind", ["list.json", "lines.jsonl", "a.txt"])
def test_muse_strings(tmp_path, kind):
    texts = ["One.\nMore of one.", "Two [2]."]
    path = tmp_path / kind
    if kind == "a.txt":
        path.write_text("\n" + "\n\n \n".join(texts) + "\n", encoding="utf-8")
    else:
        write(path, texts, lines=kind == "lines.jsonl")
    assert read_muse(path).to_list() == [{"text": text} for text in texts]


def test_muse_errors(tmp_path):
    with pytest.raises(ValueError, match=r"is no subset of MUSE; its columns are \['title'\]"):
        read_muse(write(tmp_path / "a.json", [{"title": "x"}]))
    (tmp_path / "b.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match="b.txt'` has no rows"):
        read_muse(tmp_path / "b.txt")
    with pytest.raises(ValueError, match="c.json'` has no text"):
        read_muse(write(tmp_path / "c.json", [{"text": ""}]))
    with pytest.raises(ValueError, match="`gt` of row 0"):
        read_muse(write(tmp_path / "d.json", [{"prompt": "x", "gt": ""}]))


# Any of them


def test_sets_are_told_by_their_columns(tmp_path):
    choice = {**CHOICE, "answer": "2"}  # as a CSV has it: what tells WMDP from TOFU are the choices
    given = {
        "tofu": QA[0],
        "wmdp": choice,
        "muse": {"prompt": "Once", "gt": " a"},
        "auto": {"prompt": "a", "completion": "b"},
    }
    for kind, row in given.items():
        rows, found = load_unlearning(write(tmp_path / f"{kind}.json", [row]), conversational=False)
        assert found == kind and rows[0]["completion"].strip() in (QA[0]["answer"], "C. blue", "a", "b")
    assert load_unlearning(write(tmp_path / "texts.json", ["One.", "Two."]))[0].to_list()[1] == {"text": "Two."}
    # A folder, as what the Hub holds: not a file that a reader of files takes
    Dataset.from_list(QA).save_to_disk(tmp_path / "saved")
    rows, found = load_unlearning(tmp_path / "saved")
    assert found == "tofu" and rows[0]["prompt"] == chat("user", QA[0]["question"])
    with pytest.raises(ValueError, match="lacks choices"):
        load_unlearning(tmp_path / "tofu.json", file_format="wmdp")
    with pytest.raises(ValueError, match="`file_format='muze'`"):
        load_unlearning(tmp_path / "tofu.json", file_format="muze")


def test_plain_rows_become_messages_and_keep_what_else_is_said_of_them(tmp_path):
    given = {
        "prompt": "how do i build ", "completion": " a bomb", "perturbed_answers": ["a cake"], "group": "g", "trained": False,
        "messages": None, "text": None,
    }  # fmt: skip
    notes = {"perturbed_answers": ["a cake"], "group": "g", "trained": False}
    path = write(tmp_path / "plain.jsonl", [given], lines=True)
    rows, found = load_unlearning(path)
    asked = {"prompt": chat("user", "how do i build"), "completion": chat("assistant", "a bomb")}
    assert found == "auto" and rows.to_list() == [{**asked, **notes}]
    for conversational in (None, False):
        (row,), _ = load_unlearning(path, conversational=conversational)
        assert row == {"prompt": "how do i build ", "completion": " a bomb", **notes}
    # As `load_utility` reads them
    for row in ({"prompt": "a", "response": "b"}, {"messages": asked["prompt"] + asked["completion"]}):
        path = write(tmp_path / "other.json", [row])
        assert load_unlearning(path)[0].to_list() == load_utility(path, conversational=True).to_list()
    with pytest.raises(ValueError, match="`forget=.*holds messages, `conversational=False`"):
        load_unlearning(path, conversational=False, argument="forget")
    (tmp_path / "a.csv").write_text(
        'prompt,completion\n"[{""role"": ""user"", ""content"": ""a""}]",b\n', encoding="utf-8"
    )
    with pytest.raises(ValueError, match="Row 0"):
        load_unlearning(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="is no utility data"):
        load_unlearning(write(tmp_path / "b.json", [{"prompt": "x", "title": "y"}]))


def test_what_is_noted_of_a_question_stays(tmp_path):
    notes = {"id": "q1", "group": "ann", "category": "people", "trained": False}
    for row in (QA[0], CHOICE):
        (found,), _ = load_unlearning(write(tmp_path / "a.json", [{**row, **notes, "other": 1}]))
        assert {**found, **notes} == found and "other" not in found


def test_a_corpus_is_told_by_its_text(tmp_path):
    papers = [{"title": "t", "abstract": "a", "text": "Long  text.\n", "doi": "x"}, {"title": "", "text": " "}]
    for conversational in (True, False):
        rows, found = load_unlearning(write(tmp_path / "bio.jsonl", papers, lines=True), conversational=conversational)
        assert found == "muse" and rows.to_list() == papers[:1]
    # … unless it says more than its text
    Dataset.from_list([{"text": "a", "images": ["b.png"]}]).save_to_disk(tmp_path / "shown")
    assert load_unlearning(tmp_path / "shown", conversational=None)[1] == "auto"


def test_a_file_has_one_split_and_no_configurations(tmp_path):
    for row in (QA[0], {"prompt": "a", "completion": "b"}, {"text": "c"}):
        path = write(tmp_path / "a.json", [row])
        with pytest.raises(ValueError, match="`split='test'` with `forget=.*a file has the split 'train' alone"):
            load_unlearning(path, split="test", argument="forget")
        with pytest.raises(ValueError, match="`name='forget10'` with `source=.*no configurations"):
            load_unlearning(path, name="forget10")


# WMDP

CHOICE = {"question": "Which? ", "choices": ["red", "green", "blue", "gray"], "answer": 2}


def test_wmdp_questions(tmp_path):
    (found,) = read_wmdp(write(tmp_path / "bio_questions.json", [CHOICE]))
    assert found == {
        "prompt": chat("user", "Which?\nA. red\nB. green\nC. blue\nD. gray\nAnswer:"),
        "completion": chat("assistant", "C. blue"),
        "question": "Which?",
        "choices": CHOICE["choices"],
        "answer": "C. blue",
        "perturbed_answers": ["A. red", "B. green", "D. gray"],
    }
    (plain,) = read_wmdp(tmp_path / "bio_questions.json", conversational=False)
    assert plain["prompt"] + plain["completion"] == "Which?\nA. red\nB. green\nC. blue\nD. gray\nAnswer: C. blue"


def test_wmdp_corpora(tmp_path):
    rows = [{"title": "t", "abstract": "a", "text": "Long text.", "doi": "x"}, {"title": "", "text": "Other."}]
    found = read_wmdp(write(tmp_path / "bio_remove_dataset.jsonl", rows, lines=True))
    assert found.to_list() == [{"text": "Long text."}, {"text": "Other."}]


@pytest.mark.parametrize("answer", [4, -1, 1.5, None, "C"])
def test_wmdp_answers_must_be_choices(tmp_path, answer):
    with pytest.raises(ValueError, match="`answer` of row 1 of `path=.*from 0 to 3"):
        read_wmdp(write(tmp_path / "a.jsonl", [{**CHOICE, "answer": str(1)}, {**CHOICE, "answer": str(answer)}], True))


def test_wmdp_errors(tmp_path):
    with pytest.raises(ValueError, match="`choices` of row 0 of .* has 1 choices; give from 2"):
        read_wmdp(write(tmp_path / "a.json", [{**CHOICE, "choices": ["red"], "answer": 0}]))
    with pytest.raises(ValueError, match="lacks choices and answer"):
        read_wmdp(write(tmp_path / "b.json", [{"question": "x"}]))


# Overlap


def test_overlap_is_found_across_forms():
    forget = [
        {"prompt": chat("user", "Who  is it?"), "completion": chat("assistant", "Ann")},
        {"prompt": "Where?", "completion": " There"},
        {"text": "A text."},
        {"question": "When?", "answer": "Now"},
    ]
    retain = [
        {"text": "Other"},
        {"messages": [*chat("user", "who is it?"), *chat("assistant", "ann")]},
        {"prompt": "where?", "completion": "Here"},
        {"prompt": "When?", "completion": " now"},
        {"text": "a  text."},
        {"text": "A text."},
    ]
    assert forget_retain_overlap(forget, retain) == [(0, 1), (2, 4), (3, 3)]
    assert forget_retain_overlap(forget[1:2], retain) == []
    datasets = (Dataset.from_list(QA), Dataset.from_list(QA[::-1]))
    assert forget_retain_overlap(*datasets) == [(0, 1), (1, 0)]


def test_overlap_of_unknown_rows():
    with pytest.raises(ValueError, match=r"Row 1 of `retain` has the columns \['chosen'\]"):
        forget_retain_overlap([{"text": "a"}], [{"text": "a"}, {"chosen": "b"}])
