"""
A training step of AdversarialTrainer against the bare forwards and backwards that it cannot do without.

    python tests/benchmarks/bench_advtrain.py [--smoke]

For PGD-AT and TRADES: median seconds of one `training_step` (search, outer loss, backward), of a loop that makes the same
forwards and backwards and nothing else, and their ratio.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from transformers import ResNetConfig, ResNetForImageClassification  # noqa: E402

from tests.adversarial_data import adversarial_trainer, image_rows  # noqa: E402


def _bare(model: torch.nn.Module, batch: dict[str, torch.Tensor], steps: int, kind: str) -> None:
    """The forwards and backwards of a step: `steps` with respect to the input, one with respect to the weights."""
    pixels, labels = batch["pixel_values"], batch["labels"]
    model.eval()
    if kind == "trades":
        with torch.no_grad():
            model(pixel_values=pixels)
    for _ in range(steps):
        delta = torch.zeros_like(pixels).requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels + delta).logits, labels)
        torch.autograd.grad(loss, delta)
    model.train()
    branches = 2 if kind == "trades" else 1
    logits = model(pixel_values=torch.cat([pixels] * branches)).logits
    torch.nn.functional.cross_entropy(logits, torch.cat([labels] * branches)).backward()


def _median(call: Callable[[], object], repeats: int) -> float:
    call()
    found = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny model and two repeats")
    smoke = parser.parse_args().smoke
    rows, repeats = (4, 2) if smoke else (64, 10)
    sizes = (
        {"embedding_size": 8, "hidden_sizes": [8, 16]} if smoke else {"embedding_size": 64, "hidden_sizes": [64, 128]}
    )
    for kind in ("pgd_at", "trades"):
        model = ResNetForImageClassification(ResNetConfig(depths=[1, 1], layer_type="basic", num_labels=3, **sizes))
        with tempfile.TemporaryDirectory() as folder:
            trainer = adversarial_trainer(
                model,
                folder,
                {"train_dataset": image_rows(rows)},
                loss_type=kind,
                per_device_train_batch_size=rows,
                use_cpu=not torch.cuda.is_available(),
            )
            batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
            trainer.current_gradient_accumulation_steps = 1
            steps = trainer._search.steps

            def ours(trainer=trainer, model=model, batch=batch) -> None:
                trainer._place = -1
                trainer.training_step(model, dict(batch))
                model.zero_grad()

            def bare(model=model, batch=batch, steps=steps, kind=kind) -> None:
                _bare(model, batch, steps, kind)
                model.zero_grad()

            found = _median(ours, repeats), _median(bare, repeats)
            print(f"{kind}: step {found[0]:.4f} s, bare {found[1]:.4f} s, ratio {found[0] / found[1]:.3f}")


if __name__ == "__main__":
    main()
