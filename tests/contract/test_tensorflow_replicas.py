"""Replicas of a tf.distribute strategy together give what one device gives for the whole batch, in float64."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from tests import loopback
from tests.contract.on_replicas import CHANNELS, SPLITS, Split


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for replicas in sorted({len(split.parts) for split in SPLITS}):
        path = tmp_path_factory.mktemp("replicas") / "results.npz"
        program = ["-m", "tests.contract.on_replicas", str(path), str(replicas)]
        (ended,) = loopback.run(lambda _, program=program: program, lambda _: {}, processes=1, timeout=600)
        assert ended.code == 0, ended.error[-3000:]
        found |= np.load(path)
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


def test_the_program_of_the_documentation() -> None:
    """Two processes with 13 and 12 of 25 samples, and one with all."""
    program, ports = ["examples/distributed/on_tensorflow.py"], loopback.free_ports(2)
    (alone,) = loopback.run(lambda _: program, lambda _: {}, processes=1)
    two = loopback.run(lambda _: program, lambda process: loopback.tf_config(ports, process))
    found = []
    for ended in (alone, *two):
        assert ended.code == 0, ended.error[-3000:]
        lines = re.findall(r"^(samples here|count|mean|variance) (.*)$", ended.out, re.MULTILINE)
        found.append({name: np.array(list(map(float, values.split()))) for name, values in lines})
    assert [each["samples here"][0] for each in found] == [25, 13, 12]
    for each in found[1:]:
        for name in ("count", "mean", "variance"):
            np.testing.assert_allclose(each[name], found[0][name], rtol=1e-6)
            np.testing.assert_array_equal(each[name], found[1][name])  # the same bits everywhere


APART = """
import json, os, sys, time
import tensorflow as tf
from evennorm.tensorflow import synchronized

process = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=8)
strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
shape, dtype = (4, 3), "float32"
if process == 1:
    if sys.argv[1] == "other channels":
        shape = (4, 5)
    if sys.argv[1] == "another dtype":
        dtype = "float64"
    if sys.argv[1] == "evaluates":
        time.sleep(16)
        os._exit(0)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), 9)
try:
    strategy.run(lambda x: synchronized.batch_norm(x)[0], (tf.ones(shape, dtype),))
    print("no error")
except tf.errors.OpError as error:
    print(error.message)
sys.stdout.flush()
os._exit(0)  # without waiting for the other at TensorFlow's own barrier
"""


@pytest.mark.parametrize(
    ("apart", "words"),
    [
        ("other channels", r"[Ss]hape mismatch in the collective"),
        ("another dtype", r"expected type .* but got type"),
        ("evaluates", r"timed out waiting for other workers"),
        ("killed", r"stopped sending heartbeats|timed out waiting|[Cc]onnection|unhealthy"),
    ],
)
def test_processes_that_are_not_alike_end_with_an_error(apart: str, words: str) -> None:
    """TensorFlow's own, on each process that takes part; within the time that the strategy was given."""
    ports = loopback.free_ports(2)
    ended = loopback.run(lambda _: ["-c", APART, apart], lambda process: loopback.tf_config(ports, process), timeout=120)
    waiting = ended if apart in ("other channels", "another dtype") else ended[:1]
    for each in waiting:
        assert each.code == 0, each.error[-3000:]
        assert re.search(words, each.out), each.out
