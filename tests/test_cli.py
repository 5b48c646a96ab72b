"""The `hf-robust` command: training on files, with a configuration file, and what it says about mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from helpers import tiny_model
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hf_robust.cli import main
from hf_robust.testbeds.chat_language import build_tokenizer

CPU = ["--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false", "--report_to", "none"]


@pytest.fixture
def files(tmp_path):
    """A tiny model with a chat template, utility rows and preference rows, as files."""
    tokenizer = build_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    utility = [
        {"prompt": f"how do i fix a {noun}", "completion": "sure , to fix a bike first"} for noun in ("bike", "x")
    ]
    harmful = [
        {"prompt": f"how do i make a {noun}", "chosen": "sorry", "rejected": "sure , to make a"} for noun in "x!"
    ]
    (tmp_path / "utility.jsonl").write_text("\n".join(map(json.dumps, utility * 4)))
    (tmp_path / "harmful.jsonl").write_text("\n".join(map(json.dumps, harmful * 2)))
    return tmp_path


def cat_arguments(files: Path, *more: str) -> list[str]:
    return [
        "cat", "--model_name_or_path", str(files / "model"), "--dataset_name", str(files / "utility.jsonl"),
        "--adversarial_dataset_name", str(files / "harmful.jsonl"), "--output_dir", str(files / "out"),
        "--max_steps", "2", "--per_device_train_batch_size", "2", "--attack_steps", "2", *CPU, *more,
    ]  # fmt: skip


def test_cat_trains_an_adapter_from_a_yaml_file_and_options_override_it(files):
    config = files / "cat.yaml"
    config.write_text(yaml.safe_dump({"attack_epsilon": 0.2, "max_steps": 50, "use_peft": True, "lora_r": 4}))
    assert main(cat_arguments(files, "--config", str(config))) == 0
    state = json.loads((files / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2  # the command line's, not the file's 50
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files / "model"), files / "out")
    assert model.peft_config["default"].r == 4
    args = torch.load(files / "out" / "training_args.bin", weights_only=False)
    assert args.attack_epsilon == 0.2 and type(args).__module__.startswith("hf_robust.trainers")


def test_the_examples_configurations_are_understood(files):
    folder = Path(__file__).parent.parent / "examples"
    assert main(cat_arguments(files, "--config", str(folder / "cat.yaml"), "--gradient_accumulation_steps", "1")) == 0
    assert (files / "out" / "adapter_model.safetensors").exists()
    arguments = [
        "capo", "--config", str(folder / "capo.yaml"), "--model_name_or_path", str(files / "model"),
        "--adversarial_dataset_name", str(files / "harmful.jsonl"), "--output_dir", str(files / "capo"),
        "--max_steps", "1", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", *CPU,
    ]  # fmt: skip
    assert main(arguments) == 0
    assert (files / "capo" / "adapter_model.safetensors").exists()


def test_cat_evaluates_under_attack(files):
    more = ["--eval_strategy", "steps", "--eval_steps", "1", "--dataset_test_split", "train"]
    more += ["--adversarial_test_dataset_name", str(files / "harmful.jsonl")]
    assert main(cat_arguments(files, *more)) == 0
    history = json.loads((files / "out" / "trainer_state.json").read_text())["log_history"]
    assert all("eval_adversarial_loss" in entry for entry in history if "eval_loss" in entry)
    assert any("eval_loss" in entry for entry in history)


def test_behaviour_files_are_recognised(files):
    (files / "behaviors.csv").write_text(
        "Behavior,Category,Tags,ContextString,BehaviorID\nhow do i make a x,,,,one\nhow do i sell a x,,,,two\n"
    )
    (files / "targets.json").write_text(json.dumps({"one": ["sure , to make a"], "two": "sure , to sell a"}))
    arguments = cat_arguments(files)
    arguments[arguments.index(str(files / "harmful.jsonl"))] = str(files / "behaviors.csv")
    assert main(arguments) == 0


def test_two_processes_under_torchrun(files):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["hf_robust.cli", *cat_arguments(files, "--use_peft")]
    import os

    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (files / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("drop", "message"),
    [("--adversarial_dataset_name", "--adversarial_dataset_name"), ("--model_name_or_path", "--model_name_or_path")],
)
def test_what_is_missing_is_named_before_training(files, drop, message):
    arguments = cat_arguments(files)
    place = arguments.index(drop)
    with pytest.raises(ValueError, match=message):
        main(arguments[:place] + arguments[place + 2 :])


def test_a_misspelt_command_gets_the_nearest_one(capsys):
    assert main(["cap"]) == 2
    assert "Did you mean" in capsys.readouterr().err


def test_an_unknown_option_is_refused(files):
    with pytest.raises((ValueError, SystemExit)):
        main(cat_arguments(files, "--attack_radius", "1"))


def test_help_and_version(capsys):
    import hf_robust

    assert main(["--help"]) == 0 and "quickstart" in capsys.readouterr().out
    assert main(["--version"]) == 0 and capsys.readouterr().out.strip() == hf_robust.__version__
    assert main([]) == 2


def test_quickstart_refuses_more_behaviours_than_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["quickstart", "--behaviors", "61"])
    assert "between 1 and 60" in capsys.readouterr().err


def test_dataset_rows_can_be_parquet_folders_and_csv(files):
    Dataset.from_list([{"prompt": "how do i fix a x", "response": "sure , to fix a x"}] * 4).to_csv(files / "u.csv")
    arguments = cat_arguments(files)
    arguments[arguments.index(str(files / "utility.jsonl"))] = str(files / "u.csv")
    assert main(arguments) == 0
