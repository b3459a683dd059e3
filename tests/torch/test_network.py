"""The steps that are read of torch models, held to what the models do."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from evennorm.errors import ArgumentError, InputError
from evennorm.models.network import Network, Role
from evennorm.torch import BatchNorm2d, convert
from evennorm.torch.fold import fold
from evennorm.torch.network import network
from tests.torch import architectures


def rows(found: Network) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(step.name, step.role.name, step.inputs) for step in found.steps]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)
        self.token = nn.Parameter(torch.zeros(1, 4, 1, 1))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        y = F.relu(self.bn(self.conv(x)))
        y = F.relu(self.bn(self.conv(x))) + y * scale
        y += self.token
        y = F.dropout(y, 0.5, self.training).mean((2, 3))
        return F.softmax(self.fc(y.view(y.size(0), -1)), dim=1)


def test_functions_calls_and_parameters() -> None:
    found = network(Functional(), (torch.zeros(2, 3, 5, 5),))
    assert rows(found) == [
        ("x", "INPUT", ()),
        ("conv", "LINEAR", ("x",)),
        ("bn", "BATCH_NORM", ("conv",)),
        (":relu", "ACTIVATION", ("bn",)),
        ("conv#2", "LINEAR", ("x",)),
        ("bn#2", "BATCH_NORM", ("conv#2",)),
        (":relu#2", "ACTIVATION", ("bn#2",)),
        (":mul", "OTHER", (":relu",)),
        (":add", "ADD", (":relu#2", ":mul")),
        ("token", "OTHER", ()),
        (":iadd", "ADD", (":add", "token")),
        (":dropout", "DROPOUT", (":iadd",)),
        (":mean", "POOLING", (":dropout",)),
        (":view", "RESHAPE", (":mean",)),
        ("fc", "LINEAR", (":view",)),
        (":softmax", "SOFTMAX", ("fc",)),
    ]
    assert [step.name for step in found.calls(found["bn"])] == ["bn", "bn#2"]
    assert found.calls(found[":relu"]) == (found[":relu"],)
    assert (found["bn"].shape, found["fc"].shape) == ((2, 4, 5, 5), (2, 2))
    assert found.outputs == (":softmax",)
    assert found[":relu"].activation == "relu"
    assert found.gaps == ()


def test_inputs_that_the_model_does_not_take(capsys) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(
        InputError, match=r"received \(2, 5, 8, 8\), of which it says: .*expected input.* to have 3 channels"
    ) as caught:
        network(model, (torch.zeros(2, 5, 8, 8),))
    assert "\n" not in str(caught.value)
    assert "ShapeProp" not in str(caught.value)
    assert capsys.readouterr().err == ""
    assert model.training


def test_the_state_of_a_layer() -> None:
    model = nn.Sequential(BatchNorm2d(3, eps=1e-4, momentum=0.25, activation="relu"))
    with torch.no_grad():
        model[0].running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    step = next(network(model).batch_norms())
    assert (step.activation, step.state.epsilon, step.state.decay, step.state.updates) == ("relu", 1e-4, 0.75, 0)
    np.testing.assert_array_equal(step.state.mean, np.float32([1, 2, 3]))
    assert step.state.unbiased


class Branching(nn.Module):
    """One block asks for a value; what is around it and in it can still be read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.block = architectures_block()
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(F.relu(self.stem(x))))


def architectures_block() -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
            self.norms = nn.ModuleList([nn.BatchNorm2d(4)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x) if x.sum() > 0 else self.norms[0](x)

    return Block()


def test_code_that_cannot_be_followed_is_one_step_and_its_chains_are_read() -> None:
    found = network(Branching())
    assert rows(found) == [
        ("x", "INPUT", ()),
        ("stem.0", "LINEAR", ("x",)),
        ("stem.1", "BATCH_NORM", ("stem.0",)),
        (":relu", "ACTIVATION", ("stem.1",)),
        ("block", "OTHER", (":relu",)),
        ("head", "LINEAR", ("block",)),
        ("block.body:input", "OTHER", ()),
        ("block.body.0", "LINEAR", ("block.body:input",)),
        ("block.body.1", "BATCH_NORM", ("block.body.0",)),
        ("block.body:output", "OTHER", ("block.body.1",)),
        ("block.norms.0:input", "OTHER", ()),
        ("block.norms.0", "BATCH_NORM", ("block.norms.0:input",)),
        ("block.norms.0:output", "OTHER", ("block.norms.0",)),
    ]
    (gap,) = found.gaps
    assert gap.startswith("block: the code of Block cannot be followed (TraceError: symbolically traced variables")
    assert found.outputs == ("head",)


def test_code_around_it_is_followed_all_the_same() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = architectures_block()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.block(torch.relu(self.block(x))) / 2)

    found = network(nn.Sequential(nn.Sequential(Half()), nn.ReLU()))
    assert rows(found)[:7] == [
        ("input", "INPUT", ()),
        ("0.0.block", "OTHER", ("input",)),
        ("0.0:relu", "ACTIVATION", ("0.0.block",)),
        ("0.0.block#2", "OTHER", ("0.0:relu",)),
        ("0.0:truediv", "OTHER", ("0.0.block#2",)),
        ("0.0.norm", "BATCH_NORM", ("0.0:truediv",)),
        ("1", "ACTIVATION", ("0.0.norm",)),
    ]
    (gap,) = found.gaps
    assert gap.startswith("0.0.block: the code of Block cannot be followed")


def test_a_model_that_cannot_be_followed_at_all() -> None:
    block = architectures_block()
    found = network(block)
    assert [step.name for step in found.batch_norms()] == ["body.1", "norms.0"]
    assert found.gaps[0].startswith("the model: the code of Block")
    assert found.outputs == ()


@pytest.mark.parametrize("name", [name for name in dir(architectures) if name.startswith(("resnet", "sequential_"))])
def test_networks_that_people_write(name: str) -> None:
    """Also once converted: every batch normalization has one step, and nothing of the model has changed."""
    model = getattr(architectures, name)()
    before = {key: dict(vars(each)) for key, each in model.named_modules()}
    norms = {path for path, each in model.named_modules() if isinstance(each, nn.BatchNorm2d)}
    for each in (model, convert(model)):
        found = network(each)
        assert {step.layer for step in found.batch_norms()} == norms
        assert found.gaps == ()
        assert {step.inputs[0].rpartition(".")[2][:4] for step in found.batch_norms()} <= {"conv", *"0123"}
    assert {key: dict(vars(each)) for key, each in model.named_modules()} == before


def test_hooks_are_not_lost() -> None:
    model = Branching()
    model.stem.register_forward_hook(lambda *_: None)
    found = network(model)
    assert found.gaps[0] == "stem: Sequential has hooks, which see its input and output"
    assert found["stem"].role is Role.OTHER


def test_a_single_layer_and_no_model() -> None:
    found = network(nn.BatchNorm1d(3))
    assert [step.role for step in found.steps] == [Role.INPUT, Role.BATCH_NORM]
    with pytest.raises(ArgumentError, match=r"reading takes a torch\.nn\.Module; received str"):
        network("model")
    with pytest.raises(ArgumentError, match="received one that is wrapped in DataParallel"):
        network(nn.DataParallel(nn.BatchNorm1d(3)))


def test_tensors_that_code_makes_are_not_fixed_in_the_graph() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.randn(3)

    assert network(nn.Sequential(nn.Linear(3, 3), Noisy())).gaps == ("1: Noisy makes a tensor in its code",)


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\0b", 'a"b', "a\\b", "a\ud800b"])
def test_names_that_break_the_code_of_a_graph(name) -> None:
    """One line that says so, where shapes are asked for and where the model is folded; without shapes it is read."""
    model = nn.Sequential()
    model.add_module(name, nn.Linear(4, 4))
    model.add_module("norm", nn.BatchNorm1d(4))
    x = torch.zeros(3, 4)
    for call in (lambda: network(model, (x,)), lambda: fold(model, (x,))):
        with pytest.raises(InputError, match="writes the names of layers into code") as error:
            call()
        assert "\n" not in str(error.value)
        assert repr(name) in str(error.value)
    assert network(model).steps[1].layer == name


def test_other_odd_names_are_read() -> None:
    model = nn.Sequential()
    model.add_module("a\x1b[2J'\u202e{}%\x85", nn.Linear(4, 4))
    model.add_module("norm", nn.BatchNorm1d(4))
    assert network(model, (torch.zeros(3, 4),)).steps[1].shape == (3, 4)
