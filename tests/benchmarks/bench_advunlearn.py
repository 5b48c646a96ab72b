"""
AdvUnlearn's step against the bare forwards and backwards that remain of it, and the UNet's work with and without the bank.

Bare: as many forwards and backwards of text encoder and UNet as the attack has steps, down to the embeddings of one row, and
one forward and backward of the row with its retain prompts, down to the text encoder's weights. Counted: batch items that the
UNet runs forward in one iteration, from the bank, drawn anew, and in the published loop; with the bank's own items shared
out over the iterations of a run.

    python tests/benchmarks/bench_advunlearn.py --device cpu --model small
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_robust import AdvUnlearnConfig, AdvUnlearnTrainer  # noqa: E402
from hf_robust.diffusion import TextTokenSite  # noqa: E402
from hf_robust.objectives import per_image_mse  # noqa: E402
from tests.diffusion_helpers import tiny_tokenizer  # noqa: E402

LIMIT = 1.10
FEWER = 10
# Items per iteration of the published loop: about 1,620 in the attack and 320 in the step
PUBLISHED_ITEMS = 1940
ITERATIONS = 1000
# Random weights; "sd1" has the shape of Stable Diffusion 1.x
MODELS: dict[str, dict[str, Any]] = {
    "tiny": dict(channels=(8, 16), side=8, width=16, layers=2, heads=2, groups=4, per_block=1),
    "small": dict(channels=(64, 96), side=8, width=64, layers=3, heads=2, groups=32, per_block=2),
    "sd1": dict(
        channels=(320, 640, 1280, 1280), side=64, width=768, layers=12, heads=12, groups=32, per_block=2, vocabulary=49408,
        positions=77,
    ),
}  # fmt: skip


def build_pipeline(name: str) -> StableDiffusionPipeline:
    shape = MODELS[name]
    torch.manual_seed(0)
    depth, channels = len(shape["channels"]), shape["channels"]
    tokenizer = tiny_tokenizer(max_length=shape.get("positions", 12))
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=shape.get("vocabulary", len(tokenizer)),
            hidden_size=shape["width"],
            intermediate_size=4 * shape["width"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=shape["side"],
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * (depth - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (depth - 1),
        layers_per_block=shape["per_block"],
        norm_num_groups=shape["groups"],
        cross_attention_dim=shape["width"],
        attention_head_dim=8,
    )
    # Never run here
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4)  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_trainer(args: argparse.Namespace, folder: str, bank_size: int) -> AdvUnlearnTrainer:
    config = AdvUnlearnConfig(
        folder,
        use_cpu=args.device == "cpu",
        bf16=args.dtype == "bfloat16",
        fp16=args.dtype == "float16",
        report_to="none",
        disable_tqdm=True,
        concepts=["vangogh"],
        retain_prompts=["a cat", "a dog", "a blue square", "a green star", "the house"],
        attack_steps=args.attack_steps,
        attack_warmup_steps=0,
        sampling_steps=args.sampling_steps,
        latent_bank_size=bank_size,
    )
    trainer = AdvUnlearnTrainer(build_pipeline(args.model), config)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def step(trainer: AdvUnlearnTrainer, row: int) -> None:
    """One iteration without its optimizer step; other rows draw other things."""
    device = trainer.model.device
    inputs = {"prompt": torch.zeros(1, dtype=torch.long, device=device), "row": torch.tensor([row], device=device)}
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=1)
    loss.backward()
    trainer.model.zero_grad(set_to_none=True)


def items_of(trainer: AdvUnlearnTrainer, rows: int) -> float:
    """UNet items of an iteration, forward, a mean over some rows."""
    before = trainer.model.unet_items
    for row in range(rows):
        step(trainer, row)
    return (trainer.model.unet_items - before) / rows


def main() -> None:
    # Its own arguments: what the other benchmarks share is about language models
    parser = argparse.ArgumentParser(
        description=__doc__.strip().splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--model", default="small", choices=MODELS)
    parser.add_argument("--dtype", default="float32", choices=common.DTYPES)
    parser.add_argument("--attack-steps", type=int, default=30)
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--bank-size", type=int, default=1024, help="of a run; its work is computed from a smaller one")
    parser.add_argument("--measured-bank-size", type=int, default=32, help="latents drawn here")
    parser.add_argument("--direct-rows", type=int, default=2, help="iterations without a bank that are counted")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved measurements")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: PyTorch's")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(args, folder, args.measured_bank_size)
        direct = build_trainer(args, folder, 0) if args.direct_rows else None
    model = trainer.model.train()
    before = model.unet_items
    trainer.fill_latent_bank()
    per_latent = (model.unet_items - before) / args.measured_bank_size
    banked = items_of(trainer, 2)
    drawn = None if direct is None else items_of(direct, args.direct_rows)
    del direct
    amortised = banked + per_latent * args.bank_size / ITERATIONS
    # With fewer steps than the published ones, fewer items say nothing
    comparable = (args.attack_steps, args.sampling_steps) == (30, 50)
    fewer = PUBLISHED_ITEMS / amortised if comparable else None

    config, device = trainer.args, model.device
    site = TextTokenSite(model)
    ids = [tensor.to(device) for tensor in trainer._prompts.attacked]
    mask = trainer._prompts.mask.to(device)
    start = site.lookup(ids).float()
    outer = [
        torch.cat([mine, kept[: config.retain_batch_size].to(device)])
        for mine, kept in zip(ids, trainer._retain_ids, strict=True)
    ]
    count = len(outer[0])
    latents = torch.randn(count, *model.latent_shape, device=device)
    timesteps = torch.randint(1000, (count,), device=device)
    target = torch.randn_like(latents)

    def bare() -> None:
        with trainer.compute_loss_context_manager():
            for _ in range(config.attack_steps):
                leaf = start.clone().requires_grad_(True)
                with site.replace(leaf, mask):
                    loss = per_image_mse(model(latents[:1], timesteps[:1], ids), target[:1]).sum()
                torch.autograd.grad(loss, leaf)
            loss = per_image_mse(model(latents, timesteps, outer), target).mean()
        loss.backward()
        model.zero_grad(set_to_none=True)

    times = common.interleaved(
        {"ours": lambda: step(trainer, 0), "bare": bare}, repeats=args.repeats, device=args.device
    )
    ratio = common.ratio(times["ours"]["wall"], times["bare"]["wall"])
    common.emit(
        {
            "benchmark": "advunlearn step",
            "settings": vars(args),
            "environment": common.environment(args),
            "unet_items_per_iteration": {
                "published": PUBLISHED_ITEMS,
                "without_bank": drawn,
                "with_bank": banked,
                "with_bank_and_its_making": amortised,
            },
            "fewer_than_published": fewer,
            "limit_of_items": {"times_fewer": FEWER, "met": None if fewer is None else fewer >= FEWER},
            "bare_s": statistics.median(times["bare"]["wall"]),
            "step_s": statistics.median(times["ours"]["wall"]),
            "ratio_to_bare": ratio,
            "ratio_to_bare_cpu": common.ratio(times["ours"]["cpu"], times["bare"]["cpu"]),
            "limit": {"ratio": LIMIT, "met": ratio["median"] <= LIMIT},
        }
    )


if __name__ == "__main__":
    main()
