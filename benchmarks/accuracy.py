"""How far batch normalization is from float64 as the mean grows: our layer and Keras's own, on every engine.

Writes docs/accuracy.md. One process per engine; both layers see the same float32 data in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _engines import ENGINES, on_each_engine
from _environment import ROOT, environment, sentence

MEANS = (0.0, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
LAYOUTS = {"channels last": ((64, 28, 28, 32), -1), "channels first": ((64, 32, 28, 28), 1)}
STEPS = 200
"""Training steps before inference is measured."""
MOMENTUM = 0.9
"""So that the moving statistics have settled by then: 0.9 ** 200 is 7e-10."""
EPSILON = 1e-3

Arrays = tuple[np.ndarray, np.ndarray]


def data(shape: tuple[int, ...], mean: float) -> Arrays:
    """x and dy, float32."""
    rng = np.random.default_rng(0)
    return (rng.standard_normal(shape) + mean).astype(np.float32), rng.standard_normal(shape).astype(np.float32)


def expected(x: np.ndarray, dy: np.ndarray, axis: int) -> Arrays:
    """y and the derivative of sum(y * dy) by x, in float64 NumPy."""
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    reduced = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    centred = x - x.mean(reduced, keepdims=True)
    inverse = 1 / np.sqrt((centred**2).mean(reduced, keepdims=True) + EPSILON)
    xhat = centred * inverse
    mean_dy, mean_dy_xhat = dy.mean(reduced, keepdims=True), (dy * xhat).mean(reduced, keepdims=True)
    return xhat, inverse * (dy - mean_dy - xhat * mean_dy_xhat)


def output_and_gradient(layer: Any, x: np.ndarray, dy: np.ndarray) -> Arrays:
    """A training step's y, and the derivative of sum(y * dy) by x, by the engine's own differentiation."""
    import keras

    layer.build(x.shape)
    engine = keras.backend.backend()
    if engine == "torch":
        import torch

        tensor = torch.tensor(x, requires_grad=True)
        y = layer(tensor, training=True)
        (y * torch.tensor(dy)).sum().backward()
        return y.detach().numpy(), tensor.grad.numpy()
    if engine == "tensorflow":
        import tensorflow as tf

        tensor = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(tensor)
            y = layer(tensor, training=True)
            loss = tf.reduce_sum(y * dy)
        return y.numpy(), tape.gradient(loss, tensor).numpy()
    import jax

    def loss(tensor: Any) -> Any:
        trainable, state = ([v.value for v in part] for part in (layer.trainable_variables, layer.non_trainable_variables))
        y, _ = layer.stateless_call(trainable, state, tensor, training=True)
        return (y * dy).sum(), y

    (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(x)
    return np.asarray(y), np.asarray(gradient)


def training_errors(kind: Callable[..., Any], shape: tuple[int, ...], axis: int, mean: float) -> dict[str, float]:
    """Largest errors of output and input gradient in a training step."""
    x, dy = data(shape, mean)
    found = output_and_gradient(kind(axis=axis, epsilon=EPSILON), x, dy)
    return {what: largest(a - b) for what, a, b in zip(("output", "gradient"), found, expected(x, dy, axis), strict=True)}


def inference(kind: Callable[..., Any], mean: float, batches: int = STEPS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y at inference after training on some batches, the same with moving averages in float64, and their variance."""
    import keras

    layer = kind(momentum=MOMENTUM, epsilon=EPSILON)
    moving_mean, moving_variance = np.zeros(8), np.ones(8)
    rng = np.random.default_rng(0)
    for _ in range(batches):
        x = (rng.standard_normal((64, 8)) + mean).astype(np.float32)
        layer(x, training=True)
        moving_mean = MOMENTUM * moving_mean + (1 - MOMENTUM) * x.mean(0, dtype=np.float64)
        moving_variance = MOMENTUM * moving_variance + (1 - MOMENTUM) * x.astype(np.float64).var(0)
    y = keras.ops.convert_to_numpy(layer(x, training=False))
    return y, (x - moving_mean) / np.sqrt(moving_variance + EPSILON), moving_variance


def largest(difference: np.ndarray) -> float:
    return float(np.abs(difference).max())


def shapes(quick: bool) -> Iterable[tuple[str, tuple[int, ...], int]]:
    """Layout, shape and channel axis."""
    for layout, (shape, axis) in LAYOUTS.items():
        yield layout, tuple(min(size, 8) for size in shape) if quick else shape, axis


def steps(quick: bool) -> int:
    return 10 if quick else STEPS


def means(quick: bool) -> tuple[float, ...]:
    return MEANS[::3] if quick else MEANS


def measure(quick: bool) -> list[dict]:
    """Largest errors of both layers on the engine of this process: a row per table and mean."""
    import keras

    from evennorm.keras import BatchNormalization

    kinds = {"ours": BatchNormalization, "Keras's": keras.layers.BatchNormalization}
    rows = []
    for mean in means(quick):
        for who, kind in kinds.items():
            for layout, shape, axis in shapes(quick):
                for what, error in training_errors(kind, shape, axis, mean).items():
                    rows.append({"table": f"{what}, {layout}", "mean": mean, "who": who, "error": error})
            y, y64, _ = inference(kind, mean, steps(quick))
            rows.append({"table": "inference", "mean": mean, "who": who, "error": largest(y - y64)})
    return rows


def measure_numpy(quick: bool) -> list[dict]:
    """Largest errors of evennorm.numpy, which has no layer."""
    from evennorm.numpy import batch_norm, batch_norm_gradient

    rows = []
    for mean in means(quick):
        for layout, shape, axis in shapes(quick):
            x, dy = data(shape, mean)
            y, moments = batch_norm(x, axis=axis, epsilon=EPSILON)
            dx = batch_norm_gradient(dy, x, moments, axis=axis, epsilon=EPSILON).x
            for what, found, exact in zip(("output", "gradient"), (y, dx), expected(x, dy, axis), strict=True):
                row = {"table": f"{what}, {layout}", "mean": mean, "who": "ours", "error": largest(found - exact)}
                rows.append(row)
    return rows


def table(name: str, found: dict[str, list[dict]]) -> list[str]:
    """One table of the page: a row for each mean, a column for each engine and layer that has the figure."""
    cells = {
        (engine, row["who"], row["mean"]): row["error"] for engine in found for row in found[engine] if row["table"] == name
    }
    columns = list(dict.fromkeys((engine, who) for engine, who, _ in cells))
    lines = [
        "| mean | " + " | ".join(f"{engine}: {who}" for engine, who in columns) + " |",
        "| ---: |" + " ---: |" * len(columns),
    ]
    for mean in sorted({mean for _, _, mean in cells}):
        numbers = [number(cells[engine, who, mean]) for engine, who in columns]
        lines.append(f"| {mean:,.0f} | " + " | ".join(numbers) + " |")
    return ["", *lines]


def number(value: float) -> str:
    return "NaN" if np.isnan(value) else f"{value:.1e}"


def page(found: dict[str, list[dict]], where: dict, quick: bool = False) -> str:
    """docs/accuracy.md, from the rows of each engine."""
    lines = [
        "# Accuracy",
        "",
        "The largest error compared with float64, over all elements, for float32 data with standard deviation 1 around a",
        "growing mean. All layers get the same float32 numbers, so the errors are those of the layers alone. gamma is 1,",
        f"beta 0, epsilon {EPSILON:g}. `python benchmarks/accuracy.py` writes this page.",
        "",
        "Keras's layer loses accuracy in three ways. First, it stores the mean as one float32 number, which is off by up",
        "to half a unit in the last place: 0.004 at 100,000. Second, TensorFlow adds up in plain float32, so the mean",
        "itself is off by up to 5 at 100,000. Third, on torch the variance is E[x²] - E[x]², the difference of two numbers",
        "that are nearly equal if the mean is large. If it comes out negative, its square root is NaN. evennorm computes",
        "the variance around the mean, and carries the mean through training as two numbers, high and low.",
    ]
    for what, explanation in (
        ("output", "The normalized output in training."),
        ("gradient", "The gradient by the input, of sum(y * dy) with random dy of standard deviation 1."),
    ):
        lines += ["", f"## {what.capitalize()}", "", explanation]
        for layout, shape, _ in shapes(quick):
            lines += ["", f"{layout.capitalize()}, {shape}:", *table(f"{what}, {layout}", found)]
    lines += [
        "",
        "## Inference",
        "",
        f"The output at inference after {steps(quick)} training steps on (64, 8) with momentum {MOMENTUM}, compared with",
        "moving averages in float64. evennorm's remaining error at large means comes from the stored moving mean, which is",
        "one float32 number, as in Keras's files.",
        *table("inference", found),
    ]
    return "\n".join([*lines, "", sentence(where), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=ENGINES, help="measure on KERAS_BACKEND, which is this one, and print JSON")
    parser.add_argument(
        "--quick", action="store_true", help="small arrays, few means; prints the page instead of writing it"
    )
    arguments = parser.parse_args()
    if arguments.engine:
        print(json.dumps(measure(arguments.quick)))
        return
    found = on_each_engine(__file__, *(["--quick"] if arguments.quick else []))
    text = page({**found, "numpy": measure_numpy(arguments.quick)}, environment(), arguments.quick)
    if arguments.quick:
        print(text)
    else:
        (ROOT / "docs" / "accuracy.md").write_text(text)


if __name__ == "__main__":
    main()
