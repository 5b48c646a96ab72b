"""
Memory of SaRA's gradients and optimizer state against LoRA with as many trained values, and full fine-tuning.

Each method trains a model with random weights for a few AdamW steps, in a process of its own: a language model, and a
diffusion UNet where diffusers is installed. Gradients, optimizer state and indices are counted; peaks are measured, and on a
CPU they flatter SaRA, because training reuses the memory that choosing its threshold has freed: compare peaks on CUDA.

    python tests/benchmarks/bench_sara.py --device cpu --threads 2
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import common
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_robust.tuners import SaraConfig, SaraLayer

METHODS = ("sara", "lora", "full")
UNET_CHANNELS = {"tiny": (16, 32), "sd1": (320, 640, 1280, 1280)}
# Weights per layer that the threshold is read from
SAMPLE = 200_000


def build_unet(args: Any) -> nn.Module:
    """A UNet with random weights; `sd1` has the shape of Stable Diffusion 1.x."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    channels = UNET_CHANNELS[args.unet]
    size = len(channels)
    with torch.device(args.device):
        model = UNet2DConditionModel(
            sample_size=args.latents,
            block_out_channels=channels,
            down_block_types=("CrossAttnDownBlock2D",) * (size - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (size - 1),
            cross_attention_dim=768 if args.unet == "sd1" else 32,
            norm_num_groups=32 if args.unet == "sd1" else 8,
        )
    return model.to(common.DTYPES[args.dtype]).train()


def prepare(args: Any) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """The base model and its loss on one batch."""
    if args.kind == "transformer":
        model = common.build_model(args)
        batch = common.make_batch(model, batch=args.batch, length=args.length)
        return model, lambda m: m(**batch).loss
    model = build_unet(args)
    kwargs: dict[str, Any] = {"device": args.device, "dtype": common.DTYPES[args.dtype]}
    latents = torch.randn(args.batch, 4, args.latents, args.latents, **kwargs)
    hidden = torch.randn(args.batch, 77, model.config.cross_attention_dim, **kwargs)
    times = torch.full((args.batch,), 500, device=args.device)
    return model, lambda m: m(latents, times, hidden).sample.float().pow(2).mean()


def targets(model: nn.Module) -> list[str]:
    """The layers that both adapters take: all linear layers and convolutions but the output head."""
    kinds = (nn.Linear, nn.Conv2d)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and name != "lm_head"]


def threshold_for(model: nn.Module, names: list[str], rank: int) -> float:
    """The threshold that selects about as many entries as LoRA of this rank has."""
    weights = [model.get_submodule(name).weight.detach() for name in names]
    wanted = sum(rank * (w.shape[0] + w.numel() // w.shape[0]) for w in weights)
    shares = [(w.numel() / (n := min(w.numel(), SAMPLE)), w.reshape(-1)[:n].float().abs()) for w in weights]
    sizes = torch.cat([torch.full_like(sample, scale) for scale, sample in shares])
    ordered = torch.cat([sample for _, sample in shares]).sort()
    below = sizes[ordered.indices].cumsum(0)
    return float(ordered.values[int(torch.searchsorted(below, float(wanted)).clamp(max=len(below) - 1))])


def size_of(tensors: Any) -> float:
    """MiB of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def measure(args: Any) -> dict[str, Any]:
    """One method on one model, in this process."""
    model, loss_of = prepare(args)
    weights = sum(p.numel() for p in model.parameters())
    if args.method != "full":
        names = targets(model)
        if args.method == "lora":
            config: Any = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=names)
        else:
            config = SaraConfig(
                threshold=threshold_for(model, names, args.rank), target_modules=names, train_biases=False
            )
        model = get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def train() -> None:
        for _ in range(args.steps):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

    memory = common.peak_memory(train, args.device)
    states = [
        t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor) and t.dim()
    ]
    result = {
        "weights": weights,
        "trained_values": sum(p.numel() for p in trained),
        "gradients_mib": size_of(p.grad for p in trained if p.grad is not None),
        "optimizer_state_mib": size_of(states),
        **memory,
    }
    if args.method == "sara":
        layers = [layer for layer in model.modules() if isinstance(layer, SaraLayer)]
        result["indices_mib"] = size_of(layer.sara_indices["default"] for layer in layers)
    return result


def main() -> None:
    """Print the figures of all methods as JSON."""
    parser = common.parser(__doc__.strip().splitlines()[0])
    parser.add_argument("--rank", type=int, default=16, help="of LoRA; SaRA trains about as many values")
    parser.add_argument("--unet", default="tiny", choices=UNET_CHANNELS)
    parser.add_argument("--latents", type=int, default=16, help="height and width of the UNet's input")
    parser.add_argument("--kind", choices=("transformer", "unet"), help="used by the script itself")
    parser.add_argument("--method", choices=METHODS, help="used by the script itself")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.method:
        common.emit(measure(args))
        return
    result: dict[str, Any] = {**common.environment(args), "steps": args.steps, "rank": args.rank}
    kinds = ["transformer"] + ["unet"] * (importlib.util.find_spec("diffusers") is not None)
    for kind in kinds:
        result[kind] = {m: common.in_child(__file__, ["--kind", kind, "--method", m]) for m in METHODS}
    common.emit(result)


if __name__ == "__main__":
    main()
