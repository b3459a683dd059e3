"""Put the batch-normalization layers of several libraries side by side, each tried on the same arrays.

Writes docs/comparison.md. Without Haiku and Equinox the page stays as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _engines import ENGINES, on_each_engine
from _environment import ROOT, environment, sentence
from _layers import CHANNELS, EPSILON, Layer, arguments, layers

PAGE = ROOT / "docs" / "comparison.md"
ROWS = 8192
MEAN = 1e5
OTHERS = {"haiku": "dm-haiku", "equinox": "equinox"}


def batch(rows: int = 64, mean: float = 0.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, CHANNELS)) + mean).astype(np.float32)


def error(make: Callable[[], Layer]) -> float:
    """The largest error of the output in training against float64."""
    x = batch(ROWS, MEAN)
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + EPSILON)
    return float(np.abs(make().train(x) - exact).max())


def after(make: Callable[[], Layer], broken: np.ndarray) -> str:
    """What becomes of the moving statistics when a broken batch comes between two good ones."""
    layer, without = make(), make()
    for each in (layer, without):
        each.train(batch(seed=1))
    try:
        layer.train(broken)
    except Exception as refused:
        return f"refused: {type(refused).__name__}"
    for each in (layer, without):
        each.train(batch(seed=2))
    found, expected = np.stack(layer.statistics()), np.stack(without.statistics())
    if not np.isfinite(found).all():
        return "NaN for good"
    return "skipped" if np.array_equal(found, expected) else "follow it"


def nan_batch(make: Callable[[], Layer]) -> str:
    broken = batch(seed=3)
    broken[0] = np.nan
    return after(make, broken)


def empty_batch(make: Callable[[], Layer]) -> str:
    return after(make, batch(0))


def one_value(make: Callable[[], Layer]) -> str:
    """A batch of one row: its variance is 0, whatever the data."""
    return after(make, batch(1, seed=3))


def masked(make: Callable[[], Layer]) -> str:
    """Whether steps that a mask excludes stay out of the statistics."""
    x, mask = batch(64).reshape(8, 8, CHANNELS), np.zeros((8, 8), bool)
    mask[:, :4] = True
    layer, reference = make(), make()
    try:
        layer.train(np.where(mask[..., None], x, np.float32(1e3)), mask=mask)
    except TypeError:
        return "no"
    reference.train(x[:, :4])
    close = all(np.allclose(*pair, atol=1e-4) for pair in zip(layer.statistics(), reference.statistics(), strict=True))
    return "yes" if close else "wrong"


def complex_numbers(make: Callable[[], Layer]) -> str:
    x = (batch(seed=1) + 1j * batch(seed=2)).astype(np.complex64)
    try:
        y = make().of_complex().train(x)
    except Exception:
        return "no"
    variance = float(np.mean(np.abs(y - y.mean(0)) ** 2))
    return "yes" if np.iscomplexobj(y) and abs(variance - 1) < 0.01 else "no"


def has(layer: Layer, *names: str) -> str:
    return "yes" if arguments(layer) & set(names) else "no"


def measure(make: Callable[[], Layer]) -> dict[str, Any]:
    layer = make()
    alone, dense = layer.kept(batch(4096))
    return {
        "name": layer.name,
        "error": error(make),
        "nan": nan_batch(make),
        "empty": empty_batch(make),
        "one": one_value(make),
        "mask": masked(make),
        "complex": complex_numbers(make),
        "activation": has(layer, "activation"),
        "residual": "yes" if layer.takes_residual() else "no",
        "ghost": has(layer, "virtual_batch_size"),
        "renorm": has(layer, "renorm"),
        "alone": alone,
        "dense": dense,
    }


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    lines = ["| layer | " + " | ".join(columns.values()) + " |", "| --- |" + " --- |" * len(columns)]
    lines += [f"| {row['name']} | " + " | ".join(cell(row[key]) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return "-"
    return "NaN" if np.isnan(value) else f"{value:.1e}" if value < 0.1 else f"{value:.1f}"


def page(rows: list[dict[str, Any]], where: dict) -> str:
    """docs/comparison.md."""
    parts = [HEAD]
    for words, columns in SECTIONS:
        parts += [words, table(rows, columns)]
    return "\n\n".join(part.strip("\n") for part in [*parts, BY_HAND, sentence(where)]) + "\n"


HEAD = """
# Beside the layers of other libraries

The same arrays through each layer on the CPU: evennorm's for each library, Keras 3's on three backends (tf.keras is Keras on
TensorFlow), torch's, Flax's, Haiku's and Equinox's (`mode="batch"`). The tables hold outcomes of trials by `python
benchmarks/comparison.py`; momentum is 0.9 of the old average, epsilon 1e-3, all else as it comes.
"""

SECTIONS = (
    (
        f"""
## Numbers and broken batches

**Error** is the largest one of the output in training against float64, for {ROWS:,} float32 rows of mean 100,000 and
standard deviation 1; NaN means that outputs were NaN. [Accuracy](accuracy.md) has more means, gradients and inference.
**A row of NaN**, **an empty batch** and **one row** say what the moving statistics do when such a batch comes between two
good ones: skip it, follow it, or stay NaN.
""",
        {"error": "error", "nan": "a row of NaN", "empty": "an empty batch", "one": "one row"},
    ),
    (
        """
## What a layer takes

**Mask**: steps of a sequence that a mask excludes stay out of the statistics. **Activation** and **residual** are computed
in the same pass. **Ghost batches** are parts of a batch that are normalized by themselves. **Complex** numbers come out with
variance 1; Equinox's layer is made with `dtype=jnp.complex64` for them.
""",
        {
            "mask": "mask",
            "activation": "activation",
            "residual": "residual",
            "ghost": "ghost batches",
            "renorm": "renorm",
            "complex": "complex",
        },
    ),
    (
        """
## What is kept for the backward pass

Bytes that a layer with ReLU keeps, in arrays of the input's size, in float32: torch's saved tensors, and what the linear
function of `jax.vjp` holds, without jit, under which XLA may do with less. TensorFlow does not tell. A **dense layer**
behind the ReLU keeps its own input too. torch's ReLU has kept that already, so in such a network evennorm keeps as much as
torch.nn does, unless outputs are [recomputed](memory.md). Equinox's layers are called on single samples under `jax.vmap`,
where evennorm's keeps the most.
""",
        {"alone": "alone", "dense": "with a dense layer behind"},
    ),
)

BY_HAND = """
## Statistics of several devices, on the CPU

From the documentation and sources of the versions below. [Many devices](distributed.md) has the details for evennorm.

| library | |
| --- | --- |
| evennorm | torch: `SyncBatchNorm`; JAX, Flax, Equinox: `axis_name`; Haiku: `cross_replica_axis`; Keras: `synchronized` |
| Keras | `synchronized=True`, on TensorFlow alone |
| torch | `SyncBatchNorm`, on GPUs alone |
| Flax, Haiku, Equinox | `axis_name`; `cross_replica_axis`; `axis_name`, always required |

## Files

| library | writes and reads |
| --- | --- |
| evennorm.keras | Keras's `.keras` and `.weights.h5`; files of Keras 1 and 2 ([migrate](migrate.md)) |
| evennorm.torch | torch's state_dicts, in both directions; `torch.export` |
| evennorm.flax | Flax's checkpoints, in both directions |
| evennorm.haiku, evennorm.equinox | the pytrees of Haiku's and Equinox's layers, in both directions |
| Keras | `.keras`, `.weights.h5`; exports to SavedModel, ONNX, OpenVINO, LiteRT and torch |
| torch | state_dicts, `torch.export`, ONNX |
| Flax, Haiku, Equinox | pytrees: by Orbax, by msgpack, or Equinox's own format |

evennorm moves a layer between Keras, torch and Flax with its epsilon and momentum ([states](state.md)).

## What others have and evennorm lacks

- **GPU kernels in wide use.** torch's layers call cuDNN; Keras's, Flax's, Haiku's and Equinox's are compiled by XLA.
  evennorm's GPU kernels serve torch alone and have no published figures yet ([GPUs](gpu.md)).
- **TPUs and Windows.** XLA serves TPUs, and torch, Keras and JAX have wheels for Windows. evennorm has been tried on Linux,
  and its release workflow builds for Linux and macOS.
- **Averages without the bias of their start.** Haiku's and Equinox's layers correct the moving averages for their initial
  values, and so do evennorm.haiku and evennorm.equinox. evennorm's other layers have the plain average of all batches
  (`momentum=None`), as torch has.
- **Complex numbers**, where the table says so.
- **Users.** The others have run in production for years; this is evennorm's first release candidate.

## Speed

Other pages measure it, beside the framework's own layer: [networks](networks.md), [kernels](kernels.md),
[a training step](performance.md), [many devices](scaling.md) and [limits](limits.md). Haiku and Equinox have not been timed.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--engine", choices=ENGINES, help="measure those on KERAS_BACKEND, which is this one, and print JSON"
    )
    engine = parser.parse_args().engine
    if engine:
        print(json.dumps([measure(make) for make in layers(engine)]))
        return
    missing = [package for package in OTHERS if find_spec(package) is None]
    if missing:
        print(f"comparison: {', '.join(missing)} not installed, so that docs/comparison.md stays as it is")
        return
    found = on_each_engine(__file__)
    rows = sorted((row for each in found.values() for row in each), key=lambda row: not row["name"].startswith("evennorm"))
    where = environment()
    where["versions"] = {**where["versions"], "flax": version("flax"), **{name: version(name) for name in OTHERS.values()}}
    PAGE.write_text(page(rows, where), encoding="utf-8")


if __name__ == "__main__":
    main()
