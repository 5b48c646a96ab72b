"""Shares and how far to trust them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def wilson_interval(successes: float, count: float, confidence: float = 0.95) -> tuple[float, float]:
    """
    Wilson score interval of a share (Wilson 1927): unlike the normal interval it stays within [0, 1] and does not collapse
    to a point at 0 or `count` successes.

    Args:
        successes: number of successes, between 0 and `count`. A sum of graded scores in [0, 1] is taken as it is, which
            makes the interval conservative: a graded score varies less than a yes-or-no one of the same mean.
        count: number of trials, at least 1; as many independent ones as they are worth, which need not be a whole number, if
            they depend on each other.
        confidence: 0.90, 0.95 or 0.99.

    Returns:
        Lower and upper end, both in [0, 1].

    Raises:
        ValueError: `count` below 1, `successes` outside [0, count], or an unknown `confidence`.
    """
    quantiles = {0.90: 1.6448536269514722, 0.95: 1.959963984540054, 0.99: 2.5758293035489004}
    if confidence not in quantiles:
        raise ValueError(f"`confidence={confidence!r}` is unknown; choose one of {', '.join(map(str, quantiles))}.")
    if count < 1:
        raise ValueError(f"`count={count!r}` must be at least 1: a share of nothing has no interval.")
    if not 0 <= successes <= count:
        raise ValueError(f"`successes={successes!r}` must lie between 0 and `count={count}`.")
    z, share = quantiles[confidence], successes / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def student_quantile(degrees: int) -> float:
    """
    The 0.975 quantile of Student's t distribution, for 95 % intervals of means.

    Args:
        degrees: of freedom, at least 1.

    Returns:
        Within 0.0002: from a table, and beyond it by the expansion about the normal quantile (Abramowitz & Stegun 26.7.5).

    Raises:
        ValueError: `degrees` below 1.
    """
    if degrees < 1:
        raise ValueError(f"`degrees={degrees!r}` must be at least 1: one value has no spread.")
    table = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
    if degrees <= len(table):
        return table[degrees - 1]
    z = 1.959963984540054
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def share_of(
    values: Sequence[float | None], *, categories: Sequence[str | None] | None = None, confidence: float = 0.95
) -> dict[str, Any]:
    """
    Share of successes, with its interval.

    Args:
        values: for each row yes or no, or a graded score in [0, 1]; `None` for a row that was not judged (an error). Such
            rows belong neither to the share nor to its count; they are counted apart.
        categories: name of each row's category, for a share of each; rows with `None` are in no category.
        confidence: of the Wilson intervals: 0.90, 0.95 or 0.99.

    Returns:
        `value`, `low` and `high` (`None` where no row was judged), `count` (rows judged), `missing` (rows not judged), and,
        with `categories`, `categories`: the same for each category by name, in alphabetical order.

    Raises:
        ValueError: no rows, a value outside [0, 1], another number of categories, or an unknown `confidence`.
    """
    if not len(values):
        raise ValueError("`values` is empty: a share needs at least one row.")
    for row, value in enumerate(values):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"`values[{row}]={value!r}` must be yes or no, a score between 0 and 1, or None.")
    judged = [float(value) for value in values if value is not None]
    share: dict[str, Any] = {"value": None, "low": None, "high": None}
    if judged:
        low, high = wilson_interval(math.fsum(judged), len(judged), confidence)
        share = {"value": math.fsum(judged) / len(judged), "low": low, "high": high}
    share |= {"count": len(judged), "missing": len(values) - len(judged)}
    if categories is not None:
        if len(categories) != len(values):
            raise ValueError(f"`categories` has {len(categories)} entries for {len(values)} rows; give one each.")
        groups: dict[str, list[float | None]] = {}
        for name, value in zip(categories, values, strict=True):
            if name is not None:
                groups.setdefault(name, []).append(value)
        share["categories"] = {name: share_of(groups[name], confidence=confidence) for name in sorted(groups)}
    return share


def broken_by_any(outcomes: Mapping[str, Sequence[float | None]]) -> list[float | None]:
    """
    The strongest of several attacks, behaviour by behaviour.

    Args:
        outcomes: for each attack its success on each behaviour, in the same order; `None` where it was not judged.

    Returns:
        For each behaviour the highest success; `None` where no attack was judged.

    Raises:
        ValueError: no attack, or different numbers of behaviours.
    """
    if not outcomes or len({len(column) for column in outcomes.values()}) != 1:
        lengths = {name: len(column) for name, column in outcomes.items()}
        raise ValueError(
            f"`outcomes` must hold as many values for each attack, and at least one attack; it has {lengths}."
        )
    rows = zip(*outcomes.values(), strict=True)
    return [max((float(value) for value in row if value is not None), default=None) for row in rows]
