"""Configuration of [`AdversarialTrainer`]."""

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_robust.threats import check_at_least, check_choice, check_count
from hf_robust.trainers.adversarial_recipes import LOSS_TYPES, NORMS, RECIPES, SAMPLE_WEIGHTINGS, Recipe
from hf_robust.trainers.adversarial_schedules import EPSILON_SCHEDULES, SLOW_START
from hf_robust.trainers.phases import RunArguments

_COUNTS = ("attack_steps", "num_replays", "collapse_guard_steps", "collapse_guard_rows", "eval_attack_steps")


@dataclass(repr=False)
class AdversarialConfig(RunArguments, TrainingArguments):
    """
    Configuration of [`AdversarialTrainer`]: all of [`~transformers.TrainingArguments`] and the fields below. What is left
    unset is taken from the method's paper.

    `lr_scheduler_type` also takes `"slow_start_fast_decay"` (arXiv 2012.13628), whose `lr_scheduler_kwargs` are `peak_at`
    (share of the training at which the peak is reached, 0.5; `warmup_steps` goes before it), `start_factor` (0) and
    `end_factor` (0.01).

    Parameters:
        loss_type (`str`, defaults to `"pgd_at"`):
            `"pgd_at"`, `"trades"`, `"mart"`, `"fast_at"`, `"n_fgsm"`, `"grad_align"`, `"free_at"`, `"vat"`; for text also
            `"freelb"` and `"smart"`.
        epsilon (`float`, *optional*):
            Radius: on images in raw [0, 1] pixels, whatever the image processor normalises; on text in mean L2 norms of the
            embedding rows. 0 is [`~transformers.Trainer`], bit for bit. Default: 8/255 (TRADES and MART: 0.031); 0.1 on text,
            which is FreeLB's size for every method (SMART's authors take 1e-5 in L∞, absolute).
        epsilon_relative (`bool`, defaults to `True`):
            On text, whether `epsilon` and `attack_step_size` count in mean embedding norms; embedding units otherwise.
        norm (`str`, *optional*):
            `"linf"`, `"l2"` or `"l1"` of a sample; on text also `"l2_token"`, of each token. Default: `"linf"` on images,
            `"l2"` on text.
        attack_steps (`int`, *optional*):
            Gradient steps of the inner search: 7 (PGD-AT), 10 (TRADES, MART), 1 (one-step methods, VAT's power iteration,
            SMART), 3 (FreeLB's passes). Free AT has `num_replays` instead.
        attack_step_size (`float`, *optional*):
            Length of a step, in the unit of `epsilon`. Default, as a share of `epsilon`: 0.25 (PGD-AT), 0.226 (TRADES, MART),
            1.25 (Fast AT), 0.5 (FreeLB; ours), 1 (all others).
        random_start (`bool`, *optional*):
            Whether the search starts from the method's random point or from zero. Default: the method's.
        beta (`float`, *optional*):
            Weight of the outer loss's second term: 6 (TRADES), 5 (MART), 0.2 (GradAlign), 1 (VAT, SMART).
        vat_xi (`float`, defaults to `1e-2`):
            L2 length at which VAT's power iteration measures the divergence, in raw pixels or embedding units. The authors
            take 1e-6, where the rounding of float32 logits outweighs the divergence and the direction is mostly noise (a
            popular reimplementation takes 10). Under bf16 and fp16 take about 1. (SMART starts at noise of 1e-5, which bf16
            and fp16 round away in many rows: train it in float32.)
        num_replays (`int`, defaults to `8`):
            Free AT's m: optimizer steps on each batch. Divide `num_train_epochs` by it for the paper's cost. The perturbation
            is carried on from replay to replay and, where the shape stays, from batch to batch.
        proximal_weight (`float`, defaults to `0.0`):
            Weight of SMART's second term, the divergence from an exponential average of the weights (0.99, after a tenth of
            the training 0.999; the paper's weight is 1). Off by default, which is SMART's smoothness term alone: the average
            follows over a thousand steps, so that in a short training the term holds the model at its untrained head. It
            costs a forward of the clean rows and a float32 copy of the trained weights.
        clean_weight (`float`, defaults to `0.0`):
            Share of the clean cross-entropy in the loss, mixed with the method's own: 0 is the method alone.
        sample_weighting (`str`, defaults to `"none"`):
            `"weat"` (1 / log(1 + exp|E|) by the energy of the clean input if the method has it, else of the adversarial one)
            or `"kl_dro"` (∝ exp(loss / `dro_temperature`) among the rows of one forward on all processes).
        dro_temperature (`float`, defaults to `1.0`):
            See `sample_weighting`.
        epsilon_schedule (`str`, defaults to `"constant"`):
            `"linear"` or `"cosine"`: the radius, and steps with it, grow to their full size over `epsilon_warmup_steps`.
        epsilon_warmup_steps (`float`, defaults to `0.5`):
            Optimizer steps of that growth; below 1: share of the training.
        collapse_guard (`bool`, *optional*):
            Whether to watch for catastrophic overfitting: PGD-5 on some training rows every `collapse_guard_steps`; at a drop
            of more than `collapse_threshold` training stops with the last good weights. Default: for one-step methods.
        collapse_guard_steps (`int`, defaults to `100`):
            Optimizer steps between two looks, of which there are four at least; the last step is looked at too.
        collapse_guard_rows (`int`, defaults to `128`):
            Training rows it looks at, always the same.
        collapse_threshold (`float`, defaults to `0.2`):
            Drop of robust accuracy below the best so far, as a share of the rows (Fast AT's 20 points).
        eval_attack_steps (`int`, defaults to `20`):
            PGD steps of `evaluate()`, which reports `eval_robust_accuracy` and `eval_clean_accuracy`; 0: no attack.
        eval_epsilon (`float`, *optional*):
            Radius of that attack. Default: `epsilon`.
    """

    loss_type: str = field(default="pgd_at", metadata={"help": f"Method: {', '.join(LOSS_TYPES)}."})
    epsilon: float | None = field(
        default=None, metadata={"help": "Radius, in raw [0, 1] pixels or mean embedding norms. 0: no attack."}
    )
    epsilon_relative: bool = field(
        default=True, metadata={"help": "Text: whether epsilon counts in mean embedding norms."}
    )
    norm: str | None = field(default=None, metadata={"help": f"Norm of the ball: {', '.join(NORMS)}."})
    attack_steps: int | None = field(default=None, metadata={"help": "Gradient steps of the inner search."})
    attack_step_size: float | None = field(default=None, metadata={"help": "Length of a step, in the unit of epsilon."})
    random_start: bool | None = field(
        default=None, metadata={"help": "Whether the search starts at random. Default: the method's."}
    )
    beta: float | None = field(default=None, metadata={"help": "Weight of the loss's second term."})
    vat_xi: float = field(default=1e-2, metadata={"help": "Length of VAT's finite difference."})
    num_replays: int = field(default=8, metadata={"help": "Free AT's optimizer steps on each batch."})
    proximal_weight: float = field(
        default=0.0,
        metadata={"help": "SMART: weight of the divergence from the average of the weights. 1 in the paper."},
    )
    clean_weight: float = field(default=0.0, metadata={"help": "Share of the clean cross-entropy in the loss."})
    sample_weighting: str = field(
        default="none", metadata={"help": f"Weights of the rows: {', '.join(SAMPLE_WEIGHTINGS)}."}
    )
    dro_temperature: float = field(default=1.0, metadata={"help": "Temperature of kl_dro's weights."})
    epsilon_schedule: str = field(
        default="constant", metadata={"help": f"Growth of the radius: {', '.join(EPSILON_SCHEDULES)}."}
    )
    epsilon_warmup_steps: float = field(
        default=0.5, metadata={"help": "Steps of that growth; below 1: share of the training."}
    )
    collapse_guard: bool | None = field(
        default=None, metadata={"help": "Watch for collapse. Default: for one-step methods."}
    )
    collapse_guard_steps: int = field(default=100, metadata={"help": "Optimizer steps between two looks."})
    collapse_guard_rows: int = field(default=128, metadata={"help": "Training rows that the guard looks at."})
    collapse_threshold: float = field(default=0.2, metadata={"help": "Drop of robust accuracy that is a collapse."})
    eval_attack_steps: int = field(default=20, metadata={"help": "PGD steps in evaluation. 0: no attack."})
    eval_epsilon: float | None = field(default=None, metadata={"help": "Radius in evaluation. Default: epsilon."})

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("loss_type", self.loss_type, LOSS_TYPES),
            ("sample_weighting", self.sample_weighting, SAMPLE_WEIGHTINGS),
            ("epsilon_schedule", self.epsilon_schedule, EPSILON_SCHEDULES),
        ):
            check_choice(name, value, choices)
        if self.norm is not None:
            check_choice("norm", self.norm, NORMS)
        recipe = self.recipe
        self._check_numbers(recipe)
        if (
            recipe.start == "power"
            and self.random_start is False
            or recipe.objective != "ce"
            and self.random_start is False
        ):
            raise ValueError(
                f"`random_start=False` cannot be combined with `loss_type={self.loss_type!r}`: its divergence has no gradient "
                "at zero. Leave it unset."
            )
        if self.beta is not None and recipe.beta is None:
            raise ValueError(
                f"`beta={self.beta!r}` has no term to weigh in `loss_type={self.loss_type!r}`: leave it unset, or use one of "
                f"{', '.join(repr(name) for name, other in RECIPES.items() if other.beta is not None)}."
            )
        if self.proximal_weight and self.loss_type != "smart":
            raise ValueError(
                f"`proximal_weight={self.proximal_weight!r}` is a term of SMART, not of `loss_type={self.loss_type!r}`: "
                "leave it unset, or use 'smart'."
            )
        if self.loss_type == "free_at" and self.attack_steps is not None:
            raise ValueError(
                f"`attack_steps={self.attack_steps!r}` does not apply to `loss_type='free_at'`, which makes one step in each "
                "replay: set `num_replays`."
            )
        # The parent knows its own schedulers only
        slow = vars(self)["lr_scheduler_type"] == SLOW_START
        if slow:
            self.lr_scheduler_type = "constant"
        super().__post_init__()
        if slow:
            self.lr_scheduler_type = SLOW_START
            # The parent has made a dict of what a command line or a file gave as text
            for name in dict(self.lr_scheduler_kwargs or {}):
                check_choice("lr_scheduler_kwargs", name, ("peak_at", "start_factor", "end_factor"))

    def _check_numbers(self, recipe: Recipe) -> None:
        for name, least, remedy in (
            ("epsilon", 0, "Use 0 for no attack; 8/255 is the usual radius on images."),
            ("eval_epsilon", 0, "Leave it unset for the radius of training."),
            ("attack_steps", 1, "Use `epsilon=0` for no attack."),
            ("attack_step_size", 0, "Give the length of a step, in the unit of `epsilon`."),
            ("beta", 0, f"The paper takes {recipe.beta}."),
            ("vat_xi", 1e-12, "1e-2 suits float32."),
            ("num_replays", 1, "The paper takes 8."),
            ("proximal_weight", 0, "SMART takes 1; 0 leaves the term out."),
            ("clean_weight", 0, "It is a share, between 0 and 1."),
            ("dro_temperature", 1e-6, "The larger, the more equal the weights."),
            ("epsilon_warmup_steps", 0, "Give steps, or a share of the training below 1."),
            ("collapse_guard_steps", 1, "Give the number of optimizer steps between two looks."),
            ("collapse_guard_rows", 1, "Give a number of training rows."),
            ("collapse_threshold", 0, "Fast AT takes 0.2."),
            ("eval_attack_steps", 0, "Use 0 for no attack in evaluation."),
        ):
            value = getattr(self, name)
            if value is not None:
                check: Callable[..., None] = check_count if name in _COUNTS else check_at_least
                check(name, value, least, remedy)
        if self.clean_weight > 1:
            raise ValueError(f"`clean_weight={self.clean_weight!r}` must be at most 1: it is a share of the loss.")

    @property
    def recipe(self) -> Recipe:
        """The method that `loss_type` names."""
        return RECIPES[self.loss_type]

    @property
    def is_guarded(self) -> bool:
        """Whether the collapse guard is on."""
        return self.recipe.is_guarded if self.collapse_guard is None else self.collapse_guard

    @property
    def second_weight(self) -> float:
        """Weight of the outer loss's second term; 0 if it has none."""
        return (self.recipe.beta or 0.0) if self.beta is None else self.beta
