"""Attacks on the pixels of image models: PGD and Auto-PGD, in raw [0, 1] units."""

from hf_robust.attacks.vision.apgd import APGD
from hf_robust.attacks.vision.ball import pixel_generators
from hf_robust.attacks.vision.losses import PIXEL_LOSSES, attack_loss
from hf_robust.attacks.vision.pgd import PGD

__all__ = ["APGD", "PGD", "PIXEL_LOSSES", "attack_loss", "pixel_generators"]
