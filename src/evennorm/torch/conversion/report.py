"""Report what computes each batch normalization of a model, what it is fused with, and why not more."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from evennorm import notebook
from evennorm.torch.conversion.exchange import is_ours, obstacle
from evennorm.torch.conversion.fusion import Fusion, Outcome, word
from evennorm.torch.conversion.norms import checked, norms
from evennorm.torch.conversion.steps import fused_by
from evennorm.torch.conversion.timm import NormAndActivation, separate_part

_HEAD = ("layer", "class", "computed by", "together with", "why not more")


@dataclass(frozen=True)
class Layer:
    """One batch normalization of a model."""

    name: str
    """Its path, or several where it is shared."""
    kind: str
    """Its class."""
    exchanged: bool
    """Whether evennorm computes it."""
    steps: tuple[str, ...]
    """What is computed together with it: "add", "relu", "relu6", "leaky_relu"."""
    reason: str
    """Why nothing more is computed together with it."""


@dataclass(frozen=True)
class Report:
    """All batch normalizations of a model, in its order; printed as a table."""

    layers: tuple[Layer, ...]

    def __str__(self) -> str:
        rows = [_HEAD, *(_row(layer) for layer in self.layers)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD) - 1)]
        lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows]
        return "\n".join([*lines, "", self.summary])

    def _repr_html_(self) -> str:
        return notebook.titled(self.summary, notebook.table(_HEAD, map(_row, self.layers)))

    @property
    def summary(self) -> str:
        """The number of layers of each kind, in one line."""
        exchanged = [layer for layer in self.layers if layer.exchanged]
        together = sum(bool(layer.steps) for layer in exchanged)
        count = len(self.layers)
        return (
            f"{count} batch normalization{'' if count == 1 else 's'}: {len(exchanged)} computed by evennorm, {together} of "
            f"them together with what follows; {count - len(exchanged)} computed by torch"
        )


def report(model: nn.Module) -> Report:
    """Report what computes each batch normalization of `model` as it is now, together with what follows it, and why not
    more.

    For models before and after `convert`, and after whatever was done to them since.

    Args:
        model: any module that `convert` takes. It is looked at, and stays as it is.

    Raises:
        ArgumentError: as for `convert`.

    Example:
        >>> from torch import nn
        >>> from evennorm.torch import convert, report
        >>> model = convert(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)))
        >>> print(report(model))
        layer  class        computed by  together with  why not more
        1      BatchNorm1d  evennorm     relu
        <BLANKLINE>
        1 batch normalization: 1 computed by evennorm, 1 of them together with what follows; 0 computed by torch
    """
    fusion = Fusion(checked(model, "report"))
    paths: dict[nn.Module, list[str]] = {}
    closed: dict[nn.Module, str] = {}
    for path, module, why in norms(model):
        paths.setdefault(module, []).append(path)
        closed[module] = why
    return Report(tuple(_layer(module, names, closed[module], fusion) for module, names in paths.items()))


def _layer(module: nn.Module, paths: list[str], closed: str, fusion: Fusion) -> Layer:
    name = " = ".join(path or "the model" for path in paths)
    steps: tuple[str, ...] = ()
    if closed or not is_ours(module):
        reason = closed or obstacle(module) or "convert(model) exchanges it"
    elif isinstance(module, NormAndActivation):
        part = separate_part(module)
        steps = (word(fused_by(module.act)) or "",) if part is None else ()
        reason = "" if part is None else f"its own {type(part).__name__} follows"
    elif module.activation is not None:
        steps, reason = (module.activation,), ""
    else:
        steps, reason = _of_calls([outcome for path in paths for outcome in fusion.outcomes(path)])
    return Layer(name, type(module).__name__, is_ours(module), steps, reason)


def _of_calls(outcomes: list[Outcome]) -> tuple[tuple[str, ...], str]:
    """Combine the calls of one module; where they differ, take the first that is fused, and the first reason why another is
    not."""
    steps = next((outcome.steps for outcome in outcomes if outcome.is_fused()), ())
    reasons = [
        outcome.reason
        if outcome.is_fused() or not outcome.steps
        else f"convert(model) computes {' + '.join(outcome.steps)} with it"
        for outcome in outcomes
    ]
    return steps, next(filter(None, reasons), "")


def _row(layer: Layer) -> tuple[str, ...]:
    return layer.name, layer.kind, "evennorm" if layer.exchanged else "torch", " + ".join(layer.steps), layer.reason
