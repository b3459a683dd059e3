"""The articles' network trained with Keras's layer and with ours: the same loss, step for step, on every engine.

Writes docs/training-curve.md. Plain SGD: an optimizer that divides by the size of a gradient, as Adam does, would
turn the rounding noise of gradients that are zero in theory (of a bias in front of batch normalization) into full steps.

ReLU and max pooling have kinks: where rounding carries one value to the other side of one, the gradient jumps, and the
curve with it, by some 1e-4. In float32 two right curves part that way sooner or later. So each layer is also held
to float64, and both train in a network without kinks, with softplus and average pooling, whose curves stay together.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _engines import ENGINES, on_each_engine
from _environment import ROOT, environment, sentence

SIDE, CLASSES, BATCH, STEPS, RATE = 48, 7, 32, 20, 0.003


def images(samples: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey images in seven classes, each a stripe pattern of its own under noise."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, samples)
    stripes = np.sin(np.arange(side)[None, :] * (0.3 + 0.3 * labels[:, None]))
    x = stripes[:, None, :, None] + rng.normal(0, 0.7, (samples, side, side, 1))
    return x.astype(np.float32), labels


def losses(model: Any, x: np.ndarray, y: np.ndarray, batch: int) -> list[float]:
    """The loss of each step of one epoch."""
    import keras

    model.compile(keras.optimizers.SGD(RATE), "sparse_categorical_crossentropy")
    return [float(model.train_on_batch(x[i : i + batch], y[i : i + batch])) for i in range(0, len(x), batch)]


def network(side: int, layer: type | None = None, smooth: bool = False) -> Any:
    """The articles' network, with `layer` as its normalization, but without its dropout, whose draws differ between precisions."""
    import keras

    from evennorm.keras import BatchNormalization
    from evennorm.tools.compare.networks import article_cnn

    model = keras.Sequential([keras.Input((side, side, 1))])
    for original in article_cnn((side, side, 1), CLASSES).layers:
        kind = layer if layer and isinstance(original, BatchNormalization) else type(original)
        config = {**original.get_config(), "dtype": keras.config.floatx()}
        if smooth and isinstance(original, keras.layers.MaxPooling2D):
            kind = keras.layers.AveragePooling2D
        if smooth and config.get("activation") == "relu":
            config["activation"] = "softplus"
        if kind is not keras.layers.Dropout:
            model.add(kind.from_config(config))
    return model


def curves(side: int = SIDE, batch: int = BATCH, steps: int = STEPS) -> dict[str, list[float]]:
    """Losses of each run, from the same weights on the same batches.

    float64 is our layer's: on JAX and torch Keras's layer computes in float32 whatever its dtype.
    """
    import keras

    keras.utils.set_random_seed(1)
    theirs = keras.layers.BatchNormalization
    weights = network(side).get_weights()
    x, y = images(batch * steps, side)
    runs = {
        "ours": ("float32", {}),
        "keras": ("float32", {"layer": theirs}),
        "float64": ("float64", {}),
        "ours, smooth": ("float32", {"smooth": True}),
        "keras, smooth": ("float32", {"layer": theirs, "smooth": True}),
    }
    found = {}
    usual = keras.config.floatx()
    try:
        for name, (dtype, options) in runs.items():
            keras.config.set_floatx(dtype)  # that of the loss and of its mean, too
            model = network(side, **options)
            model.set_weights(weights)
            found[name] = losses(model, x.astype(dtype), y, batch)
    finally:
        keras.config.set_floatx(usual)
    return found


def page(found: dict[str, dict[str, list[float]]], where: dict) -> str:
    """docs/training-curve.md."""
    steps = len(next(iter(found.values()))["ours"])
    pairs = {
        "no kinks: ours to Keras's": ("ours, smooth", "keras, smooth"),
        "ours to Keras's": ("ours", "keras"),
        "ours to float64": ("ours", "float64"),
        "Keras's to float64": ("keras", "float64"),
    }
    lines = [
        "# The same training curve",
        "",
        f"The articles' network ({SIDE} x {SIDE} x 1, {CLASSES} classes) trained for {steps} steps of {BATCH} images by SGD",
        f"(rate {RATE}), with `keras.layers.BatchNormalization` and with `evennorm.keras.BatchNormalization`: same initial",
        "weights, same batches, each engine with its default compilation. Dropout is left out, since its draws differ between precisions.",
        "This page is written by `python benchmarks/training_curve.py`.",
        "",
        "Largest difference of two curves, over all steps:",
        "",
        f"| engine | first loss | last loss | {' | '.join(pairs)} |",
        "| --- |" + " ---: |" * (2 + len(pairs)),
    ]
    for engine, row in found.items():
        cells = " | ".join(f"{largest_difference(row[a], row[b]):.1e}" for a, b in pairs.values())
        lines.append(f"| {engine} | {row['ours'][0]:.4f} | {row['ours'][-1]:.4f} | {cells} |")
    lines += [
        "",
        "In float64 the two layers train alike to rounding. In float32 two right curves may part by more than the rounding of a",
        "loss: ReLU and max pooling have kinks, and where rounding carries one value to the other side of one, the gradient jumps",
        "and the curve with it. That befalls either layer, the one with larger errors more often; the last two columns tell which.",
    ]
    return "\n".join([*lines, "", sentence(where), ""])


def largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=ENGINES, help="train on KERAS_BACKEND, which is this one, and print JSON")
    parser.add_argument("--quick", action="store_true", help="two steps; prints the page instead of writing it")
    arguments = parser.parse_args()
    if arguments.engine:
        os.environ["JAX_ENABLE_X64"] = "1"
        print(json.dumps(curves(steps=2 if arguments.quick else STEPS)))
        return
    text = page(on_each_engine(__file__, *(["--quick"] if arguments.quick else [])), environment())
    if arguments.quick:
        print(text)
    else:
        (ROOT / "docs" / "training-curve.md").write_text(text)


if __name__ == "__main__":
    main()
