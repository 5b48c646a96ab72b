"""Environment of every test: offline, quiet, one thread, caches of its own."""

import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

_INVARIANCE = Path(__file__).parent / "invariance"
_SESSION_DIR = Path(tempfile.mkdtemp(prefix="hf_robust_tests_"))

# Before anything imports huggingface_hub, datasets or torch: all of them read the environment at import. Subprocesses
# inherit it.
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",  # transformers' and TRL's too
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",  # tests fork
        "HF_HOME": str(_SESSION_DIR / "hf"),
        "HF_DATASETS_CACHE": str(_SESSION_DIR / "datasets"),
        "MPLBACKEND": "Agg",
    }
)
# Fixed, so that no result depends on the machine's number of cores. One: a second thread gains nothing on models this
# small, and costs several times the time where another process has the core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# One folder for the whole session, so that a testbed is built once; an outer value keeps it between sessions.
os.environ.setdefault("HF_ROBUST_CACHE", str(_SESSION_DIR / "hf_robust"))


def pytest_unconfigure() -> None:
    shutil.rmtree(_SESSION_DIR, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_INVARIANCE):
            item.add_marker(pytest.mark.invariance)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many cases the fuzzing tests ran; what a test records comes here from the processes of xdist, too."""
    total: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, tally in report.user_properties:
            if name == "fuzzing":
                total.update(tally)
    if total:
        terminalreporter.write_line(
            f"fuzzing: {sum(total.values())} cases, {total['step']} finished a step, {total['refused']} gave a clear error"
        )


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
