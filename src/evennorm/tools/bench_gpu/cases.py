"""List the arrays that ResNet-50 normalizes at a batch size, how often, and the bytes that each has to move."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from evennorm.tools.bench.cases import ITEM_BYTES, Case, checked, with_layout

BATCH = 128

LAYERS = {
    (64, 112): 1,
    (64, 56): 6,
    (256, 56): 4,
    (128, 56): 1,
    (128, 28): 7,
    (512, 28): 5,
    (256, 28): 1,
    (256, 14): 11,
    (1024, 14): 7,
    (512, 14): 1,
    (512, 7): 5,
    (2048, 7): 4,
}
"""Channels and side of the images before each batch normalization of ResNet-50 (v1.5), and how many layers have them."""

VARIANTS = {"bn": ("none", False), "bn+relu": ("relu", False), "bn+add+relu": ("relu", True)}
"""What follows the normalization: the activation, and whether a residual is added before it."""

L2 = 64 << 20
"""The least bytes of a working set, so that it exceeds the largest GPU caches; an H200 has 50 MB, or 60 as it reports."""


def resnet50(
    batch: int = BATCH,
    variants: Iterable[str] = VARIANTS,
    dtypes: Iterable[str] = ("bfloat16", "float32"),
    layouts: Iterable[str] = ("last", "first"),
) -> list[Case]:
    """Return every combination, the largest arrays first; with channels first BN+ReLU alone.

    Raises:
        InputError: a word that is none of VARIANTS, of the dtypes, of the layouts.

    Example:
        >>> found = resnet50(variants=["bn+relu"], dtypes=["float32"], layouts=["last"])
        >>> len(found), str(found[0])
        (12, '128x112x112x64')
    """
    variants, dtypes, layouts = map(tuple, (variants, dtypes, layouts))
    checked("variants", variants, VARIANTS)
    checked("dtypes", dtypes, ("bfloat16", "float16", "float32", "float64"))
    checked("layouts", layouts, ("last", "first"))
    shapes = sorted(((batch, side, side, channels) for channels, side in LAYERS), key=_size, reverse=True)
    return [
        Case(*with_layout(shape, "last", layout), dtype, *VARIANTS[variant])
        for layout in layouts
        for variant in variants
        for dtype in dtypes
        for shape in shapes
        if layout == "last" or variant == "bn+relu" or variants == (variant,)
    ]


def _size(shape: tuple[int, ...]) -> int:
    batch, height, width, channels = shape
    return batch * height * width * channels


@dataclass(frozen=True)
class Traffic:
    """The number of times that arrays of x's size cross the memory bus in one pass, and the bits kept for each element."""

    reads: int
    writes: int
    bits: int = 0

    def bytes_of(self, case: Case) -> float:
        return (self.reads + self.writes) * case.bytes + self.bits / 8 * case.bytes / ITEM_BYTES[case.dtype]


def traffic(case: Case, passes: str, on_chip: tuple[bool, bool] = (False, False)) -> Traffic:
    """Return what must move if statistics come before normalization, and sums before gradients.

    Forward reads x twice and writes y; backward reads x and dy twice and writes dx. A residual is read once, and where an
    activation follows it, its gradient is written, and a bit per element is written once and read twice. Where a channel
    fits on the chip, forward and backward each, x, or x and dy, are read once.

    Args:
        passes: "forward" or "both".
        on_chip: whether forward and backward keep a channel.

    Example:
        >>> relu, add = Case((8, 4, 4, 64)), Case((8, 4, 4, 64), residual=True)
        >>> traffic(relu, "forward"), traffic(relu, "both"), traffic(relu, "both", (True, True))
        (Traffic(reads=2, writes=1, bits=0), Traffic(reads=6, writes=2, bits=0), Traffic(reads=3, writes=2, bits=0))
        >>> traffic(add, "both")
        Traffic(reads=7, writes=3, bits=3)
    """
    gated = case.residual and case.relu
    forward_on_chip, backward_on_chip = on_chip
    reads, writes, bits = (1 if forward_on_chip else 2) + case.residual, 1, int(gated)
    if passes == "both":
        reads += 2 if backward_on_chip else 4
        writes += 1 + gated
        bits += (1 if backward_on_chip else 2) * gated
    return Traffic(reads, writes, bits)


def kept_on_chip(case: Case, processors: int) -> tuple[bool, bool]:
    """Return whether our kernels keep a channel of the case in one program, forward and backward."""
    from evennorm.core.geometry import Geometry
    from evennorm.kernels.triton.tiling import dense_view, tiling_of

    strides = tuple(_strides(case.shape))
    view = dense_view(Geometry(case.shape, case.axis), case.shape, strides)
    assert view is not None, "cases are dense"
    forward, backward = (tiling_of(view, ITEM_BYTES[case.dtype], processors, with_dy) for with_dy in (False, True))
    return bool(forward.slots), bool(backward.slots)


def _strides(shape: tuple[int, ...]) -> list[int]:
    strides = [1]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    return strides


def sets_of(case: Case, cache: int = L2) -> int:
    """Return how many sets of arrays to use in turn, so that none is still in the cache when its turn comes again.

    Example:
        >>> sets_of(Case((128, 7, 7, 512), "last", "bfloat16")), sets_of(Case((128, 112, 112, 64)))
        (14, 2)
    """
    arrays = 3 + case.residual  # x, dy, y, and the residual
    return max(2, -(-4 * cache // (arrays * case.bytes)))
