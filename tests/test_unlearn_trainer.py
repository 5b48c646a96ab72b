"""UnlearnTrainer: what it refuses, which weights it trains, what it compares with, how often it runs the model."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model
from torch import nn
from trl import SFTConfig

from hf_robust import UnlearnConfig, UnlearnTrainer
from hf_robust.cli import main
from hf_robust.trainers.papers import ROBUST_UNLEARNING_PAPERS
from hf_robust.trainers.unlearn import DIRECTION_FILE
from hf_robust.trainers.unlearn_data import PairCollator, PairedRows, check_collated_labels, check_overlap, skip_labels
from hf_robust.trainers.unlearn_robust import ROBUST_FORMS
from tests.helpers import tiny_model
from tests.memory import peak_bytes
from tests.trainer_data import (
    conversational,
    logged,
    lora,
    max_difference,
    settings,
    tiny_tokenizer,
    train,
    utility_rows,
    weights,
)
from tests.unlearn_data import forget_rows, tokenised, unlearn_trainer
from tests.vlm_data import answered_images, llava_processor, tiny_llava

# ---- Configuration ----


@pytest.mark.parametrize(
    ("loss_type", "beta", "forget", "retain", "retain_type"),
    [
        ("grad_diff", None, 1.0, 1.0, "ce"),
        ("npo", 0.1, 1.0, 1.0, "ce"),
        ("simnpo", 4.5, 0.125, 1.0, "ce"),
        ("rmu", None, 1.0, 1.0, "activation"),
        ("undial", 10.0, 1.0, 0.0, "ce"),
        ("ce_u", None, 1.0, 0.0, "ce"),
    ],
)
def test_defaults_are_those_of_each_method(
    loss_type: str, beta: float | None, forget: float, retain: float, retain_type: str, tmp_path: Path
):
    config = UnlearnConfig(**settings(tmp_path), loss_type=loss_type)
    assert (config.beta, config.forget_weight, config.retain_weight, config.retain_type) == (
        beta,
        forget,
        retain,
        retain_type,
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"loss_type": "nop"}, "loss_type='nop'.*npo"),
        ({"retain_type": "klx"}, "retain_type='klx'"),
        ({"robust": "sma"}, "robust='sma'"),
        ({"loss_type": "rmu", "beta": 0.1}, "has no beta"),
        ({"beta": 0}, "beta=0"),
        ({"forget_weight": 0}, "forget_weight=0.*SFTTrainer"),
        ({"retain_weight": -1}, "retain_weight=-1"),
        ({"rmu_weights": ["x"]}, "needs `loss_type='rmu'`"),
        ({"ce_u_skip_tokens": -1}, "ce_u_skip_tokens=-1"),
        ({"activation_layer": 0.5}, "activation_layer=0.5"),
        ({"loss_type": "npo", "simnpo_delta": 0.5}, "`simnpo_delta=0.5` needs `loss_type='simnpo'`.*loss_type='npo'"),
        ({"loss_type": "undial", "ce_u_skip_tokens": 1}, "`ce_u_skip_tokens=1` needs `loss_type='ce_u'`"),
        ({"loss_type": "npo", "rmu_coefficient": 9.0}, "`rmu_coefficient=9.0` needs `loss_type='rmu'`"),
        ({"num_train_epochs": "best"}, "num_train_epochs='best'"),
        ({"sam_rho": 0.5}, "`sam_rho=0.5` needs `robust='sam'`.*robust='none'"),
        ({"robust": "sam", "smooth_samples": 5}, "`smooth_samples=5` needs `robust='smooth'`"),
        ({"robust": "embedding", "latent_steps": 2}, "`latent_steps=2` needs `robust='latent'`"),
        ({"robust": "latent", "attack_epsilon": 0.5}, "`attack_epsilon=0.5` needs `robust='embedding'`"),
        ({"loss_type": "undial", "retain_type": "kl"}, "`retain_type='kl'` without `retain_weight`.*'undial'.*=1"),
        ({"loss_type": "ce_u", "retain_type": "ce"}, "`retain_type='ce'` without `retain_weight`.*'ce_u'"),
        ({"precompute_ref_log_probs": True, "retain_type": "kl"}, "precompute_ref_log_probs"),
        ({"precompute_ref_log_probs": True, "loss_type": "undial"}, "precompute_ref_log_probs"),
    ],
)
def test_configurations_that_say_what_is_wrong(args: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        UnlearnConfig(**settings(tmp_path), **args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"packing": True, "max_length": 8}, "`packing=True`"),
        ({"neftune_noise_alpha": 1.0}, "neftune_noise_alpha"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length'"),
        ({"activation_offloading": True, "robust": "smooth"}, "activation_offloading"),
        ({"activation_offloading": True, "retain_type": "activation"}, "activation_offloading"),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            "use_reentrant",
        ),
        ({"loss_type": "rmu", "activation_layer": 2}, "activation_layer=2.*0 to 1"),
        ({"retain_type": "activation", "activation_layer": -3}, "activation_layer=-3.*0 to 1"),
        ({"robust": "latent", "latent_layer": 7}, "latent_layer=7"),
        ({"loss_type": "rmu", "rmu_weights": ["layers.9.mlp"]}, "'layers.9.mlp' is no trainable weight"),
        ({"loss_type": "rmu", "rmu_weights": ["layers.1.mlp.up_proj", "layers.0"]}, "behind layer 0.*nor the retain"),
        ({"loss_type": "rmu", "rmu_weights": ["layers.1.mlp"], "retain_type": "kl"}, "behind layer 0"),
    ],
)
def test_trainers_that_say_what_is_wrong(args: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        unlearn_trainer(tiny_model(), tmp_path, **args)


@pytest.mark.parametrize("loss_type", ["rmu", "undial"])
def test_a_configuration_is_its_own_again(loss_type: str, tmp_path: Path):
    config = UnlearnConfig(**settings(tmp_path), loss_type=loss_type)
    assert dataclasses.replace(config, seed=3).retain_weight == config.retain_weight


def test_retain_rows_that_no_loss_reads_are_reported(caplog: pytest.LogCaptureFixture, tmp_path: Path):
    unlearn_trainer(tiny_model(), tmp_path, loss_type="undial", retain_weight=None)
    assert "`retain_weight=0` with `loss_type='undial'`: no row of `retain_dataset`" in caplog.text


# ---- Data ----


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"forget_dataset": None}, ValueError, "`forget_dataset` is required"),
        ({"retain_dataset": None}, ValueError, "`retain_dataset` is required.*retain_weight=0"),
        ({"forget_dataset": Dataset.from_list([])}, ValueError, "`forget_dataset` has 0 rows"),
        ({"retain_dataset": Dataset.from_list([])}, ValueError, "`retain_dataset` has 0 rows"),
        ({"retain_dataset": utility_rows(4).to_iterable_dataset()}, TypeError, "`retain_dataset` must be a map-style"),
        ({"train_dataset": forget_rows(2)}, ValueError, "another name of `forget_dataset`"),
        ({"forget_dataset": "no/such/file.jsonl"}, (ValueError, FileNotFoundError), "forget_dataset='no/such"),
    ],
)
def test_rows_that_are_missing(given: dict[str, Any], error: Any, message: str, tmp_path: Path):
    with pytest.raises(error, match=message):
        unlearn_trainer(tiny_model(), tmp_path, given)


@pytest.mark.parametrize("form", ["text", "messages", "conversations", "field", "tokens"])
def test_rows_to_forget_and_to_keep_at_once_are_named(form: str, tmp_path: Path):
    forget, retain = forget_rows(6), utility_rows(4)
    retain = Dataset.from_list([*retain, dict(forget[5]), dict(forget[2])])
    if form == "messages":
        retain = conversational(retain)  # the same words all the same
    if form == "conversations":

        def said(row: Any) -> list[dict[str, str]]:
            return [{"from": "user", "value": row["prompt"]}, {"from": "assistant", "value": row["completion"]}]

        retain = Dataset.from_list([{"conversations": said(row)} for row in retain])
    if form == "field":
        retain = Dataset.from_list([{"words": row["prompt"] + row["completion"]} for row in retain])
    if form == "tokens":
        forget, retain = tokenised(forget), tokenised(retain)
    with pytest.raises(ValueError, match=r"share 2 rows.* 2 \(5\), 5 \(4\)"):
        unlearn_trainer(
            tiny_model(), tmp_path, {"forget_dataset": forget, "retain_dataset": retain}, dataset_text_field="words"
        )


def test_rows_without_a_label_are_named(tmp_path: Path):
    cut = {"forget_dataset": forget_rows(6), "retain_dataset": tokenised(utility_rows(4))}
    with pytest.raises(
        ValueError, match="`forget_dataset` has 2 of 6 rows without a label token: rows 0, 3.*max_length"
    ):
        unlearn_trainer(tiny_model(), tmp_path, cut, max_length=6)
    empty = tokenised(utility_rows(4)).to_list()
    empty[3]["labels"] = [empty[3]["labels"][-1], *[-100] * (len(empty[3]["input_ids"]) - 1)]
    with pytest.raises(ValueError, match="`retain_dataset` has 1 of 4 rows without a label token: rows 3"):
        unlearn_trainer(tiny_model(), tmp_path, {"retain_dataset": Dataset.from_list(empty)})
    with pytest.raises(ValueError, match="behind the first 6 .*ce_u_skip_tokens"):
        unlearn_trainer(tiny_model(), tmp_path, loss_type="ce_u", ce_u_skip_tokens=6)


def test_rows_become_those_of_sft_whatever_their_form(tmp_path: Path):
    """Prompt tokens are no labels, in either kind of rows, although the two kinds differ in form."""
    texts = Dataset.from_list([{"text": "one two three"}, {"text": "four"}])
    trainer = unlearn_trainer(tiny_model(), tmp_path, {"forget_dataset": texts, "retain_dataset": utility_rows(3)})
    rows = trainer.train_dataset
    assert isinstance(rows, PairedRows)
    assert [row["input_ids"][-1] for row in rows.forget] == [3, 3]  # the end is to be forgotten too
    assert all(row["labels"] == row["input_ids"] for row in rows.forget)
    assert rows.retain is not None and rows.retain.to_list() == tokenised(utility_rows(3)).to_list()
    batch = trainer.data_collator([rows[0], rows[1]])
    assert set(batch) == {"forget", "retain"}
    assert (batch["forget"]["labels"] == -100).equal(batch["forget"]["attention_mask"] == 0)
    plain = trainer.data_collator(list(rows.forget))  # rows of an evaluation
    assert plain["input_ids"].shape == (2, 4)


def test_labels_to_skip():
    labels = torch.tensor([[-100, 5, 6, 7], [4, -100, -100, -100]])
    assert skip_labels(labels, 2).tolist() == [[-100, -100, -100, 7], [-100] * 4]


@pytest.mark.parametrize(("forget", "retain"), [(4, 6), (6, 4), (5, 1)])
def test_pairs_use_every_retain_row_and_change_with_the_epoch(forget: int, retain: int):
    rows = PairedRows(tokenised(forget_rows(forget)), tokenised(utility_rows(retain)), seed=0)
    epochs = []
    for epoch in range(12):
        rows.set_epoch(epoch)
        epochs.append([rows.partner(i) for i in range(forget)])
    used = [sum(epoch.count(row) for epoch in epochs) for row in range(retain)]
    assert max(used) - min(used) <= 1
    if retain > 1:
        assert epochs[0] != epochs[1]
    rows.set_epoch(3)
    # Backwards, and in another object: a pair is a function of epoch, number and seed
    again = PairedRows(rows.forget, rows.retain, seed=0)
    again.set_epoch(3)
    assert [again.partner(i) for i in reversed(range(forget))] == list(reversed(epochs[3]))
    assert rows[forget - 1]["retain"] == rows.retain[epochs[3][-1]]


# ---- What runs ----


def _count_forwards(model: nn.Module) -> list[bool]:
    """One entry for each forward: whether it had gradients."""
    calls: list[bool] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: calls.append(torch.is_grad_enabled()))
    return calls


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("args", "references"),
    [
        ({"loss_type": "grad_diff"}, 0),
        ({"loss_type": "rmu"}, 1),
        ({"loss_type": "undial", "retain_type": "kl"}, 2),
        ({"loss_type": "undial", "retain_weight": 0.0}, 1),
        ({"loss_type": "npo", "retain_type": "kl", "robust": "sam"}, 2),
        ({"loss_type": "npo", "robust": "smooth", "smooth_samples": 2}, 1),
    ],
    ids=["grad_diff", "rmu", "undial-kl", "undial-alone", "npo-sam", "npo-smooth"],
)
def test_forwards_run_once(args: dict[str, Any], references: int, adapter: bool, tmp_path: Path):
    given = {"peft_config": lora()} if adapter else {}
    size = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = unlearn_trainer(tiny_model(), tmp_path, given, **size, **args)
    calls = _count_forwards(trainer.model)
    copied = _count_forwards(trainer.reference.copy) if references and not adapter else []
    train(trainer)
    # Of two micro-batches: forget and retain rows once each; SAM's or smoothing's second time for the forget rows
    again = 1 if args.get("robust") else 0
    trained = 1 + again + (0 if args.get("retain_weight") == 0.0 else 1)
    assert calls.count(True) == 2 * trained
    assert len(copied if not adapter else [call for call in calls if not call]) == 2 * references


def test_sam_holds_the_reference_logits_of_one_micro_batch(tmp_path: Path):
    """However many there are in a window."""

    def peak(count: int) -> int:
        trainer = unlearn_trainer(
            tiny_model(vocab_size=4096), tmp_path, {"forget_dataset": tokenised(forget_rows(count))}, loss_type="undial",
            robust="sam", retain_weight=0.0, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=count,
        )  # fmt: skip
        return peak_bytes(lambda: train(trainer))

    few, many = peak(2), peak(10)
    logits = 6 * 4096 * 4  # of the shortest answer
    assert many - few < 3 * logits


def test_precomputed_references_are_those_of_the_frozen_copy(tmp_path: Path):
    """Dropout is on in training and off in the references, of which neither kind draws random numbers."""

    def trainer(**args: Any) -> UnlearnTrainer:
        return unlearn_trainer(tiny_model(attention_dropout=0.2), tmp_path, loss_type="npo", **args)

    copied = trainer()
    found = train(copied)
    before = trainer(precompute_ref_log_probs=True)
    assert max_difference(found, train(before)) < 1e-6
    assert before.reference.copy is None and copied.reference.copy is not None
    calls = _count_forwards(before.model)
    before.args.max_steps = 1
    train(before)  # the references of the first start hold, whatever the model has become
    assert calls.count(False) == 0


def test_the_adapter_switched_off_is_the_frozen_copy(tmp_path: Path):
    """Also when the adapter has been trained, with dropout on, and leaving no mode changed."""
    full = unlearn_trainer(tiny_model(attention_dropout=0.3), tmp_path, loss_type="undial", retain_type="activation")
    adapted = unlearn_trainer(
        tiny_model(attention_dropout=0.3),
        tmp_path,
        {"peft_config": lora(lora_dropout=0.3)},
        loss_type="undial",
        retain_type="activation",
    )
    with torch.no_grad():
        for trainer in (full, adapted):
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1
    frozen = next(p for n, p in adapted.model.named_parameters() if n.endswith("lora_A.default.weight"))
    frozen.requires_grad_(False)
    modes = [module.training for module in adapted.model.modules()]
    part = adapted.data_collator([adapted.train_dataset[i] for i in range(4)])["forget"]
    for kind in ("npo", "undial", "activation"):
        ours, theirs = (t._reference_of(kind, t.model, dict(part)) for t in (adapted, full))
        torch.testing.assert_close(ours, theirs)
        assert not ours.requires_grad and not theirs.requires_grad
    assert [module.training for module in adapted.model.modules()] == modes
    assert not frozen.requires_grad
    # The model itself is another by now
    assert (adapted.forget_losses(adapted.model.eval(), dict(part)) != full.forget_losses(full.model, dict(part))).all()


def test_an_adapter_that_has_changed_the_model_is_refused(tmp_path: Path):
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    with pytest.raises(ValueError, match="carries an adapter.*merge_and_unload"):
        unlearn_trainer(model, tmp_path, loss_type="npo")
    unlearn_trainer(model, tmp_path, loss_type="simnpo")  # compares with nothing


def test_weights_trained_outside_the_adapter_are_refused(tmp_path: Path):
    """Switched off, the adapter would leave them as they have become."""
    given = {"peft_config": lora(bias="all")}
    model = tiny_model(attention_bias=True)
    with pytest.raises(ValueError, match="q_proj.*bias.*outside its adapter.*bias='none'"):
        unlearn_trainer(model, tmp_path, given, loss_type="npo")
    unlearn_trainer(tiny_model(attention_bias=True), tmp_path, given, loss_type="simnpo")
    whole = {"peft_config": lora(target_modules=["q_proj"], modules_to_save=["down_proj"])}
    trainer = unlearn_trainer(tiny_model(), tmp_path, whole, loss_type="npo")
    assert any(p.requires_grad and "modules_to_save" in name for name, p in trainer.model.named_parameters())


# ---- RMU ----


@pytest.mark.parametrize(
    ("args", "adapter", "trained"),
    [
        ({}, False, {"model.layers.0.mlp.down_proj.weight"}),
        ({"activation_layer": -1}, False, {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}),
        ({"rmu_weights": ["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj.weight"]}, False, None),
        ({}, True, {f"base_model.model.model.layers.0.mlp.down_proj.lora_{x}.default.weight" for x in "AB"}),
        ({"rmu_weights": ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"], "retain_type": "kl"}, True, None),
    ],
)
def test_rmu_trains_the_named_weights_only(args: dict, adapter: bool, trained: set[str] | None, tmp_path: Path):
    given = {"peft_config": lora(init_lora_weights="gaussian")} if adapter else {}
    trainer = unlearn_trainer(
        tiny_model(), tmp_path, given, loss_type="rmu", rmu_coefficient=50.0, learning_rate=1.0, **args
    )
    before = weights(trainer.model)
    after = train(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if trained is None:
        pieces = tuple(wanted.removesuffix(".weight") for wanted in args["rmu_weights"])
        trained = {n for n in before if any(p in n for p in pieces) and (not adapter or "lora_" in n)}
    # Behind the steered layer, the first matrix of an adapter whose second one began at 0 has hardly a gradient in three steps
    assert changed == trained if args.get("retain_type") != "kl" else set() < changed < trained
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for name, p in trainer.model.named_parameters() if name in trained}


def test_rmu_s_direction_is_saved_and_is_the_seed_s(tmp_path: Path):
    first, second, other = (unlearn_trainer(tiny_model(), tmp_path, loss_type="rmu", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.rmu_direction, second.rmu_direction)
    assert not torch.equal(first.rmu_direction, other.rmu_direction)
    first.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / DIRECTION_FILE).is_file()


# ---- Robust forms ----


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_sam_without_a_radius_is_plain_bit_for_bit_and_with_one_is_not(adapter: bool, tmp_path: Path):
    def run(**args: Any) -> dict[str, torch.Tensor]:
        given = {"peft_config": lora()} if adapter else {}
        size = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "retain_type": "kl"}
        return train(unlearn_trainer(tiny_model(), tmp_path, given, **size, **args))

    plain, off, on = run(), run(robust="sam", sam_rho=0.0), run(robust="sam", sam_rho=0.1)
    assert all(torch.equal(plain[name], off[name]) for name in plain)
    assert max_difference(plain, on) > 1e-6


@pytest.mark.parametrize("robust", ["latent", "embedding"])
def test_attacks_perturb_the_forget_rows(robust: str, tmp_path: Path):
    form = "latent" if robust == "latent" else "attack"
    args = {f"{form}_epsilon": 0.5, f"{form}_steps": 4}
    trainer = unlearn_trainer(tiny_model(), tmp_path, robust=robust, loss_type="npo", **args)
    found = train(trainer)
    assert all(
        a > b for a, b in zip(logged(trainer, "attack_loss_first"), logged(trainer, "attack_loss_last"), strict=True)
    )
    assert max_difference(found, train(unlearn_trainer(tiny_model(), tmp_path, loss_type="npo"))) > 1e-6


# ---- Models, card, evaluation, command line ----


@pytest.mark.parametrize("loss_type", ["npo", "rmu"])
def test_vision_language_models_forget_through_their_language_model(loss_type: str, tmp_path: Path):
    given = {
        "forget_dataset": answered_images(4),
        "retain_dataset": answered_images(8).select(range(4, 8)),  # the same questions about other images
        "processing_class": llava_processor(),
    }
    trainer = unlearn_trainer(
        tiny_llava(), tmp_path, given, loss_type=loss_type, retain_type="activation", learning_rate=1.0, max_steps=2
    )
    before = weights(trainer.model)
    after = train(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if loss_type == "rmu":
        assert changed == {"model.language_model.layers.0.mlp.down_proj.weight"}
    else:
        assert any("vision_tower" in name for name in changed)
    assert logged(trainer, "retain_loss")[0] == 0 and logged(trainer, "retain_loss")[1] > 0
    with pytest.raises(ValueError, match="both have images, or neither"):
        unlearn_trainer(tiny_llava(), tmp_path, {**given, "retain_dataset": conversational(utility_rows(4))})


@pytest.mark.parametrize(
    "form",
    [
        {"robust": "sam", "sam_rho": 0.5},
        {"robust": "smooth", "smooth_rho": 0.02},
        {"robust": "latent", "latent_epsilon": 0.5, "latent_steps": 2},
        {"robust": "embedding", "attack_epsilon": 0.5, "attack_steps": 2},
    ],
    ids=lambda form: form["robust"],
)
def test_robust_forms_of_a_vision_language_model(form: dict[str, Any], tmp_path: Path):
    """Its language model is attacked, with images in the rows; accumulation makes no difference."""
    given = {
        "forget_dataset": answered_images(4),
        "retain_dataset": answered_images(8).select(range(4, 8)),
        "processing_class": llava_processor(),
    }

    def run(batch: int, **args: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        size = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch}
        trainer = unlearn_trainer(tiny_llava(), tmp_path, given, loss_type="grad_diff", max_steps=1, **size, **args)
        return trainer, train(trainer)

    (_, plain), (trainer, whole), (_, parts) = run(4), run(4, **form), run(2, **form)
    assert max_difference(whole, plain) > 1e-5
    assert max_difference(whole, parts) < 2e-6
    if form["robust"] in ("latent", "embedding"):
        assert logged(trainer, "attack_loss_last")[0] < logged(trainer, "attack_loss_first")[0]


def test_overlap_of_rows_with_images_is_in_words_and_images(tmp_path: Path):
    forget, other = answered_images(4), answered_images(8).select(range(4, 8))
    given = {"forget_dataset": forget, "processing_class": llava_processor()}
    both = concatenate_datasets([other, forget.select([2])])
    with pytest.raises(ValueError, match=r"share 1 rows.* 2 \(4\)"):
        unlearn_trainer(tiny_llava(), tmp_path, {**given, "retain_dataset": both})
    single = Dataset.from_list([{"image": row.pop("images")[0], **row} for row in forget])
    with pytest.raises(ValueError, match=r"share 4 rows.* 0 \(0\), 1 \(1\)"):
        check_overlap(forget, single)
    # Without a common row: other images, other words
    check_overlap(forget, other)
    words = [{"role": "assistant", "content": "it"}]
    check_overlap(forget, Dataset.from_list([{**row, "completion": words} for row in forget], features=forget.features))


def test_overlap_of_rows_behind_a_transform():
    forget, other = answered_images(4), answered_images(8).select(range(4, 8))

    def converted(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {**batch, "images": [[image.convert("L") for image in images] for images in batch["images"]]}

    def hidden(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {name: batch[name] for name in ("prompt", "completion")}

    for transform in (converted, hidden):
        check_overlap(forget.with_transform(transform), other.with_transform(transform))
        with pytest.raises(ValueError, match="share 4 rows"):
            check_overlap(forget.with_transform(transform), forget.with_transform(transform))

    # What is not stored is taken from the transform
    def opened(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [forget[number] for number in batch["number"]]
        return {name: [row[name] for row in rows] for name in ("prompt", "completion")} | {
            "image": [forget[shown]["images"][0] for shown in batch["shown"]]
        }

    first, same, others = (
        Dataset.from_dict({"number": [0, 1], "shown": shown}).with_transform(opened)
        for shown in ([0, 1], [2, 1], [2, 3])
    )
    check_overlap(first, others)
    with pytest.raises(ValueError, match=r"share 1 rows.* 1 \(1\)"):
        check_overlap(first, same)


def test_rows_with_images_behind_a_transform_are_trained_on(tmp_path: Path):
    def same(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {**batch, "images": [list(images) for images in batch["images"]]}

    rows = answered_images(8).with_transform(same)
    given = {"forget_dataset": rows.select(range(4)), "retain_dataset": rows.select(range(4, 8))}
    trainer = unlearn_trainer(
        tiny_llava(), tmp_path, {**given, "processing_class": llava_processor()}, loss_type="grad_diff", max_steps=1
    )
    trainer.train()


@pytest.mark.parametrize("remove_unused_columns", [False, True])
def test_precomputed_references_stay_with_rows_behind_a_transform(remove_unused_columns: bool, tmp_path: Path):
    """Which returns nothing but the columns that it makes."""

    def made(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {name: batch[name] for name in ("prompt", "completion", "images")}

    rows = answered_images(8).with_transform(made)
    given = {"forget_dataset": rows.select(range(4)), "retain_dataset": rows.select(range(4, 8))}
    losses = []
    for precomputed in (False, True):
        trainer = unlearn_trainer(
            tiny_llava(), tmp_path, {**given, "processing_class": llava_processor()}, loss_type="npo", max_steps=2,
            precompute_ref_log_probs=precomputed, remove_unused_columns=remove_unused_columns,
        )  # fmt: skip
        train(trainer)
        losses.append(logged(trainer, "forget_loss"))
    assert losses[0][1] != pytest.approx(
        losses[0][0], rel=1e-3
    )  # of a model that is its own reference it stays the same
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_reference_that_was_lost_is_not_computed_of_the_model_in_training(tmp_path: Path):
    trainer = unlearn_trainer(tiny_model(), tmp_path, precompute_ref_log_probs=True)
    part = trainer.data_collator([trainer.train_dataset[0]])["forget"]
    trainer.forget_losses(trainer.model, dict(part))  # before training that model is the reference
    collate = trainer.data_collator.collator
    trainer.data_collator = lambda rows: {
        kind: dict(collate([row[kind] for row in rows])) for kind in ("forget", "retain")
    }
    trainer.data_collator.collator = collate
    with pytest.raises(RuntimeError, match="lacks the `reference`.*`precompute_ref_log_probs=False`"):
        trainer.train()


def test_a_part_of_many_rows_is_made_into_batches_before_training(monkeypatch: pytest.MonkeyPatch, caplog: Any):
    monkeypatch.setattr("hf_robust.trainers.unlearn_data._COLLATED", 4)
    seen: list[int] = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        seen.extend(row["number"] for row in rows)
        assert all(0 <= draw < 1 for draw in (torch.rand(1).item(), random.random(), np.random.rand()))
        return {"labels": torch.tensor([[-100, -100 if row["number"] in (3, 7) else 5] for row in rows])}

    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    rows, before = Dataset.from_dict({"number": range(10)}), states()
    with pytest.raises(ValueError, match=r"has 1 of 4 rows looked at \(of 10\) without a label token: rows 7\."):
        check_collated_labels(rows, collate, "retain_dataset", None, batch_size=3, progress=False)
    assert seen == [0, 2, 5, 7] and states() == before
    # What it has not seen is warned of once, as it comes up
    pairs = [{"forget": {"number": 0}, "retain": {"number": number}} for number in (2, 3)]
    collator = PairCollator(collate)
    for batch in (pairs[:1], pairs, pairs):
        collator(batch)
    assert [record.getMessage()[:28] for record in caplog.records] == ["A batch of `retain_dataset` "]


def test_rows_with_images_and_without_a_label_are_named(tmp_path: Path):
    given = {
        "forget_dataset": answered_images(4),
        "retain_dataset": answered_images(8).select(range(4, 8)),
        "processing_class": llava_processor(),
    }
    # Questions of 10 and of 11 tokens, the image's among them
    named = r"`forget_dataset` has 2 of 4 rows without a label token: rows 1, 3.*max_length=11"
    with pytest.raises(ValueError, match=named):
        unlearn_trainer(tiny_llava(), tmp_path, given, max_length=11)
    kept = {**given, "forget_dataset": answered_images(4).select([0, 2])}
    with pytest.raises(ValueError, match=named.replace("forget", "retain")):
        unlearn_trainer(tiny_llava(), tmp_path, kept, max_length=11)
    with pytest.raises(ValueError, match="rows without a label token behind the first 3 .*rows 0, 1.*"):
        unlearn_trainer(tiny_llava(), tmp_path, given, loss_type="ce_u", ce_u_skip_tokens=3)


def test_the_card_names_the_papers_of_the_robust_form(tmp_path: Path):
    card = unlearn_trainer(tiny_model(), tmp_path, robust="sam", sam_rho=0.1).card_text()
    assert all(found in card for found in ("arXiv 2404.05868", "arXiv 2010.01412", "arXiv 2502.05374"))
    assert card.count("@inproceedings{") == 3
    assert set(ROBUST_UNLEARNING_PAPERS) == set(ROBUST_FORMS)
    off = unlearn_trainer(tiny_model(), tmp_path, robust="sam", sam_rho=0.0)
    assert "2010.01412" not in off.card_text()


def test_the_parent_s_script_runs_and_the_card_names_the_method(tmp_path: Path):
    trainer = UnlearnTrainer(
        tiny_model(),
        SFTConfig(**settings(tmp_path, max_steps=1)),
        train_dataset=forget_rows(4),
        retain_dataset=utility_rows(4),
        eval_dataset={"forget": forget_rows(2), "retain": utility_rows(2)},
        processing_class=tiny_tokenizer(),
        peft_config=lora(),
    )
    assert trainer.args.loss_type == "npo"
    train(trainer)
    metrics = trainer.evaluate()
    assert metrics["eval_forget_loss"] > 0 and metrics["eval_retain_loss"] > 0
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Negative Preference Optimization" in card and "2404.05868" in card
    report = trainer.training_report()
    assert report.training["loss_type"] == "npo" and report.data["forget_dataset"] == "4 rows"
    assert (tmp_path / "training_prompts.json").is_file()


def test_images_of_files_reach_the_model(tmp_path: Path):
    """Words alone would train without an error."""
    forget, retain = answered_images(4), answered_images(8).select(range(4, 8))
    for name, rows in (("forget", forget), ("retain", retain)):
        rows.to_parquet(tmp_path / f"{name}.parquet")
    given = {f"{name}_dataset": str(tmp_path / f"{name}.parquet") for name in ("forget", "retain")}
    trainer = unlearn_trainer(tiny_llava(), tmp_path, {**given, "processing_class": llava_processor()})
    assert "pixel_values" in trainer.data_collator([trainer.train_dataset[0]])["forget"]
    tiny_llava().save_pretrained(tmp_path / "model")
    llava_processor().save_pretrained(tmp_path / "model")
    arguments = ["unlearn", "--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    arguments += [item for name, path in given.items() for item in (f"--{name}_name", path)]
    arguments += ["--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false", "--report_to", "none"]
    seen: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        step = UnlearnTrainer.training_step

        def watched(self, model, inputs, *args):
            seen.append("pixel_values" in inputs["forget"] and "pixel_values" in inputs["retain"])
            return step(self, model, inputs, *args)

        patch.setattr(UnlearnTrainer, "training_step", watched)
        assert main([*arguments, "--max_steps", "1", "--disable_tqdm", "true"]) == 0
    assert seen == [True]


def test_command_line(tmp_path: Path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    forget_rows(4).to_json(tmp_path / "forget.jsonl")
    utility_rows(4).to_json(tmp_path / "retain.jsonl")
    config = Path(__file__).parents[1] / "examples" / "unlearn.yaml"
    arguments = ["unlearn", "--config", str(config), "--model_name_or_path", str(tmp_path / "model")]
    arguments += ["--forget_dataset_name", str(tmp_path / "forget.jsonl"), "--output_dir", str(tmp_path / "out")]
    cpu = ["--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false", "--report_to", "none"]
    with pytest.raises(SystemExit):
        main([*arguments, *cpu])
    kept = ["--retain_dataset_name", str(tmp_path / "retain.jsonl"), "--max_steps", "1", "--disable_tqdm", "true"]
    assert main([*arguments, *cpu, *kept, "--gradient_accumulation_steps", "1"]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    with pytest.raises(ValueError, match="`sam_rho=0.5` needs `robust='sam'`"):
        main([*arguments, *cpu, *kept, "--sam_rho", "0.5", "--robust", "none"])
    kept += ["--forget_dataset_name", str(tmp_path / "tofu.json"), "--gradient_accumulation_steps", "1"]
    questions = [{"question": row["prompt"], "answer": row["completion"]} for row in forget_rows(4)]
    (tmp_path / "tofu.json").write_text(json.dumps(questions), encoding="utf-8")
    assert main([*arguments, *cpu, *kept]) == 0
    assert "sam" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
