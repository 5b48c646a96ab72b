"""Configuration of [`DiffusionTrainer`]."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_robust.threats import check_at_least, check_choice, check_count
from hf_robust.trainers.diffusion_attack import DenoisingAttack
from hf_robust.trainers.diffusion_data import RESIZES
from hf_robust.trainers.phases import RunArguments

TRUNCATIONS = ("error", "warn")


@dataclass(repr=False)
class DiffusionConfig(RunArguments, TrainingArguments):
    """
    Configuration of [`DiffusionTrainer`]: all of [`~transformers.TrainingArguments`] and the fields below. By default it is
    plain denoising fine-tuning of the UNet.

    Parameters:
        train_parts (`list[str]`, *optional*):
            Parts of the pipeline whose weights are trained: `"unet"`, `"text_encoder"`, or a part of the UNet: `"xattn"`,
            `"noxattn"`, `"selfattn"`, `"full"` (see [`~hf_robust.diffusion.parts.select_parameters`]). Default: `["unet"]`,
            and with a `peft_config` nothing but the adapters.
        text_encoder_layers (`int`, *optional*):
            With `"text_encoder"` among `train_parts`: its first layers only, that many. Default: all.
        image_column (`str`, defaults to `"image"`):
            Column with the images: PIL images, arrays, paths or `datasets.Image`.
        caption_column (`str`, defaults to `"text"`):
            Column with the captions.
        image_size (`int`, *optional*):
            Height and width of the training images, in pixels. Default: what the pipeline generates.
        image_resize (`str`, defaults to `"none"`):
            What is done with images of another size: `"none"` refuses them, `"crop"` scales the middle square, `"stretch"`
            scales the whole image.
        caption_truncation (`str`, defaults to `"error"`):
            What is done with captions longer than the text encoder takes: `"error"` refuses them, before training;
            `"warn"` cuts them off and says so.
        caption_dropout (`float`, defaults to `0.1`):
            Share of the rows trained on with an empty caption, as classifier-free guidance needs it (arXiv 2207.12598 finds
            0.1 and 0.2 best); for SDXL pipelines that want it so, with a conditioning of zeros.
        noise_policy (`str`, *optional*):
            Folder of a `noise_policy.json`, or the file: noise that is added to the outputs of the modules it names, in
            every training forward and in no evaluation. Names are those of `model.named_modules()`, e.g. `unet.mid_block`.
        attack_site (`str`, defaults to `"tokens"`):
            What the adversary moves: `"tokens"`, the embeddings of the caption's tokens before the text encoder, or
            `"conditioning"`, the text encoder's output at every position.
        attack_epsilon (`float`, defaults to `0.0`):
            Radius of the adversary's ball; 0, the default, is training without an adversary. The unit is the mean L2 norm of
            the rows of the token embedding table (`"tokens"`), or the mean L2 norm of the vectors of the row's own
            conditioning (`"conditioning"`); units of the embeddings themselves with `attack_epsilon_relative=False`.
        attack_epsilon_relative (`bool`, defaults to `True`):
            See `attack_epsilon`.
        attack_steps (`int`, defaults to `5`):
            Gradient steps that raise the denoising loss. Each costs a forward and a backward.
        attack_step_size (`float`, *optional*):
            Length of a step as a share of the radius. Default: `min(1, 2.5 / attack_steps)`.
        attack_step_rule (`str`, defaults to `"sign"`):
            `"sign"`, `"normalized"`, `"momentum"`, `"adam"` or `"rmsprop"`.
        attack_norm (`str`, defaults to `"l2_token"`):
            `"l2_token"` (a ball for every position), `"l2"` (one for the whole caption) or `"linf"`.
        attack_init (`str`, defaults to `"zero"`):
            Start of the search: `"zero"` or `"random"`.
        adversarial_weight (`float`, defaults to `1.0`):
            Share of the loss under attack, in (0, 1]; the rest is the loss on the rows as they are. 1 is adversarial
            training as in arXiv 1706.06083; less costs one forward more.
        remove_unused_columns (`bool`, defaults to `False`):
            Without effect: the columns used are those named above.
    """

    train_parts: list[str] | None = field(
        default=None,
        metadata={"help": "Trained parts: unet, text_encoder, xattn, noxattn, selfattn or full. Default: unet."},
    )
    text_encoder_layers: int | None = field(
        default=None, metadata={"help": "Train the text encoder's first layers only, that many. Default: all."}
    )
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    caption_column: str = field(default="text", metadata={"help": "Column with the captions."})
    image_size: int | None = field(
        default=None, metadata={"help": "Height and width of the images, in pixels. Default: the pipeline's."}
    )
    image_resize: str = field(
        default="none", metadata={"help": "Images of another size: none (refused), crop or stretch."}
    )
    caption_truncation: str = field(
        default="error", metadata={"help": "Captions that are too long: error (refused) or warn (cut off)."}
    )
    caption_dropout: float = field(default=0.1, metadata={"help": "Share of the rows with an empty caption."})
    noise_policy: str | None = field(
        default=None, metadata={"help": "Folder of a noise_policy.json: noise on the modules that it names."}
    )
    attack_site: str = field(default="tokens", metadata={"help": "What the adversary moves: tokens or conditioning."})
    attack_epsilon: float = field(
        default=0.0,
        metadata={"help": "Radius of the attack, in mean norms of token embeddings (or conditioning). 0: no attack."},
    )
    attack_epsilon_relative: bool = field(
        default=True,
        metadata={"help": "Whether attack_epsilon counts in mean norms. False: in the vectors' own units."},
    )
    attack_steps: int = field(default=5, metadata={"help": "Gradient steps of the attack."})
    attack_step_size: float | None = field(
        default=None,
        metadata={"help": "Length of one step as a share of the radius. Default: min(1, 2.5 / attack_steps)."},
    )
    attack_step_rule: str = field(
        default="sign", metadata={"help": "Step rule: sign, normalized, momentum, adam or rmsprop."}
    )
    attack_norm: str = field(default="l2_token", metadata={"help": "Norm of the ball: l2_token, l2 or linf."})
    attack_init: str = field(default="zero", metadata={"help": "Start of the attack: zero or random."})
    adversarial_weight: float = field(
        default=1.0, metadata={"help": "Share of the loss under attack; the rest is the plain loss."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Without effect: the columns used are image_column and caption_column."}
    )

    def __post_init__(self) -> None:
        check_choice("image_resize", self.image_resize, RESIZES)
        check_choice("caption_truncation", self.caption_truncation, TRUNCATIONS)
        check_at_least("caption_dropout", self.caption_dropout, 0, "0.1 is usual.")
        if self.caption_dropout > 1:
            raise ValueError(f"`caption_dropout={self.caption_dropout!r}` must be a share, from 0 to 1; 0.1 is usual.")
        check_at_least("adversarial_weight", self.adversarial_weight, 0, "1 is all under attack.")
        if not 0 < self.adversarial_weight <= 1:
            raise ValueError(
                f"`adversarial_weight={self.adversarial_weight!r}` must be in (0, 1]; `attack_epsilon=0` is training without "
                "an adversary."
            )
        if isinstance(self.train_parts, str):
            self.train_parts = [self.train_parts]
        if self.train_parts is not None:
            if not isinstance(self.train_parts, list | tuple) or not all(isinstance(p, str) for p in self.train_parts):
                raise ValueError(f"`train_parts={self.train_parts!r}` has to be a list of names, such as ['unet'].")
            if not self.train_parts:
                raise ValueError("`train_parts=[]` trains nothing: name a part, or leave it unset for the UNet.")
        for name in ("text_encoder_layers", "image_size"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1, "Leave it unset for all that there is.")
        if self.neftune_noise_alpha is not None:
            raise ValueError(
                f"`neftune_noise_alpha={self.neftune_noise_alpha!r}` is noise on a language model's embeddings, which a "
                "pipeline has not: leave it unset; a `noise_policy` names modules of any kind."
            )
        self.remove_unused_columns = False
        self.build_attack()
        super().__post_init__()

    def build_attack(self) -> Any:
        """
        The attack that these fields describe, a [`~hf_robust.trainers.diffusion_attack.DenoisingAttack`].

        Raises:
            ValueError: a field is out of range or unknown; the message names it.
        """
        names = ("site", "epsilon", "epsilon_relative", "steps", "step_size", "step_rule", "norm", "init")
        return DenoisingAttack(**{name: getattr(self, f"attack_{name}") for name in names})
