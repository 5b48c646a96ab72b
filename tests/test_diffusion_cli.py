"""`hf-robust diffusion` on a pipeline folder and a folder of images, and a push to the Hub."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from hf_robust.cli import main
from tests.diffusion_helpers import tiny_pipeline
from tests.diffusion_trainer_data import CAPTIONS, diffusion_trainer, image, unet_lora
from tests.hub_server import HubServer, hub_client
from tests.trainer_data import train

CPU = ["--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false", "--report_to", "none"]
EXAMPLE = Path(__file__).parent.parent / "examples" / "diffusion.yaml"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusion")
    tiny_pipeline().save_pretrained(folder / "model")
    (folder / "images").mkdir()
    lines = []
    for place in range(4):
        image(place, 20).save(folder / "images" / f"{place}.png")
        lines.append(json.dumps({"file_name": f"{place}.png", "text": CAPTIONS[place]}))
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def arguments(files: Path, out: Path, *more: str) -> list[str]:
    return [
        "diffusion", "--model_name_or_path", str(files / "model"), "--dataset_name", str(files / "images"),
        "--output_dir", str(out), "--max_steps", "2", "--per_device_train_batch_size", "2", *CPU, *more,
    ]  # fmt: skip


def test_the_examples_configuration_trains_an_adapter(files: Path, tmp_path: Path):
    more = ["--config", str(EXAMPLE), "--gradient_accumulation_steps", "1", "--logging_steps", "1"]
    assert main(arguments(files, tmp_path, *more)) == 0
    assert (tmp_path / "adapters" / "unet" / "adapter_model.safetensors").is_file()
    StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    history = json.loads((tmp_path / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert history[0]["adversarial_loss"] >= history[0]["clean_loss"]


def test_weights_of_parts_with_evaluation(files: Path, tmp_path: Path):
    config = tmp_path / "parts.yaml"
    config.write_text(yaml.safe_dump({"train_parts": ["xattn"], "image_resize": "stretch", "max_steps": 50}))
    more = ["--config", str(config), "--eval_strategy", "steps", "--eval_steps", "1", "--dataset_test_split", "train"]
    assert main(arguments(files, tmp_path / "out", *more)) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == 2 and any("eval_loss" in entry for entry in state["log_history"])
    name = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(files / "model" / name), load_file(tmp_path / "out" / name)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all("attn2" in key for key in changed)


def test_sara_on_both_parts(files: Path, tmp_path: Path):
    more = ["--use_peft", "--adapter", "sara", "--adapter_parts", "unet", "text_encoder", "--sara_threshold", "0.05"]
    assert main(arguments(files, tmp_path, "--image_resize", "crop", *more)) == 0
    for part in ("unet", "text_encoder"):
        config = json.loads((tmp_path / "adapters" / part / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["threshold"] == 0.05
    StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)


@pytest.mark.parametrize(
    ("drop", "error", "message"),
    [("--dataset_name", SystemExit, "2"), ("--model_name_or_path", ValueError, "--model_name_or_path")],
)
def test_what_is_missing_is_named(files: Path, tmp_path: Path, drop: str, error: Any, message: str):
    given = arguments(files, tmp_path)
    place = given.index(drop)
    with pytest.raises(error, match=message):
        main(given[:place] + given[place + 2 :])


def test_wrong_sizes_and_parts_are_refused(files: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="20 × 20 pixels .*image_resize='crop'"):
        main(arguments(files, tmp_path))
    with pytest.raises(ValueError, match="--adapter_parts='vae'"):
        main(arguments(files, tmp_path, "--use_peft", "--adapter_parts", "vae"))


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_push_to_the_hub(adapter: bool, tmp_path: Path):
    given = {"peft_config": unet_lora()} if adapter else {}
    args = {"push_to_hub": True, "hub_model_id": "tester/drawing", "hub_always_push": True, "max_steps": 1}
    with HubServer() as server, hub_client(server):
        trainer = diffusion_trainer(None, tmp_path / "out", given, save_strategy="steps", save_steps=1, **args)
        train(trainer)
        trainer.push_to_hub()
        sent = server.files("tester/drawing")
    assert {"model_index.json", "README.md", "training_prompts.json"} <= set(sent)
    assert "unet/diffusion_pytorch_model.safetensors" in sent and b"text-to-image" in sent["README.md"]
    assert ("adapters/unet/adapter_model.safetensors" in sent) == adapter
    for name, content in sent.items():
        (tmp_path / "back" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / name).write_bytes(content)
    StableDiffusionPipeline.from_pretrained(tmp_path / "back", safety_checker=None)
