"""Every sanity flag on rows that raise it and rows that do not, and on models that mask their gradients."""

import math
import re

import pytest
import torch

from hf_robust.attacks.vision import PGD
from hf_robust.report import evaluate_vision
from hf_robust.report.vision_flags import (
    Run,
    accuracy_left_at_any_epsilon,
    find_vision_flags,
    loss_not_converged,
    loss_stuck,
    not_finite,
    outside_threat_model,
    random_model,
    unchecked,
    warned,
    weaker_than_black_box,
    weaker_than_less,
)
from tests.vision_data import Nearest, NotFinite, Quantised, Random, Saturated, rows


def row(broken, *, losses=(), backwards=1, **result):
    return {
        "id": "x",
        "result": {"error": None, "losses": list(losses), "num_forwards": 1, "num_backwards": backwards, **result},
        "verdict": {"success": broken, "error": None},
    }


def run(name, broken, total=20, *, role="attack", of=None, losses=(), backwards=1, **settings):
    """An attack that breaks the first `broken` of `total` images."""
    listed = [row(place < broken, losses=losses, backwards=backwards) for place in range(total)]
    return Run(name, {"class": "PGD", "norm": "linf", "epsilon": 0.1, "steps": 10, **settings}, listed, role, of)


def codes(flags):
    return [flag.code for flag in flags]


# Each rule by itself --------------------------------------------------------------------------------------------------


def test_random_model():
    assert codes(random_model([row(False, repeatable=True), row(False, repeatable=False)])) == ["random_model"]
    assert random_model([row(False, repeatable=True), row(False)]) == []


def test_not_finite():
    clean = [row(False, non_finite=True), row(False, non_finite=False)]
    assert [flag.attack for flag in not_finite(clean, [run("a", 3)])] == [None]
    attacked = Run("a", {}, [row(True, non_finite=True)])
    assert [flag.attack for flag in not_finite([row(False)], [attacked])] == ["a"]


def test_outside():
    attacked = Run("a", {}, [row(True, outside="linf norm of δ 0.5 > ε 0.1"), row(False, outside=None)])
    (flag,) = outside_threat_model([attacked])
    assert flag.attack == "a" and "0.5 > ε 0.1" in flag.message and "1 of 2" in flag.message
    assert outside_threat_model([run("a", 3)]) == []


def test_accuracy_left_at_any_epsilon():
    left = run("a with any ε", 19, role="whole_box", of="a", epsilon=1.0)
    (flag,) = accuracy_left_at_any_epsilon([run("a", 5), left])
    assert flag.attack == "a" and "1 of 20" in flag.message
    assert accuracy_left_at_any_epsilon([run("a", 5), run("b", 20, role="whole_box", of="a", epsilon=1.0)]) == []


@pytest.mark.parametrize(
    ("less", "more", "code"),
    [
        ({"epsilon": 0.05}, {}, "accuracy_rises_with_epsilon"),
        ({"steps": 5}, {}, "accuracy_rises_with_steps"),
        ({"steps": 1, "step_size": 0.1}, {"step_size": 0.02}, "weaker_than_one_step"),
    ],
)
def test_less_finds_more(less, more, code):
    small, large = run("small", 12, **less), run("large", 9, **more)
    (flag,) = weaker_than_less([small, large])
    assert flag.code == code and flag.attack == "large" and "9 of 20" in flag.message
    assert weaker_than_less([run("small", 9, **less), run("large", 12, **more)]) == []
    # One image is chance: random starts differ
    assert weaker_than_less([run("small", 10, **less), run("large", 9, **more)]) == []
    # Other attacks do not compare
    assert weaker_than_less([run("small", 12, **less, loss="ce"), run("large", 9, **more, loss="dlr")]) == []


def test_checks_are_compared_with_their_own_attack_on_the_images_they_share():
    check = run("a with one step", 8, 10, role="one_step", of="a", steps=1)
    assert codes(weaker_than_less([run("a", 5), check])) == ["weaker_than_one_step"]
    assert codes(weaker_than_less([run("b", 5), check])) == []
    # The attack broke the same ten images and none beyond: on what both have it is as strong
    assert codes(weaker_than_less([run("a", 8), check])) == []


def test_weaker_than_black_box():
    blind = run("noise", 9, backwards=0, role="black_box", of="a", **{"class": "RandomNoise"})
    (flag,) = weaker_than_black_box([run("a", 5), blind])
    assert flag.attack == "a" and "9 of the same" in flag.message
    assert weaker_than_black_box([run("a", 9), blind]) == []
    assert weaker_than_black_box([run("a", 5, epsilon=0.2), blind]) == []


def test_loss_stuck():
    assert codes(loss_stuck([run("a", 5, losses=[0.0] * 12)])) == ["loss_stuck"]
    # The random start moves the loss, no step does
    assert codes(loss_stuck([run("a", 5, losses=[-0.1] + [-0.2] * 11)])) == ["loss_stuck"]
    assert loss_stuck([run("a", 5, losses=[-0.1 * step for step in range(12)])]) == []
    assert loss_stuck([run("a", 20, losses=[0.0] * 12)]) == []


def test_loss_not_converged():
    falling = [-0.1 * step for step in range(11)]
    assert codes(loss_not_converged([run("a", 5, losses=falling)])) == ["loss_not_converged"]
    assert loss_not_converged([run("a", 5, losses=[*falling[:6], *[falling[5]] * 6])]) == []
    assert loss_not_converged([run("a", 20, losses=falling)]) == []
    assert loss_not_converged([run("a", 5, losses=falling, role="one_step", of="b")]) == []


def test_of_several_searches_the_best_counts():
    flat = [-0.1 * min(step, 5) for step in range(11)]
    # Clean image, then two searches of 10 steps: the last one still falls, but ends above the first
    falling = [-0.01 * step for step in range(11)]
    assert loss_not_converged([run("a", 5, losses=[-0.05, *flat, *falling])]) == []
    assert codes(loss_not_converged([run("a", 5, losses=[-0.05, *falling, *[0.0] * 11])])) == ["loss_not_converged"]


def test_warnings_of_other_packages_appear_once():
    text = "it seems to be a randomized defense! Please use version"
    listed = [row(False, warnings=[f"{text} {n}"]) for n in range(3)]
    assert codes(warned([Run("AutoAttack", {}, listed)])) == ["attack_warned"]


def test_unchecked():
    assert codes(unchecked([run("noise", 3, backwards=0)])) == ["no_white_box"]
    assert codes(unchecked([run("a", 3)])) == ["no_sanity_checks"]
    assert unchecked([run("a", 3), run("b", 3, role="one_step", of="a", steps=1)]) == []


# Models that mask their gradients -------------------------------------------------------------------------------------


def evaluated(model, attack=None, **options):
    attack = PGD(epsilon=0.12, steps=10) if attack is None else attack
    return evaluate_vision(
        model,
        dataset=rows(),
        class_names=[str(n) for n in range(10)],
        attacks={"pgd": attack},
        progress=False,
        **options,
    )


def flag_codes(report):
    return {flag.code for flag in report.flags}


def test_an_honest_model_raises_nothing():
    report = evaluated(Nearest(), PGD(epsilon=0.12, steps=40))
    assert report.flags == []
    assert 0 < report.find("model", "robust_accuracy", "all", "pgd").value < 1


def test_saturated_logits_are_found():
    honest, masked = evaluated(Nearest()), evaluated(Saturated())
    assert masked.find("model", "robust_accuracy", "all", "pgd").value == 1.0
    assert honest.find("model", "robust_accuracy", "all", "pgd").value < 1.0
    assert {"loss_stuck", "accuracy_left_at_any_epsilon"} <= flag_codes(masked)


def test_a_scale_free_loss_breaks_saturated_logits():
    report = evaluated(Saturated(), PGD(epsilon=0.12, steps=40, loss="dlr"))
    honest = evaluated(Nearest(), PGD(epsilon=0.12, steps=40, loss="dlr"))
    found, wanted = (r.find("model", "robust_accuracy", "all", "pgd").value for r in (report, honest))
    assert found == wanted < 1 and "loss_stuck" not in flag_codes(report)


def test_quantised_input_is_found():
    report = evaluated(Quantised())
    assert {"loss_stuck", "accuracy_left_at_any_epsilon"} <= flag_codes(report)


def test_random_input_is_found():
    assert "random_model" in flag_codes(evaluated(Random()))


def test_noise_that_beats_gradients_is_found():
    report = evaluated(Quantised(), PGD(epsilon=0.3, steps=10, random_start=False))
    assert "weaker_than_black_box" in flag_codes(report)


def test_nan_is_found():
    report = evaluated(NotFinite())
    assert "not_finite" in flag_codes(report)
    # Images of class 0 have no answer: they are not right
    assert report.find("model", "accuracy", "class:0").value == 0.0


class Constant:
    """The same δ for every image, whatever it is allowed."""

    norm = "linf"

    def __init__(self, epsilon, delta):
        self.epsilon, self.delta = epsilon, delta

    def perturb(self, model, *, pixel_values, labels):
        # Every second image is left alone, so that the attack does not fail on all
        even = (labels % 2 == 0).view(-1, 1, 1, 1)
        return torch.where(even, torch.full_like(pixel_values, self.delta), 0.0)


@pytest.mark.parametrize(
    ("cheat", "message"),
    [
        (Constant(0.1, 0.11), "linf norm of δ 0.11 > ε 0.1"),
        (Constant(0.9, 0.8), r"leave \[0, 1\]"),
        (Constant(0.9, math.nan), "δ is not finite"),
    ],
)
def test_attacks_that_cheat_are_found(cheat, message):
    attacks = {"cheat": cheat, "pgd": PGD(epsilon=0.12, steps=5)}
    names = [str(n) for n in range(10)]
    report = evaluate_vision(
        Nearest(), dataset=rows(20), class_names=names, attacks=attacks, progress=False, sanity_images=0
    )
    (flag,) = [flag for flag in report.flags if flag.code == "outside_threat_model"]
    assert flag.attack == "cheat" and re.search(message, flag.message)
    assert next(run for run in report.runs if run.name == "cheat").failures == 10
    assert report.find("model", "robust_accuracy", "all", "cheat").count == 10


def test_an_attack_that_always_cheats_ends_the_evaluation():
    with pytest.raises(ValueError, match="failed on every prompt"):
        evaluate_vision(
            Nearest(), dataset=[row for row in rows(20) if row["labels"] % 2 == 0], progress=False, sanity_images=0,
            class_names=[str(n) for n in range(10)], attacks={"cheat": Constant(0.1, 0.5)},
        )  # fmt: skip


def test_no_flags_of_nothing():
    assert find_vision_flags([row(False)], []) == []
