"""Figures of forgetting: every one against values worked out by hand."""

import builtins
import itertools
import math
import random

import pytest

from hf_robust.metrics import load
from hf_robust.metrics.proportions import wilson_interval
from hf_robust.metrics.unlearning import (
    auc_interval,
    choice_probability,
    extraction_strength,
    forget_quality,
    membership_auc,
    min_k_score,
    model_utility,
    recovery,
    rouge_l,
    truth_ratio,
    truthfulness,
)

# Truth ratio ----------------------------------------------------------------------------------------------------------


def test_truth_ratio_by_hand():
    # Wrong answers 1/2 and 1/8 per token, the right one 1/4: (0.5 + 0.125) / 2 / 0.25 and sqrt(1/16) / 0.25
    right, wrong = [math.log(4)], [math.log(2), math.log(8)]
    assert truth_ratio(right, wrong) == pytest.approx(1.25)
    assert truth_ratio(right, wrong, mean="geometric") == pytest.approx(1.0)
    # Two ways of being right, 1/4 and 1/2: 0.3125 / 0.375
    assert truth_ratio([math.log(4), math.log(2)], wrong) == pytest.approx(0.3125 / 0.375)
    assert truthfulness(0.25) == 0.75 and truthfulness(1.25) == 0.0 and truthfulness(math.inf) == 0.0


def test_truth_ratio_of_losses_beyond_float64():
    assert truth_ratio([900.0], [901.0]) == pytest.approx(math.exp(-1))
    assert truth_ratio([900.0], [1.0]) == math.inf
    assert truth_ratio([1.0], [900.0]) == 0.0


@pytest.mark.parametrize(
    ("right", "wrong", "options", "message"),
    [
        ([], [1.0], {}, "`right` is empty"),
        ([1.0], [], {}, "`wrong` is empty"),
        ([1.0], [1.0, -0.1], {}, r"`wrong\[1\]=-0.1`"),
        ([math.nan], [1.0], {}, r"`right\[0\]=nan`"),
        ([1.0], [1.0], {"mean": "median"}, "`mean='median'`"),
    ],
)
def test_truth_ratio_refuses(right, wrong, options, message):
    with pytest.raises(ValueError, match=message):
        truth_ratio(right, wrong, **options)


def test_choice_probability_by_hand():
    # 1/2 against 1/4 and 1/4
    assert choice_probability(math.log(2), [math.log(4), math.log(4)]) == pytest.approx(0.5)
    assert choice_probability(2000.0, [2000.0]) == 0.5
    with pytest.raises(ValueError, match="`wrong` is empty"):
        choice_probability(1.0, [])


# Forget quality -------------------------------------------------------------------------------------------------------


def test_forget_quality_by_hand():
    # Wholly apart: of the C(6, 3) = 20 orders, the two with all of one first are as extreme
    apart = forget_quality([0.1, 0.2, 0.3], [0.7, 0.8, 0.9])
    assert apart == {"p_value": pytest.approx(0.1), "statistic": 1.0}
    # Interleaved, D = 1/3: every order has at least that
    near = forget_quality([1.0, 3.0, 5.0], [2.0, 4.0, 6.0])
    assert near == {"p_value": 1.0, "statistic": pytest.approx(1 / 3)}
    # D = 2/3: 12 of the 20 orders reach it (counted below)
    orders = 0
    for places in itertools.combinations(range(6), 3):
        walk = [1 if place in places else -1 for place in range(6)]
        orders += max(abs(sum(walk[: end + 1])) for end in range(6)) >= 2
    middle = forget_quality([1.0, 2.0, 5.0], [3.0, 4.0, 6.0])
    assert middle["statistic"] == pytest.approx(2 / 3) and middle["p_value"] == pytest.approx(orders / 20)


def test_forget_quality_depends_on_the_order_only():
    mine, oracle = [0.2, 0.5, 3.0, 0.1], [0.9, 1.1, 0.3, 2.0]
    inverse = forget_quality([1 / value for value in mine], [1 / value for value in oracle])
    assert forget_quality(mine, oracle) == pytest.approx(inverse)  # TOFU's code has the ratio upside down
    assert forget_quality([math.inf, *mine], [0.5, *oracle])["p_value"] > 0
    assert forget_quality(mine, mine) == {"p_value": 1.0, "statistic": 0.0}


def test_forget_quality_says_what_is_missing(monkeypatch):
    with pytest.raises(ValueError, match="`oracle` is empty"):
        forget_quality([1.0], [])
    with pytest.raises(ValueError, match=r"`ratios\[0\]=-1`"):
        forget_quality([-1], [1.0])
    whole = builtins.__import__

    def without_scipy(name, *args, **kwargs):
        if name.split(".")[0] == "scipy":
            raise ImportError("No module named 'scipy'")
        return whole(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(ImportError, match=r'pip install "hf_robust\[eval\]"'):
        forget_quality([1.0], [1.0])


# Utility, extraction, memorisation -------------------------------------------------------------------------------------


def test_model_utility_by_hand():
    assert model_utility([0.5, 1.0, 0.25]) == pytest.approx(3 / 7)  # 3 / (2 + 1 + 4)
    assert model_utility([1.0, 0.0]) == 0.0 and model_utility([0.3]) == pytest.approx(0.3)
    assert model_utility([1.0] * 9) == 1.0
    for wrong, message in (([], "is empty"), ([1.1], r"`figures\[0\]=1.1`"), ([0.5, math.nan], r"\[1\]=nan")):
        with pytest.raises(ValueError, match=message):
            model_utility(wrong)


@pytest.mark.parametrize(
    ("right", "strength"),
    [([1, 1, 1, 1], 1.0), ([1, 0, 1, 1], 0.5), ([0, 0, 0, 1], 0.25), ([1, 1, 1, 0], 0.0), ([0], 0.0), ([1], 1.0)],
)
def test_extraction_strength_by_hand(right, strength):
    assert extraction_strength([bool(hit) for hit in right]) == strength


def test_extraction_strength_refuses():
    with pytest.raises(ValueError, match="`right` is empty"):
        extraction_strength([])
    with pytest.raises(ValueError, match=r"`predictions\[1\]` has 1 tokens and `references\[1\]` 2"):
        load("extraction_strength").compute(predictions=[[1], [1]], references=[[1], [1, 2]])


@pytest.mark.parametrize(
    ("prediction", "reference", "recall"),
    [
        ("the cat sat on the mat", "the cat lay on a mat", 4 / 6),  # the cat on mat
        ("Lisbon.", "she was born in LISBON", 1 / 5),
        ("b a", "a b", 1 / 2),  # one word in order
        ("", "a b", 0.0),
        ("x a x b x", "a b", 1.0),
        ("l\u2019\u00e9t\u00e9", "\u00c9T\u00c9", 1.0),
    ],
)
def test_rouge_l_by_hand(prediction, reference, recall):
    assert rouge_l(prediction, reference) == pytest.approx(recall)


def test_rouge_l_is_the_longest_common_subsequence():
    draw = random.Random(0)
    for _ in range(30):
        one, other = ([draw.choice("abc") for _ in range(draw.randint(1, 6))] for _ in range(2))
        subsequences = {choice for size in range(len(one) + 1) for choice in itertools.combinations(one, size)} & {
            choice for size in range(len(other) + 1) for choice in itertools.combinations(other, size)
        }
        assert rouge_l(" ".join(one), " ".join(other)) == max(map(len, subsequences)) / len(other)
    with pytest.raises(ValueError, match=r"`reference='\.\.'` has no word"):
        rouge_l("a", "..")


# Membership and recovery ----------------------------------------------------------------------------------------------


def test_min_k_by_hand():
    log_probs = [-1.0, -5.0, -2.0, -4.0, -3.0]
    assert min_k_score(log_probs) == -5.0  # one of five
    assert min_k_score(log_probs, k=0.5) == -4.5  # two of five: rounded down
    assert min_k_score(log_probs, k=1) == -3.0
    assert min_k_score([-1.0, -2.0]) == -2.0  # at least one
    assert min_k_score([-float(value) for value in range(10)], k=0.7) == -6.0  # 7 of 10, though 0.7 * 10 < 7 in float64
    for wrong, options, message in (
        ([], {}, "`log_probs` is empty"),
        ([0.5], {}, r"`log_probs\[0\]=0.5`"),
        ([-1.0], {"k": 0}, "`k=0`"),
    ):
        with pytest.raises(ValueError, match=message):
            min_k_score(wrong, **options)


def test_membership_auc_by_hand():
    assert membership_auc([3.0, 2.0, 1.0], [1, 0, 0]) == 1.0
    assert membership_auc([1.0, 2.0, 3.0], [1, 0, 0]) == 0.0
    assert membership_auc([2.0, 1.0, 2.0, 3.0], [1, 1, 0, 0]) == 0.125  # a tie among four pairs
    assert membership_auc([1.0] * 4, [1, 0, 1, 0]) == 0.5
    draw = random.Random(0)
    scores = [draw.randint(0, 4) for _ in range(20)]
    members = [place % 3 == 0 for place in range(20)]
    pairs = [
        (one > other) + (one == other) / 2
        for one, member in zip(scores, members, strict=True)
        for other, second in zip(scores, members, strict=True)
        if member and not second
    ]
    assert membership_auc(scores, members) == pytest.approx(sum(pairs) / len(pairs))
    for wrong, labels, message in (
        ([1.0], [1, 0], "1 entries and `members` 2"),
        ([1.0, 2.0], [1, 1], "2 members and 0 others"),
        ([1.0, 2.0], [1, 2], r"`members\[1\]=2`"),
        ([math.nan, 2.0], [1, 0], r"`scores\[0\]=nan`"),
    ):
        with pytest.raises(ValueError, match=message):
            membership_auc(wrong, labels)


def test_the_interval_of_an_auc_by_hand():
    # One text of each kind: Wilson's for one trial
    for value in (0.0, 0.5, 1.0):
        assert auc_interval(value, 1, 1) == pytest.approx(wilson_interval(value, 1))
    # Two of each, all pairs right. With r = 1 - a: r² = z² a r / 4 · (1 + r / (1 + r) + a / (1 + a)), solved for z²
    low, high = auc_interval(1.0, 2, 2)
    rest = 1 - low
    assert 4 * rest / (low * (1 + rest / (1 + rest) + low / (1 + low))) == pytest.approx(1.959963984540054**2)
    assert high == 1.0 and 0 < low < 1
    # At chance the variance is that of the Mann-Whitney test, (m + n + 1) / 12mn; an end at 0.5 is 1.96 of it away
    away = 1.959963984540054 * math.sqrt((10 + 10 + 1) / (12 * 10 * 10))
    assert auc_interval(0.5 + away, 10, 10)[0] == pytest.approx(0.5)
    assert auc_interval(0.5 - away, 10, 10)[1] == pytest.approx(0.5)
    # Turned round, and narrower with more
    assert auc_interval(0.2, 5, 7) == pytest.approx([1 - end for end in auc_interval(0.8, 5, 7)[::-1]])
    widths = [high - low for low, high in (auc_interval(0.7, n, 20.5) for n in (1, 3.5, 30))]
    assert widths == sorted(widths, reverse=True)
    for wrong, message in (((1.5, 2, 2), "`value"), ((0.5, 0.5, 2), "`members"), ((0.5, 2, 0), "`others")):
        with pytest.raises(ValueError, match=message):
            auc_interval(*wrong)


def test_the_interval_of_an_auc_holds_the_true_one_95_times_in_100():
    draw = random.Random(0)
    for shift, true in ((0.0, 0.5), (1.0, 0.760250), (2.5, 0.961450)):  # normal scores: Φ(shift / √2)
        held = 0
        for _ in range(400):
            scores = [draw.gauss(shift, 1) for _ in range(24)] + [draw.gauss(0, 1) for _ in range(24)]
            low, high = auc_interval(membership_auc(scores, [1] * 24 + [0] * 24), 24, 24)
            held += low <= true <= high
        assert 0.92 <= held / 400 <= 0.99


def test_privacy_leakage_by_hand():
    metric = load("membership_inference")
    found = metric.compute(predictions=[2.0, 1.0, 2.0, 3.0], references=[1, 1, 0, 0], oracle=0.5)
    assert found["privacy_leakage"] == -0.75 and found["members"] == found["others"] == 2
    with pytest.raises(ValueError, match="`oracle=0`"):
        metric.compute(predictions=[1.0, 2.0], references=[1, 0], oracle=0)


def test_recovery_by_hand():
    assert recovery(0.2, 0.8, 1.0) == pytest.approx(0.75)
    assert recovery(0.2, 0.1, 0.7) == pytest.approx(-0.2)
    assert recovery(0.7, 0.9, 0.7) is None
    with pytest.raises(ValueError, match=r"`after\[0\]=1.5`"):
        recovery(0.2, 1.5, 1.0)
    # 1 of 4 before, 3 of 4 after, 0.85 before unlearning, and the oracle learns 0.5 under the attack
    columns = {"predictions": [1.0, 1.0, 1.0, 0.0], "references": [1.0, 0.0, 0.0, 0.0]}
    found = load("recovery").compute(**columns, ceiling=0.85, oracle=0.5)
    assert found["recovery"] == pytest.approx(0.5 / 0.6) and found["above_oracle"] == 0.25
    assert found["retained_before"] == pytest.approx(0.25 / 0.85)
    assert found["retained_after"] == pytest.approx(0.75 / 0.85)
    nothing = load("recovery").compute(**columns, ceiling=0.25)
    assert nothing["recovery"] is None and load("recovery").compute(**columns, ceiling=0.0)["retained_after"] is None
    with pytest.raises(ValueError, match=r"`references\[0\]=2.0`"):
        load("recovery").compute(predictions=[1.0], references=[2.0])
