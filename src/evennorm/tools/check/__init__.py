"""Find what looks wrong about the batch normalizations of a model, with or without data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Integral
from typing import Any

from evennorm import notebook
from evennorm.errors import ArgumentError, InputError
from evennorm.models.network import Network
from evennorm.tools.check.measure import Measurements, measure
from evennorm.tools.check.reading import read
from evennorm.tools.check.rule import Finding, Subject, each_layer, html_table, in_words
from evennorm.tools.check.rules import selected
from evennorm.tools.models import open_model
from evennorm.tools.recalibrate import program_of

__all__ = ["Finding", "Report", "check"]


@dataclass(frozen=True)
class Report:
    """What a check has found."""

    network: Network
    findings: tuple[Finding, ...]
    measurements: Measurements | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the report for programs; keys are permanent."""
        return {
            "model": self.network.name,
            "framework": self.network.framework,
            "layers": len({step.layer for step in self.network.batch_norms()}),
            "findings": [finding.as_dict() for finding in self.findings],
            "gaps": list(self.network.gaps),
            "measurements": None if self.measurements is None else self.measurements.as_dict(),
        }

    def _repr_html_(self) -> str:
        """Return HTML for a notebook: how many findings of each level there are, and a row for each."""
        layers = sum(1 for _ in each_layer(self.network))
        return notebook.titled(
            f"{self.network.name}: {layers:,} batch normalization{'' if layers == 1 else 's'}",
            notebook.paragraphs([in_words(self.findings)]),
            html_table(self.findings),
            notebook.paragraphs(
                ["Not read, so findings about neighbouring layers may be missing:"] if self.network.gaps else []
            ),
            notebook.bullets(self.network.gaps),
        )


def check(
    model: Any,
    batches: Iterable[tuple[Any, Any]] | None = None,
    *,
    batch_size: int | None = None,
    replicas: int = 1,
    steps: int | None = None,
    optimizer: Any = None,
    shape: Sequence[int] | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    progress: Callable[[int], None] = lambda samples: None,
) -> Report:
    """Find what looks wrong about the batch normalizations of a model.

    Args:
        model: a keras.Model, a torch.nn.Module, or whatever `evennorm.tools.models.open_model` takes; it is left as it is.
        batches: pairs of inputs and labels (or None) to compare the moving statistics with, in batches of training's size.
        batch_size: samples of a training batch, all replicas together; None: that of `batches`, if given.
        replicas: processes or devices that train together. Layers that synchronize their statistics take them over the whole
            batch, others over the part of one device.
        steps: training steps so far; None: those that the optimizer or the layers have counted.
        optimizer: that of a torch model, to see its weight decay; a compiled Keras model holds its own.
        shape: of a batch of inputs of a torch model, which does not know it; None: that of `batches`, if given. What depends
            on sizes, such as the axis, is checked only where they are known.
        select, ignore: codes of findings, their beginnings or names: "BN201", "BN2", "bias-before-norm".
        progress: called with the number of samples measured so far.

    Returns:
        A report with `findings`, each with code, layer, what, why and remedy, and `measurements` where there was data.

    Raises:
        ArgumentError: a code that does not exist, or a number below its least one.
        InputError: no model of a known framework, or one that does not take the data.

    Example:
        >>> import keras
        >>> from evennorm.tools.check import check
        >>> layers = [keras.layers.Dense(4, name="hidden"), keras.layers.BatchNormalization(), keras.layers.ReLU()]
        >>> model = keras.Sequential([keras.Input((8,)), *layers])
        >>> [(finding.code, finding.layer) for finding in check(model).findings]
        [('BN201', 'hidden')]
    """
    rules = selected(select, ignore)
    _refuse_counts(batch_size=(batch_size, 1), replicas=(replicas, 1), steps=(steps, 0))
    opened = open_model(model)
    if batches is not None:
        first, batches = _peeked(batches)
        shape = getattr(first, "shape", None) if shape is None else shape
    network = read(opened, optimizer, shape)
    measurements = None
    if batches is not None:
        measurements = measure(program_of(opened), network, batches, progress)
        batch_size = measurements.batch_size if batch_size is None else batch_size
    subject = Subject(network, batch_size, replicas, steps, measurements)
    findings = tuple(finding for rule in rules for finding in rule.findings(subject))
    return Report(network, findings, measurements)


def _refuse_counts(**given: tuple[int | None, int]) -> None:
    """Refuse numbers below their least value, and values that are no numbers."""
    for name, (value, least) in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < least):
            raise ArgumentError(f"{name} is a whole number, {least} or more; received {name}={value!r}")


def _peeked(batches: Iterable[tuple[Any, Any]]) -> tuple[Any, Iterable[tuple[Any, Any]]]:
    """Return the inputs of the first batch, and all batches.

    Raises:
        InputError: there is none.
    """
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise InputError("there is no batch to compare the moving statistics with; give one sample at least")
    return first[0], chain([first], rest)
