"""Record a recalibration: each layer before and after, and the change of the outputs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from evennorm import notebook
from evennorm.models.state import BatchNormState
from evennorm.tools.recalibrate.effect import Effect

HEAD = ("layer", "values per channel", "mean moved by", "sd times", "drift", "")
"""Of a table of layers; `Layer.cells` is a row."""
_LOST = "was no number"


@dataclass(frozen=True)
class Layer:
    """One layer whose moving statistics were set."""

    name: str
    values: int
    """The number of values of each channel."""
    shift: float
    """The largest distance of a moving mean from what it was, in standard deviations of the data."""
    stretch: float
    """The new standard deviation divided by the old, for the channel where that is furthest from 1."""
    drift: float
    """What `check` calls so: the root mean square of these distances over the channels, in the old standard deviations.

    `check` measures it where all layers normalize by the batch, as in training and as with `one_pass`; here each layer is
    measured after recalibrated ones. So the two agree for layers with no other in front, if the data are the same.
    """
    frozen: bool
    before: BatchNormState
    after: BatchNormState

    @property
    def cells(self) -> tuple[str, ...]:
        """A row of a table: name, values per channel, mean moved by, deviation times, drift, and whether it is frozen."""
        shift = f"{self.shift:.3g} sd" if math.isfinite(self.shift) else _LOST
        stretch, drift = (f"{x:.3g}" if math.isfinite(x) else _LOST for x in (self.stretch, self.drift))
        return self.name, f"{self.values:,}", shift, stretch, drift, "frozen" if self.frozen else ""


@dataclass(frozen=True)
class Recalibration:
    """What `recalibrate` did."""

    model: str
    data: str
    samples: int
    passes: int
    """Passes over the data or the kept values, without those that measured outputs."""
    layers: tuple[Layer, ...]
    left: tuple[tuple[str, str], ...]
    """Normalizations that stay as they were, and why."""
    effect: Effect | None
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What was recalibrated on what."""
        layers = f"{len(self.layers)} layer{'s' * (len(self.layers) != 1)}"
        passes = f"{self.passes} pass{'es' * (self.passes != 1)}"
        return f"{self.model} on {self.data}: {layers}, {self.samples:,} samples, {passes}"

    @property
    def kept(self) -> list[str]:
        """Normalizations that stay as they were, in sentences."""
        return [f"left as it was: {name}, since {why}" for name, why in self.left]

    def _repr_html_(self) -> str:
        """Return HTML for a notebook: a row for each layer, what was left, and the change of the outputs."""
        effect = [] if self.effect is None else self.effect.lines
        return notebook.titled(
            self.title,
            notebook.table(HEAD, [layer.cells for layer in self.layers]),
            notebook.paragraphs([*self.kept, *self.notes, *effect]),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the record for JSON, in which numbers that are not finite are null."""
        layers = [
            {
                "name": layer.name,
                "values": layer.values,
                "shift": layer.shift,
                "stretch": layer.stretch,
                "drift": layer.drift,
                "frozen": layer.frozen,
            }
            for layer in self.layers
        ]
        found = {
            "model": self.model,
            "data": self.data,
            "samples": self.samples,
            "passes": self.passes,
            "layers": layers,
            "left": [{"name": name, "why": why} for name, why in self.left],
            "effect": None if self.effect is None else asdict(self.effect),
            "notes": list(self.notes),
        }
        return _finite(found)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
