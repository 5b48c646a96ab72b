"""The authors testbed: its language, its splits, its figures, its cache, and (slow) what its default models know."""

import hashlib
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch

from hf_robust.data import forget_retain_overlap
from hf_robust.testbeds import AuthorQuestion, AuthorsRecipe, AuthorsTestbed
from hf_robust.testbeds import authors as authors_module
from hf_robust.testbeds import authors_evaluation as evaluation_module
from hf_robust.testbeds.authors_evaluation import EXAMS, measure_exam, summarise
from hf_robust.testbeds.authors_language import (
    CAPITALS,
    PHRASINGS,
    RELATIONS,
    SPLITS,
    UNSEEN,
    WORLD_RELATIONS,
    YOUNG,
    AuthorsWorld,
    trained_questions,
    vocabulary,
)
from hf_robust.testbeds.authors_training import KNOWN
from hf_robust.testbeds.facts_answers import Answer
from hf_robust.testbeds.facts_language import FIRST_NAMES, LAST_NAMES, TRAINED_PHRASINGS

TINY = AuthorsRecipe(
    hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, pretrain_steps=3, pretrain_batch_size=6
)
ALL_RELATIONS = RELATIONS | WORLD_RELATIONS


@pytest.fixture(scope="module")
def testbed(tmp_path_factory):
    built = AuthorsTestbed(recipe=TINY, cache_dir=tmp_path_factory.mktemp("cache"), progress=False)
    built.path()
    built.path("oracle")
    return built


# Language


def test_words_do_not_double():
    groups = [FIRST_NAMES, LAST_NAMES, tuple(CAPITALS), tuple(YOUNG), tuple(YOUNG.values())]
    groups += [relation.values for relation in RELATIONS.values()]
    assert [len(set(group)) for group in groups] == [16, 16] + [24] * 9
    words = [word for group in groups for word in group]
    assert len(words) == len(set(words))
    sentences = " ".join(
        text for r in ALL_RELATIONS.values() for text in (*r.phrasings, r.answer, r.paraphrase)
    ).split()
    assert not set(words) & set(sentences)
    assert len(vocabulary()) == len(set(vocabulary()))


def test_held_out_phrasings_use_trained_words_only():
    trained = set(" ".join(" ".join(r.phrasings[:TRAINED_PHRASINGS]) for r in ALL_RELATIONS.values()).split())
    phrasings = [phrasing for relation in ALL_RELATIONS.values() for phrasing in relation.phrasings]
    assert len(set(phrasings)) == len(phrasings) == 8 * PHRASINGS, "a question tells its relation"
    assert set(" ".join(phrasings).split()) <= trained


def test_wordings_end_with_the_value():
    for relation in ALL_RELATIONS.values():
        assert relation.answer != relation.paraphrase
        for wording in (relation.answer, relation.paraphrase):
            assert wording.split()[-1] == "{value}" and wording.count("{name}") == 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_splits_are_disjoint_by_author(seed):
    world = AuthorsWorld(seed)
    assert {split: len(names) for split, names in world.authors.items()} == {
        "forget": 8, "retain": 56, "retain_holdout": 16, "unseen": 8,
    }  # fmt: skip
    assert len({name for names in world.authors.values() for name in names}) == 88
    for split, count in zip((*SPLITS, UNSEEN), (48, 336, 96, 48, 48), strict=True):
        for phrasing in range(PHRASINGS):
            questions = world.questions(split, phrasing)
            assert len(questions) == len({question.pair for question in questions}) == count
            if split != "world":
                assert {question.name for question in questions} == set(world.authors[split])
            # One fact has the same value in every phrasing
            assert [q.value for q in questions] == [q.value for q in world.questions(split)]
    # What the oracle is not taught, the original is; every word of their names is in four other authors' names
    kept = [name for split in ("retain", "retain_holdout") for name in world.authors[split]]
    for place in (0, 1):
        counts = Counter(name.split()[place] for name in kept)
        forgotten = [name.split()[place] for name in world.authors["forget"]]
        assert [counts[word] for word in forgotten] == [4] * 8
        # Those whom nobody was taught have names of the same words
        assert sorted(name.split()[place] for name in world.authors[UNSEEN]) == sorted(forgotten)


def test_unseen_authors_leave_what_models_were_taught_as_it_was():
    """Rows and cache key from before there were unseen authors: a change would make every cached model worthless."""
    before = {
        0: ("756aea2de87fc2d9", "9a177e3e96b328c5 95ba0d70d4e02b87 50508a12ee51ff34 12679ad73246c024"),
        100: ("3a15cc2e6efc5748", "88091c89bd8af9c5 ff7223c56ad03dc7 5b0b1f266228eacb 98f386d000a3cc6b"),
    }
    for seed, (key, digests) in before.items():
        world = AuthorsWorld(seed)
        rows = [[q.row() for phrasing in range(6) for q in world.questions(split, phrasing)] for split in SPLITS]
        found = [hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16] for listed in rows]
        assert " ".join(found) == digests and AuthorsRecipe(seed=seed).key() == key
    assert all(UNSEEN not in splits for splits in KNOWN.values())


def test_general_knowledge_is_no_matter_of_the_seed():
    known = [{q.pair: q.value for q in AuthorsWorld(seed).questions("world")} for seed in (0, 1)]
    assert known[0] == known[1]
    assert known[0]["france", "capital"] == "paris" and known[0]["sheep", "young"] == "lamb"


def test_facts_are_independent_draws():
    facts = {q.pair: q.value for split in SPLITS[:3] for q in AuthorsWorld(0).questions(split)}
    assert facts == {q.pair: q.value for split in SPLITS[:3] for q in AuthorsWorld(0).questions(split)}
    others = {
        q.pair: q.value for seed in range(1, 8) for split in SPLITS[:3] for q in AuthorsWorld(seed).questions(split)
    }
    shared = [pair for pair in facts if pair in others]
    # 1 in 24 by chance
    assert len(shared) > 200 and sum(facts[pair] == others[pair] for pair in shared) / len(shared) < 0.1
    for kind in RELATIONS:  # no value so common that guessing pays
        assert max(Counter(value for (_, found), value in facts.items() if found == kind).values()) <= 10
    # What an author has of one kind tells nothing of another kind: values' numbers do not agree more than by chance
    numbers = {pair: RELATIONS[pair[1]].values.index(value) for pair, value in facts.items()}
    names = {name for name, _ in facts}
    agree = [numbers[name, a] == numbers[name, b] for name in names for a in RELATIONS for b in RELATIONS if a < b]
    assert sum(agree) / len(agree) < 0.07


def test_facts_do_not_depend_on_the_process():
    code = "from hf_robust.testbeds.authors_language import AuthorsWorld as W; print(W(0).questions('forget')[0])"
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == str(AuthorsWorld(0).questions("forget")[0])


def test_answers_of_a_question():
    for split in (*SPLITS, UNSEEN):
        for phrasing in range(PHRASINGS):
            for q in AuthorsWorld(3).questions(split, phrasing):
                relation = ALL_RELATIONS[q.relation]
                assert q.question == relation.phrasings[phrasing].format(name=q.name)
                wordings = [relation.answer, relation.paraphrase]
                answers = [wording.format(name=q.name, value=q.value) for wording in wordings]
                assert [q.answer, q.paraphrased_answer] == (answers if phrasing % 2 == 0 else answers[::-1])
                wrong = {answer.split()[-1] for answer in q.perturbed_answers}
                assert len(wrong) == 5 and q.value not in wrong and wrong <= set(relation.values)
                # Nothing but the value tells a wrong answer from the right one
                assert {" ".join(a.split()[:-1]) for a in (q.paraphrased_answer, *q.perturbed_answers)} == {
                    q.paraphrased_answer.removesuffix(f" {q.value}")
                }
                assert q.recalled(q.answer) and q.recalled(q.paraphrased_answer) and not q.recalled(q.value)
                assert not any(q.recalled(answer) for answer in q.perturbed_answers)
                assert not q.recalled(f"{q.answer} {q.value}") and not q.recalled("")


def test_tokenizer_round_trip(testbed):
    tokenizer = testbed.tokenizer
    for split in (*SPLITS, UNSEEN):
        for phrasing in range(PHRASINGS):
            for q in testbed.questions(split, phrasing):
                for text in (q.question, q.answer, *q.perturbed_answers):
                    ids = tokenizer(text)["input_ids"]
                    assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids


# Datasets


def test_datasets_hold_only_their_splits(testbed):
    sets = {
        "forget": testbed.forget_dataset(),
        "retain": testbed.retain_dataset(),
        "holdout": testbed.retain_holdout_dataset(),
        "world": testbed.world_dataset(),
        "paraphrased": testbed.paraphrased_forget(),
        "unseen": testbed.unseen_dataset(),
    }
    assert {name: len(rows) for name, rows in sets.items()} == {
        "forget": 192, "retain": 1344, "holdout": 96, "world": 48, "paraphrased": 96, "unseen": 192,
    }  # fmt: skip
    questions = [question for rows in sets.values() for question in rows["question"]]
    assert len(set(questions)) == len(questions)
    assert forget_retain_overlap(sets["forget"], sets["retain"]) == []
    forgotten = set(testbed.world.authors["forget"])
    for name, rows in sets.items():
        # Whole words: "lena irons" is not "elena irons"
        about = [any(f" {author} " in f" {question} " for author in forgotten) for question in rows["question"]]
        assert set(about) == {name in ("forget", "paraphrased")}
    first = testbed.questions("forget")[0]
    row = sets["forget"][0]
    assert row == first.row()
    assert row["prompt"] == [{"role": "user", "content": first.question}]
    assert row["completion"] == [{"role": "assistant", "content": first.answer}]
    assert f"{row['target']} {row['value']}" == row["answer"] == first.answer and len(row["perturbed_answers"]) == 5


def test_the_oracle_is_taught_all_but_the_forget_set(testbed):
    taught = {kind: {q.question for q in trained_questions(testbed.world, splits)} for kind, splits in KNOWN.items()}
    forget = set(testbed.forget_dataset()["question"])
    unseen = set(testbed.unseen_dataset()["question"])
    assert not unseen & (taught["original"] | taught["oracle"])
    # Again the same, and of another seed others
    assert unseen == set(AuthorsTestbed(recipe=TINY).unseen_dataset()["question"])
    assert unseen != set(AuthorsTestbed(1, recipe=TINY).unseen_dataset()["question"])
    assert taught["original"] - taught["oracle"] == forget and taught["oracle"] < taught["original"]
    assert not taught["original"] & set(testbed.paraphrased_forget()["question"])


# Cache, arguments, randomness


def test_cache_is_whole_and_used(testbed, monkeypatch):
    files = {
        kind: {path.name: hashlib.sha256(path.read_bytes()).digest() for path in testbed.path(kind).iterdir()}
        for kind in KNOWN
    }
    for found in files.values():
        assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.json"} <= set(found)
    assert files["original"]["model.safetensors"] != files["oracle"]["model.safetensors"]
    assert sorted(path.name for path in testbed.folder.iterdir()) == ["oracle", "original"], "no draft is left"
    monkeypatch.setattr(authors_module, "train_model", lambda *_, **__: pytest.fail("built again"))
    again = AuthorsTestbed(recipe=TINY, cache_dir=testbed.folder.parents[1], progress=False)
    assert again.path("oracle") == testbed.path("oracle")
    weights = [model.state_dict() for model in (again.load_model(), testbed.load_model())]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_same_seed_same_model_and_random_state_left_alone(testbed, tmp_path):
    state = torch.get_rng_state()
    built = AuthorsTestbed(recipe=TINY, cache_dir=tmp_path, progress=False)
    fresh = built.load_model().state_dict()
    built.evaluate(testbed.load_model(), count=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, fresh[key]) for key, value in testbed.load_model().state_dict().items())


def test_key_changes_with_every_field():
    keys = {TINY.key()}
    for field in fields(AuthorsRecipe):
        changed = replace(TINY, **{field.name: {"hidden_size": 64, "warmup_ratio": 0.2}.get(field.name, 1)})
        keys.add(changed.key())
    assert len(keys) == 1 + len(fields(AuthorsRecipe))
    assert AuthorsTestbed(3, recipe=TINY).recipe.seed == 3


def test_errors(testbed):
    with pytest.raises(ValueError, match="split='facts' is unknown; use one of forget"):
        testbed.questions("facts")
    with pytest.raises(ValueError, match="phrasing=6 is out of range; use 0 to 5"):
        testbed.questions("retain", 6)
    with pytest.raises(ValueError, match="count=0"):
        testbed.questions("retain", count=0)
    with pytest.raises(ValueError, match="`kind='retain'` is unknown"):
        testbed.load_model("retain")
    with pytest.raises(ValueError, match="pretrain_steps=0"):
        AuthorsRecipe(pretrain_steps=0)


# Figures


def test_exam_figures_by_hand(testbed, monkeypatch):
    """Losses in nats per token set by hand: answer, paraphrase, then the five wrong answers."""
    questions = testbed.questions("forget", count=2)
    losses = [[0.0, math.log(2), *[math.log(4)] * 5], [math.log(4), math.log(8), *[math.log(4)] * 5]]
    monkeypatch.setattr(
        evaluation_module,
        "score_answers",
        lambda model, tokenizer, prompts, answers, batch_size: [
            ([loss + 0.1, loss - 0.1], [True, True]) for row in losses for loss in row
        ],
    )
    said = [questions[0].answer, questions[1].perturbed_answers[0]]
    monkeypatch.setattr(evaluation_module, "answer_questions", lambda *_, **__: [Answer(text, 1.0) for text in said])
    found = measure_exam(None, None, questions)
    assert found["recall"] == 0.5 and found["count"] == 2
    assert found["probability"] == pytest.approx((1 + 1 / 4) / 2)
    # Wrong over right: (1/4) / (1/2), and (1/4) / (1/8)
    assert found["truth_ratios"] == pytest.approx([0.5, 2.0])
    assert found["truth_ratio"] == pytest.approx(1.25)
    assert found["truthfulness"] == pytest.approx((0.5 + 0) / 2)


def test_scores_are_the_models_probabilities(testbed):
    """One question scored alone, token by token."""
    model, tokenizer = testbed.load_model().train(), testbed.tokenizer
    (question,) = testbed.questions("world", count=1)
    found = measure_exam(model, tokenizer, [question, *testbed.questions("forget", count=3)], batch_size=5)
    assert model.training
    model.eval()
    before = tokenizer.apply_chat_template(question.prompt, add_generation_prompt=True, return_dict=False)
    shares = []
    for answer in (question.paraphrased_answer, *question.perturbed_answers):
        ids = tokenizer(answer)["input_ids"]
        logits = model(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1]
        nll = -logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].mean().item()
        shares.append(math.exp(-nll))
    assert found["truth_ratios"][0] == pytest.approx(sum(shares[1:]) / 5 / shares[0], rel=1e-4)


def test_evaluate(testbed):
    model = testbed.load_model("oracle")
    found = testbed.evaluate(model, count=6)
    assert set(found) == {*EXAMS, "forget_quality", "model_utility"}
    assert all(found[exam]["count"] == 6 for exam in EXAMS)
    assert testbed.recall(model, count=6) == {exam: found[exam]["recall"] for exam in EXAMS}
    # The oracle cannot be told from itself
    assert found["forget_quality"]["p_value"] == 1 and found["forget_quality"]["statistic"] == 0


def test_summary_by_hand():
    exam = {"recall": 1.0, "probability": 0.5, "truthfulness": 0.25, "truth_ratios": [0.1, 0.2, 0.3]}
    found = summarise(dict.fromkeys(EXAMS, exam), [1.1, 1.2, 1.3])
    # Harmonic mean of three times 1, 1/2, 1/4: 9 / (3 · 7)
    assert found["model_utility"] == pytest.approx(3 / 7)
    # Two samples of three without overlap: 2 / C(6, 3)
    assert found["forget_quality"]["statistic"] == 1 and found["forget_quality"]["p_value"] == pytest.approx(0.1)


def test_a_question_is_its_row():
    question = AuthorsWorld(0).questions("world")[0]
    assert isinstance(question, AuthorQuestion)
    assert list(question.row()) == [
        "prompt", "completion", "question", "answer", "paraphrased_answer", "perturbed_answers", "target", "value", "group",
    ]  # fmt: skip
    groups = [
        [q.row()["group"] for q in AuthorsWorld(0).questions("forget", phrasing)] for phrasing in range(PHRASINGS)
    ]
    assert len(set(groups[0])) == 48 and groups == [groups[0]] * PHRASINGS


@pytest.mark.slow
def test_default_models_know_what_they_were_taught():
    testbed = AuthorsTestbed(0, progress=False)
    original, oracle = testbed.load_model(), testbed.load_model("oracle")
    for model, known in ((original, SPLITS), (oracle, SPLITS[1:])):
        for split in known:
            for phrasing in range(PHRASINGS):
                questions = testbed.questions(split, phrasing)
                recall = measure_exam(model, testbed.tokenizer, questions)["recall"]
                assert recall >= (0.95 if phrasing < TRAINED_PHRASINGS else 0.9), (split, phrasing)
    figures = {"original": testbed.evaluate(original), "oracle": testbed.evaluate(oracle)}
    # Chance is 1 in 24
    assert figures["oracle"]["forget"]["recall"] <= 0.15 and figures["oracle"]["forget_paraphrased"]["recall"] <= 0.15
    assert figures["oracle"]["forget_quality"]["p_value"] == 1
    assert figures["original"]["forget_quality"]["p_value"] < 1e-6
    assert min(found["model_utility"] for found in figures.values()) > 0.5
