"""Replicas of a tf.distribute strategy together give what one device gives for the whole batch, in float64."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import loopback
from tests.contract.on_replicas import CHANNELS, SPLITS, Split


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all programs have left what they computed and said."""
    found = tmp_path_factory.mktemp("replicas")
    program = ["-m", "tests.contract.on_forks", str(found)]
    (forked,) = loopback.run(lambda _: program, lambda _: {}, processes=1, timeout=900)
    assert forked.code == 0, forked.error[-3000:]
    return found


def ended(folder: Path, name: str, process: int = 0, code: int = 0) -> str:
    """What a process of a program has said."""
    said = (folder / name / f"{process}.out").read_text()
    assert int((folder / name / f"{process}.code").read_text()) == code, said[-3000:]
    return said


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for replicas in sorted({len(split.parts) for split in SPLITS}):
        ended(folder, f"{replicas} replicas")
        found |= np.load(folder / f"{replicas}.npz")
    return found


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.name)
def test_replicas_are_one_device(split: Split, results: dict[str, Any]) -> None:
    names = [key.removeprefix(f"{split.name}/one/") for key in results if key.startswith(f"{split.name}/one/")]
    assert {"y", "mean", "variance", "count", "d_x", "d_gamma", "d_beta"} <= set(names)
    tolerance = 1e-12 if split.dtype == "float64" else 1e-6
    for name in names:
        got, expected = (results[f"{split.name}/{where}/{name}"].astype("float64") for where in ("replicas", "one"))
        largest = np.nanmax(np.abs(expected))
        deviation = 1.0 if name != "mean" else np.sqrt(results[f"{split.name}/one/variance"] + 1e-3)
        np.testing.assert_allclose(
            got / deviation, expected / deviation, rtol=0, atol=tolerance * max(1, largest), err_msg=name
        )


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.name)
def test_one_exchange_in_each_direction(split: Split, results: dict[str, Any]) -> None:
    """Forward a row of each replica, backward two numbers per channel."""
    counts = 1
    assert results[f"{split.name}/replicas/sent"].tolist() == [len(split.parts) * (3 * CHANNELS + counts), 2 * CHANNELS]


def test_a_program_that_cannot_exchange_is_refused_in_one_line(results: dict[str, Any]) -> None:
    for name in ("xla", "xla around"):
        said = str(results[f"refused/{name}"])
        assert "\n" not in said
        assert "statistics of 2 devices are exchanged by collectives, which XLA has for GPUs and TPUs" in said
        assert "device:CPU:0; leave out jit_compile=True" in said
    assert str(results["refused/xla on one replica"]) == "computed"


def test_ghost_batches_have_statistics_of_their_own(results: dict[str, Any]) -> None:
    assert "received virtual_batch_size=2 with synchronized statistics; drop one" in str(results["refused/ghosts"])


def test_the_program_of_the_documentation(folder: Path) -> None:
    """Two processes with 13 and 12 of 25 samples, and one with all."""
    found = []
    for said in (ended(folder, "alone"), ended(folder, "example", 0), ended(folder, "example", 1)):
        lines = re.findall(r"^(samples here|count|mean|variance) (.*)$", said, re.MULTILINE)
        found.append({name: np.array(list(map(float, values.split()))) for name, values in lines})
    assert [each["samples here"][0] for each in found] == [25, 13, 12]
    for each in found[1:]:
        for name in ("count", "mean", "variance"):
            np.testing.assert_allclose(each[name], found[0][name], rtol=1e-6)
            np.testing.assert_array_equal(each[name], found[1][name])  # the same bits everywhere


@pytest.mark.parametrize(
    ("apart", "words"),
    [
        ("other channels", r"[Ss]hape mismatch in the collective"),
        ("another dtype", r"expected type .* but got type"),
        ("evaluates", r"timed out waiting for other workers"),
        ("killed", r"stopped sending heartbeats|timed out waiting|[Cc]onnection|unhealthy"),
    ],
)
def test_processes_that_are_not_alike_end_with_an_error(folder: Path, apart: str, words: str) -> None:
    """TensorFlow's own, on each process that takes part; within the time that the strategy was given."""
    assert re.search(words, ended(folder, apart))
    of_the_other = ended(folder, apart, 1, code=-9 if apart == "killed" else 0)
    if apart in ("other channels", "another dtype"):
        assert re.search(words, of_the_other), of_the_other
