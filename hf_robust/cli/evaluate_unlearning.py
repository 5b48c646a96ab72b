"""`hf-robust evaluate` for unlearned language models: what is still answered of the forget set, and what attacks bring back."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_robust.cli.evaluate_forms import asked_attacks, check_required, given_options, listed, run_form
from hf_robust.data.unlearning import FORMATS, load_unlearning
from hf_robust.threats import check_at_least, check_choice

# The control of relearning, which is the same on other text, and rounding to more bits than 4
_PRESETS: dict[str, dict[str, Any]] = {
    "relearn_control": {"attack": "relearn", "source": "retain"},
    "quantize_8bit": {"attack": "quantize", "bits": 8},
}
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class EvaluateUnlearningArguments:
    """
    Options of `hf-robust evaluate` for an unlearned language model.

    Parameters:
        model_name_or_path (`str`):
            Folder or Hub id of the unlearned model.
        output_dir (`str`):
            Folder of the report and of the finished work that an interrupted evaluation goes on from.
        controls_dir (`str`, *optional*):
            Folder of the finished work on original and oracle, which evaluations of several models share.
        attacks (`list[str]`, defaults to `relearn relearn_control quantize_8bit quantize logit_lens`):
            Names, separated by spaces or commas: those, and attacks on prompts (gcg, embedding_suffix, soft_prompt,
            prefilling, user_prompts, …). `relearn_control` is `relearn` on the retain set, `quantize` rounds to 4 bits.
        forget_file (`str`):
            What was to be forgotten: JSONL, JSON, CSV or parquet with `prompt` and `completion`, `messages`, `question` and
            `answer`, or `text`; or a file of TOFU, MUSE or WMDP (see `file_format`).
        retain_file (`str`):
            The same, of what was to be kept.
        utility_files (`list[str]`):
            Further questions that the model should answer, as `NAME=FILE`.
        holdout_file (`str`, *optional*):
            Questions like those of the forget set that none of the models was trained on, for membership inference. Rows of the
            forget set that were not trained on, either (other phrasings), have `trained` false and are left out of it.
        file_format (`str`, defaults to `"auto"`):
            `"tofu"`, `"muse"` or `"wmdp"` for files of these sets; `"auto"` tells them by their columns, and takes others as
            they are.
        conversational (`bool`, *optional*):
            Whether plain prompts and completions become chat messages, as in `hf-robust unlearn`. Default: whether the
            tokenizer has a chat template.
        original (`str`, *optional*):
            The model before unlearning: the ceiling.
        oracle (`str`, *optional*):
            A model trained without the forget set: the floor. Every attack runs on original and oracle, too.
        adapter (`str`, *optional*):
            Folder or Hub id of a PEFT adapter to put on the model.
        judge (`str`, defaults to `"exact"`):
            `"exact"` (the row's `answer` stands in the model's), or a sequence classifier of question and answer, as a folder
            or Hub id.
        judge_positive (`str`, defaults to `"1"`):
            The classifier's label that means success, a number or a name.
        max_new_tokens (`int`, defaults to `64`):
            Length of every answer at most.
        attack_settings (`str`, *optional*):
            YAML or JSON file of settings by attack. A name that is no attack's needs an entry with `attack`, so that one
            attack may run twice.
        budget_forwards (`int`, *optional*):
            Forward passes (rows) that an attack may spend on a prompt. Attacks without a budget are named; those on weights
            have none.
        budget_backwards (`int`, *optional*):
            Backward passes (rows) that it may spend.
        budget_seconds (`float`, *optional*):
            Seconds that it may spend on a batch of prompts; figures then depend on the machine.
        limit (`int`, *optional*):
            The first so many rows of each file.
        seed (`int`, defaults to `0`):
            Of every attack that draws.
        batch_size (`int`, defaults to `16`):
            Questions in a batch, the unit of work that is kept.
        dtype (`str`, defaults to `"auto"`):
            Of the weights.
        model_revision (`str`, *optional*):
            Branch, tag or commit of the model on the Hub.
        overwrite (`bool`, defaults to `False`):
            Discard another evaluation's work in `output_dir`.
        no_progress (`bool`, defaults to `False`):
            No progress bar.
    """

    model_name_or_path: str = field(default="", metadata={"help": "Folder or Hub id of the unlearned model."})
    output_dir: str = field(
        default="", metadata={"help": "Folder of the report and of finished work, from which a rerun goes on."}
    )

    controls_dir: str | None = field(
        default=None, metadata={"help": "Folder of the work on original and oracle, shared by several models."}
    )
    attacks: list[str] = field(
        default_factory=lambda: ["relearn", "relearn_control", "quantize_8bit", "quantize", "logit_lens"],
        metadata={
            "help": "Of relearn, relearn_control, quantize_8bit, quantize, logit_lens, and attacks on prompts (gcg, …)."
        },
    )
    forget_file: str = field(default="", metadata={"help": "What was to be forgotten: JSONL, JSON, CSV or parquet."})
    retain_file: str = field(default="", metadata={"help": "What was to be kept."})
    utility_files: list[str] = field(
        default_factory=list, metadata={"help": "Further questions that should be answered, as NAME=FILE."}
    )
    holdout_file: str | None = field(default=None, metadata={"help": "Unseen questions, for membership inference."})
    file_format: str = field(default="auto", metadata={"help": f"Of the files: {', '.join(FORMATS)}."})
    conversational: bool | None = field(
        default=None,
        metadata={"help": "Turn plain rows into chat messages. Default: whether the tokenizer has a chat template."},
    )
    original: str | None = field(default=None, metadata={"help": "The model before unlearning."})
    oracle: str | None = field(default=None, metadata={"help": "A model trained without the forget set."})
    adapter: str | None = field(default=None, metadata={"help": "Folder or Hub id of a PEFT adapter."})
    judge: str = field(default="exact", metadata={"help": "exact, or folder or Hub id of a sequence classifier."})
    judge_positive: str = field(default="1", metadata={"help": "The classifier's label that means success."})
    max_new_tokens: int = field(default=64, metadata={"help": "Length of every answer at most."})
    attack_settings: str | None = field(
        default=None, metadata={"help": 'YAML or JSON file of settings by attack: {"gcg": {"num_steps": 50}}.'}
    )
    budget_forwards: int | None = field(default=None, metadata={"help": "Forward passes (rows) per prompt."})
    budget_backwards: int | None = field(default=None, metadata={"help": "Backward passes (rows) per prompt."})
    budget_seconds: float | None = field(default=None, metadata={"help": "Seconds per batch of prompts."})
    limit: int | None = field(default=None, metadata={"help": "The first so many rows of each file."})
    seed: int = field(default=0, metadata={"help": "Seed of every attack."})
    batch_size: int = field(default=16, metadata={"help": "Questions in a batch, the unit of work that is kept."})
    dtype: str = field(default="auto", metadata={"help": f"Of the weights: {', '.join(_DTYPES)}."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    overwrite: bool = field(default=False, metadata={"help": "Discard another evaluation's work in output_dir."})
    no_progress: bool = field(default=False, metadata={"help": "No progress bar."})

    def check(self) -> None:
        """
        Raise a `ValueError` for what can be known to be wrong without loading anything.

        Raises:
            ValueError: a required option is missing, or a value is out of range.
        """
        check_required(self, ("model_name_or_path", "forget_file", "retain_file", "output_dir"))
        if self.limit is not None:
            check_at_least("--limit", self.limit, 1, "Leave it out for all rows.")
        check_at_least("--batch_size", self.batch_size, 1, "Give the number of questions in a batch.")
        check_choice("--dtype", self.dtype, _DTYPES)
        check_at_least("--max_new_tokens", self.max_new_tokens, 1, "Give the length of an answer.")
        check_choice("--file_format", self.file_format, FORMATS)
        self.named_files()

    def named_files(self) -> dict[str, str]:
        """
        The files of `utility_files` by name.

        Raises:
            ValueError: an entry without name or file, or a name given twice.
        """
        found: dict[str, str] = {}
        for entry in listed(self.utility_files):
            name, _, path = entry.partition("=")
            if not name or not path or name in found:
                raise ValueError(
                    f"`--utility_files {entry}` must be NAME=FILE, such as world=world_facts.json, each once."
                )
            found[name] = path
        return found

    def build_attacks(self) -> dict[str, Any]:
        """
        The attacks asked for, by the names that the report gives them.

        Raises:
            ValueError: an unknown attack or setting, settings of an attack that does not run, or a budget for none.
        """
        from hf_robust.attacks.registry import build_from, settings_of
        from hf_robust.report.unlearning_attacks import forgetting_attacks

        known = forgetting_attacks()
        bounds = {name: getattr(self, f"budget_{name}") for name in ("forwards", "backwards", "seconds")}
        common: dict[str, Any] = {"seed": self.seed, "max_new_tokens": self.max_new_tokens}
        if any(bound is not None for bound in bounds.values()):
            common["budget"] = {name: bound for name, bound in bounds.items() if bound is not None}
        attacks, unbounded = {}, []
        asked = asked_attacks(self.attacks, self.attack_settings, [*known, *_PRESETS])
        for name, (kind, own) in asked.items():
            preset = dict(_PRESETS.get(kind, {}))
            kind = preset.pop("attack", kind)
            shared = {key: value for key, value in common.items() if key in settings_of(known, kind)}
            attacks[name] = build_from(known, kind, {**shared, **preset, **own})
            if "budget" in common and "budget" not in shared:
                unbounded.append(name)
        if unbounded:
            options = ", ".join(f"--budget_{name}" for name in common["budget"])
            if len(unbounded) == len(attacks):
                raise ValueError(f"`{options}` bounds no attack: {', '.join(unbounded)} take no budget. Leave it out.")
            print(f"hf-robust evaluate: {options} does not bound {', '.join(unbounded)}.", file=sys.stderr)
        return attacks

    def as_messages(self, tokenizer: Any) -> bool | None:
        """Whether plain rows become messages; `None` leaves rows as they are."""
        if self.conversational is not None:
            return self.conversational
        return True if getattr(tokenizer, "chat_template", None) is not None else None

    def read(self, path: str, argument: str, conversational: bool | None) -> Any:
        """
        Rows of a file, the first `limit` of them.

        Args:
            path: the file.
            argument: name of the option, for errors.
            conversational: see [`~hf_robust.data.load_unlearning`].
        """
        rows, _ = load_unlearning(path, file_format=self.file_format, conversational=conversational, argument=argument)
        return rows if self.limit is None else rows.select(range(min(self.limit, len(rows))))


def is_wanted(arguments: Sequence[str]) -> bool:
    """
    Whether a command line of `hf-robust evaluate` is about unlearning: it has the option `forget_file`.

    Args:
        arguments: command line after `hf-robust evaluate`; options may be in the file of `--config`.
    """
    return bool(given_options(arguments, ("forget_file",))["forget_file"])


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Evaluate a model with [`~hf_robust.report.evaluate_unlearning`].

    Args:
        arguments: command line after `hf-robust evaluate`.

    Returns:
        Exit status: 0; 2 where the options, files or folder do not allow an evaluation; 130 after an interruption.
    """
    return run_form(EvaluateUnlearningArguments, _evaluate, arguments)


def _evaluate(options: EvaluateUnlearningArguments) -> None:
    from hf_robust.cli.evaluate import EvaluateArguments, load_judge, load_model, load_tokenizer, show
    from hf_robust.report import evaluate_unlearning

    shared: dict[str, Any] = {"dtype": options.dtype, "judge": options.judge, "judge_positive": options.judge_positive}
    attacks = options.build_attacks()
    source = EvaluateArguments(
        model_name_or_path=options.model_name_or_path, adapter=options.adapter, model_revision=options.model_revision, **shared
    )  # fmt: skip
    tokenizer = load_tokenizer(source)
    chat = options.as_messages(tokenizer)
    # Before the models: a file that is missing is found at once
    rows = {
        "forget": options.read(options.forget_file, "--forget_file", chat),
        "retain": options.read(options.retain_file, "--retain_file", chat),
        "utility": {name: options.read(path, "--utility_files", chat) for name, path in options.named_files().items()},
        "holdout": None if options.holdout_file is None else options.read(options.holdout_file, "--holdout_file", chat),
    }
    controls: dict[str, Any] = {
        name: None if path is None else load_model(EvaluateArguments(model_name_or_path=path, **shared))
        for name, path in (("original", options.original), ("oracle", options.oracle))
    }
    folder = Path(options.output_dir)
    report = evaluate_unlearning(
        load_model(source),
        tokenizer=tokenizer,
        attacks=attacks,
        judge=load_judge(source),
        output_dir=folder,
        controls_dir=options.controls_dir,
        overwrite=options.overwrite,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        progress=not options.no_progress,
        **rows,
        **controls,
    )
    show(report, folder, peft=options.adapter is not None)
