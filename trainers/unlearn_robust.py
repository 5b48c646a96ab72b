"""
The robust forms of unlearning: the forget loss is taken where an adversary has moved the model.

How a trainer uses them:

- Its configuration inherits [`RobustArguments`] (the fields and their checks).
- `perturbation = make_perturbation(args, model, accelerator)`, once, with the model unwrapped.
- `perturbation.is_off` (`robust="none"`, or a radius or number of steps of 0): it takes its plain path, so that the perturbed
  trainer with radius 0 is the plain one, bit for bit.
- Otherwise, for each optimizer step, [`Perturbation.start`] with the forget losses of all its micro-batches, then for each
  micro-batch [`Perturbation.backward`]; the retain loss, unperturbed, has a backward of its own before or behind it.

A forget loss is a function of the model that may be called several times (SAM: twice, smoothing: `smooth_samples` times). It
runs the forget rows alone, with the `input_ids` that `backward` is given. What a reference says about the rows is computed
before, outside: it must be neither perturbed nor computed twice.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from hf_robust.attacks import EmbeddingAttack, LatentAttack, WeightAttack
from hf_robust.sites import WeightSite
from hf_robust.threats import check_choice
from hf_robust.trainers.flops import search_operations
from hf_robust.trainers.meters import Meters
from hf_robust.trainers.schedule import start_seed

logger = logging.getLogger(__name__)

ROBUST_FORMS = ("none", "sam", "smooth", "latent", "embedding")

# Fields of one form only. A layer is none of them: it fits a model, whatever the form
_OWN_FIELDS = {
    "sam": ("sam_rho",),
    "smooth": ("smooth_rho", "smooth_samples"),
    "latent": ("latent_epsilon", "latent_steps"),
    "embedding": ("attack_epsilon", "attack_steps"),
}

# A share of a perturbation that is lost in rounding from which on the user should know
_KEPT = 0.5

ForgetLoss = Callable[[nn.Module], torch.Tensor]


@dataclass(repr=False)
class RobustArguments:
    """
    Fields that describe what the forget loss is made robust against.

    Parameters:
        robust (`str`, defaults to `"none"`):
            `"none"`; `"sam"`: the weights that are worst for the forget loss within `sam_rho`, and `"smooth"`: the mean over
            weights with random shifts (both arXiv 2502.05374); `"latent"`: hidden states of one layer (arXiv 2407.15549), and
            `"embedding"`: the input embeddings (arXiv 2405.15589), both moved so that the model recalls the forget rows. The
            retain loss is never perturbed. With a radius of 0 each is `"none"`, bit for bit.
        sam_rho (`float`, defaults to `0.01`):
            L2 length of SAM's perturbation of all trained weights together, in units of the weights. The released code takes
            0.01 for news and books and 0.1 for WMDP. 0 switches it off.
        smooth_rho (`float`, defaults to `1e-4`):
            Standard deviation of the random shift of each trained weight. 0 switches it off.
        smooth_samples (`int`, defaults to `3`):
            Random shifts over which the forget loss is averaged, each a forward and a backward.
        latent_layer (`int`, defaults to `7`):
            Layer whose output is perturbed, counted from 0 (negative: from the end). With RMU `activation_layer` or one before
            it; the released code of arXiv 2407.15549 takes 7 of layer 8.
        latent_epsilon (`float`, defaults to `2.0`):
            L2 length of each token's perturbation, in units of the hidden states, as in the paper for 7-billion models; hidden
            states grow with width and depth. 0 switches it off.
        latent_steps (`int`, defaults to `16`):
            Steps of Adam of the latent attack. 0 switches it off. Each has a length of `min(1, 2.5 / latent_steps)` radii; the
            authors' absolute 0.05 for each coordinate suits one width and radius only.
        attack_epsilon (`float`, defaults to `0.05`):
            Radius of the ball around each token's embedding for `"embedding"`, as a multiple of the mean L2 norm of the
            embedding rows. 0 switches it off.
        attack_steps (`int`, defaults to `10`):
            Sign steps of the embedding attack, each of `min(1, 2.5 / attack_steps)` radii. 0 switches it off.
    """

    robust: str = field(
        default="none", metadata={"help": "What forgetting is made robust to: none, sam, smooth, latent or embedding."}
    )
    sam_rho: float = field(default=0.01, metadata={"help": "L2 length of SAM's perturbation of the weights. 0: off."})
    smooth_rho: float = field(
        default=1e-4, metadata={"help": "Standard deviation of the random shift of each weight. 0: off."}
    )
    smooth_samples: int = field(default=3, metadata={"help": "Random shifts that the forget loss is averaged over."})
    latent_layer: int = field(default=7, metadata={"help": "Layer whose output the latent attack perturbs."})
    latent_epsilon: float = field(
        default=2.0, metadata={"help": "L2 length of each token's latent perturbation. 0: off."}
    )
    latent_steps: int = field(default=16, metadata={"help": "Steps of the latent attack. 0: off."})
    attack_epsilon: float = field(
        default=0.05, metadata={"help": "Radius of the embedding attack, in mean embedding norms. 0: off."}
    )
    attack_steps: int = field(default=10, metadata={"help": "Steps of the embedding attack. 0: off."})

    def __post_init__(self) -> None:
        check_choice("robust", self.robust, ROBUST_FORMS)
        if isinstance(self.latent_layer, bool) or not isinstance(self.latent_layer, int):
            raise ValueError(f"`latent_layer={self.latent_layer!r}` must be the number of a layer, such as 7.")
        # Parsers of command lines and YAML files hand over what they read: fail on it here, not after the model loads
        for form in ROBUST_FORMS:
            self.build_attack(form)
        refuse_unused(self, "robust", _OWN_FIELDS)
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()

    @property
    def attacks_answers(self) -> bool:
        """Whether the attack on hidden states moves those of label tokens too."""
        return False

    def build_attack(self, form: str | None = None) -> EmbeddingAttack | WeightAttack | None:
        """
        The attack that these fields describe.

        Args:
            form: one of `ROBUST_FORMS`; default: `robust`.

        Returns:
            An attack on the weights, the hidden states or the embeddings; `None` for `"none"`.

        Raises:
            ValueError: a field is out of range; the message names it.
        """
        form = self.robust if form is None else form
        try:
            if form == "sam":
                return WeightAttack(rho=self.sam_rho)
            if form == "smooth":
                return WeightAttack(rho=self.smooth_rho, kind="random", samples=self.smooth_samples)
            if form == "latent":
                return (_LatentEverywhere if self.attacks_answers else _LatentForget)(
                    epsilon=self.latent_epsilon,
                    layers=[self.latent_layer],
                    steps=self.latent_steps,
                    step_size=_share(self.latent_steps),
                    step_size_relative=True,
                )
            if form == "embedding":
                return _EmbeddingForget(
                    epsilon=self.attack_epsilon,
                    steps=self.attack_steps,
                    step_size=_share(self.attack_steps),
                    step_size_relative=True,
                )
        except ValueError as error:
            message, prefix = str(error), "attack" if form == "embedding" else form
            for argument in ("rho", "samples", "epsilon", "steps"):
                message = message.replace(f"`{argument}=", f"`{prefix}_{argument}=")
            raise ValueError(message) from None
        return None


def refuse_unused(args: Any, argument: str, owners: Mapping[str, Sequence[str]]) -> None:
    """
    Refuse a field that was set and that nothing would read.

    Args:
        args: the configuration, a dataclass.
        argument: its field that chooses a kind.
        owners: names of fields that one kind only reads, by kind.

    Raises:
        ValueError: a field of another kind than the chosen one is not at its default.
    """
    chosen, defaults = getattr(args, argument), {one.name: one.default for one in fields(args)}
    for kind, names in owners.items():
        for name in names:
            value = getattr(args, name)
            if kind != chosen and value != defaults[name]:
                raise ValueError(
                    f"`{name}={value!r}` needs `{argument}={kind!r}`, and nothing reads it with `{argument}={chosen!r}`. Leave "
                    "it unset."
                )


class Perturbation:
    """
    The forget loss as it is, and what all forms share. Subclasses say where the model stands while the loss is taken.

    Attributes:
        is_off: whether the trainer should take its plain path.
    """

    is_off = True

    def __init__(self) -> None:
        self.meters = Meters()

    def start(self, trainer: Any, model: nn.Module, losses: Sequence[ForgetLoss], *, step: int) -> None:
        """
        Begin an optimizer step.

        Args:
            trainer: the trainer.
            model: the model of the training step, wrapped or not.
            losses: the forget loss of each of the step's micro-batches on this process, each as its share of the step's whole
                loss, in order. Only SAM calls them, with the unwrapped model, so that its perturbation does not depend on how
                the step is split into micro-batches and processes.
            step: number of optimizer steps done before (`state.global_step`).
        """

    def backward(
        self,
        trainer: Any,
        model: nn.Module,
        forget_loss: ForgetLoss,
        inputs: dict[str, Any],
        *,
        scale: float = 1.0,
        sync: bool = False,
    ) -> torch.Tensor:
        """
        Forward and backward of the forget loss of one micro-batch under the perturbation.

        Args:
            trainer: the trainer.
            model: the model of the training step, wrapped or not.
            forget_loss: takes the model and returns a 0-dim tensor.
            inputs: the model's inputs for the forget rows: `input_ids` `[batch, length]`, `attention_mask`, `labels`, … and
                nothing else.
            scale: multiple of the loss of which the gradient is taken.
            sync: whether this is the last backward of the micro-batch: otherwise processes do not exchange gradients here, but
                in the backward behind it (`trainer._no_sync`).

        Returns:
            0-dim, without graph: `scale` times the perturbed loss.
        """
        return _backward(trainer, model, forget_loss, scale, sync)

    def operations(self, training: int) -> int:
        """
        Floating-point operations of a micro-batch, search included.

        Args:
            training: those of one forward and backward of its forget rows.
        """
        return training


class WeightPerturbation(Perturbation):
    """
    The forget loss at perturbed weights: SAM, or the mean over random shifts.

    The perturbation is the same for all micro-batches and processes of an optimizer step: SAM's gradient is that of the whole
    step (one forward and backward of every forget row more; processes exchange it), random shifts are seeded by the run's seed
    and the step's number. The trained weights are themselves again between the calls and whenever one fails. One copy of
    them is kept, from [`start`] until the last micro-batch's [`backward`].

    Args:
        attack: the attack on the weights.
    """

    is_off = False

    def __init__(self, attack: WeightAttack):
        super().__init__()
        self.attack = attack
        self._values: list[torch.Tensor | None] | None = None
        self._seed = self._left = 0
        self._is_checked = False

    def start(self, trainer: Any, model: nn.Module, losses: Sequence[ForgetLoss], *, step: int) -> None:
        self._values, self._left = None, len(losses)
        self._seed = start_seed(trainer.args.seed, step, 0)
        if self.attack.kind == "random":
            return
        accelerator = trainer.accelerator
        inner = accelerator.unwrap_model(model)
        with trainer.compute_loss_context_manager(), trainer._stopwatch:
            found = self.attack.search(
                inner,
                [functools.partial(loss, inner) for loss in losses],
                across_processes=accelerator.num_processes > 1,
            )
        self.meters.add("perturbation_non_finite", (~found.gradient_norm.isfinite()).float(), 1.0)
        self.meters.add("forget_gradient_norm", found.gradient_norm, 1.0)
        site = WeightSite(inner)
        self._values = site.shifted(found.deltas)
        self._check_rounding(site, self._values)

    def backward(
        self,
        trainer: Any,
        model: nn.Module,
        forget_loss: ForgetLoss,
        inputs: dict[str, Any],
        *,
        scale: float = 1.0,
        sync: bool = False,
    ) -> torch.Tensor:
        if self._left == 0:
            raise RuntimeError("`Perturbation.backward` without `start`: call `start` once in each optimizer step.")
        inner = trainer.accelerator.unwrap_model(model)
        site, samples = WeightSite(inner), self.attack.samples
        total: torch.Tensor | float = 0.0
        for sample in range(samples):
            values = self._values
            if values is None:
                seed = start_seed(self._seed, sample, 0)
                with trainer._stopwatch:
                    values = site.shifted(self.attack.search(inner, seed=seed).deltas)
                self._check_rounding(site, values)
            with site.at(values):
                last = sample + 1 == samples
                total = total + _backward(trainer, model, forget_loss, scale / samples, sync and last)
            del values  # before the next ones are drawn
        self._left -= 1
        if self._left == 0:
            self._values = None
        assert isinstance(total, torch.Tensor)
        return total

    def _check_rounding(self, site: WeightSite, values: Sequence[torch.Tensor | None]) -> None:
        if not self._is_checked:
            self._is_checked = True
            _warn_if_rounded_away(site, values, self.attack)

    def operations(self, training: int) -> int:
        return training * (self.attack.samples if self.attack.kind == "random" else 2)


class InputPerturbation(Perturbation):
    """
    The forget loss under a perturbation of hidden states or input embeddings with which the model recalls the forget rows.

    For each row, the attack lowers the token-mean cross-entropy of its labels. Of the losses that rise as that falls
    (grad_diff, npo, simnpo) this is the inner maximum itself; for the others it is what the adversary is after, as in the
    released code of arXiv 2407.15549 for RMU. Prompts are perturbed, or all tokens of a row without a prompt. RMU reads hidden
    states of label tokens instead of what follows from them, so the latent attack moves all tokens of its rows, as that code
    does; behind the layer read it could reach none of them and is refused.

    Args:
        attack: the attack on hidden states or embeddings.
    """

    is_off = False

    def __init__(self, attack: EmbeddingAttack):
        super().__init__()
        self.attack = attack

    def backward(
        self,
        trainer: Any,
        model: nn.Module,
        forget_loss: ForgetLoss,
        inputs: dict[str, Any],
        *,
        scale: float = 1.0,
        sync: bool = False,
    ) -> torch.Tensor:
        inner = trainer.accelerator.unwrap_model(model)
        with trainer.compute_loss_context_manager(), trainer._stopwatch:
            found = self.attack.search(inner, **inputs)
        rows = float(len(found.first_loss))
        self.meters.add("perturbation_non_finite", found.non_finite.float().sum(), rows)
        self.meters.add("attack_loss_first", found.first_loss.nan_to_num().sum(), rows)
        self.meters.add("attack_loss_last", found.last_loss.nan_to_num().sum(), rows)
        with self.attack.site(inner).add(found.delta):
            return _backward(trainer, model, forget_loss, scale, sync)

    def operations(self, training: int) -> int:
        return training + search_operations(training, self.attack.steps, forwards=self.attack.keep == "best")


def make_perturbation(args: RobustArguments, model: nn.Module, accelerator: Accelerator | None = None) -> Perturbation:
    """
    What a configuration's `robust` asks for.

    Args:
        args: the configuration.
        model: the model to be trained, unwrapped, with its adapter.
        accelerator: the trainer's; default: one process.

    Raises:
        ValueError: a layer that the model lacks, a model without trained weights or without input embeddings, or weights
            that are to be perturbed and may be split over processes.
    """
    attack = args.build_attack()
    if attack is None or attack.is_off:
        return Perturbation()
    if isinstance(attack, WeightAttack):
        kind = accelerator.distributed_type if accelerator is not None else DistributedType.NO
        if kind in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise ValueError(
                f"`robust={args.robust!r}` perturbs whole weights, which {kind.value} may split over processes. Use DDP, with "
                "LoRA if memory is short, or `robust='latent'`."
            )
        WeightSite(model)
        return WeightPerturbation(attack)
    try:
        attack.site(model)
    except ValueError as error:
        asked = f"`layers={[args.latent_layer]!r}` has {args.latent_layer!r}"
        raise ValueError(str(error).replace(asked, f"`latent_layer={args.latent_layer!r}`")) from None
    return InputPerturbation(attack)


class _WholeRows:
    """Positions that a forget row may be attacked at: its prompt, or everything where it has none."""

    def attacked_positions(
        self, attention_mask: torch.Tensor, labels: torch.Tensor, user_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        attended = attention_mask.bool()
        prompt = attended & (labels == -100)
        return torch.where(prompt.any(dim=1, keepdim=True), prompt, attended)


class _LatentEverywhere(LatentAttack):
    """The latent attack on forget rows whose own hidden states the loss reads: on all tokens."""

    def attacked_positions(
        self, attention_mask: torch.Tensor, labels: torch.Tensor, user_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return attention_mask.bool()


class _EmbeddingForget(_WholeRows, EmbeddingAttack):
    """The embedding attack on forget rows."""


class _LatentForget(_WholeRows, LatentAttack):
    """The latent attack on forget rows."""


def _backward(trainer: Any, model: nn.Module, forget_loss: ForgetLoss, scale: float, sync: bool) -> torch.Tensor:
    # As the Trainer's own step: DeepSpeed would divide by the accumulation steps once more
    is_deepspeed = trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
    kwargs = {"scale_wrt_gas": False} if is_deepspeed else {}
    with contextlib.nullcontext() if sync else trainer._no_sync(model):
        with trainer.compute_loss_context_manager():
            loss = forget_loss(model) * scale
        trainer.accelerator.backward(loss, **kwargs)
    return loss.detach()


@torch.no_grad()
def _warn_if_rounded_away(site: WeightSite, values: Sequence[torch.Tensor | None], attack: WeightAttack) -> None:
    """
    Half precision may round away a perturbation that is small beside the weights: say so, once. Of SAM's, what counts is its
    length; of a random one whether weights move at all, as those that do move too far and make up for the length.
    """
    pairs = [(p, v) for p, v in zip(site.parameters, values, strict=True) if v is not None]
    if all(parameter.dtype not in (torch.bfloat16, torch.float16) for parameter, _ in pairs):
        return
    if attack.kind == "random":
        moved = sum(int((value != parameter).sum()) for parameter, value in pairs)
        kept = moved / sum(parameter.numel() for parameter, _ in pairs)
        if kept < _KEPT:
            logger.warning(
                "`smooth_rho=%g`: rounding to the trained weights' half precision leaves all but %.0f %% of them where they "
                "are. Train float32 weights (`bf16=True` keeps them), an adapter, or raise `smooth_rho`.",
                attack.rho, 100 * kept,
            )  # fmt: skip
        return
    lengths = [torch.linalg.vector_norm(v.float() - p.detach().float()).cpu() for p, v in pairs]
    kept = float(torch.linalg.vector_norm(torch.stack(lengths))) / attack.rho
    if kept < _KEPT:
        logger.warning(
            "`sam_rho=%g`: rounding to the trained weights' half precision leaves %.0f %% of the perturbation's length. Train "
            "float32 weights (`bf16=True` keeps them), an adapter, or raise `sam_rho`.",
            attack.rho, 100 * kept,
        )  # fmt: skip


def _share(steps: Any) -> float:
    """Length of a step in radii: one step reaches the boundary, several can cross the ball."""
    return min(1.0, 2.5 / steps) if isinstance(steps, int) and steps > 0 else 1.0
