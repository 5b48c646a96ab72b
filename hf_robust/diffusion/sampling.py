"""Images and half-way latents by deterministic DDIM, each from its own seed."""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_robust.diffusion import require_diffusers
from hf_robust.diffusion.conditioning import Conditioning
from hf_robust.diffusion.model import DiffusionModel
from hf_robust.sites.quiet import quiet


def draw_noise(model: DiffusionModel, seeds: Sequence[int]) -> torch.Tensor:
    """
    Starting noise, one generator per image: the numbers that a diffusers pipeline draws with a CPU generator of that seed.

    Args:
        model: whose latent shape is taken.
        seeds: one per image.

    Returns:
        `[B, c, h, w]` float32 on the model's device.
    """
    shape = model.latent_shape
    rows = [torch.randn((1, *shape), generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.cat([torch.empty(0, *shape), *rows]).to(model.device)


def ddim_timesteps(model: DiffusionModel, steps: int) -> torch.Tensor:
    """
    Timesteps at which `steps` DDIM steps query the UNet: `[steps]` int64 on the CPU, falling.

    After k steps of [`sample_latents`] the latents are at the level of the k-th, counted from 0.
    """
    return _ddim(model, steps).timesteps


def _ddim(model: DiffusionModel, steps: int) -> Any:
    if steps < 1:
        raise ValueError(f"`steps={steps}` must be at least 1.")
    # Latents have no bounds to clip to; a config of another scheduler that says nothing of it would get DDIM's default
    scheduler = require_diffusers().DDIMScheduler.from_config(model.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(steps)
    return scheduler


@torch.no_grad()
def sample_latents(
    model: DiffusionModel,
    conditioning: Conditioning,
    unconditional: Conditioning | None = None,
    *,
    steps: int = 50,
    guidance_scale: float | None = 7.5,
    seeds: Sequence[int],
    stop_after: int | torch.Tensor | None = None,
    unet_model: DiffusionModel | None = None,
) -> torch.Tensor:
    """
    Latents by DDIM without noise ("Denoising Diffusion Implicit Models", arXiv 2010.02502), with the model's schedule.

    Dropout is silenced and the global random state left alone. An image depends on its own row and seed only.

    Args:
        model: whose scheduler, latent shape and, unless `unet_model` is given, UNet are used.
        conditioning: of `B` rows, one per image.
        unconditional: of 1 or `B` rows. Default: `model.unconditional()`, when guidance needs it.
        steps: of the whole way. Default: 50, as in diffusers.
        guidance_scale: ε∅ + s · (ε_c − ε∅) is followed. 1 or `None` runs no unconditional half. Default: 7.5, as in diffusers.
        seeds: of the starting noise, one per image.
        stop_after: number of steps after which an image is left as it is, for all or `[B]` int64 per image, between 0 (noise)
            and `steps`. Images that are done cost nothing. Default: all steps.
        unet_model: take the UNet of this model instead.

    Returns:
        `[B, c, h, w]` float32 on the model's device.

    Raises:
        ImportError: diffusers is missing.
        ValueError: numbers of rows and seeds that differ, or `stop_after` outside of its range.
    """
    count = len(seeds)
    if len(conditioning) != count:
        raise ValueError(
            f"`seeds` has {count} entries for {len(conditioning)} rows of `conditioning`: give one per image."
        )
    scheduler = _ddim(model, steps)
    stops = torch.as_tensor(steps if stop_after is None else stop_after).cpu().expand(count)
    if count and not (0 <= int(stops.min()) and int(stops.max()) <= steps):
        raise ValueError(f"`stop_after` runs from {int(stops.min())} to {int(stops.max())}: it must be 0 to {steps}.")
    guided = guidance_scale is not None and guidance_scale != 1
    unet = model if unet_model is None else unet_model
    latents = draw_noise(model, seeds)
    with quiet(unet), quiet(model):
        if guided:
            unconditional = model.unconditional() if unconditional is None else unconditional
            if len(unconditional) not in (1, count):
                raise ValueError(f"`unconditional` has {len(unconditional)} rows; it must have 1 or {count}.")
            unconditional = unconditional if len(unconditional) == count else unconditional.repeat(count)
        for step, timestep in enumerate(scheduler.timesteps.tolist()):
            rows = (stops > step).nonzero().flatten().to(latents.device)
            if not len(rows):
                break
            current, told = latents[rows], conditioning.select(rows)
            if guided:
                assert unconditional is not None and guidance_scale is not None
                both = Conditioning.cat([unconditional.select(rows), told])
                output = _predict(unet, torch.cat([current, current]), timestep, both)
                plain, prompted = output.chunk(2)
                output = plain + guidance_scale * (prompted - plain)
            else:
                output = _predict(unet, current, timestep, told)
            latents[rows] = scheduler.step(output, timestep, current, eta=0.0).prev_sample
    return latents


def _predict(model: DiffusionModel, latents: torch.Tensor, timestep: int, conditioning: Conditioning) -> torch.Tensor:
    timesteps = torch.full((len(latents),), timestep, device=latents.device)
    return model.predict(latents, timesteps, conditioning).float()


@torch.no_grad()
def generate(
    model: DiffusionModel,
    prompts: Sequence[str] | None,
    *,
    seeds: Sequence[int],
    steps: int = 50,
    guidance_scale: float | None = 7.5,
    batch_size: int = 8,
    conditioning: Conditioning | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """
    Images of prompts, one per seed. What comes out does not depend on `batch_size`.

    Args:
        model: in any mode; dropout is silenced. A pipeline's safety checker is not asked.
        prompts: `N` of them; `None` with `conditioning`.
        seeds: `N`.
        steps: DDIM steps.
        guidance_scale: see [`sample_latents`].
        batch_size: images per forward of the UNet (twice as many items with guidance).
        conditioning: `N` encoded prompts, such as attacked ones, instead of `prompts`.
        progress: show a bar.

    Returns:
        `[N, 3, H, W]` float32 in [0, 1], on the CPU.

    Raises:
        ImportError: diffusers is missing.
        ValueError: numbers of prompts and seeds that differ, both or none of `prompts` and `conditioning`, or a prompt that is
            too long.
    """
    if (prompts is None) == (conditioning is None):
        raise ValueError("give either `prompts` or `conditioning`.")
    count = len(prompts) if prompts is not None else len(conditioning or ())
    if count != len(seeds):
        raise ValueError(f"`seeds` has {len(seeds)} entries for {count} prompts: give one per image.")
    if batch_size < 1:
        raise ValueError(f"`batch_size={batch_size}` must be at least 1.")
    images = [torch.empty(0, 3, model.image_size, model.image_size)]
    with quiet(model):
        ids = None if prompts is None else model.tokenize(prompts)  # a prompt that is too long shows before any work
        for start in tqdm(range(0, count, batch_size), desc="generating", disable=not progress, leave=False):
            rows = slice(start, start + batch_size)
            if ids is not None:
                told = model.encode([tensor[rows] for tensor in ids])
            else:
                assert conditioning is not None
                told = conditioning.select(rows)
            latents = sample_latents(model, told, steps=steps, guidance_scale=guidance_scale, seeds=list(seeds[rows]))
            images.append(model.decode(latents).cpu())
    return torch.cat(images)
