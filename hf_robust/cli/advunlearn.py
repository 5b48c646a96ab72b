"""`hf-robust advunlearn`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig, ScriptArguments, TrlParser

from hf_robust.cli.arguments import finish
from hf_robust.cli.diffusion import AdapterArguments, load_diffusion_model
from hf_robust.data.retain_prompts import read_prompts
from hf_robust.trainers import AdvUnlearnConfig, AdvUnlearnTrainer


@dataclass
class ErasedPromptArguments:
    """
    Prompts to train on.

    Parameters:
        prompts (`list[str]`, *optional*):
            Prompts that draw what is erased, or one path of a .txt, .json or .csv file of them. Default: the concepts.
    """

    prompts: list[str] | None = field(
        default=None, metadata={"help": "Prompts that draw the concepts, or a file of them. Default: the concepts."}
    )

    def load(self) -> list[str] | None:
        """The prompts, out of their file if it is one."""
        if self.prompts is not None and len(self.prompts) == 1 and Path(self.prompts[0]).is_file():
            return read_prompts(self.prompts[0], "prompts")
        return self.prompts


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Train with [`~hf_robust.trainers.AdvUnlearnTrainer`].

    Args:
        arguments: command line after `hf-robust advunlearn`.

    Returns:
        Exit status.
    """
    kinds = (ScriptArguments, ErasedPromptArguments, AdapterArguments, AdvUnlearnConfig, ModelConfig)
    parser = TrlParser(kinds, prog="hf-robust advunlearn")
    script_args, prompt_args, adapter_args, training_args, model_args = parser.parse_args_and_config(
        args=arguments, fail_with_unknown_args=True
    )
    if training_args.concepts is None:
        parser.error("--concepts is required: what is to be erased")
    trainer = AdvUnlearnTrainer(
        load_diffusion_model(model_args),
        training_args,
        train_dataset=prompt_args.load(),
        peft_config=adapter_args.peft_config(model_args),
        callbacks=adapter_args.callbacks(model_args),
    )
    finish(trainer, script_args, training_args)
    return 0
