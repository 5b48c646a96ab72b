"""The continuous attack on hidden states between the layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_robust.attacks.budget import Budget
from hf_robust.attacks.embedding import EmbeddingAttack
from hf_robust.sites import HiddenStateSite


class LatentAttack(EmbeddingAttack):
    """
    Perturb a prompt's hidden states at several depths, each within a small ball, so that a target answer becomes likely.

    The adversary of "Latent Adversarial Training Improves Robustness to Persistent Harmful Behaviors in LLMs" (arXiv
    2407.15549): every token of the prompt gets a vector of its own at the input embeddings and behind four layers, of L2
    norm `epsilon` at most, found by 16 steps of Adam on the target's token-mean cross-entropy. It acts while the prompt is
    read; the tokens generated are left alone. No user can do this: it bounds from above what a prompt can do. The defaults
    are the released code's, but for its term that lowers the safe answer's likelihood, which needs one, and for Adam's
    weight decay; the best perturbation of each row is kept.

    Otherwise as [`EmbeddingAttack`], of which it is the same search at another place: perturbations have the shape
    `[batch, length, layers, hidden]`.

    Args:
        epsilon: radius of the ball, in units of the hidden states (6.0 for 7-billion models; hidden states grow with
            width and depth, so choose another for others). 0 switches the attack off.
        layers: layers whose output is perturbed, and `"embedding"`. `None`: the paper's, scaled to the model's depth; see
            [`~hf_robust.sites.HiddenStateSite`].
        layer_list: name of the model's list of layers, for models where it is not found.
        steps: gradient steps; 0 switches the attack off.
        step_size: length of a step, for `"adam"` roughly the change of each coordinate: 0.05 as for Llama-2 (for Llama-3
            the released code takes 0.001). With `step_size_relative`, a share of the radius.
        step_rule: `"sign"`, `"normalized"`, `"momentum"`, `"adam"` or `"rmsprop"`.
        norm: `"l2_token"` (an L2 ball for each token at each depth, the paper's), `"l2"` (one for everything) or `"linf"`.
        step_size_relative: see `step_size`.
        init: `"zero"` (the paper's) or `"random"`, uniform in the ball.
        positions: `"all_prompt"` or `"user_content"`, see [`EmbeddingAttack`].
        keep: `"best"` or `"last"`, see [`EmbeddingAttack`].
        early_stop: loss (nats per token) below which a row stops moving; `None` never stops.
        budget: what [`attack`] may spend on each behaviour; `None`: no bound.
        seed: seed of random starts. The global random state is never touched.
        batch_size: behaviours that [`attack`] takes together.
        max_new_tokens: length of the completions of [`attack`] at most.
        progress: whether [`attack`] shows a progress bar.

    Raises:
        ValueError: an argument is out of range or unknown; in a search, also a layer that the model lacks.

    Example:

    ```python
    >>> attack = LatentAttack(epsilon=2.0, layers=["embedding", 4, 8])
    >>> results = attack.attack(model, tokenizer, prompts=prompts, targets=["Sure, here is"])
    ```
    """

    def __init__(
        self,
        *,
        epsilon: float = 6.0,
        layers: Sequence[int | str] | None = None,
        layer_list: str | None = None,
        steps: int = 16,
        step_size: float = 0.05,
        step_rule: str = "adam",
        norm: str = "l2_token",
        step_size_relative: bool = False,
        init: str = "zero",
        positions: str = "all_prompt",
        keep: str = "best",
        early_stop: float | None = None,
        budget: Budget | None = None,
        seed: int = 0,
        batch_size: int = 16,
        max_new_tokens: int = 128,
        progress: bool = True,
    ):
        super().__init__(
            epsilon=epsilon,
            steps=steps,
            step_size=step_size,
            step_rule=step_rule,
            norm=norm,
            step_size_relative=step_size_relative,
            init=init,
            positions=positions,
            keep=keep,
            early_stop=early_stop,
            budget=budget,
            seed=seed,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
        # There is no embedding table to measure a radius by, and there are no tokens of its own
        del self.epsilon_relative, self.suffix_epsilon
        self.layers, self.layer_list = layers, layer_list

    def site(self, model: nn.Module) -> Any:
        """Where the perturbation enters: the hidden states behind `layers`."""
        return HiddenStateSite(model, layers=self.layers, layer_list=self.layer_list)

    def radius(self, site: Any, suffix_mask: torch.Tensor | None = None) -> torch.Tensor | float:
        """Radius of the ball in units of the hidden states: `epsilon`."""
        return self.epsilon
