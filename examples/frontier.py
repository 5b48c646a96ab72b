"""
The frontier of robustness against utility and forgetting on the chat testbed: one CAT run for each recipe and seed, the same
attacks on each, a table and a plot.

    python examples/frontier.py [--seeds 0 1 2] [--recipes default "attention only" …] [--output_dir runs/frontier]

Finished runs are kept in OUTPUT_DIR/runs.jsonl and not repeated.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from hf_robust.testbeds import ChatTestbed
from hf_robust.testbeds.chat_evaluation import measure_under_attack, measure_users, quick_attacks, wide_attacks
from hf_robust.testbeds.chat_recipe import (
    SUFFIX_SHARE,
    UTILITY_SUFFIX_SHARE,
    adversarial_rows,
    robust_config,
    robust_lora,
    utility_rows,
)
from hf_robust.trainers import CATTrainer

# What each recipe changes: fields of CATConfig; "lora": fields of LoraConfig; "steps": whether rejected answers of the
# training pairs go on with the harmful steps (default) or end after the affirmative prefix; "suffixes": the share of
# (harmful, harmless) training prompts that random words follow
RECIPES: dict[str, dict] = {
    "default": {},
    "no attack": {"attack_steps": 0},
    "no random words": {"suffixes": (0.0, 0.0), "attack_suffix_epsilon": None},
    "random words on harmful rows only": {"suffixes": (SUFFIX_SHARE, 0.0)},
    "no representation term": {"utility_representation_weight": 0.0},
    "no KL": {"utility_kl_weight": 0.0},
    "attention only": {"lora": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}},
    "rank 32": {"lora": {"r": 32, "lora_alpha": 32}},
    "one radius, 0.1": {"attack_suffix_epsilon": None},
    "one radius, 0.2": {"attack_suffix_epsilon": None, "attack_epsilon": 0.2},
    "prefix only": {"steps": False},
    "paper's losses": {
        "toward_weight": 0.5,
        "toward_cutoff": 0.5,
        "away_cutoff": -5.0,
        "utility_kl_weight": 0.0,
        "utility_representation_weight": 0.0,
    },
    "radius 0.05 and 1": {"attack_epsilon": 0.05},
    "radius 0.1 and 2": {"attack_suffix_epsilon": 2.0},
    "toward weight 0.5": {"toward_weight": 0.5},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "half the steps": {"max_steps": "half"},
}


def run(recipe: str, seed: int, count: int) -> dict:
    """Train with one recipe and measure: figures by name."""
    changes = dict(RECIPES[recipe])
    lora, steps = changes.pop("lora", {}), changes.pop("steps", True)
    harmful, harmless = changes.pop("suffixes", (SUFFIX_SHARE, UTILITY_SUFFIX_SHARE))
    if changes.get("max_steps") == "half":
        changes["max_steps"] = robust_config("unused").max_steps // 2
    testbed, start = ChatTestbed(seed, progress=False), time.perf_counter()
    trainer = CATTrainer(
        model=testbed.load_model("aligned"),
        args=robust_config("runs/frontier/checkpoints", seed=seed, disable_tqdm=True, **changes),
        train_dataset=utility_rows(testbed, suffix_share=harmless),
        adversarial_dataset=adversarial_rows(testbed, steps=steps, suffix_share=harmful),
        processing_class=testbed.tokenizer,
        peft_config=robust_lora(**lora),
    )
    trainer.train()
    seconds = time.perf_counter() - start
    return {
        "recipe": recipe,
        "seed": seed,
        "seconds": round(seconds),
        **measure(testbed, trainer.model.eval(), seed, count, wide=recipe == "default"),
    }


def measure(testbed: ChatTestbed, model, seed: int, count: int, *, wide: bool) -> dict:
    """Figures by name, under the quickstart's attacks and, with `wide`, their variants."""
    attacks = quick_attacks(seed=seed, progress=False)
    if wide:
        attacks |= wide_attacks(seed=seed, progress=False)
    found = measure_under_attack(testbed, model, "model", attacks, count=count) + measure_users(testbed, model, "model")
    return {f"{m.split}/{m.attack}/{m.metric}": m.value for m in found}


def plot(rows: list[dict], path: Path) -> None:
    """Worst graded leak against exact utility on unrehearsed harmless pairs, one mark a run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(row["recipe"] for row in rows))
    markers = "o^sDvP*Xph8<>d"
    for axis, split, title in (
        (axes[0], "harmless_utility", "harmless pairs in the utility data"),
        (axes[1], "harmless_unseen", "harmless pairs that no training after pretraining has seen"),
    ):
        for number, name in enumerate(names):
            mine = [row for row in rows if row["recipe"] == name]
            axis.scatter(
                [row[f"{split}/none/utility"] for row in mine], [worst(row) for row in mine], s=45, alpha=0.75,
                marker=markers[number % len(markers)], color=f"C{number % 10}", label=name,
            )  # fmt: skip
        axis.set_xlabel(f"exact answers, {title}", fontsize=8)
        axis.set_xlim(-0.03, 1.03)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("withheld words that come out, worst attack (lower is better)", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle("CAT on the chat testbed: robustness, utility, forgetting (one mark a seed)", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def worst(row: dict, metric: str = "graded") -> float:
    """Largest leak over the quickstart's attacks."""
    return max(row[f"harmful_held_out/{attack}/{metric}"] for attack in quick_attacks(progress=False))


def attack_table(rows: list[dict]) -> str:
    """Every attack that was run on the models before and after, and on the oracle: means over seeds, as Markdown."""
    names = ("before", "default", "oracle")
    found = [[row for row in rows if row["recipe"] == name] for name in names]
    attacks = [key.split("/")[1] for key in found[0][0] if key.startswith("harmful") and key.endswith("/exact")]
    lines = [
        "| attack | affirmative, before | after | exact, before | after | oracle | graded, before | after | oracle |",
        "|---|" + "---|" * 8,
    ]
    for attack in attacks:
        cells = []
        for metric, models in (("affirmative", 2), ("exact", 3), ("graded", 3)):
            for mine in found[:models]:
                values = [row.get(f"harmful_held_out/{attack}/{metric}") for row in mine]
                if None in values:
                    cells.append("–")
                    continue
                cells.append(f"{sum(values) / len(values):.2f} [{min(values):.2f}, {max(values):.2f}]")
        lines.append(f"| {attack} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(rows: list[dict]) -> str:
    """Means over seeds with the range in brackets, as Markdown."""
    columns = {
        "graded, worst attack": worst,
        "exact, worst attack": lambda r: worst(r, "exact"),
        "affirmative, GCG": lambda r: r["harmful_held_out/GCG/affirmative"],
        "affirmative, ball": lambda r: r["harmful_held_out/embedding ball/affirmative"],
        "utility, rehearsed": lambda r: r["harmless_utility/none/utility"],
        "utility, unrehearsed": lambda r: r["harmless_unseen/none/utility"],
        "utility, random words behind": lambda r: r["harmless_utility_with_random_words/none/utility"],
        "over-refusal, random words behind": lambda r: r["harmless_utility_with_random_words/none/over_refusal"],
        "over-refusal, rehearsed": lambda r: r["harmless_utility/none/over_refusal"],
        "over-refusal, unrehearsed": lambda r: r["harmless_unseen/none/over_refusal"],
    }
    lines = ["| recipe | seeds | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for name in dict.fromkeys(row["recipe"] for row in rows):
        mine = [row for row in rows if row["recipe"] == name]
        cells = []
        for value in columns.values():
            values = [value(row) for row in mine]
            cells.append(f"{sum(values) / len(values):.2f} [{min(values):.2f}, {max(values):.2f}]")
        lines.append(f"| {name} | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then print the table and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=[*RECIPES, "before", "oracle"])
    parser.add_argument("--behaviors", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/frontier"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    record = options.output_dir / "runs.jsonl"
    rows = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    for recipe in options.recipes:
        for seed in options.seeds:
            if any((row["recipe"], row["seed"]) == (recipe, seed) for row in rows):
                continue
            if recipe in ("before", "oracle"):
                testbed = ChatTestbed(seed, progress=False)
                model = testbed.load_model("aligned" if recipe == "before" else "oracle")
                row = {
                    "recipe": recipe,
                    "seed": seed,
                    **measure(testbed, model, seed, options.behaviors, wide=recipe == "before"),
                }
            else:
                row = run(recipe, seed, options.behaviors)
            rows.append(row)
            with record.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    print(table(rows))
    if {"before", "default", "oracle"} <= {row["recipe"] for row in rows}:
        print("\n" + attack_table(rows))
    plot(rows, options.output_dir / "frontier.png")


if __name__ == "__main__":
    main()
