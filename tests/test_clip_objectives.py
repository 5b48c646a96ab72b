"""The losses of robust CLIP fine-tuning against values worked out by hand."""

import math

import pytest
import torch

from hf_robust.objectives import fare_loss, pmg_aft_loss, sim_clip_loss, similarity_logits, tecoa_loss


def test_fare_is_a_sum_of_squares():
    features, reference = (
        torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]]),
        torch.tensor([[0.0, 4.0, 3.0], [0.0, 0.0, 1.0]]),
    )
    assert fare_loss(features, reference).tolist() == [1 + 4 + 0, 0]
    assert fare_loss(features.bfloat16(), reference.bfloat16()).dtype == torch.float32


def test_fare_has_no_gradient_at_the_reference():
    features = torch.tensor([[1.0, 2.0]], requires_grad=True)
    fare_loss(features, features.detach()).sum().backward()
    assert features.grad is not None and features.grad.abs().sum() == 0


def test_similarity_is_a_cosine_times_the_scale():
    images, texts = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])
    assert similarity_logits(images, texts, 10.0)[0].tolist() == pytest.approx([6.0, 8.0, -6.0])
    assert similarity_logits(images, texts)[0].tolist() == pytest.approx([60.0, 80.0, -60.0])


def test_tecoa_is_cross_entropy_over_similarities():
    # Cosines 0.6 and 0.8 at scale 10: logits 6 and 8
    images, texts = torch.tensor([[3.0, 4.0], [3.0, 4.0]]), torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    found = tecoa_loss(images, texts, torch.tensor([0, 1]), 10.0)
    assert found.tolist() == pytest.approx([math.log(1 + math.exp(2)), math.log(1 + math.exp(-2))], rel=1e-5)


def test_pmg_aft_is_cross_entropy_and_two_divergences():
    # Two classes with probabilities 1/2, 1/2 under attack; 4/5, 1/5 clean; 3/4, 1/4 in the frozen model
    adversarial = torch.tensor([[0.0, 0.0]])
    clean, frozen = torch.tensor([[math.log(4.0), 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    labels = torch.tensor([1])
    cross_entropy = math.log(2)
    to_frozen = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    to_clean = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    assert pmg_aft_loss(adversarial, clean, frozen, labels).item() == pytest.approx(
        cross_entropy + to_frozen + to_clean, rel=1e-5
    )
    weighted = pmg_aft_loss(adversarial, clean, frozen, labels, generalization_weight=2.0, clean_weight=0.5)
    assert weighted.item() == pytest.approx(cross_entropy + 2 * to_frozen + 0.5 * to_clean, rel=1e-5)


def test_pmg_aft_reaches_both_branches_of_the_trained_tower():
    adversarial = torch.tensor([[0.3, -0.2]], requires_grad=True)
    clean = torch.tensor([[1.0, 0.2]], requires_grad=True)
    pmg_aft_loss(adversarial, clean, torch.tensor([[0.1, 0.9]]), torch.tensor([0])).sum().backward()
    assert adversarial.grad is not None and clean.grad is not None
    assert adversarial.grad.abs().max() > 0 and clean.grad.abs().max() > 0
    # By finite differences: the divergence's first argument is differentiated too
    step = 1e-3
    values = [
        pmg_aft_loss(
            torch.tensor([[0.3 + sign * step, -0.2]]), clean.detach(), torch.tensor([[0.1, 0.9]]), torch.tensor([0])
        ).item()
        for sign in (1, -1)
    ]
    assert adversarial.grad[0, 0].item() == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-3)


def test_sim_clip_is_minus_the_cosine_and_stops_half_of_each_gradient():
    adversarial = torch.tensor([[3.0, 4.0]], requires_grad=True)
    clean = torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss = sim_clip_loss(adversarial, clean)
    assert loss.item() == pytest.approx(-0.6)
    loss.sum().backward()
    assert adversarial.grad is not None and clean.grad is not None
    # d cos / d a = (c/|c| - cos * a/|a|) / |a|, for each argument with the other one fixed; half of it each
    assert adversarial.grad[0].tolist() == pytest.approx([-(1 - 0.6 * 0.6) / 5 / 2, (0.6 * 0.8) / 5 / 2], rel=1e-5)
    assert clean.grad[0].tolist() == pytest.approx([0.0, -0.8 / 2], rel=1e-5, abs=1e-7)
