"""Configuration of [`RobustVLMTrainer`]."""

from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from hf_robust.attacks.gradient import KEEPS
from hf_robust.sites.pixels import check_epsilon, check_step_size
from hf_robust.threats import check_at_least, check_choice
from hf_robust.trainers.phases import RunArguments
from hf_robust.trainers.robust_vlm_attack import PERTURBATIONS, PIXEL_NORMS, PIXEL_SPACES, VLMAttack


@dataclass(repr=False)
class RobustVLMConfig(RunArguments, SFTConfig):
    """
    Configuration of [`RobustVLMTrainer`]: all of [`~trl.SFTConfig`] and the fields below.

    Parameters:
        perturbation (`str`, defaults to `"pixels"`):
            What the adversary moves: `"pixels"`, `"embeddings"` (what the language model reads, image positions included) or
            `"both"` in one search.
        attack_steps (`int`, defaults to `10`):
            Gradient steps of the attack. 0 switches it off.
        attack_keep (`str`, defaults to `"best"`):
            `"best"` perturbation of each row, or the `"last"` (one forward less).
        eval_attack_steps (`int`, *optional*):
            Steps of the attack in evaluation. Default: `attack_steps`. 0: clean rows only.
        pixel_epsilon (`float`, defaults to `2/255`):
            Radius in raw pixels, whose range is [0, 1], whatever the processor normalises by. 2/255 and 4/255 are what
            robust CLIP towers are trained and measured at (arXiv 2402.12336). 0 leaves images alone.
        pixel_norm (`str`, defaults to `"linf"`):
            `"linf"`, or `"l2"` over all images of a row together.
        pixel_step_size (`float`, *optional*):
            Length of a step in raw pixels. Default: `min(1, 2.5 / attack_steps)` of the radius.
        pixel_random_start (`bool`, defaults to `True`):
            Start at a random point of the ball.
        pixel_space (`str`, defaults to `"image"`):
            What a perturbation is one of. `"image"`: the images, from which patches (Qwen-VL) or overview and tiles
            (LLaVA-NeXT) are made anew, differentiably. `"pixel_values"`: what the model is given; of patches and tiles, this
            is more than an image could do (see [`~hf_robust.sites.image_layout`]). For LLaVA the two are the same.
        embedding_epsilon (`float`, defaults to `0.05`):
            Radius of the ball around each position that the language model reads, as a multiple of the mean L2 norm of the
            embedding rows, as in [`CATConfig`]. 0 leaves embeddings alone.
        embedding_step_size (`float`, *optional*):
            Length of a step as a share of the radius. Default: `min(1, 2.5 / attack_steps)`.
        projector_learning_rate (`float`, *optional*):
            Learning rate of the module between image tower and language model. Default: `learning_rate`. 0 freezes it.
        vision_learning_rate (`float`, *optional*):
            Learning rate of the image tower. Default: `learning_rate`. 0 freezes it. LLaVA's recipes take 2e-4 for LoRA, 2e-5
            for the projector and, where the tower is trained, about 1e-6.
    """

    perturbation: str = field(
        default="pixels", metadata={"help": "What the adversary moves: pixels, embeddings or both."}
    )
    attack_steps: int = field(default=10, metadata={"help": "Gradient steps of the attack. 0: no attack."})
    attack_keep: str = field(default="best", metadata={"help": "Perturbation to keep: best or last."})
    eval_attack_steps: int | None = field(
        default=None, metadata={"help": "Steps of the attack in evaluation. Default: attack_steps. 0: clean rows only."}
    )
    pixel_epsilon: float = field(
        default=2 / 255, metadata={"help": "Radius in raw [0, 1] pixels. 0 leaves images alone."}
    )
    pixel_norm: str = field(default="linf", metadata={"help": "Norm of the pixels' ball: linf or l2."})
    pixel_step_size: float | None = field(
        default=None, metadata={"help": "Length of a step in raw pixels. Default: min(1, 2.5 / attack_steps) radii."}
    )
    pixel_random_start: bool = field(default=True, metadata={"help": "Start at a random point of the ball."})
    pixel_space: str = field(
        default="image", metadata={"help": "What is perturbed: image, or pixel_values (patches, tiles) as they are."}
    )
    embedding_epsilon: float = field(
        default=0.05, metadata={"help": "Radius at each position, in mean embedding norms. 0 leaves embeddings alone."}
    )
    embedding_step_size: float | None = field(
        default=None, metadata={"help": "Length of a step in radii. Default: min(1, 2.5 / attack_steps)."}
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector. Default: learning_rate. 0 freezes it."}
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the image tower. Default: learning_rate. 0 freezes it."}
    )

    def __post_init__(self) -> None:
        check_choice("perturbation", self.perturbation, PERTURBATIONS)
        check_choice("attack_keep", self.attack_keep, KEEPS)
        check_choice("pixel_norm", self.pixel_norm, PIXEL_NORMS)
        check_choice("pixel_space", self.pixel_space, PIXEL_SPACES)
        for name in ("attack_steps", "eval_attack_steps"):
            value = getattr(self, name)
            if value is not None:
                check_at_least(name, value, 0, "Use 0 to switch the attack off.")
                if value != int(value):
                    raise ValueError(f"`{name}={value!r}` must be a whole number.")
        try:
            check_epsilon(self.pixel_epsilon, self.pixel_norm)
        except ValueError as error:
            raise ValueError(str(error).replace("`epsilon=", "`pixel_epsilon=")) from None
        check_at_least("embedding_epsilon", self.embedding_epsilon, 0, "Use 0 to leave embeddings alone.")
        if self.pixel_step_size is not None:
            check_step_size("pixel_step_size", self.pixel_step_size, self.pixel_norm)
        for name in ("embedding_step_size", "projector_learning_rate", "vision_learning_rate"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 0, "Leave it unset for the default.")
        super().__post_init__()

    def build_attack(self, steps: int | None = None, *, image_processor: Any = None) -> VLMAttack:
        """
        The attack that these fields describe.

        Args:
            steps: number of steps, if not `attack_steps`.
            image_processor: made `pixel_values`.
        """
        return VLMAttack(
            perturbation=self.perturbation,
            steps=int(self.attack_steps if steps is None else steps),
            pixel_epsilon=self.pixel_epsilon,
            pixel_norm=self.pixel_norm,
            pixel_step_size=self.pixel_step_size,
            pixel_random_start=self.pixel_random_start,
            pixel_space=self.pixel_space,
            embedding_epsilon=self.embedding_epsilon,
            embedding_step_size=self.embedding_step_size,
            keep=self.attack_keep,
            image_processor=image_processor,
            seed=self.seed,
        )
