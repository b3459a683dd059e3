"""Find the function behind a metric's name: the common ones here, others in Keras or in torchmetrics."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np

from evennorm.errors import InputError, MissingExtra, first_line
from evennorm.tools.compare.measure import Metric
from evennorm.tools.compare.tasks import Measured, guessed

_IN_TORCHMETRICS = {"auc": "auroc", "top_k_categorical_accuracy": "accuracy"}


def measured_by(metric: Metric, task: str, framework: str, y: np.ndarray, outputs: int) -> Measured:
    """Return the function that computes a metric, tried on labels `y` and on what guessing gives for them.

    Args:
        metric: by Keras's name, or for torch models by that of torchmetrics.
        task, outputs: what is learned, and how many numbers a model gives for a sample.
        framework: "keras" or "torch".
        y: some labels.

    Raises:
        InputError: there is no such metric, or it does not fit the task.
        MissingExtra: torchmetrics is not installed.

    Example:
        >>> measured = measured_by(Metric("accuracy"), "classification", "keras", np.array([0, 1]), 2)
        >>> measured(np.array([0, 1]), np.array([[0.9, 0.1], [0.8, 0.2]]))
        0.5
    """
    guess = np.broadcast_to(guessed(task, y), (len(y), outputs))
    if simple(metric.name, y, guess) is not None:
        return lambda y, p: simple(metric.name, y, p) or 0.0
    found = _in_keras(metric, task, outputs) if framework == "keras" else _in_torchmetrics(metric, task, outputs)
    try:
        value = found(y, guess)
    except Exception as error:  # a metric may raise anything for a task that it does not fit
        raise InputError(f"--metric {metric.name} cannot be computed for {task}: {first_line(error)}") from error
    if not math.isfinite(value):
        raise InputError(f"--metric {metric.name} is {value} where a model guesses; choose one that is a number there")
    return found


def _in_keras(metric: Metric, task: str, outputs: int) -> Measured:
    import keras

    try:
        made: Any = keras.metrics.get(metric.name)
    except ValueError:
        made = None
    if made is None:
        raise InputError(f"--metric is one of keras.metrics, such as mean_absolute_error or auc; received {metric.name!r}")
    sparse = metric.name.startswith("sparse_")

    def measured(y: np.ndarray, p: np.ndarray) -> float:
        known = np.eye(outputs, dtype="float32")[y] if task == "classification" and not sparse else y
        if not isinstance(made, keras.metrics.Metric):
            return _scalar(np.mean(keras.ops.convert_to_numpy(made(known, p.astype("float32")))))
        made.reset_state()
        made.update_state(known, p.astype("float32"))
        return _scalar(keras.ops.convert_to_numpy(made.result()))

    return measured


def _in_torchmetrics(metric: Metric, task: str, outputs: int) -> Measured:
    try:
        import torchmetrics
    except ImportError as error:
        raise MissingExtra(f"--metric {metric.name} for a torch model", "torchmetrics", "torchmetrics") from error
    import torch

    wanted = _IN_TORCHMETRICS.get(metric.name.lower(), metric.name).replace("_", "").lower()
    kind = next((vars(torchmetrics)[name] for name in torchmetrics.__all__ if name.lower() == wanted), None)
    if kind is None:
        raise InputError(
            "--metric is for a torch model accuracy, mean_absolute_error, mean_squared_error, root_mean_squared_error, "
            f"r2_score, or a class of torchmetrics, such as AUROC; received {metric.name!r}"
        )
    settings: dict[str, Any] = {}
    if "task" in inspect.signature(kind.__new__).parameters:
        settings = (
            {"task": "multiclass", "num_classes": outputs}
            if task == "classification"
            else {"task": "multilabel", "num_labels": outputs}
        )
    try:
        made = kind(**settings)
    except Exception as error:
        raise InputError(f"--metric {metric.name} of torchmetrics cannot be made: {first_line(error)}") from error

    def measured(y: np.ndarray, p: np.ndarray) -> float:
        made.reset()
        known = torch.from_numpy(np.array(y if task == "regression" else y.astype("int64")))
        given = torch.from_numpy(np.array(p))
        if task == "regression" and outputs == 1:
            known, given = known[:, 0].double(), given[:, 0]
        return _scalar(made(given, known).numpy())

    return measured


def _scalar(value: Any) -> float:
    value = np.asarray(value)
    if value.size != 1:
        raise ValueError(f"it gives {value.size} numbers, and one is needed")
    return float(value.reshape(()))


def simple(name: str, y: np.ndarray, outputs: np.ndarray) -> float | None:
    """Compute a common metric, alike for every engine, in float64; return None for any other name.

    Args:
        name: of the metric.
        y: labels (N,) of classes, else targets (N, outputs).
        outputs: probabilities (N, classes) or (N, labels), or predictions (N, outputs).

    Example:
        >>> y = np.array([[0.0], [1.0], [2.0]])
        >>> simple("mean_absolute_error", y, y + 0.5), round(simple("r2_score", y, y + 0.5), 3)
        (0.5, 0.625)
    """
    if name == "accuracy" and y.ndim == 1:
        return float((outputs.argmax(axis=1) == y).mean())
    if name in ("accuracy", "binary_accuracy") and y.ndim == 2:
        return float(((outputs > 0.5) == (y > 0.5)).mean())
    if y.ndim != 2:
        return None
    error = outputs - y
    if name == "mean_absolute_error":
        return float(np.abs(error).mean())
    if name == "mean_squared_error":
        return float(np.square(error).mean())
    if name == "root_mean_squared_error":
        return float(np.sqrt(np.square(error).mean()))
    if name == "r2_score":  # the mean over outputs, as scikit-learn's
        spread = np.square(y - y.mean(axis=0)).sum(axis=0)
        return float(np.mean(1 - np.square(error).sum(axis=0) / np.where(spread > 0, spread, 1)))
    return None
