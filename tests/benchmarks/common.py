"""What the benchmarks share: arguments, models with random weights, timing, peak memory. Nothing is downloaded."""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

# Random weights in the shape of real models. "small" is the one that the project's limits are stated for.
MODEL_CONFIGS: dict[str, dict[str, Any]] = {
    "small": dict(hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8),
    # Llama-3.2-1B and Llama-3.1-8B
    "1b": dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    ),
    "8b": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    ),
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Share of the positions that carry a label, at the end of each row
LABEL_SHARE = 0.25


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments that every benchmark takes; a benchmark adds its own."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    result.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    result.add_argument(
        "--model-config", default="small", help=f"{', '.join(MODEL_CONFIGS)}, or the path of a transformers config.json"
    )
    result.add_argument("--dtype", default="float32", choices=DTYPES)
    result.add_argument("--batch", type=int, default=8)
    result.add_argument("--length", type=int, default=256, help="tokens per row")
    result.add_argument("--steps", type=int, default=10)
    result.add_argument("--vocab", type=int, default=None, help="default: the configuration's; 32,000 for small")
    result.add_argument("--repeats", type=int, default=5, help="interleaved measurements of each variant")
    result.add_argument("--threads", type=int, default=None, help="CPU threads; default: PyTorch's")
    return result


def read_config(name: str, *, vocab: int | None, length: int) -> PreTrainedConfig:
    """A model configuration by its name here or from a JSON file."""
    if name in MODEL_CONFIGS:
        settings = {"vocab_size": 32000, **MODEL_CONFIGS[name]}
        config: PreTrainedConfig = LlamaConfig(**settings, max_position_embeddings=8192)
    elif Path(name).is_file():
        settings = json.loads(Path(name).read_text())
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    else:
        raise SystemExit(f"--model-config {name!r} is neither one of {', '.join(MODEL_CONFIGS)} nor a file")
    text = config.get_text_config()
    if vocab is not None:
        text.vocab_size = vocab
    if getattr(text, "max_position_embeddings", length) < length:
        text.max_position_embeddings = length
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None  # may lie outside a small vocabulary
    return config


def build_model(args: argparse.Namespace, **overrides: Any) -> PreTrainedModel:
    """The model of `args` with random weights, in training mode without dropout."""
    settings = argparse.Namespace(**{**vars(args), **overrides})
    torch.manual_seed(0)
    config = read_config(settings.model_config, vocab=settings.vocab, length=settings.length)
    with torch.device(settings.device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[settings.dtype])
    for module in model.modules():
        rates = ["p"] if isinstance(module, torch.nn.Dropout) else [name for name in vars(module) if "drop" in name]
        for name in rates:  # also the rates of functional dropout and of layer drop
            if isinstance(getattr(module, name), float):
                setattr(module, name, 0.0)
    return model.train()


def make_batch(model: PreTrainedModel, *, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random token ids; the last quarter of each row is labelled."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (batch, length), generator=generator)
    labels = torch.full_like(ids, -100)
    first = length - max(1, int(LABEL_SHARE * length))
    labels[:, first:] = ids[:, first:]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {key: value.to(model.device) for key, value in inputs.items()}


def synchronize(device: str) -> None:
    """Wait for the device, if there is anything to wait for."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def interleaved(
    functions: dict[str, Callable[[], Any]], *, repeats: int, device: str
) -> dict[str, dict[str, list[float]]]:
    """
    Times of each function, taken in turns (and in alternating order), so that a neighbour's load falls on all of them.

    One call of each goes before, unmeasured.

    Returns:
        For each function the seconds of its calls: `"wall"`, and `"cpu"` (all threads), which a busy machine
        disturbs less.
    """
    for function in functions.values():
        function()
    times: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in functions}
    for repeat in range(repeats):
        for name in list(functions)[:: 1 if repeat % 2 == 0 else -1]:
            synchronize(device)
            wall, cpu = time.perf_counter(), time.process_time()
            functions[name]()
            synchronize(device)
            times[name]["wall"].append(time.perf_counter() - wall)
            times[name]["cpu"].append(time.process_time() - cpu)
    return times


def ratio(numerator: Iterable[float], denominator: Iterable[float]) -> dict[str, float]:
    """Median of the ratios of paired measurements, with the least and the greatest."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def peak_memory(function: Callable[[], Any], device: str) -> dict[str, float]:
    """
    Peak memory of one call, and how much of it lies above what was held before, in MiB.

    CUDA: PyTorch's allocator. CPU: resident memory of the process, so call it in a fresh one ([`in_child`]).
    """
    mib = 2**20
    if device.startswith("cuda"):
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        return {"peak_mib": peak / mib, "above_start_mib": (peak - before) / mib}
    before_kib = _resident("VmRSS")
    _forget_peak()
    function()
    peak_kib = _resident("VmHWM")
    return {"peak_mib": peak_kib / 1024, "above_start_mib": (peak_kib - before_kib) / 1024}


def _forget_peak() -> None:
    # Linux: building the model may have peaked higher than what is measured
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def _resident(field: str) -> float:
    """A field of the process's status in KiB; where there is no /proc, the peak since the process began."""
    status = Path("/proc/self/status")
    if status.exists():
        return float(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith(field)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform == "darwin" else peak


def in_child(script: str, extra: list[str]) -> dict[str, Any]:
    """Run a script with this process's arguments and some more; returns the JSON that it prints."""
    command = [sys.executable, script, *sys.argv[1:], *extra]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Where the figures were measured."""
    cuda = args.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(args.device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def rounded(value: Any) -> Any:
    """Floats to four significant digits, wherever they are."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def emit(result: dict[str, Any]) -> None:
    """Print the result as JSON."""
    print(json.dumps(rounded(result), indent=2))
