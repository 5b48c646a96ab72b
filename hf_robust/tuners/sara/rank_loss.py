"""The low-rank term: the nuclear norm of one matrix of trained entries per step."""

import random
from typing import Any

import torch
from torch import Tensor, nn

from hf_robust.tuners.sara.layer import SaraLayer


class _NuclearNorm(torch.autograd.Function):
    """‖X‖_* of a matrix X that is zero but at given places; the gradient is made there alone, and kept."""

    @staticmethod
    def forward(ctx: Any, entries: Tensor, places: Tensor, rows: int, columns: int) -> Tensor:
        dtype = torch.promote_types(entries.dtype, torch.float32)
        matrix = torch.zeros(rows * columns, dtype=dtype, device=entries.device)
        matrix = matrix.index_put((places,), entries.to(dtype)).view(rows, columns)
        left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
        # Gradient U_r V_rᵀ, of the subgradients the one with the smallest norm: directions without a singular value are
        # not pushed at all, instead of in the arbitrary way that the decomposition completes U and V.
        rank = int((singular > singular[0] * max(rows, columns) * torch.finfo(dtype).eps).sum())
        gradient = (left[:, :rank] @ right[:rank]).reshape(-1)[places]
        ctx.save_for_backward(gradient.to(entries.dtype))
        return singular.sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return grad_outputs[0].to(gradient.dtype) * gradient, None, None, None


def nuclear_norm(entries: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """
    Sum of the singular values of the matrix that holds `entries` at flat `places` and zeros elsewhere.

    Args:
        entries: `[k]`, floating point; the gradient with respect to them is that of the norm, U Vᵀ.
        places: `[k]`, integer, distinct.
        shape: rows and columns.

    Returns:
        Scalar, float32 (float64 for float64 entries).
    """
    return _NuclearNorm.apply(entries, places, *shape)


def draw_matrix(model: nn.Module, step: int, seed: int) -> tuple[SaraLayer, str, Tensor] | None:
    """
    A layer and its trainable adapter, drawn for this step, with the positions of the values in the weight's mask.

    None if every entry is frozen.

    Raises:
        ValueError: there is no trainable SaRA adapter.
    """
    found = [
        (layer, name)
        for layer in model.modules()
        if isinstance(layer, SaraLayer) and not layer.disable_adapters
        for name in layer.active_adapters
        if name in layer.sara_values and layer.sara_values[name].requires_grad
    ]
    if not found:
        raise ValueError(
            "`model` has no active, trainable SaRA adapter, so there is no low-rank term: make the model with "
            "`get_peft_model(model, SaraConfig(...))`, or leave the term out."
        )
    # An own generator: the same matrix on every process, after resuming too, and no draw from the global one.
    random.Random(f"{seed}:{step}").shuffle(found)
    for layer, name in found:
        trainable = torch.ones(layer.sara_split[name], dtype=torch.bool, device=layer.sara_indices[name].device)
        frozen = layer.sara_frozen[name]
        if len(frozen):
            trainable[frozen[frozen < len(trainable)].long()] = False
        positions = trainable.nonzero().squeeze(1)
        if len(positions):
            return layer, name, positions
    return None


def weighted_norm(layer: SaraLayer, adapter: str, positions: Tensor) -> Tensor:
    """λ·‖P ⊙ M‖_* of one layer and adapter; `positions` are those of the trainable entries among its values."""
    weight = layer.base_layer.weight
    entries = (layer.base_entries(adapter) + layer.effective_values(adapter))[positions]
    places = layer.sara_indices[adapter][positions]
    shape = (weight.shape[0], weight.numel() // weight.shape[0])
    return layer.sara_config[adapter].rank_loss_weight * nuclear_norm(entries, places, shape)


def sara_rank_loss(model: nn.Module, step: int, *, seed: int = 0) -> Tensor:
    """
    SaRA's low-rank term λ·‖P ⊙ M‖_* for one matrix, drawn for this step: to be added to the loss.

    P ⊙ M holds the present value of the entries that are trained (frozen ones and biases left out) and zeros elsewhere; the
    kernel of a convolution is read as `[out channels, in channels · kernel size]`. The gradient reaches the adapter's
    values, unlike in the code published with the paper.

    In a trainer of one's own:

    ```python
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return loss + sara_rank_loss(model, self.state.global_step)
    ```

    which computes it in every micro-batch. [`SaraRankLossCallback`] adds it to any Trainer, once per optimizer step.

    Args:
        model: a model with SaRA adapters anywhere in it.
        step (`int`): the matrix is drawn from `seed` and this alone: pass the global step.
        seed (`int`, defaults to `0`): another sequence of matrices.

    Returns:
        Scalar, float32, already multiplied with the configuration's `rank_loss_weight`; 0 if every entry is frozen.

    Raises:
        ValueError: no active, trainable SaRA adapter in the model.
    """
    drawn = draw_matrix(model, step, seed)
    if drawn is None:
        return torch.zeros((), device=next(model.parameters()).device)
    return weighted_norm(*drawn)
