"""Networks by hand, of no framework: what the rules of `evennorm check` are tried on."""

from __future__ import annotations

from typing import Any

import numpy as np

from evennorm.models.network import Network, Role, Step
from evennorm.models.state import BatchNormState
from evennorm.tools.check.rule import Finding, Subject
from evennorm.tools.check.rules import RULES

BN = Role.BATCH_NORM


def state(**values: Any) -> BatchNormState:
    """Of a layer with four channels, as it is after training."""
    trained = {
        "epsilon": 1e-3,
        "decay": 0.9,
        "gamma": np.array([1.0, 0.9, 1.1, 0.8]),
        "beta": np.array([0.1, 0.0, -0.2, 0.3]),
        "mean": np.array([0.5, -0.5, 1.0, 0.0]),
        "variance": np.array([1.0, 2.0, 0.5, 0.7]),
    }
    return BatchNormState("bn", **(trained | values))


def step(name: str, role: Role, *inputs: str, shape: Any = (None, 8, 8, 4), **values: Any) -> Step:
    """A step; one of batch normalization has a state."""
    if role is BN:
        values.setdefault("state", state())
    kind = {BN: "BatchNormalization", Role.LINEAR: "Conv2D"}.get(role, role.value)
    layer = values.pop("layer", name)
    return Step(name, layer, values.pop("kind", kind), role, inputs, shape=shape, **values)


def network(*steps: Step, outputs: tuple[str, ...] = (), **values: Any) -> Network:
    """A network that ends with an output of its own, so that no layer under test is the last one by accident."""
    if not outputs:
        steps = (*steps, step("end", Role.LINEAR, steps[-1].name))
        outputs = ("end",)
    return Network("model", steps, outputs, **({"framework": "keras"} | values))


def chain(*roles: tuple[str, Role, dict[str, Any]], **values: Any) -> Network:
    """Steps behind each other."""
    before: tuple[str, ...] = ()
    steps = []
    for name, role, settings in roles:
        steps.append(step(name, role, *before, **settings))
        before = (name,)
    return network(*steps, **values)


def one(norm: dict[str, Any] | None = None, **values: Any) -> Network:
    """An input, a convolution without bias, and one batch normalization."""
    linear = ("conv", Role.LINEAR, {"channel_axis": 3})
    return chain(("x", Role.INPUT, {}), linear, ("bn", BN, norm or {}), ("relu", Role.ACTIVATION, {}), **values)


def found(network: Network, **subject: Any) -> list[Finding]:
    """All findings about a network."""
    return [finding for rule in RULES for finding in rule.findings(Subject(network, **subject))]


def codes(network: Network, **subject: Any) -> list[str]:
    return [finding.code for finding in found(network, **subject)]
