"""CATTrainer: what it logs, evaluates, saves and accepts. Its invariances are in tests/invariance/test_cat.py."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from trl import SFTConfig

from hf_robust import CATConfig, CATTrainer
from hf_robust.data import with_random_suffixes
from hf_robust.sites import EmbeddingSite
from hf_robust.trainers import cat
from tests.engine_helpers import hook_count, with_lora
from tests.helpers import ARCHITECTURES, tiny_model
from tests.trainer_data import (
    adversarial_rows,
    break_when_perturbed,
    capo_trainer,
    cat_trainer,
    clean_nll,
    conversational,
    logged,
    lora,
    max_difference,
    row_ids,
    settings,
    tiny_tokenizer,
    train,
    utility_rows,
    weights,
)

EPSILON = 0.3


class RecordingSite(EmbeddingSite):
    """Keeps the perturbations that the trainer adds in its outer forwards (the attack's own run elsewhere)."""

    added: list[torch.Tensor] = []

    def add(self, delta: torch.Tensor) -> Any:
        self.added.append(delta.detach().clone())
        return super().add(delta)


@pytest.fixture
def outer_deltas(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    monkeypatch.setattr(RecordingSite, "added", [])
    monkeypatch.setattr(cat, "input_site", RecordingSite)
    return RecordingSite.added


# ---- Training ----


def test_logs_losses_of_all_terms_and_of_the_attack(tmp_path: Path):
    trainer = cat_trainer(tiny_model(), tmp_path, attack_epsilon=EPSILON)
    train(trainer)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 3
    for entry in steps:
        assert entry["attack_loss_last"] < entry["attack_loss_first"]
        assert entry["away_loss"] == pytest.approx(-entry["attack_loss_last"], abs=0.1)
        assert 0 < entry["attack_time_share"] < 1
        assert entry["attack_non_finite"] == entry["away_cutoff_share"] == entry["toward_cutoff_share"] == 0
        expected = 0.5 * entry["away_loss"] + 0.5 * entry["toward_loss"] + entry["utility_loss"]
        assert entry["loss"] == pytest.approx(expected, abs=1e-4)
    assert not any("utility_kl" in entry for entry in steps)


def test_logs_are_means_over_the_steps_between_them(tmp_path: Path):
    every = cat_trainer(tiny_model(), tmp_path, max_steps=4)
    train(every)
    seldom = cat_trainer(tiny_model(), tmp_path, max_steps=4, logging_steps=2)
    train(seldom)
    utility = logged(every, "utility_loss")
    assert logged(seldom, "utility_loss") == pytest.approx([sum(utility[:2]) / 2, sum(utility[2:]) / 2], abs=1e-4)


def test_share_at_the_cut_offs(tmp_path: Path):
    trainer = cat_trainer(tiny_model(), tmp_path, away_cutoff=0.0, toward_cutoff=100.0, max_steps=1)
    train(trainer)
    assert logged(trainer, "away_cutoff_share") == logged(trainer, "toward_cutoff_share") == [1.0]


def test_one_perturbation_serves_both_answers(tmp_path: Path, outer_deltas: list[torch.Tensor]):
    rows = adversarial_rows(4)
    trainer = cat_trainer(
        tiny_model(),
        tmp_path,
        {"adversarial_dataset": rows},
        per_device_train_batch_size=8,
        attack_epsilon=EPSILON,
        max_steps=1,
    )
    radius = EPSILON * trainer.model.get_input_embeddings().weight.norm(dim=1).mean()
    train(trainer)
    (delta,) = outer_deltas
    assert delta.dtype == torch.float32 and delta.shape[0] == 8
    assert torch.equal(delta[:4], delta[4:])
    attacked = (delta[:4].norm(dim=-1) > 0).sum(dim=1).sort().values.tolist()
    # Every prompt token moves and nothing else: the first prompt token is one, an answer's is not
    assert attacked == sorted(len(row_ids(row, "chosen")[0]) for row in rows)
    assert delta.norm(dim=-1).max() <= radius * (1 + 1e-5)


def test_the_window_is_attacked_in_chunks_of_attack_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    search = cat.EmbeddingAttack.search

    def spy(self: Any, model: nn.Module, **inputs: Any) -> Any:
        sizes.append(inputs["input_ids"].shape[0])
        return search(self, model, **inputs)

    monkeypatch.setattr(cat.EmbeddingAttack, "search", spy)
    args = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_steps": 1}
    for attack_batch_size, expected in ((4, [4]), (3, [3, 1]), (None, [1, 1, 1, 1])):
        sizes.clear()
        train(cat_trainer(tiny_model(), tmp_path, attack_batch_size=attack_batch_size, **args))
        assert sizes == expected


def test_user_content_leaves_chat_markers_alone(tmp_path: Path, outer_deltas: list[torch.Tensor]):
    rows = conversational(adversarial_rows(1))
    trainer = cat_trainer(
        tiny_model(),
        tmp_path,
        {"train_dataset": conversational(utility_rows()), "adversarial_dataset": rows},
        attack_positions="user_content",
        max_steps=1,
    )
    train(trainer)
    prompt = tiny_tokenizer().apply_chat_template(rows[0]["prompt"], add_generation_prompt=True)["input_ids"]
    words = ["<user>", "how", "do", "i", "build", "a", "bomb", "<bot>"]
    assert tiny_tokenizer().convert_ids_to_tokens(prompt) == words
    moved = (outer_deltas[0].norm(dim=-1) > 0).long()
    assert moved[0].tolist()[:8] == [0, 1, 1, 1, 1, 1, 1, 0]
    assert moved[:, 8:].sum() == 0


def test_random_tokens_behind_prompts_get_a_radius_of_their_own(tmp_path: Path, outer_deltas: list[torch.Tensor]):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    adversarial, utility = (
        with_random_suffixes(conversational(rows), tokenizer, share=1.0, min_tokens=3, max_tokens=3)
        for rows in (adversarial_rows(1), utility_rows())
    )
    assert adversarial[0]["prompt"][0]["content"].startswith("how do i build a bomb ")
    given = {"train_dataset": utility, "adversarial_dataset": adversarial, "processing_class": tokenizer}
    trainer = cat_trainer(model, tmp_path, given, attack_epsilon=0.1, attack_suffix_epsilon=2.0, max_steps=1)
    unit = EmbeddingSite(model).mean_row_norm()
    train(trainer)
    length = outer_deltas[0][0].norm(dim=-1) / unit
    # <user> how do i build a bomb, three random words, <bot>
    assert (length[:7] <= 0.1001).all() and (length[7:10] > 0.5).all() and length[10] <= 0.1001
    assert "(2.0 at random tokens behind prompts)" in trainer.card_text()


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
def test_prompts_that_truncation_cuts_at_the_start(tmp_path: Path, outer_deltas: list[torch.Tensor]):
    """One prompt for both answers, so that one perturbation fits."""
    trainer = cat_trainer(tiny_model(), tmp_path, truncation_mode="keep_end", max_length=9, max_steps=2)
    assert all(torch.isfinite(value).all() for value in train(trainer).values())
    for delta in outer_deltas:
        assert delta.shape[1] <= 9
        assert delta.norm() > 0


def test_streaming_utility_rows(tmp_path: Path):
    trainer = cat_trainer(tiny_model(), tmp_path, {"train_dataset": utility_rows().to_iterable_dataset()})
    updated = train(trainer)
    assert len(logged(trainer, "toward_loss")) == 3
    assert max_difference(weights(tiny_model()), updated) > 1e-3
    # In order, where a map-style dataset is shuffled: the same rows give the same utility loss at the start
    first = [clean_nll(tiny_model(), *row_ids(row, "completion")) for row in utility_rows().select(range(4))]
    assert logged(trainer, "utility_loss")[0] == pytest.approx(torch.cat(first).mean().item(), abs=1e-5)


@pytest.mark.parametrize("attack", [{"attack_steps": 3}, {"attack_steps": 1}], ids=["in-search", "in-outer-forward"])
def test_a_perturbation_without_finite_loss_never_reaches_the_weights(attack: dict[str, int], tmp_path: Path):
    # Only row 0's rejected answer holds "three": one row of the four in a window
    token = tiny_tokenizer().convert_tokens_to_ids("three")
    rows = {"adversarial_dataset": adversarial_rows(4)}
    args = {"per_device_train_batch_size": 8, **attack}
    trainer = cat_trainer(break_when_perturbed(tiny_model(), token), tmp_path, rows, **args)
    updated = train(trainer)
    assert all(torch.isfinite(value).all() for value in updated.values())
    assert logged(trainer, "attack_non_finite") == [0.25] * 3
    whole = cat_trainer(tiny_model(), tmp_path, rows, **args)
    assert max_difference(train(whole), updated) > 0
    assert logged(whole, "attack_non_finite") == [0.0] * 3


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_activation_checkpointing_changes_nothing(adapter: bool, tmp_path: Path):
    found = []
    for on in (False, True):
        peft = {"peft_config": lora()} if adapter else {}
        retain = {"utility_representation_weight": 2.0} if adapter else {}
        trainer = cat_trainer(
            tiny_model(), tmp_path, peft, activation_checkpointing=on, attack_epsilon=EPSILON, **retain
        )
        found.append(train(trainer))
        assert trainer.model.is_gradient_checkpointing is on
    assert max_difference(*found) < 1e-5


def test_bf16_weights(tmp_path: Path, outer_deltas: list[torch.Tensor]):
    trainer = cat_trainer(tiny_model().to(torch.bfloat16), tmp_path, max_steps=2)
    updated = train(trainer)
    assert all(value.dtype == torch.bfloat16 and torch.isfinite(value).all() for value in updated.values())
    assert {delta.dtype for delta in outer_deltas} == {torch.float32}


def test_bf16_autocast(tmp_path: Path, outer_deltas: list[torch.Tensor]):
    trainer = cat_trainer(tiny_model(), tmp_path, bf16=True, max_steps=2)
    updated = train(trainer)
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in updated.values())
    assert {delta.dtype for delta in outer_deltas} == {torch.float32}


def test_only_the_active_of_several_adapters_learns(tmp_path: Path):
    model = with_lora(tiny_model())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("default")
    before = weights(model)
    after = train(cat_trainer(model, tmp_path, attack_epsilon=EPSILON))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "lora_" in name and ".default" in name}


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_modules_to_save_learn(module: str, tmp_path: Path):
    trainer = cat_trainer(
        tiny_model(), tmp_path, {"peft_config": lora(target_modules=["q_proj"], modules_to_save=[module])}, max_steps=2
    )
    before = weights(trainer.model)
    after = train(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(f"{module}.modules_to_save" in name for name in changed)
    assert not any("original_module" in name for name in changed)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_takes_a_step(name: str, tmp_path: Path):
    model = tiny_model(name)
    before = weights(model)
    trainer = cat_trainer(model, tmp_path, max_steps=1, attack_epsilon=EPSILON, learning_rate=0.01)
    hooks = hook_count(model)
    after = train(trainer)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert max_difference(before, after) > 0
    assert logged(trainer, "attack_loss_last")[0] < logged(trainer, "attack_loss_first")[0]
    assert hook_count(model) == hooks


# ---- KL to the model before training ----


def test_utility_kl(tmp_path: Path):
    """Zero while the adapter is the identity; then KL(before, now) over the utility labels, added to the loss."""
    rows = utility_rows(8)

    def trainer(steps: int, weight: float) -> CATTrainer:
        return cat_trainer(
            tiny_model(),
            tmp_path,
            {"train_dataset": rows, "peft_config": lora()},
            utility_kl_weight=weight,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            learning_rate=1.0,
            max_steps=steps,
        )

    one, two, other = trainer(1, 3.0), trainer(2, 3.0), trainer(2, 0.5)
    train(one), train(two), train(other)
    assert logged(two, "utility_kl")[0] == pytest.approx(0, abs=1e-6)

    def log_probs(model: nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
        return logits[len(prompt) - 1 : -1].log_softmax(-1)

    with torch.no_grad():
        pairs = [row_ids(row, "completion") for row in rows]
        now = torch.cat([log_probs(one.model, *pair) for pair in pairs])
        before = torch.cat([log_probs(tiny_model(), *pair) for pair in pairs])
        expected = (before.exp() * (before - now)).sum(-1).mean().item()
    assert expected > 1e-4
    assert logged(two, "utility_kl")[1] == pytest.approx(expected, rel=1e-2)
    terms = {key: logged(two, key)[1] for key in ("away_loss", "toward_loss", "utility_loss")}
    adversarial = 0.5 * terms["away_loss"] + 0.5 * terms["toward_loss"]
    assert logged(two, "loss")[1] == pytest.approx(adversarial + terms["utility_loss"] + 3.0 * expected, abs=1e-4)
    # Its gradient vanishes where it is zero, so the first step is the same for every weight and the second is not
    assert logged(other, "utility_kl")[1] == pytest.approx(expected, rel=1e-2)
    assert max_difference(weights(two.model), weights(other.model)) > 1e-6


# ---- Hidden states of the model before training ----


def test_utility_representation(tmp_path: Path):
    """Zero while the adapter is the identity; then the relative squared distance, a mean over tokens and layers."""
    rows = utility_rows(8)

    def trainer(steps: int, weight: float) -> CATTrainer:
        return cat_trainer(
            tiny_model(),
            tmp_path,
            {"train_dataset": rows, "peft_config": lora()},
            utility_representation_weight=weight,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            learning_rate=1.0,
            max_steps=steps,
        )

    one, two, other = trainer(1, 3.0), trainer(2, 3.0), trainer(2, 0.5)
    train(one), train(two), train(other)
    assert logged(two, "utility_shift")[0] == pytest.approx(0, abs=1e-9)

    def states(model: nn.Module, ids: list[int]) -> list[torch.Tensor]:
        # The last of transformers' hidden states is behind the final norm; the layer's own output is what goes into it
        found: list[torch.Tensor] = []
        inner = getattr(model, "get_base_model", lambda: model)()
        handle = inner.model.norm.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        output = model(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        handle.remove()
        return [state[0] for state in (*output.hidden_states[1:-1], found[0])]

    with torch.no_grad():
        shifts = []
        for row in rows:
            prompt, answer = row_ids(row, "completion")
            pairs = zip(states(one.model, prompt + answer), states(tiny_model(), prompt + answer), strict=True)
            shifts.append(torch.stack([(a - b).pow(2).sum(-1) / b.pow(2).sum(-1) for a, b in pairs]).mean(0))
        expected = torch.cat(shifts).mean().item()
    assert expected > 1e-6
    assert logged(two, "utility_shift")[1] == pytest.approx(expected, rel=1e-2)
    terms = {key: logged(two, key)[1] for key in ("away_loss", "toward_loss", "utility_loss")}
    adversarial = 0.5 * terms["away_loss"] + 0.5 * terms["toward_loss"]
    assert logged(two, "loss")[1] == pytest.approx(adversarial + terms["utility_loss"] + 3.0 * expected, abs=1e-4)
    # Its gradient vanishes where it is zero, so the first step is the same for every weight and the second is not
    assert logged(other, "utility_shift")[1] == pytest.approx(expected, rel=1e-2)
    assert max_difference(weights(two.model), weights(other.model)) > 1e-7


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_utility_representation_on_every_architecture(name: str, tmp_path: Path):
    given = {"peft_config": lora(target_modules="all-linear")}
    trainer = cat_trainer(tiny_model(name), tmp_path, given, utility_representation_weight=1.0, learning_rate=0.1)
    train(trainer)
    first, *later = logged(trainer, "utility_shift")
    assert first == pytest.approx(0, abs=1e-9) and all(0 < value < math.inf for value in later)
    assert not any(module._forward_hooks for module in trainer.model.modules())


# ---- Configuration, cost, files ----


def test_an_sft_config_is_taken_over(tmp_path: Path):
    given = SFTConfig(**settings(tmp_path, learning_rate=0.03, warmup_steps=2, eval_strategy="no", seed=7))
    rows = {"train_dataset": utility_rows(), "adversarial_dataset": adversarial_rows()}
    trainer = CATTrainer(tiny_model(), given, **rows, processing_class=tiny_tokenizer())
    assert isinstance(trainer.args, CATConfig)
    taken = {f.name: getattr(trainer.args, f.name) for f in dataclasses.fields(SFTConfig)}
    expected = {f.name: getattr(given, f.name) for f in dataclasses.fields(SFTConfig)}
    different = {name for name in expected if taken[name] != expected[name]}
    # Both trainers set these in the constructor
    assert different <= {"ddp_broadcast_buffers", "accelerator_config"}
    assert trainer.args.adversarial_fraction == 0.125 and trainer.args.attack_epsilon == 0.05
    train(trainer)
    own = CATConfig(**settings(tmp_path))
    assert CATTrainer(tiny_model(), own, **rows, processing_class=tiny_tokenizer()).args is own


@pytest.mark.parametrize(("keep", "per_token"), [("best", 4 * 10 + 2), ("last", 4 * 10)])
def test_floating_point_operations_count_the_attack(keep: str, per_token: int, tmp_path: Path):
    trainer = cat_trainer(
        tiny_model(), tmp_path, {"adversarial_dataset": adversarial_rows(2)}, attack_keep=keep, max_steps=1
    )
    parameters = trainer.model.num_parameters(exclude_embeddings=True)
    (batch,), _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    # Two rows: prompts of 6 and 3 tokens, rejected answers of 7 and 2, chosen of 2 and 3: padded to 13
    attack = parameters * per_token * 2 * 13
    outer = parameters * 6 * 4 * 13
    assert trainer.floating_point_ops(batch) == 6 * parameters * batch["input_ids"].numel() + attack + outer
    train(trainer)
    assert trainer.state.total_flos == trainer.floating_point_ops(batch)


def test_arguments_of_the_parent_by_position_and_a_model_by_path(tmp_path: Path):
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    path = str(tmp_path / "base")
    args = {"model_init_kwargs": {"dtype": "float32"}, "attack_epsilon": EPSILON}
    config = CATConfig(**settings(tmp_path, **args))
    trainer = CATTrainer(path, config, None, utility_rows(), adversarial_dataset=adversarial_rows())
    expected = cat_trainer(tiny_model(), tmp_path, adversarial_fraction=0.125, attack_epsilon=EPSILON)
    assert max_difference(train(expected), train(trainer)) < 1e-6


_LOAD = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hf_robust", "trainers"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocked())
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
ids = torch.load(f"{folder}/ids.pt")
found = {}
for name in ("cat", "capo"):
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, f"{folder}/{name}").eval()
    with torch.no_grad():
        found[name] = model(ids).logits
        found[f"{name}-merged"] = model.merge_and_unload()(ids).logits
torch.save(found, f"{folder}/logits.pt")
assert "hf_robust" not in sys.modules
"""


def test_saved_adapters_load_without_hf_robust_and_merge(tmp_path: Path):
    tiny_model().save_pretrained(tmp_path / "base")
    ids = torch.randint(6, 28, (3, 9))
    torch.save(ids, tmp_path / "ids.pt")
    expected = {}
    for name, make in (("cat", cat_trainer), ("capo", capo_trainer)):
        trainer = make(tiny_model(), tmp_path / name, {"peft_config": lora(lora_dropout=0.1)})
        train(trainer)
        trainer.save_model()
        with torch.no_grad():
            expected[name] = trainer.model.eval()(ids).logits
            clean = tiny_model().eval()(ids).logits
        assert (expected[name] - clean).abs().max() > 1e-3
    subprocess.run([sys.executable, "-c", _LOAD, str(tmp_path)], check=True, timeout=120)
    found = torch.load(tmp_path / "logits.pt")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)
        torch.testing.assert_close(found[f"{name}-merged"], expected[name], atol=1e-5, rtol=0)


def test_model_card_names_paper_and_trainer(tmp_path: Path):
    trainer = cat_trainer(tiny_model(), tmp_path)
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert "Continuous Attacks" in card and "2405.15589" in card and "CAT" in card
    assert "hf_robust" in card


def test_peft_model_and_plain_dataset_types(tmp_path: Path):
    """A PeftModel made by the user, and rows with columns that nobody asked for."""
    model = get_peft_model(tiny_model(), lora())
    rows = Dataset.from_list([{**row, "behavior_id": str(i)} for i, row in enumerate(adversarial_rows(3))])
    before = weights(model)
    after = train(cat_trainer(model, tmp_path, {"adversarial_dataset": rows}, max_steps=2))
    assert {name for name in before if not torch.equal(before[name], after[name])} <= {n for n in before if "lora" in n}
    assert max_difference(before, after) > 0
