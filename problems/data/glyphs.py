"""Made-up handwriting: few-shot image classes that need no download.

Each alphabet has a style, each class is a set of strokes in the style of its alphabet, and each
example draws the strokes anew. A stroke is a pen path whose direction turns at a rate that changes
once, with a possible corner at that place: straight lines, hooks, arcs, waves and loops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .images import ImageClasses

__all__ = ["glyphs"]

_STROKES = 4  # at most, in one glyph
_POINTS = 40  # along one stroke
_CHUNK = 64  # glyphs rasterised at a time, so that the distances stay in the cache


@dataclass(frozen=True)
class _Hand:
    """How unsteady the hand is that draws an example: standard deviations."""

    place: float = 0.012  # start of a stroke
    attach: float = 0.01  # place on the stroke to which another is attached
    heading: float = 0.025
    length: float = 0.025  # relative
    bend: float = 0.025
    corner: float = 0.025  # relative
    angle: float = 0.06  # of the whole drawing, as are all below
    shear: float = 0.06
    stretch: float = 0.06  # relative
    shift: float = 0.043  # relative to the picture
    width: float = 0.10  # of the pen, relative


_HAND = _Hand()


def glyphs(
    classes: int = 400,
    examples: int = 20,
    alphabets: int = 20,
    size: int = 28,
    seed: int = 0,
) -> ImageClasses:
    """A synthetic data set in the manner of Omniglot, the same bits for the same arguments.

    Args:
        classes: Number of characters, spread evenly over the alphabets.
        examples: Drawings of each character.
        alphabets: Number of styles.
        size: Height and width in pixels.
        seed: Seed of everything random; the global generator is not touched.

    Returns:
        Images ``[classes, examples, 1, size, size]`` uint8, paper 255 and ink 0, with names
        "alphabet01/character01" and so on.

    Raises:
        ValueError: A count is not positive, there are more alphabets than classes, or the size is
            below 8 pixels.
    """
    for name, value in (("classes", classes), ("examples", examples), ("alphabets", alphabets)):
        if value < 1:
            raise ValueError(f"`{name}` is {value}; it must be at least 1")
    if alphabets > classes:
        raise ValueError(
            f"`alphabets` is {alphabets}, but there are {classes} classes; give each alphabet one"
        )
    if size < 8:
        raise ValueError(f"`size` is {size}; strokes need at least 8 pixels")
    random = _Random(seed)
    alphabet = torch.arange(classes) * alphabets // classes
    styles = _styles(alphabets, random)
    characters = _characters(styles, alphabet, random)
    sizes = random.uniform(classes, low=0.55, high=1.0).repeat_interleave(examples)
    paths = _place(_trace(_redraw(characters, examples, random)), sizes, random)
    widths = styles.width[alphabet] * random.uniform(classes, low=0.6, high=1.6)
    widths = widths.clamp(0.02, 0.05).repeat_interleave(examples)
    widths = widths * random.normal(classes * examples, scale=_HAND.width).exp().clamp(0.7, 1.4)
    pictures = _rasterise(paths, widths, size)
    first = torch.searchsorted(alphabet, alphabet)
    names = tuple(
        f"alphabet{a + 1:02d}/character{i - f + 1:02d}"
        for i, (a, f) in enumerate(zip(alphabet.tolist(), first.tolist(), strict=True))
    )
    return ImageClasses(pictures.view(classes, examples, 1, size, size), names)


class _Random:
    """Seeded draws in float64 on the CPU."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        draws = torch.rand(*shape, generator=self.generator, dtype=torch.float64)
        return low + (high - low) * draws

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=self.generator, dtype=torch.float64)


@dataclass(frozen=True)
class _Styles:
    """Habits of the alphabets; every tensor is ``[alphabets]``, angles in radians."""

    strokes: Tensor  # mean number of strokes
    directions: Tensor  # number of directions in which strokes set out
    slant: Tensor
    bend: Tensor  # typical turn of a stroke from its start to its middle
    straight: Tensor  # probability that half a stroke is straight
    corner: Tensor  # probability of a corner
    attach: Tensor  # probability that a stroke starts on an earlier one
    length: Tensor  # typical length of a stroke
    width: Tensor  # half the width of the pen, relative to the picture


@dataclass(frozen=True)
class _Strokes:
    """Pen paths of a batch of glyphs; every tensor is ``[batch, strokes]``."""

    drawn: Tensor  # whether the stroke exists
    x: Tensor  # start, relative to the anchor
    y: Tensor
    heading: Tensor
    length: Tensor
    bend: Tensor  # turn over the first half
    bend_after: Tensor  # turn over the second half
    corner: Tensor  # turn at once, in the middle
    anchor: Tensor  # earlier stroke on which this one starts, or -1: the origin
    anchor_at: Tensor  # where on that stroke, in [0, 1]


def _styles(count: int, random: _Random) -> _Styles:
    def between(low: float, high: float) -> Tensor:
        return random.uniform(count, low=low, high=high)

    return _Styles(
        strokes=between(1.6, 4.2),
        directions=between(4.0, 9.0).floor(),
        slant=between(-0.3, 0.3),
        bend=between(0.4, 2.8),
        straight=between(0.0, 0.8),
        corner=between(0.0, 0.8),
        attach=between(0.5, 1.0),
        length=between(0.9, 1.6),
        width=between(0.018, 0.042),
    )


def _characters(styles: _Styles, alphabet: Tensor, random: _Random) -> _Strokes:
    """What all drawings of a class share, ``[classes, strokes]``."""
    shape = (len(alphabet), _STROKES)
    style: dict[str, Tensor] = {
        f.name: getattr(styles, f.name)[alphabet].unsqueeze(1) for f in fields(styles)
    }

    def chance(probability: Tensor) -> Tensor:
        return random.uniform(*shape) < probability

    def sign() -> Tensor:
        return random.uniform(*shape).sub(0.5).sign()

    def bend() -> Tensor:
        turn = sign() * style["bend"] * random.uniform(*shape, low=0.6, high=1.4)
        return turn.masked_fill(chance(style["straight"]), 0.0)

    position = torch.arange(_STROKES)
    count = (style["strokes"] + random.uniform(len(alphabet), 1, low=-1.0, high=1.0)).round()
    drawn = position < count.clamp(2, _STROKES)
    direction = (random.uniform(*shape) * style["directions"]).floor() / style["directions"]
    attached = chance(style["attach"]) & (position > 0)
    anchor = (random.uniform(*shape) * position).floor().long()
    return _Strokes(
        drawn=drawn,
        x=random.normal(*shape, scale=0.45).masked_fill(attached, 0.0),
        y=random.normal(*shape, scale=0.45).masked_fill(attached, 0.0),
        heading=2 * math.pi * direction + style["slant"],
        length=style["length"] * random.uniform(*shape, low=0.5, high=1.5),
        bend=bend(),
        bend_after=bend(),
        corner=(sign() * random.uniform(*shape, low=1.0, high=2.4)).masked_fill(
            ~chance(style["corner"]), 0.0
        ),
        anchor=anchor.masked_fill(~attached, -1),
        anchor_at=(random.uniform(*shape) * 3).floor() / 2,
    )


def _redraw(characters: _Strokes, examples: int, random: _Random) -> _Strokes:
    """Other drawings of the same characters, ``[classes * examples, strokes]``."""
    again: dict[str, Tensor] = {
        f.name: getattr(characters, f.name).repeat_interleave(examples, 0)
        for f in fields(characters)
    }
    shape = again["x"].shape

    def jitter(scale: float) -> Tensor:
        return random.normal(*shape, scale=scale)

    return _Strokes(
        drawn=again["drawn"],
        x=again["x"] + jitter(_HAND.place),
        y=again["y"] + jitter(_HAND.place),
        heading=again["heading"] + jitter(_HAND.heading),
        length=again["length"] * jitter(_HAND.length).exp(),
        bend=again["bend"] + jitter(_HAND.bend),
        bend_after=again["bend_after"] + jitter(_HAND.bend),
        corner=again["corner"] * jitter(_HAND.corner).exp(),
        anchor=again["anchor"],
        anchor_at=again["anchor_at"] + jitter(_HAND.attach),
    )


def _trace(strokes: _Strokes) -> Tensor:
    """Points along the strokes, ``[batch, strokes, points, 2]``; NaN where nothing is drawn."""
    along = torch.linspace(0, 1, _POINTS, dtype=torch.float64)
    first, second = (2 * along).clamp(max=1), (2 * along - 1).clamp(min=0)
    heading = (
        strokes.heading.unsqueeze(-1)
        + strokes.bend.unsqueeze(-1) * first
        + strokes.bend_after.unsqueeze(-1) * second
        + strokes.corner.unsqueeze(-1) * (along > 0.5)
    )
    step = strokes.length.unsqueeze(-1) / (_POINTS - 1)
    moves = torch.stack([step * heading.cos(), step * heading.sin()], -1)
    paths = moves.cumsum(2) - moves[:, :, :1]
    batch = torch.arange(len(paths))
    placed: list[Tensor] = []
    for i in range(_STROKES):
        start = torch.stack([strokes.x[:, i], strokes.y[:, i]], -1)
        if placed:
            earlier = torch.stack(placed, 1)
            at = (strokes.anchor_at[:, i] * (_POINTS - 1)).round().long().clamp(0, _POINTS - 1)
            anchor = earlier[batch, strokes.anchor[:, i].clamp(min=0), at]
            start = start + anchor * (strokes.anchor[:, i] >= 0).unsqueeze(-1)
        placed.append(paths[:, i] + start.unsqueeze(1))
    paths = torch.stack(placed, 1)
    return paths.masked_fill(~strokes.drawn[:, :, None, None], math.nan)


def _place(paths: Tensor, sizes: Tensor, random: _Random) -> Tensor:
    """Fit each drawing into the unit square, then move it as a hand would.

    Small and large letters keep their relative size, ``sizes [batch]``.
    """
    batch = len(paths)
    low = paths.nan_to_num(nan=math.inf).amin((1, 2))
    high = paths.nan_to_num(nan=-math.inf).amax((1, 2))
    # No glyph is blown up to more than twice its size: a short line stays one.
    extent = (high - low).amax(-1).clamp(min=0.5)
    centred = (paths - ((low + high) / 2)[:, None, None]) / extent[:, None, None, None]
    angle = random.normal(batch, scale=_HAND.angle)
    shear = random.normal(batch, scale=_HAND.shear)
    scale = (
        0.74 * sizes[:, None] * random.normal(batch, 2, scale=_HAND.stretch).exp().clamp(0.7, 1.3)
    )
    cos, sin = angle.cos(), angle.sin()
    x, y = (centred * scale[:, None, None]).unbind(-1)
    x = x + shear[:, None, None] * y
    turned = torch.stack(
        [
            cos[:, None, None] * x - sin[:, None, None] * y,
            sin[:, None, None] * x + cos[:, None, None] * y,
        ],
        -1,
    )
    # Not so far that the drawing leaves the picture.
    reach = turned.nan_to_num(nan=0.0).abs().amax((1, 2))
    room = (0.47 - reach).clamp(min=0.0)
    shift = random.normal(batch, 2, scale=_HAND.shift).clamp(-room, room)
    return turned + 0.5 + shift[:, None, None]


def _rasterise(paths: Tensor, widths: Tensor, size: int) -> Tensor:
    """Draw ink 0 on paper 255 with a soft edge of one pixel, ``[batch, size, size]``."""
    points = (paths * size).nan_to_num(nan=-4.0 * size).to(torch.float32).flatten(1, 2)
    pixels = torch.arange(size, dtype=torch.float32) + 0.5
    pictures = torch.empty(len(points), size, size, dtype=torch.uint8)
    for start in range(0, len(points), _CHUNK):
        x, y = points[start : start + _CHUNK].unbind(-1)
        across = (x.unsqueeze(-1) - pixels).square().unsqueeze(2)
        down = (y.unsqueeze(-1) - pixels).square().unsqueeze(3)
        distance = (across + down).amin(1).sqrt()
        radius = (widths[start : start + _CHUNK] * size).to(torch.float32)[:, None, None]
        ink = (radius + 0.5 - distance).clamp(0, 1)
        pictures[start : start + _CHUNK] = (255 * (1 - ink)).round().to(torch.uint8)
    return pictures
