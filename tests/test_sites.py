"""Where a perturbation enters: input embeddings, label positions, the model without dropout."""

import contextlib
import sys
from unittest import mock

import pytest
import torch
from peft import AdaptionPromptConfig, LoraConfig, get_peft_model
from torch import nn

from hf_robust.sites import (
    EmbeddingSite,
    LabelIndex,
    adapter_off,
    check_not_reentrant,
    embeddings,
    label_logits,
    quiet,
)  # fmt: skip
from tests.engine_helpers import forward_at, hook_count, index_of, inputs_of, modes_of, picked, with_lora
from tests.helpers import ARCHITECTURES, tiny_batch, tiny_model

SIDES = ("right", "left")
all_architectures = pytest.mark.parametrize("name", ARCHITECTURES)


def noise(batch: dict, hidden: int = 16, scale: float = 0.1) -> torch.Tensor:
    return scale * torch.randn(*batch["input_ids"].shape, hidden, generator=torch.Generator().manual_seed(7))


# EmbeddingSite


@all_architectures
@pytest.mark.parametrize("side", SIDES)
def test_add_equals_a_forward_of_the_sum(name, side):
    model, batch = tiny_model(name).eval(), tiny_batch(side=side)
    ours, plain = (noise(batch).requires_grad_() for _ in range(2))
    with EmbeddingSite(model).add(ours):
        logits = model(**inputs_of(batch)).logits
    expected = forward_at(model, batch, plain)
    torch.testing.assert_close(logits, expected)
    assert not torch.allclose(logits, model(**inputs_of(batch)).logits, atol=1e-4)
    (grad,) = torch.autograd.grad(logits.square().sum(), ours)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), plain)
    torch.testing.assert_close(grad, expected_grad)


def test_two_perturbations_add_up():
    model, batch = tiny_model().eval(), tiny_batch()
    site, first, second = EmbeddingSite(model), noise(batch), noise(batch, scale=0.05)
    with site.add(first), site.add(second):
        logits = model(**inputs_of(batch)).logits
    torch.testing.assert_close(logits, forward_at(model, batch, first + second))


@all_architectures
def test_rows_are_what_the_model_sees(name):
    model = tiny_model(name).eval()
    site = EmbeddingSite(model)
    ids = torch.arange(61).view(1, -1)
    expected = model.get_input_embeddings()(ids)[0].detach()
    rows = site.rows()
    torch.testing.assert_close(rows, expected)
    assert not rows.requires_grad and site.vocab_size == 61
    norm = site.mean_row_norm()
    assert norm.shape == () and norm.dtype == torch.float32
    torch.testing.assert_close(norm, expected.norm(dim=-1).mean())


def test_rows_include_the_scaling_of_gemma3():
    model = tiny_model("gemma3")
    weight = model.get_input_embeddings().weight.detach()
    site = EmbeddingSite(model)
    torch.testing.assert_close(site.rows(), weight * 4)  # sqrt(hidden) = sqrt(16)
    torch.testing.assert_close(site.mean_row_norm(), 4 * weight.norm(dim=-1).mean())


def test_rows_in_chunks_are_the_same(monkeypatch):
    site = EmbeddingSite(tiny_model())
    rows, norm = site.rows(), site.mean_row_norm()
    monkeypatch.setattr(embeddings, "_CHUNK", 7)
    assert torch.equal(site.rows(), rows)
    torch.testing.assert_close(site.mean_row_norm(), norm)


def test_rows_of_bfloat16_are_measured_in_float32():
    model = tiny_model().bfloat16()
    site = EmbeddingSite(model)
    assert site.rows().dtype == torch.bfloat16
    expected = model.get_input_embeddings().weight.detach().float().norm(dim=-1).mean()
    torch.testing.assert_close(site.mean_row_norm(), expected)


def test_rows_see_no_foreign_hooks():
    # NEFTune adds noise by a forward hook on the embeddings of a model in training mode
    model = tiny_model()
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output + torch.randn_like(output))
    torch.testing.assert_close(EmbeddingSite(model).rows(), model.get_input_embeddings().weight.detach())


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"trainable_token_indices": {"embed_tokens": [5, 6]}},
    ],
    ids=["lora", "modules_to_save", "lora_on_embeddings", "trainable_tokens"],
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
def test_embeddings_below_peft(config, tied):
    model = with_lora(tiny_model(tie_word_embeddings=tied), **config).eval()
    with torch.no_grad():  # what training would do: the adapter's copy departs from the base
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    batch, site = tiny_batch(), EmbeddingSite(model)
    delta = noise(batch)
    expected_rows = model.get_input_embeddings()(torch.arange(61).view(1, -1))[0].detach()
    torch.testing.assert_close(site.rows(), expected_rows)
    base = tiny_model(tie_word_embeddings=tied).get_input_embeddings().weight
    assert torch.equal(expected_rows, base) == (config == {})
    with site.add(delta):
        logits = model(**inputs_of(batch)).logits
        torch.testing.assert_close(
            label_logits(model, index_of(batch), **inputs_of(batch)), picked(logits, batch["labels"])
        )
    torch.testing.assert_close(logits, forward_at(model, batch, delta))
    with model.disable_adapter():
        torch.testing.assert_close(site.rows(), base.detach())


def test_tied_weights_see_no_perturbation_in_the_head():
    model, batch = tiny_model(tie_word_embeddings=True).eval(), tiny_batch()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    weight = model.lm_head.weight.detach().clone()
    with EmbeddingSite(model).add(noise(batch)):
        logits = model(**inputs_of(batch)).logits
    torch.testing.assert_close(logits, forward_at(model, batch, noise(batch)))
    assert torch.equal(model.lm_head.weight, weight)


def test_delta_is_cast_to_the_dtype_of_the_embeddings():
    model, batch = tiny_model().bfloat16().eval(), tiny_batch()
    delta = noise(batch).requires_grad_()
    with EmbeddingSite(model).add(delta):
        logits = model(**inputs_of(batch)).logits
    assert logits.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(logits.float().sum(), delta)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(3, 9, 16), (1, 10, 16), (3, 10, 8), (10, 16)])
def test_another_shape_is_refused(shape):
    # (1, 10, 16) would broadcast silently
    model, batch = tiny_model(), tiny_batch()
    hooks = hook_count(model)
    with pytest.raises(ValueError) as caught, EmbeddingSite(model).add(torch.zeros(shape)):
        model(**inputs_of(batch))
    assert (
        "`delta`" in str(caught.value) and str(tuple(shape)) in str(caught.value) and "(3, 10, 16)" in str(caught.value)
    )
    assert hook_count(model) == hooks


def test_hook_goes_also_after_an_exception():
    model, batch = tiny_model(), tiny_batch()
    hooks = hook_count(model)
    with pytest.raises(RuntimeError, match="inside"), EmbeddingSite(model).add(noise(batch)):
        assert hook_count(model) == hooks + 1
        raise RuntimeError("inside")
    assert hook_count(model) == hooks


class _NoEmbeddings(nn.Linear):
    def get_input_embeddings(self):
        raise NotImplementedError


@pytest.mark.parametrize("model", [nn.Linear(2, 2), _NoEmbeddings(2, 2)])
def test_a_model_without_embeddings_is_refused(model):
    with pytest.raises(ValueError, match=r"`model` \(.*\) has no input embeddings.*unwrapped text model"):
        EmbeddingSite(model)


def test_an_embedding_module_without_a_table():
    class Projected(nn.Module):
        def get_input_embeddings(self):
            return nn.Linear(4, 4)

    with pytest.raises(ValueError, match="`epsilon_relative=False`"):
        EmbeddingSite(Projected()).mean_row_norm()


# LabelIndex and label_logits


def test_label_index_by_hand():
    labels = torch.tensor([[9, -100, 3, 0], [-100, -100, -100, 5], [-100, -100, -100, -100]])
    index = LabelIndex.from_labels(labels)
    # Row 0: label 3 at t=2 and token id 0 at t=3, predicted at 1 and 2; the label at t=0 predicts from nothing.
    # Row 1: t=3, predicted at 2, flat 4 + 2. Row 2: none.
    assert index.flat.tolist() == [1, 2, 6]
    assert index.targets.tolist() == [3, 0, 5]
    assert index.rows.tolist() == [0, 0, 1]
    assert index.counts.tolist() == [2, 1, 0]
    assert index.shape == (3, 4)


@contextlib.contextmanager
def head_inputs(model: nn.Module):
    """Shapes of the states that reach the head."""
    shapes = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda m, args, out: shapes.append(tuple(args[0].shape))
    )
    yield shapes
    handle.remove()


@all_architectures
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_label_logits_are_those_of_the_full_forward(name, side, lora):
    model, batch = tiny_model(name), tiny_batch(side=side)
    model = (with_lora(model) if lora else model).eval()
    assert (batch["labels"] == 0).any()
    index, hooks = index_of(batch), hook_count(model)
    with head_inputs(model) as shapes:
        logits = label_logits(model, index, **inputs_of(batch))
    assert shapes == [(1, len(index.targets), 16)]  # the head ran on the label positions only
    assert logits.dtype == torch.float32 and hook_count(model) == hooks
    torch.testing.assert_close(logits, picked(model(**inputs_of(batch)).logits, batch["labels"]))
    assert index.targets.tolist() == [x for row in batch["labels"].tolist() for x in row if x != -100]


@pytest.mark.parametrize(
    "config",
    [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}],
    ids=["saved", "lora"],
)
def test_label_logits_with_an_adapter_on_the_head(config):
    model, batch = with_lora(tiny_model(), **config).eval(), tiny_batch()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    with head_inputs(model) as shapes:
        logits = label_logits(model, index_of(batch), **inputs_of(batch))
    assert shapes == [(1, len(logits), 16)]
    torch.testing.assert_close(logits, picked(model(**inputs_of(batch)).logits, batch["labels"]))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_label_logits_of_a_model_with_a_fused_head(lora):
    from trl.trainer.utils import add_fused_lm_head

    model, batch = tiny_model().eval(), tiny_batch()
    add_fused_lm_head(model)  # as SFTTrainer and DPOTrainer do, before PEFT
    model = with_lora(model).eval() if lora else model
    with head_inputs(model) as shapes:
        logits = label_logits(model, index_of(batch), **inputs_of(batch))
    assert shapes == [(1, len(logits), 16)]
    torch.testing.assert_close(logits, picked(model(**inputs_of(batch)).logits, batch["labels"]))
    fused = model(**batch, fused_lm_head=True).log_probs
    torch.testing.assert_close(
        logits.log_softmax(-1)[torch.arange(len(logits)), index_of(batch).targets],
        fused[batch["labels"][:, 1:] != -100],
    )


def test_label_logits_keep_what_follows_the_head():
    model, batch = tiny_model("gemma3", final_logit_softcapping=0.05).eval(), tiny_batch()
    logits = label_logits(model, index_of(batch), **inputs_of(batch))
    assert logits.abs().max() <= 0.05
    torch.testing.assert_close(logits, picked(model(**inputs_of(batch)).logits, batch["labels"]))


class _Head(nn.Module):
    """A head that the model calls, around the linear layer that it reports as its output embeddings."""

    def __init__(self, linear: nn.Module, how: str):
        super().__init__()
        self.linear, self.how = linear, how

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if self.how == "weight only":
            return nn.functional.linear(states, self.linear.weight)
        if self.how == "keyword":
            return self.linear(input=states)
        return self.linear(states.flatten(0, 1)).view(*states.shape[:2], -1)


@pytest.mark.parametrize("how", ["no head", "weight only", "keyword", "flat states"])
def test_label_logits_fall_back_on_all_logits(how, monkeypatch):
    model, batch = tiny_model().eval(), tiny_batch()
    expected, linear = picked(model(**inputs_of(batch)).logits, batch["labels"]), model.lm_head
    if how != "no head":
        model.lm_head = _Head(linear, how)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None if how == "no head" else linear)
    logits = label_logits(model, index_of(batch), **inputs_of(batch))
    assert hook_count(model) == 0
    torch.testing.assert_close(logits, expected)


class _Wrapper(nn.Module):
    """As DDP and DeepSpeed wrap: the model is `module`, other attributes are not passed on."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


def test_label_logits_of_a_wrapped_model():
    model, batch = tiny_model().eval(), tiny_batch()
    with head_inputs(model) as shapes:
        logits = label_logits(_Wrapper(model), index_of(batch), **inputs_of(batch))
    assert shapes == [(1, len(logits), 16)]
    torch.testing.assert_close(logits, label_logits(model, index_of(batch), **inputs_of(batch)))


def test_label_logits_without_labels():
    model, batch = tiny_model().eval(), tiny_batch()
    index = LabelIndex.from_labels(torch.full_like(batch["labels"], -100))
    assert label_logits(model, index, **inputs_of(batch)).shape == (0, 61)


def test_label_logits_of_bfloat16_are_float32():
    model, batch = tiny_model().bfloat16().eval(), tiny_batch()
    assert label_logits(model, index_of(batch), **inputs_of(batch)).dtype == torch.float32


def test_label_logits_carry_the_gradient_of_the_full_forward():
    model, batch = tiny_model().eval(), tiny_batch()
    site, index, grads = EmbeddingSite(model), index_of(batch), []
    for compute in (
        lambda: label_logits(model, index, **inputs_of(batch)),
        lambda: picked(model(**inputs_of(batch)).logits, batch["labels"]),
    ):
        delta = noise(batch).requires_grad_()
        with site.add(delta):
            grads.append(torch.autograd.grad(compute().square().sum(), delta)[0])
    torch.testing.assert_close(*grads)


def test_label_logits_hook_goes_also_after_an_exception(monkeypatch):
    model, batch = tiny_model(), tiny_batch()

    def broken(*args, **kwargs):
        raise RuntimeError("inside")

    monkeypatch.setattr(model.model, "forward", broken)
    with pytest.raises(RuntimeError, match="inside"):
        label_logits(model, index_of(batch), **inputs_of(batch))
    assert hook_count(model) == 0


def test_adapters_that_add_positions_are_refused():
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny_model(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    batch = tiny_batch()
    with pytest.raises(ValueError, match=r"`model` \(PeftModel.*\(3, 13, 61\).*use LoRA"):
        label_logits(model, index_of(batch), **inputs_of(batch))
    assert hook_count(model) == 0


# quiet


def checkpoint(model: nn.Module, **kwargs) -> nn.Module:
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False}, **kwargs)
    return model


@all_architectures
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_quiet_silences_every_dropout(name, attention, checkpointing):
    model, batch = tiny_model(name, attention_dropout=0.5), tiny_batch()
    model.set_attn_implementation(attention)
    if checkpointing:
        checkpoint(model)
    forward = lambda: model(**inputs_of(batch), use_cache=False).logits.detach()  # noqa: E731
    modes = modes_of(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # OPT's layer drop may skip the same layers by chance: several draws
        assert any(not torch.equal(forward(), forward()) for _ in range(5)), "the test model has no dropout"
    random_state = torch.get_rng_state()
    with quiet(model):
        first, second = forward(), forward()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert modes_of(model) == modes
    assert torch.equal(first, second)
    torch.testing.assert_close(first, model.eval()(**inputs_of(batch), use_cache=False).logits.detach())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_quiet_silences_adapters_and_neftune(checkpointing):
    model = with_lora(tiny_model(), lora_dropout=0.5)
    batch = tiny_batch()
    if checkpointing:
        checkpoint(model)

    def neftune(module, args, output):
        return output + torch.rand_like(output) if module.training else output

    model.get_input_embeddings().register_forward_hook(neftune)
    forward = lambda: model(**inputs_of(batch), use_cache=False).logits.detach()  # noqa: E731
    with quiet(model):
        first, second = forward(), forward()
    assert torch.equal(first, second)
    torch.testing.assert_close(first, model.eval()(**inputs_of(batch), use_cache=False).logits.detach())


@all_architectures
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_checkpointing_stays_on_in_quiet(name, lora):
    model, batch = tiny_model(name, attention_dropout=0.5), tiny_batch()
    model = checkpoint(with_lora(model) if lora else model)
    delta = noise(batch).requires_grad_()
    inner = next(module for path, module in model.named_modules() if path.endswith((".mlp", ".fc1")))
    calls = []
    handle = inner.register_forward_pre_hook(lambda module, args: calls.append(1))
    with quiet(model), EmbeddingSite(model).add(delta):
        logits = model(**inputs_of(batch), use_cache=False).logits
        assert len(calls) == 1
        (grad,) = torch.autograd.grad(logits.square().sum(), delta)
        assert len(calls) == 2, "nothing was recomputed: checkpointing is off"
    handle.remove()
    model.eval()
    with EmbeddingSite(model).add(delta):
        logits = model(**inputs_of(batch), use_cache=False).logits
        (expected,) = torch.autograd.grad(logits.square().sum(), delta)
    torch.testing.assert_close(grad, expected)


def test_quiet_with_some_layers_checkpointed():
    model, batch = checkpoint(tiny_model(attention_dropout=0.5), every_n_layers=2), tiny_batch()
    assert {layer.gradient_checkpointing for layer in model.model.layers} == {False, True}
    forward = lambda: model(**inputs_of(batch), use_cache=False).logits.detach()  # noqa: E731
    with quiet(model):
        assert torch.equal(forward(), forward())


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_quiet_puts_mixed_modes_back_also_after_an_exception(name, checkpointing):
    model = tiny_model(name, attention_dropout=0.5)
    if checkpointing:
        checkpoint(model)
    list(model.modules())[-3].eval()  # a user's own frozen part must stay in its mode
    modes = modes_of(model)
    with pytest.raises(RuntimeError, match="inside"), quiet(model):
        assert modes_of(model) != modes
        raise RuntimeError("inside")
    assert modes_of(model) == modes


def test_quiet_changes_nothing_in_evaluation_mode():
    model = checkpoint(tiny_model("opt", attention_dropout=0.5)).eval()
    modes = modes_of(model)
    with quiet(model):
        assert modes_of(model) == modes
    assert modes_of(model) == modes


def test_quiet_may_be_nested():
    model = tiny_model("opt", attention_dropout=0.5)
    modes = modes_of(model)
    with quiet(model):
        inside = modes_of(model)
        with quiet(model):
            assert modes_of(model) == inside
        assert modes_of(model) == inside
    assert modes_of(model) == modes


# check_not_reentrant


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_reentrant_checkpointing_is_refused(lora):
    model = tiny_model()
    model = with_lora(model) if lora else model
    check_not_reentrant(model)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="`use_reentrant=True`.*'use_reentrant': False"):
        check_not_reentrant(model)
    check_not_reentrant(model.eval())  # no activation is checkpointed in evaluation mode
    check_not_reentrant(checkpoint(model.train()))


def test_embeddings_that_zero3_has_gathered_are_read_as_they_are():
    """DeepSpeed forbids to split a weight that a micro-batch's backward pass has left whole."""
    model = tiny_model()
    site = EmbeddingSite(model)
    clean = site.mean_row_norm()
    site.module.weight.ds_id = 0  # as DeepSpeed marks its parameters; a shard is empty
    with mock.patch.dict(sys.modules, {"deepspeed": None}):
        assert site.mean_row_norm() == clean


def test_adapter_off_leaves_what_is_trained_inside_and_afterwards():
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    frozen = next(name for name, _ in model.named_parameters() if "q_proj.lora_A" in name)
    model.get_parameter(frozen).requires_grad_(False)  # the user's wish, which PEFT's own context forgets
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * ("lora_B" in name))
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    batch = inputs_of(tiny_batch())
    with adapter_off(model):
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
        without = model(**batch).logits
    torch.testing.assert_close(without, tiny_model()(**batch).logits)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
    assert not torch.allclose(model(**batch).logits, without)


def test_adapter_off_puts_back_what_is_trained_after_an_error():
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(RuntimeError, match="^of the user$"), adapter_off(model):
        raise RuntimeError("of the user")
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained


def test_adapter_off_of_an_adapter_that_wraps_modules():
    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM")
    model, batch = get_peft_model(tiny_model(), config).eval(), inputs_of(tiny_batch())
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with adapter_off(model):
        torch.testing.assert_close(model(**batch).logits, tiny_model().eval()(**batch).logits)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
