"""Which adversarial rows go where: pure functions of the step."""

import itertools
from collections import Counter

import pytest

from hf_robust.trainers.schedule import AdversarialSchedule, rows_of_process, spread, start_seed


@pytest.mark.parametrize("fraction", [0.125, 0.01, 0.3, 1 / 3, 0.9])
@pytest.mark.parametrize("utility_rows", [1, 7, 64])
def test_share_over_any_stretch_of_windows_is_the_fraction(utility_rows: int, fraction: float):
    schedule = AdversarialSchedule(5, utility_rows, fraction, seed=0)
    counts = [len(schedule.window(step)) for step in range(200)]
    wanted = utility_rows * fraction / (1 - fraction)
    assert counts[0] >= 1
    for start, stop in ((0, 200), (0, 1), (17, 90), (199, 200)):
        assert abs(sum(counts[start:stop]) - wanted * (stop - start)) < 1
    share = sum(counts) / (sum(counts) + 200 * utility_rows)
    assert share == pytest.approx(fraction, abs=1 / (200 * utility_rows))


def test_a_fraction_of_an_eighth_is_one_row_to_seven():
    schedule = AdversarialSchedule(100, 7, 0.125, seed=0)
    assert [len(schedule.window(step)) for step in range(50)] == [1] * 50


def test_rows_come_in_permutations_of_the_dataset():
    schedule = AdversarialSchedule(6, 8, 1 / 3, seed=3)
    rows = list(itertools.chain.from_iterable(schedule.window(step) for step in range(6)))
    turns = [rows[start : start + 6] for start in range(0, len(rows), 6)]
    assert len(turns) == 4
    assert all(sorted(turn) == list(range(6)) for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1


def test_a_window_is_a_function_of_its_step_alone():
    forward = AdversarialSchedule(6, 8, 0.3, seed=3)
    backward = AdversarialSchedule(6, 8, 0.3, seed=3)
    steps = list(range(20))
    expected = {step: forward.window(step) for step in steps}
    assert {step: backward.window(step) for step in reversed(steps)} == expected
    other = AdversarialSchedule(6, 8, 0.3, seed=4)
    assert [other.window(step) for step in steps] != [expected[step] for step in steps]


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 8, 9])
def test_processes_get_disjoint_rows_and_equal_numbers_of_places(rows: int, processes: int):
    window = list(range(100, 100 + rows))
    shares = [rows_of_process(window, 4, process, processes) for process in range(processes)]
    assert len({len(share) for share in shares}) == 1
    taken = [row for share in shares for row in share if row is not None]
    assert sorted(taken) == window
    counts = [sum(row is not None for row in share) for share in shares]
    assert max(counts) - min(counts) <= 1
    # Places without a row are the last ones, so that chunks without any row are whole
    assert all(share == sorted(share, key=lambda row: row is None) for share in shares)


def test_the_surplus_moves_on_from_window_to_window():
    """One row for two processes: they take turns, so that neither attacks all the time."""
    taken = Counter(
        process for step in range(10) for process in range(2) if rows_of_process([7], step, process, 2) == [7]
    )
    assert taken == {0: 5, 1: 5}


@pytest.mark.parametrize("batches", [1, 2, 3, 8])
@pytest.mark.parametrize("chunks", [0, 1, 2, 3, 8, 11])
def test_chunks_are_spread_evenly_over_micro_batches(chunks: int, batches: int):
    places = spread(chunks, batches)
    assert len(places) == chunks and all(0 <= place < batches for place in places)
    counts = Counter(places)
    assert max(counts.values(), default=0) <= -(-chunks // batches)
    assert places == sorted(places)


def test_start_seeds_differ_and_repeat():
    seeds = {start_seed(*place) for place in itertools.product(range(5), range(50), range(4))}
    assert len(seeds) == 5 * 50 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert start_seed(1, 2, 3) == start_seed(1, 2, 3)
