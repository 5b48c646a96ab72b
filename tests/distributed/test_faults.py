"""kill -9 and SIGTERM in the middle of a training: resumed, it ends with the weights of one that nobody touched."""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from hf_robust.trainers.checkpoints import problem_of
from tests.distributed.faults import STEPS, TRAINERS, Run, kill_and_resume, main, same, trained
from tests.distributed.parity import has_deepspeed


def uninterrupted(folder: Path, name: str, processes: int) -> dict[str, Any]:
    folder.mkdir()
    with Run(folder, [name], processes, pace=None) as run:
        assert run.ends() == 0, run.said()
    return trained(folder, name)


def test_killed_while_a_checkpoint_is_written(tmp_path: Path):
    expected = uninterrupted(tmp_path / "whole", "cat", 1)
    (tmp_path / "killed").mkdir()
    (kill,) = kill_and_resume(tmp_path / "killed", "cat", 1, 1, random.Random(0), expected, while_saving=True)
    assert (kill.killed, kill.problem, kill.equal) == ("run", None, True)
    assert kill.moment.startswith("checkpoint ")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills(tmp_path: Path):
    assert main(["--kills", "20", "--seed", "0", "--output", str(tmp_path / "kills.json")]) == 0
    kills = json.loads((tmp_path / "kills.json").read_text())["kills"]
    assert len(kills) == 20 and all(kill["equal"] for kill in kills)
    assert {kill["trainer"] for kill in kills} == set(TRAINERS)
    assert {kill["killed"] for kill in kills} == {"run", "rank 0", "rank 1"}
    assert {kill["moment"].split()[0] for kill in kills} == {"step", "checkpoint"}
    assert any(kill["incomplete"] for kill in kills)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("strategy", ["fsdp2", "zero2"])
def test_kills_where_states_are_split(strategy: str):
    if strategy == "zero2" and not has_deepspeed():
        pytest.skip("ZeRO needs DeepSpeed: pip install 'hf_robust[deepspeed]'")
    assert main(["--kills", "2", "--seed", "0", "--trainers", "cat", "--strategy", strategy]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("signalled", ["agent", "rank 1"])
def test_sigterm_under_two_processes(signalled: str, tmp_path: Path):
    """One checkpoint, behind the same step of both, which end with status 143; the agent of torchrun with 1."""
    expected = uninterrupted(tmp_path / "whole", "cat", 2)
    folder = tmp_path / "stopped"
    folder.mkdir()
    with Run(folder, ["cat"], 2, pace=1.0) as run:
        assert run.wait_for("step", 1)
        os.kill(run.process.pid if signalled == "agent" else run.pids()[1], signal.SIGTERM)
        assert run.ends() == 1
        step = run.told("step")[-1]
        assert step < STEPS and run.told("saving").count(step) == 1
        assert problem_of(folder / "cat" / f"checkpoint-{step}") is None
        if signalled != "agent":  # which tells the statuses of processes that end by themselves
            assert "exitcode  : 143" in run.said()
    with Run(folder, ["cat"], 2) as run:
        assert run.ends() == 0, run.said()
        assert run.told("resumed") == [step]
    assert same(trained(folder, "cat"), expected)
