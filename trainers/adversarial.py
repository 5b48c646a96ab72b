"""Adversarial training of image and text classifiers: [`AdversarialTrainer`] stands where [`~transformers.Trainer`] stood."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainingArguments

from hf_robust.files import whole_file
from hf_robust.objectives import symmetric_kl
from hf_robust.objectives.adversarial_training import (
    grad_align_penalty,
    kl_dro_weights,
    mart_loss,
    smoothed_cross_entropy,
    trades_loss,
    vat_kl,
    weat_weights,
)
from hf_robust.sites.pixels import check_epsilon, check_step_size
from hf_robust.trainers.adversarial_checks import (
    REMEDY,
    check_arguments,
    check_data,
    check_parallelism,
    inputs_of,
    pixels_of,
    warn_of_half_precision,
)
from hf_robust.trainers.adversarial_config import AdversarialConfig
from hf_robust.trainers.adversarial_evaluation import RobustEvaluation, without_labels
from hf_robust.trainers.adversarial_guard import CollapseGuard
from hf_robust.trainers.adversarial_inputs import ImageInputs, uniform
from hf_robust.trainers.adversarial_proximal import MomentumBregman
from hf_robust.trainers.adversarial_recipes import TEXT_EPSILON
from hf_robust.trainers.adversarial_schedules import (
    SLOW_START,
    ReplaySampler,
    epsilon_factor,
    slow_start_fast_decay,
)
from hf_robust.trainers.adversarial_search import InputSearch
from hf_robust.trainers.attack_arguments import take_over
from hf_robust.trainers.flops import search_operations
from hf_robust.trainers.labels import check_batch_labels
from hf_robust.trainers.meters import Meters
from hf_robust.trainers.schedule import start_seed

# Separates the random points of GradAlign from the starts of the searches, in the numbering of steps
_NEARBY = 1 << 40


class AdversarialTrainer(RobustEvaluation):
    """
    Trainer for adversarial training of classifiers: any `AutoModelForImageClassification` on its pixels, any
    `AutoModelForSequenceClassification` on its input embeddings.

    Each step finds a perturbation of the batch that the model does worst on, within a ball, and takes the loss of
    `loss_type` there. The search runs without dropout and leaves weights, gradients, batch statistics and the global random
    state alone; clean and perturbed inputs then go through the model as one batch (whose batch statistics are of both).
    Random starts are a function of seed, step and row: batches split over accumulation and processes give the same weights.
    `evaluate()` attacks too and reports `eval_clean_accuracy` and `eval_robust_accuracy`.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            An image or text classifier.
        args ([`AdversarialConfig`], *optional*):
            Configuration. A [`~transformers.TrainingArguments`] is taken over, with our defaults for the rest.
        *parent_args:
            Further positional arguments of [`~transformers.Trainer`].
        **parent_kwargs:
            All other arguments of [`~transformers.Trainer`]. `processing_class` is the image processor that made
            `pixel_values`: its mean and std are undone for radius and box. Without one, `pixel_values` are raw [0, 1].

    Raises:
        ValueError: the data, the model or the configuration cannot be trained on; before training starts.

    Example:

    ```python
    >>> trainer = AdversarialTrainer(
    ...     model=AutoModelForImageClassification.from_pretrained("microsoft/resnet-18"),
    ...     args=AdversarialConfig(output_dir="robust", loss_type="trades", epsilon=4 / 255),
    ...     train_dataset=train_dataset,
    ...     eval_dataset=eval_dataset,
    ...     processing_class=image_processor,
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["hf_robust", "adversarial-training"]
    _name = "Adversarial training"
    lr_scheduler: Any

    def __init__(
        self,
        model: Any = None,
        args: AdversarialConfig | TrainingArguments | None = None,
        *parent_args: Any,
        **parent_kwargs: Any,
    ):
        args = take_over(args, AdversarialConfig, "advtrain")
        check_arguments(args, parent_kwargs.get("compute_loss_func"))
        names = ("data_collator", "train_dataset", "eval_dataset")
        given = {**dict(zip(names, parent_args, strict=False)), **parent_kwargs}
        self.remember_data(train_dataset=given.get("train_dataset"))

        super().__init__(model, args, *parent_args, **parent_kwargs)

        title, _, identifier = args.recipe.paper.partition(", arXiv ")
        self._name = f"Adversarial training ({args.loss_type})"
        self._paper = {"title": title, "id": identifier} if identifier else {"title": title}
        check_arguments(args, self.compute_loss_func)
        check_parallelism(self.accelerator, args)
        self._inputs = inputs_of(self.model, args, self.processing_class)
        warn_of_half_precision(self.model, args)
        is_image = isinstance(self._inputs, ImageInputs)
        default = args.recipe.epsilon if is_image else TEXT_EPSILON
        self._epsilon = default if args.epsilon is None else args.epsilon
        self._norm = args.norm or ("linf" if is_image else "l2")
        self._search = self._training_search()
        self._check_datasets()
        if args.is_guarded and self._attacks_training:
            self.add_callback(CollapseGuard(self))
        self._proximal: MomentumBregman | None = None
        if args.loss_type == "smart" and args.proximal_weight and self._attacks_training:
            self._proximal = MomentumBregman()
            self.add_callback(self._proximal)
        self._place = 0  # of the micro-batch in its window
        self._passes = 1
        self._epsilon_now = self._epsilon
        self._shared_delta: torch.Tensor | None = None
        self._replayed: dict[int, torch.Tensor] = {}
        self._window: Any = None
        self._meters = Meters()

    # ---- The inner search ----

    @property
    def _attacks_training(self) -> bool:
        return self._epsilon > 0

    def _training_search(self) -> InputSearch:
        args, recipe = self.args, self.args.recipe
        step = recipe.step * self._epsilon if args.attack_step_size is None else args.attack_step_size
        start = recipe.start if args.random_start is not False else "zero"
        return InputSearch(
            self._inputs,
            norm=self._norm,
            epsilon=self._epsilon,
            steps=args.attack_steps or recipe.steps,
            step_size=step,
            objective=recipe.objective,
            start="uniform" if start == "zero" and args.random_start else start,
            start_scale=args.vat_xi if recipe.start == "power" else recipe.start_scale,
            clipped=recipe.clipped,
        )

    def _current_search(self) -> InputSearch:
        args = self.args
        total = max(self.state.max_steps, 1)
        share = epsilon_factor(
            self.state.global_step, total, schedule=args.epsilon_schedule, warmup=args.epsilon_warmup_steps
        )
        return self._search.scaled(share)

    @property
    def full_epsilon(self) -> float:
        """Radius that the schedule ends at, in the unit of `epsilon`."""
        return self._epsilon

    def _seeds(self, rows: int, step: int) -> list[int]:
        """A seed for each row: a function of its place in the window, however that is split over processes."""
        first = self._place * self.accelerator.num_processes + self.accelerator.process_index
        first *= self.args.train_batch_size
        return [start_seed(self.args.seed, step, first + row) for row in range(rows)]

    # ---- Training ----

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The parent's micro-batches of a window; Free AT's replays get those of the first, augmentation included."""
        self._place = -1
        self._inputs.forget()  # the weights have moved
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._replays > 1:
            if self._window is None or self.state.global_step % self._replays == 0:
                self._window = found
            found = self._window
        return found

    @property
    def _replays(self) -> int:
        return self.args.num_replays if self.args.loss_type == "free_at" and self._attacks_training else 1

    def _get_train_sampler(self, train_dataset=None):
        """The parent's; for Free AT one that hands out every window several times, so that epochs and resuming count right."""
        if self._replays == 1:
            return super()._get_train_sampler(train_dataset)
        args, dataset = self.args, self.train_dataset if train_dataset is None else train_dataset
        block = args.train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        seed = args.seed if args.data_seed is None else args.data_seed
        return ReplaySampler(len(dataset), block, self._replays, seed)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The parent's step; where ascent and descent share their backward passes, one for each ascent step."""
        self._place += 1
        if not (self.args.recipe.is_shared and self._attacks_training):
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        base, search, given = self.accelerator.unwrap_model(model), self._current_search(), without_labels(inputs)
        is_free = self.args.loss_type == "free_at"
        delta = self._replayed.get(self._place)
        with self._stopwatch:
            if delta is None or delta.shape != self._inputs.shape(given):
                delta = search.begin(base, given, self._seeds(len(inputs["labels"]), self.state.global_step))
            elif self.state.global_step % self._replays == 0:
                delta = search.carry(base, given, delta)  # from the batch before, as Algorithm 1 of the paper does
        self._passes = 1 if is_free else search.steps
        total: Any = 0.0
        randomness = _random_state(self.args.device)
        for turn in range(self._passes):
            last = turn == self._passes - 1
            if turn:  # the same dropout mask in every pass, as FreeLB asks for
                _set_random_state(self.args.device, randomness)
            self._shared_delta = delta.detach().requires_grad_(True)
            try:
                with contextlib.nullcontext() if last else self.accelerator.no_sync(model=model):
                    total = total + super().training_step(model, inputs, num_items_in_batch)
                gradient: Any = self._shared_delta.grad
            finally:
                self._shared_delta = None
            if is_free or not last:
                with self._stopwatch:
                    delta = search.advance(base, given, delta, gradient)
        if is_free:
            self._replayed[self._place] = delta
        return total

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of `loss_type` in training; the parent's in evaluation and without an attack."""
        if not (self._attacks_training and self.model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        base, labels, given = self.accelerator.unwrap_model(model), inputs.get("labels"), without_labels(inputs)
        search = self._current_search()
        self._inputs.check(given, search.epsilon, self._norm, f"the batch at step {self.state.global_step + 1}")
        check_batch_labels(labels, base.config.num_labels, f"the batch at step {self.state.global_step + 1}", REMEDY)
        if self._shared_delta is not None:
            delta = self._shared_delta
        else:
            seeds = self._seeds(len(labels), self.state.global_step)
            with self._stopwatch:
                delta = search.run(base, given, labels, seeds).delta
        rows, outputs = self._rows(model, base, search, given, labels, delta)
        loss = rows.sum()
        if self._shared_delta is not None:
            loss = loss / self._passes
        if num_items_in_batch is None:
            loss = loss / max(len(labels), 1)
        else:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        self._epsilon_now = search.epsilon
        return (loss, outputs) if return_outputs else loss

    def _rows(
        self, model: nn.Module, base: nn.Module, search: InputSearch, given: dict[str, Any], labels: torch.Tensor,
        delta: torch.Tensor,
    ) -> tuple[torch.Tensor, Any]:  # fmt: skip
        """One forward of all branches, and the loss of each row `[B]`."""
        args, kind = self.args, self.args.loss_type
        smoothing, weight = args.label_smoothing_factor, args.second_weight
        deltas = [delta]
        if args.recipe.has_clean or args.clean_weight:
            deltas.insert(0, torch.zeros_like(delta))
        if kind == "grad_align":
            seeds = self._seeds(len(labels), self.state.global_step + _NEARBY)
            near = self._inputs.random(given, seeds, uniform(self._norm)) * search.epsilon * self._inputs.length(base)
            deltas.insert(1, self._inputs.projection(given, None, self._norm)(near))
        moved = torch.cat(deltas)
        if kind == "grad_align":
            moved.requires_grad_(True)
        with self._inputs.perturbed(base, _repeat(given, len(deltas)), moved) as branches:
            outputs = model(**branches)
        parts = outputs.logits.float().split(len(labels))
        clean, adversarial = parts[0], parts[-1]

        if kind == "trades":
            values = trades_loss(clean, adversarial, labels, beta=weight, label_smoothing=smoothing)
        elif kind == "mart":
            values = mart_loss(clean, adversarial, labels, beta=weight, label_smoothing=smoothing)
        elif kind == "vat":
            values = smoothed_cross_entropy(clean, labels, smoothing) + weight * vat_kl(clean, adversarial)
        elif kind == "smart":
            values = smoothed_cross_entropy(clean, labels, smoothing) + weight * 2 * symmetric_kl(clean, adversarial)
            if self._proximal is not None:
                divergence = self._proximal.divergence(base, given, clean)
                self._meters.add("proximal_divergence", divergence.detach().sum(), len(labels))
                values = values + args.proximal_weight * divergence
        else:
            values = smoothed_cross_entropy(adversarial, labels, smoothing)
        if kind == "grad_align":
            pair = smoothed_cross_entropy(torch.cat(parts[:2]), torch.cat([labels] * 2)).sum()
            (slopes,) = torch.autograd.grad(pair, moved, create_graph=True)
            penalty = grad_align_penalty(*slopes.split(len(labels))[:2])
            self._meters.add("gradient_misalignment", penalty.sum(), len(labels))
            values = values + weight * penalty
        self._count(values, parts, labels)
        values = values * self._weights(values, clean)
        if args.clean_weight:
            plain = smoothed_cross_entropy(clean, labels, smoothing)
            values = (1 - args.clean_weight) * values + args.clean_weight * plain
        return values, outputs

    def _weights(self, values: torch.Tensor, logits: torch.Tensor) -> torch.Tensor | float:
        if self.args.sample_weighting == "weat":
            return weat_weights(logits)
        if self.args.sample_weighting == "none":
            return 1.0
        padded = self.accelerator.pad_across_processes(values.detach(), pad_index=-torch.inf)
        return kl_dro_weights(values, self.args.dro_temperature, self.accelerator.gather(padded))

    @torch.no_grad()
    def _count(self, values: torch.Tensor, parts: Any, labels: torch.Tensor) -> None:
        rows = len(labels)
        self._meters.add("method_loss", values.sum(), rows)
        sides = {"adversarial": parts[-1], **({"clean": parts[0]} if len(parts) > 1 else {})}
        for name, logits in sides.items():
            self._meters.add(f"{name}_loss", smoothed_cross_entropy(logits, labels).sum(), rows)
            self._meters.add(f"{name}_accuracy", logits.argmax(dim=-1).eq(labels).sum(), rows)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The parent's, and the slow start with fast decay."""
        if self.args.lr_scheduler_type != SLOW_START or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = slow_start_fast_decay(
            self.optimizer if optimizer is None else optimizer,
            num_training_steps,
            num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
            **(self.args.lr_scheduler_kwargs or {}),
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- Checkpoints, logs, card ----

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The parent's files; also the perturbation that Free AT goes on from, and SMART's average of the weights."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self._proximal is not None and self.args.should_save:
            self._proximal.save(output_dir)
        if self._replayed:
            tensors = {str(place): delta.contiguous() for place, delta in self._replayed.items()}
            path = self._replay_file(output_dir)
            with whole_file(path) as draft:
                save_file(tensors, draft)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The parent's loading, which every resumed training passes."""
        super()._load_optimizer_and_scheduler(checkpoint)
        self._replayed, self._window = {}, None
        if self._proximal is not None:
            self._proximal.load(checkpoint)
            self._proximal.average = {k: v.to(self.args.device) for k, v in self._proximal.average.items()}
        if checkpoint is not None and self._replay_file(checkpoint).is_file():
            found = load_file(self._replay_file(checkpoint))
            self._replayed = {int(place): delta.to(self.args.device) for place, delta in found.items()}

    def _replay_file(self, folder: str) -> Path:
        return Path(folder) / f"free_at_delta_{self.accelerator.process_index}.safetensors"

    def save_training_prompts(self, folder: Any) -> None:
        """The parent's; nothing for images, which have no prompts."""
        if not isinstance(self._inputs, ImageInputs):
            super().save_training_prompts(folder)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log: losses in nats and accuracies, of clean and perturbed rows; and the radius."""
        if "loss" in logs:
            means = self._meters.read(self.accelerator)
            if means:
                means["epsilon"], means["attack_time_share"] = self._epsilon_now, self._stopwatch.read_share()
            logs.update(means)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The parent's estimate for every branch, and the search."""
        operations = super().floating_point_ops(inputs)
        if not self._attacks_training:
            return operations
        recipe = self.args.recipe
        branches = 1 + (recipe.has_clean or self.args.clean_weight > 0) + 3 * (self.args.loss_type == "grad_align")
        branches += (self._proximal is not None) / 3
        if recipe.is_shared:
            return int(operations * branches) * (1 if self.args.loss_type == "free_at" else self._search.steps)
        clean = recipe.objective != "ce"  # a prediction to move away from
        return int(operations * branches) + search_operations(operations, self._search.steps, forwards=clean)

    def _training_settings(self, peft: Any) -> dict[str, Any]:
        settings = super()._training_settings(peft)
        search = self._search
        unit = "raw [0, 1] pixels"
        if not isinstance(self._inputs, ImageInputs):
            unit = "× the mean embedding norm" if self.args.epsilon_relative else "embedding units"
        settings["threat model of the training"] = (
            f"ε {search.epsilon:.6g} {unit}, norm {search.norm}, {search.steps} steps of {search.step_size:.6g}"
            if self._attacks_training
            else "none: ε is 0"
        )
        return settings

    def _check_datasets(self) -> None:
        num_labels = self.model.config.num_labels
        check_data("train_dataset", self.train_dataset, num_labels)
        several = self.eval_dataset if isinstance(self.eval_dataset, dict) else {None: self.eval_dataset}
        for name, rows in several.items():
            check_data("eval_dataset" if name is None else f"eval_dataset[{name!r}]", rows, num_labels)
        dataset = self.train_dataset
        if self._replays > 1 and dataset is not None and not hasattr(dataset, "__len__"):
            raise ValueError(
                "`loss_type='free_at'` replays batches of a dataset of known length, and `train_dataset` is streaming: load it "
                "without `streaming=True`."
            )
        if not isinstance(self._inputs, ImageInputs):
            return
        largest = max(self._epsilon, self.args.eval_epsilon or 0.0)
        check_epsilon(largest, self._norm)  # also where no row can be looked at: 8 for 8/255 would be no bound at all
        if self.args.attack_step_size is not None:
            check_step_size("attack_step_size", self.args.attack_step_size, self._norm)
        for rows in (dataset, *several.values()):
            if hasattr(rows, "__len__") and "pixel_values" in (row := rows[0]):
                pixels = pixels_of(row).unsqueeze(0)
                self._inputs.units.check(pixels, largest, self._norm)


def _repeat(inputs: dict[str, Any], count: int) -> dict[str, Any]:
    """The rows of all branches, one branch after the other."""
    if count == 1:
        return inputs
    return {k: torch.cat([v] * count) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda


def _set_random_state(device: torch.device, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
