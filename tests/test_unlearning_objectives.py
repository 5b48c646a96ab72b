"""The losses of unlearning against values worked out by hand."""

import math

import pytest
import torch

from hf_robust.objectives import (
    activation_mse,
    ce_u_loss,
    grad_diff_loss,
    npo_loss,
    per_row_sum,
    retain_kl,
    rmu_direction,
    rmu_loss,
    simnpo_loss,
    undial_loss,
)
from hf_robust.objectives.unlearning import _Undial

# Two tokens of a vocabulary of three; probabilities 1/4, 1/4, 1/2 and 1/2, 1/3, 1/6
LOGITS = torch.tensor([[1.0, 1.0, 2.0], [3.0, 2.0, 1.0]]).log()
TARGETS = torch.tensor([2, 0])


def test_grad_diff_is_minus_the_cross_entropy():
    torch.testing.assert_close(grad_diff_loss(LOGITS, TARGETS), torch.tensor([-math.log(2), -math.log(2)]))
    torch.testing.assert_close(grad_diff_loss(LOGITS, torch.tensor([0, 2])), torch.tensor([-math.log(4), -math.log(6)]))


def test_npo_takes_summed_likelihoods_and_beta_inside_and_in_front():
    # sigma(0.5 * 2 log 3) = 3 / 4; sigma(0) = 1 / 2
    nll, reference = torch.tensor([5.0 + 2 * math.log(3), 5.0]), torch.tensor([5.0, 5.0])
    expected = torch.tensor([4 * math.log(4 / 3), 4 * math.log(2)])
    torch.testing.assert_close(npo_loss(nll, reference, beta=0.5), expected)
    # The gradient's weight of gradient ascent: 2 sigma(-beta * gap), 1 where nothing has been forgotten yet
    nll.requires_grad_()
    npo_loss(nll, reference, beta=0.5).sum().backward()
    torch.testing.assert_close(nll.grad, torch.tensor([-0.5, -1.0]))


def test_npo_of_a_row_s_tokens_is_not_that_of_their_mean():
    tokens, rows = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1])
    counts = torch.tensor([2, 1, 0])
    torch.testing.assert_close(per_row_sum(tokens, rows, counts), torch.tensor([3.0, 4.0, 0.0]))


def test_simnpo_divides_by_the_length_and_beta_multiplies_the_margin_too():
    # NLL / |y| = log 3 + 0.25, margin 0.25, beta 2: sigma(2 log 3) = 9 / 10; in front 2 / 2
    nll, counts = torch.tensor([4 * (math.log(3) + 0.25)]), torch.tensor([4])
    torch.testing.assert_close(simnpo_loss(nll, counts, beta=2.0, delta=0.25), torch.tensor([math.log(10 / 9)]))
    # Without a margin and with beta 1: sigma(log 3) = 3 / 4, in front 2
    nll = torch.tensor([2 * math.log(3)])
    torch.testing.assert_close(simnpo_loss(nll, torch.tensor([2]), beta=1.0), torch.tensor([2 * math.log(4 / 3)]))
    assert simnpo_loss(torch.zeros(1), torch.zeros(1, dtype=torch.long)).isfinite().all()  # a row without labels


def test_undial_distils_from_the_reference_with_the_true_logit_lowered():
    # Reference 1/4, 1/4, 1/2, of which the last, true one is divided by 2: targets 1/3 each
    now = torch.tensor([[1.0, 2.0, 5.0]]).log()
    expected = -(math.log(1 / 8) + math.log(2 / 8) + math.log(5 / 8)) / 3
    found = undial_loss(now, LOGITS[:1], TARGETS[:1], beta=math.log(2))
    torch.testing.assert_close(found, torch.tensor([expected]))
    reference = LOGITS.clone().requires_grad_()
    now = LOGITS.clone().requires_grad_()
    undial_loss(now, reference, TARGETS).sum().backward()
    assert reference.grad is None and now.grad is not None
    # With a large beta nothing of the truth is left
    two = undial_loss(LOGITS[1:], LOGITS[1:], TARGETS[1:], beta=1e4)
    torch.testing.assert_close(two, torch.tensor([-(2 / 3 * math.log(1 / 3) + 1 / 3 * math.log(1 / 6))]))


def test_ce_u_s_target_is_the_model_s_own_prediction_without_the_true_token():
    logits = LOGITS.clone().requires_grad_()
    found = ce_u_loss(logits, TARGETS)
    # Row 0: targets 1/2, 1/2, 0 against 1/4, 1/4, 1/2; row 1: 0, 2/3, 1/3 against 1/2, 1/3, 1/6
    expected = torch.tensor([math.log(4), 2 / 3 * math.log(3) + 1 / 3 * math.log(6)])
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    # The target is no function of the logits: the gradient is prediction minus target, and bounded
    torch.testing.assert_close(
        logits.grad, torch.tensor([[-1 / 4, -1 / 4, 1 / 2], [1 / 2, 1 / 3 - 2 / 3, 1 / 6 - 1 / 3]])
    )


def _plain(kind: str, logits: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The definitions, whose gradients autograd finds."""
    places, logits = targets.unsqueeze(1), logits.float()
    if kind == "ce_u":
        adjusted = logits.detach().scatter(1, places, -torch.inf)
    else:
        adjusted = reference.float() - 10.0 * torch.zeros_like(logits).scatter(1, places, 1.0)
    return torch.nn.functional.cross_entropy(logits, adjusted.softmax(-1), reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["undial", "ce_u"])
def test_closed_forms_are_the_definitions(kind: str, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    given, reference = (6 * torch.randn(2, 7, 50, generator=generator)).to(dtype)
    targets = torch.randint(50, (7,), generator=generator)
    given[0] += 40  # an offset that says nothing
    given[1, targets[1]] += 80  # sure of the true token
    given[2, targets[2]] -= 80
    weights, found = torch.rand(7, generator=generator), []
    for plain in (False, True):
        logits = given.clone().requires_grad_()
        if plain:
            values = _plain(kind, logits, reference, targets)
        else:
            values = undial_loss(logits, reference, targets) if kind == "undial" else ce_u_loss(logits, targets)
        (weights * values).sum().backward()
        found.append((values.detach(), logits.grad))
    (values, gradient), (expected, wanted) = found
    assert gradient is not None and gradient.dtype == dtype
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, wanted)


def test_the_closed_form_in_double_precision_and_not_twice():
    generator = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    targets = torch.tensor([[1], [4], [0]])
    assert torch.autograd.gradcheck(lambda z: _Undial.apply(z, reference, targets, 2.0), (logits.requires_grad_(),))
    for values in (undial_loss(logits, reference, targets[:, 0]), ce_u_loss(logits, targets[:, 0])):
        with pytest.raises(RuntimeError, match="closed form and cannot be differentiated again"):
            torch.autograd.grad(values.sum(), logits, create_graph=True)


@pytest.mark.parametrize("kind", ["undial", "ce_u"])
def test_one_distribution_is_kept_for_the_backward(kind: str):
    kept: list[int] = []
    logits = torch.randn(4, 100, requires_grad=True)
    reference, targets = torch.randn(4, 100), torch.arange(4)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        undial_loss(logits, reference, targets) if kind == "undial" else ce_u_loss(logits, targets)
    assert sum(size == logits.numel() for size in kept) == 1


def test_rmu_s_direction_is_a_unit_vector_of_the_seed_alone():
    state = torch.get_rng_state()
    first, again, other = rmu_direction(64, 3), rmu_direction(64, 3), rmu_direction(64, 4)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.norm().item() == pytest.approx(1.0)
    assert (first >= 0).all()  # uniform in [0, 1) before it is scaled


def test_rmu_steers_masked_tokens_and_averages_each_row_first():
    direction = torch.tensor([1.0, 0.0])
    states = torch.zeros(2, 3, 2)
    states[0, 0] = torch.tensor([100.0, 100.0])  # not a label
    states[0, 1] = torch.tensor([3.0, 4.0])  # (3 - 3)^2, 4^2: mean 8
    states[0, 2] = torch.tensor([1.0, 0.0])  # 4, 0: mean 2
    states[1, 1] = torch.tensor([3.0, 2.0])  # 0, 4: mean 2
    mask = torch.tensor([[0, 1, 1], [0, 1, 0]]).bool()
    torch.testing.assert_close(rmu_loss(states, direction, mask, coefficient=3.0), torch.tensor([5.0, 2.0]))
    assert rmu_loss(states, direction, torch.zeros_like(mask)).tolist() == [0.0, 0.0]


def test_activations_are_compared_at_masked_tokens():
    now, before = torch.ones(1, 2, 4, requires_grad=True), torch.zeros(1, 2, 4)
    before[0, 1] = 3.0
    torch.testing.assert_close(activation_mse(now, before, torch.tensor([[1, 1]])), torch.tensor([2.5]))
    torch.testing.assert_close(activation_mse(now, before, torch.tensor([[0, 1]])), torch.tensor([4.0]))


def test_retain_kl_is_from_before_to_now():
    before, now = torch.tensor([[1.0, 1.0]]).log(), torch.tensor([[1.0, 3.0]]).log()
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    torch.testing.assert_close(retain_kl(now, before), torch.tensor([expected]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype):
    logits = LOGITS.to(dtype)
    for value in (
        grad_diff_loss(logits, TARGETS),
        undial_loss(logits, logits, TARGETS),
        ce_u_loss(logits, TARGETS),
        retain_kl(logits, logits),
        npo_loss(logits[0], logits[0]),
        rmu_loss(logits.view(1, 2, 3), rmu_direction(3, 0), torch.ones(1, 2)),
    ):
        assert value.dtype == torch.float32 and value.isfinite().all()
