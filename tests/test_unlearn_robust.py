"""The robust forms of unlearning: the forget loss under perturbed weights, hidden states or embeddings."""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_robust.attacks import WeightAttack
from hf_robust.objectives import per_row_mean, token_nll
from hf_robust.sites import LabelIndex, label_logits, perturbed_weights
from hf_robust.threats import initial
from hf_robust.trainers.schedule import start_seed
from hf_robust.trainers.unlearn import UnlearnTrainer
from hf_robust.trainers.unlearn_config import UnlearnConfig
from hf_robust.trainers.unlearn_robust import Perturbation, RobustArguments, WeightPerturbation, make_perturbation
from tests.engine_helpers import state_of, with_lora
from tests.helpers import tiny_batch, tiny_model
from tests.memory import peak_bytes
from tests.trainer_data import (
    adversarial_rows,
    logged,
    lora,
    max_difference,
    settings,
    tiny_tokenizer,
    train,
    utility_rows,
    weights,
)

FORMS = {
    "sam": {"sam_rho": 0.5},
    "smooth": {"smooth_rho": 0.02},
    "latent": {"latent_layer": 0, "latent_epsilon": 0.5},
    "embedding": {"attack_epsilon": 0.5},
}


def _stub(form: str = "sam", seed: int = 0) -> Any:
    """What a perturbation needs of a trainer, on one process."""
    return SimpleNamespace(
        accelerator=Accelerator(cpu=True),
        compute_loss_context_manager=contextlib.nullcontext,
        _stopwatch=contextlib.nullcontext(),
        _no_sync=lambda model: contextlib.nullcontext(),
        args=SimpleNamespace(seed=seed, robust=form),
    )


def _forget(batch: dict[str, torch.Tensor]) -> Callable[[nn.Module], torch.Tensor]:
    """GradDiff's forget loss: minus the cross-entropy."""
    return lambda model: -_recall(model, batch).mean()


def _recall(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of each row."""
    index = LabelIndex.from_labels(batch["labels"])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = label_logits(model, index, **inputs)
    return per_row_mean(token_nll(logits, index.targets), index.rows, index.counts)


def _gradients(model: nn.Module) -> list[torch.Tensor | None]:
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def _close(left: list[torch.Tensor | None], right: list[torch.Tensor | None], **tolerance: float) -> bool:
    return all(a is b is None or torch.allclose(a, b, **tolerance) for a, b in zip(left, right, strict=True))


def _step(
    form: str, model: nn.Module, batches: list[dict[str, torch.Tensor]], step: int = 0, **fields: Any
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The loss and the gradients of one optimizer step, whose micro-batches share its mean."""
    trainer = _stub(form)
    perturbation = make_perturbation(RobustArguments(robust=form, **{**FORMS.get(form, {}), **fields}), model)
    losses = [lambda m, batch=batch: _forget(batch)(m) / len(batches) for batch in batches]
    perturbation.start(trainer, model, losses, step=step)
    values = [perturbation.backward(trainer, model, loss, batch) for loss, batch in zip(losses, batches, strict=True)]
    return torch.stack(values).sum(), _gradients(model)


# ---- SAM and smoothing ----


def test_sam_is_the_gradient_at_the_worst_weights() -> None:
    model, batch = tiny_model(), tiny_batch()
    value, found = _step("sam", model, [batch])
    loss = _forget(batch)(model)
    loss.backward()
    length = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    deltas = [0.5 * p.grad / length for p in model.parameters()]
    model.zero_grad()
    with perturbed_weights(model, deltas):
        expected = _forget(batch)(model)
        expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5) and value > loss
    assert _close(found, _gradients(model), rtol=1e-4, atol=1e-6)


def test_smoothing_is_the_mean_over_random_weights() -> None:
    model, batch = tiny_model(), tiny_batch()
    value, found = _step("smooth", model, [batch], step=4)
    attack, seeds = WeightAttack(rho=0.02, kind="random"), [start_seed(start_seed(0, 4, 0), k, 0) for k in range(3)]
    losses = []
    for seed in seeds:
        with perturbed_weights(model, attack.search(model, seed=seed).deltas):
            losses.append(_forget(batch)(model))
            (losses[-1] / 3).backward()
    assert len({loss.item() for loss in losses}) == 3
    assert value.item() == pytest.approx(sum(loss.item() for loss in losses) / 3, rel=1e-5)
    assert _close(found, _gradients(model), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", ["sam", "smooth"])
def test_a_step_is_the_same_in_one_micro_batch_or_in_two(form: str) -> None:
    model, batch = tiny_model(), tiny_batch(batch=4)
    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 2), slice(2, 4))]
    whole, expected = _step(form, model, [batch])
    split, found = _step(form, model, halves)
    assert split.item() == pytest.approx(whole.item(), rel=1e-5)
    assert _close(found, expected, rtol=1e-4, atol=1e-6)


def test_gradients_add_to_those_that_are_there() -> None:
    model, batch = tiny_model(), tiny_batch()
    _, alone = _step("sam", model, [batch])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    _, found = _step("sam", model, [batch])
    assert _close(found, [None if g is None else g + 1 for g in alone], atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fails", [False, True])
def test_a_step_leaves_only_gradients(form: str, fails: bool) -> None:
    model, batch = with_lora(tiny_model()), tiny_batch()
    before = state_of(model)
    trainer = _stub(form)
    perturbation = make_perturbation(RobustArguments(robust=form, **FORMS[form]), model)
    perturbation.start(trainer, model, [_forget(batch)], step=0)

    def broken(model: nn.Module) -> torch.Tensor:
        _forget(batch)(model)
        raise RuntimeError("stop")

    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            perturbation.backward(trainer, model, broken, batch)
    else:
        perturbation.backward(trainer, model, _forget(batch), batch)
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        model.zero_grad()
    assert state_of(model) == before


def test_sam_keeps_one_copy_of_the_trained_weights_and_frees_it() -> None:
    model = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(8)])
    copy = sum(p.numel() * p.element_size() for p in model.parameters())
    rows, trainer = torch.ones(2, 256), _stub()
    losses = [lambda model: model(rows).square().sum()] * 2
    perturbation = WeightPerturbation(WeightAttack(rho=0.1))

    def plain() -> None:
        for loss in losses:
            trainer.accelerator.backward(loss(model))
        model.zero_grad()

    def sam() -> None:
        perturbation.start(trainer, model, losses, step=0)
        for loss in losses:
            perturbation.backward(trainer, model, loss, {})
        model.zero_grad()

    plain(), sam()
    base, peak = peak_bytes(plain), peak_bytes(sam)
    assert base >= copy
    assert peak - base <= 1.01 * copy
    assert perturbation._values is None


def test_an_adapter_of_a_frozen_base_costs_its_own_size() -> None:
    model, batch = with_lora(tiny_model()), tiny_batch()
    frozen = {name: p.data_ptr() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = _stub()
    perturbation = make_perturbation(RobustArguments(robust="sam", sam_rho=0.5), model)
    perturbation.start(trainer, model, [_forget(batch)], step=0)
    held = sum(value.numel() for value in perturbation._values if value is not None)
    assert held == sum(p.numel() for p in model.parameters() if p.requires_grad)

    def loss(model: nn.Module) -> torch.Tensor:
        assert {name: p.data_ptr() for name, p in model.named_parameters() if not p.requires_grad} == frozen
        return _forget(batch)(model)

    perturbation.backward(trainer, model, loss, batch)


def test_sam_without_a_direction_takes_the_plain_gradient() -> None:
    model, batch = tiny_model(), tiny_batch()
    trainer, perturbation = _stub(), WeightPerturbation(WeightAttack(rho=0.5))
    perturbation.start(trainer, model, [lambda m: _forget(batch)(m) * float("inf")], step=0)
    perturbation.backward(trainer, model, _forget(batch), batch)
    found = _gradients(model)
    _forget(batch)(model).backward()
    assert _close(found, _gradients(model), rtol=0, atol=0)
    assert perturbation.meters.read(trainer.accelerator)["perturbation_non_finite"] == 1


def test_weights_in_half_precision_that_round_the_perturbation_away_are_reported(caplog: Any) -> None:
    batch, trainer = tiny_batch(), _stub()
    for dtype, warns in ((torch.float32, False), (torch.bfloat16, True)):
        caplog.clear()
        model = tiny_model().to(dtype)
        perturbation = WeightPerturbation(WeightAttack(rho=1e-5))
        with caplog.at_level(logging.WARNING):
            perturbation.start(trainer, model, [_forget(batch)], step=0)
        assert ("`sam_rho=1e-05`" in caplog.text) == warns


def test_random_shifts_that_rounding_leaves_out_are_reported(caplog: Any) -> None:
    batch, trainer = tiny_batch(), _stub()
    for dtype, rho, warns in ((torch.float32, 1e-4, False), (torch.bfloat16, 1e-4, True), (torch.bfloat16, 0.1, False)):
        caplog.clear()
        model = tiny_model(initializer_range=0.5).to(dtype)
        perturbation = WeightPerturbation(WeightAttack(rho=rho, kind="random"))
        with caplog.at_level(logging.WARNING):
            for step in range(2):
                perturbation.start(trainer, model, [_forget(batch)], step=step)
                perturbation.backward(trainer, model, _forget(batch), batch)
        assert caplog.text.count("`smooth_rho=0.0001`") == warns


def test_backward_needs_start() -> None:
    perturbation = WeightPerturbation(WeightAttack())
    with pytest.raises(RuntimeError, match="call `start`"):
        perturbation.backward(_stub(), tiny_model(), lambda model: torch.zeros(()), {})


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_sharded_weights_are_refused(kind: str) -> None:
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType[kind])
    with pytest.raises(ValueError, match=f"`robust='sam'` perturbs whole weights, which {kind}"):
        make_perturbation(RobustArguments(robust="sam"), tiny_model(), accelerator)
    assert make_perturbation(RobustArguments(robust="sam", sam_rho=0.0), tiny_model(), accelerator).is_off
    latent = RobustArguments(robust="latent", latent_layer=0)
    assert not make_perturbation(latent, tiny_model(), accelerator).is_off


def test_backward_under_deepspeed_is_that_of_the_trainer() -> None:
    """It neither divides by the accumulation steps once more nor steps where another backward follows."""
    events: list[Any] = []

    @contextlib.contextmanager
    def no_sync(model: nn.Module) -> Any:
        events.append("no_sync")
        yield

    trainer = _stub()
    trainer._no_sync = no_sync
    trainer.accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, backward=lambda loss, **kwargs: events.append(kwargs)
    )
    for sync in (False, True):
        Perturbation().backward(trainer, tiny_model(), lambda model: torch.ones(()), {}, sync=sync)
    assert events == ["no_sync", {"scale_wrt_gas": False}, {"scale_wrt_gas": False}]


# ---- Hidden states and embeddings ----


@pytest.mark.parametrize("form", ["latent", "embedding"])
@pytest.mark.parametrize("labelled", ["completion", "all"])
def test_the_attack_makes_the_model_recall_more_than_chance_does(form: str, labelled: str) -> None:
    model, batch = tiny_model(), tiny_batch()
    if labelled == "all":
        batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    value, _ = _step(form, model, [batch])
    attack = RobustArguments(robust=form, **FORMS[form]).build_attack()
    site = attack.site(model)
    mask = attack.attacked_positions(batch["attention_mask"], batch["labels"])
    assert (mask.sum(dim=1) > 0).all() and not (mask & ~batch["attention_mask"].bool()).any()
    if labelled == "completion":
        assert not (mask & (batch["labels"] != -100)).any()
    else:
        assert torch.equal(mask, batch["attention_mask"].bool())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        clean = _recall(model, batch).mean().item()
        by_chance = []
        for _ in range(5):
            shape = (*batch["input_ids"].shape, *site.shape)
            delta = initial(shape, attack.radius(site), "l2_token", "random", device="cpu", generator=generator)
            with site.add(delta * mask.view(*mask.shape, *[1] * len(site.shape))):
                by_chance.append(_recall(model, batch).mean().item())
    assert -value.item() < clean - 5 * max(abs(chance - clean) for chance in by_chance)


def test_gradients_are_those_under_the_perturbation_that_was_found() -> None:
    model, batch = tiny_model(), tiny_batch()
    _, found = _step("latent", model, [batch])
    attack = RobustArguments(robust="latent", **FORMS["latent"]).build_attack()
    with attack.site(model).add(attack.perturb(model, **batch)):
        _forget(batch)(model).backward()
    assert _close(found, _gradients(model), rtol=1e-5, atol=1e-7)


def test_the_latent_attack_reaches_what_rmu_reads(tmp_path: Path) -> None:
    """Also behind the same layer, as by default; padding is left alone."""
    layers = {"activation_layer": 7, "latent_layer": 7, "max_steps": 1, "learning_rate": 1.0}

    def run(**args: Any) -> dict[str, torch.Tensor]:
        return train(_trainer(tiny_model(num_hidden_layers=8), tmp_path, loss_type="rmu", **{**layers, **args}))

    plain = run()
    assert max_difference(run(robust="latent", latent_steps=2), plain) > 1e-5
    assert max_difference(run(robust="latent", latent_steps=2, latent_layer=-1), plain) > 1e-5
    assert max_difference(run(robust="latent", latent_steps=0, activation_layer=3), run(activation_layer=3)) == 0
    config = UnlearnConfig(**settings(tmp_path, loss_type="rmu", robust="latent"))
    assert config.latent_layer == config.activation_layer == 7
    batch = tiny_batch()
    mask = config.build_attack().attacked_positions(batch["attention_mask"], batch["labels"])
    assert torch.equal(mask, batch["attention_mask"].bool())
    for latent in (4, -1):
        with pytest.raises(ValueError, match=f"`latent_layer={latent}` lies behind `activation_layer=3`"):
            run(robust="latent", latent_layer=latent, activation_layer=3)


def test_the_latent_attack_is_that_of_the_paper() -> None:
    attack = RobustArguments(robust="latent").build_attack()
    assert (attack.norm, attack.epsilon, attack.steps, attack.step_rule, attack.layers) == (
        "l2_token", 2.0, 16, "adam", [7],
    )  # fmt: skip
    model, batch = tiny_model(), tiny_batch()
    found = RobustArguments(robust="latent", **FORMS["latent"]).build_attack().search(model, **batch)
    lengths = found.delta.norm(dim=-1)
    assert lengths.max().item() <= 0.5 * 1.0001 and (lengths > 0.4).any()


# ---- Configuration ----


@pytest.mark.parametrize(
    "fields",
    [
        {"robust": "none"},
        {"robust": "sam", "sam_rho": 0.0},
        {"robust": "smooth", "smooth_rho": 0.0},
        {"robust": "latent", "latent_epsilon": 0.0},
        {"robust": "latent", "latent_steps": 0},
        {"robust": "embedding", "attack_epsilon": 0.0},
        {"robust": "embedding", "attack_steps": 0},
    ],
)
def test_without_radius_or_steps_it_is_off_and_the_plain_gradient(fields: dict[str, Any]) -> None:
    model, batch = tiny_model(), tiny_batch()
    perturbation = make_perturbation(RobustArguments(**fields), model)
    assert perturbation.is_off and type(perturbation) is Perturbation
    changes = {name: value for name, value in fields.items() if name != "robust"}
    value, found = _step(fields["robust"], model, [batch], **changes)
    expected = _forget(batch)(model)
    expected.backward()
    assert value == expected.detach()
    assert _close(found, _gradients(model), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"robust": "sharp"}, "`robust='sharp'` is unknown"),
        ({"sam_rho": -1}, "`sam_rho=-1`"),
        ({"smooth_rho": float("nan")}, "`smooth_rho=nan`"),
        ({"smooth_samples": 0}, "`smooth_samples=0`"),
        ({"latent_epsilon": -1.0}, "`latent_epsilon=-1.0`"),
        ({"latent_steps": 1.5}, "`latent_steps=1.5`"),
        ({"latent_layer": "7"}, "`latent_layer='7'`"),
        ({"attack_epsilon": "big"}, "`attack_epsilon='big'`"),
        ({"attack_steps": -1}, "`attack_steps=-1`"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RobustArguments(**fields)


def test_bad_models() -> None:
    with pytest.raises(ValueError, match=r"`latent_layer=7`: the model has layers 0 to 1"):
        make_perturbation(RobustArguments(robust="latent"), tiny_model())
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        make_perturbation(RobustArguments(robust="sam"), tiny_model().requires_grad_(False))


# ---- In the trainer ----


def _trainer(model: nn.Module, folder: Path, given: dict[str, Any] | None = None, **args: Any) -> UnlearnTrainer:
    rows = adversarial_rows(16)
    forget = Dataset.from_list([{"prompt": row["prompt"], "completion": row["rejected"]} for row in rows])
    fields = {"latent_layer": 0, **FORMS.get(args.get("robust", "none"), {})}
    config = UnlearnConfig(**settings(folder, **{**fields, "max_steps": 2, **args}))
    return UnlearnTrainer(
        model,
        config,
        forget_dataset=forget,
        retain_dataset=utility_rows(),
        processing_class=tiny_tokenizer(),
        **(given or {}),
    )


@pytest.fixture(scope="module")
def plain_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return train(_trainer(tiny_model(), tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize("form", FORMS)
def test_training_differs_from_plain_and_not_by_accumulation(form: str, plain_weights: Any, tmp_path: Path) -> None:
    whole = train(_trainer(tiny_model(), tmp_path, robust=form))
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    parts = train(_trainer(tiny_model(), tmp_path, robust=form, **split))
    assert max_difference(whole, plain_weights) > 1e-4
    assert max_difference(whole, parts) < 2e-6


@pytest.mark.parametrize("form", FORMS)
def test_radius_zero_is_plain_training_bit_for_bit(form: str, plain_weights: Any, tmp_path: Path) -> None:
    radius = next(name for name in FORMS[form] if name.endswith(("rho", "epsilon")))
    assert max_difference(train(_trainer(tiny_model(), tmp_path, robust=form, **{radius: 0.0})), plain_weights) == 0


@pytest.mark.parametrize("loss_type", ["grad_diff", "npo", "simnpo", "rmu", "undial", "ce_u"])
@pytest.mark.parametrize("form", ["sam", "latent"])  # what the other two forms do is the same for every loss
def test_every_loss_in_a_form_of_each_kind(loss_type: str, form: str, tmp_path: Path) -> None:
    adapter = {} if loss_type == "rmu" else {"peft_config": lora()}
    extra = {"activation_layer": 1} if loss_type == "rmu" else {}
    args = {"robust": form, "loss_type": loss_type, "max_steps": 1}
    args |= {"latent_steps": 2} if form == "latent" else {}
    trainer = _trainer(tiny_model(), tmp_path, adapter, **args, **extra)
    before = weights(trainer.model)
    after = train(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(("lora_" if adapter else "down_proj") in name for name in changed)
    assert all(value.isfinite().all() for value in after.values())
    assert logged(trainer, "perturbation_non_finite") == [0.0]


@pytest.mark.parametrize("form", ["sam", "latent"])
def test_optimizers_are_in_training_mode_before_the_perturbation(form: str, tmp_path: Path) -> None:
    """Schedule-free ones hold other weights in evaluation."""
    events: list[str] = []

    class Recorded(torch.optim.SGD):
        def train(self) -> None:
            events.append("train")

    model = tiny_model()
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: events.append("forward"))
    optimizer = Recorded(model.parameters(), lr=0.1)
    train(
        _trainer(model, tmp_path, {"optimizers": (optimizer, None)}, robust=form, loss_type="rmu", activation_layer=1)
    )
    assert events[0] == "train" and "forward" in events


@pytest.mark.parametrize("form", ["sam", "latent"])
def test_recomputed_activations_meet_the_same_perturbation(form: str, tmp_path: Path) -> None:
    kept = train(_trainer(tiny_model(), tmp_path, robust=form))
    recompute = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    assert max_difference(train(_trainer(tiny_model(), tmp_path, robust=form, **recompute)), kept) < 1e-6


def test_four_bit_base_under_sam(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    tiny_model("llama", **sizes).save_pretrained(tmp_path)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=four_bits, device_map={"": "cpu"})
    trainer = _trainer(model, tmp_path, {"peft_config": lora()}, robust="sam", max_steps=1)
    layers = [m for m in trainer.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    packed = [layer.weight.detach().clone() for layer in layers]
    before = weights(trainer.model)
    after = train(trainer)
    assert layers and all(torch.equal(old, layer.weight) for old, layer in zip(packed, layers, strict=True))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("lora_" in name for name in changed)
