"""Checkpoints of models whose saved weights have other names than the model's own."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel


def restore_renamed(model: Any, folder: str | Path) -> bool:
    """
    Load a checkpoint by `from_pretrained`, which knows the names that it was saved under, if those are not the model's own.

    `save_pretrained` writes the weights of LLaVA, Qwen-VL, ViT, mixtures of experts and others under the names of their first
    releases, and the Trainer (transformers 5.23) looks for the model's own, finds none, warns, and goes on with the weights
    that it has. To be removed once it reads what it writes.

    Args:
        model: the model to fill; of others than whole models of transformers nothing happens.
        folder: the checkpoint.

    Returns:
        Whether the weights were loaded.
    """
    if not isinstance(model, PreTrainedModel) or saved_names(folder) <= set(model.state_dict()):
        return False
    saved = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
    return True


def saved_names(folder: str | Path) -> set[str]:
    """
    Names of the weights in a checkpoint, whole or in shards; none where there is no such file.

    Args:
        folder: the checkpoint.
    """
    whole, index = Path(folder) / "model.safetensors", Path(folder) / "model.safetensors.index.json"
    if whole.is_file():
        with safe_open(whole, framework="pt") as file:
            return set(file.keys())
    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"]) if index.is_file() else set()
