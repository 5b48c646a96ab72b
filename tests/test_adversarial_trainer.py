"""AdversarialTrainer: steps, invariances, what it logs, saves, evaluates and refuses."""

import json
import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType
from datasets import ClassLabel, Dataset
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTImageProcessor,
)

from hf_robust import AdversarialConfig, AdversarialTrainer
from hf_robust.attacks.vision import PGD
from hf_robust.attacks.vision.ball import PixelBall
from hf_robust.cli import main
from hf_robust.objectives.adversarial_training import mart_loss, trades_loss
from hf_robust.sites import EmbeddingSite
from hf_robust.trainers import adversarial_evaluation
from hf_robust.trainers.adversarial_checks import check_parallelism
from hf_robust.trainers.adversarial_inputs import ImageInputs
from hf_robust.trainers.adversarial_proximal import MomentumBregman
from hf_robust.trainers.adversarial_recipes import LOSS_TYPES, RECIPES
from hf_robust.trainers.adversarial_search import InputSearch
from tests.adversarial_data import (
    MEAN,
    STD,
    adversarial_trainer,
    image_rows,
    processor,
    settings,
    text_rows,
    tiny_classifier,
)
from tests.trainer_data import logged, max_difference, tiny_tokenizer, train, weights

IMAGE_TYPES = tuple(name for name, recipe in RECIPES.items() if not recipe.text_only)
EPSILONS = {"linf": 0.05, "l2": 0.5, "l1": 3.0, "l2_token": 0.1}


def refused(*parts: str) -> Any:
    return pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts)))


def eager(loss_type: str, name: str) -> dict[str, Any]:
    return {"attn_implementation": "eager"} if loss_type == "grad_align" and name != "resnet" else {}


def batch_of(trainer: AdversarialTrainer) -> dict[str, Any]:
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


class Searches:
    """Keeps what every inner search of a trainer found."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.deltas: list[torch.Tensor] = []
        run = InputSearch.run

        def spy(search: InputSearch, *args: Any, **kwargs: Any) -> Any:
            found = run(search, *args, **kwargs)
            self.deltas.append(found.delta)
            return found

        monkeypatch.setattr(InputSearch, "run", spy)


# ---- Training ----


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("loss_type", IMAGE_TYPES)
def test_every_image_method_takes_a_step_in_every_norm(loss_type: str, norm: str, tmp_path: Path):
    model = tiny_classifier("vit", **eager(loss_type, "vit"))
    before = weights(model)
    after = train(adversarial := adversarial_trainer(
        model, tmp_path, loss_type=loss_type, norm=norm, epsilon=EPSILONS[norm], max_steps=1
    ))  # fmt: skip
    assert all(torch.isfinite(value).all() for value in after.values()) and max_difference(before, after) > 0
    (entry,) = [entry for entry in adversarial.state.log_history if "loss" in entry]
    assert entry["epsilon"] == EPSILONS[norm] and 0 <= entry["adversarial_accuracy"] <= 1
    assert ("clean_loss" in entry) == RECIPES[loss_type].has_clean
    assert ("gradient_misalignment" in entry) == (loss_type == "grad_align")


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l2_token"])
@pytest.mark.parametrize("loss_type", ["trades", "freelb", "smart", "vat", "free_at", "grad_align"])
def test_text_methods_take_a_step_in_every_norm(loss_type: str, norm: str, tmp_path: Path):
    model = tiny_classifier("bert", **eager(loss_type, "bert"))
    before = weights(model)
    after = train(adversarial_trainer(model, tmp_path, loss_type=loss_type, norm=norm, max_steps=1))
    assert all(torch.isfinite(value).all() for value in after.values()) and max_difference(before, after) > 0
    assert not EmbeddingSite(model).module._forward_hooks


@pytest.mark.parametrize("loss_type", ["pgd_at", "trades", "mart", "fast_at", "free_at"])
def test_perturbations_stay_in_ball_and_box_of_raw_pixels(
    loss_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Seen from the model's side: the pixels it was trained on, their processor's mean and std undone."""
    model = tiny_classifier("resnet")
    # Free AT's first step is at the clean images, its second on the same rows
    steps = 2 if loss_type == "free_at" else 1
    trainer = adversarial_trainer(
        model, tmp_path, loss_type=loss_type, epsilon=0.05, max_steps=steps, collapse_guard=False
    )
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["pixel_values"].detach()), with_kwargs=True
    )
    batches: list[torch.Tensor] = []
    step = type(trainer).training_step

    def spy(self: Any, wrapped: Any, inputs: Any, *rest: Any) -> Any:
        batches.append(inputs["pixel_values"])
        return step(self, wrapped, inputs, *rest)

    monkeypatch.setattr(type(trainer), "training_step", spy)
    train(trainer)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    clean, moved = batches[0] * std + mean, seen[-1][-4:] * std + mean
    assert (moved - clean).abs().max() <= 0.05 + 1e-6
    assert (moved - clean).abs().amax(dim=(1, 2, 3)).min() > 0.01
    assert moved.min() >= -1e-6 and moved.max() <= 1 + 1e-6


def test_noise_of_n_fgsm_is_not_clipped_to_the_ball(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    searches = Searches(monkeypatch)
    train(adversarial_trainer(tiny_classifier(), tmp_path, loss_type="n_fgsm", epsilon=0.05, max_steps=1))
    assert 0.1 < searches.deltas[0].abs().max() <= 0.15


@pytest.mark.parametrize(("loss_type", "loss"), [("trades", trades_loss), ("mart", mart_loss)])
def test_loss_is_the_objective_s(loss_type: str, loss: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny_classifier()
    trainer = adversarial_trainer(model, tmp_path, loss_type=loss_type, beta=2.5, label_smoothing_factor=0.1)
    batch, searches = batch_of(trainer), Searches(monkeypatch)
    found = trainer.compute_loss(model, dict(batch))
    (delta,) = searches.deltas
    moved = batch["pixel_values"] + delta / torch.tensor(STD).view(3, 1, 1)
    logits = [model(pixel_values=pixels).logits for pixels in (batch["pixel_values"], moved)]
    expected = loss(*logits, batch["labels"], beta=2.5, label_smoothing=0.1).mean()
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)


def test_pgd_finds_what_plain_pgd_finds(tmp_path: Path):
    """Three signed steps written out, from zero, on raw pixels."""
    model = tiny_classifier()
    rows = image_rows(normalized=False)
    trainer = adversarial_trainer(
        model, tmp_path, {"processing_class": None, "train_dataset": rows}, epsilon=0.05, attack_steps=3,
        attack_step_size=0.02, random_start=False,
    )  # fmt: skip
    pixels, labels = rows[:4]["pixel_values"], rows[:4]["labels"]
    found = trainer._search.run(model, {"pixel_values": pixels}, labels, [0, 1, 2, 3]).delta
    moved = pixels.clone()
    for _ in range(3):
        moved.requires_grad_(True)
        (slope,) = torch.autograd.grad(
            F.cross_entropy(model(pixel_values=moved).logits, labels, reduction="sum"), moved
        )
        moved = (moved.detach() + 0.02 * slope.sign()).clamp(pixels - 0.05, pixels + 0.05).clamp(0, 1)
    assert torch.allclose(pixels + found, moved, atol=1e-6)


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.1), ("l2", 1.0), ("l1", 12.0)])
def test_saturated_images_are_attacked_as_by_the_attack(norm: str, epsilon: float, tmp_path: Path):
    """Black and white pixels, which can move one way only: a sparse step into the other way would be projected back."""
    model = tiny_classifier("resnet").eval()
    raw = (torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    units = ImageInputs(processor(), 3).units
    pixels, labels = units.from_raw(raw), model(pixel_values=units.from_raw(raw)).logits.argmax(dim=-1)
    trainer = adversarial_trainer(
        model, tmp_path, norm=norm, epsilon=epsilon, attack_steps=7, attack_step_size=epsilon / 4, random_start=False
    )  # fmt: skip
    attack = PGD(
        epsilon=epsilon, norm=norm, steps=7, step_size=epsilon / 4, random_start=False, keep="last",
        image_processor=processor(),
    )  # fmt: skip
    moved = attack.perturb(model, pixel_values=pixels, labels=labels)
    found = trainer._search.run(model.eval(), {"pixel_values": pixels}, labels, list(range(16))).delta
    clean, theirs, ours = (
        F.cross_entropy(model(pixel_values=pixels + shift).logits, labels)
        for shift in (0, moved, units.from_raw(raw + found) - pixels)
    )
    assert theirs > 1.5 * clean and ours.item() == pytest.approx(theirs.item(), rel=0.02)


def test_vat_s_sparse_direction_stays_in_the_box(tmp_path: Path):
    """In L1 the radius is spent on pixels that can move."""
    model = tiny_classifier("resnet").eval()
    raw = (torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    trainer = adversarial_trainer(
        model, tmp_path, loss_type="vat", norm="l1", epsilon=0.5,
        trainer={"train_dataset": image_rows(normalized=False), "processing_class": None},
    )  # fmt: skip
    found = trainer._search.run(model, {"pixel_values": raw}, torch.zeros(8).long(), list(range(8))).delta
    assert torch.allclose(found.abs().flatten(1).sum(dim=1), torch.full((8,), 0.5), atol=1e-5)


def test_vat_finds_the_direction_of_largest_divergence(tmp_path: Path):
    """The dominant direction of the divergence's curvature, to which power iteration converges."""
    model = tiny_classifier().eval()
    trainer = adversarial_trainer(
        model, tmp_path, loss_type="vat", norm="l2", epsilon=0.01, attack_steps=20,
        trainer={"train_dataset": image_rows(normalized=False), "processing_class": None},
    )  # fmt: skip
    pixels = 0.25 + 0.5 * torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = trainer._search.run(model, {"pixel_values": pixels}, torch.zeros(1).long(), [0]).delta

    def log_probs(flat: torch.Tensor) -> torch.Tensor:
        return model(pixel_values=flat.view(1, 3, 8, 8)).logits[0].log_softmax(-1)

    slopes = torch.autograd.functional.jacobian(log_probs, pixels.flatten())
    fisher = slopes.T @ (slopes * log_probs(pixels.flatten()).exp().unsqueeze(1)).detach()
    top = torch.linalg.eigh(fisher)[1][:, -1]
    assert found.norm().item() == pytest.approx(0.01, rel=1e-4)
    assert (found.flatten() @ top).abs().item() / 0.01 > 0.99


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_one_power_iteration_at_the_default_xi_beats_random_directions(name: str, tmp_path: Path):
    """By the divergence at the radius that training takes, against the mean over random directions of that length."""
    model = tiny_classifier(name).eval()
    trainer = adversarial_trainer(
        model, tmp_path, loss_type="vat", norm="l2", epsilon=0.1,
        trainer={"train_dataset": image_rows(normalized=False), "processing_class": None},
    )  # fmt: skip
    pixels = 0.25 + 0.5 * torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = trainer._search.run(model, {"pixel_values": pixels}, torch.zeros(8).long(), list(range(8))).delta

    @torch.no_grad()
    def divergence(delta: torch.Tensor) -> torch.Tensor:
        clean, moved = (
            model.double()(pixel_values=x.double()).logits.log_softmax(-1) for x in (pixels, pixels + delta)
        )
        return (clean.exp() * (clean - moved)).sum(-1)

    drawn = torch.randn(32, *pixels.shape, generator=torch.Generator().manual_seed(1))
    drawn = 0.1 * drawn / drawn.flatten(2).norm(dim=2).view(32, 8, 1, 1, 1)
    chance = torch.stack([divergence(delta) for delta in drawn]).mean(0)
    assert (divergence(found) > 50 * chance).all()


def test_kinds_of_weights_and_mix_change_the_loss_as_they_say(tmp_path: Path):
    model = tiny_classifier()

    def loss(**args: Any) -> float:
        trainer = adversarial_trainer(model, tmp_path, epsilon=1e-7, **args)
        torch.manual_seed(0)
        return trainer.compute_loss(model, {k: v[:4] for k, v in image_rows()[:4].items()}).item()

    given = image_rows()[:4]
    logits = model(pixel_values=given["pixel_values"]).logits
    rows = F.cross_entropy(logits, given["labels"], reduction="none")
    assert loss() == pytest.approx(rows.mean().item(), abs=1e-4)
    assert loss(sample_weighting="kl_dro") == pytest.approx((rows * rows.softmax(0)).sum().item(), abs=1e-4)
    energy = logits.logsumexp(-1).abs()
    assert loss(sample_weighting="weat") == pytest.approx((rows / (1 + energy.exp()).log()).mean().item(), abs=1e-4)
    mixed = 0.75 * (rows * rows.softmax(0)).sum() + 0.25 * rows.mean()
    assert loss(sample_weighting="kl_dro", clean_weight=0.25) == pytest.approx(mixed.item(), abs=1e-4)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "weights"])
@pytest.mark.parametrize(("name", "loss_type"), [("vit", "trades"), ("resnet", "free_at"), ("bert", "freelb")])
def test_bf16(name: str, loss_type: str, autocast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A step as in float32 up to the rounding of half precision, with perturbations in float32."""
    searches = Searches(monkeypatch)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        half = dtype == torch.bfloat16
        model = tiny_classifier(name).to(torch.float32 if autocast else dtype)
        before = weights(model)
        args = {"loss_type": loss_type, "max_steps": 1, "bf16": half and autocast, "attack_steps": None}
        after = train(trainer := adversarial_trainer(model, tmp_path, epsilon=0.05, **args))
        assert all(torch.isfinite(value).all() for value in after.values()) and max_difference(before, after) > 0
        assert trainer.model.dtype == (torch.float32 if autocast else dtype)
        losses += logged(trainer, "clean_loss" if RECIPES[loss_type].has_clean else "adversarial_loss")
        trainer.eval_dataset = trainer.train_dataset.select(range(4))
        assert 0 <= trainer.evaluate()["eval_robust_accuracy"] <= 1
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert searches.deltas or RECIPES[loss_type].is_shared
    assert all(delta.dtype == torch.float32 and delta.abs().max() > 0.01 for delta in searches.deltas)


def test_batch_statistics_and_random_state_are_untouched_by_the_attack(tmp_path: Path):
    model = tiny_classifier("resnet")
    trainer = adversarial_trainer(model, tmp_path, loss_type="trades")
    batch = batch_of(trainer)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    given = {"pixel_values": batch["pixel_values"]}
    trainer._search.run(model, given, batch["labels"], [0, 1, 2, 3])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_training_makes_the_model_robust(tmp_path: Path):
    """Robust accuracy on the rows trained on, before and after."""
    model = tiny_classifier("vit")
    trainer = adversarial_trainer(
        model, tmp_path, {"eval_dataset": image_rows()}, epsilon=0.05, max_steps=40, optim="adamw_torch",
        learning_rate=3e-3, per_device_train_batch_size=16, logging_steps=40,
    )  # fmt: skip
    before = trainer.evaluate()
    train(trainer)
    after = trainer.evaluate()
    assert after["eval_robust_accuracy"] > before["eval_robust_accuracy"] + 0.3
    assert after["eval_robust_accuracy"] <= after["eval_clean_accuracy"]


# ---- Invariances ----


@pytest.mark.parametrize("loss_type", ["pgd_at", "trades", "free_at", "freelb"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_epsilon_zero_is_the_parent_bit_for_bit(loss_type: str, smoothing: float, tmp_path: Path):
    name = "bert" if loss_type == "freelb" else "vit"
    extra = {"label_smoothing_factor": smoothing, "gradient_accumulation_steps": 2}
    rows = text_rows() if name == "bert" else image_rows()
    args = TrainingArguments(**settings(tmp_path, **extra))
    parent = Trainer(tiny_classifier(name, dropout=0.2), args, train_dataset=rows)
    expected = train(parent)
    ours = adversarial_trainer(tiny_classifier(name, dropout=0.2), tmp_path, loss_type=loss_type, epsilon=0.0, **extra)
    assert max_difference(expected, train(ours)) == 0
    assert logged(parent, "loss") == logged(ours, "loss")


@pytest.mark.parametrize("loss_type", [*LOSS_TYPES, "kl_dro"])
def test_accumulation_does_not_change_the_weights(loss_type: str, tmp_path: Path):
    """Eight rows as one batch or as two micro-batches; weights that rows share are normalised in each forward."""
    args: dict[str, Any] = {"loss_type": loss_type, "num_replays": 2}
    if loss_type == "kl_dro":
        args = {"sample_weighting": "weat", "clean_weight": 0.3}
    name = "bert" if loss_type in ("freelb", "smart") else "vit"
    if loss_type == "vat":
        args |= {"norm": "l2"}  # else rounding decides about signs of directions
    found = [
        train(
            adversarial_trainer(
                tiny_classifier(name, **eager(loss_type, name)),
                tmp_path,
                per_device_train_batch_size=8 // count,
                gradient_accumulation_steps=count,
                **args,
            )
        )
        for count in (1, 2)
    ]
    # SMART's first gradient is that of a divergence at a distance of 1e-5, of which rounding leaves two digits
    assert max_difference(*found) < (1e-4 if loss_type == "smart" else 1e-5)


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("loss_type", ["pgd_at", "fast_at", "free_at", "freelb", "smart"])
def test_resuming_gives_the_weights_of_an_uninterrupted_run(loss_type: str, tmp_path: Path):
    """Stopped in the midst of Free AT's replays and of the way up of radius and learning rate, with a guard."""
    args: dict[str, Any] = {
        "loss_type": loss_type, "num_replays": 4, "max_steps": 6, "save_strategy": "steps", "save_steps": 3,
        "lr_scheduler_type": "slow_start_fast_decay", "epsilon_schedule": "linear", "collapse_guard_steps": 2,
        "collapse_guard_rows": 4, "collapse_threshold": 1.0, "optim": "adamw_torch",
    }  # fmt: skip
    name = "bert" if loss_type in ("freelb", "smart") else "vit"
    if loss_type == "smart":
        args["proximal_weight"] = 1.0
    whole = adversarial_trainer(tiny_classifier(name, dropout=0.2), tmp_path / "whole", **args)
    expected = train(whole)
    train(
        adversarial_trainer(tiny_classifier(name, dropout=0.2), tmp_path / "half", {"callbacks": [StopAt(3)]}, **args)
    )
    resumed = adversarial_trainer(tiny_classifier(name, dropout=0.2, seed=1), tmp_path / "half", **args)
    found = train(resumed, resume_from_checkpoint=True)
    assert max_difference(expected, found) == 0
    assert logged(resumed, "loss") == logged(whole, "loss")


def test_free_at_steps_on_the_same_rows_and_carries_the_perturbation_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[torch.Tensor] = []
    starts: list[torch.Tensor] = []
    step, loss = AdversarialTrainer.training_step, AdversarialTrainer.compute_loss

    def spy(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        seen.append(inputs["pixel_values"])
        return step(self, model, inputs, *rest)

    def keep(self: Any, *args: Any, **kwargs: Any) -> Any:
        starts.append(self._shared_delta.detach().clone())
        return loss(self, *args, **kwargs)

    monkeypatch.setattr(AdversarialTrainer, "training_step", spy)
    monkeypatch.setattr(AdversarialTrainer, "compute_loss", keep)
    trainer = adversarial_trainer(
        tiny_classifier(), tmp_path, loss_type="free_at", num_replays=3, epsilon=0.05, max_steps=-1, num_train_epochs=1
    )
    model, forwards = trainer.model, []
    model.register_forward_hook(lambda *_: forwards.append(None))
    train(trainer)
    assert trainer.state.global_step == len(seen) == len(forwards) == 12  # 16 rows, batches of 4, three times each
    assert all(torch.equal(seen[i], seen[i - i % 3]) for i in range(12))
    assert not torch.equal(seen[0], seen[3])
    assert len({row.numpy().tobytes() for batch in seen for row in batch}) == 16
    # Each replay starts a step from where the last one started, projected onto ball and box
    assert starts[0].abs().max() == 0
    assert all(torch.equal(starts[i], starts[i + 1]) is False for i in range(2))
    assert max(start.abs().max().item() for start in starts) <= 0.05 + 1e-7


def test_free_at_carries_the_perturbation_from_batch_to_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Written out for two batches of two replays: signed steps of ε, cut to ball and box of the batch they are on."""
    starts: list[torch.Tensor] = []
    slopes: list[torch.Tensor] = []
    batches: list[torch.Tensor] = []
    loss, advance = AdversarialTrainer.compute_loss, InputSearch.advance

    def keep(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        starts.append(self._shared_delta.detach().clone())
        batches.append(inputs["pixel_values"])
        return loss(self, model, inputs, *args, **kwargs)

    def spy(self: Any, model: Any, given: Any, delta: Any, gradient: Any) -> Any:
        slopes.append(gradient.clone())
        return advance(self, model, given, delta, gradient)

    monkeypatch.setattr(AdversarialTrainer, "compute_loss", keep)
    monkeypatch.setattr(InputSearch, "advance", spy)
    train(adversarial_trainer(
        tiny_classifier(), tmp_path, {"train_dataset": image_rows(normalized=False), "processing_class": None},
        loss_type="free_at", num_replays=2, epsilon=0.05, max_steps=4,
    ))  # fmt: skip

    def allowed(delta: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels + delta.clamp(-0.05, 0.05)).clamp(0, 1) - pixels

    assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[1], batches[2])
    expected = torch.zeros_like(starts[0])
    for start, slope, pixels in zip(starts, slopes, batches, strict=True):
        assert torch.allclose(start, allowed(expected, pixels), atol=1e-6)
        expected = allowed(start + 0.05 * slope.sign(), pixels)
    assert starts[2].abs().max() > 0.01


def test_embeddings_are_measured_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lengths: list[float] = []
    measure = EmbeddingSite.mean_row_norm

    def spy(self: Any) -> torch.Tensor:
        found = measure(self)
        lengths.append(found.item())
        return found

    monkeypatch.setattr(EmbeddingSite, "mean_row_norm", spy)
    model = tiny_classifier("bert")
    train(adversarial_trainer(model, tmp_path, loss_type="trades", gradient_accumulation_steps=2, learning_rate=0.5))
    assert len(lengths) == 3 and len(set(lengths)) == 3  # one for each step, of the weights as they are then


# ---- SMART's proximal term ----


def test_proximal_term_is_the_divergence_from_the_average_of_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Twelve steps written out: past weights count 0.99 in the first tenth of the steps (one), 0.999 after it."""
    terms: list[tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]] = []
    divergence = MomentumBregman.divergence

    def spy(self: Any, model: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        found = divergence(self, model, inputs, logits)
        twin = tiny_classifier("bert").eval()
        twin.load_state_dict({**twin.state_dict(), **{name: value.clone() for name, value in expected.items()}})
        with torch.no_grad():
            p, q = logits.detach().log_softmax(-1), twin(**inputs).logits.log_softmax(-1)
        terms.append((weights(model), found.detach(), ((p.exp() - q.exp()) * (p - q)).sum(-1)))
        return found

    class Average(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            past = 0.99 if state.global_step == 1 else 0.999
            for name, value in weights(model).items():
                expected[name] = past * expected[name] + (1 - past) * value

    monkeypatch.setattr(MomentumBregman, "divergence", spy)
    model = tiny_classifier("bert", dropout=0.2)
    expected = weights(model)
    args = {"loss_type": "smart", "proximal_weight": 2.0, "max_steps": 12}
    trainer = adversarial_trainer(model, tmp_path, {"callbacks": [Average()]}, **args)
    train(trainer)
    assert all(torch.allclose(found, wanted, atol=1e-5) for _, found, wanted in terms) and len(terms) == 12
    assert terms[-1][1].max() > 1e-3
    assert len(logged(trainer, "proximal_divergence")) == 12


def test_proximal_term_keeps_the_predictions_near_where_they_were(tmp_path: Path):
    given = {name: values for name, values in text_rows()[:].items() if name != "labels"}

    @torch.no_grad()
    def predictions(model: Any) -> torch.Tensor:
        return model.eval()(**given).logits.log_softmax(-1)

    def moved(weight: float) -> float:
        model = tiny_classifier("bert")
        before = predictions(model)
        args = {"loss_type": "smart", "proximal_weight": weight, "max_steps": 20, "learning_rate": 0.02}
        train(adversarial_trainer(model, tmp_path, **args))
        after = predictions(model)
        return (before.exp() * (before - after)).sum(-1).mean().item()

    assert moved(3.0) < 0.5 * moved(0.0)


def test_freelb_averages_the_gradients_along_the_ascent_under_one_dropout_mask(tmp_path: Path):
    """Written out: K passes from the same start, the loss of each over K, one normalised step between them."""
    rows = text_rows().select(range(4))
    args: dict[str, Any] = {
        "loss_type": "freelb",
        "epsilon": 0.3,
        "epsilon_relative": False,
        "attack_steps": 3,
        "max_steps": 1,
    }
    model = tiny_classifier("bert", dropout=0.3)
    trainer = adversarial_trainer(model, tmp_path, {"train_dataset": rows}, **args)
    batch: dict[str, Any] = {}
    gradients: dict[str, torch.Tensor] = {}

    class Keep(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            gradients["random"] = torch.get_rng_state()

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    step = trainer.training_step

    def remember(wrapped: Any, inputs: Any, *rest: Any) -> Any:
        batch.update(inputs)
        return step(wrapped, inputs, *rest)

    trainer.training_step = remember
    trainer.add_callback(Keep())
    start = weights(model)
    train(trainer)
    state = gradients.pop("random")

    twin = tiny_classifier("bert", dropout=0.3)
    twin.load_state_dict({**twin.state_dict(), **start})
    labels = batch.pop("labels")
    trainer._place = 0
    trainer.state.global_step = 0
    delta = trainer._search.begin(twin, batch, trainer._seeds(4, 0))
    mask = batch["attention_mask"].unsqueeze(-1)
    for _ in range(3):
        torch.set_rng_state(state)
        delta = delta.detach().requires_grad_(True)
        with EmbeddingSite(twin).add(delta):
            loss = F.cross_entropy(twin(**batch).logits, labels) / 3
        loss.backward()
        slope = delta.grad * mask
        delta = delta.detach() + 0.15 * slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1)
        length = delta.flatten(1).norm(dim=1).view(-1, 1, 1)
        delta = torch.where(length > 0.3, delta * 0.3 / length, delta)
    twin_gradients = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    assert max_difference(gradients, twin_gradients) < 1e-6


# ---- Schedules ----


def test_radius_and_learning_rate_follow_their_schedules(tmp_path: Path):
    trainer = adversarial_trainer(
        tiny_classifier(), tmp_path, epsilon=0.04, max_steps=4, epsilon_schedule="linear", epsilon_warmup_steps=3,
        lr_scheduler_type="slow_start_fast_decay", learning_rate=0.1,
        lr_scheduler_kwargs={"peak_at": 0.5, "start_factor": 0.5, "end_factor": 0.25},
    )  # fmt: skip
    train(trainer)
    assert logged(trainer, "epsilon") == pytest.approx([0.01, 0.02, 0.03, 0.04])
    assert logged(trainer, "learning_rate") == pytest.approx([0.05, 0.075, 0.1, 0.05])


# ---- Evaluation ----


def test_evaluation_counts_rows_that_stay_right_under_attack(tmp_path: Path):
    """Every place of the rows, in uneven batches, against the flags of one batch of all of them."""
    model = tiny_classifier()
    rows = image_rows(10)
    trainer = adversarial_trainer(model, tmp_path, {"eval_dataset": rows}, epsilon=0.02, eval_attack_steps=5)
    metrics = trainer.evaluate()
    model.eval()
    clean = model(pixel_values=rows[:]["pixel_values"]).logits.argmax(-1) == rows[:]["labels"]
    assert metrics["eval_clean_accuracy"] == pytest.approx(clean.float().mean().item())
    assert 0 <= metrics["eval_robust_accuracy"] <= metrics["eval_clean_accuracy"]
    assert trainer.evaluate()["eval_robust_accuracy"] == metrics["eval_robust_accuracy"]
    trainer.args.eval_epsilon = 1.0
    assert trainer.evaluate()["eval_robust_accuracy"] == 0
    trainer.args.eval_attack_steps = 0
    assert "eval_robust_accuracy" not in trainer.evaluate()


def test_the_best_model_is_the_most_robust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = iter([0.25, 0.75, 0.5])
    loop = adversarial_evaluation.RobustEvaluation.evaluation_loop

    def planted(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = loop(self, *args, **kwargs)
        assert "eval_robust_accuracy" in output.metrics
        output.metrics["eval_robust_accuracy"] = next(found)
        return output

    monkeypatch.setattr(AdversarialTrainer, "evaluation_loop", planted)
    trainer = adversarial_trainer(
        tiny_classifier(), tmp_path, {"eval_dataset": image_rows(4)}, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_robust_accuracy",
    )  # fmt: skip
    train(trainer)
    assert trainer.state.best_metric == 0.75 and trainer.state.best_model_checkpoint.endswith("checkpoint-2")


# ---- Collapse guard ----


def test_guard_stops_at_a_collapse_and_puts_the_last_good_weights_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    found = iter([0.5, 0.6, 0.45, 0.3])
    monkeypatch.setattr(AdversarialTrainer, "robust_share", lambda self, batches, epsilon: next(found))
    kept: list[dict[str, torch.Tensor]] = []

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            kept.append({name: value.clone() for name, value in model.state_dict().items()})

    trainer = adversarial_trainer(
        tiny_classifier("resnet"), tmp_path, {"callbacks": [Keep()]}, loss_type="fast_at", max_steps=20,
        collapse_guard_steps=2,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        train(trainer)
    assert trainer.state.global_step == 8
    assert "Collapse at step 8" in caplog.text and "0.600 to 0.300" in caplog.text
    assert logged(trainer, "guard_robust_accuracy") == [0.5, 0.6, 0.45, 0.3]
    # Those of step 6, batch statistics included
    assert all(torch.equal(value, kept[5][name]) for name, value in trainer.model.state_dict().items())
    loaded = type(trainer.model).from_pretrained(tmp_path / "last_good")
    assert max_difference(weights(loaded), weights(trainer.model)) == 0


def test_guard_looks_at_short_trainings_and_at_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def run(shares: list[float], **args: Any) -> AdversarialTrainer:
        found = iter(shares)
        monkeypatch.setattr(AdversarialTrainer, "robust_share", lambda self, batches, epsilon: next(found))
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        given = {"callbacks": [Stop()]} if "stop" in args else {}
        args.pop("stop", None)
        trainer = adversarial_trainer(tiny_classifier(), folder, given, loss_type="fast_at", **args)
        with caplog.at_level(logging.WARNING):
            train(trainer)
        assert logged(trainer, "guard_robust_accuracy") == shares
        return trainer

    class Stop(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= 5

    run([0.1, 0.5, 0.5, 0.5], max_steps=8)
    run([0.1, 0.5, 0.5, 0.4], max_steps=10, collapse_guard_steps=3)
    assert "Collapse" not in caplog.text
    trainer = run([0.1, 0.5, 0.5, 0.2], max_steps=10, collapse_guard_steps=3, save_strategy="steps", save_steps=10)
    assert "Collapse at step 10" in caplog.text
    folder = Path(trainer.args.output_dir)
    for name in ("last_good", "checkpoint-10"):  # the last checkpoint holds the weights that were put back
        loaded = type(trainer.model).from_pretrained(folder / name)
        assert max_difference(weights(loaded), weights(trainer.model)) == 0
    trainer = run([0.5, 0.2], max_steps=16, stop=True)  # looks every 4 steps, and is stopped at 5
    assert "Collapse at step 5" in caplog.text and (Path(trainer.args.output_dir) / "last_good").is_dir()


def test_guard_measures_and_is_on_for_one_step_methods_only(tmp_path: Path):
    args = {"collapse_guard_steps": 1, "collapse_guard_rows": 6, "max_steps": 2, "collapse_threshold": 1.0}
    trainer = adversarial_trainer(tiny_classifier(), tmp_path, loss_type="fast_at", **args)
    train(trainer)
    assert len(logged(trainer, "guard_robust_accuracy")) == len(logged(trainer, "loss")) == 2
    assert all(share * 6 == pytest.approx(round(share * 6)) for share in logged(trainer, "guard_robust_accuracy"))
    for more, count in (({"loss_type": "pgd_at"}, 0), ({"loss_type": "fast_at", "collapse_guard": False}, 0)):
        trainer = adversarial_trainer(tiny_classifier(), tmp_path, **args, **more)
        train(trainer)
        assert len(logged(trainer, "guard_robust_accuracy")) == count


def test_guard_does_not_change_training(tmp_path: Path):
    args = {"loss_type": "fast_at", "collapse_guard_steps": 1, "collapse_threshold": 1.0}
    found = [
        train(adversarial_trainer(tiny_classifier(dropout=0.2), tmp_path, collapse_guard=guard, **args))
        for guard in (True, False)
    ]
    assert max_difference(*found) == 0


# ---- Saving ----


def test_saves_a_plain_model_with_a_card(tmp_path: Path):
    trainer = adversarial_trainer(tiny_classifier(), tmp_path, loss_type="trades", epsilon=4 / 255, max_steps=1)
    train(trainer)
    trainer.save_model()
    trainer.create_model_card()
    loaded = type(trainer.model).from_pretrained(tmp_path)
    assert max_difference(weights(loaded), weights(trainer.model)) == 0
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "TRADES" in card.upper() and "1901.08573" in card and "0.0156863 raw [0, 1] pixels" in card
    assert json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))["image_mean"] == MEAN


def test_training_arguments_are_taken_over(tmp_path: Path):
    trainer = AdversarialTrainer(
        tiny_classifier(), TrainingArguments(**settings(tmp_path, max_steps=1)), train_dataset=image_rows(),
        processing_class=processor(),
    )  # fmt: skip
    assert isinstance(trainer.args, AdversarialConfig) and trainer._search.epsilon == 8 / 255
    train(trainer)


def test_images_have_no_prompts_to_be_covered(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        train(trainer := adversarial_trainer(tiny_classifier(), tmp_path / "vit", max_steps=1))
        trainer.save_model()
    assert "training_prompts" not in caplog.text and not (tmp_path / "vit" / "training_prompts.json").exists()
    trainer = adversarial_trainer(tiny_classifier("bert"), tmp_path / "bert", max_steps=1)
    trainer.save_model()
    assert (tmp_path / "bert" / "training_prompts.json").is_file()


def test_smart_warns_of_half_precision(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        adversarial_trainer(tiny_classifier("bert"), tmp_path, loss_type="smart")
        adversarial_trainer(tiny_classifier("bert"), tmp_path, loss_type="freelb", bf16=True)
        assert "smart" not in caplog.text
        adversarial_trainer(tiny_classifier("bert"), tmp_path, loss_type="smart", bf16=True)
    assert "`loss_type='smart'` starts its search at noise of 1e-5" in caplog.text


# ---- Errors before training ----


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
@pytest.mark.parametrize(
    ("args", "part"),
    [
        ({"loss_type": "free_at", "num_replays": 2}, "loss_type='free_at'"),
        ({"loss_type": "freelb"}, "loss_type='freelb'"),
        ({"loss_type": "grad_align"}, "loss_type='grad_align'"),
        ({"loss_type": "smart", "proximal_weight": 1.0}, "proximal_weight=1.0"),
    ],
)
def test_gradients_and_copies_that_split_weights_do_not_give(
    args: dict[str, Any], part: str, kind: str, tmp_path: Path
):
    config = AdversarialConfig(str(tmp_path), use_cpu=True, bf16=False, epsilon=0.1, **args)
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType[kind])
    with refused(part, kind, "DDP"):
        check_parallelism(accelerator, config)
    check_parallelism(SimpleNamespace(distributed_type=DistributedType.MULTI_GPU), config)  # type: ignore[arg-type]


def test_several_devices_in_one_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(AdversarialConfig, "n_gpu", property(lambda self: 2))
    with refused("2 devices from one process", "DataParallel", "accelerate launch"):
        adversarial_trainer(tiny_classifier(), tmp_path)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ({"loss_type": "trade"}, ("loss_type='trade'", "'trades'")),
        ({"sample_weighting": "kldro"}, ("sample_weighting='kldro'", "'kl_dro'")),
        ({"epsilon_schedule": "lineer"}, ("epsilon_schedule='lineer'", "'linear'")),
        ({"norm": "l_inf"}, ("norm='l_inf'", "'linf'")),
        ({"epsilon": -0.1}, ("epsilon=-0.1", "8/255")),
        ({"attack_steps": 0}, ("attack_steps=0", "epsilon=0")),
        ({"clean_weight": 1.5}, ("clean_weight=1.5", "share")),
        ({"beta": 6.0}, ("beta=6.0", "pgd_at", "trades")),
        ({"loss_type": "trades", "random_start": False}, ("random_start=False", "no gradient")),
        ({"loss_type": "free_at", "attack_steps": 3}, ("attack_steps=3", "num_replays")),
        ({"loss_type": "vat", "proximal_weight": 1.0}, ("proximal_weight=1.0", "'smart'")),
        (
            {"lr_scheduler_type": "slow_start_fast_decay", "lr_scheduler_kwargs": {"peek_at": 1}},
            ("peek_at", "'peak_at'"),
        ),
    ],
)
def test_wrong_settings_are_refused(args: dict[str, Any], parts: tuple[str, ...], tmp_path: Path):
    with refused(*parts):
        AdversarialConfig(**settings(tmp_path, **args))


def test_text_methods_are_refused_on_images(tmp_path: Path):
    for loss_type in ("freelb", "smart"):
        with refused(f"loss_type='{loss_type}'", "ViTForImageClassification", "text classifier"):
            adversarial_trainer(tiny_classifier(), tmp_path, loss_type=loss_type)
    with refused("norm='l2_token'"):
        adversarial_trainer(tiny_classifier(), tmp_path, norm="l2_token")


def test_grad_align_needs_eager_attention(tmp_path: Path):
    model = tiny_classifier(attn_implementation="sdpa")
    with refused("grad_align", "'sdpa'", "attn_implementation='eager'"):
        adversarial_trainer(model, tmp_path, loss_type="grad_align")
    adversarial_trainer(tiny_classifier("resnet"), tmp_path, loss_type="grad_align")


def test_normalised_pixels_without_their_processor_are_refused(tmp_path: Path):
    with refused("pixel_values", "image_processor"):
        adversarial_trainer(tiny_classifier(), tmp_path, {"processing_class": None})
    other = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    with refused("image_mean", "channels"):
        adversarial_trainer(tiny_classifier(), tmp_path, {"processing_class": other})


def test_epsilon_in_grey_levels_is_refused(tmp_path: Path):
    with refused("epsilon=8", "8/255"):
        adversarial_trainer(tiny_classifier(), tmp_path, epsilon=8)


def test_nan_pixels_are_refused(tmp_path: Path):
    rows = image_rows(4).with_format(None).to_dict()
    rows["pixel_values"][0][0][0][0] = math.nan
    with refused("pixel_values", "NaN"):
        adversarial_trainer(tiny_classifier(), tmp_path, {"train_dataset": Dataset.from_dict(rows)})


@pytest.mark.parametrize(("value", "part"), [(math.nan, "NaN"), (math.inf, "NaN"), (40.0, "outside [0, 1]")])
def test_bad_pixels_of_any_batch_are_refused_with_their_rows_and_step(value: float, part: str, tmp_path: Path):
    rows = image_rows(8).with_format(None).to_dict()
    for row in (5, 7):
        rows["pixel_values"][row][1][2][3] = value
    given = {"train_dataset": Dataset.from_dict(rows).with_format("torch")}
    order = {"train_sampling_strategy": "sequential"}
    trainer = adversarial_trainer(tiny_classifier(), tmp_path, given, loss_type="pgd_at", attack_steps=1, **order)
    with refused("pixel_values", part, "rows [1, 3]", "step 2"):
        trainer.train()
    adversarial_trainer(tiny_classifier(), tmp_path, given, epsilon=0.0, **order).train()  # the parent's business


def test_a_step_in_grey_levels_is_refused_on_images_and_not_on_text(tmp_path: Path):
    with refused("attack_step_size=2", "2/255"):
        adversarial_trainer(tiny_classifier(), tmp_path, attack_step_size=2)
    adversarial_trainer(tiny_classifier(), tmp_path, attack_step_size=2, norm="l2")
    adversarial_trainer(tiny_classifier("bert"), tmp_path, attack_step_size=2, norm="linf")


@pytest.mark.parametrize("argument", ["train_dataset", "eval_dataset"])
def test_missing_and_wrong_labels_are_refused(argument: str, tmp_path: Path):
    rows = image_rows(6)
    with refused(argument, "no labels", "'pixel_values'"):
        adversarial_trainer(tiny_classifier(), tmp_path, {argument: rows.remove_columns("labels")})
    for value in (3, -1):
        wrong = rows.with_format(None).map(lambda row, value=value: {"labels": value})
        with refused(argument, "0 … 2"):
            adversarial_trainer(tiny_classifier(), tmp_path, {argument: wrong})
    with refused(argument, "float"):
        soft = rows.with_format(None).map(lambda row: {"labels": 0.5})
        adversarial_trainer(tiny_classifier(), tmp_path, {argument: soft.cast_column("labels", _float())})
    with refused(argument, "empty"):
        adversarial_trainer(tiny_classifier(), tmp_path, {argument: rows.select([])})


def test_a_transform_neither_hides_labels_nor_is_run_on_every_row(tmp_path: Path):
    read: list[int] = []

    def decode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        read.extend(batch["label"])
        return {"pixel_values": torch.tensor(batch["pixels"]), "labels": [label % 10 for label in batch["label"]]}

    def given(labels: list[int]) -> dict[str, Any]:
        rows = {"pixels": image_rows(8).with_format(None)["pixel_values"], "label": labels}
        return {"train_dataset": Dataset.from_dict(rows).with_transform(decode)}

    args = {"remove_unused_columns": False, "attack_steps": 1, "train_sampling_strategy": "sequential"}
    with refused("train_dataset", "`labels` 7 in row 5", "3 classes", "num_labels"):
        adversarial_trainer(tiny_classifier(), tmp_path, given([0, 1, 2, 0, 1, 7, 0, 1]), **args)
    read.clear()
    adversarial_trainer(tiny_classifier(), tmp_path, given([0, 1, 2, 0, 1, 2, 0, 1]), **args)
    assert len(read) <= 4
    # The transform makes a class of the 10 that is stored; what it makes of others shows in their batch
    trainer = adversarial_trainer(tiny_classifier(), tmp_path, given([0, 10, 2, 0, 1, 2, 17, 1]), **args)
    with refused("labels", "[7]", "rows [2]", "step 2", "3 classes", "num_labels"):
        trainer.train()


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.rows[row]


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_labels_of_every_batch_are_checked(name: str, tmp_path: Path):
    rows = [dict(row) for row in (image_rows(8) if name == "vit" else text_rows(8))]
    rows[6]["labels"] = torch.tensor(7)
    args = {"attack_steps": 1, "train_sampling_strategy": "sequential"}
    with refused("train_dataset", "`labels` 7 in row 6"):  # a list costs nothing to look at
        adversarial_trainer(tiny_classifier(name), tmp_path, {"train_dataset": rows}, **args)
    given = {"train_dataset": _Rows(rows), "eval_dataset": _Rows(rows)}
    trainer = adversarial_trainer(tiny_classifier(name), tmp_path, given, **args)
    with refused("labels", "[7]", "rows [2]", "step 2", "3 classes", "num_labels"):
        trainer.train()
    with refused("labels", "[7]", "rows [2]", "batch 1 of an evaluation"):
        trainer.evaluate()
    with refused("eval_dataset['b']", "`labels` 7 in row 6"):
        adversarial_trainer(tiny_classifier(name), tmp_path, {"eval_dataset": {"a": rows[:6], "b": rows}}, **args)


def _float() -> Any:
    from datasets import Value

    return Value("float32")


def test_models_without_one_label_out_of_several_are_refused(tmp_path: Path):
    for changes in ({"problem_type": "multi_label_classification"}, {"problem_type": "regression"}):
        model = tiny_classifier()
        model.config.problem_type = changes["problem_type"]
        with refused("problem_type", "single_label_classification"):
            adversarial_trainer(model, tmp_path)


def test_free_at_takes_no_other_order(tmp_path: Path):
    for order in ("group_by_length", "sequential"):
        with refused(f"train_sampling_strategy='{order}'", "free_at", "'random'"):
            adversarial_trainer(tiny_classifier("bert"), tmp_path, loss_type="free_at", train_sampling_strategy=order)


def test_other_losses_and_reentrant_checkpointing_are_refused(tmp_path: Path):
    with refused("compute_loss_func"):
        adversarial_trainer(tiny_classifier(), tmp_path, {"compute_loss_func": lambda *args, **kwargs: None})
    reentrant = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    with refused("use_reentrant"):
        adversarial_trainer(tiny_classifier(), tmp_path, **reentrant)


# ---- Command line ----


def _write_images(folder: Path) -> None:
    for split, count in (("train", 8), ("test", 4)):
        rows = image_rows(count, normalized=False)
        for place, row in enumerate(rows):
            path = folder / split / f"class{int(row['labels'])}" / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = (row["pixel_values"] * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(path)


def test_command_trains_on_a_folder_of_images(tmp_path: Path):
    model = tiny_classifier("resnet")
    model.save_pretrained(tmp_path / "model")
    processor().save_pretrained(tmp_path / "model")
    _write_images(tmp_path / "images")
    settings_file = Path(__file__).parents[1] / "examples" / "advtrain.yaml"
    changes = (
        "--use_cpu true --num_train_epochs 1 --per_device_train_batch_size 4 --attack_steps 2 --eval_attack_steps 2 "
        "--report_to none --disable_tqdm true"
    )
    arguments = ["--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "images", "--output_dir"]
    assert (
        main(
            ["advtrain", "--config", str(settings_file), *map(str, arguments), str(tmp_path / "out"), *changes.split()]
        )
        == 0
    )
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert max_difference(weights(model), weights(loaded)) > 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text(encoding="utf-8"))
    assert any("eval_robust_accuracy" in entry for entry in state["log_history"])


def test_command_trains_on_texts_and_gives_a_model_the_dataset_s_classes(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    tiny_classifier("bert").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = {"text": ["bake a cake", "build a bomb", "mix flour", "no"], "label": ["a", "b", "c", "d"]}
    classes = Dataset.from_dict(rows).cast_column("label", ClassLabel(names=["a", "b", "c", "d"]))
    classes.to_parquet(tmp_path / "rows.parquet")
    arguments = (
        f"--model_name_or_path {tmp_path}/model --dataset_name {tmp_path}/rows.parquet --output_dir {tmp_path}/out --use_cpu "
        "true --loss_type freelb --max_steps 1 --report_to none --disable_tqdm true"
    )
    assert main(["advtrain", *arguments.split()]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "a", "1": "b", "2": "c", "3": "d"}


@pytest.mark.parametrize(
    ("own", "names", "kept"),
    [
        ("abc", "cab", "abc"),  # the model's names in another order: its numbers
        ("abc", "abc", "abc"),
        ("xyz", "cab", "cab"),  # other names: the dataset's, given to the model
    ],
)
def test_command_numbers_classes_as_the_model_does(
    own: str, names: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    known = {"id2label": dict(enumerate(own)), "label2id": {name: i for i, name in enumerate(own)}}
    tiny_classifier("bert", **known).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = Dataset.from_dict({"text": ["bake a cake", "build a bomb", "no"] * 2, "label": [0, 1, 2] * 2})
    rows.cast_column("label", ClassLabel(names=list(names))).to_parquet(tmp_path / "rows.parquet")
    trained: list[Any] = []
    monkeypatch.setattr("hf_robust.cli.advtrain.finish", lambda trainer, *_: trained.append(trainer))
    arguments = (
        f"--model_name_or_path {tmp_path}/model --dataset_name {tmp_path}/rows.parquet --output_dir {tmp_path}/out "
        "--use_cpu true --loss_type freelb --max_steps 1 --report_to none --eval_strategy epoch "
        "--dataset_test_split train --disable_tqdm true"
    )
    assert main(["advtrain", *arguments.split()]) == 0
    (trainer,) = trained
    config = trainer.model.config
    assert config.id2label == dict(enumerate(kept)) and config.label2id == {name: i for i, name in enumerate(kept)}
    for dataset in (trainer.train_dataset, trainer.eval_dataset):
        assert "".join(kept[label] for label in dataset["labels"]) == names * 2


def test_command_trains_a_grey_scale_classifier(tmp_path: Path):
    model = tiny_classifier("vit", num_channels=1)
    model.save_pretrained(tmp_path / "model")
    grey = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.4], image_std=[0.3])
    grey.save_pretrained(tmp_path / "model")
    _write_images(tmp_path / "images")
    arguments = (
        f"--model_name_or_path {tmp_path}/model --dataset_name {tmp_path}/images --output_dir {tmp_path}/out --use_cpu true "
        "--max_steps 1 --attack_steps 1 --per_device_train_batch_size 4 --report_to none --disable_tqdm true"
    )
    assert main(["advtrain", *arguments.split()]) == 0
    assert max_difference(weights(model), weights(type(model).from_pretrained(tmp_path / "out"))) > 0


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_command_passes_on_what_loads_the_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny_classifier(name)
    model.save_pretrained(tmp_path / "model")
    if name == "vit":
        processor().save_pretrained(tmp_path / "model")
        _write_images(tmp_path / "rows")
        loader, layers = AutoModelForImageClassification, "q_proj v_proj"
    else:
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        (tmp_path / "rows").mkdir()
        rows = {"text": ["bake a cake", "build a bomb", "no"] * 2, "label": [0, 1, 2] * 2}
        Dataset.from_dict(rows).to_json(tmp_path / "rows" / "train.jsonl")
        loader, layers = AutoModelForSequenceClassification, "query value"
    seen: list[dict[str, Any]] = []
    load = loader.from_pretrained

    def spy(name: str, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return load(name, **kwargs)

    monkeypatch.setattr(loader, "from_pretrained", spy)
    arguments = (
        f"--model_name_or_path {tmp_path}/model --dataset_name {tmp_path}/rows --output_dir {tmp_path}/out --use_cpu true "
        "--max_steps 1 --attack_steps 1 --report_to none --disable_tqdm true"
    ).split()
    changes = f"--dtype bfloat16 --model_revision v2 --attn_implementation eager --use_peft true --lora_target_modules {layers}"
    assert main(["advtrain", *arguments, *changes.split()]) == 0
    expected = {"revision": "v2", "dtype": "bfloat16", "attn_implementation": "eager", "use_safetensors": True}
    assert [{key: given.get(key) for key in expected} for given in seen] == [expected]
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any("classifier" in key for key in saved) and any("lora_B" in key for key in saved)
    for option in ("load_in_4bit", "load_in_8bit", "dataset_streaming"):
        with refused(f"--{option} true", "eave"):
            main(["advtrain", *arguments, f"--{option}", "true"])


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("radius", [0.1, None])
def test_the_projection_is_that_of_the_attacks(norm: str, radius: float | None):
    pixels = torch.stack(list(image_rows()["pixel_values"]))
    pixels[0, 0, 0, 0] -= 1e-4  # rounding has left it outside of the range: 0 stays allowed
    inputs = ImageInputs(processor(), 3)
    delta = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    found = inputs.projection({"pixel_values": pixels}, radius, norm)(delta)
    ball = PixelBall.around(pixels, inputs.units, math.inf if radius is None else radius, norm)
    assert torch.equal(found, ball.project(delta))
    assert torch.equal(inputs.projection({"pixel_values": pixels}, radius, norm)(0 * delta), 0 * delta)


def test_the_benchmark_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from tests.benchmarks import bench_advtrain

    monkeypatch.setattr("sys.argv", ["bench_advtrain.py", "--smoke"])
    bench_advtrain.main()
    lines = capsys.readouterr().out.splitlines()
    for method in bench_advtrain.METHODS:
        assert [line.split()[1] for line in lines if line.startswith(f"{method}:")] == ["step", "peak"]


def test_command_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["advtrain", "--output_dir", str(tmp_path)])
    assert "--model_name_or_path is required" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"pixel_values": [None, None], "labels": [0, 1]}, "`pixel_values` of row 0 are None"),
        ({"pixel_values": ["cake.png"], "labels": [0]}, "`pixel_values` of row 0 are 'cake.png'"),
        ({"pixel_values": [[[[0.5] * 8] * 8] * 3] * 2, "labels": [0, None]}, r"`labels` None \(NoneType\) in row 1"),
        ({"pixel_values": [[[[0.5] * 8] * 8] * 3] * 2, "labels": ["a", "b"]}, r"`labels` 'a' \(str\) in row 0"),
        ({"pixel_values": [[[[0.5] * 8] * 8] * 3] * 2, "labels": [True, False]}, r"`labels` True \(bool\) in row 0"),
    ],
)
def test_rows_of_another_type(columns: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        adversarial_trainer(tiny_classifier(), tmp_path, {"train_dataset": Dataset.from_dict(columns)})


def test_rows_without_the_models_input(tmp_path: Path):
    rows = Dataset.from_dict({"text": ["how", "do"], "labels": [0, 1]})
    trainer = adversarial_trainer(
        tiny_classifier("bert"), tmp_path, {"train_dataset": rows}, remove_unused_columns=False
    )
    with pytest.raises(ValueError, match="`input_ids` is missing from a batch"):
        trainer.train()
