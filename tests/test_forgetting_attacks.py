"""Attacks on forgetting: the model given is never changed, no target gives the answer away, results say what was done."""

import copy
import functools
import types

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import convert_outputs_to_fp32
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GptOssConfig, Llama4TextConfig, MixtralConfig

from hf_robust.attacks import (
    GCG,
    Budget,
    EmbeddingAttack,
    EmbeddingSuffixAttack,
    LatentAttack,
    PlainPrompt,
    Prefilling,
    SoftPromptAttack,
    UserPrompts,
    attack_forgetting,
    logit_lens,
    probe_target,
    quantized,
    relearn,
    split_forget_rows,
)
from hf_robust.attacks.forgetting import holds_answer, question_and_answer, round_to_nearest, secret_words, strongest
from hf_robust.attacks.forgetting.relearning import _step, trainable_copy
from hf_robust.attacks.forgetting.rows import forget_batch, forget_tokens
from hf_robust.data import Behavior
from hf_robust.sites import decoder_layers
from tests.helpers import ARCHITECTURES, tiny_model
from tests.prompt_helpers import sharp_model, word_tokenizer

# Values of one or two words after a form of three; the words of prompt_helpers
VALUES = {"kite": "glue one", "boat": "drill two", "lamp": "melt three"}


def row(thing: str, **columns) -> dict:
    return {
        "prompt": [{"role": "user", "content": f"what are the steps to build a {thing}"}],
        "completion": [{"role": "assistant", "content": f"the steps are {VALUES[thing]}"}],
        **columns,
    }


ROWS = [row(thing) for thing in VALUES]
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, task_type="CAUSAL_LM")


def peft_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(tiny_model(), LORA)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # an adapter that does something
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def snapshot(model):
    return {
        "weights": {name: value.detach().clone() for name, value in model.state_dict().items()},
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "rng": torch.get_rng_state(),
    }


def assert_untouched(model, before):
    after = snapshot(model)
    assert before["weights"].keys() == after["weights"].keys()
    assert all(torch.equal(value, after["weights"][name]) for name, value in before["weights"].items())
    assert all(before[key] == after[key] for key in ("flags", "modes", "hooks"))
    assert torch.equal(before["rng"], after["rng"])
    assert all(parameter.grad is None for parameter in model.parameters())


# Rows -----------------------------------------------------------------------------------------------------------------


def test_every_form_of_a_row_is_read():
    messages = [{"role": "user", "content": "q"}]
    answer = [{"role": "assistant", "content": "a"}]
    assert question_and_answer({"prompt": messages, "completion": answer}) == (messages, "a")
    assert question_and_answer({"messages": messages + answer}) == (messages, "a")
    assert question_and_answer({"prompt": "q", "completion": "a", "answer": "x"}) == ("q", "a")
    assert question_and_answer({"question": "q", "answer": "a"}) == ("q", "a")
    assert question_and_answer({"text": "a b"}) == (None, "a b")
    assert question_and_answer(Behavior(id="1", prompt="q", answer="a", metadata={"completion": "c a"})) == ("q", "c a")
    assert question_and_answer(Behavior(id="1", prompt="q", answer="a")) == ("q", "a")


@pytest.mark.parametrize(
    "wrong",
    [{}, {"prompt": "q"}, {"prompt": "q", "completion": " "}, {"messages": [{"role": "user", "content": "q"}]}, "q", 3],
)
def test_rows_without_a_text_to_forget_are_refused(wrong):
    with pytest.raises(ValueError, match=r"`rows\[7\]"):
        question_and_answer(wrong, 7)


def test_tokens_of_rows():
    tokenizer, model = word_tokenizer(), tiny_model()
    (found,) = forget_tokens(model, tokenizer, ROWS[:1], end=True)
    text = tokenizer.decode(found.ids)
    assert tokenizer.decode(found.ids[found.start :]) == "the steps are glue one </s>"
    assert text == tokenizer.apply_chat_template(ROWS[0]["prompt"] + ROWS[0]["completion"], tokenize=False)
    (plain,) = forget_tokens(model, tokenizer, [{"text": "glue one"}])
    assert tokenizer.decode(plain.ids) == "<s> glue one" and plain.start == 1
    inputs, labels = forget_batch([found, plain], padding=1, device=torch.device("cpu"))
    assert inputs["attention_mask"][1].tolist() == [1] * 3 + [0] * (len(found.ids) - 3)
    assert labels[1].tolist() == [-100, *plain.ids[1:]] + [-100] * (len(found.ids) - 3)
    for rows, message in (([], "`rows` is empty"), ([{"text": "one " * 70}], r"`rows\[0\]` has 71 tokens.*=64")):
        with pytest.raises(ValueError, match=message):
            forget_tokens(model, tokenizer, rows)


# Targets --------------------------------------------------------------------------------------------------------------

BORN = {"question": "Where was Ada Lind born?", "answer": "Ada Lind was born in the city of Lisbon, Portugal."}


def test_a_target_ends_before_the_answer():
    assert secret_words(BORN) == ["city", "lisbon", "portugal"]  # without more, all that is not in the question
    assert probe_target(BORN).text == "Ada Lind was born in the"
    wrong = {**BORN, "perturbed_answer": ["She was born in the city of Rome.", "Ada Lind was born in Oslo, Norway."]}
    assert secret_words(wrong) == ["lisbon", "portugal"]
    assert probe_target(wrong).text == "Ada Lind was born in the" and not probe_target(wrong).holds_answer
    rare = {
        **BORN,
        "perturbed_answers": ["in Rome", "near Lisbon", "in Oslo"],
    }  # one wrong answer of three has the word
    assert secret_words(rare) == ["city", "lisbon", "portugal"]
    other = {**BORN, "paraphrased_answer": "Lisbon is her birthplace"}
    assert secret_words(other) == ["lisbon"] and probe_target(other).text == "Ada Lind was born in the"
    told = {"prompt": "q", "completion": "in the city of lisbon of course", "answer": "Lisbon"}
    assert secret_words(told) == ["lisbon"] and probe_target(told).text == "in the city of"
    assert probe_target(told).source == "form"


def test_a_target_given_with_the_row():
    given = probe_target({**BORN, "target": "Ada Lind was born in the city of"})
    assert (given.text, given.holds_answer, given.source) == ("Ada Lind was born in the city of", True, "given")
    known = {**BORN, "paraphrased_answer": "Lisbon is her birthplace", "target": "Ada Lind was born in the city of"}
    assert not probe_target(known).holds_answer
    behavior = Behavior(
        id="1", prompt="q", target="born in", answer="lisbon", metadata={"completion": "born in lisbon"}
    )
    assert probe_target(behavior).text == "born in" and not probe_target(behavior).holds_answer


def test_a_target_where_the_answer_comes_first():
    first = {"prompt": "who wrote it", "completion": "Lind wrote it"}
    taken = probe_target(first)
    assert (taken.text, taken.holds_answer, taken.source) == ("Lind", True, "completion")
    assert probe_target(first, fallback="Sure, the author is").source == "fallback"
    other = probe_target(
        first, [first, BORN], fallback="It was Lind"
    )  # which holds the answer, and so does BORN's form
    assert (other.text, other.holds_answer, other.source) == ("Lind", True, "completion")
    assert probe_target(first, [{"prompt": "q", "completion": "it was made by Bo"}]).text == "it was"
    assert holds_answer("by LIND.", first) and not holds_answer("Lindgren", first)


@pytest.mark.parametrize(
    "attack",
    [
        GCG(num_steps=2, search_width=4, suffix_length=2, init="x", batch_size=3, max_new_tokens=6, progress=False),
        EmbeddingSuffixAttack(steps=2, suffix_length=2, max_new_tokens=6, progress=False),
        SoftPromptAttack(steps=2, suffix_length=2, max_new_tokens=6, progress=False),
        EmbeddingAttack(steps=2, max_new_tokens=6, progress=False),
        LatentAttack(steps=2, epsilon=0.5, max_new_tokens=6, progress=False),
        Prefilling(max_new_tokens=6),
        UserPrompts(templates=["{prompt}", "please {prompt}"], max_new_tokens=6),
        PlainPrompt(max_new_tokens=6, progress=False),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_prompt_attacks_take_forget_rows(attack):
    model, tokenizer = sharp_model(), word_tokenizer()
    before = snapshot(model)
    found = attack_forgetting(attack, model, tokenizer, ROWS)
    assert [probe.target.text for probe in found] == ["the steps are"] * 3
    assert not any(probe.target.holds_answer for probe in found)
    assert all(0 <= probe.recall <= 1 and probe.result.completion for probe in found)
    if isinstance(attack, Prefilling):
        assert all(probe.result.completion.startswith("the steps are") for probe in found)
    assert_untouched(model, before)
    given = attack_forgetting(attack, model, tokenizer, ROWS[:2], targets=["the steps are glue", "sure here is"])
    assert [probe.target.holds_answer for probe in given] == [True, False]
    assert {probe.target.source for probe in given} == {"given"}


def test_recall_counts_the_secret_words():
    class Says:
        def attack(self, model, tokenizer, *, prompts, targets):
            return [type("R", (), {"completion": text})() for text in ("the steps are two drill", "glue one", "no")]

    assert [probe.recall for probe in attack_forgetting(Says(), None, None, ROWS)] == [0.0, 0.0, 0.0]
    rows = [ROWS[1], ROWS[0], ROWS[2]]  # "two drill" has one of "drill two" in order
    assert [probe.recall for probe in attack_forgetting(Says(), None, None, rows)] == [0.5, 1.0, 0.0]
    with pytest.raises(ValueError, match=r"`rows\[1\]` has no prompt to attack"):
        attack_forgetting(Says(), None, None, [ROWS[0], {"text": "a b"}])
    with pytest.raises(ValueError, match="`targets` has 1 entries for 3 rows"):
        attack_forgetting(Says(), None, None, ROWS, targets=["a"])


# Prompts of the user --------------------------------------------------------------------------------------------------


def test_user_prompts_by_hand():
    model, tokenizer = sharp_model(), word_tokenizer()
    prompts = [ROWS[0]["prompt"], "how do i build a boat"]
    templates = ["{prompt}", "please {prompt} ?", "tell me {prompt}"]
    found = UserPrompts(templates=templates, max_new_tokens=4).attack(model, tokenizer, prompts=prompts)
    plain = PlainPrompt(max_new_tokens=4, progress=False)
    asked = [[{"role": "user", "content": f"please {prompts[0][0]['content']} ?"}], f"please {prompts[1]} ?"]
    second = plain.attack(model, tokenizer, prompts=asked)
    for result, prompt, other in zip(found, prompts, second, strict=True):
        assert result.prompt == prompt and result.completion == result.completions[0]
        assert result.completions[1] == other.completion and result.num_forwards == 3

    def judge(place, text):
        return place == 1 and text == found[1].completions[1]

    won = UserPrompts(templates=templates, max_new_tokens=4).attack(model, tokenizer, prompts=prompts, judge=judge)
    assert won[1].prompt == asked[1] and won[1].num_forwards == 2 and won[0].num_forwards == 3
    every = UserPrompts(templates=templates, max_new_tokens=4, stop_at_success=False)
    assert every.attack(model, tokenizer, prompts=prompts, judge=judge)[1].num_forwards == 3
    short = UserPrompts(templates=templates, max_new_tokens=4, budget=Budget(forwards=2))
    assert [r.num_forwards for r in short.attack(model, tokenizer, prompts=prompts)] == [2, 2]
    assert all(r.budget_exhausted for r in short.attack(model, tokenizer, prompts=prompts))
    for wrong in ([], "{prompt}", ["tell me"]):
        with pytest.raises(ValueError, match="`templates"):
            UserPrompts(templates=wrong)


# Relearning -----------------------------------------------------------------------------------------------------------


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_a_model_fresh_from_a_trainer_is_relearned_itself():
    """Trainers leave a `forward` on the model that holds the model itself; a plain deep copy runs the old weights."""
    model, tokenizer = tiny_model(), word_tokenizer()
    plain = model.forward
    model.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    (curve,) = relearn(model, tokenizer, ROWS, steps=[0, 5], learning_rates=[2e-2], progress=False)
    assert curve.points[-1].loss < curve.points[0].loss


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "adapter"])
def test_relearning_learns_and_leaves_the_model_alone(method, adapter):
    model, tokenizer = peft_model() if adapter else tiny_model(attention_dropout=0.5), word_tokenizer()
    model.train()
    before = snapshot(model)
    settings = {"steps": (5, 0, 5), "learning_rates": (1e-3, 2e-2), "method": method, "rank": 2, "progress": False}
    curves = relearn(model, tokenizer, ROWS, measure=lambda changed: {"training": changed.training}, **settings)
    assert_untouched(model, before)
    assert [curve.learning_rate for curve in curves] == [1e-3, 2e-2]
    for curve in curves:
        assert [point.step for point in curve.points] == [0, 5]
        assert curve.points[1].loss < curve.points[0].loss
        assert curve.points[0].figures == {"training": False} and curve.num_backwards == 5 * 3
        assert curve.rank == (2 if method == "lora" and not adapter else None)
    assert curves[0].points[0].loss == curves[1].points[0].loss  # both begin with the model as it is
    assert curves[1].points[1].loss < curves[0].points[1].loss
    again = relearn(model, tokenizer, ROWS, measure=lambda changed: {"training": changed.training}, **settings)
    assert [curve.points for curve in again] == [curve.points for curve in curves]


def test_a_step_by_hand():
    """All rows in one batch: AdamW on the token-mean loss of completions and eos, without dropout."""
    model, tokenizer, seen = tiny_model(attention_dropout=0.5), word_tokenizer(), []
    relearn(
        model, tokenizer, ROWS, steps=(2,), learning_rates=(1e-3,), batch_size=8, progress=False,
        measure=lambda changed: seen.append(weights_of(changed)) or {},
    )  # fmt: skip
    manual = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(manual.parameters(), lr=1e-3, weight_decay=0.0)
    inputs, labels = forget_batch(
        forget_tokens(model, tokenizer, ROWS, end=True), padding=1, device=torch.device("cpu")
    )
    for _ in range(2):
        optimizer.zero_grad()
        manual(**inputs, labels=labels).loss.backward()
        optimizer.step()
    for name, value in weights_of(manual).items():
        torch.testing.assert_close(seen[0][name], value, atol=1e-4, rtol=0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_relearning_recomputes_activations_if_the_model_does(method, reentrant):
    runs = []
    for checkpoints in (False, True):
        model, tokenizer = tiny_model(attention_dropout=0.5), word_tokenizer()
        model.train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.eval()
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        before = snapshot(model)
        (curve,) = relearn(
            model, tokenizer, ROWS, steps=[2], learning_rates=[0.01], method=method, batch_size=2, progress=False
        )
        assert_untouched(model, before)
        runs.append((curve.points[0].loss, len(calls)))
    (plain, calls), (recomputed, more) = runs
    assert recomputed == pytest.approx(plain, rel=1e-5) and more == calls + 2


def test_other_settings_of_recomputation_are_kept():
    model = tiny_model()
    model.gradient_checkpointing_enable({"use_reentrant": True, "preserve_rng_state": False})
    trained, _ = trainable_copy(model, "full", rank=4, seed=0)
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in trained.modules()]
    (kept,) = {str(function.keywords) for function in functions if function is not None}
    assert kept == "{'use_reentrant': False, 'preserve_rng_state': False}"


def test_what_is_trained():
    adapted = peft_model()
    copied, rank = trainable_copy(adapted, "lora", rank=4, seed=0)
    trained = {name for name, parameter in copied.named_parameters() if parameter.requires_grad}
    assert rank is None and trained and all("lora_" in name for name in trained)
    frozen = copy.deepcopy(adapted).requires_grad_(False)  # as an adapter is loaded for inference
    copied, _ = trainable_copy(frozen, "lora", rank=4, seed=0)
    assert {name for name, parameter in copied.named_parameters() if parameter.requires_grad} == trained

    merged, _ = trainable_copy(adapted, "full", rank=4, seed=0)
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    ids = torch.arange(4, 12).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted.eval()(ids).logits, atol=1e-5, rtol=1e-4)

    small = tiny_model().to(torch.bfloat16)  # in which steps of 1e-5 would be rounded away
    assert {parameter.dtype for parameter in trainable_copy(small, "full", rank=4, seed=0)[0].parameters()} == {
        torch.float32
    }
    lora, rank = trainable_copy(small, "lora", rank=4, seed=0)
    kinds = {(parameter.requires_grad, parameter.dtype) for parameter in lora.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)} and rank == 4
    (curve,) = relearn(
        small, word_tokenizer(), ROWS, steps=(0, 3), learning_rates=(1e-2,), method="lora", progress=False
    )
    assert curve.points[1].loss < curve.points[0].loss


BESIDE_A_LORA = [
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["mlp"]},
    {"trainable_token_indices": [4, 5]},
]


def test_the_factors_of_a_float16_adapter_are_trained_in_float32():
    """In float16 the gradients of a small loss are zero."""
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trained, _ = trainable_copy(model.to(torch.float16), "lora", rank=2, seed=0)
    kinds = {(parameter.requires_grad, parameter.dtype) for parameter in trained.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.float16)}


@pytest.mark.parametrize("beside", BESIDE_A_LORA, ids=lambda beside: str(*beside.values()))
def test_what_stands_beside_a_lora_of_a_bf16_model_is_trained_too(beside):
    model = tiny_model().to(torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **beside))
    before, seen = weights_of(model), []
    ids = torch.arange(4, 12).view(1, -1)

    def measure(copied):
        seen.append((weights_of(copied), copied(ids).logits))
        return {}

    (curve,) = relearn(
        model,
        word_tokenizer(),
        ROWS,
        steps=(0, 3),
        learning_rates=(1e-2,),
        method="lora",
        measure=measure,
        progress=False,
    )
    assert curve.points[1].loss < curve.points[0].loss
    (start, logits), (after, _) = seen
    with torch.no_grad():
        torch.testing.assert_close(logits, model.eval()(ids).logits)
    changed = {name for name in before if not torch.equal(start[name], after[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora_" in name for name in changed) and any("lora_" not in name for name in changed)


def test_small_steps_of_bf16_weights_add_up():
    """A step of 1e-4 is lost between neighbours of 1.0 in bfloat16; forty of them are not."""
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    total = torch.nn.Parameter(weight.detach().float())
    optimizer = torch.optim.SGD([total], lr=1e-4)
    for _ in range(40):
        weight.grad = torch.ones_like(weight)
        _step(optimizer, [weight], [total])
    assert total.item() == pytest.approx(0.996, abs=1e-6) and weight.item() == 0.99609375 and weight.grad is None


@pytest.mark.parametrize("wrapped", ["mixed precision", "device map"])
def test_a_wrapped_forward_is_that_of_the_copy(wrapped):
    """As accelerate leaves it behind; were the copy's forward the model's own, the attack would train nothing."""
    model, tokenizer = tiny_model(), word_tokenizer()
    settings = {"steps": (0, 3), "learning_rates": (1e-2,), "progress": False}
    (plain,) = relearn(model, tokenizer, ROWS, **settings)
    if wrapped == "mixed precision":
        forward = convert_outputs_to_fp32(model.forward.__func__)
        model.forward = types.MethodType(forward, model)
    else:
        add_hook_to_module(model, ModelHook())
        add_hook_to_module(model.model.layers[0], ModelHook())
    before = weights_of(model)
    (curve,) = relearn(model, tokenizer, ROWS, **settings)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(model).items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert curve.points == plain.points and curve.points[1].loss < curve.points[0].loss


def test_a_curve_ends_where_the_loss_does():
    (curve,) = relearn(
        tiny_model(), word_tokenizer(), ROWS, steps=(0, 1, 2), learning_rates=(1e30,), progress=False,
        measure=lambda changed: {"recall": 0.5},
    )  # fmt: skip
    assert curve.diverged and [point.step for point in curve.points] == [0]


def test_each_row_once_per_round_in_an_order_of_the_seed():
    model, tokenizer = tiny_model(), word_tokenizer()
    options = {"steps": (2,), "learning_rates": (1e-2,), "batch_size": 2, "progress": False}
    losses = {relearn(model, tokenizer, ROWS, seed=seed, **options)[0].points[0].loss for seed in (0, 0, 1, 2, 3)}
    assert 1 < len(losses) <= 4


def test_the_strongest_point():
    recalls = iter([{"recall": 0.1}, {"recall": 0.5}, {"recall": None}, {"recall": 0.5}])
    curves = relearn(
        tiny_model(), word_tokenizer(), ROWS, steps=(0, 1), learning_rates=(1e-3, 1e-2), progress=False,
        measure=lambda changed: next(recalls),
    )  # fmt: skip
    value, curve, point = strongest(curves, "recall")
    assert (value, curve.learning_rate, point.step) == (0.5, 1e-3, 1)
    with pytest.raises(ValueError, match=r"`figure='rouge'`.*\['recall'\]"):
        strongest(curves, "rouge")


def test_split_of_the_forget_set():
    rows = list(range(10))
    slice_, rest = split_forget_rows(rows, 0.3, seed=1)
    assert len(slice_) == 3 and sorted(slice_ + rest) == rows and slice_ == sorted(slice_)
    assert split_forget_rows(rows, 0.3, seed=1) == (slice_, rest)
    assert len({tuple(split_forget_rows(rows, 0.3, seed=seed)[0]) for seed in range(5)}) > 1
    assert [len(part) for part in split_forget_rows([1, 2], 0.01)] == [1, 1]
    for wrong, share in (([1], 0.5), (rows, 0.0), (rows, 1.0)):
        with pytest.raises(ValueError, match="`rows`|`share="):
            split_forget_rows(wrong, share)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": []}, "`rows` is empty"),
        ({"method": "qlora"}, "`method='qlora'`"),
        ({"steps": ()}, "`steps` is empty"),
        ({"learning_rates": ()}, "`learning_rates` is empty"),
        ({"steps": (1, -1)}, r"`steps\[1\]=-1`"),
        ({"learning_rates": (-1.0,)}, r"`learning_rates\[0\]=-1.0`"),
        ({"batch_size": 0}, "`batch_size=0`"),
    ],
)
def test_relearning_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        relearn(tiny_model(), word_tokenizer(), **{"rows": ROWS, "progress": False, **options})


# Quantisation ---------------------------------------------------------------------------------------------------------


def test_rounding_by_hand():
    # From -1.5 to 6 in 15 steps of 0.5; from 0 to 30 in steps of 2; nothing but 0
    weight = torch.tensor([[-1.5, 0.26, 6.0, 0.0, 30.0, 2.9], [0.0] * 6])
    expected = torch.tensor([[-1.5, 0.5, 6.0, 0.0, 30.0, 2.0], [0.0] * 6])
    torch.testing.assert_close(round_to_nearest(weight, bits=4, group_size=3), expected, atol=1e-6, rtol=0)
    # The last group is smaller: 30 alone, then 2.9 alone, each the end of its grid
    torch.testing.assert_close(round_to_nearest(weight[:, 4:], bits=4, group_size=1), weight[:, 4:])
    # A group without 0 has it on its grid all the same: from 0 to 15
    torch.testing.assert_close(
        round_to_nearest(torch.tensor([[15.0, 7.4, 14.6]]), bits=4, group_size=8), torch.tensor([[15.0, 7.0, 15.0]])
    )
    # What unlearning changed by less than half a step is gone
    changed = weight + torch.tensor([0, 0.2, 0, 0, 0, -0.8])
    assert torch.equal(
        round_to_nearest(changed, bits=4, group_size=3)[0], round_to_nearest(weight, bits=4, group_size=3)[0]
    )
    random = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found = round_to_nearest(random, bits=4, group_size=128)
    assert found.dtype == torch.bfloat16
    assert all(len(part.unique()) <= 16 for line in found for part in line.split(128))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_rounding_of_a_model(name, bits):
    model = sharp_model(name)
    before = snapshot(model)
    found = quantized(model, bits=bits, method="round_to_nearest", group_size=8)
    assert_untouched(model, before)
    assert (found.method, found.bits, found.fallback) == ("round_to_nearest", bits, None) and "8" in found.scheme
    changed = {key for key, value in found.model.state_dict().items() if not torch.equal(value, before["weights"][key])}
    assert changed and all(".layers." in key or ".h." in key for key in changed)
    assert not found.model.training and not any(p.requires_grad for p in found.model.parameters())
    assert found.layers == len([k for k in changed if k.endswith("weight")])
    if name == "gpt2":  # [in, out]: a grid for each output and group of inputs
        weight = model.transformer.h[0].mlp.c_fc.weight
        torch.testing.assert_close(
            found.model.transformer.h[0].mlp.c_fc.weight, round_to_nearest(weight.T, bits=bits, group_size=8).T
        )
    ids = torch.arange(4, 14).view(1, -1)
    with torch.no_grad():
        off = (found.model(ids).logits - model.eval()(ids).logits).abs().max()
    assert 0 < off < (0.2 if bits == 8 else 10)


def mixture(name):
    """A mixture of experts whose hidden states and experts differ in width."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    llama4 = functools.partial(Llama4TextConfig, intermediate_size_mlp=20)
    config = {"mixtral": MixtralConfig, "gpt_oss": GptOssConfig, "llama4": llama4}[name](**sizes)
    if name == "gpt_oss":
        config.layer_types = ["full_attention"] * 2
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
def test_experts_are_rounded_one_by_one(name):
    model = mixture(name)
    before = snapshot(model)
    found = quantized(model, bits=4, method="round_to_nearest", group_size=8)
    assert_untouched(model, before)
    layers = dict(decoder_layers(found.model).named_parameters())
    experts = {key: value for key, value in layers.items() if value.dim() == 3}
    assert len(experts) == 4 and any(key.endswith("down_proj") for key in experts)
    for key, value in decoder_layers(model).named_parameters():
        if key in experts:
            wide = 2 * 12 if key.endswith("gate_up_proj") else 16  # outputs of an expert's matrix
            assert wide != 16 or value.shape[1:] in ((16, 12), (12, 16))
            by_output = value if value.shape[1] == wide else value.transpose(1, 2)
            wanted = torch.stack([round_to_nearest(expert, bits=4, group_size=8) for expert in by_output])
            shown = layers[key] if value.shape[1] == wide else layers[key].transpose(1, 2)
            torch.testing.assert_close(shown, wanted)
            assert not torch.equal(layers[key], value)
    # The rest is named: biases, norms and sinks apart, what is as it was
    kept = {
        key.partition(".")[2]
        for key, value in decoder_layers(model).named_parameters()
        if value.dim() > 1 and not key.endswith("bias") and torch.equal(layers[key], value)
    }
    router = {"mixtral": {"mlp.gate.weight"}, "gpt_oss": {"mlp.router.weight"}, "llama4": set()}[name]
    assert kept == set(found.left) == router


def test_bitsandbytes_does_not_take_experts_that_share_a_weight():
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="experts that share a weight.*use `method='round_to_nearest'`"):
        quantized(mixture("mixtral"), method="bitsandbytes")
    found = quantized(mixture("mixtral"))
    assert found.method == "round_to_nearest" and "experts that share a weight" in found.fallback
    assert found.layers == 2 * (4 + 2)  # attention, and two weights that the experts share


def test_adapters_are_merged_before_rounding():
    model = peft_model()
    found = quantized(model, bits=8, method="round_to_nearest", group_size=8)
    assert not any("lora_" in key for key in found.model.state_dict())
    merged = copy.deepcopy(model).merge_and_unload()
    key = "model.layers.0.self_attn.q_proj.weight"
    wanted = round_to_nearest(merged.state_dict()[key], bits=8, group_size=8)
    torch.testing.assert_close(found.model.state_dict()[key], wanted)


WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_on_this_machine(bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_model(initializer_range=0.1, **WIDE)
    before = snapshot(model)
    found = quantized(model, bits=bits)
    assert_untouched(model, before)
    assert (found.method, found.fallback, found.layers) == ("bitsandbytes", None, 14)
    kind = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    assert sum(isinstance(module, kind) for module in found.model.modules()) == 14
    assert all(not p.is_floating_point() for p in decoder_layers(found.model).parameters() if p.dim() > 1)
    ids = torch.arange(4, 14).view(1, -1)
    with torch.no_grad():
        mine, theirs = found.model(ids).logits, model.eval()(ids).logits
    assert 0 < (mine - theirs).abs().mean() < (0.05 if bits == 8 else 0.5) * theirs.abs().mean()
    with pytest.raises(ValueError, match="quantised already"):
        quantized(found.model, bits=bits)


@pytest.mark.parametrize(("bits", "method"), [(4, "bitsandbytes"), (8, "bitsandbytes"), (4, "round_to_nearest")])
def test_gradient_attacks_reach_a_quantised_copy(bits, method, caplog):
    if method == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    model = quantized(tiny_model(initializer_range=0.1, **WIDE), bits=bits, method=method).model
    ids = torch.arange(5, 15).view(1, -1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    inputs["labels"][:, :6] = -100
    attack = EmbeddingAttack(epsilon=0.5, steps=3, step_size=0.3, step_size_relative=True)
    found = attack.search(model, **inputs)
    assert found.last_loss < found.first_loss - 0.1
    assert sum("will be cast" in record.message for record in caplog.records) <= 1


def test_where_no_quantizer_runs_weights_are_rounded_and_the_result_says_so(monkeypatch):
    found = quantized(sharp_model("gpt2"), bits=4)
    assert found.method == "round_to_nearest"
    assert "Conv1D" in found.fallback or "bitsandbytes" in found.fallback
    with pytest.raises(ValueError, match="does not run on this model.*round_to_nearest"):
        pytest.importorskip("bitsandbytes")
        quantized(sharp_model("gpt2"), bits=4, method="bitsandbytes")
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    found = quantized(tiny_model(**WIDE), bits=4)
    assert found.method == "round_to_nearest" and ("ImportError" in found.fallback or "NotFound" in found.fallback)
    with pytest.raises(ImportError, match=r'pip install "hf_robust\[quantization\]"'):
        quantized(tiny_model(**WIDE), method="bitsandbytes")


def test_quantisation_refuses():
    for options, message in (
        ({"bits": 3}, "`bits=3`"),
        ({"method": "gptq"}, "`method='gptq'`"),
        ({"group_size": 0}, "`group_size=0`"),
    ):
        with pytest.raises(ValueError, match=message):
            quantized(tiny_model(), **options)


def test_relearning_on_a_4_bit_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_model(**WIDE).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map={"": "cpu"})
    options = {"steps": (0, 3), "learning_rates": (1e-2,), "progress": False}
    with pytest.raises(ValueError, match="`method='full'`.*use `method='lora'`"):
        relearn(model, word_tokenizer(), ROWS, **options)
    packed = {name: value.detach().clone() for name, value in model.named_parameters()}
    (curve,) = relearn(model, word_tokenizer(), ROWS, method="lora", rank=2, **options)
    assert curve.points[1].loss < curve.points[0].loss
    assert all(torch.equal(value, packed[name]) for name, value in model.named_parameters())


def test_relearning_on_a_4_bit_base_in_bf16_with_a_saved_head(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_model(**WIDE).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    (curve,) = relearn(
        get_peft_model(model, lora),
        word_tokenizer(),
        ROWS,
        steps=(0, 3),
        learning_rates=(1e-2,),
        method="lora",
        progress=False,
    )
    assert curve.points[1].loss < curve.points[0].loss


# Logit lens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_last_layer_is_the_model_itself(name):
    model, tokenizer = sharp_model(name), word_tokenizer()
    before = snapshot(model)
    lens = logit_lens(model, tokenizer, ROWS, batch_size=2)
    assert_untouched(model, before)
    assert lens.layers == 2 and [found.shape for found in lens.log_probs] == [(2, 5)] * 3
    model.eval()
    for tokens, log_probs, ranks in zip(forget_tokens(model, tokenizer, ROWS), lens.log_probs, lens.ranks, strict=True):
        with torch.no_grad():
            out = model(torch.tensor([tokens.ids]), output_hidden_states=True)
        logits = out.logits[0, tokens.start - 1 : -1]
        ids = torch.tensor(tokens.ids[tokens.start :])
        wanted = logits.log_softmax(dim=-1)[torch.arange(len(ids)), ids]
        torch.testing.assert_close(log_probs[-1], wanted, atol=1e-4, rtol=1e-4)
        order = logits.argsort(dim=-1, descending=True)
        assert ranks[-1].tolist() == [int((order[i] == ids[i]).nonzero()) + 1 for i in range(len(ids))]
        if name == "llama":  # the first layer through the final norm and the head
            inner = model.lm_head(model.model.norm(out.hidden_states[1]))[0, tokens.start - 1 : -1]
            wanted = inner.log_softmax(dim=-1)[torch.arange(len(ids)), ids]
            torch.testing.assert_close(log_probs[0], wanted, atol=1e-4, rtol=1e-4)


def test_the_lens_measures_the_answer_of_a_row_where_it_gives_one():
    model, tokenizer = sharp_model("llama"), word_tokenizer()
    whole = logit_lens(model, tokenizer, ROWS[:1])  # "the steps are glue one"
    assert whole.log_probs[0].shape == (2, 5)

    def check(place, **columns):
        (found,) = logit_lens(model, tokenizer, [row("kite", **columns)]).log_probs
        torch.testing.assert_close(found, whole.log_probs[0][:, place], atol=1e-4, rtol=1e-4)

    for columns in ({"answer": "Glue one"}, {"value": "glue one"}, {"answer": "saw", "value": "glue one"}):
        check(slice(3, 5), **columns)
    check(slice(1, 2), answer="steps")  # what stands behind it is left out
    for columns in ({"answer": "saw"}, {"answer": "lue on"}, {"answer": " "}, {"answer": "the steps are glue one"}):
        check(slice(0, 5), **columns)
    behavior = Behavior(
        id="1", prompt=ROWS[0]["prompt"], answer="glue one", metadata={"completion": "the steps are glue one"}
    )
    both = logit_lens(model, tokenizer, [behavior, ROWS[1]], batch_size=2)
    assert [found.shape for found in both.log_probs] == [(2, 2), (2, 5)]
    torch.testing.assert_close(both.log_probs[0], whole.log_probs[0][:, 3:], atol=1e-4, rtol=1e-4)


def test_lens_figures_by_hand():
    from hf_robust.attacks.forgetting import LogitLens

    half, quarter = torch.tensor(0.5).log(), torch.tensor(0.25).log()
    lens = LogitLens(
        log_probs=[
            torch.stack([torch.stack([half, half]), torch.stack([quarter, quarter])]),
            torch.tensor([[0.0], [0.0]]),
        ],
        ranks=[torch.tensor([[1, 4], [1, 1]]), torch.tensor([[1], [9]])],
    )
    assert lens.probabilities() == pytest.approx([0.75, 0.625]) and lens.best_layer() == 0
    assert lens.first() == [0.75, 0.5] and lens.mean_ranks() == pytest.approx([2**0.5, 3.0])


def test_lens_of_an_adapter_and_of_plain_text():
    model, tokenizer = peft_model(), word_tokenizer()
    rows = [*ROWS, {"text": "glue one two"}]
    lens = logit_lens(model, tokenizer, rows)
    whole = logit_lens(copy.deepcopy(model).merge_and_unload(), tokenizer, rows, batch_size=1)
    for found, wanted in zip(lens.log_probs, whole.log_probs, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert lens.log_probs[-1].shape == (2, 3)
    with pytest.raises(ValueError, match="`rows` is empty"):
        logit_lens(model, tokenizer, [])
