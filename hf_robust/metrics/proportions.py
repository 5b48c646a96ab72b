"""Shares and how far to trust them."""

import math


def wilson_interval(successes: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """
    Wilson score interval of a share (Wilson 1927): unlike the normal interval it stays within [0, 1] and does not collapse
    to a point at 0 or `count` successes.

    Args:
        successes: number of successes, between 0 and `count`. A sum of graded scores in [0, 1] is taken as it is, which
            makes the interval conservative: a graded score varies less than a yes-or-no one of the same mean.
        count: number of trials, at least 1.
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
