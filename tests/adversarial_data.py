"""Tiny classifiers, rows and trainers for the tests of adversarial training."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_robust import AdversarialConfig, AdversarialTrainer

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]


def processor() -> ViTImageProcessor:
    """Of 8 × 8 images, with a mean and std of their own for each channel."""
    return ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=MEAN, image_std=STD)


def image_rows(count: int = 16, seed: int = 0, *, normalized: bool = True) -> Dataset:
    """Three classes by their brightest channel; pixels at the ends of the range among them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    raw = 0.6 * torch.rand(count, 3, 8, 8, generator=generator)
    raw[torch.arange(count), labels] += 0.4
    raw[:, :, 0, 0], raw[:, :, 0, 1] = 0.0, 1.0
    pixels = (raw - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1) if normalized else raw
    return Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": labels.tolist()}).with_format("torch")


def text_rows(count: int = 16, seed: int = 0) -> Dataset:
    """Three classes by their first token; rows of 4 to 7 tokens, padded to 7."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, 40, (count, 7), generator=generator)
    labels = torch.arange(count) % 3
    ids[:, 0] = labels + 3
    lengths = 4 + torch.arange(count) % 4
    mask = (torch.arange(7) < lengths.unsqueeze(1)).long()
    rows = {"input_ids": (ids * mask).tolist(), "attention_mask": mask.tolist(), "labels": labels.tolist()}
    return Dataset.from_dict(rows).with_format("torch")


def tiny_classifier(name: str = "vit", seed: int = 0, *, dropout: float = 0.0, **changes: Any) -> nn.Module:
    """A classifier of three classes with random weights, float32, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "vit":
            config: Any = ViTConfig(
                hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
                num_labels=3, hidden_dropout_prob=dropout, initializer_range=0.3, **changes,
            )  # fmt: skip
            return ViTForImageClassification(config).train()
        if name == "resnet":
            config = ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3, **changes
            )
            return ResNetForImageClassification(config).train()
        config = BertConfig(
            vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=3,
            max_position_embeddings=16, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
            initializer_range=0.3, **changes,
        )  # fmt: skip
        return BertForSequenceClassification(config).train()


def settings(folder: Path | str, **changes: Any) -> dict[str, Any]:
    """Arguments under which equal computations give equal weights: float32, SGD, constant schedule, three steps."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        **changes,
    }


def adversarial_trainer(
    model: nn.Module, folder: Path | str, trainer: dict[str, Any] | None = None, **args: Any
) -> AdversarialTrainer:
    """`trainer` goes to the constructor, `args` to the configuration; rows and processor are those the model takes."""
    is_text = model.main_input_name == "input_ids"
    given = {
        "train_dataset": text_rows() if is_text else image_rows(),
        "processing_class": None if is_text else processor(),
        **(trainer or {}),
    }
    return AdversarialTrainer(model, AdversarialConfig(**settings(folder, **args)), **given)
