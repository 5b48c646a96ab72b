"""Losses of noise-augmented fine-tuning against values derived by hand, in the comments."""

import math

import pytest
import torch

from hf_robust.objectives import (
    LOSS_MODES,
    NoiseLossWeights,
    branch_divergences,
    consistency_kl,
    noise_loss_weights,
    noisefit_loss,
    r_drop_loss,
    symmetric_kl,
    teacher_kl,
)

LN3 = math.log(3)
EVEN, SKEWED, STEEP = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, LN3]]), torch.tensor([[0.0, 2 * LN3]])
# Probabilities: EVEN (1/2, 1/2), SKEWED (1/4, 3/4), STEEP (1/10, 9/10)
KL_EVEN_SKEWED = 0.5 * math.log(4 / 3)  # 1/2 ln 2 + 1/2 ln 2/3
KL_SKEWED_EVEN = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
KL_SKEWED_STEEP = 0.25 * math.log(10 / 4) + 0.75 * math.log(10 / 12)


def close(value: torch.Tensor, expected: float) -> None:
    torch.testing.assert_close(value, torch.tensor([expected]), rtol=1e-5, atol=1e-7)


def test_teacher_kl_by_hand():
    for version in ("v1", "v2"):
        close(teacher_kl(EVEN, SKEWED, version=version), KL_EVEN_SKEWED)
        close(teacher_kl(SKEWED, SKEWED, version=version), 0.0)


def test_temperature_on_one_side_and_on_both():
    # T = 2: STEEP / 2 = SKEWED. v1: KL(SKEWED ‖ EVEN); v2: EVEN / 2 = EVEN, times 4
    close(teacher_kl(STEEP, EVEN, temperature=2, version="v1"), KL_SKEWED_EVEN)
    close(teacher_kl(STEEP, EVEN, temperature=2, version="v2"), 4 * KL_SKEWED_EVEN)
    # The noisy side: left alone in v1, KL(EVEN ‖ STEEP) = 1/2 ln 5 + 1/2 ln 5/9; SKEWED in v2
    close(teacher_kl(EVEN, STEEP, temperature=2, version="v1"), 0.5 * math.log(25 / 9))
    close(teacher_kl(EVEN, STEEP, temperature=2, version="v2"), 4 * KL_EVEN_SKEWED)


def test_consistency_by_hand():
    # KL(second ‖ first): the second is the target
    close(consistency_kl(EVEN, SKEWED, version="v1"), KL_SKEWED_EVEN)
    close(consistency_kl(EVEN, STEEP, version="v2", temperature=2), 4 * KL_SKEWED_EVEN)
    # Version 1 knows no temperature here: KL(STEEP ‖ EVEN) = 1/10 ln 1/5 + 9/10 ln 9/5
    close(consistency_kl(EVEN, STEEP, version="v1", temperature=2), 0.1 * math.log(1 / 5) + 0.9 * math.log(9 / 5))


@pytest.mark.parametrize("version, reaches", [("v1", True), ("v2", False)])
def test_targets_are_detached_in_version_2(version, reaches):
    clean, noisy = SKEWED.clone().requires_grad_(), EVEN.clone().requires_grad_()
    for loss in (teacher_kl(clean, noisy, version=version), consistency_kl(noisy, clean, version=version)):
        target, moved = torch.autograd.grad(loss.sum(), (clean, noisy), allow_unused=True)
        # d KL(p ‖ softmax(z)) / dz = softmax(z) − p
        torch.testing.assert_close(moved, torch.tensor([[0.25, -0.25]]))
        assert (target is not None and bool(target.abs().sum() > 0)) == reaches


def test_weights_of_the_modes():
    # An ablation drops terms and leaves the others' weights
    expected = {
        "full": (0.5, 0, 0.5, 0.1),
        "ce_kl": (0.5, 0, 0.5, 0),
        "kl_only": (0, 0, 0.5, 0),
        "consistency_only": (0, 0, 0, 0.1),
        "ce_noisy": (0, 1, 0, 0),
    }
    assert set(expected) == set(LOSS_MODES)
    for mode, weights in expected.items():
        assert noise_loss_weights(mode) == NoiseLossWeights(*weights)
    assert not noise_loss_weights("full", alpha=1.0, consistency=0.0).is_noisy
    assert all(noise_loss_weights(mode).is_noisy for mode in LOSS_MODES)


@pytest.mark.parametrize("mode", LOSS_MODES)
def test_loss_by_hand(mode):
    # clean SKEWED, first EVEN, second STEEP, target 1: CE = ln 4/3, ln 2, ln 10/9
    ce, first, second = math.log(4 / 3), math.log(2), math.log(10 / 9)
    kl = 0.5 * (KL_SKEWED_EVEN + KL_SKEWED_STEEP)
    consistency = 0.1 * math.log(1 / 5) + 0.9 * math.log(9 / 5)  # KL(STEEP ‖ EVEN)
    expected = {
        "full": 0.3 * ce + 0.7 * kl + 0.2 * consistency,
        "ce_kl": 0.3 * ce + 0.7 * kl,
        "kl_only": 0.7 * kl,
        "consistency_only": 0.2 * consistency,
        "ce_noisy": 0.5 * (first + second),
    }
    weights = noise_loss_weights(mode, alpha=0.3, consistency=0.2)
    for version in ("v1", "v2"):
        loss = noisefit_loss(SKEWED, EVEN, STEEP, torch.tensor([1]), weights=weights, version=version)
        close(loss, expected[mode])


def test_loss_of_many_tokens_in_half_precision():
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(5, 7, generator=generator).bfloat16() for _ in range(3)]
    targets = torch.arange(5)
    weights = noise_loss_weights()
    loss = noisefit_loss(*logits, targets, weights=weights)
    assert loss.shape == (5,) and loss.dtype == torch.float32
    rows = [noisefit_loss(*(z[i : i + 1] for z in logits), targets[i : i + 1], weights=weights) for i in range(5)]
    torch.testing.assert_close(loss, torch.cat(rows))


def test_clean_cross_entropy_alone_is_the_cross_entropy_bit_for_bit():
    logits = torch.randn(5, 7)
    noise = torch.full((5, 7), float("nan"))
    weights = noise_loss_weights(alpha=1.0, consistency=0.0)
    loss = noisefit_loss(logits, noise, noise, torch.arange(5), weights=weights)
    assert torch.equal(loss, torch.nn.functional.cross_entropy(logits, torch.arange(5), reduction="none"))


def test_r_drop_and_symmetric_kl_by_hand():
    symmetric = 0.5 * (KL_EVEN_SKEWED + KL_SKEWED_EVEN)
    close(symmetric_kl(EVEN, SKEWED), symmetric)
    close(symmetric_kl(SKEWED, EVEN), symmetric)
    # target 0: CE = ln 2 and ln 4
    target = torch.tensor([0])
    close(r_drop_loss(EVEN, SKEWED, target), 1.5 * math.log(2) + symmetric)
    close(r_drop_loss(EVEN, SKEWED, target, weight=0.0), 1.5 * math.log(2))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: noise_loss_weights("fulll"), "`mode='fulll'` is unknown.*Did you mean 'full'"),
        (lambda: noise_loss_weights(alpha=1.5), r"`alpha=1.5` must lie in \[0, 1\]"),
        (lambda: noise_loss_weights(alpha=-0.1), "`alpha=-0.1`"),
        (lambda: noise_loss_weights(consistency=-1.0), "`consistency=-1.0`"),
        (lambda: teacher_kl(EVEN, EVEN, temperature=0), "`temperature=0`"),
        (lambda: teacher_kl(EVEN, EVEN, version="v3"), "`version='v3'`"),
        (lambda: consistency_kl(EVEN, EVEN, temperature=-1), "`temperature=-1`"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergences_at_once_are_those_one_by_one(version: str, temperature: float, dtype: torch.dtype):
    torch.manual_seed(0)
    logits = [torch.randn(5, 7).to(dtype).requires_grad_() for _ in range(3)]
    kind = {"temperature": temperature, "version": version}
    noisy, between = branch_divergences(*logits, **kind)
    clean, first, second = logits
    expected = 0.5 * (teacher_kl(clean, first, **kind) + teacher_kl(clean, second, **kind))
    torch.testing.assert_close(noisy, expected)
    torch.testing.assert_close(between, consistency_kl(first, second, **kind))
    found = torch.autograd.grad((noisy + 0.3 * between).sum(), logits, allow_unused=True)
    wanted = torch.autograd.grad(
        (expected + 0.3 * consistency_kl(first, second, **kind)).sum(), logits, allow_unused=True
    )
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-6 if dtype == torch.float32 else 1e-2, rtol=1e-2)
