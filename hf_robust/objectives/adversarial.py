"""Outer losses of continuous adversarial training (CAT and CAPO, arXiv 2405.15589)."""

import torch

# Slope of the released CAT code beyond a cut-off: small enough to stop pushing, not zero.
LEAK = 0.001


def leaky_cutoff(value: torch.Tensor, cutoff: float, *, slope: float = LEAK, continuous: bool = True) -> torch.Tensor:
    """
    Leave a loss as it is down to `cutoff`; below it, let it fall at `slope` only.

    Args:
        value: loss values of any shape.
        cutoff: the value below which the loss counts as good enough.
        slope: derivative below the cut-off (0.001 in the authors' code).
        continuous: `True` gives `cutoff + slope * (value - cutoff)`. `False` gives the authors' `cutoff + slope * value`,
            which jumps at the cut-off but has the same gradient.

    Returns:
        Tensor of the shape and dtype of `value`.
    """
    beyond = slope * (value - cutoff) if continuous else slope * value
    return torch.where(value < cutoff, cutoff + beyond, value)


def away_loss(rejected_nll: torch.Tensor, cutoff: float, *, continuous: bool = True) -> torch.Tensor:
    """
    Push the model away from the harmful answer: `-CE(rejected | x + delta)`, leaky below `cutoff`.

    Args:
        rejected_nll: mean negative log-likelihood of the rejected answer, nats per token, any shape.
        cutoff: -5.0 in the paper's configuration: an answer less likely than `exp(-5)` per token is pushed no further.
        continuous: see [`leaky_cutoff`].
    """
    return leaky_cutoff(-rejected_nll, cutoff, continuous=continuous)


def toward_loss(chosen_nll: torch.Tensor, cutoff: float, *, continuous: bool = True) -> torch.Tensor:
    """
    Pull the model toward the safe answer: `CE(chosen | x + delta)`, leaky below `cutoff`.

    Args:
        chosen_nll: mean negative log-likelihood of the chosen answer, nats per token, any shape.
        cutoff: 0.5 in the paper's configuration.
        continuous: see [`leaky_cutoff`].
    """
    return leaky_cutoff(chosen_nll, cutoff, continuous=continuous)


def zero_confident_tokens(log_probs: torch.Tensor, threshold: float = -5.0) -> torch.Tensor:
    """
    Drop (set to 0) per-token log-probabilities below `threshold`, as the authors' released CAPO code does for the
    rejected answer. The objective jumps whenever a token crosses the threshold, so this serves reproduction only
    (`CAPOConfig(reference_compat=True)`).

    Args:
        log_probs: per-token log-probabilities, any shape.
        threshold: nats.
    """
    return torch.where(log_probs < threshold, torch.zeros_like(log_probs), log_probs)
