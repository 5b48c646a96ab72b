"""Floating-point operations of what the parents' estimates leave out: attacks, split weights, no transformers."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hf_robust.sites import quiet

if TYPE_CHECKING:
    from hf_robust.diffusion.model import DiffusionModel


def search_operations(training: int, steps: int, *, forwards: int = 0) -> int:
    """
    Operations of a gradient search on inputs. By the estimate that transformers goes by, a training pass has three equal
    parts: forward, gradients of the activations, gradients of the weights. A search step has the first two.

    Args:
        training: operations of a training pass over the same rows.
        steps: of the search.
        forwards: forwards that it makes besides: one to evaluate the last perturbation (`keep="best"`), one of clean inputs.
    """
    return training * (2 * steps + forwards) // 3


def parameter_count(model: nn.Module) -> int:
    """
    Number of weights but the embeddings', as transformers estimates operations by; also of a model whose weights ZeRO-3 has
    split: between forwards they are empty, and `num_parameters` counts none.

    Args:
        model: unwrapped.

    Returns:
        0 for a model that has no `num_parameters`.
    """
    count: Any = getattr(model, "num_parameters", None)
    if not hasattr(next(model.parameters(), None), "ds_numel"):
        return 0 if count is None else count(exclude_embeddings=True)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return sum(_weights(p) for p in model.parameters() if id(p) not in embeddings)


def _weights(parameter: Any) -> int:
    """Of a parameter that ZeRO-3 has split; two weights of bitsandbytes' 4-bit kind are stored in a byte."""
    is_packed = type(parameter).__name__ == "Params4bit"
    return parameter.ds_numel * (2 * parameter.element_size() if is_packed else 1)


@torch.no_grad()
def unet_operations(model: "DiffusionModel", latent_size: int) -> int:
    """
    Operations of the UNet's forward of one item, counted in one.

    Args:
        model: unwrapped. Its counts of UNet items stay as they are.
        latent_size: height and width of the latents.
    """
    latents = torch.zeros(1, model.latent_shape[0], latent_size, latent_size, device=model.device)
    with quiet(model):
        conditioning = model.unconditional()
    # By matrix products: of the fused attention kernels only some are counted
    with quiet(model), model.uncounted(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.predict(latents, torch.zeros(1, dtype=torch.long, device=model.device), conditioning)
    return int(counter.get_total_flops())
