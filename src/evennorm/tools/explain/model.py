"""Explain what each batch normalization of a model averages, and check its axis against its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evennorm import notebook
from evennorm.core.geometry import Geometry
from evennorm.errors import printable
from evennorm.explanation import Explanation
from evennorm.explanation.findings import relative_error
from evennorm.models.network import Step
from evennorm.tools.check import Finding, check
from evennorm.tools.check.rule import each_layer, html_table, in_words

_RULES = ("BN1", "BN505")
"""Findings about the axis and the number of values; in a model, a layer's neighbours tell where its channels are."""


@dataclass(frozen=True)
class ExplainedLayer:
    """One batch normalization of a model; `explanation` is None where the shape of its input is not known."""

    name: str
    explanation: Explanation | None


@dataclass(frozen=True)
class ExplainedModel:
    """The batch normalizations of a model, in the order of their first calls."""

    name: str
    layers: tuple[ExplainedLayer, ...]
    findings: tuple[Finding, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the explanation for programs; keys are permanent."""
        layers = [
            {"layer": each.name, "explanation": None if each.explanation is None else each.explanation.as_dict()}
            for each in self.layers
        ]
        return {"model": self.name, "layers": layers, "findings": [finding.as_dict() for finding in self.findings]}

    def rows(self) -> list[tuple[str, str, str, str, str, str]]:
        """Return layer, shape, axis, groups, values per mean, and the standard error of a variance, in words."""
        return [_row(layer) for layer in self.layers]

    def _repr_html_(self) -> str:
        summary = notebook.paragraphs([in_words(self.findings)])
        return notebook.titled(self.name, notebook.table(HEADER, self.rows()), summary, html_table(self.findings))


HEADER = ("layer", "shape", "axis", "groups", "values per mean", "noise")


def explain_model(model: Any, batch_size: int | None = None, shape: Sequence[int] | None = None) -> ExplainedModel:
    """Explain what each batch normalization of a model averages, and whether its axis is that of its neighbours' channels.

    Args:
        model: a keras.Model, a torch.nn.Module, or whatever `evennorm.tools.models.open_model` takes.
        batch_size: samples of a batch of training, where the model leaves it open.
        shape: of a batch of inputs of a torch model, which does not know it.

    Raises:
        InputError: no model of a known framework, or one that does not take the shape.

    Example:
        >>> import keras
        >>> from evennorm.tools.explain.model import explain_model
        >>> layers = [keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization(name="bn"), keras.layers.ReLU()]
        >>> model = keras.Sequential([keras.Input((8, 8, 3)), *layers])
        >>> explain_model(model, batch_size=32).rows()
        [('bn', '(32, 6, 6, 4)', '3', '4', '32 x 6 x 6 = 1,152', '4.2 %')]
    """
    report = check(model, batch_size=batch_size, shape=shape, select=_RULES)
    if shape is not None and batch_size is None:
        batch_size = shape[0]
    layers = tuple(ExplainedLayer(step.layer, _explained(step, batch_size)) for step in each_layer(report.network))
    return ExplainedModel(report.network.name, layers, report.findings)


def _explained(step: Step, batch_size: int | None) -> Explanation | None:
    state = step.state
    if state is None or step.shape is None or any(step.shape[axis] is None for axis in state.axis):
        return None
    batch, *rest = step.shape
    return Explanation.of(Geometry((batch_size if batch is None else batch, *rest), state.axis))


def _row(layer: ExplainedLayer) -> tuple[str, str, str, str, str, str]:
    name, explanation = printable(layer.name), layer.explanation
    if explanation is None:
        return name, "unknown", "", "", "", ""
    geometry = explanation.geometry
    shape = ", ".join("?" if size is None else str(size) for size in geometry.shape)
    noise = "" if geometry.count is None else _noise(geometry.count)
    axes = ", ".join(map(str, geometry.axis))
    return name, f"({shape})", axes, f"{geometry.channel:,}", explanation.count_text, noise


def _noise(count: int) -> str:
    error = relative_error(count)
    if error is None:
        return "unknown"
    return f"{100 * error:.0f} %" if error >= 0.1 else f"{100 * error:.2g} %"
