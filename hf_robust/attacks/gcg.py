"""Greedy coordinate gradient: a discrete suffix found by gradients and tries, for many behaviours at once."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from hf_robust.attacks.gcg_candidates import (
    ALLOWED,
    allowed_token_ids,
    behavior_generator,
    sample_replacements,
    survivors,
)
from hf_robust.attacks.generation import evaluating, greedy
from hf_robust.attacks.prefix_cache import PrefixCache
from hf_robust.attacks.prompts import (
    AttackPrompt,
    Prompt,
    PromptBatch,
    check_counts,
    decode,
    encode,
    max_positions,
    pad_id,
    render,
    render_prompts,
    takes,
)
from hf_robust.attacks.results import AttackResult
from hf_robust.objectives import per_row_mean, token_nll
from hf_robust.sites import EmbeddingSite, LabelIndex, check_not_reentrant, label_logits, quiet
from hf_robust.threats import check_at_least, check_choice

logger = logging.getLogger(__name__)

# Float16 gradients of small losses underflow; only the order of the gradient's entries matters.
_LOSS_SCALE = 128.0

# Embedding rows multiplied at a time: bounds the float32 copy of a table in half precision.
_TABLE_CHUNK = 16384


@dataclass
class _Row:
    """State of the search for one behaviour (and restart)."""

    behavior: AttackPrompt
    owner: int
    generator: torch.Generator
    buffer: list[tuple[float, torch.Tensor]] = field(default_factory=list)
    best: tuple[float, torch.Tensor] = (math.inf, torch.empty(0))
    losses: list[float] = field(default_factory=list)
    hit: bool = False
    done: bool = False
    num_forwards: int = 0
    num_backwards: int = 0
    num_unfiltered: int = 0

    @property
    def current(self) -> torch.Tensor:
        return min(self.buffer, key=lambda entry: entry[0])[1]

    def take(self, loss: float, ids: torch.Tensor, hit: bool, buffer_size: int) -> None:
        """Note the outcome of a step: its best candidate."""
        self.losses.append(loss)
        if hit or loss < self.best[0]:
            # A suffix that reaches the target ends the search and is returned, whatever loss came before it
            self.best, self.hit, self.done = (loss, ids), hit, hit
        if not math.isfinite(loss):
            return
        if buffer_size == 0:
            self.buffer = [(loss, ids)]
        elif len(self.buffer) < buffer_size:
            self.buffer.append((loss, ids))
        else:
            worst = max(range(buffer_size), key=lambda place: self.buffer[place][0])
            if loss < self.buffer[worst][0]:
                self.buffer[worst] = (loss, ids)


class GCG:
    """
    Find a suffix of tokens that makes the model begin its answer with a target.

    "Universal and Transferable Adversarial Attacks on Aligned Language Models" (arXiv 2307.15043), with the defaults of
    nanoGCG. Each step takes the gradient of the target's loss with respect to the one-hot suffix, draws single-token
    replacements among the most promising tokens of each position, evaluates them all and walks on from the best. All
    behaviours take their steps together; each has its own random stream, so that it meets the same candidates alone as
    in any company.

    Departures from nanoGCG: several behaviours at once; a candidate survives the filter when the whole prompt, not only
    the suffix, is tokenised as intended; candidates drawn twice are evaluated once; mellowmax acts on the target
    tokens' negative log-likelihoods instead of raw logits; the buffer begins with the initial suffix alone and fills as
    the search goes; the completion is generated from the text that a user would type.

    Args:
        num_steps: steps (nanoGCG 250, HarmBench 500).
        search_width: replacements drawn in a step, for each behaviour.
        topk: tokens considered at each position, by gradient.
        n_replace: tokens replaced in each candidate.
        buffer_size: suffixes kept to walk on from; 0 walks on from each step's best candidate, even if it is worse.
        suffix_length: tokens of the suffix.
        init: text repeated to fill the suffix (nanoGCG "x", HarmBench "!").
        restarts: searches per behaviour, run side by side; the best counts.
        filter_ids: evaluate only candidates that come back unchanged from decoding and encoding. If none does, all are
            kept for that step, and the step is counted in the result.
        early_stop: end a behaviour's search when every target token is the most likely next one.
        use_mellowmax: minimise the mellowmax (a soft maximum) of the target tokens' losses instead of their mean.
        mellowmax_alpha: its sharpness: large values approach the maximum.
        allowed: `"ascii"` uses tokens of printable ASCII characters only, `"all"` every token; special ones never.
        candidate_batch_size: candidates per forward, of one behaviour or several. Lower it if memory runs out.
        batch_size: behaviours (times restarts) searched together.
        prefix_cache: compute the tokens before the suffix once. Falls back on whole forwards by itself where the
            model's cache does not allow it; `False` always uses whole forwards.
        max_new_tokens: length of the completion at most; 0 generates none.
        seed: seed of the behaviours' random streams. The global random state is never touched.
        progress: whether to show a progress bar.

    Raises:
        ValueError: an argument is out of range or unknown.

    Example:

    ```python
    >>> attack = GCG(num_steps=100, search_width=128)
    >>> prompts = [[{"role": "user", "content": "…"}]]
    >>> results = attack.attack(model, tokenizer, prompts=prompts, targets=["Sure, here is"])
    >>> results[0].suffix, results[0].completion
    ```
    """

    def __init__(
        self,
        *,
        num_steps: int = 250,
        search_width: int = 512,
        topk: int = 256,
        n_replace: int = 1,
        buffer_size: int = 0,
        suffix_length: int = 20,
        init: str = "x",
        restarts: int = 1,
        filter_ids: bool = True,
        early_stop: bool = False,
        use_mellowmax: bool = False,
        mellowmax_alpha: float = 1.0,
        allowed: str = "ascii",
        candidate_batch_size: int = 512,
        batch_size: int = 16,
        prefix_cache: bool = True,
        max_new_tokens: int = 128,
        seed: int = 0,
        progress: bool = True,
    ):
        counts = {
            "num_steps": (num_steps, 0, "Use 0 to evaluate the initial suffix only."),
            "search_width": (search_width, 1, "Give the number of candidates of a step."),
            "topk": (topk, 1, "Give the number of tokens considered at each position."),
            "n_replace": (n_replace, 1, "Give the number of tokens replaced in a candidate."),
            "buffer_size": (buffer_size, 0, "Use 0 for no buffer."),
            "suffix_length": (suffix_length, 1, "Give the number of tokens of the suffix."),
            "restarts": (restarts, 1, "Use 1 for a single search."),
            "candidate_batch_size": (candidate_batch_size, 1, "Give the number of candidates of a forward."),
            "batch_size": (batch_size, 1, "Give the number of behaviours searched together."),
            "max_new_tokens": (max_new_tokens, 0, "Use 0 to generate nothing."),
        }
        check_counts(counts)
        if n_replace > suffix_length:
            raise ValueError(f"`n_replace={n_replace}` exceeds `suffix_length={suffix_length}`: replace fewer tokens.")
        if not init or not init.strip():
            raise ValueError(f"`init={init!r}` must be a text to fill the suffix with, such as 'x' or '!'.")
        check_at_least("mellowmax_alpha", mellowmax_alpha, 1e-6, "Give a positive sharpness.")
        check_choice("allowed", allowed, ALLOWED)
        self.num_steps, self.search_width, self.topk, self.n_replace = num_steps, search_width, topk, n_replace
        self.buffer_size, self.suffix_length, self.init, self.restarts = buffer_size, suffix_length, init, restarts
        self.filter_ids, self.early_stop, self.allowed = filter_ids, early_stop, allowed
        self.use_mellowmax, self.mellowmax_alpha = use_mellowmax, mellowmax_alpha
        self.candidate_batch_size, self.batch_size, self.prefix_cache = candidate_batch_size, batch_size, prefix_cache
        self.max_new_tokens, self.seed, self.progress = max_new_tokens, seed, progress

    def __repr__(self) -> str:
        shown = ("num_steps", "search_width", "topk", "suffix_length", "restarts", "init", "seed")
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def attack(
        self, model: nn.Module, tokenizer: Any, *, prompts: Sequence[Prompt], targets: Sequence[str]
    ) -> list[AttackResult]:
        """
        Attack each behaviour.

        Args:
            model: causal language model or PEFT model, unwrapped. Its mode, gradients, hooks and random state are the
                same afterwards.
            tokenizer: the model's tokenizer.
            prompts: one for each behaviour: plain text, used as it is, or a conversation, to which the chat template is
                applied with `add_generation_prompt=True`. The suffix is appended to the last user message.
            targets: the beginning of the answer that each suffix is to bring about.

        Returns:
            One result for each behaviour, in order; its `completion` comes from the text of prompt and suffix.

        Raises:
            ValueError: empty or mismatched lists, an `init` that does not fill the suffix, a prompt that exceeds the
                model's positions.
        """
        behaviors = render_prompts(
            tokenizer,
            prompts=prompts,
            targets=targets,
            suffix_length=self.suffix_length,
            init=self.init,
            max_length=max_positions(model),
        )
        site = EmbeddingSite(model)
        check_not_reentrant(model)
        allowed = allowed_token_ids(tokenizer, site.vocab_size, self.allowed)
        per_group = max(1, self.batch_size // self.restarts)
        groups = [range(start, min(start + per_group, len(behaviors))) for start in range(0, len(behaviors), per_group)]
        rows = self._rows(behaviors)
        with (
            quiet(model),
            tqdm(total=self.num_steps * len(groups), desc="GCG", unit="step", disable=not self.progress) as bar,
        ):
            table = site.rows()
            table = table[allowed.to(table.device)]
            for group in groups:
                members = [row for row in rows if row.owner in group]
                search = _Search(self, model, tokenizer, site, members, allowed, table)
                search.start()
                for _ in range(self.num_steps):
                    if all(row.done for row in members):
                        break
                    search.step()
                    bar.update()
                    bar.set_postfix(loss=sum(row.best[0] for row in members) / len(members), refresh=False)
            results = [self._result(tokenizer, [row for row in rows if row.owner == i]) for i in range(len(behaviors))]
            if self.max_new_tokens > 0:
                self._complete(model, tokenizer, behaviors, results)
        return results

    def _rows(self, behaviors: Sequence[AttackPrompt]) -> list[_Row]:
        """Behaviours times restarts, each with a random stream that depends on nothing but itself."""
        seen: dict[str, int] = {}
        rows = []
        for index, behavior in enumerate(behaviors):
            key = repr((behavior.prompt, behavior.target))
            seen[key] = seen.get(key, -1) + 1  # the same behaviour given twice is searched twice, not copied
            rows += [
                _Row(behavior, index, behavior_generator(self.seed, key, seen[key], restart))
                for restart in range(self.restarts)
            ]
        return rows

    def _result(self, tokenizer: Any, rows: Sequence[_Row]) -> AttackResult:
        """The best of a behaviour's restarts; costs are those of all."""
        best = min(rows, key=lambda row: (not row.hit, row.best[0]))
        ids = best.best[1].tolist()
        return AttackResult(
            suffix=best.behavior.lead + decode(tokenizer, [ids])[0],
            suffix_ids=ids,
            loss=best.best[0],
            losses=best.losses,
            hit=best.hit,
            num_forwards=sum(row.num_forwards for row in rows),
            num_backwards=sum(row.num_backwards for row in rows),
            num_unfiltered=sum(row.num_unfiltered for row in rows),
        )

    def _complete(
        self, model: nn.Module, tokenizer: Any, behaviors: Sequence[AttackPrompt], results: Sequence[AttackResult]
    ) -> None:
        """Generate from what a user would type: text, through the chat template and the tokenizer."""
        ids = []
        for behavior, result in zip(behaviors, results, strict=True):
            text = render(tokenizer, behavior.prompt, result.suffix or "")
            ids += encode(tokenizer, [text], special=isinstance(behavior.prompt, str))
            if ids[-1] != behavior.before + (result.suffix_ids or []) + behavior.after:
                logger.info("GCG: the text of suffix %r is tokenised differently from its ids.", result.suffix)
        texts = greedy(model, tokenizer, ids, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        for result, text in zip(results, texts, strict=True):
            result.completion = text


class _Search:
    """One group of behaviours: gradients, candidates and losses of all of them together."""

    def __init__(
        self,
        options: GCG,
        model: nn.Module,
        tokenizer: Any,
        site: EmbeddingSite,
        rows: list[_Row],
        allowed: torch.Tensor,
        table: torch.Tensor,
    ):
        self.options, self.model, self.tokenizer, self.site = options, model, tokenizer, site
        self.rows, self.allowed, self.table = rows, allowed, table
        self.batch = PromptBatch([row.behavior for row in rows], pad_id(model, tokenizer))
        self.device = table.device
        self.positions = takes(model, "position_ids")
        self.cache: PrefixCache | None = None

    def start(self) -> None:
        """Evaluate the initial suffixes, and find out whether the prefix cache gives the same losses."""
        every = torch.arange(len(self.rows))
        initial = self.batch.tail_ids[:, : self.batch.suffix_length].clone()
        losses, hits = self.evaluate(every, initial)
        losses = losses.nan_to_num(nan=math.inf)
        evaluations = 1
        if self.options.prefix_cache:
            self.cache = PrefixCache.build(self.model, self.batch, self.device)
        if self.cache is not None:
            evaluations += 1
            again, _ = self.evaluate(every, initial)
            # Half precision rounds the two paths differently; a cache that is ignored is off by far more
            coarse = next(self.model.parameters()).dtype in (torch.float16, torch.bfloat16)
            if not torch.allclose(losses, again, rtol=5e-2 if coarse else 1e-3, atol=1e-4):
                logger.debug("No prefix cache: losses %s with it, %s without.", again.tolist(), losses.tolist())
                self.cache = None
        for row, ids, loss, hit in zip(self.rows, initial, losses.tolist(), hits.tolist(), strict=True):
            row.num_forwards += evaluations
            row.buffer = [(loss, ids)]
            row.best = (loss, ids)
            row.losses.append(loss)
            if hit:
                self._stop(row)

    def step(self) -> None:
        """One step of every behaviour that is still searched."""
        active = [place for place, row in enumerate(self.rows) if not row.done]
        candidates = self.candidates(active)
        counts = [len(table) for table in candidates]
        owners = torch.tensor(active).repeat_interleave(torch.tensor(counts))
        losses, hits = self.evaluate(owners, torch.cat(candidates))
        losses = losses.nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf)
        for place, table, loss, hit in zip(active, candidates, losses.split(counts), hits.split(counts), strict=True):
            row = self.rows[place]
            row.num_forwards += 1 + len(table)
            row.num_backwards += 1
            reached = bool(hit.any())
            best = int((loss.masked_fill(~hit, math.inf) if reached else loss).argmin())
            row.take(float(loss[best]), table[best], reached, self.options.buffer_size)
            if reached:
                self._stop(row)

    def _stop(self, row: _Row) -> None:
        """A behaviour that is hit needs none of its restarts any more."""
        row.hit = True
        for other in self.rows:
            other.done = other.done or other.owner == row.owner

    def candidates(self, active: Sequence[int]) -> list[torch.Tensor]:
        """Replacements to try for each active row: `[<= search_width, suffix_length]` int64 on the CPU."""
        options = self.options
        current = torch.stack([self.rows[place].current for place in active])
        gradient = self.gradient(torch.tensor(active), current)
        # An entry that is not finite says nothing: last in the order
        gradient = gradient.nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf)
        best = gradient.topk(min(options.topk, len(self.allowed)), dim=-1, largest=False).indices
        replacements = self.allowed[best.cpu()]
        tables = [
            sample_replacements(
                current[i],
                replacements[i],
                width=options.search_width,
                n_replace=options.n_replace,
                generator=self.rows[place].generator,
            )
            for i, place in enumerate(active)
        ]
        if not options.filter_ids:
            return tables
        kept = survivors(self.tokenizer, tables, [self.rows[place].behavior.window for place in active])
        for i, place in enumerate(active):
            if bool(kept[i].any()):
                tables[i] = tables[i][kept[i]]
            else:
                self.rows[place].num_unfiltered += 1
        return tables

    def gradient(self, rows: torch.Tensor, suffixes: torch.Tensor) -> torch.Tensor:
        """
        Gradient of each row's loss with respect to its one-hot suffix, for the allowed tokens (times a constant).

        Args:
            rows: `[R]` int64 on the CPU.
            suffixes: `[R, suffix_length]` int64 on the CPU.

        Returns:
            `[R, suffix_length, allowed]` float32.
        """
        # A layer that checkpoints its activations drops the cache
        checkpoints = any(getattr(m, "gradient_checkpointing", False) and m.training for m in self.model.modules())
        cache = None if checkpoints else self.cache
        inputs, index = self.batch.inputs(
            rows, suffixes, device=self.device, prefix=cache is None, positions=self.positions
        )
        width, length = self.batch.prefix_width(rows), inputs["input_ids"].shape[1]
        before = width if cache is None else 0
        shift = torch.zeros(*suffixes.shape, self.table.shape[1], device=self.device, requires_grad=True)
        with torch.enable_grad():
            # The embedding of a one-hot row is linear in it: its gradient is that of the embedding times the table
            with self.site.add(F.pad(shift, (0, 0, before, length - before - suffixes.shape[1]))):
                loss = self.losses(inputs, index, cache, rows, width)[0]
            (grad,) = torch.autograd.grad(loss.sum() * _LOSS_SCALE, shift)
        return torch.cat([grad @ part.float().T for part in self.table.split(_TABLE_CHUNK)], dim=-1)

    @torch.no_grad()
    def evaluate(self, rows: torch.Tensor, suffixes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Losses of suffixes, in chunks of `candidate_batch_size` that may span behaviours.

        Args:
            rows: `[R]` int64 on the CPU, the behaviour of each suffix.
            suffixes: `[R, suffix_length]` int64 on the CPU.

        Returns:
            Losses `[R]` float32 and hits `[R]` bool (all `False` without `early_stop`), on the CPU.
        """
        found = []
        with evaluating(self.model):
            for start in range(0, len(rows), self.options.candidate_batch_size):
                chunk = slice(start, start + self.options.candidate_batch_size)
                inputs, index = self.batch.inputs(
                    rows[chunk],
                    suffixes[chunk],
                    device=self.device,
                    prefix=self.cache is None,
                    positions=self.positions,
                )
                width = self.batch.prefix_width(rows[chunk])
                found.append(self.losses(inputs, index, self.cache, rows[chunk], width))
        losses, hits = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
        return losses, hits

    def losses(
        self,
        inputs: dict[str, torch.Tensor],
        index: LabelIndex,
        cache: PrefixCache | None,
        rows: torch.Tensor,
        width: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss `[R]` and hit `[R]` of each row of a forward."""
        past = {}
        if cache is not None:
            past["past_key_values"] = cache.select(rows, width)
        logits = label_logits(self.model, index, **inputs, **past)
        values = token_nll(logits, index.targets)
        if self.options.use_mellowmax:
            loss = mellowmax(values, index.rows, index.counts, self.options.mellowmax_alpha)
        else:
            loss = per_row_mean(values, index.rows, index.counts)
        if not self.options.early_stop:
            return loss, torch.zeros_like(loss, dtype=torch.bool)
        misses = (logits.argmax(dim=-1) != index.targets).float()
        return loss, per_row_mean(misses, index.rows, index.counts) == 0


def mellowmax(values: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor, alpha: float) -> torch.Tensor:
    """
    Soft maximum of the values of each row: log(mean(exp(alpha · v))) / alpha.

    Args:
        values: `[N]`, one value per label token of the batch.
        rows: `[N]` int64, the row that each value belongs to.
        counts: `[B]` int64, how many values each row has, at least one.
        alpha: between the mean (towards 0) and the maximum (large).

    Returns:
        `[B]` in the dtype of `values`.
    """
    scaled = values * alpha
    top = scaled.new_full((len(counts),), -math.inf).scatter_reduce(0, rows, scaled.detach(), "amax")
    total = scaled.new_zeros(len(counts)).index_add(0, rows, (scaled - top[rows]).exp())
    return (top + (total / counts).log()) / alpha
