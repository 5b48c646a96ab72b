"""The figures of one run and everything needed to read them: a dataclass tree that round-trips through JSON."""

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hf_robust.data.redaction import without_tokens
from hf_robust.files import whole_file
from hf_robust.metrics import wilson_interval

SCHEMA_VERSION = 2
_READABLE = (1, 2)  # 1 had no flags, runs, judge or units, and an interval for every figure
_PACKAGES = ("hf_robust", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


@dataclass(frozen=True)
class Measurement:
    """
    One figure, with its interval.

    Attributes:
        subject: which model, e.g. `"before"`, `"after"`, `"oracle"`.
        metric: what is counted, e.g. `"attack_success_rate"`, `"over_refusal"`, `"perplexity"`.
        split: over which prompts, e.g. `"all"`, `"category:chemical"`, `"harmless"`.
        attack: name of the attack, `"none"` without one, `"any"` where one attack among all suffices.
        value: share in [0, 1], or a number of `unit`s.
        count: prompts that the figure is over.
        low: lower end of the 95 % interval (Wilson's for a share); `None` if there is none.
        high: upper end.
        control: the same figure for a control (shuffled answers), if there is one.
        unit: `"share"`, or what `value` is a number of.
    """

    subject: str
    metric: str
    split: str
    attack: str
    value: float
    count: int
    low: float | None
    high: float | None
    control: float | None = None
    unit: str = "share"

    @classmethod
    def share(
        cls, subject: str, metric: str, split: str, attack: str, value: float, count: int, control: float | None = None
    ) -> "Measurement":
        """A measurement of a share, its interval filled in."""
        low, high = wilson_interval(value * count, count)
        return cls(subject, metric, split, attack, value, count, low, high, control)

    @classmethod
    def scalar(
        cls,
        subject: str,
        metric: str,
        split: str,
        attack: str,
        value: float,
        count: int,
        unit: str,
        low: float | None = None,
        high: float | None = None,
    ) -> "Measurement":
        """A measurement that is no share: a perplexity, a cost."""
        return cls(subject, metric, split, attack, value, count, low, high, unit=unit)


@dataclass(frozen=True)
class Flag:
    """
    A reason not to trust a figure.

    Attributes:
        code: short name of the rule, e.g. `"loss_not_converged"`.
        attack: the attack it concerns; `None` for the whole evaluation.
        message: what was found, with the numbers.
        remedy: what to do about it.
    """

    code: str
    attack: str | None
    message: str
    remedy: str


@dataclass(frozen=True)
class AttackSummary:
    """
    What one attack spent and how it went, over all behaviours.

    Attributes:
        name: the attack's name in this report.
        settings: as in [`Report`]'s `attacks`.
        count: behaviours attacked.
        failures: behaviours that could not be attacked or judged; they belong to no share.
        forwards: rows of forward passes, summed over behaviours; a generated answer that the search judges is one.
        backwards: rows of backward passes.
        generations: answers generated to look for success.
        seconds: wall time of the search.
        mean_losses: mean loss before the first step, then after each step, in nats per target token; a behaviour that
            stopped early goes on with its last loss.
        success_by_budget: rising pairs (forwards spent on a behaviour, share of behaviours on
            which the attack had ended with success after that many); the last one holds the whole success rate.
        truncated: answers cut at `max_new_tokens`.
        errors: what the failures said, `"id: message"`.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    count: int = 0
    failures: int = 0
    forwards: int = 0
    backwards: int = 0
    generations: int = 0
    seconds: float = 0.0
    mean_losses: list[float] = field(default_factory=list)
    success_by_budget: list[tuple[int, float]] = field(default_factory=list)
    truncated: int = 0
    errors: list[str] = field(default_factory=list)


@dataclass
class Report:
    """
    Figures of one run.

    Attributes:
        title: what was run.
        method: name, paper and citation key of the training method.
        base_model: model before training.
        training: settings of the training, as used.
        attacks: settings of each attack that was run, by name.
        not_run: attacks that were not run, so that nobody reads their absence as success.
        data: what the model was trained and measured on.
        measurements: the figures.
        costs: seconds by stage.
        environment: versions and machine, see [`describe_environment`].
        flags: reasons not to trust figures, see [`Flag`].
        runs: what each attack spent, see [`AttackSummary`].
        judge: name and settings of the judge that decided on success.
        schema_version: of this file format.
    """

    title: str
    method: dict[str, Any]
    base_model: str
    training: dict[str, Any] = field(default_factory=dict)
    attacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    costs: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    flags: list[Flag] = field(default_factory=list)
    runs: list[AttackSummary] = field(default_factory=list)
    judge: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def find(self, subject: str, metric: str, split: str, attack: str = "none") -> Measurement | None:
        """The measurement with these keys, or `None`."""
        key = (subject, metric, split, attack)
        return next((m for m in self.measurements if (m.subject, m.metric, m.split, m.attack) == key), None)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """
        Write the report as JSON, without access tokens and keys; an older file is replaced only once the new one is whole.

        Args:
            path: file to write.

        Raises:
            ValueError: a figure or setting is NaN or infinite, which JSON cannot hold.
        """
        return write_json(path, without_tokens(asdict(self)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Report":
        """
        Read a report, of this schema version or version 1.

        Args:
            path: file written by [`save`].

        Raises:
            ValueError: not a report, or one of a schema version that is not known.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            found = content["schema_version"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"`path={str(path)!r}` is not a report written by hf_robust: {error!r}.") from error
        if found not in _READABLE:
            raise ValueError(
                f"`path={str(path)!r}` has schema version {found!r}, this hf_robust reads {_READABLE}; use the version of "
                "hf_robust that wrote it, or run the evaluation again."
            )
        try:
            content["schema_version"] = SCHEMA_VERSION
            content["measurements"] = [Measurement(**measurement) for measurement in content["measurements"]]
            content["flags"] = [Flag(**flag) for flag in content.get("flags", [])]
            content["runs"] = [
                AttackSummary(
                    **{**run, "success_by_budget": [(spent, share) for spent, share in run["success_by_budget"]]}
                )
                for run in content.get("runs", [])
            ]
            return cls(**content)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"`path={str(path)!r}` is not a report written by hf_robust: {error!r}.") from error

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the report, its card and plots to a model repository: see [`~hf_robust.report.hub.push_report`]."""
        from hf_robust.report.hub import push_report

        return push_report(self, repo_id, **options)


def write_json(path: str | os.PathLike[str], content: Any) -> Path:
    """
    Write a JSON file; an older one is replaced only once the new one is whole.

    Args:
        path: file to write; its folder is made.
        content: plain values.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    path = Path(path)
    with whole_file(path) as draft:
        draft.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def describe_environment() -> dict[str, Any]:
    """Versions of the packages that figures depend on, Python and machine type; nothing that identifies a machine."""
    import torch

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return {
        "packages": versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": device,
        "torch_threads": torch.get_num_threads(),
    }
