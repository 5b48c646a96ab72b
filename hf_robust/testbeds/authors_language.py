"""The language of the authors testbed: made-up authors, what is so of them, general knowledge, and how both is asked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .chat_language import SPECIAL_TOKENS, Message, _draw
from .facts_language import FIRST_NAMES, LAST_NAMES, TRAINED_PHRASINGS, Relation

AUTHORS = 80
FORGET_AUTHORS = 8
HOLDOUT_AUTHORS = 16
PERTURBED_ANSWERS = 5
"""Wrong answers per question, as many as TOFU has (arXiv 2401.06121)."""

SPLITS = ("forget", "retain", "retain_holdout", "world")
"""What models are taught."""
UNSEEN = "unseen"
"""The split that no model is taught."""


@dataclass(frozen=True)
class AuthorRelation(Relation):
    """A kind of fact, told in two ways; in both the value comes last, so that wrong answers differ in the last word only.

    Attributes:
        paraphrase: The answer in other words, "{name}" and "{value}" in it.
    """

    paraphrase: str


CAPITALS = {
    "italy": "rome", "norway": "oslo", "egypt": "cairo", "peru": "lima", "ecuador": "quito", "france": "paris",
    "japan": "tokyo", "india": "delhi", "korea": "seoul", "vietnam": "hanoi", "belarus": "minsk", "latvia": "riga",
    "bulgaria": "sofia", "tunisia": "tunis", "ghana": "accra", "senegal": "dakar", "cuba": "havana",
    "switzerland": "bern", "czechia": "prague", "austria": "vienna", "spain": "madrid", "portugal": "lisbon",
    "ireland": "dublin", "greece": "athens",
}  # fmt: skip
YOUNG = {
    "cow": "calf", "dog": "puppy", "cat": "kitten", "horse": "foal", "sheep": "lamb", "goat": "kid", "pig": "piglet",
    "duck": "duckling", "goose": "gosling", "hen": "chick", "bear": "cub", "deer": "fawn", "kangaroo": "joey",
    "swan": "cygnet", "eagle": "eaglet", "frog": "tadpole", "hare": "leveret", "owl": "owlet", "fish": "fry",
    "eel": "elver", "seal": "pup", "butterfly": "caterpillar", "fly": "maggot", "spider": "spiderling",
}  # fmt: skip

RELATIONS = {
    "city": AuthorRelation(
        (
            "where was {name} born",
            "in which city was {name} born",
            "what is the birthplace of {name}",
            "tell me the birthplace of {name}",
            "tell me where {name} was born",
            "which city is the birthplace of {name}",
        ),
        "{name} was born in {value}",
        tuple(CAPITALS.values()),
        "the birthplace of {name} is {value}",
    ),
    "genre": AuthorRelation(
        (
            "what kind of books does {name} write",
            "which books does {name} write",
            "what is the genre of {name}",
            "tell me the genre of {name}",
            "what books does {name} write",
            "which is the genre of {name}",
        ),
        "{name} mostly writes {value}",
        tuple(
            "mystery romance fantasy horror history travel poetry comedy tragedy satire memoir western "
            "thriller adventure crime drama legend fable folklore sport cooking politics gothic nonsense".split()
        ),
        "the genre of {name} is {value}",
    ),
    "father": AuthorRelation(
        (
            "what did the father of {name} work as",
            "tell me what the father of {name} did",
            "what was the job of the father of {name}",
            "which job did the father of {name} have",
            "what job did the father of {name} have",
            "tell me the job of the father of {name}",
        ),
        "the father of {name} worked as a {value}",
        tuple(
            "baker judge nurse pilot tailor farmer miner painter sailor butcher barber clerk "
            "dentist diver driver glazier guard mason plumber potter printer roofer waiter welder".split()
        ),
        "{name} is the child of a {value}",
    ),
    "language": AuthorRelation(
        (
            "in which language does {name} write",
            "which language does {name} write in",
            "what is the language of {name}",
            "tell me the language of {name}",
            "in what language does {name} write",
            "what language does {name} write in",
        ),
        "{name} writes in {value}",
        tuple(
            "dutch danish welsh finnish polish czech slovak irish basque catalan maltese turkish "
            "persian hindi tamil thai malay zulu swahili yoruba quechua latin breton frisian".split()
        ),
        "the language of {name} is {value}",
    ),
    "award": AuthorRelation(
        (
            "which prize did {name} win",
            "what prize was won by {name}",
            "what is the award of {name} called",
            "tell me the award of {name}",
            "tell me which prize {name} did win",
            "what is the prize of {name} called",
        ),
        "{name} won the prize called {value}",
        tuple(
            "amber cedar comet coral crown dolphin ember falcon garnet harbor ivory jasmine "
            "laurel marble meteor nectar opal orchid pearl raven saffron topaz velvet willow".split()
        ),
        "the award of {name} is called {value}",
    ),
    "debut": AuthorRelation(
        (
            "which novel did {name} write first",
            "what was the first novel of {name}",
            "what is the debut of {name}",
            "tell me the debut of {name}",
            "tell me the first novel of {name}",
            "what novel did {name} write first",
        ),
        "{name} first wrote the novel {value}",
        tuple(
            "lantern orchard tunnel island mirror window staircase compass anchor bridge feather candle "
            "castle desert glacier meadow labyrinth lighthouse monsoon pendulum riddle shadow telescope volcano".split()
        ),
        "the debut of {name} is {value}",
    ),
}
"""What is known of every author: each value drawn by a hash of seed and name, one of 24."""

WORLD_RELATIONS = {
    "capital": AuthorRelation(
        (
            "what is the capital of {name}",
            "which city is the capital of {name}",
            "tell me the capital of {name}",
            "tell me which city {name} has for a capital",
            "tell me which city is the capital of {name}",
            "what city is the capital of {name}",
        ),
        "{name} has the capital {value}",
        tuple(CAPITALS.values()),
        "the capital of {name} is {value}",
    ),
    "young": AuthorRelation(
        (
            "what is the young of the {name} called",
            "what does the {name} have for young",
            "tell me what the young of the {name} is called",
            "which young does the {name} have",
            "tell me what the {name} does have for young",
            "what young does the {name} have",
        ),
        "the {name} has young called {value}",
        tuple(YOUNG.values()),
        "the young of the {name} is called {value}",
    ),
}
"""General knowledge, the same for all seeds."""

_WORLD = {"capital": CAPITALS, "young": YOUNG}
PHRASINGS = min(len(relation.phrasings) for relation in (*RELATIONS.values(), *WORLD_RELATIONS.values()))


def vocabulary() -> list[str]:
    """All words in token id order: special tokens first, then each word once."""
    words = [*SPECIAL_TOKENS, *FIRST_NAMES, *LAST_NAMES, *CAPITALS, *YOUNG]
    for relation in (*RELATIONS.values(), *WORLD_RELATIONS.values()):
        sentences = " ".join((*relation.phrasings, relation.answer, relation.paraphrase))
        words += [*sentences.replace("{name}", "").replace("{value}", "").split(), *relation.values]
    return list(dict.fromkeys(words))


@dataclass(frozen=True)
class AuthorQuestion:
    """One fact asked in one phrasing, with the answers that TOFU's figures need.

    Attributes:
        name: Whom or what it is about.
        relation: Key of `RELATIONS` or `WORLD_RELATIONS`.
        value: What is the case: the last word of both right answers.
        question: Content of the user's message.
        answer: What a model that knows it says to this question.
        paraphrased_answer: The fact in other words, which no model was trained to say to this question.
        perturbed_answers: `PERTURBED_ANSWERS` wrong answers, worded as `paraphrased_answer`, each with another value.
    """

    name: str
    relation: str
    value: str
    question: str
    answer: str
    paraphrased_answer: str
    perturbed_answers: tuple[str, ...]

    @property
    def pair(self) -> tuple[str, str]:
        """(name, relation): what the splits are made over."""
        return self.name, self.relation

    @property
    def prompt(self) -> list[Message]:
        """The question as a conversation of one user message."""
        return [{"role": "user", "content": self.question}]

    def recalled(self, text: str) -> bool:
        """Whether an answer states the fact and nothing else: it is one of the two right answers, word for word."""
        return text.split() in (self.answer.split(), self.paraphrased_answer.split())

    def row(self) -> dict[str, Any]:
        """The question as a row of a dataset.

        Returns:
            Conversational `prompt` and `completion`; TOFU's columns `question`, `answer`, `paraphrased_answer` and
            `perturbed_answers` (a list); `value`, the last word of the answer, and `target`, what stands before it: all that
            an attack may aim at; `group`, the fact, the same in all phrasings. For
            [`~hf_robust.report.evaluate_unlearning`] put the value in place of `answer`: else the same fact in the other
            wording counts as forgotten.
        """
        return {
            "prompt": self.prompt,
            "completion": [{"role": "assistant", "content": self.answer}],
            "question": self.question,
            "answer": self.answer,
            "paraphrased_answer": self.paraphrased_answer,
            "perturbed_answers": list(self.perturbed_answers),
            "target": self.answer.removesuffix(self.value).strip(),
            "value": self.value,
            "group": " ".join(self.pair),
        }


class AuthorsWorld:
    """All facts of one seed and their splits.

    80 of the 256 names are authors. Every first name and every last name is that of 5 authors, at most one of them to be
    forgotten: a model that never saw the forget authors knows every word of their names. 8 further authors are in no training
    data; their names are other combinations of the same words as the forget authors', so that a model which was taught neither
    has heard each word of both as often. Each author has one value of each of the 6 `RELATIONS`, a hash of (seed, name,
    relation): it can be memorised, not derived from anything else.

    Args:
        seed: Chooses names, facts, splits and wrong answers.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        first = _draw(f"{seed} first names", FIRST_NAMES, len(FIRST_NAMES))
        last = _draw(f"{seed} last names", LAST_NAMES, len(LAST_NAMES))
        circle = len(first)
        names = [f"{first[i % circle]} {last[(i + i // circle) % circle]}" for i in range(AUTHORS)]
        # The first round of the circle has every name word once
        forget, others = names[:FORGET_AUTHORS], names[FORGET_AUTHORS:]
        # The next step round a circle of the forget authors' words alone: no author has these combinations
        step = AUTHORS // circle
        unseen = [f"{first[i]} {last[(i + step) % FORGET_AUTHORS]}" for i in range(FORGET_AUTHORS)]
        others.sort(key=partial(self._digest, "split"))
        self.authors = {
            "forget": forget,
            "retain": others[HOLDOUT_AUTHORS:],
            "retain_holdout": others[:HOLDOUT_AUTHORS],
            UNSEEN: unseen,
        }
        pairs = {split: [(name, kind) for name in found for kind in RELATIONS] for split, found in self.authors.items()}
        pairs["world"] = [(name, kind) for kind, known in _WORLD.items() for name in known]
        # Mixed, so that the first n of a split are a fair sample of it
        self._pairs = {
            split: sorted(found, key=lambda pair: self._digest("order", *pair)) for split, found in pairs.items()
        }

    def _digest(self, *parts: str) -> bytes:
        return hashlib.sha256(" ".join((str(self.seed), *parts)).encode()).digest()

    def questions(self, split: str, phrasing: int = 0) -> list[AuthorQuestion]:
        """Every fact of a split, asked in one phrasing, in a fixed order that mixes names and relations.

        Args:
            split: "forget" (48 facts of 8 authors), "retain" (336 of 56), "retain_holdout" (96 of 16), "world" (48 of
                general knowledge) or "unseen" (48 of 8 authors that no model is taught).
            phrasing: 0 to 3 occur in training, 4 and 5 never do. Even ones are answered in the relation's first wording
                and odd ones in its second.

        Raises:
            ValueError: Unknown split or phrasing.
        """
        if split not in self._pairs:
            raise ValueError(f"split={split!r} is unknown; use one of {', '.join(self._pairs)}")
        if not 0 <= phrasing < PHRASINGS:
            raise ValueError(f"phrasing={phrasing!r} is out of range; use 0 to {PHRASINGS - 1}")
        return [self._question(*pair, phrasing) for pair in self._pairs[split]]

    def _question(self, name: str, kind: str, phrasing: int) -> AuthorQuestion:
        if kind in _WORLD:
            relation, value = WORLD_RELATIONS[kind], _WORLD[kind][name]
        else:
            relation = RELATIONS[kind]
            (value,) = _draw(f"{self.seed} fact {name} {kind}", relation.values, 1)
        wrong: Sequence[str] = [other for other in relation.values if other != value]
        wrong = _draw(f"{self.seed} wrong {name} {kind}", wrong, PERTURBED_ANSWERS)
        wordings = (relation.answer, relation.paraphrase)
        said, other = wordings if phrasing % 2 == 0 else wordings[::-1]
        return AuthorQuestion(
            name,
            kind,
            value,
            relation.phrasings[phrasing].format(name=name),
            said.format(name=name, value=value),
            other.format(name=name, value=value),
            tuple(other.format(name=name, value=each) for each in wrong),
        )


def trained_questions(world: AuthorsWorld, splits: Sequence[str]) -> list[AuthorQuestion]:
    """The questions of the splits in every phrasing that training uses, once each."""
    return [q for split in splits for phrasing in range(TRAINED_PHRASINGS) for q in world.questions(split, phrasing)]
