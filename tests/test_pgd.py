"""PGD on pixels: equality with other packages, units, errors, and that a model is left as it was."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_robust.attacks import PGD
from hf_robust.attacks.vision import attack_loss, pixel_generators
from hf_robust.attacks.vision.losses import best_other_classes
from hf_robust.sites import PixelUnits
from tests.pixel_data import digits, exact_margins, fitted, processor, tiny_cnn, tiny_images

EPS = 8 / 255


def written_out(model, images, labels, epsilon, step, steps):
    """PGD as the textbooks have it."""
    moved = images.clone()
    for _ in range(steps):
        moved.requires_grad_(True)
        (grad,) = torch.autograd.grad(F.cross_entropy(model(moved), labels, reduction="sum"), moved)
        moved = moved.detach() + step * grad.sign()
        moved = (images + (moved - images).clamp(-epsilon, epsilon)).clamp(0, 1)
    return moved


def torchattacks_pgd(model, images, labels, epsilon, step, steps):
    package = imported("torchattacks")
    return package.PGD(model, eps=epsilon, alpha=step, steps=steps, random_start=False)(images, labels)


def foolbox_pgd(model, images, labels, epsilon, step, steps):
    package = imported("foolbox")
    attack = package.attacks.LinfPGD(abs_stepsize=step, steps=steps, random_start=False)
    wrapped = package.PyTorchModel(model, bounds=(0, 1), device="cpu")
    # run, not call: a call puts the clean image back where the model was not fooled
    return attack.run(wrapped, images, package.criteria.Misclassification(labels), epsilon=epsilon)


def imported(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both call deprecated names of scipy
        return pytest.importorskip(name)


@pytest.mark.parametrize("reference", [written_out, torchattacks_pgd, foolbox_pgd])
@pytest.mark.parametrize("epsilon, step, steps", [(EPS, 2 / 255, 7), (0.3, 0.07, 20), (EPS, EPS, 1)])
def test_images_are_those_of_others_bit_for_bit(reference, epsilon, step, steps):
    model, (images, labels) = tiny_cnn(), tiny_images(batch=8)
    attack = PGD(epsilon=epsilon, steps=steps, step_size=step, random_start=False, keep="last")
    delta = attack.perturb(model, pixel_values=images, labels=labels)
    assert delta.abs().max() > 0
    assert torch.equal(images + delta, reference(model, images, labels, epsilon, step, steps))


# units


@pytest.mark.parametrize("norm, epsilon", [("linf", EPS), ("l2", 0.5), ("l1", 3.0)])
def test_a_normalised_model_is_attacked_as_the_raw_one(norm, epsilon):
    made = processor()
    units = PixelUnits(made)
    inner, (images, labels) = tiny_cnn(), tiny_images(batch=6)

    class Raw(nn.Module):
        def forward(self, x):
            return inner(units.from_raw(x))

    settings = dict(epsilon=epsilon, norm=norm, steps=5, keep="last", fixed_starts=False)
    raw = PGD(**settings).perturb(Raw(), pixel_values=images, labels=labels)
    normalised = units.from_raw(images)
    found = PGD(**settings, image_processor=made).perturb(inner, pixel_values=normalised, labels=labels)
    torch.testing.assert_close(found / units.radius(1.0), raw, rtol=0, atol=1e-5)
    inside = units.to_raw(normalised + found)
    assert inside.min() > -1e-6 and inside.max() < 1 + 1e-6
    size = {"linf": raw.abs().flatten(1).amax(1), "l2": raw.flatten(1).norm(dim=1), "l1": raw.flatten(1).abs().sum(1)}
    assert (size[norm] <= epsilon * (1 + 1e-5)).all() and (size[norm] > epsilon / 4).all()


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.1), ("l2", 1.0), ("l1", 8.0)])
@pytest.mark.parametrize("loss", ["ce", "dlr", "targeted_dlr"])
def test_loss_falls_in_every_norm(norm, epsilon, loss):
    model, (images, _) = tiny_cnn(), tiny_images(batch=6)
    labels = model(images).argmax(1)
    settings = dict(epsilon=epsilon, norm=norm, loss=loss)
    delta = PGD(**settings, steps=10).perturb(model, pixel_values=images, labels=labels)

    def margin(x):
        return attack_loss(model(x).detach(), labels, "dlr")

    assert (margin(images + delta) < margin(images)).all()


def test_radii_nest_and_large_ones_break_everything():
    model, (images, _) = tiny_cnn(), tiny_images(batch=6)
    labels = model(images).argmax(1)
    hits = [
        PGD(epsilon=e, steps=20).search(model, pixel_values=images, labels=labels).hit.sum() for e in (0, 0.02, 1.0)
    ]
    assert hits[0] == 0 and hits[0] <= hits[1] <= hits[2] == 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_have_float32_deltas(dtype):
    model, (images, _) = tiny_cnn().to(dtype), tiny_images(batch=6)
    labels = model(images.to(dtype)).argmax(1)
    for pixels in (images, images.to(dtype)):
        attack = PGD(epsilon=EPS, steps=4, step_size=EPS / 10, keep="last")
        found = attack.search(model, pixel_values=pixels, labels=labels)
        assert found.delta.dtype == torch.float32 and found.delta.abs().max() <= EPS * (1 + 1e-6)
        assert (found.last_loss < found.first_loss).any() and not found.non_finite.any()
        # steps that a sum in bfloat16 would lose
        assert found.delta.unique().numel() > 100


def test_tiles_of_an_image_share_its_ball():
    model = tiny_cnn()
    images, labels = tiny_images(batch=6)
    tiles = images.view(3, 2, 3, 6, 6)

    def summed(pixel_values):
        return model(pixel_values.flatten(0, 1)).view(-1, 2, 5).sum(1)

    delta = PGD(epsilon=0.5, norm="l2", steps=5).perturb(summed, pixel_values=tiles, labels=labels[:3])
    assert delta.shape == tiles.shape and (delta.flatten(1).norm(dim=1) <= 0.5 + 1e-5).all()


# what is kept


def test_best_marks_and_keeps_the_first_hit():
    images, labels = digits()
    images, labels = images[:300], labels[:300]
    model = fitted(images, labels)
    found = PGD(epsilon=0.1, steps=10).search(model, pixel_values=images, labels=labels)
    wrong = model(images + found.delta).argmax(1) != labels
    clean = model(images).argmax(1) != labels
    assert torch.equal(found.hit, wrong) and clean.any() and not wrong.all() and (wrong & ~clean).any()
    assert (found.delta[clean] == 0).all()
    assert (found.evaluations[clean] == 1).all() and (found.evaluations[~wrong] == len(found.losses)).all()
    for row in (int(clean.nonzero()[0]), int((wrong & ~clean).nonzero()[0]), int((~wrong).nonzero()[0])):
        spent = found.spent(row)
        assert len(spent["losses"]) == found.evaluations[row] and all(value == value for value in spent["losses"])
    # A search may not go below what is exactly known
    assert (found.hit <= (exact_margins(model, images, labels, 0.1) < 1e-5)).all()


def test_restarts_only_add_hits():
    images, labels = digits()
    images, labels = images[:200], labels[:200]
    model = fitted(images, labels)
    settings = dict(epsilon=0.1, steps=1, loss="dlr")
    one, three = (PGD(**settings, restarts=r).search(model, pixel_values=images, labels=labels) for r in (1, 3))
    assert (one.hit <= three.hit).all() and three.num_backwards == 3
    assert (three.last_loss <= one.last_loss + 1e-6).all()


def test_last_is_the_final_one_and_off_is_zero():
    model, (images, labels) = tiny_cnn(), tiny_images()
    found = PGD(epsilon=EPS, steps=3, keep="last").search(model, pixel_values=images, labels=labels)
    assert (found.num_forwards, found.num_backwards, found.losses.shape) == (3, 3, (3, 4)) and not found.hit.any()
    for off in (dict(epsilon=0.0, steps=3), dict(epsilon=EPS, steps=0)):
        quiet = PGD(**off).search(model, pixel_values=images, labels=labels)
        assert (quiet.delta == 0).all() and torch.equal(quiet.hit, model(images).argmax(1) != labels)
        assert PGD(**off, keep="last").search(model, pixel_values=images, labels=labels).num_forwards == 0


def test_objective_takes_the_place_of_the_loss():
    model, (images, _) = tiny_cnn(), tiny_images()
    made = processor()
    pixels = PixelUnits(made).from_raw(images)
    clean = model(pixels).detach()
    seen = []

    def objective(delta):
        seen.append(delta.detach())
        return -(model(pixels + delta) - clean).pow(2).sum(1), None

    attack = PGD(epsilon=EPS, steps=5, image_processor=made)
    found = attack.search(model, pixel_values=pixels, objective=objective)
    assert len(seen) == 6 and (found.last_loss < found.first_loss).all() and not found.hit.any()
    torch.testing.assert_close(found.delta.abs().amax((0, 2, 3)), attack.units(3).radius(EPS).flatten())
    seen.clear()
    goal = torch.tensor([True, False, False, False])
    reached = attack.search(model, pixel_values=pixels, objective=lambda delta: (objective(delta)[0], goal))
    assert torch.equal(reached.hit, goal) and torch.equal(reached.delta[0], seen[0][0])
    assert torch.equal(reached.delta[1:], found.delta[1:])


def test_targets_are_the_best_other_classes():
    logits = torch.tensor([[1.0, 5.0, 3.0, 4.0], [9.0, 1.0, 2.0, 3.0]])
    labels = torch.tensor([1, 2])
    assert best_other_classes(logits, labels, 2).tolist() == [[3, 2], [0, 3]]
    assert best_other_classes(logits, labels, 9).shape == (2, 3)


def test_losses_by_hand():
    logits, labels = torch.tensor([[4.0, 1.0, 3.0, 0.0], [4.0, 1.0, 3.0, 0.0]]), torch.tensor([0, 1])
    # (4 - 3) / (4 - 1) and (1 - 4) / (4 - 1); towards class 2: (4 - 3) and (1 - 3) over 4 - (1 + 0) / 2
    torch.testing.assert_close(attack_loss(logits, labels, "dlr"), torch.tensor([1 / 3, -1.0]))
    targeted = attack_loss(logits, labels, "targeted_dlr", torch.tensor([2, 2]))
    torch.testing.assert_close(targeted, torch.tensor([1 / 3.5, -2 / 3.5]))
    for loss in ("dlr", "targeted_dlr"):  # neither scale nor offset matters
        aims = torch.tensor([2, 2])
        torch.testing.assert_close(
            attack_loss(logits * 7 + 3, labels, loss, aims), attack_loss(logits, labels, loss, aims)
        )
    torch.testing.assert_close(attack_loss(logits, labels, "ce"), -F.cross_entropy(logits, labels, reduction="none"))
    with pytest.raises(ValueError, match="needs `targets`"):
        attack_loss(logits, labels, "targeted_dlr")


# Free AT: gradients from elsewhere


@pytest.mark.parametrize("made", [None, processor()])
@pytest.mark.parametrize("norm, epsilon", [("linf", EPS), ("l2", 0.5), ("l1", 3.0)])
def test_start_and_advance_are_the_search(made, norm, epsilon):
    model, (images, labels) = tiny_cnn(), tiny_images()
    pixels = PixelUnits(made).from_raw(images)
    attack = PGD(epsilon=epsilon, norm=norm, steps=4, keep="last", fixed_starts=False, image_processor=made)
    expected = attack.perturb(model, pixel_values=pixels, labels=labels)
    attack.generator.manual_seed(0)
    delta = attack.start(pixels)
    for _ in range(4):
        moving = delta.requires_grad_(True)
        (grad,) = torch.autograd.grad(F.cross_entropy(model(pixels + moving), labels, reduction="sum"), moving)
        delta = attack.advance(moving, grad, pixels)
    torch.testing.assert_close(delta, expected, rtol=0, atol=0 if made is None else 1e-6)


# random starts


def test_a_row_does_not_depend_on_its_companions():
    model, (images, labels) = tiny_cnn(), tiny_images(batch=6)
    attack = PGD(epsilon=EPS, steps=4, restarts=2, loss="dlr")
    together = attack.search(model, pixel_values=images, labels=labels)
    order = torch.tensor([3, 5, 0])
    some = attack.search(model, pixel_values=images[order], labels=labels[order])
    assert torch.equal(some.hit, together.hit[order])
    torch.testing.assert_close(some.delta, together.delta[order], rtol=0, atol=1e-7)
    other = PGD(epsilon=EPS, steps=4, seed=1, loss="dlr").perturb(model, pixel_values=images, labels=labels)
    assert not torch.equal(other, together.delta)


def test_stream_starts_differ_from_call_to_call_and_can_be_seeded():
    model, (images, labels) = tiny_cnn(), tiny_images()
    attack = PGD(epsilon=EPS, steps=1, step_size=1e-4, keep="last", fixed_starts=False)
    first, second = (attack.perturb(model, pixel_values=images, labels=labels) for _ in range(2))
    attack.generator.manual_seed(0)
    assert torch.equal(attack.perturb(model, pixel_values=images, labels=labels), first) and not torch.equal(
        first, second
    )
    given = [torch.Generator().manual_seed(7) for _ in range(4)]
    same = attack.perturb(model, pixel_values=images, labels=labels, generators=given)
    again = attack.perturb(
        model, pixel_values=images, labels=labels, generators=[torch.Generator().manual_seed(7) for _ in range(4)]
    )
    assert torch.equal(same, again)
    with pytest.raises(ValueError, match="`generators` has 1 entries for 4"):
        attack.perturb(model, pixel_values=images, labels=labels, generators=given[:1])
    drawn = [torch.rand(2, generator=g).tolist() for g in pixel_generators(0, images[[0, 1, 0]])]
    assert drawn[0] == drawn[2] != drawn[1]


# the model is left as it was


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_left_as_it_was(training):
    model, (images, labels) = tiny_cnn(batch_norm=True, dropout=0.5).train(training), tiny_images()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    attack = PGD(epsilon=EPS, steps=3, loss="dlr")
    found = attack.search(model, pixel_values=images, labels=labels)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert images.grad is None and not images.requires_grad and not found.delta.requires_grad
    # without randomness: the mode makes no difference
    assert torch.equal(found.delta, attack.perturb(model.eval(), pixel_values=images, labels=labels))


def test_no_grad_around_an_attack_is_no_obstacle():
    model, (images, labels) = tiny_cnn(), tiny_images()
    with torch.no_grad():
        attack = PGD(epsilon=EPS, steps=2, keep="last")
        assert attack.perturb(model, pixel_values=images, labels=labels).abs().max() > 0


def test_an_image_classifier_of_transformers_and_peft():
    from peft import LoraConfig, get_peft_model
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=6, patch_size=3,
        num_labels=5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViTForImageClassification(config).train()
        adapted = get_peft_model(ViTForImageClassification(config), LoraConfig(target_modules=["q_proj"]))
    images, labels = tiny_images()
    for classifier in (model, adapted, lambda pixel_values: model(pixel_values).logits):
        delta = PGD(epsilon=EPS, steps=2, keep="last").perturb(classifier, pixel_values=images, labels=labels)
        assert delta.abs().max() > 0
    # further inputs of the model reach it
    larger = torch.nn.functional.interpolate(images, 12)
    attack = PGD(epsilon=EPS, steps=2, restarts=2)
    attack.perturb(model, pixel_values=larger, labels=labels, interpolate_pos_encoding=True)


def test_reentrant_checkpointing_is_refused():
    class Block(nn.Module):
        gradient_checkpointing = True

        def forward(self, x):
            return x.flatten(1)

    import functools

    block = Block().train()
    block._gradient_checkpointing_func = functools.partial(print, use_reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant"):
        PGD(epsilon=EPS, steps=1).perturb(block, pixel_values=tiny_images()[0], labels=tiny_images()[1])


# errors


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(epsilon=8), "epsilon=8.*8/255"),
        (dict(epsilon=-1), "epsilon=-1"),
        (dict(steps=1.5), "steps=1.5"),
        (dict(steps=-1), "steps=-1"),
        (dict(norm="l3"), "norm='l3'"),
        (dict(loss="cw"), "loss='cw'"),
        (dict(keep="first"), "keep='first'"),
        (dict(step_rule="signs"), "step_rule='signs'.*'sign'"),
        (dict(step_size=2), "step_size=2.*2/255"),
        (dict(restarts=0), "restarts=0"),
        (dict(restarts=2, keep="last"), "restarts=2.*keep='best'"),
        (dict(loss="targeted_dlr", keep="last"), "targeted_dlr.*keep='best'"),
        (dict(restarts=2, random_start=False), "random_start=False"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PGD(**{"epsilon": EPS, "steps": 2, **settings})


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(labels=torch.tensor([0, 1, 2, 5])), r"`labels` has 5, but the model's 5 classes are 0 to 4"),
        (dict(labels=torch.tensor([0, 1, 2, -100])), "`labels` has -100"),
        (dict(labels=torch.tensor([0, 1])), "`labels` is torch.int64 of shape"),
        (dict(labels=torch.zeros(4)), "`labels` is torch.float32"),
        (dict(labels=None), "`labels=None`"),
        (dict(pixel_values=tiny_images()[0] * 3), "outside"),
        (dict(pixel_values=tiny_images()[0] * torch.nan), "NaN"),
        (dict(pixel_values=tiny_images()[0][0]), "has shape"),
    ],
)
def test_wrong_inputs(changes, message):
    images, labels = tiny_images()
    for keep in ("best", "last"):
        with pytest.raises(ValueError, match=message):
            PGD(epsilon=EPS, steps=2, keep=keep).perturb(
                tiny_cnn(), **{"pixel_values": images, "labels": labels, **changes}
            )


def test_wrong_models_and_processors():
    images, labels = tiny_images(classes=2)
    with pytest.raises(ValueError, match=r"`loss='dlr'` needs 3 classes, the model has 2"):
        PGD(epsilon=EPS, steps=2, loss="dlr").perturb(tiny_cnn(classes=2), pixel_values=images, labels=labels)
    with pytest.raises(ValueError, match="instead of logits"):
        PGD(epsilon=EPS, steps=2).perturb(lambda x: x, pixel_values=images, labels=labels)
    with pytest.raises(ValueError, match="image_mean.* 3 channels"):
        attack = PGD(epsilon=EPS, steps=2, image_processor=processor([0.5], [0.5]))
        attack.perturb(tiny_cnn(), pixel_values=images, labels=labels)


def test_repr_and_attributes_are_the_settings():
    attack = PGD(epsilon=0.03, steps=2, image_processor=processor())
    assert repr(attack).startswith("PGD(epsilon=0.03, norm='linf', steps=2, step_size=None")
    assert "image_processor" not in repr(attack)
