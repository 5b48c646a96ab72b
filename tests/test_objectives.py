"""Losses against values derived by hand, in the comments."""

import math

import pytest
import torch

from hf_robust.objectives import (
    away_loss,
    kl_divergence,
    leaky_cutoff,
    per_row_mean,
    token_nll,
    toward_loss,
    zero_confident_tokens,
)

# cut-offs


@pytest.mark.parametrize(
    "value, continuous, reference",
    [
        (2.0, 2.0, 2.0),  # above the cut-off 0.5: untouched
        (0.5, 0.5, 0.5),  # at the cut-off: untouched
        (0.1, 0.4996, 0.5001),  # 0.5 + 0.001 (0.1 - 0.5) = 0.5 - 0.0004; reference: 0.5 + 0.001 * 0.1
        (-1.5, 0.498, 0.4985),  # 0.5 + 0.001 (-2) = 0.498; reference: 0.5 - 0.0015
    ],
)
def test_leaky_cutoff_by_hand(value, continuous, reference):
    value = torch.tensor(value)
    assert leaky_cutoff(value, 0.5).item() == pytest.approx(continuous, abs=1e-7)
    assert leaky_cutoff(value, 0.5, continuous=False).item() == pytest.approx(reference, abs=1e-7)


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("slope", [0.001, 0.1])
def test_leaky_cutoff_gradient(continuous, slope):
    # 1 at and above the cut-off, the slope below, in both forms; each row for itself
    value = torch.tensor([-7.0, -5.0, -4.0], requires_grad=True)
    leaky_cutoff(value, -5.0, slope=slope, continuous=continuous).sum().backward()
    torch.testing.assert_close(value.grad, torch.tensor([slope, 1.0, 1.0]))


def test_leaky_cutoff_is_continuous_where_it_says_so():
    below, above = torch.tensor(0.5 - 1e-6), torch.tensor(0.5 + 1e-6)
    assert abs(leaky_cutoff(above, 0.5) - leaky_cutoff(below, 0.5)) < 1e-5
    # The reference form jumps by slope * cutoff = 0.0005
    jump = leaky_cutoff(below, 0.5, continuous=False) - leaky_cutoff(above, 0.5, continuous=False)
    assert jump.item() == pytest.approx(0.0005, abs=1e-5)


@pytest.mark.parametrize(
    "nll, continuous, reference",
    [
        (3.0, -3.0, -3.0),  # -3 is above the cut-off -5
        (5.0, -5.0, -5.0),
        (7.0, -5.002, -5.007),  # -7 < -5: -5 + 0.001 (-7 + 5) = -5.002; reference: -5 + 0.001 * (-7) = -5.007
    ],
)
def test_away_by_hand(nll, continuous, reference):
    nll = torch.tensor([nll])
    torch.testing.assert_close(away_loss(nll, -5.0), torch.tensor([continuous]))
    torch.testing.assert_close(away_loss(nll, -5.0, continuous=False), torch.tensor([reference]))


def test_away_pushes_the_nll_up():
    nll = torch.tensor([3.0, 7.0], requires_grad=True)
    away_loss(nll, -5.0).sum().backward()
    torch.testing.assert_close(nll.grad, torch.tensor([-1.0, -0.001]))


@pytest.mark.parametrize(
    "nll, continuous, reference",
    [
        (1.25, 1.25, 1.25),
        (0.2, 0.4997, 0.5002),  # 0.5 + 0.001 (0.2 - 0.5) = 0.4997; reference: 0.5 + 0.0002
    ],
)
def test_toward_by_hand(nll, continuous, reference):
    nll = torch.tensor([nll])
    torch.testing.assert_close(toward_loss(nll, 0.5), torch.tensor([continuous]))
    torch.testing.assert_close(toward_loss(nll, 0.5, continuous=False), torch.tensor([reference]))


def test_zero_confident_tokens():
    # -5.1 and -20 lie below -5 and are dropped; -5 itself stays
    log_probs = torch.tensor([-0.5, -5.0, -5.1, -20.0], requires_grad=True)
    kept = zero_confident_tokens(log_probs)
    torch.testing.assert_close(kept, torch.tensor([-0.5, -5.0, 0.0, 0.0]))
    kept.sum().backward()
    torch.testing.assert_close(log_probs.grad, torch.tensor([1.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(zero_confident_tokens(log_probs.detach(), -1.0), torch.tensor([-0.5, 0.0, 0.0, 0.0]))


# language modelling


def test_token_nll_by_hand():
    # Row 1: logits ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8. Row 2: equal logits, 1/3 each.
    logits = torch.tensor([[0.0, math.log(2), math.log(5)], [4.0, 4.0, 4.0], [0.0, math.log(2), math.log(5)]])
    nll = token_nll(logits, torch.tensor([2, 0, 0]))
    torch.testing.assert_close(nll, torch.tensor([math.log(8 / 5), math.log(3), math.log(8)]))


def test_token_nll_takes_the_softmax_in_float32():
    logits = torch.tensor([[100.0, 99.0]], dtype=torch.bfloat16)
    nll = token_nll(logits, torch.tensor([1]))
    assert nll.dtype == torch.float32
    # log(1 + e): bfloat16 has 3 digits, so that 1e-6 needs float32
    torch.testing.assert_close(nll, torch.tensor([math.log(1 + math.e)]), rtol=1e-6, atol=0)


def test_token_nll_is_finite_for_large_logits():
    torch.testing.assert_close(token_nll(torch.tensor([[1e4, -1e4]]), torch.tensor([1])), torch.tensor([2e4]))


def test_token_nll_of_no_token():
    assert token_nll(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_per_row_mean_by_hand():
    # Row 0: (1 + 3) / 2; row 1 has no value: 0; row 2: 10. The values need not be in order.
    values, rows = torch.tensor([1.0, 10.0, 3.0], requires_grad=True), torch.tensor([0, 2, 0])
    means = per_row_mean(values, rows, torch.tensor([2, 0, 1]))
    torch.testing.assert_close(means, torch.tensor([2.0, 0.0, 10.0]))
    means.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.5, 1.0, 0.5]))


def test_per_row_mean_of_nothing():
    means = per_row_mean(torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.tensor([0, 0]))
    torch.testing.assert_close(means, torch.zeros(2))


def test_kl_divergence_by_hand():
    # reference (1/2, 1/2), model (1/4, 3/4): 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3
    # reference (1/4, 3/4), model (1/2, 1/2): 1/4 ln 1/2 + 3/4 ln 3/2
    even, skewed = torch.tensor([0.0, 0.0]), torch.tensor([0.0, math.log(3)])
    kl = kl_divergence(torch.stack([skewed, even, even + 7]), torch.stack([even, skewed, even]))
    expected = [0.5 * math.log(4 / 3), 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2), 0.0]
    torch.testing.assert_close(kl, torch.tensor(expected), rtol=1e-5, atol=1e-7)


def test_kl_divergence_gradient_is_the_difference_of_the_distributions():
    # d KL(p || softmax(z)) / dz = softmax(z) - p
    logits = torch.tensor([[0.0, math.log(3)]], requires_grad=True)
    kl_divergence(logits, torch.zeros(1, 2)).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.25 - 0.5, 0.75 - 0.5]]))


def test_kl_divergence_in_half_precision_is_float32():
    kl = kl_divergence(torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.bfloat16))
    assert kl.dtype == torch.float32 and torch.equal(kl, torch.zeros(2))
