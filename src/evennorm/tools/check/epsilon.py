"""Find mistakes about epsilon: too small for the dtype, or larger than the variances it is added to."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from evennorm.tools.check.averages import never_updated
from evennorm.tools.check.rule import Found, Subject, each_layer, rule

_DIGITS = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}
"""Binary digits of a value, including the hidden one."""


def rounding_variance(dtype: str) -> float | None:
    """Return the variance of the rounding errors of values around 1: (2^-digits)^2 / 3, that of a uniform distribution."""
    digits = _DIGITS.get(dtype)
    return None if digits is None else (2.0**-digits) ** 2 / 3


@rule(
    "BN401",
    "epsilon-too-small",
    "warning",
    "An epsilon too small for the dtype",
    "If a channel is constant over a batch, only epsilon prevents a division by 0 (NaN), or rounding errors that are "
    "scaled up to a signal of variance 1.",
)
def epsilon_too_small(subject: Subject) -> Iterator[Found]:
    for step in each_layer(subject.network):
        noise = rounding_variance(step.dtype or "float32")
        if step.state is not None and noise is not None and step.state.epsilon < noise:
            word = "eps" if subject.network.framework == "torch" else "epsilon"
            yield Found(
                step.layer,
                f"{word}={step.state.epsilon:g} is below {noise:.1g}, the variance that rounding to "
                f"{step.dtype or 'float32'} alone gives to values around 1",
                f"use {word}=1e-3 or 1e-5",
            )


@rule(
    "BN402",
    "epsilon-dominates",
    "warning",
    "An epsilon that dominates the variance",
    "The output is then (x - mean) / sqrt(epsilon) rather than normalized: its variance is below one half, and it still "
    "depends on the scale of the input.",
)
def epsilon_dominates(subject: Subject) -> Iterator[Found]:
    for step in each_layer(subject.network):
        state = step.state
        if state is None or state.variance is None or not state.variance.size or never_updated(state) or state.mode:
            continue
        variance = np.asarray(state.variance, np.float64)
        if not np.all(np.isfinite(variance)) or np.median(variance) >= state.epsilon or state.epsilon == 0:
            continue
        below = int(np.sum(variance < state.epsilon))
        word = "eps" if subject.network.framework == "torch" else "epsilon"
        typical = max(float(np.median(variance)), 1e-30)
        yield Found(
            step.layer,
            f"{word}={state.epsilon:g} is larger than the moving variance of {below:,} of {variance.size:,} channels, whose "
            f"median is {typical:.2g}",
            f"scale what comes in up, or use an {word} below {typical / 100:.1g}",
        )
