"""Define what is measured on an engine: evennorm, other layers, and copies as the limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from evennorm.errors import EvennormError
from evennorm.tools.bench.cases import Case

EPSILON = 1e-3

ENGINES = ("torch", "jax", "tensorflow", "numpy")


class NotServed(EvennormError):  # noqa: N818, it states a fact
    """A contestant does not support a case; the text says why."""


class Data(NamedTuple):
    """The arrays of one case, in NumPy's memory or in an engine's."""

    x: Any
    dy: Any
    gamma: Any
    beta: Any
    residual: Any
    """The array; None where the case has none."""


class Calls(NamedTuple):
    """The calls of one contestant for one case; each allocates its results anew and returns when they are there."""

    forward: Callable[[], Any]
    """Returns y."""
    both: Callable[[], Any] | None
    """Returns y and the gradients by x, gamma, beta and the residual."""
    values: Callable[[Any], list[np.ndarray]]
    """Converts the result of a call to NumPy arrays in memory order, float32 or wider."""
    saved: Callable[[], int] | None = None
    """Returns the bytes kept for backward, where the engine can tell."""


@dataclass(frozen=True)
class Contestant:
    """One way to normalize.

    `family` names ways that differ in one word only, such as relu and relu_: ratios are taken to the best of a family.
    `ours` names the contestant of ours that another is compared with; None for ours and for the limit.
    """

    name: str
    family: str
    ours: str | None
    prepare: Callable[[Case, Data], Calls]
    """Makes the calls. It raises NotServed, or what the framework raises for a case that it does not take."""


OURS, OUR_LAYER, OUR_MODULE = "evennorm", "evennorm, Keras layer", "evennorm, module"
KERAS = "Keras's layer"
COPY, CHEAP_COPY = "copy", "copy, cheap pages"
LIMIT = "limit"
"""The family of the copies: reading the tensor and writing it once, into fresh memory."""


def module_of(engine: str) -> ModuleType:
    """Return the module with `place(case, data)` and `contestants()`, loading the engine."""
    return import_module(f"evennorm.tools.bench.on_{engine}")


def draw(case: Case, seed: int = 0) -> Data:
    """Return random values for a case as NumPy arrays in float32: mean 1 and standard deviation 2, gamma around 1, beta
    around 0."""
    rng = np.random.default_rng(seed)

    def normal(shape: tuple[int, ...], scale: float = 1.0, mean: float = 0.0) -> np.ndarray:
        values = rng.standard_normal(shape, dtype=np.float32)
        values *= scale
        values += mean
        return values

    parameters = (case.channels,)
    return Data(
        normal(case.shape, 2.0, 1.0),
        normal(case.shape),
        normal(parameters, 0.2, 1.0),
        normal(parameters, 0.2),
        normal(case.shape) if case.residual else None,
    )
