"""Denoising fine-tuning of Stable Diffusion pipelines: plain, under noise on modules, or against an adversary."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_robust.noise import NoisePolicy
from hf_robust.objectives.diffusion import per_image_mse
from hf_robust.trainers.attack_arguments import take_over
from hf_robust.trainers.card import CardTrainer
from hf_robust.trainers.diffusion_attack import without_conditioning
from hf_robust.trainers.diffusion_config import DiffusionConfig
from hf_robust.trainers.diffusion_data import (
    ImageCaptionCollator,
    captions_of,
    check_rows,
    listed_ids,
    numbered,
)
from hf_robust.trainers.diffusion_saving import PipelineSaving, adapters_of
from hf_robust.trainers.diffusion_setup import (
    as_diffusion_model,
    choose_parameters,
    training_image_size,
    unchanged_on_error,
    wrapped_names,
)
from hf_robust.trainers.flops import unet_operations
from hf_robust.trainers.meters import Meters
from hf_robust.trainers.schedule import start_seed

if TYPE_CHECKING:
    from hf_robust.diffusion.model import DiffusionModel

# In the place of the optimizer step for what evaluation draws, so that every evaluation draws the same
_EVALUATION = -1


@dataclass
class NoisyBatch:
    """
    A batch with everything drawn that its loss needs.

    Attributes:
        latents: `[rows, c, h, w]`, noised.
        timesteps: `[rows]` int64.
        input_ids: `[rows, length]` for each text encoder.
        target: `[rows, c, h, w]`, what the UNet is to say.
        seeds: one for each row.
        emptied: `[rows]` bool, rows whose caption was dropped.
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    input_ids: list[torch.Tensor]
    target: torch.Tensor
    seeds: list[int]
    emptied: torch.Tensor

    def repeat(self, count: int) -> "NoisyBatch":
        """All rows, then all again."""
        latents, timesteps, target, emptied, *ids = (
            torch.cat([t] * count) for t in (self.latents, self.timesteps, self.target, self.emptied, *self.input_ids)
        )
        return NoisyBatch(latents, timesteps, ids, target, self.seeds * count, emptied)


class DiffusionTrainer(CardTrainer, PipelineSaving):
    """
    Trainer for Stable Diffusion 1.x, 2.x and SDXL pipelines on images with captions.

    The loss is the squared error of the UNet's prediction of the noise (or of v, as the scheduler's `prediction_type` says)
    at one random time step, a mean over rows. Time step, noise and caption dropout of a row are functions of the seed, the
    optimizer step and the row's number, so that they depend neither on accumulation nor on processes nor on a resumed run;
    in evaluation, of seed and number alone, so that `eval_loss` is comparable between evaluations.

    Options (see [`DiffusionConfig`]): noise on the outputs of named modules (a [`~hf_robust.noise.NoisePolicy`]), and an
    adversary that moves the caption's embeddings or the text conditioning so that denoising fails; its `eval_loss` under
    attack is `eval_adversarial_loss`. With `attack_epsilon=0` training is plain training, bit for bit. Noise of a policy is
    drawn for each micro-batch, so that it does depend on how a batch is cut.

    `save_model` leaves a folder that any diffusers pipeline opens; with adapters, their merged weights, and the adapters
    themselves in `adapters/` (see [`~hf_robust.trainers.diffusion_saving.PipelineSaving`]).

    Args:
        model ([`~hf_robust.diffusion.DiffusionModel`], diffusers pipeline or `str`):
            What is trained; a string is a pipeline folder or an id on the Hub. Weights that are trained have to be in float32
            or bfloat16.
        args ([`DiffusionConfig`], *optional*):
            Configuration; [`~transformers.TrainingArguments`] are taken over.
        data_collator (`Callable`, *optional*):
            Makes batches. Default: [`~hf_robust.trainers.diffusion_data.ImageCaptionCollator`].
        train_dataset:
            Rows of image and caption: `datasets.Dataset`, `datasets.IterableDataset` or a list of dicts.
        eval_dataset:
            The same, or a dict of them by name.
        peft_config (`PeftConfig` or `dict`, *optional*):
            LoRA, SaRA or another weight adapter of PEFT for the UNet, or a dict of them by `"unet"` and `"text_encoder"`.
            Nothing else is trained then.
        noise_policy ([`~hf_robust.noise.NoisePolicy`], *optional*):
            Instead of the file named in `args`.
        **parent_kwargs:
            Further arguments of [`~transformers.Trainer`]: `callbacks`, `optimizers`, …

    Raises:
        ValueError: the data, the model or the configuration cannot be trained on, the model is to be split by FSDP, or adapters
            are to be trained under ZeRO-3; before training starts.
        ImportError: diffusers is missing.

    Example:

    ```python
    >>> trainer = DiffusionTrainer(
    ...     model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    ...     args=DiffusionConfig(output_dir="drawings", attack_epsilon=0.05),
    ...     train_dataset=load_dataset("imagefolder", data_dir="drawings", split="train"),
    ...     peft_config=LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
    ... )
    >>> trainer.train()
    >>> trainer.save_model()
    >>> StableDiffusionPipeline.from_pretrained("drawings")
    ```
    """

    _tag_names = ["hf_robust", "diffusion", "stable-diffusion"]
    _name = "denoising"
    _task = "text-to-image"
    # A subclass names its own
    _config_class: type[DiffusionConfig] = DiffusionConfig

    # `compute_loss` divides by the rows of the whole window
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: DiffusionConfig | TrainingArguments | None = None,
        data_collator: Callable[[Sequence[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        peft_config: Any = None,
        noise_policy: NoisePolicy | None = None,
        **parent_kwargs: Any,
    ):
        args = take_over(args, self._config_class, self._name)
        if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "`gradient_checkpointing_kwargs={'use_reentrant': True}`: reentrant activation checkpointing allows no "
                "gradient with respect to a perturbation. Set `gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )
        if noise_policy is None and args.noise_policy is not None:
            noise_policy = NoisePolicy.load(args.noise_policy)
        model = as_diffusion_model(model)
        if noise_policy is not None and not adapters_of(model):
            noise_policy.check(model)
        self.image_size = training_image_size(model, args.image_size)
        if data_collator is None:
            data_collator = self._make_collator(model, args)
        self._check_data(model, args, train_dataset, eval_dataset)
        set_seed(args.seed)  # adapters start at random; the parent seeds only after this
        with unchanged_on_error(model):
            self.adapters = self._choose_parameters(model, args, peft_config)
            super().__init__(model, args, data_collator, train_dataset, eval_dataset, **parent_kwargs)

        if self.is_fsdp_enabled:
            raise ValueError(
                "`fsdp` splits the VAE too, which encodes images outside the model's own forward, where nothing gathers it. "
                "Use DDP or ZeRO-2."
            )
        if self.adapters and is_deepspeed_zero3_enabled():
            raise ValueError(
                "`peft_config` (or a model with adapters) together with DeepSpeed's ZeRO-3, which splits the weights: adapters "
                "can then be neither merged nor saved. Use DDP or ZeRO-2, or train without adapters."
            )
        self.noise_policy = noise_policy
        self._injected = None if noise_policy is None else wrapped_names(noise_policy, model)
        if self._injected is not None:
            self._injected.check(model)
        self.denoising_attack: Any = args.build_attack()
        self._empty_is_zero = model.is_sdxl and model.pipeline().config.get("force_zeros_for_empty_prompt", False)
        self._empty_ids = model.tokenize([""])
        self._meters = Meters()
        self._step: contextlib.ExitStack | None = None
        self._micro_batch = 0
        self._evaluated: dict[str, dict[int, float]] = {}
        # Of the UNet's work: what was in earlier steps, what went back in the attack, operations of one item
        self._counted, self._searched, self._item_operations = (0, 0), 0, 0

    # ---- What a subclass with other data overrides ----

    def _make_collator(self, model: "DiffusionModel", args: DiffusionConfig) -> Callable[..., dict[str, Any]]:
        """The collator if none is given."""
        tokenize = functools.partial(model.tokenize, truncation=args.caption_truncation)
        return ImageCaptionCollator(tokenize, self.image_size, args.image_resize)

    def _check_data(self, model: "DiffusionModel", args: DiffusionConfig, train_rows: Any, eval_rows: Any) -> None:
        """Refuse rows that cannot be trained on, and remember their captions for the card."""
        named = {"train_dataset": train_rows}
        several = eval_rows if isinstance(eval_rows, dict) else {"": eval_rows}
        named |= {f"eval_dataset[{name!r}]" if name else "eval_dataset": rows for name, rows in several.items()}
        for name, rows in named.items():
            if rows is None:
                continue
            check_rows(
                rows,
                name,
                image_column=args.image_column,
                caption_column=args.caption_column,
                image_size=self.image_size,
                resize=args.image_resize,
                tokenize=model.tokenize if args.caption_truncation == "error" else None,
            )
        if train_rows is not None and hasattr(train_rows, "__len__"):
            captions = captions_of(train_rows, args.caption_column)
            self.remember_data(train_dataset=Dataset.from_dict({"text": captions}))
        else:
            self.remember_data(train_dataset=train_rows)

    def _loss_of(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """
        Loss of each row in training.

        Args:
            model: as the parent hands it over, maybe wrapped: the forward whose weights get gradients.
            inputs: a batch of the collator.

        Returns:
            `[rows]` float32.
        """
        inner = self.accelerator.unwrap_model(model)
        batch = self._noised(inner, inputs, self.state.global_step)
        if self.denoising_attack.is_off:
            self._open_noise(inner)
            return self._denoise(model, batch)
        share, rows = self.args.adversarial_weight, len(batch.seeds)
        delta = self._attack(inner, batch)
        if share < 1:
            # One forward for both halves: a wrapper for several processes takes one for each backward
            batch, delta = batch.repeat(2), torch.cat([torch.zeros_like(delta), delta])
        self._open_noise(inner)
        with self.denoising_attack.add(inner, delta):
            losses = self._denoise(model, batch)
        self._meters.add("adversarial_loss", losses[-rows:].detach().sum(), rows)
        if share == 1:
            return losses
        self._meters.add("clean_loss", losses[:rows].detach().sum(), rows)
        return (1 - share) * losses[:rows] + share * losses[rows:]

    def _evaluation_losses(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Losses `[rows]` by the name of the metric in evaluation; `loss` has to be among them."""
        inner = self.accelerator.unwrap_model(model)
        batch = self._noised(inner, inputs, _EVALUATION)
        found = {"loss": self._denoise(model, batch)}
        if not self.denoising_attack.is_off:
            with self.denoising_attack.add(inner, self._attack(inner, batch)):
                found["adversarial_loss"] = self._denoise(model, batch)
        return found

    # ---- Loss ----

    def _noised(self, inner: "DiffusionModel", inputs: dict[str, Any], step: int) -> NoisyBatch:
        """Latents of the images, noised, and the captions, some of them emptied in training."""
        args, rows = self.args, inputs["row"].tolist()
        device = inputs["pixel_values"].device
        seeds = [start_seed(args.seed, step, row) for row in rows]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        steps = inner.alphas_cumprod.shape[0]
        timesteps = torch.cat([torch.randint(steps, (1,), generator=g) for g in generators]).to(device)
        dropout = 0.0 if step == _EVALUATION else args.caption_dropout
        emptied = (torch.cat([torch.rand(1, generator=g) for g in generators]) < dropout).to(device)
        pairs = zip(self._empty_ids, listed_ids(inputs), strict=True)
        input_ids = [torch.where(emptied.unsqueeze(1), empty.to(device), ids) for empty, ids in pairs]
        with torch.no_grad():
            latents = inner.encode_images(inputs["pixel_values"], generator=generators)
            shape = latents.shape[1:]
            noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(latents)
            noisy = inner.add_noise(latents, noise, timesteps)
            target = inner.target(latents, noise, timesteps)
        return NoisyBatch(noisy, timesteps, input_ids, target, seeds, emptied)

    def _denoise(self, model: nn.Module, batch: NoisyBatch) -> torch.Tensor:
        """Squared error of each row `[rows]`, float32."""
        inner = self.accelerator.unwrap_model(model)
        cleared = without_conditioning(inner, batch.emptied) if self._empty_is_zero else contextlib.nullcontext()
        with cleared:
            return per_image_mse(model(batch.latents, batch.timesteps, batch.input_ids), batch.target)

    def _attack(self, inner: "DiffusionModel", batch: NoisyBatch) -> torch.Tensor:
        """The adversary's perturbation of each row."""
        with self._stopwatch:
            found = self.denoising_attack.search(
                inner, batch.input_ids, lambda: self._denoise(inner, batch), seeds=batch.seeds
            )
        if self.model.training:
            self._meters.add("attack_loss_first", -found.first_loss.sum(), len(batch.seeds))
        return found.delta

    def _open_noise(self, inner: nn.Module) -> None:
        """Add the policy's noise until the end of the training step: checkpointing runs modules again in the backward."""
        if self._injected is None:
            return
        seed = start_seed(self.args.seed, self.state.global_step, self.accelerator.process_index)
        generator = torch.Generator().manual_seed(start_seed(seed, self._micro_batch, 0))
        self._micro_batch += 1
        if self._step is None:
            raise RuntimeError("the noise policy's hooks live in `training_step`; call that instead of `compute_loss`.")
        self._step.enter_context(self._injected.inject(inner, generator=generator))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The parent's step, backward included, with the hooks that its loss needs; they are gone behind it."""
        with contextlib.ExitStack() as self._step:
            try:
                return super().training_step(*args, **kwargs)
            finally:
                self._step = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean of [`_loss_of`] over the rows of the window, on all processes together."""
        losses = self._loss_of(model, inputs)
        self._searched = self._work()[1]  # what went back through the UNet until here did so in the attack
        if num_items_in_batch is None:
            loss = losses.mean()
        else:
            # DDP takes the mean over processes
            loss = losses.sum() * self.accelerator.num_processes / num_items_in_batch
        return (loss, {"losses": losses}) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The parent's micro-batches of a window, and how many rows they hold on all processes."""
        self._micro_batch, self._counted = 0, self._work()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        rows = torch.tensor(sum(_rows(batch) for batch in batches), device=device)
        return batches, self.accelerator.reduce(rows, reduction="sum")

    # ---- Evaluation ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Losses of the rows, each under the time step and noise that are its own."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = self._evaluation_losses(model, inputs)
        rows = self.accelerator.gather(inputs["row"]).tolist()
        for name, values in losses.items():
            # By number: processes get some rows twice, to have equally many
            self._evaluated.setdefault(name, {}).update(
                zip(rows, self.accelerator.gather(values).tolist(), strict=True)
            )
        return losses["loss"].mean(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The parent's loop; losses are means over rows, whatever the batches were."""
        self._evaluated = {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, values in self._evaluated.items():
            output.metrics[f"{metric_key_prefix}_{name}"] = sum(values.values()) / len(values)
        return output

    # ---- Data, parameters, logging ----

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """The parent's loader over rows that carry their number."""
        return super()._get_dataloader(self._numbered(dataset), *args, **kwargs)

    def _numbered(self, dataset: Any) -> Any:
        return numbered(dataset, self.args.image_column, self.args.caption_column)

    def _choose_parameters(self, model: "DiffusionModel", args: DiffusionConfig, peft_config: Any) -> dict[str, Any]:
        """Freeze the model but for what is trained; returns the adapters."""
        return choose_parameters(
            model, train_parts=args.train_parts, text_encoder_layers=args.text_encoder_layers, peft_config=peft_config
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The pipeline or adapters, card and training prompts, and the noise policy."""
        super()._save(output_dir, state_dict)
        if self.noise_policy is not None and self.args.should_save:
            self.noise_policy.save(output_dir if output_dir is not None else self.args.output_dir)

    def _work(self) -> tuple[int, int]:
        """Items that the UNet ran forward and backward so far."""
        return self.model.unet_items, self.model.unet_backward_items

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """
        What the UNet did in this step: sampling, attack and training. A forward of one item is counted once; its gradients
        cost as much again, and those of the weights, if they are trained, once more. Text encoders and VAE are left out.
        """
        forward, backward = self._work()
        trained = any(parameter.requires_grad for parameter in self.model.unet.parameters())
        passes = forward - self._counted[0] + backward - self._counted[1] + (backward - self._searched) * trained
        if not self._item_operations:
            inner = self.accelerator.unwrap_model(self.model)
            self._item_operations = unet_operations(inner, self.image_size // inner.vae_scale_factor)
        self._counted = self._work()
        return self._item_operations * passes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log of what the adversary did, and its share of the time."""
        if self.model.training:
            means = self._meters.read(self.accelerator)
            if "attack_loss_first" in means:
                means["attack_time_share"] = self._stopwatch.read_share()
            logs.update(means)
        super().log(logs, start_time)

    def _training_settings(self, peft: Any) -> dict[str, Any]:
        settings = super()._training_settings(peft)
        settings["threat model of the training"] = self.denoising_attack.describe()
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        settings["trained parameters"] = f"{trained:,}"
        for name, adapter in self.adapters.items():
            config = adapter.peft_config["default"]
            rank = f", r {config.r}, alpha {config.lora_alpha}" if hasattr(config, "lora_alpha") else ""
            settings[f"adapter on {name}"] = f"{type(config).__name__}{rank}"
        if self.noise_policy is not None:
            scales = ", ".join(f"`{name}` {scale:.4g}" for name, scale in self.noise_policy.modules.items())
            settings["noise_policy"] = f"{self.noise_policy.distribution}, scale on {scales or 'no module'}"
        return settings

    def card_text(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> str:
        """The parent's card, as one of a pipeline that draws."""
        from huggingface_hub import ModelCard

        card: Any = ModelCard(super().card_text(model_name, dataset_name, tags))
        card.data.library_name, card.data.pipeline_tag = "diffusers", "text-to-image"
        return f"---\n{card.data.to_yaml()}\n---\n\n{card.text.strip()}\n"


def _rows(batch: dict[str, Any]) -> int:
    """Rows of a batch."""
    return next(len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.dim())
