"""
EmbeddingAttack against a bare loop of the same forwards and input gradients: time, peak memory, growth.

The bare loop is what the same attack costs without the library: the embeddings looked up once, `inputs_embeds`, the LM
head on the label positions only, no hook, no bookkeeping, and the radius given. The attack runs with `keep="last"`, so
that both make the same number of forwards.

    python tests/benchmarks/bench_attack.py --device cpu --threads 2
    python tests/benchmarks/bench_attack.py --device cuda --model-config 8b --dtype bfloat16
    python tests/benchmarks/bench_attack.py --sweep --steps 2
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import common
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from hf_robust.attacks import EmbeddingAttack
from hf_robust.sites import EmbeddingSite

LIMIT = 1.10
EPSILON, STEP_SIZE = 0.05, 1e-4
SWEEP = {
    "steps": (1, 2, 4, 8, 16),
    "batch": (1, 2, 4, 8, 16),
    "length": (64, 128, 256, 512),
    "vocab": (1000, 8000, 32000, 128000),
}


def bare_loop(model: PreTrainedModel, batch: dict[str, torch.Tensor], radius: float, steps: int) -> torch.Tensor:
    """Sign steps on the label tokens' mean cross-entropy, projected onto a ball for each token."""
    ids, labels = batch["input_ids"], batch["labels"]
    rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    flat, targets = rows * ids.shape[1] + columns, labels[rows, columns + 1]
    counts = (labels[:, 1:] != -100).sum(1)
    weights = (1.0 / counts)[rows]
    mask = (batch["attention_mask"].bool() & (labels == -100)).unsqueeze(-1)
    head = model.get_output_embeddings()
    embeds = model.get_input_embeddings()(ids).detach()
    delta = torch.zeros(embeds.shape, device=embeds.device)
    for _ in range(steps):
        delta.requires_grad_()
        states = model.base_model(
            inputs_embeds=embeds + delta.to(embeds.dtype), attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state
        logits = head(states.flatten(0, 1).index_select(0, flat)).float()
        loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
        (grad,) = torch.autograd.grad(loss, delta)
        with torch.no_grad():
            delta = delta - STEP_SIZE * grad.sign() * mask
            delta = delta * (radius / delta.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
    return delta.detach()


def variants(args: argparse.Namespace, **overrides: Any) -> dict[str, Callable[[], torch.Tensor]]:
    """The two loops on one model and one batch."""
    settings = argparse.Namespace(**{**vars(args), **overrides})
    model = common.build_model(settings)
    batch = common.make_batch(model, batch=settings.batch, length=settings.length)
    radius = EPSILON * EmbeddingSite(model).mean_row_norm().item()
    attack = EmbeddingAttack(epsilon=EPSILON, step_size=STEP_SIZE, steps=settings.steps, keep="last")
    return {
        "attack": lambda: attack.perturb(model, **batch),
        "bare": lambda: bare_loop(model, batch, radius, settings.steps),
    }


def measure(functions: dict[str, Callable[[], torch.Tensor]], args: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Seconds per step of both, and the ratio of their paired times."""
    times = common.interleaved(functions, repeats=args.repeats, device=args.device)
    attack, bare = times["attack"], times["bare"]
    result = {f"{name}_step_s": statistics.median(times[name]["wall"]) / steps for name in times}
    result["ratio"] = common.ratio(attack["wall"], bare["wall"])
    if args.device == "cpu":
        result["cpu_time_ratio"] = common.ratio(attack["cpu"], bare["cpu"])
    return result


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of both, each in a process of its own."""
    found = {name: common.in_child(__file__, ["--child", name]) for name in ("attack", "bare")}
    ratios = {key: found["attack"][key] / found["bare"][key] for key in ("peak_mib", "above_start_mib")}
    return {**found, "ratio": ratios["peak_mib"], "ratio_above_start": ratios["above_start_mib"]}


def sweep(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Step time along each axis, the others as given."""
    return {
        axis: [
            {axis: value, **measure(variants(args, **{axis: value}), args, value if axis == "steps" else args.steps)}
            for value in values
        ]
        for axis, values in SWEEP.items()
    }


def main() -> None:
    parser = common.parser(__doc__.strip().splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="also the growth with steps, batch, length, vocabulary")
    parser.add_argument("--child", choices=("attack", "bare"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.child:
        function = variants(args)[args.child]
        common.emit(common.peak_memory(function, args.device))
        return
    functions = variants(args)
    difference = (functions["attack"]() - functions["bare"]()).abs()
    result: dict[str, Any] = {
        "benchmark": "attack",
        "settings": {k: v for k, v in vars(args).items() if k not in ("child", "sweep")},
        "environment": common.environment(args),
        # Both must have done the same work; a gradient within rounding of 0 may flip the sign of a coordinate
        "share_of_coordinates_that_differ": (difference > 0.1 * STEP_SIZE).double().mean().item(),
        "time": measure(functions, args, args.steps),
    }
    del functions
    result["memory"] = memory(args)
    ratios = {"time": result["time"]["ratio"]["median"], "memory": result["memory"]["ratio"]}
    result["limit"] = {"ratio": LIMIT, **{name: value <= LIMIT for name, value in ratios.items()}}
    if args.sweep:
        result["sweep"] = sweep(args)
    common.emit(result)


if __name__ == "__main__":
    main()
