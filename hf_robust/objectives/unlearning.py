"""Losses that make a language model forget, and those that keep the rest, from logits and hidden states."""

from typing import Any

import torch
import torch.nn.functional as F

from hf_robust.objectives.language_modeling import kl_divergence, token_nll

FORGET_LOSSES = ("grad_diff", "npo", "simnpo", "rmu", "undial", "ce_u")
RETAIN_LOSSES = ("ce", "kl", "activation")


def grad_diff_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Minus the cross-entropy: the forget term of gradient difference (arXiv 2203.12817), without a lower bound.

    Args:
        logits: `[N, V]` at the positions that predict a label, any floating dtype.
        targets: `[N]` int64 label token ids.

    Returns:
        `[N]` float32, in nats.
    """
    return -token_nll(logits, targets)


def npo_loss(nll: torch.Tensor, reference_nll: torch.Tensor, *, beta: float = 0.1) -> torch.Tensor:
    """
    Negative preference optimisation (arXiv 2404.05868): `-2/β log σ(β (NLL - NLL_ref))`.

    Args:
        nll: `[B]` negative log-likelihood of each answer under the model, **summed** over its tokens, in nats.
        reference_nll: `[B]` the same under the model before training.
        beta: inverse temperature, above 0; 0.1 as in the paper. Towards 0 it becomes gradient ascent.

    Returns:
        `[B]` float32, at least 0; `2 log 2 / β` where the two agree.
    """
    return -2 / beta * F.logsigmoid(beta * (nll.float() - reference_nll.float()))


def simnpo_loss(nll: torch.Tensor, counts: torch.Tensor, *, beta: float = 4.5, delta: float = 0.0) -> torch.Tensor:
    """
    SimNPO (arXiv 2410.07163): `-2/β log σ(β (NLL / |y| - δ))`, without a reference.

    Args:
        nll: `[B]` negative log-likelihood of each answer, summed over its tokens, in nats.
        counts: `[B]` number of tokens of each answer, |y|.
        beta: inverse temperature, above 0; 4.5 as in the released code for TOFU.
        delta: margin that the mean NLL is held against; 0 as in the released code. β multiplies it too.

    Returns:
        `[B]` float32, at least 0.
    """
    return -2 / beta * F.logsigmoid(beta * (nll.float() / counts.clamp(min=1) - delta))


def undial_loss(
    logits: torch.Tensor, reference_logits: torch.Tensor, targets: torch.Tensor, *, beta: float = 10.0
) -> torch.Tensor:
    """
    UNDIAL (arXiv 2402.10052): cross-entropy against the model before training, whose logit of the true token is lowered by β.

    Args:
        logits: `[N, V]` of the model that is trained, at the positions that predict a label.
        reference_logits: `[N, V]` of the model before training; no gradient flows to them.
        targets: `[N]` int64 label token ids.
        beta: how much the true token's logit is lowered; 10 as in the paper.

    Returns:
        `[N]` float32, in nats. Its gradient is in closed form, and cannot be differentiated again (RuntimeError).
    """
    return _Undial.apply(logits.float(), reference_logits.detach().float(), targets.unsqueeze(1), beta)


def ce_u_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    CE-U (arXiv 2503.01224): cross-entropy against the model's own prediction without the true token.

    Args:
        logits: `[N, V]` at the positions that predict a label; the target distribution is made of them and gets no gradient.
        targets: `[N]` int64 label token ids, to which the target gives no probability.

    Returns:
        `[N]` float32, in nats. Its gradient is in closed form, and cannot be differentiated again (RuntimeError).
    """
    return _CrossEntropyUnlearning.apply(logits.float(), targets.unsqueeze(1))


class _ClosedForm(torch.autograd.Function):
    """
    Cross-entropy against a distribution that is no function of the logits, whose gradient is prediction minus target. Of the
    distributions over the vocabulary a forward keeps one for the backward, and two while it runs.
    """

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        if torch.is_grad_enabled():  # `create_graph=True`; the second derivative would be 0, without a word
            raise RuntimeError(
                "UNDIAL's and CE-U's gradients are in closed form and cannot be differentiated again: leave out "
                "`create_graph=True`, or use another optimizer or loss."
            )
        direction, scale = ctx.saved_tensors
        grad = grad.unsqueeze(1)
        return direction * (grad if scale is None else scale * grad), *[None] * (len(ctx.needs_input_grad) - 1)


class _Undial(_ClosedForm):
    """UNDIAL of `[N, V]` logits, `[N, V]` reference logits and `[N, 1]` targets."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor, beta: float
    ) -> torch.Tensor:
        rest = reference.scatter(1, targets, reference.gather(1, targets) - beta)
        target, probs = rest.softmax(dim=-1), logits.softmax(dim=-1)
        # log p = z - max z + log max p, so no tensor of log-probabilities is made
        torch.sub(logits, logits.amax(dim=-1, keepdim=True), out=rest)
        values = -probs.amax(dim=-1).log() - rest.mul_(target).sum(dim=-1)
        ctx.save_for_backward(probs.sub_(target), None)
        return values


class _CrossEntropyUnlearning(_ClosedForm):
    """
    CE-U of `[N, V]` logits and `[N, 1]` targets, from the target distribution q alone: with p the probability of the true token
    y, the prediction is (1 - p) q elsewhere, so the loss is H(q) - log(1 - p) and its gradient p (1_y - q).
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rest = logits.scatter(1, targets, -torch.inf)
        top = rest.amax(dim=-1, keepdim=True)
        own = rest.sub_(top).softmax(dim=-1)
        mass = -own.amax(dim=-1, keepdim=True).log()  # log-sum-exp of the other tokens, less `top`
        ahead = logits.gather(1, targets) - top - mass  # log-odds of the true token
        rest.scatter_(1, targets, 0.0)  # the target gives it nothing
        values = F.softplus(ahead) + mass - rest.mul_(own).sum(dim=-1, keepdim=True)
        ctx.save_for_backward(own.scatter_(1, targets, -1.0), -ahead.sigmoid())
        return values.squeeze(1)


def rmu_direction(width: int, seed: int) -> torch.Tensor:
    """
    The random unit vector of RMU: coordinates uniform in [0, 1), then scaled to length 1.

    Args:
        width: number of coordinates, the model's hidden size.
        seed: the same seed gives the same vector on every machine and process; the global random state is not touched.

    Returns:
        `[width]` float32.
    """
    drawn = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


def rmu_loss(
    states: torch.Tensor, direction: torch.Tensor, mask: torch.Tensor, *, coefficient: float = 2.0
) -> torch.Tensor:
    """
    RMU's forget term (arXiv 2403.03218): squared distance of hidden states from `coefficient * direction`.

    The mean over coordinates, as in the released code, where the paper writes the sum.

    Args:
        states: `[B, L, D]` hidden states behind the steered layer.
        direction: `[D]` unit vector, see [`rmu_direction`].
        mask: `[B, L]`, true (or 1) at the tokens that count.
        coefficient: length that states are steered to, c.

    Returns:
        `[B]` float32, the mean over a row's tokens; 0 for a row without any.
    """
    return activation_mse(states, (coefficient * direction.to(states.device)).expand_as(states), mask)


def activation_mse(states: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Mean squared difference of hidden states, RMU's retain term.

    Args:
        states: `[B, L, D]` of the model that is trained.
        reference: `[B, L, D]` of the model before training; no gradient flows to it.
        mask: `[B, L]`, true (or 1) at the tokens that count.

    Returns:
        `[B]` float32, the mean over coordinates and a row's tokens; 0 for a row without any.
    """
    square = (states.float() - reference.detach().float()).square().mean(dim=-1)
    return (square * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def retain_kl(logits: torch.Tensor, reference_logits: torch.Tensor) -> torch.Tensor:
    """
    KL(before ‖ now) of the next-token predictions.

    Args:
        logits: `[N, V]` of the model that is trained, at the positions that predict a label.
        reference_logits: `[N, V]` of the model before training; no gradient flows to them.

    Returns:
        `[N]` float32, in nats.
    """
    return kl_divergence(logits, reference_logits.detach())
