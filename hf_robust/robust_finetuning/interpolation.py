"""The straight line between two models: weights in, weights out."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_robust.threats import check_at_least

# What a method's adapter is linear in: scaling it scales what the adapter adds to the weight
_LINEAR = ("lora_B", "lora_embedding_B")
# What an adapter's configuration may add to that; KaSA truncates the base weight
_MORE = ("use_dora", "bias", "modules_to_save", "trainable_token_indices", "kasa_config")
# Inits of PEFT that take from the base weight what they give the adapter: without it, the base is not what it was
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_SHOWN = 5


def weights_of(source: Any) -> dict[str, torch.Tensor]:
    """
    Weights and buffers by name.

    Args:
        source: a module, a trainer (its model, unwrapped), a state dict, or a folder with `model.safetensors` (or its index
            and shards).

    Raises:
        FileNotFoundError: a folder without safetensors files of a model.
        TypeError: something else.
    """
    if isinstance(source, Mapping):
        return dict(source)
    if isinstance(source, str | os.PathLike):
        from safetensors.torch import load_file

        files = sorted(Path(source).expanduser().glob("model*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"`{str(source)!r}` holds no model*.safetensors: give a folder that a trainer saved a whole model to."
            )
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    if not isinstance(source, nn.Module):
        model, accelerator = getattr(source, "model", None), getattr(source, "accelerator", None)
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"`{type(source).__name__}` holds no weights: give a module, a trainer, a state dict, or a folder of one."
            )
        source = model if accelerator is None else accelerator.unwrap_model(model)
    return source.state_dict()


def interpolate_weights(a: Any, b: Any, alpha: float) -> dict[str, torch.Tensor]:
    """
    (1 − α)·a + α·b for every weight and buffer of floating point, computed in float32 (float64 for float64) and given in a's
    dtype. α = 0 gives a and α = 1 gives b, bit for bit. Buffers of whole numbers (BatchNorm's counters) are those of the
    nearer end.

    With a model before and after fine-tuning this is weight-space ensembling (Wortsman et al. 2022, arXiv 2109.01903), and
    the last step of RiFT (Zhu et al. 2023, arXiv 2308.02533). A LoRA adapter is not linear in its two factors: use
    [`scale_adapter`].

    Args:
        a: a module, a trainer, a state dict, or a folder with a saved model.
        b: likewise, of the same architecture.
        alpha: share of b, in [0, 1].

    Returns:
        A state dict with tensors of its own, for `load_state_dict`.

    Raises:
        ValueError: other names or shapes in a than in b, `alpha` outside [0, 1], or models with LoRA adapters.
    """
    _check_alpha(alpha)
    first, second = weights_of(a), weights_of(b)
    other = sorted(set(first) ^ set(second))
    other += [name for name in first if name in second and first[name].shape != second[name].shape]
    if other:
        shown = ", ".join(other[:_SHOWN]) + (", …" if len(other) > _SHOWN else "")
        raise ValueError(
            f"`a` and `b` differ in names or shapes of weights ({shown}): give two models of the same architecture."
        )
    if has_lora(first):
        raise ValueError(
            "`a` and `b` have LoRA adapters, whose two factors do not interpolate to the weights between: scale one adapter "
            "with `scale_adapter`, or merge both (`merge_and_unload`) first."
        )
    return {name: _between(first[name], second[name], alpha) for name in first}


def scale_adapter(model: nn.Module, alpha: float, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
    """
    The point between a base model (α = 0) and the same model with its LoRA adapter (α = 1): the adapter's second factor
    times α, since what LoRA adds is linear in it. The base is untouched; α = 0 and α = 1 are the two end models bit for bit.

    Args:
        model: PEFT model. It stays as it is.
        alpha: share of the adapter, in [0, 1].
        adapter_name: Default: the active one.

    Returns:
        A state dict of the scaled weights alone: `model.load_state_dict(…, strict=False)` sets them, and `save_pretrained`
        then saves them.

    Raises:
        ValueError: no such adapter or no LoRA weights in it, `alpha` outside [0, 1], an adapter that holds more than LoRA
            (DoRA, biases, `modules_to_save`, `trainable_token_indices`), which is not linear or not an addition, or one whose
            start changed the base weights (PiSSA, CorDA, OLoRA, LoftQ, LoRA-GA, KaSA).
    """
    _check_alpha(alpha)
    configs = getattr(model, "peft_config", {})
    if adapter_name is None:
        active: Any = getattr(model, "active_adapter", None)
        adapter_name = active if isinstance(active, str) else next(iter(active or configs), None)
    if adapter_name not in configs:
        raise ValueError(f"`adapter_name={adapter_name!r}` is no adapter of the model; it has {list(configs)}.")
    config = configs[adapter_name]
    given = {name: getattr(config, name, None) for name in _MORE}
    more = [f"{name}={value!r}" for name, value in given.items() if value and value != "none"]
    init = getattr(config, "init_lora_weights", True)
    if str(init).lower().startswith(_CHANGE_THE_BASE):
        more.append(f"init_lora_weights={init!r}, which changes the base weights")
    if more:
        raise ValueError(
            f"`adapter_name={adapter_name!r}` is more than an addition to the base model ({', '.join(more)}): merge it "
            "(`merge_and_unload`) and use `interpolate_weights` with the base model loaded anew."
        )
    own = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if adapter_name in name.split(".") and any(part in name.split(".") for part in _LINEAR)
    }
    if not own:
        raise ValueError(f"`adapter_name={adapter_name!r}` has no LoRA weights: only LoRA adapters can be scaled.")
    return {name: tensor.clone() if alpha == 1 else tensor * alpha for name, tensor in own.items()}


def has_lora(names: Iterable[str]) -> bool:
    """
    Whether some weights are the factors of a LoRA adapter.

    Args:
        names: of the weights.
    """
    return any(part in name for name in names for part in _LINEAR)


def _check_alpha(alpha: float) -> None:
    check_at_least("alpha", alpha, 0, "0 is the first model, 1 the second.")
    if alpha > 1:
        raise ValueError(f"`alpha={alpha!r}` must be at most 1: 0 is the first model, 1 the second.")


def _between(first: torch.Tensor, second: torch.Tensor, alpha: float) -> torch.Tensor:
    # Also where 0 · inf would be NaN
    if alpha in (0, 1) or not first.is_floating_point():
        return (first if alpha < 0.5 else second).detach().clone()
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    mixed = torch.lerp(first.detach().to(wide), second.detach().to(first.device, wide), alpha)
    return mixed.to(first.dtype)
