"""Stable Diffusion 1.x, 2.x and SDXL pipelines as one trainable module: prompts, sampling, perturbations, parts to train.

Needs `pip install "hf_robust[diffusion]"`. Names are loaded on first use; what reads or draws with a pipeline says so when
diffusers is missing.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_robust.diffusion.conditioning import Conditioning
    from hf_robust.diffusion.model import DiffusionModel, DiffusionModelConfig
    from hf_robust.diffusion.parts import PARTS, select_parameters
    from hf_robust.diffusion.sampling import ddim_timesteps, draw_noise, generate, sample_latents
    from hf_robust.diffusion.site import TextTokenSite
    from hf_robust.diffusion.tokens import (
        POSITIONS,
        concept_ids,
        concept_span,
        decode_tokens,
        ordinary_ids,
        place_in_prompts,
        place_tokens,
    )

_HOMES = {
    "conditioning": ("Conditioning",),
    "model": ("DiffusionModel", "DiffusionModelConfig"),
    "parts": ("PARTS", "select_parameters"),
    "sampling": ("ddim_timesteps", "draw_noise", "generate", "sample_latents"),
    "site": ("TextTokenSite",),
    "tokens": (
        "POSITIONS",
        "concept_ids",
        "concept_span",
        "decode_tokens",
        "ordinary_ids",
        "place_in_prompts",
        "place_tokens",
    ),
}

__all__ = [
    "Conditioning",
    "DiffusionModel",
    "DiffusionModelConfig",
    "PARTS",
    "POSITIONS",
    "TextTokenSite",
    "concept_ids",
    "concept_span",
    "ddim_timesteps",
    "decode_tokens",
    "draw_noise",
    "generate",
    "ordinary_ids",
    "place_in_prompts",
    "place_tokens",
    "require_diffusers",
    "sample_latents",
    "select_parameters",
]


def require_diffusers() -> ModuleType:
    """
    The diffusers package.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module("diffusers")
    except ModuleNotFoundError as error:
        if error.name != "diffusers":  # an install that lacks something else should say what
            raise
        raise ImportError(
            'diffusion models need the package `diffusers`: install it with `pip install "hf_robust[diffusion]"`.'
        ) from error


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
