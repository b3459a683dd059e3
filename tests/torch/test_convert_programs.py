"""Converted models are copied, pickled, compiled, traced and exported like any other."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from evennorm.torch import convert, report, revert
from evennorm.torch.conversion.blocks import is_fused
from tests.torch.architectures import ARCHITECTURES, BasicBlock, resnet18
from tests.torch.test_convert import NAMES, batches, model_of

X = batches()[0]
PROGRAMS = ["ResNet-18", "ResNet of Sequentials", "MobileNetV2", "pre-activation ResNet", "DCGAN"]


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", NAMES)
def test_copies_are_fused_as_the_model_is(name: str, way: str) -> None:
    ours = convert(model_of(name))
    twin = COPIES[way](ours)
    assert report(twin) == report(ours)
    assert [type(module) for module in twin.modules()] == [type(module) for module in ours.modules()]
    for training in (True, False):
        torch.testing.assert_close(twin.train(training)(X), ours.train(training)(X), rtol=0, atol=0)
    assert [type(module) for module in revert(twin).modules()] == [type(module) for module in model_of(name).modules()]
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in ours.parameters()}


def test_a_shallow_copy_shares_what_it_holds() -> None:
    block = convert(BasicBlock(3, 3).double())
    twin = copy.copy(block)
    assert twin.bn1 is block.bn1
    assert is_fused(twin)
    torch.testing.assert_close(twin(X), block(X))


def test_a_file_is_read_in_another_process(tmp_path: Path) -> None:
    """Where nothing of the conversion has been loaded yet."""
    ours = convert(model_of("ResNet-18")).eval()
    torch.save(ours, tmp_path / "model.pt")
    torch.save((X, ours(X)), tmp_path / "values.pt")
    code = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1] + '/model.pt', weights_only=False)\n"
        "x, y = torch.load(sys.argv[1] + '/values.pt')\n"
        "torch.testing.assert_close(model(x), y, rtol=0, atol=0)\n"
        "from evennorm.torch import report\n"
        "print(report(model).summary)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == report(ours).summary


def test_a_file_follows_the_code_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is not in the file, so that it cannot contradict the code."""
    file = pickle.dumps(convert(BasicBlock(3, 3).double()))

    def without_shortcut(self: Any, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))

    module = sys.modules[BasicBlock.__module__]
    changed = type("BasicBlock", (BasicBlock,), {"forward": without_shortcut, "__module__": module.__name__})
    monkeypatch.setattr(module, "BasicBlock", changed)
    read = pickle.loads(file)
    assert [layer.steps for layer in report(read).layers] == [("relu",), ()]
    torch.testing.assert_close(read(X), without_shortcut(revert(read), X))


@pytest.mark.parametrize("name", PROGRAMS)
def test_compiled_without_a_break(name: str) -> None:
    torch.compiler.reset()
    model = model_of(name)
    ours = convert(model)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for training in (True, False):
        expected = model.train(training)(X)
        ours.train(training)
        y = compiled(X)
        torch.testing.assert_close(y, expected)
        if training:
            y.square().sum().backward()
            expected.square().sum().backward()
    for mine, theirs in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    for (key, mine), theirs in zip(ours.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=key)


def test_hooks_that_come_after_compilation_are_called() -> None:
    torch.compiler.reset()
    ours = convert(model_of("ResNet-18"))
    compiled = torch.compile(ours, backend="eager")
    compiled(X)
    seen: list[Tensor] = []
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        torch.compiler.reset()
        ours.layer1[0].bn1.register_forward_hook(lambda module, args, y: seen.append(y.detach().clone()))
        compiled(X)
    assert len(seen) == 1
    assert seen[0].min() < 0


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", PROGRAMS)
def test_exported(name: str, strict: bool) -> None:
    model = model_of(name).eval()
    ours = convert(model)
    program = torch.export.export(ours, (X,), dynamic_shapes={"x": {0: torch.export.Dim("samples", min=2)}}, strict=strict)
    assert not [node for node in program.graph.nodes if "evennorm" in str(node.target)]
    assert set(program.state_dict) == {
        key for key in ours.state_dict() if "num_batches" not in key or key in program.state_dict
    }
    for x in (X, X[:3]):
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("data-dependent", "ResNet of Sequentials")])
def test_users_trace_them_with_torch_fx(name: str) -> None:
    """Module by module, as they trace the original."""
    model = model_of(name)
    ours = convert(model)
    graphs = [torch.fx.symbolic_trace(each).graph for each in (model, ours)]
    names = [[(node.op, str(node.target)) for node in graph.nodes if node.op == "call_module"] for graph in graphs]
    assert names[0] == names[1]


def test_traced_by_torchscript() -> None:
    model = model_of("ResNet-18").eval()
    with torch.no_grad():
        traced = torch.jit.trace(convert(model), X)
    torch.testing.assert_close(traced(X), model(X))


def test_called_functionally() -> None:
    ours = convert(model_of("ResNet-18"))
    other = convert(ARCHITECTURES["ResNet-18"].make().double())
    state = {key: value.detach().clone() for key, value in other.state_dict().items()}
    torch.testing.assert_close(functional_call(ours, state, X), other(X))
    assert is_fused(ours)


def test_checkpointed() -> None:
    model = model_of("ResNet-18")
    ours = convert(model)
    expected = model(X)
    y = checkpoint(ours, X, use_reentrant=False)
    for each in (y, expected):
        each.square().sum().backward()
    for mine, theirs in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_replicas_of_data_parallel_are_fused() -> None:
    ours = convert(model_of("ResNet-18"))
    replica = ours._replicate_for_data_parallel()
    assert type(replica) is type(ours)
    assert is_fused(replica)


def test_methods_of_the_users_class_stay() -> None:
    class Named(BasicBlock):
        def __init__(self) -> None:
            super().__init__(3, 3)

        @property
        def width(self) -> int:
            return self.conv1.out_channels

        def forward(self, x: Tensor) -> Tensor:
            """Twice."""
            return super().forward(x) * 2

        def extra_repr(self) -> str:
            return f"width={self.width}"

    block = convert(Named())
    assert is_fused(block)
    assert isinstance(block, Named)
    assert block.width == 3
    assert repr(block).startswith("Named(\n  width=3\n")
    assert (type(block).__name__, type(block).__qualname__) == (Named.__name__, Named.__qualname__)
    assert type(block).forward.__doc__ == "Twice."
    new = type(block)()
    assert not is_fused(new)
    torch.testing.assert_close(new(X.float()), types.MethodType(Named.forward, new)(X.float()))


def losses(model: nn.Module, steps: int = 20) -> list[float]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(32, 3, 16, 16, generator=generator)
    labels = torch.randint(5, (32,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    found = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.filterwarnings("ignore")
def test_the_whole_way(tmp_path: Path) -> None:
    """Convert, train, save, load, export to ONNX, run: as with the original."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = resnet18()
    ours = convert(model)
    expected, found = losses(model), losses(ours)
    assert expected[-1] < 0.5 * expected[0]
    np.testing.assert_allclose(found, expected, rtol=2e-3)
    torch.save(ours.state_dict(), tmp_path / "weights.pt")
    weights = torch.load(tmp_path / "weights.pt")
    theirs, ours = resnet18(), convert(resnet18())
    for each in (theirs, ours):
        each.load_state_dict(weights, strict=True)
        each.eval()
    x = X.float()
    torch.onnx.export(ours, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(y, theirs(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_torchscript_is_refused_with_a_reason() -> None:
    with pytest.raises(NotImplementedError, match=r"torch.jit.script cannot read BatchNorm2d"):
        torch.jit.script(convert(resnet18()))
