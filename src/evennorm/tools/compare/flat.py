"""Tell when a training can end: the loss on the validation samples has stopped falling."""

from __future__ import annotations

import math
from collections.abc import Sequence

BUDGET = 100
"""Most epochs of a run until its curve is flat."""

PATIENCE = 5
"""Least epochs without progress that make a curve flat."""

PROGRESS = 0.01
"""Share by which the loss must fall below its lowest value so far to count as progress."""

RULE = f"less than {PROGRESS:.0%} lower for {PATIENCE} epochs, or for a quarter of all so far where that is more"


def is_flat(losses: Sequence[float | None], learned: bool, budget: int = BUDGET) -> bool:
    """Return whether a run can end: its validation loss fell by less than 1 % in the last 5 epochs, or the last quarter of
    all.

    A network may stand at chance for a while before it learns, so a run that has not learned is given a fifth of its budget
    before its curve counts as flat.

    Args:
        losses: after each epoch so far; None where it was not finite.
        learned: whether the run is better than guessing by now.
        budget: epochs that the run may take at most.

    Example:
        >>> is_flat([2.0, 1.0, 0.9, 0.9, 0.9, 0.9, 0.9], learned=True), is_flat([2.0, 1.0, 0.9, 0.5], learned=True)
        (False, False)
        >>> is_flat([2.0, 1.0, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9], learned=True)
        True
    """
    if not learned and len(losses) < budget / 5:
        return False
    waited = max(PATIENCE, math.ceil(len(losses) / 4))
    values = [math.inf if loss is None else loss for loss in losses]
    before, after = values[:-waited], values[-waited:]
    return bool(before) and min(after) > min(before) * (1 - PROGRESS)


def parsed(epochs: int | str) -> tuple[int, bool]:
    """Parse a number, `auto` or `auto:BUDGET`; return the most epochs of each run, and whether it may end earlier.

    Raises:
        ValueError: it is none of these.

    Example:
        >>> parsed("10"), parsed("auto"), parsed("auto:50")
        ((10, False), (100, True), (50, True))
    """
    word, _, budget = str(epochs).partition(":")
    if word == "auto":
        return int(budget or BUDGET), True
    return int(epochs), False
