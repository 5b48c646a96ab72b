"""Evaluation under attack, for [`AdversarialTrainer`]."""

from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn

from hf_robust.attacks.vision.pgd import PGD
from hf_robust.trainers.adversarial_checks import REMEDY
from hf_robust.trainers.adversarial_inputs import ImageInputs, Inputs
from hf_robust.trainers.adversarial_search import InputSearch
from hf_robust.trainers.card import CardTrainer
from hf_robust.trainers.labels import check_batch_labels
from hf_robust.trainers.schedule import start_seed

# Of the guard's attack, as in Fast AT
_GUARD_STEPS = 5


class RobustEvaluation(CardTrainer):
    """
    A trainer whose `evaluate()` attacks each batch with PGD and adds `eval_clean_accuracy` and `eval_robust_accuracy`, so that
    `metric_for_best_model="eval_robust_accuracy"` works. A row counts as robust if the model is right about it clean and at
    every point that the attack visits. A subclass sets the first three attributes.
    """

    _inputs: Inputs
    _epsilon: float
    _norm: str
    _evaluated: torch.Tensor | None = None
    _evaluation: InputSearch
    _eval_batch = 0

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The parent's; pixels in the dtype of half-precision weights, as not every model casts them itself."""
        inputs = super()._prepare_inputs(inputs)
        dtype = getattr(self.model, "dtype", None)
        if dtype in (torch.float16, torch.bfloat16) and isinstance(pixels := inputs.get("pixel_values"), torch.Tensor):
            inputs = {**inputs, "pixel_values": pixels.to(dtype)}
        return inputs

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The parent's prediction on clean inputs; beside it, an attack on the same rows."""
        if self._evaluated is not None and inputs.get("labels") is not None:
            where = f"batch {self._eval_batch} of an evaluation"
            check_batch_labels(inputs["labels"], self.model.config.num_labels, where, REMEDY)
        found = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self._evaluated is not None and inputs.get("labels") is not None:
            inputs = self._prepare_inputs(inputs)
            flags = self._survived(model, inputs, self._evaluation, self._eval_batch)
            # The last batch may hold rows twice, so that processes get as many each
            self._evaluated = self._evaluated + self.accelerator.gather_for_metrics(flags).sum(dim=0)
            self._eval_batch += 1
        return found

    def _survived(self, model: nn.Module, inputs: dict[str, Any], search: InputSearch, place: int) -> torch.Tensor:
        """`[B, 3]` float32: 1, whether the clean row is classified well, and whether it is under attack too."""
        base, labels, given = self.accelerator.unwrap_model(model), inputs["labels"], without_labels(inputs)
        with self.compute_loss_context_manager():
            with torch.no_grad():
                clean = base(**given).logits.argmax(dim=-1) == labels
            sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
            if isinstance(self._inputs, ImageInputs) and not sharded:
                # That of `hf-robust evaluate`; each process ends when its rows are broken, which shards cannot wait for
                pgd = PGD(
                    epsilon=search.epsilon, norm=search.norm, steps=search.steps, seed=self.args.seed,
                    image_processor=self._inputs.image_processor,
                )  # fmt: skip
                found = pgd.search(base, labels=labels, **given)
            else:
                found = search.run(base, given, labels, self._evaluation_seeds(len(labels), place), until_wrong=True)
        return torch.stack([torch.ones_like(clean), clean, clean & ~found.hit], dim=1).float()

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """The parent's loop; adds clean and robust accuracy where rows have labels."""
        self._inputs.forget()
        epsilon = self._epsilon if self.args.eval_epsilon is None else self.args.eval_epsilon
        steps = self.args.eval_attack_steps
        if epsilon == 0 or steps == 0:
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        self._evaluation, self._eval_batch = self._evaluation_search(steps, epsilon), 0
        self._evaluated = torch.zeros(3, device=self.args.device)
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            rows, clean, robust = self._evaluated.tolist()
        finally:
            self._evaluated = None
        if rows:
            output.metrics[f"{metric_key_prefix}_clean_accuracy"] = clean / rows
            output.metrics[f"{metric_key_prefix}_robust_accuracy"] = robust / rows
        return output

    def robust_share(self, batches: list[dict[str, Any]], epsilon: float) -> float:
        """
        Share of rows that the model classifies well also under PGD-5.

        Args:
            batches: as the data collator makes them, labels included; the same on all processes.
            epsilon: radius of the attack.
        """
        self._inputs.forget()
        search = self._evaluation_search(_GUARD_STEPS, epsilon)
        was_training = self.model.training
        for batch in batches:
            check_batch_labels(batch["labels"], self.model.config.num_labels, "the guard's training rows", REMEDY)
        self.model.eval()
        try:
            flags = [
                self._survived(self.model, self._prepare_inputs(batch), search, place)
                for place, batch in enumerate(batches)
            ]
        finally:
            self.model.train(was_training)
        # The mean over processes, so that all of them come to the same conclusion
        rows, _, robust = self.accelerator.reduce(torch.cat(flags).sum(dim=0), reduction="sum").tolist()
        return robust / rows

    def _evaluation_search(self, steps: int, epsilon: float) -> InputSearch:
        """PGD on the cross-entropy, from a random start."""
        step = epsilon * min(1.0, 2.5 / max(steps, 1))
        return InputSearch(self._inputs, norm=self._norm, epsilon=epsilon, steps=steps, step_size=step)

    def _evaluation_seeds(self, rows: int, place: int) -> list[int]:
        """A seed for each row: a function of its place in the dataset, however that is split over processes."""
        first = (place * self.accelerator.num_processes + self.accelerator.process_index) * self.args.eval_batch_size
        # A stream of its own beside those of the training steps, which are numbered from 0
        return [start_seed(self.args.seed, -1, first + row) for row in range(rows)]


def without_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    """
    A model's inputs for a forward without a loss.

    Args:
        inputs: a batch.
    """
    return {name: value for name, value in inputs.items() if name != "labels"}
