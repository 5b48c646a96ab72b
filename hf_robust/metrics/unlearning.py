"""Figures of forgetting: pure functions of losses, token hits, texts and scores."""

import math
import re
from collections.abc import Sequence


def _check_values(name: str, values: Sequence[float], low: float, high: float, meaning: str) -> None:
    if not len(values):
        raise ValueError(f"`{name}` is empty; give at least one value: {meaning}.")
    for place, value in enumerate(values):
        if not low <= value <= high:  # NaN fails too
            raise ValueError(f"`{name}[{place}]={value!r}` must be {meaning}.")


def truth_ratio(right: Sequence[float], wrong: Sequence[float], *, mean: str = "arithmetic") -> float:
    """
    How likely wrong answers to a question are beside the right one in other words: the truth ratio of "TOFU: A Task of
    Fictitious Unlearning for LLMs" (arXiv 2401.06121), mean over wrong answers of P(wrong | question)^(1 / tokens), divided
    by P(right, paraphrased | question)^(1 / tokens). Near 0 for a model that knows, near 1 for one that cannot tell.

    Args:
        right: loss of each right answer in other words, in nats per token (mean over its tokens); several are averaged like
            the wrong ones.
        wrong: loss of each perturbed answer, likewise.
        mean: `"arithmetic"` averages the probabilities, as the paper's formula does (the default); `"geometric"` averages the
            losses, as its released code does.

    Returns:
        0 or more; infinity where it is beyond float64.

    Raises:
        ValueError: no loss, one that is negative or not finite, or an unknown `mean`.
    """
    _check_values("right", right, 0, 1e300, "a finite loss in nats per token, 0 or more")
    _check_values("wrong", wrong, 0, 1e300, "a finite loss in nats per token, 0 or more")
    if mean not in ("arithmetic", "geometric"):
        raise ValueError(f"`mean={mean!r}` is unknown; choose 'arithmetic' or 'geometric'.")
    average = _log_mean if mean == "arithmetic" else _mean_log
    try:
        return math.exp(average(wrong) - average(right))
    except OverflowError:
        return math.inf


def _mean_log(losses: Sequence[float]) -> float:
    return -math.fsum(losses) / len(losses)


def _log_mean(losses: Sequence[float]) -> float:
    """Log of the mean of exp(-loss), without underflow."""
    least = min(losses)
    return math.log(math.fsum(math.exp(least - loss) for loss in losses) / len(losses)) - least


def forget_quality(ratios: Sequence[float], oracle: Sequence[float]) -> dict[str, float]:
    """
    Whether a model's truth ratios on the forget set could be those of a model that never saw it: the p-value of the
    two-sample Kolmogorov-Smirnov test (arXiv 2401.06121). It grows small with the number of questions, so compare figures of
    equally many only.

    Args:
        ratios: [`truth_ratio`] of each forget question under the model, infinity allowed. Only their order counts.
        oracle: the same under a model trained without the forget set.

    Returns:
        `p_value` in [0, 1], high where the two cannot be told apart; `statistic`, the greatest distance between the two
        distribution functions, in [0, 1].

    Raises:
        ImportError: scipy is not installed.
        ValueError: no ratios, or one that is negative or not a number.
    """
    for name, values in (("ratios", ratios), ("oracle", oracle)):
        _check_values(name, values, 0, math.inf, "a truth ratio, 0 or more")
    try:
        from scipy.stats import ks_2samp
    except ImportError as error:
        raise ImportError(
            'Forget quality is a Kolmogorov-Smirnov test, which needs scipy: pip install "hf_robust[eval]".'
        ) from error
    found = ks_2samp(list(ratios), list(oracle))
    return {"p_value": min(1.0, float(found.pvalue)), "statistic": float(found.statistic)}


def truthfulness(ratio: float) -> float:
    """
    What a truth ratio adds to model utility: max(0, 1 - ratio), as in TOFU (arXiv 2401.06121).

    Args:
        ratio: of [`truth_ratio`], on questions that should still be known.

    Returns:
        In [0, 1], 1 for a model that knows.
    """
    return max(0.0, 1.0 - ratio)


def choice_probability(right: float, wrong: Sequence[float]) -> float:
    """
    Probability of the right one among several answers, each P^(1 / tokens): TOFU's probability on general knowledge (arXiv
    2401.06121).

    Args:
        right: loss of the right answer in nats per token.
        wrong: loss of each wrong answer.

    Raises:
        ValueError: a loss that is negative or not finite, or no wrong answer.
    """
    _check_values("right", [right], 0, 1e300, "a finite loss in nats per token, 0 or more")
    _check_values("wrong", wrong, 0, 1e300, "a finite loss in nats per token, 0 or more")
    least = min(right, *wrong)
    weights = [math.exp(least - loss) for loss in (right, *wrong)]
    return weights[0] / math.fsum(weights)


def model_utility(figures: Sequence[float]) -> float:
    """
    Harmonic mean of what a model is still good at: 0 as soon as one of them is 0.

    TOFU (arXiv 2401.06121) takes nine: probability, ROUGE-L recall and [`truthfulness`] on the retain set, on real authors
    and on world facts.

    Args:
        figures: each in [0, 1], higher is better.

    Raises:
        ValueError: none at all, or one outside [0, 1].
    """
    _check_values("figures", figures, 0, 1, "a figure between 0 and 1, higher is better")
    if min(figures) == 0:
        return 0.0
    return min(1.0, len(figures) / math.fsum(1 / figure for figure in figures))


def extraction_strength(right: Sequence[bool]) -> float:
    """
    How little of a text must be given for the model to write the rest: 1 - k / n for the fewest tokens k after which each
    further one of the n is the most likely (Carlini et al. 2021, arXiv 2012.07805; for unlearning Wang et al. 2024, arXiv
    2406.09179). A text whose last token is missed has 0 (OpenUnlearning gives it 1 / n).

    Args:
        right: of each token of the text, in order, whether it is the model's most likely one given those before it.

    Returns:
        In [0, 1]; 1 if the model writes all of it.

    Raises:
        ValueError: no tokens.
    """
    if not len(right):
        raise ValueError("`right` is empty: a text without tokens has no extraction strength. Leave it out.")
    tail = 0
    for hit in reversed(right):
        if not hit:
            break
        tail += 1
    return tail / len(right)


def rouge_words(text: str) -> list[str]:
    """
    Words as ROUGE compares them: runs of letters and digits of any script, case folded, not stemmed.

    Args:
        text: any text.
    """
    return re.findall(r"[^\W_]+", text.casefold())


def rouge_l(prediction: str, reference: str) -> float:
    """
    ROUGE-L recall (Lin 2004): the longest common subsequence of words, divided by the words of the reference.

    Args:
        prediction: what the model wrote.
        reference: what there is to recall.

    Returns:
        In [0, 1]; 1 if all of the reference's words stand in the prediction in their order.

    Raises:
        ValueError: the reference has no word.
    """
    words = rouge_words(reference)
    if not words:
        raise ValueError(f"`reference={reference!r}` has no word to recall. Leave it out.")
    lengths = [0] * (len(words) + 1)
    for word in rouge_words(prediction):
        before = lengths[:]
        for place, wanted in enumerate(words, start=1):
            lengths[place] = before[place - 1] + 1 if word == wanted else max(before[place], lengths[place - 1])
    return lengths[-1] / len(words)


def min_k_score(log_probs: Sequence[float], k: float = 0.2) -> float:
    """
    Mean log-probability of a text's least likely tokens, high for texts that a model was trained on: Min-K% Prob of
    "Detecting Pretraining Data from Large Language Models" (arXiv 2310.16789).

    Args:
        log_probs: of each token of the text, in nats.
        k: share of the tokens that count, rounded down, at least one token. Default: the paper's 20 %.

    Raises:
        ValueError: no tokens, a log-probability above 0 or not finite, or `k` outside (0, 1].
    """
    _check_values("log_probs", log_probs, -1e300, 0, "a finite log-probability, 0 or less")
    if not 0 < k <= 1:
        raise ValueError(f"`k={k!r}` must be a share of the tokens, above 0 and at most 1.")
    # The slack keeps 0.7 * 10, which is 7 but for rounding, from becoming 6
    least = sorted(log_probs)[: max(1, int(len(log_probs) * k + 1e-9))]
    return math.fsum(least) / len(least)


def membership_auc(scores: Sequence[float], members: Sequence[float]) -> float:
    """
    How well a score tells texts that were trained on from others: area under the ROC curve, the share of pairs in which the
    member scores higher, ties as one half.

    Args:
        scores: of each text, higher for a likely member, such as [`min_k_score`].
        members: of each text 1 if it is a member (of the forget set), 0 if no model has seen it.

    Returns:
        In [0, 1]; 0.5 for chance. Below 0.5 the forgotten texts stick out as less likely than unseen ones.

    Raises:
        ValueError: different numbers, a score that is not a number, a label other than 0 and 1, or only one of the two.
    """
    if len(scores) != len(members):
        raise ValueError(f"`scores` has {len(scores)} entries and `members` {len(members)}: give one of each per text.")
    for place, (score, member) in enumerate(zip(scores, members, strict=True)):
        if math.isnan(score):
            raise ValueError(f"`scores[{place}]=nan` must be a number.")
        if member not in (0, 1):
            raise ValueError(f"`members[{place}]={member!r}` must be 0 or 1: whether the text is of the forget set.")
    count = int(sum(members))
    others = len(members) - count
    if not count or not others:
        raise ValueError(f"`members` holds {count} members and {others} others: the AUC needs at least one of each.")
    # Mann-Whitney: ranks of the members, ties at their mean rank
    order = sorted(range(len(scores)), key=lambda place: scores[place])
    total, start = 0.0, 0
    while start < len(order):
        end = start
        while end < len(order) and scores[order[end]] == scores[order[start]]:
            end += 1
        total += (start + 1 + end) / 2 * sum(members[place] for place in order[start:end])
        start = end
    return (total - count * (count + 1) / 2) / (count * others)


def auc_interval(value: float, members: float, others: float) -> tuple[float, float]:
    """
    95 % interval of an area under the ROC curve: the score interval of Newcombe (2006, Statistics in Medicine 25:559, method
    5), all values that lie within 1.96 of their own standard errors of the one found. Like Wilson's interval of a share, which
    it is for one text of each kind, it stays within [0, 1] and does not collapse to a point at 0 or 1.

    Args:
        value: the area, of [`membership_auc`].
        members: number of members, at least 1; as many independent ones as they are worth, which need not be a whole number.
        others: number of others, likewise.

    Returns:
        Lower and upper end, both in [0, 1].

    Raises:
        ValueError: a value outside [0, 1], or a number below 1.
    """
    _check_values("value", [value], 0, 1, "an area under the ROC curve, between 0 and 1")
    _check_values("members", [members], 1, 1e300, "a number of texts, at least 1")
    _check_values("others", [others], 1, 1e300, "a number of texts, at least 1")
    z, mean = 1.959963984540054, (members + others) / 2 - 1

    def too_far(area: float) -> bool:
        # Hanley and McNeil's variance, with the mean number in place of both
        pairs = 1 + mean * ((1 - area) / (2 - area) + area / (1 + area))
        return (area - value) ** 2 > z * z * area * (1 - area) * pairs / (members * others)

    ends = []
    for outside in (0.0, 1.0):
        inside = value
        for _ in range(60):  # halvings, more than float64 has digits
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if too_far(middle) else (middle, outside)
        ends.append(inside)
    return ends[0], ends[1]


def recovery(before: float, after: float, ceiling: float) -> float | None:
    """
    Share of what was forgotten that an attack brings back: (after - before) / (ceiling - before).

    Args:
        before: a figure of recall on the forget set, of the model after unlearning, in [0, 1].
        after: the same under attack.
        ceiling: the same of the model before unlearning.

    Returns:
        0 for nothing, 1 for all; below 0 or above 1 where the attack makes it worse or the model better than it was. `None`
        where nothing was forgotten (`before` is not below `ceiling`).

    Raises:
        ValueError: a figure outside [0, 1].
    """
    for name, value in (("before", before), ("after", after), ("ceiling", ceiling)):
        _check_values(name, [value], 0, 1, "a figure of recall between 0 and 1")
    return None if before >= ceiling else (after - before) / (ceiling - before)
