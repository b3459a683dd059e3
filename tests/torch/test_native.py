"""The extension for torch gives the same bits as the way through Python, and hands back what it does not serve."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad

from evennorm.torch import BatchNorm1d, BatchNorm2d, BatchNorm3d, native
from tests.torch.native_calls import through_python, watched

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason="built without the extension for this torch")

MODULES = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"activation": "relu"},
    {"activation": "relu6"},
    {"activation": "leaky_relu", "negative_slope": 0.2},
    {"affine": False},
    {"bias": False},
    {"momentum": None},
    {"momentum": 1.0, "eps": 1e-3},
    {"track_running_stats": False},
    {"virtual_batch_size": 2},
]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    return watched(monkeypatch, "forward")


def steps(module: nn.Module, x: Tensor, residual: Tensor | None, dy: Tensor, **given: float) -> list[Tensor]:
    """Everything that two training steps and an evaluation of a copy of the module give."""
    module = copy.deepcopy(module)
    found = []
    for _ in range(2):
        leaves = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
        y = module(*leaves, **given)
        y.backward(dy)
        found += [y.detach(), *(leaf.grad for leaf in leaves)]
    found += [p.grad for p in module.parameters()]
    with torch.no_grad():
        found += [module(x, residual, **given), module.eval()(x, residual, **given)]
    return [*found, *module.buffers()]


def assert_same(given: list[Tensor], expected: list[Tensor]) -> None:
    assert len(given) == len(expected)
    for one, other in zip(given, expected, strict=True):
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
        assert torch.equal(one, other)


def in_layout(x: Tensor, layout: str) -> Tensor:
    if layout == "last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        return torch.stack((x, x), -1)[..., 0]
    return x


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_same_bits_as_through_python(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    sizes[0] = 2 * sizes[0] + 2
    dtype = data.draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16)))
    options = data.draw(st.sampled_from(OPTIONS))
    layouts = [data.draw(st.sampled_from(("first", "last", "sliced"))) for _ in range(3)]
    parameters = torch.float64 if dtype is torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    x, residual, dy = (in_layout(torch.randn(sizes, generator=generator).to(dtype), layout) for layout in layouts)
    module = MODULES[len(sizes)](sizes[1], dtype=parameters, **options)
    if module.weight is not None:
        with torch.no_grad():
            module.weight.copy_(4 * torch.randn(sizes[1], generator=generator))
    slopes = ({}, {"slope": 0.0}, {"slope": 0.3}, {"slope": 0.0, "limit": 6.0})
    given = data.draw(st.sampled_from(slopes)) if module.activation is None else {}
    inputs = module, x, data.draw(st.sampled_from((None, residual))), dy
    assert_same(steps(*inputs, **given), through_python(lambda: steps(*inputs, **given)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_serves_common_calls(served: list[bool], options: dict[str, Any], residual: bool) -> None:
    x = torch.randn(4, 3, 5, 7)
    steps(BatchNorm2d(3, **options), x, torch.randn_like(x) if residual else None, torch.randn_like(x))
    assert served == [True] * 4


def test_large_arrays_and_those_past_the_cache() -> None:
    for layout in ("first", "last"):
        x, dy = (in_layout(torch.randn(8, 64, 96, 96), layout) for _ in range(2))
        assert x.numel() * 4 > 16 << 20
        given = BatchNorm2d(64, activation="relu"), x, None, dy
        assert_same(steps(*given), through_python(lambda given=given: steps(*given)))


def wrong_calls() -> dict[str, Callable[[], Any]]:
    module = BatchNorm2d(3)

    def changed(**attributes: Any) -> BatchNorm2d:
        other = BatchNorm2d(3)
        for name, value in attributes.items():
            setattr(other, name, value)
        return other

    x = torch.ones(2, 3, 4, 4)
    return {
        "rank": lambda: module(torch.ones(2, 3, 4)),
        "channels": lambda: module(torch.ones(2, 4, 4, 4)),
        "one value": lambda: module(torch.ones(1, 3, 1, 1)),
        "whole numbers": lambda: module(torch.ones(2, 3, 4, 4, dtype=torch.int32)),
        "dtype": lambda: module(x.double()),
        "residual's shape": lambda: module(x, torch.ones(2, 3, 4, 5)),
        "residual's dtype": lambda: module(x, x.double()),
        "ghost batches": lambda: BatchNorm2d(3, virtual_batch_size=3)(x),
        "two activations": lambda: BatchNorm2d(3, activation="relu")(x, slope=0.0),
        "limit": lambda: module(x, slope=0.0, limit=5.0),
        "limit beside a slope": lambda: module(x, slope=0.3, limit=6.0),
        "limit without a slope": lambda: module(x, limit=6.0),
        "eps": lambda: changed(eps=0.0)(x),
        "negative eps": lambda: changed(eps=-1.0).eval()(x),
        "momentum": lambda: changed(momentum=2.0)(x),
        "activation": lambda: changed(activation="gelu")(x),
        "one statistic": lambda: changed(running_var=None).eval()(x),
    }


@pytest.mark.parametrize("name", wrong_calls())
def test_errors_are_those_of_python(name: str) -> None:
    call = wrong_calls()[name]
    messages = []
    for attempt in (call, call, lambda: through_python(call)):
        with pytest.raises((RuntimeError, ValueError, NotImplementedError)) as error:
            attempt()
        messages.append((type(error.value), str(error.value)))
    assert len(set(messages)) == 1


def test_settings_count_at_each_call() -> None:
    module, x = BatchNorm1d(3), torch.randn(8, 3)
    for name, value in (("eps", 0.5), ("momentum", 0.5), ("activation", "relu"), ("activation", None), ("training", False)):
        setattr(module, name, value)
        ours, other = copy.deepcopy(module), copy.deepcopy(module)
        with torch.no_grad():
            assert torch.equal(ours(x), through_python(lambda other=other: other(x)))
        assert torch.equal(ours.running_mean, other.running_mean)


def handed_back() -> dict[str, Callable[[], Any]]:
    x = torch.randn(4, 3)

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    def parametrized() -> Any:
        module = BatchNorm1d(3)
        nn.utils.parametrize.register_parametrization(module, "weight", Doubled())
        return module(x)

    def with_tangent() -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(BatchNorm1d(3)(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    def replaced(name: str, value: Any) -> Any:
        module = BatchNorm1d(3)
        setattr(module, name, value)
        return module(x)

    negative = torch.complex(x, x).conj().imag
    return {
        "a negated view": lambda: BatchNorm1d(3)(negative),
        "a negated residual": lambda: BatchNorm1d(3)(x, negative),
        "nothing": lambda: BatchNorm1d(3)(torch.empty(0, 3)),
        "a mask": lambda: BatchNorm1d(3)(x, mask=torch.tensor([True, True, True, False])),
        "elu": lambda: BatchNorm1d(3, activation="elu")(x),
        "in place": lambda: BatchNorm1d(3, memory="inplace")(x + 0),
        "a parametrization": parametrized,
        "a tangent": with_tangent,
        "vmap": lambda: torch.func.vmap(BatchNorm1d(3, track_running_stats=False))(x.expand(2, 4, 3)),
        "grad": lambda: torch.func.grad(lambda x: BatchNorm1d(3, track_running_stats=False)(x).square().sum())(x),
        "gaps in a weight": lambda: replaced("weight", nn.Parameter(torch.ones(3, 2)[:, 0])),
        "gaps in a statistic": lambda: replaced("running_mean", torch.zeros(3, 2)[:, 0]),
        "a subclass": lambda: BatchNorm1d(3)(x.as_subclass(type("Mine", (Tensor,), {}))).as_subclass(Tensor),
        "frozen, differentiated": lambda: BatchNorm1d(3).eval()(x),
        "an integer for eps": lambda: replaced("eps", 1),
    }


@pytest.mark.parametrize("name", handed_back())
def test_what_is_unusual_is_handed_back(name: str, served: list[bool]) -> None:
    torch.manual_seed(1)
    y = handed_back()[name]()
    assert not any(served)
    torch.manual_seed(1)
    assert torch.equal(y, through_python(handed_back()[name]))


def test_derivatives_of_second_order() -> None:
    module = BatchNorm1d(3, activation="leaky_relu", dtype=torch.float64, track_running_stats=False)
    x, residual = (torch.randn(6, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for inputs in ((x,), (x, residual)):
        assert torch.autograd.gradcheck(module, inputs)
        assert torch.autograd.gradgradcheck(module, inputs)


def test_vectorized_gradients() -> None:
    module, x = BatchNorm1d(3, activation="relu"), torch.randn(6, 3, requires_grad=True)
    y, dys = module(x), torch.randn(4, 6, 3)
    together = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)[0]
    for dy, dx in zip(dys, together, strict=True):
        torch.testing.assert_close(torch.autograd.grad(y, x, dy, retain_graph=True)[0], dx)


def test_gradients_of_any_layout() -> None:
    module, x = BatchNorm2d(3, activation="relu"), torch.randn(4, 3, 5, 5, requires_grad=True)
    y = module(x)
    dy = torch.randn(1, 3, 1, 1).expand(4, 3, 5, 5)
    negated = torch.complex(dy, -dy).conj().imag
    for each in (dy, dy.contiguous(), dy.contiguous(memory_format=torch.channels_last), negated):
        found = torch.autograd.grad(y, (x, module.weight), each, retain_graph=True)
        expected = through_python(lambda each=each: torch.autograd.grad(module(x), (x, module.weight), each))
        assert_same(list(found), expected)


def test_the_graph_behaves_as_others() -> None:
    module, x = BatchNorm1d(3), torch.randn(6, 3, requires_grad=True)
    doubled = 2 * x
    y = module(doubled)
    assert "EvennormBatchNorm" in y.grad_fn.name()
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    y = module(doubled)
    doubled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.inference_mode():
        assert module(torch.ones(2, 3)).is_inference()


def test_saved_tensors_pass_their_hooks() -> None:
    module, x, residual = BatchNorm1d(3, activation="relu"), torch.randn(6, 3, requires_grad=True), torch.randn(6, 3)
    packed, unpacked = [], []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.shape)
        return tensor.clone()

    def unpack(tensor: Tensor) -> Tensor:
        unpacked.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = module(x, residual)
    y.sum().backward()
    assert packed == unpacked
    *rows, mask = packed
    assert rows == [(6, 3), (3,), (3,), (3, 1, 3)]
    assert len(mask) == 1


def test_nothing_is_held_when_the_graph_is_gone() -> None:
    module, x = BatchNorm1d(3), torch.randn(6, 3)
    y = module(x)
    held = weakref.ref(y), weakref.ref(x)
    del x
    assert held[0]() is not None
    del y
    assert [h() for h in held] == [None, None]


def test_threads_get_what_one_gets() -> None:
    module, x = BatchNorm2d(8, activation="relu", track_running_stats=False), torch.randn(8, 8, 9, 9)

    def gradient(number: int) -> Tensor:
        leaf = (x * number).requires_grad_()
        return torch.autograd.grad(module(leaf).square().sum(), leaf)[0]

    expected = [gradient(n) for n in range(1, 5)]
    found: dict[int, bool] = {}

    def run(number: int) -> None:
        found[number] = all(torch.equal(gradient(number), expected[number - 1]) for _ in range(50))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(1, 5), True)


def test_many_shapes_are_forgotten_in_turn() -> None:
    module = BatchNorm1d(1).eval()
    with torch.no_grad():
        for n in range(1, 5000):
            module(torch.ones(n, 1))
        assert torch.equal(module(torch.ones(2, 1)), through_python(lambda: module(torch.ones(2, 1))))


def test_modules_are_copied_and_pickled_as_before() -> None:
    module = BatchNorm1d(3, activation="relu")
    module(torch.randn(4, 3))
    other = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    assert_same([*other.state_dict().values()], [*module.state_dict().values()])


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"affine": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, of any graph
def test_under_compiled_autograd(options: dict[str, Any], residual: bool, backend: str) -> None:
    module = BatchNorm1d(3, **options)
    for size in (6, 8):
        x, other = (torch.randn(size, 3, requires_grad=True) for _ in range(2))
        leaves = [x, other] if residual else [x]
        expected = torch.autograd.grad(module(*leaves).square().sum(), [*leaves, *module.parameters()])
        loss = module(*leaves).square().sum()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend)):
            loss.backward()
        torch.testing.assert_close([t.grad for t in (*leaves, *module.parameters())], [*expected])
        module.zero_grad()


def test_another_torch_takes_the_way_through_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "EXTENSION", "_torch_1_0_0")
    assert native._loaded() is None
