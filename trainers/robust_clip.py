"""Robust fine-tuning of CLIP's image tower (FARE, TeCoA, PMG-AFT, Sim-CLIP): [`RobustCLIPTrainer`]."""

import copy
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import get_peft_model
from torch import nn
from transformers import TrainingArguments, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_robust.attacks.vision import pixel_generators
from hf_robust.objectives.clip import fare_loss, pmg_aft_loss, sim_clip_loss, similarity_logits, tecoa_loss
from hf_robust.sites import adapter_off, quiet
from hf_robust.sites.pixels import PixelUnits
from hf_robust.trainers.attack_arguments import take_over
from hf_robust.trainers.batches import CheckedCollator
from hf_robust.trainers.card import CardTrainer
from hf_robust.trainers.flops import search_operations
from hf_robust.trainers.labels import check_batch_labels
from hf_robust.trainers.meters import Meters
from hf_robust.trainers.papers import CLIP_PAPERS
from hf_robust.trainers.robust_clip_config import SUPERVISED, RobustCLIPConfig
from hf_robust.trainers.robust_clip_data import ImageCollator, check_image_rows, class_names_of
from hf_robust.trainers.robust_clip_tower import (
    class_features,
    image_features,
    image_tower,
    merged_tower,
    save_vision_model,
)
from hf_robust.trainers.schedule import start_seed

# In the place of the optimizer step
_EVALUATION = -1


class RobustCLIPTrainer(CardTrainer):
    """
    Trainer for CLIP's image tower under attack: FARE ([arXiv 2402.12336](https://huggingface.co/papers/2402.12336)), TeCoA
    ([2212.07016](https://huggingface.co/papers/2212.07016)), PMG-AFT
    ([2401.04350](https://huggingface.co/papers/2401.04350)) and Sim-CLIP
    ([2407.14971](https://huggingface.co/papers/2407.14971)).

    Projected gradient descent ([`~hf_robust.attacks.PGD`]) moves each image within a ball of raw pixels so that the loss rises
    (of PMG-AFT its cross-entropy); the step is on the loss of the perturbed image. Radius, step and box are in raw [0, 1]
    pixels, whatever mean and standard deviation the image processor normalises by.

    Trained is the image tower with its projection, in full or by adapters; texts are encoded once, before training. The
    frozen tower that FARE and PMG-AFT compare with is a copy of the model as it is given here, or the model with its adapter
    switched off. After an interruption, give the model that was given the first time and `resume_from_checkpoint`.

    `save_model` writes the tower as it is trained (a CLIPVisionModelWithProjection, or an adapter), [`save_vision_tower`] a
    plain CLIPVisionModel, which drops into a LLaVA, [`save_clip`] the whole CLIP model:

    ```python
    >>> trainer.save_vision_tower("robust_tower")
    >>> llava.model.vision_tower = CLIPVisionModel.from_pretrained("robust_tower")
    ```

    Evaluation attacks too: `eval_loss` is the loss under attack, `eval_clean_loss` that of clean images; with labels and
    `class_names` there are `eval_accuracy` and `eval_robust_accuracy` of zero-shot classification.

    Args:
        model ([`~transformers.CLIPModel`], its image tower, a PEFT model around that, or `str`):
            What is trained. Weights are shared with it, so that a CLIPModel that is given sees with the trained tower.
            `"tecoa"` and `"pmg_aft"` need a whole CLIPModel.
        args ([`RobustCLIPConfig`], *optional*):
            Configuration; [`~transformers.TrainingArguments`] are taken over.
        data_collator (`Callable`, *optional*):
            Makes batches of `pixel_values` and `labels`. Default:
            [`~hf_robust.trainers.robust_clip_data.ImageCollator`].
        train_dataset:
            Rows of `image` (or `pixel_values`) and, where the loss needs them, `labels` (or `label`).
        eval_dataset:
            The same, or a dict of them by name.
        processing_class:
            CLIP's processor, or its image processor (without class names). `None`: `pixel_values` are raw [0, 1] pixels.
        peft_config ([`~peft.PeftConfig`], *optional*):
            An adapter to train instead of the whole tower.
        **parent_kwargs:
            Further arguments of [`~transformers.Trainer`]: `callbacks`, `optimizers`, …

    Raises:
        ValueError: the data, the model or the configuration cannot be trained on; before training starts.

    Example:

    ```python
    >>> trainer = RobustCLIPTrainer(
    ...     model="openai/clip-vit-large-patch14",
    ...     args=RobustCLIPConfig(output_dir="robust-clip", attack_epsilon=4 / 255),
    ...     train_dataset=images,
    ...     processing_class=CLIPProcessor.from_pretrained("openai/clip-vit-large-patch14"),
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["hf_robust", "robust-clip"]
    _name = "RobustCLIP"

    _signature_columns: list[str] | None
    # `compute_loss` divides by the rows of the whole window
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: RobustCLIPConfig | TrainingArguments | None = None,
        data_collator: Callable[..., dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        peft_config: Any = None,
        **parent_kwargs: Any,
    ):
        args = take_over(args, RobustCLIPConfig, "robust-clip")
        if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "`gradient_checkpointing_kwargs={'use_reentrant': True}`: reentrant activation checkpointing allows no "
                "gradient with respect to a perturbation. Set `gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )
        if train_dataset is None:
            raise ValueError("`train_dataset` is required: rows of `image` or `pixel_values`.")
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "DeepSpeed's ZeRO-3 splits models as they are made, the teacher and the text tower among them, which no "
                "forward of the trained tower gathers: use DDP, ZeRO-2 or FSDP2."
            )
        tower, self.clip = image_tower(model)
        processor = getattr(processing_class, "image_processor", processing_class)
        self.class_names = args.class_names or class_names_of(train_dataset)
        if args.loss_type in SUPERVISED:
            self._check_supervised(args, processing_class)
        self._check_rows(args, train_dataset, eval_dataset, processor, data_collator)
        data_collator = data_collator or ImageCollator(processor)
        self._units = PixelUnits(processor)
        first = CheckedCollator(data_collator, main_input="pixel_values")([next(iter(train_dataset))])["pixel_values"]
        self._units.check(first, args.attack_epsilon, args.attack_norm, where="`train_dataset`")
        self.pixel_attack = args.build_attack(image_processor=processor)
        self.pixel_eval_attack = args.build_attack(args.eval_attack_steps, image_processor=processor)
        self._teacher = None
        if args.loss_type in ("fare", "pmg_aft") and peft_config is None and not is_peft_model(tower):
            self._teacher = copy.deepcopy(tower).eval().requires_grad_(False)
        if peft_config is not None:
            if is_peft_model(tower):
                raise ValueError("`peft_config` was given with a `model` that has an adapter: pass one of the two.")
            set_seed(args.seed)  # adapters start at random; the parent seeds only after this
            tower = get_peft_model(tower, peft_config)
        if args.gradient_checkpointing and is_peft_model(tower):
            tower.enable_input_require_grads()
        self.remember_data(train_dataset=train_dataset)
        self._paper = CLIP_PAPERS[args.loss_type]

        super().__init__(
            tower,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class=processing_class,
            **parent_kwargs,
        )

        self._classes: torch.Tensor | None = None
        tokenizer = getattr(processing_class, "tokenizer", None)
        if self.clip is not None and tokenizer is not None and self.class_names:
            found = class_features(self.clip, tokenizer, self.class_names, args.prompt_templates)
            self._classes = found.to(self.accelerator.device)
        if self._teacher is not None:
            self._teacher.to(self.accelerator.device)
        self._meters = Meters()
        self._evaluated: dict[str, list[float]] = {}

    # ---- Checks and data ----

    def _check_supervised(self, args: RobustCLIPConfig, processing_class: Any) -> None:
        kind = f"`loss_type={args.loss_type!r}`"
        if self.clip is None:
            raise ValueError(
                f"{kind} compares images with texts: give a whole CLIPModel as `model`, not a tower alone."
            )
        if getattr(processing_class, "tokenizer", None) is None:
            raise ValueError(f"{kind} compares images with texts: give a CLIPProcessor as `processing_class`.")
        if not self.class_names:
            raise ValueError(
                f"{kind} needs the names of the classes: give `class_names`, in the order of the labels, or a dataset whose "
                "label column has the feature `ClassLabel`."
            )

    def _check_rows(self, args: RobustCLIPConfig, train_rows: Any, eval_rows: Any, processor: Any, own: Any) -> None:
        named = {"train_dataset": train_rows}
        several = eval_rows if isinstance(eval_rows, dict) else {"": eval_rows}
        named |= {f"eval_dataset[{name!r}]" if name else "eval_dataset": rows for name, rows in several.items()}
        for name, rows in named.items():
            if rows is not None and own is None:
                check_image_rows(
                    rows,
                    name,
                    needs_labels=args.loss_type in SUPERVISED,
                    processor=processor,
                    classes=len(self.class_names) if self.class_names else None,
                )

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["image", "pixel_values", "labels", "label"]

    def save_training_prompts(self, folder: Any) -> None:
        """Nothing: images have no prompts."""

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The parent's micro-batches of a window, and how many rows they hold on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        rows = torch.tensor(sum(len(batch["pixel_values"]) for batch in batches), device=device)
        return batches, self.accelerator.reduce(rows, reduction="sum")

    # ---- Loss ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean of the loss under attack over the rows of the window, on all processes together."""
        if self.pixel_attack is not None and self.model.training:
            where = f"the batch at step {self.state.global_step + 1}"
            self._units.check(inputs["pixel_values"], self.args.attack_epsilon, self.args.attack_norm, where=where)
        self._check_labels(inputs, f"the batch at step {self.state.global_step + 1}")
        losses = self._losses(model, inputs, self.pixel_attack)
        if num_items_in_batch is None:
            loss = losses.mean()
        else:
            # DDP takes the mean over processes
            loss = losses.sum() * self.accelerator.num_processes / num_items_in_batch
        return (loss, {"losses": losses}) if return_outputs else loss

    def _check_labels(self, inputs: dict[str, torch.Tensor], where: str) -> None:
        if self._classes is not None and self.args.loss_type in SUPERVISED:
            remedy = "Give `class_names` a name for each class."
            check_batch_labels(inputs.get("labels"), len(self._classes), where, remedy)

    def _losses(self, model: nn.Module, inputs: dict[str, torch.Tensor], attack: Any) -> torch.Tensor:
        """Loss of each row `[batch]` under the attack (`None`: of the clean images)."""
        return self._loss_at(model, inputs, *self._attacked(model, inputs, attack))

    def _attacked(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], attack: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The images as the attack leaves them, and the frozen tower's features of the clean ones where the loss needs them."""
        pixels = inputs["pixel_values"]
        reference = self._frozen(model, pixels) if self.args.loss_type == "fare" else None
        if attack is None:
            return pixels, reference
        delta = self._perturb(model, pixels, inputs.get("labels"), reference, attack)
        return pixels + delta.to(pixels.dtype), reference

    def _loss_at(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        moved: torch.Tensor,
        reference: torch.Tensor | None,
    ) -> torch.Tensor:
        """Loss of each row `[batch]` at perturbed images."""
        args, pixels, labels = self.args, inputs["pixel_values"], inputs.get("labels")
        if args.loss_type == "fare":
            assert reference is not None
            return fare_loss(image_features(model, moved), reference)
        if args.loss_type == "tecoa":
            assert self._classes is not None and labels is not None
            return tecoa_loss(image_features(model, moved), self._classes, labels, args.logit_scale)
        # One forward for both: a wrapper for several processes takes one for each backward
        adversarial, clean = image_features(model, torch.cat([moved, pixels])).chunk(2)
        if args.loss_type == "sim_clip":
            return sim_clip_loss(adversarial, clean)
        assert self._classes is not None and labels is not None
        frozen = self._frozen(model, moved)
        logits = [similarity_logits(each, self._classes, args.logit_scale) for each in (adversarial, clean, frozen)]
        return pmg_aft_loss(
            logits[0],
            logits[1],
            logits[2],
            labels,
            generalization_weight=args.pmg_generalization_weight,
            clean_weight=args.pmg_clean_weight,
        )

    @torch.no_grad()
    def _frozen(self, model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """Features in the tower as it was before training."""
        if self._teacher is not None:
            return image_features(self._teacher, pixels)
        inner = self.accelerator.unwrap_model(model)
        with quiet(inner), adapter_off(inner):
            return image_features(inner, pixels)

    def _perturb(
        self, model: nn.Module, pixels: torch.Tensor, labels: Any, reference: torch.Tensor | None, attack: Any
    ) -> torch.Tensor:
        """The adversary's perturbation of each image, in the units of `pixel_values`."""
        args, classes = self.args, self._classes
        inner = self.accelerator.unwrap_model(model)
        if args.loss_type == "sim_clip":
            with torch.no_grad(), quiet(inner):
                reference = image_features(inner, pixels)

        def objective(delta: torch.Tensor) -> tuple[torch.Tensor, None]:
            features = image_features(inner, pixels + delta.to(pixels.dtype))
            if args.loss_type == "fare":
                assert reference is not None
                return -fare_loss(features, reference), None
            if args.loss_type == "sim_clip":
                assert reference is not None
                return -sim_clip_loss(features, reference), None
            assert classes is not None
            return -tecoa_loss(features, classes, labels, args.logit_scale), None

        # Random starts are functions of step and image, so that neither batches nor processes nor a resumed run change them;
        # every evaluation starts at the same points
        step = self.state.global_step if self.model.training else _EVALUATION
        with self._stopwatch:
            starts = pixel_generators(start_seed(args.seed, step, 0), pixels)
            found = attack.search(inner, pixel_values=pixels, labels=labels, objective=objective, generators=starts)
        if self.model.training:
            rows = len(pixels)
            self._meters.add("attack_non_finite", found.non_finite.sum(), rows)
            self._meters.add("attack_loss_first", -found.first_loss.nan_to_num().sum(), rows)
            self._meters.add("attack_loss_last", -found.last_loss.nan_to_num().sum(), rows)
        return found.delta

    # ---- Evaluation ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Losses under attack and of clean images, and zero-shot answers where there are classes and labels."""
        inputs = self._prepare_inputs(inputs)
        self._check_labels(inputs, "a batch of an evaluation")
        with torch.no_grad(), self.compute_loss_context_manager():
            found = self._evaluation(model, inputs)
        for name, values in found.items():
            gathered = self.accelerator.gather_for_metrics(values)
            self._evaluated[name].extend(gathered.float().tolist())
        return found["loss"].mean(), None, None

    def _evaluation(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Figures `[batch]` by the name of the metric."""
        pixels, labels, attack = inputs["pixel_values"], inputs.get("labels"), self.pixel_eval_attack
        clean = self._losses(model, inputs, None)
        found = {"loss": clean}
        if attack is not None:
            # One perturbation serves loss and accuracy
            moved, reference = self._attacked(model, inputs, attack)
            found = {"loss": self._loss_at(model, inputs, moved, reference), "clean_loss": clean}
        if self._classes is not None and labels is not None:
            images = {"accuracy": pixels} if attack is None else {"accuracy": pixels, "robust_accuracy": moved}
            for name, seen in images.items():
                answers = similarity_logits(image_features(model, seen), self._classes).argmax(dim=-1)
                found[name] = (answers == labels).float()
        return found

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The parent's loop; figures are means over rows."""
        self._evaluated = defaultdict(list)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, values in self._evaluated.items():
            output.metrics[f"{metric_key_prefix}_{name}"] = sum(values) / len(values)
        return output

    # ---- Saving, logging, cost ----

    def save_vision_tower(self, folder: str | Path) -> None:
        """
        Write the trained tower as a plain [`~transformers.CLIPVisionModel`] (adapters merged, no projection), with its image
        processor: what a LLaVA holds as its `vision_tower`.

        Args:
            folder: where it goes.
        """
        if self.args.should_save:
            save_vision_model(merged_tower(self.accelerator.unwrap_model(self.model)), folder)
            self._save_processor(folder, getattr(self.processing_class, "image_processor", self.processing_class))

    def save_clip(self, folder: str | Path) -> None:
        """
        Write the whole CLIP model with the trained tower (adapters merged) and its processor.

        Args:
            folder: where it goes.

        Raises:
            ValueError: the trainer was given a tower alone.
        """
        if self.clip is None:
            raise ValueError("`save_clip` needs the texts' tower too: the trainer was given an image tower alone.")
        if self.args.should_save:
            tower = merged_tower(self.accelerator.unwrap_model(self.model))
            whole = copy.copy(self.clip)
            parts = {"vision_model": tower.vision_model, "visual_projection": tower.visual_projection}
            whole._modules = {**self.clip._modules, **parts}
            whole.save_pretrained(folder)
            self._save_processor(folder, self.processing_class)

    @staticmethod
    def _save_processor(folder: str | Path, processor: Any) -> None:
        if processor is not None:
            processor.save_pretrained(folder)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log: loss of the attack at its start and end, and its share of the time."""
        if self.model.training:
            means = self._meters.read(self.accelerator)
            if means:
                means["attack_time_share"] = self._stopwatch.read_share()
            logs.update(means)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The parent's estimate for every branch of the loss, forwards of the frozen tower, and the attack."""
        own, kind, attack = super().floating_point_ops(inputs), self.args.loss_type, self.pixel_attack
        operations = own * (2 if kind in ("pmg_aft", "sim_clip") else 1)
        if kind in ("fare", "pmg_aft"):
            operations += own // 3
        if attack is None:
            return operations
        further = (attack.keep == "best") + (
            kind == "sim_clip"
        )  # whose reference is the trained tower's of clean images
        return operations + search_operations(own, attack.steps, forwards=further)

    def _training_settings(self, peft: Any) -> dict[str, Any]:
        settings = super()._training_settings(peft)
        args = self.args
        settings["threat model of the training"] = (
            "none: the attack is off"
            if self.pixel_attack is None
            else f"ε {args.attack_epsilon:.4g} of raw [0, 1] pixels, norm {args.attack_norm}, {args.attack_steps} steps"
        )
        return settings
