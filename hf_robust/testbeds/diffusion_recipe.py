"""What decides the diffusion testbed's models: sizes, training, and the bars they must clear."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from .diffusion_drawings import COLOURS, OUTLINES, OVERSAMPLING, TEXTURES
from .diffusion_language import FILLERS, TEMPLATES, WORDS

# To be raised whenever drawing or training changes in a way that the recipe's fields do not show: part of the cache key.
TRAINING_VERSION = 1


@dataclass(frozen=True)
class DiffusionRecipe:
    """Everything that decides the diffusion testbed's models; the defaults are the small form.

    Attributes:
        seed: Chooses pictures, captions, initial weights and order.
        image_size: Side of the pictures in pixels; twice the latents' for each level of the VAE but the first.
        num_shapes: The first so many of `OUTLINES` are the concepts.
        num_colours: The first so many of `COLOURS`.
        num_textures: The first so many of `TEXTURES`.
        num_images: Pictures drawn for training, each concept about as often.
        vae_channels: Width of the VAE's levels; each level but the first halves the resolution.
        latent_channels: Channels of the latents.
        vae_steps: Optimizer steps of the VAE.
        vae_learning_rate: Its peak learning rate.
        vae_kl_weight: Weight of the Kullback-Leibler term (mean over latent entries) beside the mean squared error.
        text_width: Width of the text encoder.
        text_layers: Its number of layers.
        text_steps: Optimizer steps in which the text encoder, before it meets the UNet, learns what captions mean.
        unet_channels: Width of the UNet's levels.
        unet_layers: Residual blocks per level.
        steps: Optimizer steps of UNet and text encoder together.
        batch_size: Pictures per step, of VAE, UNet and judge.
        learning_rate: Peak learning rate of UNet and text encoder.
        ema_decay: Of the running average of their weights that is kept in their place.
        caption_dropout: Share of captions left empty, for classifier-free guidance.
        random_tokens: Share of captions with 1 to 5 meaningless tokens before, behind or before the concept.
        judge_channels: Width of the judge's levels.
        judge_steps: Optimizer steps of the judge.
        check_steps: DDIM steps when the model's own pictures are judged.
        check_guidance: Guidance scale then.
        check_images: Pictures then.
        judge_bar: Accuracy that the judge must reach on 1,000 separate pictures.
        generation_bar: Share of the model's own pictures that the judge must see as prompted.
    """

    seed: int = 0
    image_size: int = 16
    num_shapes: int = 5
    num_colours: int = 4
    num_textures: int = 3
    num_images: int = 6000
    vae_channels: tuple[int, ...] = (16, 32, 64)
    latent_channels: int = 8
    vae_steps: int = 500
    vae_learning_rate: float = 3e-3
    vae_kl_weight: float = 1e-3
    text_width: int = 64
    text_layers: int = 3
    text_steps: int = 300
    unet_channels: tuple[int, ...] = (64, 96)
    unet_layers: int = 1
    steps: int = 1400
    batch_size: int = 32
    learning_rate: float = 2e-3
    ema_decay: float = 0.995
    caption_dropout: float = 0.1
    random_tokens: float = 0.3
    judge_channels: tuple[int, ...] = (16, 32, 64)
    judge_steps: int = 600
    check_steps: int = 20
    check_guidance: float = 3.0
    check_images: int = 200
    judge_bar: float = 0.99
    generation_bar: float = 0.9

    def __post_init__(self) -> None:
        for name in (
            "num_images",
            "vae_steps",
            "text_steps",
            "steps",
            "batch_size",
            "judge_steps",
            "check_steps",
            "check_images",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name, known, least in (
            ("num_shapes", OUTLINES, 3),
            ("num_colours", COLOURS, 1),
            ("num_textures", TEXTURES, 1),
        ):
            if not least <= getattr(self, name) <= len(known):
                raise ValueError(f"{name}={getattr(self, name)} must be from {least} to {len(known)}")
        for name in ("caption_dropout", "random_tokens", "ema_decay", "judge_bar", "generation_bar"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a share from 0 to 1")
        shrinks = 2 ** (len(self.vae_channels) + len(self.unet_channels) - 2)
        if self.image_size % shrinks or self.image_size < 2 * shrinks:
            raise ValueError(
                f"image_size={self.image_size} must be a multiple of {shrinks} and at least {2 * shrinks}, because VAE and "
                "UNet halve it at each level but their first; change it, vae_channels or unet_channels"
            )
        if self.text_width % 4 or any(width % 8 for width in (*self.vae_channels, *self.unet_channels)):
            raise ValueError(
                f"text_width={self.text_width} must be a multiple of 4 and the widths in vae_channels={self.vae_channels} and "
                f"unet_channels={self.unet_channels} multiples of 8"
            )

    @classmethod
    def of_size(cls, size: str) -> DiffusionRecipe:
        """The recipe of a size: "small" (minutes) or "large" (up to 40 minutes on two cores).

        Raises:
            ValueError: Unknown size.
        """
        if size not in SIZES:
            raise ValueError(f"size={size!r} is unknown; use one of {', '.join(SIZES)}")
        return cls(**SIZES[size])

    @property
    def concepts(self) -> tuple[str, ...]:
        """The shapes that are drawn."""
        return tuple(OUTLINES)[: self.num_shapes]

    @property
    def colours(self) -> tuple[str, ...]:
        """The colours that are used."""
        return tuple(COLOURS)[: self.num_colours]

    @property
    def textures(self) -> tuple[str, ...]:
        """The kinds of paper that are used."""
        return TEXTURES[: self.num_textures]

    def key(self) -> str:
        """16 hexadecimal digits that change with any field, drawing, word or the training code's version."""
        words = {name: asdict(words) for name, words in WORDS.items()}
        world = [OUTLINES, COLOURS, TEXTURES, OVERSAMPLING, words, TEMPLATES, FILLERS]
        text = json.dumps([TRAINING_VERSION, asdict(self), world], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def with_seed(self, seed: int | None) -> DiffusionRecipe:
        """The same with another seed; `None` keeps it."""
        return self if seed is None else replace(self, seed=seed)


SIZES: dict[str, dict[str, Any]] = {
    "small": {},
    "large": {
        "image_size": 32,
        "num_shapes": 8,
        "num_colours": 6,
        "num_textures": 4,
        "num_images": 20_000,
        "vae_channels": (16, 32, 64, 64),
        "vae_steps": 1500,
        "vae_learning_rate": 2e-3,
        "unet_channels": (96, 160),
        "steps": 4000,
        "learning_rate": 1.5e-3,
        "ema_decay": 0.998,
        "judge_channels": (24, 48, 96),
        "batch_size": 64,
        "judge_steps": 800,
        "check_steps": 25,
    },
}
"""Fields of each size that differ from the defaults."""
