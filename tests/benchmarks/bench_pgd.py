"""
PGD on pixels against a bare loop of the same forwards and input gradients, and against torchattacks: time and peak memory.

The bare loop is what the same attack costs without the library: no checks, no random start of its own, no bookkeeping. All
take the same number of steps from the clean image (`keep="last"`), and their images must be equal, bit for bit.

    python tests/benchmarks/bench_pgd.py --device cpu --threads 2
    python tests/benchmarks/bench_pgd.py --device cuda --model-config base --batch 128
    python tests/benchmarks/bench_pgd.py --model-config tiny --batch 2 --steps 2 --repeats 1   # smoke
"""

import argparse
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import common
import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTForImageClassification

from hf_robust.attacks import PGD

LIMIT = 1.05
EPSILON, STEP_SIZE = 8 / 255, 2 / 255
# Vision transformers with random weights; "base" has the shape of ViT-B/16
MODEL_CONFIGS: dict[str, dict[str, int]] = {
    "tiny": dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    ),
    "small": dict(
        hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=3, image_size=64, patch_size=8
    ),
    "base": dict(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=16,
    ),
}


class Logits(torch.nn.Module):
    """What packages that know no model outputs attack."""

    def __init__(self, model: ViTForImageClassification):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=images).logits


def bare_loop(model: ViTForImageClassification, images: torch.Tensor, labels: torch.Tensor, steps: int) -> torch.Tensor:
    """Sign steps on the cross-entropy, clipped to ball and box."""
    moved = images
    for _ in range(steps):
        moved = moved.detach().requires_grad_(True)
        loss = F.cross_entropy(model(pixel_values=moved).logits.float(), labels, reduction="sum")
        (grad,) = torch.autograd.grad(loss, moved)
        with torch.no_grad():
            moved = moved + STEP_SIZE * grad.sign()
            moved = (images + (moved - images).clamp(-EPSILON, EPSILON)).clamp(0, 1)
    return moved.detach()


def variants(args: argparse.Namespace) -> dict[str, Callable[[], torch.Tensor]]:
    """The loops on one model and one batch."""
    torch.manual_seed(0)
    config = ViTConfig(**MODEL_CONFIGS[args.model_config], num_labels=10)
    model = ViTForImageClassification(config).to(args.device).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(args.batch, 3, config.image_size, config.image_size, generator=generator).to(args.device)
    labels = torch.randint(0, 10, (args.batch,), generator=generator).to(args.device)
    attack = PGD(epsilon=EPSILON, step_size=STEP_SIZE, steps=args.steps, random_start=False, keep="last")
    found: dict[str, Callable[[], torch.Tensor]] = {
        "attack": lambda: images + attack.perturb(model, pixel_values=images, labels=labels),
        "bare": lambda: bare_loop(model, images, labels, args.steps),
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchattacks
    except ImportError:
        return found
    other = torchattacks.PGD(Logits(model), eps=EPSILON, alpha=STEP_SIZE, steps=args.steps, random_start=False)
    return {**found, "torchattacks": lambda: other(images, labels)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument("--model-config", default="small", choices=MODEL_CONFIGS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5, help="interleaved measurements of each variant")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: PyTorch's")
    parser.add_argument("--child", choices=("attack", "bare", "torchattacks"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    functions = variants(args)
    if args.child:
        common.emit(common.peak_memory(functions[args.child], args.device))
        return
    expected = functions["bare"]()
    differ = {name: (run() != expected).double().mean().item() for name, run in functions.items() if name != "bare"}
    times = common.interleaved(functions, repeats=args.repeats, device=args.device)
    found = {name: common.in_child(__file__, ["--child", name]) for name in functions}
    ratios = {
        name: common.ratio(times["attack"]["wall"], times[name]["wall"]) for name in functions if name != "attack"
    }
    result: dict[str, Any] = {
        "benchmark": "pgd",
        "settings": {key: value for key, value in vars(args).items() if key != "child"},
        "environment": common.environment(args),
        "share_of_pixels_that_differ": differ,
        "step_s": {name: statistics.median(times[name]["wall"]) / args.steps for name in times},
        "attack_over": ratios,
        "memory": found,
        "memory_over_bare": found["attack"]["peak_mib"] / found["bare"]["peak_mib"],
        "limit": {"ratio": LIMIT, "time": ratios["bare"]["median"] <= LIMIT},
    }
    if args.device == "cpu":
        result["attack_cpu_time_over_bare"] = common.ratio(times["attack"]["cpu"], times["bare"]["cpu"])
    common.emit(result)


if __name__ == "__main__":
    main()
