"""The speed measurement compares what it says, in turns; its page claims no more than the figures do; no time is judged."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import keras
import numpy as np
import pytest

from evennorm.keras import BatchNormalization

SCRIPT = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "layer_step.py"))


NONE = "On jax no difference shows: a step takes"


def result(none: list[float], theirs: list[float], ours: list[float]) -> dict:
    found = {"shape": [64, 48, 48, 1], "dtype": "float32", "compiled": True, "processes": 1}
    found["milliseconds"] = {"none": none, "keras": theirs, "ours": ours}
    return {"engines": {"jax": found}, "device": "a device", "versions": {"keras": "3"}, "commit": "abc"}


def test_three_networks_that_differ_in_their_normalization_only() -> None:
    models = SCRIPT["networks"](12)
    kinds = {"none": (), "keras": (keras.layers.BatchNormalization,) * 3, "ours": (BatchNormalization,) * 3}
    convolutions = []
    for name, model in models.items():
        normalizations = (keras.layers.BatchNormalization, BatchNormalization)
        assert tuple(type(layer) for layer in model.layers if isinstance(layer, normalizations)) == kinds[name]
        convolutions.append([w for layer in model.layers for w in layer.get_weights() if w.ndim > 1])
    for others in convolutions[1:]:
        for one, other in zip(convolutions[0], others, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_figure_for_every_step() -> None:
    found = SCRIPT["measure"](quick=True)
    assert found["shape"] == [4, 12, 12, 1]
    assert {name: len(times) for name, times in found["milliseconds"].items()} == {"none": 2, "keras": 2, "ours": 2}
    assert all(time > 0 for times in found["milliseconds"].values() for time in times)


def test_steps_take_turns() -> None:
    taken: list[str] = []
    steps = {name: lambda name=name: taken.append(name) for name in "abc"}
    times = SCRIPT["times_in_turns"](steps, warm_up=2, rounds=4)
    assert "".join(taken) == "aabbcc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(found) for name, found in times.items()} == {"a": 4, "b": 4, "c": 4}


@pytest.mark.parametrize(
    ("ours", "sentence"),
    [
        ([30.0] * 6, "On jax evennorm is slower: a step takes 1.50 (1.50 to 1.50) times as long as with Keras's layer."),
        ([10.0] * 6, "On jax evennorm is faster: a step takes 0.50 (0.50 to 0.50) times as long as with Keras's layer."),
        (
            [30.0] * 5 + [10.0],
            f"{NONE} 1.50 (0.50 to 1.50) times as long with evennorm as with Keras's layer.",
        ),
        (
            [20.0] * 6,
            f"{NONE} 1.00 (1.00 to 1.00) times as long with evennorm as with Keras's layer.",
        ),
    ],
    ids=["slower", "faster", "one round of six disagrees", "the same"],
)
def test_the_verdict(ours: list[float], sentence: str) -> None:
    """Six rounds of six agree by chance in 2 of 64 cases, five or more in 14 of 64."""
    assert SCRIPT["verdict"]("jax", {"keras": [20.0] * 6, "ours": ours}) == sentence


def test_the_page() -> None:
    text = SCRIPT["page"](result([10.0, 20.0, 10.0], [20.0, 40.0, 20.0], [15.0, 40.0, 10.0]))
    assert (
        "| jax (compiled) | 10.0 (10.0 to 15.0) | 20.0 (20.0 to 30.0) | 15.0 (12.5 to 27.5) | 0.75 (0.62 to 0.88) |" in text
    )
    assert "| jax | 100 % (100 % to 100 %) | 50 % (25 % to 75 %) |" in text
    assert (
        "inputs (64, 48, 48, 1), float32, Adam. Figures are medians of\n"
        "3 steps in milliseconds with their quartiles, from 1\nprocesses" in text
    )
    assert "Measured on a device, with keras 3." in text


def test_processes_are_joined() -> None:
    def run(load: float, *times: float) -> dict:
        found = {name: list(times) for name in SCRIPT["NETWORKS"]}
        return {"compiled": False, "load average before": load, "milliseconds": found}

    both = SCRIPT["joined"]([run(0.1, 1.0, 2.0), run(0.2, 3.0)])
    assert both["milliseconds"] == {name: [1.0, 2.0, 3.0] for name in ("none", "keras", "ours")}
    assert (both["processes"], both["load average before"], both["compiled"]) == (2, [0.1, 0.2], False)


def test_the_page_says_what_the_result_does() -> None:
    assert SCRIPT["PAGE"].read_text() == SCRIPT["page"](json.loads(SCRIPT["RESULT"].read_text()))
