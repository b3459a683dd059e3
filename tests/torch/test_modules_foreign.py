"""Tools of torch that make something else of a module: they get what they take it for, or say what to do first."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx

import evennorm.torch as ours

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(norm=nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm(4), nn.ReLU())


# Synchronization

LOST = [
    ({"activation": "relu"}, "activation='relu'"),
    ({"virtual_batch_size": 2}, "virtual_batch_size=2"),
    ({"memory": "inplace"}, "memory='inplace'"),
    ({"activation": "elu", "memory": "inplace"}, "activation='elu' and memory='inplace'"),
]


@pytest.mark.parametrize(("options", "words"), LOST)
def test_synchronizing_loses_nothing(options, words: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(ours.BatchNorm1d(4, **options)))
    with pytest.raises(ValueError, match=f"SyncBatchNorm only normalizes.*BatchNorm1d with {words}; call evennorm"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[1][0]) is ours.BatchNorm1d
    assert not hasattr(model[1][0], "qconfig")


def test_plain_modules_are_synchronized() -> None:
    model = network(ours.BatchNorm2d)
    model(X)
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert type(synchronized[1]) is nn.SyncBatchNorm
    torch.testing.assert_close(synchronized.eval()(X), model.eval()(X), rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError):
        synchronized[1](torch.randn(6, 4, 6, 6), torch.randn(6, 4, 6, 6))


# Quantization

FLOWS = {
    "fuse_modules": lambda m: quantization.fuse_modules(m.eval(), [["0", "1"]]),
    "fuse_modules_qat": lambda m: quantization.fuse_modules_qat(m.train(), [["0", "1"]]),
    "prepare": lambda m: quantization.prepare(configured(m.eval(), quantization.get_default_qconfig("x86"))),
    "prepare_qat": lambda m: quantization.prepare_qat(configured(m.train(), quantization.get_default_qat_qconfig("x86"))),
    "fuse_fx": lambda m: quantize_fx.fuse_fx(m.eval()),
    "prepare_fx": lambda m: quantize_fx.prepare_fx(m.eval(), quantization.get_default_qconfig_mapping("x86"), (X,)),
    "prepare_qat_fx": lambda m: quantize_fx.prepare_qat_fx(
        m.train(), quantization.get_default_qat_qconfig_mapping("x86"), (X,)
    ),
}


def configured(model: nn.Module, qconfig) -> nn.Module:
    model.qconfig = qconfig
    return model


@pytest.mark.parametrize("made", ["ours", "converted"])
@pytest.mark.parametrize("flow", FLOWS)
def test_quantization_says_to_revert_first(flow: str, made: str) -> None:
    model = network(ours.BatchNorm2d) if made == "ours" else ours.convert(network())
    with pytest.raises(
        ValueError, match=r"received evennorm.*BatchNorm2d; call evennorm.torch.revert\(model\) first"
    ) as caught:
        FLOWS[flow](copy.deepcopy(model))
    assert "\n" not in str(caught.value)
    FLOWS[flow](ours.revert(model))


def test_quantization_aware_training_of_a_converted_model() -> None:
    """Trained with evennorm, reverted, then fused, trained on and made of integers, as with torch's own layers."""
    outputs = []
    for model in (network(), ours.convert(network())):
        for step in range(3):
            model(X + step)
        model = ours.revert(model)
        model = nn.Sequential(quantization.QuantStub(), *model, quantization.DeQuantStub())
        model = quantization.fuse_modules_qat(model.train(), [["1", "2", "3"]])
        prepared = quantization.prepare_qat(configured(model, quantization.get_default_qat_qconfig("x86")))
        optimizer = torch.optim.SGD(prepared.parameters(), 0.01)
        for _ in range(2):
            optimizer.zero_grad()
            prepared(X).square().mean().backward()
            optimizer.step()
        outputs.append((prepared.eval()(X), quantization.convert(prepared)(X)))
    (expected, _), (trained, integers) = outputs
    step = float(expected.detach().abs().max()) / 127
    torch.testing.assert_close(trained, expected, rtol=0, atol=step)
    torch.testing.assert_close(integers, expected, rtol=0, atol=4 * step)


# Export without running statistics

OPTIONS = [
    {},
    {"activation": "relu"},
    {"activation": "leaky_relu"},
    {"activation": "elu"},
    {"affine": False},
    {"bias": False},
]


def without_statistics(options, shape=(6, 4, 5, 5)) -> nn.Module:
    make = {2: ours.BatchNorm1d, 3: ours.BatchNorm1d, 4: ours.BatchNorm2d}[len(shape)]
    module = make(4, track_running_stats=False, **options).eval()
    with torch.no_grad():
        for k, parameter in enumerate(p for p in module.parameters()):
            parameter.copy_(torch.linspace(0.5, 1.5, 4) + k)
    return module


def test_the_composed_form_is_torchs() -> None:
    """Whose module the exported programs are held to."""
    theirs, own = nn.BatchNorm2d(4, track_running_stats=False).eval(), without_statistics({"affine": False})
    x = torch.randn(6, 4, 5, 5) * 3 + 100
    expected = theirs.double()(x.double()).float()
    traced = torch.jit.trace(own, (x,))
    torch.testing.assert_close(traced(x), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.export.export(own, (x,)).module()(x), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3), (6, 4, 5, 5)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_programs_without_running_statistics(options, shape) -> None:
    module, x, other = without_statistics(options, shape), torch.randn(shape), torch.randn(shape) + 3
    traced = torch.jit.trace(module, (x,))
    torch.testing.assert_close(traced(other), module(other), rtol=1e-4, atol=1e-5)
    program = torch.export.export(module, (x,))
    assert not [node for node in program.graph.nodes if "evennorm" in str(node.target)]
    torch.testing.assert_close(program.module()(other), module(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_onnx_without_running_statistics(options, dynamo: bool, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, x, other = without_statistics(options), torch.randn(6, 4, 5, 5), torch.randn(6, 4, 5, 5) + 3
    file = tmp_path / "model.onnx"
    if dynamo:
        torch.onnx.export(module, (x,), dynamo=True, verbose=False).save(file)
    else:
        stream = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(module, (x,), stream, dynamo=False)
        file.write_bytes(stream.getvalue())
    session = onnxruntime.InferenceSession(file)
    y = session.run(None, {session.get_inputs()[0].name: other.numpy()})[0]
    np.testing.assert_allclose(y, module(other).detach().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}], ids=str)
def test_tracing_in_training_mode_is_refused_in_one_line(options) -> None:
    module, x = ours.BatchNorm2d(4, **options), torch.randn(6, 4, 5, 5)
    calls = [
        lambda: torch.jit.trace(module, (x,)),
        lambda: torch.onnx.export(module, (x,), io.BytesIO(), dynamo=False, training=torch.onnx.TrainingMode.TRAINING),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match=r"BatchNorm2d in training mode; call model.eval\(\) first") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"virtual_batch_size": 2}, {"memory": "inplace"}], ids=str)
def test_ghost_batches_and_overwriting_are_no_part_of_a_traced_program(options) -> None:
    module, x = without_statistics(options), torch.randn(6, 4, 5, 5)
    for write in (torch.jit.trace, torch.export.export):
        with pytest.raises(NotImplementedError, match="no ghost batches and overwrites no input"):
            write(module, (x,))
