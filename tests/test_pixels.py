"""Pixels: units of an image processor, checks, projections onto ball and box, sparse steps."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_robust.report.vision_attacks import describe_processor
from hf_robust.sites import PixelUnits
from hf_robust.threats import PIXEL_NORMS, initial, project, project_box, sparse_sign, unit
from tests.pixel_data import processor, tiny_images

# units


def test_units_by_hand():
    units = PixelUnits(processor())
    # 8/255 in raw pixels is 8/255 / 0.25 where a std of 0.25 divides
    torch.testing.assert_close(units.radius(8 / 255).flatten(), torch.tensor([0.1254902, 0.0627451, 0.1568627]))
    torch.testing.assert_close(units.low.flatten(), torch.tensor([-1.2, -1.0, -2.0]))
    torch.testing.assert_close(units.high.flatten(), torch.tensor([2.8, 1.0, 3.0]))
    assert units.low.shape == units.high.shape == units.radius(0.1).shape == (3, 1, 1)


def test_units_are_those_of_a_processor_of_transformers():
    from transformers.models.clip import CLIPImageProcessorPil

    made = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    pixels = torch.randint(0, 256, (3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    values = made(pixels.numpy(), return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    torch.testing.assert_close(PixelUnits(made).to_raw(values)[0], pixels / 255, rtol=0, atol=1e-6)


@pytest.mark.parametrize("given_processor", [None, processor(do_unused=1)])
def test_there_and_back(given_processor):
    images, _ = tiny_images()
    units = PixelUnits(given_processor)
    torch.testing.assert_close(units.to_raw(units.from_raw(images)), images, rtol=0, atol=1e-6)
    if given_processor is None:
        assert units.to_raw(images) is images and units.is_raw


def test_a_processor_that_holds_one_and_other_scales():
    class Holder:
        image_processor = processor()

    assert torch.equal(PixelUnits(Holder()).low, PixelUnits(processor()).low)
    made = processor([0.0] * 3, [1.0] * 3)
    made.rescale_factor = 1 / 127.5  # raw 1 becomes 2
    assert PixelUnits(made).high.flatten().tolist() == pytest.approx([2.0] * 3)
    made.rescale_offset = True  # ... and is moved to [-1, 1]
    assert PixelUnits(made).low.flatten().tolist() == pytest.approx([-1.0] * 3)
    made.do_normalize = made.do_rescale = False
    assert PixelUnits(made).is_raw


def test_a_timm_processor_tells_mean_and_std_in_its_data_config():
    timm = SimpleNamespace(data_config={"input_size": (3, 8, 8), "mean": (0.3, 0.5, 0.4), "std": (0.25, 0.5, 0.2)})
    found, wanted = PixelUnits(timm), PixelUnits(processor())
    assert torch.equal(found.low, wanted.low) and torch.equal(found.high, wanted.high) and not found.is_raw
    assert torch.equal(found.radius(8 / 255), wanted.radius(8 / 255))
    settings = describe_processor(timm)
    assert settings["image_mean"] == [0.3, 0.5, 0.4] and settings["image_std"] == [0.25, 0.5, 0.2]
    assert PixelUnits(SimpleNamespace(data_config={"mean": [0.0], "std": [1.0]}), channels=1).is_raw


def test_a_processor_that_does_not_tell_its_scale_is_refused():
    for made in (
        SimpleNamespace(),
        SimpleNamespace(data_config={}),
        SimpleNamespace(do_normalize=None, do_rescale=None),
    ):
        with pytest.raises(ValueError, match=r"SimpleNamespace.*neither `do_normalize`, `do_rescale` nor"):
            PixelUnits(made)
    assert PixelUnits(SimpleNamespace(do_normalize=False)).is_raw


@pytest.mark.parametrize(
    "made, channels, message",
    [
        (processor(), 1, "image_mean.* each of the 1 channels"),
        (processor(std=[1.0, 2.0]), 3, "image_std.* each of the 3 channels"),
        (processor(std=[1.0, 0.0, 1.0]), 3, "must be positive"),
        (SimpleNamespace(data_config={"mean": [0.5], "std": [0.5]}), 3, "data_config.*mean.* each of the 3 channels"),
    ],
)
def test_processor_that_does_not_match(made, channels, message):
    with pytest.raises(ValueError, match=message):
        PixelUnits(made, channels=channels)


def broken(value):
    images, _ = tiny_images()
    images[1, 2, 3, 3] = value
    return images


@pytest.mark.parametrize(
    "made, images, epsilon, message",
    [
        (None, broken(math.nan), 0.1, "NaN or infinite"),
        (None, broken(math.inf), 0.1, "NaN or infinite"),
        (None, broken(-0.5), 0.1, r"\[-0.5, 1\].*image_processor"),
        (None, tiny_images()[0] * 255, 0.1, "Divide bytes by 255"),
        (None, (tiny_images()[0] * 255).byte(), 0.1, "torch.uint8.*float tensor"),
        (None, [[0.5]], 0.1, "list.*float tensor"),
        (None, tiny_images()[0][0], 0.1, r"has shape \(3, 6, 6\)"),
        (None, tiny_images(channels=1)[0], 0.1, r"has shape .*expected \[batch, 3"),
        (processor(), tiny_images()[0] * 9 - 4, 0.1, "Pass the `image_processor` that made them"),
        (None, tiny_images()[0], 8, r"epsilon=8.*write 8/255"),
        (None, tiny_images()[0], -0.1, "epsilon=-0.1.*at least 0"),
        (None, tiny_images()[0], math.nan, "epsilon=nan"),
    ],
)
def test_check(made, images, epsilon, message):
    with pytest.raises(ValueError, match=message):
        PixelUnits(made).check(images, epsilon)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_passes_the_check(dtype):
    units = PixelUnits(processor())
    images = torch.tensor([0.0, 1.0, 0.3]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    units.check(units.from_raw(images).to(dtype), 8 / 255)
    units.check(units.from_raw(images).to(dtype), 12.0, "l1")  # other norms' radii may exceed 1


# projections


def lengths(delta, norm):
    rows = delta.double().flatten(1).abs()
    return {"linf": rows.amax(1), "l2": (rows**2).sum(1).sqrt(), "l1": rows.sum(1)}[norm]


def box(shape, generator):
    raw = torch.rand(shape, generator=generator)
    raw = torch.where(torch.rand(shape, generator=generator) < 0.2, raw.round(), raw)
    return -raw, 1 - raw


@pytest.mark.parametrize(
    "delta, radius, expected",
    [
        ([3.0, -1.0, 0.0], 2.0, [2.0, 0.0, 0.0]),  # t = 1
        ([3.0, -2.0, 1.0], 3.0, [2.0, -1.0, 0.0]),  # t = 1
        ([0.5, -0.5, 0.0], 1.0, [0.5, -0.5, 0.0]),  # inside
        ([1.0, 1.0, 1.0], 0.0, [0.0, 0.0, 0.0]),
    ],
)
def test_l1_projection_by_hand(delta, radius, expected):
    torch.testing.assert_close(project(torch.tensor([delta]), radius, "l1"), torch.tensor([expected]))


def test_l1_projection_with_a_box_by_hand():
    # 3 may only become 1; then |2 - t| + |1 - t| = 1 makes t = 1
    delta, high = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[1.0, 9.0, 9.0]])
    torch.testing.assert_close(project_box(delta, 2.0, "l1", -high, high), torch.tensor([[1.0, 1.0, 0.0]]))


def test_l1_radius_of_each_row():
    delta = torch.ones(2, 1, 2, 2)
    found = project(delta, torch.tensor([1.0, 2.0]).view(2, 1, 1, 1), "l1")
    torch.testing.assert_close(lengths(found, "l1"), torch.tensor([1.0, 2.0]).double())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    radius=st.sampled_from([0.0, 1e-3, 8 / 255, 0.5, 1.0, 5.0]),
    scale=st.sampled_from([1e-3, 0.1, 1.0, 100.0]),
    norm=st.sampled_from(PIXEL_NORMS),
)
def test_projections_land_in_ball_and_box(seed, radius, scale, norm):
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(3, 2, 4, 4, generator=generator) * scale
    low, high = box(delta.shape, generator)
    found = project_box(delta, radius, norm, low, high)
    assert (lengths(found, norm) <= radius * (1 + 1e-5) + 1e-7).all()
    assert (found >= low).all() and (found <= high).all()
    assert (found * delta >= 0).all()  # never to the other side of 0
    torch.testing.assert_close(project_box(found, radius, norm, low, high), found, rtol=1e-5, atol=1e-6)
    inside = (lengths(delta, norm) <= radius) & ((delta >= low) & (delta <= high)).flatten(1).all(1)
    assert torch.equal(found[inside], delta[inside])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), radius=st.sampled_from([0.3, 1.0, 3.0]), norm=st.sampled_from(["linf", "l1"]))
def test_no_point_of_ball_and_box_is_nearer(seed, radius, norm):
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(1, 1, 3, 3, generator=generator)
    low, high = box(delta.shape, generator)
    found = project_box(delta, radius, norm, low, high)
    # The nearest point of a convex set: every other lies at an obtuse angle from it
    others = torch.randn(500, 1, 3, 3, generator=generator)
    others = project_box(torch.cat([others, found + 0.1 * others]), radius, norm, low, high)
    assert (((delta - found) * (others - found)).flatten(1).sum(1) <= 1e-4).all()


def test_sparse_sign_by_hand():
    direction = torch.tensor([[0.1, -3.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.0, -0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(sparse_sign(direction, 0.5), expected)
    assert torch.equal(sparse_sign(direction, 0.0)[0], torch.tensor([0.0, -1.0, 0.0, 0.0]))  # one at least
    assert torch.equal(sparse_sign(direction[:1].repeat(2, 1), torch.tensor([0.25, 0.5]))[1], expected[0])


def test_random_start_in_the_l1_ball_is_uniform():
    generator = torch.Generator().manual_seed(0)
    found = initial((4000, 1, 1, 3), 2.0, "l1", "random", device="cpu", generator=generator)
    length = lengths(found, "l1")
    # Of a 3-ball, half of the volume lies within (1/2)^(1/3) of the radius, and both signs are as likely
    assert length.max() <= 2.0 + 1e-6 and length.median() == pytest.approx(2 * 0.5 ** (1 / 3), rel=0.02)
    assert found.mean().abs() < 0.02
    assert lengths(unit(found, "l1"), "l1").sub(1).abs().max() < 1e-5
