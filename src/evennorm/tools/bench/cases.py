"""Parse shapes and options into the cases to measure, each with layout, dtype and bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from evennorm.errors import InputError

ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
LAYOUTS = ("last", "first")
ACTIVATIONS = ("none", "relu")
RESIDUALS = ("no", "yes")
PASSES = {"forward": "forward", "both": "forward + backward"}
"""The passes and their names in tables: a training step's forward pass, and with it the gradients of all inputs."""

USUAL = ("32x56x56x64", "128x48x48x32", "16x112x112x64", "32x14x14x256", "256x1024", "8x16")
SETS = {
    "usual": USUAL,
    "all": (
        *USUAL[:-1],
        "32x64x112x112:first",
        "128x32x48x48:first",
        "32x256x14x14:first",
        "8x2048x7x7:first",
        "128x512x3x3:first",
        "64x128x1000:first",
        USUAL[-1],
    ),
}
"""Named lists of shapes."""

LARGE = 1 << 20
"""Bytes of x from which a case counts in geometric means; smaller cases measure the cost of a call."""


@dataclass(frozen=True)
class Case:
    """One array to normalize.

    Args:
        shape: as it lies in memory, batch first.
        layout: "last" or "first": whether channels are the last axis or axis 1.
        dtype: of x, y and their gradients; parameters are float32, for float64 arrays float64.
        activation: "none" or "relu".
        residual: whether an array is added before the activation.
    """

    shape: tuple[int, ...]
    layout: str = "last"
    dtype: str = "float32"
    activation: str = "relu"
    residual: bool = False

    @property
    def axis(self) -> int:
        return -1 if self.layout == "last" else 1

    @property
    def channels(self) -> int:
        return self.shape[self.axis]

    @property
    def bytes(self) -> int:
        """Bytes of x."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def large(self) -> bool:
        return self.bytes >= LARGE

    @property
    def relu(self) -> bool:
        return self.activation == "relu"

    def necessary_bytes(self, passes: str) -> int:
        """Return the bytes that must cross the memory bus if every array is read or written once.

        Forward reads x and the residual and writes y; backward reads x and dy and writes dx and, where the activation stands
        between them, the residual's gradient.

        Example:
            >>> Case((256, 1024)).necessary_bytes("forward"), Case((256, 1024)).necessary_bytes("both")
            (2097152, 5242880)
        """
        arrays = 2 + self.residual
        if passes == "both":
            arrays += 3 + (self.residual and self.relu)
        return arrays * self.bytes

    def __str__(self) -> str:
        """
        Example:
            >>> str(Case((32, 64, 7, 7), "first", residual=True))
            '32x64x7x7:first, residual'
        """
        return ", ".join(part for part in (self.place, self.variant) if part)

    @property
    def place(self) -> str:
        """Shape and layout, in the form that `parsed_shapes` reads."""
        return shape_text(self.shape, self.layout)

    @property
    def variant(self) -> str:
        """The other settings, where they are not the usual ones.

        Example:
            >>> Case((8, 16)).variant, Case((8, 16), dtype="float64", activation="none").variant
            ('', 'float64, no activation')
        """
        parts = [self.dtype] * (self.dtype != "float32")
        parts += ["no activation"] * (not self.relu)
        parts += ["residual"] * self.residual
        return ", ".join(parts)


def shape_text(shape: tuple[int, ...], layout: str) -> str:
    """Return shape and layout in the form that `parsed_shapes` reads."""
    return "x".join(map(str, shape)) + (":first" if layout == "first" and len(shape) > 2 else "")


def parsed_shapes(text: str) -> list[tuple[tuple[int, ...], str]]:
    """Parse shapes and layouts from "32x56x56x64,8x64x7x7:first", or from the name of a list.

    Raises:
        InputError: something else.

    Example:
        >>> parsed_shapes("256x1024,8x64x7x7:first")
        [((256, 1024), 'last'), ((8, 64, 7, 7), 'first')]
    """
    rule = (
        "shapes are sizes as they lie in memory, batch first, at least two, :first after those with channels on axis 1, "
        f"as in 32x56x56x64,8x64x7x7:first; or {' or '.join(SETS)}"
    )
    found = []
    for part in SETS.get(text.strip(), text.split(",")):
        match = re.fullmatch(r"\s*([1-9][0-9]{0,9}(?:x[1-9][0-9]{0,9})+)(?::(first|last))?\s*", part)
        if match is None:
            raise InputError(f"{rule}; received {part.strip()!r} in {text!r}")
        found.append((tuple(map(int, match[1].split("x"))), match[2] or "last"))
    return found


def with_layout(shape: tuple[int, ...], layout: str, wanted: str) -> tuple[tuple[int, ...], str]:
    """Return the same array with its channels moved to where `wanted` says; two axes have one layout only.

    Example:
        >>> with_layout((8, 7, 7, 64), "last", "first")
        ((8, 64, 7, 7), 'first')
    """
    if len(shape) == 2:
        return shape, "last"
    if layout == wanted:
        return shape, layout
    batch, *rest = shape
    return (batch, *rest[-1:], *rest[:-1]) if wanted == "first" else (batch, *rest[1:], rest[0]), wanted


def cases(
    shapes: str = "usual",
    layouts: Iterable[str] = (),
    dtypes: Iterable[str] = ("float32",),
    activations: Iterable[str] = ("relu",),
    residuals: Iterable[str] = ("no",),
) -> list[Case]:
    """Return every combination, each once.

    Args:
        shapes: as `parsed_shapes` reads them.
        layouts: some of "last" and "first", into which each shape is brought; none leaves them as written.
        dtypes, activations, residuals: some of ITEM_BYTES, ACTIVATIONS, RESIDUALS.

    Raises:
        InputError: a word that is none of these, or none at all.
    """
    layouts, dtypes, activations, residuals = map(tuple, (layouts, dtypes, activations, residuals))
    checked("layouts", layouts, LAYOUTS, may_be_empty=True)
    checked("dtypes", dtypes, ITEM_BYTES)
    checked("activations", activations, ACTIVATIONS)
    checked("residual", residuals, RESIDUALS)
    placed = [
        with_layout(shape, layout, wanted) for shape, layout in parsed_shapes(shapes) for wanted in layouts or (layout,)
    ]
    found = [
        Case(shape, layout, dtype, activation, residual == "yes")
        for dtype in dtypes
        for activation in activations
        for residual in residuals
        for shape, layout in placed
    ]
    return list(dict.fromkeys(found))


def checked(what: str, words: tuple[str, ...], known: Iterable[str], may_be_empty: bool = False) -> None:
    """Raise InputError, naming the first of `words` that is not among `known`."""
    known = tuple(known)
    for word in words:
        if word not in known:
            raise InputError(f"{what}: one or more of {', '.join(known)}; received {word!r}")
    if not words and not may_be_empty:
        raise InputError(f"{what}: one or more of {', '.join(known)}; received none")


def checked_counts(**counts: int | None) -> None:
    """Raise InputError, naming the first of `counts` that is below 1; None is none."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise InputError(f"the number of {name} must be at least 1; received {value}")
