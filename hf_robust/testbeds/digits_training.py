"""How the digits testbed's classifiers come about: recipe, configurations, training."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from .diffusion_training import batch_indices, optimise
from .digits_data import MEAN, NAMES, SIZE, STD
from .digits_linear import LinearForImageClassification, LinearImageConfig
from .small_llama import isolated_rng

# To be raised whenever training changes in a way that the recipe's fields do not show: it is part of the cache key.
TRAINING_VERSION = 2
KINDS = ("linear", "cnn", "vit")


@dataclass(frozen=True)
class DigitsRecipe:
    """Everything that decides the digits testbed's models.

    Attributes:
        seed: Chooses the split, the initial weights and the order of the pictures.
        eval_share: Share of each digit's pictures that no training sees.
        batch_size: Pictures per step.
        shift: Pixels by which the CNN's training pictures are shifted at random (a small ViT would take far more steps).
        linear_steps: Optimizer steps of the linear model.
        linear_learning_rate: Its peak learning rate (AdamW, linear warm-up, cosine to 0).
        cnn_channels: Widths of the ResNet's stages, of one basic layer each; the first is also its embedding's.
        cnn_steps: As `linear_steps`, of the CNN.
        cnn_learning_rate: As `linear_learning_rate`, of the CNN.
        vit_width: Hidden size of the ViT; its MLPs are twice as wide.
        vit_layers: Its layers, with four heads and patches of 2 × 2 pixels.
        vit_steps: As `linear_steps`, of the ViT.
        vit_learning_rate: As `linear_learning_rate`, of the ViT.
    """

    seed: int = 0
    eval_share: float = 0.25
    batch_size: int = 64
    shift: int = 1
    linear_steps: int = 400
    linear_learning_rate: float = 1e-2
    cnn_channels: tuple[int, ...] = (48, 96)
    cnn_steps: int = 400
    cnn_learning_rate: float = 3e-3
    vit_width: int = 64
    vit_layers: int = 3
    vit_steps: int = 800
    vit_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("batch_size", "linear_steps", "cnn_steps", "vit_steps", "vit_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 1")
        if not 0 < self.eval_share < 1:
            raise ValueError(f"eval_share={self.eval_share!r} must be a share between 0 and 1")
        if not 0 <= self.shift < SIZE:
            raise ValueError(f"shift={self.shift!r} must be from 0 to {SIZE - 1} pixels")
        if self.vit_width % 4:
            raise ValueError(f"vit_width={self.vit_width!r} must be a multiple of 4, the number of heads")

    def key(self) -> str:
        """16 hexadecimal digits that change with any field, the normalisation or the training code's version."""
        text = json.dumps([TRAINING_VERSION, asdict(self), MEAN, STD], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def build_classifier(kind: str, recipe: DigitsRecipe) -> PreTrainedModel:
    """A classifier with random weights from torch's global generator (the linear model: zeros), float32."""
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(NAMES)),
        "label2id": {name: number for number, name in enumerate(NAMES)},
    }
    if kind == "linear":
        return LinearForImageClassification(LinearImageConfig(image_size=SIZE, num_channels=3, **labels))
    if kind == "cnn":
        return ResNetForImageClassification(
            ResNetConfig(
                num_channels=3,
                embedding_size=recipe.cnn_channels[0],
                hidden_sizes=list(recipe.cnn_channels),
                depths=[1] * len(recipe.cnn_channels),
                layer_type="basic",
                **labels,
            )
        )
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=recipe.vit_width,
            intermediate_size=2 * recipe.vit_width,
            num_hidden_layers=recipe.vit_layers,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **labels,
        )
    )


def shifted(pixel_values: torch.Tensor, most: int) -> torch.Tensor:
    """Each picture moved by its own -most … most pixels both ways, edges repeated; offsets from torch's global generator."""
    if not most:
        return pixel_values
    count, _, height, width = pixel_values.shape
    padded = F.pad(pixel_values, (most,) * 4, mode="replicate")
    down, right = torch.randint(0, 2 * most + 1, (2, count))
    rows = (down[:, None] + torch.arange(height))[:, None, :, None]
    columns = (right[:, None] + torch.arange(width))[:, None, None, :]
    batch = torch.arange(count)[:, None, None, None]
    channels = torch.arange(padded.shape[1])[None, :, None, None]
    return padded[batch, channels, rows, columns]


def train_classifier(
    kind: str, recipe: DigitsRecipe, data: dict[str, torch.Tensor], *, progress: bool
) -> PreTrainedModel:
    """A classifier trained on `pixel_values` and `labels`, in evaluation mode."""
    with isolated_rng(recipe.seed):
        model: Any = build_classifier(kind, recipe).train()
        batches = batch_indices(len(data["labels"]), recipe.batch_size, recipe.seed)
        steps, rate = getattr(recipe, f"{kind}_steps"), getattr(recipe, f"{kind}_learning_rate")
        shift = recipe.shift if kind == "cnn" else 0
        for _ in optimise(model.parameters(), steps, rate, title=f"Digits testbed: {kind}", progress=progress):
            batch = next(batches)
            logits = model(shifted(data["pixel_values"][batch], shift)).logits
            F.cross_entropy(logits, data["labels"][batch]).backward()
    return model.eval()
