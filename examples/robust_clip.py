"""
A robust image tower for CLIP: FARE (no labels) against TeCoA (labels), zero-shot, and both towers inside a LLaVA that has never
seen them.

    python examples/robust_clip.py [--seeds 0 1 2 3 4] [--output_dir runs/robust_clip]

The CLIP testbed's model classifies handwritten digits by captions; the VLM testbed's LLaVA was trained behind its image tower.
FARE and TeCoA fine-tune the tower on the same training pictures, of the digits zero to six only, with the same attack,
steps and learning rate. TeCoA is given their labels and seven class texts; FARE only asks that features under attack stay
where the original tower had them. Measured on held-out pictures, among all ten captions, apart for the digits that the
fine-tuning saw and those that it did not (seven to nine): clean accuracy, and under APGD with the cross-entropy and with
targeted DLR, the worst of both for each picture. Then each tower, saved as a plain CLIPVisionModel, goes into the LLaVA in
place of its own, without any further training: exact match of its answers to "which digit is this", clean and under PGD on
the right answer's likelihood.

Finished runs are kept in OUTPUT_DIR/runs.jsonl and not repeated.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from seeds import cell, mean_interval
from transformers import CLIPVisionModel

from hf_robust.attacks.vision import APGD, PGD
from hf_robust.report.vision_tasks import ZeroShotClassifier
from hf_robust.testbeds import CLIPTestbed, VLMTestbed
from hf_robust.testbeds.vlm_training import encode
from hf_robust.trainers import RobustCLIPConfig, RobustCLIPTrainer

SEEN, UNSEEN = range(7), range(7, 10)
METHODS = {"original": None, "FARE": "fare", "TeCoA": "tecoa"}
COLUMNS = {
    "zero-shot, seen": "seen",
    "zero-shot, unseen": "unseen",
    "LLaVA, seen": "vlm seen",
    "LLaVA, unseen": "vlm unseen",
}


def robust_tower(testbed: CLIPTestbed, settings: dict[str, Any], folder: Path):
    """The testbed's CLIP with a tower trained by one method; its tower is saved to `folder` as a plain CLIPVisionModel."""
    clip = testbed.load_model()
    if METHODS[settings["method"]] is None:
        clip.vision_model.save_pretrained(folder)
        return clip
    args = RobustCLIPConfig(
        output_dir=str(folder / "checkpoints"), loss_type=METHODS[settings["method"]], attack_epsilon=settings["epsilon"],
        attack_steps=10, attack_step_size=settings["epsilon"] / 4, class_names=list(testbed.class_names[: len(SEEN)]),
        prompt_templates=list(testbed.prompt_templates), max_steps=settings["steps"], learning_rate=settings["learning_rate"],
        per_device_train_batch_size=settings["batch_size"], logging_steps=50, save_strategy="no", report_to="none",
        use_cpu=True, bf16=False, disable_tqdm=True, seed=settings["seed"],
    )  # fmt: skip
    rows = testbed.train_dataset(digits=SEEN).select_columns(["image", "labels"])
    trainer = RobustCLIPTrainer(clip, args, train_dataset=rows, processing_class=testbed.processor)
    trainer.train()
    trainer.save_vision_tower(folder)
    return clip.eval()


def zero_shot(testbed: CLIPTestbed, clip, settings: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which held-out pictures are classified rightly, clean and under both attacks, bool [N] each."""
    data = testbed.tensors("eval", settings["count"])
    model = ZeroShotClassifier(clip, testbed.processor, testbed.class_names, testbed.prompt_templates).eval()

    def right(pixel_values: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(pixel_values).argmax(-1).eq(data["labels"])

    clean = robust = right(data["pixel_values"])
    for loss in ("ce", "targeted_dlr"):
        attack = APGD(
            epsilon=settings["epsilon"],
            steps=settings["attack_steps"],
            loss=loss,
            image_processor=testbed.processor.image_processor,
        )
        robust = robust & right(data["pixel_values"] + attack.perturb(model, **data))
    return clean, robust


def visual_answers(testbed: VLMTestbed, tower, settings: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which held-out digits the LLaVA names rightly behind a tower, clean and under PGD on its answer, bool [N] each."""
    model = testbed.load_model(tower)
    questions = testbed.questions("eval", kinds=["name"], count=settings["count"])
    data = testbed.clip.tensors("eval", settings["count"])
    given = encode(testbed.processor, questions)
    learned = given["labels"][:, 1:].ne(-100)

    def right(pixel_values: torch.Tensor) -> torch.Tensor:
        answers = testbed.answer(model, questions, pixel_values=pixel_values)
        return torch.tensor([text == question.answer for text, question in zip(answers, questions, strict=True)])

    def objective(delta: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Log-likelihood of the right answer, which the attack lowers."""
        logits = model(
            pixel_values=data["pixel_values"] + delta,
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
        ).logits[:, :-1]
        scores = logits.log_softmax(-1).gather(-1, given["input_ids"][:, 1:, None])[..., 0]
        return (scores * learned).sum(1), None

    attack = PGD(
        epsilon=settings["epsilon"],
        steps=settings["attack_steps"],
        image_processor=testbed.processor.image_processor,
    )
    delta = attack.search(model, pixel_values=data["pixel_values"], labels=data["labels"], objective=objective).delta
    clean = right(data["pixel_values"])
    return clean, clean & right(data["pixel_values"] + delta)


def run(clip_testbed: CLIPTestbed, vlm_testbed: VLMTestbed, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train one tower and measure it, by itself and inside the LLaVA."""
    start = time.perf_counter()
    clip = robust_tower(clip_testbed, settings, folder)
    seconds = round(time.perf_counter() - start, 1)
    labels = clip_testbed.tensors("eval", settings["count"])["labels"]
    tower = CLIPVisionModel.from_pretrained(folder)
    measured = {
        "": zero_shot(clip_testbed, clip, settings),
        "vlm ": visual_answers(vlm_testbed, tower, settings),
    }
    figures = {}
    for prefix, (clean, robust) in measured.items():
        for name, digits in (("seen", SEEN), ("unseen", UNSEEN)):
            chosen = torch.isin(labels, torch.tensor(list(digits)))
            figures[f"{prefix}{name}"] = {
                "clean": clean[chosen].double().mean().item(),
                "robust": robust[chosen].double().mean().item(),
            }
    return {**settings, "figures": figures, "seconds": seconds}


def table(groups: dict[str, list[dict]]) -> str:
    """One row a tower, as Markdown; last, FARE's figures less TeCoA's, seed by seed."""
    kinds = [(title, key, kind) for title, key in COLUMNS.items() for kind in ("clean", "robust")]
    lines = ["| tower | seeds | " + " | ".join(f"{title}: {kind}" for title, _, kind in kinds) + " |"]
    lines.append("|" + "---|" * (len(kinds) + 2))
    for method, rows in groups.items():
        cells = [cell([row["figures"][key][kind] for row in rows], ".1%") for _, key, kind in kinds]
        lines.append(f"| {method} | {len(rows)} | " + " | ".join(cells) + " |")
    pairs = list(zip(groups.get("FARE", []), groups.get("TeCoA", []), strict=False))
    if pairs:
        cells = [
            cell([a["figures"][key][kind] - b["figures"][key][kind] for a, b in pairs], ".1%") for _, key, kind in kinds
        ]
        lines.append(f"| FARE less TeCoA | {len(pairs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(groups: dict[str, list[dict]], epsilon: float, path: Path) -> None:
    """Clean and robust accuracy by tower, one panel for each column; bars are means with 95 % intervals, dots are seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.9 * len(COLUMNS), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(COLUMNS), sharey=True)
    for axis, (title, key) in zip(panels, COLUMNS.items(), strict=True):
        for number, kind in enumerate(("clean", "robust")):
            for place, rows in enumerate(groups.values()):
                values = [100 * row["figures"][key][kind] for row in rows]
                mean, half = mean_interval(values)
                at = place + 0.4 * number - 0.2
                label = {"label": kind if kind == "clean" else f"under attack, ε = {epsilon:g}"} if not place else {}
                error = None if math.isnan(half) else half
                axis.bar(at, mean, 0.38, yerr=error, capsize=3, color=("#9ab8d8", "#c8553d")[number], **label)
                axis.plot([at] * len(values), values, ".", color="black", ms=3)
        axis.set_xticks(range(len(groups)), list(groups))
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0, 105)
        axis.grid(alpha=0.3, axis="y")
    panels[0].set_ylabel("held-out pictures answered rightly (%)")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9
    )
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run what is missing, then print the table and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--epsilon", type=float, default=0.05, help="radius, raw [0, 1] pixels")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--attack_steps", type=int, default=50, help="of the attacks that measure")
    parser.add_argument("--count", type=int, help="attacked pictures, for a quick try; default: all 450")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/robust_clip"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    record = options.output_dir / "runs.jsonl"
    done = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()] if record.exists() else []
    groups: dict[str, list[dict]] = {method: [] for method in options.methods}
    for seed in options.seeds:
        vlm_testbed = VLMTestbed(seed)
        for method in options.methods:
            settings: dict[str, Any] = {"method": method, "seed": seed}
            names = ("epsilon", "steps", "batch_size", "learning_rate", "attack_steps", "count")
            settings |= {name: getattr(options, name) for name in names}
            row = next((row for row in done if settings.items() <= row.items()), None)
            if row is None:
                folder = options.output_dir / f"tower-{method.lower()}-{seed}"
                row = run(vlm_testbed.clip, vlm_testbed, settings, folder)
                done.append(row)
                with record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
            groups[method].append(row)
    shown = table(groups)
    (options.output_dir / "table.md").write_text(shown + "\n", encoding="utf-8")
    print(shown)
    plot(groups, options.epsilon, options.output_dir / "robust_clip.png")


if __name__ == "__main__":
    main()
