"""Losses of adversarial training of classifiers, one value per row, from clean and adversarial logits."""

import torch
import torch.nn.functional as F

from hf_robust.objectives.language_modeling import kl_divergence


def smoothed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """
    Cross-entropy in nats against labels that give `label_smoothing` of their mass to all classes alike.

    Args:
        logits: `[B, C]`, any floating dtype; the softmax is taken in float32.
        labels: `[B]` int64; -100 gives 0.
        label_smoothing: share in [0, 1); 0 is the plain cross-entropy.

    Returns:
        `[B]` float32.
    """
    return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)


def trades_loss(
    clean: torch.Tensor,
    adversarial: torch.Tensor,
    labels: torch.Tensor,
    *,
    beta: float = 6.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """
    TRADES (arXiv 1901.08573): CE(clean) + β KL(p_clean ‖ p_adv), with gradients through both branches.

    Args:
        clean: `[B, C]` logits of the inputs as they are.
        adversarial: `[B, C]` logits of the perturbed inputs.
        labels: `[B]` int64.
        beta: weight of the divergence, 6 in the paper.
        label_smoothing: of the cross-entropy.

    Returns:
        `[B]` float32; the authors' loss is the mean.
    """
    return smoothed_cross_entropy(clean, labels, label_smoothing) + beta * kl_divergence(adversarial, clean)


def mart_loss(
    clean: torch.Tensor,
    adversarial: torch.Tensor,
    labels: torch.Tensor,
    *,
    beta: float = 5.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """
    MART (Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR 2020):
    −log p_y(x′) − log(1.0001 − max_{k≠y} p_k(x′)) + β KL(p_clean ‖ p_adv) · (1 − p_clean,y).

    Args:
        clean: `[B, C]` logits of the inputs as they are, `C` at least 2.
        adversarial: `[B, C]` logits of the perturbed inputs.
        labels: `[B]` int64 in `[0, C)`.
        beta: weight of the divergence, 5 in the authors' code.
        label_smoothing: of the first term.

    Returns:
        `[B]` float32.
    """
    index = labels.unsqueeze(-1)
    probabilities = adversarial.float().softmax(dim=-1)
    runner_up = probabilities.scatter(-1, index, -1.0).amax(dim=-1)
    boosted = smoothed_cross_entropy(adversarial, labels, label_smoothing) - torch.log(1.0001 - runner_up)
    doubt = 1 - clean.float().softmax(dim=-1).gather(-1, index).squeeze(-1)
    return boosted + beta * kl_divergence(adversarial, clean) * doubt


def vat_kl(clean: torch.Tensor, adversarial: torch.Tensor) -> torch.Tensor:
    """
    Local distributional smoothness of VAT (arXiv 1704.03976): KL(p_clean ‖ p_adv), without gradient to the clean branch.

    Args:
        clean: `[B, C]` logits.
        adversarial: `[B, C]` logits.

    Returns:
        `[B]` float32, in nats.
    """
    return kl_divergence(adversarial, clean.detach())


def grad_align_penalty(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """
    GradAlign (arXiv 2007.02617): 1 − cos of the loss's gradients with respect to an input and to a random point nearby.

    Args:
        first: `[B, ...]` gradient at the input.
        second: `[B, ...]` gradient at the point nearby.

    Returns:
        `[B]` float32 in [0, 2]; 1 where a gradient is zero.
    """
    # Unit vectors first: input gradients are small, and the similarity's own floor of 1e-8 would swallow their product
    sides = [F.normalize(side.float().flatten(1), dim=1, eps=1e-30) for side in (first, second)]
    return 1 - (sides[0] * sides[1]).sum(dim=1)


def weat_weights(logits: torch.Tensor) -> torch.Tensor:
    """
    Sample weights of weighted energy adversarial training (arXiv 2407.06315): 1 / log(1 + exp|E|), E = −logsumexp(logits).

    Args:
        logits: `[B, C]`.

    Returns:
        `[B]` float32 without gradient, in (0, 1.443]; not normalised.
    """
    return 1 / F.softplus(torch.logsumexp(logits.detach().float(), dim=-1).abs())


def kl_dro_weights(
    losses: torch.Tensor, temperature: float = 1.0, everyone: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Weights of the worst case in a KL ball around the empirical distribution: w ∝ exp(ℓ / r).

    Args:
        losses: `[B]` of the rows to be weighted.
        temperature: r, above 0; the larger, the more equal the weights.
        everyone: `[N]` losses of all rows among which weights are shared, those of `losses` included; −inf is no row.
            Default: `losses`.

    Returns:
        `[B]` float32 without gradient; their mean over all rows is 1, so that equal losses give the plain mean.
    """
    everyone = (losses if everyone is None else everyone).detach().float()
    count = everyone.isfinite().sum()
    return count * torch.exp(losses.detach().float() / temperature - torch.logsumexp(everyone / temperature, dim=0))
