"""The prompts attacked together: what they have cost, what may still be spent, which pictures were judged."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from hf_robust.attacks.budget import Budget, Clock
from hf_robust.attacks.diffusion.results import DiffusionAttackResult
from hf_robust.diffusion.sampling import generate

if TYPE_CHECKING:
    from hf_robust.diffusion import Conditioning, DiffusionModel

Judge = Callable[[torch.Tensor], torch.Tensor]


class Run:
    """
    State of an attack on a batch of prompts. Rows are places in `results`.

    Args:
        model: the attacked model.
        original: the model before erasing, where the attack has one.
        judge: `[N, 3, H, W]` float32 pictures in [0, 1] → `[N]` bool, whether the concept is in them.
        results: one for each prompt, filled in here.
        generators: one random stream for each prompt.
        budget: what may be spent on each prompt.
        num_inference_steps: sampling steps of a picture.
        guidance_scale: guidance of a picture; `None` or 1 samples without an unconditional half.
        batch_size: pictures drawn together.
    """

    def __init__(
        self,
        model: "DiffusionModel",
        original: "DiffusionModel | None",
        judge: Judge,
        results: list[DiffusionAttackResult],
        generators: Sequence[torch.Generator],
        *,
        budget: Budget | None,
        num_inference_steps: int,
        guidance_scale: float | None,
        batch_size: int,
    ):
        self.model, self.original, self.judge = model, original, judge
        self.results, self.generators, self.budget = results, generators, budget
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.batch_size = batch_size
        self.clock = Clock()

    @property
    def rows(self) -> list[int]:
        """All rows."""
        return list(range(len(self.results)))

    @property
    def picture_cost(self) -> int:
        """UNet items that one picture takes."""
        guided = self.guidance_scale is not None and self.guidance_scale != 1
        return self.num_inference_steps * (1 + guided)

    @contextlib.contextmanager
    def spending(self, rows: Sequence[int]) -> Iterator[None]:
        """Count UNet items and seconds inside, and divide them evenly among `rows`, rounded up."""
        models = [self.model]
        if self.original is not None and self.original.unet is not self.model.unet:  # a shared UNet counts in both
            models.append(self.original)
        before = [(m.unet_items, m.unet_backward_items) for m in models]
        clock = Clock()
        yield
        spent = [sum(getattr(m, name) for m in models) for name in ("unet_items", "unet_backward_items")]
        forwards, backwards = (
            total - sum(column) for total, column in zip(spent, zip(*before, strict=True), strict=True)
        )
        for row in rows:
            result = self.results[row]
            result.num_unet_forwards += -(-forwards // len(rows))
            result.num_unet_backwards += -(-backwards // len(rows))
            result.seconds += clock.seconds / len(rows)

    def allows(self, row: int, *, forwards: int = 0, backwards: int = 0) -> bool:
        """Whether a prompt's budget leaves so many UNet items."""
        result = self.results[row]
        return self.budget is None or self.budget.allows(
            forwards=result.num_unet_forwards + forwards,
            backwards=result.num_unet_backwards + backwards,
            seconds=self.clock.seconds,
        )

    def affordable(self, rows: Sequence[int], *, forwards: int, backwards: int = 0) -> list[int]:
        """The rows whose budget leaves so many UNet items; the others are marked as out of budget."""
        kept = []
        for row in rows:
            if self.allows(row, forwards=forwards, backwards=backwards):
                kept.append(row)
            else:
                self.results[row].budget_exhausted = True
        return kept

    def search_budget(
        self, rows: Sequence[int], *, forwards_per_step: int = 1, backwards_per_step: int = 1
    ) -> Budget | None:
        """What a search of these rows may spend, a picture at its end set aside: steps of so many UNet items, seconds."""
        if self.budget is None:
            return None
        forwards = backwards = None
        if self.budget.forwards is not None:
            spent = max(self.results[row].num_unet_forwards for row in rows)
            forwards = max(int(self.budget.forwards) - spent - self.picture_cost, 0) // forwards_per_step
        if self.budget.backwards is not None:
            spent = max(self.results[row].num_unet_backwards for row in rows)
            backwards = max(int(self.budget.backwards) - spent, 0) // backwards_per_step
        seconds = None if self.budget.seconds is None else max(self.budget.seconds - self.clock.seconds, 0.0)
        return Budget(forwards=forwards, backwards=backwards, seconds=seconds)

    def draw(
        self,
        rows: Sequence[int],
        prompts: Sequence[str] | None = None,
        conditioning: "Conditioning | None" = None,
        *,
        model: "DiffusionModel | None" = None,
    ) -> torch.Tensor:
        """
        Pictures for rows, each from its own seed.

        Args:
            rows: whose seeds are taken and who pay.
            prompts: the texts to draw from.
            conditioning: what to draw from instead, one row each.
            model: who draws. Default: the attacked model.

        Returns:
            `[len(rows), 3, H, W]` float32 in [0, 1], on the CPU.
        """
        with self.spending(rows):
            return generate(
                self.model if model is None else model,
                prompts,
                seeds=[self.results[row].seed for row in rows],
                steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                batch_size=self.batch_size,
                conditioning=conditioning,
                progress=False,
            )

    def judge_pictures(
        self,
        rows: Sequence[int],
        *,
        prompts: Sequence[str] | None = None,
        adversarial_prompts: Sequence[str] | None = None,
        conditioning: "Conditioning | None" = None,
        embeddings: torch.Tensor | None = None,
    ) -> list[bool]:
        """
        Draw a picture for each row, judge it, and write both into the results. Exactly one of the first three texts or
        encodings is given.

        Args:
            rows: rows without a hit so far.
            prompts: texts to draw from that are no find of the attack.
            adversarial_prompts: texts that the attack found. They are tokenized as anyone would who reads them, what is too
                long cut off, and drawn from.
            conditioning: what to draw from instead, one row each.
            embeddings: `[len(rows), …]` the find, for an attack on embeddings.

        Returns:
            Whether each was a hit.

        Raises:
            ValueError: the judge returns another number of verdicts.
        """
        ids: list[list[int]] = []
        if adversarial_prompts is not None:
            tokens = self.model.tokenize(adversarial_prompts, truncation="warn")
            conditioning = self.model.encode(tokens)
            eos = self.model.tokenizers[0].eos_token_id
            ids = [row[1 : row.index(eos, 1)] for row in tokens[0].tolist()]
        images = self.draw(rows, prompts, conditioning)
        verdicts = [bool(verdict) for verdict in torch.as_tensor(self.judge(images)).flatten().tolist()]
        if len(verdicts) != len(rows):
            raise ValueError(
                f"`judge` returned {len(verdicts)} verdicts for {len(rows)} pictures: it must return one bool for each."
            )
        for place, row in enumerate(rows):
            result = self.results[row]
            result.hit = verdicts[place]
            result.num_generations += 1
            result.image = (images[place].clamp(0, 1) * 255).round().to(torch.uint8).cpu()
            if adversarial_prompts is not None:
                result.adversarial_prompt, result.adversarial_ids = adversarial_prompts[place], ids[place]
            if embeddings is not None:
                result.embeddings = embeddings[place].detach().float().cpu().clone()
        return verdicts
