"""
CAT's outer step (both answers in one forward, the losses, the backward) against the parent's own loss path on the same rows.

The parent's path is SFTTrainer's `compute_loss` with TRL's fused LM head; the floor is a plain forward and backward with the
LM head on label positions only. The attack is off: bench_attack.py measures it.

    python tests/benchmarks/bench_outer.py --device cpu --threads 2
"""

import statistics
import tempfile
from typing import Any

import common
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_robust import CATConfig, CATTrainer
from hf_robust.sites import LabelIndex, label_logits

LIMIT = 1.10


def build_trainer(args: Any, folder: str) -> CATTrainer:
    """A CATTrainer on a model with random weights; its datasets only have to exist."""
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )  # fmt: skip
    return CATTrainer(
        common.build_model(args),
        CATConfig(
            folder,
            attack_epsilon=0.0,
            use_cpu=args.device == "cpu",
            bf16=args.device != "cpu",
            gradient_checkpointing=False,
            report_to="none",
            per_device_train_batch_size=args.batch,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "completion": " b"}] * 4),
        adversarial_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * 4),
        processing_class=fast,
    )


def main() -> None:
    parser = common.parser(__doc__.strip().splitlines()[0])
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(args, folder)
    model = trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = common.make_batch(model, batch=args.batch - args.batch % 2, length=args.length)
    n = rows["input_ids"].shape[0] // 2
    count = int((rows["labels"][0] != -100).sum())
    chunk = {
        **rows,
        "user_mask": torch.zeros_like(rows["input_ids"], dtype=torch.bool),
        "weight": torch.ones(n, device=rows["input_ids"].device),
        "rejected_length": rows["input_ids"].shape[1],
        "chosen_total": n * count,
        "rejected_total": n * count,
        "num_chunks": 1,
    }
    index = LabelIndex.from_labels(rows["labels"])

    def ours() -> None:
        trainer._adversarial_loss(model, chunk).backward()
        model.zero_grad(set_to_none=True)

    def parent() -> None:
        super(CATTrainer, trainer).compute_loss(model, dict(rows), num_items_in_batch=2 * n * count).backward()
        model.zero_grad(set_to_none=True)

    def floor() -> None:
        inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
        logits = label_logits(model, index, **inputs)
        torch.nn.functional.cross_entropy(logits, index.targets).backward()
        model.zero_grad(set_to_none=True)

    times = common.interleaved(
        {"ours": ours, "parent": parent, "floor": floor}, repeats=args.repeats, device=args.device
    )
    ratio = common.ratio(times["ours"]["wall"], times["parent"]["wall"])
    common.emit(
        {
            "benchmark": "outer step",
            "settings": vars(args),
            "environment": common.environment(args),
            **{f"{name}_s": statistics.median(times[name]["wall"]) for name in times},
            "ratio_to_parent": ratio,
            "ratio_to_label_only_floor": common.ratio(times["ours"]["wall"], times["floor"]["wall"]),
            "limit": {"ratio": LIMIT, "met": ratio["median"] <= LIMIT},
        }
    )


if __name__ == "__main__":
    main()
