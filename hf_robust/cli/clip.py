"""`hf-robust clip`."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModel, AutoProcessor
from trl import ModelConfig, ScriptArguments, TrlParser

from hf_robust.cli.arguments import adapter_config, check_not_quantized, finish, loading_arguments
from hf_robust.cli.images import load_rows
from hf_robust.trainers import RobustCLIPConfig, RobustCLIPTrainer


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Train with [`~hf_robust.trainers.RobustCLIPTrainer`]. Beside the trained tower, `vision_tower/` is the plain vision model
    and `clip/` the whole CLIP.

    Args:
        arguments: command line after `hf-robust clip`.

    Returns:
        Exit status.
    """
    parser = TrlParser((ScriptArguments, RobustCLIPConfig, ModelConfig), prog="hf-robust clip")
    script_args, training_args, model_args = parser.parse_args_and_config(args=arguments, fail_with_unknown_args=True)
    if model_args.model_name_or_path is None:
        parser.error("--model_name_or_path is required: a folder or a Hub id of a CLIP model")
    if script_args.dataset_name is None:
        parser.error("--dataset_name is required: rows of `image` and, for tecoa and pmg_aft, `labels`")
    check_not_quantized(model_args, "hf-robust clip")
    evaluates = str(getattr(training_args.eval_strategy, "value", training_args.eval_strategy)) != "no"
    trainer = RobustCLIPTrainer(
        AutoModel.from_pretrained(model_args.model_name_or_path, **loading_arguments(model_args)),
        training_args,
        train_dataset=load_rows(script_args, script_args.dataset_train_split, script_args.dataset_streaming),
        eval_dataset=load_rows(script_args, script_args.dataset_test_split, False) if evaluates else None,
        processing_class=AutoProcessor.from_pretrained(
            model_args.model_name_or_path, revision=model_args.model_revision
        ),
        peft_config=adapter_config(model_args, None),
    )
    finish(trainer, script_args, training_args)
    folder = Path(training_args.output_dir)
    trainer.save_vision_tower(folder / "vision_tower")
    if trainer.clip is not None:
        trainer.save_clip(folder / "clip")
    return 0
