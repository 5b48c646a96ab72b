"""The search on functions whose minimum is known, without a model."""

import math

import pytest
import torch

from hf_robust.attacks.gradient import KEEPS, STEP_RULES, StepRule, gradient_search
from hf_robust.threats import NORMS, project_simplex


def bowl(target: torch.Tensor):
    """Squared distance of each row to a target: gradient 2 (delta - target)."""

    def loss_fn(delta: torch.Tensor):
        return (delta - target).square().flatten(1).sum(1), None

    return loss_fn


def search(loss_fn, delta, **settings):
    defaults = dict(
        mask=torch.ones(()), radius=math.inf, norm="l2_token", steps=3, step_size=0.1, step_rule="sign", keep="last"
    )
    return gradient_search(loss_fn, delta, **{**defaults, **settings})


TARGET = torch.tensor([[[1.0, -2.0]], [[0.25, 0.5]]])  # [2 rows, 1 token, 2 features]
ZERO = torch.zeros(2, 1, 2)


def test_sign_steps_by_hand():
    result = search(bowl(TARGET), ZERO, steps=3)
    # Three steps of 0.1 toward the target in each coordinate; row 1 reaches 0.25 in its first after 0.1, 0.2, 0.3
    torch.testing.assert_close(result.delta, torch.tensor([[[0.3, -0.3]], [[0.3, 0.3]]]))
    # Losses at 0, 0.1, 0.2 (not at the last point): (1 - t)^2 + (2 - t)^2 and (0.25 - t)^2 + (0.5 - t)^2
    expected = [[5.0, 0.3125], [0.81 + 3.61, 0.0225 + 0.16], [0.64 + 3.24, 0.0025 + 0.09]]
    torch.testing.assert_close(result.losses, torch.tensor(expected))
    torch.testing.assert_close(result.first_loss, torch.tensor(expected[0]))
    torch.testing.assert_close(result.last_loss, torch.tensor(expected[-1]))
    assert (result.num_forwards, result.num_backwards) == (3, 3)
    assert not result.non_finite.any() and not result.hit.any()
    assert not result.delta.requires_grad and result.delta.dtype == torch.float32


def test_best_is_per_row_and_costs_one_forward_more():
    # Steps of 0.4: row 0 improves all along; row 1 is best at (0.4, 0.4): 0.0225 + 0.01 = 0.0325
    result = search(bowl(TARGET), ZERO, steps=2, step_size=0.4, keep="best")
    torch.testing.assert_close(result.delta, torch.tensor([[[0.8, -0.8]], [[0.4, 0.4]]]))
    torch.testing.assert_close(result.last_loss, torch.tensor([0.04 + 1.44, 0.0325]))
    assert (result.num_forwards, result.num_backwards) == (3, 2)
    assert torch.equal(result.last_loss, result.losses.min(0).values)


@pytest.mark.parametrize("keep", KEEPS)
def test_no_steps_evaluate_nothing(keep):
    def loss_fn(delta):
        raise AssertionError("evaluated")

    result = search(loss_fn, ZERO + 0.5, steps=0, keep=keep)
    assert torch.equal(result.delta, ZERO + 0.5)
    assert (result.num_forwards, result.num_backwards) == (0, 0)
    assert result.losses.shape == (0, 2) and result.first_loss.isnan().all() and result.last_loss.isnan().all()


def test_the_mask_holds_for_steps_of_every_rule():
    target, mask = torch.ones(2, 3, 2), torch.tensor([1.0, 0.0, 1.0]).view(1, 3, 1)
    for rule in STEP_RULES:
        for norm in NORMS:
            result = search(bowl(target), torch.zeros(2, 3, 2), mask=mask, step_rule=rule, norm=norm, unit_length=True)
            assert (result.delta[:, 1] == 0).all() and (result.delta[:, [0, 2]] > 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_radius_holds_at_every_evaluation(norm):
    seen = []

    def loss_fn(delta):
        seen.append(delta.detach())
        return bowl(TARGET)(delta)

    search(loss_fn, ZERO, radius=0.25, norm=norm, steps=5, keep="best")
    lengths = torch.stack([d.abs().amax() if norm == "linf" else d.norm(dim=-1).amax() for d in seen])
    assert lengths.max() <= 0.25 * (1 + 1e-6) and lengths[-1] >= 0.25 * (1 - 1e-6)


@pytest.mark.parametrize("rule, optimizer", [("adam", torch.optim.Adam), ("rmsprop", torch.optim.RMSprop)])
def test_adaptive_rules_are_those_of_pytorch(rule, optimizer):
    weights = torch.tensor([3.0, 0.1]).view(1, 1, 2)

    def loss_fn(delta):
        return (weights * (delta - TARGET).square()).flatten(1).sum(1), None

    result = search(loss_fn, ZERO, steps=6, step_rule=rule)
    expected = ZERO.clone().requires_grad_()
    optimize = optimizer([expected], lr=0.1)
    for _ in range(6):
        optimize.zero_grad()
        loss_fn(expected)[0].sum().backward()
        optimize.step()
    torch.testing.assert_close(result.delta, expected.detach(), rtol=1e-5, atol=1e-6)


def test_momentum_by_hand():
    # Gradients of one row, divided by their mean absolute value and summed: (4, 1) / 2.5 = (1.6, 0.4);
    # (-1, 1) / 1 added: (0.6, 1.4), whose signs are (1, 1) where the second gradient's own are (-1, 1)
    rule = StepRule("momentum", "l2_token", unit_length=False)
    assert torch.equal(rule(torch.tensor([[[4.0, 1.0]]])), torch.tensor([[[1.0, 1.0]]]))
    assert torch.equal(rule(torch.tensor([[[-1.0, 1.0]]])), torch.tensor([[[1.0, 1.0]]]))
    torch.testing.assert_close(rule.mean, torch.tensor([[[0.6, 1.4]]]))


def test_normalized_by_hand():
    rule = StepRule("normalized", "l2_token", unit_length=False)
    torch.testing.assert_close(
        rule(torch.tensor([[[3.0, -4.0], [0.0, 0.0]]])), torch.tensor([[[0.6, -0.8], [0.0, 0.0]]])
    )


@pytest.mark.parametrize("rule", STEP_RULES)
@pytest.mark.parametrize("norm", NORMS)
def test_unit_length_steps(rule, norm):
    grad = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    direction = StepRule(rule, norm, unit_length=True)(grad)
    if norm == "l2_token":
        lengths = direction.norm(dim=-1)
    else:
        lengths = direction.flatten(1).norm(dim=1) if norm == "l2" else direction.flatten(1).abs().amax(1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("rule", STEP_RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_keeps_the_last_finite_point_of_its_row(keep, rule, bad):
    def loss_fn(delta):
        loss = bowl(TARGET)(delta)[0]
        outside = delta.detach().flatten(1).abs().amax(1) > 0.25
        # Row 0 only: also its gradient is spoilt
        return loss * torch.where(outside & torch.tensor([True, False]), bad, 1.0), None

    settings = dict(steps=6, step_rule=rule, norm="linf", unit_length=True, keep=keep)
    result = search(loss_fn, ZERO, **settings)
    clean = search(bowl(TARGET), ZERO, **settings)
    assert result.non_finite.tolist() == [True, False]
    assert result.delta.isfinite().all() and result.delta[0].abs().max() <= 0.25
    assert result.delta[0].abs().max() == pytest.approx(0.2), "two steps of 0.1 stay inside, and they were taken"
    assert torch.equal(result.delta[1], clean.delta[1]), "rows do not mix"
    if keep == "best":
        assert result.last_loss.isfinite().all()


@pytest.mark.parametrize("keep", KEEPS)
def test_non_finite_from_the_start_stays_at_the_start(keep):
    def loss_fn(delta):
        return delta.flatten(1).sum(1) * torch.tensor([math.nan, 1.0]), None

    result = search(loss_fn, ZERO + 0.5, keep=keep)
    assert result.non_finite.tolist() == [True, False]
    assert torch.equal(result.delta[0], ZERO[0] + 0.5)
    torch.testing.assert_close(result.delta[1], ZERO[1] + 0.2)


@pytest.mark.parametrize("keep", KEEPS)
def test_a_non_finite_gradient_of_a_finite_loss(keep):
    def loss_fn(delta):
        # d sqrt(x) / dx is infinite at 0: row 0 starts there, row 1 does not
        return delta.clamp(min=0).sqrt().flatten(1).sum(1), None

    start = torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]]])
    result = search(loss_fn, start, keep=keep)
    assert result.non_finite.tolist() == [True, False]
    torch.testing.assert_close(result.delta, torch.tensor([[[0.0, 0.0]], [[0.7, 0.7]]]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_entry_of_a_gradient_stops_its_row_and_large_ones_do_not(bad):
    slopes = torch.full((3, 2, 256), 1e36)  # whose sum over a row is more than a float32 holds
    slopes[0, 1, 200] = bad
    slopes[2, 0] = -1e36

    class Sloped(torch.autograd.Function):
        """A loss of 0 with these slopes: a loss of which the gradient alone is bad."""

        @staticmethod
        def forward(ctx, delta):
            return delta.new_zeros(len(delta))

        @staticmethod
        def backward(ctx, grad):
            return grad.view(-1, 1, 1) * slopes

    result = search(lambda delta: (Sloped.apply(delta), None), torch.zeros(3, 2, 256), steps=1)
    assert result.non_finite.tolist() == [True, False, False]
    expected = -0.1 * slopes.sign()
    expected[0] = 0.0
    assert torch.equal(result.delta, expected)


@pytest.mark.parametrize("keep", KEEPS)
def test_a_row_that_hits_stops_there(keep):
    def loss_fn(delta):
        loss = bowl(TARGET)(delta)[0]
        return loss, loss.detach() < 0.1  # row 1 from (0.2, 0.2) on: 0.0025 + 0.09

    result = search(loss_fn, ZERO, steps=5, keep=keep, stop_on_hit=True)
    assert result.hit.tolist() == [False, True]
    torch.testing.assert_close(result.delta, torch.tensor([[[0.5, -0.5]], [[0.2, 0.2]]]))
    assert result.num_backwards == 5, "the other row goes on"


@pytest.mark.parametrize("keep, forwards", [("last", 3), ("best", 4)])
def test_the_search_ends_when_all_rows_have_hit(keep, forwards):
    def loss_fn(delta):
        loss = bowl(TARGET)(delta)[0]
        return loss, loss.detach() < torch.tensor([4.5, 0.1])  # after one and two steps

    result = search(loss_fn, ZERO, steps=50, keep=keep, stop_on_hit=True)
    assert result.hit.all() and (result.num_forwards, result.num_backwards) == (forwards, 3)
    torch.testing.assert_close(result.delta, torch.tensor([[[0.1, -0.1]], [[0.2, 0.2]]]))


def test_gradients_are_enabled_inside_no_grad():
    with torch.no_grad():
        result = search(bowl(TARGET), ZERO)
    torch.testing.assert_close(result.delta, search(bowl(TARGET), ZERO).delta)


def test_small_float16_gradients_do_not_vanish():
    # 1e-7 rounds to two units of float16's smallest step; a gradient of 2e-8 would be 0 without scaling the loss
    weight = torch.tensor(2e-8)

    def loss_fn(delta):
        half = delta.half()  # the backward of this cast rounds the gradient to float16
        return (half.float() * weight).flatten(1).sum(1), None

    result = search(loss_fn, ZERO, steps=1)
    torch.testing.assert_close(result.delta, ZERO - 0.1)


def test_a_projection_of_the_callers_own_replaces_the_ball():
    seen = []

    def loss_fn(delta):
        seen.append(delta.detach())
        return bowl(torch.tensor([[[2.0, 0.0]], [[0.6, 0.4]]]))(delta)

    # Row 0 heads for the corner (1, 0), row 1 for a point of the simplex; the radius of 0 bounds nothing
    result = search(loss_fn, ZERO + 0.5, projection=project_simplex, radius=0.0, step_size=0.02, steps=60)
    for delta in (*seen, result.delta):
        assert (delta >= 0).all()
        torch.testing.assert_close(delta.sum(-1), torch.ones(2, 1))
    torch.testing.assert_close(result.delta, torch.tensor([[[1.0, 0.0]], [[0.6, 0.4]]]), atol=0.021, rtol=0)


@pytest.mark.parametrize("rule, optimizer", [("adam", torch.optim.Adam), ("rmsprop", torch.optim.RMSprop)])
def test_weight_decay_and_moments_that_go_on_are_those_of_pytorch(rule, optimizer):
    weights = torch.tensor([3.0, 0.1]).view(1, 1, 2)

    def loss_fn(delta):
        return (weights[: len(delta)] * (delta - TARGET[-len(delta) :]).square()).flatten(1).sum(1), None

    ours = StepRule(rule, "l2_token", unit_length=False, weight_decay=0.3)
    first = search(loss_fn, ZERO + 0.5, steps=4, step_rule=ours)
    expected = (ZERO + 0.5).requires_grad_()
    optimize = optimizer([expected], lr=0.1, weight_decay=0.3)
    for step in range(7):
        if step == 4:
            torch.testing.assert_close(first.delta, expected.detach(), rtol=1e-5, atol=1e-6)
        optimize.zero_grad()
        loss_fn(expected)[0].sum().backward()
        optimize.step()
    # The second search goes on with row 1 alone
    ours.select(torch.tensor([False, True]))
    second = search(loss_fn, first.delta[1:], steps=3, step_rule=ours)
    torch.testing.assert_close(second.delta, expected.detach()[1:], rtol=1e-5, atol=1e-6)
