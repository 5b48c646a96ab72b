"""What the training commands have in common: data arguments, loading, and the last steps after training."""

import signal
from dataclasses import dataclass, field
from typing import Any

from datasets import IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from hf_robust.data import load_preferences, with_random_suffixes


@dataclass
class AdversarialDataArguments:
    """
    Where adversarial rows come from.

    Parameters:
        adversarial_dataset_name (`str`, *optional*):
            Hub id, folder or file (.csv, .json, .jsonl, .parquet) of preference rows `prompt`, `chosen`, `rejected`; or a
            behaviours file of HarmBench, AdvBench or JailbreakBench.
        adversarial_dataset_config (`str`, *optional*):
            Configuration of a Hub dataset.
        adversarial_train_split (`str`, defaults to `"train"`):
            Split to train on.
        adversarial_test_split (`str`, *optional*):
            Split to evaluate on, if any.
        adversarial_test_dataset_name (`str`, *optional*):
            Other source to evaluate on.
        adversarial_targets (`str`, *optional*):
            JSON of targets of a HarmBench behaviours file. Default: the file beside it.
        adversarial_safe_responses (`str`, *optional*):
            CSV of safe answers to a behaviours file.
        random_suffix_share (`float`, defaults to `0.0`):
            Share of the training prompts, adversarial and (for `cat`) utility ones, behind which random tokens are put, so
            that training also shows what suffix attacks look like ([`~hf_robust.data.with_random_suffixes`]).
            Conversational rows only, and none that are streamed.
        conversational (`bool`, *optional*):
            Whether plain rows become chat messages. Default: whether the tokenizer has a chat template.
    """

    adversarial_dataset_name: str | None = field(
        default=None, metadata={"help": "Preference rows or a behaviours file: Hub id, folder or file."}
    )
    adversarial_dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the adversarial Hub dataset."}
    )
    adversarial_train_split: str = field(default="train", metadata={"help": "Adversarial split to train on."})
    adversarial_test_split: str | None = field(default=None, metadata={"help": "Adversarial split to evaluate on."})
    adversarial_test_dataset_name: str | None = field(
        default=None, metadata={"help": "Adversarial rows to evaluate on, if not a split of the first source."}
    )
    adversarial_targets: str | None = field(
        default=None, metadata={"help": "JSON of the targets of a HarmBench behaviours file."}
    )
    adversarial_safe_responses: str | None = field(
        default=None, metadata={"help": "CSV of safe answers to a behaviours file."}
    )
    random_suffix_share: float = field(
        default=0.0, metadata={"help": "Share of the training prompts that random tokens follow."}
    )
    conversational: bool | None = field(
        default=None,
        metadata={"help": "Turn plain rows into chat messages. Default: whether the tokenizer has a chat template."},
    )

    def load(self, tokenizer: PreTrainedTokenizerBase, *, test: bool = False, streaming: bool = False) -> Any:
        """
        Adversarial rows.

        Args:
            tokenizer: decides whether rows become messages, unless `conversational` does.
            test: the evaluation rows instead, `None` if there are none.
            streaming: as an `IterableDataset`.
        """
        name, split = self.adversarial_dataset_name, self.adversarial_train_split
        argument = "adversarial_dataset_name"
        if test:
            if self.adversarial_test_dataset_name is None and self.adversarial_test_split is None:
                return None
            if self.adversarial_test_dataset_name is not None:
                name, argument = self.adversarial_test_dataset_name, "adversarial_test_dataset_name"
            split = self.adversarial_test_split or "train"
        if name is None:
            raise ValueError(
                f"`--{argument}` is required: a Hub id, folder or file of preference rows (`prompt`, `chosen`, `rejected`), "
                "or a behaviours file of HarmBench, AdvBench or JailbreakBench."
            )
        rows = load_preferences(
            name,
            split=split,
            name=self.adversarial_dataset_config,
            streaming=streaming,
            targets=self.adversarial_targets,
            safe_responses=self.adversarial_safe_responses,
            conversational=self.as_messages(tokenizer),
            argument=argument,
        )
        return rows if test else self.with_suffixes(rows, tokenizer)

    def with_suffixes(self, rows: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
        """
        Training rows, `random_suffix_share` of their prompts followed by random tokens.

        Args:
            rows: conversational rows.
            tokenizer: whose tokens are drawn.

        Raises:
            ValueError: streaming or plain rows, or a share outside [0, 1].
        """
        if self.random_suffix_share == 0:
            return rows
        if isinstance(rows, IterableDataset):
            raise ValueError(
                f"`--random_suffix_share {self.random_suffix_share}` needs rows that are not streamed: leave out "
                "`--dataset_streaming`, or use 0."
            )
        return with_random_suffixes(rows, tokenizer, share=self.random_suffix_share)

    def as_messages(self, tokenizer: PreTrainedTokenizerBase) -> bool | None:
        """Whether plain rows become messages; `None` leaves rows as they are."""
        if self.conversational is not None:
            return self.conversational
        return True if tokenizer.chat_template is not None else None


def load_tokenizer(model_args: ModelConfig, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """
    The tokenizer of `model_name_or_path`.

    Args:
        model_args: the model's arguments.
        trust_remote_code: run code from the model's repository; off unless asked for.

    Raises:
        ValueError: no model was named.
    """
    if model_args.model_name_or_path is None:
        raise ValueError("`--model_name_or_path` is required: a folder or a Hub id of a causal language model.")
    return AutoTokenizer.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=trust_remote_code
    )


def loading_arguments(model_args: ModelConfig) -> dict[str, Any]:
    """
    Keyword arguments of `from_pretrained`, quantisation apart.

    Args:
        model_args: the model's arguments.
    """
    kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "use_safetensors": True,
    }
    return {name: value for name, value in kwargs.items() if value is not None}


def adapter_config(model_args: ModelConfig, task_type: str | None) -> Any:
    """
    The adapter's configuration, `None` without `--use_peft`. TRL's is for a causal language model unless told otherwise, and
    PEFT then wraps no other.

    Args:
        model_args: the model's arguments.
        task_type: PEFT's name of what the model does; `None` for images.
    """
    config = get_peft_config(model_args)
    if config is not None:
        config.task_type = task_type
    return config


def check_not_quantized(model_args: ModelConfig, command: str) -> None:
    """
    Refuse to quantise a model where nothing but a language model is worth it.

    Args:
        model_args: the model's arguments.
        command: as the user wrote it.

    Raises:
        ValueError: `--load_in_4bit` or `--load_in_8bit`.
    """
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(model_args, name):
            raise ValueError(
                f"`--{name} true` quantises language models, which `{command}` does not train: leave it out, or use `--dtype "
                "bfloat16`."
            )


def model_arguments(model_args: ModelConfig, training_args: Any) -> dict[str, Any]:
    """
    Keyword arguments of a TRL trainer's constructor for the model, its quantisation and its adapter.

    Args:
        model_args: the model's arguments.
        training_args: gets `model_init_kwargs` from them, those given there first.
    """
    training_args.model_init_kwargs = {**loading_arguments(model_args), **(training_args.model_init_kwargs or {})}
    return {
        "model": model_args.model_name_or_path,
        "quantization_config": get_quantization_config(model_args),
        "peft_config": get_peft_config(model_args),
    }


def finish(trainer: Any, script_args: ScriptArguments, training_args: TrainingArguments) -> None:
    """
    Train, save, and push if asked to. Where checkpoints are saved, SIGTERM saves one and ends the process with status 143.

    Args:
        trainer: ready to train.
        script_args: names the dataset in the model card.
        training_args: where to save and whether to push.
    """
    saves = str(getattr(training_args.save_strategy, "value", training_args.save_strategy)) != "no"
    trainer.args.enable_jit_checkpoint = saves or trainer.args.enable_jit_checkpoint
    resumed = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resumed).lower() == "true" else resumed)
    if trainer.interrupted:  # what is there is no trained model: it is neither saved as one nor pushed
        trainer.accelerator.print(
            f"Stopped by SIGTERM behind step {trainer.state.global_step} of {trainer.state.max_steps}, with a checkpoint in "
            f"{training_args.output_dir}. The same command with --resume_from_checkpoint true goes on from there."
        )
        trainer.end()
        raise SystemExit(128 + signal.SIGTERM)
    trainer.save_model(training_args.output_dir)
    if trainer.is_world_process_zero():
        trainer.save_state()
    trainer.accelerator.print(f"Saved to {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()
