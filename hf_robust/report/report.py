"""The figures of one run and everything needed to read them: a dataclass tree that round-trips through JSON."""

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hf_robust.metrics import wilson_interval

SCHEMA_VERSION = 1
_PACKAGES = ("hf_robust", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


@dataclass(frozen=True)
class Measurement:
    """
    One share, with its interval.

    Attributes:
        subject: which model, e.g. `"before"`, `"after"`, `"oracle"`.
        metric: what is counted, e.g. `"exact"`, `"over_refusal"`.
        split: over which prompts, e.g. `"harmful_held_out"`.
        attack: name of the attack, `"none"` without one.
        value: share in [0, 1].
        count: prompts.
        low: lower end of the 95 % Wilson interval.
        high: upper end.
        control: the same share for a control (shuffled answers), if there is one.
    """

    subject: str
    metric: str
    split: str
    attack: str
    value: float
    count: int
    low: float
    high: float
    control: float | None = None

    @classmethod
    def share(
        cls, subject: str, metric: str, split: str, attack: str, value: float, count: int, control: float | None = None
    ) -> "Measurement":
        """A measurement of a share, its interval filled in."""
        low, high = wilson_interval(value * count, count)
        return cls(subject, metric, split, attack, value, count, low, high, control)


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
    schema_version: int = SCHEMA_VERSION

    def find(self, subject: str, metric: str, split: str, attack: str = "none") -> Measurement | None:
        """The measurement with these keys, or `None`."""
        key = (subject, metric, split, attack)
        return next((m for m in self.measurements if (m.subject, m.metric, m.split, m.attack) == key), None)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """
        Write the report as JSON; an older file is replaced only once the new one is whole.

        Args:
            path: file to write.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.draft")
        draft.write_text(json.dumps(asdict(self), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        draft.replace(path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Report":
        """
        Read a report.

        Args:
            path: file written by [`save`].

        Raises:
            ValueError: not a report, or one of another schema version.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            found = content["schema_version"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"`path={str(path)!r}` is not a report written by hf_robust: {error!r}.") from error
        if found != SCHEMA_VERSION:
            raise ValueError(
                f"`path={str(path)!r}` has schema version {found!r}, this hf_robust reads {SCHEMA_VERSION}; use the "
                "version of hf_robust that wrote it, or run the evaluation again."
            )
        content["measurements"] = [Measurement(**measurement) for measurement in content["measurements"]]
        return cls(**content)


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
