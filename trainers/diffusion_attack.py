"""The adversary of [`DiffusionTrainer`]: a perturbation of the caption under which denoising fails."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_robust.attacks.gradient import STEP_RULES, SearchResult, gradient_search
from hf_robust.attacks.prompts import check_counts
from hf_robust.sites import check_not_reentrant, quiet
from hf_robust.threats import INITS, NORMS, check_at_least, check_choice, initial

if TYPE_CHECKING:
    from hf_robust.diffusion.model import DiffusionModel

SITES = ("tokens", "conditioning")


class DenoisingAttack:
    """
    Projected gradient ascent on the denoising loss of each row, over a perturbation of its caption.

    Args:
        site: `"tokens"` (embeddings of the caption's own tokens, before the text encoder) or `"conditioning"` (the text
            encoder's output, at every position).
        epsilon: radius of the ball; 0 switches the attack off.
        epsilon_relative: whether `epsilon` counts in mean L2 norms: of the rows of the token embedding table, or of the
            vectors of each row's own conditioning. Else it is in the units of these vectors.
        steps: gradient steps; 0 switches the attack off.
        step_size: length of a step as a share of the radius; `None`: `min(1, 2.5 / steps)`, so that one step reaches the
            boundary and ten can cross the ball.
        step_rule: `"sign"`, `"normalized"`, `"momentum"`, `"adam"` or `"rmsprop"`.
        norm: `"l2_token"`, `"l2"` or `"linf"`.
        init: `"zero"` or `"random"`.

    Raises:
        ValueError: an argument is out of range or unknown; the message names it as `attack_…`.
    """

    def __init__(
        self,
        *,
        site: str = "tokens",
        epsilon: float = 0.05,
        epsilon_relative: bool = True,
        steps: int = 5,
        step_size: float | None = None,
        step_rule: str = "sign",
        norm: str = "l2_token",
        init: str = "zero",
    ):
        check_choice("attack_site", site, SITES)
        check_at_least("attack_epsilon", epsilon, 0, "Use 0 to train without an adversary.")
        check_counts({"attack_steps": (steps, 0, "Use 0 to train without an adversary.")})
        if step_size is not None:
            check_at_least("attack_step_size", step_size, 0, "Give the length of one step as a share of the radius.")
        check_choice("attack_step_rule", step_rule, STEP_RULES)
        check_choice("attack_norm", norm, NORMS)
        check_choice("attack_init", init, INITS)
        self.site, self.epsilon, self.epsilon_relative, self.steps = site, float(epsilon), epsilon_relative, int(steps)
        self.step_size = min(1.0, 2.5 / max(steps, 1)) if step_size is None else float(step_size)
        self.step_rule, self.norm, self.init = step_rule, norm, init
        # One step keeps the perturbation that it took, as evaluating it would cost as much as the step
        self.keep = "last" if steps == 1 else "best"

    @property
    def is_off(self) -> bool:
        """Whether every caption is left as it is (`epsilon` or `steps` 0)."""
        return self.epsilon == 0 or self.steps == 0

    def describe(self) -> str:
        """The threat model in words."""
        if self.is_off:
            return f"none: the attack is off (ε {self.epsilon:g}, {self.steps} steps)"
        units = {"tokens": "× the mean norm of token embeddings", "conditioning": "× the mean norm of the conditioning"}
        unit = units[self.site] if self.epsilon_relative else f"units of the {self.site}"
        return (
            f"ε {self.epsilon:g} {unit}, norm {self.norm}, {self.steps} {self.step_rule} steps of {self.step_size:g} × ε, on "
            f"the {'embeddings of the captions’ tokens' if self.site == 'tokens' else 'conditioning of every position'}"
        )

    def search(
        self,
        model: "DiffusionModel",
        input_ids: Sequence[torch.Tensor],
        loss_fn: Callable[[], torch.Tensor],
        *,
        seeds: Sequence[int],
    ) -> SearchResult:
        """
        Find each row's perturbation.

        Args:
            model: unwrapped. Its mode, gradients, hooks and random state are the same afterwards.
            input_ids: token ids `[rows, length]` for each text encoder.
            loss_fn: a forward of the rows; returns their losses `[rows]`, which the attack raises.
            seeds: of each row's random start.

        Returns:
            `delta` is `[rows, length, width]` float32; the losses are the negative ones of `loss_fn`.

        Raises:
            ValueError: activations are checkpointed in the reentrant way.
        """
        check_not_reentrant(model)
        with quiet(model):
            mask, norm, width = self._place(model, input_ids)
            radius = self.epsilon * norm if self.epsilon_relative else torch.full_like(norm, self.epsilon)
            shape = (1, mask.shape[1], width)
            start = torch.cat(
                [
                    initial(
                        shape,
                        1.0,
                        self.norm,
                        self.init,
                        device=mask.device,
                        generator=torch.Generator().manual_seed(seed),
                    )
                    for seed in seeds
                ]
            )

            def negative(delta: torch.Tensor) -> tuple[torch.Tensor, None]:
                with self.add(model, delta):
                    return -loss_fn(), None

            return gradient_search(
                negative,
                start * radius * mask,
                mask=mask,
                radius=radius,
                norm=self.norm,
                steps=self.steps,
                step_size=self.step_size * radius,
                step_rule=self.step_rule,
                unit_length=True,
                keep=self.keep,
            )

    @torch.no_grad()
    def _place(
        self, model: "DiffusionModel", input_ids: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Where the perturbation may be `[rows, length, 1]`, the unit of its radius `[rows, 1, 1]`, and its width."""
        if self.site == "conditioning":
            hidden = model.encode(list(input_ids)).hidden.float()
            norm = hidden.norm(dim=-1).mean(dim=1).view(-1, 1, 1)
            return hidden.new_ones(*hidden.shape[:2], 1), norm, hidden.shape[-1]
        from hf_robust.diffusion.site import TextTokenSite

        site = TextTokenSite(model)
        mask = caption_mask(input_ids[0], model.tokenizers[0]).unsqueeze(-1).float()
        norm = torch.full((len(mask), 1, 1), 1.0, device=mask.device)
        return mask, norm * site.mean_row_norm(), site.hidden_size

    @contextlib.contextmanager
    def add(self, model: "DiffusionModel", delta: torch.Tensor) -> Iterator[None]:
        """
        Add a perturbation in every forward inside the context.

        Args:
            model: unwrapped.
            delta: `[rows, length, width]`, as many rows as the forwards inside have.
        """
        if self.site == "conditioning":
            with add_to_conditioning(model, delta):
                yield
            return
        from hf_robust.diffusion.site import TextTokenSite

        with TextTokenSite(model).add(delta):
            yield


def caption_mask(input_ids: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """
    Where a caption's own tokens are: behind the token that begins it and before the first that ends it.

    Args:
        input_ids: `[rows, length]`.
        tokenizer: a CLIP tokenizer.

    Returns:
        `[rows, length]` bool.
    """
    ended = (input_ids == tokenizer.eos_token_id).cumsum(dim=1) > 0
    return ~ended & (input_ids != tokenizer.bos_token_id)


@contextlib.contextmanager
def add_to_conditioning(model: "DiffusionModel", delta: torch.Tensor) -> Iterator[None]:
    """
    Add a perturbation to the text conditioning wherever the UNet is run inside the context.

    Args:
        model: unwrapped.
        delta: `[rows, length, width]`.
    """

    def add(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden = kwargs["encoder_hidden_states"]
        return args, {**kwargs, "encoder_hidden_states": hidden + delta.to(hidden.dtype)}

    handle = model.unet.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def without_conditioning(model: "DiffusionModel", rows: torch.Tensor) -> Iterator[None]:
    """
    Set the text conditioning of some rows to 0, pooled states included, wherever the UNet is run inside the context: what
    the guidance of SDXL pipelines takes for the empty prompt.

    Args:
        model: unwrapped.
        rows: `[rows]` bool.
    """

    def clear(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden, added = kwargs["encoder_hidden_states"], kwargs["added_cond_kwargs"]
        cleared = hidden.masked_fill(rows.view(-1, 1, 1), 0)
        pooled = added["text_embeds"].masked_fill(rows.view(-1, 1), 0)
        return args, {**kwargs, "encoder_hidden_states": cleared, "added_cond_kwargs": {**added, "text_embeds": pooled}}

    handle = model.unet.register_forward_pre_hook(clear, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
