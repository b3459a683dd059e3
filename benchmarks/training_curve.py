"""The articles' network trained with Keras's layer and with ours: the same loss, step for step, on every engine.

Writes docs/training-curve.md. Plain SGD: an optimizer that divides by the size of a gradient, as Adam does, would
turn the rounding noise of gradients that are zero in theory (of a bias in front of batch normalization) into full steps.

ReLU and max pooling have kinks: where rounding carries one value to the other side of one, the gradient jumps, and the
curve with it, by 1e-4 and growing. In float32 two right curves part that way sooner or later; Keras's layer does so from
itself when its initial weights are nudged by 1e-7. So both layers also train in the same network without kinks, with
softplus and average pooling, where nothing but rounding can part them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _engines import ENGINES, on_each_engine
from _environment import ROOT, environment, sentence

SIDE, CLASSES, BATCH, STEPS, RATE = 48, 7, 16, 20, 0.003


@dataclass(frozen=True)
class Run:
    """One way to train the network; all start from the same weights, but for a nudge, and see the same batches."""

    whose: str
    dtype: str = "float32"
    smooth: bool = False
    nudge: int = 0
    """The seed of relative changes of the initial weights by -1e-7, 0 or 1e-7; 0 for none."""


RUNS = {
    "ours, smooth": Run("ours", smooth=True),
    "Keras's, smooth": Run("Keras's", smooth=True),
    "ours": Run("ours"),
    "Keras's": Run("Keras's"),
    # Ours, since on JAX and torch Keras's layer computes in float32 whatever its dtype.
    "float64": Run("ours", dtype="float64"),
    **{f"Keras's, nudged {seed}": Run("Keras's", nudge=seed) for seed in (1, 2, 3)},
}


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


def network(side: int, run: Run) -> Any:
    """The articles' network without its dropout, whose draws differ between precisions."""
    import keras

    from evennorm.keras import BatchNormalization
    from evennorm.tools.compare.networks import article_cnn

    exchanged = {keras.layers.Dropout: None}
    if run.whose == "Keras's":
        exchanged[BatchNormalization] = keras.layers.BatchNormalization
    if run.smooth:
        exchanged[keras.layers.MaxPooling2D] = keras.layers.AveragePooling2D
    model = keras.Sequential([keras.Input((side, side, 1))])
    for original in article_cnn((side, side, 1), CLASSES).layers:
        config = {**original.get_config(), "dtype": run.dtype}
        if run.smooth and config.get("activation") == "relu":
            config["activation"] = "softplus"
        kind = exchanged.get(type(original), type(original))
        if kind:
            model.add(kind.from_config(config))
    return model


def nudged(weights: list[np.ndarray], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(w * (1 + 1e-7 * rng.integers(-1, 2, w.shape))).astype(w.dtype) if seed else w for w in weights]


def curves(
    side: int = SIDE, batch: int = BATCH, steps: int = STEPS, names: Iterable[str] = tuple(RUNS)
) -> dict[str, list[float]]:
    """The losses of each step of the named runs."""
    import keras

    keras.utils.set_random_seed(1)
    weights = network(side, Run("ours")).get_weights()
    x, y = images(batch * steps, side)
    found = {}
    usual = keras.config.floatx()
    try:
        for name in names:
            run = RUNS[name]
            keras.config.set_floatx(run.dtype)  # that of the loss and of its mean, too
            model = network(side, run)
            model.set_weights(nudged(weights, run.nudge))
            found[name] = losses(model, x.astype(run.dtype), y, batch)
    finally:
        keras.config.set_floatx(usual)
    return found


def page(found: dict[str, dict[str, list[float]]], where: dict) -> str:
    """docs/training-curve.md."""
    steps = len(next(iter(found.values()))["ours"])
    lines = [
        "# The same training curve",
        "",
        f"The articles' network ({SIDE} x {SIDE} x 1, {CLASSES} classes), trained for {steps} steps of {BATCH} images by",
        f"SGD (rate {RATE}), with `keras.layers.BatchNormalization` and with `evennorm.keras.BatchNormalization`. Both have",
        "the same initial weights and the same batches, and each engine compiles by its defaults. Dropout is left out,",
        "because its random numbers differ between precisions. `python benchmarks/training_curve.py` writes this page.",
        "",
        "ReLU and max pooling have kinks. If rounding moves a value across a kink, the gradient jumps, and so does the",
        "curve. In float32, two correct curves therefore diverge sooner or later, by 1e-4 and growing. This happens to",
        "both layers. Keras's layer also diverges from itself if its initial weights change by 1e-7: the last column has",
        "the largest of three such runs. So the first column of differences is the one that compares the layers: it has",
        "the same network without kinks, with softplus and average pooling, where only rounding makes a difference.",
        "",
        "Largest difference of two curves, over all steps:",
        "",
        "| engine | first loss | last loss | without kinks, ours to Keras's | ours to Keras's | ours to float64 "
        "| Keras's to float64 | Keras's to itself, nudged |",
        "| --- |" + " ---: |" * 7,
    ]
    for engine, row in found.items():
        differences = [
            apart(row["ours, smooth"], row["Keras's, smooth"]),
            apart(row["ours"], row["Keras's"]),
            apart(row["ours"], row["float64"]),
            apart(row["Keras's"], row["float64"]),
            max(apart(row[name], row["Keras's"]) for name in row if RUNS[name].nudge),
        ]
        cells = " | ".join(f"{difference:.1e}" for difference in differences)
        lines.append(f"| {engine} | {row['ours'][0]:.4f} | {row['ours'][-1]:.4f} | {cells} |")
    lines += [
        "",
        "The float64 curve is evennorm's: on JAX and torch, Keras's layer computes in float32 whatever its dtype.",
    ]
    return "\n".join([*lines, "", sentence(where), ""])


def apart(a: list[float], b: list[float]) -> float:
    """The largest difference of two curves."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=ENGINES, help="train on KERAS_BACKEND, which is this one, and print JSON")
    parser.add_argument("--quick", action="store_true", help="two steps; prints the page instead of writing it")
    arguments = parser.parse_args()
    if arguments.engine:
        os.environ["JAX_ENABLE_X64"] = "1"  # float64 is there only where it was asked for before JAX starts
        print(json.dumps(curves(steps=2 if arguments.quick else STEPS)))
        return
    text = page(on_each_engine(__file__, *(["--quick"] if arguments.quick else [])), environment())
    if arguments.quick:
        print(text)
    else:
        (ROOT / "docs" / "training-curve.md").write_text(text)


if __name__ == "__main__":
    main()
