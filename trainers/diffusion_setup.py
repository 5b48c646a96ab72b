"""What [`DiffusionTrainer`] makes of its arguments before training: the model, what of it is trained, and sizes."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model

from hf_robust.noise import NoisePolicy
from hf_robust.trainers.diffusion_saving import adapters_of, add_adapters

if TYPE_CHECKING:
    from hf_robust.diffusion.model import DiffusionModel


def as_diffusion_model(model: Any) -> "DiffusionModel":
    """
    The model of whatever a trainer's user gives.

    Args:
        model: a `DiffusionModel`, a diffusers pipeline, a pipeline folder or an id on the Hub.

    Raises:
        ImportError: diffusers is missing.
    """
    from hf_robust.diffusion import DiffusionModel

    if isinstance(model, DiffusionModel):
        return model
    if isinstance(model, str | os.PathLike):
        return DiffusionModel.from_pretrained(os.fspath(model))
    return DiffusionModel(model)


@contextlib.contextmanager
def unchanged_on_error(model: "DiffusionModel") -> Iterator[None]:
    """
    Where a trainer refuses a model, what of it is trained is as it was before.

    Args:
        model: whose weights the trainer freezes.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except Exception:
        for parameter, was in trained:
            parameter.requires_grad_(was)
        raise


def choose_parameters(
    model: "DiffusionModel",
    *,
    train_parts: list[str] | None,
    text_encoder_layers: int | None,
    peft_config: Any,
) -> dict[str, Any]:
    """
    Freeze a model but for what is trained.

    Args:
        model: changed in place.
        train_parts: parts, see [`~hf_robust.trainers.DiffusionConfig`]; `None`: adapters if there are any, else the UNet.
        text_encoder_layers: of the part `"text_encoder"`, the first so many layers alone.
        peft_config: adapters to add.

    Returns:
        The adapters by the name of their part.

    Raises:
        ValueError: an unknown part, parts together with adapters, layers without the text encoder, or trained weights in
            float16.
    """
    from hf_robust.diffusion.parts import select_parameters

    if train_parts is not None and (peft_config is not None or adapters_of(model)):
        raise ValueError(
            f"`train_parts={train_parts!r}` together with `peft_config`, or a model with adapters: adapters are all that is "
            "trained then. Leave it unset; `peft_config={'unet': …, 'text_encoder': …}` says where adapters go."
        )
    model.requires_grad_(False)
    if peft_config is not None:
        return add_adapters(model, peft_config)
    if adapters_of(model):
        for adapter in adapters_of(model).values():
            adapter.set_adapter(adapter.active_adapter)  # trainable again
        return adapters_of(model)
    parts = train_parts or ["unet"]
    if text_encoder_layers is not None and "text_encoder" not in parts:
        raise ValueError(
            f"`text_encoder_layers={text_encoder_layers!r}` but `train_parts={train_parts!r}` has no 'text_encoder'."
        )
    for part in parts:
        layers = text_encoder_layers if part == "text_encoder" else None
        for name, parameter in select_parameters(model, "full" if part == "unet" else part, layers=layers):
            if parameter.dtype == torch.float16:
                raise ValueError(
                    f"`model` has trained weights in float16 ({name}), which loses small updates: load it with "
                    "`dtype=torch.float32`; `fp16=True` or `bf16=True` makes the computation cheap."
                )
            parameter.requires_grad_(True)
    return {}


def training_image_size(model: "DiffusionModel", size: int | None) -> int:
    """
    Height and width of the training images, in pixels.

    Args:
        model: says what it generates.
        size: what the user asks for; `None`: what the model generates.

    Raises:
        ValueError: no multiple of the VAE's factor, or another size for SDXL.
    """
    factor = model.vae_scale_factor
    if size is None or size == model.image_size:
        return model.image_size
    if size <= 0 or size % factor:
        raise ValueError(
            f"`image_size={size!r}` must be a multiple of {factor}, by which the pipeline's VAE shrinks images; the pipeline "
            f"generates {model.image_size}."
        )
    if model.is_sdxl:
        raise ValueError(
            f"`image_size={size!r}`: an SDXL pipeline is told the size of its images, {model.image_size}. Use that."
        )
    return size


def wrapped_names(policy: NoisePolicy, model: "DiffusionModel") -> NoisePolicy:
    """
    The policy with the names that its modules have below the `PeftModel`s around the parts.

    Args:
        policy: with the names of the model without adapters.
        model: maybe with adapters.
    """
    known = {name for name, _ in model.named_modules()}
    prefixes = {path: f"{path}.base_model.model" for path, module in model.named_modules() if is_peft_model(module)}

    def renamed(name: str) -> str:
        path = next((path for path in prefixes if name == path or name.startswith(f"{path}.")), None)
        found = name if path is None else prefixes[path] + name.removeprefix(path)
        return found if found in known else name

    return dataclasses.replace(policy, modules={renamed(name): scale for name, scale in policy.modules.items()})
