"""Two processes under DDP, ZeRO and FSDP2 train to the weights of one process with twice the batch."""

import pytest

from tests.distributed.cells import STRATEGIES, cells_of, refused_cells_of
from tests.distributed.parity import TOLERANCE, Found, compare, has_deepspeed, launch

# DDP has fast cells of its own in tests/invariance
FAST = "cat-rank-without-row"
# TRL's fused loss, whose gradient of a split head nobody summed
FUSED = "vlm-full-1"
_CELLS = [(strategy, cell) for strategy in STRATEGIES for cell in cells_of(strategy)]
_SLOW: dict[str, Found] = {}


def _skip_without_deepspeed(strategy: str) -> None:
    if strategy.startswith("zero") and not has_deepspeed():
        pytest.skip("ZeRO needs DeepSpeed: pip install 'hf_robust[deepspeed]'")


@pytest.fixture(scope="module")
def fast() -> Found:
    strategies = ["fsdp2", *(["zero2", "zero3"] if has_deepspeed() else [])]
    return {**launch([FAST, FUSED], strategies), **launch([FAST, FUSED], ["alone"])}


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3"])
def test_a_process_without_an_adversarial_row_keeps_step(strategy: str, fast: Found):
    _skip_without_deepspeed(strategy)
    assert compare(fast["alone", FAST][0], fast[strategy, FAST], strategy) < TOLERANCE["float32"]


def test_the_head_behind_a_fused_loss_is_trained_on_all_rows(fast: Found):
    assert compare(fast["alone", FUSED][0], fast["fsdp2", FUSED], "fsdp2") < TOLERANCE["float32"]


@pytest.fixture(scope="module")
def alone() -> Found:
    return launch(None, ["alone"], timeout=3600)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("strategy", "cell"), _CELLS)
def test_two_processes_are_one(strategy: str, cell: str, alone: Found):
    _skip_without_deepspeed(strategy)
    if strategy not in _SLOW:  # one start for all cells: starting takes longer than training
        _SLOW[strategy] = launch(None, [strategy], timeout=3600)
    assert compare(alone["alone", cell][0], _SLOW[strategy][strategy, cell], strategy) < TOLERANCE["float32"]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("strategy", [strategy for strategy in STRATEGIES if refused_cells_of(strategy)])
def test_what_cannot_be_is_refused_before_training(strategy: str):
    _skip_without_deepspeed(strategy)
    refused = refused_cells_of(strategy)
    for (_, cell), ranks in launch(list(refused), [strategy], timeout=3600).items():
        for found in ranks:
            assert refused[cell] in found["error"] and "training_step" not in found["error"], found["error"]
