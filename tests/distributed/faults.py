"""
Whether a training that is killed again and again, and resumed, ends with the weights of one that nobody touched.

    python tests/distributed/faults.py --kills 20 --seed 0 --output kills.json
    python tests/distributed/faults.py --kills 6 --trainers cat clip --processes 2
    python tests/distributed/faults.py --kills 4 --trainers cat --strategy fsdp2

`kill -9` meets the whole run or one process of two, at a random moment of a step or while a checkpoint is being written, of
which only the newest is kept. The same command with `resume_from_checkpoint` goes on from there, as `hf-robust` does it. The
weights have to be equal bit for bit. The tests use [`Run`] and [`kill_and_resume`].
"""

import argparse
import contextlib
import functools
import json
import multiprocessing.forkserver
import os
import random
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy
import psutil
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
STEPS, SAVE_STEPS = 14, 2
# Rows of an optimizer step, over all processes
ROWS = 4
KILLS_OF_A_TRAINING = 2
# Seconds behind each step; between two files of a checkpoint at most; in which a whole one is surely written
PACE, FILE_PAUSE, SAVING = 0.15, 0.3, 0.8
TRAINERS = ("cat", "capo", "noisefit", "unlearn", "free", "pgd", "clip", "vlm", "diffusion", "advunlearn")
_PROGRESS = "progress.txt"


@dataclass
class Kill:
    """
    One kill, and what came of it.

    Attributes:
        trainer: name.
        processes: of the training.
        killed: `"run"`, or the process: `"rank 0"`, `"rank 1"`.
        moment: the step behind which, or the checkpoint in whose writing it struck.
        incomplete: checkpoints that it left half written.
        resumed_from: the step that training went on from; 0: from the beginning.
        equal: whether the weights at the end of the training are those of the uninterrupted one.
        problem: what else went wrong.
        strategy: that two processes run under: `"ddp"`, `"zero2"`, `"zero3"` or `"fsdp2"`.
    """

    trainer: str
    processes: int
    killed: str
    moment: str
    incomplete: list[str] = field(default_factory=list)
    resumed_from: int | None = None
    equal: bool | None = None
    problem: str | None = None
    strategy: str = "ddp"


# ---- What a process trains ----


def _builders() -> dict[str, Callable[..., Any]]:
    """Trainers that draw random numbers (dropout, noise, random starts), of the output folder, batch size and settings."""
    from peft import LoraConfig

    from tests.adversarial_data import adversarial_trainer, tiny_classifier
    from tests.advunlearn_data import advunlearn_trainer
    from tests.diffusion_trainer_data import diffusion_trainer, text_lora, unet_lora
    from tests.helpers import tiny_model
    from tests.test_robust_clip import clip_trainer, tiny_clip
    from tests.trainer_data import capo_trainer, cat_trainer, lora, noisefit_trainer, utility_rows
    from tests.unlearn_data import tokenised, unlearn_trainer
    from tests.vlm_data import tiny_llava, vlm_trainer

    def model() -> Any:
        return tiny_model(attention_dropout=0.1)

    def classifier(folder: str, **args: Any) -> Any:
        return adversarial_trainer(tiny_classifier(dropout=0.1), folder, **args)

    retained = {"retain_dataset": tokenised(utility_rows(5))}
    towers = {"peft_config": LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])}
    unet = {"peft_config": {"unet": unet_lora(lora_dropout=0.1)}}
    encoder = {"peft_config": {"text_encoder": text_lora(lora_dropout=0.1)}}
    denoising = {"attack_epsilon": 0.5, "attack_steps": 2, "attack_init": "random", "adversarial_weight": 0.5}
    # Drawn anew in the middle, so that a resumed run has to find the bank that it was in
    bank = {"latent_bank_size": 10, "latent_bank_refresh_steps": 5}
    return {
        "cat": lambda folder, **args: cat_trainer(model(), folder, attack_epsilon=0.3, **args),
        "capo": lambda folder, **args: capo_trainer(
            model(), folder, {"peft_config": lora(lora_dropout=0.1)}, attack_epsilon=0.3, **args
        ),
        "noisefit": lambda folder, **args: noisefit_trainer(model(), folder, **args),
        "unlearn": lambda folder, **args: unlearn_trainer(model(), folder, retained, retain_type="kl", **args),
        "free": lambda folder, **args: classifier(folder, loss_type="free_at", num_replays=2, **args),
        "pgd": lambda folder, **args: classifier(folder, **args),
        "clip": lambda folder, **args: clip_trainer(tiny_clip(), folder, towers, **args),
        "vlm": lambda folder, **args: vlm_trainer(tiny_llava(), folder, towers, perturbation="both", **args),
        "diffusion": lambda folder, **args: diffusion_trainer(None, folder, unet, **denoising, **args),
        "advunlearn": lambda folder, **args: advunlearn_trainer(folder, None, encoder, **bank, **args),
    }


def build(name: str, folder: Path, processes: int) -> Any:
    """A trainer by name, all of whose checkpoint matters: AdamW, a schedule, random numbers."""
    settings = {
        "max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVE_STEPS, "save_total_limit": 1,
        "per_device_train_batch_size": ROWS // processes, "optim": "adamw_torch", "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.01, "max_grad_norm": 1.0,
    }  # fmt: skip
    return _builders()[name](str(folder), **settings)


def train_to_the_end(trainer: Any) -> None:
    """Resume where there is something to resume from, train and save, as `hf-robust` does it."""
    from hf_robust.cli.arguments import finish

    trainer.args.resume_from_checkpoint = "true"
    try:
        finish(trainer, SimpleNamespace(dataset_name=None), trainer.args)
    except ValueError as error:
        if "there is no whole checkpoint" not in str(error):
            raise
        trainer.args.resume_from_checkpoint = None
        finish(trainer, SimpleNamespace(dataset_name=None), trainer.args)


def _slow_down(trainer: Any, folder: Path, rank: int, pace: float) -> None:
    """Tell where training is, and leave time to strike: behind steps, and between a checkpoint's files."""
    from transformers import TrainerCallback

    from hf_robust.trainers.checkpoints import problem_of

    pauses = random.Random(f"{os.getpid()}")  # of its own: training must not notice

    def tell(what: str) -> None:
        if rank == 0:
            with open(folder / _PROGRESS, "a", encoding="utf-8") as file:
                file.write(f"{what}\n")

    class Told(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            tell(f"resumed {state.global_step}")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            tell(f"step {state.global_step}")
            time.sleep(pace)

    def after_a_pause(write: Callable[..., Any]) -> Callable[..., Any]:
        def paused(*args: Any, **kwargs: Any) -> Any:
            time.sleep(pauses.uniform(0, FILE_PAUSE))
            return write(*args, **kwargs)

        return paused

    save = trainer._save_checkpoint

    def told_save(*args: Any, **kwargs: Any) -> None:
        tell(f"saving {trainer.state.global_step}")
        save(*args, **kwargs)

    for path in sorted(Path(trainer.args.output_dir).glob("checkpoint-*")):
        tell(f"{'incomplete' if problem_of(path) else 'whole'} {path.name.split('-')[1]}")
    trainer.add_callback(Told())
    trainer._save_checkpoint = told_save
    # Between weights, optimizer, random numbers and record. Each process pauses for itself, as on a slow network disk
    for name in ("_save_optimizer_and_scheduler", "_save_rng_state", "_run_settings"):
        setattr(trainer, name, after_a_pause(getattr(trainer, name)))


def _work(trainers: Sequence[str], folder: Path, pace: float | None, strategy: str) -> None:
    """One process's part. Without a pace it is one that nobody touches."""
    import torch
    from transformers import set_seed
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from tests.distributed.parity import allow_fsdp_on_cpu, kind_of, running_under

    torch.set_num_threads(1)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    (folder / f"rank{rank}.pid").write_text(str(os.getpid()))
    allow_fsdp_on_cpu()
    for name in trainers:
        set_seed(0)  # for fresh adapters
        with running_under(strategy, name, "cpu", folder):
            trainer = build(name, folder / name, processes)
            if pace is not None:
                _slow_down(trainer, folder, rank, pace)
            if name != trainers[-1]:
                trainer.end = lambda: None  # it would part the processes for good
            train_to_the_end(trainer)
        assert kind_of(trainer.model_wrapped) == (strategy if processes > 1 else "alone")
        unset_hf_deepspeed_config()


# ---- Starting, killing, comparing ----


@functools.cache
def _server() -> Any:
    """
    Starts processes that have everything imported, which takes longer than a training here: they are forked from one that
    does nothing else.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            *("tests.adversarial_data", "tests.test_robust_clip", "tests.unlearn_data", "tests.vlm_data"),
            *("tests.advunlearn_data", "tests.diffusion_trainer_data", "hf_robust.cli.arguments"),
        ]
    )
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    with mock.patch.dict(os.environ, {**variables, "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu"}):
        multiprocessing.forkserver.ensure_running()
    return context


def _start(folder: Path, trainers: Sequence[str], processes: int, pace: float | None, strategy: str) -> None:
    """The process of a run: it trains, or is the agent of torchrun, whose processes train."""
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    if processes == 1:
        _work(trainers, folder, pace, "ddp")
        return
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = (
        "300"  # seconds from SIGTERM to SIGKILL; 30 are few on a busy machine
    )
    # As `torchrun --standalone`, but for processes that are forked
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, start_method="fork",
    )  # fmt: skip
    elastic_launch(config, _work)(trainers, folder, pace, strategy)


class Run:
    """
    A training in processes of its own. Used as a context manager: nothing of it is left behind.

    Args:
        folder: of the trainings, each in a folder of its name.
        trainers: names, trained one behind the other.
        processes: 1, or more under torchrun's agent.
        pace: seconds behind each step; `None`: no pauses, and nothing is told.
        timeout: seconds for any wait.
        strategy: of several processes: `"ddp"`, `"zero2"`, `"zero3"` or `"fsdp2"`.
    """

    def __init__(
        self, folder: Path, trainers: Sequence[str], processes: int, *, pace: float | None = PACE,
        timeout: float = 300, strategy: str = "ddp",
    ):  # fmt: skip
        self.folder, self.timeout = folder, timeout
        for path in (*folder.glob("rank*.pid"), folder / _PROGRESS, folder / "output.txt"):
            path.unlink(missing_ok=True)
        self.process = _server().Process(target=_start, args=(folder, list(trainers), processes, pace, strategy))
        self.process.start()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *args: Any) -> None:
        if self.process.is_alive():
            self.kill()
        self.process.join(self.timeout)

    def said(self) -> str:
        path = self.folder / "output.txt"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def told(self, what: str) -> list[int]:
        """
        Steps of which the training told this, in order: the checkpoints that it found `"whole"` or `"incomplete"`, where it
        `"resumed"`, each `"step"`, and those that it began `"saving"`.
        """
        path = self.folder / _PROGRESS
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        return [int(line.split()[1]) for line in lines if line.startswith(f"{what} ") and line.endswith("\n")]

    def wait_for(self, what: str, step: int = 0, folder: Path | None = None) -> bool:
        """
        Wait until this is told of the step or a later one.

        Args:
            what: as [`told`] takes it.
            step: the first that counts.
            folder: has to be there, too.

        Returns:
            False: the training has ended well before.

        Raises:
            RuntimeError: it failed, or takes too long.
        """
        end = time.monotonic() + self.timeout
        while True:
            status = self.process.exitcode  # before what it told last
            if any(found >= step for found in self.told(what)) and (folder is None or folder.is_dir()):
                return True
            if status == 0:
                return False
            if status is not None or time.monotonic() > end:
                problem = f"exit status {status}" if status is not None else f"{self.timeout:g} seconds"
                raise RuntimeError(f"{problem} without '{what} {step}'\n{self.said()[-6000:]}")
            time.sleep(0.003)

    def ends(self) -> int:
        """
        Wait for the end.

        Returns:
            The exit status; negative: minus the signal.

        Raises:
            RuntimeError: it takes too long, or a process is left behind.
        """
        self.process.join(self.timeout)
        if self.process.exitcode is None:
            raise RuntimeError(f"still running after {self.timeout:g} seconds\n{self.said()[-6000:]}")
        end = time.monotonic() + 10  # what was killed ends in its own time
        while left := [rank for rank, pid in self.pids().items() if _is_alive(pid)]:
            if time.monotonic() > end:
                raise RuntimeError(f"the run has ended without rank {', '.join(map(str, left))}")
            time.sleep(0.01)
        return self.process.exitcode

    def pids(self) -> dict[int, int]:
        """The processes that train, by rank."""
        return {int(path.stem[4:]): int(path.read_text()) for path in sorted(self.folder.glob("rank*.pid"))}

    def kill(self, rank: int | None = None) -> None:
        """
        `kill -9`.

        Args:
            rank: of the process. Default: all of them, and the agent.
        """
        with contextlib.suppress(psutil.NoSuchProcess):
            run = psutil.Process(self.process.pid)
            struck = [*run.children(recursive=True), run] if rank is None else [psutil.Process(self.pids()[rank])]
            for process in struck:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def trained(folder: Path, name: str) -> dict[str, Any]:
    """The weights that a training has saved at its end."""
    base = folder / name
    # A pipeline's are in folders
    files = {path.relative_to(base): path for path in sorted(base.rglob("*.safetensors"))}
    files = {place: path for place, path in files.items() if not place.parts[0].startswith("checkpoint-")}
    if not files:
        raise RuntimeError(f"{base} holds no weights")
    return {f"{place} {key}": value for place, path in files.items() for key, value in load_file(path).items()}


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether two sets of weights are equal bit for bit, and numbers."""
    return left.keys() == right.keys() and all(numpy.array_equal(left[name], right[name]) for name in left)


def kill_and_resume(
    folder: Path, name: str, processes: int, kills: int, draw: random.Random, expected: dict[str, Any], *,
    while_saving: bool | None = None, timeout: float = 300, strategy: str = "ddp",
) -> list[Kill]:  # fmt: skip
    """
    One training, killed several times and finished.

    Args:
        folder: an empty one.
        name: of the trainer.
        processes: of the training.
        kills: how often.
        draw: what is killed, and when.
        expected: weights of the uninterrupted training.
        while_saving: whether checkpoints in writing are struck. Default: drawn each time.
        timeout: seconds for any wait.
        strategy: of several processes, see [`Run`].

    Returns:
        The kills; fewer than asked for if the training was faster than the strike.
    """
    found: list[Kill] = []
    reach = (STEPS - 2) // kills
    try:
        for _ in range(kills):
            with Run(folder, [name], processes, timeout=timeout, strategy=strategy) as run:
                if not _begins(run, found):
                    break
                start = run.told("resumed")[0]
                saving = draw.random() < 0.5 if while_saving is None else while_saving
                killed = draw.choice(["run", *(f"rank {rank}" for rank in range(processes) if processes > 1)])
                step = start + draw.randint(1, reach)
                step += -step % SAVE_STEPS if saving else 0
                place = folder / name / f"checkpoint-{step}" if saving else None
                if not run.wait_for("saving" if saving else "step", step, place):
                    break
                time.sleep(draw.uniform(0, SAVING if saving else PACE))
                if not run.process.is_alive():
                    break
                run.kill(None if killed == "run" else int(killed[-1]))
                if run.ends() == 0:
                    raise RuntimeError("the exit status of a killed run is 0")
                moment = f"{'checkpoint' if saving else 'step'} {run.told('saving' if saving else 'step')[-1]}"
            found.append(Kill(name, processes, killed, moment, strategy=strategy))
        with Run(folder, [name], processes, timeout=timeout, strategy=strategy) as run:
            _begins(run, found)
            if run.ends():
                raise RuntimeError(f"exit status {run.process.exitcode}\n{run.said()[-6000:]}")
        equal = same(trained(folder, name), expected)
        for kill in found:
            kill.equal = equal
    except RuntimeError as error:
        found = found or [Kill(name, processes, "nothing", "start", strategy=strategy)]
        found[-1].problem, found[-1].equal = str(error), False
    return found


def _begins(run: Run, before: list[Kill]) -> bool:
    """Wait for the first step, and look whether training goes on from where it should and names what it passes over."""
    if not run.wait_for("resumed"):
        return False
    if before:
        last = before[-1]
        last.resumed_from = run.told("resumed")[0]
        last.incomplete = [f"checkpoint-{step}" for step in run.told("incomplete")]
        if last.resumed_from not in (run.told("whole") or [0]):
            raise RuntimeError(f"resumed from step {last.resumed_from}, and whole are {run.told('whole')}")
        for name in last.incomplete:
            if f"{name} is passed over" not in run.said():
                raise RuntimeError(f"{name} is not whole and not named")
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="in all, %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed and when, %(default)s")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of a training, in turn")
    parser.add_argument(
        "--strategy", choices=["ddp", "zero2", "zero3", "fsdp2"], default="ddp", help="of two processes, %(default)s"
    )
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=TRAINERS, help="in turn; default: all")
    parser.add_argument("--output", type=Path, help="JSON file for the table")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for any wait, %(default)g")
    given = parser.parse_args(arguments)
    began, trainers, strategy = time.monotonic(), list(given.trainers), given.strategy
    counts = list(given.processes) if strategy == "ddp" else [2]
    # Every pair in the end: trainers in turn, and the number of processes moves on each time they are through
    rounds = [
        (trainer, counts[(turn + shift) % len(counts)])
        for shift in range(len(counts))
        for turn, trainer in enumerate(trainers)
    ]
    done: list[Kill] = []
    with tempfile.TemporaryDirectory() as base:
        expected: dict[tuple[str, int], dict[str, Any]] = {}
        needed = rounds[: -(-given.kills // KILLS_OF_A_TRAINING)]
        for processes in sorted({count for _, count in needed}):
            names = sorted({name for name, count in needed if count == processes})
            folder = Path(base) / f"uninterrupted-{processes}"
            folder.mkdir()
            with Run(folder, names, processes, pace=None, timeout=3 * given.timeout, strategy=strategy) as run:
                if run.ends():
                    print(run.said()[-6000:])
                    return 1
            expected |= {(name, processes): trained(folder, name) for name in names}
        print("| kill | trainer | processes | killed | at | left incomplete | resumed from | equal |")
        print("|---" * 8 + "|", flush=True)
        for turn in range(2 * given.kills):
            missing = given.kills - len(done)
            if missing <= 0 or any(kill.problem for kill in done):
                break
            name, processes = needed[turn % len(needed)]
            folder = Path(base) / f"{turn}-{name}-{processes}"
            folder.mkdir()
            draw = random.Random(f"{given.seed} {turn}")
            kills = min(KILLS_OF_A_TRAINING, missing)
            how: dict[str, Any] = {"timeout": given.timeout, "strategy": strategy}
            found = kill_and_resume(folder, name, processes, kills, draw, expected[name, processes], **how)
            for kill in found:
                done.append(kill)
                under = f"{kill.processes}{'' if strategy == 'ddp' else f', {strategy}'}"
                cells = (len(done), kill.trainer, under, kill.killed, kill.moment)
                left = ", ".join(kill.incomplete) or "-"
                end = "yes" if kill.equal else "**no**"
                print("| " + " | ".join(map(str, (*cells, left, kill.resumed_from, end))) + " |", flush=True)
    seconds = time.monotonic() - began
    failed = sum(not kill.equal for kill in done)
    short = len(done) < given.kills
    print(f"\n{len(done)} kills, {failed} not equal, {seconds:.0f} s")
    for kill in done:
        if kill.problem:
            print(f"\n{kill.trainer}, {kill.processes} processes: {kill.problem}")
    if given.output is not None:
        content = {"seed": given.seed, "seconds": round(seconds, 1), "kills": [asdict(kill) for kill in done]}
        given.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return int(failed > 0 or short)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
