"""Configuration of [`UnlearnTrainer`]."""

import copy
from dataclasses import dataclass, field

from transformers import TrainingArguments
from trl import SFTConfig

from hf_robust.objectives.unlearning import FORGET_LOSSES, RETAIN_LOSSES
from hf_robust.threats import check_at_least, check_choice, check_count, check_number
from hf_robust.trainers.attack_arguments import take_over
from hf_robust.trainers.phases import RunArguments
from hf_robust.trainers.unlearn_robust import RobustArguments, refuse_unused

# Losses that compare with the model before training
REFERENCE_LOSSES = ("npo", "undial")
# What the methods differ in, where a field is left unset: those of the papers and their released code
_BETA = {"npo": 0.1, "simnpo": 4.5, "undial": 10.0}
_FORGET_WEIGHT = {"simnpo": 0.125}
_RETAIN_WEIGHT = {"undial": 0.0, "ce_u": 0.0}
# Fields of one loss only. `activation_layer` is none of them: it fits a model, whatever the loss
_OWN_FIELDS = {"simnpo": ("simnpo_delta",), "ce_u": ("ce_u_skip_tokens",), "rmu": ("rmu_coefficient",)}


@dataclass(repr=False)
class UnlearnConfig(RobustArguments, RunArguments, SFTConfig):
    """
    Configuration of [`UnlearnTrainer`]: all of [`~trl.SFTConfig`], whose `loss_type` has another meaning here, the fields of
    [`RobustArguments`], and those below.

    Parameters:
        loss_type (`str`, defaults to `"npo"`):
            How the forget rows are forgotten: `"grad_diff"` (arXiv 2203.12817), `"npo"` (2404.05868), `"simnpo"` (2410.07163),
            `"rmu"` (2403.03218), `"undial"` (2402.10052) or `"ce_u"` (2503.01224).
        retain_type (`str`, *optional*):
            How the retain rows are kept: `"ce"` (cross-entropy), `"kl"` (KL from the model before training, at the label
            tokens) or `"activation"` (mean squared difference of hidden states from those before training, behind
            `activation_layer`, at the label tokens). Default: `"activation"` for `"rmu"`, `"ce"` for the others.
        forget_weight (`float`, *optional*):
            Weight of the forget loss (gamma). Default: 0.125 for `"simnpo"` as in its released code, 1 for the others.
        retain_weight (`float`, *optional*):
            Weight of the retain loss (alpha); 0 runs no retain rows. Default: 0 for `"undial"` and `"ce_u"`, whose papers use
            none, 1 for the others.
        beta (`float`, *optional*):
            Inverse temperature of `"npo"` (default 0.1) and `"simnpo"` (default 4.5), or what `"undial"` takes off the true
            token's logit (default 10); the papers' or their released code's. Others have none.
        simnpo_delta (`float`, defaults to `0.0`):
            Margin of `"simnpo"`, in nats per token; 0 as in its released code.
        ce_u_skip_tokens (`int`, defaults to `0`):
            Label tokens at the beginning of each answer that `"ce_u"` leaves alone. The paper leaves out one on TOFU, whose
            answers are sentences; of a one-word answer that would leave nothing.
        rmu_coefficient (`float`, defaults to `2.0`):
            Length that `"rmu"` steers hidden states to (c). It has to be of the order of the states' own norm behind
            `activation_layer`: the authors take 6.5 for Zephyr-7B and 300 for Mixtral-8x7B.
        rmu_weights (`list[str]`, *optional*):
            Names of weights, or of modules, that `"rmu"` trains, in full or from any dot on, such as
            `"layers.5.mlp.down_proj"`; everything else is frozen, adapters included. Default: the `down_proj` of
            `activation_layer` and of the two layers before it, as the authors.
        activation_layer (`int`, defaults to `7`):
            Layer behind which `"rmu"` and `retain_type="activation"` look at hidden states, counted from 0 (negative: from
            the end). 7 as the authors, for models of 32 layers.
        precompute_ref_log_probs (`bool`, defaults to `False`):
            Of a full model trained with `"npo"` and `retain_type="ce"`: compute the forget rows' log-likelihoods before
            training, once, instead of keeping a frozen copy of the model.
    """

    loss_type: str = field(default="npo", metadata={"help": f"Forget loss: {', '.join(FORGET_LOSSES)}."})
    retain_type: str | None = field(
        default=None,
        metadata={"help": f"Retain loss: {', '.join(RETAIN_LOSSES)}. Default: activation for rmu, else ce."},
    )
    forget_weight: float | None = field(
        default=None, metadata={"help": "Weight of the forget loss. Default: 0.125 for simnpo, else 1."}
    )
    retain_weight: float | None = field(
        default=None, metadata={"help": "Weight of the retain loss. Default: 0 for undial and ce_u, else 1."}
    )
    beta: float | None = field(
        default=None, metadata={"help": "Beta of npo (0.1), simnpo (4.5) and undial (10). Default: in brackets."}
    )
    simnpo_delta: float = field(default=0.0, metadata={"help": "Margin of simnpo, in nats per token."})
    ce_u_skip_tokens: int = field(
        default=0, metadata={"help": "Label tokens at the beginning of an answer that ce_u leaves alone."}
    )
    rmu_coefficient: float = field(default=2.0, metadata={"help": "Length that rmu steers hidden states to."})
    rmu_weights: list[str] | None = field(
        default=None,
        metadata={"help": "Weights or modules that rmu trains. Default: down_proj of activation_layer and two before."},
    )
    activation_layer: int = field(
        default=7, metadata={"help": "Layer behind which rmu and retain_type=activation look at hidden states."}
    )
    precompute_ref_log_probs: bool = field(
        default=False, metadata={"help": "npo on a full model: log-likelihoods beforehand instead of a frozen copy."}
    )

    def __post_init__(self) -> None:
        check_choice("loss_type", self.loss_type, FORGET_LOSSES)
        kind = self.loss_type
        if self.retain_type is not None and self.retain_weight is None and not _RETAIN_WEIGHT.get(kind, 1.0):
            raise ValueError(
                f"`retain_type={self.retain_type!r}` without `retain_weight`: with `loss_type={kind!r}` that is 0 by default, "
                "as in the paper, and no retain row is trained on. Set `retain_weight=1`, or leave `retain_type` unset."
            )
        if self.retain_type is None:
            self.retain_type = "activation" if kind == "rmu" else "ce"
        check_choice("retain_type", self.retain_type, RETAIN_LOSSES)
        if self.forget_weight is None:
            self.forget_weight = _FORGET_WEIGHT.get(kind, 1.0)
        if self.retain_weight is None:
            self.retain_weight = _RETAIN_WEIGHT.get(kind, 1.0)
        if self.beta is None:
            self.beta = _BETA.get(kind)
        elif kind not in _BETA:
            raise ValueError(f"`beta={self.beta!r}`: `loss_type={kind!r}` has no beta. Leave it unset.")
        if self.beta is not None:
            check_at_least("beta", self.beta, 1e-6, f"{_BETA[kind]:g} is the default of {kind!r}.")
        check_at_least("forget_weight", self.forget_weight, 1e-12, "To train on retain rows alone use `SFTTrainer`.")
        check_at_least("retain_weight", self.retain_weight, 0, "Use 0 to leave the term out.")
        check_count("ce_u_skip_tokens", self.ce_u_skip_tokens, 0, "Use 0 to forget the whole answer.")
        if isinstance(self.activation_layer, bool) or not isinstance(self.activation_layer, int):
            raise ValueError(f"`activation_layer={self.activation_layer!r}` must be the number of a layer, such as 7.")
        check_number("simnpo_delta", self.simnpo_delta, "The released code takes 0.")
        check_at_least("rmu_coefficient", self.rmu_coefficient, 0, "Use about the norm of the hidden states.")
        refuse_unused(self, "loss_type", _OWN_FIELDS)
        if self.rmu_weights is not None and (kind != "rmu" or not self.rmu_weights):
            raise ValueError(
                f"`rmu_weights={self.rmu_weights!r}` needs `loss_type='rmu'` and one name at least: leave it unset, or name "
                "weights such as 'layers.5.mlp.down_proj'. Other losses train what `peft_config` says, or everything."
            )
        if self.precompute_ref_log_probs and not (
            kind == "npo" and (self.retain_type == "ce" or not self.retain_weight)
        ):
            raise ValueError(
                f"`precompute_ref_log_probs=True` serves `loss_type='npo'` with `retain_type='ce'` alone; `loss_type={kind!r}` "
                f"with `retain_type={self.retain_type!r}` compares with more than that, or with nothing. Leave it off."
            )
        super().__post_init__()

    @property
    def attacks_answers(self) -> bool:
        """Whether the latent attack moves label tokens too: RMU looks at nothing else."""
        return self.loss_type == "rmu"

    @property
    def forget_reference(self) -> bool:
        """Whether the forget loss compares with the model before training."""
        return self.loss_type in REFERENCE_LOSSES

    @property
    def retain_reference(self) -> bool:
        """Whether the retain loss compares with the model before training."""
        return bool(self.retain_weight) and self.retain_type != "ce"


def own_config(args: UnlearnConfig | TrainingArguments | None) -> UnlearnConfig:
    """
    The trainer's configuration from whatever the parent's script passes. An SFTConfig's `loss_type` names a loss that is
    fine-tuned with, not one that forgets.

    Args:
        args: see [`~hf_robust.trainers.attack_arguments.take_over`].
    """
    if isinstance(args, SFTConfig) and not isinstance(args, UnlearnConfig):
        args = copy.copy(args)
        args.loss_type = UnlearnConfig.loss_type
    return take_over(args, UnlearnConfig, "unlearned")
