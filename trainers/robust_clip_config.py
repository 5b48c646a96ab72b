"""Configuration of [`RobustCLIPTrainer`]."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_robust.attacks.vision import PGD
from hf_robust.objectives.clip import LOGIT_SCALE
from hf_robust.threats import check_at_least, check_choice, check_count
from hf_robust.trainers.phases import RunArguments

CLIP_LOSSES = ("fare", "tecoa", "pmg_aft", "sim_clip")
# Losses that compare images with the texts of classes, and so need labels
SUPERVISED = ("tecoa", "pmg_aft")


@dataclass(repr=False)
class RobustCLIPConfig(RunArguments, TrainingArguments):
    """
    Configuration of [`RobustCLIPTrainer`]: all of [`~transformers.TrainingArguments`] and the fields below. Defaults are those
    of FARE (arXiv 2402.12336), whose authors train TeCoA in the same way; they take a batch of 128 and 20,000 steps.

    Parameters:
        loss_type (`str`, defaults to `"fare"`):
            - `"fare"`: squared distance from the frozen tower's features of the clean image (arXiv 2402.12336); no labels.
            - `"tecoa"`: cross-entropy over the similarities with the classes' texts (arXiv 2212.07016).
            - `"pmg_aft"`: that, plus divergences from the frozen tower under the same attack and from the clean image
              (arXiv 2401.04350; its authors use ε 1/255, 2 steps).
            - `"sim_clip"`: symmetric negative cosine similarity with the clean image, gradient stopped on one side
              (arXiv 2407.14971); no labels.
        attack_epsilon (`float`, defaults to `2/255`):
            Radius in raw pixels, whose range is [0, 1]. FARE is published for 2/255 and 4/255. 0 switches the attack off.
        attack_norm (`str`, defaults to `"linf"`):
            `"linf"`, `"l2"` or `"l1"`.
        attack_steps (`int`, defaults to `10`):
            Gradient steps of the attack. 0 switches it off.
        attack_step_size (`float`, *optional*, defaults to `1/255`):
            Length of one step in raw pixels. `None`: chosen by [`~hf_robust.attacks.PGD`] from radius and steps.
        attack_random_start (`bool`, defaults to `True`):
            Start at a random point of the ball. FARE and Sim-CLIP need it: their gradient at the clean image is zero.
        attack_keep (`str`, defaults to `"last"`):
            `"last"` perturbation, as the authors take it, or the `"best"` (one forward more).
        eval_attack_steps (`int`, *optional*):
            Steps of the attack in evaluation. Default: `attack_steps`. 0: clean images.
        class_names (`list[str]`, *optional*):
            Names of the classes, in the order of the labels. Default: those of the dataset's label column, if it has some.
            Needed by `"tecoa"` and `"pmg_aft"`, and for zero-shot accuracy in evaluation.
        prompt_templates (`list[str]`, defaults to `["a photo of a {}."]`):
            Texts with `{}` for the name of a class; the normalised features of several are averaged.
        logit_scale (`float`, defaults to `100.0`):
            What similarities are multiplied by before the softmax.
        pmg_generalization_weight (`float`, defaults to `1.0`):
            Weight of the divergence from the frozen tower in `"pmg_aft"`.
        pmg_clean_weight (`float`, defaults to `1.0`):
            Weight of the divergence from the answer to the clean image in `"pmg_aft"`.
        learning_rate (`float`, defaults to `1e-5`), weight_decay (`float`, defaults to `1e-4`), lr_scheduler_type (`str`,
        defaults to `"cosine"`), warmup_steps (`float`, defaults to `0.07`):
            FARE's; its warm-up is 1,400 of 20,000 steps.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=0.07, metadata={"help": "Warm-up: steps, or a share of all if below 1."})

    loss_type: str = field(default="fare", metadata={"help": "Loss: fare, tecoa, pmg_aft or sim_clip."})
    attack_epsilon: float = field(
        default=2 / 255, metadata={"help": "Radius of the attack in raw [0, 1] pixels. 0: no attack."}
    )
    attack_norm: str = field(default="linf", metadata={"help": "Norm of the ball: linf, l2 or l1."})
    attack_steps: int = field(default=10, metadata={"help": "Gradient steps of the attack. 0: no attack."})
    attack_step_size: float | None = field(
        default=1 / 255, metadata={"help": "Length of one step in raw [0, 1] pixels. Default: 1/255."}
    )
    attack_random_start: bool = field(default=True, metadata={"help": "Start at a random point of the ball."})
    attack_keep: str = field(default="last", metadata={"help": "Perturbation to keep: last or best."})
    eval_attack_steps: int | None = field(
        default=None, metadata={"help": "Steps of the attack in evaluation. Default: attack_steps. 0: clean images."}
    )
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the classes. Default: those of the dataset's label column."}
    )
    prompt_templates: list[str] = field(
        default_factory=lambda: ["a photo of a {}."], metadata={"help": "Texts with {} for the name of a class."}
    )
    logit_scale: float = field(
        default=LOGIT_SCALE, metadata={"help": "What similarities are multiplied by before the softmax."}
    )
    pmg_generalization_weight: float = field(
        default=1.0, metadata={"help": "pmg_aft: weight of the divergence from the frozen tower."}
    )
    pmg_clean_weight: float = field(
        default=1.0, metadata={"help": "pmg_aft: weight of the divergence from the clean image's answer."}
    )

    def __post_init__(self) -> None:
        check_choice("loss_type", self.loss_type, CLIP_LOSSES)
        check_at_least("logit_scale", self.logit_scale, 1e-8, "CLIP's is 100.")
        for name in ("pmg_generalization_weight", "pmg_clean_weight"):
            check_at_least(name, getattr(self, name), 0, "Use 0 to leave the term out.")
        _check_texts("prompt_templates", self.prompt_templates, "'a photo of a {}.'")
        for template in self.prompt_templates:
            if "{}" not in template:
                raise ValueError(f"`prompt_templates` has {template!r}, which has no place `{{}}` for a class's name.")
        if self.class_names is not None:
            _check_texts("class_names", self.class_names, "'cat', in the order of the labels")
        # What is wrong with a file or command line is to be said before a model is loaded
        self.build_attack()
        if self.eval_attack_steps is not None:
            self.build_attack(self.eval_attack_steps, name="eval_attack_steps")
        if self.needs_random_start and self.attack_epsilon > 0 and self.attack_steps > 0:
            if not self.attack_random_start:
                raise ValueError(
                    f"`attack_random_start=False` with `loss_type={self.loss_type!r}`: its gradient at the clean image is "
                    "zero, so that the attack would never leave it. Set `attack_random_start=True`."
                )
        super().__post_init__()

    @property
    def needs_random_start(self) -> bool:
        """Whether the loss has no gradient at the clean image (FARE: not before the tower has moved)."""
        return self.loss_type in ("fare", "sim_clip")

    def build_attack(
        self, steps: int | None = None, *, image_processor: Any = None, name: str = "attack_steps"
    ) -> PGD | None:
        """
        The attack that these fields describe; `None` if it is off.

        Args:
            steps: number of steps, if not `attack_steps`.
            image_processor: whose mean and standard deviation normalise the images; `None`: raw pixels.
            name: the argument that errors about `steps` should name.

        Raises:
            ValueError: a field is out of range or unknown; the message names it.
        """
        steps = self.attack_steps if steps is None else steps
        check_count(name, steps, 0, "Use 0 to switch the attack off.")
        check_at_least("attack_epsilon", self.attack_epsilon, 0, "Use 0 to switch the attack off.")
        try:
            attack = PGD(
                epsilon=self.attack_epsilon,
                norm=self.attack_norm,
                steps=max(int(steps), 1),
                step_size=self.attack_step_size,
                random_start=self.attack_random_start,
                image_processor=image_processor,
                keep=self.attack_keep,
                fixed_starts=False,
            )
        except ValueError as error:
            message = str(error).replace("`steps=", f"`{name}=")
            for argument in ("epsilon", "norm", "step_size", "keep"):
                message = message.replace(f"`{argument}=", f"`attack_{argument}=")
            raise ValueError(message) from None
        return attack if self.attack_epsilon > 0 and steps > 0 else None


def _check_texts(name: str, texts: object, example: str) -> None:
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`{name}={texts!r}` must be a list of texts: give one at least, such as {example}.")
