"""The continuous attack: its result against an independent computation, and what it must leave alone."""

import math

import pytest
import torch

from hf_robust.attacks import EmbeddingAttack
from hf_robust.attacks.gradient import KEEPS, STEP_RULES
from hf_robust.sites import EmbeddingSite
from hf_robust.threats import NORMS
from tests.engine_helpers import forward_at, row_losses, state_of, with_lora
from tests.helpers import ARCHITECTURES, tiny_batch, tiny_model

all_architectures = pytest.mark.parametrize("name", ARCHITECTURES)
both_sides = pytest.mark.parametrize("side", ["right", "left"])
# Steps large enough for a tiny random model to answer to
STRONG = dict(epsilon=1.0, steps=4, step_size=0.25, step_size_relative=True)
# A sign hides small differences between two models' gradients, or blows rounding up to a whole step
SMOOTH = dict(**STRONG, step_rule="normalized")


def prompt_mask(batch: dict) -> torch.Tensor:
    return batch["attention_mask"].bool() & (batch["labels"] == -100)


def checkpoint(model, use_reentrant: bool = False):
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return model


def count_forwards(model) -> list:
    calls: list = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: calls.append(1))
    return calls


# what it finds


@all_architectures
@both_sides
@pytest.mark.parametrize("keep", KEEPS)
def test_every_architecture(name, side, keep):
    model, batch = tiny_model(name, attention_dropout=0.3), tiny_batch(side=side)
    attack = EmbeddingAttack(**STRONG, keep=keep)
    result = attack.search(model, **batch)
    delta, mask = result.delta, prompt_mask(batch)
    assert delta.shape == (3, 10, 16) and delta.dtype == torch.float32 and not delta.requires_grad
    assert (delta[~mask] == 0).all() and (delta[mask].norm(dim=-1) > 0).all()
    rows = EmbeddingSite(model).rows().float()
    assert delta.norm(dim=-1).max() <= rows.norm(dim=-1).mean() * (1 + 1e-6)
    assert (result.num_forwards, result.num_backwards) == ((5, 4) if keep == "best" else (4, 4))
    assert result.losses.shape == (result.num_forwards, 3)
    # What the result claims, computed without hooks and with the full head
    model.eval()
    torch.testing.assert_close(result.first_loss, row_losses(forward_at(model, batch, delta * 0), batch["labels"]))
    final = row_losses(forward_at(model, batch, delta), batch["labels"])
    assert (final < result.first_loss).all()
    if keep == "best":
        torch.testing.assert_close(result.last_loss, final)


@all_architectures
@both_sides
def test_a_row_alone_is_the_row_in_its_batch(name, side):
    model, batch = tiny_model(name), tiny_batch(side=side)
    attack = EmbeddingAttack(**SMOOTH)
    together = attack.perturb(model, **batch)
    for row in range(3):
        alone = attack.perturb(model, **{key: value[row : row + 1] for key, value in batch.items()})
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-6)


@all_architectures
def test_bfloat16_weights(name):
    model, batch = tiny_model(name).bfloat16(), tiny_batch()
    result = EmbeddingAttack(**STRONG).search(model, **batch)
    assert result.delta.dtype == torch.float32 and result.losses.dtype == torch.float32
    assert result.delta.isfinite().all() and (result.last_loss < result.first_loss).all()
    # float32 throughout: steps of a quarter of the radius are not multiples of bfloat16's spacing
    assert not torch.equal(result.delta, result.delta.bfloat16().float())


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
@both_sides
@pytest.mark.parametrize("epsilon, clipped", [(1.0, False), (0.02, True)])
def test_one_sign_step_by_hand(name, side, epsilon, clipped):
    model, batch = tiny_model(name, attention_dropout=0.3), tiny_batch(side=side)
    attack = EmbeddingAttack(epsilon=epsilon, epsilon_relative=False, steps=1, step_size=0.01, keep="last")
    delta = attack.perturb(model, **batch)

    model.eval()
    probe = torch.zeros(3, 10, 16, requires_grad=True)
    losses = row_losses(forward_at(model, batch, probe), batch["labels"])
    (grad,) = torch.autograd.grad(losses.sum(), probe)
    expected = -0.01 * grad.sign() * prompt_mask(batch).unsqueeze(-1)
    if clipped:  # a sign step of 16 coordinates is 0.01 * sqrt(16) = 0.04 long, twice the radius
        expected = expected / 2
    assert (grad.abs()[prompt_mask(batch)] > 1e-7).all(), "a sign within rounding would make the test a coin toss"
    torch.testing.assert_close(delta, expected)


def test_the_defaults_are_the_papers():
    attack = EmbeddingAttack()
    papers = {
        "epsilon": 0.05, "steps": 10, "step_size": 1e-4, "step_rule": "sign", "norm": "l2_token",
        "epsilon_relative": True, "step_size_relative": False, "init": "zero", "positions": "all_prompt",
        "keep": "best", "early_stop": None,
    }  # fmt: skip
    assert {name: getattr(attack, name) for name in papers} == papers
    assert repr(attack).startswith("EmbeddingAttack(epsilon=0.05, steps=10, step_size=0.0001, step_rule='sign'")


@pytest.mark.parametrize("relative, factor", [(True, 4.0), (False, 1.0)])
def test_epsilon_relative_counts_embeddings_as_applied(relative, factor):
    model, batch = tiny_model("gemma3"), tiny_batch()
    scale = model.get_input_embeddings().weight.norm(dim=-1).mean().item() if relative else 1.0
    # Gemma multiplies its rows by sqrt(16) = 4. Ten steps of half the radius end on the sphere.
    attack = EmbeddingAttack(epsilon=0.2, epsilon_relative=relative, steps=10, step_size=0.5, step_size_relative=True)
    lengths = attack.perturb(model, **batch)[prompt_mask(batch)].norm(dim=-1)
    assert lengths.max().item() == pytest.approx(0.2 * scale * factor, rel=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("rule", STEP_RULES)
def test_a_relative_step_has_its_length(norm, rule):
    model, batch = tiny_model(), tiny_batch()
    attack = EmbeddingAttack(
        epsilon=0.5, steps=1, step_size=0.3, step_size_relative=True, step_rule=rule, norm=norm, keep="last"
    )
    delta = attack.perturb(model, **batch)
    if norm == "l2_token":
        lengths = delta[prompt_mask(batch)].norm(dim=-1)
    else:
        lengths = delta.flatten(1).norm(dim=1) if norm == "l2" else delta.flatten(1).abs().amax(1)
    expected = 0.3 * 0.5 * EmbeddingSite(model).mean_row_norm()
    torch.testing.assert_close(lengths, expected.expand_as(lengths), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rule", STEP_RULES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("init", ["zero", "random"])
def test_every_step_rule_lowers_the_loss(rule, norm, init):
    model, batch = tiny_model(), tiny_batch()
    epsilon = {"l2_token": 0.5, "l2": 1.0, "linf": 0.1}[norm]
    attack = EmbeddingAttack(
        epsilon=epsilon, steps=6, step_size=0.25, step_size_relative=True, step_rule=rule, norm=norm, init=init,
        keep="last",
    )  # fmt: skip
    result = attack.search(model, **batch)
    assert (result.last_loss < result.first_loss).all()
    assert (result.delta[~prompt_mask(batch)] == 0).all()


def test_keep_best_against_last():
    # Steps far too long: the last point is not the best
    model, batch = tiny_model(), tiny_batch()
    settings = dict(epsilon=5.0, steps=5, step_size=1.0, step_size_relative=True)
    calls = count_forwards(model)
    last = EmbeddingAttack(**settings, keep="last").search(model, **batch)
    assert len(calls) == last.num_forwards == 5
    best = EmbeddingAttack(**settings, keep="best").search(model, **batch)
    assert len(calls) - 5 == best.num_forwards == 6
    torch.testing.assert_close(best.losses[:5], last.losses)
    assert torch.equal(best.last_loss, best.losses.min(0).values)
    assert (best.last_loss <= best.losses[-1]).all() and (best.last_loss < best.losses[-1]).any()
    model.eval()
    torch.testing.assert_close(best.last_loss, row_losses(forward_at(model, batch, best.delta), batch["labels"]))
    torch.testing.assert_close(best.losses[-1], row_losses(forward_at(model, batch, last.delta), batch["labels"]))


def test_random_init_uses_the_attacks_own_seed():
    model, batch = tiny_model(), tiny_batch()
    first, again, other = (EmbeddingAttack(**STRONG, init="random", seed=seed) for seed in (1, 1, 2))
    delta = first.perturb(model, **batch)
    assert torch.equal(delta, again.perturb(model, **batch))
    assert not torch.equal(delta, other.perturb(model, **batch))
    assert not torch.equal(delta, first.perturb(model, **batch)), "a second call draws anew"
    assert (delta[~prompt_mask(batch)] == 0).all()


def test_the_attention_mask_defaults_to_ones():
    model, batch = tiny_model(), tiny_batch(batch=1)
    expected = EmbeddingAttack(**STRONG).perturb(model, **batch)
    del batch["attention_mask"]
    assert torch.equal(EmbeddingAttack(**STRONG).perturb(model, **batch), expected)


def test_further_inputs_reach_the_model():
    model, batch = tiny_model(), tiny_batch()
    plain = EmbeddingAttack(**STRONG).perturb(model, **batch)
    positions = torch.arange(10).expand(3, 10)
    assert torch.equal(EmbeddingAttack(**STRONG).perturb(model, **batch, position_ids=positions), plain)
    assert not torch.equal(EmbeddingAttack(**STRONG).perturb(model, **batch, position_ids=positions * 2), plain)


def test_unbounded():
    model, batch = tiny_model(), tiny_batch()
    attack = EmbeddingAttack(epsilon=math.inf, steps=5, step_size=0.5, keep="last")
    assert attack.perturb(model, **batch).norm(dim=-1).max() > 5 * EmbeddingSite(model).mean_row_norm()


@pytest.mark.parametrize("off", [dict(epsilon=0), dict(steps=0), dict(steps=0, init="random")])
def test_switched_off(off):
    model, batch = tiny_model(), tiny_batch()
    calls = count_forwards(model)
    attack = EmbeddingAttack(**off)
    result = attack.search(model, **batch)
    assert attack.is_off and not calls
    assert torch.equal(result.delta, torch.zeros(3, 10, 16)) and result.delta.dtype == torch.float32
    assert (result.num_forwards, result.num_backwards) == (0, 0)


# what it leaves alone


def variants():
    """Models in training mode with everything that an attack might disturb."""
    yield "full", lambda: tiny_model("llama", attention_dropout=0.5)
    yield "opt", lambda: tiny_model("opt", attention_dropout=0.5)
    yield "tied", lambda: tiny_model("gemma3", attention_dropout=0.5)
    yield "checkpointing", lambda: checkpoint(tiny_model("opt", attention_dropout=0.5))
    yield "lora", lambda: with_lora(tiny_model(), lora_dropout=0.5)
    yield "lora checkpointing", lambda: checkpoint(with_lora(tiny_model("gpt2"), lora_dropout=0.5, fan_in_fan_out=True))
    yield "modules_to_save", lambda: with_lora(tiny_model(), modules_to_save=["embed_tokens", "lm_head"])
    yield "evaluation", lambda: tiny_model(attention_dropout=0.5).eval()


VARIANTS = dict(variants())
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@every_variant
@pytest.mark.parametrize("with_grads", [False, True])
def test_nothing_differs_after_an_attack(variant, with_grads):
    model, batch = VARIANTS[variant](), tiny_batch()
    for parameter in model.parameters() if with_grads else ():
        if parameter.requires_grad:  # gradients of earlier micro-batches stay as they are
            parameter.grad = torch.full_like(parameter, 0.5)
    list(model.modules())[-2].eval()
    before = state_of(model)
    result = EmbeddingAttack(**STRONG, init="random").search(model, **batch)
    assert (result.last_loss < result.first_loss).all()
    assert state_of(model) == before


@every_variant
@pytest.mark.parametrize("where", ["model", "layer", "head", "backward"])
def test_nothing_differs_after_an_exception(variant, where):
    model, batch = VARIANTS[variant](), tiny_batch()
    inner = next(m for path, m in model.named_modules() if path.endswith((".mlp", ".fc1")))
    broken = {"model": model, "layer": inner, "head": model.get_output_embeddings(), "backward": inner}[where]
    original, calls = broken.forward, []

    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("inside")

    def forward(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3 and where != "backward":
            raise RuntimeError("inside")
        output = original(*args, **kwargs)
        return Explode.apply(output) if where == "backward" and len(calls) >= 3 else output

    before = state_of(model)
    broken.forward = forward
    with pytest.raises(RuntimeError, match="inside"):
        EmbeddingAttack(**STRONG).perturb(model, **batch)
    assert len(calls) >= 3
    del broken.forward
    assert state_of(model) == before


def test_a_later_training_step_is_that_without_an_attack():
    grads = []
    for attacked in (False, True):
        model, batch = tiny_model(attention_dropout=0.5), tiny_batch()
        torch.manual_seed(3)
        if attacked:
            EmbeddingAttack(**STRONG).perturb(model, **batch)
        model(**batch).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# adapters and memory savers


def test_dropout_of_adapters_is_off():
    batch = tiny_batch()
    training = EmbeddingAttack(**SMOOTH).perturb(with_lora(tiny_model(), lora_dropout=0.5), **batch)
    evaluating = EmbeddingAttack(**SMOOTH).perturb(with_lora(tiny_model(), lora_dropout=0.5).eval(), **batch)
    assert torch.equal(training, evaluating)


@all_architectures
def test_full_dropout_is_off(name):
    batch = tiny_batch()
    training, evaluating, without = (
        EmbeddingAttack(**SMOOTH).perturb(model, **batch)
        for model in (
            tiny_model(name, attention_dropout=0.5),
            tiny_model(name, attention_dropout=0.5).eval(),
            tiny_model(name),
        )
    )
    assert torch.equal(training, evaluating) and torch.equal(training, without)


@all_architectures
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_activation_checkpointing_finds_the_same(name, lora):
    def build():
        model = tiny_model(name, attention_dropout=0.5)
        return with_lora(model, lora_dropout=0.5) if lora else model

    batch = tiny_batch()
    torch.testing.assert_close(
        EmbeddingAttack(**SMOOTH).perturb(checkpoint(build()), **batch),
        EmbeddingAttack(**SMOOTH).perturb(build(), **batch),
    )


def test_two_adapters():
    from peft import LoraConfig

    model, batch, attack = with_lora(tiny_model(), name="first"), tiny_batch(), EmbeddingAttack(**SMOOTH)
    alone = attack.perturb(model, **batch)
    torch.manual_seed(1)  # other weights than the first
    model.add_adapter("second", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    deltas = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        before = state_of(model)
        deltas[name] = attack.perturb(model, **batch)
        assert model.active_adapter == name and state_of(model) == before
    assert torch.equal(deltas["first"], alone) and not torch.allclose(alone, deltas["second"])
    with model.disable_adapter():
        base = attack.perturb(model, **batch)
    assert torch.equal(base, attack.perturb(tiny_model(), **batch))


@pytest.mark.parametrize("saved", [["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_saved_embeddings_set_the_radius(saved):
    model, batch = with_lora(tiny_model(), modules_to_save=saved), tiny_batch()
    with torch.no_grad():
        model.get_input_embeddings().modules_to_save["default"].weight.mul_(3)
    original = tiny_model().get_input_embeddings().weight.norm(dim=-1).mean().item()
    attack = EmbeddingAttack(epsilon=0.1, steps=8, step_size=0.5, step_size_relative=True)
    result = attack.search(model, **batch)
    assert result.delta.norm(dim=-1).max().item() == pytest.approx(0.1 * 3 * original, rel=1e-5)
    assert (result.last_loss < result.first_loss).all()


# rows that go wrong, or are done


def poison(model, batch, limit: float, row: int) -> None:
    """Turn the hidden states of a row to NaN once its perturbation exceeds `limit` in any coordinate."""
    clean = model.get_input_embeddings()(batch["input_ids"]).detach()
    rows = torch.arange(clean.shape[0]) == row

    def hook(module, args):
        outside = (args[0].detach() - clean).abs().amax((1, 2)) > limit
        return (torch.where((outside & rows).view(-1, 1, 1), math.nan, args[0]), *args[1:])

    model.model.layers[0].register_forward_pre_hook(hook)


@pytest.mark.parametrize("keep", KEEPS)
def test_a_non_finite_loss_keeps_the_last_finite_perturbation(keep):
    batch = tiny_batch()
    settings = dict(epsilon=1.0, steps=6, step_size=0.01, keep=keep)
    clean = EmbeddingAttack(**settings).search(tiny_model(), **batch)
    model = tiny_model()
    poison(model, batch, limit=0.025, row=1)  # two steps of 0.01 stay below
    before = state_of(model)
    result = EmbeddingAttack(**settings).search(model, **batch)
    assert result.non_finite.tolist() == [False, True, False] and not clean.non_finite.any()
    assert result.delta.isfinite().all()
    assert 0 < result.delta[1].abs().max() <= 0.025
    assert torch.equal(result.delta[[0, 2]], clean.delta[[0, 2]]), "rows do not mix"
    if keep == "best":
        assert torch.equal(result.last_loss[1], clean.losses[:3, 1].min())
    assert state_of(model) == before


def test_early_stop():
    model, batch = tiny_model(), tiny_batch()
    settings = dict(epsilon=2.0, steps=12, step_size=0.1, step_size_relative=True)
    free = EmbeddingAttack(**settings).search(model, **batch)
    threshold = free.losses[4].max().item() + 1e-4  # all rows pass it by the fifth evaluation
    result = EmbeddingAttack(**settings, early_stop=threshold).search(model, **batch)
    assert result.hit.all() and (result.last_loss < threshold).all()
    assert result.num_backwards <= 5
    for row in range(3):
        first = next(step for step, loss in enumerate(free.losses[:, row]) if loss < threshold)
        torch.testing.assert_close(result.last_loss[row], free.losses[first, row])
    unreachable = EmbeddingAttack(**settings, early_stop=0.0).search(model, **batch)
    assert not unreachable.hit.any() and unreachable.num_backwards == 12
    torch.testing.assert_close(unreachable.delta, free.delta)


def test_early_stop_at_once():
    model, batch = tiny_model(), tiny_batch()
    result = EmbeddingAttack(**STRONG, keep="last", early_stop=1e6).search(model, **batch)
    assert result.hit.all() and (result.num_forwards, result.num_backwards) == (1, 1)
    assert torch.equal(result.delta, torch.zeros(3, 10, 16))


# positions and bad input


@both_sides
def test_user_content(side):
    model, batch = tiny_model(), tiny_batch(side=side)
    user = torch.zeros(3, 10, dtype=torch.bool)
    user[:, 1:4] = True
    user[:, 6] = True  # a label: never attacked, whatever the mask says
    attack = EmbeddingAttack(**STRONG, positions="user_content")
    moved = attack.perturb(model, **batch, user_mask=user).norm(dim=-1) > 0
    assert torch.equal(moved, user & prompt_mask(batch))
    assert torch.equal(attack.attacked_positions(batch["attention_mask"], batch["labels"], user.long()), moved)


def test_user_content_needs_its_mask():
    with pytest.raises(ValueError, match="`positions='user_content'` needs `user_mask`.*all_prompt"):
        EmbeddingAttack(positions="user_content").perturb(tiny_model(), **tiny_batch())


@both_sides
@pytest.mark.parametrize("norm", ["l2_token", "linf"])
@pytest.mark.parametrize("init", ["zero", "random"])
def test_suffix_tokens_have_a_radius_of_their_own(side, norm, init):
    model, batch = tiny_model(), tiny_batch(side=side)
    suffix = torch.zeros(3, 10, dtype=torch.bool)
    suffix[:2, 3:5] = True
    attack = EmbeddingAttack(
        epsilon=0.1,
        suffix_epsilon=2.0,
        steps=8,
        step_size=1.0,
        step_size_relative=True,
        norm=norm,
        init=init,
        keep="last",
    )
    length = attack.perturb(model, **batch, suffix_mask=suffix)
    length = length.norm(dim=-1) if norm == "l2_token" else length.abs().amax(dim=-1)
    unit, attacked = EmbeddingSite(model).mean_row_norm(), prompt_mask(batch)
    small, wide = length[attacked & ~suffix], length[attacked & suffix]
    assert (small <= 0.1 * unit * 1.0001).all() and small.max() > 0.09 * unit
    assert len(wide) and (wide <= 2 * unit * 1.0001).all() and wide.max() > 1.9 * unit
    assert not length[~attacked].any()


def test_suffix_epsilon_equal_to_epsilon_changes_nothing():
    model, batch = tiny_model(), tiny_batch()
    plain = EmbeddingAttack(**STRONG).perturb(model, **batch)
    mask = torch.ones(3, 10, dtype=torch.bool)
    same = EmbeddingAttack(**STRONG, suffix_epsilon=STRONG["epsilon"]).perturb(model, **batch, suffix_mask=mask)
    assert torch.equal(plain, same)


def test_suffix_epsilon_alone():
    attack = EmbeddingAttack(**{**STRONG, "epsilon": 0.0}, suffix_epsilon=1.0)
    assert not attack.is_off
    suffix = torch.zeros(3, 10, dtype=torch.bool)
    suffix[:, 2] = True
    batch = tiny_batch()
    moved = attack.perturb(tiny_model(), **batch, suffix_mask=suffix).norm(dim=-1) > 0
    assert torch.equal(moved, suffix & prompt_mask(batch)) and moved.any()


def test_suffix_epsilon_is_refused_where_it_means_nothing():
    with pytest.raises(ValueError, match="`suffix_epsilon=1.0` needs `suffix_mask`"):
        EmbeddingAttack(suffix_epsilon=1.0).perturb(tiny_model(), **tiny_batch())
    with pytest.raises(ValueError, match="`suffix_epsilon=1.0` needs a norm"):
        EmbeddingAttack(suffix_epsilon=1.0, norm="l2")
    with pytest.raises(ValueError, match="`suffix_epsilon=-1`"):
        EmbeddingAttack(suffix_epsilon=-1)


@pytest.mark.parametrize("attack", [EmbeddingAttack(), EmbeddingAttack(steps=0)])
def test_a_row_without_label_is_refused(attack):
    batch = tiny_batch()
    batch["labels"][1] = -100
    batch["labels"][2, :] = -100
    batch["labels"][2, 0] = 5  # predicts from nothing
    with pytest.raises(ValueError, match=r"`labels` has no label token in rows \[1, 2\].*truncate less"):
        attack.perturb(tiny_model(), **batch)


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ValueError, match="use_reentrant"):
        EmbeddingAttack().perturb(checkpoint(tiny_model(), use_reentrant=True), **tiny_batch())


def test_a_model_without_embeddings_is_refused():
    with pytest.raises(ValueError, match="has no input embeddings"):
        EmbeddingAttack().perturb(torch.nn.Linear(2, 2), **tiny_batch())


@pytest.mark.parametrize(
    "argument, value, also",
    [
        ("epsilon", -0.1, "at least 0"),
        ("epsilon", math.nan, "at least 0"),
        ("epsilon", -math.inf, "at least 0"),
        ("epsilon", "0.1", "at least 0"),
        ("epsilon", None, "at least 0"),
        ("steps", -1, "at least 0"),
        ("steps", 2.5, "whole number"),
        ("steps", math.inf, "at least 0"),
        ("steps", True, "at least 0"),
        ("step_size", -1e-4, "at least 0"),
        ("step_size", math.inf, "at least 0"),
        ("step_rule", "signs", "'sign'"),
        ("step_rule", "Adam", "'adam'"),
        ("norm", "l2_tokens", "'l2_token'"),
        ("init", "rand", "'random'"),
        ("positions", "all_prompts", "'all_prompt'"),
        ("positions", "user", "'user_content'"),
        ("keep", "bst", "'best'"),
        ("early_stop", "low", "at least 0"),
        ("early_stop", math.nan, "at least 0"),
        ("early_stop", -1.0, "at least 0"),
    ],
)
def test_bad_arguments(argument, value, also):
    with pytest.raises(ValueError) as caught:
        EmbeddingAttack(**{argument: value})
    assert f"`{argument}={value!r}`" in str(caught.value) and also in str(caught.value)


@pytest.mark.parametrize("settings", [dict(init="random"), dict(step_size_relative=True)])
def test_no_radius_to_refer_to(settings):
    with pytest.raises(ValueError, match="`epsilon=inf`"):
        EmbeddingAttack(epsilon=math.inf, **settings)


def test_arguments_are_keywords_only():
    with pytest.raises(TypeError):
        EmbeddingAttack(0.05)
