"""CAPOTrainer against its parent, against its loss written out by hand, and against itself cut into other batches."""

from pathlib import Path

import pytest
import torch

from tests.helpers import tiny_model
from tests.trainer_data import (
    adversarial_rows,
    capo_trainer,
    clean_nll,
    dpo_trainer,
    logged,
    lora,
    max_difference,
    row_ids,
    train,
    weights,
)

TOLERANCE = 1e-5
EPSILON = 0.3


@pytest.mark.parametrize("off", [{"attack_epsilon": 0.0}, {"attack_steps": 0}], ids=["epsilon-0", "steps-0"])
@pytest.mark.parametrize("dropout", [None, 0.0, 0.2], ids=["full", "lora", "lora-dropout"])
def test_without_attack_is_dpo_bit_for_bit(dropout: float | None, off: dict, tmp_path: Path):
    found = []
    for make, extra in ((dpo_trainer, {}), (capo_trainer, off)):
        if dropout is None:
            peft, extra = {}, {**extra, "precompute_ref_log_probs": True}
        else:
            peft, extra = {"peft_config": lora(lora_dropout=dropout)}, {**extra, "disable_dropout": False}
        found.append(train(make(tiny_model(), tmp_path, peft, gradient_accumulation_steps=2, **extra)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(("batch", "rejected_end"), [(8, True), (8, False), (2, True)])
def test_steps_0_has_the_hand_derived_loss_and_update(batch: int, rejected_end: bool, tmp_path: Path):
    """`(h - 1 / (2 beta))^2` with token-mean log-ratios against the model before training, from unpadded rows."""
    rows = adversarial_rows(8)
    trainer = capo_trainer(
        tiny_model(),
        tmp_path,
        {"train_dataset": rows},
        attack_steps=0,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=8 // batch,
        rejected_end=rejected_end,
    )
    updated = train(trainer)
    model, reference = tiny_model(), tiny_model()
    expected = []
    for _ in range(3):
        losses = []
        for row in rows:
            log_ratio = {}
            for answer in ("chosen", "rejected"):
                ids = row_ids(row, answer, end=rejected_end or answer == "chosen")
                log_ratio[answer] = (clean_nll(reference, *ids).detach() - clean_nll(model, *ids)).mean()
            losses.append((log_ratio["chosen"] - log_ratio["rejected"] - 2.0) ** 2)
        loss = torch.stack(losses).mean()
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        expected.append(loss.item())
    assert expected[0] == pytest.approx(4.0, abs=1e-5)  # the policy is the reference: h = 0
    assert logged(trainer, "loss") == pytest.approx(expected, abs=1e-4)
    assert max_difference(updated, weights(model)) < TOLERANCE


@pytest.mark.parametrize("dropout", [None, 0.0], ids=["full", "lora"])
def test_accumulation_does_not_matter(dropout: float | None, tmp_path: Path):
    def run(batch: int, accumulation: int, **args):
        peft = {} if dropout is None else {"peft_config": lora(lora_dropout=dropout)}
        return train(
            capo_trainer(
                tiny_model(),
                tmp_path,
                peft,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                **{"attack_epsilon": EPSILON, **args},
            )
        )

    whole = run(8, 1)
    for batch, accumulation in ((1, 8), (2, 4)):
        assert max_difference(whole, run(batch, accumulation)) < TOLERANCE
    if dropout is None:
        assert max_difference(whole, run(8, 1, attack_steps=0)) > 100 * TOLERANCE


@pytest.mark.parametrize("init", ["zero", "random"])
@pytest.mark.parametrize("dropout", [None, 0.1], ids=["full", "lora-dropout"])
def test_resume_is_uninterrupted_training(dropout: float | None, init: str, tmp_path: Path):
    def trainer(folder: str):
        peft = {} if dropout is None else {"peft_config": lora(lora_dropout=dropout)}
        return capo_trainer(
            tiny_model(),
            tmp_path / folder,
            peft,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            attack_epsilon=EPSILON,
            attack_init=init,
            save_strategy="steps",
            save_steps=1,
        )

    whole = trainer("whole")
    uninterrupted = train(whole)
    resumed = trainer("resumed")
    again = train(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert max_difference(uninterrupted, again) < TOLERANCE
    for key in ("loss", "attack_loss_first", "attack_loss_last"):
        assert len(logged(resumed, key)) == 3
        assert logged(whole, key) == pytest.approx(logged(resumed, key), abs=TOLERANCE), key
