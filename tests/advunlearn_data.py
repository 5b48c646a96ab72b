"""
AdvUnlearnTrainers on tiny pipelines, and trainings whose weights must not depend on the number of processes: run as a script
by `torchrun --nproc_per_node 2 advunlearn_data.py FOLDER`, which leaves `FOLDER/rank0.pt` and `rank1.pt`.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from hf_robust import AdvUnlearnConfig, AdvUnlearnTrainer
from tests.diffusion_helpers import tiny_pipeline
from tests.trainer_data import train

RETAIN = ["a cat", "a dog", "a blue square", "a green star", "the house"]
SAMPLING = 4

# One cell for each way in which a row's work is cut up
CELLS: dict[str, dict[str, Any]] = {
    "bank": {"latent_bank_size": 20},
    "bank-accumulated": {"latent_bank_size": 20, "gradient_accumulation_steps": 2},
    "direct": {"latent_bank_size": 0},
    "unet": {"train_parts": ["xattn"], "attack_tokens": 2},
    "turns": {"latent_bank_size": 21, "retain_mode": "step"},
}


def advunlearn_trainer(
    folder: Path | str, pipeline: Any = None, trainer: dict[str, Any] | None = None, **args: Any
) -> AdvUnlearnTrainer:
    """
    float32, SGD, constant schedule, no clipping; three steps of two rows. `trainer` goes to the constructor, `args` to the
    configuration.
    """
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "optim": "sgd",
        "learning_rate": 1.0,
        "concepts": ["vangogh", "a red circle"],
        "retain_prompts": RETAIN,
        "retain_batch_size": 2,
        "sampling_steps": SAMPLING,
        "attack_steps": 2,
        "attack_step_size": 0.05,
        "attack_warmup_steps": 1,
        "latent_bank_size": 20,
        **args,
    }
    if "train_parts" in args and args["train_parts"] != ["text_encoder"]:
        settings["latent_bank_size"] = args.get("latent_bank_size")
    return AdvUnlearnTrainer(
        tiny_pipeline() if pipeline is None else pipeline, AdvUnlearnConfig(**settings), **(trainer or {})
    )


def run_cell(name: str, rows: int) -> dict[str, Any]:
    """Weights after training on windows of `rows` rows on each process, and what was logged."""
    args = CELLS[name]
    with tempfile.TemporaryDirectory() as folder:
        size = rows // args.get("gradient_accumulation_steps", 1)
        trainer = advunlearn_trainer(folder, per_device_train_batch_size=size, max_steps=2, **args)
        return {
            "weights": train(trainer),
            "logged": trainer.state.log_history,
            "num_processes": trainer.accelerator.num_processes,
            "wrapper": type(trainer.model_wrapped).__name__,
        }


def main() -> None:
    torch.set_num_threads(1)
    found = {name: run_cell(name, 2) for name in CELLS}
    torch.save(found, Path(sys.argv[1]) / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
