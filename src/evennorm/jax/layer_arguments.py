"""Check the arguments that layers of JAX libraries share."""

from __future__ import annotations

from typing import Any

from evennorm.core.activation import activation_of
from evennorm.core.call import checked_epsilon
from evennorm.errors import ArgumentError


def check(
    momentum: Any,
    epsilon: float,
    activation: str | None = None,
    negative_slope: float = 0.01,
    virtual_batch_size: int | None = None,
) -> None:
    """Refuse values outside their range.

    Raises:
        ArgumentError: a value outside its range.
    """
    checked_momentum(momentum)
    checked_epsilon(epsilon)
    activation_of(activation, negative_slope)
    if virtual_batch_size is not None and virtual_batch_size < 1:
        raise ArgumentError(
            f"virtual_batch_size is a number of samples, 1 or more; received virtual_batch_size={virtual_batch_size}"
        )


def checked_momentum(momentum: Any) -> Any:
    """Return the weight of the old average; an array, such as the value of a schedule, is not checked."""
    if momentum is None or (isinstance(momentum, int | float) and not 0 <= momentum <= 1):
        raise ArgumentError(
            f"momentum weighs the old average, from 0 to 1 (torch's is 1 minus it); received momentum={momentum}"
        )
    return momentum
