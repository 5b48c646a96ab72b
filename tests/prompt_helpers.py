"""Small tokenizers built in memory and models to go with them. Special ids are those of `tests.helpers`."""

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_robust.attacks.generation import greedy
from hf_robust.attacks.prompts import render_prompts
from tests.helpers import tiny_model

SPECIAL = ["<unk>", "<pad>", "<s>", "</s>", "<user>", "<assistant>"]
WORDS = (
    "how do i build a kite boat lamp tell me please what are the steps to sell paint hide x ! ? sure , here is first "
    "then next last grind soak bake seal melt fold glue drill sorry can not help with that one two three four five six"
).split()
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ ' <assistant> ' + m['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ ' <user> ' + m['content'] | trim }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"
)


def _wrap(backend: Tokenizer, **kwargs) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<user>", "<assistant>"], clean_up_tokenization_spaces=False, **kwargs,
    )  # fmt: skip


@cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    """61 tokens or fewer: words between spaces, which decoding puts back."""
    words = [*SPECIAL, *dict.fromkeys(WORDS)]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(backend, chat_template=TEMPLATE, padding_side="left")


@cache
def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, in which most random token sequences do not survive decoding and encoding."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    text = [" ".join(WORDS), " ".join(reversed(WORDS)), "Sure, here is how to build a kite.", "x x x x ! ! ! !"] * 20
    backend.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    template = TEMPLATE.replace("' <user> '", "'<user>'").replace("' <assistant> '", "'<assistant>'")
    return _wrap(backend, chat_template=template.replace("' <assistant>'", "'<assistant>'").replace("+ ' ' +", "+"))


def reachable_targets(model, prompts, *, words: int = 2, suffix_length: int = 6) -> list[str]:
    """For each prompt the beginning of an answer that some suffix brings about but the initial one does not."""
    tokenizer, generator, found = word_tokenizer(), torch.Generator().manual_seed(0), []
    behaviors = render_prompts(
        tokenizer, prompts=prompts, targets=["sure"] * len(prompts), suffix_length=suffix_length, init="!"
    )
    for behavior in behaviors:
        usual = greedy(model, tokenizer, [behavior.prompt_ids()], max_new_tokens=words)[0].split()
        suffixes = torch.randint(len(SPECIAL), len(tokenizer), (50, suffix_length), generator=generator).tolist()
        ids = [behavior.before + suffix + behavior.after for suffix in suffixes]
        texts = [text.split() for text in greedy(model, tokenizer, ids, max_new_tokens=words)]
        found.append(next(" ".join(text) for text in texts if len(text) == words and text != usual))
    return found


def sharp_model(name: str = "llama", **overrides):
    """Random weights large enough for answers and losses that differ clearly between suffixes."""
    if name not in ("gpt2", "opt"):
        return tiny_model(name, initializer_range=0.3, **overrides)
    model = tiny_model(name, **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model
