"""What a trainer leaves beside its model: a card that claims no more than was measured, and hashes of training prompts."""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_robust.data.provenance import hash_dataset, write_training_prompts
from hf_robust.report.card import evaluation_card, training_card
from hf_robust.report.hub import explained_push, remote_card, results_in, write_card
from hf_robust.report.report import Report, describe_environment
from hf_robust.sites import keep_differentiable
from hf_robust.trainers.batches import checked_batches
from hf_robust.trainers.checkpoints import (
    check_writable,
    checkpoint_to_resume,
    restore_renamed,
    saving,
    write_record,
)
from hf_robust.trainers.flops import parameter_count
from hf_robust.trainers.guards import check_one_device, check_parallelism
from hf_robust.trainers.interruption import checkpoint_on_sigterm
from hf_robust.trainers.meters import Stopwatch
from hf_robust.trainers.phases import Phases, watched
from hf_robust.trainers.process_group import keep_process_group
from hf_robust.trainers.run_settings import (
    active_adapter,
    adapter_settings,
    plain,
    run_settings,
    setting_names,
    stated_settings,
)

logger = logging.getLogger(__name__)

_TEXT_COLUMNS = ("prompt", "chosen", "rejected", "messages", "conversations", "text")


class CardTrainer(Trainer):
    """
    Base of trainers whose models carry a card and `training_prompts.json`; stands before the Hugging Face trainer among
    the bases. A subclass gives `_name`, `_paper` and `_tag_names` as TRL's trainers do, and calls [`remember_data`].
    """

    _tag_names: list[str] = []
    _name = "Base"
    _paper: dict[str, str] = {}
    # The Hub's name of what the model does, where it is not text generation
    _task: str | None = None

    # The datasets as the user gave them, and the hashes once they are known
    _given: Mapping[str, Any] = {}
    _hashes: tuple[set[str], list[str]] | None = None
    _report: Report | None = None
    _report_folder: Path | None = None
    # When the weights last changed: what was measured before says nothing of them
    _weights_since = 0.0
    # Whether SIGTERM ended the last training, with a checkpoint (`enable_jit_checkpoint`)
    interrupted = False
    _phases: Phases | None = None
    _writes_checkpoint = False
    _adapters_at_start: dict[str, Any] | None = None

    @functools.cached_property
    def _stopwatch(self) -> Stopwatch:
        """What the attack runs inside."""
        return Stopwatch(self.accelerator.device)

    _flops_before = 0.0

    def remember_data(self, **datasets: Any) -> None:
        """
        Keep the datasets as they were given, before tokenization, for card and hashes.

        Args:
            datasets: by the name of the argument; `None` is left out.
        """
        self._given = {name: dataset for name, dataset in datasets.items() if dataset is not None}

    def create_accelerator_and_postprocess(self) -> None:
        """The parent's, of data parallelism with one device a process only."""
        check_one_device(self.args)
        check_parallelism(self.args.parallelism_config)  # before accelerate finds fault with the number of processes
        super().create_accelerator_and_postprocess()
        keep_process_group()
        check_parallelism(self.accelerator.parallelism_config)  # of the launcher, or of how the model was loaded

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The parent's estimate, 6 operations a weight and item of the main input; under ZeRO-3 of the whole weights."""
        main = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        return 0 if main is None else 6 * main.numel() * parameter_count(self.model)

    # ---- Figures ----

    def attach_report(self, report: Report | str | os.PathLike[str]) -> None:
        """
        Attach what was measured on the trained model: the next card carries every figure of it.

        Args:
            report: a report, or the folder of an evaluation (`output_dir` of `hf-robust evaluate`), whose prompts and plots
                are then copied beside the model.

        Raises:
            ValueError: not a report.
            FileNotFoundError: no `report.json` in the folder.
        """
        if isinstance(report, Report):
            self._report, self._report_folder = report, None
            return
        folder = Path(report)
        if not (folder / "report.json").is_file():
            raise FileNotFoundError(
                f"`report={str(report)!r}` holds no report.json: give a Report, or the `output_dir` of an evaluation."
            )
        self._report, self._report_folder = Report.load(folder / "report.json"), folder

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's, whose batches are checked before they reach the model."""
        with checked_batches(self):
            return super()._get_dataloader(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """
        The parent's training. A report attached before is about other weights, and is dropped.

        Raises:
            ValueError: `resume_from_checkpoint` is not whole, or of a run with other settings, each of which is named.
            OSError: `output_dir` cannot be written to, or a checkpoint could not be; those written before stay whole.
        """
        given = {**dict(zip(("resume_from_checkpoint", "trial", "ignore_keys_for_eval"), args, strict=False)), **kwargs}
        resumed = given.get("resume_from_checkpoint")
        given["resume_from_checkpoint"] = self._checked_start(resumed)
        keep_differentiable(self.model)
        if self._report is not None:
            logger.warning("The report attached before training is dropped: it was measured on other weights.")
        self._report, self._report_folder = None, None
        self._weights_since = math.inf
        profiled = watched(self) if self.args.profile else contextlib.nullcontext()
        try:
            with checkpoint_on_sigterm(self) as on_sigterm, profiled as self._phases:
                return super().train(**given)
        finally:
            self._weights_since, self._phases, self.interrupted = time.time(), None, on_sigterm.interrupted

    def _checked_start(self, resumed: Any) -> str | None:
        """The checkpoint to go on from. One process decides, or what it finds wrong the others would wait for in vain."""
        decided: list[Any] = [None, None]
        self._adapters_at_start = None
        if self.is_world_process_zero():
            try:
                if str(getattr(self.args.save_strategy, "value", "")) != "no":
                    check_writable(self.args.output_dir)
                decided[0] = checkpoint_to_resume(resumed, self.args.output_dir, self._run_settings())
            except (OSError, ValueError) as error:
                if self.accelerator.num_processes == 1:
                    raise
                decided[1] = error
        if self.accelerator.num_processes > 1:
            broadcast_object_list(decided)
        if decided[1] is not None:
            raise decided[1]
        return decided[0]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The parent's checkpoint, whole or not at all, with a record of the settings it was trained with."""
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with saving(folder, cleans_up=self.args.should_save):
            self.accelerator.wait_for_everyone()  # an older one is out of the way of what the others write
            self._writes_checkpoint = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writes_checkpoint = False
            self.accelerator.wait_for_everyone()  # all have written what is theirs
            if self.args.should_save:
                write_record(folder, self._run_settings())

    def _save_rng_state(self, output_dir: str) -> None:
        """The parent's. All processes have written what is theirs before the state says so and older checkpoints go."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The parent's; also under FSDP with `SHARDED_STATE_DICT`, where it (transformers 5.23) writes no model, silently."""
        if self.is_fsdp_enabled and not self._writes_checkpoint:  # whose parts lie in the checkpoint
            if "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
                self._save(output_dir or self.args.output_dir, self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def _run_settings(self) -> dict[str, Any]:
        """What decides on the steps of training; of adapters and the weights below them as they were at its beginning."""
        if self._adapters_at_start is None:
            self._adapters_at_start = adapter_settings(self.model, weights=self.is_world_process_zero())
        return run_settings(self, self._given) | self._adapters_at_start

    # ---- Logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the shares of time with `profile=True`, and at the end the floating-point operations a second."""
        if self._phases is not None and "loss" in logs:
            logs.update(self._phases.read())
        if "total_flos" in logs and logs.get("train_runtime"):
            logs["train_flops_per_second"] = (logs["total_flos"] - self._flops_before) / logs["train_runtime"]
        super().log(logs, start_time)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._init_training_state(*args, **kwargs)
        self._flops_before = self.state.total_flos  # of the checkpoint: not spent in this run
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The parent's loading; of a whole model by the names that it was saved under."""
        plain = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if not (plain and restore_renamed(self.model if model is None else model, resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """The parent's loading; see [`_load_from_checkpoint`]."""
        plain, best = not (self.is_fsdp_enabled or self.is_deepspeed_enabled), self.state.best_model_checkpoint
        if not (plain and best is not None and restore_renamed(self.model, best)):
            super()._load_best_model()

    def _measured(self) -> Report | None:
        """The report attached, or the one in the output folder if it is about these weights."""
        path = Path(self.args.output_dir) / "report.json"
        if self._report is not None or not path.is_file():
            return self._report
        if self._weights_since == math.inf:  # training goes on
            return None
        if path.stat().st_mtime < self._weights_since:
            logger.warning("%s is older than these weights and is left out of the card; evaluate the model anew.", path)
            return None
        try:
            return Report.load(path)
        except ValueError as error:
            logger.warning("Left out of the card: %s", error)
            return None

    # ---- Card ----

    def training_report(self, title: str | None = None) -> Report:
        """
        What the trainer knows by itself: method, threat model, settings, data. No figures but those of a report that is
        attached.

        Args:
            title: name of the model. Default: that of the output folder.
        """
        measured = self._measured()
        peft = active_adapter(self.model)
        base = getattr(peft, "base_model_name_or_path", None) or getattr(self.model.config, "_name_or_path", None)
        paper = {"paper": f"{self._paper['title']}, arXiv {self._paper['id']}"} if "id" in self._paper else {}
        own = Report(
            title=title or Path(self.args.output_dir).absolute().name,
            method={"name": self._name, **paper, "citation": self._paper.get("citation")},
            base_model=base or "a model made in memory",
            training=self._training_settings(peft),
            data={
                **({"task": self._task} if self._task else {}),
                **{name: _describe(dataset) for name, dataset in self._given.items()},
            },
            environment=describe_environment(),
        )
        if measured is None:
            return own
        facts = {name: getattr(own, name) for name in ("title", "method", "base_model", "training")}
        environment = measured.environment or own.environment
        return dataclasses.replace(measured, **facts, data={**own.data, **measured.data}, environment=environment)

    def _training_settings(self, peft: Any) -> dict[str, Any]:
        args, settings = self.args, {"trainer": type(self).__name__}
        if hasattr(self, "attack"):
            settings["threat model of the training"] = training_threat(self.attack)
        settings["optimizer steps"] = self.state.global_step
        left_out = {"profile", *(["num_train_epochs"] if args.max_steps > 0 else [])}
        names = [name for name in setting_names(args) if name not in left_out]
        settings |= {name: plain(getattr(args, name)) for name in names if getattr(args, name) is not None}
        return {**settings, **stated_settings(self, peft)}

    def card_text(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> str:
        """
        The model card.

        Args:
            model_name: title. Default: name of the output folder.
            dataset_name: id of the dataset trained on.
            tags: further tags.

        Returns:
            Markdown with a YAML header.
        """
        from huggingface_hub import ModelCard

        report = self.training_report(model_name)
        folder = self._report_folder or Path(self.args.output_dir)
        peft = is_peft_model(self.model)
        if report.measurements:
            card: Any = ModelCard(
                evaluation_card(report, plots=sorted(path.name for path in folder.glob("*.png")), peft=peft)
            )
        else:
            card = ModelCard(training_card(report, peft=peft))
        given = [tags] if isinstance(tags, str) else list(tags or [])
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *self._tag_names, *given]))
        if dataset_name is not None:
            card.data.datasets = dataset_name
        return f"---\n{card.data.to_yaml()}\n---\n\n{card.text.strip()}\n"

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Write the model card into `output_dir`; a `README.md` that somebody else wrote is kept, and ours goes beside it as
        `README_hf_robust.md`.

        Args:
            model_name: title. Default: name of the output folder.
            dataset_name: id of the dataset trained on.
            tags: further tags.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        measured = self._measured()
        if measured is not None:
            measured.save(folder / "report.json")
        source = self._report_folder
        if source is not None and source.resolve() != folder.resolve():
            for path in results_in(source):
                shutil.copy(path, folder / path.name)
        write_card(folder, self.card_text(model_name, dataset_name, tags))
        self.save_training_prompts(folder)  # a push from a checkpoint sends this folder, not the checkpoint's

    # ---- Saving and pushing ----

    def save_training_prompts(self, folder: str | os.PathLike[str]) -> None:
        """
        Write `training_prompts.json`: hashes of what users say in the training data. They are computed once.

        Args:
            folder: where it goes.
        """
        if self._hashes is None:
            hashes: set[str] = set()
            missing = []
            for name, dataset in self._given.items():
                found = _hashes_of(dataset)
                hashes |= found
                if not found:
                    missing.append(name)
                    logger.warning(
                        "training_prompts.json does not cover `%s`, which is %s: an evaluation cannot tell whether its "
                        "prompts were seen there in training.",
                        *(name, "streaming" if not isinstance(dataset, Dataset) else "without prompts in text form"),
                    )
            self._hashes = hashes, missing
        write_training_prompts(folder, self._hashes[0], hashed=True, missing=self._hashes[1])

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The parent's files, with our card where PEFT writes a stub, and the training prompts' hashes."""
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        with _no_card_of_peft(self.model):
            super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        if is_peft_model(self.model) and not (folder / "README.md").is_file():
            write_card(folder, self.card_text())
        self.save_training_prompts(folder)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        The parent's push, with card, report and hashes of the training prompts. A card that somebody else wrote is kept,
        in the output folder and in the repository.

        Args:
            commit_message: of the commit.
            blocking: whether to return only when everything has arrived.
            token: access token. Default: `args.hub_token`, or the one signed in with.
            revision: branch to commit to. Default: `args.hub_revision`, or `main`.
            private: whether a new repository is private. Default: `args.hub_private_repo`.
            **kwargs: passed on to [`create_model_card`].

        Raises:
            HubPushError: the push did not arrive whole (with `blocking=True`). Nothing is lost locally; the same call again
                completes it.
        """
        folder = Path(self.args.output_dir)
        name = self.hub_model_id or self.args.hub_model_id or folder.absolute().name
        token = token if token is not None else self.args.hub_token
        with explained_push(name, local=f"everything is in {folder}", token=token):
            if self.hub_model_id is None:
                self.init_hf_repo(token=token, private=private)
            if self.is_world_process_zero() and not (folder / "README.md").exists():
                card = remote_card(self.hub_model_id, revision=revision or self.args.hub_revision, token=token)
                if card is not None:  # `write_card` keeps it if it is not ours
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / "README.md").write_text(card, encoding="utf-8")
            return super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)


def training_threat(attack: Any) -> str:
    """
    The threat model that a trainer trains against, in words.

    Args:
        attack: the trainer's [`~hf_robust.attacks.EmbeddingAttack`].
    """
    unit = "× the mean embedding norm" if attack.epsilon_relative else "embedding units"
    step_unit = "× ε" if attack.step_size_relative else "embedding units"
    if attack.is_off:
        return f"none: the attack is off (ε {attack.epsilon}, {attack.steps} steps)"
    suffix = "" if attack.suffix_epsilon is None else f" ({attack.suffix_epsilon} at random tokens behind prompts)"
    return (
        f"ε {attack.epsilon} {unit}{suffix}, norm {attack.norm}, {attack.steps} {attack.step_rule} steps of {attack.step_size} "
        f"{step_unit}, positions {attack.positions}"
    )


@contextlib.contextmanager
def _no_card_of_peft(model: nn.Module) -> Iterator[None]:
    """PEFT writes a stub, and into a card that it finds, also a user's: a full disk or a kill would leave it edited or cut."""
    adapted = [vars(module) for module in model.modules() if isinstance(module, PeftModel)]
    for attributes in adapted:
        attributes["create_or_update_model_card"] = lambda output_dir: None
    try:
        yield
    finally:
        for attributes in adapted:
            del attributes["create_or_update_model_card"]


def _describe(dataset: Any) -> str:
    return f"{len(dataset)} rows" if isinstance(dataset, Dataset) else "streaming, number of rows unknown"


def _hashes_of(dataset: Any) -> set[str]:
    """Hashes of a map-style dataset's prompts; none of a streaming one, which would have to be read once more."""
    if not isinstance(dataset, Dataset):
        return set()
    columns = [column for column in _TEXT_COLUMNS if column in dataset.column_names]
    return hash_dataset(dataset.with_format(None).select_columns(columns)) if columns else set()
