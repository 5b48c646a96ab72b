"""
CAT on one and on two processes: seconds a step, and the most memory that tensors hold on one process.

Every process takes the same number of rows, so that two do twice the work: a step should take as long as on one, plus the
exchange. On a CPU two processes also share cores and memory bandwidth, and gloo is no NCCL: the figures there show what is
split, not how fast GPUs would be.

    python tests/benchmarks/bench_processes.py --strategies ddp fsdp2 --batch 3 --length 64 --steps 4
    python tests/benchmarks/bench_processes.py --device cuda --model-config 1b --dtype bfloat16    # two GPUs, NCCL
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import torch

ROOT = Path(__file__).parents[2]
PROCESSES = (1, 2)


def build_trainer(args: argparse.Namespace, folder: str, steps: int) -> Any:
    """CAT on random weights: an adversarial row for three utility rows, prompts and answers of half a row each."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from hf_robust import CATConfig, CATTrainer

    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    prompt, answers = "a " * (args.length // 2), {w: f" {w}" * (args.length // 2 - 1) for w in "bc"}
    on_cpu = args.device == "cpu"
    return CATTrainer(
        common.build_model(args, device="cpu"),
        CATConfig(
            folder,
            attack_steps=args.attack_steps,
            adversarial_fraction=0.25,  # a row for three utility rows, on every process and at every step
            max_steps=steps,
            per_device_train_batch_size=args.batch,
            use_cpu=on_cpu,
            bf16=args.dtype == "bfloat16",
            gradient_checkpointing=False,
            max_length=args.length,
            optim="adamw_torch",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt, "completion": answers["b"]}] * 64),
        adversarial_dataset=Dataset.from_list(
            [{"prompt": prompt, "chosen": answers["b"], "rejected": answers["c"]}] * 8
        ),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
        ),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if args.lora else None,
    )


def held_bytes(trainer: Any) -> int:
    """What weights and optimizer state take on this process between steps."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    states = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [getattr(p, "ds_tensor", p) for p in trainer.model.parameters()] + [
        s for s in states if torch.is_tensor(s)
    ]
    local = [getattr(tensor, "to_local", lambda tensor=tensor: tensor)() for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def measure(args: argparse.Namespace) -> None:
    """One process's part: prints a line of JSON."""
    from transformers import TrainerCallback

    from tests.distributed.parity import allow_fsdp_on_cpu, running_under
    from tests.memory import peak_bytes

    torch.set_num_threads(args.threads or 1)
    (strategy,) = args.strategies
    if args.device == "cpu":
        allow_fsdp_on_cpu()
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *given: Any, **more: Any) -> None:
            common.synchronize(args.device)
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as name, running_under(strategy, "cat", args.device, Path(name)):
        trainer = build_trainer(args, name, args.steps + 1)
        trainer.add_callback(Clock())
        if args.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        found = {"seconds": statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False))}
        found["held"] = held_bytes(trainer)
        if args.device != "cpu":
            found["peak"] = torch.cuda.max_memory_allocated()
        else:
            trainer = build_trainer(args, name, 1)
            whole = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
            found["peak"] = whole + peak_bytes(trainer.train)
    print("FOUND " + json.dumps(found), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def start(args: argparse.Namespace, strategy: str, processes: int) -> dict[str, float]:
    """The slowest and the fullest of the processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    given = [a for a in sys.argv[1:] if a not in args.strategies and a != "--strategies"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    env |= {"OMP_NUM_THREADS": str(args.threads or 1), **({"DS_ACCELERATOR": "cpu"} if args.device == "cpu" else {})}
    command = [sys.executable, *launcher, __file__, *given, "--strategies", strategy, "--worker"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    lines = [json.loads(line.split("FOUND ", 1)[1]) for line in done.stdout.splitlines() if "FOUND " in line]
    if done.returncode or len(lines) != processes:
        raise SystemExit(f"{strategy} on {processes} processes failed:\n{done.stderr[-3000:]}")
    return {name: max(line[name] for line in lines) for name in lines[0]}


def main() -> None:
    parser = common.parser(__doc__.strip().splitlines()[0])
    parser.set_defaults(batch=3, length=64, steps=4)
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp2"], help="ddp, zero2, zero3, fsdp2")
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--lora", action="store_true", help="train an adapter of rank 16 instead of all weights")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.batch % 3:
        parser.error(
            f"--batch {args.batch}: a multiple of 3, so that every process has an adversarial row at every step"
        )
    if args.worker:
        measure(args)
        return
    mib = 2**20
    print("| strategy | processes | seconds a step | ratio | held, MiB | peak, MiB |\n|---|---|---|---|---|---|")
    for strategy in args.strategies:
        first: dict[str, float] = {}
        for processes in PROCESSES:
            found = start(args, strategy, processes)
            first = first or found
            ratio = found["seconds"] / first["seconds"]
            cells = (
                f"{found['seconds']:.2f}",
                f"{ratio:.2f}",
                f"{found['held'] / mib:.0f}",
                f"{found['peak'] / mib:.0f}",
            )
            print(f"| {strategy} | {processes} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
