"""Write an explanation as lines for people, each with its kind."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING

from evennorm.explanation.findings import FEW_VALUES, percent, relative_error

if TYPE_CHECKING:
    from evennorm.explanation import Explanation, WorkedExample

_NAME_WIDTH = 18
_ONE_OF = {"batch": "sample", "time": "time step"}


@dataclass(frozen=True)
class Line:
    """One line of text; its `kind` is "title", "heading", "fact", "clean", "warning" or "remedy", for whoever colours it."""

    kind: str
    text: str


def explanation_lines(explanation: Explanation, width: int = 80) -> list[Line]:
    """Return the explanation in lines of at most `width` characters; only the row of a parameter is never broken."""
    geometry = explanation.geometry
    title = f"Batch normalization: shape {_shape(geometry.shape)}, axis {_axis(geometry.axis, geometry.rank)}"
    parts = [_wrapped("title", "", title, width, "  "), _facts(explanation, width), _parameters(explanation)]
    if explanation.example is not None:
        parts.append(_example(explanation.example, width))
    parts.append(_findings(explanation, width))
    return [line for part in parts for line in (*part, Line("fact", ""))][:-1]


def _facts(explanation: Explanation, width: int) -> list[Line]:
    data_format = explanation.data_format
    certainty = {"clear": "", "likely": "probably ", "unclear": "perhaps "}[data_format.certainty]
    roles = ", ".join(data_format.roles)
    return [
        *_fact("looks like", f"{certainty}{data_format.name} ({roles}): {data_format.reason}", width),
        *_fact("averaged over", _averaged(explanation), width),
        *_fact("values per mean", explanation.count_text, width),
        *_fact("groups", _groups(explanation), width),
        *_fact("noise", _noise(explanation.geometry.count), width),
    ]


def _averaged(explanation: Explanation) -> str:
    geometry, roles = explanation.geometry, explanation.data_format.roles
    if not geometry.reduced:
        return "nothing, since every axis is named as a channel"
    names = ", ".join(f"{roles[a]} {_size(geometry.shape[a])}" for a in geometry.reduced)
    return f"{_axes(geometry.reduced)}: {names}"


def _groups(explanation: Explanation) -> str:
    geometry = explanation.geometry
    product = " x ".join(map(str, geometry.parameter_shape))
    number = f"{geometry.channel:,}" if len(geometry.axis) == 1 else f"{product} = {geometry.channel:,}"
    roles = " and ".join(_ONE_OF.get(role, role) for role in (explanation.data_format.roles[a] for a in geometry.axis))
    return f"{number}, one per {roles} ({_axes(geometry.axis)}): own mean, own variance"


def _noise(count: int | None) -> str:
    if count is None:
        few = percent(relative_error(FEW_VALUES) or 0)
        return f"a variance from n values is off by about sqrt(2 / (n - 1)): {few} for {FEW_VALUES}, meaningless for 1"
    error = relative_error(count)
    if error is None:
        return "a variance needs at least two values"
    return f"each variance is off by about {percent(error)} (one standard error)"


def _parameters(explanation: Explanation) -> list[Line]:
    shape = _shape(explanation.geometry.parameter_shape)
    wide, digits = max(len("shape"), len(shape)), max(len("size"), len(f"{explanation.geometry.channel:,}"))
    rows = [
        Line("fact", f"  {p.name:<{_NAME_WIDTH}}{shape:<{wide}}  {p.size:>{digits},}  {'yes' if p.trainable else 'no'}")
        for p in explanation.parameters
    ]
    total = f"{explanation.trainable:,} trainable, {explanation.non_trainable:,} non-trainable"
    return [
        Line("heading", f"  {'parameter':<{_NAME_WIDTH}}{'shape':<{wide}}  {'size':>{digits}}  trainable"),
        *rows,
        Line("fact", f"  {'together':<{_NAME_WIDTH}}{total}"),
    ]


def _example(example: WorkedExample, width: int) -> list[Line]:
    reduced = tuple(a for a in range(len(example.shape)) if a not in example.axis)
    first = ", ".join("0" if a in example.axis else ":" for a in range(len(example.shape)))
    formula = f"(x - mean) / sqrt(variance + {example.epsilon:g}); gamma is 1, beta 0"
    return [
        Line("heading", "  Worked example: a small array of the same layout, its first group"),
        *_fact("x", example.code, width),
        *_fact(f"x[{first}]", "  ".join(f"{value:g}" for value in example.values), width),
        *_fact("mean", f"{example.mean:.4g}", width),
        *_fact("variance", f"{example.variance:.4g}", width),
        *_fact("normalized", "  ".join(f"{value:.2f}" for value in example.normalized), width),
        *_fact("that is", formula, width),
        *_fact("from", f"x.mean(axis={reduced}), x.var(axis={reduced})", width),
    ]


def _findings(explanation: Explanation, width: int) -> list[Line]:
    if not explanation.findings:
        return [Line("clean", "Nothing looks wrong.")]
    found = []
    for finding in explanation.findings:
        found += _wrapped("warning", f"Warning [{finding.code}]: ", _sentence(finding.message), width, "  ")
        found += _wrapped("remedy", "  Remedy: ", _sentence(finding.remedy), width, "  ")
    return found


def _fact(name: str, value: str, width: int) -> list[Line]:
    return _wrapped("fact", f"  {name + ' ':<{_NAME_WIDTH}}", value, width, " " * (2 + _NAME_WIDTH))


def _wrapped(kind: str, first: str, text: str, width: int, rest: str) -> list[Line]:
    wrapped = wrap(text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False)
    return [Line(kind, line) for line in wrapped]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _axis(axis: tuple[int, ...], rank: int) -> str:
    """Format the axis, with -1 beside it where it is the last, since people ask for it by that name."""
    if len(axis) > 1:
        return f"({', '.join(map(str, axis))})"
    return f"{axis[0]} (-1)" if axis[0] == rank - 1 else str(axis[0])


def _axes(axes: tuple[int, ...]) -> str:
    return f"ax{'is' if len(axes) == 1 else 'es'} {', '.join(map(str, axes))}"


def _size(size: int | None) -> str:
    return "?" if size is None else str(size)


def _shape(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join(map(_size, shape))}{',' if len(shape) == 1 else ''})"
