"""Pipeline folders in and out: every weight of a file finds its place, or loading fails."""

import copy
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_robust.diffusion import require_diffusers

# The trainable and frozen modules of a pipeline, by the names of its subfolders
PART_NAMES = ("unet", "text_encoder", "text_encoder_2", "vae")
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def load_part(kind: type, source: str | Path, name: str, *, dtype: torch.dtype, **kwargs: Any) -> nn.Module:
    """
    One module of a pipeline, with exactly the weights of its file.

    Args:
        kind: the module's class, of diffusers or transformers.
        source: pipeline folder or Hub id.
        name: subfolder.
        dtype: of the weights.
        kwargs: to `from_pretrained`: `revision`, `variant`, `cache_dir`, `token`, `local_files_only`.

    Raises:
        ValueError: the file lacks weights of the module or holds others. Libraries warn of it and draw random numbers
            instead, which is how a model that was never loaded comes to be measured.
        OSError: no such folder or no safetensors file in it.
    """
    loader: Any = kind
    module, info = loader.from_pretrained(
        str(source), subfolder=name, use_safetensors=True, output_loading_info=True, dtype=dtype, **kwargs
    )
    wrong = {
        key: sorted(map(str, info.get(key) or ())) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if any(wrong.values()):
        found = "; ".join(
            f"{key.replace('_', ' ')}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for key, names in wrong.items()
            if names
        )
        raise ValueError(
            f"`{source}/{name}` does not hold the weights of a {kind.__name__} of its config ({found}). Save the whole module "
            "with `save_pretrained`; an adapter is loaded with PEFT instead, onto the pipeline that it was trained on."
        )
    return module


def load_pipeline(source: str | Path, *, dtype: torch.dtype, **kwargs: Any) -> Any:
    """
    A Stable Diffusion pipeline whose UNet, text encoders and VAE are checked by [`load_part`].

    Args:
        source: pipeline folder or Hub id.
        dtype: of all weights.
        kwargs: to diffusers' `from_pretrained`; components given here (`scheduler=…`) replace those of the folder.

    Raises:
        ImportError: diffusers is missing.
        ValueError: another kind of pipeline, or see [`load_part`].
        OSError: no such folder.
    """
    diffusers = require_diffusers()
    shared = {k: kwargs[k] for k in ("revision", "variant", "cache_dir", "token", "local_files_only") if k in kwargs}
    # What names a file's variant is for weights alone
    index = diffusers.DiffusionPipeline.load_config(
        str(source), **{key: value for key, value in shared.items() if key != "variant"}
    )
    if index.get("_class_name") not in PIPELINES:
        raise ValueError(
            f"`{source}` holds a {index.get('_class_name')}, not one of {' or '.join(PIPELINES)}: Stable Diffusion 1.x, 2.x "
            "and SDXL text-to-image pipelines can be trained."
        )
    parts = {}
    for name in PART_NAMES:
        library, kind = index.get(name) or (None, None)
        if name in kwargs or kind is None:
            continue
        if library not in ("diffusers", "transformers"):
            raise ValueError(f"`{source}`: `{name}` is of the library {library!r}, not of diffusers or transformers.")
        parts[name] = load_part(getattr(importlib.import_module(library), kind), source, name, dtype=dtype, **shared)
    pipeline_class = getattr(diffusers, index["_class_name"])
    return pipeline_class.from_pretrained(str(source), **{"dtype": dtype, "use_safetensors": True, **parts, **kwargs})


def base_of(module: nn.Module) -> nn.Module:
    """The diffusers or transformers module inside a PEFT model; the module itself otherwise."""
    getter = getattr(module, "get_base_model", None)
    return module if getter is None else getter()


def merged(module: nn.Module) -> nn.Module:
    """
    The module as a pipeline folder holds it: a copy with its adapters merged, the module itself when it has none.

    Raises:
        ValueError: adapters that were put in without a PEFT model around them (`add_adapter`).
    """
    if base_of(module) is not module:
        peft_model: Any = copy.deepcopy(module)
        return peft_model.merge_and_unload()
    if any(".base_layer." in name for name in module.state_dict()):
        raise ValueError(
            f"{type(module).__name__} holds adapter layers but is no PEFT model, so it cannot be saved as plain weights: use "
            "`peft.get_peft_model` instead of `add_adapter`."
        )
    return module
