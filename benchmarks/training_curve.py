"""The articles' network trained with Keras's layer and with ours: the same loss, step for step, on every engine.

Writes docs/training-curve.md. Plain SGD: an optimizer that divides by the size of a gradient, as Adam does, would
turn the rounding noise of gradients that are zero in theory (of a bias in front of batch normalization) into full steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _environment import ROOT, environment, sentence

ENGINES = ("jax", "torch", "tensorflow")
SIDE, CLASSES, BATCH, STEPS, RATE = 48, 7, 32, 40, 0.003


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


def network(side: int, layer: type | None = None, dtype: str = "float32") -> Any:
    """The articles' network without its dropout, whose draws differ between precisions."""
    import keras

    from evennorm.keras import BatchNormalization
    from evennorm.tools.compare.networks import article_cnn

    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((side, side, 1))])
    for original in article_cnn((side, side, 1), CLASSES).layers:
        kind = layer if layer and isinstance(original, BatchNormalization) else type(original)
        if not isinstance(original, keras.layers.Dropout):
            model.add(kind.from_config({**original.get_config(), "dtype": dtype}))
    return model


def curves(side: int = SIDE, batch: int = BATCH, steps: int = STEPS) -> dict[str, list[float]]:
    """Losses with our layer, with Keras's, and with Keras's in float64, from the same weights on the same batches."""
    import keras

    ours = network(side)
    weights = ours.get_weights()
    models = {"ours": ours, "keras": network(side, keras.layers.BatchNormalization)}
    models["float64"] = network(side, keras.layers.BatchNormalization, "float64")
    x, y = images(batch * steps, side)
    found = {}
    for name, model in models.items():
        model.set_weights(weights)
        found[name] = losses(model, x.astype("float64" if name == "float64" else "float32"), y, batch)
    return found


def page(found: dict[str, dict], where: dict) -> str:
    """docs/training-curve.md."""
    lines = [
        "# The same training curve",
        "",
        f"The articles' network ({SIDE} x {SIDE} x 1, {CLASSES} classes) trained for {STEPS} steps of {BATCH} images by SGD",
        f"(rate {RATE}), with `keras.layers.BatchNormalization` and with `evennorm.keras.BatchNormalization`: same weights at the",
        "start, same batches, each engine with its default compilation. A third run, with Keras's layer in float64, tells whose",
        "rounding a difference is. Dropout is left out, since its draws differ between precisions. This page is written by",
        "`python benchmarks/training_curve.py`.",
        "",
        "| engine | first loss | last loss | largest difference, ours to Keras's | ours to float64 | Keras's to float64 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for engine, row in found.items():
        pairs = (("ours", "keras"), ("ours", "float64"), ("keras", "float64"))
        cells = " | ".join(f"{largest_difference(row[a], row[b]):.1e}" for a, b in pairs)
        lines.append(f"| {engine} | {row['ours'][0]:.4f} | {row['ours'][-1]:.4f} | {cells} |")
    return "\n".join([*lines, "", sentence(where), ""])


def largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=ENGINES, help="train on this engine only and print JSON")
    arguments = parser.parse_args()
    if arguments.engine:
        if arguments.engine == "jax":
            os.environ["JAX_ENABLE_X64"] = "1"
        print(json.dumps(curves()))
        return
    found = {}
    for engine in ENGINES:
        quiet = {**os.environ, "KERAS_BACKEND": engine, "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, __file__, "--engine", engine]
        found[engine] = json.loads(subprocess.run(command, env=quiet, stdout=subprocess.PIPE, text=True, check=True).stdout)
    (ROOT / "docs" / "training-curve.md").write_text(page(found, environment()))


if __name__ == "__main__":
    main()
