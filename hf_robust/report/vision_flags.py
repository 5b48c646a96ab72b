"""Signs that an evaluation flatters an image model: checks of Carlini et al. (2019, arXiv 1902.06705) on what was measured."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_robust.report.evaluation_figures import problem
from hf_robust.report.evaluation_records import Row
from hf_robust.report.flags import TAIL, TAIL_SHARE, _tail_of_fall, failed_behaviors
from hf_robust.report.report import AttackSummary, Flag

# Two runs on the same images differ by chance (random starts): by up to one image, or by up to one point
_SLACK_IMAGES, _SLACK_SHARE = 1, 0.01
# A step that changes the loss by no more than this, relative to it, does not move it. A search is stuck where at most a tenth
# of its steps do, and flagged where it is on most of the images that it leaves right
_STUCK, _STUCK_MOVES, _STUCK_SHARE = 1e-6, 0.1, 0.5


@dataclass(frozen=True)
class Run:
    """
    One attack on one list of images, and what it is for the checks.

    Attributes:
        name: of the attack in the report.
        settings: of the attack.
        rows: one for each image, in order.
        role: `"attack"`, or of the sanity checks `"one_step"`, `"half_steps"`, `"half_epsilon"`, `"whole_box"` or
            `"black_box"`.
        of: the attack that a sanity check is about.
    """

    name: str
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    role: str = "attack"
    of: str | None = None
    broken: list[bool | None] = field(init=False)

    def __post_init__(self) -> None:
        broken = [None if problem(row) else bool(row["verdict"]["success"]) for row in self.rows]
        object.__setattr__(self, "broken", broken)

    @property
    def has_gradients(self) -> bool:
        """Whether it is a search along gradients."""
        return any(row["result"]["num_backwards"] for row in self.rows)


def find_vision_flags(clean: Sequence[Row], runs: Sequence[Run], summaries: Sequence[AttackSummary] = ()) -> list[Flag]:
    """
    Everything in an evaluation of an image model that makes it look more robust than it may be.

    Args:
        clean: a row for each image without attack.
        runs: attacks and sanity checks; those of a sanity check are over the first images of the same list.
        summaries: of the attacks.

    Returns:
        The flags. An empty list is no proof that all is well: it says that none of these checks found anything.
    """
    return [
        *random_model(clean),
        *not_finite(clean, runs),
        *outside_threat_model(runs),
        *accuracy_left_at_any_epsilon(runs),
        *weaker_than_less(runs),
        *weaker_than_black_box(runs),
        *loss_stuck(runs),
        *loss_not_converged(runs),
        *warned(runs),
        *failed_behaviors(summaries),
        *unchecked(runs),
    ]


def random_model(clean: Sequence[Row]) -> list[Flag]:
    """
    A model that answers differently when asked twice: gradients of one draw say little about the next.

    Args:
        clean: rows without attack, with `repeatable` in their results.
    """
    moved = [row["id"] for row in clean if row["result"].get("repeatable") is False]
    if not moved:
        return []
    return [
        Flag(
            "random_model",
            None,
            f"On {len(moved)} of {len(clean)} images the model answers differently when asked twice: it draws at random, and "
            "an attack that follows the gradient of single draws is weaker than it looks.",
            "Switch the randomness off, or attack the mean over many draws (expectation over transformation).",
        )
    ]


def not_finite(clean: Sequence[Row], runs: Sequence[Run]) -> list[Flag]:
    """
    NaN or infinity in outputs, losses or gradients: an attack stops there for no merit of the model's.

    Args:
        clean: rows without attack.
        runs: attacks.
    """
    flags = []
    listed: list[tuple[str | None, Sequence[Row]]] = [(None, clean), *((run.name, run.rows) for run in runs)]
    for name, rows in listed:
        count = sum(bool(row["result"].get("non_finite")) for row in rows)
        if count:
            flags.append(
                Flag(
                    "not_finite",
                    name,
                    f"{count} of {len(rows)} images gave NaN or infinite outputs, losses or gradients"
                    + (f" under {name}." if name else " without attack."),
                    "Run the model in float32, and look at the layer that first gives NaN.",
                )
            )
    return flags


def outside_threat_model(runs: Sequence[Run]) -> list[Flag]:
    """
    Perturbations longer than ε, or that leave [0, 1]: not examples of the threat model, whatever the model says of them.

    Args:
        runs: attacks, with `outside` in their results.
    """
    flags = []
    for run in runs:
        found = [row["result"]["outside"] for row in run.rows if row["result"].get("outside")]
        if found:
            flags.append(
                Flag(
                    "outside_threat_model",
                    run.name,
                    f"{len(found)} of {len(run.rows)} perturbations of {run.name} are outside its threat model, the first: "
                    f"{found[0]}. They are counted as failures of the attack to run.",
                    "Mend the attack's projection; check that its `image_processor` is that of the model.",
                )
            )
    return flags


def accuracy_left_at_any_epsilon(runs: Sequence[Run]) -> list[Flag]:
    """
    Images that stay right although ε reaches every image there is, those of other classes included: nothing can be robust
    against that, so the search is broken.

    Args:
        runs: attacks.
    """
    flags = []
    for run in runs:
        right = sum(broken is False for broken in run.broken)
        if run.role == "whole_box" and right:
            flags.append(
                Flag(
                    "accuracy_left_at_any_epsilon",
                    run.of,
                    f"{run.of} leaves {right} of {len(run.rows)} images right even where ε reaches every image: it does not "
                    "find what is there (masked gradients, or far too few steps).",
                    "Use a loss that does not saturate (DLR), more steps, an attack without gradients (Square); differentiate "
                    "through, or around, what the model does to its input.",
                )
            )
    return flags


def weaker_than_less(runs: Sequence[Run]) -> list[Flag]:
    """
    The same attack with less of something breaks more: a smaller ε (accuracy must fall with ε), fewer steps (and with
    steps), or one step only (an iterative attack is at least as strong).

    Args:
        runs: attacks. Those that differ in nothing else are compared, on the images that both have.
    """
    flags = []
    for less, more, what in _pairs(runs):
        low, high, count = _compare(less, more)
        if not _beyond_chance(low - high, count):
            continue
        code = {"epsilon": "accuracy_rises_with_epsilon", "steps": "accuracy_rises_with_steps"}[what]
        one_step = what == "steps" and less.settings.get("steps") == 1
        flags.append(
            Flag(
                "weaker_than_one_step" if one_step else code,
                more.of or more.name,
                f"{more.name} broke {high} of {count} images, {less.name} {low} of the same: "
                + (
                    "one step beats many. "
                    if one_step
                    else f"more {'radius' if what == 'epsilon' else 'steps'}, less found. "
                )
                + "This is a sign of masked gradients, or of a step size that overshoots.",
                "Lower the step size, start at random, restart, try APGD and an attack without gradients.",
            )
        )
    return flags


def weaker_than_black_box(runs: Sequence[Run]) -> list[Flag]:
    """
    Attacks with gradients that break fewer images than one without at the same ε: knowing the weights cannot make an
    attacker weaker, so the gradients mislead.

    Args:
        runs: attacks.
    """
    flags = []
    blind = [run for run in runs if not run.has_gradients and run.role in ("attack", "black_box") and _any_tried(run)]
    for run in runs:
        if run.role != "attack" or not run.has_gradients:
            continue
        for other in blind:
            if not _same_threat(run, other):
                continue
            low, high, count = _compare(other, run)
            if _beyond_chance(low - high, count):
                flags.append(
                    Flag(
                        "weaker_than_black_box",
                        run.name,
                        f"{run.name} broke {high} of {count} images, {other.name}, which sees no gradient, {low} of the same: "
                        "the gradients are masked.",
                        "Read the lower accuracy of the two, and attack through what masks them (another loss, a smooth "
                        "stand-in for what does not differentiate).",
                    )
                )
    return flags


def loss_stuck(runs: Sequence[Run]) -> list[Flag]:
    """
    Searches along gradients whose loss never moves on most of the images that stay right: the gradient is zero there.

    Args:
        runs: attacks.
    """
    flags = []
    for run in runs:
        if run.role != "attack":
            continue
        still = total = 0
        for row, broken in zip(run.rows, run.broken, strict=True):
            losses = [loss for loss in row["result"]["losses"] if loss is not None]
            if broken is not False or len(losses) < 3 or not row["result"]["num_backwards"]:
                continue
            total += 1
            moves = sum(abs(b - a) > _STUCK * max(abs(a), 1e-30) for a, b in itertools.pairwise(losses))
            still += moves <= 1 + _STUCK_MOVES * len(
                losses
            )  # starts, random ones too, move the point without a gradient
        if total and still > _STUCK_SHARE * total:
            flags.append(
                Flag(
                    "loss_stuck",
                    run.name,
                    f"On {still} of the {total} images that {run.name} left right, its loss is the same at every step: "
                    "there is no gradient to follow (saturated logits, a quantised input, a detached graph).",
                    "Use a loss that does not depend on the logits' scale (DLR), and a smooth stand-in for what does not "
                    "differentiate.",
                )
            )
    return flags


def loss_not_converged(runs: Sequence[Run]) -> list[Flag]:
    """
    Attacks that ended while their loss still fell, on the images that they left right: the best loss so far, averaged, made
    more than a tenth of its fall in the last fifth of the steps. Of several searches of an image (restarts, targets) the best
    one counts.

    Args:
        runs: attacks of at least 5 steps.
    """
    from hf_robust.report.evaluation_figures import mean_curve

    flags = []
    for run in runs:
        if run.role != "attack":
            continue
        left = [row for row, broken in zip(run.rows, run.broken, strict=True) if broken is False]
        steps = run.settings.get("steps")
        curve = mean_curve([_best_so_far(_best_search(row["result"]["losses"], steps)) for row in left])
        tail = _tail_of_fall(curve)
        if tail > TAIL_SHARE:
            flags.append(
                Flag(
                    "loss_not_converged",
                    run.name,
                    f"The loss of {run.name} was still falling when it stopped: {tail:.0%} of its whole fall came in the last "
                    f"{TAIL:.0%} of the steps (limit {TAIL_SHARE:.0%}), on the {len(left)} images that it left right.",
                    "Give it more steps, until robust accuracy does not fall any more; until then it is an upper bound.",
                )
            )
    return flags


def warned(runs: Sequence[Run]) -> list[Flag]:
    """
    What an attack's own package warned of.

    Args:
        runs: attacks, with `warnings` in their results.
    """
    flags = []
    for run in runs:
        # The same warning with other numbers in each batch is one
        messages = {text[:40]: text for row in run.rows for text in row["result"].get("warnings") or []}
        flags += [
            Flag(
                "attack_warned",
                run.name,
                f"{run.name} warned: {text.strip()}",
                "See what it names; an adaptive attack may be needed.",
            )
            for text in messages.values()
        ]
    return flags


def unchecked(runs: Sequence[Run]) -> list[Flag]:
    """
    An evaluation without any attack along gradients, or without the sanity checks: its robust accuracies are upper bounds of
    unknown worth.

    Args:
        runs: attacks.
    """
    attacks = [run for run in runs if run.role == "attack"]
    if attacks and not any(run.has_gradients for run in attacks if _any_tried(run)) and any(map(_any_tried, attacks)):
        return [
            Flag(
                "no_white_box",
                None,
                f"No attack along gradients was run ({', '.join(run.name for run in attacks)}): a white-box attacker finds "
                "far more.",
                "Add APGD or AutoAttack.",
            )
        ]
    if attacks and all(run.role == "attack" for run in runs) and any(map(_any_tried, attacks)):
        return [
            Flag(
                "no_sanity_checks",
                None,
                "The sanity checks of Carlini et al. were not run: masked gradients would pass unseen.",
                "Leave `sanity_images` at its default, with PGD or APGD among the attacks, whose steps and ε can be varied.",
            )
        ]
    return []


# What the flags read --------------------------------------------------------------------------------------------------


def _compare(a: Run, b: Run) -> tuple[int, int, int]:
    """Images that each broke, of those that both have and were judged under both."""
    both = [(x, y) for x, y in zip(a.broken, b.broken, strict=False) if x is not None and y is not None]
    return sum(x for x, _ in both), sum(y for _, y in both), len(both)


def _beyond_chance(difference: int, count: int) -> bool:
    return difference > max(_SLACK_IMAGES, math.floor(_SLACK_SHARE * count))


def _any_tried(run: Run) -> bool:
    return any(not row["result"].get("skipped") for row in run.rows)


def _same_threat(a: Run, b: Run) -> bool:
    return all(a.settings.get(key) == b.settings.get(key) for key in ("epsilon", "norm"))


def _best_search(losses: Sequence[float | None], steps: Any) -> Sequence[float | None]:
    """The search that ended lowest, of several in one history: each has a loss for each step and one at its end."""
    length = steps + 1 if isinstance(steps, int) else 0
    if length < 2 or len(losses) < 2 * length or len(losses) % length > 1:
        return losses
    first = len(losses) % length  # the clean image's
    searches = [losses[start : start + length] for start in range(first, len(losses), length)]
    return min(searches, key=lambda search: min((loss for loss in search if loss is not None), default=math.inf))


def _best_so_far(losses: Sequence[float | None]) -> list[float | None]:
    best: list[float | None] = []
    for loss in losses:
        last = best[-1] if best else None
        best.append(loss if last is None else last if loss is None else min(loss, last))
    return best


def _pairs(runs: Sequence[Run]) -> Iterator[tuple[Run, Run, str]]:
    """Runs that differ in ε or in steps alone, the one with less first. A sanity check is compared with its attack only."""
    incidental = ("step_size", "seed")

    def key(run: Run, without: str) -> str:
        return json.dumps({k: v for k, v in run.settings.items() if k not in (without, *incidental)}, sort_keys=True)

    for less in runs:
        for more in runs:
            if less is more or (less.role != "attack" and less.of != more.name and less.of != more.of):
                continue
            if more.role != "attack" and more.of != (less.of or less.name):
                continue
            for what in ("epsilon", "steps"):
                a, b = less.settings.get(what), more.settings.get(what)
                if not isinstance(a, int | float) or not isinstance(b, int | float) or not a < b:
                    continue
                if key(less, what) == key(more, what):
                    yield less, more, what
