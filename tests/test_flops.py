"""Attacks count in `total_flos`: what trainers state is compared with the forwards that their models ran."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_robust.trainers.flops import parameter_count, search_operations
from tests.adversarial_data import adversarial_trainer, tiny_classifier
from tests.helpers import tiny_model
from tests.test_robust_clip import clip_trainer, tiny_clip
from tests.trainer_data import capo_trainer, cat_trainer, lora, train
from tests.vlm_data import tiny_llava, vlm_trainer


class Work:
    """
    Thirds of a training pass that a model really ran, in `numel` of its main input: a forward is one; a forward with
    gradients inside the trainer's `_stopwatch` two (the activations' gradients), outside it three (the weights' too).
    """

    def __init__(self, trainer: Any, model: nn.Module, layer: nn.Module, per_item: int, *, weights: bool = False):
        self.thirds, self._per_item, self._attacking, self._model = 0, per_item, 0, model
        self._in_attack = 3 if weights else 2
        trainer._stopwatch.phases = self
        layer.register_forward_hook(self._count)

    def enter(self, name: str) -> None:
        self._attacking += 1

    def leave(self) -> None:
        self._attacking -= 1

    def _count(self, module: nn.Module, args: tuple, output: Any) -> None:
        hidden = args[0]
        items = hidden.shape[0] * (1 if self._per_item > 1 else hidden.shape[1])
        passes = 1 if not torch.is_grad_enabled() else self._in_attack if self._attacking else 3
        self.thirds += items * self._per_item * passes

    def check(self, trainer: Any) -> None:
        parameters = self._model.num_parameters(exclude_embeddings=True)
        assert trainer.state.total_flos == 2 * parameters * self.thirds > 0


@pytest.mark.parametrize(
    ("training", "steps", "forwards", "expected"), [(600, 10, 1, 4200), (600, 0, 0, 0), (6, 1, 0, 4), (6, 3, 2, 16)]
)
def test_a_search_by_hand(training: int, steps: int, forwards: int, expected: int):
    """Two thirds of a training pass for each step, one for each further forward."""
    assert search_operations(training, steps, forwards=forwards) == expected


_ATTACKS: list[dict[str, Any]] = [
    {},
    {"attack_steps": 1},
    {"attack_steps": 3, "attack_keep": "last"},
    {"attack_epsilon": 0},
]


@pytest.mark.parametrize(
    ("make", "args"),
    [
        *((make, args) for make in (cat_trainer, capo_trainer) for args in _ATTACKS),
        (cat_trainer, {"attack_batch_size": 1}),
    ],
)
def test_language_models(make: Any, args: dict[str, Any], tmp_path: Path):
    trainer = make(tiny_model(), tmp_path, max_steps=1, **args)
    work = Work(trainer, trainer.model, trainer.model.model.layers[0], 1)
    train(trainer)
    work.check(trainer)


@pytest.mark.parametrize("loss_type", ["pgd_at", "trades", "mart", "fast_at", "n_fgsm", "free_at", "vat"])
def test_classifiers_of_images(loss_type: str, tmp_path: Path):
    model = tiny_classifier("vit")
    trainer = adversarial_trainer(model, tmp_path, loss_type=loss_type, collapse_guard=False, max_steps=2)
    work = Work(
        trainer, model, model.vit.layers[0] if hasattr(model.vit, "layers") else model.vit.encoder.layer[0], 192
    )
    train(trainer)
    work.check(trainer)


@pytest.mark.parametrize("loss_type", ["freelb", "smart"])
def test_classifiers_of_text(loss_type: str, tmp_path: Path):
    model = tiny_classifier("bert")
    trainer = adversarial_trainer(model, tmp_path, loss_type=loss_type, max_steps=2)
    work = Work(trainer, model, model.bert.encoder.layer[0], 7)
    train(trainer)
    work.check(trainer)


@pytest.mark.parametrize("loss_type", ["fare", "tecoa", "pmg_aft", "sim_clip"])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_clip(loss_type: str, keep: str, tmp_path: Path):
    trainer = clip_trainer(tiny_clip(), tmp_path, loss_type=loss_type, attack_keep=keep, max_steps=1)
    pixels = next(iter(trainer.get_train_dataloader()))["pixel_values"]
    work = Work(trainer, trainer.model, trainer.model.vision_model.post_layernorm, pixels[0].numel())
    if trainer._teacher is not None:
        trainer._teacher.vision_model.post_layernorm.register_forward_hook(work._count)
    train(trainer)
    work.check(trainer)


@pytest.mark.parametrize("args", [{}, {"attack_keep": "best"}, {"perturbation": "embeddings", "attack_steps": 3}])
def test_vision_language_models(args: dict[str, Any], tmp_path: Path):
    trainer = vlm_trainer(tiny_llava(), tmp_path, max_steps=1, **args)
    work = Work(trainer, trainer.model, trainer.model.model.language_model.layers[0], 1)
    train(trainer)
    work.check(trainer)


@pytest.mark.parametrize(
    "args",
    [
        {}, {"robust": "sam"}, {"robust": "smooth", "smooth_samples": 2}, {"robust": "embedding", "attack_steps": 2},
        {"robust": "latent", "latent_layer": 0, "latent_steps": 2},
    ],
)  # fmt: skip
def test_robust_unlearning(args: dict[str, Any], tmp_path: Path):
    from tests.unlearn_data import unlearn_trainer

    trainer = unlearn_trainer(tiny_model(), tmp_path, max_steps=1, loss_type="grad_diff", **args)
    weights = args.get("robust") == "sam"  # whose search needs the gradients of the weights
    work = Work(trainer, trainer.model, trainer.model.model.layers[0], 1, weights=weights)
    train(trainer)
    work.check(trainer)


def test_adapters_count_as_their_base(tmp_path: Path):
    """The estimate of transformers takes all parameters for trained; the attack's share goes by the same."""
    trainer = cat_trainer(tiny_model(), tmp_path, {"peft_config": lora()}, max_steps=1)
    work = Work(trainer, trainer.model, trainer.model.base_model.model.model.layers[0], 1)
    train(trainer)
    work.check(trainer)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("parts", [["unet"], ["text_encoder"]])
def test_diffusion(parts: list[str], share: float, tmp_path: Path):
    """
    By hand, in forwards of one item: each of the 4 rows 2 steps of 2, one forward more, and the training's of 3 (2 where the
    UNet is frozen) for each branch.
    """
    from hf_robust.trainers.flops import unet_operations
    from tests.diffusion_trainer_data import diffusion_trainer

    args = {"attack_epsilon": 0.1, "attack_steps": 2, "adversarial_weight": share, "train_parts": parts}
    trainer = diffusion_trainer(None, tmp_path, max_steps=2, **args)
    train(trainer)
    branches, outer = (1 if share == 1 else 2), (3 if parts == ["unet"] else 2)
    passes = 2 * 4 * (2 * 2 + 1 + branches * outer)
    item = unet_operations(trainer.model, 16 // trainer.model.vae_scale_factor)
    assert item > 0 and trainer.state.total_flos == passes * item


def test_one_item_of_a_unet_by_hand():
    """The first convolution's products alone, of the many that are counted."""
    from hf_robust.diffusion import DiffusionModel
    from hf_robust.trainers.flops import unet_operations
    from tests.diffusion_helpers import tiny_pipeline

    model = DiffusionModel(tiny_pipeline())
    config, small, large = model.unet.config, unet_operations(model, 4), unet_operations(model, 8)
    first = 2 * 9 * config.in_channels * config.block_out_channels[0] * 4 * 4
    assert small > 4 * first  # there is more to it
    assert (
        3.5 * small < large < 5 * small
    )  # convolutions grow with the area, attention faster, time embeddings not at all


def test_counting_draws_no_random_numbers():
    """A resumed run counts anew: dropout of the text encoder would put its random numbers out of step."""
    pytest.importorskip("diffusers")
    from hf_robust.diffusion import DiffusionModel
    from hf_robust.trainers.flops import unet_operations
    from tests.diffusion_helpers import tiny_pipeline

    model = DiffusionModel(tiny_pipeline()).train()
    for module in model.text_encoders.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    before = torch.get_rng_state()
    unet_operations(model, 8)
    assert torch.equal(torch.get_rng_state(), before)


def test_adversarial_erasure(tmp_path: Path):
    """The meters of UNet items, which its own tests check, are what is counted; the bank and the sampling are in it."""
    from hf_robust.trainers.flops import unet_operations
    from tests.advunlearn_data import advunlearn_trainer

    trainer = advunlearn_trainer(tmp_path, latent_bank_size=0)
    train(trainer)
    history = [entry for entry in trainer.state.log_history if "unet_items" in entry]
    items = sum(entry["unet_items"] + entry["unet_backward_items"] for entry in history)  # the UNet is frozen
    item = unet_operations(trainer.model, trainer.image_size // trainer.model.vae_scale_factor)
    assert trainer.state.total_flos == pytest.approx(items * item)


def test_throughput_counts_the_attack(tmp_path: Path):
    trainer = cat_trainer(tiny_model(), tmp_path, save_strategy="steps", save_steps=1)
    metrics = trainer.train().metrics
    total = trainer.state.total_flos
    assert metrics["train_flops_per_second"] == pytest.approx(total / metrics["train_runtime"])
    # Of a resumed run only what it did itself
    again = cat_trainer(tiny_model(), tmp_path, save_strategy="steps", save_steps=1)
    found = again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")).metrics
    assert again.state.total_flos == total
    assert 0 < found["train_flops_per_second"] * found["train_runtime"] < 0.6 * total


def test_split_weights_count_as_if_they_were_whole():
    model, whole = tiny_model(), parameter_count(tiny_model())
    for parameter in model.parameters():  # as DeepSpeed leaves them between forwards
        parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    assert parameter_count(model) == whole == tiny_model().num_parameters(exclude_embeddings=True) > 0
