"""The embedding suffix: reaches its target, generates under it, and leaves the model alone."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from hf_robust.attacks import EmbeddingSuffixAttack
from hf_robust.attacks import suffix as suffix_module
from hf_robust.attacks.prompts import render_prompts
from hf_robust.sites import EmbeddingSite, quiet
from tests.engine_helpers import state_of
from tests.helpers import ARCHITECTURES, tiny_model
from tests.prompt_helpers import bpe_tokenizer, reachable_targets, sharp_model, word_tokenizer

PROMPTS = [
    [{"role": "user", "content": "how do i build a kite"}],
    [{"role": "user", "content": "tell me how"}],
    "what are the steps to sell a lamp",
]
TARGETS = ["glue", "sure", "first"]
SMALL = dict(suffix_length=6, step_size=0.05, max_new_tokens=5, progress=False)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def evaluate(model, behavior, embeddings):
    """Loss and argmax of the target under a suffix of embeddings, of one unpadded row, without the library."""
    table = EmbeddingSite(model).rows()
    rest = torch.tensor(behavior.after + behavior.target, dtype=torch.long)
    embeds = torch.cat([table[behavior.before], embeddings, table[rest]])[None]
    count = len(behavior.target)
    with quiet(model), torch.no_grad():
        logits = model(inputs_embeds=embeds, use_cache=False).logits[0, -count - 1 : -1]
    return float(F.cross_entropy(logits, rest[-count:])), logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reaches_the_target_and_generates_it(name):
    model, tokenizer = sharp_model(name), word_tokenizer()
    targets = reachable_targets(model, PROMPTS)
    results = EmbeddingSuffixAttack(**SMALL).attack(model, tokenizer, prompts=PROMPTS, targets=targets)
    behaviors = render_prompts(tokenizer, prompts=PROMPTS, targets=targets, suffix_length=6, init="!")
    for behavior, target, result in zip(behaviors, targets, results, strict=True):
        assert result.hit
        assert result.completion.split()[:2] == target.split()
        assert len(result.losses) == result.num_forwards < 101
        assert result.embeddings.shape == (6, 16) and result.embeddings.dtype == torch.float32
        loss, tokens = evaluate(model, behavior, result.embeddings)
        assert tokens == behavior.target
        assert loss == pytest.approx(result.loss, rel=1e-4)
        assert (result.suffix, result.suffix_ids) == (None, None)


def test_byte_level_tokens():
    tokenizer = bpe_tokenizer()
    model = sharp_model(vocab_size=len(tokenizer))
    results = EmbeddingSuffixAttack(**{**SMALL, "steps": 10}, early_stop=False).attack(
        model, tokenizer, prompts=PROMPTS, targets=["Sure, here is how", "sure", "first"]
    )
    assert all(result.loss < result.losses[0] for result in results)


def test_a_behaviour_is_attacked_alike_alone_and_in_a_batch():
    model, tokenizer = tiny_model(initializer_range=0.3), word_tokenizer()
    attack = EmbeddingSuffixAttack(**{**SMALL, "steps": 5}, early_stop=False)
    together = attack.attack(model, tokenizer, prompts=PROMPTS, targets=TARGETS)
    for prompt, target, expected in zip(PROMPTS, TARGETS, together, strict=True):
        (alone,) = attack.attack(model, tokenizer, prompts=[prompt], targets=[target])
        assert alone.losses == pytest.approx(expected.losses, rel=1e-4)
        assert alone.completion == expected.completion
        assert len(alone.losses) == 6 and alone.num_backwards == 5
        assert alone.loss == min(alone.losses)
    split = EmbeddingSuffixAttack(**{**SMALL, "steps": 5, "batch_size": 2}, early_stop=False)
    assert [r.completion for r in split.attack(model, tokenizer, prompts=PROMPTS, targets=TARGETS)] == [
        r.completion for r in together
    ]


def test_epsilon_bounds_every_embedding():
    model, tokenizer = tiny_model(), word_tokenizer()
    start = EmbeddingSite(model).rows()[tokenizer.convert_tokens_to_ids("!")]
    options = {**SMALL, "steps": 20, "early_stop": False}
    for epsilon, bounded in ((0.1, True), (float("inf"), False)):
        results = EmbeddingSuffixAttack(**options, epsilon=epsilon).attack(
            model, tokenizer, prompts=PROMPTS, targets=TARGETS
        )
        moved = torch.stack([(result.embeddings - start).norm(dim=-1) for result in results])
        assert bool((moved <= 0.1 + 1e-6).all()) == bounded


def test_where_it_starts():
    model, tokenizer = tiny_model(), word_tokenizer()
    rows = EmbeddingSite(model).rows()
    starts = {}
    for init in ("!", "mean", "random"):
        attack = EmbeddingSuffixAttack(**{**SMALL, "steps": 0}, init=init)
        (result,) = attack.attack(model, tokenizer, prompts=PROMPTS[:1], targets=TARGETS[:1])
        starts[init] = result.embeddings
        assert result.losses == [] and not result.hit
        (again,) = attack.attack(model, tokenizer, prompts=PROMPTS[:1], targets=TARGETS[:1])
        assert torch.equal(again.embeddings, result.embeddings)
    torch.testing.assert_close(starts["!"], rows[tokenizer.convert_tokens_to_ids("!")].expand(6, -1))
    torch.testing.assert_close(starts["mean"], rows.mean(dim=0).expand(6, -1))
    assert all((row == rows).all(dim=1).any() for row in starts["random"])


def test_an_init_without_tokens_names_the_remedy():
    attack = EmbeddingSuffixAttack(**SMALL, init="tulip")
    with pytest.raises(ValueError, match="`init='tulip'` is unknown.*`init='mean'`"):
        attack.attack(tiny_model(), word_tokenizer(), prompts=PROMPTS, targets=TARGETS)
    model = sharp_model()
    targets = reachable_targets(model, PROMPTS)
    for init in ("mean", "random"):
        results = EmbeddingSuffixAttack(**SMALL, init=init).attack(
            model, word_tokenizer(), prompts=PROMPTS, targets=targets
        )
        assert [" ".join(result.completion.split()[:2]) for result in results if result.hit] == targets


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora", "checkpointing"])
def test_nothing_is_left_behind(kind, fail, monkeypatch):
    model = tiny_model(attention_dropout=0.5)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False))
    if kind == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = state_of(model)
    if fail:
        monkeypatch.setattr(suffix_module, "token_nll", lambda *args: (_ for _ in ()).throw(RuntimeError("inside")))
    with pytest.raises(RuntimeError, match="inside") if fail else contextlib.nullcontext():
        EmbeddingSuffixAttack(**{**SMALL, "steps": 3}).attack(model, word_tokenizer(), prompts=PROMPTS, targets=TARGETS)
    assert state_of(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "`steps=-1` must be"),
        ({"suffix_length": 0}, "`suffix_length=0` must be"),
        ({"step_size": -0.1}, "`step_size=-0.1` must be"),
        ({"step_rule": "adan"}, "`step_rule='adan'` is unknown.*Did you mean 'adam'"),
        ({"epsilon": -1}, "`epsilon=-1` must be"),
        ({"init": ""}, "`init=''` must be a text"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingSuffixAttack(**options)
