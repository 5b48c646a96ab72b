"""
Whether a training's weights depend on how it is spread over processes: DDP, ZeRO-2, ZeRO-3 and FSDP2 against one process.

    python tests/distributed/parity.py --strategies ddp fsdp2 --cells cat-full-1 capo-lora-4
    python tests/distributed/parity.py --device cuda                       # NCCL; two GPUs
    python tests/distributed/parity.py --device cuda --precision bfloat16

Starts each set of cells twice, as one process and as two, and prints a table. The tests use [`launch`] and [`compare`].
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
# Largest difference of a weight; in bfloat16, where the gradients of three steps differ in their second or third digit, as a
# share of the largest change that training made to a weight
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.2}
# Rows of an optimizer step
ROWS = 8
PROCESSES = 2
# What each process found, by strategy and cell
Found = dict[tuple[str, str], list[dict[str, Any]]]
_DONE = "%s.%s.rank%d.pt"


def has_deepspeed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


# ---- What a process runs under ----


def _deepspeed_config(stage: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # weights as small as these would stay whole otherwise
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {
        **dict.fromkeys(auto, "auto"),
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }


# Layers that FSDP gathers one by one, where transformers' own list names some that a model lacks (CLIP's and LLaVA's towers)
# or one around the input embeddings, which accelerate (1.15) splits by themselves (ViT)
_FSDP_LAYERS = {
    **dict.fromkeys(("classifier", "free", "pgd"), "ViTLayer"),
    "clip": "CLIPEncoderLayer",
    "vlm": "CLIPEncoderLayer,LlamaDecoderLayer",
}


def _variables(strategy: str, cell: str, device: str, folder: Path) -> dict[str, str]:
    """Environment variables as `accelerate launch` sets them."""
    found = {}
    if device == "cpu" and not strategy.startswith("zero"):
        found["ACCELERATE_USE_CPU"] = "true"
    if strategy.startswith("zero"):
        config = folder / f"{strategy}.rank{os.environ['RANK']}.json"
        config.write_text(json.dumps(_deepspeed_config(int(strategy[-1]))))
        found |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}
    if strategy == "fsdp2":
        names = {
            "VERSION": "2", "AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "RESHARD_AFTER_FORWARD": "true",
            "STATE_DICT_TYPE": "SHARDED_STATE_DICT", "CPU_RAM_EFFICIENT_LOADING": "false",
        }  # fmt: skip
        layers = _FSDP_LAYERS.get(cell.split("-")[0])
        names |= {"TRANSFORMER_CLS_TO_WRAP": layers} if layers else {}
        found |= {"ACCELERATE_USE_FSDP": "true", **{f"FSDP_{name}": value for name, value in names.items()}}
    return found


@contextlib.contextmanager
def running_under(strategy: str, cell: str, device: str, folder: Path) -> Iterator[None]:
    """A trainer that is made and trained inside runs under the strategy."""
    added = _variables(strategy, cell, device, folder)
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def allow_fsdp_on_cpu() -> None:
    """
    Let accelerate shard over gloo. It knows FSDP for accelerators only and turns to DDP on CPUs without a word (1.15), though
    torch's `fully_shard` works there. To be removed when `AcceleratorState` takes `MULTI_CPU` for FSDP.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    start = PartialState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        if "ACCELERATE_USE_FSDP" in os.environ and self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU  # what it is called until FSDP takes its place

    PartialState.__init__ = init  # type: ignore[method-assign]


def kind_of(model: torch.nn.Module) -> str:
    """The strategy that a wrapped model runs under, by its type."""
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return "ddp"
    if isinstance(model, torch.distributed.fsdp.FSDPModule):
        return "fsdp2"
    return f"zero{model.zero_optimization_stage()}" if hasattr(model, "zero_optimization_stage") else "alone"


def _held_share(model: torch.nn.Module) -> float:
    """Share of the weights that this process holds outside forwards."""
    held = total = 0
    for p in model.parameters():
        total += getattr(p, "ds_numel", p.numel())
        held += p.ds_tensor.numel() if hasattr(p, "ds_tensor") else getattr(p, "to_local", lambda p=p: p)().numel()
    return held / total


def _run(cells: Sequence[str] | None, strategies: Sequence[str], folder: Path, device: str, precision: str) -> None:
    """One process's part: trains the cells and leaves a file for each."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from tests.distributed.cells import all_cells, cells_of
    from tests.invariance.two_processes import measured

    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    extra: dict[str, Any] = {"use_cpu": device == "cpu", "bf16": precision == "bfloat16"}
    if device == "cpu":
        allow_fsdp_on_cpu()
    known = all_cells()
    for strategy in strategies:
        for name in cells or cells_of(strategy):
            print(f"{strategy} {name}", flush=True)
            started = time.perf_counter()
            try:
                output = folder / f"output.{strategy}.{name}"  # of all processes, as checkpoints want it
                with running_under(strategy, name, device, folder):
                    trainer = known[name](str(output), ROWS // processes, **extra)
                    found = measured(trainer)
                    found["kind"] = kind_of(trainer.model_wrapped)
                    found["held_share"] = _held_share(trainer.model_wrapped)
                    # Of a bank, and without one, each process samples latents for as many steps as its own rows ask for
                    found["samples"] = hasattr(trainer, "latent_bank")
                    found["seconds"] = time.perf_counter() - started
            except Exception:
                found = {"error": traceback.format_exc()}
                print(found["error"], flush=True)  # the other process may wait for this one now, and end the run
            torch.save(found, folder / (_DONE % (strategy, name, rank)))
            # transformers takes ZeRO-3 to be on, and splits what is made, while something keeps the last cell's trainer
            unset_hf_deepspeed_config()
    if torch.distributed.is_initialized():  # not where every cell failed at the start
        torch.distributed.destroy_process_group()


# ---- Starting processes, and comparing what they found ----


def launch(
    cells: Sequence[str] | None, strategies: Sequence[str], *, device: str = "cpu", precision: str = "float32",
    timeout: float = 600,
) -> Found:  # fmt: skip
    """
    Train cells in one process (strategy `"alone"`) or in two.

    Args:
        cells: names from `cells_of`; `None`: all that it has for the strategy.
        strategies: each trains all cells.
        device: `"cpu"` (gloo) or `"cuda"` (NCCL).
        precision: `"float32"` or `"bfloat16"`.
        timeout: in seconds, for all of them.

    Returns:
        What each process found, by strategy and cell.

    Raises:
        RuntimeError: a process died or hung; the message says in which cell, and has the end of what it wrote.
    """
    arguments = ["--strategies", *strategies, "--device", device, "--precision", precision]
    arguments += ["--cells", *cells] if cells else []
    many = list(strategies) != ["alone"]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)] if many else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if device == "cpu":
        env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    elif not many:
        env["CUDA_VISIBLE_DEVICES"] = "0"  # the Trainer would use all of them
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, *start, str(Path(__file__)), "--worker", name, *arguments]
        with open(folder / "output.txt", "w+b") as output:
            process = subprocess.Popen(
                command, cwd=folder, env=env, stdout=output, stderr=output, start_new_session=True
            )
            try:
                problem = f"exit status {process.returncode}" if process.wait(timeout) else None
            except subprocess.TimeoutExpired:
                problem = f"still running after {timeout:g} seconds"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # torchrun leaves its workers behind when it is killed
                process.wait()
            output.seek(0)
            written = output.read().decode(errors="replace")
        if problem:
            begun = [line for line in written.splitlines() if line.split(" ")[0] in strategies]
            raise RuntimeError(f"{problem}; last begun: {begun[-1:]}\n{written[-6000:]}")
        found: Found = {}
        for path in sorted(folder.glob("*.rank*.pt")):
            strategy, cell, _, _ = path.name.split(".")
            found.setdefault((strategy, cell), []).append(torch.load(path))
        return found


def compare(alone: dict[str, Any], ranks: list[dict[str, Any]], strategy: str, *, precision: str = "float32") -> float:
    """
    Largest difference of a weight between one process and two, in the unit of `TOLERANCE`.

    Raises:
        AssertionError: an error in a process, another strategy than was asked for, weights that are not split where they
            should be, processes that differ in their weights or in the number of their forwards, or a training that hardly
            moves any weight, which would be equal to anything.
    """
    for found in (alone, *ranks):
        assert "error" not in found, found["error"]
    first, second = ranks
    assert alone["kind"] == "alone" and alone["num_processes"] == 1
    split = strategy in ("zero3", "fsdp2")
    for found in ranks:
        assert (found["kind"], found["num_processes"]) == (strategy, PROCESSES)
        assert found["held_share"] < 0.6 if split else found["held_share"] == 1, found["held_share"]
    # Under FSDP and ZeRO-3 a forward is collective: a process that makes one more waits for ever
    assert first["forwards"] > 0 and second["forwards"] > 0
    assert first["forwards"] == second["forwards"] or (first["samples"] and not split)
    # The same work, give or take padding
    assert 0.5 < first["operations"] / alone["operations"] < 2, (first["operations"], alone["operations"])
    assert alone["weights"].keys() == first["weights"].keys()
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    assert alone["moved"] > 100 * TOLERANCE["float32"], alone["moved"]
    difference = max((weight - alone["weights"][name]).abs().max().item() for name, weight in first["weights"].items())
    return difference if precision == "float32" else difference / alone["moved"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = ["ddp", "fsdp2", *(["zero2", "zero3"] if has_deepspeed() else [])]
    parser.add_argument("--strategies", nargs="+", default=here, help="default: those installed, %(default)s")
    parser.add_argument("--cells", nargs="+", help="default: all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=list(TOLERANCE), default="float32")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one start")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker is not None:
        _run(given.cells, given.strategies, given.worker, given.device, given.precision)
        return 0

    how: dict[str, Any] = {"device": given.device, "precision": given.precision, "timeout": given.timeout}
    alone = launch(given.cells, ["alone"], **how)
    failed = 0
    print("| strategy | cell | largest difference | forwards | seconds |\n|---|---|---|---|---|")
    for strategy in given.strategies:
        for (_, cell), ranks in launch(given.cells, [strategy], **how).items():
            try:
                difference = compare(alone["alone", cell][0], ranks, strategy, precision=given.precision)
                result = f"{difference:.1e}" + ("" if difference < TOLERANCE[given.precision] else " **too large**")
                failed += difference >= TOLERANCE[given.precision]
            except AssertionError as error:
                result, failed = f"**{str(error).strip().splitlines()[-1]}**", failed + 1
            seconds = ranks[0].get("seconds", float("nan"))
            print(f"| {strategy} | {cell} | {result} | {ranks[0].get('forwards')} | {seconds:.1f} |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
