"""Define the tasks: classes, several labels at once, or numbers; their losses, and what guessing reaches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Measured = Callable[[np.ndarray, np.ndarray], float]
"""A metric's value, from labels and what a model gives for their samples: probabilities or predictions."""


class Judgement(NamedTuple):
    """The value of a model's outputs for some samples."""

    value: float
    """The metric's value."""
    loss: float | None
    """The loss; None where it is not finite."""
    learned: bool
    """Whether the outputs are better than guessing."""


def task_of(y: np.ndarray) -> str:
    """Return the task of labels: whole numbers and one-hot rows are classes, rows of 0 and 1 labels, everything else
    targets.

    Whole numbers of which most occur once are targets too.

    Example:
        >>> task_of(np.array([0, 1, 1, 2])), task_of(np.array([[0, 1], [1, 1]])), task_of(np.array([0.5, 2.0]))
        ('classification', 'multilabel', 'regression')
    """
    if y.dtype.kind not in "buif" or y.ndim not in (1, 2) or y.size == 0 or (y == y[0]).all():
        return "classification"  # refused later, with its name
    flat = y.reshape(len(y), -1)
    if flat.shape[1] > 1:
        if not np.isin(flat, (0, 1)).all():
            return "regression"
        return "classification" if (flat.sum(axis=1) == 1).all() else "multilabel"
    whole = bool(np.isfinite(flat).all() and (flat == np.round(flat)).all()) if y.dtype.kind == "f" else True
    many = len(flat) > 20 and len(np.unique(flat)) > len(flat) / 2
    return "classification" if whole and not many else "regression"


def activation_of(task: str) -> str:
    """Return the last activation of the built-in networks."""
    return {"classification": "softmax", "multilabel": "sigmoid", "regression": "linear"}[task]


def judged(task: str, measured: Measured, y: np.ndarray, outputs: np.ndarray, from_logits: bool) -> Judgement:
    """Return value, loss and whether anything was learned, in float64.

    Outputs that are not finite count as those of guessing: the values stay comparable, and the loss tells.

    Args:
        task: one of `measure.TASKS`.
        measured: the metric.
        y: labels (N,) of classes, else targets (N, outputs).
        outputs: of the model, (N, outputs).
        from_logits: whether they are scores, rather than probabilities.

    Example:
        >>> y = np.array([0, 1, 1, 0] * 9)
        >>> outputs = np.eye(2)[y] * 4
        >>> judged("classification", lambda y, p: (p.argmax(1) == y).mean(), y, outputs, True).learned
        True
    """
    finite = bool(np.isfinite(outputs).all())
    outputs = predictions(task, y, outputs, from_logits)
    if not finite:
        return Judgement(measured(y, outputs), None, False)
    guess = guessed(task, y)
    losses = _losses(task, y, outputs)
    loss = float(losses.mean())
    if task == "classification":
        learned = float((outputs.argmax(axis=1) == y).mean()) > chance(y)
    else:
        gain = _losses(task, y, np.broadcast_to(guess, outputs.shape)) - losses
        learned = bool(gain.mean() > 2 * gain.std() / math.sqrt(len(gain)))
    return Judgement(measured(y, outputs), loss if math.isfinite(loss) else None, learned)


def predictions(task: str, y: np.ndarray, outputs: np.ndarray, from_logits: bool) -> np.ndarray:
    """Return what a metric takes, in float64: probabilities, or targets; where outputs are not finite, those of guessing.

    Example:
        >>> predictions("multilabel", np.array([[1.0]]), np.array([[0.0]]), from_logits=True)
        array([[0.5]])
    """
    outputs = np.asarray(outputs, dtype="float64")
    if not np.isfinite(outputs).all():
        return np.broadcast_to(guessed(task, y), outputs.shape)
    if not from_logits or task == "regression":
        return outputs
    return _softmax(outputs) if task == "classification" else 1 / (1 + np.exp(-np.clip(outputs, -500, 500)))


def guessed(task: str, y: np.ndarray) -> np.ndarray:
    """Return the best answer without looking: the shares of the classes, the share of each label, or the mean.

    Example:
        >>> guessed("regression", np.array([[1.0], [3.0]]))
        array([2.])
    """
    if task == "classification":
        return np.bincount(y) / len(y)
    return np.asarray(y, dtype="float64").mean(axis=0)


def chance(labels: np.ndarray) -> float:
    """Return the accuracy that guessing hardly exceeds: the share of the commonest label and two standard errors of it."""
    share = float(np.bincount(labels).max()) / len(labels)
    return share + 2 * math.sqrt(share * (1 - share) / len(labels))


def _losses(task: str, y: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Return the loss of each sample: cross-entropy, binary cross-entropy or squared error, bounded and averaged as in
    Keras."""
    if task == "regression":
        return np.asarray(np.square(outputs - y).mean(axis=1))
    p = np.clip(outputs, 1e-7, 1 - 1e-7)
    if task == "classification":
        return np.asarray(-np.log(p[np.arange(len(y)), y]))
    return np.asarray(-(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(axis=1))


def _softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(axis=1, keepdims=True))
    return np.asarray(x / x.sum(axis=1, keepdims=True))
