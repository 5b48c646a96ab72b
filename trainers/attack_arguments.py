"""The attack's part of a trainer's configuration, shared by all trainers with an embedding attack."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

from transformers import TrainingArguments

from hf_robust.attacks import EmbeddingAttack
from hf_robust.trainers.phases import RunArguments


@dataclass(repr=False)
class AttackArguments(RunArguments):
    """
    Fields that describe the inner maximisation. The radius and the number of steps are those of arXiv 2405.15589; the step
    size is relative to the radius by default, because the paper's absolute 1e-4 suits one model width only.

    Parameters:
        attack_epsilon (`float`, defaults to `0.05`):
            Radius of the ball around each prompt token's embedding, as a multiple of the mean L2 norm of the embedding rows
            (in embedding units with `attack_epsilon_relative=False`). 0 switches the attack off.
        attack_steps (`int`, defaults to `10`):
            Gradient steps of the attack. 0 switches it off.
        attack_step_size (`float`, *optional*):
            Length of one step as a share of the radius (absolute with `attack_step_size_relative=False`). Default:
            `min(1, 2.5 / attack_steps)`, so that one step reaches the boundary and ten can cross the ball.
        attack_step_rule (`str`, defaults to `"sign"`):
            `"sign"`, `"normalized"`, `"momentum"`, `"adam"` or `"rmsprop"`.
        attack_norm (`str`, defaults to `"l2_token"`):
            `"l2_token"`, `"l2"` or `"linf"`.
        attack_epsilon_relative (`bool`, defaults to `True`):
            Whether `attack_epsilon` counts in mean embedding norms.
        attack_step_size_relative (`bool`, defaults to `True`):
            Whether `attack_step_size` counts in radii.
        attack_init (`str`, defaults to `"zero"`):
            `"zero"` or `"random"`.
        attack_positions (`str`, defaults to `"all_prompt"`):
            `"all_prompt"` (every prompt token, chat markers and system prompt included) or `"user_content"`.
        attack_keep (`str`, *optional*):
            `"best"` or `"last"` perturbation. Default: `"best"`, and `"last"` for a single step.
        eval_attack_steps (`int`, *optional*):
            Steps of the attack in evaluation; 0 evaluates on clean prompts. Default: `attack_steps`.
        reference_compat (`bool`, defaults to `False`):
            Reproduce the authors' released code where it differs from the paper. For the attack: the last perturbation
            instead of the best, and an absolute step of 1e-4 unless `attack_step_size` is set. For the losses: see the
            trainer's own configuration.
    """

    attack_epsilon: float = field(
        default=0.05,
        metadata={"help": "Radius of the attack's ball, in multiples of the mean embedding norm. 0: no attack."},
    )
    attack_steps: int = field(default=10, metadata={"help": "Gradient steps of the attack. 0: no attack."})
    attack_step_size: float | None = field(
        default=None,
        metadata={"help": "Length of one step as a share of the radius. Default: min(1, 2.5 / attack_steps)."},
    )
    attack_step_rule: str = field(
        default="sign", metadata={"help": "Step rule: sign, normalized, momentum, adam or rmsprop."}
    )
    attack_norm: str = field(default="l2_token", metadata={"help": "Norm of the ball: l2_token, l2 or linf."})
    attack_epsilon_relative: bool = field(
        default=True, metadata={"help": "Whether attack_epsilon counts in mean embedding norms."}
    )
    attack_step_size_relative: bool = field(
        default=True, metadata={"help": "Whether attack_step_size counts in radii."}
    )
    attack_init: str = field(default="zero", metadata={"help": "Start of the attack: zero or random."})
    attack_positions: str = field(
        default="all_prompt", metadata={"help": "Attacked prompt tokens: all_prompt or user_content."}
    )
    attack_keep: str | None = field(
        default=None, metadata={"help": "Perturbation to keep: best or last. Default: best; last for one step."}
    )
    eval_attack_steps: int | None = field(
        default=None, metadata={"help": "Steps of the attack in evaluation. Default: attack_steps. 0: clean prompts."}
    )

    reference_compat: bool = field(
        default=False, metadata={"help": "Reproduce the authors' code where it differs from the paper."}
    )

    def __post_init__(self) -> None:
        if self.reference_compat:
            self.attack_keep = self.attack_keep or "last"
            if self.attack_step_size is None:
                self.attack_step_size, self.attack_step_size_relative = 1e-4, False
        # Parsers of command lines and YAML files hand over what they read: fail on it here, not after the model loads
        self.build_attack()
        if self.eval_attack_steps is not None:
            self.build_attack(self.eval_attack_steps, name="eval_attack_steps")
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()

    def build_attack(self, steps: int | None = None, *, seed: int = 0, name: str = "attack_steps") -> EmbeddingAttack:
        """
        The attack that these fields describe.

        Args:
            steps: number of steps, if not `attack_steps`.
            seed: seed of a random start.
            name: the argument that errors about `steps` should name.

        Raises:
            ValueError: a field is out of range or unknown; the message names it.
        """
        steps = self.attack_steps if steps is None else steps
        step_size = self.attack_step_size
        if step_size is None:
            step_size = min(1.0, 2.5 / steps) if isinstance(steps, int) and steps > 0 else 1.0
        try:
            return EmbeddingAttack(
                epsilon=self.attack_epsilon,
                steps=steps,
                step_size=step_size,
                step_rule=self.attack_step_rule,
                norm=self.attack_norm,
                epsilon_relative=self.attack_epsilon_relative,
                step_size_relative=self.attack_step_size_relative,
                init=self.attack_init,
                positions=self.attack_positions,
                keep=self.attack_keep or ("last" if steps == 1 else "best"),
                seed=seed,
                **self._attack_options(),
            )
        except ValueError as error:
            message = str(error).replace("`steps=", f"`{name}=")
            for argument in (
                "suffix_epsilon",
                "epsilon",
                "step_size",
                "step_rule",
                "norm",
                "init",
                "positions",
                "keep",
            ):
                message = message.replace(f"`{argument}=", f"`attack_{argument}=")
            raise ValueError(message) from None

    def _attack_options(self) -> dict[str, Any]:
        """Further arguments of the attack, of a subclass's own fields."""
        return {}


Config = TypeVar("Config", bound=TrainingArguments)


def take_over(args: TrainingArguments | None, config_class: type[Config], default_output: str) -> Config:
    """
    A trainer's own configuration from whatever the parent's script passes.

    Args:
        args: the trainer's configuration (returned as it is), one of the parent's (its fields are taken over) or `None`.
        config_class: the trainer's configuration.
        default_output: output folder if `args` is `None`.
    """
    if isinstance(args, config_class):
        return args
    if args is None:
        return config_class(default_output)
    known = {f.name for f in dataclasses.fields(config_class) if f.init}
    return config_class(**{f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name in known})
