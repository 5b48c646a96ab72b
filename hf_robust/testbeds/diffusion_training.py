"""How the diffusion testbed's pipeline comes about: a VAE, then a UNet with its text encoder, from scratch."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .diffusion_drawings import COLOURS, TEXTURES, Scene, draw
from .diffusion_language import TEMPLATES, WORDS, build_tokenizer
from .diffusion_recipe import DiffusionRecipe
from .small_llama import isolated_rng

# What diffusers builds is Any here: it is imported where it is used only.


@dataclass(frozen=True)
class Pictures:
    """Drawn pictures and what they show.

    Attributes:
        scenes: What each shows.
        pixels: uint8 [N, 3, H, W].
    """

    scenes: list[Scene]
    pixels: torch.Tensor


def draw_pictures(scenes: Sequence[Scene], size: int, seed: int | Sequence[int]) -> Pictures:
    """Draw scenes; each picture's jitters depend on the seed and its place in the list."""
    rng = np.random.default_rng(seed)
    pixels = np.stack([draw(scene, size, rng) for scene in scenes])
    return Pictures(list(scenes), torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())


def random_scenes(recipe: DiffusionRecipe, count: int, seed: int | Sequence[int]) -> list[Scene]:
    """Scenes of the recipe's world, every shape, colour and texture as likely as any other of its kind."""
    rng = np.random.default_rng(seed)
    kinds = (recipe.concepts, recipe.colours, recipe.textures)
    return [Scene(*(str(rng.choice(kind)) for kind in kinds)) for _ in range(count)]


def training_pictures(recipe: DiffusionRecipe) -> Pictures:
    """The pictures that VAE, UNet and text encoder are trained on."""
    return draw_pictures(
        random_scenes(recipe, recipe.num_images, [recipe.seed, 0]), recipe.image_size, [recipe.seed, 1]
    )


# Optimisation


def optimise(
    parameters: Iterable[torch.nn.Parameter], steps: int, learning_rate: float, *, title: str, progress: bool
) -> Iterator[torch.optim.Optimizer]:
    """One pass of the loop per step: the caller computes gradients, the step is taken on the next request.

    AdamW without decay of weights, linear warm-up over 5 % of the steps, cosine to 0, gradients clipped to norm 1.
    """
    weights = list(parameters)
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    warmup = max(1, round(0.05 * steps))
    for step in tqdm(range(steps), desc=title, disable=not progress):
        decay = 0.5 + 0.5 * math.cos(math.pi * max(0, step + 1 - warmup) / max(1, steps - warmup))
        optimizer.param_groups[0]["lr"] = learning_rate * min((step + 1) / warmup, decay)
        optimizer.zero_grad(set_to_none=True)
        yield optimizer
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()


def batch_indices(count: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of indices, each index once per round."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:size]
        order = order[size:]


# VAE


def train_vae(recipe: DiffusionRecipe, pictures: Pictures, *, progress: bool) -> Any:
    """An `AutoencoderKL` for the pictures whose scaled latents have unit variance, in evaluation mode."""
    from diffusers import AutoencoderKL

    levels = len(recipe.vae_channels)
    with isolated_rng(recipe.seed):
        vae: Any = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=recipe.vae_channels,
            layers_per_block=1,
            latent_channels=recipe.latent_channels,
            norm_num_groups=8,
            sample_size=recipe.image_size,
            mid_block_add_attention=False,
        )
        vae.train()
        batches = batch_indices(len(pictures.scenes), recipe.batch_size, recipe.seed)
        for _ in optimise(
            vae.parameters(),
            recipe.vae_steps,
            recipe.vae_learning_rate,
            title="Diffusion testbed: VAE",
            progress=progress,
        ):
            images = to_signed(pictures.pixels[next(batches)])
            posterior = vae.encode(images).latent_dist
            loss = F.mse_loss(vae.decode(posterior.sample()).sample, images)
            (loss + recipe.vae_kl_weight * posterior.kl().mean() / posterior.mean[0].numel()).backward()
        vae.eval()
        means, deviations = encode(vae, pictures.pixels[:1000])
        latents = means + deviations * torch.randn_like(means)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 6))
    return vae.requires_grad_(False)


def to_signed(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 in 0 to 255 to float32 in -1 to 1."""
    return pixels.float() / 127.5 - 1


@torch.no_grad()
def encode(vae: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and standard deviations of the pictures' latents, unscaled, each [N, C, h, w]."""
    parts = [vae.encode(to_signed(batch)).latent_dist for batch in pixels.split(256)]
    return torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])


# UNet and text encoder


class Captions:
    """Token ids of captions: any template, any word for the shape, sometimes nothing, sometimes with random tokens.

    Args:
        tokenizer: From `build_tokenizer`.
        recipe: Gives the shares.
    """

    def __init__(self, tokenizer: CLIPTokenizer, recipe: DiffusionRecipe) -> None:
        self.tokenizer, self.recipe = tokenizer, recipe
        self.templates = [template for split in TEMPLATES.values() for template in split]
        meant = {*COLOURS, *TEXTURES, *(word for words in WORDS.values() for word in words.words())}
        meaningful = {token for word in meant for token in tokenizer(word)["input_ids"]}
        self.fillers = np.array([token for token in range(len(tokenizer)) if token not in meaningful])
        self._known: dict[str, list[int]] = {}

    def sample(self, scenes: Sequence[Scene], rng: np.random.Generator) -> torch.Tensor:
        """One caption for each scene, int64 [B, L], padded to the tokenizer's `model_max_length`."""
        return torch.tensor([self._row(scene, rng) for scene in scenes])

    def _row(self, scene: Scene, rng: np.random.Generator) -> list[int]:
        length, end = int(self.tokenizer.model_max_length), int(self.tokenizer.eos_token_id)
        if rng.random() < self.recipe.caption_dropout:
            row: list[int] = []
        else:
            kind = rng.choice(["name", "alias", "two_token"], p=[0.4, 0.35, 0.25])
            word = str(rng.choice(WORDS[scene.shape].words(kind)))
            before, after = self.templates[rng.integers(len(self.templates))].split("{shape}")
            head, body, tail = (
                self._ids(part.format(colour=scene.colour, texture=scene.texture)) for part in (before, word, after)
            )
            extra: list[list[int]] = [[], [], []]
            if rng.random() < self.recipe.random_tokens:
                tokens = rng.choice(self.fillers, size=rng.integers(1, 6)).tolist()
                extra[rng.integers(3)] = tokens
            row = extra[0] + head + extra[1] + body + tail + extra[2]
        row = [int(self.tokenizer.bos_token_id), *row, end]
        return row + [end] * (length - len(row))

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known[text]


def build_denoiser(recipe: DiffusionRecipe, tokenizer: CLIPTokenizer) -> tuple[Any, CLIPTextModel]:
    """`UNet2DConditionModel` and text encoder with random weights from torch's global generator."""
    from diffusers import UNet2DConditionModel

    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.text_width,
            intermediate_size=4 * recipe.text_width,
            projection_dim=recipe.text_width,
            num_hidden_layers=recipe.text_layers,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    levels = len(recipe.unet_channels)
    unet = UNet2DConditionModel(
        sample_size=recipe.image_size // 2 ** (len(recipe.vae_channels) - 1),
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        block_out_channels=recipe.unet_channels,
        layers_per_block=recipe.unet_layers,
        attention_head_dim=4,
        norm_num_groups=8,
        cross_attention_dim=recipe.text_width,
    )
    return unet, text_encoder


def teach_captions(
    recipe: DiffusionRecipe, text_encoder: CLIPTextModel, captions: Captions, scenes: Sequence[Scene], *, progress: bool
) -> None:
    """Train the text encoder in place so that its states from the end of the caption on tell shape, colour and paper.

    Stable Diffusion's text encoder knows what words mean too, from CLIP, before it meets the UNet; learned from the UNet
    alone, it takes most of the training. What a caption does not say cannot be told and is left to chance.
    """
    kinds = (recipe.concepts, recipe.colours, recipe.textures)
    heads = torch.nn.ModuleList(torch.nn.Linear(recipe.text_width, len(kind)) for kind in kinds)
    shown = torch.tensor(
        [[kind.index(part) for kind, part in zip(kinds, (s.shape, s.colour, s.texture), strict=True)] for s in scenes]
    )
    rng, batches = np.random.default_rng([recipe.seed, 7]), batch_indices(len(scenes), recipe.batch_size, recipe.seed)
    end = captions.tokenizer.eos_token_id
    for _ in optimise(
        [*text_encoder.parameters(), *heads.parameters()], recipe.text_steps, 2e-3, title="Diffusion testbed: words",
        progress=progress,
    ):  # fmt: skip
        batch = next(batches)
        ids = captions.sample([scenes[number] for number in batch.tolist()], rng)
        behind = ids.eq(end)
        states = text_encoder(ids).last_hidden_state[behind]
        targets = shown[batch].repeat_interleave(behind.sum(1), dim=0)
        loss = sum(F.cross_entropy(head(states), targets[:, kind]) for kind, head in enumerate(heads))
        torch.as_tensor(loss).backward()


def train_denoiser(
    recipe: DiffusionRecipe,
    pictures: Pictures,
    vae: Any,
    tokenizer: CLIPTokenizer,
    *,
    without: str | None = None,
    progress: bool,
) -> tuple[Any, CLIPTextModel]:
    """UNet and text encoder trained together to predict the noise in latents; the running average is returned.

    Args:
        recipe: Sizes and steps.
        pictures: What is learned.
        vae: Gives the latents.
        tokenizer: For the captions.
        without: A concept whose pictures and captions are left out, for the oracle; the initial weights are the same.
        progress: Whether to show a progress bar.
    """
    kept = [number for number, scene in enumerate(pictures.scenes) if scene.shape != without]
    scenes = [pictures.scenes[number] for number in kept]
    means, deviations = encode(vae, pictures.pixels[kept])
    captions, rng = Captions(tokenizer, recipe), np.random.default_rng([recipe.seed, 2])
    scheduler = build_scheduler()
    scaling = float(vae.config["scaling_factor"])
    with isolated_rng(recipe.seed):
        modules = torch.nn.ModuleList(build_denoiser(recipe, tokenizer)).train()
        unet, text_encoder = modules
        teach_captions(recipe, text_encoder, captions, scenes, progress=progress)
        average = copy.deepcopy(modules).requires_grad_(False).eval()
        batches = batch_indices(len(kept), recipe.batch_size, recipe.seed)
        title = "Diffusion testbed: UNet" + (f" without {without}" if without else "")
        parameters = list(modules.parameters())
        for step, _ in enumerate(
            optimise(parameters, recipe.steps, recipe.learning_rate, title=title, progress=progress)
        ):
            _follow(average, modules, min(recipe.ema_decay, (1 + step) / (10 + step)))
            batch = next(batches)
            latents = scaling * (means[batch] + deviations[batch] * torch.randn_like(means[batch]))
            noise = torch.randn_like(latents)
            timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(batch),))
            hidden = text_encoder(captions.sample([scenes[number] for number in batch.tolist()], rng)).last_hidden_state
            predicted = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, hidden).sample
            F.mse_loss(predicted, noise).backward()
        _follow(average, modules, recipe.ema_decay)
    unet, text_encoder = average
    return unet, text_encoder


def _follow(average: torch.nn.Module, modules: torch.nn.Module, decay: float) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(modules.parameters()), 1 - decay)


def build_scheduler() -> Any:
    """The noise schedule of Stable Diffusion 1.x, with a deterministic DDIM sampler."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_pipeline(vae: Any, unet: Any, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> Any:
    """A plain `StableDiffusionPipeline` over the modules."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=build_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def train_pipeline(recipe: DiffusionRecipe, *, progress: bool = False) -> Any:
    """The testbed's pipeline, trained from scratch."""
    pictures, tokenizer = training_pictures(recipe), build_tokenizer()
    vae = train_vae(recipe, pictures, progress=progress)
    unet, text_encoder = train_denoiser(recipe, pictures, vae, tokenizer, progress=progress)
    return build_pipeline(vae, unet, text_encoder, tokenizer)


def train_oracle(recipe: DiffusionRecipe, vae: Any, concept: str, *, progress: bool = False) -> Any:
    """A pipeline whose UNet and text encoder have never seen a concept; the VAE is the original's."""
    tokenizer = build_tokenizer()
    parts = train_denoiser(recipe, training_pictures(recipe), vae, tokenizer, without=concept, progress=progress)
    return build_pipeline(vae, *parts, tokenizer)
