"""Which adversarial rows belong to which optimizer step: a function of the step number alone."""

import math
from fractions import Fraction

import torch


class AdversarialSchedule:
    """
    Deals adversarial rows to accumulation windows (one window is the data of one optimizer step).

    Window `w` holds `ceil((w + 1) * a) - ceil(w * a)` rows, where `a = utility_rows * fraction / (1 - fraction)`, so the
    share of adversarial rows is `fraction` over any stretch of windows, and the first window has a row. The rows come from
    an endless stream of seeded permutations of the dataset. Nothing depends on how a window is split into micro-batches
    and processes, and nothing has to be saved to resume.

    Args:
        num_rows: size of the adversarial dataset.
        utility_rows: utility rows of a full window, over all micro-batches and processes.
        fraction: share of adversarial rows among all rows, in (0, 1).
        seed: seed of the permutations.
    """

    def __init__(self, num_rows: int, utility_rows: int, fraction: float, seed: int):
        share = Fraction(str(fraction))
        self.num_rows = num_rows
        self.per_window = utility_rows * share / (1 - share)
        self.seed = seed
        self._permutation: tuple[int, list[int]] = (-1, [])

    def window(self, step: int) -> list[int]:
        """
        Dataset indices of the adversarial rows of one window.

        Args:
            step: number of optimizer steps done before this window (`state.global_step`).
        """
        first, last = math.ceil(step * self.per_window), math.ceil((step + 1) * self.per_window)
        return [self._row(position) for position in range(first, last)]

    def _row(self, position: int) -> int:
        turn, offset = divmod(position, self.num_rows)
        if self._permutation[0] != turn:
            generator = torch.Generator().manual_seed(self.seed + turn)
            self._permutation = (turn, torch.randperm(self.num_rows, generator=generator).tolist())
        return self._permutation[1][offset]


def rows_of_process(rows: list[int], step: int, process: int, num_processes: int) -> list[int | None]:
    """
    The rows of a window that one process takes. Every process gets the same number of places, so that all of them make the
    same forwards; a place without a row is `None`. Where rows do not divide evenly, the surplus moves on by one process
    from window to window.

    Args:
        rows: the window's rows.
        step: the window's number.
        process: rank of this process.
        num_processes: number of processes.
    """
    places = math.ceil(len(rows) / num_processes)
    mine: list[int | None] = list(rows[(process - step) % num_processes :: num_processes])
    return mine + [None] * (places - len(mine))


def spread(num_chunks: int, num_batches: int) -> list[int]:
    """
    Micro-batch of a window to which each chunk of adversarial rows is attached, as evenly as possible.

    Args:
        num_chunks: chunks to place.
        num_batches: micro-batches of the window.
    """
    return [(chunk * num_batches) // num_chunks for chunk in range(num_chunks)]


def start_seed(seed: int, step: int, process: int) -> int:
    """
    Seed of an attack's random starts in one window. A function of the step alone: a trainer's checkpoint holds no state of
    the attack's generator, and a resumed run has to start its attacks where an uninterrupted one does.

    Args:
        seed: the run's seed.
        step: the window's number.
        process: rank of this process, whose rows are others than those of its neighbours.
    """
    # Large odd factors keep runs, windows and processes apart; 63 bits are what a generator takes
    return (seed * 0x9E3779B97F4A7C15 + step * 0xC2B2AE3D27D4EB4F + process * 0x165667B19E3779F9) % 2**63
