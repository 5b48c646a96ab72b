"""Robust accuracy as pictures: by attack, against ε, by class."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_robust.report.plots import COLORS, new_figure, save_figure
from hf_robust.report.report import Measurement, Report
from hf_robust.report.vision_attacks import radius_text

# Curves that coincide are told apart by these
_STYLES, _MARKERS = ("-", "--", ":"), ("o", "s", "^")
_LABEL_WIDTH = 40


def plot_vision(report: Report, folder: str | os.PathLike[str]) -> list[Path]:
    """
    Pictures of an evaluation of an image model, as many as there are figures for.

    Args:
        report: of [`~hf_robust.report.evaluate_vision`].
        folder: where the PNG files go; made if it is not there.

    Returns:
        Those written, in this order: `robust_accuracy.png` (by attack, with 95 % intervals; the sanity checks below),
        `epsilon_curve.png` (against ε, for attacks that were run at several), `class_accuracy.png` (by class), `losses.png`
        (mean loss by step).

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
    """
    folder = Path(folder)
    pictures = {
        "robust_accuracy.png": _by_attack(report),
        "epsilon_curve.png": _against_epsilon(report),
        "class_accuracy.png": _by_class(report),
        "losses.png": _losses(report),
    }
    return [save_figure(figure, folder / name) for name, figure in pictures.items() if figure is not None]


def _by_attack(report: Report) -> Any:
    listed = [m for m in report.measurements if m.metric in ("accuracy", "robust_accuracy")]
    shown = [m for m in listed if m.split == "all"]
    checks = [m for m in listed if m.split == "sanity"]
    if not shown:
        return None
    names = {"none": "no attack", "any": "worst of all attacks"}
    count = len(shown) + len(checks)
    figure = new_figure(8, 1.5 + 0.34 * count)
    axis = figure.subplots()
    labels = []
    for place, m in enumerate([*shown, *checks]):
        color = COLORS[0] if m.split == "sanity" else COLORS[2] if m.metric == "robust_accuracy" else COLORS[3]
        axis.barh(place, m.value, 0.7, color=color)
        if m.low is not None and m.high is not None:
            ends = [[max(m.value - m.low, 0)], [max(m.high - m.value, 0)]]
            axis.errorbar(m.value, place, xerr=ends, color="black", lw=0.8, capsize=1.5)
        axis.text(max(m.value, m.high or 0) + 0.012, place, f"{m.value:.2f}", va="center", fontsize=8)
        labels.append(_short(names.get(m.attack, m.attack)) + (f" ({m.count} images)" if m.split == "sanity" else ""))
    axis.set_yticks(range(count), labels, fontsize=8)
    axis.set_ylim(count - 0.4, -0.6)
    axis.set_xlim(0, 1.08)
    axis.set_xlabel(
        "share of images right, 95 % interval" + (" (grey: sanity checks, not claims)" if checks else ""), fontsize=9
    )
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    _title(axis, report, "Accuracy without attack and under each (higher is better)")
    return figure


def epsilon_series(report: Report) -> dict[str, list[tuple[float, Measurement]]]:
    """
    Robust accuracy against ε, for attacks that differ in ε (and step size) alone, each with the accuracy without attack at
    ε 0.

    Args:
        report: of [`~hf_robust.report.evaluate_vision`].

    Returns:
        By a name for the attack, pairs of radius in raw [0, 1] pixels and figure, rising in the radius. Attacks at one
        radius only are left out.
    """
    groups: dict[str, list[tuple[float, Measurement]]] = {}
    names: dict[str, str] = {}
    for m in report.measurements:
        settings = report.attacks.get(m.attack, {})
        epsilon = settings.get("epsilon")
        if m.metric != "robust_accuracy" or m.split != "all" or not isinstance(epsilon, int | float):
            continue
        key = json.dumps({k: v for k, v in settings.items() if k not in ("epsilon", "step_size")}, sort_keys=True)
        groups.setdefault(key, []).append((float(epsilon), m))
        steps = f", {settings['steps']} steps" if settings.get("steps") is not None else ""
        names[key] = f"{m.attack.removesuffix(radius_text(epsilon)).strip()} ({settings.get('norm')}{steps})"
    found: dict[str, list[tuple[float, Measurement]]] = {}
    for key, points in groups.items():
        if len({epsilon for epsilon, _ in points}) < 2:
            continue
        subject = points[0][1].subject
        clean = report.find(subject, "accuracy", "all")
        start = [(0.0, clean)] if clean is not None and all(epsilon > 0 for epsilon, _ in points) else []
        name = names[key] if names[key] not in found else f"{names[key]}: {points[0][1].attack}"
        found[name] = sorted([*start, *points], key=lambda point: point[0])
    return found


def _against_epsilon(report: Report) -> Any:
    series = epsilon_series(report)
    if not series:
        return None
    figure = new_figure(7.5, 4.6)
    axis = figure.subplots()
    # In 255ths where that is how the radii are written: L∞ on small radii
    small = max(epsilon for points in series.values() for epsilon, _ in points) <= 64 / 255
    scale = 255 if small else 1
    for number, (name, points) in enumerate(series.items()):
        places = [epsilon * scale for epsilon, _ in points]
        style = _style(number)
        mark = {
            "marker": _MARKERS[number % len(_MARKERS)],
            "ms": 5,
            "mfc": style["color"] if number % 2 == 0 else "white",
        }
        axis.plot(places, [m.value for _, m in points], label=name, **mark, **style)
        ends = [(m.low, m.high) for _, m in points]
        if all(low is not None and high is not None for low, high in ends):
            axis.fill_between(places, *zip(*ends, strict=True), color=style["color"], alpha=0.15, lw=0)
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlim(left=0)
    axis.set_xlabel("ε in 255ths of the pixel range" if small else "ε in raw pixels, [0, 1]", fontsize=9)
    axis.set_ylabel("share of images right, 95 % interval", fontsize=9)
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    _title(axis, report, "Robust accuracy against ε (must fall, and reach 0)")
    axis.legend(fontsize=8, frameon=False)
    return figure


def _by_class(report: Report) -> Any:
    shown = [m for m in report.measurements if m.split.startswith("class:")]
    attacks = list(dict.fromkeys(m.attack for m in shown))
    classes = list(dict.fromkeys(m.split for m in shown))
    if not shown:
        return None
    figure = new_figure(max(6.5, 1.5 + 0.62 * len(classes)), 4.2)
    axis = figure.subplots()
    # Without attack as a line above, so that it hides no bar
    listed = [name for name in attacks if name != "none"]
    width = 0.8 / max(len(listed), 1)
    for m in shown:
        place = classes.index(m.split)
        if m.attack == "none":
            label = "no attack" if place == 0 else None
            axis.plot([place - 0.42, place + 0.42], [m.value] * 2, color="black", lw=1.4, label=label)
            continue
        number = listed.index(m.attack)
        x = place + (number - (len(listed) - 1) / 2) * width
        color = COLORS[1 + (number + 1) % (len(COLORS) - 1)]
        axis.bar(x, m.value, width * 0.92, color=color, label=_short(m.attack) if place == 0 else None)
        if m.low is not None and m.high is not None:
            ends = [[max(m.value - m.low, 0)], [max(m.high - m.value, 0)]]
            axis.errorbar(x, m.value, yerr=ends, color="black", lw=0.7, capsize=1)
    names = [split.removeprefix("class:") for split in classes]
    long = max(map(len, names)) > 6
    axis.set_xticks(range(len(names)), [_short(name, 18) for name in names], fontsize=8, rotation=30 if long else 0)
    axis.set_ylim(0, 1.04)
    axis.set_ylabel("share of images right, 95 % interval", fontsize=9)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    _title(axis, report, "Accuracy by class")
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        unique.values(), unique.keys(), loc="outside lower center", ncols=min(3, len(unique)), fontsize=8, frameon=False
    )
    return figure


def _losses(report: Report) -> Any:
    runs = [run for run in report.runs if len(run.mean_losses) > 1]
    if not runs:
        return None
    figure = new_figure(8, 4.4)
    axis = figure.subplots()
    for number, run in enumerate(runs):
        steps = len(run.mean_losses) - 1
        places = [step / steps for step in range(steps + 1)]
        axis.plot(places, run.mean_losses, label=f"{_short(run.name)} ({steps + 1} losses)", **_style(number))
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of the search done", fontsize=9)
    axis.set_ylabel("mean loss, which the attack lowers", fontsize=9)
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    _title(axis, report, "Loss of each search (flat at the end: converged)")
    figure.legend(loc="outside lower center", ncols=min(3, len(runs)), fontsize=8, frameon=False)
    return figure


def _style(number: int) -> dict[str, Any]:
    usable: Sequence[str] = COLORS[1:]
    return {
        "color": usable[(number + 1) % len(usable)],
        "linestyle": _STYLES[number % len(_STYLES)],
        "linewidth": 1.8,
    }


def _title(axis: Any, report: Report, title: str) -> None:
    axis.set_title(f"{_short(report.title, 90)}\n{title}", fontsize=10, loc="left")


def _short(text: str, width: int = _LABEL_WIDTH) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
