"""Means over seeds with their 95 % intervals, for the tables and plots of the examples."""

import math
from collections.abc import Sequence

# 0.975 quantiles of Student's t by number of seeds; more than 10 take the last, which is on the safe side
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and half the width of its 95 % interval (Student's t); NaN for the latter with one seed."""
    mean, count = sum(values) / len(values), len(values)
    if count < 2:
        return mean, math.nan
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return mean, STUDENT.get(count, STUDENT[10]) * spread


def cell(values: Sequence[float | None], form: str = ".2f") -> str:
    """Mean ± half-width of its interval; a dash where a value is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "–"
    mean, half = mean_interval(known)
    return f"{mean:{form}}" if math.isnan(half) else f"{mean:{form}} ± {half:{form}}"
