"""Configuration of [`CATTrainer`]."""

from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from hf_robust.threats import check_at_least, check_count, check_number
from hf_robust.trainers.attack_arguments import AttackArguments


@dataclass(repr=False)
class CATConfig(AttackArguments, SFTConfig):
    """
    Configuration of [`CATTrainer`]: all of [`~trl.SFTConfig`], the attack
    ([`~hf_robust.trainers.attack_arguments.AttackArguments`]) and the fields below, whose defaults are those of
    arXiv 2405.15589 (section 4 and the released configuration).

    Parameters:
        away_weight (`float`, defaults to `0.5`):
            Weight of `-CE(rejected | prompt + delta)`.
        toward_weight (`float`, defaults to `0.5`):
            Weight of `CE(chosen | prompt + delta)`.
        utility_weight (`float`, defaults to `1.0`):
            Weight of the parent's loss on the utility rows, which stay clean.
        away_cutoff (`float`, defaults to `-5.0`):
            Value (negative nats per token) of a row's away loss below which it falls at slope 0.001 only.
        toward_cutoff (`float`, defaults to `0.5`):
            Value (nats per token) of a row's toward loss below which it falls at slope 0.001 only.
        adversarial_fraction (`float`, defaults to `0.125`):
            Share of adversarial rows among all rows of an optimizer step. The utility rows are
            `per_device_train_batch_size` a device and micro-batch, as in [`~trl.SFTTrainer`]; the adversarial rows come on
            top.
        attack_suffix_epsilon (`float`, *optional*):
            Radius at the random tokens that [`~hf_robust.data.with_random_suffixes`] put behind prompts, in the unit of
            `attack_epsilon`. About 1 shows the model what a suffix attack can do, while `attack_epsilon` can stay small for
            the words of the request, where a wide ball costs knowledge. Default: `attack_epsilon` there too. Not in the
            paper.
        attack_batch_size (`int`, *optional*):
            Adversarial rows attacked at a time on one device, over all micro-batches of the step. The outer forward that
            follows holds twice as many rows (chosen and rejected). Default: `per_device_train_batch_size`.
        rejected_end (`bool`, defaults to `False`):
            Whether the end-of-turn token behind a rejected answer counts as a label. Public targets are beginnings of
            answers ("Sure, here is"), behind which no model ends its turn: with that label, the away loss is met by making
            the end unlikely, and the harmful beginning stays.
        utility_kl_weight (`float`, defaults to `0.0`):
            Weight of KL(before ‖ now) of the next-token distributions on the utility rows' labels, where "before" is the
            model with its adapter switched off. Not in the paper; needs PEFT and costs two forwards of the utility rows.
        utility_representation_weight (`float`, defaults to `0.0`):
            Weight of the distance of the hidden states on the utility rows from those of the model with its adapter switched
            off: squared L2 distance relative to the squared norm, averaged over all tokens and layers. It keeps what the
            utility rows do not rehearse far better than the KL term. Not in the paper; after the retain loss of circuit
            breakers (arXiv 2406.04313, section 3). Needs PEFT and costs one forward of the utility rows, without gradient.
        reference_compat (`bool`, defaults to `False`):
            Reproduce the authors' released code where it differs: cut-offs on the mean over a micro-batch's adversarial
            rows instead of on each row, the discontinuous form of the cut-off, the last perturbation instead of the best,
            and an absolute step of 1e-4 unless `attack_step_size` is set.
    """

    away_weight: float = field(default=0.5, metadata={"help": "Weight of the loss away from the rejected answer."})
    toward_weight: float = field(default=0.5, metadata={"help": "Weight of the loss toward the chosen answer."})
    utility_weight: float = field(default=1.0, metadata={"help": "Weight of the loss on the clean utility rows."})
    away_cutoff: float = field(default=-5.0, metadata={"help": "The away loss of a row is leaky below this value."})
    toward_cutoff: float = field(default=0.5, metadata={"help": "The toward loss of a row is leaky below this value."})
    adversarial_fraction: float = field(
        default=0.125, metadata={"help": "Share of adversarial rows among all rows of an optimizer step."}
    )
    attack_suffix_epsilon: float | None = field(
        default=None,
        metadata={"help": "Radius of the attack at random tokens behind prompts. Default: attack_epsilon."},
    )
    attack_batch_size: int | None = field(
        default=None,
        metadata={"help": "Adversarial rows attacked at a time. Default: per_device_train_batch_size."},
    )
    rejected_end: bool = field(
        default=False, metadata={"help": "Whether the end-of-turn token of a rejected answer counts as a label."}
    )
    utility_kl_weight: float = field(
        default=0.0, metadata={"help": "Weight of KL(before, now) on the utility rows. Needs PEFT."}
    )

    utility_representation_weight: float = field(
        default=0.0, metadata={"help": "Weight of the utility rows' hidden states' distance from before. Needs PEFT."}
    )

    def __post_init__(self) -> None:
        weights = (
            "away_weight",
            "toward_weight",
            "utility_weight",
            "utility_kl_weight",
            "utility_representation_weight",
        )
        for name in weights:
            check_at_least(name, getattr(self, name), 0, "Use 0 to leave the term out.")
        for name in ("away_cutoff", "toward_cutoff"):
            check_number(name, getattr(self, name), "Give nats per token; the paper uses -5 and 0.5.")
        check_number("adversarial_fraction", self.adversarial_fraction, "The paper uses 0.125.")
        if not 0 < self.adversarial_fraction < 1:
            raise ValueError(
                f"`adversarial_fraction={self.adversarial_fraction!r}` must lie strictly between 0 and 1: there would be no "
                "adversarial rows, or no utility rows. To switch the adversarial terms off, set `away_weight=0` and "
                "`toward_weight=0`."
            )
        if self.attack_batch_size is not None:
            check_count("attack_batch_size", self.attack_batch_size, 1, "Leave it unset for the per-device batch.")
        super().__post_init__()

    def _attack_options(self) -> dict[str, Any]:
        return {"suffix_epsilon": self.attack_suffix_epsilon}
