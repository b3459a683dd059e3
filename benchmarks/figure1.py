"""Figure 1 of the paper on MNIST: three layers of 100 sigmoid units, with and without batch normalization.

Writes benchmarks/results/figure1.json, docs/figure-1.svg and docs/figure-1.md. Network, batches and steps are the paper's
(Ioffe & Szegedy 2015, arXiv 1502.03167, section 4.1): images cut to 0 and 1, small Gaussian weights, batches of 60,
50,000 steps. The paper names neither its learning rate nor what "small" is; two rates are trained here, both with a
deviation of 0.1, by plain gradient descent.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _environment import ROOT, environment

from evennorm.jax import batch_norm
from evennorm.tools.atomic import write_text
from evennorm.tools.compare.files import read_idx_folder

WIDTH, LAYERS, CLASSES, BATCH, STEPS, DEVIATION = 100, 3, 10, 60, 50_000, 0.1
RATES = (0.1, 0.5)
SEEDS = 3
KEPT = 0.99
"""Share of the moving averages that stays at each step."""
EPSILON = 1e-5
EVERY = 250
"""Steps between two measurements of accuracy and percentiles."""
PERCENTILES = (15, 50, 85)
WATCHED = 1000
"""Test images over whose inputs to a unit the percentiles are taken."""
RESULTS = ROOT / "benchmarks" / "results" / "figure1.json"

Arrays = dict[str, Any]


def initial(seed: int, inputs: int) -> Arrays:
    """Weights and statistics; the same weights with and without normalization."""
    random = np.random.default_rng(seed)
    sizes = [inputs, *[WIDTH] * LAYERS, CLASSES]
    state: Arrays = {"trained": {}, "moving": {}}
    for i, shape in enumerate(pairwise(sizes)):
        state["trained"][f"weight{i}"] = random.normal(0, DEVIATION, shape).astype("float32")
        state["trained"][f"bias{i}"] = np.zeros(shape[1], "float32")
    for i in range(LAYERS):
        state["trained"] |= {f"gamma{i}": np.ones(WIDTH, "float32"), f"beta{i}": np.zeros(WIDTH, "float32")}
        state["moving"] |= {f"mean{i}": np.zeros(WIDTH, "float32"), f"variance{i}": np.ones(WIDTH, "float32")}
    return state


def predict(trained: Arrays, moving: Arrays, x: Any, normalized: bool, training: bool) -> tuple[Any, Any, Arrays]:
    """Scores of the classes, inputs of the last hidden layer's sigmoids, and the new moving statistics."""
    following = dict(moving)
    for i in range(LAYERS):
        x = x @ trained[f"weight{i}"] + trained[f"bias{i}"]
        gamma, beta = trained[f"gamma{i}"], trained[f"beta{i}"]
        if normalized and training:
            x, moments = batch_norm(x, gamma, beta, epsilon=EPSILON)
            for name, value in (("mean", moments.mean + moments.mean_low), ("variance", moments.variance)):
                following[f"{name}{i}"] = KEPT * moving[f"{name}{i}"] + (1 - KEPT) * value
        elif normalized:
            scale = gamma / jnp.sqrt(moving[f"variance{i}"] + EPSILON)
            x = (x - moving[f"mean{i}"]) * scale + beta
        before = x
        x = jax.nn.sigmoid(x)
    return x @ trained[f"weight{LAYERS}"] + trained[f"bias{LAYERS}"], before, following


@partial(jax.jit, static_argnames="normalized")
def steps(state: Arrays, batches: Any, rate: float, x: Any, y: Any, normalized: bool) -> Arrays:
    """The state after a step of gradient descent on each of the batches (steps, BATCH) of sample numbers."""

    def loss(trained: Arrays, moving: Arrays, batch: Any) -> tuple[Any, Arrays]:
        scores, _, following = predict(trained, moving, x[batch], normalized, training=True)
        return -jnp.take_along_axis(jax.nn.log_softmax(scores), y[batch][:, None], 1).mean(), following

    def step(state: Arrays, batch: Any) -> tuple[Arrays, None]:
        gradient, moving = jax.grad(loss, has_aux=True)(state["trained"], state["moving"], batch)
        trained = jax.tree.map(lambda value, slope: value - rate * slope, state["trained"], gradient)
        return {"trained": trained, "moving": moving}, None

    return jax.lax.scan(step, state, batches)[0]


@partial(jax.jit, static_argnames="normalized")
def measured(state: Arrays, x: Any, y: Any, normalized: bool) -> tuple[Any, Any]:
    """Test accuracy, and percentiles (3, WIDTH) of the inputs to the last hidden layer's units."""
    scores, inputs, _ = predict(state["trained"], state["moving"], x, normalized, training=False)
    return (scores.argmax(1) == y).mean(), jnp.percentile(inputs[:WATCHED], jnp.array(PERCENTILES), axis=0)


def orders(seed: int, samples: int, number: int) -> np.ndarray:
    """Sample numbers (number, BATCH): every epoch a new order, without the part of a batch that is left over."""
    random = np.random.default_rng([seed, 1])
    each = samples // BATCH
    epochs = [random.permutation(samples)[: each * BATCH].reshape(each, BATCH) for _ in range(-(-number // each))]
    return np.concatenate(epochs)[:number].astype("int32")


def run(data: list[Any], seed: int, normalized: bool, rate: float, number: int) -> Arrays:
    """One training: test accuracies, and the percentiles (measurements, 3, WIDTH)."""
    x, y, x_test, y_test = data
    state = initial(seed, x.shape[1])
    batches = orders(seed, len(x), number)
    accuracies, percentiles = [], []
    for begin in range(0, number + 1, EVERY):
        if begin:
            state = steps(state, batches[begin - EVERY : begin], rate, x, y, normalized)
        accuracy, of_units = measured(state, x_test, y_test, normalized)
        accuracies.append(float(accuracy))
        percentiles.append(np.asarray(of_units))
    return {"accuracy": accuracies, "percentiles": np.array(percentiles)}


def drift(percentiles: np.ndarray) -> np.ndarray:
    """How far the median input of each unit moves over training, in units of its spread at the end (85th - 15th)."""
    medians, spread = percentiles[:, 1], percentiles[-1, 2] - percentiles[-1, 0]
    return np.ptp(medians, axis=0) / np.maximum(spread, 1e-12)


def typical(percentiles: np.ndarray) -> int:
    """The unit whose drift is the median of all units' drifts."""
    drifts = drift(percentiles)
    return int(np.argsort(drifts, kind="stable")[len(drifts) // 2])


def read(folder: str | None) -> list[Any]:
    """MNIST's images cut to 0 and 1, one row each, and its labels: training, then test."""
    if folder:
        labelled = read_idx_folder(Path(folder))
        parts = labelled.x, labelled.y, labelled.x_test, labelled.y_test
    else:
        from keras.datasets import mnist

        (x, y), (x_test, y_test) = mnist.load_data()
        parts = x, y, x_test, y_test
    return [jnp.asarray((p > 127).reshape(len(p), -1).astype("float32") if p.ndim > 1 else p.astype("int32")) for p in parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", metavar="DIR", help="folder of MNIST's four IDX files; else Keras downloads it")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many; runs that are in the results are not repeated")
    parser.add_argument("--fresh", action="store_true", help="forget the results that are there")
    parser.add_argument("--draw", action="store_true", help="draw picture and page from the results that are there")
    arguments = parser.parse_args()
    if arguments.fresh:
        RESULTS.unlink(missing_ok=True)
    if not arguments.draw:
        train_missing(arguments.mnist, range(arguments.seeds))
    from _figure1 import write

    write(json.loads(RESULTS.read_text()), ROOT / "docs")


def train_missing(folder: str | None, seeds: Iterable[int]) -> None:
    """Trains what the results do not hold yet; they are written after every run."""
    data = read(folder)
    found: list[Arrays] = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    known = {(each["seed"], each["rate"], each["normalized"]) for each in found}
    for seed, rate, normalized in product(seeds, RATES, (False, True)):
        if (seed, rate, normalized) in known:
            continue
        begin = time.perf_counter()
        one = run(data, seed, normalized, rate, STEPS)
        found.append(summary(one, seed, normalized, rate))
        written = {"environment": environment(), "batch": BATCH, "deviation": DEVIATION, "every": EVERY, "runs": found}
        write_text(RESULTS, json.dumps(written) + "\n")
        way, accuracy = "with" if normalized else "without", one["accuracy"][-1]
        print(f"seed {seed}, rate {rate:g}, {way}: {accuracy:.4f}, {time.perf_counter() - begin:.0f} s", flush=True)


def summary(one: Arrays, seed: int, normalized: bool, rate: float) -> Arrays:
    """What the results keep of a run: the percentiles of its typical unit, and quartiles of all units' drifts."""
    unit = typical(one["percentiles"])
    return {
        "normalized": normalized,
        "rate": rate,
        "seed": seed,
        "accuracy": [round(each, 4) for each in one["accuracy"]],
        "unit": unit,
        "percentiles": [[round(value, 3) for value in line] for line in one["percentiles"][:, :, unit].T.tolist()],
        "drift": [round(value, 3) for value in np.percentile(drift(one["percentiles"]), [25, 50, 75]).tolist()],
    }


if __name__ == "__main__":
    main()
