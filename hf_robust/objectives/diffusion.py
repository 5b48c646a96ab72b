"""Losses of concept erasure in diffusion models (ESD, arXiv 2303.07345; AdvUnlearn, arXiv 2405.15234)."""

import torch


def erasure_target(concept: torch.Tensor, unconditional: torch.Tensor, guidance: float = 1.0) -> torch.Tensor:
    """
    What an erased model should predict under the concept: the original model guided away from it,
    `unconditional - guidance * (concept - unconditional)` (ESD).

    Args:
        concept: `[B, c, h, w]` the original model's prediction under the concept's prompt, any floating dtype.
        unconditional: `[B, c, h, w]` its prediction under the empty prompt.
        guidance: η, 1.0 in both papers; 0 asks for the unconditional prediction.

    Returns:
        `[B, c, h, w]` float32, no gradient. The weights of the two predictions sum to 1, so the formula is the same for
        models that predict the noise and for those that predict v.
    """
    concept, unconditional = concept.detach().float(), unconditional.detach().float()
    return unconditional - guidance * (concept - unconditional)


def per_image_mse(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    Mean squared error of each image.

    Args:
        prediction: `[B, ...]`, any floating dtype; the difference is taken in float32.
        target: `[B, ...]`, the same shape.

    Returns:
        `[B]` float32.

    Raises:
        ValueError: the shapes differ (a broadcast would be a silent mean over the wrong thing).
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"`target` of shape {tuple(target.shape)} does not fit `prediction` of shape {tuple(prediction.shape)}: give "
            "one target for each image."
        )
    return (prediction.float() - target.float()).pow(2).flatten(1).mean(dim=1)


def erasure_with_retention(
    erasure: torch.Tensor, retention: torch.Tensor | None = None, weight: float = 1.0
) -> torch.Tensor:
    """
    The outer loss of AdvUnlearn: the concept's error plus a weighted error on what is to be kept, `[B] -> [B]`.

    Args:
        erasure: `[B]` error against [`erasure_target`] of each row.
        retention: `[B, R]` error of each row's retain prompts against the original model; `None`: nothing is retained.
        weight: γ: 0.3 in the published command for nudity, 1.0 by default in the authors' code.

    Returns:
        `[B]` float32.
    """
    return erasure if retention is None else erasure + weight * retention.mean(dim=1)
