"""
A training step of AdversarialTrainer and of RobustCLIPTrainer against the bare forwards and backwards that it has to make.

    python tests/benchmarks/bench_advtrain.py [--methods pgd_at trades fare tecoa] [--threads 2] [--size 32] [--smoke]

For each method: seconds of one `training_step` (search, outer loss, backward) and of a loop that makes the same forwards
and backwards and nothing else, taken in turns; their ratio in wall and in CPU time, median with the least and greatest.
A step's fixed cost (some milliseconds) shows at pictures of 8 × 8 and no longer at larger ones.
On Linux, glibc gives the top of its heap back and takes it again page by page; which of the two loops pays for that is a
matter of how the process happens to lie in memory. Without that:

    MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_MMAP_THRESHOLD_=1000000000 python tests/benchmarks/bench_advtrain.py

Memory: the most that tensors made during a step hold at one time; the same of that loop, and of the same trainer's step without
an attack on the same rows.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_robust import RobustCLIPConfig, RobustCLIPTrainer  # noqa: E402
from hf_robust.sites.pixels import PixelUnits  # noqa: E402
from tests.adversarial_data import adversarial_trainer, image_rows, settings  # noqa: E402
from tests.benchmarks.common import interleaved, peak_memory, ratio  # noqa: E402
from tests.memory import peak_bytes  # noqa: E402
from tests.trainer_data import tiny_tokenizer  # noqa: E402
from tests.vlm_data import image_processor, vision_config  # noqa: E402

LIMIT = 1.05
METHODS = ("pgd_at", "trades", "fare", "tecoa")
NAMES = ["cake", "bomb", "flour"]
USE_CPU = not torch.cuda.is_available()


def resnet_trainer(folder: str, kind: str, options: argparse.Namespace, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """An AdversarialTrainer of a small ResNet, and a batch."""
    torch.manual_seed(0)
    wide = {"embedding_size": 64, "hidden_sizes": [64, 128]}
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16]} if options.smoke else wide
    config = ResNetConfig(depths=[1, 1], layer_type="basic", num_labels=3, **sizes)
    rows = 4 if options.smoke else 32
    trainer = adversarial_trainer(
        ResNetForImageClassification(config), folder, {"train_dataset": image_rows(rows)}, loss_type=kind,
        per_device_train_batch_size=rows, use_cpu=USE_CPU, **changes,
    )  # fmt: skip
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    # The test's pictures, enlarged; all weights of the model stay as they are
    times = (1 if options.smoke else options.size // 8,)
    batch["pixel_values"] = batch["pixel_values"].repeat_interleave(*times, 2).repeat_interleave(*times, 3)
    return trainer, batch


def clip_trainer(folder: str, kind: str, options: argparse.Namespace, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A RobustCLIPTrainer of a small tower, and a batch of 64 × 64 pictures."""
    torch.manual_seed(0)
    wide = dict(
        hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=3, image_size=64, patch_size=8
    )
    vision = vision_config(**({} if options.smoke else wide))
    text = CLIPTextConfig(
        vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, pad_token_id=1, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=vision.projection_dim
    )
    rows = 4 if options.smoke else 8
    processor = CLIPProcessor(image_processor=image_processor(), tokenizer=tiny_tokenizer())
    raw = torch.rand(rows, 3, vision.image_size, vision.image_size, generator=torch.Generator().manual_seed(0))
    pixels = PixelUnits(processor).from_raw(raw)
    dataset = Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": [i % 3 for i in range(rows)]})
    given = {
        "class_names": NAMES, "prompt_templates": ["a {} <eos>"], "warmup_steps": 0, "use_cpu": USE_CPU,
        "per_device_train_batch_size": rows, **({"attack_steps": 2} if options.smoke else {}),
    }  # fmt: skip
    trainer = RobustCLIPTrainer(
        CLIPModel(config).train(),
        RobustCLIPConfig(**settings(folder, loss_type=kind, **{**given, **changes})),
        train_dataset=dataset.with_format("torch"),
        processing_class=processor,
    )
    return trainer, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def step_of(trainer: Any, batch: dict[str, Any]) -> Callable[[], None]:
    """A training step without the optimizer's."""
    trainer.current_gradient_accumulation_steps = 1

    def step() -> None:
        trainer._place = -1
        trainer.training_step(trainer.model, dict(batch))
        trainer.model.zero_grad()

    return step


def bare_of(trainer: Any, batch: dict[str, Any], kind: str) -> Callable[[], None]:
    """The forwards and backwards of a step: those with respect to the input, then one with respect to the weights."""
    model, pixels, labels = trainer.model, batch["pixel_values"], batch["labels"]
    is_clip = isinstance(trainer, RobustCLIPTrainer)
    steps = trainer.args.attack_steps if is_clip else trainer._search.steps
    reference: Any = None

    def loss_of(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if not is_clip:
            return F.cross_entropy(model(pixel_values=images).logits, targets)
        features = model(pixel_values=images).image_embeds
        if kind == "fare":
            return (features - reference).square().sum(dim=1).mean()
        return F.cross_entropy(100 * F.normalize(features, dim=-1) @ trainer._classes.T, targets)

    def bare() -> None:
        nonlocal reference
        model.eval()
        with torch.no_grad():
            if kind == "trades":
                model(pixel_values=pixels)
            elif kind == "fare":
                reference = trainer._teacher(pixel_values=pixels).image_embeds
        for _ in range(steps):
            delta = torch.zeros_like(pixels).requires_grad_(True)
            torch.autograd.grad(loss_of(pixels + delta, labels), delta)
        model.train()
        branches = 2 if kind == "trades" else 1
        loss_of(torch.cat([pixels] * branches), torch.cat([labels] * branches)).backward()
        model.zero_grad()

    return bare


def peak(function: Callable[[], None]) -> float:
    """MiB that tensors made during a call hold at most, the second time it is made."""
    function()
    return peak_bytes(function) / 2**20 if USE_CPU else peak_memory(function, "cuda")["above_start_mib"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny models and two repeats")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--size", type=int, default=32, help="height and width of the classifier's pictures")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    repeats = 2 if options.smoke else options.repeats
    for kind in options.methods:
        build, radius = (clip_trainer, "attack_epsilon") if kind in ("fare", "tecoa") else (resnet_trainer, "epsilon")
        with tempfile.TemporaryDirectory() as folder:
            trainer, batch = build(folder, kind, options)
            plain = step_of(*build(folder, kind, options, **{radius: 0.0}))
        step = step_of(trainer, batch)
        runs = {"ours": step, "bare": bare_of(trainer, batch, kind)}
        found = interleaved(runs, repeats=repeats, device="cpu" if USE_CPU else "cuda")
        wall, cpu = (_text(ratio(found["ours"][clock], found["bare"][clock])) for clock in ("wall", "cpu"))
        seconds = {name: statistics.median(times["wall"]) for name, times in found.items()}
        print(
            f"{kind}: step {seconds['ours']:.4f} s, bare {seconds['bare']:.4f} s, ratio wall {wall}, CPU {cpu}; limit {LIMIT}"
        )
        held = {"step": peak(step), "bare": peak(runs["bare"]), "step without an attack": peak(plain)}
        print(f"{kind}: peak memory " + ", ".join(f"{name} {mib:.2f} MiB" for name, mib in held.items()))


def _text(found: dict[str, float]) -> str:
    return f"{found['median']:.3f} ({found['min']:.3f}, {found['max']:.3f})"


if __name__ == "__main__":
    main()
