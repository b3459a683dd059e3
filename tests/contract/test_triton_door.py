"""Test when the composed form computes in place of the GPU kernels: what is said, and that numbers stay right."""

from __future__ import annotations

import re
import sys
import warnings

import pytest

from tests.contract.on_triton import DEVICE, ON_GPU, on_gpu_kernels  # isort: skip, may skip all

import torch

from evennorm import ShapeError
from evennorm.kernels import triton as kernels
from evennorm.kernels.triton.kernel import TritonKernel
from evennorm.torch import BatchNorm1d, batch_norm, gpu, normalize, refusal
from evennorm.torch.kernels import cpu_kernel, kernel_for

__all__ = ["on_gpu_kernels"]


@pytest.fixture
def leaves() -> list[torch.Tensor]:
    double = {"dtype": torch.float64, "device": DEVICE, "requires_grad": True}
    return [
        torch.randn(12, 4, 5, **double),
        torch.rand(4, **double),
        torch.rand(4, **double),
        torch.randn(12, 4, 5, **double),
    ]


def results(leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    x, gamma, beta, residual = leaves
    y, moments = batch_norm(x, gamma, beta, axis=1, activation="leaky_relu", residual=residual)
    loss = y.sin().sum() + moments.variance.sin().sum()
    return [y, *moments[1:], *torch.autograd.grad(loss, leaves)]


def composed(leaves: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "SUPPORTED", frozenset())
        return results(leaves)


def supports(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    return kernel_for(x, *others) is gpu.triton_kernel()


def failing(*_: object, **__: object) -> None:
    raise RuntimeError("ptxas: no such\n  architecture")


SAID = "takes several operations of torch in place of one fused kernel for "


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_kernel_that_fails_is_replaced_and_named_once(leaves, where, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = composed(leaves, monkeypatch)
    monkeypatch.setattr(TritonKernel, where, failing)
    text = f"{SAID}torch.float64 tensors on a GPU: a kernel failed with RuntimeError: ptxas: no such architecture"
    with pytest.warns(UserWarning, match=re.escape(text)):
        found = results(leaves)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert not supports(leaves[0])
    assert supports(leaves[0].float()), "other dtypes have kernels of their own"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(results(leaves), expected, rtol=1e-10, atol=1e-10)


def test_inference_after_a_failure(leaves, monkeypatch: pytest.MonkeyPatch) -> None:
    x = leaves[0].detach()
    row = torch.ones(4, dtype=x.dtype, device=DEVICE)
    monkeypatch.setattr(TritonKernel, "infer", failing)
    with pytest.warns(UserWarning, match="a kernel failed"):
        y = normalize(x, row, row, axis=1, epsilon=0.0)
    torch.testing.assert_close(y, x - 1)


def test_memory_that_is_short_is_no_reason_to_take_more(leaves, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TritonKernel, "forward", short)
    with pytest.raises(torch.OutOfMemoryError):
        results(leaves)
    assert supports(leaves[0])


def test_without_triton_one_warning_explains(leaves, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = composed(leaves, monkeypatch)
    monkeypatch.setattr(kernels, "_installed", lambda: False)
    text = f"{SAID}tensors on a GPU: Triton is not installed; pip install 'evennorm[gpu]'"
    with pytest.warns(UserWarning, match=re.escape(text)) as told:
        found, _ = results(leaves), results([leaf.detach().float().requires_grad_() for leaf in leaves])
    assert len(told) == 1
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_triton_is_not_loaded_after_tensorflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would end the process."""
    monkeypatch.setitem(sys.modules, "tensorflow", object())
    assert kernels.missing() is None, "Triton was first"
    monkeypatch.delitem(sys.modules, "triton")
    assert kernels.missing() == "Triton cannot be loaded after TensorFlow; import triton before tensorflow"


def test_what_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 3, device=DEVICE)
    assert supports(x, None, torch.ones(3, device=DEVICE))
    assert not supports(x.to(torch.complex64))
    assert not supports(x.int())
    assert not supports(x.to_sparse())
    assert not supports(x, torch.ones(3, device="meta"))
    inside = []
    torch.func.vmap(lambda one: (inside.append(supports(x)), one)[1])(x)
    assert inside == [False], "a transform sees through the composed form only"
    monkeypatch.setattr(gpu, "DEVICE", "xpu")
    assert gpu.kernel_for(x) is None


def test_errors_are_those_of_every_engine() -> None:
    x = torch.randn(4, 3, device=DEVICE)
    with pytest.raises(ShapeError, match=re.escape("residual is added to the normalized array and has its shape, (4, 3)")):
        batch_norm(x, residual=x[:2])
    with pytest.raises(ShapeError, match="received 4 samples and virtual_batch_size=3"):
        batch_norm(x, virtual_batch_size=3)
    with pytest.raises(ShapeError, match=re.escape("received shape (2,)")):
        batch_norm(x, torch.ones(2, device=DEVICE))


@pytest.mark.parametrize("parameters", [torch.float64, torch.float16])
def test_a_module_normalizes_and_updates_in_one_pass(parameters, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its parameters are of another precision. After a failure the composed form does the same."""
    x = torch.randn(20, 4, dtype=torch.float64, device=DEVICE)
    module = BatchNorm1d(4, dtype=torch.float64, device=DEVICE)
    module.weight.data = module.weight.data.to(parameters)
    calls = []
    inner = TritonKernel.forward
    monkeypatch.setattr(TritonKernel, "forward", lambda *given, **named: (calls.append(named), inner(*given, **named))[1])
    expected = torch.nn.BatchNorm1d(4, dtype=torch.float64, device=DEVICE)
    for _ in range(2):
        torch.testing.assert_close(module(x), expected(x), rtol=1e-10, atol=1e-10)
    assert [named["running"] is not None for named in calls] == [True, True]
    monkeypatch.setattr(TritonKernel, "forward", failing)
    with pytest.warns(UserWarning, match="a kernel failed"):
        torch.testing.assert_close(module(x), expected(x), rtol=1e-10, atol=1e-10)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(module, name), getattr(expected, name), rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not ON_GPU, reason="compiles for a GPU")
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_compiled_program_computes_the_same(memory) -> None:
    x = torch.randn(6, 40, 50, 30, device=DEVICE).contiguous(memory_format=memory).requires_grad_()
    gamma = torch.rand(40, device=DEVICE, requires_grad=True)

    def step(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return batch_norm(x * 2, gamma, axis=1, activation="relu", residual=x)[0] + 1

    y, expected = torch.compile(step, fullgraph=True)(x, gamma), step(x, gamma)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    found, wanted = (torch.autograd.grad(z.square().mean(), (x, gamma)) for z in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_tensors_in_cpu_memory_keep_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cpu_kernel
    monkeypatch.undo()
    assert kernel_for(torch.randn(4, 3)) in (None, before)
    assert gpu.kernel_for(torch.randn(4, 3)) is None
    assert not refusal._reasons
