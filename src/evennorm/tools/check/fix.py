"""Write a model without the findings that can safely be fixed, and say what changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import numpy as np

from evennorm.errors import InputError, first_line
from evennorm.models.network import Network, Role, Step
from evennorm.tools.check import Finding, Report
from evennorm.tools.check.drift import serves_better_as_it_is
from evennorm.tools.check.neighbours import redundant_bias
from evennorm.tools.data import Data
from evennorm.tools.models import Opened, save_model
from evennorm.tools.outputs import refuse_inputs
from evennorm.tools.recalibrate import Progress

STATISTICS = ("BN301", "BN302", "BN403", "BN601", "BN602")
"""Findings that recalibration fixes."""


@dataclass(frozen=True)
class Fixed:
    """What was changed, and by how much the outputs differ."""

    path: str
    biases: tuple[str, ...]
    """Layers whose bias was dropped."""
    recalibrated: tuple[str, ...]
    """Layers whose moving statistics were set from the data."""
    bias_difference: float | None
    """The largest change of an output by dropping biases, relative to the largest output; None: not measured."""
    difference: float | None
    """The same between the model as it was and the model that was written."""
    samples: int
    on: str
    """What the differences were measured on."""
    left: tuple[str, ...] = ()
    """What could have been fixed and was not, and why."""

    def as_dict(self) -> dict[str, object]:
        fields = {field: getattr(self, field) for field in self.__dataclass_fields__}
        return {name: None if isinstance(value, float) and not isfinite(value) else value for name, value in fields.items()}

    def lines(self) -> Iterator[str]:
        """Yield the lines for people."""
        done = []
        if self.biases:
            done.append(f"dropped {_count(self.biases, 'bias', 'biases')}: {_some(self.biases)}")
        if self.recalibrated:
            done.append(f"set the moving statistics of {_count(self.recalibrated, 'layer', 'layers')} from the data")
        yield f"Fixed: {'; '.join(done)}" if done else "Nothing to fix: the model was copied"
        if self.bias_difference is not None and isfinite(self.bias_difference) and self.biases and self.recalibrated:
            yield f"  outputs differ by {self.bias_difference:.2g} of the largest without the biases, on {self.on}"
        if self.difference is not None and not isfinite(self.difference):
            yield "  the old model's outputs were not finite"
        elif self.difference is not None:
            yield f"  outputs differ by {self.difference:.2g} of the largest from those of the old model, on {self.on}"
        else:
            yield "  the difference of the outputs was not measured: give --data"
        yield from (f"  left: {left}" for left in self.left)
        yield f"Written: {self.path}"


def fix(
    opened: Opened,
    report: Report,
    data: Data | None,
    path: str | os.PathLike[str],
    *,
    batch_size: int = 128,
    batches: int | None = None,
    progress: Progress | None = None,
) -> Fixed:
    """Write a copy of the model to `path`, whole or not at all.

    Biases before batch normalization are dropped, and subtracted from the moving means after them, so that the model
    predicts the same. A subclassed Keras model cannot be copied: its biases stay, and its statistics are set in place.
    Where moving statistics were found wrong and there is data, they are set to those of the data, which changes predictions.
    `progress` is called as by `recalibrate`.

    Raises:
        InputError: the file cannot be written, or the data does not fit.
    """
    refuse_inputs(path, {"the model": opened.path})
    network = report.network
    codes = {finding.code for finding in report.findings}
    biased, left = _droppable(opened, network) if "BN201" in codes else ({}, [])
    model = _without_biases(opened, {step.handle: [norm.handle for norm in norms] for step, norms in biased.items()})
    samples, on = _samples(opened, data, batch_size)
    old = None if samples is None else _outputs(opened, opened.model, samples)
    unbiased = None if samples is None else _outputs(opened, model, samples)
    bias_difference = _difference(old, unbiased)
    recalibrated: tuple[str, ...] = ()
    broken = codes & set(STATISTICS)
    if broken and _had_better_stay(report):
        left.append(
            f"moving statistics ({', '.join(sorted(broken))}): the model is more accurate by them than by those of this data"
        )
    elif broken and data is not None:
        recalibrated = _recalibrate(opened, model, data, batch_size, batches, progress)
    elif broken:
        left.append(f"moving statistics ({', '.join(sorted(broken))}), which need --data")
    left += _training_s(report)
    new = None if samples is None else _outputs(opened, model, samples)
    save_model(opened, model, path)
    return Fixed(
        os.fspath(path),
        tuple(step.layer for step in biased),
        recalibrated,
        bias_difference,
        _difference(old, new),
        0 if samples is None else len(samples),
        on,
        tuple(left),
    )


def _training_s(report: Report) -> list[str]:
    """Return what no change of a finished model can fix, one line per code."""
    layers: dict[str, list[str]] = {}
    for finding in report.findings:
        if not finding.fixable:
            layers.setdefault(f"{finding.code} {finding.level} ({finding.name})", []).append(finding.layer or "the model")
    return [f"{title} of {_some(tuple(names))}, which --fix does not settle" for title, names in layers.items()]


def is_fixable(finding: Finding, report: Report) -> bool:
    """Return whether `fix` can fix a finding, with the data that was measured."""
    if finding.code not in STATISTICS:
        return finding.fixable
    return report.measurements is not None and not _had_better_stay(report)


def _had_better_stay(report: Report) -> bool:
    """Return whether the statistics are finite, and labels show that those of the data would be worse."""
    whole = not {finding.code for finding in report.findings} & {"BN301", "BN403"}
    return whole and report.measurements is not None and serves_better_as_it_is(report.measurements)


def _droppable(opened: Opened, network: Network) -> tuple[dict[Step, list[Step]], list[str]]:
    """Return linear layers whose bias can be dropped, with the normalizations after them; and the others, with the
    reason."""
    reachable: Callable[[Any], bool] = lambda handle: True  # noqa: E731
    if opened.framework == "keras":
        from evennorm.keras.biases import can_lose_bias

        reachable = can_lose_bias(opened.model).__contains__
    biased: dict[Step, list[Step]] = {}
    left, seen = [], set()
    for linear in network.steps:
        if linear.role is not Role.LINEAR or linear.layer in seen or not redundant_bias(network, linear):
            continue
        seen.add(linear.layer)
        norms = {norm.layer: norm for call in network.calls(linear) for norm in network.consumers(call)}
        why = _against(network, linear, list(norms.values()), reachable)
        if why:
            left.append(f"the bias of {linear.layer}, {why}")
        else:
            biased[linear] = list(norms.values())
    return biased, left


def _against(network: Network, linear: Step, norms: list[Step], reachable: Callable[[Any], bool]) -> str:
    for norm in norms:
        sources = {network[call.inputs[0]].layer for call in network.calls(norm) if call.inputs}
        if sources != {linear.layer}:
            return f"since {norm.layer} also normalizes other values"
        if norm.state is None or norm.state.mean is None:
            return f"since {norm.layer} has no moving mean to take it up"
        if len(norm.state.axis) > 1 or norm.kind == "TimeDistributed":
            return f"since the statistics of {norm.layer} are not those of channels"
        if not (reachable(linear.handle) and reachable(norm.handle)):
            return "which code of its own calls"
    return ""


def _without_biases(opened: Opened, biased: dict[Any, list[Any]]) -> Any:
    if opened.framework == "keras":
        from evennorm.keras.biases import can_lose_bias, without_biases

        if not can_lose_bias(opened.model):  # a subclassed model cannot be copied; the opened one is this command's own
            return opened.model
        return without_biases(opened.model, biased)
    from evennorm.torch.biases import without_biases as of_torch

    return of_torch(opened.model, biased)


def _recalibrate(
    opened: Opened, model: Any, data: Data, batch_size: int, batches: int | None, progress: Progress | None
) -> tuple[str, ...]:
    from evennorm.tools.recalibrate import recalibrate

    done = recalibrate(
        replace(opened, model=model),
        data,
        batches=batches,
        batch_size=batch_size,
        measure=False,
        keep_frozen=True,
        progress=progress,
    )
    return tuple(layer.name for layer in done.layers)


def _samples(opened: Opened, data: Data | None, size: int) -> tuple[Any, str]:
    """Return one batch to compare outputs on, and what it is."""
    if data is not None:
        return data.first(size).x, "the first batch of the data"
    inputs = getattr(opened.model, "inputs", None) if opened.framework == "keras" else None
    if not inputs or any(not str(x.dtype).startswith(("float", "bfloat")) for x in inputs):
        return None, ""
    random = np.random.default_rng(0)
    made = [random.normal(size=(8, *(n or 32 for n in x.shape[1:]))).astype("float32") for x in inputs]
    return (made[0] if len(made) == 1 else tuple(made)), "8 samples of random numbers"


def _outputs(opened: Opened, model: Any, x: Any) -> list[np.ndarray]:
    from evennorm.tools.recalibrate import program_of

    try:
        return list(program_of(replace(opened, model=model)).apply(x))
    except Exception as error:  # a model's own code may raise anything
        raise InputError(f"{opened.name} cannot be run to compare its outputs: {first_line(error)}") from error


def _difference(old: list[np.ndarray] | None, new: list[np.ndarray] | None) -> float | None:
    if old is None or new is None:
        return None
    size = max((float(np.max(np.abs(y), initial=0.0)) for y in old), default=0.0) or 1.0
    largest = max((float(np.max(np.abs(a - b), initial=0.0)) for a, b in zip(old, new, strict=True)), default=0.0)
    return largest / size


def _count(items: tuple[str, ...], one: str, many: str) -> str:
    return f"{len(items):,} {one if len(items) == 1 else many}"


def _some(items: tuple[str, ...]) -> str:
    return ", ".join(items[:4]) + (", ..." if len(items) > 4 else "")
