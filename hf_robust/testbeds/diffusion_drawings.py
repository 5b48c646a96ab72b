"""The diffusion testbed's pictures: shapes × colours × paper, drawn anti-aliased with small jitters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 30, 40),
    "green": (20, 150, 60),
    "blue": (35, 60, 205),
    "yellow": (240, 190, 20),
    "purple": (140, 40, 160),
    "orange": (240, 110, 20),
}
TEXTURES = ("plain", "striped", "dotted", "checked")
"""What the paper behind the shape is like, in greys."""

OVERSAMPLING = 4
"""Drawn this much larger and averaged down: edges are anti-aliased."""

Point = tuple[float, float]


def _regular(count: int, turn: float = 0.0, radius: float = 1.0) -> list[Point]:
    angles = [turn + 2 * math.pi * corner / count for corner in range(count)]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for angle in angles]


def _star(inner: float) -> list[Point]:
    outer, between = _regular(5), _regular(5, math.pi / 5, inner)
    return [point for pair in zip(outer, between, strict=True) for point in pair]


def _cross(arm: float) -> list[Point]:
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    points: list[Point] = []
    for _ in range(4):
        points += quarter
        quarter = [(-y, x) for x, y in quarter]
    return points


def _heart() -> list[Point]:
    angles = [2 * math.pi * step / 40 for step in range(40)]
    return [
        (math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 15.5)
        for a in angles
    ]


OUTLINES: dict[str, list[list[Point]]] = {
    "circle": [_regular(40, radius=0.95)],
    "square": [_regular(4, math.pi / 4, 1.2)],
    "triangle": [[(x, y + 0.2) for x, y in _regular(3, radius=1.15)]],
    "cross": [_cross(0.34)],
    "star": [_star(0.42)],
    "ring": [_regular(40), _regular(40, radius=0.5)],
    "heart": [_heart()],
    "diamond": [[(0.0, -1.15), (0.7, 0.0), (0.0, 1.15), (-0.7, 0.0)]],
}
"""Corners of each shape about (0, 0) with a radius of about 1, y downwards; a second outline is a hole."""


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        shape: One of `OUTLINES`: the concept.
        colour: One of `COLOURS`.
        texture: One of `TEXTURES`.
    """

    shape: str
    colour: str
    texture: str


def draw_paper(texture: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Paper without a shape, float64 [size, size, 3] in 0 to 255."""
    big = size * OVERSAMPLING
    period = big // 4
    y, x = np.mgrid[0:big, 0:big] + 0.5
    light = rng.uniform(238, 255)
    dark = light - rng.uniform(60, 80)
    # The pattern always lies in the same place, so that the model can spend itself on the shapes.
    if texture == "striped":
        marked = (y % period) < period / 2
    elif texture == "dotted":
        marked = (x % period - period / 2) ** 2 + (y % period - period / 2) ** 2 < (0.3 * period) ** 2
    elif texture == "checked":
        marked = (x % (2 * period) < period) != (y % (2 * period) < period)
    else:
        marked = np.zeros_like(x, dtype=bool)
    return np.repeat(_shrink(np.where(marked, dark, light))[..., None], 3, axis=2)


def shape_mask(shape: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """How much of each pixel the shape covers, float64 [size, size] in 0 to 1; place, size and rotation are jittered.

    The radius is 30 to 38 % of the picture's side, the centre up to 8 % off the middle, the rotation up to 12°.
    """
    big = size * OVERSAMPLING
    radius, angle = big * rng.uniform(0.30, 0.38), math.radians(rng.uniform(-12, 12))
    middle = big / 2 + big * rng.uniform(-0.08, 0.08, size=2)
    canvas = Image.new("L", (big, big), 0)
    pen = ImageDraw.Draw(canvas)
    for number, outline in enumerate(OUTLINES[shape]):
        turned = [
            (x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)) for x, y in outline
        ]
        corners = [(middle[0] + radius * x - 0.5, middle[1] + radius * y - 0.5) for x, y in turned]
        pen.polygon(corners, fill=0 if number else 255)
    return _shrink(np.asarray(canvas, dtype=np.float64) / 255)


def draw(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """One picture, uint8 [size, size, 3].

    Args:
        scene: What it shows.
        size: Side in pixels.
        rng: Draws the jitters.
    """
    paper, mask = draw_paper(scene.texture, size, rng), shape_mask(scene.shape, size, rng)[..., None]
    ink = np.array(COLOURS[scene.colour]) + rng.uniform(-10, 10, size=3)
    return np.clip(np.rint(paper * (1 - mask) + ink * mask), 0, 255).astype(np.uint8)


def draw_none(colours: Sequence[str], textures: Sequence[str], size: int, rng: np.random.Generator) -> np.ndarray:
    """A picture that shows no shape, uint8 [size, size, 3]: for the judge's class of everything else.

    Bare paper, a blot of colour, noise, coloured fog, or two shapes that shine through each other, each as often.
    """
    paper = draw_paper(str(rng.choice(textures)), size, rng)
    ink = np.array(COLOURS[str(rng.choice(colours))], dtype=np.float64)
    kind = rng.integers(5)
    if kind == 1:  # a blot: fog, cut off where it is thin
        fog = _fog(size, rng)[..., :1]
        mask = np.clip((fog - np.quantile(fog, rng.uniform(0.6, 0.95))) * 8, 0, 1)
        paper = paper * (1 - mask) + ink * mask
    elif kind == 2:
        paper = rng.uniform(0, 255, size=(size, size, 3)) * rng.uniform(0.3, 1) + paper * rng.uniform(0, 0.4)
    elif kind == 3:
        mask = _fog(size, rng) * rng.uniform(0.3, 1)
        paper = paper * (1 - mask) + ink * mask
    elif kind == 4:
        for shape in rng.choice(list(OUTLINES), size=2, replace=False):
            mask = 0.45 * shape_mask(str(shape), size, rng)[..., None]
            paper = paper * (1 - mask) + ink * mask
    return np.clip(np.rint(paper), 0, 255).astype(np.uint8)


def _fog(size: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth random values, float64 [size, size, 3] in 0 to 1."""
    coarse = Image.fromarray(rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64) / 255


def _shrink(big: np.ndarray) -> np.ndarray:
    """Average over blocks: [n·k, n·k] to [n, n]."""
    side = big.shape[0] // OVERSAMPLING
    return big.reshape(side, OVERSAMPLING, side, OVERSAMPLING).mean(axis=(1, 3))
