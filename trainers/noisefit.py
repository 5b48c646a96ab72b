"""Noise-augmented fine-tuning (NoiseFiT): [`NoiseFiTTrainer`] stands where [`~trl.SFTTrainer`] stood."""

import contextlib
import dataclasses
import importlib.util
import itertools
import logging
import math
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments
from trl import SFTTrainer

from hf_robust.noise import POLICY_FILE, NoisePolicy, calibrate, choose_by_snr, layer_names, plot_policy
from hf_robust.noise.prefix import shared_depth, shared_prefix, sharing_reason
from hf_robust.objectives import token_nll
from hf_robust.objectives.noise import branch_divergences, consistency_kl, symmetric_kl, teacher_kl
from hf_robust.sites import LabelIndex, label_logits
from hf_robust.trainers.attack_arguments import take_over
from hf_robust.trainers.meters import Meters
from hf_robust.trainers.noisefit_checks import check_arguments, check_data, check_model
from hf_robust.trainers.noisefit_config import NoiseFiTConfig
from hf_robust.trainers.papers import NOISE_AUGMENTED
from hf_robust.trainers.row_trainer import RowTrainer
from hf_robust.trainers.schedule import start_seed

logger = logging.getLogger(__name__)

POLICY_PLOT = "noise_policy.png"

# Batches that layers and strengths are chosen on, as in the released code
_CALIBRATION_BATCHES = {"v1": 1, "v2": 2}


class NoiseFiTTrainer(RowTrainer, SFTTrainer):
    """
    Trainer for noise-augmented fine-tuning, introduced in [Noise Augmented Fine Tuning for Mitigating Hallucinations in Large
    Language Models](https://huggingface.co/papers/2504.03302).

    Each batch runs three times, as three branches of one forward: clean, and twice with noise on the hidden states of some
    layers. The loss is

    `ce_weight * CE(clean) + (1 - ce_weight) * [KL(clean ‖ noisy 1) + KL(clean ‖ noisy 2)] / 2
    + consistency_weight * KL(noisy 2 ‖ noisy 1)`

    each term a mean over the label tokens of the accumulation window. Which layers get noise and how much is a
    [`~hf_robust.noise.NoisePolicy`]: made when training starts, saved as `noise_policy.json` with the model and each
    checkpoint, taken from there when training resumes. Evaluation, and the model after training, are free of noise.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As for [`~trl.SFTTrainer`]. Of a vision-language model, the layers of the language model get the noise.
        args ([`NoiseFiTConfig`], *optional*):
            Configuration. An [`~trl.SFTConfig`] is taken over, with the defaults of [`NoiseFiTConfig`] for the rest.
        *parent_args:
            Further positional arguments of [`~trl.SFTTrainer`].
        noise_policy ([`~hf_robust.noise.NoisePolicy`], *optional*):
            Where the noise is added, instead of what `args` would choose. Its `version` decides about gradients through the
            noise's amplitude; the losses' version is that of `args`.
        **parent_kwargs:
            All other arguments of [`~trl.SFTTrainer`]: `train_dataset`, `eval_dataset`, `processing_class`, `peft_config`,
            `quantization_config`, `callbacks`, …

    Raises:
        ValueError: the data, the model or the configuration cannot be trained on; before training starts.

    Example:

    ```python
    >>> trainer = NoiseFiTTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=NoiseFiTConfig(output_dir="steady", version="v2"),
    ...     train_dataset=question_answer_rows,
    ...     peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["hf_robust", "noisefit", "trl", "sft"]
    _name = "NoiseFiT"
    _paper = NOISE_AUGMENTED

    def __init__(
        self,
        model: Any,
        args: NoiseFiTConfig | TrainingArguments | None = None,
        *parent_args: Any,
        noise_policy: NoisePolicy | None = None,
        **parent_kwargs: Any,
    ):
        args = take_over(args, NoiseFiTConfig, "noisefit")
        if noise_policy is None and args.noise_policy is not None:
            noise_policy = NoisePolicy.load(args.noise_policy)
        check_arguments(args, parent_kwargs.get("compute_loss_func"))
        given = {**dict(zip(("data_collator", "train_dataset"), parent_args, strict=False)), **parent_kwargs}
        self.remember_data(train_dataset=given.get("train_dataset"))

        super().__init__(model, args, *parent_args, **parent_kwargs)

        check_data(self.train_dataset, args)
        if not args.is_plain:
            check_arguments(args, self.compute_loss_func)
            check_model(self.model, args, aux_loss=self.aux_loss_enabled)
            if noise_policy is not None:
                noise_policy.check(self.model)
        self.noise_policy = noise_policy if args.has_noise else None
        self._terms = args.term_weights
        # The first is clean wherever there are three; R-Drop, and losses of the noisy branches alone, have two
        self._branches = 3 if {"clean_ce", "noisy_kl"} & self._terms.keys() else 2
        self._shared_layers = 0
        self._is_ready = False
        self._micro_batch = 0
        self._step: contextlib.ExitStack | None = None
        self._meters = Meters()

    # ---- Policy ----

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The parent's micro-batches of a window; before the first, the noise policy is made."""
        batches = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_batch = 0
        if self.args.has_noise and not self._is_ready:
            self._prepare_noise()
            self._is_ready = True
        return batches

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's training; the policy of an earlier call, or of the checkpoint, is kept."""
        self._is_ready = False  # the model may have changed since
        return super().train(*args, **kwargs)

    def _prepare_noise(self) -> None:
        """Choose layers and strengths if nobody has, and find out whether the layers before them can be shared."""
        inner = self.accelerator.unwrap_model(self.model_wrapped)
        if self.noise_policy is None:
            fields = [dataclasses.asdict(self._new_policy(inner))]
            # The same rows on all processes; sums may still differ in the last digit, and choices with them
            broadcast_object_list(fields, from_process=0)
            self.noise_policy = NoisePolicy(**fields[0])
            logger.info("Noise: %s", _in_words(self.noise_policy))
            self._plot_noise(self.noise_policy)
        self._shared_layers = 0
        if self.args.prefix_sharing:
            reason = sharing_reason(inner, self.noise_policy, self.args.layer_list)
            if reason is None:
                self._shared_layers = shared_depth(inner, self.noise_policy, self.args.layer_list)
                logger.info("Prefix sharing: all branches share the first %d layers.", self._shared_layers)
            else:
                logger.warning("Prefix sharing is off: %s.", reason)

    def _plot_noise(self, policy: NoisePolicy) -> None:
        """A picture of what the policy was chosen from, beside the model, where there was a choice."""
        if not policy.details.get("layers") or not self.is_world_process_zero():
            return
        if importlib.util.find_spec("matplotlib") is None:
            logger.info("No plot of the noise policy: it needs matplotlib (`pip install 'hf_robust[plot]'`).")
            return
        plot_policy(policy, Path(self.args.output_dir) / POLICY_PLOT)

    def _new_policy(self, inner: nn.Module) -> NoisePolicy:
        args = self.args
        kinds = {"distribution": args.noise_distribution, "beta": args.noise_beta, "seed": args.seed}
        if args.noise_layers is not None:
            scale = args.noise_std**2 if args.reference_compat else args.noise_std
            statistics = "batch" if args.reference_compat else "row"
            layers = dict.fromkeys(args.noise_layers, scale)
            settings = {**kinds, "version": "v1", "statistics": statistics, "details": {"chosen_by": "noise_layers"}}
            return NoisePolicy.for_layers(inner, layers, layer_list=args.layer_list, **settings)
        kinds["modules"] = layer_names(inner, args.layer_list)
        batches = self._calibration_batches(_CALIBRATION_BATCHES[args.version])
        first: dict[str, Any] = {**batches[0], "use_cache": False}
        with self.compute_loss_context_manager():
            if args.version == "v2":
                progress = not args.disable_tqdm and self.is_world_process_zero()
                return calibrate(inner, batches, max_ce_increase=args.max_ce_increase, progress=progress, **kinds)
            return choose_by_snr(
                inner,
                first,
                sigma=args.noise_std,
                k=args.num_noisy_layers,
                snr_format=args.snr_format,
                reference_compat=args.reference_compat,
                **kinds,
            )

    def _calibration_batches(self, count: int) -> list[dict[str, Any]]:
        """Batches of training rows, the same on all processes; the order in which training reads them is left alone."""
        size, dataset = self.args.calibration_batch_size, self.train_dataset
        if isinstance(dataset, Dataset):
            generator = torch.Generator().manual_seed(self.args.seed)
            places = torch.randperm(len(dataset), generator=generator)[: count * size].tolist()
            rows = [dataset[place] for place in places]
        else:
            rows = list(itertools.islice(iter(dataset), count * size))
        collate = self._get_collator_with_removed_columns(self.data_collator, "calibration")
        return [self._prepare_inputs(collate(rows[start : start + size])) for start in range(0, len(rows), size)]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The parent's loading; every resumed training passes here, so the checkpoint's policy is taken here too."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self.args.has_noise:
            return
        if not (Path(checkpoint) / POLICY_FILE).is_file():
            logger.warning("%s holds no %s: the noise is as given, or chosen anew.", checkpoint, POLICY_FILE)
            return
        saved = NoisePolicy.load(checkpoint)
        saved.check(self.model)
        if self.noise_policy is not None and self.noise_policy.modules != saved.modules:
            logger.warning("The checkpoint's noise policy is taken, not the one that was given.")
        self.noise_policy = saved

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The parent's files and the noise policy."""
        super()._save(output_dir, state_dict)
        if self.noise_policy is not None and self.args.should_save:
            self.noise_policy.save(output_dir if output_dir is not None else self.args.output_dir)

    def _training_settings(self, peft: Any) -> dict[str, Any]:
        settings = super()._training_settings(peft)
        if self.noise_policy is not None:
            settings["noise_policy"] = _in_words(self.noise_policy)
        return settings

    # ---- Loss ----

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The parent's step, backward included, with the hooks that its loss needs; they are gone behind it."""
        with contextlib.ExitStack() as self._step:
            try:
                return super().training_step(*args, **kwargs)
            finally:
                self._step = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of all branches in training; the parent's in evaluation, and where only its term is left."""
        if self.args.is_plain or not (self.model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = {name: value for name, value in inputs.items() if name not in ("labels", "use_cache")}
        labels = inputs["labels"]
        with contextlib.ExitStack() as own:
            # Activation checkpointing runs layers again in the backward pass, which has to find the hooks
            stack = own if self._step is None else self._step
            if self.noise_policy is not None:
                self._open_hooks(stack, model, labels.shape[0], given.get("attention_mask"))
            values, size = self._values(model, given if self._shared_layers else self._repeat(given), labels)
        loss = torch.stack([weight * values[name] for name, weight in self._terms.items()]).sum()
        # As the parent: of the window's tokens on all processes, over which DDP averages; or a mean that the Trainer divides
        loss = loss / max(size, 1) if num_items_in_batch is None else loss / num_items_in_batch
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        for name, value in values.items():
            self._meters.add(name, value, size)
        self._count_tokens(given)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**given)

    def _repeat(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The rows of all branches, one branch after the other."""
        count = self._branches
        return {k: torch.cat([v] * count) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}

    def _open_hooks(self, stack: contextlib.ExitStack, model: nn.Module, rows: int, mask: torch.Tensor | None) -> None:
        assert self.noise_policy is not None
        inner = self.accelerator.unwrap_model(model)
        branches, policy = self._branches, self.noise_policy
        if self._shared_layers:
            stack.enter_context(
                shared_prefix(inner, policy, branches=branches, batch=rows, layer_list=self.args.layer_list)
            )
        noisy = torch.arange(branches * rows) >= (branches - 2) * rows  # the last two branches
        if mask is not None:
            mask = None if policy.statistics == "batch" else torch.cat([mask] * branches)
        seed = start_seed(self.args.seed, self.state.global_step, self.accelerator.process_index)
        generator = torch.Generator().manual_seed(start_seed(seed, self._micro_batch, 0))
        self._micro_batch += 1
        stack.enter_context(policy.inject(inner, rows=noisy, mask=mask, generator=generator))

    def _values(
        self, model: nn.Module, inputs: dict[str, Any], labels: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], int]:
        """One forward of all branches: the sum of each term over the label tokens, and their number."""
        args = self.args
        index = LabelIndex.from_labels(torch.cat([labels] * self._branches))
        size = len(index.targets) // self._branches
        targets = index.targets[:size]
        shifted = not args.reference_compat
        if not shifted:
            # Released code: the divergences' mask is that of the labels themselves, one position behind the predictions
            unshifted = torch.cat([labels] * self._branches).flatten().ne(-100).nonzero().flatten()
            index = dataclasses.replace(index, flat=torch.cat([index.flat, unshifted]))
        logits = label_logits(model, index, **inputs)
        # Unbound, not indexed: the backward of an index fills a tensor of all branches with zeros, for each of them
        if shifted:
            branches = compared = logits.unflatten(0, (self._branches, size)).unbind()
        else:
            own, others = logits.split([len(index.targets), len(unshifted)])
            branches = own.unflatten(0, (self._branches, size)).unbind()
            compared = others.unflatten(0, (self._branches, len(unshifted) // self._branches)).unbind()
        clean, first, second = compared[0], compared[-2], compared[-1]
        kind: dict[str, Any] = {"temperature": args.temperature, "version": args.version}
        values: dict[str, torch.Tensor] = {}
        if self._branches == 3:
            with contextlib.nullcontext() if "clean_ce" in self._terms else torch.no_grad():
                values["clean_ce"] = token_nll(branches[0], targets).sum()
        if "noisy_ce" in self._terms:
            values["noisy_ce"] = 0.5 * (token_nll(branches[-2], targets) + token_nll(branches[-1], targets)).sum()
        if {"noisy_kl", "consistency_kl"} <= self._terms.keys():
            noisy, between = branch_divergences(clean, first, second, **kind)
            values["noisy_kl"], values["consistency_kl"] = noisy.sum(), between.sum()
        elif "noisy_kl" in self._terms:
            pair = [teacher_kl(clean, noisy, **kind).sum() for noisy in (first, second)]
            values["noisy_kl"] = 0.5 * (pair[0] + pair[1])
        elif "consistency_kl" in self._terms:
            values["consistency_kl"] = consistency_kl(first, second, **kind).sum()
        if "rdrop_kl" in self._terms:
            values["rdrop_kl"] = symmetric_kl(first, second).sum()
        with torch.no_grad():
            values["mean_token_accuracy"] = branches[0].argmax(dim=-1).eq(targets).sum()
        return values, size

    # ---- Logging and cost ----

    def _count_tokens(self, inputs: dict[str, Any]) -> None:
        """The parent's count of tokens seen."""
        mask = inputs["attention_mask"] if "attention_mask" in inputs else torch.ones_like(inputs["input_ids"])
        self._total_train_tokens += int(self.accelerator.reduce(mask.sum(), reduction="sum").item())
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log of each term, in nats per label token, and the number of noisy layers."""
        if self.model.training:
            means = self._meters.read(self.accelerator)
            if means and self.noise_policy is not None:
                means["noisy_layers"] = sum(scale > 0 for scale in self.noise_policy.modules.values())
            logs.update(means)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The parent's estimate for every branch; layers that the branches share count once."""
        operations = super().floating_point_ops(inputs)
        if self.args.is_plain:
            return operations
        more = self._branches - 1
        if self._shared_layers:
            depth = len(layer_names(self.accelerator.unwrap_model(self.model), self.args.layer_list))
            return math.ceil(operations * (1 + more * (1 - self._shared_layers / depth)))
        return operations * (1 + more)


def _in_words(policy: NoisePolicy) -> str:
    """One line: kind of noise, and the scale on each module."""
    scales = ", ".join(f"`{name}` {scale:.4g}" for name, scale in policy.modules.items())
    return f"{policy.distribution} ({policy.version}), beta {policy.beta:g}, scale on {scales or 'no module'}"
