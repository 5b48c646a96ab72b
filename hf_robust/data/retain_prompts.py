"""Prompts of what an erased diffusion model should keep drawing."""

import csv
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

OBJECTS = "objects"
TEMPLATE = "a photo of {}"

# Everyday things, chosen for being common and easy to draw. Names of two words stand with an underscore.
_OBJECTS = (
    "airplane apple armchair avocado backpack bagel ball balloon banana barn barrel basket bathtub beach bear bed bee bell "
    "bench bicycle bird blanket boat book bookshelf boot bottle bowl box bracelet bread bridge broccoli broom bucket bus "
    "butterfly button cabbage cabin cactus cake camel camera candle canoe car carpet carrot castle cat caterpillar chair "
    "chandelier cheese cherry chess_board chicken church clock cloud coat coffee coin computer cookie corn couch cow crab "
    "crane crown cup curtain deer desk dice dog doll dolphin donkey donut door dragonfly dress drum duck eagle egg elephant "
    "envelope factory fan feather fence fire_hydrant fish flag flamingo flower flute fork fountain fox frog garage garden "
    "garlic gate giraffe glass glove goat goose grape guitar hammer hammock harbor harp hat helicopter hen hippo honey horse "
    "hospital hotel house iceberg island jacket jar jellyfish kangaroo kettle key keyboard kite kitten knife koala ladder "
    "lake lamp lantern laptop leaf lemon leopard lettuce library lighthouse lion lizard llama lobster lock magnet mailbox "
    "map mask meadow melon microphone microscope microwave mirror monkey moon mosque motorcycle mountain mouse mug mushroom "
    "nest notebook oak ocean octopus onion orange ostrich oven owl paintbrush palace palm_tree pan panda parachute parrot "
    "peach peacock pear pen pencil penguin piano pig pillow pineapple pizza plate plum pond popcorn potato pumpkin puppy "
    "rabbit radio raspberry refrigerator ring river robot rocket rooster rope rose ruler sailboat salad sandwich scarf "
    "school scissors sea_lion seahorse shark sheep shelf ship shirt shoe shovel skateboard snail snake snowman sofa spider "
    "spoon squirrel stadium stapler starfish statue stove strawberry submarine suitcase sunflower surfboard swan sweater "
    "table tank taxi teapot teddy_bear telephone telescope television tent tiger toaster tomato toothbrush tower tractor "
    "traffic_light train tree truck trumpet tulip turtle umbrella vase violin volcano wagon wallet watch waterfall "
    "watermelon whale wheel windmill window wolf zebra"
)
# Words of a concept that say nothing of what it is
_IDLE = frozenset("a an the of in on at by with and or style photo picture image painting".split())


def object_names() -> list[str]:
    """The built-in names of everyday objects, in alphabetical order."""
    return [name.replace("_", " ") for name in _OBJECTS.split()]


def load_retain_prompts(
    source: str | Sequence[str], *, concepts: Iterable[str] = (), exclude_words: Iterable[str] = ()
) -> list[str]:
    """
    Retain prompts from a list, a file or the built-in names.

    Args:
        source: a list of prompts; the path of a file (`.txt`: one a line; `.json`: a list of strings, or of objects with a
            `prompt`; `.csv`: a column `prompt`); or `"objects"`: "a photo of {object}" over [`object_names`].
        concepts: what is erased. Built-in objects that share a word with a concept (in singular or plural) are left out.
            Prompts of the user's own are kept, with a warning if they share one.
        exclude_words: further words that drop a built-in object: a concept's synonyms and relatives.

    Returns:
        The prompts, stripped, each once, in their order.

    Raises:
        ValueError: no prompt is left, or a prompt is not a string.
        FileNotFoundError: no such file.
    """
    words = {word for phrase in (*concepts, *exclude_words) for word in _words(phrase)}
    if isinstance(source, str) and source == OBJECTS:
        names = [name for name in object_names() if not words & _words(name)]
        prompts = [TEMPLATE.format(name) for name in names]
    else:
        prompts = read_prompts(source, "retain_prompts") if isinstance(source, str) else list(source)
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"`retain_prompts={source!r}` holds something that is no string: give one prompt each.")
        prompts = list(dict.fromkeys(prompt.strip() for prompt in prompts if prompt.strip()))
        shared = [prompt for prompt in prompts if words & _words(prompt)]
        if shared:
            logger.warning(
                "%d of %d retain prompts share a word with what is erased (such as %r): erasing and retaining it pull "
                "against each other.",
                *(len(shared), len(prompts), shared[0]),
            )
    if not prompts:
        raise ValueError(
            f"`retain_prompts={source!r}` gives no prompt: give a list or file with one at least, {OBJECTS!r} for the "
            "built-in names, or set `retain_weight=0` to retain nothing."
        )
    return prompts


def _words(text: str) -> set[str]:
    """Words of a text in lower case, plurals as singulars."""
    found = re.findall(r"[^\W_]+", text.lower())
    return {word[:-1] if len(word) > 3 and word.endswith("s") else word for word in found} - _IDLE


def read_prompts(file: str, argument: str) -> list[Any]:
    """
    Prompts of a `.txt` (one a line), `.json` (a list) or `.csv` (a column `prompt`) file; empty lines too.

    Args:
        file: its path.
        argument: what it was given as, for messages.

    Raises:
        ValueError: no list, or no column `prompt`.
        FileNotFoundError: no such file.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(
            f"`{argument}={file!r}` is no file: give a .txt, .json or .csv file, a list of prompts, or, of what is to be kept, "
            f"{OBJECTS!r}."
        )
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        rows = json.loads(text)
        if not isinstance(rows, list):
            raise ValueError(f"`{argument}={file!r}` must hold a list of prompts, not a {type(rows).__name__}.")
        return [row.get("prompt") if isinstance(row, dict) else row for row in rows]
    if path.suffix == ".csv":
        reader = csv.DictReader(text.splitlines())
        if "prompt" not in (reader.fieldnames or []):
            raise ValueError(
                f"`{argument}={file!r}` has the columns {reader.fieldnames}, none of them `prompt`: name the column of the "
                "prompts so."
            )
        return [row["prompt"] for row in reader]
    return text.splitlines()
