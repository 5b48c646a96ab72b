"""Unlearning of language models: [`UnlearnTrainer`] stands where [`~trl.SFTTrainer`] stood."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainingArguments
from trl import SFTTrainer

from hf_robust.objectives import rmu_direction
from hf_robust.report.report import Report
from hf_robust.trainers.meters import Meters
from hf_robust.trainers.papers import ROBUST_UNLEARNING_PAPERS, UNLEARNING_PAPERS
from hf_robust.trainers.row_trainer import RowTrainer
from hf_robust.trainers.unlearn_checks import check_arguments, check_model, freeze_all_but_named
from hf_robust.trainers.unlearn_config import UnlearnConfig, own_config
from hf_robust.trainers.unlearn_data import (
    FORGET,
    REFERENCE_NLL,
    RETAIN,
    ROW,
    PairCollator,
    PairedRows,
    check_collated_labels,
    check_labels,
    check_overlap,
    check_rows,
    has_images,
    numbered,
    rows_of,
)
from hf_robust.trainers.unlearn_losses import (
    REFERENCE,
    TOTALS,
    count_rows,
    forget_rows,
    label_index,
    model_inputs,
    reference_of,
    retain_rows,
    row_weights,
)
from hf_robust.trainers.unlearn_reference import ReferenceModel
from hf_robust.trainers.unlearn_robust import make_perturbation

logger = logging.getLogger(__name__)

DIRECTION_FILE = "rmu_direction.safetensors"


class UnlearnTrainer(RowTrainer, SFTTrainer):
    """
    Trainer that makes a language model forget some rows and keep others, so that it goes on not knowing them when it is
    attacked, fine-tuned or quantised (`args.robust`).

    Each row to forget is paired with a row to keep, anew in every epoch. The loss is

    `forget_weight * F(forget rows) + retain_weight * R(retain rows)`

    with F and R chosen by `loss_type` and `retain_type` ([`UnlearnConfig`]), each a mean over its rows or label tokens of the
    accumulation window. The model before training, where a loss compares with it, is the model with its adapter switched off,
    and of a full model a frozen copy. Evaluation is [`~trl.SFTTrainer`]'s: the cross-entropy of whatever `eval_dataset` holds.

    For text. What a diffusion model draws is erased by [`AdvUnlearnTrainer`], which shares the aim and nothing else: its rows
    are prompts that name a concept, its loss is the denoiser's, and its robustness one against adversarial prompts.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As for [`~trl.SFTTrainer`]; quantised ones with a `peft_config`. Of a vision-language model hidden states are those
            of its language model. `loss_type="rmu"` freezes every weight but those it trains.
        args ([`UnlearnConfig`], *optional*):
            Configuration. An [`~trl.SFTConfig`] is taken over, with the defaults of [`UnlearnConfig`] for the rest.
        data_collator (*optional*):
            Makes a batch of forget rows, and one of retain rows. Default: [`~trl.SFTTrainer`]'s.
        train_dataset ([`~datasets.Dataset`] or `str`, *optional*):
            Another name of `forget_dataset`.
        *parent_args:
            Further positional arguments of [`~trl.SFTTrainer`].
        forget_dataset ([`~datasets.Dataset`] or `str`):
            Rows to forget, as [`~trl.SFTTrainer`] takes them: `prompt` and `completion`, `messages` or `text`; or the Hub id,
            folder or file of such rows. An epoch goes through these once. Required.
        retain_dataset ([`~datasets.Dataset`] or `str`):
            Rows to keep, likewise. Required unless `retain_weight` is 0.
        **parent_kwargs:
            All other arguments of [`~trl.SFTTrainer`]: `eval_dataset` (such as `{"forget": ..., "retain": ...}`),
            `processing_class`, `peft_config`, `quantization_config`, `callbacks`, …

    Raises:
        ValueError: the data, the model or the configuration cannot be trained on; before training starts.
        TypeError: a dataset is streaming, or no dataset.

    Example:

    ```python
    >>> trainer = UnlearnTrainer(
    ...     model="my-finetuned-model",
    ...     args=UnlearnConfig(output_dir="unlearned", loss_type="npo", robust="sam"),
    ...     forget_dataset=rows_to_forget,
    ...     retain_dataset=rows_to_keep,
    ...     peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["hf_robust", "unlearning", "trl", "sft"]
    _row_arguments = {"train": "forget_dataset", "retain": "retain_dataset", "eval": "eval_dataset"}
    _name = "Unlearning"
    train_dataset: Any
    data_collator: Any
    completion_only_loss: bool
    _signature_columns: Any
    # The losses are shares of the window's; nothing is left for the parent to divide
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: UnlearnConfig | TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | str | None = None,
        *parent_args: Any,
        forget_dataset: Dataset | str | None = None,
        retain_dataset: Dataset | str | None = None,
        **parent_kwargs: Any,
    ):
        args = own_config(args)
        check_arguments(args, parent_kwargs.get("compute_loss_func"))
        if forget_dataset is not None and train_dataset is not None:
            raise ValueError("`train_dataset` is another name of `forget_dataset`: give one of the two.")
        formatting_func = parent_kwargs.get("formatting_func")
        forget = check_rows(
            rows_of(train_dataset if forget_dataset is None else forget_dataset, "forget_dataset"), "forget_dataset"
        )
        retain = None
        if args.retain_weight:
            retain = check_rows(rows_of(retain_dataset, "retain_dataset"), "retain_dataset")
            check_overlap(forget, retain, formatting_func, args.dataset_text_field)
        elif retain_dataset is not None:
            logger.warning(
                "`retain_weight=0` with `loss_type=%r`: no row of `retain_dataset` is trained on. Set `retain_weight=1` to "
                "keep them.",
                args.loss_type,
            )
        if args.ddp_broadcast_buffers is None:
            # Forget and retain rows run one after the other, and DDP would overwrite buffers in between. Buffers of language
            # models are constants, so nothing is lost.
            args.ddp_broadcast_buffers = False
        self.remember_data(forget_dataset=forget, retain_dataset=retain)
        self._paper = UNLEARNING_PAPERS[args.loss_type]

        # The parent knows `loss_type` as something else, and asks for it here alone
        loss_type, args.loss_type = args.loss_type, "nll"
        try:
            super().__init__(model, args, data_collator, numbered(forget), *parent_args, **parent_kwargs)
        finally:
            args.loss_type = loss_type

        check_arguments(args, self.compute_loss_func)
        check_model(self.model, self.accelerator, args, aux_loss=self.aux_loss_enabled)
        self.train_dataset = self._pairs(self.train_dataset, len(forget), retain)
        self.data_collator = PairCollator(self.data_collator, args.ce_u_skip_tokens if loss_type == "ce_u" else 0)
        self.rmu_direction: torch.Tensor | None = None
        if loss_type == "rmu":
            self.rmu_direction = rmu_direction(self.model.config.get_text_config().hidden_size, args.seed)
            trained = freeze_all_but_named(self.model, args)
            logger.info("RMU trains %d weights: %s", len(trained), ", ".join(trained))
        self.reference: ReferenceModel | None = None
        if args.forget_reference or args.retain_reference:
            copies = not args.precompute_ref_log_probs
            self.reference = ReferenceModel(self.model, self.accelerator, copies=copies)
        self.perturbation = make_perturbation(args, self.model, self.accelerator)
        self._window: list[dict[str, Any]] = []
        self._meters = Meters()

    # ---- Data ----

    def _pairs(self, forget: Dataset, given: int, retain: Dataset | None) -> PairedRows:
        """Both kinds of rows with a label in each, tokenised but for images (the parent has done it for the forget rows)."""
        skip = self.args.ce_u_skip_tokens if self.args.loss_type == "ce_u" else 0
        length, collator = self.args.max_length, self.data_collator
        as_batches: dict[str, Any] = {
            "batch_size": self.args.per_device_train_batch_size,
            "progress": not self.args.disable_tqdm,
        }
        if self._skip_prepare_dataset:
            forget = forget.remove_columns(ROW)
            check_collated_labels(forget, collator, "forget_dataset", length, skip, **as_batches)
        else:
            forget = check_labels(forget, given, "forget_dataset", length, skip)
        if retain is not None:
            if self._is_vision_dataset != has_images(retain):
                raise ValueError(
                    "`forget_dataset` and `retain_dataset` must both have images, or neither: rows of the two are made into "
                    f"batches alike. Their columns are {forget.column_names} and {retain.column_names}."
                )
            if self._skip_prepare_dataset:
                check_collated_labels(retain, collator, "retain_dataset", length, **as_batches)
            else:
                count = len(retain)
                retain = self._prepare_like_parent(numbered(retain), "retain")
                retain = check_labels(retain, count, "retain_dataset", length)
        return PairedRows(forget, retain, self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def _prepare_like_parent(self, dataset: Dataset, name: str) -> Dataset:
        """The parent's tokenisation; whether prompts are labels follows from these rows, not from the forget rows."""
        before = self.completion_only_loss
        if self.args.completion_only_loss is None:
            self.completion_only_loss = {"prompt", "completion"} <= set(dataset.column_names)
        try:
            return self._prepare_dataset(dataset, self.processing_class, self.args, False, self._formatting_func, name)
        finally:
            self.completion_only_loss = before

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, FORGET, RETAIN, REFERENCE_NLL]))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The parent's micro-batches of a window, each with the window's numbers of rows and label tokens."""
        if isinstance(self.train_dataset, PairedRows):
            # Before the first batch of an epoch is asked for; an epoch ends at a whole number
            self.train_dataset.set_epoch(int(self.state.epoch or 0))
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, num_items
        kinds = [kind for kind in (FORGET, RETAIN) if kind in batches[0]]
        counts = torch.stack([count_rows([batch[kind]["labels"] for batch in batches]) for kind in kinds])
        # Once a window, without waiting for the device
        counts = self.accelerator.reduce(counts.to(self.accelerator.device), reduction="sum")
        for kind, totals in zip(kinds, counts, strict=True):
            for batch in batches:
                batch[kind][TOTALS] = totals
        if not self.perturbation.is_off:
            self._window = [batch[FORGET] for batch in batches]
        return batches, num_items

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's training; before the first, the forget rows' reference where it is to be computed beforehand."""
        rows = self.train_dataset
        if self.args.precompute_ref_log_probs and rows.reference_nll is None:
            rows.reference_nll = self._reference_nll(rows.forget)
        return super().train(*args, **kwargs)

    def _reference_nll(self, dataset: Dataset) -> list[float]:
        """Summed negative log-likelihood of each row; each process computes its share."""
        size, processes = self.args.per_device_eval_batch_size, self.accelerator.num_processes
        collate, found = self.data_collator.collator, torch.zeros(len(dataset), device=self.accelerator.device)
        # Every process makes the same forwards; one without rows left repeats the first, for nobody
        starts = range(
            self.accelerator.process_index * size, -(-len(dataset) // (size * processes)) * size * processes, size
        )
        for start in tqdm(starts[::processes], desc="Reference", disable=self.args.disable_tqdm, leave=False):
            places = list(range(start, min(start + size, len(dataset))))
            part = self._prepare_inputs(dict(collate([dataset[place] for place in places or [0]])))
            with self.compute_loss_context_manager():
                values = self._reference_of("npo", self.model, part).float()
            if places:
                found[places] = values
        return self.accelerator.reduce(found, reduction="sum").tolist()

    # ---- Losses ----

    def forget_losses(self, model: nn.Module, part: dict[str, Any]) -> torch.Tensor:
        """
        The forget loss of each row, where training lowers it.

        Args:
            model: the trainer's model, wrapped or not.
            part: a batch of forget rows: `input_ids`, `attention_mask`, `labels`, …. What the model before training says about
                them is computed once and kept in it.

        Returns:
            `[batch]` float32; of a loss over tokens the mean over the row's own.

        Raises:
            RuntimeError: in training, what `precompute_ref_log_probs` has computed is not with the rows.
        """
        self._add_forget_reference(model, part)
        inner = self.accelerator.unwrap_model(model)
        return forget_rows(model, part, self.args, inner=inner, direction=self.rmu_direction)

    def forget_loss(self, model: nn.Module, part: dict[str, Any]) -> torch.Tensor:
        """
        A batch's share of the window's forget loss, without `forget_weight`.

        Args:
            model: see [`forget_losses`].
            part: see [`forget_losses`].

        Returns:
            0-dim float32; the shares of all micro-batches and processes sum up to the loss.
        """
        return (row_weights(self.args.loss_type, part) * self.forget_losses(model, part)).sum()

    def retain_loss(self, model: nn.Module, part: dict[str, Any]) -> torch.Tensor:
        """
        A batch's share of the window's retain loss, without `retain_weight`.

        Args:
            model: the trainer's model, wrapped or not.
            part: a batch of retain rows.

        Returns:
            0-dim float32.
        """
        if self.args.retain_reference and REFERENCE not in part:
            part[REFERENCE] = self._reference_of(self.args.retain_type, model, part)
        inner = self.accelerator.unwrap_model(model)
        losses = retain_rows(model, part, self.args, inner=inner)
        return (row_weights(self.args.retain_type, part) * losses).sum()

    def _add_forget_reference(self, model: nn.Module, part: dict[str, Any]) -> None:
        if not self.args.forget_reference or REFERENCE in part:
            return
        if self.args.precompute_ref_log_probs and self.is_in_train:  # computed now it would be the trained model's
            raise RuntimeError(
                f"A batch of forget rows lacks the `{REFERENCE}` that `precompute_ref_log_probs=True` computed: leave the "
                "trainer's `train_dataset` and `data_collator` as they are, or set `precompute_ref_log_probs=False`."
            )
        part[REFERENCE] = self._reference_of(self.args.loss_type, model, part)

    def _reference_of(self, kind: str, model: nn.Module, part: dict[str, Any]) -> torch.Tensor:
        assert self.reference is not None
        label_index(part)  # made before: an inference-mode reference would not share it
        with self.reference.use(model) as (before, inner):
            return reference_of(kind, before, part, inner=inner, layer=self.args.activation_layer)

    # ---- Training ----

    def training_step(self, model, inputs, num_items_in_batch=None):
        """
        The parent's step, once for the forget rows and once for the retain rows: the graph of the first is gone when the
        second starts. Under a perturbation the forget rows' forward and backward are those of `self.perturbation`.
        """
        if not self.perturbation.is_off:
            # What the parent's step begins with: schedule-free optimizers hold other weights in evaluation
            model.train()
            if callable(getattr(self.optimizer, "train", None)):
                self.optimizer.train()
        if self._window:
            self._start_perturbation(model)
        inputs = self._prepare_inputs(inputs)
        # Processes exchange gradients in the last backward, which has to reach every trained weight: hidden states of a layer
        # do not depend on the layers behind it
        order = [
            kind for kind in ((FORGET, RETAIN) if self.args.loss_type == "rmu" else (RETAIN, FORGET)) if kind in inputs
        ]
        loss: Any = 0.0
        for kind in order:
            sync = kind == order[-1]
            if kind == FORGET and not self.perturbation.is_off:
                loss = loss + self._perturbed_step(model, inputs[FORGET], sync=sync)
            else:
                with contextlib.nullcontext() if sync else self._no_sync(model):
                    loss = loss + super().training_step(model, {kind: inputs[kind]}, num_items_in_batch)
        return loss

    @contextlib.contextmanager
    def _no_sync(self, model: nn.Module) -> Iterator[None]:
        """Leave the exchange of gradients, and DeepSpeed's step, to the backward that follows."""
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(before)

    def _start_perturbation(self, model: nn.Module) -> None:
        """
        Once an optimizer step, with what all its micro-batches are to forget. What a reference says is kept for the step
        itself, unless it is logits of several micro-batches: these are computed anew, so that memory is that of one.
        """
        for part in self._window:
            part.update(self._prepare_inputs(part))  # in place, where the step finds it
        keeps = len(self._window) == 1 or self.args.loss_type != "undial"
        losses = [functools.partial(self._window_loss, part, keeps) for part in self._window]
        self._window = []
        self.perturbation.start(self, model, losses, step=self.state.global_step)

    def _window_loss(self, part: dict[str, Any], keeps: bool, model: nn.Module) -> torch.Tensor:
        loss = self.forget_loss(model, part)
        if not keeps:
            part.pop(REFERENCE, None)
        return loss

    def _perturbed_step(self, model: nn.Module, forget: dict[str, Any], *, sync: bool) -> torch.Tensor:
        with self.compute_loss_context_manager():
            self._add_forget_reference(model, forget)
        label_index(forget)
        given = {**model_inputs(forget), "labels": forget["labels"]}
        scale = self.args.forget_weight * self.accelerator.num_processes
        values: list[torch.Tensor] = []

        def forget_loss(model: nn.Module) -> torch.Tensor:
            loss = self.forget_loss(model, forget)
            values.append(loss.detach())
            return loss

        loss = self.perturbation.backward(self, model, forget_loss, given, scale=scale, sync=sync)
        self._note("forget_loss", torch.stack(values).mean(), forget)
        self._count_tokens(forget)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The forget or the retain loss of a part of a training batch, weighted; the parent's loss in evaluation."""
        parts = [kind for kind in (FORGET, RETAIN) if kind in inputs]
        if not parts:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        total: Any = 0.0
        for kind in parts:
            part = inputs[kind]
            weight = self.args.forget_weight if kind == FORGET else self.args.retain_weight
            value = (self.forget_loss if kind == FORGET else self.retain_loss)(model, part)
            self._note(f"{kind}_loss", value.detach(), part)
            self._count_tokens(part)
            # DDP averages gradients over processes, while the window's totals count all of them
            total = total + weight * self.accelerator.num_processes * value
        if not return_outputs:
            return total
        with torch.no_grad():
            return total, model(**model_inputs(inputs[parts[0]]), use_cache=False)

    def _note(self, name: str, share: torch.Tensor, part: dict[str, Any]) -> None:
        """Shares of a window sum up to its loss."""
        kind = self.args.loss_type if name == "forget_loss" else self.args.retain_type
        self._meters.add(name, share, row_weights(kind, part).sum())

    def _count_tokens(self, part: dict[str, Any]) -> None:
        """The parent's count of tokens seen."""
        mask = part["attention_mask"] if "attention_mask" in part else torch.ones_like(part["input_ids"])
        self._total_train_tokens += int(self.accelerator.reduce(mask.sum(), reduction="sum").item())
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log: `forget_loss`, `retain_loss`, and what the perturbation reports."""
        if self.model.training:
            logs.update(self._meters.read(self.accelerator))
            logs.update(self.perturbation.meters.read(self.accelerator))
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The parent's estimate for both kinds of rows, a forward (a third) more where there is a reference, and the attack."""
        if FORGET not in inputs:
            return super().floating_point_ops(inputs)
        compares = {FORGET: self.args.forget_reference, RETAIN: self.args.retain_reference}
        operations = 0
        for kind in (kind for kind in (FORGET, RETAIN) if kind in inputs):
            own = super().floating_point_ops(inputs[kind])
            computed = compares[kind] and not (kind == FORGET and self.args.precompute_ref_log_probs)
            operations += self.perturbation.operations(own) if kind == FORGET and not self.perturbation.is_off else own
            operations += own // 3 if computed else 0
        return operations

    # ---- Card and saving ----

    def training_report(self, title: str | None = None) -> Report:
        """The parent's, with the papers of the robust form beside the loss's."""
        report = super().training_report(title)
        for paper in () if self.perturbation.is_off else ROBUST_UNLEARNING_PAPERS[self.args.robust]:
            report.method["paper"] += f"; {paper['title']}, arXiv {paper['id']}"
            report.method["citation"] += f"\n\n{paper['citation']}"
        return report

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The parent's files and RMU's direction."""
        super()._save(output_dir, state_dict)
        if self.rmu_direction is not None and self.args.should_save:
            folder = Path(output_dir if output_dir is not None else self.args.output_dir)
            save_file({"direction": self.rmu_direction}, folder / DIRECTION_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The parent's loading; every resumed training passes here, so RMU's direction is restored here too."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.rmu_direction is None:
            return
        path = Path(checkpoint) / DIRECTION_FILE
        if not path.is_file():
            logger.warning(
                "%s holds no %s: RMU goes on toward the direction of this run's seed.", checkpoint, path.name
            )
            return
        saved = load_file(path)["direction"]
        if saved.shape != self.rmu_direction.shape:
            raise ValueError(
                f"`resume_from_checkpoint={checkpoint!r}` steers {len(saved)} coordinates, the model's hidden states have "
                f"{len(self.rmu_direction)}: resume with the model that was trained."
            )
        self.rmu_direction = saved
