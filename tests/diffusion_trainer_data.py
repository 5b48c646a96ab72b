"""Drawn images with captions, and DiffusionTrainers on tiny pipelines."""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from peft import LoraConfig
from PIL import Image

from hf_robust import DiffusionConfig, DiffusionTrainer
from tests.diffusion_helpers import tiny_pipeline
from tests.trainer_data import settings

CAPTIONS = ["a photo of the red cat", "blue dog", "house in vangogh style", "green star", "a square on the house"]


def image(place: int, size: int = 16) -> Image.Image:
    pixels = np.random.default_rng(place).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def list_rows(count: int = 8, size: int = 16) -> list[dict[str, Any]]:
    return [{"image": image(i, size), "text": CAPTIONS[i % len(CAPTIONS)]} for i in range(count)]


def image_rows(count: int = 8, size: int = 16) -> Dataset:
    return Dataset.from_list(list_rows(count, size))


def unet_lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["to_q", "to_k", "to_v"], "init_lora_weights": False, **changes})


def text_lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **changes})


def diffusion_settings(folder: Path | str, **args: Any) -> dict[str, Any]:
    """Those of the other trainers' tests; SGD 0.5, as these models' gradients are small."""
    given = settings(folder, **{"learning_rate": 0.5, **args})
    del given["max_length"]
    return given


def diffusion_trainer(
    model: Any, folder: Path | str, trainer: dict[str, Any] | None = None, **args: Any
) -> DiffusionTrainer:
    """`trainer` goes to the constructor, `args` to the configuration."""
    given = {"train_dataset": image_rows(), **(trainer or {})}
    model = tiny_pipeline() if model is None else model
    return DiffusionTrainer(model, DiffusionConfig(**diffusion_settings(folder, **args)), **given)
