"""Auto-PGD: against what is exactly known of a linear model, and against pyautoattack."""

import warnings

import pytest
import torch
from torch import nn

from hf_robust.attacks import APGD
from hf_robust.attacks.vision.apgd import checkpoints
from hf_robust.sites import PixelUnits
from tests.pixel_data import Linear, digits, exact_margins, fitted, processor, tiny_cnn, tiny_images

EPSILON = 0.08


@pytest.fixture(scope="module")
def linear():
    """Model, 400 held-out digits, their labels and exact margins under attack."""
    images, labels = digits()
    model = fitted(images[400:], labels[400:])
    images, labels = images[:400], labels[:400]
    return model, images, labels, exact_margins(model, images, labels, EPSILON)


def reference(model, images, labels, loss, *, epsilon=EPSILON, norm="Linf", steps=100, restarts=1, seed=0):
    """Rows that withstand pyautoattack's APGD of the same loss."""
    base = pytest.importorskip("pyautoattack.autopgd_base")
    targeted = loss == "targeted_dlr"
    made = (base.APGDAttack_targeted if targeted else base.APGDAttack)(
        model, n_iter=steps, norm=norm, n_restarts=restarts, eps=epsilon, seed=seed, device="cpu"
    )
    made.loss = "dlr-targeted" if targeted else loss
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        robust = model(images).argmax(1) == labels
        rows = robust.nonzero().flatten()
        found = made.perturb(images[rows], labels[rows])
        found = found[1] if isinstance(found, tuple) else found
        robust[rows] = model(found).argmax(1) == labels[rows]
    return robust


def test_checkpoints_are_the_papers():
    # 0.22, then gaps 0.19, 0.16, 0.13, 0.10, 0.07, 0.06, 0.06
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(20) == [5, 9, 12, 14, 16, 18, 19, 20]
    assert checkpoints(1) == [1]


# As many restarts as AutoAttack's: a single search of the untargeted losses depends on its start, here by up to 1.5 points
RESTARTS = {"ce": 5, "dlr": 5, "targeted_dlr": 1}


@pytest.mark.parametrize("loss", RESTARTS)
def test_linear_model(linear, loss):
    model, images, labels, margins = linear
    exact = margins > 0
    assert 0.2 < exact.float().mean() < 0.8
    attack = APGD(epsilon=EPSILON, loss=loss, restarts=RESTARTS[loss])
    found = attack.search(model, pixel_values=images, labels=labels)
    robust = ~found.hit
    # What withstands every attack withstands this one; rounding of float32 logits aside
    assert robust[margins > 1e-4].all()
    assert torch.equal(model(images + found.delta).argmax(1) == labels, robust)

    theirs = reference(model, images, labels, loss, restarts=RESTARTS[loss])
    assert (robust.float().mean() - theirs.float().mean()).abs() <= 0.005
    assert (robust == theirs).float().mean() >= 0.99
    # What is left: rows within rounding of the boundary, as far as ours is the one that misses them. On DLR theirs misses a
    # row that ours breaks, at an exact margin of -0.61: there is nothing to be said against that
    assert (margins[robust & ~theirs].abs() < 1e-3).all()
    if loss == "targeted_dlr":
        assert robust.float().mean() - exact.float().mean() <= 0.002
        assert (margins[robust != theirs].abs() < 1e-3).all()


def test_single_searches_are_as_strong_on_average(linear):
    model, images, labels, _ = linear
    ours, theirs = [], []
    for seed in range(4):
        attack = APGD(epsilon=EPSILON, loss="ce", steps=50, seed=seed)
        ours.append((~attack.search(model, pixel_values=images, labels=labels).hit).float().mean())
        theirs.append(reference(model, images, labels, "ce", steps=50, seed=seed).float().mean())
    assert sum(ours) / 4 - sum(theirs) / 4 <= 0.005


@pytest.mark.parametrize("norm, theirs, epsilon", [("linf", "Linf", 0.05), ("l2", "L2", 0.4), ("l1", "L1", 2.0)])
def test_a_net_in_every_norm(norm, theirs, epsilon):
    model, (images, _) = tiny_cnn(), tiny_images(batch=100)
    labels = model(images).argmax(1)
    found = APGD(epsilon=epsilon, norm=norm, steps=40, loss="dlr").search(model, pixel_values=images, labels=labels)
    other = reference(model, images, labels, "dlr", epsilon=epsilon, norm=theirs, steps=40)
    assert 0.1 < other.float().mean() < 0.9
    assert (~found.hit).float().mean() <= other.float().mean() + 0.02
    size = {"linf": lambda d: d.abs().amax(1), "l2": lambda d: d.norm(dim=1), "l1": lambda d: d.abs().sum(1)}[norm]
    assert (size(found.delta.flatten(1)) <= epsilon * (1 + 1e-5)).all()
    assert (images + found.delta).min() >= 0 and (images + found.delta).max() <= 1


def test_normalised_digits_are_attacked_in_raw_pixels(linear):
    model, images, labels, _ = linear
    made = processor([0.3], [0.25])
    units = PixelUnits(made, channels=1)

    class Normalised(nn.Module):
        def forward(self, pixel_values):
            return model(units.to_raw(pixel_values))

    settings = dict(epsilon=EPSILON, loss="ce", steps=20)
    raw = APGD(**settings).search(model, pixel_values=images, labels=labels)
    pixels = units.from_raw(images)
    found = APGD(**settings, image_processor=made).search(Normalised(), pixel_values=pixels, labels=labels)
    assert (raw.hit == found.hit).float().mean() >= 0.98
    assert found.delta.abs().max() <= EPSILON / 0.25 * (1 + 1e-5)
    inside = units.to_raw(pixels + found.delta)
    assert inside.min() >= -1e-6 and inside.max() <= 1 + 1e-6


def test_more_steps_and_targets_never_hurt_much(linear):
    model, images, labels, _ = linear
    few, many = (
        APGD(epsilon=EPSILON, loss="dlr", steps=steps).search(model, pixel_values=images, labels=labels).hit.sum()
        for steps in (5, 50)
    )
    assert many >= few


def test_a_row_does_not_depend_on_its_companions(linear):
    model, images, labels, _ = linear
    images, labels = images[:40], labels[:40]
    attack = APGD(epsilon=EPSILON, loss="targeted_dlr", steps=20)
    together = attack.search(model, pixel_values=images, labels=labels)
    order = torch.tensor([17, 3, 25, 8, 39])
    some = attack.search(model, pixel_values=images[order], labels=labels[order])
    assert torch.equal(some.hit, together.hit[order])
    torch.testing.assert_close(some.delta, together.delta[order], rtol=0, atol=1e-5)


def test_step_sizes_do_not_matter_to_scaled_logits(linear):
    """DLR is free of scale: large logits, which starve the gradient of the cross-entropy, do not save a model."""
    model, images, labels, margins = linear
    scaled = Linear(model.linear.weight.data * 1e4, model.linear.bias.data * 1e4)
    found = APGD(epsilon=EPSILON, loss="targeted_dlr").search(scaled, pixel_values=images, labels=labels)
    assert (~found.hit).float().mean() - (margins > 0).float().mean() <= 0.005


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.03), ("l1", 2.0)])
def test_a_model_is_left_as_it_was(norm, epsilon):
    model, (images, labels) = tiny_cnn(batch_norm=True, dropout=0.3).train(), tiny_images()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    delta = APGD(epsilon=epsilon, norm=norm, steps=10).perturb(model, pixel_values=images, labels=labels)
    assert torch.equal(torch.get_rng_state(), state) and delta.dtype == torch.float32
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters()) and model.training


def test_objective_and_half_precision():
    model, (images, _) = tiny_cnn().to(torch.bfloat16), tiny_images()
    clean = model(images.bfloat16()).float().detach()

    def objective(delta):
        return -(model((images + delta).bfloat16()).float() - clean).pow(2).sum(1), None

    found = APGD(epsilon=0.03, steps=10, restarts=2).search(model, pixel_values=images, objective=objective)
    assert found.delta.dtype == torch.float32 and found.num_backwards == 20 and found.num_forwards == 22
    assert (found.last_loss < found.first_loss).all() and not found.hit.any()


def test_errors():
    images, labels = tiny_images(classes=3)
    with pytest.raises(ValueError, match="needs 4 classes, the model has 3"):
        APGD(epsilon=0.1, loss="targeted_dlr").perturb(tiny_cnn(classes=3), pixel_values=images, labels=labels)
    with pytest.raises(ValueError, match="epsilon=8.*8/255"):
        APGD(epsilon=8)
    with pytest.raises(ValueError, match="loss='fab'"):
        APGD(epsilon=0.1, loss="fab")
    with pytest.raises(ValueError, match="`labels` has 3"):
        APGD(epsilon=0.1).perturb(tiny_cnn(classes=3), pixel_values=images, labels=labels + 1)
