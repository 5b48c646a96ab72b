"""Two processes (DDP over gloo) train to the weights of one process with twice the batch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.invariance.two_processes import CELLS, run_cell
from tests.trainer_data import max_difference

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found for every cell; one start for all, as starting takes longer than training."""
    folder = tmp_path_factory.mktemp("two_processes")
    # `accelerate launch --cpu --num_processes 2` would run one process only, without a word
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = ROOT / "tests" / "invariance" / "two_processes.py"
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(script), str(folder)], cwd=folder, env=env, timeout=400, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("cell", CELLS)
def test_two_processes_are_one(cell: str, of_two_processes: list[dict[str, Any]]):
    first, second = (found[cell] for found in of_two_processes)
    assert (first["num_processes"], first["wrapper"]) == (2, "DistributedDataParallel")
    # Under FSDP and ZeRO-3 a forward is collective: a process that makes one more waits for ever
    assert first["forwards"] == second["forwards"] > 0
    one = run_cell(cell, 8)
    assert one["num_processes"] == 1
    assert max_difference(first["weights"], second["weights"]) == 0
    assert max_difference(one["weights"], first["weights"]) < TOLERANCE
    assert len(one["logged"]) == len(first["logged"])
    for alone, shared in zip(one["logged"], first["logged"], strict=True):
        assert shared == pytest.approx(alone, abs=1e-4)
    if cell.endswith("broken"):
        assert max(entry.get("attack_non_finite", 0) for entry in one["logged"]) > 0
