"""
Trainings whose weights must not depend on the number of processes. Imported for one process, and run as a script by
`torchrun --nproc_per_node 2 two_processes.py FOLDER`, which leaves `FOLDER/weights.pt`.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_robust.noise import NoisePolicy
from tests.adversarial_data import adversarial_trainer, tiny_classifier
from tests.diffusion_helpers import tiny_pipeline
from tests.diffusion_trainer_data import diffusion_trainer, image_rows, text_lora, unet_lora
from tests.helpers import tiny_model
from tests.noise_data import hold_noise
from tests.test_robust_clip import clip_trainer, tiny_clip
from tests.trainer_data import (
    adversarial_rows,
    break_when_perturbed,
    capo_trainer,
    cat_trainer,
    lora,
    noisefit_trainer,
    tiny_tokenizer,
    train,
    utility_rows,
)
from tests.unlearn_data import tokenised, unlearn_trainer
from tests.vlm_data import answered_images, llava_processor, preferred_images, tiny_llava, vlm_trainer

CHECKPOINTING = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
# Utility rows of a window are 8: these fractions make 1, 3 and 4 adversarial rows
ONE, THREE, FOUR = 1 / 9, 3 / 11, 1 / 3
# One step keeps a perturbation that was never evaluated, so that the outer forward is the first to meet the NaN
ONE_STEP = {"attack_steps": 1}


def _cat(**args: Any) -> Any:
    return lambda folder, batch: cat_trainer(tiny_model(), folder, **_scaled(batch, args))


def _cat_lora(**args: Any) -> Any:
    return lambda folder, batch: cat_trainer(tiny_model(), folder, {"peft_config": lora()}, **_scaled(batch, args))


def _capo(**args: Any) -> Any:
    return lambda folder, batch: capo_trainer(tiny_model(), folder, **_scaled(batch, args))


def _capo_lora(**args: Any) -> Any:
    return lambda folder, batch: capo_trainer(tiny_model(), folder, {"peft_config": lora()}, **_scaled(batch, args))


def _evaluated(folder: str, batch: int) -> Any:
    # Five rows: a place without a row on one process
    given = {"eval_dataset": utility_rows(4), "eval_adversarial_dataset": adversarial_rows(5)}
    args = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
    return cat_trainer(tiny_model(), folder, given, **_scaled(batch, args))


def _broken(make: Any, rows: str, **args: Any) -> Any:
    def build(folder: str, batch: int) -> Any:
        # The token is in some of the rejected answers only, so in the rows of one process at a time
        model = break_when_perturbed(tiny_model(), tiny_tokenizer().convert_tokens_to_ids("three"))
        return make(model, folder, {rows: adversarial_rows(8)}, **_scaled(batch, args))

    return build


def _noisefit(given: dict[str, Any] | None = None, **args: Any) -> Any:
    def build(folder: str, batch: int) -> Any:
        size = batch // args.get("gradient_accumulation_steps", 1)
        rows = {"train_dataset": utility_rows(), **(given or {})}
        return hold_noise(noisefit_trainer(tiny_model(), folder, rows, per_device_train_batch_size=size, **args))

    return build


def _noise(layer: int) -> dict[str, Any]:
    return {"noise_policy": NoisePolicy.for_layers(tiny_model(), {layer: 1.5}, distribution="gaussian")}


def _diffusion(given: Any = None, **args: Any) -> Any:
    def build(folder: str, batch: int) -> Any:
        size = batch // args.get("gradient_accumulation_steps", 1)
        rows = {"train_dataset": image_rows(16), **(given() if given else {})}
        return diffusion_trainer(tiny_pipeline(), folder, rows, per_device_train_batch_size=size, **args)

    return build


def _classifier(name: str = "vit", model: Any = None, **args: Any) -> Any:
    def build(folder: str, batch: int) -> Any:
        size = batch // args.get("gradient_accumulation_steps", 1)
        settings = {"per_device_train_batch_size": size, "num_replays": 2, **args}
        return adversarial_trainer(tiny_classifier(name, **(model or {})), folder, **settings)

    return build


def _smart(folder: str, batch: int) -> Any:
    """SMART from a start that is not 1e-5: the gradient of so small a divergence is the rounding of its batch."""
    trainer = _classifier("bert", loss_type="smart", proximal_weight=1.0)(folder, batch)
    trainer._search = dataclasses.replace(trainer._search, start_scale=0.05)
    return trainer


def _clip(**args: Any) -> Any:
    return lambda folder, batch: clip_trainer(tiny_clip(), folder, per_device_train_batch_size=batch, **args)


def _unlearn(given: dict[str, Any] | None = None, **args: Any) -> Any:
    def build(folder: str, batch: int) -> Any:
        size = batch // args.get("gradient_accumulation_steps", 1)
        # Fewer rows to keep than to forget: some are kept twice in an epoch
        rows = {"retain_dataset": tokenised(utility_rows(5)), **(given or {})}
        return unlearn_trainer(tiny_model(), folder, rows, per_device_train_batch_size=size, **args)

    return build


def _vlm(**args: Any) -> Any:
    return lambda folder, batch: vlm_trainer(tiny_llava(), folder, per_device_train_batch_size=batch, **args)


def _cat_images(folder: str, batch: int) -> Any:
    rows = {
        "train_dataset": answered_images(), "adversarial_dataset": preferred_images(images=[1, 2]),
        "processing_class": llava_processor(),
    }  # fmt: skip
    return cat_trainer(tiny_llava(), folder, rows, **_scaled(batch, {"adversarial_fraction": THREE}))


def _adapters() -> dict[str, Any]:
    return {"peft_config": {"unet": unet_lora(), "text_encoder": text_lora()}}


_TOKENS = {"attack_epsilon": 0.5, "attack_steps": 2, "caption_dropout": 0.3}
_EVALUATED_DIFFUSION = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}


def _scaled(batch: int, args: dict[str, Any]) -> dict[str, Any]:
    accumulation = args.get("gradient_accumulation_steps", 1)
    return {"per_device_train_batch_size": batch // accumulation, "attack_epsilon": 0.3, **args}


CELLS: dict[str, Callable[[str, int], Any]] = {
    "cat": _cat(adversarial_fraction=FOUR),
    "cat-accumulated": _cat(adversarial_fraction=FOUR, gradient_accumulation_steps=2),
    "cat-uneven": _cat(adversarial_fraction=THREE, attack_batch_size=1),
    "cat-rank-without-row": _cat(adversarial_fraction=ONE),
    "cat-window-without-row": _cat(adversarial_fraction=0.05),
    "cat-reference": _cat(adversarial_fraction=THREE, attack_batch_size=1, reference_compat=True),
    "cat-lora": _cat_lora(adversarial_fraction=FOUR),
    "cat-lora-kl": _cat_lora(adversarial_fraction=ONE, utility_kl_weight=0.5),
    "cat-lora-representation": _cat_lora(
        adversarial_fraction=ONE, utility_representation_weight=5.0, gradient_accumulation_steps=2
    ),
    "cat-checkpointing": _cat(adversarial_fraction=ONE, **CHECKPOINTING),
    "cat-lora-checkpointing": _cat_lora(adversarial_fraction=ONE, **CHECKPOINTING),
    "cat-evaluated": _evaluated,
    "cat-broken": _broken(cat_trainer, "adversarial_dataset", adversarial_fraction=FOUR, **ONE_STEP),
    "capo": _capo(),
    "capo-accumulated": _capo(gradient_accumulation_steps=2),
    "capo-lora": _capo_lora(),
    "capo-checkpointing": _capo(**CHECKPOINTING),
    "capo-lora-checkpointing": _capo_lora(**CHECKPOINTING),
    "capo-broken": _broken(capo_trainer, "train_dataset", **ONE_STEP),
    "cat-images": _cat_images,
    "classifier-pgd": _classifier(gradient_accumulation_steps=2),
    "classifier-trades": _classifier(loss_type="trades", epsilon_schedule="linear"),
    "classifier-kl-dro": _classifier(loss_type="mart", sample_weighting="kl_dro", clean_weight=0.2),
    "classifier-free": _classifier(loss_type="free_at"),
    "classifier-grad-align": _classifier(model={"attn_implementation": "eager"}, loss_type="grad_align"),
    "classifier-freelb": _classifier("bert", loss_type="freelb"),
    "classifier-smart": _smart,
    "classifier-vat": _classifier(loss_type="vat", vat_xi=1.0),
    "classifier-fast": _classifier(loss_type="fast_at", collapse_threshold=1.0),
    "classifier-n-fgsm": _classifier(loss_type="n_fgsm", norm="l1", epsilon=3.0, collapse_guard=False),
    "clip-fare": _clip(),
    "clip-tecoa": _clip(loss_type="tecoa", learning_rate=1e-3),
    "clip-sim-clip": _clip(loss_type="sim_clip"),
    "clip-pmg-aft": _clip(loss_type="pmg_aft", learning_rate=1e-3),
    "unlearn-npo-kl": _unlearn(retain_type="kl", gradient_accumulation_steps=2),
    "unlearn-npo-precomputed": _unlearn(precompute_ref_log_probs=True, per_device_eval_batch_size=3),
    "unlearn-lora-undial": _unlearn({"peft_config": lora()}, loss_type="undial", retain_type="activation"),
    "unlearn-without-retain": _unlearn(loss_type="ce_u", retain_weight=0.0, gradient_accumulation_steps=2),
    "unlearn-rmu": _unlearn(loss_type="rmu", learning_rate=10.0),
    "unlearn-lora-rmu-checkpointing": _unlearn(
        {"peft_config": lora()}, loss_type="rmu", learning_rate=10.0, **CHECKPOINTING
    ),
    "unlearn-sam": _unlearn(robust="sam", sam_rho=0.1, gradient_accumulation_steps=2),
    "unlearn-smooth": _unlearn(robust="smooth", smooth_rho=0.02, smooth_samples=2),
    "unlearn-lora-latent": _unlearn(
        {"peft_config": lora()}, robust="latent", latent_epsilon=0.5, latent_steps=2, gradient_accumulation_steps=2
    ),
    "unlearn-embedding": _unlearn(robust="embedding", attack_epsilon=0.5, attack_steps=2),
    "vlm-both": _vlm(perturbation="both", pixel_epsilon=0.1, embedding_epsilon=0.3),
    "noisefit": _noisefit(_noise(0)),
    "noisefit-accumulated": _noisefit(_noise(0), gradient_accumulation_steps=2),
    "noisefit-calibrated": _noisefit(version="v2", noise_distribution="gaussian"),
    "noisefit-chosen-by-snr": _noisefit(noise_distribution="gaussian", noise_std=1.5, prefix_sharing=False),
    "noisefit-lora-checkpointing": _noisefit({**_noise(0), "peft_config": lora()}, **CHECKPOINTING),
    "diffusion": _diffusion(train_parts=["unet", "text_encoder"], caption_dropout=0.3),
    "diffusion-adversarial": _diffusion(
        train_parts=["unet", "text_encoder"], gradient_accumulation_steps=2, adversarial_weight=0.5, **_TOKENS
    ),
    # Five rows: a place without a row on one process
    "diffusion-lora-evaluated": _diffusion(
        lambda: {**_adapters(), "eval_dataset": image_rows(5)}, **_TOKENS, **_EVALUATED_DIFFUSION, **CHECKPOINTING
    ),
}
_LOGGED = (
    *(
        "away_loss",
        "toward_loss",
        "utility_loss",
        "utility_kl",
        "utility_shift",
        "attack_loss_last",
        "attack_non_finite",
    ),
    *("clean_ce", "noisy_kl", "consistency_kl", "noisy_layers"),
    *("forget_loss", "retain_loss"),
    *("adversarial_loss", "attack_loss_first", "clean_loss"),
    *("away_cutoff_share", "eval_adversarial_loss", "eval_away_loss", "eval_toward_loss"),
)


def run_cell(name: str, batch: int) -> dict[str, Any]:
    """What [`measured`] finds about a cell's trainer."""
    with tempfile.TemporaryDirectory() as folder:
        return measured(CELLS[name](folder, batch))


def measured(trainer: Any) -> dict[str, Any]:
    """Weights after three steps, what was logged, under what the model ran, and how many forwards it made."""
    calls: list[None] = []
    model = trainer.model
    entered = model.unet if hasattr(model, "unet") else model.get_input_embeddings()
    entered.register_forward_pre_hook(lambda module, args: calls.append(None))
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    weights = train(trainer)
    return {
        "weights": weights,
        # Split weights (ZeRO-3, where there is a reference) are empty before the training
        "moved": max(
            (
                (weights[name] - start[name]).abs().max().item()
                for name in weights.keys() & start.keys()
                if weights[name].shape == start[name].shape
            ),
            default=0.0,
        ),
        "logged": [{k: e[k] for k in _LOGGED if k in e} for e in trainer.state.log_history],
        "operations": trainer.state.total_flos,
        "num_processes": trainer.accelerator.num_processes,
        "wrapper": type(trainer.model_wrapped).__name__,
        "forwards": len(calls),
    }


def main() -> None:
    torch.set_num_threads(1)
    found = {name: run_cell(name, 4) for name in CELLS}
    rank = torch.distributed.get_rank()
    torch.save(found, Path(sys.argv[1]) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
