"""Losses of concept erasure, against values worked out by hand."""

import pytest
import torch

from hf_robust.objectives import erasure_target, erasure_with_retention, per_image_mse


@pytest.mark.parametrize(("guidance", "expected"), [(0.0, [1.0, 2.0]), (1.0, [-2.0, 6.0]), (3.0, [-8.0, 14.0])])
def test_erasure_target_by_hand(guidance: float, expected: list[float]):
    concept, unconditional = torch.tensor([[4.0, -2.0]]), torch.tensor([[1.0, 2.0]])
    # 1 - η (4 - 1) and 2 - η (-2 - 2)
    assert erasure_target(concept, unconditional, guidance).tolist() == [expected]


def test_erasure_target_carries_no_gradient_and_is_float32():
    concept = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True)
    target = erasure_target(concept, torch.zeros(1, 2, dtype=torch.bfloat16))
    assert not target.requires_grad and target.dtype == torch.float32


def test_erasure_target_of_v_is_that_of_the_noise():
    """v = (noise - sigma z) / alpha is affine in the noise: both ways of writing the target agree."""
    generator = torch.Generator().manual_seed(0)
    z, concept, unconditional = torch.randn(3, 2, 4, 4, 4, generator=generator)
    alpha, sigma = 0.8, 0.6

    def v(noise: torch.Tensor) -> torch.Tensor:
        return (noise - sigma * z) / alpha

    of_noise = v(erasure_target(concept, unconditional, 1.5))
    assert torch.allclose(erasure_target(v(concept), v(unconditional), 1.5), of_noise, atol=1e-5)


def test_per_image_mse_by_hand():
    prediction = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])
    target = torch.tensor([[[1.0, 0.0]], [[3.0, 1.0]]])
    assert per_image_mse(prediction, target).tolist() == [2.0, 5.0]  # (0 + 4) / 2, (9 + 1) / 2


def test_per_image_mse_refuses_a_broadcast():
    with pytest.raises(ValueError, match="one target for each image"):
        per_image_mse(torch.zeros(2, 4, 8, 8), torch.zeros(1, 4, 8, 8))


def test_outer_loss_by_hand():
    erasure, retention = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 3.0], [0.0, 4.0]])
    assert erasure_with_retention(erasure, retention, 0.3).tolist() == pytest.approx([1.6, 2.6])  # mean 2 each
    assert erasure_with_retention(erasure).tolist() == [1.0, 2.0]
