"""Find mistakes that show on data: moving statistics that do not fit it, and modes that disagree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from evennorm.tools.check.rule import Found, Subject, rule

if TYPE_CHECKING:
    from evennorm.tools.check.measure import Measurements

DRIFT = 0.5
"""Standard deviations (root mean square over channels) that a moving mean may be off."""
SPREAD = 2.0
"""Factor by which the median channel's variance may be off."""
OUTPUT = 0.5
"""Fraction of the outputs' own spread by which the two modes may differ."""
ACCURACY = 0.02


@rule(
    "BN601",
    "drift",
    "warning",
    "Moving statistics that do not fit the data",
    "Inference normalizes by statistics that differ from those of this data, so every later layer gets values that it was "
    "not trained on.",
    fixable=True,
)
def drift(subject: Subject) -> Iterator[Found]:
    for layer in subject.measurements.layers if subject.measurements else ():
        off = layer.drift > DRIFT
        if off or not 1 / SPREAD < layer.variance_ratio < SPREAD:
            yield Found(
                layer.layer,
                f"the data's mean is {layer.drift:.2g} standard deviations from the moving mean, its variance "
                f"{layer.variance_ratio:.2g} times the moving variance (channel {layer.worst}: {layer.worst_drift:.2g})",
                "run `evennorm recalibrate`, or --fix with --data, if this is the data of training; else check its scaling",
            )


@rule(
    "BN602",
    "modes-disagree",
    "error",
    "Training mode and inference mode disagree",
    "The model computes something else at inference than in training, so the accuracy reached in training does not show "
    "at inference.",
    fixable=True,
)
def modes_disagree(subject: Subject) -> Iterator[Found]:
    measured = subject.measurements
    if measured is None or not measured.layers:
        return
    lost = lost_by_moving_statistics(measured)
    if (lost is not None and lost > _significant(measured)) or measured.output_difference > OUTPUT:
        words = f"outputs differ by {measured.output_difference:.2g} of their own spread"
        if lost is not None:
            words = (
                f"accuracy is {100 * (measured.training_accuracy or 0):.1f} % by the batch's statistics and "
                f"{100 * (measured.inference_accuracy or 0):.1f} % by the moving ones, and {words}"
            )
        yield Found(
            measured.parts_at,
            f"{words}, over {measured.samples:,} samples; this is the first layer where they differ",
            "check where this data comes from, its scaling and the batch size: the moving statistics give a higher "
            "accuracy than its own, so recalibrating would lose accuracy"
            if serves_better_as_it_is(measured)
            else "run `evennorm recalibrate`, or --fix with --data; then look at what changed between training and now",
        )


def lost_by_moving_statistics(measured: Measurements) -> float | None:
    """Return how much more accurate the model is with the batch's statistics; None without labels."""
    if measured.training_accuracy is None or measured.inference_accuracy is None:
        return None
    return measured.training_accuracy - measured.inference_accuracy


def serves_better_as_it_is(measured: Measurements) -> bool:
    """Return whether the moving statistics are more accurate than the data's own, which then should not replace them."""
    lost = lost_by_moving_statistics(measured)
    return lost is not None and -lost > _significant(measured)


def _significant(measured: Measurements) -> float:
    """Return the least difference of accuracies that is not chance."""
    return max(ACCURACY, 3 * (0.25 / max(measured.samples, 1)) ** 0.5)
