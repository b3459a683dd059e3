"""The modules in programs that are compiled or written down for others: torch.compile, torch.export, ONNX, torch.fx."""

from __future__ import annotations

import copy
import io
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import evennorm.torch as ours
from evennorm.torch import native
from tests.grids import mostly, pairwise
from tests.torch.reference import MODULES

THEIRS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}

OPTIONS = [
    {},
    {"activation": "relu"},
    {"activation": "leaky_relu", "negative_slope": 0.2},
    {"activation": "elu", "alpha": 1.5},
    {"momentum": None},
    {"affine": False, "virtual_batch_size": 3},
    {"track_running_stats": False},
    {"activation": "relu6"},
]


@pytest.fixture(params=["extension", "formulas"])
def updated_by(request, monkeypatch: pytest.MonkeyPatch) -> str:
    """What updates the running statistics in a compiled program."""
    if request.param == "formulas":
        monkeypatch.setattr(native, "AVAILABLE", False)
    elif not native.AVAILABLE:
        pytest.skip("built without the extension for this torch")
    return request.param


def trained(options, shape=(6, 4, 5, 5)) -> nn.Module:
    torch.manual_seed(0)
    module = MODULES[len(shape)](4, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(0.5, 1.5)
        if options.get("activation") == "relu6":
            module.weight.mul_(4)
    for _ in range(3):
        module(torch.randn(shape) * 2 + 1)
    return module


@pytest.mark.parametrize(
    *mostly(
        lambda options, training, backend: backend == "aot_eager" or OPTIONS.index(options) == (1 if training else 3),
        "options, training, backend",
        [(*row, backend) for row in product(OPTIONS, [True, False]) for backend in ("aot_eager", "inductor")],
    )
)
def test_torch_compile_takes_the_whole_graph(options, training, backend) -> None:
    """Inductor has a C++ compiler make code of each."""
    torch.compiler.reset()
    eager = trained(options).train(training)
    module = copy.deepcopy(eager)
    compiled = torch.compile(lambda x, residual: module(x * 2, residual) + 1, fullgraph=True, backend=backend)
    for _ in range(2):
        x, residual = (torch.randn(6, 4, 5, 5, requires_grad=True) for _ in range(2))
        y, expected = compiled(x, residual), eager(x * 2, residual) + 1
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        wanted = (x, residual, *eager.parameters()), (x, residual, *module.parameters())
        got = torch.autograd.grad(y.sin().sum(), wanted[1])
        torch.testing.assert_close(got, torch.autograd.grad(expected.sin().sum(), wanted[0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(module.named_buffers()), dict(eager.named_buffers()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(*mostly(lambda backend: backend == "aot_eager", "backend", [("aot_eager",), ("inductor",)]))
def test_torch_compile_with_a_mask_and_batches_of_several_sizes(backend) -> None:
    torch.compiler.reset()
    eager = trained({"activation": "relu"})
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for n in (6, 4, 9):
        x, mask = torch.randn(n, 4, 5, 5), torch.rand(n, 5, 5) < 0.7
        torch.testing.assert_close(compiled(x, mask=mask), eager(x, mask=mask), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dict(module.named_buffers()), dict(eager.named_buffers()), rtol=1e-5, atol=1e-6)


def test_torch_compile_keeps_large_means_harmless() -> None:
    torch.compiler.reset()
    module = ours.BatchNorm1d(4, momentum=1.0)
    x = torch.tensor(np.random.default_rng(0).normal(1e5, 1, (256, 4)), dtype=torch.float32)
    exact = x.double()
    y = torch.compile(module, fullgraph=True)(x)
    expected = (exact - exact.mean(0)) / (exact.var(0, correction=0) + 1e-5).sqrt()
    assert (y - expected).abs().max() < 2e-6
    torch.compiler.reset()
    y = torch.compile(module.eval(), fullgraph=True)(x)
    expected = (exact - module.running_mean) / (module.running_var.double() + 1e-5).sqrt()
    assert (y - expected).abs().max() < 2e-6


def test_two_operators_in_the_compiled_graph(updated_by) -> None:
    """Dynamo does not look into them, which would take longer than all else that it does for a network."""
    torch.compiler.reset()
    graphs = []

    def record(graph, _):
        graphs.append(graph)
        return graph

    torch.compile(trained({"activation": "relu"}), backend=record, fullgraph=True)(torch.randn(6, 4, 5, 5))
    (graph,) = graphs
    called = [str(node.target).split(".") for node in graph.graph.nodes if node.op == "call_function"]
    operators = [(name[0], name[1]) for name in called if name[0].startswith("evennorm")]
    owner = "evennorm_cpu" if updated_by == "extension" else "evennorm"
    assert operators == [("evennorm", "batch_norm"), (owner, "update_running_stats")]
    others = [name[0] for name in called if not name[0].startswith("evennorm")]
    assert all("getitem" in name or "detach" in name for name in others)


@pytest.mark.parametrize(*pairwise(shape=[(4,), (4, 5, 5)], training=[True, False], dynamic=[None, True]))
def test_no_more_compilations_than_torchs_own_modules(shape, training, dynamic) -> None:
    counts = []
    for module in (trained({"activation": "relu"}, (6, *shape)), nn.Sequential(THEIRS[len(shape) + 1](4), nn.ReLU())):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(module.train(training), backend=counter, fullgraph=True, dynamic=dynamic)
        for n in (6, 4, 9, 5):
            compiled(torch.randn(n, *shape, requires_grad=True)).sum().backward()
        counts.append(counter.frame_count)
    assert counts[0] <= counts[1]


@pytest.mark.parametrize(
    ("training", "memory_format"), [(True, torch.channels_last), (False, torch.contiguous_format)], ids=["train", "eval"]
)
def test_inductor_with_sizes_that_are_symbols(training, memory_format) -> None:
    torch.compiler.reset()
    eager = trained({"activation": "relu"}).train(training)
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, mode="reduce-overhead")
    for n in (6, 4):
        x, residual = (torch.randn(n, 4, 5, 5).contiguous(memory_format=memory_format).requires_grad_() for _ in range(2))
        y, expected = compiled(x, residual), eager(x, residual)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        got, wanted = (torch.autograd.grad(z.sin().sum(), (x, residual)) for z in (y, expected))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("momentum", [0.1, 0.9, None])
def test_compiled_running_statistics_refuse_what_eager_ones_refuse(momentum, updated_by) -> None:
    torch.compiler.reset()
    eager = trained({"momentum": momentum})
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for one in (eager, module):
            one.running_mean.fill_(1e5)
            one.running_mean_low.fill_(0.5)  # of another mean
    for broken in (None, float("nan"), float("inf"), None):
        x = torch.randn(6, 4, 5, 5) + 1e5
        if broken is not None:
            x[2, 1, 0, 0] = broken
        compiled(x), eager(x)
    assert int(module.skipped_batches) == 2
    limit = {"rtol": 1e-6, "atol": 0.01 if momentum == 0.1 else 1e-6}  # where a trace of the other mean's low part is left
    torch.testing.assert_close(module.running_mean, eager.running_mean, **limit)
    torch.testing.assert_close(module.running_var, eager.running_var, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(module.num_batches_tracked, eager.num_batches_tracked)


def test_a_compiled_training_step_keeps_the_input_and_numbers_per_channel() -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), ours.BatchNorm2d(4, activation="relu"), nn.Conv2d(4, 3, 1))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        torch.compile(model, fullgraph=True)(torch.randn(6, 3, 8, 8))
    # The input of the model, of normalization and of the second convolution.
    assert sorted(shape for shape in kept if shape.numel() > 100) == [(6, 3, 8, 8), (6, 4, 8, 8), (6, 4, 8, 8)]


BY_STATISTICS = [options for options in OPTIONS if options.get("track_running_stats", True)]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("options", BY_STATISTICS, ids=str)
def test_export_for_inference_speaks_torchs_own_words(options, strict) -> None:
    module = trained(options).eval()
    x = torch.randn(6, 4, 5, 5)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("n")},), strict=strict)
    assert not [node for node in program.graph.nodes if "evennorm" in str(node.target)]
    assert sum("aten.batch_norm" in str(node.target) for node in program.graph.nodes) == 1
    torch.testing.assert_close(program.module()(x[:3]), module(x[:3]), rtol=1e-5, atol=1e-5)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), module(x), rtol=1e-5, atol=1e-5)


def test_export_of_a_training_step() -> None:
    eager = trained({"activation": "relu"})
    module = copy.deepcopy(eager)
    x = torch.randn(6, 4, 5, 5)
    with pytest.warns(UserWarning, match=r"prepare_qat_pt2e.*call evennorm.torch.revert\(model\) first"):
        program = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(program(x), eager(x), rtol=1e-5, atol=1e-5)
    state = program.state_dict()
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)


def run_onnx(model: nn.Module, *inputs: torch.Tensor, file: Path, optimize: bool = True) -> tuple[list[str], np.ndarray]:
    """The operators of the exported model, and what onnxruntime makes of the inputs."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.onnx.export(model, inputs, dynamo=True, verbose=False, optimize=optimize)
    program.save(file)
    session = onnxruntime.InferenceSession(file)
    given = {slot.name: x.numpy() for slot, x in zip(session.get_inputs(), inputs, strict=True)}
    return [node.op_type for node in program.model.graph], session.run(None, given)[0]


ONNX_SHAPES = [(6, 4), (6, 4, 3), (6, 4, 5, 5), (6, 4, 2, 3, 3)]


@pytest.mark.parametrize(
    *mostly(
        lambda options, shape: ONNX_SHAPES.index(shape) == BY_STATISTICS.index(options) % 4,
        "options, shape",
        product(BY_STATISTICS, ONNX_SHAPES),
    )
)
def test_onnx_has_a_standard_node(options, shape, tmp_path: Path) -> None:
    module = trained(options, shape).eval()
    x = torch.randn(shape)
    operators, y = run_onnx(module, x, file=tmp_path / "model.onnx")
    activation = {"relu": ["Relu"], "relu6": ["Clip"], "leaky_relu": ["LeakyRelu"], "elu": ["Elu"]}.get(
        options.get("activation"), []
    )
    assert operators == ["BatchNormalization", *activation]
    np.testing.assert_allclose(y, module(x).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_onnx_of_a_residual(tmp_path: Path) -> None:
    module = trained({"activation": "relu", "memory": "save"}).eval()
    x, residual = torch.randn(6, 4, 5, 5), torch.randn(6, 4, 5, 5)
    operators, y = run_onnx(module, x, residual, file=tmp_path / "model.onnx")
    assert operators == ["BatchNormalization", "Add", "Relu"]
    np.testing.assert_allclose(y, module(x, residual).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_onnx_of_what_is_overwritten(tmp_path: Path) -> None:
    """A program for inference overwrites nothing."""
    module = trained({"activation": "leaky_relu", "memory": "inplace"}).eval()
    x = torch.randn(6, 4, 5, 5)
    operators, y = run_onnx(module, x, file=tmp_path / "model.onnx")
    assert operators == ["BatchNormalization", "LeakyRelu"]
    np.testing.assert_allclose(y, module(x.clone()).detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", BY_STATISTICS, ids=str)
@pytest.mark.filterwarnings("ignore:`torch.jit.trace`")
def test_torchscript_traces_inference(options) -> None:
    module = trained(options).eval()
    x = torch.randn(6, 4, 5, 5)
    traced = torch.jit.trace(module, (x,))
    assert "aten::batch_norm" in str(traced.graph)
    torch.testing.assert_close(traced(x[:3]), module(x[:3]), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_torchscript_cannot_read_the_source() -> None:
    with pytest.raises(NotImplementedError, match=r"cannot read BatchNorm2d; export the model by torch.export.export"):
        torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1), ours.BatchNorm2d(4)))


def test_torch_fx_records_one_node() -> None:
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), trained({"activation": "relu"})

        def forward(self, x, mask):
            return self.norm(self.norm(self.conv(x), x), mask=mask)

    block = Block()
    traced = torch.fx.symbolic_trace(block)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert targets == ["conv", "norm", "norm"]
    x, mask = torch.randn(6, 4, 5, 5), torch.rand(6, 5, 5) < 0.7
    expected = copy.deepcopy(block)(x, mask)
    torch.testing.assert_close(traced(x, mask), expected, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_sizes_that_are_symbols(training: bool) -> None:
    module = trained({"track_running_stats": not training, "activation": "relu"}).train(training)
    program = make_fx(module, tracing_mode="symbolic", _allow_non_fake_inputs=True)(torch.randn(6, 4, 5, 5))
    x = torch.randn(3, 4, 7, 7)
    torch.testing.assert_close(program(x), module(x), rtol=1e-5, atol=1e-5)
