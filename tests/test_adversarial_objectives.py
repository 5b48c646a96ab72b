"""Losses of adversarial training against values derived by hand."""

import math

import pytest
import torch

from hf_robust.objectives.adversarial_training import (
    grad_align_penalty,
    kl_dro_weights,
    mart_loss,
    smoothed_cross_entropy,
    trades_loss,
    vat_kl,
    weat_weights,
)

# Logits whose softmax is known: log-probabilities are logits
CLEAN = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log()
ADVERSARIAL = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.4, 0.4]]).log()
LABELS = torch.tensor([0, 1])
# Σ p log(p / q) by hand
KL = torch.tensor(
    [
        0.5 * math.log(2) + 0.25 * math.log(0.5) + 0.25 * math.log(1),
        0.1 * math.log(0.5) + 0.8 * math.log(2) + 0.1 * math.log(0.25),
    ]
)


def test_smoothed_cross_entropy():
    # A share of 0.3 goes to three classes alike: 0.8 log p_y + 0.1 Σ log p_other
    by_hand = -(0.8 * math.log(0.5) + 0.1 * 2 * math.log(0.25))
    assert smoothed_cross_entropy(CLEAN, LABELS, 0.3)[0].item() == pytest.approx(by_hand, abs=1e-6)
    assert smoothed_cross_entropy(CLEAN, LABELS)[1].item() == pytest.approx(-math.log(0.8), abs=1e-6)


def test_trades_loss():
    by_hand = torch.tensor([-math.log(0.5), -math.log(0.8)]) + 6 * KL
    assert torch.allclose(trades_loss(CLEAN, ADVERSARIAL, LABELS), by_hand, atol=1e-6)


def test_trades_gradient_flows_through_both_branches():
    clean, adversarial = CLEAN.clone().requires_grad_(True), ADVERSARIAL.clone().requires_grad_(True)
    loss = trades_loss(clean, adversarial, LABELS) - trades_loss(clean, adversarial, LABELS, beta=0.0)
    loss.sum().backward()
    assert clean.grad.abs().max() > 0.1 and adversarial.grad.abs().max() > 0.1


def test_mart_loss():
    by_hand = torch.tensor(
        [
            -math.log(0.25) - math.log(1.0001 - 0.5) + 5 * KL[0].item() * (1 - 0.5),
            -math.log(0.4) - math.log(1.0001 - 0.4) + 5 * KL[1].item() * (1 - 0.8),
        ]
    )
    assert torch.allclose(mart_loss(CLEAN, ADVERSARIAL, LABELS), by_hand, atol=1e-6)


def test_mart_is_finite_where_the_model_is_certain_of_a_wrong_class():
    adversarial = torch.tensor([[-200.0, 200.0, 0.0]], requires_grad=True)
    loss = mart_loss(CLEAN[:1], adversarial, LABELS[:1])
    loss.sum().backward()
    assert loss.isfinite().all() and adversarial.grad.isfinite().all()


def test_vat_kl_has_no_gradient_to_the_clean_branch():
    clean = CLEAN.clone().requires_grad_(True)
    adversarial = ADVERSARIAL.clone().requires_grad_(True)
    loss = vat_kl(clean, adversarial)
    loss.sum().backward()
    assert torch.allclose(loss, KL, atol=1e-6)
    assert clean.grad is None and adversarial.grad.abs().max() > 0.1


def test_grad_align_penalty():
    first = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]], [[1.0, 1.0]], [[0.0, 0.0]]])
    second = torch.tensor([[[6.0, 8.0]], [[0.0, 2.0]], [[-1.0, -1.0]], [[1.0, 0.0]]])
    assert torch.allclose(grad_align_penalty(first, second), torch.tensor([0.0, 1.0, 2.0, 1.0]), atol=1e-6)
    # Input gradients of a confident model are tiny: they have a direction all the same
    assert torch.allclose(grad_align_penalty(first[:3] * 1e-15, second[:3]), torch.tensor([0.0, 1.0, 2.0]), atol=1e-6)


def test_weat_weights():
    # E = -log(e^1 + e^1) = -1.693
    logits = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    energy = torch.tensor([1 + math.log(2), math.log(2)])
    assert torch.allclose(weat_weights(logits), 1 / torch.log(1 + torch.exp(energy)), atol=1e-6)
    assert weat_weights(torch.tensor([[500.0, 0.0]])).item() == pytest.approx(1 / 500, rel=1e-4)


def test_kl_dro_weights():
    losses = torch.tensor([0.0, math.log(3.0)])
    assert torch.allclose(kl_dro_weights(losses), torch.tensor([0.5, 1.5]), atol=1e-6)
    assert torch.allclose(kl_dro_weights(losses * 2, 2.0), torch.tensor([0.5, 1.5]), atol=1e-6)
    assert torch.allclose(kl_dro_weights(torch.tensor([7.0, 7.0])), torch.ones(2), atol=1e-6)
    # Half of the rows on another process, which has one place without a row
    everyone = torch.tensor([0.0, math.log(3.0), math.log(4.0), -math.inf])
    assert torch.allclose(kl_dro_weights(losses, 1.0, everyone), torch.tensor([3 / 8, 9 / 8]), atol=1e-6)
