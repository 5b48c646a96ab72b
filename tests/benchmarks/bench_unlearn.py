"""
A step of each unlearning loss against its bare forwards and backwards, and the peak memory of SAM over the plain step.

Bare: the forget rows' and, where the loss has them, the retain rows' forward and backward, and the forwards of the model before
training that they are compared with; logits at label positions (for hidden states none but one) and cross-entropy (a mean
square), of the model before training for NPO alone, which compares with nothing but likelihoods. The same weights are trained
in both. SAM adds one forward and backward of the forget rows; what it holds on top of the plain step's peak is counted in
copies of the trained parameters.

    python tests/benchmarks/bench_unlearn.py --device cpu --threads 2
"""

import contextlib
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import common
import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_robust import UnlearnConfig, UnlearnTrainer
from hf_robust.sites import LabelIndex, decoder_layers, label_logits, record_hidden_states

LIMIT = 1.05
COPIES = 1.0
# Allocator's slack on top of a copy
SLACK = 0.05
LOSSES = ("grad_diff", "npo", "simnpo", "rmu", "undial", "ce_u")
ROBUST = ("sam", "smooth")


def build_trainer(args: Any, folder: str, loss: str, robust: str = "none") -> UnlearnTrainer:
    """An UnlearnTrainer on a model with random weights; its datasets only have to exist."""
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )  # fmt: skip
    model = common.build_model(args)
    config = UnlearnConfig(
        folder,
        loss_type=loss,
        robust=robust,
        activation_layer=min(7, len(decoder_layers(model)) - 1),
        use_cpu=args.device == "cpu",
        bf16=args.device != "cpu",
        gradient_checkpointing=False,
        report_to="none",
        per_device_train_batch_size=args.batch,
    )
    trainer = UnlearnTrainer(
        model,
        config,
        forget_dataset=Dataset.from_list([{"prompt": "a", "completion": " b"}] * 4),
        retain_dataset=Dataset.from_list([{"prompt": "a", "completion": " c"}] * 4) if config.retain_weight else None,
        processing_class=fast,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def step_of(trainer: UnlearnTrainer, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A training step without the optimizer's, on rows that nothing is known of yet."""
    kinds = ["forget", "retain"] if trainer.args.retain_weight else ["forget"]

    def step() -> None:
        inputs = {kind: dict(batch) for kind in kinds}
        if not trainer.perturbation.is_off:
            trainer._window = [inputs["forget"]]
        trainer.training_step(trainer.model, inputs)
        trainer.model.zero_grad(set_to_none=True)

    return step


def bare_of(trainer: UnlearnTrainer, batch: dict[str, torch.Tensor], device: str) -> Callable[[], None]:
    """The forwards and backwards of a plain step, and nothing else."""
    config, model = trainer.args, trainer.model
    index = LabelIndex.from_labels(batch["labels"])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    single = LabelIndex(index.flat[:1], index.targets[:1], index.rows[:1], index.counts, index.shape)
    reference = None if trainer.reference is None else trainer.reference.copy
    precision = contextlib.nullcontext() if device == "cpu" else torch.autocast("cuda", torch.bfloat16)
    parts = [(config.loss_type == "rmu", config.forget_reference)]
    if config.retain_weight:
        parts.append((config.retain_type == "activation", config.retain_reference))

    def outputs(module: Any, states: bool) -> torch.Tensor:
        if not states:
            return label_logits(module, index, **inputs)
        with record_hidden_states(module, layers=[config.activation_layer]) as found:
            label_logits(module, single, **inputs)
        return found[0]

    def loss(module: Any, states: bool) -> torch.Tensor:
        found = outputs(module, states)
        return found.float().pow(2).mean() if states else torch.nn.functional.cross_entropy(found, index.targets)

    def bare() -> None:
        for states, compares in parts:
            with precision:
                if compares:
                    with torch.no_grad():
                        (loss if config.loss_type == "npo" else outputs)(reference, states)
                value = loss(model, states)
            value.backward()
        model.zero_grad(set_to_none=True)

    return bare


def memory(args: Any, robust: str) -> None:
    """Peak of one step in this process, after one that goes before."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(args, folder, "grad_diff", robust)
    step = step_of(trainer, common.make_batch(trainer.model, batch=args.batch, length=args.length))
    trained = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    step()
    common.emit({**common.peak_memory(step, args.device), "trained_mib": trained / 2**20})


def main() -> None:
    parser = common.parser(__doc__.strip().splitlines()[0])
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=LOSSES)
    parser.add_argument("--memory", choices=["none", *ROBUST], help="measure the peak memory of one form only")
    args = parser.parse_args()
    disable_progress_bars()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory is not None:
        memory(args, args.memory)
        return
    found = {}
    for loss in args.losses:
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(args, folder, loss)
        batch = common.make_batch(trainer.model, batch=args.batch, length=args.length)
        runs = {"step": step_of(trainer, batch), "bare": bare_of(trainer, batch, args.device)}
        times = common.interleaved(runs, repeats=args.repeats, device=args.device)
        ratio = common.ratio(times["step"]["wall"], times["bare"]["wall"])
        found[loss] = {
            "bare_s": statistics.median(times["bare"]["wall"]),
            "step_s": statistics.median(times["step"]["wall"]),
            "ratio_to_bare": ratio,
            "ratio_to_bare_cpu": common.ratio(times["step"]["cpu"], times["bare"]["cpu"]),
            "met": ratio["median"] <= LIMIT,
        }
        del trainer, runs
    peaks = {form: common.in_child(__file__, ["--memory", form]) for form in ("none", *ROBUST)}
    copies = {
        form: (peaks[form]["above_start_mib"] - peaks["none"]["above_start_mib"]) / peaks[form]["trained_mib"]
        for form in ROBUST
    }
    common.emit(
        {
            "benchmark": "unlearning step",
            "settings": vars(args),
            "environment": common.environment(args),
            "losses": found,
            "limit": {"ratio": LIMIT, "met": all(entry["met"] for entry in found.values())},
            "peak_memory": peaks,
            "extra_copies_of_trained_parameters": copies,
            "limit_of_memory": {"copies": COPIES, "met": copies["sam"] <= COPIES + SLACK},
        }
    )


if __name__ == "__main__":
    main()
