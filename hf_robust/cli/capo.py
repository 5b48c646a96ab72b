"""`hf-robust capo`."""

from collections.abc import Sequence

from trl import ModelConfig, ScriptArguments, TrlParser

from hf_robust.cli.arguments import AdversarialDataArguments, finish, load_tokenizer, model_arguments
from hf_robust.trainers import CAPOConfig, CAPOTrainer


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Train with [`~hf_robust.trainers.CAPOTrainer`]. The preference rows are `--adversarial_dataset_name` or, as for TRL's
    own command, `--dataset_name`.

    Args:
        arguments: command line after `hf-robust capo`.

    Returns:
        Exit status.
    """
    parser = TrlParser((ScriptArguments, AdversarialDataArguments, CAPOConfig, ModelConfig), prog="hf-robust capo")
    script_args, data_args, training_args, model_args = parser.parse_args_and_config(
        args=arguments, fail_with_unknown_args=True
    )
    if data_args.adversarial_dataset_name is None:
        data_args.adversarial_dataset_name = script_args.dataset_name
        data_args.adversarial_dataset_config = script_args.dataset_config
        data_args.adversarial_train_split = script_args.dataset_train_split
    elif script_args.dataset_name is not None:
        parser.error("give the preference rows once, as --adversarial_dataset_name or as --dataset_name")
    tokenizer = load_tokenizer(model_args, training_args.trust_remote_code)
    evaluates = str(getattr(training_args.eval_strategy, "value", training_args.eval_strategy)) != "no"
    if evaluates and data_args.adversarial_test_dataset_name is None and data_args.adversarial_test_split is None:
        data_args.adversarial_test_split = script_args.dataset_test_split
    trainer = CAPOTrainer(
        args=training_args,
        train_dataset=data_args.load(tokenizer, streaming=script_args.dataset_streaming),
        eval_dataset=data_args.load(tokenizer, test=True) if evaluates else None,
        processing_class=tokenizer,
        **model_arguments(model_args, training_args),
    )
    finish(trainer, script_args, training_args)
    return 0
