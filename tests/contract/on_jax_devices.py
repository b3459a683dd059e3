"""Batch normalization over the devices of a named axis of JAX, held to float64 NumPy on the whole batch.

`test_jax_devices` runs this file in processes of their own, which see 2, 4 and 5 devices.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from evennorm import numpy as even
from evennorm.jax import batch_norm
from evennorm.kernels import choose
from tests.grids import mostly

DEVICES = jax.device_count()
WAYS = ("vmap", "pmap", "shard_map", "shard_map unchecked")
ROUNDING = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 2**-8}
CHANNELS = 3


def mesh(kind: AxisType = AxisType.Auto) -> Any:
    return jax.make_mesh((DEVICES,), ("d",), axis_types=(kind,))


def compiled(way: str, compute: Callable[..., Any]) -> Callable[..., Any]:
    """A program that stacks the results of `compute` for each device's part of arrays stacked by device."""
    match way:
        case "vmap":
            return jax.jit(jax.vmap(compute, axis_name="d"))
        case "pmap":
            return jax.pmap(compute, axis_name="d")
    return jax.jit(mapped(compute, checked=way == "shard_map"))


def mapped(compute: Callable[..., Any], *, checked: bool = True) -> Callable[..., Any]:
    def part(*stacked: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[None], compute(*jax.tree.map(lambda a: a[0], stacked)))

    return jax.shard_map(part, mesh=mesh(), in_specs=P("d"), out_specs=P("d"), check_vma=checked)


def arrays(dtype: str, mean: float = 0.0, samples: int = 4, channel_last: bool = True) -> dict[str, Any]:
    """x, residual and dy by device, gamma and beta the same for all of them."""
    rng = np.random.default_rng(DEVICES)
    sizes = (DEVICES, samples, 3, CHANNELS) if channel_last else (DEVICES, samples, CHANNELS, 3)
    wide = "float64" if dtype == "float64" else "float32"
    found = {name: jnp.asarray(rng.normal(m, 1, sizes), dtype) for name, m in (("x", mean), ("residual", 0), ("dy", 0))}
    rows = {name: jnp.asarray(rng.uniform(0.5, 1.5, CHANNELS), wide) for name in ("gamma", "beta")}
    return found | {name: jnp.broadcast_to(row, (DEVICES, CHANNELS)) for name, row in rows.items()}


def both(way: str, given: dict[str, Any], **options: Any) -> dict[str, np.ndarray]:
    """y, moments and all gradients, of the whole batch; what all devices hold is the same bits on each."""
    found = {name: np.asarray(a) for name, a in _program(way, tuple(given), tuple(options.items()))(given).items()}
    for name in ("mean", "low", "variance", "count"):
        np.testing.assert_array_equal(found[name], np.broadcast_to(found[name][:1], found[name].shape))
        found[name] = found[name][0]
    for name in ("d_gamma", "d_beta"):
        if name in found:
            found[name] = found[name].sum(0)
    found["mean"] = found["mean"].astype(np.float64) + found.pop("low")
    return found


@cache
def _program(way: str, given: tuple[str, ...], options: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """Compiled once for all arrays of a shape."""
    names = [name for name in given if name not in ("dy", "mask")]

    def one(parts: dict[str, Any]) -> dict[str, Any]:
        def forward(*inputs: Any) -> Any:
            arguments = dict(zip(names, inputs, strict=True)) | dict(options)
            y, m = batch_norm(**arguments, mask=parts.get("mask"), axis_name="d")
            return y, (m.mean, m.mean_low, m.variance, jnp.asarray(m.count))

        y, back, moments = jax.vjp(forward, *(parts[name] for name in names), has_aux=True)
        gradients = back(parts["dy"])
        return {"y": y, **dict(zip(("mean", "low", "variance", "count"), moments, strict=True))} | {
            f"d_{name}": g for name, g in zip(names, gradients, strict=True)
        }

    return compiled(way, one)


def whole(given: dict[str, Any], **options: Any) -> dict[str, np.ndarray]:
    """The same in float64, by NumPy, on all samples at once."""
    one = {name: np.asarray(a, bool if name == "mask" else np.float64) for name, a in given.items()}
    one = {name: a[0] if name in ("gamma", "beta") else a.reshape(-1, *a.shape[2:]) for name, a in one.items()}
    dy = one.pop("dy")
    y, m = even.batch_norm(**one, **options)
    mask, options = one.pop("mask", None), {**options, "mask": one.pop("mask", None)}
    g = even.batch_norm_gradient(dy, moments=m, **one, **(options | {"mask": mask}))
    found = {"y": y, "mean": m.mean + m.mean_low, "variance": m.variance, "count": np.asarray(m.count)}
    return found | {f"d_{name}": getattr(g, name) for name in one}


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], rounding: float) -> None:
    assert got.keys() == expected.keys()
    for name, b in expected.items():
        a = got[name].astype(np.float64).reshape(b.shape)
        np.testing.assert_allclose(a, b, rtol=0, atol=rounding * max(1.0, np.abs(b).max(initial=0.0)), err_msg=name)


SETTINGS = [
    (1e4, "float32", (), "relu", -1),
    (0.0, "float32", (), None, 1),
    (1e4, "float32", ("residual",), "leaky_relu", 1),
    (1e2, "float64", (), "relu", 1),
    (1e2, "bfloat16", ("residual", "gamma", "beta"), None, -1),
]


@pytest.mark.parametrize(
    *mostly(
        lambda *row: (SETTINGS.index(row[:-1]) + WAYS.index(row[-1])) % (2 if DEVICES == 4 else 3) == 0,
        "mean, dtype, left_out, activation, axis, way",
        [(*settings, way) for settings in SETTINGS for way in WAYS],
    )
)
def test_devices_are_as_one(
    mean: float, dtype: str, left_out: tuple[str, ...], activation: str | None, axis: int, way: str
) -> None:
    given = {n: a for n, a in arrays(dtype, mean, channel_last=axis == -1).items() if n not in left_out}
    options = {"axis": axis, "activation": activation}
    assert_same(both(way, given, **options), whole(given, **options), ROUNDING[dtype])


@pytest.mark.parametrize("way", WAYS)
def test_one_value_on_a_device(way: str) -> None:
    given = {name: a if a.ndim == 2 else a[:, :1, 0] for name, a in arrays("float32", 100.0).items()}
    assert_same(both(way, given), whole(given), 1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("of_channels", [False, True])
def test_masks(way: str, of_channels: bool) -> None:
    """One device's hides all; what is hidden may be NaN."""
    given = arrays("float32", 3.0)
    mask = np.random.default_rng(3).random(given["x"].shape if of_channels else given["x"].shape[:-1]) < 0.6
    mask[-1] = False
    hidden = ~np.broadcast_to(mask if of_channels else mask[..., None], given["x"].shape)
    given |= {"mask": jnp.asarray(mask), "dy": jnp.where(hidden, 0, given["dy"])}
    options = {"activation": "relu"}
    expected = whole(given, **options)
    assert_same(both(way, given, **options), expected, 1e-6)
    given["x"] = jnp.where(hidden & (np.random.default_rng(4).random(hidden.shape) < 0.5), np.nan, given["x"])
    got = both(way, given, **options)
    assert_same({n: a for n, a in got.items() if n != "y"}, {n: a for n, a in expected.items() if n != "y"}, 1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_value_alone_on_all_devices_gets_no_gradient(way: str) -> None:
    """Exactly none, since it is its own mean; what is hidden beside it still moves."""
    given = arrays("float32", 3.0)
    mask = np.zeros(given["x"].shape[:-1], bool)
    mask[-1, 2, 1] = True
    given["mask"] = jnp.asarray(mask)
    alone = given | {"dy": jnp.where(mask[..., None], given["dy"], 0)}
    got = both(way, alone, activation="leaky_relu")
    assert (got["d_x"] == 0).all()
    assert_same(got, whole(alone, activation="leaky_relu"), 1e-6)
    assert_same(both(way, given, activation="leaky_relu"), whole(given, activation="leaky_relu"), 1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_on_one_device_is_seen_on_all(way: str, bad: float) -> None:
    given = arrays("float32")
    given["x"] = given["x"].at[-1, 0, 0, 1].set(bad)
    finite = np.isfinite(both(way, given)["variance"])
    np.testing.assert_array_equal(finite, [True, False, True])


@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits_at_every_run(way: str) -> None:
    given = arrays("float32", 10.0)
    first, second = both(way, given), both(way, given)
    for name, a in first.items():
        np.testing.assert_array_equal(a, second[name], err_msg=name)


@pytest.mark.parametrize("way", WAYS)
def test_groups_keep_to_themselves(way: str) -> None:
    if DEVICES % 2:
        groups = [[device] for device in range(DEVICES)]
    else:
        groups = [list(range(0, DEVICES, 2)), list(range(1, DEVICES, 2))]
    given = arrays("float32")

    def one(parts: dict[str, Any]) -> Any:
        def forward(x: Any, gamma: Any) -> Any:
            y, m = batch_norm(x, gamma, activation="relu", axis_name="d", axis_index_groups=groups)
            return y, (m.mean + m.mean_low, m.variance, jnp.asarray(m.count))

        y, back, moments = jax.vjp(forward, parts["x"], parts["gamma"], has_aux=True)
        return y, moments, back(parts["dy"])

    y, (mean, variance, count), (dx, dgamma) = compiled(way, one)(given)
    for group in groups:
        expected = whole({n: given[n][jnp.asarray(group)] for n in ("x", "gamma", "dy")}, activation="relu")
        got = {"y": y, "d_x": dx, "mean": mean, "variance": variance, "count": count, "d_gamma": dgamma}
        got = {name: np.asarray(a)[group] for name, a in got.items()}
        got |= {name: got[name][-1] for name in ("mean", "variance", "count")} | {"d_gamma": got["d_gamma"].sum(0)}
        assert_same(got, expected, 1e-6)


def cubed(x: Any, gamma: Any, axis_name: str | None) -> Any:
    y, m = batch_norm(x, gamma, activation="leaky_relu", axis_name=axis_name)
    return jnp.sum(y**3) + jnp.sum(jnp.sin(m.variance) + jnp.cos(m.mean + m.mean_low)) / (DEVICES if axis_name else 1)


def every_order(x: Any, t: Any, gamma: Any, axis_name: str | None = None) -> Any:
    loss = partial(cubed, gamma=gamma, axis_name=axis_name)
    value, along = jax.jvp(loss, (x,), (t,))
    gradient = jax.grad(loss)
    _, forward_over_reverse = jax.jvp(gradient, (x,), (t,))
    reverse_over_reverse = jax.grad(lambda x: jnp.sum(gradient(x) * t))(x)
    return value, along, gradient(x), forward_over_reverse, reverse_over_reverse


on_one_device = jax.jit(every_order)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float64"])
def test_derivatives_in_every_order(way: str, dtype: str) -> None:
    """Forward, forward over reverse and reverse over reverse, through y and through the moments."""
    given = arrays(dtype)
    x, t, gamma = given["x"], given["residual"], given["gamma"]
    value, along, *got = compiled(way, partial(every_order, axis_name="d"))(x, t, gamma)
    one = on_one_device(*(a.reshape(-1, *a.shape[2:]) for a in (x, t)), gamma[0])
    np.testing.assert_allclose(value.sum(), one[0], rtol=1e-12)
    np.testing.assert_allclose(along.sum(), one[1], rtol=1e-12)
    for a, b in zip(got, one[2:], strict=True):
        np.testing.assert_allclose(a.reshape(b.shape), b, rtol=0, atol=1e-11 * abs(b).max())


COLLECTIVE = r"= (\S+|\(.*?\)) (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)\("


def collectives(compute: Callable[..., Any], *inputs: Any) -> list[tuple[str, int]]:
    """Those in the program that runs, and how many numbers each device gives to them."""
    text = jax.jit(compute).lower(*inputs).compile().as_text()
    found = []
    for shapes, name in re.findall(COLLECTIVE, text):
        numbers = sum(int(np.prod([int(n) for n in s.split(",") if n])) for s in re.findall(r"\[([0-9,]*)\]", shapes))
        found.append((name, numbers // (DEVICES if name == "all-gather" else 1)))
    return found


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_one_exchange_forward_and_one_backward(checked: bool, residual: bool) -> None:
    given = arrays("float32")
    names = ("x", "residual") if residual else ("x",)

    def y_of(*inputs: Any) -> Any:
        return batch_norm(**dict(zip(names, inputs, strict=True)), activation="relu", axis_name="d")[0]

    def gradient(*inputs: Any) -> Any:
        return jax.grad(lambda *inputs: jnp.sum(y_of(*inputs) ** 3), range(len(names)))(*inputs)

    inputs = [given[name] for name in names]
    gathered = ("all-gather", 3 * CHANNELS + 1)
    assert collectives(mapped(y_of, checked=checked), *inputs) == [gathered]
    assert collectives(mapped(gradient, checked=checked), *inputs) == [gathered, ("all-reduce", 2 * CHANNELS)]
    traced = str(jax.make_jaxpr(mapped(gradient, checked=checked))(*inputs))
    assert len(re.findall(r"= all_gather\w*\[", traced)) == 1
    assert len(re.findall(r"= psum\w*\[", traced)) == 1


def test_nothing_is_exchanged_where_x_does_not_move() -> None:
    """Gamma's gradient asks no other device."""
    given = arrays("float32")

    def gradient(x: Any, gamma: Any) -> Any:
        return jax.grad(lambda gamma: jnp.sum(batch_norm(x, gamma, axis_name="d")[0] ** 3))(gamma)

    assert collectives(mapped(gradient), given["x"], given["gamma"]) == [("all-gather", 3 * CHANNELS + 1)]


@pytest.mark.skipif(choose("jax", "float32") != "cpu", reason="the kernels are not built, or not wanted")
def test_kernels_take_the_sums() -> None:
    given = arrays("float32")
    gradient = mapped(lambda x: jax.grad(lambda x: jnp.sum(batch_norm(x, axis_name="d")[0] ** 3))(x))
    text = jax.jit(gradient).lower(given["x"]).as_text()
    assert text.count("@evennorm_forward") == text.count("@evennorm_backward") == 1


def test_moments_are_known_to_be_the_same_on_all_devices() -> None:
    """So that running statistics need no axis of devices, and parameters that devices share get the sum of gradients."""
    given = arrays("float32")
    x, dy = (given[name].reshape(-1, *given[name].shape[2:]) for name in ("x", "dy"))
    gamma = given["gamma"][0]

    def part(x: Any, gamma: Any) -> Any:
        y, m = batch_norm(x, gamma, axis_name="d")
        return y, m.mean + m.mean_low, m.variance

    run = jax.shard_map(part, mesh=mesh(), in_specs=(P("d"), P()), out_specs=(P("d"), P(), P()))
    (y, mean, variance), back = jax.vjp(jax.jit(run), x, gamma)
    dx, dgamma = back((dy, jnp.zeros_like(mean), jnp.zeros_like(variance)))
    expected = whole({name: given[name] for name in ("x", "gamma", "dy")})
    expected.pop("count")
    got = {"y": y, "mean": mean, "variance": variance, "d_x": dx, "d_gamma": dgamma}
    assert_same({name: np.asarray(a) for name, a in got.items()}, expected, 1e-6)


LYING = [
    (P("d"), -1, {}),
    (P("d"), 1, {"mask": True}),
    (P("d"), (1, 3), {"virtual_batch_size": 2}),
    (P(None, "d"), 1, {}),
    (P(None, None, "d"), -1, {}),
    (P(None, None, None, "d"), (1, 3), {}),
]


@pytest.mark.parametrize(
    *mostly(
        lambda spec, axis, options, kind: (
            LYING.index((spec, axis, options)) % 2 == ((kind == AxisType.Auto) == (DEVICES == 2))
        ),
        "spec, axis, options, kind",
        [(*lying, kind) for lying in LYING for kind in (AxisType.Auto, AxisType.Explicit)],
    )
)
def test_arrays_that_lie_on_a_mesh(spec: Any, axis: Any, options: dict[str, Any], kind: AxisType) -> None:
    """As one batch, and y lies as x does."""
    rng = np.random.default_rng(1)
    size = 2 * DEVICES
    x, residual, dy = (jnp.asarray(rng.normal(5, 1, (size,) * 4), "float32") for _ in range(3))
    gamma = jnp.asarray(rng.uniform(0.5, 1.5, [size] * (1 if isinstance(axis, int) else 2)), "float32")
    if "mask" in options:
        options = {"mask": jnp.asarray(rng.random((size, 1, 1, 1)) < 0.5)}

    def every(x: Any, residual: Any, gamma: Any, dy: Any) -> Any:
        def forward(x: Any, residual: Any, gamma: Any) -> Any:
            y, m = batch_norm(x, gamma, residual=residual, activation="relu", axis=axis, **options)
            return y, (m.mean + m.mean_low, m.variance, jnp.asarray(m.count))

        y, back, moments = jax.vjp(forward, x, residual, gamma, has_aux=True)
        return y, moments, back(dy)

    expected = jax.jit(every)(x, residual, gamma, dy)
    on_mesh = mesh(kind)
    with jax.set_mesh(on_mesh):
        lying = [jax.device_put(a, NamedSharding(on_mesh, spec)) for a in (x, residual, dy)]
        inputs = (*lying[:2], jax.device_put(gamma, NamedSharding(on_mesh, P())), lying[2])
        results = [jax.jit(every)(*inputs), every(*inputs)]
        results.append((batch_norm(lying[0], gamma, residual=lying[1], activation="relu", axis=axis, **options)[0],))
    for got in results:
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=False):
            np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * max(1, abs(b).max()))
        if kind == AxisType.Explicit:
            assert got[0].sharding.is_equivalent_to(lying[0].sharding, 4)


@pytest.mark.skipif(choose("jax", "float32") != "cpu", reason="the kernels are not built, or not wanted")
@pytest.mark.parametrize(
    ("spec", "axis", "activation", "exchanged"),
    [
        (P("d"), -1, "relu", [("all-gather", 3 * 8 + 1), ("all-reduce", 2 * 8)]),
        (P("d"), 1, None, [("all-gather", 3 * 8 + 1), ("all-reduce", 2 * 8)]),
        (P(None, "d"), 1, "leaky_relu", []),
        (P(None, None, None, "d"), -1, None, []),
        (P(), -1, "relu", []),
    ],
    ids=str,
)
def test_each_device_runs_the_kernels_on_its_part_of_an_array_that_lies(
    spec: Any, axis: int, activation: str | None, exchanged: list[tuple[str, int]]
) -> None:
    """As one batch, with one exchange forward and one backward, and none where channels are spread."""
    rng = np.random.default_rng(1)
    samples, channels = 2 * DEVICES, 8
    sizes = (samples, 3, 3, channels) if axis == -1 else (samples, channels, 3, 3)
    given = {name: rng.normal(mean, 1, sizes).astype("float32") for name, mean in (("x", 100), ("dy", 0))}
    given |= {name: rng.uniform(0.5, 1.5, channels).astype("float32") for name in ("gamma", "beta")}
    options: dict[str, Any] = {"axis": axis, "activation": activation}
    on_mesh = mesh()
    lying = {name: jax.device_put(a, NamedSharding(on_mesh, P() if a.ndim == 1 else spec)) for name, a in given.items()}

    def every(x: Any, gamma: Any, beta: Any, dy: Any) -> Any:
        def forward(*inputs: Any) -> Any:
            y, m = batch_norm(*inputs, **options)
            return y, (m.mean + m.mean_low, m.variance)

        y, back, moments = jax.vjp(forward, x, gamma, beta, has_aux=True)
        return y, *moments, *back(dy)

    inputs = [lying[name] for name in ("x", "gamma", "beta", "dy")]
    if DEVICES in (2, 4):
        assert collectives(every, *inputs) == exchanged
    text = jax.jit(every).lower(*inputs).compile().as_text()
    assert 'custom_call_target="evennorm_forward"' in text
    assert 'custom_call_target="evennorm_backward"' in text
    results = jax.jit(every)(*inputs)
    if spec != P():
        assert results[0].sharding.is_equivalent_to(inputs[0].sharding, 4)
    got = dict(zip(("y", "mean", "variance", "d_x", "d_gamma", "d_beta"), map(np.asarray, results), strict=True))
    wide = {name: a.astype(np.float64) for name, a in given.items()}
    dy = wide.pop("dy")
    y, m = even.batch_norm(**wide, **options)
    g = even.batch_norm_gradient(dy, moments=m, **wide, **options)
    expected = {
        "y": y,
        "mean": m.mean + m.mean_low,
        "variance": m.variance,
        "d_x": g.x,
        "d_gamma": g.gamma,
        "d_beta": g.beta,
    }
    assert_same(got, expected, 1e-6)
