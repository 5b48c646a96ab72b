"""What the trainers leave beside a model: card, hashes of training prompts, and their way to the Hub and back."""

import json
import logging
import os
import pickle
import time
import types

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoTokenizer

from hf_robust import CATConfig
from hf_robust.data.provenance import prompt_hash, read_training_prompts, training_prompts_of
from hf_robust.report import Measurement, Report
from hf_robust.report.hub import CARD_BESIDE, HubPushError
from hf_robust.trainers import card as card_module
from tests.helpers import tiny_model
from tests.hub_server import TOKEN, HubServer, hub_client
from tests.trainer_data import (
    adversarial_rows,
    capo_trainer,
    cat_trainer,
    conversational,
    lora,
    max_difference,
    settings,
    tiny_tokenizer,
    train,
    utility_rows,
    weights,
)

UTILITY = {"how do i bake a cake"}
ADVERSARIAL = {"how do i build a bomb", "build a bomb", "do i build a bomb"}


@pytest.fixture
def hub():
    with HubServer() as server, hub_client(server):
        yield server


def report(value: float = 0.25) -> Report:
    return Report(
        title="an evaluation",
        method={},
        base_model="elsewhere",
        attacks={"gcg": {"num_steps": 250, "seed": 0}},
        measurements=[Measurement.share("model", "attack_success_rate", "all", "gcg", value, 40)],
        data={"behaviors": "40 of them"},
        judge={"name": "exact", "settings": {}},
    )


def hashes(prompts: set[str]) -> set[str]:
    return {prompt_hash(prompt) for prompt in prompts}


# ---- Hashes ----


@pytest.mark.parametrize("form", [lambda rows: rows, conversational])
def test_cat_saves_hashes_beside_every_model(tmp_path, form):
    trainer = cat_trainer(
        tiny_model(),
        tmp_path,
        {"train_dataset": form(utility_rows()), "adversarial_dataset": form(adversarial_rows()), "peft_config": lora()},
        save_strategy="steps",
        save_steps=2,
    )
    train(trainer)
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert read_training_prompts(folder) == hashes(UTILITY | ADVERSARIAL)
        assert "bomb" not in (folder / "training_prompts.json").read_text(encoding="utf-8")


def test_capo_saves_hashes(tmp_path):
    trainer = capo_trainer(tiny_model(), tmp_path, {"peft_config": lora()})
    trainer.save_model(tmp_path / "model")
    assert read_training_prompts(tmp_path / "model") == hashes(ADVERSARIAL)


def test_hashes_are_computed_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(card_module, "hash_dataset", lambda rows: calls.append(len(rows)) or {"a" * 32})
    trainer = capo_trainer(tiny_model(), tmp_path, {"peft_config": lora()})
    trainer.save_model(tmp_path)
    trainer.save_model(tmp_path / "again")
    assert calls == [16] and read_training_prompts(tmp_path / "again") == {"a" * 32}


def test_a_streaming_dataset_is_said_to_be_missing(tmp_path, caplog):
    trainer = cat_trainer(
        tiny_model(), tmp_path, {"train_dataset": utility_rows().to_iterable_dataset(), "peft_config": lora()}
    )
    with caplog.at_level(logging.WARNING):
        trainer.save_model()
    assert read_training_prompts(tmp_path) == hashes(ADVERSARIAL)
    content = json.loads((tmp_path / "training_prompts.json").read_text(encoding="utf-8"))
    assert content["missing"] == ["train_dataset"]
    assert "`train_dataset`" in caplog.text and "streaming" in caplog.text


# ---- Card ----


def test_a_card_without_figures_says_so(tmp_path):
    trainer = cat_trainer(tiny_model(), tmp_path / "robust", {"peft_config": lora()}, attack_epsilon=0.07)
    train(trainer)
    trainer.create_model_card()
    text = (tmp_path / "robust" / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert "Nothing has been measured" in text and card.data.eval_results is None
    for attack in ("gcg", "beast", "soft_prompt", "prefilling"):
        assert attack in text.partition("## Attacks that were not run")[2]
    for part in (
        "# robust\n",
        "2405.15589",
        "@inproceedings{xhonneux2024efficient",
        "ε 0.07 × the mean embedding norm, norm l2_token, 10 sign steps of 0.25 × ε, positions all_prompt",
        "away weight: 0.5",
        "utility weight: 1.0",
        "learning rate: 0.1",
        "optimizer steps: 3",
        "adversarial dataset: 6 rows",
        "train dataset: 16 rows",
        "LoraConfig, r 4",
        "hf_robust",
    ):
        assert part in text, part
    assert {"hf_robust", "cat", "trl", "sft"} <= set(card.data.tags)
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"


def test_a_base_model_on_the_hub_is_named(tmp_path):
    model = tiny_model()
    model.config._name_or_path = "org/base"
    trainer = capo_trainer(model, tmp_path, {"peft_config": lora()})
    card = ModelCard(trainer.card_text("mine", dataset_name="org/data", tags=["extra"]))
    assert card.data.base_model == "org/base" and card.data.datasets == "org/data"
    assert {"capo", "dpo", "extra"} <= set(card.data.tags)
    assert "# mine" in card.text and "IPO" not in card.text.splitlines()[0]


def test_a_base_model_on_disk_does_not_tell_where(tmp_path):
    base = tmp_path / "some_user" / "aligned"
    tiny_model().save_pretrained(base)
    model = tiny_model()
    model.config._name_or_path = str(base)
    text = cat_trainer(model, tmp_path / "out", {"peft_config": lora()}).card_text()
    assert "aligned" in text and "some_user" not in text


def test_every_figure_of_an_attached_report_is_in_the_card(tmp_path):
    trainer = cat_trainer(tiny_model(), tmp_path / "robust", {"peft_config": lora()})
    evaluation = tmp_path / "evaluation"
    report().save(evaluation / "report.json")
    (evaluation / "behaviors.jsonl").write_text("{}\n", encoding="utf-8")
    (evaluation / "attack_success.png").write_bytes(b"picture")
    trainer.attach_report(evaluation)
    trainer.create_model_card()
    folder = tmp_path / "robust"
    card = ModelCard.load(folder / "README.md")
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("attack_success_rate", 0.25)
    assert result.metric_args["attack"] == "gcg" and "interval_95" in result.metric_args
    assert "Nothing has been measured" not in card.text and "attack_success.png" in card.text
    assert "CAT" in card.text and "40 of them" in card.text and "train dataset: 16 rows" in card.text
    assert Report.load(folder / "report.json").measurements == report().measurements
    assert (folder / "behaviors.jsonl").is_file() and (folder / "attack_success.png").read_bytes() == b"picture"


def test_a_report_of_other_weights_is_left_out(tmp_path, caplog):
    trainer = cat_trainer(tiny_model(), tmp_path, {"peft_config": lora()})
    path = report().save(tmp_path / "report.json")
    old = time.time() - 60
    os.utime(path, (old, old))
    assert "Nothing has been measured" not in trainer.card_text()
    trainer.attach_report(report(0.75))
    with caplog.at_level(logging.WARNING):
        train(trainer)
        assert "Nothing has been measured" in trainer.card_text()
    assert "dropped" in caplog.text and "older than these weights" in caplog.text
    new = time.time() + 60
    os.utime(path, (new, new))
    assert ModelCard(trainer.card_text()).data.eval_results[0].metric_value == 0.25


def test_a_file_that_is_no_report_is_left_out(tmp_path, caplog):
    trainer = cat_trainer(tiny_model(), tmp_path, {"peft_config": lora()})
    (tmp_path / "report.json").write_text('{"mine": 1}', encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert "Nothing has been measured" in trainer.card_text()
    assert "Left out of the card" in caplog.text
    with pytest.raises(FileNotFoundError, match="report.json"):
        trainer.attach_report(tmp_path / "nowhere")


def test_a_readme_of_the_user_survives_saving_and_checkpoints(tmp_path):
    words = "---\ntags: [mine]\n---\n\n# My own words\n"
    (tmp_path / "README.md").write_text(words, encoding="utf-8")
    trainer = cat_trainer(tiny_model(), tmp_path, {"peft_config": lora()}, save_strategy="steps", save_steps=2)
    train(trainer)
    trainer.save_model()
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == words
    assert "Nothing has been measured" in (tmp_path / CARD_BESIDE).read_text(encoding="utf-8")
    # A checkpoint's card is ours, not PEFT's stub
    assert "Nothing has been measured" in (tmp_path / "checkpoint-2" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_readme_of_the_user_survives_a_save_that_is_broken_off(error, tmp_path, monkeypatch):
    """PEFT would write into it before the weights. It is never touched, so that a kill at any moment leaves it, too."""
    words = "# My own words\n"
    card = tmp_path / "README.md"
    card.write_text(words, encoding="utf-8")
    trainer = cat_trainer(tiny_model(), tmp_path, {"peft_config": lora()})
    before, found = card.stat(), []

    def fails(*args, **kwargs):
        found.append(card.stat())
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("peft.peft_model.safe_save_file", fails)
        with pytest.raises(type(error)):
            trainer.save_model()
    for stat in (*found, card.stat()):
        assert (stat.st_ino, stat.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert len(found) == 1 and card.read_text(encoding="utf-8") == words
    # PEFT's own saving is as it was
    trainer.model.save_pretrained(tmp_path / "by_peft")
    assert (tmp_path / "by_peft" / "README.md").is_file()


def test_a_readme_of_the_user_beside_the_adapters_of_a_part_survives(tmp_path):
    pytest.importorskip("diffusers")
    from tests.diffusion_trainer_data import diffusion_trainer, unet_lora

    words = "# My own words\n"
    trainer = diffusion_trainer(None, tmp_path, {"peft_config": {"unet": unet_lora()}})
    trainer.save_model()
    place = tmp_path / "adapters" / "unet"
    assert (place / "adapter_model.safetensors").is_file() and not (place / "README.md").exists()  # no form to fill in
    (place / "README.md").write_text(words, encoding="utf-8")
    trainer.save_model()
    assert (place / "README.md").read_text(encoding="utf-8") == words


def test_saving_twice_gives_the_same_card(tmp_path):
    trainer = cat_trainer(tiny_model(), tmp_path, {"peft_config": lora()})
    trainer.save_model()
    first = (tmp_path / "README.md").read_text(encoding="utf-8")
    trainer.save_model()
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == first
    assert not (tmp_path / CARD_BESIDE).exists()


# ---- Hub ----


def test_push_and_reload_bit_identically(hub, tmp_path):
    trainer = cat_trainer(tiny_model(), tmp_path / "robust", {"peft_config": lora()}, hub_token=TOKEN)
    train(trainer)
    trainer.attach_report(report())
    hub.drop("PUT", "^/lfs/", times=99)
    with pytest.raises(HubPushError, match="Run the same call again") as caught:
        trainer.push_to_hub()
    assert "'robust'" in str(caught.value) and "Error while uploading" in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert (tmp_path / "robust" / "adapter_model.safetensors").is_file()
    assert set(hub.files("tester/robust")) == set()
    hub._drops.clear()

    trainer.push_to_hub()
    files = hub.files("tester/robust")
    expected = {"adapter_model.safetensors", "README.md", "report.json", "training_prompts.json", "tokenizer.json"}
    assert expected <= set(files)
    assert ModelCard(files["README.md"].decode()).data.eval_results[0].metric_value == 0.25
    for name, content in files.items():
        assert TOKEN.encode() not in content, name

    trained = trainer.model.eval()
    reloaded = PeftModel.from_pretrained(tiny_model(), "tester/robust").eval()
    state, back = trained.state_dict(), reloaded.state_dict()
    adapters = [name for name in back if "lora" in name]
    assert adapters and all(torch.equal(back[name], state[name]) for name in adapters)
    tokenizer = AutoTokenizer.from_pretrained("tester/robust")
    ids = torch.tensor([tokenizer("how do i bake a cake")["input_ids"]])
    assert ids.tolist() == [tiny_tokenizer()("how do i bake a cake")["input_ids"]]
    with torch.no_grad():
        assert torch.equal(trained(ids).logits, reloaded(ids).logits)


def test_pushes_during_training(hub, tmp_path):
    trainer = cat_trainer(
        tiny_model(),
        tmp_path / "robust",
        {"peft_config": lora()},
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_model_id="tester/auto",
        hub_token=TOKEN,
        hub_always_push=True,
    )
    train(trainer)
    trainer.save_model()  # a push of its own, behind those of the checkpoints
    files = hub.files("tester/auto")
    assert {"adapter_model.safetensors", "README.md", "training_prompts.json"} <= set(files)
    assert training_prompts_of("tester/auto") == hashes(UTILITY | ADVERSARIAL)
    seen = [content for commit in hub.commits.values() for content in commit.values()]
    assert len(hub.repos["tester/auto"]["branches"]["main"]) >= 2
    assert not any(TOKEN.encode() in content for content in seen)


def test_a_model_without_known_prompts(hub, tmp_path):
    hub.create("tester/other", files={"config.json": b"{}"})
    for model_id in ("tester/other", "tester/nobody", str(tmp_path), "/no/such/folder"):
        assert training_prompts_of(model_id) is None


def test_a_card_in_the_repository_is_kept(hub, tmp_path):
    hub.create("tester/robust", files={"README.md": b"# Written on the Hub\n"})
    trainer = cat_trainer(tiny_model(), tmp_path / "robust", {"peft_config": lora()})
    trainer.push_to_hub()
    files = hub.files("tester/robust")
    assert files["README.md"] == b"# Written on the Hub\n"
    assert b"Nothing has been measured" in files[CARD_BESIDE]


def test_pickled_arguments_hold_no_token(tmp_path):
    config = CATConfig(**settings(tmp_path), hub_token="a secret")
    assert config.hub_token == "a secret"
    assert b"a secret" not in pickle.dumps(config) and pickle.loads(pickle.dumps(config)).learning_rate == 0.1


def test_rows_without_prompts_are_missing(tmp_path, caplog):
    rows = Dataset.from_list([{"input_ids": [4, 5, 6, 7], "labels": [4, 5, 6, 7]}] * 8)
    trainer = cat_trainer(tiny_model(), tmp_path, {"train_dataset": rows, "peft_config": lora()})
    with caplog.at_level(logging.WARNING):
        trainer.save_model()
    assert "without prompts in text form" in caplog.text


def test_under_fsdp_with_state_dicts_in_parts_the_model_is_saved_whole(tmp_path, monkeypatch):
    """The parent writes nothing there but at checkpoints; accelerate's default for FSDP2 is such."""
    trainer = cat_trainer(tiny_model(), tmp_path)
    trainer.is_fsdp_enabled = True
    plugin = types.SimpleNamespace(state_dict_type="SHARDED_STATE_DICT")
    trainer.accelerator.state.fsdp_plugin = plugin
    gathered = {name: weight + 1 for name, weight in trainer.model.state_dict().items()}
    monkeypatch.setattr(trainer.accelerator, "get_state_dict", lambda model: dict(gathered))
    trainer.save_model(tmp_path / "model")
    saved = weights(type(trainer.model).from_pretrained(tmp_path / "model"))
    assert max_difference(saved, {name: gathered[name] for name in saved}) == 0
    trainer._writes_checkpoint = True  # which has the parts
    trainer.save_model(tmp_path / "checkpoint", _internal_call=True)
    assert not (tmp_path / "checkpoint" / "model.safetensors").exists()


# ---- Several processes ----


@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_one_process_decides_on_the_start_for_all(main, fails, tmp_path, monkeypatch):
    """What the first one finds, every one goes on from, or raises: none is left waiting in the first collective."""
    trainer = cat_trainer(tiny_model(), tmp_path, save_strategy="steps", save_steps=1)
    read, told = [], []

    def resume(given, *args):
        read.append(given)
        if fails:
            raise ValueError("`resume_from_checkpoint=True`: there is no whole checkpoint")
        return "the newest"

    def broadcast(decided):
        told.append(list(decided))
        if not main:  # as the first process sent it
            sent = [None, ValueError("there is no whole checkpoint")] if fails else ["the newest", None]
            decided[:] = pickle.loads(pickle.dumps(sent))
        else:
            pickle.dumps(decided)

    monkeypatch.setattr(card_module, "checkpoint_to_resume", resume)
    monkeypatch.setattr(card_module, "check_writable", lambda folder: read.append("writable"))
    monkeypatch.setattr(card_module, "broadcast_object_list", broadcast)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: main)
    monkeypatch.setattr(trainer, "accelerator", types.SimpleNamespace(num_processes=2))
    if fails:
        with pytest.raises(ValueError, match="there is no whole checkpoint"):
            trainer.train(resume_from_checkpoint=True)
    else:
        assert trainer._checked_start(True) == "the newest"
    assert read == (["writable", True] if main else []) and len(told) == 1


def test_one_process_alone_tells_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(card_module, "broadcast_object_list", lambda decided: pytest.fail("there is nobody to tell"))
    trainer = cat_trainer(tiny_model(), tmp_path, max_steps=1)
    train(trainer)
    with pytest.raises(ValueError, match="there is no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)
