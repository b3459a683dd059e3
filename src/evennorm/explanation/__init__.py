"""Explain what batch normalization does with an array: facts, findings and text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from evennorm import notebook
from evennorm.core.geometry import Geometry
from evennorm.errors import ShapeError
from evennorm.explanation.data_format import DataFormat
from evennorm.explanation.findings import Finding, findings, relative_error
from evennorm.explanation.text import Line, explanation_lines


@dataclass(frozen=True)
class Parameter:
    """One of the four arrays of a batch normalization layer."""

    name: str
    shape: tuple[int, ...]
    trainable: bool

    @property
    def size(self) -> int:
        """Number of values that it holds."""
        return prod(self.shape)


@dataclass(frozen=True)
class WorkedExample:
    """A small array of the same layout, normalized: the values of its first group before and after.

    `code` makes the array with NumPy; `variance` is the biased one; `normalized` is
    (values - mean) / sqrt(variance + epsilon), with gamma 1 and beta 0.
    """

    shape: tuple[int, ...]
    axis: tuple[int, ...]
    epsilon: float
    code: str
    values: tuple[float, ...]
    mean: float
    variance: float
    normalized: tuple[float, ...]


@dataclass(frozen=True)
class Explanation:
    """What batch normalization over a shape and an axis averages, how many parameters it has, and what looks wrong.

    Example:
        >>> from evennorm import Geometry
        >>> from evennorm.explanation import Explanation
        >>> explanation = Explanation.of(Geometry((None, 28, 28, 3), axis=-1))
        >>> explanation.count_text
        '? x 28 x 28 = 784 per sample'
        >>> explanation.trainable, explanation.non_trainable, explanation.findings
        (6, 6, ())
    """

    geometry: Geometry
    data_format: DataFormat
    findings: tuple[Finding, ...]
    example: WorkedExample | None = None

    @classmethod
    def of(cls, geometry: Geometry, example: WorkedExample | None = None) -> Explanation:
        """Explain `geometry`."""
        data_format = DataFormat.of(geometry.shape)
        return cls(geometry, data_format, findings(geometry, data_format), example)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """gamma, beta, moving_mean and moving_variance, in the order of the layer's weights."""
        names = {"gamma": True, "beta": True, "moving_mean": False, "moving_variance": False}
        return tuple(Parameter(name, self.geometry.parameter_shape, trainable) for name, trainable in names.items())

    @property
    def trainable(self) -> int:
        """Number of values in gamma and beta together."""
        return sum(p.size for p in self.parameters if p.trainable)

    @property
    def non_trainable(self) -> int:
        """Number of values in the moving mean and the moving variance together."""
        return sum(p.size for p in self.parameters if not p.trainable)

    @property
    def known_count(self) -> int:
        """Product of the known sizes that are averaged over."""
        return prod(size for a in self.geometry.reduced if (size := self.geometry.shape[a]) is not None)

    @property
    def count_text(self) -> str:
        """Number of values behind each mean, symbolic where a size is unknown."""
        sizes = [self.geometry.shape[a] for a in self.geometry.reduced]
        unknown = [a for a in self.geometry.reduced if self.geometry.shape[a] is None]
        product = " x ".join("?" if size is None else str(size) for size in sizes)
        if not unknown:
            return f"{product} = {self.known_count:,}" if len(sizes) > 1 else f"{self.known_count:,}"
        if len(unknown) > 1:
            return product if len(unknown) == len(sizes) else f"{product} = {self.known_count:,} times the unknown sizes"
        role = "sample" if self.data_format.roles[unknown[0]] == "batch" else f"step of axis {unknown[0]}"
        return f"{product} = {self.known_count:,} per {role}"

    def as_dict(self) -> dict[str, Any]:
        """Return everything in numbers, strings, lists and dicts, as `--json` prints it; None where a size is unknown."""
        geometry = self.geometry
        return {
            "shape": list(geometry.shape),
            "axis": list(geometry.axis),
            "reduced_axes": list(geometry.reduced),
            "outer": geometry.outer,
            "channel": geometry.channel,
            "inner": geometry.inner,
            "count": geometry.count,
            "count_text": self.count_text,
            "variance_relative_error": None if geometry.count is None else relative_error(geometry.count),
            "groups": geometry.channel,
            "parameters": [
                {"name": p.name, "shape": list(p.shape), "size": p.size, "trainable": p.trainable} for p in self.parameters
            ],
            "trainable": self.trainable,
            "non_trainable": self.non_trainable,
            "data_format": {
                "name": self.data_format.name,
                "roles": list(self.data_format.roles),
                "channel_axis": self.data_format.channel_axis,
                "certainty": self.data_format.certainty,
                "reason": self.data_format.reason,
            },
            "findings": [asdict(finding) for finding in self.findings],
            "example": None if self.example is None else _jsonable(self.example),
        }

    def text(self, width: int = 80) -> str:
        """Return the explanation for people, in lines of `width` characters; only the row of a parameter may be longer."""
        return "\n".join(line.text for line in self.lines(width))

    def lines(self, width: int = 80) -> list[Line]:
        """Return `text` line by line, each with its kind."""
        return explanation_lines(self, width)

    def _repr_html_(self) -> str:
        """Return HTML for a notebook: the figure, the parameters, and what looks wrong with its remedy."""
        from evennorm.tools.explain.drawing import draw

        rows = [(p.name, p.shape, f"{p.size:,}", "yes" if p.trainable else "no") for p in self.parameters]
        wrong = [(finding.code, finding.message, finding.remedy) for finding in self.findings]
        try:
            figure = draw(self)
        except ShapeError:  # no cells to draw
            figure = ""
        return notebook.titled(
            self.lines(10_000)[0].text,
            figure,
            notebook.table(("parameter", "shape", "numbers", "trainable"), rows),
            notebook.table(("looks wrong", "why", "what to do"), wrong),
        )


def _jsonable(example: WorkedExample) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(example).items()}
