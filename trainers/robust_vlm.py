"""Adversarial fine-tuning of vision-language models: [`RobustVLMTrainer`] stands where [`~trl.SFTTrainer`] stood."""

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import ProcessorMixin, TrainingArguments
from trl import SFTTrainer

from hf_robust.objectives import token_nll
from hf_robust.sites import LabelIndex, gather_head, label_logits
from hf_robust.trainers.attack_arguments import take_over
from hf_robust.trainers.card import CardTrainer
from hf_robust.trainers.flops import search_operations
from hf_robust.trainers.guards import check_arguments, check_model
from hf_robust.trainers.meters import Meters
from hf_robust.trainers.papers import PIXEL_ADVERSARIAL_TRAINING
from hf_robust.trainers.robust_vlm_attack import FoundPerturbation, VLMAttack
from hf_robust.trainers.robust_vlm_config import RobustVLMConfig
from hf_robust.trainers.robust_vlm_parts import give_rates, vision_parts
from hf_robust.trainers.schedule import start_seed

# Key under which a batch carries the number of images of each row
_COUNTS = "image_counts"
# In the place of the optimizer step
_EVALUATION = -1


class _CountingCollator:
    """A collator's batches with the number of images of each row, which their tensors do not tell."""

    def __init__(self, collator: Callable[..., Any], image_token: int | None = None, max_length: int | None = None):
        self._collator, self._image_token, self._max_length = collator, image_token, max_length

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        counts = [1 if row.get("image") is not None else len(row.get("images") or []) for row in rows]
        batch = self._collator(rows)
        if self._max_length is not None and self._image_token is not None:
            self._check_whole(batch["input_ids"], counts)
        batch[_COUNTS] = torch.tensor(counts)
        return batch

    def _check_whole(self, ids: torch.Tensor, counts: list[int]) -> None:
        """Refuse rows that `max_length` has cut an image off, or cut through one: the model needs all tokens of each."""
        held = ids.eq(self._image_token or 0)
        for row, count in enumerate(counts):
            is_cut = bool(held[row, -1]) and ids.shape[1] == self._max_length
            if count and (is_cut or not held[row].any()):
                raise ValueError(
                    f"`max_length={self._max_length!r}` cuts image tokens off row {row} of a batch, which has {count} images: "
                    "raise it, or use `None`."
                )


class RobustVLMTrainer(CardTrainer, SFTTrainer):
    """
    Trainer for supervised fine-tuning of vision-language models under attack, LLaVA-like and Qwen-VL-like.

    An adversary moves the prompt's images within a ball of raw pixels, what the language model reads, or both, so that the
    answer becomes unlikely; [`~trl.SFTTrainer`]'s own loss is then taken under that perturbation. With the attack off, this is
    [`~trl.SFTTrainer`].

    What a perturbation of pixels means depends on the model. LLaVA's `pixel_values` are the image. Qwen-VL's are patches, each
    of which holds every pixel twice (for two frames), and LLaVA-NeXT's are tiles of the image beside an overview of it: free
    perturbations of those are not ones that an image could carry. By default (`pixel_space="image"`) the image is perturbed
    and patches and tiles are made of it anew, differentiably, so that what is trained against is an image;
    `pixel_space="pixel_values"` perturbs them as they are. See [`~hf_robust.sites.image_layout`].

    Perturbed embeddings are those the language model reads: text and image features in place. A hook on the input embeddings
    would not reach the images.

    Evaluation measures both: `eval_loss` and the parent's figures are of clean rows, `eval_adversarial_loss` (nats per token of
    the answer) and `eval_adversarial_token_accuracy` of attacked ones.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As for [`~trl.SFTTrainer`]; a model with an image tower and a language model.
        args ([`RobustVLMConfig`], *optional*):
            Configuration. An [`~trl.SFTConfig`] is taken over.
        *parent_args, **parent_kwargs:
            All other arguments of [`~trl.SFTTrainer`]. Datasets hold `images` (or `image`) and `prompt` and `completion`, or
            `messages` with `assistant_only_loss=True`: the loss is on the answer.

    Raises:
        ValueError: the data, the model or the configuration cannot be trained on; before training starts.

    Example:

    ```python
    >>> trainer = RobustVLMTrainer(
    ...     model="llava-hf/llava-1.5-7b-hf",
    ...     args=RobustVLMConfig(output_dir="robust", pixel_epsilon=4 / 255, projector_learning_rate=2e-5),
    ...     train_dataset=rows,
    ...     peft_config=LoraConfig(r=128, lora_alpha=256, target_modules="all-linear"),
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["hf_robust", "robust-vlm", "trl", "sft"]
    _name = "RobustVLM"
    _paper = PIXEL_ADVERSARIAL_TRAINING
    data_collator: Any

    def __init__(
        self,
        model: Any,
        args: RobustVLMConfig | TrainingArguments | None = None,
        *parent_args: Any,
        **parent_kwargs: Any,
    ):
        args = take_over(args, RobustVLMConfig, "robust-vlm")
        check_arguments(args)
        names = ("data_collator", "train_dataset", "eval_dataset", "processing_class")
        given = {**dict(zip(names, parent_args, strict=False)), **parent_kwargs}
        evaluated = given.get("eval_dataset")
        several = evaluated if isinstance(evaluated, dict) else {"": evaluated}
        self._check_rows(args, given.get("train_dataset"), "train_dataset")
        for name, rows in several.items():
            if rows is not None:
                self._check_rows(args, rows, f"eval_dataset[{name!r}]" if name else "eval_dataset")
        self._check_processor(given.get("processing_class"))
        self.remember_data(train_dataset=given.get("train_dataset"))

        super().__init__(model, args, *parent_args, **parent_kwargs)

        check_arguments(args)  # of which the parent may have changed some
        processor: Any = self.processing_class
        self._check_processor(processor)
        check_model(self.model)
        inner = self.accelerator.unwrap_model(self.model)
        if getattr(inner.config, "vision_config", None) is None:
            raise ValueError(
                f"`model` ({type(inner).__name__}) has no image tower: give a vision-language model. For text, use CATTrainer."
            )
        self._rates = {"projector": args.projector_learning_rate, "vision": args.vision_learning_rate}
        self._check_rates(vision_parts(inner))
        self.vlm_attack: VLMAttack = args.build_attack(image_processor=processor.image_processor)
        self.vlm_eval_attack: VLMAttack = args.build_attack(
            args.eval_attack_steps, image_processor=processor.image_processor
        )
        image_token = getattr(inner.config, "image_token_id", None)
        self.data_collator = _CountingCollator(self.data_collator, image_token, args.max_length)
        self._meters = Meters()
        self._evaluated = torch.zeros(3)

    # ---- Checks ----

    @staticmethod
    def _check_processor(processor: Any) -> None:
        if processor is not None and getattr(processor, "image_processor", None) is None:
            raise ValueError(
                f"`processing_class={type(processor).__name__}` has no image processor: give the vision-language model's "
                f"processor{'' if isinstance(processor, ProcessorMixin) else ', not its tokenizer'}."
            )

    @staticmethod
    def _check_rows(args: RobustVLMConfig, dataset: Any, name: str) -> None:
        if not isinstance(dataset, Dataset | IterableDataset):
            raise TypeError(
                f"`{name}` must be a `Dataset` or `IterableDataset`, not `{type(dataset).__name__}`: rows of `images`, "
                "`prompt` and `completion`."
            )
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError(f"`{name}` has 0 rows: give rows of `images`, `prompt` and `completion`.")
        if "image" not in first and "images" not in first:
            raise ValueError(
                f"`{name}` has the columns {list(first)} and no `image` or `images`: add one (a list may be empty), or use "
                "CATTrainer for text alone."
            )
        if not ("prompt" in first and "completion" in first) and not args.assistant_only_loss:
            raise ValueError(
                f"`{name}` has the columns {list(first)}, of which every token would count as an answer: give `prompt` and "
                "`completion`, or `messages` with `assistant_only_loss=True`."
            )
        if args.completion_only_loss is False:
            raise ValueError(
                "`completion_only_loss=False` takes the prompt's tokens for an answer: leave it unset, so that the loss is on "
                "the answer."
            )

    def _check_rates(self, parts: dict[str, list[torch.nn.Parameter]]) -> None:
        for name, rate in self._rates.items():
            if rate is None:
                continue
            if not parts[name]:
                raise ValueError(
                    f"`{name}_learning_rate={rate!r}`: cannot tell which module of the model that is. Leave it unset."
                )
            if rate == 0:
                for parameter in parts[name]:
                    parameter.requires_grad_(False)
            elif not any(parameter.requires_grad for parameter in parts[name]):
                raise ValueError(
                    f"`{name}_learning_rate={rate!r}`: nothing of it is trained. With a `peft_config`, name the module in "
                    "`target_modules` or `modules_to_save`."
                )

    # ---- Training ----

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The parent's optimizer, with groups of their own for projector and image tower."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            parts = vision_parts(self.accelerator.unwrap_model(self.model if model is None else model))
            give_rates(optimizer, parts, self._rates)
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The parent's loss, in training under the perturbation."""
        counts = inputs.pop(_COUNTS, None)
        trains = self.model.training and torch.is_grad_enabled()
        if self.vlm_attack.is_off or not trains:
            if trains:
                gather_head(self.accelerator.unwrap_model(model))
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        found = self._search(model, inputs, counts, self.vlm_attack)
        rows = len(inputs["labels"])
        self._meters.add("attack_non_finite", found.result.non_finite.sum(), rows)
        self._meters.add("attack_loss_first", -found.result.first_loss.nan_to_num().sum(), rows)
        self._meters.add("attack_loss_last", -found.result.last_loss.nan_to_num().sum(), rows)
        gather_head(self.accelerator.unwrap_model(model))
        with found.add(self.accelerator.unwrap_model(model)):
            return super().compute_loss(model, {**inputs, **found.inputs}, return_outputs, num_items_in_batch)

    def _search(self, model: Any, inputs: dict[str, Any], counts: Any, attack: VLMAttack) -> FoundPerturbation:
        # Random starts are functions of step and images, so that neither batches nor processes nor a resumed run change them;
        # every evaluation starts at the same points
        step = self.state.global_step if self.model.training else _EVALUATION
        with self._stopwatch:
            inner = self.accelerator.unwrap_model(model)
            where = f"the batch at step {step + 1}" if self.model.training else "a batch of the evaluation"
            return attack.search(inner, inputs, counts, seed=start_seed(self.args.seed, step, 0), where=where)

    # ---- Evaluation, logging, cost ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The parent's step on the clean rows; their answers are also measured under attack."""
        inputs = self._prepare_inputs(inputs)
        counts = inputs.pop(_COUNTS, None)
        clean = super().prediction_step(model, dict(inputs), prediction_loss_only, ignore_keys)
        if self.vlm_eval_attack.is_off:
            return clean
        with torch.no_grad(), self.compute_loss_context_manager():
            found = self._search(model, inputs, counts, self.vlm_eval_attack)
            index = LabelIndex.from_labels(inputs["labels"])
            given = {k: v for k, v in {**inputs, **found.inputs}.items() if k not in ("labels", "use_cache")}
            with found.add(self.accelerator.unwrap_model(model)):
                logits = label_logits(model, index, **given)
            per_token = torch.stack(
                [
                    token_nll(logits, index.targets),
                    (logits.argmax(dim=-1) == index.targets).float(),
                    torch.ones_like(index.targets, dtype=torch.float32),
                ]
            )
            sums = per_token.new_zeros(len(inputs["labels"]), 3).index_add(0, index.rows, per_token.T)
        self._evaluated += self.accelerator.gather_for_metrics(sums).sum(dim=0).cpu()
        return clean

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The parent's loop, and the figures under attack."""
        self._evaluated = torch.zeros(3)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        nll, correct, tokens = self._evaluated.tolist()
        if tokens > 0:
            output.metrics[f"{metric_key_prefix}_adversarial_loss"] = nll / tokens
            output.metrics[f"{metric_key_prefix}_adversarial_token_accuracy"] = correct / tokens
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log: loss of the attack at its start and end, and its share of the time."""
        if self.model.training:
            means = self._meters.read(self.accelerator)
            if means:
                means["attack_time_share"] = self._stopwatch.read_share()
            logs.update(means)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The parent's estimate, plus the attack's."""
        operations, attack = super().floating_point_ops(inputs), self.vlm_attack
        if attack.is_off:
            return operations
        return operations + search_operations(operations, attack.steps, forwards=attack.keep == "best")

    def _training_settings(self, peft: Any) -> dict[str, Any]:
        settings = super()._training_settings(peft)
        settings["threat model of the training"] = self.vlm_attack.describe()
        return settings
