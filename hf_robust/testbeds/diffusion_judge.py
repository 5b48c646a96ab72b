"""The diffusion testbed's judge: a small ResNet that names the shape in a picture, or says that there is none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import ResNetConfig, ResNetForImageClassification

from .diffusion_drawings import draw_none
from .diffusion_recipe import DiffusionRecipe
from .diffusion_training import batch_indices, draw_pictures, optimise, random_scenes, to_signed
from .small_llama import isolated_rng

OTHER = "other"
"""The judge's label for pictures that show no shape."""


def labels(recipe: DiffusionRecipe) -> list[str]:
    """The judge's labels in order: the concepts, then `OTHER`."""
    return [*recipe.concepts, OTHER]


def judged_pictures(recipe: DiffusionRecipe, count: int, seed: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures uint8 [N, 3, H, W] with labels int64 [N]; every label about as often."""
    others = count // (recipe.num_shapes + 1)
    scenes = random_scenes(recipe, count - others, [*seed, 0])
    pixels = draw_pictures(scenes, recipe.image_size, [*seed, 1]).pixels
    rng = np.random.default_rng([*seed, 2])
    none = [draw_none(recipe.colours, recipe.textures, recipe.image_size, rng) for _ in range(others)]
    shown = [recipe.concepts.index(scene.shape) for scene in scenes] + [recipe.num_shapes] * others
    pictures = torch.from_numpy(np.stack(none)).permute(0, 3, 1, 2) if none else pixels[:0]
    return torch.cat([pixels, pictures]), torch.tensor(shown)


def train_judge(recipe: DiffusionRecipe, *, progress: bool = False) -> ResNetForImageClassification:
    """The judge, trained on pictures of its own, blurred and noisy ones among them, in evaluation mode."""
    pixels, targets = judged_pictures(recipe, recipe.num_images, [recipe.seed, 3])
    names = labels(recipe)
    with isolated_rng(recipe.seed):
        judge = ResNetForImageClassification(
            ResNetConfig(
                num_channels=3,
                embedding_size=recipe.judge_channels[0],
                hidden_sizes=list(recipe.judge_channels),
                depths=[1] * len(recipe.judge_channels),
                layer_type="basic",
                id2label=dict(enumerate(names)),
                label2id={name: number for number, name in enumerate(names)},
            )
        ).train()
        batches = batch_indices(len(pixels), recipe.batch_size, recipe.seed)
        for _ in optimise(
            judge.parameters(), recipe.judge_steps, 3e-3, title="Diffusion testbed: judge", progress=progress
        ):
            batch = next(batches)
            images = _weathered(to_signed(pixels[batch]))
            F.cross_entropy(judge(images).logits, targets[batch], label_smoothing=0.05).backward()
    return judge.eval()


def _weathered(images: torch.Tensor) -> torch.Tensor:
    """Slight blur and noise, of a strength of its own for each picture: a VAE's pictures are not clean."""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share, strength = torch.rand(2, len(images), 1, 1, 1)
    return images.lerp(blurred, 0.6 * share) + 0.1 * strength * torch.randn_like(images)


@torch.no_grad()
def predict(judge: ResNetForImageClassification, pixels: torch.Tensor) -> torch.Tensor:
    """The judge's label numbers, int64 [N], for uint8 pictures [N, 3, H, W]."""
    return torch.cat([judge(to_signed(batch)).logits.argmax(-1) for batch in pixels.split(256)])


def judge_accuracy(judge: ResNetForImageClassification, recipe: DiffusionRecipe, count: int = 1000) -> float:
    """Share of separate pictures that the judge labels rightly."""
    pixels, targets = judged_pictures(recipe, count, [recipe.seed, 4])
    return predict(judge, pixels).eq(targets).double().mean().item()


def save_judge(judge: ResNetForImageClassification, folder: Path, recipe: DiffusionRecipe) -> None:
    """Save the judge with an image processor that scales pixels to -1 … 1: it loads by its folder."""
    # Not ViTImageProcessor, which warns where torchvision is missing; what is saved is the same.
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    judge.save_pretrained(folder)
    side = {"height": recipe.image_size, "width": recipe.image_size}
    ViTImageProcessorPil(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
