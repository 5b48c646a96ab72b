"""
Make a small model forget made-up authors, then try to get them back: six losses, plain and robust, over seeds.

    python examples/unlearning.py [--seeds 0 1 2] [--losses npo rmu …] [--robust none sam latent] [--output_dir runs/unlearning]

The authors testbed: a Llama of 1M parameters knows 80 made-up authors; 8 of them are to be forgotten, 56 are the retain set, 16
and some general knowledge are in no unlearning data. The floor is a model of the same recipe that never saw the 8 authors (the
oracle), the ceiling the model before unlearning (the original); both are attacked like all others.

UNDIAL and CE-U keep the retain set here, too (weight 1), which their papers do not; RMU trains the three `down_proj` that it
trains by default, with a coefficient that fits this model's hidden states.

Learning rates are chosen on `--tuning_seed`, which is none of the seeds of the table, from `--learning_rates`, for each loss
and robust form by itself, and shown in the table ("*": at an end of those tried, so a better one may lie outside): the one with
the greatest harmonic mean of 1 - recall of the forget set and of recall of the rest, both as shares of the original's. Nothing
under attack has a say in the choice.

Attacks: relearning (fine-tuning on half of the forgotten facts, the other half is asked, at its best step and rate), the same
training on retain rows as its control, and rounding the weights to 8 and 4 bits. Relearning trains all weights, and so does
unlearning but for RMU. Recall: the value stands in the answer. Forget quality (a p-value over 48 facts): lowest and highest of
the seeds. Membership inference: how well the rows that were to be forgotten are told from those of authors that no model has
seen (AUC of Min-K%, 0.5 is chance and best); a dash where a kept run is from before this was measured. Recovery: the share of
what was forgotten that relearning, or rounding, brings back, (after - before) / (original - before) over the questions that it
asks, as the reports compute it; the oracle's is luck. "rows": forwards and backwards through all decoder layers, in rows, the
reference model's included.

Finished runs are kept in OUTPUT_DIR/runs.jsonl and not repeated, their reports in OUTPUT_DIR/reports, the work on original and
oracle in OUTPUT_DIR/controls.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from counting import counted_rows
from seeds import cell, mean_interval

from hf_robust.metrics.unlearning import recovery
from hf_robust.report import Quantization, Relearning, Report, evaluate_unlearning
from hf_robust.sites import decoder_layers
from hf_robust.testbeds import AuthorsTestbed
from hf_robust.testbeds.facts_language import TRAINED_PHRASINGS
from hf_robust.trainers import UnlearnConfig, UnlearnTrainer

LOSSES = ("grad_diff", "npo", "simnpo", "rmu", "undial", "ce_u")
# The published settings are for models of billions of parameters and 32 layers; these are for one of 5 layers
FIELDS: dict[str, dict[str, Any]] = {
    "rmu": {"rmu_coefficient": 20.0},
    "undial": {"retain_weight": 1.0},
    "ce_u": {"retain_weight": 1.0},
}
ROBUST: dict[str, dict[str, Any]] = {
    "none": {},
    "sam": {"sam_rho": 0.01},
    "smooth": {"smooth_samples": 3, "smooth_rho": 1e-4},
    "latent": {"latent_layer": 2, "latent_epsilon": 2.0, "latent_steps": 8},
    "embedding": {"attack_epsilon": 0.5, "attack_steps": 8},
}
MODELS = ("original", "oracle")
NAMED = {"forget_quality": "quality", "model_utility": "utility", "membership_inference": "membership"}
KEPT = ("retain", "retain_holdout", "world")
COLUMNS = {
    "recall, forget": "recall", "forget quality": "quality", "membership inference": "membership", "recall, retain": "retain",
    "recall, held out": "retain_holdout", "recall, world": "world", "model utility": "utility", "relearned": "relearn",
    "recovery": "recovery", "control": "control",
    "8 bits": "8 bits", "recovery, 8 bits": "recovery, 8 bits", "4 bits": "4 bits", "recovery, 4 bits": "recovery, 4 bits",
}  # fmt: skip


def questions(testbed: AuthorsTestbed, split: str, count: int | None, *phrasings: int) -> list[dict[str, Any]]:
    """Rows of a split; the judge looks for the value, and phrasings of one fact stay together when some are relearned."""
    found = []
    for phrasing in phrasings or (0,):
        for question in testbed.questions(split, phrasing, count):
            row = question.row()
            row |= {"id": f"{row['group']} {phrasing}", "answer": row["value"], "category": f"phrasing {phrasing}"}
            row["trained"] = phrasing < TRAINED_PHRASINGS
            found.append(row)
    return found


def attacks(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The attacks on every model."""
    relearning = {
        "steps": options.relearning_steps, "learning_rates": options.relearning_rates, "batch_size": 8, "seed": seed,
    }  # fmt: skip
    return {
        "relearn": Relearning(**relearning),
        "control": Relearning(**relearning, source="retain"),
        "8 bits": Quantization(bits=8, method="round_to_nearest"),
        "4 bits": Quantization(bits=4, method="round_to_nearest"),
    }


def unlearn(testbed: AuthorsTestbed, settings: dict[str, Any], folder: Path) -> tuple[Any, dict[str, Any]]:
    """The original without the forget set, and what that cost."""
    args = UnlearnConfig(
        output_dir=str(folder / "checkpoints"), loss_type=settings["loss"], robust=settings["robust"],
        max_steps=settings["steps"], learning_rate=settings["learning_rate"], lr_scheduler_type="cosine", warmup_steps=0.1,
        per_device_train_batch_size=settings["batch_size"], weight_decay=0.0, max_length=64, save_strategy="no",
        report_to="none", logging_steps=1000, use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
        seed=settings["seed"], **settings["fields"],
    )  # fmt: skip
    columns = ["prompt", "completion"]
    trainer = UnlearnTrainer(
        testbed.load_model(),
        args,
        forget_dataset=testbed.forget_dataset().select_columns(columns),
        retain_dataset=testbed.retain_dataset().select_columns(columns),
        processing_class=testbed.tokenizer,
    )
    model = trainer.model
    frozen = getattr(trainer.reference, "copy", None)
    start = time.perf_counter()
    # Modules that all see the same rows are counted together; the reference is run by some losses only
    with (
        counted_rows(decoder_layers(model)) as rows,
        counted_rows([] if frozen is None else decoder_layers(frozen)) as before,
    ):
        trainer.train()
    seconds = time.perf_counter() - start
    forward = round(rows["forward"] + before["forward"])
    return model.eval(), {"seconds": round(seconds, 1), "forward": forward, "backward": round(rows["backward"])}


def score(recalls: dict[str, float], original: dict[str, float]) -> float:
    """What a learning rate is chosen by: forgetting and keeping, as shares of the original's recall; nothing under attack."""
    forget = max(recalls[exam] for exam in ("forget", "forget_paraphrased"))
    kept = [min(1.0, recalls[exam] / original[exam]) for exam in KEPT]
    parts = [max(0.0, 1 - forget / original["forget"]), sum(kept) / len(kept)]
    return 0.0 if min(parts) == 0 else 2 / sum(1 / part for part in parts)


def figures_of(report: Report, subject: str) -> dict[str, float]:
    """The table's figures of one of a report's models, and the curves of relearning."""
    found: dict[str, float] = {}
    for m in report.measurements:
        if m.subject != subject:
            continue
        if m.metric == "pre_attack_success_rate" and m.split == "all":
            found["recall"] = m.value
        elif m.metric == "attack_success_rate" and m.split == "all":
            found[m.attack] = m.value
        elif m.metric == "utility" and m.attack == "none":
            found[m.split] = m.value
        elif m.metric in NAMED:
            found[NAMED[m.metric]] = m.value
        elif m.metric in ("relearned", "relearned_utility"):
            found[f"{m.metric}, {m.attack}, {m.split}"] = m.value
    return found


def with_recovery(figures: dict[str, float], original: dict[str, float]) -> dict[str, float | None]:
    """
    A model's figures with `recovery` under relearning, whose curves begin with what is known of the questions it asks, and
    under rounding, which asks all.
    """
    start = next((key for key in figures if key.startswith("relearned, relearn, ") and key.endswith(", step 0")), "")
    found: dict[str, float | None] = {}
    for name, before, after in (
        ("recovery", start, "relearn"), ("recovery, 8 bits", "recall", "8 bits"), ("recovery, 4 bits", "recall", "4 bits")
    ):  # fmt: skip
        known = before in original and before in figures and after in figures
        found[name] = recovery(figures[before], figures[after], original[before]) if known else None
    return {**figures, **found}


def measure(
    testbed: AuthorsTestbed, model: Any, options: argparse.Namespace, seed: int, folder: Path, controls: Path
) -> dict[str, dict[str, float]]:
    """Figures of a model, of the original and of the oracle, all attacked; the latter two once for all models of a seed."""
    count = options.questions
    report = evaluate_unlearning(
        model,
        tokenizer=testbed.tokenizer,
        forget=questions(testbed, "forget", count, 0, 4),
        retain=questions(testbed, "retain", count or 96),
        utility={name: questions(testbed, name, count) for name in ("retain_holdout", "world")},
        holdout=questions(testbed, "unseen", count),
        attacks=attacks(options, seed),
        original=testbed.load_model("original"),
        oracle=testbed.load_model("oracle"),
        max_new_tokens=16,
        batch_size=128,
        output_dir=folder,
        controls_dir=controls,
        overwrite=True,
        progress=False,
    )
    return {subject: figures_of(report, subject) for subject in ("model", *MODELS)}


def tune(beds: "Beds", settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What a model still knows, not attacked: the original where there is no loss, else one unlearned with these settings."""
    testbed, cost = beds[settings["seed"]], dict[str, Any]()
    if "loss" in settings:
        model, cost = unlearn(testbed, settings, options.output_dir)
    else:
        model = testbed.load_model()
    return {"recalls": testbed.recall(model, count=options.questions or 96), "cost": cost}


class Beds(dict[int, AuthorsTestbed]):
    """The world of each seed, one at a time."""

    def __missing__(self, seed: int) -> AuthorsTestbed:
        self.clear()
        self[seed] = AuthorsTestbed(seed, progress=False)
        return self[seed]


class Runs:
    """Finished runs by all of their settings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = (
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        )

    def get(self, settings: dict[str, Any], make: Any) -> dict[str, Any]:
        """The run with these settings, made if there is none."""
        settings = json.loads(json.dumps(settings))
        row = next((row for row in self.rows if row["settings"] == settings), None)
        if row is None:
            row = {"settings": settings, **make()}
            self.rows.append(row)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps({key: settings[key] for key in ("task", "seed", "model")}), flush=True)
        return row


def digest(settings: dict[str, Any]) -> str:
    """A short name for settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def extremes(values: list[float | None]) -> str:
    """Lowest and highest, of what has no meaningful mean; a dash where one is missing."""
    known = [value for value in values if value is not None]
    ends = list(dict.fromkeys(f"{end:.2g}" for end in (min(known), max(known)))) if len(known) == len(values) else ["–"]
    return " … ".join(ends)


def table(groups: dict[str, list[dict[str, Any]]], chosen: dict[str, str]) -> str:
    """Mean ± half a 95 % interval over seeds, as Markdown; `chosen`: learning rates by model."""
    head = ["model", "seeds", "learning rate", *COLUMNS, "rows forward", "rows backward", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, rows in groups.items():
        listed = {key: [row["figures"].get(key) for row in rows] for key in COLUMNS.values()}
        cells = [extremes(values) if key == "quality" else cell(values, "z.2f") for key, values in listed.items()]
        spent = [cell([row["cost"].get(key) for row in rows], ".0f") for key in ("forward", "backward", "seconds")]
        lines.append("| " + " | ".join([name, str(len(rows)), chosen.get(name, "–"), *cells, *spent]) + " |")
    return "\n".join(lines)


def plot(groups: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Recall of the forget set by model, before and under each attack, between floor and ceiling; the rest below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in groups if name not in MODELS]
    panels = {
        "forget set": {"no attack": "recall", "relearned": "relearn", "control": "control", "4 bits": "4 bits"},
        "the rest": {"retain": "retain", "held out": "retain_holdout", "world": "world"},
    }
    figure = Figure(figsize=(2.5 + 0.55 * len(names), 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, keys) in zip(figure.subplots(2, 1, sharex=True), panels.items(), strict=True):
        for number, (label, key) in enumerate(keys.items()):
            means = [mean_interval([row["figures"][key] for row in groups[name]]) for name in names]
            places = [place + 0.18 * (number - (len(keys) - 1) / 2) for place in range(len(names))]
            halves = [0 if half != half else half for _, half in means]
            axis.errorbar(
                places, [mean for mean, _ in means], halves, fmt="os^D"[number], ms=4, color=f"C{number}", capsize=2, lw=1,
                label=label, clip_on=False,
            )  # fmt: skip
            for model, style in zip(MODELS, ("--", ":"), strict=True):
                values = [row["figures"][key] for row in groups.get(model, [])]
                if values:
                    axis.axhline(sum(values) / len(values), color=f"C{number}", ls=style, lw=0.8, alpha=0.7)
        axis.set_ylim(-0.02, 1.05)
        axis.set_ylabel(f"recall, {title}", fontsize=8)
        axis.grid(alpha=0.3, axis="y")
        axis.legend(fontsize=7, ncols=len(keys), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    figure.suptitle("mean over seeds, 95 % interval; dashed: original (ceiling), dotted: oracle (floor)", fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run what is missing, then print the table and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=LOSSES)
    parser.add_argument("--robust", nargs="+", default=["none", "sam", "latent"], choices=list(ROBUST))
    parser.add_argument("--steps", type=int, default=72, help="optimizer steps of unlearning")
    parser.add_argument("--batch_size", type=int, default=16, help="forget rows, and as many retain rows, per step")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[3e-5, 1e-4, 3e-4, 1e-3])
    parser.add_argument("--tuning_seed", type=int, default=100)
    parser.add_argument("--relearning_steps", type=int, nargs="+", default=[2, 5, 20, 50])
    parser.add_argument("--relearning_rates", type=float, nargs="+", default=[1e-4, 5e-4])
    parser.add_argument("--questions", type=int, help="per list, for a quick try; default: all (96 of the retain set)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/unlearning"))
    options = parser.parse_args()
    if options.tuning_seed in options.seeds:
        parser.error(f"--tuning_seed {options.tuning_seed} is one of --seeds: choose learning rates on another seed")
    torch.set_num_threads(options.threads)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    runs, beds = Runs(options.output_dir / "runs.jsonl"), Beds()

    def settings_of(task: str, seed: int, model: str, **more: Any) -> dict[str, Any]:
        recipe = beds[seed].recipe.key()
        return {"task": task, "seed": seed, "model": model, "recipe": recipe, "questions": options.questions, **more}

    evaluation = {"relearning_steps": options.relearning_steps, "relearning_rates": options.relearning_rates}
    settings = settings_of("tuning", options.tuning_seed, "original")
    original = runs.get(settings, lambda: tune(beds, settings, options))["recalls"]
    chosen: dict[str, dict[str, Any]] = {}
    for loss in options.losses:
        for robust in options.robust:
            name = loss if robust == "none" else f"{loss}, {robust}"
            own = {
                "loss": loss, "robust": robust, "steps": options.steps, "batch_size": options.batch_size,
                "fields": {"activation_layer": 2, **FIELDS.get(loss, {}), **ROBUST[robust]},
            }  # fmt: skip
            scores = {}
            for rate in options.learning_rates:
                tried = settings_of("tuning", options.tuning_seed, name, **own, learning_rate=rate)
                found = runs.get(tried, lambda tried=tried: tune(beds, tried, options))
                scores[rate] = score(found["recalls"], original)
            chosen[name] = {**own, "learning_rate": max(scores, key=lambda rate: scores[rate])}

    groups: dict[str, list[dict[str, Any]]] = {name: [] for name in (*MODELS, *chosen)}
    for seed in options.seeds:
        shared = settings_of("controls", seed, "both", unseen=True, **evaluation)
        controls = options.output_dir / "controls" / f"{seed}-{digest(shared)}"
        both: dict[str, dict[str, float | None]] = {model: {} for model in MODELS}
        for name, own in chosen.items():
            settings = settings_of("table", seed, name, **evaluation, **own)
            folder = options.output_dir / "reports" / f"{name.replace(', ', '-')}-{seed}-{digest(settings)}"

            def make(seed=seed, settings=settings, folder=folder, controls=controls) -> dict[str, Any]:
                model, cost = unlearn(beds[seed], settings, options.output_dir)
                return {"figures": measure(beds[seed], model, options, seed, folder, controls), "cost": cost}

            found = runs.get(settings, make)
            ceiling = found["figures"]["original"]
            figures = {subject: with_recovery(values, ceiling) for subject, values in found["figures"].items()}
            groups[name].append({"figures": figures["model"], "cost": found["cost"]})
            for model in MODELS:  # the same in all runs of a seed, which older ones have less of
                both[model] |= figures[model]
        for model in MODELS:
            groups[model].append({"figures": both[model], "cost": {}})
    ends = (min(options.learning_rates), max(options.learning_rates))
    rates = {name: own["learning_rate"] for name, own in chosen.items()}
    text = table(groups, {name: f"{rate:g}{'*' * (rate in ends)}" for name, rate in rates.items()})
    (options.output_dir / "table.md").write_text(text + "\n", encoding="utf-8")
    plot(groups, options.output_dir / "unlearning.png")
    print(text)


if __name__ == "__main__":
    main()
