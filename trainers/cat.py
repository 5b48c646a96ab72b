"""Continuous adversarial training (CAT): [`CATTrainer`] stands where [`~trl.SFTTrainer`] stood."""

import contextlib
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainingArguments
from trl import SFTTrainer

from hf_robust.attacks import EmbeddingAttack
from hf_robust.data import collate_preferences, tokenize_preferences
from hf_robust.data.checks import check_map_style
from hf_robust.data.vision_preferences import collate_vision_preferences, rejected_part, tokenize_vision_preferences
from hf_robust.objectives import away_loss, kl_divergence, per_row_mean, token_nll, toward_loss
from hf_robust.sites import LabelIndex, decoder_layers, gather_head, input_site, label_logits, record_hidden_states
from hf_robust.trainers.attack_arguments import take_over
from hf_robust.trainers.cat_config import CATConfig
from hf_robust.trainers.cat_utility import attended, total_shift, utility_before, without_labels
from hf_robust.trainers.flops import parameter_count, search_operations
from hf_robust.trainers.guards import check_arguments, check_model, check_processing_class, check_vision_arguments
from hf_robust.trainers.meters import Meters, on_any_process
from hf_robust.trainers.papers import CONTINUOUS_ATTACKS
from hf_robust.trainers.row_trainer import RowTrainer
from hf_robust.trainers.schedule import AdversarialSchedule, rows_of_process, spread, start_seed

# Key under which a micro-batch carries its chunks of adversarial rows from the data side to the loss.
_CHUNKS = "adversarial_chunks"
# The same for the number of tokens of the window's utility rows, on all processes
_TOKENS = "utility_tokens"


class CATTrainer(RowTrainer, SFTTrainer):
    """
    Trainer for Continuous Adversarial Training (C-AdvUL), introduced in
    [Efficient Adversarial Training in LLMs with Continuous Attacks](https://huggingface.co/papers/2405.15589).

    Each optimizer step takes clean utility rows through [`~trl.SFTTrainer`]'s own loss, and adversarial rows (prompt, safe
    answer, harmful answer). For those, an attack first perturbs the embeddings of the prompt so that the harmful answer
    becomes likely; the loss then moves the model away from the harmful and toward the safe answer under the same
    perturbation:

    `away_weight * -CE(rejected | x + delta) + toward_weight * CE(chosen | x + delta) + utility_weight * CE(utility)`

    where each CE is a token mean over its own rows of the accumulation window, and the first two are leaky below their
    cut-offs, row by row.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As for [`~trl.SFTTrainer`]: causal language models, and vision-language models with their processor, whose
            prompts may hold images (`images` or `image`). The attack then moves what the language model reads, image
            positions included.
        args ([`CATConfig`], *optional*):
            Configuration. An [`~trl.SFTConfig`] is taken over, with the defaults of [`CATConfig`] for the rest.
        *parent_args:
            Further positional arguments of [`~trl.SFTTrainer`].
        adversarial_dataset ([`~datasets.Dataset`]):
            Preference rows `prompt`, `chosen` (safe), `rejected` (harmful), plain or conversational. Required.
        eval_adversarial_dataset ([`~datasets.Dataset`], *optional*):
            Rows of the same kind. Every evaluation then also reports `eval_adversarial_loss` (the adversarial part of the
            training loss, without cut-offs), `eval_away_loss` and `eval_toward_loss` under the attack.
        **parent_kwargs:
            All other arguments of [`~trl.SFTTrainer`]: `train_dataset` (the utility rows, which may be streaming),
            `eval_dataset`, `processing_class`, `peft_config`, `quantization_config`, `callbacks`, …

    Raises:
        ValueError: the data, the model or the configuration cannot be trained on; before training starts.
        TypeError: `adversarial_dataset` is not a map-style dataset.

    Example:

    ```python
    >>> trainer = CATTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=CATConfig(output_dir="robust", attack_epsilon=0.05),
    ...     train_dataset=utility_rows,
    ...     adversarial_dataset=preference_rows,
    ...     peft_config=LoraConfig(r=64, lora_alpha=16, target_modules="all-linear"),
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["hf_robust", "cat", "trl", "sft"]
    _name = "CAT"
    _paper = CONTINUOUS_ATTACKS

    def __init__(
        self,
        model: Any,
        args: CATConfig | TrainingArguments | None = None,
        *parent_args: Any,
        adversarial_dataset: Dataset | None = None,
        eval_adversarial_dataset: Dataset | None = None,
        **parent_kwargs: Any,
    ):
        args = take_over(args, CATConfig, "cat")
        if adversarial_dataset is None:
            raise ValueError(
                "`adversarial_dataset` is required: preference rows with `prompt`, `chosen` (safe answer) and `rejected` "
                "(harmful answer). To train on utility rows alone, use `trl.SFTTrainer`."
            )
        check_map_style(adversarial_dataset)
        if eval_adversarial_dataset is not None:
            check_map_style(eval_adversarial_dataset, "eval_adversarial_dataset")
        check_arguments(args)
        check_processing_class(parent_kwargs.get("processing_class"))
        if args.ddp_broadcast_buffers is None:
            # Two forwards (utility and adversarial rows) share a backward; DDP would overwrite in between the buffers that
            # the first one saved. Buffers of language models are constants, so nothing is lost.
            args.ddp_broadcast_buffers = False
        utility = {**dict(zip(("data_collator", "train_dataset"), parent_args, strict=False)), **parent_kwargs}
        self.remember_data(adversarial_dataset=adversarial_dataset, train_dataset=utility.get("train_dataset"))

        super().__init__(model, args, *parent_args, **parent_kwargs)

        check_arguments(args)  # of which the parent may have changed some
        check_processing_class(self.processing_class)
        check_model(self.model)
        for name in ("utility_kl_weight", "utility_representation_weight"):
            if getattr(args, name) > 0 and not hasattr(self.model, "disable_adapter"):
                raise ValueError(
                    f"`{name}={getattr(args, name)!r}` compares with the model before training, which is the model with its "
                    f"adapter switched off: pass a `peft_config`, or set `{name}=0`."
                )
        if args.utility_representation_weight > 0:
            decoder_layers(self.model)  # an unknown architecture is refused now, not at the first step
        self.attack = args.build_attack(seed=args.seed)
        self.eval_attack = args.build_attack(args.eval_attack_steps, seed=args.seed)
        self.adversarial_dataset = self._tokenize(adversarial_dataset, "adversarial_dataset")
        self.eval_adversarial_dataset = (
            None
            if eval_adversarial_dataset is None
            else self._tokenize(eval_adversarial_dataset, "eval_adversarial_dataset")
        )
        self._schedule: AdversarialSchedule | None = None
        self._meters = Meters()

    # ---- Data ----

    def _tokenize(self, dataset: Dataset, name: str) -> Dataset:
        if self._is_vlm:
            check_vision_arguments(self.args)
            given = {"rejected_end": self.args.rejected_end, "max_length": self.args.max_length}
            return tokenize_vision_preferences(dataset, self.processing_class, name=name, **given)
        dataset = tokenize_preferences(
            dataset,
            self.processing_class,
            max_length=self.args.max_length,
            truncation_mode=self.args.truncation_mode,
            rejected_end=self.args.rejected_end,
            num_proc=self.args.dataset_num_proc,
            name=name,
        )
        if self.args.attack_positions == "user_content":
            missing = [row for row, mask in enumerate(dataset["user_mask"]) if mask is None]
            if missing:
                raise ValueError(
                    f"`attack_positions='user_content'`: the user's words cannot be located in rows {missing[:5]} of "
                    f"`{name}` (slow tokenizer, or a chat template that changes them). Use 'all_prompt'."
                )
        if self.args.attack_suffix_epsilon is not None:
            missing = [row for row, mask in enumerate(dataset["suffix_mask"]) if mask is None]
            if missing:
                raise ValueError(
                    f"`attack_suffix_epsilon={self.args.attack_suffix_epsilon!r}`: the random tokens cannot be located in rows "
                    f"{missing[:5]} of `{name}` (slow tokenizer, or a chat template that changes them). Leave it unset."
                )
            # Rows to be evaluated may do without
            if name == "adversarial_dataset" and not any(any(mask) for mask in dataset["suffix_mask"]):
                raise ValueError(
                    f"`attack_suffix_epsilon={self.args.attack_suffix_epsilon!r}`: no row of `{name}` has random tokens behind "
                    "its prompt. Put them there with `hf_robust.data.with_random_suffixes` (`--random_suffix_share` on the "
                    "command line), or leave it unset."
                )
        return dataset

    @property
    def _adversarial_is_off(self) -> bool:
        return self.args.away_weight == 0 and self.args.toward_weight == 0

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The parent's micro-batches of a window, with the window's adversarial rows attached in chunks."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and self.args.utility_representation_weight > 0:
            tokens = torch.stack([attended(batch).sum() for batch in batches]).sum().to(self.accelerator.device)
            tokens = self.accelerator.reduce(tokens, reduction="sum")  # once a window, without waiting for the device
            for batch in batches:
                batch[_TOKENS] = tokens
        if batches and not self._adversarial_is_off:
            step, process = self.state.global_step, self.accelerator.process_index
            window = self._get_schedule().window(step)
            chunks = self._chunks(window, step, process, self.accelerator.num_processes)
            for batch, chunk in zip(spread(len(chunks), len(batches)), chunks, strict=True):
                batches[batch].setdefault(_CHUNKS, []).append(chunk)
            self.attack.generator.manual_seed(start_seed(self.args.seed, step, process))
        return batches, num_items

    def _get_schedule(self) -> AdversarialSchedule:
        utility_rows = self._train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        fresh = AdversarialSchedule(len(self.adversarial_dataset), utility_rows, self.args.adversarial_fraction, seed)
        # The batch size may have changed since (`auto_find_batch_size`)
        if self._schedule is None or self._schedule.per_window != fresh.per_window:
            self._schedule = fresh
        return self._schedule

    def _chunks(self, window: list[int], step: int, process: int, processes: int) -> list[dict[str, Any]]:
        """This process's adversarial rows of a window, collated `attack_batch_size` at a time."""
        if not window:
            return []
        rows = self.adversarial_dataset.select(window).to_list()
        lengths = [(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
        mine = rows_of_process(list(range(len(window))), step, process, processes)
        size = self.args.attack_batch_size or self._train_batch_size
        pieces = [mine[start : start + size] for start in range(0, len(mine), size)]
        # Chunks with a row, over all processes; of `n` rows, each process has `n // processes` or one more
        held = [(len(window) + rank) // processes for rank in range(processes)]
        num_chunks = sum(-(-rows_held // size) for rows_held in held)
        # A place without a row repeats the first row at weight 0: its forwards keep the processes in step
        return [
            {
                **self._collate(rows, piece),
                "chosen_total": sum(chosen for chosen, _ in lengths),
                "rejected_total": sum(rejected for _, rejected in lengths),
                "num_chunks": num_chunks,
            }
            for piece in pieces
        ]

    def _collate(self, rows: Any, places: list[int | None]) -> dict[str, Any]:
        """A chunk; a place without a row repeats the first row at weight 0."""
        taken = [rows[place or 0] for place in places]
        weight = torch.tensor([float(place is not None) for place in places])
        if self._is_vlm:
            return {**collate_vision_preferences(taken, self.processing_class, self.args.max_length), "weight": weight}
        return {
            **collate_preferences(taken, self._tokenizer.pad_token_id),
            "weight": weight,
            "rejected_length": max(len(row["prompt_ids"]) + len(row["rejected_ids"]) for row in taken),
        }

    # ---- Loss ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The parent's loss on the utility rows plus the adversarial loss of the chunks that the micro-batch carries."""
        chunks, tokens = inputs.pop(_CHUNKS, []), inputs.pop(_TOKENS, None)
        args, given = self.args, dict(inputs)
        retains = self.model.training and (args.utility_kl_weight > 0 or args.utility_representation_weight > 0)
        before = (
            utility_before(
                model, self.accelerator.unwrap_model(model), given, layers=args.utility_representation_weight > 0
            )
            if retains
            else None
        )
        with contextlib.ExitStack() as stack:
            now: list[torch.Tensor] = []
            if before is not None and before[1]:
                now = stack.enter_context(record_hidden_states(self.accelerator.unwrap_model(model)))
            if self.model.training and torch.is_grad_enabled():
                gather_head(self.accelerator.unwrap_model(model))
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = result if return_outputs else (result, None)
        if self.model.training:
            # What the parent returns is a share of the window's loss, or a mean that the Trainer will divide
            batches = 1 if self._is_scaled(num_items_in_batch) else self.current_gradient_accumulation_steps
            self._meters.add("utility_loss", loss.detach() / batches, 1 / self.current_gradient_accumulation_steps)
            scale = float(batches)
        if args.utility_weight != 1.0:
            loss = loss * args.utility_weight
        if before is not None and args.utility_kl_weight > 0:
            divergence = self._utility_kl(model, given, before[0], num_items_in_batch)
            loss = loss + args.utility_kl_weight * divergence
        if now and before is not None:
            shift = total_shift(now, before[1], attended(given)) / tokens
            self._meters.add(
                "utility_shift", shift, 1 / (self.current_gradient_accumulation_steps * self.accelerator.num_processes)
            )
            loss = loss + args.utility_representation_weight * shift * (scale * self.accelerator.num_processes)
        for chunk in chunks:
            # DDP averages gradients over processes, while the totals that divide the loss count all of them
            loss = loss + self._adversarial_loss(model, chunk) * (scale * self.accelerator.num_processes)
        return (loss, outputs) if return_outputs else loss

    def _is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether the parent's loss is already divided by the window's tokens (as `Trainer.training_step` decides)."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        scaled_by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return scaled_by_model or self.compute_loss_func is not None

    def _utility_kl(
        self, model: nn.Module, inputs: dict[str, Any], before: torch.Tensor, num_items_in_batch: Any
    ) -> torch.Tensor:
        index = LabelIndex.from_labels(inputs["labels"])
        divergence = kl_divergence(label_logits(model, index, **without_labels(inputs)), before).sum()
        if num_items_in_batch is None:
            value = divergence / max(len(index.targets), 1)
        else:
            value = divergence / num_items_in_batch
            if self.args.average_tokens_across_devices:
                value = value * self.accelerator.num_processes
        batches = 1 if self._is_scaled(num_items_in_batch) else self.current_gradient_accumulation_steps
        self._meters.add("utility_kl", value / batches, 1 / self.current_gradient_accumulation_steps)
        return value

    def _adversarial_loss(self, model: nn.Module, chunk: dict[str, Any]) -> torch.Tensor:
        """This chunk's share of the window's weighted away and toward losses."""
        args, weight = self.args, chunk["weight"]
        chosen_nll, rejected_nll, chosen_count, rejected_count = self._attacked_nll(
            model, chunk, self.attack, training=True
        )
        chosen_weight, rejected_weight = weight * chosen_count, weight * rejected_count
        if args.reference_compat:
            # Released code: cut-offs on the micro-batch's token mean, micro-batches averaged
            share = (weight.sum() > 0) / chunk["num_chunks"]
            chosen = (chosen_weight * chosen_nll).sum() / chosen_weight.sum().clamp(min=1)
            rejected = (rejected_weight * rejected_nll).sum() / rejected_weight.sum().clamp(min=1)
            toward = share * toward_loss(chosen, args.toward_cutoff, continuous=False)
            away = share * away_loss(rejected, args.away_cutoff, continuous=False)
        else:
            toward = (chosen_weight * toward_loss(chosen_nll, args.toward_cutoff)).sum() / chunk["chosen_total"]
            away = (rejected_weight * away_loss(rejected_nll, args.away_cutoff)).sum() / chunk["rejected_total"]
        with torch.no_grad():
            meters, rows = self._meters, weight.sum()
            meters.add("toward_loss", (chosen_weight * chosen_nll).sum(), chosen_weight.sum())
            meters.add("away_loss", -(rejected_weight * rejected_nll).sum(), rejected_weight.sum())
            meters.add("toward_cutoff_share", (weight * (chosen_nll < args.toward_cutoff)).sum(), rows)
            meters.add("away_cutoff_share", (weight * (-rejected_nll < args.away_cutoff)).sum(), rows)
        return args.toward_weight * toward + args.away_weight * away

    def _attacked_nll(
        self, model: nn.Module, chunk: dict[str, Any], attack: EmbeddingAttack, *, training: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Attack a chunk's prompts, then answer both ways in one forward under the same perturbation.

        Returns:
            Mean nll of each row's chosen and rejected answer (`[n]` each), and the label counts of both (`[n]` each).
        """
        weight = chunk["weight"]
        n = len(weight)
        inner = self.accelerator.unwrap_model(model)
        vision = chunk.get("vision", {})
        inputs = {"input_ids": chunk["input_ids"], "attention_mask": chunk["attention_mask"], **vision}
        length = chunk["rejected_length"]
        with self._stopwatch:
            found = attack.search(
                inner,
                input_ids=chunk["input_ids"][n:, :length],
                attention_mask=chunk["attention_mask"][n:, :length],
                labels=chunk["labels"][n:, :length],
                user_mask=chunk["user_mask"][n:, :length],
                suffix_mask=chunk["suffix_mask"][n:, :length],
                **rejected_part(vision, length),
            )
        delta = nn.functional.pad(found.delta, (0, 0, 0, chunk["input_ids"].shape[1] - length))
        index = LabelIndex.from_labels(chunk["labels"])

        def answer(delta: torch.Tensor) -> torch.Tensor:
            # Prompts start at the same column, so the perturbation of the rejected row fits the chosen one
            with input_site(inner).add(torch.cat([delta, delta])):
                logits = label_logits(model, index, **inputs)
            return per_row_mean(token_nll(logits, index.targets), index.rows, index.counts)

        nll = answer(delta) if not attack.is_off else self._answer_clean(model, index, inputs)
        non_finite = found.non_finite
        if not attack.is_off:
            broken = ~nll.detach().isfinite().view(2, n).all(dim=0)
            if on_any_process(self.accelerator, broken):
                # The last step went where the model has no finite loss: those rows train on the clean prompt instead
                nll = answer(torch.where(broken.view(n, 1, 1), 0.0, delta))
                non_finite = non_finite | broken
        if training:
            self._meters.add("attack_non_finite", (weight * non_finite).sum(), weight.sum())
            if not attack.is_off:
                self._meters.add("attack_loss_first", (weight * found.first_loss.nan_to_num()).sum(), weight.sum())
                self._meters.add("attack_loss_last", (weight * found.last_loss.nan_to_num()).sum(), weight.sum())
        return nll[:n], nll[n:], index.counts[:n], index.counts[n:]

    @staticmethod
    def _answer_clean(model: nn.Module, index: LabelIndex, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = label_logits(model, index, **inputs)
        return per_row_mean(token_nll(logits, index.targets), index.rows, index.counts)

    # ---- Logging, evaluation, cost ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log: losses of the three terms, of the attack, shares at the cut-offs."""
        if self.model.training:
            means = self._meters.read(self.accelerator)
            if "toward_loss" in means:
                means["attack_time_share"] = self._stopwatch.read_share()
            logs.update(means)
        super().log(logs, start_time)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """The parent's loop; the main evaluation also measures the adversarial rows under attack."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.eval_adversarial_dataset is not None and metric_key_prefix == "eval":
            output.metrics.update(self.evaluate_adversarial(metric_key_prefix))
        return output

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """The parent's evaluation, plus the adversarial rows under attack if `eval_adversarial_dataset` was given."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.eval_adversarial_dataset is not None and f"{metric_key_prefix}_adversarial_loss" not in metrics:
            # Several evaluation datasets: their loops run under longer prefixes, the adversarial rows once, here
            if isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict):
                extra = self.evaluate_adversarial(metric_key_prefix)
                self.log(dict(extra))
                metrics.update(extra)
        return metrics

    def evaluate_adversarial(self, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Losses on `eval_adversarial_dataset` under an attack of `eval_attack_steps` steps.

        Args:
            metric_key_prefix: prefix of the names.

        Returns:
            `{prefix}_adversarial_loss` (weighted sum of the next two), `{prefix}_away_loss` (minus the nats per token of
            the rejected answers) and `{prefix}_toward_loss` (nats per token of the chosen answers).
        """
        dataset = self.eval_adversarial_dataset
        if dataset is None:
            raise ValueError("`eval_adversarial_dataset` was not given to the trainer: there is nothing to evaluate.")
        processes = self.accelerator.num_processes
        places = rows_of_process(list(range(len(dataset))), 0, self.accelerator.process_index, processes)
        size = self.args.per_device_eval_batch_size
        totals = torch.zeros(4, device=self.accelerator.device)
        # Every evaluation starts its attacks at the same points, so that their losses can be compared
        self.eval_attack.generator.manual_seed(start_seed(self.args.seed, 0, self.accelerator.process_index))
        was_training = self.model.training
        self.model.eval()
        try:
            for start in tqdm(
                range(0, len(places), size), desc="Adversarial evaluation", disable=self.args.disable_tqdm, leave=False
            ):
                chunk = self._prepare_inputs(self._collate(dataset, places[start : start + size]))
                with torch.no_grad():
                    chosen, rejected, chosen_count, rejected_count = self._attacked_nll(
                        self.model, chunk, self.eval_attack, training=False
                    )
                weight = chunk["weight"]
                chosen_count, rejected_count = weight * chosen_count, weight * rejected_count
                totals += torch.stack(
                    [
                        (chosen * chosen_count).sum(),
                        chosen_count.sum(),
                        (rejected * rejected_count).sum(),
                        rejected_count.sum(),
                    ]
                )
        finally:
            self.model.train(was_training)
        totals = self.accelerator.reduce(totals, reduction="sum").tolist()
        toward, away = totals[0] / max(totals[1], 1), -totals[2] / max(totals[3], 1)
        return {
            f"{metric_key_prefix}_adversarial_loss": self.args.toward_weight * toward + self.args.away_weight * away,
            f"{metric_key_prefix}_away_loss": away,
            f"{metric_key_prefix}_toward_loss": toward,
        }

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The parent's estimate (6 operations a token and parameter), plus attack and outer pass of adversarial rows."""
        operations = super().floating_point_ops(inputs)
        parameters = parameter_count(self.model)
        attack = self.attack
        for chunk in inputs.get(_CHUNKS, []):
            rows, length = chunk["input_ids"].shape
            operations += 6 * parameters * rows * length
            if not attack.is_off:
                attacked = 6 * parameters * (rows // 2) * chunk["rejected_length"]
                operations += search_operations(attacked, attack.steps, forwards=attack.keep == "best")
        return operations
