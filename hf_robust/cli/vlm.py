"""`hf-robust vlm`."""

from collections.abc import Sequence

from transformers import AutoProcessor
from trl import ModelConfig, ScriptArguments, TrlParser

from hf_robust.cli.arguments import finish, model_arguments
from hf_robust.cli.images import load_rows
from hf_robust.trainers import RobustVLMConfig, RobustVLMTrainer


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Train with [`~hf_robust.trainers.RobustVLMTrainer`].

    Args:
        arguments: command line after `hf-robust vlm`.

    Returns:
        Exit status.
    """
    parser = TrlParser((ScriptArguments, RobustVLMConfig, ModelConfig), prog="hf-robust vlm")
    script_args, training_args, model_args = parser.parse_args_and_config(args=arguments, fail_with_unknown_args=True)
    if model_args.model_name_or_path is None:
        parser.error("--model_name_or_path is required: a folder or a Hub id of a vision-language model")
    if script_args.dataset_name is None:
        parser.error("--dataset_name is required: rows of `images`, `prompt` and `completion`")
    evaluates = str(getattr(training_args.eval_strategy, "value", training_args.eval_strategy)) != "no"
    trainer = RobustVLMTrainer(
        args=training_args,
        train_dataset=load_rows(script_args, script_args.dataset_train_split, script_args.dataset_streaming),
        eval_dataset=load_rows(script_args, script_args.dataset_test_split, False) if evaluates else None,
        processing_class=AutoProcessor.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            trust_remote_code=training_args.trust_remote_code,
        ),
        **model_arguments(model_args, training_args),
    )
    finish(trainer, script_args, training_args)
    return 0
