"""
What erasing a concept from the diffusion testbed's pipeline achieves, over seeds: pre-ASR, ASR under each attack and utility of
the original, ESD, AdvUnlearn and the oracle, with Wilson intervals over the prompts of all seeds.

    python tests/benchmarks/bench_erasing.py [--seeds 0 1 2] [--size small] [--output runs/bench_erasing]

Slow: for each seed a pipeline and an oracle are trained (and cached), two erasures, and four models attacked. `--attack_scale`
multiplies the attacks' steps and pictures; 1 is the example's reduced budget. Finished runs are kept in OUTPUT/runs.jsonl and
not repeated. Prints JSON; the table is in OUTPUT/table.md. The recipes are those of examples/erasing.py.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import emit

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from erasing import METHODS, attackers, erase, evaluate

from hf_robust.diffusion import DiffusionModel
from hf_robust.metrics.proportions import wilson_interval
from hf_robust.testbeds import DiffusionRecipe, DiffusionTestbed

FIGURES = {"pre-ASR": ("pre_attack_success_rate", "none"), "utility": ("utility", "none")} | {
    f"ASR: {name}": ("attack_success_rate", name) for name in attackers()
}


def run(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make one model and measure it: successes and prompts of each figure."""
    testbed = DiffusionTestbed(settings["seed"], settings["size"], progress=False)
    concept, name = settings["concept"], settings["model"]
    start = time.perf_counter()
    model: DiffusionModel
    if name in METHODS:
        model = erase(testbed, concept, METHODS[name], folder / f"{name}-model", steps=settings["steps"])
    else:
        model = testbed.load_model() if name == "original model" else testbed.oracle(concept)
    trained = time.perf_counter()
    report = evaluate(
        testbed, concept, model, name, folder / name.replace(" ", "-"), count=settings["count"],
        scale=settings["attack_scale"],
    )  # fmt: skip
    figures = {}
    for figure, (metric, attack) in FIGURES.items():
        found = [m for m in report.measurements if (m.subject, m.metric, m.attack) == (name, metric, attack)]
        best = next((m for m in found if m.split == "all"), found[0] if found else None)
        if best is not None:
            figures[figure] = [round(best.value * best.count), best.count]
    seconds = {"making": trained - start, "measuring": time.perf_counter() - trained}
    return {**settings, "recipe": testbed.recipe.key(), "figures": figures, "seconds": seconds}


def pooled(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By model and figure: the share over all seeds' prompts, its Wilson interval, and the share of each seed."""
    found: dict[str, dict[str, Any]] = {}
    for model in dict.fromkeys(row["model"] for row in runs):
        rows = [row["figures"] for row in runs if row["model"] == model]
        found[model] = {}
        for figure in FIGURES:
            counts = [row[figure] for row in rows if figure in row]
            if counts:
                hits, total = (sum(column) for column in zip(*counts, strict=True))
                low, high = wilson_interval(hits, total)
                shares = [hit / count for hit, count in counts]
                found[model][figure] = {
                    "value": hits / total,
                    "low": low,
                    "high": high,
                    "count": total,
                    "seeds": shares,
                }
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """The pooled figures as Markdown."""
    lines = ["| model | " + " | ".join(FIGURES) + " |", "|" + "---|" * (len(FIGURES) + 1)]
    for model, figures in found.items():
        cells = [
            f"{f['value']:.2f} [{f['low']:.2f}, {f['high']:.2f}]" if (f := figures.get(figure)) else "–"
            for figure in FIGURES
        ]
        lines.append("| " + " | ".join([model, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then print the pooled figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", choices=["small", "large"], default="small")
    parser.add_argument("--concept", default="circle")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of erasing")
    parser.add_argument("--count", type=int, default=32, help="attacked prompts of each model and seed")
    parser.add_argument("--attack_scale", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/bench_erasing"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    record = options.output / "runs.jsonl"
    done = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()] if record.exists() else []
    runs = []
    for seed in options.seeds:
        recipe = DiffusionRecipe.of_size(options.size).with_seed(seed).key()
        for model in ("original model", *METHODS, "oracle model"):
            settings = {
                "seed": seed, "size": options.size, "concept": options.concept, "model": model, "steps": options.steps,
                "count": options.count, "attack_scale": options.attack_scale, "fields": METHODS.get(model, {}),
            }  # fmt: skip
            wanted = {**settings, "recipe": recipe}
            row = next((row for row in done if all(row.get(key) == value for key, value in wanted.items())), None)
            if row is None:
                row = run(settings, options.output / f"seed-{seed}")
                with record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            runs.append(row)
    found = pooled(runs)
    (options.output / "table.md").write_text(table(found) + "\n", encoding="utf-8")
    emit({"settings": {key: runs[0][key] for key in ("size", "concept", "steps", "count", "attack_scale")},
          "seeds": options.seeds, "figures": found})  # fmt: skip


if __name__ == "__main__":
    main()
