"""DiffusionTrainer: against a loop written out by hand, cut into other batches, resumed, saved, attacked, refused."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import PeftModel, PromptTuningConfig
from safetensors.torch import load_file
from transformers import TrainingArguments

from hf_robust import DiffusionConfig, DiffusionTrainer
from hf_robust.diffusion import DiffusionModel, TextTokenSite
from hf_robust.noise import NoisePolicy
from hf_robust.trainers.checkpoints import RECORD
from hf_robust.trainers.diffusion_attack import caption_mask
from hf_robust.trainers.diffusion_data import to_pixels
from hf_robust.trainers.schedule import start_seed
from hf_robust.tuners import SaraConfig
from tests.diffusion_helpers import tiny_pipeline, tiny_sdxl_pipeline
from tests.diffusion_trainer_data import (
    CAPTIONS,
    diffusion_settings,
    diffusion_trainer,
    image,
    image_rows,
    list_rows,
    text_lora,
    unet_lora,
)
from tests.trainer_data import logged, max_difference, train, weights

TOLERANCE = 1e-5
TOKENS = {"attack_epsilon": 0.5, "attack_steps": 2}
CONDITIONING = {**TOKENS, "attack_site": "conditioning"}
BOTH = {"train_parts": ["unet", "text_encoder"]}
CHECKPOINTING = {"activation_checkpointing": True}


def refused(*parts: str) -> Any:
    return pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts)))


def noise(scale: float = 0.5, **settings: Any) -> NoisePolicy:
    return NoisePolicy({"unet.mid_block": scale, "unet.up_blocks.1": scale}, distribution="gaussian", **settings)


def picture(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    output = pipeline("a red cat", num_inference_steps=3, generator=generator, output_type="pt", height=16, width=16)
    return output.images


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ---- The loss ----


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_plain_training_is_a_loop_written_out(prediction_type: str, tmp_path: Path):
    rows, dropout = list_rows(8), 0.4
    trainer = diffusion_trainer(
        tiny_pipeline(prediction_type=prediction_type),
        tmp_path,
        {"train_dataset": rows},
        per_device_train_batch_size=8,
        caption_dropout=dropout,
        **BOTH,
    )
    updated = train(trainer)

    pipeline = tiny_pipeline(prediction_type=prediction_type)
    unet, encoder, scheduler = pipeline.unet, pipeline.text_encoder, pipeline.scheduler
    # The embedding tables stay as they are
    trained = [*unet.parameters(), *(p for n, p in encoder.named_parameters() if "embeddings" not in n)]
    losses, emptied = [], 0
    for step in range(3):
        total = 0.0
        for place, row in enumerate(rows):
            generator = torch.Generator().manual_seed(start_seed(42, step, place))
            t = torch.randint(1000, (1,), generator=generator)
            empty = torch.rand(1, generator=generator).item() < dropout
            emptied += empty
            caption = "" if empty else row["text"]
            ids = pipeline.tokenizer(caption, padding="max_length", max_length=12, return_tensors="pt").input_ids
            pixels = to_pixels(row["image"], 16).unsqueeze(0) * 2 - 1
            with torch.no_grad():
                posterior = pipeline.vae.encode(pixels).latent_dist
            shape = posterior.mean.shape[1:]
            clean = posterior.mean + posterior.std * torch.randn(shape, generator=generator)
            clean = clean * pipeline.vae.config.scaling_factor
            noise = torch.randn(shape, generator=generator).unsqueeze(0)
            target = noise if prediction_type == "epsilon" else scheduler.get_velocity(clean, noise, t)
            output = unet(scheduler.add_noise(clean, noise, t), t, encoder(ids)[0]).sample
            total = total + ((output - target) ** 2).mean() / len(rows)
        losses.append(total.item())
        gradients = torch.autograd.grad(total, trained)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter -= 0.5 * gradient
    assert 0 < emptied < 24
    assert logged(trainer, "loss") == pytest.approx(losses, abs=TOLERANCE)
    expected = weights(DiffusionModel(pipeline))
    assert max_difference(updated, expected) < TOLERANCE
    assert max_difference(updated, weights(DiffusionModel(tiny_pipeline()))) > 100 * TOLERANCE


@pytest.mark.parametrize(
    "args",
    [
        {"attack_epsilon": 0.0, "attack_site": "conditioning", "adversarial_weight": 0.5},
        {"attack_epsilon": 0.5, "attack_steps": 0},
    ],
)
def test_an_attack_that_is_off_is_plain_training_bit_for_bit(args: dict[str, Any], tmp_path: Path):
    plain, off = (diffusion_trainer(None, tmp_path, **BOTH, **given) for given in ({}, args))
    assert same(train(plain), train(off))
    assert "adversarial_loss" not in off.state.log_history[0]


def test_an_epsilon_of_almost_nothing_is_almost_plain_training(tmp_path: Path):
    plain = train(diffusion_trainer(None, tmp_path))
    for args in (TOKENS, CONDITIONING):
        found = train(diffusion_trainer(None, tmp_path, **{**args, "attack_epsilon": 1e-7}))
        assert max_difference(plain, found) < TOLERANCE


@pytest.mark.parametrize(
    ("batch", "accumulation", "args"),
    [
        (2, 3, {}),  # windows of 6 and 2 rows
        (3, 2, TOKENS),
        (2, 2, {**CONDITIONING, "adversarial_weight": 0.5, "attack_init": "random"}),
    ],
    ids=["plain", "tokens", "conditioning"],
)
def test_accumulation_is_one_batch(batch: int, accumulation: int, args: dict[str, Any], tmp_path: Path):
    cut = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    parts = diffusion_trainer(None, tmp_path, caption_dropout=0.3, **BOTH, **cut, **args)
    whole = {"per_device_train_batch_size": batch * accumulation}
    one = diffusion_trainer(None, tmp_path, caption_dropout=0.3, **BOTH, **whole, **args)
    assert max_difference(train(parts), train(one)) < TOLERANCE
    for name in ("loss", "adversarial_loss", "attack_loss_first", "clean_loss"):
        assert logged(parts, name) == pytest.approx(logged(one, name), abs=1e-4)


def test_all_captions_dropped_is_training_on_empty_ones(tmp_path: Path):
    empty = [{**row, "text": ""} for row in list_rows()]
    dropped = train(diffusion_trainer(None, tmp_path, caption_dropout=1.0))
    assert same(dropped, train(diffusion_trainer(None, tmp_path, {"train_dataset": empty}, caption_dropout=0.0)))


def test_streams_and_lists_train_as_datasets_do(tmp_path: Path):
    args = {"max_steps": 2, "per_device_train_batch_size": 8}
    expected = train(diffusion_trainer(None, tmp_path, **args))
    stream = image_rows().to_iterable_dataset()
    for rows in (list_rows(), stream):
        found = train(diffusion_trainer(None, tmp_path, {"train_dataset": rows}, **args))
        assert max_difference(expected, found) < TOLERANCE


# ---- Parts and adapters ----


def changed(trainer: DiffusionTrainer) -> set[str]:
    before = weights(trainer.model)
    after = train(trainer)
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("parts", "layers", "pattern"),
    [
        (["unet"], None, r"unet\."),
        (["xattn"], None, r"unet\..*attn2"),
        (["text_encoder", "selfattn"], None, r"text_encoders\.0\..*(layers|final_layer_norm)|unet\..*attn1"),
        (["text_encoder"], 1, r"text_encoders\.0\..*layers\.0\."),
    ],
)
def test_only_the_parts_named_are_trained(parts: list[str], layers: int | None, pattern: str, tmp_path: Path):
    args = {"train_parts": parts, "text_encoder_layers": layers, "max_steps": 2, "caption_dropout": 0.0}
    trainer = diffusion_trainer(None, tmp_path, **args)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and all(re.match(pattern, name) for name in trained)
    found = changed(trainer)
    assert found <= trained and len(found) > len(trained) / 2


def test_adapters_alone_are_trained_and_the_merged_pipeline_draws_the_same(tmp_path: Path):
    config = {"unet": unet_lora(), "text_encoder": text_lora()}
    given = {"peft_config": config}
    trainer = diffusion_trainer(None, tmp_path, given, save_strategy="steps", save_steps=2, **TOKENS)
    found = changed(trainer)
    assert {name.partition(".")[0] for name in found} == {"unet", "text_encoders"}
    assert all("lora_" in name for name in found)
    assert config["unet"].base_model_name_or_path is None  # the user's configuration is left alone
    trainer.save_model()
    drawn = picture(trainer.model.pipeline())
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert torch.allclose(picture(loaded), drawn, atol=1e-4)
    assert (picture(tiny_pipeline()) - drawn).abs().max() > 1e-3
    # The adapters onto the pipeline that they were trained on
    base = tiny_pipeline()
    PeftModel.from_pretrained(base.unet, tmp_path / "adapters" / "unet").merge_and_unload()
    PeftModel.from_pretrained(base.text_encoder, tmp_path / "adapters" / "text_encoder").merge_and_unload()
    assert torch.allclose(picture(base), drawn, atol=1e-4)
    checkpoint = tmp_path / "checkpoint-2"
    assert not (checkpoint / "unet").exists() and (checkpoint / "adapters" / "unet").is_dir()
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pkl", ".ckpt")]


def test_a_dropped_caption_of_sdxl_is_what_its_guidance_compares_with(tmp_path: Path):
    trainer = diffusion_trainer(tiny_sdxl_pipeline(), tmp_path, caption_dropout=1.0)
    model = trainer.model
    batch = trainer._noised(model, batch_of(trainer), 0)
    empty = model.unconditional(4)
    assert empty.hidden.abs().max() == 0 and empty.time_ids.abs().max() > 0
    expected = (model.predict(batch.latents, batch.timesteps, empty) - batch.target).square().mean(dim=(1, 2, 3))
    assert torch.allclose(trainer._denoise(model, batch), expected, atol=1e-6)
    kept = trainer._noised(model, batch_of(trainer), -1)  # evaluation drops none
    assert not kept.emptied.any() and torch.equal(kept.input_ids[0], model.tokenize(CAPTIONS[:4])[0])


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_sdxl(adapter: bool, tmp_path: Path):
    given = {"peft_config": {"unet": unet_lora(), "text_encoder": text_lora()}} if adapter else {}
    args = {**TOKENS, **({} if adapter else BOTH)}
    trainer = diffusion_trainer(tiny_sdxl_pipeline(), tmp_path, given, max_steps=2, **args)
    found = changed(trainer)
    assert {name.split(".")[1] for name in found if name.startswith("text_encoders")} == {"0", "1"}
    trainer.save_model()
    loaded = StableDiffusionXLPipeline.from_pretrained(tmp_path, add_watermarker=False)
    assert torch.allclose(picture(loaded), picture(trainer.model.pipeline()), atol=1e-4)


def test_a_model_with_adapters_goes_on_training_them(tmp_path: Path):
    first = diffusion_trainer(None, tmp_path, {"peft_config": unet_lora()}, max_steps=1)
    train(first)
    second = diffusion_trainer(first.model, tmp_path, max_steps=1)
    assert all("lora_" in name for name in changed(second))
    with refused("`peft_config` is given", "adapters already"):
        diffusion_trainer(first.model, tmp_path, {"peft_config": unet_lora()})


# ---- Saving and resuming ----


def test_a_saved_folder_draws_the_same_picture(tmp_path: Path):
    trainer = diffusion_trainer(None, tmp_path, **BOTH)
    train(trainer)
    trainer.save_model()
    drawn = picture(trainer.model.pipeline())
    assert torch.equal(picture(StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)), drawn)
    assert (drawn - picture(tiny_pipeline())).abs().max() > 1e-3
    assert (tmp_path / "training_prompts.json").is_file()
    # Under FSDP and ZeRO the weights come gathered
    trainer._save(str(tmp_path / "gathered"), state_dict=trainer.model.state_dict())
    gathered = StableDiffusionPipeline.from_pretrained(tmp_path / "gathered", safety_checker=None)
    assert torch.equal(picture(gathered), drawn)


@pytest.mark.parametrize("kind", ["full", "lora", "sara"])
def test_resumed_training_is_uninterrupted_training(kind: str, tmp_path: Path):
    configs = {
        "lora": {"unet": unet_lora(), "text_encoder": text_lora()},
        "sara": {"unet": SaraConfig(threshold=0.05), "text_encoder": SaraConfig(threshold=0.05)},
    }
    given: dict[str, Any] = {"peft_config": configs[kind]} if kind in configs else {}
    more = {} if given else BOTH
    args = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2}
    args |= {"per_device_train_batch_size": 3, **TOKENS, "attack_init": "random", **more}
    given |= {"noise_policy": noise()}
    whole = train(diffusion_trainer(None, tmp_path, given, **args))
    again = diffusion_trainer(None, tmp_path / "again", given, **args)
    assert max_difference(weights(again.model), whole) > 1e-3
    assert same(train(again, resume_from_checkpoint=str(tmp_path / "checkpoint-2")), whole)
    with refused("holds no adapters/unet" if given.get("peft_config") else "is no pipeline folder"):
        (tmp_path / "empty").mkdir()
        diffusion_trainer(None, tmp_path, given, **more)._load_from_checkpoint(str(tmp_path / "empty"))


def test_adapters_are_merged_where_the_weights_are_handed_over(tmp_path: Path):
    """As DeepSpeed's ZeRO-2 does, which gathers them."""
    trainer = diffusion_trainer(None, tmp_path, {"peft_config": unet_lora()})
    trainer._save(str(tmp_path / "own"))
    trainer._save(str(tmp_path / "handed"), state_dict=trainer.model.state_dict())
    own, handed = (
        load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors") for name in ("own", "handed")
    )
    assert same(own, handed)


def test_resuming_with_a_larger_adapter_is_refused(tmp_path: Path):
    small, more = unet_lora(), unet_lora(target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    train(diffusion_trainer(None, tmp_path, {"peft_config": small}, save_strategy="steps", save_steps=1, max_steps=1))
    for tells_settings in (True, False):
        for larger, setting, message in [
            (more, "peft_config.unet.target_modules (", "lacks weights that the adapter has"),
            (unet_lora(r=4), "peft_config.unet.r (2 before", "weights of other sizes than the adapter (size mismatch"),
        ]:
            trainer = diffusion_trainer(None, tmp_path / "again", {"peft_config": larger}, max_steps=2)
            with refused(setting if tells_settings else message):
                trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        (tmp_path / "checkpoint-1" / RECORD).unlink(missing_ok=True)  # as of a plain Trainer


def test_adapters_whose_weights_are_split_are_refused(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr("hf_robust.trainers.diffusion.is_deepspeed_zero3_enabled", lambda: True)
    diffusion_trainer(None, tmp_path)
    with refused("`peft_config`", "ZeRO-3", "Use DDP"):
        diffusion_trainer(None, tmp_path, {"peft_config": unet_lora()})


def test_fsdp_is_refused(tmp_path: Path, monkeypatch: Any):
    create = DiffusionTrainer.create_accelerator_and_postprocess

    def split_weights(self: DiffusionTrainer) -> None:
        create(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(DiffusionTrainer, "create_accelerator_and_postprocess", split_weights)
    with refused("`fsdp`", "VAE", "Use DDP or ZeRO-2"):
        diffusion_trainer(None, tmp_path)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path):
    args = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    # The first evaluation counts as the best
    args |= {"load_best_model_at_end": True, "greater_is_better": True, "max_steps": 2}
    trainer = diffusion_trainer(None, tmp_path, {"eval_dataset": image_rows(4)}, **args)
    train(trainer)
    best = logged(trainer, "eval_loss")
    assert best[0] > best[1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best[0], rel=1e-6)


# ---- Evaluation ----


def test_evaluations_are_comparable(tmp_path: Path):
    rows = {"eval_dataset": image_rows(7)}
    trainer = diffusion_trainer(None, tmp_path, rows, per_device_eval_batch_size=4, noise_policy=None, **TOKENS)
    first = trainer.evaluate()
    second = trainer.evaluate()
    other = diffusion_trainer(None, tmp_path, rows, per_device_eval_batch_size=2, caption_dropout=0.9, **TOKENS)
    third = other.evaluate()
    for name in ("eval_loss", "eval_adversarial_loss"):
        assert first[name] == second[name]
        assert first[name] == pytest.approx(third[name], abs=1e-6)
    assert first["eval_adversarial_loss"] > first["eval_loss"] + 1e-4
    assert "eval_adversarial_loss" not in diffusion_trainer(None, tmp_path, rows).evaluate()
    several = diffusion_trainer(None, tmp_path, {"eval_dataset": {"a": image_rows(3), "b": image_rows(7)}})
    assert several.evaluate()["eval_b_loss"] == pytest.approx(first["eval_loss"], abs=1e-6)


# ---- The adversary ----


def batch_of(trainer: DiffusionTrainer, count: int = 4) -> dict[str, Any]:
    return next(iter(trainer._get_dataloader(image_rows(count), "test", count)))


@pytest.mark.parametrize("site", ["tokens", "conditioning"])
@pytest.mark.parametrize("norm", ["l2_token", "l2", "linf"])
@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl_pipeline])
def test_the_adversary_raises_the_loss_within_its_ball(make: Any, norm: str, site: str, tmp_path: Path):
    args = {"attack_site": site, "attack_norm": norm, "attack_epsilon": 0.25, "caption_dropout": 0.0}
    trainer = diffusion_trainer(make(), tmp_path, attack_steps=3, **args)
    model, inputs = trainer.model, batch_of(trainer)
    random = torch.get_rng_state()
    batch = trainer._noised(model, inputs, 0)
    found = trainer.denoising_attack.search(
        model, batch.input_ids, lambda: trainer._denoise(model, batch), seeds=batch.seeds
    )
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert (-found.last_loss > -found.first_loss + 1e-4).all()
    with trainer.denoising_attack.add(model, found.delta):
        assert torch.allclose(trainer._denoise(model, batch), -found.last_loss, atol=1e-5)
    # The unit of the radius, by hand
    if site == "tokens":
        tables = [encoder.get_input_embeddings().weight for encoder in model.text_encoders]
        unit = torch.cat(tables, dim=-1).norm(dim=-1).mean()
        own = caption_mask(batch.input_ids[0], model.tokenizers[0])
        assert own.sum(dim=1).tolist() == [len(ids) - 2 for ids in model.tokenizers[0](CAPTIONS[:4]).input_ids]
        assert found.delta[~own].abs().max() == 0 and (found.delta[own].norm(dim=-1) > 0).all()
    else:
        unit = model.encode(batch.input_ids).hidden.norm(dim=-1).mean(dim=1)
    size = {
        "l2_token": found.delta.norm(dim=-1).amax(dim=1),
        "l2": found.delta.flatten(1).norm(dim=1),
        "linf": found.delta.flatten(1).abs().amax(dim=1),
    }[norm]
    assert (size <= 0.25 * unit * (1 + 1e-5)).all() and (size > 0.1 * unit).all()


def test_an_absolute_radius(tmp_path: Path):
    trainer = diffusion_trainer(None, tmp_path, attack_epsilon_relative=False, **{**TOKENS, "attack_epsilon": 3.0})
    batch = trainer._noised(trainer.model, batch_of(trainer), 0)
    assert trainer._attack(trainer.model, batch).norm(dim=-1).max() == pytest.approx(3.0, rel=1e-5)


def test_logs_of_the_adversary_and_the_share_of_its_loss(tmp_path: Path):
    trainer = diffusion_trainer(None, tmp_path, adversarial_weight=0.25, caption_dropout=0.0, **TOKENS)
    train(trainer)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in entries:
        assert entry["loss"] == pytest.approx(0.75 * entry["clean_loss"] + 0.25 * entry["adversarial_loss"], abs=1e-4)
        assert entry["attack_loss_first"] == pytest.approx(entry["clean_loss"], abs=1e-4)
        assert entry["adversarial_loss"] > entry["clean_loss"] + 1e-4
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules())
    assert hooks == sum(len(m._forward_hooks) for m in DiffusionModel(tiny_pipeline()).modules())


# ---- Noise on modules, checkpointing ----


def test_noise_on_modules(tmp_path: Path):
    policy = noise()
    rows = {"eval_dataset": image_rows(4)}
    trainer = diffusion_trainer(None, tmp_path, {"noise_policy": policy, **rows}, save_strategy="steps", save_steps=3)
    before = trainer.evaluate()["eval_loss"]
    assert before == diffusion_trainer(None, tmp_path, rows).evaluate()["eval_loss"]  # none in evaluation
    noisy, plain = train(trainer), train(diffusion_trainer(None, tmp_path))
    assert max_difference(noisy, plain) > 1e-4
    assert same(noisy, train(diffusion_trainer(None, tmp_path, {"noise_policy": policy})))
    assert same(plain, train(diffusion_trainer(None, tmp_path, {"noise_policy": noise(0.0)})))
    trainer.save_model()
    assert NoisePolicy.load(tmp_path) == NoisePolicy.load(tmp_path / "checkpoint-3") == policy
    assert same(noisy, train(diffusion_trainer(None, tmp_path / "b", noise_policy=str(tmp_path))))
    assert "gaussian, scale on `unet.mid_block` 0.5" in trainer.card_text()
    with refused("'unet.mid_blocks'", "Did you mean 'unet.mid_block'"):
        diffusion_trainer(None, tmp_path, {"noise_policy": NoisePolicy({"unet.mid_blocks": 0.1})})


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_checkpointing_changes_nothing(adapter: bool, tmp_path: Path):
    given = {"noise_policy": noise(), **({"peft_config": unet_lora()} if adapter else {})}
    args = {**TOKENS, **({} if adapter else BOTH)}
    expected = train(diffusion_trainer(None, tmp_path, given, **args))
    trainer = diffusion_trainer(None, tmp_path, given, **args, **CHECKPOINTING)
    found = train(trainer)
    assert trainer.model.is_activation_checkpointing
    assert max_difference(expected, found) < TOLERANCE
    without = {name: value for name, value in given.items() if name != "noise_policy"}
    assert max_difference(expected, train(diffusion_trainer(None, tmp_path, without, **args))) > 1e-5


# ---- What is refused ----


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ({"train_parts": ["unets"]}, ("part='unets'", "'xattn'")),
        ({"train_parts": []}, ("`train_parts=[]`",)),
        ({"neftune_noise_alpha": 5.0}, ("`neftune_noise_alpha=5.0`", "language model")),
        ({"train_parts": 5}, ("`train_parts=5`", "list of names")),
        ({"train_parts": ["text_encoder"], "text_encoder_layers": 1.5}, ("`text_encoder_layers=1.5`", "whole number")),
        ({"image_size": "16"}, ("`image_size='16'`", "whole number")),
        ({"caption_dropout": "0.1"}, ("`caption_dropout='0.1'`", "number")),
        ({"adversarial_weight": None}, ("`adversarial_weight=None`", "number")),
        ({"text_encoder_layers": 2}, ("`text_encoder_layers=2`", "'text_encoder'")),
        ({"train_parts": ["text_encoder"], "text_encoder_layers": 9}, ("9", "between 1 and 3")),
        ({"image_resize": "crops"}, ("`image_resize='crops'`", "'crop'")),
        ({"image_size": 15}, ("`image_size=15`", "multiple of 2")),
        ({"image_size": 8}, ("row 0", "16 × 16", "8 × 8")),
        ({"caption_truncation": "cut"}, ("`caption_truncation='cut'`",)),
        ({"caption_dropout": 1.5}, ("`caption_dropout=1.5`",)),
        ({"caption_column": "caption"}, ("no column 'caption'",)),
        ({"adversarial_weight": 0}, ("`adversarial_weight=0`",)),
        ({"attack_epsilon": -1}, ("`attack_epsilon=-1`",)),
        ({"attack_site": "token"}, ("`attack_site='token'`", "'tokens'")),
        ({"attack_steps": -1}, ("`attack_steps=-1`",)),
        ({"attack_norm": "l3"}, ("`attack_norm='l3'`",)),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            ("reentrant",),
        ),
    ],
)
def test_wrong_settings_are_named_before_training(args: dict[str, Any], parts: tuple[str, ...], tmp_path: Path):
    with refused(*parts):
        diffusion_trainer(None, tmp_path, **args)


def test_wrong_data_and_models_are_named_before_training(tmp_path: Path):
    long = [{"image": image(0), "text": "a " * 30}]
    with refused("32", "12"):
        diffusion_trainer(None, tmp_path, {"train_dataset": long})
    diffusion_trainer(None, tmp_path, {"train_dataset": long}, caption_truncation="warn")
    with refused("`train_dataset` is empty"):
        diffusion_trainer(None, tmp_path, {"train_dataset": []})
    with refused("`eval_dataset['b']`", "8 × 8"):
        diffusion_trainer(None, tmp_path, {"eval_dataset": {"a": list_rows(), "b": list_rows(2, 8)}})
    with refused("`train_parts=['unet']` together with `peft_config`"):
        diffusion_trainer(None, tmp_path, {"peft_config": unet_lora()}, train_parts=["unet"])
    with refused("`peft_config` has 'vae'"):
        diffusion_trainer(None, tmp_path, {"peft_config": {"vae": unet_lora()}})
    with refused("virtual tokens"):
        diffusion_trainer(None, tmp_path, {"peft_config": PromptTuningConfig(num_virtual_tokens=2)})
    half = tiny_pipeline()
    half.unet.half()
    with refused("float16", "torch.float32"):
        diffusion_trainer(half, tmp_path)
    with refused("`image_size=32`", "SDXL"):
        diffusion_trainer(tiny_sdxl_pipeline(), tmp_path, image_size=32)


def test_training_at_another_size_with_resizing(tmp_path: Path):
    trainer = diffusion_trainer(None, tmp_path, image_size=8, image_resize="crop", max_steps=1)
    train(trainer)
    assert batch_of(trainer)["pixel_values"].shape == (4, 3, 8, 8)


# ---- Around it ----


def test_arguments_of_the_parent_and_folders_are_taken(tmp_path: Path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    args = TrainingArguments(**diffusion_settings(tmp_path / "out", max_steps=1))
    trainer = DiffusionTrainer(str(tmp_path / "model"), args, train_dataset=image_rows())
    assert isinstance(trainer.args, DiffusionConfig) and trainer.args.caption_dropout == 0.1
    train(trainer)
    assert trainer.training_report().base_model == str(tmp_path / "model")
    card = trainer.card_text()
    assert "- unlearn_diff_atk" in card and "- gcg" not in card  # of the attacks that were not run
    assert "library_name: diffusers" in card and "text-to-image" in card and "8 rows" in card
    assert "none: the attack is off" in card


def test_nothing_of_diffusers_is_imported_without_use():
    code = "import sys, hf_robust; from hf_robust import DiffusionTrainer, DiffusionConfig; print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.split()[-1] == "False", done.stderr


def test_checkpoints_hold_safetensors_that_are_the_models_own(tmp_path: Path):
    trainer = diffusion_trainer(None, tmp_path, save_strategy="steps", save_steps=3)
    train(trainer)
    saved = load_file(tmp_path / "checkpoint-3" / "unet" / "diffusion_pytorch_model.safetensors")
    own = trainer.model.unet.state_dict()
    assert saved.keys() == own.keys() and all(torch.equal(saved[name], own[name]) for name in saved)
    assert TextTokenSite(DiffusionModel.from_pretrained(tmp_path / "checkpoint-3")).hidden_size == 16
