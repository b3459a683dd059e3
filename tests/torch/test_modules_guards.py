"""Harmful batches leave the running statistics alone and are counted; what is wrong is told in torch's types of error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import evennorm.torch as ours
from evennorm.errors import EvennormError
from tests.torch.reference import array


def poisoned(value: float) -> torch.Tensor:
    x = torch.randn(6, 4, 3, 2)
    x[2, 1, 0, 0] = value
    return x


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_that_is_not_finite(momentum: float | None, compiled: bool) -> None:
    """The overflow that mixed precision expects now and then: the optimizer skips the step, and so do the statistics."""
    torch.compiler.reset()
    batches = [torch.randn(6, 4, 3, 2) + k for k in range(3)]
    module, witness = ours.BatchNorm2d(4, momentum=momentum), nn.BatchNorm2d(4, momentum=momentum)
    run = torch.compile(module, fullgraph=True) if compiled else module
    for k, x in enumerate(batches):
        run(x), witness(x)
        before = {key: value.clone() for key, value in module.state_dict().items() if key.startswith("running")}
        assert not torch.isfinite(run(poisoned([torch.nan, torch.inf, -torch.inf][k]))).all()
        for key, value in before.items():
            assert torch.equal(module.state_dict()[key], value)
    assert int(module.skipped_batches) == 3
    # As torch counts, but where the count is the weight of the plain average.
    assert int(module.num_batches_tracked) == (3 if momentum is None else 6)
    torch.testing.assert_close(module.running_mean, witness.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module.running_var, witness.running_var, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_batches_that_hold_nothing(compiled: bool) -> None:
    torch.compiler.reset()
    module = ours.BatchNorm2d(4)
    run = torch.compile(module, fullgraph=True, dynamic=False) if compiled else module
    run(torch.randn(0, 4, 3, 2))
    run(torch.randn(6, 4, 3, 2), mask=torch.zeros(6, 3, 2, dtype=torch.bool))
    assert int(module.skipped_batches) == 2
    assert not module.running_mean.any()
    assert (module.running_var == 1).all()


def test_a_channel_without_two_values_keeps_its_variance() -> None:
    module = ours.BatchNorm1d(2)
    mask = torch.zeros(5, 2, dtype=torch.bool)
    mask[:, 0] = True
    mask[0, 1] = True
    x = torch.randn(5, 2)
    module(x, mask=mask)
    np.testing.assert_allclose(array(module.running_var)[0], 0.9 + 0.1 * array(x)[:, 0].var(ddof=1), rtol=1e-6)
    np.testing.assert_allclose(array(module.running_mean)[1], 0.1 * array(x)[0, 1], rtol=1e-6)
    assert module.running_var[1] == 1
    assert int(module.skipped_batches) == 0


def test_scaled_gradients_that_overflow() -> None:
    """Under GradScaler, as `torch.amp` has it: a step is skipped, and the next goes on from healthy statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), ours.BatchNorm1d(4, activation="relu"), nn.Linear(4, 1))
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    for k in range(4):
        x = torch.randn(8, 5)
        if k == 1:
            x[0, 0] = torch.inf
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert int(model[1].skipped_batches) == 1
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert scaler.get_scale() == 2.0


R = torch.randn
REFUSED = {
    "rank": (lambda m: m.BatchNorm2d(3)(R(2, 3)), r"expected 4D input \(got 2D input\), .* received shape \(2, 3\)"),
    "rank of 1d": (lambda m: m.BatchNorm1d(3)(R(3)), r"expected 2D or 3D input \(got 1D input\)"),
    "channels": (
        lambda m: m.BatchNorm1d(3)(R(4, 5)),
        r"made for 3 channels, .* received 5 channels in an input of shape \(4, 5\); give num_features=5",
    ),
    "channels, no statistics": (lambda m: m.BatchNorm1d(3, track_running_stats=False)(R(4, 5)), "made for 3 channels"),
    "channels, at inference": (lambda m: m.BatchNorm1d(3).eval()(R(4, 5)), "made for 3 channels"),
    "one value": (lambda m: m.BatchNorm1d(3)(R(1, 3)), r"Expected more than 1 value .* received shape \(1, 3\); use larger"),
    "one value, at inference": (lambda m: m.BatchNorm1d(3, track_running_stats=False).eval()(R(1, 3)), "more than 1 value"),
    "integers": (lambda m: m.BatchNorm1d(3)(torch.ones(4, 3).long()), r"received torch.int64; call input.float\(\) first"),
    "booleans": (lambda m: m.BatchNorm1d(3).eval()(torch.ones(4, 3).bool()), "received torch.bool"),
    "complex": (lambda m: m.BatchNorm1d(3)(torch.ones(4, 3) * 1j), "is of real numbers.*input is of dtype torch.complex64"),
    "dtypes": (
        lambda m: m.BatchNorm1d(3)(R(4, 3).double()),
        "received an input of torch.float64 and parameters of torch.float32; convert one",
    ),
    "half parameters": (lambda m: m.BatchNorm1d(3).half()(R(4, 3)), "parameters of torch.float16"),
    "two halves": (lambda m: m.BatchNorm1d(3).half()(R(4, 3).bfloat16()), "input of torch.bfloat16 .* torch.float16"),
    "eps 0": (lambda m: m.BatchNorm1d(3, eps=0.0)(R(4, 3)), "eps must be positive during training.* received eps=0.0"),
    "eps below 0": (lambda m: m.BatchNorm1d(3, eps=-1.0).eval()(R(4, 3)), "eps must be non-negative.* received eps=-1.0"),
    "device": (lambda m: m.BatchNorm1d(3, device="meta")(R(4, 3)), "device"),
    "device of the statistics": (
        lambda m: m.BatchNorm1d(3, device="meta", affine=False)(R(4, 3)),
        "are on the device of the input: cpu; received a module on meta; move one of them|Tensor on device meta",
    ),
    "one statistic": (lambda m: _with(m.BatchNorm1d(3), running_var=None)(R(4, 3)), "both be None or neither be None"),
    "one statistic, at inference": (lambda m: _with(m.BatchNorm1d(3), running_mean=None).eval()(R(4, 3)), "running_mean"),
    "several samples mapped": (lambda m: torch.vmap(m.BatchNorm1d(3))(R(2, 4, 3)), "batched tensor|vmap"),
    "a list": (lambda m: m.BatchNorm1d(3)([[1.0, 2.0, 3.0]]), "'list' object has no attribute"),
    "weight": (lambda m: _shaped(m.BatchNorm1d(3), "weight", 4)(R(4, 3)), r"weight|shape \(3,\); received shape \(4,\)"),
    "bias": (lambda m: _shaped(m.BatchNorm1d(3), "bias", 2)(R(4, 3)), "bias"),
    "variances": (lambda m: _shaped(m.BatchNorm1d(3), "running_var", 5)(R(4, 3)), "running_var"),
    "variances, at inference": (lambda m: _shaped(m.BatchNorm1d(3), "running_var", 5).eval()(R(4, 3)), "running_var"),
    "weight, at inference": (lambda m: _shaped(m.BatchNorm1d(3), "weight", 4).eval()(R(4, 3)), "weight"),
    "an array": (lambda m: m.BatchNorm1d(3)(np.ones((4, 3), "float32")), "numpy.ndarray' object has no attribute|ndarray"),
    "no size": (lambda m: m.BatchNorm1d(-3), "negative dimension"),
}


def _with(module: nn.Module, **attributes) -> nn.Module:
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


def _shaped(module: nn.Module, name: str, size: int) -> nn.Module:
    """With a tensor of another size, which torch's modules do not look at before they compute."""
    kind = nn.Parameter if name in module._parameters else torch.Tensor
    return _with(module, **{name: kind(torch.ones(size))})


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["weight", "bias", "running_var"])
def test_sizes_that_do_not_fit(name: str, compiled: bool) -> None:
    torch.compiler.reset()
    module = _shaped(ours.BatchNorm1d(3), name, 4)
    run = torch.compile(module, backend="eager") if compiled else module
    with pytest.raises(RuntimeError, match=rf"{name} ha.* one value per channel.*; received shapes? .*\(4,\)"):
        run(R(4, 3))


def test_arrays_beside_a_tensor() -> None:
    module, x = ours.BatchNorm1d(3), R(4, 3)
    for given in ({"residual": np.ones((4, 3), "float32")}, {"mask": np.ones(4, bool)}):
        (name,) = given
        with pytest.raises(
            TypeError, match=rf"{name} is a torch.Tensor, .*numpy.ndarray.*; give torch.from_numpy\({name}\)"
        ):
            module(x, **given)
    assert int(module.num_batches_tracked) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epsilon": 1e-3}, "no argument 'epsilon': it is called eps here; received epsilon=0.001"),
        ({"axis": -1}, "no argument 'axis': channels are axis 1 .*; received axis=-1"),
        ({"axis": "channels"}, "channels are axis 1 .*; received axis='channels'"),
        ({"nonsense": 1}, "no argument 'nonsense'"),
    ],
)
def test_arguments_of_other_frameworks(options, words: str) -> None:
    for make in (lambda **o: ours.BatchNorm1d(3, **o), ours.LazyBatchNorm2d):
        with pytest.raises(TypeError, match=words):
            make(**options)


@pytest.mark.parametrize("eps", [-1, -1e-9, float("nan")])
def test_eps_is_looked_at_when_the_module_is_made(eps: float) -> None:
    for make in (lambda **o: ours.BatchNorm2d(3, **o), ours.LazyBatchNorm2d):
        with pytest.raises(ValueError, match=f"eps must be non-negative: .*; received eps={eps}"):
            make(eps=eps)


@pytest.mark.parametrize("name", REFUSED)
def test_errors_have_torchs_types_and_our_words(name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - whatever torch raises
        call(nn)
    with pytest.raises(type(theirs.value), match=words):
        call(ours)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum": 1.5}, r"from 0 to 1, or None .* received momentum=1.5"),
        ({"momentum": -0.1}, "received momentum=-0.1"),
        ({"activation": "gelu"}, "one of None, 'relu', 'relu6', 'leaky_relu', 'elu'; received 'gelu'"),
        ({"virtual_batch_size": 0}, "1 or more; received virtual_batch_size=0"),
        ({"virtual_batch_size": 2.5}, "received virtual_batch_size=2.5"),
        ({"memory": "none"}, "one of 'save', 'inplace'; received memory='none'"),
        (
            {"memory": "inplace", "activation": "relu"},
            "relu has lost what was below zero; choose activation among None",
        ),
        (
            {"memory": "inplace", "activation": "relu6"},
            "relu6 has lost what was below zero or above 6; choose activation among None",
        ),
        ({"memory": "inplace", "activation": "leaky_relu", "negative_slope": 0.0}, "above 0; received negative_slope=0.0"),
        ({"memory": "inplace", "activation": "elu", "alpha": -1.0}, "received alpha=-1.0"),
    ],
)
def test_arguments(options, words: str) -> None:
    for make in (lambda **o: ours.BatchNorm2d(3, **o), ours.LazyBatchNorm2d):
        with pytest.raises(ValueError, match=words):
            make(**options)


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"momentum": -1.0}, r"received momentum=-1.0"),
        ({"activation": "gelu"}, "received 'gelu'"),
        ({"activation": "relu", "memory": "inplace"}, "relu has lost"),
    ],
)
def test_attributes_set_later(attributes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _with(ours.BatchNorm1d(3), **attributes)(R(4, 3))


@pytest.mark.parametrize(
    ("residual", "words"),
    [
        (R(4, 2), r"shape \(4, 3\); received shape \(4, 2\)"),
        (R(4, 1), r"received shape \(4, 1\)"),
        (R(4, 3).double(), "dtype torch.float32; received dtype torch.float64"),
        (torch.empty(4, 3, device="meta"), "device cpu; received device meta"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_residual_that_does_not_fit(residual: torch.Tensor, words: str, training: bool) -> None:
    with pytest.raises(RuntimeError, match=words):
        ours.BatchNorm1d(3).train(training)(R(4, 3), residual)


def test_a_mask_and_a_ghost_batch_that_do_not_fit() -> None:
    with pytest.raises(EvennormError, match="a mask holds one value per position"):
        ours.BatchNorm1d(3)(R(4, 3, 5), mask=torch.ones(4, 6))
    with pytest.raises(EvennormError, match="received 4 samples and virtual_batch_size=3"):
        ours.BatchNorm1d(3, virtual_batch_size=3)(R(4, 3))
    with pytest.raises(ValueError, match=r"Expected more than 1 value .* and virtual_batch_size=1"):
        ours.BatchNorm1d(3, virtual_batch_size=1)(R(4, 3))


def test_an_error_changes_nothing() -> None:
    module = ours.BatchNorm1d(3)
    for x, residual in ((R(1, 3), None), (R(4, 5), None), (R(4, 3), R(4, 2))):
        with pytest.raises(EvennormError):
            module(x, residual)
    fresh = ours.BatchNorm1d(3)
    for (key, a), (_, b) in zip(module.named_buffers(), fresh.named_buffers(), strict=True):
        assert torch.equal(a, b), key
