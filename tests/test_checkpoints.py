"""Checkpoints that are not whole, of other settings, or that cannot be written; SIGTERM."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_robust.trainers.checkpoints import (
    RECORD,
    check_writable,
    checkpoint_to_resume,
    newest_whole,
    problem_of,
    saving,
    write_record,
)
from hf_robust.trainers.run_settings import adapter_settings
from tests.helpers import tiny_model
from tests.trainer_data import (
    adversarial_rows,
    capo_trainer,
    cat_trainer,
    lora,
    max_difference,
    noisefit_trainer,
    train,
    utility_rows,
)

ROOT = Path(__file__).resolve().parent.parent
SAVES = {"save_strategy": "steps", "save_steps": 1}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in right)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A whole run of three steps with a checkpoint behind each, and its weights."""
    folder = tmp_path_factory.mktemp("run")
    return folder, train(cat_trainer(tiny_model(), folder, **SAVES))


@pytest.fixture
def copy(run: tuple[Path, Any], tmp_path: Path) -> Path:
    shutil.copytree(run[0], tmp_path / "run")
    return tmp_path / "run"


def resumed(folder: Path, checkpoint: Any, **args: Any) -> dict[str, torch.Tensor]:
    return train(cat_trainer(tiny_model(), folder, **{**SAVES, **args}), resume_from_checkpoint=checkpoint)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


# ---- Whole or not ----


def test_a_checkpoint_tells_that_it_is_whole(run: tuple[Path, Any]):
    record = json.loads((run[0] / "checkpoint-2" / RECORD).read_text())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= record["files"].keys()
    assert record["settings"]["trainer"] == "CATTrainer" and record["settings"]["attack_epsilon"] == 0.05
    assert problem_of(run[0] / "checkpoint-2") is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_truncated_checkpoint_is_named(name: str, run: tuple[Path, Any], copy: Path):
    """Given by name it is refused before anything is loaded; `True` takes the last whole one."""
    cut(copy / "checkpoint-2" / name)
    with pytest.raises(ValueError, match=rf"checkpoint-2'`: .*{name}.*Resume from '.*checkpoint-3'"):
        resumed(copy, str(copy / "checkpoint-2"))
    shutil.rmtree(copy / "checkpoint-3")
    assert newest_whole(copy) == copy / "checkpoint-1"
    assert same(resumed(copy, True), run[1])


def test_a_checkpoint_that_was_broken_off_is_passed_over(run: tuple[Path, Any], copy: Path, caplog: Any):
    """What a kill leaves: some files, and neither the Trainer's state nor our record."""
    for name in (RECORD, "trainer_state.json", "optimizer.pt"):
        (copy / "checkpoint-3" / name).unlink()
    assert same(resumed(copy, True), run[1])
    assert "checkpoint-3 is passed over: it has no whole trainer_state.json" in caplog.text


def test_a_newer_checkpoint_without_a_record_is_passed_over_and_named(run: tuple[Path, Any], copy: Path, caplog: Any):
    """A kill between the last file and the record."""
    (copy / "checkpoint-3" / RECORD).unlink()
    assert newest_whole(copy) == copy / "checkpoint-2"
    assert f"checkpoint-3 is passed over: it has no {RECORD}" in caplog.text


def test_a_process_that_dies_in_saving_takes_no_checkpoint_along(run: tuple[Path, Any], tmp_path: Path):
    """
    The first process neither calls a checkpoint whole nor removes the one before until the others have written what is
    theirs: with the random state of one missing, a resumed run would be another, and nobody would know.
    """
    trainer = cat_trainer(tiny_model(), tmp_path, **{**SAVES, "save_total_limit": 1})
    wait = trainer.accelerator.wait_for_everyone

    def one_is_dead() -> None:
        if (tmp_path / "checkpoint-2" / "rng_state.pth").exists():
            raise RuntimeError("Connection closed by peer")
        wait()

    trainer.accelerator.wait_for_everyone = one_is_dead
    with pytest.raises(RuntimeError, match="Connection closed"):
        train(trainer)
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-1"
    assert same(resumed(tmp_path, True, save_total_limit=1), run[1])


def test_a_missing_file(copy: Path):
    (copy / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="it lacks optimizer.pt"):
        resumed(copy, str(copy / "checkpoint-2"))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapters/unet/adapter_model.bin", "part/pytorch_model.bin"])
def test_pickled_weights_are_refused_wherever_they_lie(name: str, copy: Path):
    """Diffusion loads `adapters/<part>`, and PEFT falls back to the pickle there."""
    path = copy / "checkpoint-3" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    assert problem_of(copy / "checkpoint-3") == f"it holds pickled weights ({name}), which are not read"
    assert newest_whole(copy) == copy / "checkpoint-2"


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_every_file_of_a_sharded_checkpoint_counts(name: str, tmp_path: Path):
    """Of a distributed checkpoint of torch, as FSDP writes it, also the table of contents."""
    part = tmp_path / "optimizer_0"
    part.mkdir()
    (tmp_path / "trainer_state.json").write_text("{}")
    for written in (".metadata", "__0_0.distcp"):
        (part / written).write_bytes(bytes(100))
    write_record(tmp_path, {})
    assert problem_of(tmp_path) is None
    cut(part / name)
    assert problem_of(tmp_path) == f"optimizer_0/{name} has 93 of 100 bytes"
    (part / name).unlink()
    assert problem_of(tmp_path) == f"it lacks optimizer_0/{name}"


def test_no_checkpoint(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"`resume_from_checkpoint=True`: there is no whole checkpoint in `output_dir="
    ):
        resumed(tmp_path, True)
    with pytest.raises(ValueError, match="there is no such folder"):
        resumed(tmp_path, str(tmp_path / "checkpoint-7"))


def test_a_checkpoint_without_a_record_is_taken(run: tuple[Path, Any], copy: Path, caplog: Any):
    """Of an older version, or of a plain Trainer."""
    (copy / "checkpoint-2" / RECORD).unlink()
    assert same(resumed(copy, str(copy / "checkpoint-2")), run[1])
    assert "does not tell the settings" in caplog.text


# ---- Of other settings ----


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attack_epsilon": 0.1}, ["attack_epsilon (0.05 before, 0.1 now)"]),
        ({"seed": 7, "learning_rate": 0.2}, ["learning_rate (0.1 before, 0.2 now)", "seed (42 before, 7 now)"]),
        ({"per_device_train_batch_size": 2}, ["per_device_train_batch_size (4 before, 2 now)"]),
        (
            {"optim": "adamw_torch", "away_weight": 0.2},
            ["optim (sgd before, adamw_torch now)", "away_weight (0.5 before"],
        ),
    ],
)
def test_other_settings_are_refused_field_by_field(changes: dict[str, Any], said: list[str], run: tuple[Path, Any]):
    trainer = cat_trainer(tiny_model(), run[0], **{**SAVES, **changes})
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match="of a run with other settings") as error:
        train(trainer, resume_from_checkpoint=str(run[0] / "checkpoint-2"))
    for part in (*said, "set them back"):
        assert part in str(error.value)
    # Only what differs is named
    assert str(error.value).count(" now)") == len(changes)
    assert same(trainer.model.state_dict(), before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("warmup_steps", 2),
        ("lr_scheduler_kwargs", {"num_cycles": 2}),
        ("adam_beta1", 0.8),
        ("adam_beta2", 0.9),
        ("adam_epsilon", 1e-6),
        ("optim_args", "a=1"),
        ("label_smoothing_factor", 0.1),
        ("data_seed", 3),
        ("neftune_noise_alpha", 5.0),
        ("packing", True),
        ("completion_only_loss", True),
        ("assistant_only_loss", True),
        ("truncation_mode", "keep_end"),
        ("train_sampling_strategy", "sequential"),
        ("average_tokens_across_devices", False),
        ("dataloader_drop_last", True),
        ("ignore_data_skip", True),
        ("accelerator_config.split_batches", True),
        ("accelerator_config.even_batches", False),
        ("rows of train_dataset", 4),
        ("rows of adversarial_dataset", 5),
    ],
)
def test_what_the_card_leaves_out_is_compared_too(name: str, value: Any, run: tuple[Path, Any], copy: Path):
    given: dict[str, Any] = {}
    if name == "rows of train_dataset":
        given["train_dataset"] = utility_rows().select(range(value))
    elif name == "rows of adversarial_dataset":
        given["adversarial_dataset"] = adversarial_rows().select(range(value))
    trainer = cat_trainer(tiny_model(), copy, given, **SAVES)
    if not given:
        *holder, field = name.split(".")
        setattr(getattr(trainer.args, holder[0]) if holder else trainer.args, field, value)
    with pytest.raises(ValueError, match="of a run with other settings") as error:
        train(trainer, resume_from_checkpoint=True)
    assert str(error.value).count(" now)") == 1
    assert re.search(rf"settings: {name}\b.* before, .* now\)\. A resumed run", str(error.value))
    # A checkpoint of an older version does not tell it
    record = json.loads((copy / "checkpoint-3" / RECORD).read_text())
    del record["settings"][name]
    (copy / "checkpoint-3" / RECORD).write_text(json.dumps(record))
    assert checkpoint_to_resume(True, copy, trainer._run_settings()) == str(copy / "checkpoint-3")


def test_dropout_of_the_adapter_and_smoothed_preferences_are_compared(tmp_path: Path):
    train(capo_trainer(tiny_model(), tmp_path, {"peft_config": lora()}, **{**SAVES, "max_steps": 1}))
    other = {"peft_config": lora(lora_dropout=0.1)}
    trainer = capo_trainer(tiny_model(), tmp_path, other, **{**SAVES, "label_smoothing": 0.1})
    with pytest.raises(
        ValueError, match=r"label_smoothing \(0.0 before, 0.1 now\); peft_config.lora_dropout \(0.0 before, 0.1 now\)\."
    ):
        train(trainer, resume_from_checkpoint=True)


def test_settings_that_change_no_step_may_differ(run: tuple[Path, Any], tmp_path: Path):
    """Among them how an optimizer step's rows are split, the place, and a longer training."""
    checkpoint = str(run[0] / "checkpoint-2")
    changes = {"attack_batch_size": 1, "eval_attack_steps": 3, "logging_steps": 2, "profile": True}
    for different in (changes, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}):
        assert max_difference(resumed(tmp_path, checkpoint, **different), run[1]) < 1e-5
    resumed(tmp_path, checkpoint, max_steps=4)


def test_another_trainer_and_another_adapter_are_refused(run: tuple[Path, Any], tmp_path: Path):
    checkpoint = str(run[0] / "checkpoint-2")
    with pytest.raises(ValueError, match=r"trainer \(CATTrainer before, CAPOTrainer now\)"):
        train(capo_trainer(tiny_model(), tmp_path), resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"trainer \(CATTrainer before, NoiseFiTTrainer now\)"):
        train(noisefit_trainer(tiny_model(), tmp_path), resume_from_checkpoint=checkpoint)
    train(cat_trainer(tiny_model(), tmp_path, {"peft_config": lora(r=4)}, **{**SAVES, "max_steps": 1}))
    trainer = cat_trainer(tiny_model(), tmp_path, {"peft_config": lora(r=8)}, **SAVES)
    with pytest.raises(ValueError, match=r"settings: peft_config.r \(4 before, 8 now\)\. A"):
        train(trainer, resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"settings: adapter \(.*r 4.* before, none now\)\. A"):
        train(cat_trainer(tiny_model(), tmp_path, **SAVES), resume_from_checkpoint=True)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an adapter."""
    folder = tmp_path_factory.mktemp("adapted")
    train(cat_trainer(tiny_model(), folder, {"peft_config": lora()}, **{**SAVES, "max_steps": 1}))
    return folder / "checkpoint-1"


def start_of(folder: Path, checkpoint: Path, model: Any = None, **adapter: Any) -> str | None:
    model = tiny_model() if model is None else model
    return cat_trainer(model, folder, {"peft_config": lora(**adapter)}, **SAVES)._checked_start(str(checkpoint))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_rslora": True}, "peft_config.use_rslora (false before, true now)"),
        ({"lora_alpha": 16}, "peft_config.lora_alpha (8 before, 16 now)"),
        ({"bias": "all"}, "peft_config.bias (none before, all now)"),
        ({"alpha_pattern": {"q_proj": 64}}, "peft_config.alpha_pattern.q_proj (nothing before, 64 now)"),
        ({"modules_to_save": ["lm_head"]}, 'peft_config.modules_to_save (null before, ["lm_head"] now)'),
        ({"use_dora": True}, "peft_config.use_dora (false before, true now)"),
    ],
)
def test_every_setting_of_an_adapter_is_compared(changes: dict[str, Any], said: str, adapted: Path, tmp_path: Path):
    """The error names them one by one, and a checkpoint of an older version does not tell them."""
    with pytest.raises(ValueError, match="of a run with other settings") as error:
        start_of(tmp_path, adapted, **changes)
    assert said in str(error.value) and "frozen base weights" not in str(error.value)
    assert all(name in ("target_modules", *changes) for name in re.findall(r"peft_config\.(\w+)", str(error.value)))
    shutil.copytree(adapted, tmp_path / "checkpoint-1")
    record = json.loads((adapted / RECORD).read_text())
    new = ("peft_config.", "frozen", "accelerator_config.")
    record["settings"] = {name: value for name, value in record["settings"].items() if not name.startswith(new)}
    (tmp_path / "checkpoint-1" / RECORD).write_text(json.dumps(record))
    if changes.keys() & {"lora_alpha"}:
        with pytest.raises(ValueError, match=r"settings: adapter \(.* alpha 8, .* before, .* alpha 16, .* now\)\. A"):
            start_of(tmp_path, tmp_path / "checkpoint-1", **changes)
    else:
        assert start_of(tmp_path, tmp_path / "checkpoint-1", **changes) is not None


def test_an_adapter_goes_on_over_the_base_weights_it_was_trained_over(adapted: Path, tmp_path: Path):
    """Wherever they lie, and whatever PEFT notes by itself; the digest is that of the beginning on every device."""
    with pytest.raises(ValueError, match=r"settings: frozen base weights \(\w{16} before, \w{16} now\)\. A resumed"):
        start_of(tmp_path, adapted, tiny_model(seed=1))
    moved = tiny_model()
    moved.config._name_or_path = moved.name_or_path = "moved/elsewhere"
    assert start_of(tmp_path, adapted, moved, revision="other", inference_mode=False) == str(adapted)
    settings = json.loads((adapted / RECORD).read_text())["settings"]
    assert not [name for name in settings if "base_model_name_or_path" in name or "peft_version" in name]


def test_the_digest_of_the_base_leaves_out_what_adapters_train_and_what_is_split():
    from peft import get_peft_model

    def settings(seed: int = 0, base: int = 0, change: Any = None, **adapter: Any) -> dict[str, Any]:
        model = tiny_model(seed=base)
        torch.manual_seed(seed)
        model = get_peft_model(model, lora(**adapter))
        if change is not None:
            change(model)
        return adapter_settings(model, weights=True)

    name = "frozen base weights"
    plain = settings()
    assert plain == settings(seed=1, inference_mode=False)  # another beginning of the adapter
    assert plain[name] != settings(base=1)[name]

    def last_value(model: Any) -> None:
        (embeddings,) = [p for name, p in model.named_parameters() if "embed_tokens" in name]
        embeddings.data[0, 0] += 1

    assert plain[name] != settings(change=last_value)[name]

    def split(model: Any) -> None:
        next(iter(model.parameters())).ds_id = 0

    assert name not in settings(change=split) and name not in settings(init_lora_weights="pissa")
    assert adapter_settings(get_peft_model(tiny_model(), lora()), weights=False).keys() == plain.keys() - {name}
    assert adapter_settings(tiny_model(), weights=True) == {}
    sets = settings(target_modules=["v_proj", "q_proj"], modules_to_save=["lm_head", "lm_head"])
    assert sets["peft_config.target_modules"] == ["q_proj", "v_proj"]
    assert sets["peft_config.modules_to_save"] == ["lm_head"] and sets["peft_config.peft_type"] == "LORA"
    assert json.loads(json.dumps(sets)) == sets


def test_weights_alone_are_no_checkpoint_to_resume_from(run: tuple[Path, Any], copy: Path, caplog: Any):
    """`save_only_model=True`: optimizer, schedule and random numbers would begin anew, and nobody would know."""
    trainer = cat_trainer(tiny_model(), copy, **{**SAVES, "save_steps": 4, "max_steps": 4, "save_only_model": True})
    train(trainer, resume_from_checkpoint=True)
    assert problem_of(copy / "checkpoint-4") is None and newest_whole(copy) == copy / "checkpoint-3"
    assert "checkpoint-4 is passed over: it holds weights alone (`save_only_model=True`)" in caplog.text
    said = r"`resume_from_checkpoint='.*checkpoint-4'`: .*`save_only_model=True`.* load it as the model"
    with pytest.raises(ValueError, match=said):
        resumed(copy, str(copy / "checkpoint-4"), max_steps=5)
    for step in (1, 2, 3):
        shutil.rmtree(copy / f"checkpoint-{step}")
    with pytest.raises(
        ValueError, match="there is no whole checkpoint .* load the weights of checkpoint-4 as the model"
    ):
        resumed(copy, True)


# ---- Cannot be written ----


@contextlib.contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """The kernel refuses every byte behind `size` of a file, as it does when the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [1_000, 5_000])
def test_a_full_disk_leaves_the_last_checkpoint_whole(size: int, run: tuple[Path, Any], tmp_path: Path):
    """It ends in one error, what was half written is gone, and the run goes on from the checkpoint before."""
    train(cat_trainer(tiny_model(), tmp_path, **{**SAVES, "save_total_limit": 1, "max_steps": 1}))
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-1").iterdir() if path.is_file()}
    trainer = cat_trainer(tiny_model(), tmp_path, **{**SAVES, "save_total_limit": 1})
    with no_file_larger_than(size):
        with pytest.raises(
            OSError, match=r"(?s)checkpoint-2 could not be written .*last whole checkpoint is .*checkpoint-1'"
        ):
            train(trainer, resume_from_checkpoint=True)
    assert not (tmp_path / "checkpoint-2").exists()
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-1").iterdir() if path.is_file()}
    assert same(resumed(tmp_path, True), run[1])


def test_a_full_disk_does_not_take_an_earlier_run_along(run: tuple[Path, Any], copy: Path):
    """A run begun anew in the same folder replaces a checkpoint only once its own is whole."""
    before = (copy / "checkpoint-1" / "model.safetensors").read_bytes()
    with no_file_larger_than(1_000):
        with pytest.raises(OSError, match=r"(?s)checkpoint-1 could not be written .*last whole .*checkpoint-3'"):
            train(cat_trainer(tiny_model(), copy, **SAVES))
    assert sorted(path.name for path in copy.glob("*checkpoint-*")) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert problem_of(copy / "checkpoint-1") is None
    assert (copy / "checkpoint-1" / "model.safetensors").read_bytes() == before
    assert same(resumed(copy, str(copy / "checkpoint-1")), run[1])
    # And with room again, nothing is left of the older one
    train(cat_trainer(tiny_model(), copy, **{**SAVES, "learning_rate": 0.2}))
    assert sorted(path.name for path in copy.glob("*checkpoint-*")) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert (copy / "checkpoint-1" / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize("written", [[], ["model.safetensors"], ["model.safetensors", "trainer_state.json"]])
def test_a_kill_while_a_checkpoint_is_replaced_leaves_the_older(written: list[str], copy: Path):
    """Nothing cleans up behind SIGKILL: up to the record the older is found, and the next success removes it."""
    folder = copy / "checkpoint-3"

    class Killed(BaseException):
        pass

    with pytest.raises(Killed), saving(folder, cleans_up=True):
        folder.mkdir()
        for name in written:
            shutil.copy(copy / "checkpoint-2" / name, folder)
        raise Killed
    aside = newest_whole(copy)
    assert aside is not None and aside != folder and (aside / "rng_state.pth").is_file()
    assert json.loads((aside / "trainer_state.json").read_text())["global_step"] == 3
    with saving(folder, cleans_up=True):
        shutil.copytree(copy / "checkpoint-2", folder, dirs_exist_ok=True)
    assert newest_whole(copy) == folder and not aside.exists()


def test_what_lies_aside_goes_once_a_later_checkpoint_is_whole(copy: Path):
    """A run that was resumed from it may never write that number again."""
    for step in (2, 3, 7):
        shutil.copytree(copy / "checkpoint-3", copy / f"_replaced-checkpoint-{step}")
    with saving(copy / "checkpoint-4", cleans_up=True):  # weights alone: the one aside may be the last to resume from
        shutil.copytree(copy / "checkpoint-3", copy / "checkpoint-4")
        (copy / "checkpoint-4" / "optimizer.pt").rename(copy / "kept")
    assert len(list(copy.glob("_replaced-*"))) == 3
    with saving(copy / "checkpoint-5", cleans_up=True):
        shutil.copytree(copy / "checkpoint-3", copy / "checkpoint-5")
    assert [path.name for path in copy.glob("_replaced-*")] == ["_replaced-checkpoint-7"]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("there", ["whole", "rests", "nothing"])
def test_a_linked_checkpoint_is_replaced_not_followed(there: str, fails: bool, run: tuple[Path, Any], tmp_path: Path):
    """What the link leads to, on another disk for example, is not touched."""
    elsewhere, folder = tmp_path / "elsewhere" / "checkpoint-2", tmp_path / "out" / "checkpoint-2"
    folder.parent.mkdir()
    if there != "nothing":
        shutil.copytree(run[0] / "checkpoint-2", elsewhere)
    if there == "rests":
        (elsewhere / "optimizer.pt").unlink()
    before = {path.name: path.read_bytes() for path in elsewhere.glob("*")}
    folder.symlink_to(elsewhere)
    for _ in range(2):
        with pytest.raises(OSError, match="could not be written") if fails else contextlib.nullcontext():
            with saving(folder, cleans_up=True):
                if fails:
                    raise OSError(28, "No space left on device")
                shutil.copytree(run[0] / "checkpoint-3", folder)
    assert before == {path.name: path.read_bytes() for path in elsewhere.glob("*")}
    assert [path.name for path in folder.parent.iterdir()] == (
        ["checkpoint-2"] if there == "whole" or not fails else []
    )
    assert folder.is_symlink() is (fails and there == "whole")


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json"])
def test_a_disk_that_fills_up_later(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Files that come after the weights: torch's own writer, and plain text."""
    import errno

    trainer = cat_trainer(tiny_model(), tmp_path, **SAVES)
    if name == "optimizer.pt":
        save = torch.save

        def fails(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            with no_file_larger_than(100 if str(path).endswith(name) else 10**9):
                save(content, path, *args, **kwargs)

        monkeypatch.setattr(torch, "save", fails)
    else:

        def full(*args: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("transformers.trainer_callback.TrainerState.save_to_json", full)
    with pytest.raises(OSError, match="checkpoint-1 could not be written .*There is no earlier checkpoint"):
        train(trainer)
    assert not (tmp_path / "checkpoint-1").exists()


def test_a_process_that_writes_a_part_removes_nothing(tmp_path: Path):
    """And does not say so: the others may still be writing."""
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    with pytest.raises(
        OSError, match=r"checkpoint-1 could not be written to .* are free there\)\. There is no earlier"
    ):
        with saving(folder, cleans_up=False):
            raise OSError(28, "No space left on device")
    assert folder.is_dir()


def test_errors_that_are_none_of_writing_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A push that fails behind a whole checkpoint takes nothing away."""
    trainer = cat_trainer(tiny_model(), tmp_path, **SAVES)

    def refused(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no line")

    trainer.args.push_to_hub = True
    trainer.init_hf_repo = trainer._finish_current_push = lambda *args, **kwargs: None
    trainer._push_from_checkpoint = refused
    with pytest.raises(ConnectionError, match="no line"):
        train(trainer)
    assert (tmp_path / "checkpoint-1" / "trainer_state.json").is_file()


def test_an_output_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before the first step, not at the first checkpoint."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"`output_dir='.*file.below'` cannot be written to .*choose another folder"):
        check_writable(tmp_path / "file" / "below")
    trainer = cat_trainer(tiny_model(), tmp_path, **SAVES)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}

    def refuse(*args: Any, **kwargs: Any) -> None:  # a superuser may write anywhere
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OSError, match=r"`output_dir=.* cannot be written to \(Permission denied\)"):
        train(trainer)
    assert same(trainer.model.state_dict(), before)


# ---- SIGTERM ----

SCRIPT = """
import sys, time
from pathlib import Path
import torch
from transformers import TrainerCallback
from tests.helpers import tiny_model
from tests.trainer_data import cat_trainer
from transformers.trainer_jit_checkpoint import CheckpointManager

CheckpointManager.__init__.__defaults__ = (0,)  # seconds that it waits
folder, mode = Path(sys.argv[1]), sys.argv[2]

class Slow(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        if mode == "slow" and state.global_step >= 1:
            (folder / "under_way").touch()
            time.sleep(2)

torch.set_num_threads(1)
model = tiny_model(attention_dropout=0.3)
trainer = cat_trainer(model, folder, {"callbacks": [Slow()]}, enable_jit_checkpoint=True, max_steps=4,
                      save_strategy="steps", save_steps=100, gradient_accumulation_steps=2, per_device_train_batch_size=2)
trainer.train(resume_from_checkpoint=mode == "resume" or None)
print("interrupted", trainer.interrupted, trainer.state.global_step)
if not trainer.interrupted:
    trainer.save_model(folder / "end")
"""


def start(folder: Path, mode: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), mode], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE
    )


def test_sigterm_saves_and_training_goes_on_exactly(tmp_path: Path):
    """A step is finished that SIGTERM meets in the middle, dropout included; a resumed run ends as an uninterrupted one."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    uninterrupted, process = start(whole, "whole"), start(broken, "slow")
    while not (broken / "under_way").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "interrupted True 2" in said
    assert problem_of(broken / "checkpoint-2") is None
    again = start(broken, "resume")
    assert "interrupted False 4" in again.communicate(timeout=300)[0]
    uninterrupted.communicate(timeout=300)
    found, expected = (load_file(folder / "end" / "model.safetensors") for folder in (broken, whole))
    assert same(found, expected)


def test_the_signal_is_handed_back(tmp_path: Path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = cat_trainer(tiny_model(), tmp_path, enable_jit_checkpoint=True, max_steps=1)
    assert signal.getsignal(signal.SIGTERM) != before  # transformers takes it in the constructor
    train(trainer)
    assert signal.getsignal(signal.SIGTERM) == before
    assert not trainer.interrupted


@pytest.mark.parametrize(("strategy", "expected"), [("steps", True), ("no", False)])
def test_commands_save_at_sigterm_where_they_save_at_all(strategy: str, expected: bool, tmp_path: Path):
    """An interrupted training is neither saved as a model nor pushed, and the exit status says so."""
    from unittest.mock import MagicMock

    from transformers import TrainingArguments

    from hf_robust.cli.arguments import finish

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, save_strategy=strategy, report_to="none")
    args.resume_from_checkpoint, args.push_to_hub = "true", True
    trainer = MagicMock(args=args, interrupted=True)
    with pytest.raises(SystemExit) as end:
        finish(trainer, MagicMock(), args)
    assert end.value.code == 143
    assert args.enable_jit_checkpoint is expected
    trainer.train.assert_called_once_with(resume_from_checkpoint=True)
    trainer.save_model.assert_not_called()
    trainer.push_to_hub.assert_not_called()
    trainer.interrupted = False
    finish(trainer, MagicMock(), args)
    trainer.save_model.assert_called_once()
    trainer.push_to_hub.assert_called_once()
