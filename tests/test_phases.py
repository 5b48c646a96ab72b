"""`profile=True`: shares of time, on every trainer."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_robust.trainers.phases import PHASES, Phases, watched
from tests.helpers import tiny_model
from tests.trainer_data import capo_trainer, cat_trainer, logged, noisefit_trainer, train


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_every_moment_belongs_to_the_innermost_phase():
    """Seconds laid out by hand: 1 outside, 2 of data, 3 + 4 of a forward around 5 of attack, within which 6 more."""
    clock = Clock()
    phases = Phases(torch.device("cpu"), clock)
    clock.now += 1
    phases.enter("data")
    clock.now += 2
    phases.leave()
    phases.enter("forward")
    clock.now += 3
    phases.enter("attack")
    clock.now += 5
    phases.enter("forward")  # what an attack does is attack
    clock.now += 6
    phases.leave()
    phases.leave()
    clock.now += 4
    phases.leave()
    expected = {"data": 2, "attack": 11, "forward": 7, "backward": 0, "optimizer": 0, "other": 1}
    assert phases.read() == {f"profile/{name}": pytest.approx(seconds / 21) for name, seconds in expected.items()}
    clock.now += 10
    assert phases.read()["profile/other"] == 1  # starts anew


def test_an_attack_of_an_evaluation_is_no_phase_of_training():
    clock = Clock()
    phases = Phases(torch.device("cpu"), clock)
    phases.enter("attack")
    clock.now += 1
    phases.leave()
    assert phases.read()["profile/other"] == 1


@pytest.mark.parametrize("make", [cat_trainer, capo_trainer, noisefit_trainer])
def test_trainers_log_the_shares(make: Any, tmp_path: Path):
    model = tiny_model(num_hidden_layers=4)
    trainer = make(model, tmp_path / "a", profile=True, max_steps=2)
    found = train(trainer)
    for name in PHASES:
        assert len(logged(trainer, f"profile/{name}")) == 2
    for values in zip(*(logged(trainer, f"profile/{name}") for name in PHASES), strict=True):
        assert sum(values) == pytest.approx(1) and min(values) >= 0
    attacks = logged(trainer, "profile/attack")
    assert all(share == 0 for share in attacks) if make is noisefit_trainer else all(share > 0 for share in attacks)
    for name in ("data", "forward", "backward", "optimizer"):
        assert logged(trainer, f"profile/{name}")[-1] > 0
    # Watching changes nothing, and leaves nothing behind
    plain = train(make(tiny_model(num_hidden_layers=4), tmp_path / "b", max_steps=2))
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert not {"compute_loss", "training_step", "get_batch_samples"} & vars(trainer).keys()
    assert "backward" not in vars(trainer.accelerator)


def test_a_method_that_the_user_put_on_the_trainer_stays(tmp_path: Path):
    """Also one without a name, and where training ends in an error."""
    trainer = cat_trainer(tiny_model(), tmp_path, profile=True, max_steps=1)
    own = trainer.compute_loss = functools.partial(trainer.compute_loss)
    train(trainer)
    assert trainer.compute_loss is own and logged(trainer, "profile/forward")[0] > 0
    with pytest.raises(RuntimeError, match="broken off"), watched(trainer):
        assert trainer.compute_loss is not own
        raise RuntimeError("broken off")
    assert trainer.compute_loss is own and "training_step" not in vars(trainer)


def _others(name: str, folder: Path) -> Any:
    """A trainer of each other kind, of one step."""
    from tests.adversarial_data import adversarial_trainer, tiny_classifier
    from tests.advunlearn_data import advunlearn_trainer
    from tests.diffusion_trainer_data import diffusion_trainer
    from tests.test_robust_clip import clip_trainer, tiny_clip
    from tests.unlearn_data import unlearn_trainer
    from tests.vlm_data import tiny_llava, vlm_trainer

    args: dict[str, Any] = {"profile": True, "max_steps": 1}
    make: dict[str, Any] = {
        "adversarial": lambda: adversarial_trainer(tiny_classifier(), folder, **args),
        "free_at": lambda: adversarial_trainer(tiny_classifier(), folder, loss_type="free_at", **args),
        "clip": lambda: clip_trainer(tiny_clip(), folder, **args),
        "vlm": lambda: vlm_trainer(tiny_llava(), folder, **args),
        "diffusion": lambda: diffusion_trainer(None, folder, attack_epsilon=0.1, attack_steps=1, **args),
        "advunlearn": lambda: advunlearn_trainer(folder, attack_warmup_steps=0, latent_bank_size=0, **args),
        "sam": lambda: unlearn_trainer(tiny_model(), folder, robust="sam", **args),
        "embedding": lambda: unlearn_trainer(tiny_model(), folder, robust="embedding", **args),
    }
    return make[name]()


@pytest.mark.parametrize(
    "name", ["adversarial", "free_at", "clip", "vlm", "diffusion", "advunlearn", "sam", "embedding"]
)
def test_every_trainer_has_the_phases(name: str, tmp_path: Path):
    trainer = _others(name, tmp_path)
    train(trainer)
    shares = {phase: logged(trainer, f"profile/{phase}")[0] for phase in PHASES}
    assert sum(shares.values()) == pytest.approx(1)
    assert all(shares[phase] > 0 for phase in ("data", "attack", "forward", "backward", "optimizer"))


def test_nothing_is_logged_by_default(tmp_path: Path):
    trainer = cat_trainer(tiny_model(), tmp_path, max_steps=1)
    train(trainer)
    assert not logged(trainer, "profile/attack")
