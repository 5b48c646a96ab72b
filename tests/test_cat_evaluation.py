"""Evaluation of CATTrainer: the adversarial rows under attack beside the parent's utility rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_robust import CATTrainer
from tests.engine_helpers import hook_count, modes_of
from tests.helpers import tiny_model
from tests.trainer_data import (
    adversarial_rows,
    cat_trainer,
    clean_nll,
    logged,
    lora,
    max_difference,
    row_ids,
    train,
    utility_rows,
    weights,
)

EPSILON = 0.3


class SeenMetrics(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        self.seen.append(dict(metrics))


EVAL_KEYS = ("eval_adversarial_loss", "eval_away_loss", "eval_toward_loss")


def eval_trainer(folder: Path, trainer: dict[str, Any] | None = None, **args: Any) -> CATTrainer:
    given = {"eval_dataset": utility_rows(4), "eval_adversarial_dataset": adversarial_rows(5), **(trainer or {})}
    return cat_trainer(
        tiny_model(), folder, given, **{"attack_epsilon": EPSILON, "per_device_eval_batch_size": 2, **args}
    )


def test_evaluation_on_clean_prompts_has_the_hand_derived_losses(tmp_path: Path):
    trainer = eval_trainer(tmp_path, eval_attack_steps=0, away_weight=0.7, toward_weight=0.4)
    metrics = trainer.evaluate()
    with torch.no_grad():
        nll = {
            answer: torch.cat(
                [clean_nll(tiny_model(), *row_ids(row, answer, end=answer == "chosen")) for row in adversarial_rows(5)]
            ).mean()
            for answer in ("chosen", "rejected")
        }
    assert metrics["eval_toward_loss"] == pytest.approx(nll["chosen"].item(), abs=1e-5)
    assert metrics["eval_away_loss"] == pytest.approx(-nll["rejected"].item(), abs=1e-5)
    expected = 0.4 * nll["chosen"].item() - 0.7 * nll["rejected"].item()
    assert metrics["eval_adversarial_loss"] == pytest.approx(expected, abs=1e-5)


def test_evaluation_attacks_and_leaves_the_model_as_it_was(tmp_path: Path):
    clean = eval_trainer(tmp_path, eval_attack_steps=0).evaluate()
    trainer = eval_trainer(tmp_path, eval_attack_steps=10)
    trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)  # which leaves a flag on the model
    before, modes, hooks = weights(trainer.model), modes_of(trainer.model), hook_count(trainer.model)
    attacked = trainer.evaluate()
    # The attack makes the rejected answers likelier: -nll rises
    assert attacked["eval_away_loss"] > clean["eval_away_loss"] + 1e-3
    assert attacked["eval_loss"] == clean["eval_loss"]
    assert max_difference(before, weights(trainer.model)) == 0 and hook_count(trainer.model) == hooks
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    # Evaluation puts the model in evaluation mode, as the parent's does, and changes nothing else about it
    trainer.model.train()
    assert modes_of(trainer.model) == modes
    # `eval_attack_steps` defaults to the training attack's
    assert eval_trainer(tmp_path, attack_steps=10).evaluate()["eval_away_loss"] == attacked["eval_away_loss"]


def test_random_starts_are_the_same_in_every_evaluation(tmp_path: Path):
    trainer = eval_trainer(tmp_path, attack_init="random", eval_attack_steps=1)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert all(first[key] == second[key] for key in EVAL_KEYS)


def test_evaluation_while_training_reaches_logs_and_callbacks_and_not_the_weights(tmp_path: Path):
    seen = SeenMetrics()
    trainer = eval_trainer(tmp_path, {"callbacks": [seen]}, eval_strategy="steps", eval_steps=1)
    evaluated = train(trainer)
    assert len(seen.seen) == 3
    for key in EVAL_KEYS:
        assert logged(trainer, key) == [metrics[key] for metrics in seen.seen]
    assert len(set(logged(trainer, "eval_adversarial_loss"))) == 3
    assert max_difference(evaluated, train(eval_trainer(tmp_path))) == 0
    # The meters of training are not those of evaluation
    assert not any("attack_loss_first" in entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert len(logged(trainer, "attack_loss_first")) == 3


def test_best_model_by_adversarial_loss(tmp_path: Path):
    trainer = eval_trainer(
        tmp_path,
        {"peft_config": lora()},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=4,
        # Away from the safe answer: the loss under evaluation's weights rises, so an early step is the best
        learning_rate=2.0,
        load_best_model_at_end=True,
        metric_for_best_model="eval_adversarial_loss",
    )
    train(trainer)
    losses = logged(trainer, "eval_adversarial_loss")
    assert trainer.state.best_metric == min(losses)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{losses.index(min(losses)) + 1}")
    # The weights in memory are those that had the best metric
    assert trainer.evaluate()["eval_adversarial_loss"] == pytest.approx(min(losses), abs=1e-5)


def test_several_eval_datasets(tmp_path: Path):
    trainer = eval_trainer(
        tmp_path,
        {"eval_dataset": {"a": utility_rows(2), "b": utility_rows(5)}},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="eval_adversarial_loss",
    )
    metrics = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss", *EVAL_KEYS} <= metrics.keys()
    train(trainer)
    # Once each evaluation, not once each dataset
    assert len(logged(trainer, "eval_adversarial_loss")) == 3
    assert trainer.state.best_metric == min(logged(trainer, "eval_adversarial_loss"))


def test_without_adversarial_eval_rows_evaluation_is_the_parents(tmp_path: Path):
    metrics = eval_trainer(tmp_path, {"eval_adversarial_dataset": None}).evaluate()
    assert "eval_loss" in metrics and not any("adversarial" in key for key in metrics)


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_compute_metrics(tmp_path: Path):
    """The parent's way to metrics of logits, which asks the loss for its outputs."""

    def shape(prediction: Any) -> dict[str, int]:
        return {"vocabulary": prediction.predictions.shape[-1]}

    assert eval_trainer(tmp_path, {"compute_metrics": shape}).evaluate()["eval_vocabulary"] == 61
