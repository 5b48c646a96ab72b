"""A case: a trainer with what was drawn takes one optimizer step, or says what is wrong."""

import contextlib
import copy
import functools
import gc
import io
import logging
import math
import os
import signal
import tempfile
import time
import traceback
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import datasets
import transformers
from datasets import Dataset
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from transformers import TrainingArguments
from trl import DPOConfig, SFTConfig

from hf_robust import (
    AdversarialConfig,
    AdvUnlearnConfig,
    CAPOConfig,
    CATConfig,
    DiffusionConfig,
    NoiseFiTConfig,
    RobustCLIPConfig,
    RobustVLMConfig,
    UnlearnConfig,
)
from hf_robust.attacks.diffusion.concept_embedding import METHODS
from hf_robust.diffusion import DiffusionModel
from hf_robust.objectives.unlearning import FORGET_LOSSES, RETAIN_LOSSES
from hf_robust.trainers.adversarial_recipes import LOSS_TYPES
from hf_robust.trainers.advunlearn_config import ATTACK_POSITIONS
from hf_robust.trainers.noisefit_config import LOSS_MODES
from hf_robust.trainers.robust_clip_config import CLIP_LOSSES
from hf_robust.trainers.unlearn_robust import ROBUST_FORMS
from tests.adversarial_data import adversarial_trainer, image_rows, text_rows, tiny_classifier
from tests.advunlearn_data import advunlearn_trainer
from tests.diffusion_helpers import tiny_pipeline
from tests.diffusion_trainer_data import diffusion_trainer
from tests.diffusion_trainer_data import image_rows as captioned_images
from tests.fuzzing import strategies as drawn
from tests.fuzzing.judge import Hang, Snapshot, complaint
from tests.helpers import tiny_model
from tests.test_robust_clip import clip_trainer, pictures, tiny_clip
from tests.trainer_data import adversarial_rows, capo_trainer, cat_trainer, noisefit_trainer, utility_rows
from tests.unlearn_data import forget_rows, tokenised, unlearn_trainer
from tests.vlm_data import answered_images, tiny_llava, vlm_trainer

# Seconds for one case, which takes a tenth of one where nothing else runs
DEADLINE = 60
# Cases of each test: few and always the same in `make test`, as many and as new as wished with HF_ROBUST_FUZZ=2000
_WISHED = int(os.environ.get("HF_ROBUST_FUZZ", 0))
PROFILE = settings(
    max_examples=_WISHED or 15,
    derandomize=not _WISHED,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)
_FOLDER = tempfile.mkdtemp(prefix="hf_robust_fuzzing_")


class Defect(AssertionError):
    """A case that neither finished its step nor was refused clearly."""


@dataclass
class Subject:
    """A trainer to be fuzzed: how to make it, what its rows and its configuration are drawn from."""

    make: Callable[..., Any]
    model: Callable[[], Any]
    rows: dict[str, Callable[[], Dataset]]
    columns: dict[str, st.SearchStrategy[dict[str, list[Any]]]]
    config: type[Any]
    parent: type[Any]
    choices: dict[str, list[Any]] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def template(self) -> Any:
        return self.model()

    @functools.cached_property
    def good_rows(self) -> dict[str, Dataset]:
        return {name: make() for name, make in self.rows.items()}

    def datasets(self) -> st.SearchStrategy[dict[str, dict[str, list[Any]]]]:
        """Columns for one of the trainer's datasets, the others being good, or for all of them."""
        single = [st.fixed_dictionaries({name: columns}) for name, columns in self.columns.items()]
        return st.one_of(*single, st.fixed_dictionaries(self.columns)) if len(single) > 1 else single[0]

    def configs(self) -> st.SearchStrategy[dict[str, Any]]:
        fields = drawn.own_fields(self.config, self.parent, TrainingArguments)
        return drawn.config_values(fields, self.choices)


def _tiny_diffusion() -> Any:
    return DiffusionModel(tiny_pipeline()).train()


def _noise_choices() -> dict[str, list[Any]]:
    return {
        "version": ["v1", "v2"], "loss_mode": list(LOSS_MODES), "noise_layers": [[0], [1], [-1], [5], [0, 0], [0.5], None],
        "snr_format": ["largest", "lowest"], "noise_distribution": ["adaptive", "gaussian", "uniform"],
        "layer_list": ["model.layers", "model", "layers", "model.norm", "a..b"], "loss_type": ["nll", "dft"],
    }  # fmt: skip


_ATTACK: dict[str, list[Any]] = {
    "attack_norm": ["l2_token", "l2", "linf"], "attack_init": ["zero", "random"], "attack_keep": ["best", "last"],
    "attack_step_rule": ["sign", "normalized", "momentum", "adam", "rmsprop"],
    "attack_positions": ["all_prompt", "user_content"],
}  # fmt: skip
_SMALL = {"max_steps": 1, "per_device_train_batch_size": 2, "logging_steps": 1}
_LANGUAGE = {**_SMALL, "max_length": 32}
_PARTS: list[Any] = [["unet"], ["text_encoder"], ["xattn"], ["selfattn", "noxattn"], ["full"], ["vae"], [], "xattn"]
_PREFERENCES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}

SUBJECTS: dict[str, Subject] = {
    "cat": Subject(
        cat_trainer, tiny_model,
        {"train_dataset": lambda: tokenised(utility_rows(4)), "adversarial_dataset": lambda: adversarial_rows(4)},
        {"train_dataset": drawn.any_text_columns(), "adversarial_dataset": drawn.text_columns(_PREFERENCES)},
        CATConfig, SFTConfig, {**_ATTACK, "loss_type": ["nll", "dft", "chunked_nll"]}, {**_LANGUAGE, "attack_steps": 2},
    ),
    "capo": Subject(
        capo_trainer, tiny_model, {"train_dataset": lambda: adversarial_rows(4)},
        {"train_dataset": drawn.text_columns(_PREFERENCES)},
        CAPOConfig, DPOConfig, {**_ATTACK, "loss_type": [["ipo"], ["sigmoid"], "ipo", ["hinge", "ipo"], ["x"]]},
        {**_LANGUAGE, "attack_steps": 2},
    ),
    "noisefit": Subject(
        noisefit_trainer, tiny_model, {"train_dataset": lambda: tokenised(utility_rows(4))},
        {"train_dataset": drawn.any_text_columns()}, NoiseFiTConfig, SFTConfig, _noise_choices(), _LANGUAGE,
    ),
    "unlearn": Subject(
        unlearn_trainer, tiny_model,
        {"forget_dataset": lambda: tokenised(forget_rows(4)), "retain_dataset": lambda: tokenised(utility_rows(4))},
        {"forget_dataset": drawn.any_text_columns(), "retain_dataset": drawn.any_text_columns()},
        UnlearnConfig, SFTConfig,
        {
            "loss_type": list(FORGET_LOSSES), "retain_type": list(RETAIN_LOSSES), "robust": list(ROBUST_FORMS),
            "activation_layer": [0, 1, -1, 2, 7], "latent_layer": [0, 1, -1, 7],
            "rmu_weights": [["down_proj"], ["model"], ["lm_head"], [""], [3], "down_proj"],
            # Defaults: other values are refused but with the loss or form that reads them
            "sam_rho": [0.01], "smooth_rho": [1e-4], "smooth_samples": [3], "latent_epsilon": [2.0], "latent_steps": [16],
            "attack_epsilon": [0.05], "attack_steps": [10], "simnpo_delta": [0.0], "ce_u_skip_tokens": [0],
            "rmu_coefficient": [2.0],
        },
        _LANGUAGE,
    ),
    "images": Subject(
        adversarial_trainer, tiny_classifier, {"train_dataset": lambda: image_rows(4)},
        {"train_dataset": drawn.pixel_columns()}, AdversarialConfig, TrainingArguments,
        {"loss_type": list(LOSS_TYPES), "norm": ["linf", "l2", "l1", "l2_token"]}, {**_SMALL, "attack_steps": None},
    ),
    "texts": Subject(
        adversarial_trainer, functools.partial(tiny_classifier, "bert"), {"train_dataset": lambda: text_rows(4)},
        {"train_dataset": drawn.token_columns()}, AdversarialConfig, TrainingArguments,
        {"loss_type": list(LOSS_TYPES), "norm": ["linf", "l2", "l1", "l2_token"]}, {**_SMALL, "attack_steps": None},
    ),
    "clip": Subject(
        clip_trainer, tiny_clip, {"train_dataset": lambda: pictures(4)},
        {"train_dataset": drawn.pixel_columns(images=True)}, RobustCLIPConfig, TrainingArguments,
        {
            "loss_type": list(CLIP_LOSSES), "attack_norm": ["linf", "l2", "l1"], "attack_keep": ["best", "last"],
            "class_names": [["a", "b", "c"], ["a"], "abc", [1, 2, 3]], "prompt_templates": [["a {}"], ["a"], "a {}", [""]],
        },
        _SMALL,
    ),
    "vlm": Subject(
        vlm_trainer, tiny_llava, {"train_dataset": lambda: answered_images(4)}, {"train_dataset": drawn.picture_columns()},
        RobustVLMConfig, SFTConfig,
        {
            "perturbation": ["pixels", "embeddings", "both"], "attack_keep": ["best", "last"],
            "pixel_norm": ["linf", "l2", "l1"], "pixel_space": ["image", "pixel_values"],
        },
        _LANGUAGE,
    ),
    "diffusion": Subject(
        diffusion_trainer, _tiny_diffusion, {"train_dataset": lambda: captioned_images(4)},
        {"train_dataset": drawn.captioned_columns()}, DiffusionConfig, TrainingArguments,
        {
            **_ATTACK, "train_parts": _PARTS, "text_encoder_layers": [1, 2, 3, 9], "image_size": [16, 8, 15, 32],
            "image_resize": ["none", "crop", "stretch"], "caption_truncation": ["error", "warn"],
            "attack_site": ["tokens", "conditioning"],
        },
        {**_SMALL, "attack_epsilon": 0.5, "attack_steps": 1},
    ),
    "advunlearn": Subject(
        lambda model, folder, given, **args: advunlearn_trainer(folder, model, given, **args), _tiny_diffusion,
        {"train_dataset": lambda: Dataset.from_dict({"text": ["vangogh", "a red circle"]})},
        {"train_dataset": drawn.erased_columns()}, AdvUnlearnConfig, DiffusionConfig,
        {
            "concepts": [["vangogh"], ["a", "cat"], "vangogh", [""], ["cat " * 20]], "train_parts": _PARTS,
            "retain_prompts": [["a cat", "a dog"], ["objects"], "objects", ["cake.txt"], ["cat " * 20] * 4, [""]],
            "retain_exclude_words": [["cat"], "cat", ["a"]], "retain_mode": ["regularizer", "step"],
            "attack": list(METHODS), "attack_position": list(ATTACK_POSITIONS), "latent_bank_size": [0, 4, 20, 3],
        },
        {**_SMALL, "attack_steps": 1, "attack_warmup_steps": 0, "sampling_steps": 2},
    ),
}  # fmt: skip


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """
    Raise [`Hang`] in what runs inside once it has worked for that long, or waited for ten times as long (others may have the
    processor). A timer that ran before (pytest-timeout's) goes on behind.
    """
    begun, worked = time.monotonic(), time.process_time()

    def stop(number: int, frame: types.FrameType | None) -> None:
        if time.process_time() - worked < seconds / 2 and time.monotonic() - begun < 10 * seconds:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            return
        where = "".join(traceback.format_stack(frame, limit=6)) if frame is not None else ""
        raise Hang(f"no end within {seconds:g} s\n{where}")

    handler = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - begun), 1.0) if left else 0.0, interval)
        signal.signal(signal.SIGALRM, handler)


def as_dataset(columns: dict[str, list[Any]]) -> Dataset | None:
    """The rows as a dataset; `None` where `datasets` itself cannot hold them, so that no trainer could be given them."""
    try:
        return Dataset.from_dict(columns)
    except Exception:
        return None


@functools.cache
def quiet() -> None:
    """Once for a process: no caches or progress bars, and no search through all imports when memory is released."""
    datasets.disable_caching()
    datasets.disable_progress_bars()
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
    """For a case only: tests that come later in the process read what is logged."""
    verbosity, disabled = transformers.logging.get_verbosity(), logging.root.manager.disable
    transformers.logging.set_verbosity(logging.CRITICAL)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        transformers.logging.set_verbosity(verbosity)


def run_case(name: str, rows: dict[str, Dataset] | None = None, config: dict[str, Any] | None = None) -> str:
    """
    One case.

    Args:
        name: of the subject.
        rows: datasets instead of the subject's good ones.
        config: fields instead of the subject's.

    Returns:
        `"step"` if one optimizer step was finished, or the message of a clear error.

    Raises:
        Defect: neither, or something was left behind.
    """
    subject = SUBJECTS[name]
    model = copy.deepcopy(subject.template)
    before, trainer, refused = Snapshot(model), None, None
    try:
        with (
            _deadline(DEADLINE),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            _without_notes(),
        ):
            warnings.simplefilter("ignore")
            given = {**subject.good_rows, **(rows or {})}
            trainer = subject.make(model, _FOLDER, given, **{**subject.args, **(config or {})})
            result = trainer.train()
    except (Exception, Hang) as error:
        wrong = complaint(error)
        if wrong is not None:
            raise Defect(f"{name}: {wrong}: {type(error).__name__}: {str(error)[:600]}") from error
        refused = f"{type(error).__name__}: {error}"
    left = before.leftovers(refused=refused is not None, trained=getattr(trainer, "model", None))
    if left:
        raise Defect(f"{name}: left behind after {refused or 'a finished step'}: {left}")
    if refused is None:
        losses = [result.training_loss, *(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)]
        if not all(math.isfinite(float(loss)) for loss in losses):
            raise Defect(f"{name}: the loss of the step is {losses}")
    return refused or "step"


class Tally(Counter):
    """Cases by what became of them: `step`, `refused`, `no dataset`; defects are counted by whoever catches them."""

    def add(self, outcome: str) -> None:
        self[outcome if outcome in ("step", "no dataset") else "refused"] += 1

    def __str__(self) -> str:
        cases = sum(self.values()) - self["no dataset"]
        return f"{cases} cases: {self['step']} finished a step, {self['refused']} gave a clear error" + (
            f", {self['defect']} defects" if self["defect"] else ""
        )
