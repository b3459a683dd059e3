"""Statistics over the devices of JAX: on several devices of one process, on two processes, and what is refused."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from evennorm import ArgumentError
from evennorm.jax import batch_norm
from tests.grids import EXHAUSTIVE

ROOT = Path(__file__).parents[2]


def environment(devices: int, *flags: str) -> dict[str, str]:
    given = " ".join([os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={devices}", *flags])
    return {**os.environ, "XLA_FLAGS": given, "JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize(
    ("devices", "chosen"),
    [
        (2, "as_one or value"),
        (4, ""),
        (5, "as_one or masks and unchecked or groups"),
        pytest.param(5, "masks and not unchecked", marks=EXHAUSTIVE),
    ],
)
def test_on_several_devices(devices: int, chosen: str, pytestconfig: pytest.Config) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    command += ["-m", pytestconfig.getoption("markexpr"), "tests/contract/on_jax_devices.py"]
    once = environment(devices, "--xla_backend_optimization_level=0")  # XLA's optimizations take longer than they save
    run = subprocess.run(command, capture_output=True, text=True, env=once, timeout=900, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-1000:]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return int(taken.getsockname()[1])


@pytest.mark.parametrize("devices", [1, 2])
def test_two_processes(devices: int) -> None:
    """The program of docs/distributed.md, whose processes end with the same bits as one that has all devices."""

    def run(processes: int, of_each: int) -> list[list[str]]:
        address = f"localhost:{free_port()}"
        command = [sys.executable, str(ROOT / "examples" / "distributed" / "on_jax.py"), address, str(processes)]
        started = [
            subprocess.Popen(
                [*command, str(i)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(of_each)
            )
            for i in range(processes)
        ]
        try:
            ended = [process.communicate(timeout=200) for process in started]
        finally:
            for process in started:
                process.kill()
        assert [process.returncode for process in started] == [0] * processes, ended
        # Gloo's threads report each connection on stdout too, one into the middle of another's line.
        return [re.findall(r"^(?:loss|moving).*", out, re.MULTILINE) for out, _ in ended]

    alone, *others = run(1, 2 * devices) + run(2, devices)
    assert [line.split()[0] for line in alone] == ["loss", "moving", "moving"]
    assert others == [alone, alone]


X = jnp.ones((4, 2, 3))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"axis_name": "batch"}, "'batch' is not bound here"),
        ({"axis_name": ("d", "e")}, "'e' is not bound here"),
        ({"axis_name": {}}, "{} is not bound here"),
        ({"axis_index_groups": [[0]]}, "received [[0]] without an axis; give axis_name"),
        ({"axis_name": "d", "virtual_batch_size": 1}, "received axis_name='d' and virtual_batch_size=1; drop one"),
        *(
            ({"axis_name": "d", "axis_index_groups": groups}, f"received {groups!r}; name the devices 0 to 3 once each")
            for groups in ([], [[]], 3, [[0, 1], [2]], [[0, 1, 2], [3]], [[0, 1], [1, 2]], [[0, 1], [2, 4]], [[0.5, 1]])
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(text)) as caught:
        jax.vmap(lambda x: batch_norm(x, **options), axis_name="d")(X)
    assert "\n" not in str(caught.value)


def test_an_axis_of_one_device_is_no_exchange() -> None:
    """The types and the count are those of any number, so that a program needs no other words for it."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    specs = {"mesh": mesh, "in_specs": P("d"), "out_specs": (P("d"), P(), P())}

    def part(x: Any) -> Any:
        y, m = batch_norm(x, axis_name="d", mask=jnp.ones(x.shape[:-1], bool))
        return y, m.mean + m.mean_low, m.count

    mapped = jax.shard_map(part, **specs)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 3)), "float32")
    assert "all_gather" not in str(jax.make_jaxpr(mapped)(x))
    y, mean, count = mapped(x)
    np.testing.assert_allclose(y, batch_norm(x)[0], atol=1e-6)
    np.testing.assert_allclose(mean, x.mean((0, 1)), atol=1e-6)
    assert count.tolist() == [8]


@pytest.mark.parametrize("shape", [(1, 3), (1, 4, 3), (2, 3)])
def test_under_vmap_all_hold_the_same_moments(shape: tuple[int, ...]) -> None:
    """Of an axis of size 1 too, so that a caller may ask for them with out_axes=None."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), "float32")
    mapped = jax.vmap(lambda x: batch_norm(x, axis_name="d")[1], axis_name="d", out_axes=None)
    moments = mapped(x)
    np.testing.assert_allclose(moments.mean + moments.mean_low, x.reshape(-1, 3).mean(0), atol=1e-6)
    np.testing.assert_allclose(moments.variance, x.reshape(-1, 3).var(0), atol=1e-6)


def test_several_axes() -> None:
    """The parts of both, as one batch."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 5)), "float32")
    both = jax.vmap(jax.vmap(lambda x: batch_norm(x, axis_name=("e", "d")), axis_name="d"), axis_name="e")
    y, m = jax.jit(both)(x)
    expected, whole = batch_norm(x.reshape(-1, 5))
    np.testing.assert_allclose(y.reshape(-1, 5), expected, atol=1e-6)
    np.testing.assert_allclose(m.variance[1, 2], whole.variance, rtol=1e-6)
    groups = [[5, 0], [1, 4], [2, 3]]
    pair = jax.vmap(
        jax.vmap(lambda x: batch_norm(x, axis_name=("e", "d"), axis_index_groups=groups), axis_name="d"), axis_name="e"
    )
    parts = x.reshape(6, 4, 5)
    np.testing.assert_allclose(
        pair(x)[0].reshape(6, 4, 5)[jnp.array([0, 5])], batch_norm(parts[jnp.array([0, 5])])[0], atol=1e-6
    )
