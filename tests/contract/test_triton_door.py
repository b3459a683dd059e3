"""When the composed form serves a tensor on a GPU in place of the kernels: what is said, and that the numbers stay right."""

from __future__ import annotations

import re
import sys
import warnings

import pytest

from tests.contract.on_triton import DEVICE, ON_GPU, served  # isort: skip, may skip all

import torch

from evennorm import ShapeError
from evennorm.core.geometry import Geometry
from evennorm.kernels import triton as kernels
from evennorm.torch import batch_norm, cpu, engine, gpu, gpu_memory, normalize, op, refusal

__all__ = ["served"]


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
        patch.setattr(gpu, "DEVICE", "none")
        return results(leaves)


def failing(*_: object, **__: object) -> None:
    raise RuntimeError("ptxas: no such\n  architecture")


SAID = "takes several operations of torch in place of one fused kernel for "


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_kernel_that_fails_is_replaced_and_named_once(leaves, where, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = composed(leaves, monkeypatch)
    monkeypatch.setattr(gpu_memory, where, failing)
    text = f"{SAID}torch.float64 tensors on a GPU: a kernel failed with RuntimeError: ptxas: no such architecture"
    with pytest.warns(UserWarning, match=re.escape(text)):
        found = results(leaves)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert not gpu.serves(leaves[0])
    assert gpu.serves(leaves[0].float()), "other dtypes have kernels of their own"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(results(leaves), expected, rtol=1e-10, atol=1e-10)


def test_inference_and_running_statistics_after_a_failure(leaves, monkeypatch: pytest.MonkeyPatch) -> None:
    x = leaves[0].detach()
    row = torch.ones(4, dtype=x.dtype, device=DEVICE)
    monkeypatch.setattr(gpu_memory, "inference", failing)
    with pytest.warns(UserWarning, match="a kernel failed"):
        y = normalize(x, row, row, axis=1, epsilon=0.0)
    torch.testing.assert_close(y, x - 1)
    assert engine.follow((row, row, row), batch_norm(x, axis=1)[1], 0.9) is None


def test_memory_that_is_short_is_no_reason_to_take_more(leaves, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_memory, "forward", short)
    with pytest.raises(torch.OutOfMemoryError):
        results(leaves)
    assert gpu.serves(leaves[0])


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


def test_what_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 3, device=DEVICE)
    assert gpu.serves(x, None, torch.ones(3, device=DEVICE))
    assert not gpu.serves(x.to(torch.complex64))
    assert not gpu.serves(x.int())
    assert not gpu.serves(x.to_sparse())
    assert not gpu.serves(x, torch.ones(3, device="meta"))
    inside = []
    torch.func.vmap(lambda one: (inside.append(gpu.serves(x)), one)[1])(x)
    assert inside == [False], "a transform sees through the composed form only"
    monkeypatch.setattr(gpu, "DEVICE", "xpu")
    assert not gpu.serves(x)


def test_errors_are_those_of_every_engine() -> None:
    x = torch.randn(4, 3, device=DEVICE)
    with pytest.raises(ShapeError, match=re.escape("residual is added to the normalized array and has its shape, (4, 3)")):
        batch_norm(x, residual=x[:2])
    with pytest.raises(ShapeError, match="received 4 samples and virtual_batch_size=3"):
        batch_norm(x, virtual_batch_size=3)
    with pytest.raises(ShapeError, match=re.escape("received shape (2,)")):
        batch_norm(x, torch.ones(2, device=DEVICE))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("group", [None, 4])
def test_what_compilers_call(leaves, affine, group, fails, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators' kernels for GPUs, called as a compiler would; here without one."""
    x, gamma, beta, residual = (leaf.detach() for leaf in leaves)
    x = x.transpose(1, 2).contiguous().transpose(1, 2)  # channels last
    geometry, d = Geometry(x.shape, 1), torch.randn(3 if group else 1, 4, dtype=torch.float64, device=DEVICE)
    parameters = (gamma, beta) if affine else (None, None)
    expected = gpu.operated(geometry, x, *parameters, residual, 1e-3, 1.0, group)
    ones = [p if affine else torch.full_like(gamma, value) for p, value in ((gamma, 1), (beta, 0))]
    wanted = gpu.operated_backward(geometry, residual, x, list(expected[1:]), *ones, 1e-3, 0.1, group, d, d)
    if fails:
        monkeypatch.setattr(gpu_memory, "forward", failing)
        monkeypatch.setattr(gpu_memory, "backward", failing)
        with pytest.warns(UserWarning, match="a kernel failed"):
            found = gpu.operated(geometry, x, *parameters, residual, 1e-3, 1.0, group)
        got = gpu.operated_backward(geometry, residual, x, list(expected[1:]), *ones, 1e-3, 0.1, group, d, d)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    reference = batch_norm(x, *parameters, axis=1, epsilon=1e-3, residual=residual, virtual_batch_size=group)[0]
    torch.testing.assert_close(expected[0], reference, rtol=1e-10, atol=1e-10)
    assert op._lying_like(expected[0].contiguous(), x).stride() == torch.empty_like(x).stride()


@pytest.mark.skipif(not ON_GPU, reason="compiles for a GPU")
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_compiled_program_calls_the_operators(memory) -> None:
    x = torch.randn(6, 40, 50, 30, device=DEVICE).contiguous(memory_format=memory).requires_grad_()
    gamma = torch.rand(40, device=DEVICE, requires_grad=True)
    torch.library.opcheck(op.batch_norm, (x, gamma, None, None, [1], 1e-3, 0.0, None))

    def step(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return batch_norm(x * 2, gamma, axis=1, activation="relu", residual=x)[0] + 1

    y, expected = torch.compile(step, fullgraph=True)(x, gamma), step(x, gamma)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    found, wanted = (torch.autograd.grad(z.square().mean(), (x, gamma)) for z in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_tensors_in_cpu_memory_keep_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x = torch.randn(4, 3)
    assert not gpu.serves(x)
    assert cpu.serves(x) == (cpu.choose("torch", "float32") == "cpu")
    assert not refusal._reasons
