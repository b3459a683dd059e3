"""Estimate the cost of synchronized statistics on a network where a message takes alpha and a byte beta seconds.

A message of m bytes takes alpha + m beta. Algorithms and their costs after Thakur, Rabenseifner & Gropp 2005, Optimization
of collective communication operations in MPICH; the ring that adds up after Patarasuk & Yuan 2009.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

FLOAT = 4
"""Bytes of a number that is exchanged."""


class Link(NamedTuple):
    """The seconds that a message takes, `alpha`, and a byte, `beta`."""

    alpha: float
    beta: float

    def time(self, cost: Cost) -> float:
        return self.alpha * cost.messages + self.beta * cost.bytes


class Cost(NamedTuple):
    """The messages that one device sends in sequence, and their bytes."""

    messages: float
    bytes: float

    def plus(self, other: Cost) -> Cost:
        return Cost(self.messages + other.messages, self.bytes + other.bytes)


def doublings(n: int) -> int:
    """Return the logarithm of n to the base 2, rounded up.

    Example:
        >>> [doublings(n) for n in (1, 2, 3, 8, 10000)]
        [0, 1, 2, 3, 14]
    """
    return (n - 1).bit_length()


def gathered_bytes(channels: int) -> int:
    """Return the bytes that one device sends for a layer forward: mean, its low part and variance of each channel, and a
    count.

    Example:
        >>> gathered_bytes(64), added_bytes(64)
        (772, 512)
    """
    return FLOAT * (3 * channels + 1)


def added_bytes(channels: int) -> int:
    """Return the bytes that are added over devices for a layer backward: two sums of each channel."""
    return FLOAT * 2 * channels


def ring_gather(n: int, size: int) -> Cost:
    """Return the cost of passing on what came last, n - 1 times, on every device."""
    return Cost(n - 1, (n - 1) * size)


def doubling_gather(n: int, size: int) -> Cost:
    """Return the cost of exchanging in pairs everything gathered so far, which doubles each time; Bruck's variant covers
    other n than powers of two."""
    return Cost(doublings(n), (n - 1) * size)


def ring_reduce(n: int, size: int) -> Cost:
    """Return the cost of sending parts of 1/n of the numbers round twice: once to add them up, once to pass on the sums."""
    return Cost(2 * (n - 1), 2 * (n - 1) / n * size)


def tree_reduce(n: int, size: int) -> Cost:
    """Return the cost of sending all numbers up a binary tree, and down again."""
    return Cost(2 * doublings(n), 2 * doublings(n) * size)


def doubling_reduce(n: int, size: int) -> Cost:
    """Return the cost of exchanging and adding all numbers in pairs, log2(n) times."""
    return Cost(doublings(n), doublings(n) * size)


RING, TREE = (ring_gather, ring_reduce), (doubling_gather, tree_reduce)
"""The algorithm that gathers forward, and the one that adds backward."""


def layers_cost(widths: Sequence[int], n: int, ways: tuple = RING) -> Cost:
    """Return the cost of one step for layers with these channels, which wait for one another.

    Example:
        >>> layers_cost([64], 2)
        Cost(messages=3, bytes=1284.0)
    """
    gather, reduce = ways
    total = Cost(0, 0)
    for channels in widths:
        total = total.plus(gather(n, gathered_bytes(channels))).plus(reduce(n, added_bytes(channels)))
    return total


def largest_group(widths: Sequence[int], link: Link, seconds: float, limit: int, ways: tuple = RING) -> int:
    """Return the most devices with which a step exchanges within this many seconds: 1 if not even two do, at most `limit`.

    Example:
        >>> largest_group([64], Link(1e-3, 0.0), 3e-3, 100), largest_group([64], Link(1e-3, 0.0), 2e-3, 100)
        (2, 1)
    """
    low, high = 1, limit
    while low < high:  # costs grow with n
        middle = (low + high + 1) // 2
        low, high = (middle, high) if link.time(layers_cost(widths, middle, ways)) <= seconds else (low, middle - 1)
    return low


def fitted(costs: Sequence[Cost], times: Sequence[float]) -> Link:
    """Return the link whose times have the least squared relative errors; what would be negative is 0.

    Example:
        >>> link = fitted([Cost(1, 100), Cost(2, 100), Cost(3, 500)], [3.0, 5.0, 11.0])
        >>> f"{link.alpha:.3f} {link.beta:.3f}"
        '2.000 0.010'
    """
    rows = [(cost.messages / time, cost.bytes / time) for cost, time in zip(costs, times, strict=True)]
    aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = (sum(row[i] for row in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    alpha, beta = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
    if beta < 0:
        return Link(a / aa, 0.0)
    if alpha < 0:
        return Link(0.0, b / bb)
    return Link(alpha, beta)


def errors(link: Link, costs: Sequence[Cost], times: Sequence[float]) -> list[float]:
    """Return the relative errors: 0.1 where the link's time is a tenth above the measured one."""
    return [link.time(cost) / time - 1 for cost, time in zip(costs, times, strict=True)]
