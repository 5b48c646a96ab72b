"""Latents, time steps and the original model's predictions there, which AdvUnlearn trains and attacks on."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from hf_robust.sites import quiet
from hf_robust.trainers.meters import on_any_process

logger = logging.getLogger(__name__)

# Serial numbers of items that are computed as they are needed: as good as endless
_ENDLESS = 2**62


@dataclass
class LatentItems:
    """
    What a prompt's training rows are made of.

    Attributes:
        latents: `[N, c, h, w]` float32, the prompt's sampling stopped at a random step.
        timesteps: `[N]` int64, at random in the stretch of time that belongs to that step.
        prediction: `[N, c, h, w]` float32, the original model's prediction there under the prompt.
        unconditional: `[N, c, h, w]` float32, its prediction under the empty prompt; `None` where nobody asks.
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    prediction: torch.Tensor
    unconditional: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, without those that are `None`."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    @classmethod
    def cat(cls, parts: Sequence["LatentItems"]) -> "LatentItems":
        """The items of several, one after the other."""
        return cls(**{name: torch.cat([p.tensors()[name] for p in parts]) for name in parts[0].tensors()})


class LatentPool:
    """
    Items of a list of prompts. An item is a function of the seed, its prompt and its serial number: it does not matter
    when it is computed, in which batch, or whether it comes out of the bank.

    Args:
        name: of the pool, in files and messages.
        prompts: the prompts.
        conditioning: of each prompt, by the original text encoder ([`~hf_robust.diffusion.Conditioning`]).
        empty: of the empty prompt, one row.
        seed: of everything that is drawn.
        steps: DDIM steps of a whole sampling.
        guidance: its guidance scale.
        paired: whether items hold the unconditional prediction too.
        size: items that the bank holds; 0: none, each item is computed as it is needed.
    """

    def __init__(
        self,
        name: str,
        prompts: Sequence[str],
        conditioning: Any,
        empty: Any,
        *,
        seed: int,
        steps: int,
        guidance: float,
        paired: bool,
        size: int = 0,
    ):
        self.name, self.prompts, self.conditioning, self.empty = name, list(prompts), conditioning, empty
        self.seed, self.steps, self.guidance, self.paired, self.size = seed, steps, guidance, paired, size
        self.generation = 0
        self.stored: LatentItems | None = None

    # ---- Which items there are ----

    @property
    def available(self) -> int:
        """Prompts that have an item: a small bank holds the first of them only."""
        return min(len(self.prompts), self.size) if self.size else len(self.prompts)

    def serials(self, prompt: int) -> int:
        """Number of items of a prompt."""
        return math.ceil((self.size - prompt) / len(self.prompts)) if self.size else _ENDLESS

    def draw(self, prompts: Sequence[int], generator: torch.Generator) -> list[tuple[int, int]]:
        """
        An item of each prompt, at random.

        Args:
            prompts: numbers of prompts.
            generator: the caller's own.

        Returns:
            The prompts, each with a serial number.
        """
        return [(p, int(torch.randint(self.serials(p), (1,), generator=generator))) for p in prompts]

    def draw_prompts(self, count: int, generator: torch.Generator) -> list[int]:
        """Numbers of `count` different prompts, at random."""
        return torch.randperm(self.available, generator=generator)[:count].tolist()

    # ---- Computing them ----

    @torch.no_grad()
    def compute(self, items: Sequence[tuple[int, int]], *, sampler: Any, original: Any, chunk: int = 16) -> LatentItems:
        """
        The items, computed.

        Args:
            items: pairs of prompt and serial number.
            sampler: the [`~hf_robust.diffusion.DiffusionModel`] whose UNet draws the latents.
            original: the one whose predictions count.
            chunk: items computed together.
        """
        with quiet(sampler):
            parts = [
                self._compute(items[start : start + chunk], sampler, original) for start in range(0, len(items), chunk)
            ]
        return LatentItems.cat(parts)

    def _compute(self, items: Sequence[tuple[int, int]], sampler: Any, original: Any) -> LatentItems:
        from hf_robust.diffusion import Conditioning, sample_latents

        device = next(sampler.parameters()).device
        total = len(sampler.alphas_cumprod)
        seeds = [draw_seed(self.seed, self.name, self.generation, *item) for item in items]
        stops, times = [], []
        for seed in seeds:
            # Another stream than that of the noise, which starts from the seed itself
            generator = torch.Generator().manual_seed(draw_seed(seed, "time"))
            stop = int(torch.randint(self.steps, (1,), generator=generator))
            window = self.steps - 1 - stop  # after `stop` steps, the latents are as noisy as in this stretch of time
            low, high = window * total // self.steps, (window + 1) * total // self.steps
            stops.append(stop)
            times.append(low + int(torch.randint(max(high - low, 1), (1,), generator=generator)))
        conditioning = self.conditioning.select([prompt for prompt, _ in items]).to(device)
        empty = self.empty.repeat(len(items)).to(device)
        timesteps = torch.tensor(times, device=device)
        latents = sample_latents(
            sampler,
            conditioning,
            empty,
            steps=self.steps,
            guidance_scale=self.guidance,
            seeds=seeds,
            stop_after=torch.tensor(stops),
        )
        if not self.paired:
            return LatentItems(latents.float(), timesteps, original.predict(latents, timesteps, conditioning).float())
        both = original.predict(
            latents.repeat(2, 1, 1, 1), timesteps.repeat(2), Conditioning.cat([conditioning, empty])
        )
        prediction, unconditional = both.float().chunk(2)
        return LatentItems(latents.float(), timesteps, prediction, unconditional)

    def take(self, items: Sequence[tuple[int, int]], *, sampler: Any, original: Any) -> LatentItems:
        """The items, out of the bank where there is one, on the sampler's device."""
        if self.stored is None:
            return self.compute(items, sampler=sampler, original=original)
        rows = torch.tensor([prompt + len(self.prompts) * serial for prompt, serial in items])
        device = next(sampler.parameters()).device
        return LatentItems(**{name: value[rows].to(device) for name, value in self.stored.tensors().items()})

    # ---- The bank ----

    def fill(self, accelerator: Accelerator, *, sampler: Any, original: Any, chunk: int = 16, progress: bool = False):
        """
        Compute all items of the bank, an equal share on every process, and keep them in the computer's memory.

        Args:
            accelerator: gathers the shares.
            sampler: see [`compute`].
            original: see [`compute`].
            chunk: items computed together.
            progress: whether to show a progress bar.
        """
        places, rank = accelerator.num_processes, accelerator.process_index
        share = math.ceil(self.size / places)
        mine = [min(rank + places * i, self.size - 1) for i in range(share)]  # every process has the same number
        items = [(row % len(self.prompts), row // len(self.prompts)) for row in mine]
        starts = tqdm(range(0, share, chunk), desc=f"Latent bank: {self.name}", disable=not progress)
        parts = [
            self.compute(items[start : start + chunk], sampler=sampler, original=original, chunk=chunk)
            for start in starts
        ]
        found = LatentItems.cat(parts).tensors()
        if places > 1:
            order = torch.arange(places * share).view(places, share).t().flatten()[: self.size]
            found = {name: accelerator.gather(value.contiguous()).cpu()[order] for name, value in found.items()}
        self.stored = LatentItems(**{name: value.cpu() for name, value in found.items()})

    def describe(self) -> dict[str, Any]:
        """All that the items depend on, but for the model."""
        names = ("name", "prompts", "seed", "steps", "guidance", "paired", "size", "generation")
        return {name: getattr(self, name) for name in names}


class LatentBank:
    """
    The pools' items, computed once. Exact only while neither the UNet nor the original text embeddings change: a UNet in
    training draws other latents after every step.

    Args:
        pools: with a `size` each.
        digest: of the model: its weights (see [`weights_digest`]), and what else of it the items depend on.
        folder: where the bank is kept; `None`: in memory only.
        chunk: items computed together.
    """

    def __init__(
        self,
        pools: Sequence[LatentPool],
        *,
        digest: str = "",
        folder: str | os.PathLike[str] | None = None,
        chunk: int = 16,
    ):
        self.pools, self.digest, self.chunk = list(pools), digest, chunk
        self.folder = None if folder is None else Path(folder)

    @property
    def path(self) -> Path | None:
        """The bank's file: other settings, prompts or weights have another one."""
        if self.folder is None:
            return None
        facts = json.dumps([self.digest, *(pool.describe() for pool in self.pools)], sort_keys=True)
        return self.folder / f"latent_bank-{hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()}.safetensors"

    def fill(
        self, accelerator: Accelerator, *, sampler: Any, original: Any, generation: int = 0, progress: bool = False
    ) -> bool:
        """
        Fill the pools: from the file if there is one for just these weights and settings, else anew.

        Args:
            accelerator: of the trainer; every process has to call this.
            sampler: see [`LatentPool.compute`].
            original: see [`LatentPool.compute`].
            generation: another number gives other items.
            progress: whether to show a progress bar.

        Returns:
            Whether items were computed.
        """
        for pool in self.pools:
            pool.generation = generation
        path = self.path
        if path is not None:
            missing = torch.tensor(not path.is_file(), device=accelerator.device)
            if not on_any_process(accelerator, missing):
                self._load(path)
                logger.info("Latent bank: read from %s.", path)
                return False
        for pool in self.pools:
            pool.fill(accelerator, sampler=sampler, original=original, chunk=self.chunk, progress=progress)
        if path is not None and accelerator.is_main_process:
            self._save(path)
        return True

    def _save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{pool.name}.{name}": value.contiguous()
            for pool in self.pools
            if pool.stored is not None
            for name, value in pool.stored.tensors().items()
        }
        draft = path.with_suffix(f".{os.getpid()}.draft")
        save_file(tensors, draft, metadata={"pools": json.dumps([pool.describe() for pool in self.pools])})
        os.replace(draft, path)

    def _load(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for pool in self.pools:
                wanted = [f.name for f in fields(LatentItems) if pool.paired or f.name != "unconditional"]
                absent = [f"{pool.name}.{name}" for name in wanted if f"{pool.name}.{name}" not in names]
                if absent:
                    raise ValueError(
                        f"{path} lacks {', '.join(absent)}: remove the file to have the bank computed anew."
                    )
                pool.stored = LatentItems(**{name: file.get_tensor(f"{pool.name}.{name}") for name in wanted})


def draw_seed(*parts: Any) -> int:
    """
    A seed that is a function of what is drawn and for whom, in 63 bits: runs, steps, rows and processes stay apart, and
    nothing has to be saved to resume.

    Args:
        *parts: numbers and strings.
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def weights_digest(*modules: nn.Module) -> str:
    """
    Hash of the modules' parameters and buffers: about a second for a gigabyte.

    Args:
        *modules: in an order.
    """
    found = hashlib.blake2b(digest_size=16)
    for module in modules:
        for name, value in module.state_dict().items():
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
