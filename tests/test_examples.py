"""The examples' scripts: their shared counting, and (slow) each of them in a small form, run and gone on with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parent.parent / "examples"

# Options of a small form, and files that it writes
SMALL = {
    "adversarial_training": (
        ["--methods", "standard", "Fast AT", "TRADES", "--steps", "10", "--count", "16", "--attack_steps", "3"],
        ["table_cnn.md", "adversarial_training_cnn.png"],
    ),
    "robust_clip": (["--steps", "3", "--count", "8", "--attack_steps", "3"], ["table.md", "robust_clip.png"]),
    "text_classification": (
        ["--methods", "plain", "FreeLB", "SMART", "--pretrain_steps", "10", "--steps", "5", "--count", "16"],
        ["table.md", "text_classification.png"],
    ),
    "hallucination": (
        ["--methods", "SFT", "NoiseFiT v1", "--compare", "equal steps", "--steps", "5", "--questions", "8"],
        ["hallucination_facts.png"],
    ),
    "frontier": (["--recipes", "before", "oracle", "--behaviors", "2"], ["frontier.png"]),
}


def test_rows_are_counted_forward_and_backward(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from counting import counted_rows

    layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    model = nn.Sequential(*layers)
    for modules in ([model], list(layers)):
        with counted_rows(modules) as rows:
            model(torch.ones(5, 3)).sum().backward()
            with torch.no_grad():
                model(torch.ones(2, 3))
        model(torch.ones(7, 3))
        assert rows == {"forward": 7.0, "backward": 5.0}


def test_what_the_unlearning_example_chooses_and_shows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import unlearning

    original = {"forget": 0.8, "forget_paraphrased": 0.8, "retain": 1.0, "retain_holdout": 0.5, "world": 1.0}
    recalls = {"forget": 0.2, "forget_paraphrased": 0.4, "retain": 0.5, "retain_holdout": 0.6, "world": 0.75}
    # Half is forgotten, and (0.5 + 1 + 0.75) / 3 kept
    assert unlearning.score(recalls, original) == pytest.approx(2 / (1 / 0.5 + 1 / 0.75))
    assert unlearning.score(original, original) == 0.0
    assert unlearning.extremes([0.5, 0.001, 0.2]) == "0.001 … 0.5"
    assert unlearning.extremes([1.0, 1.0]) == "1" and unlearning.extremes([None, 1.0]) == "–"
    # Of what was forgotten: all questions under rounding, and the half that relearning asks
    start = "relearned, relearn, lr 0.1, step 0"
    found = unlearning.with_recovery(
        {"recall": 0.2, "8 bits": 0.5, "4 bits": 0.2, start: 0.5, "relearn": 0.75}, {"recall": 0.8, start: 1.0}
    )
    assert {name: found[name] for name in found if name.startswith("recovery")} == {
        "recovery": 0.5, "recovery, 8 bits": pytest.approx(0.5), "recovery, 4 bits": 0.0,
    }  # fmt: skip
    figures = dict.fromkeys(unlearning.COLUMNS.values(), 0.5)
    row = {"figures": figures, "cost": {"forward": 10, "backward": 5, "seconds": 2.0}}
    lines = unlearning.table({"oracle": [{**row, "cost": {}}] * 2, "npo": [row] * 2}, {"npo": "0.0001*"}).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    # A run that was kept from before membership inference was measured
    old = {**row, "figures": {key: value for key, value in figures.items() if key != "membership"}}
    shown = unlearning.table({"npo": [row, old]}, {}).splitlines()
    assert "| 0.50 ± 0.00 | 0.5 | – | 0.50 ± 0.00 |" in shown[2] and shown[0].split("|")[6] == " membership inference "
    assert "| oracle | 2 | – | 0.50 ± 0.00 | 0.5 |" in lines[2] and lines[2].endswith("| – | – | – |")
    assert "| npo | 2 | 0.0001* |" in lines[3] and lines[3].endswith("| 10 ± 0 | 5 ± 0 | 2 ± 0 |")


def run(name: str, folder: Path, arguments: list[str]) -> str:
    """What a script prints."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments, "--threads", "1", "--output_dir", str(folder)]
    # The folder above `hf_robust`, where the package is not installed
    paths = os.pathsep.join([str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env={**os.environ, "PYTHONPATH": paths}
    )
    assert found.returncode == 0, found.stderr[-4000:]
    return found.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SMALL)
def test_a_comparison_runs_and_goes_on_from_what_is_there(name: str, tmp_path: Path):
    arguments, files = SMALL[name]
    first = run(name, tmp_path, [*arguments, "--seeds", "0", "1"])
    assert all((tmp_path / file).is_file() for file in files)
    record = (tmp_path / "runs.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in record.splitlines()]
    assert {row["seed"] for row in rows} == {0, 1}
    again = run(name, tmp_path, [*arguments, "--seeds", "0", "1"])
    assert (tmp_path / "runs.jsonl").read_text(encoding="utf-8") == record
    # The same table, of the same rows
    table = [line for line in first.splitlines() if line.startswith("|")]
    assert table and table == [line for line in again.splitlines() if line.startswith("|")]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_erasing_runs(tmp_path: Path):
    shown = run("erasing", tmp_path, ["--steps", "5", "--count", "2"])
    assert "judge:" in shown and (tmp_path / "table.md").is_file() and (tmp_path / "erasing.png").is_file()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_unlearning_runs_and_goes_on_from_what_is_there(tmp_path: Path):
    arguments = [
        "--losses", "npo", "rmu", "--robust", "none", "--learning_rates", "1e-4", "3e-4", "--steps", "3", "--questions", "4",
        "--relearning_steps", "1", "--relearning_rates", "1e-4", "--seeds", "0",
    ]  # fmt: skip
    first = run("unlearning", tmp_path, arguments)
    record = (tmp_path / "runs.jsonl").read_text(encoding="utf-8")
    # The original and 2 losses × 2 rates on the tuning seed, 2 losses in the table
    assert len(record.splitlines()) == 7 and (tmp_path / "unlearning.png").is_file()
    table = [line for line in first.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["original", "oracle", "npo", "rmu"]
    again = run("unlearning", tmp_path, arguments)
    assert (tmp_path / "runs.jsonl").read_text(encoding="utf-8") == record
    assert table == [line for line in again.splitlines() if line.startswith("|")]
