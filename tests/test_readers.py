import csv
import json
import logging

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from hf_robust.data import (
    load_preferences,
    load_utility,
    read_advbench,
    read_harmbench,
    read_jailbreakbench,
    split_by_behavior,
)

SAFE = "Sorry, I can't do that."


def write_csv(path, header, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def chat(role, content):
    return [{"role": role, "content": content}]


@pytest.fixture
def harmbench(tmp_path):
    """Harmless rows in HarmBench's format: (behaviours, targets, safe answers)."""
    folder = tmp_path / "a [1]"  # brackets are patterns to `data_files`
    folder.mkdir()
    behaviors = write_csv(
        folder / "tea_behaviors.csv",
        ["Behavior", "Category", "Tags", "ContextString", "BehaviorID"],
        [
            ["Brew tea, then spill it", "", "", "", "tea_1"],
            ["Stir it loudly", "", "", "A cup.\nA spoon.", "tea_2"],
            ["NA", "", "", "", "007"],
        ],
    )
    targets = folder / "tea_targets.json"
    targets.write_text(json.dumps({"tea_1": ["Sure, brew", "Here is tea"], "tea_2": ["To stir"], "007": "Sure, NA"}))
    safe = write_csv(
        folder / "tea_safe.csv", ["Behavior", "Safe_Response"], [["Stir it loudly", "No"], ["NA", "Rather not"]]
    )
    return behaviors, targets, safe


def test_images_of_utility_rows_stay(tmp_path):
    rows = [{"prompt": chat("user", "a"), "completion": chat("assistant", "b"), "images": ["x.png"], "id": 3}]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (found,) = load_utility(tmp_path / "rows.parquet")
    assert found["images"] == ["x.png"] and "id" not in found


def test_harmbench_rows(harmbench):
    dataset = read_harmbench(*harmbench[:2])
    assert dataset.column_names == ["prompt", "chosen", "rejected", "behavior_id"]
    assert list(dataset["behavior_id"]) == ["tea_1", "tea_1", "tea_2", "007"]
    assert dataset[0] == {
        "prompt": chat("user", "Brew tea, then spill it"),
        "chosen": chat("assistant", SAFE),
        "rejected": chat("assistant", "Sure, brew"),
        "behavior_id": "tea_1",
    }
    assert dataset[2]["prompt"] == chat("user", "A cup.\nA spoon.\n\n---\n\nStir it loudly")
    assert dataset[3]["prompt"] == chat("user", "NA")


def test_harmbench_plain_safe_answers_and_max_targets(harmbench, caplog):
    with caplog.at_level(logging.WARNING, "hf_robust"):
        dataset = read_harmbench(*harmbench, conversational=False, max_targets=1, safe_response="No way")
    assert dataset.to_list() == [
        {"prompt": "Brew tea, then spill it", "chosen": " No way", "rejected": " Sure, brew", "behavior_id": "tea_1"},
        {
            "prompt": "A cup.\nA spoon.\n\n---\n\nStir it loudly",
            "chosen": " No",
            "rejected": " To stir",
            "behavior_id": "tea_2",
        },
        {"prompt": "NA", "chosen": " Rather not", "rejected": " Sure, NA", "behavior_id": "007"},
    ]
    assert "1 of the 3 behaviours" in caplog.text


def test_preferences_recognise_harmbench_and_its_targets(harmbench, tmp_path):
    behaviors, targets, safe = harmbench
    expected = read_harmbench(behaviors, targets).to_list()
    assert load_preferences(behaviors).to_list() == expected
    assert load_preferences(str(behaviors), max_targets=1, safe_responses=safe)[1]["chosen"] == chat("assistant", "No")
    stream = load_preferences(behaviors, streaming=True)
    assert isinstance(stream, IterableDataset) and list(stream) == expected
    assert load_preferences(behaviors, conversational=False)[0]["prompt"] == "Brew tea, then spill it"

    moved = targets.rename(tmp_path / "elsewhere.json")
    with pytest.raises(FileNotFoundError, match=r"`adv=.*tea_targets\.json.*give its path as `targets`"):
        load_preferences(behaviors, argument="adv")
    assert load_preferences(behaviors, targets=moved).to_list() == expected
    with pytest.raises(FileNotFoundError, match="`targets=.*nowhere.json'` is not a file"):
        load_preferences(behaviors, targets=tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="`split='test'`"):
        load_preferences(behaviors, split="test")


def test_blank_targets_are_skipped(harmbench, caplog):
    harmbench[1].write_text(json.dumps({"tea_1": ["Sure", " ", "Here"], "tea_2": "To stir", "007": "Sure"}))
    assert list(read_harmbench(*harmbench[:2])["behavior_id"]) == ["tea_1", "tea_1", "tea_2", "007"]
    assert "1 blank targets" in caplog.text and "['tea_1']" in caplog.text


def test_advbench_in_both_formats(harmbench, tmp_path):
    assert read_advbench(*harmbench[:2]).to_list() == read_harmbench(*harmbench[:2]).to_list()
    path = write_csv(tmp_path / "adv.csv", ["goal", "target"], [["Fold a hat", "Sure, fold"], ["Hum", "Sure, hum"]])
    dataset = read_advbench(path)
    assert dataset[1] == {
        "prompt": chat("user", "Hum"),
        "chosen": chat("assistant", SAFE),
        "rejected": chat("assistant", "Sure, hum"),
        "behavior_id": "advbench_2",
    }
    assert load_preferences(path).to_list() == dataset.to_list()


@pytest.mark.parametrize("first", ["Index", ""])
def test_jailbreakbench(tmp_path, first, caplog):
    header = [first, "Goal", "Target", "Behavior", "Category", "Source"]
    rows = [[4, "Fold a hat", "Sure, fold", "Folding", "Paper", "Original"], [5, "Hum", "Sure, hum", "B", "C", "S"]]
    path = write_csv(tmp_path / "harmful-behaviors.csv", header, rows)
    dataset = read_jailbreakbench(path)
    assert list(dataset["behavior_id"]) == (["jbb_4", "jbb_5"] if first else ["jbb_1", "jbb_2"])
    assert dataset[0]["rejected"] == chat("assistant", "Sure, fold")
    assert load_preferences(path).to_list() == dataset.to_list()
    # From the Hub the same columns come as a dataset, the index as a number.
    Dataset.from_list([dict(zip(header, row, strict=True)) for row in rows]).to_parquet(tmp_path / "jbb.parquet")
    assert load_preferences(tmp_path / "jbb.parquet").to_list() == dataset.to_list()
    assert not caplog.records
    read_jailbreakbench(path.rename(tmp_path / "benign-behaviors.csv"))
    assert "over-refusal" in caplog.text


def test_bad_behaviour_files(harmbench, tmp_path):
    behaviors, targets, safe = harmbench
    with pytest.raises(FileNotFoundError, match="`behaviors_csv=.*none.csv'` is not a file"):
        read_harmbench(tmp_path / "none.csv", targets)
    with pytest.raises(ValueError, match=r"`behaviors_csv=.*lacks the columns \['Behavior', 'BehaviorID'\]"):
        read_harmbench(write_csv(tmp_path / "x.csv", ["a"], [["b"]]), targets)
    with pytest.raises(ValueError, match="has a header but no row"):
        read_harmbench(write_csv(tmp_path / "y.csv", ["Behavior", "BehaviorID"], []), targets)
    with pytest.raises(ValueError, match="`Behavior` of row 1 of .* is empty"):
        read_harmbench(write_csv(tmp_path / "z.csv", ["Behavior", "BehaviorID"], [["a", "1"], [" ", "2"]]), targets)
    with pytest.raises(ValueError, match=r"`BehaviorID` \['1'\] of .* several rows"):
        read_harmbench(write_csv(tmp_path / "t.csv", ["Behavior", "BehaviorID"], [["a", "1"], ["b", "1"]]), targets)
    unquoted = tmp_path / "u.csv"
    unquoted.write_text("goal,target\nFold, then hum,Sure\n")
    with pytest.raises(ValueError, match="Row 0 of .* too many cells"):
        read_advbench(unquoted)
    with pytest.raises(ValueError, match="`max_targets=0`"):
        read_harmbench(behaviors, targets, max_targets=0)
    with pytest.raises(ValueError, match="`safe_response=' '`"):
        read_harmbench(behaviors, targets, safe_response=" ")
    with pytest.raises(ValueError, match="answers none of the behaviours"):
        read_harmbench(behaviors, targets, write_csv(tmp_path / "s.csv", ["Behavior", "Safe_Response"], [["q", "r"]]))
    for content, match in [
        ("{", "is not JSON"),
        ("[]", "must hold an object"),
        ('{"tea_1": [""]}', "The target of 'tea_1' in `targets_json=.* is empty"),
        ('{"tea_1": [3]}', "The target of 'tea_1' in `targets_json=.*, not text or a list of texts"),
        ('{"tea_1": "a"}', r"has no target for 2 of the 3 behaviours .*\['tea_2', '007'\]"),
    ]:
        targets.write_text(content)
        with pytest.raises(ValueError, match=match):
            read_harmbench(behaviors, targets)


PLAIN = [{"prompt": "Hum?", "chosen": "No", "rejected": "None"}, {"prompt": "Sing?", "chosen": "42", "rejected": "la"}]
CHAT = [
    {"prompt": chat("user", r["prompt"]), **{c: chat("assistant", r[c]) for c in ("chosen", "rejected")}} for r in PLAIN
]


def write(dataset, path):
    if path.suffix == ".csv":
        rows = [[v if isinstance(v, str) else json.dumps(v) for v in row.values()] for row in dataset]
        return write_csv(path, dataset.column_names, rows)
    if path.suffix == ".parquet":
        dataset.to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(dataset)))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, dataset)))
    else:
        path.mkdir()
        write(dataset, path / "train.jsonl")
    return path


@pytest.mark.parametrize("rows", [PLAIN, CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("kind", ["p.csv", "p.json", "p.jsonl", "p.parquet", "folder"])
def test_preferences_from_files(tmp_path, kind, rows):
    path = write(Dataset.from_list(rows), tmp_path / kind)
    dataset = load_preferences(path)
    assert isinstance(dataset, Dataset) and dataset.to_list() == rows
    stream = load_preferences(str(path), streaming=True)
    assert isinstance(stream, IterableDataset) and list(stream) == rows
    assert load_preferences(path, conversational=True).to_list() == CHAT


def test_saved_datasets_and_splits(tmp_path):
    saved = Dataset.from_list(PLAIN)
    saved.save_to_disk(tmp_path / "one")
    DatasetDict(train=saved, test=saved.select([1])).save_to_disk(tmp_path / "two")
    assert load_preferences(tmp_path / "one").to_list() == PLAIN
    assert load_preferences(tmp_path / "two", split="test").to_list() == PLAIN[1:]
    assert list(load_preferences(tmp_path / "two", streaming=True)) == PLAIN
    with pytest.raises(ValueError, match="`split='tests'` is unknown.*Did you mean 'test'"):
        load_preferences(tmp_path / "two", split="tests")
    with pytest.raises(ValueError, match=r"`adv=.*`split='valid'`.*\['train'\]"):
        load_preferences(write(saved, tmp_path / "p.csv"), split="valid", argument="adv")
    assert load_preferences(tmp_path / "p.csv", split="train[1:]").to_list() == PLAIN[1:]


def test_preferences_with_implicit_or_repeated_prompt(tmp_path):
    whole = [{c: row["prompt"] + row[c] for c in ("chosen", "rejected")} for row in CHAT]
    assert load_preferences(write(Dataset.from_list(whole), tmp_path / "a.jsonl")).to_list() == whole
    repeated = [{"prompt": p["prompt"], **w, "messages": w["chosen"]} for p, w in zip(PLAIN, whole, strict=True)]
    assert load_preferences(write(Dataset.from_list(repeated), tmp_path / "b.jsonl")).to_list() == whole


def test_other_columns_are_dropped(tmp_path):
    rows = [{**row, "behavior_id": "x", "messages": chat("user", "q"), "score": 1.0} for row in PLAIN]
    dataset = load_preferences(write(Dataset.from_list(rows), tmp_path / "a.parquet"))
    assert set(dataset.column_names) == {"prompt", "chosen", "rejected", "behavior_id"}


@pytest.mark.parametrize("load", [load_preferences, load_utility])
def test_bad_sources(tmp_path, load):
    with pytest.raises(FileNotFoundError, match="`adv='nowhere.jsonl'` does not exist. Give a Hub id"):
        load("nowhere.jsonl", argument="adv")
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(ValueError, match=r"unknown kind \('.txt'\)"):
        load(tmp_path / "x.txt")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        load(tmp_path / "empty.csv")
    with pytest.raises(ValueError, match="h.csv.*no data.*Check that it has rows"):
        load(write_csv(tmp_path / "h.csv", ["prompt", "completion", "chosen", "rejected"], []))
    with pytest.raises(ValueError, match="`source='no-one/has-this'` could not be loaded"):
        load("no-one/has-this")


def test_bad_preferences(tmp_path):
    with pytest.raises(ValueError, match="lacks chosen and rejected; its columns are"):
        load_preferences(write_csv(tmp_path / "a.csv", ["prompt", "response"], [["a", "b"]]))
    rows = [[r["prompt"], r["chosen"], ""] for r in PLAIN]
    with pytest.raises(ValueError, match="`rejected` of row 0 of `adv=.*` is empty"):
        load_preferences(write_csv(tmp_path / "b.csv", ["prompt", "chosen", "rejected"], rows), argument="adv")
    with pytest.raises(ValueError, match="holds messages, `conversational=False`"):
        load_preferences(write(Dataset.from_list(CHAT), tmp_path / "c.jsonl"), conversational=False)
    implicit = [{"chosen": "a b", "rejected": "a c"}]
    with pytest.raises(ValueError, match="needs a `prompt` column"):
        load_preferences(write(Dataset.from_list(implicit), tmp_path / "d.jsonl"), conversational=True)
    broken = [[json.dumps(chat("user", "q")), json.dumps(chat("assistant", "a")), json.dumps(chat("assistant", "b"))]]
    broken.append(['[{"role": ', *broken[0][1:]])
    with pytest.raises(ValueError, match="`prompt` of row 1 of .* is not JSON"):
        load_preferences(write_csv(tmp_path / "e.csv", ["prompt", "chosen", "rejected"], broken))


def test_utility_response_is_renamed(tmp_path, caplog):
    path = write_csv(tmp_path / "qa.csv", ["prompt", "response"], [["Where?", "Here, I think"], ["How many?", "42"]])
    with caplog.at_level(logging.INFO, "hf_robust"):
        dataset = load_utility(path)
    assert dataset.to_list() == [
        {"prompt": "Where?", "completion": "Here, I think"},
        {"prompt": "How many?", "completion": "42"},
    ]
    assert "renamed to `completion`" in caplog.text
    assert list(load_utility(path, streaming=True)) == dataset.to_list()
    expected = {"prompt": chat("user", "How many?"), "completion": chat("assistant", "42")}
    assert load_utility(path, conversational=True)[1] == expected
    assert list(load_utility(path, conversational=True, streaming=True))[1] == expected


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": chat("user", "q") + chat("assistant", "a")}],
        [{"prompt": chat("user", "q"), "completion": chat("assistant", "a")}],
        [{"text": "A text."}],
    ],
    ids=["messages", "prompt_completion", "text"],
)
@pytest.mark.parametrize("kind", ["u.csv", "u.jsonl", "u.parquet"])
def test_utility_formats(tmp_path, kind, rows):
    path = write(Dataset.from_list([{**row, "other": "x"} for row in rows]), tmp_path / kind)
    assert load_utility(path).to_list() == rows
    assert list(load_utility(path, streaming=True)) == rows


def test_bad_utility(tmp_path, harmbench):
    for path in (harmbench[0], write(Dataset.from_list([{"chosen": "a", "rejected": "b"}]), tmp_path / "a.jsonl")):
        with pytest.raises(ValueError, match="`train=.*is no utility data.*adversarial rows"):
            load_utility(path, argument="train")
    with pytest.raises(ValueError, match="`completion` of row 1 of .* is empty"):
        load_utility(write_csv(tmp_path / "b.csv", ["prompt", "completion"], [["a", "b"], ["c", ""]]))
    with pytest.raises(ValueError, match="`conversational=True` needs"):
        load_utility(write(Dataset.from_list([{"text": "a"}]), tmp_path / "c.jsonl"), conversational=True)
    with pytest.raises(ValueError, match="Row 0 of .* expected text"):
        load_utility(write(Dataset.from_list([{"text": chat("user", "a")}]), tmp_path / "d.jsonl"))


def behavior_rows():
    return Dataset.from_list(
        [
            {"prompt": chat("user", f"{'Hum' if target else 'hum '} {i}"), "behavior_id": None, **answers}
            for i in range(10)
            for target in range(3)
            for answers in [{"chosen": chat("assistant", "No"), "rejected": chat("assistant", f"Sure {target}")}]
        ]
    )


def test_split_keeps_behaviours_apart():
    dataset = behavior_rows()
    train, held = split_by_behavior(dataset, 0.3, seed=1)
    assert len(train) == 21 and len(held) == 9

    def behaviors(rows):
        return {row["prompt"][0]["content"].split()[-1] for row in rows}

    assert len(behaviors(held)) == 3 and not behaviors(held) & behaviors(train)
    again = split_by_behavior(dataset, 3, seed=1)
    assert [side.to_list() for side in again] == [train.to_list(), held.to_list()]
    assert split_by_behavior(dataset, 3, seed=2)[1].to_list() != held.to_list()


def test_split_joins_rows_by_prompt_and_by_id():
    prompts, ids = ["a", "b", "c", "b", "d"], ["1", "2", "3", "1", None]  # a and b are one through row 3
    dataset = Dataset.from_dict({"prompt": prompts, "behavior_id": ids, "chosen": ["no"] * 5, "rejected": [" yes"] * 5})
    for seed in range(10):
        train, held = split_by_behavior(dataset, 1, seed)
        assert {"".join(sorted(side["prompt"])) for side in (train, held)} in (
            {"abb", "cd"}, {"c", "abbd"}, {"d", "abbc"},
        )  # fmt: skip


@pytest.mark.parametrize("value", [0, 10, -1, 0.0, 1.0, 1.5, True, "half", float("nan")])
def test_split_refuses_an_empty_side(value):
    with pytest.raises(ValueError, match="`fraction_or_count=.*from 1 to 9"):
        split_by_behavior(behavior_rows(), value)


def test_split_of_a_stream_is_refused():
    with pytest.raises(TypeError, match="`dataset` is an `IterableDataset`"):
        split_by_behavior(behavior_rows().to_iterable_dataset(), 1)
