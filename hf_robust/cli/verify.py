"""`hf-robust verify`: measure again what a model card claims."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-robust verify",
        description="Run the evaluation of a model card again, with the card's own settings, and print claim and new value "
        "side by side.",
        epilog="Exit status: 0 if every claim that can be checked holds, 1 if one does not, 2 if none can be checked.",
    )
    parser.add_argument("model", metavar="DIR_OR_ID", help="Folder or Hub id of the model and its card.")
    parser.add_argument("--behaviors", metavar="FILE", help="The attacked behaviours (default: behaviors.jsonl there).")
    parser.add_argument("--limit", type=int, metavar="N", help="The first N prompts only: faster, wider intervals.")
    parser.add_argument("--model_name_or_path", help="Model to measure, where the card lies apart from it.")
    parser.add_argument("--base_model", help="Base of an adapter, or an erased pipeline's original.")
    parser.add_argument("--judge", help="The card's judge, where it is a classifier: folder or Hub id.")
    parser.add_argument("--judge_positive", default="1", help="The classifier's label that means success.")
    parser.add_argument("--revision", help="Revision of the Hub repository.")
    parser.add_argument(
        "--output_dir", help="Keep records there, to go on after an interruption (default: nothing kept)."
    )
    parser.add_argument("--no_progress", action="store_true", help="No progress bar.")
    return parser


def _load_judge(options: argparse.Namespace) -> Any:
    """The classifier of `--judge`: of pictures where the card is about a model that draws."""
    from hf_robust.report.claims import ModelFiles, read_claims

    claims = read_claims(ModelFiles(options.model, options.revision))
    if any(claim.args.get("task") == "text-to-image" for claim in claims):
        from hf_robust.metrics.image_judges import ImageJudge

        return ImageJudge(options.judge, label=options.judge_positive)
    from hf_robust.cli.evaluate import EvaluateArguments, load_judge

    return load_judge(EvaluateArguments(judge=options.judge, judge_positive=options.judge_positive))


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Check a card.

    Args:
        arguments: command line after `hf-robust verify`.

    Returns:
        Exit status: 0 if every checkable claim holds, 1 if one does not, 2 if no claim can be checked.
    """
    options = _parser().parse_args(arguments)

    from hf_robust.report.verify import FAILS, HOLDS, UNCHECKED, format_checks, verify

    try:
        judge = None
        if options.judge is not None:
            judge = _load_judge(options)
        checks = verify(
            options.model,
            behaviors=options.behaviors,
            limit=options.limit,
            model=options.model_name_or_path,
            base_model=options.base_model,
            judge=judge,
            revision=options.revision,
            output_dir=options.output_dir,
            progress=not options.no_progress,
        )
    except (OSError, ValueError) as error:
        print(f"hf-robust verify: {error}", file=sys.stderr)
        return 2
    if not checks:
        print(f"hf-robust verify: the card of {options.model} claims no figure.", file=sys.stderr)
        return 2
    print(format_checks(checks))
    counts = {status: sum(check.status == status for check in checks) for status in (HOLDS, FAILS, UNCHECKED)}
    print("\n" + ", ".join(f"{count} {status}" for status, count in counts.items()) + ".")
    if counts[FAILS]:
        return 1
    return 0 if counts[HOLDS] else 2
