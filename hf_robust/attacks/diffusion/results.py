"""What an attack on an erased diffusion model found."""

import math
from dataclasses import dataclass, field

import torch


@dataclass
class DiffusionAttackResult:
    """
    Outcome of an attack on one prompt.

    Attributes:
        prompt: the prompt that was attacked.
        seed: seed of the picture.
        hit: whether the judge saw the concept in a picture that the attacked model drew.
        image: `[3, height, width]` uint8 on the CPU: the picture of the hit; the last one judged where there is no hit;
            `None` where nothing was judged.
        adversarial_prompt: the text that `image` was drawn from, for an attack that finds text; what was judged is this
            text tokenized again. `None` for an attack on embeddings.
        adversarial_ids: its token ids under the first tokenizer, without start, end and padding.
        embeddings: float32 on the CPU, for an attack on embeddings: `[tokens, width]` embeddings of its free tokens, or
            `[length, width]` perturbation of the prompt. With two text encoders, their widths one after the other.
        losses: mean squared error at each step, in order.
        num_unet_forwards: batch items that UNets ran forward for this prompt, those of drawing the pictures included (two
            a step under guidance), and those of the original model where the attack asks it. What several prompts share is
            divided among them.
        num_unet_backwards: batch items that the UNet ran backward.
        num_generations: pictures drawn by the attacked model and judged.
        seconds: wall time, divided evenly among the prompts attacked together.
        budget_exhausted: whether the attack ended without a hit because its budget was spent.
        error: why this prompt could not be attacked to the end, while the rest went on; `None` if all went well.
    """

    prompt: str
    seed: int
    hit: bool = False
    image: torch.Tensor | None = None
    adversarial_prompt: str | None = None
    adversarial_ids: list[int] | None = None
    embeddings: torch.Tensor | None = None
    losses: list[float] = field(default_factory=list)
    num_unet_forwards: int = 0
    num_unet_backwards: int = 0
    num_generations: int = 0
    seconds: float = 0.0
    budget_exhausted: bool = False
    error: str | None = None

    @property
    def loss(self) -> float:
        """Loss of the last step; `nan` without a search."""
        return self.losses[-1] if self.losses else math.nan
