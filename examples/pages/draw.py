"""Pages with known answers: digits at random places on paper that is not quite clean."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from examples.pages.stages import split_digits

__all__ = ["Answer", "Box", "Page", "draw_pages", "static"]

Box = tuple[int, ...]  # top, left, bottom, right
Answer = dict[Box, int]

_SCALE = 3
_CELL = 40  # a digit is 24 wide, so that neighbours never touch
_GRID = (4, 6)
_DIRT = 10
_BRIGHTNESS = 15


@dataclass(frozen=True)
class Page:
    """`image`: uint8 `[160, 240]`, ink is bright; `answer`: which digit stands in which box."""

    image: np.ndarray
    answer: Answer


def draw_pages(count: int, seed: int = 0) -> list[Page]:
    """Pages with none to all of their cells filled, the same for the same seed."""
    rng = np.random.default_rng(seed)
    _, digits = split_digits()
    return [_draw(rng, digits) for _ in range(count)]


def static(seed: int = 0) -> np.ndarray:
    """What a broken scanner sends instead of a page."""
    shape = [n * _CELL for n in _GRID]
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def _draw(rng: np.random.Generator, digits: list[tuple[np.ndarray, int]]) -> Page:
    image = rng.integers(0, _DIRT, [n * _CELL for n in _GRID], np.uint8)
    answer = {}
    cells = list(np.ndindex(*_GRID))
    for cell in rng.permutation(len(cells))[: rng.integers(0, len(cells) + 1)]:
        glyph, digit = digits[rng.integers(len(digits))]
        ink = np.kron(glyph, np.ones((_SCALE, _SCALE))).astype(np.uint8) * _BRIGHTNESS
        top, left = np.array(cells[cell]) * _CELL + rng.integers(0, _CELL - len(ink), 2)
        rows, columns = np.nonzero(ink)
        image[top + rows, left + columns] = ink[rows, columns]
        box = (top + rows.min(), left + columns.min(), top + rows.max() + 1, left + columns.max() + 1)
        answer[tuple(map(int, box))] = digit
    return Page(image, answer)
