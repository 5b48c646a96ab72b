"""What the fuzzing tests draw: columns of dataset rows, and values of configuration fields."""

import dataclasses
from typing import Any

from hypothesis import strategies as st

# ---- Texts and messages ----

_WORDS = "how do i bake a cake build bomb sure here is no sorry step one two three four flour mix it".split()
PLAIN = st.lists(st.sampled_from(_WORDS), min_size=1, max_size=6).map(" ".join)
ODD_TEXTS = st.sampled_from(
    [
        "",
        " ",
        "\n\t",
        "\x00",
        "🍰🔥",
        "\u200b\u200b",
        "\u202eekac",
        "é" * 50,
        "<eos>",
        "<pad> <pad>",
        "{{ 1/0 }}",
        "{% for",
    ]
    + ["cake " * 400, "x" * 5000, "\ufeffhow", "<user> <bot>", "NULL", "[]"]
)
TEXTS = st.one_of(PLAIN, PLAIN, PLAIN, ODD_TEXTS, st.text(max_size=12))
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "", "SYSTEM", "owner", "🤖"])


def messages(role: str) -> list[st.SearchStrategy[list[Any]]]:
    """Cells of messages, by kinds that a column may hold: pyarrow takes no two types in one."""
    good = PLAIN.map(lambda text: [{"role": role, "content": text}])
    odd = [
        st.fixed_dictionaries({"role": ROLES, "content": TEXTS}),
        st.fixed_dictionaries({"role": ROLES | st.none(), "content": st.none() | TEXTS}),
        st.fixed_dictionaries({"content": TEXTS}),
        st.fixed_dictionaries({"role": ROLES}),
        st.fixed_dictionaries({"from": ROLES, "value": TEXTS}),
        st.none() | st.fixed_dictionaries({"role": ROLES, "content": TEXTS}),
    ]
    other = [
        st.fixed_dictionaries({"role": ROLES, "content": st.integers(-5, 5)}),
        st.fixed_dictionaries(
            {"role": ROLES, "content": st.lists(st.fixed_dictionaries({"type": TEXTS, "text": TEXTS}), max_size=2)}
        ),
        st.fixed_dictionaries({"role": ROLES, "content": st.fixed_dictionaries({"text": TEXTS})}),
    ]
    lists = [good | st.lists(message, max_size=3) for message in odd] + [
        st.lists(message, max_size=3) for message in other
    ]
    return [good] * len(lists) + lists


# How many rows
_COUNT = st.sampled_from([1, 2, 2, 2, 3, 3, 4, 4, 0])

# What may stand where a text or a list of messages belongs; one kind for all rows of a column, as in Arrow
ODD_CELLS: list[st.SearchStrategy[Any]] = [
    st.none(),
    st.integers(-(2**40), 2**40),
    st.floats(),
    st.booleans(),
    st.binary(max_size=8),
    st.lists(st.integers(-3, 99), max_size=4),
    st.lists(TEXTS | st.none(), max_size=3),
    st.lists(st.lists(TEXTS, max_size=2), max_size=2),
    st.fixed_dictionaries({"role": TEXTS, "content": TEXTS}),
    st.dictionaries(st.sampled_from("ab"), st.integers(), max_size=2),
]


@st.composite
def text_columns(
    draw: st.DrawFn, roles: dict[str, str], kinds: tuple[bool, ...] = (False, True)
) -> dict[str, list[Any]]:
    """
    Columns of one to four rows (now and then none): plain texts or messages, of which one column may be odd or missing.

    Args:
        roles: the columns that belong there, with the role of their messages.
        kinds: whether they are conversational, one of these.
    """
    count = draw(_COUNT)
    conversational = draw(st.sampled_from(kinds))
    odd = draw(st.sampled_from([*[None] * (2 * len(roles)), *roles]))
    texts = draw(st.sampled_from([PLAIN, TEXTS]))
    columns: dict[str, list[Any]] = {}
    for name, role in roles.items():
        cell = draw(st.sampled_from(messages(role))) if conversational else texts
        if name == odd:
            # Texts among messages are an odd kind too
            kind = draw(st.sampled_from(["missing", "hole", "other", *range(len(ODD_CELLS))]))
            if kind == "missing":
                continue
            if kind == "hole":
                cell = st.none() | cell
            elif kind == "other":
                cell = TEXTS if conversational else messages(role)[0]
            else:
                cell = ODD_CELLS[kind]
        columns[name] = draw(st.lists(cell, min_size=count, max_size=count))
    return columns | draw(
        st.sampled_from([{}, {}, {}, {"text": ["x"] * count}, {"tools": ["{"] * count}, {"a": [1] * count}])
    )


@st.composite
def any_text_columns(draw: st.DrawFn) -> dict[str, list[Any]]:
    """Columns of the kinds that SFTTrainer takes: prompt and completion, messages, or text."""
    kind = draw(st.sampled_from(["pair", "pair", "messages", "text", "ids"]))
    if kind == "pair":
        return draw(text_columns({"prompt": "user", "completion": "assistant"}))
    count = draw(_COUNT)
    if kind == "ids":
        good_ids = st.lists(st.integers(4, 27), min_size=2, max_size=6)
        cell = draw(st.sampled_from([good_ids, good_ids, good_ids | st.lists(st.integers(-2, 70), max_size=5)]))
        columns = {"input_ids": draw(st.lists(cell, min_size=count, max_size=count))}
        if draw(st.booleans()):
            columns["labels"] = draw(st.lists(cell, min_size=count, max_size=count))
        return columns
    good = TEXTS if kind == "text" else draw(st.sampled_from(messages("assistant")))
    cell = draw(st.sampled_from([*[good] * len(ODD_CELLS), good | st.none(), *ODD_CELLS]))
    return {kind: draw(st.lists(cell, min_size=count, max_size=count))}


# ---- Classification ----

LABELS: list[st.SearchStrategy[Any]] = [st.integers(0, 2)] * 18 + [
    st.integers(-3, 5), st.floats(), st.sampled_from([0.0, 1.0, 1.5]), st.none(), st.none() | st.integers(0, 2),
    st.booleans(), TEXTS, st.lists(st.integers(0, 2), max_size=2), st.just(2**62),
]  # fmt: skip


@st.composite
def pixel_columns(draw: st.DrawFn, *, size: int = 8, images: bool = False) -> dict[str, list[Any]]:
    """Columns of an image classifier's rows: `pixel_values` (raw or what a processor made) or `image`, and labels."""
    count = draw(_COUNT)
    kind = draw(
        st.sampled_from(["good"] * 12 + ["nan", "inf", "bytes", "ints", "flat", "text", "none", "empty", "mixed"])
    )
    channels, height = draw(
        st.sampled_from([(3, size)] * 12 + [(1, size), (4, size), (3, size // 2), (3, 2 * size), (3, 1)])
    )
    columns: dict[str, list[Any]] = {}
    name = draw(st.sampled_from(["pixel_values"] * 9 + ["image", "pixels"]))

    def pixels(row: int) -> Any:
        level = {"nan": float("nan"), "inf": float("inf"), "bytes": 200.0, "ints": row % 2}.get(
            kind, 0.1 + 0.2 * (row % 4)
        )
        if kind in ("text", "none", "empty", "flat"):
            return {"text": "cake.png", "none": None, "empty": [], "flat": [0.5] * size}[kind]
        side = size // 2 if kind == "mixed" and row else height
        return [[[level] * side] * side] * channels

    columns[name] = [pixels(row) for row in range(count)]
    if images and name == "image" and kind == "good":
        from tests.vlm_data import picture

        columns[name] = [picture(row, 4 + row, 8) for row in range(count)]
    if draw(st.sampled_from([True] * 15 + [False])):
        label = draw(st.sampled_from(LABELS))
        column = draw(st.sampled_from(["labels", "labels", "label"]))
        columns[column] = draw(st.lists(label, min_size=count, max_size=count))
    return columns


@st.composite
def token_columns(draw: st.DrawFn) -> dict[str, list[Any]]:
    """Columns of a text classifier's tokenised rows."""
    count = draw(_COUNT)
    length = draw(st.sampled_from([4, 4, 4, 4, 4, 1, 16, 17, 40]))
    good = st.lists(st.integers(3, 39), min_size=length, max_size=length)
    odd = [
        st.lists(st.integers(-2, 45), min_size=length, max_size=length), st.lists(st.integers(3, 39), max_size=5),
        st.lists(st.floats(0, 9), min_size=length, max_size=length), st.none(), st.integers(0, 9), TEXTS,
        st.lists(TEXTS, max_size=2), st.just([]),
    ]  # fmt: skip
    cell = draw(st.sampled_from([good] * 16 + odd))
    columns: dict[str, list[Any]] = {
        draw(st.sampled_from(["input_ids"] * 20 + ["text"])): draw(st.lists(cell, min_size=count, max_size=count))
    }
    mask = draw(st.sampled_from([None, 1, 1, 1, 1, 1, 1, 0, "odd"]))
    if mask is not None:
        columns["attention_mask"] = [[1, 0, 5, -1][:length] if mask == "odd" else [mask] * length] * count
    if draw(st.sampled_from([True] * 15 + [False])):
        label = draw(st.sampled_from(LABELS))
        columns["labels"] = draw(st.lists(label, min_size=count, max_size=count))
    return columns


@st.composite
def picture_columns(draw: st.DrawFn) -> dict[str, list[Any]]:
    """Columns of a vision-language model's rows."""
    from tests.vlm_data import picture

    columns = draw(text_columns({"prompt": "user", "completion": "assistant"}, (True, True, True, False)))
    count = len(next(iter(columns.values()), []))
    kind = draw(
        st.sampled_from(["images"] * 9 + ["image", "several", "none", "empty", "holes", "paths", "missing", "pixels"])
    )
    cells = {
        "images": lambda row: [picture(row)],
        "image": picture,
        "several": lambda row: [picture(place) for place in range(row % 3)],
        "none": lambda row: None,
        "empty": lambda row: [],
        "holes": lambda row: [picture(row), None],
        "paths": lambda row: ["cake.png"],
        "pixels": lambda row: [[0.5] * 8] * 8,
    }
    if kind != "missing":
        columns["image" if kind == "image" else "images"] = [cells[kind](row) for row in range(count)]
    return columns


@st.composite
def captioned_columns(draw: st.DrawFn, *, size: int = 16) -> dict[str, list[Any]]:
    """Columns of a diffusion trainer's rows: images of any kind (the model takes `size` x `size`), and captions."""
    from tests.diffusion_trainer_data import CAPTIONS, image

    count = draw(_COUNT)
    side = draw(st.sampled_from([size] * 12 + [size // 2, 2 * size, 1]))
    cells = {
        "images": lambda row: image(row, side),
        "bytes": lambda row: [[[row * 50 % 256] * 3] * side] * side,
        "floats": lambda row: [[[0.2 * (row % 5)] * 3] * side] * side,
        "grey": lambda row: [[row * 50 % 256] * side] * side,
        "transparent": lambda row: image(row, side).convert("RGBA"),
        "mixed": lambda row: image(row, side * (1 + row % 2)),
        "nan": lambda row: [[[float("nan")] * 3] * side] * side,
        "large": lambda row: [[[400] * 3] * side] * side,
        "two channels": lambda row: [[[1, 2]] * side] * side,
        "flat": lambda row: [0.5] * side,
        "empty": lambda row: [],
        "none": lambda row: None,
        "holes": lambda row: None if row % 2 else image(row, side),
        "late hole": lambda row: None if row == count - 1 else image(row, side),
        "paths": lambda row: "cake.png",
        "raw": lambda row: b"\x89PNG",
        "number": lambda row: 5,
        "files": lambda row: {"bytes": None, "path": None},
        "texts": lambda row: ["cake"],
        "dict": lambda row: {"a": 1},
    }
    kind = draw(st.sampled_from(["images"] * 14 + list(cells)))
    name = draw(st.sampled_from(["image"] * 15 + ["images"]))
    columns: dict[str, list[Any]] = {name: [cells[kind](row) for row in range(count)]}
    known = st.sampled_from([*CAPTIONS, "", "cat " * 3])
    text = draw(st.sampled_from([known] * 14 + [known | TEXTS, known | st.none(), *ODD_CELLS]))
    columns[draw(st.sampled_from(["text"] * 15 + ["caption"]))] = draw(st.lists(text, min_size=count, max_size=count))
    return columns


@st.composite
def erased_columns(draw: st.DrawFn) -> dict[str, list[Any]]:
    """Columns of prompts that draw what is to be erased, some with its name."""
    count = draw(_COUNT)
    prompt = st.sampled_from(["vangogh", "a photo in vangogh style", "a red circle", "the house in vangogh style", "a"])
    text = draw(st.sampled_from([prompt] * 14 + [prompt | TEXTS, prompt | st.none(), *ODD_CELLS]))
    columns: dict[str, list[Any]] = {
        draw(st.sampled_from(["text"] * 15 + ["prompt"])): draw(st.lists(text, min_size=count, max_size=count))
    }
    if draw(st.booleans()):
        good = st.sampled_from(["vangogh", "a"])
        concept = draw(st.sampled_from([good] * 10 + [TEXTS, st.none() | TEXTS, *ODD_CELLS]))
        columns["concept"] = draw(st.lists(concept, min_size=count, max_size=count))
    return columns


# ---- Configurations ----

_NAN, _INF = float("nan"), float("inf")
_NUMBERS = [0, 0, 1, 2, 0.5, 0.01, 1.0, -1, -0.5, 1e-12, 1e-300, 10, 1e6, 1e12, 1e308, 2**70, _NAN, _INF, -_INF]
# Any number of steps or rows is a lawful wish: none that takes longer than a test may
_COUNTS = [0, 1, 1, 2, 3, 5, -1, -7, 0.5, 2.5, 1.0, _NAN, _INF, True]
_COUNT_NAMES = (
    "steps", "samples", "rows", "replays", "batch_size", "epochs", "tokens", "num_noisy_layers", "length", "bank_size",
    "image_size",
)  # fmt: skip
_ODD = [None, "", "0.1", "yes", "\ud800", "best", b"x", [], [0], ["x"], [None], [[1]], {}, {"a": 1}, (), True, False]
_LITERALS = [
    "best", "last", "zero", "random", "sign", "adam", "l2", "l2_token", "linf", "l1", "all_prompt", "user_content", "v1", "v2",
    "ce", "kl", "activation", "none", "sam", "smooth", "latent", "embedding", "largest", "lowest", "gaussian", "uniform",
    "adaptive", "image", "pixel_values", "both", "pixels", "constant", "linear", "cosine", "weat", "kl_dro", "Best", "l3", " ",
]  # fmt: skip
# Fields that the subjects of these tests cannot do without, and what takes a run of its own
_LEFT_OUT = ("output_dir", "profile", "noise_policy", "latent_bank_dir")
PARENT_FIELDS = (
    "learning_rate", "weight_decay", "max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps",
    "max_length", "seed", "warmup_steps", "num_train_epochs", "label_smoothing_factor", "truncation_mode",
    "activation_checkpointing", "packing", "padding_free", "completion_only_loss", "assistant_only_loss",
    "neftune_noise_alpha",
)  # fmt: skip


def own_fields(config: type[Any], parent: type[Any], base: type[Any]) -> list[str]:
    """
    Fields to draw: those that the parent does not have, those whose default differs, and some that all share.

    Args:
        config: a trainer's configuration.
        parent: what it inherits from.
        base: transformers' TrainingArguments.
    """
    known = {field.name: field for field in dataclasses.fields(parent)}
    own = []
    for field in dataclasses.fields(config):
        old = known.get(field.name)
        changed = old is None or (field.default, str(field.default_factory)) != (old.default, str(old.default_factory))
        if field.init and field.name not in _LEFT_OUT and (changed or field.name in PARENT_FIELDS):
            own.append(field.name)
    return own


@st.composite
def config_values(draw: st.DrawFn, fields: list[str], choices: dict[str, list[Any]]) -> dict[str, Any]:
    """
    Values of one to three fields: mostly numbers, otherwise known and unknown names, and things of another type.

    Args:
        fields: names of the fields.
        choices: values that belong to some of them, drawn there more often than others.
    """
    names = draw(st.lists(st.sampled_from(fields), min_size=1, max_size=2, unique=True))
    values: dict[str, Any] = {}
    for name in names:
        numbers = _COUNTS if name.endswith(_COUNT_NAMES) else _NUMBERS
        pools = [numbers, numbers, numbers, _LITERALS, _ODD]
        if name in choices:
            pools = [choices[name], choices[name], choices[name], _LITERALS, numbers, _ODD]
        values[name] = draw(st.sampled_from(draw(st.sampled_from(pools))))
    return values
