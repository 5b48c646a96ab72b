"""Configuration of [`NoiseFiTTrainer`]."""

from dataclasses import dataclass, field

from trl import SFTConfig

from hf_robust.noise import SNR_FORMATS
from hf_robust.noise.distributions import DISTRIBUTIONS
from hf_robust.objectives.noise import LOSS_MODES as NOISE_LOSS_MODES
from hf_robust.objectives.noise import noise_loss_weights
from hf_robust.threats import check_at_least, check_choice, check_count, check_number
from hf_robust.trainers.phases import RunArguments

LOSS_MODES = (*NOISE_LOSS_MODES, "rdrop")
# What the two versions differ in, where the field is left unset
_OF_VERSION = {"v1": {"consistency_weight": 0.1}, "v2": {"consistency_weight": 0.05}}


@dataclass(repr=False)
class NoiseFiTConfig(RunArguments, SFTConfig):
    """
    Configuration of [`NoiseFiTTrainer`]: all of [`~trl.SFTConfig`] and the fields below, whose defaults are those of
    arXiv 2504.03302 and its released code.

    Parameters:
        version (`str`, defaults to `"v1"`):
            `"v1"`, the paper: noise of one strength on the `num_noisy_layers` layers of largest or lowest signal-to-noise
            ratio. `"v2"`, the second released version: layers and a strength for each by calibration; targets without
            gradient, temperature on both sides.
        loss_mode (`str`, defaults to `"full"`):
            `"full"`: `ce_weight * CE(clean) + (1 - ce_weight) * KL(clean ‖ noisy) + consistency_weight * KL(noisy ‖ noisy)`.
            Ablations: `"ce_noisy"`, `"ce_kl"`, `"kl_only"`, `"consistency_only"` (the last two are known to collapse the
            model). Baseline: `"rdrop"` (arXiv 2106.14448), two forwards that differ in the model's own dropout, no noise.
        ce_weight (`float`, defaults to `0.5`):
            Share of the cross-entropy of the clean branch (alpha of the paper) against the KL of the noisy ones. 1 together
            with `consistency_weight=0` is [`~trl.SFTTrainer`], bit for bit: no noisy branch is run.
        consistency_weight (`float`, *optional*):
            Weight of the KL between the noisy branches (lambda of the paper). Default: 0.1 in `"v1"`, 0.05 in `"v2"`.
        temperature (`float`, defaults to `1.0`):
            Softmax temperature of the KL terms: of the clean side in `"v1"`, of both sides (and times its square) in `"v2"`.
        noise_std (`float`, defaults to `0.1`):
            Strength of the noise in `"v1"` (sigma of the paper), relative to the standard deviation of the hidden states.
        num_noisy_layers (`int`, defaults to `3`):
            How many layers get noise in `"v1"` (k of the paper).
        snr_format (`str`, defaults to `"largest"`):
            Which layers `"v1"` takes by their signal-to-noise ratio: `"largest"` or `"lowest"`.
        noise_layers (`list[int]`, *optional*):
            Layers with noise, counted from 0 (negative: from the end), instead of those that `"v1"` would choose.
        noise_distribution (`str`, defaults to `"adaptive"`):
            `"adaptive"` (the paper's noise, weighted by the deviation from the median), `"gaussian"` or `"uniform"`.
        noise_beta (`float`, defaults to `0.1`):
            How fast the adaptive noise falls with the distance from the median.
        noise_policy (`str`, *optional*):
            Folder of a `noise_policy.json`, or the file itself: layers and strengths of an earlier run instead of new ones.
        calibration_batch_size (`int`, defaults to `4`):
            Rows of each batch of training data on which layers and strengths are chosen (one batch in `"v1"`, two in
            `"v2"`), the same on all processes.
        max_ce_increase (`float`, defaults to `0.02`):
            Strengths that raise the cross-entropy by a larger share are not taken by `"v2"`.
        prefix_sharing (`bool`, defaults to `True`):
            Whether the layers before the first noise are computed once for all branches, where the model allows it (the log
            says why not). Changes cost only, not the result.
        layer_list (`str`, *optional*):
            Dotted name of the list of layers inside the model, for architectures whose layers are not found.
        reference_compat (`bool`, defaults to `False`):
            Reproduce the authors' released code where it is at fault: the strength of the noise enters twice in `"v1"`, and
            the mask of the KL terms is not shifted by one.
    """

    version: str = field(default="v1", metadata={"help": "v1 (the paper) or v2 (automatic calibration)."})
    loss_mode: str = field(default="full", metadata={"help": f"Loss: {', '.join(LOSS_MODES)}."})
    ce_weight: float = field(default=0.5, metadata={"help": "Share of the clean branch's cross-entropy (alpha)."})
    consistency_weight: float | None = field(
        default=None, metadata={"help": "Weight of the KL between noisy branches. Default: 0.1 in v1, 0.05 in v2."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Softmax temperature of the KL terms."})
    noise_std: float = field(
        default=0.1, metadata={"help": "Strength of v1's noise, relative to the hidden states' std."}
    )
    num_noisy_layers: int = field(default=3, metadata={"help": "How many layers get noise in v1."})
    snr_format: str = field(default="largest", metadata={"help": "Layers by signal-to-noise ratio: largest or lowest."})
    noise_layers: list[int] | None = field(
        default=None, metadata={"help": "Layers with noise, instead of those that v1 chooses."}
    )
    noise_distribution: str = field(default="adaptive", metadata={"help": "Noise: adaptive, gaussian or uniform."})
    noise_beta: float = field(default=0.1, metadata={"help": "Fall of the adaptive noise away from the median."})
    noise_policy: str | None = field(
        default=None, metadata={"help": "Folder with (or path of) the noise_policy.json of an earlier run."}
    )
    calibration_batch_size: int = field(
        default=4, metadata={"help": "Rows of each batch on which layers and strengths are chosen."}
    )
    max_ce_increase: float = field(
        default=0.02, metadata={"help": "Largest relative growth of the cross-entropy that v2 accepts."}
    )
    prefix_sharing: bool = field(
        default=True, metadata={"help": "Compute the layers before the first noise once for all branches."}
    )
    layer_list: str | None = field(
        default=None, metadata={"help": "Dotted name of the list of layers, if it is not found."}
    )
    reference_compat: bool = field(default=False, metadata={"help": "Reproduce the faults of the authors' code."})

    def __post_init__(self) -> None:
        check_choice("version", self.version, ("v1", "v2"))
        check_choice("loss_mode", self.loss_mode, LOSS_MODES)
        check_choice("snr_format", self.snr_format, SNR_FORMATS)
        check_choice("noise_distribution", self.noise_distribution, DISTRIBUTIONS)
        if self.consistency_weight is None:
            self.consistency_weight = _OF_VERSION[self.version]["consistency_weight"]
        check_at_least("consistency_weight", self.consistency_weight, 0, "Use 0 to leave the term out.")
        check_at_least("noise_std", self.noise_std, 0, "The paper uses 0.1.")
        check_at_least("noise_beta", self.noise_beta, 0, "The paper uses 0.1.")
        check_count("num_noisy_layers", self.num_noisy_layers, 1, "The paper uses 3.")
        check_count("calibration_batch_size", self.calibration_batch_size, 1, "The authors use 4.")
        check_at_least("max_ce_increase", self.max_ce_increase, 0, "The authors use 0.02.")
        check_at_least("temperature", self.temperature, 1e-6, "The paper uses 1.")
        check_number("ce_weight", self.ce_weight, "The paper uses 0.5.")
        if not 0 <= self.ce_weight <= 1:
            raise ValueError(
                f"`ce_weight={self.ce_weight!r}` must lie between 0 and 1: it is the clean cross-entropy's share, and "
                "1 - ce_weight that of the KL. Use 1 for the cross-entropy alone."
            )
        if not self.term_weights:
            raise ValueError(
                f"`loss_mode={self.loss_mode!r}` has no term left with `ce_weight={self.ce_weight!r}` and "
                f"`consistency_weight={self.consistency_weight!r}`: raise one of them, or use 'full'."
            )
        if self.noise_layers is not None and (self.version == "v2" or not self.noise_layers):
            raise ValueError(
                f"`noise_layers={self.noise_layers!r}` needs `version='v1'` and one layer at least; `'v2'` finds its layers "
                "by calibration. Leave it unset, or give a `noise_policy`."
            )
        if self.noise_layers is not None:
            _check_layers(self.noise_layers)
        if self.layer_list is not None and not isinstance(self.layer_list, str):
            raise ValueError(f"`layer_list={self.layer_list!r}` must be a dotted name, such as 'model.layers'.")
        super().__post_init__()

    @property
    def is_plain(self) -> bool:
        """Whether all that is left of the loss is the clean cross-entropy, so that no branch is run."""
        return list(self.term_weights) == ["clean_ce"]

    @property
    def has_noise(self) -> bool:
        """Whether any branch is noisy."""
        return not self.is_plain and self.loss_mode != "rdrop"

    @property
    def term_weights(self) -> dict[str, float]:
        """Weight of each term of the loss, by the name under which it is logged; terms of weight 0 are left out."""
        if self.loss_mode == "rdrop":
            return {"noisy_ce": 1.0, "rdrop_kl": 1.0}
        assert self.consistency_weight is not None  # set by `__post_init__`
        weights = noise_loss_weights(self.loss_mode, alpha=self.ce_weight, consistency=self.consistency_weight)
        terms = {
            "clean_ce": weights.ce,
            "noisy_ce": weights.noisy_ce,
            "noisy_kl": weights.kl,
            "consistency_kl": weights.consistency,
        }
        return {name: weight for name, weight in terms.items() if weight}


def _check_layers(layers: object) -> None:
    if not isinstance(layers, list | tuple) or any(isinstance(n, bool) or not isinstance(n, int) for n in layers):
        raise ValueError(f"`noise_layers={layers!r}` must be a list of the numbers of layers, such as [3, 4].")
