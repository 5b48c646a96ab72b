"""An unlearning evaluation as pictures: recall beside floor and ceiling, what relearning brings back, utility."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_robust.report.plots import COLORS, new_figure, save_figure
from hf_robust.report.report import Measurement, Report
from hf_robust.report.unlearning_figures import step_of, steps_of

_LABEL_WIDTH = 40
_RECALL = ("pre_attack_success_rate", "attack_success_rate", "attack_success_rate_any")
_BESIDE = {"original": "original (ceiling)", "oracle": "never saw it (floor)"}


def plot_unlearning(report: Report, folder: str | os.PathLike[str]) -> list[Path]:
    """
    Pictures of an unlearning evaluation, as many as there are figures for.

    Args:
        report: of [`~hf_robust.report.evaluate_unlearning`].
        folder: where the PNG files go; made if it is not there.

    Returns:
        Those written, in this order: `recall.png` (forget questions answered, by attack, beside original and oracle, with 95 %
        intervals), `relearning.png` (against fine-tuning steps, the retain set below), `layers.png` (probability of the
        answers after each layer), `utility.png` (the other lists).

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
    """
    folder = Path(folder)
    recall = [m for m in report.measurements if m.metric in _RECALL and m.split == "all"]
    utility = [m for m in report.measurements if m.metric == "utility"]
    names = {"none": "no attack", "any": "any of them"}
    pictures = {
        "recall.png": _bars(
            report,
            [(names.get(m.attack, m.attack), m) for m in recall],
            "Forget questions answered (lower is better, down to the floor)",
        ),
        "relearning.png": _curves(report),
        "layers.png": _layers(report),
        "utility.png": _bars(
            report,
            [(m.split if m.attack == "none" else f"{m.split}, under {m.attack}", m) for m in utility],
            "Other questions answered (more is better, up to the ceiling)",
        ),
    }
    return [save_figure(figure, folder / name) for name, figure in pictures.items() if figure is not None]


def _subjects(report: Report) -> list[str]:
    """The model under test first, then ceiling and floor."""
    found = dict.fromkeys(m.subject for m in report.measurements)
    return sorted(found, key=lambda name: list(_BESIDE).index(name) + 1 if name in _BESIDE else 0)


def _color(report: Report, subject: str) -> str:
    return {"original": COLORS[5], "oracle": COLORS[0]}.get(subject, COLORS[2])


def _line(report: Report, subject: str) -> dict[str, Any]:
    """Where curves coincide all are seen: the model's solid one over the others."""
    style = {"original": ("--", "s", 2.2), "oracle": (":", "^", 2.1)}.get(subject, ("-", "o", 2.3))
    return {
        "color": _color(report, subject),
        "ls": style[0],
        "marker": style[1],
        "zorder": style[2],
        "ms": 4,
        "lw": 1.6,
    }


def _bars(report: Report, rows: Sequence[tuple[str, Measurement]], title: str) -> Any:
    if not rows:
        return None
    places = list(dict.fromkeys(name for name, _ in rows))
    subjects = [name for name in _subjects(report) if any(m.subject == name for _, m in rows)]
    figure = new_figure(8, 1.7 + 0.26 * len(places) * len(subjects))
    axis = figure.subplots()
    thickness = 0.8 / len(subjects)
    for name, m in rows:
        y = places.index(name) + (subjects.index(m.subject) - (len(subjects) - 1) / 2) * thickness
        axis.barh(y, m.value, thickness * 0.9, color=_color(report, m.subject))
        if m.low is not None and m.high is not None:
            ends = [[max(m.value - m.low, 0)], [max(m.high - m.value, 0)]]
            axis.errorbar(m.value, y, xerr=ends, color="black", lw=0.8, capsize=2)
        axis.plot(
            m.value, y, "o", ms=4, color=_color(report, m.subject), clip_on=False, zorder=3
        )  # a bar of 0 shows nothing
        axis.text(max(m.value, m.high or 0) + 0.012, y, f"{m.value:.2f} (n = {m.count})", va="center", fontsize=7)
    axis.set_yticks(range(len(places)), [_short(place) for place in places], fontsize=9)
    axis.set_ylim(len(places) - 0.45, -0.55)
    axis.set_xlim(0, 1.2)  # room for the number behind an interval that ends at 1
    axis.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axis.set_xlabel("share of questions, 95 % interval", fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    axis.set_title(f"{_short(report.title, 90)}\n{title}", fontsize=10, loc="left")
    _legend(figure, report, subjects)
    return figure


def _legend(figure: Any, report: Report, subjects: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=_color(report, name), label=_BESIDE.get(name, name)) for name in subjects]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)


def _curves(report: Report) -> Any:
    """One column for each curve; recall above, utility below."""
    attacks = list(dict.fromkeys(m.attack for m in report.measurements if m.metric == "relearned"))
    if not attacks:
        return None
    subjects = _subjects(report)
    figure = new_figure(1.2 + 2.9 * len(attacks), 5.2)
    grid = figure.subplots(2, len(attacks), squeeze=False, sharex="col", sharey=True)
    for column, attack in enumerate(attacks):
        steps_shown = sorted(
            {step_of(m) for m in report.measurements if m.attack == attack and m.metric == "relearned"}
        )
        for axis, metric in zip(grid[:, column], ("relearned", "relearned_utility"), strict=True):
            for subject in subjects:
                points = steps_of(report.measurements, metric, subject, attack)
                if points:
                    steps = [step_of(m) for m in points]
                    axis.plot(steps, [m.value for m in points], **_line(report, subject))
                    ends = [[m.low or 0 for m in points], [m.high or 0 for m in points]]
                    axis.fill_between(steps, *ends, color=_color(report, subject), alpha=0.12, lw=0)
            axis.set_xscale("symlog", linthresh=1)
            axis.set_xlim(left=0)
            axis.set_xticks(steps_shown, [str(step) for step in steps_shown], minor=False, fontsize=8)
            axis.set_xticks([], minor=True)
            axis.set_ylim(-0.03, 1.03)
            axis.grid(alpha=0.3)
            axis.set_axisbelow(True)
        grid[0, column].set_title(_short(attack), fontsize=9)
        grid[1, column].set_xlabel("steps of fine-tuning", fontsize=8)
    grid[0, 0].set_ylabel("forget questions answered", fontsize=8)
    grid[1, 0].set_ylabel("retain questions answered", fontsize=8)
    figure.suptitle(
        f"{_short(report.title, 90)}: relearning, questions it did not train on, 95 % intervals", fontsize=10
    )
    _legend(figure, report, subjects)
    return figure


def _layers(report: Report) -> Any:
    rows = [m for m in report.measurements if m.metric == "layer_probability"]
    if not rows:
        return None
    subjects = [name for name in _subjects(report) if any(m.subject == name for m in rows)]
    figure = new_figure(7, 4.2)
    axis = figure.subplots()
    first = rows[0].attack  # one probe; a second one would show the same
    for subject in subjects:
        shown = [m for m in rows if m.subject == subject and m.attack == first]
        places = range(1, len(shown) + 1)
        axis.plot(places, [m.value for m in shown], **_line(report, subject))
        ends = [
            [m.value if m.low is None else m.low for m in shown],
            [m.value if m.high is None else m.high for m in shown],
        ]
        axis.fill_between(places, *ends, color=_color(report, subject), alpha=0.12, lw=0)
    axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("layer", fontsize=9)
    axis.set_ylabel("probability of the answer, per token", fontsize=9)
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    axis.set_title(f"{_short(report.title, 90)}\nForgotten answers read off after each layer", fontsize=10, loc="left")
    _legend(figure, report, subjects)
    return figure


def _short(text: str, width: int = _LABEL_WIDTH) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
