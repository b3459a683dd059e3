"""The formulas of folding, against sums that are written out."""

import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from evennorm.models.fold_plan import LinearLayer, Passage, plan
from evennorm.models.folding import Layout, Linear, ScaleShift, after, then
from evennorm.models.network import Network, Role, Step
from evennorm.models.state import BatchNormState

rng = np.random.default_rng(0)


def apply(linear: Linear, x: np.ndarray) -> np.ndarray:
    """A linear map of (inputs, taps), every sum written out."""
    groups, outputs, inputs, taps = linear.kernel.shape
    y = np.zeros(groups * outputs)
    for g, o, i, t in product(range(groups), range(outputs), range(inputs), range(taps)):
        y[g * outputs + o] += linear.kernel[g, o, i, t] * x[g * inputs + i, t]
    return y if linear.bias is None else y + linear.bias


def linear(groups: int, outputs: int, inputs: int, taps: int, bias: bool) -> Linear:
    return Linear(rng.normal(size=(groups, outputs, inputs, taps)), rng.normal(size=groups * outputs) if bias else None)


def affine(channels: int) -> ScaleShift:
    return ScaleShift(rng.normal(size=channels), rng.normal(size=channels))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 2, 4), (2, 3, 2, 1), (4, 2, 1, 9)])
def test_a_scale_and_shift_beside_a_linear_map(shape: tuple[int, ...], bias: bool) -> None:
    found = linear(*shape, bias=bias)
    x = rng.normal(size=(found.inputs, shape[3]))
    behind, front = affine(found.outputs), affine(found.inputs)
    np.testing.assert_allclose(apply(found.then(behind), x), behind.scale * apply(found, x) + behind.shift, atol=1e-12)
    shifted = front.scale[:, None] * x + front.shift[:, None]
    np.testing.assert_allclose(apply(found.after(front), x), apply(found, shifted), atol=1e-12)


def test_two_maps_one_after_the_other() -> None:
    """A separable convolution: only the second has a bias."""
    first, second = linear(3, 2, 1, 4, bias=False), linear(1, 5, 6, 1, bias=True)
    x = rng.normal(size=(3, 4))
    front, behind = affine(3), affine(5)
    both = after(then((first, second), behind), front)
    assert both[0].bias is None
    shifted = front.scale[:, None] * x + front.shift[:, None]
    expected = behind.scale * apply(second, apply(first, shifted)[:, None]) + behind.shift
    np.testing.assert_allclose(apply(both[1], apply(both[0], x)[:, None]), expected, atol=1e-12)


def test_layouts_there_and_back() -> None:
    kernel = rng.normal(size=(3, 3, 2, 12)).astype("float32")  # of 3 groups, two channels in and four out of each
    layout = Layout("tigo", {"t": 9, "i": 2, "g": 3, "o": 4})
    found = layout.canonical(kernel)
    assert found.dtype == np.float64
    assert found[2, 1, 0, 4] == kernel[1, 1, 0, 2 * 4 + 1]
    np.testing.assert_array_equal(layout.restored(found, kernel.shape), kernel)


def test_the_scale_and_shift_of_a_state_in_float64() -> None:
    state = BatchNormState("bn", 1e-3, 0.9, *(np.float32([value, 2 * value]) for value in (3.0, 0.5, 1e4, 0.01)))
    found = ScaleShift.of(state)
    variance = np.float64(state.variance) + 1e-3
    np.testing.assert_allclose(found.scale, np.float64(state.gamma) / np.sqrt(variance), rtol=1e-15)
    np.testing.assert_allclose(found.shift, [0.5 - 3e4 / variance[0] ** 0.5, 1 - 12e4 / variance[1] ** 0.5], rtol=1e-14)


def network(*steps: Step, outputs: tuple[str, ...] = ("end",)) -> Network:
    return Network("net", steps, outputs)


def step(name: str, role: Role, *inputs: str, layer: str = "", activation: str | None = None) -> Step:
    ones = np.ones(2)
    state = (
        BatchNormState(layer or name, 0.0, 0.9, ones, 2 * ones, ones, ones, axis=(1,)) if role is Role.BATCH_NORM else None
    )
    return Step(name, layer or name, role.value, role, inputs, shape=(None, 2), state=state, activation=activation)


def describe(found: Step) -> LinearLayer | Passage | str:
    if found.role is Role.LINEAR:
        return LinearLayer((Linear(np.ones((1, 2, 2, 1))),), 1, 1, "pads" if "padded" in found.name else "")
    return Passage() if found.role is Role.DROPOUT else f"{found.name} stands in between"


X = step("x", Role.INPUT)
END = step("end", Role.ACTIVATION, "y", activation="relu")
N, D, L = Role.BATCH_NORM, Role.DROPOUT, Role.LINEAR


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([step("a", L, "x"), step("y", N, "a")], "behind a"),
        ([step("a", L, "x"), step("d", D, "a"), step("y", N, "d")], "behind a"),
        ([step("n", N, "x"), step("d", D, "n"), step("y", L, "d")], "in front of y"),
        ([step("n", N, "x"), step("a", L, "n"), step("b", L, "n"), step("y", Role.ADD, "a", "b")], "in front of a, b"),
        ([step("n", N, "x"), step("a", L, "n"), step("y", Role.ADD, "a", "n")], "the input x is no.*; y stands in between"),
        ([step("n", N, "x"), step("y padded", L, "n"), step("y", D, "y padded")], "the input.*; y padded pads"),
        ([step("a", L, "x"), step("n", N, "a"), step("y", Role.ADD, "a", "n")], "y reads the values of a too; y stands"),
        (
            [step("a", L, "x"), step("a#2", L, "x", layer="a"), step("n", N, "a"), step("y", Role.ADD, "n", "a#2")],
            "a is called 2 times, and would change everywhere; y stands in between",
        ),
        ([step("a", L, "x", activation="relu"), step("y", N, "a")], "a applies relu in between; end stands"),
    ],
)
def test_where_one_normalization_goes(steps: list[Step], expected: str) -> None:
    def told(found: Step) -> LinearLayer | Passage | str:
        return "the input x is no linear layer" if found.role is Role.INPUT else describe(found)

    (found,) = plan(network(X, *steps, END), told, lambda step: "").folded
    if found.into:
        assert f"{found.side} {', '.join(found.into)}" == expected
    else:
        assert re.match(expected, found.why), found.why


def test_a_normalization_that_is_called_twice_goes_everywhere_or_nowhere() -> None:
    a, b = step("a", L, "x"), step("b", L, "x")
    calls = (step("n", N, "a"), step("n#2", N, "b", layer="n"))
    both = plan(network(X, a, b, *calls, step("y", Role.ADD, "n", "n#2"), END), describe, lambda step: "")
    assert both["n"].into == ("a", "b")
    calls = (step("n", N, "a"), step("n#2", N, "x", layer="n"))
    none = plan(network(X, a, *calls, step("y", Role.ADD, "n", "n#2"), END), describe, lambda step: "")
    assert (none["n"].into, none.maps) == ((), {})


def test_normalizations_behind_each_other() -> None:
    """Both become part of one layer; and what leaves the model by way of the first still leaves it."""
    steps = (X, step("a", L, "x"), step("n", N, "a"), step("y", N, "n"))
    found = plan(network(*steps, END), describe, lambda step: "")
    assert [each.into for each in found.folded] == [("a",), ("a",)]
    one = ScaleShift.of(steps[2].state)
    np.testing.assert_allclose(found.maps["a"][0].bias, one.scale * one.shift + one.shift)
    found = plan(network(*steps, END, outputs=("n", "end")), describe, lambda step: "")
    assert [each.into for each in found.folded] == [("a",), ()]
    assert found["y"].why.startswith("the values of a leave the model too")


def test_what_is_no_scale_and_shift() -> None:
    norm = step("y", N, "a")
    for change, why in (
        ({"mode": 2}, "it normalizes by the batch at inference too"),
        ({"mode": 1}, "it normalizes each sample on its own"),
        ({"variance": np.array([-1.0, 1.0])}, "its scale and shift are not finite"),
        ({"mean": np.array([np.nan, 1.0])}, "its scale and shift are not finite"),
        ({"mean": None}, "it has no running statistics"),
    ):
        changed = replace(norm, state=replace(norm.state, **change))
        (found,) = plan(network(X, step("a", L, "x"), changed, END), describe, lambda step: "").folded
        assert (found.outcome, found.why) == ("kept", why)
