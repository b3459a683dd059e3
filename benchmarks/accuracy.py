"""How far batch normalization is from float64 as the mean grows: our layer and Keras's own, on every engine.

Writes docs/accuracy.md. One process per engine; both layers see the same float32 data in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _environment import ROOT, environment, sentence

ENGINES = ("jax", "torch", "tensorflow")
MEANS = (0.0, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
LAYOUTS = {"channels last": ((64, 28, 28, 32), -1), "channels first": ((64, 32, 28, 28), 1)}
STEPS = 200
"""Training steps before inference is measured, with momentum 0.9 so that the moving statistics have settled."""
EPSILON = 1e-3


def expected(x: np.ndarray, dy: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """y and the derivative of sum(y * dy) by x, in float64 NumPy."""
    reduced = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    centred = x - x.mean(reduced, keepdims=True)
    inverse = 1 / np.sqrt((centred**2).mean(reduced, keepdims=True) + EPSILON)
    xhat = centred * inverse
    mean_dy, mean_dy_xhat = dy.mean(reduced, keepdims=True), (dy * xhat).mean(reduced, keepdims=True)
    return xhat, inverse * (dy - mean_dy - xhat * mean_dy_xhat)


def output_and_gradient(layer: Any, x: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def after_training(layer: Any, batches: Callable[[int], np.ndarray], x: np.ndarray) -> np.ndarray:
    """y at inference, after training on a sequence of batches."""
    import keras

    for step in range(STEPS):
        layer(batches(step), training=True)
    return keras.ops.convert_to_numpy(layer(x, training=False))


def measure(quick: bool) -> list[dict]:
    """Largest errors on the engine of this process."""
    import keras

    from evennorm.keras import BatchNormalization

    rows = []
    for layout, (shape, axis) in LAYOUTS.items():
        shape = tuple(min(size, 8) for size in shape) if quick else shape
        for mean in MEANS:
            rng = np.random.default_rng(0)
            x = (rng.standard_normal(shape) + mean).astype(np.float32)
            dy = rng.standard_normal(shape).astype(np.float32)
            y64, gradient64 = expected(x.astype(np.float64), dy.astype(np.float64), axis)
            row = {"engine": keras.backend.backend(), "layout": layout, "mean": mean}
            for name, kind in (("ours", BatchNormalization), ("keras", keras.layers.BatchNormalization)):
                y, gradient = output_and_gradient(kind(axis=axis, epsilon=EPSILON), x, dy)
                row[f"{name} output"] = float(np.abs(y - y64).max())
                row[f"{name} gradient"] = float(np.abs(gradient - gradient64).max())
                row[f"{name} inference"] = inference_error(kind, mean)
            rows.append(row)
    return rows


def inference_error(kind: Any, mean: float) -> float:
    """Of the output at inference, against moving averages in float64."""
    layer = kind(momentum=0.9, epsilon=EPSILON)
    moving_mean, moving_variance = np.zeros(8), np.ones(8)

    def batch(step: int) -> np.ndarray:
        return (np.random.default_rng(step).standard_normal((64, 8)) + mean).astype(np.float32)

    x = batch(STEPS)
    y = after_training(layer, batch, x)
    for step in range(STEPS):
        values = batch(step).astype(np.float64)
        moving_mean = 0.9 * moving_mean + 0.1 * values.mean(0)
        moving_variance = 0.9 * moving_variance + 0.1 * values.var(0)
    return float(np.abs(y - (x - moving_mean) / np.sqrt(moving_variance + EPSILON)).max())


def page(rows: list[dict], where: dict) -> str:
    """docs/accuracy.md."""
    lines = [
        "# Accuracy",
        "",
        "The largest error against float64, over all elements, for float32 data of standard deviation 1 around a growing mean.",
        "The inputs are the same float32 numbers for everyone, so that what is shown is the layer's own doing.",
        f"`{LAYOUTS['channels last'][0]}` channels last, `{LAYOUTS['channels first'][0]}` channels first; gamma 1, beta 0,",
        f"epsilon {EPSILON:g}. This page is written by `python benchmarks/accuracy.py`.",
    ]
    for what, explanation in (
        ("output", "The normalized output in training."),
        ("gradient", "The gradient by the input, of sum(y * dy) with random dy of standard deviation 1."),
        (
            "inference",
            f"The output at inference after {STEPS} training steps on (64, 8), momentum 0.9, against moving averages in float64. "
            "What is left at large means is the rounding of the stored moving mean to float32: half a unit in the last place is "
            "0.004 at 100,000.",
        ),
    ):
        lines += ["", f"## {what.capitalize()}", "", explanation, ""]
        layouts = list(LAYOUTS) if what != "inference" else ["channels last"]
        columns = [(engine, layout) for engine in ENGINES for layout in layouts]
        heads = [f"{engine}, {layout}" if len(layouts) > 1 else engine for engine, layout in columns]
        lines += [
            "| mean | " + " | ".join(f"{h}: ours | Keras's" for h in heads) + " |",
            "| ---: |" + " ---: |" * 2 * len(columns),
        ]
        for mean in MEANS:
            cells = []
            for engine, layout in columns:
                (row,) = [r for r in rows if (r["engine"], r["layout"], r["mean"]) == (engine, layout, mean)]
                cells += [number(row[f"ours {what}"]), number(row[f"keras {what}"])]
            lines.append(f"| {mean:,.0f} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", sentence(where), ""])


def number(value: float) -> str:
    return "NaN" if np.isnan(value) else f"{value:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=ENGINES, help="measure on this engine only and print JSON")
    parser.add_argument("--quick", action="store_true", help="small arrays; prints the page instead of writing it")
    arguments = parser.parse_args()
    if arguments.engine:
        print(json.dumps(measure(arguments.quick)))
        return
    rows = []
    for engine in ENGINES:
        command = [sys.executable, __file__, "--engine", engine, *(["--quick"] if arguments.quick else [])]
        quiet = {**os.environ, "KERAS_BACKEND": engine, "TF_CPP_MIN_LOG_LEVEL": "3"}
        rows += json.loads(subprocess.run(command, env=quiet, stdout=subprocess.PIPE, text=True, check=True).stdout)
    text = page(rows, environment())
    if arguments.quick:
        print(text)
    else:
        (ROOT / "docs" / "accuracy.md").write_text(text)


if __name__ == "__main__":
    main()
