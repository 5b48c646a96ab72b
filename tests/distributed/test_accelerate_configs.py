"""examples/accelerate_configs: accelerate understands every key, and `hf-robust cat` trains under each on two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from tests.distributed.parity import ROOT, has_deepspeed
from tests.helpers import tiny_model
from tests.trainer_data import adversarial_rows, tiny_tokenizer, utility_rows

FOLDER = ROOT / "examples" / "accelerate_configs"
KINDS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "zero3_4bit": "DEEPSPEED"}


def test_every_config_is_tested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_knows_every_key(name: str):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # refuses unknown keys of the outer level itself
    assert config.distributed_type == KINDS[name]
    known = {action.dest for action in launch_command_parser()._actions}
    assert set(config.fsdp_config) | set(config.deepspeed_config) <= known


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    utility_rows(16).to_json(folder / "utility.jsonl")
    adversarial_rows(8).to_json(folder / "harmful.jsonl")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_hf_robust_cat_trains_on_two_processes(name: str, files: Path, tmp_path: Path):
    """On a CPU accelerate turns FSDP to DDP; tests/distributed/parity.py shards there all the same."""
    is_zero = name.startswith("zero")
    if is_zero and not has_deepspeed():
        pytest.skip("ZeRO needs DeepSpeed: pip install 'hf_robust[deepspeed]'")
    launch = ["--config_file", str(FOLDER / f"{name}.yaml"), "--num_processes", "2", "--mixed_precision", "no"]
    launch += ["--main_process_port", "0"]
    options = {
        "config": ROOT / "examples" / "cat.yaml", "model_name_or_path": files / "model", "output_dir": tmp_path,
        "dataset_name": files / "utility.jsonl", "adversarial_dataset_name": files / "harmful.jsonl",
        "use_cpu": "true", "bf16": "false", "gradient_checkpointing": "false", "report_to": "none",
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "attack_steps": 2, "max_steps": 2,
        "save_steps": 2, "conversational": "false",
    }  # fmt: skip
    if name == "zero3_4bit":  # of what the others are: ZeRO-3 splits all weights as one kind
        options |= {"load_in_4bit": "true", "bnb_4bit_quant_storage": "float32", "dtype": "float32"}
    arguments = [str(part) for option, value in options.items() for part in (f"--{option}", value)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "hf_robust.cli", "cat", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # Two processes start without a GPU only like this; accelerate's own --cpu starts one, and with the variable set it
    # would not take DeepSpeed
    env |= {"DS_ACCELERATOR": "cpu"} if is_zero else {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=tmp_path, env=env, timeout=540, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    checkpoint = tmp_path / "checkpoint-2"
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert bool(list(checkpoint.glob("global_step*/*zero_pp_rank_1*"))) == is_zero
    assert (tmp_path / "adapter_model.safetensors").is_file()
