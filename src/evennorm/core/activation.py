"""Apply the activations that kernels compute together with normalization, and their derivatives."""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from evennorm.core.namespace import Array, Namespace
from evennorm.errors import ArgumentError


class Activation(NamedTuple):
    """A piecewise linear function of z: slope * z up to 0, z in between, `limit` from there on; NaN stays NaN.

    Its derivative at 0 is the slope, and at the limit it is 0, as in torch and TensorFlow. JAX's own relu6 has 1/2 at both.
    """

    slope: float = 1.0
    """1 without an activation, 0 for relu and relu6, else that of leaky relu."""
    limit: float = inf
    """6 for relu6: kernels know no other one, and none beside another slope."""

    @property
    def name(self) -> str:
        """none, relu, relu6 or leaky_relu."""
        return {LINEAR: "none", RELU: "relu", RELU6: "relu6"}.get(self, "leaky_relu")


LINEAR, RELU, RELU6 = Activation(), Activation(0.0), Activation(0.0, 6.0)


def activation_of(name: str | None, negative_slope: float = 0.01) -> Activation:
    """Return the activation of this name; `negative_slope` is that of "leaky_relu".

    Raises:
        ArgumentError: a name that no kernel fuses.
    """
    if name is None:
        return LINEAR
    known = {"relu": RELU, "relu6": RELU6, "leaky_relu": Activation(negative_slope)}
    if name not in known:
        listed = ", ".join(map(repr, (None, *known)))
        raise ArgumentError(f"activation is one of {listed}; received {name!r}; apply any other one to the result")
    return known[name]


def activate(xp: Namespace, z: Array, activation: Activation) -> Array:
    """Return y of z."""
    if activation == RELU6:
        return xp.relu6(z)
    return z if activation.slope == 1 else xp.leaky_relu(z, activation.slope)


def is_closed(z: Array, activation: Activation) -> Array:
    """Return where dy does not pass as it is; y tells as well as z."""
    return z <= 0 if activation.limit == inf else (z <= 0) | (z >= activation.limit)


def gated_by(xp: Namespace, dy: Array, closed: Array, activation: Activation) -> Array:
    """Return dz: dy, and its share of the slope where the activation is closed."""
    return xp.where(closed, 0.0 if activation.slope == 0 else activation.slope * dy, dy)
