"""Losses of noise-augmented fine-tuning, from the logits of a clean and two noisy branches."""

from dataclasses import dataclass
from typing import Any

import torch

from hf_robust.objectives.language_modeling import kl_divergence, token_nll
from hf_robust.threats import check_at_least, check_choice

LOSS_MODES = ("full", "ce_kl", "kl_only", "consistency_only", "ce_noisy")


@dataclass(frozen=True)
class NoiseLossWeights:
    """
    Weight of each term of the loss; a term of weight 0 need not be computed.

    Attributes:
        ce: cross-entropy of the clean branch.
        noisy_ce: mean cross-entropy of the noisy branches.
        kl: mean divergence KL(clean ‖ noisy) of the noisy branches.
        consistency: divergence KL(second ‖ first) of the noisy branches.
    """

    ce: float = 0.0
    noisy_ce: float = 0.0
    kl: float = 0.0
    consistency: float = 0.0

    @property
    def is_noisy(self) -> bool:
        """Whether a term needs the noisy branches."""
        return any((self.noisy_ce, self.kl, self.consistency))


def noise_loss_weights(mode: str = "full", *, alpha: float = 0.5, consistency: float = 0.1) -> NoiseLossWeights:
    """
    Weights of a loss mode. An ablation drops terms of the full loss and leaves the weights of the others.

    Args:
        mode: `"full"`: α CE(clean) + (1 − α) ½[KL(p‖q₁) + KL(p‖q₂)] + λ KL(q₂‖q₁); `"ce_kl"`: without the last term;
            `"kl_only"`: the middle one alone; `"consistency_only"`: the last alone; `"ce_noisy"`: ½[CE₁ + CE₂] of the noisy
            branches, without divergences.
        alpha: share of the clean cross-entropy, in [0, 1]; 0.5 as in the paper (arXiv 2504.03302).
        consistency: λ, 0.1 as in the paper; version 2 of the released code takes 0.05.

    Raises:
        ValueError: the mode is unknown, or a weight out of range.
    """
    check_choice("mode", mode, LOSS_MODES)
    check_at_least("alpha", alpha, 0, "It is the share of the clean cross-entropy, in [0, 1].")
    check_at_least("consistency", consistency, 0, "0 leaves the term out.")
    if alpha > 1:
        raise ValueError(f"`alpha={alpha!r}` must lie in [0, 1]: it is the share of the clean cross-entropy.")
    if mode == "ce_noisy":
        return NoiseLossWeights(noisy_ce=1.0)
    return NoiseLossWeights(
        ce=alpha if mode in ("full", "ce_kl") else 0.0,
        kl=1 - alpha if mode in ("full", "ce_kl", "kl_only") else 0.0,
        consistency=consistency if mode in ("full", "consistency_only") else 0.0,
    )


def teacher_kl(
    clean: torch.Tensor, noisy: torch.Tensor, *, temperature: float = 1.0, version: str = "v2"
) -> torch.Tensor:
    """
    KL(p ‖ q) of the clean branch's prediction p and a noisy branch's q, in nats.

    Args:
        clean: `[N, V]` logits, any floating dtype; the softmax is taken in float32.
        noisy: `[N, V]` logits.
        temperature: T, above 0. `"v1"`: p = softmax(clean / T) and q = softmax(noisy), with gradients to both. `"v2"`: T on
            both sides, times T² so that gradients keep their size, and no gradient to the clean branch.
        version: `"v1"` or `"v2"`.

    Returns:
        `[N]` float32.
    """
    _check(temperature, version)
    if version == "v1":
        return kl_divergence(noisy, clean.float() / temperature)
    return temperature**2 * kl_divergence(noisy.float() / temperature, clean.detach().float() / temperature)


def consistency_kl(
    first: torch.Tensor, second: torch.Tensor, *, temperature: float = 1.0, version: str = "v2"
) -> torch.Tensor:
    """
    KL(q₂ ‖ q₁) of two noisy branches, in nats.

    Args:
        first: `[N, V]` logits of q₁, any floating dtype.
        second: `[N, V]` logits of q₂.
        temperature: as in [`teacher_kl`]; version 1 has none here.
        version: `"v1"`: gradients to both; `"v2"`: none to q₂, the target.

    Returns:
        `[N]` float32.
    """
    _check(temperature, version)
    if version == "v1":
        return kl_divergence(first, second)
    return temperature**2 * kl_divergence(first.float() / temperature, second.detach().float() / temperature)


def branch_divergences(
    clean: torch.Tensor, first: torch.Tensor, second: torch.Tensor, *, temperature: float = 1.0, version: str = "v2"
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    ½[KL(p‖q₁) + KL(p‖q₂)] and KL(q₂‖q₁) at once: [`teacher_kl`] and [`consistency_kl`] with one softmax for each branch
    instead of six, and gradients in closed form (once: there is no second derivative).

    Args:
        clean: `[N, V]` logits, any floating dtype; everything is computed in float32.
        first: `[N, V]` logits of the first noisy branch.
        second: `[N, V]` logits of the second.
        temperature: see [`teacher_kl`].
        version: see [`teacher_kl`] and [`consistency_kl`].

    Returns:
        The two divergences, `[N]` float32 each, in nats.
    """
    _check(temperature, version)
    detached = version != "v1"
    return _Divergences.apply(clean, first, second, temperature, temperature if detached else 1.0, detached)


class _Divergences(torch.autograd.Function):
    """The divergences with their gradients in closed form: three probabilities are kept instead of a dozen steps."""

    @staticmethod
    def forward(
        ctx: Any,
        clean: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        teacher: float,
        sides: float,
        cut: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        p, one, two = _log_probs(clean, teacher), _log_probs(first, sides), _log_probs(second, sides)
        probs, other = p.exp(), two.exp()
        to_teacher = torch.lerp(one, two, 0.5).neg_().add_(p)  # log p - ½ log q₁ - ½ log q₂
        between = two - one
        noisy, consistency = (probs * to_teacher).sum(dim=-1), (other * between).sum(dim=-1)
        # Gradients to the teacher and to the target of the second divergence, where they are wanted
        extra = [] if cut else [to_teacher, between, noisy, consistency]
        ctx.save_for_backward(probs, one.exp_(), other, *extra)
        ctx.teacher, ctx.sides, ctx.dtypes = teacher, sides, (clean.dtype, first.dtype, second.dtype)
        return sides**2 * noisy, sides**2 * consistency

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        probs, one, two, *extra = ctx.saved_tensors
        noisy, consistency = (ctx.sides * grad.unsqueeze(-1) for grad in grads)
        pull = 0.5 * noisy
        to_first = (pull + consistency) * one - pull * probs - consistency * two
        to_second, to_clean = pull * (two - probs), None
        if extra:
            to_teacher, between, mean, other_mean = extra
            to_clean = noisy / ctx.teacher * probs * (to_teacher - mean.unsqueeze(-1))
            to_second = to_second + consistency * two * (between - other_mean.unsqueeze(-1))
            to_clean = to_clean.to(ctx.dtypes[0])
        return to_clean, to_first.to(ctx.dtypes[1]), to_second.to(ctx.dtypes[2]), None, None, None


def _log_probs(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = logits.float()
    return (logits if temperature == 1 else logits / temperature).log_softmax(dim=-1)


def noisefit_loss(
    clean: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    targets: torch.Tensor,
    *,
    weights: NoiseLossWeights,
    temperature: float = 1.0,
    version: str = "v2",
) -> torch.Tensor:
    """
    The loss of "Noise Augmented Fine Tuning for Mitigating Hallucinations in Large Language Models" (arXiv 2504.03302).

    Args:
        clean: `[N, V]` logits without noise, at the positions that predict a label.
        first: `[N, V]` logits of the first noisy branch.
        second: `[N, V]` logits of the second noisy branch.
        targets: `[N]` int64 label token ids.
        weights: of the terms, see [`noise_loss_weights`].
        temperature: see [`teacher_kl`].
        version: `"v1"` or `"v2"`, see [`teacher_kl`] and [`consistency_kl`].

    Returns:
        `[N]` float32, one loss per label token.
    """
    _check(temperature, version)
    # In float32 whatever the logits' dtype; starting from zeros keeps the shape when every weight is 0
    loss = clean.new_zeros(clean.shape[:-1], dtype=torch.float32)
    if weights.ce:
        loss = loss + weights.ce * token_nll(clean, targets)
    if weights.noisy_ce:
        loss = loss + weights.noisy_ce * 0.5 * (token_nll(first, targets) + token_nll(second, targets))
    if weights.kl:
        both = [teacher_kl(clean, noisy, temperature=temperature, version=version) for noisy in (first, second)]
        loss = loss + weights.kl * 0.5 * (both[0] + both[1])
    if weights.consistency:
        divergence = consistency_kl(first, second, temperature=temperature, version=version)
        loss = loss + weights.consistency * divergence
    return loss


def symmetric_kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """
    ½ [KL(p ‖ q) + KL(q ‖ p)] of two predictions, in nats.

    Args:
        first: `[N, V]` logits, any floating dtype.
        second: `[N, V]` logits.

    Returns:
        `[N]` float32.
    """
    return 0.5 * (kl_divergence(first, second) + kl_divergence(second, first))


def r_drop_loss(
    first: torch.Tensor, second: torch.Tensor, targets: torch.Tensor, *, weight: float = 1.0
) -> torch.Tensor:
    """
    ½ (CE₁ + CE₂) + weight · ½ [KL(p‖q) + KL(q‖p)] of two passes that differ by their dropout.

    The loss of "R-Drop: Regularized Dropout for Neural Networks" (arXiv 2106.14448), halved.

    Args:
        first: `[N, V]` logits of the first pass.
        second: `[N, V]` logits of the second.
        targets: `[N]` int64 label token ids.
        weight: of the divergence.

    Returns:
        `[N]` float32, one loss per label token.
    """
    cross_entropy = 0.5 * (token_nll(first, targets) + token_nll(second, targets))
    return cross_entropy + weight * symmetric_kl(first, second)


def _check(temperature: float, version: str) -> None:
    check_choice("version", version, ("v1", "v2"))
    check_at_least("temperature", temperature, 0, "The paper takes 1.")
    if temperature == 0:
        raise ValueError("`temperature=0` divides by zero: use a number above 0; the paper takes 1.")
