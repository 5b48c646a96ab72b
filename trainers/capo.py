"""Continuous adversarial preference optimisation (CAPO): [`CAPOTrainer`] stands where [`~trl.DPOTrainer`] stood."""

import atexit
import copy
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator, logging
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model, parse_flag_from_env
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer

from hf_robust.attacks import EmbeddingAttack
from hf_robust.attacks.gradient import SearchResult
from hf_robust.data.checks import check_preferences
from hf_robust.data.preferences import without_end
from hf_robust.data.text_rows import rows_explained
from hf_robust.data.vision_preferences import IMAGE_COLUMNS, rejected_part
from hf_robust.objectives import zero_confident_tokens
from hf_robust.sites import EmbeddingSite, input_site
from hf_robust.threats import check_at_least
from hf_robust.trainers.attack_arguments import AttackArguments, take_over
from hf_robust.trainers.card import CardTrainer
from hf_robust.trainers.flops import search_operations
from hf_robust.trainers.guards import check_arguments, check_model, check_processing_class
from hf_robust.trainers.meters import Meters, on_any_process
from hf_robust.trainers.papers import CONTINUOUS_ATTACKS
from hf_robust.trainers.schedule import start_seed

logger = logging.get_logger(__name__)


@dataclass(repr=False)
class CAPOConfig(AttackArguments, DPOConfig):
    """
    Configuration of [`CAPOTrainer`]: all of [`~trl.DPOConfig`], the attack
    ([`~hf_robust.trainers.attack_arguments.AttackArguments`]) and the fields below, whose defaults are those of
    arXiv 2405.15589.

    Parameters:
        loss_type (`list[str]`, defaults to `["ipo"]`):
            Loss of [`~trl.DPOTrainer`]; the paper's is IPO.
        beta (`float`, defaults to `0.25`):
            IPO's beta: the margin of the token-mean log-ratios is `1 / (2 * beta)`, 2.0 nats.
        rejected_end (`bool`, defaults to `True`):
            Whether the end-of-turn token behind a rejected answer counts as a label, as in [`~trl.DPOTrainer`]. Set it to
            `False` for rejected answers that are beginnings ("Sure, here is"), behind which no model ends its turn: with
            that label, the loss can be met by making the end unlikely, and the harmful beginning stays.
        reference_compat (`bool`, defaults to `False`):
            Reproduce the authors' released code where it differs: per-token log-probabilities of the rejected answer below
            -5 count as 0, the last perturbation instead of the best, and an absolute step of 1e-4 unless
            `attack_step_size` is set.
    """

    loss_type: list[str] = field(
        default_factory=lambda: ["ipo"], metadata={"help": "Loss of DPOTrainer; the paper's is ipo."}
    )
    beta: float = field(default=0.25, metadata={"help": "IPO's beta: the margin is 1 / (2 * beta)."})
    rejected_end: bool = field(
        default=True, metadata={"help": "Whether the end-of-turn token of a rejected answer counts as a label."}
    )

    def __post_init__(self) -> None:
        check_at_least("beta", self.beta, 1e-8, "The paper uses 0.25.")
        losses = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        if not isinstance(losses, list | tuple) or not losses or not all(isinstance(loss, str) for loss in losses):
            raise ValueError(f"`loss_type={self.loss_type!r}` must be a list of names; the paper's is ['ipo'].")
        super().__post_init__()


class _PerturbedPolicy:
    """
    The policy as [`~trl.DPOTrainer`] calls it, with the perturbation added in its forwards only: the reference runs through
    the same module (adapter off) and must see the clean prompt.

    Args:
        model: the wrapped policy.
        site: its input embeddings.
        delta: `[2n, length, hidden]`, chosen rows first.
        accelerator: to agree with the other processes on a second forward.
        zero_confident: reproduce the released code's threshold on the rejected answer's tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        site: EmbeddingSite,
        delta: torch.Tensor,
        accelerator: Accelerator,
        *,
        zero_confident: bool,
    ):
        self._model, self._site, self._delta, self._accelerator = model, site, delta, accelerator
        self._zero_confident = zero_confident
        self.broken = torch.zeros(delta.shape[0] // 2, dtype=torch.bool, device=delta.device)

    def __call__(self, **inputs: Any) -> Any:
        outputs = self._forward(inputs)
        if getattr(outputs, "log_probs", None) is None:  # logits for `compute_metrics`
            return outputs
        broken = ~outputs.log_probs.detach().isfinite().all(dim=1).view(2, -1).all(dim=0)
        if on_any_process(self._accelerator, broken):
            # The last step went where the model has no finite loss: those pairs train on the clean prompt instead
            self.broken = broken
            self._delta = torch.where(broken.repeat(2).view(-1, 1, 1), 0.0, self._delta)
            outputs = self._forward(inputs)
        if self._zero_confident:
            chosen, rejected = outputs.log_probs.chunk(2)
            outputs.log_probs = torch.cat([chosen, zero_confident_tokens(rejected)])
        return outputs

    def _forward(self, inputs: dict[str, Any]) -> Any:
        with self._site.add(self._delta):
            return self._model(**inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _for_chosen(delta: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    The perturbation of the rejected rows, moved to where the same prompt tokens stand in the chosen rows. Those are the
    same places unless `truncation_mode="keep_end"` cut the two prompts of a pair at different tokens.

    Args:
        delta: `[n, length, hidden]`, zero outside the prompts.
        inputs: batch of `2n` rows, chosen first.
    """
    prompt = inputs["attention_mask"].bool() & (inputs["completion_mask"] == 0)
    chosen_start, rejected_start = inputs["completion_mask"].argmax(dim=1).chunk(2)  # prompts end where answers start
    source = torch.arange(delta.shape[1], device=delta.device) + (rejected_start - chosen_start).unsqueeze(1)
    inside = (source >= 0) & (source < rejected_start.unsqueeze(1)) & prompt[: delta.shape[0]]
    source = source.clamp(0, delta.shape[1] - 1).unsqueeze(-1).expand_as(delta)
    return torch.where(inside.unsqueeze(-1), delta.gather(1, source), 0.0)


def _has_images(dataset: Any) -> bool:
    return any(column in (getattr(dataset, "column_names", None) or []) for column in IMAGE_COLUMNS)


def _shards_by_fsdp(args: TrainingArguments) -> bool:
    """As the Trainer and accelerate will decide, which is only known once they have begun."""
    return args.fsdp_plugin_args is not None or bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


class CAPOTrainer(CardTrainer, DPOTrainer):
    """
    Trainer for Continuous Adversarial Preference Optimisation (C-AdvIPO), introduced in
    [Efficient Adversarial Training in LLMs with Continuous Attacks](https://huggingface.co/papers/2405.15589).

    An attack perturbs the embeddings of each prompt so that the rejected answer becomes likely; [`~trl.DPOTrainer`]'s loss
    (IPO) then compares chosen and rejected answer under that perturbation with the reference on the clean prompt:

    `(h - 1 / (2 * beta))^2`, where `h = [log p(chosen | x + delta) - log p_ref(chosen | x)] - [the same for rejected]`

    with log-probabilities averaged over label tokens. No utility rows are needed.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As for [`~trl.DPOTrainer`], vision-language models with images in the prompt included: the attack then moves what
            the language model reads, image positions included. A full model that is already in memory works too: its
            reference log-probabilities are computed before training (`precompute_ref_log_probs`), never by loading a second
            copy (under FSDP a copy of the model stays, split like it); with images, which cannot be gone through beforehand,
            pass `ref_model` or a `peft_config`.
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            As for [`~trl.DPOTrainer`].
        args ([`CAPOConfig`], *optional*):
            Configuration. A [`~trl.DPOConfig`] is taken over, `loss_type` and `beta` included.
        *parent_args, **parent_kwargs:
            All other arguments of [`~trl.DPOTrainer`].

    Raises:
        ValueError: the data, the model or the configuration cannot be trained on; before training starts.

    Example:

    ```python
    >>> trainer = CAPOTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=CAPOConfig(output_dir="robust"),
    ...     train_dataset=preference_rows,
    ...     peft_config=LoraConfig(r=64, lora_alpha=16, target_modules="all-linear"),
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["hf_robust", "capo", "trl", "dpo"]
    _name = "CAPO"
    _paper = CONTINUOUS_ATTACKS

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: CAPOConfig | TrainingArguments | None = None,
        *parent_args: Any,
        **parent_kwargs: Any,
    ):
        args = take_over(args, CAPOConfig, "capo")
        check_arguments(args)
        if args.attack_positions == "user_content":
            raise ValueError(
                "`attack_positions='user_content'` is not supported by CAPOTrainer, whose batches come from DPOTrainer and "
                "carry no marks of the user's words: use 'all_prompt'."
            )
        check_processing_class(parent_kwargs.get("processing_class"))
        given = self._datasets(parent_args, parent_kwargs)
        for name, dataset in given:
            if isinstance(dataset, Dataset):
                check_preferences(dataset, name, images=True)
        in_memory = not isinstance(model, str) and not is_peft_model(model) and parent_kwargs.get("peft_config") is None
        if any(_has_images(dataset) for _, dataset in given):
            if in_memory and ref_model is None:
                raise ValueError(
                    "`train_dataset` has images and `model` is a full model in memory: its reference log-probabilities cannot "
                    "be computed beforehand. Pass `ref_model` or a `peft_config`."
                )
            if not args.rejected_end:
                raise ValueError(
                    "`rejected_end=False` is not supported for rows with images, which DPOTrainer tokenizes batch by batch: "
                    "use True, or CATTrainer."
                )
        elif in_memory and ref_model is None and _shards_by_fsdp(args):
            # There TRL precomputes by a reference of its own, which it loads from wherever the model once came (1.16)
            logger.info("A copy of the in-memory model is the reference.")
            ref_model = copy.deepcopy(model)
        elif in_memory and ref_model is None and not args.precompute_ref_log_probs:
            if any(isinstance(dataset, IterableDataset) for _, dataset in given):
                raise ValueError(
                    "`train_dataset` or `eval_dataset` is streaming and `model` is a full model in memory: its reference "
                    "log-probabilities cannot be computed beforehand. Pass `ref_model`, a `peft_config`, or a map-style "
                    "dataset."
                )
            logger.info("Reference log-probabilities of the in-memory model are computed before training.")
            args.precompute_ref_log_probs = True
        self.remember_data(train_dataset=dict(given).get("train_dataset"))

        super().__init__(model, ref_model, args, *parent_args, **parent_kwargs)

        check_arguments(args)  # of which the parent may have changed some
        check_processing_class(self.processing_class)
        check_model(self.model)
        self.attack = args.build_attack(seed=args.seed)
        self.eval_attack = args.build_attack(args.eval_attack_steps, seed=args.seed)
        self._meters = Meters()

    @staticmethod
    def _datasets(parent_args: tuple, parent_kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
        """Training and evaluation datasets with the names of their arguments; several evaluation datasets one by one."""
        names = ("data_collator", "train_dataset", "eval_dataset")
        arguments = {**dict(zip(names, parent_args, strict=False)), **parent_kwargs}
        found = []
        for name in names[1:]:
            value = arguments.get(name)
            found += [(name, split) for split in (value.values() if isinstance(value, Mapping) else [value])]
        return found

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """The parent's tokenization; refuses a dataset of which truncation leaves nothing."""
        with rows_explained(dataset, f"{dataset_name}_dataset", processing_class):
            prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(prepared, Dataset) and len(prepared) == 0:
            raise ValueError(
                f"`max_length={args.max_length!r}` leaves no label of any of the {len(dataset)} rows of the {dataset_name} "
                "dataset: every prompt fills it. Raise `max_length`, or shorten the prompts."
            )
        if args.rejected_end:
            return prepared
        tokenizer = self._tokenizer

        def cut(row: dict[str, Any]) -> dict[str, Any]:
            answer = row["rejected"]
            if isinstance(answer, str):  # to which the parent has added the token that is to go
                answer = answer.removesuffix(tokenizer.eos_token)
            return {"rejected_ids": without_end(row["rejected_ids"], answer, tokenizer)}

        return prepared.map(cut)

    def _precompute_ref_logps(self, dataset, name, batch_size):
        """The parent's reference log-probabilities, also of a dataset that was made in memory."""
        # One process writes them beside the dataset's own files and all read them there (TRL 1.16). A dataset in memory
        # has no files, or each process has its own: give it files that all share. Remove when TRL does.
        files = dataset.cache_files if isinstance(dataset, Dataset) else []
        folders = gather_object([os.path.dirname(files[0]["filename"]) if files else None])
        if self.accelerator.num_processes > 1 and (None in folders or len(set(folders)) > 1):
            is_main = self.accelerator.is_main_process
            shared = [tempfile.mkdtemp(prefix="hf_robust_reference_") if is_main else ""]
            broadcast_object_list(shared, from_process=0)
            if is_main:
                atexit.register(shutil.rmtree, shared[0], ignore_errors=True)
                dataset.save_to_disk(shared[0])
            self.accelerator.wait_for_everyone()
            dataset = Dataset.load_from_disk(shared[0])
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The parent's micro-batches; the window's attacks start from points of their own."""
        self.attack.generator.manual_seed(
            start_seed(self.args.seed, self.state.global_step, self.accelerator.process_index)
        )
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        """The parent's loop; every evaluation starts its attacks at the same points."""
        self.eval_attack.generator.manual_seed(start_seed(self.args.seed, 0, self.accelerator.process_index))
        return super().evaluation_loop(*args, **kwargs)

    def _compute_loss(self, model, inputs, return_outputs):
        """The parent's loss, with the perturbation in the policy's forward and not in the reference's."""
        training = self.model.training
        attack = self.attack if training else self.eval_attack
        if attack.is_off and not self.args.reference_compat:
            return super()._compute_loss(model, inputs, return_outputs)
        inner = self.accelerator.unwrap_model(model)
        with self._stopwatch:
            found = self._search(inner, inputs, attack)
        policy = _PerturbedPolicy(
            model,
            input_site(inner),
            torch.cat([_for_chosen(found.delta, inputs), found.delta]),  # the batch is [chosen, rejected]
            self.accelerator,
            zero_confident=self.args.reference_compat,
        )
        result = super()._compute_loss(policy, inputs, return_outputs)
        if training and not attack.is_off:
            rows = found.delta.shape[0]
            self._meters.add("attack_non_finite", (found.non_finite | policy.broken).sum(), rows)
            self._meters.add("attack_loss_first", found.first_loss.nan_to_num().sum(), rows)
            self._meters.add("attack_loss_last", found.last_loss.nan_to_num().sum(), rows)
        return result

    def _search(self, inner: nn.Module, inputs: dict[str, torch.Tensor], attack: EmbeddingAttack) -> SearchResult:
        """Attack the prompts of the batch so that the rejected answers become likely."""
        rows = inputs["input_ids"].shape[0] // 2
        rejected = {name: inputs[name][rows:] for name in ("input_ids", "attention_mask", "completion_mask")}
        beside = {}
        if self._is_vision_dataset:
            beside = rejected_part({k: v for k, v in inputs.items() if k not in rejected and k != "use_cache"})
        return attack.search(
            inner,
            input_ids=rejected["input_ids"],
            attention_mask=rejected["attention_mask"],
            labels=rejected["input_ids"].masked_fill(rejected["completion_mask"] == 0, -100),
            **beside,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log: losses of the attack and its share of the time."""
        if self.model.training:
            means = self._meters.read(self.accelerator)
            if means:
                means["attack_time_share"] = self._stopwatch.read_share()
            logs.update(means)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The parent's estimate plus the attack's, which sees the rejected half of the rows."""
        operations = super().floating_point_ops(inputs)
        if self.attack.is_off:
            return operations
        attack = self.attack
        return operations + search_operations(operations // 2, attack.steps, forwards=attack.keep == "best")
