"""
Trainers whose weights must not depend on how a training is spread over processes.

A cell is a function of the output folder, the rows that a process takes in one optimizer step, and arguments that the
strategy or the device asks for. Its trainer runs in float32 without dropout, by SGD, for three steps.
"""

import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from hf_robust.noise import NoisePolicy
from tests.adversarial_data import adversarial_trainer, tiny_classifier
from tests.adversarial_data import image_rows as labelled_images
from tests.advunlearn_data import advunlearn_trainer
from tests.diffusion_helpers import tiny_pipeline
from tests.diffusion_trainer_data import diffusion_trainer, image_rows, text_lora, unet_lora
from tests.helpers import tiny_model
from tests.invariance.two_processes import CHECKPOINTING, ONE, THREE
from tests.noise_data import hold_noise
from tests.test_robust_clip import clip_trainer, tiny_clip
from tests.trainer_data import adversarial_rows, capo_trainer, cat_trainer, lora, noisefit_trainer, utility_rows
from tests.unlearn_data import tokenised, unlearn_trainer
from tests.vlm_data import tiny_llava, vlm_trainer

Cell = Callable[..., Any]
STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")
# Whether with LoRA, the accumulation, whether with activation checkpointing
PRODUCT = list(itertools.product((False, True), (1, 4), (False, True)))
# Two for each strategy, such that every pair of values meets somewhere, the strategies' too
PAIRWISE: dict[str, list[tuple[bool, int, bool]]] = {
    "ddp": [(False, 1, False), (True, 4, True)],
    "zero2": [(False, 4, False), (True, 1, True)],
    "zero3": [(False, 1, True), (True, 4, False)],
    "fsdp2": [(False, 4, True), (True, 1, False)],
}


def cell_name(trainer: str, adapter: bool, accumulation: int, checkpointing: bool) -> str:
    """Such as `cat-lora-4-checkpointing`."""
    return f"{trainer}-{'lora' if adapter else 'full'}-{accumulation}{'-checkpointing' if checkpointing else ''}"


def _sizes(batch: int, accumulation: int, checkpointing: bool) -> dict[str, Any]:
    sizes = {"per_device_train_batch_size": batch // accumulation, "gradient_accumulation_steps": accumulation}
    return {**sizes, **(copy.deepcopy(CHECKPOINTING) if checkpointing else {})}  # TRL writes into it


def _language(make: Callable[..., Any], modules: Any = "all-linear", **args: Any) -> Callable[..., Cell]:
    """Cells of a trainer of the tiny language model; its adapter, on `modules`, goes to the constructor."""

    def cell(adapter: bool, accumulation: int, checkpointing: bool, rows: dict[str, Any] | None = None) -> Cell:
        def build(folder: str, batch: int, **extra: Any) -> Any:
            given = {**(rows or {}), **({"peft_config": lora(target_modules=modules)} if adapter else {})}
            return make(tiny_model(), folder, given, **{**_sizes(batch, accumulation, checkpointing), **args, **extra})

        return build

    return cell


def _noisefit(model: Any, folder: str, given: dict[str, Any], **args: Any) -> Any:
    policy = NoisePolicy.for_layers(tiny_model(), {0: 1.5}, distribution="gaussian")
    return hold_noise(noisefit_trainer(model, folder, {"noise_policy": policy, **given}, **args))


def _unlearn(model: Any, folder: str, given: dict[str, Any], **args: Any) -> Any:
    return unlearn_trainer(model, folder, {"retain_dataset": tokenised(utility_rows(5)), **given}, **args)


def _classifier(adapter: bool, accumulation: int, checkpointing: bool) -> Cell:
    def build(folder: str, batch: int, **extra: Any) -> Any:
        model = tiny_classifier()
        if adapter:
            model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        # Behind PEFT a model no longer tells that its input are images
        rows = {"train_dataset": labelled_images()}
        return adversarial_trainer(model, folder, rows, **_sizes(batch, accumulation, checkpointing), **extra)

    return build


def _clip(adapter: bool, accumulation: int, checkpointing: bool) -> Cell:
    def build(folder: str, batch: int, **extra: Any) -> Any:
        modules = ["q_proj", "v_proj", "visual_projection"]
        given = {"peft_config": LoraConfig(r=2, target_modules=modules)} if adapter else {}
        return clip_trainer(tiny_clip(), folder, given, **_sizes(batch, accumulation, checkpointing), **extra)

    return build


def _vlm(adapter: bool, accumulation: int, checkpointing: bool) -> Cell:
    def build(folder: str, batch: int, **extra: Any) -> Any:
        modules = r".*language_model.*\.(q_proj|v_proj)"
        given = {"peft_config": LoraConfig(r=2, target_modules=modules)} if adapter else {}
        attack = {"perturbation": "both", "pixel_epsilon": 0.1, "embedding_epsilon": 0.3}
        return vlm_trainer(tiny_llava(), folder, given, **_sizes(batch, accumulation, checkpointing), **attack, **extra)

    return build


def _diffusion(adapter: bool, accumulation: int, checkpointing: bool) -> Cell:
    def build(folder: str, batch: int, **extra: Any) -> Any:
        given: dict[str, Any] = {"train_dataset": image_rows(16)}
        parts: dict[str, Any] = {"peft_config": {"unet": unet_lora()}}
        given |= parts if adapter else {}
        attack = {"attack_epsilon": 0.5, "attack_steps": 2, "adversarial_weight": 0.5}
        return diffusion_trainer(
            tiny_pipeline(), folder, given, **_sizes(batch, accumulation, checkpointing), **attack, **extra
        )

    return build


def _advunlearn(unet: bool) -> Callable[..., Cell]:
    """Cells that erase by the UNet, whose latents are drawn anew for each step, or by the text encoder, out of a bank."""

    def cell(adapter: bool, accumulation: int, checkpointing: bool) -> Cell:
        def build(folder: str, batch: int, **extra: Any) -> Any:
            given: dict[str, Any] = {}
            trained: dict[str, Any] = {"train_parts": ["xattn"]} if unet else {}
            if adapter:
                given = {"peft_config": {"unet": unet_lora()} if unet else {"text_encoder": text_lora()}}
                trained = {}
            bank = {"latent_bank_size": 0 if unet else 20}
            sizes = _sizes(batch, accumulation, checkpointing)
            return advunlearn_trainer(folder, None, given, **sizes, **trained, **bank, **extra)

        return build

    return cell


_CAT = _language(cat_trainer, attack_epsilon=0.3, adversarial_fraction=THREE, attack_batch_size=1)
_CAPO = _language(capo_trainer, attack_epsilon=0.3)
# An adapter outside the layers, which FSDP gathers for longer, and a reference that is the model without adapter
_EMBEDDING = ["q_proj", "embed_tokens"]
_OUTSIDE: dict[str, Cell] = {
    "cat-lora-embedding": _language(cat_trainer, _EMBEDDING, attack_epsilon=0.3)(True, 1, False),
    "cat-lora-representations": _language(cat_trainer, attack_epsilon=0.3, utility_representation_weight=1.0)(
        True, 1, False
    ),
    "capo-lora-embedding": _language(capo_trainer, _EMBEDDING, attack_epsilon=0.3)(True, 1, False),
    "unlearn-lora-embedding": _language(_unlearn, _EMBEDDING, retain_type="kl")(True, 1, False),
}
_TRAINERS: dict[str, Callable[..., Cell]] = {
    "cat": _CAT,
    "capo": _CAPO,
    "noisefit": _language(_noisefit),
    "unlearn": _language(_unlearn, retain_type="kl"),
    "classifier": _classifier,
    "clip": _clip,
    "vlm": _vlm,
    "diffusion": _diffusion,
    "advunlearn": _advunlearn(unet=False),
    "advunlearn_unet": _advunlearn(unet=True),
}


def refusal(strategy: str, trainer: str, adapter: bool, checkpointing: bool) -> str | None:
    """A part of the message where a trainer refuses a strategy; `None` where it runs."""
    pipeline = trainer in ("diffusion", "advunlearn", "advunlearn_unet")
    if pipeline and strategy == "fsdp2":
        return "Use DDP or ZeRO-2"
    if pipeline and strategy == "zero3" and adapter:
        return "adapters can then be neither merged nor saved"
    if pipeline and strategy == "zero3" and trainer != "diffusion":
        return "the processes would wait for each other for ever. Use DDP or ZeRO-2"
    if trainer == "clip" and strategy == "zero3":
        return "use DDP, ZeRO-2 or FSDP2"
    if trainer in ("cat", "capo", "noisefit", "unlearn", "vlm") and strategy == "zero3" and adapter and checkpointing:
        return "use ZeRO-2 or FSDP2 there"
    return None


def _chosen(strategy: str, *, refused: bool) -> dict[str, tuple[Cell, str | None]]:
    """The cells of the product and of the pairwise choice, with their refusals."""
    found = {}
    for trainer, make in _TRAINERS.items():
        # AdvUnlearn runs under two strategies only, which the pairwise choice does not pair with everything
        whole = trainer in ("cat", "capo", "advunlearn")
        for adapter, accumulation, checkpointing in PRODUCT if whole else PAIRWISE[strategy]:
            message = refusal(strategy, trainer, adapter, checkpointing)
            if (message is not None) == refused:
                name = cell_name(trainer, adapter, accumulation, checkpointing)
                found[name] = make(adapter, accumulation, checkpointing), message
    return found


def _short_batch(folder: str, batch: int, **extra: Any) -> Any:
    """
    Of 11 rows, 8 make the first step. Two processes fill the second up with the first 5, so that both have a batch; one
    process is given these 5 as rows. In order, so that both mean the same ones.
    """
    alone = batch == 8
    rows = utility_rows(11).to_list()
    given = {"train_dataset": Dataset.from_list(rows + rows[:5] if alone else rows)}
    sizes = {"per_device_train_batch_size": batch, "train_sampling_strategy": "sequential"}
    attack = {"attack_epsilon": 0.3, "adversarial_fraction": THREE}
    return cat_trainer(tiny_model(), folder, given, **sizes, **attack, **extra)


class _GoesOn(TrainerCallback):
    """Refuses to begin anew, which would end with the same weights."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        assert state.global_step == 2, state.global_step


def _resumed(adapter: bool) -> Cell:
    """A training that goes on behind the second of three steps from its checkpoint, with AdamW, whose state it needs."""

    def build(folder: str, batch: int, **extra: Any) -> Any:
        given = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2, **extra}
        cell = _CAT(adapter, 1, False)
        cell(folder, batch, **given).train()
        trainer = cell(folder, batch, **given)
        trainer.add_callback(_GoesOn())
        trainer.train = functools.partial(trainer.train, resume_from_checkpoint=str(Path(folder) / "checkpoint-2"))
        return trainer

    return build


_RESUMED: dict[str, Cell] = {"cat-full-resumed": _resumed(False), "cat-lora-resumed": _resumed(True)}
# Where processes could fall out of step. Of the utility rows of a window there are 8; the fractions make 1 and 0 others
_UNEVEN: dict[str, Cell] = {
    "cat-rank-without-row": _language(cat_trainer, attack_epsilon=0.3, adversarial_fraction=ONE)(False, 1, False),
    "cat-window-without-row": _language(cat_trainer, attack_epsilon=0.3, adversarial_fraction=0.05)(False, 1, False),
    "cat-short-batch": _short_batch,
    # 12 rows are a window of four micro-batches and one of two
    "cat-short-window": _CAT(False, 4, False, {"train_dataset": utility_rows(12)}),
    "capo-short-window": _CAPO(False, 4, False, {"train_dataset": adversarial_rows(12)}),
}


def all_cells() -> dict[str, Cell]:
    """Every cell, whatever refuses it."""
    return (
        _UNEVEN
        | _OUTSIDE
        | _RESUMED
        | {
            name: cell
            for strategy in STRATEGIES
            for refused in (False, True)
            for name, (cell, _) in _chosen(strategy, refused=refused).items()
        }
    )


def cells_of(strategy: str) -> dict[str, Cell]:
    """The cells that run under a strategy, by name; `"alone"`: those of all strategies."""
    if strategy == "alone":
        return {name: cell for other in STRATEGIES for name, cell in cells_of(other).items()}
    return {name: cell for name, (cell, _) in _chosen(strategy, refused=False).items()} | _UNEVEN | _OUTSIDE | _RESUMED


def refused_cells_of(strategy: str) -> dict[str, str]:
    """The cells that trainers refuse under a strategy, and a part of the message."""
    return {name: str(message) for name, (_, message) in _chosen(strategy, refused=True).items()}
