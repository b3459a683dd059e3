"""The shared case table: arrays that batch normalization has been seen to get wrong, each with its name."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Case:
    """One input of batch normalization; `make` draws its arrays from a fixed seed, in float64."""

    name: str
    shape: tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    mean: float = 0.0
    std: float = 1.0
    mask: str | None = None
    """None, or how to draw one: "positions", "all masked", "one left", "broadcast", "elements"."""
    group: int | None = None
    epsilon: float = 1e-3
    masked_value: float = field(default=np.nan)
    """What stands where the mask hides; NaN shows any leak."""

    def __str__(self) -> str:
        return self.name

    @property
    def axes(self) -> tuple[int, ...]:
        axes = (self.axis,) if isinstance(self.axis, int) else self.axis
        return tuple(sorted(a % len(self.shape) for a in axes))

    @property
    def reduced(self) -> tuple[int, ...]:
        return tuple(a for a in range(len(self.shape)) if a not in self.axes)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[a] for a in self.axes)

    def make(self, seed: int = 0) -> dict[str, np.ndarray | None]:
        """x, gamma, beta, residual, dy, mask; x rounded to float32, so that every precision starts from the same numbers."""
        rng = np.random.default_rng(seed)
        x = (rng.standard_normal(self.shape) * self.std + self.mean).astype(np.float32).astype(np.float64)
        mask = self._mask(rng)
        if mask is not None:
            x = np.where(self.full_mask(mask), x, self.masked_value)
        return {
            "x": x,
            "gamma": rng.uniform(0.5, 1.5, self.parameter_shape),
            "beta": rng.uniform(-1, 1, self.parameter_shape),
            "residual": rng.standard_normal(self.shape),
            "dy": rng.standard_normal(self.shape),
            "mask": mask,
        }

    def _mask(self, rng: np.random.Generator) -> np.ndarray | None:
        positions = tuple(self.shape[a] for a in self.reduced)
        if self.mask is None:
            return None
        if self.mask == "all masked":
            return np.zeros(positions, bool)
        if self.mask == "one left":
            one = np.zeros(positions, bool)
            one.flat[0] = True
            return one
        if self.mask == "broadcast":
            shape = (*self.shape[:1], *(1,) * (len(self.shape) - 1))
        else:
            shape = self.shape if self.mask == "elements" else positions
        mask = rng.random(shape) < 0.7
        mask.flat[0] = True
        return mask

    def full_mask(self, mask: np.ndarray) -> np.ndarray:
        """The mask for every element of x."""
        if mask.ndim < len(self.shape):
            mask = np.expand_dims(mask, self.axes)
        return np.broadcast_to(mask, self.shape)


CASES = [
    Case("dense", (37, 5)),
    Case("vector", (9,), 0),
    Case("single column", (50, 1)),
    Case("images, channels last", (8, 7, 6, 5)),
    Case("images, channels first", (8, 5, 7, 6), 1),
    Case("volumes, channel in the middle", (2, 3, 4, 5, 6), 2),
    Case("channel first of all", (4, 3, 5), 0),
    Case("two adjacent axes", (6, 5, 4, 3), (2, 3)),
    Case("two axes apart", (6, 5, 4, 3), (1, 3)),
    Case("three axes, outermost included", (3, 5, 4, 3), (-4, 1, -1)),
    Case("mean 1e3", (16, 9, 9, 4), mean=1e3),
    Case("mean 1e4, channels first", (16, 4, 9, 9), 1, mean=1e4),
    Case("mean 1e5", (64, 8), mean=1e5),
    Case("mean 1e5, channels first", (16, 4, 9, 9), 1, mean=1e5),
    Case("mean -1e5, two axes apart", (16, 4, 9, 3), (1, 3), mean=-1e5),
    Case("mean 1e5, long", (70_001, 2), mean=1e5),
    Case("long and odd, channels first", (3, 2, 4_099), 1, mean=10.0),
    Case("tiny variance", (64, 4), std=1e-4, epsilon=1e-12),
    Case("tiny variance beside a mean", (64, 4), mean=1.0, std=1e-3, epsilon=1e-7),
    Case("variance below the smallest float32", (16, 4), std=1e-25),
    Case("constant channels", (16, 4), mean=3.0, std=0.0),
    Case("one value per channel", (1, 6)),
    Case("one value per channel, every axis a channel", (2, 3), (0, 1)),
    Case("two values per channel", (2, 6)),
    Case("empty batch", (0, 3)),
    Case("empty image", (4, 0, 5, 3)),
    Case("no channels", (4, 0)),
    Case("mask over time", (6, 11, 4), mask="positions"),
    Case("mask over time, channels first, C = T", (6, 7, 7), 1, mask="positions"),
    Case("mask over images, mean 1e4", (6, 5, 5, 3), mean=1e4, mask="positions"),
    Case("mask per sample", (9, 5, 3), mask="broadcast"),
    Case("mask per element", (40, 5), mask="elements"),
    Case("all masked", (5, 4, 3), mask="all masked", masked_value=2.0),
    Case("all but one masked", (5, 4, 3), mask="one left"),
    Case("ghost batches", (12, 4, 3), group=4),
    Case("ghost batches, channels first, mean 1e4", (12, 3, 5, 5), 1, mean=1e4, group=3),
    Case("ghost batches of one", (6, 5, 3), group=1),
    Case("ghost batches with a mask", (12, 7, 3), mask="positions", group=6),
]

SHAPES = {
    "vector",
    "images, channels first",
    "volumes, channel in the middle",
    "two axes apart",
    "mean 1e5, channels first",
    "tiny variance beside a mean",
    "constant channels",
    "one value per channel, every axis a channel",
    "empty image",
    "no channels",
    "mask over time, channels first, C = T",
    "mask per element",
    "all but one masked",
    "ghost batches, channels first, mean 1e4",
    "ghost batches with a mask",
}
"""Names of cases that differ in what an engine does with shapes, masks and groups, for engines that take long for each."""
