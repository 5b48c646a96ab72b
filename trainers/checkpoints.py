"""Checkpoints of models whose saved weights have other names than the model's own."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

_FILES = ("model.safetensors", "model.safetensors.index.json")


def restore_renamed(model: Any, folder: str | Path) -> bool:
    """
    Load a checkpoint of a vision-language model by `from_pretrained`, which knows the names that it was saved under.

    `save_pretrained` writes LLaVA's and Qwen-VL's weights under the names of their first releases, and the Trainer
    (transformers 5.23) looks for the model's own, finds none, warns, and goes on with the weights that it has. To be removed
    once it reads what it writes.

    Args:
        model: the model to fill; of others than whole vision-language models nothing happens.
        folder: the checkpoint.

    Returns:
        Whether the weights were loaded.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel) or getattr(config, "vision_config", None) is None:
        return False
    if not any((Path(folder) / name).is_file() for name in _FILES):
        return False
    saved = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
    return True
