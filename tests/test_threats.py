"""Norms, projection and initialisation: values by hand, and the properties that define them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_robust.threats import INITS, NORMS, check_at_least, check_choice, initial, project, project_simplex, unit


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lengths(delta: torch.Tensor, norm: str) -> torch.Tensor:
    """The norm as the documentation states it, written differently from the library's."""
    if norm == "l2_token":
        return (delta.double() ** 2).sum(-1).sqrt()
    rows = delta.double().reshape(delta.shape[0], -1)
    return (rows**2).sum(1).sqrt() if norm == "l2" else rows.abs().max(1).values


# projection


@pytest.mark.parametrize(
    "norm, expected",
    [
        # |(3, 4)| = 5 -> times 1/5; |(0, .5)| = .5 stays. Second sample: |(0, 2)| = 2 -> times 1/2; zero stays.
        ("l2_token", [[[0.6, 0.8], [0.0, 0.5]], [[0.0, 1.0], [0.0, 0.0]]]),
        # One ball per sample: |(3, 4, 0, .5)| = sqrt(25.25) = 5.02494; |(0, 2, 0, 0)| = 2
        ("l2", [[[3 / 25.25**0.5, 4 / 25.25**0.5], [0.0, 0.5 / 25.25**0.5]], [[0.0, 1.0], [0.0, 0.0]]]),
        # Each coordinate into [-1, 1]
        ("linf", [[[1.0, 1.0], [0.0, 0.5]], [[0.0, 1.0], [0.0, 0.0]]]),
    ],
)
def test_projection_by_hand(norm, expected):
    delta = torch.tensor([[[3.0, 4.0], [0.0, 0.5]], [[0.0, 2.0], [0.0, 0.0]]])
    torch.testing.assert_close(project(delta, 1.0, norm), torch.tensor(expected))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("radius", [0.0, 0.3, 2.5])
def test_projection_lands_in_the_ball_and_is_idempotent(norm, radius):
    once = project(noise(4, 5, 6), radius, norm)
    assert (lengths(once, norm) <= radius * (1 + 1e-6)).all()
    torch.testing.assert_close(project(once, radius, norm), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_no_point_of_the_ball_is_nearer(norm):
    delta, radius = noise(3, 4, 5) * 3, 1.5
    nearest = project(delta, radius, norm)
    unit_of = (lambda t: t.norm(dim=-1)) if norm == "l2_token" else (lambda t: t.flatten(1).norm(dim=1))
    if norm == "linf":
        unit_of = torch.abs  # the box is a product of intervals: nearest in each coordinate
    for seed in range(200):
        # Half of the competitors lie close to the candidate, where a wrong projection would lose
        other = project(nearest + noise(3, 4, 5, seed=seed) * (0.05 if seed % 2 else 2.0), radius, norm)
        assert (unit_of(delta - nearest) <= unit_of(delta - other) + 1e-5).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inside_is_left_bit_for_bit(norm, dtype):
    delta = noise(4, 5, 6).to(dtype) * 0.01
    projected = project(delta, 10.0, norm)
    assert projected.dtype == dtype
    assert torch.equal(projected, delta)
    assert torch.equal(project(delta, math.inf, norm), delta)


def test_one_token_outside_leaves_its_neighbours_alone():
    delta = noise(2, 3, 4) * 0.01
    delta[0, 1] = 7.0
    projected = project(delta, 1.0, "l2_token")
    torch.testing.assert_close(projected[0, 1], torch.full((4,), 0.5))  # |(7, 7, 7, 7)| = 14
    projected[0, 1] = delta[0, 1]
    assert torch.equal(projected, delta)


@pytest.mark.parametrize("norm", NORMS)
def test_radius_may_be_a_tensor_per_sample(norm):
    delta, radius = noise(3, 4, 5) * 5, torch.tensor([0.1, 1.0, math.inf]).view(3, 1, 1)
    projected = project(delta, radius, norm)
    for row in range(3):
        torch.testing.assert_close(projected[row : row + 1], project(delta[row : row + 1], radius[row].item(), norm))


@pytest.mark.parametrize("norm", NORMS)
def test_projection_of_zero_is_zero(norm):
    zero = torch.zeros(2, 3, 4)
    assert torch.equal(project(zero, 0.0, norm), zero)
    assert torch.equal(project(zero, 1.0, norm), zero)


# unit


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_unit_has_length_one_and_keeps_the_direction(norm, scale):
    direction = noise(3, 4, 5)
    result = unit(direction * scale, norm)
    torch.testing.assert_close(lengths(result, norm), torch.ones_like(lengths(result, norm)), rtol=1e-6, atol=0)
    ratio = result / direction
    assert (ratio > 0).all()
    per_ball = ratio if norm == "l2_token" else ratio.flatten(1)
    torch.testing.assert_close(per_ball, per_ball[..., :1].expand_as(per_ball))


@pytest.mark.parametrize("norm", NORMS)
def test_unit_of_zero_is_zero(norm):
    assert torch.equal(unit(torch.zeros(2, 3, 4), norm), torch.zeros(2, 3, 4))


# initialisation


def test_initial_zero_needs_no_generator():
    delta = initial((2, 3, 4), 0.5, "l2_token", "zero", device="cpu")
    assert delta.dtype == torch.float32 and torch.equal(delta, torch.zeros(2, 3, 4))


@pytest.mark.parametrize(
    "norm, shape, size",
    [("l2_token", (100, 100, 3), 3), ("l2", (10000, 2, 2), 4), ("linf", (400, 20, 5), 1)],
)
def test_initial_random_is_uniform_in_the_ball(norm, shape, size):
    radius = 0.7
    delta = initial(shape, radius, norm, "random", device="cpu", generator=torch.Generator().manual_seed(0))
    assert delta.dtype == torch.float32 and delta.shape == shape
    assert (lengths(delta, norm) <= radius * (1 + 1e-6)).all()
    # Uniform in an n-ball: the share of its volume within the point's length is uniform in [0, 1]
    length = delta.abs().flatten() if norm == "linf" else lengths(delta, norm).flatten()
    shares = (length / radius).double() ** size
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert torch.quantile(shares, quantile).item() == pytest.approx(quantile, abs=0.02)
    # ... and no direction is preferred
    coordinates = delta.reshape(-1, shape[-1])
    assert coordinates.mean(0).abs().max() < 0.02 * radius
    variances = coordinates.var(0)
    assert (variances / variances.mean() - 1).abs().max() < 0.1


@pytest.mark.parametrize("norm", NORMS)
def test_initial_random_uses_its_own_generator_only(norm):
    before = torch.get_rng_state()
    first, again, other = (
        initial((2, 3, 4), 1.0, norm, "random", device="cpu", generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("norm", NORMS)
def test_initial_random_without_a_generator_is_refused(norm):
    with pytest.raises(ValueError, match="init='random'.*generator"):
        initial((2, 3, 4), 1.0, norm, "random", device="cpu")


# checks


@pytest.mark.parametrize(
    "argument, value, choices, near",
    [
        ("norm", "l2_tokens", NORMS, "l2_token"),
        ("norm", "Linf", NORMS, "linf"),
        ("init", "randm", INITS, "random"),
    ],
)
def test_check_choice_names_the_nearest(argument, value, choices, near):
    with pytest.raises(ValueError) as caught:
        check_choice(argument, value, choices)
    message = str(caught.value)
    assert f"`{argument}={value!r}`" in message
    assert f"Did you mean {near!r}?" in message
    assert all(repr(choice) in message for choice in choices)


@pytest.mark.parametrize("value", ["xyzzy", None, 3])
def test_check_choice_without_a_near_name(value):
    with pytest.raises(ValueError, match="`norm=") as caught:
        check_choice("norm", value, NORMS)
    assert "Did you mean" not in str(caught.value)


def test_check_choice_accepts_each():
    for norm in NORMS:
        check_choice("norm", norm, NORMS)


@pytest.mark.parametrize("value", [-1, -1e-9, math.nan, math.inf, True, None, "3"])
def test_check_at_least_refuses(value):
    with pytest.raises(ValueError) as caught:
        check_at_least("steps", value, 0, "Use 0 to switch the attack off.")
    message = str(caught.value)
    assert f"`steps={value!r}`" in message and "at least 0" in message and "switch the attack off" in message


@pytest.mark.parametrize("value", [0, 0.0, 1, 2.5])
def test_check_at_least_accepts(value):
    check_at_least("steps", value, 0, "")


# the probability simplex


@pytest.mark.parametrize(
    "values, expected",
    [
        # Inside: unchanged. All lowered by (0.9 + 0.5 - 1) / 2 = 0.2, the third would be negative and is dropped.
        ([0.2, 0.3, 0.5], [0.2, 0.3, 0.5]),
        ([0.9, 0.5, 0.1], [0.7, 0.3, 0.0]),
        # One corner; a tie; a sum below 1 is shared out
        ([5.0, 1.0, -3.0], [1.0, 0.0, 0.0]),
        ([2.0, 2.0, 0.0], [0.5, 0.5, 0.0]),
        ([0.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]),
        ([-4.0, -4.0, -4.4], [7.0 / 15, 7.0 / 15, 1.0 / 15]),  # all kept: threshold (-12.4 - 1) / 3
    ],
)
def test_simplex_projection_by_hand(values, expected):
    torch.testing.assert_close(project_simplex(torch.tensor(values)), torch.tensor(expected))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=12), st.integers(0, 1000))
def test_the_simplex_projection_is_the_nearest_point(values, seed):
    point = torch.tensor(values, dtype=torch.float64)
    nearest = project_simplex(point)
    assert (nearest >= 0).all() and nearest.sum().item() == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(project_simplex(nearest), nearest)
    # For a convex set: no other point of it lies on the far side, <point - nearest, other - nearest> <= 0
    others = torch.rand(50, len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4
    others = torch.cat([others / others.sum(-1, keepdim=True), torch.eye(len(values), dtype=torch.float64)])
    assert ((others - nearest) @ (point - nearest)).max() <= 1e-9
    # Adding a constant changes nothing
    torch.testing.assert_close(project_simplex(point + 3.5), nearest, atol=1e-9, rtol=0)


def test_the_simplex_projection_takes_each_vector_by_itself():
    values = noise(3, 4, 50)
    projected = project_simplex(values)
    assert projected.shape == values.shape and projected.dtype == values.dtype
    torch.testing.assert_close(projected[1, 2], project_simplex(values[1, 2]))
    torch.testing.assert_close(projected.sum(-1), torch.ones(3, 4))
