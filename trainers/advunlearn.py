"""Robust erasure of concepts from Stable Diffusion pipelines (AdvUnlearn), and ESD as the same without its attack."""

import contextlib
import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_robust.data.retain_prompts import OBJECTS, load_retain_prompts
from hf_robust.objectives.diffusion import erasure_target, erasure_with_retention, per_image_mse
from hf_robust.sites import quiet
from hf_robust.trainers.advunlearn_config import AdvUnlearnConfig
from hf_robust.trainers.advunlearn_prompts import ErasedPrompts, PromptRows, collate, erased_rows
from hf_robust.trainers.diffusion import DiffusionTrainer
from hf_robust.trainers.diffusion_saving import adapters_of
from hf_robust.trainers.diffusion_setup import as_diffusion_model, unchanged_on_error
from hf_robust.trainers.latent_bank import LatentBank, LatentItems, LatentPool, draw_seed, weights_digest
from hf_robust.trainers.papers import ADVUNLEARN

if TYPE_CHECKING:
    from hf_robust.diffusion.model import DiffusionModel

logger = logging.getLogger(__name__)

# Prompts encoded together
_CHUNK = 64


class AdvUnlearnTrainer(DiffusionTrainer):
    """
    Trainer that erases concepts from a Stable Diffusion 1.x, 2.x or SDXL pipeline and defends the erasure ("Defensive
    Unlearning with Adversarial Training for Robust Concept Erasure in Diffusion Models", arXiv 2405.15234).

    A row is a prompt of the concept. At a latent z of the concept's sampling and a time step t, the model under the attacked
    prompt is pulled to `ε₀(z, t | ∅) - η (ε₀(z, t | c) - ε₀(z, t | ∅))` of the original model ε₀; on retain prompts it is
    held to ε₀. The attack searches embeddings of a few tokens in the prompt that bring the concept back. `attack="none"` with
    `retain_weight=0` is ESD (arXiv 2303.07345), which retains nothing. No images are needed.

    All that is drawn for a row is a function of the seed, the optimizer step and the row's number: neither accumulation, nor
    processes, nor a resumed run change it. While the UNet is frozen, its predictions come from a bank that is computed once
    ([`~hf_robust.trainers.latent_bank.LatentBank`]) and equal what would be computed anew.

    Unlike `UnlearnTrainer`, which makes a *language* model forget what its training documents say, this trainer keeps a
    *diffusion* model from drawing a concept. It defends against prompts, discrete and continuous, of the kind that it is
    trained on; who holds the weights can swap the text encoder back or fine-tune, and attacks that learn an embedding freely
    (concept inversion) still bring most of an erased concept back in the paper's own figures.

    `save_model` leaves a pipeline folder (with the trained `text_encoder/` or `unet/`) as [`DiffusionTrainer`] does; a folder
    whose weights are not exactly those of its config is refused on loading.

    Args:
        model ([`~hf_robust.diffusion.DiffusionModel`], diffusers pipeline or `str`):
            What is trained, and, as it is now, the original.
        args ([`AdvUnlearnConfig`]):
            Configuration.
        data_collator: not used.
        train_dataset (*optional*):
            Prompts of what is erased: rows with a `text`, and a `concept` if it is not named in `args.concepts`; or a list of
            strings. Default: `args.concepts` themselves.
        eval_dataset: refused; measure with `hf-robust evaluate`.
        **parent_kwargs:
            Further arguments of [`DiffusionTrainer`]: `peft_config`, `callbacks`, `optimizers`, …

    Raises:
        ValueError: nothing to erase or to retain, a prompt without the concept or too long for the attacked tokens, a bank with
            the UNet in training, FSDP or ZeRO-3; before training starts.

    Example:

    ```python
    >>> trainer = AdvUnlearnTrainer(
    ...     model="CompVis/stable-diffusion-v1-4",
    ...     args=AdvUnlearnConfig(output_dir="erased", concepts=["church"], retain_weight=0.3),
    ... )
    >>> trainer.train()
    >>> trainer.save_model()
    >>> StableDiffusionPipeline.from_pretrained("erased")
    ```
    """

    _tag_names = ["hf_robust", "advunlearn", "diffusion", "stable-diffusion"]
    _name = "AdvUnlearn"
    _paper = ADVUNLEARN
    _config_class = AdvUnlearnConfig

    def __init__(
        self,
        model: Any,
        args: AdvUnlearnConfig | TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **parent_kwargs: Any,
    ):
        if eval_dataset is not None:
            raise ValueError(
                "`eval_dataset`: an erasure is not measured by a loss; use `hf-robust evaluate` on the model."
            )
        concepts = args.concepts if isinstance(args, AdvUnlearnConfig) else None
        rows = erased_rows(train_dataset, concepts)

        model = as_diffusion_model(model)
        with unchanged_on_error(model):
            super().__init__(model, args, collate, rows, None, **parent_kwargs)
            self._prepare()

    def _prepare(self) -> None:
        """The original model, the pools and the bank, once it is known what is trained."""
        if is_deepspeed_zero3_enabled():  # the parent refuses FSDP
            raise ValueError(
                "DeepSpeed's ZeRO-3 splits the UNet, with which each process also samples for as many steps as its own rows "
                "ask for: the processes would wait for each other for ever. Use DDP or ZeRO-2."
            )
        unet_is_trained = any(parameter.requires_grad for parameter in self.model.unet.parameters())
        # A frozen UNet is its own original; the original text embeddings are constants, taken now
        self._original: DiffusionModel | None = self.model.copy_frozen() if unet_is_trained else None
        self._concept_pool, self._retain_pool = self._make_pools(self.args.bank_size(unet_is_trained))
        self.latent_bank: LatentBank | None = None
        if self._concept_pool.size:
            encoders: list[nn.Module] = list(self.model.text_encoders)
            kept = self.args.latent_bank_dir is not None
            digest = self._digest(weights_digest(self.model.unet, *encoders)) if kept else ""
            self.latent_bank = LatentBank(
                [pool for pool in (self._concept_pool, self._retain_pool) if pool is not None],
                digest=digest,
                folder=self.args.latent_bank_dir,
                chunk=self.args.latent_bank_batch_size,
            )
        self._bank_generation: int | None = None
        iterations = self.args.max_steps // (2 if self.args.retain_mode == "step" else 1)
        if not self.denoising_attack.is_off and 0 < iterations <= self.args.attack_warmup_steps:
            logger.warning(
                "`attack_warmup_steps=%d` with %d iterations: nothing is ever attacked, which is ESD%s. Lower it.",
                *(self.args.attack_warmup_steps, iterations, " with a retain term" * bool(self.args.retain_weight)),
            )

    # ---- Data ----

    def _check_data(self, model: "DiffusionModel", args: Any, train_rows: Any, eval_rows: Any) -> None:
        """Place the attacked tokens and gather the retain prompts: whatever is wrong with them shows here."""
        self._prompts = ErasedPrompts(
            model,
            train_rows,
            position=None if args.build_attack().is_off else args.attack_position,
            count=args.attack_tokens,
        )
        self._retained: list[str] = []
        if args.retain_weight:
            given = args.retain_prompts
            # Where nobody names a concept, the words of the prompts are what is erased
            known = args.concepts or ()
            said = [row["concept"] or ("" if known else row["text"]) for row in train_rows]
            named = [*known, *(words for words in said if words)]
            one_source = len(given) == 1 and (given[0] == OBJECTS or given[0].endswith((".txt", ".json", ".csv")))
            self._retained = load_retain_prompts(
                given[0] if one_source else given, concepts=named, exclude_words=args.retain_exclude_words or ()
            )
            if len(self._retained) < args.retain_batch_size:
                raise ValueError(
                    f"`retain_batch_size={args.retain_batch_size!r}` with {len(self._retained)} retain prompts, which are "
                    "drawn without repetition: give more prompts, or lower it."
                )
            self._retain_ids = model.tokenize(self._retained)
        texts = {"train_dataset": self._prompts.prompts, "retain_prompts": self._retained}
        self.remember_data(**{name: Dataset.from_dict({"text": found}) for name, found in texts.items() if found})

    def _numbered(self, dataset: Any) -> PromptRows:
        args = self.args
        window = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return PromptRows(len(self._prompts), window * max(args.max_steps, 1))

    def _choose_parameters(self, model: "DiffusionModel", args: Any, peft_config: Any) -> dict[str, Any]:
        if args.train_parts is None and peft_config is None and not adapters_of(model):
            args.train_parts = ["text_encoder"]
        return super()._choose_parameters(model, args, peft_config)

    def _make_pools(self, bank_size: int) -> tuple[LatentPool, LatentPool | None]:
        """The concepts' items and those to retain; a bank holds half of each."""
        args, retained = self.args, len(self._retained)
        of_concepts = bank_size - bank_size // 2 if retained else bank_size
        of_retained = bank_size - of_concepts
        needed = 2 * max(len(self._prompts), args.retain_batch_size) if retained else len(self._prompts)
        if 0 < bank_size < needed and args.latent_bank_size is None:
            return self._make_pools(needed)  # nobody asked for fewer
        if bank_size and bank_size < needed:
            raise ValueError(
                f"`latent_bank_size={bank_size!r}` is too small: half of it has to hold an item of each of the "
                f"{len(self._prompts)} prompts, and half the retain prompts of a row: use {needed} or more, or 0 for no bank."
            )
        with quiet(self.model), torch.no_grad(), self.compute_loss_context_manager():
            empty = self.model.unconditional()
            make = functools.partial(
                LatentPool, empty=empty, seed=args.seed, steps=args.sampling_steps, guidance=args.sampling_guidance
            )
            told = self._encode(self._prompts.clean)
            concepts = make("concept", self._prompts.prompts, told, paired=True, size=of_concepts)
            if not retained:
                return concepts, None
            if of_retained and of_retained < retained:
                logger.warning(
                    "`latent_bank_size=%d` holds %d of the %d retain prompts: the others are never trained on. Use %d or more.",
                    *(bank_size, of_retained, retained, 2 * retained),
                )
            kept = self._encode(self._retain_ids)
            return concepts, make("retain", self._retained, kept, paired=False, size=of_retained)

    def _encode(self, ids: Sequence[torch.Tensor]) -> Any:
        from hf_robust.diffusion import Conditioning

        starts = range(0, len(ids[0]), _CHUNK)
        return Conditioning.cat([self.model.encode([t[start : start + _CHUNK] for t in ids]) for start in starts])

    # ---- The bank ----

    def _digest(self, weights: str) -> str:
        """What the stored items depend on beside the pools' settings: weights, schedule, tokens and precision."""
        schedule = {k: str(v) for k, v in dict(self.model.scheduler.config).items() if not k.startswith("_")}
        ids = [*self._prompts.clean, *(self._retain_ids if self._retained else ())]
        tokens = [tensor.tolist() for tensor in ids]
        return repr((weights, sorted(schedule.items()), tokens, self.accelerator.mixed_precision))

    def fill_latent_bank(self, step: int = 0) -> None:
        """
        Fill the bank as training would have it at an optimizer step; nothing happens without a bank, or if it is so already.
        Training calls this itself; every process has to.

        Args:
            step: number of optimizer steps done.
        """
        every = self.args.latent_bank_refresh_steps
        generation = step // every if every else 0
        if self.latent_bank is None or generation == self._bank_generation:
            return
        before = self.model.unet_items
        with self.compute_loss_context_manager():
            self.latent_bank.fill(
                self.accelerator,
                sampler=self.model,
                original=self.model,
                generation=generation,
                progress=not self.args.disable_tqdm and self.is_world_process_zero(),
            )
        self._bank_generation = generation
        items = self.model.unet_items - before
        logger.info("Latent bank: %d UNet items on this process.", items)
        self._meters.add("latent_bank_unet_items", items, 1 / self.accelerator.num_processes)

    # ---- Loss ----

    def _loss_of(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Loss of each row: its concept's error and that of its retain prompts."""
        inner = self.accelerator.unwrap_model(model)
        args, step = self.args, self.state.global_step
        prompts, rows = inputs["prompt"].tolist(), inputs["row"].tolist()
        iteration, turn = divmod(step, 2) if args.retain_mode == "step" else (step, 0)
        erases, retains = turn == 0, self._retain_pool is not None and (args.retain_mode == "regularizer" or turn == 1)
        attacks = erases and not self.denoising_attack.is_off and iteration >= args.attack_warmup_steps
        self.fill_latent_bank(step)
        generators = [torch.Generator().manual_seed(draw_seed(args.seed, step, row)) for row in rows]
        models = {"sampler": inner, "original": inner if self._original is None else self._original}
        device = inputs["row"].device

        found: list[tuple[LatentItems, torch.Tensor]] = []
        ids: list[list[torch.Tensor]] = []
        # In this order: what a row draws first does not depend on whether it is attacked
        if erases:
            items = self._concept_pool.take(self._draw(prompts, generators), **models)
            assert items.unconditional is not None
            found.append((items, erasure_target(items.prediction, items.unconditional, args.negative_guidance)))
            ids.append([clean[prompts] for clean in self._prompts.clean])
        if retains:
            assert self._retain_pool is not None
            chosen = [self._retain_pool.draw_prompts(args.retain_batch_size, g) for g in generators]
            wanted = [item for p, g in zip(chosen, generators, strict=True) for item in self._retain_pool.draw(p, g)]
            items = self._retain_pool.take(wanted, **models)
            found.append((items, items.prediction))
            ids.append([tensor[[prompt for prompt, _ in wanted]] for tensor in self._retain_ids])
        masks = [torch.zeros(part[0].shape, dtype=torch.bool) for part in ids]
        embeddings = None
        if attacks:
            ids[0], masks[0], embeddings = self._attack_prompts(inner, prompts, generators, models)
        input_ids = [torch.cat(parts).to(device) for parts in zip(*ids, strict=True)]
        with self._attacked(inner, embeddings, torch.cat(masks)):
            # One forward for all: a wrapper for several processes takes one for each backward
            latents = torch.cat([items.latents for items, _ in found])
            prediction = model(latents, torch.cat([items.timesteps for items, _ in found]), input_ids)
        losses = per_image_mse(prediction, torch.cat([target for _, target in found]))

        count = len(rows)
        erasure = losses[:count] if erases else losses.new_zeros(count)
        retention = losses[-count * args.retain_batch_size :].view(count, -1) if retains else None
        if erases:
            self._meters.add("erasure_loss", erasure.detach().sum(), count)
        if retention is not None:
            self._meters.add("retain_loss", retention.detach().sum(), retention.numel())
        return erasure_with_retention(erasure, retention, args.retain_weight)

    def _draw(self, prompts: Sequence[int], generators: Sequence[torch.Generator]) -> list[tuple[int, int]]:
        """One item of each row's prompt."""
        return [self._concept_pool.draw([p], g)[0] for p, g in zip(prompts, generators, strict=True)]

    def _attack_prompts(
        self,
        inner: "DiffusionModel",
        prompts: Sequence[int],
        generators: Sequence[torch.Generator],
        models: dict[str, Any],
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Attacked prompts: ids `[B, L]` for each text encoder, the mask of the attacked tokens, and all embeddings."""
        ids, mask = self._prompts.random_starts(prompts, generators)
        device = inner.device

        def draw(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            items = self._concept_pool.take(self._draw(prompts, generators), **models)
            return items.latents, items.timesteps, items.prediction

        with self._stopwatch:
            embeddings, found = self.denoising_attack.search(
                inner, input_ids=[tensor.to(device) for tensor in ids], mask=mask.to(device), draw=draw
            )
        count = len(prompts)
        if len(found.losses):
            self._meters.add("attack_loss_first", found.first_loss.sum(), count)
            self._meters.add("attack_loss_last", found.last_loss.sum(), count)
            self._meters.add("attack_non_finite", found.non_finite.sum(), count)
        return ids, mask, embeddings

    def _attacked(
        self, inner: "DiffusionModel", embeddings: torch.Tensor | None, mask: torch.Tensor
    ) -> contextlib.AbstractContextManager[None]:
        """Put the attacked rows' embeddings in their places in forwards inside the context; other rows stay as they are."""
        if embeddings is None:
            return contextlib.nullcontext()
        from hf_robust.diffusion import TextTokenSite

        padding = embeddings.new_zeros(len(mask) - len(embeddings), *embeddings.shape[1:])
        return TextTokenSite(inner).replace(torch.cat([embeddings, padding]), mask.to(embeddings.device))

    # ---- Cost, logging ----

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The parent's step; the UNet's work is counted."""
        self.fill_latent_bank(self.state.global_step)
        before = self._work()
        loss = super().training_step(*args, **kwargs)
        # Summed over processes and micro-batches, for one optimizer step
        share = 1 / (self.accelerator.num_processes * self.args.gradient_accumulation_steps)
        for name, now, then in zip(("unet_items", "unet_backward_items"), self._work(), before, strict=True):
            self._meters.add(name, now - then, share)
        return loss

    def _work(self) -> tuple[int, int]:
        models = [self.model] if self._original is None else [self.model, self._original]
        return sum(m.unet_items for m in models), sum(m.unet_backward_items for m in models)

    def _training_settings(self, peft: Any) -> dict[str, Any]:
        settings = super()._training_settings(peft)
        if self.denoising_attack.is_off:
            # The published ESD retains nothing
            kind = "ESD with a retain term" if self.args.retain_weight else "ESD"
            settings["method"] = f"{kind} (the attack is off)"
        return settings
