"""Which weights a training touches."""

import re

from torch import nn

from hf_robust.diffusion.model import DiffusionModel

PARTS = ("text_encoder", "xattn", "noxattn", "selfattn", "full")

_LAYER = re.compile(r"(?:^|\.)encoder\.layers\.(\d+)\.")
_NORM = re.compile(r"(?:^|\.)final_layer_norm\.")
# Of CompVis's names `time_embed` and `out`, as diffusers calls them; SDXL's `add_embedding` is added to the former
_NOT_IN_NOXATTN = ("time_embedding", "add_embedding", "conv_norm_out", "conv_out", "attn2")


def select_parameters(model: DiffusionModel, part: str, *, layers: int | None = None) -> list[tuple[str, nn.Parameter]]:
    """
    The weights of a part of a pipeline, as erasing methods name the parts. Nothing is frozen or thawed here.

    Args:
        model: without adapters, which say themselves what they train.
        part: `"text_encoder"`: all layers of the text encoder(s) and the final layer norm; token and position embeddings
            and SDXL's projection are left out ("Defensive Unlearning with Adversarial Training", NeurIPS 2024). Of SDXL's
            first text encoder the last layer and the final norm are left out too: the pipeline does not read them.
            `"xattn"`: every `attn2` (cross attention) of the UNet. `"selfattn"`: every `attn1`. `"noxattn"`: all of the UNet
            but `attn2`, `time_embedding` (with SDXL's `add_embedding`), `conv_norm_out` and `conv_out`. `"full"`: all of the
            UNet. These are ESD's ("Erasing Concepts from Diffusion Models", arXiv 2303.07345).
        layers: with `"text_encoder"`, only the first so many layers and not the final norm. Default: all.

    Returns:
        `(name, parameter)` pairs in the order of `model.named_parameters()`, with its names.

    Raises:
        ValueError: an unknown part, `layers` with a part of the UNet, or more layers than there are.
    """
    if part not in PARTS:
        raise ValueError(f"`part={part!r}`: use one of {', '.join(map(repr, PARTS))}.")
    if part == "text_encoder":
        return _text_parameters(model, layers)
    if layers is not None:
        raise ValueError(f"`layers={layers}` is for `part='text_encoder'`; leave it out with {part!r}.")
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if name.startswith("unet.") and _in_unet_part(name.split("."), part)
    ]


def _in_unet_part(components: list[str], part: str) -> bool:
    if part == "noxattn":
        return not any(name in components for name in _NOT_IN_NOXATTN)
    wanted = {"xattn": "attn2", "selfattn": "attn1"}.get(part)
    return wanted is None or wanted in components


def _text_parameters(model: DiffusionModel, layers: int | None) -> list[tuple[str, nn.Parameter]]:
    found = []
    for number, encoder in enumerate(model.text_encoders):
        prefix = f"text_encoders.{number}."
        parameters = [(prefix + name, p) for name, p in encoder.named_parameters()]
        numbers = {int(match[1]) for name, _ in parameters if (match := _LAYER.search(name))}
        read = len(numbers) - (1 if model.is_sdxl and number == 0 else 0)
        if layers is not None and not 1 <= layers <= read:
            raise ValueError(
                f"`layers={layers}` must be between 1 and {read}, the layers of text encoder {number + 1} in use."
            )
        for name, parameter in parameters:
            layer = _LAYER.search(name)
            if layer is not None:
                chosen = int(layer[1]) < (read if layers is None else layers)
            else:
                chosen = layers is None and read == len(numbers) and _NORM.search(name) is not None
            if chosen:
                found.append((name, parameter))
    return found
