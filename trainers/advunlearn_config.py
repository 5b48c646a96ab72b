"""Configuration of [`AdvUnlearnTrainer`]."""

import dataclasses
from dataclasses import dataclass, field

from hf_robust.attacks.diffusion.concept_embedding import METHODS, ConceptEmbeddingAttack
from hf_robust.data.retain_prompts import OBJECTS
from hf_robust.threats import check_at_least, check_choice, check_count
from hf_robust.trainers.diffusion_config import DiffusionConfig

ATTACK_POSITIONS = ("prefix", "suffix", "replace", "insert", "per_word")
RETAIN_MODES = ("regularizer", "step")
# Items of the latent bank where nobody says how many: with 1000 iterations of the published recipe, about a twentieth of
# the UNet's work of drawing everything anew
_BANK_SIZE = 1024
# Fields of the parent that say something of images with captions, or of its own adversary
_OF_IMAGES = (
    "image_column", "caption_column", "image_size", "image_resize", "caption_truncation", "caption_dropout", "noise_policy",
    "attack_site", "attack_epsilon_relative", "attack_step_rule", "attack_norm", "attack_init", "adversarial_weight",
)  # fmt: skip


@dataclass(repr=False)
class AdvUnlearnConfig(DiffusionConfig):
    """
    Configuration of [`AdvUnlearnTrainer`]: [`DiffusionConfig`] without what concerns images and captions, and the fields
    below, whose defaults are those of arXiv 2405.15234 and its released code. ESD (arXiv 2303.07345) is `attack="none"`
    with `retain_weight=0`.

    Parameters:
        concepts (`list[str]`, *optional*):
            What is erased, one or several. They are the training prompts too, unless `train_dataset` gives others.
        train_parts (`list[str]`, *optional*):
            What is trained: `["text_encoder"]` (all layers and the final norm; the paper's) or a part of the UNet, `"xattn"`,
            `"noxattn"`, `"selfattn"`, `"full"` (ESD's). Default: the text encoder, and with a `peft_config` nothing but the
            adapter.
        text_encoder_layers (`int`, *optional*):
            Train the text encoder's first layers only, that many. Default: all.
        negative_guidance (`float`, defaults to `1.0`):
            η: how far the target lies on the other side of the unconditional prediction.
        retain_prompts (`list[str]`, defaults to `["objects"]`):
            What is to be kept: prompts; one path of a .txt, .json or .csv file; or `"objects"`, "a photo of {object}" over
            built-in names, those that share a word with a concept (with a training prompt, where no concept is named) left
            out.
        retain_exclude_words (`list[str]`, *optional*):
            Further words that drop a built-in object.
        retain_weight (`float`, defaults to `1.0`):
            γ. The published command for nudity has 0.3. 0 retains nothing.
        retain_batch_size (`int`, defaults to `5`):
            Retain prompts of each row, all different.
        retain_mode (`str`, defaults to `"regularizer"`):
            `"regularizer"`: in the same optimizer step as the erasing; `"step"`: erasing and retaining take turns, so that
            an iteration is two of `max_steps`.
        attack (`str`, defaults to `"adam"`):
            `"adam"` (unbounded, the released form), `"pgd"` (in a ball), `"fast"` (one step) or `"none"`, see
            [`~hf_robust.attacks.diffusion.ConceptEmbeddingAttack`].
        attack_steps (`int`, defaults to `30`):
            Gradient steps of the attack.
        attack_step_size (`float`, *optional*):
            `"adam"`: largest change of a coordinate in a step, 1e-3 by default. `"pgd"`: a share of the radius, by default
            `min(1, 2.5 / attack_steps)`.
        attack_epsilon (`float`, defaults to `1.0`):
            Radius of the ball of `"pgd"` and `"fast"`, in L2 norms of the embedding that the search starts from.
        attack_position (`str`, defaults to `"prefix"`):
            Where the attacked tokens are: `"prefix"`, `"suffix"`, `"replace"` (instead of the concept's tokens), `"insert"`
            (before them) or `"per_word"` (one token before every `attack_tokens` BPE tokens of the prompt).
        attack_tokens (`int`, defaults to `1`):
            Number of attacked tokens; under `"per_word"`, of BPE tokens of the prompt for each of them. Counted in tokens,
            not in words.
        attack_warmup_steps (`int`, defaults to `200`):
            Iterations before the first with an attack.
        reference_compat (`bool`, defaults to `False`):
            Reproduce the released attack loop's faults, see [`~hf_robust.attacks.diffusion.ConceptEmbeddingAttack`].
        sampling_steps (`int`, defaults to `50`):
            DDIM steps of the sampling that latents are taken from.
        sampling_guidance (`float`, defaults to `3.0`):
            Its guidance scale.
        latent_bank_size (`int`, *optional*):
            Latents that are drawn beforehand, with the frozen UNet's predictions, half of them for the concepts and half to
            retain; a half that is smaller than the list of retain prompts holds the first of them only. Default: 1024 while
            the UNet is frozen, or what an item for each prompt takes where that is more. 0 draws all anew, as the released
            code does; with the UNet in training there is no other way.
        latent_bank_batch_size (`int`, defaults to `16`):
            Latents drawn together.
        latent_bank_refresh_steps (`int`, defaults to `0`):
            Optimizer steps after which the bank is drawn anew. 0: never.
        latent_bank_dir (`str`, *optional*):
            Folder in which the bank is kept for further runs with the same weights, prompts and settings.
        max_steps (`int`, defaults to `1000`):
            Optimizer steps.
    """

    concepts: list[str] | None = field(default=None, metadata={"help": "What is erased."})
    train_parts: list[str] | None = field(
        default=None,
        metadata={"help": "Trained part: text_encoder, xattn, noxattn, selfattn or full. Default: text_encoder."},
    )
    negative_guidance: float = field(default=1.0, metadata={"help": "Negative guidance of the target (eta)."})
    retain_prompts: list[str] = field(
        default_factory=lambda: [OBJECTS],
        metadata={"help": "What is kept: prompts, the path of a file, or 'objects' for built-in names."},
    )
    retain_exclude_words: list[str] | None = field(
        default=None, metadata={"help": "Words that drop a built-in object, beside the concepts'."}
    )
    retain_weight: float = field(default=1.0, metadata={"help": "Weight of what is kept (gamma). 0: nothing is."})
    retain_batch_size: int = field(default=5, metadata={"help": "Retain prompts of each row."})
    retain_mode: str = field(default="regularizer", metadata={"help": "regularizer (same step) or step (in turns)."})
    attack: str = field(default="adam", metadata={"help": f"Attack: {', '.join(METHODS)}."})
    attack_steps: int = field(default=30, metadata={"help": "Gradient steps of the attack."})
    attack_step_size: float | None = field(
        default=None, metadata={"help": "adam: step of a coordinate (1e-3). pgd: share of the radius."}
    )
    attack_epsilon: float = field(
        default=1.0, metadata={"help": "Radius for pgd and fast, in norms of the embedding started from."}
    )
    attack_position: str = field(
        default="prefix", metadata={"help": f"Place of the attacked tokens: {', '.join(ATTACK_POSITIONS)}."}
    )
    attack_tokens: int = field(default=1, metadata={"help": "Number of attacked tokens."})
    attack_warmup_steps: int = field(default=200, metadata={"help": "Iterations before the first with an attack."})
    reference_compat: bool = field(default=False, metadata={"help": "Reproduce the faults of the released attack."})
    sampling_steps: int = field(default=50, metadata={"help": "DDIM steps of the sampling that gives the latents."})
    sampling_guidance: float = field(default=3.0, metadata={"help": "Guidance scale of that sampling."})
    latent_bank_size: int | None = field(
        default=None, metadata={"help": "Latents drawn beforehand. Default: 1024; with the UNet in training 0."}
    )
    latent_bank_batch_size: int = field(default=16, metadata={"help": "Latents drawn together."})
    latent_bank_refresh_steps: int = field(
        default=0, metadata={"help": "Optimizer steps after which the bank is drawn anew. 0: never."}
    )
    latent_bank_dir: str | None = field(default=None, metadata={"help": "Folder that keeps the bank for further runs."})
    # The paper's
    max_steps: int = field(default=1000, metadata={"help": "Optimizer steps."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Prompts of the concepts on each device."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate (Adam)."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of the learning rate."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Norm to which gradients are clipped. 0: not at all."})

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if f.name in _OF_IMAGES and getattr(self, f.name) != f.default:
                raise ValueError(
                    f"`{f.name}={getattr(self, f.name)!r}` concerns images with captions, or the adversary of "
                    "DiffusionTrainer, and has no meaning in AdvUnlearn: leave it out."
                )
        for name in ("concepts", "retain_prompts", "retain_exclude_words"):
            value = getattr(self, name)
            if isinstance(value, str):
                setattr(self, name, [value])
            elif (value is not None or name == "retain_prompts") and (
                not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value)
            ):
                raise ValueError(f"`{name}={value!r}` has to be a list of strings.")
        if not all(concept.strip() for concept in self.concepts or ()):
            raise ValueError(f"`concepts={self.concepts!r}` holds an empty one: name what is to be erased.")
        check_choice("retain_mode", self.retain_mode, RETAIN_MODES)
        check_choice("attack_position", self.attack_position, ATTACK_POSITIONS)
        check_at_least("retain_weight", self.retain_weight, 0, "Use 0 to retain nothing.")
        check_at_least("negative_guidance", self.negative_guidance, 0, "The paper uses 1.")
        check_at_least("sampling_guidance", self.sampling_guidance, 0, "The authors use 3.")
        for name, minimum in (
            ("retain_batch_size", 1),
            ("attack_tokens", 1),
            ("attack_warmup_steps", 0),
            ("sampling_steps", 1),
            ("latent_bank_batch_size", 1),
            ("latent_bank_refresh_steps", 0),
            ("latent_bank_size", 0),
            ("max_steps", -1),
        ):
            value = getattr(self, name)
            if value is not None or name != "latent_bank_size":
                check_count(name, value, minimum, "Leave it out for the default.")
        if self.retain_mode == "step" and not self.retain_weight:
            raise ValueError("`retain_mode='step'` with `retain_weight=0` has steps without a loss: use 'regularizer'.")
        super().__post_init__()

    def build_attack(self) -> ConceptEmbeddingAttack:
        """
        The attack that these fields describe.

        Raises:
            ValueError: a field is out of range or unknown; the message names it.
        """
        try:
            return ConceptEmbeddingAttack(
                method=self.attack,
                steps=self.attack_steps,
                step_size=self.attack_step_size,
                epsilon=self.attack_epsilon,
                reference_compat=self.reference_compat,
            )
        except ValueError as error:
            message = str(error).replace("`method=", "`attack=")
            for name in ("steps", "step_size", "epsilon"):
                message = message.replace(f"`{name}=", f"`attack_{name}=")
            raise ValueError(message) from None

    def bank_size(self, unet_is_trained: bool) -> int:
        """
        Items of the latent bank; where nobody says how many, the trainer takes more if there are more prompts.

        Args:
            unet_is_trained: whether any weight of the UNet is.

        Raises:
            ValueError: a bank, and a UNet in training.
        """
        if self.latent_bank_size is None:
            return 0 if unet_is_trained else _BANK_SIZE
        if unet_is_trained and self.latent_bank_size:
            raise ValueError(
                f"`latent_bank_size={self.latent_bank_size!r}` with the UNet in training: its latents change with every step, "
                "so a bank of them would be wrong. Use 0 (or leave it out), or train the text encoder alone."
            )
        return self.latent_bank_size
