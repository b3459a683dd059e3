"""Guess the data format of a shape, with the evidence and its certainty."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from evennorm.core.geometry import Size

_KINDS = {3: "sequences", 4: "images", 5: "volumes or video"}
_POSITIONS = {3: ("time",), 4: ("height", "width"), 5: ("depth or time", "height", "width")}
_IMAGE_CHANNELS = (1, 3, 4)
_SMALLEST_IMAGE = 8


@dataclass(frozen=True)
class DataFormat:
    """What the axes of an array probably stand for.

    A shape alone never proves a format, so each guess carries its `certainty`: "clear" where the sizes leave hardly another
    reading, "likely" where they favour this one, "unclear" where they fit another just as well; then `also` holds the other
    channel axis that must be reckoned with, if any.

    Example:
        >>> from evennorm.explanation.data_format import DataFormat
        >>> images = DataFormat.of((32, 28, 28, 3))
        >>> images.name, images.channel_axis, images.certainty
        ('channels-last images', 3, 'clear')
        >>> images.roles
        ('batch', 'height', 'width', 'channel')
    """

    name: str
    roles: tuple[str, ...]
    channel_axis: int
    certainty: str
    reason: str
    also: int | None = None

    @classmethod
    def of(cls, shape: Iterable[Size]) -> DataFormat:
        """Guess the format of `shape`, which has the batch axis first and None where a size is unknown."""
        sizes = tuple(shape)
        if len(sizes) == 1:
            return cls("one vector without a batch axis", ("channel",), 0, "likely", "there is one axis only")
        if len(sizes) == 2:
            return cls("dense features", ("batch", "channel"), 1, "clear", "two axes, as a dense layer gives them")
        if len(sizes) > max(_KINDS):
            roles = ("batch", *("position" for _ in sizes[2:]), "channel")
            reason = f"{len(sizes)} axes are unusual; channels-last is Keras's default"
            return cls(f"a channels-last array of rank {len(sizes)}", roles, len(sizes) - 1, "unclear", reason)
        return _single_image(sizes) or _best(sizes)


@dataclass(frozen=True)
class _Candidate:
    """One reading of a shape: the channel is `axis`, the other axes after the batch are positions."""

    axis: int
    points: int = 0
    evidence: tuple[str, ...] = ()


def _single_image(sizes: tuple[Size, ...]) -> DataFormat | None:
    """Recognize (28, 28, 3) and (3, 28, 28): a square with the channels of an image, and no axis left for the batch."""
    if len(sizes) != 3:
        return None
    for channel, square, layout in ((2, sizes[:2], "channels-last"), (0, sizes[1:], "channels-first")):
        if (
            sizes[channel] in _IMAGE_CHANNELS
            and _is_square(square)
            and square[0] is not None
            and square[0] >= _SMALLEST_IMAGE
        ):
            roles = ("height", "width", "channel") if channel == 2 else ("channel", "height", "width")
            with_batch = ",".join(["?", *map(str, sizes)])
            reason = (
                f"a square and {_plural(sizes[channel], 'channel')}; for a batch of such images the shape is {with_batch}"
            )
            return DataFormat(f"one {layout} image without a batch axis", roles, channel, "likely", reason)
    return None


def _best(sizes: tuple[Size, ...]) -> DataFormat:
    rank = len(sizes)
    axes = (rank - 1, 1, 2) if rank == 5 else (rank - 1, 1)
    known = [_weighed(sizes, axis, axes) for axis in axes if sizes[axis] is not None]
    best, *others = sorted(known, key=lambda c: -c.points) or [_Candidate(rank - 1)]
    lead = best.points - max((c.points for c in others), default=0)
    certainty = "clear" if lead >= 3 else "likely" if lead >= 1 else "unclear"
    also = None
    if rank == 3 and best.axis == 1 and best.points == 1:
        # Padded sequences have round lengths too: (32, 128, 50) may be 128 steps of 50 features.
        certainty, also, best = "unclear", 1, _Candidate(rank - 1)
    reason = "; ".join(best.evidence)
    if certainty == "unclear":
        reason = "the sizes fit channels-first as well; channels-last is Keras's default"
    return DataFormat(_name(rank, best.axis), _roles(rank, best.axis), best.axis, certainty, reason, also)


def _weighed(sizes: tuple[Size, ...], axis: int, axes: tuple[int, ...]) -> _Candidate:
    """Weigh the evidence in the sizes that `axis`, out of `axes`, is the channel."""
    size, space = sizes[axis], _space(sizes, axis)
    others = [a for a in axes if a != axis]
    evidence = []
    if _is_square(space):
        evidence.append((3, f"height and width are equal, {space[0]}"))
    elif all(_elongation(_space(sizes, a)) > 1.5 * _elongation(space) for a in others):
        evidence.append((1, f"height and width are close, {space[0]} and {space[1]}"))
    if size in _IMAGE_CHANNELS and all(s is None or s >= max(_SMALLEST_IMAGE, 4 * size) for s in space):
        evidence.append((2, f"{_plural(size, 'channel')} {'is' if size == 1 else 'are'} usual"))
    if axis in axes[:2] and sizes[1 if axis == axes[0] else axes[0]] is None:
        evidence.append((3, "of the two axes that may be the channel only this one has a known size"))
    if axis in axes[:2] and _is_layer_width(size) and not any(_is_layer_width(sizes[a]) for a in others):
        evidence.append((1, f"{size} is a usual number of channels"))
    return _Candidate(axis, sum(points for points, _ in evidence), tuple(text for _, text in evidence))


def _space(sizes: tuple[Size, ...], axis: int) -> list[Size]:
    """Return height and width (or just time) if `axis` is the channel."""
    return [sizes[a] for a in range(1, len(sizes)) if a != axis][-2:]


def _name(rank: int, axis: int) -> str:
    layout = "channels-last" if axis == rank - 1 else "channels-first"
    return "video of channels-first frames" if rank == 5 and axis == 2 else f"{layout} {_KINDS[rank]}"


def _roles(rank: int, axis: int) -> tuple[str, ...]:
    roles = list(_POSITIONS[rank])
    if rank == 5 and axis == 2:
        roles[0] = "time"
    roles.insert(axis - 1, "channel")
    return ("batch", *roles)


def _is_square(space: Sequence[Size]) -> bool:
    return len(space) == 2 and space[0] is not None and space[0] == space[1]


def _elongation(space: Sequence[Size]) -> float:
    """Return the longer side divided by the shorter; 1 where this cannot be told."""
    known = [size for size in space if size]
    return max(known) / min(known) if len(known) == 2 else 1.0


def _is_layer_width(size: Size) -> bool:
    """Return whether a size, such as 16, 64 or 512, is a number of filters more often than a length."""
    return size is not None and size >= _SMALLEST_IMAGE and size & (size - 1) == 0


def _plural(number: int | None, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
