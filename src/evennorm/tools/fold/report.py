"""Record what `fold` did: where each batch normalization went, how far the outputs differ, and how much faster the model
is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from evennorm import notebook
from evennorm.errors import printable
from evennorm.models.fold_plan import Folded
from evennorm.tools.fold.difference import Difference
from evennorm.tools.fold.speed import Speed


@dataclass(frozen=True)
class Report:
    """The result of one folding."""

    model: str
    framework: str
    layers: tuple[Folded, ...]
    """What became of each batch normalization."""
    difference: Difference
    tolerance: float
    """The largest `difference.relative` that is allowed."""
    data: str
    """What the outputs were compared on."""
    speed: Speed | None
    folded: Any
    """The model without them: a keras.Model or a torch.nn.Module."""
    output: str | None = None
    """The file that was written."""
    notes: tuple[str, ...] = ()
    inputs: str = ""
    """The rank and shape of the inputs it was folded for, which decide what axis 1 and the last axis are."""

    def __getitem__(self, layer: str) -> Folded:
        return next(each for each in self.layers if each.layer == layer)

    def count(self, outcome: str) -> int:
        return sum(each.outcome == outcome for each in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Return the report for programs, without the model."""
        return {
            "model": self.model,
            "framework": self.framework,
            "inputs": self.inputs,
            "layers": [asdict(each) | {"outcome": each.outcome} for each in self.layers],
            "difference": self.difference.as_dict() | {"data": self.data},
            "tolerance": self.tolerance,
            "speed": None if self.speed is None else self.speed.as_dict(),
            "output": self.output,
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """Return the report for people.

        Example:
            >>> layers = (Folded("bn", ("conv",), "behind"), Folded("bn2", why="the activation relu stands in between"))
            >>> found = Difference(1e-6, 2.0, 6)
            >>> report = Report("m", "torch", layers, found, 1e-4, "random inputs", None, None, inputs="inputs of rank 4")
            >>> print(report.text())
            bn   folded into the previous layer, conv
            bn2  one scale and shift: the activation relu stands in between
            <BLANKLINE>
            1 of 2 batch normalizations folded, 1 now one scale and shift; for inputs of rank 4
            largest difference 1e-06 (5e-07 of the largest output) over 6 samples, random inputs
        """
        width = max((len(printable(each.layer)) for each in self.layers), default=0)
        lines = [f"{printable(each.layer):<{width}}  {_sentence(each)}" for each in self.layers]
        lines += ["", self._summary(), *self._measured(), *(f"note: {note}" for note in self.notes)]
        return "\n".join(map(printable, lines)).lstrip("\n")

    def _repr_html_(self) -> str:
        """Return HTML for a notebook: what became of the model, and a row for each batch normalization."""
        return notebook.titled(
            f"{self.model}: {self._summary()}",
            notebook.table(("layer", "what became of it"), [(each.layer, _sentence(each)) for each in self.layers]),
            notebook.paragraphs([*self._measured(), *(f"note: {note}" for note in self.notes)]),
        )

    def _summary(self) -> str:
        # A Keras model says itself of what rank its inputs are.
        return _counts(self) + (f"; for {self.inputs}" if self.inputs and self.framework == "torch" else "")

    def _measured(self) -> list[str]:
        found = self.difference
        lines = [
            f"largest difference {found.largest:.2g} ({found.relative:.2g} of the largest output) over {found.samples} "
            f"samples, {self.data}"
        ]
        if self.speed is not None:
            lines.append(self.speed.text())
        return lines + ([f"written to {self.output}"] if self.output else [])


def _sentence(each: Folded) -> str:
    if each.into:
        which = "previous" if each.side == "behind" else "next"
        return f"folded into the {which} layer{'s' * (len(each.into) > 1)}, {', '.join(each.into)}"
    return f"{'kept as it is' if each.kept else 'one scale and shift'}: {each.why}"


def _counts(report: Report) -> str:
    total = len(report.layers)
    if not total:
        return "nothing was folded: no batch normalization in it"
    counts = {
        "now one scale and shift": report.count("scale and shift"),
        "kept": report.count("kept"),
    }
    rest = "".join(f", {count} {what}" for what, count in counts.items() if count)
    none = "nothing was folded: " if not report.count("folded") else ""
    return f"{none}{report.count('folded')} of {total} batch normalizations folded{rest}"
