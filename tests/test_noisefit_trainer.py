"""NoiseFiTTrainer: its policy, what it logs, saves, evaluates and refuses. Invariances: tests/invariance/test_noisefit.py."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from peft import PeftModel, PromptTuningConfig
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
)
from trl import SFTConfig

from hf_robust import NoiseFiTConfig, NoiseFiTTrainer
from hf_robust.cli import main
from hf_robust.noise import NoisePolicy, choose_layers, measure_snr
from hf_robust.objectives.noise import LOSS_MODES, noise_loss_weights, noisefit_loss, r_drop_loss
from hf_robust.sites import LabelIndex, label_logits
from hf_robust.trainers import noisefit
from tests.engine_helpers import hook_count, inputs_of, with_lora
from tests.helpers import ARCHITECTURES, tiny_batch, tiny_model
from tests.noise_data import held_noise
from tests.trainer_data import (
    conversational,
    logged,
    lora,
    max_difference,
    noisefit_trainer,
    settings,
    sft_trainer,
    tiny_tokenizer,
    train,
    utility_rows,
    weights,
)

STRONG = {"noise_distribution": "gaussian", "noise_std": 1.5}


def refused(*parts: str) -> Any:
    return pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts)))


# ---- Training ----


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_every_architecture_takes_a_step(version: str, name: str, tmp_path: Path):
    model = tiny_model(name)
    before = weights(model)
    trainer = noisefit_trainer(model, tmp_path, version=version, max_steps=1, **STRONG)
    hooks = hook_count(model)
    after = train(trainer)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert max_difference(before, after) > 0
    assert trainer._shared_layers > 0
    assert hook_count(model) == hooks


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_logs_each_term_and_the_loss_is_their_weighted_sum(adapter: bool, tmp_path: Path):
    given = {"peft_config": lora()} if adapter else {}
    trainer = noisefit_trainer(tiny_model(), tmp_path, given, num_noisy_layers=2, **STRONG)
    train(trainer)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3
    for entry in entries:
        expected = 0.5 * entry["clean_ce"] + 0.5 * entry["noisy_kl"] + 0.1 * entry["consistency_kl"]
        assert entry["loss"] == pytest.approx(expected, abs=1e-4)
        assert entry["noisy_kl"] > 1e-4 and entry["consistency_kl"] > 1e-4
        assert entry["noisy_layers"] == 2
        assert 0 <= entry["mean_token_accuracy"] <= 1


def test_logs_what_the_parent_logs_of_tokens_and_accuracy(tmp_path: Path):
    parent, ours = sft_trainer(tiny_model(), tmp_path), noisefit_trainer(tiny_model(), tmp_path, noise_std=0.0)
    train(parent), train(ours)
    assert logged(ours, "num_tokens") == logged(parent, "num_tokens")
    # The first step's: the loss weighs the cross-entropy by one half
    assert logged(ours, "mean_token_accuracy")[0] == pytest.approx(logged(parent, "mean_token_accuracy")[0])
    assert logged(ours, "clean_ce")[0] == pytest.approx(logged(parent, "loss")[0], abs=1e-4)


@pytest.mark.parametrize("mode", [*LOSS_MODES, "rdrop"])
def test_terms_are_those_of_the_objective(mode: str, tmp_path: Path):
    """The trainer adds the terms up by name; the objective's function adds them up token by token."""
    model = tiny_model(attention_dropout=0.3 if mode == "rdrop" else 0.0)
    args = {} if mode == "rdrop" else {"noise_policy": NoisePolicy.for_layers(model, {0: 1.5}, distribution="gaussian")}
    trainer = noisefit_trainer(model, tmp_path, args, loss_mode=mode, ce_weight=0.3, consistency_weight=0.7)
    batch = tiny_batch()
    index = LabelIndex.from_labels(torch.cat([batch["labels"]] * 3))
    seen: list[torch.Tensor] = []

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(label_logits(*args, **kwargs))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch, held_noise():
        patch.setattr(noisefit, "label_logits", spy)
        loss = trainer.compute_loss(model, dict(batch))
    targets = index.targets[: len(index.targets) // 3]
    parts = seen[0].split(len(targets))
    if mode == "rdrop":
        expected = r_drop_loss(parts[0], parts[1], targets).mean()
    else:
        given = noise_loss_weights(mode, alpha=0.3, consistency=0.7)
        expected = noisefit_loss(parts[0], parts[-2], parts[-1], targets, weights=given, version="v1").mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert len(parts) == (2 if mode in ("rdrop", "ce_noisy", "consistency_only") else 3)
    if len(parts) == 3:
        clean = label_logits(model, LabelIndex.from_labels(batch["labels"]), **inputs_of(batch))
        assert torch.allclose(parts[0], clean, atol=1e-6)
    assert not any(torch.equal(parts[0], part) for part in parts[1:])


def test_a_micro_batch_without_labels_adds_nothing(tmp_path: Path):
    model = tiny_model()
    trainer = noisefit_trainer(model, tmp_path, noise_layers=[0], **STRONG)
    batch = tiny_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for compat in (False, True):
        trainer.args.reference_compat = compat
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(5))
        assert loss.item() == 0
        loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.parameters())


def test_r_drop(tmp_path: Path):
    model = tiny_model()
    trainer = noisefit_trainer(model, tmp_path, {"peft_config": lora(lora_dropout=0.4)}, loss_mode="rdrop", max_steps=2)
    hooks = hook_count(trainer.model)
    train(trainer)
    entry = trainer.state.log_history[1]
    assert entry["loss"] == pytest.approx(entry["noisy_ce"] + entry["rdrop_kl"], abs=1e-4)
    assert entry["rdrop_kl"] > 0 and "noisy_layers" not in entry
    assert trainer.noise_policy is None and hook_count(trainer.model) == hooks
    assert not (tmp_path / "noise_policy.json").exists()


def test_bf16_autocast_and_bf16_weights(tmp_path: Path):
    for model, args in ((tiny_model(), {"bf16": True}), (tiny_model().to(torch.bfloat16), {})):
        trainer = noisefit_trainer(model, tmp_path, **args, **STRONG)
        updated = train(trainer)
        assert all(torch.isfinite(value).all() for value in updated.values())
        assert trainer._shared_layers > 0 and logged(trainer, "noisy_kl")[0] > 1e-4


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_streaming_rows(version: str, tmp_path: Path):
    rows = utility_rows().to_iterable_dataset()
    trainer = noisefit_trainer(tiny_model(), tmp_path, {"train_dataset": rows}, version=version, **STRONG)
    train(trainer)
    assert len(logged(trainer, "noisy_kl")) == 3


def test_sft_config_is_taken_over(tmp_path: Path):
    given = {"train_dataset": utility_rows(), "processing_class": tiny_tokenizer()}
    trainer = NoiseFiTTrainer(tiny_model(num_hidden_layers=3), SFTConfig(**settings(tmp_path, max_steps=1)), **given)
    assert isinstance(trainer.args, NoiseFiTConfig) and trainer.args.max_steps == 1 and trainer.args.ce_weight == 0.5


def test_cost_counts_every_branch_and_shared_layers_once(tmp_path: Path):
    batch = tiny_batch()
    parent = sft_trainer(tiny_model(num_hidden_layers=4), tmp_path).floating_point_ops(dict(batch))
    trainer = noisefit_trainer(tiny_model(num_hidden_layers=4), tmp_path, noise_layers=[2], max_steps=1)
    train(trainer)
    # Three of four layers are shared, the last runs three times
    assert trainer.floating_point_ops(dict(batch)) == pytest.approx(parent * (3 + 3) / 4, abs=1)
    trainer._shared_layers = 0
    assert trainer.floating_point_ops(dict(batch)) == 3 * parent


# ---- Policy ----


@pytest.mark.parametrize("snr_format", ["largest", "lowest"])
def test_v1_takes_the_layers_of_largest_or_lowest_ratio(snr_format: str, tmp_path: Path):
    model = tiny_model(num_hidden_layers=5)
    trainer = noisefit_trainer(model, tmp_path, num_noisy_layers=2, snr_format=snr_format, max_steps=1)
    batch = trainer._calibration_batches(1)[0]
    assert batch["input_ids"].shape[0] == 4
    ratios = [entry.snr for entry in measure_snr(tiny_model(num_hidden_layers=5), batch, mask=batch["attention_mask"])]
    train(trainer)
    expected = {f"model.layers.{layer}": 0.1 for layer in choose_layers(ratios, 2, snr_format)}
    assert trainer.noise_policy.modules == expected


def test_calibration_is_on_two_batches_of_training_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    calibrate = noisefit.calibrate

    def spy(model: Any, batches: Any, **kwargs: Any) -> NoisePolicy:
        seen.extend(batches)
        return calibrate(model, batches, **kwargs)

    monkeypatch.setattr(noisefit, "calibrate", spy)
    trainer = noisefit_trainer(tiny_model(), tmp_path, version="v2", calibration_batch_size=3, max_steps=1)
    train(trainer)
    assert [batch["input_ids"].shape[0] for batch in seen] == [3, 3]
    assert trainer.noise_policy.details["chosen_by"] == "calibration"
    train(trainer)  # the policy of the first call is kept
    assert len(seen) == 2


def test_policy_is_saved_with_model_and_checkpoints_and_printed_in_the_card(tmp_path: Path):
    given = {"peft_config": lora()}
    trainer = noisefit_trainer(tiny_model(), tmp_path, given, save_strategy="steps", save_steps=1, **STRONG)
    train(trainer)
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1", tmp_path / "checkpoint-3"):
        assert NoisePolicy.load(folder) == trainer.noise_policy
    (name,) = trainer.noise_policy.modules
    assert f"gaussian (v1), beta 0.1, scale on `{name}` 1.5" in trainer.card_text()
    assert "2504.03302" in trainer.card_text()


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_measured_policy_is_plotted_beside_the_model(version: str, tmp_path: Path):
    train(noisefit_trainer(tiny_model(), tmp_path, version=version, max_steps=1))
    assert (tmp_path / "noise_policy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_layers_that_were_given_have_no_plot(tmp_path: Path):
    train(noisefit_trainer(tiny_model(), tmp_path, noise_layers=[0], max_steps=1))
    assert not (tmp_path / "noise_policy.png").exists()


def test_resumed_training_takes_the_checkpoints_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any):
    args = {"version": "v2", "save_strategy": "steps", "save_steps": 1}
    first = noisefit_trainer(tiny_model(), tmp_path, **args)
    train(first)

    def never(*args: Any, **kwargs: Any) -> NoisePolicy:
        raise AssertionError("calibrated again")

    monkeypatch.setattr(noisefit, "calibrate", never)
    again = noisefit_trainer(tiny_model(), tmp_path, **args)
    train(again, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.noise_policy == first.noise_policy
    other = {"noise_policy": NoisePolicy.for_layers(tiny_model(), {0: 0.7})}
    with caplog.at_level(logging.WARNING):
        third = noisefit_trainer(tiny_model(), tmp_path, other, **args)
        train(third, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert third.noise_policy == first.noise_policy
    assert "The checkpoint's noise policy is taken" in caplog.text
    (tmp_path / "checkpoint-1" / "noise_policy.json").unlink()
    fourth = noisefit_trainer(tiny_model(), tmp_path, other, **args)
    train(fourth, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert fourth.noise_policy == other["noise_policy"]
    assert "the noise is as given" in caplog.text


def test_a_policy_can_be_given(tmp_path: Path):
    policy = NoisePolicy({"model.layers.0.mlp": 0.5, "model.layers.1": 0.2}, distribution="uniform")
    policy.save(tmp_path / "policy")
    found = []
    for given, args in (({"noise_policy": policy}, {}), ({}, {"noise_policy": str(tmp_path / "policy")})):
        trainer = noisefit_trainer(tiny_model(), tmp_path / "out", given, **args)
        found.append(train(trainer))
        assert trainer.noise_policy == policy
    assert max_difference(*found) == 0
    with refused("'model.layer.0'", "Did you mean 'model.layers.0'"):
        noisefit_trainer(tiny_model(), tmp_path, {"noise_policy": NoisePolicy({"model.layer.0": 0.1})})
    with pytest.raises(FileNotFoundError):
        noisefit_trainer(tiny_model(), tmp_path, noise_policy=str(tmp_path / "nowhere"))


def test_choosing_the_noise_leaves_model_and_random_state_alone(tmp_path: Path):
    model = tiny_model(attention_dropout=0.1)
    trainer = noisefit_trainer(model, tmp_path, version="v2")
    before, random, hooks = weights(model), torch.get_rng_state(), hook_count(model)
    trainer._prepare_noise()
    assert max_difference(before, weights(model)) == 0
    assert torch.equal(random, torch.get_rng_state()) and hook_count(model) == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- Prefix sharing ----


def test_why_sharing_is_off_is_logged(tmp_path: Path, caplog: Any):
    with caplog.at_level(logging.INFO):
        dropping = noisefit_trainer(tiny_model(), tmp_path, {"peft_config": lora(lora_dropout=0.1)}, max_steps=1)
        train(dropping)
        assert "Prefix sharing is off" in caplog.text and "lora_dropout=0" in caplog.text
        caplog.clear()
        sharing = noisefit_trainer(tiny_model(), tmp_path, noise_layers=[1], max_steps=1)
        train(sharing)
        assert "share the first 2 layers" in caplog.text
        caplog.clear()
        unwanted = noisefit_trainer(tiny_model(), tmp_path, prefix_sharing=False, max_steps=1)
        train(unwanted)
        assert "sharing" not in caplog.text
    assert (dropping._shared_layers, sharing._shared_layers, unwanted._shared_layers) == (0, 2, 0)


# ---- Nothing of the noise is left outside training ----


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_evaluation_and_generation_are_free_of_noise(adapter: bool, tmp_path: Path):
    model = with_lora(tiny_model()) if adapter else tiny_model()
    hooks = hook_count(model)
    rows = {"eval_dataset": utility_rows(4)}
    args = {"eval_strategy": "steps", "eval_steps": 1}
    trainer = noisefit_trainer(model, tmp_path, rows, **args, **STRONG)
    train(trainer)
    assert hook_count(model) == hooks
    # What was evaluated in the middle of training is what is evaluated now, by the parent too
    last = logged(trainer, "eval_loss")[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(last, abs=1e-6)
    assert sft_trainer(model, tmp_path, rows).evaluate()["eval_loss"] == pytest.approx(last, abs=1e-6)
    assert not any("noisy" in key for entry in trainer.state.log_history if "eval_loss" in entry for key in entry)
    fresh = with_lora(tiny_model()) if adapter else tiny_model()
    fresh.load_state_dict(model.state_dict())
    prompt = {"input_ids": torch.tensor([[6, 7, 8]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    outputs = [m.eval().generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=1) for m in (model, fresh)]
    assert torch.equal(*outputs)
    with torch.no_grad():
        assert torch.equal(model(**prompt).logits, fresh(**prompt).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hooks_are_gone_after_an_error_in_the_forward_or_the_backward(checkpointing: bool, tmp_path: Path):
    for fails_in in ("forward", "backward"):
        model = tiny_model()
        trainer = noisefit_trainer(model, tmp_path, activation_checkpointing=checkpointing, **STRONG)
        hooks = hook_count(model.model.layers)  # transformers leaves one of its own on the embeddings

        def fail(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("out of memory")

        with pytest.MonkeyPatch.context() as patch:
            if fails_in == "forward":
                patch.setattr(noisefit, "token_nll", fail)
            else:
                patch.setattr(trainer.accelerator, "backward", fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                train(trainer)
        assert hook_count(model.model.layers) == hooks
        assert trainer._step is None


# ---- Vision-language models ----


def tiny_llava() -> LlavaForConditionalGeneration:
    text = LlamaConfig(vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=60, image_seq_length=4, vision_feature_layer=-1
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).train()


@pytest.mark.parametrize("sharing", [True, False])
def test_vision_language_model(sharing: bool, tmp_path: Path):
    """The noise is on the language model's layers; the images' features are computed once where layers are shared."""
    model = tiny_llava()
    trainer = noisefit_trainer(model, tmp_path, noise_layers=[1], prefix_sharing=sharing, max_steps=1, **STRONG)
    train(trainer)
    assert list(trainer.noise_policy.modules) == ["model.language_model.layers.1"]
    assert trainer._shared_layers == (2 if sharing else 0)
    batch = tiny_batch(batch=2)
    batch["input_ids"].clamp_(max=59)[:, 1:5] = 60
    images: list[int] = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: images.append(args[0].shape[0]))
    with held_noise():
        loss = trainer.compute_loss(model.train(), {**batch, "pixel_values": torch.randn(2, 3, 8, 8)})
    loss.backward()
    assert torch.isfinite(loss) and images == [2 if sharing else 6]
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0


# ---- What is refused ----


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ({"noise_std": -0.1}, ["`noise_std=-0.1`", "0.1"]),
        ({"ce_weight": 1.5}, ["`ce_weight=1.5`", "between 0 and 1"]),
        ({"ce_weight": -0.5}, ["`ce_weight=-0.5`", "between 0 and 1"]),
        ({"consistency_weight": -1.0}, ["`consistency_weight=-1.0`", "0"]),
        ({"temperature": 0.0}, ["`temperature=0.0`", "The paper uses 1"]),
        ({"num_noisy_layers": 0}, ["`num_noisy_layers=0`", "3"]),
        ({"version": "v3"}, ["`version='v3'`", "v1", "v2"]),
        ({"loss_mode": "ce_nosy"}, ["`loss_mode='ce_nosy'`", "ce_noisy"]),
        ({"snr_format": "larges"}, ["`snr_format='larges'`", "largest"]),
        ({"noise_distribution": "gauss"}, ["`noise_distribution='gauss'`", "gaussian"]),
        ({"noise_layers": []}, ["`noise_layers=[]`", "one layer at least"]),
        ({"noise_layers": [1], "version": "v2"}, ["`noise_layers=[1]`", "`version='v1'`"]),
        ({"loss_mode": "kl_only", "ce_weight": 1.0}, ["`loss_mode='kl_only'`", "`ce_weight=1.0`"]),
        ({"noise_layers": [2]}, ["`noise_layers=[2]` has 2", "layers 0 to 1"]),
        ({"noise_layers": [0, -3]}, ["`noise_layers=[0, -3]` has -3", "layers 0 to 1"]),
        ({"num_noisy_layers": 3}, ["`num_noisy_layers=3`", "has 2 layers"]),
        ({"neftune_noise_alpha": 5.0}, ["`neftune_noise_alpha=5.0`", "clean branch", "SFTTrainer"]),
        ({"packing": True}, ["`packing=True`", "Set `packing=False`"]),
        ({"padding_free": True}, ["`padding_free=True`", "Set `padding_free=False`"]),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            ["use_reentrant': True", "use_reentrant': False"],
        ),
        ({"loss_type": "dft"}, ["`loss_type='dft'`", "fused", "'nll'"]),
        ({"label_smoothing_factor": 0.1}, ["`label_smoothing_factor=0.1`", "Use 0"]),
        ({"loss_mode": "rdrop"}, ["`loss_mode='rdrop'`", "`lora_dropout`"]),
        ({"layer_list": "model.layer"}, ["`layer_list='model.layer'`"]),
        ({"calibration_batch_size": 0}, ["`calibration_batch_size=0`", "4"]),
        ({"max_ce_increase": -0.1}, ["`max_ce_increase=-0.1`", "0.02"]),
        ({"noise_beta": -1.0}, ["`noise_beta=-1.0`", "0.1"]),
        ({"max_length": 6}, ["no label token", "`max_length=6`"]),
    ],
)
def test_settings(args: dict[str, Any], parts: list[str], tmp_path: Path):
    with refused(*parts):
        noisefit_trainer(tiny_model(), tmp_path, **args)


@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated:FutureWarning")
def test_a_loss_of_the_users(tmp_path: Path):
    with refused("`compute_loss_func`", "SFTTrainer"):
        noisefit_trainer(tiny_model(), tmp_path, {"compute_loss_func": lambda *args, **kwargs: None})


def test_rows_without_labels(tmp_path: Path):
    rows = Dataset.from_list([{"input_ids": [4, 5, 6], "labels": [4, -100, -100]}] * 4)
    args = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    with refused("`train_dataset` has no label token", "completions"):
        noisefit_trainer(tiny_model(), tmp_path, {"train_dataset": rows}, **args)


def test_prompt_learning_adapters(tmp_path: Path):
    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with refused("`peft_config` (PromptTuningConfig)", "LoraConfig"):
        noisefit_trainer(tiny_model(), tmp_path, {"peft_config": adapter})


def test_router_losses(tmp_path: Path):
    config = MixtralConfig(
        vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, router_aux_loss_coef=0.01,
    )  # fmt: skip
    with refused("`model` is a mixture of experts", "`router_aux_loss_coef=0.0`"):
        noisefit_trainer(MixtralForCausalLM(config), tmp_path)
    trainer = noisefit_trainer(MixtralForCausalLM(config), tmp_path, router_aux_loss_coef=0.0, max_steps=1)
    assert all(torch.isfinite(value).all() for value in train(trainer).values())


def test_an_unknown_architecture_is_told_how_to_name_its_layers(tmp_path: Path):
    model = tiny_model()
    model.config.num_hidden_layers = 7
    with refused("cannot tell which list", "`layer_list`", "'model.layers'"):
        noisefit_trainer(model, tmp_path)
    trainer = noisefit_trainer(with_lora(model), tmp_path, layer_list="model.layers", max_steps=1)
    model.config.num_hidden_layers = 2
    train(trainer)
    assert trainer._shared_layers > 0


# ---- Command line ----


CPU = ["--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false", "--report_to", "none"]


def arguments(folder: Path, *more: str) -> list[str]:
    tiny_model(num_hidden_layers=3).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = conversational(utility_rows(8)).to_list()
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return [
        "noisefit", "--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "rows.jsonl"),
        "--output_dir", str(folder / "out"), "--max_steps", "2", *CPU, *more,
    ]  # fmt: skip


def test_command_line_with_the_examples_configuration(tmp_path: Path):
    config = Path(__file__).parent.parent / "examples" / "noisefit.yaml"
    known = yaml.safe_load(config.read_text(encoding="utf-8"))
    defaults = NoiseFiTConfig(**settings(tmp_path))
    for name in ("version", "num_noisy_layers", "snr_format", "noise_std", "loss_mode", "ce_weight", "temperature"):
        assert known[name] == getattr(defaults, name)
    assert main(arguments(tmp_path, "--config", str(config), "--gradient_accumulation_steps", "1")) == 0
    out = tmp_path / "out"
    policy = NoisePolicy.load(out)
    assert len(policy.modules) == 3 and policy.version == "v1"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), out)
    assert model.peft_config["default"].r == 8
    history = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert history[-1]["step"] == 2


def test_command_line_takes_layers_and_evaluates(tmp_path: Path):
    more = [
        "--noise_layers",
        "0",
        "-1",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
        "--dataset_test_split",
        "train",
    ]
    assert main(arguments(tmp_path, *more, "--save_strategy", "no")) == 0
    assert set(NoisePolicy.load(tmp_path / "out").modules) == {"model.layers.0", "model.layers.2"}
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert sum("eval_loss" in entry for entry in history) == 2


def test_command_line_names_what_is_missing(tmp_path: Path):
    given = arguments(tmp_path)
    place = given.index("--model_name_or_path")
    with refused("`--model_name_or_path`"):
        main(given[:place] + given[place + 2 :])
