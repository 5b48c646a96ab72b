"""The collapse guard of one-step adversarial training."""

import contextlib
import logging
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

ACCURACY = "guard_robust_accuracy"
LAST_GOOD = "last_good"
# In a short training, at least
_LOOKS = 4


class CollapseGuard(TrainerCallback):
    """
    Stops one-step adversarial training when it collapses: when a multi-step attack suddenly succeeds where it did not, while
    the training loss looks better than ever ("catastrophic overfitting", arXiv 2001.03994).

    At a collapse the last weights that passed are put back into the model and saved as `last_good` in the output folder.
    Nothing but the log has to be saved to resume.

    Args:
        trainer: the [`~hf_robust.trainers.AdversarialTrainer`] to be watched.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._good: dict[str, torch.Tensor] | None = None
        self._batches: list[dict[str, Any]] | None = None
        self._looked = 0  # the step

    def on_train_begin(self, args, state, control, **kwargs):
        """Forget what an earlier training left; the weights as they are count as good."""
        self._batches, self._good, self._looked = None, self._copy(), state.global_step

    def on_train_end(self, args, state, control, **kwargs):
        """Look at what was trained since the last look, if another callback has stopped training; let go of the copies."""
        if self._looked != state.global_step:
            self._look(args, state, control)
        self._batches = self._good = None

    def on_step_end(self, args, state, control, **kwargs):
        """Look every `collapse_guard_steps`, four times in a short training, and at the last step, before it is saved."""
        every = min(args.collapse_guard_steps, math.ceil(state.max_steps / _LOOKS))
        if state.global_step % every == 0 or state.global_step >= state.max_steps:
            self._look(args, state, control)

    def _look(self, args: Any, state: Any, control: Any) -> None:
        self._looked = state.global_step
        if self._batches is None:
            self._batches = self._rows()
        # At the full radius, also on the way up to it: shares at a growing radius fall without a collapse
        share = self.trainer.robust_share(self._batches, self.trainer.full_epsilon)
        best = max((entry[ACCURACY] for entry in state.log_history if ACCURACY in entry), default=None)
        due = control.should_log
        self.trainer.log({ACCURACY: share})
        control.should_log = due  # a log takes this back, and the step's own would be left out
        if best is None or share >= best - args.collapse_threshold:
            self._good = self._copy()
            return
        logger.warning(
            "Collapse at step %d: robust accuracy on training rows fell from %.3f to %.3f (PGD-5). Training stops; the last "
            "good weights are back in the model and saved as %s/%s. Use 'n_fgsm', 'grad_align' or 'pgd_at', or a smaller "
            "`attack_step_size`.",
            *(state.global_step, best, share, args.output_dir, LAST_GOOD),
        )
        self._restore()
        self.trainer.save_model(str(Path(args.output_dir) / LAST_GOOD))
        control.should_training_stop = True

    def _tensors(self) -> dict[str, torch.Tensor]:
        """What training changes: trained parameters, and buffers such as batch statistics."""
        model = self.trainer.model
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return {**trained, **dict(model.named_buffers())}

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().to("cpu", copy=True) for name, value in self._tensors().items()}

    @torch.no_grad()
    def _restore(self) -> None:
        assert self._good is not None  # since `on_train_begin`
        for name, value in self._tensors().items():
            value.copy_(self._good[name])

    def _rows(self) -> list[dict[str, Any]]:
        """Batches of training rows, the same on all processes and after a resume."""
        trainer, args = self.trainer, self.trainer.args
        count, dataset = args.collapse_guard_rows, trainer.train_dataset
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator, "collapse guard")
        with _same_randomness(args.seed):
            if hasattr(dataset, "__len__"):
                places = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed))
                rows = [dataset[place] for place in places[:count].tolist()]
            else:
                rows = [row for row, _ in zip(iter(dataset), range(count), strict=False)]
            size = args.per_device_eval_batch_size
            return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


@contextlib.contextmanager
def _same_randomness(seed: int) -> Iterator[None]:
    """Augmentations draw from the global generators: the same at every call, and training goes on as if they had not."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy is not None else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        if numpy is not None:
            numpy.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(states[0])
            if numpy is not None:
                numpy.random.set_state(states[1])
